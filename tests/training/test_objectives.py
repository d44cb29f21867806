"""The losses against numbers worked out by hand, masks by their statistics, frozen bases."""

import copy
import re

import numpy as np
import pytest
import torch

from aam.config import FinetunePenaltyOptions, PenaltyOptions, TargetOptions
from aam.data.dataset import SampleDataset
from aam.data.sequences import MASK, START, tokenize
from aam.data.table import read_table
from aam.model import CommunityEncoder, Predictor
from aam.model.encoder import EncoderShape
from aam.model.predictor import PredictorShape
from aam.training.evaluation import encode_asvs, predicted_distances, sample_embeddings
from aam.training.exchange import Exchange
from aam.training.losses import DistanceLoss, TargetLoss, count_divergence
from aam.training.masking import mask_tokens, masked_copies, masked_nucleotide_terms, span_hits
from aam.training.objectives import FinetuneObjective, PretrainObjective, SamplePart
from aam.training.step import Step
from aam_kernels import Ragged

SHAPE = EncoderShape(embedding_dim=32, num_heads=2, num_layers=1, dropout=0.3)


class Matrix:
    """Distances from a matrix."""

    def __init__(self, count):
        values = np.random.default_rng(0).random((count, count))
        self.values = (values + values.T) / 2

    def pairwise(self, rows):
        return self.cross(rows, rows)

    def cross(self, rows_a, rows_b):
        return self.values[np.ix_(rows_a, rows_b)]


@pytest.fixture(scope="module")
def dataset(community):
    table = read_table(community.table)
    return SampleDataset(table, targets=np.linspace(-1, 1, 24, dtype=np.float32))


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return CommunityEncoder(SHAPE)


def test_distance_loss_is_the_mean_over_all_pairs(dataset, encoder):
    source, rows = Matrix(24), [3, 1, 7, 20, 5]
    objective = PretrainObjective(
        encoder, PenaltyOptions(nucleotide_penalty=0.0), DistanceLoss(source)
    )
    terms = Step(objective, Exchange())(dataset.batch(rows))
    z = sample_embeddings(encoder, dataset, np.array(rows)).double().numpy()
    scale = np.exp(encoder.unifrac_encoder.log_scale.item())
    errors = [
        np.tanh(np.sqrt(max(((z[i] - z[j]) ** 2).sum(), 1e-8)) / scale)
        - source.values[rows[i], rows[j]]
        for i in range(5)
        for j in range(i + 1, 5)
    ]
    assert terms["unifrac_loss"] == pytest.approx(np.mean(np.square(errors)), rel=1e-4)
    assert terms["distance_mae"] == pytest.approx(np.mean(np.abs(errors)), rel=1e-4)
    assert terms["loss"] == pytest.approx(10 * terms["unifrac_loss"], rel=1e-6)


def test_every_pair_of_the_batch_has_a_gradient(dataset, encoder):
    z = torch.randn(5, 8, requires_grad=True)
    distances = encoder.unifrac_encoder.distances(z)
    for i in range(5):
        for j in range(5):
            (gradient,) = torch.autograd.grad(distances[i, j], z, retain_graph=True)
            touched = set(gradient.abs().sum(1).nonzero()[:, 0].tolist())
            assert touched == (set() if i == j else {i, j})
    assert torch.equal(distances.diagonal(), torch.zeros(5))


def test_training_distances_are_those_of_evaluation(dataset, encoder):
    """Clean tokens, no dropout: nothing random that differs between samples can be learned."""
    rows = np.arange(8)
    expected = predicted_distances(encoder, sample_embeddings(encoder, dataset, rows))
    objective = PretrainObjective(encoder, PenaltyOptions(), DistanceLoss(Matrix(24)))
    objective.train()
    seen = []
    original = encoder.unifrac_encoder.distances
    encoder.unifrac_encoder.distances = lambda *z: seen.append(original(*z)) or seen[-1]
    Step(objective, Exchange())(dataset.batch(rows))
    later = np.triu(np.ones((8, 8), dtype=bool), 1)
    np.testing.assert_allclose(seen[0].detach().numpy()[later], expected[later], atol=1e-6)
    assert encoder.asv_encoder.stack.training  # the nucleotide loss keeps its dropout


