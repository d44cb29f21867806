"""Attention All Microbes: train transformers on microbiome feature tables.

`pretrain`, `finetune` and `load` are the Python interface, described in ``docs/guide/python.md``.
What they need is imported when they are called.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from aam.errors import InputError

__version__ = "0.1.0"
__all__ = ["InputError", "finetune", "load", "pretrain"]


def pretrain(**options: Any) -> Path:
    """Run `aam pretrain` with its options as keywords; returns the folder of the run."""
    return _run("pretrain", options)


def finetune(**options: Any) -> Path:
    """Run `aam finetune` with its options as keywords; returns the folder of the run."""
    return _run("finetune", options)


def _run(command: str, options: dict[str, Any]) -> Path:
    config = importlib.import_module("aam.config").from_options(command, **options)
    return getattr(importlib.import_module(f"aam.commands.{command}"), command)(config)


def load(run: str | Path, **where: Any) -> Any:
    """The trained `aam.evaluation.loaded.Model` of a run's folder, for example on device="cuda"."""
    return importlib.import_module("aam.evaluation.loaded").load(run, **where)
