"""The command lines of the nox sessions: `python -m workspace.cli.sessions NAME [ARGUMENTS]`.

Each function parses, calls one function of the library and returns the exit code, as a verb of
`inv` does.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from workspace.cli import main
from workspace.core import paths as layouts

MOST_REPEATS = 1000
# One day, in seconds; poll(2) counts milliseconds in 32 bits.
LONGEST_TIMEOUT_S = 86400.0


def smoke_session(argv: Sequence[str]) -> int:
    """Judge whether the built vLLM computes rightly."""
    from workspace.checks import smoke

    description = (
        "Judge whether the built vLLM computes rightly. The record goes to stdout and"
        " .workspace/smoke.json."
    )
    parser = argparse.ArgumentParser(prog="nox -s smoke --", description=description)
    parser.add_argument(
        "--level",
        choices=("quick", "full"),
        default="quick",
        help="full adds experts, torch.compile, a real model",
    )
    parser.add_argument(
        "--model",
        default="tiny",
        metavar="NAME",
        help="compare this one too: smollm2, a folder, or a name whose files are on disk",
    )
    parser.add_argument(
        "--fail-fast",
        action="store_true",
        help="stop after the first probe of which a check failed",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the record to this file as well"
    )
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=smoke.TIMEOUT_S,
        metavar="SECONDS",
        help=f"how long each probe may take (default {smoke.TIMEOUT_S:g})",
    )
    arguments = parser.parse_args(argv)
    _require_timeout(parser, arguments.timeout_s)
    layout = layouts.here()

    def work() -> None:
        wanted = {
            "level": arguments.level,
            "model": arguments.model,
            "timeout_s": arguments.timeout_s,
            "is_fail_fast": arguments.fail_fast,
        }
        smoke.smoke(
            layout,
            main.load_settings(layout),
            console=main.console(),
            json_file=arguments.json,
            **wanted,
        )

    return main.run(work)


def record_good(argv: Sequence[str]) -> int:
    """Record the present state as known to be good, where the smoke has just passed on it; `nox -s
    smoke` runs it after the judgement.
    """
    argparse.ArgumentParser(prog="nox -s smoke").parse_args(argv)
    layout = layouts.here()

    def work() -> None:
        settings = main.load_settings(layout)
        from workspace.bump import known_good
        from workspace.install import plan

        known_good.record(layout, settings, plan.observe(layout, settings), console=main.console())

    return main.run(work)


def upstream_session(argv: Sequence[str]) -> int:
    """Run vLLM's own tests that the change reaches."""
    from workspace.checks import upstream

    ours, for_pytest = _split(argv)
    description = (
        "Run vLLM's own tests that the change reaches. The record goes to stdout and"
        " .workspace/upstream.json."
    )
    parser = argparse.ArgumentParser(
        prog="nox -s upstream --",
        description=description,
        epilog="Words after a second -- go to pytest.",
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="say which test files would be run, which not, and why; nothing need be built",
    )
    parser.add_argument(
        "--all-of",
        nargs="+",
        default=[],
        metavar="PATH",
        help="instead of what changed: a file or folder of vllm/, or tests themselves",
    )
    parser.add_argument(
        "--try-all",
        action="store_true",
        help="without a GPU, also those that upstream runs on GPUs only",
    )
    parser.add_argument("--online", action="store_true", help="let tests ask the hub for models")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the record to this file as well"
    )
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=upstream.TIMEOUT_S,
        metavar="SECONDS",
        help=f"how long a run may take (default {upstream.TIMEOUT_S:g})",
    )
    arguments = parser.parse_args(ours)
    _require_timeout(parser, arguments.timeout_s)
    options = upstream.UpstreamOptions(
        tuple(arguments.all_of),
        tuple(for_pytest),
        arguments.timeout_s,
        arguments.try_all,
        arguments.online,
    )
    layout = layouts.here()

    def work() -> None:
        upstream.run(
            layout,
            main.load_settings(layout),
            options,
            console=main.console(),
            json_file=arguments.json,
            is_list=arguments.list,
        )

    return main.run(work)


