"""The decision and the act of each fix on real files: .env, checkout, environment."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.machine.conftest import House, built, house
from workspace.core.console import Row, State
from workspace.core.errors import ToolchainError
from workspace.core.process import Absent
from workspace.install import stamp, triton_diagnosis, triton_fixes
from workspace.install.triton_diagnosis import Diagnosis
from workspace.install.triton_fixes import FIXES, Context
from workspace.machine import doctor, interpreter
from workspace.machine.doctor import Assembler, Trial, Verdict

__all__ = ["built", "house"]

PTXAS = """case "$1" in --version) echo 'release {release}, V{release}.1'; exit;; esac
case " {known} " in
    *" ${{1#--gpu-name=}} "*) printf '\\177ELF' > "$3";;
    *) echo "ptxas fatal   : no such" >&2; exit 255;;
esac"""
NOTHING = Diagnosis((), None, None, "12.1", (), None, None, ())


def verdict(
    house: House, *, release: str = "13.3", known: str = "sm_121a", own: Path | None = None, **more
) -> Verdict:
    bundled = house.program(
        "ptxas-blackwell",
        PTXAS.format(release=release, known=known),
        folder=house.layout.root / "bundled",
    )
    one = Assembler("ptxas-bw", "TRITON_PTXAS_BLACKWELL_PATH", bundled, True)
    trial = None if more.get("is_refused") else Trial(bundled, release, "" if known else "no such")
    return Verdict(one, own, **{"is_refused": False, "is_ignored": False, "trial": trial, **more})


def changes(house: House, *verdicts: Verdict, findings: tuple[Row, ...] = (), **shell: str):
    with house.run_log(house.settings()) as run_log:
        return triton_fixes.assembler_changes(
            Context(house.machine(**shell), run_log),
            replace(NOTHING, verdicts=verdicts, findings=findings),
        )


def toolkit(house: House, release: str) -> dict[str, str]:
    """Make a toolkit, and return the setting that names it."""
    home = house.layout.root.parent / f"cuda-{release}"
    house.program("ptxas", PTXAS.format(release=release, known="sm_121a"), folder=home / "bin")
    house.program("nvcc", f"echo 'release {release}, V{release}.1'", folder=home / "bin")
    return {"CUDA_HOME": str(home)}


def test_own_assembler_that_serves_is_taken_again_and_none_is_named(house):
    shell = toolkit(house, "13.9")
    assert changes(house, verdict(house, own=Path("/nowhere"), is_ignored=True), **shell) == {
        "TRITON_PTXAS_BLACKWELL_PATH": None
    }
    assert changes(house, verdict(house), **shell) == {}


def test_assembler_that_is_older_than_tritons_own_is_never_named_even_where_it_alone_assembles(
    house,
):
    shell = toolkit(house, "13.0")
    assert changes(house, verdict(house, release="13.3", known=""), **shell) == {}
    named = changes(house, verdict(house, release="12.9", known=""), **shell)
    assert named == {"TRITON_PTXAS_BLACKWELL_PATH": f"{shell['CUDA_HOME']}/bin/ptxas"}


def test_nothing_is_named_for_a_triton_that_is_about_to_go(house):
    shell = toolkit(house, "13.9")
    assert (
        changes(
            house, verdict(house, known=""), findings=(Row(State.FAIL, "triton", "3.5.1"),), **shell
        )
        == {}
    )


def test_newest_assembler_of_nvidias_packages_is_preferred_to_the_toolkits(house, built):
    built()
    shell = toolkit(house, "13.0")
    packages = interpreter.site_packages(house.layout)[0]
    newer = house.program(
        "ptxas",
        PTXAS.format(release="13.5", known="sm_121a"),
        folder=packages / "nvidia" / "cu13" / "bin",
    )
    assert changes(house, verdict(house, release="12.8", known=""), **shell)[
        "TRITON_PTXAS_BLACKWELL_PATH"
    ] == str(newer)


def test_shadow_outside_of_the_environment_is_its_owners(house, built, tmp_path):
    built()
    with house.run_log(house.settings()) as run_log:
        context = Context(house.machine(), run_log)
        assert FIXES[1].plan(context, replace(NOTHING, shadow=tmp_path / "triton_kernels")) == ()
    row = triton_diagnosis._shadow(house.layout, tmp_path / "triton_kernels")
    assert "do it yourself" in row.why


def test_shadow_is_moved_and_one_that_cannot_be_is_a_sentence(house, built):
    built()
    shadow = interpreter.site_packages(house.layout)[0] / "triton_kernels"
    shadow.mkdir()
    found = replace(NOTHING, shadow=shadow)
    with house.run_log(house.settings()) as run_log:
        context = Context(house.machine(), run_log)
        assert len(FIXES[1].plan(context, found)) == 1
        assert FIXES[1].act(context, found).startswith("1 moved to .workspace/quarantine/")
        assert not shadow.exists()
        with pytest.raises(ToolchainError, match="cannot be moved"):
            FIXES[1].act(context, found)


def test_stamp_of_the_environment_records_the_installed_triton(house, built):
    settings = built()
    stamp.write(
        house.layout.stamp("environment"),
        stamp.Stamp(inputs={}, packages={"triton": "3.5.1", "numpy": "2"}),
    )
    house.wheel("triton", "3.7.1")
    with house.run_log(settings) as run_log:
        interpreter.install(house.layout, settings, ["triton"], run_log=run_log)
    triton_fixes.record_installed(house.layout)
    assert stamp.read(house.layout.stamp("environment")).packages == {
        "triton": "3.7.1",
        "numpy": "2",
    }


def test_script_without_a_shebang_is_refused_as_triton_would_be_stopped_by_it(house, tmp_path):
    program = tmp_path / "ptxas"
    program.write_text("echo release 13.0\n")
    os.chmod(program, 0o755)
    one = Assembler("ptxas", "TRITON_PTXAS_PATH", tmp_path / "bundled", True)
    assert doctor.judge_ptxas(
        one, house.settings(TRITON_PTXAS_PATH=str(program)), "12.1", lambda argv: Absent()
    ).is_refused
