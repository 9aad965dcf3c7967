"""The facts of a node, their comparison between two nodes, and the sync that makes them equal.

Each node reports its own facts, by the same verb of its own clone. The sync sends commits, shared
settings and kernels, and lets the other node's own bootstrap do the rest. What a user edited there
is never overwritten.
"""

import datetime
import hashlib
import platform
import re
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from workspace.core import files, hints, known_settings, records
from workspace.core import settings as core_settings
from workspace.core.console import Console, Row, RunLog, State
from workspace.core.errors import CheckoutError, NodeError, SmokeError, WorkspaceError, listed
from workspace.core.paths import Layout
from workspace.install import bundle, plan, precompiled, stages, wheel
from workspace.machine import doctor_host, hardware, link
from workspace.machine.link import Link
from workspace.machine.machine import Machine
from workspace.repo import checkout, patches
from workspace.repo.git import Git
from workspace.server.nodes import (
    Node,
    Remote,
    failed,
    look_at_disk,
    look_there,
    message,
    read_nodes,
)

# A first command in a fresh clone makes the environment of the tools.
FIRST_S = 600.0
# Clocks that follow a time server differ by milliseconds; the end of the other node's program and
# of ssh, which counts here, takes up to a second on a busy machine.
CLOCK_S = 2.0
SYNC = ".workspace/sync"
_NO_COMMIT = "0" * 40
_STATUS = ("status", "--porcelain", "-z", "--no-renames")
# Values that are right on one machine only, besides paths and mirrors in its file system.
_OF_ONE_MACHINE = re.compile(
    r"(MAX_JOBS|NVCC_THREADS|VLLM_CPU_KVCACHE_SPACE|VLLM_HOST_IP|CUDA_VISIBLE_DEVICES"
    r"|(NCCL|GLOO|UCX|TP)_\w*(IFNAME|HCA|NET_DEVICES)|(?i:https?|all|no|ftp)_(?i:proxy)|HOST\w*"
    r"|\w*_(PATH|DIR|HOME|FILE|FOLDER|CACHE))$"
)


@dataclass(frozen=True)
class Facts(records.Record, schema=1):
    """What a node reports of itself; empty text for what it does not have. `time` is Unix time.

    `edited` are files of the workspace, `unsaved` of vendor/vllm, that no commit or patch has.
    """

    workspace: str
    edited: tuple[str, ...]
    unsaved: tuple[str, ...]
    has_commits: bool
    layers: str
    pin: str
    tree: str
    libraries: str
    kernels: str
    python: str
    torch: str
    device: str
    driver: str
    cuda: str
    kernel: str
    machine: str
    free_memory_gib: float
    free_disk_gib: float
    settings: Mapping[str, str]
    link: Link | None
    time: float


# What two nodes of one model have in common: what a sync makes equal, and what it does not.
SYNCED = ("workspace", "pin", "tree", "layers", "libraries", "kernels", "python", "torch", "device")
RELEASES = ("driver", "cuda", "kernel")
_DIGESTS = ("workspace", "tree", "libraries")


def observe(machine: Machine, interface: str = "") -> Facts:
    """Return the facts of this node, and those of its end of the link where it is named."""
    layout, settings = machine.layout, machine.settings
    observed = plan.observe_on(machine)
    outer, stack, built = checkout.superproject(layout), observed.stack, observed.kernels.recorded
    lines = sorted(f"{each.sha256} {each.path}" for each in built.libraries) if built else []
    stale = [f"{each.name} {each.state}" for each in observed.layers if each.state is not State.OK]
    host = machine.host()
    environment = settings.child_environment("plain")
    return Facts(
        workspace=(outer.head() or "") if outer else "",
        edited=_edited(outer) if outer else (),
        unsaved=stack.dirty if stack else (),
        has_commits=stack is not None and stack.state is patches.State.UNEXPORTED,
        layers=", ".join(stale) or "ok",
        pin=f"{observed.pin.tag} {observed.pin.commit[:12]}",
        tree=(stack.tree or "") if stack else "",
        libraries=hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else "",
        kernels=precompiled.text_of(built.kernels) if built else "",
        python=observed.python.version if observed.python else "",
        torch=observed.torch.version if observed.torch else "",
        device=observed.device,
        driver=next((gpu.driver or "" for gpu in machine.gpus), ""),
        cuda=(machine.driver.cuda() or "") if machine.gpus else "",
        kernel=platform.release(),
        machine=platform.machine(),
        free_memory_gib=round(host.available_gib, 1),
        free_disk_gib=round(hardware.free_gib(layout.root), 1),
        settings=shared(core_settings.written(layout)),
        link=link.observe(interface, environment) if interface else None,
        time=time.time(),
    )


