"""Verbs of `inv`: one server over several nodes; see verbs.py."""

from invoke.context import Context

from workspace.cli import main
from workspace.cli.main import after_dashes, task


@task(
    name="rank",
    positional=["recipe"],
    help={
        "recipe": "as for inv serve",
        "rank": "number, count, meeting point and fast link",
        "name": "its name beside other servers of this clone",
        "memory": "GiB for weights, cache and the rest together",
        "force": "start although memory is short",
        "check": "load nothing; print whether this node is fit for it, as JSON",
    },
)
def serve_rank(
    _: Context,
    recipe: str,
    rank: str = "",
    name: str = "",
    memory: str | None = None,
    force: bool = False,
    check: bool = False,
) -> None:
    """Run this node's part of a server; serve --nodes types it."""
    from workspace.server import multi_node
    from workspace.server.flags import ServeOptions

    part = multi_node.Rank.parse(rank)
    options = ServeOptions(recipe, tuple(after_dashes()), force=force, server=name, memory=memory)
    multi_node.serve_rank(*main.opened(), options, part, console=main.console(), is_check=check)
