"""The doctor's checks of the machine, the user's settings and token, and the network: processor,
memory, disk, remotes and package indexes. They only read.
"""

import os
import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from workspace.core import errors, files, hints, records
from workspace.core import settings as settings_of
from workspace.core.child_variables import LARGEST_COMPILER_GIB, fitting_jobs
from workspace.core.console import Row, State
from workspace.core.known_settings import has_login, is_secret
from workspace.core.paths import open_place, user_name
from workspace.core.process import Absent, Answer, Broken, Slow, There
from workspace.core.settings import without_user
from workspace.machine import hardware
from workspace.machine.machine import Case, Place, hub_home, verdict

# The processors for which PyTorch and the precompiled wheels are released.
RELEASED_FOR = ("aarch64", "x86_64")
_RELEASED = " and ".join(RELEASED_FOR)
# Free memory with which a bootstrap and a smoke run comfortably.
COMFORT_GIB = {"cpu": 4.0, "cuda": 16.0}
OOM_DAEMONS = ("earlyoom", "systemd-oomd", "nohang")
PROXIES = ("https_proxy", "http_proxy", "all_proxy")
INITS = ("systemd", "init")
LARGEST_PROGRAMS = "ps -eo pid,rss,args --sort=-rss | head"
# A small page that every package index has.
SMALL_PROJECT = "packaging"
_LARGEST_PAGE_BYTES = 4 << 20


def architecture(case: Case) -> Iterator[Row]:
    """Check that torch and the precompiled wheels are released for the processor."""
    seen, why = case.host().architecture, f"torch and vLLM are released for {_RELEASED}"
    row = Row(State.WARN, "architecture", seen, why, hints.text("machine.cpu_native"))
    yield verdict(seen in RELEASED_FOR, row)


def cores(case: Case) -> Iterator[Row]:
    """Check MAX_JOBS against cores and memory."""
    host, jobs = case.host(), case.settings.count("MAX_JOBS")
    fitting = fitting_jobs(host.cores, host.memory_gib)
    noun = "compiler" if fitting == 1 else "compilers"
    limit = str(jobs) if jobs else f"not set: {fitting} {noun} at run time; memory limits a build"
    seen = f"{host.cores}, MAX_JOBS {limit}"
    if case.device == "cuda" and jobs and jobs > fitting:
        why = f"at run time {jobs} nvcc may take {jobs * LARGEST_COMPILER_GIB:.0f} GiB"
        yield Row(State.WARN, "cores", seen, why, hints.text("machine.drop_max_jobs"))
    else:
        why = (
            "compilers in parallel, FlashInfer's at run time too: up to 9.5 GiB each"
            " (flashinfer-ai/flashinfer#3634)"
        )
        yield Row(State.OK, "cores", seen, why)


def memory(case: Case) -> Iterator[Row]:
    """Check the available memory, within the control group's limit where that is tighter."""
    host, whole_gib = case.host(), hardware.whole_memory_gib()
    comfort_gib = COMFORT_GIB[case.device]
    seen = f"{host.memory_gib:.1f} GiB, {host.available_gib:.1f} GiB available"
    if host.memory_gib < whole_gib - 0.1:
        seen += f"; the control group's limit, the machine has {whole_gib:.1f} GiB"
    if fault := _limit_fault():
        why = "a build may use more memory than the control group allows"
        yield Row(State.WARN, "memory limit", fault, why, hints.text("machine.control_group"))
    if case.is_native and case.device == "cuda" and host.available_gib < LARGEST_COMPILER_GIB:
        why = f"one nvcc of this tree takes up to {LARGEST_COMPILER_GIB} GiB"
        yield Row(State.FAIL, "memory", seen, why, LARGEST_PROGRAMS)
    elif host.available_gib < comfort_gib:
        why = f"less than {comfort_gib:.0f} GiB is tight for a bootstrap and a smoke"
        yield Row(State.WARN, "memory", seen, why, LARGEST_PROGRAMS)
    else:
        why = "torch, compilers and models share it; on a Spark the GPU too"
        yield Row(State.OK, "memory", seen, why)


