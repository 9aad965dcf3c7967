"""Write the pages of docs/ that are generated from the code, or compare them with it.

Owns docs/verbs.md, docs/settings-reference.md, docs/children.md, docs/exit-codes.md, docs/hints.md,
docs/symptoms.md, docs/architecture.svg and the generated parts of docs/architecture.md and
docs/smoke.md. Runs in the tool environment; `--check` writes nothing and exits with 1 where a page
is out of date.
scripts/docs_site.py builds the site.
"""

import argparse
import ast
import contextlib
import inspect
import itertools
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from invoke.parser.argument import Argument as VerbArgument

ROOT = Path(__file__).resolve().parents[1]
# A script finds the modules beside it, and not those of the clone.
sys.path.insert(0, str(ROOT))

# Everything that comes from the library: a new name of a room changes these lines only.
from scripts import docs_picture  # noqa: E402
from scripts.docs_picture import cell, table  # noqa: E402
from workspace.checks import registry  # noqa: E402
from workspace.cli.program import program  # noqa: E402
from workspace.cli.sessions import SESSIONS  # noqa: E402
from workspace.core import child_variables, hints  # noqa: E402
from workspace.core.child_variables import VARIABLES, Special, Variable  # noqa: E402
from workspace.core.errors import ERRORS, INTERRUPTED_EXIT_CODE, WorkspaceError  # noqa: E402
from workspace.core.known_settings import SETTINGS, Phase, Setting  # noqa: E402
from workspace.machine.failures import Harmless, Symptom, harmless, symptoms  # noqa: E402

DOCS = ROOT / "docs"
COMMAND = ".workspace/tools/bin/python scripts/docs.py"
BEGIN = f"<!-- generated: begin; `{COMMAND}` renews this part -->"
END = "<!-- generated: end -->"
GENERATED = f"<!-- Generated from {{}}; `{COMMAND}` renews this page. -->"

PHASES: dict[Phase, tuple[str, str]] = {
    "workspace": ("What the workspace does", "Read here, and not passed on."),
    "both": ("What a build and a running vLLM see", "Passed on to compilers and to vLLM."),
    "build": ("What a build sees", "Passed on to compilers only."),
    "run": ("What a running vLLM sees", "Passed on to vLLM only."),
}
INHERITED = {
    "plain": "the shell",
    "build": "the shell, `.env` and the settings of a build, without secrets",
    "run": "the shell, `.env`, the settings of a running vLLM, a recipe",
}
VALUES = {
    Special.GIVEN: "given",
    Special.DROPPED: "removed where the reason holds",
    Special.REMOVED: "removed",
}
KINDS = {
    "text": "text",
    "path": "path",
    "url": "address",
    "mirror": "address or folder",
    "python": "a version of Python 3",
    "count": "whole number, at least 1",
    "switch": "0 or 1",
    "archs": "architectures",
}


@dataclass(frozen=True)
class Session:
    """A nox session: its name and its docstring."""

    name: str
    help: str


@dataclass(frozen=True)
class Verb:
    """A verb of `inv`: its name, its docstring, its short form and its arguments."""

    name: str
    help: str
    also: str
    arguments: "tuple[Argument, ...]"


@dataclass(frozen=True)
class Argument:
    """One argument of a verb or a session, as a row of its table."""

    name: str
    meaning: str
    default: str


class _Parsed(BaseException):
    """Carries a parser out of a program that was about to parse its arguments."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write or compare the pages and return the exit code."""
    parser = argparse.ArgumentParser(description="Write the generated pages of docs/.")
    meaning = "compare only; exit with 1 where a page is out of date"
    parser.add_argument("--check", action="store_true", help=meaning)
    is_check = parser.parse_args(argv).check
    try:
        pages = render()
    except docs_picture.PictureError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    stale = [path for path, text in pages.items() if _read(path) != text]
    for path in stale:
        name = path.relative_to(ROOT)
        if is_check:
            print(f"error: {name} is out of date\nhint: {COMMAND}", file=sys.stderr)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(pages[path], encoding="utf-8")
            print(f"wrote {name}")
    return 1 if is_check and stale else 0


def render() -> dict[Path, str]:
    """Return every generated page with the text that it should have."""
    rooms = docs_picture.read_rooms(ROOT)
    architecture, smoke = DOCS / "architecture.md", DOCS / "smoke.md"
    return {
        DOCS / "verbs.md": verbs_page(),
        DOCS / "settings-reference.md": settings_page(SETTINGS),
        DOCS / "children.md": children_page(VARIABLES),
        DOCS / "exit-codes.md": exit_codes_page(ERRORS),
        DOCS / "hints.md": hints_page(hints.registry()),
        DOCS / "symptoms.md": symptoms_page(symptoms(), harmless()),
        DOCS / "architecture.svg": docs_picture.draw(rooms),
        architecture: with_part(_read(architecture), docs_picture.tables(ROOT, rooms)),
        smoke: with_part(_read(smoke), docs_picture.coverage(registry.coverage())),
    }


