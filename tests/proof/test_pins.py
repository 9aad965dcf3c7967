"""Forecasts on vLLM's releases 0.30.0 to 0.33.0, as one history of tags and as release archives.

Each forecast is compared with what `git am` then does. Needs the package index: 180 MB, kept in the
user's cache.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from pypi_simple import PYPI_SIMPLE_ENDPOINT

from tests.repo import two_releases as ladders
from tests.repo.conftest import export, sh_git, write
from tests.repo.two_releases import Index, TwoReleases
from tests.repo.workspaces import Workspace
from workspace.bump import forecast
from workspace.bump.forecast import Forecast
from workspace.core import settings as settings_module
from workspace.core.console import Console
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.repo import index, pins
from workspace.repo.pins import Archive, Pin, Wanted

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("0.30.0", "0.31.0", "0.32.0", "0.33.0")
SHIPPED = "Bugfix-CPU-Extract-AVX512-and-AVX2-kernels-from-precompiled-wheels"
CPU_UTILS = "vllm/utils/cpu_triton_utils.py"
# The caller in 0.32.0 no longer passes block_size, so the first generation dies. A separator
# between two places of a file:
GAP = "\n…\n"
DEFECT = GAP.join(
    (
        "    block_size: int,\n    slot_mapping: torch.Tensor,  # [max_num_tokens], int64\n",
        "        block_size,\n    )",
    )
)
FIX = GAP.join(
    (
        "    slot_mapping: torch.Tensor,  # [max_num_tokens], int64\n    block_size: int = 0,\n",
        "        KV_CACHE_BLOCK_SIZE if block_size == 0 else block_size,\n    )",
    )
)
# Subject: path, the text in 0.31.0, and our change of it. None: the file as in 0.33.0.
EDITS: Mapping[str, tuple[str, str, str] | tuple[str, None, None]] = {
    "Say in the log who speaks": (
        "vllm/logger.py",
        '"""Logging configuration for vLLM."""',
        '"""Logging configuration for vLLM, with local patches."""',
    ),
    "Let the KV cache block size stand alone": (
        CPU_UTILS,
        "        block_size,\n    )",
        "        KV_CACHE_BLOCK_SIZE or block_size,\n    )",
    ),
    "Take any block size": (
        CPU_UTILS,
        "    block_size: int,\n    slot",
        "    block_size: int | None,\n    slot",
    ),
    "Widen mcp": ("requirements/common.txt", "mcp >= 2.0.0, < 3.0.0", "mcp >= 1.0.0, < 4.0.0"),
    "Ask for a CMake that we know": (
        "CMakeLists.txt",
        "cmake_minimum_required(VERSION 3.26)",
        "cmake_minimum_required(VERSION 3.28)",
    ),
    "Describe the server's arguments": (
        "vllm/entrypoints/launchers/cli_args.py",
        "class LoRAParserAction(argparse.Action):",
        "# Reads --lora-modules.\nclass LoRAParserAction(argparse.Action):",
    ),
    "Load audio as the next release does": ("vllm/assets/audio.py", None, None),
    "Leave a note": ("vllm/local_note.py", "", "NOTE = 1\n"),
}
FATES = {
    SHIPPED: "clean",
    "Say-in-the-log-who-speaks": "clean",
    "Let-the-KV-cache-block-size-stand-alone": f"conflicts {CPU_UTILS}",
    "Take-any-block-size": (
        f"conflicts {CPU_UTILS} after Let-the-KV-cache-block-size-stand-alone.patch"
    ),
    "Widen-mcp": "conflicts requirements/common.txt",
    "Ask-for-a-CMake-that-we-know": "clean",
    "Describe-the-server-s-arguments": "clean merged",
    "Load-audio-as-the-next-release-does": "upstreamed tree",
    "Leave-a-note": "clean",
}


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return settings_module.load(Layout(tmp_path_factory.mktemp("none")))


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory, settings: Settings) -> TwoReleases:
    """The releases as one history, and a work tree of it at 0.31.0."""
    root = tmp_path_factory.mktemp("real")
    bare, parent, commits, sdists = root / "vllm.git", "", {}, {}
    pinned = pins.load(ROOT / "vendor" / "pins.toml").vllm
    sh_git(root, "init", "--quiet", "--bare", str(bare))
    for version in VERSIONS:
        sdist = index.find_release(pinned, version, settings=settings).sdist
        assert sdist
        sdists[version] = index.fetch("vllm", sdist.filename, sdist.sha256, settings=settings)
        release_pin = replace(pinned, tag=f"v{version}", version=version)
        _, tree = pins.build_archive(sdists[version], root / version, release_pin)
        sh_git(
            bare,
            "fetch",
            "--quiet",
            "--no-tags",
            str(root / version),
            f"HEAD:refs/archives/{version}",
        )
        parent = commits[version] = sh_git(
            bare, "commit-tree", "-m", f"vLLM {version}", *(("-p", parent) if parent else ()), tree
        )
        sh_git(bare, "update-ref", f"refs/tags/v{version}", parent)
        shutil.rmtree(root / version)
    sh_git(bare, "update-ref", "refs/heads/main", parent)
    sh_git(bare, "config", "uploadpack.allowFilter", "true")
    sh_git(root, "clone", "--quiet", "--shared", str(bare), "work")
    pin = replace(pinned, commit=commits["0.31.0"], url="file:///nowhere", precompiled={})
    return TwoReleases(root, root / "work", bare, pin, {}, commits, sdists)


def series(
    real: TwoReleases, base: str, edits: Mapping[str, tuple[str, str | None, str | None]]
) -> dict[str, bytes]:
    """Commit each edit on a release, and export it."""
    made = {}
    sh_git(real.work, "checkout", "--quiet", "--force", "--detach", f"v{base}")
    for subject, (path, before, after) in edits.items():
        text = sh_git(real.work, "show", f"v0.33.0:{path}") + "\n" if before is None else ""
        if before:
            text = (real.work / path).read_text()
            for old, new in zip(before.split(GAP), (after or "").split(GAP), strict=True):
                assert text.count(old) == 1, path
                text = text.replace(old, new)
        write(real.work, {path: text or after or ""})
        sh_git(real.work, "add", path)
        sh_git(
            real.work, "commit", "--quiet", "--message", f"{subject}\n\nUpstream-Status: Pending"
        )
        made[sh_git(real.work, "log", "-1", "--format=%f") + ".patch"] = export(real.work, "HEAD")
    return made


@pytest.fixture(scope="session")
def full_series(real: TwoReleases) -> dict[str, bytes]:
    shipped = (ROOT / "patches" / "vllm" / f"{SHIPPED}.patch").read_bytes()
    return {f"{SHIPPED}.patch": shipped, **series(real, "0.31.0", EDITS)}


def cloned(folder: Path, real: TwoReleases, pin: Pin, *, address: str) -> Iterator[Workspace]:
    made = pin.archive or Archive("vllm-0.tar.gz", "0" * 64, "0" * 40, "0" * 40)
    with ladders.cloned(
        folder, replace(real, pin=replace(pin, archive=made)), Index(address)
    ) as clone:
        clone.environ["WORKSPACE_CACHE_DIR"] = str(settings_module.load(Layout(folder)).cache)
        yield clone


@pytest.fixture
def clone(tmp_path: Path, real: TwoReleases) -> Iterator[Workspace]:
    """A clone on the history's 0.31.0 with an empty index: the archives have another history."""
    (tmp_path / "simple").mkdir()
    yield from cloned(tmp_path, real, real.pin, address=(tmp_path / "simple").as_uri())


