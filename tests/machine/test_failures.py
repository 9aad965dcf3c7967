"""The cause of a failure in a log of vLLM or of a build, and whether memory was short.

logs/ has output of real runs of vLLM 0.31.0 on a CPU, with the paths shortened: a signal to the
engine, a port that was taken, folders that lack a file. What other logs are made of is the error
lines that users report in the threads of symptoms.toml.
"""

import copy
import re
import shlex
import time
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from workspace.cli.program import program
from workspace.cli.sessions import SESSIONS
from workspace.core import records
from workspace.machine import failures
from workspace.machine.failures import Symptom, judge

LOGS = Path(__file__).with_name("logs")
FRONT = "(APIServer pid=6) "
ENGINE = "(EngineCore pid=7) ERROR 11-23 20:01:02 [core.py:946] "
FOLLOWS = (
    f"{FRONT}RuntimeError: Engine core initialization failed. See root cause above. Failed core"
    " proc(s): {}"
)


@pytest.mark.parametrize(
    ("lines", "first", "lack"),
    [
        (
            [
                (
                    f"{FRONT}pydantic_core._pydantic_core.ValidationError: 1 validation error for"
                    " ModelConfig"
                ),
                (
                    f"{FRONT}  Value error, User-specified max_model_len (99999) is greater than"
                    " the derived [type=value_error, input_value=ArgsKwargs(()), input]"
                ),
            ],
            (
                "ValidationError: 1 validation error for ModelConfig: Value error, User-specified"
                " max_model_len (99999) is greater than the derived"
            ),
            None,
        ),
        (
            [
                "usage: vllm serve [model_tag] [options]",
                "vllm serve: error: argument --dtype: invalid choice: 'x'",
            ],
            "vllm serve: error: argument --dtype",
            None,
        ),
        (
            [
                "\x1b[0;36m(Worker pid=9)\x1b[0;0m OSError: cannot open x",
                f"{ENGINE}Exception: WorkerProc initialization failed",
                FOLLOWS,
            ],
            "OSError: cannot",
            None,
        ),
        (
            # Seen after kill -9, -15 and -11 of the engine: the front looks before it has a status.
            [FOLLOWS],
            "the engine ended without an error of its own",
            "memory",
        ),
        (
            [f"{FRONT}INFO 11-23 20:01:02 [api_server.py:1] Error handling is on", "all is well"],
            None,
            None,
        ),
    ],
)
def test_first_cause_is_found_among_the_errors_that_follow_from_it(
    lines: list[str], first: str | None, lack: str | None
) -> None:
    reading = judge([*lines, "WARNING: x"], status=1)
    assert (reading.first or "").startswith(first or "")
    assert (reading.first is None, reading.lack) == (first is None, lack)


def test_server_that_ended_without_a_message_lacked_nothing() -> None:
    assert judge(["loading"], status=1).lack is None


@pytest.mark.parametrize("status", [-9, 137, -15, 143])
def test_front_ended_by_a_signal_of_others_lacked_memory(status: int) -> None:
    assert judge(["loading"], status=status, kills=1).lack == "memory"
    assert judge(["KeyError: 'x'"], status=status).lack is None


@pytest.mark.parametrize(
    ("log", "name", "lack"),
    [
        ("kill-start-9", "process-vanished", "memory"),
        ("kill-start-15", "process-vanished", "memory"),
        ("kill-start-11", "segmentation-fault", None),
        ("kill-serving-9", "process-vanished", "memory"),
        ("bad-flag", "flag-unknown", None),
        ("port-taken", "port-taken", None),
        ("no-config", "model-not-found", None),
        ("no-weights", "weights-missing", None),
        ("no-tokenizer", "tokenizer-missing", None),
        ("kill-start-6", "process-vanished", "memory"),
        ("kill-serving-15", "process-vanished", "memory"),
        ("arch", "architecture-unknown", None),
        ("cut-weights", "weights-damaged", None),
        ("hub", "not-on-this-machine", None),
        ("inductor-failed", "no-compiler", None),
        ("inductor-killed", "compiler-killed", "memory"),
        ("kv", "little-memory-for-cache", None),
        ("bench-kv", "little-memory-for-cache", None),
        ("long", "length-beyond-model", None),
        ("lora", "adapter-missing", None),
    ],
)
def test_cause_is_found_in_logs_of_real_runs(log: str, name: str, lack: str | None) -> None:
    reading = failures.read(LOGS / f"{log}.log", status=1)
    assert reading.symptom
    assert (reading.symptom.name, reading.lack) == (name, lack)
    assert "See root cause above" not in (reading.sentence or "")


