"""What is typed becomes the one command line that vLLM is started with: a recipe's flags, the user's over them, each known to the pinned tree.

Only values that would cost a long load before anybody says so are judged here, and what would open the machine to others; the rest is the parser's.
"""

import ipaddress
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.core.errors import SettingsError
from workspace.core.layout import Layout
from workspace.core.settings import KNOWN, Settings, is_secret
from workspace.engine import flags, shell
from workspace.engine.readiness import Address
from workspace.serve.recipes import Recipe

LOCAL, USUAL_PORT = "127.0.0.1", 8000
# What no word of a command line may say here, and where it belongs.
_ELSEWHERE = {
    "--api-key": "everybody sees it in ps: put VLLM_API_KEY into .env",
    "--hf-token": "everybody sees it in ps: put HF_TOKEN into .env",
    "--config": "what stands in that file would be judged by nobody: write its flags after --",
    "--model": "the model is the word after inv serve",
    "--model-tag": "the model is the word after inv serve",
    "--uds": "whether the server is ready is asked over a port",
    "--headless": "there would be nobody to ask whether it is ready: ./scripts/inv run -- vllm serve ...",
    "--help": "./scripts/inv run -- vllm serve --help=all",
    "-h": "./scripts/inv run -- vllm serve --help=all",
}
_COUNTS = ("--max-num-seqs", "--tensor-parallel-size", "--max-num-batched-tokens", "--pipeline-parallel-size")
_LENGTH = re.compile(r"[1-9]\d*|\d+(\.\d+)?[kKmMgG]|auto|-1")


@dataclass(frozen=True)
class Command:
    """`words` are all flags, `extra` those that the user typed; `dropped` and `said` are sentences for the screen."""

    words: tuple[str, ...]
    extra: tuple[str, ...]
    address: Address
    dropped: tuple[str, ...] = ()
    said: tuple[str, ...] = ()

    def argv(self, layout: Layout, model: str) -> tuple[str, ...]:
        return (str(layout.environment / "bin" / "vllm"), "serve", model, *self.words)


def compose(recipe: Recipe, extra: Sequence[str], known: flags.Flags, *, has_key: bool, knows: bool) -> Command:
    """Put the command line together. `knows`: the user has said that they know who can reach the server.

    Raises SettingsError for a flag that is unknown, one that does not belong there, a value that cannot be, and a server open to others without a key.
    """
    users = flags.judge(extra, known)
    own = [flags.judge(words, known) for words in _by_flag(recipe, users.words)]
    words = [word for judged in own for word in judged.words] + list(users.words)
    for word in users.words:
        if reason := _ELSEWHERE.get(word.split("=")[0]):
            raise SettingsError(f"{word.split('=')[0]} cannot be given to inv serve", hint=reason)
    if recipe.origin == "built-in" and not _has(words, "--served-model-name"):
        words += ["--served-model-name", recipe.model]
    if not _has(words, "--host"):
        words += ["--host", LOCAL]
    if not _has(words, "--port"):
        words += ["--port", str(USUAL_PORT)]
    _judge_values(words)
    address = Address(flags.last(words, "--host") or "", int(flags.last(words, "--port") or USUAL_PORT), _has(words, "--ssl-certfile"))
    said = []
    if not is_local(address.host):
        said.append(_exposed(address, has_key=has_key, knows=knows))
    if _has(words, "--trust-remote-code"):
        who = "the recipe asks for it" if not _has(users.words, "--trust-remote-code") else "you ask for it"
        said.append(f"--trust-remote-code: {who}; code of the model's authors runs on this machine, as you")
    return Command(tuple(words), users.words, address, tuple(one for judged in (*own, users) for one in judged.dropped), tuple(said))


def replaced(extra: Sequence[str], flag: str, value: str) -> tuple[str, ...]:
    """The user's words with one flag of one value said otherwise."""
    left, kept = list(extra), []
    while left:
        word = left.pop(0)
        if word == flag:
            del left[:1]
        elif not word.startswith(f"{flag}="):
            kept.append(word)
    return (*kept, flag, value)


