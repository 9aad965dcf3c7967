"""A bootstrapped small clone whose smoke gives verdicts at once, from stand-in probes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.small import releases as small_releases
from tests.small.materials import Materials, git
from tests.small.releases import Releases
from tests.small.world import Ended, World, make_world

PARITY = """import json, sys
from pathlib import Path

import torch
import vllm
from vllm.platforms import current_platform

tree = Path(vllm.__file__).parent
equal = 0 if getattr(vllm, "BROKEN", False) else 2
same = {"error": None, "same_prompt": True, "equal": equal, "total": 2, "compared": 4, "wanted": 4}
same |= {"not_finite": 0, "behind": 0, "partings": [], "cached": [1], "chunks": 2, "seconds": {}}
same |= {"decode_difference": 0.0, "prefill_difference": 0.0}
forms = {
    "norm": ["an epsilon"],
    "linear": ["biases"],
    "rotary": ["rope scaled by llama3", "rope scaled by yarn"],
    "attention": ["a window"],
    "mlp": ["biases"],
}
layers = {
    kind: {
        "rows": [{"case": "one", "difference": 0.5, "limit": 1.0}],
        "forms": forms.get(kind, []),
        "seconds": 0.1,
    }
    for kind in ("embedding", *forms)
}
print(json.dumps({
    "error": None,
    "vllm": {
        "file": vllm.__file__,
        "version": vllm.__version__,
        "platform": current_platform.device_type,
        "kernels": [p.name for p in tree.glob("*.so")],
    },
    "torch": {"version": torch.__version__, "cuda": torch.version.cuda},
    "models": {"llama": same, "qwen3": same},
    "layers": {"llama": layers, "qwen3": layers},
    "consistency": {name: same for name in ("repeat", "batch", "parts", "chunked", "prefix")},
}))
"""
REFERENCE = "print('{}')\n"
SAMPLING = """import json
rooms = {
    "templates": ("tokens",),
    "cache": ("blocks", "keys"),
    "sampling": ("logprobs", "penalties", "masks", "filters", "random", "ends"),
}
part = {"error": None, "seconds": 0.1, "rows": [{"case": "one", "problem": None}]}
groups = {f"{room}.{name}": part for room, names in rooms.items() for name in names}
print(json.dumps({"error": None, "groups": groups}))
"""
KERNELS = """import json
rows = [{"case": "one", "difference": 0.5, "limit": 1.0}]
groups = ("norm", "activation", "rotary", "attention", "quantized", "moe")
group = {"error": None, "skipped": None, "rows": rows, "seconds": 0.1}
print(json.dumps({"error": None, "groups": {name: group for name in groups}}))
"""
ROWS = ("pin", "source", "patches", "environment", "kernels", "install")
TINY = "import sys, pathlib\npathlib.Path(sys.argv[1]).mkdir(parents=True)\n"


def judge_at_once(probes: Path) -> None:
    """Install probes that start no engine."""
    for name, text in (
        ("parity", PARITY),
        ("small_model", TINY),
        ("reference", REFERENCE),
        ("kernels", KERNELS),
        ("sampling", SAMPLING),
    ):
        (probes / f"{name}.py").write_text(text)


def smoke(world: World) -> Ended:
    """Run `nox -s smoke`: the checks, and the record of a known-good state."""
    ended = world.session("smoke")
    if ended.code == 0:
        recorded = world.session("record-good")
        assert recorded.code == 0, recorded.output
    return ended


@pytest.fixture(scope="session")
def releases(materials: Materials) -> Releases:
    return small_releases.make(materials)


@pytest.fixture(scope="session")
def _good(materials: Materials, tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_world(materials, tmp_path_factory.mktemp("good"))
    probes = made.layout.probes
    judge_at_once(probes)
    git(made.root, "commit", "--quiet", "--all", "-m", "A smoke for the small world")
    made.bootstrap()
    ended = smoke(made)
    assert ended.code == 0, ended.output
    made.save()
    return made


@pytest.fixture
def clone(_good: World, releases: Releases) -> Iterator[World]:
    """A clone with a known-good state, always at the same path; its index has later releases."""
    _good.restore()
    releases.publish(_good, *releases.files)
    yield _good
    _good.end()


def user_files(world: World) -> dict[str, tuple[int, int, int, int]]:
    """Return what a bump must not touch before its promotion: path, time, size, inode, mode."""
    layout = world.layout
    kept = [
        layout.relative(path)
        for path in (layout.vllm, layout.root / "patches", layout.pins, layout.environment)
    ]
    return {
        path: facts
        for path, facts in world.listing().items()
        if any(path == name or path.startswith(f"{name}/") for name in kept)
        and not _is_of_git(path)
    }


def _is_of_git(path: str) -> bool:
    """Return whether the path is git's: new objects and references are not files of the user."""
    return path.startswith("vendor/vllm/.git")


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")
