"""Verification of an editable install: the built interpreter imports vLLM and loads every library.

After an edit of compiled sources alone, the changed libraries alone are loaded. What setup.py took
of a wheel (VLLM_USE_PRECOMPILED) is compared with the wheel.
"""

import mmap
import re
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from workspace.core import hints, process, records
from workspace.core.errors import BuildError, SourceError, ToolchainError, counted
from workspace.core.files import check_zip, write_atomic
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install.plan import Observation
from workspace.install.stamp import Library, Stamp
from workspace.machine import failures, interpreter
from workspace.machine.machine import Machine
from workspace.machine.torch import TorchBuild

# The import of vLLM takes 10 s on two cores; with a cold page cache and CUDA libraries of 800 MB it
# took a minute.
TIMEOUT_S = 600.0
# The programs of the package that are compiled; a wheel has them beside the libraries.
_BINARIES = ("vllm/vllm-rs",)
# Kinds of sections, entries of the dynamic section, and the binding of a weak symbol (elf(5)).
_SHT_DYNAMIC, _SHT_DYNSYM, _DT_NEEDED, _DT_SONAME, _STB_WEAK = 6, 11, 1, 14, 2


@dataclass(frozen=True)
class Verdict:
    """The facts that verify found; `undriven` libraries lack only the GPU's driver."""

    version: str
    platform: str
    torch: TorchBuild
    libraries: tuple[Library, ...]
    undriven: tuple[str, ...] = ()
    # The only libraries that changed since the last complete verification, if that is known.
    changed: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """What was verified, in a sentence."""
        if self.changed:
            names = ", ".join(Path(path).name.split(".")[0] for path in self.changed)
            verb, needs = ("load", "need") if len(self.changed) > 1 else ("loads", "needs")
            return f"{names} {verb}, and {needs} the same symbols as before; nothing else changed"
        count = len(self.libraries) - len(self.undriven)
        loaded = f"{counted(count, 'library loads', 'libraries load')} with all symbols bound"
        if not self.platform:
            return f"{loaded}; the platform was not verified without a GPU" + (
                f", and {len(self.undriven)} libraries need its driver" if self.undriven else ""
            )
        return f"on {self.platform}, {loaded}"


@dataclass(frozen=True)
class _Report:
    """The report of probes/verify.py; `broken` are sentences on libraries that do not load."""

    error: str | None
    file: Path | None
    version: str
    platform: str
    torch: TorchBuild
    libraries: tuple[Library, ...]
    broken: tuple[str, ...]
    undriven: tuple[str, ...]


def verify(observed: Observation) -> Verdict:
    """Import vLLM from a neutral folder and from inside the tree, and load every library.

    Libraries load with all symbols bound. Raises BuildError that lists each fault.
    """
    layout, settings = observed.machine.layout, observed.machine.settings
    with tempfile.TemporaryDirectory(prefix="vllm-workspace-") as neutral:
        outside, inside = _probe(layout, settings, Path(neutral))
    # vLLM asks the driver for its platform: built for a GPU that is elsewhere, it finds none.
    platforms = (
        {observed.device, ""}
        if observed.device == "cuda" and not observed.machine.gpus
        else {observed.device}
    )
    wrong = [
        f"from a neutral folder: {sentence}"
        for sentence in _judge(outside, layout, observed, platforms)
    ]
    wrong += [
        f"from inside vendor/vllm: {sentence}"
        for sentence in _judge(inside, layout, observed, platforms)
    ]
    wrong += outside.broken
    if not outside.libraries:
        wrong.append("the tree holds no compiled library")
    if wrong:
        more = f" (and {len(wrong) - 1} more, above)" if len(wrong) > 1 else ""
        raise BuildError(
            f"the installed vLLM failed verification: {wrong[0]}{more}",
            hint=hints.text("install.again_or_native"),
            details=tuple(wrong),
        )
    return Verdict(
        outside.version, outside.platform, outside.torch, outside.libraries, outside.undriven
    )


@dataclass(frozen=True)
class Linked:
    """A library in the tree: its file's identity, the libraries and symbols that it needs, and its
    device code.
    """

    file: tuple[int, int, int]
    needs: tuple[frozenset[str], ...]
    code: tuple[str, ...]


@dataclass(frozen=True)
class Before:
    """The stamp of the last verification, and the libraries as they were before an install."""

    recorded: Stamp
    libraries: Mapping[str, Linked | None]


def before_install(layout: Layout, recorded: Stamp) -> Before:
    return Before(recorded, _linked(layout, recorded))


def _linked(layout: Layout, recorded: Stamp) -> dict[str, Linked | None]:
    """Return the recorded libraries by path; None for a missing file or a file in unknown form."""
    from workspace.compile import device_code

    found: dict[str, Linked | None] = {}
    for path in (library.path for library in recorded.libraries):
        file = layout.vllm / path
        try:
            state = file.stat()
            identity = (state.st_ino, state.st_size, state.st_mtime_ns)
            links = linkage(file)
            needs = (links.named, links.needs, links.weak)
            found[path] = Linked(identity, needs, device_code.architectures(file))
        except (OSError, ValueError, struct.error, IndexError):
            found[path] = None
    return found