def test_calibration_makes_the_mean_prediction_the_mean_distance(dataset, encoder):
    z = sample_embeddings(encoder, dataset, np.arange(24))
    for mean in (0.2, 0.63, 0.9):
        encoder.unifrac_encoder.calibrate(z, mean)
        found = predicted_distances(encoder, z)[np.triu_indices(24, 1)]
        assert found.mean() == pytest.approx(mean, abs=1e-4)
    fixed = CommunityEncoder(EncoderShape(32, 2, 1, distance_scale=10.0)).unifrac_encoder
    fixed.calibrate(z, 0.5)
    assert fixed.log_scale.exp().item() == pytest.approx(10.0)


def rows_of_bases(count=400, length=100, seed=0):
    generator = np.random.default_rng(seed)
    bases = generator.choice(list("ACGT"), (count, length))
    return tokenize(["".join(row) for row in bases], 150)[0]


@pytest.mark.parametrize("probability", [0.15, 0.4])
@pytest.mark.parametrize("strategy", ["random", "span"])
def test_masks_cover_the_asked_share_and_never_start(strategy, probability):
    tokens = rows_of_bases()
    torch.manual_seed(0)
    masked, positions = mask_tokens(tokens, probability, strategy)
    hit = masked.values == MASK
    assert torch.equal(hit.nonzero()[:, 0], positions)
    assert torch.equal(masked.values[~hit], tokens.values[~hit])
    assert (tokens.values[hit] != START).all()
    starts = tokens.offsets[:-1].long()
    assert (masked.values[starts] == START).all()
    share = hit.sum().item() / (len(tokens.values) - len(tokens))
    assert share == pytest.approx(probability, abs=0.01 if strategy == "random" else 0.02)


def test_spans_are_runs_of_3_to_5_within_their_row():
    tokens = rows_of_bases(length=60)
    torch.manual_seed(1)
    masked, _ = mask_tokens(tokens, 0.02, "span")  # so few that runs seldom touch
    inner = [
        found.end() - found.start()
        for row in range(len(masked))
        for found in re.finditer("x+", "".join(".x"[one == MASK] for one in masked[row].tolist()))
        if found.start() > 1 and found.end() < 61  # neither cut by START nor by the row's end
    ]
    counts = np.bincount(inner)
    assert counts[:3].sum() == 0
    assert counts[3:6].sum() > 0.95 * counts.sum() > 50
    assert counts[3:6].min() > 0.2 * counts.sum()
    # A run that went on from the row before would cover a row's first position as often as others.
    covered = span_hits(tokens, 0.4).float()
    begins = covered[tokens.offsets[:-1].long()].mean().item()
    assert begins == pytest.approx(1 - 0.6**0.25, abs=0.06)
    assert covered.mean().item() == pytest.approx(0.4, abs=0.03)


def test_masks_differ_between_draws_and_repeat_with_the_seed():
    tokens = rows_of_bases(20)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(mask_tokens(tokens, 0.15, "span")[1].tolist())
    assert draws[0] == draws[1] != draws[2]


def test_nucleotide_loss_is_the_cross_entropy_at_masked_positions_of_a_quarter(dataset, encoder):
    encoder.eval()
    tokens = dataset.batch(np.arange(24)).tokens
    torch.manual_seed(5)
    copied = masked_copies(tokens, PenaltyOptions())
    terms = masked_nucleotide_terms(encoder, copied, len(copied.positions))
    torch.manual_seed(5)
    chosen = torch.randperm(len(tokens))[: round(0.25 * len(tokens))].sort().values
    rows = [tokens[int(row)] for row in chosen]
    copies = Ragged.from_list(rows)
    masked, positions = mask_tokens(copies, 0.15, "random")
    hidden = encoder.asv_encoder(masked).values[positions]
    logits = encoder.asv_encoder.nucleotide_head(hidden).detach().double().numpy()
    true = copies.values[positions].numpy()
    shifted = logits - logits.max(1, keepdims=True)
    log_probability = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    expected = -log_probability[np.arange(len(true)), true].mean()
    assert terms["nucleotide_loss"].item() == pytest.approx(expected, rel=1e-5)
    found = (logits.argmax(1) == true).mean()
    assert terms["nucleotide_accuracy"].item() == pytest.approx(found, abs=1e-6)


