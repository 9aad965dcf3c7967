"""Remotes: queries, patches by HTTP, fetches, shallow clones, and the store of commits."""

import functools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from workspace.core import hints, process
from workspace.core.console import RunLog
from workspace.core.errors import SourceError
from workspace.core.files import opened, reason_of, received, write_atomic
from workspace.core.settings import Settings, without_user
from workspace.repo.git import command
from workspace.repo.git.command import OnLine, executable, first_line
from workspace.repo.git.repository import NO_BLOBS, Git, Remote

if TYPE_CHECKING:
    import requests

# A patch of 5 MB is large; a larger file is a release, or a mistake.
LARGEST_BYTES = 64 << 20
LONGEST_S = 120.0


def advertised(
    url: str, names: Sequence[str], *, cwd: Path, settings: Settings
) -> Mapping[str, str]:
    """Return the references that a remote offers: name to OID, an annotated tag's commit as
    `NAME^{}`.

    git has no connect time-out: after CONNECT_TIMEOUT_S without an answer it is ended with all its
    children. Raises SourceError where the remote cannot be reached.
    """
    argv = [executable(), "ls-remote", "--", url, *names]
    environment = settings.child_environment("git", command.git_environment(offline=False))
    hint, timeout_s = hints.text("repo.network_or_mirror"), settings.connect_timeout_s
    try:
        answer = process.capture(argv, cwd=cwd, env=environment, timeout_s=timeout_s)
    except process.NoAnswer:
        raise SourceError(
            f"{without_user(url)} gave no answer in {timeout_s:g} s (CONNECT_TIMEOUT_S)", hint=hint
        ) from None
    if answer.returncode != 0:
        reason = first_line(answer.stderr) or process.describe_status(answer.returncode)
        reason = re.sub(r"^unable to access '[^']*': ", "", reason)
        raise SourceError(f"{without_user(url)} cannot be read: {without_user(reason)}", hint=hint)
    return {
        name: oid
        for oid, name in (
            line.split("\t", 1) for line in answer.stdout.splitlines() if "\t" in line
        )
    }


UPSTREAM = "refs/remotes/origin/main"


def is_branch_name(git: Git, name: str) -> bool:
    """Return whether git accepts `name` for a branch (git-check-ref-format(1))."""
    return (
        bool(name)
        and git.look("check-ref-format", "--branch", name, check=False).out.strip() == name
    )


def add_worktree(git: Git, path: Path, commit: str, remote: Remote) -> None:
    """Make a working tree at `path`, HEAD detached at a commit. Raises SourceError.

    A partial clone fetches the contents of the files from `remote`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    git.talk(
        ("worktree", "add", "--force", "--detach", str(path.absolute()), commit),
        remote.settings,
        remote.run_log,
        remote.on_line,
    )


def create_branch(worktree: Git, name: str, commit: str, *, run_log: RunLog) -> None:
    """Create a branch at a commit and check it out. Raises CheckoutError for a name in use."""
    worktree.write("checkout", "--quiet", "--no-track", "-b", name, commit, run_log=run_log)


def write_tree(git: Git, commit: str, folder: Path) -> None:
    """Write all files of a commit below `folder`, made if missing; overwrite existing files."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="workspace-index-") as scratch:
        environment = {"GIT_INDEX_FILE": f"{scratch}/index"}
        git.write("read-tree", commit, env=environment)
        git.write(
            "checkout-index",
            "--all",
            "--force",
            "--quiet",
            f"--prefix={folder.absolute()}/",
            env=environment,
        )


_REF = "refs/external/wanted"
_FETCH_FLAGS = ("--progress", "--no-tags", "--no-write-fetch-head", "--recurse-submodules=no")
_ALL = ("+refs/heads/*:refs/external/heads/*", "+refs/tags/*:refs/external/tags/*")
_HOST = "https://github.com/"
# Messages of servers that serve only branches and tags, or only complete history.
_REFUSES_SINGLE = re.compile(r"not our ref|unadvertised object|does not support shallow")


