"""Verbs of `inv` for servers and for nodes; see verbs.py."""

from dataclasses import asdict

from invoke.context import Context

from workspace.cli import main
from workspace.cli.main import JSON, WAIT, after_dashes, task
from workspace.core import paths

SERVER = {
    "name": "its name beside other servers of this clone",
    "port": "the port it listens at",
    "memory": "GiB for weights, cache and the rest together",
    "restart": "start it again this often if it dies",
}


@task(
    name="start",
    default=True,
    positional=["recipe"],
    help={
        "recipe": "a recipe, a model on the hub, or a folder; vLLM's flags go after --",
        "dry-run": "print environment and command line; start nothing",
        "detach": "return when ready; the server outlives the terminal",
        "force": "start although memory is short, or others reach it without a key",
        "nodes": "names of nodes.toml, with commas, that serve it together",
        **SERVER,
    },
)
def serve(
    _: Context,
    recipe: str,
    name: str = "",
    port: str | None = None,
    memory: str | None = None,
    restart: str | None = None,
    nodes: str = "",
    dry_run: bool = False,
    detach: bool = False,
    force: bool = False,
) -> None:
    """Serve a recipe or a model; vLLM's flags go after --."""
    from workspace.server import flags, multi_node

    options = flags.ServeOptions(
        recipe,
        tuple(after_dashes()),
        dry_run=dry_run,
        detach=detach,
        force=force,
        server=name,
        port=port,
        memory=memory,
        restart=restart,
        nodes=nodes,
    )
    multi_node.run(*main.opened(), options, console=main.console())


@task(
    name="unit",
    positional=["recipe"],
    help={
        "recipe": "as for inv serve",
        **SERVER,
        "restart": f"{SERVER['restart']} (default: 3)",
    },
)
def serve_unit(
    _: Context,
    recipe: str,
    name: str = "",
    port: str | None = None,
    memory: str | None = None,
    restart: str = "3",
) -> None:
    """Print a systemd user unit of a server that comes back."""
    from workspace.server import flags, verbs

    options = flags.ServeOptions(
        recipe,
        tuple(after_dashes()),
        server=name,
        port=port,
        memory=memory,
        restart=restart,
    )
    verbs.print_unit(*main.opened(), options, console=main.console())


@task(name="status", help={"json": JSON})
def serve_status(_: Context, json: bool = False) -> None:
    """Show the servers: ready, since when, memory, deaths."""
    from workspace.server import verbs as verb

    verb.status(*main.opened(), console=main.console(), as_json=json)


@task(
    name="logs",
    help={
        "name": "the server, where several run; --name may be left out",
        "lines": "print the last N lines",
        "follow": "print new lines until the server ends",
    },
)
def serve_logs(_: Context, name: str = "", lines: str = "", follow: bool = False) -> None:
    """Print a server's log; --follow prints new lines."""
    from workspace.server import verbs as verb

    verb.logs(*main.opened(), console=main.console(), name=name, lines=lines, follow=follow)


@task(
    name="stop",
    help={
        "name": "the server, where several run; --name may be left out",
        "all": "stop all servers of this clone",
    },
)
def serve_stop(_: Context, name: str = "", all: bool = False) -> None:
    """Stop a server; wait until port and memory are free."""
    from workspace.server import verbs as verb

    verb.stop(paths.here(), console=main.console(), name=name, is_all=all)


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


@task(name="list", default=True, help={"json": JSON})
def node_list(_: Context, json: bool = False) -> None:
    """Compare each node of nodes.toml with this one."""
    from workspace.server import node_sync

    node_sync.show(main.machine(), console=main.console(), as_json=json)


@task(name="facts", help={"interface": "interface of the fast link"})
def node_facts(_: Context, interface: str = "") -> None:
    """Print the facts of this node as JSON, for node.list."""
    from workspace.server import node_sync

    facts = node_sync.observe(main.machine(), interface)
    main.console().document({"schema": facts.SCHEMA, **asdict(facts)})


@task(
    name="sync",
    help={
        "name": "a node of nodes.toml",
        "bundle": "send all that its bootstrap would fetch, from this machine",
        "wait": WAIT,
    },
)
def node_sync(_: Context, name: str, bundle: bool = False, wait: bool = False) -> None:
    """Bring another node to the state of this clone."""
    from workspace.server import node_sync as verb

    verb.sync(main.machine(), name, console=main.console(), has_bundle=bundle, wait=wait)
