"""Every setting: its name, default, meaning and the source of its value.

The only reader of os.environ and of .env. Precedence: flag, shell, .env, default.
"""

import difflib
import io
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from workspace.core import child_variables, hints
from workspace.core.child_variables import PHASES, TO_ALL, Base, Phase, with_given, with_rows
from workspace.core.errors import SettingsError
from workspace.core.files import read_regular
from workspace.core.known_settings import (
    BUILD_ONLY,
    KNOWN,
    OF_THE_LOGIN,
    RUN_ONLY,
    SETTINGS,
    TRUE,
    Setting,
    absolute,
    expands,
    expected,
    is_of_library,
    is_relative,
    is_secret,
    passed_on,
    secrets_of,
    usual_names,
)
from workspace.core.paths import Layout, cache_home, typed

Source = Literal["flag", "shell", ".env", "default"]

# Flags whose name differs from that of their setting.
_FLAGS = {"MAX_JOBS": "jobs"}
# Valid values of settings without a default.
_EXAMPLES = {
    "count": "4",
    "switch": "0",
    "archs": "12.1a",
    "mirror": "https://host/vllm.git",
    "url": "https://host/simple",
    "path": "/a/folder",
}
_SHOWN = 120


@dataclass(frozen=True)
class Notice:
    """A sentence on a line of .env that has not the effect which its writer expects.

    `line` is the number of that line, None where the shell hides the name.
    """

    kind: Literal["hidden", "repeated", "unknown"]
    name: str
    sentence: str
    line: int | None = None

    @property
    def hint(self) -> str:
        if self.kind == "hidden" and self.name in OF_THE_LOGIN:
            return hints.text("machine.drop_from_dotenv", name=self.name)
        if self.kind == "hidden":
            return hints.text("machine.unset", name=self.name)
        if self.kind == "repeated":
            return hints.text("machine.drop_line", line=self.line)
        # An unknown name may be right: nothing removes it, an editor shows it.
        return hints.text("core.edit_dotenv", line=self.line)


@dataclass(frozen=True)
class Value:
    text: str
    source: Source


# Variables that point a child to another interpreter, checkout or build.
_FOREIGN = re.compile(
    r"(PYTHON(PATH|HOME|STARTUP|SAFEPATH|INSPECT|USERBASE)|VIRTUAL_ENV(_PROMPT)?|CONDA_.*"
    r"|UV_(PYTHON|TORCH_BACKEND|PROJECT.*|SYSTEM_PYTHON|WORKING_DIR.*|TARGET|PREFIX|ENV_FILE"
    # What says which versions and files to install; the pin and the tree say it here.
    r"|(BUILD_)?CONSTRAINT|OVERRIDE|EXCLUDE|REQUIRE_HASHES|NO_VERIFY_HASHES|PRERELEASE|RESOLUTION"
    r"|FORK_STRATEGY|NO_DEPS|NO_BINARY.*|NO_BUILD.*|NO_SOURCES.*|NO_INSTALLER_METADATA|DRY_RUN"
    r"|ISOLATED|FROZEN|LOCKED|BREAK_SYSTEM_PACKAGES)"
    r"|PIP_(TARGET|PREFIX|ROOT|USER|REQUIRE_VIRTUALENV|(BUILD_)?CONSTRAINT|REQUIRE_HASHES|NO_DEPS"
    r"|PRE|NO_BINARY|ONLY_BINARY|NO_BUILD_ISOLATION|DRY_RUN)|MAKEFLAGS|MAKELEVEL"
    r"|VLLM_USE_PRECOMPILED.*|VLLM_PRECOMPILED_.*|VLLM_TARGET_DEVICE|VLLM_VERSION_OVERRIDE"
    r"|SETUPTOOLS_SCM_.*)$"
)
_VARIABLE = re.compile(r"\$(?:\{(?P<braced>\w+)\}|(?P<plain>[A-Za-z_]\w*))")
_GIT_LOCAL = re.compile(
    r"GIT_(DIR|WORK_TREE|INDEX_FILE|OBJECT_DIRECTORY|ALTERNATE_OBJECT_DIRECTORIES|COMMON_DIR"
    r"|NAMESPACE|PREFIX|QUARANTINE_PATH|SHALLOW_FILE|GRAFT_FILE|ATTR_SOURCE|DEFAULT_HASH"
    r"|DEFAULT_REF_FORMAT|(LITERAL|GLOB|NOGLOB|ICASE)_PATHSPECS|CONFIG"
    r"|CONFIG_(PARAMETERS|COUNT|KEY_\d+|VALUE_\d+)|CEILING_DIRECTORIES)$"
)


