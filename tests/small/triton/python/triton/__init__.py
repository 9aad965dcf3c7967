"""As much of Triton as a probe asks for: a kernel comes out right where the compiled library gives
the right answer.
"""

import ctypes
from pathlib import Path
from types import SimpleNamespace

__version__ = "3.9.0"
_library = ctypes.CDLL(str(next((Path(__file__).parent / "_C").glob("libtriton.*"))))


def jit(kernel):
    return kernel


def compile(source, target):
    if _library.triton_small_answer() != 42:
        raise RuntimeError("a wrong answer")
    return SimpleNamespace(
        asm={"ptx": f".version 8.8\n.target sm_{target.arch}a\n", "cubin": b"\x7fELF"}
    )


from triton import knobs as knobs  # noqa: E402
