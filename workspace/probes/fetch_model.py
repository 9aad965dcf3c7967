"""Fetch a model from the hub into Hugging Face's cache, after a check of access and disk space.

Large files are fetched here, verified by their SHA-256 and put where huggingface_hub finds them:
since 1.x huggingface_hub restarts a broken transfer (huggingface/huggingface_hub#4228). Progress
goes to stderr as `@ DONE TOTAL` in bytes; one JSON document on stdout.
"""

import argparse
import concurrent.futures
import errno
import fcntl
import fnmatch
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo, RepoSibling

SCHEMA = 1
POLL_S = 0.5
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
PART = ".fetched-in-part"
AT_ONCE = 4
# So many transfers in turn may break off without a new byte.
PATIENCE = 5
PAUSE_S = 1.0
TIMEOUT_S = 30.0
# Space besides the model's files, for other files that are written during the fetch.
MARGIN_BYTES = 2 << 30


class Refused(Exception):
    """An expected failure: `kind` is gated, absent, network or disk."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def fetch(model: str, ignored: list[str], revision: str | None) -> dict[str, object]:
    """Fetch the missing files of a model. Raises Refused."""
    import httpx
    from huggingface_hub import errors

    try:
        return _fetch(model, ignored, revision)
    except errors.GatedRepoError as exc:
        raise Refused("gated", first(exc)) from exc
    except (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.HFValidationError,
    ) as exc:
        raise Refused("absent", first(exc)) from exc
    except (
        errors.HfHubHTTPError,
        errors.LocalEntryNotFoundError,
        httpx.HTTPError,
        ConnectionError,
        TimeoutError,
    ) as exc:
        raise Refused("network", first(exc)) from exc
    except OSError as exc:
        # Some of the hub's own errors are OSErrors, too, and have no errno.
        raise Refused("disk" if exc.errno in DISK else "network", first(exc)) from exc


def _fetch(model: str, ignored: list[str], revision: str | None) -> dict[str, object]:
    from huggingface_hub import HfApi, constants, snapshot_download

    info = HfApi().model_info(model, revision=revision, files_metadata=True)
    if info.gated:
        HfApi().auth_check(model)
    wanted = [
        file
        for file in info.siblings or []
        if not any(fnmatch.fnmatch(file.rfilename, pattern) for pattern in ignored)
    ]
    blobs = Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}" / "blobs"
    sizes: dict[str, int] = {
        str(file.lfs.sha256 if file.lfs else file.blob_id): file.size or 0 for file in wanted
    }
    total = sum(sizes.values())
    missing = total - present(blobs, sizes)
    require_room(Path(constants.HF_HUB_CACHE), missing)
    with Watch(blobs, sizes, total):
        blobs.mkdir(parents=True, exist_ok=True)
        fetch_all_large(model, info, [file for file in wanted if file.lfs], blobs)
        folder = snapshot_download(model, revision=revision, ignore_patterns=ignored or None)
    return {"folder": folder, "commit": info.sha, "bytes": total, "fetched": missing}


def fetch_all_large(model: str, info: "ModelInfo", files: list["RepoSibling"], blobs: Path) -> None:
    """Fetch files, some at once."""
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = [
            pool.submit(
                fetch_large,
                model,
                info.sha,
                file.rfilename,
                blobs / file.lfs.sha256,
                file.size or 0,
            )
            for file in files
        ]
        for job in jobs:
            job.result()


def fetch_large(model: str, commit: str, name: str, blob: Path, size: int) -> None:
    """Fetch one file to its place among the blobs, where it appears only when it is complete.

    A broken transfer resumes. Raises Refused if the SHA-256 differs.
    """
    import httpx
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    part = blob.with_name(blob.name + PART)
    with part.open("ab") as file:
        # Another fetch of the same model may be under way.
        fcntl.flock(file, fcntl.LOCK_EX)
        if blob.exists():
            part.unlink(missing_ok=True)
            return
        idle = 0
        while (have := file.seek(0, os.SEEK_END)) < size:
            try:
                url = hf_hub_url(model, name, revision=commit)
                receive(url, build_hf_headers(), file, have, size)
            except httpx.TransportError:
                idle = 0 if file.seek(0, os.SEEK_END) > have else idle + 1
                if idle >= PATIENCE:
                    raise
                time.sleep(PAUSE_S)
        file.flush()
        os.fsync(file.fileno())
        with part.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        if digest != blob.name:
            part.unlink()
            raise Refused(
                "network", f"{name} has sha256 {digest}, not {blob.name} as on the hub: not used"
            )
        part.rename(blob)


def receive(url: str, headers: dict[str, str], file: BinaryIO, have: int, size: int) -> None:
    """Append the missing bytes; start again if the server ignores the range.

    Raises Refused where there are more bytes than `size`.
    """
    import httpx
    from huggingface_hub.utils import hf_raise_for_status

    headers = headers | {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with httpx.stream(
        "GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT_S
    ) as response:
        if response.is_error:
            response.read()
            hf_raise_for_status(response)
        if have and response.status_code != 206:
            file.truncate(0)
        for chunk in response.iter_raw():
            file.write(chunk)
            if file.tell() > size:
                raise Refused("network", f"the server sends more than {size} bytes: not used")


def present(blobs: Path, sizes: dict[str, int]) -> int:
    """Return how many bytes of the wanted files are on disk, incomplete files included."""
    try:
        found = [(entry.name.split(".")[0], entry.stat().st_size) for entry in os.scandir(blobs)]
    except OSError:
        return 0
    by_name: dict[str, int] = {}
    for name, size in found:
        by_name[name] = max(size, by_name.get(name, 0))
    return sum(min(by_name.get(name, 0), size) for name, size in sizes.items())


def require_room(cache: Path, missing: int) -> None:
    """Raise Refused if the disk has no space for the missing bytes."""
    existing = next(place for place in (cache, *cache.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if missing and free < missing + MARGIN_BYTES:
        raise Refused(
            "disk",
            f"{missing / 2**30:.1f} GiB are still to be fetched into {cache}, and"
            f" {free / 2**30:.1f} GiB are free there",
        )


class Watch:
    """Prints every half second how many bytes are on disk."""

    def __init__(self, blobs: Path, sizes: dict[str, int], total: int) -> None:
        self.blobs, self.sizes, self.total = blobs, sizes, total
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.report, daemon=True)

    def report(self) -> None:
        printed = -1
        while not self.ended.wait(POLL_S):
            done = present(self.blobs, self.sizes)
            if done != printed:
                print(f"@ {done} {self.total}", file=sys.stderr, flush=True)
                printed = done

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()


def first(exc: BaseException) -> str:
    """Return a failure in one line, without the request's id and the page of advice of the hub."""
    lines = [
        line.strip()
        for line in str(getattr(exc, "server_message", None) or exc).splitlines()
        if line.strip()
    ]
    return lines[0] if lines else type(exc).__name__


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch a model from the hub.")
    parser.add_argument("model")
    parser.add_argument("--ignore", action="append", default=[], metavar="GLOB")
    parser.add_argument("--revision", help="a branch, a tag or a commit (default: main)")
    arguments = parser.parse_args()
    # Libraries print to stdout: only the document may stay there.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    record: dict[str, object]
    try:
        fetched = fetch(arguments.model, arguments.ignore, arguments.revision)
        record = {"schema": SCHEMA, "error": None, **fetched}
    except Refused as exc:
        record = {"schema": SCHEMA, "error": {"kind": exc.kind, "said": str(exc)}}
    print(json.dumps(record), file=out, flush=True)


if __name__ == "__main__":
    main()
