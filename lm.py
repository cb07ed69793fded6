"""What a PPO step does with a language model: masks, scores, samples, log-probabilities, micro-batches.

    ScoreModel        a backbone and one linear head: reward model, cost model or critic
    generate          sampling with a key-value cache, written out
    token_log_probs   log pi(y_t | x, y_<t) of given responses
    pad, frame        rows of ids in the frame of a rollout
    micro_batches     a batch in pieces, and `rejoin` for what was computed of them
    in_pieces         response_log_probs, response_scores or state_values of a whole batch, by micro-batches

Frames: B sequences, P prompt width (left-padded), R response width, L = P + R, H hidden, V words.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicLayer

from plumbing.files import InputError

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


def reading_part(config):
    """The configuration of the part that reads text, of models that also see or hear."""
    return getattr(config, "text_config", config)


def switching_tables(config) -> dict[str, int]:
    """Kinds of rotary tables that depend on the longest text of a batch -> the length up to which they don't.

    Beyond it (Phi-3's longrope) a row's numbers would depend on the rows beside it, and change while a text
    grows: PPO's ratios would not begin at 1."""
    rope = getattr(reading_part(config), "rope_parameters", None) or {}
    tables = [rope, *(table for table in rope.values() if isinstance(table, dict))]  # or one a kind
    fixed = ("default", "linear", "yarn", "llama3", "proportional")
    tables = [table for table in tables if table.get("rope_type", "default") not in fixed]
    return {table["rope_type"]: table.get("original_max_position_embeddings") or 1 << 30 for table in tables}


def context_length(config) -> int:
    """The longest text that a model can read, in tokens."""
    names = ("max_position_embeddings", "max_seq_len")  # the second is MPT's
    limits = [getattr(reading_part(config), name, None) or 1 << 30 for name in names]
    return min(*limits, *switching_tables(config).values())


class ScoreModel(nn.Module):
    """A transformer backbone and a linear head: one float32 score per token, the state's after it.

    score_type  "reward"  (score - mean) / sd      when the checkpoint asks for normalization
                "cost"    score / sd               scale only: the sign of a cost means safe or unsafe
                "critic"  score                    never normalized
    """

    def __init__(self, backbone: nn.Module, score_type: str, bias: bool = True, do_normalize: bool = False):
        super().__init__()
        if score_type not in ("reward", "cost", "critic"):
            raise InputError(f"score_type is reward, cost or critic, not {score_type!r}")
        self.backbone, self.config = backbone, backbone.config
        self.score_type, self.do_normalize = score_type, do_normalize
        self.context = context_length(self.config)
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
        limit = self.context  # the width first: to ask for the sum would wait for the GPU
        if input_ids.shape[1] > limit and (longest := int(attention_mask.sum(-1).max())) > limit:
            raise InputError(f"{self.score_type} model: a text has {longest} tokens and its context {limit}")
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


def without_token(policy, device) -> Tensor | None:
    """The ids that no tokenizer has, although the policy's embedding has a row for each, if there are any."""
    unknown = getattr(policy, "unknown_ids", None)
    return torch.tensor(unknown, device=device) if unknown else None


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
    included, and 0 after EOS. R <= max_new_tokens: it stops when every row has ended. Ids of no token are
    never drawn.
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
    ends, unknown = eos_token_id, without_token(policy, prompt_ids.device)
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
            raise InputError(f"{policy.config.model_type} gives no key-value cache, and sampling goes by one")
        logits = output.logits[:, -1].float()  # (B, V)
        if unknown is not None:
            logits = logits.index_fill(-1, unknown, -torch.inf)
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


def _token_log_probs(logits: Tensor, tokens: Tensor, temperature: float, unknown: Tensor | None) -> Tensor:
    """(B, R, V), (B, R) -> (B, R), in float32."""
    logits = logits.float() / temperature
    if unknown is not None:
        logits = logits.index_fill_(-1, unknown, -torch.inf)
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
    rows, unknown = max(1, PIECE // (logits.shape[1] * logits.shape[2])), without_token(policy, logits.device)
    if rows >= len(logits):
        return _token_log_probs(logits, responses, temperature, unknown)
    pieces = [
        checkpoint(_token_log_probs, *piece, temperature, unknown, use_reentrant=False)
        # split, not slices: each slice's backward pass would fill a gradient of the whole
        for piece in zip(logits.split(rows), responses.split(rows))
    ]
    return torch.cat(pieces)


# ------------------------------------------------------------------------------ frame and micro-batches


def pad(rows: list[list[int]], pad_token_id: int, side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, L), padded left (prompts, so that responses start in one column) or right."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_token_id)  # (B, L)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, columns] = torch.tensor(row)
        mask[i, columns] = 1
    return ids, mask


def frame(rows: list[tuple[list[int], int]], pad_token_id: int, device="cpu") -> tuple[Tensor, Tensor, int]:
    """(ids, prompt length) rows, as from `encode`, in the frame of a rollout: sequences (B, P + R),
    attention mask (B, P + R) and P, prompts padded left and responses right."""
    prompts, prompt_mask = pad([ids[:length] for ids, length in rows], pad_token_id, side="left")
    responses, response_mask = pad([ids[length:] for ids, length in rows], pad_token_id, side="right")
    sequences, attention_mask = torch.cat([prompts, responses], 1), torch.cat([prompt_mask, response_mask], 1)
    return sequences.to(device), attention_mask.to(device), prompts.shape[1]


def by_length(rows: list[tuple]) -> list[tuple]:
    """Rows of encode or encode_pairs, longest first: micro-batches of similar lengths hold little padding."""
    return sorted(rows, key=lambda row: -max(len(ids) for ids in row if isinstance(ids, list)))


def micro_batches(batch: dict, size: int) -> list[dict]:
    """A batch in pieces of at most `size` rows, longest rows first, each cut to its own longest prompt and
    response: a long answer widens no others.

    `batch` holds sequences, attention_mask (B, P + R) and mask (B, R), and of others what scorer_ids makes
    (B, L), tensors (B, R) or (B,), and lists of B. A piece holds the same of its b rows, and `rows`, their
    places in the batch, `prompt_width`, its own P, and `share`, b / B: losses weighted by it add up to the
    batch's mean."""
    width = batch["sequences"].shape[1] - batch["mask"].shape[1]
    frames = {name: spans(batch[name]) for name in batch if name.endswith("attention_mask")}
    whole = frames["attention_mask"]  # of each row, its first real column and the one after its last
    order = list(range(len(whole)))
    if len(order) > size:  # else there is one piece, and any order is as good
        order.sort(key=lambda row: whole[row][0] - whole[row][1])
    pieces = []
    for rows in (order[i : i + size] for i in range(0, len(order), size)):
        begin, end = min(whole[row][0] for row in rows), max(*(whole[row][1] for row in rows), width + 1)
        columns = {"mask": (0, end - width), "sequences": (begin, end), "attention_mask": (begin, end)}
        for scorer in ("reward", "cost"):
            if own := frames.get(f"{scorer}_attention_mask"):
                span = min(own[row][0] for row in rows), max(own[row][1] for row in rows)
                columns |= {f"{scorer}_ids": span, f"{scorer}_attention_mask": span}
        piece = {"rows": rows, "prompt_width": width - begin, "share": len(rows) / len(order)}
        for name, x in batch.items():
            piece[name] = x[rows] if isinstance(x, Tensor) else [x[row] for row in rows]
            if isinstance(x, Tensor) and x.ndim == 2:
                first, last = columns.get(name, columns["mask"])
                piece[name] = piece[name][:, first:last]
        pieces.append(piece)
    return pieces


def rejoin(parts: list[Tensor], pieces: list[dict], mask: Tensor) -> Tensor:
    """Of every piece of micro_batches a (b, r) or (b,) -> (B, R) or (B,) in the old order, 0 at padding."""
    whole = parts[0].new_zeros(mask.shape[: parts[0].ndim])
    for part, piece in zip(parts, pieces):
        columns = piece["mask"].shape[1]
        whole[(piece["rows"], slice(columns))[: part.ndim]] = part
    return whole.where(mask.bool(), 0) if whole.ndim == 2 else whole


@torch.no_grad()
def in_pieces(compute, model, batch: dict, size: int, *options) -> Tensor:
    """`compute(model, piece, *options)` of every micro-batch, (b, r) or (b,) each -> (B, R) or (B,)."""
    pieces = micro_batches(batch, size)
    return rejoin([compute(model, piece, *options) for piece in pieces], pieces, batch["mask"])


def response_log_probs(policy, piece: dict, temperature: float) -> Tensor:
    """Of a micro-batch, log pi of its response tokens (b, r)."""
    sequences, attention_mask, width = piece["sequences"], piece["attention_mask"], piece["prompt_width"]
    return token_log_probs(policy, sequences, attention_mask, width, temperature)


def state_values(critic, piece: dict) -> Tensor:
    """Of a micro-batch, a critic's value of the state *before* each response token (b, r).

    Column P - 1 has seen the prompt only, so it is the state before the first token; the last column has
    seen the whole response, and no token follows it."""
    return critic(piece["sequences"], piece["attention_mask"])[:, piece["prompt_width"] - 1 : -1]


def response_scores(score_model, piece: dict, name: str) -> Tensor:
    """Of a micro-batch, the score of each whole response (b,). `name` says whose ids: reward or cost."""
    ids, attention_mask = piece[f"{name}_ids"], piece[f"{name}_attention_mask"]
    return end_scores(score_model(ids, attention_mask), attention_mask)


def spans(mask: Tensor) -> list[tuple[int, int]]:
    """(B, L) -> of each row its first real column, and the one after its last."""
    first, last = mask.argmax(1), mask.shape[1] - mask.flip(1).argmax(1)
    return list(zip(first.tolist(), last.tolist()))
