"""What a request for a server points to, judged before the load: models in each layout, adapters,
drafters, tokenizers, certificates, plugins; and whether the hub has to be asked for any of them.
"""

import io
import json
import shutil
import subprocess
from pathlib import Path
from typing import Literal

import pytest

from tests.server.test_fetch import Clone
from workspace.bench import subject
from workspace.core.console import Console, RunLog
from workspace.core.errors import ServeError, SettingsError, WorkspaceError
from workspace.core.settings import load
from workspace.machine import interpreter
from workspace.server import models, start
from workspace.server.flags import ServeOptions

FLAGS = (
    "allowed-local-media-path chat-template code-revision config-format default-mm-loras"
    " download-dir enable-lora generation-config hf-config-path host load-format log-config-file"
    " logits-processors lora-modules max-lora-rank middleware mm-encoder-fp8-scale-path port"
    " profiler-config reasoning-parser-plugin revision scheduler-cls served-model-name"
    " speculative-config ssl-ca-certs ssl-certfile ssl-keyfile tokenizer tokenizer-mode"
    " tokenizer-revision tool-parser-plugin"
)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = {"config.json": "{}", "model.safetensors": "x", "tokenizer.json": "{}"}
DRAFTER = '{"method":"draft_model","model":"acme/draft","num_speculative_tokens":3}'


