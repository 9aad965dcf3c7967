"""Build the site of docs/ into .workspace/site, and check the files of .github/ by their schemas.

Owns .workspace/docs, the environment that holds MkDocs: made beside its place from the hash-locked
requirements/docs.txt, moved there when it is complete, renewed when that file changes. Packages
come from where scripts/tools.py takes them.
"""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Untyped, because it must parse in an old Python.
from scripts.tools import (  # noqa: E402
    CHECK_INDEX,
    FETCH,
    MACHINE,
    TOOLS,
    Failure,
    call,
    info,
    package_sources,
)

STATE = ROOT / ".workspace"
VENV = STATE / "docs"
SITE = STATE / "site"
REQUIREMENTS = ROOT / "requirements" / "docs.txt"
# Names of check-jsonschema's own copies: a check needs no network.
SCHEMAS = {
    "vendor.github-workflows": ".github/workflows/*.yml",
    "vendor.github-issue-forms": ".github/ISSUE_TEMPLATE/[!c]*.yml",
    "vendor.github-issue-config": ".github/ISSUE_TEMPLATE/config.yml",
    "vendor.dependabot": ".github/dependabot.yml",
}
# Silences a notice on every build: Material for MkDocs gets fixes until May 2027. Choose its
# successor before then, and remove this line.
NOTICES = {"NO_MKDOCS_2_WARNING": "1"}

AFTER_CORRECTION = "correct what the lines above name, then ./scripts/nox -s docs"


def main() -> int:
    """Prepare the environment, check the files, build the site, and return the exit code."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        environment, index = package_sources()
        prepare(environment, index)
        check_schemas(environment)
        build(environment)
    except Failure as exc:
        for line in exc.details:
            info(f"  {line}")
        info(f"error: {exc.message}")
        info(f"hint: {exc.hint}")
        return int(exc.code)
    except KeyboardInterrupt:
        info("interrupted")
        return 130
    return 0


def prepare(environment: Mapping[str, str], index: list[str]) -> None:
    """Make the environment unless it is complete. Raises Failure, and then changes nothing."""
    STATE.mkdir(exist_ok=True)
    with held_lock():
        if is_complete():
            return
        info("preparing the docs environment …")
        remove_leftovers()
        new = STATE / f"docs.new-{os.getpid()}"
        try:
            install(new, environment, index)
            # Written last: what lacks it is not complete.
            shutil.copyfile(REQUIREMENTS, new / "requirements.txt")
            if VENV.exists():
                VENV.rename(STATE / f"docs.old-{os.getpid()}")
            new.rename(VENV)
        finally:
            remove_leftovers()


@contextmanager
def held_lock() -> Iterator[None]:
    """Let one process at a time prepare the environment."""
    with (STATE / "docs.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def is_complete() -> bool:
    """Return whether the environment was made from today's requirements and can start."""
    try:
        made = (VENV / "requirements.txt").read_bytes()
    except OSError:
        return False
    return made == REQUIREMENTS.read_bytes() and os.access(VENV / "bin" / "python", os.X_OK)


def install(folder: Path, environment: Mapping[str, str], index: list[str]) -> None:
    """Make a virtual environment with the locked packages, and prove that it works."""
    uv, python = Path(TOOLS) / "bin" / "uv", folder / "bin" / "python"
    venv = [uv, "venv", "--quiet", "--relocatable", "--python", sys.executable, folder]
    call(venv, environment, MACHINE, "the docs environment cannot be made", "df -h .")
    locked = ["--require-hashes", "--no-build", "-r", REQUIREMENTS]
    argv = [uv, "pip", "install", "--quiet", "--python", python, *locked, *index]
    call(argv, environment, FETCH, "the docs packages could not be installed", CHECK_INDEX)
    imports = [python, "-Es", "-c", "import check_jsonschema, material, mkdocs"]
    message = "the docs packages were installed but cannot be imported"
    call(imports, environment, MACHINE, message, "run the same command again")


def remove_leftovers() -> None:
    """Remove what an interrupted run left. The lock keeps other runs away from it."""
    for path in STATE.iterdir():
        if re.fullmatch(r"docs\.(new|old)-\d+", path.name):
            shutil.rmtree(path, ignore_errors=True)


def check_schemas(environment: Mapping[str, str]) -> None:
    """Compare the files of .github/ with GitHub's schemas. Raises Failure where one differs."""
    for schema, pattern in SCHEMAS.items():
        files = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(pattern))]
        if not files:
            raise Failure(1, f"there is no {pattern}", f"git checkout -- {Path(pattern).parent}")
        argv = [*python_of(VENV), "check_jsonschema", "--builtin-schema", schema, *files]
        call(argv, environment, 1, f"{pattern} breaks its schema", AFTER_CORRECTION)


def build(environment: Mapping[str, str]) -> None:
    """Build the site. Raises Failure for every warning, such as a link that leads nowhere."""
    # With --quiet, MkDocs would not see its own warnings, and pass.
    argv = [*python_of(VENV), "mkdocs", "build", "--strict", "--site-dir", str(SITE)]
    ended = subprocess.run(argv, env={**environment, **NOTICES}, cwd=ROOT, check=False)
    if ended.returncode != 0:
        raise Failure(1, "the site could not be built", AFTER_CORRECTION)
    info(f"site: {SITE.relative_to(ROOT)}/index.html")


def python_of(folder: Path) -> list[str]:
    """Return the beginning of a command line that runs a module of an environment."""
    return [str(folder / "bin" / "python"), "-I", "-m"]


if __name__ == "__main__":
    sys.exit(main())
