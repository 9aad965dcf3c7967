"""A fake ccache that prints what the real program prints."""

from workspace.core.console import Row
from workspace.machine import doctor
from workspace.machine.machine import Case

CCACHE = "case $1 in --version) echo 'ccache version 4.9.1';; --get-config) echo 5.0 GB;; esac"


def row(house, *, is_native=False, **shell) -> Row:
    machine = house.machine(PATH=f"{house.bin}:/bin", **shell)
    (found,) = doctor.ccache(Case(machine, device="cuda", is_native=is_native))
    return found


def test_limit_of_ccache_is_shown(house):
    house.program("ccache", CCACHE)
    found = row(house)
    assert (found.state, found.hint) == ("ok", None)
    assert found.text == f"ccache version 4.9.1, {house.bin}/ccache, limit 5.0 GB"


def test_cache_that_does_not_run_is_a_warning(house):
    house.program("ccache", "exit 3")
    found = row(house)
    assert (found.state, found.hint) == ("warn", f"{house.bin}/ccache --show-config")


def test_no_cache_is_a_warning_only_where_kernels_are_compiled(house):
    assert row(house).state == "ok"
    assert row(house, is_native=True).state == "warn"
