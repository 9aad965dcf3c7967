"""Verbs of a clone and its build: make it run, compile, mend Triton, look, report."""

from invoke.context import Context
from invoke.tasks import task

from workspace import door
from workspace.core import layout
from workspace.verbs.words import JSON, WAIT


@task(
    help={
        "device": "what vLLM is built for: auto, cuda or cpu",
        "source": "where vendor/vllm comes from: auto, git or release",
        "kernels": "compiled libraries: auto, donor, native, or a wheel file",
        "jobs": "compilers at once, with --kernels native",
        "wait": WAIT,
    }
)
def bootstrap(
    _: Context, device: str | None = None, source: str | None = None, kernels: str | None = None, jobs: str | None = None, wait: bool = False
) -> None:
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
        "wait": WAIT,
    },
)
def fix_triton(_: Context, from_source: bool = False, ref: str | None = None, jobs: str | None = None, check: bool = False, wait: bool = False) -> None:
    """Find the Triton fault, mend it, prove it."""
    here = layout.here()
    settings = door.load_settings(here, flags={"TRITON_REF": ref})
    from workspace.build.triton import fix as verb
    from workspace.pin import triton as pin

    asked = verb.Asked(check=check, from_source=from_source, ref=ref, jobs=jobs)
    provide = lambda: pin.move(here, settings, console=door.console(), wait=wait)  # noqa: E731
    verb.run(here, settings, asked, console=door.console(), provide=provide, wait=wait)


@task(help={"wait": WAIT})
def wheel(_: Context, wait: bool = False) -> None:
    """Pack the verified build for another clone or Spark."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.build.native import wheel as verb

    verb.run(here, settings, console=door.console(), wait=wait)


@task(default=True, help={"json": JSON})
def status(_: Context, json: bool = False) -> None:
    """Show what is built, what is stale, what to do next."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.build import status as verb

    verb.show(here, settings, console=door.console(), as_json=json)


@task(help={"json": JSON, "offline": "leave out what asks the network"})
def doctor(_: Context, json: bool = False, offline: bool = False) -> None:
    """Check machine, toolchain, GPU, network; print cures."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.environment import doctor as verb

    verb.show(here, settings, console=door.console(), as_json=json, offline=offline)


@task(help={"remove": "take it out; a hook of yours comes back", "run": "judge now, as the hook does"})
def hook(_: Context, remove: bool = False, run: bool = False) -> None:
    """Install the pre-push gate; --remove takes it out."""
    here = layout.here()
    from workspace.pin import hook as verb

    if run:
        verb.judge(here, door.load_settings(here), console=door.console())
    else:
        (verb.remove if remove else verb.install)(here, console=door.console())


@task
def report(_: Context) -> None:
    """Collect a redacted bundle for a bug report."""
    here = layout.here()
    from workspace.build import report as verb

    # A broken .env or pins.toml is what a report may be about: it does not stop here.
    verb.write(here, verb.settings_of(here), console=door.console())
