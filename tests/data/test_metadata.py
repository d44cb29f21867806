"""QIIME 2 metadata: ids and cells stay text; what breaks its rules is one line with a remedy."""

import numpy as np
import pytest

from aam.data.metadata import match_ids, read_metadata, require_values
from aam.errors import DataFact, InputError


def write(folder, text, encoding="utf-8"):
    path = folder / "metadata.tsv"
    path.write_text(text, encoding)
    return path


def error_of(call, *arguments, **options):
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize(
    "header",
    ["#SampleID", "#Sample ID", "sample-id", "sampleid", "Sample ID", "sample_name", "id", "ID"],
)
def test_every_id_header_of_qiime_is_accepted(tmp_path, header):
    metadata = read_metadata(write(tmp_path, f"{header}\tsex\tage\n10\tF\t1.0\n10.0\tM\t02\n"))
    assert metadata.ids == ("10", "10.0")
    assert metadata.columns == ("sex", "age")
    assert metadata.text("sex") == ["F", "M"]
    assert metadata.text("age") == ["1.0", "02"]
    np.testing.assert_array_equal(metadata.numeric("age"), [1.0, 2.0])


def test_comments_types_blank_lines_and_spaces(tmp_path):
    text = (
        "# made by hand\n"
        "sample-id\tplate\tage\tbmi\n"
        "#q2:types\tcategorical\tnumeric\t\n"
        "# another comment\n"
        " 2538.1000102 \t1\t 30 \t21.5\n"
        "\t\t\n"
        "s2\t2\t\t22\n"
    )
    metadata = read_metadata(write(tmp_path, text))
    assert metadata.ids == ("2538.1000102", "s2")
    assert metadata.declared == {"plate": "categorical", "age": "numeric"}
    assert not metadata.is_numeric("plate")
    assert metadata.is_numeric("age") and metadata.is_numeric("bmi")
    np.testing.assert_array_equal(metadata.numeric("age"), [30, np.nan])
    np.testing.assert_array_equal(metadata.numeric("plate"), [1, 2])


@pytest.mark.parametrize(
    "term",
    ["", "missing", "Not collected", "not provided", "NOT APPLICABLE", "restricted access",
     "Missing: Not provided", "missing: control sample"],
)  # fmt: skip
def test_missing_terms_are_missing_in_text_and_in_numbers(tmp_path, term):
    text = f"id\tdiet\tage\na\tvegan\t3\nb\t{term}\t{term}\n"
    metadata = read_metadata(write(tmp_path, text))
    assert metadata.text("diet") == ["vegan", None]
    assert metadata.is_numeric("age")
    np.testing.assert_array_equal(metadata.numeric("age"), [3, np.nan])


def test_none_and_na_are_values_as_in_qiime_and_rows_are_chosen_in_order(tmp_path):
    metadata = read_metadata(write(tmp_path, "id\talcohol\na\tNone\nb\tNA\nc\t\n"))
    assert metadata.text("alcohol") == ["None", "NA", None]
    chosen = metadata.select(["c", "a"])
    assert chosen.ids == ("c", "a") and chosen.text("alcohol") == [None, "None"]


def test_values_that_are_no_numbers_are_named(tmp_path):
    text = "id\tage\na\t3\nb\tforty\nc\tnan\nd\tinf\ne\tforty\nf\t1_000\n"
    metadata = read_metadata(write(tmp_path, text))
    assert not metadata.is_numeric("age")
    message = error_of(metadata.numeric, "age")
    assert "column 'age' has 5 values" in message and "('forty', 'nan', 'inf', ...)" in message
    declared = text.replace("id\tage\n", "id\tage\n#q2:types\tnumeric\n")
    assert "'forty'" in error_of(read_metadata, write(tmp_path, declared))