def run(clone: Workspace, ref: str) -> Forecast:
    return forecast.run(
        clone.layout,
        clone.settings(),
        Wanted.read(ref),
        console=Console(out=clone.out, err=clone.err),
    )


def fates(made: Forecast) -> dict[str, str]:
    found = {}
    for patch in made.patches:
        parts = [
            patch.state,
            *(["merged"] if patch.merged else []),
            *([patch.test] if patch.test else []),
            *(conflict.path for conflict in patch.conflicts),
        ]
        found[patch.name.removesuffix(".patch")] = " ".join(
            [*parts, *(["after", patch.depends_on] if patch.depends_on else [])]
        )
    return found


def am(real: TwoReleases, base: str, clone: Workspace, names: list[str]) -> str | None:
    """Return the tree that `git am --3way` makes, None if it stops."""
    sh_git(real.work, "checkout", "--quiet", "--force", "--detach", base)
    sh_git(
        real.work,
        "am",
        "--quiet",
        "--3way",
        *(str(clone.layout.patches("vllm") / name) for name in names),
        check=False,
    )
    count = int(sh_git(real.work, "rev-list", "--count", f"{base}..HEAD"))
    tree = sh_git(real.work, "rev-parse", "HEAD^{tree}")
    sh_git(real.work, "am", "--abort", check=False)
    sh_git(real.work, "clean", "--quiet", "-dffx")
    return tree if count == len(names) else None


