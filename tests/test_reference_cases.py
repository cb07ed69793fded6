"""Every number in tests/reference_cases, held to this project's own functions.

The numbers came from another implementation of Safe RLHF (see the README there). Tolerance:
|got - want| <= 1e-5 * max(1, |want|). Where the project differs on purpose, the test says so.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import cost_model
import lm
import repo_ppo
import reward_model
import safe_rlhf_ppo as ppo
from lm import ScoreModel, end_scores
from plumbing.loading import load_score_model

FOLDER = Path(__file__).parent / "reference_cases"
T = torch.tensor


def cases(name: str):
    content = json.loads((FOLDER / f"{name}.json").read_text())
    return [pytest.param(SimpleNamespace(**case), id=case["name"]) for case in content["cases"]]


CHECKED = {"numbers": 0, "worst": 0.0}


def agree(got, want) -> None:
    got, want = torch.as_tensor(got).detach().double(), T(want, dtype=torch.float64)
    assert got.shape == want.shape
    error = ((got - want).abs() / want.abs().clamp(min=1)).max().item()
    CHECKED["numbers"] += want.numel()
    CHECKED["worst"] = max(CHECKED["worst"], error)
    assert error <= 1e-5


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    print(f"\n{CHECKED['numbers']} reference numbers checked, worst relative error {CHECKED['worst']:.1e}")


# ------------------------------------------------------------------------------ E3, E4


@pytest.mark.parametrize("case", cases("01_gae"))
def test_gae(case):
    p = case.params
    i = {k: T(v)[:, p["start"] :] for k, v in case.inputs.items()}  # the response frame
    advantages, returns = ppo.gae(i["values"], i["rewards"], i["sequence_mask"], p["gamma"], p["gae_lambda"])
    agree(advantages, case.outputs["advantages"])
    agree(returns, case.outputs["returns"])


@pytest.mark.parametrize("case", cases("02_kl_regularization"))
def test_shape_rewards(case):
    # there the prompt's columns carry a KL term as well (masked out later); the frame here has none
    start, i = case.params["start"], {k: T(v) for k, v in case.inputs.items()}
    log_probs, ref, mask = (i[k][:, start:] for k in ("log_probs", "ref_log_probs", "sequence_mask"))
    constants = case.params["kl_coeff"], case.params["clip_range_score"]
    rewards, costs = ppo.shape_rewards(i["reward"], i["cost"], log_probs, ref, mask, *constants)
    agree(rewards, [row[start:] for row in case.outputs["rewards"]])
    agree(costs, [row[start:] for row in case.outputs["costs"]])
    agree(rewards, [row[start:] for row in case.outputs["ppo_reward_only_rewards"]])


# ------------------------------------------------------------------------------ E6, E7, E8


@pytest.mark.parametrize("case", cases("03_actor_loss_ppo_lag"))
def test_lagrangian_policy_loss(case):
    i = {k: T(v) for k, v in case.inputs.items()}
    log_probs = i["log_probs"].requires_grad_()
    given = i["reward_advantages"], i["cost_advantages"], case.params["lambda"]
    all_unsafe, clip = torch.ones(len(log_probs)), case.params["clip_range_ratio"]
    lagrangian, rectified = (
        ppo.lagrangian_advantages(*given),
        repo_ppo.rectified_advantages(*given, all_unsafe, 0.0),
    )
    for advantages in (lagrangian, rectified):
        log_probs.grad = None
        loss = ppo.policy_loss(log_probs, i["old_log_probs"], advantages, i["mask"], clip)
        loss.backward()
        agree(loss, case.outputs["loss"])
        agree(log_probs.grad, case.outputs["grad_log_probs"])


@pytest.mark.parametrize("case", cases("09_actor_loss_ppo"))
def test_ppo_policy_loss(case):
    i = {k: T(v) for k, v in case.inputs.items()}
    log_probs = i["log_probs"].requires_grad_()
    all_safe, any_cost_adv = -torch.ones(len(log_probs)), torch.randn_like(log_probs)
    advantages = repo_ppo.rectified_advantages(i["advantages"], any_cost_adv, 3.0, all_safe, 0.0)
    clip = case.params["clip_range_ratio"]
    loss = repo_ppo.policy_loss(log_probs, i["old_log_probs"], advantages, i["mask"], clip)
    loss.backward()
    agree(loss, case.outputs["loss"])
    agree(log_probs.grad, case.outputs["grad_log_probs"])


@pytest.mark.parametrize("case", cases("04_critic_loss"))
def test_value_loss(case):
    i = {k: T(v) for k, v in case.inputs.items()}
    values = i["values"].requires_grad_()
    loss = ppo.value_loss(values, i["old_values"], i["returns"], i["mask"], case.params["clip_range_value"])
    loss.backward()
    agree(loss, case.outputs["loss"])
    agree(values.grad, case.outputs["grad_values"])


# ------------------------------------------------------------------------------ E5


@pytest.mark.parametrize("case", cases("05_lambda_update"))
def test_multiplier(case):
    """Deliberate differences: lambda moves once per rollout here and once per optimizer step there (so
    the case is replayed step by step), and there is no delay of the first updates (replayed as lr 0)."""
    p = case.params
    window, log_lambda, previous = [], T(math.log(p["lambda_init"])), None
    for k, (batch, global_step) in enumerate(zip(case.outputs["batch"], case.outputs["global_step"])):
        if batch != previous:
            window = [*window, *case.inputs["episode_costs"][batch]][-p["window_size"] :]
            previous = batch
        violation = ppo.expected_violation(T(window), p["threshold"])
        agree(violation + p["threshold"], case.outputs["window_mean_cost"][k])
        lr = p["lambda_lr"] if global_step >= p["lambda_update_delay_steps"] else 0.0
        log_lambda = ppo.multiplier_step(log_lambda, T(violation), lr, p["lambda_max"])
        agree(log_lambda, case.outputs["log_lambda"][k])
        agree(log_lambda.exp(), case.outputs["lambda"][k])


# ------------------------------------------------------------------------------ E1, E2


@pytest.mark.parametrize("case", cases("06_reward_loss"))
def test_reward_loss(case):
    i, regularization = {k: T(v) for k, v in case.inputs.items()}, case.params["regularization"]
    better, worse = i["better_scores"].requires_grad_(), i["worse_scores"].requires_grad_()
    ids = i["better_input_ids"], i["worse_input_ids"]
    masks = i["better_attention_mask"], i["worse_attention_mask"]
    chosen, rejected = map(end_scores, (better, worse), masks)
    if case.params["loss_type"] == "sequence-wise":
        loss = reward_model.reward_loss(chosen, rejected, regularization)
    else:
        loss = reward_model.reward_loss_tokenwise(better, worse, *ids, *masks, regularization)
    loss.backward()
    agree(loss, case.outputs["loss"])
    agree((chosen > rejected).float().mean(), case.outputs["accuracy"])
    agree(chosen, case.outputs["higher_end_reward"])
    agree(rejected, case.outputs["lower_end_reward"])
    agree(better.grad, case.outputs["grad_better_scores"])
    agree(worse.grad, case.outputs["grad_worse_scores"])


@pytest.mark.parametrize("case", cases("07_cost_loss"))
def test_cost_loss(case):
    i, regularization = {k: T(v) for k, v in case.inputs.items()}, case.params["regularization"]
    safer_scores, unsafer_scores = i["safer_scores"].requires_grad_(), i["unsafer_scores"].requires_grad_()
    scores = safer_scores, unsafer_scores
    ids = i["safer_input_ids"], i["unsafer_input_ids"]
    masks = i["safer_attention_mask"], i["unsafer_attention_mask"]
    safer, unsafer = map(end_scores, scores, masks)
    is_safe = (i["safer_safety_sign"] > 0, i["unsafer_safety_sign"] > 0)
    if case.params["loss_type"] == "sequence-wise":
        loss = cost_model.cost_loss(safer, unsafer, *is_safe, regularization)
    else:
        loss = cost_model.cost_loss_tokenwise(*scores, *ids, *masks, *is_safe, regularization)
    loss.backward()
    agree(loss, case.outputs["loss"])
    agree((unsafer > safer).float().mean(), case.outputs["accuracy"])
    right_sign = cost_model.harm_sign(torch.cat(is_safe)) * torch.cat([safer, unsafer]) > 0
    agree(right_sign.float().mean(), case.outputs["accuracy_sign"])
    agree(safer, case.outputs["lower_end_cost"])
    agree(unsafer, case.outputs["higher_end_cost"])
    agree(safer_scores.grad, case.outputs["grad_safer_scores"])
    agree(unsafer_scores.grad, case.outputs["grad_unsafer_scores"])


# ------------------------------------------------------------------------------ score models


@pytest.mark.parametrize("case", cases("08_score_model_gpt2") + cases("08_score_model_llama"))
def test_score_model(case, tmp_path):
    """Deliberate difference: positions count real tokens here, so a left-padded GPT-2 scores as if it
    were padded right; there they count over the padding, and its left-padded scores are others."""
    p, ids = case.params, T(case.inputs["input_ids"])
    mask = torch.ones_like(ids) if case.inputs["attention_mask"] is None else T(case.inputs["attention_mask"])
    model = load_score_model(str(FOLDER / p["model_dir"]), "critic")
    model.score_type, model.do_normalize = p["score_type"], p["do_normalize"]
    scores = model(ids, None if case.inputs["attention_mask"] is None else mask)
    ends = end_scores(scores, mask)
    if p["model_dir"].endswith("gpt2") and p["padding_side"] == "left":
        for row in range(len(ids)):
            alone = model(ids[row : row + 1, mask[row].bool()])
            agree(scores[row, mask[row].bool()], alone[0].tolist())
            agree(ends[row], alone[0, -1].tolist())
        assert (ends - T(case.outputs["end_scores"])).abs().max() > 1e-4
    else:
        agree(scores[mask.bool()], T(case.outputs["scores"])[mask.bool()].tolist())
        agree(ends, case.outputs["end_scores"])


class Identity(nn.Module):
    """A backbone whose hidden state is its input, so that a score is a number of our choice."""

    config = SimpleNamespace(hidden_size=1)

    def forward(self, input_ids, **_):
        return SimpleNamespace(last_hidden_state=input_ids[..., None].float())


@pytest.mark.parametrize("case", cases("11_normalizer"))
def test_stored_normalizers(case):
    """Stored statistics are honoured; gathering them while training is left out on purpose, so `mean`
    and `var` of the case are inputs here."""
    if case.params["normalizer_type"] is None:
        mean, var, normalize = [0.0], [1.0], False
    else:
        mean, var, normalize = case.outputs["mean"][-1], case.outputs["var"][-1], True
    wanted = {"reward": "normalized_affine", "cost": "normalized_scale", "critic": "normalized_identity"}
    for score_type, key in wanted.items():
        model = ScoreModel(Identity(), score_type, bias=False, do_normalize=normalize)
        nn.init.ones_(model.score_head.weight)
        model.normalizer.mean.copy_(T(mean))
        model.normalizer.var.copy_(T(var))
        agree(model(T([case.inputs["probe"]]), torch.ones(1, 6).long())[0], case.outputs[key])


# ------------------------------------------------------------------------------ whole updates


class Table(nn.Module):
    """A bigram table as a model: logits, or a value, of the token at t."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(T(table))

    def forward(self, input_ids, attention_mask=None, logits_to_keep=0, **_):
        rows = self.table[input_ids]
        return SimpleNamespace(logits=rows[:, -logits_to_keep:]) if self.table.ndim == 2 else rows


