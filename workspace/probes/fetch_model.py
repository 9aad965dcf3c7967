"""Bring a model from the hub into Hugging Face's cache: what it weighs, whether it may be had and
has room, then its files.

Large files are fetched here, held against their SHA-256 and put where huggingface_hub finds them:
since its 1.x it begins a file that broke off anew (huggingface/huggingface_hub#4228). Progress goes
to stderr as `@ DONE TOTAL` in bytes; one JSON document on stdout.
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

SCHEMA = 1
POLL_S = 0.5
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
PART = ".fetched-in-part"
AT_ONCE = 4
# So often a transfer may break off in turn without a byte having come.
PATIENCE = 5
PAUSE_S = 1.0
TIMEOUT_S = 30.0
# Beside the model's own files, for everything else that is written meanwhile.
MARGIN_BYTES = 2 << 30


class Refused(Exception):
    """An expected failure: `kind` is gated, absent, network or disk."""

    def __init__(self, kind: str, said: str) -> None:
        super().__init__(said)
        self.kind = kind


def fetch(model: str, ignored: list[str]) -> dict[str, object]:
    import httpx
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    try:
        info = HfApi().model_info(model, files_metadata=True)
        if info.gated:
            HfApi().auth_check(model)
        wanted = [
            file
            for file in info.siblings or []
            if not any(fnmatch.fnmatch(file.rfilename, pattern) for pattern in ignored)
        ]
        blobs = Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}" / "blobs"
        sizes = {
            str(file.lfs.sha256 if file.lfs else file.blob_id): file.size or 0 for file in wanted
        }
        total = sum(sizes.values())
        missing = total - present(blobs, sizes)
        require_room(Path(constants.HF_HUB_CACHE), missing)
        with Watch(blobs, sizes, total):
            blobs.mkdir(parents=True, exist_ok=True)
            large = [file for file in wanted if file.lfs]
            with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
                for done in [
                    pool.submit(
                        fetch_large,
                        model,
                        info.sha,
                        file.rfilename,
                        blobs / file.lfs.sha256,
                        file.size or 0,
                    )
                    for file in large
                ]:
                    done.result()
            folder = snapshot_download(model, ignore_patterns=ignored or None)
    except errors.GatedRepoError as exc:
        raise Refused("gated", first(exc)) from exc
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as exc:
        raise Refused("absent", first(exc)) from exc
    except errors.HFValidationError as exc:
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
        # Some of the hub's own errors are OSErrors as well, and have no number.
        raise Refused("disk" if exc.errno in DISK else "network", first(exc)) from exc
    return {"folder": folder, "commit": info.sha, "bytes": total, "fetched": missing}


def fetch_large(model: str, commit: str, name: str, blob: Path, size: int) -> None:
    """Fetch one file to its place among the blobs, going on where an earlier transfer broke off; it
    appears there only when whole and right.
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
                receive(hf_hub_url(model, name, revision=commit), build_hf_headers(), file, have)
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
                "network", f"{name} has sha256 {digest}, the hub says {blob.name}: it was not used"
            )
        part.rename(blob)


def receive(url: str, headers: dict[str, str], file, have: int) -> None:
    """Append what is still missing. A server that begins anew is taken at its word."""
    import httpx
    from huggingface_hub.utils import hf_raise_for_status

    asked = (
        headers | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    )
    with httpx.stream("GET", url, headers=asked, follow_redirects=True, timeout=TIMEOUT_S) as reply:
        if reply.is_error:
            reply.read()
            hf_raise_for_status(reply)
        if have and reply.status_code != 206:
            file.truncate(0)
        for chunk in reply.iter_raw():
            file.write(chunk)


def present(blobs: Path, sizes: dict[str, int]) -> int:
    """Bytes of the wanted files that are there, those of files that broke off included."""
    try:
        there = [(entry.name.split(".")[0], entry.stat().st_size) for entry in os.scandir(blobs)]
    except OSError:
        return 0
    by_name: dict[str, int] = {}
    for name, size in there:
        by_name[name] = max(size, by_name.get(name, 0))
    return sum(min(by_name.get(name, 0), size) for name, size in sizes.items())


def require_room(cache: Path, missing: int) -> None:
    there = next(place for place in (cache, *cache.parents) if place.exists())
    free = shutil.disk_usage(there).free
    if missing and free < missing + MARGIN_BYTES:
        raise Refused(
            "disk",
            f"{missing / 2**30:.1f} GiB are still to be fetched into {cache}, and"
            f" {free / 2**30:.1f} GiB are free there",
        )


class Watch:
    """Says every half second how many bytes are there."""

    def __init__(self, blobs: Path, sizes: dict[str, int], total: int) -> None:
        self.blobs, self.sizes, self.total = blobs, sizes, total
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.tell, daemon=True)

    def tell(self) -> None:
        said = -1
        while not self.ended.wait(POLL_S):
            done = present(self.blobs, self.sizes)
            if done != said:
                print(f"@ {done} {self.total}", file=sys.stderr, flush=True)
                said = done

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()


def first(exc: BaseException) -> str:
    """What a failure is about, in one line: the hub's errors go on with the request's number and a
    page of advice.
    """
    lines = [
        line.strip()
        for line in str(getattr(exc, "server_message", None) or exc).splitlines()
        if line.strip()
    ]
    return lines[0] if lines else type(exc).__name__


def main() -> None:
    parser = argparse.ArgumentParser(description="Bring a model from the hub.")
    parser.add_argument("model")
    parser.add_argument("--ignore", action="append", default=[], metavar="GLOB")
    arguments = parser.parse_args()
    # Libraries talk on stdout; the document must stand there alone.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        record = {"schema": SCHEMA, "error": None, **fetch(arguments.model, arguments.ignore)}
    except Refused as exc:
        record = {"schema": SCHEMA, "error": {"kind": exc.kind, "said": str(exc)}}
    print(json.dumps(record), file=out, flush=True)


if __name__ == "__main__":
    main()
