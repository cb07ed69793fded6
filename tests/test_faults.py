"""What goes wrong from outside: a rank that fails, requests to stop, a full disk, and checkpoints that are
damaged, crafted, unseen or undeletable."""

import json
import math
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import ENVIRONMENT, ROOT

from plumbing import checkpoints, distributed, optim
from plumbing.files import InputError

FAILING = """
from types import SimpleNamespace
from plumbing import distributed, files, runs

def main(args):
    for step in range(1000):
        if step == 5 and distributed.rank() == 1:
            raise {error}
        distributed.any_rank(False)  # where the other rank sits meanwhile

runs.run(main, SimpleNamespace(fsdp=False, cudnn_attention=False))
"""


@pytest.mark.parametrize(
    "error, said",
    [("files.InputError('row 7 is bad')", "error: row 7 is bad"), ("KeyError('bug')", "KeyError: 'bug'")],
)
def test_a_rank_that_fails_ends_the_run_with_its_own_message(tmp_path, error, said):
    (tmp_path / "failing.py").write_text(FAILING.format(error=error))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command, environment = [*command, f"{tmp_path}/failing.py"], ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
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
def saved(tmp_path):
    """args, trained, and the path of a checkpoint of them."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = optim.adamw(model, 0.1, 0.01)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    args = SimpleNamespace(output_dir=str(tmp_path), keep=2, save_every=0, resume=True, resume_anyway=False)
    vars(args).update(steps=10, lr=1.0, warmup_ratio=0.0)
    trained = {"model": (model, optimizer)}
    checkpoints.save_checkpoint(args, 8, trained, {"log_lambda": -math.inf, "costs": [1.0, 2.0]})
    return args, trained, tmp_path / "checkpoints/step-8"


def load(args, trained) -> dict:
    return checkpoints.load_checkpoint(args, trained, {"log_lambda": 0.0, "costs": []})


def test_a_resumed_model_has_its_weights_and_moments_and_todays_flags(saved, capsys):
    args, trained, _ = saved
    model, before = trained["model"]
    weight = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.zero_()
    model.zero_grad()  # a fresh process has no gradients
    args.resume, args.resume_anyway, now = False, True, optim.adamw(model, 0.2, 0.5)
    extra = load(args, {"model": (model, now)})
    assert extra == {"step": 8, "steps": 10, "log_lambda": -math.inf, "costs": [1.0, 2.0]}
    assert capsys.readouterr().err == f"resumed from step 8 of {args.output_dir}\n"
    assert torch.equal(model.weight, weight)
    assert [(group["lr"], group["weight_decay"]) for group in now.param_groups] == [(0.2, 0.5), (0.2, 0.0)]
    for name in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(now.state[model.weight][name], before.state[model.weight][name])


def test_another_number_of_steps_is_another_schedule_and_that_is_said(saved, capsys):
    args, trained, _ = saved
    args.steps = 20
    load(args, trained)
    assert "--steps 10 -> 20 is another schedule: the learning rate goes from 0.21 to 0.65" in (
        capsys.readouterr().err  # (1 + cos(0.7 pi)) / 2 at the last step, (1 + cos(0.4 pi)) / 2 at the next
    )
    args.steps = 7
    with pytest.raises(InputError, match="has done 8 steps, and --steps 7 asks for fewer"):
        load(args, trained)


DAMAGED = [  # what is changed in extra.json; what is said of it
    ({"log_lambda": math.inf}, "is damaged"),
    ({"log_lambda": math.nan}, "is damaged"),
    ({"costs": [1.0, math.nan]}, "is damaged"),
    ({"costs": ["1"]}, "is damaged"),
    ({"step": 4}, "is damaged"),
    ({"step": "8"}, "holds not step, steps, log_lambda, costs; was it written by another script"),
    ({"log_lambda": None}, "holds not step"),
    (None, "holds not step"),
]


@pytest.mark.parametrize("change, said", DAMAGED)
def test_what_no_run_can_have_saved_is_not_resumed(saved, change, said):
    args, trained, checkpoint = saved
    extra = json.loads((checkpoint / "extra.json").read_text())
    (checkpoint / "extra.json").write_text(json.dumps(change and extra | change))
    with pytest.raises(InputError, match=f"step-8/extra.json: {said}"):
        load(args, trained)


class Evil:
    """Touches a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("place", ["index", "contents"])
