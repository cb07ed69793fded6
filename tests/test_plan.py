"""tools.plan: bytes counted on fake tensors are the real ones; sums by hand; a 7B shape against a tracker."""

import argparse

import pytest
import torch
from transformers import AutoModel, Gemma3Config, GPT2Config, LlamaConfig, Qwen2Config

import repo_rloo
from lm import position_ids
from plumbing.files import InputError
from plumbing.loading import DROPOUTS
from tools import plan

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 64}
GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": 100, "n_positions": 64}
LLAMA = LlamaConfig(**TINY, architectures=["LlamaForCausalLM"])
CONFIGS = [
    LLAMA,
    Qwen2Config(**TINY, architectures=["Qwen2ForCausalLM"]),
    GPT2Config(**GPT2, architectures=["GPT2LMHeadModel"]),
]


def save(folder, config) -> str:
    config.save_pretrained(folder)
    return str(folder)


def arguments(folder: str, **changes) -> argparse.Namespace:
    flags = {"model": folder, "dtype": "fp32", "batch_size": 8, "micro_batch_size": 4, "max_length": 16}
    flags |= dict.fromkeys(("fsdp", "cpu_offload", "activation_checkpointing"), False)
    flags |= {"lora_rank": 0, "lora_alpha": 16.0, "lora_targets": None, "quantize": None}
    return argparse.Namespace(**flags | changes)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_saved_bytes_are_what_a_real_forward_pass_keeps(tmp_path, config):
    shape = plan.Shape(save(tmp_path, config), True, torch.float32)
    block, root = plan.saved(shape, 4, 16)
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    model = AutoModel.from_config(config, dtype=torch.float32)
    own, sizes, held = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # so that no address is used twice
        return tensor

    ids = torch.zeros(4, 16, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0  # as in any real batch: without padding transformers takes a short cut
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False)
    assert root + 4 * block == pytest.approx(sum(sizes.values()), rel=0.02)
    head = 0 if config.tie_word_embeddings else 3200  # the language model's
    assert shape.total == sum(p.numel() for p in model.parameters()) + head


def test_a_supervised_run_by_hand(tmp_path):
    folder = save(tmp_path, LLAMA)
    shape = plan.Shape(folder, True, torch.float32)

    def update(world: int, **changes) -> tuple[dict, float]:
        ((name, parts),), host = plan.phases(arguments(folder, **changes), world)
        assert name == "update"
        return parts, host

    n, (block, root) = shape.total, plan.saved(shape, 4, 16)
    whole, host = update(1)
    assert whole["weights"] == 4 * n and whole["optimizer"] == 8 * n and host == 4 * n
    assert whole["gradients"] == 4 * n and whole["gathered"] == 0 and whole["activations"] == root + 4 * block
    sharded, _ = update(2, fsdp=True)
    assert sharded["weights"] == 2 * n and sharded["optimizer"] == 4 * n and sharded["gathered"] > 0
    offloaded, host = update(2, fsdp=True, cpu_offload=True)
    assert offloaded["weights"] == offloaded["optimizer"] == 0
    assert host == 16 * n  # weights, Adam and gradients of both ranks
    assert update(2, fsdp=True, cpu_offload=True, save_every=5)[1] == 16 * n  # is saved from where it is
    assert update(2, fsdp=True, save_every=5)[1] == 16 * n  # checkpoint and final weights
    less, _ = update(1, activation_checkpointing=True)
    assert less["activations"] < whole["activations"]


def test_the_first_layers_are_planned_as_a_model_of_so_many(tmp_path):
    short = LlamaConfig(**TINY | {"num_hidden_layers": 2}, architectures=["LlamaForCausalLM"])
    folders, pairs = (save(tmp_path / "whole", LLAMA), save(tmp_path / "short", short)), {"eval_dataset": ""}
    whole, cut, alone = (
        plan.phases(arguments(folder, layers=layers, **pairs), 1)
        for folder, layers in zip((folders[0], *folders), (None, 2, None))
    )
    assert cut == alone != whole


def test_the_plan_agrees_with_the_memory_tracker_on_a_7b_shape():
    """Two of the 32 blocks, so that the parts that grow with depth cannot hide the others' errors."""
    import plan_rehearsal

    flags = [*plan_rehearsal.RECIPE, "--batch-size", "32", "--minibatch-size", "32"]
    for name, predicted, tracked in plan_rehearsal.compare(plan_rehearsal.llama_7b(2), flags, 8):
        assert predicted == pytest.approx(tracked, rel=0.05), name


