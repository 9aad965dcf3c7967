"""State files as typed records, and the only decoder of JSON and TOML.

A record is a frozen dataclass and lies in one JSON file, which appears whole or not at all. A
damaged file counts as absent, and is reported. msgspec checks the types; it is imported with the
first typed record, because the import costs 30 ms.
"""

import datetime
import functools
import json
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from workspace.core.errors import printable
from workspace.core.files import read_regular, write_atomic

T = TypeVar("T")
Document = dict[str, object]


class DecodeError(ValueError):
    """A text that is no JSON or TOML, or not of the expected type; the message names the fault."""


class NewerSchema(DecodeError):
    """A record of a newer workspace; the message is a sentence without its subject, the file."""


class Record:
    """Base of the dataclasses whose file has a version, as its key `schema`, or older forms.

    `class Stamp(Record, schema=1)` is a dataclass of version 1.
    """

    SCHEMA: ClassVar[int | None] = None

    def __init_subclass__(cls, *, schema: int | None = None) -> None:
        cls.SCHEMA = schema

    @classmethod
    def upgrade(cls, document: Document) -> Document:
        """Return a document of an older edition in today's form."""
        return document

    def validate(self) -> None:
        """Check what types cannot express. Raises DecodeError."""


def utc_now() -> str:
    """Return the present time as a record has it: ISO 8601 in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def parse(text: bytes | str) -> object:
    """Return the content of a JSON text. Raises DecodeError. NaN and infinity are allowed."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as exc:
        raise DecodeError(f"it is not valid JSON from line {exc.lineno} on") from exc
    except UnicodeDecodeError as exc:
        raise DecodeError("it is not UTF-8") from exc
    except ValueError as exc:
        # An integer of more digits than Python converts (sys.set_int_max_str_digits).
        raise DecodeError(str(exc)) from exc
    except RecursionError as exc:
        raise DecodeError("it is nested too deeply") from exc


def parse_toml(text: bytes | str) -> Document:
    """Return the content of a TOML text. Raises DecodeError."""
    try:
        return tomllib.loads(text if isinstance(text, str) else text.decode())
    except UnicodeDecodeError as exc:
        raise DecodeError("it is not UTF-8") from exc
    except ValueError as exc:
        raise DecodeError(str(exc)) from exc
    except RecursionError as exc:
        raise DecodeError("it is nested too deeply") from exc


def decode(text: bytes | str, kind: type[T]) -> T:
    """Return a JSON text as a value of the type `kind`; unknown keys are ignored.

    Raises DecodeError, and NewerSchema for a record of a newer workspace.
    """
    return convert(parse(text), kind)


def convert(document: object, kind: type[T]) -> T:
    """Return parsed JSON or TOML as a value of the type `kind`. Raises as `decode` does."""
    import msgspec

    try:
        record = msgspec.convert(_upgraded(document, kind), kind)
    except (msgspec.ValidationError, RecursionError) as exc:
        raise DecodeError(str(exc)) from exc
    if isinstance(record, Record):
        record.validate()
    return record


def _upgraded(document: object, kind: object) -> object:
    # A generic alias, dict[str, str], is no type.
    if not isinstance(kind, type) or not issubclass(kind, Record):
        return document
    if not isinstance(document, dict):
        raise DecodeError("it is not a JSON object")
    if kind.SCHEMA is not None:
        schema = document.get("schema")
        if isinstance(schema, bool) or not isinstance(schema, int) or schema < 1:
            raise DecodeError("schema is missing or is not a number")
        if schema > kind.SCHEMA:
            raise NewerSchema(
                f"it has schema {schema}, and this workspace reads schema {kind.SCHEMA}: a newer"
                " workspace wrote it"
            )
    return kind.upgrade(document)


def load(path: Path, kind: type[T]) -> T | None:
    """Return the content of a JSON file, None where there is no file.

    Raises DecodeError where the file cannot be read or is damaged.
    """
    try:
        return decode(read_regular(path), kind)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        raise DecodeError(exc.strerror or str(exc)) from exc


def read(path: Path, kind: type[T]) -> T | None:
    """Return the content of a JSON file, None where there is no file or a damaged one.

    A damaged file is reported on stderr, once a process.
    """
    try:
        return load(path, kind)
    except NewerSchema as exc:
        _warn(f"{path} counts as absent: {exc}")
    except DecodeError as exc:
        _warn(f"{path} is damaged and counts as absent: {exc}")
    return None


@functools.cache
def _warn(sentence: str) -> None:
    print(f"warning: {printable(sentence)}", file=sys.stderr, flush=True)


def _fields(record: Any) -> dict[str, object]:
    return asdict(record)


def encode(record: object, *, indent: int | None = 1) -> bytes:
    """Return a record, a dataclass or a mapping, as JSON. Raises ValueError for NaN."""
    document = dict(record) if isinstance(record, Mapping) else _fields(record)
    if isinstance(record, Record) and record.SCHEMA is not None:
        document = {"schema": record.SCHEMA, **document}
    return (json.dumps(document, indent=indent, allow_nan=False) + "\n").encode()


def write(path: Path, record: object, *, indent: int | None = 1, mode: int = 0o644) -> None:
    """Write a record to its file, whole or not at all. Raises OSError."""
    write_atomic(path, encode(record, indent=indent), mode=mode)
