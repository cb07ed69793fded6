"""Text to ids and back with the tokenizers that models have: SentencePiece, byte-level BPE, the toy's."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

import lm
import toy_world
from lm import ScoreModel, end_scores, generate, response_mask
from plumbing import data
from plumbing.files import InputError, read_json, write_json
from plumbing.loading import end_ids, load_score_model, load_tokenizer, save_causal_lm

PROMPTS = ["open a lock", "how do i call a dog that i found outside ?"]
RESPONSES = [
    "Hello there, oil springs .",
    " turn keys . turn keys .",  # a policy may well say a space first
    "  two spaces, then\n\na list:\n* Don't , do it .",
    "//turn ... :)",
    "Là-bas, près du 東京 hôtel 😀",
    "",
]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
SPECIAL = ["<pad>", "</s>", "<unk>", "<s>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def corpus() -> list[str]:
    """With "://" often enough to be a token across prompt and response."""
    texts = [data.prompt_text(p) + f" {p} at http://{p.split()[0]}://x" for p in list(toy_world.PROMPTS)[::5]]
    return texts + [*toy_world.PLAIN, *toy_world.RISKY, *toy_world.CARE, *toy_world.REFUSALS, *RESPONSES] * 3


def wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    names = dict(zip(("pad_token", "eos_token", "unk_token", "bos_token"), SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def sentencepiece(model) -> PreTrainedTokenizerFast:
    """As Llama's: spaces are markers, one is put in front of the text, unknown letters are bytes, BOS."""
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    options = {"vocab_size": 900, "special_tokens": SPECIAL + [f"<0x{i:02X}>" for i in range(256)]}
    if isinstance(model, models.Unigram):
        trainer = trainers.UnigramTrainer(**options, unk_token="<unk>")
    else:
        trainer = trainers.BpeTrainer(**options)
    backend.train_from_iterator(corpus(), trainer)
    trained = json.loads(backend.to_str())
    trained["added_tokens"] = trained["added_tokens"][: len(SPECIAL)]  # bytes are words like any other
    trained["model"]["byte_fallback"] = True
    backend = Tokenizer.from_str(json.dumps(trained))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    space = decoders.Replace("▁", " ")
    steps = [space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 3)])
    return wrap(backend)


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's, Llama 3's, Qwen's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet)
    backend.train_from_iterator(corpus(), trainer)
    return wrap(backend)


@pytest.fixture(scope="module")
def tokenizers() -> dict:
    return {
        "sentencepiece bpe": sentencepiece(models.BPE(unk_token="<unk>", fuse_unk=True)),
        "sentencepiece unigram": sentencepiece(models.Unigram()),
        "byte-level bpe": byte_level(),
        "toy": toy_world.build_tokenizer(),
    }


KINDS = ("sentencepiece bpe", "sentencepiece unigram", "byte-level bpe", "toy")


# ------------------------------------------------------------------------------ one text


@pytest.mark.parametrize("kind", KINDS[:3])
def test_prompt_and_response_are_tokenized_as_one_text(tokenizers, kind):
    tokenizer = tokenizers[kind]
    for prompt in PROMPTS:
        for response in RESPONSES:
            published = tokenizer(data.prompt_text(prompt) + response + tokenizer.eos_token).input_ids
            assert data.encode(tokenizer, [(prompt, response)], 999)[0][0] == published


@pytest.mark.parametrize("kind", KINDS)
def test_the_response_begins_after_the_prompts_own_tokens_unless_a_token_spans_both(tokenizers, kind, capsys):
    tokenizer, prompt = tokenizers[kind], PROMPTS[0]
    own = data.encode_prompts(tokenizer, [prompt])[0]
    for response in RESPONSES:
        (ids, begin), = data.encode(tokenizer, [(prompt, response)], 999)  # fmt: skip
        spans = response.startswith("//") and kind != "toy"
        assert (begin < len(own)) == spans, response
        assert ids[:begin] == own[:begin] and ids[-1] == tokenizer.eos_token_id
        assert ("://" in tokenizer.convert_ids_to_tokens(ids[begin:])) == spans
    args = SimpleNamespace(max_length=999, chat_template=False, skip_bad_rows=False)
    data.keep_fitting("pairs", [(prompt, "//turn"), (prompt, "turn")], tokenizer, 998, args)
    told = "50.0% with a token across prompt and response" in capsys.readouterr().err
    assert told == (kind != "toy")


