"""`inv serve RECIPE --nodes a,b`: one server over several nodes. Decides which node runs which
rank, checks between the nodes all that can be wrong before anything is loaded, and runs the rank
of another node for its head.

vLLM's own mode for several nodes does the rest (docs/serving/parallelism_scaling.md of the tree);
node_link.py ties the nodes together while they serve, nodes.py has their names and ssh.
"""

import contextlib
import errno
import math
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from workspace.core import hints, lock, records
from workspace.core.console import Console
from workspace.core.errors import ServeError, SettingsError, listed
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.machine.machine import Machine
from workspace.server import (
    command,
    fit,
    flags,
    lifecycle,
    models,
    node_link,
    node_sync,
    nodes,
    observation,
    start,
)
from workspace.server.flags import ServeOptions
from workspace.server.nodes import Node, Nodes, Remote

RDMA_DEVICES = Path("/sys/class/infiniband")
# vLLM's own port for its ranks (vllm/config/parallel.py), and how many after it are tried.
MASTER_PORT, PORTS = 29501, 50
# Seconds for a connection over the fast link, and for the checks of a node.
REACH_S, CHECK_S = 5.0, 120.0
# What has to be the same on all nodes: a rank of another version joins and computes other things.
_PACKAGES = ("vllm", "torch", "triton", "flashinfer-python", "transformers", "numpy")
# The environment of a server has libraries that ssh must not load instead of its own.
_PLAIN = ("env", "-u", "LD_PRELOAD", "-u", "LD_LIBRARY_PATH")


@dataclass(frozen=True)
class Rank:
    """The part of one node in a server of `count` nodes, which meet at `head`:`port`; `address` and
    `interface` are the node's own on the fast link.
    """

    number: int
    count: int
    head: str
    port: int
    address: str
    interface: str

    @property
    def flags(self) -> Mapping[str, int | str]:
        """Return vLLM's flags for this rank."""
        return {
            "nnodes": self.count,
            "node-rank": self.number,
            "master-addr": self.head,
            "master-port": self.port,
            **({"headless": True} if self.number else {}),
        }

    def environment(self, devices: Path = RDMA_DEVICES) -> Mapping[str, str]:
        """Return the variables with which Gloo, NCCL and vLLM take the fast link."""
        variables = {
            "VLLM_HOST_IP": self.address,
            "GLOO_SOCKET_IFNAME": self.interface,
            "NCCL_SOCKET_IFNAME": self.interface,
        }
        found = sorted(path.parts[-4] for path in devices.glob(f"*/device/net/{self.interface}"))
        return variables | ({"NCCL_IB_HCA": ",".join(found)} if found else {})

    @property
    def argument(self) -> str:
        """Return the rank as `inv serve.rank` takes it."""
        return ",".join(str(value) for value in asdict(self).values())

    @classmethod
    def parse(cls, argument: str) -> "Rank":
        """Return the rank of an argument. Raises SettingsError for a text that is none."""
        try:
            number, count, head, port, address, interface = argument.split(",")
            return cls(int(number), int(count), head, int(port), address, interface)
        except ValueError:
            raise SettingsError(
                f"--rank: {argument!r} is no rank; inv serve --nodes types this verb on the other"
                " nodes",
                hint=hints.text("inv.serve_list"),
            ) from None


@dataclass(frozen=True)
class Report:
    """Answer of a node to its check: what it would run and with what. `libraries` is the digest of
    its compiled files, `edits` are the files of vendor/vllm that no commit has, and `reach` is why
    it and the head do not reach each other, empty if they do.
    """

    tree: str
    libraries: str
    edits: str
    packages: Mapping[str, str]
    device: str
    fit: str
    has_weights: bool
    variables: Mapping[str, str]
    reach: str = ""


