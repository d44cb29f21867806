"""DNA sequences: which ids are sequences, FASTA files, and nucleotide tokens."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from aam.data.texts import Texts, ranges
from aam.errors import InputError, name_some, one_line
from aam.files import check_input
from aam_kernels import Ragged

PAD, A, C, G, T, START, MASK = range(7)

_DNA = re.compile(r"[ACGT]+", re.IGNORECASE)
# What a sequence may hold besides A, C, G and T: IUPAC codes, RNA's U, gaps.
_SEQUENCE_LIKE = re.compile(r"[ACGTURYSWKMBDHVN.\-]{10,}", re.IGNORECASE)

_TOKEN_OF_BYTE = np.full(256, PAD, dtype=np.uint8)
_TOKEN_OF_BYTE[list(b"ACGTacgt")] = [A, C, G, T] * 2


def is_dna(name: str) -> bool:
    """Whether a string is made of A, C, G and T, upper or lower case."""
    return _DNA.fullmatch(name) is not None


def tokenize(sequences: Sequence[str], max_bp: int = 150) -> Ragged:
    """Tokens ``(total_tokens,)`` uint8 of DNA, one row a sequence, cut at ``max_bp`` bases.

    START, then A 1, C 2, G 3, T 4; InputError where a sequence holds something else.
    """
    texts = Texts.of(sequences)
    lengths = np.minimum(texts.lengths, max_bp)
    bases = _TOKEN_OF_BYTE[texts.buffer[ranges(texts.starts, lengths)]]
    if not bases.all():
        _check_bases(texts, texts, "tokenize")
    values = np.insert(bases, np.cumsum(lengths) - lengths, START)
    return ragged_rows(values, lengths + 1)


def ragged_rows(values: NDArray[Any], lengths: NDArray[Any]) -> Ragged:
    """Values (total,) as rows of these lengths."""
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    return Ragged(torch.from_numpy(values), torch.from_numpy(offsets))


def read_fasta(path: Path) -> dict[str, str]:
    """Read FASTA, plain or inside a QIIME 2 ``.qza``, as ``{id: SEQUENCE}``, in upper case.

    The id is the first word after ``>``; InputError where it is no FASTA or an id stands twice.
    """
    check_input(path, "FASTA or .qza with the features' sequences")
    try:
        if path.suffix.lower() == ".qza":
            content = read_qza_member(path, "data/dna-sequences.fasta", "FeatureData[Sequence]")
        else:
            content = path.read_bytes()
        lines = content.decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as FASTA text ({one_line(error)})") from error
    parts: dict[str, list[str]] = {}
    current: list[str] | None = None
    for number, line in enumerate(lines, start=1):
        if line.startswith(">"):
            name = line[1:].split(maxsplit=1)[0] if line[1:].strip() else ""
            if not name or name in parts:
                problem = f"the id {name!r} stands twice" if name else "there is no id after '>'"
                raise InputError(f"{path}: {problem} (line {number}); each sequence needs its own")
            current = parts[name] = []
        elif current is not None:
            current.append(line.strip())
        elif line.strip():
            raise InputError(
                f"{path}: line {number} is not FASTA (expected '>'): give rep-seqs.fasta or .qza"
            )
    if not parts:
        raise InputError(f"{path}: holds no sequences: give rep-seqs.fasta or .qza")
    return {name: "".join(pieces).upper() for name, pieces in parts.items()}


def read_qza_member(path: Path, member: str, expected_type: str) -> bytes:
    """The bytes of ``<uuid>/<member>`` in a QIIME 2 artifact; InputError where it is none."""
    found = "no QIIME 2 artifact"
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.split("/", 1)[-1]: name for name in archive.namelist()}
            if member in names:
                return archive.read(names[member])
            if "metadata.yaml" in names:  # which declares its semantic type
                text = archive.read(names["metadata.yaml"]).decode("utf-8", "replace")
                declared = re.search(r"^type:\s*['\"]?(.+?)['\"]?\s*$", text, re.MULTILINE)
                found = declared.group(1) if declared else found
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{path}: is no readable .qza, which is a zip file ({one_line(error)}): export it again"
        ) from error
    raise InputError(
        f"{path}: holds {found}, expected {expected_type} ({member}): give that artifact"
    )


def resolve_sequences(
    feature_ids: Sequence[str], source: str, sequences: Path | None
) -> tuple[str, ...]:
    """Each feature's DNA in upper case: its id itself, or what the file ``sequences`` says of it.

    InputError where ids are no DNA, lack a sequence, hold other letters, or coincide.
    """
    origin = source if sequences is None else str(sequences)
    if sequences is None:
        dna = [one.upper() for one in feature_ids]
        foreign = [one for one in feature_ids if not (is_dna(one) or _SEQUENCE_LIKE.fullmatch(one))]
        if foreign:
            raise InputError(
                f"{source}: {len(foreign)} of {len(feature_ids)} feature ids are not DNA "
                f"({name_some(foreign)}): give their sequences with --sequences rep-seqs.fasta "
                "or .qza"
            )
    else:
        known = read_fasta(sequences)
        lacking = [one for one in feature_ids if not known.get(one)]
        if lacking:
            raise InputError(
                f"{sequences}: has no sequence for {len(lacking)} of {len(feature_ids)} features "
                f"of {source} ({name_some(lacking)}): give the sequences made with this table, "
                "or leave --sequences out if its ids are the sequences"
            )
        dna = [known[one] for one in feature_ids]
    _check_bases(feature_ids, dna, origin)
    first_with = dict(zip(reversed(dna), reversed(feature_ids), strict=True))
    again = [name for name, one in zip(feature_ids, dna, strict=True) if first_with[one] != name]
    if again:
        raise InputError(
            f"{origin}: {len(again)} features repeat another's sequence, upper and lower case "
            f"being one ({name_some(again)}): sum them into one feature each"
        )
    return tuple(dna)


def resolve_in_blocks(ids: Any, sequences: Path | None, at_once: int) -> Texts:
    """`resolve_sequences` for ids of a BIOM 2.1 file; ValueError or KeyError where that refuses.

    ``at_once`` are read together; repeats are not looked for.
    """
    known = None if sequences is None else read_fasta(sequences)
    letters, lengths = [], []
    for low in range(0, len(ids), at_once):
        block = [one.decode() for one in ids[low : low + at_once]]
        texts = Texts.of(block if known is None else [known[one] for one in block]).upper()
        if not (texts.lengths.all() and np.isin(texts.buffer, list(b"ACGT")).all()):
            raise ValueError("ids that are no sequences")
        letters.append(texts.buffer)
        lengths.append(texts.lengths)
    stops = np.cumsum(np.concatenate(lengths))
    return Texts(np.concatenate(letters), stops - np.concatenate(lengths), stops)


def _check_bases(names: Sequence[str], sequences: Sequence[str], origin: str) -> None:
    pairs = zip(names, sequences, strict=True)
    wrong = {name: one for name, one in pairs if one and not is_dna(one)}
    if wrong:
        letters = sorted(set("".join(wrong.values())) - set("ACGTacgt"))
        raise InputError(
            f"{origin}: {len(wrong)} sequences hold {name_some(letters, 6)} besides A, C, G and T "
            f"({name_some(list(wrong))}): remove these features, or write U as T "
            "and take gaps out"
        )
