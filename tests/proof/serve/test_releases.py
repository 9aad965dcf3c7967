"""The table of removed names against the sources of real releases from the package index, 21 to 48
MB each.
"""

import functools
import tarfile
from pathlib import Path

import pytest

from workspace.core.paths import here
from workspace.core.settings import load
from workspace.machine import run_environment
from workspace.repo import index
from workspace.server import flags

RELEASES = ("0.24.0", "0.31.0", "0.33.0")


@functools.cache
def names_of(version: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return the variables and flags in the archive of a release."""
    settings = load(here())
    filename = f"vllm-{version}.tar.gz"
    package = next(
        package
        for package in index.project_page("vllm", settings).packages
        if package.filename == filename
    )
    archive: Path = index.fetch("vllm", filename, package.digests["sha256"], settings=settings)
    variables: frozenset[str] = frozenset()
    known: frozenset[str] = frozenset()
    with tarfile.open(archive) as tar:
        for member in tar:
            path = member.name.partition("/")[2]
            if path == "vllm/envs.py":
                variables = run_environment.variables_of(tar.extractfile(member).read())
            elif path == "vllm/engine/arg_utils.py" or (
                path.startswith("vllm/entrypoints/") and path.endswith("/cli_args.py")
            ):
                known |= flags.flags_of(tar.extractfile(member).read())
    assert variables
    assert known
    return variables, known


def key(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


@pytest.mark.parametrize("version", RELEASES)
def test_table_is_right_for_a_release(version: str) -> None:
    variables, known = names_of(version)
    for kind, names in (("variables", variables), ("flags", known)):
        for former in run_environment.removed_names(kind).values():
            if not former.last or key(former.gone) <= key(version):
                assert former.name not in names, former
            elif key(version) == key(former.last):
                assert former.name in names, former
