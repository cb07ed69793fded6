"""(temporary)"""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import SIZES, build
from test_models import LLAMA, SMALL, V
from test_tokenizers import byte_level, chatty, sentencepiece, wrap, CHATML, SPECIAL
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, decoders
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
)

import lm
import repo_ppo
import safe_rlhf_ppo
from lm import end_scores, generate, token_log_probs
from plumbing import adapters, data, loading
from plumbing.files import InputError, read_json, write_json
from plumbing.loading import load_causal_lm, load_score_model, load_tokenizer


@pytest.fixture(scope="module")
def bpe():
    return byte_level()


# A1, A5
def test_whichever_end_was_sampled_a_score_model_sees_the_one_it_knows(bpe):
    tokenizer = chatty(bpe)
    eos, turn = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    prompt, = data.encode_prompts(tokenizer, ["open a lock"], chat_template=True)
    answer = tokenizer("turn keys .").input_ids
    (wanted,) = data.encode_texts(tokenizer, [("open a lock", "turn keys .")], chat_template=True)
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
            real = [row[m.bool()].tolist() for row, m in zip(ids[f"{name}_ids"], ids[f"{name}_attention_mask"])]
            assert real[:2] == [wanted + tail] * 2 and real[2] == data.encode_texts(
                tokenizer, [("open a lock", "turn keys .turn")], chat_template=True)[0][:-1]
        assert torch.equal(rollout["sequences"], before) and not ids["scorer_cut"].any()


def test_a_hugging_face_reward_model_is_read_where_transformers_reads_it(bpe, tmp_path):
    tokenizer = chatty(bpe)
    torch.manual_seed(0)
    config = Qwen2Config(**LLAMA, **SMALL | {"vocab_size": len(tokenizer)}, num_labels=1)
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
        ids, mask, _ = data.close(*lm.pad(pairs, 0, "right"), torch.tensor([True]), own, True)
        torch.testing.assert_close(end_scores(ours(ids, mask), mask), want)


# B14
def test_a_text_beyond_a_score_models_context_is_cut_off_and_counted(bpe):
    own = copy.deepcopy(bpe)
    own.context = 20
    ids, mask = data.retokenize(["open a lock"] * 2, ["turn keys . " * 9, "oil"], [True, True], own)
    cut_ids, cut_mask, cut = data.close(ids, mask, torch.tensor([True, True]), own)
    assert cut.tolist() == [True, False] and cut_mask.sum(1).tolist() == [20, int(mask[1].sum())]
    assert torch.equal(cut_ids[0][cut_mask[0].bool()], ids[0, :20])


@pytest.mark.parametrize("skip", [True, False])
def test_a_token_may_be_shorter_than_a_byte(skip):
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers import trainers
    backend.train_from_iterator(["a"], trainers.BpeTrainer(special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = wrap(backend)
    args = SimpleNamespace(max_length=200, chat_template=False, skip_bad_rows=skip)
    rows = [("\ufdfa" * 10, "a"), ("b", "a")]  # 30 bytes, and 33 a letter when it is written out
    if skip:
        assert data.keep_fitting("x", rows, tokenizer, 199, args) == rows[1:]
    else:
        with pytest.raises(InputError, match="x: a prompt of 37[0-9] tokens leaves no room"):
            data.keep_fitting("x", rows, tokenizer, 199, args)


# A3
@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "GPT2TokenizerFast", "LlamaTokenizerFast", None])
def test_ids_are_those_of_tokenizer_json(bpe, tmp_path, kind):
    backend = Tokenizer.from_str(bpe.backend_tokenizer.to_str())
    digits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer = wrap(backend)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path)
    Qwen2Config(**LLAMA, **SMALL | {"vocab_size": len(tokenizer)}).save_pretrained(tmp_path)
    config = read_json(tmp_path / "tokenizer_config.json")
    del config["tokenizer_class"]
    write_json(str(tmp_path / "tokenizer_config.json"), config | ({"tokenizer_class": kind} if kind else {}))
    stored = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(str(tmp_path))
    ours.save_pretrained(tmp_path / "again")
    again = load_tokenizer(str(tmp_path / "again"))
    for text in ("In 2023, don't turn keys .", "  Là-bas,\n\n près 東京", "a</s>b"):
        want = stored.encode(text, add_special_tokens=False).ids
        assert ours(text).input_ids == again(text).input_ids == AutoTokenizer.from_pretrained(tmp_path / "again")(text).input_ids == want
    assert (ours.eos_token, ours.unk_token_id, ours.chat_template) == ("</s>", 2, CHATML)


