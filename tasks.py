"""The door of `inv`: parse, call, print.

scripts/inv runs this file as a program of the tool environment. Whoever else loads it, a plain `inv` from pipx or an old Python,
hands over to scripts/inv, so that every way in has the same verbs, messages and exit codes. It therefore parses in old Pythons.
"""

import os
import sys

_ROOT = os.path.dirname(os.path.realpath(__file__))
_TOOLS = os.path.join(_ROOT, ".workspace", "tools")
_HANDED_OVER = "VLLM_WORKSPACE_HANDED_OVER"


def _hand_over():
    """Become scripts/inv with all arguments, once: exec keeps the process number, which thus tells a loop."""
    if os.environ.get(_HANDED_OVER) == str(os.getpid()):
        return
    if os.path.realpath(sys.prefix) == os.path.realpath(_TOOLS):
        # The tool environment itself lacks something: without the copy of its requirements it is made anew.
        try:
            os.unlink(os.path.join(_TOOLS, "requirements.txt"))
        except OSError:
            pass
    os.environ[_HANDED_OVER] = str(os.getpid())
    sys.stdout.flush()
    os.execv("/bin/sh", ["sh", os.path.join(_ROOT, "scripts", "inv")] + sys.argv[1:])


if __name__ != "__main__" or sys.version_info < (3, 11):
    _hand_over()
try:
    import invoke
    from invoke import Argument, Collection, Config, Exit, ParseError, Program, task
except ImportError:
    _hand_over()
    raise

import difflib
import re

from workspace import door
from workspace.core import layout
from workspace.core.errors import SettingsError


@task(
    help={
        "device": "what vLLM is built for: auto, cuda or cpu",
        "source": "where vendor/vllm comes from: auto, git or release",
        "kernels": "compiled libraries: auto, donor, native, or a wheel file",
        "jobs": "compilers at once, with --kernels native",
        "wait": "wait for another verb instead of stopping",
    }
)
def bootstrap(_, device=None, source=None, kernels=None, jobs=None, wait=False):
    """Make a fresh clone generate text; safe to repeat."""
    here = layout.here()
    settings = door.load_settings(here, flags={"DEVICE": device, "SOURCE": source, "KERNELS": kernels, "MAX_JOBS": jobs})
    from workspace.build import bootstrap as verb

    verb.run(here, settings, console=door.console(), wait=wait)


@task(
    iterable=["target"],
    help={
        "jobs": "compilers at once, or auto: as many as cores and memory allow",
        "memory": "GiB for all compilers together, or auto: what is available",
        "kernels": "auto, donor, native, or a wheel file",
        "target": "compile this CMake target too; may be given again",
        "clean": "throw the build directories of this clone away first",
        "plan": "print what would be compiled and why; compile nothing",
        "json": "with --plan, one JSON document instead of the table",
        "wait": "wait for another verb instead of stopping",
    },
)
def rebuild(_, jobs=None, memory=None, kernels=None, target=None, clean=False, plan=False, json=False, wait=False):
    """Compile what changed, within cores and memory."""
    here = layout.here()
    settings = door.load_settings(here, flags={"KERNELS": kernels})
    from workspace.build import rebuild as verb

    asked = verb.Asked(jobs=jobs, memory=memory, targets=tuple(target or ()), clean=clean, plan_only=plan, as_json=json)
    verb.run(here, settings, asked, console=door.console(), wait=wait)


@task(
    help={
        "from-source": "build vendor/triton, whatever the diagnosis says",
        "ref": "with --from-source, pin this branch, tag or commit first",
        "jobs": "with --from-source, compilers at once, or auto",
        "check": "only look; exit with 6 where something is wrong",
        "wait": "wait for another verb instead of stopping",
    },
)
def fix_triton(_, from_source=False, ref=None, jobs=None, check=False, wait=False):
    """Find the Triton fault, mend it, prove it."""
    here = layout.here()
    settings = door.load_settings(here, flags={"TRITON_REF": ref})
    from workspace.build.triton import fix as verb
    from workspace.pin import triton as pin

    asked = verb.Asked(check=check, from_source=from_source, ref=ref, jobs=jobs)
    provide = lambda: pin.move(here, settings, console=door.console(), wait=wait)  # noqa: E731
    verb.run(here, settings, asked, console=door.console(), provide=provide, wait=wait)


