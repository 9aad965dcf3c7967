"""Which of ninja's failures is one, and which line of it says why."""

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


def heard(*lines: str) -> Failures:
    failures = Failures()
    for line in lines:
        failures.hear(line)
    return failures


def test_the_refused_are_left_out_before_and_after_the_one_that_failed() -> None:
    output = [
        "a.cu(3): warning #177-D: unused",
        "",
        "a.cu(7): error: expected a ;",
        "",
        "1 error detected in the compilation of a.cu",
    ]
    failures = heard(
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


def test_older_ninjas_name_no_code() -> None:
    failures = heard(
        "FAILED: a.o ", "cc -c a.c", "a.c:1:2: fatal error: b.h: No such file or directory"
    )
    assert failures.first is not None
    assert (failures.first.output, failures.first.error) == (
        "a.o",
        "a.c:1:2: fatal error: b.h: No such file or directory",
    )


def test_a_nested_ninjas_failure_is_the_first() -> None:
    nested = [
        "[1/3] nvcc",
        "FAILED: x.o",
        "ticket nvcc x.cu",
        "x.cu(1): error: identifier is undefined",
        "ninja: build stopped",
        "RuntimeError: Error compiling",
    ]
    failures = heard("FAILED: [code=1] deepgemm/.built ", "python build.py", *nested, *REFUSED)
    assert failures.first is not None
    # What the outer command said before is kept as a failure of its own only where it said
    # something.
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
def test_the_line_that_says_why_is_found(line: str, is_error: bool) -> None:
    failures = heard(*REAL, "first", line)
    assert failures.first is not None
    assert failures.first.error == (line if is_error else "first")


def test_a_command_that_says_nothing_fails_all_the_same_and_nothing_heard_is_none() -> None:
    failures = heard(*REAL)
    assert failures.first is not None
    assert failures.first.error == "it said nothing"
    assert heard("[1/1] Linking").first is None
    assert heard(*REFUSED).first is None


def test_a_full_disk_is_heard_wherever_it_is_said() -> None:
    assert heard("[1/1] x", "ninja: error: WriteFile(x.rsp): No space left on device").has_no_space
    assert not heard(*REAL).has_no_space


def test_a_book_of_template_errors_is_not_kept_whole() -> None:
    failures = heard(*REAL, *(f"a.cu({number}): error: no" for number in range(100_000)))
    assert failures.first is not None
    assert (len(failures.first.lines), len(failures.first.shown)) == (2000, 15)
