"""Commits become patch files: `inv patch.export`.

Before anything is written, the patches are proven to give the same tree and the same commits again.
A file with the same patch in another spelling is not rewritten.
"""

import contextlib
import difflib
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from workspace.core import files, hints
from workspace.core.console import Console, RunLog
from workspace.core.errors import CheckoutError, PatchDrift, counted
from workspace.core.files import read_regular, write_atomic
from workspace.core.paths import Layout
from workspace.repo import checkout as checkouts
from workspace.repo import mail, series
from workspace.repo.checkout import Checkout, Kind
from workspace.repo.git import Git, am, repository
from workspace.repo.git.am import Commit
from workspace.repo.mail import Patches
from workspace.repo.pins import Pin
from workspace.repo.series import BASE_REF, TIP_REF

_COMMENTED = re.compile(r"#.*?([A-Za-z0-9_][A-Za-z0-9._+-]*\.patch)")
TEMPLATE = f"\n\n{mail.TRAILER}: Pending\n# {mail.TRAILER}: {mail.VOCABULARY}\n"


@dataclass(frozen=True)
class Export:
    """Result of an export: `names` of the series, and the files that were written and removed.

    `kept_copies` are copies of edited patches that no commit holds, `unlisted` patch files that are
    not in the series, `edits` uncommitted paths in the checkout, `untracked` files that git does
    not track there.
    """

    names: tuple[str, ...]
    written: tuple[str, ...]
    removed: tuple[str, ...]
    kept_copies: tuple[Path, ...]
    unlisted: tuple[str, ...]
    edits: tuple[str, ...]
    folder: str
    tree: str
    untracked: tuple[str, ...]
    checkout: str


@dataclass(frozen=True)
class _Plan:
    """The files before (None: missing) and after an export, the series file included.

    `gone` are files to remove.
    """

    present: Mapping[str, bytes | None]
    files: Mapping[str, bytes]
    gone: tuple[str, ...]

    @property
    def changed(self) -> Mapping[str, bytes]:
        return {
            name: content
            for name, content in self.files.items()
            if self.present.get(name) != content
        }


@dataclass(frozen=True)
class Prepared:
    """An export that is computed and not yet written.

    `former` are the patches of the stack that was applied or exported last.
    """

    git: Git
    base: str
    head: str
    tree: str
    folder: Path
    patches: Patches
    plan: _Plan
    former: Mapping[str, bytes]
    edits: tuple[str, ...]
    untracked: tuple[str, ...]


def run(
    layout: Layout,
    project: str,
    pin: Pin,
    checkout: Checkout,
    *,
    run_log: RunLog,
    check: bool = False,
) -> Export:
    """Write the commits on the pin as patches/<project>; with `check` only print the difference.

    Raises CheckoutError where there is no stack, or a git operation is in progress; PatchDrift for
    commits that cannot be patches, for patches that were never applied here or changed since, and
    with `check` for any difference; SettingsError for a broken series.
    """
    prepared = prepare(layout, project, pin, checkout, proven=not check)
    if check:
        _check(layout, prepared.folder, prepared.plan, run_log.console)
        return _done(layout, prepared, ())
    return finish(layout, prepared)


def prepare(
    layout: Layout, project: str, pin: Pin, checkout: Checkout, *, proven: bool = True
) -> Prepared:
    """Compute what an export of the commits up to `checkout.head` writes, and prove it.

    Nothing is written. Raises what `run` raises.
    """
    git = Git(checkouts.folder_of(layout, pin))
    shown, folder = layout.relative(git.path), layout.patches(project)
    base, head = _ready(git, checkout, shown)
    series.validate_text(folder, pin.commit)
    stack = am.commits(git, base, head)
    _refuse_foreign(git, base, head, stack, shown)
    with ThreadPoolExecutor(2) as pool:
        # git reads the state of 7,400 files while it makes mails of the commits.
        others = pool.submit(repository.untracked, git)
        edits = pool.submit(git.edits)
        patches = mail.patches_of(git, base, stack, shown=shown)
        plan = _plan(folder, pin.commit, patches)
        if proven and (plan.changed or plan.gone):
            contents = tuple((name, plan.files[name]) for name, _ in patches)
            patches = mail.read_back(git, base, stack, contents, shown=shown)
            plan = _plan(folder, pin.commit, patches)
    is_rewritten = any(plan.present.get(name) is not None for name in plan.changed)
    prepared = Prepared(
        git=git,
        base=base,
        head=head,
        tree=stack[-1].tree if stack else git.tree(head),
        folder=folder,
        patches=patches,
        plan=plan,
        former=_former(git) if plan.gone or is_rewritten else {},
        edits=edits.result(),
        untracked=others.result(),
    )
    _refuse_unapplied(layout, prepared)
    _refuse_edited(layout, prepared)
    return prepared


