"""The doctor's checks of the machine: processor, memory and what guards it, disk. They look and
change nothing.
"""

import os
import re
import shlex
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from workspace.core.settings import LARGEST_COMPILER_GIB, fitting_jobs
from workspace.machine import hardware, interpreter, torch
from workspace.machine.case import TIMED_OUT, Case, Place, Row, State, hub_home, key, without_user

# What PyTorch and the precompiled wheels are released for.
RELEASED_FOR = ("aarch64", "x86_64")
# What a bootstrap and a smoke leave comfortably free.
COMFORT_GIB = {"cpu": 4.0, "cuda": 16.0}
BRAKES = ("earlyoom", "systemd-oomd", "nohang")
INITS = ("systemd", "init")
LARGEST_PROGRAMS = "ps -eo pid,rss,args --sort=-rss | head"


def architecture(case: Case) -> Iterator[Row]:
    """Check that torch and the precompiled wheels are released for the processor."""
    seen, why = (
        case.host().architecture,
        f"torch and vLLM are released for {' and '.join(RELEASED_FOR)}",
    )
    is_served = seen in RELEASED_FOR
    yield Row(
        "ok" if is_served else "warn",
        "architecture",
        seen,
        why,
        None if is_served else "./scripts/inv bootstrap --device cpu --kernels native",
    )


def cores(case: Case) -> Iterator[Row]:
    """Check MAX_JOBS against cores and memory."""
    host, jobs = case.host(), case.settings.count("MAX_JOBS")
    fitting = fitting_jobs(host.cores, host.memory_gib)
    seen = (
        f"{host.cores}, MAX_JOBS"
        f" {jobs or f'not set: {fitting} at run time, a build is bounded by memory'}"
    )
    why = (
        "compilers at once, FlashInfer's at run time too: up to 9.5 GiB each"
        " (flashinfer-ai/flashinfer#3634)"
    )
    if case.device == "cuda" and jobs and jobs > fitting:
        yield Row(
            "warn",
            "cores",
            seen,
            f"at run time {jobs} nvcc may take {jobs * LARGEST_COMPILER_GIB:.0f} GiB",
            "sed -i '/^MAX_JOBS=/d' .env",
        )
    else:
        yield Row("ok", "cores", seen, why)


def memory(case: Case) -> Iterator[Row]:
    """Check what is available, within the control group's limit where that is tighter."""
    import psutil

    host, whole_gib = case.host(), psutil.virtual_memory().total / hardware.GIB
    seen = f"{host.memory_gib:.1f} GiB, {host.available_gib:.1f} GiB available"
    if host.memory_gib < whole_gib - 0.1:
        seen += f"; the control group's limit, the machine has {whole_gib:.1f} GiB"
    if case.is_native and case.device == "cuda" and host.available_gib < LARGEST_COMPILER_GIB:
        yield Row(
            "FAIL",
            "memory",
            seen,
            f"one nvcc of this tree takes up to {LARGEST_COMPILER_GIB} GiB",
            LARGEST_PROGRAMS,
        )
    elif host.available_gib < COMFORT_GIB[case.device]:
        yield Row(
            "warn",
            "memory",
            seen,
            f"less than {COMFORT_GIB[case.device]:.0f} GiB is tight for a bootstrap and a smoke",
            LARGEST_PROGRAMS,
        )
    else:
        yield Row(
            "ok", "memory", seen, "torch, compilers and models share it; on a Spark the GPU too"
        )


def swap(case: Case) -> Iterator[Row]:
    """Check how much of the swap is in use."""
    import psutil

    state = psutil.swap_memory()
    seen = (
        f"{state.used / hardware.GIB:.1f} of {state.total / hardware.GIB:.1f} GiB in use"
        if state.total
        else "none"
    )
    if state.total and state.used > state.total / 2:
        yield Row(
            "warn",
            "swap",
            seen,
            "memory is short already; a build on top of that crawls",
            LARGEST_PROGRAMS,
        )
    else:
        yield Row(
            "ok",
            "swap",
            seen,
            "it only delays the end: a machine that swaps compilers does not answer",
        )


