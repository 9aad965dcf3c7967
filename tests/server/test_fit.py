"""Whether a model fits: into the one memory of a Spark, the GPU's own memory, or without a GPU."""

from dataclasses import replace

import pytest

from tests.machine.conftest import House, house
from workspace.core.paths import here
from workspace.server import fit, recipes
from workspace.server.fit import Free, Resident

__all__ = ["house"]
SPARK = Free(total_gib=119.7, available_gib=110.0, droppable_gib=10.0, is_unified=True)


def judged(
    free: Free, *args: str, device: str = "cuda", name: str = "gpt-oss-120b", **environment: str
) -> fit.Fit:
    return fit.judge(
        recipes.load(here(), name), [free], device=device, environment=environment, args=args
    )


def test_big_model_fits_an_empty_spark() -> None:
    found = judged(SPARK)
    assert (found.verdict, found.hint) == ("yes", None)
    assert found.takes_gib == pytest.approx(83.79)
    assert found.needs_gib == pytest.approx(67.9, abs=0.1)


def test_page_cache_on_unified_memory_is_to_be_dropped_first() -> None:
    full_of_cache = replace(SPARK, available_gib=100.0, droppable_gib=90.0)
    assert (judged(full_of_cache).verdict, judged(full_of_cache).hint) == (
        "after drop-caches",
        "./scripts/inv drop-caches",
    )
    # It does not matter to a GPU with memory of its own.
    assert judged(replace(full_of_cache, is_unified=False)).verdict == "yes"


def test_too_large_share_suggests_values_that_fit_into_the_free_memory() -> None:
    loaded = replace(
        SPARK, available_gib=80.0, droppable_gib=0.0, residents=(Resident(4711, "python", None),)
    )
    found = judged(loaded)
    assert found.verdict == "no"
    assert "the GPU is held by 4711 (python)" in found.sentence
    assert (
        found.hint
        == "./scripts/inv serve gpt-oss-120b -- --gpu-memory-utilization 0.65    leaves room for"
        " it, as does --kv-cache-memory-bytes 12025908428"
    )
    assert judged(loaded, "--gpu-memory-utilization", "0.65").verdict == "yes"
    assert judged(loaded, "--kv-cache-memory-bytes=11G").verdict == "yes"
    assert judged(loaded, "--kv-cache-memory-bytes=14G").verdict == "no"


def test_share_below_the_models_need_is_found_before_the_load() -> None:
    found = judged(SPARK, "--gpu-memory-utilization", "0.5")
    assert (found.verdict, found.hint) == (
        "no",
        "./scripts/inv serve gpt-oss-120b -- --gpu-memory-utilization 0.58",
    )
    assert "gets too little: 59.9 GiB with these flags; needs 67.9 GiB" in found.sentence
    assert judged(SPARK, "--gpu-memory-utilization", "0.58").verdict == "yes"
    assert judged(SPARK, "--device-memory-utilization", "0.5") == found


def test_no_value_is_suggested_if_only_ending_other_processes_helps() -> None:
    found = judged(replace(SPARK, available_gib=50.0, residents=(Resident(7, "vllm", 60.0),)))
    assert found.hint == "ps -fp '7'    end the processes that hold the GPU first"


def test_length_on_the_command_line_counts() -> None:
    recipe = recipes.load(here(), "gpt-oss-120b")
    assert fit.needs_gib(recipe, ["--max-model-len", "128K"]) - fit.needs_gib(
        recipe
    ) == pytest.approx((131072 - 32000) * 36 / 2**20)
    # vLLM then takes the length that fits.
    assert fit.needs_gib(recipe, ["--max-model-len=auto"]) == 66.8


def test_without_a_gpu_the_environment_or_the_share_sets_the_size_of_the_cache() -> None:
    small = Free(23.5, 20.0, 2.0, is_unified=False)
    assert judged(
        small, device="cpu", name="tiny", VLLM_CPU_KVCACHE_SPACE="1"
    ).takes_gib == pytest.approx(2.6)
    assert judged(small, device="cpu", name="tiny").takes_gib == pytest.approx(2.35)
    assert judged(small, "--gpu-memory-utilization=0.05", device="cpu", name="tiny").verdict == "no"
    full = judged(
        replace(small, available_gib=8.0), device="cpu", name="tiny", VLLM_CPU_KVCACHE_SPACE="12"
    )
    assert (full.verdict, full.hint) == (
        "no",
        "echo VLLM_CPU_KVCACHE_SPACE=4 >> .env    leaves room for it",
    )


GB10 = """case "$*" in
*compute_cap*) echo "NVIDIA GB10, 12.1, 580.95";;
*memory.total*) echo "[N/A], [N/A]";;
*compute-apps*) echo "4711, /usr/bin/python3, [N/A]"; echo "not, a, row, at all";;
esac"""
H100 = """case "$*" in
*compute_cap*) echo "NVIDIA H100, 9.0, 580.95";;
*memory.total*) echo "81559, 70000";;
*compute-apps*) echo "12, vllm, 10240";;
esac"""


def test_spark_shares_the_machines_memory_and_another_gpu_has_its_own(house: House) -> None:
    house.program("nvidia-smi", GB10)
    spark = fit.observe(house.machine(), device="cuda")[0]
    assert spark.is_unified
    assert spark.residents == (Resident(4711, "python3", None),)
    assert 0 < spark.available_gib <= spark.total_gib
    house.program("nvidia-smi", H100)
    other = fit.observe(house.machine(), device="cuda")[0]
    assert (other.is_unified, round(other.total_gib), round(other.available_gib)) == (False, 80, 68)
    assert other.residents == (Resident(12, "vllm", 10.0),)


