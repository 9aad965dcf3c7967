"""The checkouts under vendor/: their state, and how they are made.

An existing checkout is never overwritten. A new checkout is made in a scratch folder and moved into
place.
"""

import enum
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workspace.core import files, hints
from workspace.core.console import RunLog, Step
from workspace.core.errors import CheckoutError, SettingsError, SourceError
from workspace.core.files import write_atomic
from workspace.core.paths import PROJECTS, Layout
from workspace.core.settings import Settings, without_user
from workspace.repo import git, index, pins
from workspace.repo.git import Git, Remote, history
from workspace.repo.pins import Pin

Choice = Literal["auto", "git", "release"]
_PROGRESS = re.compile(r"(?:remote: )?([A-Z][a-z ]+):\s+\d+% \((\d+)/(\d+)\)")


class Kind(enum.Enum):
    """Kind of a checkout."""

    MISSING = "missing"
    GIT = "git"
    RELEASE = "release"
    FOREIGN = "foreign"

    @property
    def is_pinned(self) -> bool:
        """Whether the checkout is of the pin: from git, or from its release archive."""
        return self in (Kind.GIT, Kind.RELEASE)


@dataclass(frozen=True)
class Checkout:
    """A checkout's folder in its present state.

    `base` is the commit that the patches are applied to, `detail` a phrase for messages.
    """

    kind: Kind
    base: str | None
    head: str | None
    detail: str


@dataclass(frozen=True)
class _Making:
    """A checkout that is being made, and the objects that each step needs."""

    layout: Layout
    pin: Pin
    settings: Settings
    run_log: RunLog
    step: Step

    @property
    def path(self) -> Path:
        return folder_of(self.layout, self.pin)

    @property
    def url(self) -> str:
        return self.remote.url

    @property
    def remote(self) -> Remote:
        return remote(self.layout, self.pin, self.settings, self.run_log, self.step)

    @property
    def upstream(self) -> Remote:
        return remote(self.layout, self.pin.of_upstream, self.settings, self.run_log, self.step)

    def fetch(self, made: Git, refspecs: Sequence[str], *, whole: bool) -> None:
        """Fetch into the new repository and require the pinned commit. Raises SourceError."""
        made.fetch(self.remote, refspecs, whole=whole)
        if self.pin.commit not in made.present((self.pin.commit,)):
            raise SourceError(
                f"{without_user(self.url)} did not serve {self.pin.tag}, commit {self.pin.commit}",
                hint=hints.text("repo.source_release"),
            )

    def check_out(self, made: Git, commit: str) -> None:
        # Also for vendor/triton: see protect.
        made.set_setting("core.autocrlf", "false")
        made.check_out(
            commit, settings=self.settings, run_log=self.run_log, on_line=shown(self.step)
        )


def folder_of(layout: Layout, pin: Pin) -> Path:
    """Return the folder of a project's checkout."""
    return layout.triton if pin.name == "triton" else layout.vllm


def require_project(name: str) -> None:
    """Raise SettingsError where no checkout has this name."""
    if name not in PROJECTS:
        raise SettingsError(
            f"--project: {name!r} is not one of {', '.join(PROJECTS)}",
            hint=hints.text("repo.patch_vllm"),
        )


def observe(layout: Layout, pin: Pin) -> Checkout:
    """Return the state of the checkout; nothing is fetched or written.

    Raises CheckoutError where the folder cannot be read, as git refuses one of another user.
    """
    path = folder_of(layout, pin)
    try:
        if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
            return Checkout(Kind.MISSING, None, None, "missing")
    except OSError as exc:
        raise CheckoutError(
            f"{layout.relative(path)} cannot be read: {exc.strerror}",
            hint=hints.text("core.list_folder", folder=layout.relative(path)),
        ) from exc
    if not os.path.lexists(path / ".git"):
        return Checkout(Kind.FOREIGN, None, None, "not a git checkout")
    repository = Git(path)
    known = {pin.commit: Kind.GIT} | ({pin.archive.commit: Kind.RELEASE} if pin.archive else {})
    place = repository.place(*known)
    # Where .git is no repository, git finds that of the workspace, further up.
    if place is None or place.top.resolve() != path.resolve():
        return Checkout(Kind.FOREIGN, None, None, "a folder whose .git is not a repository")
    head, bases = place.head, [commit for commit in known if commit in place.present]
    if len(bases) > 1 and head:
        # A release checkout into which the user fetched upstream holds both.
        bases.sort(key=lambda commit: not repository.is_ancestor(commit, head))
    if not bases:
        return Checkout(
            Kind.FOREIGN, None, head, f"a repository without {pin.tag} ({pin.commit[:12]})"
        )
    kind = known[bases[0]]
    source = "git" if kind is Kind.GIT else "the release archive"
    return Checkout(kind, bases[0], head, f"{pin.tag} from {source}")


