"""Verbs of serving: recipes, weights, the server."""

from invoke.context import Context
from invoke.tasks import task

from workspace import door
from workspace.core import layout
from workspace.verbs.words import JSON, after_dashes


@task(
    name="start",
    default=True,
    positional=["recipe"],
    help={
        "recipe": "a recipe, a model on the hub, or a folder; flags of vllm serve stand after --",
        "dry-run": "print environment and command line; start nothing",
        "detach": "return when it is ready; it outlives the terminal",
        "i-know": "open to others without a key, or short of memory: go on",
    },
)
def serve(_: Context, recipe: str, dry_run: bool = False, detach: bool = False, i_know: bool = False) -> None:
    """Serve a recipe or a model; vLLM's own flags after --."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.serve import start

    asked = start.Asked(recipe, tuple(after_dashes()), dry_run=dry_run, detach=detach, knows=i_know)
    start.run(here, settings, asked, console=door.console())


@task(name="status", help={"json": JSON})
def serve_status(_: Context, json: bool = False) -> None:
    """Show the server: ready? since when, how much memory."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.serve import present

    present.status(here, settings, console=door.console(), as_json=json)


@task(name="logs", help={"lines": "so many of the last lines", "follow": "go on until the server ends"})
def serve_logs(_: Context, lines: str = "", follow: bool = False) -> None:
    """Print the server's log; --follow goes on with it."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.serve import present

    present.logs(here, settings, console=door.console(), lines=lines, follow=follow)


@task(name="stop")
def serve_stop(_: Context) -> None:
    """Stop the server, wait for port and memory."""
    here = layout.here()
    from workspace.serve import present

    present.stop(here, console=door.console())


@task(name="list", help={"json": JSON})
def serve_list(_: Context, json: bool = False) -> None:
    """Show recipes: fits here? on disk, or to be fetched?"""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.serve import listing

    listing.show(here, settings, console=door.console(), as_json=json)


@task(name="fetch", positional=["recipe"], help={"recipe": "a recipe, or a model on the hub such as Qwen/Qwen3-8B"})
def serve_fetch(_: Context, recipe: str) -> None:
    """Get weights and vocabularies before any load."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.serve import fetch

    fetch.run(here, settings, recipe, console=door.console())
