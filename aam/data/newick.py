"""Newick without an object a node: a tree of a million tips in seconds.

Every node ends at the ``,``, ``)`` or ``;`` behind it, and nodes end in post-order. So the tree is
where these characters stand and how deep: whole arrays are looked at, node by node never.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aam.data.texts import Texts

_OPEN, _CLOSE, _COMMA, _COLON, _END, _QUOTE = b"(),:;'"
_BLOCK = 2**22
_LONGEST_NUMBER = 48
_MARK, _ODD = 1, 2
_KIND = np.zeros(256, dtype=np.uint8)
_KIND[list(b"(),:;'")] = _MARK
_KIND[[*range(33), *b"[]", *range(127, 256)]] = _ODD


def parse_newick(text: np.ndarray) -> tuple[Texts, np.ndarray, np.ndarray] | None:
    """Names of tips, parents and lengths of a plain tree ``(bytes,)``, as `Phylogeny` has them.

    Plain is one whole tree with every tip named and every branch with a finite length >= 0. None:
    it is not so plain (comments, white space, quoted tips, other than ASCII, any mistake), and a
    general parser must look at it. Names stay in the text, which may be memory-mapped.
    """
    marks = _marks(text)
    if marks is None:
        return None
    kinds = text[marks]
    is_colon = kinds == _COLON
    if np.count_nonzero(kinds == _END) > 1 or (is_colon[1:] & is_colon[:-1]).any():
        return None
    # Ends of nodes, and opening brackets; a colon belongs to the one behind it.
    at = np.flatnonzero(~is_colon)
    ends, kinds = marks[at], kinds[at]
    colon = np.where(is_colon[at - 1], marks[at - 1], ends)
    before, before_kind = np.append(-1, ends[:-1]), np.append(_OPEN, kinds[:-1])
    opens, closes = kinds == _OPEN, kinds == _CLOSE
    depth = np.cumsum(opens) - np.cumsum(closes) + closes  # before a ')', after a '('
    is_whole = depth[-1] == 0 and (depth[:-1] >= 1).all()
    opens_well = (ends[opens] - before[opens] == 1) & (before_kind[opens] != _CLOSE)
    if not is_whole or not opens_well.all():
        return None
    node = np.flatnonzero(~opens)
    tip = node[before_kind[node] != _CLOSE]
    names = Texts(text, before[tip] + 1, colon[tip])
    length = _lengths(Texts(text, colon[node[:-1]] + 1, ends[node[:-1]]))
    if length is None or not names.lengths.all() or len(np.unique(names.hashes())) < len(names):
        return None
    if (text[np.concatenate((names.starts, names.stops - 1))] == _QUOTE).any():
        return None
    return names, _parents(depth[node]), np.append(length, 0.0)


def _marks(text: np.ndarray) -> np.ndarray | None:
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


def _lengths(numbers: Texts) -> np.ndarray | None:
    """The numbers of a text; None where one is missing or no length."""
    if (numbers.lengths < 1).any() or (numbers.lengths > _LONGEST_NUMBER).any():
        return None
    length = np.empty(len(numbers))
    for low in range(0, len(numbers), 2**16):
        block = numbers[low : low + 2**16].padded()
        try:
            length[low : low + len(block)] = block.view(f"S{block.shape[1]}")[:, 0].astype(float)
        except ValueError:
            return None
    return length if np.isfinite(length).all() and (length >= 0).all() else None


def _parents(depth: np.ndarray) -> np.ndarray:
    """The parent of a node of depth d is the next node of depth d - 1."""
    count = len(depth)
    by_depth = np.argsort(depth, kind="stable")
    keys = depth[by_depth].astype(np.int64) * count + by_depth
    above = np.searchsorted(keys, (depth - 1) * count + np.arange(count))
    parent = by_depth[np.minimum(above, count - 1)]
    parent[-1] = -1
    return parent


def newick(parent: np.ndarray, length: np.ndarray, names: Sequence[str], digits: str = "") -> str:
    """A tree ``(nodes,)``, children before parents, as text; tips are named in their order."""
    below: list[list[str]] = [[] for _ in parent]
    tips = iter(names)
    for node, above in enumerate(parent.tolist()):
        text = f"({','.join(below[node])})" if below[node] else next(tips)
        below[node].clear()
        if above >= 0:
            below[above].append(f"{text}:{length[node]:{digits}}")
    return f"{text};\n"
