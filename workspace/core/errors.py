"""Expected failures, one class per exit code.

Raised where the failure is known, caught in cli/main.py, which prints message and hint and exits
with `exit_code`. Any other exception is a bug and keeps its traceback.
"""

import re
from collections.abc import Sequence
from typing import ClassVar

INTERRUPTED_EXIT_CODE = 130
# What a terminal obeys instead of showing: C0 but for tab and line end, DEL, C1 (ECMA-48), and the
# marks that turn the direction of a line around (CVE-2021-42574).
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Return a text with its control characters as backslash escapes: others wrote parts of it."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class WorkspaceError(Exception):
    """An expected failure: the object, what was found, what was expected, and a hint."""

    exit_code: ClassVar[int] = 1
    meaning: ClassVar[str] = "any other expected failure"

    def __init__(
        self, message: str, *, hint: str | None = None, details: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details


class SettingsError(WorkspaceError):
    exit_code = 2
    meaning = "a flag, a setting or .env cannot be used"


class CheckoutError(WorkspaceError):
    exit_code = 3
    meaning = "a checkout under vendor/ is in a state that must not be touched"


class PatchConflict(WorkspaceError):
    exit_code = 4
    meaning = "a patch does not apply"


class PatchDrift(WorkspaceError):
    exit_code = 5
    meaning = "patches and commits differ"


class ToolchainError(WorkspaceError):
    exit_code = 6
    meaning = "the machine lacks something: interpreter, compiler, driver, disk, rights"


class BuildError(WorkspaceError):
    exit_code = 7
    meaning = "an installation or a build failed, or its result is not the requested one"


class SmokeError(WorkspaceError):
    exit_code = 8
    meaning = "the built tree computes incorrectly, or is missing or stale"


class Regression(WorkspaceError):
    exit_code = 9
    meaning = "a benchmark got worse"


class ServeError(WorkspaceError):
    exit_code = 10
    meaning = "a server could not be started, reached or stopped"


class SourceError(WorkspaceError):
    exit_code = 11
    meaning = "a file could not be fetched, or does not match its hash"


class LockError(WorkspaceError):
    exit_code = 12
    meaning = "another verb is changing this workspace"


class NodeError(WorkspaceError):
    exit_code = 13
    meaning = "another node cannot be reached, or is not as this one"


ERRORS: tuple[type[WorkspaceError], ...] = (
    WorkspaceError,
    SettingsError,
    CheckoutError,
    PatchConflict,
    PatchDrift,
    ToolchainError,
    BuildError,
    SmokeError,
    Regression,
    ServeError,
    SourceError,
    LockError,
    NodeError,
)


def listed(names: Sequence[str]) -> str:
    """Return `a, b, c and 2 more`."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return `1 library` or `2 libraries`; `plural` is needed where it is not noun + s."""
    return f"{count} {noun if count == 1 else plural or f'{noun}s'}"
