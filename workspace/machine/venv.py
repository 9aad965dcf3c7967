"""What goes into `.vllm`, in order: the interpreter, torch, what the tree requires, and the
accelerators' compilers.

Each function acts and returns a sentence that says what is there now. Nothing here decides whether
it is due.
"""

import csv
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from workspace.core import process
from workspace.core.errors import BuildError, SourceError
from workspace.core.files import write_atomic
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.machine import interpreter, requirements, torch

_NEEDED = ("METADATA", "RECORD", "INSTALLER")
# How uv calls files that it has not yet renamed.
_UNFINISHED = ".tmp??????"
ANSWER_S = 60.0


def repair(
    layout: Layout,
    settings: Settings,
    *,
    run_log: RunLog,
    names: Iterable[str] = (),
    with_cache: bool = False,
) -> tuple[str, ...]:
    """Let uv see half packages as not installed, so that it installs them anew; return their
    dist-info names.

    Only those of `names`, as they begin, where there are any. `with_cache` also removes damaged
    wheels that uv has unpacked.
    """
    taken_out = []
    # A torch of the user's own is nothing that this workspace could have left half, nor could put
    # back.
    kept = ("torch-",) if settings.switch("USE_EXISTING_TORCH") else ()
    for folder in interpreter.site_packages(layout):
        for info in sorted(folder.glob("*.dist-info")):
            is_meant = not info.name.startswith(kept) and (
                not names or info.name.startswith(tuple(f"{name}-" for name in names))
            )
            if is_meant and not _is_complete(info, _NEEDED):
                shutil.rmtree(info)
                taken_out.append(info.name.removesuffix(".dist-info"))
    for place in (layout.environment, *interpreter.site_packages(layout)):
        for left in place.glob(_UNFINISHED):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    if with_cache:
        taken_out += _mend_cache(layout, settings)
    if taken_out:
        run_log.write(f"half there, and to be installed anew: {', '.join(taken_out)}")
    return tuple(taken_out)


def drop_bytecode(layout: Layout, *, since: Path) -> None:
    """Remove bytecode that is newer than the file `since`, all of it where there is none: one that
    a power cut made short breaks its import.
    """
    synced_ns = since.stat().st_mtime_ns if since.exists() else 0
    for top in (*interpreter.site_packages(layout), layout.vllm):
        for folder in top.rglob("__pycache__"):
            for path in folder.glob("*.pyc"):
                if path.stat().st_mtime_ns > synced_ns:
                    path.unlink()


def _mend_cache(layout: Layout, settings: Settings) -> list[str]:
    """Remove the unpacked wheels of uv's cache that are not whole; uv unpacks or fetches them
    again.
    """
    said = process.capture(
        [interpreter.uv(layout), "cache", "dir"],
        env=settings.child_environment("plain"),
        timeout_s=ANSWER_S,
    )
    damaged = []
    for archive in Path(said.stdout.strip() or "/nonexistent").glob("archive-v*/*"):
        infos = list(archive.glob("*.dist-info"))
        if any(not _is_complete(info, ("METADATA", "RECORD")) for info in infos):
            shutil.rmtree(archive, ignore_errors=True)
            damaged += [f"{info.name.removesuffix('.dist-info')} in uv's cache" for info in infos]
    return damaged


def _is_complete(info: Path, needed: Iterable[str]) -> bool:
    try:
        if any((info / name).stat().st_size == 0 for name in needed):
            return False
        with (info / "RECORD").open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
        # A RECORD that was cut off lacks its own row, or the end of another; one that uv has not
        # yet completed lacks the installer's.
        listed = {row[0] for row in rows}
        if any(len(row) != 3 for row in rows) or any(
            f"{info.name}/{name}" not in listed for name in needed
        ):
            return False
        return all(
            (info.parent / name).stat().st_size >= int(size)
            for name, _, size in rows
            if size and not _is_elsewhere(name, needed)
        )
    except (OSError, ValueError, csv.Error):
        return False


def _is_elsewhere(name: str, needed: Iterable[str]) -> bool:
    """An unpacked wheel holds its scripts and data in other places than it lists once installed."""
    return "INSTALLER" not in needed and name.startswith("..")


