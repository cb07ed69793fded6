"""The benchmarks on a CPU and tiny shapes: what they print is complete and adds up."""

import functools
import json
import math
import subprocess
import sys
from argparse import Namespace

import pytest
from conftest import ENVIRONMENT, ROOT

import repo_ppo
import toy_world
from plumbing import runs

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import growth  # noqa: E402
import limits  # noqa: E402
import steps  # noqa: E402
import versus_trl  # noqa: E402


def test_the_first_hour_on_a_gpu_in_small(tmp_path):
    small = "--shapes tiny --modes fsdp --steps 2 --batch-size 2 --micro-batch-size 2 --max-length 40"
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), *small.split(), "--max-new-tokens", "6"]
    command += ["--dtype", "fp32", "--resume", "--output", str(tmp_path / "gpu.json")]
    process = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stdout + process.stderr[-2000:]
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


TINY = steps.Shape(1, 16, 2, 216, 8, 6, 4, 4, shortest=2, micro_batch=2)


class Taken(list):
    """Steps of repo_ppo.py in this process, all of them before the first is asked for."""

    def __init__(self, folder, shape, dtype, wanted=3):
        class Turns:
            def done(_, **told):
                self.append({"seconds": 0.5 + len(self), "cpu": 1.0, "peak_gib": 1.0 + len(self)} | told)
                if len(self) == wanted:
                    raise EOFError

        lengths = json.loads((folder / "lengths.json").read_text())
        with pytest.MonkeyPatch.context() as patch, pytest.raises(EOFError):
            patch.setattr(steps, "Turns", Turns)
            patch.setattr(runs, "Laps", runs.Laps)
            patch.setattr(runs, "RunLog", runs.RunLog)  # steps.main() puts its own in their places
            patch.setattr(repo_ppo, "generate", repo_ppo.generate)
            steps.main(lengths, [*shape.flags(str(folder), dtype), "--output-dir", str(folder / dtype)])

    def read(self):
        return self.pop(0)

    step = read

    def close(self):
        assert not self


def test_responses_end_at_the_lengths_of_a_shape(tmp_path):
    assert sorted(TINY.lengths()) == [2, 3, 4, 6]
    assert sorted(steps.SHAPES["mixed"].lengths())[::31] == [8, 384]
    assert len(steps.SHAPES["mixed"].lengths()) == len(set(steps.SHAPES["mixed"].lengths())) == 32
    steps.build(tmp_path, TINY)
    ready, *taken = Taken(tmp_path, TINY, "fp32")
    assert "response_length" not in ready
    assert [row["response_length"] for row in taken] == [15 / 4] * 2
    assert [row["truncated_rate"] for row in taken] == [0.0] * 2


def test_versus_takes_turns_with_another_checkout():
    taken = versus_trl.compare(TINY, "fp32", Namespace(against=str(ROOT), pairs=1))
    ((a, b),) = taken
    assert a["response_length"] == b["response_length"] == 15 / 4
    assert a["policy_loss"] == b["policy_loss"] and a["seconds"] >= a["seconds_update"]
    row = versus_trl.summary(TINY, "bf16", [({"seconds": 2, "cpu": 3}, {"seconds": 1, "cpu": 6})] * 2, False)
    assert (row["ours"]["median"], row["theirs"]["median"], row["ratio"]["median"]) == (2, 4, 0.5)
    assert row["ratio a pass"]["median"] == 0.5 * 18 / 9 and row["ratio of processor time"]["median"] == 2


def test_limits_count_the_products_of_a_pass(monkeypatch):
    shape = steps.SHAPES["gpt2"]
    products, tokens = limits.forward(shape, 2, 10, 3), 2 * 10
    counted = 24 * shape.layers * shape.width**2 * tokens  # two operations a weight and token
    counted += 4 * shape.layers * shape.width * 10 * tokens + 2 * shape.width * shape.words * 2 * 3
    assert limits.operations(products) == counted
    assert limits.operations(limits.backward(products)) == 2 * counted
    monkeypatch.setattr(limits, "ours", functools.partial(Taken, wanted=4))
    rows = limits.measure(TINY, ["fp32", "bf16"], 2)
    assert [row["dtype"] for row in rows] == ["fp32", "bf16"] and "gain" in rows[1]
    assert all(0 < row[phase]["high"] for row in rows for phase in limits.PHASES)


def test_growth_fits_exponents(monkeypatch, tmp_path):
    assert growth.slope((1, 2, 4), (3, 12, 48)) == pytest.approx(2)
    monkeypatch.setattr(growth, "BASE", TINY)
    monkeypatch.setattr(growth, "ours", Taken)
    row = growth.grow("batch", (2, 4), 1)
    assert row["gib"] == [2.0, 2.0] and row["memory exponent"] == 0
    assert row["time exponent"]["median"] == 0
    growth.draw([row], str(tmp_path / "growth.png"))
    assert (tmp_path / "growth.png").stat().st_size > 10_000
