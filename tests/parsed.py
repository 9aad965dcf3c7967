"""Syntax trees for the tests that read the library's source."""

import ast
import functools


@functools.cache
def parse(source: str) -> ast.Module:
    """Parse a module once a session; a rule must not change the tree."""
    return ast.parse(source)
