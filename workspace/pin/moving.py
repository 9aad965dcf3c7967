"""The moves that a promotion and the way back share: the tree, what was built in it, and what names its place."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from workspace.build import products, stamp
from workspace.core.console import Console
from workspace.core.errors import CheckoutError, ToolchainError
from workspace.core.journal import Journal
from workspace.core.layout import Layout
from workspace.pin import good
from workspace.source import checkout, moves
from workspace.source.git import Git, worktree


def move_tree(layout: Layout, *, old: str, new: str, journal: Journal) -> None:
    """Move vendor/vllm from one commit to another; a move that was ended in the middle is finished.

    Raises CheckoutError where HEAD is at neither, or where an edit may be the user's.
    """
    git, shown = Git(layout.vllm), layout.relative(layout.vllm)
    if moves.is_begun(layout, "vllm"):
        moves.finish(layout, "vllm", git, journal=journal)
    head = git.head()
    if head == new:
        return
    if head != old:
        raise CheckoutError(f"{shown} is at {(head or 'no commit')[:12]}, expected was {old[:12]}", hint=f"git -C {shown} checkout --detach {old[:12]}")
    if edited := git.edits():
        hint = f"git -C {shown} stash    and the same command again"
        raise CheckoutError(f"{shown} has edits ({', '.join(edited[:3])}), which were left as they are", hint=hint)
    moves.move(layout, "vllm", git, new, journal=journal)


def require_one_disk(layout: Layout) -> None:
    """Raise ToolchainError where what a move renames lies on several disks."""
    places = (layout.root, layout.state, layout.vllm, layout.environment)
    if len({path.stat().st_dev for path in places if path.exists()}) > 1:
        sentence = "the clone, .workspace, vendor/vllm and .vllm lie on several disks, so nothing can be renamed between them"
        raise ToolchainError(sentence, hint="df . .workspace vendor/vllm .vllm")


def put_aside(environment: Path, aside: Path) -> None:
    """Rename an environment to where it waits; where another one is left from earlier, that one is out of date."""
    if os.path.lexists(environment):
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(environment, aside)
        except OSError as exc:
            # Where something is mounted, be it of the same disk.
            hint = f"findmnt {environment}    unmount it; the same command again goes on"
            raise ToolchainError(f"{environment} cannot be renamed: {exc.strerror}", hint=hint) from exc


def products_of(layout: Layout) -> dict[str, str]:
    """What a marker says of the products in vendor/vllm: their paths, and the compiled libraries that the stamp names, a line each."""
    build = stamp.read(layout.stamp("vllm"))
    return {"products": "\n".join(products.found(layout.vllm)), "libraries": "\n".join(library.path for library in build.libraries) if build else ""}


def take_products_away(layout: Layout, facts: Mapping[str, str], *, good_state: str) -> None:
    """Take the products of the pin that is left out of vendor/vllm; those that the good state has not are kept aside."""
    listed, ours = (tuple(filter(None, facts[name].split("\n"))) for name in ("products", "libraries"))
    kept = good.kernels(layout, good_state) if good_state else None
    products.take_away(layout, listed, ours=ours, kept=kept, left=good.left(layout, facts["left"]) / "products")


def say_left(layout: Layout, facts: Mapping[str, str], *, console: Console) -> None:
    left = good.left(layout, facts["left"])
    if left.exists():
        console.say(f"what a build had left in vendor/vllm and no good state holds is in {layout.relative(left)}")


def set_gitlink(layout: Layout, commit: str | None, *, journal: Journal) -> None:
    """Let the superproject's index name this commit, unless it is None, and keep git's hands off the submodule as before."""
    outer = checkout.superproject(layout)
    path = layout.relative(layout.vllm)
    link = outer.gitlink(path) if outer else None
    if outer and link and commit and link.commit != commit:
        worktree.set_gitlink(outer, path, commit, journal=journal)
    checkout.protect(layout, journal=journal)
