"""`inv` with any arguments, any environment and anything in the place of its files.

It always ends with a code of the table, a sentence and a hint.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz import places
from tests.fuzz.strategies import DEEP, HUGE, arguments, damaged, damaged_document, fuzz, is_deep
from tests.fuzz.warm_inv import CODES, WarmInv, is_decent
from tests.small.world import Ended
from workspace.cli.main import load_settings
from workspace.core import lock, settings
from workspace.core.errors import SettingsError, WorkspaceError
from workspace.core.paths import Layout

SECRET = "hf_swordfish42"
FLAGS = (
    "--device",
    "--source",
    "--kernels",
    "--jobs",
    "--wait",
    "--json",
    "-j",
    "--no-wait",
    "--help",
    "--list",
    "-l",
    "--version",
)
CORE = (
    "--complete",
    "--debug",
    "--list-depth",
    "--list-format",
    "--print-completion-script",
    "--write-pyc",
    "--search-root",
    "--dry",
    "--config",
    "--",
    "-",
)
MORE_FLAGS = (
    *(
        "--memory",
        "--target",
        "--clean",
        "--plan",
        "--offline",
        "--check",
        "--branch",
        "--patch",
        "--project",
        "--skip",
        "--abort",
        "--allow-recent",
        "--good",
    ),
    *(
        "--origin",
        "--ref",
        "--replace",
        "--from-source",
        "--factor",
        "--across",
        "--lines",
        "--follow",
        "--verbose",
    ),
)
VERBS = (
    *(
        "bootstrap",
        "rebuild",
        "fix-triton",
        "wheel",
        "status",
        "statu",
        "pin.show",
        "pin.forecast",
        "pin.bump",
        "pin.rollback",
    ),
    # Not run, shell, drop-caches, env.init, serve itself: they become what the words say, or change
    # machine and .env.
    *(
        "env.check",
        "env.export",
        "env",
        "serve.list",
        "serve.fetch",
        "serve.status",
        "serve.logs",
        "serve.stop",
        "bench",
        "bench.compare",
        "bench.report",
    ),
    *(
        "patch.status",
        "patch.apply",
        "patch.unapply",
        "patch.export",
        "patch.import",
        "patch.continue",
    ),
)
pieces = st.sampled_from((*VERBS, *FLAGS, *MORE_FLAGS, *CORE)) | arguments
joined = st.tuples(st.sampled_from((*FLAGS, *MORE_FLAGS, *CORE)), arguments).map("=".join)
rebuilds = st.lists(
    st.sampled_from(("--clean", "--plan", "--json"))
    | st.tuples(st.sampled_from(("--jobs", "--memory", "--target", "--kernels")), arguments).map(
        "=".join
    ),
    max_size=3,
).map(lambda flags: ("rebuild", *flags))
fixes = st.lists(
    st.sampled_from(("--from-source", "--check", "--wait"))
    | st.tuples(st.sampled_from(("--ref", "--jobs")), arguments).map("=".join),
    max_size=3,
).map(lambda flags: ("fix-triton", *flags))
command_lines = st.lists(pieces | joined, max_size=4).map(tuple)
bootstraps = st.lists(
    st.sampled_from(("--wait",)) | st.tuples(st.sampled_from(FLAGS[:4]), arguments).map("=".join),
    max_size=3,
).map(lambda flags: ("bootstrap", *flags))
NAMES = (
    *settings.KNOWN,
    "HOME",
    "TERM",
    "COLUMNS",
    "LINES",
    "NO_COLOR",
    "FORCE_COLOR",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "XDG_CACHE_HOME",
    "UV_DEFAULT_INDEX",
)
ODD = (
    "VIRTUAL_ENV",
    "PYTHONPATH",
    "GIT_DIR",
    "VLLM_WORKSPACE_RUN_ECHO",
    "VLLM_WORKSPACE_RUN_WATCHERS",
    "VLLM_WORKSPACE_TASKS",
    "INVOKE_RUN_ECHO",
    "IN\udcffVALID",
)
context = st.dictionaries(st.sampled_from((*NAMES, *ODD)), arguments | st.none(), max_size=3)


@contextmanager
def blocked(inv: WarmInv) -> Iterator[None]:
    """Bootstrap cannot begin here, not even with --wait: its state has no place."""
    with places.replaced(inv.world.layout.state, b""):
        yield


@fuzz(fast=60, deep=4000)
@given(command_lines)
@example(())
@example(("",))
@example(("--list-depth=x",))
@example(("--list", "--list-depth", HUGE))
@example(("--complete", "--", "inv --device \udcff"))
@example(("--complete", "--", "'"))
@example(("--complete",))
@example(("--complete", "--", "inv"))
@example(("--print-completion-script=../x",))
@example(("--list-format=json", "--list=nothing"))
@example(("--list=status",))
@example(("--list", "--list-format=json"))
@example(("--help", "no\nsuch"))
@example(("status", "--json=1"))
@example(("status", "--", "rest"))
@example(("st\udcffatus",))
@example(("status", "status"))
@example(("--search-root",))
@example(("x" * 10_000,))
def test_any_command_line(fresh: WarmInv, line: tuple[str, ...]) -> None:
    with blocked(fresh):
        is_decent(fresh(*line))


@fuzz(fast=30, deep=2000)
@given(bootstraps | rebuilds | fixes)
@example(("rebuild", "--jobs="))
@example(("rebuild", "--jobs=auto", "--memory=" + HUGE))
@example(("rebuild", "--memory=nan"))
@example(("rebuild", "--target=", "--plan", "--json"))
@example(("bootstrap", "--jobs", HUGE))
@example(("bootstrap", "--kernels=~nobody-of-this-name/a.whl"))
@example(("bootstrap", "--kernels=" + "a" * 300 + ".whl"))
@example(("bootstrap", "--kernels=/dev/zero"))
@example(("bootstrap", "--kernels=a\nb"))
@example(("bootstrap", "--source=git", "--wait"))
@example(("fix-triton", "--from-source", "--ref=", "--jobs=auto"))
@example(("fix-triton", "--from-source", "--ref=-x\nmain"))
def test_any_flag_of_bootstrap_rebuild_and_fix_triton(
    fresh: WarmInv, line: tuple[str, ...]
) -> None:
    with blocked(fresh):
        ended = fresh(*line)
    is_decent(ended)
    assert ended.code != 0


@fuzz(fast=30, deep=2000)
@given(context, st.sampled_from((("status",), ("status", "--json"), ("bootstrap",))))
@example({"CONNECT_TIMEOUT_S": HUGE}, ("status",))
@example({"CUDA_HOME": "~nobody-of-this-name"}, ("status",))
@example({"KERNELS": SECRET}, ("status",))
@example({"HOME": None, "WORKSPACE_CACHE_DIR": None}, ("bootstrap",))
@example({"VLLM_WORKSPACE_RUN_WATCHERS": "x"}, ("status",))
@example({"DEVICE": "auto"}, ("status",))
@example({"PYTHON_VERSION": "\udcff"}, ("bootstrap",))
def test_any_context(fresh: WarmInv, env: dict[str, str | None], line: tuple[str, ...]) -> None:
    with blocked(fresh):
        is_decent(fresh(*line, env={"HF_TOKEN": SECRET, **env}), secrets=[SECRET])


@fuzz(fast=1, deep=100)
@given(context)
def test_doctor_in_any_context(fresh: WarmInv, env: dict[str, str | None]) -> None:
    is_decent(fresh("doctor", "--offline", env={"HF_TOKEN": SECRET, **env}), secrets=[SECRET])


@fuzz(fast=8, deep=300)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: st.sampled_from(("0", "-1", "1", "x", "", "dumb", "xterm", "100", HUGE))
            for name in ("COLUMNS", "LINES", "TERM", "NO_COLOR", "FORCE_COLOR")
        },
    ),
    st.sampled_from((("status",), ("bootstrap",), ("bootstrap", "--jobs=[/red]"))),
)
@example({"COLUMNS": "0", "TERM": "dumb"}, ("status",))
@example({"COLUMNS": HUGE}, ("status",))
@example({"TERM": "xterm", "NO_COLOR": "1"}, ("bootstrap", "--jobs=[/red]"))
def test_any_terminal(fresh: WarmInv, env: dict[str, str], line: tuple[str, ...]) -> None:
    with blocked(fresh):
        ended = fresh(*line, env=env, tty=True)
    assert ended.code in CODES
    assert "Traceback" not in ended.err, ended.output
    if env.get("NO_COLOR"):
        assert "\x1b[3" not in ended.err, ended.output


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_the_encoding_of_the_terminal_lacks_is_no_failure(
    fresh: WarmInv, encoding: str
) -> None:
    for line in (
        ("gr\udcffn",),
        ("bootstrap", "--kernels=größe\udcff×.whl"),
        ("status",),
        ("--list",),
    ):
        is_decent(fresh(*line, encoding=encoding))


DOTENV = (
    f"DEVICE=cpu\nHF_TOKEN={SECRET}\nMAX_JOBS=2\n"
    "TORCH_INDEX_URL=https://me:hunter2@index.example/x\n"
)


@fuzz(fast=20, deep=1000)
@given(damaged(DOTENV), st.sampled_from((("status",), ("bootstrap", "--kernels=x.whl"))))
def test_any_dotenv(fresh: WarmInv, content: bytes, line: tuple[str, ...]) -> None:
    with places.replaced(fresh.world.layout.dotenv, content), blocked(fresh):
        is_decent(fresh(*line, env={"HF_TOKEN": SECRET}), secrets=[SECRET])


RECORD = {
    "schema": 1,
    "time": "2026-10-20T10:00:00+00:00",
    "verdict": "pass",
    "tree": "a" * 40,
    "dirty": None,
    "pin": "v0.31.0",
    "checks": [],
    "seconds": 1.5,
}


@fuzz(fast=20, deep=1500)
@given(damaged_document(RECORD))
@example(DEEP[1].encode())
@example(json.dumps({**RECORD, "time": "now\nok       smoke         passed"}).encode())
@example(json.dumps({**RECORD, "time": "\ud800\x1b[2J"}).encode())
@example(json.dumps({**RECORD, "tree": None}).encode())
def test_any_record_of_a_smoke(fresh: WarmInv, content: bytes) -> None:
    with places.replaced(fresh.world.layout.smoke_record, content):
        ended = fresh("status")
    is_decent(ended)
    rows = [line for line in ended.out.splitlines() if line.split()[1:2] == ["smoke"]]
    assert len(rows) == 1, ended.output
    assert not rows[0].startswith("ok"), "nothing is built"
    assert rows[0].isprintable()


@fuzz(fast=10, deep=500)
@given(damaged_document({"pid": 1, "verb": "rebuild", "since": "2026-10-20T10:00:00+00:00"}))
@example(b"")
def test_any_content_of_a_lock_that_is_held(fresh: WarmInv, content: bytes) -> None:
    place = fresh.world.layout.lock
    with lock.hold(place, verb="test"):
        place.write_bytes(content)
        ended = fresh("bootstrap")
    is_decent(ended)
    assert ended.code == 12


LEFT = (
    ".env",
    "vendor",
    "vendor/pins.toml",
    "vendor/vllm",
    "patches",
    "patches/vllm",
    "patches/vllm/series",
    ".vllm",
    ".workspace",
    ".workspace/lock",
)
STATE = (
    ".workspace/logs",
    ".workspace/smoke.json",
    ".vllm/.workspace",
    ".vllm/.workspace/vllm.json",
    ".vllm/bin/python",
    ".vllm/pyvenv.cfg",
    ".gitmodules",
    ".git",
)


THINGS = (
    (*places.NO_FILE, b"", b"\0\xff")
    if is_deep()
    else ("directory", "fifo", "dangling link", "loop", b"\0\xff")
)


@pytest.mark.parametrize("name", [*LEFT, *STATE])
def test_anything_in_the_place_of_a_file_or_folder(fresh: WarmInv, name: str) -> None:
    path = fresh.world.root / name
    for thing in THINGS:
        with ExitStack() as stack:
            if name.startswith((".vllm/", ".workspace/")):
                path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(places.replaced(path, thing))
            # Where nothing is in the way, this comes before anything is made.
            for line in (("status",), ("bootstrap", "--kernels=/nowhere.whl")):
                is_decent(fresh(*line))


@pytest.mark.parametrize("name", ["", "lock", "logs"])
def test_bootstrap_whose_state_has_no_place_says_so(fresh: WarmInv, name: str) -> None:
    path = fresh.world.layout.state / name
    for thing in (
        *(
            thing
            for thing in places.NO_FILE
            if thing not in ("nothing", "directory", "link to a directory")
        ),
        b"",
    ):
        if name == "lock" and thing == b"":
            continue
        with places.replaced(path, thing) if name else blocked(fresh):
            ended = fresh("bootstrap", "--source=git", env={"PATH": "/nowhere"})
        is_decent(ended)
        assert ended.code != 0


def test_clone_in_a_folder_whose_name_is_no_text_is_refused_before_anything_is_done(
    tmp_path: Path,
) -> None:
    for name in (b"caf\xe9", b"two\nlines"):
        with pytest.raises(WorkspaceError) as caught:
            load_settings(Layout(tmp_path / os.fsdecode(name)))
        assert caught.value.hint
        assert "\n" not in caught.value.message


def test_user_whom_the_machine_does_not_know_and_who_has_no_home_gets_the_variable_to_set(
    tmp_path: Path,
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    child = os.fork()
    if child == 0:
        os.setuid(54321)
        os.environ.pop("HOME", None)
        try:
            settings.load(Layout(Path("/nowhere")), environ={}).cache  # noqa: B018
        except SettingsError as exc:
            os._exit(0 if exc.hint else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    "thing", [b"", "dangling link", "loop"] if is_deep() else ["dangling link"]
)
def test_logs_that_cannot_be_written_end_the_verb_before_its_first_command(
    whole: WarmInv, thing: str | bytes
) -> None:
    whole.world.layout.stamp("vllm").unlink()
    places.clear(whole.world.layout.logs)
    places.put(whole.world.layout.logs, thing)
    ended = whole("bootstrap")
    is_decent(ended)
    assert ended.code == 6
    assert str(whole.world.layout.logs) in ended.err


DAMAGED = ("vllm", "environment")


@fuzz(fast=5, deep=400)
@given(st.data())
def test_any_stamp_of_a_built_clone_is_fresh_only_if_it_says_the_same(
    whole: WarmInv, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(DAMAGED))
    path = whole.world.layout.stamp(name)
    original = json.loads(path.read_bytes())
    content = data.draw(damaged_document(original))
    with places.replaced(path, content):
        ended = whole("status", "--json")
    is_decent(ended)
    if ended.code == 0:
        states = {row["name"]: row["state"] for row in json.loads(ended.out)["rows"]}
        layers = ("environment",) if name == "environment" else ("kernels", "install")
        if all(states[layer] == "ok" for layer in layers):
            inputs = json.loads(content)["inputs"]
            assert all(inputs.get(key) == text for key, text in original["inputs"].items()), (
                "a damaged stamp passes for fresh"
            )


READ = (".workspace/expected-trees/vllm.json", ".vllm/lib/python3.*/site-packages/torch/version.py")


def test_whatever_lies_in_the_place_of_what_status_reads_of_a_built_clone_never_hangs(
    whole: WarmInv,
) -> None:
    for pattern in READ:
        path = next(whole.world.root.glob(pattern))
        for thing in (
            (*places.NO_FILE, b"\xff\0", *map(str.encode, DEEP))
            if is_deep()
            else ("fifo", b"\xff\0", DEEP[0].encode())
        ):
            with places.replaced(path, thing):
                is_decent(whole("status"))


INSIDE = (
    "vendor/vllm/.git/index",
    "vendor/vllm/.git/HEAD",
    "vendor/vllm/.git/config",
    "vendor/vllm/setup.py",
    "vendor/vllm/requirements",
    ".vllm/pyvenv.cfg",
)


def test_files_inside_a_built_clone_that_a_power_cut_emptied_or_filled_with_noise(
    whole: WarmInv,
) -> None:
    for name in INSIDE:
        for content in (b"", b"\xff\0", "directory") if is_deep() else (b"",):
            with places.replaced(whole.world.root / name, content):
                is_decent(whole("status"))


@fuzz(fast=4, deep=400)
@given(st.data())
def test_any_patch_and_series_on_a_built_clone(whole: WarmInv, data: st.DataObject) -> None:
    folder = whole.world.layout.patches("vllm")
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    with places.replaced(path, data.draw(damaged(path.read_text()))):
        is_decent(whole("status"))


@pytest.mark.parametrize(
    ("args", "env"),
    [
        ([b"stat\xff\xfeus"], {}),
        ([b"bootstrap", b"--device=\xc3\x28"], {"LC_ALL": "C"}),
        ([b"status"], {"LC_ALL": "C", "LANG": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}),
        ([b"status"], {"PATH": ""}),
        ([b"bootstrap", b"--kernels="], {"PATH": None, "HOME": None}),
    ],
)
def test_a_real_process_with_bytes_that_are_no_text(
    fresh: WarmInv, args: list[bytes], env: dict[str, str | None]
) -> None:
    surrounding = {
        name: text for name, text in {**fresh.world.env, **env}.items() if text is not None
    }
    done = subprocess.run(
        [*map(os.fsencode, fresh.world.argv()), *args],
        env=surrounding,
        capture_output=True,
        check=False,
        timeout=20,
    )
    is_decent(
        Ended(
            done.returncode,
            done.stdout.decode(errors="replace"),
            done.stderr.decode(errors="replace"),
        )
    )
