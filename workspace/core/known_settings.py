"""The table of all settings: name, kind, default, phase and meaning of each; families of other
variables that a tool reads; and the names and values that are secret.

A new setting is one row here and one line in .env.example; core/settings.py reads its value.
"""

import difflib
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workspace.core.paths import typed

Kind = Literal["text", "path", "url", "mirror", "python", "count", "switch", "choice", "archs"]
# workspace: read here and kept from children; build, run: given to children of that phase; both: to
# all.
Phase = Literal["workspace", "build", "run", "both"]

# No shell works without these: a line of .env with one of them is removed, not the variable.
OF_THE_LOGIN = frozenset({"HOME", "LANG", "LOGNAME", "PATH", "PWD", "SHELL", "TERM", "USER"})


@dataclass(frozen=True)
class Setting:
    name: str
    kind: Kind
    default: str
    phase: Phase
    meaning: str
    choices: tuple[str, ...] = ()
    secret: bool = False


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "DEVICE",
        "choice",
        "auto",
        "workspace",
        "what vLLM is built for; auto: cuda where an NVIDIA driver is installed, else cpu",
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
        "python",
        "3.12",
        "workspace",
        "Python of the built environment; where it is missing, another one that the pin"
        " supports is taken, with a message",
    ),
    Setting(
        "USE_EXISTING_TORCH",
        "switch",
        "0",
        "workspace",
        "1 keeps the torch that is in .vllm, whatever its version",
    ),
    Setting(
        "ALLOW_PRERELEASE",
        "switch",
        "0",
        "workspace",
        "1 lets xgrammar, triton and flashinfer be pre-releases",
    ),
    Setting(
        "VERBOSE",
        "switch",
        "0",
        "workspace",
        "1 shows each command that changes something, as --verbose does; the log has them anyway",
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
        "mirror",
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
        "age in days that a release needs before inv pin.bump takes it",
    ),
    Setting(
        "TRITON_MIRROR",
        "mirror",
        "",
        "workspace",
        "git URL or path to fetch Triton from instead of GitHub",
    ),
    Setting(
        "TRITON_DOWNLOADS_MIRROR",
        "mirror",
        "",
        "workspace",
        "address or folder that stands for https:// where a build of Triton downloads LLVM and"
        " tools",
    ),
    Setting(
        "EXTERNALS_MIRROR",
        "mirror",
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
        "TIME_LIMIT_FACTOR",
        "count",
        "",
        "workspace",
        "multiplies the time limits of programs, on a machine as slow as an emulated one; empty: 1",
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
        "with 1, a build of Triton downloads nothing and needs LLVM_SYSPATH and JSON_SYSPATH",
    ),
    Setting(
        "VLLM_CPU_KVCACHE_SPACE",
        "count",
        "",
        "run",
        "GiB for the KV cache without a GPU; empty: vLLM takes about half of the memory",
    ),
    Setting("HF_HOME", "path", "", "run", "where Hugging Face keeps models"),
    Setting("HF_HUB_OFFLINE", "switch", "", "run", "with 1, nothing asks the Hugging Face hub"),
    Setting("HF_TOKEN", "text", "", "run", "token for gated models", secret=True),
    Setting("VLLM_API_KEY", "text", "", "run", "key that a served model asks for", secret=True),
)
KNOWN: Mapping[str, Setting] = {setting.name: setting for setting in SETTINGS}

TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off", ""}
# A URL, or host:path.
_ADDRESS = re.compile(r"[a-z+]+://|[^/]+:")
_OF_A_PATH = re.compile(r"_(PATH|DIR|HOME|FILE|FOLDER|CACHE)$")
_ARCH = re.compile(r"\d+\.\d+[af]?(\+PTX)?")
# The longest time-out that poll(2) can count in ms; more than any number of compilers or GiB.
LARGEST_COUNT = 1_000_000