def finish(layout: Layout, prepared: Prepared) -> Export:
    """Write what was prepared and make the references name the stack. Raises ToolchainError.

    Files that have their content already are not touched.
    """
    git, plan, folder = prepared.git, prepared.plan, prepared.folder
    kept_copies = _keep_copies(
        layout, folder, plan, {*prepared.former.values(), *dict(prepared.patches).values()}
    )
    _write(folder, plan)
    # Last: after a kill the stack is still that of the last export, and the new files do not count
    # as a newer series.
    git.set_refs({TIP_REF: prepared.head, BASE_REF: prepared.base})
    return _done(layout, prepared, kept_copies)


def _done(layout: Layout, prepared: Prepared, kept_copies: tuple[Path, ...]) -> Export:
    return Export(
        names=tuple(name for name, _ in prepared.patches),
        written=tuple(name for name in prepared.plan.changed if name != series.SERIES_FILE),
        removed=prepared.plan.gone,
        kept_copies=kept_copies,
        unlisted=_unlisted(prepared.folder, prepared.plan),
        edits=prepared.edits,
        folder=layout.relative(prepared.folder),
        tree=prepared.tree,
        untracked=prepared.untracked,
        checkout=layout.relative(prepared.git.path),
    )


def show(done: Export, *, console: Console) -> None:
    """Print what an export did."""
    count = counted(len(done.names), "patch", "patches")
    count = f"{count} in {done.folder}, tree {done.tree[:12]}"
    for verb, names in (("wrote", done.written), ("removed", done.removed)):
        for name in names:
            console.info(f"{verb} {done.folder}/{name}")
    for path in done.kept_copies:
        console.info(f"kept a copy of an edited patch that no commit holds: {path}")
    for name in done.unlisted:
        console.info(f"{done.folder}/{name} is not in the series; it was not changed")
    show_unpatched(done, console=console)
    console.info(count if done.written or done.removed else f"nothing to do: {count}")


def show_unpatched(done: Export, *, console: Console) -> None:
    """Print what the checkout has and no patch: edits and files that git does not track."""
    if done.edits:
        console.warn(f"uncommitted edits are in no patch: {series.few(done.edits)}")
    if done.untracked:
        console.warn(series.named_untracked(done.untracked))
        console.hint(series.taking_hint(done.checkout, done.untracked))


def series_of(git: Git, base: str, tip: str) -> Patches:
    """Return file name and mail of each commit in base..tip, oldest first, proven to give its tree.

    Raises PatchDrift for commits that cannot be patches.
    """
    stack, shown = am.commits(git, base, tip), str(git.path)
    patches = mail.patches_of(git, base, stack, shown=shown)
    return mail.read_back(git, base, stack, patches, shown=shown)


def write(folder: Path, *, base: str, patches: Patches) -> None:
    """Write these patches and their series for the pinned commit `base` into a folder.

    A file with the same patch in another spelling is not rewritten. The series is written last, so
    that a second call finishes what a killed one began. Raises ToolchainError.
    """
    _write(folder, _plan(folder, base, patches))


def set_template(git: Git, run_log: RunLog) -> None:
    """Make `git commit` in a checkout begin with the trailer that a patch needs.

    A commit template of the user's own stays.
    """
    file = git.path_of("workspace-commit-template")
    chosen = git.look("config", "--get", "commit.template", check=False).out.rstrip("\n")
    # The template of a clone that was moved or copied is also ours.
    if chosen and not chosen.endswith(f"/{file.name}"):
        return
    with contextlib.suppress(OSError):
        if not file.exists() or read_regular(file) != TEMPLATE.encode():
            write_atomic(file, TEMPLATE.encode())
        if chosen != str(file):
            git.set_setting("commit.template", str(file), run_log=run_log)


