"""SmolLM2 from its wheels: it is assembled correctly if it knows the capital of France."""

import subprocess

from workspace.core.console import Console, RunLog
from workspace.core.paths import Layout
from workspace.core.settings import load
from workspace.server import models

ASK = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
talk = [{"role": "user", "content": "What is the capital of France?"}]
inputs = tokenizer.apply_chat_template(
    talk, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
answer = output[0][inputs["input_ids"].shape[1]:]
print(tokenizer.decode(answer, skip_special_tokens=True))
"""


def test_model_answers_that_the_capital_of_france_is_paris(layout: Layout) -> None:
    settings = load(layout)
    with RunLog(Console(), layout.logs, verb="test") as run_log:
        folder = models.smollm2(layout, settings, run_log=run_log)
    assert models.found_built_in(layout, "smollm2") == folder
    environment = settings.child_environment("run", {"HF_HUB_OFFLINE": "1"})
    done = subprocess.run(
        [layout.environment_python, "-c", ASK, folder],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == "The capital of France is Paris.", done.stderr