def expected(setting: Setting, text: str) -> str | None:
    """Return what the value should be, or None where the value is valid."""
    wanted: str | None = None
    if setting.kind == "choice" and text not in setting.choices:
        wanted = "one of " + ", ".join(choice for choice in setting.choices if choice)
    elif (
        setting.kind == "count"
        and text
        and not (re.fullmatch(r"[0-9]{1,9}", text) and 0 < int(text) <= LARGEST_COUNT)
    ):
        wanted = "a whole number of at least 1" + (
            f" and at most {LARGEST_COUNT}" if re.fullmatch(r"0*[1-9][0-9]*", text) else ""
        )
    elif setting.kind == "switch" and text.lower() not in TRUE | _FALSE:
        wanted = "0 or 1"
    elif setting.kind == "url" and text and not re.match(r"(https?|file)://\S+$", text):
        wanted = "an address that begins with https:// or file://"
    elif (
        setting.kind == "archs"
        and text
        and not all(_ARCH.fullmatch(arch) for arch in re.split(r"[ ;,]+", text.strip(" ;,")))
    ):
        wanted = "a list of architectures such as 12.1a or 12.0;12.1a"
    elif setting.kind == "python" and not re.fullmatch(r"3\.\d+(\.\d+)?", text):
        wanted = "a version of Python 3 such as 3.12"
    elif "\n" in text or "\0" in text:
        wanted = "one line"
    elif setting.kind == "mirror" and not _is_address_or_path(text):
        wanted = "a URL such as https://host/vllm.git, or a path: begin a path with / or ./"
    elif setting.kind in ("path", "mirror") and re.search(r"\$[A-Za-z_{(]|`", text):
        # Nobody else resolves it: a folder of that name would be made where one stands.
        wanted = "a plain path: only a shell resolves $NAME and `command`"
    elif (setting.kind in ("path", "mirror") or setting.name == "KERNELS") and not expands(text):
        wanted = "below a home folder that is known on this machine"
    return wanted


def _is_address_or_path(text: str) -> bool:
    """Return whether git may reach the text: a URL with a host, host:path, or a path."""
    if text.startswith(("/", "./", "../", "~")) or not text:
        return True
    scheme, is_url, place = text.partition("://")
    is_known = scheme in ("http", "https", "ssh", "git", "git+ssh", "file") and bool(place)
    return not re.search(r"\s", text) and (is_known or not is_url)


def expands(text: str) -> bool:
    """Return whether the home folder at the beginning of a path is known, if there is one."""
    try:
        Path(text).expanduser()
    except RuntimeError:
        return False
    return True


def is_relative(text: str) -> bool:
    """Return whether a text is a path whatever it stands for: it begins with ./ or ../ or ~/."""
    return text.startswith(("./", "../", "~/")) or text in (".", "..", "~")


def absolute(setting: Setting, text: str, folder: Path | None) -> str:
    """Return a value with an absolute path, where it is a path on this machine; a relative one
    counts from `folder`: see paths.typed.
    """
    is_path = (
        setting.kind == "path"
        or (setting.kind == "mirror" and not _ADDRESS.match(text))
        or (setting.name == "KERNELS" and text.endswith(".whl"))
    )
    return str(typed(text, folder)) if text.strip() and is_path else text


def passed_on(name: str, text: str, folder: Path) -> str:
    """Return a value of .env for children, an absolute path where it is a path."""
    is_path = _OF_A_PATH.search(name) and "/" in text and ":" not in text
    return str(typed(text, folder)) if is_relative(text) or is_path else text


_USUAL_NAMES = Path(__file__).with_name("library_names.txt")
# A name of such a family that is nearer to a known name than this is a typing error. Measured on 40
# real names: TRITON_HOME is at 0.76 to TRITON_REF.
_TYPING_ERROR = 0.77
# So near are two names that differ in one letter, or in the order of two.
_ONE_LETTER = 0.935