def fill(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


class Request:
    """A clone whose tree knows the flags above, and a folder in which the user types."""

    def __init__(self, root: Path) -> None:
        self.clone = Clone(root / "clone")
        self.folder = root / "typed"
        self.folder.mkdir()
        lines = [f'    parser.add_argument("--{name}")' for name in FLAGS.split()]
        source = "\n".join(["def make(parser):", *lines, ""])
        fill(self.clone.layout.vllm / "vllm", {"engine/arg_utils.py": source})

    def cache(
        self, name: str, files: dict[str, str], *, commit: str = COMMIT, ref: str = "main"
    ) -> Path:
        """Put a repository into Hugging Face's cache."""
        top = Path(self.clone.shell["HF_HOME"]) / "hub" / f"models--{name.replace('/', '--')}"
        fill(top / "refs", {ref: commit})
        return fill(top / "snapshots" / commit, files)

    def dry_run(self, name: str, *extra: str, **shell: str) -> str:
        """Return all that a dry run prints, with the command line last."""
        out = io.StringIO()
        settings = load(self.clone.layout, environ=self.clone.shell | shell)
        options = ServeOptions(name, extra, dry_run=True)
        start.run(self.clone.layout, settings, options, console=Console(out=out, err=out))
        return out.getvalue()

    def refused(self, name: str, *extra: str, **shell: str) -> WorkspaceError:
        with pytest.raises((ServeError, SettingsError)) as caught:
            self.dry_run(name, *extra, **shell)
        assert caught.value.hint
        return caught.value


@pytest.fixture
def request_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Request:
    made = Request(tmp_path)
    monkeypatch.chdir(made.folder)
    return made


def test_script_of_a_dry_run_sets_the_path_of_the_server(request_: Request) -> None:
    layout = request_.clone.layout
    request_.cache("acme/tiny", MODEL)
    *script, _ = request_.dry_run("acme/tiny", PATH="/usr/bin:/bin").splitlines()
    script = [line for line in script if line.startswith(("export ", "unset "))]
    seen = subprocess.run(
        ["/bin/sh", "-c", "\n".join([*script, "echo $PATH; echo $VIRTUAL_ENV"])],
        env={"PATH": "/somewhere/else:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    path, environment = seen.stdout.splitlines()
    assert path.split(":")[0] == f"{layout.environment}/bin"
    assert "/somewhere/else" not in path
    assert environment == str(layout.environment)


def is_offline(output: str) -> bool:
    return "HF_HUB_OFFLINE=1" in output


def test_model_with_all_of_its_files_keeps_vllm_from_asking_the_hub(request_: Request) -> None:
    request_.cache("acme/tiny", MODEL)
    assert is_offline(request_.dry_run("acme/tiny"))
    assert not is_offline(request_.dry_run("acme/absent"))


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        (("--speculative-config", DRAFTER), "acme/draft"),
        (("--speculative-config.model", "acme/eagle3"), "acme/eagle3"),
        (("--tokenizer", "acme/other"), "acme/other"),
        (("--tokenizer=gpt2",), "gpt2"),
        (("--tokenizer-revision", "v2"), "acme/tiny at v2"),
        (("--code-revision", "v2"), "acme/tiny at v2"),
        (("--hf-config-path", "acme/other"), "acme/other"),
        (("--generation-config", "acme/other"), "acme/other"),
        (("--lora-modules", "a=acme/lora", "b=acme/second"), "acme/second"),
        (("--lora-modules", '{"name": "a", "path": "acme/lora"}'), "acme/lora"),
        (("--default-mm-loras", '{"audio": "acme/lora"}'), "acme/lora"),
    ],
)
def test_each_name_that_is_not_here_lets_vllm_ask_the_hub(
    request_: Request, extra: tuple[str, ...], name: str
) -> None:
    request_.cache("acme/tiny", MODEL)
    output = request_.dry_run("acme/tiny", *extra)
    assert not is_offline(output)
    assert f"{name}, which --" in output
    assert "vLLM fetches it during the start" in output
    error = request_.refused("acme/tiny", *extra, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE (shell) forbids the fetch" in error.message


def test_names_that_are_all_here_need_no_hub(request_: Request) -> None:
    request_.cache("acme/tiny", MODEL)
    request_.cache("acme/draft", MODEL)
    request_.cache("acme/other", {"tokenizer.model.v3": "x"}, ref="v2")
    request_.cache("acme/lora", {"adapter_config.json": "{}"})
    extra = (
        "--speculative-config", DRAFTER, "--tokenizer", "acme/other", "--tokenizer-revision", "v2",
        "--lora-modules", "a=acme/lora", "--generation-config", "vllm",
    )  # fmt: skip
    assert is_offline(request_.dry_run("acme/tiny", *extra))
    assert is_offline(request_.dry_run("acme/tiny", "--speculative-config", '{"model":"ngram"}'))


def test_drafter_without_its_weights_or_at_another_revision_is_not_here(request_: Request) -> None:
    request_.cache("acme/tiny", MODEL)
    draft = request_.cache("acme/draft", MODEL)
    at = DRAFTER.replace("acme/draft", 'acme/draft","revision":"v2')
    assert not is_offline(request_.dry_run("acme/tiny", "--speculative-config", at))
    (draft / "model.safetensors").unlink()
    assert not is_offline(request_.dry_run("acme/tiny", "--speculative-config", DRAFTER))


def test_revision_of_the_model_is_looked_for_by_branch_and_by_commit(request_: Request) -> None:
    request_.cache("acme/tiny", MODEL)
    output = request_.dry_run("acme/tiny", "--revision", "v2")
    assert not is_offline(output)
    assert "acme/tiny at v2 is not on this machine" in output
    request_.cache("acme/tiny", MODEL, ref="v2", commit="a" * 40)
    assert is_offline(request_.dry_run("acme/tiny", "--revision", "v2"))
    assert is_offline(request_.dry_run("acme/tiny", "--revision", "a" * 40))
    assert not is_offline(request_.dry_run("acme/tiny", "--revision", "b" * 40))


MISTRAL = {"params.json": "{}", "consolidated.safetensors": "x", "tekken.json": "{}"}
INDEX = json.dumps({"weight_map": {"a": "model-1-of-2.safetensors"}})


@pytest.mark.parametrize(
    "files",
    [
        MISTRAL,
        {**MISTRAL, "consolidated.safetensors.index.json": '{"weight_map": {}}'},
        # The index of weights that vLLM does not load from here.
        {**MODEL, "pytorch_model.bin.index.json": '{"weight_map": {"a": "x.bin"}}'},
        {**MODEL, "consolidated.safetensors.index.json": INDEX},
        # A pooling model: the weights of its layers lie below.
        {**MODEL, "modules.json": "[]", "2_Dense/model.safetensors": "x"},
        {"config.json": "{}", "pytorch_model.bin": "x", "vocab.txt": "x"},
    ],
)
def test_layout_that_vllm_loads_is_a_model(request_: Request, files: dict[str, str]) -> None:
    folder = fill(request_.folder / "model", files)
    assert models.lack_of(folder) is None
    assert str(folder) in request_.dry_run("./model").splitlines()[-1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"consolidated.safetensors": "x"}, "has no config.json"),
        ({"params.json": "{"}, "params.json cannot be read"),
        ({"params.json": "{}", "tekken.json": "{}"}, "lacks weights"),
        ({**MODEL, "model.safetensors.index.json": INDEX}, "lacks model-1-of-2.safetensors"),
        (
            {"config.json": "{}", "1_Pooling/model.safetensors": "x"},
            "lacks weights; those in 1_Pooling are not the model's",
        ),
        (
            {
                "adapter_config.json": '{"base_model_name_or_path": "acme/tiny"}',
                "adapter_model.safetensors": "x",
            },
            "is a LoRA adapter: it is served with acme/tiny",
        ),
    ],
)
def test_layout_that_vllm_does_not_load_gets_its_own_sentence(
    request_: Request, files: dict[str, str], message: str
) -> None:
    fill(request_.folder / "model", files)
    assert message in request_.refused("./model").message


