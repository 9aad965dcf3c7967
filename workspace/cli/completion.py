"""Completion of `inv` in bash, zsh and fish: the script of a shell, and what may follow a line.

A script calls `inv --complete -- LINE`, the entrance that Invoke has for this. The last token of
the line is the part before the cursor, and may be empty. Verbs and flags are those of the parser;
values such as recipes, patches, records, targets and tags come from this clone, without the
network.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from invoke.context import Context
from invoke.parser import Parser
from invoke.parser.context import ParserContext

from workspace.cli import main
from workspace.cli.main import task
from workspace.core import hints, paths
from workspace.core.errors import SettingsError, WorkspaceError
from workspace.core.known_settings import KNOWN
from workspace.core.paths import Layout

# The first word of a line is the inv that was typed, so that each clone completes its own values.
# Without a candidate a shell completes file names.
_BASH = r"""
_inv_completion() {
    local program=${1/#\~\//$HOME/}
    mapfile -t COMPREPLY < <(
        "${program//\\/}" --complete -- "${COMP_WORDS[@]:0:COMP_CWORD}" "$2" 2>/dev/null
    )
}
complete -o default -F _inv_completion inv
"""
_ZSH = r"""
_inv_completion() {
    local -a candidates
    candidates=(${(f)"$(
        "${${(Q)words[1]}/#\~\//$HOME/}" \
            --complete -- "${(@Q)words[1,CURRENT-1]}" "$PREFIX" 2>/dev/null
    )"})
    if (( $#candidates )); then compadd -- $candidates; else _files; fi
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -i -D; }
compdef _inv_completion inv
"""
_FISH = r"""
function __inv_completion
    set -l before (commandline --tokenize --cut-at-cursor --current-process)
    set -l typed (commandline --current-token --cut-at-cursor)
    set -l program (string unescape -- $before[1] | string replace --regex '^~/' "$HOME/")
    set -l candidates ($program --complete -- $before "$typed" 2>/dev/null)
    if set -q candidates[1]
        string join \n -- $candidates
    else
        __fish_complete_path (string unescape -- "$typed")
    end
end
complete --command inv --no-files --arguments '(__inv_completion)'
"""
SCRIPTS = {"bash": _BASH, "fish": _FISH, "zsh": _ZSH}
# Verbs whose first argument may be the name of a server.
OF_A_SERVER = ("serve.logs", "serve.stop")
LIST_FORMATS = ("flat", "full", "nested", "json")
# A shell would expand or split other names.
_PLAIN = re.compile(r"[\w@%+=./-]+")


@task(positional=["shell"], help={"shell": "bash, zsh or fish"})
def completion(_: Context, shell: str) -> None:
    """Print the completion of inv for a shell."""
    main.console().data(script(shell))


def script(shell: str) -> str:
    """Return the lines that a start-up file of the shell evaluates. Raises SettingsError."""
    if shell not in SCRIPTS:
        raise SettingsError(
            f"there is no completion for the shell {shell[:40]!r}, only for {', '.join(SCRIPTS)}",
            hint=hints.text("cli.help_of", verb="completion"),
        )
    return SCRIPTS[shell].strip()


def candidates(line: Sequence[str], names: Sequence[str], parser: Parser) -> list[str]:
    """Return what may stand for the last token of a line, sorted.

    `line` begins with the program; `names` are the verbs.
    """
    # bash makes a token of the = between a flag and its value.
    *before, typed = [token for token in line[1:-1] if token != "="] + [line[-1].lstrip("=")]
    front = ""
    if typed.startswith("--") and "=" in typed:
        flag, _, typed = typed.partition("=")
        before, front = [*before, flag], f"{flag}="
    return sorted(
        {
            front + found
            for found in _following(before, typed, names, parser)
            if found.startswith(typed) and _PLAIN.fullmatch(found)
        }
    )


def _following(
    before: Sequence[str], typed: str, names: Sequence[str], parser: Parser
) -> Iterable[str]:
    if "--" in before:
        return ()
    verbs = [token for token in before if token in parser.contexts]
    if not verbs or before[0] in ("help", "--help", "-h"):
        if before and before[-1] == "--list-format":
            return LIST_FORMATS
        core = _long_flags(parser.initial) if parser.initial else []
        return core if typed.startswith("-") else [*names, "help"]
    context = parser.contexts[verbs[0]]
    argument = _argument(context, before[before.index(verbs[0]) + 1 :])
    if argument and not typed.startswith("-"):
        return _values(str(context.name), argument)
    return [*_long_flags(context), "--help"]


def _long_flags(context: ParserContext) -> list[str]:
    """Return the flags as a person types them: Invoke has one for a positional argument, too."""
    return [
        name
        for name in context.flag_names()
        if name.startswith("--") and not context.flags[name].positional
    ]


def _argument(context: ParserContext, before: Sequence[str]) -> str | None:
    """Return the name of the argument whose value follows, or None where a flag may follow."""
    expected = [str(argument.name) for argument in context.positional_args]
    expected += ["name"] if context.name in OF_A_SERVER else []
    tokens = iter(before)
    for token in tokens:
        flag = context.flags.get(token)
        if flag is not None and flag.takes_value:
            if next(tokens, None) is None:
                return str(flag.name)
        elif not token.startswith("-"):
            del expected[:1]
    return expected[0] if expected else None


def _values(verb: str, argument: str) -> Iterable[str]:
    """Return the values of an argument in this clone, none where they cannot be read."""
    find = _VALUES.get(argument)
    if verb.startswith("pin.") and argument == "ref":
        find = _tags
    with contextlib.suppress(WorkspaceError, OSError):
        return tuple(find(paths.here())) if find else ()
    return ()


def _recipes(layout: Layout) -> Iterable[str]:
    from workspace.server import public_recipes

    return public_recipes.names(layout)


def _servers(layout: Layout) -> Iterable[str]:
    from workspace.server import observation

    return (server.label for server in observation.servers(layout))


def _records(layout: Layout) -> Iterable[str]:
    for path in layout.results.glob("*/*.json"):
        yield from (path.stem, path.stem.partition("-")[2])


def _fields(layout: Layout) -> Iterable[str]:
    from workspace.bench import compare, results

    found = (entry.record for entry in results.entries(layout))
    return {name for record in found if record for name in compare.fields(record)}


def _targets(layout: Layout) -> Iterable[str]:
    from workspace.compile import project

    return project.extensions(layout.vllm)


def _patches(layout: Layout) -> Iterable[str]:
    from workspace.repo import series

    for project in ("vllm", "triton"):
        with contextlib.suppress(WorkspaceError):
            yield from series.entries(series.text_of(layout.patches(project)))


def _good(layout: Layout) -> Iterable[str]:
    return (path.parent.name for path in layout.known_good_states.glob("*/good.json"))


def _tags(layout: Layout) -> Iterable[str]:
    from workspace.repo.git import Git, history

    yield "triton"
    for folder in (layout.vllm, layout.upstream("vllm")):
        with contextlib.suppress(WorkspaceError, OSError):
            yield from history.tags(Git(folder))


def _choice(setting: str) -> Callable[[Layout], Iterable[str]]:
    return lambda _: KNOWN[setting].choices


_VALUES: Mapping[str, Callable[[Layout], Iterable[str]]] = {
    "recipe": _recipes,
    "name": _servers,
    "first": _records,
    "second": _records,
    "across": _fields,
    "target": _targets,
    "patch": _patches,
    "good": _good,
    "device": _choice("DEVICE"),
    "source": _choice("SOURCE"),
    "kernels": lambda _: ("auto", "precompiled", "native"),
    "project": lambda _: ("vllm", "triton"),
    "shell": lambda _: SCRIPTS,
}
