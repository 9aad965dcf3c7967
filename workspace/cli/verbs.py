"""Verbs of `inv`; those of patches are in verbs_patch.py, those of servers and nodes in
verbs_serve.py.

A verb parses its arguments, calls one function of the library and prints nothing itself. Imports of
the library stand inside the verbs, so that `inv --list` starts at once.
"""

from invoke.context import Context

from workspace.cli import main
from workspace.cli.main import JSON, RECORD, WAIT, after_dashes, task
from workspace.core import paths

REF = "a tag, branch or commit of vLLM, or URL@REF of a fork"
BASE = "the release whose precompiled wheel a commit takes"


@task(
    help={
        "device": "what vLLM is built for: auto, cuda or cpu",
        "source": "where vendor/vllm comes from: auto, git or release",
        "kernels": "compiled libraries: auto, precompiled, native, or a wheel file",
        "jobs": "compilers at once, with --kernels native",
        "no-first-token": "leave out the last step, a first token on the device",
        "from": "the folder of a bundle: no index and no git remote is asked",
        "wait": WAIT,
    }
)
def bootstrap(
    _: Context,
    device: str | None = None,
    source: str | None = None,
    kernels: str | None = None,
    jobs: str | None = None,
    no_first_token: bool = False,
    from_: str | None = None,
    wait: bool = False,
) -> None:
    """Set up source, patches, environment, vLLM; safe to repeat."""
    from workspace.install import bootstrap as verb

    flags = {"DEVICE": device, "SOURCE": source, "KERNELS": kernels, "MAX_JOBS": jobs}
    end: verb.End = "command" if no_first_token else "token"
    console, opened = main.console(), main.opened(flags)
    if from_ is None:
        verb.run(*opened, console=console, wait=wait, end=end)
    else:
        verb.run_from(*opened, paths.typed(from_), console=console, wait=wait, end=end)


@task(
    iterable=["target"],
    help={
        "jobs": "compilers at once, or auto: as many as cores and memory allow",
        "memory": "GiB for all compilers together (default: auto, what is available)",
        "kernels": "auto, precompiled, native, or a wheel file",
        "target": "also compile this CMake target; may be repeated",
        "clean": "delete the build directories of this clone first",
        "plan": "print what would be compiled and why; compile nothing",
        "json": "with --plan, one JSON document instead of the table",
        "wait": WAIT,
    },
)
def rebuild(
    _: Context,
    jobs: str | None = None,
    memory: str | None = None,
    kernels: str | None = None,
    target: list[str] | None = None,
    clean: bool = False,
    plan: bool = False,
    json: bool = False,
    wait: bool = False,
) -> None:
    """Compile what changed, within cores and memory."""
    from workspace.install import rebuild as verb
    from workspace.install.plan import RebuildOptions

    targets = tuple(target or ())
    options = RebuildOptions(
        jobs=jobs, memory=memory, targets=targets, clean=clean, plan_only=plan, as_json=json
    )
    verb.run(*main.opened({"KERNELS": kernels}), options, console=main.console(), wait=wait)


@task(
    help={
        "from-source": "build vendor/triton, whatever the diagnosis is",
        "ref": "with --from-source, pin this branch, tag or commit first",
        "jobs": "with --from-source, compilers at once, or auto",
        "check": "only diagnose; exit with 6 if there is a fault",
        "wait": WAIT,
    },
)
def fix_triton(
    _: Context,
    from_source: bool = False,
    ref: str | None = None,
    jobs: str | None = None,
    check: bool = False,
    wait: bool = False,
) -> None:
    """Diagnose a fault of Triton, fix it, verify the fix."""
    here, settings = main.opened({"TRITON_REF": ref})
    from workspace.bump import triton as pin
    from workspace.install import triton_fix as verb

    options = verb.FixOptions(check=check, from_source=from_source, ref=ref, jobs=jobs)
    provide = lambda: pin.move(here, settings, console=main.console(), wait=wait)  # noqa: E731
    verb.run(here, settings, options, console=main.console(), provide=provide, wait=wait)