@task(help={"wait": "wait for another verb instead of stopping"})
def wheel(_, wait=False):
    """Pack the verified build for another clone or Spark."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.build.native import wheel as verb

    verb.run(here, settings, console=door.console(), wait=wait)


@task(default=True, help={"json": "print one JSON document instead of the table"})
def status(_, json=False):
    """Show what is built, what is stale, what to do next."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.build import status as verb

    verb.show(here, settings, console=door.console(), as_json=json)


@task(help={"json": "print one JSON document instead of the table", "offline": "leave out what asks the network"})
def doctor(_, json=False, offline=False):
    """Check machine, toolchain, GPU, network; print cures."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.environment import doctor as verb

    verb.show(here, settings, console=door.console(), as_json=json, offline=offline)


@task(help={"remove": "take it out; a hook of yours comes back", "run": "judge now, as the hook does"})
def hook(_, remove=False, run=False):
    """Install the pre-push gate; --remove takes it out."""
    here = layout.here()
    from workspace.pin import hook as verb

    if run:
        verb.judge(here, door.load_settings(here), console=door.console())
    else:
        (verb.remove if remove else verb.install)(here, console=door.console())


@task
def report(_):
    """Collect a redacted bundle for a bug report."""
    here = layout.here()
    from workspace.build import report as verb

    # A broken .env or pins.toml is what a report may be about: it does not stop here.
    verb.write(here, verb.settings_of(here), console=door.console())


PROJECT = "vllm or triton"
WAIT = "wait for another verb instead of stopping"
JSON = "print one JSON document instead of the table"


@task(default=True, name="status", help={"project": PROJECT, "json": JSON})
def patch_status(_, project="vllm", json=False):
    """One row a patch: state, subject, Upstream-Status."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.source import overview

    overview.show(here, settings, project, console=door.console(), as_json=json)


@task(name="apply", help={"project": PROJECT, "wait": WAIT})
def patch_apply(_, project="vllm", wait=False):
    """Put the series on the pin, all or nothing."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.pin import patching

    patching.apply(here, settings, project, console=door.console(), wait=wait)


@task(name="unapply", help={"project": PROJECT, "wait": WAIT})
def patch_unapply(_, project="vllm", wait=False):
    """Take the series off; the commits are kept under refs."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.pin import patching

    patching.unapply(here, settings, project, console=door.console(), wait=wait)


@task(
    name="export",
    # -p is --project with every verb.
    auto_shortflags=False,
    help={
        "check": "write nothing; print the difference and exit with 5",
        "branch": "put one patch, signed off, on upstream's main",
        "patch": "which patch --branch is for, by its file name",
        "project": PROJECT,
        "wait": WAIT,
    },
)
def patch_export(_, check=False, branch="", patch="", project="vllm", wait=False):
    """Write the commits on the pin as patches and series."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.pin import patching

    if bool(patch) != bool(branch) or (branch and check):
        raise SettingsError("--branch and --patch belong together, and without --check", hint="inv patch.export --branch NAME --patch FILE")
    if branch:
        patching.branch(here, settings, project, branch, patch, console=door.console(), wait=wait)
    else:
        patching.export(here, settings, project, console=door.console(), wait=wait, check=check)


@task(name="import", positional=["origin"], help={"origin": "a mail file, an address, or the number of a pull request", "project": PROJECT, "wait": WAIT})
def patch_import(_, origin, project="vllm", wait=False):
    """Take a patch: a file, an address, a pull request."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.pin import patching

    patching.take(here, settings, project, origin, console=door.console(), wait=wait)


@task(name="continue", help={"skip": "leave out the patch that conflicts", "abort": "give up and go back", "project": PROJECT, "wait": WAIT})
def patch_continue(_, skip=False, abort=False, project="vllm", wait=False):
    """Go on after a conflict, a bump's too."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.pin import patching

    if skip and abort:
        raise SettingsError("--skip and --abort exclude each other", hint="inv --help patch.continue")
    patching.go_on(here, settings, project, "skip" if skip else "abort" if abort else "continue", console=door.console(), wait=wait)


@task(default=True, name="show", help={"json": JSON, "offline": "leave out what asks the network"})
def pin_show(_, json=False, offline=False):
    """Show the pin, what is newer, what to return to."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.pin import show

    show.show(here, settings, console=door.console(), as_json=json, offline=offline)


