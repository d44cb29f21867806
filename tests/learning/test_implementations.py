"""The whole model and its training on the compiled kernels, beside the specification's."""

import numpy as np
import pytest
import torch

from aam.config import PenaltyOptions
from aam.data.clades import Clades
from aam.data.dataset import AsvDataset, SampleDataset
from aam.data.table import read_table
from aam.data.table_distances import PrecomputedDistances
from aam.data.texts import Texts
from aam.data.tree import read_tree
from aam.data.unifrac import UniFrac
from aam.learning.distributed import RankGroup
from aam.learning.losses import CladeLoss, DistanceLoss
from aam.learning.objective import CladeObjective, PairObjective
from aam.learning.step import Step
from aam.model import AsvEncoder, CladeHead, EncoderShape, FreeClades
from tests.kernels.contract import require

STEPS = 12


@pytest.fixture(scope="module")
def table(real_data):
    require("cpu")
    return read_table(real_data / "ibd" / "table-rarefied-5000.biom")


@pytest.fixture(scope="module")
def unifrac(table, real_data):
    return UniFrac(table, read_tree(real_data / "ibd" / "tree.nwk"))


def twin(impl, dtype=torch.float32, **shape):
    """The same model for every implementation, its transformer let through."""
    torch.manual_seed(3)
    encoder = AsvEncoder(EncoderShape(**shape), impl=impl)
    torch.nn.init.normal_(encoder.gate)
    pairs = FreeClades(encoder.shape.embedding_dim, 64, abundance=False)
    return encoder.to(dtype), pairs.to(dtype)


@pytest.mark.real
def test_the_whole_model_is_as_near_to_float64_as_the_specification(table):
    batch = SampleDataset(table, token_limit=24).batch(np.arange(4))
    found = {}
    for impl, dtype in (("math", torch.float64), ("math", torch.float32), ("cpu", torch.float32)):
        encoder, pairs = twin(impl, dtype)
        with torch.no_grad():
            vectors = encoder.eval()(batch.tokens).vectors
            profiles = pairs.profiles(vectors, batch.slots, batch.counts.to(dtype))
            found[impl, dtype] = torch.cat([vectors.flatten(), profiles.flatten()]).double()
    truth = found.pop(("math", torch.float64))
    math, cpu = ((x - truth).abs().max() / truth.abs().max() for x in found.values())
    assert cpu <= 2 * math + 1e-7
    assert cpu < 5e-6


@pytest.mark.real
@pytest.mark.parametrize("kind", ["clades", "pairs"])
def test_training_goes_the_same_way_with_dropout_and_noise(kind, table, unifrac):
    curves = {impl: loss_curve(kind, impl, table, unifrac) for impl in ("math", "cpu", "sdpa")}
    assert curves["math"][-1] < 0.8 * curves["math"][0]
    np.testing.assert_allclose(curves["cpu"], curves["math"], rtol=1e-4)
    np.testing.assert_allclose(curves["sdpa"], curves["math"], rtol=1e-4)


def loss_curve(kind, impl, table, unifrac):
    encoder, pairs = twin(impl, embedding_dim=32, num_heads=2, num_layers=2, dropout=0.1)
    if kind == "clades":
        columns = np.flatnonzero(unifrac.tip_of_column >= 0)
        columns = columns[np.argsort(unifrac.tip_of_column[columns])]
        names = Texts.of(table.feature_ids).take(columns)
        clades = Clades(unifrac.tree)
        head = CladeHead(32, len(clades))
        head.begin_at(torch.from_numpy((clades.stop - clades.start) / len(names)))
        objective = CladeObjective(encoder, head, PenaltyOptions(), CladeLoss(clades))
        dataset, rows = AsvDataset(names, 150), np.arange(0, len(names), len(names) // 64)
    else:
        distances = PrecomputedDistances(unifrac.sample_ids, unifrac.pairwise(), [])
        objective = PairObjective(encoder, pairs, PenaltyOptions(), DistanceLoss(distances))
        dataset, rows = SampleDataset(table, token_limit=24), np.arange(4)
    compute = Step(objective.train(), RankGroup())
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)  # the same noise and dropout seeds
        optimizer.zero_grad()
        losses.append(compute(dataset.batch(rows))["loss"])
        optimizer.step()
    return losses
