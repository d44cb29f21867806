"""Which validation samples are compared."""

import numpy as np
import pytest

from aam.commands import inputs as prepare
from aam.config import TableOptions
from aam.data.samples import read_samples
from aam.data.splits import split_samples


@pytest.fixture
def samples(community):
    return read_samples(TableOptions(table=community.table, rarefy_depth=0), 0)


def test_all_validation_samples_are_compared_unless_they_are_too_many(samples, monkeypatch):
    parts = split_samples(samples.ids, validation_fraction=0.5)
    before = list(samples.facts)
    rows = prepare.evaluation_rows(samples, parts)
    np.testing.assert_array_equal(rows, samples.rows(parts.validation))
    assert samples.facts == before
    monkeypatch.setattr(prepare, "JUDGED_SAMPLES", 5)
    some = prepare.evaluation_rows(samples, parts)
    assert len(some) == 5 == len(set(some)) and set(some) < set(rows)
    np.testing.assert_array_equal(some, prepare.evaluation_rows(samples, parts))
    fact = samples.facts[-1]
    assert fact.count == len(rows) - 5 and fact.kind == "cut"
