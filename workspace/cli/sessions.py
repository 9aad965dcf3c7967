"""Command lines of the nox sessions: `python -m workspace.cli.sessions NAME [ARGUMENTS]`.

Each session parses its arguments and calls one function of the library, as a verb of `inv` does.
The function returns the exit code of the session.
"""

# As in tasks.py: before main.run catches it, ^C leaves no traceback.
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from workspace.cli import main
from workspace.core import paths
from workspace.core.paths import Layout
from workspace.core.settings import Settings

MOST_REPEATS = 1000
# One day, in seconds; poll(2) counts milliseconds in 32 bits.
LONGEST_TIMEOUT_S = 86400.0


def smoke_session(argv: Sequence[str]) -> int:
    """Judge whether the built vLLM computes correctly."""
    from workspace.checks import smoke
    from workspace.checks.smoke_suite import TIMEOUT_S, SmokeOptions

    parser = _parser(
        "smoke",
        "Judge whether the built vLLM computes correctly. The record goes to"
        " .workspace/smoke.json.",
    )
    add = parser.add_argument
    level_help = "full adds mixture-of-experts models, torch.compile and a real model"
    add("--level", choices=("quick", "full"), default="quick", help=level_help)
    model_help = "also compare this model: smollm2, a folder, or a name whose files are on disk"
    add("--model", default="tiny", metavar="NAME", help=model_help)
    add("--fail-fast", action="store_true", help="stop after the first probe with a failed check")
    _add_json(parser, "write the record to this file as well, - for stdout")
    _add_timeout(parser, "each probe", TIMEOUT_S)
    arguments = parser.parse_args(argv)
    _require_timeout(parser, arguments.timeout_s)
    options = SmokeOptions(
        arguments.level, arguments.model, arguments.timeout_s, arguments.fail_fast
    )
    return _run(
        lambda layout, settings: smoke.smoke(
            layout, settings, options, console=main.console(), json_file=arguments.json
        )
    )


def record_good(argv: Sequence[str]) -> int:
    """Record the current state as known-good; `nox -s smoke` runs it after a smoke that passed."""
    _parser("smoke", "Record the current state as known-good.").parse_args(argv)
    from workspace.bump import known_good
    from workspace.install import plan

    return _run(
        lambda layout, settings: known_good.record(
            plan.observe(layout, settings), console=main.console()
        )
    )


def upstream_session(argv: Sequence[str]) -> int:
    """Run the tests of vLLM itself that the changed files reach."""
    from workspace.checks import upstream

    own, for_pytest = _split(argv)
    parser = _upstream_parser(upstream.TIMEOUT_S)
    arguments = parser.parse_args(own)
    _require_timeout(parser, arguments.timeout_s)
    options = upstream.UpstreamOptions(
        tuple(arguments.all_of),
        tuple(for_pytest),
        arguments.timeout_s,
        arguments.try_all,
        arguments.online,
    )
    return _run(
        lambda layout, settings: upstream.run(
            layout,
            settings,
            options,
            console=main.console(),
            json_file=arguments.json,
            is_list=arguments.list,
        )
    )


def _upstream_parser(timeout_s: float) -> argparse.ArgumentParser:
    parser = _parser(
        "upstream",
        "Run the tests of vLLM itself that the changed files reach. The record goes to"
        " .workspace/upstream.json.",
        epilog="Arguments after a second -- go to pytest.",
    )
    add = parser.add_argument
    list_help = "print which test files would run, which would not, and why; needs no build"
    add("--list", action="store_true", help=list_help)
    all_help = "instead of the changed files: a file or folder of vllm/, or tests"
    add("--all-of", nargs="+", default=[], metavar="PATH", help=all_help)
    gpu_help = "without a GPU, also run tests that upstream runs on GPUs only"
    add("--try-all", action="store_true", help=gpu_help)
    add("--online", action="store_true", help="let tests ask the Hugging Face hub for models")
    _add_json(parser, "write the record to this file as well, - for stdout")
    _add_timeout(parser, "a run", timeout_s)
    return parser


