"""Verbs of the environment: settings, and whatever runs in it."""

from invoke.context import Context
from invoke.tasks import task

from workspace import door
from workspace.core import layout
from workspace.verbs.words import JSON, after_dashes


@task(name="check", default=True, help={"json": JSON})
def env_check(_: Context, json: bool = False) -> None:
    """Show each setting: value, source, verdict."""
    here = layout.here()
    # What a door warns of stands in the rows.
    settings = door.load_settings(here, is_quiet=True)
    from workspace.environment import check

    check.show(here, settings, console=door.console(), as_json=json)


@task(name="init", help={"replace": "change lines that differ too; the old ones stay as remarks"})
def env_init(_: Context, replace: bool = False) -> None:
    """Write or complete .env from what this machine has."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.environment import proposal

    proposal.run(here, settings, console=door.console(), replace=replace)


@task(name="export")
def env_export(_: Context) -> None:
    """Print lines for eval in sh; inv and nox on PATH."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.engine import shell as verb

    verb.export(here, settings, console=door.console())


@task
def run(_: Context) -> None:
    """Run a command in the built environment: -- CMD."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.engine import shell as verb

    verb.run(here, settings, after_dashes(), console=door.console())


@task
def shell(_: Context) -> None:
    """Open a shell in the built environment."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.engine import shell as verb

    verb.shell(here, settings, console=door.console())


@task
def drop_caches(_: Context) -> None:
    """Give the page cache back before a large load."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.environment import page_cache

    page_cache.drop(settings, console=door.console())
