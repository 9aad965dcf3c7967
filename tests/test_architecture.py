"""The picture of the house, enforced: who may import whom, and the single doors.

Each rule is a function from a module's source to complaints, and is also shown a source that breaks
it.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parsed import parse

ROOT = Path(__file__).resolve().parents[1]
# The rooms from the top down. A room may import what stands below it and nothing above; probes
# import nothing of ours.
ROOMS = (
    "cli",
    "support",
    "bump",
    "bench",
    "checks",
    "server",
    "install",
    "compile",
    "repo",
    "machine",
    "core",
)
# Of the rooms below, those that a room has no business with.
NOT_EVEN = {"repo": {"machine"}, "bench": {"compile"}}
MAY_IMPORT = {
    room: set(ROOMS[place + 1 :]) - NOT_EVEN.get(room, set()) for place, room in enumerate(ROOMS)
} | {"probes": set()}
# A package that only one module, one package, or nobody, may import.
SINGLE_ENTRANCES = {
    "subprocess": "workspace/core/process.py",
    "multiprocessing": None,
    "pty": None,
    "dotenv": "workspace/core/settings.py",
    "git": "workspace/repo/git/command.py",
    "invoke": "workspace/cli/",
    "nox": "noxfile.py",
    "tomllib": "workspace/core/records.py",
    "msgspec": "workspace/core/records.py",
    "tomlkit": "workspace/repo/pins.py",
    "pynvml": "workspace/machine/gpu.py",
    "yaml": "workspace/server/public_recipes.py",
}
# Programs that one module alone may start.
SINGLE_PROGRAMS = {"nvidia-smi": "workspace/machine/gpu.py"}
STARTS_A_PROGRAM = re.compile(r"os\.(system|popen|fork|forkpty|exec\w+|spawn\w+|posix_spawn\w*)$")
# The seam, the program it puts between itself and what it starts, the one that a build puts before
# each compiler, the one above a server, and the one above the ranks of several nodes.
STARTS_PROGRAMS = {
    "workspace/core/process.py",
    "workspace/core/guard.py",
    "workspace/compile/launcher.py",
    "workspace/server/node_link.py",
    "workspace/server/process_tree.py",
}
# Everything else decodes with core/records, which has one exception for all damage.
DECODES = re.compile(r"json\.(loads?|JSONDecoder)$")
# The kernel's files; other modules take what they need from psutil or from machine/hardware. The
# excepted are standard library only, or write a path that is too long for a socket (unix(7)).
READS_PROC = {
    "workspace/machine/hardware.py",
    "workspace/core/guard.py",
    "workspace/compile/launcher.py",
    "workspace/compile/scheduler.py",
    "workspace/server/process_tree.py",
}
READS_THE_ENVIRONMENT = re.compile(r"os\.(environ|environb|getenv|getenvb|putenv|unsetenv)$")
HEAVY = {"requests", "git", "psutil", "rich", "pypi_simple", "msgspec", "torch", "vllm"}
# What the built environment is sure to have: vLLM's own requirements, and what those require; gguf
# comes with the model that needs it.
PROBES_MAY_IMPORT = {
    "torch",
    "triton",
    "vllm",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "huggingface_hub",
    "httpx",
    "gguf",
}
LONGEST_MODULE = 500
MOST_MODULES = 160
LONGEST_FUNCTION = 40
MOST_PARAMETERS = 6
# More parameters: the flags of a verb; and calls that need, beside the layout, settings, log and
# step of the running verb, several facts that no other call takes together.
MORE_PARAMETERS = {
    "workspace/bench/compare.py:show",
    "workspace/cli/verbs.py:bootstrap",
    "workspace/cli/verbs.py:bundle",
    "workspace/cli/verbs.py:rebuild",
    "workspace/cli/verbs_patch.py:patch_import",
    "workspace/cli/verbs_serve.py:serve",
    "workspace/cli/verbs_serve.py:serve_rank",
    "workspace/compile/job_server.py:__init__",
    "workspace/core/process.py:run",
    "workspace/install/sandbox.py:make",
    "workspace/machine/interpreter.py:install",
    "workspace/repo/git/remotes.py:clone_shallow",
    "workspace/repo/patching.py:make_branch",
    "workspace/repo/series.py:sentence",
    "workspace/repo/upstream.py:find",
}
# A verb makes one Machine and hands it down: how many each module makes. The second of a verb has a
# reason in the code: other settings, another clone, or a moment after a change.
MAKES_A_MACHINE = {
    "workspace/bench/ab.py": 1,
    "workspace/bench/bisect_predicate.py": 1,
    "workspace/bench/measure.py": 1,
    "workspace/bump/forecast.py": 1,
    "workspace/checks/smoke.py": 2,
    "workspace/checks/upstream.py": 1,
    "workspace/cli/main.py": 1,
    "workspace/install/plan.py": 1,
    "workspace/install/rebuild.py": 1,
    "workspace/install/triton_fix.py": 1,
    "workspace/install/triton_fixes.py": 1,
    "workspace/server/multi_node.py": 1,
    "workspace/server/start.py": 2,
    "workspace/support/bug_report.py": 1,
    "workspace/support/perf.py": 1,
    "workspace/support/spark.py": 2,
}
# The questions that a Machine asks once, with the modules that ask again, for such a reason.
QUESTIONS: dict[str, set[str]] = {
    "Driver": {"workspace/bench/measure.py"},
    "hardware.observe": set(),
    "interpreter.describe": set(),
    "torch.observe": {"workspace/machine/venv.py"},
    "torch.observe_triton": set(),
    "toolchain.ask_compiler": set(),
    "toolchain.ask_toolkit": set(),
}
SCRIPTS = [ROOT / "tasks.py", ROOT / "noxfile.py", *sorted((ROOT / "scripts").glob("*.py"))]
# Of the library's lines.
LARGEST_ROOM = 0.2


def library() -> list[Path]:
    return sorted((ROOT / "workspace").rglob("*.py"))


def imports(tree: ast.AST, path: str) -> Iterator[str]:
    """Every module that is imported anywhere in the tree, by its full name."""
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def attributes(tree: ast.AST) -> Iterator[str]:
    """Every `os.name` and `json.name`, also where it came by `from os import name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and node.module in ("os", "json"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def wrong_arrows(source: str, path: str) -> list[str]:
    own = Path(path).with_suffix("").parts[1]
    complaints = []
    for name in imports(parse(source), path):
        parts = name.split(".")
        if parts[0] in ("tasks", "noxfile", "tests"):
            complaints.append(f"{path} imports {name}")
        if parts[0] != "workspace" or len(parts) == 1:
            continue
        if parts[1] != own and own in MAY_IMPORT and parts[1] not in MAY_IMPORT[own]:
            complaints.append(f"{path} imports {name}")
    return complaints


def wrong_entrances(source: str, path: str) -> list[str]:
    tree = parse(source)
    if path.startswith("workspace/probes/"):
        # A program of its own in another environment: it can use none of our doors.
        return []
    complaints = [
        f"{path} imports {name}"
        for name in imports(tree, path)
        if not _is_entrance(name.split(".")[0], path)
    ]
    for name in attributes(tree):
        starts = STARTS_A_PROGRAM.match(name) and path not in STARTS_PROGRAMS
        decodes = DECODES.match(name) and path != "workspace/core/records.py"
        reads = READS_THE_ENVIRONMENT.match(name) and path != "workspace/core/settings.py"
        if starts or decodes or reads:
            complaints.append(f"{path} uses {name}")
    complaints += [
        f"{path} starts {name}"
        for name in programs(tree)
        if SINGLE_PROGRAMS.get(name, path) != path
    ]
    if path not in READS_PROC:
        complaints += [f"{path} reads {text}" for text in texts(tree) if text.startswith("/proc")]
    return complaints


def texts(tree: ast.AST) -> Iterator[str]:
    """Every text in the code, also a part of an f-string, without docstrings."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in docstrings:
            yield str(node.value)


def programs(tree: ast.AST) -> Iterator[str]:
    """Every text that stands first in a list or tuple, as in a command line, or that is searched on
    PATH.
    """
    for node in ast.walk(tree):
        values: list[ast.expr] = []
        if isinstance(node, ast.List | ast.Tuple):
            values = [value for value in node.elts if not isinstance(value, ast.Starred)][:1]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("which"):
            values = node.args[:1]
        for value in values:
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value.value


def _is_entrance(package: str, path: str) -> bool:
    entrance = SINGLE_ENTRANCES.get(package, path)
    return entrance is not None and (
        path == entrance or (entrance.endswith("/") and path.startswith(entrance))
    )


def wrong_probe(source: str, path: str) -> list[str]:
    names = {name.split(".")[0] for name in imports(parse(source), path)}
    return [
        f"{path} imports {name}"
        for name in sorted(names - PROBES_MAY_IMPORT - set(sys.stdlib_module_names))
    ]


def heavy_at_the_top(source: str, path: str) -> list[str]:
    tree = parse(source)
    at_import = [
        node
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Try | ast.With)
    ]
    return [
        f"{path} imports {name} when it is loaded"
        for node in at_import
        for name in imports(node, path)
        if name.split(".")[0] in HEAVY
    ]


def untidy(source: str, path: str) -> list[str]:
    complaints = (
        [f"{path} has {source.count(chr(10))} lines"] if source.count("\n") > LONGEST_MODULE else []
    )
    complaints += [
        f"{path}: {match.group()}" for match in re.finditer(r"\b(TODO|FIXME|XXX)\b.*", source)
    ]
    return complaints + ([] if ast.get_docstring(parse(source)) else [f"{path} has no docstring"])


def second_looks(source: str, path: str) -> list[str]:
    """Machines beyond those of MAKES_A_MACHINE, and questions beside the Machine's."""
    calls = [
        ast.unparse(node.func) for node in ast.walk(parse(source)) if isinstance(node, ast.Call)
    ]
    made = calls.count("Machine")
    complaints = [f"{path} makes {made} machines"] if made != MAKES_A_MACHINE.get(path, 0) else []
    if path == "workspace/machine/machine.py":
        return complaints
    return complaints + [
        f"{path} asks {call}" for call in calls if path not in QUESTIONS.get(call, {path})
    ]


def circles(sources: dict[str, str]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others; an import inside a
    function counts.
    """
    names = {
        path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path
        for path in sources
    }
    graph = {}
    for name, path in names.items():
        found = set(imports(parse(sources[path]), path))
        # `from workspace.core.files import sha256` means the module; `from workspace.core import
        # files` the one that is named.
        graph[name] = {
            one if one in names else one.rpartition(".")[0] for one in found
        } & names.keys() - {name}
    reached = {name: _reachable(graph, name) for name in graph}
    groups = {
        tuple(sorted(other for other in reached[name] if name in reached[other]))
        for name in graph
        if name in reached[name]
    }
    return sorted(map(list, groups))


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for name in graph[waiting.pop()] - found:
            found.add(name)
            waiting.append(name)
    return found