@dataclass(frozen=True)
class Linkage:
    """What the loader reads in a library: its processor (e_machine, 0 for another file), its own
    name if it has one, the libraries that it names, and the symbols that it needs and has.

    A symbol of `weak` may stay undefined.
    """

    machine: int
    name: str | None
    named: frozenset[str]
    needs: frozenset[str]
    weak: frozenset[str]
    has: frozenset[str]


def linkage(library: Path) -> Linkage:
    """Read the dynamic section of a 64-bit library (elf(5)). Raises ValueError, IndexError and
    struct.error for a damaged one.
    """
    machine, name, named = 0, None, set[str]()
    needs, weak, has = set[str](), set[str](), set[str]()
    with (
        library.open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view,
    ):
        count = 0
        if view[:6] == b"\x7fELF\x02\x01":
            (machine,), (table,) = (
                struct.unpack_from(form, view, at) for form, at in (("<H", 18), ("<Q", 40))
            )
            size, count = struct.unpack_from("<HH", view, 58)
        headers = [
            struct.unpack_from("<IIQQQQIIQQ", view, table + at * size) for at in range(count)
        ]

        def text(link: int, at: int) -> str:
            start = headers[link][4] + at
            return view[start : view.find(b"\0", start)].decode()

        for _, kind, _, _, start, length, link, *_ in headers:
            content = view[start : start + length] if kind in (_SHT_DYNSYM, _SHT_DYNAMIC) else b""
            if kind == _SHT_DYNSYM:
                for at, binding, _, section, _, _ in struct.iter_unpack("<IBBHQQ", content):
                    kinds = has if section else weak if binding >> 4 == _STB_WEAK else needs
                    kinds.update([text(link, at)] if at else [])
            elif kind == _SHT_DYNAMIC:
                for tag, value in struct.iter_unpack("<qQ", content):
                    if tag == _DT_NEEDED:
                        named.add(text(link, value))
                    elif tag == _DT_SONAME:
                        name = text(link, value)
    parts = (named, needs, weak, has)
    return Linkage(machine, name, *map(frozenset, parts))


@dataclass(frozen=True)
class _Load:
    """One library that probes/verify.py --only has loaded."""

    path: str
    size: int
    sha256: str
    verdict: str


@dataclass(frozen=True)
class _Loads:
    """The report of probes/verify.py --only."""

    libraries: tuple[_Load, ...]


def verify_changed(machine: Machine, before: Before) -> Verdict | None:
    """Verify only the libraries that changed since the last verification; the caller has found that
    nothing else changed.

    Return None where that proves too little, and a complete verification is needed: a library is
    new, missing, does not load, or needs other symbols or holds other device code than before; or
    the last verification saw no GPU.
    """
    layout, build = machine.layout, machine.torch()
    recorded, known = before.recorded, before.libraries
    now = _linked(layout, recorded)
    changed = tuple(path for path in known if now[path] != known[path])
    is_alike = all(
        (was := known[path]) and (new := now[path]) and replace(new, file=was.file) == was
        for path in changed
    )
    torch = next(
        (top / "torch" for top in interpreter.site_packages(layout) if (top / "torch").is_dir()),
        None,
    )
    if not changed or not is_alike or _compiled(layout) != set(known) or torch is None:
        return None
    if build is None or not recorded.outcome.get("platform"):
        return None
    argv: list[process.Argument] = [layout.environment_python, "-I", "-S"]
    argv += [layout.probes / "verify.py", layout.vllm, "--torch", torch]
    for path in changed:
        argv += ["--only", path]
    try:
        environment = machine.settings.child_environment("run")
        done = process.capture(argv, env=environment, cwd=layout.root, timeout_s=TIMEOUT_S)
        rows = records.decode(done.stdout, _Loads).libraries if done.returncode == 0 else ()
    except (ToolchainError, records.DecodeError):
        return None
    fresh = {row.path: Library(row.path, row.size, row.sha256) for row in rows}
    if set(fresh) != set(changed) or any(row.verdict != "ok" for row in rows):
        return None
    return Verdict(
        recorded.outcome["version"],
        recorded.outcome["platform"],
        build,
        tuple(fresh.get(library.path, library) for library in recorded.libraries),
        changed=changed,
    )


def _compiled(layout: Layout) -> set[str]:
    """Return every shared library below the tree's package, as probes/verify.py finds them."""
    return {
        str(path.relative_to(layout.vllm))
        for path in (layout.vllm / "vllm").rglob("*.so*")
        if re.fullmatch(r".+\.so(\.\d+)*", path.name) and path.is_file()
    }


