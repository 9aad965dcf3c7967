import json
import sys
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from workspace.core.errors import SettingsError, ToolchainError
from workspace.machine import interpreter

SUPPORTED = SpecifierSet(">=3.10,<3.15")
FIND = """import sys
from packaging.specifiers import SpecifierSet
request = sys.argv[-1]
wanted = SpecifierSet(request if request[0] in "<>=" else "==" + request + ".*")
found = [path for version, path in {paths} if version in wanted]
sys.exit(print(found[0]) if found else "error: No interpreter found for " + request)"""
FETCH = "echo fetch >> {record}; exit 1"


class Pythons:
    """A fake uv that finds the first fitting of the given Pythons, and fake interpreters."""

    def __init__(self, house) -> None:
        self.house, self.record = house, house.layout.root.parent / "fetched"
        self.paths: list[tuple[str, str]] = []
        (house.layout.tools / "bin" / "uv").unlink()
        self.install = FETCH.format(record=self.record)
        self.write()

    def add(
        self,
        version: str,
        *,
        name: str | None = None,
        headers: bool = True,
        runs: bool = True,
        level: str = "final",
    ) -> Path:
        home = self.house.layout.root.parent / (name or f"python-{version}")
        (home / "include").mkdir(parents=True, exist_ok=True)
        if headers:
            (home / "include" / "Python.h").touch()
        output = {
            "version": version,
            "level": level,
            "include": str(home / "include"),
            "prefix": str(home),
            "base": str(home),
            "executable": str(home / "bin" / "python"),
        }
        path = self.house.program(
            "python",
            (
                f"echo '{json.dumps(output)}'"
                if runs
                else "echo 'pyenv: command not found' >&2; exit 127"
            ),
            folder=home / "bin",
        )
        self.paths.append((version, str(path)))
        self.write()
        return path

    def write(self) -> None:
        script = FIND.format(paths=self.paths, install=self.install)
        self.house.program(
            "uv",
            f'if [ "$2" = install ]; then {self.install}\nfi\n'
            f"exec {sys.executable} - \"$@\" <<'END'\n{script}\nEND",
            folder=self.house.layout.tools / "bin",
        )

    def fetches(self) -> int:
        return len(self.record.read_text().splitlines()) if self.record.exists() else 0

    def choose(
        self,
        *,
        wheels: frozenset[str] | None = None,
        supported: SpecifierSet = SUPPORTED,
        **shell: str,
    ) -> interpreter.Choice:
        return interpreter.choose(
            self.house.layout,
            self.house.settings(**shell),
            supported=supported,
            wheel_pythons=wheels,
        )


@pytest.fixture
def pythons(house) -> Pythons:
    return Pythons(house)


def test_preferred_python_is_taken_without_a_reason_beside_a_newer_one(pythons):
    pythons.add("3.13.1")
    wanted = pythons.add("3.12.4")
    assert pythons.choose() == interpreter.Choice(wanted, "3.12.4", "")
    assert pythons.fetches() == 0


def test_missing_preferred_python_is_fetched_and_the_reason_names_it(pythons):
    pythons.add("3.11.9")
    pythons.add("3.10.1")
    choice = pythons.choose()
    assert choice.version == "3.11.9"
    assert "instead of 3.12" in choice.reason
    assert pythons.fetches() == 1


def test_fetched_python_is_preferred_and_needs_no_reason(pythons):
    pythons.add("3.11.9")
    wanted = pythons.add("3.12.7")
    fetched = pythons.paths.pop()
    uv = pythons.house.layout.tools / "bin" / "uv"
    later = str(uv) + ".later"
    pythons.paths.append(fetched)
    pythons.write()
    uv.rename(later)
    pythons.paths.remove(fetched)
    pythons.install = f'mv "{later}" "$0"; exit 0'
    pythons.write()
    assert pythons.choose() == interpreter.Choice(wanted, "3.12.7", "")


def test_local_torch_wheel_decides_and_nothing_is_fetched(pythons):
    pythons.add("3.13.0")
    pythons.add("3.11.7")
    choice = pythons.choose(wheels=frozenset({"3.11"}))
    assert choice.version == "3.11.7"
    assert "local torch wheel fits 3.11 only" in choice.reason
    assert pythons.fetches() == 0


def test_local_torch_wheel_for_a_missing_python_does_not_decide(pythons):
    pythons.add("3.12.4")
    assert pythons.choose(wheels=frozenset({"3.10"})).reason == ""


