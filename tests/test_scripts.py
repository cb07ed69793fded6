"""Every script end to end on a small toy world, and every way to refuse bad input."""

import importlib
import json
import math
import shutil
import statistics
import weakref
from pathlib import Path

import pytest
import torch
from conftest import Started, finish, metrics, timeless
from safetensors.torch import load_file, save_file

from lm import end_scores, pad, state_values
from plumbing import data, ppo
from plumbing.data import encode_texts
from plumbing.files import read_json, read_jsonl
from plumbing.loading import load_score_model, load_tokenizer

ROB = "how do i open a lock to rob my neighbour ?"
SMALL = ("--batch-size", "8", "--minibatch-size", "8")


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """The whole pipeline with the scripts' default paths, a few steps each. Returns the working folder."""
    folder = tmp_path_factory.mktemp("demo")
    finish(Started(folder, "toy_world.py", "world"))
    finish(Started(folder, "sft.py", "--steps", "40", "--lr", "0.01"))
    finish(Started(folder, "toy_world.py", "preferences", "--pairs", "300", "--samples", "1"))
    few = ("--steps", "4", "--batch-size", "16", "--micro-batch-size", "8")
    outputs = finish(Started(folder, "reward_model.py", *few), Started(folder, "cost_model.py", *few))
    assert "held-out pairs ordered rightly" in outputs[0] and "sign of the cost right" in outputs[1]
    few = ("--steps", "3", "--batch-size", "16", "--minibatch-size", "8", "--micro-batch-size", "5")
    few += ("--ppo-epochs", "2")
    finish(Started(folder, "safe_rlhf_ppo.py", *few), Started(folder, "repo_ppo.py", *few))
    table = finish(Started(folder, "evaluate.py", "--samples", "1"))[0]
    assert table.startswith((folder / "runs/demo/evaluation/table.txt").read_text())
    assert "best-safe" in table and "sft as the initial policy: quantiles of its learned cost" in table
    paths = finish(Started(folder, "plots.py", "--html"))[0].split()
    assert len(paths) == 7 and paths[-1] == "runs/demo/figures/explore.html"
    return folder


def weights(folder: Path, run: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "runs/demo" / run / "model/model.safetensors")


def same_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ------------------------------------------------------------------------------ what the pipeline leaves


@pytest.mark.parametrize("run", ["safe_rlhf", "repo"])
def test_ppo_runs_log_every_metric_and_save_a_policy(demo, run):
    rows, folder = metrics(demo, run), demo / "runs/demo" / run
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    promised = "reward cost unsafe_rate lambda violation kl policy_loss reward_value_loss cost_value_loss"
    assert {*promised.split(), "response_length", "samples_per_second"} <= rows[0].keys()
    assert read_json(f"{folder}/args.json")["batch_size"] == 16
    sample = read_jsonl(f"{folder}/samples.jsonl")[0]
    assert {"prompt", "response", "reward", "cost", "kl"} <= sample.keys()
    assert not same_weights(weights(demo, "sft"), weights(demo, run))


def test_the_first_rollout_is_the_same_for_both_algorithms_and_starts_at_the_reference(demo):
    safe, repo = metrics(demo, "safe_rlhf")[0], metrics(demo, "repo")[0]
    for name in ("reward", "cost", "unsafe_rate", "response_length"):
        assert safe[name] == repo[name]
    # pi_old is pi_ref before the first update: the sampled log-probabilities are right
    assert abs(safe["kl"]) < 1e-4


def test_violations_are_what_the_papers_say(demo):
    for row in metrics(demo, "repo"):
        assert row["violation"] >= max(0.0, row["cost"])
    first = metrics(demo, "safe_rlhf")[0]
    assert first["violation"] == pytest.approx(first["cost"], abs=1e-5)


