"""What a remote is asked without a repository, and how its address is shown."""

import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from workspace.core import process
from workspace.core.errors import SourceError, ToolchainError
from workspace.core.files import write_atomic
from workspace.core.log import RunLog
from workspace.core.settings import Settings
from workspace.repo.git import command, history
from workspace.repo.git.command import OnLine, executable, first_line
from workspace.repo.git.repository import Git


def advertised(
    url: str, names: Sequence[str], *, cwd: Path, settings: Settings, timeout_s: float
) -> Mapping[str, str]:
    """Ask a remote for references: name to OID, an annotated tag's commit under `NAME^{}`.

    git itself has no connect time-out: a probe that does not answer within `timeout_s` seconds is
    ended with all its children. Raises SourceError where the remote cannot be reached.
    """
    argv = [executable().GIT_PYTHON_GIT_EXECUTABLE or "git", "ls-remote", "--", url, *names]
    environment = settings.child_environment("plain", command.git_environment(offline=False))
    hint = (
        "check the network, or set VLLM_MIRROR (TRITON_MIRROR for Triton) to a copy that can be"
        " reached"
    )
    try:
        reply = process.capture(argv, cwd=cwd, env=environment, timeout_s=timeout_s)
    except ToolchainError:
        raise SourceError(
            f"{without_user(url)} gave no answer in {timeout_s:g} s (CONNECT_TIMEOUT_S)", hint=hint
        ) from None
    if reply.returncode != 0:
        raise SourceError(
            f"{without_user(url)} cannot be read:"
            f" {first_line(reply.stderr) or process.describe_status(reply.returncode)}",
            hint=hint,
        )
    return {
        name: oid
        for oid, name in (line.split("\t", 1) for line in reply.stdout.splitlines() if "\t" in line)
    }


def without_user(url: str) -> str:
    """A URL as it may be shown: without name and password."""
    return re.sub(r"(?<=://)[^/@]*@", "", url)


UPSTREAM = "refs/remotes/origin/main"


def is_branch_name(git: Git, name: str) -> bool:
    """Whether git takes `name` for a branch (git-check-ref-format(1))."""
    return (
        bool(name)
        and git.look("check-ref-format", "--branch", name, check=False).out.strip() == name
    )


def fetch_main(git: Git, url: str, *, settings: Settings, run_log: RunLog, on_line: OnLine) -> None:
    """Fetch upstream's main as UPSTREAM. Raises SourceError."""
    git.fetch(
        url,
        (f"+refs/heads/main:{UPSTREAM}",),
        whole=False,
        settings=settings,
        run_log=run_log,
        on_line=on_line,
    )


