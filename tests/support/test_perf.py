"""The session perf in small clones, built and unbuilt: table, record and exit code.

The user's files do not change.
"""

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.small.world import Ended, World
from workspace.core.console import NAME_WIDTH
from workspace.core.errors import SourceError
from workspace.repo import pins
from workspace.support import perf_pairs
from workspace.support.perf import ROWS


def tools(world: World) -> Path:
    """Give the clone a tool environment that borrows the packages of this test run."""
    if not world.layout.tools.exists():
        uv = world.materials.bin / "uv"
        subprocess.run(
            [
                uv,
                "venv",
                "--quiet",
                "--relocatable",
                "--python",
                sys.executable,
                world.layout.tools,
            ],
            env=world.env,
            check=True,
        )
        packages = next(world.layout.tools.glob("lib/python3.*/site-packages"))
        (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
        shutil.copyfile(
            world.root / "requirements" / "tools.txt", world.layout.tools / "requirements.txt"
        )
    return world.layout.tools / "bin" / "python"


def perf(world: World, *args: str) -> Ended:
    asked = ("--json", "-") if "--json" not in args else ()
    argv = [tools(world), "-m", "workspace.cli.sessions", "perf", *asked, *args]
    done = subprocess.run(
        argv,
        env=world.env,
        cwd=world.root,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def rows_of(ended: Ended) -> dict[str, dict[str, object]]:
    return {row["name"]: row for row in json.loads(ended.out)["rows"]}


def kept(world: World) -> dict[str, tuple[int, int, int, int]]:
    """Return the user's tree and the built environment, without bytecode."""
    return {
        name: fact
        for name, fact in world.listing().items()
        if name.startswith(("./vendor", "vendor", "./.vllm", ".vllm")) and "__pycache__" not in name
    }


def test_cheap_rows_are_measured_in_an_unbuilt_clone_and_the_others_name_bootstrap(
    world: World,
) -> None:
    ended = perf(world, "--row", "list", "--row", "status", "--row", "no-op", "--repeat", "1")
    assert "not measured" in ended.err
    assert "2 of 3 rows could not be measured: status, no-op" in ended.error(7)
    assert "hint: ./scripts/inv bootstrap" in ended.err
    rows = rows_of(ended)
    assert rows["list"]["verdict"] in ("met", "missed")
    assert "not built" in str(rows["no-op"]["error"])
    assert json.loads((world.layout.state / "perf.json").read_text()) == json.loads(ended.out)
    assert not list(world.layout.state.glob(".perf*"))


def test_a_wrong_row_or_count_is_misuse(world: World) -> None:
    for args in (("--row", "speed"), ("--repeat", "0"), ("--repeat", "many")):
        ended = perf(world, *args)
        assert (ended.code, ended.out) == (2, "")
        assert "Traceback" not in ended.err


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_names_of_rows_are_single_and_fit_their_column(row) -> None:
    assert [other.name for other in ROWS].count(row.name) == 1
    assert len(row.name) < NAME_WIDTH


def test_pins_without_an_archive_are_refused_with_a_look_at_what_changed(world: World) -> None:
    text = world.layout.pins.read_text()
    head, _, rest = text.partition("[vllm.archive]\n")
    world.layout.pins.write_text(head + rest[rest.index("[") :])
    with pytest.raises(SourceError, match="has no release archive of vllm") as caught:
        perf_pairs._archive(pins.load(world.layout.pins).vllm)
    assert caught.value.hint
    done = subprocess.run(
        caught.value.hint.split(), cwd=world.root, capture_output=True, text=True, check=True
    )
    assert "\n-[vllm.archive]\n" in done.stdout
