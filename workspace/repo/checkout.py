"""The checkouts under vendor/: what is there, and how one comes to be.

A checkout that is there is never overwritten. A new one is made aside and put in place with
renames.
"""

import enum
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workspace.core import files
from workspace.core.console import Step
from workspace.core.errors import CheckoutError, SourceError
from workspace.core.files import write_atomic
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.repo import git, index, pins
from workspace.repo.git import Git
from workspace.repo.pins import Pin

Choice = Literal["auto", "git", "release"]
_PROGRESS = re.compile(r"(?:remote: )?([A-Z][a-z ]+):\s+\d+% \((\d+)/(\d+)\)")


class Kind(enum.Enum):
    MISSING = "missing"
    GIT = "git"
    RELEASE = "release"
    FOREIGN = "foreign"


@dataclass(frozen=True)
class Checkout:
    """What lies at the place of a checkout. `base` is the commit that the patches go on, `detail` a
    phrase for a person.
    """

    kind: Kind
    base: str | None
    head: str | None
    detail: str


def folder_of(layout: Layout, pin: Pin) -> Path:
    return layout.triton if pin.name == "triton" else layout.vllm


def observe(layout: Layout, pin: Pin) -> Checkout:
    """Look what is there; nothing is fetched or written.

    Raises CheckoutError where git refuses to look, as it does in a folder of another user.
    """
    path = folder_of(layout, pin)
    try:
        if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
            return Checkout(Kind.MISSING, None, None, "not there")
    except OSError as exc:
        raise CheckoutError(
            f"{layout.relative(path)} cannot be read: {exc.strerror}",
            hint=f"ls -la {layout.relative(path)}",
        ) from exc
    if not os.path.lexists(path / ".git"):
        return Checkout(Kind.FOREIGN, None, None, "not a git checkout")
    repository = Git(path)
    place = repository.place()
    # Where .git is no repository, git goes up and finds that of the workspace.
    if place is None or place.top.resolve() != path.resolve():
        return Checkout(Kind.FOREIGN, None, None, "has a .git that is no repository")
    head = repository.head()
    known = {pin.commit: Kind.GIT} | ({pin.archive.commit: Kind.RELEASE} if pin.archive else {})
    present = repository.present(tuple(known))
    bases = [commit for commit in known if commit in present]
    if len(bases) > 1 and head:
        # A release checkout into which somebody fetched upstream holds both.
        bases.sort(key=lambda commit: not repository.is_ancestor(commit, head))
    if not bases:
        return Checkout(
            Kind.FOREIGN, None, head, f"a repository without {pin.tag} ({pin.commit[:12]})"
        )
    kind = known[bases[0]]
    return Checkout(
        kind,
        bases[0],
        head,
        f"{pin.tag} from {'git' if kind is Kind.GIT else 'the release archive'}",
    )


def ensure(
    layout: Layout, pin: Pin, settings: Settings, *, choice: Choice, run_log: RunLog, step: Step
) -> Checkout:
    """Make the checkout where there is none, and return what is there.

    Raises CheckoutError for something else in its place, or for a checkout of the other kind than
    `choice` asks for; SourceError where it cannot be fetched or is not what was pinned.
    """
    found = observe(layout, pin)
    if found.kind is Kind.FOREIGN:
        raise _foreign(layout, pin, found)
    if found.kind is not Kind.MISSING:
        if choice not in ("auto", found.kind.value):
            raise _other_kind(layout, pin, found, choice)
        return found
    if choice == "release" or not _made_from_git(layout, pin, settings, choice, run_log, step):
        _make_from_archive(layout, pin, settings, step)
    made = observe(layout, pin)
    if made.base is None:
        raise _foreign(layout, pin, made)
    return made


def protect(layout: Layout, *, run_log: RunLog | None = None) -> None:
    """Keep the superproject's own verbs from moving, fetching or staging what lies in vendor/vllm;
    touches nothing where that is so already.
    """
    outer = superproject(layout)
    if outer is None:
        return
    for key in ("fetch.recurseSubmodules", "submodule.recurse"):
        outer.set_setting(key, "false", run_log=run_log)
    path = layout.relative(layout.vllm)
    link = outer.gitlink(path)
    if link is None or link.hidden or not os.path.lexists(layout.vllm / ".git"):
        return
    # A release checkout or a patched one: `git add -A` would stage its commit as if it were a new
    # pin.
    if Git(layout.vllm).head() != link.commit:
        outer.hide(path, run_log=run_log)


