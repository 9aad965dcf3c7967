"""vendor/pins.toml: the shipped file, and refused files."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from workspace.core.errors import SettingsError
from workspace.repo import pins
from workspace.repo.pins import Pin

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "vendor" / "pins.toml"


def test_shipped_pins_have_a_precompiled_wheel_for_every_device_and_machine() -> None:
    shipped = pins.load(SHIPPED)
    assert set(shipped.vllm.precompiled) == set(pins.PRECOMPILED_KEYS)
    assert shipped.vllm.archive
    assert shipped.triton.archive is None
    for key, precompiled_wheel in shipped.vllm.precompiled.items():
        assert key.split("-")[1] in precompiled_wheel.filename
        assert precompiled_wheel.version == shipped.vllm.version
        assert precompiled_wheel.version in precompiled_wheel.filename


def test_submodule_comes_from_where_the_pin_says() -> None:
    output = re.search(r"url = (\S+)", (ROOT / ".gitmodules").read_text(encoding="utf-8"))
    assert output
    assert output[1] == pins.load(SHIPPED).vllm.url


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('commit = "db95', 'comit = "db95', r"field `commit` - at `\$\.vllm`"),
        ('commit = "db95', 'commit = "db9', r"vllm\.commit is .* expected 40"),
        ('commit = "db95', 'commit = "DB95', r"vllm\.commit is .* lower-case"),
        ('sha256 = "dde4', 'sha256 = "dde', r"vllm\.archive\.sha256 is .* expected 64"),
        ('sha256 = "c11e', 'sha256 = "zzzz', r"vllm\.precompiled\.cpu-aarch64\.sha256"),
        ('tag = "v0.31.0"', "tag = 31", r"got `int` - at `\$\.vllm\.tag`"),
        ('tag = "v0.31.0"', 'tag = "--upload-pack=evil"', r"vllm\.tag is"),
        ('filename = "vllm-0.31.0.tar.gz"', 'filename = "../../evil"', r"vllm\.archive\.filename"),
        ("[triton]", "[triton.archive]\n[triton]", r"field `filename` - at `\$\.triton\.archive`"),
        (
            "[vllm.precompiled.cpu-aarch64]",
            "[vllm.precompiled.cpu-arm64]",
            r"vllm\.precompiled\.cpu-arm64 is unknown",
        ),
        ("[triton]", "[tritium]", "field `triton`"),
        ("[triton]", "triton = 3\n[x]", "triton"),
        ("[vllm]", "[vllm", "line 3"),
    ],
)
def test_missing_or_invalid_key_is_named(
    tmp_path: Path, old: str, new: str, complaint: str
) -> None:
    text = SHIPPED.read_text(encoding="utf-8")
    assert old in text
    broken = tmp_path / "pins.toml"
    broken.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(SettingsError, match=complaint):
        pins.load(broken)


def test_pins_of_the_first_edition_are_read_and_rewritten_with_current_names() -> None:
    today = SHIPPED.read_bytes()
    former = today.replace(b".precompiled.", b".donors.")
    assert former != today
    assert pins.parse(former) == pins.parse(today)
    assert pins.dump(former, moved(today)) == pins.dump(today, moved(today))


def moved(before: bytes) -> Pin:
    return replace(pins.parse(before).vllm, tag="v9.9.9", version="9.9.9", commit="9" * 40)


def test_another_pin_changes_values_only_and_every_comment_stays() -> None:
    before = SHIPPED.read_bytes()
    pin = moved(before)
    after = pins.dump(before, pin)
    assert pins.parse(after) == replace(pins.parse(before), vllm=pin)
    changed = [
        new
        for old, new in zip(before.decode().splitlines(), after.decode().splitlines(), strict=True)
        if old != new
    ]
    assert changed == ['tag = "v9.9.9"', 'version = "9.9.9"', f'commit = "{"9" * 40}"']
    assert pins.dump(after, pins.parse(before).vllm) == before


def test_tables_follow_archive_and_precompiled_and_the_next_project_keeps_its_comment() -> None:
    before = SHIPPED.read_bytes()
    pin = replace(moved(before), archive=None, precompiled={})
    after = pins.dump(before, pin)
    assert b"precompiled" not in after
    assert b"[vllm.archive]" not in after
    lines = after.decode().splitlines()
    assert lines[lines.index("[triton]") + 1].startswith("#")
    whole = pins.dump(after, moved(before))
    assert pins.parse(whole).vllm == moved(before)
    assert whole.index(b"[vllm.precompiled.cpu-aarch64]") < whole.index(b"[triton]")


def test_triton_moves_alone() -> None:
    before = SHIPPED.read_bytes()
    after = pins.dump(before, replace(pins.parse(before).triton, commit="1" * 40))
    assert (pins.parse(after).vllm, pins.parse(after).triton.commit) == (
        pins.parse(before).vllm,
        "1" * 40,
    )


def test_inline_tables_are_rewritten_too() -> None:
    before = SHIPPED.read_bytes()
    known = pins.parse(before)
    inline = "".join(
        f'{pin.name} = {{ tag = "{pin.tag}", version = "{pin.version}", commit = "{pin.commit}",'
        f' url = "{pin.url}" }}\n'
        for pin in (known.vllm, known.triton)
    ).encode()
    assert pins.parse(pins.dump(inline, moved(before))).vllm == moved(before)
