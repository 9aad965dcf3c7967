"""The doctor's checks of what the shell brings: library folders before torch's own, the token, variables that hide .env."""

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from workspace.environment import interpreter
from workspace.environment.doctor_case import Case, Row, hub_home, key

_SONAME = re.compile(r"lib[\w+-]+\.so(\.\d+)?")


def library_path(case: Case) -> Iterator[Row]:
    """Check that no folder of LD_LIBRARY_PATH has a library that torch brings too: the loader would take that one (ld.so(8))."""
    text = case.settings.child_environment("run").get("LD_LIBRARY_PATH", "")
    why = "the loader takes a library from there before torch's own of the same name, whatever its version"
    if not text:
        yield Row("ok", "library path", "not set", why)
        return
    # A blank is no separator; a semicolon is one as well.
    entries = re.split(r"[:;]", text)
    own, bad = _libraries_of_torch(case), dict[str, str]()
    for entry in dict.fromkeys(entries):
        if not entry:
            bad[entry] = "an empty entry, which means the current folder"
        elif not _is_torchs_toolkit(case, Path(entry)) and (shadows := sorted(own & _libraries(Path(entry)))):
            more = f" and {len(shadows) - 3} more" if len(shadows) > 3 else ""
            bad[entry] = f"{entry} has {', '.join(shadows[:3])}{more}"
    if not bad:
        yield Row("ok", "library path", f"{len(entries)} folder{'s' if len(entries) > 1 else ''}, none with a library of torch's", why)
        return
    # CUDA_HOME's own folder is put there for each child; leaving it out of the shell's line would change nothing.
    home = case.settings.path("CUDA_HOME")
    if home and set(bad) == {str(home / "lib64")}:
        wanted = (build.cuda if (build := case.torch()) else None) or "13.0"
        cure = f"sed -i 's|^CUDA_HOME=.*|CUDA_HOME=/usr/local/cuda-{wanted}|' .env  # after: sudo apt install cuda-toolkit-{wanted.replace('.', '-')}"
        yield Row("warn", "library path", "; ".join(bad.values()), why, cure)
        return
    kept = ":".join(entry for entry in dict.fromkeys(entries) if entry not in bad and entry != str((home or Path("/nonexistent")) / "lib64"))
    cure = f"export LD_LIBRARY_PATH={shlex.quote(kept)}" if kept else "unset LD_LIBRARY_PATH"
    if "LD_LIBRARY_PATH" in case.settings.passed and case.settings.passed["LD_LIBRARY_PATH"].source == ".env":
        cure = "sed -i '/^LD_LIBRARY_PATH=/d' .env"
    yield Row("warn", "library path", "; ".join(bad.values()), why, cure)


def _is_torchs_toolkit(case: Case, folder: Path) -> bool:
    """CUDA_HOME's folder, which children are given, does no harm where it is of torch's own CUDA."""
    home, build, found = case.settings.path("CUDA_HOME"), case.torch(), case.toolkit()
    is_own = home is not None and folder == home / "lib64"
    return is_own and build is not None and build.cuda is not None and found is not None and key(found.version)[:2] == key(build.cuda)[:2]


def _libraries_of_torch(case: Case) -> frozenset[str]:
    """Names that the loader knows torch's libraries by: its own, and those of NVIDIA's wheels beside it."""
    packages = interpreter.site_packages(case.layout)
    folders = [folder for package in packages for folder in (package / "torch" / "lib", *package.glob("nvidia/*/lib"))]
    return frozenset().union(*(_libraries(folder) for folder in folders))


def _libraries(folder: Path) -> frozenset[str]:
    """The libraries in a folder by name and major version, such as libcublas.so.13; none where it cannot be read."""
    try:
        found = (_SONAME.match(name) for name in os.listdir(folder))
    except OSError:
        return frozenset()
    return frozenset(name[0] for name in found if name and name[1])


def token(case: Case) -> Iterator[Row]:
    """Check whether there is a token for gated models; its value is read by nobody here."""
    environment, why = case.settings.child_environment("run"), "gated models are fetched with it"
    named = next((name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if environment.get(name)), None)
    path = Path(environment.get("HF_TOKEN_PATH") or hub_home(case) / "token")
    if named:
        yield Row("ok", "token", f"present, {named}", why)
        return
    try:
        present = path.stat().st_size > 0
        with path.open("rb"):
            pass
    except FileNotFoundError:
        yield Row("ok", "token", "absent", f"only {why}: .vllm/bin/hf auth login")
    except OSError as exc:
        cure = f'sudo chown "$USER" {shlex.quote(str(path))} && chmod 600 {shlex.quote(str(path))}'
        yield Row("warn", "token", f"{path} cannot be read: {exc.strerror}", why, cure if path.is_file() else f"ls -ld {shlex.quote(str(path))}")
    else:
        yield Row("ok" if present else "warn", "token", f"{'present' if present else 'empty'}, {path}", why, None if present else ".vllm/bin/hf auth login")


def settings(case: Case) -> Iterator[Row]:
    """Check .env: variables of the shell that hide a line of it, and names that nothing here knows."""
    for warning in case.settings.warnings:
        found = re.search(r"`(unset \w+)`", warning)
        line = re.match(r"\.env, line (\d+)", warning)
        why = "what .env says is not what runs" if found else "a misspelt name has no effect"
        yield Row("warn", "settings", re.sub(r"; `unset .*$", "", warning), why, found[1] if found else f"${{EDITOR:-nano}} +{line[1] if line else 1} .env")
    if not case.settings.warnings:
        written = case.layout.dotenv.exists()
        yield Row("ok", "settings", "nothing in the shell hides .env" if written else "no .env yet; bootstrap writes one", "the shell goes before .env")
