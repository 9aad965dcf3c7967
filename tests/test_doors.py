"""The doors, run for real in copies of the clone: from anywhere, in hostile surroundings, from nothing, from half made.

No network: a program called uv on PATH makes a virtual environment that borrows the packages of the one these tests run in, and
a program called python3 stands for machines whose Python is too old or lacks venv and pip.
"""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = "nothing==1 \\\n    --hash=sha256:" + "1" * 64 + "\nuv==0.13.9 \\\n    --hash=sha256:" + "0" * 64 + "\n"

# Makes what it is asked for in 50 ms, notes how it was called, and misbehaves as FAKE_MANNER says.
FAKE_UV = """#!@PYTHON@ -Es
import json, os, signal, sys, venv
words, manner = sys.argv[1:], os.environ.get("FAKE_MANNER")
if words == ["--version"]:
    print("uv 0.13.9 (fake)")
    sys.exit()
with open("@LOG@", "a") as log:
    print(json.dumps([words, dict(os.environ)]), file=log)
if words[0] == "venv":
    builder = venv.EnvBuilder(symlinks=True, with_pip=False)
    builder.create(words[-1])
    with open(os.path.join(words[-1], "lib", os.path.basename(os.path.dirname("@PACKAGES@")), "site-packages", "borrowed.pth"), "w") as borrowed:
        borrowed.write("@PACKAGES@")
elif manner == "fail":
    sys.exit("error: could not reach https://me:hunter2@index.example/simple")
elif manner == "full":
    sys.exit("error: write failed: No space left on device (os error 28)")
elif manner == "wait":
    with open("@LOG@.fifo", "w") as fifo:
        fifo.write("here")
    signal.pause()
"""

# A python3 that believes in another version, or has no venv, or no pip; asked to install uv it puts the fake one there.
FAKE_PYTHON = """#!@PYTHON@ -Es
import os, runpy, shutil, sys
words, lacks = [word for word in sys.argv[1:] if word != "-Es"], "@LACKS@".split()
if words[:2] == ["-m", "venv"]:
    if "venv" in lacks:
        sys.exit("The virtual environment was not created successfully because ensurepip is not available.")
    os.makedirs(words[2] + "/bin")
    shutil.copy(__file__, words[2] + "/bin/python")
elif words[:2] == ["-m", "pip"]:
    if "pip" in lacks:
        sys.exit("No module named pip")
    if "install" in words:
        with open(words[words.index("-r") + 1]) as file:
            assert file.read().startswith("uv==0.13.9 ")
        assert "--require-hashes" in words
        target = words[words.index("--target") + 1] if "--target" in words else os.path.dirname(os.path.dirname(__file__))
        os.makedirs(target + "/bin", exist_ok=True)
        shutil.copy("@UV@", target + "/bin/uv")
elif words[0].endswith("tools.py"):
    sys.executable, sys.argv = __file__, words
    if "age" in lacks:
        sys.version_info = (3, 9, 0, "final", 0)
    runpy.run_path(words[0], run_name="__main__")
else:
    os.execv("@PYTHON@", ["@PYTHON@", *words])
"""