def run(layout: Layout, settings: Settings, options: ServeOptions, *, console: Console) -> None:
    """Serve on this node, or with `nodes` on several, of which this one is the head.

    Raises SettingsError for nodes that cannot serve together, ServeError for a node that is not fit
    for its rank, and as start.run does.
    """
    if not options.nodes:
        start.run(layout, settings, options, console=console)
        return
    members = choose(nodes.read_nodes(layout.root), options)
    divided = division(layout, settings, options, len(members))
    with _listening(members[0], options) as (meeting, port):
        head, count = members[0], len(members)
        ranks = [
            Rank(number, count, head.address, port, each.address, each.interface)
            for number, each in enumerate(members)
        ]
        own = replace(
            options,
            flags={**divided, **ranks[0].flags},
            environment=ranks[0].environment(),
        )
        session, judged = start.prepare(layout, settings, own, console=console)
        # Absolute, if it is a path.
        options = replace(options, name=session.options.name)
        others = [
            (member, _order(options, rank))
            for member, rank in zip(members[1:], ranks[1:], strict=True)
        ]
        if not options.dry_run:
            answers = [report(session, judged, ranks[0])]
            answers += [ask(settings, member, order, meeting) for member, order in others]
            compare(members, answers, options, console=console)
    plain = settings.child_environment("plain")
    under = [sys.executable, "-I", "-S", node_link.__file__, str(session.place)]
    for member, order in others:
        argv = [*_PLAIN, *Remote(member, plain).argv(order)]
        under += [member.name, str(len(argv)), *argv]
        if options.dry_run:
            console.data(f"# node {member.name}: {settings.masked(shlex.join(argv))}")
    start.serve(session, judged, under=(*under, members[0].name, "0"))


def choose(known: Nodes, options: ServeOptions) -> list[Node]:
    """Return the nodes of `--nodes`, this one first. Raises SettingsError."""
    names = options.nodes.split(",")
    found = [known.named(name) for name in names]
    here = known.here
    problem = (
        "a server over several takes two"
        if len(names) < 2
        else "a node is named twice"
        if len(set(names)) < len(names)
        else f"this machine, {here.name}, has to be among them"
        if here not in found
        else ""
    )
    if problem:
        usual = ",".join(node.name for node in (here, *known.others)[:2])
        hint = hints.text("server.serve_over", model=options.name, nodes=usual)
        raise SettingsError(f"--nodes {options.nodes}: {problem}", hint=hint)
    return [here, *(node for node in found if node != here)]


def division(
    layout: Layout, settings: Settings, options: ServeOptions, count: int
) -> Mapping[str, int | str]:
    """Return the flags that divide the model over `count` nodes, none where recipe or user have
    them: vLLM's usual division, one GPU a node, is tensor parallelism.

    Raises SettingsError for a division that these nodes cannot have.
    """
    recipe = start.find_recipe(Machine(layout, settings), options.name)
    args = (*recipe.args, *options.extra)
    if flags.last(args, "--distributed-executor-backend") == "ray":
        raise SettingsError(
            "--nodes starts vLLM's own ranks, and Ray has a cluster of its own",
            hint=hints.text("server.without_nodes", model=options.name),
        )
    sizes = fit.parallel_sizes(recipe, options.extra)
    if max(sizes.values()) == 1:
        return {"tensor-parallel-size": count}
    parts = math.prod(sizes.values())
    if parts % count:
        factors = " × ".join(f"{name} parallel {size}" for name, size in sizes.items() if size > 1)
        raise SettingsError(
            f"{factors} cannot be divided over {count} nodes",
            hint=hints.text("server.divide", model=options.name, nodes=options.nodes, count=count),
        )
    return {}


def report(session: start.Session, judged: fit.Fit, rank: Rank) -> Report:
    """Return what this node would run, without a look at the others."""
    machine, settings = session.machine, session.machine.settings
    packages, facts = machine.packages(), node_sync.observe(machine)
    recipe = session.recipe
    own = settings.child_environment("run")
    return Report(
        command.tree_oid(machine.layout),
        facts.libraries,
        ", ".join(facts.unsaved),
        {name: packages[name] for name in _PACKAGES if name in packages},
        session.device,
        judged.sentence,
        recipe.origin == "built-in" or models.found_weights(machine, recipe) is not None,
        {name: own.get(name, text) for name, text in rank.environment().items()},
    )


