"""What of vLLM's API the smoke's checks cover: coverage.toml, held against the pinned tree."""

import ast
import contextlib
import functools
import re
from collections.abc import Mapping
from pathlib import Path

from workspace.checks.registry import section
from workspace.core import records

# What coverage.toml lists of the tree: the fields of these classes, and switches in these files.
COVERAGE = Path(__file__).with_name("coverage.toml")
_SAMPLING = "vllm/sampling_params.py"
_OPENAI = "vllm/entrypoints/openai"
FIELDS: Mapping[str, str] = {
    "SamplingParams": _SAMPLING,
    "StructuredOutputsParams": _SAMPLING,
    "RepetitionDetectionParams": _SAMPLING,
    "CompletionRequest": f"{_OPENAI}/completion/protocol.py",
    "ChatCompletionRequest": f"{_OPENAI}/chat_completion/protocol.py",
}
_SWITCHES = re.compile(r"vllm/config/\w+\.py")
_SWITCH = re.compile(r"(True|None|Field\(default=(True|None)\b.*)")


@functools.cache
def table() -> Mapping[str, Mapping[str, tuple[str, ...] | str]]:
    """Return coverage.toml: by part and name the checks, or the reason why there is none.

    Raises DecodeError if the file is damaged.
    """
    parts = records.parse_toml(COVERAGE.read_bytes())
    return {
        part: {
            name: tuple(map(str, entry)) if isinstance(entry, list) else str(entry)
            for name, entry in section(parts, part).items()
        }
        for part in parts
    }


def offered(path: str, content: str) -> set[tuple[str, str]]:
    """Return what a file of the tree offers, as part and name in coverage.toml.

    A source that does not parse offers nothing.
    """
    try:
        classes = [node for node in ast.parse(content).body if isinstance(node, ast.ClassDef)]
    except (SyntaxError, ValueError, RecursionError):
        return set()
    found: set[tuple[str, str]] = set()
    for node in classes:
        for line in node.body:
            if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
                continue
            name, default = line.target.id, ast.unparse(line.value) if line.value else ""
            if name.startswith("_"):
                continue
            if FIELDS.get(node.name) == path:
                found.add((node.name, name))
            is_switch = re.search(r"\bbool\b", ast.unparse(line.annotation))
            if _SWITCHES.fullmatch(path) and is_switch and _SWITCH.fullmatch(default):
                found.add(("features", f"{node.name}.{name}"))
    return found


def unlisted(tree: Path) -> list[str]:
    """Return what the tree offers and coverage.toml does not list."""
    paths = {
        *FIELDS.values(),
        *(f"vllm/config/{file.name}" for file in tree.glob("vllm/config/*.py")),
    }
    found: set[tuple[str, str]] = set()
    for path in paths:
        with contextlib.suppress(OSError):
            found |= offered(path, (tree / path).read_text(encoding="utf-8", errors="replace"))
    return [f"{part}.{name}" for part, name in sorted(found) if name not in table().get(part, {})]
