"""What ninja says of commands that failed: the first that truly did, and its first error.

Units that were refused because another one failed are failures to ninja as well, hundreds of them; they are left out here.
"""

import re
from dataclasses import dataclass

SHOWN_LINES = 15
# A template's error may fill a book; what matters stands at its beginning.
_KEPT_LINES = 2000
# NINJA_STATUS is set to this form.
_STATUS = re.compile(r"\[\d+/\d+\] ")
_ERROR = re.compile(
    r"\berror\b *[:\[(#]|CMake Error|\bfatal( error)?\b ?:|[a-z]+ fatal *:|undefined reference|cannot find -l"
    r"|[A-Za-z]*(Error|Exception)\b ?:|\b[Kk]illed\b|died due to signal"
)
_NO_SPACE = "No space left on device"
REFUSAL = "not compiled: "


@dataclass(frozen=True)
class Failure:
    """A command that failed: what it should have made, and what it said."""

    output: str
    lines: tuple[str, ...]

    @property
    def _at(self) -> int:
        return next((number for number, line in enumerate(self.lines) if _ERROR.search(line)), 0)

    @property
    def error(self) -> str:
        """The line that says why, as far as that can be told."""
        return self.lines[self._at].strip() if self.lines else "it said nothing"

    @property
    def shown(self) -> tuple[str, ...]:
        """The lines around it."""
        start = max(0, self._at - 2)
        return self.lines[start : start + SHOWN_LINES]


class Failures:
    """Hears ninja's lines, and keeps the first failure that is one."""

    def __init__(self) -> None:
        self.has_no_space = False
        self._first: Failure | None = None
        self._silent: Failure | None = None
        self._output: str | None = None
        self._lines: list[str] = []
        self._is_command = False

    @property
    def first(self) -> Failure | None:
        self._close()
        return self._first or self._silent

    def hear(self, line: str) -> None:
        """Take in the next line of ninja's."""
        self.has_no_space = self.has_no_space or _NO_SPACE in line
        if self._first:
            return
        if line.startswith("FAILED: "):
            self._close()
            # Newer ninjas put `[code=1]` before the outputs.
            self._output = re.sub(r"^FAILED: (\[code=\d+\] )?", "", line).split(" ")[0]
            self._is_command = True
        elif self._output is not None and (_STATUS.match(line) or line.startswith("ninja: ")):
            self._close()
        elif self._output is not None:
            if not self._is_command and len(self._lines) < _KEPT_LINES:
                self._lines.append(line)
            self._is_command = False

    def _close(self) -> None:
        """The end of a failure's lines: those that were refused said nothing else. One that said nothing counts where no other does."""
        if self._output is not None and not self._lines:
            self._silent = self._silent or Failure(self._output, ())
        elif self._output is not None and not all(line.startswith(REFUSAL) for line in self._lines if line):
            self._first = self._first or Failure(self._output, tuple(self._lines))
        self._output, self._lines = None, []
