"""Several servers of one clone, each with its name, port, log and share of the memory."""

import os
import shlex
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.server.test_server import is_clean, launch
from workspace.cli import completion
from workspace.core.console import Console
from workspace.core.errors import ServeError, SettingsError
from workspace.core.paths import Layout
from workspace.server import lifecycle, observation, verbs
from workspace.server.flags import ServeOptions
from workspace.server.observation import Address, place_of


def started(layout: Layout, name: str, **facts: str) -> observation.Server:
    order = replace(launch("slow"), facts={"device": "cpu", **facts})
    return lifecycle.start(place_of(layout, name), order)


def test_each_server_has_a_place_and_stop_all_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # While a server starts it is deaf to SIGTERM, and each stop waits that long.
    monkeypatch.setattr(lifecycle, "GRACE_S", 0.2)
    layout = Layout(tmp_path)
    made = [started(layout, name) for name in ("", "a", "b")]
    assert [there.label for there in observation.servers(layout)] == ["server", "a", "b"]
    assert list(completion._servers(layout)) == ["server", "a", "b"]
    assert len({there.log.parent for there in made}) == 3
    with pytest.raises(SettingsError, match="3 servers run here: server, a, b; name one"):
        verbs.stop(layout, console=Console())
    with pytest.raises(SettingsError, match="there is no server c, only server, a, b"):
        verbs.stop(layout, console=Console(), name="c")
    assert all(there.members() for there in made)
    verbs.stop(layout, console=Console(), name="a")
    assert [bool(there.members()) for there in made] == [True, False, True]
    verbs.stop(layout, console=Console(), is_all=True)
    for there in made:
        is_clean(there)
    verbs.stop(layout, console=Console(), is_all=True)


def test_port_of_another_server_is_refused_before_anything_listens_there(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    there = started(layout, "a")
    try:
        for name, problem in (("b", "port .* belongs to the server a: standin"), ("a", "already")):
            with pytest.raises(ServeError, match=problem):
                observation.require_room(layout, place_of(layout, name), there.address)
        assert observation.find(place_of(layout, "b")) is None
        assert not place_of(layout, "b").exists()
    finally:
        lifecycle.stop(there, at_once=True)


def test_share_of_a_server_that_still_loads_is_promised(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    there = started(layout, "a", takes_gib="5.00")
    try:
        assert observation.is_loading(there)
        assert 4.5 < observation.promised_gib(there) <= 5
    finally:
        lifecycle.stop(there, at_once=True)
    assert observation.promised_gib(there) == 0


@pytest.mark.parametrize("name", ["A", "a b", "../x", "-a", "a" * 32])
def test_name_that_cannot_be_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match="cannot be the name of a server"):
        place_of(Layout(tmp_path), name)


@pytest.mark.parametrize(
    "options",
    [
        ServeOptions("tiny", memory="much"),
        ServeOptions("tiny", memory="0"),
        ServeOptions("tiny", ("--gpu-memory-utilization", "0.5"), memory="4"),
        ServeOptions("tiny", restart="-1"),
    ],
)
def test_value_that_cannot_be_used_is_refused(options: ServeOptions) -> None:
    with pytest.raises(SettingsError):
        options.check()


def test_program_that_took_the_port_of_a_stopped_server_is_shown_by_the_hint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(observation, "RETURN_TIMEOUT_S", 0.0)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServeError, match=f"but port {port} is taken") as caught:
            observation.wait_for_port(Address("127.0.0.1", port))
        assert caught.value.hint
        argv = shlex.split(caught.value.hint)
        done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    assert f"127.0.0.1:{port}" in done.stdout
    assert f"pid={os.getpid()}" in done.stdout
