"""A step cut into pieces, and over processes, is the step in one piece on one device."""

import numpy as np
import pytest
import torch

from aam.config import FinetunePenaltyOptions, PenaltyOptions, TargetOptions
from aam.data.clades import Clades
from aam.data.dataset import AsvDataset, SampleDataset
from aam.data.table import read_table
from aam.data.table_distances import PrecomputedDistances
from aam.data.tree import read_tree
from aam.data.unifrac import UniFrac
from aam.evaluation.outputs import encode_asvs
from aam.learning import losses
from aam.learning.distributed import RankGroup, cut
from aam.learning.losses import CladeLoss, DistanceLoss, TargetLoss
from aam.learning.objective import CladeObjective, FinetuneObjective, PairObjective
from aam.learning.step import Step, StepTooLarge, is_out_of_memory
from aam.model import AsvEncoder, CladeHead, EncoderShape, FreeClades, Predictor
from aam.model.predictor import PredictorShape
from tests.processes import fork_ranks

SHAPE = EncoderShape(embedding_dim=32, wide_dim=24, num_heads=2, num_layers=2, dropout=0.3)
FINETUNE = FinetunePenaltyOptions(nucleotide_penalty=0.5, count_penalty=2.0, mask_strategy="span")
CLADES = ("clades", "sampled", "wide", "before")
KINDS = (*CLADES, "pairs", "nucleotides", "finetune", "classes", "frozen")
RANKED = {2: KINDS, 3: ("sampled",)}


def make_step(kind, table, tree):
    """A step of a fresh objective with every loss that its kind has, and its dataset."""
    torch.manual_seed(0)
    encoder = AsvEncoder(EncoderShape("wide", 32, 24, 2, 1) if kind == "wide" else SHAPE)
    with torch.no_grad():
        encoder.site_head.normal_()
        if encoder.has_stack:
            encoder.gate.normal_()
    make = clade_objective if kind in CLADES else sample_objective
    objective, dataset = make(kind, encoder, table, tree)
    return Step(objective.train(), RankGroup()), dataset


def clade_objective(kind, encoder, table, tree):
    clades = Clades(read_tree(tree))
    loss = CladeLoss(clades)
    if kind == "sampled":
        loss.samples, loss.SAMPLED = True, 5
    head = CladeHead(32, len(clades))
    objective = CladeObjective(encoder, head, PenaltyOptions(nucleotide_penalty=0.7), loss,
                               stack_joins=0.5)  # fmt: skip
    objective.progress = 0.2 if kind == "before" else 0.8
    return objective, AsvDataset(clades.sequences, 150)


def sample_objective(kind, encoder, table, tree):
    unifrac = UniFrac(read_table(table), read_tree(tree))
    count = len(unifrac.sample_ids)
    targets = np.arange(count) % 3 if kind == "classes" else np.linspace(-1, 1, count)
    dataset = SampleDataset(
        read_table(table),
        targets=targets.astype(np.int64 if kind == "classes" else np.float32),
        categories=np.stack([np.arange(count) % 4, np.arange(count) % 2], 1),
        token_limit=8,
        asv_sampling="random",
    )
    if kind in ("pairs", "nucleotides"):
        pairs = FreeClades(32, 20, abundance=True)
        torch.nn.init.constant_(pairs.exponent, 0.3)
        penalties = PenaltyOptions(unifrac_penalty=1.0 if kind == "pairs" else 0.0)
        true = PrecomputedDistances(unifrac.sample_ids, unifrac.pairwise(), [])
        return PairObjective(encoder, pairs, penalties, DistanceLoss(true)), dataset
    own = PredictorShape(
        outputs=3 if kind == "classes" else 1,
        count_embedding="add",
        category_sizes=(3, 1),
        target_head="linear+mlp",
        predict_counts=kind == "finetune",
    )
    weights = torch.tensor([0.2, 1.0, 3.0]) if kind == "classes" else None
    predictor = Predictor(encoder, own)
    vectors = encode_asvs(encoder, dataset, np.arange(len(dataset.sequences)))
    predictor.sample_encoder.standardise_by(vectors, torch.ones(len(vectors)))
    objective = FinetuneObjective(
        predictor,
        FINETUNE if kind == "finetune" else FinetunePenaltyOptions(),
        TargetLoss(TargetOptions(metadata_column="x"), weights, kind == "classes"),
    )
    if kind == "frozen":
        encoder.requires_grad_(False)
        objective.frozen_asvs = vectors
    return objective, dataset


def terms_and_gradients(step, dataset, pieces, rows=range(11)):
    for parameter in step.parameters:
        parameter.grad = None
    torch.manual_seed(7)
    terms = step(dataset.batch(list(rows)), pieces)
    gradients = {
        name: one.grad.clone()
        for name, one in step.objective.named_parameters()
        if one.grad is not None
    }
    return terms, gradients


