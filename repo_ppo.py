"""Stage 3b: RePO, rectified policy optimization under a constraint on every prompt (Peng et al. 2024, arXiv 2410.19933).

    max_theta E[R(x, y)]   subject to   C(x, y) <= d   for every prompt x and its response y ~ pi_theta(. | x)
    min_theta max_{lambda >= 0}  E[-R] + lambda E[{C - d}^+]                            (its Theorem 1)

The rectifier {.}^+ gives no credit for being safer than needed: nothing pays for an unsafe answer.
Twin of safe_rlhf_ppo.py: `diff safe_rlhf_ppo.py repo_ppo.py` is the difference of the two papers.

    E3  per-token reward and cost with KL     E6  the constrained advantage   <- where the twins part
    E4  generalized advantage estimation      E7  clipped policy loss
    E5  violation and multiplier              E8  clipped value loss
    E_m[.] is the mean over sequences of each sequence's mean over its real response tokens.

One step: 1 rollout, 2 score, 3 shape, 4 advantages, 5 constraint, 6 update, 7 log.

    python repo_ppo.py                                                       # the toy world, on a CPU
    torchrun --nproc-per-node 8 repo_ppo.py --fsdp --dtype bf16 --model ... --reward-model ... --cost-model ...

Left out: whitened advantages, an adaptive KL coefficient, an entropy bonus, a shared critic trunk and
a delay of the multiplier. None is in the paper's equations.
"""

import argparse
import math
import time

import torch
from torch import Tensor

from data import DataError, batch_indices, encode, encode_prompts, frame, load_prompts, load_supervised, pad, retokenize, same_tokenizer
from distributed import (
    RunError, RunLog, adamw, add_run_flags, check_finite, checkpoint_due, clip_gradients, deal, device, gather_rows, gathered,
    learning_rate, load_checkpoint, mean_over_ranks, need, run, save_checkpoint, save_final, set_learning_rate,
    shard, world_size,
)  # fmt: skip
from models import (
    ModelError, context_length, end_scores, generate, load_causal_lm, load_score_model, load_tokenizer,
    response_mask, save_causal_lm, token_log_probs,
)  # fmt: skip
from plan import print_plan


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    # models and data
    flag("--model", default="runs/demo/sft/model", help="policy to start from, also the reference of the KL term")
    flag("--reward-model", default="runs/demo/reward_model/model", help="reward model; the reward critic starts from it")
    flag("--cost-model", default="runs/demo/cost_model/model", help="cost model; the cost critic starts from it")
    flag("--reward-critic", help="another start for the reward critic, with the policy's tokenizer")
    flag("--cost-critic", help="another start for the cost critic, with the policy's tokenizer")
    flag("--dataset", default="runs/demo/data/prompts_balanced_train.jsonl", help="prompts")
    flag("--ptx-dataset", default="runs/demo/data/ptx.jsonl", help="supervised data of the PTX term ('' for none)")
    flag("--skip-bad-rows", action="store_true", help="skip and count malformed rows instead of stopping")
    flag("--chat-template", action="store_true", help="use the tokenizer's chat template for prompts")
    # rollout
    flag("--max-length", type=int, default=48, help="longest prompt + response in tokens")
    flag("--max-new-tokens", type=int, default=20, help="longest response in tokens")
    flag("--temperature", type=float, default=1.0, help="sampling temperature, also of the log-probabilities")
    # batches
    flag("--steps", type=int, default=90, help="rollouts")
    flag("--batch-size", type=int, default=128, help="samples per rollout, over all ranks")
    flag("--minibatch-size", type=int, default=32, help="samples per optimizer step, over all ranks; at most a rollout")
    flag("--micro-batch-size", type=int, default=128, help="samples per forward pass and rank")
    flag("--ppo-epochs", type=int, default=1, help="passes over a rollout")
    # PPO
    flag("--lr", type=float, default=4e-3, help="policy learning rate, cosine to zero")
    flag("--critic-lr", type=float, default=4e-3, help="learning rate of both critics, constant")
    flag("--warmup-ratio", type=float, default=0.1, help="share of steps with a rising learning rate")
    flag("--weight-decay", type=float, default=0.01, help="decoupled weight decay of the policy; the critics have none")
    flag("--grad-clip", type=float, default=1.0, help="largest gradient norm")
    flag("--gamma", type=float, default=1.0, help="discount")
    flag("--gae-lambda", type=float, default=0.95, help="lambda of GAE")
    flag("--clip", type=float, default=0.2, help="PPO's ratio clip")
    flag("--value-clip", type=float, default=5.0, help="clip of a value's move within one rollout")
    flag("--score-clip", type=float, default=50.0, help="clip of the per-token reward and cost")
    flag("--kl-coeff", type=float, default=0.03, help="beta, weight of the KL term")
    flag("--ptx-coeff", type=float, default=0.2, help="weight of the PTX term")
    # constraint
    flag("--threshold", type=float, default=0.0, help="d, the limit of the cost")
    flag("--lambda-init", type=float, default=1.0, help="first multiplier (0: none, and it stays so)")
    flag("--lambda-lr", type=float, default=0.3, help="step size of the multiplier, in its logarithm")
    flag("--lambda-max", type=float, default=5.0, help="largest multiplier")
    # log
    flag("--sample-every", type=int, default=50, help="print and save samples every N steps")
    flag("--offload-frozen", action="store_true", help="with --fsdp: keep the three frozen models in host memory")
    add_run_flags(parser, "runs/demo/repo")
    return parser.parse_args()


