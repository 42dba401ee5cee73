"""Frozen dataclasses to plain JSON data and back, strictly.

Only what the value types use: dataclasses, enums, tuples, optionals, unions of scalars, and scalars.
The runtime stands on these values, so this is standard library only.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import types
import typing
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from pagedgen.errors import InvalidValue, MalformedFile

T = TypeVar("T")
# Metadata of a dataclass field that came later: left out where it holds its default, so that what was
# written before it reads, and hashes, as it did.
OMIT_DEFAULT = {"omit_default": True}


def encode(value: object) -> Any:
    """JSON data of a value; fields that hold their default are kept, so a file reads on its own.

    But those that are marked with :data:`OMIT_DEFAULT`.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: encode(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if f.init and not (f.metadata.get("omit_default") and getattr(value, f.name) == f.default)
        }
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"no JSON form for {type(value).__name__}")


def decode(cls: type[T], data: Any, where: str = "") -> T:
    """The value of type ``cls`` that ``data`` encodes.

    Raises:
        InvalidValue: a field is missing, unknown, of the wrong type, or refused by the value itself.
    """
    return typing.cast(T, _decode(cls, data, where or cls.__name__))


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _decode(kind: Any, data: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(data, dict):
            raise InvalidValue(where, data, "an object is expected")
        fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
        for name in data:
            if name not in fields:
                known = ", ".join(fields)
                raise InvalidValue(f"{where}.{name}", data[name], f"no such field; known: {known}")
        hints = _hints(kind)
        values = {}
        for name, field in fields.items():
            if name in data:
                values[name] = _decode(hints[name], data[name], f"{where}.{name}")
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise InvalidValue(f"{where}.{name}", None, "the field is missing")
        return kind(**values)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(kind)
        if data is None and type(None) in options:
            return None
        for option in options:
            try:
                return _decode(option, data, where)
            except InvalidValue:
                continue
        raise InvalidValue(where, data, f"expected one of {', '.join(str(o) for o in options)}")
    if origin is typing.Literal:
        if data not in typing.get_args(kind):
            raise InvalidValue(where, data, f"allowed: {', '.join(map(str, typing.get_args(kind)))}")
        return data
    if origin is tuple:
        if not isinstance(data, list | tuple):
            raise InvalidValue(where, data, "a list is expected")
        args = typing.get_args(kind)
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
        if len(args) != len(data):
            raise InvalidValue(where, data, f"{len(args)} items are expected")
        pairs = enumerate(zip(args, data, strict=True))
        return tuple(_decode(arg, item, f"{where}[{i}]") for i, (arg, item) in pairs)
    if isinstance(kind, type) and issubclass(kind, Enum):
        try:
            return kind(data)
        except ValueError:
            raise InvalidValue(where, data, f"allowed: {', '.join(str(m.value) for m in kind)}") from None
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if isinstance(kind, type) and type(data) is kind:
        return data
    raise InvalidValue(where, data, f"{getattr(kind, '__name__', kind)} is expected")


def dumps(value: object) -> str:
    """Readable, stable JSON text with a final newline."""
    return json.dumps(encode(value), indent=2, ensure_ascii=False) + "\n"


def load_file(cls: type[T], path: Path) -> T:
    """Read a value from a JSON file.

    Raises:
        MalformedFile: not JSON, or not a ``cls``; names the place.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MalformedFile(path, "JSON", str(error)) from error
    try:
        return decode(cls, data)
    except InvalidValue as error:
        raise MalformedFile(path, error.field, f"{error.value!r}: {error.allowed}") from error


def content_hash(value: object) -> str:
    """First 16 hex digits of the SHA-256 of a value's canonical JSON."""
    text = json.dumps(encode(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
