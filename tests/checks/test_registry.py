"""Verdicts on files and imports: each sees what it must see, and passes what it must pass."""

from pathlib import Path

import pytest

from workspace.checks import registry
from workspace.checks.probe_runs import Answer
from workspace.checks.registry import REGISTRY, Check, Expected, chosen
from workspace.core.paths import here

TREE = Path("/clone/vendor/vllm")
LIBRARIES = {"vllm/_C.abi3.so": (9, "a" * 64), "vllm/spinloop.abi3.so": (7, "b" * 64)}
EXPECTED = Expected(TREE, "0.31.0+cpu", "2.13.0+cpu", "cpu", LIBRARIES)


def libraries(**changes: dict) -> dict:
    rows = {
        path: {"path": path, "verdict": "ok", "error": None, "size": size, "sha256": digest}
        for path, (size, digest) in LIBRARIES.items()
    }
    for name, change in changes.items():
        rows[f"vllm/{name}.abi3.so"] |= change
    return {"error": None, "libraries": list(rows.values())}


def output(**changes: object) -> dict:
    return {
        "error": None,
        "vllm": {
            "file": str(TREE / "vllm" / "__init__.py"),
            "version": "0.31.0+cpu",
            "platform": "cpu",
            "kernels": ["vllm/_C.abi3.so"],
        },
        "torch": {"version": "2.13.0+cpu", "cuda": None},
        **changes,
    }


def files(record: dict) -> Check:
    return registry.libraries(Answer(record, None, 1.0), EXPECTED)


def binary(record: dict) -> Check:
    return registry.binary_load(Answer(record, None, 1.0))


def origin(record: dict) -> Check:
    return registry.provenance(Answer(record, None, 1.0), EXPECTED)


def test_right_build_passes() -> None:
    found = [files(libraries()), binary(libraries()), origin(output())]
    assert [check.verdict for check in found] == ["pass"] * 3
    assert all(check.meaning and check.evidence for check in found)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        # It loads and computes the same: a library of another version, or one that was cut by a
        # third.
        (libraries(_C={"sha256": "c" * 64}), "vllm/_C.abi3.so is not the file that was verified"),
        (libraries(_C={"size": 8}), "vllm/_C.abi3.so is not the file that was verified"),
        (
            {"error": None, "libraries": libraries()["libraries"][:1]},
            "vllm/spinloop.abi3.so is missing",
        ),
        (
            {
                "error": None,
                "libraries": [*libraries()["libraries"], {"path": "vllm/new.so", "verdict": "ok"}],
            },
            "vllm/new.so did not exist when the build was verified",
        ),
        ({"error": None, "libraries": "many"}, "vllm/_C.abi3.so is missing (and 2 more)"),
        ({}, "vllm/_C.abi3.so is missing (and 2 more)"),
    ],
)
def test_library_that_is_not_as_stamped_fails_although_it_loads(record: dict, message: str) -> None:
    assert (files(record).verdict, files(record).evidence) == ("fail", message)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            libraries(_C={"verdict": "broken", "error": "killed by SIGBUS"}),
            "vllm/_C.abi3.so: killed by SIGBUS",
        ),
        (
            libraries(_C={"verdict": "no driver", "error": "libcuda.so.1: no"}),
            "vllm/_C.abi3.so: libcuda.so.1: no",
        ),
        (
            {"error": "torch cannot be imported: no", "libraries": libraries()["libraries"]},
            "torch cannot be imported: no",
        ),
        ({"error": None, "libraries": []}, "the tree holds no compiled library"),
    ],
)
def test_library_that_does_not_load_fails(record: dict, message: str) -> None:
    assert (binary(record).verdict, binary(record).evidence) == ("fail", message)


def test_build_without_any_library_fails_even_when_none_was_stamped() -> None:
    none = Expected(TREE, "0.31.0+cpu", "2.13.0+cpu", "cpu", {})
    assert (
        registry.libraries(Answer({"error": None, "libraries": []}, None, 1.0), none).verdict
        == "fail"
    )


def test_library_for_another_processor_passes_and_is_reported() -> None:
    check = binary(libraries(_C={"verdict": "other cpu"}))
    assert (check.verdict, check.evidence) == (
        "pass",
        "1 library, 1 for other processors or Pythons not tried",
    )