# ------------------------------------------------------------------------------ equations


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """E_m: (B, R), (B, R) -> scalar, the mean over rows of each row's mean over its real tokens.

    An empty row counts as 0. Padding is replaced rather than multiplied away: 0 * inf would be NaN."""
    return (torch.where(mask.bool(), x, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


def shape_rewards(
    reward: Tensor, cost: Tensor, log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, kl_coeff: float, score_clip: float
) -> tuple[Tensor, Tensor]:
    """E3: scores (B,), log-probabilities and mask (B, R) -> per-token rewards and costs (B, R).

    The score is paid at the last real token and every token pays for leaving the reference:
    k = log pi_old - log pi_ref, one sample of the KL divergence. The sum is clipped, not its parts."""
    kl = log_probs - ref_log_probs
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * (positions + 1)).argmax(-1, keepdim=True)
    at_last = (positions == last) & (mask.sum(-1, keepdim=True) > 0)  # an empty row is paid nowhere
    rewards = (-kl_coeff * kl + at_last * reward[:, None]).clamp(-score_clip, score_clip)
    # +beta k: E6 subtracts lambda times the cost and divides by 1 + lambda, so that
    # (-beta k - lambda beta k) / (1 + lambda) = -beta k. The KL weight is beta whatever lambda is.
    costs = (kl_coeff * kl + at_last * cost[:, None]).clamp(-score_clip, score_clip)
    return rewards, costs


def gae(values: Tensor, rewards: Tensor, mask: Tensor, gamma: float = 1.0, gae_lambda: float = 0.95) -> tuple[Tensor, Tensor]:
    """E4: values of the states before each token, per-token rewards, mask (B, R) -> advantages, returns (B, R).

    delta_t = r_t + gamma v_{t+1} - v_t,  A_t = sum_l (gamma gae_lambda)^l delta_{t+l},  G_t = A_t + v_t
    (Schulman et al. 2016). After the last token the value is 0: a response cut off at the
    length limit counts as finished. Nothing is whitened."""
    values, rewards = (torch.where(mask.bool(), x, 0.0) for x in (values, rewards))
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = next_advantage = delta + gamma * gae_lambda * next_advantage
        next_value = values[:, t]
    return advantages, advantages + values


def multiplier_step(log_lambda: Tensor, violation: Tensor, lr: float, lambda_max: float | None) -> Tensor:
    """E5: scalars -> scalar, gradient ascent of lambda * violation in mu = ln lambda:
    mu <- min(mu + lr * violation * exp(mu), ln lambda_max). `lambda_max=None` sets no bound."""
    log_lambda = torch.as_tensor(log_lambda)
    log_lambda = log_lambda + lr * violation * log_lambda.exp()
    return log_lambda if lambda_max is None else log_lambda.clamp(max=math.log(lambda_max))


# ============================================================================== the constraint
def rectified_advantages(reward_adv: Tensor, cost_adv: Tensor, lam: float, cost: Tensor, threshold: float) -> Tensor:
    """E6: advantages (B, R), (B, R) and costs (B,) -> (B, R): A = A_r for a safe response, C <= d, and
    A = (A_r - lambda A_c) / (1 + lambda) for an unsafe one (RePO, safe and unsafe batch).

    {C - d}^+ is flat where a response is safe: no gradient, so no credit that could pay for others."""
    unsafe = (cost > threshold)[:, None]
    return torch.where(unsafe, (reward_adv - lam * cost_adv) / (1 + lam), reward_adv)


def rectified_violation(costs: Tensor, threshold: float) -> float:
    """E5: E[{C - d}^+] over the rollout's costs (B,). Never negative: lambda stands still when all are safe."""
    return (costs - threshold).clamp(min=0).mean().item()
# ==============================================================================


def policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2) -> Tensor:
    """E7: (B, R) each -> scalar, -E_m[min(rho A, clip(rho, 1 - eps, 1 + eps) A)], rho = pi / pi_old."""
    # zero at padding before exp: its gradient would be 0 * inf there
    ratio = torch.where(mask.bool(), log_probs - old_log_probs, 0.0).exp()
    return -masked_mean(torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages), mask)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float = 5.0) -> Tensor:
    """E8: (B, R) each -> scalar, 0.5 E_m[max((v - G)^2, (clip(v, v_old - c, v_old + c) - G)^2)]."""
    clipped = torch.clamp(values, old_values - clip, old_values + clip)
    return 0.5 * masked_mean(torch.max((values - returns).square(), (clipped - returns).square()), mask)


