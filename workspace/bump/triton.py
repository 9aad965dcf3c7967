"""Triton's pin: it follows a branch, main by default, and moves without a sandbox.

The build of Triton belongs to `inv fix-triton`.
"""

from dataclasses import dataclass, replace

from workspace.bump import staging
from workspace.core import hints
from workspace.core.console import Console, RunLog
from workspace.core.errors import CheckoutError, PatchConflict, SourceError, counted
from workspace.core.files import write_atomic
from workspace.core.paths import Layout
from workspace.core.settings import Settings, without_user
from workspace.install import sandbox, stages
from workspace.repo import checkout, git, pins, series
from workspace.repo.git import Git, am, history, worktree
from workspace.repo.pins import COMMIT, Pin


@dataclass(frozen=True)
class Ahead:
    """The commit of the followed branch and its distance from the pin, None if unknown."""

    branch: str
    commit: str
    commits: int | None


def branch_of(settings: Settings) -> str:
    """Return the ref that Triton's pin follows: TRITON_REF, or main."""
    value = settings.values.get("TRITON_REF")
    return value.text if value and value.text else "main"


def ahead(layout: Layout, settings: Settings, pin: Pin) -> Ahead:
    """Look up the branch on the remote within CONNECT_TIMEOUT_S.

    Raises SourceError if the remote cannot be reached or has no such branch.
    """
    name = branch_of(settings)
    commit = name if COMMIT.fullmatch(name) else _advertised(layout, settings, pin, name)
    if commit == pin.commit:
        return Ahead(name, commit, 0)
    is_here = (layout.triton / ".git").exists()
    commits = worktree.commits_between(Git(layout.triton), pin.commit, commit) if is_here else None
    return Ahead(name, commit, commits)


def _advertised(layout: Layout, settings: Settings, pin: Pin, name: str) -> str:
    """Return the commit of a branch or tag on the remote."""
    url = checkout.url_of(layout, pin, settings)
    # A branch first; of an annotated tag the commit and not the tag object.
    names = (f"refs/heads/{name}", f"refs/tags/{name}^{{}}", f"refs/tags/{name}")
    found = git.advertised(url, names, cwd=layout.root, settings=settings)
    commit = next((found[wanted] for wanted in names if wanted in found), "")
    if not commit:
        raise SourceError(
            f"{without_user(url)} has no branch {name}",
            hint=hints.text("bump.triton_ref"),
        )
    return commit


def move(layout: Layout, settings: Settings, *, console: Console, wait: bool) -> None:
    """Pin the commit that Triton's branch has now, and move vendor/triton to it if it exists.

    Raises CheckoutError if vendor/triton has edits, commits of its own or a git operation under
    way, PatchConflict if a patch does not apply to the new commit, and SourceError if the remote
    cannot be reached. Nothing changes then.
    """
    verb = "inv pin.bump triton"
    with stages.locked(layout, settings, verb, console=console, wait=wait) as run_log:
        pin = pins.load(layout.pins).triton
        found = ahead(layout, settings, pin)
        new = replace(
            pin,
            commit=found.commit,
            tag=found.branch,
            version=found.branch if pin.version == pin.tag else pin.version,
        )
        if (layout.triton / ".git").exists():
            _move_tree(layout, settings, pin, new, run_log)
        else:
            with stages.step(run_log, "vendor/triton") as view:
                view.reason = checkout.ensure(
                    layout, new, settings, choice="git", run_log=run_log, step=view
                ).detail
        # Also if the pin is right: an earlier run may have ended between the two files.
        staging.write_series_base(layout.patches("triton"), new.commit)
        if pin == new:
            console.info(
                f"nothing to do: {new.tag} is at {new.commit[:12]}, which is pinned already"
            )
            return
        pins.save(layout.pins, new)
        _write_message(layout, pin, new, found, console=console)


def _write_message(layout: Layout, pin: Pin, new: Pin, found: Ahead, *, console: Console) -> None:
    """Write the commit message of the move and print how to commit."""
    further = f", {counted(found.commits, 'commit')} further" if found.commits else ""
    text = (
        f"pin: move Triton to {new.commit[:12]}\n\n{new.commit} is what {new.tag} has now{further};"
        f" before it was {pin.commit}.\n"
    )
    message = layout.bump_message
    write_atomic(message, text.encode())
    console.info(
        f"triton {pin.commit[:12]} → {new.commit[:12]}"
        + (f", {counted(found.commits, 'commit')}" if found.commits else "")
    )
    shown = layout.relative(message)
    console.hint(hints.text("bump.commit_triton", message=shown))


def series_names(layout: Layout) -> tuple[str, ...]:
    """Return Triton's patches, whatever base the series names; empty without a series."""
    return tuple(name for name in sandbox.names_of(layout.patches("triton")).split("\n") if name)


def _move_tree(layout: Layout, settings: Settings, pin: Pin, new: Pin, run_log: RunLog) -> None:
    """Fetch the new commit, check that the patches apply to it, and move the clean checkout."""
    tree, shown = Git(layout.triton), layout.relative(layout.triton)
    _require_clean(tree, shown, pin, new, layout)
    with stages.step(run_log, "fetch") as view:
        if not worktree.is_kept(tree, new.commit):
            remote = checkout.remote(layout, new, settings, run_log, view)
            wanted = (f"+{new.commit}:refs/pins/triton",)
            tree.fetch(remote, wanted, whole=not tree.is_partial)
        # A patch is merged in a scratch folder, which cannot fetch contents of a partial clone.
        history.complete_range(tree, pin.commit, new.commit, settings, run_log=run_log)
        view.reason = new.commit[:12]
    tip = _apply_series(layout, tree, new.commit)
    tree.set_refs({"refs/patches/tip": tip, "refs/patches/base": new.commit})
    if tree.head() != tip:
        tree.check_out(tip, settings=settings, run_log=run_log, on_line=lambda line: None)


def _apply_series(layout: Layout, tree: Git, base: str) -> str:
    """Return the commit of the series on `base`, made without a checkout. Raises PatchConflict."""
    names = series_names(layout)
    if not names:
        return base
    files = [layout.patches("triton") / name for name in names]
    done = am.applied(tree, base, files, place=layout.state / "triton-stack")
    if done.tip is None:
        raise PatchConflict(
            f"patch {done.position} of {len(files)}, patches/triton/{names[done.position - 1]},"
            f" does not apply to {base[:12]}; nothing was changed",
            hint=hints.text("bump.triton_patch"),
            details=done.details,
        )
    return done.tip


def _require_clean(tree: Git, shown: str, pin: Pin, new: Pin, layout: Layout) -> None:
    if verb := tree.under_way():
        raise CheckoutError(
            f"{shown} is in the middle of a git {verb}",
            hint=hints.text("bump.triton_continue"),
        )
    if edited := tree.edits():
        raise CheckoutError(
            f"{shown} has edits ({', '.join(edited[:3])})",
            hint=hints.text("bump.triton_stash", shown=shown),
        )
    head = tree.head() or ""
    known = {pin.commit, new.commit, tree.resolve("refs/patches/tip")}
    expected = (
        worktree.tree_after(
            tree, pin.commit, [layout.patches("triton") / name for name in series_names(layout)]
        )
        if head not in known
        else None
    )
    if head not in known and tree.tree(head) != expected:
        raise CheckoutError(
            f"{shown} is at {head[:12]}, which is not what pin and patches make",
            hint=hints.text("bump.triton_keep", shown=shown, branch=series.kept_as(head)),
        )
