"""The page holds what the run directory holds, says so in words, and never breaks."""

import errno
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from aam.errors import InputError
from aam.report import write_report

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Parses a page strictly: balanced elements, ids once; collects figures and text."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.html = path.read_text(encoding="utf-8")
        self.size = path.stat().st_size
        self.open, self.ids, self.tags = [], [], []
        self.figures, self.text = {}, []
        self.feed(self.html)
        self.close()
        assert self.open == []
        assert len(self.ids) == len(set(self.ids)), "an id occurs twice"
        self.words = " ".join("".join(self.text).split())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "figure":
            self.figures[attributes["id"]] = {"alt": [], "caption": False, "shapes": 0}
        elif "figure" in self.open:
            figure = list(self.figures.values())[-1]
            if tag == "svg":
                assert attributes["role"] == "img"
                figure["alt"].append(attributes["aria-label"])
            figure["caption"] |= tag == "figcaption"
            figure["shapes"] += tag in ("path", "use")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data + " ")


def report(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    page = Page(path)
    assert page.size < 3_000_000
    assert_nothing_is_loaded(page)
    for name, figure in page.figures.items():
        assert figure["caption"] and figure["shapes"] > 5, name
        assert figure["alt"] and all(len(alt) > 10 for alt in figure["alt"]), name
    return page


def assert_nothing_is_loaded(page):
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "xlink:href", "src"):
                assert value.startswith("#"), (tag, value)
                assert value[1:] in page.ids, value
    assert set(re.findall(r"url\((.)", page.html)) <= {"#"}
    assert "@import" not in page.html and "http://" not in page.html
    assert "default-src 'none'" in page.html


def test_pretraining_shows_distances_ordination_and_curves(tmp_path, fabricate):
    page = report(fabricate.pretraining(tmp_path / "pre"))
    assert list(page.figures) == ["distances", "placements", "ordination", "curves", "mechanics"]
    kinds = [
        alt.split(" distances (PCoA): map of 60 ")[0] for alt in page.figures["ordination"]["alt"]
    ]
    assert kinds == ["True", "Predicted"]
    assert len(page.figures["curves"]["alt"]) == 7
    assert "1,770 pairs of 60 validation samples" in page.words
    assert "Orange: 90 pairs within a group" in page.words
    assert "Better than every baseline in 6 of 8 comparisons." in page.words
    assert "better than placement by 0.038" in page.words
    assert "worse than placement by 0.0070" in page.words
    assert "0.000095 = equal to placement" in page.words
    assert "Bray-Curtis 0.710" in page.words and "constant –" in page.words
    assert "off by 0.0041 on average: better than the best baseline (placement, 0.0058)" in (
        page.words
    )
    assert "clades of ASVs not in training agree to 90.2 % (mean Jaccard)" in page.words
    assert "More than 6 edits from any known ASV, predicted and true clades agree to 79.7 %" in (
        page.words
    )
    assert "83.6 % of the masked nucleotides of ASVs not in training" in page.words
    assert page.words.count("nearest-neighbour placement") == 1
    assert "20 min 34 s" in page.words and "2,345,678" in page.words
    assert "warnings" not in page.ids
    assert page.html.index("below the rarefaction depth") < page.html.index("samples read")
    assert "2 of 3 entries are about something dropped or cut" in page.words
    assert "model.dim" in page.words and "0.0006" in page.words


def test_memberships_by_distance_are_means_of_their_bins(tmp_path, fabricate):
    page = report(fabricate.pretraining(tmp_path))
    rows = [line.split("\t") for line in (tmp_path / "placements.tsv").read_text().splitlines()]
    edits, _, jaccard, nearest = np.array([row[2:] for row in rows[1:]], dtype=float).T
    alt = page.figures["placements"]["alt"]
    for label, low, high in (("1", -1, 1), ("3–4", 3, 4), ("10+", 10, np.inf)):
        own = (edits >= low - 0.5) & (edits < high + 0.5) | (edits == high)
        found = f"{label} edits: {jaccard[own].mean():.3f}, {nearest[own].mean():.3f}"
        assert found in alt[0]
        assert f"{label} {own.sum()} " in page.words
    ranked = np.sort(jaccard)  # the support of the fabricated run has the same order
    low, high = ranked[:20].mean(), ranked[-20:].mean()
    assert f"by support: {low:.3f} where" in alt[1] and f", {high:.3f} where" in alt[1]
    assert "200 ASVs that the model was not trained on" in page.words


