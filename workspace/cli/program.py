"""Invoke's program as this workspace needs it: its parser and lists, without its configuration and
its own exit codes.
"""

import difflib
import inspect
import re
import sys
from collections.abc import Sequence

from invoke.collection import Collection
from invoke.config import Config
from invoke.exceptions import Exit, ParseError
from invoke.parser import Parser
from invoke.parser.argument import Argument
from invoke.program import Program

from workspace.cli import completion, main, verbs, verbs_patch, verbs_serve
from workspace.cli.completion import LIST_FORMATS
from workspace.core import hints, known_settings
from workspace.core.errors import SettingsError

# The first task with `default=True` is what a bare `inv` or a bare collection name runs.
TOP_LEVEL = (
    verbs.bootstrap,
    verbs.rebuild,
    verbs.fix_triton,
    verbs.wheel,
    verbs.bundle,
    verbs.status,
    verbs.doctor,
    verbs.hook,
    verbs.report,
    verbs.run,
    verbs.shell,
    verbs.drop_caches,
    completion.completion,
)
COLLECTIONS = {
    "patch": (
        verbs_patch.patch_status,
        verbs_patch.patch_apply,
        verbs_patch.patch_unapply,
        verbs_patch.patch_export,
        verbs_patch.patch_import,
        verbs_patch.patch_continue,
    ),
    "node": (verbs_serve.node_list, verbs_serve.node_facts, verbs_serve.node_sync),
    "pin": (verbs.pin_show, verbs.pin_forecast, verbs.pin_bump, verbs.pin_rollback),
    "env": (verbs.env_check, verbs.env_init, verbs.env_export),
    "serve": (
        verbs_serve.serve,
        verbs_serve.serve_status,
        verbs_serve.serve_logs,
        verbs_serve.serve_stop,
        verbs_serve.serve_unit,
        verbs_serve.serve_list,
        verbs_serve.serve_fetch,
        verbs_serve.serve_rank,
    ),
    "bench": (
        verbs.bench_list,
        verbs.bench_label,
        verbs.bench_compare,
        verbs.bench_report,
    ),
}


_INV = "./scripts/inv"
_OTHER_SCREENS = f"{_INV} shows the status. Tests and measurements: ./scripts/nox --list"
_FULL_LIST = ("--list", "--list-format=full")
# The list of verbs: those of each day, then the others by subject.
GROUPS = {
    "Start here": (
        "bootstrap",
        "status",
        "doctor",
        "rebuild",
        "patch.status",
        "patch.export",
        "serve.start",
        "serve.stop",
        "bench.list",
        "shell",
    ),
    "Patches": ("patch.import", "patch.continue", "patch.apply", "patch.unapply", "hook"),
    "Pin": ("pin.show", "pin.forecast", "pin.bump", "pin.rollback"),
    "Build": ("fix-triton", "wheel", "bundle", "env.init", "env.export", "run"),
    "Serve": ("serve.list", "serve.fetch", "serve.status", "serve.logs", "drop-caches"),
    "Nodes": ("node.list", "node.sync", "node.facts"),
    "Measure": ("bench.label", "bench.compare", "bench.report"),
    "Look": ("env.check", "serve.unit", "serve.rank", "report", "completion"),
}
# What a person types for the positional argument of a verb, where its name does not say it.
_TYPED = {
    "bundle": "FOLDER|FILE.tar",
    "patch.import": "FILE|URL|NUMBER",
    "pin.forecast": "TAG|triton",
    "pin.bump": "TAG|triton",
}
EXAMPLES = {
    "bootstrap": "bootstrap --device cpu",
    "rebuild": "rebuild --plan",
    "fix-triton": "fix-triton --check",
    "wheel": "wheel --wait",
    "bundle": "bundle ../bundle --for aarch64 --python 3.12 --device cuda",
    "status": "status --json",
    "doctor": "doctor --offline",
    "hook": "hook --run",
    "report": "report",
    "run": "run -- python -c 'import vllm'",
    "shell": "shell",
    "drop-caches": "drop-caches",
    "completion": 'eval "$(./scripts/inv completion bash)"',
    "patch.status": "patch --project triton",
    "patch.apply": "patch.apply",
    "patch.unapply": "patch.unapply",
    "patch.export": "patch.export --check",
    "patch.import": "patch.import 12345",
    "patch.continue": "patch.continue --abort",
    "node.list": "node",
    "node.facts": "node.facts --interface enp1s0f0np0",
    "node.sync": "node.sync spark-b",
    "pin.show": "pin --offline",
    "pin.forecast": "pin.forecast v0.33.0",
    "pin.bump": "pin.bump v0.33.0",
    "pin.rollback": "pin.rollback",
    "env.check": "env",
    "env.init": "env.init --replace",
    "env.export": 'eval "$(./scripts/inv env.export)"',
    "serve.start": "serve tiny --detach -- --port 8001",
    "serve.status": "serve.status --json",
    "serve.logs": "serve.logs --follow",
    "serve.stop": "serve.stop --all",
    "serve.unit": "serve.unit tiny --name a --port 8001 --restart 3",
    "serve.rank": "serve.rank tiny --rank 1,2,10.0.0.1,29501,10.0.0.2,eth1 --check",
    "serve.list": "serve.list",
    "serve.fetch": "serve.fetch Qwen/Qwen3-8B",
    "bench.list": "bench",
    "bench.label": "bench.label latency before",
    "bench.compare": "bench.compare before after --factor 3",
    "bench.report": "bench.report --first before --second after",
}
# Flags whose default is a setting.
_SETTINGS = {"device": "DEVICE", "source": "SOURCE", "kernels": "KERNELS", "jobs": "MAX_JOBS"}
_LONGEST_NAME = 15
# What follows the flags of a verb that passes the rest on.
_REST = {"run": " -- COMMAND", "serve.start": " [-- FLAGS OF VLLM]"}
# Invoke's sentences, and ours.
_SENTENCES = (
    (r"Flag <Argument: ([\w-]+).*> needed value.*", r"--\1 needs a value"),
    (
        r"'([\w.-]+)' did not receive required positional arguments: (.+)",
        lambda found: f"inv {found[1]} needs {found[2].replace(chr(39), '').upper()}",
    ),
    (r"Sub-collection '(.*)' not found!", r"no verb begins with '\1.'"),
)


