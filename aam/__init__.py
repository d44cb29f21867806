"""Attention All Microbes: train transformers on microbiome feature tables.

`load`, `pretrain` and `finetune` are the Python interface, described in ``docs/guide/python.md``.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

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


def __getattr__(name: str) -> Any:
    """Import what is used, when it is used."""
    places = {"load": "aam.evaluation.loaded", "InputError": "aam.errors"}
    if name not in places:
        raise AttributeError(f"module 'aam' has no attribute {name!r}")
    return getattr(importlib.import_module(places[name]), name)