def test_adapter_is_served_by_the_command_of_the_hint(request_: Request) -> None:
    folder = fill(
        request_.folder / "lora", {"adapter_config.json": '{"base_model_name_or_path": "acme/t"}'}
    )
    assert request_.refused("./lora").hint == (
        f"./scripts/inv serve acme/t -- --enable-lora --lora-modules lora={folder}"
    )


def test_adapter_of_the_hub_gets_the_same_sentence(request_: Request) -> None:
    request_.cache("acme/lora", {"adapter_config.json": '{"base_model_name_or_path": "acme/t"}'})
    error = request_.refused("acme/lora")
    assert "acme/lora is a LoRA adapter: it is served with acme/t" in error.message
    assert (error.hint or "").endswith("--enable-lora --lora-modules lora=acme/lora")


def test_gguf_file_needs_the_plugin_that_reads_it(request_: Request) -> None:
    fill(request_.folder, {"m.gguf": "x", "m.safetensors": "x"})
    error = request_.refused("m.gguf")
    assert "reads with a plugin that .vllm lacks" in error.message
    hub = "acme/tiny-GGUF:Q4_K_M"
    assert "reads with a plugin" in request_.refused(hub).message
    request_.clone.package("vllm-gguf-plugin", "0.0.2")
    assert "fetches it during the start" in request_.dry_run(hub)
    line = request_.dry_run("./m.gguf", "--tokenizer", "acme/other").splitlines()[-1]
    assert f"serve {request_.folder / 'm.gguf'}" in line
    assert "is a file: name its folder" in request_.refused("./m.safetensors").message


def certificate(folder: Path, name: str) -> None:
    openssl = shutil.which("openssl")
    assert openssl, "openssl is part of the image"
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x"),
            *("-keyout", f"{name}.key", "-out", f"{name}.pem"),
        ],
        cwd=folder,
        check=True,
        capture_output=True,
    )


def test_certificate_is_loaded_with_its_key_before_the_model(request_: Request) -> None:
    request_.cache("acme/tiny", MODEL)
    for name in ("own", "other"):
        certificate(request_.folder, name)
    own = ("--ssl-certfile", "own.pem", "--ssl-keyfile")
    assert f"--ssl-certfile {request_.folder}/own.pem" in request_.dry_run(
        "acme/tiny", *own, "own.key"
    )
    assert (
        "no certificate with its key in" in request_.refused("acme/tiny", *own, "other.key").message
    )
    fill(request_.folder, {"no.pem": "text"})
    for args in (("--ssl-certfile", "no.pem"), ("--ssl-ca-certs", "no.pem")):
        assert "no certificate" in request_.refused("acme/tiny", *args).message