def oversized(source: str, path: str) -> list[str]:
    """Functions with too many lines, their docstring not counted, or with too many parameters."""
    complaints = []
    for node in ast.walk(parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if ast.get_docstring(node) is not None:
            lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
        names = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
        count = len([name for name in names if name not in ("self", "cls")])
        if lines > LONGEST_FUNCTION:
            complaints.append(f"{path}: {node.name} has {lines} lines")
        if count > MOST_PARAMETERS and f"{path}:{node.name}" not in MORE_PARAMETERS:
            complaints.append(f"{path}: {node.name} has {count} parameters")
    return complaints


def complaints_of(rule, paths: list[Path]) -> list[str]:
    return [
        complaint
        for path in paths
        for complaint in rule(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    ]


def test_every_package_is_in_the_picture() -> None:
    there = {
        path.relative_to(ROOT / "workspace").parts[0].removesuffix(".py") for path in library()
    }
    assert there - {"__init__"} <= set(MAY_IMPORT)


def test_arrows_point_down_only() -> None:
    assert complaints_of(wrong_arrows, library()) == []


def test_no_module_imports_itself_through_others() -> None:
    assert (
        circles(
            {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in library()}
        )
        == []
    )


def test_circles_are_seen_also_where_they_are_lazy() -> None:
    sources = {
        "workspace/a.py": "from workspace import b",
        "workspace/b.py": "def f():\n    from workspace.a import x",
        "workspace/c.py": "import workspace.a",
    }
    assert circles(sources) == [["workspace.a", "workspace.b"]]


def test_library_is_one_that_a_stranger_can_survey() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in library()}
    assert len(lines) <= MOST_MODULES
    rooms: dict[str, int] = {}
    for path, count in lines.items():
        room = path.relative_to(ROOT / "workspace").parts[0]
        rooms[room] = rooms.get(room, 0) + count
    assert {
        room: count for room, count in rooms.items() if count > LARGEST_ROOM * sum(lines.values())
    } == {}


def test_single_entrances_are_the_only_entrances() -> None:
    assert complaints_of(wrong_entrances, library()) == []


def test_machine_is_asked_through_one_snapshot_a_verb() -> None:
    assert complaints_of(second_looks, library()) == []


def test_probes_know_nothing_of_ours_and_nobody_imports_them() -> None:
    probes = [path for path in library() if path.is_relative_to(ROOT / "workspace" / "probes")]
    assert complaints_of(wrong_probe, probes) == []


def test_nothing_heavy_is_imported_before_a_verb_needs_it() -> None:
    paths = [path for path in library() if "probes" not in path.parts]
    assert complaints_of(heavy_at_the_top, [*paths, ROOT / "tasks.py"]) == []


def test_modules_are_short_documented_and_finished() -> None:
    assert (
        complaints_of(
            untidy,
            [*library(), ROOT / "tasks.py", ROOT / "noxfile.py", ROOT / "scripts" / "tools.py"],
        )
        == []
    )


def test_functions_are_short_and_have_few_parameters() -> None:
    assert complaints_of(oversized, [*library(), *SCRIPTS]) == []


def test_noxfile_imports_nothing_of_ours() -> None:
    names = {
        name.split(".")[0]
        for name in imports(
            ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8")), "noxfile.py"
        )
    }
    assert not names & {"workspace", "tasks", "tests"}


@pytest.mark.parametrize("name", ["tasks.py", "noxfile.py", "scripts/tools.py"])
def test_entrances_parse_in_an_old_python_so_that_they_can_hand_over(name: str) -> None:
    ast.parse((ROOT / name).read_text(encoding="utf-8"), feature_version=(3, 7))


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (wrong_arrows, "workspace/repo/a.py", "from workspace.machine import hardware"),
        (wrong_arrows, "workspace/machine/a.py", "def f():\n    import workspace.repo.git"),
        (wrong_arrows, "workspace/compile/a.py", "from workspace import install"),
        (wrong_arrows, "workspace/core/a.py", "from ..install import plan"),
        (wrong_arrows, "workspace/core/a.py", "from workspace.cli import main"),
        (wrong_arrows, "workspace/checks/report.py", "from workspace.probes import parity"),
        (wrong_arrows, "workspace/install/a.py", "import tasks"),
        (wrong_entrances, "workspace/install/a.py", "import subprocess"),
        (wrong_entrances, "workspace/install/a.py", "from subprocess import run"),
        (wrong_entrances, "workspace/install/a.py", "import os\nos.system('true')"),
        (wrong_entrances, "workspace/install/a.py", "from os import environ"),
        (wrong_entrances, "workspace/install/a.py", "import os\nprint(os.getenv('HOME'))"),
        (wrong_entrances, "workspace/repo/patches.py", "from git import Repo"),
        (wrong_entrances, "workspace/core/a.py", "import invoke"),
        (wrong_entrances, "workspace/install/a.py", "import json\njson.loads('{}')"),
        (wrong_entrances, "workspace/install/a.py", "from json import load"),
        (wrong_entrances, "workspace/core/files.py", "def f():\n    import tomllib"),
        (wrong_entrances, "workspace/core/files.py", "import msgspec"),
        (wrong_entrances, "workspace/server/a.py", "def f():\n    import pynvml"),
        (wrong_entrances, "workspace/server/a.py", "open(f'/proc/{pid}/stat')"),
        (wrong_entrances, "workspace/server/a.py", "Path('/proc/meminfo').read_text()"),
        (wrong_entrances, "workspace/server/a.py", "run(['timeout', '3'], ['nvidia-smi', '-q'])"),
        (wrong_entrances, "workspace/server/a.py", "run([*bound, 'nvidia-smi'])"),
        (wrong_entrances, "workspace/server/a.py", "shutil.which('nvidia-smi', path='')"),
        (second_looks, "workspace/install/a.py", "Machine(layout, settings)"),
        (second_looks, "workspace/server/start.py", "Machine(layout, settings)"),
        (second_looks, "workspace/install/a.py", "interpreter.describe(layout, settings)"),
        (second_looks, "workspace/bench/a.py", "Driver(settings).sensors()"),
        (wrong_probe, "workspace/probes/a.py", "from workspace.core import files"),
        (wrong_probe, "workspace/probes/a.py", "import requests"),
        (heavy_at_the_top, "workspace/install/a.py", "import rich.console"),
        (untidy, "workspace/install/a.py", '"""Doc."""\n# TODO later'),
        (untidy, "workspace/install/a.py", '"""Doc."""\n' + "x = 1\n" * LONGEST_MODULE),
        (untidy, "workspace/install/a.py", "x = 1"),
        (oversized, "workspace/install/a.py", "def f():\n" + "    x = 1\n" * 40),
        (oversized, "workspace/install/a.py", "def f(a, b, c, d, *, e, f, g): pass"),
    ],
)
def test_each_rule_sees_what_breaks_it(rule, path: str, source: str) -> None:
    assert len(rule(source, path)) == 1


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (wrong_arrows, "workspace/checks/a.py", "from workspace.server import start"),
        (wrong_arrows, "workspace/repo/a.py", "from .series import read"),
        (
            heavy_at_the_top,
            "workspace/install/a.py",
            "if TYPE_CHECKING:\n    import rich\ndef f():\n    import git",
        ),
        (wrong_entrances, "workspace/core/settings.py", "import os\nos.environ"),
        (wrong_entrances, "workspace/core/records.py", "import json, tomllib\njson.loads('')"),
        (wrong_entrances, "workspace/install/a.py", "import json\njson.dumps({})"),
        (wrong_entrances, "workspace/machine/gpu.py", "run(['nvidia-smi', '-q'])"),
        (wrong_entrances, "workspace/machine/a.py", "hint('nvidia-smi')"),
        (wrong_entrances, "workspace/machine/a.py", "def f():\n    '/proc/stat says it.'"),
        (wrong_entrances, "workspace/machine/hardware.py", "Path('/proc/meminfo')"),
        (second_looks, "workspace/install/plan.py", "Machine(layout, settings)"),
        (second_looks, "workspace/machine/machine.py", "interpreter.describe(layout, settings)"),
        (second_looks, "workspace/bench/measure.py", "Machine(a, b)\nDriver(settings).sensors()"),
        (oversized, "workspace/install/a.py", "def f(a, b, c, d, *, e, f): pass"),
        (oversized, "workspace/install/a.py", 'def f():\n    """Doc."""\n' + "    x = 1\n" * 39),
    ],
)
def test_no_rule_sees_what_is_allowed(rule, path: str, source: str) -> None:
    assert rule(source, path) == []
