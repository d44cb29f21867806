"""The page holds what the run directory holds, says so in words, and never breaks."""

import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from scipy.spatial import procrustes
from scipy.spatial.distance import squareform

from aam.errors import InputError
from aam.evaluation.results import NAMES
from aam.report import write_report
from aam.report.figures import METRICS, principal_coordinates
from aam.report.results import SENTENCES, number, read_results


class Page:
    """A page, parsed strictly: balanced elements, everything escaped, ids once."""

    def __init__(self, path):
        self.html = path.read_text(encoding="utf-8")
        root = ElementTree.fromstring(self.html)
        root.find("head").remove(root.find("head/style"))
        self.words = " ".join(" ".join(root.itertext()).split())
        self.elements = list(root.iter())
        self.ids = [one.get("id") for one in self.elements if one.get("id")]
        assert len(self.ids) == len(set(self.ids)), "an id occurs twice"
        self.figures = {
            one.get("id"): [svg.get("aria-label") for svg in one.iter("svg")]
            for one in root.iter("figure")
        }
        for figure in root.iter("figure"):
            assert figure.find("figcaption").text
            for svg in figure.iter("svg"):
                assert svg.get("role") == "img" and len(svg.get("aria-label")) > 10
                assert len([*svg.iter("path"), *svg.iter("use")]) > 5


def report(folder):
    path = write_report(folder)
    assert path == folder / "report.html" and path.stat().st_size < 2_000_000
    page = Page(path)
    for one in page.elements:
        assert one.tag not in (
            "script",
            "link",
            "img",
            "image",
            "iframe",
            "object",
            "embed",
            "base",
        )
        for name, value in one.items():
            assert not name.startswith("on"), (one.tag, name)
            if "href" in name or name == "src":
                assert value.startswith("#") and value[1:] in page.ids, (one.tag, value)
    assert set(re.findall(r"url\((.)", page.html)) <= {"#"}
    assert "@import" not in page.html and "http://" not in page.html
    assert "default-src 'none'" in page.html
    return page


def test_pretraining_shows_verdicts_distances_ordination_and_curves(tmp_path, fabricate):
    page = report(fabricate.pretraining(tmp_path))
    assert list(page.figures) == ["distances", "placements", "ordination", "curves", "mechanics"]
    for name, alt in zip(("True", "Predicted"), page.figures["ordination"], strict=True):
        assert alt == f"{name} distances (PCoA): map of 60 samples on two axes."
    assert len(page.figures["curves"]) == 5
    for said in (
        "1,770 pairs of 60 validation samples",
        "Orange: 90 pairs within a group",
        "Better than every baseline in 6 of 8 comparisons.",
        "better than placement by 0.038",
        "worse than placement by 0.0070",
        "0.000095 = equal to placement",
        "off by 0.0041 on average: better than the best baseline (placement, 0.0058)",
        "clades of ASVs not in training agree to 90.2 % (mean Jaccard)",
        "More than 6 edits from any known ASV, predicted and true clades agree to 79.7 %",
        "83.6 % of the masked nucleotides of ASVs not in training",
        "are nearest-neighbour placement",
        "placement 0.900",  # the legend of the curve of Mantel r
        "Bray-Curtis 0.710",
        "constant –",
        "20 min 34 s",
        "2,345,678",
        "2 of 3 entries are about something dropped or cut",
        "model.dim 128",
        "lr 0.0006",
        "resume_from –",
    ):
        assert said in page.words, said
    pairs = pd.read_csv(tmp_path / "distances.tsv", sep="\t")
    maps = (principal_coordinates(squareform(pairs[name]))[0] for name in ("true", "predicted"))
    assert f"Procrustes correlation {np.sqrt(1 - procrustes(*maps)[2]):.3f};" in page.words
    assert "warnings" not in page.ids
    assert page.html.index("below the rarefaction depth") < page.html.index("samples read")


