"""Low-rank adapters: what they compute, that the frozen half of a pair stays as it was, and what is saved."""
# ruff: noqa: F811  (`folder` is a fixture of test_processes)

import argparse
import re
import shutil
import weakref

import pytest
import torch
from conftest import Started, finish, timeless
from safetensors.torch import load_file, save_file
from test_families import FAMILIES, build
from test_processes import RUNS, STAGE, agree, folder, launch, launch_ranks, results  # noqa: F401
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM, BertConfig
from transformers.pytorch_utils import Conv1D

import repo_ppo
from lm import generate, token_log_probs
from plumbing import adapters, cli, distributed, loading, ppo
from plumbing.adapters import WithoutAdapters, adapt
from plumbing.files import InputError, read_json, read_jsonl, write_json
from plumbing.loading import load_causal_lm, load_score_model, save_score_model

WEIGHTS = "adapter_model.safetensors"
ARGS = argparse.Namespace(lora_rank=2, lora_alpha=4.0, lora_targets=None, quantize=None)
IDS = torch.randint(2, 32, (3, 9), generator=torch.Generator().manual_seed(0))
ONES = torch.ones_like(IDS)


def chosen_flags(**given) -> argparse.Namespace:
    return argparse.Namespace(**vars(ARGS) | given)


def log_probs(policy):
    return token_log_probs(policy, IDS, ONES, 4)


def moved(model: nn.Module) -> nn.Module:
    """As after some training: no B is zero any more, and a head is another."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.endswith(".A"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


# ------------------------------------------------------------------------------ the layer


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_at_full_rank_a_step_is_that_of_full_training(kind):
    """With A orthogonal and alpha = r the step of W is -lr (dL/dW A^T) A = -lr dL/dW."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 7) if kind is nn.Linear else Conv1D(7, 5)
    x, target = torch.randn(11, 5), torch.randn(11, 7)
    whole, frozen = layer.weight.detach().clone(), layer.weight.detach().clone()
    adapter = adapters.Adapter(layer.requires_grad_(False), 5, 5.0, torch.Generator())
    nn.init.orthogonal_(adapter.A)
    (adapter(x) - target).square().mean().backward()
    adapter.B.data -= 0.1 * adapter.B.grad
    layer.weight.requires_grad_(True)
    (layer(x) - target).square().mean().backward()
    whole -= 0.1 * layer.weight.grad
    term = adapter.B @ adapter.A
    torch.testing.assert_close(frozen + (term.T if kind is Conv1D else term), whole, atol=1e-6, rtol=1e-5)
    assert adapter.A.grad.abs().max() == 0  # B was zero


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_eight_bits_by_hand(kind):
    """Rows of 127 and 2 at most: their steps are 1 and 2 / 127. The gradient is the rounded weight's."""
    rows = torch.tensor([[127.0, -64.4, 0.4], [2.0, 1.0, -0.5]])
    layer = nn.Linear(3, 2) if kind is nn.Linear else Conv1D(2, 3)
    layer.weight.data.copy_(rows if kind is nn.Linear else rows.T)
    eight = adapters.Int8(layer.requires_grad_(False))
    assert torch.equal(eight.q, torch.tensor([[127, -64, 0], [127, 64, -32]], dtype=torch.int8))
    torch.testing.assert_close(eight.s, torch.tensor([1.0, 2 / 127]))
    layer.weight.data.copy_(eight.whole())
    x = torch.randn(5, 3, requires_grad=True)
    torch.testing.assert_close(eight(x), layer(x))
    gradients = (torch.autograd.grad(y(x).square().sum(), x)[0] for y in (eight, layer))
    torch.testing.assert_close(*gradients)
    zero = adapters.Int8(nn.Linear(3, 2).requires_grad_(False).apply(lambda m: m.weight.data.zero_()))
    assert torch.equal(zero(x), zero.bias.expand(5, 2))  # a row of zeros has no step