@task(help={"wait": WAIT})
def wheel(_: Context, wait: bool = False) -> None:
    """Pack the verified build for another clone or Spark."""
    from workspace.install import wheel as verb

    verb.run(*main.opened(), console=main.console(), wait=wait)


@task(
    positional=["place"],
    help={
        "place": "a folder, or a new file *.tar",
        "for": "the architecture: aarch64 or x86_64 (default: of this machine)",
        "python": "the version of Python, such as 3.12 (default: of this clone)",
        "device": "cpu or cuda (default: of this clone)",
        "split": "cut the file *.tar into pieces of this size, such as 60M",
        "plan": "print size, sha256 and name of each file; fetch nothing",
        "wait": WAIT,
    },
)
def bundle(
    _: Context,
    place: str,
    for_: str | None = None,
    python: str | None = None,
    device: str | None = None,
    split: str | None = None,
    plan: bool = False,
    wait: bool = False,
) -> None:
    """Collect all that a bootstrap needs, for any machine."""
    from workspace.install import bundle as verb

    options = verb.BundleOptions(place, for_, python, device, split, plan_only=plan)
    verb.make(*main.opened(), options, console=main.console(), wait=wait)


@task(default=True, help={"json": JSON})
def status(_: Context, json: bool = False) -> None:
    """Show what is built, what is stale, what to do next."""
    from workspace.install import status as verb

    verb.show(main.machine(), console=main.console(), as_json=json)


@task(help={"json": JSON, "offline": "leave out the checks that need the network"})
def doctor(_: Context, json: bool = False, offline: bool = False) -> None:
    """Check machine, toolchain, GPU, network; print hints."""
    from workspace.install import status

    machine = main.machine()
    if (machine.layout.root / "nodes.toml").exists():
        # A clone without other nodes does not pay for the import.
        from workspace.server import node_sync

        more = node_sync.doctor_rows(machine)
    else:
        more = ()
    status.show_doctor(machine, console=main.console(), as_json=json, offline=offline, more=more)


@task(
    help={
        "remove": "remove it; your own hook comes back",
        "run": "run the gate now, as the hook does",
        "lint": "also run vLLM's own pre-commit on the changed files",
    }
)
def hook(_: Context, remove: bool = False, run: bool = False, lint: bool = False) -> None:
    """Install the pre-push gate; --remove removes it."""
    here = paths.here()
    from workspace.checks import smoke as verb

    if remove:
        verb.remove_hook(here, console=main.console())
    else:
        work = verb.run_hook if run else verb.install_hook
        work(here, main.load_settings(here), console=main.console(), lints=lint)


@task
def report(_: Context) -> None:
    """Collect a redacted bundle for a bug report."""
    here = paths.here()
    from workspace.support import bug_report as verb

    # The report may be about a broken .env or pins.toml, so neither stops it.
    verb.write(here, verb.settings_of(here), console=main.console())


@task(name="check", default=True, help={"json": JSON})
def env_check(_: Context, json: bool = False) -> None:
    """Show each setting: value, source, verdict."""
    machine = main.machine()
    from workspace.machine import check

    check.show(machine, console=main.console(), as_json=json)


@task(name="init", help={"replace": "also change lines that differ; old ones become comments"})
def env_init(_: Context, replace: bool = False) -> None:
    """Write or complete .env for this machine."""
    from workspace.machine import check

    check.complete(main.machine(), console=main.console(), replace=replace)


@task(name="export")
def env_export(_: Context) -> None:
    """Print shell lines for eval: they put inv, nox on PATH."""
    from workspace.server import verbs as verb

    verb.export_variables(main.machine(), console=main.console())


@task
def run(_: Context) -> None:
    """Run a command in the built environment: run -- COMMAND."""
    from workspace.server import verbs as verb

    verb.run_command(main.machine(), after_dashes(), console=main.console())


