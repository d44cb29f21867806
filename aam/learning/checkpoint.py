"""Files that survive: atomic writes, self-describing models, exact resume.

A write goes to a temporary file in the same folder, is flushed to the disk and then renamed, so
that a full disk or a killed process leaves the previous file as it was.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from aam.errors import InputError
from aam.files import atomic_path
from aam.model import AsvEncoder, EncoderShape, Predictor, PretrainedModel
from aam.model.predictor import PredictorShape

MODEL_FILE = "model.safetensors"
METADATA_KEY = "aam"
FORMAT = 2
ARRAYS = "data."  # begins the names of tensors that are no weights


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
    return state


def save_model(
    path: Path,
    model: nn.Module,
    description: dict[str, Any],
    arrays: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write weights and everything that `predict` needs into one safetensors file, atomically.

    Args:
        path: the file.
        model: a PretrainedModel or Predictor.
        description: JSON values to keep with the weights (data options, target, categories).
        arrays: what else the model knows: its clades, the sequences of training.
    """
    from safetensors.torch import save

    assert isinstance(model, (Predictor, PretrainedModel))
    described = {"format": FORMAT, "encoder": asdict(model.encoder.shape), **description}
    if isinstance(model, Predictor):
        described["predictor"] = asdict(model.shape)
    else:
        described["pretrained"] = model.description
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()
    }
    for name, values in (arrays or {}).items():
        tensors[ARRAYS + name] = torch.from_numpy(np.require(values, requirements="CW"))
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(tensors, metadata={METADATA_KEY: json.dumps(described)}))


@dataclass(frozen=True)
class SavedModel:
    """The file of a model: weights, what else it knows, and its description."""

    path: Path
    weights: dict[str, torch.Tensor]
    arrays: dict[str, np.ndarray]
    description: dict[str, Any]

    def build(self, *, impl: str = "auto") -> PretrainedModel | Predictor:
        """The model in evaluation mode."""
        model = build_model(self.description, impl=impl)
        try:
            model.load_state_dict(self.weights)
        except RuntimeError as error:
            raise InputError(
                f"{self.path}: the weights do not fit the model's description"
            ) from error
        return model.eval()


def read_model(run: Path) -> SavedModel:
    """Read a run's model.

    Raises:
        InputError: there is no model, or its file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = run / MODEL_FILE if run.is_dir() else run
    if not path.is_file():
        raise InputError(f"{path}: no such model; give the folder of a finished run")
    weights, arrays = {}, {}
    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {}).get(METADATA_KEY, "null"))
            for name in file.keys():  # noqa: SIM118  (an open file, no dict)
                if name.startswith(ARRAYS):
                    arrays[name.removeprefix(ARRAYS)] = file.get_tensor(name).numpy()
                else:
                    weights[name] = file.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: truncated or not a model ({error})") from error
    if not described or described.get("format") != FORMAT:
        raise InputError(f"{path}: not a model of this version of aam; train it again")
    return SavedModel(path, weights, arrays, described)


def build_model(
    described: dict[str, Any], *, impl: str = "auto", recompute: bool = True
) -> PretrainedModel | Predictor:
    """The model that a description describes, with fresh weights."""
    encoder = AsvEncoder(EncoderShape(**described["encoder"]), impl=impl, recompute=recompute)
    if "predictor" not in described:
        return PretrainedModel(encoder, **described["pretrained"])
    own = described["predictor"]
    own = {**own, "category_sizes": tuple(own["category_sizes"])}
    return Predictor(encoder, PredictorShape(**own), impl=impl, recompute=recompute)


def load_encoder(encoder: AsvEncoder, run: Path) -> list[tuple[str, str, int]]:
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
    saved = read_model(run).weights
    weights = {
        name.removeprefix("encoder."): value
        for name, value in saved.items()
        if name.startswith("encoder.")
    }
    skipped = {name: value for name, value in saved.items() if not name.startswith("encoder.")}
    own = encoder.state_dict()
    for name in own.keys() & weights.keys():
        if own[name].shape != weights[name].shape:
            raise InputError(
                f"{run}: weight {name} has shape {tuple(weights[name].shape)}, this model needs "
                f"{tuple(own[name].shape)}; use the same model options as in pretraining"
            )
    encoder.load_state_dict(weights, strict=False)
    skipped |= {name: value for name, value in weights.items() if name not in own}
    return [
        *_summary(own, weights.keys() & own.keys(), "loaded"),
        *_summary(own, own.keys() - weights.keys(), "new"),
        *_summary(skipped, skipped.keys(), "skipped"),
    ]


def _summary(
    tensors: dict[str, torch.Tensor], names: Set[str], what: str
) -> list[tuple[str, str, int]]:
    """Parameters of each part (first name of the path)."""
    sizes: dict[str, int] = {}
    for name in sorted(names):
        part = name.split(".")[0]
        sizes[part] = sizes.get(part, 0) + tensors[name].numel()
    return [(part, what, size) for part, size in sizes.items()]
