"""Optimizer, schedule, and the check that numbers are numbers."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

from plumbing.files import InputError


def set_steps(args, rows: int) -> None:
    """With --epochs: the steps that so many passes over the rows take."""
    from plumbing.distributed import rank

    if args.epochs:
        args.steps = math.ceil(args.epochs * rows / args.batch_size)
        if rank() == 0:
            print(f"{args.epochs:g} epochs of {rows:,} rows are {args.steps:,} steps", file=sys.stderr)


def learning_rate(base: float, step: int, steps: int, warmup_ratio: float, cosine: bool) -> float:
    """Linear warm-up, then constant or a cosine to zero. A pure function of the step: nothing to save."""
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return base * (step + 1) / warmup
    return base * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) if cosine else base


def set_learning_rate(optimizers: dict, **rates: float) -> None:
    """Optimizer's name -> its learning rate from now on."""
    for name, rate in rates.items():
        for group in optimizers[name].param_groups:
            group["lr"] = rate


def adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only: a bias or a norm's gain has no reason to be small."""
    from torch.optim import AdamW

    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def check_finite(place: int | str, **values) -> None:
    """Raise InputError naming the first value with a NaN or an infinity. `place`: step, or words."""
    import torch

    for name, value in values.items():
        if not torch.as_tensor(value).isfinite().all():
            remedy = "Look at the inputs, use --dtype fp32"
            if isinstance(place, int):
                place, remedy = f"step {place}", f"{remedy}, or lower the learning rate"
            raise InputError(f"{place}: {name} is not finite. {remedy}")
