"""Every recipe, with all of its flags, on tiny models of its family (REHEARSAL= in recipes/common.sh)."""

import subprocess
import sys

import pytest
from conftest import ENVIRONMENT, ROOT, finish

from plumbing.files import read_json, read_jsonl

MADE = {
    "score_models_7b.sh": ("alpaca_7b", "reward_7b", "cost_7b"),
    "safe_rlhf_7b_8gpu.sh": ("safe_rlhf_7b",),
    "repo_7b_8gpu.sh": ("repo_7b",),
    "repo_3b_1gpu.sh": ("llama_3b_sft", "repo_3b"),
    "repo_7b_1gpu.sh": ("repo_7b_lora",),
}
GROUPS = [
    ("score_models_7b.sh", "repo_3b_1gpu.sh"),
    ("safe_rlhf_7b_8gpu.sh", "repo_7b_8gpu.sh", "repo_7b_1gpu.sh"),
]


def test_every_recipe_is_rehearsed():
    assert MADE.keys() == {p.name for p in (ROOT / "recipes").glob("*.sh")} - {"common.sh"}


@pytest.mark.parametrize("together", GROUPS, ids="-".join)
def test_recipes_run_and_leave_models(tmp_path, together):
    def rehearse(recipe: str) -> subprocess.Popen:
        own = {"REHEARSAL": str(tmp_path / recipe), "NPROC": "1", "PYTHON": sys.executable}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command = ["bash", str(ROOT / "recipes" / recipe)]
        return subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT | own, **pipes)

    finish(*map(rehearse, together))  # side by side: one process each
    for recipe in together:
        for name in MADE[recipe]:
            run = tmp_path / recipe / "runs" / name
            assert len(read_jsonl(f"{run}/metrics.jsonl")) == 2
            assert (run / "model/model.safetensors").exists() and (run / "checkpoints/step-2").exists()
            assert read_json(f"{run}/args.json")["dtype"] == "bf16"