def test_with_adapters_six_models_are_three_sets_of_weights(tmp_path):
    """By hand, and two blocks of a 7B shape on one GPU, without --fsdp and in 8 bits, against the tracker."""
    import plan_rehearsal

    # of a rank at which the adapters weigh
    flags = [*plan_rehearsal.RECIPE, *"--lora-rank 256 --lora-output --batch-size 4".split()]
    flags += ["--minibatch-size", "4"]
    flags.remove("--fsdp")
    shape, eight = plan_rehearsal.llama_7b(2), ["--quantize", "int8"]
    for name, predicted, tracked in plan_rehearsal.compare(shape, flags + eight, 1):
        assert predicted == pytest.approx(tracked, rel=0.05), name
    folder = save(tmp_path, plan_rehearsal.llama_7b(2))
    own = f"--model {folder} --reward-model {folder} --cost-model {folder}".split()
    # A and B of the seven linear layers of two blocks, three times, and of the policy's output layer
    adapters = 3 * 2 * 256 * (4 * 2 * 4096 + 3 * (4096 + 11008)) + 256 * (4096 + 32001)
    frozen = 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096 + 32001 * 4096
    for sharded, ranks in (([], 1), (["--fsdp"], 4)):
        args = plan_rehearsal.repo_ppo.parse_args([*own, *flags, *sharded])
        (_, rollout), *_ = plan.phases(args, ranks)[0]
        assert rollout["weights"] == (2 * (3 * frozen + 32001 * 4096) + 4 * adapters) / ranks
        assert rollout["optimizer"] == 8 * adapters / ranks
        if not sharded:  # folded into copies of the linear layers, the last one from a sum in float32
            linear = 2 * (4 * 4096**2 + 3 * 4096 * 11008) + 32001 * 4096
            assert rollout["gathered"] == 2 * linear + 4 * 32001 * 4096
    args = plan_rehearsal.repo_ppo.parse_args([*own, *flags, "--fsdp", "--cpu-offload"])
    kept = 2 * (3 * frozen + 32001 * 4096) + 12 * adapters
    critics = 2 * 2 * 256 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    policy = frozen + 32001 * 4096 + adapters - critics
    assert plan.phases(args, 1)[1] == kept + 4 * policy  # at last the merged one


@pytest.mark.parametrize("rank", [0, 8])
def test_without_critics_four_models_and_one_of_them_trains(tmp_path, rank):
    """By hand. With adapters the policy is its own reference, and no score model is a critic's twin."""
    folder = save(tmp_path, LLAMA)
    own = f"--model {folder} --reward-model {folder} --cost-model {folder} --dataset p --output-dir o"
    own += f" --ptx-dataset s --max-length 32 --max-new-tokens 16 --lora-rank {rank} --dtype bf16"
    phases, _ = plan.phases(repo_rloo.parse_args(own.split()), 1)
    assert [name for name, _ in phases] == ["rollout", "scoring", "update policy"]
    policy, scorer = (plan.Shape(folder, head, torch.float32).total for head in (True, False))
    adapters = 4 * rank * (2 * 64 + 2 * 48 + 3 * 96)  # of 4 blocks: q and o, k and v, the three of the MLP
    wanted = 2 * policy + 4 * adapters if rank else 4 * policy + 2 * policy
    assert phases[0][1]["weights"] == wanted + 2 * 2 * scorer
    assert phases[0][1]["optimizer"] == 8 * (adapters or policy)


def test_frozen_weights_in_8_bits_are_a_byte_a_number_and_four_a_row(tmp_path):
    import plan_rehearsal

    folder = save(tmp_path, plan_rehearsal.llama_7b(2))
    shape = plan.Shape(folder, True, torch.bfloat16, (16, 16.0, None, "int8", False))
    numbers, rows = 2 * (4 * 4096**2 + 3 * 4096 * 11008), 2 * (5 * 4096 + 2 * 11008)
    assert shape.quantized == numbers + 4 * rows
    assert shape.merged == shape.total + numbers  # the merged model has them again
    assert shape.total == shape.trained + 5 * 4096 + 2 * 32001 * 4096  # norms, embeddings, output layer


