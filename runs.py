"""A run: flags, the start and the end of a script, its directory, checkpoints, schedule and optimizer.

    parser, count, positive, ...   flags that know their range: argparse names the flag, exit code 2
    run                            start and end of a script; bad input is one line and exit code 2
    RunLog                         args.json, metrics.jsonl, samples.jsonl, the progress bar
    save_*, load_checkpoint        resumable checkpoints and the final model: complete or absent

torch is imported where it is used: plots.py and the experiments start through here and need none of it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
import traceback
from importlib.util import find_spec
from typing import TYPE_CHECKING

from tqdm import tqdm

from files import (
    InputError,
    read_json,
    read_jsonl,
    reading,
    reason,
    remove,
    schema_error,
    write_json,
    write_jsonl,
    writing,
)

if TYPE_CHECKING:
    import torch
    from torch import nn


class RunError(InputError):
    """The run cannot start or go on: the message says what, where and what to do."""


# ------------------------------------------------------------------------------ flags


def number(kind: type, wanted: str, fits):
    """A `type=` for argparse: a finite number of `kind` for which `fits` holds; --help shows `wanted`."""

    def parse(text: str):
        try:
            value = kind(text)
            good = math.isfinite(value) and fits(value)
        except (ValueError, OverflowError):
            good = False
        if not good:
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text}")
        return value

    parse.wanted = wanted
    return parse


count = number(int, "a whole number from 1", lambda x: 1 <= x < 2**31)
whole = number(int, "a whole number from 0", lambda x: 0 <= x < 2**31)
finite = number(float, "a number", lambda x: True)
positive = number(float, "a number above 0", lambda x: x > 0)
nonnegative = number(float, "a number from 0", lambda x: x >= 0)
fraction = number(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)
epochs = number(float, "a number from 0, below 1000", lambda x: 0 <= x < 1000)
share = number(float, "a number above 0, at most 1", lambda x: 0 < x <= 1)


def path_name(text: str) -> str:
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError("must name a folder, got an empty name")
    return text  # itself, not a copy: a Demo stays one


def named(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not name.strip() or not path.strip():
        raise argparse.ArgumentTypeError(f"must be NAME=FOLDER, got {text!r}")
    return name, path


def by_name(flag: str, pairs: list[tuple[str, str]]) -> dict[str, str]:
    """What a flag of several `named` folders says, as a dict. Raises RunError for a name that comes twice."""
    if len(dict(pairs)) < len(pairs):
        raise RunError(f"{flag} needs distinct names, got {' '.join(name for name, _ in pairs)}")
    return dict(pairs)


class Help(argparse.RawDescriptionHelpFormatter):
    """Adds each flag's range and default to its help."""

    def _get_help_string(self, action):
        notes = [wanted] if (wanted := getattr(action.type, "wanted", "")) else []
        none = any(action.default is x for x in (None, False, argparse.SUPPRESS))  # 0 is a default
        if action.option_strings and not none:
            default = action.default
            if isinstance(default, list):
                default = " ".join("=".join(x) if isinstance(x, tuple) else str(x) for x in default)
            notes.append(f"default {default}")
        return (action.help or "") + (f" [{', '.join(notes)}]".replace("%", "%%") if notes else "")


class Demo(str):
    """A default that is the demo's. What the user gives is a plain str, so the two can be told apart."""


class Parser(argparse.ArgumentParser):
    def parse_args(self, argv=None, namespace=None):
        args = super().parse_args(argv, namespace)
        for name, value in vars(args).items():
            empty = value == "" and name not in ("ptx_dataset", "eval_dataset")
            # [] is what argparse makes of --name=--
            if empty or (name not in ("flags", "runs") and value in ([], [""])):
                self.error(f"argument --{name.replace('_', '-')}: expected a value")
        return args


def parser(doc: str) -> Parser:
    return Parser(description=doc, formatter_class=Help, allow_abbrev=False)


