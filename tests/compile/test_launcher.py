"""The launcher: it calls a compiler unchanged, with a low priority."""

import ast
import subprocess
import sys
from pathlib import Path

from tests.compile.launching import PLAIN, Site, start_job_server, until
from workspace.compile import job_server, launcher


def test_launcher_passes_arguments_output_and_status_unchanged(site: Site) -> None:
    odd = ["a b", "new\nline", "", "$HOME", "\udcff", "ünï"]
    show = [
        sys.executable,
        "-c",
        "import sys; print(sys.argv[1:]); print('talk', file=sys.stderr); sys.exit(3)",
        *odd,
        "-o",
        "x",
    ]
    with start_job_server(site):
        child = site.launch("", argv=show)
        output, _ = child.communicate(timeout=10)
    assert child.returncode == 3
    assert sorted(output.splitlines()) == sorted([repr([*odd, "-o", "x"]), "talk"])


def test_compilers_have_low_priority_and_are_killed_first_but_launchers_are_not(
    site: Site,
) -> None:
    site.compiler("cat /proc/self/oom_score_adj; nice; ulimit -c; cat /proc/$PPID/oom_score_adj")
    with start_job_server(site):
        output, _ = site.launch("a").communicate(timeout=10)
    fields = output.split()
    assert (fields[0], int(fields[1]) >= launcher.NICE, fields[3]) == (
        "1000",
        True,
        Path("/proc/self/oom_score_adj").read_text().strip(),
    )


def test_closed_pipe_ends_a_compiler_as_usual(site: Site) -> None:
    site.compiler("yes | head -1")
    with start_job_server(site):
        output, _ = site.launch("a").communicate(timeout=10)
    assert output == "y\n"


def test_long_errors_pass_whole(site: Site) -> None:
    site.compiler("yes error | head -n 100000 >&2; exit 2")
    with start_job_server(site):
        child = site.launch("a")
        output, _ = child.communicate(timeout=10)
    assert (child.returncode, output) == (2, "error\n" * 100_000)


def test_query_for_the_version_needs_no_token(site: Site) -> None:
    site.compiler("gate")
    with start_job_server(site, jobs=1):
        first = site.launch("a")
        until(site.running)
        output, _ = site.launch("", argv=["expr", "7"]).communicate(timeout=10)
        assert output == "7\n"
        site.open_gate()
        first.communicate(timeout=10)


def test_ninja_typed_by_hand_compiles_one_at_a_time(site: Site) -> None:
    job_server.install(site.server_folder)
    site.compiler("gate")
    children = [site.launch(name) for name in "abc"]
    for number in range(3):
        until(lambda number=number: len(site.log) == 2 * number + 1)
        site.open_gate()
    for child in children:
        child.communicate(timeout=10)
    assert [child.returncode for child in children] == [0, 0, 0]
    assert site.most() == 1


def test_launcher_without_its_folder_reports_so(site: Site) -> None:
    argv = [
        sys.executable,
        "-I",
        "-S",
        launcher.__file__,
        str(site.folder / "gone"),
        "./compiler",
        "-c",
        "a",
    ]
    done = subprocess.run(argv, capture_output=True, text=True, env=PLAIN, cwd=site.folder)
    assert done.returncode == 1
    assert done.stderr.startswith("not compiled: ")
    assert "No such file" in done.stderr
    assert site.log == []


def test_missing_compiler_is_reported_and_fails(site: Site) -> None:
    with start_job_server(site):
        child = site.launch("", argv=["/no/such/nvcc", "-c", "a.cu"])
        output, _ = child.communicate(timeout=10)
    assert (child.returncode, output) == (127, "error: /no/such/nvcc: No such file or directory\n")


def test_folder_longer_than_a_socket_address_works(tmp_path: Path) -> None:
    site = Site(tmp_path / ("deep" * 30) / "with 'quotes' and blanks")
    with start_job_server(site):
        child = site.launch("a")
        assert child.communicate(timeout=10)[0] == "compiled\n"


def test_unchanged_launcher_is_not_written_again(
    tmp_path: Path,
) -> None:
    program = job_server.install(tmp_path)
    before = program.stat()
    assert job_server.install(tmp_path) == program
    assert program.stat().st_mtime_ns == before.st_mtime_ns
    program.write_text("#!/bin/sh\nexit 9\n")
    job_server.install(tmp_path)
    assert program.stat().st_size == before.st_size


def test_launcher_runs_in_old_pythons_and_imports_nothing_heavy() -> None:
    text = Path(launcher.__file__).read_text(encoding="utf-8")
    ast.parse(text, feature_version=(3, 8))
    seen = subprocess.run(
        [sys.executable, "-I", "-S", "-X", "importtime", launcher.__file__, "/nowhere", "true"],
        capture_output=True,
        text=True,
        env=PLAIN,
    ).stderr
    names = {line.rpartition("|")[2].strip() for line in seen.splitlines() if "|" in line}
    assert "_socket" in names
    assert not names & {
        "socket",
        "signal",
        "enum",
        "re",
        "typing",
        "subprocess",
        "contextlib",
        "json",
        "site",
        "fcntl",
    }
