"""Single lines of a user's .env: a changed line remains as a comment, every other line as it is."""

import pytest

from workspace.core import settings
from workspace.machine import check


@pytest.mark.parametrize(
    ("text", "changes", "after"),
    [
        ("", {"A": "1"}, "# why\nA=1\n"),
        ("B=2\n", {"A": "1"}, "B=2\n# why\nA=1\n"),
        ("B=2", {"A": "1"}, "B=2\n# why\nA=1\n"),
        ("A=0\nB=2\n", {"A": "1"}, "# why\n# A=0\nA=1\nB=2\n"),
        (
            "export A = 0\n#A=5\nAA=1\nA=3\nB=2\n",
            {"A": "1"},
            "# why\n# export A = 0\n#A=5\nAA=1\n# A=3\nA=1\nB=2\n",
        ),
        ("A=0\n", {"A": None}, "# why\n# A=0\n"),
        ("B=2\n", {"A": None}, "B=2\n"),
        ("", {"A": "/a folder/x#y"}, "# why\nA='/a folder/x#y'\n"),
    ],
)
def test_no_line_is_lost_and_the_new_value_counts(text, changes, after):
    assert check.changed(text, changes, why="why") == after


def test_difference_is_returned_and_the_file_keeps_its_mode_and_its_link(house, tmp_path):
    (tmp_path / "real.env").write_text("TRITON_PTXAS_PATH=/old\n")
    (tmp_path / "real.env").chmod(0o640)
    house.layout.dotenv.symlink_to(tmp_path / "real.env")
    output = check.change(house.layout, {"TRITON_PTXAS_PATH": "/a b/ptxas"}, why="why")
    assert [line for line in output if line[0] in "+-" and ".env" not in line] == [
        "-TRITON_PTXAS_PATH=/old",
        "+# why",
        "+# TRITON_PTXAS_PATH=/old",
        "+TRITON_PTXAS_PATH='/a b/ptxas'",
    ]
    assert (house.layout.dotenv.is_symlink(), (tmp_path / "real.env").stat().st_mode & 0o777) == (
        True,
        0o640,
    )
    assert settings.load(house.layout, environ={}).text("TRITON_PTXAS_PATH") == "/a b/ptxas"
