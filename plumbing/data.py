"""Datasets, the prompt template, tokenizing, padding, batching and retokenization.

Schemas
    preferences  prompt, response_0, response_1, is_response_0_safe, is_response_1_safe,
                 better_response_id, safer_response_id                          (PKU-SafeRLHF)
    supervised   prompt, response                       or Alpaca's instruction, input, output
    prompts      prompt                                               (other fields are ignored)

A dataset is a JSON, JSONL or Parquet file, a folder of such files, or a hub name, where need be with a
revision and a split: `PKU-Alignment/PKU-SafeRLHF@v0:test`.

**Prompt and response are tokenized as one text**, as for the published models: `prompt + response + EOS`, no
space after "ASSISTANT:". Apart, a SentencePiece tokenizer would begin the response with a space marker that
these models have not seen there. The response begins after the prompt's own tokens. Where a token spans both
("ASSISTANT:" + "//" may hold "://") it begins at the first token that is not the prompt's, so that the loss
is on all of it; how often that happens is told. Published: datasets/preference.py, PreferenceDataset, of the
repository that reward_model.py names.

What is held is text; ids are made when a batch needs them, by the rank that needs them. All ids of 200,000
pairs at once cost every rank a minute and gigabytes.
"""

import copy
import functools
import glob
import json
import os
import random
import re
import statistics
import sys
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from tokenizers import AddedToken

from lm import pad
from plumbing.files import InputError, read_json, reading, reason, schema_error, write_json

PREFERENCE_FIELDS = {
    "prompt": str,
    "response_0": str,
    "response_1": str,
    "is_response_0_safe": bool,
    "is_response_1_safe": bool,
    "better_response_id": int,
    "safer_response_id": int,
}


def report(line: str) -> None:
    """What the user should know about the data: on stderr, once, however many processes read them."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


# ------------------------------------------------------------------------------ reading and checking


SPLIT = re.compile("train|test|valid|dev|eval")  # what the file of a part of a data set begins with


def read_rows(dataset: str) -> Iterator[tuple[str, object]]:
    """All rows of a dataset, each with its place ("file.jsonl row 7", counted from 1)."""
    files = [dataset]
    if os.path.isdir(dataset):
        pattern = os.path.join(glob.escape(dataset), "*.")
        files = sorted(file for kind in ("jsonl", "json", "parquet") for file in glob.glob(pattern + kind))
        if not files:
            raise InputError(f"{dataset}: the folder holds no .jsonl, .json or .parquet file")
        starts = {SPLIT.match(os.path.basename(file).lower()) for file in files} - {None}
        if len(splits := sorted({start.group() for start in starts})) > 1:
            problem = f"files of {' and '.join(splits)} would be read as one"
            raise InputError(f"{dataset}: {problem}. Name a file, or a folder with one of them")
    for file in files:
        kind = os.path.splitext(file)[1]
        if kind in (".jsonl", ".json", ".parquet") and not os.path.exists(file):
            raise InputError(f"{file}: no such file")
        if kind == ".jsonl":
            rows = read_lines(file)
        elif kind == ".json":
            rows = enumerate(read_list(file), 1)
        elif kind == ".parquet":
            rows = enumerate(read_parquet(file), 1)
        elif os.path.exists(file):
            raise InputError(f"{file}: not a .jsonl, .json or .parquet file")
        else:
            rows = enumerate(read_hub(file), 1)
        for number, row in rows:
            yield f"{file} row {number}", row


def read_lines(file: str) -> Iterator[tuple[int, object]]:
    """Numbered rows of JSON lines; for a line that holds none, the InputError that says why."""
    with reading(file), open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    yield number, json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                yield number, InputError("not UTF-8: compressed, binary or text in another encoding")
            except (ValueError, RecursionError) as error:
                yield number, InputError(f"not valid JSON ({reason(error)})")


def read_list(file: str) -> list:
    rows = read_json(file)
    if not isinstance(rows, list):
        raise InputError(f"{file}: expected a JSON list of rows")
    return rows


def read_parquet(file: str) -> Iterator[dict]:
    import pyarrow.parquet  # imported late: the toy needs neither Arrow nor its start-up time

    with reading(file), pyarrow.parquet.ParquetFile(file) as table:
        for piece in table.iter_batches(1000):
            yield from piece.to_pylist()


def read_hub(name: str) -> Iterator[dict]:
    """`datasets`' rows of name, name@revision, name:split or name@revision:split."""
    import datasets

    path, _, split = name.partition(":")
    path, _, revision = path.partition("@")
    try:
        rows = datasets.load_dataset(path, revision=revision or None, split=split or "train")
    except Exception as error:  # the hub client has a dozen unrelated types for "not there"
        problem = f"{type(error).__name__}: {reason(error)}"
        raise InputError(f"{name}: no such file or folder, nor to be had from the hub ({problem})") from None
    for piece in rows.iter(1000):
        yield from (dict(zip(piece, row)) for row in zip(*piece.values()))


