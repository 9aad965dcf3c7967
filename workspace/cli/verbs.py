"""Every verb of `inv` but those of the patch series (patch.py).

A verb parses its arguments, calls one function of the library and prints nothing itself. Imports of
the library stand inside the verbs, so that `inv --list` starts at once.
"""

from invoke.context import Context
from invoke.tasks import task

from workspace.cli import main
from workspace.cli.main import JSON, WAIT, after_dashes
from workspace.core import paths


@task(
    help={
        "device": "what vLLM is built for: auto, cuda or cpu",
        "source": "where vendor/vllm comes from: auto, git or release",
        "kernels": "compiled libraries: auto, precompiled, native, or a wheel file",
        "jobs": "compilers at once, with --kernels native",
        "wait": WAIT,
    }
)
def bootstrap(
    _: Context,
    device: str | None = None,
    source: str | None = None,
    kernels: str | None = None,
    jobs: str | None = None,
    wait: bool = False,
) -> None:
    """Make a fresh clone generate text; safe to repeat."""
    here = paths.here()
    settings = main.load_settings(
        here, flags={"DEVICE": device, "SOURCE": source, "KERNELS": kernels, "MAX_JOBS": jobs}
    )
    from workspace.install import bootstrap as verb

    verb.run(here, settings, console=main.console(), wait=wait)


