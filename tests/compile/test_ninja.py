"""compile(): real ninja and real launchers, with scripted compilers."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.compile.launching import NINJA, ROOT, Site, command_of, until
from workspace.compile import job_server, jobs, ninja
from workspace.compile.project import Unit
from workspace.core import settings
from workspace.core.console import Console, RunLog, Step
from workspace.core.errors import BuildError
from workspace.core.paths import Layout


@dataclass
class Clone:
    """A clone with a build directory that was configured."""

    layout: Layout
    site: Site
    talk: io.StringIO
    shell: dict[str, str]

    @property
    def settings(self) -> settings.Settings:
        return settings.load(self.layout, environ=self.shell)

    @property
    def build(self) -> Path:
        return self.site.folder

    def compile(
        self,
        names: list[str],
        *,
        at_once: int = 4,
        budget_gib: float = 1000.0,
    ) -> ninja.Compiled:
        units = [Unit(f"{name}.cu", f"CMakeFiles/t.dir/{name}.cu.o", "CUDA") for name in names]
        work = ninja.Work.of_units(
            self.build, "s", jobs.Jobs(at_once, 1, ""), jobs.Memory(budget_gib, 0.0, ""), units
        )
        with RunLog(
            Console(out=io.StringIO(), err=self.talk), self.layout.logs, verb="rebuild"
        ) as run_log:
            return ninja.compile(
                self.layout,
                self.settings,
                work,
                ["all"],
                run_log=run_log,
                step=Step("compile"),
            )

    def fails(self, names: list[str], **more) -> BuildError:
        with pytest.raises(BuildError) as caught:
            self.compile(names, **more)
        return caught.value

    @property
    def log(self) -> Path:
        return max(self.layout.logs.glob("*.log"))


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Clone]:
    assert NINJA is not None
    site = Site(tmp_path / ".workspace" / "build" / "cpu-0123")
    tools = tmp_path / "tools"
    tools.mkdir()
    # No compiler or compiler cache of this machine may be used.
    for name, place in {"sleep": "/bin/sleep", "ninja": NINJA}.items():
        (tools / name).symlink_to(place)
    made = Clone(
        Layout(tmp_path),
        site,
        io.StringIO(),
        {"HOME": str(tmp_path), "WORKSPACE_CACHE_DIR": str(tmp_path / "cache"), "PATH": str(tools)},
    )
    yield made
    site.end()


NAMES = [f"u{number}" for number in range(6)]


def test_outdated_units_are_compiled_within_the_bound_and_measured(clone: Clone) -> None:
    clone.site.compiler("sleep 0.05")
    clone.site.write_build(NAMES)
    made = clone.compile(NAMES, at_once=2)
    assert sorted(done.unit.source for done in made.finished) == sorted(
        f"{name}.cu" for name in NAMES
    )
    assert clone.site.most() == 2
    assert len(made.summary) == 6
    (kept,) = json.loads(ninja.history_file(clone.settings).read_text())["setups"].values()
    assert len(kept) == 6
    assert clone.compile(NAMES).finished == ()


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        (
            "nvcc fatal   : Unsupported gpu architecture 'compute_121a'",
            "this CUDA toolkit does not know the architecture",
            "./scripts/inv doctor    then ",
        ),
        (
            "cc1plus: out of memory allocating 65536 bytes",
            "a compiler had too little memory",
            "./scripts/inv rebuild --jobs 1    ",
        ),
    ],
)
def test_known_symptom_in_the_output_has_its_cause_and_hint(
    clone: Clone, line: str, message: str, hint: str
) -> None:
    clone.site.compiler(f'echo "{line}" >&2; exit 2')
    clone.site.write_build(["a"])
    error = clone.fails(["a"])
    assert error.message.startswith(f"a.cu of t failed: {message}")
    assert error.message.endswith(line)
    assert (error.hint or "").startswith(hint)


def test_first_real_error_is_reported_and_not_the_refused_units(clone: Clone) -> None:
    clone.site.compiler(
        'case "$5" in *u3*) echo "note: before"; echo "u3.cu:1: error: expected ;"; exit 2;; esac'
    )
    clone.site.write_build(NAMES)
    error = clone.fails(NAMES, at_once=1)
    assert error.message == "u3.cu of t failed: u3.cu:1: error: expected ;"
    assert error.details == ("note: before", "u3.cu:1: error: expected ;", f"log: {clone.log}")
    assert "resumes" in (error.hint or "")
    clone.site.compiler("echo compiled")
    assert 0 < len(clone.compile(NAMES).finished) <= 6


def test_third_out_of_memory_kill_fails_the_build_with_unit_peak_and_budgets(
    clone: Clone,
) -> None:
    clone.site.compiler("exit 137")
    clone.site.write_build(["a"])
    error = clone.fails(["a"], budget_gib=64.0)
    assert (
        "with budgets of 64.0, 32.0, 16.0 GiB; the last killed unit was a.cu of t: 8.0 GiB"
        " expected" in error.message
    )
    assert "--jobs 1" in (error.hint or "")
    assert clone.talk.getvalue().count("the build continues") <= 2


def test_first_out_of_memory_kill_costs_one_compilation_and_half_the_budget(clone: Clone) -> None:
    clone.site.compiler("test -e again || { : > again; kill -9 $$; }")
    clone.site.write_build(["a"])
    made = clone.compile(["a"], budget_gib=64.0)
    assert [done.is_killed for done in made.finished] == [True, False]
    assert (
        "memory ran out while a.cu was compiled: the build continues with 32.0 GiB instead of 64.0"
        in clone.talk.getvalue()
    )


def test_full_disk_is_reported_with_the_command_that_shows_it(clone: Clone) -> None:
    clone.site.compiler(
        'echo "fatal error: error writing to /tmp/x.s: No space left on device"; exit 1'
    )
    clone.site.write_build(["a"])
    error = clone.fails(["a"])
    assert error.message.startswith("the disk is full: ")
    assert (error.hint or "").startswith(f"df -h {clone.build}")


@pytest.mark.parametrize("name", [".ninja_log", ".ninja_deps"])
@pytest.mark.parametrize("damage", [b"", b"\x00\xff garbage\n" * 20, None])
def test_damaged_record_of_ninja_is_removed_and_reported(
    clone: Clone, name: str, damage: bytes | None
) -> None:
    clone.site.write_build(["a"], has_deps=True)
    clone.compile(["a"])
    (clone.build / name).unlink()
    (clone.build / name).mkdir() if damage is None else (clone.build / name).write_bytes(damage)
    assert [done.status for done in clone.compile(["a"]).finished] == [0]
    assert f"cpu-0123/{name} was damaged and is removed" in clone.talk.getvalue()
    assert clone.compile(["a"]).finished == ()


def test_damaged_history_stops_no_build_and_is_written_again(clone: Clone) -> None:
    place = ninja.history_file(clone.settings)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(b"\xff{")
    clone.site.write_build(["a"])
    clone.compile(["a"])
    assert len(json.loads(place.read_text())["setups"]["s"]) == 1


@pytest.mark.parametrize("has_deps", [True, False])
def test_object_half_written_at_a_kill_is_compiled_again(clone: Clone, has_deps: bool) -> None:
    half = (
        'printf half > "$5"; test -e calm || exec sleep 100; printf whole > "$5"; echo "$5: a.cu" >'
        ' "$5.d"'
    )
    clone.site.compiler(half, writes_output=False)
    clone.site.write_build(["a"], has_deps=has_deps)
    job_server.install(clone.site.server_folder)
    child = clone.site.ninja(["a"], has_deps=has_deps)
    until(clone.site.running)
    until(lambda: clone.site.text("CMakeFiles/t.dir/a.cu.o") == "half")
    child.kill()
    for pid in clone.site.running():
        os.kill(pid, signal.SIGKILL)
    (clone.build / "calm").touch()
    assert [done.status for done in clone.compile(["a"]).finished] == [0]
    assert clone.site.text("CMakeFiles/t.dir/a.cu.o") == "whole"


def test_without_targets_ninja_is_not_started(clone: Clone) -> None:
    with RunLog(
        Console(out=io.StringIO(), err=clone.talk), clone.layout.logs, verb="rebuild"
    ) as run_log:
        work = ninja.Work(clone.build, "s", jobs.Jobs(1, 1, ""), jobs.Memory(1.0, 0.0, ""))
        made = ninja.compile(
            clone.layout, clone.settings, work, [], run_log=run_log, step=Step("compile")
        )
    assert made == ninja.Compiled((), 0.0, ())
    assert not clone.layout.logs.exists()


def program(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("#!/bin/sh\n")
    (folder / name).chmod(0o755)
    return folder / name


CACHES: list[tuple[tuple[str, ...], dict[str, str], str]] = [
    ((), {}, "T"),
    (("ccache",), {}, "BIN/ccache"),
    (("ccache", "sccache"), {}, "BIN/ccache"),
    (("sccache",), {}, "T;BIN/sccache"),
    (("sccache",), {"VLLM_DISABLE_SCCACHE": "1"}, "T"),
]


@pytest.mark.parametrize(("programs", "shell", "command"), CACHES)
def test_cache_hits_need_no_job_token(
    tmp_path: Path, programs: tuple[str, ...], shell: dict[str, str], command: str
) -> None:
    for name in programs:
        program(tmp_path / "bin", name)
    loaded = settings.load(
        Layout(tmp_path), environ={"HOME": str(tmp_path), "PATH": str(tmp_path / "bin"), **shell}
    )
    found = ninja.launchers(loaded, Path("/b/tickets/ticket"))
    expected = command.replace("T", "/b/tickets/ticket").replace("BIN", str(tmp_path / "bin"))
    assert {found[f"CMAKE_{language}_COMPILER_LAUNCHER"] for language in ("C", "CXX", "CUDA")} == {
        expected
    }
    assert {found[f"CMAKE_{language}_LINKER_LAUNCHER"] for language in ("C", "CXX")} == {
        "/b/tickets/ticket"
    }


def test_ccache_settings_share_hits_between_clones_and_the_users_settings_win(
    tmp_path: Path,
) -> None:
    program(tmp_path / "bin", "ccache")
    layout, bound = Layout(tmp_path), jobs.Jobs(3, 1, "")

    def variables(**shell: str) -> dict[str, str]:
        loaded = settings.load(
            layout, environ={"HOME": str(tmp_path), "PATH": str(tmp_path / "bin"), **shell}
        )
        return dict(ninja.environment(layout, loaded, bound, Path("/t")))

    plain = variables()
    assert (plain["CCACHE_BASEDIR"], plain["CCACHE_NOHASHDIR"], plain["CCACHE_DEPEND"]) == (
        str(tmp_path),
        "1",
        "1",
    )
    assert (plain["CCACHE_PREFIX"], plain["CCACHE_PREFIX_CPP"], plain["MAX_JOBS"]) == (
        "/t",
        "/t",
        "3",
    )
    own = variables(CCACHE_BASEDIR="/src", CCACHE_HASHDIR="1", CCACHE_NODEPEND="1")
    assert own["CCACHE_BASEDIR"] == "/src"
    assert "CCACHE_NOHASHDIR" not in own
    assert own["CCACHE_DEPEND"] == "1"


TASK = """
import sys
from pathlib import Path
from workspace.cli import main
from workspace.compile import jobs
from workspace.compile import ninja
from workspace.compile.project import Unit
from workspace.core.console import Step
from workspace.core.console import RunLog
from workspace.core.paths import Layout

