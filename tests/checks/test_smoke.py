"""`nox -s smoke` in a small clone, whose stand-in vLLM loads libraries and computes nothing."""

import json
import re
from pathlib import Path

from tests.small.world import Ended, World
from workspace.checks.smoke import expect
from workspace.core import settings
from workspace.install import plan
from workspace.machine.machine import Machine


def smoke(world: World, *args: str | Path) -> Ended:
    return world.session("smoke", *map(str, args))


def test_missing_environment_is_an_error_that_names_the_command_and_leaves_nothing(
    world: World,
) -> None:
    before = world.listing()
    ended = smoke(world)
    assert "environment missing" in ended.error(8)
    assert "hint: ./scripts/inv bootstrap" in ended.err
    assert ended.out == ""
    assert world.listing() == before


def test_library_of_another_size_is_stale_and_is_not_even_tried(built: World) -> None:
    library = next(built.layout.vllm.glob("vllm/_C*.so"))
    library.write_bytes(library.read_bytes()[:-1])
    ended = smoke(built)
    assert f"kernels stale: vllm/{library.name} changed" in ended.error(8)
    assert not built.layout.smoke_record.exists()


def test_library_of_the_same_size_with_another_content_is_found_by_its_hash(built: World) -> None:
    library = next(built.layout.vllm.glob("vllm/spinloop*.so"))
    content = bytearray(library.read_bytes())
    content[-1] ^= 1
    library.write_bytes(content)
    assert "provenance.libraries" in smoke(built).error(8)
    rows = {row["id"]: row for row in json.loads(built.layout.smoke_record.read_bytes())["checks"]}
    assert (
        rows["provenance.libraries"]["evidence"]
        == f"vllm/{library.name} is not the file that was verified"
    )


def test_vllm_that_computes_nothing_fails_with_8_and_both_records_are_the_same(
    built: World, tmp_path: Path
) -> None:
    ended = smoke(built, "--json", tmp_path / "deep" / "record.json")
    assert "checks failed: kernels.norm" in ended.error(8)
    # One row for each, so that a refused push shows its reasons, and shows them once.
    assert ended.err.count("parity.llama ") == 1
    # Nobody asked for it on stdout.
    assert ended.out == ""
    record = json.loads(built.layout.smoke_record.read_bytes())
    assert record == json.loads((tmp_path / "deep" / "record.json").read_bytes())
    assert record["verdict"] == "fail"
    assert record["tree"] == built.git("rev-parse", "HEAD^{tree}").strip()
    assert record["dirty"] is None
    output = {row["id"]: row["verdict"] for row in record["checks"]}
    assert {
        output[name] for name in ("provenance.libraries", "binary.load", "provenance.tree")
    } == {"pass"}
    assert {
        output[name]
        for name in ("kernels.norm", "parity.llama", "consistency.prefix", "provenance.import")
    } == {"fail"}
    assert len(record["built"]) == 64
    assert built.status()["smoke"] == "FAIL"
    edited = built.layout.vllm / "vllm" / "__init__.py"
    edited.write_text(edited.read_text() + "# fixed\n")
    # As a verdict that passed: it is one on another tree.
    assert built.status()["smoke"] == "stale"
    row = r"smoke +failed \d{4}-\d\d-\d\d \d\d:\d\d UTC, on another tree\n"
    assert re.search(row, built.run("status").out)


def test_triton_beside_cpu_kernels_is_expected_as_any_torch_may_bring_it(built: World) -> None:
    def expected() -> str | None:
        machine = Machine(built.layout, settings.load(built.layout, environ=built.env))
        return expect(plan.observe_on(machine)).triton

    built.uv("install", "triton==3.7.1")
    assert expected() == "3.7.1"
    built.uv("uninstall", "triton")
    assert expected() is None


def test_edited_python_is_judged_and_named_by_a_digest(built: World) -> None:
    edited = built.layout.vllm / "vllm" / "__init__.py"
    edited.write_text(edited.read_text() + "# mine\n")
    record = json.loads(smoke(built, "--json", "-").out)
    assert len(record["dirty"]) == 64


def test_bad_flag_is_a_usage_error(world: World) -> None:
    for args in (
        ("--timeout-s", "0"),
        ("--timeout-s", "soon"),
        ("--jsn", "x"),
        ("--level", "none"),
    ):
        ended = smoke(world, *args)
        assert ended.error(2)
        assert "hint: ./scripts/nox -s smoke -- --help" in ended.err
