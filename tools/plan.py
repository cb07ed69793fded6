"""Memory before anything is loaded: what a run's flags will need on every GPU and on the host, by phases.

    python -m tools.plan --gpus 8 repo_ppo.py --fsdp --dtype bf16 ...     # starts nothing, needs no GPU
    python -m tools.plan --gpus 1 --memory 141 sft.py ...                 # any training script with its flags

Only config.json is read. Parameters are counted on the meta device, and what a transformer block keeps for
its backward pass by running two blocks on fake tensors, so any architecture of transformers will
do. N parameters, W ranks, b bytes of the compute dtype (2 in bf16, 4 in fp32):

    a trained model     4 N / W weights + 8 N / W Adam + 4 N / W gradients while its turn lasts
    a frozen model      b N / W
    with --lora-rank    both are one: b N / W weights, and the first line with the adapters' parameters for N
    with --quantize     N bytes of the layers below adapters, and 4 for each of their rows
    sampling            b N of the gathered policy + 2 b layers B L kv_heads head_dim of the key-value cache;
                        without --fsdp b N of the layers that adapters are folded into, not those in 8 bits
    forward, backward   the root unit and two blocks gathered, in the backward pass a block's gradients too
    activations         all blocks', or with --activation-checkpointing every block's input and one block's

Without --fsdp W is 1, nothing is gathered, and --dtype bf16 keeps a bf16 copy of the weights during a pass.
Left out: the CUDA context, the libraries' workspaces and the allocator's fragmentation (a few GiB together),
and the host memory of the data.
"""

import argparse
import copy
import functools
import importlib

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from lm import PIECE, position_ids, reading_part
from plumbing import cli, ppo, runs
from plumbing.adapters import Int8, adapt, adapted
from plumbing.cli import count, positive
from plumbing.distributed import blocks
from plumbing.files import InputError, reading
from plumbing.loading import first_layers, load_config

GIB = 1 << 30
ADAPTERS = ("lora_rank", "lora_alpha", "lora_targets", "quantize", "lora_output")
COLUMNS = ("weights", "optimizer", "gradients", "gathered", "kv cache", "activations", "logits")


def count_of(modules: list[nn.Module], trained: bool = False) -> int:
    """Parameters of the modules, all or the trained ones."""
    return sum(p.numel() for m in modules for p in m.parameters() if p.requires_grad or not trained)


class Shape:
    """What matters of a model: the parameters of a block and of the rest, how many of them a training trains,
    and how wide its tensors are. `lora`: the values of ADAPTERS, rank 0 for none; `depth`: of --layers."""

    def __init__(
        self, path: str, with_lm_head: bool, dtype: torch.dtype, lora: tuple = (0,), depth: int | None = None
    ):
        self.config = load_config(path)
        if depth:
            first_layers(path, self.config, depth)
        self.with_lm_head, self.dtype = with_lm_head, dtype
        self.lora = argparse.Namespace(**dict(zip(ADAPTERS, lora)))
        with reading(path), torch.device("meta"):  # a damaged config.json may ask for anything
            kind = AutoModelForCausalLM if with_lm_head else AutoModel
            model = kind.from_config(self.config, dtype=dtype)
        model = adapt(model, self.lora)
        layers, part = blocks(model), reading_part(self.config)
        self.layers, self.hidden, self.words = len(layers), part.hidden_size, part.vocab_size
        self.total, self.trained = count_of([model]), count_of([model], trained=True)
        quantized = [module for module in model.modules() if isinstance(module, Int8)]
        self.quantized = sum(layer.q.nbytes + layer.s.nbytes for layer in quantized)
        self.merged = self.total + sum(layer.q.numel() for layer in quantized)
        folded = [layer for layer in adapted(model).values() if layer.folds]
        sizes = [layer.base_layer.weight.numel() for layer in folded]
        self.folded, self.largest_folded = sum(sizes), max(sizes, default=0)
        self.beside = self.trained - sum(layer.A.numel() + layer.B.numel() for layer in folded)
        self.block = count_of(layers) // self.layers  # their mean
        self.trained_block = count_of(layers, trained=True) // self.layers
        self.root = self.total - self.layers * self.block
        self.trained_root = self.trained - self.layers * self.trained_block
        self.experts = any(name.endswith("experts") for name, _ in model.named_modules())
        heads = part.num_attention_heads
        self.kv_width = getattr(part, "num_key_value_heads", None) or heads
        self.kv_width *= getattr(part, "head_dim", None) or self.hidden // heads