def test_every_log_of_a_real_run_is_judged() -> None:
    assert all(failures.read(log, status=1).sentence for log in LOGS.glob("*.log"))


@pytest.mark.parametrize(
    ("ended", "sentence", "lack"),
    [
        ("{'EngineCore': -9}", "the engine was killed (SIGKILL)", None),
        ("{'EngineCore_DP1': -9}", "the engine was killed (SIGKILL)", None),
        (
            "{'EngineCore_DP0': -15}",
            "the engine was ended (SIGTERM), which earlyoom sends when memory runs out",
            "memory",
        ),
        ("{'EngineCore': -11}", "the engine crashed in compiled code (SIGSEGV)", None),
        ("{'EngineCore': -6}", "the engine crashed in compiled code (SIGABRT)", None),
    ],
)
def test_signal_that_ended_the_engine_is_the_cause(
    ended: str, sentence: str, lack: str | None
) -> None:
    reading = judge([FOLLOWS.replace("{}", ended)], status=1)
    assert (reading.sentence, reading.lack, reading.speaker) == (sentence, lack, "front")


@pytest.mark.parametrize(("status", "who"), [(1, "the engine"), (-9, "the server")])
def test_kill_is_for_lack_of_memory_where_the_kernel_counts_one(status: int, who: str) -> None:
    lines = [FOLLOWS.replace("{}", "{'EngineCore': -9}")] if status == 1 else []
    reading = judge(lines, status=status, kills=1)
    assert reading.symptom
    assert reading.symptom.next_command() == "./scripts/inv drop-caches"
    assert (reading.sentence, reading.lack) == (
        f"{who} was killed (SIGKILL): memory ran out",
        "memory",
    )
    strange = judge(lines, status=status)
    assert (strange.sentence, strange.lack) == (f"{who} was killed (SIGKILL)", None)


@pytest.mark.parametrize(
    "line",
    [
        "Engine core proc EngineCore died unexpectedly, shutting down client.",
        "WorkerProc hit an exception: WorkerProc VllmWorker-1 died unexpectedly",
        "Worker proc VllmWorker-0 died unexpectedly (exit code: -9), shutting down executor.",
        "Process EngineCore_DP0 (PID: 77) died with exit code -15",
    ],
)
def test_process_that_ended_without_an_error_lacked_memory(line: str) -> None:
    for prefix in (f"{FRONT}ERROR 06-20 10:12:07 [core_client.py:664] ", ENGINE, ""):
        assert judge([f"{prefix}{line}"], status=0, kills=1).lack == "memory"


def test_error_of_an_engine_goes_before_the_signals_that_follow_from_it() -> None:
    lines = [
        f"{ENGINE}ValueError: the model says no",
        FOLLOWS.replace("{}", "{'EngineCore_DP0': 1, 'EngineCore_DP1': -15}"),
    ]
    reading = judge(lines, status=1)
    assert (reading.first, reading.lack) == ("ValueError: the model says no", None)
    assert reading.speaker == "engine"


def traceback(*exceptions: str, prefix: str = "") -> list[str]:
    """Return exceptions as Python prints them, each raised while the former was handled."""
    lines = []
    for exception in exceptions:
        if lines:
            lines += ["", f"{failures._HANDLING}", ""]
        lines += [
            "Traceback (most recent call last):",
            '  File "/x/vllm/a.py", line 3, in start',
            '    raise ValueError("No available memory for the cache blocks")',
            exception,
        ]
    return [f"{prefix}{line}".rstrip() for line in lines]


