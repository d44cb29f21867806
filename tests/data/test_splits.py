"""Splits: sizes, classes and groups, determinism, and the warning about subjects."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aam.data.metadata import Metadata, read_metadata
from aam.data.splits import Split, leaking_columns, split_samples
from aam.errors import InputError

IDS = [f"s{n:03d}" for n in range(200)]


def shares(split, values, ids=IDS):
    """Return each value's share of samples in the validation part."""
    inside = set(split.validation)
    of = {value: [name in inside for name, v in zip(ids, values, strict=True) if v == value]
          for value in set(values)}  # fmt: skip
    return {value: float(np.mean(flags)) for value, flags in of.items()}


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_random_split_has_the_asked_size_and_the_given_order(fraction):
    split = split_samples(IDS, validation_fraction=fraction, seed=1)
    assert len(split.validation) == 200 * fraction
    assert sorted(split.train + split.validation) == IDS
    assert list(split.train) == sorted(split.train)
    assert list(split.validation) == sorted(split.validation)


def test_split_depends_on_seed_and_not_on_order():
    labels = ["x" if n % 3 else "y" for n in range(200)]
    groups = [f"g{n // 7}" for n in range(200)]
    shuffled = np.random.default_rng(0).permutation(200)
    for options in ({}, {"labels": labels}, {"groups": groups},
                    {"labels": labels, "groups": groups}):  # fmt: skip
        first = split_samples(IDS, seed=4, **options)
        moved = {key: [values[n] for n in shuffled] for key, values in options.items()}
        second = split_samples([IDS[n] for n in shuffled], seed=4, **moved)
        assert set(first.validation) == set(second.validation)
        assert first == split_samples(IDS, seed=4, **options)
        assert set(first.validation) != set(split_samples(IDS, seed=5, **options).validation)


def test_stratified_split_keeps_proportions_and_small_classes():
    labels = ["common"] * 150 + ["rare"] * 46 + ["scarce"] * 2 + ["few"] * 2
    split = split_samples(IDS, seed=0, labels=labels)
    got = shares(split, labels)
    assert got["common"] == 0.2
    assert abs(got["rare"] - 0.2) < 0.02
    assert got["scarce"] == got["few"] == 0.5
    assert len(split.validation) in (40, 41)
    labels = [f"class{n % 8}" for n in range(112)]  # 14 of each, 2.8 of them for validation
    split = split_samples(IDS[:112], seed=0, labels=labels)
    assert len(split.validation) == 22
    assert set(shares(split, labels, IDS[:112]).values()) == {2 / 14, 3 / 14}


def test_grouped_split_never_cuts_a_group_and_has_about_the_share_of_samples():
    generator = np.random.default_rng(0)
    groups = [f"g{g}" for g in generator.choice(23, 200, p=generator.dirichlet(np.ones(23)))]
    for seed in range(10):
        split = split_samples(IDS, seed=seed, groups=groups)
        assert set(shares(split, groups).values()) == {0.0, 1.0}
        assert abs(len(split.validation) / 200 - 0.2) <= 0.02