# ------------------------------------------------------------------------------ scoring and updating


def split(batch: dict, size: int) -> list[dict]:
    """A dict of tensors with B rows each -> dicts of at most `size` rows."""
    rows = len(batch["mask"])
    return [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, rows, size)]


@torch.no_grad()
def score(rollout: dict, reference, reward_model, cost_model, reward_critic, cost_critic, args) -> None:
    """Add ref_log_probs, reward_values, cost_values (B, R) and reward, cost (B,) to a rollout, in pieces.

    `reward_ids, reward_attention_mask` (and `cost_...`) are the same responses in the ids of that model."""
    width = rollout["sequences"].shape[1] - rollout["mask"].shape[1]
    scored = {name: [] for name in ("ref_log_probs", "reward", "cost", "reward_values", "cost_values")}
    for rows in split(rollout, args.micro_batch_size):
        sequences, attention_mask = rows["sequences"], rows["attention_mask"]
        scored["ref_log_probs"].append(token_log_probs(reference, sequences, attention_mask, width, args.temperature))
        for name, model in (("reward", reward_model), ("cost", cost_model)):
            ids, ids_mask = rows[f"{name}_ids"], rows[f"{name}_attention_mask"]
            scored[name].append(end_scores(model(ids, ids_mask), ids_mask))
        for name, critic in (("reward_values", reward_critic), ("cost_values", cost_critic)):
            # column P - 1 has seen the prompt only: its value is that of the state before the first token
            scored[name].append(critic(sequences, attention_mask)[:, width - 1 : -1])
    rollout |= {name: torch.cat(parts) for name, parts in scored.items()}