@dataclass(frozen=True)
class Settings:
    """The settings of one run. `warnings` are for the doctor and for `inv env`."""

    values: Mapping[str, Value]
    passed: Mapping[str, Value]
    shell: Mapping[str, str] = field(repr=False)
    warnings: tuple[Notice, ...] = ()
    # What an earlier `inv env.export` set, and the user did not change; `shell` lacks it.
    exported: frozenset[str] = frozenset()

    def text(self, name: str) -> str:
        return self.values[name].text

    def source(self, name: str) -> Source:
        return self.values[name].source

    def switch(self, name: str) -> bool:
        return self.text(name).lower() in TRUE

    def count(self, name: str) -> int | None:
        return int(self.text(name)) if self.text(name) else None

    def path(self, name: str) -> Path | None:
        """Return a path, which is absolute: see `load`."""
        return typed(self.text(name)) if self.text(name) else None

    @property
    def connect_timeout_s(self) -> float:
        return float(self.count("CONNECT_TIMEOUT_S") or 5)

    @property
    def cache(self) -> Path:
        """Downloads shared by all clones of this user, see paths.cache_home."""
        own = self.path("WORKSPACE_CACHE_DIR")
        base = self.shell.get("XDG_CACHE_HOME")
        if not own and not base and not expands("~"):
            raise SettingsError(
                "there is no home folder to keep downloads in: HOME is not set",
                hint=hints.text("core.cache_folder"),
            )
        return own or cache_home(self.shell) / "vllm-workspace"

    @property
    def index_url(self) -> str | None:
        """The package index that the user configured for uv or pip, if any."""
        names = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL")
        return next((self.shell[name] for name in names if self.shell.get(name)), None)

    @property
    def secrets(self) -> tuple[str, ...]:
        """Values that no log and no screen may show, longest first."""
        own = ((name, value.text) for name, value in (*self.values.items(), *self.passed.items()))
        return secrets_of((*own, *self.shell.items()))

    def masked(self, text: str) -> str:
        """Return the text without secrets, at full length."""
        for secret in self.secrets:
            text = text.replace(secret, "****")
        return text

    def presentable(self, text: str) -> str:
        """Return a value without secrets and users of addresses, cut to a line or two."""
        return _presentable(text, self.secrets)

    def is_users(self, name: str) -> bool:
        """Return whether the user sets a variable, in the shell or in .env."""
        if name in KNOWN:
            return self.source(name) != "default" and bool(self.text(name))
        return name in self.passed or name in self.shell

    def child_environment(
        self,
        phase: Phase,
        given: Mapping[str, str | None] | None = None,
        *,
        layout: Layout | None = None,
        recipe: Mapping[str, str] | None = None,
    ) -> dict[str, str]:
        """Return the whole environment of a child of this phase; see core/child_variables.py.

        Later sources win: the shell, .env and the settings, the recipe where the user sets nothing,
        the table, and `given`, in which None removes a variable. Raises ValueError for a given name
        that no row of the table has, and where a row needs the layout.
        """
        base = PHASES[phase][0]
        environment = self._inherited(base)
        if base != "plain":
            environment |= self._own(base)
        environment |= {name: self.text(name) for name in TO_ALL if self.text(name)}
        environment |= {
            name: text for name, text in (recipe or {}).items() if not self.is_users(name)
        }
        composed = with_rows(environment, phase, cuda_home=self.path("CUDA_HOME"), layout=layout)
        return with_given(composed, phase, given or {})

    def _inherited(self, base: Base) -> dict[str, str]:
        """Return the variables of the shell that a child may see."""
        environment = {
            # A child may run in another folder.
            name: str(typed(text)) if base != "plain" and is_relative(text) else text
            for name, text in self.shell.items()
            if not _FOREIGN.match(name)
            and not _GIT_LOCAL.match(name)
            and name not in KNOWN
            and (base == "plain" or is_for(name, base))
            and not (base == "build" and is_secret(name))
        }
        if foreign := self.shell.get("VIRTUAL_ENV"):
            folder = str(Path(foreign) / "bin")
            entries = environment.get("PATH", "").split(os.pathsep)
            environment["PATH"] = os.pathsep.join(entry for entry in entries if entry != folder)
        return environment

    def _own(self, base: Literal["build", "run"]) -> dict[str, str]:
        """Return the variables of .env and of the settings that a child gets."""
        return {
            name: value.text
            for name, value in self.passed.items()
            if is_for(name, base)
            and not _FOREIGN.match(name)
            and (base == "run" or not is_secret(name))
        } | {
            name: value.text
            for name, value in self.values.items()
            if value.text and KNOWN[name].phase in (base, "both")
        }


