"""The smoke's sequence with stand-in probes: real processes that answer, hang, die or babble."""

import io
import json
import os
import time
from pathlib import Path

import pytest

from tests.checks.test_server_checks import REFERENCE, ROWS, SAMPLED
from tests.clone import program
from workspace.checks import growth, numeric, probe_runs, server_checks, smoke_suite
from workspace.checks.registry import Check, Expected, Level, chosen
from workspace.checks.smoke import require_passed
from workspace.core.console import Console, RunLog
from workspace.core.errors import SmokeError
from workspace.core.paths import Layout
from workspace.core.process import Completed
from workspace.core.settings import load
from workspace.machine.machine import Machine

# The checks that the processes of one probe answer.
FROM_PARITY = {
    "parity.llama",
    "parity.qwen3",
    *(f"layers.{kind}" for kind in numeric.LAYERS),
    "provenance.import",
    *(f"consistency.{name}" for name in smoke_suite.CONSISTENCY),
}
FRONT = Path(__file__).with_name("front.py")
TINY = "import sys, pathlib\npathlib.Path(sys.argv[1]).mkdir(parents=True)\n"


class Clone:
    """A built clone in which only the probes are stand-ins."""

    def __init__(self, root: Path) -> None:
        self.layout = Layout(root)
        self.layout.environment_python.parent.mkdir(parents=True)
        # A stand-in needs no packages, and imports no site: that takes as long as all else it does.
        program(self.layout.environment_python, '#!/bin/sh\nexec @PYTHON@ -S "$@"\n')
        self.layout.probes.mkdir(parents=True)
        self.err = io.StringIO()
        self.probe("small_model", TINY)
        self.says(
            "verify",
            {
                "error": None,
                "libraries": [{"path": "vllm/_C.so", "verdict": "ok", "size": 1, "sha256": "a"}],
            },
        )
        group = {
            "error": None,
            "skipped": None,
            "seconds": 0.1,
            "rows": [{"case": "one", "difference": 0.5, "limit": 1.0}],
        }
        self.says("kernels", {"error": None, "groups": dict.fromkeys(smoke_suite.KERNELS, group)})
        self.says("reference", {"error": None, "models": {}, "sampling": REFERENCE})
        part = {"error": None, "seconds": 0.1, "rows": [{"case": "one", "problem": None}]}
        checks = (*numeric.RAW, *numeric.PROCESSED, numeric.ADAPTER)
        self.says("sampling", {"error": None, "groups": dict.fromkeys(checks, part), **SAMPLED})
        made = {name: part for names in numeric.ENGINE.values() for name in names}
        self.says("engine", {"error": None, "groups": made, "reference": {}})
        self.says(
            "real_model",
            {
                "error": None,
                "answer": "Paris",
                "compared": [
                    {"text": "a", "same_prompt": True, "equal": 1, "total": 1, "parting": None}
                ],
                "longest_run": 1,
                "most_repeated": 6,
                "finishes": [{"case": "x", "found": 1, "expected": 1}],
            },
        )
        vllm = {
            "file": str(self.layout.vllm / "vllm" / "__init__.py"),
            "version": "1+cpu",
            "platform": "cpu",
            "kernels": ["vllm/_C.so"],
        }
        same = {
            "error": None,
            "same_prompt": True,
            "equal": 2,
            "total": 2,
            "compared": 4,
            "wanted": 4,
            "not_finite": 0,
            "behind": 0,
            "partings": [],
        }
        same |= {
            "decode_difference": 0.0,
            "prefill_difference": 0.0,
            "mean_difference": 0.0,
            "cached": [1],
            "chunks": 2,
            "seconds": {},
        }
        tiny = ("llama", "qwen3", "mixtral", "gpt-oss-float32")
        compared = {
            kind: {"rows": group["rows"], "forms": list(forms), "seconds": 0.1}
            for kind, forms in numeric.LAYERS.items()
        }
        measured = {
            "models": dict.fromkeys((*tiny, "model"), same),
            "layers": dict.fromkeys(tiny, compared),
            "consistency": dict.fromkeys(smoke_suite.CONSISTENCY, same),
        }
        self.answer = {
            "error": None,
            "vllm": vllm,
            "torch": {"version": "2", "cuda": None},
            **measured,
        }
        self.says("parity", self.answer)

    def probe(self, name: str, code: str) -> None:
        (self.layout.probes / f"{name}.py").write_text(code)

    def says(self, name: str, record: dict) -> None:
        self.probe(
            name,
            "import sys\nprint('a greeting',"
            f" file=sys.stderr)\nprint({json.dumps(json.dumps(record))})\n",
        )

    def serves(self, manner: str) -> None:
        """Install a stand-in for vLLM's command line, and the offline engine's answers for it."""
        for name, document in (("rows", ROWS), ("kept", {"models": {"llama": ROWS}})):
            (self.layout.root / f"{name}.json").write_text(json.dumps(document))
        parity = self.layout.probes / "parity.py"
        parity.write_text(
            f"import sys, shutil\nshutil.copy({str(self.layout.root / 'kept.json')!r},"
            " sys.argv[sys.argv.index('--keep') + 1])\n" + parity.read_text()
        )
        source = self.layout.vllm / "vllm" / "engine" / "arg_utils.py"
        source.parent.mkdir(parents=True)
        names = (
            "host port dtype seed max-model-len max-num-seqs served-model-name chat-template"
            " enforce-eager enable-prompt-tokens-details"
        )
        source.write_text("".join(f'group.add_argument("--{name}")\n' for name in names.split()))
        program(
            self.layout.environment / "bin" / "vllm",
            f'#!/bin/sh\nwords="$*"\nexec @PYTHON@ -S {FRONT} "${{words##*--port=}}"'
            f" {manner} {self.layout.root}/rows.json\n",
        )

    def run(
        self,
        *,
        timeout_s: float = 30.0,
        model: str = "tiny",
        looks: tuple[str, str] = ("same", "same"),
        level: Level = "quick",
        is_fail_fast: bool = False,
        **shell: str,
    ) -> dict[str, Check]:
        settings = load(self.layout, environ={"PATH": "/usr/bin:/bin", **shell})
        expected = Expected(self.layout.vllm, "1+cpu", "2", "cpu", {"vllm/_C.so": (1, "a")})
        seen = iter(looks)
        with RunLog(
            Console(out=io.StringIO(), err=self.err),
            self.layout.logs,
            verb="smoke",
            secrets=settings.secrets,
        ) as run_log:
            options = smoke_suite.SmokeOptions(level, model, timeout_s, is_fail_fast)
            checks, _ = smoke_suite.run(
                Machine(self.layout, settings),
                expected,
                options,
                run_log=run_log,
                look=lambda: next(seen),
            )
        return {check.identifier: check for check in checks}

    def failed(self, **options: object) -> set[str]:
        checks = self.run(**options)  # type: ignore[arg-type]
        return {name for name, check in checks.items() if check.verdict == "fail"}

    def log(self) -> str:
        return "".join(path.read_text() for path in self.layout.logs.glob("*.log"))


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_good_answers_pass_and_each_check_has_a_row_with_its_state_first(
    clone: Clone,
) -> None:
    assert clone.failed() == set()
    rows = [line.split() for line in clone.err.getvalue().splitlines()]
    assert {row[1]: row[0] for row in rows} == {
        name: "skipped" if name == "binary.cubins" else "ok"
        for name in chosen("quick", has_model=False)
    }