# the output layer, whose weight the embeddings share in half of the families (Jamba: below)
CASES = [(family, {"lora_output": True}) for family in FAMILIES if family != "Jamba"]
CASES += [(family, {"quantize": how}) for family in ("GPT2", "Llama", "Qwen2") for how in (None, "int8")]


@pytest.mark.parametrize("family, changes", CASES, ids=lambda case: str(case))
def test_a_policy_starts_at_its_reference_and_leaves_it_alone(family, changes):
    plain = log_probs(build(family)).detach()
    policy = adapt(build(family), chosen_flags(**changes))
    reference = WithoutAdapters(policy)
    if changes.get("quantize"):
        exact, plain = plain, log_probs(reference).detach()
        assert 0 < (plain - exact).abs().max() < 0.05
    assert torch.equal(log_probs(policy), plain) and torch.equal(log_probs(reference), plain)
    trained = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    assert all(name.endswith((".A", ".B")) for name in trained)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        log_probs(policy).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(log_probs(reference), plain)
    assert (log_probs(policy) - plain).abs().max() > 1e-3
    # merged it is the same function, in a model that knows nothing of adapters
    alone = build(family)
    alone.load_state_dict(adapters.merged(policy, dict(policy.state_dict())))
    torch.testing.assert_close(log_probs(alone), log_probs(policy), atol=1e-5, rtol=1e-5)


FOLDED = [(family, {"lora_output": True}) for family in ("GPT2", "Llama", "GPTNeoX", "Mixtral")]


@pytest.mark.parametrize("family, changes", [*FOLDED, ("Llama", {"quantize": "int8"})], ids=str)
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_what_samples_has_the_adapters_folded_in(family, changes, temperature):
    """Greedy and sampled: the tokens of the adapters beside their layers, also after an update. Training goes
    on as if nobody had sampled. What is held in 8 bits keeps its adapters."""
    policy, uniforms = adapt(build(family), chosen_flags(**changes)), torch.rand(3, 12)
    plain, trained = log_probs(WithoutAdapters(policy)), [p for p in policy.parameters() if p.requires_grad]

    def tokens(model):
        return generate(model, IDS, ONES, 12, temperature, eos_token_id=1, uniforms=uniforms)

    def gradients():
        policy.zero_grad()
        log_probs(policy).mean().backward()
        return [p.grad.clone() for p in trained]

    starts, before = [], gradients()
    for _ in range(2):
        with torch.no_grad(), distributed.gathered(policy) as sampler:
            sequences, sampled = tokens(sampler)
        beside, exact = tokens(policy)
        assert torch.equal(sequences, beside)
        torch.testing.assert_close(sampled, exact, atol=1e-5, rtol=1e-5)
        folded = not changes.get("quantize")
        assert bool(adapters.adapted(sampler)) != folded and adapters.adapted(policy)
        weights = [weakref.ref(p) for p in sampler.parameters() if p.ndim == 2]
        own = {id(p) for p in policy.parameters()}
        copies = [ref for ref in weights if id(ref()) not in own]
        assert len(copies) == (len(adapters.adapted(policy)) if folded else 0)
        del sampler
        assert not [ref for ref in copies if ref() is not None]  # nothing holds them until the next rollout
        after = gradients()
        assert all(torch.equal(a, b) for a, b in zip(before, after)) and max(map(torch.max, after)) > 0
        starts.append((sequences, sampled))
        moved(policy)
        before = gradients()
        assert torch.equal(log_probs(WithoutAdapters(policy)), plain)
    assert not torch.equal(starts[0][0], starts[1][0])