class Given(nn.Module):
    """A score model that gives every response the score written down in the case."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def forward(self, input_ids, attention_mask):
        return self.scores[:, None].expand(input_ids.shape)


@pytest.mark.parametrize("case", cases("10_rl_step"))
def test_whole_updates(case):
    """shape_rewards, gae, the multiplier, the advantages and the updates of safe_rlhf_ppo.py on the case's
    trajectories. lambda moves before each update, as in the case."""
    p, i = SimpleNamespace(**case.params), case.inputs
    lagrangian, shaping = p.algorithm == "ppo_lag", p.algorithm == "ppo_reward_shaping"
    names = ("actor_table", "ref_table", "reward_critic_table", "cost_critic_table")
    policy, reference, reward_critic, cost_critic = (Table(i[name]) for name in names)
    optimizers = {
        "policy": torch.optim.SGD(policy.parameters(), p.actor_sgd_lr),
        "reward_critic": torch.optim.SGD(reward_critic.parameters(), p.critic_sgd_lr),
        "cost_critic": torch.optim.SGD(cost_critic.parameters(), p.critic_sgd_lr),
    }
    gradients = []
    policy.table.register_hook(lambda grad: gradients.append(grad))
    log_lambda = T(math.log(getattr(p, "lambda_init", 1.0)), dtype=torch.float64)
    window, kept, steps = [], getattr(p, "episode_cost_window_size", 1), iter(case.outputs["steps"])

    for k, updates in enumerate(p.updates_per_rollout):
        sequences, want = T(i["sequences"][k]), case.outputs["rollouts"][k]
        attention_mask = T(want["attention_mask"]).long()
        width = p.start + 1
        mask = attention_mask[:, width:]
        with torch.no_grad():
            log_probs = lm.token_log_probs(policy, sequences, attention_mask, width)
        rollout = {"sequences": sequences, "attention_mask": attention_mask}
        rollout |= {"mask": mask, "log_probs": log_probs}
        for name in ("reward", "cost"):
            rollout |= {f"{name}_ids": sequences, f"{name}_attention_mask": attention_mask}
        size = len(sequences)
        rollout["ref_log_probs"] = lm.in_pieces(lm.response_log_probs, reference, rollout, size, 1.0)
        for name, critic in (("reward", reward_critic), ("cost", cost_critic)):
            rollout[name] = lm.in_pieces(lm.response_scores, Given(T(i[name][k])), rollout, size, name)
            rollout[f"{name}_values"] = lm.in_pieces(lm.state_values, critic, rollout, size)
        for name in ("log_probs", "ref_log_probs", "reward_values", "cost_values"):
            if name in want:
                agree(rollout[name][mask.bool()], T(want[name])[:, p.start :][mask.bool()].tolist())

        reward, cost = rollout["reward"], rollout["cost"]
        paid = reward - p.lambda_init * cost if shaping else reward
        token_rewards, token_costs = ppo.shape_rewards(
            paid, cost, log_probs, rollout["ref_log_probs"], mask, p.kl_coeff, p.clip_range_score
        )
        reward_values, cost_values, decay = (
            rollout["reward_values"],
            rollout["cost_values"],
            (p.gamma, p.gae_lambda),
        )
        reward_adv, rollout["reward_returns"] = ppo.gae(reward_values, token_rewards, mask, *decay)
        cost_adv, rollout["cost_returns"] = ppo.gae(cost_values, token_costs, mask, *decay)
        kl = ((log_probs - rollout["ref_log_probs"]) * mask).sum(-1).mean()
        window = [*window, *cost.tolist()][-kept:]
        for _ in range(updates):
            step = next(steps)
            lam = 0.0
            if lagrangian:
                violation = ppo.expected_violation(T(window), p.threshold)
                log_lambda = ppo.multiplier_step(log_lambda, violation, p.lambda_lr, p.lambda_max)
                lam = log_lambda.exp().item()
                agree(lam, step["metrics"]["lambda"])
                agree(ppo.expected_violation(T(window), 0.0), step["metrics"]["episode_cost"])
            rollout["advantages"] = ppo.lagrangian_advantages(reward_adv, cost_adv, lam)
            gradients.clear()
            pieces, clips = lm.micro_batches(rollout, 3), (p.clip_range_ratio, 0.0, math.inf)
            metrics = ppo.update_policy(policy, optimizers["policy"], pieces, [], 1.0, *clips)
            for name, critic in (("reward", reward_critic), ("cost", cost_critic)):
                own = critic, optimizers[f"{name}_critic"], pieces, name, p.clip_range_value, math.inf
                metrics |= ppo.update_critic(*own)

            agree(sum(gradients), step["actor_grad"])
            agree(policy.table, step["actor_table"])
            agree(reward_critic.table, step["reward_critic_table"])
            agree(metrics["policy_loss"], step["metrics"]["actor_loss"])
            agree(metrics["reward_value_loss"], step["metrics"]["reward_critic_loss"])
            prefix = "shaped_" if shaping else ""
            agree(ppo.masked_mean(reward_adv, mask), step["metrics"][prefix + "reward_advantage"])
            agree(ppo.masked_mean(rollout["reward_returns"], mask), step["metrics"][prefix + "reward_return"])
            agree((token_rewards * mask).sum(-1).mean(), step["metrics"][prefix + "reward_with_kl_penalty"])
            agree(kl, step["metrics"]["kl_divergence"])
            if lagrangian:
                agree(cost_critic.table, step["cost_critic_table"])
                agree(metrics["cost_value_loss"], step["metrics"]["cost_critic_loss"])
                agree(ppo.masked_mean(cost_adv, mask), step["metrics"]["cost_advantage"])
                agree((token_costs * mask).sum(-1).mean(), step["metrics"]["cost_with_kl_penalty"])
