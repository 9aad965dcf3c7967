"""Commits become patch files: `inv patch.export`.

What is written is proven first to give the same tree and the same commits again. A file that says
the same in other words is left alone.
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
from typing import NamedTuple

from workspace.core import files
from workspace.core.console import Console
from workspace.core.errors import CheckoutError, PatchDrift, SettingsError
from workspace.core.files import read_regular, write_atomic
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.repo import checkout as checkouts
from workspace.repo import mail, series
from workspace.repo.checkout import Checkout, Kind
from workspace.repo.git import Git
from workspace.repo.git import am as mails
from workspace.repo.git.am import Commit
from workspace.repo.mail import Patches
from workspace.repo.pins import Pin
from workspace.repo.series import BASE_REF, TIP_REF

_BASE = re.compile(r"# base: [0-9a-f]{40}")
_COMMENTED = re.compile(r"#.*?([A-Za-z0-9_][A-Za-z0-9._+-]*\.patch)")
TEMPLATE = f"\n\n{mail.TRAILER}: Pending\n# {mail.TRAILER}: {mail.VOCABULARY}\n"


class Written(NamedTuple):
    """File names in the folder of a series."""

    written: tuple[str, ...]
    removed: tuple[str, ...]


@dataclass(frozen=True)
class Export:
    """What an export led to: the series, what was written and removed, copies of what was nowhere
    else, files beside the series, edits left out.
    """

    names: tuple[str, ...]
    written: tuple[str, ...]
    removed: tuple[str, ...]
    scratch: tuple[Path, ...]
    unlisted: tuple[str, ...]
    edits: tuple[str, ...]
    folder: str
    tree: str


@dataclass(frozen=True)
class _Plan:
    """The files as they are (None: not there) and as they shall be, the series' own among them;
    `gone` are those to be removed.
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
    """An export that was worked out and proven. `former` are the patches of the stack that was
    applied or exported last.
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


def run(
    layout: Layout,
    project: str,
    pin: Pin,
    checkout: Checkout,
    *,
    run_log: RunLog,
    check: bool = False,
) -> Export:
    """Make patches/<project> what the commits on the pin are; with `check` print the difference and
    write nothing.

    Raises CheckoutError where there is no stack, or git is in the middle of something; PatchDrift
    for commits that cannot be patches, for patches that were never applied here or changed since,
    and with `check` for any difference; SettingsError for a broken series.
    """
    prepared = prepare(layout, project, pin, checkout, proven=not check)
    if check:
        _check(layout, prepared.folder, prepared.plan, run_log.console)
        return _done(layout, prepared, ())
    return finish(layout, prepared)


def prepare(
    layout: Layout, project: str, pin: Pin, checkout: Checkout, *, proven: bool = True
) -> Prepared:
    """Work out what an export of the commits up to `checkout.head` writes, and prove it; nothing is
    written. Raises what `run` raises.
    """
    git = Git(checkouts.folder_of(layout, pin))
    shown, folder = layout.relative(git.path), layout.patches(project)
    base, head = _ready(git, checkout, shown)
    _validate(folder, pin)
    stack = mails.commits(git, base, head)
    _refuse_foreign(git, base, head, stack, shown)
    with ThreadPoolExecutor(2) as pool:
        # git looks at 7,400 files while it makes mails of the commits.
        edits, differences = pool.submit(git.edits), pool.submit(mails.differences, git, base, head)
        patches = mail.patches_of(git, base, stack, shown=shown)
        plan = _plan(folder, pin.commit, patches)
    former = (
        _former(git)
        if plan.gone or any(plan.present.get(name) is not None for name in plan.changed)
        else {}
    )
    _refuse_newer(layout, git, head, plan, dict(patches), former, folder)
    if proven and (plan.changed or plan.gone):
        _refuse_unproven(
            mails.first_failing(
                git, base, [plan.files[name] for name, _ in patches], differences.result()
            ),
            patches,
        )
    return Prepared(
        git,
        base,
        head,
        stack[-1].tree if stack else git.tree(head),
        folder,
        patches,
        plan,
        former,
        edits.result(),
    )


def finish(layout: Layout, prepared: Prepared) -> Export:
    """Write what was prepared, and let the references name the stack; what is so already is not
    touched. Raises ToolchainError.
    """
    git, plan, folder = prepared.git, prepared.plan, prepared.folder
    scratch = _keep_aside(
        layout, folder, plan, {*prepared.former.values(), *dict(prepared.patches).values()}
    )
    _put(folder, plan)
    # Last: whoever is killed before finds the stack as the last export left it, and what is written
    # is not taken for a newer series.
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(git.set_ref, (TIP_REF, BASE_REF), (prepared.head, prepared.base)))
    return _done(layout, prepared, scratch)


def _done(layout: Layout, prepared: Prepared, scratch: tuple[Path, ...]) -> Export:
    return Export(
        names=tuple(name for name, _ in prepared.patches),
        written=tuple(name for name in prepared.plan.changed if name != series.SERIES_FILE),
        removed=prepared.plan.gone,
        scratch=scratch,
        unlisted=_unlisted(prepared.folder, prepared.plan),
        edits=prepared.edits,
        folder=layout.relative(prepared.folder),
        tree=prepared.tree,
    )


def show(done: Export, *, console: Console) -> None:
    """Say what an export did."""
    count = (
        f"{len(done.names)} {'patch' if len(done.names) == 1 else 'patches'} in {done.folder}, tree"
        f" {done.tree[:12]}"
    )
    for verb, names in (("wrote", done.written), ("removed", done.removed)):
        for name in names:
            console.info(f"{verb} {done.folder}/{name}")
    for path in done.scratch:
        console.info(f"kept what was there and nowhere else: {path}")
    for name in done.unlisted:
        console.info(f"{done.folder}/{name} is not in the series; it was left as it is")
    if done.edits:
        more = f" and {len(done.edits) - 3} more" if len(done.edits) > 3 else ""
        console.warn(
            f"edits that are not committed are in no patch: {', '.join(done.edits[:3])}{more}"
        )
    console.info(count if done.written or done.removed else f"nothing to do: {count}")


def series_of(git: Git, base: str, tip: str) -> Patches:
    """Return file name and mail of each commit in base..tip, oldest first, proven to give the tree
    of `tip` again.

    Raises PatchDrift for commits that cannot be patches.
    """
    patches = mail.patches_of(git, base, mails.commits(git, base, tip), shown=str(git.path))
    _refuse_unproven(
        mails.first_failing(
            git, base, [content for _, content in patches], mails.differences(git, base, tip)
        ),
        patches,
    )
    return patches


def write(folder: Path, *, base: str, patches: Patches) -> Written:
    """Make a folder's series and patches these, for the pinned commit `base`; files that say the
    same in other words stay as they are.

    Patches first, series last: whoever is killed leaves something that a second call finishes.
    Raises ToolchainError where it cannot be written.
    """
    plan = _plan(folder, base, patches)
    _put(folder, plan)
    return Written(tuple(plan.changed), plan.gone)


def template(layout: Layout, project: str, git: Git, run_log: RunLog) -> None:
    """Have `git commit` in a checkout begin with the trailer that a patch needs, unless the user
    has a template of their own.
    """
    file = git.path_of("workspace-commit-template")
    chosen = git.look("config", "--get", "commit.template", check=False).out.rstrip("\n")
    # That of a clone which was moved, or copied, is ours too.
    if chosen and not chosen.endswith(f"/{file.name}"):
        return
    with contextlib.suppress(OSError):
        if not file.exists() or read_regular(file) != TEMPLATE.encode():
            write_atomic(file, TEMPLATE.encode())
        if chosen != str(file):
            git.set_setting("commit.template", str(file), run_log=run_log)


def _ready(git: Git, checkout: Checkout, shown: str) -> tuple[str, str]:
    """The base and the tip of a stack that can be exported."""
    if checkout.kind is Kind.MISSING:
        raise CheckoutError(
            f"{shown} is not there, so there are no commits to export",
            hint="./scripts/inv bootstrap",
        )
    if checkout.base is None or checkout.head is None:
        raise CheckoutError(
            f"{shown} is {checkout.detail}, so there is no stack to export",
            hint="./scripts/inv status",
        )
    if verb := git.under_way():
        raise CheckoutError(
            f"{shown} is in the middle of a git {verb}; its commits are exported when it has come"
            " to its end",
            hint=(
                "./scripts/inv patch.continue    or, to give it up: ./scripts/inv patch.continue"
                " --abort"
            ),
        )
    return checkout.base, checkout.head


def _refuse_foreign(git: Git, base: str, head: str, stack: Sequence[Commit], shown: str) -> None:
    """Stop where the base is no ancestor of HEAD: then none of the commits that the base lacks is
    on it.
    """
    if head != base and not any(base in commit.parents for commit in stack):
        back = (
            f"{series.keeping_hint(shown, git, head)}git -C {shown} checkout --detach"
            f" {TIP_REF if git.resolve(TIP_REF) else base[:12]}"
        )
        raise CheckoutError(
            f"{shown} is at {head[:12]}, which is not on {base[:12]}: nothing was exported",
            hint=f"to keep it aside: {back}",
        )


def _validate(folder: Path, pin: Pin) -> None:
    """Raise what series.read raises for the series as a text; patches that it names may be
    missing.
    """
    text = _text(folder)
    names = [name for line in text.split("\n") if (name := _entry(line))]
    bases = [line.strip() for line in text.split("\n") if _BASE.fullmatch(line.strip())]
    if text and (
        bases != [f"# base: {pin.commit}"]
        or len(set(names)) != len(names)
        or any("/" in name or not name.endswith(".patch") for name in names)
    ):
        series.read_series(folder, pin=pin.commit)


def _text(folder: Path) -> str:
    """The text of the series, or that of an empty one where there is none."""
    shown = f"patches/{folder.name}/{series.SERIES_FILE}"
    try:
        return read_regular(folder / series.SERIES_FILE).decode()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
        raise SettingsError(
            f"{shown} cannot be read: {reason}", hint=f"git checkout -- {shown}"
        ) from exc


def _entry(line: str) -> str:
    return line.split("#", 1)[0].strip()


def _plan(folder: Path, base: str, patches: Patches) -> _Plan:
    """Decide what is to be written and removed; a file that is the same patch in other words is
    kept.
    """
    text = _text(folder)
    names = tuple(name for name, _ in patches)
    gone = tuple(name for line in text.split("\n") if (name := _entry(line)) and name not in names)
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
    merged = _merged(
        text
        or f"# Patches on {folder.name}, applied from top to bottom. One file name a line; a remark begins with #.\n",
        names,
        base,
    )
    return _Plan(
        {**present, series.SERIES_FILE: text.encode() if text else None},
        files | {series.SERIES_FILE: merged.encode()},
        gone,
    )


def _merged(text: str, names: Sequence[str], base: str) -> str:
    """The text of a series with other entries. A remark stays before the entry that it stood
    before, else after the one that it stood after.
    """
    lines = text.removesuffix("\n").split("\n")
    start = next((number for number, line in enumerate(lines) if _BASE.fullmatch(line.strip())), 0)
    if any(map(_entry, lines[:start])) or not _BASE.fullmatch(lines[start].strip()):
        start = 0
    head = [
        line
        for line in lines[: start + 1]
        if not _entry(line) and not _BASE.fullmatch(line.strip())
    ]
    rest = [
        line
        for number, line in enumerate(lines)
        if not _BASE.fullmatch(line.strip()) and (number > start or _entry(line))
    ]
    entries = {name: line for line in rest if (name := _entry(line)) in names}
    before: dict[str, list[str]] = {}
    remarks: list[str] = []
    last = ""
    for line in rest:
        if not _entry(line):
            remarks.append(line)
        elif _entry(line) in names:
            last = _entry(line)
            before[last], remarks = remarks, []
    made = [*head, f"# base: {base}"]
    made += [] if last else remarks
    for name in names:
        made += [*before.get(name, []), entries.get(name, name), *(remarks if name == last else [])]
    return "\n".join(made) + "\n"


def _former(git: Git) -> Mapping[str, bytes]:
    """The patches of the stack that was applied or exported last, as far as they can be made."""
    base, tip = git.resolve(BASE_REF), git.resolve(TIP_REF)
    if not base or not tip or base == tip:
        return {}
    with contextlib.suppress(PatchDrift, CheckoutError):
        return dict(mail.patches_of(git, base, mails.commits(git, base, tip), shown=str(git.path)))
    return {}


def _refuse_newer(
    layout: Layout,
    git: Git,
    head: str,
    plan: _Plan,
    patches: Mapping[str, bytes],
    former: Mapping[str, bytes],
    folder: Path,
) -> None:
    """Stop where the folder says something newer than the checkout: a patch never applied here, or
    one that changed while its commit did not.
    """
    place, shown = layout.relative(folder), layout.relative(git.path)
    if unknown := [name for name in plan.gone if name not in former or not patches]:
        mine, there = series.keeping_hint(shown, git, head), f"git -C {shown}"
        keep = (
            f"{mine}{there} checkout --detach {BASE_REF} && ./scripts/inv patch.apply && {there}"
            f" cherry-pick {TIP_REF}..{series.kept_as(head)}"
        )
        way = keep if patches else "./scripts/inv patch.apply"
        raise PatchDrift(
            f"{place}/{unknown[0]} is in the series and no commit in {shown} is of it"
            + (f"; {len(unknown) - 1} more" if len(unknown) > 1 else ""),
            hint=(
                f"to have it: {way}    or, to drop it: take its line out of"
                f" {place}/{series.SERIES_FILE}"
            ),
            details=tuple(f"{place}/{name}" for name in unknown[1:10]),
        )
    for name in plan.changed:
        text = plan.present.get(name)
        if (
            text
            and former.get(name) == patches.get(name, b"")
            and not mail.same_change(text, patches[name], anywhere=True)
        ):
            if not git.patch_paths(folder / name):
                raise PatchDrift(
                    f"{place}/{name} is no patch that git can read, and was one when it was"
                    " applied; nothing was written",
                    hint=(
                        f"git checkout -- {place}/{name}    or, to take the commit: rm"
                        f" {place}/{name} && ./scripts/inv patch.export"
                    ),
                )
            raise PatchDrift(
                f"{place}/{name} was changed since it was applied, and its commit in {shown} was"
                " not; nothing was written",
                hint=(
                    "to take the file: ./scripts/inv patch.unapply && ./scripts/inv patch.apply   "
                    f" or, to take the commit: mv {place}/{name} /tmp && ./scripts/inv patch.export"
                ),
            )


def _check(layout: Layout, folder: Path, plan: _Plan, console: Console) -> None:
    """Print what an export would change. Raises PatchDrift where that is anything."""
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
            f"{place} is not what the commits are: {', '.join(sorted(differing))}",
            hint="./scripts/inv patch.export",
        )


def _refuse_unproven(failing: int, patches: Patches) -> None:
    if failing:
        what = (
            f"{patches[failing - 1][0]} does not apply"
            if failing > 0
            else "the patches give another tree than the commits"
        )
        raise PatchDrift(
            f"{what} when it is put on the base again; nothing was written",
            hint=(
                "an attributes file in the tree or in .git/info may change what git writes: git"
                " check-attr --all -- PATH"
            ),
        )


def _keep_aside(layout: Layout, folder: Path, plan: _Plan, known: set[bytes]) -> tuple[Path, ...]:
    """Copy what is about to be overwritten or removed, and is in no commit of the superproject or
    the checkout.
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


