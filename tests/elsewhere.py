"""A device that is not the CPU, without a GPU: every tensor on it is a wrapper around one on the CPU.

It computes what the CPU computes, and refuses what a GPU refuses: an operation on tensors of two devices, or
a random draw there from a generator here. It calls itself "lazy", a device type that torch knows, that needs
no driver, and whose gradients it computes in the calling thread. Not like a GPU: kernels and memory, and what
the scripts ask of torch.cuda itself.
"""

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("lazy", 0)
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # an index may be on the CPU


class There(Tensor):
    """A tensor on DEVICE; `here` holds its values."""

    @staticmethod
    def __new__(cls, here: Tensor):
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        return Tensor._make_wrapper_subclass(cls, here.shape, device=DEVICE, **layout)

    def __init__(self, here: Tensor):
        self.here = here

    def tolist(self) -> list:  # torch refuses it for subclasses
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def is_there(device) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def compute(func, args: tuple, kwargs: dict):
    """`func` on the wrapped tensors; its results are wrapped if they belong there."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    any_there = any(isinstance(x, There) for x in tensors)
    first_there = bool(tensors) and isinstance(tensors[0], There)
    name = func.overloadpacket.__name__
    mixed = any_there and any(x.dim() and not isinstance(x, There) for x in tensors)
    if name in INDEXING and first_there:
        mixed = len(args) > 2 and not isinstance(args[2], There) and args[2].dim()  # the values put there
    if mixed and name != "copy_":
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")
    wrapped = first_there if name == "copy_" else any_there
    if kwargs.get("device") is not None:
        wrapped = is_there(kwargs["device"])
        kwargs = kwargs | {"device": torch.device("cpu")}
    generator = kwargs.get("generator")
    if wrapped and generator is not None and not is_there(generator.device):
        raise RuntimeError(f"{func}: expected a generator on {DEVICE}")
    inner_args, inner_kwargs = tree_map_only(There, lambda x: x.here, (args, kwargs))
    result = func(*inner_args, **inner_kwargs)
    if not wrapped:
        return result
    result = tree_map_only(Tensor, There, result)
    return return_and_correct_aliasing(func, args, kwargs, result)


class Factories(TorchDispatchMode):
    """torch.zeros(..., device=DEVICE) and x.to(DEVICE), which no tensor there takes part in."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class Python(TorchFunctionMode):
    """What torch does in C++ before it dispatches: tensors from lists, indices that are lists, autocast."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and is_there(kwargs.get("device")):
            return func(*args, **{k: v for k, v in kwargs.items() if k != "device"}).to(DEVICE)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(part) if isinstance(part, list) else part for part in index)
            args = (args[0], index, *args[2:])
        return func(*args, **kwargs)


def to(module: nn.Module, where) -> nn.Module:
    """Module.to for wrappers, which cannot become the data of a parameter: tied ones stay tied."""
    moved = {}
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None and old not in moved:
                moved[old] = nn.Parameter(old.data.to(where), old.requires_grad)
            part._parameters[name] = moved.get(old)
        for name, old in part._buffers.items():
            part._buffers[name] = None if old is None else old.to(where)
    return module


def everything_there() -> None:
    """From now on this process computes there."""
    from plumbing import distributed

    distributed.device = lambda: DEVICE
    nn.Module.to = to
    init_adamw, autocast = torch.optim.AdamW.__init__, torch.autocast.__init__

    def adamw(self, groups, fused, **rest):
        assert all(isinstance(p, There) for group in groups for p in group["params"])
        init_adamw(self, groups, **rest)

    # neither knows this device: the fused AdamW, and autocast, which float32 runs only switch off
    torch.optim.AdamW.__init__ = adamw
    torch.autocast.__init__ = lambda self, where, *args, **rest: autocast(self, "cpu", *args, **rest)
    Factories().__enter__()
    Python().__enter__()
