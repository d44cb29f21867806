"""From files to samples: covariates, and which validation samples are compared."""

import numpy as np
import pytest

from aam.commands import inputs
from aam.config import TableOptions
from aam.data.samples import read_samples
from aam.data.splits import split_samples


@pytest.fixture
def samples(community):
    options = TableOptions(table=community.table, rarefy_depth=0)
    return read_samples(options, 0, metadata=community.metadata)


def test_all_validation_samples_are_compared_unless_they_are_too_many(samples, monkeypatch):
    parts = split_samples(samples.ids, validation_fraction=0.5)
    before = list(samples.facts)
    rows = inputs.evaluation_rows(samples, parts)
    np.testing.assert_array_equal(rows, samples.rows(parts.validation))
    assert samples.facts == before
    monkeypatch.setattr(inputs, "MOST_COMPARED", 5)
    some = inputs.evaluation_rows(samples, parts)
    assert len(some) == 5 == len(set(some)) and set(some) < set(rows)
    np.testing.assert_array_equal(some, inputs.evaluation_rows(samples, parts))
    fact = samples.facts[-1]
    assert fact.count == len(rows) - 5 and fact.kind == "cut"


def test_categories_are_codes_and_what_is_no_class_counts_as_unknown(samples):
    sites = samples.metadata.text("site")
    first, second = sorted(set(sites))[:2]
    codes = samples.category_codes({"site": [first, second], "diagnosis": ["healthy"]})
    assert codes.shape == (24, 2)
    assert codes[:, 0].tolist() == [{first: 1, second: 2}.get(one, 0) for one in sites]
    fact = samples.facts[-1]
    assert fact.count == (codes[:, 1] == 0).sum() > 0 and "'diagnosis'" in fact.what
    keys = samples.category_keys(["site", "diagnosis"])
    assert len(set(keys)) == len(set(zip(sites, samples.metadata.text("diagnosis"), strict=True)))
    samples.metadata = None
    assert samples.category_codes({"site": [first]}).tolist() == [[0]] * 24