@pytest.mark.parametrize("broken", [{"runs": False}, {"level": "candidate"}])
def test_python_that_does_not_run_or_is_no_final_release_is_skipped(pythons, broken):
    pythons.add("3.12.9", **broken)
    wanted = pythons.add("3.13.1")
    pythons.paths.sort(reverse=True)
    pythons.write()
    assert pythons.choose().path == wanted


def test_unsupported_preference_is_neither_fetched_nor_taken(pythons):
    pythons.add("3.9.18")
    pythons.add("3.11.2")
    choice = pythons.choose(PYTHON_VERSION="3.9")
    assert choice.version == "3.11.2"
    assert "does not support" in choice.reason
    assert pythons.fetches() == 0


def test_no_supported_python_is_an_error_with_the_command_that_gets_one(pythons):
    pythons.add("3.9.18")
    with pytest.raises(ToolchainError, match=r"no Python <3\.15,>=3\.10 is installed") as caught:
        pythons.choose()
    assert "uv python install 3.12" in caught.value.hint


def test_python_version_that_is_no_version_is_a_settings_error(pythons):
    with pytest.raises(SettingsError, match="latest.* is not a version of Python 3"):
        pythons.choose(PYTHON_VERSION="latest")


def test_uv_that_fails_is_an_error_with_its_own_line(pythons):
    broken = "echo 'a library is damaged' >&2; exit 1"
    pythons.house.program("uv", broken, folder=pythons.house.layout.tools / "bin")
    with pytest.raises(ToolchainError, match="uv python find fails: a library is damaged"):
        pythons.choose()


def test_missing_uv_is_an_error_that_names_both_places(house, monkeypatch):
    (house.layout.tools / "bin" / "uv").unlink()
    monkeypatch.setenv("PATH", str(house.bin))
    with pytest.raises(ToolchainError, match="uv is missing"):
        interpreter.uv(house.layout)
    own = house.program("uv", "")
    assert interpreter.uv(house.layout) == own


def test_made_environment_is_described_and_making_it_again_touches_nothing(house, built):
    settings = built()
    facts = interpreter.describe(house.layout, settings)
    assert facts is not None
    assert facts.version == ".".join(str(part) for part in sys.version_info[:3])
    assert facts.base == Path(sys.base_prefix)
    before = {path: path.lstat().st_mtime_ns for path in house.layout.environment.rglob("*")}
    built()
    assert {
        path: path.lstat().st_mtime_ns for path in house.layout.environment.rglob("*")
    } == before


def test_partial_environment_of_ours_is_made_again_without_its_stamps(house, built):
    marker = house.layout.environment / ".workspace" / "made-here"
    marker.parent.mkdir(parents=True)
    marker.touch()
    house.layout.stamp("vllm").write_text("{}")
    (house.layout.environment / "bin").mkdir()
    (house.layout.environment / "lib").write_text("half")
    settings = built()
    assert interpreter.describe(house.layout, settings) is not None
    assert not house.layout.stamp("vllm").exists()
    assert marker.exists()


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link", "broken environment"])
def test_foreign_file_at_the_path_of_the_environment_is_left_alone(house, built, kind):
    place = house.layout.environment
    if kind == "file":
        place.write_text("mine")
    elif kind == "dangling link":
        place.symlink_to("/nonexistent/elsewhere")
    else:
        (place / "bin").mkdir(parents=True)
        (place / "notes.txt").write_text("mine")
        if kind == "broken environment":
            (place / "bin" / "python").symlink_to("/nonexistent/python")
    with pytest.raises(ToolchainError) as caught:
        built()
    assert caught.value.hint.startswith("mv -T --backup=numbered .vllm .vllm.old")
    assert place.is_symlink() or place.is_file() or (place / "notes.txt").read_text() == "mine"


def test_working_environment_of_the_user_is_kept(house, built):
    built()
    (house.layout.environment / ".workspace" / "made-here").unlink()
    (house.layout.environment / "notes.txt").write_text("mine")
    built()
    assert (house.layout.environment / "notes.txt").read_text() == "mine"


def test_python_that_belongs_to_another_environment_is_no_environment(house):
    (house.layout.environment / "bin").mkdir(parents=True)
    (house.layout.environment / "bin" / "python").symlink_to(sys.executable)
    assert interpreter.describe(house.layout, house.settings()) is None


def test_environment_whose_python_is_gone_is_missing(house, built):
    settings = built()
    house.layout.environment_python.unlink()
    house.layout.environment_python.symlink_to("/nonexistent/python3.12")
    assert interpreter.describe(house.layout, settings) is None
