"""`inv serve.fetch` with a stand-in for its probe; tests/proof/serve runs the real probe against a
hub of real bytes.
"""

import functools
import hashlib
import http.server
import io
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from workspace.core.console import Console
from workspace.core.errors import (
    ServeError,
    SettingsError,
    SourceError,
    ToolchainError,
    WorkspaceError,
)
from workspace.core.paths import Layout, here
from workspace.core.settings import load
from workspace.machine import run_environment
from workspace.machine.machine import Machine
from workspace.server import models, public_recipes, verbs

FETCHED = """import json, os, pathlib, sys
assert sys.argv[1] == "openai/gpt-oss-20b", sys.argv
assert sys.argv[2:] == ["--ignore", "original/*", "--ignore", "metal/*"], sys.argv
repository = pathlib.Path(os.environ["HF_HOME"]) / "hub" / "models--openai--gpt-oss-20b"
folder = repository / "snapshots" / "abc1"
folder.mkdir(parents=True)
for name in ("config.json", "model.safetensors"):
    (folder / name).write_text("{}")
(repository / "refs").mkdir()
(repository / "refs" / "main").write_text("abc1")
print("@ 5 10", file=sys.stderr)
print(json.dumps({"error": None, "folder": str(folder), "bytes": 10 << 30, "fetched": 5 << 30}))
"""


class Clone:
    """A clone with a built environment that has only the packages that a test adds."""

    def __init__(self, root: Path) -> None:
        self.layout = Layout(root)
        self.layout.environment_python.parent.mkdir(parents=True)
        self.layout.environment_python.symlink_to(sys.executable)
        self.packages = self.layout.environment / "lib" / "python3.11" / "site-packages"
        self.packages.mkdir(parents=True)
        shutil.copytree(
            here().probes, self.layout.probes, ignore=shutil.ignore_patterns("__pycache__")
        )
        self.layout.pins.parent.mkdir()
        shutil.copy(here().pins, self.layout.pins)
        shutil.copytree(here().root / "recipes", root / "recipes")
        self.package("oss-harmony", "0.0.11")
        self.shell = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(root / "home"),
            "HF_HOME": str(root / "hf"),
            "DEVICE": "cpu",
        }
        self.output = ""

    def package(self, name: str, version: str) -> None:
        folder = self.packages / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )

    def probe(self, code: str) -> None:
        (self.layout.probes / "fetch_model.py").write_text(code)

    def refuses(self, kind: str, output: str) -> None:
        self.probe(f"print({json.dumps(json.dumps({'error': {'kind': kind, 'said': output}}))})")

    def fetch(self, name: str = "gpt-oss-20b", **shell: str) -> None:
        err = io.StringIO()
        try:
            models.fetch(
                Machine(self.layout, load(self.layout, environ=self.shell | shell)),
                name,
                console=Console(out=io.StringIO(), err=err),
            )
        finally:
            self.output = err.getvalue()


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path / "clone")


def test_model_is_fetched_once_and_then_needs_no_hub(clone: Clone) -> None:
    clone.probe(FETCHED)
    clone.fetch()
    assert "5.0 GiB fetched of 10.0" in clone.output
    assert "oss-harmony 0.0.11 in .vllm contains them" in clone.output
    clone.probe("raise SystemExit('run again')")
    clone.fetch()
    assert [line.split()[0] for line in clone.output.splitlines()[:2]] == ["skipped", "skipped"]
    out = io.StringIO()
    verbs.show_recipes(
        Machine(clone.layout, load(clone.layout, environ=clone.shell)),
        console=Console(out=out, err=out),
        as_json=True,
    )
    rows = {row["name"]: row for row in json.loads(out.getvalue())["rows"]}
    assert rows["gpt-oss-20b"]["on_disk"] == str(
        clone.layout.root / "hf/hub/models--openai--gpt-oss-20b/snapshots/abc1"
    )
    assert rows["gpt-oss-120b"]["on_disk"] is None


def test_revision_is_fetched_and_then_found_by_its_name(clone: Clone) -> None:
    clone.probe(
        FETCHED.replace('"metal/*"]', '"metal/*", "--revision", "v2"]').replace(
            '"refs" / "main"', '"refs" / "v2"'
        )
    )
    machine = Machine(clone.layout, load(clone.layout, environ=clone.shell))
    recipe = replace(public_recipes.named(clone.layout, "gpt-oss-20b"), revision="v2")
    console = Console(out=io.StringIO(), err=io.StringIO())
    assert models.found_weights(machine, recipe) is None
    models.fetch_weights(machine, recipe, console=console)
    assert models.found_weights(machine, recipe) is not None
    assert models.found_weights(machine, replace(recipe, revision=None)) is None


@pytest.mark.parametrize(
    ("kind", "error", "message", "hint"),
    [
        ("gated", ServeError, "is gated, and there is no token", "echo HF_TOKEN=TOKEN >> .env"),
        ("absent", SourceError, "the hub has no model openai/gpt-oss-20b", "serve.list"),
        ("disk", ToolchainError, "cannot be stored", "df -h"),
        ("network", SourceError, "could not be fetched", "resumes the fetch"),
    ],
)
def test_refused_fetch_is_an_error_with_a_hint(
    clone: Clone, kind: str, error: type[WorkspaceError], message: str, hint: str
) -> None:
    clone.refuses(kind, "the hub's own message")
    with pytest.raises(error) as caught:
        clone.fetch()
    assert message in caught.value.message
    assert "the hub's own message" in caught.value.message
    assert hint in (caught.value.hint or "")


