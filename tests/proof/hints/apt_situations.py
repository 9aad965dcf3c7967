"""Situations of a machine that lacks a package, or whose files belong to another user.

The machine is this one, in a mount namespace: what is written below its system folders is gone
afterwards. It needs root, Debian's apt, and the mirror of its packages.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from tests.machine.programs import NEW, OLD, PTXAS, SMI
from tests.proof.hints.doctor_situations import assembler, driver, program, without_row
from tests.proof.hints.following import User, printed, runs

DOCTOR = ("doctor", "--offline")
OVERLAYS = """set -e
top=/mnt
mount -t tmpfs tmpfs "$top"
for folder in usr etc var root; do
  mkdir "$top/$folder" "$top/$folder.work"
  mount -t overlay -o "lowerdir=/$folder,upperdir=$top/$folder,workdir=$top/$folder.work" \\
    overlay "/$folder"
done
echo 'APT::Get::Assume-Yes "true";' > /etc/apt/apt.conf.d/99yes
command -v sudo > /dev/null || apt-get install sudo > /dev/null 2>&1
rm -f /usr/sbin/reboot
printf '#!/bin/sh\\n' > /usr/sbin/reboot
chmod +x /usr/sbin/reboot
"""


@contextmanager
def other_machine(user: User, *lines: str) -> Iterator[None]:
    """Let the user type on a machine of its own, after these commands of a shell on it."""
    script = "\n".join((OVERLAYS, *lines, "echo ready", "exec cat"))
    argv = ["unshare", "--mount", "sh", "-c", script]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout
            last = ""
            while last != "ready":
                line = child.stdout.readline()
                assert line, f"the machine did not start after {last!r}"
                last = line.strip()
            enter = ("nsenter", f"--target={child.pid}", "--mount")
            user.through = (*enter, "sh", "-c", 'cd "$0" && exec "$@"', str(user.root))
            yield
        finally:
            user.through = ()
            child.kill()


def purged(*packages: str) -> str:
    return f"dpkg --purge --force-all {' '.join(packages)} > /dev/null 2>&1"


def installs(user: User, name: str, *verb: str, **env: str) -> None:
    """Meet the hint, install what it names, and see that the verb prints it no more."""
    without_row(user, name, user.meets(name, *verb, **env), *verb)


@runs("machine.apt_ccache", "machine.apt_patch", "machine.apt_gxx", "machine.apt_git")
def machine_without_the_tools_of_a_build(user: User) -> None:
    user.world.env["KERNELS"] = "native"
    with other_machine(user, purged("ccache", "patch", "g++")):
        installs(user, "machine.apt_ccache", *DOCTOR)
        installs(user, "machine.apt_gxx", *DOCTOR)
        assert user.type("dpkg --purge --force-all git").code == 0
        installs(user, "machine.apt_git", *DOCTOR)
        driver(user)
        installs(user, "machine.apt_patch", *DOCTOR)


@runs("machine.apt_gxx_major")
def machine_whose_compiler_is_old(user: User) -> None:
    with (user.vllm / "CMakeLists.txt").open("a") as cmake:
        cmake.write('\n# "GCC >= 11.3 is required to build vLLM"\n')
    with other_machine(user):
        program(user, "g++", "echo 9.1.0")
        installs(user, "machine.apt_gxx_major", *DOCTOR)


def nvidias(*packages: tuple[str, dict[str, str]]) -> str:
    """Return the commands that add a repository with these packages and their programs."""
    lines = ["mkdir -p /var/nvidia"]
    for name, programs in packages:
        lines.append(f"p=/var/nvidia/{name}; mkdir -p $p/DEBIAN")
        for path, script in programs.items():
            lines.append(f"mkdir -p $p{path.rpartition('/')[0]}")
            lines.append(f"cat > $p{path} <<'END'\n#!/bin/sh\n{script}\nEND\nchmod +x $p{path}")
        lines.append(
            f"printf 'Package: {name}\\nVersion: 1\\nArchitecture: all\\nMaintainer: N <n@n>\\n"
            "Description: stand-in\\n' > $p/DEBIAN/control"
        )
        lines.append("dpkg-deb --build $p $p.deb > /dev/null")
        lines.append(
            "{ cat $p/DEBIAN/control; echo Filename: ./$(basename $p).deb; echo Size: $(stat -c %s"
            " $p.deb); echo SHA256: $(sha256sum < $p.deb | cut -d' ' -f1); echo; }"
            " >> /var/nvidia/Packages"
        )
    lines.append("echo 'deb [trusted=yes] file:/var/nvidia ./' > /etc/apt/sources.list.d/n.list")
    lines.append(
        "apt-get update -o Dir::Etc::sourcelist=sources.list.d/n.list -o Dir::Etc::sourceparts=-"
        " -o APT::Get::List-Cleanup=0 > /dev/null 2>&1"
    )
    return "\n".join(lines)


TOOLKIT = {
    "/usr/local/cuda-13.0/bin/nvcc": "echo 'release 13.0, V13.0.1'",
    "/usr/local/cuda-13.0/bin/ptxas": PTXAS.format(release="13.0", known=NEW),
}


@runs("machine.apt_toolkit", "machine.apt_ptxas", "machine.cuda_home_after")
def machine_without_a_toolkit(user: User) -> None:
    toolkit = ("cuda-toolkit-13-0", TOOLKIT)
    driver(user)
    with other_machine(user, "rm -rf /usr/local/cuda*", nvidias(toolkit)):
        installs(user, "machine.apt_toolkit", *DOCTOR)
    nvcc = user.root / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'release 12.8, V12.8.1'\n")
    nvcc.chmod(0o755)
    with other_machine(user, "rm -rf /usr/local/cuda*", nvidias(toolkit)):
        shell = {"CUDA_HOME": str(user.root / "cuda")}
        command = user.meets("machine.cuda_home_after", *DOCTOR, **shell)
        after = f"sudo apt install cuda-toolkit-13-0 && {command}"
        without_row(user, "machine.cuda_home_after", after, *DOCTOR)
    user.world.uv("install", "--no-deps", "triton==3.7.1")
    packages = next(user.world.layout.environment.glob("lib/python3*/site-packages"))
    own = packages / "triton" / "backends" / "nvidia" / "bin"
    assembler(own / "ptxas", "12.8", OLD)
    assembler(own / "ptxas-blackwell", "12.8", OLD)
    with other_machine(user, "rm -rf /usr/local/cuda*", nvidias(toolkit)):
        installs(user, "machine.apt_ptxas", *DOCTOR)


@runs("machine.upgrade_driver")
def machine_whose_driver_is_old(user: User) -> None:
    new = SMI.format(
        gpu="NVIDIA L4, 8.9, 580.95.05", apps="true",
        xml="echo '<nvidia_smi_log><cuda_version>13.0</cuda_version></nvidia_smi_log>'",
    )  # fmt: skip
    old = new.replace("8.9", "[N/A]").replace("580", "470").replace("13.0", "11.4")
    user.world.env["DEVICE"] = "cuda"
    place = "/usr/bin/nvidia-smi"
    present = f"cat > {place} <<'END'\n#!/bin/sh\n{old}\nEND\nchmod +x {place}"
    package = ("nvidia-driver-580-open", {place: new})
    with other_machine(user, present, nvidias(package)):
        installs(user, "machine.upgrade_driver", *DOCTOR)


@runs("machine.earlyoom_on_host")
def machine_without_an_out_of_memory_daemon(user: User) -> None:
    with other_machine(user):
        assert user.type(user.meets("machine.earlyoom_on_host", *DOCTOR)).code == 0
        # A host starts it with the package, a container has no systemd.
        started = "cp /bin/sleep .workspace/earlyoom && test -x /usr/bin/earlyoom"
        assert user.type(started).code == 0
        with subprocess.Popen([user.root / ".workspace" / "earlyoom", "60"]) as daemon:
            try:
                ended = user.inv(*DOCTOR)
            finally:
                daemon.kill()
        assert not printed("machine.earlyoom_on_host", ended), ended.output
    user.followed.add("machine.earlyoom_on_host")