def _edited(outer: Git) -> tuple[str, ...]:
    """Return the files of the workspace that no commit has; vendor/vllm has a state of its own."""
    return _paths(outer.look(*_STATUS, "--untracked-files=all").out)


def _paths(status: str) -> tuple[str, ...]:
    """Return the paths of `git status --porcelain -z` without the gitlinks of the checkouts."""
    found = (entry[3:] for entry in status.split("\0") if entry)
    # In a clone whose first sync was interrupted, nothing says yet that git ignores .workspace.
    return tuple(
        path
        for path in found
        if path.rstrip("/") != "vendor/vllm" and not path.startswith(".workspace/")
    )


def shared(written: Mapping[str, str]) -> dict[str, str]:
    """Return the settings of a .env that are right on every node, and no secrets."""
    return {
        name: text
        for name, text in written.items()
        if not known_settings.is_secret(name)
        and not known_settings.has_login(text)
        and not _OF_ONE_MACHINE.match(name)
        and not known_settings.is_relative(text)
        and not text.startswith(("/", "file:"))
    }


def show(machine: Machine, *, console: Console, as_json: bool = False) -> None:
    """Print one row for each fact of each node beside this one, or one JSON document.

    Raises NodeError where a row is FAIL.
    """
    nodes = read_nodes(machine.layout.root)
    here = observe(machine, nodes.here.interface)
    environment = machine.settings.child_environment("plain")
    shown: list[Row] = list(_link_rows(here, nodes.here))
    found: dict[str, object] = {nodes.here.name: asdict(here)}
    for node in nodes.others:
        began = time.monotonic()
        try:
            there = ask(Remote(node, environment))
        except WorkspaceError as exc:
            text = exc.message.removeprefix(f"{node.name}: ")
            shown.append(Row(State.FAIL, node.name, text, hint=exc.hint))
            found[node.name] = None
            continue
        text = f"{node.ssh} answered in {time.monotonic() - began:.1f} s"
        shown.append(Row(State.OK, f"{node.name} reachable", text))
        shown += compare(here, there, node, time.time() - there.time)
        found[node.name] = asdict(there)
    console.show(shown, as_json=as_json, nodes=found)
    if faults := [row for row in shown if row.state is State.FAIL]:
        names = listed([row.name for row in faults])
        raise NodeError(f"checks of the nodes fail: {names}", hint=faults[0].hint)


def ask(remote: Remote, *, limit_s: float = 60.0) -> Facts:
    """Return the facts that another node reports. Raises NodeError where it reports none."""
    node = remote.node
    argv = ["./scripts/inv", "node.facts", "--interface", node.interface]
    done = remote.run(argv, limit_s=limit_s)
    sync = hints.text("server.node_sync", name=node.name)
    lines = message(done)
    if done.returncode == 127 or "can't cd" in done.stderr:
        raise NodeError(f"{node.name} has no clone in {node.folder}", hint=sync)
    if "node.facts" in done.stderr and done.returncode == 2:
        raise NodeError(f"{node.name} has an older workspace", hint=sync)
    if done.returncode == 124:
        raise NodeError(f"{node.name} gave no answer in {limit_s:g} s")
    if done.returncode:
        errors = [line for line in lines if line.startswith("error:")] or lines
        raise NodeError(f"{node.name}: {errors[0].removeprefix('error: ')}", hint=sync)
    # Files of the node's shell may print a greeting before, and more after.
    document = re.search(r"^\{$.*^\}$", done.stdout, re.DOTALL | re.MULTILINE)
    try:
        return records.decode(document[0] if document else done.stdout, Facts)
    except records.DecodeError as exc:
        raise NodeError(f"{node.name} reports no facts: {exc}", hint=sync) from exc


