"""Settings: precedence of their sources, refused values, variables kept from children."""

import os
from pathlib import Path

import pytest

from workspace.core import settings
from workspace.core.child_variables import fitting_jobs
from workspace.core.errors import SettingsError
from workspace.core.paths import Layout, here

BARE = {"PATH": "/usr/bin:/bin", "HOME": "/home/someone"}


def load(
    root: Path, text: str | bytes = "", *, shell: dict[str, str] | None = None, **more
) -> settings.Settings:
    (root / ".env").write_bytes(text if isinstance(text, bytes) else text.encode())
    return settings.load(Layout(root), environ={**BARE, **(shell or {})}, **more)


def test_flag_beats_shell_beats_dotenv_beats_default(tmp_path: Path) -> None:
    text = "MAX_JOBS=3\nSOURCE=git\nDEVICE=cpu\n"
    found = load(
        tmp_path,
        text,
        shell={"MAX_JOBS": "2", "SOURCE": "release"},
        flags={"MAX_JOBS": "1", "SOURCE": None},
    )
    assert [
        (found.text(name), found.source(name))
        for name in ("MAX_JOBS", "SOURCE", "DEVICE", "KERNELS")
    ] == [
        ("1", "flag"),
        ("release", "shell"),
        ("cpu", ".env"),
        ("auto", "default"),
    ]


def test_shell_variable_that_hides_a_line_of_dotenv_is_reported(tmp_path: Path) -> None:
    found = load(tmp_path, 'TORCH_CUDA_ARCH_LIST="12.1a"\n', shell={"TORCH_CUDA_ARCH_LIST": "9.0"})
    assert found.text("TORCH_CUDA_ARCH_LIST") == "9.0"
    (notice,) = found.warnings
    assert notice.sentence == (
        "TORCH_CUDA_ARCH_LIST=9.0 in the shell hides TORCH_CUDA_ARCH_LIST=12.1a in .env"
    )
    assert notice.hint == "unset TORCH_CUDA_ARCH_LIST"


def test_hidden_secret_is_reported_without_either_value(tmp_path: Path) -> None:
    found = load(tmp_path, "HF_TOKEN=hf_written\n", shell={"HF_TOKEN": "hf_exported"})
    assert "HF_TOKEN" in found.warnings[0].sentence
    assert not any(value in found.warnings[0].sentence for value in ("hf_written", "hf_exported"))


def test_unknown_name_is_passed_on_with_the_nearest_known_one(tmp_path: Path) -> None:
    found = load(
        tmp_path, "MAX_JOB=2\nVLLM_LOGGING_LEVEL=DEBUG\n", also_known=lambda: ["VLLM_LOGGING_LEVEL"]
    )
    (notice,) = found.warnings
    assert notice.sentence == (
        ".env, line 1: MAX_JOB is not a known setting; did you mean MAX_JOBS?"
    )
    assert found.child_environment("run")["VLLM_LOGGING_LEVEL"] == "DEBUG"