def test_a_reference_alone_shows_its_sequences_and_memberships(tmp_path, fabricate):
    fabricate.pretraining(
        tmp_path, samples_train=None, samples_validation=None,
        sequences_train=9000, sequences_validation=1000,
    )  # fmt: skip
    (tmp_path / "distances.tsv").unlink()
    page = report(tmp_path)
    assert "training sequences 9,000 left-out sequences 1,000" in page.words
    assert "training samples" not in page.words and next(iter(page.figures)) == "placements"


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        ("classification", ["UC", "<b>$", "", *"abcdefg"], "classes of diagnosis."),
        (
            "regression",
            ["20", "5.5", "", "61"],
            "diagnosis, from 5.500 (violet) to 61.00 (yellow);",
        ),
        ("regression", [""], "the same colour in both"),
    ],
)
def test_a_metadata_column_colours_the_ordination(tmp_path, fabricate, kind, values, said):
    named = {f"2538.{1000100 + i}": values[i % len(values)] for i in range(60)}
    colours = {"column": "diagnosis", "kind": kind, "values": named}
    page = report(fabricate.pretraining(tmp_path, colours=colours))
    assert said in page.words
    assert page.words.count("other or missing") == 2 * (kind == "classification")


def test_distances_that_hardly_differ_earn_a_warning(tmp_path, fabricate):
    fabricate.pretraining(tmp_path, warnings=["Subjects leak."])
    assert "hardly differ" not in report(tmp_path).words
    pairs = [(f"s{i}", f"t{i}", i % 2, 0.4 + 0.2 * (i % 2)) for i in range(20)]
    header = ["sample_a", "sample_b", "true", "predicted"]
    fabricate.write_rows(tmp_path / "distances.tsv", header, pairs)
    page = report(tmp_path)
    said = "their spread is 0.100, that of the true ones 0.500."
    assert f"2 warnings Subjects leak. Predicted distances hardly differ: {said}" in page.words
    assert page.html.index('id="warnings"') < page.html.index('id="results"')


def test_regression_shows_scatter_and_verdicts(tmp_path, fabricate):
    page = report(fabricate.regression(tmp_path))
    assert list(page.figures) == ["target", "curves"]
    assert "The model explains 43.1 % of the variance of age: worse than the best baseline" in (
        page.words
    )
    assert "off by 5.910 years on average" in page.words
    assert "190 train, 60 validation" in page.words
    assert "true age (years)" in page.words
    assert "Better than every baseline in 0 of 2 comparisons." in page.words


def test_two_classes_show_confusion_and_roc(tmp_path, fabricate):
    page = report(fabricate.classification(tmp_path))
    assert list(page.figures) == ["confusion", "roc", "curves"]
    assert "= equal to random forest" in page.words
    assert "? not defined" in page.words
    from sklearn.metrics import roc_auc_score

    rows = [line.split("\t") for line in (tmp_path / "predictions.tsv").read_text().splitlines()]
    rows = [row for row in rows[1:] if row[1] == "validation"]
    area = roc_auc_score([row[2] == "Crohns" for row in rows], [float(row[5]) for row in rows])
    assert f"area {area:.3f}" in page.words
    right = sum(row[2] == row[3] for row in rows)
    assert f"80 samples (validation); {right} of them right" in page.words


@pytest.mark.parametrize("count", [3, 30])
def test_many_classes_show_a_confusion_matrix(tmp_path, fabricate, count):
    classes = tuple(f"a rather long class name that ends in {i}" for i in range(count))
    page = report(fabricate.classification(tmp_path, classes, "body site"))
    assert "confusion" in page.figures and "roc" not in page.figures
    assert ("The 19 most frequent classes are told apart" in page.words) == (count == 30)


def test_predictions_without_truth(tmp_path, fabricate):
    rows = [(f"s{i}", 20 + i) for i in range(30)]
    fabricate.write_rows(tmp_path / "predictions.tsv", ["sample-id", "predicted"], rows)
    page = report(tmp_path)
    assert list(page.figures) == ["target"]
    assert "Predictions for 30 samples" in page.words
    rows = [(f"s{i}", "ab"[i % 2], 0.5, 0.5) for i in range(30)]
    header = ["sample-id", "predicted", "probability_a", "probability_b"]
    fabricate.write_rows(tmp_path / "predictions.tsv", header, rows)
    assert "their true target is not known" in report(tmp_path).words