@pytest.mark.parametrize("script", ["exit 9", "echo garbage", "echo ', , ,'"])
def test_failing_driver_counts_as_no_gpu(house: House, script: str) -> None:
    house.program("nvidia-smi", script)
    assert fit.observe(house.machine(), device="cuda")[0].total_gib > 0


TWO = """case "$*" in
*compute_cap*) echo "NVIDIA GB10, 12.1, 580"; echo "NVIDIA GeForce RTX 4090, 8.9, 580";;
*memory.total*) echo "124610, 3820"; echo "24564, 24000";;
*compute-apps*gpu_uuid*) echo "7, vllm, 100, GPU-aaaa"; echo "8, python, 200, GPU-bbbb";;
*uuid*) echo GPU-aaaa; echo GPU-bbbb;;
esac"""


def seen(house: House, visible: str | None = None, *args: str) -> list[tuple[str, bool]]:
    house.program("nvidia-smi", TWO)
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    frees = fit.observe(house.machine(), device="cuda", environment=environment, args=args)
    return [(free.gpu, free.is_unified) for free in frees]


def test_gpus_are_those_that_the_environment_shows_in_its_order(house: House) -> None:
    spark, card = ("GPU 0, NVIDIA GB10", True), ("GPU 1, NVIDIA GeForce RTX 4090", False)
    assert seen(house) == [spark, card]
    assert seen(house, "1") == [card]
    assert seen(house, "1, 0") == [card, spark]
    assert seen(house, "GPU-bbbb") == [card]
    # CUDA stops at the first entry that it does not know.
    assert seen(house, "1,7,0") == [card]
    assert seen(house, "") == []
    # Places among the visible GPUs, or UUIDs.
    assert seen(house, "1,0", "--device-ids", "0") == [card]
    assert seen(house, None, "--device-ids=1,0") == [card, spark]
    assert seen(house, None, "--device-ids", "GPU-bbbb") == [card]
    assert seen(house, "1", "--device-ids", "7") == []


def test_processes_of_another_gpu_are_not_in_the_way(house: House) -> None:
    house.program("nvidia-smi", TWO)
    environment = {"CUDA_VISIBLE_DEVICES": "1"}
    (card,) = fit.observe(house.machine(), device="cuda", environment=environment)
    assert [resident.pid for resident in card.residents] == [8]


CARD = Free(24.0, 23.0, 0.0, is_unified=False, gpu="GPU 0, L4", host_gib=50.0)


def on(frees: list[Free], *args: str, name: str = "qwen3-8b") -> fit.Fit:
    recipe = recipes.load(here(), name)
    return fit.judge(recipe, frees, device="cuda", environment={}, args=args)


@pytest.mark.parametrize(
    "args",
    [
        ("--tensor-parallel-size", "2"),
        ("-tp", "2"),
        ("--pipeline-parallel-size=2",),
        ("-pp", "2"),
    ],
)
def test_model_is_divided_over_the_gpus_that_hold_its_parts(args: tuple[str, ...]) -> None:
    one, two = on([CARD], "--gpu-memory-utilization=0.9"), on([CARD, CARD], *args)
    assert one.needs_gib > two.needs_gib > one.needs_gib / 2
    assert on([CARD], *args).verdict == "no"
    assert "takes 2 GPUs" in on([CARD], *args).sentence


def test_each_data_parallel_rank_holds_the_whole_model() -> None:
    two = on([CARD, CARD], "-dp", "2", "--gpu-memory-utilization=0.9")
    assert two.needs_gib == on([CARD], "--gpu-memory-utilization=0.9").needs_gib
    assert "takes 4 GPUs (tensor 2 × data 2), 2 are visible" in (
        on([CARD, CARD], "-dp", "2", "-tp", "2").sentence
    )
    # The other ranks run on other machines.
    for elsewhere in (("-dpl", "1"), ("--data-parallel-rank", "1"), ("--nnodes", "2")):
        assert "visible" not in on([CARD], "-dp", "2", *elsewhere).sentence
    assert "visible" not in on([CARD], "-tp=2", "--distributed-executor-backend=ray").sentence


def test_gpu_with_the_least_room_decides_and_is_named() -> None:
    full = replace(CARD, available_gib=3.0, gpu="GPU 1, L4")
    found = on([CARD, full], "--tensor-parallel-size=2", "--gpu-memory-utilization=0.9")
    assert found.verdict == "no"
    assert "on GPU 1, L4" in found.sentence
    assert on([CARD, full], "--gpu-memory-utilization=0.9").free == CARD


def test_offloaded_weights_leave_a_gpus_own_memory_but_not_unified_memory() -> None:
    share = "--gpu-memory-utilization=0.9"
    plain, offloaded = on([CARD], share), on([CARD], share, "--cpu-offload-gb", "10")
    assert plain.needs_gib - offloaded.needs_gib == pytest.approx(10)
    unified = on([SPARK], share, "--cpu-offload-gb", "10")
    assert unified.needs_gib == plain.needs_gib
    more = on([SPARK], share, "--kv-offloading-size", "10")
    assert more.needs_gib == pytest.approx(plain.needs_gib + 10)
    assert "60.0 GiB are to be offloaded, and 50.0 GiB" in (
        on([CARD], share, "--cpu-offload-gb", "60").sentence
    )
