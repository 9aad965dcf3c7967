"""State files: typed, whole or not at all, and absent where they are damaged."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from workspace.core import records
from workspace.core.records import DecodeError, Document, NewerSchema

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Part:
    path: str
    size: int


@dataclass(frozen=True)
class State(records.Record, schema=2):
    name: str
    level: Literal["quick", "full"]
    parts: tuple[Part, ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def upgrade(cls, document: Document) -> Document:
        return document if "name" in document else {**document, "name": document["called"]}


@dataclass(frozen=True)
class Even:
    number: int

    def __post_init__(self) -> None:
        if self.number % 2:
            raise ValueError("the number is odd")


def written(folder: Path, content: object) -> Path:
    path = folder / "state.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    state = State("a", "quick", (Part("x", 3),), {"cuda": "13.0"})
    path = tmp_path / "below" / "state.json"
    records.write(path, state, mode=0o600)
    assert records.read(path, State) == state
    assert json.loads(path.read_text())["schema"] == 2
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_missing_file_is_absent_without_a_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert records.read(tmp_path / "none", State) is None
    assert records.read(tmp_path / "file" / "below", State) is None
    assert records.load(tmp_path / "none", State) is None
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "not valid JSON from line 1 on"),
        ('{"schema": 2,\n', "not valid JSON from line 2 on"),
        ("[" * 100_000, "nested too deeply"),
        ("1" * 5_000, "digits"),
        ([], "not a JSON object"),
        ({"name": "a", "level": "full"}, "schema is missing"),
        ({"schema": True, "name": "a", "level": "full"}, "schema is missing"),
        ({"schema": 2, "name": "a"}, "missing required field `level`"),
        ({"schema": 2, "name": "a", "level": "other"}, "$.level"),
        ({"schema": 2, "name": 1, "level": "full"}, "Expected `str`, got `int` - at `$.name`"),
        (
            {"schema": 2, "name": "a", "level": "full", "parts": [{"path": "x", "size": "3"}]},
            "$.parts[0].size",
        ),
        ({"schema": 2, "name": "a", "level": "full", "inputs": {"cuda": None}}, "$.inputs[...]"),
    ],
)
def test_a_damaged_file_is_absent_and_its_fault_is_reported_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: object, fault: str
) -> None:
    path = written(tmp_path, content)
    assert records.read(path, State) is None
    assert records.read(path, State) is None
    reported = capfd.readouterr().err.splitlines()
    assert len(reported) == 1
    assert reported[0].startswith(f"warning: {path} is damaged and counts as absent: ")
    assert fault in reported[0]
    with pytest.raises(DecodeError, match=r".") as found:
        records.load(path, State)
    assert fault in str(found.value)
    assert path.exists()


def test_a_newer_schema_is_no_damage(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, {"schema": 3})
    with pytest.raises(NewerSchema):
        records.load(path, State)
    assert records.read(path, State) is None
    assert capfd.readouterr().err == (
        f"warning: {path} counts as absent: it has schema 3, and this workspace reads schema 2:"
        " a newer workspace wrote it\n"
    )


def test_a_file_that_blocks_its_reader_is_damaged(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert records.read(tmp_path / "pipe", State) is None
    assert records.read(tmp_path, State) is None
    assert "not a regular file" in capfd.readouterr().err


def test_an_older_form_is_upgraded_and_unknown_keys_are_ignored(tmp_path: Path) -> None:
    document = {"schema": 1, "called": "a", "level": "full", "of another edition": 1}
    assert records.read(written(tmp_path, document), State) == State("a", "full")


def test_a_check_of_the_type_itself_is_a_fault_with_its_place() -> None:
    assert records.decode('[{"number": 2}]', list[Even]) == [Even(2)]
    with pytest.raises(DecodeError, match=r"the number is odd - at `\$\[1\]`"):
        records.decode('[{"number": 2}, {"number": 3}]', list[Even])


def test_names_that_are_no_unicode_and_numbers_that_are_none_survive() -> None:
    # What a probe prints, and what os.fsdecode makes of a file name.
    assert str(records.parse('{"loss": NaN}')) == "{'loss': nan}"
    names = {"\udcff.cu": "1"}
    assert records.decode(records.encode(names), dict[str, str]) == names


def test_a_record_is_never_written_as_something_that_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        records.write(tmp_path / "state.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_bytes_and_toml_have_the_same_exception() -> None:
    assert records.parse_toml(b'a = "1"') == {"a": "1"}
    for text in (b"\xff", "a = ", "a = " + "[" * 100_000):
        with pytest.raises(DecodeError):
            records.parse_toml(text)
    with pytest.raises(DecodeError, match="UTF-8"):
        records.parse(b'"\xff"')


def test_msgspec_is_imported_with_the_first_typed_record_only() -> None:
    program = (
        "import sys; from workspace.core import records; records.parse('{}');"
        " sys.exit('msgspec' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