@pytest.mark.parametrize(
    "name",
    [
        *("TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_NVDISASM_PATH", "FLASHINFER_WORKSPACE_BASE"),
        *("FLASHINFER_CUDA_ARCH_LIST", "HF_HUB_CACHE", "HF_TOKEN_PATH", "HUGGINGFACE_HUB_CACHE"),
        *("CUDA_VISIBLE_DEVICES", "CUDA_CACHE_PATH", "CUDA_PATH", "NCCL_DEBUG", "TORCH_HOME"),
        *("TORCHINDUCTOR_CACHE_DIR", "PYTORCH_ALLOC_CONF", "TRANSFORMERS_OFFLINE"),
        *("OMP_NUM_THREADS", "TIKTOKEN_ENCODINGS_BASE", "NCCL_IB_HCA", "GLOO_SOCKET_IFNAME"),
        *("UCX_NET_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "HUGGING_FACE_HUB_TOKEN", "MKL_CBWR"),
        *("HF_XET_HIGH_PERFORMANCE", "RAY_memory_monitor_refresh_ms", "KMP_AFFINITY", "KMP_AVX"),
        *("TORCH_NCCL_TRACE_BUFFER_SIZE", "CUTE_DSL_ARCH", "TVM_FFI_CUDA_ARCH_LIST", "LD_PRELOAD"),
        *("SAFETENSORS_FAST_GPU", "http_proxy", "HTTPS_PROXY", "no_proxy", "DG_JIT_CACHE_DIR"),
        *("CUBLASLT_LOG_LEVEL", "NCCL_LL128_BUFFSIZE", "NCCL_IB_ADDR_RANGE", "OTEL_SDK_DISABLED"),
        *("MLX5_SINGLE_THREADED", "UCX_IB_SL", "TZ", "LC_ALL", "TMPDIR", "MASTER_ADDR"),
    ],
)
def test_variable_of_a_library_is_passed_on_without_a_warning(tmp_path: Path, name: str) -> None:
    found = load(tmp_path, f"{name}=x\n", also_known=lambda: ["VLLM_FLASHINFER_WORKSPACE_BASED"])
    assert found.warnings == ()
    assert found.child_environment("run")[name] == "x"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("CUDA_HOM", "CUDA_HOME"),
        ("HF_TOKN", "HF_TOKEN"),
        ("HF_OFFLINE", "HF_HUB_OFFLINE"),
        ("TORCH_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"),
        ("TRITON_PTXAS", "TRITON_PTXAS_PATH"),
        ("TRITON_BLACKWELL_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"),
        ("CUDA_VISBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
        ("NCCL_SOCKET_IFNMAE", "NCCL_SOCKET_IFNAME"),
        ("PYTORCH_CUDA_ALOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
        ("OMP_NUM_THREAD", "OMP_NUM_THREADS"),
        ("RAY_memory_monitor_refesh_ms", "RAY_memory_monitor_refresh_ms"),
        ("GLO_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"),
        ("htps_proxy", "https_proxy"),
        ("LD_PRELOADS", "LD_PRELOAD"),
    ],
)
def test_typing_error_in_a_name_of_a_library_is_reported(
    tmp_path: Path, name: str, meant: str
) -> None:
    found = load(tmp_path, f"{name}=x\n", also_known=lambda: ["CUDA_VISIBLE_DEVICES"])
    (warning,) = found.warnings
    assert f"{name} is not a known setting; did you mean {meant}?" in warning.sentence


def test_cache_of_a_run_is_kept_from_builds(tmp_path: Path) -> None:
    found = load(tmp_path, "TRITON_CACHE_DIR=/c\nFLASHINFER_WORKSPACE_BASE=/f\nCUDA_PATH=/d\n")
    assert {"TRITON_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE", "CUDA_PATH"} & {
        *found.child_environment("build")
    } == {"CUDA_PATH"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"\xef\xbb\xbfDEVICE=cpu\n", ".env, line 1 begins with a byte order mark"),
        (b"DEVICE=cpu\nSOURCE=git\r\n", ".env, line 2 has Windows line ends"),
        (b"DEVICE=cpu\n\nMAX_\0JOBS=1\n", ".env, line 3 has a zero byte"),
        (b"# caf\xe9\n", ".env, line 1 is not UTF-8"),
        (b"# fine\n\nDEVICE\n", ".env, line 3 is not of the form NAME=value"),
        (b"DEVICE=cpu\n12=a\n", ".env, line 2 is not of the form NAME=value"),
        (b"\n\nDEVICE=gpu\n", ".env, line 3: DEVICE: 'gpu' is not one of auto, cuda, cpu"),
        (b"MAX_JOBS=0\n", ".env, line 1: MAX_JOBS: '0' is not a whole number of at least 1"),
        (
            b"USE_EXISTING_TORCH=perhaps\n",
            ".env, line 1: USE_EXISTING_TORCH: 'perhaps' is not 0 or 1",
        ),
        (
            b"TORCH_INDEX_URL=ftp://x\n",
            ".env, line 1: TORCH_INDEX_URL: 'ftp://x' is not an address",
        ),
        (
            b"TORCH_CUDA_ARCH_LIST=sm_121\n",
            ".env, line 1: TORCH_CUDA_ARCH_LIST: 'sm_121' is not a list of architectures",
        ),
        (
            b"PYTHON_VERSION=2.7\n",
            ".env, line 1: PYTHON_VERSION: '2.7' is not a version of Python 3",
        ),
        (b"PYTHON_VERSION=\n", ".env, line 1: PYTHON_VERSION: '' is not a version of Python 3"),
        (
            b'VLLM_MIRROR="not a url"\n',
            ".env, line 1: VLLM_MIRROR: 'not a url' is not a URL such as https://host/vllm.git",
        ),
        (b"EXTERNALS_MIRROR=https://\n", ".env, line 1: EXTERNALS_MIRROR: 'https://' is not a URL"),
        (b"TRITON_MIRROR=htp://host/x\n", ".env, line 1: TRITON_MIRROR: 'htp://host/x' is not a"),
    ],
)
def test_damaged_dotenv_stops_with_its_line(tmp_path: Path, text: bytes, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, text)
    assert caught.value.message.startswith(says)
    assert caught.value.hint


