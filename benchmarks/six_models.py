"""What the six models of a PPO step hold, with and without adapters, and what a checkpoint of them takes.

    .venv/bin/python benchmarks/six_models.py [--ranks 0 16]

Models of GPT-2 small's shape with random weights, built by repo_ppo.py's own `six_models`, and their
optimizers after a step. Bytes are counted by storage, so that what two models share counts once.
"""

import os
import tempfile
from pathlib import Path

import torch
from plan_rehearsal import six_models  # and the way to the modules at the top
from torch import nn
from transformers import GPT2Config

import repo_ppo
from plumbing import checkpoints, cli, optim

MIB = 1 << 20
CONFIG = GPT2Config()  # 124 million parameters


def held(tensors) -> float:
    """MiB of the storages behind tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) / MIB


def measure(rank: int, *flags: str) -> tuple[int, float, float, float]:
    """Trained parameters; MiB of weights, of optimizer states, and of a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        own = "--model m --reward-model r --cost-model c --dataset d --ptx-dataset p --output-dir".split()
        args = repo_ppo.parse_args([*own, folder, "--lora-rank", str(rank), *flags])
        models = [m for m in six_models(CONFIG, args) if isinstance(m, nn.Module)]  # views hold nothing
        trained = {}
        for name, model in zip(("policy", "reward_critic", "cost_critic"), (models[0], *models[-2:])):
            trained[name] = model, optim.adamw(model, 1e-5, 0.01)
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            trained[name][1].step()
            trained[name][1].zero_grad()
        states = (
            x
            for _, optimizer in trained.values()
            for state in optimizer.state.values()
            for x in state.values()
        )
        weights = (p for model in models for p in (*model.parameters(), *model.buffers()))
        learned = sum(
            p.numel() for model, _ in trained.values() for p in model.parameters() if p.requires_grad
        )
        checkpoints.save_checkpoint(args, 1, trained, {})
        files = Path(folder, "checkpoints").rglob("*")
        return learned, held(weights), held(states), sum(os.path.getsize(f) for f in files) / MIB


if __name__ == "__main__":
    parser = cli.parser(__doc__)
    parser.add_argument("--ranks", type=cli.whole, nargs="+", default=[0, 16], help="of the adapters")
    ways = {"fp32": "", "bf16": "--dtype bf16", "bf16, int8": "--dtype bf16 --quantize int8"}
    print("rank  weights     trained parameters  weights, MiB  optimizers, MiB  checkpoint, MiB")
    for rank in parser.parse_args().ranks:
        for way, flags in list(ways.items())[: 3 if rank else 2]:  # without adapters nothing is in 8 bits
            learned, *sizes = measure(rank, *flags.split())
            numbers = f"{learned:19,}  {sizes[0]:12,.1f}  {sizes[1]:15,.1f}  {sizes[2]:15,.1f}"
            print(f"{rank:4}  {way:<10}{numbers}", flush=True)
