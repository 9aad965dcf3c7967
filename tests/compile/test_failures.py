"""The first real failure in ninja's output, and the line that explains it."""

import pytest

from workspace.compile.ninja import Failures

REFUSED = [
    "FAILED: [code=1] CMakeFiles/t.dir/b.cu.o ",
    "/b/tickets/ticket nvcc -c b.cu -o CMakeFiles/t.dir/b.cu.o",
    "not compiled: another unit failed",
]
REAL = [
    "FAILED: [code=2] CMakeFiles/t.dir/a.cu.o ",
    "/b/tickets/ticket nvcc -DX=error:-1 -c a.cu -o CMakeFiles/t.dir/a.cu.o",
]


def read(*lines: str) -> Failures:
    """Return the failures in these lines of ninja's output."""
    failures = Failures()
    for line in lines:
        failures.read_line(line)
    return failures


def test_refused_units_are_ignored_before_and_after_the_failed_one() -> None:
    output = [
        "a.cu(3): warning #177-D: unused",
        "",
        "a.cu(7): error: expected a ;",
        "",
        "1 error detected in the compilation of a.cu",
    ]
    failures = read(
        "[1/9] Building",
        *REFUSED,
        *REAL,
        *output,
        *REFUSED,
        "ninja: build stopped: subcommand failed.",
    )
    assert failures.first is not None
    assert failures.first.output == "CMakeFiles/t.dir/a.cu.o"
    assert failures.first.error == "a.cu(7): error: expected a ;"
    assert failures.first.shown == tuple(output)


def test_failure_of_an_older_ninja_without_code_is_read() -> None:
    failures = read(
        "FAILED: a.o ", "cc -c a.c", "a.c:1:2: fatal error: b.h: No such file or directory"
    )
    assert failures.first is not None
    assert (failures.first.output, failures.first.error) == (
        "a.o",
        "a.c:1:2: fatal error: b.h: No such file or directory",
    )


def test_failure_of_a_nested_ninja_is_the_first() -> None:
    nested = [
        "[1/3] nvcc",
        "FAILED: x.o",
        "launcher nvcc x.cu",
        "x.cu(1): error: identifier is undefined",
        "ninja: build stopped",
        "RuntimeError: Error compiling",
    ]
    failures = read("FAILED: [code=1] deepgemm/.built ", "python build.py", *nested, *REFUSED)
    assert failures.first is not None
    # The outer command is a failure of its own only if it printed something before.
    assert failures.first.output in ("deepgemm/.built", "x.o")


@pytest.mark.parametrize(
    ("line", "is_error"),
    [
        ("nvcc fatal   : Unsupported gpu architecture 'compute_999'", True),
        ("ptxas fatal   : Ptx assembly aborted due to errors", True),
        ("/usr/bin/ld: x.o: undefined reference to `f()'", True),
        ("g++: fatal error: Killed signal terminated program cc1plus", True),
        ("nvcc error   : 'cicc' died due to signal 9 (Kill signal)", True),
        ("error[E0425]: cannot find value", True),
        ("ModuleNotFoundError: No module named 'jinja2'", True),
        ("CMake Error at x.cmake:3 (message):", True),
        ("a.cu(3): warning: this error handler is unused", False),
        ("-Werror=format-security -c a.c", False),
    ],
)
def test_line_that_explains_a_failure_is_found(line: str, is_error: bool) -> None:
    failures = read(*REAL, "first", line)
    assert failures.first is not None
    assert failures.first.error == (line if is_error else "first")


def test_command_without_output_is_a_failure_and_no_output_is_none() -> None:
    failures = read(*REAL)
    assert failures.first is not None
    assert failures.first.error == "it printed nothing"
    assert read("[1/1] Linking").first is None
    assert read(*REFUSED).first is None


def test_full_disk_is_detected_anywhere_in_the_output() -> None:
    assert read("[1/1] x", "ninja: error: WriteFile(x.rsp): No space left on device").has_no_space
    assert not read(*REAL).has_no_space


def test_very_long_template_errors_are_cut() -> None:
    failures = read(*REAL, *(f"a.cu({number}): error: no" for number in range(100_000)))
    assert failures.first is not None
    assert (len(failures.first.lines), len(failures.first.shown)) == (2000, 15)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("g++: fatal error: Killed signal terminated program cc1plus", "compiler-killed"),
        ("g++: fatal error: Terminated signal terminated program cc1plus", "compiler-terminated"),
        ("nvcc error   : 'cicc' died due to signal 15 (Terminated)", "compiler-terminated"),
        ("cc1plus: out of memory allocating 65536 bytes", "compiler-out-of-memory"),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_121a'", "nvcc-too-old"),
        # Of a server, not of a build: a message in the compiled source.
        ('a.cu(3): error: static assertion failed with "CUDA out of memory"', None),
    ],
)
def test_symptom_of_a_build_is_found_below_other_lines(line: str, name: str | None) -> None:
    failures = read(*REAL, "a.cu(3): warning #177-D: an error: of another kind", line)
    assert failures.first is not None
    symptom = failures.first.symptom
    assert (symptom.name if symptom else None) == name
    assert not name or failures.first.error == line