@functools.lru_cache
def saved(shape: Shape, rows: int, length: int) -> tuple[int, int]:
    """Bytes that autograd keeps of (rows, length) tokens: per block, and outside of them without logits.

    Raises InputError for a model whose shapes depend on what it reads."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    try:
        with FakeTensorMode():
            return saved_on_fakes(shape, rows, length)
    except DataDependentOutputException:
        raise InputError(f"no plan for {shape.config.model_type}: it computes by what it sees") from None


def saved_on_fakes(shape: Shape, rows: int, length: int) -> tuple[int, int]:
    # fake tensors know the experts' grouped product in bf16 only: in float32 it is twice as much, at most
    twice = 2 if shape.experts and shape.dtype == torch.float32 else 1
    dtype, short = torch.bfloat16 if shape.experts else shape.dtype, copy.deepcopy(shape.config)
    try:  # two blocks speak for all
        part = reading_part(short)
        part.num_hidden_layers = 2
        if getattr(part, "layer_types", None):
            part.layer_types = part.layer_types[:2]
        model = AutoModel.from_config(short, dtype=dtype)
    except (ValueError, AttributeError):  # where they depend on each other: all of them
        model = AutoModel.from_config(shape.config, dtype=dtype)
    for adapter in adapted(adapt(model, shape.lora)).values():  # they compute in its dtype, too
        adapter.A, adapter.B = nn.Parameter(adapter.A.to(dtype)), nn.Parameter(adapter.B.to(dtype))
    own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    layers = blocks(model)
    inside, outside, block = {}, {}, []  # storage -> bytes; the block that runs

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            (inside if block else outside)[storage._cdata] = storage.nbytes()
        return tensor

    for layer in layers:
        layer.register_forward_pre_hook(lambda module, _: block.append(module))
        layer.register_forward_hook(lambda *_: block.clear())
    ids = torch.zeros(rows, length, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**inputs, position_ids=position_ids(inputs["attention_mask"]))
    del output
    return twice * sum(inside.values()) // len(layers), twice * sum(outside.values())


# ------------------------------------------------------------------------------ one model's turn


def bytes_of(args) -> int:
    """Of a number in the dtype of the computation."""
    return 2 if args.dtype == "bf16" else 4


def passes(shape: Shape, args, world: int, rows: int, response: int, backward: bool) -> dict[str, float]:
    """Bytes beyond shards while `rows` sequences of --max-length go forward, or forward and backward, through
    a model: the largest of four moments. At the logits, inside a block, when a block's gradients are reduced,
    and when the root's are."""
    width, length = bytes_of(args), args.max_length
    block_saved, root_saved = saved(shape, rows, length)
    state = rows * length * shape.hidden * width
    if not backward:  # nothing is kept; a block's own tensors come and go, half of them at a time
        kept, inside = state, block_saved / 2
    elif args.activation_checkpointing:
        kept, inside = root_saved + shape.layers * state, block_saved
    else:
        kept, inside = root_saved + shape.layers * block_saved, 0
    one = rows * (response + 1) * shape.words if shape.with_lm_head and response else 0
    piece = min(one, PIECE) * 4
    logits = one * width + (3 if backward else 2) * piece  # float32 pieces come and go

    if args.fsdp:
        root = shape.root * width
        gathered = root + 2 * shape.block * width  # a block, and the next one on its way
        # a block's gradients; the root's head has its own from the beginning
        unreduced = shape.trained_block * width
        head = shape.words * shape.hidden * width if shape.with_lm_head and not shape.lora.lora_rank else 0
        copy = shape.trained_block * 4  # float32 for the reduction
        root_gradients = shape.trained_root * (width + 4 + 4 / world)
    else:  # autocast's copies live as long as the pass
        gathered = root = shape.trained * width if backward and width == 2 else 0
        unreduced = head = copy = root_gradients = 0
    at_logits = {"gathered": gathered, "activations": kept, "logits": logits}
    in_block = {"gathered": gathered, "activations": kept + inside}
    moments = [at_logits, in_block]
    if backward:
        at_logits["logits"] += one * width * (1 if one <= PIECE else 2)  # gradients, of pieces and their sum
        at_logits["gathered"] = root
        in_block["gradients"] = head + unreduced
        moments.append({"gathered": gathered, "activations": kept, "gradients": head + unreduced + copy})
        moments.append({"gathered": root, "gradients": root_gradients})
    return max(moments, key=lambda moment: sum(moment.values()))


def sampling(shape: Shape, args, rows: int) -> dict[str, float]:
    """Bytes beyond shards while `rows` prompts are answered: when the last adapter is folded in, at the pass
    over the prompts or at the last token, whichever is most."""
    width, prompt = bytes_of(args), args.max_length - args.max_new_tokens
    # without --fsdp autocast's copies of what is trained, or adapters folded into copies of their layers
    copies = width * (shape.total if args.fsdp else shape.folded + (shape.beside if width == 2 else 0))
    folding = {"gathered": copies + (4 * shape.largest_folded if width == 2 and not args.fsdp else 0)}
    token = 2 * width * rows * shape.kv_width  # in one layer
    first = {"gathered": copies, "kv cache": token * prompt * shape.layers}
    first["activations"] = saved(shape, rows, prompt)[0] / 2
    # while one is copied, without the rows that have ended
    last = {"gathered": copies, "kv cache": token * args.max_length * (shape.layers + 0.5)}
    # the logits in float32, probabilities, the float64 running sum
    last["logits"] = rows * shape.words * (width + 4 + 4 + 8)
    return max(folding, first, last, key=lambda moment: sum(moment.values()))


