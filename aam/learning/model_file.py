"""The file of a trained model: weights, what else it knows, and what builds it again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aam.errors import InputError
from aam.files import atomic_path, model_file
from aam.model import AsvEncoder, EncoderShape, Predictor, PretrainedModel
from aam.model.predictor import PredictorShape

METADATA_KEY = "aam"
FORMAT = 3
ARRAYS = "data."  # begins the names of tensors that are no weights


@dataclass(frozen=True)
class SavedModel:
    """The file of a model: weights, what else it knows, and its description."""

    path: Path
    weights: dict[str, torch.Tensor]
    arrays: dict[str, np.ndarray]
    description: dict[str, Any]

    def build(self, *, impl: str = "auto") -> PretrainedModel | Predictor:
        """The model in evaluation mode."""
        encoder = AsvEncoder(EncoderShape(**self.description["encoder"]), impl=impl)
        model: PretrainedModel | Predictor
        if own := self.description.get("predictor"):
            own = {**own, "category_sizes": tuple(own["category_sizes"])}
            model = Predictor(encoder, PredictorShape(**own), impl=impl)
        else:
            model = PretrainedModel(encoder, **self.description["pretrained"])
        try:
            model.load_state_dict(self.weights)
        except RuntimeError as error:
            problem = f"{self.path}: the weights do not fit the model's description"
            raise InputError(problem) from error
        return model.eval()


def save_model(
    path: Path,
    model: PretrainedModel | Predictor,
    description: dict[str, Any],
    arrays: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write weights and everything that `predict` needs into one safetensors file, atomically.

    `description` is JSON (data options, target, categories); `arrays` are what else the model
    knows: its clades, the sequences of training.
    """
    from safetensors.torch import save

    described = {"format": FORMAT, "encoder": asdict(model.encoder.shape), **description}
    if isinstance(model, Predictor):
        described["predictor"] = asdict(model.shape)
    else:
        described["pretrained"] = model.description
    tensors = {name: one.detach().cpu().contiguous() for name, one in model.state_dict().items()}
    for name, values in (arrays or {}).items():
        tensors[ARRAYS + name] = torch.from_numpy(np.require(values, requirements=["C", "W"]))
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(tensors, metadata={METADATA_KEY: json.dumps(described)}))


def read_model(run: Path) -> SavedModel:
    """Read the model of a run's folder, or a file."""
    from safetensors import SafetensorError, safe_open

    path = model_file(run)
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


def load_encoder(encoder: AsvEncoder, run: Path) -> list[tuple[str, str, int]]:
    """Copy the encoder's weights of a run of `pretrain` or `finetune` into an encoder.

    Returns rows (part, what happened, parameters): ``loaded``, ``new`` (initialised, not in the
    file) or ``skipped`` (only in the file).
    """
    saved, own, prefix = read_model(run).weights, encoder.state_dict(), "encoder."
    weights = {n.removeprefix(prefix): one for n, one in saved.items() if n.startswith(prefix)}
    for name in own.keys() & weights.keys():
        if own[name].shape != weights[name].shape:
            raise InputError(
                f"{run}: weight {name} has shape {tuple(weights[name].shape)}, this model needs "
                f"{tuple(own[name].shape)}; use the same model options as in pretraining"
            )
    encoder.load_state_dict(weights, strict=False)
    skipped = {name: one for name, one in saved.items() if not name.startswith(prefix)}
    skipped |= {name: one for name, one in weights.items() if name not in own}
    return [
        *_parts(own, weights.keys() & own.keys(), "loaded"),
        *_parts(own, own.keys() - weights.keys(), "new"),
        *_parts(skipped, skipped.keys(), "skipped"),
    ]


def _parts(
    tensors: dict[str, torch.Tensor], names: Set[str], what: str
) -> list[tuple[str, str, int]]:
    """Parameters of each part (first name of the path)."""
    sizes: Counter[str] = Counter()
    for name in sorted(names):
        sizes[name.split(".")[0]] += tensors[name].numel()
    return [(part, what, size) for part, size in sizes.items()]