def ensure(
    layout: Layout, pin: Pin, settings: Settings, *, choice: Choice, run_log: RunLog, step: Step
) -> Checkout:
    """Make the checkout if it is missing, and return its state.

    Raises CheckoutError for other content in its folder, or for a checkout of another kind than
    `choice`; SourceError where it cannot be fetched or differs from the pin.
    """
    found, making = observe(layout, pin), _Making(layout, pin, settings, run_log, step)
    if found.kind is Kind.FOREIGN:
        raise _foreign(layout, pin, settings, found)
    if found.kind is not Kind.MISSING:
        if choice not in ("auto", found.kind.value):
            raise _other_kind(layout, pin, found, choice)
        _complete(making, found)
        return found
    if choice == "release" or not _make_from_git(making, choice):
        _make_from_archive(making)
    made = observe(layout, pin)
    if made.base is None:
        raise _foreign(layout, pin, settings, made)
    return made


def _complete(making: _Making, found: Checkout) -> None:
    """Fetch the base of the pin where the user fetched only the pinned commit."""
    tree, base = Git(making.path), making.pin.base
    if base and found.kind is Kind.GIT and base.commit not in tree.present((base.commit,)):
        fetch_base(tree, making.pin, making.upstream)


def protect(layout: Layout, *, run_log: RunLog | None = None) -> None:
    """Keep the superproject's own git commands from moving, fetching or staging vendor/vllm.

    The user's git leaves the line ends of vendor/vllm as they are: with core.autocrlf it would
    write others, which are edits for the git of the workspace. Settings that are right already are
    not written.
    """
    outer = superproject(layout)
    if outer is None:
        return
    keys = ("fetch.recurseSubmodules", "submodule.recurse")
    outer.set_settings(dict.fromkeys(keys, "false"), run_log=run_log)
    path = layout.relative(layout.vllm)
    if not os.path.lexists(layout.vllm / ".git"):
        return
    inner = Git(layout.vllm)
    inner.set_setting("core.autocrlf", "false", run_log=run_log)
    link = outer.gitlink(path)
    # A release checkout or a patched checkout: `git add -A` would stage its commit as a new pin.
    if link and not link.hidden and inner.head() != link.commit:
        outer.hide(path, run_log=run_log)


def sweep(layout: Layout, pin: Pin) -> None:
    """Remove scratch folders that killed runs left beside the checkout and its git directory."""
    for place in filter(None, (folder_of(layout, pin), _modules(layout, pin))):
        files.sweep_beside(place)


def superproject(layout: Layout) -> Git | None:
    """Return the workspace's own repository, or None for a copy without one or inside another."""
    outer = Git(layout.root)
    place = outer.place()
    return outer if place and place.top.resolve() == layout.root.resolve() else None


def _make_from_git(making: _Making, choice: Choice) -> bool:
    """Make the checkout from git; return False, with a warning, if an archive may be used instead.

    Raises SourceError where `choice` or the pin allow no archive.
    """
    modules = _modules(making.layout, making.pin)
    if modules and modules.exists() and any(modules.iterdir()):
        _restore(making, modules)
        return True
    try:
        references = _advertised(making)
    except SourceError as exc:
        if choice == "git" or making.pin.archive is None or isinstance(exc, _Moved):
            raise
        making.run_log.console.warn(
            f"{exc.message}; using the release archive instead, which has no history: no version"
            " from git, no upstream commits in forecasts"
        )
        return False
    _clone(making, modules, references)
    return True


def _make_from_archive(making: _Making) -> None:
    pin, step = making.pin, making.step
    archive = pins.require_archive(pin)
    name = archive.filename
    file = index.fetch(
        pin.name,
        name,
        archive.sha256,
        settings=making.settings,
        on_progress=lambda done, total: step.progress(done, total, f"bytes of {name}"),
    )
    pins.make_from_archive(file, making.path, pin, step=step)


