"""Fake ccache and sccache that print what the real programs print."""

from workspace.core.console import Row
from workspace.machine import doctor
from workspace.machine.machine import Case

CCACHE = "case $1 in --version) echo 'ccache version 4.9.1';; --get-config) echo 5.0 GB;; esac"


def row(house, *, is_native=False, **shell) -> Row:
    machine = house.machine(PATH=f"{house.bin}:/bin", **shell)
    (found,) = doctor.ccache(Case(machine, device="cuda", is_native=is_native))
    return found


def test_ccache_goes_before_sccache_and_its_limit_is_shown(house):
    house.program("sccache", "echo sccache 0.10.0")
    assert row(house).text == f"sccache 0.10.0, {house.bin}/sccache"
    assert row(house, VLLM_DISABLE_SCCACHE="1").text == "none"
    house.program("ccache", CCACHE)
    found = row(house)
    assert (found.state, found.hint) == ("ok", None)
    assert found.text == f"ccache version 4.9.1, {house.bin}/ccache, limit 5.0 GB"


def test_cache_that_does_not_run_is_a_warning(house):
    house.program("sccache", "exit 3")
    assert row(house).hint == "echo VLLM_DISABLE_SCCACHE=1 >> .env"
    house.program("ccache", "exit 3")
    found = row(house)
    assert (found.state, found.hint) == ("warn", f"{house.bin}/ccache --show-config")


def test_no_cache_is_a_warning_only_where_kernels_are_compiled(house):
    assert row(house).state == "ok"
    assert row(house, is_native=True).state == "warn"
