"""The registry of hints, walked: names, values, commands, and nothing that harms the user.

Each rule is a function, and is also shown a hint, or a source, that breaks it.
"""

import argparse
import ast
import contextlib
import functools
import io
import platform
import re
import shlex
import string
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from invoke.exceptions import Exit, ParseError
from invoke.program import Program

from scripts import docs
from tests.parsed import parse
from tests.proof.hints.table import ELSEWHERE, NOT_RUN, SITUATIONS
from workspace.checks.registry import REGISTRY as CHECKS
from workspace.cli.program import program
from workspace.cli.sessions import SESSIONS
from workspace.core import hints
from workspace.core.hints import Hint
from workspace.machine import failures
from workspace.server import command

ROOT = Path(__file__).resolve().parents[1]
REGISTRY = hints.registry()
COMMANDS = [name for name, hint in REGISTRY.items() if not hint.advice]
LIBRARY = {
    path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "workspace").rglob("*.py"))
}
NOXFILE = (ROOT / "noxfile.py").read_text(encoding="utf-8")
# What a placeholder stands for, where the word VALUE does not do.
SAMPLES: dict[str, object] = {
    "other": "other",
    "choice": "git",
    "command": "./scripts/inv rebuild",
    "count": 3,
    "fix": "./scripts/inv bootstrap",
    "flag": "--max-num-seqs",
    "flags": "--across torch",
    "gib": 4,
    "kind": "latency",
    "label": "second",
    "needed": 5,
    "percent": 3.0,
    "starts": 5,
    "factor": 0.03,
    "utilization": 0.7,
    "value": 0.7,
    "uv": "/usr/bin/uv",
    "python": "/usr/bin/python3",
    "program": "/usr/bin/ccache",
    "verb": "rebase",
    "arguments": ["--label", "after", "--repeat", "6"],
    "words": ["rebuild", "--target", "_C"],
}
PROGRAMS = {
    *(
        ".vllm/bin/hf",
        ".vllm/bin/vllm",
        "ccache",
        "cat",
        "cd",
        "chmod",
        "chown",
        "cp",
        "curl",
        "df",
        "diff",
    ),
    *(
        "echo",
        "export",
        "findmnt",
        "free",
        "git",
        "grep",
        "ip",
        "journalctl",
        "kill",
        "less",
        "ls",
        "mkdir",
        "mount",
        "mv",
    ),
    *("nvidia-smi", "ps", "python3", "reboot", "rm", "sed", "sha256sum", "ss", "systemctl"),
    *("loginctl", "ssh", "ssh-copy-id", "ssh-keygen", "ufw", "firewall-cmd"),
    *("sysctl", "tar", "tee", "unset", "uv", "apt", "apt-get", "${EDITOR:-nano}"),
}
VERB_OF_INSTALL = "rebuild"
# What a hint installs, and the file for which it does: packages of Debian and Ubuntu, and below
# them of NVIDIA's repository.
PACKAGES = {
    "ccache": "/usr/bin/ccache",
    "earlyoom": "/usr/bin/earlyoom",
    "g++": "/usr/bin/g++",
    "g++-VALUE": "/usr/bin/g++-VALUE",
    "git": "/usr/bin/git",
    "openssh-client": "/usr/bin/ssh",
    "libibverbs1": f"/usr/lib/{platform.machine()}-linux-gnu/libibverbs.so.1",
    "libnuma1": f"/usr/lib/{platform.machine()}-linux-gnu/libnuma.so.1",
    "patch": "/usr/bin/patch",
    "pythonVALUE": "/usr/bin/pythonVALUE",
    "pythonVALUE-dev": "/usr/include/pythonVALUE/Python.h",
    "cuda-toolkit-13-0": "/usr/local/cuda-13.0/bin/ptxas",
    "cuda-toolkit-VALUE": "/usr/local/cuda-VALUE/bin/ptxas",
    "nvidia-driver-VALUE-open": "/usr/bin/nvidia-smi",
    # machine.apt_toolkit, machine.cuda_home_after
    "VALUE": "/usr/local/cuda/bin/nvcc",
}
MOST_ADVICE = 6
# It may only fall: a new hint needs a situation in tests/proof/hints.
MOST_NOT_RUN = 30
RUN = {name for situation in SITUATIONS for name in situation.hints}
REMARK = re.compile(r"    |\s+# ")
HARMS = re.compile(
    r"(?:^|[\s;&|])(?:rm|mv|kill) |git [^;&|]*?(?:reset --hard|clean\b|checkout -- |restore\b"
    r"|branch -[dD]\b|worktree remove|stash drop|submodule deinit)"
    r"|(?:^|[\s;&|])cp \S+ \.env\b(?!\.)|sed -i "
)