def check_preference(row) -> str | None:
    """Why a row is no preference pair, or None."""
    if wrong := schema_error(row, PREFERENCE_FIELDS):
        return wrong
    for field in ("better_response_id", "safer_response_id"):
        if row[field] not in (0, 1):
            return f"field {field!r} should be 0 or 1, got {row[field]}"
    safe = (row["is_response_0_safe"], row["is_response_1_safe"])
    if safe[0] != safe[1] and not safe[row["safer_response_id"]]:
        safer = row["safer_response_id"]
        return f"labels contradict: response {safer} is called safer, yet only the other one is safe"
    return None


def checked(dataset: str, check, skip_bad_rows: bool) -> Iterator[dict]:
    """Rows that pass `check`. A bad row stops with its place and reason, or is skipped and counted."""
    good, skipped, first = 0, 0, ""
    for place, row in read_rows(dataset):
        wrong = str(row) if isinstance(row, InputError) else check(row)
        if wrong is None:
            good += 1
            yield row
        elif skip_bad_rows:
            skipped, first = skipped + 1, first or f"{place}: {wrong}"
        else:
            raise InputError(f"{place}: {wrong}. Repair the row, or skip such rows with --skip-bad-rows")
    if skipped:
        report(f"skipped {skipped} of {skipped + good} rows of {dataset}; the first: {first}")
    if not good:
        raise InputError(f"{dataset}: no usable row")


def load_preferences(dataset: str, winner: str, skip_bad_rows: bool = False) -> list[tuple]:
    """(prompt, winner's response, loser's response, winner is safe, loser is safe) of all pairs; `winner` is
    the field that names it, better_response_id or safer_response_id."""
    pairs = []
    for row in checked(dataset, check_preference, skip_bad_rows):
        win, lose = row[winner], 1 - row[winner]
        texts = row[f"response_{win}"], row[f"response_{lose}"]
        pairs.append((row["prompt"], *texts, row[f"is_response_{win}_safe"], row[f"is_response_{lose}_safe"]))
    return pairs


def load_prompts(dataset: str, skip_bad_rows: bool = False) -> list[str]:
    """The prompts of any dataset that has a `prompt` field. Where a row is an answer to its prompt, or a pair
    of them, each prompt counts once; in a list of prompts one that comes twice is meant to count twice."""
    rows = list(checked(dataset, lambda row: schema_error(row, {"prompt": str}), skip_bad_rows))
    if not {"response", "response_0"} & set().union(*rows):
        return [row["prompt"] for row in rows]
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    if repeated := len(rows) - len(prompts):
        report(f"{dataset}: {repeated:,} of {len(rows):,} rows repeat a prompt; each is asked once")
    return prompts


def load_supervised(dataset: str, skip_bad_rows: bool = False) -> list[tuple[str, str]]:
    """(prompt, response) pairs; Alpaca's `input` is appended to its `instruction`."""

    def check(row):
        if not (isinstance(row, dict) and "instruction" in row):
            return schema_error(row, {"prompt": str, "response": str})
        given = {"input": str} if row.get("input") is not None else {}
        return schema_error(row, {"instruction": str, "output": str} | given)

    return [
        (f"{row['instruction']} {row.get('input') or ''}".strip(), row["output"])
        if "instruction" in row
        else (row["prompt"], row["response"])
        for row in checked(dataset, check, skip_bad_rows)
    ]