def is_of_library(name: str, known: Iterable[str]) -> bool:
    """Return whether CUDA, torch or a library may read the variable, and it is no typing error."""
    usual = usual_names()
    if not OF_LIBRARIES.match(name) or name in usual:
        return name in usual
    others = [each for each in known if not each.startswith("VLLM_")]
    return not (
        difflib.get_close_matches(name, others, n=1, cutoff=_TYPING_ERROR)
        or difflib.get_close_matches(name, usual, n=1, cutoff=_ONE_LETTER)
    )


@functools.cache
def usual_names() -> frozenset[str]:
    """Return the variables of libraries that people set most: few typing errors lead elsewhere."""
    return frozenset(_USUAL_NAMES.read_text(encoding="ascii").split())


# Read by CMake, setup.py, cargo and the build of Triton only (setup.py, cmake/, tools/).
BUILD_ONLY = re.compile(
    r"(\w+_SRC_DIR|VLLM_(VERSION_OVERRIDE|MAIN_CUDA_VERSION|DOCKER_BUILD_CONTEXT"
    r"|REQUIRE_RUST_FRONTEND|RS_BUILD_VERSION|DISABLE_SCCACHE|BUILD_\w+"
    r"|SKIP_(PRECOMPILED_)?VERSION_SUFFIX|KERNEL_SYMBOL_MAP|CPU_ARM_BF16|PYTHON_EXECUTABLE"
    r"|PYTHON_PATH|IMAGE_TAG|PRECOMPILED_\w+|USE_PRECOMPILED\w*|TARGET_DEVICE)"
    r"|CMAKE_\w+|FETCHCONTENT_\w+|CARGO_\w+|RUSTC_\w+|TRITON_(BUILD_\w+|PARALLEL_LINK_JOBS"
    r"|OFFLINE_BUILD|APPEND_CMAKE_ARGS|WHEEL_\w+)|LLVM_SYSPATH|JSON_SYSPATH"
    r"|TORCH_NIGHTLY|ACL_ROOT_DIR)$"
)
# Read by a running vLLM only; a build also reads VLLM_CONFIG_ROOT.
RUN_ONLY = re.compile(
    r"(VLLM_(?!CONFIG_ROOT$)\w+|HF_\w+|HUGGING_?FACE_\w+|TRANSFORMERS_\w+|TIKTOKEN_\w+"
    r"|TORCHDYNAMO_\w+|TORCHINDUCTOR_\w+|FLASHINFER_\w+|TRITON_CACHE_DIR)$"
)
# Variables of CUDA, torch, the libraries that vLLM runs with, and the system: by their beginnings,
# for they are too many to list.
OF_LIBRARIES = re.compile(
    r"(CUDA|CUDNN|CUBLAS|CUBLASLT|CUTE_DSL|CUTLASS|NVIDIA|NVCC|NVTE|NVSHMEM|NCCL|GLOO|UCX|UCC|IBV"
    r"|RDMAV|MLX5|OMPI|OMP|GOMP|KMP|MKL|ONEDNN|DNNL|OPENBLAS|BLIS|NUMEXPR|NUMBA|ATEN|TORCH|PYTORCH"
    r"|TORCHDYNAMO|TORCHINDUCTOR|AOTINDUCTOR|TORCHELASTIC|TRITON|FLASHINFER|FLASH_ATTN(TION)?|DG"
    r"|DEEP_?GEMM|DEEPEP|TVM|TVM_FFI|TILELANG|RAY|HF|HUGGING_?FACE|TRANSFORMERS|TOKENIZERS"
    r"|SAFETENSORS|DATASETS|MODELSCOPE|TIKTOKEN|XGRAMMAR|LMCACHE|MOONCAKE|NIXL|OTEL|PROMETHEUS"
    r"|CCACHE|SCCACHE|LD|MALLOC|MIMALLOC|TCMALLOC|SSL|XDG|LC)_\w+$"
    r"|(PYTHON\w+|GLIBC_TUNABLES|LANG|TZ|TMPDIR|NO_COLOR|MASTER_(ADDR|PORT)|(LOCAL_)?RANK"
    r"|WORLD_SIZE|(CURL|REQUESTS)_CA_BUNDLE|(?i:https?|all|no|ftp)_(?i:proxy))$"
)

