"""DNA sequences: which ids are sequences, FASTA files, and nucleotide tokens.

Tokens are all in memory, or made from a mapped file when asked for.
"""

from __future__ import annotations

import copy
import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from aam.data.texts import Texts, offsets_of, ranges
from aam.errors import InputError, name_some, one_line
from aam.files import check_input
from aam_kernels import Ragged

PAD, A, C, G, T, START, MASK = range(7)
VOCABULARY = 7

_DNA = re.compile(r"[ACGT]+", re.IGNORECASE)
# What a sequence may hold besides A, C, G and T: IUPAC codes, RNA's U, gaps.
_SEQUENCE_LIKE = re.compile(r"[ACGTURYSWKMBDHVN.\-]{10,}", re.IGNORECASE)

TOKEN_OF_BYTE = np.full(256, PAD, dtype=np.uint8)
for _base, _token in (("A", A), ("C", C), ("G", G), ("T", T)):
    TOKEN_OF_BYTE[[ord(_base), ord(_base.lower())]] = _token


def is_dna(name: str) -> bool:
    """Say whether a string is a DNA sequence of A, C, G and T, upper or lower case."""
    return _DNA.fullmatch(name) is not None


def tokenize(sequences: Sequence[str], max_bp: int = 150) -> tuple[Ragged, int]:
    """Turn DNA into tokens: START, then A 1, C 2, G 3, T 4, cut at ``max_bp`` bases.

    Args:
        sequences: strings of A, C, G, T in upper or lower case; an empty one is START alone.
        max_bp: longest sequence in bases; what is longer loses its end.

    Returns:
        Ragged with values uint8 ``(total_tokens,)``, START first in each row, and the number of
        sequences that were cut.

    Raises:
        InputError: a sequence holds something else than A, C, G, T, or ``max_bp`` is below 1.
    """
    if max_bp < 1:
        raise InputError(f"max_bp must be at least 1, got {max_bp}")
    kept = [one[:max_bp] for one in sequences]
    lengths = np.fromiter((len(one) + 1 for one in kept), dtype=np.int64, count=len(kept))
    offsets = np.zeros(len(kept) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    # One placeholder byte before each sequence leaves room for its START token.
    text = "".join("A" + one for one in kept).encode("ascii", errors="replace")
    values = TOKEN_OF_BYTE[np.frombuffer(text, dtype=np.uint8)]
    if not values.all():
        check_bases(kept, kept, "tokenize")
    values[offsets[:-1]] = START
    number_cut = sum(len(one) > max_bp for one in sequences)
    longest = int(lengths.max()) if len(kept) else 0
    return Ragged(torch.from_numpy(values), torch.from_numpy(offsets), longest), number_cut


def read_fasta(path: Path) -> dict[str, str]:
    """Read FASTA, plain or inside a QIIME 2 ``.qza``, as ``{id: SEQUENCE}``, in upper case.

    The id is the first word after ``>``.

    Raises:
        InputError: the file is missing, is no FASTA, or names an id twice.
    """
    lines = _fasta_text(path).splitlines()
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


def _fasta_text(path: Path) -> str:
    """Return the text of a FASTA file or of the one inside a ``.qza``."""
    check_input(path, "FASTA or .qza with the features' sequences")
    try:
        if path.suffix.lower() == ".qza":
            content = read_qza_member(path, "data/dna-sequences.fasta", "FeatureData[Sequence]")
        else:
            content = path.read_bytes()
        return content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as FASTA text ({one_line(error)})") from error


def read_qza_member(path: Path, member: str, expected_type: str) -> bytes:
    """Return the bytes of ``<uuid>/<member>`` in a QIIME 2 artifact.

    Raises:
        InputError: the file is no zip, is damaged, or holds another kind of artifact.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.split("/", 1)[-1] == member]
            if names:
                return archive.read(names[0])
            found = _artifact_type(archive)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{path}: is no readable .qza, which is a zip file ({one_line(error)}): export it again"
        ) from error
    raise InputError(
        f"{path}: holds {found}, expected {expected_type} ({member}): give that artifact"
    )


def _artifact_type(archive: zipfile.ZipFile) -> str:
    """Return the semantic type that a QIIME 2 artifact declares of itself."""
    for name in archive.namelist():
        if name.count("/") == 1 and name.endswith("/metadata.yaml"):
            declared = re.search(rb"^type:\s*(.+)$", archive.read(name), re.MULTILINE)
            if declared:
                return declared.group(1).decode("utf-8", "replace").strip().strip("'\"")
    return "no QIIME 2 artifact"


def resolve_sequences(
    feature_ids: Sequence[str], source: str, sequences: Path | None
) -> tuple[str, ...]:
    """Return each feature's DNA in upper case: its id itself, or what ``sequences`` says of it.

    Args:
        feature_ids: the table's ids.
        source: the table's file, for messages.
        sequences: FASTA or ``.qza`` that maps ids to sequences; None where the ids are sequences.

    Raises:
        InputError: ids are no DNA, lack a sequence, hold other letters, or coincide.
    """
    if sequences is None:
        dna = [one.upper() for one in feature_ids]
        foreign = [
            name
            for name, one in zip(feature_ids, dna, strict=True)
            if not _DNA.fullmatch(one) and not _SEQUENCE_LIKE.fullmatch(one)
        ]
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
    origin = source if sequences is None else str(sequences)
    check_bases(feature_ids, dna, origin)
    _check_distinct(feature_ids, dna, origin)
    return tuple(dna)


def check_bases(names: Sequence[str], sequences: Sequence[str], origin: str) -> None:
    """Raise InputError where a sequence holds something else than A, C, G and T."""
    wrong = [
        (name, one)
        for name, one in zip(names, sequences, strict=True)
        if one and not _DNA.fullmatch(one)
    ]
    if wrong:
        letters = sorted(set("".join(one for _, one in wrong)) - set("ACGTacgt"))
        raise InputError(
            f"{origin}: {len(wrong)} sequences hold {name_some(letters, 6)} besides A, C, G and T "
            f"({name_some([name for name, _ in wrong])}): remove these features, or write U as T "
            "and take gaps out"
        )


def _check_distinct(names: Sequence[str], dna: Sequence[str], origin: str) -> None:
    """Raise where two features have the same sequence."""
    if len(set(dna)) == len(dna):
        return
    first_with: dict[str, str] = {}
    again = [
        name
        for name, one in zip(names, dna, strict=True)
        if first_with.setdefault(one, name) != name
    ]
    raise InputError(
        f"{origin}: {len(again)} features repeat another's sequence, upper and lower case being "
        f"one ({name_some(again)}): sum them into one feature each"
    )


# A sequence in the index stands after a line break, which becomes its START.
_TOKEN_OF_LINE = TOKEN_OF_BYTE.copy()
_TOKEN_OF_LINE[ord("\n")] = START


class ResidentTokens:
    """Tokens of all sequences, on one device.

    Attributes:
        lengths: ``(sequences,)`` int64, tokens of each sequence, START included.
    """

    def __init__(self, sequences: Any, max_bp: int) -> None:
        """Tokenise all sequences, cut at ``max_bp`` bases."""
        self.tokens = tokenize(sequences, max_bp)[0]
        self.lengths: NDArray[Any] = np.diff(self.tokens.offsets.numpy().astype(np.int64))

    @property
    def device(self) -> torch.device:
        """Where tokens are given."""
        return self.tokens.values.device

    def to(self, device: torch.device | str) -> ResidentTokens:
        """The same, held on ``device``."""
        other = copy.copy(self)
        other.tokens = self.tokens.to(device)
        return other

    def gather(self, asv_ids: NDArray[np.int64]) -> Ragged:
        """Tokens of some sequences, one row each, uint8."""
        lengths = self.lengths[asv_ids]
        offsets = offsets_of(lengths).to(self.device, non_blocking=True)
        wanted = torch.from_numpy(np.asarray(asv_ids)).to(self.device, non_blocking=True)
        if len(self.lengths) and (self.lengths == self.tokens.max_length).all():
            # Amplicons cut to one length: whole rows are copied.
            values = self.tokens.values.view(-1, self.tokens.max_length)[wanted].flatten()
        else:
            shift = self.tokens.offsets[wanted] - offsets[:-1]
            total = int(lengths.sum())
            values = self.tokens.values[
                shift.repeat_interleave(offsets.diff(), output_size=total)
                + torch.arange(total, device=self.device)
            ]
        return Ragged(values, offsets, int(lengths.max(initial=0)))


class MappedTokens:
    """Tokens made from a mapped file of sequences whenever they are asked for.

    Attributes:
        lengths: ``(sequences,)`` int64, tokens of each sequence, START included.
        device: where tokens are given.
    """

    def __init__(self, sequences: Texts, max_bp: int) -> None:
        """Look at the sequences of an index, each after a line break."""
        self.buffer, self.starts = sequences.buffer, sequences.starts - 1
        self.lengths: NDArray[np.int64] = np.minimum(sequences.lengths, max_bp) + 1
        self.device = torch.device("cpu")

    def to(self, device: torch.device | str) -> MappedTokens:
        """The same, given on ``device``; the file stays where it is."""
        other = copy.copy(self)
        other.device = torch.device(device)
        return other

    def gather(self, asv_ids: NDArray[np.int64]) -> Ragged:
        """Tokens of some sequences, one row each, uint8."""
        lengths = self.lengths[asv_ids]
        values = _TOKEN_OF_LINE[self.buffer[ranges(self.starts[asv_ids], lengths)]]
        most = int(lengths.max(initial=0))
        return Ragged(torch.from_numpy(values), offsets_of(lengths), most).to(self.device)