def assert_same(found, expected):
    (terms, gradients), (whole_terms, whole) = found, expected
    assert terms.keys() == whole_terms.keys()
    for name, value in whole_terms.items():
        assert terms[name] == pytest.approx(value, rel=2e-6, abs=1e-7), name
    assert gradients.keys() == whole.keys()
    largest = max(float(one.norm()) for one in whole.values())
    for name, value in whole.items():
        error = float((gradients[name] - value).norm())
        assert error <= 2e-5 * float(value.norm()) + 1e-7 * largest, name


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_give_the_loss_and_gradients_of_the_whole(kind, community):
    step, dataset = make_step(kind, community.table, community.tree)
    whole = terms_and_gradients(step, dataset, 1)
    assert all(np.isfinite(list(whole[0].values())))
    for pieces in (2, 4, 7, 1000):
        assert_same(terms_and_gradients(step, dataset, pieces), whole)
    step.equal_calls = True  # some pieces hold nothing
    assert_same(terms_and_gradients(step, dataset, 13), whole)


def test_the_loss_is_the_same_in_blocks_of_any_size(community, monkeypatch):
    step, dataset = make_step("pairs", community.table, community.tree)
    whole = terms_and_gradients(step, dataset, 1)
    for numbers in (1, 20_000):
        monkeypatch.setattr(losses, "BLOCK_NUMBERS", numbers)
        assert_same(terms_and_gradients(step, dataset, 1), whole)


def test_dropout_and_masks_are_drawn_anew_with_another_seed(community):
    step, dataset = make_step("finetune", community.table, community.tree)
    first, _ = terms_and_gradients(step, dataset, 3)
    torch.manual_seed(8)
    second = step(dataset.batch(list(range(11))), 3)
    assert all(first[name] != second[name] for name in first)


def test_every_distinct_asv_is_encoded_once_a_step(community):
    step, dataset = make_step("pairs", community.table, community.tree)
    seen = []
    encode = step.objective.encode_asvs
    step.objective.encode_asvs = lambda tokens, row: seen.append(len(tokens)) or encode(tokens, row)
    terms_and_gradients(step, dataset, 1)
    torch.manual_seed(7)  # draws the ASVs of the samples
    batch = dataset.batch(list(range(11)))
    assert seen == [len(batch.tokens)]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate"
                     " memory: you tried to allocate 4 bytes"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stage", ["asv_losses", "encode_asvs", "encode_samples", "losses"])
def test_a_step_that_ran_out_of_memory_leaves_nothing_and_repeats_exactly(stage, error, community):
    step, dataset = make_step("pairs", community.table, community.tree)
    whole = terms_and_gradients(step, dataset, 1)
    compute, calls = getattr(step.objective, stage), []

    def fail_late(*arguments):
        calls.append(stage)
        if len(calls) == 2:
            raise error
        return compute(*arguments)

    setattr(step.objective, stage, fail_late)
    for parameter in step.parameters:
        parameter.grad = None
    torch.manual_seed(7)
    if stage == "losses":
        calls.append(stage)
    with pytest.raises(StepTooLarge):
        step(dataset.batch(list(range(11))), 2)
    assert all(one.grad is None for one in step.parameters)
    assert_same(terms_and_gradients(step, dataset, 4), whole)


def test_other_errors_are_not_taken_for_a_lack_of_memory(community):
    step, dataset = make_step("pairs", community.table, community.tree)
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))

    def fail(*_):
        raise RuntimeError("shapes do not fit")

    step.objective.encode_asvs = fail
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        step(dataset.batch([0, 1, 2]))


def test_cuts_balance_lengths_and_lose_nothing():
    generator = np.random.default_rng(0)
    for rows in (1, 2, 7, 100):
        for lengths in (np.ones(rows), generator.integers(1, 1000, rows), np.eye(1, rows)[0] * 9):
            bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
            for parts in (1, 2, 3, 8, 300):
                cuts = cut(bounds, parts)
                assert len(cuts) == parts + 1 and cuts[0] == 0 and cuts[-1] == rows
                assert (np.diff(cuts) >= 0).all()
                sizes = np.diff(bounds[cuts])
                assert sizes.max() <= bounds[-1] / parts + lengths.max()


@pytest.mark.parametrize("size", RANKED)
def test_ranks_give_the_loss_and_gradients_of_one_process(size, community, tmp_path):
    files = community.table, community.tree

    def compute():
        torch.distributed.init_process_group("gloo")
        found = {}
        for kind in RANKED[size]:
            step, dataset = make_step(kind, *files)
            for rows in (11, 3):  # 3 samples: a rank of four has none
                for pieces in (1, 3):
                    result = terms_and_gradients(step, dataset, pieces, range(rows))
                    found[kind, rows, pieces] = result
        torch.save(found, tmp_path / f"{size}-{torch.distributed.get_rank()}.pt")
        torch.distributed.destroy_process_group()

    assert [one.end(120) for one in fork_ranks(size, compute)] == [(0, "")] * size
    found = [torch.load(tmp_path / f"{size}-{rank}.pt") for rank in range(size)]
    for kind in RANKED[size]:
        step, dataset = make_step(kind, *files)
        for rows in (11, 3):
            whole = terms_and_gradients(step, dataset, 1, range(rows))
            for pieces in (1, 3):
                for one in found:
                    assert_same(one[kind, rows, pieces], whole)