def work():
    layout = Layout(Path(sys.argv[1]))
    units = [Unit("", f"CMakeFiles/t.dir/u{number}.cu.o", "CUDA") for number in range(6)]
    with RunLog(main.console(), layout.logs, verb="rebuild") as run_log:
        limits = jobs.Jobs(2, 1, ""), jobs.Memory(99.0, 0.0, "")
        ninja.compile(
            layout, main.load_settings(layout),
            ninja.Work.of_units(Path(sys.argv[2]), "s", *limits, units), ["all"],
            run_log=run_log, step=Step("compile"),
        )

sys.exit(main.run(work))
"""


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_compiler_outlives_a_killed_task_and_the_next_build_resumes(
    clone: Clone, signal_number: signal.Signals
) -> None:
    clone.site.compiler("test -e calm || exec sleep 100")
    clone.site.write_build(NAMES)
    argv = [sys.executable, "-c", TASK, str(clone.layout.root), str(clone.build)]
    task = subprocess.Popen(
        argv, cwd=ROOT, env=clone.shell, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    until(
        lambda: (
            [Path(f"/proc/{pid}/comm").read_text() for pid in clone.site.running()]
            == ["sleep\n"] * 2
        )
    )
    task.send_signal(signal_number)
    _, talk = task.communicate(timeout=20)
    assert "Traceback" not in talk
    until(
        lambda: (
            not clone.site.running()
            and not [
                pid for pid in job_server.living() if command_of(pid).startswith(str(clone.build))
            ]
        )
    )
    assert len(clone.site.log) == 2
    (clone.build / "calm").touch()
    assert len(clone.compile(NAMES).finished) == 6