def test_evaluation_files(demo):
    summary = read_json(f"{demo}/runs/demo/evaluation/summary.json")
    rows = read_jsonl(f"{demo}/runs/demo/evaluation/responses.jsonl")
    assert list(summary["policies"]) == ["sft", "safe_rlhf", "repo"] and len(rows) == 3 * 108
    for name, numbers in summary["policies"].items():
        mine = [row for row in rows if row["policy"] == name]
        truly_unsafe = sum(row["true_cost"] > 0 for row in mine) / len(mine)
        assert numbers["true_unsafe_rate"] == pytest.approx(truly_unsafe)
        assert numbers["unsafe_rate"] == pytest.approx(sum(row["cost"] > 0 for row in mine) / len(mine))
        low, high = numbers["safety_rate_interval"]
        assert low <= numbers["safety_rate"] <= high
        safe_reward = sum(row["true_reward"] for row in mine if row["true_cost"] <= 0)
        best = sum(row["best_safe_reward"] for row in mine)
        assert safe_reward and numbers["best_safe_share"] == pytest.approx(safe_reward / best)
    costs = [row["cost"] for row in rows if row["policy"] == "sft"]
    safe, unsafe = ([c for c in costs if (c <= 0) == kind] for kind in (True, False))
    advised = 0.95 * statistics.mean(safe) + 0.05 * statistics.mean(unsafe)
    assert summary["suggested_threshold"] == pytest.approx(advised)


def test_intervals_resample_prompts_and_do_not_collapse():
    from evaluate import bootstrap_interval

    prompts, hits = [f"p{i}" for i in range(108)], [i % 9 < 4 for i in range(108)]
    once = bootstrap_interval(hits, prompts)
    assert once[1] - once[0] == pytest.approx(2 * 1.96 * math.sqrt(4 / 9 * 5 / 9 / 108), rel=0.1)
    # eight times the same answers, in one row each or under prompts that are equal, say no more
    assert bootstrap_interval(hits * 8, prompts * 8) == pytest.approx(once)
    assert bootstrap_interval([False] * 864, prompts * 8) == pytest.approx((0, 3 / 108), abs=0.002)
    low, high = bootstrap_interval([True] * 108, prompts)
    assert high == 1 and low == pytest.approx(1 - 3 / 108, abs=0.002)


def test_a_prompt_is_unsafe_if_any_of_its_answers_is():
    import evaluate

    row = {"reward": 0.0, "response_length": 3, "truncated": False}
    costs = {"a": (-1.0, 0.5), "b": (-1.0, -3.0), "c": (4.0, 5.0), "d": (0.0, -9.0)}
    rows = [row | {"prompt": prompt, "cost": c} for prompt, both in costs.items() for c in both]
    summary = evaluate.summarize(rows)
    assert summary["unsafe_rate"] == 3 / 8 and summary["any_unsafe_rate"] == 2 / 4
    assert summary["responses_per_prompt"] == 2 and " of 2\n" in evaluate.table({"own": summary})
    rows += [row | {"prompt": "b", "cost": 1.0}] * 40  # the file repeats it: still any of its first 2
    assert evaluate.summarize(rows)["any_unsafe_rate"] == 2 / 4
    assert evaluate.summarize(rows)["responses_per_prompt"] == 2


def test_threshold_advice():
    from evaluate import threshold_advice

    # mean 0.6; the safe ones' -3, the unsafe ones' 3: d = 0.95 * -3 + 0.05 * 3
    costs = [-4.0, -2.0, 1.0, 2.0, 6.0]
    text = threshold_advice(costs, 0.0)
    assert "50% +1.00" in text and "mean +0.60" in text and "warning" not in text
    assert "suggests d = -2.70; -3.00, " in text
    assert "warning: d = +0.70 lies above the mean" in threshold_advice(costs, 0.7)
    assert "suggests d = -1.50; -1.50, " in threshold_advice([-1.0, -2.0], -3.0)
    assert "suggests" not in threshold_advice([1.0, 2.0], 0.0)


def test_figures_are_pictures(demo):
    for name in ("scatter", "training", "distributions", "multiplier", "compensation", "kl"):
        png, pdf = (demo / f"runs/demo/figures/{name}.{kind}" for kind in ("png", "pdf"))
        assert png.read_bytes()[:4] == b"\x89PNG" and pdf.read_bytes()[:4] == b"%PDF"


def test_labels_can_be_given_again(demo, run_in):
    flags = ("--responses", "runs/demo/evaluation/responses.jsonl", "--output", "labelled.jsonl")
    assert run_in(demo, "toy_world.py", "label", *flags)[0] == 0
    for row in read_jsonl(f"{demo}/labelled.jsonl"):
        assert row["true_cost"] <= 0 or row["harm_level"] > 0


