"""inv report: no private text that is planted anywhere is in it, and the useful lines are.

Only a folder that cannot be written stops it.
"""

import base64
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.install.test_trouble import read_only
from tests.small.materials import Materials, git
from tests.small.world import Ended, World, make_world

USER, HOST, PERSON = "quentinxavier", "spark-zq7", "Zoe Plantagenet"
TOKEN, KEY, PASSWORD = "hf_ZqPlantedToken0123456789", 'pl"anted/Key+9=%ü', "plantedPw77xy"
EMAIL, ADDRESS, MAC, MIRROR = (
    "zoe.p@corp.planted.org",
    "10.77.66.55",
    "02:42:ac:77:66:55",
    "git.corp.planted.org",
)
# Masked in any text; a person's name is only in what does not go into a report.
WRITTEN = (USER, HOST, TOKEN, KEY, PASSWORD, EMAIL, ADDRESS, MAC, MIRROR)
PLANTED = (*WRITTEN, PERSON)
REMOTE = f"https://{USER}:{PASSWORD}@{MIRROR}/team/vllm.git"
HELPS = "error: undefined symbol _ZN3c10, exit code 137, torch 2.13.0+cpu, nvidia-cudnn==9.13.0.50"
# What tasks.py does; the second word shortens how long vLLM's questionnaire may take.
PROGRAM = """
import sys
from pathlib import Path
from workspace.cli import main
from workspace.support import bug_report
from workspace.core.paths import Layout

bug_report.COLLECT_ENV_S = float(sys.argv[2])
here = Layout(Path(sys.argv[1]))
known = bug_report.settings_of
sys.exit(main.run(lambda: bug_report.write(here, known(here), console=main.console())))
"""


