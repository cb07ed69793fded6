"""What every script needs of a language model: scores, samples and token log-probabilities.

    ScoreModel        a backbone and one linear head: reward model, cost model or critic
    generate          sampling with a key-value cache, written out
    token_log_probs   log pi(y_t | x, y_<t) of given responses
    load_*, save_*    checkpoints in the layouts of Hugging Face and of the published Beaver models

Frames: B sequences, P prompt width (left-padded), R response width, L = P + R, H hidden, V words.
"""

import functools
import inspect
import os
import re
from importlib.util import find_spec
from pickle import UnpicklingError
from zipfile import is_zipfile

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging

from files import InputError, read_json, reading, reason, write_json

logging.disable_progress_bar()  # one bar per file would hide those of the scripts
logging.set_verbosity_error()  # what a checkpoint lacks, or has too much, is an error below and no table

DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "hidden_dropout", "dropout")


# old exports hold causal masks and rotary tables, which are computed today
LEGACY_BUFFERS = re.compile(r"(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$")


class ModelError(InputError):
    """A checkpoint that cannot serve: the message says which, why and what to do."""


# ------------------------------------------------------------------------------ masks and positions


def position_ids(attention_mask: Tensor) -> Tensor:
    """(B, L) -> (B, L). The first real token is position 0 on whichever side the padding is,
    so that padding never changes a score; padding itself gets any valid position."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def is_end(tokens: Tensor, eos_token_id: int | list[int] | Tensor) -> Tensor:
    """Ids of any shape -> bool, whether they end a response. A chat model has more than one such id."""
    return torch.isin(tokens, torch.as_tensor(eos_token_id, device=tokens.device))


def response_mask(responses: Tensor, eos_token_id: int | list[int]) -> Tensor:
    """(B, R) ids -> (B, R) mask of real tokens: up to and including the first EOS.

    Found by EOS, not by PAD: where the two share an id, `ids != pad` would drop the EOS itself."""
    end = is_end(responses, eos_token_id).long()
    return (end.cumsum(-1) - end == 0).long()


# ------------------------------------------------------------------------------ score model


def end_scores(scores: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, L), (B, L) -> (B,): the score at the last real token, whichever side is padded."""
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (attention_mask * columns).argmax(-1, keepdim=True)
    return scores.gather(1, last).squeeze(1)


class ScoreModel(nn.Module):
    """A transformer backbone and a linear head: one float32 score per token, the state's after it.

    score_type  "reward"  (score - mean) / sd      when the checkpoint asks for normalization
                "cost"    score / sd               scale only: the sign of a cost means safe or unsafe
                "critic"  score                    never normalized
    """

    def __init__(self, backbone: nn.Module, score_type: str, bias: bool = True, do_normalize: bool = False):
        super().__init__()
        if score_type not in ("reward", "cost", "critic"):
            raise ModelError(f"score_type is reward, cost or critic, not {score_type!r}")
        self.backbone, self.config = backbone, backbone.config
        self.score_type, self.do_normalize = score_type, do_normalize
        text = reading_part(self.config)
        width = getattr(text, "word_embed_proj_dim", text.hidden_size)  # OPT-350m projects at its end
        self.score_head = nn.Linear(width, 1, bias=bias)
        # from the run's seed alone: however much random numbers the backbone took, a new head is the same
        generator = torch.Generator().manual_seed(torch.initial_seed())
        nn.init.normal_(self.score_head.weight, std=0.02, generator=generator)
        if bias:
            nn.init.zeros_(self.score_head.bias)
        self.normalizer = nn.Module()  # named as on disk
        self.normalizer.register_buffer("mean", torch.zeros(1))
        self.normalizer.register_buffer("var", torch.ones(1))
        self.normalizer.register_buffer("count", torch.zeros(1, dtype=torch.long))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, L) ids and mask -> (B, L) float32 scores; columns of padding hold no meaning."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if input_ids.shape[1] > (limit := context_length(self.config)):  # of a tokenizer of its own
            problem = f"a text has {input_ids.shape[1]} tokens and its context {limit}; lower --max-length"
            raise ModelError(f"{self.score_type} model: {problem}")
        hidden = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids(attention_mask),
            use_cache=False,
        ).last_hidden_state  # (B, L, H)
        # the head in float32 even under bf16: a difference of two scores is what everything rests on
        with torch.autocast(hidden.device.type, enabled=False):
            scores = self.score_head(hidden.flatten(0, 1).to(self.score_head.weight.dtype))  # (B L, 1)
        # no view: FSDP2 hangs its backward hook on what comes out
        scores = scores.view(input_ids.shape).clone()
        if self.do_normalize and self.score_type != "critic":
            center = self.normalizer.mean if self.score_type == "reward" else 0.0
            scores = (scores - center) / (self.normalizer.var.sqrt() + 1e-8)
        return scores


