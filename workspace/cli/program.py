"""Invoke's program as this workspace needs it: its parser and lists, without its configuration and
its own exit codes.
"""

import difflib
import re
import sys

import invoke
from invoke.collection import Collection
from invoke.config import Config
from invoke.exceptions import Exit, ParseError
from invoke.parser.argument import Argument
from invoke.program import Program

from workspace.cli import patch, verbs
from workspace.core.errors import SettingsError


class NoConfig(Config):
    """Invoke's configuration without files and variables: what is in them is for other projects, or
    for nobody.
    """

    prefix = "vllm_workspace"

    def load_base_conf_files(self) -> None:
        """Leave /etc and the home folder alone."""

    def load_shell_env(self) -> None:
        """Leave VLLM_WORKSPACE_* alone: Invoke would fail on a value that is not of its type."""


class Door(Program):
    """Invoke's parser and lists; failures leave it as exceptions, not as its own exit codes."""

    # The other core flags change how Invoke runs shell commands. No verb does that, and `--dry
    # bootstrap` must not seem to be dry.
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
        # A plain `inv --search-root CLONE` hands its flags over too; which clone is meant is
        # settled by then.
        root = Argument(
            names=("search-root", "r"), help="Taken for Invoke's sake; this clone is always meant."
        )
        return [
            argument for argument in super().core_args() if argument.name in self.core_flags
        ] + [root]

    def parse_core(self, argv: list[str] | None) -> None:
        # Invoke turns bytecode off for the sake of the tasks file; here it would have every verb
        # compile the library anew.
        writes = sys.dont_write_bytecode
        super().parse_core(argv)
        sys.dont_write_bytecode = writes

    def update_config(self, merge: bool = True) -> None:
        """Leave out the core flags that are not there."""

    def run(self, argv: list[str] | None = None, exit: bool = True) -> None:
        try:
            self.create_config()
            self._parse_core_flags(argv)
            self.parse_collection()
            self.parse_tasks()
            self.parse_cleanup()
            self.execute()
        except ParseError as exc:
            raise self._misuse(exc) from exc
        except Exit as exc:
            if exc.message:
                raise SettingsError(exc.message, hint="inv --list") from exc

    def _parse_core_flags(self, argv: list[str] | None) -> None:
        try:
            self.parse_core(argv)
        except ValueError as exc:
            # The one flag that Invoke takes for a number.
            raise SettingsError("--list-depth needs a whole number", hint="inv --help") from exc

    def parse_cleanup(self) -> None:
        try:
            super().parse_cleanup()
        except ValueError as exc:
            # What is to be completed has a quote that is still open.
            if not self.args.complete.value:
                raise
            raise Exit from exc

    def _misuse(self, error: ParseError) -> SettingsError:
        """Say what is wrong with the command line, and what it is like. Invoke puts the word at
        fault into its sentence only.
        """
        unknown = re.search(r"No idea what '(.+)' is", str(error))
        verb = error.context.name if error.context is not None else None
        more = f"inv --help {verb}" if verb else "inv --help"
        if unknown is None:
            return SettingsError(
                re.sub(
                    r"^Flag <Argument: ([\w-]+).*> needed value.*",
                    r"--\1 needs a value",
                    str(error),
                ),
                hint=more,
            )
        word = unknown.group(1)
        if word.startswith("-"):
            context = self.parser.contexts[verb] if verb else self.initial_context
            like = difflib.get_close_matches(word, list(context.flags), n=3)
            sentence = "{} has no flag {}".format("inv " + verb if verb else "inv", word)
        else:
            like = difflib.get_close_matches(word, list(self.parser.contexts), n=3)
            sentence, more = f"there is no verb {word}", "inv --list"
        return SettingsError(
            sentence, hint="did you mean {}? {}".format(" or ".join(like), more) if like else more
        )


def program() -> Program:
    """The program of all verbs."""
    namespace = Collection(
        verbs.bootstrap,
        verbs.rebuild,
        verbs.fix_triton,
        verbs.wheel,
        verbs.status,
        verbs.doctor,
        verbs.hook,
        verbs.report,
        verbs.run,
        verbs.shell,
        verbs.drop_caches,
    )
    namespace.add_collection(
        Collection(
            "patch",
            patch.status,
            patch.apply,
            patch.unapply,
            patch.export,
            patch.import_,
            patch.continue_,
        )
    )
    namespace.add_collection(
        Collection("pin", verbs.pin_show, verbs.pin_forecast, verbs.pin_bump, verbs.pin_rollback)
    )
    namespace.add_collection(Collection("env", verbs.env_check, verbs.env_init, verbs.env_export))
    namespace.add_collection(
        Collection(
            "serve",
            verbs.serve,
            verbs.serve_status,
            verbs.serve_logs,
            verbs.serve_stop,
            verbs.serve_list,
            verbs.serve_fetch,
        )
    )
    namespace.add_collection(
        Collection("bench", verbs.bench_list, verbs.bench_compare, verbs.bench_report)
    )
    return Door(
        namespace=namespace,
        name="Invoke",
        version=invoke.__version__,
        binary="inv",
        binary_names=["inv"],
        config_class=NoConfig,
    )
