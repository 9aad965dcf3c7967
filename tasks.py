"""Entrance of `inv`: parse, call, print.

scripts/inv runs this file as a program of the tool environment. Any other loader, such as a plain
`inv` from pipx or an old Python, hands over to scripts/inv, so that every way in has the same
verbs, messages and exit codes. The file therefore parses in old Pythons.
"""

# Until main.run catches it, ^C ends the process as the system does it: without a traceback. This
# comes before every other import; with -S, not even site has been imported yet.
import _signal

if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

import os
import sys

if sys.flags.no_site:
    import site

    site.main()

_ROOT = os.path.dirname(os.path.realpath(__file__))
_TOOLS = os.path.join(_ROOT, ".workspace", "tools")
_HANDED_OVER = "VLLM_WORKSPACE_HANDED_OVER"


def _hand_over():
    """Become scripts/inv with all arguments, once.

    exec keeps the process ID, which reveals a loop.
    """
    if os.environ.get(_HANDED_OVER) == str(os.getpid()):
        return
    if os.path.realpath(sys.prefix) == os.path.realpath(_TOOLS):
        # The tool environment is incomplete: without the copy of its requirements, scripts/inv
        # makes it again.
        try:
            os.unlink(os.path.join(_TOOLS, "requirements.txt"))
        except OSError:
            pass
    os.environ[_HANDED_OVER] = str(os.getpid())
    sys.stdout.flush()
    os.execv("/bin/sh", ["sh", os.path.join(_ROOT, "scripts", "inv")] + sys.argv[1:])


if __name__ != "__main__" or sys.version_info < (3, 11):
    _hand_over()
# invoke imports these for its mocks, its configuration files and its own version. No verb uses
# them, and with asyncio, ssl and others behind them they would cost each verb 30 ms.
_UNUSED = ("unittest.mock", "invoke.vendor.yaml", "importlib.metadata")
for _name in _UNUSED:
    sys.modules[_name] = _stub = type(sys)(_name)
    _stub.Mock = _stub.version = str
try:
    import invoke  # noqa: F401
except ImportError:
    _hand_over()
    raise
for _name in _UNUSED:
    del sys.modules[_name]

from workspace.cli import main
from workspace.cli.program import program


def _main():
    os.environ.pop(_HANDED_OVER, None)
    return main.run(lambda: program().run(sys.argv))


if __name__ == "__main__":
    sys.exit(_main())
