"""Fixtures of the fast tests."""

from tests.repo.conftest import (
    conflicting,
    hostile,
    hostile_home,
    made,
    release,
    superproject,
    upstream,
)

__all__ = ["conflicting", "hostile", "hostile_home", "made", "release", "superproject", "upstream"]