@task(
    iterable=["target"],
    help={
        "jobs": "compilers at once, or auto: as many as cores and memory allow",
        "memory": "GiB for all compilers together, or auto: what is available",
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
    here = paths.here()
    settings = main.load_settings(here, flags={"KERNELS": kernels})
    from workspace.install import rebuild as verb

    options = verb.RebuildOptions(
        jobs=jobs,
        memory=memory,
        targets=tuple(target or ()),
        clean=clean,
        plan_only=plan,
        as_json=json,
    )
    verb.run(here, settings, options, console=main.console(), wait=wait)


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
    """Find the Triton fault, fix it, prove it."""
    here = paths.here()
    settings = main.load_settings(here, flags={"TRITON_REF": ref})
    from workspace.bump import triton as pin
    from workspace.install import triton_fix as verb

    options = verb.FixOptions(check=check, from_source=from_source, ref=ref, jobs=jobs)
    provide = lambda: pin.move(here, settings, console=main.console(), wait=wait)  # noqa: E731
    verb.run(here, settings, options, console=main.console(), provide=provide, wait=wait)


@task(help={"wait": WAIT})
def wheel(_: Context, wait: bool = False) -> None:
    """Pack the verified build for another clone or Spark."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.install import wheel as verb

    verb.run(here, settings, console=main.console(), wait=wait)


@task(default=True, help={"json": JSON})
def status(_: Context, json: bool = False) -> None:
    """Show what is built, what is stale, what to do next."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.install import status as verb
    from workspace.machine.machine import Machine

    verb.show(Machine(here, settings), console=main.console(), as_json=json)


@task(help={"json": JSON, "offline": "leave out the checks that need the network"})
def doctor(_: Context, json: bool = False, offline: bool = False) -> None:
    """Check machine, toolchain, GPU, network; print hints."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.machine import doctor as verb
    from workspace.machine.machine import Machine

    verb.show(Machine(here, settings), console=main.console(), as_json=json, offline=offline)


@task(
    help={
        "remove": "remove it; your own hook comes back",
        "run": "run the gate now, as the hook does",
    }
)
def hook(_: Context, remove: bool = False, run: bool = False) -> None:
    """Install the pre-push gate; --remove takes it out."""
    here = paths.here()
    from workspace.checks import smoke as verb

    if run:
        verb.run_hook(here, main.load_settings(here), console=main.console())
    else:
        (verb.remove_hook if remove else verb.install_hook)(here, console=main.console())


@task
def report(_: Context) -> None:
    """Collect a redacted bundle for a bug report."""
    here = paths.here()
    from workspace.support import bug_report as verb

    # The report may be about a broken .env or pins.toml, so neither stops it.
    verb.write(here, verb.settings_of(here), console=main.console())


@task(default=True, name="list", help={"json": JSON})
def bench_list(_: Context, json: bool = False) -> None:
    """List the benchmark records, newest first."""
    here = paths.here()
    from workspace.bench import results

    results.show_records(here, console=main.console(), as_json=json)


@task(
    name="compare",
    positional=["first", "second"],
    iterable=["across"],
    help={
        "first": "a record: its label, its file name, or a path",
        "second": "the record that may be slower",
        "factor": "ignore a change up to this many per cent",
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
    """Judge each metric: is the second record slower?"""
    here = paths.here()
    from workspace.bench import compare

    compare.show(
        here,
        first,
        second,
        factor=factor,
        across=across or (),
        console=main.console(),
        as_json=json,
    )


@task(
    name="report",
    help={
        "first": "a record to compare with (default: the newest two)",
        "second": "the record that may be slower",
    },
)
def bench_report(_: Context, first: str = "", second: str = "") -> None:
    """Draw all records: one HTML page, PNG plots."""
    here = paths.here()
    from workspace.bench import report as verb

    verb.write(here, first, second, console=main.console())


@task(name="check", default=True, help={"json": JSON})
def env_check(_: Context, json: bool = False) -> None:
    """Show each setting: value, source, verdict."""
    here = paths.here()
    # The rows hold the warnings.
    settings = main.load_settings(here, is_quiet=True)
    from workspace.machine import check
    from workspace.machine.machine import Machine

    check.show(Machine(here, settings), console=main.console(), as_json=json)


@task(name="init", help={"replace": "also change lines that differ; old ones become comments"})
def env_init(_: Context, replace: bool = False) -> None:
    """Write or complete .env for this machine."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.machine import dotenv
    from workspace.machine.machine import Machine

    dotenv.complete(Machine(here, settings), console=main.console(), replace=replace)


@task(name="export")
def env_export(_: Context) -> None:
    """Print shell lines for eval; inv and nox on PATH."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.server import command as verb

    verb.export_variables(here, settings, console=main.console())


@task
def run(_: Context) -> None:
    """Run a command in the built environment: -- CMD."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.server import command as verb

    verb.run_command(here, settings, after_dashes(), console=main.console())


@task
def shell(_: Context) -> None:
    """Open a shell in the built environment."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.server import command as verb

    verb.open_shell(here, settings, console=main.console())


@task
def drop_caches(_: Context) -> None:
    """Free the page cache before loading a large model."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.machine import hardware

    hardware.drop_caches(settings, console=main.console())


@task(
    name="show",
    default=True,
    help={"json": JSON, "offline": "leave out the checks that need the network"},
)
def pin_show(_: Context, json: bool = False, offline: bool = False) -> None:
    """Show the pin, newer releases and known-good states."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.bump import rollback

    rollback.show(here, settings, console=main.console(), as_json=json, offline=offline)


@task(
    name="forecast",
    positional=["ref"],
    help={"ref": "a tag of vLLM, such as v0.33.0", "json": JSON},
)
def pin_forecast(_: Context, ref: str, json: bool = False) -> None:
    """Show what a pin move would break; change nothing."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.bump import forecast

    forecast.run(here, settings, ref, console=main.console(), as_json=json)


@task(
    name="bump",
    positional=["ref"],
    help={
        "ref": "a tag of vLLM, or triton",
        "allow-recent": "accept a release younger than PIN_MIN_AGE_DAYS",
        "wait": WAIT,
    },
)
def pin_bump(_: Context, ref: str, allow_recent: bool = False, wait: bool = False) -> None:
    """Move the pin in a sandbox; promote it if checks pass."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.bump import bump

    bump.run(here, settings, ref, console=main.console(), allow_recent=allow_recent, wait=wait)


@task(
    name="rollback",
    help={"good": "a name that inv pin shows (default: the last one)", "wait": WAIT},
)
def pin_rollback(_: Context, good: str = "", wait: bool = False) -> None:
    """Return to the last known-good state."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.bump import rollback

    rollback.run(here, settings, good or None, console=main.console(), wait=wait)


@task(
    name="start",
    default=True,
    positional=["recipe"],
    help={
        "recipe": "a recipe, a model on the hub, or a folder; vLLM's flags go after --",
        "dry-run": "print environment and command line; start nothing",
        "detach": "return when ready; the server outlives the terminal",
        "force": "start without a key for others, or short of memory",
    },
)
def serve(
    _: Context, recipe: str, dry_run: bool = False, detach: bool = False, force: bool = False
) -> None:
    """Serve a recipe or a model; vLLM's flags go after --."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.server import start

    options = start.ServeOptions(
        recipe, tuple(after_dashes()), dry_run=dry_run, detach=detach, force=force
    )
    start.run(here, settings, options, console=main.console())


@task(name="status", help={"json": JSON})
def serve_status(_: Context, json: bool = False) -> None:
    """Show the server: ready, since when, memory."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.server import status

    status.status(here, settings, console=main.console(), as_json=json)


@task(
    name="logs",
    help={"lines": "how many of the last lines", "follow": "print new lines until the server ends"},
)
def serve_logs(_: Context, lines: str = "", follow: bool = False) -> None:
    """Print the server's log; --follow prints new lines."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.server import status

    status.logs(here, settings, console=main.console(), lines=lines, follow=follow)


@task(name="stop")
def serve_stop(_: Context) -> None:
    """Stop the server; wait for port and memory."""
    here = paths.here()
    from workspace.server import status

    status.stop(here, console=main.console())


@task(name="list", help={"json": JSON})
def serve_list(_: Context, json: bool = False) -> None:
    """List recipes: does it fit, is it on disk."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.machine.machine import Machine
    from workspace.server import fit

    fit.show_recipes(Machine(here, settings), console=main.console(), as_json=json)


@task(
    name="fetch",
    positional=["recipe"],
    help={"recipe": "a recipe, or a model on the hub such as Qwen/Qwen3-8B"},
)
def serve_fetch(_: Context, recipe: str) -> None:
    """Fetch weights and vocabularies before a load."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.server import models

    models.fetch(here, settings, recipe, console=main.console())
