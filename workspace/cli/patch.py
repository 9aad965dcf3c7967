"""Verbs of the patch series."""

from typing import Literal

from invoke.context import Context
from invoke.tasks import task

from workspace.cli import main
from workspace.cli.main import JSON, WAIT
from workspace.core import paths
from workspace.core.errors import SettingsError

PROJECT = "vllm or triton"


@task(default=True, help={"project": PROJECT, "json": JSON})
def status(_: Context, project: str = "vllm", json: bool = False) -> None:
    """List the patches: state, subject, Upstream-Status."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.repo import overview

    overview.show(here, settings, project, console=main.console(), as_json=json)


@task(help={"project": PROJECT, "wait": WAIT})
def apply(_: Context, project: str = "vllm", wait: bool = False) -> None:
    """Apply the series to the pin, all or nothing."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.repo import patching

    patching.apply(here, settings, project, console=main.console(), wait=wait)


@task(help={"project": PROJECT, "wait": WAIT})
def unapply(_: Context, project: str = "vllm", wait: bool = False) -> None:
    """Return to the pin; the commits stay under refs."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.repo import patching

    patching.unapply(here, settings, project, console=main.console(), wait=wait)


@task(
    # With every verb, -p is --project.
    auto_shortflags=False,
    help={
        "check": "write nothing; print the difference and exit with 5",
        "branch": "put one patch, signed off, on upstream's main",
        "patch": "file name of the patch for --branch",
        "project": PROJECT,
        "wait": WAIT,
    },
)
def export(
    _: Context,
    check: bool = False,
    branch: str = "",
    patch: str = "",
    project: str = "vllm",
    wait: bool = False,
) -> None:
    """Write the commits on the pin as patches and series."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.repo import patching

    if bool(patch) != bool(branch) or (branch and check):
        raise SettingsError(
            "--branch needs --patch, --patch needs --branch, and neither works with --check",
            hint="./scripts/inv patch.export --branch NAME --patch FILE",
        )
    if branch:
        patching.make_branch(
            here, settings, project, branch, patch, console=main.console(), wait=wait
        )
    else:
        patching.export(here, settings, project, console=main.console(), wait=wait, check=check)


@task(
    name="import",
    positional=["origin"],
    help={
        "origin": "a mail file, a URL, or the number of a pull request",
        "project": PROJECT,
        "wait": WAIT,
    },
)
def import_(_: Context, origin: str, project: str = "vllm", wait: bool = False) -> None:
    """Import a patch: a file, a URL, a pull request."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.repo import patching

    patching.import_(here, settings, project, origin, console=main.console(), wait=wait)


@task(
    name="continue",
    help={
        "skip": "leave out the conflicting patch",
        "abort": "give up and return to the start",
        "project": PROJECT,
        "wait": WAIT,
    },
)
def continue_(
    _: Context, skip: bool = False, abort: bool = False, project: str = "vllm", wait: bool = False
) -> None:
    """Resume after a conflict, also in a bump."""
    here = paths.here()
    settings = main.load_settings(here)
    from workspace.bump import bump
    from workspace.repo import patching

    if skip and abort:
        raise SettingsError(
            "--skip and --abort exclude each other", hint="./scripts/inv --help patch.continue"
        )
    how: Literal["continue", "skip", "abort"] = "skip" if skip else "abort" if abort else "continue"
    if project == "vllm" and bump.is_under_way(here):
        bump.go_on(here, settings, how, console=main.console(), wait=wait)
    else:
        patching.resume(here, settings, project, how, console=main.console(), wait=wait)