def test_forecast_of_a_series_is_what_am_then_does(
    clone: Workspace, real: TwoReleases, full_series: dict[str, bytes]
) -> None:
    clone.series(full_series)
    clone.ensure("git")
    made = run(clone, "v0.33.0")
    assert fates(made) == FATES
    by_name = {patch.name: patch for patch in made.patches}
    assert all(
        conflict.commits == (f"{real.commits['0.33.0'][:12]} vLLM 0.33.0",)
        for conflict in by_name["Take-any-block-size.patch"].conflicts
    )
    for name, patch in by_name.items():
        before = None if patch.state == "conflicts" else am(real, "v0.33.0", clone, [name])
        assert (before is None) == (patch.state != "clean"), name
        if patch.state == "conflicts" and not patch.depends_on:
            assert am(real, "v0.33.0", clone, [name]) is None
    kept = {name: full_series[name] for name, patch in by_name.items() if patch.state == "clean"}
    clone.series(kept)
    assert run(clone, "v0.33.0").tree == am(real, "v0.33.0", clone, list(kept))


def test_what_else_moves_between_two_real_releases(clone: Workspace) -> None:
    clone.series({})
    clone.ensure("git")
    write(
        clone.layout.root,
        {".env": "SERVE=--swap-space 4 --max-model-len 9\nVLLM_LOGGING_LEVEL=INFO\n"},
    )
    changes = {
        (change.topic, change.name): change
        for change in run(clone, "v0.33.0").changes
        if change.name != "torch" or "cuda.txt" in change.where[-1]
    }
    torch = changes["requirement", "torch"]
    assert (torch.before, torch.after) == ("==2.13.0", "==2.14.0")
    assert changes["requirement", "flashinfer-python"].after == "==0.7.2.post1"
    assert (changes["minimum", "Python"].before, changes["minimum", "Python"].after) == (
        ">=3.10,<3.15",
        ">=3.11,<3.15",
    )
    assert changes["external", "deepgemm"].after == "0820030756945b2daec208e8e8255268360f337d"
    assert (
        changes["external", "vllm-flash-attn"].after == "b273a02621d3c94bc747df67204f591b67f38fae"
    )
    assert changes["sources", "compiled sources"].where
    # Neither is a difference: one was removed long ago, the others still exist.
    assert not [change for change in changes.values() if change.topic in ("flag", "variable")]


@pytest.mark.parametrize(
    ("fix", "fate"),
    [
        # Our own fix.
        ((CPU_UTILS, DEFECT, FIX), f"conflicts {CPU_UTILS}"),
        # Upstream's fix.
        ((CPU_UTILS, None, None), "upstreamed tree"),
    ],
)
def test_fix_of_the_cpu_defect_is_recognised_in_its_file(
    tmp_path: Path, real: TwoReleases, fix: tuple[str, str | None, str | None], fate: str
) -> None:
    (tmp_path / "simple").mkdir()
    pin = replace(
        real.pin, tag="v0.32.0", version="0.32.0", commit=real.commits["0.32.0"], archive=None
    )
    for clone in cloned(tmp_path, real, pin, address=(tmp_path / "simple").as_uri()):
        clone.series(series(real, "0.32.0", {"Fix the slot mapping on a CPU": fix}))
        clone.ensure("git")
        made = run(clone, "v0.33.0")
        assert list(fates(made).values()) == [fate]
        if made.patches[0].conflicts:
            assert made.patches[0].conflicts[0].commits == (
                f"{real.commits['0.33.0'][:12]} vLLM 0.33.0",
            )


def test_release_archives_alone_give_the_same_and_report_what_is_unknown(
    tmp_path: Path, real: TwoReleases, full_series: dict[str, bytes], settings: Settings
) -> None:
    pinned = pins.load(ROOT / "vendor" / "pins.toml").vllm
    for clone in cloned(tmp_path, real, pinned, address=settings.index_url or PYPI_SIMPLE_ENDPOINT):
        clone.environ |= {"VLLM_MIRROR": (tmp_path / "nowhere").as_uri()}
        clone.series(full_series)
        clone.ensure("release")
        made = run(clone, "0.33.0")
        assert fates(made) == FATES
        pin = made.candidate.pin
        assert pin.archive
        assert (pin.commit, made.candidate.prefix) == (pin.archive.commit, "4ba787ec9")
        assert {"cuda-x86_64", "cuda-aarch64"} <= set(pin.precompiled)
        assert all(
            conflict.commits is None for patch in made.patches for conflict in patch.conflicts
        )
        output = [change.remark for change in made.changes if change.topic == "unknown"]
        assert any("no history" in sentence for sentence in output)
        assert any("4ba787ec9" in sentence for sentence in output)
        assert os.path.isdir(made.candidate.store)
