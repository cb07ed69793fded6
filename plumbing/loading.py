"""Checkpoints and tokenizers, in the layouts of Hugging Face and of the published Beaver models."""

import functools
import inspect
import json
import math
import os
import re
from collections.abc import Callable
from importlib.util import find_spec
from pickle import UnpicklingError
from zipfile import is_zipfile

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

from lm import ScoreModel, context_length, reading_part, switching_tables
from plumbing.files import InputError, read_json, reading, reason, write_json

logging.disable_progress_bar()  # one bar per file would hide those of the scripts
logging.set_verbosity_error()  # what a checkpoint lacks, or has too much, is an error below and no table


DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "hidden_dropout", "dropout")
# old exports hold causal masks and rotary tables, which are computed today
SIZES = re.compile(r"(heads?|layers?|embd|hidden_size|eps|epsilon)$")  # what cannot be below 0 in a config
LEGACY_BUFFERS = re.compile(r"(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$")


# ------------------------------------------------------------------------------ tokenizers and configurations


@functools.cache  # one question to the hub for each name, and one answer in a run
def resolve(path: str) -> str:
    """A local folder as it is; anything else is a hub name, `owner/name` or `owner/name@revision`, fetched to
    the local cache: what a tokenizer needs, and weights in one format, safetensors where both are there."""
    if os.path.isdir(path):
        return path
    name, _, revision = path.partition("@")
    if os.path.exists(path) or path.startswith((".", "/")) or name.count("/") != 1:
        raise InputError(f"{path}: no such model folder")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    # "consolidated" are the same weights once more, in their makers' own layout (Mistral, Llama)
    options = {"revision": revision or None, "ignore_patterns": ["*/*", "consolidated*"]}
    try:
        folder = snapshot_download(name, allow_patterns=wanted, **options)
        if not any(file.endswith(".safetensors") for file in os.listdir(folder)):
            folder = snapshot_download(name, allow_patterns=[*wanted, "pytorch_model*.bin"], **options)
    except Exception as error:  # offline, unknown, gated: the hub client has many types for "not to be had"
        problem = f"{type(error).__name__}: {reason(error)}"
        raise InputError(f"{path}: neither a local folder nor to be had from the hub ({problem})") from None
    return folder


def by_its_file(tokenizer, file: str, options: dict):
    """The tokenizer with the ids of `file`, its tokenizer.json. For some families transformers reads only
    vocabulary and merges there, and splits texts by the family's rules: other ids than the model has learned.
    Then the generic class takes its place, with the same special tokens and chat template."""
    stored, ours = Tokenizer.from_file(file), tokenizer.backend_tokenizer
    rules, read = (json.loads(backend.to_str()) for backend in (stored, ours))
    chosen = {"add_bos_token", "add_eos_token"} & options.keys()  # tokenizer_config.json may say so
    if all(rules[part] == read[part] for part in ("normalizer", "pre_tokenizer", "model")) and (
        chosen or stored.encode("a").ids == ours.encode("a").ids
    ):
        return tokenizer
    kept = {name: options[name] for name in chosen} | tokenizer.special_tokens_map
    generic = PreTrainedTokenizerFast(tokenizer_file=file, chat_template=tokenizer.chat_template, **kept)
    generic.name_or_path = tokenizer.name_or_path
    return generic


