"""Probes as modules: each is a program of its own, which nothing imports."""

import importlib.util
import sys
from types import ModuleType

import pytest

from workspace.core.paths import here


def load(name: str) -> ModuleType:
    """Return a probe, without a run of it."""
    spec = importlib.util.spec_from_file_location(f"{name}_probe", here().probes / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    # Its dataclasses look it up.
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def probe(request: pytest.FixtureRequest) -> ModuleType:
    """The probe after which the module of the test is named."""
    return load(str(request.module.__name__).rpartition("test_")[2])