def test_a_missing_column_suggests_near_names(tmp_path):
    text = "id\tbody_mass_index\thost_age\tsex\na\t1\t2\tF\n"
    metadata = read_metadata(write(tmp_path, text))
    assert "did you mean 'body_mass_index'?" in error_of(metadata.text, "body_mas_index")
    assert "'host_age'" in error_of(metadata.numeric, "Age")
    message = error_of(metadata.text, "zzz")
    assert "3 columns ('body_mass_index', 'host_age', 'sex')" in message
    bare = read_metadata(write(tmp_path, "id\na\n"))
    assert error_of(bare.text, "age").endswith("there is no column 'age': it has no columns")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds no header"),
        ("# comment only\n", "holds no header"),
        ("sample_id\tage\na\t1\n", "first column is called 'sample_id': call it 'sample-id'"),
        ("id,age\na,1\n", "separated by commas"),
        ("id\tage\na\t1\na\t2\nb\t1\nb\t1\nc\t5\n", "2 sample ids have more than one row"),
        ("id\tage\tage\na\t1\t2\n", "Column names must be unique"),
        ("id\tage\na\t1\t2\t3\n", "more cells than are declared"),
        ("id\tage\n", "at least one ID"),
        ("id\tage\n\t4\n", "empty metadata ID"),
        ("id\tage\n#q2:types\tfloat\na\t1\n", "unrecognized column type"),
        ('id\tage\na\t"1\n', "is no readable text"),
    ],
)  # fmt: skip
def test_files_that_break_the_rules(tmp_path, text, expected):
    path = write(tmp_path, text)
    message = error_of(read_metadata, path)
    assert message.startswith(str(path)) and expected in message


def test_files_that_are_absent_or_no_text(tmp_path):
    assert "no such file" in error_of(read_metadata, tmp_path / "absent.tsv")
    assert "is no readable text" in error_of(read_metadata, write(tmp_path, "id", "utf-16"))


def test_targets_without_values_or_with_one_class(tmp_path):
    text = "id\tnone\tsame\tage\tsex\na\t\tx\t1\tF\nb\tmissing\tx\t2\tM\nc\t\t\t\t\n"
    metadata = read_metadata(write(tmp_path, text))
    for column, numeric, expected in (
        ("none", True, "has no value for any of 3 samples"),
        ("same", False, "single class ('x') in 2 samples"),
        ("sex", True, "no numbers ('F', 'M')"),
    ):
        assert expected in error_of(require_values, metadata, column, numeric=numeric)
    require_values(metadata, "age", numeric=True)
    require_values(metadata, "sex", numeric=False)


@pytest.mark.real
def test_real_metadata_keep_ids_and_classes(real_data):
    metadata = read_metadata(real_data / "ibd" / "metadata.tsv")
    assert len(metadata.ids) == 646 and len(metadata.columns) == 127
    assert "2538.1000102" in metadata.ids
    assert metadata.is_numeric("body_mass_index") and not metadata.is_numeric("ibd")
    assert len(set(metadata.text("ibd")) - {None}) >= 2
    assert "None" in metadata.text("last_travel")


def test_all_match_in_the_tables_order():
    kept, facts = match_ids(["b", "a"], ["a", "b", "c"], metadata_source="m.tsv")
    assert kept == ("b", "a")
    assert facts == [
        DataFact("samples of the table in m.tsv", 2),
        DataFact("rows of m.tsv without a sample in the table", 1),
    ]


def test_fewer_than_all_is_an_error_unless_allowed():
    table, others = ["a", "b", "c", "d", "e"], ["c"]
    message = error_of(match_ids, table, others, table_source="t.biom", metadata_source="m.tsv")
    assert "4 of 5 samples of t.biom are not in m.tsv ('a', 'b', 'd', ...)" in message
    assert "--allow-missing" in message
    kept, facts = match_ids(table, others, allow_missing=True)
    assert kept == ("c",)
    assert [(fact.count, fact.kind) for fact in facts] == [(1, "info"), (4, "dropped")]
    assert facts[1].detail == "'a', 'b', 'd', ..."


@pytest.mark.parametrize(
    ("others", "hint"),
    [
        (["x", "y", "z", "w"], ""),
        (["2538.10001", "2538.2"], "equal as numbers"),
        (["AA_1"], "'-', '_', '.'"),
    ],
)
@pytest.mark.parametrize("allow_missing", [False, True])
def test_no_match_shows_three_ids_of_each_side(others, hint, allow_missing):
    table = ["2538.1000100", "aa-1", "c", "d"]
    others = [one.lower() for one in others]
    message = error_of(match_ids, table, others, allow_missing=allow_missing)
    assert "none of the 4 samples" in message
    assert "'2538.1000100', 'aa-1', 'c', ..." in message and f"'{others[0]}'" in message
    assert hint in message


def test_numeric_looking_ids_match_as_text_only():
    with pytest.raises(InputError, match=r"1 of 2 samples.*equal as numbers"):
        match_ids(["10", "10.0"], ["10"])
    with pytest.raises(InputError, match="upper and lower case"):
        match_ids(["Gut1"], ["gut1"])
