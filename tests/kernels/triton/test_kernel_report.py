"""The kernel report: its figures, its file, and what it says when something has become worse."""

import json

import pytest
import torch

from aam_kernels._runtime import configurations
from aam_kernels._runtime.configurations import Configuration
from profiling import baselines, choose_configurations, kernel_report, shipped
from profiling.ahead_of_time import Resources
from profiling.choose_configurations import Case as Choice
from profiling.choose_configurations import Judged
from profiling.fake_driver import captured
from profiling.speed import Case, figures
from profiling.tunables import tunables
from tests.kernels.triton.interpreter import interpreting

ENTRY = {
    "dtype": "half", "width": 32, "length": 4096,
    "meta": {"BLOCK_ROWS": 64, "BLOCK_DIM": 32}, "options": {"num_warps": 4},
}  # fmt: skip


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """Tables with one entry and a report of their own."""
    folder = tmp_path / "tables"
    folder.mkdir()
    for name in configurations.ARCHITECTURES:
        content = {"pool_forward": [ENTRY]} if name == "gfx942" else {}
        (folder / f"{name}.json").write_text(json.dumps(content))
    monkeypatch.setenv("AAM_KERNELS_TABLES", str(folder))
    monkeypatch.setattr(choose_configurations, "TABLES", folder)
    monkeypatch.setattr(shipped, "REPORT", tmp_path / "report.json")
    caches = (configurations.load_table, configurations._lookup, shipped._takes_dropout)
    for cache in caches:
        cache.cache_clear()
    yield folder
    for cache in caches:
        cache.cache_clear()


def test_write_then_check(tables, capsys):
    assert kernel_report.main(["--check"]) == 1
    assert "pool_forward gfx942 half width 32 to 4096: missing" in capsys.readouterr().out
    assert kernel_report.main(["--write"]) == 0
    assert kernel_report.main(["--check"]) == 0
    assert "1 variants, 0 problems" in capsys.readouterr().out
    line = shipped.read()["pool_forward gfx942 half width 32 to 4096"]
    assert line["spills"] == 0 and line["architecture"] == "gfx942" and line["warps"] == 4
    assert kernel_report.main(["--write"]) == 0
    assert "1 variants are up to date, 0 have to be compiled" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fingerprint": "0" * 16}, "compiled from other source"),
        ({"fingerprint": "0" * 16, "registers": 3}, "registers, were 3"),
        ({"fingerprint": "0" * 16, "occupancy": 9.0}, "was 9"),
        ({"fingerprint": "0" * 16, "matrix": {"v_mfma": 2}}, "no matrix instructions any more"),
        ({"fingerprint": "0" * 16, "loads": {"16": 8}}, "were 16.0"),
        ({"spills": 2}, "2 spills"),
        ({"scratch": 8}, "8 bytes of scratch"),
        ({"shared": 65537}, "65537 bytes of shared memory, there are 65536"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_check_finds(tables, capsys, change, said):
    assert kernel_report.main(["--write"]) == 0
    report = shipped.read()
    (key,) = report
    report[key].update(change)
    shipped.write(report)
    assert kernel_report.main(["--check"]) == 1
    assert any(key in line and said in line for line in capsys.readouterr().out.splitlines())


def test_a_line_too_many(tables, capsys):
    kernel_report.main(["--write"])
    report = shipped.read()
    report["pool_forward gfx906 half width 32 to 4096"] = next(iter(report.values()))
    shipped.write(report)
    assert kernel_report.main(["--check"]) == 1
    assert "gfx906 half width 32 to 4096: no longer shipped" in capsys.readouterr().out


def test_the_fingerprint_follows_source_and_configuration(tables, monkeypatch):
    (variant,) = shipped.shipped()
    launch = variant.launch(compiling=False)
    before = shipped.fingerprint(launch)
    compiled = variant.launch()
    assert shipped.fingerprint(compiled) == before  # known without compiling
    text = shipped.source(launch.function)
    assert "def add_scores(" in text and "def sequence_rows(" in text
    assert "LOG2E: 1.44" in text and '"""' not in text
    warps = shipped.Shipped(
        "pool_forward", "gfx942", {**variant.entry, "options": {"num_warps": 8}}
    )
    assert shipped.fingerprint(warps.launch(compiling=False)) != before
    monkeypatch.setattr(shipped, "source", lambda function: text.replace("tl.exp2", "tl.exp"))
    assert shipped.fingerprint(launch) != before


# The speed table ------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "known"), [("gfx942", 3852), ("sm_90", 776)])
def test_a_known_figure(target, known):
    # What a plain flash-attention forward issues per 1,000 real pairs, known independently.
    case = Case(target, torch.bfloat16, 151, 32, False, False, "textbook")
    found = figures(case)
    assert found.cost.issue == pytest.approx(known, rel=0.03)
    assert found.bytes_ratio > 1
    issue, matrix, memory = found.roofline()
    thousands = 8192 * 4 * 151**2 / 1000
    clocks = {"gfx942": 228 * 4 * 2.1e9, "sm_90": 132 * 4 * 1.83e9}[target]
    assert issue == pytest.approx(found.cost.issue * thousands / clocks * 1e6)
    assert matrix < issue
    assert memory == pytest.approx({"gfx942": 243, "sm_90": 384}[target], rel=0.01)


def test_padding_counts_as_waste():
    def issued(length):
        case = Case("gfx942", torch.bfloat16, length, 32, False, False, "textbook")
        return figures(case).cost.issue

    assert issued(129) > 1.8 * issued(256)  # 3 of 4 blocks of keys, 2 of 2 of queries


def test_a_row_of_the_table():
    case = Case("gfx942", torch.bfloat16, 151, 32, False, False, "textbook")
    row = kernel_report.speed_row(figures(case))
    assert row[:6] == ("gfx942", "bf16", "151", "32", "forward", "textbook")
    assert len(row) == len(kernel_report.SPEED_HEAD)
    lines = kernel_report.table(kernel_report.SPEED_HEAD, [row]).splitlines()
    assert lines[0].index("dtype") == lines[1].index("bf16")


@pytest.mark.parametrize("flat", [False, True])
def test_the_baseline_is_attention(flat):
    lengths = torch.tensor([33, 7, 0, 40], dtype=torch.int32)
    query, key, value, grad = (torch.randn(4, 40, 32) for _ in range(4))
    mask = torch.arange(40) < lengths[:, None]
    blocks = baselines.Blocks(16, 32, 4)
    with interpreting():
        output, lse = baselines.forward(query, key, value, lengths, blocks, flat=flat)
        grads = baselines.backward(grad, query, key, value, output, lse, lengths, blocks, flat=flat)
    leaves = [x.double().requires_grad_() for x in (query, key, value)]
    scores = leaves[0] @ leaves[1].transpose(1, 2) * 32**-0.5
    weights = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1).nan_to_num()
    expected = weights @ leaves[2]
    assert torch.allclose(output.double(), expected, atol=1e-5)
    for found, wanted in zip(
        grads, torch.autograd.grad(expected, leaves, grad.double()), strict=True
    ):
        assert torch.allclose(found.double(), wanted.nan_to_num(), atol=1e-5)