def load_tokenizer(path: str):
    """The tokenizer of a model folder, always with a PAD token (EOS where it has none).

    It carries what texts for that model must keep to: `rows` of its embedding, its `context`, and whether
    `whole_template` is read, to its last token (Hugging Face's reward models; data.ending)."""
    folder = resolve(path)
    files = set(os.listdir(folder))
    if "tokenizer.model" in files and "tokenizer.json" not in files and not find_spec("sentencepiece"):
        raise InputError(f"{path}: its tokenizer.model needs a package: pip install sentencepiece protobuf")
    with reading(f"{path}: the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if "tokenizer.json" in files:
            options = os.path.join(folder, "tokenizer_config.json")
            options = read_json(options) if os.path.exists(options) else {}
            tokenizer = by_its_file(tokenizer, os.path.join(folder, "tokenizer.json"), options)
        ids = tokenizer("a word").input_ids  # a damaged one fails here, and not in the middle of a run
    if not ids or not tokenizer.get_vocab():
        raise InputError(f"{path}: its tokenizer turns text into nothing. Is tokenizer.json there?")
    if tokenizer.eos_token_id is None:
        raise InputError(f"{path}: the tokenizer has no EOS token, so no response could end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = load_config(path) if "config.json" in files else None
    words = tokenizer.rows = getattr(reading_part(config), "vocab_size", 1 << 30)
    tokenizer.context = context_length(config)
    kind = (getattr(config, "architectures", None) or [""])[0]
    tokenizer.whole_template = kind.endswith("ForSequenceClassification")
    # a token for what a text does not hold, as an image (Gemma 3 1B), may be without a row: see data.tokenize
    used = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
    needed = set(tokenizer.get_vocab().values()) - (set(tokenizer.added_tokens_decoder) - used)
    if (highest := max(needed)) >= words:  # often a PAD that was added
        raise InputError(f"{path}: the tokenizer has an id {highest}, and the model's embedding {words} rows")
    return tokenizer


def end_ids(path: str, tokenizer) -> list[int]:
    """The ids that end a response of the model at `path`: the tokenizer's EOS, and those of its
    generation_config.json, where chat models keep the end of a turn."""
    file = os.path.join(resolve(path), "generation_config.json")
    stored = read_json(file) if os.path.exists(file) else {}
    found = stored.get("eos_token_id") if isinstance(stored, dict) else "no object"
    found = found if isinstance(found, list) else [] if found is None else [found]
    if bad := [i for i in found if type(i) is not int]:
        raise InputError(f"{file}: eos_token_id should hold ids, got {bad[0]!r}")
    return [tokenizer.eos_token_id, *(i for i in found if i != tokenizer.eos_token_id)]


def load_config(path: str):
    """The configuration with every dropout off: PPO's ratio compares two passes of the same function."""
    folder = resolve(path)
    if adapter := [name for name in sorted(os.listdir(folder)) if name.startswith("adapter_")]:
        problem = f"holds {adapter[0]}: the weights beside an adapter are its base's, and say something else"
        raise InputError(f"{path}: {problem}. Give a folder with the merged model, or with the base alone")
    with reading(path):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config.architectures = [str(name) for name in config.architectures or []]
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    for name, value in (config.to_dict() | reading_part(config).to_dict()).items():
        if isinstance(value, int | float) and not (
            math.isfinite(value) and (value >= 0 or not SIZES.search(name))
        ):
            raise InputError(f"{path}: config.json: {name} is {value}")
    if (layers := getattr(reading_part(config), "num_hidden_layers", 1)) > 1000:
        raise InputError(f"{path}: config.json asks for {layers} layers")  # it would take hours to find out
    return config


def freeze_other_parts(model: nn.Module) -> None:
    """Of a model that also sees or hears, only the part that reads is trained. (No gradient reaches the
    others: an optimizer would have no state for them, and a checkpoint could not be resumed.)"""
    if reading_part(model.config) is not model.config:
        model.requires_grad_(False)
        for part in filter(None, (model.get_decoder(), model.get_output_embeddings())):
            part.requires_grad_(True)


def check_context(config, max_length: int, path: str) -> None:
    """Raise InputError if the model at `path` cannot read texts of `max_length` tokens."""
    if max_length > context_length(config):
        limit, why = context_length(config), ""
        for kind in switching_tables(config):
            why = f": beyond them its {kind} positions depend on the longest text of a batch"
        raise InputError(f"--max-length {max_length} exceeds the context of {path}, {limit} tokens{why}")


# ------------------------------------------------------------------------------ weights


def first_layers(path: str, config, layers: int) -> None:
    """Let a configuration ask for the first `layers` blocks only. Raises InputError if there are fewer, or if
    the family's blocks depend on how many there are."""
    part = reading_part(config)
    if layers > part.num_hidden_layers:
        raise InputError(f"--layers {layers}: {path} has {part.num_hidden_layers}")
    part.num_hidden_layers = layers
    if vars(part).get("layer_types"):
        part.layer_types = part.layer_types[:layers]
    with reading(f"--layers {layers}: {path}"), torch.device("meta"):
        AutoModel.from_config(config)


def read(kind, path: str, config, dtype: torch.dtype, cut: bool = False) -> nn.Module:
    """The weights at `path` by transformers' own reader, which knows what a family calls its tensors on disk
    and in memory. Raises InputError for a weight that is absent, superfluous or of another shape; a backbone
    (`kind` AutoModel) may leave what lies outside of it, the heads; with `cut` what follows its blocks."""
    with reading(path):
        try:
            model, found = kind.from_pretrained(
                resolve(path),
                config=config,
                dtype=dtype,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # they are refused here, by name
                output_loading_info=True,
            )
        except UnpicklingError:
            raise InputError(f"{path}: {UNSAFE}") from None
    absent = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    roots = (model.base_model_prefix, *(name for name, _ in model.named_children()))
    within = tuple(f"{name}." for name in roots) if kind is AutoModel else ""
    unknown = (name for name in found["unexpected_keys"] if name.startswith(within))
    if cut:  # the first number in a name is the block's
        own = reading_part(config).num_hidden_layers
        unknown = (n for n in unknown if not any(int(x) >= own for x in re.findall(r"\.(\d+)\.", n)[:1]))
    superfluous = sorted(name for name in unknown if not LEGACY_BUFFERS.search(name))
    if absent or superfluous:
        raise InputError(
            f"{path}: weights do not fit the config (missing {absent[:3]}, superfluous {superfluous[:3]})"
        )
    if bad := next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None):
        raise InputError(f"{path}: its weight {bad} holds NaN or infinity")
    return model


def load_causal_lm(
    path: str, from_config: bool = False, dtype: torch.dtype = torch.float32, on_meta: bool = False
):
    """A causal LM in eval mode (dropouts are off, so train mode would be the same function).

    With `on_meta` it has no memory yet, and `model.read()` is another one with weights: `shard` calls it on
    rank 0 only, so that a machine never holds a copy for each rank."""
    config = load_config(path)
    if (config.architectures or [""])[0].endswith("ForScore"):
        raise InputError(f"{path}: a score model, not a language model")
    if not from_config:
        untie(path, config)
    if on_meta:
        with reading(path), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.read = functools.partial(load_causal_lm, path, from_config, dtype)
    elif from_config:
        with reading(path):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model = read(AutoModelForCausalLM, path, config, dtype)
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise InputError(f"{path}: {config.model_type} has no key-value cache, and sampling goes by one")
    freeze_other_parts(model)
    model.unknown_ids = unknown_ids(path, config)
    return model.eval()


def unknown_ids(path: str, config) -> list[int]:
    """The ids that have a row in the embedding and no token: lm.py neither samples nor counts them. (Rows are
    often rounded up to a multiple of 64, and score models need not have them.)"""
    if not any(name.startswith(("tokenizer", "vocab")) for name in os.listdir(resolve(path))):
        return []
    known = set(load_tokenizer(path).get_vocab().values())
    return [i for i in range(reading_part(config).vocab_size) if i not in known]


def untie(path: str, config) -> None:
    """Say in a configuration that tensors are not tied, where it says they are and the files hold two that
    differ: they are two then when the model is split, adapted and saved, too."""
    with reading(path), torch.device("meta"):
        tied = AutoModelForCausalLM.from_config(config).all_tied_weights_keys

    def stored(name: str) -> list[Tensor]:  # a family may call what stands before it something else on disk
        end = name.split(".")[-2:]
        return list(read_tensors(resolve(path), lambda key: key.split(".")[-2:] == end).values())

    for name, other in tied.items():
        if (first := stored(name)) and (second := stored(other)):
            if not any(a.shape == b.shape and a.equal(b) for a in first for b in second):
                config.tie_word_embeddings = reading_part(config).tie_word_embeddings = False


HEADS = ("score_head.", "score.", "normalizer.")
UNSAFE = "holds more than tensors, and loading it could run code. Convert it to safetensors"


def read_tensors(folder: str, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The tensors of a checkpoint with `wanted` names, as they are called on disk."""
    from safetensors import safe_open

    for name in ("model.safetensors", "pytorch_model.bin"):
        index = os.path.join(folder, f"{name}.index.json")
        if os.path.exists(index):
            with reading(index):
                where = read_json(index)["weight_map"]
                files = {file for key, file in where.items() if wanted(key)}
        elif os.path.exists(os.path.join(folder, name)):
            files = {name}
        else:
            continue
        found = {}
        for path in (os.path.join(folder, file) for file in files):
            with reading(path):
                if path.endswith(".safetensors"):
                    with safe_open(path, framework="pt") as file:
                        found |= {key: file.get_tensor(key) for key in file.keys() if wanted(key)}
                    continue
                try:
                    whole = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
                except UnpicklingError:
                    raise InputError(f"{path}: {UNSAFE}") from None
                found |= {key: tensor for key, tensor in whole.items() if wanted(key)}
        return found
    raise InputError(f"{folder}: no model.safetensors and no pytorch_model.bin")


def load_score_model(
    path: str,
    score_type: str,
    new_head: bool = False,
    dtype: torch.dtype = torch.float32,
    on_meta: bool = False,
    layers: int | None = None,
) -> ScoreModel:
    """Read a score model from a Beaver checkpoint (`*ForScore`), a Hugging Face reward model
    (`*ForSequenceClassification` with one label) or, with `new_head`, a language model; of its blocks the
    first `layers`, or all.

    A critic may start from a reward or a cost model; otherwise the stored score_type must be the asked one.
    `dtype` is the backbone's, the head is float32. `on_meta` as in load_causal_lm. Raises InputError for a
    missing or superfluous head, another score_dim, another score_type, or a weight that does not fit."""
    config, tensors = load_config(path), read_tensors(resolve(path), lambda key: key.startswith(HEADS))
    if layers:
        first_layers(path, config, layers)
    kind = (config.architectures or [""])[0]
    stored_type = getattr(config, "score_type", None)
    if score_type != "critic" and stored_type is not None and stored_type != score_type:
        raise InputError(f"{path}: a {stored_type} model, and a {score_type} model is needed")
    labels = config.num_labels if kind.endswith("ForSequenceClassification") else 1
    if (dimensions := getattr(config, "score_dim", labels)) != 1:
        raise InputError(f"{path}: scores have {dimensions} dimensions, one is needed")

    heads = {name for name in ("score_head", "score") if f"{name}.weight" in tensors}
    if len(heads) > 1:
        raise InputError(f"{path}: two heads, score_head and score; remove the one that is not meant")
    if not heads and not new_head:
        raise InputError(
            f"{path}: no score head, so its scores would be random. Train one by reward_model.py or "
            "cost_model.py"
        )
    if bad := next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None):
        raise InputError(f"{path}: its weight {bad} holds NaN or infinity")
    head = heads.pop() if heads else None
    bias = f"{head}.bias" in tensors if head else True
    if kind.endswith("ForScore") and bias != getattr(config, "score_bias", getattr(config, "bias", bias)):
        raise InputError(f"{path}: config.json and the weights disagree about the bias of the score head")
    if head and len(tensors[f"{head}.weight"]) != 1:
        outputs = len(tensors[f"{head}.weight"])
        raise InputError(f"{path}: the score head has {outputs} outputs, one is needed")

    do_normalize = bool(getattr(config, "do_normalize", False))
    lacking = {"normalizer.mean", "normalizer.var"} - set(tensors)
    if do_normalize and score_type != "critic" and lacking:
        raise InputError(f"{path}: config.json asks for normalized scores, and {min(lacking)} is missing")

    if on_meta:
        with reading(path), torch.device("meta"):
            backbone = AutoModel.from_config(config, dtype=dtype)
    else:
        backbone = read(AutoModel, path, config, dtype, bool(layers))
    freeze_other_parts(backbone)
    model = ScoreModel(backbone, score_type, bias, do_normalize)
    if on_meta:
        model.read = functools.partial(load_score_model, path, score_type, new_head, dtype, layers=layers)
        return model.to("meta").eval()
    named = {name.replace("score.", "score_head."): tensor for name, tensor in tensors.items()}
    with reading(path):  # a head of another width
        named |= {name: value.reshape(1) for name, value in named.items() if name.startswith("normalizer.")}
        model.load_state_dict(named, strict=False)
    return model.eval()


def save_score_model(model: ScoreModel, state: dict[str, Tensor], folder: str) -> None:
    """Write config.json and model.safetensors in the Beaver layout. `state` is the full state dict
    of `model` (gathered, where the model is sharded)."""
    from safetensors.torch import save_file

    os.makedirs(folder, exist_ok=True)
    prefix = f"{model.backbone.base_model_prefix}."
    tensors = {re.sub(r"^backbone\.", prefix, name): tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    config = model.config.to_diff_dict() | {
        "architectures": [type(model.backbone).__name__.removesuffix("Model") + "ForScore"],
        "score_dim": 1,
        "score_bias": model.score_head.bias is not None,
        "score_type": model.score_type,
        "do_normalize": model.do_normalize,
        "normalizer_type": getattr(model.config, "normalizer_type", None),
        "momentum": getattr(model.config, "momentum", None),
        "mean": model.normalizer.mean.tolist(),
        "var": model.normalizer.var.tolist(),
    }
    write_json(os.path.join(folder, "config.json"), dict(sorted(config.items())))


def save_causal_lm(model, state: dict[str, Tensor], folder: str) -> None:
    """Write a Hugging Face folder; `state` is the full state dict, gathered where the model is sharded."""
    # what tensors are called on disk goes by a class's name, and FSDP has changed it
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.config)
    plain.generation_config = model.generation_config
    # gathered tensors no longer share memory: do not write one twice
    state = {name: tensor for name, tensor in state.items() if name not in plain.all_tied_weights_keys}
    plain.save_pretrained(folder, state_dict=state)
