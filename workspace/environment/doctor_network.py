"""The doctor's checks of the network: git remotes, package index, torch's index, and the mirrors set in their place.

Each question ends within CONNECT_TIMEOUT_S, or a few seconds where a mirror is slow to answer; names and passwords in addresses are not shown.
"""

import re
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from workspace.environment import interpreter, torch
from workspace.environment.doctor_case import TIMED_OUT, Case, Row, State, without_user

# A page of the index that is small and always there.
SMALL_PROJECT = "packaging"
# Beyond the connection: uv asks for a page and one file's description.
UV_ANSWER_S = 3.0


def vllm(case: Case) -> Iterator[Row]:
    """Check where vLLM's source comes from: its mirror, where one is set, and the pinned remote."""
    stands_in = "the release archive on the package index stands in" if case.settings.text("SOURCE") != "git" else "SOURCE=git wants it"
    is_needed = case.settings.text("SOURCE") == "git" and not (case.layout.vllm / ".git").exists()
    yield from _remote(case, "vllm", "VLLM_MIRROR", otherwise=stands_in, lacking="FAIL" if is_needed else "warn")


def triton(case: Case) -> Iterator[Row]:
    """Check where Triton's source comes from; only a build of Triton needs it."""
    yield from _remote(case, "triton", "TRITON_MIRROR", otherwise="only building Triton needs it", lacking="warn")


def _remote(case: Case, name: str, setting: str, *, otherwise: str, lacking: State) -> Iterator[Row]:
    mirror, url = case.settings.text(setting), _pinned(case.layout.pins, name)
    if url is None:
        yield Row("FAIL", f"{name} git", "vendor/pins.toml names no remote that can be read", "the pins say where it is", "git checkout -- vendor/pins.toml")
        return
    if mirror:
        fault = _git_fault(case, mirror)
        cure = f"git ls-remote {without_user(mirror)} HEAD  # {setting} in .env names it"
        seen = without_user(mirror) + (f": {fault}" if fault else " answers")
        yield Row(lacking if fault else "ok", f"{name} mirror", seen, f"{setting} is asked before anything else", cure if fault else None)
        if not fault:
            return
    fault = _git_fault(case, url)
    cure = f"echo {setting}=URL >> .env  # URL: a copy that can be reached"
    # With a mirror set, git never goes to the pinned remote.
    state: State = "ok" if not fault else "warn" if mirror else lacking
    yield Row(state, f"{name} git", without_user(url) + (f": {fault}" if fault else " answers"), otherwise, cure if fault else None)


def index(case: Case) -> Iterator[Row]:
    """Check the package index that source archives, donors and packages come from."""
    import requests
    from pypi_simple import PYPI_SIMPLE_ENDPOINT

    endpoint = case.settings.index_url or PYPI_SIMPLE_ENDPOINT
    shown = without_user(case.settings.index_url) if case.settings.index_url else "the default one"
    timeout_s = float(case.settings.count("CONNECT_TIMEOUT_S") or 5)
    fault: str | None = None
    if endpoint.startswith("file://"):
        folder = Path(unquote(urlsplit(endpoint).path))
        fault = None if folder.is_dir() else f"{folder} is not there"
    else:
        try:
            with requests.get(f"{endpoint.rstrip('/')}/{SMALL_PROJECT}/", timeout=timeout_s, stream=True) as reply:
                fault = None if reply.ok else f"answers {reply.status_code} {reply.reason}"
        except requests.Timeout:
            fault = f"gave no answer in {timeout_s:g} s"
        except requests.RequestException as exc:
            fault = _innermost(exc)
    if fault is None:
        yield Row("ok", "index", f"{shown} answers", "source archive, donor and packages come from it")
        return
    # What is built needs nothing more of it, and starting over would.
    why = "everything needed is in .vllm already; a changed requirement is not" if case.is_built else "source archive, donor and packages come from it"
    cure = "export UV_DEFAULT_INDEX=URL  # URL: a mirror of the index; behind a proxy: export HTTPS_PROXY=URL"
    yield Row("warn" if case.is_built else "FAIL", "index", f"{shown}: {without_user(fault)}", why, cure)