def parse(parser, argv: list[str] | None, own: tuple[str, ...] = ("model", "dataset")):
    """The flags. Whoever gives one of `own` has models or data of their own, and nothing of the demo is
    taken: every other flag with a Demo default must then be given, or be '' where it may be empty."""
    args = parser.parse_args(argv)
    left = [name for name, value in vars(args).items() if of_demo(value)]
    given = [name for name in own if name not in left]
    if given and left:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in left)
        parser.error(f"--{given[0]} is given, so {flags} must be too: nothing of the demo is taken")
    return args


def of_demo(value) -> bool:
    pairs = [item for item in value if isinstance(item, tuple)] if isinstance(value, list) else []
    return isinstance(value, Demo) or any(of_demo(path) for _, path in pairs)


def add_run_flags(parser, output_dir: str, training: bool = True, models: bool = True) -> None:
    """The flags that say where and on what a script runs; the same in all of them. `models`: it runs models
    of `shard`, which may be large; small networks need none of the flags for that."""
    flag = parser.add_argument_group("run").add_argument
    flag(
        "--output-dir", type=path_name, default=Demo(output_dir), help="for everything that the script writes"
    )
    flag("--seed", type=whole, default=0, help="seed of initialization, data order and sampling")
    if models:
        flag(
            "--dtype",
            choices=("fp32", "bf16"),
            default="fp32",
            help="of the computation; trained weights: float32",
        )
        flag("--fsdp", action="store_true", help="shard every model over the ranks (FSDP2; needs torchrun)")
        flag("--cpu-offload", action="store_true", help="with --fsdp: shards and optimizers in host memory")
        flag("--cudnn-attention", action="store_true", help="allow cuDNN's attention (see distributed.py)")
    if models and training:
        flag("--activation-checkpointing", action="store_true", help="recompute them in the backward pass")
    if training:
        flag("--save-every", type=whole, default=0, help="a resumable checkpoint every N steps (0: never)")
        flag("--keep", type=count, default=2, help="how many checkpoints to keep")
        flag("--resume", action="store_true", help="go on from the newest checkpoint in --output-dir")
        flag("--resume-anyway", action="store_true", help="go on although the flags differ from the run's")
        flag("--overwrite", action="store_true", help="start afresh in a folder that holds a run; it is lost")
        flag("--tensorboard", action="store_true", help="log the metrics to <output-dir>/tensorboard as well")
    if models and training:
        flag = parser.add_argument_group("low-rank adapters").add_argument
        flag("--lora-rank", type=whole, default=0, help="train adapters of this rank r only (0: all weights)")
        flag("--lora-alpha", type=positive, default=16.0, help="the adapters' output is scaled by alpha / r")
        flag(
            "--lora-targets", nargs="+", metavar="NAME", help="layers, as q_proj v_proj (else all in blocks)"
        )
        flag("--adapter", type=path_name, help="a saved adapter of --model to go on from")
        flag("--quantize", choices=("int8",), help="hold the frozen weights below adapters in 8 bits")


def check_flags(args, ranks: int) -> None:
    """Raise RunError for flags that cannot go together; what a single flag may be, its type has said."""
    for name in ("cpu_offload", "offload_frozen"):
        if getattr(args, name, False) and not args.fsdp:
            raise RunError(f"--{name.replace('_', '-')} works on shards: add --fsdp")
    apart = any(getattr(args, name, None) for name in ("reward_critic", "cost_critic", "second_cost_model"))
    if getattr(args, "offload_frozen", False) and getattr(args, "lora_rank", 0) and not apart:
        raise RunError(
            "--offload-frozen finds nothing to move: with --lora-rank frozen and trained models are one"
        )
    for name in ("targets", "output"):
        if getattr(args, f"lora_{name}", None) and not args.lora_rank:
            raise RunError(f"--lora-{name} says where adapters go: give their rank by --lora-rank")
    adapter = getattr(args, "adapter", None)
    if adapter and not args.lora_rank:
        raise RunError("--adapter goes on with a saved adapter: give its rank by --lora-rank")
    if adapter and os.path.realpath(args.model) == os.path.realpath(f"{adapter}/../model"):
        problem = f"--model {args.model} has --adapter {adapter} merged into it"
        raise RunError(f"{problem}: give the model that the adapter was trained on")
    if getattr(args, "quantize", None) and (args.fsdp or not args.lora_rank):
        problem = "every rank holds all of them: without --fsdp" if args.fsdp else "it needs --lora-rank"
        raise RunError(f"--quantize {args.quantize} is for the frozen weights below adapters; {problem}")
    if getattr(args, "from_config", False) and args.lora_rank:
        raise RunError("--from-config draws weights that nobody has: train all of them, without --lora-rank")
    if getattr(args, "max_new_tokens", None) and args.max_length and args.max_new_tokens >= args.max_length:
        tokens, length = args.max_new_tokens, args.max_length
        raise RunError(f"--max-new-tokens {tokens} leaves no room for a prompt in --max-length {length}")
    if hasattr(args, "minibatch_size"):
        # a small rollout is one minibatch
        size = args.minibatch_size = min(args.minibatch_size, args.batch_size)
        if args.batch_size % size:
            raise RunError(f"--minibatch-size {size} does not divide --batch-size {args.batch_size}")
    for name in ("batch_size", "minibatch_size"):
        if (size := getattr(args, name, ranks)) % ranks:
            flag = f"--{name.replace('_', '-')}"
            raise RunError(f"{flag} {size} cannot be dealt evenly to {ranks} processes")


