"""Files that survive: atomic writes, self-describing models, exact resume.

A write goes to a temporary file in the same folder, is flushed to the disk and then renamed, so
that a full disk or a killed process leaves the previous file as it was.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aam.errors import InputError
from aam.model import CommunityEncoder, Predictor
from aam.model.encoder import EncoderShape
from aam.model.predictor import PredictorShape

MODEL_FILE = "model.safetensors"
METADATA_KEY = "aam"
FORMAT = 1


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path whose file takes the place of `path` when the block ends well.

    Raises:
        InputError: the folder cannot be written or the disk is full; `path` is as before.
    """
    handle = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        kept = "; the previous file is kept" if path.exists() else ""
        raise InputError(f"{path}: cannot be written ({error.strerror or error}){kept}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically."""
    # Through memory: torch's own writer reports a full disk as an internal error of its zip code.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_state(path: Path) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        InputError: it is missing, truncated, or no checkpoint of this program.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        OSError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
    ) as error:  # whatever torch and pickle make of damaged bytes
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise InputError(
            f"{path}: truncated or not a checkpoint ({reason}); "
            "resume from another one of the run's checkpoints"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path}: not a checkpoint of this version of aam")
    if "parts" in state:
        from aam.training.shards import read_shards

        return read_shards(path, state)
    return state


def save_model(path: Path, model: nn.Module, description: dict[str, Any]) -> None:
    """Write weights and everything that `predict` needs into one safetensors file, atomically.

    Args:
        path: the file.
        model: a CommunityEncoder or Predictor.
        description: JSON values to keep with the weights (data options, target, categories).
    """
    from safetensors.torch import save

    encoder = model.encoder if isinstance(model, Predictor) else model
    described = {"format": FORMAT, "encoder": asdict(encoder.shape), **description}
    if isinstance(model, Predictor):
        described["predictor"] = asdict(model.shape)
    weights = {
        name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()
    }
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(weights, metadata={METADATA_KEY: json.dumps(described)}))


def read_model(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read the weights and the description of a run's model.

    Raises:
        InputError: there is no model, or its file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = run / MODEL_FILE if run.is_dir() else run
    if not path.is_file():
        raise InputError(f"{path}: no such model; give the folder of a finished run")
    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {}).get(METADATA_KEY, "null"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: truncated or not a model ({error})") from error
    if not described or described.get("format") != FORMAT:
        raise InputError(f"{path}: not a model of this version of aam")
    return weights, described


def build_model(
    described: dict[str, Any], *, impl: str = "auto", recompute: bool = True
) -> CommunityEncoder | Predictor:
    """The model that a description describes, with fresh weights."""
    shape = EncoderShape(**described["encoder"])
    predictor = described.get("predictor")
    encoder = CommunityEncoder(
        shape,
        impl=impl,
        recompute=recompute,
        sample_dropout=shape.dropout if predictor else 0.0,
    )
    if not predictor:
        return encoder
    own = {**predictor, "category_sizes": tuple(predictor["category_sizes"])}
    return Predictor(encoder, PredictorShape(**own), impl=impl, recompute=recompute)


def load_model(run: Path, *, impl: str = "auto") -> tuple[nn.Module, dict[str, Any]]:
    """A run's model in evaluation mode, and its description."""
    weights, described = read_model(run)
    model = build_model(described, impl=impl)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"{run}: the weights do not fit the model's description") from error
    return model.eval(), described


def load_encoder(encoder: CommunityEncoder, run: Path) -> list[tuple[str, str, int]]:
    """Copy a pretrained encoder's weights into an encoder.

    Args:
        encoder: receives the weights.
        run: folder of `pretrain`, or of `finetune` (its encoder is taken).

    Returns:
        Rows (part, what happened, parameters) for the printed table; what happened is
        ``loaded``, ``new`` (initialised, not in the file) or ``skipped`` (only in the file).

    Raises:
        InputError: a weight has another shape.
    """
    weights, described = read_model(run)
    if "predictor" in described:
        weights = {
            name.removeprefix("encoder."): value
            for name, value in weights.items()
            if name.startswith("encoder.")
        }
    own = encoder.state_dict()
    for name in own.keys() & weights.keys():
        if own[name].shape != weights[name].shape:
            raise InputError(
                f"{run}: weight {name} has shape {tuple(weights[name].shape)}, this model needs "
                f"{tuple(own[name].shape)}; use the same model options as in pretraining"
            )
    encoder.load_state_dict(weights, strict=False)
    return [
        *_summary(own, weights.keys() & own.keys(), "loaded"),
        *_summary(own, own.keys() - weights.keys(), "new"),
        *_summary(weights, weights.keys() - own.keys(), "skipped"),
    ]


def _summary(
    tensors: dict[str, torch.Tensor], names: set[str], what: str
) -> list[tuple[str, str, int]]:
    """Parameters of each part (first name of the path)."""
    sizes: dict[str, int] = {}
    for name in sorted(names):
        part = name.split(".")[0]
        sizes[part] = sizes.get(part, 0) + tensors[name].numel()
    return [(part, what, size) for part, size in sizes.items()]