def test_refused_token_is_never_shown(clone: Clone) -> None:
    clone.refuses("gated", "no access for hf_swordfish")
    with pytest.raises(ServeError, match="this token has no access") as caught:
        clone.fetch(HF_TOKEN="hf_swordfish")
    assert "swordfish" not in caught.value.message + clone.output


@pytest.mark.parametrize(
    "code", ["raise SystemExit(3)", "print('nothing')", "print('{}')", "print('{')", "pass"]
)
def test_probe_that_dies_or_prints_no_document_is_an_error(clone: Clone, code: str) -> None:
    clone.probe(code)
    with pytest.raises(SourceError) as caught:
        clone.fetch()
    assert caught.value.hint


def test_incomplete_model_is_refused(clone: Clone) -> None:
    clone.probe(FETCHED.replace('"model.safetensors"', '"model-00001-of-00002.safetensors"'))
    with pytest.raises(SourceError, match="without all of its weights"):
        clone.fetch()


def test_offline_setting_stops_before_the_probe_runs(clone: Clone) -> None:
    clone.probe("raise SystemExit('run')")
    with pytest.raises(SettingsError, match=r"HF_HUB_OFFLINE \(shell\)") as caught:
        clone.fetch(HF_HUB_OFFLINE="1")
    assert caught.value.hint == "unset HF_HUB_OFFLINE"


def test_missing_recipe_and_missing_environment_are_errors(clone: Clone) -> None:
    with pytest.raises(SettingsError, match="no recipe"):
        clone.fetch("gpt-oss-2b")
    clone.layout.environment_python.unlink()
    with pytest.raises(ToolchainError, match="no built environment"):
        clone.fetch()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder with both vocabularies, and its address."""
    folder = tmp_path / "store"
    folder.mkdir()
    for name in run_environment.VOCABULARIES:
        (folder / name).write_text(f"the tokens of {name}\n" * 1000)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    )
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    ).start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def published(clone: Clone, address: str, digests: dict[str, str]) -> None:
    """Install a tiktoken that has the vocabularies' addresses, and a harmony that needs them."""
    shutil.rmtree(clone.packages / "oss_harmony-0.0.11.dist-info")
    clone.package("openai-harmony", "0.0.8")
    (clone.packages / "tiktoken_ext").mkdir()
    calls = "".join(
        f'def f{index}():\n    return load_tiktoken_bpe(\n        "{address}/{name}",\n       '
        f' expected_hash="{digest}",\n    )\n'
        for index, (name, digest) in enumerate(digests.items())
    )
    (clone.packages / "tiktoken_ext" / "openai_public.py").write_text(calls)


def test_vocabularies_are_fetched_with_their_hash_if_harmony_needs_them_and_runs_use_them(
    clone: Clone, store: tuple[Path, str]
) -> None:
    folder, address = store
    published(
        clone,
        address,
        {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in run_environment.VOCABULARIES
        },
    )
    clone.probe(FETCHED)
    settings = load(clone.layout, environ=clone.shell)
    assert run_environment.ENCODINGS not in run_environment.built_environment(
        clone.layout, settings, "fetch", stack=None
    )
    clone.fetch()
    assert sorted(path.name for path in clone.layout.encodings.iterdir()) == sorted(
        run_environment.VOCABULARIES
    )
    assert run_environment.built_environment(clone.layout, settings, "serve", stack=None)[
        run_environment.ENCODINGS
    ] == str(clone.layout.encodings)
    # A file that was damaged later is fetched again.
    (clone.layout.encodings / run_environment.VOCABULARIES[0]).write_text("damaged")
    clone.fetch()
    assert (clone.layout.encodings / run_environment.VOCABULARIES[0]).read_bytes() == (
        folder / run_environment.VOCABULARIES[0]
    ).read_bytes()
    clone.fetch()
    assert "on disk" in clone.output.splitlines()[1]


def test_vocabulary_with_another_hash_is_refused_and_runs_do_not_use_it(
    clone: Clone, store: tuple[Path, str]
) -> None:
    published(clone, store[1], dict.fromkeys(run_environment.VOCABULARIES, "0" * 64))
    clone.probe(FETCHED)
    with pytest.raises(SourceError, match="sha256"):
        clone.fetch()
    assert run_environment.ENCODINGS not in run_environment.built_environment(
        clone.layout, load(clone.layout, environ=clone.shell), "serve", stack=None
    )


def test_model_without_harmony_needs_no_vocabularies(clone: Clone) -> None:
    clone.probe(
        FETCHED.replace("openai/gpt-oss-20b", "Qwen/Qwen3-8B")
        .replace('["--ignore", "original/*", "--ignore", "metal/*"]', "[]")
        .replace("openai--gpt-oss-20b", "Qwen--Qwen3-8B")
    )
    clone.fetch("Qwen/Qwen3-8B")
    assert "does not use the harmony format" in clone.output
