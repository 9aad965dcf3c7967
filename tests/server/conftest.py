"""Servers of tests are ready in milliseconds, and are asked as often."""

import pytest

from workspace.server import lifecycle


@pytest.fixture(autouse=True)
def _brief_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "POLL_S", 0.02)
