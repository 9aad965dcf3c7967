"""An editable install whose tree was renamed, and a first attempt at it that was killed."""

import csv
from pathlib import Path

import pytest

from workspace.bump import promote
from workspace.core.paths import Layout

OLD, NEW = Path("/clone of mine/.workspace/bump/vendor/vllm"), Path("/clone of mine/vendor/vllm")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path)
    site = made.environment / "lib" / "python3.12" / "site-packages"
    info = site / "vllm-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "finder.py").write_text(f"MAPPING = {{'vllm': '{OLD}/vllm'}}\n")
    (info / "direct_url.json").write_text(
        '{"url": "file:///clone%20of%20mine/.workspace/bump/vendor/vllm"}'
    )
    (info / "INSTALLER").write_text("uv")
    rows = [
        [name, "sha256=x", str((site / name).stat().st_size)]
        for name in ("finder.py", f"{info.name}/direct_url.json", f"{info.name}/INSTALLER")
    ]
    with (info / "RECORD").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([*rows, [f"{info.name}/RECORD", "", ""]])
    return made


def sizes(layout: Layout) -> list[bool]:
    site = layout.environment / "lib" / "python3.12" / "site-packages"
    with (site / "vllm-1.0.dist-info" / "RECORD").open(newline="") as file:
        return [
            not row[2] or (site / row[0]).stat().st_size == int(row[2]) for row in csv.reader(file)
        ]


def test_paths_are_renamed_also_in_addresses_and_the_list_of_files_is_true_again(
    layout: Layout,
) -> None:
    assert set(promote.retarget_scripts(layout, "vllm", old=OLD, new=NEW)) == {
        "finder.py",
        "vllm-1.0.dist-info/direct_url.json",
    }
    site = layout.environment / "lib" / "python3.12" / "site-packages"
    assert (site / "finder.py").read_text() == f"MAPPING = {{'vllm': '{NEW}/vllm'}}\n"
    assert (
        site / "vllm-1.0.dist-info" / "direct_url.json"
    ).read_text() == '{"url": "file:///clone%20of%20mine/vendor/vllm"}'
    assert all(sizes(layout))
    assert promote.retarget_scripts(layout, "vllm", old=OLD, new=NEW) == ()


def test_list_of_files_is_repaired_after_a_kill(layout: Layout) -> None:
    finder = layout.environment / "lib" / "python3.12" / "site-packages" / "finder.py"
    finder.write_text(finder.read_text().replace(str(OLD), str(NEW)))
    assert not all(sizes(layout))
    promote.retarget_scripts(layout, "vllm", old=OLD, new=NEW)
    assert all(sizes(layout))