def _limit_fault() -> str | None:
    """Return why a limit of a control group cannot be read, though its file is there, else None."""
    names = {1: "memory.limit_in_bytes", 2: "memory.max"}
    for version, folder in hardware.control_groups():
        try:
            (folder / names[version]).read_bytes()
        except FileNotFoundError:
            continue
        except OSError as exc:
            return f"{exc.filename} cannot be read: {exc.strerror}"
    return None


def oom_daemon(case: Case) -> Iterator[Row]:
    """Check that a service stops the largest program before memory runs out.

    A Spark freezes instead: the kernel's own out-of-memory killer comes too late.
    """
    names = {program.name for program in case.programs()}
    found = next((name for name in OOM_DAEMONS if name[:15] in names), None)
    first = next((program.name for program in case.programs() if program.pid == 1), "")
    is_container = first not in INITS
    is_limited = case.host().memory_gib < hardware.whole_memory_gib() - 0.1
    why = (
        "it stops the largest program before memory runs out; without it a machine with unified"
        " memory freezes"
    )
    if found:
        yield Row(State.OK, "oom daemon", found, why)
    elif is_container and is_limited:
        why = "it stops programs inside before the machine runs out of memory"
        yield Row(State.OK, "oom daemon", "the control group's limit", why)
    elif is_container:
        seen = "no earlyoom or systemd-oomd in this container"
        yield Row(State.WARN, "oom daemon", seen, why, hints.text("machine.earlyoom_on_host"))
    else:
        hint = hints.text("machine.earlyoom")
        yield Row(State.WARN, "oom daemon", "neither earlyoom nor systemd-oomd runs", why, hint)


# Tried with the small vLLM: each of them ended a bootstrap, or a build from source.
_MISREAD = {
    ":": "PATH",
    "#": "uv",
    "${": "uv",
    **dict.fromkeys((";", '"', "[", "\\", "|"), "CMake"),
}


def disk(case: Case) -> Iterator[Row]:
    """Check the free space, one row for each file system: its folders share what is free."""
    systems: dict[int, list[Place]] = {}
    for place in case.places:
        systems.setdefault(hardware.existing(place.path).stat().st_dev, []).append(place)
    for places in systems.values():
        free, need = hardware.free_gib(places[0].path), sum(place.need_gib for place in places)
        seen = f"{free:.1f} GiB free for {', '.join(_named(place) for place in places)}"
        why = f"{need:.1f} GiB are needed there"
        state = State.FAIL if any(place.is_vital for place in places) else State.WARN
        hint = hints.text(
            "core.disk_or_cache", folder=hardware.existing(places[0].path), uv=case.uv
        )
        yield verdict(free >= need, Row(state, "disk", seen, why, hint))


def folders(case: Case) -> Iterator[Row]:
    """Check that every folder that will grow is writable, and that programs read the path of the
    clone as it is; no row where all is well.
    """
    for part, programs in _MISREAD.items():
        if part in str(case.layout.root):
            state = State.FAIL if case.is_native or "CMake" not in programs else State.WARN
            why = f"{programs} takes {part} in a path for something else"
            yield Row(state, "folder", str(case.layout.root), why, hints.text("cli.plain_name"))
    for place in case.places:
        if place.label == "TMPDIR" and not place.path.is_dir():
            # nvcc ends there; gcc and Python take another folder without a word.
            state = State.FAIL if case.is_native else State.WARN
            unset = hints.text("machine.unset", name="TMPDIR")
            drop = hints.text("machine.drop_from_dotenv", name="TMPDIR")
            hint = unset if "TMPDIR" in case.settings.shell else drop
            seen = f"TMPDIR {place.path} is no folder"
            yield Row(state, "folder", seen, "compilers write there", hint)
        elif fault := unusable_folder(place.path):
            state, why = State.FAIL if place.is_vital else State.WARN, "is created or changed there"
            yield Row(state, "folder", fault[0], f"{place.path} {why}", fault[1])