def _clone(making: _Making, modules: Path | None, references: Mapping[str, str]) -> None:
    """Fetch the pin into a new repository and move it into place.

    It becomes a submodule if `modules` names the folder for its git directory.
    """
    path, pin = making.path, making.pin
    refspecs = _refspecs(pin, references)
    # A server may refuse filters, or refuse the contents that a filter left out; then all is
    # fetched, and at last by branches.
    attempts = [(refspecs, False), (refspecs, True)]
    if refspecs == (pin.commit,):
        attempts.append((("+refs/heads/*:refs/remotes/origin/*",), True))
    for number, (wanted, whole) in enumerate(attempts, 1):
        with files.folder_beside(path) as holder, files.folder_beside(modules or path) as scratch:
            tree = holder / "tree"
            tree.mkdir()
            git_dir = scratch / "git" if modules else tree / ".git"
            made = Git(tree, git_dir=git_dir, failure=SourceError)
            made.init()
            try:
                making.fetch(made, wanted, whole=whole)
                fetch_base(made, pin, making.upstream)
                _name_tag(made, pin, references)
                making.check_out(made, pin.commit)
            except SourceError:
                if number == len(attempts):
                    raise
                _advertised(making)
                making.run_log.write("the remote did not serve a partial clone; fetching more")
                continue
            _require_pinned_files(made, making)
            if modules:
                _link_submodule(making.layout, pin, made, modules)
                files.put_in_place(git_dir, modules)
            files.put_in_place(tree, path)
            return


def _name_tag(made: Git, pin: Pin, references: Mapping[str, str]) -> None:
    """Create the pin's tag where the remote does not offer it; setuptools-scm needs it."""
    if (
        pin.ref is None
        and not {f"refs/tags/{pin.tag}", f"refs/heads/{pin.tag}"} & references.keys()
    ):
        # The pins prove that it belongs to this commit.
        made.set_ref(f"refs/tags/{pin.tag}", pin.commit)


def _require_pinned_files(made: Git, making: _Making) -> None:
    if (made.head(), made.edits()) != (making.pin.commit, ()):
        raise SourceError(
            f"the files of {making.pin.tag} from {without_user(making.url)} differ from its commit",
            hint=hints.text("repo.git_config"),
        )


def _restore(making: _Making, modules: Path) -> None:
    """Write the files of a submodule whose git directory exists, the user's commits included."""
    path, pin = making.path, making.pin
    with files.folder_beside(path) as holder:
        tree = holder / "tree"
        tree.mkdir()
        kept = Git(tree, git_dir=modules, failure=SourceError)
        if pin.commit not in kept.present((pin.commit,)):
            whole = not kept.is_partial
            making.fetch(kept, _refspecs(pin, _advertised(making)), whole=whole)
        if kept.head() is None or not (modules / "index").exists():
            making.check_out(kept, kept.head() or pin.commit)
        else:
            kept.write_files()
        _link_submodule(making.layout, pin, kept, modules)
        files.put_in_place(tree, path)


def _link_submodule(layout: Layout, pin: Pin, made: Git, modules: Path) -> None:
    """Connect a submodule's files, git directory and superproject, as `git submodule` does."""
    path = folder_of(layout, pin)
    place = modules.parent.resolve() / modules.name
    made.set_setting("core.worktree", os.path.relpath(path.parent.resolve() / path.name, place))
    write_atomic(
        made.path / ".git",
        f"gitdir: {os.path.relpath(place, path.parent.resolve() / path.name)}\n".encode(),
    )
    outer = superproject(layout)
    name = layout.relative(path)
    if outer:
        url = made.setting("remote.origin.url") or pin.url
        outer.set_settings({f"submodule.{name}.url": url, f"submodule.{name}.active": "true"})


def _modules(layout: Layout, pin: Pin) -> Path | None:
    """Return the superproject's folder for the git directory of this submodule, or None.

    None means that the checkout is no submodule here.
    """
    outer = superproject(layout)
    name = layout.relative(folder_of(layout, pin))
    if (
        outer is None
        or outer.setting(f"submodule.{name}.path", file=layout.root / ".gitmodules") != name
    ):
        return None
    return outer.path_of(f"modules/{name}")


def url_of(layout: Layout, pin: Pin, settings: Settings) -> str:
    """Return the URL to fetch from: the mirror's if one is set, else the pinned URL.

    The path of a mirror is made absolute. A mirror is a copy of the project, not of a fork.
    """
    mirror = "" if pin.upstream else settings.text(f"{pin.name.upper()}_MIRROR")
    if not mirror or re.match(r"[a-z+]+://|[^/]+:", mirror):
        return mirror or pin.url
    return str(layout.root / Path(mirror).expanduser())


def remote(layout: Layout, pin: Pin, settings: Settings, run_log: RunLog, step: Step) -> Remote:
    """Return the remote of a project; its progress is shown in the bar of a step."""
    return Remote(url_of(layout, pin, settings), settings, run_log, shown(step))


