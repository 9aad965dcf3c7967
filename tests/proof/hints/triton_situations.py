"""Situations of Triton: of its pin, its checkout and its build, with the small Triton."""

from pathlib import Path

from tests.machine.programs import NEW
from tests.proof.hints.broken_situations import bound
from tests.proof.hints.doctor_situations import assembler, driver
from tests.proof.hints.following import User, runs
from tests.small import tritons, wheels
from tests.small.materials import git
from tests.small.tritons import Upstream

BUMP = ("pin.bump", "triton")
BUILD = ("fix-triton", "--from-source")


def upstream_of(user: User) -> Upstream:
    made = tritons.make(user.world, user.root / ".workspace" / "small")
    user.git("add", "--all", "vendor/pins.toml", "patches")
    user.git("commit", "--quiet", "-m", "The small Triton")
    return made


def checked_out(user: User) -> Path:
    assert user.inv(*BUMP).code == 0
    return user.world.layout.triton


def goes_on(upstream: Upstream, file: str, text: str) -> None:
    """Let Triton's main have one more commit."""
    (upstream.tree / file).write_text(text)
    git(upstream.tree, "add", "--all")
    git(upstream.tree, "commit", "--quiet", "-m", "More")


def commit(tree: Path, file: str, text: str) -> str:
    (tree / file).write_text(text)
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "-m", "[Core] Mine\n\nUpstream-Status: Pending")
    return git(tree, "rev-parse", "HEAD")


@runs("bump.triton_ref", "bump.triton_again", "bump.commit_triton")
def triton_that_went_on(user: User) -> None:
    upstream = upstream_of(user)
    user.world.layout.dotenv.write_text("TRITON_REF=gone\n")
    user.follow("bump.triton_ref", *BUMP, put={"BRANCH": "main"})
    goes_on(upstream, "more", "one\n")
    user.follow("bump.triton_again", "pin")
    goes_on(upstream, "more", "two\n")
    user.follow("bump.commit_triton", *BUMP)
    assert user.git("log", "-1", "--format=%s").startswith("pin: move Triton to ")


@runs("bump.triton_stash", "bump.triton_continue", "bump.triton_keep", "bump.triton_patch")
def checkout_of_triton_that_is_the_users(user: User) -> None:
    upstream = upstream_of(user)
    tree = checked_out(user)
    answer = tree / "src" / "answer.c"
    answer.write_text(f"{answer.read_text()}// mine\n")
    user.follow("bump.triton_stash", *BUMP)
    assert "// mine" in git(tree, "stash", "show", "--patch")
    mine = commit(tree, "mine", "mine\n")
    git(tree, "checkout", "--quiet", "--detach", upstream.pinned)
    git(tree, "cherry-pick", "--no-commit", mine)
    (tree / ".git" / "CHERRY_PICK_HEAD").write_text(f"{mine}\n")
    user.follow("bump.triton_continue", *BUMP, then=False)
    user.follow("bump.triton_keep", *BUMP)
    # With all contents; a partial clone cannot tell whether a patch applies.
    git(tree, "config", "--remove-section", "remote.origin")
    goes_on(upstream, "mine", "theirs\n")
    user.edits_with('sed -i /Core-Mine/d "$file"')
    user.follow("bump.triton_patch", *BUMP)
    assert user.world.layout.patches("triton").joinpath("Core-Mine.patch").exists()


@runs("install.triton_source", "compile.triton_edits", "install.triton_ref")
def triton_that_is_built_here(user: User) -> None:
    upstream = upstream_of(user)
    user.follow("install.triton_source", "fix-triton", "--ref", "main", then=False)
    answer = user.world.layout.triton / "src" / "answer.c"
    answer.write_text(f"{answer.read_text()}// mine\n")
    user.follow("compile.triton_edits", *BUILD)
    git(upstream.tree, "tag", "v3.7.1", upstream.pinned)
    series = user.world.layout.patches("triton") / "series"
    series.write_text("".join(series.read_text().splitlines(keepends=True)[:-1]))
    user.follow("install.triton_ref", *BUILD, "--ref", "broken", then=False)


@runs("compile.triton_origin", "compile.triton_mirror", "compile.set_folder",
      "install.triton_mounts")  # fmt: skip
def triton_that_cannot_be_built(user: User) -> None:
    upstream = upstream_of(user)
    network = str(upstream.network)
    offline = {"TRITON_OFFLINE_BUILD": "1"}
    put = {"/a/folder": network}
    user.follow("compile.set_folder", *BUILD, put=put, then=False, **offline)
    user.follow("compile.set_folder", *BUILD, put=put, then=False, **offline)
    assert "JSON_SYSPATH" in user.world.layout.dotenv.read_text()
    user.world.layout.dotenv.unlink()
    del user.world.env["TRITON_DOWNLOADS_MIRROR"]
    nowhere = {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    user.follow("compile.triton_mirror", *BUILD, put=put, then=False, **nowhere)
    user.mounts(bound(user.world.layout.environment, "ro"))
    user.look("install.triton_mounts", *BUILD, shows=r"vllm.*\(ro")
    user.through = ()
    git(upstream.tree, "rm", "--quiet", "-r", "setup.py")
    git(upstream.tree, "commit", "--quiet", "-m", "No setup.py")
    user.look("compile.triton_origin", *BUILD, "--ref", "main", shows="HEAD detached")


@runs("install.fix_triton", "install.unset_then_fix")
def triton_that_torch_does_not_pair_with(user: User) -> None:
    upstream_of(user)
    folder = user.root / "wheels"
    files = {
        "torch/__init__.py": b"from torch import version\n",
        "torch/version.py": b"__version__ = '2.13.0'\ncuda = '13.0'\n",
    }
    old = wheels.write(folder, "triton", "3.6.0", {"triton/__init__.py": b""})
    torch = wheels.write(folder, "torch", "2.13.0", files, requires=("triton==3.7.1",))
    user.world.index.add(old)
    user.world.uv("install", "--no-deps", "--reinstall", "triton==3.6.0", str(torch))
    user.follow("install.fix_triton", "status")
    driver(user)
    packages = next(user.world.layout.environment.glob("lib/python3*/site-packages"))
    for name in ("ptxas", "ptxas-blackwell"):
        place = packages / "triton" / "backends" / "nvidia" / "bin" / name
        assembler(place, "13.0", NEW)
    shell = {"TRITON_PTXAS_BLACKWELL_PATH": "/nowhere/ptxas"}
    user.follow("install.unset_then_fix", "fix-triton", put=None, then=False, **shell)