def vllm(**changes: object) -> dict:
    return output(vllm=output()["vllm"] | changes)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            vllm(file="/clone/.vllm/lib/python3.11/site-packages/vllm/__init__.py"),
            "not from /clone/vendor/vllm",
        ),
        (vllm(file="/clone/vendor/vllm-old/vllm/__init__.py"), "not from /clone/vendor/vllm"),
        (
            vllm(version="0.31.1.dev1+g12345"),
            "vllm is 0.31.1.dev1+g12345, but the stamp has 0.31.0+cpu",
        ),
        (vllm(platform=""), "its platform is none, but the stamp has cpu"),
        (
            output(torch={"version": "2.14.0+cpu", "cuda": None}),
            "torch is 2.14.0+cpu, but the stamp has 2.13.0+cpu",
        ),
        (
            output(torch={"version": "2.13.0+cpu", "cuda": "13.0"}),
            "torch's CUDA is 13.0, but the stamp has none",
        ),
        (output(triton="3.7.1"), "triton is 3.7.1, but the stamp has none"),
        (vllm(kernels=[]), "without a compiled library"),
        (vllm(file=None), "unknown which vLLM was imported"),
        (
            output(vllm=None, error="vLLM: ImportError: no"),
            "unknown which vLLM was imported: vLLM: ImportError: no",
        ),
        ({}, "unknown which vLLM was imported"),
    ],
)
def test_other_vllm_than_the_stamped_one_fails(record: dict, message: str) -> None:
    check = origin(record)
    assert check.verdict == "fail"
    assert message in check.evidence


def test_provenance_is_judged_although_the_generation_crashed() -> None:
    assert (
        origin(vllm(kernels=None) | {"error": "vLLM: killed by SIGSEGV (stage generate)"}).verdict
        == "pass"
    )


def test_edit_in_the_middle_of_the_smoke_makes_it_worth_nothing() -> None:
    assert registry.tree("one", "one", 0.1).verdict == "pass"
    assert registry.tree("one", "other", 0.1).verdict == "fail"


def test_probe_without_a_document_fails_with_its_last_message() -> None:
    silent = Answer({}, "the probe was killed by SIGKILL", 3.0)
    for check in (
        registry.libraries(silent, EXPECTED),
        registry.binary_load(silent),
        registry.provenance(silent, EXPECTED),
    ):
        assert check.verdict == "fail"
        assert "was killed by SIGKILL" in check.evidence


def test_skipping_what_the_machine_has_is_a_failure() -> None:
    skipped = Check("binary.cubins", "skipped", "no time", 0.0)
    assert (
        registry.without_unfounded_skip(skipped, lacks=frozenset({"gpu", "architectures"}))
        == skipped
    )
    found = registry.without_unfounded_skip(skipped, lacks=frozenset())
    assert (found.verdict, found.evidence) == (
        "fail",
        "skipped on a machine that has what it needs: no time",
    )
    needs_nothing = Check("kernels.norm", "skipped", "no time", 0.0)
    assert (
        registry.without_unfounded_skip(
            needs_nothing, lacks=frozenset({"gpu", "architectures"})
        ).verdict
        == "fail"
    )


def test_levels_nest_and_the_named_model_is_judged_where_one_is_named() -> None:
    quick, full = set(chosen("quick", has_model=False)), set(chosen("full", has_model=True))
    assert quick < full == set(REGISTRY)
    assert "parity.model" in chosen("quick", has_model=True)
    assert "parity.model" not in quick


def test_table_of_coverage_names_checks_that_exist_or_a_reason() -> None:
    table = registry.coverage()
    assert set(table) == {*registry.FIELDS, "features", "forms", "keys"}
    for part, names in table.items():
        for name, entry in names.items():
            if isinstance(entry, str):
                assert len(entry) > 10, f"{part}.{name}"
                assert entry[-1] != "."
            else:
                assert entry
                assert set(entry) <= set(registry.REGISTRY), f"{part}.{name}"


def test_each_check_of_a_parameter_a_layer_or_the_cache_covers_something() -> None:
    used = {
        name
        for names in registry.coverage().values()
        for entry in names.values()
        if isinstance(entry, tuple)
        for name in entry
    }
    parts = ("sampling.", "cache.", "layers.")
    own = {name for name in registry.REGISTRY if name.startswith(parts)}
    assert own | {"server.parameters"} <= used


def test_table_has_a_form_of_each_recipe_and_of_no_other() -> None:
    recipes = {path.stem for path in (here().root / "recipes").glob("*.toml")}
    assert {name.partition(": ")[0] for name in registry.coverage()["forms"]} == recipes


def test_field_that_the_table_does_not_list_is_named(tmp_path: Path) -> None:
    assert registry.unlisted(tmp_path) == []
    file = tmp_path / "vllm" / "sampling_params.py"
    file.parent.mkdir()
    file.write_text("class SamplingParams:\n    n: int = 1\n    new: int = 2\n")
    (tmp_path / "vllm" / "config").mkdir()
    (tmp_path / "vllm" / "config" / "x.py").write_text("class X:\n    on: bool = True\n")
    assert registry.unlisted(tmp_path) == ["SamplingParams.new", "features.X.on"]