# Choosing -------------------------------------------------------------------------------------

CASE = Choice("pool_forward", "gfx942", "half", 32, 256)


def judged(rows, issued, occupancy=4.0):
    used = dict.fromkeys(Resources.__dataclass_fields__, 0) | {"occupancy": occupancy}
    return Judged(
        Configuration({"BLOCK_ROWS": rows, "BLOCK_DIM": 32}, {}), issued, Resources(**used)
    )


def test_the_first_that_does_not_spill_or_the_cheapest(monkeypatch):
    verdicts = {
        32: "7 spills",
        64: judged(64, 10.0),
        128: judged(128, 9.0),
        256: judged(256, 9.0, 5),
    }
    candidates = [Configuration({"BLOCK_ROWS": rows}, {}) for rows in verdicts]
    tunable = configurations.Tunable(
        "pool_forward", (32,), (256,), lambda *case: candidates, lambda *case: lambda: None
    )
    monkeypatch.setattr(choose_configurations, "tunables", lambda: {"pool_forward": tunable})
    monkeypatch.setattr(
        choose_configurations, "judge", lambda case, chosen: verdicts[chosen.meta["BLOCK_ROWS"]]
    )
    found, refused = choose_configurations.best(CASE, exhaustive=False)
    assert found.chosen.meta["BLOCK_ROWS"] == 64
    assert len(refused) == 1 and "7 spills" in refused[0]
    found, _ = choose_configurations.best(CASE, exhaustive=True)
    assert found.chosen.meta["BLOCK_ROWS"] == 256  # as cheap as 128, and more warps fit


def test_a_candidate_is_judged_by_compiling():
    good = choose_configurations.judge(CASE, Configuration(ENTRY["meta"], ENTRY["options"]))
    assert good.issued > 0 and good.resources.spills == 0
    wrong = Configuration({"BLOCK_ROWS": 33, "BLOCK_DIM": 32}, {"num_warps": 4})
    assert "power of 2" in choose_configurations.judge(CASE, wrong)


def test_tables_are_pruned_and_written_in_order(tables):
    for length in (256, 1024, 4096):
        case = Choice("pool_forward", "gfx942", "half", 32, length)
        rows = 32 if length == 256 else 64
        chosen = Configuration({**ENTRY["meta"], "BLOCK_ROWS": rows}, {"num_warps": 4})
        choose_configurations.update_table(case, chosen)
    configurations.load_table.cache_clear()
    entries = configurations.load_table("gfx942")["pool_forward"]
    assert [(x["length"], x["meta"]["BLOCK_ROWS"]) for x in entries] == [(256, 32), (4096, 64)]
    text = (tables / "gfx942.json").read_text()
    assert len(text.splitlines()) == 6  # an entry a line
    choose_configurations.update_table(CASE, None)
    configurations.load_table.cache_clear()
    assert len(configurations.load_table("gfx942")["pool_forward"]) == 1


def test_dropout_can_be_asked_of_any_launch():
    tunable = tunables()["short_forward"]
    for wanted in (True, False):
        with captured("gfx942", compiling=False, dropout=wanted) as launches:
            tunable.example(torch.bfloat16, 32, 160, torch.device("meta"))()
        assert launches[0].constants["DROPOUT"] is wanted
        # Without dropout the launcher passes the offsets: Triton 3.3 takes no None in a tuple.
        assert launches[0].signature["seed_ptr"] == ("*i64" if wanted else "*i32")


def test_tensors_over_two_gibibytes_are_compiled_another_way():
    tunable = tunables()["short_forward"]
    attributes = []
    for large in (False, True):
        with captured("gfx942", compiling=False, large=large) as launches:
            tunable.example(torch.bfloat16, 32, 160, torch.device("meta"))()
        attributes.append(launches[0].attributes["query_ptr"])
    assert attributes == [("tt.divisibility=16", "tt.pointer_range=32"), ("tt.divisibility=16",)]
