"""vendor/pins.toml: the shipped one, and what is refused."""

import re
from pathlib import Path

import pytest

from workspace.core.errors import SettingsError
from workspace.source import pins

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "vendor" / "pins.toml"


def test_shipped_pins_have_a_donor_for_every_device_and_machine() -> None:
    shipped = pins.load(SHIPPED)
    assert set(shipped.vllm.donors) == set(pins.DONORS)
    assert shipped.vllm.archive
    assert shipped.triton.archive is None
    for key, donor in shipped.vllm.donors.items():
        assert key.split("-")[1] in donor.filename
        assert donor.version == shipped.vllm.version
        assert donor.version in donor.filename


def test_submodule_comes_from_where_the_pin_says() -> None:
    said = re.search(r"url = (\S+)", (ROOT / ".gitmodules").read_text(encoding="utf-8"))
    assert said
    assert said[1] == pins.load(SHIPPED).vllm.url


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('commit = "db95', 'comit = "db95', r"vllm\.commit is missing"),
        ('commit = "db95', 'commit = "db9', r"vllm\.commit is .* expected 40"),
        ('commit = "db95', 'commit = "DB95', r"vllm\.commit is .* lower-case"),
        ('sha256 = "dde4', 'sha256 = "dde', r"vllm\.archive\.sha256 is .* expected 64"),
        ('sha256 = "c11e', 'sha256 = "zzzz', r"vllm\.donors\.cpu-aarch64\.sha256"),
        ('tag = "v0.31.0"', "tag = 31", r"vllm\.tag is 31"),
        ('tag = "v0.31.0"', 'tag = "--upload-pack=evil"', r"vllm\.tag is"),
        ('filename = "vllm-0.31.0.tar.gz"', 'filename = "../../evil"', r"vllm\.archive\.filename"),
        ("[triton]", "[triton.archive]\n[triton]", r"triton\.archive\.filename is missing"),
        ("[vllm.donors.cpu-aarch64]", "[vllm.donors.cpu-arm64]", r"vllm\.donors\.cpu-arm64 is unknown"),
        ("[triton]", "[tritium]", "table triton is missing"),
        ("[triton]", "triton = 3\n[x]", "not TOML|triton"),
        ("[vllm]", "[vllm", "not TOML"),
    ],
)
def test_anything_missing_or_misshapen_is_named(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    text = SHIPPED.read_text(encoding="utf-8")
    assert old in text
    broken = tmp_path / "pins.toml"
    broken.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(SettingsError, match=complaint):
        pins.load(broken)


def test_table_in_place_of_a_word_and_the_other_way_round(tmp_path: Path) -> None:
    broken = tmp_path / "pins.toml"
    for text in ('vllm = "x"\n', "[vllm.tag]\nx = 1\n", '[vllm]\ntag = "a"\nversion = "1"\ncommit = "' + "0" * 40 + '"\nurl = "u"\ndonors = 3\n'):
        broken.write_text(text, encoding="utf-8")
        with pytest.raises(SettingsError):
            pins.load(broken)


def test_missing_file_is_no_traceback(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        pins.load(tmp_path / "pins.toml")
