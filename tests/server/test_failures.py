"""The cause of a failure in a log of vLLM, and whether memory was short."""

import pytest

from workspace.server import observation

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
                f"{ENGINE}torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
                FOLLOWS,
            ],
            "torch.OutOfMemoryError: CUDA out of memory.",
            "memory",
        ),
        (
            [
                (
                    f"{ENGINE}ValueError: Free memory on device cuda:0 (3/119 GiB) on startup is"
                    " less than desired GPU memory utilization (0.7, 83 GiB)."
                ),
                FOLLOWS,
            ],
            "ValueError: Free memory on device",
            "memory",
        ),
        (
            [
                (
                    f"{ENGINE}ValueError: To serve at least one request with the models's max seq"
                    " len (32000), (4 GiB KV cache is needed, which is larger"
                ),
                FOLLOWS,
            ],
            "ValueError: To serve",
            "cache",
        ),
        (
            [
                f"{ENGINE}ValueError: No available memory for the cache blocks. Try increasing",
                FOLLOWS,
            ],
            "ValueError: No available",
            "memory",
        ),
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
        ([FOLLOWS], "RuntimeError: Engine core initialization failed", None),
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
    reading = observation.judge([*lines, "WARNING: x"], status=1)
    assert (reading.first or "").startswith(first or "")
    assert (reading.first is None, reading.lack) == (first is None, lack)


def test_server_killed_without_a_message_lacked_memory() -> None:
    assert observation.judge(["loading"], status=-9).lack == "memory"
    assert observation.judge(["loading"], status=1).lack is None