def sweep(layout: Layout, pin: Pin) -> None:
    """Remove what runs that were killed right after the checkout was put in place have left beside
    it, and beside its git directory.
    """
    for place in filter(None, (folder_of(layout, pin), _modules(layout, pin))):
        files.sweep_beside(place)


def superproject(layout: Layout) -> Git | None:
    """The workspace's own repository, or None for a copy that is none, or lies inside another
    one.
    """
    outer = Git(layout.root)
    place = outer.place()
    return outer if place and place.top.resolve() == layout.root.resolve() else None


def _made_from_git(
    layout: Layout, pin: Pin, settings: Settings, choice: Choice, run_log: RunLog, step: Step
) -> bool:
    """Make the checkout from git, or say why not and return False where `choice` leaves that
    open.
    """
    modules = _modules(layout, pin)
    if modules and modules.exists() and any(modules.iterdir()):
        _restore(layout, pin, settings, modules, run_log, step)
        return True
    url = url_of(layout, pin, settings)
    try:
        references = _advertised(layout, pin, settings, url)
    except SourceError as exc:
        if choice == "git" or pin.archive is None or isinstance(exc, _Moved):
            raise
        run_log.console.warn(
            f"{exc.message}; taking the release archive instead, which has no history: no version"
            " from git, no upstream commits in forecasts"
        )
        return False
    _clone(layout, pin, settings, modules, references, run_log, step)
    return True


def _make_from_archive(layout: Layout, pin: Pin, settings: Settings, step: Step) -> None:
    if pin.archive is None:
        raise SourceError(
            f"{pin.name} has no release archive in vendor/pins.toml",
            hint="./scripts/inv bootstrap --source git",
        )
    name = pin.archive.filename
    file = index.fetch(
        pin.name,
        name,
        pin.archive.sha256,
        settings=settings,
        on_progress=lambda done, total: step.progress(done, total, f"bytes of {name}"),
    )
    pins.make_from_archive(
        file,
        folder_of(layout, pin),
        pin,
        on_progress=lambda done, total: step.progress(done, total, f"unpacking {name}"),
    )


def _clone(
    layout: Layout,
    pin: Pin,
    settings: Settings,
    modules: Path | None,
    references: Mapping[str, str],
    run_log: RunLog,
    step: Step,
) -> None:
    """Fetch the pin into a new repository and put it in place: as a submodule where `modules` says
    where its git directory goes.
    """
    path = folder_of(layout, pin)
    url = url_of(layout, pin, settings)
    refspecs = _refspecs(pin, references)
    # A server may refuse filters, or refuse the contents that a filter left out; then all of it is
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
                made.fetch(
                    url,
                    wanted,
                    whole=whole,
                    settings=settings,
                    run_log=run_log,
                    on_line=shown(step),
                )
                _check_pin(made, pin, url)
                if (
                    f"refs/tags/{pin.tag}" not in references
                    and f"refs/heads/{pin.tag}" not in references
                ):
                    # setuptools-scm derives the version from it; that it belongs to this commit,
                    # the pins say.
                    made.set_ref(f"refs/tags/{pin.tag}", pin.commit)
                made.check_out(pin.commit, settings=settings, run_log=run_log, on_line=shown(step))
            except SourceError:
                if number == len(attempts):
                    raise
                _advertised(layout, pin, settings, url)
                run_log.write("the remote did not serve a partial clone; asking for more")
                continue
            if (made.head(), made.edits()) != (pin.commit, ()):
                raise SourceError(
                    f"the files of {pin.tag} from {git.without_user(url)} are not those of its"
                    " commit",
                    hint="git config --show-origin --list    shows what may change them",
                )
            if modules:
                _settle(layout, pin, made, modules)
                files.put_in_place(git_dir, modules)
            files.put_in_place(tree, path)
            return


def _restore(
    layout: Layout, pin: Pin, settings: Settings, modules: Path, run_log: RunLog, step: Step
) -> None:
    """Write the files of a submodule whose git directory is there: what its index and HEAD hold,
    the user's commits included.
    """
    path = folder_of(layout, pin)
    with files.folder_beside(path) as holder:
        tree = holder / "tree"
        tree.mkdir()
        kept = Git(tree, git_dir=modules, failure=SourceError)
        if pin.commit not in kept.present((pin.commit,)):
            url = url_of(layout, pin, settings)
            whole = kept.setting("remote.origin.promisor") != "true"
            kept.fetch(
                url,
                _refspecs(pin, _advertised(layout, pin, settings, url)),
                whole=whole,
                settings=settings,
                run_log=run_log,
                on_line=shown(step),
            )
            _check_pin(kept, pin, url)
        if kept.head() is None or not (modules / "index").exists():
            kept.check_out(
                kept.head() or pin.commit, settings=settings, run_log=run_log, on_line=shown(step)
            )
        else:
            kept.write_files()
        _settle(layout, pin, kept, modules)
        files.put_in_place(tree, path)