# ------------------------------------------------------------------------------ checkpoints


@functools.cache  # one question to the hub for each name, and one answer in a run
def resolve(path: str) -> str:
    """A local folder as it is; anything else is a hub name, `owner/name` or `owner/name@revision`, fetched to
    the local cache: what a tokenizer needs, and weights in one format, safetensors where both are there."""
    if os.path.isdir(path):
        return path
    name, _, revision = path.partition("@")
    if os.path.exists(path) or path.startswith((".", "/")) or name.count("/") != 1:
        raise ModelError(f"{path}: no such model folder")
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
        raise ModelError(f"{path}: neither a local folder nor to be had from the hub ({problem})") from None
    return folder


def load_tokenizer(path: str):
    """The tokenizer of a model folder, always with a PAD token (EOS where it has none)."""
    folder = resolve(path)
    files = set(os.listdir(folder))
    if "tokenizer.model" in files and "tokenizer.json" not in files and not find_spec("sentencepiece"):
        raise ModelError(f"{path}: its tokenizer.model needs a package: pip install sentencepiece protobuf")
    with reading(f"{path}: the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        ids = tokenizer("a word").input_ids  # a damaged one fails here, and not in the middle of a run
    if not ids or not tokenizer.get_vocab():
        raise ModelError(f"{path}: its tokenizer turns text into nothing. Is tokenizer.json there?")
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{path}: the tokenizer has no EOS token, so no response could end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    part = reading_part(load_config(path)) if "config.json" in files else None
    words = tokenizer.rows = getattr(part, "vocab_size", 1 << 30)
    # a token for what a text does not hold, as an image (Gemma 3 1B), may be without a row: see data.tokenize
    used = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
    needed = set(tokenizer.get_vocab().values()) - (set(tokenizer.added_tokens_decoder) - used)
    if (highest := max(needed)) >= words:  # often a PAD that was added
        raise ModelError(f"{path}: the tokenizer has an id {highest}, and the model's embedding {words} rows")
    return tokenizer


def end_ids(path: str, tokenizer) -> list[int]:
    """The ids that end a response of the model at `path`: the tokenizer's EOS, and those of its
    generation_config.json, where chat models keep the end of a turn."""
    file = os.path.join(resolve(path), "generation_config.json")
    stored = read_json(file) if os.path.exists(file) else {}
    found = stored.get("eos_token_id") if isinstance(stored, dict) else "no object"
    found = found if isinstance(found, list) else [] if found is None else [found]
    if bad := [i for i in found if type(i) is not int]:
        raise ModelError(f"{file}: eos_token_id should hold ids, got {bad[0]!r}")
    return [tokenizer.eos_token_id, *(i for i in found if i != tokenizer.eos_token_id)]


def load_config(path: str):
    """The configuration with every dropout off: PPO's ratio compares two passes of the same function."""
    with reading(path):
        config = AutoConfig.from_pretrained(resolve(path), trust_remote_code=False)
        config.architectures = [str(name) for name in config.architectures or []]
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    if (layers := getattr(reading_part(config), "num_hidden_layers", 1)) > 1000:
        raise ModelError(f"{path}: config.json asks for {layers} layers")  # it would take hours to find out
    return config


def reading_part(config):
    """The configuration of the part that reads text, of models that also see or hear."""
    return getattr(config, "text_config", config)


def freeze_other_parts(model: nn.Module) -> None:
    """Of a model that also sees or hears, only the part that reads is trained. (No gradient reaches the
    others: an optimizer would have no state for them, and a checkpoint could not be resumed.)"""
    if reading_part(model.config) is not model.config:
        model.requires_grad_(False)
        for part in filter(None, (model.get_decoder(), model.get_output_embeddings())):
            part.requires_grad_(True)


def context_length(config) -> int:
    names = ("max_position_embeddings", "max_seq_len")  # the second is MPT's
    return next((limit for name in names if (limit := getattr(reading_part(config), name, None))), 1 << 30)


def check_context(config, max_length: int, path: str) -> None:
    """Raise ModelError if the model at `path` cannot read texts of `max_length` tokens."""
    if max_length > context_length(config):
        limit = context_length(config)
        raise ModelError(f"--max-length {max_length} exceeds the context of {path}, {limit} tokens")


def read(kind, path: str, config, dtype: torch.dtype) -> nn.Module:
    """The weights at `path` by transformers' own reader, which knows what a family calls its tensors on disk
    and in memory. Raises ModelError for a weight that is absent, superfluous or of another shape; a backbone
    (`kind` AutoModel) may leave what lies outside of it, the heads."""
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
            raise ModelError(f"{path}: {UNSAFE}") from None
    absent = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    roots = (model.base_model_prefix, *(name for name, _ in model.named_children()))
    within = tuple(f"{name}." for name in roots) if kind is AutoModel else ""
    unknown = (name for name in found["unexpected_keys"] if name.startswith(within))
    superfluous = sorted(name for name in unknown if not LEGACY_BUFFERS.search(name))
    if absent or superfluous:
        raise ModelError(
            f"{path}: weights do not fit the config (missing {absent[:3]}, superfluous {superfluous[:3]})"
        )
    if bad := next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None):
        raise ModelError(f"{path}: its weight {bad} holds NaN or infinity")
    return model