def is_local(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def typed(name: str, extra: Sequence[str], *, detach: bool = False) -> str:
    """What a user types for it, ready to be copied."""
    words = ["./scripts/inv", "serve", shlex.quote(name), *(["--detach"] if detach else []), *(["--", shlex.join(extra)] if extra else [])]
    return " ".join(words)


def shown(layout: Layout, settings: Settings, argv: Sequence[str], environment: Mapping[str, str]) -> Iterator[str]:
    """Say in sh what is started, in which environment. Secrets go by their names only."""
    others = {*KNOWN, "_", "OLDPWD", "PWD", "SHLVL"}
    gone = [name for name in sorted(settings.shell) if name not in environment and name not in others and name.isidentifier()]
    if gone:
        yield f"unset {' '.join(gone)}"
    yield from shell.lines(layout, environment, settings.shell)
    for name, text in sorted(environment.items()):
        if is_secret(name):
            yield f"# {name} is {'set, and stays unsaid' if text else 'empty'}"
    yield settings.masked(shlex.join(argv))


def folder_of(name: str) -> Path | None:
    """The folder that somebody means by a path, None where it is no path."""
    path = Path(os.path.expanduser(name))
    return path.absolute() if name.startswith(("/", "./", "../", "~")) or name in (".", "..") or ("/" in name and path.is_dir()) else None


def _by_flag(recipe: Recipe, users: Sequence[str]) -> Iterator[list[str]]:
    """The recipe's words, a flag at a time, without those that the user says otherwise."""
    for name, value in recipe.flags.items():
        flag = f"--{name}"
        if not _has(users, flag) and not _has(users, f"--no-{name}"):
            yield flags.words_of(name, list(value) if isinstance(value, tuple) else value)


def _has(words: Sequence[str], flag: str) -> bool:
    return any(word == flag or word.startswith(f"{flag}=") for word in words)


def _judge_values(words: Sequence[str]) -> None:
    port = flags.last(words, "--port") or ""
    if not (re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 65536):
        raise SettingsError(f"--port: {port!r} is no port from 1 to 65535", hint="-- --port 8000")
    if not flags.last(words, "--host"):
        raise SettingsError("--host: there is no address", hint=f"-- --host {LOCAL}")
    share = flags.last(words, "--gpu-memory-utilization")
    if share is not None and not (re.fullmatch(r"\d*\.?\d+|\d+\.", share) and 0 < float(share) <= 1):
        raise SettingsError(f"--gpu-memory-utilization: {share!r} is no share above 0 and at most 1", hint="-- --gpu-memory-utilization 0.7")
    for name in _COUNTS:
        count = flags.last(words, name)
        if count is not None and not re.fullmatch(r"[1-9]\d{0,8}|\d+(\.\d+)?[kKmM]", count):
            raise SettingsError(f"{name}: {count!r} is no whole number of at least 1", hint=f"-- {name} 8")
    length = flags.last(words, "--max-model-len")
    if length is not None and not _LENGTH.fullmatch(length):
        raise SettingsError(f"--max-model-len: {length!r} is no number of tokens", hint="-- --max-model-len 32000, or 32k, or auto")


def _exposed(address: Address, *, has_key: bool, knows: bool) -> str:
    reach = f"--host {address.host} lets whoever reaches this machine's port {address.port} use the model"
    if has_key:
        return f"{reach}; below /v1 it asks for VLLM_API_KEY, elsewhere, such as /metrics, for nothing, and nothing is encrypted"
    if not knows:
        hint = f"put VLLM_API_KEY into .env; or from elsewhere: ssh -L {address.port}:{LOCAL}:{address.port} THIS-MACHINE; or say --i-know"
        raise SettingsError(f"{reach}, and no key is asked for", hint=hint)
    return f"{reach}, and no key is asked for (--i-know)"