def is_for(name: str, phase: Literal["build", "run"]) -> bool:
    """Return whether the variable applies to this phase; unknown names apply to both."""
    if name in KNOWN:
        return KNOWN[name].phase in (phase, "both")
    if BUILD_ONLY.match(name):
        return phase == "build"
    return phase == "run" or not RUN_ONLY.match(name)


def is_set_by_the_workspace(name: str) -> bool:
    """Return whether the workspace sets this variable itself and ignores the user's value."""
    return bool(_FOREIGN.match(name))


def load(
    layout: Layout,
    *,
    flags: Mapping[str, str | None] | None = None,
    also_known: Callable[[], Iterable[str]] = tuple,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Read flags, shell and .env into one set of settings.

    `flags` maps names of settings to values of the command line, None where the flag is absent.
    `also_known` returns further names that need no warning, such as the registry of the pinned
    tree; it is called only where .env has an unknown name. A relative path in .env counts from the
    folder of .env, another from the folder in which the command was typed. Raises SettingsError for
    an unreadable .env and for a bad value, and names the line or the flag.
    """
    whole = os.environ if environ is None else environ
    shell = child_variables.without_exported(whole)
    written = _read_dotenv(layout.dotenv)
    # .env may put a secret into any other value: DEVICE=${HF_TOKEN}.
    named = [*shell.items(), *((name, text) for name, (text, _) in written.items())]
    secrets = secrets_of(named)
    values = {
        setting.name: _absolute(
            setting, _value(setting, flags or {}, shell, written, secrets), layout.root
        )
        for setting in SETTINGS
    }
    unknown = {name: text for name, (text, _) in written.items() if name not in KNOWN}
    passed = {
        name: Value(shell[name], "shell")
        if name in shell
        else Value(passed_on(name, text, layout.root), ".env")
        for name, text in unknown.items()
    }
    known = {*KNOWN, *also_known()} if unknown else KNOWN.keys()
    exported = frozenset(whole.keys() - shell.keys() - {child_variables.EXPORTED})
    notices = tuple(_warnings(shell, written, known, secrets))
    return Settings(values, passed, shell, notices, exported)


def _warnings(
    shell: Mapping[str, str],
    written: Mapping[str, tuple[str, list[int]]],
    known: Collection[str],
    secrets: Sequence[str],
) -> Iterator[Notice]:
    """Yield notices of lines of .env that have no effect, and of unknown names."""
    for name, (text, lines) in written.items():
        if name in shell and shell[name] != text:
            yield _hidden(name, _presentable(shell[name], secrets), _presentable(text, secrets))
        for line in lines[:-1]:
            sentence = f".env, line {line}: {name} is set again in line {lines[-1]}, which counts"
            yield Notice("repeated", name, sentence, line)
    for name, (_, lines) in written.items():
        if name not in known and not BUILD_ONLY.match(name) and not is_of_library(name, known):
            yield _unknown(name, lines[-1], known)


def _value(
    setting: Setting,
    flags: Mapping[str, str | None],
    shell: Mapping[str, str],
    written: Mapping[str, tuple[str, list[int]]],
    secrets: Iterable[str],
) -> Value:
    """Return the value of a setting. Raises SettingsError for a bad one, naming its place."""
    name = setting.name
    flag = flags.get(name)
    if flag is not None:
        value = Value(flag, "flag")
        place = _flag(name)
    elif name in shell:
        value, place = Value(shell[name], "shell"), f"{name} in the shell"
    elif name in written:
        text, (*_, line) = written[name]
        value, place = Value(text, ".env"), f".env, line {line}: {name}"
    else:
        value, place = Value(setting.default, "default"), name
    if wanted := expected(setting, value.text):
        shown = "the value" if setting.secret else repr(_presentable(value.text, secrets))
        raise SettingsError(
            f"{place}: {shown} is not {wanted}", hint=_example(setting, is_flag=flag is not None)
        )
    return value


def _absolute(setting: Setting, value: Value, root: Path) -> Value:
    """Return the value with an absolute path, where it is a path on this machine."""
    folder = root if value.source == ".env" else None
    return replace(value, text=absolute(setting, value.text, folder))


def _example(setting: Setting, *, is_flag: bool) -> str:
    """Return a valid value as it is written in this place, and what the setting means."""
    text = setting.default or _EXAMPLES.get(setting.kind, "")
    name, meaning = setting.name, setting.meaning
    if is_flag:
        return hints.text(
            "core.valid_flag", flag=_flag(name), value=text, name=name, meaning=meaning
        )
    return hints.text("core.valid_value", name=name, value=text, meaning=meaning)


def _flag(name: str) -> str:
    return f"--{_FLAGS.get(name) or name.lower().replace('_', '-')}"


def written(layout: Layout) -> Mapping[str, str]:
    """Return the values of .env alone, whatever the shell holds. Raises SettingsError as `load`."""
    return {name: text for name, (text, _) in _read_dotenv(layout.dotenv).items()}


def forget_outer_git() -> None:
    """Drop the variables of a git hook, so that git finds each checkout by path (githooks(5))."""
    for name in [name for name in os.environ if _GIT_LOCAL.match(name)]:
        del os.environ[name]


def forget_odd_terminal() -> None:
    """Drop an invalid terminal size, on which rich would fail."""
    for name in ("COLUMNS", "LINES"):
        if not re.fullmatch(r"[0-9]{1,4}", os.environ.get(name, "0")):
            del os.environ[name]


def similar(name: str, known: Iterable[str], *, cutoff: float = 0.75) -> tuple[str, ...]:
    """Return up to three of the known names that are most like `name`, best first."""
    return tuple(difflib.get_close_matches(name, list(known), n=3, cutoff=cutoff))


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name most like `name`, or None where none is similar."""
    return next(iter(similar(name, known)), None)


def _read_dotenv(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Return name, value and lines of each setting; the last line counts.

    Variables are resolved as in a shell: $HOME and ${HOME}.
    """
    from dotenv.main import DotEnv
    from dotenv.parser import parse_stream

    try:
        raw = read_regular(path)
    except FileNotFoundError:
        return {}
    except IsADirectoryError:
        raise SettingsError(
            ".env is a folder, not a file", hint=hints.text("core.new_dotenv")
        ) from None
    except OSError as exc:
        raise SettingsError(
            f".env cannot be read: {exc.strerror}", hint=hints.text("core.list_dotenv")
        ) from exc
    text = _dotenv_text(raw)
    lines: dict[str, list[int]] = {}
    resolvable = ""
    for binding in parse_stream(io.StringIO(text)):
        line = (
            binding.original.line
            + len(binding.original.string)
            - len(binding.original.string.lstrip("\n"))
        )
        if binding.error or (
            binding.key is not None
            and (binding.value is None or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", binding.key))
        ):
            raise SettingsError(
                f".env, line {line} is not of the form NAME=value",
                hint=hints.text("core.quote_value", line=line),
            )
        if binding.key is not None:
            lines.setdefault(binding.key, []).append(line)
        resolvable += _with_braces(binding.original.string, binding.key or "", line, {*lines})
    stream = io.StringIO(resolvable)
    resolved = DotEnv(dotenv_path=None, stream=stream, interpolate=True, override=False).dict()
    return {name: (value, lines[name]) for name, value in resolved.items() if value is not None}


def _with_braces(string: str, name: str, line: int, earlier: Collection[str]) -> str:
    """Return an assignment of .env with ${NAME} for $NAME: python-dotenv resolves only that form.

    Single quotes and secrets keep a $ as it is, and so does the name of no variable. Raises
    SettingsError for a path with such a name: a folder called $HOME would be made.
    """
    if is_secret(name) or string.partition("=")[2].lstrip().startswith("'"):
        return string

    def braced(found: re.Match[str]) -> str:
        variable = found["braced"] or found["plain"]
        if variable in os.environ or variable in earlier:
            return f"${{{variable}}}"
        if name in KNOWN and KNOWN[name].kind in ("path", "mirror", "url"):
            raise SettingsError(
                f".env, line {line}: {name} needs the variable {variable}, which is not set",
                hint=hints.text("core.edit_dotenv", line=line),
            )
        return found[0]

    return _VARIABLE.sub(braced, string)


def _dotenv_text(raw: bytes) -> str:
    """Return .env as text. Raises SettingsError for bytes that a shell or a program misreads."""

    def fault(at: int, message: str, hint: str) -> SettingsError:
        line = raw[:at].count(b"\n") + 1
        return SettingsError(f".env, line {line} {message}", hint=hint)

    if raw.startswith(b"\xef\xbb\xbf"):
        message = "begins with a byte order mark, which hides the first name"
        raise fault(0, message, hints.text("core.without_bom"))
    if (at := raw.find(b"\r")) >= 0:
        message = "has Windows line ends, which a shell takes into the value"
        raise fault(at, message, hints.text("core.without_cr"))
    if (at := raw.find(b"\0")) >= 0:
        message = "has a zero byte, which no program accepts"
        raise fault(at, message, hints.text("core.begin_dotenv"))
    try:
        return raw.decode()
    except UnicodeDecodeError as exc:
        raise fault(exc.start, "is not UTF-8", hints.text("core.begin_dotenv")) from exc


def _presentable(text: str, secrets: Iterable[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, "****")
    return shortened(re.sub(r"(?<=://)\S*@|\S*:\S*@", "****@", text))


def without_user(text: str) -> str:
    """Return a text without user names and passwords in its URLs, fit to print."""
    return re.sub(r"(?<=://)[^/@\s]*@", "", text)


def shortened(text: str) -> str:
    """Return a text of at most a line or two."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _hidden(name: str, shell_text: str, text: str) -> Notice:
    if is_secret(name):
        return Notice("hidden", name, f"{name} in the shell hides another value in .env")
    return Notice("hidden", name, f"{name}={shell_text} in the shell hides {name}={text} in .env")


def _unknown(name: str, line: int, known: Iterable[str]) -> Notice:
    like = nearest(name, {*known, *usual_names()})
    meant = f"; did you mean {like}?" if like else ""
    return Notice("unknown", name, f".env, line {line}: {name} is not a known setting{meant}", line)
