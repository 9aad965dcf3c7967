"""The Triton in `.vllm` and its origin, and a Triton installed on purpose, which outlives whatever
is installed afterwards.
"""

import json

import pytest

from workspace.machine import interpreter, requirements, torch, venv


def install(house, settings, *arguments: str, **more) -> None:
    with house.run_log(settings) as run_log:
        interpreter.install(house.layout, settings, arguments, run_log=run_log, **more)


@pytest.fixture
def paired(house, built):
    """A torch that pairs with triton 3.7.1, both from an index."""
    settings = built()
    house.wheel(
        "triton",
        "3.7.1",
        files={"triton/__init__.py": b"", "triton/backends/nvidia/bin/ptxas": b""},
    )
    house.torch("2.13.0", cuda="13.0", requires=("triton==3.7.1",))
    house.wheel("xgrammar", "0.2.7", requires=("torch>=1.10", "triton"))
    install(house, settings, "torch")
    return settings


def own(house, settings) -> None:
    """One from a file of the user's, as fix-triton --from-source does it."""
    made = house.wheel(
        "triton",
        "3.9.0+git3f6e4113",
        files={"triton/__init__.py": b""},
        folder=house.layout.root / "made",
    )
    install(house, settings, "--no-deps", "--reinstall-package", "triton", str(made))


def test_origin_and_pair_are_read_from_what_describes_the_packages(house, paired):
    found = house.machine().triton()
    assert (found.version, found.origin, found.is_meant, house.machine().paired_triton()) == (
        "3.7.1",
        "index",
        False,
        "==3.7.1",
    )
    assert found.bin == found.package / "backends" / "nvidia" / "bin"
    assert torch.kept_triton(house.layout) == ()
    own(house, paired)
    found = house.machine().triton()
    assert (found.version, found.origin, found.bin) == ("3.9.0+git3f6e4113", "file", None)
    assert found.place.endswith("triton-3.9.0+git3f6e4113-py3-none-any.whl")


def test_cpu_torch_or_a_missing_torch_pairs_with_no_triton(house, built):
    settings = built()
    assert house.machine().paired_triton() is None
    house.torch("2.13.0+cpu")
    install(house, settings, "torch")
    assert (house.machine().paired_triton(), house.machine().triton()) == (None, None)


def test_editable_triton_has_the_package_of_its_tree_and_none_without_files(house, paired):
    tree = house.layout.triton
    (tree / "python" / "triton").mkdir(parents=True)
    (tree / "python" / "triton" / "__init__.py").touch()
    described = (
        next(folder for folder in interpreter.site_packages(house.layout))
        / "triton-3.7.1.dist-info"
    )
    (described / "direct_url.json").write_text(
        json.dumps({"url": tree.as_uri(), "dir_info": {"editable": True}})
    )
    found = house.machine().triton()
    assert (found.origin, found.package) == ("editable", tree / "python" / "triton")
    (tree / "python" / "triton" / "__init__.py").unlink()
    assert house.machine().triton().package is None


def test_triton_built_here_outlives_torch_and_packages_that_require_the_paired_one(house, paired):
    own(house, paired)
    needs = requirements.Requirements(
        (), (), "torch", (), ("xgrammar",), ('triton ; python_version < "0"',), (), None, ""
    )
    overrides = venv._overrides(house.layout, needs)
    assert overrides == ("triton==3.9.0+git3f6e4113",)
    install(
        house, paired, "xgrammar", constraints=torch.constraints(house.layout), overrides=overrides
    )
    install(
        house,
        paired,
        "--reinstall-package",
        "torch",
        "torch",
        overrides=torch.kept_triton(house.layout),
    )
    assert interpreter.installed(house.layout)["triton"] == "3.9.0+git3f6e4113"


def test_without_the_override_the_paired_triton_replaces_it(house, paired):
    own(house, paired)
    install(house, paired, "xgrammar")
    assert interpreter.installed(house.layout)["triton"] == "3.7.1"