def _advertised(making: _Making) -> Mapping[str, str]:
    """Query the remote for the pinned tag and return its references.

    Raises SourceError where the remote cannot be reached, and where its tag is another commit.
    """
    pin, tag = making.pin, f"refs/tags/{making.pin.tag}"
    if pin.ref:
        now = commit_now(making.layout, pin, making.settings)
        if now != pin.commit:
            making.run_log.console.warn(f"{moved(pin, now)}; the pinned commit is taken")
        return {}
    references = git.advertised(
        making.url,
        (tag, f"{tag}^{{}}", f"refs/heads/{pin.tag}"),
        cwd=making.layout.root,
        settings=making.settings,
    )
    found = references.get(f"{tag}^{{}}", references.get(tag, pin.commit))
    if found != pin.commit:
        raise _Moved(
            f"tag {pin.tag} at {without_user(making.url)} is commit {found}, not the pinned"
            f" {pin.commit}",
            hint=hints.text("repo.moved_tag"),
        )
    return references


def commit_now(layout: Layout, pin: Pin, settings: Settings) -> str | None:
    """Return the commit that the branch or tag of a pin has now; None where it vanished.

    Raises SourceError where the remote cannot be reached.
    """
    ref = pin.ref or f"refs/tags/{pin.tag}"
    if pins.COMMIT.fullmatch(ref):
        return ref
    url = url_of(layout, pin, settings)
    found = git.advertised(url, (ref, f"{ref}^{{}}"), cwd=layout.root, settings=settings)
    return found.get(f"{ref}^{{}}", found.get(ref))


def moved(pin: Pin, now: str | None) -> str:
    """Return the sentence on a branch or tag that moved to `now` or vanished."""
    place = without_user(pin.url)
    if now is None:
        return f"{place} has no branch or tag {pin.tag} any more"
    return f"{pin.tag} at {place} moved to {now[:12]}"


def fetch_base(made: Git, pin: Pin, remote: Remote) -> None:
    """Fetch the base release of a pinned commit, which is compared with it; name its tag.

    `remote` is that of upstream. Raises SourceError.
    """
    base = pin.base
    if base is None:
        return
    if base.commit not in made.present((base.commit,)):
        made.fetch(remote, (base.commit,), whole=not made.is_partial)
    made.set_ref(f"refs/tags/{base.tag}", base.commit)
    # What a partial clone lacks of it is fetched in one call, not file by file.
    history.complete_range(made, pin.commit, base.commit, remote.settings, run_log=remote.run_log)


class _Moved(SourceError):
    """A reachable remote serves another commit: no reason to use the archive instead."""


def _refspecs(pin: Pin, references: Mapping[str, str]) -> tuple[str, ...]:
    """Return what to fetch: the tag, which every server serves, or the commit if it has no tag."""
    tag = f"refs/tags/{pin.tag}"
    return (f"+{tag}:{tag}",) if tag in references else (pin.commit,)


def keeping_command(name: str) -> str:
    """Return the command to begin with where a foreign folder is in the place of a checkout."""
    return hints.text("repo.foreign_folder", path=name)


def _foreign(layout: Layout, pin: Pin, settings: Settings, found: Checkout) -> CheckoutError:
    path = folder_of(layout, pin)
    name, modules = layout.relative(path), _modules(layout, pin)
    hint = keeping_command(name)
    if found.head:
        url = without_user(url_of(layout, pin, settings))
        hint = hints.text("repo.fetch_pin", path=name, url=url, commit=pin.commit)
    elif (path / ".git").is_file() and modules and (modules / "HEAD").is_file():
        # A submodule's .git names its repository by a relative path, wrong after a move.
        place = os.path.relpath(modules, path)
        hint = hints.text("repo.connect_submodule", path=name, place=place)
    return CheckoutError(
        f"{name} is {found.detail}, expected a checkout of {pin.name} {pin.tag}; it was not"
        " changed",
        hint=hint,
    )


def _other_kind(layout: Layout, pin: Pin, found: Checkout, choice: Choice) -> CheckoutError:
    name = layout.relative(folder_of(layout, pin))
    other = f"../{layout.root.name}-{choice}"
    return CheckoutError(
        f"{name} is {found.detail}, but SOURCE requests {choice}; it was not changed",
        hint=hints.text("repo.keep_or_clone", other=other, choice=choice),
    )


def shown(step: Step) -> "git.OnLine":
    """Return a callback that shows git's progress in the bar of a step."""

    def on_line(line: str) -> None:
        if found := _PROGRESS.match(line.strip()):
            step.progress(int(found[2]), int(found[3]), found[1].lower())

    return on_line
