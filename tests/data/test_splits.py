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


def shares(split, values):
    """Each value's share of samples in the validation part."""
    inside = pd.Series(IDS[: len(values)]).isin(split.validation)
    return inside.groupby(values).mean().to_dict()


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_random_split_has_the_asked_size_and_the_given_order(fraction):
    split = split_samples(IDS, validation_fraction=fraction, seed=1)
    assert len(split.validation) == 200 * fraction
    assert sorted(split.train + split.validation) == IDS
    assert all(list(part) == sorted(part) for part in (split.train, split.validation))


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
    assert got["common"] == 0.2 and abs(got["rare"] - 0.2) < 0.02
    assert got["scarce"] == got["few"] == 0.5
    assert len(split.validation) in (40, 41)
    many = [f"class{n % 8}" for n in range(112)]  # 14 of each, 2.8 of them for validation
    split = split_samples(IDS[:112], seed=0, labels=many)
    assert len(split.validation) == 22
    assert set(shares(split, many).values()) == {2 / 14, 3 / 14}


def test_grouped_split_never_cuts_a_group_and_has_about_the_share_of_samples():
    generator = np.random.default_rng(0)
    uneven = [f"g{g}" for g in generator.choice(23, 200, p=generator.dirichlet(np.ones(23)))]
    eights = [f"g{n // 8}" for n in range(200)]
    sick = np.repeat(generator.random(25) < 0.3, 8)
    labels = np.where(sick, "sick", "well").tolist()
    for seed in range(10):
        split = split_samples(IDS, seed=seed, groups=uneven)
        assert set(shares(split, uneven).values()) == {0.0, 1.0}
        assert abs(len(split.validation) / 200 - 0.2) <= 0.02
        split = split_samples(IDS, seed=seed, labels=labels, groups=eights)
        assert set(shares(split, eights).values()) == {0.0, 1.0}
        assert all(abs(share - 0.2) <= 0.1 for share in shares(split, labels).values())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=2, max_size=40), st.integers(0, 50))
def test_any_grouping_with_two_groups_can_be_split(groups, seed):
    ids, values = [f"i{n}" for n in range(len(groups))], [str(one) for one in groups]
    if len(set(values)) < 2:
        with pytest.raises(InputError, match="one group"):
            split_samples(ids, groups=values, seed=seed)
        return
    split = split_samples(ids, groups=values, seed=seed)
    train, held_out = ({values[int(one[1:])] for one in part} for part in vars(split).values())
    assert train and held_out and not train & held_out


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


def study(named="host_subject_id"):
    """Metadata of 12 subjects at 6 visits: columns of subjects, and ordinary categories."""
    generator, who = np.random.default_rng(0), np.repeat(np.arange(12), 6)
    columns = {named: who, "sex": who % 2, "site": generator.integers(0, 9, 72)}
    columns |= {f"trait_{k}": generator.integers(0, 2 + k, 12)[who] for k in range(6)}
    columns |= {f"visit_{k}": generator.integers(0, 3 + k, 72) for k in range(4)}
    columns["barcode"] = np.arange(72)
    return metadata_of({name: [f"v{one}" for one in own] for name, own in columns.items()})


@pytest.mark.parametrize(
    "named", ["host_subject_id", "Patient", "subjectID", "mouse id", "cage_number", "anonymous"]
)
def test_a_subject_column_that_crosses_is_found_by_name_or_by_what_it_settles(named):
    metadata = study(named)
    assert leaking_columns(metadata, split_samples(metadata.ids)) == [named]
    grouped = split_samples(metadata.ids, groups=metadata.text(named))
    assert leaking_columns(metadata, grouped) == []


def test_other_columns_raise_no_alarm():
    metadata = study("subject_diet")
    barcodes = metadata.text("barcode")
    metadata = metadata_of({
        **metadata.frame,
        "subject_diet": metadata.text("site"),  # a word of subjects, but no id
        "donor": metadata.text("sex"),  # two values sort nobody
        # Nearly one a sample settles everything; the two alike are visits of one subject.
        "barcode": [*barcodes[:-1], barcodes[-2]],
    })  # fmt: skip
    assert leaking_columns(metadata, Split(metadata.ids[:-1], metadata.ids[-1:])) == []


def test_a_subject_column_with_few_others_is_found_by_its_name():
    metadata = metadata_of({"patient_id": list("123123123123"), "visit": list("112233112233")})
    assert leaking_columns(metadata, Split(metadata.ids[:9], metadata.ids[9:])) == ["patient_id"]


@pytest.mark.real
def test_ibd_subjects_leak_in_a_random_split_only(real_data):
    metadata = read_metadata(real_data / "ibd" / "metadata.tsv")
    known = metadata.frame["host_subject_id"].dropna().index.tolist()
    chosen = metadata.select(known)
    found = leaking_columns(chosen, split_samples(known))
    # "description" holds the family and its member in words: the same people.
    assert "host_subject_id" in found and set(found) <= {"host_subject_id", "description"}
    subjects, labels = chosen.text("host_subject_id"), chosen.text("ibd")
    grouped = split_samples(known, groups=subjects, labels=labels, seed=0)
    assert leaking_columns(chosen, grouped) == []
    assert abs(len(grouped.validation) / len(known) - 0.2) < 0.05