@pytest.mark.parametrize(
    "mirror",
    [
        *(
            "",
            "https://host/vllm.git",
            "ssh://me@host:22/x",
            "git@host:team/vllm.git",
        ),
        *("file:///srv/vllm", "/srv/my mirrors/vllm", "http://[::1]:8/x"),
    ],
)
def test_urls_and_paths_are_mirrors(tmp_path: Path, mirror: str) -> None:
    assert load(tmp_path, shell={"VLLM_MIRROR": mirror}).text("VLLM_MIRROR") == mirror


@pytest.mark.parametrize(
    ("name", "text", "path"),
    [
        ("VLLM_MIRROR", "./my mirror", "my mirror"),
        ("VLLM_MIRROR", "mirrors/vllm", "mirrors/vllm"),
        ("HF_HOME", "hf", "hf"),
        ("CUDA_HOME", "../cuda", "../cuda"),
        ("KERNELS", "wheels/a.whl", "wheels/a.whl"),
    ],
)
def test_relative_path_counts_from_the_folder_in_which_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, path: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load(tmp_path, f'{name}="{text}"').text(name) == str(tmp_path / path)
    assert load(tmp_path, shell={name: text}).text(name) == str(elsewhere / path)
    assert load(tmp_path, f'{name}="{text}"', flags={name: text}).text(name) == str(
        elsewhere / path
    )


def test_path_of_a_name_that_is_passed_on_is_absolute_for_the_child(tmp_path: Path) -> None:
    written = 'HF_HUB_CACHE=./hub\nTMPDIR="~/tmp"\nNCCL_SOCKET_IFNAME=.eth\n'
    written += "VLLM_LOGGING_CONFIG_PATH=conf/log.json\nMY_LIBRARY_PATH=a/b:c\n"
    found = load(tmp_path, written, shell={"VLLM_CACHE_ROOT": "./cache", "MY_WORD": "a/b"})
    child = found.child_environment("run")
    assert child["VLLM_LOGGING_CONFIG_PATH"] == str(tmp_path / "conf/log.json")
    assert child["MY_LIBRARY_PATH"] == "a/b:c"
    assert child["VLLM_CACHE_ROOT"] == str(Path.cwd() / "cache")
    assert child["MY_WORD"] == "a/b"
    assert child["HF_HUB_CACHE"] == str(tmp_path / "hub")
    assert child["TMPDIR"] == str(Path.home() / "tmp")
    assert child["NCCL_SOCKET_IFNAME"] == ".eth"


def test_second_line_of_a_name_is_reported_with_both_lines_and_counts(tmp_path: Path) -> None:
    found = load(tmp_path, "MAX_JOBS=4\n\nDEVICE=cpu\nMAX_JOBS=8\n# end\nMAX_JOBS=9\n")
    assert found.text("MAX_JOBS") == "9"
    assert [notice.sentence for notice in found.warnings] == [
        ".env, line 1: MAX_JOBS is set again in line 6, which counts",
        ".env, line 4: MAX_JOBS is set again in line 6, which counts",
    ]
    secret = load(tmp_path, "HF_TOKEN=hf_first\nHF_TOKEN=hf_second\n")
    assert "hf_" not in repr(secret.warnings)
    with pytest.raises(SettingsError, match="^.env, line 2: NVCC_THREADS: 'x' is not"):
        load(tmp_path, "NVCC_THREADS=2\nNVCC_THREADS=x\n")


def test_directory_in_the_place_of_dotenv_stops(tmp_path: Path) -> None:
    (tmp_path / ".env").mkdir()
    with pytest.raises(SettingsError, match="is a folder"):
        settings.load(Layout(tmp_path), environ=BARE)


@pytest.mark.parametrize(("name", "flag"), [("MAX_JOBS", "--jobs"), ("DEVICE", "--device")])
def test_bad_flag_is_called_as_it_was_typed(tmp_path: Path, name: str, flag: str) -> None:
    with pytest.raises(SettingsError, match=f"^{flag}: 'x' is not "):
        load(tmp_path, flags={name: "x"})


def test_bad_shell_value_is_located_in_the_shell(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="^NVCC_THREADS in the shell: '-1' is not"):
        load(tmp_path, shell={"NVCC_THREADS": "-1"})


