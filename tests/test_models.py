"""Score models, checkpoints, sampling and log-probabilities, on tiny GPT-2, Llama and Qwen2 models."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    Phi3Config,
    Qwen2Config,
)

import evaluate
import lm
import repo_ppo
import safe_rlhf_ppo
import toy_world
from lm import generate, response_mask, token_log_probs
from plumbing import adapters, data, distributed, loading, runs
from plumbing.files import InputError, read_json, write_json
from plumbing.loading import load_causal_lm, load_score_model, load_tokenizer

REFERENCE = Path(__file__).parent / "reference_cases"
V = 32
SMALL = {"vocab_size": V, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT2 |= {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
CONFIGS = {
    "gpt2": GPT2Config(**GPT2, **SMALL),
    "llama": LlamaConfig(**LLAMA, **SMALL),
    "qwen2": Qwen2Config(**LLAMA, **SMALL),
}


@pytest.fixture(scope="module", params=CONFIGS)
def policy(request):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()
    for parameter in model.parameters():  # larger weights: a distribution worth sampling from
        parameter.data *= 1 if parameter.ndim < 2 else 8
    return model


@pytest.fixture
def prompts():
    torch.manual_seed(1)
    ids = torch.randint(2, V, (6, 5))
    mask = torch.tensor([[0] * k + [1] * (5 - k) for k in (0, 1, 2, 3, 0, 4)])
    return ids * mask, mask


# ------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("pad", [0, 1])  # 1: PAD is EOS
def test_sampled_log_probs_equal_a_fresh_forward_pass(policy, prompts, temperature, pad):
    ids, prompt_mask = prompts
    torch.manual_seed(2)
    special = {"eos_token_id": 1, "pad_token_id": pad}
    sequences, log_probs = generate(policy, ids, prompt_mask, 12, temperature, **special)
    mask = response_mask(sequences[:, 5:], 1)
    assert mask.sum(1).min() < 12  # some responses ended early
    fresh = token_log_probs(policy, sequences, torch.cat([prompt_mask, mask], 1), 5, temperature)
    real = mask.bool()
    assert (log_probs - fresh)[real].abs().max() < 1e-5
    assert (log_probs[~real] == 0).all() and (sequences[:, 5:][~real] == pad).all()


def test_eos_is_part_of_the_response_also_when_it_is_the_pad():
    """Deliberate difference: PKU's implementation masks every UNK token out of a response, and with it the
    EOS of tokenizers where UNK = EOS. Here only what follows the first EOS is masked."""
    for response, mask in (
        ([5, 1, 1, 1], [1, 1, 0, 0]),
        ([1, 1, 1, 1], [1, 0, 0, 0]),
        ([5, 6, 7, 8], [1] * 4),
    ):
        assert response_mask(torch.tensor([response]), 1).tolist() == [mask]


def test_top_p_log_probs_are_those_of_the_truncated_distribution(policy, prompts):
    ids, prompt_mask = prompts
    torch.manual_seed(3)
    sequences, log_probs = generate(policy, ids, prompt_mask, 1, 1.3, 0.6)
    positions = lm.position_ids(prompt_mask)
    with torch.no_grad():
        logits = policy(ids, attention_mask=prompt_mask, position_ids=positions).logits[:, -1]
    for row, token in enumerate(sequences[:, 5]):
        probs, order = torch.softmax(logits[row] / 1.3, -1).sort(descending=True)
        kept = int((probs.cumsum(0) < 0.6).sum()) + 1  # the word that crosses 0.6 is the last one in
        assert token in order[:kept]
        expected = (probs[order == token] / probs[:kept].sum()).log().item()
        assert log_probs[row, 0].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_samples_follow_the_distribution(policy, top_p):
    """Chi-square of 20,000 first tokens against the model's probabilities, at the 0.1% level."""
    torch.manual_seed(4)
    ids, n = torch.tensor([[3, 4, 5]]), 20_000
    with torch.no_grad():
        expected = torch.softmax(policy(ids).logits[0, -1].double(), -1)
    if top_p < 1:
        expected = lm.truncate_top_p(expected[None], top_p)[0]
    sequences, _ = generate(policy, ids.expand(n, 3), torch.ones(n, 3).long(), 1, 1.0, top_p)
    counts = torch.bincount(sequences[:, 3], minlength=V).double()
    assert counts[expected == 0].sum() == 0
    common = expected * n >= 5
    chi2 = ((counts - expected * n).square() / (expected * n))[common].sum().item()
    degrees = int(common.sum()) - 1
    # above the 0.1% quantile for every number of degrees
    assert chi2 < degrees + 3.1 * (2 * degrees) ** 0.5 + 7