def test_the_advice_makes_it_fit_and_needs_no_weights(tmp_path, capsys):
    seven = LlamaConfig(vocab_size=32001, architectures=["LlamaForCausalLM"])  # 7B, config.json only
    model = save(tmp_path / "m", seven)
    models = f"--model {model} --reward-model {model} --cost-model {model}"
    own = f"{models} --dataset p.jsonl --ptx-dataset s.jsonl --output-dir {tmp_path}/runs"
    sizes = "--max-length 512 --max-new-tokens 384 --micro-batch-size 16"

    def last_line(plan_flags: str, flags: str) -> str:
        plan.main(plan.parse_args(f"{plan_flags} repo_ppo.py {own} {sizes} {flags}".split()))
        return capsys.readouterr().out.strip().splitlines()[-1]

    last = last_line("--gpus 8", "")
    assert last.startswith("does not fit: ") and "It would with --dtype bf16 --fsdp" in last
    assert last_line("--gpus 8", last.split("It would with ")[1]).startswith("fits: the peak is ")
    for memory, answer in ((60, "It would with --dtype bf16"), (20, "no flag helps enough; 8 GPUs would")):
        assert answer in last_line(f"--gpus 1 --memory {memory}", "--batch-size 128 --minibatch-size 32")
    # with all weights on the host, the largest micro-batch that fits: each one moves them
    supervised = f"sft.py --model {model} --dataset s.jsonl --output-dir {tmp_path}/runs --max-length 512"
    plan.main(plan.parse_args(f"{supervised} --batch-size 128 --micro-batch-size 16".split()))
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.endswith("It would with --dtype bf16 --fsdp --activation-checkpointing --cpu-offload")
    last = last_line("--gpus 1 --memory 0.1", "--batch-size 128 --minibatch-size 32")
    assert last.endswith("and no flag helps enough")
    last = last_line("--gpus 1 --memory 40", "--dtype bf16 --lora-rank 16 --batch-size 32")
    assert last.endswith("It would with --activation-checkpointing --quantize int8")
    assert not (tmp_path / "runs").exists()


def test_unlike_blocks_and_experts_are_counted(tmp_path):
    """Gemma 4's blocks depend on each other; fake tensors multiply experts in bf16 only."""
    from test_families import build

    for family in ("Gemma4Text", "Mixtral", "Jamba"):
        model, folder = build(family), tmp_path / family
        sizes = [
            plan.Shape(save(folder, model.config), True, dtype) for dtype in (torch.float32, torch.bfloat16)
        ]
        assert sizes[0].total == sum(p.numel() for p in model.parameters())
        (more, _), (less, _) = (plan.saved(shape, 2, 16) for shape in sizes)
        assert 1.3 * less < more <= 2 * less


def test_what_cannot_be_counted_is_refused(tmp_path):
    sees = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape = plan.Shape(
        save(tmp_path, Gemma3Config(text_config=TINY, vision_config=sees)), True, torch.float32
    )
    with pytest.raises(InputError, match="no plan for gemma3"):
        plan.saved(shape, 2, 16)


BAD = [
    ("--gpus 3", "--batch-size 64", "--batch-size 64 cannot be dealt evenly to 3 processes"),
    ("--gpus 2", "--model none", "none: no such model folder"),
    ("--gpus 0", "", "argument --gpus: must be a whole number from 1, got 0"),
    ("--memory -1", "", "argument --memory: must be a number above 0, got -1"),
    ("", "--lr x", "argument --lr: must be a number from 0, got x"),
    ("", "--cpu-offload", "--cpu-offload works with --fsdp only: add it"),
]


@pytest.mark.parametrize("plan_flags, flags, message", BAD)
def test_bad_plans_are_refused(tmp_path, run_in, plan_flags, flags, message):
    own = f"--model {save(tmp_path / 'm', LLAMA)} --dataset s.jsonl --output-dir runs/x"
    code, error = run_in(tmp_path, "tools/plan.py", *f"{plan_flags} sft.py {own} {flags}".split())
    assert code == 2 and message in error


def test_a_plan_is_for_training_scripts(tmp_path, run_in):
    code, error = run_in(tmp_path, "tools/plan.py", "evaluate.py")
    assert code == 2 and "argument script: invalid choice: 'evaluate.py'" in error