def test_children_do_not_inherit_another_interpreter_checkout_or_build(tmp_path: Path) -> None:
    foreign = {
        "PYTHONPATH": "/x",
        "CONDA_PREFIX": "/c",
        "UV_PYTHON": "3.8",
        "PIP_TARGET": "/t",
        "GIT_DIR": "/g",
        "MAKEFLAGS": "-j",
        "VLLM_TARGET_DEVICE": "tpu",
    }
    kept = {
        "UV_DEFAULT_INDEX": "https://index.example",
        "HTTPS_PROXY": "http://proxy.example",
        "SSL_CERT_FILE": "/c.pem",
    }
    found = load(
        tmp_path, shell={**foreign, **kept, "VIRTUAL_ENV": "/v", "PATH": "/v/bin:/usr/bin"}
    )
    child = found.child_environment("plain")
    assert not {*foreign, "VIRTUAL_ENV"} & child.keys()
    assert kept.items() <= child.items()
    assert child["PATH"] == "/usr/bin"


def test_compilers_see_build_settings_but_no_secret(tmp_path: Path) -> None:
    text = "HF_TOKEN=hf_12345\nMAX_JOBS=4\nMY_SECRET=hush\nFREE=1\n"
    found = load(tmp_path, text, shell={"AWS_SECRET_ACCESS_KEY": "hushhush"})
    build, run, plain = (found.child_environment(phase) for phase in ("build", "run", "plain"))
    assert (build["MAX_JOBS"], build["FREE"]) == ("4", "1")
    assert not {"HF_TOKEN", "MY_SECRET", "AWS_SECRET_ACCESS_KEY"} & build.keys()
    assert (run["HF_TOKEN"], run["MY_SECRET"]) == ("hf_12345", "hush")
    assert not {"HF_TOKEN", "MAX_JOBS", "FREE"} & plain.keys()
    assert set(found.secrets) == {"hf_12345", "hush", "hushhush"}


def test_cuda_home_is_put_first_once_and_nothing_old_is_stored(tmp_path: Path) -> None:
    found = load(
        tmp_path, "CUDA_HOME=/usr/local/cuda\n", shell={"PATH": "/usr/bin:/usr/local/cuda/bin"}
    )
    child = found.child_environment("build")
    assert child["PATH"] == "/usr/local/cuda/bin:/usr/bin"
    assert child["LD_LIBRARY_PATH"] == "/usr/local/cuda/lib64"


def test_cuda_home_goes_before_the_libraries_that_dotenv_names_too(tmp_path: Path) -> None:
    text = "CUDA_HOME=/usr/local/cuda\nLD_LIBRARY_PATH=/own/lib\n"
    for phase in ("build", "run"):
        child = load(tmp_path, text).child_environment(phase)
        assert child["LD_LIBRARY_PATH"] == "/usr/local/cuda/lib64:/own/lib"


def test_outer_git_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_CONFIG_KEY_0"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("GIT_SSL_CAINFO", "kept")
    settings.forget_outer_git()
    assert [
        name
        for name in os.environ
        if name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_CONFIG_KEY_0", "GIT_SSL_CAINFO")
    ] == ["GIT_SSL_CAINFO"]


@pytest.mark.parametrize(
    ("cores", "memory_gib", "jobs"), [(20, 119.7, 9), (2, 23.5, 1), (2, 4.0, 1), (144, 4000.0, 144)]
)
def test_jobs_at_run_time_fit_into_memory_whatever_they_compile(
    cores: int, memory_gib: float, jobs: int
) -> None:
    assert fitting_jobs(cores, memory_gib) == jobs


def test_run_time_always_has_a_bound_on_compilers_and_a_build_has_its_own(tmp_path: Path) -> None:
    found = load(tmp_path, "")
    assert int(found.child_environment("run")["MAX_JOBS"]) >= 1
    assert "MAX_JOBS" not in found.child_environment("build")
    assert load(tmp_path, "MAX_JOBS=3\n").child_environment("run")["MAX_JOBS"] == "3"


def test_variables_in_dotenv_are_resolved_as_in_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    found = load(
        tmp_path,
        'BASE=/data\nHF_HOME=$HOME/models\nWORKSPACE_CACHE_DIR="${HOME}/dl"\n'
        "CUDA_HOME=$BASE/cuda\nHF_HUB_CACHE=$BASE/hub\nLITERAL='$HOME/x'\nRPATH=$ORIGIN/lib\n"
        "VLLM_API_KEY=pa$HOME\n",
    )
    assert found.text("HF_HOME") == "/home/ada/models"
    assert found.text("WORKSPACE_CACHE_DIR") == "/home/ada/dl"
    assert found.text("CUDA_HOME") == "/data/cuda"
    passed = {name: value.text for name, value in found.passed.items()}
    assert passed["HF_HUB_CACHE"] == "/data/hub"
    assert (passed["LITERAL"], passed["RPATH"]) == ("$HOME/x", "$ORIGIN/lib")
    # A password may have a $ in it.
    assert found.text("VLLM_API_KEY") == "pa$HOME"


