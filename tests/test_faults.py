"""What goes wrong from outside: damaged input by the dozen, a rank that fails, a request to stop at a bad
moment, a full disk, a checkpoint that would run code."""

import gzip
import json
import os
import pickle
import random
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import ENVIRONMENT, ROOT

import toy_world
from plumbing import checkpoints, distributed, files, optim, runs
from plumbing.files import InputError
from plumbing.loading import load_score_model, load_tokenizer
from recipes.rehearsal import write_models


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_folder_with_a_damaged_file_is_one_line_that_names_it(tmp_path, name):
    write_models(str(tmp_path), toy_world.build_config())
    path = tmp_path / "cost" / name
    content, folder = path.read_bytes(), str(tmp_path / "cost")
    damaged = [None, b"", content[: len(content) // 2], random.Random(0).randbytes(200), bytes(len(content))]
    damaged += [gzip.compress(content), b"null", b"[]", b"7", b'"text"', b"[" * 100_000, b"\xff\xfe{\0}\0"]
    for bad in damaged:
        path.unlink()
        if bad is not None:
            path.write_bytes(bad)
        with pytest.raises(InputError) as error:
            load_tokenizer(folder) if name == "tokenizer.json" else load_score_model(folder, "cost")
        assert folder in str(error.value) and "\n" not in str(error.value)
        path.write_bytes(content)


# ------------------------------------------------------------------------------ ranks


FAILING = """
import sys
from types import SimpleNamespace
sys.path.insert(0, {root!r})
import distributed, runs

def main(args):
    for step in range(1000):
        if step == 5 and distributed.rank() == 1:
            raise {error}
        distributed.any_rank(False)  # where the other rank sits meanwhile

runs.run(main, SimpleNamespace(fsdp=False, cudnn_attention=False))
"""


@pytest.mark.parametrize(
    "error, said",
    [("runs.InputError('row 7 is bad')", "error: row 7 is bad"), ("KeyError('bug')", "KeyError: 'bug'")],
)
def test_a_rank_that_fails_ends_the_run_with_its_own_message(tmp_path, error, said):
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(root=str(ROOT), error=error))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.run(
        [*torchrun, str(script)], env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert process.returncode != 0
    assert process.stderr.count(said) == 1  # once, not by every rank
    assert "closed by peer" not in process.stderr  # the other rank's view of it helps nobody


def test_a_half_set_environment_is_refused(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="RANK is set and LOCAL_RANK is not"):
        distributed.start_processes()


# ------------------------------------------------------------------------------ checkpoints


@pytest.fixture
def run_of_two_steps(tmp_path):
    """args, trained, and the path of a checkpoint of them."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = optim.adamw(model, 0.1, 0.01)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    args = SimpleNamespace(output_dir=str(tmp_path), keep=2, save_every=0, resume=True, resume_anyway=False)
    trained = {"model": (model, optimizer)}
    checkpoints.save_checkpoint(args, 2, trained, {"log_lambda": -0.5})
    return args, trained, tmp_path / "checkpoints/step-2"


def test_a_checkpoint_comes_back_bit_for_bit(run_of_two_steps, capsys):
    args, trained, _ = run_of_two_steps
    before = {name: tensor.clone() for name, tensor in trained["model"][0].state_dict().items()}
    with torch.no_grad():
        trained["model"][0].weight.zero_()
    assert checkpoints.load_checkpoint(args, trained, {"log_lambda": 0.0}) == {"step": 2, "log_lambda": -0.5}
    assert all(torch.equal(before[name], tensor) for name, tensor in trained["model"][0].state_dict().items())
    assert f"resumed from step 2 of {args.output_dir}" in capsys.readouterr().err


def test_a_resumed_optimizer_has_its_moments_and_todays_flags(run_of_two_steps):
    args, trained, _ = run_of_two_steps
    model, before = trained["model"]
    model.zero_grad()  # a fresh process has no gradients
    args.resume, args.resume_anyway, now = False, True, optim.adamw(model, 0.2, 0.5)
    checkpoints.load_checkpoint(args, {"model": (model, now)}, {"log_lambda": 0.0})
    assert [(group["lr"], group["weight_decay"]) for group in now.param_groups] == [(0.2, 0.5), (0.2, 0.0)]
    for name in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(now.state[model.weight][name], before.state[model.weight][name])


def test_rank_0_decides_what_is_resumed(run_of_two_steps, monkeypatch):
    args, trained, _ = run_of_two_steps
    monkeypatch.setattr(distributed, "gather_objects", lambda steps: [[2, 4]])  # what rank 0 sees elsewhere
    with pytest.raises(
        files.InputError, match="step-4: rank 0 does not see it. Several machines need a shared"
    ):
        checkpoints.load_checkpoint(args, trained, {"log_lambda": 0.0})


class Evil:
    """Touches a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_crafted_index_of_a_checkpoint_does_not_run(run_of_two_steps, tmp_path):
    args, trained, checkpoint = run_of_two_steps
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(InputError, match=r"\.metadata: names .*, and loading it could run code"):
        checkpoints.load_checkpoint(args, trained, {"log_lambda": 0.0})
    assert not (tmp_path / "ran").exists()


def test_crafted_contents_of_a_checkpoint_do_not_run(run_of_two_steps, tmp_path):
    """What is no tensor, such as a learning rate, stands pickled beside the tensors."""
    args, trained, checkpoint = run_of_two_steps
    state = checkpoints._trained_state(trained)
    state["model_optimizer"]["param_groups"][0]["lr"] = Evil(tmp_path / "ran")
    dcp.save(state, checkpoint_id=checkpoint, no_dist=True)
    with pytest.raises(InputError, match="step-2 cannot be resumed"):
        checkpoints.load_checkpoint(args, trained, {"log_lambda": 0.0})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [None, {}, [], {"step": 2}, {"step": "2", "log_lambda": 0.0}])
def test_what_does_not_belong_to_a_checkpoint_is_said(run_of_two_steps, content):
    args, trained, checkpoint = run_of_two_steps
    (checkpoint / "extra.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="extra.json: holds not step, log_lambda"):
        checkpoints.load_checkpoint(args, trained, {"log_lambda": 0.0})


# ------------------------------------------------------------------------------ requests to stop, a full disk


def test_a_request_that_comes_after_the_ranks_have_agreed_waits_for_the_next_step(
    run_of_two_steps, monkeypatch
):
    args, trained, _ = run_of_two_steps
    monkeypatch.setattr(runs, "_stop", {"requested": False, "agreed": False})
    args.save_every = 1
    assert checkpoints.checkpoint_due(args, 2)
    checkpoints._stop["requested"] = True  # now, on this rank alone: the others would save and go on
    checkpoints.save_checkpoint(args, 3, trained, {})
    assert checkpoints.checkpoint_due(args, 3)
    with pytest.raises(checkpoints.Stopped):
        checkpoints.save_checkpoint(args, 4, trained, {})


def test_no_agreement_forgets_a_request(monkeypatch):
    """The ranks' answer must not overwrite a request that arrives while they ask each other."""
    stop = {"requested": False, "agreed": False}

    def arrives_meanwhile(value):
        stop["requested"] = True
        return value

    monkeypatch.setattr(runs, "_stop", stop)
    monkeypatch.setattr(distributed, "any_rank", arrives_meanwhile)
    args = SimpleNamespace(save_every=0)
    assert not checkpoints.checkpoint_due(args, 0)
    assert checkpoints.checkpoint_due(args, 1)


def test_a_disk_that_is_full_at_the_end_leaves_no_half_model(tmp_path, run_in):
    assert run_in(tmp_path, "toy_world.py", "world")[0] == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the metrics fit, the weights do not
    try:
        code, line = run_in(tmp_path, "sft.py", "--steps", "1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and "runs/demo/sft/model: cannot be written (" in line
    assert sorted(os.listdir(tmp_path / "runs/demo/sft")) == [".lock", ".pid", "args.json", "metrics.jsonl"]