MEMORY = [
    "section\tname\tpart\tbytes\tdetail\n",
    "stage\tencode_asvs\tbackward\t90000000\t\n",
    "peak\tencode_asvs, backward\tweights\t25000000\t\n",
    "module\tASV stack\tweights\t25000000\t\n",
    "module\tASV stack\tkept for backward\t50000000\t\n",
    "module\tASV stack\tkept for backward, at the peak\t50000000\t\n",
    "layer\tcpu\trecompute\t512\tas in this run\n",
    "layer\ttriton\trecompute\t0\tdoes not run: no GPU\n",
    "batch\t64 samples\t1 piece\t90000000\trecommended; of 0.10 GB\n",
]


@pytest.mark.parametrize(
    "absent",
    ["summary.json", "metrics.csv", "distances.tsv", "placements.tsv", "predictions.tsv"],
)
def test_what_is_absent_is_left_out(tmp_path, fabricate, absent):
    fabricate.regression(tmp_path)
    fabricate.pretraining(tmp_path)
    fabricate.regression(tmp_path / "other")
    (tmp_path / "other" / "predictions.tsv").rename(tmp_path / "predictions.tsv")
    (tmp_path / absent).unlink()
    page = report(tmp_path)
    figures = {
        "metrics.csv": {"curves", "mechanics"},
        "distances.tsv": {"distances", "ordination"},
        "predictions.tsv": {"target"},
        "placements.tsv": {"placements"},
        "summary.json": set(),
    }
    everything = set().union(*figures.values())
    assert set(page.figures) == everything - figures[absent]
    assert ("summary.json is absent" in page.words) == (absent == "summary.json")


def test_the_memory_of_a_step_is_drawn(tmp_path, fabricate):
    fabricate.pretraining(tmp_path)
    assert "memory" not in report(tmp_path).figures
    (tmp_path / "memory.tsv").write_text("".join(MEMORY))
    page = report(tmp_path)
    assert page.figures["memory"]["alt"] == [
        "By stage, above what was there before: encode_asvs, backward 90.00 MB.",
        "What the peak is made of: weights 25.00 MB.",
        "By module: ASV stack 75.00 MB.",  # what is kept at the peak is not added once more
        "Kept for backward, a token a layer: cpu, recompute 512 B.",
    ]
    assert "for the memory that was free: 64 samples in 1 piece" in page.words


def test_an_empty_directory_gives_a_page(tmp_path):
    page = report(tmp_path)
    assert page.figures == {} and "summary.json is absent" in page.words


def test_a_path_that_is_no_directory_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: expected the directory of a run"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("summary.json", "{", "summary.json could not be read"),
        ("summary.json", "[1]", "expected a JSON object, got list"),
        ("metrics.csv", "step,value\n1,2\n", "column 'metric' is missing"),
        (
            "distances.tsv",
            "sample_a\tsample_b\ttrue\tpredicted\na\tb\t0.1\n",
            "line 2 has 3 fields",
        ),
        ("placements.tsv", "sequence\tnearest\nA\tC\n", "column 'edits' is missing"),
        ("predictions.tsv", "", ""),
        ("memory.tsv", "section\tname\npeak\tweights\n", "column 'part' is missing"),
        ("memory.tsv", MEMORY[0] + "peak\tp\tweights\tmany\t\n", "could not convert string"),
    ],
)
def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path, fabricate, name, content, reason):
    fabricate.pretraining(tmp_path)
    (tmp_path / name).write_text(content)
    page = report(tmp_path)
    assert reason in page.words
    assert len(page.figures) >= 2


