"""Options as nested plain values and TOML: written with a run, read back, checked by name and type.

Works on any dataclass of typed fields whose groups are dataclasses themselves; the classes are
in `aam.config`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from aam.errors import InputError

# Options that say what to do with a run's folder, not what the run is: not saved with it.
NOT_SAVED = ("overwrite", "resume_from", "config")

# Smallest and largest value of an option, wherever it occurs. A bound is itself allowed, unless
# it is listed among the open ones.
LIMITS: dict[str, tuple[float, float]] = {
    "rarefy_depth": (0, math.inf),
    "max_bp": (1, math.inf),
    "token_limit": (1, math.inf),
    "validation_fraction": (0, 1),
    "embedding_dim": (1, math.inf),
    "num_heads": (1, math.inf),
    "num_layers": (1, math.inf),
    "ffn_dim": (1, math.inf),
    "dropout": (0, 1),
    "wide_dim": (1, math.inf),
    "dimensions": (1, math.inf),
    "categorical_embed_dim": (1, math.inf),
    "quantile": (0, 1),
    "unifrac_penalty": (0, math.inf),
    "nucleotide_penalty": (0, math.inf),
    "target_penalty": (0, math.inf),
    "count_penalty": (0, math.inf),
    "mask_probability": (0, 1),
    "masked_share": (0, 1),
    "batch_size": (1, math.inf),
    "effective_batch_size": (2, math.inf),
    "max_memory_gb": (0, math.inf),
    "max_memory_fraction": (0, 1),
    "devices": (1, math.inf),
    "checkpoint_minutes": (0, math.inf),
    "epochs": (1, math.inf),
    "max_steps": (1, math.inf),
    "lr": (0, math.inf),
    "weight_decay": (0, math.inf),
    "warmup_fraction": (0, 1),
    "clip": (0, math.inf),
    "early_stopping": (0, math.inf),
    "validate_every": (1, math.inf),
    "seed": (0, 2**63 - 1),
    "samples": (2, math.inf),
    "pretrain_epochs": (1, math.inf),
    "finetune_steps": (1, math.inf),
}
OPEN_BELOW = {
    "validation_fraction", "quantile", "lr", "clip", "mask_probability", "masked_share",
    "max_memory_gb", "max_memory_fraction", "checkpoint_minutes",
}  # fmt: skip
OPEN_ABOVE = {"validation_fraction", "quantile", "dropout", "mask_probability"}


def leaves(config_class: type, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all options of a config class, for example ``("data", "table")``."""
    hints = typing.get_type_hints(config_class)
    for option in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(hints[option.name]):
            yield from leaves(hints[option.name], (*prefix, option.name))
        else:
            yield (*prefix, option.name)


def flag(name: str) -> str:
    """An option as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def check_limits(config: Any) -> None:
    """Check every number against its limits.

    Raises:
        InputError: names the option, its value and what is allowed.
    """
    for path in leaves(type(config)):
        value = config
        for name in path:
            value = getattr(value, name)
        name = path[-1]
        if name not in LIMITS or not isinstance(value, (int, float)):
            continue
        low, high = LIMITS[name]
        below = value <= low if name in OPEN_BELOW else value < low
        above = value >= high if name in OPEN_ABOVE else value > high
        if below or above or not math.isfinite(value):
            least = f"{'above' if name in OPEN_BELOW else 'at least'} {low:g}"
            most = f"{'below' if name in OPEN_ABOVE else 'at most'} {high:g}"
            expected = least if math.isinf(high) or name == "seed" else f"{least} and {most}"
            raise InputError(f"{flag(name)} {value:g}: expected {expected}")


def to_dict(config: Any) -> dict[str, Any]:
    """The options as nested plain values; unset ones (None) are left out."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return to_dict(value)
        if isinstance(value, Path):
            return str(value)
        return list(value) if isinstance(value, tuple) else value

    return {
        option.name: plain(getattr(config, option.name))
        for option in dataclasses.fields(config)
        if getattr(config, option.name) is not None
    }