@pytest.mark.parametrize(
    "name, flags", [("ppo", ("--lambda-init", 0)), ("shaping", ("--reward-shaping", 0.5))]
)
def test_baselines_run_without_a_moving_multiplier(demo, run_in, name, flags):
    few = ("--steps", 2, "--batch-size", 8, "--ptx-dataset", "")  # the minibatch shrinks to the rollout
    code, error = run_in(demo, "safe_rlhf_ppo.py", *few, "--output-dir", f"runs/demo/{name}", *flags)
    assert code == 0, error
    assert [row["lambda"] for row in metrics(demo, name)] == [0, 0]


@pytest.mark.parametrize("script", ["reward_model.py", "cost_model.py"])
def test_token_wise_losses_train(demo, run_in, script):
    flags = ("--loss", "token-wise", "--steps", 2, "--eval-dataset", "")
    assert run_in(demo, script, *flags, "--output-dir", f"runs/tokenwise/{script}")[0] == 0


@pytest.mark.parametrize("kind", ["reward", "cost"])
def test_a_stored_normalizer_makes_spreads_1_and_moves_no_sign(demo, run_in, kind):
    """Reward over the training answers: mean 0, spread 1. Cost: spread 1, and 0 stays where it is."""
    few, module = "--steps 4 --batch-size 16 --save-every 2".split(), importlib.import_module(f"{kind}_model")
    runs = {name: f"runs/normalizer/{kind}_{name}" for name in ("plain", "whole", "resumed")}
    for name, more in (("plain", ()), ("whole", ("--normalize",))):
        assert run_in(demo, f"{kind}_model.py", *few, *more, "--output-dir", runs[name])[0] == 0
    shutil.copytree(runs["whole"], runs["resumed"])
    shutil.rmtree(f"{runs['resumed']}/checkpoints/step-4")
    flags = ("--normalize", "--resume", "--output-dir", runs["resumed"])
    assert run_in(demo, f"{kind}_model.py", *few, *flags)[0] == 0
    logged = [timeless(read_jsonl(f"{folder}/metrics.jsonl")) for folder in runs.values()]
    assert logged[0] == logged[1] == logged[2]  # loss, accuracy and held-out scores are of training
    plain, whole, resumed = (load_file(f"{folder}/model/model.safetensors") for folder in runs.values())
    assert same_weights(whole, resumed)
    assert all(torch.equal(plain[name], whole[name]) for name in plain if "normalizer" not in name)

    rows, tokenizer = read_jsonl(module.DEMO["dataset"]), load_tokenizer(f"{runs['whole']}/model")
    texts = [(row["prompt"], row[f"response_{i}"]) for row in rows for i in (0, 1)]
    ids, mask = pad(encode_texts(tokenizer, texts), 0, side="right")

    @torch.no_grad()
    def scores(name: str, score_type: str) -> torch.Tensor:
        return end_scores(load_score_model(f"{runs[name]}/model", score_type)(ids, mask), mask)

    raw, stored = scores("plain", kind), scores("whole", kind)
    assert stored.std().item() == pytest.approx(1, abs=1e-4) and raw.std().item() != pytest.approx(1, abs=0.1)
    center = raw.mean() if kind == "reward" else 0.0
    torch.testing.assert_close(stored, (raw - center) / raw.std(), atol=1e-4, rtol=1e-4)
    assert torch.equal(scores("whole", "critic"), scores("plain", "critic"))  # a critic is never normalized


TWINS = [("safe_rlhf_ppo", "lagrangian_advantages"), ("repo_ppo", "rectified_advantages")]


@pytest.mark.parametrize("module, function", TWINS)
def test_lambda_moves_before_the_policy_does_and_once_per_rollout(demo, monkeypatch, module, function):
    module = importlib.import_module(module)
    used, original = [], getattr(module, function)
    monkeypatch.setattr(module, function, lambda *args: used.append(args[2]) or original(*args))
    orders, rows_of = set(), data.batch_indices
    monkeypatch.setattr(data, "batch_indices", lambda *args: orders.add(args[-1]) or rows_of(*args))
    monkeypatch.chdir(demo)
    few = "--steps 3 --batch-size 8 --minibatch-size 4 --ppo-epochs 2 --lambda-lr 0.2"
    module.main(module.parse_args([*few.split(), "--output-dir", "runs/demo/spy"]))
    assert orders == {0, -1}  # PTX's is its own: equal files would else supervise the minibatch's own prompts
    log_lambda = torch.tensor(0.0, dtype=torch.float64)
    for row, lam in zip(metrics(demo, "spy"), used, strict=True):
        log_lambda = module.multiplier_step(log_lambda, row["violation"], 0.2, 20.0)
        assert lam == row["lambda"] == pytest.approx(log_lambda.exp().item())


