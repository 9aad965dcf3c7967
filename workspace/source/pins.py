"""What the workspace is made from: vendor/pins.toml, each input proven by a commit or a hash."""

import re
import reprlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from workspace.core.errors import SettingsError
from workspace.core.files import read_regular

COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FILENAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
# What git takes for the name of a tag (git-check-ref-format(1)), of the usual letters.
_TAG = re.compile(r"(?!.*(?:\.\.|//|/\.|\.lock(?:/|$)))[A-Za-z0-9](?:[A-Za-z0-9._/+-]{0,98}[A-Za-z0-9_+-])?")
_ADDRESS = re.compile(r"(?!-)[!-~]{1,1000}")
_HINT = "git checkout -- vendor/pins.toml    brings the committed pins back"
_SHOWN = 80
DONORS = ("cuda-x86_64", "cuda-aarch64", "cpu-x86_64", "cpu-aarch64")


@dataclass(frozen=True)
class Archive:
    """A release archive on the package index, and the one commit that a checkout made from it has."""

    filename: str
    sha256: str
    commit: str
    tree: str


@dataclass(frozen=True)
class Donor:
    """A wheel on the package index whose compiled libraries are taken."""

    project: str
    version: str
    filename: str
    sha256: str


@dataclass(frozen=True)
class Pin:
    """One upstream project at one commit. `donors` are keyed by device and machine, such as cpu-aarch64."""

    name: str
    tag: str
    version: str
    commit: str
    url: str
    archive: Archive | None
    donors: Mapping[str, Donor]


@dataclass(frozen=True)
class Pins:
    vllm: Pin
    triton: Pin


@dataclass(frozen=True)
class _Table:
    """A table of the file and its name, so that every complaint says where."""

    content: Mapping[str, object]
    name: str

    def text(self, key: str, form: re.Pattern[str], expected: str) -> str:
        value = self.content.get(key)
        if value is None:
            raise SettingsError(f"vendor/pins.toml: {self.name}.{key} is missing", hint=_HINT)
        if not isinstance(value, str) or not form.fullmatch(value):
            raise SettingsError(f"vendor/pins.toml: {self.name}.{key} is {_shown(value)}, expected {expected}", hint=_HINT)
        return value

    def commit(self, key: str) -> str:
        return self.text(key, COMMIT, "40 lower-case hex digits")

    def sha256(self, key: str) -> str:
        return self.text(key, _SHA256, "64 lower-case hex digits")

    def filename(self, key: str) -> str:
        return self.text(key, _FILENAME, "a file name")

    def word(self, key: str) -> str:
        return self.text(key, _WORD, "a name or version")

    def table(self, key: str) -> "_Table | None":
        value, name = self.content.get(key), f"{self.name}.{key}".lstrip(".")
        if value is not None and not isinstance(value, dict):
            raise SettingsError(f"vendor/pins.toml: {name} is {_shown(value)}, expected a table", hint=_HINT)
        return None if value is None else _Table(value, name)


def load(path: Path) -> Pins:
    """Read the pins. Raises SettingsError that names the key for anything that is missing or not of its form."""
    try:
        root = _Table(tomllib.loads(read_regular(path).decode()), "")
    except OSError as exc:
        raise SettingsError(f"vendor/pins.toml cannot be read: {exc.strerror}", hint=_HINT) from exc
    except ValueError as exc:
        raise SettingsError(f"vendor/pins.toml is not TOML: {exc}", hint=_HINT) from exc
    except RecursionError as exc:
        raise SettingsError("vendor/pins.toml is not TOML that can be read: it is nested too deeply", hint=_HINT) from exc
    return Pins(_pin(root, "vllm"), _pin(root, "triton"))


def _pin(root: _Table, name: str) -> Pin:
    table = root.table(name)
    if table is None:
        raise SettingsError(f"vendor/pins.toml: the table {name} is missing", hint=_HINT)
    archive = table.table("archive")
    donors = table.table("donors")
    for key in donors.content if donors else ():
        if key not in DONORS:
            shown = key if _WORD.fullmatch(key) else _shown(key)
            raise SettingsError(f"vendor/pins.toml: {name}.donors.{shown} is unknown, expected one of {', '.join(DONORS)}", hint=_HINT)
    return Pin(
        name=name,
        tag=table.text("tag", _TAG, "the name of a tag"),
        version=table.word("version"),
        commit=table.commit("commit"),
        url=table.text("url", _ADDRESS, "an address"),
        archive=Archive(archive.filename("filename"), archive.sha256("sha256"), archive.commit("commit"), archive.commit("tree")) if archive else None,
        donors={key: _donor(donor) for key in DONORS if donors and (donor := donors.table(key))},
    )


def _donor(table: _Table) -> Donor:
    return Donor(table.word("project"), table.word("version"), table.filename("filename"), table.sha256("sha256"))


def _shown(value: object) -> str:
    """The value in short."""
    if isinstance(value, str):
        return repr(value if len(value) <= _SHOWN else f"{value[:_SHOWN]}…")
    try:
        return reprlib.repr(value)
    except ValueError:
        # TOML's hexadecimal numbers may have more digits than Python prints.
        return "a number with too many digits"