def compare(
    members: Sequence[Node], answers: Sequence[Report], options: ServeOptions, *, console: Console
) -> None:
    """Print what each node runs. Raises ServeError for nodes that differ, do not reach each other,
    or lack the weights.
    """
    head = answers[0]
    for number, (node, answer) in enumerate(zip(members, answers, strict=True)):
        variables = " ".join(f"{name}={text}" for name, text in answer.variables.items())
        console.info(f"node {node.name}: rank {number}, {variables}")
        if number:
            console.info(f"node {node.name}: {answer.fit}")
    for node, answer in zip(members[1:], answers[1:], strict=True):
        if answer.reach:
            raise ServeError(
                f"node {node.name}: {answer.reach}", hint=hints.text("server.own_addresses")
            )
        if different := _differences(head, answer):
            raise ServeError(
                f"node {node.name} differs from {members[0].name}: {'; '.join(different)}",
                hint=hints.text("server.node_sync", name=node.name),
            )
    pairs = zip(members, answers, strict=True)
    if lacking := [node.name for node, answer in pairs if not answer.has_weights]:
        raise ServeError(
            f"the weights of {options.name} are missing on {listed(lacking)}",
            hint=hints.text("server.fetch_on_each", model=options.name),
        )


def _differences(head: Report, other: Report) -> list[str]:
    """Return what differs, as `name: here, there`. Edits always do: only their names are known."""
    pairs = {
        "device": (head.device, other.device),
        "vendor/vllm": (head.tree[:12], other.tree[:12]),
        "compiled files": (head.libraries[:12], other.libraries[:12]),
    }
    for name in sorted({*head.packages, *other.packages}):
        pairs[name] = (head.packages.get(name, "none"), other.packages.get(name, "none"))
    found = [f"{name}: {a}, {b}" for name, (a, b) in pairs.items() if a != b]
    if head.edits or other.edits:
        found.append(f"edits: {head.edits or 'none'}, {other.edits or 'none'}")
    return found


def _order(options: ServeOptions, rank: Rank) -> list[str]:
    """Return the verb with which another node runs its rank."""
    extra = command.replaced(options.extra, "--host", command.LOCAL)
    own = replace(options, nodes="", restart=None).own
    return [
        "./scripts/inv",
        "serve.rank",
        options.name,
        f"--rank={rank.argument}",
        *(["--force"] if options.force else []),
        *own,
        "--",
        *extra,
    ]


@contextlib.contextmanager
def _listening(head: Node, options: ServeOptions) -> Iterator[tuple[socket.socket, int]]:
    """Listen where the ranks will meet: at the port of `--master-port`, else at the first free one.

    Raises ServeError if there is none.
    """
    given = flags.last(options.extra, "--master-port") or ""
    ports = [int(given)] if given.isdigit() else range(MASTER_PORT, MASTER_PORT + PORTS)
    for port in ports:
        try:
            listener = socket.create_server((head.address, port))
            break
        except OSError as exc:
            fault = exc
    else:
        is_taken = fault.errno == errno.EADDRINUSE
        raise ServeError(
            f"the ranks cannot meet at {head.address} port {ports[0]}: {fault.strerror}",
            hint=hints.text("server.who_listens", port=ports[0])
            if is_taken
            else hints.text("server.own_addresses"),
        )
    with listener:
        yield listener, port


def ask(settings: Settings, node: Node, order: Sequence[str], meeting: socket.socket) -> Report:
    """Have a node check its rank, while this one answers on the fast link. Raises ServeError."""
    order = [*order[:3], "--check", *order[3:]]
    with answering(meeting):
        done = Remote(node, settings.child_environment("plain")).run(order, limit_s=CHECK_S)
    if done.returncode == 0:
        with contextlib.suppress(records.DecodeError):
            return records.decode(done.stdout, Report)
    lines = settings.masked(done.stderr or done.stdout).splitlines()
    problem = next((line for line in lines if line.startswith("error: ")), "it gave no report")
    script = f"cd {Remote(node, {}).quoted()} && ./scripts/inv"
    raise ServeError(
        f"node {node.name} cannot run its rank: {problem.removeprefix('error: ')}",
        hint=hints.text("server.node_status", address=node.ssh, script=script),
        details=tuple(lines[-15:]),
    )


