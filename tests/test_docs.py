"""The pages of docs/: the generated ones are up to date, and every link has its target."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts import docs, docs_picture
from scripts.docs_picture import ENTRANCES, PictureError, Room

ROOT = Path(__file__).resolve().parents[1]
LONGEST_README = 200
# [text](target), [name]: target, and <img src="target">.
LINKS = (
    re.compile(r"\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)"),
    re.compile(r"^\[[^\]]+\]:\s*(\S+)", re.MULTILINE),
    re.compile(r"<img[^>]*src=\"([^\"]+)\""),
)
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*:|//|#", re.IGNORECASE)
TEST = re.compile(r"^(?:async )?def (test_\w+)", re.MULTILINE)
CODE = re.compile(r"^(```|~~~).*?^\1|`[^`\n]+`", re.MULTILINE | re.DOTALL)
PAGE = """\
[a](gone.md) ![b](lost.png) [c](page.md#d) [e](https://example.org) [f](#g)
`[h](code.md)`
```sh
[i](block.md)
```
[j]: missing.md
"""
IMPORTS = """\
import json
import workspace.a.b
from workspace import c
from workspace.d import e
def f():
    from ..g import h
    from . import own
"""
BOX = re.compile(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"')


def room(name: str, *imports: str, starts: str = "") -> Room:
    return Room(name, "", 1, 100, frozenset(imports), frozenset(starts.split()))


def test_a_session_has_the_name_by_which_nox_finds_it() -> None:
    source = '@nox.session(name="lint-patches")\ndef lint_patches(session):\n    """Look."""\n'
    plain = '@nox.session\ndef smoke(session):\n    """Judge."""\n'
    found = docs.read_sessions(source + plain)
    assert [(each.name, each.help) for each in found] == [
        ("lint-patches", "Look."),
        ("smoke", "Judge."),
    ]


def house(*rooms: Room) -> dict[str, Room]:
    return {each.name: each for each in rooms}


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def links(text: str) -> Iterator[str]:
    """Yield the file of each link that is no address, code left out."""
    plain = CODE.sub("", text)
    targets = [target for pattern in LINKS for target in pattern.findall(plain)]
    yield from (each.partition("#")[0] for each in targets if not ADDRESS.match(each))


def dead_links(page: Path) -> list[str]:
    found = links(page.read_text(encoding="utf-8"))
    return [f"{page}: {target}" for target in found if not (page.parent / target).exists()]


def run_docs(*argv: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, ROOT / "scripts" / "docs.py", *argv]
    return subprocess.run(command, capture_output=True, text=True, cwd="/")


def test_generated_pages_are_up_to_date() -> None:
    result = run_docs("--check")
    assert result.returncode == 0, result.stderr


def test_stale_page_is_named_with_the_command_that_renews_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = tmp_path / "docs" / "verbs.md"
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.setattr(docs, "render", lambda: {page: "new\n"})
    assert docs.main(["--check"]) == 1
    assert f"docs/verbs.md is out of date\nhint: {docs.COMMAND}\n" in capsys.readouterr().err
    assert not page.exists()
    assert docs.main([]) == 0
    assert page.read_text() == "new\n"
    assert docs.main(["--check"]) == 0


def test_every_relative_link_points_to_a_file_that_is_there() -> None:
    assert [dead for page in pages() for dead in dead_links(page)] == []


def test_readme_is_short_enough_to_be_read() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= LONGEST_README


def test_link_check_sees_a_dead_link_and_no_code(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    dead = ["gone.md", "lost.png", "missing.md"]
    assert [each.rpartition(" ")[2] for each in dead_links(page)] == dead


def test_every_verb_setting_session_and_error_has_its_row() -> None:
    reference = docs.settings_page(docs.SETTINGS)
    missing = [each.name for each in docs.SETTINGS if f"| `{each.name}` |" not in reference]
    codes = docs.exit_codes_page(docs.ERRORS)
    missing += [each.__name__ for each in docs.ERRORS if f"| `{each.__name__}` |" not in codes]
    verbs = docs.verbs_page()
    source = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    sessions = re.findall(r"^@nox\.session.*\ndef (\w+)", source, re.MULTILINE)
    missing += [name for name in sessions if f"### Session {name}\n" not in verbs]
    assert missing == []
    # A verb of each kind, and an argument of a session that comes from its program's parser.
    assert "### inv bootstrap\n" in verbs
    assert "`inv patch` does the same." in verbs
    assert "| `--level LEVEL` | quick, full: " in verbs
    assert re.search(r"^\| `--wait` \| .+ \| `off` \|$", verbs, re.MULTILINE)


def test_everything_in_the_table_of_coverage_is_on_the_page_of_the_smoke() -> None:
    page = (ROOT / "docs" / "smoke.md").read_text(encoding="utf-8")
    for part, names in docs.registry.coverage().items():
        shown = [line for line in page.splitlines() if line.startswith(f"| {part} |")]
        for name in names:
            spelled = name if part in ("forms", "keys") else f"`{name}`"
            assert sum(spelled in line for line in shown) == 1, f"{part}: {name}"


def test_rooms_are_read_from_imports_of_every_kind() -> None:
    tree = ast.parse(IMPORTS)
    found = set(docs_picture.imported_rooms(tree, "workspace/here/module.py"))
    assert found == {"a", "c", "d", "g", "here"}


def test_rooms_stand_above_all_that_they_import_and_entrances_on_top() -> None:
    rooms = house(
        room("core"),
        *(room(name, "core") for name in "abcd"),
        room("tasks.py", "d"),
        room("noxfile.py", starts="a"),
    )
    rows = docs_picture.arrange(rooms)
    assert rows[0] == ["core"]
    assert rows[-1] == list(ENTRANCES)
    assert max(map(len, rows)) <= docs_picture.ROOMS_A_ROW
    at = {name: row for row, names in enumerate(rows) for name in names}
    assert all(at[name] > at[other] for name in at for other in rooms[name].below)


def test_circle_of_rooms_is_named() -> None:
    rooms = house(room("a", "b"), room("b", "c"), room("c", "a"))
    with pytest.raises(PictureError, match="a → b → c → a"):
        docs_picture.arrange(rooms)


def test_arrow_that_others_imply_is_left_out() -> None:
    rooms = house(room("a", "b", "c"), room("b", "c"), room("c"))
    assert docs_picture.direct_arrows(rooms) == [("a", "b"), ("b", "c")]


def test_long_arrow_crosses_no_box() -> None:
    rooms = house(room("a", "b", "x"), room("b", "c"), room("c", "d"), room("d"), room("x"))
    picture = docs_picture.draw(house(*rooms.values(), room("z", "a")))
    boxes = [tuple(map(float, box)) for box in BOX.findall(picture)]
    assert len(boxes) == len(rooms) + 1
    for path in re.findall(r'<path d="(M[^"]+)" fill="none"', picture):
        corners = [tuple(map(float, each.split())) for each in re.findall(r"[\d.]+ [\d.]+", path)]
        for x, y, width, height in boxes:
            inside = [x < cx < x + width and y < cy < y + height for cx, cy in corners]
            assert not any(inside)


def test_page_without_its_markers_is_refused() -> None:
    with pytest.raises(PictureError, match="lacks the markers"):
        docs.with_part("# Architecture\n", ["a"])
    page = f"before\n{docs.BEGIN}\nold\n{docs.END}\nafter\n"
    new = docs.with_part(page, ["new"])
    assert new == f"before\n{docs.BEGIN}\n\nnew\n\n{docs.END}\nafter\n"
    assert docs.with_part(new, ["new"]) == new


def missing_tests(text: str) -> list[str]:
    """Return the files and tests that a page of promises names and that do not exist."""
    defined: dict[str, set[str]] = {}
    for path in (ROOT / "tests").rglob("*.py"):
        names = TEST.findall(path.read_text(encoding="utf-8"))
        defined[path.relative_to(ROOT).as_posix()] = set(names)
    known = set().union(*defined.values()) | {path.rpartition("/")[2] for path in defined}
    missing = []
    for name in re.findall(r"`(tests/[^`\s]+|test_\w+(?:\.py)?)`", text):
        path, _, test = name.partition("::")
        if "/" not in name:
            there = name in known
        else:
            there = test in defined.get(path, set()) if test else (ROOT / path).exists()
        missing += [] if there else [name]
    return missing


def test_every_test_that_a_promise_names_exists() -> None:
    page = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", page, flags=re.MULTILINE)[1:]
    assert [each.partition("\n")[0] for each in sections if "\n- " not in each] == []
    assert missing_tests(page) == []


def test_promise_with_a_test_that_is_gone_is_seen() -> None:
    file = "tests/test_docs.py"
    gone = [f"{file}::test_gone", "tests/gone.py", "test_gone.py", "test_gone"]
    there = [f"{file}::{test_promise_with_a_test_that_is_gone_is_seen.__name__}", file, "tests"]
    assert missing_tests("".join(f"- A: `{each}`.\n" for each in there + gone)) == gone
