"""The door of the benchmarks: `python -m workspace.bench`, run by `nox -s bench` with the tool environment's Python."""

import argparse
import sys

from workspace import door
from workspace.bench import measure, metrics, workload
from workspace.bench.verdict import MIN_STARTS
from workspace.core import layout as layouts

MOST_REPEATS = 1000


def main() -> int:
    words = sys.argv[1:]
    ours, for_vllm = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    description = "Measure the built vLLM with its own benchmarks. The record goes to results/; its path is printed on stdout."
    parser = argparse.ArgumentParser(prog="nox -s bench --", description=description, epilog="Words after a second -- go to vllm bench, or to vllm serve.")
    parser.add_argument("kind", nargs="?", choices=workload.KINDS, default="latency", help="what is measured (default latency)")
    parser.add_argument("--model", default=workload.TINY, help="tiny, smollm2, a folder, or a model on the hub (default tiny)")
    parser.add_argument("--label", help="name of the record (default the kind)")
    parser.add_argument("--repeat", type=int, default=MIN_STARTS, metavar="N", help=f"starts of the process (default {MIN_STARTS}, the fewest for a verdict)")
    parser.add_argument("--sweep", action="store_true", help=f"with serve, {', '.join(map(str, workload.SWEEP))} requests at once")
    arguments = parser.parse_args(ours)
    if not 1 <= arguments.repeat <= MOST_REPEATS:
        parser.error(f"--repeat is a number from 1 to {MOST_REPEATS}")
    if arguments.label is not None and not metrics.LABEL.fullmatch(arguments.label):
        parser.error("--label is of letters, digits, dot, dash, plus and underscore, at most 64")
    if arguments.sweep and arguments.kind != "serve":
        parser.error("--sweep is for serve")
    asked = measure.Asked(arguments.kind, arguments.model, arguments.label, arguments.repeat, arguments.sweep, tuple(for_vllm))
    layout = layouts.here()

    def work() -> None:
        measure.run(layout, door.load_settings(layout), asked, console=door.console())

    return door.run(work)


if __name__ == "__main__":
    sys.exit(main())
