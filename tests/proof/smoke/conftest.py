"""The clone of the fast tests, whose state is recorded as good."""

from tests.pin.conftest import _good, clone, releases

__all__ = ["_good", "clone", "releases"]