def test_a_cache_written_in_place_changes_no_bit(policy, prompts, monkeypatch):
    ids, mask = prompts
    uniforms = torch.rand(6, 12, generator=torch.Generator().manual_seed(5))
    rooms = []
    hook = policy.register_forward_hook(lambda *args: rooms.append(args[-1].past_key_values.layers[-1]))
    in_place = generate(policy, ids, mask, 12, uniforms=uniforms)
    assert type(rooms[-1]) is lm.PreallocatedLayer and rooms[-1].get_seq_length() == 5 + 11
    assert rooms[-1].keys.untyped_storage().data_ptr() == rooms[1].keys.untyped_storage().data_ptr()
    monkeypatch.setattr(lm, "DynamicLayer", None)  # then every layer stays as transformers has made it
    grown = generate(policy, ids, mask, 12, uniforms=uniforms)
    hook.remove()
    assert type(rooms[-1]) is not lm.PreallocatedLayer
    assert all(torch.equal(a, b) for a, b in zip(in_place, grown, strict=True))


def test_rows_that_have_ended_are_dropped_and_the_others_do_not_notice(policy, prompts):
    ids, mask = prompts
    uniforms = torch.rand(6, 20, generator=torch.Generator().manual_seed(7))
    sizes, special = [], {"eos_token_id": list(range(1, 6)), "pad_token_id": 0}
    hook = policy.register_forward_hook(lambda *args: sizes.append(len(args[-1].logits)))
    sequences, log_probs = generate(policy, ids, mask, 20, uniforms=uniforms, **special)
    hook.remove()
    assert sizes[0] == 6 and sizes == sorted(sizes, reverse=True) and len(set(sizes)) >= 3
    for row in range(6):
        one = slice(row, row + 1)
        alone, its_own = generate(policy, ids[one], mask[one], 20, uniforms=uniforms[one], **special)
        length = alone.shape[1]
        assert torch.equal(sequences[row, :length], alone[0]) and not sequences[row, length:].any()
        torch.testing.assert_close(log_probs[row, : length - 5], its_own[0])
        assert not log_probs[row, length - 5 :].any()


# ------------------------------------------------------------------------------ log-probabilities


def cuts(result: torch.Tensor, kind: str) -> int:
    """The operations of a kind that the gradient of `result` passes."""
    seen, nodes = set(), [result.grad_fn]
    while nodes:
        if (node := nodes.pop()) is not None and node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
    return sum(kind in node.name() for node in seen)


