"""Triton under the same roof: its pin follows a branch, main by default, and moves at once. What is
built of it is another verb's work.
"""

from dataclasses import dataclass, replace

from workspace.bump import staging
from workspace.core import lock
from workspace.core.console import Console
from workspace.core.errors import CheckoutError, PatchConflict, SourceError
from workspace.core.files import write_atomic
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.repo import checkout, git, pins, series
from workspace.repo.git import Git, am, worktree
from workspace.repo.pins import COMMIT, Pin

AGAIN = "./scripts/inv pin.bump triton"


@dataclass(frozen=True)
class Ahead:
    """What the followed branch has by now. `commits` is how many the pin lacks, None where their
    history is not here.
    """

    branch: str
    commit: str
    commits: int | None


def branch_of(settings: Settings) -> str:
    """The branch, tag or commit that Triton's pin follows: TRITON_REF where that is a setting, else
    main.
    """
    value = settings.values.get("TRITON_REF")
    return value.text if value and value.text else "main"


def ahead(layout: Layout, settings: Settings, pin: Pin) -> Ahead:
    """Ask upstream, within CONNECT_TIMEOUT_S, where the branch is. Raises SourceError where it
    cannot be reached or has no such branch.
    """
    name = commit = branch_of(settings)
    if not COMMIT.fullmatch(name):
        url, names = (
            checkout.url_of(layout, pin, settings),
            (
                f"refs/heads/{name}",
                f"refs/tags/{name}",
                f"refs/tags/{name}^{{}}",
            ),
        )
        found = git.advertised(
            url,
            names,
            cwd=layout.root,
            settings=settings,
            timeout_s=float(settings.count("CONNECT_TIMEOUT_S") or 5),
        )
        commit = next(
            (found[wanted] for wanted in (names[0], names[2], names[1]) if wanted in found), ""
        )
        if not commit:
            raise SourceError(
                f"{git.without_user(url)} has no branch {name}",
                hint="TRITON_REF names the branch that Triton's pin follows",
            )
    is_here = (layout.triton / ".git").exists()
    return Ahead(
        name,
        commit,
        (
            0
            if commit == pin.commit
            else (
                worktree.commits_between(Git(layout.triton), pin.commit, commit)
                if is_here
                else None
            )
        ),
    )


def move(layout: Layout, settings: Settings, *, console: Console, wait: bool) -> None:
    """Pin the commit that Triton's branch has now, and move vendor/triton to it where that is
    there.

    Raises CheckoutError where vendor/triton has edits, commits of its own or an operation under
    way, PatchConflict where a patch does not apply there, SourceError where upstream cannot be
    reached; nothing is changed then.
    """
    with (
        lock.hold(layout.lock, verb="inv pin.bump triton", wait=wait, on_wait=console.info) as held,
        RunLog(
            console, layout.logs, verb="pin.bump", secrets=settings.secrets, held=held
        ) as run_log,
    ):
        pin = pins.load(layout.pins).triton
        # A run that was ended between the files of a move left the series behind the pin, or the
        # pin behind the series.
        names = [name for name in series_names(layout) if name]
        found = ahead(layout, settings, pin)
        new = replace(
            pin,
            commit=found.commit,
            tag=found.branch,
            version=found.branch if pin.version == pin.tag else pin.version,
        )
        if (layout.triton / ".git").exists():
            _move_tree(layout, settings, pin, new, names, run_log)
        else:
            with run_log.console.step("vendor/triton") as view:
                run_log.phase("vendor/triton", view)
                view.reason = checkout.ensure(
                    layout, new, settings, choice="git", run_log=run_log, step=view
                ).detail
            run_log.step = None
        staging.write_series_base(layout.patches("triton"), new.commit)
        if pin == new:
            console.info(
                f"nothing to do: {new.tag} is at {new.commit[:12]}, which is pinned already"
            )
            return
        pins.save(layout.pins, new)
        message = layout.state / "bump-message.txt"
        write_atomic(message, _message(pin, new, found).encode())
        console.info(
            f"triton {pin.commit[:12]} → {new.commit[:12]}"
            + (f", {found.commits} commits" if found.commits else "")
        )
        console.info(
            "to commit: git add vendor/pins.toml patches/triton && git commit -F"
            f" {layout.relative(message)}"
        )


def series_names(layout: Layout) -> tuple[str, ...]:
    """The patches on Triton, whatever base the series names; none where there is no series."""
    from workspace.install import sandbox

    return tuple(name for name in sandbox.names_of(layout.patches("triton")).split("\n") if name)


def _move_tree(
    layout: Layout, settings: Settings, pin: Pin, new: Pin, names: list[str], run_log: RunLog
) -> None:
    """Fetch the new commit into vendor/triton, see that the patches apply to it, and move a clean
    checkout.
    """
    tree, shown = Git(layout.triton), layout.relative(layout.triton)
    _require_clean(tree, shown, pin, new, layout)
    with run_log.console.step("fetch") as view:
        run_log.phase("fetch", view)
        if not worktree.is_kept(tree, new.commit):
            url, whole = (
                checkout.url_of(layout, new, settings),
                tree.setting("remote.origin.promisor") != "true",
            )
            ref = f"+{new.commit}:refs/pins/triton"
            tree.fetch(
                url,
                (ref,),
                whole=whole,
                settings=settings,
                run_log=run_log,
                on_line=checkout.shown(view),
            )
        view.reason = new.commit[:12]
    files = [layout.patches("triton") / name for name in names]
    done = (
        am.applied(tree, new.commit, files, place=layout.state / "triton-stack")
        if files
        else am.Applied(new.commit)
    )
    if done.tip is None:
        raise PatchConflict(
            f"patch {done.position} of {len(files)}, patches/triton/{names[done.position - 1]},"
            f" does not apply to {new.commit[:12]}; nothing was changed",
            hint=(
                f"mend it, or take its line out of patches/triton/{series.SERIES_FILE}, then"
                f" {AGAIN}"
            ),
            details=tuple(f"conflict in {path}" for path in done.conflicted),
        )
    tree.set_ref("refs/patches/tip", done.tip)
    tree.set_ref("refs/patches/base", new.commit)
    if tree.head() != done.tip:
        tree.check_out(done.tip, settings=settings, run_log=run_log, on_line=lambda line: None)
    run_log.step = None


def _require_clean(tree: Git, shown: str, pin: Pin, new: Pin, layout: Layout) -> None:
    if verb := tree.under_way():
        raise CheckoutError(
            f"{shown} is in the middle of a git {verb}",
            hint="./scripts/inv patch.continue --project triton    or --abort",
        )
    if edited := tree.edits():
        raise CheckoutError(
            f"{shown} has edits ({', '.join(edited[:3])})", hint=f"git -C {shown} stash && {AGAIN}"
        )
    head = tree.head() or ""
    known = {pin.commit, new.commit, tree.resolve("refs/patches/tip")}
    expected = (
        tree.tree_after(
            pin.commit, [layout.patches("triton") / name for name in series_names(layout)]
        )
        if head not in known
        else None
    )
    if head not in known and tree.tree(head) != expected:
        raise CheckoutError(
            f"{shown} is at {head[:12]}, which is not what pin and patches make",
            hint=(
                f"./scripts/inv patch.export --project triton    or: git -C {shown} branch"
                f" {series.kept_as(head)}"
            ),
        )


def _message(pin: Pin, new: Pin, found: Ahead) -> str:
    count = f", {found.commits} commits further" if found.commits else ""
    return (
        f"pin: move Triton to {new.commit[:12]}\n\n{new.commit} is what {new.tag} has now{count};"
        f" before it was {pin.commit}.\n"
    )
