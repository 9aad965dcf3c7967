"""Compile a small kernel with the installed Triton for a GPU that need not be present; if there is
a GPU, run it and compare with torch.

One JSON document on stdout: version, file, target, ptxas, cubin_bytes, ptx, error of the
compilation, result of a run on the GPU, and the file from which `triton_kernels` would be imported.
TRITON_CACHE_DIR should be an empty folder: a cached kernel hides a broken compiler.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import json
import re
import sys

IMPORT_ERROR = ""
try:
    import triton
    import triton.language as tl
except Exception as exc:
    triton, IMPORT_ERROR = None, f"{type(exc).__name__}: {exc}"

SIZE = 64
# Products in half precision, summed in single precision; torch sums in another order. On an H200
# they differ by 2e-7.
TOLERANCE = 2e-2


def kernel(a: "tl.tensor", b: "tl.tensor", out: "tl.tensor", size: "tl.constexpr") -> None:
    """exp(a @ b / size) of square matrices: a matrix instruction, a special function, loads and
    stores.
    """
    rows = tl.arange(0, size)[:, None]
    columns = tl.arange(0, size)[None, :]
    product = tl.dot(tl.load(a + rows * size + columns), tl.load(b + rows * size + columns))
    tl.store(out + rows * size + columns, tl.exp(product / size))


def compiled(capability: str) -> dict[str, object]:
    """Compile the kernel for a capability such as 12.1, without a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arch = arch_of(capability)
    source = ASTSource(
        triton.jit(kernel),
        signature={"a": "*fp16", "b": "*fp16", "out": "*fp32", "size": "constexpr"},
        constexprs={"size": SIZE},
    )
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32))
    found = re.search(
        r"^\.version (\S+)$.*?^\.target (\S+?)(?:,|$)", made.asm["ptx"], re.MULTILINE | re.DOTALL
    )
    return {
        "target": f"sm_{arch}{'a' if arch >= 90 else ''}",
        "ptx": found[1] if found else "",
        "ptx_target": found[2] if found else "",
        "cubin_bytes": len(made.asm["cubin"]),
    }


def arch_of(capability: str) -> int:
    """Return 121 for 12.1."""
    return int("".join(re.findall(r"\d+", capability)[:2]))


def ran() -> dict[str, object] | None:
    """Run the kernel and compare it with torch. Return None without a GPU, or a torch for it."""
    try:
        # Without a driver torch finds no GPU either, but needs seconds for it.
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
    # A comparison with NaN is false.
    return {
        "gpu": torch.cuda.get_device_name(0),
        "largest_difference": difference,
        "is_right": bool(difference < TOLERANCE),
    }


def assembler(capability: str) -> str | None:
    """Return the path of the assembler that this Triton uses."""
    from triton import knobs

    blackwell = arch_of(capability) >= 100
    second = getattr(knobs.nvidia, "ptxas_blackwell", None) if blackwell else None
    return str((second or knobs.nvidia.ptxas).path)


def spot(name: str) -> str | None:
    """Return the file or folder from which a module would be imported."""
    with contextlib.suppress(ImportError, ValueError):
        found = importlib.util.find_spec(name)
        if found:
            return found.origin or next(iter(found.submodule_search_locations or []), None)
    return None


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--capability", default="12.1")
    arguments = parser.parse_args()
    record: dict[str, object] = {
        "triton_kernels": spot("triton_kernels"),
        "error": IMPORT_ERROR,
        "version": None,
        "file": None,
        "ran": None,
    }
    if triton is not None:
        record |= {"version": triton.__version__, "file": triton.__file__}
        # Any failure of compiler or driver is a result. Triton prints a kernel that cannot be
        # assembled in full.
        try:
            with contextlib.redirect_stdout(sys.stderr):
                record["ptxas"] = assembler(arguments.capability)
                record |= compiled(arguments.capability)
                record["ran"] = ran()
        except Exception as exc:
            record["error"] = f"{type(exc).__name__}: {exc}"
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
