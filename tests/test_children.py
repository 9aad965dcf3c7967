"""The variables that children really receive, compared with each other: `inv run`, `inv shell`,
`inv env.export`, `inv serve --dry-run`, the probes of the smoke, the process of a benchmark.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.parsed import parse
from tests.small.materials import ROOT
from tests.small.world import World
from workspace.core import child_variables
from workspace.core.child_variables import EXPORTED, PHASES, VARIABLES, with_given
from workspace.core.known_settings import KNOWN
from workspace.core.paths import Layout
from workspace.core.settings import load
from workspace.server import lifecycle

SECRET = "hf_swordfish42"
# A shell sets these itself; the last is the mark of what a command or a shell was given.
OF_A_SHELL = {"_", "PWD", "OLDPWD", "SHLVL", "LC_CTYPE", "PYTHON_BASIC_REPL", EXPORTED}
PROGRAM = """#!{python} -Es
import json, os, sys
json.dump(dict(os.environ), open({seen!r}, "w"))
for flag in sys.argv[1:]:
    if flag.startswith("--output-json="):
        json.dump({{"latencies": [0.5, 0.6]}}, open(flag.partition("=")[2], "w"))
"""
PROBE = """import json, os, sys
own = {seen!r} + str(os.getpid())
with open(own, "w") as file:
    json.dump(dict(os.environ), file)
os.replace(own, {seen!r})
sys.exit("seen")
"""
SHELL = {
    "HF_TOKEN": SECRET,
    "OMP_NUM_THREADS": "3",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONPATH": "/nowhere",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "LD_LIBRARY_PATH": "/own/lib",
}


def program(path: Path, text: str) -> Path:
    path.unlink(missing_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def evaluated(lines: str, outer: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a child of a shell that evaluated the lines."""
    done = subprocess.run(
        ["/bin/sh", "-euc", f"{lines}\nexec /usr/bin/env -0"],
        env=dict(outer),
        capture_output=True,
        text=True,
        check=True,
    )
    return pairs(done.stdout)


def pairs(text: str) -> dict[str, str]:
    entries = (entry.partition("=") for entry in text.split("\0") if entry)
    return {name: value for name, _, value in entries if name not in OF_A_SHELL}


def differing(first: Mapping[str, str], second: Mapping[str, str]) -> set[str]:
    names = {*first, *second} - OF_A_SHELL
    return {name for name in names if first.get(name) != second.get(name)}


def rows_of(phase: child_variables.Phase) -> set[str]:
    """Return the names in the rows of a phase."""
    return {name for row in VARIABLES if phase in row.phases for name in row.names.split()}


@pytest.fixture
def world(built: World) -> World:
    built.env |= SHELL
    built.layout.dotenv.write_text("VLLM_LOGGING_LEVEL=DEBUG\nMAX_JOBS=2\nCMAKE_ARGS=-DX=1\n")
    return built


def received(world: World) -> dict[str, str]:
    """Return the environment of the command of `inv run`."""
    ran = world.run("run", "--", "/usr/bin/env", "-0")
    assert ran.code == 0, ran.output
    return pairs(ran.out)


