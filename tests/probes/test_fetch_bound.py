"""A hub that sends more of a file than the file has, as the probe of `serve.fetch` sees it."""

import contextlib
import itertools
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from workspace.probes import fetch_model


@pytest.mark.parametrize("is_ranged", [True, False])
def test_endless_answer_ends_at_the_size_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_ranged: bool
) -> None:
    answer = types.SimpleNamespace(
        is_error=False,
        status_code=206 if is_ranged else 200,
        iter_raw=lambda: itertools.repeat(b"x" * 100),
    )

    @contextlib.contextmanager
    def stream(*_: object, **__: object) -> Iterator[object]:
        yield answer

    hub = types.SimpleNamespace(hf_raise_for_status=None)
    monkeypatch.setitem(sys.modules, "httpx", types.SimpleNamespace(stream=stream))
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.ModuleType("huggingface_hub"))
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", hub)
    part = tmp_path / "part"
    part.write_bytes(b"y" * 50)
    with part.open("ab") as file, pytest.raises(fetch_model.Refused, match="more than 1000 bytes"):
        fetch_model.receive("https://h/x", {}, file, 50, 1000)
    assert part.stat().st_size <= 1100
