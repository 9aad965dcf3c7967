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

# The first task with `default=True` is what a bare `inv` or a bare collection name runs.
TOP_LEVEL = (
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
COLLECTIONS = {
    "patch": (
        patch.status,
        patch.apply,
        patch.unapply,
        patch.export,
        patch.import_,
        patch.continue_,
    ),
    "pin": (verbs.pin_show, verbs.pin_forecast, verbs.pin_bump, verbs.pin_rollback),
    "env": (verbs.env_check, verbs.env_init, verbs.env_export),
    "serve": (
        verbs.serve,
        verbs.serve_status,
        verbs.serve_logs,
        verbs.serve_stop,
        verbs.serve_list,
        verbs.serve_fetch,
    ),
    "bench": (verbs.bench_list, verbs.bench_compare, verbs.bench_report),
}


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
        return [
            argument for argument in super().core_args() if argument.name in self.core_flags
        ] + [root]

    def parse_core(self, argv: list[str] | None) -> None:
        # Invoke turns bytecode off for the tasks file; every verb would then compile the library
        # again.
        writes = sys.dont_write_bytecode
        super().parse_core(argv)
        sys.dont_write_bytecode = writes

    def update_config(self, merge: bool = True) -> None:
        """Skip the core flags that this program does not have."""

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
            # The only core flag that Invoke converts to a number.
            raise SettingsError("--list-depth needs a whole number", hint="inv --help") from exc

    def parse_cleanup(self) -> None:
        try:
            super().parse_cleanup()
        except ValueError as exc:
            # The text to complete has an open quote.
            if not self.args.complete.value:
                raise
            raise Exit from exc

    def _misuse(self, error: ParseError) -> SettingsError:
        """Return an error that names the fault and the nearest valid names.

        Invoke names the faulty argument only inside its sentence.
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
        typed = unknown.group(1)
        if typed.startswith("-"):
            context = self.parser.contexts[verb] if verb else self.initial_context
            like = difflib.get_close_matches(typed, list(context.flags), n=3)
            sentence = "{} has no flag {}".format("inv " + verb if verb else "inv", typed)
        else:
            like = difflib.get_close_matches(typed, list(self.parser.contexts), n=3)
            sentence, more = f"there is no verb {typed}", "inv --list"
        return SettingsError(
            sentence, hint="did you mean {}? {}".format(" or ".join(like), more) if like else more
        )


def program() -> Program:
    """Return the program with all verbs."""
    namespace = Collection(*TOP_LEVEL)
    for name, tasks in COLLECTIONS.items():
        namespace.add_collection(Collection(name, *tasks))
    return WorkspaceProgram(
        namespace=namespace,
        name="Invoke",
        version=invoke.__version__,
        binary="inv",
        binary_names=["inv"],
        config_class=NoConfig,
    )
