"""Verbs of `inv` for local patches; see verbs.py."""

from typing import Literal

from invoke.context import Context

from workspace.cli import main
from workspace.cli.main import JSON, PROJECT, WAIT, task
from workspace.core import hints
from workspace.core.errors import SettingsError


@task(name="status", default=True, help={"project": PROJECT, "json": JSON})
def patch_status(_: Context, project: str = "vllm", json: bool = False) -> None:
    """List the patches: state, subject, Upstream-Status."""
    from workspace.repo import overview

    overview.show(main.opened()[0], project, console=main.console(), as_json=json)


@task(name="apply", help={"project": PROJECT, "wait": WAIT})
def patch_apply(_: Context, project: str = "vllm", wait: bool = False) -> None:
    """Apply the series to the pin, all or nothing."""
    from workspace.repo import patching

    patching.apply(*main.opened(), project, console=main.console(), wait=wait)


@task(name="unapply", help={"project": PROJECT, "wait": WAIT})
def patch_unapply(_: Context, project: str = "vllm", wait: bool = False) -> None:
    """Return to the pin; the commits stay under refs."""
    from workspace.repo import patching

    patching.unapply(*main.opened(), project, console=main.console(), wait=wait)


@task(
    name="export",
    help={
        "check": "write nothing; print the difference and exit with 5",
        "branch": "make this branch: one signed-off patch on upstream's main",
        "patch": "file name of the patch for --branch",
        "project": PROJECT,
        "wait": WAIT,
    },
)
def patch_export(
    _: Context,
    check: bool = False,
    branch: str = "",
    patch: str = "",
    project: str = "vllm",
    wait: bool = False,
) -> None:
    """Write the commits on the pin as patches and series."""
    here, settings = main.opened()
    from workspace.repo import patching

    if bool(patch) != bool(branch) or (branch and check):
        raise SettingsError(
            "--branch needs --patch, --patch needs --branch, and neither works with --check",
            hint=hints.text("cli.export_branch_patch"),
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
        "squash": "take the net change as one patch, with all authors",
        "subject": "subject of the patch, of a diff or with --squash",
        "without-tests": "leave out all changes below tests/",
        "merge": "stop at a conflict in the checkout, for patch.continue",
        "project": PROJECT,
        "wait": WAIT,
    },
)
def patch_import(
    _: Context,
    origin: str,
    squash: bool = False,
    subject: str = "",
    without_tests: bool = False,
    merge: bool = False,
    project: str = "vllm",
    wait: bool = False,
) -> None:
    """Import a patch: a file, a URL, a pull request."""
    from workspace.repo import patching
    from workspace.repo.patches import ImportOptions

    options = ImportOptions(origin, merge, squash, " ".join(subject.split()), without_tests)
    patching.import_(*main.opened(), project, options, console=main.console(), wait=wait)


@task(
    name="continue",
    help={
        "skip": "leave out the conflicting patch",
        "abort": "give up and return to the start",
        "project": PROJECT,
        "wait": WAIT,
    },
)
def patch_continue(
    _: Context, skip: bool = False, abort: bool = False, project: str = "vllm", wait: bool = False
) -> None:
    """Resume after a conflict, also in a bump."""
    here, settings = main.opened()
    from workspace.bump import bump
    from workspace.repo import patching

    if skip and abort:
        raise SettingsError(
            "--skip and --abort exclude each other", hint=hints.text("cli.help_continue")
        )
    how: Literal["continue", "skip", "abort"] = "skip" if skip else "abort" if abort else "continue"
    if project == "vllm" and bump.is_under_way(here):
        bump.go_on(here, settings, how, console=main.console(), wait=wait)
    else:
        patching.resume(here, settings, project, how, console=main.console(), wait=wait)
