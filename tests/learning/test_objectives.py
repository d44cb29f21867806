"""The losses against numbers worked out by hand, sampled clades, frozen bases."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch

from aam.config import FinetunePenaltyOptions, PenaltyOptions, TargetOptions
from aam.data.clades import Clades
from aam.data.dataset import AsvDataset, SampleDataset
from aam.data.table import read_table
from aam.data.tree import read_tree
from aam.evaluation.outputs import encode_asvs, predicted_distances
from aam.learning import losses
from aam.learning.distributed import RankGroup
from aam.learning.losses import CladeLoss, DistanceLoss, TargetLoss, count_divergence
from aam.learning.masking import mask_tokens, masked_copies, nucleotide_terms
from aam.learning.objective import CladeObjective, FinetuneObjective, PairObjective, SamplePart
from aam.learning.step import Step
from aam.model import AsvEncoder, CladeHead, EncoderShape, FreeClades, Predictor
from aam.model.predictor import PredictorShape
from aam_kernels import Ragged
from tests.data.trees import parse, random_newick, tips_below

SHAPE = EncoderShape(embedding_dim=32, wide_dim=24, num_heads=2, num_layers=1, dropout=0.3)


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
    encoder = AsvEncoder(SHAPE)
    with torch.no_grad():
        for one in (encoder.gate, encoder.site_head):
            one.normal_()
    return encoder


@pytest.fixture(scope="module")
def clades():
    """Of a random tree of 40 tips."""
    return Clades(parse(random_newick(np.random.default_rng(3), 40)))


def clade_head(clades, dim=8):
    torch.manual_seed(1)
    head = CladeHead(dim, len(clades)).double()
    torch.nn.init.normal_(head.bias)
    return head, torch.randn(len(clades.sequences), dim, dtype=torch.float64)


def test_clade_loss_is_the_weighted_cross_entropy_worked_out_by_hand(clades):
    below = tips_below(clades.tree)
    head, vectors = clade_head(clades)
    rows = torch.tensor([7, 0, 39, 12, 12])
    x = (vectors[rows] @ head.weight.T + head.bias).detach().numpy()
    lengths = clades.tree.length[clades.nodes]
    weights = np.minimum(lengths / lengths.mean(), 5.0)
    expected = 0.0
    for asv, row in enumerate(rows.tolist()):
        for clade, node in enumerate(clades.nodes):
            sign = -1 if row in below[node] else 1
            expected += weights[clade] * np.log1p(np.exp(sign * x[asv, clade]))
    expected *= 0.1 / len(rows)
    loss = CladeLoss(clades)
    assert loss.draw(rows) is None
    shares = [
        loss.share(head, vectors[rows[part]], rows[part], 5, None)["clade_loss"].item()
        for part in (slice(0, 5), slice(0, 2), slice(2, 5), slice(5, 5))
    ]
    assert shares[0] == pytest.approx(expected, rel=1e-6)
    assert shares[1] + shares[2] == pytest.approx(expected, rel=1e-6) and shares[3] == 0
    members = loss.members(torch.arange(40), None).numpy()
    assert members.T.tolist() == [[t in below[node] for t in range(40)] for node in clades.nodes]
    some = torch.tensor([5, 2, 2])
    assert np.array_equal(loss.members(torch.arange(40), some).numpy(), members[:, some])


def test_long_branches_count_no_more_than_five_mean_ones():
    lengths = "".join(f",(a{k}:1,b{k}:1):{1.0 if k else 100.0}" for k in range(20))
    clades = Clades(parse(f"({lengths[1:]});"))
    weights = CladeLoss(clades).weight
    assert weights.max() == 5 and sorted(weights.tolist())[0] == pytest.approx(20 / 119)


@pytest.mark.parametrize("sampled", [3, 200])
def test_sampled_clades_have_the_loss_and_gradient_of_all_in_expectation(
    clades, sampled, monkeypatch
):
    head, vectors = clade_head(clades)
    rows = torch.tensor([7, 8, 30])

    def of(loss):
        head.zero_grad()
        own = vectors[rows].clone().requires_grad_()
        value = loss.share(head, own, rows, 3, loss.draw(rows))["clade_loss"]
        value.backward()
        return torch.cat([value.detach()[None], head.weight.grad.flatten(), head.bias.grad,
                          own.grad.flatten()])  # fmt: skip

    whole = of(CladeLoss(clades))
    monkeypatch.setattr(CladeLoss, "SAMPLED_ABOVE", 0)
    monkeypatch.setattr(CladeLoss, "SAMPLED", sampled)
    loss = CladeLoss(clades)
    torch.manual_seed(0)
    draws = torch.stack([of(loss) for _ in range(2000)])
    error = draws.std(0) / len(draws) ** 0.5
    off = (draws.mean(0) - whole).abs() / (error + 1e-12)
    exact = draws.std(0) < 1e-12
    assert off[0] < 4 and off[~exact].max() < 5 and off[~exact].square().mean() < 1.5
    torch.testing.assert_close(draws.mean(0)[exact], whole[exact])
    assert exact.any() and not exact[0]


def test_sampled_clades_hold_the_paths_and_their_sisters_and_no_more_than_asked(
    clades, monkeypatch
):
    monkeypatch.setattr(CladeLoss, "SAMPLED_ABOVE", 0)
    monkeypatch.setattr(CladeLoss, "SAMPLED", 6)
    loss, below = CladeLoss(clades), tips_below(clades.tree)
    held = [below[node] for node in clades.nodes]
    weight = clades.weight
    for rows in ([7], [0, 21, 39]):
        chosen, weights = loss.draw(torch.tensor(rows))
        on_path = {k for k, tips in enumerate(held) if tips & set(rows)}
        sisters = {k for k in range(len(held)) if clades.parent[k] in on_path | {-1}}
        near = sorted(on_path | sisters)
        assert chosen[: len(near)].tolist() == near
        torch.testing.assert_close(weights[: len(near)], torch.from_numpy(weight[near]).float())
        rest = chosen[len(near) :].tolist()
        assert len(rest) <= 6 and not set(rest) & set(near)
        assert weights[len(near) :].tolist() == pytest.approx([weight.sum() / 6] * len(rest))


def test_the_cost_of_a_step_does_not_grow_with_the_tree(monkeypatch):
    monkeypatch.setattr(CladeLoss, "SAMPLED_ABOVE", 50)
    monkeypatch.setattr(CladeLoss, "SAMPLED", 64)
    most = []
    for tips in (200, 1600):
        tree = parse(random_newick(np.random.default_rng(0), tips, plain=True))
        loss = CladeLoss(Clades(tree))
        most.append(len(loss.draw(torch.arange(0, tips, tips // 4))[0]))
    assert most[1] < most[0] + 100, "the paths grow with the depth, not with the clades"


def clade_objective(community, penalties=None, *, shape=SHAPE, stack_joins=0.0):
    clades = Clades(read_tree(community.tree))
    torch.manual_seed(0)
    encoder = AsvEncoder(shape)
    objective = CladeObjective(
        encoder, CladeHead(shape.embedding_dim, len(clades)), penalties or PenaltyOptions(),
        CladeLoss(clades), stack_joins=stack_joins,
    )  # fmt: skip
    return objective.train(), AsvDataset(clades.sequences, 150)


@pytest.mark.parametrize("clade, nucleotide", [(1.0, 0.5), (2.0, 0.0), (0.0, 3.0)])
def test_penalties_weigh_the_losses_of_clades_and_nucleotides(community, clade, nucleotide):
    penalties = PenaltyOptions(unifrac_penalty=clade, nucleotide_penalty=nucleotide)
    objective, asvs = clade_objective(community, penalties)
    terms = Step(objective, RankGroup())(asvs.batch(range(20)))
    names = {"clade_loss": clade, "nucleotide_loss": nucleotide}
    assert terms.keys() & names.keys() == {name for name, weight in names.items() if weight}
    expected = sum(weight * terms[name] for name, weight in names.items() if weight)
    assert terms["loss"] == pytest.approx(expected, rel=1e-6)


def test_the_stack_has_no_gradients_before_it_joins(community):
    objective, asvs = clade_objective(community, stack_joins=0.5)
    step = Step(objective, RankGroup())
    late = ("token_", "position_", "site_embedding", "stack", "pool", "gate", "nucleotide_head")
    for progress, joined in ((0.49, False), (0.5, True)):
        objective.progress = progress
        objective.zero_grad(set_to_none=True)
        step(asvs.batch(range(10)))
        for name, one in objective.named_parameters():
            is_late = name.removeprefix("encoder.").startswith(late)
            assert (one.grad is not None) == (joined or not is_late), name


@pytest.mark.parametrize("kind", ["transformer", "wide"])
def test_one_asv_and_no_masked_nucleotide_make_a_step(community, kind):
    shape = EncoderShape(kind, 32, 24, 2, 1)
    penalties = PenaltyOptions(mask_probability=1e-9, masked_share=1e-9)
    objective, asvs = clade_objective(community, penalties, shape=shape)
    terms = Step(objective, RankGroup())(asvs.batch([3]))
    assert terms["nucleotide_loss"] == terms["nucleotide_accuracy"] == 0
    assert np.isfinite(terms["loss"]) and terms["loss"] > 0
    grads = [one.grad for one in objective.parameters() if one.grad is not None]
    assert all(torch.isfinite(one).all() for one in grads)


def pair_objective(encoder, **penalties):
    torch.manual_seed(0)
    pairs = FreeClades(32, 16, abundance=True)
    pairs.unit.fill_(2.5)
    source = Matrix(24)
    return PairObjective(encoder, pairs, PenaltyOptions(**penalties), DistanceLoss(source)).train()


def test_distance_loss_is_the_mean_over_all_pairs_of_the_distances_of_evaluation(dataset, encoder):
    """Clean tokens, no dropout: nothing random that differs between samples can be learned."""
    rows = [3, 1, 7, 20, 5]
    objective = pair_objective(encoder, nucleotide_penalty=0.0, unifrac_penalty=3.0)
    terms = Step(objective, RankGroup())(dataset.batch(rows))
    assert encoder.stack.training, "the nucleotide loss keeps its dropout"
    predicted = predicted_distances(objective_model(objective), dataset, np.array(rows))
    assert np.array_equal(predicted, predicted.T) and (predicted.diagonal() == 0).all()
    true = objective.loss.source.pairwise(rows)
    errors = (predicted - true)[np.triu_indices(5, 1)]
    assert terms["unifrac_loss"] == pytest.approx(10 * np.mean((errors / 2.5) ** 2), rel=1e-4)
    assert terms["distance_mae"] == pytest.approx(np.mean(np.abs(errors)), rel=1e-4)
    assert terms["loss"] == pytest.approx(3 * terms["unifrac_loss"], rel=1e-6)


def objective_model(objective):
    """What `predicted_distances` wants of a pretrained model."""
    return type("Model", (), {"encoder": objective.encoder, "pairs": objective.pairs})()


def test_distance_loss_is_that_of_its_blocks(dataset, encoder):
    objective = pair_objective(encoder, nucleotide_penalty=0.0)
    profiles, rows = torch.rand(5, 32), torch.tensor([3, 1, 7, 20, 5])
    share = objective.loss.share
    whole = share(objective.pairs, profiles, rows, 0, 5)
    for bounds in ([0, 2, 5], [0, 1, 2, 3, 4, 5], [0, 0, 5]):
        parts = [share(objective.pairs, profiles, rows, *own) for own in pairwise(bounds)]
        for name, value in whole.items():
            torch.testing.assert_close(sum(one[name] for one in parts), value)
    assert losses.blocks(5, 16, 2) == [(0, 3), (3, 5)]


def test_nucleotide_loss_is_the_cross_entropy_at_masked_positions_of_a_quarter(dataset, encoder):
    encoder.eval()
    tokens = dataset.batch(np.arange(24)).tokens
    torch.manual_seed(5)
    copied = masked_copies(tokens, PenaltyOptions())
    terms = nucleotide_terms(encoder, encoder(copied.tokens), copied, len(copied.masked))
    torch.manual_seed(5)
    chosen = torch.randperm(len(tokens))[: round(0.25 * len(tokens))].sort().values
    copies = Ragged.from_list([tokens[int(row)] for row in chosen])
    masked, places = mask_tokens(copies, 0.15, "random")
    assert torch.equal(masked.values, copied.tokens.values) and torch.equal(places, copied.masked)
    encoded = encoder(masked)
    logits = encoder.nucleotide_logits(encoded, masked, places).detach().double().numpy()
    true = copies.values[places].numpy() - 1
    log_probability = logits - np.log(np.exp(logits).sum(1, keepdims=True))
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


def test_a_frozen_base_gives_the_forward_of_the_unfrozen_one_and_does_not_move(dataset, encoder):
    from aam.learning.optimizer import make_optimizer

    objective = frozen_objective(encoder, dataset)
    batch = dataset.batch(np.arange(6))
    part = SamplePart(batch.slots, batch.counts, 0, slice(0, 6), None)
    own = objective.eval().encode_samples(objective.frozen_asvs[batch.asv_ids], part)
    expected = objective.encode_samples(objective.encode_asvs(batch.tokens, 0), part)
    torch.testing.assert_close(own["prediction"], expected["prediction"], rtol=0, atol=1e-5)
    objective.train()
    before = copy.deepcopy(encoder.state_dict())
    head = objective.predictor.head.weight.clone()
    optimizer = make_optimizer(objective, 0.1, 0.1)
    for _ in range(2):
        Step(objective, RankGroup())(dataset.batch(np.arange(6)))
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert not torch.equal(head, objective.predictor.head.weight)
    assert not encoder.training and objective.predictor.stack.training
