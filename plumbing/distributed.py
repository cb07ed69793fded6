"""Processes and models over them.

    rank_rows, gather_rows     a batch is dealt row by row: rank r of N holds rows r, r + N, r + 2N, ...
    mean_over_ranks       every rank holds equally many samples, so the mean of means is the mean
    shard, gathered       FSDP2 around a model, and the whole model again while it generates
    clip_gradients        averaged over the ranks, then clipped

One process is the case N = 1 of the same code; without --fsdp nothing here needs torchrun.
"""

import gc
import math
import os
import warnings
from collections import OrderedDict
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor

from plumbing.files import InputError

# one process saves without a group
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


# ------------------------------------------------------------------------------ processes

_store = None
_threads = torch.get_num_threads()
WORTH_THREADS = 1 << 20  # parameters


def start_processes(cudnn_attention: bool = False) -> bool:
    """Join the process group of torchrun. Returns whether there is one."""
    global _store
    # On Hopper torch takes cuDNN's attention first. With a mask its backward pass can give NaN (pytorch issue
    # 196678, trl issue 7181), and it plans anew for every shape: in decoding, for every token.
    torch.backends.cuda.enable_cudnn_sdp(cudnn_attention)
    # Threads of a tiny model only wait for each other, on a busy machine most of the time: 21 and not 0.5 s
    # a step of the toy world's PPO. One, then, until `shard` meets a model that is worth more.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    if "RANK" not in os.environ:
        return False
    wanted = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in wanted if name not in os.environ]:
        raise InputError(f"RANK is set and {missing[0]} is not: start with torchrun, or unset RANK")
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    # gloo as well: with --cpu-offload gradient norms and checkpoints are reduced on the host
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    _store, own_rank, size = next(dist.rendezvous("env://"))
    dist.init_process_group(backend, store=_store, rank=own_rank, world_size=size)
    return True


def end_processes() -> None:
    dist.destroy_process_group()


def first_to_fail() -> bool:
    """Whether no rank has called this before: one of them tells what happened. A rank that cannot ask any
    more fails because another one has gone."""
    try:
        return _store is None or _store.add("failed", 1) == 1
    except RuntimeError:
        return False


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def wait_for_device() -> None:
    """A GPU works on after Python has gone ahead; a clock must wait for it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory() -> dict[str, float]:
    """On GPUs, the GiB that tensors have held at most, and that the allocator has reserved, of the rank that
    has most."""
    if not torch.cuda.is_available():
        return {}
    peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    peaks = torch.tensor(peaks, dtype=torch.float64, device=device()) / 2**30
    if world_size() > 1:
        dist.all_reduce(peaks, dist.ReduceOp.MAX)
    return dict(zip(("gpu_peak_gib", "gpu_reserved_gib"), peaks.tolist()))


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def any_rank(value: bool) -> bool:
    """Whether any rank says so; the same answer on all of them."""
    if world_size() == 1:
        return value
    flag = torch.tensor(float(value), device=device())
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


# ------------------------------------------------------------------------------ rows over ranks


def rank_rows(rows):
    """This rank's rows of a global batch. Round robin, so that rows [k M / N, (k + 1) M / N) of all
    ranks together are rows [k M, (k + 1) M): minibatches hold the same samples for every N."""
    return rows[rank() :: world_size()]


def gather_rows(rows: Tensor) -> Tensor:
    """(B / N, ...) of every rank -> (B, ...) in the global order."""
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)


def gather_objects(rows: list) -> list:
    """Equally many rows of any kind on every rank -> all of them in the global order, on every rank."""
    parts = [rows] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, rows)
    return [row for same_place in zip(*parts) for row in same_place]


def mean_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Means over the ranks, in float64."""
    if world_size() == 1:
        return values
    total = torch.tensor([float(v) for v in values.values()], dtype=torch.float64, device=device())
    dist.all_reduce(total)
    return dict(zip(values, (total / world_size()).tolist()))


# ------------------------------------------------------------------------------ models over ranks


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks: the ModuleList with most parameters, whatever the architecture calls it. (The
    longest one may be a block's experts.)"""
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList))
    return list(max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters())))


def load_options(args, trained: bool = True) -> dict:
    """How to load a model for `shard`: in the dtype that it will keep, and with --fsdp without memory yet.
    Under adapters it is frozen, and only they are trained."""
    bf16 = args.dtype == "bf16" and (not trained or args.lora_rank > 0)
    return {"dtype": torch.bfloat16 if bf16 else torch.float32, "on_meta": args.fsdp}


