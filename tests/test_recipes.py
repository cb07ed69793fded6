"""Every recipe, with all of its flags, on tiny models of its family (REHEARSAL= in recipes/common.sh)."""

import os
import signal
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
    "chat_model_1gpu.sh": ("chat_reward", "chat_cost", "chat_safe_rlhf", "chat_repo"),
}
GROUPS = [
    ("score_models_7b.sh", "repo_3b_1gpu.sh"),
    ("chat_model_1gpu.sh",),
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
            args = read_json(f"{run}/args.json")
            assert args["dtype"] == "bf16"
            if recipe == "safe_rlhf_7b_8gpu.sh":
                assert args["cost_window"] == 8  # 128 costs on each of 8 ranks, as published
            elif "repo" in name:
                assert "cost_window" not in args


def sourced(tmp_path, then: str, **variables) -> subprocess.Popen:
    """common.sh on a host whose name resolves to what `getent` below says, and the command `then`."""
    (tmp_path / "getent").write_text('#!/bin/sh\necho "$RESOLVED"\n')
    (tmp_path / "getent").chmod(0o755)
    search = {"PATH": f"{tmp_path}:{ENVIRONMENT['PATH']}", "PYTHON": sys.executable, "NPROC": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = ["bash", "-euc", f"source {ROOT}/recipes/common.sh; {then}"]
    return subprocess.Popen(command, env=ENVIRONMENT | search | variables, **pipes)


@pytest.mark.parametrize("address", ["127.0.1.1", "::1", "10.0.0.7"])
def test_several_machines_are_not_told_to_meet_where_only_one_is(tmp_path, address):
    flags = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "first-host", "RESOLVED": f"{address} STREAM"}
    for named in ({}, {"GLOO_SOCKET_IFNAME": "eth0"}):
        started = sourced(tmp_path, 'echo "${LAUNCH[@]}"', **flags | named)
        output, error = started.communicate(timeout=60)
        if address == "10.0.0.7" or named:
            assert started.returncode == 0 and "--nnodes 2 --node-rank 0 --master-addr first-host" in output
        else:
            assert started.returncode == 2 and "set GLOO_SOCKET_IFNAME to its network interface" in error


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_a_warning_to_recipe_and_torchrun_reaches_the_run(tmp_path, name):
    """As a scheduler sends it: to all processes of the job but for the run's own, which torchrun tells."""
    (tmp_path / "waits.py").write_text(
        "import signal, sys, time\n"
        f"signal.signal(signal.{name}, lambda *_: sys.exit(print('saved', flush=True)))\n"
        "print('runs', flush=True)\ntime.sleep(60)\n"
    )
    started = sourced(tmp_path, f'"${{LAUNCH[@]}}" {tmp_path}/waits.py || echo "torchrun has ended"')
    assert started.stdout.readline() == "runs\n"
    number = getattr(signal, name)
    children = subprocess.run(["pgrep", "-P", str(started.pid)], capture_output=True, text=True).stdout
    for process in (*map(int, children.split()), started.pid):
        os.kill(process, number)
    output, _ = started.communicate(timeout=60)
    assert output.splitlines() == ["saved", "torchrun has ended"]
