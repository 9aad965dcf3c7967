"""A warm `inv`: one process that has the clone's tasks loaded and forks a child for each command
line.

What a child does is what a fresh `inv` does, on real descriptors, with its own environment, and
without the 0.3 s of imports. Run as `python -Es -B warm.py CLONE`; requests and answers are one
JSON document a line. Imports nothing of the tests.
"""

import importlib
import json
import os
import pty
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import cast

# The modules that the verbs import late.
LATE = (
    "workspace.install.status",
    "workspace.install.bootstrap",
    "git",
    "psutil",
    "packaging.utils",
    "dotenv.main",
    "dotenv.parser",
    "rich.console",
    "rich.text",
)
# tasks.py takes this for the sign that scripts/inv has run already, and so does not become
# scripts/inv here.
HANDED_OVER = "VLLM_WORKSPACE_HANDED_OVER"
HANGS = "hangs"
# Who reads an endless device is to fail, not to take the machine down.
ADDRESS_SPACE_BYTES = 6 << 30


def main(root: str) -> None:
    """Answer requests until the other end of stdin is closed."""
    os.environ[HANDED_OVER] = str(os.getpid())
    sys.path.insert(0, root)
    for name in ("tasks", *LATE):
        importlib.import_module(name)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)


def _answer(request: dict[str, object]) -> int | str:
    """The child's exit code as a shell counts it, or `hangs`."""
    out, err = os.open(str(request["out"]), os.O_WRONLY), os.open(str(request["err"]), os.O_WRONLY)
    terminal, theirs = pty.openpty() if request["tty"] else (-1, err)
    child = os.fork()
    if child == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
        for number, descriptor in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out), (2, theirs)):
            os.dup2(descriptor, number)
        os.closerange(3, 64)
        _be_inv(request)
    if request["tty"]:
        os.close(theirs)
        os.set_blocking(terminal, False)
    ended = _await(child, float(str(request["timeout_s"])), terminal, err)
    for descriptor in (out, err, terminal):
        if descriptor >= 0:
            os.close(descriptor)
    return ended


def _be_inv(request: dict[str, object]) -> None:
    code = 1
    try:
        os.environ.clear()
        os.environ.update(cast("dict[str, str]", request["env"]))
        os.chdir(str(request["cwd"]))
        sys.argv = [str(Path(sys.path[0]) / "tasks.py"), *cast("list[str]", request["args"])]
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            setattr(
                sys,
                name,
                open(  # noqa: SIM115
                    descriptor,
                    "w",
                    encoding=str(request["encoding"]),
                    errors="strict",
                    closefd=False,
                ),
            )
        code = sys.modules["tasks"]._main()
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 1
    except BaseException:
        os.write(2, traceback.format_exc().encode(errors="backslashreplace"))
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _await(child: int, timeout_s: float, terminal: int, err: int) -> int | str:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        _copy(terminal, err)
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            _copy(terminal, err)
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        time.sleep(0.002)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return HANGS


def _copy(terminal: int, err: int) -> None:
    """What was written to the terminal, if there is one."""
    if terminal < 0:
        return
    try:
        while output := os.read(terminal, 1 << 16):
            os.write(err, output)
    except OSError:
        return


if __name__ == "__main__":
    main(sys.argv[1])
