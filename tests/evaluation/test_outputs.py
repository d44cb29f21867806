"""What a model makes of samples, alone and with the work shared among ranks."""

import numpy as np
import pytest
import torch

from aam.config import PenaltyOptions
from aam.data.dataset import SampleDataset
from aam.data.table import read_table
from aam.evaluation import outputs
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
ROWS = np.arange(3, 21)


class Ranks(list):
    """Ranks that run one after the other: the last to come has all that the others gave."""

    def __init__(self, size):
        self.given = []
        super().__init__(Rank(self, rank, size) for rank in range(size))


class Rank(RankGroup):
    def __init__(self, ranks, rank, size):
        self.ranks, self.rank, self.size, self.calls = ranks, rank, size, 0

    def gather(self, own, counts):
        """The rows of all ranks; zeros for those that have not come yet."""
        assert len(own) == counts[self.rank] and len(counts) == self.size
        if self.rank == 0:
            self.ranks.given.append([own.new_zeros((n, *own.shape[1:])) for n in counts])
        gathered = self.ranks.given[self.calls]
        gathered[self.rank], self.calls = own, self.calls + 1
        return torch.cat(gathered)


@pytest.fixture(scope="module")
def model(community):
    torch.manual_seed(0)
    dataset = SampleDataset(read_table(community.table))
    encoder = AsvEncoder(SHAPE)
    torch.nn.init.normal_(encoder.gate)
    model = Predictor(encoder, PredictorShape(outputs=2)).eval()
    model.pairs = PretrainedModel(encoder, free_clades=9).pairs
    return model, dataset


@pytest.fixture
def encoded(monkeypatch):
    """Small chunks, and a list of how many sequences are encoded at a time."""
    monkeypatch.setattr(outputs, "ASV_CHUNK", 10)
    monkeypatch.setattr(outputs, "SAMPLE_CHUNK", 5)
    encode, counts = AsvEncoder.forward, []
    monkeypatch.setattr(
        AsvEncoder, "forward",
        lambda self, tokens, **more: counts.append(len(tokens)) or encode(self, tokens, **more),
    )  # fmt: skip
    return counts


def nucleotides(model, data, ranks):
    check = check_nucleotides(model.encoder, data, np.arange(44), PenaltyOptions(), ranks=ranks)
    return torch.tensor([check.loss, check.accuracy])


QUESTIONS = {
    "sequences": lambda model, data, ranks: encode_asvs(model.encoder, data, np.arange(44), ranks),
    "nucleotides": nucleotides,
    "distances": lambda *asked: torch.from_numpy(predicted_distances(*asked[:2], ROWS, asked[2])),
    "outputs": lambda *asked: predict_outputs(*asked[:2], ROWS, chunk=5, ranks=asked[2]),
}


@pytest.mark.parametrize("size", [2, 7])
@pytest.mark.parametrize("question", QUESTIONS)
def test_ranks_share_the_work_and_get_the_whole_result(model, encoded, question, size):
    alone = QUESTIONS[question](*model, None)
    everything, shares = sum(encoded), []
    for rank in Ranks(size):
        encoded.clear()
        result = QUESTIONS[question](*model, rank)
        shares.append(sum(encoded))
    # Vectors of ranks that come later are zeros to the earlier ones, so that samples differ.
    if question in ("sequences", "nucleotides"):
        assert torch.equal(result, alone)
        assert everything == 44
    assert result.shape == alone.shape
    assert max(shares) <= everything / min(size, 5) + 10
    assert sum(shares) <= everything + 10 * size  # a rank without work looks at one chunk


def test_known_vectors_are_not_computed_again(model, encoded):
    predictor, dataset = model
    known = encode_asvs(predictor.encoder, dataset, np.arange(len(dataset.sequences)))
    expected = predict_outputs(predictor, dataset, ROWS)
    encoded.clear()
    found = predict_outputs(predictor, dataset, ROWS, frozen_asvs=known)
    torch.testing.assert_close(found, expected)
    assert not encoded


def test_no_sequences():
    encoder, none = AsvEncoder(SHAPE), np.empty(0, dtype=np.int64)
    assert encode_asvs(encoder, None, none).shape == (0, 32)
    check = check_nucleotides(encoder, None, none, PenaltyOptions())
    assert np.isnan(check.loss) and not len(check.bases)