def bench_session(argv: Sequence[str]) -> int:
    """Measure the built vLLM with its own benchmarks."""
    from workspace.bench import measure, metrics, subject
    from workspace.bench.compare import MIN_STARTS

    ours, for_vllm = _split(argv)
    description = (
        "Measure the built vLLM with its own benchmarks. The record goes to results/; its path is"
        " printed on stdout."
    )
    parser = argparse.ArgumentParser(
        prog="nox -s bench --",
        description=description,
        epilog="Words after a second -- go to vllm bench, or to vllm serve.",
    )
    parser.add_argument(
        "kind",
        nargs="?",
        choices=subject.KINDS,
        default="latency",
        help="what is measured (default latency)",
    )
    parser.add_argument(
        "--model",
        default=subject.TINY,
        help="tiny, smollm2, a folder, or a model on the hub (default tiny)",
    )
    parser.add_argument("--label", help="name of the record (default the kind)")
    parser.add_argument(
        "--repeat",
        type=int,
        default=MIN_STARTS,
        metavar="N",
        help=f"starts of the process (default {MIN_STARTS}, the fewest for a verdict)",
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help=f"with serve, {', '.join(map(str, subject.SWEEP))} requests at once",
    )
    arguments = parser.parse_args(ours)
    if not 1 <= arguments.repeat <= MOST_REPEATS:
        parser.error(f"--repeat is a number from 1 to {MOST_REPEATS}")
    if arguments.label is not None and not metrics.LABEL.fullmatch(arguments.label):
        parser.error("--label is of letters, digits, dot, dash, plus and underscore, at most 64")
    if arguments.sweep and arguments.kind != "serve":
        parser.error("--sweep is for serve")
    options = measure.BenchOptions(
        arguments.kind,
        arguments.model,
        arguments.label,
        arguments.repeat,
        arguments.sweep,
        tuple(for_vllm),
    )
    layout = layouts.here()

    def work() -> None:
        measure.run(layout, main.load_settings(layout), options, console=main.console())

    return main.run(work)


def ab_session(argv: Sequence[str]) -> int:
    """Measure the working tree and a base alternately, and judge."""
    from workspace.bench import ab, ab_trees, compare, subject
    from workspace.bench.ab import AbOptions
    from workspace.bench.compare import FACTOR, MIN_STARTS

    ours, for_vllm = _split(argv)
    description = (
        "Measure the working tree and a base alternately, each in an arm with a build of its own,"
        " and judge. The same command goes on after an end."
    )
    parser = argparse.ArgumentParser(
        prog="nox -s ab --",
        description=description,
        epilog="Words after a second -- go to vllm bench, or to vllm serve.",
    )
    parser.add_argument(
        "kind",
        nargs="?",
        choices=subject.KINDS,
        default="latency",
        help="what is measured (default latency)",
    )
    parser.add_argument(
        "--base",
        default=ab_trees.PIN,
        metavar="BASE",
        help="pin: the pinned tag without patches (default); a commit of the workspace; a record",
    )
    parser.add_argument(
        "--model",
        default=subject.TINY,
        help="tiny, smollm2, a folder, or a model on the hub (default tiny)",
    )
    parser.add_argument(
        "--repeat",
        type=int,
        default=MIN_STARTS,
        metavar="N",
        help=f"starts of each arm (default and at least {MIN_STARTS})",
    )
    parser.add_argument(
        "--factor",
        default=f"{FACTOR * 100:g}",
        metavar="PERCENT",
        help=f"a change up to this does not count (default {FACTOR * 100:g})",
    )
    parser.add_argument(
        "--each-patch",
        action="store_true",
        help="leave one patch out at a time, and say what each costs",
    )
    parser.add_argument(
        "--allow-busy", action="store_true", help="measure although something else uses the machine"
    )
    arguments = parser.parse_args(ours)
    if not MIN_STARTS <= arguments.repeat <= MOST_REPEATS:
        parser.error(
            f"--repeat is a number from {MIN_STARTS} to {MOST_REPEATS}: fewer starts decide nothing"
        )
    if arguments.each_patch and arguments.base != ab_trees.PIN:
        parser.error("--each-patch compares the series with itself: --base is for one comparison")
    layout = layouts.here()

    def work() -> None:
        factor = compare.parsed_factor(arguments.factor)
        options = AbOptions(
            arguments.kind,
            arguments.base,
            arguments.model,
            arguments.repeat,
            factor,
            arguments.each_patch,
            arguments.allow_busy,
            tuple(for_vllm),
        )
        ab.run(layout, main.load_settings(layout), options, console=main.console())

    return main.run(work)