def add_worktree(
    git: Git, path: Path, commit: str, *, settings: Settings, run_log: RunLog, on_line: OnLine
) -> None:
    """Make a working tree at `path`, HEAD detached at a commit; a partial clone fetches the
    contents of its files. Raises SourceError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    git.talk(
        ("worktree", "add", "--force", "--detach", str(path.absolute()), commit),
        settings,
        run_log,
        on_line,
    )


def begin_branch(worktree: Git, name: str, commit: str, *, run_log: RunLog) -> None:
    """Make the branch at a commit and check it out. Raises CheckoutError where there is one of that
    name.
    """
    worktree.write("checkout", "--quiet", "--no-track", "-b", name, commit, run_log=run_log)


def write_tree(git: Git, commit: str, folder: Path) -> None:
    """Write all files of a commit below `folder`, which is made where it is not there. What lies
    there already is overwritten.
    """
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
_SHALLOW_FLAGS = ("--progress", "--no-tags", "--no-write-fetch-head", "--recurse-submodules=no")
_ALL = ("+refs/heads/*:refs/external/heads/*", "+refs/tags/*:refs/external/tags/*")
_HOST = "https://github.com/"
# What servers say that give away branches and tags only, or nothing without its history.
_GIVES_NO_SINGLE = re.compile(r"not our ref|unadvertised object|does not support shallow")


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
    """Check `revision`, a commit, tag or branch, out into `folder`, which is empty, and return the
    commit. `submodules`: their paths, None for all.

    `mirror`, a URL or a folder, stands for https://github.com/ where it is not empty, also in the
    addresses of submodules. Raises SourceError.
    """
    git = Git(folder, failure=SourceError)
    git.init()
    # In a file: a password in the mirror's address belongs neither on a command line nor into a
    # log.
    instead = git.path_of("mirror")
    write_atomic(instead, _instead(mirror).encode(), mode=0o600)
    included = ("-c", f"include.path={instead}")
    try:
        try:
            git.talk(
                (*included, "fetch", *_SHALLOW_FLAGS, "--depth=1", url, f"+{revision}:{_REF}"),
                settings,
                run_log,
                on_line,
            )
            commit = git.resolve(_REF)
        except SourceError as exc:
            if not any(_GIVES_NO_SINGLE.search(line) for line in exc.details):
                raise
            git.talk((*included, "fetch", *_SHALLOW_FLAGS, url, *_ALL), settings, run_log, on_line)
            commit = git.resolve(revision)
        if commit is None:
            raise SourceError(f"{url} did not serve {revision}")
        git.write("checkout", "--quiet", "--detach", commit)
        # Without .gitmodules it does nothing.
        words = (
            "submodule",
            "update",
            "--init",
            "--recursive",
            "--depth=1",
            "--progress",
            *(("--", *submodules) if submodules else ()),
        )
        if submodules is None or submodules:
            git.talk((*included, *words), settings, run_log, on_line)
    finally:
        instead.unlink(missing_ok=True)
    return commit


def _instead(mirror: str) -> str:
    if not mirror:
        return ""
    place = (
        mirror
        if "://" in mirror or not Path(mirror).expanduser().is_absolute()
        else str(Path(mirror).expanduser())
    )
    lines = f'[url "{_quoted(place.rstrip("/"))}/"]\n\tinsteadOf = {_HOST}\n'
    # Git refuses submodules from a folder unless it is told (CVE-2022-39253); whoever names a
    # folder as the mirror trusts it.
    is_local = place.startswith(("/", "file://"))
    return lines + ('[protocol "file"]\n\tallow = always\n' if is_local else "")


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


_STORE_FLAGS = ("--no-tags", "--no-write-fetch-head", "--recurse-submodules=no")
# As git itself asks for what a partial clone lacks (promisor-remote.c); what it is stands in a
# file, a command line would be too long to be read.
_MISSING = (
    "-c",
    "fetch.negotiationAlgorithm=noop",
    "fetch",
    *_STORE_FLAGS,
    "--filter=blob:none",
    "wanted",
)
_WHOLE = ("fetch", "--progress", "--refetch", "--no-filter", *_STORE_FLAGS, "origin")


def open_store(path: Path, checkout: Path) -> Git:
    """Return the store at `path`, made where it is missing, with the objects of `checkout` in it.
    Raises SourceError.
    """
    objects = Git(checkout).path_of("objects")
    path.mkdir(parents=True, exist_ok=True)
    store = Git(path, failure=SourceError)
    found = store.look("rev-parse", "--absolute-git-dir", check=False).out.rstrip("\n")
    if os.path.realpath(found) != os.path.realpath(path):
        # What a power cut has left of it git takes for no repository, and would look, and write, in
        # the one that the folder lies in.
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


def take_in(store: Git, repository: Path, ref: str) -> None:
    """Take the commit that is HEAD of a repository on this disk, with all of its content, as the
    reference `ref`.
    """
    words = (
        "fetch",
        "--quiet",
        "--no-tags",
        "--no-write-fetch-head",
        "--recurse-submodules=no",
        str(repository),
        f"+HEAD:{ref}",
    )
    # The protocol of a path is switched off with all others.
    store.write(*words, env={"GIT_ALLOW_PROTOCOL": "file"})


def fetch_into_store(
    store: Git,
    url: str,
    refspecs: Sequence[str],
    *,
    settings: Settings,
    run_log: RunLog,
    on_line: OnLine,
) -> None:
    """Fetch history without file contents; everything where the remote refuses filters. Raises
    SourceError.
    """
    store.set_setting("remote.origin.url", url)
    store.fetch(url, refspecs, whole=False, settings=settings, run_log=run_log, on_line=on_line)


def complete_store(
    store: Git,
    wanted: Sequence[str],
    url: str,
    refspecs: Sequence[str],
    *,
    settings: Settings,
    run_log: RunLog,
    on_line: OnLine,
) -> None:
    """Fetch these blobs of a partial store in one call, or all of `refspecs` where the remote gives
    no single objects. Raises SourceError.
    """
    for remote in ("origin", "wanted"):
        store.set_setting(f"remote.{remote}.url", url)
    store.set_setting("include.path", "wanted")
    listed = store.path / "wanted"
    write_atomic(
        listed, ('[remote "wanted"]\n' + "".join(f"\tfetch = {oid}\n" for oid in wanted)).encode()
    )
    try:
        store.talk(_MISSING, settings, run_log, on_line)
        if not history.absent(store, wanted):
            return
    except SourceError:
        run_log.write("the remote gives no single objects; asking for all of them")
    finally:
        write_atomic(listed, b"")
    store.talk((*_WHOLE, *refspecs), settings, run_log, on_line)
