"""What the verbs on a stack of patches cost, beside git typed by hand: a hundred patches on the real tree, in a copy.

The verbs run in this process, so that the door's start-up, which has rows of its own, is no part of it.
"""

import contextlib
import dataclasses
import difflib
import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from workspace.core.console import Console
from workspace.core.errors import SourceError
from workspace.core.journal import Journal
from workspace.core.layout import Layout
from workspace.perf import measure
from workspace.perf.ground import Ground
from workspace.perf.measure import Call, Command
from workspace.source import archive, checkout, export, index, overview, patches, pins, series
from workspace.source.checkout import Kind
from workspace.source.git import Git
from workspace.source.upstream import Candidate

Sides = tuple[Call, Command]
PATCHES = 100
_SCRIPT = Path(__file__).with_name("stack.sh")
_NEXT = "refs/perf/next"
# What git format-patch writes (its manual page, DISCUSSION).
_MAIL = """From {zeros} Mon Sep 17 00:00:00 2001
From: A Developer <developer@example.org>
Date: Thu, 1 Jan 2026 00:00:00 +0000
Subject: Change number {number:03}

Upstream-Status: Pending
---

diff --git a/{path} b/{path}
--- a/{path}
+++ b/{path}
{hunk}"""


class _House:
    """A workspace in small around a checkout of the pinned release, with patches and another commit that they apply to as well."""

    def __init__(self, ground: Ground) -> None:
        pin = pins.load(ground.layout.pins).vllm
        if pin.archive is None:
            raise SourceError("vendor/pins.toml has no release archive of vllm, from which both sides start", hint="git diff vendor/pins.toml")
        self.ground, self.pin, self.base = ground, pin, pin.archive.commit
        self.layout = Layout(ground.folder / "stack")
        self.journal = Journal(Console(out=io.StringIO(), err=io.StringIO()), self.layout.logs, verb="perf")
        self.git = Git(self.layout.vllm)
        if not self.layout.vllm.exists():
            packed = index.fetch(pin.name, pin.archive.filename, pin.archive.sha256, settings=ground.settings)
            self.layout.state.mkdir(parents=True)
            self.layout.vllm.parent.mkdir(parents=True)
            shutil.copyfile(ground.layout.pins, self.layout.pins)
            archive.make(packed, self.layout.vllm, pin)
            self._write_series()
            self._commit_next()

    def _write_series(self) -> None:
        folder = self.layout.patches(self.pin.name)
        folder.mkdir(parents=True)
        chosen = [path for path in sorted(self.layout.vllm.glob("vllm/**/*.py")) if path.stat().st_size > 1000][:PATCHES]
        names = [f"Change-number-{number:03}.patch" for number in range(len(chosen))]
        for number, path in enumerate(chosen):
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            changed = [*lines[:10], f"# change number {number}\n", *lines[10:]]
            hunk = "".join(list(difflib.unified_diff(lines, changed))[2:])
            text = _MAIL.format(zeros="0" * 40, number=number, path=path.relative_to(self.layout.vllm), hunk=hunk)
            (folder / names[number]).write_text(text, encoding="utf-8")
        self.write_list(names)

    def _commit_next(self) -> None:
        (self.layout.vllm / "README.md").write_text("another release\n", encoding="utf-8")
        self.git.set_ref(_NEXT, self.git.commit_everything("The next release", date=archive.DATE))
        self.by_hand("reset")

    def write_list(self, names: list[str]) -> None:
        (self.layout.patches(self.pin.name) / series.FILE).write_text("\n".join([f"# base: {self.pin.commit}", *names, ""]), encoding="utf-8")

    def there(self) -> checkout.Checkout:
        return checkout.observe(self.layout, self.pin)

    def apply(self) -> patches.Stack:
        return patches.apply(self.layout, self.pin.name, self.pin, self.there(), journal=self.journal)

    def typed(self, verb: str, before: Callable[[], None] | None = None) -> Command:
        """What stack.sh does for a verb."""
        places = {"PATCHES": str(self.layout.patches(self.pin.name)), "OUT": str(self.layout.state / "out")}
        said = places | {"BASE": self.base, "NEXT": self.git.resolve(_NEXT) or ""}
        return Command(("/bin/sh", _SCRIPT, verb), self.layout.vllm, self.ground.environment | said, before)

    def by_hand(self, verb: str) -> None:
        measure.run(self.typed(verb))

    def take_off(self) -> None:
        """Back to the base, nothing being remembered."""
        self.by_hand("reset")
        shutil.rmtree(self.layout.state / "expected-trees", ignore_errors=True)

    def put_on(self) -> None:
        if self.there().head == self.base:
            self.apply()


@contextlib.contextmanager
def applied(ground: Ground) -> Iterator[Sides]:
    house = _House(ground)
    yield Call(house.apply, house.take_off), house.typed("apply", house.take_off)


@contextlib.contextmanager
def exported(ground: Ground) -> Iterator[Sides]:
    """All files are written anew by either side."""
    house = _House(ground)
    house.put_on()
    folder, name = house.layout.patches(house.pin.name), house.pin.name
    kept = house.layout.state / "kept"
    shutil.copytree(folder, kept)

    def empty() -> None:
        for patch in folder.glob("*.patch"):
            patch.unlink()
        house.write_list([])

    try:
        yield (
            Call(lambda: export.run(house.layout, name, house.pin, house.there(), journal=house.journal), empty),
            house.typed("export"),
        )
    finally:
        shutil.rmtree(folder)
        kept.rename(folder)


@contextlib.contextmanager
def forecast(ground: Ground) -> Iterator[Sides]:
    from workspace.pin import forecast as work

    house = _House(ground)
    house.put_on()
    found = Candidate(dataclasses.replace(house.pin, tag="v0", version="0"), house.git.resolve(_NEXT) or "", Kind.RELEASE, None, house.layout.vllm)

    def work_out() -> object:
        there = house.there()
        stack = patches.observe(house.layout, house.pin.name, house.pin, there)
        return work.work_out(house.layout, ground.settings, found, there, stack)

    yield Call(work_out), house.typed("forecast")


@contextlib.contextmanager
def applied_again(ground: Ground) -> Iterator[Sides]:
    house = _House(ground)
    house.put_on()
    yield Call(house.apply), house.typed("status")


@contextlib.contextmanager
def looked_at(ground: Ground) -> Iterator[Sides]:
    house = _House(ground)
    house.put_on()
    yield Call(lambda: overview.rows(house.layout, house.pin.name, house.pin, house.there())), house.typed("status")