CUDA_MAJOR = "13"
# What uv says of a download of some size, off a terminal: `Downloading torch (502.3MiB)`, later `
# Downloaded torch`.
_ANNOUNCED = re.compile(r"^\s*Downloading (\S+) \(([\d.]+)([KMG])iB\)")
_FINISHED = re.compile(r"^\s*Downloaded (\S+)")
_MEBIBYTES = {"K": 1 / 1024, "M": 1.0, "G": 1024.0}


@dataclass(frozen=True)
class Provided:
    """The finished environment: what to say of it, and every package in it with its version."""

    summary: str
    packages: Mapping[str, str]


def make_python(layout: Layout, settings: Settings, *, device: str, run_log: RunLog) -> str:
    """Make `.vllm`, or keep the one that is there and works."""
    there = interpreter.describe(layout, settings)
    needs = _needs(
        layout,
        settings,
        device=device,
        python_version=there.version if there else settings.text("PYTHON_VERSION"),
        run_log=None,
    )
    if there and there.version in needs.python and interpreter.is_finished(layout):
        return f"Python {there.version} is there"
    wheels = (
        torch.local_wheel_pythons(needs.torch, settings)
        if device == "cpu" and not settings.switch("USE_EXISTING_TORCH")
        else None
    )
    choice = interpreter.choose(layout, settings, supported=needs.python, wheel_pythons=wheels)
    interpreter.create(layout, settings, choice, run_log=run_log)
    return f"Python {choice.version}" + (f": {choice.reason}" if choice.reason else "")


def put_torch(layout: Layout, settings: Settings, *, device: str, run_log: RunLog) -> str:
    """Install the pin's torch, or keep what is there under USE_EXISTING_TORCH=1.

    Raises BuildError where there is none to keep, or where the one installed is for another device.
    """
    there = torch.observe(layout, settings)
    if settings.switch("USE_EXISTING_TORCH"):
        if there is None:
            raise BuildError(
                "USE_EXISTING_TORCH=1, and .vllm holds no torch",
                hint=(
                    "uv pip install --python .vllm/bin/python torch  # the one you want; then"
                    " ./scripts/inv bootstrap"
                ),
            )
        build = torch.load(layout, settings)
        return f"{build.version} is there and stays (USE_EXISTING_TORCH=1)"
    wanted = torch.plan(
        _needs(layout, settings, device=device, run_log=None).torch,
        device=device,
        settings=settings,
    )
    # A CPU build satisfies `torch==2.13.0` in uv's eyes, and so would stay when the device becomes
    # cuda.
    again = (
        ("--reinstall-package", "torch")
        if there and device == "cuda" and there.cuda is None
        else ()
    )
    said = wanted.description
    attempts = (wanted.arguments, *wanted.alternatives)
    for number, arguments in enumerate(attempts, 1):
        try:
            # Over torch's own word: it asks for the Triton that it was released with.
            interpreter.install(
                layout,
                settings,
                [*again, *arguments, wanted.requirement],
                run_log=run_log,
                overrides=torch.kept_triton(layout),
                on_line=_bar(run_log),
            )
            break
        except SourceError as exc:
            if number == len(attempts):
                raise
            said = f"from {' '.join(attempts[number]) or 'the plain index'}"
            run_log.console.info(f"{exc.message}; now {said}")
    build = torch.load(layout, settings)
    if device == "cuda" and (build.cuda or "").split(".")[0] != CUDA_MAJOR:
        raise BuildError(
            f"torch {build.version} is built for CUDA {build.cuda or 'none'}, needed is"
            f" {CUDA_MAJOR}",
            hint="set TORCH_INDEX_URL in .env to an index that has the CUDA 13 build",
        )
    return f"{build.version}, CUDA {build.cuda or 'none'}; {said}"


def put_requirements(layout: Layout, settings: Settings, *, device: str, run_log: RunLog) -> str:
    """Install what builds and runs the tree, torch held; then torch's companions where they can
    work.
    """
    needs = _needs(layout, settings, device=device, run_log=run_log)
    listed = tuple(dict.fromkeys((*needs.build, *needs.runtime)))
    # As a file, for the sake of who reads the command; it stays, so that the command can be copied
    # into a shell.
    written = layout.state / "requirements.txt"
    write_atomic(written, "".join(f"{line}\n" for line in listed).encode())
    interpreter.install(
        layout,
        settings,
        ["-r", str(written)],
        run_log=run_log,
        constraints=torch.constraints(layout),
        overrides=_overrides(layout, needs),
        on_line=_bar(run_log),
    )
    for requirement, why in needs.left_out:
        run_log.write(f"left out: {requirement}: {why}")
    left_out = f", {len(needs.left_out)} left out (see the log)" if needs.left_out else ""
    return (
        f"{len(listed)} from"
        f" requirements/{left_out}{_companions(layout, settings, needs, device=device, run_log=run_log)}"
    )