def from_dict(
    config_class: type, values: Mapping[str, Any], missing: Any = None, *, source: str = "options"
) -> Any:
    """Rebuild a config from :func:`to_dict`'s output.

    Args:
        config_class: one of the classes of `aam.config`.
        values: nested options, as in a ``config.toml``.
        missing: stands in for a required option that `values` lacks; None raises.
        source: where the values are from, for messages.

    Raises:
        InputError: an option is unknown, a required one is missing, or a value has the wrong type.
    """
    hints = typing.get_type_hints(config_class)
    names = {option.name for option in dataclasses.fields(config_class)}
    unknown = sorted(set(values) - names)
    if unknown:
        raise InputError(f"{source}: unknown option {unknown[0]!r}{_nearest(unknown[0], names)}")
    arguments: dict[str, Any] = {}
    for option in dataclasses.fields(config_class):
        hint = hints[option.name]
        required = (
            option.default is dataclasses.MISSING and option.default_factory is dataclasses.MISSING
        )
        if dataclasses.is_dataclass(hint):
            inner = values.get(option.name, {})
            if not isinstance(inner, Mapping):
                raise InputError(
                    f"{source}: {option.name} = {inner!r}: expected a table of options"
                )
            arguments[option.name] = from_dict(
                typing.cast(type, hint), inner, missing, source=source
            )
        elif option.name in values:
            arguments[option.name] = _typed(option.name, values[option.name], hint, source)
        elif required:
            if missing is None:
                raise InputError(f"{source}: option {option.name!r} is missing")
            arguments[option.name] = missing
    return config_class(**arguments)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested options of which those of `above` win."""
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        both = isinstance(value, Mapping) and isinstance(old, Mapping)
        merged[name] = merge(typing.cast(Mapping, old), value) if both else value
    return merged


def read_toml(path: Path, config_class: type) -> dict[str, Any]:
    """Read options from a TOML file; they may stand in their group's table or at the top level.

    Returns:
        Nested options of the right types, as :func:`from_dict` takes them.

    Raises:
        InputError: the file is missing, is no TOML, names an unknown option or gives one twice,
            or a value has the wrong type.
    """
    try:
        loaded = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a TOML file: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    place = {leaf[-1]: leaf for leaf in leaves(config_class)}
    groups = {leaf[0] for leaf in leaves(config_class) if len(leaf) > 1}
    nested: dict[str, Any] = {}
    for key, value in loaded.items():
        group = key.replace("-", "_")
        if isinstance(value, dict) and group not in groups:
            raise InputError(f"{path}: unknown group [{key}]{_nearest(group, groups)}")
        for inner, one in value.items() if isinstance(value, dict) else [(key, value)]:
            name = inner.replace("-", "_")
            if name not in place:
                raise InputError(f"{path}: unknown option {inner!r}{_nearest(name, set(place))}")
            if isinstance(value, dict) and place[name][:-1] != (group,):
                raise InputError(
                    f"{path}: option {inner!r} is not of the group [{key}]; it stands in "
                    + (f"[{place[name][0]}]" if len(place[name]) > 1 else "no group")
                )
            target = nested
            for part in place[name][:-1]:
                target = target.setdefault(part, {})
            if name in target:
                raise InputError(f"{path}: option {inner!r} is given twice")
            target[name] = one
    from_dict(config_class, nested, missing=..., source=str(path))
    return nested


def write_toml(config: Any, path: Path) -> None:
    """Write the resolved options where :func:`read_toml` can read them."""
    import tomli_w

    values = to_dict(config)
    if isinstance(values.get("run"), dict):
        values["run"] = {k: v for k, v in values["run"].items() if k not in NOT_SAVED}
    path.write_text(tomli_w.dumps(values), encoding="utf-8")


def _typed(name: str, value: Any, hint: Any, source: str) -> Any:
    """Turn TOML's strings and lists into the paths and tuples that the field holds.

    Raises:
        InputError: the value is of another type, or is none of the choices.
    """
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None:
            return None
        hint = next(one for one in typing.get_args(hint) if one is not type(None))
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        if value in typing.get_args(hint):
            return value
        expected = "one of " + ", ".join(map(str, typing.get_args(hint)))
    elif origin is tuple:
        if isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value):
            return tuple(value)
        expected = "a list of texts"
    elif hint is Path:
        if isinstance(value, (str, Path)) and str(value):
            return Path(value)
        expected = "a path in quotes"
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        expected = "a number"
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    else:
        expected = {int: "a whole number", bool: "true or false", str: "a text"}[hint]
    raise InputError(f"{source}: {name} = {value!r}: expected {expected}")


def _nearest(name: str, names: set[str]) -> str:
    near = difflib.get_close_matches(name, sorted(names), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