@pytest.mark.parametrize("module", [module for module, _ in TWINS])
def test_the_error_of_a_critic_that_always_says_seven(demo, monkeypatch, module):
    module = importlib.import_module(module)
    monkeypatch.setattr(module, "state_values", lambda *args: state_values(*args) * 0 + 7)
    monkeypatch.chdir(demo)
    few = "--steps 2 --batch-size 8 --minibatch-size 8 --kl-coeff 0 --gae-lambda 1"
    module.main(module.parse_args([*few.split(), "--output-dir", "runs/demo/seven"]))
    for row in metrics(demo, "seven"):
        for name in ("reward", "cost"):
            assert row[f"{name}_value_error"] == pytest.approx(7 - row[name], abs=1e-5)


def test_scales_by_hand():
    """Spreads 0.5 and 2: at lambda 3 one spread of the cost weighs 12 of the reward."""
    reward, cost = torch.tensor([0.5, 1.5]), torch.tensor([-4.0, 0.0])
    said = ppo.scales(reward, cost, 3.0)
    assert said == "first rollout: reward +1.00, spread 0.5; cost -2.00, spread 2; " + (
        "price * sd(C) / sd(R) = 3 * 2 / 0.5 = 12"
    )
    for price, warned in ((0.05, "reward drowns the cost"), (16.0, "cost drowns the reward"), (0.0, "")):
        first, *warning = ppo.scales(reward, cost, price).splitlines()
        assert first.startswith(said[:60]) and len(warning) == bool(warned) and warned in "".join(warning)
    assert "cost drowns the reward" in ppo.scales(torch.ones(2), cost, 1.0)
    assert "warning" not in ppo.scales(torch.ones(1), torch.ones(1), 1.0)  # one answer has no spread


@pytest.mark.parametrize("flags, price", [("--lambda-init 3", 3.0), ("--reward-shaping 0.5", 0.5)])
def test_the_scales_are_told_once_and_of_the_first_rollout(demo, monkeypatch, capsys, flags, price):
    monkeypatch.chdir(demo)
    few = f"--steps 2 --batch-size 8 --minibatch-size 8 --save-every 2 --output-dir runs/demo/told{price}"
    module = importlib.import_module("repo_ppo")
    module.main(module.parse_args([*few.split(), *flags.split()]))
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("first rollout: ")]
    first = metrics(demo, f"told{price}")[0]
    assert f"reward {first['reward']:+.2f}, spread" in told and f"cost {first['cost']:+.2f}, spread" in told
    assert f" = {price:g} * " in told
    module.main(module.parse_args([*few.split(), *flags.split(), "--steps", "3", "--resume"]))
    assert "first rollout" not in capsys.readouterr().err  # what is resumed has learned something


# ------------------------------------------------------------------------------ invariances


def test_a_resumed_run_ends_bit_identical(demo, run_in):
    few = ("--steps", 5, "--batch-size", 8, "--minibatch-size", 4, "--save-every", 2)
    assert run_in(demo, "safe_rlhf_ppo.py", *few, "--output-dir", "runs/demo/straight")[0] == 0
    folder = demo / "runs/demo/broken"
    shutil.copytree(demo / "runs/demo/straight", folder)
    shutil.rmtree(folder / "checkpoints/step-4")  # as if it had been killed before its second checkpoint
    assert run_in(demo, "safe_rlhf_ppo.py", *few, "--output-dir", "runs/demo/broken", "--resume")[0] == 0
    assert same_weights(weights(demo, "straight"), weights(demo, "broken"))
    assert timeless(metrics(demo, "straight")) == timeless(metrics(demo, "broken"))


def test_evaluation_holds_one_model_at_a_time(demo, monkeypatch):
    """When a model is loaded, every earlier one is gone: generation first, scoring after."""
    import evaluate

    loaded = []

    def spy(load):
        def load_and_look(*args, **kwargs):
            assert not [ref for ref in loaded if ref() is not None]
            model = load(*args, **kwargs)
            loaded.append(weakref.ref(model))
            return model

        return load_and_look

    monkeypatch.chdir(demo)
    monkeypatch.setattr(evaluate, "load_causal_lm", spy(evaluate.load_causal_lm))
    monkeypatch.setattr(evaluate, "load_score_model", spy(evaluate.load_score_model))
    evaluate.main(evaluate.parse_args(["--samples", "1", "--output-dir", "runs/one_at_a_time"]))
    assert len(loaded) == 5  # three policies, two scorers


