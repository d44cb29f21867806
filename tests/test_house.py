"""The house rules: layout, floors, light imports, and commands that exist."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path
    for folder in ("aam", "aam_kernels", "benchmarks", "docs", "profiling", "tests")
    for path in (ROOT / folder).rglob("*.py")
)
TOP_LEVEL = {
    "LICENSE", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "pyproject.toml",
    "constraints-dev.txt", "CMakeLists.txt", "aam", "aam_kernels", "benchmarks", "tests",
    "profiling", "docs", "deploy", ".ci", ".gitignore", ".pre-commit-config.yaml",
}  # fmt: skip
HEAVY = (
    "skbio", "sklearn", "matplotlib", "tensorboard", "biom", "pandas", "transformers",
)  # fmt: skip


def imported_by(statement: str) -> set[str]:
    """Names in sys.modules after `statement` ran in a fresh interpreter."""
    code = f"{statement}; import sys; print('\\n'.join(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_floors_are_kept():
    from importlinter.cli import lint_imports

    exit_code = lint_imports(str(ROOT / "pyproject.toml"), no_cache=True)
    assert exit_code == 0, "an import runs up or sideways: see the captured output"


def test_top_level_holds_what_the_house_lists():
    listing = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    found = {line.split("/")[0] for line in listing.stdout.splitlines()}
    assert found <= TOP_LEVEL, f"not in the house: {sorted(found - TOP_LEVEL)}"


def test_the_readme_begins_with_commands_that_exist():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert [line.split("#")[0].strip() for line in lines[1:3]] == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    documented = re.findall(
        r"\bmake ([a-z]+(?:-[a-z]+)*)\b",
        (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text(),
    )
    for target in set(documented):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target} does not exist"


def test_relative_links_of_the_documentation_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")]:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.relative_to(ROOT)} links to {link}"


def test_no_file_and_no_function_of_aam_is_too_long():
    long = set()
    for path in SOURCES:
        text, name = path.read_text(), str(path.relative_to(ROOT))
        if len(text.splitlines()) > (400 if name.startswith("aam/") else 450):
            long.add(name)
        functions = [one for one in ast.walk(ast.parse(text)) if isinstance(one, ast.FunctionDef)]
        for one in functions if name.startswith("aam/") else ():
            if one.end_lineno - one.lineno >= 60:
                long.add(f"{name}:{one.name}")
    assert not long


def test_no_import_cycle_not_even_a_lazy_one():
    graph = grimp.build_graph("aam", exclude_type_checking_imports=True, cache_dir=None)
    edges = {one: graph.find_modules_directly_imported_by(one) for one in graph.modules}
    graphlib.TopologicalSorter(edges).prepare()  # raises CycleError, which names the modules


@pytest.mark.parametrize("modules", ["aam.train, aam.data", "aam_kernels"])
def test_imports_stay_light_and_the_kernels_do_not_know_the_trainer(modules):
    loaded = {name.split(".")[0] for name in imported_by(f"import {modules}")}
    assert not loaded & set(HEAVY)
    assert ("aam" in loaded) == modules.startswith("aam.")