def test_numbers_that_are_none_or_not_finite(tmp_path, fabricate):
    folder = fabricate.pretraining(
        tmp_path,
        results=[
            fabricate.result("Mantel r", float("nan"), {"Jaccard": 0.9}),
            fabricate.result("Distance MAE", None, {}),
            fabricate.result("accuracy", 0.5, {"majority": float("inf")}),
            fabricate.result("r2", -0.59, {"mean": -0.01}),
        ],
        colours=None,
        seconds=None,
        samples_train=None,
        data=None,
        warnings=None,
        config=None,
        target=None,
    )
    lines = (folder / "distances.tsv").read_text().splitlines()
    lines[1:4] = ["\t".join([*line.split("\t")[:3], "nan", "0"]) for line in lines[1:4]]
    (folder / "distances.tsv").write_text("\n".join(lines))
    with (folder / "metrics.csv").open("a") as file:
        file.write("401,12,train,loss,nan\n402,12,train,loss,inf\n402,12,train,count_loss,nan\n")
    page = report(folder)
    assert page.words.count("? not defined") == 2
    assert "no baseline" in page.words
    assert "worse than its mean (r2 −0.590)" in page.words
    assert "3 pairs without a finite number are left out" in page.words
    assert "3 values in metrics.csv are not finite numbers" in page.words
    assert "nan" not in re.sub(r"[a-z]nan|nan[a-z]", "", page.words.lower())


def test_user_strings_are_escaped(tmp_path, fabricate):
    bad = "<script>alert('1')</script>\"&$x^2$\u202e\x00</title></svg>"
    classes = (bad, "</style><img src=x onerror=alert(1)>")
    page = report(
        fabricate.classification(
            tmp_path,
            classes,
            bad,
            warnings=[bad],
            command=bad,
            data=[{"what": bad, "count": 3, "detail": bad, "kind": bad}],
            config={bad: bad, "nested": {"empty": {}, "list": [bad]}},
            results=[fabricate.result(bad, 0.5, {bad: 0.4}, True, bad)],
        )
    )
    assert "<script>alert('1')</script>" in page.words  # shown, not run
    assert "\x00" not in page.html and "\u202e" not in page.html
    assert {"confusion", "roc"} <= set(page.figures)


def test_dollars_are_not_formulas(tmp_path, fabricate):
    page = report(fabricate.classification(tmp_path, ("$a$ $", r"$\frac{$")))
    assert page.words.count("$a$ $") >= 2 and page.words.count(r"$\frac{$") >= 2


def test_ids_with_quotes_do_not_swallow_rows(tmp_path, fabricate):
    rows = [(f'"s{i}', "validation", i, i + 0.5) for i in range(20)]
    header = ["sample-id", "part", "true", "predicted"]
    fabricate.write_rows(tmp_path / "predictions.tsv", header, rows)
    assert "(20 validation)" in report(tmp_path).words


def test_a_large_run_stays_small_and_quick(tmp_path, fabricate):
    folder = fabricate.pretraining(tmp_path, samples=400)
    rng = np.random.default_rng(0)
    rows = [
        (step, 0, part, f"metric_{name}", rng.random())
        for step in range(3000)
        for part in ("train", "validation")
        for name in range(4)
    ]
    with (folder / "metrics.csv").open("a") as file:
        file.writelines(",".join(map(str, row)) + "\n" for row in rows)
    page = report(folder)
    assert page.size < 1_500_000
    assert "79,800 pairs" in page.words and "400 of them drawn" in page.words


def test_many_long_strings_stay_small(tmp_path, fabricate):
    page = report(
        fabricate.regression(
            tmp_path,
            warnings=["x" * 10_000] * 500,
            data=[{"what": "y" * 10_000, "count": 1, "kind": "cut"}] * 500,
            config={"ids": ["z"] * 100_000},
        )
    )
    assert "450 more in summary.json" in page.words and "300 more in summary.json" in page.words


def test_the_page_is_the_same_for_the_same_run(tmp_path, fabricate):
    folder = fabricate.classification(tmp_path)
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    assert sorted(p.name for p in folder.glob("*report*")) == ["report.html"]


def test_the_configuration_file_stands_in_for_the_summary(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"title": "Bare"}))
    (tmp_path / "config.toml").write_text("lr = 0.1 # <b>\n")
    page = report(tmp_path)
    assert "lr = 0.1 # <b>" in page.words
    assert "configuration" in page.ids


def test_a_full_disk_leaves_the_old_page(tmp_path, monkeypatch):
    page = write_report(tmp_path)
    before = page.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=r"report.html: cannot be written \(No space left"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert page.read_bytes() == before


def test_importing_the_room_is_light():
    code = "import sys, aam.report; print(sorted({'matplotlib', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