# A10
def test_what_a_user_spells_is_text(bpe, tmp_path):
    for base in (bpe, sentencepiece(models.BPE(unk_token="<unk>", fuse_unk=True))):
        tokenizer = chatty(base)
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        texts = ("The tag </s> ends <|im_end|> a strike", " and </s>")
        for chat, last in ((False, 1), (True, end)):
            (ids, begin), = data.encode(tokenizer, [texts], 999, chat)
            (plain, at), = data.encode(tokenizer, [("The tag", " and")], 999, chat)
            special = set(tokenizer.all_special_ids)
            assert [i for i in ids if i in special] == [i for i in plain if i in special] and ids[-1] == last
            assert tokenizer.decode(ids[begin:-1]).strip() == "and </s>"
            said, = data.decode_responses(tokenizer, [ids[:begin]], [ids[begin:-1]])
            assert said == " and </s>"


def test_a_special_token_that_cannot_be_split_is_told(toy_tokenizer, capsys):
    args = SimpleNamespace(max_length=48, chat_template=False, skip_bad_rows=False)
    data.keep_fitting("x", [("open a lock", "turn </s> keys"), ("open a lock", "oil")], toy_tokenizer, 47, args)
    assert "50.0% spell a special token that cannot be split" in capsys.readouterr().err


# A12
def test_a_saved_model_stops_where_training_stopped(bpe, tmp_path):
    tokenizer = chatty(bpe)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    policy = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA, **SMALL | {"vocab_size": len(tokenizer)}))
    for chat, ends in ((False, 1), (True, [end, 1])):
        loading.save_causal_lm(policy, policy.state_dict(), str(tmp_path))
        loading.save_tokenizer(tokenizer, str(tmp_path), chat)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert again.generation_config.eos_token_id == ends
    own = load_tokenizer(str(tmp_path))
    assert own.eos_token == "<|im_end|>" and data.end_id(own, True) == end
    assert loading.end_ids(str(tmp_path), own) == [end, 1]


# A8, A11
def test_an_answer_is_no_new_prompt(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": p} for p in "abaa"]
    for more, want in (({}, list("abaa")), ({"response": "r"}, ["a", "b"]), ({"response_0": "r"}, ["a", "b"])):
        path.write_text("".join(json.dumps(row | more) + "\n" for row in rows))
        assert data.load_prompts(str(path)) == want
    assert capsys.readouterr().err.count("2 of 4 rows repeat a prompt; each is asked once") == 2


@pytest.mark.parametrize("script", [safe_rlhf_ppo, repo_ppo])
def test_ptx_does_not_walk_in_step_with_the_prompts(script, toy_tokenizer):
    prompts = ["open a lock", "fix a lock", "oil a lock", "turn a lock"] * 8
    rows = [(f"{p} " + "lock " * i, "turn") for i, p in enumerate(prompts)]
    args = SimpleNamespace(minibatch_size=16, seed=0, max_length=99, chat_template=False, micro_batch_size=16)
    asked = data.encode_prompts(toy_tokenizer, [rows[i][0] for i in data.batch_indices(32, 16, 0, 0)])
    ((sequences, mask, width),) = script.ptx_batch(rows, 0, toy_tokenizer, args)
    supervised = [row[m.bool()].tolist()[:-2] for row, m in zip(sequences, mask)]
    assert 0 < sum(row in asked for row in supervised) < 14


# A2
@pytest.mark.parametrize("how", ["whole", "adapted"])
def test_tensors_that_differ_are_not_tied_whatever_the_config_says(tmp_path, how):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**LLAMA, **SMALL, initializer_range=0.3)).eval()
    model.save_pretrained(tmp_path / "start")
    write_json(str(tmp_path / "start/config.json"), read_json(tmp_path / "start/config.json") | {"tie_word_embeddings": True})
    ids = torch.randint(2, V, (2, 6))
    ours = load_causal_lm(str(tmp_path / "start"))
    torch.testing.assert_close(ours(ids).logits, model(ids).logits)
    state = ours.state_dict()
    if how == "adapted":
        args = SimpleNamespace(lora_rank=2, lora_alpha=4.0, lora_targets=None, lora_output=True)
        ours = adapters.adapt(ours, args)
        state = adapters.merged(ours, ours.state_dict())
    loading.save_causal_lm(ours, state, str(tmp_path / "again"))
    for again in (load_causal_lm(str(tmp_path / "again")), AutoModelForCausalLM.from_pretrained(tmp_path / "again")):
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
    meta = load_causal_lm(str(tmp_path / "start"), on_meta=True)
    assert meta.lm_head.weight is not meta.model.embed_tokens.weight