def put_accelerators(
    layout: Layout, settings: Settings, *, device: str, run_log: RunLog
) -> Provided:
    """Install xgrammar, triton and FlashInfer as the pin asks, and see that every package is
    whole.
    """
    _put_accelerators(layout, settings, device=device, run_log=run_log)
    if repair(layout, settings, run_log=run_log, with_cache=False):
        # What uv has just linked is short: its cache was damaged, by a power cut say.
        repair(layout, settings, run_log=run_log, with_cache=True)
        put_torch(layout, settings, device=device, run_log=run_log)
        put_requirements(layout, settings, device=device, run_log=run_log)
        _put_accelerators(layout, settings, device=device, run_log=run_log)
    packages = {
        name: version for name, version in interpreter.installed(layout).items() if name != "vllm"
    }
    meant = " (put there on purpose: it stays)" if torch.kept_triton(layout) else ""
    named = [
        f"{name} {packages[name]}{meant if name == 'triton' else ''}"
        for name in ("xgrammar", "triton", "flashinfer-python")
        if name in packages
    ]
    return Provided(", ".join(named) or "none is needed here", packages)


def _put_accelerators(layout: Layout, settings: Settings, *, device: str, run_log: RunLog) -> None:
    needs = _needs(layout, settings, device=device, run_log=None)
    if needs.accelerators:
        arguments = ["--prerelease", "allow"] if settings.switch("ALLOW_PRERELEASE") else []
        interpreter.install(
            layout,
            settings,
            [*arguments, *needs.accelerators],
            run_log=run_log,
            constraints=torch.constraints(layout),
            overrides=_overrides(layout, needs),
        )


def _overrides(layout: Layout, needs: requirements.Requirements) -> tuple[str, ...]:
    """What the tree wants left out, and the Triton that somebody put there on purpose, whatever
    anything asks for.
    """
    meant = torch.kept_triton(layout)
    return (
        *(line for line in needs.overrides if not meant or line.split(" ")[0] != "triton"),
        *meant,
    )


def _bar(run_log: RunLog) -> Callable[[str], None]:
    """Move the step's bar by what uv says of its downloads."""
    announced: dict[str, float] = {}
    finished: set[str] = set()

    def show(line: str) -> None:
        if found := _ANNOUNCED.match(line):
            announced[found[1]] = float(found[2]) * _MEBIBYTES[found[3]]
        elif found := _FINISHED.match(line):
            finished.add(found[1])
        if found and run_log.step:
            done = sum(size for name, size in announced.items() if name in finished)
            run_log.step.progress(
                done, sum(announced.values()), f"{done:.0f} of {sum(announced.values()):.0f} MiB"
            )

    return show


def _needs(
    layout: Layout,
    settings: Settings,
    *,
    device: str,
    run_log: RunLog | None,
    python_version: str | None = None,
) -> requirements.Requirements:
    if python_version is None:
        there = interpreter.describe(layout, settings)
        if there is None:
            raise BuildError(".vllm holds no working Python", hint="./scripts/inv bootstrap")
        python_version = there.version
    return requirements.read(
        layout.vllm,
        device=device,
        machine=platform.machine(),
        python_version=python_version,
        use_existing_torch=settings.switch("USE_EXISTING_TORCH"),
        settings=settings,
        run_log=run_log,
    )