def test_in_bf16_the_sum_is_made_in_float32_and_rounded_once():
    args = chosen_flags(dtype="bf16", fsdp=False, activation_checkpointing=True)
    policy = distributed.shard(moved(adapt(build("Llama").bfloat16(), args)), args)
    layer = adapters.adapted(policy)["model.layers.1.mlp.down_proj"]
    with torch.no_grad(), distributed.gathered(policy) as sampler:
        weight = sampler.get_submodule("model.layers.1.mlp.down_proj").weight
        assert torch.equal(weight, (layer.base_layer.weight.float() + 2 * layer.B @ layer.A).bfloat16())
        assert {p.dtype for p in sampler.parameters()} == {torch.bfloat16}
        torch.testing.assert_close(log_probs(sampler), log_probs(policy), atol=0.2, rtol=0.05)


def test_a_critic_has_its_own_head_and_the_reward_model_keeps_score_type_and_head(tmp_path):
    build("Llama").save_pretrained(tmp_path / "start")
    model = load_score_model(str(tmp_path / "start"), "reward", new_head=True)
    model.do_normalize, model.normalizer.mean[0], model.normalizer.var[0] = True, 3.0, 4.0
    save_score_model(model, model.state_dict(), str(tmp_path / "reward"))
    scores = load_score_model(str(tmp_path / "reward"), "reward")(IDS)
    values = load_score_model(str(tmp_path / "reward"), "critic")(IDS)
    critic = adapt(load_score_model(str(tmp_path / "reward"), "reward"), ARGS)
    reward_model = WithoutAdapters(critic)
    assert torch.equal(critic(IDS), values) and torch.equal(reward_model(IDS), scores)
    moved(critic)(IDS).mean().backward()
    assert torch.equal(reward_model(IDS), scores)
    assert (critic(IDS) - values).abs().max() > 0.1
    named = dict(critic.named_parameters())
    assert named["score_head.weight"].grad is not None and named["score_head.base_layer.weight"].grad is None