def test_memberships_by_distance_are_means_of_their_bins(tmp_path, fabricate):
    fabricate.pretraining(
        tmp_path, samples_train=None, samples_validation=None,
        sequences_train=9000, sequences_validation=1000,
    )  # fmt: skip
    (tmp_path / "distances.tsv").unlink()
    page = report(tmp_path)
    assert "training sequences 9,000 left-out sequences 1,000" in page.words
    assert "training samples" not in page.words and next(iter(page.figures)) == "placements"
    edits, _, jaccard, nearest = pd.read_csv(tmp_path / "placements.tsv", sep="\t").to_numpy().T
    alt = page.figures["placements"]
    for label, low, high in (("1", -1, 1), ("3–4", 3, 4), ("10+", 10, np.inf)):
        own = (edits >= low - 0.5) & (edits < high + 0.5) | (edits == high)
        found = f"{label} edits: {jaccard[own].mean():.3f}, {nearest[own].mean():.3f}"
        assert found in alt[0]
        assert f"{label} {own.sum()} " in page.words
    ranked = np.sort(jaccard)  # the support of the fabricated run has the same order
    low, high = ranked[:20].mean(), ranked[-20:].mean()
    assert f"by support: {low:.3f} where" in alt[1] and f", {high:.3f} where" in alt[1]
    assert "200 ASVs that the model was not trained on" in page.words


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        ("classification", ["UC", "<b>$", ""], "classes of diagnosis."),
        ("regression", ["20", "5.5", "", "61"],
         "diagnosis, from 5.500 (violet) to 61.00 (yellow); grey"),
        ("regression", [""], "the same colour in both"),
    ],
)  # fmt: skip
def test_a_metadata_column_colours_the_ordination(tmp_path, fabricate, kind, values, said):
    named = {f"2538.{1000100 + i}": values[i % len(values)] for i in range(12)}
    colours = {"column": "diagnosis", "kind": kind, "values": named}
    page = report(fabricate.pretraining(tmp_path, samples=12, colours=colours))
    assert said in page.words
    assert page.words.count("other or missing") == 2 * (kind == "classification")


def test_principal_coordinates_give_euclidean_distances_back():
    points = np.random.default_rng(0).normal(size=(20, 2)) * [3, 1]
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    found, share = principal_coordinates(distances)
    again = np.linalg.norm(found[:, None] - found[None], axis=-1)
    np.testing.assert_allclose(again, distances, atol=1e-9)
    assert share == pytest.approx(1.0)


def test_distances_that_hardly_differ_earn_a_warning(tmp_path, fabricate):
    fabricate.pretraining(tmp_path, samples=12, warnings=["Subjects leak."])
    assert "hardly differ" not in report(tmp_path).words
    pairs = pd.read_csv(tmp_path / "distances.tsv", sep="\t")
    pairs["true"], pairs["same_group"] = np.arange(len(pairs)) % 2, ""
    fabricate.write_table(tmp_path / "distances.tsv", pairs.assign(predicted=0.0).to_dict("list"))
    page = report(tmp_path)
    said = "their spread is 0.000, that of the true ones 0.500."
    assert f"2 warnings Subjects leak. Predicted distances hardly differ: {said}" in page.words
    assert page.html.index('id="warnings"') < page.html.index('id="results"')
    assert "distances" in page.figures and "ordination" not in page.figures


def test_every_metric_that_is_listed_has_a_sentence_and_a_name_of_its_own():
    assert set(SENTENCES) == set(NAMES.values())
    assert {*METRICS.items()} < {*NAMES.items()}


def test_regression_shows_scatter_and_verdicts(tmp_path, fabricate):
    page = report(fabricate.regression(tmp_path))
    assert list(page.figures) == ["target", "curves"]
    assert "Better than every baseline in 0 of 2 comparisons." in page.words
    assert "The model explains 43.1 % of the variance of age: worse than the best baseline" in (
        page.words
    )
    assert "off by 5.910 on average" in page.words and "190 train, 60 validation" in page.words
    errors = pd.read_csv(tmp_path / "predictions.tsv", sep="\t", quoting=3)[:60]
    middle = (errors["predicted"] - errors["true"]).median()
    assert f"Errors of age: median {number(middle)}," in page.figures["target"][1]


def test_two_classes_show_confusion_and_roc(tmp_path, fabricate):
    page = report(fabricate.classification(tmp_path))
    assert list(page.figures) == ["target", "curves"]
    assert "= equal to random forest" in page.words and "? not defined" in page.words
    from sklearn.metrics import roc_auc_score

    rows = pd.read_csv(tmp_path / "predictions.tsv", sep="\t")[:80]
    area = roc_auc_score(rows["true"] == "Crohns", rows["probability_Crohns"])
    assert f"ROC curve, area {area:.3f}." in page.figures["target"]
    right = (rows["true"] == rows["predicted"]).sum()
    assert f"80 samples (validation); {right} of them right" in page.words