def clone_shallow(
    folder: Path,
    url: str,
    revision: str,
    *,
    submodules: Sequence[str] | None,
    mirror: str,
    settings: Settings,
    run_log: RunLog,
    on_line: OnLine,
) -> str:
    """Check `revision` (commit, tag or branch) out into an empty folder and return the commit.

    `submodules`: their paths, None for all. `mirror`, a URL or a folder, replaces
    https://github.com/ where it is not empty, also in the addresses of submodules. Raises
    SourceError.
    """
    git = Git(folder, failure=SourceError)
    git.init()
    # In a file: a password in the mirror's address must not reach a command line or a log.
    replacement = git.path_of("mirror")
    write_atomic(replacement, _mirror_config(mirror).encode(), mode=0o600)

    def talk(*args: str) -> None:
        git.talk(("-c", f"include.path={replacement}", *args), settings, run_log, on_line)

    try:
        commit = _fetch_revision(git, url, revision, talk)
        git.write("checkout", "--quiet", "--detach", commit)
        if submodules is None or submodules:
            chosen = ("--", *submodules) if submodules else ()
            # Without .gitmodules this does nothing.
            update = ("update", "--init", "--recursive", "--depth=1", "--progress")
            talk("submodule", *update, *chosen)
    finally:
        replacement.unlink(missing_ok=True)
    return commit


def _fetch_revision(git: Git, url: str, revision: str, talk: Callable[..., None]) -> str:
    """Fetch one revision, or all where the server serves no single commit; return its commit."""
    try:
        talk("fetch", *_FETCH_FLAGS, "--depth=1", url, f"+{revision}:{_REF}")
        commit = git.resolve(_REF)
    except SourceError as exc:
        if not any(_REFUSES_SINGLE.search(line) for line in exc.details):
            raise
        talk("fetch", *_FETCH_FLAGS, url, *_ALL)
        commit = git.resolve(revision)
    if commit is None:
        raise SourceError(f"{url} did not serve {revision}")
    return commit


def _mirror_config(mirror: str) -> str:
    """Return the git configuration that replaces GitHub's address by that of the mirror."""
    if not mirror:
        return ""
    place = (
        mirror
        if "://" in mirror or not Path(mirror).expanduser().is_absolute()
        else str(Path(mirror).expanduser())
    )
    lines = f'[url "{_quoted(place.rstrip("/"))}/"]\n\tinsteadOf = {_HOST}\n'
    # By default git refuses submodules from a folder (CVE-2022-39253). A user who names a folder as
    # the mirror trusts it.
    is_local = place.startswith(("/", "file://"))
    return lines + ('[protocol "file"]\n\tallow = always\n' if is_local else "")


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


_WHOLE = ("fetch", *_FETCH_FLAGS, "--refetch", "--no-filter", "origin")


def open_store(path: Path, checkout: Path) -> Git:
    """Return the store at `path`, made if missing, which borrows the objects of `checkout`.

    Raises SourceError.
    """
    objects = Git(checkout).path_of("objects")
    path.mkdir(parents=True, exist_ok=True)
    store = Git(path, failure=SourceError)
    found = store.look("rev-parse", "--absolute-git-dir", check=False).out.rstrip("\n")
    if os.path.realpath(found) != os.path.realpath(path):
        # A store that a power cut damaged is no repository for git, which would then use the
        # repository around the folder.
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(exist_ok=True)
        store.write(
            "-c", "init.defaultBranch=main", "init", "--quiet", "--bare", "--template=", str(path)
        )
        os.sync()
    borrowed = path / "objects" / "info" / "alternates"
    line = f"{objects}\n".encode(errors="surrogateescape")
    if not borrowed.is_file() or borrowed.read_bytes() != line:
        write_atomic(borrowed, line)
    return store