def report(
    world: World,
    *,
    env: Mapping[str, str] | None = None,
    through: tuple[str, ...] = (),
    patience_s: float = 30.0,
) -> Ended:
    argv = [*through, sys.executable, "-Es", "-B", "-c", PROGRAM, str(world.root), str(patience_s)]
    done = subprocess.run(
        argv,
        env=world.env | dict(env or {}),
        cwd=world.root,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def unpacked(ended: Ended) -> dict[str, str]:
    """The files of the report by their names without the folder that holds them all."""
    assert ended.code == 0, ended.output
    with tarfile.open(ended.out.strip()) as archive:
        files = {
            entry.name.split("/", 1)[1]: archive.extractfile(entry)
            for entry in archive.getmembers()
        }
        return {name: file.read().decode() for name, file in files.items() if file}


def spellings(text: str) -> set[str]:
    return {text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}


def plant(world: World) -> dict[str, str]:
    """Put private texts everywhere, and return an environment that contains them too."""
    layout = world.layout
    home = world.folder / "homes" / USER
    home.mkdir(parents=True)
    (home / ".gitconfig").write_text(f"[user]\n\tname = {PERSON}\n\temail = {EMAIL}\n")
    everything = "\n".join(
        [
            HELPS,
            str(home),
            str(world.root),
            REMOTE,
            f"ssh {USER}@{MIRROR}:x",
            *(form for text in WRITTEN for form in sorted(spellings(text))),
        ]
    )
    layout.dotenv.write_text(f"MAX_JOBS=3\nVLLM_API_KEY='{KEY}'\nPRIVATE_NOTE={PERSON}\n")
    layout.logs.mkdir(parents=True, exist_ok=True)
    (layout.logs / f"99991231-{USER}-bootstrap.log").write_text(everything)
    layout.stamp("planted").write_text(
        json.dumps({"inputs": {"note": everything, "HF_TOKEN": TOKEN}})
    )
    layout.stamp(USER).write_text("{}")
    layout.smoke_record.write_text(json.dumps({"note": everything}))
    configured = layout.state / "build" / f"{USER}-cuda" / "CMakeFiles" / "CMakeConfigureLog.yaml"
    configured.parent.mkdir(parents=True)
    configured.write_text(everything)
    with layout.pins.open("a") as pins:
        pins.write("".join(f"# {line}\n" for line in everything.splitlines()))
    author = {"GIT_AUTHOR_NAME": PERSON, "GIT_AUTHOR_EMAIL": EMAIL}
    for repository in (world.root, layout.vllm):
        git(repository, "remote", "add", "origin", REMOTE)
        git(
            repository,
            "commit",
            "--quiet",
            "--allow-empty",
            "-m",
            f"{USER} of {HOST} uses {TOKEN}",
            env=author,
        )
    (layout.vllm / f"notes-of-{USER}.txt").write_text(everything)
    body = f"{TOKEN}\n\nUpstream-Status: Submitted [{REMOTE}]\nSigned-off-by: {PERSON} <{EMAIL}>\n"
    patch = next(layout.patches("vllm").glob("*.patch")).read_text()
    head, _, diff = patch.partition("\ndiff --git")
    head = (
        head.split("\nFrom: ")[0] + f"\nFrom: {PERSON} <{EMAIL}>\nSubject: [PATCH]"
        f" =?UTF-8?B?{base64.b64encode(f'For {USER}'.encode()).decode()}?=\n\n{body}---"
    )
    (layout.patches("vllm") / f"{USER}.patch").write_text(f"{head}\ndiff --git{diff}")
    collect_env = layout.vllm / "vllm" / "collect_env.py"
    collect_env.write_text(f"import os\nprint('asked', os.environ)\nprint({everything!r})\n")
    programs = world.folder / "programs"
    programs.mkdir()
    (programs / "dmesg").write_text(
        f"#!/bin/sh\necho 'Out of memory: Killed process 7 ({USER}) on {HOST} {ADDRESS}'\necho"
        f" '{USER} plugged in a mouse'\n"
    )
    (programs / "dmesg").chmod(0o755)
    return {
        "PATH": f"{programs}:{world.env['PATH']}",
        "HOME": str(home),
        "USER": USER,
        "LOGNAME": USER,
        "HOSTNAME": HOST,
        "HF_TOKEN": TOKEN,
        "PIP_EXTRA_INDEX_URL": REMOTE,
        "VLLM_MIRROR": REMOTE,
        "TORCH_LOGS_OUT": f"{home}/x",
        "TMPDIR": str(world.folder / "homes"),
    }


def test_nothing_planted_is_in_the_report_and_what_helps_is(built: World) -> None:
    ended = report(built, env=plant(built))
    files = unpacked(ended)
    whole = subprocess.run(
        ["gzip", "-dc", ended.out.strip()], capture_output=True, check=True
    ).stdout.decode("utf-8", "replace")
    places = (str(built.root), str(built.folder / "homes"))
    found = {
        form
        for text in (*PLANTED, *places)
        for form in spellings(text)
        if form.lower() in whole.lower()
    }
    assert found == set()
    assert "planted" not in "".join(files).lower().replace("stamps/planted.json", "")
    assert any(name.startswith("logs/99991231-user-") for name in files)
    for name in (
        "stamps/planted.json",
        "smoke.json",
        "pins.toml",
        "collect-env.txt",
        *(name for name in files if name.startswith(("logs/9999", "cmake/"))),
    ):
        assert HELPS in files[name], name
    assert (
        files["kernel.txt"].splitlines()[1]
        == "Out of memory: Killed process 7 (<user>) on <host> <ip>"
    )
    assert "mouse" not in files["kernel.txt"]
    assert "Upstream-Status: Submitted" in files["patches/vllm.txt"]
    assert "Subject: [PATCH] For <user>" in files["patches/vllm.txt"]
    assert "diff" not in files["patches/vllm.txt"]
    assert re.search(r"^  \d+\t\d+\t\S+$", files["patches/vllm.txt"], re.MULTILINE)
    assert json.loads(files["settings.json"])[".env"] == {
        "MAX_JOBS": "3",
        "VLLM_API_KEY": "set",
        "PRIVATE_NOTE": "set",
    }
    assert "new notes-of-<user>.txt" in files["git.txt"]
    assert json.loads(files["status.json"])["rows"]
    assert json.loads(files["doctor.json"])["rows"]
    assert "asked" in files["collect-env.txt"]


def test_the_machines_own_name_is_masked_though_no_variable_has_it(built: World) -> None:
    through = (
        "unshare",
        "--map-root-user",
        "--uts",
        "sh",
        "-c",
        f'hostname {HOST}.corp && exec "$@"',
        "-",
    )
    if subprocess.run([*through, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine forbids to set another host name")
    built.layout.smoke_record.write_text(
        json.dumps({"note": f"on {HOST}.corp, {HOST.upper()} and {HOST}"})
    )
    assert json.loads(unpacked(report(built, through=through))["smoke.json"]) == {
        "note": "on <host>, <host> and <host>"
    }


@pytest.fixture(scope="module")
def reported(
    materials: Materials, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[World, Ended]]:
    """Yield a report of an unbuilt clone with a long log, unreadable records and older reports."""
    world = make_world(materials, tmp_path_factory.mktemp("reported"))
    folder = world.layout.state / "reports"
    for place in (
        folder,
        world.layout.logs,
        world.layout.stamp("x").parent,
        world.layout.smoke_record,
    ):
        place.mkdir(parents=True)
    for day in range(1, 8):
        (folder / f"report-2026010{day}-000000-000000.tar.gz").touch()
    (folder / "mine.txt").touch()
    (world.layout.logs / "20260101-000000-000000-bootstrap.log").write_text(
        ("x" * 99 + "\n") * 21_000 + f"{HELPS}\n"
    )
    world.layout.stamp("vllm").symlink_to("/proc/self/mem")
    yield world, report(world)
    world.end()


def test_fresh_clone_with_nothing_built_can_be_reported(reported: tuple[World, Ended]) -> None:
    files = unpacked(reported[1])
    assert "there is no .vllm" in files["collect-env.txt"]
    assert json.loads(files["status.json"])["next"] == "./scripts/inv bootstrap"


def test_unreadable_file_is_replaced_by_the_reason(reported: tuple[World, Ended]) -> None:
    files = unpacked(reported[1])
    assert files["stamps/vllm.json"] == "error: it cannot be read: Invalid argument\n"
    assert files["smoke.json"] == "error: it cannot be read: not a regular file\n"


def test_archive_is_private_and_contains_no_owner(reported: tuple[World, Ended]) -> None:
    path = Path(reported[1].out.strip())
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent == reported[0].layout.state / "reports"
    with tarfile.open(path) as archive:
        assert {
            (entry.uid, entry.gid, entry.uname, entry.gname) for entry in archive.getmembers()
        } == {(0, 0, "", "")}
        assert all(
            entry.name.startswith(f"{path.name.removesuffix('.tar.gz')}/")
            for entry in archive.getmembers()
        )


def test_only_the_newest_five_are_kept_and_nothing_else_is_touched(
    reported: tuple[World, Ended],
) -> None:
    path = Path(reported[1].out.strip())
    kept = [f"report-2026010{day}-000000-000000.tar.gz" for day in (4, 5, 6, 7)]
    assert sorted(entry.name for entry in path.parent.iterdir()) == sorted(
        [*kept, path.name, "mine.txt"]
    )


def test_long_log_is_cut_at_a_line_so_that_half_a_token_is_not_left(
    reported: tuple[World, Ended],
) -> None:
    shown = unpacked(reported[1])["logs/20260101-000000-000000-bootstrap.log"].splitlines()
    assert "bytes before this are left out" in shown[0]
    assert shown[1] == "x" * 99
    assert shown[-1] == HELPS


def test_broken_settings_and_pins_are_part_of_the_report_and_do_not_stop_it(world: World) -> None:
    world.layout.dotenv.write_text("this is no line\nHF_TOKEN=plantedbroken1\nMAX_JOBS=3\n")
    world.layout.pins.write_text("[vllm]\ntag = 7 # plantedbroken1\n")
    ended = report(world, env={"NVCC_THREADS": "many"})
    files = unpacked(ended)
    settings = json.loads(files["settings.json"])
    assert settings["problem"] == ".env, line 1 is not of the form NAME=value"
    assert settings[".env"] == {"HF_TOKEN": "set", "MAX_JOBS": "3"}
    assert "got `int` - at `$.vllm.tag`" in files["status.txt"]
    assert "warn     status        vendor/pins.toml: Expected `str`, got `int`" in ended.err
    assert "plantedbroken1" not in "".join(files.values())


def test_questionnaire_that_hangs_and_a_full_temporary_folder_cost_only_themselves(
    built: World,
) -> None:
    (built.layout.vllm / "vllm" / "collect_env.py").write_text(
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(1000)\n"
    )
    scratch = built.folder / "scratch"
    scratch.mkdir()
    through = mounted(scratch, "size=4k", 'cat /dev/zero > "$0/x" 2>/dev/null; "$@"')
    files = unpacked(report(built, env={"TMPDIR": str(scratch)}, through=through, patience_s=0.5))
    assert "gave no answer in 0.5 s" in files["collect-env.txt"]
    assert "torch" in files["packages.txt"]


def mounted(folder: Path, options: str, script: str) -> tuple[str, ...]:
    """Return a command that mounts a small file system at `folder`; skip where forbidden."""
    through = (
        "unshare",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        f'mount -t tmpfs -o {options} small "$0" && {{ {script}; }}',
        str(folder),
    )
    if subprocess.run([*through, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine forbids to mount a small file system")
    return through


def test_clone_that_cannot_be_written_is_named_before_the_collection(world: World) -> None:
    with read_only(world.root):
        ended = report(world, through=("setpriv", "--bounding-set=-dac_override,-dac_read_search"))
    assert ".workspace" in ended.error(6)
    assert "collecting" not in ended.err


@pytest.mark.parametrize("options", ["nr_inodes=1", "size=4k"], ids=["at once", "at the end"])
def test_full_disk_is_named_and_no_half_report_stays(world: World, options: str) -> None:
    folder = world.layout.state / "reports"
    folder.mkdir(parents=True)
    world.layout.logs.mkdir()
    (world.layout.logs / "20260101-000000-000000-bootstrap.log").write_bytes(
        b"".join(b"%x\n" % (number * 2654435761) for number in range(9000))
    )
    ended = report(
        world, through=mounted(folder, options, '"$@"; code=$?; ls "$0" >&2; exit $code')
    )
    assert "No space left on device" in ended.error(6)
    assert ended.err.splitlines()[-1].startswith("hint: ")