def load_causal_lm(
    path: str, from_config: bool = False, dtype: torch.dtype = torch.float32, on_meta: bool = False
):
    """A causal LM in eval mode (dropouts are off, so train mode would be the same function).

    With `on_meta` it has no memory yet, and `model.read()` is another one with weights: `shard` calls it on
    rank 0 only, so that a machine never holds a copy for each rank."""
    config = load_config(path)
    if (config.architectures or [""])[0].endswith("ForScore"):
        raise ModelError(f"{path}: a score model, not a language model")
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
        raise ModelError(f"{path}: {config.model_type} has no key-value cache, and sampling goes by one")
    freeze_other_parts(model)
    return model.eval()


HEADS = ("score_head.", "score.", "normalizer.")
UNSAFE = "holds more than tensors, and loading it could run code. Convert it to safetensors"


def read_heads(folder: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint that belong to no backbone: score head and normalizer."""
    from safetensors import safe_open

    for name in ("model.safetensors", "pytorch_model.bin"):
        index = os.path.join(folder, f"{name}.index.json")
        if os.path.exists(index):
            with reading(index):
                where = read_json(index)["weight_map"]
                files = {file for key, file in where.items() if key.startswith(HEADS)}
        elif os.path.exists(os.path.join(folder, name)):
            files = {name}
        else:
            continue
        heads = {}
        for path in (os.path.join(folder, file) for file in files):
            with reading(path):
                if path.endswith(".safetensors"):
                    with safe_open(path, framework="pt") as file:
                        heads |= {key: file.get_tensor(key) for key in file.keys() if key.startswith(HEADS)}
                    continue
                try:
                    whole = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
                except UnpicklingError:
                    raise ModelError(f"{path}: {UNSAFE}") from None
                heads |= {key: tensor for key, tensor in whole.items() if key.startswith(HEADS)}
        return heads
    raise ModelError(f"{folder}: no model.safetensors and no pytorch_model.bin")


def load_score_model(
    path: str,
    score_type: str,
    new_head: bool = False,
    dtype: torch.dtype = torch.float32,
    on_meta: bool = False,
) -> ScoreModel:
    """Read a score model from a Beaver checkpoint (`*ForScore`), a Hugging Face reward model
    (`*ForSequenceClassification` with one label) or, with `new_head`, a language model.

    A critic may start from a reward or a cost model; otherwise the stored score_type must be the asked one.
    `dtype` is the backbone's, the head is float32. `on_meta` as in load_causal_lm. Raises ModelError for a
    missing or superfluous head, another score_dim, another score_type, or a weight that does not fit."""
    config, tensors = load_config(path), read_heads(resolve(path))
    kind = (config.architectures or [""])[0]
    stored_type = getattr(config, "score_type", None)
    if score_type != "critic" and stored_type is not None and stored_type != score_type:
        raise ModelError(f"{path}: a {stored_type} model, and a {score_type} model is needed")
    labels = config.num_labels if kind.endswith("ForSequenceClassification") else 1
    if (dimensions := getattr(config, "score_dim", labels)) != 1:
        raise ModelError(f"{path}: scores have {dimensions} dimensions, one is needed")

    heads = {name for name in ("score_head", "score") if f"{name}.weight" in tensors}
    if len(heads) > 1:
        raise ModelError(f"{path}: two heads, score_head and score; remove the one that is not meant")
    if not heads and not new_head:
        raise ModelError(
            f"{path}: no score head, so its scores would be random. Train one by reward_model.py or "
            "cost_model.py"
        )
    if bad := next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None):
        raise ModelError(f"{path}: its weight {bad} holds NaN or infinity")
    head = heads.pop() if heads else None
    bias = f"{head}.bias" in tensors if head else True
    if kind.endswith("ForScore") and bias != getattr(config, "score_bias", getattr(config, "bias", bias)):
        raise ModelError(f"{path}: config.json and the weights disagree about the bias of the score head")
    if head and len(tensors[f"{head}.weight"]) != 1:
        outputs = len(tensors[f"{head}.weight"])
        raise ModelError(f"{path}: the score head has {outputs} outputs, one is needed")

    do_normalize = bool(getattr(config, "do_normalize", False))
    lacking = {"normalizer.mean", "normalizer.var"} - set(tensors)
    if do_normalize and score_type != "critic" and lacking:
        raise ModelError(f"{path}: config.json asks for normalized scores, and {min(lacking)} is missing")

    if on_meta:
        with reading(path), torch.device("meta"):
            backbone = AutoModel.from_config(config, dtype=dtype)
    else:
        backbone = read(AutoModel, path, config, dtype)
    freeze_other_parts(backbone)
    model = ScoreModel(backbone, score_type, bias, do_normalize)
    if on_meta:
        model.read = functools.partial(load_score_model, path, score_type, new_head, dtype)
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


# ------------------------------------------------------------------------------ sampling


def truncate_top_p(probs: Tensor, top_p: float) -> Tensor:
    """(B, V) -> (B, V): the smallest set of most likely words with mass >= top_p, renormalized."""
    sorted_probs, order = probs.sort(-1, descending=True)
    mass_before = sorted_probs.cumsum(-1) - sorted_probs
    kept = torch.zeros_like(probs).scatter(-1, order, sorted_probs * (mass_before < top_p))
    return kept / kept.sum(-1, keepdim=True)


class PreallocatedLayer(DynamicLayer):
    """A layer's keys and values (B, heads, L, head_dim), with room for `more` tokens from the start: where
    DynamicLayer copies all of them at every token (torch.cat), this one writes the new token in place."""

    def __init__(self, filled: DynamicLayer, more: int):
        super().__init__()
        self.lazy_initialization(filled.keys, filled.values)
        self.length = filled.keys.shape[2]
        self.whole = []
        for old in (filled.keys, filled.values):
            batch, heads, length, width = old.shape
            self.whole.append(old.new_empty(batch, heads, length + more, width))
            self.whole[-1][:, :, :length] = old
        self.keys, self.values = (x[:, :, : self.length] for x in self.whole)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        begin, self.length = self.length, self.length + key_states.shape[2]
        for whole, states in zip(self.whole, (key_states, value_states)):
            whole[:, :, begin : self.length] = states
        self.keys, self.values = (x[:, :, : self.length] for x in self.whole)
        return self.keys, self.values

    def reorder_cache(self, rows: Tensor) -> None:
        self.whole = [x[rows] for x in self.whole]
        self.keys, self.values = (x[:, :, : self.length] for x in self.whole)


@torch.no_grad()
def generate(
    policy,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    uniforms: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample a response to every prompt, token by token over a key-value cache.

    prompt_ids, prompt_mask (B, P), left-padded. Returns sequences (B, P + R) and log_probs (B, R):
    the log-probability of each token under the distribution it was drawn from, temperature and top-p
    included, and 0 after EOS. R <= max_new_tokens: it stops when every row has ended.
    `temperature=0` is greedy (all mass on one word, so its log-probability is 0).

    A token inverts the CDF at a uniform number. `uniforms` (B, max_new_tokens) lets the caller draw
    them for the global batch, so that a row's samples do not depend on which rank computes it, nor on
    which rows are left beside it: rows that have ended are dropped.
    """
    batch, width = prompt_ids.shape
    place = {"device": prompt_ids.device}
    if uniforms is None:
        uniforms = torch.rand(batch, max_new_tokens, **place)
    padding = 0 if pad_token_id is None else pad_token_id
    sequences = torch.cat([prompt_ids, prompt_ids.new_full((batch, max_new_tokens), padding)], 1)
    log_probs = torch.zeros(batch, max_new_tokens, **place)
    rows = torch.arange(batch, **place)  # (b,) those that are still in the batch
    ended = torch.zeros(batch, dtype=torch.bool, **place)  # (b,) which of them have ended
    mask = torch.cat([prompt_mask, prompt_mask.new_ones(batch, max_new_tokens)], 1)
    positions, inputs, cache = position_ids(prompt_mask), prompt_ids, None
    ends = eos_token_id
    if ends is not None:  # once: per token it would wait for the GPU
        ends = torch.as_tensor(ends, **place)
    for t in range(max_new_tokens):
        output = policy(
            input_ids=inputs,
            attention_mask=mask[:, : width + t],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        if not hasattr(output, "past_key_values"):
            raise ModelError(f"{policy.config.model_type} gives no key-value cache, and sampling goes by one")
        logits = output.logits[:, -1].float()  # (B, V)
        if cache is None:
            cache = output.past_key_values
            for i, layer in enumerate(getattr(cache, "layers", ())):
                if type(layer) is DynamicLayer and layer.is_initialized:  # no sliding window, no other state
                    cache.layers[i] = PreallocatedLayer(layer, max_new_tokens - 1)
        if temperature == 0:
            token = logits.argmax(-1)
            log_prob = torch.zeros_like(logits[:, 0])
        else:
            probs = torch.softmax(logits / temperature, -1)
            if top_p < 1:
                probs = truncate_top_p(probs, top_p)
            # float64: a float32 running sum over a vocabulary of 100,000 loses the rare words
            cdf = probs.double().cumsum(-1)
            drawn = uniforms[rows, t : t + 1].double() * cdf[:, -1:]
            token = torch.searchsorted(cdf, drawn, right=True).squeeze(1).clamp(max=probs.shape[1] - 1)
            log_prob = probs.gather(1, token[:, None]).squeeze(1).log()
        token = torch.where(ended, padding, token)
        sequences[rows, width + t] = token
        log_probs[rows, t] = torch.where(ended, 0.0, log_prob)
        inputs, positions = token[:, None], positions[:, -1:] + 1
        if ends is not None:
            ended = ended | is_end(token, ends)
            left = len(rows) - int(ended.sum())
            if left == 0:
                break
            if left <= 0.75 * len(rows):  # each time a copy of what is left: not for every single row
                kept = (~ended).nonzero().squeeze(1)
                cache.reorder_cache(kept)
                rows, ended, mask = rows[kept], ended[kept], mask[kept]
                inputs, positions = inputs[kept], positions[kept]
    return sequences[:, : width + t + 1], log_probs[:, : t + 1]


# ------------------------------------------------------------------------------ log-probabilities

PIECE = 1 << 26  # logits per piece: 256 MiB in float32


def _token_log_probs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """(B, R, V), (B, R) -> (B, R), in float32."""
    logits = logits.float() / temperature
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)


def token_log_probs(
    policy, sequences: Tensor, attention_mask: Tensor, prompt_width: int, temperature: float = 1.0
) -> Tensor:
    """log pi(y_t | x, y_<t): (B, P + R), (B, P + R) -> (B, R) float32, with gradient.

    `temperature` must be the one that the tokens were sampled at, else PPO's ratio does not start at 1.
    Large logits are turned into log-probabilities in pieces that are recomputed in the backward pass,
    so that no float32 copy of (B, R, V) ever exists.
    """
    responses = sequences[:, prompt_width:]
    output = policy(
        input_ids=sequences,
        attention_mask=attention_mask,
        position_ids=position_ids(attention_mask),
        use_cache=False,
        logits_to_keep=responses.shape[1] + 1,
    )
    logits = output.logits[:, -responses.shape[1] - 1 : -1]  # (B, R, V): column t predicts response token t
    rows = max(1, PIECE // (logits.shape[1] * logits.shape[2]))
    if rows >= len(logits):
        return _token_log_probs(logits, responses, temperature)
    pieces = [
        checkpoint(
            _token_log_probs, logits[i : i + rows], responses[i : i + rows], temperature, use_reentrant=False
        )
        for i in range(0, len(logits), rows)
    ]
    return torch.cat(pieces)
