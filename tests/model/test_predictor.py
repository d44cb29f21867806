"""The predictor: what must not change a prediction, and what each of its parts computes."""

import dataclasses

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import nn

from aam.data.dataset import SampleDataset
from aam.data.table import FeatureTable, read_table
from aam.model import AsvEncoder, EncoderShape, Predictor, PredictorShape
from aam.model.predictor import HEADS, CategoricalEmbedding, Fusion, SampleEncoder
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


@pytest.mark.parametrize("sampling", ["abundance", "first"])
def test_neither_the_tables_order_nor_the_batch_change_a_prediction(table, sampling):
    model, rows = make(outputs=2, count_embedding="add"), list(range(12))
    order = np.random.default_rng(1).permutation(len(table.feature_ids))
    counts = scipy.sparse.csr_array(table.counts[:, order])
    counts.sort_indices()
    ids = tuple(table.feature_ids[one] for one in order)
    shuffled = dataclasses.replace(table, feature_ids=ids, counts=counts)
    expected = outputs(model, table, rows, asv_sampling=sampling)
    for found in (
        outputs(model, shuffled, rows, asv_sampling=sampling),
        torch.cat([outputs(model, table, [row], asv_sampling=sampling) for row in rows]),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["none", "add"])
def test_vectors_are_standardised_and_counts_join_where_they_are_embedded(kind):
    torch.manual_seed(0)
    encoder = SampleEncoder(SHAPE, kind)
    vectors, times = torch.randn(6, 32) * 5 + 3, torch.tensor([1.0, 2.0, 0.0, 4.0, 1.0, 2.0])
    encoder.standardise_by(vectors, times)
    slots = Ragged(torch.tensor([0, 1, 1, 3, 3, 3, 3, 4, 5, 5]), torch.tensor([0, 4, 10]).int(), 6)
    counts = torch.arange(10.0) ** 2 + 1
    seen = []
    encoder.stack.forward = lambda x, _row: seen.append(x.values) or x
    encoder(vectors, slots, counts)
    expected = ((vectors - encoder.mean) / encoder.spread)[slots.values]
    assert expected.mean(0).abs().max() < 1e-5
    torch.testing.assert_close(expected.std(0, correction=0), torch.ones(32))
    if kind == "add":
        expected = expected + encoder.count_projection(torch.log(counts + 1)[:, None])
    torch.testing.assert_close(seen[0], expected)


def test_features_that_are_constant_or_one_asv_divide_by_no_zero():
    encoder = SampleEncoder(SHAPE, "none")
    vectors = torch.randn(4, 32)
    vectors[:, 3] = 0.7
    slots = Ragged(torch.tensor([0, 1, 2]), torch.tensor([0, 3]).int(), 3)
    for some in (vectors, vectors[:1].expand(4, 32)):
        encoder.standardise_by(some, torch.ones(4))
        found = encoder(some, slots, torch.ones(3)).values
        assert torch.isfinite(found).all()
        assert ((some - encoder.mean) / encoder.spread).abs().max() < 3


def test_covariates_join_by_their_formulas_with_a_row_for_the_unknown():
    samples = Ragged(torch.randn(5, 8), torch.tensor([0, 2, 5], dtype=torch.int32), 3)
    embedding = CategoricalEmbedding([3, 2], 4).eval()
    covariates = embedding(torch.tensor([[0, 2], [3, 0]]))
    first, second = (column.weight for column in embedding.columns)
    expected = torch.stack([torch.cat([first[0], second[2]]), torch.cat([first[3], second[0]])])
    assert torch.equal(covariates, expected)
    spread = covariates[[0, 0, 1, 1, 1]]
    concat, add = Fusion("concat", 8, 8), Fusion("add", 8, 8)
    merged = concat.merge(torch.cat([samples.values, spread], -1))
    torch.testing.assert_close(concat(samples, covariates).values, merged)
    added = samples.values + add.project(spread)
    torch.testing.assert_close(add(samples, covariates).values, added)


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
