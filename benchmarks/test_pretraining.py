"""The split and the schedule of the pretraining measurement."""

import pytest

from aam.data.metadata import read_metadata
from benchmarks.pretraining import SUBJECT, epochs_within, parts


@pytest.mark.real
def test_the_parts_of_ibd(real_data):
    """Those of docs/guide/pretrain.md."""
    found = parts(real_data / "ibd")
    assert {name: len(ids) for name, ids in found.items()} == {
        "train": 291,
        "random": 60,
        "new-subjects": 77,
    }
    assert len(set().union(*found.values())) == 428
    assert found["random"][0] == "2538.1002501"
    metadata = read_metadata(real_data / "ibd" / "metadata.tsv")
    subjects = {name: set(metadata.select(ids).text(SUBJECT)) for name, ids in found.items()}
    assert not subjects["new-subjects"] & (subjects["train"] | subjects["random"])


def test_epochs_that_fit_the_minutes():
    assert epochs_within(20, 2.0, samples=291, batch_size=16) == 30  # of 19 steps
    assert epochs_within(0.1, 2.0, samples=291, batch_size=16) == 1
