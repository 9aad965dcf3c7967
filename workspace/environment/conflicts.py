"""Settings that are right by themselves and not together: with each other, with this machine, with the files that they name.

Each finding says what will happen. What the doctor tries for real (toolkit, architectures, assemblers) is not tried here again.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from workspace.core.settings import fitting_jobs
from workspace.environment import interpreter
from workspace.environment.doctor_case import Case, key
from workspace.environment.running import ENCODINGS, missing_vocabularies

_ON = ("1", "true", "yes", "on")
# Variables of vLLM's that name something to be read; what is made where it is missing is none of them.
_NAMES_A_FILE = re.compile(r"VLLM_(?!\w*(CACHE|DUMP|RPC|RUST|XLA))\w+_(PATH|FILE|FOLDER)")
# Triton's second assembler, for these GPUs, came with 3.6 (triton/backends/nvidia/compiler.py).
_SECOND_ASSEMBLER, _FIRST_GPU_OF_IT = (3, 6), (10, 0)


@dataclass(frozen=True)
class Finding:
    """Something to say of one variable. Without a `cure` of its own the cure is to take it away."""

    name: str
    said: str
    is_error: bool = False
    cure: str | None = None


def findings(case: Case, said: Mapping[str, str]) -> Iterator[Finding]:
    """Find what does not go together. `said` has what somebody said, by name; defaults are not in it."""
    said = {name: text for name, text in said.items() if text}
    for look in (_toolkit, _assemblers, _files, _vocabularies, _memory, _hub, _compilers, _torch):
        yield from look(case, said)


def _toolkit(case: Case, said: Mapping[str, str]) -> Iterator[Finding]:
    home = case.settings.path("CUDA_HOME") if "CUDA_HOME" in said else None
    if home and not home.is_dir():
        yield Finding("CUDA_HOME", "there is no such folder", is_error=case.device == "cuda")
    elif home and not (home / "bin" / "nvcc").is_file():
        yield Finding("CUDA_HOME", "there is no bin/nvcc in it, which FlashInfer and a native build call")


def _assemblers(case: Case, said: Mapping[str, str]) -> Iterator[Finding]:
    for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        own = case.settings.path(name) if name in said else None
        if own and not own.exists():
            yield Finding(name, "there is no such program; Triton passes it over in silence and takes its own")
        elif own and (own.is_dir() or not os.access(own, os.X_OK)):
            yield Finding(name, "it is no program that may be run: Triton stops there", is_error=case.device == "cuda")
    if "TRITON_PTXAS_PATH" in said and "TRITON_PTXAS_BLACKWELL_PATH" not in said:
        version = interpreter.installed(case.layout).get("triton", "")
        newest = max((key(gpu.capability) for gpu in case.host().gpus if gpu.capability), default=())
        if key(version) >= _SECOND_ASSEMBLER and newest >= _FIRST_GPU_OF_IT:
            yield Finding(
                "TRITON_PTXAS_PATH", f"Triton {version} assembles for this GPU with TRITON_PTXAS_BLACKWELL_PATH, or its own; this one it does not take"
            )


def _files(case: Case, said: Mapping[str, str]) -> Iterator[Finding]:
    for name, text in said.items():
        if _NAMES_A_FILE.fullmatch(name) and "/" in text and not Path(text).expanduser().exists():
            yield Finding(name, "there is no such file or folder")
    home = case.settings.path("HF_HOME") if "HF_HOME" in said else None
    if home and home.exists() and not home.is_dir():
        yield Finding("HF_HOME", "it is no folder", is_error=True)


def _vocabularies(case: Case, said: Mapping[str, str]) -> Iterator[Finding]:
    """gpt-oss dies after its load where the folder that is named lacks a file, also with the harmony that has them built in (openai/harmony#95)."""
    if ENCODINGS not in said:
        return
    missing = missing_vocabularies(Path(said[ENCODINGS]))
    built_in = interpreter.installed(case.layout).get("oss-harmony")
    why = f"oss-harmony {built_in} in .vllm has them built in" if built_in else "./scripts/inv serve.fetch brings them where they are needed"
    if missing:
        yield Finding(
            ENCODINGS, f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not there, and gpt-oss would die of it; it is left out. {why}"
        )
    elif built_in:
        yield Finding(ENCODINGS, f"not needed: {why}")


def _memory(case: Case, said: Mapping[str, str]) -> Iterator[Finding]:
    name = "VLLM_CPU_KVCACHE_SPACE"
    if name not in said:
        return
    if case.device == "cuda":
        yield Finding(name, "a vLLM with a GPU does not read it; --gpu-memory-utilization or --kv-cache-memory-bytes says how large the cache is")
    elif said[name].isdigit() and int(said[name]) > case.host().memory_gib:
        yield Finding(name, f"this machine, or its control group, has {case.host().memory_gib:.1f} GiB", is_error=True)


def _hub(case: Case, said: Mapping[str, str]) -> Iterator[Finding]:
    is_offline = said.get("HF_HUB_OFFLINE", "").lower() in _ON
    if is_offline and said.get("VLLM_USE_MODELSCOPE", "").lower() in ("1", "true"):
        yield Finding("VLLM_USE_MODELSCOPE", "HF_HUB_OFFLINE=1 says that no hub is asked, this one that another one is")
    if "TRANSFORMERS_OFFLINE" in said and (said["TRANSFORMERS_OFFLINE"].lower() in _ON) != is_offline:
        yield Finding("TRANSFORMERS_OFFLINE", f"HF_HUB_OFFLINE says the opposite ({'on' if is_offline else 'off'}), and that is what counts")
    other = said.get("HUGGING_FACE_HUB_TOKEN")
    if other and said.get("HF_TOKEN") and other != said["HF_TOKEN"]:
        yield Finding("HUGGING_FACE_HUB_TOKEN", "HF_TOKEN is another token and goes before it")


def _compilers(case: Case, said: Mapping[str, str]) -> Iterator[Finding]:
    jobs, threads = case.settings.count("MAX_JOBS"), case.settings.count("NVCC_THREADS")
    if jobs and threads and threads > jobs:
        yield Finding("NVCC_THREADS", f"more than MAX_JOBS={jobs}: one compiler with {jobs} threads will run")
    if jobs and "MAX_JOBS" in said and case.device == "cuda":
        fitting = fitting_jobs(case.host().cores, case.host().memory_gib)
        if jobs > fitting:
            said_of = f"FlashInfer starts as many compilers while vLLM runs; into this memory {fitting} fit (flashinfer-ai/flashinfer#3634)"
            yield Finding("MAX_JOBS", said_of)
    if "TORCH_CUDA_ARCH_LIST" in said and case.device == "cpu":
        yield Finding("TORCH_CUDA_ARCH_LIST", "not used: the device is cpu")


def _torch(case: Case, said: Mapping[str, str]) -> Iterator[Finding]:
    if "TORCH_INDEX_URL" in said and case.settings.switch("USE_EXISTING_TORCH"):
        yield Finding("TORCH_INDEX_URL", "not asked: USE_EXISTING_TORCH=1 keeps the torch that is there")