def values(hint: Hint) -> dict[str, object]:
    """Return a value for each placeholder."""
    names = {name for _, name, _, _ in string.Formatter().parse(hint.text) if name}
    return {name: SAMPLES.get(name, "VALUE") for name in names}


def filled(name: str) -> str:
    if name == "install.verb":
        return hints.text(name, verb=VERB_OF_INSTALL)
    return hints.text(name, **values(REGISTRY[name]))


# Rules on the library's source.


def is_text(node: ast.expr) -> bool:
    """Return whether an expression is, or may be, a text of its own."""
    match node:
        case ast.Constant(value=str(text)):
            return bool(text)
        case ast.JoinedStr() | ast.BinOp(op=ast.Add()):
            return True
        case ast.IfExp():
            return is_text(node.body) or is_text(node.orelse)
        case ast.BoolOp():
            return any(map(is_text, node.values))
        case ast.Call(func=ast.Attribute(attr="join" | "format")):
            # `" && ".join(commands)` connects hints.
            return ast.unparse(node.func) != "' && '.join"
    return False


def hint_expressions(tree: ast.AST) -> Iterator[ast.expr]:
    """Yield what is given as a hint: arguments, columns of a row, and variables of that name."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=called):
                name = ast.unparse(called).rpartition(".")[2]
                yield from (each.value for each in node.keywords if each.arg == "hint")
                if name.endswith("Row"):
                    yield from node.args[4:5]
                if name == "hint":
                    yield from node.args[:1]
            case ast.Assign(targets=[target]):
                if ast.unparse(target).lower().endswith("hint"):
                    yield node.value
            case ast.FunctionDef(name=name) if name.lower().endswith("hint"):
                returns = (each for each in ast.walk(node) if isinstance(each, ast.Return))
                yield from (each.value for each in returns if each.value is not None)


def texts_in_code(source: str) -> list[str]:
    """Return the hints of a source that are text; the name of a hint is none."""
    texts = [node for node in hint_expressions(parse(source)) if is_text(node)]
    return [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in texts
        if not (isinstance(node, ast.Constant) and node.value in REGISTRY)
    ]


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="hints"), attr="text")):
                yield node


def wrong_calls(source: str) -> list[str]:
    """Complain about unknown names, and about values that the hint lacks or does not have."""
    wrong = []
    for call in calls(parse(source)):
        match call.args:
            case [ast.Constant(value=str(name))] if name in REGISTRY:
                given = {str(each.arg) for each in call.keywords}
                if given != set(values(REGISTRY[name])):
                    wrong.append(f"line {call.lineno}: {name} with {sorted(given)}")
            case [ast.Constant(value=name)]:
                wrong.append(f"line {call.lineno}: there is no hint {name}")
    return wrong


def names_in_calls(tree: ast.AST) -> list[ast.Constant]:
    """Return the names that are written in a call; a table may have others."""
    return [call.args[0] for call in calls(tree) if isinstance(call.args[0], ast.Constant)]


def names_in_tables(tree: ast.AST) -> set[str]:
    """Return the names of hints that stand in a table, and get no values."""
    in_calls = set(map(id, names_in_calls(tree)))
    return {
        str(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in REGISTRY and id(node) not in in_calls
    }


# Rules on a hint.


def commands(text: str) -> list[list[str]]:
    """Return the commands before the first remark, each as its tokens."""
    lexer = shlex.shlex(REMARK.split(text)[0], posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    lexer.commenters = ""
    found: list[list[str]] = [[]]
    for token in lexer:
        if set(token) <= set("&|;"):
            found.append([])
        else:
            found[-1].append(token)
    return found


def wrong_command(tokens: list[str]) -> str | None:
    """Return why a command cannot be typed, or None."""
    while tokens and (re.match(r"[A-Z_0-9]+=", tokens[0]) or tokens[0] == "sudo"):
        tokens = tokens[1:]
    match tokens:
        case []:
            return "an empty command"
        case ["./scripts/inv", *rest]:
            return wrong_verb(tuple(rest))
        case ["./scripts/nox", "-s", name, *rest]:
            return wrong_session(name, rest)
        case [first, *_] if first in PROGRAMS or Path(first).name in PROGRAMS - {"vllm"}:
            return None
    return f"{tokens[0]} is no known program"


@contextlib.contextmanager
def all_verbs() -> Iterator[Program]:
    """Yield the program. Invoke takes the help out of a verb when it first parses; put it back."""
    made = program()
    verbs = [made.namespace[name] for name in made.namespace.task_names]
    helps = [dict(verb.help) for verb in verbs]
    try:
        yield made
    finally:
        for verb, texts in zip(verbs, helps, strict=True):
            verb.help = texts


@functools.cache
def wrong_verb(tokens: tuple[str, ...]) -> str | None:
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.suppress(Exit),
            all_verbs() as made,
        ):
            made.create_config()
            made.parse_core(["inv", *tokens])
            made.parse_collection()
            made.parse_tasks()
    except ParseError as exc:
        return f"inv {shlex.join(tokens)}: {exc}"
    return None


def wrong_session(name: str, tokens: list[str]) -> str | None:
    if name not in {session.name for session in docs.read_sessions(NOXFILE)}:
        return f"there is no session {name}"
    if not tokens:
        return None
    if tokens[0] != "--" or name not in SESSIONS:
        return f"{name} takes no {tokens}"
    own = tokens[1:]
    own = own[: own.index("--")] if "--" in own else own
    parser = docs.parser_of(lambda: SESSIONS[name]([]))
    # A hint may leave out what stands in the command that was typed.
    for action in parser._actions:
        action.required = False
        if not action.option_strings and action.nargs is None:
            action.nargs = "?"
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            parser.parse_args(own)
    except (SystemExit, argparse.ArgumentError):
        return f"{name}: {printed.getvalue()}"
    return None


def wrong_remark(text: str) -> list[str]:
    """Complain about a verb, a session or a flag in a remark that does not exist."""
    found = []
    for kind, name, flags in re.findall(
        r"\./scripts/(inv|nox -s) ([\w.-]+)((?: --[\w-]+(?= |$|[;,]))*)", text
    ):
        tokens = [name.rstrip("."), *flags.split()]
        if kind == "inv" and not name.startswith("-"):
            found.append(wrong_flags(tokens))
        elif kind == "nox -s":
            found.append(wrong_session(tokens[0], []))
    return [each for each in found if each]


def wrong_flags(tokens: list[str]) -> str | None:
    with all_verbs() as made:
        contexts = {
            name: context
            for context in made.namespace.to_contexts()
            for name in (context.name, *context.aliases)
        }
    if tokens[0] not in contexts:
        return f"there is no verb {tokens[0]}"
    unknown = [flag for flag in tokens[1:] if flag not in contexts[tokens[0]].flags]
    return f"{tokens[0]} has no {unknown}" if unknown else None


def wrong_words(text: str) -> str | None:
    """Return what is wrong with the words of a hint: an empty one, or blanks in between."""
    if re.search(r"(?<!\S)(''|\"\")(?!\S)", text):
        return "an empty word"
    if text != text.strip() or re.search(r"(?<! ) {2,3}(?![ #])| {5,}", text):
        return "blanks that separate no remark"
    return None


def wrong_harm(hint: Hint) -> str | None:
    """Return whether a hint harms without a reason, or has a reason without a harm."""
    if bool(HARMS.search(hint.text)) != bool(hint.deletes):
        return f"{hint.text!r}: deletes = {hint.deletes!r}"
    return None


def test_no_module_has_the_text_of_a_hint() -> None:
    assert {path: found for path, text in LIBRARY.items() if (found := texts_in_code(text))} == {}


def test_every_call_names_a_hint_and_gives_its_values() -> None:
    assert {path: found for path, text in LIBRARY.items() if (found := wrong_calls(text))} == {}


@pytest.mark.parametrize(
    "source",
    [
        'raise Error("a", hint="./scripts/inv status")',
        'raise Error("a", hint=f"less {log}")',
        'raise Error("a", hint="less " + log)',
        'raise Error("a", hint=following or "./scripts/inv status")',
        'raise Error("a", hint=hints.text("inv.status") if a else "ls")',
        'raise Error("a", hint=" ".join(argv))',
        'Row(State.FAIL, "a", "b", "c", "ls")',
        'console.hint("ls")',
        'hint = "ls"',
        '_HINT = f"ls {b}"',
        'exc.hint = "ls"',
        'def _hint():\n    return "ls"',
    ],
)
def test_a_text_in_the_code_is_found(source: str) -> None:
    assert texts_in_code(source)


def test_a_hint_that_has_a_name_passes() -> None:
    source = 'hint = hints.text("inv.status")\nRow(a, b, c, d, None)\nf(hint=" && ".join(commands))'
    assert not texts_in_code(source)


def test_an_unknown_name_and_other_values_are_found() -> None:
    assert wrong_calls('hints.text("inv.no_such_verb")')
    assert wrong_calls('hints.text("core.read_log")')
    assert wrong_calls('hints.text("core.read_log", path=a, more=b)')
    assert not wrong_calls('hints.text("core.read_log", path=a)')


def test_every_hint_is_used() -> None:
    trees = [parse(source) for source in LIBRARY.values()]
    used = {name for tree in trees for name in names_in_tables(tree)}
    used |= {str(node.value) for tree in trees for node in names_in_calls(tree)}
    assert set(REGISTRY) - used == set()


def test_tables_have_names_of_hints() -> None:
    named = {check: entry.hint for check, entry in CHECKS.items()} | command.REFUSED
    assert {key: name for key, name in named.items() if name not in REGISTRY} == {}


def test_only_those_tables_give_a_name_that_is_no_literal() -> None:
    others = [
        (path.name, ast.unparse(call.args[0]))
        for path, source in LIBRARY.items()
        for call in calls(parse(source))
        if not isinstance(call.args[0], ast.Constant)
    ]
    assert others == [("smoke.py", "entry.hint"), ("command.py", "refused")]


def test_a_hint_of_a_table_gets_no_values() -> None:
    named = set().union(*(names_in_tables(parse(source)) for source in LIBRARY.values()))
    assert named
    assert [name for name in sorted(named) if values(REGISTRY[name])] == []


def test_every_hint_begins_with_a_command_that_can_be_typed() -> None:
    wrong = {}
    # The table of symptoms has the next command of each symptom.
    symptoms = {
        symptom.name: symptom.next_command(name="NAME", typed="./scripts/inv serve NAME") or "ls"
        for symptom in failures.symptoms()
    }
    for name, text in ({name: filled(name) for name in COMMANDS} | symptoms).items():
        found = [fault for tokens in commands(text) if (fault := wrong_command(tokens))]
        if found := [*found, *wrong_remark(text)]:
            wrong[name] = found
    assert wrong == {}


def test_every_command_is_one_for_a_shell() -> None:
    lines = "".join(f"{REMARK.split(filled(name))[0]}\n" for name in COMMANDS)
    done = subprocess.run(["bash", "-n"], input=lines, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def packages(text: str) -> set[str]:
    """Return the packages that a hint installs, also in its remark."""
    found = re.findall(r"apt(?:-get)? install (?:--reinstall )?([^&#;,]+)", text)
    return {package for names in found for package in names.split("    ")[0].split()}


def test_what_a_hint_installs_has_the_program_that_is_missing() -> None:
    named = set().union(*(packages(filled(name)) for name in REGISTRY))
    assert named == set(PACKAGES)
    # Where the package is installed, the distribution's own list has the file.
    for package, file in PACKAGES.items():
        listed = subprocess.run(["sh", "-c", f"dpkg -L {package}"], capture_output=True, text=True)
        assert listed.returncode != 0 or file in listed.stdout.split(), package


@pytest.mark.parametrize(
    "text",
    [
        "read the log",
        "./scripts/inv no-such-verb",
        "./scripts/inv status --no-such-flag",
        "./scripts/inv rebuild --jobs",
        "./scripts/inv patch.import",
        "./scripts/nox -s no-such-session",
        "./scripts/nox -s bisect -- --no-such-flag",
        "./scripts/nox -s bench -- no-such-kind",
        "./scripts/inv status && read the log",
        "-- --port 8000",
    ],
)
def test_a_command_that_cannot_be_typed_is_found(text: str) -> None:
    assert [tokens for tokens in commands(text) if wrong_command(tokens)]


@pytest.mark.parametrize(
    "text",
    [
        "ls    or ./scripts/inv no.such.verb",
        "ls    or ./scripts/inv status --no-such-flag",
        "ls    then ./scripts/nox -s no-such-session",
    ],
)
def test_a_wrong_command_in_a_remark_is_found(text: str) -> None:
    assert wrong_remark(text)


def test_no_hint_has_an_empty_word() -> None:
    for name, hint in REGISTRY.items():
        assert wrong_words(filled(name)) is None, name
        assert wrong_words(hints.text(name, **dict.fromkeys(values(hint), ""))) is None, name


def test_an_empty_word_is_found() -> None:
    assert all(map(wrong_words, ("unset ''", "ls  a", "ls ")))
    assert not any(map(wrong_words, ("ls    a remark", "ls  # a remark")))


def test_a_hint_that_deletes_or_renames_has_the_reason_why_that_is_safe() -> None:
    assert [fault for hint in REGISTRY.values() if (fault := wrong_harm(hint))] == []


@pytest.mark.parametrize(
    "text",
    [
        *("rm a", "ls; rm -rf a", "ls    then rm a", "mv a b", "sudo rm a", "kill {pids}"),
        *("git reset --hard", "git -C a clean -fd", "git checkout -- a", "git -C a branch -D b"),
        *(
            "git -C a worktree remove b",
            "git submodule deinit a",
            "cp .env.example .env",
            "sed -i 1d .env",
        ),
    ],
)
def test_a_harm_without_a_reason_is_found(text: str) -> None:
    assert wrong_harm(Hint(text))
    assert not wrong_harm(Hint(text, deletes="a reason"))


def test_a_hint_that_deletes_or_renames_names_its_situation() -> None:
    assert [name for name, hint in REGISTRY.items() if hint.deletes and not hint.when] == []


def test_a_reason_without_a_harm_is_found() -> None:
    assert wrong_harm(Hint("git checkout --detach a", deletes="a reason"))


def test_few_hints_are_advice() -> None:
    advice = [name for name, hint in REGISTRY.items() if hint.advice]
    assert len(advice) <= MOST_ADVICE, advice


def test_a_value_is_one_word_for_a_shell() -> None:
    assert hints.text("core.read_log", path=Path("/a b/log")) == "less '/a b/log'"
    assert hints.text("core.list_folders", folders=["a b", "c"]) == "ls -ld 'a b' c"
    assert hints.text("bench.report_plots", percent=3.14159).endswith("the factor is 3.14%")


def test_every_hint_is_run_once_or_has_the_reason_why_not() -> None:
    groups = [RUN, set(ELSEWHERE), set(NOT_RUN)]
    assert sorted(set(COMMANDS) - set().union(*groups)) == []
    assert sorted(set().union(*groups) - set(COMMANDS)) == []
    assert sum(map(len, groups)) == len(COMMANDS)
    assert len(NOT_RUN) <= MOST_NOT_RUN


def test_the_tests_that_run_a_hint_elsewhere_exist() -> None:
    for place in ELSEWHERE.values():
        path, _, name = place.partition("::")
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), place


def test_an_empty_value_becomes_its_name() -> None:
    assert hints.text("core.read_log", path="") == "less PATH"
    assert hints.text("core.list_folders", folders=[]) == "ls -ld FOLDERS"
    assert hints.text("install.fix_what_can", first="").endswith("fixes what it can")


def test_an_unknown_hint_and_a_missing_value_are_errors() -> None:
    with pytest.raises(KeyError):
        hints.text("inv.no_such_verb")
    with pytest.raises(KeyError):
        hints.text("core.read_log")
