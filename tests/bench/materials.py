"""Small records for the tests of benchmarks, with random values of a realistic variation."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from workspace.bench.results import Conditions, Gpu, Machine, Record, Software, Source, Start

# The variation of six identical latency runs of the tiny model on two cores.
VARIATION = 0.025
IDLE = Conditions(load=0.1, processor_mhz=None)


def arm(
    seed: int, starts: int, *, mean: float = 1.0, slow: float = 0.0, variation: float = VARIATION
) -> list[float]:
    """Draw one value for each start, slower by `slow`."""
    draw = random.Random(seed)
    return [mean * (1 + slow) * draw.gauss(1, variation) for _ in range(starts)]


def start(samples: Mapping[str, Sequence[float]]) -> Start:
    return Start(
        "2026-11-20T10:00:00+00:00",
        15.0,
        IDLE,
        IDLE,
        {name: tuple(values) for name, values in samples.items()},
    )


def record(
    values: Sequence[float] = (1.0, 1.01, 0.99, 1.02, 0.98, 1.0),
    *,
    metric: str = "latency",
    label: str = "latency",
    tree: str = "a" * 40,
    repeat: int = 6,
) -> Record:
    """Make a record whose starts have one sample of one metric each."""
    return Record(
        kind="latency",
        label=label,
        time="2026-11-20T10:00:00+00:00",
        workspace="c" * 40,
        source=Source(
            "v0.31.0",
            "b" * 40,
            "d" * 40,
            tree,
            None,
            ("0001-faster.patch",),
            "precompiled",
            {"vllm/_C.abi3.so": "e" * 64},
        ),
        machine=Machine(
            "gb10-123456",
            "aarch64",
            "Cortex-X925",
            20,
            119.7,
            (Gpu("NVIDIA GB10", "12.1", "580.95"),),
        ),
        software=Software("0.31.0", "2.13.0", "3.7.1", "13.0", "3.12.3"),
        device="cuda",
        model="tiny",
        flags=("--enforce-eager",),
        environment={"VLLM_NO_USAGE_STATS": "1"},
        backends=("Using FLASH_ATTN backend",),
        repeat=repeat,
        starts=tuple(start({metric: [value]}) for value in values),
    )


def served(
    concurrencies: Sequence[int],
    *,
    seed: int = 0,
    slow: float = 0.0,
    starts: int = 6,
    tree: str = "a" * 40,
) -> Record:
    """Make a record of a server at several loads, forty requests each."""
    draw = random.Random(seed)
    found = []
    for _ in range(starts):
        samples: dict[str, list[float]] = {}
        for at in concurrencies:
            samples[f"output_throughput@{at}"] = [
                50 * at**0.6 / (1 + slow) * draw.gauss(1, VARIATION)
            ]
            samples[f"ttft@{at}"] = [
                draw.lognormvariate(4.5, 0.3) * (1 + slow) * at**0.3 for _ in range(40)
            ]
            samples[f"itl@{at}"] = [
                draw.lognormvariate(2.8, 0.2) * (1 + slow) * at**0.2 for _ in range(40)
            ]
        found.append(start(samples))
    return replace(record(tree=tree), kind="serve", starts=tuple(found))
