"""The checkouts of the fast tests."""

from tests.source.conftest import conflicting, hostile, hostile_home, made, release, superproject, upstream

__all__ = ["conflicting", "hostile", "hostile_home", "made", "release", "superproject", "upstream"]