def unusable_folder(path: Path) -> tuple[str, str] | None:
    """Return why no file can be made below `path`, and the hint; None where one can.

    Another owner makes no folder of a file, and a folder above `path` belongs to others as well.
    """
    nearest = hardware.existing(path)
    if nearest.is_file():
        return f"{nearest} is a file, not a folder", hints.text("machine.move_file", path=nearest)
    if not nearest.is_dir():
        return f"{nearest} is no folder", hints.text("core.list_folder", folder=nearest)
    if os.access(nearest, os.W_OK | os.X_OK):
        return None
    hint = hints.text("machine.make_own_folder", folder=path)
    if nearest == path.absolute():
        hint = hints.text("machine.own_folder", folder=path)
    return f"{nearest} is not writable", hint


def rights(case: Case) -> Iterator[Row]:
    """Check that others cannot read files with secrets or change what is used; else no row."""
    written = settings_of.written(case.layout).items()
    has_secret = any(text and (is_secret(name) or has_login(text)) for name, text in written)
    token = case.settings.child_environment("run").get("HF_TOKEN_PATH")
    private = [Path(token) if token else hub_home(case) / "token", case.home / ".netrc"]
    for path in [*([case.layout.dotenv] if has_secret else []), *private]:
        mode = path.stat().st_mode & 0o777 if path.is_file() else 0
        if mode & 0o077:
            shown = case.layout.relative(path)
            seen = f"{shown} has mode {mode:04o}"
            hint = hints.text("machine.close_file", path=shown)
            yield Row(State.WARN, "rights", seen, "others can read the secrets in it", hint)
    places = [(place.label or "folder", place.path) for place in case.places]
    reported: set[Path] = set()
    for label, path in (*places, ("HOME", case.home), (".env", case.layout.dotenv)):
        found = open_place(hardware.existing(path))
        if found and found not in reported:
            reported.add(found)
            seen = f"{found} is writable by everybody, without the sticky bit ({label})"
            is_own = os.geteuid() in (found.stat().st_uid, 0)
            as_root = hints.text("machine.close_folder_as_root", folder=found)
            hint = hints.text("machine.close_folder", folder=found) if is_own else as_root
            yield Row(State.WARN, "rights", seen, "others can replace what is used there", hint)


def owner(case: Case) -> Iterator[Row]:
    """Check that the files of the clone belong to the user of the clone; else one row."""
    root = case.layout.root
    uid = root.stat().st_uid
    name = user_name(uid)
    if os.geteuid() == 0 and uid != 0:
        seen = f"you are root, and the clone belongs to {name}"
        why = f"what a verb writes now belongs to root, and {name} cannot change it"
        yield Row(State.WARN, "owner", seen, why, hints.text("machine.as_owner", user=name))
        return
    inner = (".", ".git", ".git/objects", ".workspace", ".vllm", "vendor", "vendor/vllm", "patches")
    entries = (entry for folder in inner for entry in _entries(root / folder))
    other = [case.layout.relative(entry) for entry in entries if entry.lstat().st_uid == 0 != uid]
    if other:
        why = "a verb was typed with sudo; verbs without it cannot change these files"
        hint = hints.text("machine.own_files_of_root", folder=root)
        seen = f"{errors.listed(other)} belong{'s' if len(other) == 1 else ''} to root"
        yield Row(State.WARN, "owner", seen, why, hint)


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() and os.access(folder, os.R_OK) else []


