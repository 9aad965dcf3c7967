"""Where kernels come from is decided, written and read by one module.

The rule is a function from a module's source to complaints, and is also shown sources that break
it.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from tests.parsed import parse
from workspace.install.precompiled import Kind

ROOT = Path(__file__).resolve().parents[2]
OWNER = "workspace/install/precompiled.py"
KINDS = set(get_args(Kind))
# `f"hybrid precompiled {wheel}"` composes a text.
COMPOSED = re.compile(r"(hybrid )?(precompiled|wheel) |hybrid ")


def decisions_elsewhere(source: str, path: str) -> list[str]:
    """The expressions that compare the kind of a source or KERNELS, or handle its former text."""
    return [
        f"{path}:{node.lineno}: {ast.unparse(node).splitlines()[0]}"
        for node in ast.walk(parse(source))
        if isinstance(node, ast.expr | ast.Match) and path != OWNER and _decides(node)
    ]


def _decides(node: ast.expr | ast.Match) -> bool:
    match node:
        case ast.Constant(value="hybrid" | "donor"):
            return True
        case ast.JoinedStr(values=[ast.Constant(value=str(text)), *_]):
            return COMPOSED.fullmatch(text) is not None
        case ast.Compare() if any(map(_is_kernels_setting, (node.left, *node.comparators))):
            return True
        case ast.Compare(comparators=[*_, ast.expr() as inputs], left=ast.Constant("origin")):
            return _is_inputs(inputs)
        case ast.Subscript(value=inputs, slice=ast.Constant("origin")):
            return _is_inputs(inputs)
        case ast.Call(func=ast.Attribute(value=inputs), args=[ast.Constant("origin"), *_]):
            return _is_inputs(inputs)
        case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="kind"))):
            return _has_kind(node)
        case ast.Match(subject=ast.Attribute(attr="kind")):
            return any(_has_kind(case.pattern) for case in node.cases)
        case ast.Compare() | ast.Subscript():
            return _has_kind(node) and any(
                isinstance(part, ast.Attribute) and part.attr == "kind" for part in ast.walk(node)
            )
    return False


def _is_kernels_setting(node: ast.expr) -> bool:
    return ast.unparse(node).endswith("text('KERNELS')")


def _is_inputs(node: ast.expr) -> bool:
    return ast.unparse(node).endswith("inputs")


def _has_kind(node: ast.AST) -> bool:
    return any(isinstance(part, ast.Constant) and part.value in KINDS for part in ast.walk(node))


def modules() -> Iterator[Path]:
    yield from sorted((ROOT / "workspace").rglob("*.py"))


def test_one_module_decides_where_kernels_come_from() -> None:
    assert [
        complaint
        for path in modules()
        for complaint in decisions_elsewhere(
            path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
        )
    ] == []


@pytest.mark.parametrize(
    "source",
    [
        'observed.kernels_wanted.source.kind == "native"',
        'is_due = wanted.kind in ("native", "precompiled")',
        'source.kind.startswith("wheel")',
        '{"native": 1, "wheel": 2}[source.kind]',
        'match source.kind:\n    case "native" | "wheel":\n        pass',
        'steps = "hybrid" if is_changed else other',
        'recorded.inputs["origin"].split()',
        'recorded.inputs.get("origin", "")',
        '"origin" in inputs',
        'text = f"precompiled {wheel.filename} {wheel.sha256}"',
        'settings.text("KERNELS") == "auto"',
        '"auto" != settings.text("KERNELS")',
        'choice = "donor"',
    ],
)
def test_the_rule_sees_what_breaks_it(source: str) -> None:
    assert len(decisions_elsewhere(source, "workspace/bump/a.py")) == 1
    assert decisions_elsewhere(source, OWNER) == []


@pytest.mark.parametrize(
    "source",
    [
        "if observed.kernels_wanted.source.is_native: pass",
        'current.kind == "git"',
        'package.package_type == "wheel"',
        'preflight(is_native=True if is_compiled else "precompiled")',
        'Case(kernels=settings.text("KERNELS"))',
        'f"the precompiled wheel {name} is damaged"',
        'line["origin"]',
    ],
)
def test_the_rule_does_not_see_what_is_allowed(source: str) -> None:
    assert decisions_elsewhere(source, "workspace/bump/a.py") == []