@pytest.mark.parametrize("kind", KINDS)
def test_a_response_scores_the_same_from_its_ids_and_from_its_text(tokenizers, kind):
    """For the tokenizer's own segmentation, which is what a trained policy nearly always says."""
    tokenizer = tokenizers[kind]
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=256)
    model = ScoreModel(GPT2Model(config).eval(), "reward")
    texts = RESPONSES if kind != "toy" else ["oil springs . turn keys .", "turn"]
    texts = [text for text in texts if not text.startswith("//")]
    prompts = data.encode_prompts(tokenizer, PROMPTS[:1] * len(texts))
    rows = data.encode(tokenizer, [(PROMPTS[0], text) for text in texts], 999)
    sampled = [ids[begin:-1] for ids, begin in rows]
    said = data.decode_responses(tokenizer, prompts, sampled)
    assert said == texts  # to the letter, the space at the start included
    ids, mask = lm.pad([ids for ids, _ in rows], 0, "right")
    again, again_mask = data.retokenize(PROMPTS[:1] * len(texts), said, [True] * len(texts), tokenizer)
    assert torch.equal(end_scores(model(ids, mask), mask), end_scores(model(again, again_mask), again_mask))


# ------------------------------------------------------------------------------ BOS, EOS and chat templates


def changed(tokenizer, template: str):
    """A copy with another post-processor, as a tokenizer.json may bring it."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    specials = [("<s>", 3), ("</s>", 1)]
    backend.post_processor = processors.TemplateProcessing(template, special_tokens=specials)
    return wrap(backend)


def chatty(tokenizer):
    """A copy with ChatML, whose turns end with an id that is not EOS."""
    copy = wrap(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    copy.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    copy.chat_template = CHATML
    return copy


def test_a_prompt_never_ends_with_eos_and_a_text_has_one(tokenizers):
    plain = tokenizers["sentencepiece bpe"]
    both = changed(plain, "<s> $A </s>")
    assert both("a").input_ids[-1] == both.eos_token_id
    assert data.encode_prompts(both, PROMPTS) == data.encode_prompts(plain, PROMPTS)
    pairs = [(prompt, RESPONSES[0]) for prompt in PROMPTS]
    assert data.encode(both, pairs, 999) == data.encode(plain, pairs, 999)


def test_a_chat_template_brings_its_own_special_tokens(tokenizers):
    tokenizer = chatty(tokenizers["sentencepiece bpe"])
    prompt, = data.encode_prompts(tokenizer, PROMPTS[:1], chat_template=True)  # fmt: skip
    assert prompt[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")  # and no BOS before it
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert data.end_id(tokenizer, chat_template=True) == end != data.end_id(tokenizer)
    (ids, begin), = data.encode(tokenizer, [(PROMPTS[0], "turn keys .")], 999, True)  # fmt: skip
    whole = data.chat_text(tokenizer, PROMPTS[0], "turn keys .")
    assert ids == tokenizer(whole.removesuffix("\n"), add_special_tokens=False).input_ids
    assert ids[:begin] == prompt and ids[-1] == end
    tokenizer.chat_template = "{{ messages[0]['subject'].x }}"
    with pytest.raises(data.InputError, match="chat template of .*: cannot be read"):
        data.prompt_text("hi", tokenizer, chat_template=True)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="has no chat template"):
        data.prompt_text("hi", tokenizer, chat_template=True)


# as Qwen 3's: an answer has a thought, which is empty unless the model is to think
THINKING = (
    "Today is {{ date_string if date_string is defined else strftime_now('%d %b %Y') }}.\n"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}"
)


def test_a_prompt_is_what_the_template_puts_before_an_answer_today_and_tomorrow(tokenizers):
    tokenizer = chatty(tokenizers["byte-level bpe"])
    tokenizer.chat_template = THINKING
    prompt = data.prompt_text(PROMPTS[0], tokenizer, True)
    assert prompt.startswith("Today is 26 Jul 2024.") and prompt.endswith("<think>\n\n</think>\n\n")
    assert data.chat_text(tokenizer, PROMPTS[0], "turn keys .") == prompt + "turn keys .<|im_end|>\n"
    assert data.end_id(tokenizer, True) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.chat_template = THINKING.replace("enable_thinking is false", "false")
    for use in (data.end_id, lambda *a: data.encode(a[0], [(PROMPTS[0], "turn")], 99, a[1])):
        with pytest.raises(InputError, match=r"before an answer and ends a prompt in .*<think>\\n'"):
            use(tokenizer, True)


def test_same_tokenizer_compares_what_a_model_is_fed(tokenizers):
    plain = tokenizers["sentencepiece bpe"]
    same = wrap(Tokenizer.from_str(plain.backend_tokenizer.to_str()))
    assert data.same_tokenizer(plain, same)
    assert not data.same_tokenizer(plain, changed(plain, "$A"))  # the same words, no BOS
    assert data.same_tokenizer(plain, changed(plain, "<s> $A </s>"))  # an EOS that no prompt keeps
    ours, theirs = chatty(plain), chatty(plain)
    theirs.chat_template = CHATML.replace("<|im_start|>", "<|im_start|>the ")
    assert data.same_tokenizer(ours, theirs) and not data.same_tokenizer(ours, theirs, chat_template=True)
    spaces = byte_level()
    spaces.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert not data.same_tokenizer(byte_level(), spaces)


def test_every_id_that_ends_a_response_ends_it_and_is_kept(tmp_path, tokenizers):
    responses = torch.tensor([[5, 7, 5, 5], [5, 1, 7, 5], [5, 5, 5, 5]])
    assert response_mask(responses, [1, 7]).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert torch.equal(response_mask(responses, 7), response_mask(responses, [7]))

    class Counter(torch.nn.Module):
        """Says the next id after the last one."""

        def forward(self, input_ids, **_):
            logits = torch.nn.functional.one_hot(input_ids[:, -1:] + 1, 12).float()
            return SimpleNamespace(logits=logits, past_key_values=None)

    prompts = torch.tensor([[1], [5]])
    sequences, _ = generate(Counter(), prompts, torch.ones_like(prompts), 9, 0, 1.0, [3, 7], 0)
    assert sequences.tolist() == [[1, 2, 3], [5, 6, 7]]

    tokenizers["toy"].save_pretrained(tmp_path)
    assert end_ids(str(tmp_path), tokenizers["toy"]) == [1]
    for stored, expected in ((7, [1, 7]), ([1, 7, 9], [1, 7, 9]), (None, [1])):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stored}))
        assert end_ids(str(tmp_path), tokenizers["toy"]) == expected
    for damaged in ([1], {"eos_token_id": "</s>"}, {"eos_token_id": [1, "x"]}):
        (tmp_path / "generation_config.json").write_text(json.dumps(damaged))
        with pytest.raises(data.InputError, match="generation_config.json: eos_token_id should hold ids"):
            end_ids(str(tmp_path), tokenizers["toy"])


def test_a_sentencepiece_file_alone_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("plumbing.loading.find_spec", lambda name: None)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(data.InputError, match="pip install sentencepiece"):
        load_tokenizer(str(tmp_path))


# ------------------------------------------------------------------------------ whose ids, and which end


def test_whichever_end_was_sampled_a_score_model_sees_the_one_it_knows(tokenizers):
    tokenizer = chatty(tokenizers["byte-level bpe"])
    eos, turn = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    (prompt,) = data.encode_prompts(tokenizer, ["open a lock"], chat_template=True)
    answer = tokenizer("turn keys .").input_ids
    texts = [("open a lock", "turn keys ."), ("open a lock", "turn keys .turn")]
    wanted, (*cut_off, _) = data.encode_texts(tokenizer, texts, chat_template=True)
    rows = [answer + [eos], answer + [turn], answer + answer[:1]]
    sequences, mask, _ = lm.frame([(prompt + row, len(prompt)) for row in rows], 0)
    rollout = {"sequences": sequences, "attention_mask": mask, "ended": torch.tensor([True, True, False])}
    rollout |= {"prompts": ["open a lock"] * 3, "responses": ["turn keys ."] * 2 + ["turn keys .turn"]}
    before = sequences.clone()
    whole = copy.deepcopy(tokenizer)  # of a Hugging Face reward model
    whole.whole_template = True
    scorers = {"reward": tokenizer, "cost": whole}
    line = tokenizer("\n").input_ids
    for others in ({}, scorers):
        ids = data.scorer_ids(rollout, scorers, others, True)
        for name, tail in (("reward", []), ("cost", line)):
            read = zip(ids[f"{name}_ids"], ids[f"{name}_attention_mask"])
            assert [row[m.bool()].tolist() for row, m in read] == [wanted + tail] * 2 + [cut_off]
        assert torch.equal(rollout["sequences"], before) and not ids["scorer_cut"].any()


def test_a_hugging_face_reward_model_is_read_where_transformers_reads_it(tokenizers, tmp_path):
    tokenizer = chatty(tokenizers["byte-level bpe"])
    torch.manual_seed(0)
    config = Qwen2Config(**SIZES, vocab_size=len(tokenizer), num_labels=1)
    theirs = AutoModelForSequenceClassification.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    own, ours = load_tokenizer(str(tmp_path)), load_score_model(str(tmp_path), "reward")
    for response in ("turn keys .", " oil", "\nspring"):
        chat = [{"role": "user", "content": "open a lock"}, {"role": "assistant", "content": response}]
        text = own.apply_chat_template(chat, tokenize=False)
        ids = own(text, add_special_tokens=False, return_tensors="pt").input_ids
        want = theirs(ids).logits[0]
        pairs = data.encode_texts(own, [("open a lock", response)], chat_template=True)
        ids, mask, _ = data.end_as_trained(*lm.pad(pairs, 0, "right"), torch.tensor([True]), own, True)
        torch.testing.assert_close(end_scores(ours(ids, mask), mask), want)


def test_a_text_beyond_a_score_models_context_is_cut_off_and_counted(tokenizers):
    own = copy.deepcopy(tokenizers["byte-level bpe"])
    own.context = 20
    ids, mask = data.retokenize(["open a lock"] * 2, ["turn keys . " * 9, "oil"], [True, True], own)
    cut_ids, cut_mask, cut = data.end_as_trained(ids, mask, torch.tensor([True, True]), own)
    assert cut.tolist() == [True, False] and cut_mask.sum(1).tolist() == [20, int(mask[1].sum())]
    assert torch.equal(cut_ids[0][cut_mask[0].bool()], ids[0, :20])


@pytest.mark.parametrize("skip", [True, False])
def test_a_token_may_be_shorter_than_a_byte(skip):
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(["a"], trainers.BpeTrainer(special_tokens=SPECIAL, initial_alphabet=alphabet))
    tokenizer = wrap(backend)
    args = SimpleNamespace(max_length=200, chat_template=False, skip_bad_rows=skip)
    rows = [("\ufdfa" * 10, "a"), ("b", "a")]  # 30 bytes, and 33 a letter when it is written out
    if skip:
        assert data.keep_fitting("x", rows, tokenizer, 199, args) == rows[1:]
    else:
        with pytest.raises(InputError, match="x: a prompt of 37[0-9] tokens leaves no room"):
            data.keep_fitting("x", rows, tokenizer, 199, args)


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "GPT2TokenizerFast", "LlamaTokenizerFast", None])
def test_ids_are_those_of_tokenizer_json(tokenizers, tmp_path, kind):
    backend = Tokenizer.from_str(tokenizers["byte-level bpe"].backend_tokenizer.to_str())
    rule = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+"), "isolated")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([rule, bytewise])
    tokenizer = wrap(backend)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path)
    Qwen2Config(**SIZES, vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    config = read_json(tmp_path / "tokenizer_config.json")
    del config["tokenizer_class"]
    write_json(str(tmp_path / "tokenizer_config.json"), config | ({"tokenizer_class": kind} if kind else {}))
    stored = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(str(tmp_path))
    ours.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    for text in ("In 2023, don't turn keys .", "  Là-bas,\n\n près 東京", "a</s>b"):
        want = stored.encode(text, add_special_tokens=False).ids
        assert ours(text).input_ids == again(text).input_ids == want
    assert (ours.eos_token, ours.unk_token_id, ours.chat_template) == ("</s>", 2, CHATML)


def test_what_a_user_spells_is_text(tokenizers):
    for kind in KINDS:
        tokenizer = chatty(tokenizers[kind])
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        texts = ("The tag </s> ends <|im_end|> a strike", " and </s>")
        for chat, last in ((False, 1), (True, end)):
            pair = [texts, ("The tag", " and")]
            (ids, begin), (plain, _) = data.encode(tokenizer, pair, 999, chat)
            special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
            assert [i for i in ids if i in special] == [i for i in plain if i in special] and ids[-1] == last
            said = data.decode_responses(tokenizer, [ids[:begin]], [ids[begin:-1]])
            assert said == [" and </s>"] or kind == "toy"  # which has no such letters


def test_a_saved_model_stops_where_training_stopped(tokenizers, tmp_path):
    tokenizer = chatty(tokenizers["byte-level bpe"])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    policy = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES, vocab_size=len(tokenizer)))
    for chat, ends in ((False, 1), (True, [end, 1])):
        save_causal_lm(policy, policy.state_dict(), str(tmp_path))
        data.save_tokenizer(tokenizer, str(tmp_path), chat)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert again.generation_config.eos_token_id == ends
    own = load_tokenizer(str(tmp_path))
    assert own.eos_token == "<|im_end|>" and data.end_id(own, True) == end
    assert end_ids(str(tmp_path), own) == [end, 1]
