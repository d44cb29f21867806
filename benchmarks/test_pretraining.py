"""The split and the damage of the pretraining measurement."""

import numpy as np
import pytest

from aam.data.metadata import read_metadata
from benchmarks.pretraining import SUBJECT, damaged, mean_of, parts


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


def test_damage_and_means():
    found = dict(damaged(["ACGT" * 25], np.random.default_rng(0)))
    assert found["trimmed to 80"] == ["ACGT" * 20]
    assert found["shifted by 5"][0][5:] == ("ACGT" * 25)[:-5]
    assert abs(len(found["3 indels"][0]) - 100) <= 3
    assert mean_of([{"a": {"r": 1.0, "x": None}}, {"a": {"r": 0.0, "x": 1.0}}]) == {
        "a": {"r": 0.5, "x": None}
    }