def test_targets_are_chosen_by_the_ends_of_names():
    chosen = chosen_flags(lora_targets=["q_proj", "1.mlp.up_proj"])
    names = adapters.adapted(adapt(build("Llama"), chosen))
    ends = ("layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "layers.1.mlp.up_proj")
    assert {name.removeprefix("model.") for name in names} == set(ends)


def test_a_layer_that_its_model_does_not_call_is_refused_by_name():
    chosen = chosen_flags(lora_rank=1)  # dt_proj of a tiny Jamba is 1 wide
    with pytest.raises(InputError, match=r"reads the \w+ of model.layers.0.mamba.dt_proj itself"):
        log_probs(adapt(build("Jamba"), chosen))
    chosen.lora_targets = ["in_proj", "x_proj", "out_proj", "q_proj"]
    log_probs(adapt(build("Jamba"), chosen)).mean().backward()


# ------------------------------------------------------------------------------ a run


def six_models(flags: list[str]) -> tuple:
    args = repo_ppo.parse_args(flags)
    policy, reference = ppo.policy_and_reference(args)
    critics, score_models = zip(*(ppo.critic_and_score_model(kind, args) for kind in ("reward", "cost")))
    return policy, reference, *score_models, *critics


def test_six_models_are_three_and_a_critic_of_another_start_is_apart(folder, monkeypatch):
    monkeypatch.chdir(folder)
    flags = [*RUNS["repo_ppo.py"].split(), *LORA, "--cost-critic", "start/llama/policy", "--dtype", "bf16"]
    read = []  # with a float32 copy first, a 7B base would need 27 GB of host memory
    real = loading.read
    monkeypatch.setattr(loading, "read", lambda *args: read.append(args[3]) or real(*args))
    models = six_models([*flags, "--output-dir", "none"])
    assert read == [torch.bfloat16] * 4  # policy, reward model and critic in one, cost model, cost critic
    policy, reference, reward_model, cost_model, reward_critic, cost_critic = models
    assert reference.model is policy and reward_model.model is reward_critic
    assert not any(parameter.requires_grad for parameter in cost_model.parameters())
    assert not adapters.adapted(cost_model) and adapters.adapted(cost_critic)
    types = [model.score_type for model in (reward_critic, cost_critic, reward_model, cost_model)]
    assert types == ["critic", "critic", "reward", "cost"]
    for model in (policy, reward_critic, cost_critic):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        heads = {name for name in trained if not name.endswith((".A", ".B"))}
        assert heads == ({"score_head.weight", "score_head.bias"} if model is not policy else set())
        kept = {
            p.dtype
            for name, p in model.named_parameters()
            if "score_head" not in name and name not in trained
        }
        assert kept == {torch.bfloat16} and {p.dtype for p in trained.values()} == {torch.float32}
    flags = ["start/llama/cost" if flag == "start/llama/reward" else flag for flag in flags]
    with pytest.raises(InputError, match="a cost model, and a reward model is needed"):
        six_models([*flags, "--output-dir", "none"])


def test_of_two_cost_models_the_larger_cost_counts(folder, monkeypatch, tmp_path, run_in):
    monkeypatch.chdir(folder)
    other = load_score_model("start/llama/policy", "cost", new_head=True)
    other.score_head.weight.data.neg_()
    save_score_model(other, other.state_dict(), str(tmp_path / "cost"))
    loading.load_tokenizer("start/llama/cost").save_pretrained(tmp_path / "cost")
    flags, costs = [*RUNS["repo_ppo.py"].split(), "--lr", "0", "--critic-lr", "0", "--sample-every", "1"], {}
    models = {"one": "start/llama/cost", "other": f"{tmp_path}/cost"}
    for name, given in (*((k, ["--cost-model", v]) for k, v in models.items()), ("both", [])):
        more = given or ["--second-cost-model", models["other"]]
        assert run_in(folder, "repo_ppo.py", *flags, *more, "--output-dir", tmp_path / name)[0] == 0
        costs[name] = torch.tensor([row["cost"] for row in read_jsonl(f"{tmp_path}/{name}/samples.jsonl")])
    assert torch.equal(costs["both"], torch.maximum(costs["one"], costs["other"]))
    assert not torch.equal(costs["both"], costs["one"]) and not torch.equal(costs["both"], costs["other"])


LORA = "--lora-rank 4 --lora-alpha 8 --lr 1e-2".split()
PPO = [*LORA, "--lora-output", "--critic-lr", "1e-2"]


@pytest.fixture(scope="module")
def one(folder):
    """Two steps of RePO on a Llama, with a checkpoint after each; beside it the same on two processes."""
    alone = launch(folder, "repo_ppo.py", "lora", *PPO, "--save-every", "1")
    finish(alone, *launch_ranks(folder, "repo_ppo.py", "lora_two", 2, *PPO))
    return folder


SHARDED = ("--fsdp", "--activation-checkpointing")


def test_two_processes_and_two_sharded_ones_agree_with_one(one):
    finish(*launch_ranks(one, "repo_ppo.py", "lora_fsdp", 2, *PPO, *SHARDED))
    agree(one, "repo_ppo.py", "lora", "lora_two", "lora_fsdp")
    again = (*PPO, "--adapter", "runs/repo_ppo.py/lora/adapter")  # and so they do when they go on from there
    finish(launch(one, "repo_ppo.py", "lora_again", *again))
    finish(*launch_ranks(one, "repo_ppo.py", "lora_again_fsdp", 2, *again, *SHARDED))
    agree(one, "repo_ppo.py", "lora_again", "lora_again_fsdp")


def test_in_bf16_a_sharded_policy_starts_at_its_reference_bit_for_bit(one):
    flags = "--fsdp --dtype bf16 --cpu-offload --activation-checkpointing --minibatch-size 8".split()
    flags = [*PPO, *flags, "--micro-batch-size", "8"]  # one pass for all: bf16 rounds by a pass's shape
    finish(*launch_ranks(one, "repo_ppo.py", "lora_bf16", 2, *flags))
    (first, second), weights = results(one, "repo_ppo.py", "lora_bf16")
    assert first["kl"] == 0 and second["kl"] != 0 and second["grad_norm"] > 0
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.parametrize("quantize", [[], ["--quantize", "int8"]])
def test_a_checkpoint_holds_what_is_trained_and_resumes_bit_identical(one, run_in, quantize):
    name = "lora_int8" if quantize else "lora"
    before, after = (one / "runs/repo_ppo.py" / run for run in (name, f"{name}_resumed"))
    flags = [*RUNS["repo_ppo.py"].split(), *PPO, *quantize, "--save-every", 1]
    if quantize:
        assert run_in(one, "repo_ppo.py", *flags, "--output-dir", before)[0] == 0
    shutil.copytree(before, after)
    shutil.rmtree(after / "checkpoints/step-2")
    assert run_in(one, "repo_ppo.py", *flags, "--resume", "--output-dir", after)[0] == 0
    (metrics, weights), (again, same) = (results(one, "repo_ppo.py", run.name) for run in (before, after))
    assert timeless(metrics) == timeless(again) and all(torch.equal(weights[k], same[k]) for k in weights)
    held = FileSystemReader(before / "checkpoints/step-2").read_metadata().state_dict_metadata
    trained = re.compile(r"\.([AB]|score_head\.(weight|bias))(\.(exp_avg|exp_avg_sq|step))?$")
    other = [name for name in held if not trained.search(name) and "param_groups" not in name]
    assert all(".normalizer." in name for name in other), other


# ------------------------------------------------------------------------------ the folder adapter/


def sft(family: str, *flags: str) -> list[str]:
    return [*STAGE.format("sft", family).split(), *LORA, *flags]


@pytest.fixture(scope="module", params=["gpt2", "qwen2", "gpt2 --lora-output"])
def tuned(request, folder):
    """(family, the folder that sft.py wrote, the flags that say where adapters go). GPT-2's output layer has
    the weight of its embeddings."""
    family, *flags = request.param.split()
    run = folder / "runs" / f"lora_{family}{len(flags)}"
    finish(Started(folder, "sft.py", *sft(family, "--output-dir", str(run), *flags)))
    return family, run, flags


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS, attention_mask=ONES).logits


def test_base_and_adapter_are_the_merged_model_and_go_on_from_there(folder, tuned, run_in):
    family, run, where = tuned
    args = chosen_flags(lora_rank=4, lora_alpha=8.0, lora_output=bool(where))
    base = load_causal_lm(str(folder / "start" / family / "policy"))
    start, whole = logits(base), AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    before, after = (model.get_input_embeddings().weight for model in (base, whole))
    policy = adapt(base, args, str(run / "adapter"))
    reference = WithoutAdapters(policy)
    torch.testing.assert_close(logits(policy), logits(whole), atol=1e-5, rtol=1e-5)
    assert (logits(whole) - start).abs().max() > 1e-2
    assert torch.equal(logits(reference), logits(policy))  # the reference is what training started from
    moved(policy)
    torch.testing.assert_close(logits(reference), logits(whole), atol=1e-5, rtol=1e-5)
    assert (logits(policy) - logits(whole)).abs().max() > 1e-2
    assert torch.equal(before, after) != bool(where)  # here the output layer has the same weight
    assert (whole.get_output_embeddings().weight is after) == (family == "gpt2")
    flags = ("--adapter", str(run / "adapter"), "--output-dir", f"{run}_again", *where)
    assert run_in(folder, "sft.py", *sft(family, *flags))[0] == 0
    first, second = (read_jsonl(f"{path}/metrics.jsonl") for path in (run, f"{run}_again"))
    assert second[0]["loss"] < first[0]["loss"]  # the same batch, after two steps
    code, error = run_in(folder, "sft.py", *sft(family, *flags), "--overwrite", "--model", run / "model")
    assert code == 2 and "merged into it: give the model that the adapter was trained on" in error


def test_the_adapter_has_the_names_and_shapes_of_peft(tuned):
    family, run, where = tuned
    config, tensors = read_json(run / "adapter/adapter_config.json"), load_file(run / "adapter" / WEIGHTS)
    assert ("lm_head" in config["target_modules"]) == bool(where)
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    layer, target, shape = {
        "gpt2": ("transformer.h.1.attn.c_attn", "c_attn", (4, 64, 192)),
        "qwen2": ("model.layers.1.mlp.down_proj", "down_proj", (4, 64, 32)),
    }[family]
    assert target in config["target_modules"] and config["fan_in_fan_out"] == (family == "gpt2")
    rank, width, out = shape
    assert tensors[f"base_model.model.{layer}.lora_A.weight"].shape == (rank, width)
    assert tensors[f"base_model.model.{layer}.lora_B.weight"].shape == (out, rank)


def test_peft_finds_the_chosen_layers_and_the_output_layer_by_name(folder, run_in, tmp_path):
    flags = ("--lora-targets", "c_attn", "--lora-output", "--output-dir", str(tmp_path))
    assert run_in(folder, "sft.py", *sft("gpt2", *flags))[0] == 0
    targets = read_json(tmp_path / "adapter/adapter_config.json")["target_modules"]
    blocks = ("transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn")
    assert targets == ["lm_head", *blocks, "transformer.wte"]
    stored = {name.split(".lora_")[0] for name in load_file(tmp_path / "adapter" / WEIGHTS)}
    assert stored == {f"base_model.model.{target}" for target in targets}


def test_weights_that_a_merged_model_could_not_share_are_refused():
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(BertConfig(**sizes, intermediate_size=16, is_decoder=True))
    chosen = chosen_flags(lora_output=True)
    with pytest.raises(InputError, match=r"--lora-output: cls.predictions.decoder.bias is tied as well"):
        adapt(model, chosen)
    model = build("Llama")
    first, second = (block.mlp.up_proj for block in model.model.layers)
    second.weight = first.weight
    with pytest.raises(InputError, match="--lora-rank: llama's blocks share weights; adapters part them"):
        adapt(model, ARGS)


def test_the_files_mean_in_peft_s_way_what_model_is(folder, tuned):
    """W + (lora_alpha / r) lora_B lora_A, transposed with fan_in_fan_out, of the layer so named."""
    family, run, _ = tuned
    config, tensors = read_json(run / "adapter/adapter_config.json"), load_file(run / "adapter" / WEIGHTS)
    model = load_causal_lm(str(folder / "start" / family / "policy"))
    output = model.get_output_embeddings()  # PEFT gives it and the embeddings a term each, beside one weight
    output.weight = nn.Parameter(output.weight.detach().clone())
    scale = config["lora_alpha"] / config["r"]
    for name in tensors:
        if name.endswith(".lora_embedding_A"):
            term = tensors[name.replace("_A", "_B")] @ tensors[name] * scale
            model.get_input_embeddings().weight.data += term.T
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            term = tensors[f"{layer}.lora_B.weight"] @ tensors[name] * scale
            module = model.get_submodule(layer.removeprefix("base_model.model."))
            # PEFT, too, sees by a layer's class that it is not transposed
            transposed = config["fan_in_fan_out"] and not isinstance(module, nn.Linear)
            module.weight.data += term.T if transposed else term
    whole = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(whole), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["reward", "cost"])
def test_a_score_model_s_head_is_saved_with_its_adapter(folder, run_in, tmp_path, kind):
    flags = [*RUNS[f"{kind}_model.py"].split(), *LORA, "--output-dir", tmp_path / kind]
    assert run_in(folder, f"{kind}_model.py", *flags)[0] == 0
    tensors = load_file(tmp_path / kind / "adapter" / WEIGHTS)
    merged = load_score_model(str(tmp_path / kind / "model"), kind)
    assert torch.equal(tensors["base_model.model.score_head.weight"], merged.score_head.weight)
    assert "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight" in tensors
    start = str(folder / read_json(tmp_path / kind / "args.json")["model"])
    base = load_score_model(start, kind, new_head=True)
    frozen = "embed_tokens.weight"  # the base's to the last bit
    assert torch.equal(merged.backbone.get_parameter(frozen), base.backbone.get_parameter(frozen))
    args = chosen_flags(lora_rank=4, lora_alpha=8.0)
    ours = adapt(base, args, str(tmp_path / kind / "adapter"))
    torch.testing.assert_close(ours(IDS), merged(IDS), atol=1e-5, rtol=1e-5)


