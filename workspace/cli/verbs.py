"""Verbs of a clone and its build: make it run, compile, mend Triton, look, report."""

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
        "target": "compile this CMake target too; may be given again",
        "clean": "throw the build directories of this clone away first",
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
        "from-source": "build vendor/triton, whatever the diagnosis says",
        "ref": "with --from-source, pin this branch, tag or commit first",
        "jobs": "with --from-source, compilers at once, or auto",
        "check": "only look; exit with 6 where something is wrong",
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
    """Find the Triton fault, mend it, prove it."""
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

    verb.show(here, settings, console=main.console(), as_json=json)


@task(help={"json": JSON, "offline": "leave out what asks the network"})
def doctor(_: Context, json: bool = False, offline: bool = False) -> None:
    """Check machine, toolchain, GPU, network; print cures."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.machine import doctor as verb

    verb.show(here, settings, console=main.console(), as_json=json, offline=offline)


@task(
    help={"remove": "take it out; a hook of yours comes back", "run": "judge now, as the hook does"}
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

    # A broken .env or pins.toml is what a report may be about: it does not stop here.
    verb.write(here, verb.settings_of(here), console=main.console())


@task(default=True, name="list", help={"json": JSON})
def bench_list(_: Context, json: bool = False) -> None:
    """Show the records of benchmarks, newest first."""
    here = paths.here()
    from workspace.bench import results

    results.show_records(here, console=main.console(), as_json=json)


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
def bench_compare(
    _: Context,
    first: str,
    second: str,
    factor: str = "5",
    across: list[str] | None = None,
    json: bool = False,
) -> None:
    """Is the second record slower? A verdict on each metric."""
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
        "first": "a record to compare with; without it the newest two",
        "second": "the record that may be slower",
    },
)
def bench_report(_: Context, first: str = "", second: str = "") -> None:
    """Draw all records: one HTML page, and a PNG a plot."""
    here = paths.here()
    from workspace.bench import report as verb

    verb.write(here, first, second, console=main.console())


@task(name="check", default=True, help={"json": JSON})
def env_check(_: Context, json: bool = False) -> None:
    """Show each setting: value, source, verdict."""
    here = paths.here()
    # What a door warns of stands in the rows.
    settings = main.load_settings(here, is_quiet=True)
    from workspace.machine import check

    check.show(here, settings, console=main.console(), as_json=json)


@task(name="init", help={"replace": "change lines that differ too; the old ones stay as remarks"})
def env_init(_: Context, replace: bool = False) -> None:
    """Write or complete .env from what this machine has."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.machine import dotenv

    dotenv.complete(here, settings, console=main.console(), replace=replace)


@task(name="export")
def env_export(_: Context) -> None:
    """Print lines for eval in sh; inv and nox on PATH."""
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
    """Give the page cache back before a large load."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.machine import hardware

    hardware.drop_caches(settings, console=main.console())


@task(name="show", default=True, help={"json": JSON, "offline": "leave out what asks the network"})
def pin_show(_: Context, json: bool = False, offline: bool = False) -> None:
    """Show the pin, what is newer, what to return to."""
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
    """Say what a move of the pin would break; touch nothing."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.bump import forecast

    forecast.run(here, settings, ref, console=main.console(), as_json=json)


@task(
    name="bump",
    positional=["ref"],
    help={
        "ref": "a tag of vLLM, or the word triton",
        "allow-recent": "take a release that is younger than PIN_MIN_AGE_DAYS",
        "wait": WAIT,
    },
)
def pin_bump(_: Context, ref: str, allow_recent: bool = False, wait: bool = False) -> None:
    """Move the pin beside the working tree; promote if green."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.bump import bump

    bump.run(here, settings, ref, console=main.console(), allow_recent=allow_recent, wait=wait)


@task(
    name="rollback",
    help={"good": "a name that inv pin shows; without it the last one", "wait": WAIT},
)
def pin_rollback(_: Context, good: str = "", wait: bool = False) -> None:
    """Return to the last good pin, environment included."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.bump import rollback

    rollback.run(here, settings, good or None, console=main.console(), wait=wait)


@task(
    name="start",
    default=True,
    positional=["recipe"],
    help={
        "recipe": "a recipe, a model on the hub, or a folder; flags of vllm serve stand after --",
        "dry-run": "print environment and command line; start nothing",
        "detach": "return when it is ready; it outlives the terminal",
        "force": "open to others without a key, or short of memory: go on",
    },
)
def serve(
    _: Context, recipe: str, dry_run: bool = False, detach: bool = False, force: bool = False
) -> None:
    """Serve a recipe or a model; vLLM's own flags after --."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.server import start

    options = start.ServeOptions(
        recipe, tuple(after_dashes()), dry_run=dry_run, detach=detach, force=force
    )
    start.run(here, settings, options, console=main.console())


@task(name="status", help={"json": JSON})
def serve_status(_: Context, json: bool = False) -> None:
    """Show the server: ready? since when, how much memory."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.server import status

    status.status(here, settings, console=main.console(), as_json=json)


@task(
    name="logs",
    help={"lines": "so many of the last lines", "follow": "go on until the server ends"},
)
def serve_logs(_: Context, lines: str = "", follow: bool = False) -> None:
    """Print the server's log; --follow goes on with it."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.server import status

    status.logs(here, settings, console=main.console(), lines=lines, follow=follow)


@task(name="stop")
def serve_stop(_: Context) -> None:
    """Stop the server, wait for port and memory."""
    here = paths.here()
    from workspace.server import status

    status.stop(here, console=main.console())


@task(name="list", help={"json": JSON})
def serve_list(_: Context, json: bool = False) -> None:
    """Show recipes: fits here? on disk, or to be fetched?"""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.server import fit

    fit.show_recipes(here, settings, console=main.console(), as_json=json)


@task(
    name="fetch",
    positional=["recipe"],
    help={"recipe": "a recipe, or a model on the hub such as Qwen/Qwen3-8B"},
)
def serve_fetch(_: Context, recipe: str) -> None:
    """Get weights and vocabularies before any load."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.server import models

    models.fetch(here, settings, recipe, console=main.console())