def _settle(layout: Layout, pin: Pin, made: Git, modules: Path) -> None:
    """Tie a submodule's files, its git directory and the superproject together, as `git submodule
    update` would find them.
    """
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
        outer.set_setting(f"submodule.{name}.url", made.setting("remote.origin.url") or pin.url)
        outer.set_setting(f"submodule.{name}.active", "true")


def _check_pin(made: Git, pin: Pin, url: str) -> None:
    if pin.commit not in made.present((pin.commit,)):
        raise SourceError(
            f"{git.without_user(url)} did not serve {pin.tag}, commit {pin.commit}",
            hint="set VLLM_MIRROR to a copy that has it, or inv bootstrap --source release",
        )


def _modules(layout: Layout, pin: Pin) -> Path | None:
    """Where the superproject keeps the git directory of this submodule, or None where it is no
    submodule here.
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
    """Where the project is fetched from: its mirror if one is set, a path made absolute, else the
    pinned address.
    """
    mirror = settings.text(f"{pin.name.upper()}_MIRROR")
    if not mirror or re.match(r"[a-z+]+://|[^/]+:", mirror):
        return mirror or pin.url
    return str(layout.root / Path(mirror).expanduser())


def _advertised(layout: Layout, pin: Pin, settings: Settings, url: str) -> Mapping[str, str]:
    """Ask the remote for the pinned tag. Raises SourceError where it cannot be reached or its tag
    is another commit.
    """
    tag = f"refs/tags/{pin.tag}"
    names = (tag, f"{tag}^{{}}", f"refs/heads/{pin.tag}")
    references = git.advertised(
        url,
        names,
        cwd=layout.root,
        settings=settings,
        timeout_s=float(settings.count("CONNECT_TIMEOUT_S") or 5),
    )
    found = references.get(f"{tag}^{{}}", references.get(tag, pin.commit))
    if found != pin.commit:
        raise _Moved(
            f"tag {pin.tag} at {git.without_user(url)} is commit {found}, pinned is {pin.commit}",
            hint="a tag that moved is not to be trusted: compare with the project's release page",
        )
    return references


class _Moved(SourceError):
    """A remote that was reached and serves something else: no reason to fall back in silence."""


def _refspecs(pin: Pin, references: Mapping[str, str]) -> tuple[str, ...]:
    """What to ask for: the tag, which every server gives, or the commit itself where there is no
    such tag.
    """
    tag = f"refs/tags/{pin.tag}"
    return (f"+{tag}:{tag}",) if tag in references else (pin.commit,)


def _foreign(layout: Layout, pin: Pin, found: Checkout) -> CheckoutError:
    name = layout.relative(folder_of(layout, pin))
    scratch = f"mv {name} {name.replace('/', '-')}.mine && ./scripts/inv bootstrap"
    hint = f"to keep it aside: {scratch}"
    if found.head:
        hint = f"to give it the pin: git -C {name} fetch {pin.url} {pin.commit}    or, {hint}"
    return CheckoutError(
        f"{name} is {found.detail}, expected a checkout of {pin.name} {pin.tag}; it was left as"
        " it is",
        hint=hint,
    )


def _other_kind(layout: Layout, pin: Pin, found: Checkout, choice: Choice) -> CheckoutError:
    name = layout.relative(folder_of(layout, pin))
    away = f"mv {name} {name.replace('/', '-')}.{found.kind.value}"
    if found.kind is Kind.GIT and (folder_of(layout, pin) / ".git").is_file():
        # Its commits stay in the superproject's git directory; deinit refuses where there are
        # edits.
        away = f"git submodule deinit {name}"
    return CheckoutError(
        f"{name} is {found.detail}, SOURCE asks for {choice}; it was left as it is",
        hint=(
            "to go on with it: ./scripts/inv bootstrap --source auto    or, to have the other:"
            f" {away} && ./scripts/inv bootstrap --source {choice}"
        ),
    )


def shown(step: Step) -> "git.OnLine":
    """Lead the progress that git reports to the bar of a step."""

    def on_line(line: str) -> None:
        if found := _PROGRESS.match(line.strip()):
            step.progress(int(found[2]), int(found[3]), found[1].lower())

    return on_line
