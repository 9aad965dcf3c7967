"""The door of A/B: `python -m workspace.bench.ab`, run by `nox -s ab` with the tool environment's Python."""

import argparse
import sys

from workspace import door
from workspace.bench import compare, workload
from workspace.bench.ab import run, trees
from workspace.bench.ab.duel import Asked
from workspace.bench.verdict import FACTOR, MIN_STARTS
from workspace.core import layout as layouts

MOST_REPEATS = 1000


def main() -> int:
    words = sys.argv[1:]
    ours, for_vllm = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    description = "Measure the working tree and a base alternately, each in an arm with a build of its own, and judge. The same command goes on after an end."
    parser = argparse.ArgumentParser(prog="nox -s ab --", description=description, epilog="Words after a second -- go to vllm bench, or to vllm serve.")
    parser.add_argument("kind", nargs="?", choices=workload.KINDS, default="latency", help="what is measured (default latency)")
    parser.add_argument("--base", default=trees.PIN, metavar="BASE", help="pin: the pinned tag without patches (default); a commit of the workspace; a record")
    parser.add_argument("--model", default=workload.TINY, help="tiny, smollm2, a folder, or a model on the hub (default tiny)")
    parser.add_argument("--repeat", type=int, default=MIN_STARTS, metavar="N", help=f"starts of each arm (default and at least {MIN_STARTS})")
    parser.add_argument("--factor", default=f"{FACTOR * 100:g}", metavar="PERCENT", help=f"a change up to this does not count (default {FACTOR * 100:g})")
    parser.add_argument("--each-patch", action="store_true", help="leave one patch out at a time, and say what each costs")
    parser.add_argument("--busy", action="store_true", help="measure although something else uses the machine")
    arguments = parser.parse_args(ours)
    if not MIN_STARTS <= arguments.repeat <= MOST_REPEATS:
        parser.error(f"--repeat is a number from {MIN_STARTS} to {MOST_REPEATS}: fewer starts decide nothing")
    if arguments.each_patch and arguments.base != trees.PIN:
        parser.error("--each-patch compares the series with itself: --base is for one comparison")
    layout = layouts.here()

    def work() -> None:
        factor = compare.parsed_factor(arguments.factor)
        asked = Asked(arguments.kind, arguments.base, arguments.model, arguments.repeat, factor, arguments.each_patch, arguments.busy, tuple(for_vllm))
        run.run(layout, door.load_settings(layout), asked, console=door.console())

    return door.run(work)


if __name__ == "__main__":
    sys.exit(main())