RANK = '{"r": 64}'


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--ssl-certfile", "absent.pem"), "--ssl-certfile: {at}/absent.pem cannot be read"),
        (("--chat-template", "./absent.jinja"), "absent.jinja cannot be read: No such file"),
        (("--chat-template", "absent.jinja"), "is neither a file in this folder"),
        (("--chat-template", "binary"), "is not UTF-8"),
        (("--tool-parser-plugin", "absent.py"), "absent.py cannot be read"),
        (("--tool-parser-plugin", "no_such_module"), "there is no module no_such_module in .vllm"),
        (("--reasoning-parser-plugin", "./absent.py"), "cannot be read"),
        (("--middleware", "no_such_module.run"), "there is no module no_such_module in .vllm"),
        (("--logits-processors", "json:A", "no_such_module:B"), "no module no_such_module"),
        (("--scheduler-cls", "no_such_module.Own"), "no module no_such_module"),
        (("--allowed-local-media-path", "./absent"), "is not a folder"),
        (("--download-dir", "a.txt"), "--download-dir: {at}/a.txt is not a folder"),
        (("--log-config-file", "a.txt"), "cannot be read: it is not valid JSON"),
        (("--mm-encoder-fp8-scale-path", "a.txt"), "cannot be read: it is not valid JSON"),
        (("--tokenizer", "./empty"), "has none of tokenizer.json, "),
        (("--tokenizer", "./absent"), "--tokenizer: {at}/absent does not exist"),
        (("--hf-config-path", "./empty"), "has none of config.json, params.json"),
        (("--generation-config", "./empty"), "has no generation_config.json"),
        (("--lora-modules", "a=./empty"), "--lora-modules: {at}/empty has no adapter_config.json"),
        (("--lora-modules", "a=./light"), "lacks the adapter's weights"),
        (("--lora-modules", "a=./rank"), "has rank 64, and --max-lora-rank allows 16"),
        (("--speculative-config", '{"model": "./empty"}'), "{at}/empty lacks config.json"),
        (("--profiler-config.torch_profiler_dir", "a.txt"), "is not a folder"),
    ],
)
def test_what_a_flag_points_to_is_found_missing_before_the_load(
    request_: Request, args: tuple[str, ...], message: str
) -> None:
    request_.cache("acme/tiny", MODEL)
    (request_.folder / "empty").mkdir()
    (request_.folder / "binary").write_bytes(b"\xff")
    adapter = {"adapter_config.json": RANK, "adapter_model.safetensors": "x"}
    fill(request_.folder / "rank", adapter)
    fill(request_.folder / "light", {"adapter_config.json": RANK})
    fill(request_.folder, {"a.txt": "text"})
    error = request_.refused("acme/tiny", *args)
    assert message.replace("{at}", str(request_.folder)) in error.message


def test_what_a_flag_points_to_is_accepted_where_it_is_right(request_: Request) -> None:
    request_.cache("acme/tiny", MODEL)
    folder = request_.folder
    adapter = {"adapter_config.json": RANK, "adapter_model.safetensors": "x"}
    fill(folder / "lora", adapter)
    fill(folder / "model", MODEL)
    fill(folder, {"mine.jinja": "{{ x }}", "parser.py": "", "log.json": "{}"})
    built_in = request_.clone.layout.vllm / "vllm" / "transformers_utils" / "chat_templates"
    fill(built_in, {"template_basic.jinja": ""})
    for args in (
        ("--chat-template", "mine.jinja"),
        ("--chat-template", "template_basic.jinja"),
        ("--chat-template", "{{ message }}"),
        ("--tool-parser-plugin", "parser.py"),
        ("--tool-parser-plugin", "json"),
        ("--middleware", "json.run"),
        ("--log-config-file", "log.json"),
        ("--allowed-local-media-path", "."),
        ("--download-dir", "new/folder"),
        ("--lora-modules", "a=lora", "--max-lora-rank", "64"),
        ("--tokenizer", "model"),
        ("--speculative-config", '{"model": "./model"}'),
        ("--profiler-config.torch_profiler_dir", "gs://bucket/traces"),
    ):
        assert is_offline(request_.dry_run("acme/tiny", *args)), args