def check_template(args, model: str) -> None:
    """Raise RunError if a model was trained (args.json beside it) with --chat-template and this run is
    without, or the other way round: it would be fed texts of a form that it has never seen."""
    path = os.path.join(os.path.dirname(model.rstrip("/")), "args.json")
    before = read_json(path) if os.path.exists(path) else {}
    if (
        schema_error(before, {"chat_template": bool}) is None
        and before["chat_template"] != args.chat_template
    ):
        words = {True: "with", False: "without"}
        problem = f"was trained {words[before['chat_template']]} --chat-template"
        raise RunError(f"{model} {problem}, and this run is {words[args.chat_template]} it")


def require(path: str | None, command: str) -> None:
    """Raise RunError if another stage has yet to make `path`."""
    if path and path.startswith("runs/") and not os.path.exists(path):
        raise RunError(f"{path} is missing; `{command}` makes it")


# ------------------------------------------------------------------------------ start and end of a script


class Stopped(Exception):
    """SIGTERM or Ctrl-C came; the step is finished and a checkpoint is written."""


def run(main, args) -> None:
    """Call main(args), for a script with models in torchrun's process group. Bad input ends in one line on
    stderr and exit code 2.

    SIGTERM and the first Ctrl-C let a training step finish and save (`checkpoint_due`), exit code 143;
    a second Ctrl-C, or the first where nothing is trained, stops at once, exit code 130. A rank that fails
    says so and leaves at once; the others, cut off from it, leave in silence, or on GPUs torchrun ends them
    after 30 s. (It then exits with 1 itself, whatever its ranks exit with.)"""
    first_to_fail, grouped = (lambda: True), False
    try:
        if hasattr(args, "fsdp"):  # a script with models; the others need no torch
            import distributed

            grouped = distributed.start_processes(args.cudnn_attention)
            first_to_fail = distributed.first_to_fail
            if args.fsdp and not grouped:
                line = f"torchrun --nproc-per-node 1 {' '.join(sys.argv)}"
                raise RunError(f"--fsdp needs torchrun, also for one process: {line}")
            check_flags(args, distributed.world_size())
            if hasattr(args, "resume") and distributed.rank() == 0:
                claim_folder(args)
        main(args)
        if not grouped:
            return
        distributed.end_processes()
        message, code = "", 0
    except InputError as error:
        message, code = f"{os.path.basename(sys.argv[0])}: error: {error}", 2
    except Stopped as stopped:
        message = f"stopped after step {stopped}; the same command with --resume goes on from there"
        code = 143
    except KeyboardInterrupt:
        message, code = "interrupted", 130
        if hasattr(args, "resume"):
            message += "; --resume goes on from the last checkpoint, if there is one"
    except Exception:
        if not grouped:
            raise
        message, code = traceback.format_exc(), 1
    RunLog.close()  # else the bar would be drawn once more, below the message
    if code and first_to_fail():
        print(message, file=sys.stderr)
    if grouped:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # at once: an orderly end would wait for ranks that sit in a collective
    raise SystemExit(code)


