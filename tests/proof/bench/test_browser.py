"""The report in a real headless Chromium: it renders, at a phone's width too, without console
output and without requests.
"""

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from tests.bench.materials import arm, record, served
from tests.bench.test_page import at, composed

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CONSOLE = re.compile(r":CONSOLE[:(]")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--hide-scrollbars",
    "--enable-logging=stderr",
)
TIMEOUT_S = 120
BROKEN = (
    '<!doctype html><meta http-equiv="Content-Security-Policy" content="default-src \'none\'"><img'
    ' src="x.png"><script>fail()</script>'
)


@pytest.fixture(scope="module")
def chromium() -> str:
    found = next((place for name in NAMES if (place := shutil.which(name))), None)
    if found is None:
        pytest.skip(
            "there is no Chromium on PATH: sudo apt-get install chromium    the report was not"
            " tested in a browser"
        )
    return found


@pytest.fixture(scope="module")
def html() -> str:
    sweeps = [
        at(11 + number, served((1, 4, 16, 32), seed=number, slow=slow, tree=f"{number}" * 40))
        for number, slow in enumerate((0.0, 0.2))
    ]
    latencies = [
        at(15 + number, record(arm(number, 12), tree=f"{number}" * 40)) for number in range(4)
    ]
    return composed(*sweeps, *latencies).html


def browse(program: str, text: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    page = folder / "report.html"
    page.write_text(text)
    argv = [program, *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, page.as_uri()]
    return subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)


def test_console_is_silent_and_every_figure_is_in_the_document(
    chromium: str, html: str, tmp_path: Path
) -> None:
    seen = browse(chromium, html, tmp_path, "--dump-dom")
    assert CONSOLE.search(seen.stderr) is None, seen.stderr
    assert seen.stdout.count("<figcaption>") == html.count("<figcaption>") > 8


def test_page_with_a_fault_is_not_silent(chromium: str, tmp_path: Path) -> None:
    assert CONSOLE.search(browse(chromium, BROKEN, tmp_path, "--dump-dom").stderr)


@pytest.mark.parametrize("width", [500, 1200])
def test_page_fits_a_phone_and_a_desk(chromium: str, html: str, tmp_path: Path, width: int) -> None:
    """Measure the width of the page by a script in a copy: a wider page scrolls sideways."""
    probe = (
        "<script>document.title = document.documentElement.scrollWidth + '/' + innerWidth</script>"
    )
    copy = html.replace(
        "default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'"
    ).replace("</body>", f"{probe}</body>")
    shot = tmp_path / "shot.png"
    seen = browse(
        chromium, copy, tmp_path, "--dump-dom", f"--window-size={width},900", f"--screenshot={shot}"
    )
    found = re.search(r"<title>(\d+)/(\d+)</title>", seen.stdout)
    assert found, seen.stdout[:500]
    assert int(found[1]) <= int(found[2])


def test_screenshot_shows_ink_where_the_plots_are(chromium: str, html: str, tmp_path: Path) -> None:
    from PIL import Image

    shot = tmp_path / "shot.png"
    browse(chromium, html, tmp_path, "--window-size=500,2000", f"--screenshot={shot}")
    assert struct.unpack(">II", shot.read_bytes()[16:24])[0] == 500
    with Image.open(shot) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24) or []}
    # The blue and the orange of A and B.
    assert {(0, 0x72, 0xB2), (0xD5, 0x5E, 0)} <= colours
