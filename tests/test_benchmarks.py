"""The benchmarks on a CPU and tiny shapes: what they print is complete and adds up."""

import json
import math
import subprocess
import sys
from argparse import Namespace
from contextlib import nullcontext

import pytest
from conftest import ENVIRONMENT, ROOT
from torch.nn import functional

import toy_world

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import versus_trl  # noqa: E402


def test_the_first_hour_on_a_gpu_in_small(tmp_path):
    small = "--shapes tiny --modes fsdp --steps 2 --batch-size 2 --micro-batch-size 2 --max-length 40"
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), *small.split(), "--max-new-tokens", "6"]
    command += ["--dtype", "fp32", "--resume", "--output", str(tmp_path / "gpu.json")]
    process = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stdout + process.stderr[-2000:]
    assert process.stdout.startswith("bf16 with left padding: all gradients are finite")
    result = json.loads((tmp_path / "gpu.json").read_text())
    (run,) = result["runs"]
    assert (run["shape"], run["mode"], run["failed"]) == ("tiny", "fsdp", "")
    assert result["resumed"] == "goes on: 3 steps logged after 2 + 1"
    tokens = run["tokens_per_second"] * run["seconds_rollout"]
    assert tokens == pytest.approx(2 * run["response_length"])
    assert all(0 < run[f"{name}_share"] < 1 for name in ("sampling", "scoring", "update"))
    assert result["log_probs"]["largest"] < 1e-5 and result["log_probs"]["beyond_clip"] == 0


def test_operations_on_a_gpu_by_hand():
    """Per layer q and o of 64 x 64, k and v of 64 x 32, and three of 64 x 128; words 300 x 64. Prompts of 15
    tokens, responses of 5, supervised ones of 4."""
    blocks, output = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128), 300 * 64
    row = dict.fromkeys(("seconds_rollout", "seconds_scoring", "seconds_update"), 1) | {"response_length": 5}
    args, machine = Namespace(batch_size=2, max_new_tokens=6, dtype="fp32"), {"flops": 1, "bytes": 1}
    # forward, backward and again; plain without each layer's last product, 128 x 64
    modes = (("plain", 6, blocks - 2 * 128 * 64, 4), ("lora", 4, blocks, 4), ("int8", 4, blocks, 1))
    for mode, both, again, width in modes:
        found = gpu.shares(row, "tiny", mode, (15, 4), machine, args)
        assert found["scoring_share"] == 2 * (5 * 20 * blocks + 5 * output) * 2
        learned = (both * blocks + 2 * again) * (3 * 20 + 19) + both * output * (5 + 4)
        assert found["update_share"] == 2 * learned
        assert found["sampling_share"] == 6 * (width * blocks + 4 * output)
        assert found["tokens_per_second"] == 10
    prompt = toy_world.split_prompts()[0][0]
    tokens = len(prompt.split()) + 5  # the template's words
    assert gpu.mean_tokens([{"prompt": prompt, "response": "oil springs ."}], 40) == (tokens, 4)


def test_what_does_not_fit_a_gpu_is_not_resumed(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "planned", lambda given: {"peak": 0.0, "host": math.inf})
    monkeypatch.setattr(gpu, "limits", lambda dtype: {"flops": 1, "bytes": 1})
    sizes = {"steps": 2, "batch_size": 2, "micro_batch_size": 2, "max_length": 40, "max_new_tokens": 6}
    gpu.main(Namespace(shapes=["tiny"], modes=["plain"], dtype="fp32", resume=True, output=None, **sizes))
    assert "does not fit by the plan" in capsys.readouterr().out


@pytest.mark.parametrize("spoilt", [False, True])
def test_a_kernel_that_makes_nan_of_padding_ends_the_first_hour_at_once(monkeypatch, spoilt):
    """A query at padding sees no key, and a softmax over nothing is 0 / 0."""
    real, rows = functional.scaled_dot_product_attention, []

    def attention(query, key, value, attn_mask, **options):
        blind = ~attn_mask.any(-1, keepdim=True)
        rows.append(int(blind.sum()))
        result = real(query, key, value, attn_mask=attn_mask, **options)
        return result.masked_fill(blind, math.nan) if spoilt else result

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attention)
    with pytest.raises(SystemExit, match="is not finite") if spoilt else nullcontext():
        gpu.check_padded_gradients()
    assert set(rows) == {0 + 25 + 44}  # prompts of 45, 20 and 1 tokens


TINY = versus_trl.Shape(1, 16, 2, 216, 8, 6, 4, 4, shortest=2, micro_batch=2)


def test_versus_takes_turns_with_another_checkout_and_responses_end_where_they_should():
    assert sorted(TINY.lengths()) == [2, 3, 4, 6]
    mixed = versus_trl.SHAPES["mixed"].lengths()
    assert sorted(mixed)[::31] == [8, 384] and len(mixed) == len(set(mixed)) == 32
    ((a, b),) = versus_trl.compare(TINY, "fp32", Namespace(against=str(ROOT), pairs=1, lora_rank=2))
    assert a["response_length"] == b["response_length"] == 15 / 4
    assert a["truncated_rate"] == 0
    assert a["policy_loss"] == b["policy_loss"] and a["seconds"] >= a["seconds_update"]


def test_the_ratios_by_hand():
    row = versus_trl.summary(TINY, "bf16", [({"seconds": 2, "cpu": 3}, {"seconds": 1, "cpu": 6})] * 2, False)
    assert (row["ours"]["median"], row["theirs"]["median"], row["ratio"]["median"]) == (2, 4, 0.5)
    assert row["ratio a pass"]["median"] == 0.5 * 18 / 9 and row["ratio of processor time"]["median"] == 2