def bench_session(argv: Sequence[str]) -> int:
    """Measure the built vLLM with its own benchmarks."""
    from workspace.bench import measure, results, subject
    from workspace.bench.compare import MIN_STARTS
    from workspace.server import flags

    own, for_vllm = _split(argv)
    parser = _parser(
        "bench",
        "Measure the built vLLM with its own benchmarks. The record goes to results/; its path is"
        " printed on stdout.",
        epilog="Arguments after a second -- go to vllm bench, or to vllm serve.",
    )
    _add_workload(parser)
    add = parser.add_argument
    add("--label", help="name of the record (default: the kind)")
    repeat_help = f"starts of the process (default {MIN_STARTS}, the fewest for a verdict)"
    add("--repeat", type=int, default=MIN_STARTS, metavar="N", help=repeat_help)
    levels = ", ".join(map(str, subject.SWEEP))
    add("--sweep", action="store_true", help=f"with serve: {levels} requests at once")
    arguments = parser.parse_args(own)
    if not 1 <= arguments.repeat <= MOST_REPEATS:
        parser.error(f"--repeat must be a number from 1 to {MOST_REPEATS}")
    if arguments.label is not None and not results.LABEL.fullmatch(arguments.label):
        parser.error("--label takes at most 64 letters, digits and . - + _")
    if arguments.sweep and arguments.kind != "serve":
        parser.error("--sweep needs the kind serve")
    workload = subject.WorkloadOptions(
        arguments.kind,
        arguments.model,
        flags.typed_paths(for_vllm),
        has_sweep=arguments.sweep,
    )
    label = arguments.label or f"{arguments.kind}{'-sweep' if arguments.sweep else ''}"
    options = measure.BenchOptions(workload, label, arguments.repeat)
    return _run(
        lambda layout, settings: measure.run(layout, settings, options, console=main.console())
    )


def ab_session(argv: Sequence[str]) -> int:
    """Measure the working tree and a base in turn, and judge whether the tree is slower."""
    from workspace.bench import ab, compare
    from workspace.server import flags

    own, for_vllm = _split(argv)
    parser = _ab_parser()
    arguments = parser.parse_args(own)
    if not compare.MIN_STARTS <= arguments.repeat <= MOST_REPEATS:
        parser.error(
            f"--repeat must be a number from {compare.MIN_STARTS} to {MOST_REPEATS}: fewer starts"
            " decide nothing"
        )

    def work(layout: Layout, settings: Settings) -> None:
        options = ab.AbOptions(
            arguments.kind,
            arguments.base,
            arguments.model,
            arguments.repeat,
            compare.parsed_factor(arguments.factor),
            arguments.allow_busy,
            flags.typed_paths(for_vllm),
        )
        ab.run(layout, settings, options, console=main.console())

    return _run(work)


def _ab_parser() -> argparse.ArgumentParser:
    from workspace.bench import ab_trees
    from workspace.bench.compare import FACTOR, MIN_STARTS

    parser = _parser(
        "ab",
        "Measure the working tree and a base in turn, each in a sandbox with its own build, and"
        " judge. The same command resumes an interrupted run.",
        epilog="Arguments after a second -- go to vllm bench, or to vllm serve.",
    )
    _add_workload(parser)
    add = parser.add_argument
    base_help = "pin: the pinned tag without patches (default); or a commit of the workspace"
    add("--base", default=ab_trees.PIN, metavar="BASE", help=base_help)
    repeat_help = f"starts of each tree (default {MIN_STARTS}, at least {MIN_STARTS})"
    add("--repeat", type=int, default=MIN_STARTS, metavar="N", help=repeat_help)
    _add_factor(parser, "a change up to this size does not count", FACTOR)
    loaded_help = "measure although another program uses the machine"
    add("--allow-busy", action="store_true", help=loaded_help)
    return parser


