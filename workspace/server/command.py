"""Command line and environment of a vLLM that is started: a recipe's flags, the user's flags over
them, each known to the pinned tree.

Only values whose error would show after a long load, and values that open the machine to others,
are checked here; vLLM's parser checks the rest.
"""

import ipaddress
import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from workspace.core import hints, paths, process, records
from workspace.core.child_variables import Phase
from workspace.core.errors import SettingsError, WorkspaceError
from workspace.core.files import read_regular
from workspace.core.known_settings import KNOWN, has_login, is_relative, is_secret, secrets_of
from workspace.core.paths import Layout
from workspace.core.process import There
from workspace.core.settings import Settings
from workspace.machine import hardware, jit_caches, run_environment
from workspace.machine.machine import Machine
from workspace.repo.git import Git
from workspace.server import flags, models, public_recipes
from workspace.server.observation import Address
from workspace.server.recipes import Recipe

# Lists of folders: our folders go before those of the shell that evaluates the lines.
LISTS = ("PATH", "LD_LIBRARY_PATH")
# bash refuses to set these, and then evaluates no other line either; each shell sets `_` itself.
_READ_ONLY = ("UID", "EUID", "PPID", "SHELLOPTS", "BASHOPTS", "_")
_LONG_SECRET = 8
UNKNOWN_TREE = "none"
LOCAL, USUAL_PORT = "127.0.0.1", 8000
# Flags that inv serve refuses, each with the name of its hint.
REFUSED = {
    "--api-key": "server.key_in_dotenv",
    "--hf-token": "server.token_in_dotenv",
    "--config": "server.flags_of_config",
    "--model": "server.model_first",
    "--model-tag": "server.model_first",
    "--uds": "server.needs_port",
    "--headless": "server.run_headless",
    "--help": "server.vllm_help",
    "-h": "server.vllm_help",
}
_COUNTS = (
    "--max-num-seqs",
    "--tensor-parallel-size",
    "--max-num-batched-tokens",
    "--pipeline-parallel-size",
)
# Settings that name a file to read, a place to write to, and a module.
_READ = re.compile(r"ssl_(certfile|keyfile|ca_certs)|(py)?log\w*_config_file|\w+_fp8_scale_path")
_WRITTEN = re.compile(r"\w+_dir|debug_dump_path|\w+_save_path|shared_storage_path")
_MODULES = re.compile(
    r"middleware|model_class_overrides|logits_processors|scheduler_cls|worker_cls"
    r"|worker_extension_cls|\w+_module_path|(tool|reasoning)_parser_plugin"
)
_FIND = (
    "import sys, importlib.util as util;"
    " print(*(name for name in sys.argv[1:] if not util.find_spec(name)))"
)
ANSWER_S = 20.0
# vllm/config/lora.py.
DEFAULT_LORA_RANK = 16
_LENGTH = re.compile(r"[1-9]\d*|\d+(\.\d+)?[kKmMgG]|auto|-1")


@dataclass(frozen=True)
class Command:
    """Command line of a server. `args` are all flags, `extra` those that the user typed; `dropped`
    and `notes` are sentences for the screen.
    """

    args: tuple[str, ...]
    extra: tuple[str, ...]
    address: Address
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def argv(self, layout: Layout, model: str) -> tuple[str, ...]:
        """Return the whole command line, the program first."""
        return (str(layout.environment / "bin" / "vllm"), "serve", model, *self.args)


def compose(
    recipe: Recipe, extra: Sequence[str], known: flags.Flags, *, has_key: bool, force: bool
) -> Command:
    """Compose the command line. `force` allows a server that others can reach without a key.

    Raises SettingsError for a flag that is unknown or refused here, a value that is not valid, and
    a server open to others without a key.
    """
    judged = flags.judge(extra, known)
    users = replace(judged, args=flags.typed_paths(judged.args))
    own = [flags.judge(args, known) for args in _by_flag(recipe, users.args)]
    args = [arg for judged in own for arg in judged.args] + list(users.args)
    for arg in users.args:
        if refused := REFUSED.get(arg.split("=")[0]):
            raise SettingsError(
                f"{arg.split('=')[0]} cannot be given to inv serve", hint=hints.text(refused)
            )
    if recipe.origin == "built-in" and not _has(args, "--served-model-name"):
        args += ["--served-model-name", recipe.model]
    if not _has(args, "--host"):
        args += ["--host", LOCAL]
    if not _has(args, "--port"):
        args += ["--port", str(USUAL_PORT)]
    _check_values(args)
    address = Address(
        flags.last(args, "--host") or "",
        int(flags.last(args, "--port") or USUAL_PORT),
        _has(args, "--ssl-certfile"),
    )
    notes = []
    if not is_local(address.host):
        notes.append(_exposed(address, has_key=has_key, force=force))
    if _has(args, "--trust-remote-code"):
        is_users = _has(users.args, "--trust-remote-code")
        source = "you ask for it" if is_users else "the recipe asks for it"
        notes.append(
            f"--trust-remote-code: {source}; code of the model's authors runs on this machine with"
            " your rights"
        )
    dropped = tuple(sentence for judged in (*own, users) for sentence in judged.dropped)
    return Command(tuple(args), users.args, address, dropped, tuple(notes))