def brake(case: Case) -> Iterator[Row]:
    """Check that something ends a program before memory runs out: a Spark freezes instead, the
    kernel's own killer comes too late.
    """
    import psutil

    programs, why = (
        case.programs(),
        (
            "ends the largest program before memory runs out; without it a machine with unified"
            " memory freezes"
        ),
    )
    found = next(
        (name for name in BRAKES for program in programs if program.name == name[:15]), None
    )
    first = next((program.name for program in programs if program.number == 1), "")
    is_limited = case.host().memory_gib < psutil.virtual_memory().total / hardware.GIB - 0.1
    if found:
        yield Row("ok", "brake", found, why)
    elif first not in INITS and is_limited:
        yield Row(
            "ok",
            "brake",
            "the control group's limit",
            "it ends what is inside before the machine runs out of memory",
        )
    elif first not in INITS:
        yield Row(
            "warn",
            "brake",
            "no earlyoom or systemd-oomd in this container",
            why,
            "sudo apt install earlyoom  # on the host",
        )
    else:
        yield Row(
            "warn",
            "brake",
            "neither earlyoom nor systemd-oomd runs",
            why,
            "sudo apt install earlyoom && sudo systemctl enable --now earlyoom",
        )


def disk(case: Case) -> Iterator[Row]:
    """Check the room: one row for each file system, since folders on the same one share what is
    free.
    """
    systems: dict[int, list[Place]] = {}
    for place in case.places:
        systems.setdefault(hardware.existing(place.path).stat().st_dev, []).append(place)
    for places in systems.values():
        free, need = hardware.free_gib(places[0].path), sum(place.need_gib for place in places)
        seen = f"{free:.1f} GiB free for {', '.join(_named(place) for place in places)}"
        if free >= need:
            yield Row("ok", "disk", seen, f"{need:.1f} GiB are needed there")
            continue
        state: State = "FAIL" if any(place.is_vital for place in places) else "warn"
        yield Row(
            state,
            "disk",
            seen,
            f"{need:.1f} GiB are needed there",
            f"df -h {hardware.existing(places[0].path)}; {case.uv} cache prune",
        )


def folders(case: Case) -> Iterator[Row]:
    """Check that every folder that will grow can be written; silent where all can."""
    for place in case.places:
        nearest = hardware.existing(place.path)
        if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
            state: State = "FAIL" if place.is_vital else "warn"
            yield Row(
                state,
                "folder",
                f"{nearest} cannot be written",
                f"{place.path} is made or changed there",
                f'sudo chown -R "$USER" {nearest}',
            )


def _named(place: Place) -> str:
    return f"{place.label} {place.path}" if place.label else str(place.path)


def preflight_places(need_gib: Mapping[Path, float]) -> tuple[Place, ...]:
    """Return the folders that a caller names, all of them vital."""
    return tuple(Place("", path, need) for path, need in need_gib.items())


_SONAME = re.compile(r"lib[\w+-]+\.so(\.\d+)?")


def library_path(case: Case) -> Iterator[Row]:
    """Check that no folder of LD_LIBRARY_PATH has a library that torch brings too: the loader would
    take that one (ld.so(8)).
    """
    text = case.settings.child_environment("run").get("LD_LIBRARY_PATH", "")
    why = (
        "the loader takes a library from there before torch's own of the same name, whatever its"
        " version"
    )
    if not text:
        yield Row("ok", "library path", "not set", why)
        return
    # A blank is no separator; a semicolon is one as well.
    entries = re.split(r"[:;]", text)
    own, bad = _libraries_of_torch(case), dict[str, str]()
    for entry in dict.fromkeys(entries):
        if not entry:
            bad[entry] = "an empty entry, which means the current folder"
        elif not _is_torchs_toolkit(case, Path(entry)) and (
            shadows := sorted(own & _libraries(Path(entry)))
        ):
            more = f" and {len(shadows) - 3} more" if len(shadows) > 3 else ""
            bad[entry] = f"{entry} has {', '.join(shadows[:3])}{more}"
    if not bad:
        yield Row(
            "ok",
            "library path",
            f"{len(entries)} folder{'s' if len(entries) > 1 else ''}, none with a library of"
            " torch's",
            why,
        )
        return
    # CUDA_HOME's own folder is put there for each child; leaving it out of the shell's line would
    # change nothing.
    home = case.settings.path("CUDA_HOME")
    if home and set(bad) == {str(home / "lib64")}:
        wanted = (build.cuda if (build := case.torch()) else None) or "13.0"
        hint = (
            f"sed -i 's|^CUDA_HOME=.*|CUDA_HOME=/usr/local/cuda-{wanted}|' .env  # after: sudo apt"
            f" install cuda-toolkit-{wanted.replace('.', '-')}"
        )
        yield Row("warn", "library path", "; ".join(bad.values()), why, hint)
        return
    kept = ":".join(
        entry
        for entry in dict.fromkeys(entries)
        if entry not in bad and entry != str((home or Path("/nonexistent")) / "lib64")
    )
    hint = f"export LD_LIBRARY_PATH={shlex.quote(kept)}" if kept else "unset LD_LIBRARY_PATH"
    if (
        "LD_LIBRARY_PATH" in case.settings.passed
        and case.settings.passed["LD_LIBRARY_PATH"].source == ".env"
    ):
        hint = "sed -i '/^LD_LIBRARY_PATH=/d' .env"
    yield Row("warn", "library path", "; ".join(bad.values()), why, hint)


