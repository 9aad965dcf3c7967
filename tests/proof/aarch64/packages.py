"""Packages of the distribution for arm64: fetched by apt into a folder, with lists of its own,
without root; nothing is installed.
"""

import subprocess
from collections.abc import Sequence
from pathlib import Path


def unpack(names: Sequence[str], folder: Path, root: Path, *, with_dependencies: bool) -> int:
    """Fetch packages, with what they depend on if wanted, and unpack them into `root`. Return
    their number. What `folder` has of them already is not fetched again.
    """
    archives = folder / "archives"
    for name in ("lists/partial", "archives/partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    options = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "",
        "Dir::State": folder,
        "Dir::State::status": "/dev/null",
        "Dir::Cache": folder,
    }
    argv = ["apt-get", "-qq", *(f"--option={name}={value}" for name, value in options.items())]
    wanted = ["download", *names]
    if with_dependencies:
        wanted = ["install", "--download-only", "--yes", "--no-install-recommends", *names]
    for verb in (["update"], wanted):
        subprocess.run([*argv, *verb], cwd=archives, check=True)
    # Debian has merged /bin, /lib and /sbin into /usr; packages with the old names follow links.
    for name in ("bin", "lib", "sbin"):
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        if not (root / name).is_symlink():
            (root / name).symlink_to(f"usr/{name}")
    packages = sorted(archives.glob("*.deb"))
    for package in packages:
        tar = ["tar", "--extract", "--keep-directory-symlink", f"--directory={root}"]
        argv = ["dpkg-deb", "--fsys-tarfile", str(package)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as files:
            subprocess.run(tar, stdin=files.stdout, check=True)
        if files.returncode:
            raise subprocess.CalledProcessError(files.returncode, argv)
    return len(packages)