def proxy(case: Case) -> Iterator[Row]:
    """Check that something listens at each proxy of the environment; without one no row."""
    environment = case.settings.child_environment("plain")
    why = "downloads, git and uv go through it"
    for name in sorted(name for name in environment if name.lower() in PROXIES):
        text = environment.get(name, "")
        if not text:
            continue
        address = urlsplit(text if "://" in text else f"http://{text}")
        shown = f"{name}: {address.hostname}:{address.port or 80}"
        try:
            place = (address.hostname or "", address.port or 80)
            socket.create_connection(place, timeout=case.settings.connect_timeout_s).close()
        except OSError as exc:
            state = State.WARN if case.is_built else State.FAIL
            hint = hints.text("machine.unset", name=name)
            yield Row(state, "proxy", f"{shown}: {exc.strerror or exc}", why, hint)
        else:
            yield Row(State.OK, "proxy", f"{shown} answers", why)


def _named(place: Place) -> str:
    return f"{place.label} {place.path}" if place.label else str(place.path)


def token(case: Case) -> Iterator[Row]:
    """Check for a token for gated models; its value is never read."""
    environment, why = case.settings.child_environment("run"), "gated models are fetched with it"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if environment.get(name):
            yield Row(State.OK, "token", f"present, {name}", why)
            return
    path = Path(environment.get("HF_TOKEN_PATH") or hub_home(case) / "token")
    login = hints.text("machine.hf_login")
    try:
        is_present = path.stat().st_size > 0
        with path.open("rb"):
            pass
    except FileNotFoundError:
        yield Row(State.OK, "token", "absent", f"only {why}: {login}")
    except OSError as exc:
        hint = (
            hints.text("machine.own_token", path=path)
            if path.is_file()
            else hints.text("core.list_folder", folder=path)
        )
        yield Row(State.WARN, "token", f"{path} cannot be read: {exc.strerror}", why, hint)
    else:
        if is_present:
            yield Row(State.OK, "token", f"present, {path}", why)
        else:
            yield Row(State.WARN, "token", f"empty, {path}", why, login)


def settings(case: Case) -> Iterator[Row]:
    """Check .env for unknown names, repeated names, and lines that the shell hides."""
    why = {
        "hidden": "the value in .env is not the value in use",
        "repeated": "such a line has no effect",
        "unknown": "it is passed on unchanged",
    }
    for notice in case.settings.warnings:
        yield Row(State.WARN, "settings", notice.sentence, why[notice.kind], notice.hint)
    if not case.settings.warnings:
        exists = case.layout.dotenv.exists()
        seen = "the shell hides no line of .env" if exists else "no .env yet; bootstrap writes one"
        yield Row(State.OK, "settings", seen, "the shell goes before .env")


def vllm(case: Case) -> Iterator[Row]:
    """Check the sources of vLLM's tree: its mirror, where one is set, and the pinned remote."""
    is_git = case.settings.text("SOURCE") == "git"
    why = (
        "SOURCE=git needs it"
        if is_git
        else "without it the release archive on the package index is used"
    )
    is_needed = is_git and not (case.layout.vllm / ".git").exists()
    failed_state = State.FAIL if is_needed else State.WARN
    setting = "VLLM_MIRROR"
    mirror, url = case.settings.text(setting), _pinned(case.layout.pins)
    if url is None:
        seen = "vendor/pins.toml names no readable remote"
        hint = hints.text("core.restore_pins")
        yield Row(State.FAIL, "vllm git", seen, "the pins name the remote", hint)
        return
    if mirror:
        shown, used = without_user(mirror), f"{setting} is used before any other source"
        hint = hints.text("machine.ls_remote", url=shown, setting=setting)
        row = Row(failed_state, "vllm mirror", shown, used, hint)
        yield (judged := _judged(row, _ask_remote(case, mirror), look=hint))
        if judged.state is State.OK:
            return
    shown = without_user(url)
    hint = hints.text("machine.set_url", setting=setting)
    # With a mirror set, git never contacts the pinned remote.
    row = Row(State.WARN if mirror else failed_state, "vllm git", shown, why, hint)
    yield _judged(
        row, _ask_remote(case, url), look=hints.text("machine.ls_remote_plain", url=shown)
    )


