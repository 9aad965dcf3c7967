"""Fake ccache and sccache that print what the real programs print."""

import pytest

from workspace.core.console import Row
from workspace.machine import doctor
from workspace.machine.machine import Case

CONFIG = {
    "cache_dir": "",
    "max_size": "20.0G",
    "hash_dir": "false",
    "base_dir": "",
    "sloppiness": "",
    "disable": "false",
    "read_only": "false",
}


def ccache(house, *, size_kib="1048576", origin="default", **config) -> None:
    lines = "".join(f"({origin}) {key} = {value}\n" for key, value in (CONFIG | config).items())
    stats = f"cache_miss\t0\ncache_size_kibibyte\t{size_kib}\n" if size_kib is not None else ""
    house.program(
        "ccache",
        f"case $1 in --show-config) cat <<'X'\n{lines}X\n;; --print-stats) cat <<'X'\n{stats}X\n;;"
        " *) exit 1;; esac",
    )


def row(house, *, device="cuda", is_native=False, **shell) -> Row:
    (found,) = doctor.ccache(
        Case(
            house.machine(PATH=f"{house.bin}:/bin", **shell),
            device=device,
            is_native=is_native,
        )
    )
    return found


def test_cache_that_can_hit_is_ok_and_shows_size_limit_and_settings(house):
    ccache(house, base_dir=house.layout.root, sloppiness="time_macros")
    found = row(house)
    assert (found.state, found.hint) == ("ok", None)
    for text in (
        "1.0 GiB",
        "limit 20.0G",
        "hash_dir false",
        f"base_dir {house.layout.root}",
        "sloppiness time_macros",
    ):
        assert text in found.text


def test_cache_that_is_a_file_is_moved_and_gets_no_owner(house, tmp_path):
    (tmp_path / "ccache").touch()
    ccache(house, cache_dir=str(tmp_path / "ccache"))
    found = row(house)
    assert (found.state, "chown" in (found.hint or "")) == ("warn", False)
    assert "is a file, not a folder, so it keeps nothing" in (found.why or "")


def test_cache_of_size_0_is_called_empty_and_a_limit_of_0_none(house):
    ccache(house, size_kib="0", max_size="0")
    found = row(house)
    assert found.state == "ok"
    assert "empty, no limit" in found.text


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        ({"disable": "true"}, "ccache --set-config disable=false"),
        ({"read_only": "true"}, "ccache --set-config read_only=false"),
        ({"hash_dir": "true"}, "unset CCACHE_HASHDIR"),
        ({"base_dir": "/elsewhere"}, "unset CCACHE_BASEDIR"),
        ({"max_size": "5.0G"}, "ccache --set-config max_size=20G"),
        (
            {"max_size": "500.0M", "hash_dir": "true"},
            "ccache --set-config max_size=20G && unset CCACHE_HASHDIR",
        ),
    ],
)
def test_setting_that_prevents_hits_is_a_warning_with_its_hint(house, config, hint):
    ccache(house, **config)
    found = row(house)
    assert (found.state, found.hint) == ("warn", hint)


def test_switch_that_comes_from_the_shell_is_unset_there(house):
    ccache(house, disable="true", origin="environment")
    assert row(house).hint == "unset CCACHE_DISABLE"


def test_limit_of_five_gib_is_enough_without_a_gpu(house):
    ccache(house, max_size="5.0G")
    assert row(house, device="cpu").state == "ok"


def test_password_of_a_remote_cache_is_not_shown(house):
    ccache(house, remote_storage="redis://me:hunter2@cache.example|read-only file:///srv/cache")
    found = row(house)
    assert "hunter2" not in found.text
    assert "remote redis://cache.example file:///srv/cache" in found.text


@pytest.mark.parametrize("script", ["exit 1", "echo nonsense", "printf '(x) max_size = huge\\n'"])
def test_cache_with_unknown_output_never_breaks_the_row(house, script):
    house.program("ccache", script)
    assert row(house).state in ("ok", "warn")


def test_ccache_is_run_with_the_settings_of_a_build(house):
    house.program(
        "ccache",
        'echo "(environment) base_dir = $CCACHE_BASEDIR"; echo "(environment) depend_mode ='
        ' $CCACHE_DEPEND"',
    )
    assert f"base_dir {house.layout.root}" in row(house).text
    assert row(house, CCACHE_BASEDIR="/elsewhere").hint == "unset CCACHE_BASEDIR"


def test_ccache_goes_before_sccache(house):
    house.program("sccache", "echo sccache 0.10.0")
    assert row(house, SCCACHE_BUCKET="mine").text.startswith("sccache 0.10.0: limit 10G")
    assert "remote by SCCACHE_BUCKET" in row(house, SCCACHE_BUCKET="mine").text
    assert row(house, VLLM_DISABLE_SCCACHE="1").text == "none"
    ccache(house)
    assert "ccache: 1.0 GiB" in row(house, SCCACHE_BUCKET="mine").text


def test_no_cache_is_a_warning_only_where_kernels_are_compiled(house):
    assert row(house).state == "ok"
    assert row(house, is_native=True).state == "warn"


@pytest.mark.parametrize(
    ("text", "gib"),
    [("5.0G", 4.66), ("5 GiB", 5.0), ("512Mi", 0.5), ("0", 0.0), ("", None), ("lots", None)],
)
def test_size_is_read_in_decimal_and_in_binary_units(text, gib):
    found = doctor.size_gib(text)
    assert found == gib if gib is None else abs(found - gib) < 0.01