def test_a_crafted_checkpoint_does_not_run(saved, tmp_path, place):
    """What is no tensor, such as a learning rate, stands pickled beside the tensors."""
    args, trained, checkpoint = saved
    if place == "index":
        (checkpoint / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    else:
        state = checkpoints._trained_state(trained)
        state["model_optimizer"]["param_groups"][0]["lr"] = Evil(tmp_path / "ran")
        dcp.save(state, checkpoint_id=checkpoint, no_dist=True)
    said = {"index": r"\.metadata: names .*, and loading it could run code", "contents": "cannot be resumed"}
    with pytest.raises(InputError, match=said[place]):
        load(args, trained)
    assert not (tmp_path / "ran").exists()


def test_every_rank_must_see_what_rank_0_sees(saved, monkeypatch):
    args, trained, _ = saved
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "gather_objects", lambda _: [9])  # what rank 0 has elsewhere
        with pytest.raises(
            InputError, match="step-9: rank 0 does not see it. Several machines need a shared"
        ):
            load(args, trained)
    monkeypatch.setattr(distributed, "rank", lambda: 1)  # and rank 0 makes its folder elsewhere
    with pytest.raises(InputError, match="rank 1 does not see what rank 0 writes. Several machines need"):
        checkpoints.save_checkpoint(args, 9, trained, {})


def test_what_cannot_be_deleted_stops_nothing_and_what_cannot_be_read_is_said(saved, monkeypatch):
    args, trained, checkpoint = saved
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as NFS, while another process has files open
        for step in range(9, 14):
            checkpoints.save_checkpoint(args, step, trained, {})
            assert checkpoints.complete_checkpoints(args.output_dir) == [step - 1, step]
    checkpoints.save_checkpoint(args, 14, trained, {})
    assert sorted(os.listdir(checkpoint.parent)) == ["step-13", "step-14"]

    def forbidden(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", forbidden)
    with pytest.raises(InputError, match="checkpoints: cannot be read .Permission denied.$"):
        checkpoints.complete_checkpoints(args.output_dir)


# ------------------------------------------------------------------------------ requests to stop, a full disk


@pytest.fixture
def stop(monkeypatch):
    """The state of requests; signals are what they were, afterwards."""
    monkeypatch.setattr(checkpoints, "_stop", {"requested": False, "agreed": False})
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    yield checkpoints._stop
    for number, handler in handlers.items():
        if handler is not signal.getsignal(number):
            signal.signal(number, handler)


def test_every_signal_that_announces_an_end_asks_for_a_checkpoint(stop):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background command has it ignored
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # by nohup
    checkpoints.stop_on_signals()
    signal.raise_signal(signal.SIGHUP)
    assert not stop["requested"]
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
        signal.raise_signal(signal.Signals[name])
        assert stop.pop("requested"), name
    with pytest.raises(KeyboardInterrupt):  # a first request was there
        signal.raise_signal(signal.SIGINT)


def test_a_request_that_comes_after_the_ranks_have_agreed_waits_for_the_next_step(saved, stop):
    args, trained, _ = saved
    args.save_every = 1
    assert checkpoints.checkpoint_due(args, 8)
    stop["requested"] = True  # now, on this rank alone: the others would save and go on
    checkpoints.save_checkpoint(args, 9, trained, {})
    assert checkpoints.checkpoint_due(args, 9)
    with pytest.raises(checkpoints.Stopped):
        checkpoints.save_checkpoint(args, 10, trained, {})


def test_no_agreement_forgets_a_request(stop, monkeypatch):
    """The ranks' answer must not overwrite a request that arrives while they ask each other."""
    monkeypatch.setattr(distributed, "any_rank", lambda value: stop.update(requested=True) or value)
    assert [checkpoints.checkpoint_due(SimpleNamespace(save_every=0), step) for step in (0, 1)] == [
        False,
        True,
    ]


def test_a_disk_that_is_full_at_the_end_leaves_no_half_model(tmp_path, run_in):
    assert run_in(tmp_path, "toy_world.py", "world")[0] == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the metrics fit, the weights do not
    try:
        code, line = run_in(tmp_path, "sft.py", "--steps", "1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and "runs/demo/sft/model: cannot be written (" in line
    assert sorted(os.listdir(tmp_path / "runs/demo/sft")) == [".lock", "args.json", "metrics.jsonl"]
