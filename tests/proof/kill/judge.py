"""What a clone is, down to each file, so that two runs can be compared; and what may not be left of
the first of them.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

from tests.small.materials import git
from workspace.core.paths import Layout
from workspace.repo.series import LEFT_REF

STRAY_S = 15.0
# Of a fetch that was ended the whole history is asked for, should it have been the server that
# refuses a partial clone.
_HOW_MUCH = re.compile(
    r"core\.repositoryformatversion|extensions\.|remote\.origin\.(promisor|partialclonefilter)"
)
Fingerprint = Mapping[str, str]

# What units cost is written down when some were compiled: after a kill that may be with the next
# edit. Of git's objects, a loose one that was begun is git's to prune; a half pack would not be
# small. Nobody takes a dated name again; the lock of a good state's name goes when that is recorded
# next.
# Whose presence counts, not what is in it: times, process numbers, caches and logs of git's own. Of
# a good state, its record has the time and its list of packages is proven by the stamp; the other
# environment is as the one in use.
_NAMES_ONLY = re.compile(
    r"(.*/)?\.git/.*|\.workspace/(lock|smoke\.json|good/[^/]+/good\.json)"
    r"|(\.vllm|\.workspace/good/[^/]+/environment)/(\.lock|pyvenv\.cfg)"
    r"|.*/(RECORD|uv_cache\.json|REQUESTED)"
    r"|\.workspace/build/.*/(\.ninja_(deps|log)"
    r"|CMakeConfigureLog\.yaml|configured\.json|install_manifest_\w+\.txt)"
)
_IGNORED = re.compile(
    r".*/__pycache__(/.*)?|.*\.pyc"
    r"|(.*/)?\.git/(?:modules/vendor/vllm/)?(objects/(?!.*tmp_(?!obj_)).*"
    r"|logs/.*|ORIG_HEAD|FETCH_HEAD|COMMIT_EDITMSG|gc\.log|gc\.pid|index)"
    r"|(.*/)?\.git/refs/(left/TIME\.lock|good/[^/]+\.lock|patches/left)|cache/.*/lock"
    r"|\.workspace/(logs|expected-trees|tools|times|upstream)(/.*)?"
    r"|\.workspace/build/.*/(\.cmake/api/v1/reply/index-.*\.json|tickets/alone)"
    r"|cache/\.?compile-costs-.*"
    r"|(\.vllm|\.workspace/good/[^/]+/environment)/\.workspace/(\w+\.json|bytecode(/.*)?)"
)
# What is kept aside bears the time of day, and what was left by a run that was killed is kept
# beside what the next one left.
_TIME = re.compile(r"\d{8}T\d{6}Z")
_DATED_REF = re.compile(r"refs/(left|good)/")


def fingerprint(layout: Layout, cache: Path | None = None) -> Fingerprint:
    """Every file of clone and downloads by digest, every reference, and what the stamps claim."""
    found: dict[str, str] = {}
    for top, prefix in ((layout.root, ""), *([(cache, "cache/")] if cache else [])):
        for place, folders, names in os.walk(top):
            folders[:] = [name for name in folders if name != "__pycache__"]
            for name in (*folders, *names):
                path = Path(place, name)
                shown = _TIME.sub("TIME", f"{prefix}{path.relative_to(top)}")
                if not _IGNORED.fullmatch(shown):
                    found[shown] = _content(path, shown)
    for name in ("environment", "vllm"):
        with contextlib.suppress(OSError, ValueError):
            record = json.loads(layout.stamp(name).read_text())
            record["outcome"].pop("seconds", None)
            found |= {
                f"stamp {name} {key}": json.dumps(record[key], sort_keys=True)
                for key in ("inputs", "kernels", "packages", "libraries", "outcome")
            }
    for name, folder in (("clone", layout.root), ("vllm", layout.vllm)):
        if (folder / ".git").exists():
            found |= _repository(name, folder)
    return found


def _content(path: Path, shown: str) -> str:
    if path.is_symlink():
        return f"-> {os.readlink(path)}"
    if path.is_dir() or _NAMES_ONLY.fullmatch(shown):
        return ""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{path.stat().st_mode & 0o111:o} {path.stat().st_size} {digest[:16]}"


def _repository(name: str, folder: Path) -> dict[str, str]:
    return {
        f"{name} HEAD": git(folder, "rev-parse", "HEAD", "HEAD^{tree}"),
        f"{name} branch": git(folder, "rev-parse", "--abbrev-ref", "HEAD"),
        f"{name} refs": _references(folder),
        f"{name} status": git(
            folder, "-c", "core.fsmonitor=false", "status", "--porcelain", "--untracked-files=all"
        ),
        f"{name} settings": "\n".join(
            sorted(
                line
                for line in git(folder, "config", "--local", "--list").splitlines()
                if not _HOW_MUCH.match(line)
            )
        ),
        f"{name} fsck": git(
            folder, "fsck", "--no-dangling", "--no-progress", "--connectivity-only"
        ),
    }


def _references(folder: Path) -> str:
    """Every reference with what it names; of a commit that is made anew each time, its tree. What
    was kept on giving up is extra.
    """
    lines = (
        line.split()
        for line in git(
            folder, "for-each-ref", "--format=%(refname) %(objectname) %(tree)"
        ).splitlines()
    )
    return "\n".join(
        sorted(
            {
                f"{_TIME.sub('TIME', name)} {tree[0] if tree and _DATED_REF.match(name) else oid}"
                for name, oid, *tree in lines
                if name != LEFT_REF
            }
        )
    )


def differences(expected: Fingerprint, found: Fingerprint) -> list[str]:
    """Each thing that is not as after an undisturbed run."""
    lines = []
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            lines.append(
                f"{name}: expected {expected.get(name, 'nothing')!r:.160}, found"
                f" {found.get(name, 'nothing')!r:.160}"
            )
    return lines


def await_no_stray(mark: str) -> tuple[float, list[str]]:
    """Wait until nothing lives that has `NAME=text` in its environment; return the seconds that it
    took and what still does.
    """
    started = time.monotonic()
    while living := strays(mark):
        if time.monotonic() - started > STRAY_S:
            break
        time.sleep(0.01)
    return time.monotonic() - started, living


def strays(mark: str) -> list[str]:
    """Processes that have the mark in their environment (proc_pid_environ(5)); the dead have
    none.
    """
    wanted = f"{mark}\0".encode()
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                if wanted in Path(f"/proc/{entry}/environ").read_bytes():
                    argv = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ")
                    found.append(f"{entry} {argv.decode(errors='replace')[:200]}")
    return found
