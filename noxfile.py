"""Checks and benchmarks of the built vLLM; ./scripts/nox alone runs the smoke.
The sessions tests, lint, typecheck, docs and proof are for developers of the
workspace. Arguments go after --, such as nox -s smoke -- --help.

A single session exits as its program does: 8 if the smoke failed. Several
sessions all run, and nox exits with 1 if any of them failed.
"""

# `nox --list` prints the text above and the first line of each session, and wraps neither: they fit
# a terminal of 80 columns. This file imports nothing of the library. scripts/nox starts it in the
# tool environment; another nox hands over to that script.

import os
import shlex
import signal
import sys

import nox

ROOT = os.path.dirname(os.path.realpath(__file__))
TOOLS = os.path.join(ROOT, ".workspace", "tools")
HANDED_OVER = "VLLM_WORKSPACE_HANDED_OVER"

# Seconds for a child to end its own children after ^C; nox would kill it after 0.3 s.
INTERRUPT_TIMEOUT_S = 30.0
TERMINATE_TIMEOUT_S = 10.0
# Variables that point a child to other modules or to another environment.
FOREIGN = (
    "PYTHONPATH",
    "PYTHONHOME",
    "PYTHONSAFEPATH",
    "PYTHONSTARTUP",
    "VIRTUAL_ENV",
    HANDED_OVER,
)


def hand_over():
    """Become scripts/nox with all arguments, once.

    exec keeps the process ID, which reveals a loop.
    """
    if os.environ.get(HANDED_OVER) == str(os.getpid()):
        sys.exit("error: scripts/nox did not lead to {}".format(TOOLS))
    os.environ[HANDED_OVER] = str(os.getpid())
    # nox has left the folder to which relative arguments refer.
    os.chdir(os.environ.get("PWD") if os.path.isdir(os.environ.get("PWD", "")) else ROOT)
    sys.stdout.flush()
    os.execv("/bin/sh", ["sh", os.path.join(ROOT, "scripts", "nox")] + sys.argv[1:])


if os.path.realpath(sys.prefix) != os.path.realpath(TOOLS):
    hand_over()

# Arguments of pytest for each proof.
PROOFS = {
    # Network waits, and its prints are the figures of docs/evidence/aarch64.md.
    "aarch64": ["tests/proof/aarch64", "-n", "0", "-s"],
    "bench": ["tests/proof/bench", "-n", "0"],
    "bootstrap": [
        "tests/proof/test_bootstrap.py",
        "tests/proof/test_rebuild.py",
        "tests/proof/test_perf.py",
    ],
    "bundle": ["tests/proof/test_bundle.py", "-n", "0", "-s"],
    "fuzz": ["tests/fuzz", "--hypothesis-profile=deep"],
    "hints": ["tests/proof/hints"],
    # It runs its worlds beside each other by itself.
    "kill": ["tests/proof/kill", "-n", "0"],
    "kernels": ["tests/proof/kernels", "-n", "0", "-s"],
    # Two network namespaces with an sshd each; needs root.
    "nodes": ["tests/proof/nodes", "-n", "0", "-s"],
    "pins": ["tests/proof/test_pins.py", "tests/proof/bump"],
    "repo": ["tests/proof/repo"],
    # One server at a time in this clone.
    "serve": ["tests/proof/serve", "-n", "0", "-s"],
    "smoke": ["tests/proof/smoke", "-n", "0"],
    "spark": ["tests/proof/test_spark.py"],
    "triton": ["tests/proof/triton"],
    "upstream": ["tests/proof/upstream", "-n", "0"],
}

# nox has moved to the root; scripts/nox exports the folder in which it was typed.
TYPED_IN = os.environ.get("PWD", ROOT)
# Starts a session of the library in any folder, from which -P imports nothing.
SESSIONS = (
    "import runpy, sys; sys.path.insert(0, sys.argv.pop(1));"
    " runpy.run_module('workspace.cli.sessions', run_name='__main__', alter_sys=True)"
)

nox.options.default_venv_backend = "none"
nox.options.sessions = ["smoke"]


def typed(args):
    """Return arguments with the paths that exist in the folder in which nox was typed."""
    return [
        os.path.join(TYPED_IN, arg)
        if TYPED_IN != ROOT and os.path.exists(os.path.join(TYPED_IN, arg.split("::")[0]))
        else arg
        for arg in args
    ]