# A4
def test_tables_that_switch_with_the_longest_text_are_used_up_to_there(tmp_path):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 2, "long_factor": [8.0] * 2}
    config = Phi3Config(**LLAMA, **SMALL, rope_parameters=rope, original_max_position_embeddings=12, initializer_range=0.3)
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(2, V, (1, 14))

    def first(long: int):  # log-probabilities of a row of 8 tokens beside one of `long`
        beside = torch.zeros(2, long).long()
        beside[0, :8], beside[1] = ids[0, :8], ids[0, :long]
        mask = torch.ones_like(beside)
        mask[0, 8:] = 0
        return token_log_probs(policy, beside, mask, 4)[0, :4]

    torch.testing.assert_close(first(12), first(8), atol=1e-5, rtol=1e-5)
    assert (first(13) - first(8)).abs().max() > 0.1  # what it is about
    loading.check_context(config, 12, "here")
    with pytest.raises(InputError, match="--max-length 13 exceeds the context of here, 12 tokens: beyond them its longrope"):
        loading.check_context(config, 13, "here")
    dynamic = LlamaConfig(**LLAMA, **SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    loading.check_context(dynamic, 64, "here")
    with pytest.raises(InputError, match="64 tokens: beyond them its dynamic positions depend on the longest"):
        loading.check_context(dynamic, 65, "here")
    kinds = {"full_attention": rope | {"original_max_position_embeddings": 9}, "sliding_attention": {"rope_type": "default"}}
    assert lm.context_length(SimpleNamespace(max_position_embeddings=64, rope_parameters=kinds)) == 9


# A6
def test_an_adapter_beside_the_weights_is_not_passed_over(tmp_path):
    AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA, **SMALL)).save_pretrained(tmp_path)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
        for load in (load_causal_lm, lambda path: load_score_model(path, "reward", new_head=True)):
            with pytest.raises(InputError, match=f"holds {name}: the weights beside an adapter are its base's"):
                load(str(tmp_path))
        (tmp_path / name).unlink()


# B15
def test_ids_of_no_token_are_neither_sampled_nor_counted(toy_tokenizer, tmp_path):
    words = len(toy_tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(**LLAMA, **SMALL | {"vocab_size": words + 64}, initializer_range=0.3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    toy_tokenizer.save_pretrained(tmp_path)
    policy = load_causal_lm(str(tmp_path))
    prompts = torch.randint(4, words, (32, 5))
    ones = torch.ones_like(prompts)
    for temperature, top_p in ((1.0, 1.0), (1.0, 0.9), (0, 1.0)):
        sequences, log_probs = generate(policy, prompts, ones, 20, temperature, top_p)
        assert sequences.max() < words
        if temperature and top_p == 1:
            reference = adapters.WithoutAdapters(policy)
            for model in (policy, reference):
                fresh = token_log_probs(model, sequences, torch.ones_like(sequences), 5)
                torch.testing.assert_close(log_probs, fresh.detach(), atol=1e-4, rtol=1e-4)
    pairs = torch.cat([prompts[:1].expand(words + 64, 5), torch.arange(words + 64)[:, None]], 1)
    probs = token_log_probs(policy, pairs, torch.ones_like(pairs), 5).exp()[:, 0]
    assert probs[words:].max() == 0 and probs.sum().item() == pytest.approx(1, abs=1e-5)
    probs[:words].sum().backward()
    assert all(p.grad.isfinite().all() for p in policy.parameters())