@pytest.mark.parametrize("count", [3, 30])
def test_many_classes_show_a_confusion_matrix(tmp_path, fabricate, count):
    classes = tuple(f"a rather long class name that ends in {i}" for i in range(count))
    page = report(fabricate.classification(tmp_path, classes, "body site"))
    assert len(page.figures["target"]) == 1
    assert ("The 19 most frequent classes are told apart" in page.words) == (count == 30)


MEMORY = [
    "section\tname\tpart\tbytes\tdetail\n",
    "stage\tencode_asvs\tbackward\t90000000\t\n",
    "peak\tencode_asvs, backward\tweights\t25000000\t\n",
    "module\tASV stack\tweights\t25000000\t\n",
    "module\tASV stack\tkept for backward\t50000000\t\n",
    "module\tASV stack\tkept for backward, at the peak\t50000000\t\n",
    "batch\t64 samples\t1 piece\t90000000\trecommended; of 0.10 GB\n",
]


def test_the_memory_of_a_step_is_drawn(tmp_path):
    (tmp_path / "memory.tsv").write_text("".join(MEMORY))
    page = report(tmp_path)
    assert page.figures["memory"] == [
        "By stage, above what was there before: encode_asvs, backward 90.00 MB.",
        "What the peak is made of: weights 25.00 MB.",
        "By module: ASV stack 75.00 MB.",  # what is kept at the peak is not added once more
    ]
    assert "for the memory that was free: 64 samples in 1 piece" in page.words
    (tmp_path / "memory.tsv").write_text("".join(MEMORY[:2]))  # sections may be absent
    assert len(report(tmp_path).figures["memory"]) == 1
    code = "from aam.report.memory_figure import main; main()"
    command = [sys.executable, "-c", code, str(tmp_path / "memory.tsv")]
    svg = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "encode_asvs, backward" in svg and svg.rstrip().endswith("</svg>")


def test_what_is_absent_is_left_out(tmp_path, fabricate):
    fabricate.regression(tmp_path)
    fabricate.pretraining(tmp_path, samples=12)
    expected = {"distances", "ordination", "placements", "target", "curves", "mechanics"}
    for absent, figures in (
        ("", set()),
        ("placements.tsv", {"placements"}),
        ("summary.json", set()),
        ("metrics.csv", {"curves", "mechanics"}),
        ("distances.tsv", {"distances", "ordination"}),
        ("predictions.tsv", {"target"}),
    ):
        if absent:
            (tmp_path / absent).unlink()
        expected -= figures
        page = report(tmp_path)
        assert set(page.figures) == expected, absent
        without = "summary.json is absent" in page.words
        assert without == (not (tmp_path / "summary.json").exists())
    with pytest.raises(InputError, match=r"nowhere: expected the directory of a run"):
        write_report(tmp_path / "nowhere")


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path, fabricate):
    fabricate.pretraining(tmp_path, samples=12)
    for name, content, reason in (
        ("summary.json", "{", "summary.json could not be read and is left out: Expecting"),
        ("metrics.csv", "step,value\n1,2\n", "column 'metric' is missing"),
        ("distances.tsv", "sample_a\tsample_b\ttrue\tpredicted\tsame_group\na\tb\t0.1\n",
         "distances.tsv: 1 rows hold a number that is not finite"),
        ("predictions.tsv", "", "predictions.tsv could not be read"),
        ("memory.tsv", MEMORY[0] + "peak\tp\tweights\tmany\t\n", "memory.tsv: 1 rows hold"),
    ):  # fmt: skip
        (tmp_path / name).write_text(content)
        assert reason in report(tmp_path).words
    assert list(report(tmp_path).figures) == ["placements"]


