"""What a model says about samples, alone and with the work shared among ranks."""

import numpy as np
import pytest
import torch

from aam.config import PenaltyOptions
from aam.data.dataset import SampleDataset
from aam.data.table import read_table
from aam.evaluation import outputs as evaluation
from aam.evaluation.outputs import (
    check_nucleotides,
    encode_asvs,
    predict_outputs,
    predicted_distances,
)
from aam.learning.distributed import RankGroup
from aam.model import AsvEncoder, EncoderShape, Predictor, PretrainedModel
from aam.model.predictor import PredictorShape

SHAPE = EncoderShape(embedding_dim=32, num_heads=2, num_layers=1)


class Ranks:
    """Ranks that run one after the other: the last to come has all that the others gave."""

    def __init__(self, size):
        self.size, self.given, self.asked = size, [], []

    def __iter__(self):
        for rank in range(self.size):
            self.asked.clear()
            yield Ranked(self, rank)


class Ranked(RankGroup):
    def __init__(self, ranks, rank):
        self.ranks, self.rank, self.size = ranks, rank, ranks.size

    def gather(self, own, counts):
        """The rows of all ranks; zeros for those that have not come yet."""
        assert len(own) == counts[self.rank] and len(counts) == self.size
        ranks, number = self.ranks, len(self.ranks.asked)
        ranks.asked.append(own)
        if self.rank == 0:
            ranks.given.append([own.new_zeros((count, *own.shape[1:])) for count in counts])
        ranks.given[number][self.rank] = own
        return torch.cat(ranks.given[number])


@pytest.fixture(scope="module")
def model(community):
    torch.manual_seed(0)
    dataset = SampleDataset(read_table(community.table))
    encoder = AsvEncoder(SHAPE)
    torch.nn.init.normal_(encoder.gate)
    model = Predictor(encoder, PredictorShape(outputs=2)).eval()
    model.pairs = PretrainedModel(encoder, free_clades=9).pairs
    return model, dataset


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(evaluation, "ASV_CHUNK", 10)
    monkeypatch.setattr(evaluation, "SAMPLE_CHUNK", 5)


ROWS = np.arange(3, 21)
QUESTIONS = {
    "sequences": lambda model, data, way: encode_asvs(model.encoder, data, np.arange(44), way),
    "nucleotides": lambda model, data, way: torch.from_numpy(
        np.array(check_nucleotides(
            model.encoder, data, np.arange(44), PenaltyOptions(), exchange=way
        ).loss)
    ),
    "distances": lambda model, data, way: torch.from_numpy(
        predicted_distances(model, data, ROWS, way)
    ),
    "outputs": lambda model, data, way: predict_outputs(
        model, data, ROWS, chunk=5, exchange=way
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", [2, 3, 7])
@pytest.mark.parametrize("question", QUESTIONS)
def test_ranks_share_the_work_and_get_the_whole_result(model, question, size, monkeypatch):
    encode, encoded = AsvEncoder.forward, []

    def counted(self, tokens, **more):
        encoded.append(len(tokens))
        return encode(self, tokens, **more)

    monkeypatch.setattr(AsvEncoder, "forward", counted)
    alone = QUESTIONS[question](*model, None)
    everything = sum(encoded)
    ranks, shares = Ranks(size), []
    for one in ranks:
        encoded.clear()
        result = QUESTIONS[question](*model, one)
        shares.append(sum(encoded))
    # Vectors of ranks that come later are zeros to the earlier ones, so that samples differ.
    if question in ("sequences", "nucleotides"):
        assert torch.equal(result, alone)
        assert everything == 44
    assert result.shape == alone.shape
    assert max(shares) <= everything / min(size, 5) + 10
    assert sum(shares) <= everything + 10 * size  # a rank without work looks at one chunk


def test_known_vectors_are_not_computed_again(model, monkeypatch):
    predictor, dataset = model
    known = encode_asvs(predictor.encoder, dataset, np.arange(len(dataset.sequences)))
    expected = predict_outputs(predictor, dataset, ROWS, chunk=5)
    monkeypatch.setattr(AsvEncoder, "forward", None)
    found = predict_outputs(predictor, dataset, ROWS, chunk=5, frozen_asvs=known)
    torch.testing.assert_close(found, expected)


def test_no_sequences():
    encoder = AsvEncoder(SHAPE)
    assert encode_asvs(encoder, None, np.empty(0, dtype=np.int64)).shape == (0, 32)
    check = check_nucleotides(encoder, None, np.empty(0, dtype=np.int64), PenaltyOptions())
    assert np.isnan(check.loss) and not len(check.bases)