def _put(folder: Path, plan: _Plan) -> None:
    """Write the patches, take away those that go, then write the series: whoever is killed before
    finds in it all that is to be done.
    """
    changed = dict(plan.changed)
    text = changed.pop(series.SERIES_FILE, None)
    # One that was killed may have left an empty folder, and nothing to write anew.
    files.sweep_beside(folder)
    if changed:
        folder.mkdir(parents=True, exist_ok=True)
        with files.folder_beside(folder) as scratch:
            for name, content in changed.items():
                (scratch / name).write_bytes(content)
            # One call for all: a hundred files one by one take a third of a second.
            os.sync()
            for name in changed:
                os.replace(scratch / name, folder / name)
    for name in plan.gone:
        if plan.present.get(name) is not None:
            (folder / name).unlink(missing_ok=True)
    if text is not None:
        write_atomic(folder / series.SERIES_FILE, text)


def _unlisted(folder: Path, plan: _Plan) -> tuple[str, ...]:
    """Patch files that the series neither names nor has as a remark."""
    remarks = {
        found[1]
        for line in plan.files[series.SERIES_FILE].decode().split("\n")
        if (found := _COMMENTED.search(line))
    }
    known = {*plan.files, *plan.gone, *remarks}
    return tuple(sorted(path.name for path in folder.glob("*.patch") if path.name not in known))