def test_grouped_and_stratified_split_has_every_class_in_both_parts():
    generator = np.random.default_rng(2)
    groups = [f"g{n // 8}" for n in range(200)]
    sick = generator.random(25) < 0.3
    labels = ["sick" if sick[n // 8] else "well" for n in range(200)]
    for seed in range(10):
        split = split_samples(IDS, seed=seed, labels=labels, groups=groups)
        assert set(shares(split, groups).values()) == {0.0, 1.0}
        got = shares(split, labels)
        assert all(abs(share - 0.2) <= 0.1 for share in got.values()), got


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=2, max_size=40), st.integers(0, 50))
def test_any_grouping_with_two_groups_can_be_split(groups, seed):
    ids = [f"i{n}" for n in range(len(groups))]
    values = [str(one) for one in groups]
    if len(set(values)) < 2:
        with pytest.raises(InputError, match="one group"):
            split_samples(ids, groups=values, seed=seed)
        return
    split = split_samples(ids, groups=values, seed=seed)
    group_of = dict(zip(ids, values, strict=True))
    assert split.train and split.validation
    assert not {group_of[one] for one in split.train} & {group_of[one] for one in split.validation}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"labels": ["x", "x", "x", "y"]}, "1 classes have one sample only ('y')"),
        ({"groups": ["g"] * 4}, "all samples are of one group"),
        (
            {"groups": ["g", "g", "h", "h"], "labels": ["x", "x", "y", "y"]},
            "no split by group has every class in both parts",
        ),
    ],
)
def test_splits_that_do_not_exist(options, expected):
    with pytest.raises(InputError) as caught:
        split_samples(["a", "b", "c", "d"], **options)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def metadata_of(columns):
    number = len(next(iter(columns.values())))
    return Metadata(pd.DataFrame(columns, index=[f"v{n}" for n in range(number)]), "study", {})


def study(subjects=12, visits=6, named="host_subject_id"):
    """Return metadata of repeated visits: subject-level columns, and ordinary categories."""
    generator = np.random.default_rng(0)
    number = subjects * visits
    who = np.repeat(np.arange(subjects), visits)
    columns = {named: [f"p{one}" for one in who]}
    columns |= {
        f"trait_{k}": [str(one) for one in generator.integers(0, 2 + k, subjects)[who]]
        for k in range(6)
    }
    columns |= {
        f"visit_{k}": [str(one) for one in generator.integers(0, 3 + k, number)] for k in range(4)
    }
    columns["sex"] = ["FM"[one % 2] for one in who]
    columns["site"] = [f"site{one}" for one in generator.integers(0, 9, number)]
    columns["barcode"] = [f"b{n}" for n in range(number)]
    return metadata_of(columns)


@pytest.mark.parametrize(
    "named", ["host_subject_id", "Patient", "subjectID", "mouse id", "cage_number", "anonymous"]
)
def test_a_subject_column_that_crosses_is_found_by_name_or_by_what_it_settles(named):
    metadata = study(named=named)
    assert leaking_columns(metadata, split_samples(metadata.ids)) == [named]
    grouped = split_samples(metadata.ids, groups=metadata.text(named))
    assert leaking_columns(metadata, grouped) == []


def test_other_columns_raise_no_alarm():
    metadata = study(named="subject_diet")
    barcodes = metadata.text("barcode")
    columns = {
        **metadata.frame,
        "subject_diet": metadata.text("site"),  # a word of subjects, but no id
        "donor": metadata.text("sex"),  # two values sort nobody
        # Nearly one a sample settles everything; the two alike are visits of one subject.
        "barcode": [*barcodes[:-1], barcodes[-2]],
    }
    metadata = metadata_of(columns)
    assert leaking_columns(metadata, Split(metadata.ids[:-1], metadata.ids[-1:])) == []


def test_a_subject_column_with_few_others_is_found_by_its_name():
    metadata = metadata_of({"patient_id": list("123123123123"), "visit": list("112233112233")})
    split = Split(metadata.ids[:9], metadata.ids[9:])
    assert leaking_columns(metadata, split) == ["patient_id"]


@pytest.mark.real
def test_ibd_subjects_leak_in_a_random_split_only(real_data):
    metadata = read_metadata(real_data / "ibd" / "metadata.tsv")
    subjects = metadata.text("host_subject_id")
    known = [name for name, one in zip(metadata.ids, subjects, strict=True) if one is not None]
    chosen = metadata.select(known)
    found = leaking_columns(chosen, split_samples(known))
    assert "host_subject_id" in found
    # "description" holds the family and its member in words: the same people.
    assert set(found) <= {"host_subject_id", "description"}
    grouped = split_samples(
        known, groups=chosen.text("host_subject_id"), labels=chosen.text("ibd"), seed=0
    )
    assert leaking_columns(chosen, grouped) == []
    assert abs(len(grouped.validation) / len(known) - 0.2) < 0.05