# Parts of a name that make its value secret. Tokens of a language model are not secret.
SECRET_PARTS = (
    r"(?<!TIK)TOKEN(?!IZER|S_PER)|SECRET|PASSWORD|PASSWD|PASSPHRASE|PASSCODE|CREDENTIAL"
    r"|(?:API|ACCESS|ACCOUNT|PRIVATE|SIGNING|ENCRYPTION)[_-]?KEY"
)
# Words of a name that do the same: OPENAI_KEY, DB_PASS, GITLAB_PAT, MYSQL_PWD, SSHPASS.
SECRET_NOUNS = r"(?:KEYS?|(?:SSH)?PASS|PATS?|PWD|O?AUTH|CREDS?|COOKIES?|JWT|PSK|DSN|BEARER|WEBHOOK)"
# What follows such a word where the value is a place, a kind or a size: SSH_AUTH_SOCK.
_LABEL = (
    r"[_-](?:FILE|PATH|DIR|FOLDER|SOCK|SOCKET|PREFIX|NAME|ID|TYPE|METHOD|MODE|SIZE|LEN|LENGTH"
    r"|COUNT|TIMEOUT|PROVIDER|RING|MAP|BITS|ALGORITHM)S?(?![A-Z])"
)
# Both as they stand in other text, where `cache_key = x` is what a report is about.
_MODEL = r"[_-](?:ids?|ind|budget|count|len|num|log|type|limit|emb|pos|per|size|prob|mask|str)"
SECRET_TERM = (
    r"(?:(?:(?<!unexpected )(?<!eos_)(?<!bos_)(?<!pad_)(?<!unk_)(?<!tik)"
    rf"token(?!{_MODEL})|(?!token)(?:{SECRET_PARTS}|auth[_-]?key|secret[_-]?key))s?(?![a-z])"
    rf"|(?<=[_-])(?!(?-i:key)){SECRET_NOUNS}(?![a-z])(?!{_LABEL}))"
)
_SECRET_PART = re.compile(SECRET_PARTS, re.IGNORECASE)
_SECRET_NAME = re.compile(
    rf"{SECRET_PARTS}|(?<![A-Z]){SECRET_NOUNS}(?![A-Z])(?!{_LABEL})", re.IGNORECASE
)
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
# User and password of an address, as written: https://user:password@host, https://token@host.
_URL_LOGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://([^\s/\"'@:]*):?([^\s/\"']*)@")
SHORTEST_SECRET = 4
# A user without a password that is shorter is a name, such as git.
_SHORTEST_TOKEN = 16


def is_secret(name: str) -> bool:
    """Return whether the value of a variable is secret, by its name."""
    setting = KNOWN.get(name)
    if setting or name in ("PWD", "OLDPWD"):
        return setting is not None and setting.secret
    return bool(_SECRET_NAME.search(_HUMP.sub("_", name)))


def secrets_of(named: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """Return the secret values among names and values, and passwords in addresses, longest first.

    A path such as MY_KEY=/home/me/key is left out: messages need it.
    """
    found: set[str] = set()
    for name, text in named:
        if is_secret(name) and (_SECRET_PART.search(name) or not text.startswith("/")):
            found.add(text)
        found.update(_logins(text))
    return tuple(sorted((text for text in found if len(text) >= SHORTEST_SECRET), key=len)[::-1])


def has_login(text: str) -> bool:
    """Return whether a text has an address with a password or a token in it."""
    return any(_logins(text))


def _logins(text: str) -> Iterator[str]:
    """Yield the password of each address in a text, or its user where that is a token."""
    for user, password in _URL_LOGIN.findall(text):
        if password or len(user) >= _SHORTEST_TOKEN:
            yield password or user
