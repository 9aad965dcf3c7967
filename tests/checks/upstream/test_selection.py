"""Which of upstream's tests a change reaches, and which of them run here, on small trees."""

from pathlib import Path

import pytest

from workspace.checks import upstream_selection

KNOWN = upstream_selection.rules()


def make(tree: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tree


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make(
        tmp_path,
        {
            "tests/test_alpha.py": "from vllm.alpha import A",
            "tests/utils_/test_beta.py": "",
            "tests/v1/core/test_scheduler.py": "import pytest\npytestmark = pytest.mark.cpu_test",
            "tests/v1/core/test_other.py": (
                "from vllm.v1.core import (\n    block_pool,\n    other,\n)"
            ),
            "tests/v1/core/helper.py": "",
            "tests/config/test_patch.py": 'patch("vllm.v1.core.block_pool.Pool.take")',
            "tests/config/test_near.py": (
                "from vllm.v1.core.block_pool_two import X\nimport vllm.v1.core.block"
            ),
            "tests/v1/test_package.py": "from vllm.v1.core import Thing",
            "tests/models/test_registry.py": "",
        },
    )


def reached(tree: Path, *changed: str) -> dict[str, str]:
    return {test.path: test.why for test in upstream_selection.find(tree, changed, KNOWN).tests}


@pytest.mark.parametrize(
    ("changed", "tests"),
    [
        ("vllm/alpha.py", {"tests/test_alpha.py"}),
        ("vllm/utils/beta.py", {"tests/utils_/test_beta.py"}),
        ("vllm/v1/core/deeper/scheduler.py", {"tests/v1/core/test_scheduler.py"}),
        (
            "vllm/v1/core/block_pool.py",
            {"tests/v1/core/test_other.py", "tests/config/test_patch.py"},
        ),
        (
            "vllm/v1/core/__init__.py",
            {
                "tests/v1/core/test_scheduler.py",
                "tests/v1/core/test_other.py",
                "tests/v1/test_package.py",
            },
        ),
        (
            "vllm/v1/core/nobody.py",
            {"tests/v1/core/test_scheduler.py", "tests/v1/core/test_other.py"},
        ),
        ("tests/config/test_near.py", {"tests/config/test_near.py"}),
        (
            "tests/v1/core/helper.py",
            {"tests/v1/core/test_scheduler.py", "tests/v1/core/test_other.py"},
        ),
        ("vllm/model_executor/models/llama.py", {"tests/models/test_registry.py"}),
    ],
)
def test_change_reaches_tests_that_mirror_name_or_share_it(
    tree: Path, changed: str, tests: set[str]
) -> None:
    assert reached(tree, changed).keys() == tests


def test_nearest_way_gives_the_reason_and_comes_first(tree: Path) -> None:
    found = reached(tree, "vllm/v1/core/block_pool.py", "vllm/alpha.py")
    assert next(iter(found)) == "tests/test_alpha.py"
    assert found["tests/test_alpha.py"] == "mirrors vllm/alpha.py"


@pytest.mark.parametrize(
    "changed",
    [
        "docs/index.md",
        "setup.py",
        "tests/utils.py",
        "vllm/quite/new.py",
        "what.ever",
        "tests/data.json",
    ],
)
def test_file_that_reaches_no_test_is_listed_with_the_reason(tree: Path, changed: str) -> None:
    found = upstream_selection.find(tree, [changed], KNOWN)
    assert found.tests == ()
    assert [one.path for one in found.unreached] == [changed]
    assert found.unreached[0].why


@pytest.mark.parametrize(
    ("path", "device", "try_all", "how"),
    [
        ("tests/v1/core/test_scheduler.py", "cpu", False, "marked"),
        ("tests/v1/core/test_other.py", "cpu", False, "not"),
        ("tests/v1/core/test_other.py", "cpu", True, "whole"),
        ("tests/v1/core/test_other.py", "cuda", False, "whole"),
        ("tests/utils_/test_beta.py", "cpu", False, "whole"),
    ],
)
def test_only_what_upstream_runs_on_cpus_is_run_without_a_gpu(
    tree: Path, path: str, device: str, try_all: bool, how: str
) -> None:
    decision = upstream_selection.decide_runnable(tree, path, KNOWN, device=device, try_all=try_all)
    assert decision.how == how
    assert decision.why
