"""The built environment of this clone: run `./scripts/inv bootstrap` first."""

import pytest

from workspace.core.paths import Layout, here


@pytest.fixture(scope="session")
def layout() -> Layout:
    found = here()
    if not found.environment_python.exists() or not (found.vllm / "vllm" / "envs.py").exists():
        pytest.skip("nothing is built in this clone: ./scripts/inv bootstrap")
    return found