def compare(here: Facts, there: Facts, node: Node, clock_s: float) -> Iterator[Row]:
    """Yield one row for each fact of another node; a difference is a warning with its hint."""
    sync = hints.text("server.node_sync", name=node.name)
    update = hints.text("server.update_node", address=node.ssh)
    for fact in (*SYNCED, *RELEASES):
        ours, theirs = str(getattr(here, fact)), str(getattr(there, fact))
        short = 12 if fact in _DIGESTS else None
        text = (theirs or "none")[:short]
        # The same libraries, compiled here, come there from the wheel of `inv wheel`.
        are_alike = fact == "kernels" and here.libraries == there.libraries != ""
        if are_alike or (ours == theirs and (fact != "layers" or theirs == "ok")):
            yield Row(State.OK, f"{node.name} {fact}", text)
            continue
        if ours != theirs:
            text = f"{text}, and {(ours or 'none')[:short]} here"
        yield Row(State.WARN, f"{node.name} {fact}", text, hint=sync if fact in SYNCED else update)
    if there.edited or there.unsaved or there.has_commits:
        names = listed([*there.edited, *(f"vendor/vllm/{each}" for each in there.unsaved)])
        text = f"edited there: {names}" if names else "vendor/vllm has commits without a patch"
        yield Row(State.WARN, f"{node.name} edits", text, hint=look_there(node))
    free = f"{there.free_memory_gib:g} GiB of memory, {there.free_disk_gib:g} GiB of disk"
    # As the doctor warns of this machine.
    is_short = there.free_disk_gib < doctor_host.COMFORT_GIB.get(here.device, 0.0)
    state, look = (State.WARN, look_at_disk(node)) if is_short else (State.OK, None)
    yield Row(state, f"{node.name} free", free, hint=look)
    yield from _link_rows(there, node)
    if here.link and there.link and here.link.mtu != there.link.mtu:
        text = f"{there.link.mtu}, and {here.link.mtu} here: large packets are lost"
        hint = hints.text("server.set_mtu", interface=here.link.interface, mtu=there.link.mtu)
        yield Row(State.WARN, f"{node.name} mtu", text, hint=hint)
    is_right = abs(clock_s) <= CLOCK_S
    text = f"{abs(clock_s):.1f} s {'behind' if clock_s > 0 else 'ahead'}"
    look = None if is_right else hints.text("server.clock", address=node.ssh)
    yield Row(State.OK if is_right else State.WARN, f"{node.name} clock", text, hint=look)


def _link_rows(facts: Facts, node: Node) -> Iterator[Row]:
    """Yield the rows on a node's end of the link, with hints that are typed on this machine."""
    found = [*link.rows(facts.link, node.address)] if facts.link else []
    for row in (*found, *link.fault_rows(facts.driver, facts.kernel)):
        hint = row.hint
        if hint and not node.is_here:
            command = hint.split("    ")[0]
            hint = hints.text("server.on_node", address=node.ssh, command=command)
        yield replace(row, name=f"{node.name} {row.name}", hint=hint)


def doctor_rows(machine: Machine) -> tuple[Row, ...]:
    """Return the doctor's rows on the link of nodes.toml."""
    try:
        node = read_nodes(machine.layout.root).here
    except WorkspaceError as exc:
        return (Row(State.FAIL, "nodes", exc.message, hint=exc.hint),)
    observed = link.observe(node.interface, machine.settings.child_environment("plain"))
    driver = next((gpu.driver for gpu in machine.gpus), None)
    return (*link.rows(observed, node.address), *link.fault_rows(driver, platform.release()))


@dataclass(frozen=True)
class _Sync:
    """A running sync: this clone, its facts, the other node, and the log."""

    machine: Machine
    here: Facts
    outer: Git
    remote: Remote
    run_log: RunLog

    @property
    def name(self) -> str:
        return self.remote.node.name

    def there(self, script: str, *, limit_s: float = 60.0) -> str:
        """Run a POSIX script in the other clone and return its output. Raises NodeError."""
        typed = f"cd {self.remote.quoted()} && {script}"
        self.run_log.command(f"{self.name}: {script}")
        done = self.remote.shell(typed, limit_s=limit_s)
        if done.returncode:
            raise failed(self.remote.node, done)
        return done.stdout