def catch_interrupts():
    """Raise on ^C. scripts/nox starts without a handler: ^C during imports leaves no traceback."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def run(session, *argv):
    """Run a module of the tool environment in the root of the clone; exit as it exits."""
    start(session, "-m", *argv)


def run_own(session, *argv):
    """Run a session of the library in the folder in which nox was typed, so that paths mean that
    folder.
    """
    with session.chdir(TYPED_IN if os.access(TYPED_IN, os.X_OK) else ROOT):
        session.log("python -m workspace.cli.sessions {}".format(shlex.join(argv)))
        start(session, "-P", "-c", SESSIONS, ROOT, *argv, log=False)


def start(session, *argv, log=True):
    """Run the interpreter of the tools; exit as it exits."""
    ended_by = []

    def end(number, _):
        """Pass SIGTERM on, which reaches only this process, and unwind as for ^C."""
        import psutil

        signal.signal(number, signal.SIG_IGN)
        ended_by.append(number)
        for child in psutil.Process().children():
            child.send_signal(number)
        raise KeyboardInterrupt

    catch_interrupts()
    former = signal.signal(signal.SIGTERM, end)
    try:
        session.run(
            sys.executable,
            *argv,
            external=True,
            env=dict.fromkeys(FOREIGN),
            log=log,
            # As it is: nox would put talk among the data, and hide the terminal from it.
            stderr=None,
            interrupt_timeout=INTERRUPT_TIMEOUT_S,
            terminate_timeout=TERMINATE_TIMEOUT_S,
        )
    except KeyboardInterrupt:
        if ended_by:
            raise SystemExit(128 + ended_by[0]) from None
        raise
    except nox.command.CommandFailed as exc:
        # nox has no public way to ask how many sessions there are.
        if exc.return_code is None or len(session._runner.manifest) > 1:
            raise
        raise SystemExit(
            exc.return_code if exc.return_code > 0 else 128 - exc.return_code
        ) from None
    finally:
        signal.signal(signal.SIGTERM, former)


@nox.session
def tests(session):
    """Run the workspace's own tests; arguments after -- go to pytest."""
    run(session, "pytest", *typed(session.posargs))


@nox.session
def lint(session):
    """Run ruff: rules, then format; arguments after -- go to both."""
    run(session, "ruff", "check", *typed(session.posargs))
    run(session, "ruff", "format", "--check", *typed(session.posargs))


@nox.session
def typecheck(session):
    """Run mypy, strict, on the library and its scripts."""
    run(session, "mypy", *typed(session.posargs))


@nox.session
def docs(session):
    """Check the generated pages and .github/, and build the site."""
    run(session, "scripts.docs", "--check")
    run(session, "scripts.docs_site")


@nox.session
def smoke(session):
    """Judge whether the built tree computes correctly."""
    run_own(session, "smoke", *session.posargs)
    # inv pin.rollback returns to a state that passed. Help proves nothing.
    if not {"-h", "--help"} & set(session.posargs):
        run_own(session, "record-good")


@nox.session
def upstream(session):
    """Run vLLM's own tests that the changed files reach."""
    run_own(session, "upstream", *session.posargs)


@nox.session
def bench(session):
    """Measure latency (default), throughput, serve or startup of the tree."""
    run_own(session, "bench", *session.posargs)


@nox.session
def bisect(session):
    """Find the upstream commit or the patch that broke or slowed the tree."""
    run_own(session, "bisect", *session.posargs)


@nox.session
def ab(session):
    """Compare the working tree with a base, measured in turn: one verdict."""
    run_own(session, "ab", *session.posargs)


@nox.session
def perf(session):
    """Measure what the workspace itself costs, as ratios."""
    run_own(session, "perf", *session.posargs)


@nox.session
def spark(session):
    """Run the acceptance of a DGX Spark: one page, one archive."""
    run_own(session, "spark", *session.posargs)


@nox.session
def proof(session):
    """Run the long proofs: all, or the one named after --.

    Names: aarch64, bench, bootstrap, fuzz, hints, kernels, kill, nodes, pins, repo, serve, smoke,
    triton, upstream.
    Arguments after the name of the proof go to pytest.
    """
    chosen = session.posargs[:1] or sorted(PROOFS)
    unknown = [name for name in chosen if name not in PROOFS]
    if unknown:
        session.error(
            "unknown proof {}; the proofs are {}".format(unknown[0], ", ".join(sorted(PROOFS)))
        )
    for name in chosen:
        run(session, "pytest", *PROOFS[name], *session.posargs[1:])