def bisect_session(argv: Sequence[str]) -> int:
    """Find the upstream commit, or the patch, that turned good into bad."""
    from workspace.bench import bisect
    from workspace.bench.bisect_log import BisectOptions

    parser = _bisect_parser()
    arguments = parser.parse_args(argv)
    if not arguments.abort and not arguments.run:
        parser.error("--run is needed: the check that separates good from bad")
    if arguments.patches and (arguments.good or arguments.bad):
        parser.error(
            "--patches searches from the bare pin to the whole series: --good and --bad are for"
            " upstream commits"
        )
    _require_timeout(parser, arguments.timeout_s)
    if arguments.abort:
        return main.run(lambda: bisect.abort(paths.here(), console=main.console()))
    options = BisectOptions(
        arguments.run,
        arguments.good,
        arguments.bad,
        arguments.patches,
        arguments.timeout_s,
        arguments.factor,
    )
    return _run(
        lambda layout, settings: bisect.run(
            layout,
            settings,
            options,
            console=main.console(),
            folder=Path.cwd(),
            json_file=arguments.json,
        )
    )


def _bisect_parser() -> argparse.ArgumentParser:
    from workspace.bench.bisect_log import BisectOptions
    from workspace.bench.compare import FACTOR

    parser = _parser(
        "bisect",
        "Find the upstream commit, or the patch, that turned good into bad. The same command"
        " resumes an interrupted bisect.",
        epilog=(
            "Exit code of a command given to --run: 0 good, 125 neither, 1 to 127 bad; a higher"
            " code stops the bisect."
        ),
    )
    add = parser.add_argument
    good_help = "a tag or commit of vendor/vllm (default: the last known-good state before the pin)"
    add("--good", metavar="REF", help=good_help)
    add("--bad", metavar="REF", help="a later tag or commit (default: the pin)")
    patches_help = "search the series on the pin, patch by patch, instead of upstream"
    add("--patches", action="store_true", help=patches_help)
    run_help = (
        "smoke, one of its checks such as parity.llama, bench:METRIC such as bench:latency, or a"
        " command line"
    )
    add("--run", metavar="CHECK", help=run_help)
    _add_timeout(parser, "each check", BisectOptions("").timeout_s)
    _add_factor(parser, "with bench:METRIC, a change up to this size does not count", FACTOR)
    _add_json(parser, "write the result and every step to this file")
    add("--abort", action="store_true", help="give up the bisect that is under way")
    return parser


def perf_session(argv: Sequence[str]) -> int:
    """Measure what the workspace itself costs."""
    from workspace.support import perf

    parser = _parser(
        "perf",
        "Measure what the workspace itself costs. The record goes to .workspace/perf.json.",
    )
    add = parser.add_argument
    names = [row.name for row in perf.ROWS]
    row_help = f"measure this row only, of {', '.join(names)}"
    add("--row", action="append", choices=names, metavar="NAME", help=row_help)
    repeat_help = "pairs of runs for a row (default 10, fewer for slow rows)"
    add("--repeat", type=int, metavar="N", help=repeat_help)
    _add_json(parser, "write the record to this file as well, - for stdout")
    arguments = parser.parse_args(argv)
    if arguments.repeat is not None and arguments.repeat < 1:
        parser.error("--repeat must be a whole number of at least 1")
    rows = [row for row in perf.ROWS if not arguments.row or row.name in arguments.row]
    return _run(
        lambda layout, settings: perf.run(
            layout,
            settings,
            rows,
            console=main.console(),
            pairs=arguments.repeat,
            json_file=arguments.json,
        )
    )


def spark_session(argv: Sequence[str]) -> int:
    """Run the acceptance of the workspace on this machine."""
    from workspace.support import spark

    arguments = _spark_parser().parse_args(argv)
    options = spark.SparkOptions(
        tuple(arguments.only),
        tuple(arguments.without),
        arguments.memory,
        arguments.model,
        yes=arguments.yes,
        plan_only=arguments.plan,
        again=arguments.again,
    )
    return _run(
        lambda layout, settings: spark.run(layout, settings, options, console=main.console())
    )


