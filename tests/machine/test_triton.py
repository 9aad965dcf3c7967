"""Which Triton is there and from where, and one that was put there on purpose through everything
that is installed afterwards.
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
    found = torch.observe_triton(house.layout)
    assert (found.version, found.origin, found.is_meant, torch.paired_triton(house.layout)) == (
        "3.7.1",
        "index",
        False,
        "==3.7.1",
    )
    assert found.bin == found.package / "backends" / "nvidia" / "bin"
    assert torch.kept_triton(house.layout) == ()
    own(house, paired)
    found = torch.observe_triton(house.layout)
    assert (found.version, found.origin, found.bin) == ("3.9.0+git3f6e4113", "file", None)
    assert found.place.endswith("triton-3.9.0+git3f6e4113-py3-none-any.whl")


def test_cpu_torch_pairs_with_none_and_no_torch_does_too(house, built):
    settings = built()
    assert torch.paired_triton(house.layout) is None
    house.torch("2.13.0+cpu")
    install(house, settings, "torch")
    assert (torch.paired_triton(house.layout), torch.observe_triton(house.layout)) == (None, None)


def test_editable_one_is_told_by_its_tree_and_another_without_files_has_no_package(house, paired):
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
    found = torch.observe_triton(house.layout)
    assert (found.origin, found.package) == ("editable", tree / "python" / "triton")
    (tree / "python" / "triton" / "__init__.py").unlink()
    assert torch.observe_triton(house.layout).package is None


def test_one_that_was_built_here_outlives_torch_and_all_that_asks_for_the_paired_one(house, paired):
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


def test_without_that_word_the_paired_one_would_come_back(house, paired):
    own(house, paired)
    install(house, paired, "xgrammar")
    assert interpreter.installed(house.layout)["triton"] == "3.7.1"