def test_weights_of_the_model_its_drafter_and_its_adapters_count(request_: Request) -> None:
    large = {"config.json": "{}", "tokenizer.json": "{}", "model.safetensors": ""}
    adapter = {"adapter_config.json": RANK, "adapter_model.safetensors": ""}
    for folder in (
        request_.cache("acme/tiny", large),
        fill(request_.folder / "draft", large),
        fill(request_.folder / "lora", adapter),
    ):
        for weights in folder.glob("*.safetensors"):
            with weights.open("wb") as file:
                file.truncate(2 << 30)

    def needed(*extra: str) -> float:
        return float(request_.dry_run("acme/tiny", *extra).partition("needs ")[2].split()[0])

    drafter, adapters = ("--speculative-config", '{"model": "./draft"}'), "--lora-modules"
    assert needed() == 2.0
    assert needed(*drafter) == 4.0
    assert needed(*drafter, adapters, "a=lora", "--max-lora-rank", "64") == 6.0


def test_gpus_that_differ_need_an_order_that_does_not_depend_on_their_speed(
    request_: Request, tmp_path: Path
) -> None:
    request_.cache("acme/tiny", MODEL)
    rows = 'echo "NVIDIA GB10, 12.1, 580"; echo "NVIDIA RTX A2000, 8.6, 580"'
    program = fill(tmp_path / "bin", {"nvidia-smi": f"#!/bin/sh\n{rows}\n"}) / "nvidia-smi"
    program.chmod(0o755)
    (tmp_path / "libnvidia-ml.so.1").write_text("not a library")
    shell = {"PATH": f"{program.parent}:/usr/bin:/bin", "DEVICE": "cuda"}
    shell["LD_LIBRARY_PATH"] = str(tmp_path)
    assert "CUDA numbers the fastest first" in request_.dry_run("acme/tiny", **shell)
    assert "fastest" not in request_.dry_run("acme/tiny", CUDA_DEVICE_ORDER="PCI_BUS_ID", **shell)


def test_command_of_a_hint_names_the_folder_from_the_root_of_the_clone(request_: Request) -> None:
    folder = fill(request_.folder / "model", MODEL)
    output = request_.dry_run("./model", "--tokenizer", "model")
    assert output.splitlines()[-1].startswith(
        f"{request_.clone.layout.environment}/bin/vllm serve {folder} --tokenizer {folder}"
    )


@pytest.mark.parametrize("kind", ["latency", "serve"])
def test_benchmark_with_a_drafter_that_is_not_here_may_ask_the_hub(
    request_: Request, kind: Literal["latency", "serve"]
) -> None:
    layout, settings = (
        request_.clone.layout,
        load(request_.clone.layout, environ=request_.clone.shell),
    )
    console = Console(out=io.StringIO(), err=io.StringIO())
    models._smollm2_folder(layout, interpreter.installed(layout)).mkdir(parents=True)

    def is_offline(*args: str) -> bool:
        options = subject.WorkloadOptions(kind, "smollm2", args)
        with RunLog(console, layout.logs, verb="test") as run_log:
            return (
                "HF_HUB_OFFLINE"
                in subject._workload(layout, settings, options, run_log=run_log).recipe
            )

    assert is_offline()
    assert not is_offline("--speculative-config", DRAFTER)
    assert not is_offline("--tokenizer=acme/other")
