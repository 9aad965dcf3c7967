"""The tool environment that the doors make for themselves: from nothing, from half made, in hostile
surroundings, ended in the middle.
"""

import hashlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clone import FAKE_PYTHON, HOSTILE, Clone, booby_trap, is_list, make_clone, program


@pytest.fixture
def bare(tmp_path: Path) -> Clone:
    """A fresh clone."""
    return make_clone(tmp_path)


@pytest.fixture(scope="module")
def worn(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone with a tool environment that tests may damage: every call of inv repairs it."""
    clone = make_clone(tmp_path_factory.mktemp("worn"))
    assert clone.inv("--list").returncode == 0
    return clone


def output(fifo: Path) -> bytes:
    """What a process wrote into the fifo, or nothing if it does not within 9 s."""
    descriptor = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        ready, _, _ = select.select([descriptor], [], [], 9)
        return os.read(descriptor, 100) if ready else b""
    finally:
        os.close(descriptor)


def test_bare_clone_prepares_its_tools_once_and_talks_on_stderr_only(bare: Clone) -> None:
    first, second = bare.inv("--list"), bare.inv("--list")
    assert is_list(first.stdout)
    assert first.stdout == second.stdout
    assert first.stderr.startswith("preparing the tool environment … ")
    assert first.stderr.endswith(" s\n")
    assert first.stderr.count("\n") == 1
    assert second.stderr == ""
    assert [args[0] for args, _ in bare.calls()] == ["venv", "pip"]
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
    fixed = worn.inv("--list")
    assert is_list(fixed.stdout)
    assert fixed.stderr.startswith("preparing")


def test_environment_whose_python_went_away_is_made_anew(worn: Clone) -> None:
    (worn.tools / "bin" / "python").unlink()
    (worn.tools / "bin" / "python").symlink_to("/nowhere/python3")
    assert is_list(worn.inv("--list").stdout)


def test_nothing_hostile_around_gets_into_the_tools(bare: Clone, tmp_path: Path) -> None:
    trap = booby_trap(tmp_path / "trap")
    kept = {
        "HTTPS_PROXY": "http://proxy.example:1",
        "SSL_CERT_FILE": "/c.pem",
        "PIP_INDEX_URL": "https://pip.example/simple",
        "UV_HTTP_TIMEOUT": "7",
    }
    result = bare.inv("--list", cwd=trap, PYTHONPATH=str(trap), **HOSTILE, **kept)
    assert (is_list(result.stdout), result.returncode) == (True, 0), result.stderr
    for args, environment in bare.calls():
        assert not environment.keys() & (
            HOSTILE.keys() - {"CDPATH", "INVOKE_RUN_ECHO", "LC_ALL"} | {"PYTHONPATH"}
        )
        assert kept.items() <= environment.items()
        assert args[0] == "venv" or "--default-index=https://pip.example/simple" in args
    assert is_list(bare.inv("--list", cwd=trap, PYTHONPATH=str(trap), **HOSTILE).stdout)
    listed = bare.run(
        bare.root / "scripts" / "nox", "--list", cwd=trap, PYTHONPATH=str(trap), **HOSTILE
    )
    assert ("* smoke" in listed.stdout, listed.returncode) == (True, 0), listed.stderr


def test_index_configured_for_pip_only_reaches_uv(bare: Clone) -> None:
    (bare.programs / ".config" / "pip").mkdir(parents=True)
    index = (
        "index-url = https://a.example/simple\nextra-index-url = https://b.example/s\n "
        " https://c.example/s\n"
    )
    (bare.programs / ".config" / "pip" / "pip.conf").write_text(
        f"[install]\nfind-links = /wheels\n[global]\n{index}cert = /corp.pem\nuser = true\n"
    )
    assert bare.inv("--list", PIP_NO_INDEX="0").returncode == 0
    args, environment = bare.calls()[1]
    options = [
        "--default-index=https://a.example/simple",
        "--index=https://b.example/s",
        "--index=https://c.example/s",
        "--index-strategy=unsafe-best-match",
    ]
    assert [arg for arg in args if "index" in arg and arg in options] == options
    assert "--find-links=/wheels" in args
    assert environment["SSL_CERT_FILE"] == "/corp.pem"


def test_index_configured_for_uv_beats_the_one_for_pip(bare: Clone) -> None:
    assert (
        bare.inv(
            "--list",
            PIP_INDEX_URL="https://a.example/simple",
            UV_DEFAULT_INDEX="https://b.example/simple",
        ).returncode
        == 0
    )
    args, environment = bare.calls()[1]
    assert not any("a.example" in arg for arg in args)
    assert environment["UV_DEFAULT_INDEX"] == "https://b.example/simple"


def test_failed_installation_is_a_sentence_and_leaves_nothing_half_made(bare: Clone) -> None:
    for manner, code, says in (
        ("fail", 11, "hint: check the network and the package index"),
        ("full", 6, "hint: df -h "),
    ):
        failed = bare.inv("--list", FAKE_MANNER=manner)
        assert (failed.returncode, failed.stdout) == (code, "")
        assert "error: the tools could not be installed\n" + says in failed.stderr
        assert "hunter2" not in failed.stderr
        assert "Traceback" not in failed.stderr
        assert [path.name for path in bare.tools.parent.iterdir()] == ["tools.lock"]
    assert is_list(bare.inv("--list").stdout)


def test_index_that_never_ends_is_given_up_and_named(bare: Clone) -> None:
    script = bare.root / "scripts" / "tools.py"
    text = script.read_text()
    assert "LONGEST_S = 1800\n" in text
    script.write_text(text.replace("LONGEST_S = 1800\n", "LONGEST_S = 2\n"))
    index = "https://me:hunter2@slow.example/simple"
    failed = bare.inv("--list", FAKE_MANNER="stall", PIP_INDEX_URL=index)
    assert (failed.returncode, failed.stdout) == (11, "")
    said = "uv had not ended after 2 s; the package index is https://****@slow.example/simple"
    assert said in failed.stderr
    assert "error: the tools could not be installed\nhint: check the network" in failed.stderr
    assert [path.name for path in bare.tools.parent.iterdir()] == ["tools.lock"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_preparation_ended_in_the_middle_is_completed_by_the_next_run(
    bare: Clone, number: signal.Signals, code: int
) -> None:
    fifo = Path(f"{bare.log}.fifo")
    os.mkfifo(fifo)
    argv = [sys.executable, "-Es", bare.root / "scripts" / "tools.py"]
    with subprocess.Popen(
        argv,
        env=bare.environment(FAKE_MANNER="wait"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as preparing:
        assert output(fifo) == b"here"
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
    both = [
        subprocess.Popen(
            argv, env=bare.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [one.communicate(timeout=30) for one in both]
    assert [is_list(out) for out, _ in outputs] == [True, True]
    assert len([args for args, _ in bare.calls() if args[0] == "venv"]) == 1


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
        program(
            bare.programs / "python3.11",
            FAKE_PYTHON,
            LACKS=lacks.replace("age", ""),
            UV=str(elsewhere),
        )
    result = bare.inv("--list")
    assert is_list(result.stdout), result.stderr
    assert (bare.root / ".workspace" / "uv" / "bin" / "uv").exists()
    venv = bare.calls()[0][0]
    assert venv[venv.index("--python") + 1] == str(
        bare.programs / ("python3.11" if "age" in lacks else "python3")
    )


def test_uv_that_is_too_old_is_left_alone(bare: Clone) -> None:
    elsewhere = shutil.copy(bare.programs / "uv", bare.programs / "no-uv")
    program(bare.programs / "uv", "#!/bin/sh\necho uv 0.1.0\n")
    program(bare.programs / "python3", FAKE_PYTHON, LACKS="", UV=str(elsewhere))
    assert is_list(bare.inv("--list").stdout)


def test_python_with_neither_venv_nor_pip_gets_the_package_to_install(bare: Clone) -> None:
    (bare.programs / "uv").unlink()
    program(bare.programs / "python3", FAKE_PYTHON, LACKS="venv pip")
    failed = bare.inv("--list")
    assert failed.returncode == 6
    assert "has neither venv nor pip" in failed.stderr
    assert f"hint: sudo apt-get install python3.{sys.version_info[1]}-venv\n" in failed.stderr


def test_machine_without_python_gets_a_sentence(bare: Clone, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("cmp", "sh"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or "")
    script = (
        (bare.root / "scripts" / "inv").read_text().replace("/usr/bin/python3", "/nowhere/python3")
    )
    (bare.root / "scripts" / "inv").write_text(script)
    failed = bare.run(bare.root / "scripts" / "inv", "--list", PATH=str(tmp_path / "bin"))
    assert (failed.returncode, failed.stderr) == (
        6,
        "error: there is no python3 on PATH\nhint: sudo apt-get install python3 python3-venv\n",
    )


def test_python_that_is_there_and_fails_is_not_called_missing(bare: Clone, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("cmp", "sh", "head"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or "")
    program(
        tmp_path / "bin" / "python3", "#!/bin/sh\necho libpython3.so: not found >&2; exit 127\n"
    )
    for entrance in ("inv", "nox"):
        script = bare.root / "scripts" / entrance
        script.write_text(script.read_text().replace("/usr/bin/python3", "/nowhere/python3"))
        failed = bare.run(script, "--list", PATH=str(tmp_path / "bin"))
        assert failed.returncode == 6
        assert failed.stderr.startswith("error: python3 does not run: libpython3.so: not found\n")


@pytest.mark.parametrize("name", ["HOME", "XDG_CACHE_HOME"])
def test_home_that_cannot_be_written_gives_uv_a_cache_in_the_clone(
    bare: Clone, tmp_path: Path, name: str
) -> None:
    # A file in the place of the folder stops root, too, unlike a mode.
    (tmp_path / "closed").touch()
    closed = tmp_path / "closed" if name == "HOME" else tmp_path / "closed" / "cache"
    # What a read-only file system refuses, os.access refuses; here nobody may enter the file.
    done = bare.inv("--list", **{name: str(closed)})
    assert is_list(done.stdout)
    environment = bare.calls()[0][1]
    assert environment["UV_CACHE_DIR"] == str(bare.root / ".workspace" / "cache" / "uv")


def test_cache_of_the_user_and_one_that_can_be_written_stay(bare: Clone, tmp_path: Path) -> None:
    (tmp_path / "closed").touch()
    bare.inv("--list", HOME=str(tmp_path / "closed"), UV_CACHE_DIR="/mine")
    assert bare.calls()[0][1]["UV_CACHE_DIR"] == "/mine"


def bundled(folder: Path, name: str = "uv-0.13.9-py3-none-any.whl") -> Path:
    """A bundle whose manifest has one file for the tools."""
    (folder / "files").mkdir(parents=True)
    (folder / "files" / "uv-0.13.9-py3-none-any.whl").write_bytes(b"a wheel")
    digest = hashlib.sha256(b"a wheel").hexdigest()
    items = [{"name": name, "size": 7, "sha256": digest, "uses": ["tools"]}]
    document = {"target": {"python": "3.11"}, "items": items}
    (folder / "manifest.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize("form", ["--from={}", "--from {}"])
def test_tools_come_from_the_bundle_alone(bare: Clone, tmp_path: Path, form: str) -> None:
    bundle = bundled(tmp_path / "bundle")
    index = {"PIP_INDEX_URL": "https://pip.example/simple", "UV_FIND_LINKS": "/elsewhere"}
    # The verb itself then refuses this bundle.
    result = bare.inv("bootstrap", *form.format(bundle).split(), **index)
    assert "preparing the tool environment" in result.stderr
    (_, _), (install, environment) = bare.calls()
    assert [arg for arg in install if "index" in arg or "links" in arg] == [
        "--no-index",
        f"--find-links={bundle / 'files'}",
    ]
    assert environment["UV_OFFLINE"] == environment["PIP_NO_INDEX"] == "1"
    assert "UV_FIND_LINKS" not in environment
    assert "PIP_INDEX_URL" not in environment


def test_bundle_whose_tools_are_not_as_listed_is_refused(bare: Clone, tmp_path: Path) -> None:
    for number, name in enumerate(("../uv.whl", "/etc/passwd", "gone.whl")):
        bundle = bundled(tmp_path / f"bundle{number}", name)
        (bundle / "uv.whl").write_bytes(b"a wheel")
        result = bare.inv("bootstrap", "--from", str(bundle))
        assert result.returncode == 11
        assert f"error: the bundle is not as its manifest: {name}" in result.stderr
        assert not bare.tools.exists()


def test_folder_that_is_no_bundle_is_refused(bare: Clone, tmp_path: Path) -> None:
    evil = '{"items": [], "target": {"python": "/../../evil"}}'
    for text in (evil, "{", "[]", '{"items": [1]}', '{"items": [{"uses": ["tools"]}]}'):
        (tmp_path / "manifest.json").write_text(text)
        result = bare.inv("bootstrap", "--from", str(tmp_path))
        assert result.returncode == 2, text
        assert "is not the folder of a finished bundle" in result.stderr
        assert "Traceback" not in result.stderr
        assert not bare.tools.exists()