@task(name="forecast", positional=["ref"], help={"ref": "a tag of vLLM, such as v0.33.0", "json": JSON})
def pin_forecast(_, ref, json=False):
    """Say what a move of the pin would break; touch nothing."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.pin import forecast

    forecast.run(here, settings, ref, console=door.console(), as_json=json)


@task(
    name="bump",
    positional=["ref"],
    help={"ref": "a tag of vLLM, or the word triton", "young": "take a release that is younger than PIN_MIN_AGE_DAYS", "wait": WAIT},
)
def pin_bump(_, ref, young=False, wait=False):
    """Move the pin beside the working tree; promote if green."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.pin import bump

    bump.run(here, settings, ref, console=door.console(), young=young, wait=wait)


@task(name="back", help={"good": "a name that inv pin shows; without it the last one", "wait": WAIT})
def pin_back(_, good="", wait=False):
    """Return to the last good pin, environment included."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.pin import back

    back.run(here, settings, good or None, console=door.console(), wait=wait)


@task(default=True, name="check", help={"json": JSON})
def env_check(_, json=False):
    """Show each setting: value, source, verdict."""
    here = layout.here()
    # What a door warns of stands in the rows.
    settings = door.load_settings(here, is_quiet=True)
    from workspace.environment import check

    check.show(here, settings, console=door.console(), as_json=json)


@task(name="init", help={"replace": "change lines that differ too; the old ones stay as remarks"})
def env_init(_, replace=False):
    """Write or complete .env from what this machine has."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.environment import proposal

    proposal.run(here, settings, console=door.console(), replace=replace)


@task(name="export")
def env_export(_):
    """Print lines for eval in sh; inv and nox on PATH."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.engine import shell as verb

    verb.export(here, settings, console=door.console())


@task
def run(_):
    """Run a command in the built environment: -- CMD."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.engine import shell as verb

    verb.run(here, settings, _after_dashes(), console=door.console())


@task
def shell(_):
    """Open a shell in the built environment."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.engine import shell as verb

    verb.shell(here, settings, console=door.console())


@task
def drop_caches(_):
    """Give the page cache back before a large load."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.environment import page_cache

    page_cache.drop(settings, console=door.console())


@task(
    default=True,
    name="start",
    positional=["recipe"],
    help={
        "recipe": "a recipe, a model on the hub, or a folder; flags of vllm serve stand after --",
        "dry-run": "print environment and command line; start nothing",
        "detach": "return when it is ready; it outlives the terminal",
        "i-know": "open to others without a key, or short of memory: go on",
    },
)
def serve_start(_, recipe, dry_run=False, detach=False, i_know=False):
    """Serve a recipe or a model; vLLM's own flags after --."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.serve import start

    asked = start.Asked(recipe, tuple(_after_dashes()), dry_run=dry_run, detach=detach, knows=i_know)
    start.run(here, settings, asked, console=door.console())


@task(name="status", help={"json": JSON})
def serve_status(_, json=False):
    """Show the server: ready? since when, how much memory."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.serve import present

    present.status(here, settings, console=door.console(), as_json=json)


@task(name="logs", help={"lines": "so many of the last lines", "follow": "go on until the server ends"})
def serve_logs(_, lines="", follow=False):
    """Print the server's log; --follow goes on with it."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.serve import present

    present.logs(here, settings, console=door.console(), lines=lines, follow=follow)


@task(name="stop")
def serve_stop(_):
    """Stop the server, wait for port and memory."""
    here = layout.here()
    from workspace.serve import present

    present.stop(here, console=door.console())


@task(name="list", help={"json": JSON})
def serve_list(_, json=False):
    """Show recipes: fits here? on disk, or to be fetched?"""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.serve import listing

    listing.show(here, settings, console=door.console(), as_json=json)


@task(name="fetch", positional=["recipe"], help={"recipe": "a recipe, or a model on the hub such as Qwen/Qwen3-8B"})
def serve_fetch(_, recipe):
    """Get weights and vocabularies before any load."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.serve import fetch

    fetch.run(here, settings, recipe, console=door.console())


@task(default=True, name="list", help={"json": JSON})
def bench_list(_, json=False):
    """Show the records of benchmarks, newest first."""
    here = layout.here()
    from workspace.bench import listing

    listing.show(here, console=door.console(), as_json=json)


@task(
    name="compare",
    positional=["first", "second"],
    iterable=["across"],
    help={
        "first": "a record: its label, the name of its file, or a path",
        "second": "the record that may be slower",
        "factor": "a change up to so many per cent does not count",
        "across": "compare although this field differs; may be given again",
        "json": JSON,
    },
)
def bench_compare(_, first, second, factor="5", across=None, json=False):
    """Is the second record slower? A verdict on each metric."""
    here = layout.here()
    from workspace.bench import compare

    compare.show(here, first, second, factor=factor, across=across or (), console=door.console(), as_json=json)


