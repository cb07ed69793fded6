"""The scripts on a device that is not the CPU: nothing is left behind, and the numbers are the CPU's."""

from pathlib import Path

import pytest
import torch
from conftest import Started, finish, metrics, timeless
from elsewhere import DEVICE, There, everything_there

from plumbing.files import read_jsonl


def in_a_fork(folder: Path, check) -> None:
    """Run `check` in a process that computes there."""
    finish(Started(folder, "plumbing/files.py", prepare=check))


def refusals() -> None:
    everything_there()
    here, there = torch.ones(2), torch.ones(2, device=DEVICE)
    assert isinstance(there, There) and (there * torch.tensor(3.0)).tolist() == [3, 3]  # a scalar may be here
    generator = torch.Generator().manual_seed(0)
    for mixture in (
        lambda: here + there,
        lambda: torch.cat([there, here]),
        lambda: torch.nn.functional.linear(there, here[None]),
        lambda: here[torch.zeros(1, dtype=torch.long, device=DEVICE)],
        lambda: torch.rand(2, generator=generator, device=DEVICE),
        lambda: there.__setitem__(torch.tensor([0, 1]), here),
    ):
        with pytest.raises(RuntimeError, match="expected a"):
            mixture()
    there[[0]] = 5  # an index may be here
    assert there.to("cpu").tolist() == [5, 1] and type(there.to("cpu")) is torch.Tensor
    assert here.copy_(there).tolist() == [5, 1] and type(here) is torch.Tensor


def test_the_device_refuses_what_a_gpu_refuses(tmp_path):
    in_a_fork(tmp_path, refusals)


FEW = ("--batch-size", "16", "--micro-batch-size", "4")
PPO = (*FEW, "--minibatch-size", "8", "--sample-every", "1", "--save-every", "2")
RUNS = {  # name -> script, flags; a run that is called "resumed" goes on with the one before it
    "sft": ("sft.py", *FEW, "--steps", "2"),
    "reward_model": ("reward_model.py", *FEW, "--steps", "2", "--eval-dataset", ""),
    "cost_model": ("cost_model.py", *FEW, "--steps", "2", "--eval-dataset", ""),
    "safe_rlhf": ("safe_rlhf_ppo.py", *PPO, "--steps", "2"),
    "safe_rlhf resumed": ("safe_rlhf_ppo.py", *PPO, "--steps", "3", "--resume"),
    "repo with adapters": ("repo_ppo.py", *PPO, "--steps", "2", "--lora-rank", "4"),
    "rloo": ("repo_rloo.py", *PPO, "--steps", "2"),
    "dominance": ("experiments/constraints.py", "dominance", *PPO, "--steps", "2", "--threshold", "-1"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The toy's pipeline up to PPO, a few steps of each stage; and all of RUNS on the CPU, and there."""
    folder = tmp_path_factory.mktemp("device")
    finish(Started(folder, "toy_world.py", "world"))
    finish(Started(folder, "sft.py", "--steps", "4"))
    finish(Started(folder, "toy_world.py", "preferences", "--pairs", "40", "--samples", "1"))
    models = ("reward_model.py", "cost_model.py")
    finish(*(Started(folder, script, *FEW, "--steps", "2", "--eval-dataset", "") for script in models))
    for name, (script, *flags) in RUNS.items():
        outputs = (("--output-dir", f"runs/demo/{place}/{name.split()[0]}") for place in ("cpu", "there"))
        places = zip(outputs, (None, everything_there))
        finish(*(Started(folder, script, *flags, *output, prepare=place) for output, place in places))
    return folder


@pytest.mark.parametrize("name", sorted({name.split()[0] for name in RUNS}))
def test_training_logs_what_it_logs_on_the_cpu(folder, name):
    cpu, there = (timeless(metrics(folder, f"{place}/{name}")) for place in ("cpu", "there"))
    assert len(cpu) == len(there) == (3 if name == "safe_rlhf" else 2)
    for wanted, row in zip(cpu, there):
        assert row == pytest.approx(wanted, rel=1e-2, abs=1e-3)  # Adam moves by the sign of noise


def test_evaluation_writes_what_it_writes_on_the_cpu(folder):
    prompts = (folder / "runs/demo/data/prompts_balanced_test.jsonl").read_text().splitlines()[:8]
    (folder / "few.jsonl").write_text("\n".join(prompts))
    flags = ["--prompts", "few.jsonl", "--policies", "sft=runs/demo/sft/model", "--top-p", "0.9"]
    flags += [f"--{kind}-model=runs/demo/{kind}_model/model" for kind in ("reward", "cost")]
    places = {"cpu": None, "there": everything_there}
    finish(
        *(
            Started(folder, "evaluate.py", *flags, "--output-dir", p, prepare=place)
            for p, place in places.items()
        )
    )
    cpu, there = (read_jsonl(str(folder / place / "responses.jsonl")) for place in places)
    assert len(cpu) == len(there) == 64
    for wanted, row in zip(cpu, there):
        assert row == pytest.approx(wanted, abs=1e-4)