def lock(folder: str) -> None:
    """Take an --output-dir for this process, until it ends. Raises RunError if another one works there."""
    import filelock

    pid_file = os.path.join(folder, ".pid")
    try:
        os.makedirs(folder, exist_ok=True)
        _locks[folder] = _locks.get(folder) or filelock.FileLock(os.path.join(folder, ".lock"))
        _locks[folder].acquire(timeout=0)
        with open(pid_file, "w") as file:
            file.write(str(os.getpid()))
    except filelock.Timeout:
        with reading(pid_file), open(pid_file) as file:
            pid = file.read()
        raise RunError(f"--output-dir {folder}: process {pid} writes there. End it first") from None
    except OSError as error:
        raise RunError(f"cannot write to --output-dir {folder} ({reason(error)})") from None


_locks: dict = {}  # held until the process ends


def claim_folder(args) -> None:
    """Lock --output-dir for this process, and refuse to mix its run with another one: a used folder needs
    --resume or --overwrite, and a resumed run the flags that it had. Raises RunError."""
    if args.tensorboard and not find_spec("tensorboard"):
        raise RunError("--tensorboard needs its package: pip install tensorboard")
    out = args.output_dir
    args_file = os.path.join(out, "args.json")
    lock(out)
    if args.overwrite and (args.resume or args.resume_anyway):
        raise RunError("--overwrite starts afresh and --resume goes on: give one of them")
    replaced = [os.path.realpath(os.path.join(out, name)) for name in ("model", "adapter")]
    for name, value in vars(args).items():
        if isinstance(value, str) and os.path.realpath(value) in replaced:
            flag = f"--{name.replace('_', '-')}"
            raise RunError(f"{flag} {value} is what this run replaces: give another --output-dir")
    if not os.path.exists(args_file) or args.overwrite:
        return
    if not (args.resume or args.resume_anyway):
        raise RunError(
            f"{out} holds a run: --resume it, lose it by --overwrite, or give another --output-dir"
        )
    before, now = read_json(args_file), json.loads(json.dumps(vars(args)))
    if schema_error(before, {"seed": int, "steps": int}):
        raise RunError(f"{args_file}: holds no flags")
    # what the run did not know yet was off; a number had its default, which nothing here knows
    off = {k: False if v is True else None if isinstance(v, str | list) else v for k, v in now.items()}
    was = off | before
    changed = [k for k in now if k not in MAY_CHANGE and now[k] != was[k]]
    if changed and not args.resume_anyway:
        problem = ", ".join(f"--{k.replace('_', '-')} {was[k]} -> {now[k]}" for k in changed)
        raise RunError(f"{out} was another run: {problem}. Give its flags, or go on by --resume-anyway")
    if not complete_checkpoints(out) and os.path.exists(os.path.join(out, "model")):
        problem = "a finished run without a checkpoint (--save-every), from which nothing can go on"
        raise RunError(f"{out} holds {problem}: lose it by --overwrite, or give another --output-dir")
    done = max(complete_checkpoints(out), default=0)
    if done > args.steps and not getattr(args, "epochs", 0):
        raise RunError(f"{out} has done {done} steps, and --steps {args.steps} asks for fewer")


# what a resumed run may do otherwise: where and on what it runs, how much it logs, how long it is
MAY_CHANGE = frozenset(
    "output_dir resume resume_anyway overwrite save_every keep sample_every steps epochs fsdp cpu_offload "
    "offload_frozen cudnn_attention activation_checkpointing micro_batch_size tensorboard".split()
)
_stop = {"requested": False, "agreed": False}  # by this process; by all ranks


def stop_on_signals() -> None:
    """From now on SIGTERM and the first Ctrl-C are requests that `checkpoint_due` answers."""

    def request(signum, _):
        _stop["requested"] = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGTERM, request)
    signal.signal(signal.SIGINT, request)


