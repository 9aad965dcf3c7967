"""The door of the bisect: `python -m workspace.bench.bisect`, run by `nox -s bisect` with the tool environment's Python."""

import argparse
import sys
from pathlib import Path

from workspace import door
from workspace.bench.bisect import flow
from workspace.bench.bisect.course import Asked
from workspace.bench.verdict import FACTOR
from workspace.core import layout as layouts

TIMEOUT_S = Asked("").timeout_s
# A day; poll(2) counts milliseconds in 32 bits.
LONGEST_TIMEOUT_S = 86400.0


def main() -> int:
    description = "Find the upstream commit, or the patch, that turned good into bad. The same command goes on with a bisect that was ended."
    epilog = "A command's exit code: 0 good, 125 neither, 1 to 127 bad; anything above stops the bisect."
    parser = argparse.ArgumentParser(prog="nox -s bisect --", description=description, epilog=epilog)
    parser.add_argument("--good", metavar="REF", help="a tag or commit of vendor/vllm (default the last good state before the pin)")
    parser.add_argument("--bad", metavar="REF", help="a later one (default the pin)")
    parser.add_argument("--patches", action="store_true", help="search the series on the pin, patch by patch, and not upstream")
    parser.add_argument("--run", metavar="WHAT", help="smoke, a check of it such as parity.llama, bench:METRIC such as bench:latency, or a command line")
    parser.add_argument("--timeout-s", type=float, default=TIMEOUT_S, metavar="SECONDS", help=f"how long one answer may take (default {TIMEOUT_S:g})")
    parser.add_argument("--factor", default=f"{FACTOR * 100:g}", metavar="PERCENT", help="with bench:METRIC, a change up to this does not count (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found, and every step, to this file")
    parser.add_argument("--abort", action="store_true", help="give up the bisect that is under way")
    arguments = parser.parse_args()
    if not arguments.abort and not arguments.run:
        parser.error("--run says what tells good from bad")
    if arguments.patches and (arguments.good or arguments.bad):
        parser.error("--patches goes from the pin without patches to all of them: --good and --bad are for upstream's commits")
    if not 0 < arguments.timeout_s <= LONGEST_TIMEOUT_S:
        parser.error(f"--timeout-s is a number above 0 and at most {LONGEST_TIMEOUT_S:g}")
    layout = layouts.here()

    def work() -> None:
        if arguments.abort:
            flow.abort(layout, console=door.console())
            return
        asked = Asked(arguments.run, arguments.good, arguments.bad, arguments.patches, arguments.timeout_s, arguments.factor)
        flow.run(layout, door.load_settings(layout), asked, folder=Path.cwd(), json_file=arguments.json, console=door.console())

    return door.run(work)


if __name__ == "__main__":
    sys.exit(main())
