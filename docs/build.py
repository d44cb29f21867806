"""Build the documentation: the guide's pages, and a reference from the code's own docstrings.

`python docs/build.py [OUTPUT]` writes a static site that needs no network. pdoc renders the
Markdown and the reference; the options of a command come from the classes of `aam.config`.
"""

from __future__ import annotations

import html
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

import pdoc
from pdoc.render_helpers import to_html

from aam.config import CONFIGS, flag, options_of

ROOT = Path(__file__).parent.parent
GUIDE = [
    "inspect", "pretrain", "finetune", "predict", "evaluate", "unifrac", "embed", "demo",
    "python", "batches-and-memory", "memory-profile", "several-devices", "files", "glossary",
    "troubleshooting",
    "other-models", "verification",
]  # fmt: skip
PAGES = {
    ROOT / "README.md": ("Start", "index.html"),
    **{
        ROOT / f"docs/guide/{name}.md": (name.replace("-", " ").capitalize(), f"guide/{name}.html")
        for name in GUIDE
    },
    ROOT / "benchmarks/README.md": ("Numbers", "guide/benchmarks.html"),
    ROOT / "aam_kernels/README.md": ("Kernels", "guide/kernels.html"),
    ROOT / "CONTRIBUTING.md": ("Contributing", "contributing.html"),
    ROOT / "CHANGELOG.md": ("Changelog", "changelog.html"),
}
REFERENCE = ("aam_kernels", "aam")
STYLE = """
body { margin: 0; font: 16px/1.6 system-ui, sans-serif; color: #1f2933; display: flex }
nav { flex: 0 0 11rem; padding: 2rem 1rem 2rem 1.5rem; background: #f4f6f8; min-height: 100vh }
nav a { display: block; padding: .15rem 0; color: #334e68; text-decoration: none }
nav a[aria-current] { font-weight: 600; color: #2a6f97 }
main { flex: 1; min-width: 0; max-width: 52rem; padding: 2rem 2.5rem }
a { color: #2a6f97 } h1, h2, h3 { line-height: 1.25 } h2 { margin-top: 2.2rem }
pre { background: #f4f6f8; padding: .8rem 1rem; overflow-x: auto; border-radius: 4px }
code { font-size: .9em } table { border-collapse: collapse; display: block; overflow-x: auto }
td, th { border: 1px solid #d9e2ec; padding: .35rem .6rem; text-align: left; vertical-align: top }
@media (max-width: 50rem) { body { display: block } nav { min-height: 0; columns: 2 } }
"""


def build(output: Path) -> None:
    """Write the whole site, replacing what an earlier build left."""
    if output.exists():
        shutil.rmtree(output)
    # Names that a generated __init__ cannot resolve are shown as written, which is all we need.
    warnings.filterwarnings("ignore", module=r"pdoc\.doc_types")
    pdoc.render.configure(docformat="google", search=True, show_source=False)
    pdoc.pdoc(*REFERENCE, output_directory=output / "reference")
    options = command_options()
    for source, (title, target) in PAGES.items():
        if not source.exists():
            print(f"not there yet: {source.relative_to(ROOT)}", file=sys.stderr)
            continue
        text = source.read_text(encoding="utf-8")
        if source.stem in options and source.parent.name == "guide":
            text += options[source.stem]
        path = output / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(title, target, relink(to_html(text), source, target)), "utf-8")


def page(title: str, target: str, body: str) -> str:
    """One page with the list of all pages beside it."""
    links = [
        f'<a href="{relative(other, target)}"{" aria-current=page" if other == target else ""}>'
        f"{html.escape(name)}</a>"
        for source, (name, other) in PAGES.items()
        if source.exists()
    ]
    links.append(f'<a href="{relative("reference/index.html", target)}">Reference</a>')
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)} - Attention All Microbes</title><style>{STYLE}</style>"
        f"<nav>{''.join(links)}</nav><main>{body}</main></html>\n"
    )


def relative(target: str, page_path: str) -> str:
    """Link from one page of the site to another."""
    return os.path.relpath(target, Path(page_path).parent)


def relink(body: str, source: Path, target: str) -> str:
    """Point links between Markdown files at the pages made of them."""

    def replace(match: re.Match[str]) -> str:
        linked = (source.parent / match[1]).resolve()
        known = PAGES.get(linked)
        return f'href="{relative(known[1], target)}"' if known else match[0]

    return re.sub(r'href="([^":#]+\.md)"', replace, body)


def command_options() -> dict[str, str]:
    """A Markdown table of options for each command."""
    tables = {}
    for command, config_class in CONFIGS.items():
        rows = ["\n", "## Options", "", "| option | default | |", "|---|---|---|"]
        for one in options_of(config_class).values():
            default = "required" if one.required else f"`{one.default}`"
            values = f" One of {', '.join(one.schema['enum'])}." if "enum" in one.schema else ""
            rows.append(f"| `{flag(one.name)}` | {default} | {one.help}{values} |")
        tables[command] = "\n".join([*rows, ""])
    return tables


if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else "site"))