@pytest.mark.parametrize(
    ("lines", "first"),
    [
        (traceback("KeyError: 'x'", "ValueError: x is unknown"), "ValueError: x is unknown"),
        (traceback("ValueError: no", "TypeError: clean-up"), "ValueError: no"),
        (traceback("ValueError: no", prefix=ENGINE), "ValueError: no"),
        (
            # A thread of the front that only reports usage.
            [
                "Exception in thread Thread-2 (_report):",
                *traceback("KeyError: 'x'", "OSError: no route"),
                *traceback("ValueError: no", prefix=ENGINE),
            ],
            "ValueError: no",
        ),
        (
            # One request failed, long before.
            [
                "ERROR:    Exception in ASGI application",
                *traceback("RuntimeError: Response content longer than Content-Length"),
                'INFO:     127.0.0.1:36512 - "GET /health HTTP/1.1" 200 OK',
                FOLLOWS.replace("{}", "{'EngineCore': -9}"),
            ],
            "the engine was killed (SIGKILL)",
        ),
        (
            [
                f"{ENGINE}EngineCore hit an exception: Traceback (most recent call last):",
                f'{ENGINE}  File "/x/a.py", line 3, in start',
                f'{ENGINE}    raise ValueError("CUDA out of memory")',
                f"{ENGINE}ValueError: no",
            ],
            "ValueError: no",
        ),
        (
            [
                "thread '<unnamed>' panicked at 'called `unwrap()` on an `Err`', a.rs:21:50",
                "stack backtrace:",
            ],
            "thread '<unnamed>' panicked at 'called `unwrap()` on an `Err`', a.rs:21:50",
        ),
        (
            [
                f"{ENGINE}ValueError: tried without success",
                f"{ENGINE.replace('ERROR', 'INFO')}Loading weights took 88 seconds",
                f"{ENGINE}TypeError: this ended it",
            ],
            "TypeError: this ended it",
        ),
        (
            [
                "  + Exception Group Traceback (most recent call last):",
                '  |   File "/x/a.py", line 3, in main',
                "  | ExceptionGroup: unhandled errors in a TaskGroup (1 sub-exception)",
                "  +-+---------------- 1 ----------------",
                "    | Traceback (most recent call last):",
                '    |   File "/x/b.py", line 7, in one',
                "    | ValueError: the inner",
                "    +------------------------------------",
            ],
            "ValueError: the inner",
        ),
        (
            [
                "thread '<unnamed>' panicked at src/lib.rs:12:5:",
                "called `Result::unwrap()` on an `Err` value: NotFound",
                "note: run with `RUST_BACKTRACE=1` environment variable",
            ],
            "thread '<unnamed>' panicked at src/lib.rs:12:5: called `Result::unwrap()`",
        ),
        (
            [
                "terminate called after throwing an instance of 'c10::Error'",
                "  what():  the reason",
            ],
            "terminate called after throwing an instance of 'c10::Error' what(): the reason",
        ),
        (
            [
                "subprocess.CalledProcessError: Command '['x']' returned non-zero exit status 1.",
                "",
                "Output:",
                "main.cpp:3:1: error: unknown type name 'half'",
            ],
            (
                "subprocess.CalledProcessError: Command '['x']' returned non-zero exit status 1."
                " main.cpp:3:1: error: unknown type name 'half'"
            ),
        ),
        (
            ["/bin/sh: 1: lsmod: not found", f"{ENGINE}ValueError: no", FOLLOWS],
            "ValueError: no",
        ),
        (["foo: bar: not found"], "foo: bar: not found"),
    ],
)
def test_cause_is_told_from_what_stands_before_and_below_it(lines: list[str], first: str) -> None:
    assert (judge(lines, status=1).first or "").startswith(first)


def test_killed_compiler_of_the_first_start_goes_before_the_exception_that_reports_it() -> None:
    lines = [
        "RuntimeError: Ninja build failed. Ninja output:",
        "[1/85] /usr/local/cuda/bin/nvcc -c a.cu -o a.cuda.o",
        "FAILED: [code=137] a.cuda.o",
        "Killed",
        "ninja: build stopped: subcommand failed.",
    ]
    reading = judge([*(f"{ENGINE}{line}" for line in lines), FOLLOWS], status=1)
    assert (reading.lack, reading.symptom and reading.symptom.name) == ("memory", "compiler-killed")


@pytest.mark.parametrize(
    ("prefix", "speaker"),
    [
        ("(APIServer pid=1) ERROR 06-20 10:12:07 [core_client.py:664] ", "front"),
        ("(EngineCore_DP0 pid=79) ERROR 01-12 01:09:14 [core.py:708] ", "engine"),
        ("(EngineCore pid=8727) (Worker_TP0 pid=8729) ERROR 08-19 18:34:27 [x.py:1] ", "worker"),
        ("(VllmWorker rank=0 pid=233) ", "worker"),
        ("(RayWorkerWrapper pid=880, ip=10.53.120.118) ", "worker"),
        ("\x1b[0;36m(Worker pid=9)\x1b[0;0m [rank0]: ", "worker"),
        ("ERROR 12-19 01:22:33 engine.py:366] ", None),
        ("E0226 19:58:00.945000 125 torch/_inductor/select_algorithm.py:2820] ", None),
        ("", None),
    ],
)
def test_process_that_speaks_is_known_by_its_prefix(prefix: str, speaker: str | None) -> None:
    reading = judge([f"{prefix}ValueError: no"], status=1)
    assert (reading.first, reading.speaker) == ("ValueError: no", speaker)
    assert failures.without_prefix(f"{prefix}ValueError: no") == "ValueError: no"


