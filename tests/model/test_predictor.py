"""The predictor: what must not change a prediction, and what each of its parts computes."""

import dataclasses

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import nn

from aam.data.dataset import SampleDataset
from aam.data.table import FeatureTable, read_table
from aam.model import AsvEncoder, EncoderShape, Predictor
from aam.model.fusion import AddFusion, CategoricalEmbedding, ConcatFusion
from aam.model.heads import HEADS
from aam.model.predictor import PredictorShape, SampleEncoder, category_codes
from aam_kernels import Ragged

SHAPE = EncoderShape(embedding_dim=32, wide_dim=32, num_heads=2, num_layers=1)


@pytest.fixture(scope="module")
def table(community) -> FeatureTable:
    return read_table(community.table)


def make(**own) -> Predictor:
    torch.manual_seed(0)
    model = Predictor(AsvEncoder(SHAPE), PredictorShape(**own)).eval()
    nn.init.normal_(model.encoder.gate)
    return model


@torch.no_grad()
def outputs(model, table, rows, **options) -> torch.Tensor:
    batch = SampleDataset(table, **options).batch(rows)
    vectors = model.encoder(batch.tokens).vectors
    return model(model.sample_encoder(vectors, batch.slots, batch.counts))


def permuted(table, generator) -> FeatureTable:
    order = generator.permutation(len(table.feature_ids))
    counts = scipy.sparse.csr_array(table.counts[:, order])
    counts.sort_indices()
    ids = tuple(table.feature_ids[one] for one in order)
    return dataclasses.replace(table, feature_ids=ids, counts=counts)


@pytest.mark.parametrize("sampling", ["abundance", "first"])
def test_the_order_of_the_tables_rows_changes_nothing(table, sampling):
    model, rows = make(outputs=2, count_embedding="film"), list(range(8))
    shuffled = permuted(table, np.random.default_rng(1))
    found = outputs(model, shuffled, rows, asv_sampling=sampling)
    torch.testing.assert_close(found, outputs(model, table, rows), rtol=0, atol=1e-5)


def test_a_sample_does_not_depend_on_its_batch(table):
    model = make(outputs=2, count_embedding="film")
    together = outputs(model, table, list(range(12)))
    alone = torch.cat([outputs(model, table, [row]) for row in range(12)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    apart = outputs(model, table, list(range(12)), share_asvs=False)
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-5)


def test_counts_matter_only_where_they_are_embedded(table):
    other = dataclasses.replace(table, counts=table.counts * 7)
    for kind in ("none", "add", "concat", "film"):
        model = make(count_embedding=kind)
        same = torch.equal(outputs(model, table, [0, 1]), outputs(model, other, [0, 1]))
        assert same == (kind == "none")


@pytest.mark.parametrize("kind", ["none", "add", "concat", "film"])
def test_vectors_are_standardised_and_counts_join_by_their_formulas(kind):
    torch.manual_seed(0)
    encoder = SampleEncoder(SHAPE, kind, {})
    vectors, times = torch.randn(6, 32) * 5 + 3, torch.tensor([1.0, 2.0, 0.0, 4.0, 1.0, 2.0])
    encoder.standardise_by(vectors, times)
    slots = Ragged(torch.tensor([0, 1, 1, 3, 3, 3, 3, 4, 5, 5]), torch.tensor([0, 4, 10]).int(), 6)
    counts = torch.arange(10.0) ** 2 + 1
    seen = []
    encoder.stack.forward = lambda x, _row: seen.append(x.values) or x
    encoder(vectors, slots, counts)
    x = (vectors - encoder.mean) / encoder.spread
    x = x[slots.values]
    assert x.mean(0).abs().max() < 1e-5
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(32))
    if kind == "none":
        torch.testing.assert_close(seen[0], x)
        return
    c = encoder.count_projection(torch.log(counts + 1)[:, None])
    expected = {
        "add": lambda: x + c,
        "concat": lambda: encoder.count_merge(torch.cat([x, c], -1)),
        "film": lambda: x * (1 + c[:, :32]) + c[:, 32:],
    }[kind]()
    torch.testing.assert_close(seen[0], expected)


def test_features_that_are_constant_or_one_asv_divide_by_no_zero():
    encoder = SampleEncoder(SHAPE, "none", {})
    vectors = torch.randn(4, 32)
    vectors[:, 3] = 0.7
    slots = Ragged(torch.tensor([0, 1, 2]), torch.tensor([0, 3]).int(), 3)
    for some in (vectors, vectors[:1].expand(4, 32)):
        encoder.standardise_by(some, torch.ones(4))
        found = encoder(some, slots, torch.ones(3)).values
        assert torch.isfinite(found).all()
        assert ((some - encoder.mean) / encoder.spread).abs().max() < 3


def test_fusions_compute_their_formulas():
    samples = Ragged(torch.randn(5, 8), torch.tensor([0, 2, 5], dtype=torch.int32), 3)
    covariates = torch.randn(2, 3)
    spread = covariates[[0, 0, 1, 1, 1]]
    concat, add = ConcatFusion(8, 3), AddFusion(8, 3)
    torch.testing.assert_close(
        concat(samples, covariates).values, concat.merge(torch.cat([samples.values, spread], -1))
    )
    torch.testing.assert_close(
        add(samples, covariates).values, samples.values + add.project(spread)
    )


def test_category_embedding_has_a_row_for_the_unknown():
    embedding = CategoricalEmbedding([3, 2], 4).eval()
    found = embedding(torch.tensor([[0, 2], [3, 0]]))
    first, second = (column.weight for column in embedding.columns)
    assert torch.equal(found[0], torch.cat([first[0], second[2]]))
    assert torch.equal(found[1], torch.cat([first[3], second[0]]))
    assert category_codes(["b", None, "new", "a"], ["a", "b"]) == [2, 0, 0, 1]


@pytest.mark.parametrize("name", HEADS)
def test_heads(name):
    head = HEADS[name](8, 3)
    x = torch.randn(4, 8)
    found = head(x)
    assert found.shape == (4, 3)
    if name == "linear+mlp":
        torch.testing.assert_close(found, head.linear(x) + head.mlp(x))
    if name == "mlp":
        torch.testing.assert_close(found, head[2](nn.functional.gelu(head[0](x))))


def test_the_target_norm_is_optional():
    assert isinstance(make().norm, nn.LayerNorm)
    assert isinstance(make(target_norm=False).norm, nn.Identity)