def _spark_parser() -> argparse.ArgumentParser:
    from workspace.support.spark_parts import NAMES

    parser = _parser(
        "spark",
        "Run the acceptance on this machine: all parts, in a clone of its own. It asks once and"
        " resumes what was interrupted. Page and archive go to results/spark/; the archive's path"
        " is printed on stdout.",
        epilog=f"The parts: {', '.join(NAMES)}.",
    )
    add = parser.add_argument
    add("--plan", action="store_true", help="print what each part takes; run nothing")
    add("--yes", action="store_true", help="do not ask")
    for flag, help_text in (
        ("--only", "run this part, and the build that it needs; may be repeated"),
        ("--without", "leave this part out; may be repeated"),
    ):
        add(flag, action="append", default=[], metavar="PART", choices=NAMES, help=help_text)
    memory_help = "the memory that all processes of a part may hold (default: what is free)"
    add("--memory", metavar="GIB", help=memory_help)
    model_help = "the served model: a recipe, a folder, or a name whose files are on disk"
    add("--model", metavar="NAME", help=f"{model_help} (default: smollm2, without a GPU tiny)")
    again_help = "begin a new record; the old one is kept beside it"
    add("--again", action="store_true", help=again_help)
    return parser


def _run(work: Callable[[Layout, Settings], object]) -> int:
    """Run the work of a session with the clone and its settings; return the exit code."""
    return main.run(lambda: work(*main.opened()))


class _Parser(argparse.ArgumentParser):
    """A parser that reports misuse as the verbs do: a sentence, a hint, exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\nhint: ./scripts/{self.prog} --help\n")


def _parser(session: str, description: str, *, epilog: str = "") -> argparse.ArgumentParser:
    return _Parser(prog=f"nox -s {session} --", description=description, epilog=epilog or None)


def _add_workload(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose a benchmark and a model."""
    from workspace.bench import subject

    kind_help = "what to measure (default latency)"
    parser.add_argument("kind", nargs="?", choices=subject.KINDS, default="latency", help=kind_help)
    model_help = "tiny, smollm2, a folder, or a model on the hub (default tiny)"
    parser.add_argument("--model", default=subject.TINY, help=model_help)


def _add_json(parser: argparse.ArgumentParser, meaning: str) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help=meaning)


def _add_timeout(parser: argparse.ArgumentParser, bounded: str, default_s: float) -> None:
    meaning = f"longest time for {bounded} (default {default_s:g})"
    parser.add_argument(
        "--timeout-s", type=float, default=default_s, metavar="SECONDS", help=meaning
    )


def _add_factor(parser: argparse.ArgumentParser, meaning: str, default: float) -> None:
    shown = f"{default * 100:g}"
    parser.add_argument(
        "--factor", default=shown, metavar="PERCENT", help=f"{meaning} (default {shown})"
    )


def _require_timeout(parser: argparse.ArgumentParser, timeout_s: float) -> None:
    if not 0 < timeout_s <= LONGEST_TIMEOUT_S:
        parser.error(f"--timeout-s must be a number above 0 and at most {LONGEST_TIMEOUT_S:g}")


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments before and after the first `--`."""
    own = list(argv)
    if "--" not in own:
        return own, []
    place = own.index("--")
    return own[:place], own[place + 1 :]


SESSIONS: Mapping[str, Callable[[Sequence[str]], int]] = {
    "smoke": smoke_session,
    "record-good": record_good,
    "upstream": upstream_session,
    "bench": bench_session,
    "ab": ab_session,
    "bisect": bisect_session,
    "perf": perf_session,
    "spark": spark_session,
}


def run_session(argv: Sequence[str]) -> int:
    """Run the session that the first argument names; exit with 2 for an unknown name."""
    parser = argparse.ArgumentParser(prog="python -m workspace.cli.sessions")
    parser.add_argument("session", choices=SESSIONS)
    return SESSIONS[parser.parse_args(argv[:1]).session](argv[1:])


if __name__ == "__main__":
    sys.exit(run_session(sys.argv[1:]))