def shard(model: nn.Module, args, trained: bool = True) -> nn.Module:
    """Move a model to this rank's device and, with --fsdp, split it: one unit per block and the root."""
    bf16 = args.dtype == "bf16"
    if "OMP_NUM_THREADS" not in os.environ and sum(p.numel() for p in model.parameters()) >= WORTH_THREADS:
        torch.set_num_threads(_threads)
    if not trained:
        model.requires_grad_(False)
    if trained and args.activation_checkpointing:
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

        wrapped = set(blocks(model))
        apply_activation_checkpointing(model, check_fn=lambda module: module in wrapped)
    if args.fsdp:
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32
        )
        offloaded = args.cpu_offload or (not trained and getattr(args, "offload_frozen", False))
        offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offloaded else OffloadPolicy()
        if hasattr(model, "score_head"):  # float32 under bf16 too
            fully_shard(model.score_head, offload_policy=offload)
        for block in blocks(model):
            fully_shard(block, mp_policy=precision, offload_policy=offload)
        # the root too: by default its embeddings would stay whole after a pass, those of all six models
        fully_shard(model, mp_policy=precision, offload_policy=offload, reshard_after_forward=True)
        if hasattr(model, "read"):  # else it has its weights
            load_shards(model, torch.device("cpu") if offloaded else device())
        return model
    model.to(device())
    if bf16 and trained:
        model.forward = torch.autocast(device().type, torch.bfloat16)(model.forward)  # float32 master weights
        model.autocast_to = torch.bfloat16
    return model


@torch.no_grad()
def load_shards(model: nn.Module, where: torch.device) -> None:
    """Give a split model its memory, shards at `where`, and its weights: rank 0 reads them, the others get
    their rows tensor by tensor. Buffers, persistent or not, go whole to every rank's device."""
    gc.collect()  # an FSDP model holds itself in cycles: free those out of use before the next one comes
    model.to_empty(device=where)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=device()))
    whole = model.read() if rank() == 0 else nn.Module()
    model.generation_config = getattr(whole, "generation_config", None)  # is saved with a policy
    sources = dict((*whole.named_parameters(), *whole.named_buffers()))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        source = torch.empty(tensor.shape, dtype=tensor.dtype, device=device())
        if rank() == 0:
            source.copy_(sources[name.replace("_checkpoint_wrapped_module.", "")])
        if hasattr(tensor, "to_local"):
            rows = distribute_tensor(source, tensor.device_mesh, tensor.placements)
            local(tensor).copy_(local(rows))
        else:
            dist.broadcast(source, 0)
            tensor.copy_(source)
    del model.read


@contextmanager
def gathered(model: nn.Module):
    """The whole model on every rank, to sample with: a forward pass uses no collective, so that ranks may
    sample responses of different lengths without waiting for each other. What it yields computes by the same
    weights in the same dtype, and without the hooks and wrappers of training, which take Python more time at
    every token than a block takes a GPU. Adapters are folded into copies of their layers' weights, but not
    beside a gathered model: it takes as much room itself."""
    units = [m for m in model.modules() if hasattr(m, "unshard")]
    for unit in units:
        unit.unshard()
    try:
        yield unwrapped(model, getattr(model, "autocast_to", None), {}, fold=not units)
    finally:
        for unit in units:
            unit.reshard()


def unwrapped(module: nn.Module, dtype: torch.dtype | None, made: dict, fold: bool) -> nn.Module:
    """A module of the same tensors (cast to `dtype`, if one is given) without hooks and checkpoint wrappers,
    and with `fold` without adapters: their layers have weights of their own then.
    `made` holds what has been made: a module or tensor that stands in two places stays one."""

    def cast(p):
        return p if p is None or dtype is None else made.setdefault(p, p.to(dtype))

    inner = getattr(module, "_checkpoint_wrapped_module", module)
    if inner not in made and fold and getattr(inner, "folds", False):
        twin = made[inner] = unwrapped(inner.base_layer, dtype, made, fold)
        twin._parameters["weight"] = inner.folded().to(twin.weight.dtype)
    if inner not in made:
        sharded = hasattr(inner, "unshard")  # then its class has two bases, FSDPModule and what it was
        twin = made[inner] = object.__new__(type(inner).__bases__[-1] if sharded else type(inner))
        # a "forward" of its own is autocast's
        twin.__dict__ = {name: x for name, x in vars(inner).items() if name != "forward"}
        twin._forward_hooks, twin._forward_pre_hooks = OrderedDict(), OrderedDict()
        twin._parameters = {name: cast(p) for name, p in inner._parameters.items()}
        twin._modules = {
            name: child and unwrapped(child, dtype, made, fold) for name, child in inner._modules.items()
        }
    return made[inner]


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Average the gradients over the ranks (FSDP has done so already), clip their norm, return it."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    if world_size() > 1 and not any(hasattr(m, "unshard") for m in model.modules()):
        for p in parameters:
            dist.all_reduce(p.grad)
            p.grad /= world_size()
    total = nn.utils.get_total_norm([p.grad for p in parameters])
    norm = (total.full_tensor() if hasattr(total, "full_tensor") else total).item()
    if not math.isfinite(norm):
        grads = {name: local(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        bad = next(
            (name for name, grad in grads.items() if not grad.isfinite().all()), "the norm of them all"
        )
        remedy = "Lower the learning rate, or use --dtype fp32"
        raise InputError(f"the gradient is not finite; the first that is not is {bad}. {remedy}")
    nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
    return norm


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The whole state on rank 0's host memory (empty on the others), gathered tensor by tensor."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