def replaced(extra: Sequence[str], flag: str, value: str) -> tuple[str, ...]:
    """Return the user's flags with another value for one flag that takes one value."""
    remaining, kept = list(extra), []
    while remaining:
        arg = remaining.pop(0)
        if arg == flag:
            del remaining[:1]
        elif not arg.startswith(f"{flag}="):
            kept.append(arg)
    return (*kept, flag, value)


def is_local(host: str) -> bool:
    """Return whether only this machine reaches a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def typed(name: str, extra: Sequence[str], *, detach: bool = False, own: Sequence[str] = ()) -> str:
    """Return the `inv serve` command of a user, ready to be copied; `own` are flags of inv."""
    parts = [
        "./scripts/inv",
        "serve",
        shlex.quote(name),
        *(["--detach"] if detach else []),
        *map(shlex.quote, own),
        *(["--", shlex.join(extra)] if extra else []),
    ]
    return " ".join(parts)


def try_it(url: str, model: str, *, has_key: bool) -> str:
    """Return the command that asks a server for a few tokens."""
    headers = "-H 'Content-Type: application/json'"
    if has_key:
        headers += ' -H "Authorization: Bearer $VLLM_API_KEY"'
    body = json.dumps({"model": model, "prompt": "The capital of France is", "max_tokens": 8})
    return hints.text("server.try_it", url=url, headers=headers, body=body)


def shown(
    layout: Layout, settings: Settings, argv: Sequence[str], environment: Mapping[str, str]
) -> Iterator[str]:
    """Yield lines of sh that start the command in its environment. Secrets have names only."""
    others = {*KNOWN, "_", "OLDPWD", "PWD", "SHLVL"}
    removed = [
        name
        for name in sorted(settings.shell)
        if name not in environment and name not in others and name.isidentifier()
    ]
    if removed:
        yield f"unset {' '.join(removed)}"
    yield from lines(layout, environment, settings.shell, is_exact=True)
    for name in secret_names(environment):
        yield f"# {name} is {'set, and not shown' if environment[name] else 'empty'}"
    yield settings.masked(shlex.join(argv))


def folder_of(name: str) -> Path | None:
    """Return the folder that a path on the command line means, None if it is no path."""
    path = paths.typed(name)
    is_named = name.startswith(("/", "~")) or name.endswith((".gguf", *public_recipes.SUFFIXES))
    is_path = is_named or is_relative(name)
    return path if is_path or ("/" in name and path.exists()) else None


def _by_flag(recipe: Recipe, users: Sequence[str]) -> Iterator[list[str]]:
    """Yield the arguments of each flag of the recipe that the user does not set."""
    for name, value in recipe.flags.items():
        flag = f"--{name}"
        if not _has(users, flag) and not _has(users, f"--no-{name}"):
            yield flags.args_of(name, list(value) if isinstance(value, tuple) else value)


def _has(args: Sequence[str], flag: str) -> bool:
    return any(arg == flag or arg.startswith(f"{flag}=") for arg in args)


def _check_values(args: Sequence[str]) -> None:
    port = flags.last(args, "--port") or ""
    if not (re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 65536):
        raise SettingsError(
            f"--port: {port!r} is not a port from 1 to 65535", hint=hints.text("server.port")
        )
    if not flags.last(args, "--host"):
        raise SettingsError(
            "--host: the address is missing", hint=hints.text("server.host", host=LOCAL)
        )
    share = flags.last(args, "--gpu-memory-utilization")
    if share is not None and not (
        re.fullmatch(r"\d*\.?\d+|\d+\.", share) and 0 < float(share) <= 1
    ):
        raise SettingsError(
            f"--gpu-memory-utilization: {share!r} is not a share above 0 and at most 1",
            hint=hints.text("server.utilization"),
        )
    for name in _COUNTS:
        count = flags.last(args, name)
        if count is not None and not re.fullmatch(r"[1-9]\d{0,8}|\d+(\.\d+)?[kKmM]", count):
            raise SettingsError(
                f"{name}: {count!r} is not a whole number of at least 1",
                hint=hints.text("server.positive", flag=name),
            )
    length = flags.last(args, "--max-model-len")
    if length is not None and not _LENGTH.fullmatch(length):
        raise SettingsError(
            f"--max-model-len: {length!r} is not a number of tokens",
            hint=hints.text("server.max_model_len"),
        )


def require_files(layout: Layout, settings: Settings, args: Sequence[str]) -> None:
    """Check what flags point to: is it there, readable and of the form that vLLM needs, which vLLM
    itself finds out during or after the load.

    Raises SettingsError, naming the flag.
    """
    modules: dict[str, str] = {}
    for flag, key, text in flags.leaves(args):
        if not text or "://" in text:
            continue
        path = Path(text)
        is_file = path.is_absolute() or text.endswith(".py")
        if _MODULES.fullmatch(key) and not (is_file and key.endswith("_plugin")):
            modules[re.split("[.:]", text)[0]] = f"{flag} {text}"
        elif problem := _problem(layout, args, key, path):
            raise SettingsError(
                f"{flag}: {text} {problem}",
                hint=hints.text("core.list_folder", folder=hardware.existing(path)),
            )
    _require_certificates(args)
    _require_modules(layout, settings, modules)


def reference_folder(settings: Settings, reference: flags.Reference) -> Path | None:
    """Return the folder of what a flag names, None if it is not on this machine."""
    path, cache = Path(reference.name), models.hub_cache(settings)
    return path if path.is_absolute() else models.cached(cache, reference.name, reference.revision)


def is_here(settings: Settings, reference: flags.Reference) -> bool:
    """Return whether what a flag names is on this machine, so that vLLM needs no hub for it."""
    folder = reference_folder(settings, reference)
    if folder is None:
        return False
    return models.holds(folder, reference.needs) if reference.needs else models.is_complete(folder)


def _problem(layout: Layout, args: Sequence[str], key: str, path: Path) -> str | None:
    """Return what is wrong with the file or folder of a setting, None if nothing is."""
    if key == "chat_template":
        return _problem_of_template(layout, path)
    if _READ.fullmatch(key):
        return _unreadable(path, is_json=key.endswith(("config_file", "scale_path")))
    if path.suffix == ".py":
        return _unreadable(paths.typed(str(path)))
    if not path.is_absolute():
        return None
    if key == "allowed_local_media_path":
        return None if path.is_dir() else "is not a folder"
    if _WRITTEN.fullmatch(key):
        is_blocked = path.exists() and not path.is_dir() and key.endswith("dir")
        place = hardware.existing(path)
        if is_blocked or not os.access(place, os.W_OK):
            return "is not a folder" if is_blocked else "cannot be written"
    wanted = {reference.name: reference for reference in flags.references(args, "")}
    return _problem_of_folder(args, path, wanted[str(path)]) if str(path) in wanted else None


def _problem_of_template(layout: Layout, path: Path) -> str | None:
    # A text with these is the template itself, and a name is one of vLLM's (chat_utils.py).
    if any(character in str(path) for character in "{}\n"):
        return None
    own = layout.vllm / "vllm" / "transformers_utils" / "chat_templates" / path
    if not path.is_absolute() and not own.is_file():
        return "is neither a file in this folder nor a template of vLLM"
    return _unreadable(own)


def _problem_of_folder(args: Sequence[str], folder: Path, reference: flags.Reference) -> str | None:
    if not folder.is_dir():
        return "is not a folder" if folder.exists() else "does not exist"
    if not reference.needs:
        lack = models.lack_of(folder)
        return f"lacks {lack}" if lack else None
    if not models.holds(folder, reference.needs):
        return f"has {'none of' if len(reference.needs) > 1 else 'no'} {', '.join(reference.needs)}"
    if flags.ADAPTER not in reference.needs:
        return None
    if not models.holds(folder, ("adapter_model.*", "new_embeddings.*")):
        return "lacks the adapter's weights"
    try:
        rank = (records.load(folder / flags.ADAPTER, dict[str, object]) or {}).get("r")
    except records.DecodeError as exc:
        return f"has a damaged {flags.ADAPTER}: {exc}"
    most = flags.last(args, "--max-lora-rank") or str(DEFAULT_LORA_RANK)
    if isinstance(rank, int) and most.isdigit() and rank > int(most):
        return f"has rank {rank}, and --max-lora-rank allows {most}"
    return None


def _unreadable(path: Path, *, is_json: bool = False) -> str | None:
    """Return why a file of text cannot be read, None if it can."""
    try:
        text = read_regular(path).decode()
        if is_json:
            records.parse(text)
    except OSError as exc:
        return f"cannot be read: {exc.strerror}"
    except UnicodeDecodeError:
        return "is not UTF-8"
    except records.DecodeError as exc:
        return f"cannot be read: {exc}"
    return None


def _require_certificates(args: Sequence[str]) -> None:
    """Load the certificates as the server does. Raises SettingsError."""
    certificate, key = flags.last(args, "--ssl-certfile"), flags.last(args, "--ssl-keyfile")
    authorities = flags.last(args, "--ssl-ca-certs")
    if not certificate and not authorities:
        return
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        if certificate:
            # A key with a password would stop the start for it.
            context.load_cert_chain(certificate, key or None, password=lambda: "")
        if authorities:
            context.load_verify_locations(authorities)
    except (OSError, ValueError) as exc:
        names = [name for name in (certificate, key) if name]
        raise SettingsError(
            f"there is no certificate with its key in {' and '.join(names) or authorities}: {exc}",
            hint=hints.text("core.list_files", paths=names or [authorities]),
        ) from exc


def _require_modules(layout: Layout, settings: Settings, modules: Mapping[str, str]) -> None:
    """Raise SettingsError for a module that the built interpreter cannot find."""
    if not modules:
        return
    argv: list[process.Argument] = [layout.environment_python, "-I", "-c", _FIND, *modules]
    answer = process.output_of(
        process.ask(argv, env=settings.child_environment("run"), limit_s=ANSWER_S)
    )
    for name in answer.value.split() if isinstance(answer, There) else ():
        raise SettingsError(
            f"{modules[name]}: there is no module {name} in .vllm",
            hint=hints.text("server.installed"),
        )


def _exposed(address: Address, *, has_key: bool, force: bool) -> str:
    reach = (
        f"--host {address.host} lets everyone who reaches port {address.port} of this machine use"
        " the model"
    )
    if has_key:
        return (
            f"{reach}; paths below /v1 need VLLM_API_KEY, other paths such as /metrics need no key,"
            " and nothing is encrypted"
        )
    if not force:
        hint = hints.text("server.api_key", port=address.port, host=LOCAL)
        raise SettingsError(f"{reach} without a key", hint=hint)
    return f"{reach} without a key (--force)"


def secret_names(environment: Mapping[str, str]) -> list[str]:
    """Return the variables that hold a secret: by name, with a password, or with another's value.

    A short value, such as a password of four letters, is a part of many that are not secret.
    """
    secrets = [text for text in secrets_of(environment.items()) if len(text) >= _LONG_SECRET]
    return sorted(
        name
        for name, text in environment.items()
        if is_secret(name) or has_login(text) or any(secret in text for secret in secrets)
    )


def lines(
    layout: Layout,
    environment: Mapping[str, str],
    outer: Mapping[str, str],
    *,
    is_exact: bool = False,
) -> Iterator[str]:
    """Yield lines of sh that turn `outer` into `environment`, without secrets and names that no
    shell can export.

    An interactive shell gets the entries of PATH behind scripts/, and not the built
    interpreter's folder; with `is_exact` each value is that of the environment.
    """
    secret = secret_names(environment)
    apart = _READ_ONLY if is_exact else (*LISTS, *_READ_ONLY, "VIRTUAL_ENV")
    for name, text in sorted(environment.items()):
        if (
            name not in apart
            and outer.get(name) != text
            and name not in secret
            and name.isidentifier()
            and name.isascii()
        ):
            yield f"export {name}={shlex.quote(text)}"
    if is_exact:
        return
    ours = {"PATH": [str(layout.root / "scripts")], "LD_LIBRARY_PATH": []}
    for name in LISTS:
        present = outer.get(name, "").split(os.pathsep)
        added = [
            entry
            for entry in environment.get(name, "").split(os.pathsep)
            if entry and entry != str(layout.environment / "bin")
        ]
        front = [entry for entry in (*ours[name], *added) if entry not in present]
        if front:
            yield f'export {name}={shlex.quote(os.pathsep.join(front))}"${{{name}:+:${name}}}"'


def built_environment(
    machine: Machine,
    phase: Phase,
    *,
    recipe: Mapping[str, str] | None = None,
    given: Mapping[str, str] | None = None,
    is_shown: bool = False,
) -> dict[str, str]:
    """Return the environment of a vLLM that is to be started, or with `is_shown` only shown.

    For a start the folders of compiled kernels are recorded as this stack's. Runs git once, and
    asks the driver if torch is built for CUDA. See run_environment.built_environment. Raises
    SmokeError for a start in a copied or moved clone, whose .vllm has the vLLM of another one.
    """
    layout, settings = machine.layout, machine.settings
    if not is_shown:
        run_environment.require_own_tree(machine)
    stack = jit_caches.observe(machine, tree=tree_oid(layout))
    if not is_shown:
        jit_caches.record(layout, stack)
    return run_environment.built_environment(
        layout, settings, phase, stack=stack, recipe=recipe, given=given
    )


def tree_oid(layout: Layout) -> str:
    """Return the tree OID of HEAD in vendor/vllm. Uncommitted edits do not count: whatever compiles
    them reads their text.
    """
    if not (layout.vllm / ".git").exists():
        return UNKNOWN_TREE
    try:
        return Git(layout.vllm).tree("HEAD")
    except WorkspaceError:
        # smoke, status and doctor report a broken repository.
        return UNKNOWN_TREE