def program(path: Path, text: str, **words: str) -> Path:
    """Write an executable, @WORDS@ filled in."""
    for name, word in {"PYTHON": sys.executable, "PACKAGES": sysconfig.get_path("purelib"), **words}.items():
        text = text.replace(f"@{name}@", word)
    path.unlink(missing_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def heard(fifo: Path) -> bytes:
    """What a process wrote into the fifo, or nothing if it does not within 9 s."""
    descriptor = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        ready, _, _ = select.select([descriptor], [], [], 9)
        return os.read(descriptor, 100) if ready else b""
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Clone:
    """A copy of what the doors need, with a PATH of its own."""

    root: Path
    programs: Path

    @property
    def tools(self) -> Path:
        return self.root / ".workspace" / "tools"

    @property
    def log(self) -> Path:
        return self.programs / "uv.log"

    def calls(self) -> list[tuple[list[str], dict[str, str]]]:
        return [(words, environment) for words, environment in map(json.loads, self.log.read_text().splitlines())] if self.log.exists() else []

    def environment(self, **more: str) -> dict[str, str]:
        return {"PATH": f"{self.programs}:/usr/bin:/bin", "HOME": str(self.programs), **more}

    def run(self, *argv: str | Path, cwd: Path | None = None, **more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            argv, cwd=cwd or self.programs, env=self.environment(**more), capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=30
        )

    def inv(self, *words: str, cwd: Path | None = None, **more: str) -> "subprocess.CompletedProcess[str]":
        return self.run(self.root / "scripts" / "inv", *words, cwd=cwd, **more)


def make_clone(folder: Path) -> Clone:
    clone = Clone(folder / "a clone", folder / "programs")
    clone.programs.mkdir(parents=True)
    for name in ("tasks.py", "noxfile.py", "scripts", "workspace"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        clone.root.mkdir(exist_ok=True)
        copy(ROOT / name, clone.root / name)
    (clone.root / "requirements").mkdir()
    (clone.root / "requirements" / "tools.txt").write_text(REQUIREMENTS)
    program(clone.programs / "uv", FAKE_UV, LOG=str(clone.log))
    (clone.programs / "python3").symlink_to(sys.executable)
    return clone


@pytest.fixture
def bare(tmp_path: Path) -> Clone:
    """A fresh clone."""
    return make_clone(tmp_path)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone with its tool environment; tests only look at it."""
    clone = make_clone(tmp_path_factory.mktemp("ready"))
    assert clone.inv("--list").returncode == 0
    return clone


@pytest.fixture(scope="module")
def worn(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone with a tool environment that tests may damage: every call of inv mends it."""
    clone = make_clone(tmp_path_factory.mktemp("worn"))
    assert clone.inv("--list").returncode == 0
    return clone


def is_list(text: str) -> bool:
    return text.startswith("Subcommands:\n") and "\n  bootstrap " in text and "\n  status " in text


def test_bare_clone_prepares_its_tools_once_and_talks_on_stderr_only(bare: Clone) -> None:
    first, second = bare.inv("--list"), bare.inv("--list")
    assert is_list(first.stdout)
    assert first.stdout == second.stdout
    assert first.stderr.startswith("preparing the tool environment … ")
    assert first.stderr.endswith(" s\n")
    assert first.stderr.count("\n") == 1
    assert second.stderr == ""
    assert [words[0] for words, _ in bare.calls()] == ["venv", "pip"]
    assert "--require-hashes" in bare.calls()[1][0]


def test_changed_requirements_renew_the_tools(worn: Clone) -> None:
    (worn.tools / "old").touch()
    with (worn.root / "requirements" / "tools.txt").open("a") as requirements:
        requirements.write("# another\n")
    renewed = worn.inv("--list")
    assert renewed.stderr.startswith("preparing")
    assert not (worn.tools / "old").exists()
    assert sorted(path.name for path in worn.tools.parent.iterdir()) == ["tools", "tools.lock"]


def test_environment_that_lost_a_package_is_made_anew(worn: Clone) -> None:
    next(worn.tools.glob("lib/*/site-packages/borrowed.pth")).unlink()
    mended = worn.inv("--list")
    assert is_list(mended.stdout)
    assert mended.stderr.startswith("preparing")


def test_environment_whose_python_went_away_is_made_anew(worn: Clone) -> None:
    (worn.tools / "bin" / "python").unlink()
    (worn.tools / "bin" / "python").symlink_to("/nowhere/python3")
    assert is_list(worn.inv("--list").stdout)


def test_inv_works_from_any_folder_and_through_a_symlink(ready: Clone, tmp_path: Path) -> None:
    (tmp_path / "inv").symlink_to(ready.root / "scripts" / "inv")
    (tmp_path / "clone").symlink_to(ready.root)
    ways = [
        ready.run("./inv", "--list", cwd=tmp_path),
        ready.run("clone/scripts/inv", "--list", cwd=tmp_path),
        ready.run("sh", "inv", "--list", cwd=ready.root / "scripts"),
        ready.run("inv", "--list", cwd=tmp_path, PATH=f"{tmp_path}:/usr/bin:/bin"),
    ]
    assert [(is_list(way.stdout), way.stderr, way.returncode) for way in ways] == [(True, "", 0)] * 4


HOSTILE = {
    "VIRTUAL_ENV": "/nowhere",
    "CONDA_PREFIX": "/nowhere",
    "PYTHONHOME": "/nowhere",
    "CDPATH": "/usr:/",
    "UV_PYTHON": "3.8",
    "UV_TORCH_BACKEND": "cu130",
    "UV_EXCLUDE_NEWER": "2001-01-01",
    "PIP_TARGET": "/nowhere",
    "PIP_REQUIRE_VIRTUALENV": "1",
    "PIP_USER": "1",
    "INVOKE_RUN_ECHO": "1",
    "LC_ALL": "C",
}


def booby_trap(folder: Path) -> Path:
    """A folder in which every import of the doors would go wrong."""
    folder.mkdir()
    for name in ("sitecustomize", "invoke", "nox", "workspace", "tasks", "random", "json", "dotenv"):
        (folder / f"{name}.py").write_text("raise SystemExit(f'{__file__} was imported')\n")
    return folder


def test_nothing_hostile_around_gets_into_the_tools(bare: Clone, tmp_path: Path) -> None:
    trap = booby_trap(tmp_path / "trap")
    kept = {"HTTPS_PROXY": "http://proxy.example:1", "SSL_CERT_FILE": "/c.pem", "PIP_INDEX_URL": "https://pip.example/simple", "UV_HTTP_TIMEOUT": "7"}
    result = bare.inv("--list", cwd=trap, PYTHONPATH=str(trap), **HOSTILE, **kept)
    assert (is_list(result.stdout), result.returncode) == (True, 0), result.stderr
    for words, environment in bare.calls():
        assert not environment.keys() & (HOSTILE.keys() - {"CDPATH", "INVOKE_RUN_ECHO", "LC_ALL"} | {"PYTHONPATH"})
        assert kept.items() <= environment.items()
        assert words[0] == "venv" or "--default-index=https://pip.example/simple" in words
    assert is_list(bare.inv("--list", cwd=trap, PYTHONPATH=str(trap), **HOSTILE).stdout)
    listed = bare.run(bare.root / "scripts" / "nox", "--list", cwd=trap, PYTHONPATH=str(trap), **HOSTILE)
    assert ("* tests" in listed.stdout, listed.returncode) == (True, 0), listed.stderr


def test_index_that_only_pip_was_told_of_reaches_uv(bare: Clone) -> None:
    (bare.programs / ".config" / "pip").mkdir(parents=True)
    index = "index-url = https://a.example/simple\nextra-index-url = https://b.example/s\n  https://c.example/s\n"
    (bare.programs / ".config" / "pip" / "pip.conf").write_text(f"[install]\nfind-links = /wheels\n[global]\n{index}cert = /corp.pem\nuser = true\n")
    assert bare.inv("--list", PIP_NO_INDEX="0").returncode == 0
    words, environment = bare.calls()[1]
    options = ["--default-index=https://a.example/simple", "--index=https://b.example/s", "--index=https://c.example/s", "--index-strategy=unsafe-best-match"]
    assert [word for word in words if "index" in word and word in options] == options
    assert "--find-links=/wheels" in words
    assert environment["SSL_CERT_FILE"] == "/corp.pem"


def test_index_that_uv_itself_was_told_of_beats_pips(bare: Clone) -> None:
    assert bare.inv("--list", PIP_INDEX_URL="https://a.example/simple", UV_DEFAULT_INDEX="https://b.example/simple").returncode == 0
    words, environment = bare.calls()[1]
    assert not any("a.example" in word for word in words)
    assert environment["UV_DEFAULT_INDEX"] == "https://b.example/simple"


def test_failed_installation_is_a_sentence_and_leaves_nothing_half_made(bare: Clone) -> None:
    for manner, code, says in (("fail", 11, "hint: check the network and the package index"), ("full", 6, "hint: df -h ")):
        failed = bare.inv("--list", FAKE_MANNER=manner)
        assert (failed.returncode, failed.stdout) == (code, "")
        assert "error: the tools could not be installed\n" + says in failed.stderr
        assert "hunter2" not in failed.stderr
        assert "Traceback" not in failed.stderr
        assert [path.name for path in bare.tools.parent.iterdir()] == ["tools.lock"]
    assert is_list(bare.inv("--list").stdout)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_preparation_ended_in_the_middle_is_completed_by_the_next_run(bare: Clone, number: signal.Signals, code: int) -> None:
    fifo = Path(f"{bare.log}.fifo")
    os.mkfifo(fifo)
    argv = [sys.executable, "-Es", bare.root / "scripts" / "tools.py"]
    with subprocess.Popen(
        argv, env=bare.environment(FAKE_MANNER="wait"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as preparing:
        assert heard(fifo) == b"here"
        if number == signal.SIGINT:
            os.killpg(preparing.pid, number)
        else:
            preparing.send_signal(number)
        preparing.wait(timeout=9)
        if number == signal.SIGKILL:
            os.killpg(preparing.pid, number)
        _, talk = preparing.communicate(timeout=9)
    assert preparing.returncode == code
    assert "Traceback" not in talk
    assert not bare.tools.exists()
    assert is_list(bare.inv("--list").stdout)
    assert sorted(path.name for path in bare.tools.parent.iterdir()) == ["tools", "tools.lock"]


def test_two_at_once_prepare_one_environment(bare: Clone) -> None:
    argv = [bare.root / "scripts" / "inv", "--list"]
    both = [subprocess.Popen(argv, env=bare.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [one.communicate(timeout=30) for one in both]
    assert [is_list(out) for out, _ in outputs] == [True, True]
    assert len([words for words, _ in bare.calls() if words[0] == "venv"]) == 1


def test_folder_that_cannot_be_written_is_a_sentence(bare: Clone) -> None:
    (bare.root / ".workspace").write_text("in the way")
    failed = bare.inv("--list")
    assert failed.returncode == 6
    assert "error: " in failed.stderr
    assert "hint: " in failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize("lacks", ["", "venv", "age", "age venv"])
def test_uv_is_installed_where_there_is_none(bare: Clone, lacks: str) -> None:
    elsewhere = (bare.programs / "uv").rename(bare.programs / "no-uv")
    program(bare.programs / "python3", FAKE_PYTHON, LACKS=lacks, UV=str(elsewhere))
    if "age" in lacks:
        program(bare.programs / "python3.11", FAKE_PYTHON, LACKS=lacks.replace("age", ""), UV=str(elsewhere))
    result = bare.inv("--list")
    assert is_list(result.stdout), result.stderr
    assert (bare.root / ".workspace" / "uv" / "bin" / "uv").exists()
    venv = bare.calls()[0][0]
    assert venv[venv.index("--python") + 1] == str(bare.programs / ("python3.11" if "age" in lacks else "python3"))


def test_uv_that_is_too_old_is_left_alone(bare: Clone) -> None:
    elsewhere = shutil.copy(bare.programs / "uv", bare.programs / "no-uv")
    program(bare.programs / "uv", "#!/bin/sh\necho uv 0.1.0\n")
    program(bare.programs / "python3", FAKE_PYTHON, LACKS="", UV=str(elsewhere))
    assert is_list(bare.inv("--list").stdout)


def test_python_with_neither_venv_nor_pip_is_told_what_to_install(bare: Clone) -> None:
    (bare.programs / "uv").unlink()
    program(bare.programs / "python3", FAKE_PYTHON, LACKS="venv pip")
    failed = bare.inv("--list")
    assert failed.returncode == 6
    assert "has neither venv nor pip" in failed.stderr
    assert f"hint: sudo apt-get install python3.{sys.version_info[1]}-venv\n" in failed.stderr


def test_machine_without_python_is_told_so(bare: Clone, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("cmp", "sh"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or "")
    script = (bare.root / "scripts" / "inv").read_text().replace("/usr/bin/python3", "/nowhere/python3")
    (bare.root / "scripts" / "inv").write_text(script)
    failed = bare.run(bare.root / "scripts" / "inv", "--list", PATH=str(tmp_path / "bin"))
    assert (failed.returncode, failed.stderr) == (6, "error: there is no python3 on PATH\nhint: sudo apt-get install python3 python3-venv\n")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nonsense"], "error: there is no verb nonsense\nhint: inv --list\n"),
        (["bootstarp"], "error: there is no verb bootstarp\nhint: did you mean bootstrap? inv --list\n"),
        (["bootstrap", "--nope"], "error: inv bootstrap has no flag --nope\nhint: inv --help bootstrap\n"),
        (["bootstrap", "--devise=cpu"], "error: inv bootstrap has no flag --devise\nhint: did you mean --device? inv --help bootstrap\n"),
        (["bootstrap", "--device"], "error: --device needs a value\nhint: inv --help bootstrap\n"),
        (["--dry", "bootstrap"], "error: inv has no flag --dry\nhint: inv --help\n"),
        (["--help", "bootstarp"], "error: there is no verb bootstarp\nhint: did you mean bootstrap? inv --list\n"),
        (["bootstrap", "--device", "gpu"], "error: --device: 'gpu' is not one of auto, cuda, cpu\n"),
        (["bootstrap", "--jobs", "many"], "error: --jobs: 'many' is not a whole number of at least 1\n"),
    ],
)
def test_misuse_is_a_sentence_and_exits_2(ready: Clone, words: list[str], says: str) -> None:
    failed = ready.inv(*words)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith(says)
    assert "Traceback" not in failed.stderr


def test_reader_that_goes_away_is_no_traceback(ready: Clone) -> None:
    script = '"$0" --list | true; "$0" --list >&-; "$0" nonsense 2>&1 | true'
    closed = ready.run("/bin/sh", "-c", script, ready.root / "scripts" / "inv")
    assert "Traceback" not in closed.stderr
    assert "BrokenPipe" not in closed.stderr


def test_every_help_text_fits_its_column(ready: Clone) -> None:
    document = json.loads(ready.inv("--list", "--list-format=json").stdout)
    texts = {task["name"]: task["help"] for task in document["tasks"]}
    assert {"bootstrap", "status"} <= texts.keys()
    assert {name: text for name, text in texts.items() if not 0 < len(text) <= 60} == {}


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """The bin folder of an environment from elsewhere, with invoke and nox and nothing else of what the doors need."""
    subprocess.run([sys.executable, "-Es", "-m", "venv", "--without-pip", "--symlinks", tmp_path / "foreign"], check=True)
    site = next(tmp_path.glob("foreign/lib/*/site-packages"))
    own = Path(sysconfig.get_path("purelib"))
    names = "invoke nox argcomplete attr attrs colorlog dependency_groups humanize packaging virtualenv platformdirs filelock distlib python_discovery"
    for name in names.split():
        for path in (own / name, *own.glob(f"{name}-*.dist-info")):
            if path.exists():
                (site / path.name).symlink_to(path)
    for tool, start in (("inv", "from invoke.main import program; program.run()"), ("nox", "from nox import main; main()")):
        script = tmp_path / "foreign" / "bin" / tool
        script.write_text(f"#!{tmp_path}/foreign/bin/python\n{start}\n")
        script.chmod(0o755)
    return tmp_path / "foreign" / "bin"


def test_foreign_inv_hands_over_with_all_arguments(ready: Clone, foreign: Path) -> None:
    below = ready.root / "workspace" / "core"
    assert is_list(ready.run(foreign / "inv", "--list", cwd=below).stdout)
    failed = ready.run(foreign / "inv", "bootstrap", "--device", "a b", cwd=below)
    assert (failed.returncode, failed.stderr.splitlines()[0]) == (2, "error: --device: 'a b' is not one of auto, cuda, cpu")
    assert is_list(ready.run(foreign / "inv", "--search-root", ready.root, "--list").stdout)


def test_foreign_python_that_runs_the_tasks_file_hands_over(ready: Clone, foreign: Path) -> None:
    site = next(foreign.parent.glob("lib/*/site-packages"))
    (site / "invoke").unlink()
    assert is_list(ready.run(foreign / "python", ready.root / "tasks.py", "--list").stdout)


def test_foreign_nox_hands_over_with_all_arguments(ready: Clone, foreign: Path) -> None:
    listed = ready.run(foreign / "nox", "-f", "a clone/noxfile.py", "--list", "-s", "lint", cwd=ready.root.parent, PWD=str(ready.root.parent))
    assert ("* lint" in listed.stdout, "* tests" in listed.stdout, listed.returncode) == (True, False, 0), listed.stderr


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone with its tool environment for tests that put a smoke check of their own into it."""
    clone = make_clone(tmp_path_factory.mktemp("judged"))
    assert clone.inv("--list").returncode == 0
    return clone


def session(clone: Clone, *words: str, body: str = "", **more: str) -> "subprocess.CompletedProcess[str]":
    """Run nox in the clone with a module of the workspace that does `body` in place of the smoke check."""
    for name, text in (("smoke", body), ("pin", "")):
        (clone.root / "workspace" / name).mkdir(exist_ok=True)
        (clone.root / "workspace" / name / "__init__.py").touch()
        (clone.root / "workspace" / name / "__main__.py").write_text(text)
    return clone.run(clone.root / "scripts" / "nox", *words, **more)


def test_single_session_exits_with_the_code_of_its_child(judged: Clone) -> None:
    result = session(judged, "-s", "smoke", "--", "a b", body="import sys; print(sys.argv[1:]); sys.exit(8)")
    assert (result.returncode, result.stdout) == (8, "['a b']\n")
    assert "Traceback" not in result.stderr
    assert session(judged, "-s", "smoke", body="import os; os.kill(os.getpid(), 9)").returncode == 137
    assert session(judged, "-s", "smoke", body="").returncode == 0


def test_of_several_sessions_all_are_run_and_nox_exits_1(judged: Clone) -> None:
    result = session(judged, "-s", "smoke", "tests", body="import sys; sys.exit(8)")
    assert result.returncode == 1
    assert "Session smoke failed." in result.stderr
    assert "Running session tests" in result.stderr


def test_session_does_not_see_the_callers_python(judged: Clone, tmp_path: Path) -> None:
    trap = booby_trap(tmp_path / "trap")
    body = "import os; print(sorted(name for name in os.environ if name.startswith(('PYTHON', 'VIRTUAL'))))"
    assert session(judged, "-s", "smoke", body=body, PYTHONPATH=str(trap), **HOSTILE).stdout == "[]\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ended_nox_waits_for_its_child_to_clear_up(judged: Clone, number: signal.Signals, code: int) -> None:
    # Longer than the 0.3 s after which nox would kill it by default.
    body = (
        "import os, signal, sys, time\n"
        "def end(number, _):\n    time.sleep(0.6)\n    os.write(1, b'cleared up\\n')\n    sys.exit(128 + number)\n"
        "signal.signal(signal.SIGINT, end)\nsignal.signal(signal.SIGTERM, end)\nprint('here', flush=True)\nsignal.pause()\n"
    )
    session(judged, "--list", body=body)
    argv = [judged.root / "scripts" / "nox", "-s", "smoke"]
    with subprocess.Popen(argv, env=judged.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "here\n"
        if number == signal.SIGINT:
            os.killpg(running.pid, number)
        else:
            running.send_signal(number)
        rest, talk = running.communicate(timeout=9)
    assert (rest, running.returncode) == ("cleared up\n", code), talk