def _is_torchs_toolkit(case: Case, folder: Path) -> bool:
    """CUDA_HOME's folder, which children are given, does no harm where it is of torch's own
    CUDA.
    """
    home, build, found = case.settings.path("CUDA_HOME"), case.torch(), case.toolkit()
    is_own = home is not None and folder == home / "lib64"
    return (
        is_own
        and build is not None
        and build.cuda is not None
        and found is not None
        and key(found.version)[:2] == key(build.cuda)[:2]
    )


def _libraries_of_torch(case: Case) -> frozenset[str]:
    """Names that the loader knows torch's libraries by: its own, and those of NVIDIA's wheels
    beside it.
    """
    packages = interpreter.site_packages(case.layout)
    folders = [
        folder
        for package in packages
        for folder in (package / "torch" / "lib", *package.glob("nvidia/*/lib"))
    ]
    return frozenset().union(*(_libraries(folder) for folder in folders))


def _libraries(folder: Path) -> frozenset[str]:
    """The libraries in a folder by name and major version, such as libcublas.so.13; none where it
    cannot be read.
    """
    try:
        found = (_SONAME.match(name) for name in os.listdir(folder))
    except OSError:
        return frozenset()
    return frozenset(name[0] for name in found if name and name[1])


def token(case: Case) -> Iterator[Row]:
    """Check whether there is a token for gated models; its value is read by nobody here."""
    environment, why = case.settings.child_environment("run"), "gated models are fetched with it"
    named = next(
        (name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if environment.get(name)), None
    )
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
        hint = f'sudo chown "$USER" {shlex.quote(str(path))} && chmod 600 {shlex.quote(str(path))}'
        yield Row(
            "warn",
            "token",
            f"{path} cannot be read: {exc.strerror}",
            why,
            hint if path.is_file() else f"ls -ld {shlex.quote(str(path))}",
        )
    else:
        yield Row(
            "ok" if present else "warn",
            "token",
            f"{'present' if present else 'empty'}, {path}",
            why,
            None if present else ".vllm/bin/hf auth login",
        )


def settings(case: Case) -> Iterator[Row]:
    """Check .env: variables of the shell that hide a line of it, and names that nothing here
    knows.
    """
    for warning in case.settings.warnings:
        found = re.search(r"`(unset \w+)`", warning)
        line = re.match(r"\.env, line (\d+)", warning)
        why = "what .env says is not what runs" if found else "a misspelt name has no effect"
        yield Row(
            "warn",
            "settings",
            re.sub(r"; `unset .*$", "", warning),
            why,
            found[1] if found else f"${{EDITOR:-nano}} +{line[1] if line else 1} .env",
        )
    if not case.settings.warnings:
        written = case.layout.dotenv.exists()
        yield Row(
            "ok",
            "settings",
            "nothing in the shell hides .env" if written else "no .env yet; bootstrap writes one",
            "the shell goes before .env",
        )


