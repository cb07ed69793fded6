"""A run depends neither on the number of processes nor on being killed: 1 process against 2, with and without
FSDP (gloo), and runs that end by SIGKILL, SIGTERM, a closed terminal or a full disk and go on."""

import os
import pty
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, Started, finish, places, timeless
from safetensors.torch import load_file

import toy_world
from plumbing.files import read_jsonl
from recipes.rehearsal import write_data, write_models

MODEL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MODEL |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
MODEL |= {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}


STAGE = "--steps 2 --max-length 48 --batch-size 8 --micro-batch-size 3 "
STAGE += "--dataset data/{}.jsonl --model start/{}/policy"
EVALUATED = " --eval-dataset data/pairs.jsonl"
PPO = " --minibatch-size 4 --ptx-dataset data/sft.jsonl "
PPO += "--reward-model start/{0}/reward --cost-model start/{0}/cost"
RUNS = {  # every family of models in some script, PPO with two of them
    "sft.py": STAGE.format("sft", "qwen2"),
    "reward_model.py": STAGE.format("pairs", "llama") + EVALUATED,
    "cost_model.py": STAGE.format("pairs", "qwen2") + EVALUATED,
    "safe_rlhf_ppo.py": STAGE.format("sft", "gpt2") + PPO.format("gpt2"),
    "repo_ppo.py": STAGE.format("sft", "llama") + PPO.format("llama"),
    "repo_rloo.py": STAGE.format("sft", "qwen2") + PPO.format("qwen2"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Policies with random weights, reward and cost models with new heads, and a little data."""
    from transformers import LlamaConfig, Qwen2Config

    folder, words = tmp_path_factory.mktemp("processes"), len(toy_world.vocabulary())
    torch.manual_seed(0)
    write_data(f"{folder}/data", 9)
    configs = {
        "gpt2": toy_world.build_config(),
        "llama": LlamaConfig(vocab_size=words, tie_word_embeddings=True, **MODEL),
        "qwen2": Qwen2Config(vocab_size=words, **MODEL),
    }
    for family, config in configs.items():
        write_models(f"{folder}/start/{family}", config)
    return folder


def words(script: str, name: str, *flags: str) -> list[str]:
    """All flags of a run of `script` in runs/<script>/<name>."""
    return [*RUNS.get(script, "").split(), *flags, "--output-dir", f"runs/{script}/{name}"]


def launch(folder: Path, script: str, name: str, *flags: str, **options) -> Started:
    """One process, without torchrun."""
    return Started(folder, script, *words(script, name, *flags), **options)


def launch_ranks(folder: Path, script: str, name: str, ranks: int, *flags: str) -> list[Started]:
    """What torchrun does, without the seconds that its launcher takes: the ranks by their environment."""
    return [launch(folder, script, name, *flags, environment=place) for place in places(ranks)]


def launch_torchrun(folder: Path, script: str, name: str, ranks: int, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(ROOT / script), *words(script, name, *flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, **pipes)


def results(folder: Path, script: str, name: str) -> tuple[list[dict], dict]:
    run = folder / "runs" / script / name
    return read_jsonl(f"{run}/metrics.jsonl"), load_file(run / "model/model.safetensors")


def agree(folder: Path, script: str, name: str, *others: str) -> None:
    """The other runs have logged and saved what the first one has, up to the order of sums."""
    metrics, weights = results(folder, script, name)
    for other in others:
        other_metrics, other_weights = results(folder, script, other)
        for a, b in zip(timeless(metrics), timeless(other_metrics), strict=True):
            assert b == pytest.approx(a, abs=1e-4, rel=1e-3), other
        torch.testing.assert_close(other_weights, weights, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("script", RUNS)
def test_one_process_two_and_two_sharded_agree(folder, script):
    frozen = ("--offload-frozen",) if "--cost-model" in RUNS[script] else ()
    sharded = ("--fsdp", "--activation-checkpointing", *frozen)
    short = ("--layers", "1", "--normalize") if "model" in script else ()
    # at most three processes at a time on two cores
    finish(launch(folder, script, "one", *short), *launch_ranks(folder, script, "two", 2, *short))
    finish(*launch_ranks(folder, script, "sharded", 2, *short, *sharded))
    agree(folder, script, "one", "two", "sharded")


def test_evaluation_with_two_processes_gives_the_same_responses(folder):
    flags = "--policies a=start/qwen2/policy --reward-model start/gpt2/reward --cost-model start/llama/cost"
    flags += " --prompts data/sft.jsonl --samples 1 --micro-batch-size 7"
    one = launch(folder, "evaluate.py", "one", *flags.split())
    finish(one, launch_torchrun(folder, "evaluate.py", "two", 2, *flags.split()))
    one, two = (read_jsonl(f"{folder}/runs/evaluate.py/{name}/responses.jsonl") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["prompt"] == b["prompt"] and a["response"] == b["response"]
        for key in ("reward", "cost"):
            assert a[key] == pytest.approx(b[key], abs=1e-5)


# ------------------------------------------------------------------------------ checkpoints


def wait_for_steps(folder: Path, script: str, name: str, steps: int) -> None:
    path, deadline = folder / "runs" / script / name / "metrics.jsonl", time.monotonic() + 100
    while not path.exists() or path.read_text().count("\n") < steps:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def checkpoints(folder: Path, script: str, name: str) -> list[str]:
    return sorted(path.name for path in (folder / "runs" / script / name / "checkpoints").iterdir())


LONG = ("--steps", "10", "--save-every", "2")


@pytest.fixture(scope="module")
def straight(folder) -> tuple[list[dict], dict]:
    """Ten steps of RePO that nothing interrupts."""
    finish(launch(folder, "repo_ppo.py", "straight", *LONG))
    return results(folder, "repo_ppo.py", "straight")


def test_a_killed_run_resumes_bit_identical(folder, straight):
    process = launch(folder, "repo_ppo.py", "killed", *LONG)
    wait_for_steps(folder, "repo_ppo.py", "killed", 5)
    process.kill()
    process.communicate(timeout=60)
    finish(launch(folder, "repo_ppo.py", "killed", *LONG, "--resume"))
    metrics, weights = results(folder, "repo_ppo.py", "killed")
    assert timeless(metrics) == timeless(straight[0])  # no line missing, none double
    assert all(torch.equal(weights[k], straight[1][k]) for k in weights)
    assert checkpoints(folder, "repo_ppo.py", "killed") == ["step-10", "step-8"]


def test_sigterm_saves_and_another_number_of_processes_goes_on(folder, straight):
    process = launch(folder, "repo_ppo.py", "stopped", "--steps", "10")
    wait_for_steps(folder, "repo_ppo.py", "stopped", 3)
    process.terminate()
    last = process.communicate(timeout=60)[1].splitlines()[-1]
    assert process.returncode == 143 and last.startswith("stopped after step") and "--resume" in last
    finish(launch_torchrun(folder, "repo_ppo.py", "stopped", 2, "--steps", "10", "--resume", "--fsdp"))
    metrics, weights = results(folder, "repo_ppo.py", "stopped")
    assert [row["step"] for row in metrics] == list(range(10))
    for key in weights:
        torch.testing.assert_close(weights[key], straight[1][key], atol=1e-3, rtol=1e-2)


def on_terminal(name: str) -> None:
    """This process is a terminal's, and its messages go there."""
    os.setsid()
    os.dup2(os.open(name, os.O_RDWR), 2)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever started the tests


def test_a_run_whose_terminal_is_closed_saves(folder):
    """Its progress bar, too, has nowhere to go then."""
    ours, theirs = pty.openpty()
    prepare = partial(on_terminal, os.ttyname(theirs))
    process = launch(folder, "sft.py", "closed", "--steps", "2000", prepare=prepare)
    wait_for_steps(folder, "sft.py", "closed", 3)
    os.close(theirs)
    os.close(ours)
    process.communicate(timeout=60)
    assert process.returncode == 143 and len(checkpoints(folder, "sft.py", "closed")) == 1


def small_files() -> None:
    """The metrics fit, a checkpoint does not."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_full_disk_is_one_clear_error_and_leaves_the_last_checkpoint(folder):
    finish(launch(folder, "repo_ppo.py", "full", "--save-every", "2"))
    flags = ("--steps", "4", "--save-every", "1", "--resume")
    process = launch(folder, "repo_ppo.py", "full", *flags, prepare=small_files)
    error = process.communicate()[1]
    assert process.returncode == 2 and "cannot write a checkpoint" in error.splitlines()[-1], error[-2000:]
    assert checkpoints(folder, "repo_ppo.py", "full") == ["step-2"]


def test_ranks_that_all_fail_say_so_once(folder):
    ranks = launch_ranks(folder, "sft.py", "refused", 2, "--max-length", "500")
    output = "".join(rank.communicate()[1] for rank in ranks)
    assert {rank.returncode for rank in ranks} == {2} and "Traceback" not in output
    assert ["500" in line for line in output.splitlines() if "error: " in line] == [True], output