def test_numbers_that_are_none_or_not_finite(tmp_path, fabricate):
    results = [
        fabricate.result("Mantel r", float("nan"), {"Jaccard": 0.9}),
        fabricate.result("distance MAE", None, {}),
        fabricate.result("accuracy", 0.5, {"majority": float("inf")}),
        fabricate.result("R2", -0.59, {"mean": -0.01}),
    ]
    unknown = ("colours", "seconds", "samples_train", "data", "warnings", "config", "target")
    folder = fabricate.pretraining(tmp_path, results=results, **dict.fromkeys(unknown))
    lines = (folder / "distances.tsv").read_text().splitlines()
    lines[1:4] = ["\t".join([*line.split("\t")[:3], "nan", "0"]) for line in lines[1:4]]
    (folder / "distances.tsv").write_text("\n".join(lines))
    with (folder / "metrics.csv").open("a") as file:
        file.write("401,12,loss,train,nan\n402,12,loss,train,inf\n402,12,count_loss,train,nan\n")
    page = report(folder)
    assert page.words.count("? not defined") == 2
    assert "no baseline" in page.words
    assert "worse than its mean (r2 −0.590)" in page.words
    for name in ("distances.tsv", "metrics.csv"):
        assert f"{name}: 3 rows hold a number that is not finite and are left out" in page.words
    assert "nan" not in re.sub(r"[a-z]nan|nan[a-z]", "", page.words.lower())


def test_user_strings_are_escaped(tmp_path, fabricate):
    bad = "<script>alert('1')</script>\"&$x^2$\u202e\x00</title></svg>{{ 1 }}{0}#1f6fb2"
    classes = (bad, "</style><img src=x onerror=alert(1)>", r"$a$ $\frac{$")
    page = report(
        fabricate.classification(
            tmp_path,
            classes,
            bad,
            warnings=[bad],
            command=bad,
            data=[{"what": bad, "count": 3, "detail": bad, "kind": bad}],
            config={bad: bad, "nested": {"empty": {}, "list": [bad]}},
            results=[fabricate.result(bad, 0.5, {bad: 0.4})],
        )
    )
    assert "<script>alert('1')</script>" in page.words  # shown, not run
    assert page.words.count("{{ 1 }}{0}#1f6fb2") > 5
    assert page.words.count(r"$a$ $\frac{$") >= 2  # no formula
    assert "\x00" not in page.html and "\u202e" not in page.html


def test_a_large_run_stays_small(tmp_path, fabricate):
    folder = fabricate.pretraining(
        tmp_path,
        samples=400,
        warnings=["x" * 10_000] * 500,
        data=[{"what": "y" * 10_000, "count": 1, "kind": "cut"}] * 500,
        config={"ids": ["z"] * 100_000},
    )
    with (folder / "metrics.csv").open("a") as file:
        for step in range(3000):
            for part in ("train", "validation"):
                file.write(f"{step},0,another_metric,{part},{step % 7}\n")
    page = report(folder)
    assert "79,800 pairs" in page.words and "at most 1,500 pairs of a colour" in page.words
    assert "450 more in summary.json" in page.words and "300 more in summary.json" in page.words


def test_the_page_is_the_same_for_the_same_run(tmp_path, fabricate):
    folder = fabricate.classification(tmp_path)
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    assert sorted(p.name for p in folder.glob("*report*")) == ["report.html"]


def test_importing_the_room_is_light():
    code = "import sys, aam.report; print(sorted({'matplotlib', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.93812, "0.938"), (-0.5872, "−0.587"), (5.91, "5.910"), (42.0, "42.00"), (42, "42"),
        (123.45, "123.5"), (2345678, "2,345,678"), (12345.6, "12,346"), (0, "0"), (0.0, "0.000"),
        (3.2e-6, "3.2e-06"), (9.5e-5, "0.000095"), (-0.00408, "−0.0041"), (0.0123, "0.012"),
        (None, "–"), (float("nan"), "–"),
    ],
)  # fmt: skip
def test_numbers_for_people(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "higher", "baselines", "verdict"),
    [
        (0.9, True, {"a": 0.8, "b": 0.7}, "better"),
        (0.75, True, {"a": 0.8, "b": 0.7}, "worse"),
        (0.75, False, {"a": 0.8, "b": 0.7}, "worse"),
        (0.6, False, {"a": 0.8, "b": None}, "better"),
        (0.8001, True, {"a": 0.8}, "equal"),
        (0.998, True, {"a": 0.997}, "better"),
        (0.0003, False, {"a": 0.0002}, "worse"),
        (5.91, False, {"a": 5.95}, "equal"),
        (0.9, True, {"a": None}, "no baseline"),
        (None, True, {"a": 0.8}, "undefined"),
    ],
)
def test_verdict_is_against_the_best_baseline(fabricate, value, higher, baselines, verdict):
    entry = fabricate.result("x", value, baselines, higher)
    assert read_results({"results": [entry]})[0].verdict == verdict