# ------------------------------------------------------------------------------ text to ids


def chat_text(tokenizer, *messages: str, **options) -> str:
    """Messages of user and assistant in turn, by the tokenizer's own chat template: without a thought before
    the answer, where the template knows that option, and with a fixed date (Llama 3.2's own default) where it
    writes today's: a stage of tomorrow should see the same prompts."""
    options |= {"enable_thinking": False, "date_string": "26 Jul 2024"}
    if not tokenizer.chat_template:
        raise InputError(f"--chat-template: the tokenizer of {tokenizer.name_or_path} has no chat template")
    roles = ("user", "assistant")
    chat = [{"role": role, "content": text} for role, text in zip(roles, messages)]
    with reading(f"the chat template of {tokenizer.name_or_path}"):
        return tokenizer.apply_chat_template(chat, tokenize=False, **options)


def prompt_text(prompt: str, tokenizer=None, chat_template: bool = False) -> str:
    """Beaver's template, without a space at the end; or the tokenizer's own chat template."""
    if chat_template:
        return chat_text(tokenizer, prompt, add_generation_prompt=True)
    return f"BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:"


def special_tokens(tokenizer) -> dict[str, int]:
    return {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def after_answer(tokenizer) -> list[int]:
    """The ids that the chat template puts after an answer."""
    whole = chat_text(tokenizer, "question", "THE ANSWER")
    head, _, tail = whole.rpartition("THE ANSWER")
    prompt = prompt_text("question", tokenizer, chat_template=True)
    if head.rstrip() != prompt.rstrip():  # as where a prompt begins a thought, and no answer has one
        problem = f"puts {head[-60:]!r} before an answer and ends a prompt in {prompt[-60:]!r}"
        advice = "leave out --chat-template, or give the tokenizer a template where they agree"
        raise InputError(f"the chat template of {tokenizer.name_or_path} {problem}: {advice}")
    texts = [whole, whole.removesuffix(tail)]
    ids, before = tokenizer(texts, add_special_tokens=False).input_ids
    return ids[len(os.path.commonprefix([ids, before])) :]


def end_id(tokenizer, chat_template: bool = False) -> int:
    """The id that ends a response: EOS, or what ends a turn of the chat template, often another one."""
    special = special_tokens(tokenizer).values()
    ends = [i for i in after_answer(tokenizer) if i in special] if chat_template else []
    return ends[0] if ends else tokenizer.eos_token_id


def ending(tokenizer, chat_template: bool = False) -> list[int]:
    """The ids that close a whole response for the model of this tokenizer: its end_id. Hugging Face's reward
    models have seen the chat template to its end, and score at its last token, often a line break."""
    whole = chat_template and getattr(tokenizer, "whole_template", False)
    return (after_answer(tokenizer) if whole else []) or [end_id(tokenizer, chat_template)]


def save_tokenizer(tokenizer, folder: str, chat_template: bool = False) -> None:
    """Write the tokenizer beside a saved model, and into both what ended a response in training, so that
    transformers' generate() stops there as well: with a chat template often another id than EOS."""
    path, end = os.path.join(folder, "generation_config.json"), end_id(tokenizer, chat_template)
    if os.path.exists(path):
        stored = read_json(path)
        found = stored.get("eos_token_id")
        found = found if isinstance(found, list) else [] if found is None else [found]
        ends = list(dict.fromkeys([end, tokenizer.eos_token_id, *found]))
        write_json(path, stored | {"eos_token_id": ends if len(ends) > 1 else end})
    if end != tokenizer.eos_token_id:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    tokenizer.save_pretrained(folder)


# Noncharacters, which no text holds: around what a chat template writes, and within what a text spells
TEMPLATES, SPELLED = "\ufdd0", "\ufdd1"


def marked_prompt(tokenizer, prompt: str, chat_template: bool) -> str:
    """As prompt_text; with a chat template the special tokens that it writes, and not those that the prompt
    spells, are marked as `tokenize` finds them."""
    if not chat_template:
        return prompt_text(prompt)
    tokens = sorted(special_tokens(tokenizer), key=len, reverse=True)
    either = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
    spelled = either.sub(lambda found: found[0][:1] + SPELLED + found[0][1:], prompt)
    text = prompt_text(spelled, tokenizer, chat_template)
    return either.sub(lambda found: TEMPLATES + found[0] + TEMPLATES, text).replace(SPELLED, "")


@functools.lru_cache(8)
def marked_tokenizer(tokenizer, tokens: tuple[str, ...]) -> tuple:
    """A copy that also knows the special `tokens` as a chat template's are marked, and {its id: ours}."""
    twin, ids = copy.deepcopy(tokenizer), special_tokens(tokenizer)
    known = tokenizer.added_tokens_decoder
    for token in tokens:
        old = known[ids[token]]
        options = {name: getattr(old, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
        twin.add_tokens(AddedToken(TEMPLATES + token + TEMPLATES, special=False, **options))
    marked = twin.get_vocab()
    return twin, {marked[TEMPLATES + token + TEMPLATES]: ids[token] for token in tokens}


def tokenize(tokenizer, texts: list[str], chat_template: bool = False) -> list[list[int]]:
    """The ids of texts that begin with a `marked_prompt`; BOS as the tokenizer has it, never an EOS of its
    own at the end, which some add: a prompt goes on. A chat template writes its special tokens into the text.
    What a user's text spells ("</s>") stays text, and is split like any other."""
    special = special_tokens(tokenizer)
    twin, own = marked_tokenizer(tokenizer, tuple(special)) if chat_template else (tokenizer, {})
    options = {"add_special_tokens": not chat_template, "split_special_tokens": True}
    read = twin(texts, **options, return_attention_mask=False, return_special_tokens_mask=True)
    spelled = {i: token for token, i in special.items() if i != tokenizer.unk_token_id}

    def split(i: int) -> list[int]:  # for models whose own vocabulary holds "</s>", as Unigram's may
        model = tokenizer.backend_tokenizer.model
        return [piece.id for letter in spelled[i] for piece in model.tokenize(letter)]

    rows = []
    for ids, by_rule in zip(read.input_ids, read.special_tokens_mask):
        parts = ([own.get(i, i)] if known or i not in spelled else split(i) for i, known in zip(ids, by_rule))
        rows.append([i for part in parts for i in part])
    if not chat_template:
        rows = [ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids for ids in rows]
    words = getattr(tokenizer, "rows", sys.maxsize)  # of the model's embedding
    if beyond := next((i for ids in rows for i in ids if i >= words), None):
        token = tokenizer.convert_ids_to_tokens(beyond)
        raise InputError(f"a text holds {token!r}, id {beyond}, and the model's embedding has {words} rows")
    return rows


def encode_prompts(tokenizer, prompts: list[str], chat_template: bool = False) -> list[list[int]]:
    return tokenize(tokenizer, [marked_prompt(tokenizer, p, chat_template) for p in prompts], chat_template)


def encode_texts(
    tokenizer, pairs: list[tuple], max_length: int = sys.maxsize, chat_template: bool = False
) -> list[list[int]]:
    """(prompt, response) texts -> ids of prompt + response + EOS, cut at max_length."""
    texts = [marked_prompt(tokenizer, prompt, chat_template) + response for prompt, response in pairs]
    end = end_id(tokenizer, chat_template)
    return [(ids + [end])[:max_length] for ids in tokenize(tokenizer, texts, chat_template)]


def encode(
    tokenizer, pairs: list[tuple], max_length: int, chat_template: bool = False
) -> list[tuple[list[int], int]]:
    """(prompt, response) texts -> (ids as of encode_texts, where in them the response begins)."""
    prompts = encode_prompts(tokenizer, [prompt for prompt, _ in pairs], chat_template)
    texts = encode_texts(tokenizer, pairs, max_length, chat_template)
    return [(ids, len(os.path.commonprefix([own, ids]))) for own, ids in zip(prompts, texts)]


def encode_pairs(tokenizer, pairs: list[tuple], args) -> list[tuple]:
    """Rows of load_preferences -> (winner's ids, loser's ids, winner is safe, loser is safe)."""
    texts = [(prompt, response) for prompt, *both in pairs for response in both[:2]]
    ids = encode_texts(tokenizer, texts, args.max_length, args.chat_template)
    return [(a, b, *pair[3:]) for a, b, pair in zip(ids[0::2], ids[1::2], pairs)]


def keep_fitting(dataset: str, rows: list, tokenizer, room: int, args) -> list:
    """The rows, prompts or tuples that begin with one, whose prompt has at most `room` tokens. A longer one
    raises InputError, or is skipped and counted with --skip-bad-rows. Tells what the rows are like."""
    prompts = [row if isinstance(row, str) else row[0] for row in rows]
    once, length_of = list(dict.fromkeys(prompts)), {}
    for start in range(0, len(once), 1000):
        piece = once[start : start + 1000]
        length_of |= zip(piece, map(len, encode_prompts(tokenizer, piece, args.chat_template)))
    too_long = {i: length_of[prompt] for i, prompt in enumerate(prompts) if length_of[prompt] > room}
    limits = f"--max-length {args.max_length}"
    limits += f" less --max-new-tokens {args.max_length - room}" * (room < args.max_length - 1)
    if too_long and not args.skip_bad_rows:
        i, length = next(iter(too_long.items()))
        problem = f"{dataset}: a prompt of {length} tokens leaves no room in {limits}: {prompts[i][:60]!r}"
        raise InputError(f"{problem}. Change these flags, or skip such rows with --skip-bad-rows")
    if too_long:
        report(
            f"skipped {len(too_long)} of {len(rows)} rows of {dataset}: no room in {limits} after the prompt"
        )
        rows = [row for i, row in enumerate(rows) if i not in too_long]
    if not rows:
        raise InputError(f"{dataset}: no prompt leaves room in {limits}")
    report(description(dataset, rows, tokenizer, room, args.chat_template))
    return rows


def description(dataset: str, rows: list, tokenizer, room: int, chat_template: bool) -> str:
    """One line on rows as in `keep_fitting`, from at most 1,000 of them."""
    seen = random.Random(0).sample(rows, min(len(rows), 1000))
    texts = [(row, "") for row in seen if isinstance(row, str)]
    texts += [(row[0], text) for row in seen if isinstance(row, tuple) for text in row[1:3]]
    encoded = encode(tokenizer, texts, sys.maxsize, chat_template)
    prompts = encode_prompts(tokenizer, [prompt for prompt, _ in texts], chat_template)
    ids = [ids[:-1] for ids, _ in encoded]
    lengths = [len(own) for own in ids]
    cut = sum(length > room for length in lengths) / len(ids)
    word = tokenizer.unk_token_id
    word = None if word in (tokenizer.bos_token_id, tokenizer.eos_token_id) else word  # one id for two things
    unknown = sum(own.count(word) for own in ids) / max(1, sum(lengths))
    pairs = zip(ids[::2], ids[1::2]) if isinstance(rows[0], tuple) and len(rows[0]) > 2 else ()
    alike = sum(a[: room + 1] == b[: room + 1] for a, b in pairs) / len(seen)
    spanned = sum(begin < len(own) for (_, begin), own in zip(encoded, prompts)) / len(ids)
    median, longest = statistics.median(lengths), max(lengths)
    line = f"{dataset}: {len(rows):,} rows, median {median:.0f}, longest {longest} tokens"
    line += f" (of {len(seen):,} looked at)" * (len(seen) < len(rows))
    line += f", {cut:.1%} cut by --max-length, {unknown:.1%} unknown"
    line += f", {alike:.1%} of the pairs alike after the cut" * (alike > 0)
    line += f", {spanned:.1%} with a token across prompt and response" * (spanned > 0)
    return line + ". Warning: is this the right tokenizer?" * (unknown > 0.01)


def decode_responses(tokenizer, prompts: list[list[int]], responses: list[list[int]]) -> list[str]:
    """The texts of responses, as sampled after these prompts. Alone, a decoder may drop the space that a
    response begins with: prompt and response are decoded as one, and the prompt's text is cut off."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before = tokenizer.batch_decode(prompts, **options)
    whole = tokenizer.batch_decode([p + r for p, r in zip(prompts, responses)], **options)
    return [text[len(prompt) :] for text, prompt in zip(whole, before)]


# ------------------------------------------------------------------------------ order of samples


def batch_indices(size: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Which samples step `step` (from 0) uses: a pass over a fresh permutation per epoch.

    A pure function of its arguments, so that it is the same on every rank and after a resume."""
    indices = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, size)
        if place == 0 or not indices:
            order = torch.randperm(
                size, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            ).tolist()
        indices.append(order[place])
    return indices


# ------------------------------------------------------------------------------ other tokenizers


PROBES = [
    ("How are you?", "Fine, thanks: 1 + 2 = 3."),
    ("Où est le café?", "  Là-bas,\n\n près du 東京 hôtel…"),
]


def same_tokenizer(a, b, chat_template: bool = False) -> bool:
    """Whether ids of one can be fed to a model of the other: the same words, and the same ids of a dialogue,
    which BOS, the chat template and the treatment of spaces can change."""
    if a is b:
        return True
    if a.get_vocab() != b.get_vocab():
        return False
    highest = max(a.get_vocab().values())  # an embedding may lack the last ones, as Gemma 3 1B's
    if min(highest + 1, getattr(a, "rows", sys.maxsize)) != min(highest + 1, getattr(b, "rows", sys.maxsize)):
        return False
    return encode_texts(a, PROBES, chat_template=chat_template) == encode_texts(
        b, PROBES, chat_template=chat_template
    )


def retokenize(
    prompts: list[str], responses: list[str], ended: Iterable[bool], other, chat_template: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (B, L), right-padded, of the same texts for a model with the tokenizer `other`.

    A response that was cut off gets no EOS: the other model should see it cut off as well."""
    rows = encode_texts(other, list(zip(prompts, responses)), chat_template=chat_template)
    rows = [ids if whole else ids[:-1] for ids, whole in zip(rows, ended)]
    return pad(rows, other.pad_token_id, "right")


def end_as_trained(
    ids: torch.Tensor, mask: torch.Tensor, ended: torch.Tensor, tokenizer, chat_template: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and mask (B, L) of responses, `ended` (B,) or cut off -> (B, L') as the score model with this
    tokenizer was trained to see them, and (B,) which rows were cut to its context, and so are cut off now.

    A chat model has more than one end; a score model has seen one. Whichever was sampled, it sees that one:
    else the choice of the end would be an action that moves the score and says nothing."""
    last_ids = ending(tokenizer, chat_template)
    ids, mask = (F.pad(x, (0, len(last_ids) - 1)).clone() for x in (ids, mask))
    rows = ended.nonzero().squeeze(1)
    last = mask.shape[1] - 1 - mask[rows].flip(1).argmax(1)
    for place, token in enumerate(last_ids):
        ids[rows, last + place], mask[rows, last + place] = token, 1
    fits = mask.cumsum(1) <= getattr(tokenizer, "context", sys.maxsize)
    return ids, mask * fits, (mask.bool() & ~fits).any(1)


def scorer_ids(rollout: dict, scorers: dict, others: set[str], chat_template: bool = False) -> dict:
    """The rollout's texts in the ids of the reward and the cost model: reward_ids, reward_attention_mask,
    cost_ids, cost_attention_mask, (B, L) each, and scorer_cut (B,), whether a text was too long for one of
    them. `scorers` are their tokenizers, `others` names those that are not as the policy's."""
    result = {"scorer_cut": torch.zeros_like(rollout["ended"])}
    for name, tokenizer in scorers.items():
        ids, mask = rollout["sequences"], rollout["attention_mask"]
        if name in others:
            texts = rollout["prompts"], rollout["responses"], rollout["ended"].tolist()
            ids, mask = (x.to(ids.device) for x in retokenize(*texts, tokenizer, chat_template))
        ids, mask, cut = end_as_trained(ids, mask, rollout["ended"], tokenizer, chat_template)
        result |= {f"{name}_ids": ids, f"{name}_attention_mask": mask}
        result["scorer_cut"] |= cut
    return result
