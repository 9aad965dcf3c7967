"""The tiny gpt-oss: its MXFP4 values are the intended ones, and a seeded defect fails parity.

SMOKE_PROOF_CLONE as in test_defects.py. The kernels are those for CPUs, which require AMX.
"""

import json
import subprocess
from pathlib import Path

import pytest

from tests.proof.smoke import test_defects
from tests.proof.smoke.defects import Defect, replaced
from tests.proof.smoke.test_defects import seeded
from workspace.checks import numeric
from workspace.checks.probe_runs import Answer
from workspace.checks.registry import Check
from workspace.core.paths import Layout
from workspace.core.settings import load

built = test_defects.built
GPT_OSS = "vllm/model_executor/models/gpt_oss.py"
# A code has a sign, two bits of exponent with bias 1 and one bit of mantissa; a scale has eight
# bits of exponent with bias 127.
MEANT = """
import json, sys
import torch, transformers
from safetensors.torch import load_file
folder, probes = sys.argv[1:]
sys.path.insert(0, probes)
import reference, small_model

def meant(blocks, scales):
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).int()
    sign, exponent, mantissa = 1.0 - 2.0 * (codes >> 3), (codes >> 1) & 3, codes & 1
    values = torch.where(exponent == 0, mantissa / 2, 2.0 ** (exponent - 1) * (1 + mantissa / 2))
    return (sign * values * 2.0 ** (scales.int() - 127).unsqueeze(-1)).flatten(-2)

torch.manual_seed(7)
blocks = torch.randint(0, 256, (64, 4, 16), dtype=torch.uint8)
scales = torch.randint(100, 140, (64, 4), dtype=torch.uint8)
blocks[..., 0] = 0x7F
again = small_model.mxfp4(meant(blocks, scales))
weights = torch.randn(64, 128) * 3
found = meant(*small_model.mxfp4(weights))
groups = weights.unflatten(-1, (-1, 32))
scale = 2.0 ** (small_model.mxfp4(weights)[1].int() - 127).unsqueeze(-1)
every = torch.tensor([sign * value for value in small_model.E2M1 for sign in (1, -1)])
nearest = (groups.unsqueeze(-1) - every * scale.unsqueeze(-1)).abs().amin(-1)
middles = torch.zeros(32)
middles[:9] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0, 7.9])
tensors = load_file(folder + "/model.safetensors")
model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, local_files_only=True, **reference.dequantized(folder)
)
differ, quantized, codes = [], 0, set()
for name, value in model.state_dict().items():
    if name + "_blocks" in tensors:
        stored = [tensors[name + end] for end in ("_blocks", "_scales")]
        quantized += value.numel()
        codes |= set((stored[0] & 15).unique().tolist())
        wanted = meant(*stored).transpose(1, 2)
    else:
        wanted = tensors[name].float()
    differ += [] if torch.equal(value.float(), wanted) else [name]
print(json.dumps({
    "exact": torch.equal(again[0], blocks) and torch.equal(again[1], scales),
    "nearest": bool(torch.equal((found - weights).abs().unflatten(-1, (-1, 32)), nearest)),
    "middles": meant(*small_model.mxfp4(middles))[:9].tolist(),
    "differ": differ, "quantized": quantized, "codes": len(codes),
    "types": sorted({str(value.dtype) for value in tensors.values()}),
}))
"""
DEFECTS = {
    "attention without sinks": replaced("sinks=self.sinks,", "sinks=None,"),
    "a window that is longer by one": replaced(
        "config.sliding_window if", "config.sliding_window + 1 if"
    ),
    "three experts of four": replaced(
        "top_k=config.num_experts_per_tok,", "top_k=config.num_experts_per_tok - 1,"
    ),
    "a rotary embedding without yarn": replaced(
        '"factor": config.rope_parameters["factor"],', '"factor": 1.0,'
    ),
    "the scales of one block in eight doubled": replaced(
        "narrow_weight = weight[:, 2 * tp_rank_start : 2 * tp_rank_end, ...]",
        "narrow_weight = weight[:, 2 * tp_rank_start : 2 * tp_rank_end, ...] +"
        " (torch.arange(weight.shape[-1]) == 0)",
    ),
    "attention off by 5 % where single tokens are decoded": replaced(
        "attn_output = self.attn(q, k, v)",
        "attn_output = self.attn(q, k, v) * (1.05 if q.shape[0] < 6 else 1.0)",
    ),
}


def ask(layout: Layout, probe: str | Path, *args: str | Path) -> dict:
    argv = [layout.environment_python, layout.probes / probe, *args]
    done = subprocess.run(
        argv,
        env=load(layout).child_environment("smoke", layout=layout),
        cwd=layout.state,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def model(built: Layout, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "first"
    ask(built, "small_model.py", folder, "--architecture", "gpt-oss")
    return folder


@pytest.fixture(scope="module")
def reference(built: Layout, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("reference") / "reference.json"
    file.write_text(json.dumps(ask(built, "reference.py", f"--model=gpt-oss={model}")))
    return file


def parity(built: Layout, model: Path, reference: Path) -> Check:
    record = ask(
        built,
        "parity.py",
        f"--model=gpt-oss={model}",
        "--dtype",
        "bfloat16",
        "--against",
        reference,
    )
    return numeric.mxfp4(Answer(record, None, 0.0))


def test_hugging_face_reads_the_values_that_were_meant(
    built: Layout, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "meant.py").write_text(MEANT)
    found = ask(built, tmp_path / "meant.py", model, built.probes)
    assert found["exact"]
    assert found["nearest"]
    # Ties go to the even code, and what is too large becomes the largest.
    assert found["middles"] == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -4.0, 6.0]
    assert found["differ"] == []
    assert (found["quantized"], found["codes"]) == (2 * 8 * 3 * 512 * 256, 16)
    assert found["types"] == ["torch.bfloat16", "torch.uint8"]


def test_recipe_gives_the_same_bytes_again(built: Layout, model: Path, tmp_path: Path) -> None:
    ask(built, "small_model.py", tmp_path / "second", "--architecture", "gpt-oss")
    first, second = (
        {path.name: path.read_bytes() for path in folder.iterdir()}
        for folder in (model, tmp_path / "second")
    )
    assert first == second


@pytest.mark.skipif(
    "amx_tile" not in Path("/proc/cpuinfo").read_text(),
    reason="vLLM's MXFP4 kernel for CPUs requires AMX, which this CPU lacks",
)
class TestKernels:
    def test_vllm_agrees(self, built: Layout, model: Path, reference: Path) -> None:
        check = parity(built, model, reference)
        assert check.verdict == "pass", check.evidence

    @pytest.mark.parametrize("what", DEFECTS)
    def test_defect_fails_parity(
        self, built: Layout, model: Path, reference: Path, what: str
    ) -> None:
        with seeded(built, Defect(what, GPT_OSS, DEFECTS[what], "parity.gpt-oss", "full")):
            check = parity(built, model, reference)
        with (built.state / "defects.tsv").open("a") as file:
            file.write(f"{what}\tparity.gpt-oss\t{check.evidence}\n")
        assert check.verdict == "fail"
        assert "the limit is" in check.evidence, check.evidence