@task(name="report", help={"first": "a record to compare with; without it the newest two", "second": "the record that may be slower"})
def bench_report(_, first="", second=""):
    """Draw all records: one HTML page, and a PNG a plot."""
    here = layout.here()
    from workspace.bench import report as verb

    verb.write(here, first, second, console=door.console())


def _after_dashes():
    """The words after `--` as the shell gave them: Invoke's own remainder joins them with blanks."""
    return sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []


class _Config(Config):
    """Invoke's configuration without files and variables: what is in them is for other projects, or for nobody."""

    prefix = "vllm_workspace"

    def load_base_conf_files(self):
        """Leave /etc and the home folder alone."""

    def load_shell_env(self):
        """Leave VLLM_WORKSPACE_* alone: Invoke would fail on a value that is not of its type."""


class _Door(Program):
    """Invoke's parser and lists; failures leave it as exceptions, not as its own exit codes."""

    # The other core flags change how Invoke runs shell commands. No verb does that, and `--dry bootstrap` must not seem to be dry.
    core_flags = ("complete", "debug", "help", "list", "list-depth", "list-format", "print-completion-script", "version", "write-pyc")

    def core_args(self):
        # A plain `inv --search-root CLONE` hands its flags over too; which clone is meant is settled by then.
        root = Argument(names=("search-root", "r"), help="Taken for Invoke's sake; this clone is always meant.")
        return [argument for argument in super().core_args() if argument.name in self.core_flags] + [root]

    def parse_core(self, argv):
        # Invoke turns bytecode off for the sake of the tasks file; here it would have every verb compile the library anew.
        writes = sys.dont_write_bytecode
        super().parse_core(argv)
        sys.dont_write_bytecode = writes

    def update_config(self, merge=True):
        """Leave out the core flags that are not there."""

    def run(self, argv=None, exit=True):
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

    def _parse_core_flags(self, argv):
        try:
            self.parse_core(argv)
        except ValueError as exc:
            # The one flag that Invoke takes for a number.
            raise SettingsError("--list-depth needs a whole number", hint="inv --help") from exc

    def parse_cleanup(self):
        try:
            super().parse_cleanup()
        except ValueError as exc:
            # What is to be completed has a quote that is still open.
            if not self.args.complete.value:
                raise
            raise Exit from exc

    def _misuse(self, error):
        """Say what is wrong with the command line, and what it is like. Invoke puts the word at fault into its sentence only."""
        unknown = re.search(r"No idea what '(.+)' is", str(error))
        verb = error.context.name if error.context is not None else None
        more = "inv --help {}".format(verb) if verb else "inv --help"
        if unknown is None:
            return SettingsError(re.sub(r"^Flag <Argument: ([\w-]+).*> needed value.*", r"--\1 needs a value", str(error)), hint=more)
        word = unknown.group(1)
        if word.startswith("-"):
            context = self.parser.contexts[verb] if verb else self.initial_context
            like = difflib.get_close_matches(word, list(context.flags), n=3)
            sentence = "{} has no flag {}".format("inv " + verb if verb else "inv", word)
        else:
            like = difflib.get_close_matches(word, list(self.parser.contexts), n=3)
            sentence, more = "there is no verb {}".format(word), "inv --list"
        return SettingsError(sentence, hint="did you mean {}? {}".format(" or ".join(like), more) if like else more)


def _main():
    os.environ.pop(_HANDED_OVER, None)
    namespace = Collection(bootstrap, rebuild, fix_triton, wheel, status, doctor, hook, report, run, shell, drop_caches)
    namespace.add_collection(Collection("patch", patch_status, patch_apply, patch_unapply, patch_export, patch_import, patch_continue))
    namespace.add_collection(Collection("pin", pin_show, pin_forecast, pin_bump, pin_back))
    namespace.add_collection(Collection("env", env_check, env_init, env_export))
    namespace.add_collection(Collection("serve", serve_start, serve_list, serve_fetch, serve_status, serve_logs, serve_stop))
    namespace.add_collection(Collection("bench", bench_list, bench_compare, bench_report))
    program = _Door(
        namespace=namespace,
        name="Invoke",
        version=invoke.__version__,
        binary="inv",
        binary_names=["inv"],
        config_class=_Config,
    )
    return door.run(lambda: program.run(sys.argv))


if __name__ == "__main__":
    sys.exit(_main())
