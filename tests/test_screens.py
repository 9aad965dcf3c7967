"""The option --screens: what it keeps, and in which form."""

from pathlib import Path

from tests.screens import recorded
from workspace.core.console import Console, Row, State
from workspace.core.errors import SettingsError


def test_an_error_and_a_screen_are_kept_once_as_a_terminal_shows_them(tmp_path: Path) -> None:
    rows = [Row(State.WARN, "disk", f"{number} GiB free, " * 8, hint="df -h") for number in (7, 8)]
    with recorded(tmp_path):
        for row in rows:
            SettingsError("--jobs: 'x' is not a number", hint="./scripts/inv --help rebuild")
            Console().rows(iter([row]))
    (file,) = tmp_path.iterdir()
    assert file.read_text() == (
        "error: --jobs: 'x' is not a number\n"
        "hint: ./scripts/inv --help rebuild\n\n"
        f"warn     disk          {'7 GiB free, ' * 6}7 GiB\n"
        "                       free, 7 GiB free,\n"
        "                       $ df -h\n\n"
    )


def test_nothing_is_kept_after_the_block(tmp_path: Path) -> None:
    with recorded(tmp_path):
        pass
    SettingsError("late")
    Console().info("late")
    assert list(tmp_path.iterdir()) == []
