"""Copies of the clone with no more than its doors, and stand-ins for the uv and the Python that
they find on PATH.

No network: a program called uv on PATH makes a virtual environment that borrows the packages of the
one these tests run in, and a program called python3 stands for machines whose Python is too old or
lacks venv and pip.
"""

import json
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = (
    "nothing==1 \\\n    --hash=sha256:"
    + "1" * 64
    + "\nuv==0.13.9 \\\n    --hash=sha256:"
    + "0" * 64
    + "\n"
)

# Makes what it is asked for in 50 ms, notes how it was called, and misbehaves as FAKE_MANNER says.
FAKE_UV = """#!@PYTHON@ -Es
import json, os, signal, sys, venv
words, manner = sys.argv[1:], os.environ.get("FAKE_MANNER")
if words == ["--version"]:
    print("uv 0.13.9 (fake)")
    sys.exit()
with open("@LOG@", "a") as log:
    print(json.dumps([words, dict(os.environ)]), file=log)
if words[0] == "venv":
    builder = venv.EnvBuilder(symlinks=True, with_pip=False)
    builder.create(words[-1])
    python = os.path.basename(os.path.dirname("@PACKAGES@"))
    path = os.path.join(words[-1], "lib", python, "site-packages", "borrowed.pth")
    with open(path, "w") as borrowed:
        borrowed.write("@PACKAGES@")
elif manner == "fail":
    sys.exit("error: could not reach https://me:hunter2@index.example/simple")
elif manner == "stall":
    signal.pause()
elif manner == "full":
    sys.exit("error: write failed: No space left on device (os error 28)")
elif manner == "wait":
    with open("@LOG@.fifo", "w") as fifo:
        fifo.write("here")
    signal.pause()
"""

# A python3 that believes in another version, or has no venv, or no pip; asked to install uv it puts
# the fake one there.
FAKE_PYTHON = """#!@PYTHON@ -Es
import os, runpy, shutil, sys
words, lacks = [word for word in sys.argv[1:] if word != "-Es"], "@LACKS@".split()
if words[:2] == ["-m", "venv"]:
    if "venv" in lacks:
        sys.exit(
            "The virtual environment was not created successfully because ensurepip is not"
            " available."
        )
    os.makedirs(words[2] + "/bin")
    shutil.copy(__file__, words[2] + "/bin/python")
elif words[:2] == ["-m", "pip"]:
    if "pip" in lacks:
        sys.exit("No module named pip")
    if "install" in words:
        with open(words[words.index("-r") + 1]) as file:
            assert file.read().startswith("uv==0.13.9 ")
        assert "--require-hashes" in words
        target = os.path.dirname(os.path.dirname(__file__))
        if "--target" in words:
            target = words[words.index("--target") + 1]
        os.makedirs(target + "/bin", exist_ok=True)
        shutil.copy("@UV@", target + "/bin/uv")
elif words[0].endswith("tools.py"):
    sys.executable, sys.argv = __file__, words
    if "age" in lacks:
        sys.version_info = (3, 9, 0, "final", 0)
    runpy.run_path(words[0], run_name="__main__")
else:
    os.execv("@PYTHON@", ["@PYTHON@", *words])
"""


def program(path: Path, text: str, **args: str) -> Path:
    """Write an executable, @WORDS@ filled in."""
    for name, arg in {
        "PYTHON": sys.executable,
        "PACKAGES": sysconfig.get_path("purelib"),
        **args,
    }.items():
        text = text.replace(f"@{name}@", arg)
    path.unlink(missing_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@dataclass(frozen=True)
class Clone:
    """A copy of what the doors need, with a PATH of its own."""

    root: Path
    programs: Path

    @property
    def tools(self) -> Path:
        return self.root / ".workspace" / "tools"

    @property
    def log(self) -> Path:
        return self.programs / "uv.log"

    def calls(self) -> list[tuple[list[str], dict[str, str]]]:
        return (
            [
                (args, environment)
                for args, environment in map(json.loads, self.log.read_text().splitlines())
            ]
            if self.log.exists()
            else []
        )

    def environment(self, **more: str) -> dict[str, str]:
        return {"PATH": f"{self.programs}:/usr/bin:/bin", "HOME": str(self.programs), **more}

    def run(
        self, *argv: str | Path, cwd: Path | None = None, **more: str
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            argv,
            cwd=cwd or self.programs,
            env=self.environment(**more),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=30,
        )

    def inv(
        self, *args: str, cwd: Path | None = None, **more: str
    ) -> "subprocess.CompletedProcess[str]":
        return self.run(self.root / "scripts" / "inv", *args, cwd=cwd, **more)


def make_clone(folder: Path) -> Clone:
    clone = Clone(folder / "a clone", folder / "programs")
    clone.programs.mkdir(parents=True)
    for name in ("tasks.py", "noxfile.py", "scripts", "workspace"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        clone.root.mkdir(exist_ok=True)
        copy(ROOT / name, clone.root / name)
    (clone.root / "requirements").mkdir()
    (clone.root / "requirements" / "tools.txt").write_text(REQUIREMENTS)
    program(clone.programs / "uv", FAKE_UV, LOG=str(clone.log))
    (clone.programs / "python3").symlink_to(sys.executable)
    return clone


def is_list(text: str) -> bool:
    return text.startswith("Start here:\n") and "\n  bootstrap " in text and "\n  status " in text


HOSTILE = {
    "VIRTUAL_ENV": "/nowhere",
    "CONDA_PREFIX": "/nowhere",
    "PYTHONHOME": "/nowhere",
    "CDPATH": "/usr:/",
    "UV_PYTHON": "3.8",
    "UV_TORCH_BACKEND": "cu130",
    "UV_EXCLUDE_NEWER": "2001-01-01",
    "PIP_TARGET": "/nowhere",
    "PIP_REQUIRE_VIRTUALENV": "1",
    "PIP_USER": "1",
    "INVOKE_RUN_ECHO": "1",
    "LC_ALL": "C",
}


def booby_trap(folder: Path) -> Path:
    """A folder in which every import of the doors would go wrong."""
    folder.mkdir()
    for name in (
        "sitecustomize",
        "invoke",
        "nox",
        "workspace",
        "tasks",
        "random",
        "json",
        "dotenv",
    ):
        (folder / f"{name}.py").write_text("raise SystemExit(f'{__file__} was imported')\n")
    return folder