def _companions(
    layout: Layout,
    settings: Settings,
    needs: requirements.Requirements,
    *,
    device: str,
    run_log: RunLog,
) -> str:
    """Install torchvision and friends from where torch came, and take out again what does not
    import: a broken one breaks transformers.
    """
    wanted = torch.plan(needs.torch, device=device, settings=settings) if needs.torch else None
    arguments = (
        torch.companion_arguments(layout, wanted, device=device)
        if wanted and needs.companions
        else None
    )
    if arguments is not None:
        try:
            interpreter.install(
                layout,
                settings,
                [*arguments, *needs.companions],
                run_log=run_log,
                constraints=torch.constraints(layout),
            )
        except (SourceError, BuildError) as exc:
            # A network that failed, or an installer that was killed, is no word on what fits: what
            # is left out now would stay so.
            if not isinstance(exc, interpreter.NotOffered) and not any(
                "No solution found" in line for line in exc.details
            ):
                raise
            run_log.console.info(
                f"torchvision, torchaudio and torchcodec are left out: {exc.message}"
            )
    here = [
        name
        for name in ("torchvision", "torchaudio", "torchcodec")
        if name in interpreter.installed(layout)
    ]
    if not here:
        return ", no torchvision, torchaudio, torchcodec beside this torch"
    done = process.capture(
        [layout.environment_python, layout.probes / "imports.py", "companions"],
        env=settings.child_environment("run"),
        timeout_s=600,
    )
    broken = (
        [name for name, error in json.loads(done.stdout).items() if error and name in here]
        if done.returncode == 0
        else here
    )
    if broken:
        uv = interpreter.uv(layout)
        process.run(
            [uv, "pip", "uninstall", "--python", layout.environment_python, *broken],
            env=settings.child_environment("plain"),
            run_log=run_log,
        )
        run_log.console.info(
            f"{', '.join(broken)} cannot be imported beside this torch and was taken out again"
        )
    return (
        f", with {', '.join(name for name in here if name not in broken)}"
        if len(broken) < len(here)
        else ""
    )


_LIST = "files.json"


@dataclass(frozen=True)
class Former:
    """A kept Triton; `version` is None where there was none."""

    folder: Path
    version: str | None


def keep_former(layout: Layout) -> Former:
    """Keep the files of the installed Triton. What is kept already, of a run that was killed, is
    the one to go back to.
    """
    folder = layout.environment / ".workspace" / "former-triton"
    if (folder / _LIST).is_file():
        return _known(folder)
    shutil.rmtree(folder, ignore_errors=True)
    version = interpreter.installed(layout).get("triton")
    names = list(_listed(layout, version)) if version else []
    (folder / "files").mkdir(parents=True)
    for number, path in enumerate(names):
        os.link(layout.environment / path, folder / "files" / str(number), follow_symlinks=False)
    # Last: without it nothing was changed yet.
    write_atomic(folder / _LIST, json.dumps({"version": version, "files": names}).encode())
    return Former(folder, version)


def is_former_kept(layout: Layout) -> bool:
    """Whether a run that was killed has left the one to go back to."""
    return (layout.environment / ".workspace" / "former-triton" / _LIST).is_file()


def put_former_back(layout: Layout, settings: Settings, one: Former, *, run_log: RunLog) -> None:
    """Take out what is there now, and put every file of the former one back to its place."""
    if "triton" in interpreter.installed(layout):
        argv: list[process.Argument] = [
            interpreter.uv(layout),
            "pip",
            "uninstall",
            "--python",
            layout.environment_python,
            "triton",
        ]
        process.run(argv, env=settings.child_environment("plain"), cwd=layout.root, run_log=run_log)
    names = json.loads((one.folder / _LIST).read_text(encoding="utf-8"))["files"]
    for number, path in enumerate(names):
        place = layout.environment / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        os.link(one.folder / "files" / str(number), place, follow_symlinks=False)
    drop_former(one)


def drop_former(one: Former) -> None:
    """Forget a former one: another is proven, or it is back."""
    (one.folder / _LIST).unlink(missing_ok=True)
    shutil.rmtree(one.folder, ignore_errors=True)


def _known(folder: Path) -> Former:
    return Former(folder, json.loads((folder / _LIST).read_text(encoding="utf-8"))["version"])


def _listed(layout: Layout, version: str) -> Iterator[str]:
    """The files that the installer has listed, below `.vllm`; those that are gone are nobody's."""
    for packages in interpreter.site_packages(layout):
        record = packages / f"triton-{version}.dist-info" / "RECORD"
        if record.is_file():
            with record.open(encoding="utf-8", newline="") as file:
                for row in csv.reader(file):
                    place = Path(os.path.normpath(packages / row[0])) if row else packages
                    if place.is_relative_to(layout.environment) and (
                        place.is_file() or place.is_symlink()
                    ):
                        yield str(place.relative_to(layout.environment))