def test_output_of_the_compiler_below_the_exception_names_the_symptom() -> None:
    lines = [
        "triton.runtime.errors.PTXASError: PTXAS error: Internal Triton PTX codegen error",
        "`ptxas` stderr:",
        "ptxas fatal   : Value 'sm_121a' is not defined for option 'gpu-name'",
    ]
    reading = judge([*(f"{ENGINE}{line}" for line in lines), FOLLOWS], status=1)
    assert (reading.sentence or "").endswith(
        ": ptxas fatal : Value 'sm_121a' is not defined for option 'gpu-name'"
    )
    assert reading.symptom
    assert reading.symptom.next_command() == "./scripts/inv fix-triton"


@pytest.mark.parametrize("symptom", failures.symptoms(), ids=lambda symptom: symptom.name)
def test_line_of_each_row_shows_the_row(symptom: Symptom) -> None:
    assert judge([symptom.line], status=1).symptom is symptom
    assert symptom.source
    assert not symptom.cause.endswith(".")


@pytest.mark.parametrize(
    "symptom",
    [symptom for symptom in failures.symptoms() if not symptom.is_last_resort],
    ids=lambda symptom: symptom.name,
)
def test_symptom_of_an_engine_is_found_among_what_follows_from_it(symptom: Symptom) -> None:
    lines = [
        f"{FRONT}INFO 11-30 15:06:36 [model.py:699] Resolved architecture: LlamaForCausalLM",
        f"{ENGINE}EngineCore failed to start.",
        *traceback(symptom.line.strip(), prefix=ENGINE),
        "Process EngineCore:",
        *traceback("RuntimeError: Worker failed with error 'x'", symptom.line.strip()),
        *traceback(FOLLOWS.removeprefix(FRONT), prefix=FRONT),
    ]
    reading = judge(lines, status=1)
    assert (reading.symptom, reading.lack) == (symptom, symptom.lack)
    assert reading.speaker in ("engine", None)


@pytest.mark.parametrize("row", failures.harmless(), ids=lambda row: row.pattern)
def test_harmless_line_is_no_cause(row: failures.Harmless) -> None:
    assert judge([row.line], status=1).first is None
    assert judge([row.line, "ValueError: no"], status=1).first == "ValueError: no"


def test_rows_have_no_key_that_is_not_read() -> None:
    for name, kind in (("symptom", Symptom), ("harmless", failures.Harmless)):
        rows = records.convert(failures._table()[name], list[dict[str, object]])
        known = {each.name for each in fields(kind)}
        assert [row for row in rows if row.keys() - known] == []


def test_table_is_large_and_has_no_name_twice() -> None:
    names = [symptom.name for symptom in failures.symptoms()]
    assert len(names) == len(set(names)) >= 30


# Programs of the system that a hint may call, and of the built environment.
PROGRAMS = {"df", "ip", "journalctl", "ss", ".vllm/bin/hf"}


@pytest.mark.parametrize("symptom", failures.symptoms(), ids=lambda symptom: symptom.name)
def test_hint_of_each_row_is_a_command_that_exists(symptom: Symptom) -> None:
    hint = symptom.next_command(name="tiny", typed="./scripts/inv serve tiny")
    assert hint
    assert "{" not in hint
    program_name, *args = shlex.split(re.sub(r"^[A-Z_]+=\w+ ", "", hint.partition("    ")[0]))
    if program_name == "./scripts/nox":
        assert args in [["-s", name] for name in SESSIONS]
    elif program_name == "./scripts/inv":
        parser = program()
        # A parser takes the help texts out of the tasks, which other tests read.
        parser.namespace = copy.deepcopy(parser.namespace)
        parser.create_config()
        parser.parse_core([program_name, *args])
        parser.parse_collection()
        parser.parse_tasks()
        assert len(parser.tasks) == 1
    else:
        assert program_name in PROGRAMS