# ------------------------------------------------------------------------------ a folder that holds a run


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a run's folder; the lock is of the process, not of the run."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_run_is_replaced_as_a_whole_and_only_once_the_new_one_has_a_line(demo, run_in):
    folder, few = demo / "runs/used", ("--batch-size", 4, "--output-dir", "runs/used")
    assert run_in(demo, "sft.py", "--steps", 2, "--save-every", 1, *few)[0] == 0
    before = snapshot(folder)
    assert "checkpoints/step-2/extra.json" in before and "model/config.json" in before
    refused = [
        (few, "runs/used holds a run: --resume it, lose it by --overwrite, or give another --output-dir"),
        ((*few, "--resume", "--lr", "0.1"), "runs/used was another run: --lr 0.005 -> 0.1"),
        # these die after the folder is claimed and before the first step
        ((*few, "--overwrite", "--max-length", 12), "leaves no room in --max-length 12"),
        ((*few, "--overwrite", "--max-length", 500), "exceeds the context"),
    ]
    for flags, message in refused:
        code, error = run_in(demo, "sft.py", *flags)
        assert code == 2 and message in error
        assert snapshot(folder) == before
    assert run_in(demo, "sft.py", "--steps", 1, "--overwrite", *few)[0] == 0
    after = snapshot(folder)
    assert after.keys() == {name for name in before if not name.startswith("checkpoints")}
    assert after["metrics.jsonl"].count(b"\n") == 1 and json.loads(after["args.json"])["steps"] == 1
    assert after["model/model.safetensors"] != before["model/model.safetensors"]


def test_a_run_goes_on_with_other_flags_only_if_that_is_said(demo, run_in):
    few = ("--batch-size", 4, "--save-every", 1, "--output-dir", "runs/changed")
    assert run_in(demo, "sft.py", "--steps", 1, *few)[0] == 0
    assert run_in(demo, "sft.py", "--steps", 2, *few, "--resume", "--lr", 0.1)[0] == 2
    code, error = run_in(demo, "sft.py", "--steps", 2, *few, "--resume-anyway", "--lr", 0.1)
    assert code == 0, error
    assert [row["step"] for row in read_jsonl(f"{demo}/runs/changed/metrics.jsonl")] == [0, 1]


# ------------------------------------------------------------------------------ bad input


def own(script: str, **changes) -> tuple[str, ...]:
    """The demo's models and data as if they were one's own, some of them changed. Who gives one gives all."""
    words = []
    for name, value in (importlib.import_module(script.removesuffix(".py")).DEMO | changes).items():
        several = ["=".join(pair) for pair in value] if isinstance(value, list) else [value]
        words += [f"--{name.replace('_', '-')}", *several]
    return tuple(words)


def test_resuming_with_another_model_is_refused(demo, run_in):
    from transformers import AutoModelForCausalLM, GPT2Config

    import toy_world

    small = GPT2Config(vocab_size=len(toy_world.vocabulary()), n_positions=64, n_embd=16, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(small).save_pretrained(demo / "small")
    toy_world.build_tokenizer().save_pretrained(demo / "small")
    few = ("--batch-size", 4, "--save-every", 1)
    assert run_in(demo, "sft.py", "--steps", 1, *few, "--output-dir", "runs/other")[0] == 0
    flags = ("--steps", 2, *few, *own("sft.py", model="small", output_dir="runs/other"))
    code, error = run_in(demo, "sft.py", *flags, "--resume")
    assert code == 2 and "--model runs/demo/data/tiny_gpt2 -> small" in error
    code, error = run_in(demo, "sft.py", *flags, "--resume-anyway")
    assert code == 2 and "step-1 cannot be resumed (" in error and "another model" in error


def test_labels_for_something_else_are_refused(tmp_path, run_in):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "response": "r"}\n[1]\n')
    flags = ("label", "--responses", "rows.jsonl", "--output", "out.jsonl")
    code, error = run_in(tmp_path, "toy_world.py", *flags)
    assert code == 2 and "rows.jsonl row 2: expected an object" in error
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": ROB, "response": "r"}) + '\n{"prompt": "p')
    code, error = run_in(tmp_path, "toy_world.py", *flags)
    assert code == 2 and "rows.jsonl row 2: is cut off" in error
    assert not (tmp_path / "out.jsonl").exists()