def test_full_level_compares_a_server_with_the_offline_engine_and_stops_at_its_failure(
    clone: Clone,
) -> None:
    clone.serves("other")
    found = clone.run(level="full", is_fail_fast=True, VLLM_API_KEY="geheim")
    output = {name: check.evidence for name, check in found.items() if check.verdict == "fail"}
    # The stand-in has no metrics and no log-probabilities; tests/checks/test_growth.py has others.
    assert {name: text for name, text in output.items() if name not in growth.CHECKS} == {
        "server.ready": "it reports vLLM 2, but the stamp has 1+cpu"
    }
    names = [name for name in found if name.startswith("server.")]
    assert set(names) == {f"server.{name}" for name in server_checks.CHECKS} | {*growth.CHECKS}
    assert names[-1] == "server.stop"


def test_named_model_is_judged_beside_the_tiny_models(clone: Clone, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert clone.run(model=str(tmp_path / "mine"))["parity.model"].verdict == "pass"


def test_edit_of_the_tree_while_it_is_judged_fails(clone: Clone) -> None:
    assert clone.failed(looks=("one", "other")) == {"provenance.tree"}


def test_hang_is_a_failure_that_names_the_limit_and_leaves_no_process(
    clone: Clone, tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    clone.probe(
        "parity",
        f"import os, time\nos.fork()\nopen({str(pids)!r},"
        " 'a').write(f'{os.getpid()}\\n')\ntime.sleep(600)\n",
    )
    found = clone.run(timeout_s=4.0)
    assert found["binary.load"].verdict == "pass"
    assert "parity.py gave no answer in 4 s" in found["parity.llama"].evidence
    assert found["provenance.import"].verdict == "fail"
    # Both processes of either model dump their stacks, into the record and the log.
    for name in ("llama", "qwen3"):
        assert sum("parity.py" in line for line in found[f"parity.{name}"].problems) == 2
    assert clone.log().count("Fatal Python error: Aborted") == 4
    left = pids.read_text().split()
    assert len(left) == 4
    deadline = time.monotonic() + 5
    while any(is_running(pid) for pid in left) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(is_running(pid) for pid in left)


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_probe_without_a_document_fails_its_checks_and_no_others(clone: Clone) -> None:
    clone.probe("parity", "import os; os.kill(os.getpid(), 11)")
    found = clone.run()
    assert found["parity.llama"].evidence == "the probe was killed by SIGSEGV: no output"
    assert {name for name, check in found.items() if check.verdict == "fail"} == FROM_PARITY


def test_output_of_a_failed_probe_is_kept_in_the_log_without_secrets(clone: Clone) -> None:
    clone.probe(
        "verify",
        "import os, sys\nprint('token', os.environ.get('HF_TOKEN'), file=sys.stderr)\nprint('why it"
        " failed', file=sys.stderr)\nsys.exit(1)\n",
    )
    assert clone.failed(HF_TOKEN="hf_geheim") == {"binary.load", "provenance.libraries"}
    assert "why it failed" in clone.log()
    assert "hf_geheim" not in clone.log() + clone.err.getvalue()


def test_model_that_cannot_be_made_fails_parity_and_the_libraries_are_still_judged(
    clone: Clone,
) -> None:
    clone.probe("small_model", "raise ImportError('no transformers')")
    found = clone.run()
    assert found["binary.load"].verdict == "pass"
    assert "the tiny model could not be made" in found["parity.llama"].evidence
    assert "no transformers" in found["parity.llama"].evidence


def test_missing_interpreter_is_a_failed_check_and_no_crash(clone: Clone) -> None:
    clone.layout.environment_python.unlink()
    assert clone.failed() == set(chosen("quick", has_model=False)) - {
        "binary.cubins",
        "provenance.tree",
    }


def test_probes_run_in_a_neutral_folder_without_the_shells_settings_of_engines(
    clone: Clone, tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    clone.probe(
        "parity",
        f"import json, os\njson.dump([os.getcwd(), dict(os.environ)], open({str(seen)!r}, 'w'))",
    )
    clone.run(
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_CPU_KVCACHE_SPACE="12",
        HF_HUB_OFFLINE="0",
        PYTHONPATH="/elsewhere",
    )
    folder, environment = json.loads(seen.read_text())
    assert not Path(folder).is_relative_to(tmp_path)
    assert not os.path.exists(folder)
    own = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    assert own.items() <= environment.items()
    # The probe's own watch ends it, with stacks, before its caller does.
    assert float(environment[probe_runs.LIMIT]) < 30.0
    assert "PYTHONPATH" not in environment


@pytest.mark.parametrize(
    ("completed", "output"),
    [
        (Completed(1, "", "first\nlast\n\n"), "the probe exited with 1: last"),
        (
            Completed(0, '{"equal": 320\n', "last words\n"),
            "the probe printed no document: last words",
        ),
        (Completed(0, "[]\n", ""), "the probe printed no document: no output"),
        (Completed(0, "", ""), "the probe printed no document: no output"),
    ],
)
def test_only_the_last_line_of_output_is_the_reason(completed: Completed, output: str) -> None:
    assert probe_runs.read(completed) == ({}, output)


def test_failed_checks_are_named_with_the_hint_of_the_first_cause() -> None:
    output = {"provenance.import": "pass", "binary.load": "fail", "parity.llama": "fail"}
    fine, load_, options = (
        Check(name, verdict, "no", 0.0)  # type: ignore[arg-type]
        for name, verdict in output.items()
    )
    require_passed((fine,), log=None)
    with pytest.raises(
        SmokeError, match=r"2 of 3 checks failed: parity.llama, binary.load"
    ) as caught:
        require_passed((options, fine, load_), log=".workspace/logs/x.log")
    assert "inv bootstrap" in (caught.value.hint or "")
    assert caught.value.details == (
        "this points to: the compiled libraries; the failures after these follow from them",
        "log: .workspace/logs/x.log",
    )


@pytest.mark.parametrize(
    ("failed", "sentence"),
    [
        ("parity.llama", "operators compute correctly, and one model does not: the code of that"),
        ("parity.llama parity.qwen3", "operators compute correctly, and models do not: code that"),
        ("parity.llama kernels.norm sampling.ends", "an operator: compiled sources"),
        ("server.ready sampling.ends", "the sampler; the models compute correctly"),
        ("consistency.batch", "scheduler, batches or the cache"),
    ],
)
def test_pattern_of_failures_points_to_a_cause_and_to_the_patches(
    failed: str, sentence: str
) -> None:
    names = ("kernels.norm", "parity.llama", "parity.qwen3", "consistency.batch", "sampling.ends")
    checks = tuple(
        Check(name, "fail" if name in failed.split() else "pass", "no", 0.0)
        for name in (*names, "server.ready")
    )
    with pytest.raises(SmokeError) as caught:
        require_passed(checks, log=None, has_patches=True)
    *_, pointed, bisect = caught.value.details
    assert pointed.startswith(f"this points to: {sentence}")
    first = next(check.identifier for check in checks if check.verdict == "fail")
    assert bisect.startswith(f"./scripts/nox -s bisect -- --patches --run {first} finds")
    with pytest.raises(SmokeError) as caught:
        require_passed(checks, log=None)
    assert caught.value.details[-1] == pointed


def test_fail_fast_ends_the_probes_that_still_run(clone: Clone, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    clone.probe("kernels", "import time; time.sleep(1); raise RuntimeError('seeded')")
    clone.probe(
        "parity",
        f"import os, time\nopen({str(pids)!r}, 'a').write(f'{{os.getpid()}} ')\ntime.sleep(600)\n",
    )
    started = time.monotonic()
    found = clone.run(timeout_s=120.0, is_fail_fast=True)
    assert time.monotonic() - started < 60
    assert found["kernels.norm"].evidence == "the probe exited with 1: RuntimeError: seeded"
    assert "parity.llama" not in found
    left = pids.read_text().split() if pids.exists() else []
    assert not any(is_running(pid) for pid in left)


def test_model_whose_probe_dies_takes_no_verdict_of_the_other_along(clone: Clone) -> None:
    parity = (clone.layout.probes / "parity.py").read_text()
    clone.probe(
        "parity",
        f"import os, sys\n'qwen3=' in str(sys.argv) and os.kill(os.getpid(), 11)\n{parity}",
    )
    found = clone.run()
    assert {name for name, check in found.items() if check.verdict == "fail"} == {"parity.qwen3"}
    assert "SIGSEGV" in found["parity.qwen3"].evidence
    assert "with biases" in found["layers.linear"].evidence