def checkpoint_due(args, step: int) -> bool:
    """Whether to save after `step`: by --save-every, or because any rank was asked to stop. All ranks must
    answer alike, so a request that comes after they have agreed waits for the next step."""
    from distributed import any_rank

    _stop["agreed"] = any_rank(_stop["requested"])
    return _stop["agreed"] or (args.save_every > 0 and (step + 1) % args.save_every == 0)


# ------------------------------------------------------------------------------ optimizer and schedule


def set_steps(args, rows: int) -> None:
    """With --epochs: the steps that so many passes over the rows take."""
    from distributed import rank

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
    """Raise RunError naming the first tensor or float with a NaN or an infinity. `place`: step, or words."""
    import torch

    for name, value in values.items():
        if not torch.as_tensor(value).isfinite().all():
            remedy = "Look at the inputs, use --dtype fp32"
            if isinstance(place, int):
                place, remedy = f"step {place}", f"{remedy}, or lower the learning rate"
            raise RunError(f"{place}: {name} is not finite. {remedy}")


# ------------------------------------------------------------------------------ checkpoints


def _trained_state(trained: dict) -> dict:
    """The tensors of a checkpoint: weights, buffers, optimizer states. With adapters no frozen weights: those
    are read again from --model. (Without, what takes no gradient may move all the same: SATAC's targets.)"""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    from adapters import adapted

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

    from distributed import barrier, rank

    checkpoints = os.path.join(args.output_dir, "checkpoints")
    final, temporary = os.path.join(checkpoints, f"step-{step}"), os.path.join(checkpoints, "unfinished")
    try:
        if rank() == 0:
            remove(temporary)
            os.makedirs(temporary)
        barrier()
        dcp.save(_trained_state(trained), checkpoint_id=temporary, no_dist=not dist.is_initialized())
        if rank() == 0:
            write_json(os.path.join(temporary, "extra.json"), {"step": step} | extra)
            remove(final)
            os.rename(temporary, final)
            for old in complete_checkpoints(args.output_dir)[: -args.keep]:
                os.rename(os.path.join(checkpoints, f"step-{old}"), temporary)  # a kill leaves no half one
                remove(temporary)
    except (OSError, RuntimeError, InputError, dcp.CheckpointException) as error:
        remove(temporary)
        raise RunError(
            f"cannot write a checkpoint to {checkpoints} ({reason(error, -1)}); the last one is untouched"
        ) from None
    if _stop["agreed"]:
        raise Stopped(step)


def complete_checkpoints(output_dir: str) -> list[int]:
    """Steps with a complete checkpoint, oldest first."""
    path = os.path.join(output_dir, "checkpoints")
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
    fields of the given one, and `step`. Where nothing is to be resumed, the given one, at step 0."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    from distributed import gather_objects, rank

    steps, extra = complete_checkpoints(args.output_dir), {"step": 0} | extra
    steps = gather_objects([steps])[0]  # rank 0 decides
    if not ((args.resume or args.resume_anyway) and steps):
        if args.resume and rank() == 0:
            print(f"nothing to resume in {args.output_dir}: starting at step 0", file=sys.stderr)
        return extra
    path = os.path.join(args.output_dir, "checkpoints", f"step-{steps[-1]}")
    if not os.path.isdir(path):
        raise RunError(f"{path}: rank {rank()} does not see it. Several machines need a shared --output-dir")
    state, saved = _trained_state(trained), read_json(os.path.join(path, "extra.json"))
    if not isinstance(saved, dict) or any(type(saved.get(k)) is not type(v) for k, v in extra.items()):
        raise RunError(f"{path}/extra.json: holds not {', '.join(extra)}; was it written by another script?")
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
        raise RunError(
            f"{path} cannot be resumed ({reason(error, -1)}); was it written with another model?"
        ) from None
    if rank() == 0:
        print(f"resumed from step {steps[-1]} of {args.output_dir}", file=sys.stderr)
    return saved


def save_final(args, save, model: nn.Module, tokenizer) -> None:
    """<output-dir>/model: weights by `save(model, state_dict, folder)` and tokenizer; complete or absent."""
    from distributed import barrier, full_state_dict, rank

    state = full_state_dict(model)
    check_finite(args.steps, **state)
    if rank() == 0:
        with writing(os.path.join(args.output_dir, "model")) as temporary:
            save(model, state, temporary)
            tokenizer.save_pretrained(temporary)
    barrier()


