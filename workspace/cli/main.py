"""What stands at every door: settings read, failures printed, signals and exit codes.

Shared by tasks.py and workspace.cli.sessions; knows no verb and imports nothing but core.
"""

import contextlib
import errno
import functools
import io
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType

from workspace.core import files, settings
from workspace.core.console import Console
from workspace.core.errors import INTERRUPTED_EXIT_CODE, ToolchainError, WorkspaceError
from workspace.core.paths import Layout
from workspace.core.settings import Settings

BROKEN_PIPE_EXIT_CODE = 128 + signal.SIGPIPE
# Python's stand-ins for bytes that are no text, and what ends a line.
_UNWRITABLE = re.compile("[\n\r\ud800-\udfff]")
_LOOK_FURTHER = (
    "./scripts/inv doctor    looks for what may be wrong; ./scripts/inv report collects what a bug"
    " report needs"
)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_RIGHTS = (errno.EACCES, errno.EPERM, errno.EROFS)
# Something else lies where the workspace keeps a file or a folder.
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
    """A signal that asks the process to end; no `except Exception` on the way up may swallow it."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


@functools.cache
def console() -> Console:
    """Return the terminal of this process."""
    return Console()


def load_settings(
    layout: Layout, *, flags: Mapping[str, str | None] | None = None, is_quiet: bool = False
) -> Settings:
    """Read the settings for a verb and print their warnings, each once in a process; with
    `is_quiet` the verb shows them itself.

    Raises SettingsError, and WorkspaceError for a clone in a folder whose name no log and no
    pyvenv.cfg can hold.
    """
    if _UNWRITABLE.search(str(layout.root)):
        raise WorkspaceError(
            f"{str(layout.root)!r} has bytes in it that are not UTF-8, or a line end",
            hint="move the clone into a folder with a plain name",
        )
    settings.forget_outer_git()
    loaded = settings.load(layout, flags=flags, also_known=lambda: _registered(layout))
    for warning in () if is_quiet else loaded.warnings:
        _warn(warning)
    return loaded


def _registered(layout: Layout) -> list[str]:
    """The names in the pinned tree's own registry of variables (vllm/envs.py,
    environment_variables).
    """
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


def run(work: Callable[[], None]) -> int:
    """Do the work of a door and return the process's exit status.

    An expected failure is printed with its hint; ^C, SIGTERM and SIGHUP unwind the work, which ends
    its children, and are named; a reader of stdout that went away (`inv --list | head -1`) ends it
    without a word. A bug keeps its traceback.
    """
    settings.forget_odd_terminal()
    _make_streams_usable()
    try:
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
    # Python has no object for a stream that the caller closed (`>&-`), and the next file opened
    # would take its number.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    # A name or a path that the terminal's encoding lacks is no reason to fail.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _failed(error: WorkspaceError) -> int:
    # Such as what git says of a repository that a power cut damaged: nobody foresaw it, and there
    # is a way on all the same.
    error.hint = error.hint or _LOOK_FURTHER
    # What was printed for a program to read comes before the reason why there is no more of it.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        console().error(error)
    return error.exit_code


def _names_a_link(exc: OSError) -> bool:
    """Whether a link that leads nowhere is what is missing; any other missing file was there a
    moment ago, or is a bug.
    """
    return (
        exc.errno == errno.ENOENT
        and isinstance(exc.filename, str | bytes)
        and os.path.islink(exc.filename)
    )


def _refused(exc: OSError) -> ToolchainError:
    """The machine's refusal, wherever in a verb it came up, as a sentence."""
    place = Path(os.fsdecode(exc.filename)) if isinstance(exc.filename, str | bytes) else None
    folder = place.parent if place else Path()
    looked_at = folder if place is None or exc.errno in _NO_RIGHTS else place
    hint = shlex.join(
        ["df", "-h", str(folder)] if exc.errno in _NO_SPACE else ["ls", "-ld", str(looked_at)]
    )
    return ToolchainError(
        f"{place or 'a file'} cannot be written or read: {exc.strerror}", hint=hint
    )


def _readers_are_gone() -> bool:
    """Whether stdout or stderr is the broken pipe; they are then pointed elsewhere, or Python's own
    flush at exit would fail again.
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
    """Turn the first SIGTERM or SIGHUP into an exception, so that `finally` blocks run; more of
    them do not disturb the clearing up.
    """
    # A SIGHUP that is ignored (nohup) stays ignored.
    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) == signal.SIG_DFL
    ]

    def end(number: int, _: FrameType | None) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise _Ended(signal.Signals(number))

    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


WAIT = "wait for another verb instead of stopping"
JSON = "print one JSON document instead of the table"


def after_dashes() -> list[str]:
    """The words after `--` as the shell gave them: Invoke's own remainder joins them with
    blanks.
    """
    return sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []
