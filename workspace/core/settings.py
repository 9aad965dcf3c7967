"""Every setting: its name, default, meaning and where its value came from.

The only reader of os.environ and of .env. Precedence: flag, shell, .env, default.
"""

import difflib
import io
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from workspace.core.errors import SettingsError
from workspace.core.files import read_regular
from workspace.core.paths import Layout

Kind = Literal["text", "path", "url", "count", "switch", "choice", "archs"]
# workspace: read here and kept from children; build, run: given to children of that phase; both: to
# all.
Phase = Literal["workspace", "build", "run", "both"]
Source = Literal["flag", "shell", ".env", "default"]

# Texts that may be a path, and then may begin with ~.
_EXPANDED = (
    "KERNELS",
    "VLLM_MIRROR",
    "TRITON_MIRROR",
    "TRITON_DOWNLOADS_MIRROR",
    "EXTERNALS_MIRROR",
)
# Flags that are not called after their setting.
_FLAGS = {"MAX_JOBS": "jobs"}
_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off", ""}
_ARCH = re.compile(r"\d+\.\d+[af]?(\+PTX)?")
# As a time-out in ms this is what poll(2) can still count; of compilers, threads and GiB it is more
# than there are.
LARGEST_COUNT = 1_000_000
_SHOWN = 120
# The largest compiler process seen in a build of vLLM for a GB10 (scaled_mm_sm120_fp8, qutlass
# gemm), GiB, and the share of all memory that compilers may have beside a running model's.
LARGEST_COMPILER_GIB, COMPILERS_SHARE = 9.5, 0.75


@dataclass(frozen=True)
class Setting:
    name: str
    kind: Kind
    default: str
    phase: Phase
    meaning: str
    choices: tuple[str, ...] = ()
    secret: bool = False


@dataclass(frozen=True)
class Value:
    text: str
    source: Source


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "DEVICE",
        "choice",
        "auto",
        "workspace",
        "what vLLM is built for; auto: cuda where a GPU driver answers, else cpu",
        ("auto", "cuda", "cpu"),
    ),
    Setting(
        "SOURCE",
        "choice",
        "auto",
        "workspace",
        "where vendor/vllm comes from; auto: git, else the release archive",
        ("auto", "git", "release"),
    ),
    Setting(
        "KERNELS",
        "text",
        "auto",
        "workspace",
        "compiled libraries: auto (precompiled, and compiled where sources differ), precompiled"
        " (the pin's release wheel), native, a wheel",
    ),
    Setting(
        "PYTHON_VERSION",
        "text",
        "3.12",
        "workspace",
        "Python of the built environment; another one the pin supports is taken, and said, where it"
        " is missing",
    ),
    Setting(
        "USE_EXISTING_TORCH",
        "switch",
        "0",
        "workspace",
        "1: keep the torch that is in .vllm, whatever its version",
    ),
    Setting(
        "ALLOW_PRERELEASE",
        "switch",
        "0",
        "workspace",
        "1: let xgrammar, triton and flashinfer be pre-releases",
    ),
    Setting(
        "TORCH_INDEX_URL",
        "url",
        "",
        "workspace",
        "package index to take torch from instead of PyTorch's own",
    ),
    Setting(
        "VLLM_MIRROR",
        "text",
        "",
        "workspace",
        "git URL or path to fetch vLLM from instead of GitHub",
    ),
    Setting(
        "TRITON_REF",
        "text",
        "main",
        "workspace",
        "branch, tag or commit of Triton that inv pin.bump triton and fix-triton --ref take",
    ),
    Setting(
        "PIN_MIN_AGE_DAYS",
        "count",
        "7",
        "workspace",
        "days that a release must have been out before inv pin.bump takes it",
    ),
    Setting(
        "TRITON_MIRROR",
        "text",
        "",
        "workspace",
        "git URL or path to fetch Triton from instead of GitHub",
    ),
    Setting(
        "TRITON_DOWNLOADS_MIRROR",
        "text",
        "",
        "workspace",
        "address or folder that stands for https:// where a build of Triton downloads LLVM and"
        " tools",
    ),
    Setting(
        "EXTERNALS_MIRROR",
        "text",
        "",
        "workspace",
        "git URL or folder that stands for https://github.com/ where a build fetches sources",
    ),
    Setting(
        "CONNECT_TIMEOUT_S",
        "count",
        "5",
        "workspace",
        "seconds to wait for a remote before falling back",
    ),
    Setting(
        "WORKSPACE_CACHE_DIR",
        "path",
        "",
        "workspace",
        "downloads shared by all clones; empty: vllm-workspace in the user's cache folder",
    ),
    Setting(
        "CUDA_HOME",
        "path",
        "",
        "both",
        "CUDA toolkit; its bin and lib64 are put first on PATH and LD_LIBRARY_PATH of children",
    ),
    Setting(
        "TORCH_CUDA_ARCH_LIST",
        "archs",
        "",
        "build",
        "GPU architectures to compile for; 12.1a on a GB10",
    ),
    Setting(
        "MAX_JOBS",
        "count",
        "",
        "both",
        "compilers at once; also bounds FlashInfer's compilations at run time",
    ),
    Setting("NVCC_THREADS", "count", "", "build", "threads of one nvcc; MAX_JOBS is divided by it"),
    Setting(
        "CMAKE_BUILD_TYPE",
        "choice",
        "",
        "build",
        "Debug, Release or RelWithDebInfo; empty: the tree's default",
        ("", "Debug", "Release", "RelWithDebInfo"),
    ),
    Setting("CMAKE_ARGS", "text", "", "build", "more arguments for CMake"),
    Setting(
        "TRITON_PTXAS_PATH",
        "path",
        "",
        "both",
        "ptxas for Triton up to 3.5; later ones bring a better one for a GB10",
    ),
    Setting(
        "TRITON_PTXAS_BLACKWELL_PATH",
        "path",
        "",
        "both",
        "ptxas for Triton from 3.6 on, Blackwell GPUs",
    ),
    Setting(
        "LLVM_SYSPATH",
        "path",
        "",
        "build",
        "LLVM for a build of Triton, of the commit that its tree names, instead of a download",
    ),
    Setting(
        "JSON_SYSPATH",
        "path",
        "",
        "build",
        "nlohmann/json for a build of Triton, the folder above its include, instead of a download",
    ),
    Setting(
        "TRITON_OFFLINE_BUILD",
        "switch",
        "",
        "build",
        "1: a build of Triton downloads nothing; it then needs LLVM_SYSPATH and JSON_SYSPATH",
    ),
    Setting(
        "VLLM_CPU_KVCACHE_SPACE",
        "count",
        "",
        "run",
        "GiB for the KV cache without a GPU; empty: vLLM takes about half of the memory",
    ),
    Setting("HF_HOME", "path", "", "run", "where Hugging Face keeps models"),
    Setting("HF_HUB_OFFLINE", "switch", "", "run", "1: never ask the Hugging Face hub"),
    Setting("HF_TOKEN", "text", "", "run", "token for gated models", secret=True),
    Setting("VLLM_API_KEY", "text", "", "run", "key that a served model asks for", secret=True),
)
KNOWN: Mapping[str, Setting] = {setting.name: setting for setting in SETTINGS}
# The tokens of a language model are no secrets.
_SECRET_NAME = re.compile(
    r"(?<!TIK)TOKEN(?!IZER|S_PER)|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIAL", re.IGNORECASE
)

# What would make a child look at another interpreter, checkout or build than the one it is given.
_FOREIGN = re.compile(
    r"(PYTHON(PATH|HOME|STARTUP|SAFEPATH|INSPECT|USERBASE)|VIRTUAL_ENV(_PROMPT)?|CONDA_.*"
    r"|UV_(PYTHON|TORCH_BACKEND|PROJECT.*|SYSTEM_PYTHON|WORKING_DIR.*)|PIP_(TARGET|PREFIX|USER|REQUIRE_VIRTUALENV)|MAKEFLAGS|MAKELEVEL"
    r"|VLLM_USE_PRECOMPILED.*|VLLM_PRECOMPILED_.*|VLLM_TARGET_DEVICE|VLLM_VERSION_OVERRIDE|SETUPTOOLS_SCM_.*)$"
)
# What CMake, setup.py, cargo and Triton's build read, and no running vLLM (setup.py, cmake/,
# tools/).
_BUILD_ONLY = re.compile(
    r"(\w+_SRC_DIR|VLLM_(VERSION_OVERRIDE|MAIN_CUDA_VERSION|DOCKER_BUILD_CONTEXT|REQUIRE_RUST_FRONTEND|RS_BUILD_VERSION|DISABLE_SCCACHE|BUILD_\w+"
    r"|SKIP_(PRECOMPILED_)?VERSION_SUFFIX|KERNEL_SYMBOL_MAP|CPU_ARM_BF16|PYTHON_EXECUTABLE|PYTHON_PATH|IMAGE_TAG|PRECOMPILED_\w+|USE_PRECOMPILED\w*|TARGET_DEVICE)"
    r"|CMAKE_\w+|FETCHCONTENT_\w+|CARGO_\w+|RUSTC_\w+|TRITON_(BUILD_\w+|PARALLEL_LINK_JOBS|OFFLINE_BUILD|APPEND_CMAKE_ARGS|WHEEL_\w+)|LLVM_SYSPATH|JSON_SYSPATH"
    r"|TORCH_NIGHTLY|ACL_ROOT_DIR)$"
)
# What a running vLLM reads, and no build; VLLM_CONFIG_ROOT is read by both.
_RUN_ONLY = re.compile(
    r"(VLLM_(?!CONFIG_ROOT$)\w+|HF_\w+|HUGGING_?FACE_\w+|TRANSFORMERS_\w+|TIKTOKEN_\w+|TORCHDYNAMO_\w+|TORCHINDUCTOR_\w+)$"
)
_GIT_LOCAL = re.compile(
    r"GIT_(DIR|WORK_TREE|INDEX_FILE|OBJECT_DIRECTORY|ALTERNATE_OBJECT_DIRECTORIES|COMMON_DIR|NAMESPACE|PREFIX|QUARANTINE_PATH"
    r"|CONFIG_(PARAMETERS|COUNT|KEY_\d+|VALUE_\d+)|CEILING_DIRECTORIES)$"
)


@dataclass(frozen=True)
class Settings:
    """The settings of one run. `warnings` are sentences for the door to print."""

    values: Mapping[str, Value]
    passed: Mapping[str, Value]
    shell: Mapping[str, str] = field(repr=False)
    warnings: tuple[str, ...] = ()

    def text(self, name: str) -> str:
        return self.values[name].text

    def source(self, name: str) -> Source:
        return self.values[name].source

    def switch(self, name: str) -> bool:
        return self.text(name).lower() in _TRUE

    def count(self, name: str) -> int | None:
        return int(self.text(name)) if self.text(name) else None

    def path(self, name: str) -> Path | None:
        return Path(self.text(name)).expanduser() if self.text(name) else None

    @property
    def cache(self) -> Path:
        """The folder of downloads that all clones of this user share (XDG Base Directory
        Specification).
        """
        own = self.path("WORKSPACE_CACHE_DIR")
        base = self.shell.get("XDG_CACHE_HOME")
        if not own and not base and not _expands("~"):
            raise SettingsError(
                "there is no home folder to keep downloads in: HOME is not set",
                hint="export WORKSPACE_CACHE_DIR=/a/folder/of/yours",
            )
        return own or (Path(base) if base else Path("~/.cache").expanduser()) / "vllm-workspace"

    @property
    def index_url(self) -> str | None:
        """The package index that this user configured for uv or pip, if any."""
        return next(
            (
                self.shell[name]
                for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL")
                if self.shell.get(name)
            ),
            None,
        )

    @property
    def secrets(self) -> tuple[str, ...]:
        """Values that no log and no screen may show."""
        named = {
            name: value.text for name, value in (*self.values.items(), *self.passed.items())
        } | dict(self.shell)
        return tuple(
            sorted(
                {text for name, text in named.items() if is_secret(name) and len(text) >= 4},
                key=len,
                reverse=True,
            )
        )

    def masked(self, text: str) -> str:
        """A text without secrets, as long as it was."""
        for secret in self.secrets:
            text = text.replace(secret, "****")
        return text

    def presentable(self, text: str) -> str:
        """A value as it may be shown: without secrets, without the user of an address, and no
        longer than a line or two.
        """
        return _presentable(text, self.secrets)

    def child_environment(
        self, phase: Literal["plain", "build", "run"], extra: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """The environment of a child: the shell's, without what points elsewhere, plus the settings
        of its phase and `extra`.

        plain: no settings, for uv, git and programs that only look; build: what a compiler may see,
        no secrets; run: the built vLLM.
        """
        environment = {
            name: text
            for name, text in self.shell.items()
            if not _FOREIGN.match(name) and not _GIT_LOCAL.match(name) and name not in KNOWN
        }
        environment = {
            name: text
            for name, text in environment.items()
            if phase == "plain" or is_for(name, phase)
        }
        if phase == "build":
            environment = {name: text for name, text in environment.items() if not is_secret(name)}
        if foreign := self.shell.get("VIRTUAL_ENV"):
            environment["PATH"] = os.pathsep.join(
                entry
                for entry in environment.get("PATH", "").split(os.pathsep)
                if entry != str(Path(foreign) / "bin")
            )
        if phase != "plain":
            passed = {
                name: value.text
                for name, value in self.passed.items()
                if is_for(name, phase) and not _FOREIGN.match(name)
            }
            environment |= {
                name: text for name, text in passed.items() if phase == "run" or not is_secret(name)
            }
            environment |= {
                name: value.text
                for name, value in self.values.items()
                if value.text and KNOWN[name].phase in (phase, "both")
            }
            if phase == "run":
                environment.setdefault(
                    "MAX_JOBS",
                    str(
                        fitting_jobs(
                            len(os.sched_getaffinity(0)),
                            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30,
                        )
                    ),
                )
            if home := self.path("CUDA_HOME"):
                for name, folder in (("PATH", "bin"), ("LD_LIBRARY_PATH", "lib64")):
                    former = [
                        entry
                        for entry in environment.get(name, "").split(os.pathsep)
                        if entry and entry != str(home / folder)
                    ]
                    environment[name] = os.pathsep.join([str(home / folder), *former])
        return environment | dict(extra or {})


def fitting_jobs(cores: int, memory_gib: float) -> int:
    """How many compilers of any size fit at once: what FlashInfer is told at run time, which else
    starts one for each core (flashinfer-ai/flashinfer#3634).
    """
    return max(1, min(cores, int(memory_gib * COMPILERS_SHARE / LARGEST_COMPILER_GIB)))


def is_for(name: str, phase: Literal["build", "run"]) -> bool:
    """Whether a variable is any business of a build, or of a running vLLM; of what is not known it
    is taken to be.
    """
    if name in KNOWN:
        return KNOWN[name].phase in (phase, "both")
    if _BUILD_ONLY.match(name):
        return phase == "build"
    return phase == "run" or not _RUN_ONLY.match(name)


def is_set_by_the_workspace(name: str) -> bool:
    """Whether a variable would point children elsewhere, so that nobody's word on it is passed
    on.
    """
    return bool(_FOREIGN.match(name))


def is_secret(name: str) -> bool:
    setting = KNOWN.get(name)
    return setting.secret if setting else bool(_SECRET_NAME.search(name))


def load(
    layout: Layout,
    *,
    flags: Mapping[str, str | None] | None = None,
    also_known: Callable[[], Iterable[str]] = tuple,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Read flags, shell and .env into one set of settings.

    `flags` maps setting names to what the command line said, None where it said nothing;
    `also_known` gives names that are not worth a warning, such as those of the pinned tree's own
    registry, and is asked only where .env has a name unknown here. Raises SettingsError for a .env
    that cannot be read and for a bad value, naming the line or the flag.
    """
    shell = dict(os.environ if environ is None else environ)
    written = _read_dotenv(layout.dotenv)
    # .env may put a secret into any other value: DEVICE=${HF_TOKEN}.
    named = [*shell.items(), *((name, text) for name, (text, _) in written.items())]
    secrets = sorted(
        {text for name, text in named if is_secret(name) and len(text) >= 4}, key=len, reverse=True
    )
    values: dict[str, Value] = {}
    for setting in SETTINGS:
        flag = (flags or {}).get(setting.name)
        if flag is not None:
            value, place = (
                Value(flag, "flag"),
                f"--{_FLAGS.get(setting.name) or setting.name.lower().replace('_', '-')}",
            )
        elif setting.name in shell:
            value, place = Value(shell[setting.name], "shell"), f"{setting.name} in the shell"
        elif setting.name in written:
            value, place = (
                Value(written[setting.name][0], ".env"),
                f".env, line {written[setting.name][1]}: {setting.name}",
            )
        else:
            value, place = Value(setting.default, "default"), setting.name
        if expected := _expected(setting, value.text):
            shown = "a value" if setting.secret else repr(_presentable(value.text, secrets))
            raise SettingsError(
                f"{place}: {shown} is not {expected}", hint=f"{setting.name}: {setting.meaning}"
            )
        values[setting.name] = value
    unknown = {name: text for name, (text, _) in written.items() if name not in KNOWN}
    passed = {
        name: Value(shell.get(name, text), "shell" if name in shell else ".env")
        for name, text in unknown.items()
    }
    known = {*KNOWN, *also_known()} if unknown else KNOWN.keys()
    differing = [
        (name, shell[name], text)
        for name, (text, _) in written.items()
        if name in shell and shell[name] != text
    ]
    warnings = [
        _hidden(name, _presentable(outer, secrets), _presentable(text, secrets))
        for name, outer, text in differing
    ]
    warnings += [
        _unknown(name, written[name][1], known)
        for name in unknown
        if name not in known and not _BUILD_ONLY.match(name)
    ]
    return Settings(values, passed, shell, tuple(warnings))


def written(layout: Layout) -> Mapping[str, str]:
    """What .env says by itself, whatever the shell says. Raises SettingsError for one that cannot
    be read.
    """
    return {name: text for name, (text, _) in _read_dotenv(layout.dotenv).items()}


def forget_outer_git() -> None:
    """Drop what a git hook exports about its own repository, so that GitPython sees each checkout
    by its path (githooks(5)).
    """
    for name in [name for name in os.environ if _GIT_LOCAL.match(name)]:
        del os.environ[name]


def forget_odd_terminal() -> None:
    """Drop a size of the terminal that is none, which rich would take for a number and fail on."""
    for name in ("COLUMNS", "LINES"):
        if not re.fullmatch(r"[0-9]{1,4}", os.environ.get(name, "0")):
            del os.environ[name]


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None where none is like it."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)
    return found[0] if found else None


def _read_dotenv(path: Path) -> dict[str, tuple[str, int]]:
    """Names with value and line. References such as ${HOME} are resolved as python-dotenv does."""
    from dotenv.main import DotEnv
    from dotenv.parser import parse_stream

    try:
        raw = read_regular(path)
    except FileNotFoundError:
        return {}
    except IsADirectoryError:
        raise SettingsError(
            ".env is a directory, not a file", hint="mv .env .env.old && cp .env.example .env"
        ) from None
    except OSError as exc:
        raise SettingsError(f".env cannot be read: {exc.strerror}", hint="ls -l .env") from exc
    if raw.startswith(b"\xef\xbb\xbf"):
        raise SettingsError(
            ".env, line 1: begins with a byte order mark, which hides the first name",
            hint=r"sed -i '1s/^\xef\xbb\xbf//' .env",
        )
    if b"\r" in raw:
        line = raw[: raw.index(b"\r")].count(b"\n") + 1
        raise SettingsError(
            f".env, line {line}: has Windows line ends, which a shell takes into the value",
            hint=r"sed -i 's/\r$//' .env",
        )
    if b"\0" in raw:
        line = raw[: raw.index(b"\0")].count(b"\n") + 1
        raise SettingsError(
            f".env, line {line}: has a zero byte; no program can be given that",
            hint="write the line again",
        )
    try:
        text = raw.decode()
    except UnicodeDecodeError as exc:
        raise SettingsError(
            f".env, line {raw[: exc.start].count(bytes([10])) + 1}: is not UTF-8",
            hint="write the line again",
        ) from exc
    lines: dict[str, int] = {}
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
                f".env, line {line}: is not of the form NAME=value",
                hint="quote a value that has blanks or #; begin a remark with #",
            )
        if binding.key is not None:
            lines[binding.key] = line
    resolved = DotEnv(
        dotenv_path=None, stream=io.StringIO(text), interpolate=True, override=False
    ).dict()
    return {name: (value, lines[name]) for name, value in resolved.items() if value is not None}


def _expected(setting: Setting, text: str) -> str | None:
    """What the value should be, None where it is."""
    expected: str | None = None
    if setting.kind == "choice" and text not in setting.choices:
        expected = "one of " + ", ".join(choice for choice in setting.choices if choice)
    elif (
        setting.kind == "count"
        and text
        and not (re.fullmatch(r"[0-9]{1,9}", text) and 0 < int(text) <= LARGEST_COUNT)
    ):
        expected = "a whole number of at least 1" + (
            f" and at most {LARGEST_COUNT}" if re.fullmatch(r"0*[1-9][0-9]*", text) else ""
        )
    elif setting.kind == "switch" and text.lower() not in _TRUE | _FALSE:
        expected = "0 or 1"
    elif setting.kind == "url" and text and not re.match(r"(https?|file)://\S+$", text):
        expected = "an address that begins with https:// or file://"
    elif (
        setting.kind == "archs"
        and text
        and not all(_ARCH.fullmatch(arch) for arch in re.split(r"[ ;,]+", text.strip(" ;,")))
    ):
        expected = "architectures such as 12.1a, several with ; between them"
    elif "\n" in text or "\0" in text:
        expected = "one line"
    elif (setting.kind == "path" or setting.name in _EXPANDED) and not _expands(text):
        expected = "below a home folder that is known here"
    return expected


def _expands(text: str) -> bool:
    try:
        Path(text).expanduser()
    except RuntimeError:
        return False
    return True


def _presentable(text: str, secrets: Iterable[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, "****")
    return shortened(re.sub(r"(?<=://)\S*@|\S*:\S*@", "****@", text))


def shortened(text: str) -> str:
    """A text no longer than a line or two."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _hidden(name: str, shell_text: str, text: str) -> str:
    if is_secret(name):
        return f"{name} in the shell hides another value in .env; `unset {name}` to use .env's"
    return (
        f"{name}={shell_text} in the shell hides {name}={text} in .env; `unset {name}` to use"
        " .env's"
    )


def _unknown(name: str, line: int, known: Iterable[str]) -> str:
    like = nearest(name, known)
    follows = (
        "./scripts/inv env says what becomes of it."
        if name.startswith("VLLM_")
        else "It is passed on as it is."
    )
    return (
        f".env, line {line}: {name} is no setting known here"
        + (f"; did you mean {like}?" if like else ".")
        + f" {follows}"
    )
