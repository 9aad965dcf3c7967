"""The doctor's rows on a node's end of the fast link, on files as the kernel has them."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from workspace.core.console import Row
from workspace.machine import link

ADDRESS = "192.168.100.1"


@dataclass
class Spark:
    """A folder that stands for `/`, and the executables beside it."""

    root: Path
    programs: Path

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def program(self, name: str, script: str) -> None:
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def rows(self) -> dict[str, Row]:
        observed = link.observe("roce0", {"PATH": f"{self.programs}:/usr/bin:/bin"}, self.root)
        return {row.name: row for row in link.rows(observed, ADDRESS)}

    def type(self, hint: str | None) -> int:
        """Return the exit status of a hint's command; sudo accepts what it is expected to run."""
        assert hint
        environment = {"PATH": f"{self.programs}:/usr/bin:/bin", "HOME": str(self.root)}
        command = ["sh", "-c", hint.split("    ")[0]]
        return subprocess.run(command, env=environment, capture_output=True).returncode


@pytest.fixture
def spark(tmp_path: Path) -> Spark:
    """A Spark on whose link nothing is wrong but the limit of this test's own process."""
    made = Spark(tmp_path / "root", tmp_path / "programs")
    made.programs.mkdir()
    made.program(
        "ip",
        f'case "$*" in *address*) echo \'[{{"addr_info": [{{"local": "{ADDRESS}"}}]}}]\' ;;'
        ' *) echo \'[{"dev": "eth0"}]\' ;; esac',
    )
    made.program("sudo", 'echo "$*" >> "$HOME/sudo"; [ "$1" != tee ] || cat > "$HOME/limits"')
    made.program("loginctl", '[ "$*" = enable-linger ]')
    net = "sys/class/net/roce0"
    for name, text in {"carrier": "1", "speed": "200000", "mtu": "9000"}.items():
        made.write(f"{net}/{name}", f"{text}\n")
    made.write(f"{net}/device/infiniband/rocep1s0f0/ports/1/state", "4: ACTIVE\n")
    verbs = f"{net}/device/infiniband/rocep1s0f0/device/infiniband_verbs/uverbs0"
    (made.root / verbs).mkdir(parents=True)
    made.write("dev/infiniband/uverbs0", "")
    made.write("usr/lib/aarch64-linux-gnu/libibverbs.so.1", "")
    return made


def test_link_without_a_fault_is_ok_in_each_row(spark: Spark) -> None:
    rows = spark.rows()
    assert {name: row.state for name, row in rows.items() if name != "memlock"} == {
        "link": "ok",
        "rdma": "ok",
        "firewall": "ok",
    }
    assert rows["link"].text == "roce0 up, 200 Gb/s, MTU 9000"
    assert rows["rdma"].text == "rocep1s0f0"


@pytest.mark.parametrize(
    ("path", "text", "state", "sentence"),
    [
        ("carrier", "0", "FAIL", "roce0 down"),
        ("speed", "1000", "warn", "roce0 up, 1 Gb/s"),
        ("speed", "-1", "ok", "roce0 up, speed unknown"),
    ],
)
def test_link_that_is_down_or_slow_is_named(
    spark: Spark, path: str, text: str, state: str, sentence: str
) -> None:
    spark.write(f"sys/class/net/roce0/{path}", text)
    row = spark.rows()["link"]
    assert (row.state, row.text.startswith(sentence)) == (state, True)
    assert state == "ok" or spark.type(row.hint) == 0


def test_address_of_nodes_toml_that_the_interface_lacks_fails(spark: Spark) -> None:
    spark.program("ip", 'echo \'[{"addr_info": [{"local": "169.254.1.2"}]}]\'')
    row = spark.rows()["link"]
    assert row.state == "FAIL"
    assert row.why == "it has 169.254.1.2"
    assert spark.type(row.hint) == 0
    assert (spark.root / "sudo").read_text() == f"ip address add {ADDRESS}/24 dev roce0\n"


def test_one_interface_for_both_roles_is_a_warning(spark: Spark) -> None:
    program = spark.programs / "ip"
    program.write_text(program.read_text().replace("eth0", "roce0"))
    row = spark.rows()["link"]
    assert (row.state, "default route" in row.text) == ("warn", True)


def test_what_keeps_nccl_from_rdma_is_named(spark: Spark) -> None:
    (spark.root / "usr/lib/aarch64-linux-gnu/libibverbs.so.1").unlink()
    row = spark.rows()["rdma"]
    assert row.text == "rocep1s0f0; NCCL lacks libibverbs.so.1"
    assert spark.type(row.hint) == 0
    assert (spark.root / "sudo").read_text() == "apt install libibverbs1\n"
    spark.write("usr/lib/aarch64-linux-gnu/libibverbs.so.1", "")
    (spark.root / "dev/infiniband/uverbs0").unlink()
    row = spark.rows()["rdma"]
    assert row.text.endswith("NCCL lacks rights on /dev/infiniband/uverbs0")
    assert row.hint == "ls -l /dev/infiniband"
    spark.write("sys/class/net/roce0/device/infiniband/rocep1s0f0/ports/1/state", "1: DOWN\n")
    assert spark.rows()["rdma"].text == "the port of rocep1s0f0 is not active"
    assert spark.rows()["rdma"].hint == ("ls /sys/class/infiniband    lists the RDMA devices")


def test_limit_of_locked_memory_matters_with_rdma_only(
    spark: Spark, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (8 << 20, 8 << 20))
    row = spark.rows()["memlock"]
    assert (row.state, row.text) == ("warn", "8 MiB")
    assert spark.type(row.hint) == 0
    assert (spark.root / "limits").read_text() == "* - memlock unlimited\n"
    spark.write("sys/class/net/roce0/device/infiniband/rocep1s0f0/ports/1/state", "1: DOWN\n")
    assert spark.rows()["memlock"].state == "ok"


def test_firewall_that_is_on_has_the_command_that_opens_the_link(spark: Spark) -> None:
    spark.write("etc/ufw/ufw.conf", "# on\nENABLED=no\n")
    assert spark.rows()["firewall"].state == "ok"
    spark.write("etc/ufw/ufw.conf", "# on\nENABLED=yes\n")
    assert spark.type(spark.rows()["firewall"].hint) == 0
    spark.write("etc/ufw/ufw.conf", "")
    (spark.root / "run/firewalld").mkdir(parents=True)
    assert spark.type(spark.rows()["firewall"].hint) == 0
    assert (spark.root / "sudo").read_text().splitlines() == [
        "ufw allow in on roce0",
        "firewall-cmd --zone=trusted --change-interface=roce0",
    ]


def test_sessions_that_lose_their_semaphores_are_named(
    spark: Spark, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getuid", lambda: 1000)
    (spark.root / "run/systemd/system").mkdir(parents=True)
    assert spark.type(spark.rows()["sessions"].hint) == 0
    spark.write("etc/systemd/logind.conf", "[Login]\nRemoveIPC=no\n")
    assert "sessions" not in spark.rows()


def test_releases_that_are_known_to_break_have_a_source_each() -> None:
    assert all(fault.source.startswith("https://") for fault in link.faults())
    rows = list(link.fault_rows("590.48.01", "7.0.0-1019-nvidia"))
    assert [row.name for row in rows] == ["kernel", "driver"]
    assert rows[0].text.endswith("6.17.0-1032-nvidia works")
    assert os.system(f"{(rows[0].hint or '').split('    ')[0]} > /dev/null") == 0
    assert list(link.fault_rows("580.142", "6.17.0-1014-nvidia")) == []
    assert list(link.fault_rows(None, "6.8.0")) == []
