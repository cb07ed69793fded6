"""Flags that know their range, and what cannot go together: argparse names the flag, exit code 2."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import re
import sys

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
several = number(int, "a whole number from 2", lambda x: 2 <= x < 2**31)
finite = number(float, "a number", lambda x: True)
positive = number(float, "a number above 0", lambda x: x > 0)
nonnegative = number(float, "a number from 0", lambda x: x >= 0)
fraction = number(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)
epochs = number(float, "a number from 0, below 1000", lambda x: 0 <= x < 1000)
share = number(float, "a number above 0, at most 1", lambda x: 0 < x <= 1)


def path_name(text: str) -> str:
    """What a flag takes that names no type: a word that is not empty."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"must be a name, got {text!r}")
    return text


def path_or_none(text: str) -> str:
    """'' says that there is none."""
    return text and path_name(text)


def named(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not name.strip() or not path.strip():
        raise argparse.ArgumentTypeError(f"must be NAME=FOLDER, got {text!r}")
    # an ASCII locale hands over other letters as bytes in disguise, which no file in UTF-8 can hold
    return os.fsencode(name).decode("utf-8", "replace"), path


def module_function(text: str) -> str:
    if not re.fullmatch(r"[\w.]+:\w+", text):
        raise argparse.ArgumentTypeError(f"must be MODULE:FUNCTION, got {text!r}")
    return text


def function(name: str):
    """What a `module_function` names, in this folder or in an installed package. Raises InputError."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{name}: no such function ({error})") from None


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


class Parser(argparse.ArgumentParser):
    """No flag takes an empty value, unless its type does; subcommands are parsers of this kind, too."""

    def __init__(self, formatter_class=Help, **options):
        super().__init__(formatter_class=formatter_class, allow_abbrev=False, **options)
        self.register("type", None, path_name)

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        for word in words:
            if word.endswith("=--"):  # Python 3.11 makes an empty list of it, without asking the type
                self.error(f"argument {word[:-3]}: expected a value")
        return super().parse_known_args(words, namespace)


def parser(doc: str) -> Parser:
    return Parser(description=doc)


def parse(parser, argv: list[str] | None, demo: dict, own: tuple[str, ...] = ("model", "dataset")):
    """The flags. `demo` holds the demo's values of those that name models, data and folders: they are filled
    in, unless one of `own` is given; then a run is of somebody's own models or data, and takes nothing of the
    demo: all the others must be given."""
    parser.set_defaults(**demo)  # for --help
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(demo)))  # None: not given
    missing = {name: value for name, value in demo.items() if getattr(args, name) is None}
    given = [name for name in own if name not in missing]
    if given and missing:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in missing)
        parser.error(f"--{given[0]} is given, so {flags} must be too: nothing of the demo is taken")
    vars(args).update(missing)
    return args


def add_run_flags(parser, training: bool = True, models: bool = True) -> None:
    """The flags that say where and on what a script runs; the same in all of them. `models`: it runs models
    of `shard`, which may be large; small networks need none of the flags for that."""
    flag = parser.add_argument_group("run").add_argument
    flag("--output-dir", help="for everything that the script writes")
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
        flag("--adapter", help="a saved adapter of --model to go on from")
        flag("--quantize", choices=("int8",), help="hold the frozen weights below adapters in 8 bits")


# ------------------------------------------------------------------------------ what goes together


NEEDS = {  # a flag -> the one without which it would do nothing
    "cpu_offload": "fsdp",
    "offload_frozen": "fsdp",
    "lora_targets": "lora_rank",
    "lora_output": "lora_rank",
    "adapter": "lora_rank",
    "quantize": "lora_rank",
}
APART = (  # two flags -> why not both
    ("quantize", "fsdp", "every rank holds all of the frozen weights in 8 bits"),
    ("from_config", "lora_rank", "weights that are drawn must all be trained"),
)


def check_flags(args, ranks: int) -> None:
    """Raise InputError for flags that cannot go together; what a single flag may be, its type has said."""

    def given(name: str):
        return getattr(args, name, None)

    def flag(name: str) -> str:
        return f"--{name.replace('_', '-')}"

    for name, needed in NEEDS.items():
        if given(name) and not given(needed):
            raise InputError(f"{flag(name)} works with {flag(needed)} only: add it")
    for first, second, why in APART:
        if given(first) and given(second):
            raise InputError(f"{flag(first)} and {flag(second)} cannot go together: {why}")
    adapter = given("adapter")
    if adapter and os.path.realpath(args.model) == os.path.realpath(f"{adapter}/../model"):
        problem = f"--model {args.model} has --adapter {adapter} merged into it"
        raise InputError(f"{problem}: give the model that the adapter was trained on")
    if given("max_new_tokens") and args.max_length and args.max_new_tokens >= args.max_length:
        tokens, length = args.max_new_tokens, args.max_length
        raise InputError(f"--max-new-tokens {tokens} leaves no room for a prompt in --max-length {length}")
    if hasattr(args, "minibatch_size"):
        # a small rollout is one minibatch
        size = args.minibatch_size = min(args.minibatch_size, args.batch_size)
        if args.batch_size % size:
            raise InputError(f"--minibatch-size {size} does not divide --batch-size {args.batch_size}")
    if hasattr(args, "group_size") and args.batch_size % args.group_size:
        raise InputError(f"--group-size {args.group_size} does not divide --batch-size {args.batch_size}")
    for name in ("batch_size", "minibatch_size"):
        if (size := getattr(args, name, ranks)) % ranks:
            raise InputError(f"{flag(name)} {size} cannot be dealt evenly to {ranks} processes")


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
