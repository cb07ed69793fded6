"""Resumable checkpoints and the final model: complete or absent.

torch is imported where it is used: runs.py imports this file, and plots.py and the experiments, which need no
torch, import runs.py.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

from plumbing.files import InputError, read_json, reading, reason, remove, write_json, writing
from plumbing.optim import check_finite, learning_rate

# ------------------------------------------------------------------------------ when to save


class Stopped(Exception):
    """A signal asked for it; the step is finished and a checkpoint is written."""


_stop = {"requested": False, "agreed": False}  # by this process; by all ranks


def stop_on_signals() -> None:
    """From now on these are requests that `checkpoint_due` answers: SIGTERM, SIGHUP (a terminal was closed),
    SIGUSR1 and SIGUSR2 (a scheduler's warnings), SIGXCPU (a limit of CPU time), and the first Ctrl-C. What is
    ignored, as SIGHUP under nohup, stays so."""
    terminals = [number for number in (1, 2) if os.isatty(number)]

    def request(signum, _):
        _stop["requested"] = True
        if signal.getsignal(signal.SIGINT) is request:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if signal.Signals(signum).name == "SIGHUP":  # to write where no terminal is any more would fail
            for number in terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)

    for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGINT"):
        if signal.getsignal(signal.Signals[name]) is not signal.SIG_IGN:
            signal.signal(signal.Signals[name], request)


def checkpoint_due(args, step: int) -> bool:
    """Whether to save after `step`: by --save-every, or because any rank was asked to stop. All ranks must
    answer alike, so a request that comes after they have agreed waits for the next step."""
    from plumbing.distributed import any_rank

    _stop["agreed"] = any_rank(_stop["requested"])
    return _stop["agreed"] or (args.save_every > 0 and (step + 1) % args.save_every == 0)


# ------------------------------------------------------------------------------ saving and resuming


def _trained_state(trained: dict) -> dict:
    """The tensors of a checkpoint: weights, buffers, optimizer states. With adapters no frozen weights: those
    are read again from --model. (Without, what takes no gradient may move all the same: SATAC's targets.)"""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    from plumbing.adapters import adapted

    state = {}
    for name, (model, optimizer) in trained.items():
        weights, state[name + "_optimizer"] = get_state_dict(model, optimizer)
        if adapted(model):
            named = model.named_parameters(remove_duplicate=False)  # tied ones by both of their names
            frozen = {n.replace("_checkpoint_wrapped_module.", "") for n, p in named if not p.requires_grad}
            weights = {n: tensor for n, tensor in weights.items() if n not in frozen}
        state[name] = weights
    return state


def save_checkpoint(args, step: int, trained: dict, extra: dict) -> None:
    """Write <output-dir>/checkpoints/step-N: `trained` maps a name to (model, optimizer), `extra` is
    plain JSON. It is renamed when it is complete, so that a kill at any moment leaves
    the last complete one. Raises Stopped if the ranks have agreed to stop."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    from plumbing.distributed import barrier, rank

    checkpoints = os.path.join(args.output_dir, "checkpoints")
    final, temporary = os.path.join(checkpoints, f"step-{step}"), os.path.join(checkpoints, "unfinished")
    try:
        if rank() == 0:
            remove(temporary)
            os.makedirs(temporary)
        barrier()
        if not os.path.isdir(checkpoints) or "unfinished" not in os.listdir(checkpoints):
            raise InputError(f"rank {rank()} does not see what rank 0 writes. {SHARED}")
        dcp.save(_trained_state(trained), checkpoint_id=temporary, no_dist=not dist.is_initialized())
        if rank() == 0:
            write_json(os.path.join(temporary, "extra.json"), {"step": step, "steps": args.steps} | extra)
            remove(final)
            os.rename(temporary, final)
            for old in complete_checkpoints(args.output_dir)[: -args.keep]:
                remove(os.path.join(checkpoints, f"step-{old}"))
    except (OSError, RuntimeError, InputError, dcp.CheckpointException) as error:
        remove(temporary)
        raise InputError(
            f"cannot write a checkpoint to {checkpoints} ({reason(error, -1)}); the last one is untouched"
        ) from None
    if _stop["agreed"]:
        raise Stopped(step)


SHARED = "Several machines need a shared --output-dir"


def complete_checkpoints(output_dir: str) -> list[int]:
    """Steps with a complete checkpoint, oldest first."""
    path = os.path.join(output_dir, "checkpoints")
    with reading(path):
        names = os.listdir(path) if os.path.isdir(path) else []
    return sorted(int(n[5:]) for n in names if n.startswith("step-") and n[5:].isdecimal())


# what DCP's index of a checkpoint is made of, besides torch's dtypes
INDEX_PARTS = {
    "torch.distributed.checkpoint.metadata": "Metadata MetadataIndex StorageMeta TensorStorageMetadata "
    "BytesStorageMetadata ChunkStorageMetadata TensorProperties _MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.serialization": "_get_layout",
    "torch": "Size",
    "pathlib": "PosixPath WindowsPath",
    "pathlib._local": "PosixPath WindowsPath",
}


def check_index(path: str) -> None:
    """Raise InputError if DCP's index, which is a pickle, names anything that an index does not need: torch
    would unpickle it as it is, and run what a crafted one asks for."""
    import pickle

    import torch

    class Index(pickle.Unpickler):
        def find_class(self, module, name):
            is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
            if is_dtype or name in INDEX_PARTS.get(module, "").split():
                return super().find_class(module, name)
            raise InputError(f"{path}: names {module}.{name}, and loading it could run code")

    with reading(path), open(path, "rb") as file:
        Index(file).load()


def load_checkpoint(args, trained: dict, extra: dict) -> dict:
    """With --resume: fill `trained` from the newest checkpoint and return its `extra`, which must have the
    fields of the given one, `step` and `steps`. Where nothing is to be resumed, the given one, at step 0."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    from plumbing.distributed import gather_objects, rank

    extra = {"step": 0, "steps": args.steps} | extra
    done = gather_objects([max(complete_checkpoints(args.output_dir), default=0)])[0]  # rank 0 decides
    if not ((args.resume or args.resume_anyway) and done):
        if args.resume and rank() == 0:
            print(f"nothing to resume in {args.output_dir}: starting at step 0", file=sys.stderr)
        return extra
    path = os.path.join(args.output_dir, "checkpoints", f"step-{done}")
    if not os.path.isdir(path):
        raise InputError(f"{path}: rank {rank()} does not see it. {SHARED}")
    if done > args.steps:
        raise InputError(f"{args.output_dir} has done {done} steps, and --steps {args.steps} asks for fewer")
    state, saved = _trained_state(trained), read_json(os.path.join(path, "extra.json"))
    if not isinstance(saved, dict) or any(type(saved.get(k)) is not type(v) for k, v in extra.items()):
        raise InputError(
            f"{path}/extra.json: holds not {', '.join(extra)}; was it written by another script?"
        )
    # NaN and infinity would be trained on without a word; -inf is the logarithm of a multiplier of 0
    numbers = [x for value in saved.values() for x in (value if isinstance(value, list) else [value])]
    if saved["step"] != done or not all(isinstance(x, int | float) and x < math.inf for x in numbers):
        raise InputError(f"{path}/extra.json: is damaged ({json.dumps(saved)[:200]})")
    check_index(os.path.join(path, ".metadata"))
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # DCP reads what is no tensor by torch.load
    try:
        dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
        for name, (model, optimizer) in trained.items():
            model_state, optimizer_state = state[name], state[name + "_optimizer"]
            todays = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
            set_state_dict(
                model,
                optimizer,
                model_state_dict=model_state,
                optim_state_dict=optimizer_state,
                options=StateDictOptions(strict=False),  # frozen weights are not in it
            )
            for group, options in zip(optimizer.param_groups, todays):  # by the flags, not by the checkpoint
                group.update(options)
    except (Exception, dcp.CheckpointException) as error:
        raise InputError(
            f"{path} cannot be resumed ({reason(error, -1)}); was it written with another model?"
        ) from None
    if rank() == 0:
        print(f"resumed from step {done} of {args.output_dir}", file=sys.stderr)
        if saved["steps"] != args.steps and hasattr(args, "warmup_ratio"):
            was = learning_rate(args.lr, done - 1, saved["steps"], args.warmup_ratio, cosine=True)
            now = learning_rate(args.lr, done, args.steps, args.warmup_ratio, cosine=True)
            other = f"--steps {saved['steps']} -> {args.steps} is another schedule"
            print(f"{other}: the learning rate goes from {was:.2g} to {now:.2g}", file=sys.stderr)
    return saved


def save_final(args, save, model: nn.Module, tokenizer) -> None:
    """<output-dir>/model: weights by `save(model, state_dict, folder)` and tokenizer; complete or absent."""
    from plumbing.data import save_tokenizer
    from plumbing.distributed import barrier, full_state_dict, rank

    state = full_state_dict(model)
    check_finite(args.steps, **state)
    if rank() == 0:
        with writing(os.path.join(args.output_dir, "model")) as temporary:
            save(model, state, temporary)
            save_tokenizer(tokenizer, temporary, getattr(args, "chat_template", False))
    barrier()