def test_count_divergence_is_kl_in_nats_whatever_the_depth():
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 5.0])
    counts = torch.tensor([10.0, 30.0, 60.0, 1.0, 3.0])
    slots = Ragged(torch.zeros(5, dtype=torch.int64), torch.tensor([0, 3, 5], dtype=torch.int32), 3)
    expected = 0.0
    for part in (slice(0, 3), slice(3, 5)):
        true = (counts[part] / counts[part].sum()).double().numpy()
        model = torch.softmax(logits[part].double(), 0).numpy()
        expected += (true * np.log(true / model)).sum() / 2
    found = count_divergence(logits, counts, slots).mean()
    assert found.item() == pytest.approx(expected, rel=1e-5)
    deeper = count_divergence(logits, counts * 1000, slots).mean()
    assert deeper.item() == pytest.approx(expected, rel=1e-5)
    perfect = count_divergence(counts.log() + 7, counts, slots)
    assert perfect.tolist() == pytest.approx([0, 0], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mse", (0.25 + 4.0 + 0.0) / 3),
        ("mae", (0.5 + 2.0 + 0.0) / 3),
        ("smooth-l1", (0.125 + 1.5 + 0.0) / 3),
        ("quantile", (0.8 * 0.5 + 0.2 * 2.0 + 0.0) / 3),
        ("asymmetric", (0.8 * 0.25 + 0.2 * 4.0 + 0.0) / 3),
    ],
)
def test_regression_losses(name, expected):
    options = TargetOptions(metadata_column="age", target_loss=name, quantile=0.8)
    predicted, true = torch.tensor([[1.0], [3.0], [2.0]]), torch.tensor([1.5, 1.0, 2.0])
    loss = TargetLoss(options, None, False)(predicted, true)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_class_weights_weigh_the_cross_entropy():
    options = TargetOptions(metadata_column="sex")
    logits, true = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.0]]), torch.tensor([0, 1, 1])
    weights = torch.tensor([0.5, 2.0])
    parts = -torch.log_softmax(logits, 1)[torch.arange(3), true] * weights[true]
    expected = parts.sum() / weights[true].sum()
    assert TargetLoss(options, weights, True)(logits, true).item() == pytest.approx(
        expected.item(), rel=1e-6
    )


def frozen_objective(encoder, dataset):
    torch.manual_seed(1)
    predictor = Predictor(encoder, PredictorShape())
    loss = TargetLoss(TargetOptions(metadata_column="age"), None, False)
    encoder.requires_grad_(False)
    vectors = encode_asvs(encoder, dataset, np.arange(len(dataset.sequences)))
    return FinetuneObjective(predictor, FinetunePenaltyOptions(), loss, frozen_asvs=vectors)


def test_a_frozen_base_gives_the_forward_of_the_unfrozen_one(dataset, encoder):
    objective = frozen_objective(encoder, dataset)
    batch = dataset.batch(np.arange(6))
    part = SamplePart(batch.slots, batch.counts, 0, slice(0, 6), None)
    frozen = objective.train().encode(objective.frozen_asvs[batch.asv_ids], part)
    assert not frozen.samples.values.requires_grad
    thawed = FinetuneObjective(
        objective.predictor, FinetunePenaltyOptions(), objective.target_loss
    ).eval()
    expected = thawed.encode(thawed.encode_asvs(batch.tokens, 0), part)
    torch.testing.assert_close(frozen.samples.values, expected.samples.values, rtol=0, atol=1e-6)


def test_a_frozen_base_does_not_move(dataset, encoder):
    from aam.training.schedule import make_optimizer

    objective = frozen_objective(encoder, dataset).train()
    before = copy.deepcopy(encoder.state_dict())
    head = objective.predictor.head.weight.clone()
    optimizer = make_optimizer(objective, 0.1, 0.1)
    for _ in range(2):
        Step(objective, Exchange())(dataset.batch(np.arange(6)))
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert not torch.equal(head, objective.predictor.head.weight)
    assert not encoder.training and objective.predictor.stack.training
