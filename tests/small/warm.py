"""A warm interpreter: one process that has the library loaded and forks a child for each command
line of `inv` or of a session of nox.

What a child does is what a fresh process does, on real descriptors, with its own environment, and
without the 0.3 s of imports. Run as `python -Es -B warm.py CLONE`; requests and answers are one
JSON document a line. A child works in the clone that the request names, which has the same library.
Imports nothing of the tests.
"""

import atexit
import gc
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

# Modules of others that the verbs import late.
LATE = (
    *("git", "psutil", "packaging.utils", "dotenv.main", "dotenv.parser"),
    *("rich.console", "rich.text", "msgspec.json", "msgspec.toml"),
)
# They run in the built interpreter.
NOT_OURS = ("probes", "inside")
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
    library = [
        ".".join(path.relative_to(root).with_suffix("").parts)
        for path in sorted(Path(root, "workspace").rglob("*.py"))
        if path.stem != "__init__" and not {*NOT_OURS} & {*path.parts}
    ]
    for name in ("tasks", *library, *LATE):
        importlib.import_module(name)
    gc.freeze()
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
        if request["bounded"]:
            resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
        for number, descriptor in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out), (2, theirs)):
            os.dup2(descriptor, number)
        os.closerange(3, 64)
        _be_program(request)
    if request["tty"]:
        os.close(theirs)
        os.set_blocking(terminal, False)
    ended = _await(child, float(str(request["timeout_s"])), terminal, err)
    for descriptor in (out, err, terminal):
        if descriptor >= 0:
            os.close(descriptor)
    return ended


def _be_program(request: dict[str, object]) -> None:
    code = 1
    root, args = Path(str(request["root"])), cast("list[str]", request["args"])
    try:
        os.environ.clear()
        os.environ.update(cast("dict[str, str]", request["env"]))
        os.chdir(str(request["cwd"]))
        sys.modules["workspace.core.paths"].__file__ = str(root / "workspace/core/paths.py")
        encoding = str(request["encoding"])
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding=encoding, errors="strict", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", 1, encoding=encoding, errors="strict", closefd=False)  # noqa: SIM115
        if request["is_session"]:
            sys.argv = [str(root / "workspace/cli/sessions.py"), *args]
            code = sys.modules["workspace.cli.sessions"].run_session(args)
        else:
            sys.argv = [str(root / "tasks.py"), *args]
            code = sys.modules["tasks"]._main()
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except BaseException:
        os.write(2, traceback.format_exc().encode(errors="backslashreplace"))
    finally:
        atexit._run_exitfuncs()
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
