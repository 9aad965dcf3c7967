"""Stands in for setuptools-scm: a version from the environment, else from git, written where it is
asked to.
"""

import os
import re
import subprocess


def get_version(write_to, **_):
    version = os.environ.get("SETUPTOOLS_SCM_PRETEND_VERSION") or _described()
    with open(write_to, "w") as file:
        file.write(f"__version__ = version = {version!r}\n")
    return version


def _described():
    requested = subprocess.run(
        ["git", "describe", "--tags", "--long", "--abbrev=40", "--match", "v[0-9]*"],
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.fullmatch(r"v(\d+)\.(\d+)\.(\d+)-(\d+)-(g[0-9a-f]+)", requested.stdout.strip())
    if requested.returncode != 0 or not found:
        return "0.1.dev1"
    major, minor, patch, distance, commit = found.groups()
    return (
        f"{major}.{minor}.{patch}"
        if distance == "0"
        else f"{major}.{minor}.{int(patch) + 1}.dev{distance}+{commit}"
    )