def _judge(
    report: _Report, layout: Layout, observed: Observation, platforms: Collection[str]
) -> list[str]:
    if report.error:
        return [report.error]
    wrong = []
    if report.file is None or not report.file.is_relative_to(layout.vllm.resolve()):
        wrong.append(f"vllm was imported from {report.file}, not from vendor/vllm")
    if report.version != observed.version:
        wrong.append(f"vllm has version {report.version}, expected {observed.version}")
    if report.platform not in platforms:
        wrong.append(
            f"vllm found the platform {report.platform or 'none'}, but was built for"
            f" {observed.device}"
        )
    if observed.torch and report.torch.version != observed.torch.version:
        wrong.append(f"torch has version {report.torch.version}, expected {observed.torch.version}")
    return wrong


def _probe(layout: Layout, settings: Settings, folder: Path) -> tuple[_Report, _Report]:
    """Run probes/verify.py in `folder` and inside the tree, and return both reports."""
    argv: list[process.Argument] = [
        layout.environment_python,
        layout.probes / "verify.py",
        layout.vllm,
        "--inside",
    ]
    done = process.capture(
        argv,
        env=settings.child_environment("verify", layout=layout),
        cwd=folder,
        timeout_s=TIMEOUT_S,
    )
    try:
        record = records.decode(done.stdout, dict[str, Any]) if done.returncode == 0 else None
    except records.DecodeError:
        record = None
    if record is None:
        raise _failed_import(done)
    rows, torch = record["libraries"], record["torch"] or {"version": "none", "cuda": None}
    outside, inside = (
        _Report(
            error=imported["error"],
            file=Path(imported["file"]) if imported["file"] else None,
            version=str(imported["version"]),
            platform=str(imported["platform"] or ""),
            torch=TorchBuild(torch["version"], torch["cuda"]),
            libraries=tuple(Library(row["path"], row["size"], row["sha256"]) for row in rows),
            broken=tuple(
                f"{row['path']}: {row['error']}" for row in rows if row["verdict"] == "broken"
            ),
            undriven=tuple(row["path"] for row in rows if row["verdict"] == "no driver"),
        )
        for imported in (record, record["inside"])
    )
    return outside, inside


def _failed_import(done: process.Completed) -> BuildError:
    reading = failures.judge(done.stderr.splitlines(), status=done.returncode)
    last = reading.tail[-1] if reading.tail else "no output"
    how = failures.how_ended(done.returncode, reading, otherwise=last)
    return BuildError(f"the import of vllm in .vllm {how}", details=reading.tail)


def compiled_members(wheel: Path) -> dict[str, tuple[int, int]]:
    """Map each compiled file of the wheel to its bytes and CRC-32.

    Raises SourceError for a file that is not a wheel of vLLM.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            # The tree's setup.py writes members where their names lead.
            check_zip(archive)
            members = {
                item.filename: (item.file_size, item.CRC)
                for item in archive.infolist()
                if item.filename.startswith("vllm/")
            }
    except (zipfile.BadZipFile, ValueError, OSError) as exc:
        raise SourceError(
            f"{wheel.name} cannot be used as a wheel: {exc}",
            hint=hints.text("install.precompiled"),
        ) from exc
    compiled = {
        name: fact for name, fact in members.items() if name.endswith(".so") or name in _BINARIES
    }
    if not compiled:
        raise SourceError(
            f"{wheel.name} holds no compiled library of vLLM",
            hint=hints.text("install.precompiled"),
        )
    return compiled


def complete(wheel: Path, tree: Path) -> None:
    """Extract the compiled files that the tree's setup.py left in the wheel.

    The setup.py of a release without the fix in patches/vllm leaves some.
    """
    left = [
        name
        for name, (size, crc) in compiled_members(wheel).items()
        if not _has_content(tree / name, size, crc)
    ]
    with zipfile.ZipFile(wheel) as archive:
        for name in left:
            folder = (tree / name).parent
            if not folder.resolve().is_relative_to(tree.resolve()):
                raise SourceError(
                    f"{folder} is a link to a folder outside of {tree}: {wheel.name} was not used",
                    hint=hints.text("core.list_folder", folder=folder),
                )
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(tree / name, archive.read(name), mode=0o755)


def check_taken(wheel: Path, tree: Path) -> None:
    """Compare every library in the tree with the wheel, by size and CRC-32.

    Raises BuildError with the names of the libraries that differ or are missing.
    """
    wrong = [
        name
        for name, (size, crc) in compiled_members(wheel).items()
        if not _has_content(tree / name, size, crc)
    ]
    if wrong:
        raise BuildError(
            f"the tree's setup.py did not take {', '.join(wrong)} out of {wheel.name}",
            hint=hints.text("install.members_lack"),
        )


def _has_content(path: Path, size: int, crc: int) -> bool:
    try:
        if path.stat().st_size != size:
            return False
        found = 0
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                found = zlib.crc32(chunk, found)
    except OSError:
        return False
    return found == crc