class NoConfig(Config):
    """Invoke's configuration without files and variables: those are for other projects."""

    prefix = "vllm_workspace"

    def load_base_conf_files(self) -> None:
        """Read nothing in /etc and the home folder."""

    def load_shell_env(self) -> None:
        """Ignore VLLM_WORKSPACE_*: Invoke would fail on a value of another type."""


class WorkspaceProgram(Program):
    """Invoke's parser and lists; failures leave it as exceptions, not as exit codes."""

    # The other core flags change how Invoke runs shell commands. No verb runs one, and `--dry
    # bootstrap` must not look like a dry run.
    core_flags = (
        "complete",
        "debug",
        "help",
        "list",
        "list-depth",
        "list-format",
        "print-completion-script",
        "version",
        "write-pyc",
    )

    def core_args(self) -> list[Argument]:
        # A plain `inv --search-root CLONE` passes its flags on; the clone is already known then.
        root = Argument(
            names=("search-root", "r"), help="Ignored; the verbs always work on this clone."
        )
        verbose = Argument(
            names=("verbose",), kind=bool, default=False, help="Show each command that is run."
        )
        return [
            argument for argument in super().core_args() if argument.name in self.core_flags
        ] + [root, verbose]

    def parse_core(self, argv: list[str] | None) -> None:
        # Invoke turns bytecode off for the tasks file; every verb would then compile the library
        # again.
        writes = sys.dont_write_bytecode
        super().parse_core(argv)
        sys.dont_write_bytecode = writes

    def print_version(self) -> None:
        # Asked only here: importlib.metadata costs 20 ms.
        from importlib.metadata import version

        self.version = version("invoke")
        super().print_version()

    def _make_parser(self) -> Parser:
        parser = super()._make_parser()
        for context in parser.contexts.values():
            for argument in context.args.values():
                # Invoke takes the empty list that it begins with for a value that was typed.
                argument.raw_value = None
        return parser

    def update_config(self, merge: bool = True) -> None:
        """Skip the core flags that this program does not have."""

    def run(self, argv: list[str] | None = None, exit: bool = True) -> None:
        try:
            self.create_config()
            self._parse_core_flags(_as_verb(argv) if argv else None)
            self.parse_collection()
            self.parse_tasks()
            self.parse_cleanup()
            main.console().is_verbose |= self.args.verbose.value
            self.execute()
        except ParseError as exc:
            raise self._misuse(exc) from exc
        except Exit as exc:
            if exc.message:
                raise SettingsError(_plain(exc.message), hint=hints.text("cli.list")) from exc

    def _parse_core_flags(self, argv: list[str] | None) -> None:
        try:
            self.parse_core(argv)
        except ValueError as exc:
            # The only core flag that Invoke converts to a number.
            raise SettingsError(
                "--list-depth needs a whole number", hint=hints.text("cli.help")
            ) from exc

        if (chosen := self.args["list-format"].value) not in LIST_FORMATS:
            raise SettingsError(
                f"--list-format: {chosen!r} is not one of {', '.join(LIST_FORMATS)}",
                hint=hints.text("cli.list"),
            )

    def print_task_help(self, name: str) -> None:
        """Print usage, purpose, arguments, flags and an example of a verb."""
        context = self.parser.contexts[name]
        name = context.name or name
        needed = [
            (_TYPED.get(name, str(argument.name).upper()), argument.help or "")
            for argument in context.positional_args
        ]
        flags = [_flag_row(arg) for arg in context.args.values() if not arg.positional]
        # The default verb of a collection has its short name.
        usage = " ".join(["inv", *(context.aliases or [name])[:1], *(typed for typed, _ in needed)])
        print(f"Usage: {usage}{' [flags]' if flags else ''}{_REST.get(name, '')}\n")
        print(f"  {inspect.getdoc(self.collection[name])}\n")
        for title, rows in (("Arguments", needed), ("Flags", sorted(flags))):
            if rows:
                print(f"{title}:\n")
                self.print_columns(rows)
        example = EXAMPLES[name]
        print(f"Example:\n\n  {'' if _INV in example else f'{_INV} '}{example}\n")

    def list_flat(self) -> None:
        """Print the verbs of each day, and the names of the others by subject.

        The verbs of one collection, or of one depth, are printed as Invoke does it.
        """
        if self.list_root or self.list_depth:
            super().list_flat()
            return
        daily, *others = GROUPS.items()
        self._print_group(*daily)
        typed = self._typed()
        for title, names in others:
            listed = ", ".join(typed[name][0] for name in names)
            print(f"{title + ':':<{_LONGEST_NAME + 2}} {listed}")
        print(f"\n{_INV} help has a line for each of them; help VERB explains one.")
        print(_OTHER_SCREENS)

    def list_full(self) -> None:
        """Print every verb with its purpose, by subject."""
        # Invoke knows the form of its own formats only.
        self.list_format = "flat"
        for title, names in GROUPS.items():
            self._print_group(title, names)
        print(f"{_INV} help VERB explains a verb.")
        print(_OTHER_SCREENS)

    def _print_group(self, title: str, names: Sequence[str]) -> None:
        print(f"{title}:")
        for typed, text in map(self._typed().__getitem__, names):
            print(f"  {typed:<{_LONGEST_NAME}} {text}")
        print()

    def _typed(self) -> dict[str, tuple[str, str]]:
        """Return what a person types for each verb, and its purpose."""
        found = {}
        # A pair is `patch.status (patch)` and its purpose; the short name is the one to type.
        for both, text in self._make_pairs(self.scoped_collection):
            name, *short = both.split(" ")
            found[name] = (short[0].strip("()") if short else name, text or "")
        return found

    def parse_cleanup(self) -> None:
        if self.args.complete.value:
            verbs_and_short = self.collection.task_names.items()
            names = [name for verb, short in verbs_and_short for name in (verb, *short)]
            # The present parser may have been changed by what it parsed.
            parser = self._make_parser()
            for found in completion.candidates(main.after_dashes() or [""], names, parser):
                print(found)
            raise Exit
        super().parse_cleanup()

    def _misuse(self, error: ParseError) -> SettingsError:
        """Return an error that names the fault and the nearest valid names.

        Invoke names the faulty argument only inside its sentence.
        """
        unknown = re.search(r"No idea what '(.+)' is", str(error))
        verb = error.context.name if error.context is not None else None
        more = hints.text("cli.help_of", verb=verb) if verb else hints.text("cli.help")
        if unknown is None:
            return SettingsError(_plain(str(error)), hint=more)
        typed = unknown.group(1)
        if typed.startswith("-"):
            context = self.parser.contexts[verb] if verb else self.initial_context
            # vLLM has hundreds of flags: only a slip of the finger means one of ours.
            cutoff = 0.8 if verb == "serve.start" else 0.6
            like = difflib.get_close_matches(typed, list(context.flags), n=3, cutoff=cutoff)
            sentence = "{} has no flag {}".format("inv " + verb if verb else "inv", typed)
            if verb == "serve.start" and not like:
                more = self._after_dashes(typed, list(context.flags))
        else:
            like = difflib.get_close_matches(typed, list(self.parser.contexts), n=3)
            sentence, more = f"there is no verb {typed}", hints.text("cli.list")
            # Invoke takes what follows a complete verb for another verb.
            if verb and not like:
                sentence = (
                    f"inv {verb} takes no argument {typed}, and there is no verb of that name"
                )
                more = self._typed_as_flag(verb, typed)
        return SettingsError(
            sentence,
            hint=hints.text("cli.alike", command=more, alike=" or ".join(like)) if like else more,
        )

    def _after_dashes(self, typed: str, own: Sequence[str]) -> str:
        """Return the command that was typed, with the flags of vLLM after `--`."""
        tokens = [token for token in self.argv[1:] if token != "--"]
        at = next((at for at, token in enumerate(tokens) if token.startswith(typed)), len(tokens))
        ours = [token for token in tokens[at:] if token in own]
        theirs = [token for token in tokens[at:] if token not in own]
        return hints.text("cli.after_dashes", words=[*tokens[:at], *ours, "--", *theirs])

    def _typed_as_flag(self, verb: str, typed: str) -> str:
        """Return the verb with its flag for a value, where it has exactly one, else its help."""
        flags = [flag for flag in self.parser.contexts[verb].args.values() if flag.takes_value]
        if len(flags) != 1:
            return hints.text("cli.help_of", verb=verb)
        name = str(flags[0].name).replace("_", "-")
        return hints.text("cli.as_flag", words=[verb, f"--{name}", typed])


