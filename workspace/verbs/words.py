"""What the verbs say alike, and the words after `--`."""

import sys

WAIT = "wait for another verb instead of stopping"
JSON = "print one JSON document instead of the table"


def after_dashes() -> list[str]:
    """The words after `--` as the shell gave them: Invoke's own remainder joins them with blanks."""
    return sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []
