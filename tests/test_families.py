"""Families of models: tiny ones with random weights go where real ones would, and agree with transformers."""

import argparse
import os
import weakref

import pytest
import torch
import transformers
from conftest import places
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import lm
import toy_world
from lm import end_scores, generate, position_ids, response_mask
from plumbing import distributed, loading
from plumbing.files import InputError, read_json, read_jsonl, write_json
from plumbing.loading import load_causal_lm, load_score_model
from recipes.rehearsal import write_data

IDS = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GEMMA = SIZES | {"head_dim": 8, "sliding_window": 6}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LAYERS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
SEES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
LATENT |= {"num_key_value_heads": 4, "head_dim": 4, "first_k_dense_replace": 1, "n_routed_experts": 4}
FAMILIES = {
    "GPT2": GPT,
    "GPTBigCode": GPT,
    "GPTJ": GPT | {"rotary_dim": 4},
    "GPTNeo": {
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
    },
    "GPTNeoX": SIZES,
    "OPT": OPT | {"word_embed_proj_dim": 16},
    "OPT-350m": OPT | {"word_embed_proj_dim": 8, "do_layer_norm_before": False},
    "Bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 4},
    "Falcon": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4},
    "Mpt": {"d_model": 16, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "Llama": SIZES
    | {"tie_word_embeddings": True, "rope_parameters": SCALED | {"original_max_position_embeddings": 8}},
    "Mistral": SIZES | {"sliding_window": 6},
    "Mixtral": SIZES | EXPERTS,
    "Qwen2": SIZES | {"tie_word_embeddings": True},
    "Qwen3": SIZES | {"head_dim": 8},
    "Qwen3Moe": SIZES | EXPERTS | {"head_dim": 8},
    "Gemma2": GEMMA,
    "Gemma3": {"text_config": GEMMA, "vision_config": SEES | {"image_size": 28, "patch_size": 14}},
    "Gemma4Text": GEMMA
    | LAYERS
    | {"global_head_dim": 8, "num_kv_shared_layers": 1, "hidden_size_per_layer_input": 8},
    "Phi3": SIZES | {"original_max_position_embeddings": 64},
    "Olmo2": SIZES,
    "Granite": SIZES,
    "Cohere2": SIZES | {"sliding_window": 6},
    "DeepseekV3": SIZES | EXPERTS | LATENT | {"n_group": 1, "topk_group": 1},
    "GptOss": GEMMA | EXPERTS,
    "Jamba": SIZES | EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
}


def build(family: str, words: int = 32):
    """A random causal LM with large weights: its distribution is far from uniform."""
    sizes, ids = dict(FAMILIES[family]), IDS | {"vocab_size": words}
    kind = getattr(transformers, family.removesuffix("-350m") + "Config")
    if family == "Gemma4Text":
        ids["vocab_size_per_layer_input"] = words
    if "text_config" in sizes:
        sizes["text_config"] = sizes["text_config"] | ids
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**sizes, **ids), dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data *= 1 if parameter.ndim < 2 else 8
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):  # persistent: part of what was trained
            buffer.fill_(0.7)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """(model, its folder)"""
    model, folder = build(request.param), str(tmp_path_factory.mktemp(request.param))
    model.save_pretrained(folder)
    return model, folder


@torch.no_grad()
def test_policies_agree_with_transformers(saved, tmp_path):
    theirs, folder = saved
    ours = load_causal_lm(folder)
    torch.manual_seed(1)
    ids, mask = (
        torch.randint(2, 32, (6, 5)),
        torch.tensor([[0] * k + [1] * (5 - k) for k in (0, 1, 2, 3, 0, 4)]),
    )
    ids *= mask
    # greedy, left-padded
    greedy, _ = generate(ours, ids, mask, 10, 0, eos_token_id=1, pad_token_id=0)
    expected = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=10, do_sample=False, eos_token_id=1, pad_token_id=0
    )
    assert torch.equal(greedy, expected)
    # sampled: the log-probabilities of decoding are those of a fresh pass
    sequences, log_probs = generate(ours, ids, mask, 10, eos_token_id=1, pad_token_id=0)
    real = response_mask(sequences[:, 5:], 1)
    whole = torch.cat([mask, real], 1)
    fresh = lm.token_log_probs(ours, sequences, whole, 5)
    assert (log_probs - fresh)[real.bool()].abs().max() < 1e-5
    # saved again
    loading.save_causal_lm(ours, ours.state_dict(), str(tmp_path))
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    inputs = {"input_ids": sequences, "attention_mask": whole, "position_ids": position_ids(whole)}
    assert torch.equal(again(**inputs).logits, theirs(**inputs).logits)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(f"{folder}/model.safetensors").keys()


@torch.no_grad()
def test_score_models_do_not_depend_on_padding_and_survive_saving(saved, tmp_path):
    _, folder = saved
    model = load_score_model(folder, "reward", new_head=True)
    ids, zeros = (
        torch.randint(2, 32, (3, 7), generator=torch.Generator().manual_seed(2)),
        torch.zeros(3, 4).long(),
    )
    ones, plain = torch.ones_like(ids), model(ids)[:, -1]
    for parts, mask in (((zeros, ids), (zeros, ones)), ((ids, zeros), (ones, zeros))):
        padded, mask = torch.cat(parts, 1), torch.cat(mask, 1)
        torch.testing.assert_close(end_scores(model(padded, mask), mask), plain, atol=1e-5, rtol=1e-5)
    loading.save_score_model(model, model.state_dict(), str(tmp_path))
    assert torch.equal(load_score_model(str(tmp_path), "reward")(ids)[:, -1], plain)
    theirs = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    hidden = model.backbone(input_ids=ids, attention_mask=ones).last_hidden_state
    assert torch.equal(theirs(input_ids=ids, attention_mask=ones).last_hidden_state, hidden)


@torch.no_grad()
@pytest.mark.parametrize("family", ["GPT2", "Llama", "Mixtral", "Gemma2", "Gemma3", "Bloom"])
def test_the_first_layers_are_the_model_without_the_others(family, tmp_path):
    """Their output goes through the final norm, and the saved folder knows nothing of the others."""
    model = build(family)
    model.save_pretrained(tmp_path / "whole")
    whole = load_score_model(str(tmp_path / "whole"), "reward", new_head=True)
    short = load_score_model(str(tmp_path / "whole"), "reward", new_head=True, layers=1)
    inputs = {"input_ids": torch.randint(2, 32, (3, 7)), "attention_mask": torch.ones(3, 7).long()}
    all_of_it = whole.backbone(**inputs).last_hidden_state
    lists = (m for m in whole.backbone.modules() if isinstance(m, torch.nn.ModuleList))
    stack = next(m for m in lists if list(m) == distributed.blocks(whole))
    del stack[1:]
    lm.reading_part(whole.config).num_hidden_layers = 1
    hidden = whole.backbone(**inputs).last_hidden_state
    assert torch.equal(short.backbone(**inputs).last_hidden_state, hidden)
    assert not torch.equal(hidden, all_of_it)
    loading.save_score_model(short, short.state_dict(), str(tmp_path / "short"))
    again = load_score_model(str(tmp_path / "short"), "reward")
    assert torch.equal(again(**inputs), short(**inputs)) and len(distributed.blocks(again)) == 1


def test_layers_that_are_not_there_are_refused(tmp_path):
    for family, layers, message in (
        ("Llama", 3, "--layers 3: .* has 2"),
        ("Gemma4Text", 2, "--layers 2: .*: cannot be read .*layer types"),  # some use others' keys and values
    ):
        build(family).save_pretrained(tmp_path / family)
        with pytest.raises(InputError, match=message):
            load_score_model(str(tmp_path / family), "reward", new_head=True, layers=layers)
    load_score_model(str(tmp_path / "Llama"), "reward", new_head=True, layers=2)
    path = tmp_path / "Llama/config.json"
    write_json(str(path), read_json(str(path)) | {"num_hidden_layers": 1})
    with pytest.raises(InputError, match="superfluous"):  # a folder that holds more than it says, as before
        load_score_model(str(tmp_path / "Llama"), "reward", new_head=True)


# ------------------------------------------------------------------------------ the whole way


@pytest.mark.parametrize("family", ["GPTNeoX", "Mixtral", "Gemma3"])
def test_every_stage_runs(family, tmp_path, run_in):
    words, tokenizer = len(toy_world.vocabulary()), toy_world.build_tokenizer()
    build(family, words).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    write_data(str(tmp_path), 41)  # 8 of 324 prompts
    small = "--steps 2 --batch-size 4 --micro-batch-size 2 --lr 1e-3 --activation-checkpointing".split()

    def stage(script: str, out: str, *flags) -> None:
        code, error = run_in(tmp_path, script, *flags, "--output-dir", out)
        assert code == 0, error

    supervised = (*small, "--model", "start", "--dataset", "sft.jsonl", "--save-every", 1)
    stage("sft.py", "sft", *supervised)
    stage("sft.py", "sft", *supervised, "--resume", "--steps", 3)  # also what no gradient reaches
    for kind in ("reward", "cost"):
        data = ("--dataset", "pairs.jsonl", "--eval-dataset", "pairs.jsonl")
        short = ("--layers", 1, "--normalize")
        stage(f"{kind}_model.py", kind, *small, "--model", "sft/model", *data, *short)
    scorers = ("--reward-model", "reward/model", "--cost-model", "cost/model")
    data = ("--dataset", "sft.jsonl", "--ptx-dataset", "sft.jsonl", "--minibatch-size", 4)
    stage("repo_ppo.py", "repo", *small, "--model", "sft/model", *scorers, *data)
    policies = ("--policies", "sft=sft/model", "repo=repo/model", "--prompts", "sft.jsonl", "--samples", 1)
    stage("evaluate.py", "evaluation", *policies, *scorers)
    assert len(read_jsonl(f"{tmp_path}/evaluation/responses.jsonl")) == 16
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / x) for x in ("start", "repo/model"))
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))


# ------------------------------------------------------------------------------ two ranks


def sharded_rank(rank: int, world: list[dict], folders: list[str]) -> None:
    """What a rank of `test_sharded_is_unsharded` does; it writes into the folders."""
    os.environ |= world[rank]
    torch.set_num_threads(1)
    distributed.start_processes()
    args = argparse.Namespace(fsdp=True, dtype="fp32", cpu_offload=False, activation_checkpointing=True)
    torch.manual_seed(0)  # as below: new heads are drawn from it
    ids, alive = torch.randint(2, 32, (4, 9)), []
    mask = torch.ones_like(ids)
    for folder in folders:
        policy = distributed.shard(load_causal_lm(folder, **distributed.load_options(args)), args)
        assert not [ref for ref in alive if ref() is not None]  # one model at a time
        alive.append(weakref.ref(policy))
        before = distributed.full_state_dict(policy)
        log_probs = lm.token_log_probs(policy, ids, mask, 4)
        log_probs.mean().backward()
        norm = distributed.clip_gradients(policy, 1e9)
        args.dtype = "bf16"
        scorer = load_score_model(folder, "reward", True, **distributed.load_options(args, trained=False))
        scorer = distributed.shard(scorer, args, trained=False)
        with torch.no_grad():
            scores = scorer(ids, mask)
        args.dtype = "fp32"
        results = {"ids": ids, "log_probs": log_probs.detach(), "norm": torch.tensor(norm), "scores": scores}
        if rank == 0:
            loading.save_causal_lm(policy, before, f"{folder}/again")
            save_file(results, f"{folder}/results")
        del policy, scorer, log_probs
    distributed.end_processes()
    os._exit(0)  # as runs.run ends a rank: torch's threads can abort an orderly end, after all is done


def test_sharded_is_unsharded(tmp_path):
    """Names that differ on disk, fused experts, buffers that were trained: rank 0 reads them for both."""
    folders = []
    for family in ("GPTNeoX", "Mixtral", "Gemma4Text"):
        folders.append(str(tmp_path / family))
        build(family).save_pretrained(folders[-1])
    folders.append(str(tmp_path / "two tensors, called tied"))
    build("Qwen3").save_pretrained(folders[-1])
    config = read_json(f"{folders[-1]}/config.json") | {"tie_word_embeddings": True}
    write_json(f"{folders[-1]}/config.json", config)
    torch.manual_seed(0)
    torch.multiprocessing.spawn(sharded_rank, (places(2), folders), nprocs=2)
    for folder in folders:
        results, policy = load_file(f"{folder}/results"), load_causal_lm(folder)
        ids = results["ids"]
        log_probs = lm.token_log_probs(policy, ids, torch.ones_like(ids), 4)
        log_probs.mean().backward()
        torch.testing.assert_close(results["log_probs"], log_probs.detach(), atol=1e-5, rtol=1e-5)
        norm = torch.nn.utils.get_total_norm([p.grad for p in policy.parameters() if p.grad is not None])
        torch.testing.assert_close(results["norm"], norm, atol=1e-5, rtol=1e-4)
        with torch.no_grad():
            scores = load_score_model(folder, "reward", True, dtype=torch.bfloat16)(ids)
        torch.testing.assert_close(results["scores"], scores, atol=1e-2, rtol=1e-2)
        one, two = (load_file(f"{folder}/{again}model.safetensors") for again in ("", "again/"))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
        one, two = read_json(f"{folder}/config.json"), read_json(f"{folder}/again/config.json")
        assert (one["architectures"], one["dtype"]) == (two["architectures"], two["dtype"])
