"""The next batch, prepared in a thread while a step computes."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map

from aam.data.dataset import AsvBatch, AsvDataset, Batch, SampleDataset


class Prefetch:
    """Batches of a dataset by rows and seed: begun in a thread, taken when they are needed.

    A batch is a function of (rows, seed) alone: one that was not begun, or not so, is made when it
    is taken. Where a GPU takes it, it lies in pinned memory and is copied without waiting.
    """

    def __init__(self, dataset: SampleDataset | AsvDataset, device: torch.device) -> None:
        self.dataset, self.device = dataset, device
        self._thread = ThreadPoolExecutor(1, "next batch")
        self._begun: dict[int, tuple[np.ndarray, Future[Any]]] = {}

    def begin(self, rows: np.ndarray, seed: int) -> None:
        """Begin to make a batch, unless it is begun; all but the last two are forgotten."""
        if seed not in self._begun or not np.array_equal(self._begun[seed][0], rows):
            self._begun[seed] = rows, self._thread.submit(self._make, rows, seed)
        for old in list(self._begun)[:-2]:
            del self._begun[old]

    def take(self, rows: np.ndarray, seed: int) -> Batch | AsvBatch:
        """The batch on the device; taken again, it is the same."""
        begun = self._begun.get(seed)
        if begun is None or not np.array_equal(begun[0], rows):
            return self._make(rows, seed).to(self.device)
        return begun[1].result().to(self.device)

    def close(self) -> None:
        """Forget what was begun."""
        self._thread.shutdown(cancel_futures=True)
        self._begun.clear()

    def _make(self, rows: np.ndarray, seed: int) -> Any:
        batch = self.dataset.batch(rows, generator=torch.Generator().manual_seed(seed))
        if self.device.type != "cuda":
            return batch
        pinned = {one.name: tree_map(_pin, getattr(batch, one.name)) for one in fields(batch)}
        return replace(batch, **pinned)


def _pin(value: Any) -> Any:
    movable = isinstance(value, torch.Tensor) and value.device.type == "cpu"
    return value.pin_memory() if movable else value