@pytest.mark.parametrize("text", ["$HOEM/models", "${HOEM}/models", '"$HOEM/models"'])
def test_path_with_a_variable_that_is_not_set_stops_with_its_line(
    tmp_path: Path, text: str
) -> None:
    with pytest.raises(SettingsError, match=r"line 2: HF_HOME needs the variable HOEM") as caught:
        load(tmp_path, f"# mine\nHF_HOME={text}\n")
    assert "+2 .env" in (caught.value.hint or "")


def test_home_sign_in_a_path_is_resolved_for_programs_that_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    found = load(tmp_path, "HF_HOME=~/models\nTRITON_PTXAS_PATH=~/ptxas\n")
    environment = found.child_environment("run")
    assert environment["HF_HOME"] == "/home/ada/models"
    assert environment["TRITON_PTXAS_PATH"] == "/home/ada/ptxas"


@pytest.mark.parametrize("name", ["HF_HOME", "CUDA_HOME", "WORKSPACE_CACHE_DIR"])
@pytest.mark.parametrize("text", ["$HOME/models", "$(pwd)/models", "`pwd`/models", "${HOME}/x"])
def test_path_of_the_shell_or_in_quotes_with_a_variable_in_it_is_refused(
    tmp_path: Path, name: str, text: str
) -> None:
    with pytest.raises(SettingsError, match=f"{name} in the shell: .* is not a plain path"):
        load(tmp_path, "", shell={name: text})
    with pytest.raises(SettingsError, match=rf"\.env, line 1: {name}: "):
        load(tmp_path, f"{name}='{text.replace('${HOME}', '$HOME')}'\n")


def test_home_that_cannot_be_written_gives_caches_in_the_clone(tmp_path: Path) -> None:
    (tmp_path / "closed").touch()
    for shell in ({"HOME": str(tmp_path / "closed")}, {"XDG_CACHE_HOME": f"{tmp_path}/closed/x"}):
        found = load(tmp_path, "", shell=shell)
        assert found.cache == here().state / "cache" / "vllm-workspace"
        environment = found.child_environment("plain")
        assert environment["UV_CACHE_DIR"] == str(here().state / "cache" / "uv")
        # Models that are there already can still be read.
        assert "HF_HOME" not in found.child_environment("run")
    fine = load(tmp_path, "", shell={"HOME": str(tmp_path)})
    assert fine.cache == tmp_path / ".cache" / "vllm-workspace"
    assert "UV_CACHE_DIR" not in fine.child_environment("plain")
    own = load(tmp_path, "", shell={"HOME": str(tmp_path / "closed"), "UV_CACHE_DIR": "/mine"})
    assert own.child_environment("plain")["UV_CACHE_DIR"] == "/mine"


@pytest.mark.parametrize(
    "name",
    [
        *("UV_CONSTRAINT", "UV_BUILD_CONSTRAINT", "UV_OVERRIDE", "PIP_CONSTRAINT", "UV_NO_BUILD"),
        *("UV_REQUIRE_HASHES", "UV_PRERELEASE", "UV_RESOLUTION", "UV_TARGET", "PIP_NO_BINARY"),
        *("UV_NO_INSTALLER_METADATA", "UV_NO_BUILD_ISOLATION", "UV_NO_BINARY_PACKAGE"),
    ],
)
def test_setting_of_uv_or_pip_that_changes_what_is_installed_is_kept_from_children(
    tmp_path: Path, name: str
) -> None:
    found = load(tmp_path, f"{name}=/mine\n", shell={name: "/mine"})
    assert all(name not in found.child_environment(phase) for phase in ("plain", "build"))


@pytest.mark.parametrize(
    "name",
    [
        *("UV_DEFAULT_INDEX", "UV_FIND_LINKS", "UV_OFFLINE", "UV_EXCLUDE_NEWER", "UV_NO_CONFIG"),
        *("UV_PYTHON_DOWNLOADS", "UV_PYTHON_PREFERENCE", "UV_NATIVE_TLS", "PIP_CONFIG_FILE"),
        *("UV_INDEX_STRATEGY", "UV_CONCURRENT_DOWNLOADS", "UV_LINK_MODE"),
    ],
)
def test_setting_of_uv_that_says_where_packages_come_from_is_passed_on(
    tmp_path: Path, name: str
) -> None:
    found = load(tmp_path, "", shell={name: "mine"})
    assert found.child_environment("plain")[name] == "mine"