def _judged(row: Row, answer: Answer[None], *, look: str) -> Row:
    """Return the row of an address, of which `row` is the one for a failure.

    A slow network or a slow server is a warning, with `look` as its hint: it changes nothing.
    """
    if isinstance(answer, There):
        return replace(row, state=State.OK, text=f"{row.text} answers", hint=None)
    if isinstance(answer, Slow):
        text = f"{row.text}: no answer in {answer.limit_s:g} s"
        return replace(row, state=State.WARN, text=text, hint=look)
    message = answer.message if isinstance(answer, Broken) else "the program to ask is missing"
    return replace(row, text=f"{row.text}: {message}")


def index(case: Case) -> Iterator[Row]:
    """Check the package index that serves source archives, precompiled wheels and packages."""
    from pypi_simple import PYPI_SIMPLE_ENDPOINT

    endpoint = case.settings.index_url or PYPI_SIMPLE_ENDPOINT
    shown = (
        without_user(case.settings.index_url) if case.settings.index_url else "the default index"
    )
    answer, why = _ask_index(case, endpoint), "it serves source archive, wheel and packages"
    hint = hints.text("machine.set_index")
    state = State.FAIL
    if case.is_built and not isinstance(answer, There):
        # A finished workspace does not need the index; a first bootstrap does.
        state, why = State.WARN, ".vllm has everything now; a changed requirement needs the index"
    look = hints.text("machine.doctor")
    yield _judged(Row(state, "index", shown, why, hint), answer, look=look)


def _ask_index(case: Case, endpoint: str) -> Answer[None]:
    """Ask a package index for a page."""
    import requests

    if endpoint.startswith("file://"):
        folder = Path(unquote(urlsplit(endpoint).path))
        return There(None) if folder.is_dir() else Broken(f"{folder} does not exist")
    url, timeout_s = f"{endpoint.rstrip('/')}/{SMALL_PROJECT}/", case.settings.connect_timeout_s
    try:
        with files.opened(url, timeout_s=timeout_s) as reply:
            if not reply.ok:
                return Broken(f"answers {reply.status_code} {reply.reason}")
            page = b"".join(files.received(reply, _LARGEST_PAGE_BYTES, longest_s=timeout_s))
            # A portal that wants a login answers with a page of its own.
            return There(None) if b".whl" in page else Broken("answers a page that lists no wheel")
    except requests.Timeout:
        return Slow(timeout_s)
    except requests.RequestException as exc:
        return Broken(without_user(files.reason_of(exc)))


def _ask_remote(case: Case, url: str) -> Answer[None]:
    """Ask a remote for its HEAD; a broken one has git's own message.

    git runs as it would for a fetch, with the user's own configuration and without prompts.
    """
    timeout_s = case.settings.connect_timeout_s
    answer = case.ask(
        ["git", "ls-remote", "--", url, "HEAD"],
        extra={"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"},
        timeout_s=timeout_s,
    )
    if isinstance(answer, Absent):
        return Broken("git is missing")
    if not isinstance(answer, There):
        return answer
    done = answer.value
    if done.returncode == 0:
        return There(None)
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    message = next(
        (line for line in lines if line.startswith(("fatal:", "error:"))),
        lines[0] if lines else f"git exited with {done.returncode}",
    )
    # Without the address, which the row shows already, and without the words before the reason.
    shown = re.sub(r"^(fatal|error): (unable to access '[^']*': )?", "", without_user(message))
    return Broken(shown)


def _pinned(pins: Path) -> str | None:
    """Return the address of vLLM's remote from the pins; the repo room verifies the rest."""
    try:
        table = records.parse_toml(pins.read_bytes()).get("vllm")
    except (OSError, records.DecodeError):
        return None
    url = table.get("url") if isinstance(table, dict) else None
    return url if isinstance(url, str) else None
