"""Newick without an object a node: a tree of a million tips in seconds.

Every node ends at the ``,``, ``)`` or ``;`` behind it, and nodes end in post-order. So the tree is
where these characters stand and how deep: whole arrays are looked at, node by node never.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aam.data.texts import Texts

_OPEN, _CLOSE, _COMMA, _COLON, _END, _QUOTE = b"(),:;'"
_BLOCK = 2**22
_LONGEST_NUMBER = 48
_MARK, _ODD = 1, 2
_KIND = np.zeros(256, dtype=np.uint8)
_KIND[list(b"(),:;'")] = _MARK
_KIND[[*range(33), *b"[]", *range(127, 256)]] = _ODD


class NewickArrays(NamedTuple):
    """A tree in post-order; the attributes are those of `Phylogeny`."""

    tip_names: Texts
    parent: NDArray[np.int64]
    length: NDArray[np.float64]
    tip_start: NDArray[np.int64]
    tip_stop: NDArray[np.int64]


def parse_newick(text: NDArray[np.uint8]) -> NewickArrays | None:
    """Parse a plain tree: one, whole, every tip named, every branch with a finite length >= 0.

    Args:
        text: ``(bytes,)`` uint8, the file; it may be memory-mapped, and tip names stay in it.

    Returns:
        The arrays, or None where the text is not so plain (comments, white space, quoted tips,
        other than ASCII, any mistake): a general parser must look at it.
    """
    marks = _marks(text)
    if marks is None or len(marks) == 0:
        return None
    kinds = text[marks]
    if kinds[-1] != _END or np.count_nonzero(kinds == _END) > 1:  # ends in a quote, or two trees
        return None
    is_colon = kinds == _COLON
    if (is_colon[1:] & is_colon[:-1]).any() or is_colon[-1]:
        return None
    # Ends of nodes, and opening brackets; a colon belongs to the one behind it.
    at = np.flatnonzero(~is_colon)
    ends, kinds = marks[at], kinds[at]
    before = np.append(-1, ends[:-1])
    colon = np.where(is_colon[at - 1] & (at > 0), marks[at - 1], ends)
    opens, closes = kinds == _OPEN, kinds == _CLOSE
    depth = np.cumsum(opens) - np.cumsum(closes) + closes  # before a ')', after a '('
    before_kind = np.append(_OPEN, kinds[:-1])
    if (
        (depth[:-1] < 1).any()
        or depth[-1] != 0
        or (ends[opens] - before[opens] > 1).any()
        or (before_kind[opens] == _CLOSE).any()
    ):
        return None
    node = np.flatnonzero(~opens)
    is_tip = before_kind[node] != _CLOSE
    tip_stop = np.cumsum(is_tip)
    names = Texts(text, before[node[is_tip]] + 1, colon[node[is_tip]])
    length = _lengths(text, colon[node[:-1]] + 1, ends[node[:-1]])
    if length is None or not _usable(names):
        return None
    tips_before = np.zeros(len(at), dtype=np.int64)
    tips_before[node] = is_tip
    tips_before = np.cumsum(tips_before)
    tip_start = tip_stop - 1
    # Brackets of one depth open and close in turn; the node of a ')' ends behind it.
    by_depth = [
        np.flatnonzero(one)[np.argsort(depth[one], kind="stable")] for one in (opens, closes)
    ]
    number = np.cumsum(~opens) - 1
    tip_start[number[by_depth[1] + 1]] = tips_before[by_depth[0]]
    return NewickArrays(names, _parents(depth[node]), np.append(length, 0.0), tip_start, tip_stop)


def _marks(text: NDArray[np.uint8]) -> NDArray[np.int64] | None:
    """Where ``( ) , : ;`` stand outside quotes; None where the text is not plain, or not whole."""
    stop = len(text)
    while stop and text[stop - 1] in b" \t\r\n":
        stop -= 1
    if not stop or text[stop - 1] != _END:
        return None
    found, odd = [], []
    for low in range(0, stop, _BLOCK):
        kind = _KIND[text[low : min(low + _BLOCK, stop)]]
        found.append(low + np.flatnonzero(kind == _MARK))
        odd.append(low + np.flatnonzero(kind == _ODD))
    marks, odds = np.concatenate(found), np.concatenate(odd)
    is_quote = text[marks] == _QUOTE
    quotes, marks = marks[is_quote], marks[~is_quote]
    if len(quotes) % 2 or (np.searchsorted(quotes, odds) % 2 == 0).any():
        return None
    return marks[np.searchsorted(quotes, marks) % 2 == 0] if len(quotes) else marks


def _usable(names: Texts) -> bool:
    """Whether names are there, not quoted, and all different."""
    if (names.lengths == 0).any():
        return False
    if (names.buffer[names.starts] == _QUOTE).any() or (
        names.buffer[names.stops - 1] == _QUOTE
    ).any():
        return False
    return len(np.unique(names.hashes())) == len(names)


def _lengths(
    text: NDArray[np.uint8], starts: NDArray[np.int64], stops: NDArray[np.int64]
) -> NDArray[np.float64] | None:
    """The numbers between ``starts`` and ``stops``; None where one is missing or no length."""
    numbers = Texts(text, starts, stops)
    if (numbers.lengths < 1).any() or (numbers.lengths > _LONGEST_NUMBER).any():
        return None
    length = np.empty(len(numbers))
    for low in range(0, len(numbers), 2**16):
        block = np.ascontiguousarray(numbers.padded(np.arange(low, min(low + 2**16, len(numbers)))))
        try:
            length[low : low + len(block)] = block.view(f"S{block.shape[1]}")[:, 0].astype(float)
        except ValueError:
            return None
    return length if np.isfinite(length).all() and (length >= 0).all() else None


def _parents(depth: NDArray[Any]) -> NDArray[np.int64]:
    """The parent of a node of depth d is the next node of depth d - 1."""
    count = len(depth)
    own = np.arange(count)
    by_depth = np.argsort(depth, kind="stable")
    keys = depth[by_depth].astype(np.int64) * count + by_depth
    parent = by_depth[np.minimum(np.searchsorted(keys, (depth - 1) * count + own), count - 1)]
    parent[-1] = -1
    return parent
