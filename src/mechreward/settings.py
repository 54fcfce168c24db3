"""Strict records of settings, the same in YAML, on the command line and in Python; any room may define one.

A record is a frozen pydantic model: flat, unknown fields are errors, and each field's docstring is its help. What is
wrong comes out as one `InputError`, here and nowhere else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from pydantic_core import ErrorDetails, to_jsonable_python

from mechreward.errors import InputError

Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def check_signs(signs: str, n_features: int) -> None:
    """Raises InputError where a pack has fewer features than it needs: 1, or 2 if there is to be one of each sign."""
    least = 2 if signs == "balanced" else 1
    if n_features < least:
        raise InputError(f"n_features: {n_features} is not allowed, it must be at least {least} with signs {signs}")


class Settings(BaseModel):
    """A frozen record without unknown fields, whose fields are documented by the docstrings under them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @field_validator("*")
    @classmethod
    def _home(cls, value: Any) -> Any:
        # A shell expands `~` neither in a YAML file nor after `--out=`, where it would name a folder `~`.
        return value.expanduser() if isinstance(value, Path) else value


SettingsT = TypeVar("SettingsT", bound=Settings)


def defaults(kind: type[Settings]) -> dict[str, Any]:
    """What the fields of a record are if left out, as plain values; without those that are needed."""
    given = {name: field for name, field in kind.model_fields.items() if not field.is_required()}
    return {name: to_jsonable_python(field.get_default(call_default_factory=True)) for name, field in given.items()}


def make_settings(kind: type[SettingsT], values: dict[str, Any]) -> SettingsT:
    """Builds a record.

    Raises:
        InputError: naming the first bad field, its value and what is allowed.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        raise InputError(_first_error(kind, error)) from error


def read_fields(kind: type[Settings], path: str | Path) -> dict[str, Any]:
    """Reads a YAML file of some of a record's fields, each as its own type.

    Raises:
        InputError: if the file cannot be read, is not a YAML mapping, or holds an unknown field or a value that its
            field does not allow.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        _check_keys(yaml.compose(text, Loader=yaml.SafeLoader))
        values = yaml.safe_load(text)
    except FileNotFoundError as error:
        raise InputError(f"config: there is no file {path}") from error
    except OSError as error:
        raise InputError(f"config: cannot read {path} ({error.strerror}); name a YAML file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"config: {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: of a date that there is not, such as 2026-02-30
        raise InputError(f"config: {path} is not valid YAML ({str(error).splitlines()[0]})") from error
    if values is None:
        raise InputError(f"config: {path} is empty; write a field a line, such as `limit: 100`")
    if not isinstance(values, dict):
        raise InputError(f"config: {path} holds {type(values).__name__}, where a mapping of fields is needed")
    unknown = [field for field in values if field not in kind.model_fields]
    if unknown:
        raise InputError(_no_such(kind, unknown[0]))
    return {name: _of_its_type(kind, name, value) for name, value in values.items()}


def _check_keys(root: yaml.Node | None) -> None:
    """Raises YAMLError where a key of a record, or of a mapping in it, stands twice: PyYAML takes the last silently."""
    fields = root.value if isinstance(root, yaml.MappingNode) else []
    for mapping in [root, *(value for _, value in fields)]:
        names = [name for name, _ in mapping.value] if isinstance(mapping, yaml.MappingNode) else []
        for at, name in enumerate(names):
            if name.value in [earlier.value for earlier in names[:at]]:
                raise yaml.YAMLError(f"line {name.start_mark.line + 1} gives {name.value!r} a second time")


def _of_its_type(kind: type[Settings], name: str, value: object) -> Any:
    """A field's value by itself: YAML reads `1e-5` as text, and has lists where records have tuples."""
    info = kind.model_fields[name]
    try:
        return TypeAdapter(Annotated[info.annotation, info]).validate_python(value)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, (name, *first["loc"])))
        raise InputError(_not_allowed(field, first)) from error


def _not_allowed(field: str, complaint: ErrorDetails) -> str:
    return f"{field}: {complaint['input']!r} is not allowed ({complaint['msg']})"


def _no_such(kind: type[Settings], field: object) -> str:
    return f"{field}: there is no such field; there are {', '.join(kind.model_fields)}"


def _first_error(kind: type[Settings], error: ValidationError) -> str:
    """The first of pydantic's complaints as one sentence."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return _no_such(kind, field)
    if first["type"] == "missing":
        return f"{field}: is needed and was not given"
    if not field:  # a rule about several fields names them itself
        return str(first["ctx"]["error"])
    return _not_allowed(field, first)