def _ready(git: Git, checkout: Checkout, shown: str) -> tuple[str, str]:
    """Return the base and the tip of a stack that can be exported. Raises CheckoutError."""
    if checkout.kind is Kind.MISSING:
        raise CheckoutError(
            f"{shown} does not exist, so there are no commits to export",
            hint=hints.text("inv.bootstrap"),
        )
    if checkout.base is None or checkout.head is None:
        raise CheckoutError(
            f"{shown} is {checkout.detail}, so there is no stack to export",
            hint=hints.text("inv.status"),
        )
    if verb := git.under_way():
        raise CheckoutError(
            f"{shown} is in the middle of a git {verb}; finish it before an export",
            hint=hints.text("repo.continue_or_abort"),
        )
    return checkout.base, checkout.head


def _refuse_foreign(git: Git, base: str, head: str, stack: Sequence[Commit], shown: str) -> None:
    """Raise CheckoutError where the base is no ancestor of HEAD: no new commit is then on it."""
    if head != base and not any(base in commit.parents for commit in stack):
        tip = TIP_REF if git.resolve(TIP_REF) else base[:12]
        back = hints.text("repo.detach", shown=shown, commit=tip)
        raise CheckoutError(
            f"{shown} is at {head[:12]}, which is not on {base[:12]}: nothing was exported",
            hint=hints.text("repo.on_a_branch", command=series.kept(shown, git, head, back)),
        )


def _plan(folder: Path, base: str, patches: Patches) -> _Plan:
    """Decide what to write and remove; keep a file with the same patch in another spelling."""
    text = series.text_of(folder)
    names = tuple(name for name, _ in patches)
    gone = tuple(name for name in series.entries(text) if name not in names)
    present: dict[str, bytes | None] = {}
    for name in (*names, *gone):
        with contextlib.suppress(OSError):
            present[name] = read_regular(folder / name)
    files = {
        name: (
            now
            if (now := present.setdefault(name, None)) and now != new and mail.same_change(now, new)
            else new
        )
        for name, new in patches
    }
    heading = (
        f"# Patches on {folder.name}, applied from top to bottom. One file name per line; a comment"
        " begins with #.\n"
    )
    merged = series.with_entries(text or heading, names, base)
    return _Plan(
        {**present, series.SERIES_FILE: text.encode() if text else None},
        files | {series.SERIES_FILE: merged.encode()},
        gone,
    )


def _former(git: Git) -> Mapping[str, bytes]:
    """Return the patches of the stack that was applied or exported last.

    There are none where git cannot make them.
    """
    base, tip = git.resolve_all(BASE_REF, TIP_REF)
    if not base or not tip or base == tip:
        return {}
    with contextlib.suppress(PatchDrift, CheckoutError):
        return dict(mail.patches_of(git, base, am.commits(git, base, tip), shown=str(git.path)))
    return {}


def _refuse_unapplied(layout: Layout, prepared: Prepared) -> None:
    """Raise PatchDrift for a patch of the series that was never applied here."""
    plan, place = prepared.plan, layout.relative(prepared.folder)
    unknown = [name for name in plan.gone if name not in prepared.former or not prepared.patches]
    if not unknown:
        return
    shown = layout.relative(prepared.git.path)
    way = _applying_way(shown, prepared) if prepared.patches else hints.text("inv.patch_apply")
    raise PatchDrift(
        f"{place}/{unknown[0]} is in the series, and {shown} has no commit of it"
        + (f"; and {len(unknown) - 1} more" if len(unknown) > 1 else ""),
        hint=hints.text("repo.apply_or_drop", command=way, path=f"{place}/{series.SERIES_FILE}"),
        details=tuple(f"{place}/{name}" for name in unknown[1:10]),
    )


def _applying_way(shown: str, prepared: Prepared) -> str:
    """Return the command line that applies the series anew, and puts the user's commits on it.

    A branch keeps the present commits. Those after the former tip are picked; the commit of the tip
    is named, as its reference moves with the series.
    """
    git, head = prepared.git, prepared.head
    tip, base = git.resolve(TIP_REF) or prepared.base, prepared.base[:12]
    apply, branch = hints.text("inv.patch_apply"), series.kept_as(head)
    way = hints.text("repo.detach_then", shown=shown, commit=base, command=apply)
    if tip != head:
        way = hints.text("repo.apply_and_pick", shown=shown, base=base, tip=tip[:12], branch=branch)
    return series.kept(shown, git, head, way)