def torch_index(case: Case) -> Iterator[Row]:
    """Check where torch comes from, with uv's own eyes: a dry run that resolves torch and nothing else."""
    wanted, there = torch.plan("torch", device=case.device, settings=case.settings), case.torch()
    fault = _torch_fault(case, wanted.requirement, wanted.arguments)
    if fault is None:
        yield Row("ok", "torch index", f"{wanted.said}: answers", "torch is taken from there")
        return
    seen = f"{wanted.said}: {fault}"
    if any(_torch_fault(case, wanted.requirement, other) is None for other in wanted.alternatives):
        yield Row("ok", "torch index", seen, "another index that has it stands in")
        return
    why = f"{there.version} is in .vllm; another one cannot be had" if there else "torch is taken from there"
    yield Row("warn" if there else "FAIL", "torch index", seen, why, "echo TORCH_INDEX_URL=URL >> .env  # URL: an index that has torch")


def _torch_fault(case: Case, requirement: str, arguments: tuple[str, ...]) -> str | None:
    """Why uv cannot resolve torch with these arguments; None where it can."""
    timeout_s = float(case.settings.count("CONNECT_TIMEOUT_S") or 5)
    haste = {"UV_HTTP_TIMEOUT": f"{timeout_s:.0f}", "UV_HTTP_CONNECT_TIMEOUT": f"{timeout_s:.0f}", "UV_HTTP_RETRIES": "0"}
    with tempfile.TemporaryDirectory(prefix="torch-") as folder:
        asked = ["pip", "install", "--dry-run", "--no-deps", "--quiet", "--python", sys.executable, "--target", folder]
        # What uv remembers of an index proves nothing. Together with its own offline mode it refuses the flag.
        asked += [] if case.settings.shell.get("UV_OFFLINE") else ["--refresh-package", "torch"]
        done = case.ask([interpreter.uv(case.layout), *asked, *arguments, requirement], extra=haste, timeout_s=timeout_s + UV_ANSWER_S)
    if done is None or done.returncode in TIMED_OUT:
        return f"no answer in {timeout_s + UV_ANSWER_S:.0f} s"
    lines = [re.sub(r"^(error|cause|Caused by): ", "", line.strip(" ×╰─▶├│")) for line in done.stderr.splitlines()]
    # uv tells the cause last, and hints after it.
    causes = [line for line in lines if line and not line.startswith(("hint:", "warning:"))] or ["uv says nothing"]
    return None if done.returncode == 0 else without_user(causes[-1])


def _git_fault(case: Case, url: str) -> str | None:
    """What git says of a remote, asked as it would be for a fetch, with the user's own configuration and no prompts; None for nothing."""
    timeout_s = float(case.settings.count("CONNECT_TIMEOUT_S") or 5)
    program = case.which("git")
    if program is None:
        return "there is no git to ask it with"
    done = case.ask([program, "ls-remote", "--", url, "HEAD"], extra={"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}, timeout_s=timeout_s)
    if done is None or done.returncode in TIMED_OUT:
        return f"no answer in {timeout_s:g} s (CONNECT_TIMEOUT_S)"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    said = next((line for line in lines if line.startswith(("fatal:", "error:"))), lines[0] if lines else f"git exited with {done.returncode}")
    # The address, which is shown already, with all that stands before the reason.
    return None if done.returncode == 0 else re.sub(r"^(fatal|error): (unable to access '[^']*': )?", "", without_user(said))


def _pinned(pins: Path, name: str) -> str | None:
    """The remote's address, and nothing else of the pins: a check of them is the source's."""
    try:
        table = tomllib.loads(pins.read_text(encoding="utf-8")).get(name)
    except (OSError, ValueError):
        return None
    url = table.get("url") if isinstance(table, dict) else None
    return url if isinstance(url, str) else None


def _innermost(exc: BaseException) -> str:
    """The innermost cause in its own words: requests wraps a name that does not resolve four times."""
    while exc.__context__ is not None:
        exc = exc.__context__
    return str(exc) or type(exc).__name__
