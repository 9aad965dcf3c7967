"""Compile a small kernel with the installed Triton for a GPU that need not be there; run it, and
compare with torch, where one is.

Prints one JSON document: version, file, target, ptxas, cubin_bytes, ptx, error of the compilation,
what a run on the GPU gave, and where `triton_kernels` would be imported from. TRITON_CACHE_DIR
should be an empty folder, or an old kernel answers for the compiler.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import json
import re
import sys

try:
    import triton
    import triton.language as tl
except Exception as exc:
    triton, IMPORT_ERROR = None, f"{type(exc).__name__}: {exc}"
else:
    IMPORT_ERROR = ""

SIZE = 64
# Products of half precision, added up in single; torch adds them up in another order.
TOLERANCE = 2e-2


def kernel(a, b, out, size: "tl.constexpr"):
    """exp(a @ b / size) of square matrices: a matrix instruction, a special function, loads and
    stores.
    """
    rows = tl.arange(0, size)[:, None]
    columns = tl.arange(0, size)[None, :]
    product = tl.dot(tl.load(a + rows * size + columns), tl.load(b + rows * size + columns))
    tl.store(out + rows * size + columns, tl.exp(product / size))


def compiled(capability: str) -> dict[str, object]:
    """Compile for a capability such as 12.1, without a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    number = int("".join(re.findall(r"\d+", capability)[:2]))
    said: dict[str, object] = {"target": f"sm_{number}{'a' if number >= 90 else ''}"}
    source = ASTSource(
        triton.jit(kernel),
        signature={"a": "*fp16", "b": "*fp16", "out": "*fp32", "size": "constexpr"},
        constexprs={"size": SIZE},
    )
    made = triton.compile(source, target=GPUTarget("cuda", number, 32))
    found = re.search(
        r"^\.version (\S+)$.*?^\.target (\S+?)(?:,|$)", made.asm["ptx"], re.MULTILINE | re.DOTALL
    )
    said["ptx"], said["ptx_target"] = (found[1], found[2]) if found else ("", "")
    said["cubin_bytes"] = len(made.asm["cubin"])
    return said


def ran() -> dict[str, object] | None:
    """Run it on the GPU that is here, and say how far it is from torch; None where there is no GPU,
    or no torch for it.
    """
    try:
        # Without a driver torch would see no GPU either, and takes seconds to say so.
        ctypes.CDLL("libcuda.so.1")
        import torch
    except (OSError, ImportError):
        return None
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    generator = torch.Generator(device="cuda").manual_seed(0)
    a, b = (
        torch.randn(SIZE, SIZE, device="cuda", dtype=torch.float16, generator=generator)
        for _ in range(2)
    )
    out = torch.empty(SIZE, SIZE, device="cuda", dtype=torch.float32)
    triton.jit(kernel)[(1,)](a, b, out, SIZE)
    expected = torch.exp(a.float() @ b.float() / SIZE)
    difference = (out - expected).abs().max().item()
    # A result that is not a number is no small difference.
    return {
        "gpu": torch.cuda.get_device_name(0),
        "largest_difference": difference,
        "is_right": bool(difference < TOLERANCE),
    }


def assembler(capability: str) -> str | None:
    """The assembler that this Triton takes."""
    from triton import knobs

    number = int("".join(re.findall(r"\d+", capability)[:2]))
    second = getattr(knobs.nvidia, "ptxas_blackwell", None) if number >= 100 else None
    return str((second or knobs.nvidia.ptxas).path)


def spot(name: str) -> str | None:
    with contextlib.suppress(ImportError, ValueError):
        found = importlib.util.find_spec(name)
        if found:
            return found.origin or next(iter(found.submodule_search_locations or []), None)
    return None


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--capability", default="12.1")
    wanted = parser.parse_args()
    said: dict[str, object] = {
        "triton_kernels": spot("triton_kernels"),
        "error": IMPORT_ERROR,
        "version": None,
        "file": None,
        "ran": None,
    }
    if triton is not None:
        said |= {"version": triton.__version__, "file": triton.__file__}
        # Whatever stops a compiler or a driver is what is asked for here. Triton prints a kernel
        # that cannot be assembled, the whole of it.
        try:
            with contextlib.redirect_stdout(sys.stderr):
                said["ptxas"] = assembler(wanted.capability)
                said |= compiled(wanted.capability)
                said["ran"] = ran()
        except Exception as exc:
            said["error"] = f"{type(exc).__name__}: {exc}"
    print(json.dumps(said))
    return 0


if __name__ == "__main__":
    sys.exit(main())
