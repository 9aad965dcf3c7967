"""The metrics, the better direction of each, and the samples in vLLM's own result files.

All functions are pure. Only a finite number above zero is a sample: a rate of zero means that no
request was completed.
"""

import math
import re
import statistics
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Better = Literal["lower", "higher"]
# A label is part of a file name and of a command line.
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
PERCENTILES = (10, 25, 50, 75, 90, 99)


@dataclass(frozen=True)
class Metric:
    """A metric of vLLM's benchmarks; `unit` is the unit of its samples."""

    name: str
    unit: str
    better: Better
    meaning: str


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("latency", "s", "lower", "time for one batch of requests"),
        Metric("requests_per_second", "requests/s", "higher", "requests completed offline"),
        Metric("tokens_per_second", "tok/s", "higher", "tokens read and written offline"),
        Metric("cold_startup", "s", "lower", "start of the engine with empty caches"),
        Metric("cold_compilation", "s", "lower", "compilation with empty caches"),
        Metric("warm_startup", "s", "lower", "start of the engine with full caches"),
        Metric("warm_compilation", "s", "lower", "compilation with full caches"),
        Metric("request_throughput", "requests/s", "higher", "requests completed by the server"),
        Metric("output_throughput", "tok/s", "higher", "tokens written by the server"),
        Metric("ttft", "ms", "lower", "time to the first token of a request"),
        Metric("itl", "ms", "lower", "time between two tokens of a request"),
        Metric("tpot", "ms", "lower", "mean time for a token of a request after its first"),
        Metric("e2el", "ms", "lower", "time for a whole request"),
    )
}


def find(name: str) -> Metric | None:
    """Return the metric of a name such as `ttft`, or `ttft@8` (8 requests at once); else None."""
    base, at, concurrency = name.partition("@")
    if at and not re.fullmatch(r"[1-9][0-9]{0,5}", concurrency):
        return None
    return METRICS.get(base)


def known(name: str) -> Metric:
    """Return the metric of a name in a record. Records have known names only."""
    found = find(name)
    assert found is not None
    return found


def concurrency(name: str) -> int | None:
    """Return the requests at once of a sweep's metric, None for other metrics."""
    at = name.partition("@")[2]
    return int(at) if at else None


def samples(
    kind: str, result: Mapping[str, object], *, at: int | None = None
) -> dict[str, tuple[float, ...]]:
    """Return the samples in a result file of `vllm bench` by metric; `at`: a sweep's concurrency.

    Raises ValueError for a file without samples, and for a server with failed requests.
    """
    found: dict[str, Iterable[object]] = {}
    if kind == "latency":
        found["latency"] = _list(result.get("latencies"))
    elif kind == "throughput":
        found = {name: [result.get(name)] for name in ("requests_per_second", "tokens_per_second")}
    elif kind == "startup":
        found = {
            f"{phase}_{step}": _list(result.get(f"{phase}_{step}_times"))
            for phase in ("cold", "warm")
            for step in ("startup", "compilation")
        }
    else:
        found = _served(result)
    suffix = f"@{at}" if at else ""
    kept = {
        f"{name}{suffix}": tuple(float(value) for value in values if _is_sample(value))
        for name, values in found.items()
    }
    kept = {name: values for name, values in kept.items() if values}
    if not kept:
        raise ValueError("its result file has no measured number")
    return kept


def _served(result: Mapping[str, object]) -> dict[str, Iterable[object]]:
    completed, failed = result.get("completed"), result.get("failed", 0)
    if not isinstance(completed, int) or completed <= 0:
        raise ValueError(f"no request was completed, {failed} failed")
    if failed:
        raise ValueError(
            f"{failed} of {completed + failed if isinstance(failed, int) else failed} requests"
            " failed: the times of the others mean little"
        )
    found: dict[str, Iterable[object]] = {
        name: [result.get(name)] for name in ("request_throughput", "output_throughput")
    }
    first, between = (
        _list(result.get("ttfts")),
        [[gap for gap in _list(gaps) if _is_sample(gap)] for gaps in _list(result.get("itls"))],
    )
    found["ttft"] = [time * 1000 for time in first if _is_sample(time)]
    found["itl"] = [gap * 1000 for gaps in between for gap in gaps]
    found["tpot"] = [statistics.fmean(gaps) * 1000 for gaps in between if gaps]
    found["e2el"] = [
        (time + sum(gaps)) * 1000
        for time, gaps in zip(first, between, strict=False)
        if _is_sample(time)
    ]
    return found


def _list(found: object) -> Sequence[object]:
    return found if isinstance(found, list) else ()


def _is_sample(found: object) -> typing.TypeGuard[float]:
    return (
        isinstance(found, int | float)
        and not isinstance(found, bool)
        and math.isfinite(found)
        and found > 0
    )


def percentile(numbers: Sequence[float], percent: int) -> float:
    """Interpolate between the two nearest numbers, as numpy does by default."""
    if len(numbers) == 1:
        return numbers[0]
    return statistics.quantiles(numbers, n=100, method="inclusive")[percent - 1]


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return median and extremes and, of two values or more, the coefficient of variation."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return found | ({"cv": variation(values)} if len(values) > 1 else {})


def variation(values: Sequence[float]) -> float:
    """Return the standard deviation over the mean, of two values or more."""
    return statistics.stdev(values) / statistics.fmean(values)