# A page of the index that is small and always there.
SMALL_PROJECT = "packaging"
# Beyond the connection: uv asks for a page and one file's description.
UV_ANSWER_S = 3.0


def vllm(case: Case) -> Iterator[Row]:
    """Check where vLLM's source comes from: its mirror, where one is set, and the pinned remote."""
    stands_in = (
        "the release archive on the package index stands in"
        if case.settings.text("SOURCE") != "git"
        else "SOURCE=git wants it"
    )
    is_needed = case.settings.text("SOURCE") == "git" and not (case.layout.vllm / ".git").exists()
    yield from _remote(
        case, "vllm", "VLLM_MIRROR", otherwise=stands_in, lacking="FAIL" if is_needed else "warn"
    )


def triton(case: Case) -> Iterator[Row]:
    """Check where Triton's source comes from; only a build of Triton needs it."""
    yield from _remote(
        case, "triton", "TRITON_MIRROR", otherwise="only building Triton needs it", lacking="warn"
    )


def _remote(
    case: Case, name: str, setting: str, *, otherwise: str, lacking: State
) -> Iterator[Row]:
    mirror, url = case.settings.text(setting), _pinned(case.layout.pins, name)
    if url is None:
        yield Row(
            "FAIL",
            f"{name} git",
            "vendor/pins.toml names no remote that can be read",
            "the pins say where it is",
            "git checkout -- vendor/pins.toml",
        )
        return
    if mirror:
        fault = _git_fault(case, mirror)
        hint = f"git ls-remote {without_user(mirror)} HEAD  # {setting} in .env names it"
        seen = without_user(mirror) + (f": {fault}" if fault else " answers")
        yield Row(
            lacking if fault else "ok",
            f"{name} mirror",
            seen,
            f"{setting} is asked before anything else",
            hint if fault else None,
        )
        if not fault:
            return
    fault = _git_fault(case, url)
    hint = f"echo {setting}=URL >> .env  # URL: a copy that can be reached"
    # With a mirror set, git never goes to the pinned remote.
    state: State = "ok" if not fault else "warn" if mirror else lacking
    yield Row(
        state,
        f"{name} git",
        without_user(url) + (f": {fault}" if fault else " answers"),
        otherwise,
        hint if fault else None,
    )


def index(case: Case) -> Iterator[Row]:
    """Check the package index that source archives, precompiled wheels and packages come from."""
    import requests
    from pypi_simple import PYPI_SIMPLE_ENDPOINT

    endpoint = case.settings.index_url or PYPI_SIMPLE_ENDPOINT
    shown = without_user(case.settings.index_url) if case.settings.index_url else "the default one"
    timeout_s = float(case.settings.count("CONNECT_TIMEOUT_S") or 5)
    fault: str | None = None
    if endpoint.startswith("file://"):
        folder = Path(unquote(urlsplit(endpoint).path))
        fault = None if folder.is_dir() else f"{folder} is not there"
    else:
        try:
            with requests.get(
                f"{endpoint.rstrip('/')}/{SMALL_PROJECT}/", timeout=timeout_s, stream=True
            ) as reply:
                fault = None if reply.ok else f"answers {reply.status_code} {reply.reason}"
        except requests.Timeout:
            fault = f"gave no answer in {timeout_s:g} s"
        except requests.RequestException as exc:
            fault = _innermost(exc)
    if fault is None:
        yield Row(
            "ok",
            "index",
            f"{shown} answers",
            "source archive, precompiled wheel and packages come from it",
        )
        return
    # What is built needs nothing more of it, and starting over would.
    why = (
        "everything needed is in .vllm already; a changed requirement is not"
        if case.is_built
        else "source archive, precompiled wheel and packages come from it"
    )
    hint = (
        "export UV_DEFAULT_INDEX=URL  # URL: a mirror of the index; behind a proxy: export"
        " HTTPS_PROXY=URL"
    )
    yield Row(
        "warn" if case.is_built else "FAIL", "index", f"{shown}: {without_user(fault)}", why, hint
    )


