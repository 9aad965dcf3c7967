"""What every command line shares: settings, failures, signals, exit codes, the class of a verb.

Used by tasks.py and by the sessions of nox. Has no verb; imports core, and the machine for a
verb that asks for it.
"""

import contextlib
import errno
import functools
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from invoke import tasks

from workspace.core import files, hints, settings
from workspace.core.console import Console
from workspace.core.errors import INTERRUPTED_EXIT_CODE, ToolchainError, WorkspaceError
from workspace.core.paths import Layout, here, user_name
from workspace.core.settings import Settings

if TYPE_CHECKING:
    from workspace.machine.machine import Machine

BROKEN_PIPE_EXIT_CODE = 128 + signal.SIGPIPE
# Line ends, and the surrogates by which Python represents bytes that are not text.
_UNWRITABLE = re.compile("[\n\r\ud800-\udfff]")
LAST_RESORT = 6
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_RIGHTS = (errno.EACCES, errno.EPERM, errno.EROFS)
# Another file or folder is in the place of a file of the workspace.
_NO_PLACE = (
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENXIO,
    errno.EIO,
)


class _Ended(BaseException):
    """A signal that asks the process to end; no `except Exception` may swallow it."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


@functools.cache
def console() -> Console:
    """Return the terminal of this process."""
    return Console()


def load_settings(layout: Layout, *, flags: Mapping[str, str | None] | None = None) -> Settings:
    """Read the settings of a verb. A verb that starts something prints their warnings
    (machine/check.py); the others, such as `inv patch`, do not repeat them.

    Raises SettingsError, and WorkspaceError for a clone in a folder whose name fits neither into a
    log nor into pyvenv.cfg.
    """
    if _UNWRITABLE.search(str(layout.root)):
        raise WorkspaceError(
            f"{str(layout.root)!r} has bytes in it that are not UTF-8, or a line end",
            hint=hints.text("cli.plain_name"),
        )
    settings.forget_outer_git()
    loaded = settings.load(layout, flags=flags, also_known=lambda: _registered(layout))
    console().is_verbose |= loaded.switch("VERBOSE")
    if sentence := sudo_warning(loaded, layout.root.stat().st_uid, os.geteuid()):
        _warn(sentence)
    return loaded


def sudo_warning(loaded: Settings, owner: int, user: int) -> str | None:
    """Return a sentence for `sudo inv` in the clone of a user; `owner` is the user of the clone."""
    if "SUDO_UID" not in loaded.shell or user != 0 or owner == 0:
        return None
    return (
        f"sudo was typed before inv: what it writes belongs to root, and {user_name(owner)}"
        " cannot change it afterwards"
    )


def opened(flags: Mapping[str, str | None] | None = None) -> tuple[Layout, Settings]:
    """Return the layout of this clone and the settings of the verb, its flags over all others."""
    layout = here()
    return layout, load_settings(layout, flags=flags)


def machine() -> "Machine":
    """Return the machine of a verb in this clone."""
    from workspace.machine.machine import Machine

    return Machine(*opened())


def _registered(layout: Layout) -> list[str]:
    """Return the variables that the pinned tree itself registers (vllm/envs.py)."""
    try:
        return re.findall(
            r'^    "([A-Z][A-Z0-9_]*)":',
            files.read_regular(layout.vllm / "vllm" / "envs.py").decode(),
            re.MULTILINE,
        )
    except (OSError, UnicodeDecodeError):
        return []


@functools.cache
def _warn(text: str) -> None:
    console().warn(text)


def run(work: Callable[[], object]) -> int:
    """Run the work of a verb and return the exit status of the process.

    An expected failure is printed with its hint. ^C, SIGTERM and SIGHUP unwind the work, which ends
    its children, and are named. A closed stdout (`inv --list | head -1`) ends the work silently. A
    bug keeps its traceback.
    """
    settings.forget_odd_terminal()
    _make_streams_usable()
    try:
        # The entrances start without a handler: ^C during their imports leaves no traceback.
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with _ending_signals():
            work()
        sys.stdout.flush()
        return 0
    except WorkspaceError as exc:
        return _failed(exc)
    except (KeyboardInterrupt, _Ended) as exc:
        by = f" by {exc.number.name}" if isinstance(exc, _Ended) else ""
        with contextlib.suppress(OSError):
            console().info(f"interrupted{by}")
        return 128 + exc.number if isinstance(exc, _Ended) else INTERRUPTED_EXIT_CODE
    except BrokenPipeError:
        if not _readers_are_gone():
            raise
        return BROKEN_PIPE_EXIT_CODE
    except OSError as exc:
        if exc.errno not in (*_NO_SPACE, *_NO_RIGHTS, *_NO_PLACE) and not _names_a_link(exc):
            raise
        return _failed(_refused(exc))


def _make_streams_usable() -> None:
    # For a stream that the caller closed (`>&-`) Python has no object, and the next file that is
    # opened would get its descriptor.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    # A name that the terminal's encoding lacks must not stop a verb.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _failed(error: WorkspaceError) -> int:
    # An error without a hint, as git's message on a repository that a power cut damaged.
    error.hint = error.hint or hints.text("cli.look_further")
    # Data that was printed before the failure comes first.
    _flushed(sys.stdout)
    with contextlib.suppress(OSError):
        console().error(error)
    return error.exit_code


def _names_a_link(exc: OSError) -> bool:
    """Return whether a dangling link is missing; any other missing file is a bug."""
    return (
        exc.errno == errno.ENOENT
        and isinstance(exc.filename, str | bytes)
        and os.path.islink(exc.filename)
    )


def _refused(exc: OSError) -> ToolchainError:
    """Return an error for a refusal of the operating system, wherever it came up."""
    if exc.filename is None and not _flushed(sys.stdout):
        return ToolchainError(
            f"the output cannot be written: {exc.strerror}",
            hint=hints.text("cli.disk_full"),
        )
    place = Path(os.fsdecode(exc.filename)) if isinstance(exc.filename, str | bytes) else None
    folder = place.parent if place else Path()
    looked_at = folder if place is None or exc.errno in _NO_RIGHTS else place
    hint = (
        hints.text("core.disk_of", folder=folder)
        if exc.errno in _NO_SPACE
        else hints.text("core.list_folder", folder=looked_at)
    )
    return ToolchainError(
        f"{place or 'a file'} cannot be written or read: {exc.strerror}", hint=hint
    )


def _flushed(stream: TextIO) -> bool:
    """Write what the stream still holds; discard it, and return False, where that fails.

    Python would write it again at exit, and end with 120.
    """
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return False
    return True


def _readers_are_gone() -> bool:
    """Return whether stdout or stderr is the broken pipe.

    A broken stream is redirected: Python flushes it again at exit.
    """
    gone = False
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            gone = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return gone


@contextlib.contextmanager
def _ending_signals() -> Iterator[None]:
    """Turn the first ^C, SIGTERM or SIGHUP into an exception, so that `finally` blocks run.

    Later ones would leave the cleanup half done, and are ignored until the process ends; only
    process.py counts them while it ends a program. With the LAST_RESORT-th ^C this process ends at
    once, and the guards end its programs.
    """
    # An ignored SIGHUP (nohup) or SIGINT (a background job) stays ignored.
    former = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    }
    arrived: list[int] = []

    def end(number: int, _: FrameType | None) -> None:
        arrived.append(number)
        if arrived.count(signal.SIGINT) == LAST_RESORT:
            os._exit(INTERRUPTED_EXIT_CODE)
        if len(arrived) == 1:
            raise KeyboardInterrupt if number == signal.SIGINT else _Ended(signal.Signals(number))

    for number in former:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in former.items():
            # At its exit Python gives up handlers of its own, but not this one.
            signal.signal(number, signal.SIG_IGN if arrived else handler)


class Verb(tasks.Task[Any]):
    """A verb. Its only short flag is -j for --jobs, as of make."""

    def arg_opts(self, name: str, default: str, taken_names: set[str]) -> dict[str, Any]:
        options = super().arg_opts(name, default, taken_names)
        options["names"] += ["j"] if name == "jobs" else []
        return options


task = functools.partial(tasks.task, klass=Verb, auto_shortflags=False)
WAIT = "wait for another verb instead of stopping"
PROJECT = "vllm or triton"
RECORD = "a record: its label, its file name, or a path"
JSON = "print one JSON document instead of the table"


def after_dashes() -> list[str]:
    """Return the arguments after `--` as the shell passed them.

    Invoke joins its own remainder with blanks and loses the quoting.
    """
    return sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []
