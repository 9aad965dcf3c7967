"""The clone of the fast tests, whose state is known-good."""

from tests.bump.conftest import _good, clone, releases

__all__ = ["_good", "clone", "releases"]