def sync(
    machine: Machine, name: str, *, console: Console, has_bundle: bool = False, wait: bool = False
) -> None:
    """Bring another node to the state of this clone, and compare the two.

    With `has_bundle`, all that its bootstrap would fetch comes from this machine. Raises NodeError
    where the other node cannot be reached, has edits that a sync would overwrite, or differs
    afterwards; CheckoutError where this clone has work without a commit or a patch; SmokeError
    where it is not built.
    """
    layout, settings = machine.layout, machine.settings
    nodes = read_nodes(layout.root)
    remote = Remote(nodes.another(name), settings.child_environment("plain"))
    here = observe(machine, nodes.here.interface)
    outer = _require_saved(layout, here)
    head = _look(remote, outer)
    folder = settings.cache / "node-bundle" if has_bundle else None
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        options = bundle.BundleOptions(str(folder), device=here.device)
        bundle.make(layout, settings, options, console=console, wait=wait)
    verb = f"inv node.sync {name}"
    with stages.locked(layout, settings, verb, console=console, wait=wait) as run_log:
        running = _Sync(machine, here, outer, remote, run_log)
        with stages.step(run_log, "workspace") as view:
            view.reason = _send_commits(running, head)
        with stages.step(run_log, "settings") as view:
            there = ask(remote, limit_s=FIRST_S)
            view.reason = _send_settings(running, there)
        with stages.step(run_log, "kernels") as view:
            flags = _send_bundle(running, folder) if folder else _send_kernels(running)
            view.reason = shlex.join(flags) or "the node fetches them itself"
        with stages.step(run_log, "bootstrap"):
            _bootstrap(running, flags)
        there = ask(remote)
        running.there(f"rm -rf {SYNC}")
    rows = tuple(compare(here, there, remote.node, time.time() - there.time))
    console.stdout.rows(rows)
    warned = {row.name for row in rows if row.state is State.WARN}
    if differing := [fact for fact in SYNCED if f"{name} {fact}" in warned]:
        hint = hints.text("server.inventory")
        raise NodeError(f"{name} differs in {listed(differing)}", hint=hint)
    console.info(f"{name} has the state of this clone")


def _require_saved(layout: Layout, here: Facts) -> Git:
    """Return the workspace's repository. Raises CheckoutError where a commit or a patch lacks what
    this clone has: the other node gets both, and nothing else.
    """
    outer = checkout.superproject(layout)
    if outer is None or not here.workspace:
        raise CheckoutError("this clone is no git repository", hint=hints.text("inv.status"))
    if here.has_commits or here.unsaved:
        what = listed([f"vendor/vllm/{each}" for each in here.unsaved]) or "commits in vendor/vllm"
        raise CheckoutError(f"no patch has {what}", hint=hints.text("inv.patch_export"))
    if here.edited:
        hint = hints.text("server.commit_all")
        raise CheckoutError(f"not committed here: {listed(here.edited)}", hint=hint)
    if here.layers != "ok":
        hint = hints.text("inv.bootstrap")
        raise SmokeError(f"this clone is not built: {here.layers}", hint=hint)
    return outer


def _look(remote: Remote, outer: Git) -> str:
    """Return the commit of the other clone, empty where there is none yet.

    Raises NodeError where it has edited files, or commits that this clone lacks.
    """
    node, folder = remote.node, remote.quoted()
    git = f"git -C {folder}"
    script = (
        f"[ -e {folder} ] || exit 3; [ -e {folder}/.git ] || exit 4;"
        f" {git} rev-parse -q --verify HEAD || echo {_NO_COMMIT};"
        f" {git} {shlex.join(_STATUS)} --untracked-files=all; echo; [ ! -e"
        f" {folder}/vendor/vllm/.git ] || {git}/vendor/vllm {shlex.join(_STATUS)}"
        " --untracked-files=no"
    )
    done = remote.shell(script)
    if done.returncode == 3:
        return ""
    if done.returncode == 4:
        raise NodeError(
            f"{node.name}: {node.folder} exists and is no clone",
            hint=hints.text("server.on_node", address=node.ssh, command=f"ls -la {folder}"),
        )
    if done.returncode:
        raise failed(node, done)
    # A start-up file of the node's shell may print a greeting before.
    found = re.search(r"^([0-9a-f]{40})\n([^\n]*)\n(.*)", done.stdout, re.DOTALL | re.MULTILINE)
    head, own, vllm = found.groups() if found else (_NO_COMMIT, "", "")
    if edited := [*_paths(own), *(f"vendor/vllm/{path}" for path in _paths(vllm))]:
        raise NodeError(f"{node.name} has edits: {listed(edited)}", hint=look_there(node))
    if head == _NO_COMMIT:
        return ""
    if not outer.present([head]) or not outer.is_ancestor(head, outer.head() or ""):
        raise NodeError(
            f"{node.name} has commits that this clone lacks: its HEAD is {head[:12]}",
            hint=hints.text("server.pull_node", url=f"{node.ssh}:{node.folder}"),
        )
    return head


