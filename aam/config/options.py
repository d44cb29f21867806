"""How options are checked, and read and written as TOML; knows no option itself.

A class of options is a pydantic dataclass, and so are its groups. No two options of a class have
the same name, so an option can be given without its group.
"""

from __future__ import annotations

import difflib
import functools
import sys
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import pydantic
import pydantic_core
import typing_extensions

from aam.errors import InputError
from aam.files import check_file_output, check_input, check_run_output, model_file

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Options that say what to do with a run's folder, not what the run is: not saved with it.
NOT_SAVED = ("overwrite", "resume_from", "config")
KINDS = {
    "integer": "a whole number", "number": "a number", "boolean": "true or false",
    "array": "a list of texts", "string": "a text",
}  # fmt: skip
LIMITS = {
    "exclusiveMinimum": "above", "minimum": "at least",
    "exclusiveMaximum": "below", "maximum": "at most",
}  # fmt: skip


@typing_extensions.dataclass_transform(kw_only_default=True, field_specifiers=(field,))
class Options:
    """What makes its subclasses, classes of options, pydantic dataclasses of keywords."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __init_subclass__(cls) -> None:
        config = pydantic.ConfigDict(extra="forbid", use_attribute_docstrings=True)
        pydantic.dataclasses.dataclass(cls, kw_only=True, config=config)

    def check(self) -> None:
        """Refuse options that mean nothing together."""


@dataclass(frozen=True)
class Option:
    """One option of a class; the JSON schema is that of its values other than None."""

    name: str
    group: str  # the field that holds it; empty at the top
    required: bool
    default: Any
    schema: Mapping[str, Any]
    help: str

    @property
    def expected(self) -> str:
        """What its values are."""
        schema = self.schema
        if "expected" in schema:
            return schema["expected"]
        if "enum" in schema:
            return f"one of {', '.join(schema['enum'])}"
        kind = "a path" if schema.get("format") == "path" else KINDS[schema["type"]]
        limits = [f"{word} {schema[key]:g}" for key, word in LIMITS.items() if key in schema]
        return f"{kind}, {' and '.join(limits)}" if limits else kind


def flag(name: str) -> str:
    """An option as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


@functools.cache
def options_of(config_class: type, group: str = "") -> dict[str, Option]:
    """All options of a class, by name."""
    found: dict[str, Option] = {}
    hints = typing.get_type_hints(config_class)
    schema = pydantic.TypeAdapter(config_class).json_schema()
    for name in (one.name for one in fields(config_class)):
        if pydantic.dataclasses.is_pydantic_dataclass(hints[name]):
            found |= options_of(hints[name], name)
            continue
        own = schema["properties"][name]
        kind = next(one for one in own.get("anyOf", [own]) if one.get("type") != "null")
        required = name in schema.get("required", ())
        text = _docstring(config_class, name)
        found[name] = Option(name, group, required, own.get("default"), kind, text)
    return found


def _docstring(config_class: type, name: str) -> str:
    """What stands below a field, in the class or in the one that it has the field from."""
    for one in config_class.__mro__:
        known = getattr(one, "__pydantic_fields__", {}).get(name)
        if known is not None and known.description:
            return " ".join(known.description.split())
    return ""


def from_dict(
    config_class: Any, values: Mapping[str, Any], source: str = "options", *, partial: bool = False
) -> Any:
    """Options of a class from plain values, with the class's defaults for the others.

    Args:
        config_class: one of the classes of `aam.config`.
        values: values by option, or in groups, as :func:`to_dict` gives them.
        source: where they are from, for messages; empty: the command line, so that "3" is a number.
        partial: only check; options that are required may lack.

    Raises:
        InputError: an option is unknown, in another group, missing, or has a wrong value.
    """
    known, given = options_of(config_class), flat(config_class, values, source)
    groups = {one.group for one in known.values()}
    nested = {
        group: {k: v for k, v in given.items() if known[k].group == group} for group in groups
    }
    nested |= nested.pop("", {})
    text = pydantic_core.to_json(nested, inf_nan_mode="constants", fallback=lambda one: one.item())
    try:
        return pydantic.TypeAdapter(config_class).validate_json(text, strict=bool(source))
    except pydantic.ValidationError as found:
        wrong = [one for one in found.errors() if one["type"] != "missing"]
        missing = [str(one["loc"][-1]) for one in found.errors() if one["type"] == "missing"]
    if missing and not partial:
        command = config_class.command
        lacks = f"{source} needs {' and '.join(missing)}"
        if not source:
            lacks = f"aam {command} needs {' and '.join(map(flag, missing))}"
        raise InputError(f"{lacks}; aam {command} --help lists the options")
    if not wrong:
        return None
    if wrong[0]["type"] == "value_error":  # raised by the class, about two options
        raise InputError(str(wrong[0]["ctx"]["error"]))
    name, value = next(one for one in reversed(wrong[0]["loc"]) if one in given), wrong[0]["input"]
    what = f"{source}: {name} = {value!r}" if source else f"{flag(name)} {value}"
    raise InputError(f"{what}: expected {known[name].expected}")


def flat(config_class: type, values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Values by option of nested ones; an option may stand in its group or in none.

    Raises:
        InputError: an option is unknown, given twice, or stands in another group.
    """
    known = options_of(config_class)
    found: dict[str, Any] = {}
    for key, value in values.items():
        group = key.replace("-", "_") if isinstance(value, Mapping) else None
        for given, one in [(key, value)] if group is None else value.items():
            name = given.replace("-", "_")
            if name not in known:
                raise InputError(f"{source}: unknown option {given!r}{nearest(name, known)}")
            if group not in (None, known[name].group):
                place = f"[{known[name].group}]" if known[name].group else "no group"
                raise InputError(
                    f"{source}: option {given!r} is not of the group [{key}]; it stands in {place}"
                )
            if name in found:
                raise InputError(f"{source}: option {given!r} is given twice")
            found[name] = one
    return found


def nearest(name: str, names: Iterable[str]) -> str:
    """A question that names the nearest of some names, if one is near."""
    near = difflib.get_close_matches(name, sorted(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def to_dict(config: Any) -> dict[str, Any]:
    """The options as nested plain values; unset ones (None) are left out."""
    return pydantic_core.to_jsonable_python(config, exclude_none=True)


def read_toml(path: Path, config_class: type) -> dict[str, Any]:
    """Values by option of a TOML file, checked; options that are required may lack.

    Raises:
        InputError: the file is missing or no TOML, or an option of it cannot be used.
    """
    try:
        loaded = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a TOML file: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    from_dict(config_class, loaded, str(path), partial=True)
    return flat(config_class, loaded, str(path))


def write_toml(config: Any, path: Path) -> None:
    """Write the options where :func:`read_toml` can read them."""
    import tomli_w

    values = to_dict(config)
    for name in NOT_SAVED:
        values.get("run", {}).pop(name, None)
    path.write_text(tomli_w.dumps(values), encoding="utf-8")


def check(config: Any) -> None:
    """Refuse, before any work, what means nothing, is not there or cannot be written."""
    run = getattr(config, "run", None)
    for option in options_of(type(config)).values():
        path = getattr(getattr(config, option.group, config), option.name)
        if path is not None and "file" in option.schema:
            check_input(path, option.schema["file"])
        # A checkpoint has the weights of the encoder that a run began with.
        if path is not None and "model" in option.schema and not (run and run.resume_from):
            model_file(path)
    if run:
        check_run_output(run.output_dir, run.overwrite, run.resume_from)
    elif getattr(config, "output", None):
        check_file_output(config.output, config.overwrite)
    config.check()
