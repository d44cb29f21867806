"""The encoder and the predictor: what must not change a prediction, and what each part computes."""

import dataclasses

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import nn

from aam.data.dataset import SampleDataset
from aam.data.table import FeatureTable, read_table
from aam.model import CommunityEncoder, Encoded, Predictor
from aam.model.encoder import EncoderShape, euclidean, positions_in_rows
from aam.model.fusion import AddFusion, CategoricalEmbedding, ConcatFusion
from aam.model.heads import HEADS
from aam.model.predictor import PredictorShape, category_codes
from aam_kernels import Ragged

SHAPE = EncoderShape(32, 2, 1, count_embedding="film")


@pytest.fixture(scope="module")
def table(community) -> FeatureTable:
    return read_table(community.table)


@pytest.fixture(scope="module")
def model() -> Predictor:
    torch.manual_seed(0)
    return Predictor(CommunityEncoder(SHAPE), PredictorShape(outputs=2)).eval()


@torch.no_grad()
def outputs(model, table, rows, **options) -> tuple[torch.Tensor, torch.Tensor]:
    batch = SampleDataset(table, **options).batch(rows)
    encoder = model.encoder
    vectors = encoder.encode_asvs(batch.tokens)
    encoded = encoder.encode_samples(vectors, batch.slots, batch.counts)
    return model(encoded), encoder.unifrac_encoder(encoded, batch.slots)


def permuted(table, generator) -> FeatureTable:
    order = generator.permutation(len(table.feature_ids))
    counts = scipy.sparse.csr_array(table.counts[:, order])
    counts.sort_indices()
    ids = tuple(table.feature_ids[one] for one in order)
    return dataclasses.replace(table, feature_ids=ids, counts=counts)


@pytest.mark.parametrize("sampling", ["abundance", "first"])
def test_the_order_of_the_tables_rows_changes_nothing(model, table, sampling):
    rows = list(range(8))
    expected = outputs(model, table, rows)
    shuffled = permuted(table, np.random.default_rng(1))
    found = outputs(model, shuffled, rows, asv_sampling=sampling)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_a_sample_does_not_depend_on_its_batch(model, table):
    together = outputs(model, table, list(range(12)))
    alone = [outputs(model, table, [row]) for row in range(12)]
    for part in range(2):
        torch.testing.assert_close(
            together[part], torch.cat([one[part] for one in alone]), rtol=0, atol=1e-5
        )
    apart = outputs(model, table, list(range(12)), share_asvs=False)
    torch.testing.assert_close(apart[1], together[1], rtol=0, atol=1e-5)


def test_counts_matter_only_where_they_are_embedded(table):
    other = dataclasses.replace(table, counts=table.counts * 7)
    for kind in ("none", "add", "concat", "film"):
        torch.manual_seed(0)
        shape = dataclasses.replace(SHAPE, count_embedding=kind)
        model = Predictor(CommunityEncoder(shape), PredictorShape()).eval()
        same = torch.equal(outputs(model, table, [0, 1])[0], outputs(model, other, [0, 1])[0])
        assert same == (kind == "none")


def test_slot_positions_make_the_order_matter(table):
    torch.manual_seed(0)
    model = Predictor(
        CommunityEncoder(EncoderShape(32, 2, 1, sample_position="slot")), PredictorShape()
    ).eval()
    with torch.no_grad():
        model.encoder.sample_encoder.position_embedding.weight.normal_()
    options = {"asv_sampling": "first"}
    found = outputs(model, permuted(table, np.random.default_rng(1)), [0, 1, 2], **options)
    expected = outputs(model, table, [0, 1, 2], **options)
    assert not torch.allclose(found[0], expected[0], atol=1e-4)


def test_count_embeddings_compute_their_formulas():
    slots = Ragged(torch.randn(5, 32), torch.tensor([0, 2, 5], dtype=torch.int32), 3)
    counts = torch.tensor([1.0, 10.0, 3.0, 7.0, 100.0])
    for kind in ("add", "concat", "film"):
        torch.manual_seed(0)
        encoder = CommunityEncoder(EncoderShape(32, 2, 1, count_embedding=kind)).sample_encoder
        seen = []
        encoder.stack.forward = lambda x, _row, seen=seen: seen.append(x.values) or x
        encoder(slots, counts)
        c = encoder.count_projection(torch.log(counts + 1)[:, None])
        x = slots.values
        expected = {
            "add": lambda x=x, c=c: x + c,
            "concat": lambda x=x, c=c, e=encoder: e.count_merge(torch.cat([x, c], -1)),
            "film": lambda x=x, c=c: x * (1 + c[:, :32]) + c[:, 32:],
        }[kind]()
        torch.testing.assert_close(seen[0], expected)


def test_sample_embedding_is_attention_mean_and_maximum(table):
    torch.manual_seed(0)
    encoder = CommunityEncoder(EncoderShape(32, 2, 1)).eval()
    batch = SampleDataset(table).batch([0, 5])
    with torch.no_grad():
        vectors = encoder.encode_asvs(batch.tokens)
        encoded = encoder.encode_samples(vectors, batch.slots, batch.counts)
        head = encoder.unifrac_encoder
        z = head(encoded, batch.slots)
        pooled = head.pool(head.stack(encoded.samples))
        for sample in range(2):
            own = vectors[batch.slots[sample]]
            mean, strongest = head.mean_projection(own).mean(0), head.max_projection(own).amax(0)
            expected = head.norm(torch.cat([pooled[sample], mean, strongest]))
            torch.testing.assert_close(z[sample], expected, rtol=0, atol=1e-5)


def test_distances_are_zero_on_the_diagonal_symmetric_and_below_one():
    head = CommunityEncoder(EncoderShape(32, 2, 1, distance_scale=10.0)).unifrac_encoder
    z = torch.randn(6, 20) * 3
    found = head.distances(z)
    assert torch.equal(found, found.T) and (found.diagonal() == 0).all() and found.max() < 1
    expected = torch.tanh((z[0] - z[1]).norm() / 10)
    torch.testing.assert_close(found[0, 1], expected)
    torch.testing.assert_close(head.distances(z[:2], z)[0, 1], expected)
    same = torch.zeros(2, 3, requires_grad=True)
    euclidean(same).sum().backward()
    assert torch.isfinite(same.grad).all()


def test_positions_in_rows():
    ragged = Ragged(torch.zeros(6), torch.tensor([0, 2, 2, 6], dtype=torch.int32), 4)
    assert positions_in_rows(ragged).tolist() == [0, 1, 0, 1, 2, 3]


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
    encoder = CommunityEncoder(EncoderShape(32, 2, 1))
    assert isinstance(Predictor(encoder, PredictorShape()).norm, nn.LayerNorm)
    bare = Predictor(encoder, PredictorShape(target_norm=False))
    assert isinstance(bare.norm, nn.Identity)


def test_sample_dropout_is_off_where_distances_are_learned(table):
    torch.manual_seed(0)
    encoder = CommunityEncoder(EncoderShape(32, 2, 1, dropout=0.5)).train()
    batch = SampleDataset(table).batch([0, 1, 2])
    with torch.no_grad():
        first, second = (
            encoder.embed(
                encoder.encode_asvs(batch.tokens, dropout=False), batch.slots, batch.counts
            )
            for _ in range(2)
        )
        noisy = encoder.encode_asvs(batch.tokens)
        assert not torch.equal(noisy, encoder.encode_asvs(batch.tokens))
    assert torch.equal(first, second)
    assert isinstance(encoder.encode_samples(noisy, batch.slots, batch.counts), Encoded)