# ------------------------------------------------------------------------------ a run's phases


@functools.lru_cache
def shape_of(
    path: str, with_lm_head: bool, bf16: bool, lora: tuple = (0,), depth: int | None = None
) -> Shape:
    return Shape(path, with_lm_head, torch.bfloat16 if bf16 else torch.float32, lora, depth)


def models_of(args) -> tuple[dict[str, tuple[Shape, bool]], str]:
    """Role -> (shape, trained) of every model that the script holds at once, and the kind of script."""
    frozen = functools.partial(shape_of, bf16=args.dtype == "bf16")
    trained = functools.partial(frozen, lora=lora_of(args))
    if hasattr(args, "ppo_epochs"):
        models = {
            "policy": (trained(args.model, True), True),
            "reference": (frozen(args.model, True), False),
            "reward model": (frozen(args.reward_model, False), False),
            "cost model": (frozen(args.cost_model, False), False),
        }
        critics = ppo.critics(args)
        for kind, own in critics.items():
            models[f"{kind} critic"] = (trained(own or getattr(args, f"{kind}_model"), False), True)
        if args.second_cost_model:
            models["second cost model"] = (frozen(args.second_cost_model, False), False)
        if args.lora_rank:  # one set of weights with its critic or policy (plumbing/ppo.py)
            for name in ("reference", *(f"{kind} model" for kind, own in critics.items() if not own)):
                del models[name]
        return models, "ppo"
    pairs = hasattr(args, "eval_dataset")
    model = trained(args.model, not pairs, depth=getattr(args, "layers", None))
    return {"model": (model, True)}, "pairs" if pairs else "supervised"


def lora_of(args) -> tuple:
    """The values of ADAPTERS, hashable."""
    values = (getattr(args, name, None) for name in ADAPTERS)
    return tuple(tuple(value) if isinstance(value, list) else value for value in values)


