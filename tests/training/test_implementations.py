"""The whole model and its training on the compiled kernels, beside the specification's."""

import numpy as np
import pytest
import torch

from aam.config import PenaltyOptions
from aam.data.dataset import SampleDataset
from aam.data.phylogeny import UniFrac
from aam.data.table import read_table
from aam.model import CommunityEncoder
from aam.model.encoder import EncoderShape
from aam.training.exchange import Exchange
from aam.training.losses import DistanceLoss
from aam.training.objectives import PretrainObjective
from aam.training.step import Step
from tests.kernels.contract import require

STEPS = 12


@pytest.fixture(scope="module")
def dataset(real_data, compiled_kernels):
    return SampleDataset(read_table(real_data / "ibd" / "table-rarefied-5000.biom"), token_limit=24)


@pytest.fixture(scope="module")
def compiled_kernels():
    require("cpu")


def twin(impl, dtype=torch.float32, **shape):
    """The same model for every implementation."""
    torch.manual_seed(3)
    model = CommunityEncoder(EncoderShape(token_limit=24, **shape), impl=impl)
    return model.to(dtype)


@pytest.mark.real
def test_the_whole_model_is_as_near_to_float64_as_the_specification(dataset):
    batch = dataset.batch(np.arange(4))
    embedded = {}
    for impl, dtype in (("math", torch.float64), ("math", torch.float32), ("cpu", torch.float32)):
        model = twin(impl, dtype).eval()
        with torch.no_grad():
            vectors = model.encode_asvs(batch.tokens)
            embedded[impl, dtype] = model.embed(vectors, batch.slots, batch.counts).double()
    truth = embedded.pop(("math", torch.float64))
    math, cpu = ((x - truth).abs().max() / truth.abs().max() for x in embedded.values())
    assert cpu <= 2 * math + 1e-7
    assert cpu < 5e-6


@pytest.mark.real
def test_training_goes_the_same_way_with_dropout_and_masks(dataset, real_data):
    distances = UniFrac(
        read_table(real_data / "ibd" / "table-rarefied-5000.biom"), real_data / "ibd" / "tree.nwk"
    )
    curves = {impl: loss_curve(impl, dataset, distances) for impl in ("math", "cpu", "sdpa")}
    assert curves["math"][-1] < 0.8 * curves["math"][0]
    np.testing.assert_allclose(curves["cpu"], curves["math"], rtol=1e-4)
    np.testing.assert_allclose(curves["sdpa"], curves["math"], rtol=1e-4)


def loss_curve(impl, dataset, distances):
    model = twin(impl, embedding_dim=32, num_heads=2, num_layers=2, dropout=0.1)
    objective = PretrainObjective(model, PenaltyOptions(), DistanceLoss(distances))
    compute = Step(objective, Exchange())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)  # the same masks and dropout seeds
        optimizer.zero_grad()
        losses.append(compute(dataset.batch(np.arange(4)))["loss"])
        optimizer.step()
    return losses