def update(policy, reward_critic, cost_critic, optimizers: dict, batch: dict, ptx: list[tuple], args) -> dict:
    """One optimizer step of policy and critics on a minibatch, in micro-batches; returns what to log.

    `batch` holds sequences, attention_mask (B, P + R) and mask, log_probs, advantages, reward_values,
    reward_returns, cost_values, cost_returns (B, R). `ptx` holds (sequences, attention_mask, P)."""
    width = batch["sequences"].shape[1] - batch["mask"].shape[1]
    metrics = dict.fromkeys(("policy_loss", "ptx_loss", "reward_value_loss", "cost_value_loss", "clip_fraction"), 0.0)

    # policy: E7 + E9, one backward pass per micro-batch, one step
    for rows in split(batch, args.micro_batch_size):
        weight = len(rows["mask"]) / len(batch["mask"])  # so that micro-batches add up to the minibatch's mean
        log_probs = token_log_probs(policy, rows["sequences"], rows["attention_mask"], width, args.temperature)
        loss = policy_loss(log_probs, rows["log_probs"], rows["advantages"], rows["mask"], args.clip)
        (weight * loss).backward()
        outside = ((log_probs - rows["log_probs"]).detach().exp() - 1).abs() > args.clip
        metrics["clip_fraction"] += weight * masked_mean(outside.float(), rows["mask"]).item()
        metrics["policy_loss"] += weight * loss.item()
    for sequences, attention_mask, ptx_width in ptx:
        log_probs = token_log_probs(policy, sequences, attention_mask, ptx_width)
        weight = len(sequences) / sum(len(rows) for rows, _, _ in ptx)
        loss = -masked_mean(log_probs, attention_mask[:, ptx_width:])
        (args.ptx_coeff * weight * loss).backward()
        metrics["ptx_loss"] += weight * loss.item()
    metrics["grad_norm"] = clip_gradients(policy, args.grad_clip)
    optimizers["policy"].step()
    optimizers["policy"].zero_grad()

    # critics: E8, one after the other so that only one model's gradients are held
    for name, critic in (("reward", reward_critic), ("cost", cost_critic)):
        for rows in split(batch, args.micro_batch_size):
            weight = len(rows["mask"]) / len(batch["mask"])
            values = critic(rows["sequences"], rows["attention_mask"])[:, width - 1 : -1]
            loss = value_loss(values, rows[f"{name}_values"], rows[f"{name}_returns"], rows["mask"], args.value_clip)
            (weight * loss).backward()
            metrics[f"{name}_value_loss"] += weight * loss.item()
        clip_gradients(critic, args.grad_clip)
        optimizers[f"{name}_critic"].step()
        optimizers[f"{name}_critic"].zero_grad()
    return metrics


# ------------------------------------------------------------------------------ the loop