def torch_index(case: Case) -> Iterator[Row]:
    """Check where torch comes from, with uv's own eyes: a dry run that resolves torch and nothing
    else.
    """
    wanted, there = torch.plan("torch", device=case.device, settings=case.settings), case.torch()
    fault = _torch_fault(case, wanted.requirement, wanted.arguments)
    if fault is None:
        yield Row(
            "ok", "torch index", f"{wanted.description}: answers", "torch is taken from there"
        )
        return
    seen = f"{wanted.description}: {fault}"
    if any(_torch_fault(case, wanted.requirement, other) is None for other in wanted.alternatives):
        yield Row("ok", "torch index", seen, "another index that has it stands in")
        return
    why = (
        f"{there.version} is in .vllm; another one cannot be had"
        if there
        else "torch is taken from there"
    )
    yield Row(
        "warn" if there else "FAIL",
        "torch index",
        seen,
        why,
        "echo TORCH_INDEX_URL=URL >> .env  # URL: an index that has torch",
    )


def _torch_fault(case: Case, requirement: str, arguments: tuple[str, ...]) -> str | None:
    """Why uv cannot resolve torch with these arguments; None where it can."""
    timeout_s = float(case.settings.count("CONNECT_TIMEOUT_S") or 5)
    haste = {
        "UV_HTTP_TIMEOUT": f"{timeout_s:.0f}",
        "UV_HTTP_CONNECT_TIMEOUT": f"{timeout_s:.0f}",
        "UV_HTTP_RETRIES": "0",
    }
    with tempfile.TemporaryDirectory(prefix="torch-") as folder:
        asked = [
            "pip",
            "install",
            "--dry-run",
            "--no-deps",
            "--quiet",
            "--python",
            sys.executable,
            "--target",
            folder,
        ]
        # What uv remembers of an index proves nothing. Together with its own offline mode it
        # refuses the flag.
        asked += [] if case.settings.shell.get("UV_OFFLINE") else ["--refresh-package", "torch"]
        done = case.ask(
            [interpreter.uv(case.layout), *asked, *arguments, requirement],
            extra=haste,
            timeout_s=timeout_s + UV_ANSWER_S,
        )
    if done is None or done.returncode in TIMED_OUT:
        return f"no answer in {timeout_s + UV_ANSWER_S:.0f} s"
    lines = [
        re.sub(r"^(error|cause|Caused by): ", "", line.strip(" ×╰─▶├│"))
        for line in done.stderr.splitlines()
    ]
    # uv tells the cause last, and hints after it.
    causes = [line for line in lines if line and not line.startswith(("hint:", "warning:"))] or [
        "uv says nothing"
    ]
    return None if done.returncode == 0 else without_user(causes[-1])


def _git_fault(case: Case, url: str) -> str | None:
    """What git says of a remote, asked as it would be for a fetch, with the user's own
    configuration and no prompts; None for nothing.
    """
    timeout_s = float(case.settings.count("CONNECT_TIMEOUT_S") or 5)
    program = case.which("git")
    if program is None:
        return "there is no git to ask it with"
    done = case.ask(
        [program, "ls-remote", "--", url, "HEAD"],
        extra={"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"},
        timeout_s=timeout_s,
    )
    if done is None or done.returncode in TIMED_OUT:
        return f"no answer in {timeout_s:g} s (CONNECT_TIMEOUT_S)"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    said = next(
        (line for line in lines if line.startswith(("fatal:", "error:"))),
        lines[0] if lines else f"git exited with {done.returncode}",
    )
    # The address, which is shown already, with all that stands before the reason.
    return (
        None
        if done.returncode == 0
        else re.sub(r"^(fatal|error): (unable to access '[^']*': )?", "", without_user(said))
    )


def _pinned(pins: Path, name: str) -> str | None:
    """The remote's address, and nothing else of the pins: a check of them is the source's."""
    try:
        table = tomllib.loads(pins.read_text(encoding="utf-8")).get(name)
    except (OSError, ValueError):
        return None
    url = table.get("url") if isinstance(table, dict) else None
    return url if isinstance(url, str) else None


def _innermost(exc: BaseException) -> str:
    """The innermost cause in its own words: requests wraps a name that does not resolve four
    times.
    """
    while exc.__context__ is not None:
        exc = exc.__context__
    return str(exc) or type(exc).__name__