def test_run_and_shell_start_the_same_and_export_prints_it_without_secrets(world: World) -> None:
    run = received(world)
    assert run["HF_TOKEN"] == SECRET
    assert run["MAX_JOBS"] == "2"
    assert not {"CMAKE_ARGS", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE"} & run.keys()
    own_shell = program(world.folder / "own-shell", "#!/bin/sh\nexec /usr/bin/env -0\n")
    shell = world.run("shell", env={"SHELL": str(own_shell)})
    inside = pairs(shell.out)
    assert differing(inside, run) == {"SHELL", "PATH"}, shell.output
    assert inside["PATH"] == f"{world.root / 'scripts'}:{run['PATH']}"
    exported = world.run("env.export")
    assert exported.code == 0, exported.output
    assert SECRET not in exported.output
    seen = evaluated(exported.out, {"PATH": world.env["PATH"]})
    # An export adds scripts/ to PATH instead of the built interpreter's folder, and gives no secret
    # and no VIRTUAL_ENV. Variables that the outer shell has and a run gets unchanged have no line.
    unchanged = {name for name, text in run.items() if world.env.get(name) == text}
    assert differing(seen, run) - unchanged == {"PATH", "VIRTUAL_ENV"}
    assert run["PATH"].split(":")[0] == str(world.layout.environment / "bin")
    assert seen["PATH"].split(":")[0] == str(world.root / "scripts")


def test_dry_run_of_serve_prints_what_a_run_gets_and_the_rows_of_serve(world: World) -> None:
    source = world.layout.vllm / "vllm" / "engine" / "arg_utils.py"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(
        "".join(f'group.add_argument("--{name}")\n' for name in ("host", "port", "model"))
    )
    model = world.folder / "model"
    model.mkdir(exist_ok=True)
    for name, text in (("config", "{}"), ("tokenizer", "{}")):
        (model / f"{name}.json").write_text(text)
    (model / "model.safetensors").write_text("{}")
    shown = world.run("serve", "--dry-run", str(model), "--", "--port", str(lifecycle.free_port()))
    assert shown.code == 0, shown.output
    assert SECRET not in shown.output
    assert "# HF_TOKEN is set, and not shown" in shown.out
    lines = "\n".join(shown.out.splitlines()[:-1])
    seen = evaluated(lines, world.env)
    # The lines unset no setting of the workspace that the outer shell has: vLLM reads none.
    found = differing(seen, received(world)) - KNOWN.keys() | {"HF_HUB_OFFLINE"}
    assert found == {"VLLM_NO_USAGE_STATS", "HF_HUB_OFFLINE", "PYTHONFAULTHANDLER"}
    assert (seen["VLLM_NO_USAGE_STATS"], seen["HF_HUB_OFFLINE"]) == ("1", "1")


def test_probe_of_the_smoke_gets_what_a_run_gets_and_the_rows_of_the_smoke(world: World) -> None:
    run, seen = received(world), world.folder / "seen.json"
    seen.unlink(missing_ok=True)
    for probe in (world.root / "workspace" / "probes").glob("*.py"):
        # A model is made beside the first probe, by a child of another phase.
        if probe.name not in ("__init__.py", "small_model.py"):
            probe.write_text(PROBE.format(seen=str(seen)))
    ended = world.session("smoke", "--fail-fast")
    assert ended.code == 8, ended.output
    found = json.loads(seen.read_text())
    assert differing(found, run) == {
        "HF_HUB_OFFLINE",
        "OMP_WAIT_POLICY",
        "PYTHONFAULTHANDLER",
        "TORCHDYNAMO_DISABLE",
        "VLLM_CPU_KVCACHE_SPACE",
        "VLLM_ENABLE_V1_MULTIPROCESSING",
        "VLLM_NO_USAGE_STATS",
        "WORKSPACE_SMOKE_LIMIT_S",
    }
    assert differing(found, run) <= rows_of("smoke")
    assert found["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_benchmark_gets_what_a_run_gets_and_the_rows_of_a_benchmark(world: World) -> None:
    run, seen = received(world), world.folder / "seen.json"
    text = PROGRAM.format(python=sys.executable, seen=str(seen))
    program(world.layout.environment / "bin" / "vllm", text)
    (world.folder / "model").mkdir(exist_ok=True)
    ended = world.session("bench", "--repeat", "1", "--model", str(world.folder / "model"))
    assert ended.code == 0, ended.output
    found = json.loads(seen.read_text())
    assert differing(found, run) == {
        "VLLM_CONFIGURE_LOGGING",
        "VLLM_LOGGING_LEVEL",
        "VLLM_NO_USAGE_STATS",
    }
    assert differing(found, run) <= rows_of("bench")


@pytest.mark.parametrize("phase", PHASES)
def test_starting_room_can_pass_only_what_the_table_has(phase: child_variables.Phase) -> None:
    if phase == "inv":
        assert with_given({}, phase, {"ANY_SETTING": "1"}) == {"ANY_SETTING": "1"}
        return
    with pytest.raises(ValueError, match="NOT_IN_THE_TABLE is in no row"):
        with_given({}, phase, {"NOT_IN_THE_TABLE": "1"})
    with pytest.raises(ValueError, match="VLLM_USE_V1 is in no row"):
        # A row that removes a name does not let a room set it.
        with_given({}, phase, {"VLLM_USE_V1": "1"})


def test_removed_names_go_and_unset_values_of_the_table_are_not_empty(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    shell = {"VLLM_USE_V1": "1", "CCACHE_NODEPEND": "1", "PATH": "/usr/bin"}
    settings = load(layout, environ=shell)
    found = settings.child_environment("shell", {"VLLM_USE_V1": None}, layout=layout)
    assert "VLLM_USE_V1" not in found
    assert "LD_LIBRARY_PATH" not in found
    assert "CCACHE_NODEPEND" not in settings.child_environment("compile", layout=layout)
    with pytest.raises(ValueError, match="needs the layout"):
        settings.child_environment("shell")


def test_every_row_has_a_kind_a_reason_and_a_name() -> None:
    for row in VARIABLES:
        assert all((row.names, row.phases, row.why)), row
        assert set(row.phases) <= PHASES.keys(), row
        if not isinstance(row.value, child_variables.Special):
            # The table itself sets one variable a row.
            assert row.names.isidentifier(), row


def composed_in_place(source: str) -> list[int]:
    """Return the lines of calls that compose the environment of a child themselves."""
    return [
        node.value.lineno
        for node in ast.walk(parse(source))
        if isinstance(node, ast.keyword) and node.arg == "env"
        if isinstance(node.value, ast.Dict | ast.DictComp | ast.BinOp)
    ]


def test_no_call_composes_an_environment_itself() -> None:
    library = ROOT / "workspace"
    found = {
        str(path.relative_to(library))
        for path in library.rglob("*.py")
        # Git of a checkout has its own variables there.
        if path.parent != library / "repo" / "git"
        if composed_in_place(path.read_text(encoding="utf-8"))
    }
    # `ninja -n` gets PATH only.
    assert found == {"compile/targets.py"}
    assert composed_in_place("run(argv, env=variables | {'A': '1'})") == [1]
    assert composed_in_place("run(argv, env={**variables, 'A': '1'})") == [1]