def _read(path: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return path.read_text(encoding="utf-8")
    return ""


def with_part(text: str, part: Sequence[str]) -> str:
    """Return a page with its generated part replaced, and everything around it as it was.

    Raises PictureError where the page has not exactly one pair of markers.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in after:
        raise docs_picture.PictureError(f"a page lacks the markers {BEGIN} and {END}")
    return "\n".join([f"{before}{BEGIN}", "", *part, "", f"{END}{after}"])


def settings_page(settings: Sequence[Setting]) -> str:
    """Return the page of every setting, a table for each phase."""
    lines = [
        "# Settings reference",
        "",
        GENERATED.format("workspace/core/settings.py"),
        "",
        "A setting comes from the first of these places that has it:",
        "a flag of the verb, the shell, `.env`, the default.",
        "The page on [settings](settings.md) explains how to set one.",
        "",
        "Sources: for a GB10, those on the page of the [Spark](spark.md).",
    ]
    for phase, (title, reach) in PHASES.items():
        rows = [_of_setting(setting) for setting in settings if setting.phase == phase]
        lines += ["", f"## {title}", "", reach, ""]
        lines += table(("setting", "meaning", "default", "values"), rows)
    return "\n".join([*lines, ""])


def _of_setting(setting: Setting) -> tuple[str, ...]:
    choices = ", ".join(_code(choice) for choice in setting.choices if choice)
    values = choices or KINDS.get(setting.kind, setting.kind)
    secret = "; secret: never printed or logged" if setting.secret else ""
    return _code(setting.name), cell(setting.meaning) + secret, _code(setting.default), values


def children_page(variables: Sequence[Variable]) -> str:
    """Return the page of the variables that each kind of child process gets."""
    children = [
        (_code(phase), programs, INHERITED[base])
        for phase, (base, programs) in child_variables.PHASES.items()
    ]
    lines = [
        "# Variables of child processes",
        "",
        GENERATED.format("workspace/core/child_variables.py"),
        "",
        "Every program that the workspace starts gets the variables of its kind. The kinds are:",
        "",
        *table(("kind", "programs", "inherits"), children),
        "",
        "No kind inherits variables that point to another interpreter, checkout or build, such as",
        "`PYTHONPATH`, `VIRTUAL_ENV` and `GIT_DIR`. Two checks start a program with `PATH` and the",
        "checked values only: the check of values against `vllm/envs.py`, and `ninja -n`. Git that",
        "contacts no remote gets the shell and the `GIT_*` variables of `workspace/repo/git`.",
        "",
        "To what it inherits a child gets these variables, from the top down. *Given* is a value",
        "that the starting verb computes; *default* means that a value of yours goes before it.",
        "",
        *table(
            ("variable", "value", "from", "kinds", "why"),
            [_of_variable(variable) for variable in variables],
        ),
    ]
    return "\n".join([*lines, ""])


def _of_variable(variable: Variable) -> tuple[str, ...]:
    if isinstance(variable.value, str):
        value = _code(variable.value)
    elif isinstance(variable.value, Special):
        value = VALUES[variable.value]
    else:
        value = "computed"
    default = ", default" if variable.is_default else ""
    names = ", ".join(map(_code, variable.names.split()))
    return names, f"{value}{default}", variable.source, _kinds(variable.phases), cell(variable.why)


def _kinds(phases: Sequence[str]) -> str:
    """Return the kinds of children, with one phrase for all that inherit the same."""
    shown = []
    for base, phrase in (("build", "all of a build"), ("run", "all of a running vLLM")):
        every = [phase for phase, (own, _) in child_variables.PHASES.items() if own == base]
        if set(every) <= set(phases):
            shown.append(phrase)
            phases = [phase for phase in phases if phase not in every]
    return ", ".join([*shown, *map(_code, phases)])


def exit_codes_page(errors: Sequence[type[WorkspaceError]]) -> str:
    """Return the page of the exit codes, in their order."""
    ended = 128 + signal.SIGTERM
    rows = [("0", "", "done, or nothing to do")]
    rows += [(str(error.exit_code), _code(error.__name__), _meaning(error)) for error in errors]
    rows += [
        (str(INTERRUPTED_EXIT_CODE), "", "interrupted by ^C"),
        (str(ended), "", "ended by SIGTERM; of another signal, 128 and its number"),
    ]
    lines = [
        "# Exit codes",
        "",
        GENERATED.format("workspace/core/errors.py"),
        "",
        "Every expected failure prints a sentence (what was seen, what was expected)",
        "and a hint (the next command), and exits with one of these codes.",
        "A traceback is a bug: `./scripts/inv report` collects what a bug report needs.",
        "",
        *table(("code", "class", "meaning"), rows),
        "",
        "`inv` exits with 2 also for a verb or a flag that does not exist.",
        "A single `nox` session exits with the code of its program.",
        "Of several sessions `nox` runs all, and exits with 1 if any failed.",
    ]
    return "\n".join([*lines, ""])


def hints_page(registry: Mapping[str, hints.Hint]) -> str:
    """Return the page of the hints: one table a group."""
    library = {
        path.relative_to(ROOT / "workspace").as_posix(): _read(path)
        for path in sorted((ROOT / "workspace").rglob("*.py"))
    }
    lines = [
        "# Hints",
        "",
        GENERATED.format("workspace/core/hints.ini"),
        "",
        "What to type next, as errors and status screens print it. A word in braces stands for a",
        "value of the situation, a word in capitals for a value of yours. `tests/test_hints.py`",
        "checks that each command exists, and that none deletes what is yours without a reason.",
    ]
    head = ("name", "command", "remark", "situation", "used by")
    for group, named in itertools.groupby(registry.items(), lambda item: item[0].partition(".")[0]):
        rows = [_of_hint(name, hint, library) for name, hint in named]
        lines += ["", f"## {group}", "", *table(head, rows)]
    return "\n".join([*lines, ""])


def _of_hint(name: str, hint: hints.Hint, library: Mapping[str, str]) -> tuple[str, ...]:
    command, *remarks = re.split(r"    |\s+# ", re.sub(r":(plain|tail)}", "}", hint.text))
    command, *remarks = ("", command, *remarks) if hint.advice else (command, *remarks)
    remarks += [f"It {hint.deletes}."] if hint.deletes else []
    users = ", ".join(path for path, source in library.items() if f'"{name}"' in source)
    shown = _code(command.replace("{{", "{").replace("}}", "}")) if command else ""
    return name, shown.replace("|", "\\|"), cell("; ".join(remarks)), cell(hint.when), users


def symptoms_page(known: Sequence[Symptom], no_causes: Sequence[Harmless]) -> str:
    """Return the page of the known symptoms, in the order in which they are tried."""
    lines = [
        "# Symptoms",
        "",
        GENERATED.format("workspace/machine/symptoms.toml"),
        "",
        "Search this page for the line that you see in the log of a server or of a build.",
        "A verb that fails with one of these lines prints the cause and the next command itself.",
        "If a start lacked memory, `inv serve` prints the same start with a smaller share,",
        "fewer sequences or a shorter length instead; a build prints itself with `--jobs 1`.",
        "NAME is the recipe or the model.",
    ]
    for symptom in known:
        lines += ["", f"## {symptom.name}", "", "```text", symptom.line.strip(), "```", ""]
        command = symptom.next_command(name="NAME", typed="./scripts/inv serve NAME") or ""
        cause = symptom.cause.format(who="a process", signal="SIGSEGV, SIGABRT or another")
        lines += [f"{cause[:1].upper()}{cause[1:]}.", "", f"Next: {_code(command)}", ""]
        lines += [f"Source: {cell(symptom.source)}"]
    rows = [(_code(row.line), cell(row.why), cell(row.source)) for row in no_causes]
    lines += ["", "## Lines that are no cause", "", *table(("line", "why", "source"), rows)]
    return "\n".join([*lines, ""])


def _meaning(error: type[WorkspaceError]) -> str:
    return cell(error.meaning or _first_line(inspect.getdoc(error) or ""))


def verbs_page() -> str:
    """Return the page of every verb of `inv` and every session of `nox`."""
    sessions = read_sessions((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    verbs = list(_verbs())
    lines = [
        "# Verbs",
        "",
        GENERATED.format("the verbs, and the sessions of noxfile.py"),
        "",
        "`inv` shows or changes the workspace; `nox` tests, checks and measures it.",
        "Type `./scripts/inv` and `./scripts/nox`.",
        "`./scripts/inv --help VERB` prints the rows of a verb in a terminal.",
        "",
        "## Verbs of inv",
        "",
        *table(("verb", "meaning"), [_summary(verb, "inv") for verb in verbs]),
        "",
        "## Sessions of nox",
        "",
        *table(("session", "meaning"), [_summary(session, "session") for session in sessions]),
        "",
        "## Arguments of each verb",
    ]
    for verb in verbs:
        lines += ["", f"### inv {verb.name}", "", *_paragraphs(verb.help)]
        lines += ["", f"`{verb.also}` does the same."] if verb.also else []
        lines += _arguments(verb.arguments)
    lines += ["", "## Arguments of each session"]
    for session in sessions:
        lines += ["", f"### Session {session.name}", "", *_paragraphs(session.help)]
        for parser in _parsers(session):
            typed = f"./scripts/nox -s {session.name} -- …"
            lines += ["", f"Type the arguments after `--`: `{typed}`"]
            lines += _arguments(_of_parser(parser))
            lines += ["", cell(parser.epilog)] if parser.epilog else []
    return "\n".join([*lines, ""])


def _summary(item: Verb | Session, kind: str) -> tuple[str, str]:
    typed = f"{'inv' if kind == 'inv' else 'nox -s'} {item.name}"
    return f"[`{typed}`](#{_anchor(f'{kind} {item.name}')})", cell(_first_line(item.help))


def _verbs() -> Iterator[Verb]:
    """Yield each verb in the order of its collection."""
    namespace = program().namespace
    assert namespace is not None
    for context in namespace.to_contexts():
        name = context.name or ""
        arguments = [_of_verb(argument) for argument in context.args.values()]
        # The default of a collection, as `inv patch`; that of the whole program is a bare `inv`.
        also = " ".join(["inv", *context.aliases]) if context.aliases else ""
        also = "inv" if name == namespace.default else also
        yield Verb(name, inspect.getdoc(namespace[name]) or "", also, tuple(arguments))


def _of_verb(argument: VerbArgument) -> Argument:
    if argument.positional:
        typed = (argument.name or "").upper()
    else:
        typed = ", ".join(sorted(map(_flag, argument.names), key=len))
        typed += " VALUE" if argument.takes_value else ""
    return Argument(typed, argument.help or "", _default(argument.default))


def _flag(name: str) -> str:
    return f"-{name}" if len(name) == 1 else f"--{name}"


def _of_parser(parser: argparse.ArgumentParser) -> list[Argument]:
    return [_of_action(action, parser) for action in parser._actions if action.dest != "help"]


def _of_action(action: argparse.Action, parser: argparse.ArgumentParser) -> Argument:
    typed = ", ".join(action.option_strings) or action.dest.upper()
    if action.nargs != 0 and action.option_strings:
        typed += f" {action.metavar or action.dest.upper()}"
    meaning = (action.help or "") % {**vars(action), "prog": parser.prog}
    if action.choices and action.metavar is None:
        choices = ", ".join(map(str, action.choices))
        meaning = f"{choices}: {meaning}" if meaning else choices
    return Argument(typed, meaning, _default(action.default))


def _default(value: object) -> str:
    if isinstance(value, bool):
        return "off" if value is False else "on"
    if value is None or value in ("", [], ()):
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _arguments(arguments: Sequence[Argument]) -> list[str]:
    if not arguments:
        return []
    rows = [(_code(each.name), cell(each.meaning), _code(each.default)) for each in arguments]
    return ["", *table(("argument", "meaning", "default"), rows)]


def read_sessions(source: str) -> list[Session]:
    """Return the sessions of a noxfile in their order.

    They are read from its source: an import of the file could hand over to another nox.
    """
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return [_of_function(node) for node in functions if _is_session(node)]


def _is_session(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(each).startswith("nox.session") for each in node.decorator_list)


def _of_function(node: ast.FunctionDef) -> Session:
    """Return the session of a function; `@nox.session(name=…)` names it."""
    given = [
        keyword.value.value
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call)
        for keyword in decorator.keywords
        if keyword.arg == "name" and isinstance(keyword.value, ast.Constant)
    ]
    return Session(str(given[0]) if given else node.name, ast.get_docstring(node) or "")


def _parsers(session: Session) -> Iterator[argparse.ArgumentParser]:
    """Yield the parser of a session that has arguments of its own."""
    if session.name in SESSIONS:
        yield parser_of(lambda: SESSIONS[session.name]([]))


def parser_of(work: Callable[[], object]) -> argparse.ArgumentParser:
    """Return the parser that a program makes, stopped where it begins to parse."""

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        raise _Parsed(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            work()
        except _Parsed as parsed:
            return parsed.parser
    raise AssertionError(f"{work!r} ended without parsing its arguments")


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def _paragraphs(text: str) -> list[str]:
    return [line.replace("<", "&lt;").replace("*", "\\*") for line in text.splitlines()]


def _anchor(heading: str) -> str:
    """Return the anchor of a heading, for GitHub and for MkDocs alike."""
    return heading.lower().replace(".", "").replace(" ", "-")


if __name__ == "__main__":
    sys.exit(main())