def phases(args, world: int) -> tuple[list[tuple[str, dict[str, float]]], float]:
    """[(phase, component -> bytes on every GPU)], and bytes on a host with all `world` ranks."""
    models, kind = models_of(args)
    ranks = world if args.fsdp else 1
    resident, host = {"weights": 0.0, "optimizer": 0.0}, 0.0
    for shape, trained in models.values():
        learned = shape.trained if trained else 0
        weights = (4 * learned + bytes_of(args) * (shape.total - learned)) / ranks + shape.quantized
        optimizer = 8 * learned / ranks
        if args.cpu_offload or (not trained and getattr(args, "offload_frozen", False)):
            host += (weights + optimizer) * world
        else:
            resident["weights"] += weights
            resident["optimizer"] += optimizer
    # beside what is offloaded, at last: the final weights, in float32 on rank 0 (before: gradients, no more)
    host += 4 * models["policy" if "policy" in models else "model"][0].merged
    if getattr(args, "save_every", 0) and not args.cpu_offload:
        # a checkpoint passes through pinned host memory, which torch keeps (its issue 195982)
        host += 12 * sum(shape.trained for shape, trained in models.values() if trained)

    def phase(extra: dict[str, float]) -> dict[str, float]:
        return {name: resident.get(name, 0) + extra.get(name, 0) for name in COLUMNS}

    def update(shape: Shape, rows: int, *responses: int) -> dict[str, float]:
        """The larger of the passes that end in logits of so many tokens, and the gradients they add up to."""
        turns = [passes(shape, args, world, rows, response, backward=True) for response in responses]
        extra = max(turns, key=lambda turn: sum(turn.values()))
        gradients = 0 if args.cpu_offload else 4 * shape.trained / ranks
        return phase(extra | {"gradients": extra.get("gradients", 0) + gradients})

    mine = args.batch_size // world
    rows, everything = min(args.micro_batch_size, mine), args.max_length - 1
    if kind == "pairs":
        return [("update", update(models["model"][0], 2 * rows, 0))], host
    if kind == "supervised":
        return [("update", update(models["model"][0], rows, everything))], host
    small = min(rows, args.minibatch_size // world)
    forward = [passes(shape, args, world, rows, args.max_new_tokens, False) for shape, _ in models.values()]
    result = [
        ("rollout", phase(sampling(models["policy"][0], args, mine))),
        ("scoring", phase(max(forward, key=lambda turn: sum(turn.values())))),
    ]
    for name, (shape, trained) in models.items():
        if trained:
            ptx = [everything] if name == "policy" and args.ptx_dataset and args.ptx_coeff else []
            result.append((f"update {name}", update(shape, small, args.max_new_tokens, *ptx)))
    return result, host


def peak(args, world: int) -> float:
    return max(sum(components.values()) for _, components in phases(args, world)[0])


def advice(args, world: int, memory: float) -> list[str]:
    """Flags to add, cheapest in speed first, until the plan fits into `memory` bytes; [] if nothing helps.
    With --cpu-offload every micro-batch moves all weights: then smaller ones are the last resort."""
    cheap: list[tuple[str, dict]] = [
        ("--dtype bf16", {"dtype": "bf16"}),
        ("--fsdp", {"fsdp": True}),
        ("--activation-checkpointing", {"activation_checkpointing": True}),
    ]
    sizes = [args.micro_batch_size >> k for k in range(1, args.micro_batch_size.bit_length())]
    halves = [(f"--micro-batch-size {size}", {"micro_batch_size": size}) for size in sizes]
    frozen = [("--offload-frozen", {"offload_frozen": True, "fsdp": True})] * hasattr(args, "offload_frozen")
    all_of_it = [("--cpu-offload", {"cpu_offload": True, "fsdp": True})]
    eighths = [("--quantize int8", {"quantize": "int8"})] * (args.lora_rank > 0)
    unsharded = [step for step in (*cheap, *halves, *eighths) if step[0] != "--fsdp"]
    return (
        enough(args, world, memory, [*cheap, *halves, *frozen])
        or (not args.fsdp and enough(args, world, memory, unsharded))
        or enough(args, world, memory, [*cheap, *frozen, *all_of_it, *halves])
    )


def enough(args, world: int, memory: float, steps: list[tuple[str, dict]]) -> list[str]:
    """Those of these flags, taken in this order, that help, until the plan fits; [] if all are not enough."""
    tried, added = copy.copy(args), []
    for text, change in steps:
        if all(getattr(tried, name) == value for name, value in change.items()):
            continue
        before = peak(tried, world)
        candidate = argparse.Namespace(**(vars(tried) | change))
        if peak(candidate, world) < 0.995 * before:
            # a smaller micro-batch replaces a larger one
            added = [flag for flag in added if flag.split()[0] != text.split()[0]]
            added += ["--fsdp"] * (candidate.fsdp and not tried.fsdp and text != "--fsdp") + [text]
            tried = candidate
        if peak(tried, world) <= memory:
            return added
    return []


SCRIPTS = ("sft.py", "reward_model.py", "cost_model.py", "safe_rlhf_ppo.py", "repo_ppo.py", "repo_rloo.py")


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    flag = parser.add_argument
    flag("--gpus", type=count, default=1, help="how many GPUs")
    flag("--memory", type=positive, default=80.0, help="of one GPU, in GiB")
    flag("script", choices=SCRIPTS, help="the training script")
    flag("flags", nargs=argparse.REMAINDER, type=str, help="its flags")
    args = parser.parse_args(argv)
    args.planned = importlib.import_module(args.script.removesuffix(".py")).parse_args(args.flags)
    return args


def main(args):
    world, memory, planned = args.gpus, args.memory * GIB, args.planned
    cli.check_flags(planned, world)
    rows, host = phases(planned, world)
    name, largest = max(((n, sum(c.values())) for n, c in rows), key=lambda item: item[1])
    print(f"memory per GPU in GiB, {world} GPU{'s' * (world > 1)} of {args.memory:g} GiB")
    print("phase".ljust(22) + "".join(name.rjust(13) for name in (*COLUMNS, "total")))
    for phase, components in rows:
        cells = [components[c] / GIB for c in COLUMNS] + [sum(components.values()) / GIB]
        print(phase.ljust(22) + "".join(f"{c:13.2f}" if c >= 0.005 else "-".rjust(13) for c in cells))
    print(f"host memory, all ranks of one machine: {host / GIB:.1f} GiB")
    peak_line = f"{largest / GIB:.1f} GiB in {name}"
    if largest <= memory:
        print(f"fits: the peak is {peak_line}")
    elif added := advice(planned, world, memory):
        print(f"does not fit: {peak_line}. It would with {' '.join(added)}")
    else:
        sizes = planned.batch_size, getattr(planned, "minibatch_size", 0)
        larger = [n for n in (world * 2**k for k in range(1, 8)) if not any(size % n for size in sizes)]
        fitting = (n for n in larger if peak(planned, n) <= memory or advice(planned, n, memory))
        more = next((f"; {n} GPUs would" for n in fitting), "")
        print(f"does not fit: {peak_line}, and no flag helps enough{more}")


if __name__ == "__main__":
    runs.run(main, parse_args())