def main(args):
    if args.plan:
        return print_plan(args)
    torch.manual_seed(args.seed)
    if not 0 < args.lambda_max >= args.lambda_init:
        raise RunError(f"--lambda-max {args.lambda_max} must be above 0 and at least --lambda-init {args.lambda_init}")
    if args.temperature == 0:
        raise RunError("--temperature 0 samples nothing to learn from: every other response of a prompt has probability 0")
    for path, command in ((args.model, "sft"), (args.reward_model, "reward_model"), (args.cost_model, "cost_model")):
        need(path, f"python {command}.py")

    # ------------------------------------------------------------------ data
    tokenizer = load_tokenizer(args.model)
    scorers = {"reward": load_tokenizer(args.reward_model), "cost": load_tokenizer(args.cost_model)}
    for name, start in (("reward", args.reward_critic), ("cost", args.cost_critic)):
        if not same_tokenizer(load_tokenizer(start) if start else scorers[name], tokenizer):
            raise RunError(f"the {name} critic's tokenizer is not the policy's: values are per policy token. "
                           f"Give a start with the policy's tokenizer by --{name}-critic")  # fmt: skip
    foreign = {name: other for name, other in scorers.items() if not same_tokenizer(tokenizer, other)}
    room = args.max_length - args.max_new_tokens
    prompts = load_prompts(args.dataset, args.skip_bad_rows)
    prompts = encode_prompts(tokenizer, prompts, room, args.chat_template, args.skip_bad_rows)
    ptx_rows = load_supervised(args.ptx_dataset, args.skip_bad_rows) if args.ptx_dataset and args.ptx_coeff else []
    ptx_rows = encode(tokenizer, ptx_rows, args.max_length, args.chat_template, args.skip_bad_rows) if ptx_rows else []

    # ------------------------------------------------------------------ six models
    policy = load_causal_lm(args.model, on_meta=args.fsdp)
    if args.max_length > context_length(policy.config):
        raise RunError(f"--max-length {args.max_length} exceeds the policy's context of {context_length(policy.config)} tokens")
    policy = shard(policy, args)
    reference = shard(load_causal_lm(args.model, on_meta=args.fsdp), args, trained=False)
    reward_model = shard(load_score_model(args.reward_model, "reward", on_meta=args.fsdp), args, trained=False)
    cost_model = shard(load_score_model(args.cost_model, "cost", on_meta=args.fsdp), args, trained=False)
    reward_critic, cost_critic = (
        shard(load_score_model(own or other, "critic", new_head=bool(own), on_meta=args.fsdp), args)
        for own, other in ((args.reward_critic, args.reward_model), (args.cost_critic, args.cost_model))
    )
    optimizers = {
        "policy": adamw(policy, args.lr, args.weight_decay),
        "reward_critic": adamw(reward_critic, args.critic_lr, 0.0),
        "cost_critic": adamw(cost_critic, args.critic_lr, 0.0),
    }
    trained = {
        "policy": (policy, optimizers["policy"]),
        "reward_critic": (reward_critic, optimizers["reward_critic"]),
        "cost_critic": (cost_critic, optimizers["cost_critic"]),
    }

    # ------------------------------------------------------------------ multiplier and log
    start = {"step": 0, "log_lambda": math.log(args.lambda_init) if args.lambda_init else -math.inf}
    resumed = load_checkpoint(args, trained) or start
    log_lambda = torch.tensor(resumed["log_lambda"], dtype=torch.float64)
    log = RunLog(args, "RePO", ("reward", "cost", "unsafe_rate", "lambda"), resumed["step"])

    for step in range(resumed["step"], args.steps):
        started = time.perf_counter()

        # -------------------------------------------------------------- 1 rollout
        chosen = deal(batch_indices(len(prompts), args.batch_size, step, args.seed))
        prompt_ids, prompt_mask = pad([prompts[i][1] for i in chosen], tokenizer.pad_token_id, side="left")
        prompt_ids, prompt_mask, width = prompt_ids.to(device()), prompt_mask.to(device()), prompt_ids.shape[1]
        # drawn for the global batch: a sample is the same on whichever rank it falls
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        uniforms = deal(torch.rand(args.batch_size, args.max_new_tokens, generator=generator)).to(device())
        with gathered(policy):
            sequences, log_probs = generate(
                policy, prompt_ids, prompt_mask, args.max_new_tokens, args.temperature,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, uniforms=uniforms,
            )  # fmt: skip
        mask = response_mask(sequences[:, width:], tokenizer.eos_token_id)  # (B, R)
        rollout = {"sequences": sequences, "attention_mask": torch.cat([prompt_mask, mask], 1), "mask": mask, "log_probs": log_probs}
        responses = [row[real.bool()].tolist() for row, real in zip(sequences[:, width:], mask)]
        rollout_done = time.perf_counter()

        # -------------------------------------------------------------- 2 score
        for name in ("reward", "cost"):
            ids, ids_mask = sequences, rollout["attention_mask"]
            if name in foreign:  # a model with another tokenizer reads the same text in its own ids
                ids, ids_mask = retokenize([prompts[i][0] for i in chosen], responses, tokenizer, foreign[name], args.chat_template)
            rollout |= {f"{name}_ids": ids.to(device()), f"{name}_attention_mask": ids_mask.to(device())}
        score(rollout, reference, reward_model, cost_model, reward_critic, cost_critic, args)
        reward, cost = rollout["reward"], rollout["cost"]
        check_finite(step, log_probs=log_probs, **{k: rollout[k] for k in ("ref_log_probs", "reward", "cost", "reward_values", "cost_values")})
        scoring_done = time.perf_counter()

        # -------------------------------------------------------------- 3 shape
        token_rewards, token_costs = shape_rewards(
            reward, cost, log_probs, rollout["ref_log_probs"], mask, args.kl_coeff, args.score_clip
        )  # (B, R)

        # -------------------------------------------------------------- 4 advantages
        reward_adv, rollout["reward_returns"] = gae(rollout["reward_values"], token_rewards, mask, args.gamma, args.gae_lambda)
        cost_adv, rollout["cost_returns"] = gae(rollout["cost_values"], token_costs, mask, args.gamma, args.gae_lambda)

        # ============================================================== 5 constraint
        violation = rectified_violation(gather_rows(cost), args.threshold)  # of all ranks: one multiplier for all
        log_lambda = multiplier_step(log_lambda, violation, args.lambda_lr, args.lambda_max)
        lam = log_lambda.exp().item()
        rollout["advantages"] = rectified_advantages(reward_adv, cost_adv, lam, cost, args.threshold)
        # ==============================================================

        # -------------------------------------------------------------- 6 update
        set_learning_rate(optimizers["policy"], learning_rate(args.lr, step, args.steps, args.warmup_ratio, cosine=True))
        for name in ("reward_critic", "cost_critic"):
            set_learning_rate(optimizers[name], learning_rate(args.critic_lr, step, args.steps, args.warmup_ratio, cosine=False))
        updates = []
        for epoch in range(args.ppo_epochs):
            for batch in split(rollout, args.minibatch_size // world_size()):
                ptx = []
                if ptx_rows:
                    update_index = step * args.ppo_epochs * (args.batch_size // args.minibatch_size) + len(updates)
                    rows = deal([ptx_rows[i] for i in batch_indices(len(ptx_rows), args.minibatch_size, update_index, args.seed)])
                    ptx = [
                        frame(rows[i : i + args.micro_batch_size], tokenizer.pad_token_id, device())
                        for i in range(0, len(rows), args.micro_batch_size)
                    ]
                updates.append(update(policy, reward_critic, cost_critic, optimizers, batch, ptx, args))
        finished = time.perf_counter()

        # -------------------------------------------------------------- 7 log and save
        kl = ((log_probs - rollout["ref_log_probs"]) * mask).sum(-1)  # (B,) nats per response
        metrics = {
            "reward": reward.mean().item(),
            "cost": cost.mean().item(),
            "unsafe_rate": (cost > 0).float().mean().item(),
            "lambda": lam,
            "violation": violation,
            "kl": kl.mean().item(),
            "response_length": mask.sum(-1).float().mean().item(),
            "truncated_rate": (sequences[:, width:] != tokenizer.eos_token_id).all(-1).float().mean().item(),
            "empty_rate": (sequences[:, width] == tokenizer.eos_token_id).float().mean().item(),
            **{name: sum(u[name] for u in updates) / len(updates) for name in updates[0]},
            "samples_per_second": args.batch_size / (finished - started),
            "seconds_rollout": rollout_done - started,
            "seconds_scoring": scoring_done - rollout_done,
            "seconds_update": finished - scoring_done,
        }
        check_finite(step, **{name: torch.tensor(value) for name, value in metrics.items()})
        if step % args.sample_every == 0:
            log.samples(step, [
                {"prompt": prompts[chosen[i]][0], "response": tokenizer.decode(responses[i], skip_special_tokens=True),
                 "reward": reward[i].item(), "cost": cost[i].item(), "kl": kl[i].item()}
                for i in range(min(8, len(chosen)))
            ])  # fmt: skip
        log.metrics(step, mean_over_ranks(metrics))
        if checkpoint_due(args, step):
            save_checkpoint(args, step + 1, trained, {"log_lambda": log_lambda.item()})

    log.close()
    save_final(args, save_causal_lm, policy, tokenizer)


if __name__ == "__main__":
    run(main, parse_args(), (DataError, ModelError))
