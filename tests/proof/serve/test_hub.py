"""The real probe and the real huggingface_hub against a hub of real bytes: interruptions, a gated
model, a damaged file, and later loads without network.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.small.hub import Hub, Repository, serve
from workspace.core.paths import Layout
from workspace.core.settings import load
from workspace.server import models

PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
FILES = {
    "config.json": b"{}",
    PARTS[0]: os.urandom(12 << 20),
    PARTS[1]: os.urandom(9 << 20),
    "original/again.bin": os.urandom(5 << 20),
    "README.md": b"r" * 20000,
}
SIZE = sum(len(FILES[name]) for name in PARTS)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as made:
        made.repositories["some/model"] = Repository(FILES)
        yield made


class Fetcher:
    """The probe of `serve.fetch` with a home of its own."""

    def __init__(self, layout: Layout, hub: Hub, home: Path) -> None:
        self.layout, self.home = layout, home
        self.environment = {"PATH": "/usr/bin:/bin", "HOME": str(home), "HF_ENDPOINT": hub.url}
        self.argv = [
            str(layout.environment_python),
            str(layout.probes / "fetch_model.py"),
            "some/model",
            "--ignore",
            "original/*",
        ]

    def start(self, **more: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            self.argv,
            env=self.environment | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, **more: str) -> dict[str, Any]:
        child = self.start(**more)
        out, err = child.communicate(timeout=120)
        assert child.returncode == 0, err
        record: dict[str, Any] = json.loads(out)
        return record

    def found(self) -> Path | None:
        return models.snapshot(
            models.hub_cache(load(self.layout, environ=self.environment)), "some/model"
        )


@pytest.fixture
def fetcher(layout: Layout, hub: Hub, tmp_path: Path) -> Fetcher:
    return Fetcher(layout, hub, tmp_path)


def test_model_is_fetched_without_ignored_files_and_then_found_offline(
    hub: Hub, fetcher: Fetcher
) -> None:
    record = fetcher.run()
    assert record["error"] is None
    folder = fetcher.found()
    assert folder == Path(record["folder"])
    assert {
        name: (folder / name).read_bytes() == FILES[name] for name in FILES if "/" not in name
    } == {name: True for name in FILES if "/" not in name}
    assert not (folder / "original").exists()
    hub.status = 503
    code = (
        "import sys; from huggingface_hub import snapshot_download;"
        " print(snapshot_download('some/model', ignore_patterns=['original/*']))"
    )
    environment = fetcher.environment | {"HF_HUB_OFFLINE": "1"}
    before = len(hub.requests)
    done = subprocess.run(
        [fetcher.layout.environment_python, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == str(folder), done.stderr
    assert len(hub.requests) == before


def test_broken_transfer_resumes_at_the_byte(hub: Hub, fetcher: Fetcher) -> None:
    hub.breaks[PARTS[0]] = [3 << 20, 7 << 20]
    hub.breaks[PARTS[1]] = [1 << 20]
    assert fetcher.run()["error"] is None
    assert (PARTS[1], f"bytes={1 << 20}-") in hub.ranges
    assert fetcher.found() is not None
    assert hub.sent <= SIZE + 25000


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_fetch_leaves_no_model_and_the_next_one_fetches_the_rest(
    hub: Hub, fetcher: Fetcher, number: signal.Signals
) -> None:
    hub.breaks[PARTS[0]] = [5 << 20]
    hub.held[PARTS[0]] = threading.Event()
    child = fetcher.start()
    blobs = fetcher.home / ".cache" / "huggingface" / "hub" / "models--some--model" / "blobs"
    deadline = time.monotonic() + 60
    while (
        sum(path.stat().st_size for path in blobs.glob("*")) < (5 << 20) + len(FILES[PARTS[1]])
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    child.send_signal(number)
    hub.held[PARTS[0]].set()
    child.communicate(timeout=60)
    assert fetcher.found() is None
    sent = hub.sent
    record = fetcher.run()
    assert record["error"] is None
    assert fetcher.found() is not None
    assert record["fetched"] < SIZE
    assert hub.sent - sent < len(FILES[PARTS[0]]) - (4 << 20) + 25000
    assert [path.name for path in blobs.glob("*.fetched-in-part")] == []


def test_file_with_another_hash_is_refused_and_fetched_again(hub: Hub, fetcher: Fetcher) -> None:
    fetcher.run()
    blobs = fetcher.home / ".cache" / "huggingface" / "hub" / "models--some--model" / "blobs"
    blob = max(blobs.iterdir(), key=lambda path: path.stat().st_size)
    content = blob.read_bytes()
    blob.unlink()
    blob.with_name(blob.name + ".fetched-in-part").write_bytes(b"x" * 100 + content[100 : 1 << 20])
    record = fetcher.run()
    assert "sha256" in record["error"]["said"]
    assert fetcher.found() is None
    assert fetcher.run()["error"] is None
    assert blob.read_bytes() == content


def test_two_fetches_at_once_fetch_one_model(hub: Hub, fetcher: Fetcher) -> None:
    both = [fetcher.start() for _ in range(2)]
    records = [json.loads(child.communicate(timeout=120)[0]) for child in both]
    assert [record["error"] for record in records] == [None, None]
    assert fetcher.found() is not None
    assert hub.sent < SIZE + 100_000


@pytest.mark.parametrize(
    ("gated", "token", "status", "kind"),
    [
        (True, "", 0, "gated"),
        (True, "hf_wrong", 0, "gated"),
        (True, "hf_right", 0, None),
        (False, "", 503, "network"),
        (False, "", 500, "network"),
    ],
)
def test_gated_model_and_failing_hub_are_errors_of_their_kind(
    hub: Hub, fetcher: Fetcher, gated: bool, token: str, status: int, kind: str | None
) -> None:
    hub.repositories["some/model"] = Repository(FILES, gated=gated, token="hf_right")
    hub.status = status
    error = fetcher.run(**({"HF_TOKEN": token} if token else {}))["error"]
    assert (error["kind"] if error else None) == kind
    assert (fetcher.found() is not None) == (kind is None)
    if error:
        assert "hf_wrong" not in error["said"]


def test_missing_model_and_missing_hub_are_errors_of_their_kind(hub: Hub, fetcher: Fetcher) -> None:
    del hub.repositories["some/model"]
    assert fetcher.run()["error"]["kind"] == "absent"
    assert fetcher.run(HF_ENDPOINT="http://127.0.0.1:1")["error"]["kind"] == "network"


def test_too_small_disk_is_an_error_before_the_first_byte(hub: Hub, fetcher: Fetcher) -> None:
    code = (
        "import shutil, sys, types, runpy\n"
        "shutil.disk_usage = lambda place: types.SimpleNamespace(total=1, used=1, free=1 << 20)\n"
        "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    argv = [fetcher.argv[0], "-c", code, *fetcher.argv[1:]]
    done = subprocess.run(argv, env=fetcher.environment, capture_output=True, text=True, timeout=60)
    error = json.loads(done.stdout)["error"]
    assert (error["kind"], "are free there" in error["said"]) == ("disk", True)
    assert hub.sent == 0


def test_task_fetches_from_the_hub_and_the_list_shows_it(
    hub: Hub, layout: Layout, tmp_path: Path
) -> None:
    hub.repositories["openai/gpt-oss-20b"] = Repository(FILES)
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
    inv = [sys.executable, "-Es", str(layout.root / "tasks.py")]
    done = subprocess.run(
        [*inv, "serve.fetch", "gpt-oss-20b"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    listed = subprocess.run(
        [*inv, "serve.list", "--json"], env=environment, capture_output=True, text=True, timeout=60
    )
    rows = {row["name"]: row for row in json.loads(listed.stdout)["rows"]}
    assert rows["gpt-oss-20b"]["on_disk"]
    assert rows["gpt-oss-120b"]["on_disk"] is None