@contextlib.contextmanager
def answering(meeting: socket.socket) -> Iterator[None]:
    """Connect back, during the block, to a node that comes over the fast link, and send it the
    outcome.
    """
    is_over = threading.Event()
    meeting.settimeout(0.1)
    thread = threading.Thread(target=_answer, args=(meeting, is_over))
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _answer(meeting: socket.socket, is_over: threading.Event) -> None:
    while not is_over.is_set():
        with contextlib.suppress(OSError, ValueError):
            connection, peer = meeting.accept()
            _connect_back(connection, peer[0])


def _connect_back(connection: socket.socket, address: str) -> None:
    with connection:
        connection.settimeout(REACH_S)
        port, outcome = int(connection.recv(8)), "ok"
        try:
            socket.create_connection((address, port), timeout=REACH_S).close()
        except OSError as exc:
            outcome = exc.strerror or str(exc)
        connection.sendall(outcome.encode())


def reach(rank: Rank) -> str:
    """Return why this node and its head do not reach each other, empty if they do."""
    there = f"{rank.head} port {rank.port}, the head's address on the fast link"
    try:
        listener = socket.create_server((rank.address, 0))
    except OSError as exc:
        return f"it has no address {rank.address}: {exc.strerror}"
    with listener:
        try:
            connection = socket.create_connection(
                (rank.head, rank.port), timeout=REACH_S, source_address=(rank.address, 0)
            )
        except OSError as exc:
            return f"it cannot reach {there}: {exc.strerror or exc}"
        with connection:
            connection.settimeout(2 * REACH_S)
            connection.sendall(str(listener.getsockname()[1]).encode())
            try:
                outcome = connection.recv(256).decode(errors="replace")
            except OSError as exc:
                outcome = exc.strerror or str(exc)
    return "" if outcome == "ok" else f"the head cannot reach {rank.address}: {outcome}"


def serve_rank(
    layout: Layout,
    settings: Settings,
    options: ServeOptions,
    rank: Rank,
    *,
    console: Console,
    is_check: bool = False,
) -> None:
    """Run the rank of this node until its head ends it or is gone; with `is_check`, only report.

    The rank is a server of this clone, with a log, a lock and a supervisor, but without a port of
    its own. Raises as start.run does.
    """
    is_ready = threading.Event()
    lease = None if is_check else node_link.Lease(is_ready.set)
    own = replace(
        options,
        # vLLM opens no port here; the checks of a server want one.
        port=str(lifecycle.free_port()),
        nodes=rank.head,
        flags={**division(layout, settings, options, rank.count), **rank.flags},
        environment=rank.environment(),
    )
    session, judged = start.prepare(layout, settings, own, console=console)
    if lease is None:
        answer = replace(report(session, judged, rank), reach=reach(rank))
        console.document(asdict(answer))
        return
    facts = start.facts(session, judged)
    facts |= {"typed": "", "rank": f"rank {rank.number} of {rank.count}, head {rank.head}"}
    argv, environment, _ = start.invocation(session)
    drain_s = flags.drain_s(session.command.args)
    address = session.command.address
    launch = lifecycle.Launch(options.name, argv, environment, address, facts, drain_s)
    with contextlib.ExitStack() as held:
        # As for a server: the build must not change during the load.
        held.enter_context(lock.hold(layout.lock, verb="inv serve.rank", is_shared=True))
        server = lifecycle.start(session.place, launch)
        try:
            lease.report_start()
            _follow(server, is_ready, held, settings, console)
        finally:
            # Without a word: if the head is gone, the output has no reader.
            lifecycle.stop(server)


def _follow(
    server: observation.Server,
    is_ready: threading.Event,
    held: contextlib.ExitStack,
    settings: Settings,
    console: Console,
) -> None:
    """Print the log for the head until the server ends; once the head is ready, mark the server as
    ready and let go of what is held. Raises ServeError if it was not stopped on request.
    """
    for line in observation.follow(server.log):
        if is_ready.is_set() and not server.is_ready:
            server = lifecycle.mark_ready(server)
            held.close()
        if line is not None:
            console.data(settings.masked(line))
        elif observation.is_alive(server):
            time.sleep(lifecycle.FOLLOW_S)
        else:
            break
    ended = observation.how_ended(server)
    if ended is None or not ended.was_requested:
        raise lifecycle.failure(server)
    console.info(f"{server.called} was stopped on its node")
