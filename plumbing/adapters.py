"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): a frozen model and its trained twin in one.

    y = W x + b + (alpha / r) B A x        A (r, in), B (out, r): trained    W (out, in), b: frozen

B starts at zero: training begins at the frozen model, bit for bit. A PPO step needs models in pairs, policy
and reference, a critic and the score model that it started from. Each pair is one set of weights here:

    adapt             freeze a model and give it adapters; a score model's head is trained, too
    WithoutAdapters   the same weights as they were at the start, called like a model of its own
    merged            W + (alpha / r) B A in place of W: a model that knows nothing of adapters
    Adapter.folded    the same of one layer: what samples (`gathered` of distributed.py) has it as its weight
    saver             writes model/, merged, and adapter/ in the layout of Hugging Face's PEFT

A policy that goes on with a saved adapter (--adapter) keeps a copy of it: that one is its start.

The layers are those of the transformer blocks and, with --lora-output, a language model's output layer. Where
that one shares its weight with the embeddings, they share its low-rank term as well.

With --quantize int8 a block's W is held in one byte a number (Dettmers et al. 2022, arXiv 2208.07339, without
its outliers): W ~ diag(s) Q, Q whole numbers, s = max |W| / 127 of each row. Both twins then compute by it.

Left out: dropout before A, trained biases, adapters of other embeddings and of fused experts.
"""

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from plumbing.distributed import blocks
from plumbing.files import InputError, read_json, reading, schema_error, write_json, writing


class RowScaled(torch.autograd.Function):
    """x (..., in), Q (out, in), s (out,) -> x (diag(s) Q)^T. Autograd would keep Q in the dtype of x; here it
    keeps the bytes, and makes Q once more in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, q: Tensor, s: Tensor) -> Tensor:
        ctx.save_for_backward(q, s)
        y = F.linear(x, q.to(x.dtype))
        return y * s.to(y.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        q, s = ctx.saved_tensors
        return (grad * s.to(grad.dtype)) @ q.to(grad.dtype), None, None


class Int8(nn.Module):
    """A frozen linear layer with its weight in 8 bits: (..., in) -> (..., out)."""

    def __init__(self, layer: nn.Linear | Conv1D):
        super().__init__()
        self.bias, self.transposed = layer.bias, isinstance(layer, Conv1D)
        rows = (layer.weight.T if self.transposed else layer.weight).detach().float()
        s = (rows.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)  # a row may be all zeros
        # not persistent: a checkpoint holds what is trained, and these are made of --model again
        self.register_buffer("q", (rows / s[:, None]).round().to(torch.int8), persistent=False)
        self.register_buffer("s", s, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = RowScaled.apply(x, self.q, self.s)
        return y if self.bias is None else y + self.bias

    def whole(self) -> Tensor:
        """The weight that it computes by, float32 and shaped as the layer's was, on the host."""
        rows = (self.q * self.s[:, None]).cpu()
        return rows.T if self.transposed else rows


class Adapter(nn.Module):
    """A frozen linear layer and, while it is `on`, its low-rank term: (..., in) -> (..., out)."""

    def __init__(
        self, layer: nn.Linear | Conv1D, rank: int, alpha: float, generator: torch.Generator, name: str = ""
    ):
        super().__init__()
        self.base_layer, self.scale, self.on, self.name = layer, alpha / rank, True, name
        self.transposed = isinstance(layer, Conv1D)  # GPT-2's, which keeps its weight as (in, out)
        width, out = layer.weight.shape if self.transposed else reversed(layer.weight.shape)
        # float32, as all that is trained; A's distribution as in loralib, the paper's own implementation
        start = torch.empty(rank, width).uniform_(-(width**-0.5), width**-0.5, generator=generator)
        self.A = nn.Parameter(start.to(layer.weight.device))
        self.B = nn.Parameter(torch.zeros(out, rank, device=layer.weight.device))
        self.A0 = self.B0 = None  # of the saved adapter that training started from, if there was one

    def matrices(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        return (self.A, self.B) if self.on else (self.A0, self.B0)

    def forward(self, x: Tensor) -> Tensor:
        (A, B), y = self.matrices(), self.base_layer(x)
        return y if A is None else y + F.linear(self.scale * F.linear(x, A), B)

    def plus(self, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """W + (alpha / r) B A, shaped as W. In float32: a sum in bf16 would lose most of the small term."""
        A, B = (B.T, A.T) if self.transposed else (A, B)
        return (self.scale * B @ A).add_(weight)

    @property
    def folds(self) -> bool:
        """Whether there is room for a second W: not where the first is held in 8 bits for want of it."""
        return not isinstance(self.base_layer, Int8)

    def folded(self) -> Tensor:
        return self.plus(self.base_layer.weight, self.A, self.B)

    def __getattr__(self, name: str):
        if name in ("weight", "bias"):  # some state-space layers compute with them, and do not call the layer
            problem = f"the model reads the {name} of {self.name} itself, past the adapter"
            raise InputError(
                f"--lora-rank: {problem}. Name other layers by --lora-targets, or no --lora-output"
            )
        return super().__getattr__(name)


class TiedEmbedding(nn.Module):
    """Embeddings that have the weight of the output layer, and so its low-rank term: (B, L) -> (B, L, H)."""

    def __init__(self, layer: nn.Embedding, output: Adapter):
        super().__init__()
        self.base_layer, self.output = layer, (output,)  # in a tuple it is not a module of this one

    def forward(self, ids: Tensor) -> Tensor:
        (output,), y = self.output, self.base_layer(ids)
        A, B = output.matrices()
        if A is None:
            return y
        # the same look-up, in B: some families scale what they find
        rows = functional_call(self.base_layer, {"weight": B.to(y.dtype)}, (ids,))  # (B, L, r)
        return y + output.scale * rows @ A.to(y.dtype)


class Head(nn.Linear):
    """A trained score head and, for when it is not `on`, the frozen one that it started from."""

    def __init__(self, frozen: nn.Linear):
        super().__init__(frozen.in_features, 1, frozen.bias is not None, frozen.weight.device)
        self.load_state_dict(frozen.state_dict())
        self.base_layer, self.on = frozen, True

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.on else self.base_layer(x)


class WithoutAdapters:
    """A model as it was when its training started: the same weights, called like a model.

    Every call is one of the whole model, so that FSDP gathers what it needs. A reward or cost model keeps its
    type and its head in this view; the model itself is a critic from now on."""

    def __init__(self, model: nn.Module):
        self.model, self.score_type = model, getattr(model, "score_type", None)
        self.unknown_ids = getattr(model, "unknown_ids", None)  # of a policy, see lm.py
        self.switch(True)

    def switch(self, on: bool) -> None:
        for module in self.model.modules():
            if isinstance(module, Adapter | Head):
                module.on = on
        if self.score_type:
            self.model.score_type = "critic" if on else self.score_type

    def __call__(self, *args, **kwargs):
        self.switch(False)
        try:
            return self.model(*args, **kwargs)
        finally:  # a backward pass, in which activation checkpointing computes forward again, finds them on
            self.switch(True)


# ------------------------------------------------------------------------------ wrapping a model


def linear_layers(model: nn.Module, wanted: list[str] | None) -> dict[str, nn.Module]:
    """Name -> linear layer of the transformer blocks: those whose names end as one of `wanted`, or all.
    Raises InputError for a wanted one that is not there."""
    inside = set(blocks(model))
    inside = tuple(f"{name}." for name, module in model.named_modules() if module in inside)
    linear = {name: module for name, module in model.named_modules() if name.startswith(inside)}
    # no subclasses: a router that is one (Llama 4's) returns more than a product
    linear = {name: module for name, module in linear.items() if type(module) in (nn.Linear, Conv1D)}
    for target in wanted or []:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise InputError(
                f"--lora-targets {target}: no linear layer of the blocks has that name, but {known}"
            )
    ends = tuple(f".{target}" for target in wanted or [""])
    return {name: module for name, module in linear.items() if not wanted or f".{name}".endswith(ends)}


def output_layer(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> output layer of a language model; of a score model: {}. Raises InputError for one that is no
    linear layer, or for other ties than that of its weight with the embeddings'."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is not None and type(output) is not nn.Linear:
        raise InputError(f"--lora-output: the output layer is a {type(output).__name__}, not a linear one")
    found = {name: module for name, module in model.named_modules() if module is output}
    tied = set(model.all_tied_weights_keys) if found else set()
    other = tied - {f"{name}.weight" for name in found}
    if other or (tied and model.get_input_embeddings().weight is not output.weight):
        raise InputError(
            f"--lora-output: {min(other or tied)} is tied as well, and no adapter is known for it"
        )
    return found


def adapt(model: nn.Module, args, start: str | None = None) -> nn.Module:
    """Freeze a model and give it adapters by --lora-rank (0: leave it as it is), new ones or those in the
    folder `start`. Raises InputError for a rank above a layer's width, or an adapter that does not fit."""
    if not args.lora_rank:
        return model
    within = linear_layers(model.requires_grad_(False), args.lora_targets)
    # the scripts of score models do not have the flag
    layers = within | (output_layer(model) if getattr(args, "lora_output", False) else {})
    if len({id(layer.weight) for layer in layers.values()}) < len(layers):
        raise InputError(f"--lora-rank: {model.config.model_type}'s blocks share weights; adapters part them")
    generator = torch.Generator().manual_seed(torch.initial_seed())  # the same on every rank
    for name, layer in layers.items():
        if args.lora_rank > min(layer.weight.shape):
            width = min(layer.weight.shape)
            advice = "lower it, or name other layers by --lora-targets"
            raise InputError(f"--lora-rank {args.lora_rank} is above the width of {name}, {width}: {advice}")
        parent, _, own = name.rpartition(".")
        adapter = Adapter(layer, args.lora_rank, args.lora_alpha, generator, name)
        if getattr(args, "quantize", None) and name in within:
            adapter.base_layer = Int8(layer)
        setattr(model.get_submodule(parent), own, adapter)
        if name not in within and (embedding := model.get_input_embeddings()).weight is layer.weight:
            model.set_input_embeddings(TiedEmbedding(embedding, adapter))
    if hasattr(model, "score_head"):
        model.score_head = Head(model.score_head)
    if start:
        load_adapter(model, start, args)
    if hasattr(model, "read"):  # without memory yet: `load_shards` of distributed.py reads another one
        read = model.read
        model.read = lambda: adapt(read(), args, start)
    return model


def adapted(model: nn.Module, kind: type = Adapter) -> dict[str, nn.Module]:
    """Name -> adapter of a model (or module of another kind), by the names of its state dict."""
    named = ((name.replace("_checkpoint_wrapped_module.", ""), m) for name, m in model.named_modules())
    return {name: module for name, module in named if isinstance(module, kind)}


def merged(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The full state dict of a model with adapters, which is used up, -> that of one without, in float32."""
    whole = {}
    for name in list(state):
        tensor = state.pop(name)
        whole[name] = tensor.float() if tensor.is_floating_point() else tensor
    for name, layer in adapted(model).items():
        A, B = whole.pop(f"{name}.A"), whole.pop(f"{name}.B")
        base = layer.base_layer
        weight = base.whole() if isinstance(base, Int8) else whole.pop(f"{name}.base_layer.weight")
        whole[f"{name}.weight"] = layer.plus(weight, A, B)
        if (bias := whole.pop(f"{name}.base_layer.bias", None)) is not None:
            whole[f"{name}.bias"] = bias
    for name, module in adapted(model, TiedEmbedding).items():
        whole[f"{name}.weight"] = whole[f"{module.output[0].name}.weight"]
    return {
        name: tensor
        for name, tensor in whole.items()
        if not name.endswith((".A0", ".B0")) and "base_layer" not in name
    }


# ------------------------------------------------------------------------------ the folder adapter/


def peft_names(model: nn.Module) -> dict[str, str]:
    """Name of a trained tensor here -> its name in PEFT's adapter_model.safetensors."""
    names = {f"{name}.{x}": f"{name}.lora_{x}.weight" for name in adapted(model) for x in "AB"}
    if hasattr(model, "score_head"):  # on disk the backbone is called as its family calls it
        prefix = f"{model.backbone.base_model_prefix}."
        names = {ours: theirs.replace("backbone.", prefix, 1) for ours, theirs in names.items()}
        names |= {
            f"score_head.{name}": f"score_head.{name}"
            for name, _ in model.score_head.named_parameters(recurse=False)
        }
    return {ours: f"base_model.model.{theirs}" for ours, theirs in names.items()}


def peft_tensors(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name -> tensor of adapter_model.safetensors. For PEFT tied embeddings have an adapter of their own:
    here the output layer's once more, as its lora_embedding_A = B^T and lora_embedding_B = A^T."""
    tensors = {theirs: state[ours] for ours, theirs in peft_names(model).items()}
    for name, module in adapted(model, TiedEmbedding).items():
        for theirs, ours in ("AB", "BA"):
            term = state[f"{module.output[0].name}.{ours}"].T
            tensors[f"base_model.model.{name}.lora_embedding_{theirs}"] = term
    return tensors


def save_adapter(args, model: nn.Module, state: dict[str, Tensor]) -> None:
    """Write <output-dir>/adapter: adapter_config.json and adapter_model.safetensors."""
    from safetensors.torch import save_file

    layers, scores = adapted(model), hasattr(model, "score_head")
    named = [*layers, *adapted(model, TiedEmbedding)]
    config = {
        "peft_type": "LORA",
        "task_type": None if scores else "CAUSAL_LM",
        "base_model_name_or_path": args.model,
        "r": args.lora_rank,
        "lora_alpha": args.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(layer.transposed for layer in layers.values()),
        "target_modules": sorted(named if args.lora_targets else {n.rpartition(".")[2] for n in named}),
        "modules_to_save": ["score_head"] if scores else None,
        "inference_mode": True,
    }
    tensors = {name: tensor.contiguous() for name, tensor in peft_tensors(model, state).items()}
    with writing(os.path.join(args.output_dir, "adapter")) as folder:
        os.makedirs(folder)
        save_file(tensors, os.path.join(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
        write_json(os.path.join(folder, "adapter_config.json"), config)


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str, args) -> None:
    """Start a model's adapters, and its head, from a folder in PEFT's layout. Raises InputError for another
    kind of adapter, another rank or alpha, or tensors that do not fit the model. A model without memory yet
    only gets the place for what it starts from."""
    from safetensors.torch import load_file

    path = os.path.join(folder, "adapter_config.json")
    config = read_json(path)
    if wrong := schema_error(config, {"peft_type": str, "r": int}):
        raise InputError(f"{path}: {wrong}")
    rank, alpha = config["r"], config.get("lora_alpha")
    other = {name: value for name, value in config.items() if value and name not in UNCHANGING}
    other = {name: value for name, value in other.items() if value not in PLAIN.get(name, ())}
    if other := other | ({"r": rank} if rank < 1 else {}):
        named = ", ".join(f"{name} {value}" for name, value in other.items())
        raise InputError(f"{path}: not a plain low-rank adapter: {named}")
    if (rank, alpha) != (args.lora_rank, args.lora_alpha):
        raise InputError(f"{path}: another rank or alpha: give --lora-rank {rank} --lora-alpha {alpha}")
    path = os.path.join(folder, "adapter_model.safetensors")
    with reading(path):
        tensors = load_file(path)
    own = dict(model.named_parameters())
    fitting = {name: tensor.shape for name, tensor in peft_tensors(model, own).items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if wrong := sorted(name for name, _ in fitting.items() ^ found.items()):
        problem = f"{wrong[0]} is missing, superfluous or of another shape"
        raise InputError(f"{path}: an adapter for another model, or of other layers ({problem})")
    if other := {tensor.dtype for tensor in tensors.values()} - {*WEIGHTS}:
        raise InputError(
            f"{path}: its weights are {other.pop()}, and {', '.join(map(str, WEIGHTS))} are read"
        )
    if bad := next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None):
        raise InputError(f"{path}: its weight {bad} holds NaN or infinity")
    if not hasattr(model, "read"):  # else it has no memory yet, and gets what rank 0 has read in this way
        for ours, theirs in peft_names(model).items():
            own[ours].copy_(tensors[theirs])
        for name, tensor in peft_tensors(model, own).items():
            if not tensor.cpu().equal(tensors[name].float()):
                problem = f"{name} is not the output layer's, whose weight the embeddings share"
                raise InputError(f"{path}: {problem}")
    for layer in adapted(model).values():
        layer.A0, layer.B0 = (nn.Parameter(x.clone(), requires_grad=False) for x in (layer.A, layer.B))


WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)  # quantized ones have a scale somewhere else
# Of adapter_config.json: fields that change nothing in W + (alpha / r) B A, or that the tensors' names and
# shapes answer for; and the values that others may have. One that is not here must be off: empty or false.
UNCHANGING = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "megatron_core"),
    *("peft_version", "qalora_group_size", "revision", "task_type"),
    *("exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save", "target_modules"),
    *("fan_in_fan_out", "lora_alpha", "r"),
}
PLAIN = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, "gaussian")}


def saver(args, save):
    """The `save` of checkpoints.save_final: `save` as it is or, with adapters, what writes both folders."""

    def save_both(model: nn.Module, state: dict[str, Tensor], folder: str) -> None:
        save_adapter(args, model, state)
        model.config.dtype = torch.float32
        save(model, merged(model, state), folder)

    return save_both if args.lora_rank else save