def _as_verb(argv: list[str]) -> list[str]:
    """Return `inv VERB --help` as `inv --help VERB`; Invoke takes it for an argument of VERB.

    `inv help VERB` is the same, and `inv help` the full list of verbs. The script that Invoke has
    for a shell knows no values: its flag is the verb.
    """
    tokens = argv[1 : argv.index("--") if "--" in argv else None]
    # Invoke has no positional argument that may be left out.
    for at, token in enumerate(tokens[:-1], 2):
        if token in completion.OF_A_SERVER and not argv[at].startswith("-"):
            return [*argv[:at], "--name", *argv[at:]]
    if tokens and tokens[0].startswith("--print-completion-script"):
        return [argv[0], "completion", *tokens[0].split("=")[1:], *tokens[1:]]
    if tokens[:1] == ["help"]:
        return [argv[0], *(("--help", tokens[1]) if tokens[1:] else _FULL_LIST)]
    if tokens and tokens[0][:1] != "-" and {"--help", "-h"} & set(tokens):
        return [argv[0], "--help", tokens[0]]
    return argv


def _plain(message: str) -> str:
    """Return a message of Invoke as a sentence of this workspace."""
    for pattern, sentence in _SENTENCES:
        if re.fullmatch(pattern, message, re.DOTALL):
            return re.sub(pattern, sentence, message, flags=re.DOTALL)
    return message


def _flag_row(argument: Argument) -> tuple[str, str]:
    """Return the forms of a flag with its value, and its meaning."""
    name = str(argument.name).replace("_", "-")
    forms = [f"--{name}", *(f"-{short}" for short in argument.names if len(short) == 1)]
    value = f" {name.upper()}" if argument.takes_value else ""
    default = argument.default if argument.takes_value and argument.default else ""
    if setting := _SETTINGS.get(name):
        default = (
            f"the setting {setting}, {known_settings.KNOWN[setting].default or 'auto'} if unset"
        )
    meaning = f"{argument.help or ''} (default: {default})" if default else argument.help or ""
    return ", ".join(forms) + value, meaning


def program() -> Program:
    """Return the program with all verbs."""
    namespace = Collection(*TOP_LEVEL)
    for name, tasks in COLLECTIONS.items():
        namespace.add_collection(Collection(name, *tasks))
    return WorkspaceProgram(
        namespace=namespace,
        name="Invoke",
        binary="inv",
        binary_names=["inv"],
        config_class=NoConfig,
    )