def complete_store(store: Git, ends: tuple[str, str], remote: Remote, refspec: str) -> None:
    """Fetch what a partial store lacks to compare two commits.

    Fetch all of `refspec` where the remote serves no single objects. Raises SourceError.
    """
    settings = (("url", remote.url), ("promisor", "true"), NO_BLOBS)
    store.set_settings({f"remote.origin.{key}": value for key, value in settings})
    # git fetches in one call what a diff lacks.
    missing = ("diff", "--shortstat", "--no-renames", "-O/dev/null", *ends, "--")
    try:
        store.talk(missing, remote.settings, remote.run_log, remote.on_line)
    except SourceError:
        remote.run_log.write("the remote serves no single objects; fetching all of them")
        whole = (*_WHOLE, refspec)
        store.talk(whole, remote.settings, remote.run_log, remote.on_line)


_MAIN = "refs/requests/main"


@dataclass(frozen=True)
class Request:
    """A pull request: its commits are base..head, without those of the main that it merged.

    `merges` is the number of merges among them.
    """

    base: str
    head: str
    merges: int


def fetch_request(git: Git, number: int, pinned: str, remote: Remote) -> Request:
    """Fetch a pull request, with all contents that its diffs need.

    Raises SourceError where the remote cannot be reached, or has no such request.
    """
    name, head = f"refs/pull/{number}/head", f"refs/requests/{number}"
    if name not in advertised(remote.url, (name,), cwd=git.path, settings=remote.settings):
        raise SourceError(f"{without_user(remote.url)} has no {name}")
    git.fetch(remote, (f"+HEAD:{_MAIN}", f"+{name}:{head}"), whole=False)
    # The base of the request and of a merge of main and pin (git-merge-base(1)): a request may be
    # for the branch of a release.
    bases = git.look("merge-base", head, _MAIN, pinned, check=False).out.split()
    if not bases:
        raise SourceError(
            f"{name} of {without_user(remote.url)} has no history in common with main"
        )
    commits = f"{bases[0]}..{head}"
    if git.is_partial:
        # git fetches what it lacks for a diff.
        for args in (("log", "--shortstat"), ("diff", "--shortstat")):
            missing = (*args, "--no-renames", "-O/dev/null", commits, "--")
            git.talk(missing, remote.settings, remote.run_log, remote.on_line)
    merges = git.look("rev-list", "--merges", commits, "--").out.split()
    return Request(bases[0], git.resolve(head) or head, len(merges))


def fetched(url: str, settings: Settings) -> bytes:
    """Fetch the content of a URL without any credentials. Raises SourceError."""
    import requests

    shown = without_user(url)
    hint = hints.text("repo.address_or_file")
    timeout_s = settings.connect_timeout_s
    try:
        with requests.Session() as session:
            check = functools.partial(_check_redirect, url)
            # Without this, requests would send the credentials that ~/.netrc has for the host.
            session.auth = _no_credentials
            with opened(url, timeout_s=timeout_s, session=session, check_redirect=check) as reply:
                reply.raise_for_status()
                return b"".join(received(reply, LARGEST_BYTES, longest_s=LONGEST_S))
    except requests.HTTPError as exc:
        raise SourceError(f"{shown}: {reason_of(exc)}", hint=hint) from exc
    except (requests.RequestException, ValueError) as exc:
        reason = without_user(reason_of(exc))
        raise SourceError(f"{shown} could not be fetched: {reason}", hint=hint) from exc


def _check_redirect(typed: str, target: str) -> None:
    """Raise ValueError for a redirect to another host than the typed one, GitHub's content aside.

    A page must not choose an address at which a service of this machine, or the metadata of a cloud
    (169.254.169.254), answers. GitHub serves mails from a host of its own.
    """
    old, new = urlsplit(typed), urlsplit(target)
    if new.scheme not in ("http", "https") or (old.scheme, new.scheme) == ("https", "http"):
        raise ValueError(f"it redirects to {new.scheme}, which is refused")
    is_same = new.hostname == old.hostname and (new.port or 443) in (old.port or 443, 443)
    is_github = (
        old.hostname in ("github.com", "gist.github.com")
        and (new.scheme, new.port or 443) == ("https", 443)
        and (new.hostname or "").endswith(".githubusercontent.com")
    )
    if not (is_same or is_github):
        raise ValueError(f"it redirects to another host, {new.netloc.rpartition('@')[2]}")


def _no_credentials(request: "requests.PreparedRequest") -> "requests.PreparedRequest":
    return request