@task
def shell(_: Context) -> None:
    """Open a shell in the built environment."""
    from workspace.server import verbs as verb

    verb.open_shell(main.machine(), console=main.console())


@task(help={"yes": "as root, do not ask"})
def drop_caches(_: Context, yes: bool = False) -> None:
    """Free the page cache before loading a large model."""
    from workspace.machine import hardware

    hardware.drop_caches(main.opened()[1], console=main.console(), is_agreed=yes)


@task(
    name="show",
    default=True,
    help={"json": JSON, "offline": "do not ask the network for newer releases"},
)
def pin_show(_: Context, json: bool = False, offline: bool = False) -> None:
    """Show the pin, newer releases and known-good states."""
    from workspace.bump import rollback

    rollback.show(*main.opened(), console=main.console(), as_json=json, offline=offline)


@task(
    name="forecast",
    positional=["ref"],
    help={"ref": REF, "base": BASE, "json": JSON},
)
def pin_forecast(_: Context, ref: str, base: str = "", json: bool = False) -> None:
    """Show what a pin move would break; change nothing."""
    from workspace.bump import forecast
    from workspace.repo.pins import Wanted

    wanted = Wanted.read(ref, base)
    forecast.run(*main.opened(), wanted, console=main.console(), as_json=json)


@task(
    name="bump",
    positional=["ref"],
    help={
        "ref": f"{REF}; or triton",
        "base": BASE,
        "allow-recent": "accept a release younger than PIN_MIN_AGE_DAYS",
        "wait": WAIT,
    },
)
def pin_bump(
    _: Context, ref: str, base: str = "", allow_recent: bool = False, wait: bool = False
) -> None:
    """Move the pin in a sandbox; promote it if checks pass."""
    from workspace.bump import bump
    from workspace.repo.pins import Wanted

    wanted = Wanted.read(ref, base)
    bump.run(*main.opened(), wanted, console=main.console(), allow_recent=allow_recent, wait=wait)


@task(
    name="rollback",
    help={
        "good": "a name that inv pin shows (default: the last one)",
        "force": "also leave work that no known-good state holds; it is kept",
        "wait": WAIT,
    },
)
def pin_rollback(_: Context, good: str = "", force: bool = False, wait: bool = False) -> None:
    """Return to the last known-good state."""
    from workspace.bump import rollback

    rollback.run(*main.opened(), good or None, console=main.console(), force=force, wait=wait)


@task(default=True, name="list", help={"json": JSON})
def bench_list(_: Context, json: bool = False) -> None:
    """List the benchmark records, newest first."""
    from workspace.bench import results

    results.show_records(paths.here(), console=main.console(), as_json=json)


@task(name="label", positional=["record", "text"], help={"record": RECORD, "text": "the new label"})
def bench_label(_: Context, record: str, text: str) -> None:
    """Give a record another label."""
    from workspace.bench import results

    results.relabel(paths.here(), record, text, console=main.console())


@task(
    name="compare",
    positional=["first", "second"],
    iterable=["across"],
    help={
        "first": RECORD,
        "second": "the record that may be slower",
        "factor": "ignore a change of up to this many percent",
        "across": "compare although this field differs; may be repeated",
        "json": JSON,
    },
)
def bench_compare(
    _: Context,
    first: str,
    second: str,
    factor: str = "5",
    across: list[str] | None = None,
    json: bool = False,
) -> None:
    """Compare two records; fail if the second is slower."""
    from workspace.bench import compare

    console, fields = main.console(), across or ()
    compare.show(
        paths.here(), first, second, factor=factor, across=fields, console=console, as_json=json
    )


@task(
    name="report",
    help={
        "first": "a record to compare with (default: the newest two)",
        "second": "the record that may be slower",
    },
)
def bench_report(_: Context, first: str = "", second: str = "") -> None:
    """Draw all records: one HTML page and PNG plots."""
    from workspace.bench import report as verb

    verb.write(paths.here(), first, second, console=main.console())
