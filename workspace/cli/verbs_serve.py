"""Verbs of `inv`: servers and their models; see verbs.py."""

from invoke.context import Context

from workspace.cli import main
from workspace.cli.main import JSON, after_dashes, task
from workspace.core import paths


@task(
    name="start",
    default=True,
    positional=["recipe"],
    help={
        "recipe": "a recipe, a model on the hub, or a folder; vLLM's flags go after --",
        "dry-run": "print environment and command line; start nothing",
        "detach": "return when ready; the server outlives the terminal",
        "force": "start although memory is short, or others reach it without a key",
    },
)
def serve(
    _: Context, recipe: str, dry_run: bool = False, detach: bool = False, force: bool = False
) -> None:
    """Serve a recipe or a model; vLLM's flags go after --."""
    from workspace.server import start

    options = start.ServeOptions(
        recipe, tuple(after_dashes()), dry_run=dry_run, detach=detach, force=force
    )
    start.run(*main.opened(), options, console=main.console())


@task(name="status", help={"json": JSON})
def serve_status(_: Context, json: bool = False) -> None:
    """Show the server: ready, since when, memory."""
    from workspace.server import verbs as verb

    verb.status(*main.opened(), console=main.console(), as_json=json)


@task(
    name="logs",
    help={"lines": "print the last N lines", "follow": "print new lines until the server ends"},
)
def serve_logs(_: Context, lines: str = "", follow: bool = False) -> None:
    """Print the server's log; --follow prints new lines."""
    from workspace.server import verbs as verb

    verb.logs(*main.opened(), console=main.console(), lines=lines, follow=follow)


@task(name="stop")
def serve_stop(_: Context) -> None:
    """Stop the server; wait until port and memory are free."""
    from workspace.server import verbs as verb

    verb.stop(paths.here(), console=main.console())


@task(name="list", help={"json": JSON})
def serve_list(_: Context, json: bool = False) -> None:
    """List the recipes: which fit, which are on disk."""
    from workspace.server import verbs as verb

    verb.show_recipes(main.machine(), console=main.console(), as_json=json)


@task(
    name="fetch",
    positional=["recipe"],
    help={"recipe": "a recipe, or a model on the hub such as Qwen/Qwen3-8B"},
)
def serve_fetch(_: Context, recipe: str) -> None:
    """Fetch weights and vocabularies before a start."""
    from workspace.server import models

    models.fetch(main.machine(), recipe, console=main.console())