@pytest.mark.parametrize("rows", [5, 2])  # two at a time: in three pieces
def test_token_log_probs_are_cross_entropy_with_its_gradient(policy, monkeypatch, rows):
    torch.manual_seed(6)
    sequences, mask = torch.randint(2, V, (5, 9)), torch.ones(5, 9).long()
    monkeypatch.setattr(lm, "PIECE", rows * 5 * V)
    ours = token_log_probs(policy, sequences, mask, 4)
    logits = policy(sequences, attention_mask=mask).logits[:, 3:-1]
    theirs = -cross_entropy(logits.flatten(0, 1), sequences[:, 4:].flatten(), reduction="none").view(5, 5)
    torch.testing.assert_close(ours, theirs)
    # a slice's backward pass would fill a gradient of all logits, each piece anew: one split for all of them
    assert cuts(ours, "Split") - cuts(logits, "Split") == (rows < 5)
    weights = list(policy.parameters())
    for a, b in zip(torch.autograd.grad(ours.sum(), weights), torch.autograd.grad(theirs.sum(), weights)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_ids_of_no_token_are_neither_sampled_nor_counted(toy_tokenizer, tmp_path):
    words = len(toy_tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(**LLAMA, **SMALL | {"vocab_size": words + 64}, initializer_range=0.3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    toy_tokenizer.save_pretrained(tmp_path)
    policy = load_causal_lm(str(tmp_path))
    prompts = torch.randint(4, words, (32, 5))
    for temperature, top_p in ((0, 1.0), (1.0, 0.9), (1.0, 1.0)):
        sequences, log_probs = generate(policy, prompts, torch.ones_like(prompts), 20, temperature, top_p)
        assert sequences.max() < words
    for model in (policy, adapters.WithoutAdapters(policy)):
        fresh = token_log_probs(model, sequences, torch.ones_like(sequences), 5)
        torch.testing.assert_close(log_probs, fresh.detach(), atol=1e-4, rtol=1e-4)
    every = torch.cat([prompts[:1].expand(words + 64, 5), torch.arange(words + 64)[:, None]], 1)
    probs = token_log_probs(policy, every, torch.ones_like(every), 5).exp()[:, 0]
    assert probs[words:].max() == 0 and probs.sum().item() == pytest.approx(1, abs=1e-5)
    probs[:words].sum().backward()
    assert all(p.grad.isfinite().all() for p in policy.parameters())


def test_tables_that_switch_with_the_longest_text_are_used_up_to_there():
    """At a trained model's scale, 0.3: with weights of 0.02 positions hardly matter."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 2, "long_factor": [8.0] * 2}
    sizes = LLAMA | SMALL | {"original_max_position_embeddings": 12, "initializer_range": 0.3}
    config = Phi3Config(**sizes, rope_parameters=rope)
    torch.manual_seed(0)
    policy, ids = AutoModelForCausalLM.from_config(config).eval(), torch.randint(2, V, (1, 14))

    def short_row(long: int):  # log-probabilities of a row of 8 tokens beside one of `long`
        beside = torch.zeros(2, long).long()
        beside[0, :8], beside[1] = ids[0, :8], ids[0, :long]
        mask = torch.ones_like(beside)
        mask[0, 8:] = 0
        return token_log_probs(policy, beside, mask, 4)[0, :4]

    torch.testing.assert_close(short_row(12), short_row(8), atol=1e-5, rtol=1e-5)
    assert (short_row(13) - short_row(8)).abs().max() > 0.1
    nine = rope | {"original_max_position_embeddings": 9}
    rope = {"full_attention": nine, "sliding_attention": {"rope_type": "default"}}
    mixed = SimpleNamespace(max_position_embeddings=64, rope_parameters=rope)
    dynamic = LlamaConfig(**LLAMA, **SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    sees = Gemma3Config(text_config={"max_position_embeddings": 48}, vision_config={})
    beyond = ": beyond them its {} positions depend on the longest text of a batch"
    for kind, length, why in (
        (config, 12, beyond.format("longrope")),
        (mixed, 9, beyond.format("longrope")),
        (dynamic, 64, beyond.format("dynamic")),
        (MptConfig(max_seq_len=64), 64, ""),
        (sees, 48, ""),
        (CONFIGS["llama"], 64, ""),
    ):
        loading.check_context(kind, length, "here")
        message = f"--max-length {length + 1} exceeds the context of here, {length} tokens{why}$"
        with pytest.raises(InputError, match=message):
            loading.check_context(kind, length + 1, "here")
    loading.check_context(BloomConfig(), 10**6, "here")


# ------------------------------------------------------------------------------ bf16

BF16 = SimpleNamespace(dtype="bf16", fsdp=False, activation_checkpointing=False)


def test_scores_are_float32_under_bf16():
    ids, hidden = torch.randint(3, 60, (4, 7)), []
    model = distributed.shard(load_score_model(str(REFERENCE / "beaver_tiny_llama"), "critic"), BF16)
    model.backbone.register_forward_hook(lambda *args: hidden.append(args[-1].last_hidden_state))
    scores = model(ids)
    assert scores.dtype == torch.float32
    exact = hidden[0].float() @ model.score_head.weight[0] + model.score_head.bias
    torch.testing.assert_close(scores, exact, atol=1e-6, rtol=1e-6)
    assert not torch.equal(scores, scores.bfloat16().float())


@pytest.mark.parametrize("script", [safe_rlhf_ppo, repo_ppo])
def test_ratios_begin_at_one_under_bf16(script, toy_tokenizer):
    """Decoding rounds otherwise than a pass over whole sequences: with sharp logits their ratio is not 1."""
    torch.manual_seed(0)
    sizes = LLAMA | {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": len(toy_tokenizer)}
    policy = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL | sizes)).eval()
    for parameter in policy.parameters():
        parameter.data *= 1 if parameter.ndim < 2 else 8
    policy = distributed.shard(policy, BF16)
    prompts = ["how do i bake bread", "tell me about the sea and the wind"] * 4
    uniforms = torch.rand(8, 16, generator=torch.Generator().manual_seed(0))
    rollout = script.sample(policy, prompts, toy_tokenizer, [1], uniforms, 1.0, False)
    decoded = rollout["log_probs"].clone()
    rollout["log_probs"] = lm.in_pieces(lm.response_log_probs, policy, rollout, 4, 1.0)  # as in phase 1
    for piece in lm.micro_batches(rollout, 4):  # as in phase 6
        now = lm.response_log_probs(policy, piece, 1.0)
        assert torch.equal(now[piece["mask"].bool()], piece["log_probs"][piece["mask"].bool()])
    ratio = (decoded - rollout["log_probs"])[rollout["mask"].bool()].exp()
    assert (ratio - 1).abs().max() > 0.01


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_samples_is_the_policy_without_hooks_and_wrappers(dtype):
    torch.manual_seed(0)
    args = SimpleNamespace(dtype=dtype, fsdp=False, activation_checkpointing=True)
    model = AutoModelForCausalLM.from_config(CONFIGS["gpt2"]).eval()
    policy, ids, seen = distributed.shard(model, args), torch.randint(2, V, (2, 9)), []
    policy.transformer.ln_f.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad(), distributed.gathered(policy) as sampler:
        logits = sampler(input_ids=ids).logits
        assert not seen and not any("checkpoint" in name for name, _ in sampler.named_modules())
        assert sampler.lm_head.weight is sampler.transformer.wte.weight  # tied, and stays so
    want = policy(input_ids=ids).logits
    assert seen and any("checkpoint" in name for name, _ in policy.named_modules())  # it is as it was
    assert all(p.dtype == torch.float32 for p in policy.parameters())
    if dtype == "fp32":
        assert torch.equal(logits, want)
        assert sampler.lm_head.weight is policy.lm_head.weight  # no copy
    else:  # half the traffic, and no cast at every token
        assert {p.dtype for p in sampler.parameters()} == {logits.dtype} == {torch.bfloat16}
        torch.testing.assert_close(logits.float(), want.float(), atol=0.02, rtol=0.02)


# ------------------------------------------------------------------------------ Beaver checkpoints


@pytest.mark.parametrize("name", ["beaver_tiny_gpt2", "beaver_tiny_llama"])
def test_beaver_layout_round_trips_bit_for_bit(name, tmp_path):
    model = load_score_model(str(REFERENCE / name), "reward")
    loading.save_score_model(model, model.state_dict(), str(tmp_path))
    before, after = (load_file(folder / "model.safetensors") for folder in (REFERENCE / name, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (REFERENCE / name, tmp_path))
    stored = "architectures score_dim score_bias score_type do_normalize normalizer_type momentum mean var"
    for key in stored.split():
        assert new[key] == old[key], key
    again = load_score_model(str(tmp_path), "reward")
    ids = torch.randint(3, 60, (2, 7))
    assert torch.equal(again(ids), model(ids))


def test_pickled_and_sharded_checkpoints_score_alike(tmp_path):
    source = REFERENCE / "beaver_tiny_llama"
    ids = torch.randint(3, 60, (2, 7))
    want = load_score_model(str(source), "reward")(ids)
    pickled, sharded = tmp_path / "pickled", tmp_path / "sharded"
    for folder in (pickled, sharded):
        folder.mkdir()
        shutil.copy(source / "config.json", folder)
    shutil.copy(source / "pytorch_model.bin", pickled)
    state = load_file(source / "model.safetensors")
    halves, files = (sorted(state)[:5], sorted(state)[5:]), ("a.safetensors", "b.safetensors")
    for names, file in zip(halves, files):
        save_file({n: state[n] for n in names}, sharded / file)
    index = {"metadata": {}, "weight_map": {n: file for names, file in zip(halves, files) for n in names}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    for folder in (pickled, sharded):
        assert torch.equal(load_score_model(str(folder), "reward")(ids), want)
    (sharded / "b.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be read.*b.safetensors"):
        load_score_model(str(sharded), "reward")


def test_a_pickle_that_runs_code_is_not_run(tmp_path):
    shutil.copy(REFERENCE / "beaver_tiny_llama" / "config.json", tmp_path)
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (marker.touch, ())

    torch.save({"x": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="holds more than tensors, and loading it could run code"):
        load_score_model(str(tmp_path), "reward")
    assert not marker.exists()


def altered(tmp_path, source="beaver_tiny_llama", config=(), drop=(), add=()):
    shutil.copytree(REFERENCE / source, tmp_path, dirs_exist_ok=True)
    (tmp_path / "pytorch_model.bin").unlink(missing_ok=True)
    state = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in state.items() if k not in drop} | dict(add), tmp_path / "model.safetensors")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(config)))
    return str(tmp_path)


MISFITS = [
    ({"drop": ("score_head.weight", "score_head.bias")}, "no score head"),
    ({"add": {"score.weight": torch.zeros(1, 16)}}, "two heads"),
    ({"config": {"score_dim": 3}}, "3 dimensions, one is needed"),
    ({"config": {"score_type": "cost"}}, "a cost model, and a reward model is needed"),
    ({"config": {"score_bias": False}}, "disagree about the bias"),
    ({"drop": ("model.norm.weight",)}, "weights do not fit the config.*norm.weight"),
    ({"add": {"model.extra": torch.zeros(1)}}, "superfluous.*extra"),
    ({"drop": ("normalizer.var",)}, "asks for normalized scores, and normalizer.var is missing"),
    ({"add": {"normalizer.mean": torch.zeros(2)}}, "cannot be read"),
    ({"config": {"num_attention_heads": -4}}, "config.json: num_attention_heads is -4"),
    ({"config": {"rms_norm_eps": math.nan}}, "config.json: rms_norm_eps is nan"),
]


@pytest.mark.parametrize("change, message", MISFITS)
def test_what_does_not_fit_is_one_clear_error(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        load_score_model(altered(tmp_path, **change), "reward")


def test_a_config_of_before_score_bias_is_read(tmp_path):
    config = json.loads((REFERENCE / "beaver_tiny_llama" / "config.json").read_text())
    del config["score_bias"]
    folder = Path(altered(tmp_path))
    (folder / "config.json").write_text(json.dumps(config | {"bias": True}))
    assert load_score_model(str(folder), "reward").score_head.bias is not None


def test_a_critic_may_start_from_a_cost_model_and_is_never_normalized(tmp_path):
    folder = altered(tmp_path, config={"score_type": "cost"})
    ids = torch.randint(3, 60, (2, 5))
    critic, cost = load_score_model(folder, "critic"), load_score_model(folder, "cost")
    torch.testing.assert_close(critic(ids), cost(ids) * (cost.normalizer.var.sqrt() + 1e-8))


def test_code_in_a_tokenizers_folder_is_not_run(tmp_path, toy_tokenizer, monkeypatch):
    toy_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text("raise SystemExit('the code of the folder ran')")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoTokenizer": "own.T"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    own = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del own["tokenizer_class"]
    own["auto_map"] = {"AutoTokenizer": ["own.T", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run it"))
    with pytest.raises(InputError, match="the tokenizer: cannot be read"):
        load_tokenizer(str(tmp_path))


def score(path: str):
    return load_score_model(path, "reward", new_head=True)


def test_folders_that_cannot_serve_are_one_clear_error(tmp_path):
    for load in (load_causal_lm, load_tokenizer, score):
        with pytest.raises(InputError, match="no such model folder"):
            load(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="cannot be read.*config.json"):
        load_causal_lm(str(tmp_path))
    with pytest.raises(InputError, match="a score model, not a language model"):
        load_causal_lm(str(REFERENCE / "beaver_tiny_llama"))
    config = MambaConfig(hidden_size=16, num_hidden_layers=1, state_size=4, **SMALL)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="mamba has no key-value cache"):
        load_causal_lm(str(tmp_path))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
        for load in (load_causal_lm, score):
            with pytest.raises(InputError, match=f"holds {name}: the weights beside an adapter are its base"):
                load(str(tmp_path))
        (tmp_path / name).unlink()


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_tensors_that_differ_are_not_tied_whatever_the_config_says(tmp_path, lora_rank):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**LLAMA, **SMALL, initializer_range=0.3)).eval()
    model.save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    write_json(str(tmp_path / "config.json"), config | {"tie_word_embeddings": True})
    ids, ours = torch.randint(2, V, (2, 6)), load_causal_lm(str(tmp_path))
    args = SimpleNamespace(lora_rank=lora_rank, lora_alpha=4.0, lora_targets=None, lora_output=True)
    ours = adapters.adapt(ours, args)
    loading.save_causal_lm(ours, adapters.merged(ours, dict(ours.state_dict())), str(tmp_path / "again"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for saved in (ours, load_causal_lm(str(tmp_path / "again")), theirs):
        torch.testing.assert_close(saved(ids).logits, model(ids).logits)


def test_weights_that_are_missing_or_of_another_shape_are_refused(tmp_path):
    AutoModelForCausalLM.from_config(CONFIGS["llama"]).save_pretrained(tmp_path)
    state, name = load_file(tmp_path / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    broken = {
        "missing": {k: v for k, v in state.items() if k != name},
        "shape": state | {name: torch.zeros(2, 2)},
    }
    broken["superfluous"] = state | {"model.layers.2.mlp.up_proj.weight": state[name].clone()}
    legacy = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2), "lm_head.bias": torch.zeros(V)}
    for tensors in broken.values():
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        for load in (load_causal_lm, score):
            with pytest.raises(InputError, match="weights do not fit the config.*up_proj"):
                load(str(tmp_path))
    save_file(state | legacy, tmp_path / "model.safetensors", metadata={"format": "pt"})
    score(str(tmp_path))


def test_old_exports_are_read(tmp_path):
    """GPT-2 without its prefix and with causal masks, GPT-NeoX with its masks and rotary tables."""
    sizes = LLAMA | {"num_key_value_heads": 4}
    neox = AutoConfig.for_model("gpt_neox", **SMALL, **sizes)
    for config, prefix, mask in (
        (CONFIGS["gpt2"], "transformer.", "h.0.attn."),
        (neox, "", "gpt_neox.layers.0.attention."),
    ):
        model, folder = AutoModelForCausalLM.from_config(config).eval(), tmp_path / config.model_type
        model.save_pretrained(folder)
        state = load_file(folder / "model.safetensors")
        old = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        old |= {f"{mask}bias": torch.ones(4, 4), f"{mask}masked_bias": torch.tensor(-1e9)}
        old |= {f"{mask}rotary_emb.inv_freq": torch.ones(2)}
        save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
        ids = torch.randint(2, V, (2, 6))
        torch.testing.assert_close(load_causal_lm(str(folder))(ids).logits, model(ids).logits)
        hidden = load_score_model(str(folder), "reward", new_head=True).backbone(ids).last_hidden_state
        torch.testing.assert_close(hidden, model.base_model(ids).last_hidden_state)


def test_cudnn_attention_is_off_unless_asked_for():
    for flags in (["--cudnn-attention"], []):
        runs.run(lambda _: None, evaluate.parse_args(flags))
        assert torch.backends.cuda.cudnn_sdp_enabled() == bool(flags)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path, toy_tokenizer):
    words = len(toy_tokenizer)
    toy_tokenizer.save_pretrained(tmp_path)
    loading.load_tokenizer(str(tmp_path))
    for size in (words, words - 1):
        LlamaConfig(**LLAMA, **SMALL | {"vocab_size": size}).save_pretrained(tmp_path)
        if size == words:
            loading.load_tokenizer(str(tmp_path))
    with pytest.raises(
        InputError, match=f"has an id {words - 1}, and the model's embedding {words - 1} rows"
    ):
        loading.load_tokenizer(str(tmp_path))


def test_a_token_for_images_may_be_without_a_row_as_no_text_spells_it(tmp_path):
    """As in Gemma 3 1B, which has the tokenizer of its larger sisters."""
    tokenizer = toy_world.build_tokenizer()
    LlamaConfig(**LLAMA, **SMALL | {"vocab_size": len(tokenizer)}).save_pretrained(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = "{{ messages[0]['content'] }} <image>"
    tokenizer.save_pretrained(tmp_path)
    tokenizer = loading.load_tokenizer(str(tmp_path))
    assert max(data.encode_prompts(tokenizer, ["turn <image>"])[0]) < 216
    with pytest.raises(InputError, match="a text holds '<image>', id 216, and the model's embedding has 216"):
        data.encode_prompts(tokenizer, ["turn"], chat_template=True)