def bisect_session(argv: Sequence[str]) -> int:
    """Find the upstream commit, or the patch, that turned good into bad."""
    from workspace.bench import bisect
    from workspace.bench.bisect_log import BisectOptions
    from workspace.bench.compare import FACTOR

    timeout_s = BisectOptions("").timeout_s
    description = (
        "Find the upstream commit, or the patch, that turned good into bad. The same command goes"
        " on with a bisect that was ended."
    )
    epilog = (
        "A command's exit code: 0 good, 125 neither, 1 to 127 bad; anything above stops the bisect."
    )
    parser = argparse.ArgumentParser(
        prog="nox -s bisect --", description=description, epilog=epilog
    )
    parser.add_argument(
        "--good",
        metavar="REF",
        help="a tag or commit of vendor/vllm (default the last good state before the pin)",
    )
    parser.add_argument("--bad", metavar="REF", help="a later one (default the pin)")
    parser.add_argument(
        "--patches",
        action="store_true",
        help="search the series on the pin, patch by patch, and not upstream",
    )
    parser.add_argument(
        "--run",
        metavar="WHAT",
        help=(
            "smoke, a check of it such as parity.llama, bench:METRIC such as bench:latency, or a"
            " command line"
        ),
    )
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=timeout_s,
        metavar="SECONDS",
        help=f"how long one answer may take (default {timeout_s:g})",
    )
    parser.add_argument(
        "--factor",
        default=f"{FACTOR * 100:g}",
        metavar="PERCENT",
        help="with bench:METRIC, a change up to this does not count (default 5)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write what was found, and every step, to this file",
    )
    parser.add_argument("--abort", action="store_true", help="give up the bisect that is under way")
    arguments = parser.parse_args(argv)
    if not arguments.abort and not arguments.run:
        parser.error("--run says what tells good from bad")
    if arguments.patches and (arguments.good or arguments.bad):
        parser.error(
            "--patches goes from the pin without patches to all of them: --good and --bad are for"
            " upstream's commits"
        )
    _require_timeout(parser, arguments.timeout_s)
    layout = layouts.here()

    def work() -> None:
        if arguments.abort:
            bisect.abort(layout, console=main.console())
            return
        options = BisectOptions(
            arguments.run,
            arguments.good,
            arguments.bad,
            arguments.patches,
            arguments.timeout_s,
            arguments.factor,
        )
        bisect.run(
            layout,
            main.load_settings(layout),
            options,
            folder=Path.cwd(),
            json_file=arguments.json,
            console=main.console(),
        )

    return main.run(work)


def perf_session(argv: Sequence[str]) -> int:
    """Measure what the workspace itself costs."""
    from workspace.support import perf
    from workspace.support.perf import ROWS

    description = (
        "Measure what the workspace itself costs. The record goes to stdout and"
        " .workspace/perf.json."
    )
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(prog="nox -s perf --", description=description)
    parser.add_argument(
        "--row",
        action="append",
        choices=names,
        metavar="NAME",
        help=f"this row only, of {', '.join(names)}",
    )
    parser.add_argument(
        "--repeat",
        type=int,
        metavar="N",
        help="pairs of runs a row (default 10, of slow rows fewer)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the record to this file as well"
    )
    arguments = parser.parse_args(argv)
    if arguments.repeat is not None and arguments.repeat < 1:
        parser.error("--repeat is a whole number of at least 1")
    layout = layouts.here()
    rows = [row for row in ROWS if not arguments.row or row.name in arguments.row]

    def work() -> None:
        perf.run(
            layout,
            main.load_settings(layout),
            rows,
            console=main.console(),
            pairs=arguments.repeat,
            json_file=arguments.json,
        )

    return main.run(work)


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments before and after the first `--`."""
    words = list(argv)
    return (
        (words[: words.index("--")], words[words.index("--") + 1 :])
        if "--" in words
        else (words, [])
    )


def _require_timeout(parser: argparse.ArgumentParser, timeout_s: float) -> None:
    if not 0 < timeout_s <= LONGEST_TIMEOUT_S:
        parser.error(f"--timeout-s is a number above 0 and at most {LONGEST_TIMEOUT_S:g}")


SESSIONS: Mapping[str, Callable[[Sequence[str]], int]] = {
    "smoke": smoke_session,
    "record-good": record_good,
    "upstream": upstream_session,
    "bench": bench_session,
    "ab": ab_session,
    "bisect": bisect_session,
    "perf": perf_session,
}


def run_session(argv: Sequence[str]) -> int:
    """Run one session; exit code 2 for a name that is none."""
    parser = argparse.ArgumentParser(prog="python -m workspace.cli.sessions")
    parser.add_argument("session", choices=SESSIONS)
    return SESSIONS[parser.parse_args(argv[:1]).session](argv[1:])


if __name__ == "__main__":
    sys.exit(run_session(sys.argv[1:]))
