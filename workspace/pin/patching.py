"""The verbs on a patch stack, each under the workspace's lock and with a log of its own; the work itself is below, in source/."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from workspace.core import lock
from workspace.core.console import Console
from workspace.core.errors import SettingsError
from workspace.core.journal import Journal
from workspace.core.layout import PROJECTS, Layout
from workspace.core.settings import Settings
from workspace.source import checkout, moves, pins
from workspace.source.checkout import Checkout
from workspace.source.git import Git
from workspace.source.patches import Stack, State
from workspace.source.pins import Pin


@dataclass(frozen=True)
class Opened:
    """A stack that may be changed now."""

    pin: Pin
    checkout: Checkout
    journal: Journal


def apply(layout: Layout, settings: Settings, project: str, *, console: Console, wait: bool) -> None:
    """Put the series on the pin; stop in the checkout at the first conflict. Raises what patches.apply raises."""
    from workspace.source import patches

    with _opened(layout, settings, project, "inv patch.apply", console, wait=wait) as found:
        before = found.checkout.head
        stack = patches.apply(layout, project, found.pin, found.checkout, journal=found.journal, stop_at_conflict=True)
        checkout.protect(layout)
        _say(console, stack, "nothing to do: " if stack.head == before else "")


def unapply(layout: Layout, settings: Settings, project: str, *, console: Console, wait: bool) -> None:
    """Go back to the pin; the commits stay under refs/patches. Raises what patches.unapply raises."""
    from workspace.source import patches

    with _opened(layout, settings, project, "inv patch.unapply", console, wait=wait) as found:
        before = found.checkout.head
        stack = patches.unapply(layout, project, found.pin, found.checkout, journal=found.journal)
        checkout.protect(layout)
        _say(console, stack, "nothing to do: " if stack.head == before else "")


def export(layout: Layout, settings: Settings, project: str, *, console: Console, wait: bool, check: bool = False) -> None:
    """Write the commits on the pin as patches; with `check` only compare. Raises what export.run raises."""
    from workspace.source import export as work

    with _opened(layout, settings, project, "inv patch.export", console, wait=wait) as found:
        work.show(work.run(layout, project, found.pin, found.checkout, journal=found.journal, check=check), console=console)


def branch(layout: Layout, settings: Settings, project: str, name: str, patch: str, *, console: Console, wait: bool) -> None:
    """Put one patch on upstream's main as a branch of its own. Raises what branch.run raises."""
    from workspace.source import branch as work

    with _opened(layout, settings, project, "inv patch.export --branch", console, wait=wait) as found:
        work.run(layout, project, found.pin, settings, name, patch, journal=found.journal)


def take(layout: Layout, settings: Settings, project: str, origin: str, *, console: Console, wait: bool) -> None:
    """Import a file, an address or the number of a pull request. Raises what importing.run raises."""
    from workspace.source import importing

    with _opened(layout, settings, project, "inv patch.import", console, wait=wait) as found:
        importing.run(layout, project, found.pin, found.checkout, settings, origin, journal=found.journal)


def go_on(layout: Layout, settings: Settings, project: str, how: Literal["continue", "skip", "abort"], *, console: Console, wait: bool) -> None:
    """Continue, skip or abort what git waits for in the checkout."""
    from workspace.source import resume

    with _opened(layout, settings, project, "inv patch.continue", console, wait=wait) as found:
        _say(console, resume.go_on(layout, project, found.pin, found.checkout, how=how, journal=found.journal), "")


@contextlib.contextmanager
def _opened(layout: Layout, settings: Settings, project: str, verb: str, console: Console, *, wait: bool) -> Iterator[Opened]:
    if project not in PROJECTS:
        raise SettingsError(f"there is no project {project}, only {' and '.join(PROJECTS)}", hint="inv --help patch.apply")
    pins.require_settled(layout)
    pinned = pins.load(layout.pins)
    pin = pinned.triton if project == "triton" else pinned.vllm
    with (
        lock.hold(layout.lock, verb=verb, wait=wait, on_wait=console.say) as held,
        Journal(console, layout.logs, verb=verb.split()[1], secrets=settings.secrets, held=held) as journal,
    ):
        if moves.is_begun(layout, project):
            moves.finish(layout, project, Git(checkout.folder_of(layout, pin)), journal=journal)
        yield Opened(pin, checkout.observe(layout, pin), journal)


def _say(console: Console, stack: Stack, prefix: str) -> None:
    count = f"{len(stack.names)} {'patch' if len(stack.names) == 1 else 'patches'}"
    words = {
        State.APPLIED: f"{count} applied, tree {(stack.tree or '')[:12]}",
        State.UNAPPLIED: f"at the pin, {count} not applied; next: ./scripts/inv patch.apply",
        State.UNEXPORTED: "the commits differ from the series; next: ./scripts/inv patch.export",
    }
    console.say(prefix + words.get(stack.state, f"{stack.state.value}; next: ./scripts/inv patch"))