# flags, what is wrong with the folder (a field of its config, or a file that is no longer one), what is said
BAD = [
    ("--lora-rank 33", {}, "--lora-rank 33 is above the width of model.layers.0."),
    (
        "--lora-targets q_proj query",
        {},
        "--lora-targets query: no linear layer of the blocks has that name, ",
    ),
    ("--lora-rank 0", {}, "--adapter works with --lora-rank only"),
    ("--from-config", {}, "--from-config and --lora-rank cannot go together: weights that are drawn"),
    ("--lora-rank 8", {}, "give --lora-rank 4 --lora-alpha 8.0"),
    ("--lora-targets q_proj", {}, "an adapter for another model, or of other layers"),
    ("--lora-output", {}, "of other layers (base_model.model.lm_head.lora_A.weight is missing"),
    ("--lora-rank 0 --lora-output", {}, "--lora-output works with --lora-rank only: add it"),
    ("--model start/gpt2/policy", {}, "an adapter for another model"),
    ("", {"r": 0}, "not a plain low-rank adapter: r 0"),
    ("", {"use_rslora": True}, "not a plain low-rank adapter: use_rslora"),
    ("", {"init_lora_weights": "pissa_niter_16"}, "adapter: init_lora_weights pissa_niter_16"),
    ("", {"alora_invocation_tokens": [5, 6]}, "adapter: alora_invocation_tokens [5, 6]"),
    ("", {"a_field_of_tomorrow": 0.5}, "adapter: a_field_of_tomorrow 0.5"),
    ("", {"peft_type": "IA3"}, "not a plain low-rank adapter: peft_type IA3"),
    ("", "adapter_config.json", "adapter_config.json: cannot be read"),
    ("", WEIGHTS, f"{WEIGHTS}: cannot be read"),
    ("", torch.int8, "its weights are torch.int8, and torch.float32, torch.bfloat16"),
    ("", torch.float8_e4m3fn, "its weights are torch.float8_e4m3fn, and torch.float32"),
]


@pytest.mark.parametrize("tuned", ["qwen2"], indirect=True)
@pytest.mark.parametrize("flags, damage, message", BAD)
def test_what_does_not_fit_is_one_clear_line(folder, tuned, tmp_path, run_in, flags, damage, message):
    adapter = shutil.copytree(tuned[1] / "adapter", tmp_path / "adapter")
    if isinstance(damage, dict):
        config = read_json(adapter / "adapter_config.json")
        write_json(str(adapter / "adapter_config.json"), config | damage)
    elif isinstance(damage, torch.dtype):
        tensors = load_file(adapter / WEIGHTS)
        save_file({name: tensor.to(damage) for name, tensor in tensors.items()}, adapter / WEIGHTS)
    else:
        (adapter / damage).write_text("{")
    own = ("--adapter", str(adapter), "--output-dir", str(tmp_path / "run"))
    code, error = run_in(folder, "sft.py", *sft("qwen2", *own), *flags.split())
    assert code == 2 and message in error, error
    assert not (tmp_path / "run/model").exists()


@pytest.mark.parametrize(
    "flags, message",
    [("", "works with --lora-rank only"), ("--lora-rank 2 --fsdp", "and --fsdp cannot go together")],
)
def test_eight_bits_are_for_frozen_weights_of_one_gpu(flags, message):
    args = repo_ppo.parse_args(["--quantize", "int8", *flags.split()])
    with pytest.raises(InputError, match=f"--quantize {message}"):
        cli.check_flags(args, 1)
