"""inv and its ways in, run for real in copies of the clone: from any folder, with any words, by a
foreign inv, nox or Python.
"""

import json
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from invoke.parser.parser import Parser

from tests.clone import Clone, is_list, make_clone
from workspace.cli.program import EXAMPLES, GROUPS, program


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone with its tool environment; tests only look at it."""
    clone = make_clone(tmp_path_factory.mktemp("ready"))
    assert clone.inv("--list").returncode == 0
    return clone


def test_inv_works_from_any_folder_and_through_a_symlink(ready: Clone, tmp_path: Path) -> None:
    (tmp_path / "inv").symlink_to(ready.root / "scripts" / "inv")
    (tmp_path / "clone").symlink_to(ready.root)
    ways = [
        ready.run("./inv", "--list", cwd=tmp_path),
        ready.run("clone/scripts/inv", "--list", cwd=tmp_path),
        ready.run("sh", "inv", "--list", cwd=ready.root / "scripts"),
        ready.run("inv", "--list", cwd=tmp_path, PATH=f"{tmp_path}:/usr/bin:/bin"),
    ]
    assert [(is_list(way.stdout), way.stderr, way.returncode) for way in ways] == [
        (True, "", 0)
    ] * 4


def test_a_verb_does_not_pay_for_modules_that_it_does_not_use(ready: Clone) -> None:
    python = ready.root / ".workspace" / "tools" / "bin" / "python"
    done = ready.run(python, "-X", "importtime", ready.root / "tasks.py", "--list")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "invoke.program" in imported
    unused = {"asyncio", "email", "importlib.metadata", "msgspec", "ssl", "unittest", "yaml"}
    assert not imported & unused
    assert re.fullmatch(r"Invoke \d+\.\d+\.\d+\n", ready.inv("--version").stdout)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nonsense"], "error: there is no verb nonsense\nhint: ./scripts/inv --list\n"),
        (
            ["pin.rollback", "v0.32.0"],
            (
                "error: inv pin.rollback takes no argument v0.32.0, and there is no verb of"
                " that name\nhint: ./scripts/inv pin.rollback --good v0.32.0\n"
            ),
        ),
        (
            ["bootstrap", "xyzzy"],
            (
                "error: inv bootstrap takes no argument xyzzy, and there is no verb of that name\n"
                "hint: ./scripts/inv --help bootstrap\n"
            ),
        ),
        (
            ["bootstarp"],
            (
                "error: there is no verb bootstarp\n"
                "hint: ./scripts/inv --list    did you mean bootstrap?\n"
            ),
        ),
        (
            ["bootstrap", "--nope"],
            "error: inv bootstrap has no flag --nope\nhint: ./scripts/inv --help bootstrap\n",
        ),
        (
            ["bootstrap", "--devise=cpu"],
            (
                "error: inv bootstrap has no flag --devise\n"
                "hint: ./scripts/inv --help bootstrap    did you mean --device?\n"
            ),
        ),
        (
            ["serve", "tiny", "--dtype=half", "--detach", "--seed", "0"],
            (
                "error: inv serve.start has no flag --dtype\n"
                "hint: ./scripts/inv serve tiny --detach -- --dtype=half --seed 0    flags of vLLM"
                " stand after --\n"
            ),
        ),
        (
            ["bootstrap", "--device"],
            "error: --device needs a value\nhint: ./scripts/inv --help bootstrap\n",
        ),
        (
            ["rebuild", "--plan", "--target"],
            "error: --target needs a value\nhint: ./scripts/inv --help rebuild\n",
        ),
        (["--dry", "bootstrap"], "error: inv has no flag --dry\nhint: ./scripts/inv --help\n"),
        (
            ["--help", "bootstarp"],
            (
                "error: there is no verb bootstarp\n"
                "hint: ./scripts/inv --list    did you mean bootstrap?\n"
            ),
        ),
        (
            ["serve"],
            "error: inv serve.start needs RECIPE\nhint: ./scripts/inv --help serve.start\n",
        ),
        (["--list", "nope"], "error: no verb begins with 'nope.'\nhint: ./scripts/inv --list\n"),
        (
            ["--list-format", "nope", "--list"],
            "error: --list-format: 'nope' is not one of flat, full, nested, json\n",
        ),
        (
            ["--print-completion-script", "nope"],
            "error: there is no completion for the shell 'nope', only for bash, fish, zsh\n",
        ),
        (
            ["bootstrap", "--device", "gpu"],
            "error: --device: 'gpu' is not one of auto, cuda, cpu\n",
        ),
        (
            ["bootstrap", "--jobs", "many"],
            "error: --jobs: 'many' is not a whole number of at least 1\n",
        ),
    ],
)
def test_misuse_is_a_sentence_and_exits_2(ready: Clone, args: list[str], says: str) -> None:
    failed = ready.inv(*args)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith(says)
    assert "Traceback" not in failed.stderr


def test_reader_that_goes_away_is_no_traceback(ready: Clone) -> None:
    script = '"$0" --list | true; "$0" --list >&-; "$0" nonsense 2>&1 | true'
    closed = ready.run("/bin/sh", "-c", script, ready.root / "scripts" / "inv")
    assert "Traceback" not in closed.stderr
    assert "BrokenPipe" not in closed.stderr


def test_output_on_a_full_disk_is_a_sentence(ready: Clone) -> None:
    script = '"$0" env.export >/dev/full'
    failed = ready.run("/bin/sh", "-c", script, ready.root / "scripts" / "inv")
    assert failed.returncode == 6
    assert failed.stderr.startswith(
        "error: the output cannot be written: No space left on device\n"
    )
    assert failed.stderr.count("\n") == 2


def test_help_of_a_verb_names_what_it_needs_and_each_value(ready: Clone) -> None:
    serve = ready.inv("serve.start", "--help").stdout.splitlines()
    rebuild = ready.inv("--help", "rebuild").stdout.splitlines()
    assert any(line.startswith("  --dry-run ") for line in serve)
    assert serve[0] == "Usage: inv serve RECIPE [flags] [-- FLAGS OF VLLM]"
    assert any(line.startswith("  --jobs, -j JOBS ") for line in rebuild)
    assert any(line.startswith("  RECIPE   a recipe,") for line in serve)
    assert "(default: the setting KERNELS, auto if unset)" in " ".join(" ".join(rebuild).split())
    assert rebuild[-2:] == ["  ./scripts/inv rebuild --plan", ""]


def test_every_help_text_fits_its_column(ready: Clone) -> None:
    document = json.loads(ready.inv("--list", "--list-format=json").stdout)
    texts = {task["name"]: task["help"] for task in document["tasks"]}
    assert {"bootstrap", "status"} <= texts.keys()
    assert {name: text for name, text in texts.items() if not 0 < len(text) <= 60} == {}


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """The bin folder of an environment from elsewhere, with invoke and nox and nothing else of what
    the doors need.
    """
    subprocess.run(
        [sys.executable, "-Es", "-m", "venv", "--without-pip", "--symlinks", tmp_path / "foreign"],
        check=True,
    )
    site = next(tmp_path.glob("foreign/lib/*/site-packages"))
    own = Path(sysconfig.get_path("purelib"))
    names = (
        "invoke nox argcomplete attr attrs colorlog dependency_groups humanize packaging virtualenv"
        " platformdirs filelock distlib python_discovery"
    )
    for name in names.split():
        for path in (own / name, *own.glob(f"{name}-*.dist-info")):
            if path.exists():
                (site / path.name).symlink_to(path)
    for tool, start in (
        ("inv", "from invoke.main import program; program.run()"),
        ("nox", "from nox import main; main()"),
    ):
        script = tmp_path / "foreign" / "bin" / tool
        script.write_text(f"#!{tmp_path}/foreign/bin/python\n{start}\n")
        script.chmod(0o755)
    return tmp_path / "foreign" / "bin"


def test_foreign_inv_hands_over_with_all_arguments(ready: Clone, foreign: Path) -> None:
    below = ready.root / "workspace" / "core"
    assert is_list(ready.run(foreign / "inv", "--list", cwd=below).stdout)
    failed = ready.run(foreign / "inv", "bootstrap", "--device", "a b", cwd=below)
    assert (failed.returncode, failed.stderr.splitlines()[0]) == (
        2,
        "error: --device: 'a b' is not one of auto, cuda, cpu",
    )
    assert is_list(ready.run(foreign / "inv", "--search-root", ready.root, "--list").stdout)


def test_foreign_python_that_runs_the_tasks_file_hands_over(ready: Clone, foreign: Path) -> None:
    site = next(foreign.parent.glob("lib/*/site-packages"))
    (site / "invoke").unlink()
    assert is_list(ready.run(foreign / "python", ready.root / "tasks.py", "--list").stdout)


def test_foreign_nox_hands_over_with_all_arguments(ready: Clone, foreign: Path) -> None:
    listed = ready.run(
        foreign / "nox",
        "-f",
        "a clone/noxfile.py",
        "--list",
        "-s",
        "lint",
        cwd=ready.root.parent,
        PWD=str(ready.root.parent),
    )
    assert ("* lint" in listed.stdout, "* tests" in listed.stdout, listed.returncode) == (
        True,
        False,
        0,
    ), listed.stderr


INTERRUPT = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"


@pytest.mark.parametrize(
    ("place", "entrance", "args"),
    [
        ("workspace/cli/__init__.py", "inv", ["status"]),
        ("workspace/core/files.py", "inv", ["--list"]),
        ("noxfile.py", "nox", ["--list"]),
        ("scripts/configparser.py", "inv", ["--version"]),
    ],
    ids=["cli", "core", "nox", "tools"],
)
def test_interrupt_during_the_imports_of_an_entrance_leaves_no_traceback(
    tmp_path: Path, place: str, entrance: str, args: list[str]
) -> None:
    clone = make_clone(tmp_path)
    if entrance == "nox" or place.startswith("workspace"):
        assert clone.inv("--version").returncode == 0
    (clone.root / place).write_text(INTERRUPT)
    ended = clone.run(clone.root / "scripts" / entrance, *args)
    # The shell exits as the program that prepares the tools: killed by SIGINT.
    assert ended.returncode in (-2, 130)
    assert "Traceback" not in ended.stderr
    assert "KeyboardInterrupt" not in ended.stderr


def test_interrupt_of_a_verb_is_named_and_exits_130(tmp_path: Path) -> None:
    clone = make_clone(tmp_path)
    module = clone.root / "workspace" / "core" / "paths.py"
    head = "def here() -> Layout:\n"
    body = "".join(f"    {line}\n" for line in INTERRUPT.splitlines())
    module.write_text(module.read_text().replace(head, head + body))
    ended = clone.inv("status")
    assert (ended.returncode, ended.stderr.splitlines()[-1]) == (130, "interrupted")


def test_ignored_interrupt_stays_ignored(tmp_path: Path) -> None:
    clone = make_clone(tmp_path)
    assert clone.inv("--version").returncode == 0
    (clone.root / "workspace" / "cli" / "__init__.py").write_text(INTERRUPT)
    script = "trap '' INT; exec \"$0\" --version"
    done = clone.run("/bin/sh", "-c", script, clone.root / "scripts" / "inv")
    assert (done.returncode, done.stdout[:6]) == (0, "Invoke")


def test_verbs_that_start_nothing_do_not_repeat_the_warnings_of_env(ready: Clone) -> None:
    dotenv = ready.root / ".env"
    dotenv.write_text("NCCL_SOCKET_IFNMAE=eth0\nMAX_JOBS=2\n")
    try:
        for verb in (["patch"], ["pin", "--offline"], ["status"], ["serve.list"], ["bench"]):
            assert "IFNMAE" not in ready.inv(*verb).stderr
        shown = ready.inv("env")
        assert "did you mean NCCL_SOCKET_IFNAME?" in shown.stdout + shown.stderr
    finally:
        dotenv.unlink()


def test_verb_that_starts_something_warns_of_each_line_once(ready: Clone) -> None:
    dotenv = ready.root / ".env"
    dotenv.write_text("NCCL_SOCKET_IFNMAE=eth0\n")
    try:
        warned = ready.inv("env.export").stderr
        assert warned.count("IFNMAE is not a known setting") == 1
        assert "sed -i" not in warned
    finally:
        dotenv.unlink()


def test_no_verb_has_a_short_flag_but_j_for_jobs() -> None:
    namespace = program().namespace
    assert namespace is not None
    short = {
        (str(argument.name), name)
        for context in namespace.to_contexts()
        for argument in context.args.values()
        for name in argument.names
        if len(name) == 1
    }
    assert short == {("jobs", "j")}


def test_list_has_each_verb_in_one_group_and_fits_the_terminal(ready: Clone) -> None:
    namespace = program().namespace
    assert namespace is not None
    named = [name for names in GROUPS.values() for name in names]
    assert sorted(named) == sorted(context.name for context in namespace.to_contexts())
    assert len(GROUPS["Start here"]) == 10
    short = ready.inv("--list").stdout
    full = ready.inv("help").stdout
    assert max(map(len, f"{short}\n{full}".splitlines())) <= 80
    # The screen of 24 lines has the prompt, too.
    assert short.count("\n") < 24
    assert [line[:-1] for line in full.splitlines() if line.endswith(":")] == list(GROUPS)
    for context in namespace.to_contexts():
        typed = (context.aliases or [str(context.name)])[0]
        assert re.search(rf"(^ +|[ ,]){re.escape(typed)}(,|$|  )", short, re.MULTILINE), typed
        assert re.search(rf"^  {re.escape(typed)} +[A-Z]", full, re.MULTILINE), typed


def test_example_of_each_verb_is_parsed_as_a_call_of_that_verb() -> None:
    namespace = program().namespace
    assert namespace is not None
    contexts = namespace.to_contexts()
    for context in contexts:
        typed = EXAMPLES[str(context.name)]
        found = re.search(r"\./scripts/inv ([^)]*)", typed)
        tokens = shlex.split(found[1] if found else typed)
        tokens = tokens[: tokens.index("--")] if "--" in tokens else tokens
        (parsed,) = Parser(contexts=contexts).parse_argv(tokens)
        assert parsed.name == context.name


def test_help_is_a_word_too(ready: Clone) -> None:
    assert ready.inv("help").stdout == ready.inv("--list", "--list-format=full").stdout
    assert ready.inv("help", "rebuild").stdout == ready.inv("--help", "rebuild").stdout
    assert ready.inv("help", "nonsense").returncode == 2