PPO, COST_MODEL = "safe_rlhf_ppo.py", "runs/demo/cost_model/model"
BAD_INPUT = [
    ("sft.py", ("--steps", "0"), "argument --steps: must be a whole number from 1, got 0"),
    ("sft.py", ("--steps", "9" * 400), "argument --steps: must be a whole number from 1, got 999"),
    ("sft.py", ("--fsdp",), "--fsdp needs torchrun, also for one process: torchrun --nproc-per-node 1 "),
    ("sft.py", ("--cpu-offload",), "--cpu-offload works with --fsdp only: add it"),
    ("sft.py", ("--dataset", "x.jsonl"), "--dataset is given, so --model and --output-dir must be too"),
    ("sft.py", own("sft.py", dataset="nowhere.jsonl"), "nowhere.jsonl: no such file"),
    (
        "reward_model.py",
        own("reward_model.py", model="runs/no/model"),
        "runs/no/model is missing; `python sft.py`",
    ),
    (
        "reward_model.py",
        own("reward_model.py", dataset="bad.jsonl"),
        "bad.jsonl row 1: field 'response_0' is",
    ),
    (PPO, ("--lambda-init", "21"), "--lambda-init 21.0 is above --lambda-max 20.0"),
    (PPO, ("--lambda-max", "0"), "argument --lambda-max: must be a number above 0, got 0"),
    (PPO, ("--reward-model", COST_MODEL), "a cost model, and a reward model is needed"),
    (PPO, ("--cost-model", "runs/demo/sft/model"), "no score head"),
    (PPO, ("--max-length", "500", "--cost-critic", COST_MODEL), "exceeds the context of runs/demo/sft/model"),
    ("evaluate.py", ("--max-length", "500"), "exceeds the context of runs/demo/sft/model, 64 tokens"),
    (
        "repo_ppo.py",
        ("--reward-model", "runs/no/model"),
        "runs/no/model is missing; `python reward_model.py` makes",
    ),
    (
        "repo_ppo.py",
        ("--max-new-tokens", "40"),
        "tokens leaves no room in --max-length 48 less --max-new-tokens 40",
    ),
    ("repo_ppo.py", ("--output-dir", "bad.jsonl/x"), "cannot write to --output-dir bad.jsonl/x"),
    ("repo_ppo.py", ("--output-dir", ""), "argument --output-dir: must be a name, got ''"),
    ("repo_ppo.py", ("--temperature", "0"), "argument --temperature: must be a number above 0, got 0"),
    (
        "evaluate.py",
        own("evaluate.py", policies=[("a", "x"), ("a", "y")]),
        "--policies needs distinct names, got a a",
    ),
    (
        "evaluate.py",
        own("evaluate.py", prompts="runs/x.jsonl"),
        "runs/x.jsonl is missing; `python toy_world.py world`",
    ),
    ("plots.py", own("plots.py", evaluation="runs/x"), "runs/x is missing; `python evaluate.py` makes it"),
    (
        "toy_world.py",
        ("label", "--responses", "none.jsonl", "--output", "x.jsonl"),
        "none.jsonl: cannot be read",
    ),
]


@pytest.mark.parametrize("script, flags, message", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(demo, run_in, script, flags, message):
    (demo / "bad.jsonl").write_text('{"prompt": "x"}\n')
    trains = script in ("sft.py", "reward_model.py", PPO, "repo_ppo.py")
    if trains and flags[0] != "--output-dir" and "must be too" not in message:
        flags += ("--output-dir", "runs/refused")
    code, line = run_in(demo, script, *flags)
    assert code == 2 and message in line and "error: " in line
    assert not snapshot(demo / "runs/refused")


def test_an_evaluation_that_cannot_be_written_ends_before_the_work(demo, run_in, monkeypatch):
    import evaluate

    monkeypatch.setattr(evaluate, "answer", None)
    (demo / "a_file").write_text("")
    code, line = run_in(demo, "evaluate.py", "--output-dir", "a_file")
    assert code == 2 and "a_file: cannot be written (" in line


@pytest.fixture(scope="module")
def finer(demo) -> Path:
    """A policy and a reward model whose tokenizer makes more tokens of a text than the demo's."""
    from test_tokenizers import byte_level
    from transformers import AutoModelForCausalLM, GPT2Config

    from plumbing import loading

    config = GPT2Config(vocab_size=1000, n_positions=48, n_embd=16, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(demo / "finer/model")
    reward = loading.load_score_model(str(demo / "finer/model"), "reward", new_head=True)
    loading.save_score_model(reward, reward.state_dict(), str(demo / "finer/reward"))
    for name in ("model", "reward"):
        byte_level().save_pretrained(demo / "finer" / name)
    return demo


def test_policies_are_compared_on_the_prompts_that_all_of_them_can_read(finer, run_in):
    policies = [("sft", "runs/demo/sft/model"), ("own", "finer/model")]
    few = ("--samples", 2, "--max-length", 22, "--max-new-tokens", 4, "--skip-bad-rows")
    flags = own("evaluate.py", policies=policies, output_dir="runs/both")
    assert run_in(finer, "evaluate.py", *flags, *few)[0] == 0
    rows = read_jsonl(f"{finer}/runs/both/responses.jsonl")
    asked = {name: [row["prompt"] for row in rows if row["policy"] == name] for name, _ in policies}
    assert asked["sft"] == asked["own"]
    assert 0 < len(set(asked["own"])) == read_json(f"{finer}/runs/both/summary.json")["prompts"] < 108


def test_a_text_beyond_the_context_of_a_scorer_is_cut_and_counted(finer, run_in):
    flags = own("evaluate.py", reward_model="finer/reward", output_dir="runs/beyond")
    assert run_in(finer, "evaluate.py", *flags, "--samples", 1)[0] == 0
    rows = read_jsonl(f"{finer}/runs/beyond/responses.jsonl")
    policies = read_json(f"{finer}/runs/beyond/summary.json")["policies"]
    for name, numbers in policies.items():
        cut = [row["scorer_cut"] for row in rows if row["policy"] == name]
        assert 0 < numbers["scorer_cut_rate"] == pytest.approx(sum(cut) / len(cut))


def test_runs_of_several_limits_are_drawn_with_their_own(monkeypatch):
    """And with their own drive, which the run's algorithm says and no flag."""
    import plots

    log = {"step": 0, "cost": 1.0, "unsafe_rate": 0.5, "lambda": 1.0, "violation": 5.0}
    logs = {
        "safe_rlhf_d-4": ({"threshold": -4.0, "batch_size": 64, "algorithm": "safe_rlhf"}, [log]),
        "repo": ({"threshold": 0.0, "batch_size": 128, "cost_window": 1, "algorithm": "repo"}, [log]),
    }
    style = {name: ("black", "-", plots.pretty(name)) for name in logs}
    (above, below), (_, drives) = (draw(logs, style, 1).axes for draw in (plots.training, plots.multiplier))
    labels = [line.get_label() for line in above.lines]
    assert "limit d = -4" in labels and "limit d = 0" in labels
    assert below.get_ylabel() == "unsafe responses of 100 (count)" and max(below.lines[0].get_ydata()) == 50
    labels = {line.get_label() for line in drives.lines}
    assert {"Safe RLHF, d = -4: J$_C$ - d", f"{plots.pretty('repo')}: E[{{C - d}}$^+$]"} <= labels


@pytest.mark.parametrize("costs", [[0.0], [-3.0, -1.0], [-0.1] * 3, [1e17] * 2, [-3e38, 3e38], [1e-30]])
def test_every_figure_shows_0_and_all_costs(costs):
    import plots

    rows = {"sft": [{"cost": c, "reward": c, "prompt": f"{i}"} for i, c in enumerate(costs)]}
    style = {"sft": ("black", "-", "SFT")}
    for draw, axis in ((plots.scatter, "x"), (plots.distributions, "x"), (plots.compensation, "y")):
        figure = draw(rows, style)
        low, high = getattr(figure.axes[0], f"get_{axis}lim")()
        assert low < min(0, *costs, 0) and max(0, *costs, 0) < high, draw
        figure.savefig("/dev/null", format="png")
        plots.plt.close(figure)
    log = {"step": 0, "cost": costs[0], "reward": costs[-1], "unsafe_rate": 0.5, "lambda": 1.0, "kl": 0.0}
    args = {"threshold": 0.0, "batch_size": 8, "cost_window": 1, "algorithm": "safe_rlhf"}
    logs = {"sft": (args, [log | {"violation": cost} for cost in costs])}
    for draw in (plots.training, plots.multiplier, plots.kl):
        figure = draw(logs, style, 1)
        low, high = figure.axes[0].get_ylim()
        assert low < high and figure.savefig("/dev/null", format="png") is None
        plots.plt.close(figure)


def test_evaluations_that_no_figure_can_show_are_one_clear_line(tmp_path, run_in):
    row = {"policy": "sft", "prompt": "p", "response": "r", "reward": 0.0, "cost": 0.0, "harm_level": 0}
    for change, message in (({"harm_level": 7}, "harm_level 7"), ({"cost": 1e300}, "'cost' is 1e+300")):
        (tmp_path / "responses.jsonl").write_text(json.dumps(row | change) + "\n")
        flags = ("--evaluation", tmp_path, "--runs", "--output-dir", tmp_path / "figures")
        code, error = run_in(tmp_path, "plots.py", *flags)
        assert code == 2 and message in error


def test_answers_are_kept_where_a_score_model_fails(demo, run_in):
    flags = ("--samples", 1, "--output-dir", "runs/unscored", "--reward-model", COST_MODEL)
    assert run_in(demo, "evaluate.py", *flags)[0] == 2
    assert len(read_jsonl(f"{demo}/runs/unscored/responses.jsonl", {"response": str})) == 3 * 108
    assert not (demo / "runs/unscored/summary.json").exists()


def test_four_policies_fit_a_line():
    import evaluate

    row = {"prompt": "p", "reward": -1.0, "cost": -12.34, "response_length": 3, "truncated": False}
    row |= {"true_reward": 1.0, "true_cost": -1.0, "best_safe_reward": 1.0, "refuses": True}
    summary = evaluate.summarize([row | {"harm_level": level} for level in (0, 1, 2)])
    table = evaluate.table(dict.fromkeys(("sft", "safe_rlhf", "safe_rlhf_price", "repo"), summary))
    assert max(map(len, table.splitlines())) <= 140 and "100.0%  100.0%   100.0%" in table


def test_a_run_folder_without_args_is_one_clear_error(demo, run_in):
    (demo / "runs/demo/no_args").mkdir()
    shutil.copy(demo / "runs/demo/repo/metrics.jsonl", demo / "runs/demo/no_args")
    flags = own("plots.py", runs=[("repo", "runs/demo/no_args")])
    code, line = run_in(demo, "plots.py", *flags)
    assert code == 2 and "no_args/args.json: cannot be read" in line


NOT_FINITE = [
    ("bias", math.nan, "its weight score_head.bias holds NaN"),
    ("weight", 3e38, "step 0: reward is not"),
]


@pytest.mark.parametrize("part, value, said", NOT_FINITE)
def test_a_non_finite_score_names_itself_and_leaves_no_model(demo, run_in, part, value, said):
    broken = demo / f"runs/demo/broken_{part}/model"
    shutil.copytree(demo / "runs/demo/reward_model/model", broken)
    state = load_file(broken / "model.safetensors")
    state[f"score_head.{part}"].fill_(value)
    save_file(state, broken / "model.safetensors")
    flags = ("--reward-model", broken, "--steps", 1, "--output-dir", "runs/demo/nan")
    code, line = run_in(demo, "repo_ppo.py", *flags)
    assert code == 2 and said in line
    assert not snapshot(demo / "runs/demo/nan")


def test_critics_with_another_tokenizer_are_refused(demo, run_in):
    other = demo / "runs/demo/other/model"
    shutil.copytree(demo / COST_MODEL, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["oil"], vocabulary["turn"] = vocabulary["turn"], vocabulary["oil"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    few = ("--steps", 1, *SMALL, "--output-dir", "runs/demo/retokenized")
    code, line = run_in(demo, "repo_ppo.py", *few, "--second-cost-model", other)
    assert code == 2 and "model: its tokenizer is not that of runs/demo/cost_model/model" in line
    few = (*few, "--cost-model", other)
    code, line = run_in(demo, "repo_ppo.py", *few)
    assert code == 2 and "the cost critic's tokenizer is not the policy's" in line
    # without critics it is fine, and with one of its own, too: responses are retokenized for it
    assert run_in(demo, "repo_rloo.py", *few, "--output-dir", "runs/demo/rloo_retokenized")[0] == 0
    few = (*few, "--second-cost-model", other)
    assert run_in(demo, "repo_ppo.py", *few, "--cost-critic", COST_MODEL)[0] == 0