# ------------------------------------------------------------------------------ the run's directory


class Lines:
    """What a progress bar writes to where stderr is no terminal: plain lines."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(*args, **options) -> tqdm:
    """tqdm's bar; in a log file or under a scheduler a line a minute."""
    if not sys.stderr.isatty():
        options |= {"file": Lines(), "mininterval": 60, "maxinterval": 60, "ncols": 100}
    return tqdm(*args, **{"dynamic_ncols": True, "smoothing": 0.05} | options)


class Laps:
    """Where a step's time goes: lap("rollout") notes the seconds since the last lap as seconds_rollout."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        from distributed import wait_for_device

        wait_for_device()
        now = time.perf_counter()
        self.seconds[f"seconds_{name}"], self.last = now - self.last, now


class RunLog:
    """args.json, metrics.jsonl and samples.jsonl of a run, written by rank 0, and its progress bar."""

    open_bar = None

    def __init__(self, args, name: str, shown: tuple[str, ...], first_step: int = 0):
        from distributed import rank

        self.args, self.folder, self.shown = args, args.output_dir, shown
        self.main, self.first_step, self.begun = rank() == 0, first_step, False
        self.bar = progress(total=args.steps, initial=first_step, desc=name, disable=not self.main)
        RunLog.open_bar = self.bar
        stop_on_signals()

    def _begin(self) -> None:
        """Just before the first line is written: a run that dies earlier has touched nothing.

        What a resumed run computes again, it logs again; a fresh run replaces all of an older one."""
        self.begun = True
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = os.path.join(self.folder, name)
            resumed = self.first_step and os.path.exists(path) and os.path.getsize(path)
            old = read_jsonl(path, {"step": int}) if resumed else []
            if kept := [row for row in old if row["step"] < self.first_step]:
                write_jsonl(path, kept)
            else:
                remove(path)
        if not self.first_step:
            for name in ("checkpoints", "model", "adapter", "tensorboard"):
                remove(os.path.join(self.folder, name))
        if self.args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # steps that are computed again replace those of before
            self.board = SummaryWriter(os.path.join(self.folder, "tensorboard"), purge_step=self.first_step)
        write_json(os.path.join(self.folder, "args.json"), vars(self.args))

    def metrics(self, step: int, values: dict) -> None:
        """This rank's means; logged is the mean over the ranks."""
        from distributed import mean_over_ranks, peak_memory

        values = mean_over_ranks(values) | peak_memory()
        if self.main:
            self._append("metrics.jsonl", [{"step": step} | values])
            self.bar.set_postfix({k: f"{values[k]:.3g}" for k in self.shown if k in values}, refresh=False)
            self.bar.update()
            if self.args.tensorboard:
                for name, value in values.items():
                    self.board.add_scalar(name, value, step)
                self.board.flush()

    def samples(self, step: int, rollout: dict) -> None:
        """Up to eight responses of a rollout."""
        if self.main:
            names = ("prompt", "response", "reward", "cost", "kl")
            scores = [rollout[name][:8].tolist() for name in names[2:]]
            rows = [dict(zip(names, row)) for row in zip(rollout["prompts"], rollout["responses"], *scores)]
            self._append("samples.jsonl", [{"step": step} | row for row in rows])
            row = rows[0]
            numbers = "  ".join(f"{k} {v:+.2f}" for k, v in row.items() if isinstance(v, float))
            text = f"[{self.bar.desc} step {step}] {row['prompt']}\n    {row['response']}\n    {numbers}"
            self.bar.write(text, file=sys.stderr)

    def _append(self, name: str, rows: list[dict]) -> None:
        if not self.begun:
            self._begin()
        try:
            with open(os.path.join(self.folder, name), "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        except OSError as error:
            raise RunError(f"cannot write {name} in {self.folder} ({reason(error)})") from None

    @staticmethod
    def close() -> None:
        if RunLog.open_bar is not None:
            RunLog.open_bar.close()
