"""Flags that know their range, and what cannot go together: argparse names the flag, exit code 2."""

from __future__ import annotations

import argparse
import math
import os

from plumbing.files import InputError, read_json, schema_error

# ------------------------------------------------------------------------------ what a flag may be


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
    """What a flag of several `named` folders says, as a dict. Raises InputError for a repeated name."""
    if len(dict(pairs)) < len(pairs):
        raise InputError(f"{flag} needs distinct names, got {' '.join(name for name, _ in pairs)}")
    return dict(pairs)


# ------------------------------------------------------------------------------ the parser


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
        flag(
            "--cudnn-attention", action="store_true", help="allow cuDNN's attention (plumbing/distributed.py)"
        )
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


# ------------------------------------------------------------------------------ what goes together


def check_flags(args, ranks: int) -> None:
    """Raise InputError for flags that cannot go together; what a single flag may be, its type has said."""
    for name in ("cpu_offload", "offload_frozen"):
        if getattr(args, name, False) and not args.fsdp:
            raise InputError(f"--{name.replace('_', '-')} works on shards: add --fsdp")
    apart = any(getattr(args, name, None) for name in ("reward_critic", "cost_critic", "second_cost_model"))
    if getattr(args, "offload_frozen", False) and getattr(args, "lora_rank", 0) and not apart:
        raise InputError(
            "--offload-frozen finds nothing to move: with --lora-rank frozen and trained models are one"
        )
    for name in ("targets", "output"):
        if getattr(args, f"lora_{name}", None) and not args.lora_rank:
            raise InputError(f"--lora-{name} says where adapters go: give their rank by --lora-rank")
    adapter = getattr(args, "adapter", None)
    if adapter and not args.lora_rank:
        raise InputError("--adapter goes on with a saved adapter: give its rank by --lora-rank")
    if adapter and os.path.realpath(args.model) == os.path.realpath(f"{adapter}/../model"):
        problem = f"--model {args.model} has --adapter {adapter} merged into it"
        raise InputError(f"{problem}: give the model that the adapter was trained on")
    if getattr(args, "quantize", None) and (args.fsdp or not args.lora_rank):
        problem = "every rank holds all of them: without --fsdp" if args.fsdp else "it needs --lora-rank"
        raise InputError(f"--quantize {args.quantize} is for the frozen weights below adapters; {problem}")
    if getattr(args, "from_config", False) and args.lora_rank:
        raise InputError(
            "--from-config draws weights that nobody has: train all of them, without --lora-rank"
        )
    if getattr(args, "max_new_tokens", None) and args.max_length and args.max_new_tokens >= args.max_length:
        tokens, length = args.max_new_tokens, args.max_length
        raise InputError(f"--max-new-tokens {tokens} leaves no room for a prompt in --max-length {length}")
    if hasattr(args, "minibatch_size"):
        # a small rollout is one minibatch
        size = args.minibatch_size = min(args.minibatch_size, args.batch_size)
        if args.batch_size % size:
            raise InputError(f"--minibatch-size {size} does not divide --batch-size {args.batch_size}")
    for name in ("batch_size", "minibatch_size"):
        if (size := getattr(args, name, ranks)) % ranks:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} {size} cannot be dealt evenly to {ranks} processes")


def check_template(args, model: str) -> None:
    """Raise InputError if a model was trained (args.json beside it) with --chat-template and this run is
    without, or the other way round: it would be fed texts of a form that it has never seen."""
    path = os.path.join(os.path.dirname(model.rstrip("/")), "args.json")
    before = read_json(path) if os.path.exists(path) else {}
    if (
        schema_error(before, {"chat_template": bool}) is None
        and before["chat_template"] != args.chat_template
    ):
        words = {True: "with", False: "without"}
        problem = f"was trained {words[before['chat_template']]} --chat-template"
        raise InputError(f"{model} {problem}, and this run is {words[args.chat_template]} it")


def require(path: str | None, command: str) -> None:
    """Raise InputError if another stage has yet to make `path`."""
    if path and path.startswith("runs/") and not os.path.exists(path):
        raise InputError(f"{path} is missing; `{command}` makes it")