def _send_commits(running: _Sync, head: str) -> str:
    """Move the other clone to this clone's commit, forwards only; make it where there is none."""
    target = running.here.workspace
    node, folder = running.remote.node, running.remote.quoted()
    if head == target:
        running.there(f"mkdir -p {SYNC}")
        return f"{target[:12]} is there"
    made = running.remote.shell(
        f"{{ [ -e {folder}/.git ] || git init -q -b main {folder}; }} && mkdir -p {folder}/{SYNC}"
    )
    if made.returncode:
        raise failed(node, made)
    with tempfile.TemporaryDirectory(prefix="inv-node-") as scratch:
        path = Path(scratch) / "workspace.bundle"
        lacking = ["HEAD", *([f"^{head}"] if head else [])]
        running.outer.write(
            "bundle", "create", "--quiet", str(path), *lacking, run_log=running.run_log
        )
        running.remote.copy(path, f"{SYNC}/{path.name}")
    running.there(
        f"git fetch -q {SYNC}/workspace.bundle HEAD && git -c submodule.recurse=false"
        " -c merge.verifySignatures=false merge -q --ff-only FETCH_HEAD"
    )
    return f"{(head or 'a new clone')[:12]} to {target[:12]}"


def _send_settings(running: _Sync, there: Facts) -> str:
    """Add the settings that the other node's .env lacks. Raises NodeError where a value differs."""
    ours, node = shared(core_settings.written(running.machine.layout)), running.remote.node
    differ = [name for name, text in ours.items() if there.settings.get(name, text) != text]
    if differ:
        command = f"nano {running.remote.quoted()}/.env"
        raise NodeError(
            f"the .env of {node.name} has another {listed(differ)}, and stays as it is",
            hint=hints.text("server.on_node", address=node.ssh, command=command),
        )
    is_new = "old" not in running.there("test ! -e .env || echo old").splitlines()
    missing = {name: text for name, text in ours.items() if name not in there.settings}
    if missing:
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        # The last line there may have no end.
        lines = ["", f"# by inv node.sync, {today}"]
        lines += [f"{name}={shlex.quote(text)}" for name, text in missing.items()]
        running.there(f"umask 077 && printf '%s\\n' {shlex.join(lines)} >> .env")
    if is_new:
        running.there("./scripts/inv env.init", limit_s=FIRST_S)
    return ", ".join(missing) or "nothing is missing"


def _send_kernels(running: _Sync) -> list[str]:
    """Send the wheel of kernels that were compiled here; return the flags of bootstrap for it."""
    observed = plan.observe_on(running.machine)
    built = observed.kernels.recorded
    source = built.kernels if built else None
    if source is None or not (source.is_compiled or source.is_wheel_file):
        return []
    with tempfile.TemporaryDirectory(prefix="inv-node-") as scratch:
        packed = wheel.pack(running.machine.layout, observed, Path(scratch))
        # The node's stamp names the wheel: it stays where `inv wheel` would write it.
        running.there("mkdir -p dist")
        running.remote.copy(packed.path, f"dist/{packed.path.name}")
    return ["--kernels", f"dist/{packed.path.name}"]


def _send_bundle(running: _Sync, folder: Path) -> list[str]:
    """Send the files of a bundle that the other node lacks; return the flags of bootstrap."""
    place = f"{SYNC}/bundle"
    there = running.there(
        f"mkdir -p {place}/files && cd {place} && find files -type f -exec sha256sum {{}} +",
        limit_s=FIRST_S,
    )
    present = {tuple(line.split(maxsplit=1)[::-1]) for line in there.splitlines()}
    for path in sorted((folder / bundle.FILES).iterdir()):
        name = f"{bundle.FILES}/{path.name}"
        if (name, files.sha256(path)) not in present:
            running.remote.copy(path, f"{place}/{name}", limit_s=FIRST_S)
    running.remote.copy(folder / bundle.MANIFEST, f"{place}/{bundle.MANIFEST}")
    return ["--from", place]


def _bootstrap(running: _Sync, flags: Sequence[str]) -> None:
    """Run the other node's own bootstrap, and print its lines as they come."""
    name, console = running.name, running.run_log.console
    argv = ["./scripts/inv", "bootstrap", "--device", running.here.device, *flags, "--wait"]
    try:
        running.remote.follow(
            argv,
            run_log=running.run_log,
            on_line=lambda line: console.info(f"  {name} | {line}"),
        )
    except NodeError as exc:
        # Without its details: they were printed.
        hint = hints.text("server.sync_bundle", name=name)
        raise NodeError(f"{name}: {exc.message}", hint=hint) from exc