def test_hint_that_needs_what_is_not_known_is_left_out() -> None:
    rows = {symptom.name: symptom for symptom in failures.symptoms()}
    assert rows["weights-damaged"].next_command() is None
    assert rows["remote-code"].next_command(name="tiny") is None
    assert rows["nccl-failed"].next_command(name="tiny") is None
    assert rows["weights-damaged"].next_command(name="a b") == "./scripts/inv serve.fetch 'a b'"
    typed = "./scripts/inv serve tiny -- --port 8001"
    assert rows["remote-code"].next_command(typed=typed) == f"{typed} --trust-remote-code"


ROWS = some.sampled_from([symptom for symptom in failures.symptoms() if not symptom.is_last_resort])
QUIET = some.sampled_from(
    [
        f"{FRONT}INFO 11-30 15:11:08 [launcher.py:69] Application startup complete.",
        "/bin/sh: 1: lsmod: not found",
        "libibverbs: Warning: couldn't open config directory '/etc/libibverbs.d'.",
        f"{FRONT}WARNING 11-30 15:06:36 [cpu.py:207] Triton is not installed.",
        "W1130 15:06:08.237000 18762 torch/_library/triton.py:53] Triton not available",
        "",
    ]
)


@given(some.lists(some.binary(max_size=300), max_size=30), some.none() | some.integers(-64, 255))
def test_judge_never_raises(lines: list[bytes], status: int | None) -> None:
    judge([line.decode(errors="replace") for line in lines], status=status)


@given(some.lists(QUIET, max_size=40), ROWS, some.lists(QUIET, max_size=5))
def test_symptom_is_found_below_harmless_lines(
    above: list[str], symptom: Symptom, below: list[str]
) -> None:
    assert judge([*above, symptom.line, *below], status=1).symptom is symptom


@given(ROWS, some.sampled_from(["INFO 11-30 15:11:09 [request_logger.py:65] ", "INFO:     "]))
def test_symptom_that_a_user_quotes_is_no_cause(symptom: Symptom, level: str) -> None:
    access = f'{FRONT}{level}127.0.0.1:1 - "POST /v1/x?q={symptom.line}" 200 OK'
    prompt = f"{FRONT}{level}Received request cmpl-8: prompt: {symptom.line!r}, params: None"
    dumped = f"{FRONT}ERROR 11-30 15:11:09 [dump_input.py:79] prompt={symptom.line!r}"
    assert judge([access, prompt, dumped], status=1).first is None


def seconds(piece: str, count: int) -> float:
    """Return the processor time for lines that are full of one piece."""
    line = piece * (failures.LONGEST_LINE // len(piece))
    started = time.process_time()
    judge([line] * count, status=1)
    return time.process_time() - started


@pytest.mark.parametrize("piece", ["(", "A.", "+-", "| ", "a: ", "\x1b[0m", "[1] ", "exit code -"])
def test_time_is_linear_in_the_number_of_lines(piece: str) -> None:
    assert seconds(piece, 40) < 20 * max(seconds(piece, 10), 0.01)


def test_no_pattern_is_slow_on_a_line_that_repeats_a_word_of_it() -> None:
    # A log of READ_BYTES has 500 such lines; a pattern that looks back and forth takes minutes.
    words = {
        word for symptom in failures.symptoms() for word in re.findall(r"[A-Za-z]+", symptom.line)
    }
    assert {word for word in words if seconds(word, 2) > 0.1} == set()


def test_cause_names_its_node_and_is_not_mixed_with_another_of_the_same_pid() -> None:
    lines = [
        "[node b] (Worker_TP1 pid=9) ERROR 11-23 20:01:02 [w.py:1] ValueError: no link",
        "[node a] (Worker_TP0 pid=9) INFO 11-23 20:01:03 [w.py:1] still at work",
        "[node a] (EngineCore pid=8) ERROR 11-23 20:01:04 [c.py:1] RuntimeError: closed by peer",
        "inv serve: error: node b ended its rank, with exit status 10",
    ]
    reading = failures.judge(lines, status=1)
    assert reading.first == "node b: ValueError: no link"
    assert reading.tail[1] == "node a: still at work"
    assert failures.without_prefix(lines[0]) == "node b: ValueError: no link"
    silent = failures.judge(["[node a] ok", "inv serve: error: no sign of life from b"], status=1)
    assert silent.first == "inv serve: error: no sign of life from b"
