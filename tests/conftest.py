"""Fixtures shared by all tests: real data and system tools, skipped with a reason where absent."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from aam.data.simulate import DemoFiles, simulate_community

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real data sets: ``$AAM_DATA``, else ``../shared/data``."""
    folder = Path(os.environ.get("AAM_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "ibd" / "table.biom").is_file():
        pytest.skip(f"no real data in {folder} (set AAM_DATA to the folder that holds ibd/)")
    return folder


@pytest.fixture(scope="session")
def require_tool() -> Callable[[str], str]:
    """Return a function that gives a system tool's path, or skips the test.

    With AAM_REQUIRE_TOOLS set, as `.ci/run` does, a missing tool fails the test instead.
    """

    def find(name: str) -> str:
        path = shutil.which(name)
        if path is None:
            missing = pytest.fail if os.environ.get("AAM_REQUIRE_TOOLS") else pytest.skip
            missing(f"needs the system tool {name!r}, which is not installed")
        return path

    return find


@pytest.fixture(scope="session")
def community(tmp_path_factory) -> DemoFiles:
    """Return the files of a simulated community: 24 samples of 8 subjects, 44 ASVs of 30 bases."""
    folder = tmp_path_factory.mktemp("community")
    return simulate_community(
        folder, samples=24, asvs=60, asvs_per_sample=10, sequence_length=30, seed=0
    )


TINY_MODEL = [
    "--num-layers", "1", "--embedding-dim", "32", "--num-heads", "2", "--rarefy-depth", "0",
    "--no-tensorboard",
]  # fmt: skip
TINY = [*TINY_MODEL, "--batch-size", "4"]


@pytest.fixture(scope="session")
def aam(community) -> Callable[..., int]:
    """Return a function that runs a command of `aam` on the community, in this process.

    Training commands get a tiny model and, unless told otherwise, the community's files; their
    report and baselines (seconds each, tested elsewhere) are left out.
    """
    from aam.train import main

    def run(
        command: str,
        *words: object,
        files: bool = True,
        complete: bool = False,
        filling: bool = False,
    ) -> int:
        arguments = [command]
        if command in ("pretrain", "finetune"):
            arguments += TINY_MODEL if filling else TINY
        if files and command != "demo":
            arguments += ["--table", str(community.table)]
            teaches = {"--distance", "--unifrac-matrix"} & set(map(str, words))
            arguments += {
                "pretrain": [] if teaches else ["--tree", str(community.tree)],
                "finetune": ["--metadata", str(community.metadata)],
            }.get(command, [])
        arguments += map(str, words)
        if "--resume-from" in arguments and not files:
            arguments = [command, *map(str, words)]
        with pytest.MonkeyPatch.context() as patch:
            if not complete:
                patch.setattr("aam.report.write_report", lambda folder: folder / "report.html")
                patch.setattr("aam.evaluation.baselines.target_baselines", lambda *_, **__: {})
                patch.setattr("aam.evaluation.baselines.distance_baselines", lambda *_, **__: {})
            return main(arguments)

    return run