def _refuse_edited(layout: Layout, prepared: Prepared) -> None:
    """Raise PatchDrift for a patch file that was edited while its commit was not."""
    plan, place = prepared.plan, layout.relative(prepared.folder)
    patches = dict(prepared.patches)
    for name in plan.changed:
        text, former, now = plan.present.get(name), prepared.former.get(name), patches.get(name)
        if not (text and former and now and mail.same_change(former, now)):
            continue
        if mail.same_change(text, now, anywhere=True):
            continue
        if not prepared.git.patch_paths(prepared.folder / name):
            raise PatchDrift(
                f"{place}/{name} is no longer a patch that git can read, since it was applied;"
                " nothing was written",
                hint=hints.text("repo.stash_patch", path=f"{place}/{name}"),
            )
        shown = layout.relative(prepared.git.path)
        raise PatchDrift(
            f"{place}/{name} was changed since it was applied, and its commit in {shown} was not;"
            " nothing was written",
            hint=hints.text(
                "repo.take_file_or_commit",
                command=_applying_way(shown, prepared),
                path=f"{place}/{name}",
            ),
        )


def _check(layout: Layout, folder: Path, plan: _Plan, console: Console) -> None:
    """Print what an export would change. Raises PatchDrift for any change."""
    place = layout.relative(folder)
    differing = {
        **plan.changed,
        **{name: b"" for name in plan.gone if plan.present.get(name) is not None},
    }
    for name, content in sorted(differing.items()):
        old, new = (
            (text or b"").decode(errors="backslashreplace").splitlines()
            for text in (plan.present.get(name), content)
        )
        for line in difflib.unified_diff(
            old, new, f"a/{place}/{name}", f"b/{place}/{name}", lineterm=""
        ):
            console.data(line)
    if differing:
        raise PatchDrift(
            f"{place} differs from the commits: {', '.join(sorted(differing))}",
            hint=hints.text("inv.patch_export"),
        )


def _keep_copies(layout: Layout, folder: Path, plan: _Plan, known: set[bytes]) -> tuple[Path, ...]:
    """Copy files that will be overwritten or removed and that no commit holds; return the copies.

    Neither the superproject nor the checkout has their content.
    """
    lost = {
        name: text
        for name in (*plan.changed, *plan.gone)
        if name != series.SERIES_FILE and (text := plan.present.get(name)) and text not in known
    }
    if not lost:
        return ()
    outer = checkouts.superproject(layout)
    committed = outer.entries([layout.relative(folder)], "HEAD") if outer and outer.head() else {}
    copies = []
    for name, text in lost.items():
        oid = hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()
        if committed.get(f"{layout.relative(folder)}/{name}", "").endswith(oid):
            continue
        copy = layout.state / "removed-patches" / f"{name.removesuffix('.patch')}-{oid[:8]}.patch"
        write_atomic(copy, text)
        copies.append(copy)
    return tuple(copies)


def _write(folder: Path, plan: _Plan) -> None:
    """Write the patches, remove others, then write the series.

    A killed run leaves the old series, and the next run finishes.
    """
    changed = dict(plan.changed)
    text = changed.pop(series.SERIES_FILE, None)
    # A killed run may have left an empty scratch folder although no file is to be written now.
    files.sweep_beside(folder)
    if changed:
        folder.mkdir(parents=True, exist_ok=True)
        with files.folder_beside(folder) as scratch:
            for name, content in changed.items():
                (scratch / name).write_bytes(content)
            # One sync for all: a hundred files one by one take a third of a second.
            os.sync()
            for name in changed:
                os.replace(scratch / name, folder / name)
    for name in plan.gone:
        if plan.present.get(name) is not None:
            (folder / name).unlink(missing_ok=True)
    if text is not None:
        write_atomic(folder / series.SERIES_FILE, text)


def _unlisted(folder: Path, plan: _Plan) -> tuple[str, ...]:
    """Return the patch files that the series neither lists nor names in a comment."""
    comments = {
        found[1]
        for line in plan.files[series.SERIES_FILE].decode().split("\n")
        if (found := _COMMENTED.search(line))
    }
    known = {*plan.files, *plan.gone, *comments}
    return tuple(sorted(path.name for path in folder.glob("*.patch") if path.name not in known))
