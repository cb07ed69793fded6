"""Stage 3b: RePO, PPO under a constraint on every prompt (Peng et al. 2024, arXiv 2410.19933).

    max_theta E[R(x, y)]   subject to   C(x, y) <= d   for every prompt x and its y ~ pi_theta(. | x)
    min_theta max_{lambda >= 0}  E[-R] + lambda E[{C - d}^+]                    (the paper's Theorem 1, d = 0)

The rectifier {.}^+ gives no credit for being safer than needed: nothing pays for an unsafe answer.
The twins: `diff safe_rlhf_ppo.py repo_ppo.py` is the difference of the two papers.

    E3  per-token reward and cost with KL     E6  the constrained advantage   <- with E5, where the twins part
    E4  generalized advantage estimation      E7  clipped policy loss
    E5  violation and multiplier              E8  clipped value loss          E9  PTX loss
    E_m[.] is the mean over sequences of each sequence's mean over its real response tokens.

One step: 1 rollout, 2 score, 3 shape, 4 advantages, 5 constraint, 6 update, 7 log.

    python safe_rlhf_ppo.py                                    # Safe RLHF on the toy world, on a CPU
    python repo_ppo.py                                         # RePO
    python safe_rlhf_ppo.py --lambda-init 2 --lambda-lr 0      # a price that never moves
    python safe_rlhf_ppo.py --lambda-init 0                    # baseline: PPO on the reward only
    python safe_rlhf_ppo.py --reward-shaping 1                 # baseline: PPO on R - 1.0 C
    torchrun --nproc-per-node 8 repo_ppo.py --fsdp --dtype bf16 --model ... --reward-model ...

"Published" in a docstring is PKU's safe-rlhf (https://github.com/PKU-Alignment/safe-rlhf), safe_rlhf/ left
out. Its code of April 2024 can be read line by line in this copy:
https://github.com/tcexeexe/SHTEC_RM_model/tree/5bb76e43b6804209ffa9570de55f421baa3eb007/safe_rlhf

Left out: whitened advantages, an adaptive KL coefficient, an entropy bonus, a shared critic trunk, a delay of
the multiplier (none is in the paper's equations), and a new order of the minibatches in further --ppo-epochs.
"""

import math
from itertools import compress

import torch
from torch import Tensor

import lm
from lm import in_pieces, micro_batches, response_log_probs, response_scores, state_values, token_log_probs
from plumbing import checkpoints, cli, data, loading, optim, ppo, runs
from plumbing.adapters import saver
from plumbing.cli import count, finite, fraction, nonnegative, path_or_none, positive
from plumbing.distributed import clip_gradients, device, gather_rows, gathered, rank_rows, world_size
from plumbing.optim import check_finite

ALGORITHM = "repo"
DEMO = {
    "model": "runs/demo/sft/model",
    "reward_model": "runs/demo/reward_model/model",
    "cost_model": "runs/demo/cost_model/model",
    "dataset": "runs/demo/data/prompts_balanced_train.jsonl",
    "ptx_dataset": "runs/demo/data/ptx.jsonl",
    "output_dir": f"runs/demo/{ALGORITHM}",
}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    flag = parser.add_argument
    # models and data
    flag("--model", help="policy to start from, and the KL's reference")
    flag("--reward-model", help="its critic starts from it")
    flag("--cost-model", help="its critic starts from it")
    flag("--second-cost-model", help="trained with another --seed: the larger of both costs counts")
    flag("--reward-critic", help="another start for the reward critic, with the policy's tokenizer")
    flag("--cost-critic", help="another start for the cost critic, with the policy's tokenizer")
    flag("--dataset", help="prompts")
    flag("--ptx-dataset", type=path_or_none, help="supervised data of E9 ('': none)")
    flag("--skip-bad-rows", action="store_true", help="skip and count malformed rows instead of stopping")
    flag("--chat-template", action="store_true", help="use the tokenizer's chat template for prompts")
    # rollout
    flag("--max-length", type=count, default=48, help="longest prompt + response in tokens")
    flag("--max-new-tokens", type=count, default=20, help="longest response in tokens")
    flag("--temperature", type=positive, default=1.0, help="of sampling, also in the log-probabilities")
    # batches
    flag("--steps", type=count, default=90, help="rollouts")
    flag("--batch-size", type=count, default=128, help="samples per rollout, over all ranks")
    flag("--minibatch-size", type=count, default=32, help="samples per optimizer step, over all ranks")
    flag("--micro-batch-size", type=count, default=128, help="samples per forward pass and rank")
    flag("--ppo-epochs", type=count, default=1, help="passes over a rollout")
    # PPO
    flag("--lr", type=nonnegative, default=4e-3, help="policy learning rate, cosine to zero")
    flag("--critic-lr", type=nonnegative, default=4e-3, help="learning rate of both critics, constant")
    flag("--warmup-ratio", type=fraction, default=0.1, help="share of steps with a rising learning rate")
    flag("--weight-decay", type=nonnegative, default=0.01, help="decoupled; the critics have none")
    flag("--grad-clip", type=positive, default=1.0, help="largest gradient norm")
    flag("--gamma", type=fraction, default=1.0, help="discount")
    flag("--gae-lambda", type=fraction, default=0.95, help="lambda of GAE")
    flag("--clip", type=positive, default=0.2, help="PPO's ratio clip")
    flag("--value-clip", type=positive, default=5.0, help="clip of a value's move within one rollout")
    flag("--score-clip", type=positive, default=50.0, help="clip of the per-token reward and cost")
    flag("--kl-coeff", type=nonnegative, default=0.03, help="beta, weight of the KL term")
    flag("--ptx-coeff", type=nonnegative, default=0.2, help="weight of the PTX loss")
    # constraint
    flag("--threshold", type=finite, default=0.0, help="d, the limit of the cost")
    flag("--lambda-init", type=nonnegative, default=1.0, help="first multiplier (0: none, and it stays so)")
    flag("--lambda-lr", type=nonnegative, default=0.02, help="step size of the multiplier, in its logarithm")
    flag("--lambda-max", type=positive, default=20.0, help="largest multiplier")
    flag("--reward-shaping", type=finite, metavar="NU", help="baseline: the score is R - NU * C, no lambda")
    # log
    flag("--sample-every", type=count, default=50, help="print and save samples every N steps")
    # memory
    flag("--offload-frozen", action="store_true", help="with --fsdp: the frozen models in host memory")
    flag("--lora-output", action="store_true", help="with --lora-rank: adapters of the output layer, too")
    parser.set_defaults(algorithm=ALGORITHM)
    cli.add_run_flags(parser)
    return cli.parse(parser, argv, DEMO)


# ============================================================================== the constraint
def rectified_violation(costs: Tensor, threshold: float) -> float:
    """E5: E[{C - d}^+], the mean over costs (N,). Never negative: lambda rises, or stands still at 0."""
    return (costs - threshold).clamp(min=0).mean().item()


def rectified_advantages(
    reward_adv: Tensor, cost_adv: Tensor, lam: float, cost: Tensor, threshold: float
) -> Tensor:
    """E6: advantages (B, R), (B, R) and costs (B,) -> (B, R): A = A_r where C <= d (the safe batch), and
    A = (A_r - lambda A_c) / (1 + lambda) where C > d (the unsafe batch).

    {C - d}^+ is flat below the limit: no gradient, so no credit that could pay for others."""
    over_limit = (cost > threshold)[:, None]
    return torch.where(over_limit, (reward_adv - lam * cost_adv) / (1 + lam), reward_adv)


# ------------------------------------------------------------------------------ the other equations


def multiplier_step(
    log_lambda: Tensor | float, violation: float, lr: float, lambda_max: float | None
) -> Tensor:
    """E5 (offline/satac.py: S7): m = ln lambda, in cost units the violation -> the next m, a scalar tensor.

    Gradient ascent of lambda * violation in m: m <- min(m + lr * violation * exp(m), ln lambda_max).
    `lambda_max=None` sets no bound. Published: algorithms/ppo_lag/trainer.py, PPOLagTrainer.rl_step, its
    beginning; there it moves once per optimizer step, in the PPO scripts here once per rollout."""
    log_lambda = torch.as_tensor(log_lambda)
    log_lambda = log_lambda + lr * violation * log_lambda.exp()
    return log_lambda if lambda_max is None else log_lambda.clamp(max=math.log(lambda_max))


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """E_m: (B, R), (B, R) -> scalar, the mean over rows of each row's mean over its real tokens.

    An empty row counts as 0. Padding is replaced rather than multiplied away: 0 * inf would be NaN.
    Published: utils.py, masked_mean."""
    return (torch.where(mask.bool(), x, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


def shape_rewards(
    reward: Tensor,
    cost: Tensor,
    log_probs: Tensor,
    ref_log_probs: Tensor,
    mask: Tensor,
    kl_coeff: float,
    score_clip: float,
) -> tuple[Tensor, Tensor]:
    """E3: scores (B,), log-probabilities and mask (B, R) -> per-token rewards and costs (B, R).

    The score is paid at the last real token and every token pays for leaving the reference:
    k = log pi_old - log pi_ref, one sample of the KL divergence. The sum is clipped, not its parts.
    `kl_coeff` is beta, the weight that k keeps after E6. (The paper's beta is twice that: it writes beta / 2
    in the reward and in the cost; issue 172 of PKU's repository.)
    Published: algorithms/ppo_lag/trainer.py, PPOLagTrainer.add_kl_divergence_regularization."""
    kl = log_probs - ref_log_probs
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * (positions + 1)).argmax(-1, keepdim=True)
    at_last = (positions == last) & (mask.sum(-1, keepdim=True) > 0)  # an empty row is paid nowhere
    rewards = (-kl_coeff * kl + at_last * reward[:, None]).clamp(-score_clip, score_clip)
    # +beta k: E6 subtracts lambda times the cost and divides by 1 + lambda, so that
    # (-beta k - lambda beta k) / (1 + lambda) = -beta k. The KL weight is beta whatever lambda is.
    costs = (kl_coeff * kl + at_last * cost[:, None]).clamp(-score_clip, score_clip)
    return rewards, costs


def gae(
    values: Tensor, rewards: Tensor, mask: Tensor, gamma: float = 1.0, gae_lambda: float = 0.95
) -> tuple[Tensor, Tensor]:
    """E4: values of the states before each token, rewards, mask (B, R) -> advantages, returns (B, R).

    delta_t = r_t + gamma v_{t+1} - v_t,  A_t = sum_l (gamma gae_lambda)^l delta_{t+l},  G_t = A_t + v_t
    (Schulman et al. 2016). After the last token the value is 0: a response cut off at the
    length limit counts as finished. Nothing is whitened.
    Published: trainers/rl_trainer.py, RLTrainer.get_advantages_and_returns."""
    values, rewards = (torch.where(mask.bool(), x, 0.0) for x in (values, rewards))
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = next_advantage = delta + gamma * gae_lambda * next_advantage
        next_value = values[:, t]
    return advantages, advantages + values


def policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2
) -> Tensor:
    """E7: (B, R) each -> scalar, -E_m[min(rho A, clip(rho, 1 - eps, 1 + eps) A)], rho = pi / pi_old.

    Published: algorithms/ppo/trainer.py, PPOTrainer.actor_loss_fn (Schulman et al. 2017)."""
    # zero at padding before exp: its gradient would be 0 * inf there
    ratio = torch.where(mask.bool(), log_probs - old_log_probs, 0.0).exp()
    return -masked_mean(torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages), mask)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float = 5.0
) -> Tensor:
    """E8: (B, R) each -> scalar, 0.5 E_m[max((v - G)^2, (clip(v, v_old - c, v_old + c) - G)^2)].

    Published: trainers/rl_trainer.py, RLTrainer.critic_loss_fn."""
    clipped = torch.clamp(values, old_values - clip, old_values + clip)
    return 0.5 * masked_mean(torch.max((values - returns).square(), (clipped - returns).square()), mask)


def ptx_loss(log_probs: Tensor, mask: Tensor) -> Tensor:
    """E9: log-probabilities of supervised responses, mask (B, R) -> scalar, their cross-entropy -E_m[log pi].

    The policy descends E7 + ptx_coeff * E9 in one optimizer step, so that it keeps the language of its
    supervised start. Published: trainers/rl_trainer.py, RLTrainer.ptx_step; its engine accumulates both
    losses over two backward passes into one step, which descends (E7 + ptx_coeff * E9) / 2."""
    return -masked_mean(log_probs, mask)


# ------------------------------------------------------------------------------ the pieces of a step


@torch.no_grad()
def sample(
    policy,
    prompts: list[str],
    tokenizer,
    ends: list[int],
    uniforms: Tensor,
    temperature: float,
    chat_template: bool,
) -> dict:
    """This rank's prompts (B of them) answered: the fields of phase 1 in the table of `main`. `ends` are the
    ids that end a response; `uniforms` (B, max_new_tokens) decide every draw."""
    prompt_ids = data.encode_prompts(tokenizer, prompts, chat_template)
    ids, prompt_mask = lm.pad(prompt_ids, tokenizer.pad_token_id, side="left")
    ids, prompt_mask, width = ids.to(device()), prompt_mask.to(device()), ids.shape[1]
    padding, longest = tokenizer.pad_token_id, uniforms.shape[1]
    with gathered(policy) as sampler:
        sequences, log_probs = lm.generate(
            sampler, ids, prompt_mask, longest, temperature, 1.0, ends, padding, uniforms.to(device())
        )
    del sampler  # under bf16 and with adapters it has weights of its own
    mask = lm.response_mask(sequences[:, width:], ends)  # (B, R)
    last = lm.is_end(sequences[:, width:], ends)  # (B, R)
    spoken = (mask.bool() & ~last).tolist()  # from the GPU at once: row by row it would wait for it B times
    responses = [list(compress(*row)) for row in zip(sequences[:, width:].tolist(), spoken)]
    return {
        "prompts": prompts,
        "responses": data.decode_responses(tokenizer, prompt_ids, responses),
        "sequences": sequences,
        "attention_mask": torch.cat([prompt_mask, mask], 1),
        "mask": mask,
        "ended": last.any(-1),
        "log_probs": log_probs,
    }


def split(batch: dict, size: int) -> list[dict]:
    """A dict of tensors or lists with B rows each -> dicts of at most `size` rows, in order."""
    rows = len(batch["mask"])
    return [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, rows, size)]


def ptx_batch(
    rows: list[tuple[str, str]], tokenizer, size: int, max_length: int, chat_template: bool
) -> list[tuple]:
    """Supervised (prompt, response) rows -> micro-batches (sequences, attention_mask, P)."""
    encoded = lm.by_length(data.encode(tokenizer, rows, max_length, chat_template))
    pieces = [encoded[i : i + size] for i in range(0, len(encoded), size)]
    return [lm.frame(piece, tokenizer.pad_token_id, device()) for piece in pieces]


def update_policy(
    policy,
    optimizer,
    pieces: list[dict],
    ptx: list[tuple],
    temperature: float,
    clip: float,
    ptx_coeff: float,
    grad_clip: float,
) -> dict:
    """E7 + E9: one backward pass per micro-batch, then one optimizer step; returns what to log."""
    metrics = dict.fromkeys(("policy_loss", "ptx_loss", "clip_fraction"), 0.0)  # tensors: .item() would wait
    for piece in pieces:
        old, mask = piece["log_probs"], piece["mask"]
        log_probs = response_log_probs(policy, piece, temperature)
        loss = policy_loss(log_probs, old, piece["advantages"], mask, clip)
        (piece["share"] * loss).backward()
        outside = ((log_probs - old).detach().exp() - 1).abs() > clip
        metrics["clip_fraction"] += piece["share"] * masked_mean(outside.float(), mask)
        metrics["policy_loss"] += piece["share"] * loss.detach()
    for sequences, attention_mask, width in ptx:
        share = len(sequences) / sum(len(rows) for rows, _, _ in ptx)
        log_probs = token_log_probs(policy, sequences, attention_mask, width)
        loss = ptx_loss(log_probs, attention_mask[:, width:])
        (ptx_coeff * share * loss).backward()
        metrics["ptx_loss"] += share * loss.detach()
    metrics["grad_norm"] = clip_gradients(policy, grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    return metrics


def update_critic(
    critic, optimizer, pieces: list[dict], name: str, value_clip: float, grad_clip: float
) -> dict:
    """E8 of the critic `name`, "reward" or "cost": one optimizer step; returns what to log."""
    total = 0.0
    for piece in pieces:
        old, returns = piece[f"{name}_values"], piece[f"{name}_returns"]
        values = state_values(critic, piece)
        loss = value_loss(values, old, returns, piece["mask"], value_clip)
        (piece["share"] * loss).backward()
        total += piece["share"] * loss.detach()
    clip_gradients(critic, grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    return {f"{name}_value_loss": total}


def step_metrics(rollout: dict, updates: list[dict], threshold: float) -> dict:
    """This rank's means over the rollout and over the step's updates, by the names of docs/metrics.md."""
    cost, length, ended = rollout["cost"], rollout["mask"].sum(-1), rollout["ended"]
    values = {
        "reward": rollout["reward"],
        "cost": cost,
        "unsafe_rate": cost > 0,
        "over_limit_rate": cost > threshold,
        "kl": rollout["kl"],
        "response_length": length,
        "truncated_rate": ~ended,
        "empty_rate": ended & (length == 1),
        "scorer_cut_rate": rollout["scorer_cut"],
        # e_r and e_c of docs/stalling.md: what the critic says before the first token, less what then came
        "reward_value_error": (rollout["reward_values"] - rollout["reward_returns"])[:, 0],
        "cost_value_error": (rollout["cost_values"] - rollout["cost_returns"])[:, 0],
    }
    means = {name: value.float().mean().item() for name, value in values.items()}
    return means | {name: float(sum(u[name] for u in updates)) / len(updates) for name in updates[0]}


# ------------------------------------------------------------------------------ the loop
#
# A rollout is a dict of this rank's B rows. P is the prompts' width, R the responses'.
#
#   field                           shape        unit    phase  what it is
#   prompts, responses              B texts              1
#   sequences                       (B, P + R)   ids     1      prompt padded left, response right
#   attention_mask                  (B, P + R)   0, 1    1      their real tokens
#   mask                            (B, R)       0, 1    1      the response's real tokens, EOS included
#   ended                           (B,)         bool    1      it ended before --max-new-tokens
#   log_probs                       (B, R)       nats    1      log pi_old, under the distribution drawn from
#   reward_ids, cost_ids            (B, L)       ids     2      the same texts in the ids of that model,
#   reward_, cost_attention_mask    (B, L)       0, 1    2      with the one end that it was trained with
#   scorer_cut                      (B,)         bool    2      too long for one of them, so cut off
#   reward, cost                    (B,)         R, C    2      scores of the whole response; C > 0: unsafe
#   reward_values, cost_values      (B, R)       R, C    2      of the states before each token
#   kl                              (B,)         nats    3      log pi_old - log pi_ref, summed over tokens
#   reward_returns, cost_returns    (B, R)       R, C    4      what the critics learn
#   advantages                      (B, R)       R       5      what the policy learns


def main(args):
    torch.manual_seed(args.seed)
    ppo.check_models(args)
    tokenizer, scorer_tokenizers, retokenized = ppo.load_tokenizers(args)
    ends = [data.end_id(tokenizer, args.chat_template), *loading.end_ids(args.model, tokenizer)]
    prompts, ptx_rows = ppo.load_texts(args, tokenizer)

    # trained, frozen: with --lora-rank the two of a line are one set of weights, with and without adapters
    policy, reference = ppo.policy_and_reference(args)
    reward_critic, reward_model = ppo.critic_and_score_model("reward", args)
    cost_critic, cost_model = ppo.critic_and_score_model("cost", args)
    second_cost_model = ppo.second_cost_model(args)
    trained = {"policy": (policy, optim.adamw(policy, args.lr, args.weight_decay))}
    trained |= {"reward_critic": (reward_critic, optim.adamw(reward_critic, args.critic_lr, 0.0))}
    trained |= {"cost_critic": (cost_critic, optim.adamw(cost_critic, args.critic_lr, 0.0))}
    optimizers = {name: optimizer for name, (_, optimizer) in trained.items()}
    lambda_init = args.lambda_init if args.reward_shaping is None else 0.0
    first = {"log_lambda": math.log(lambda_init) if lambda_init else -math.inf}
    state = checkpoints.load_checkpoint(args, trained, first)
    log_lambda = torch.tensor(state["log_lambda"], dtype=torch.float64)
    log = runs.RunLog(args, args.algorithm, ("reward", "cost", "unsafe_rate", "lambda"), state["step"])

    size, minibatch_size = args.micro_batch_size, args.minibatch_size // world_size()  # of this rank
    for step in range(state["step"], args.steps):
        laps = runs.Laps()

        # -------------------------------------------------------------- 1 rollout
        indices = data.batch_indices(len(prompts), args.batch_size, step, args.seed)
        # drawn for the global batch: a sample is the same on whichever rank it falls
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        uniforms = rank_rows(torch.rand(args.batch_size, args.max_new_tokens, generator=generator))
        asked = rank_rows([prompts[i] for i in indices])
        rollout = sample(policy, asked, tokenizer, ends, uniforms, args.temperature, args.chat_template)
        if args.dtype == "bf16":
            # decoding rounds otherwise than a pass over whole sequences does, so E7's ratios would not begin
            # at 1 (docs/scaling.md): once more, in the micro-batches that phase 6 will see
            batches = split(rollout, minibatch_size)
            again = [in_pieces(response_log_probs, policy, b, size, args.temperature) for b in batches]
            rollout["log_probs"] = torch.cat(again)
        mask, log_probs = rollout["mask"], rollout["log_probs"]  # (B, R)
        laps.lap("rollout")

        # -------------------------------------------------------------- 2 score
        rollout |= data.scorer_ids(rollout, scorer_tokenizers, retokenized, args.chat_template)
        ref_log_probs = in_pieces(response_log_probs, reference, rollout, size, args.temperature)  # (B, R)
        reward = in_pieces(response_scores, reward_model, rollout, size, "reward")  # (B,)
        cost = in_pieces(response_scores, cost_model, rollout, size, "cost")  # (B,)
        if second_cost_model:  # what fools one cost model may not fool another one: the larger cost counts
            cost = torch.maximum(cost, in_pieces(response_scores, second_cost_model, rollout, size, "cost"))
        reward_values = in_pieces(state_values, reward_critic, rollout, size)  # (B, R)
        cost_values = in_pieces(state_values, cost_critic, rollout, size)  # (B, R)
        rollout |= dict(reward=reward, cost=cost, reward_values=reward_values, cost_values=cost_values)
        check_finite(step, log_probs=log_probs, ref_log_probs=ref_log_probs, reward=reward, cost=cost)
        check_finite(step, reward_values=reward_values, cost_values=cost_values)
        if step == 0:  # before anything is learned
            price = args.lambda_init if args.reward_shaping is None else args.reward_shaping
            log.say(ppo.scales(gather_rows(reward), gather_rows(cost), price))
        laps.lap("scoring")

        # -------------------------------------------------------------- 3 shape
        score = reward if args.reward_shaping is None else reward - args.reward_shaping * cost
        token_rewards, token_costs = shape_rewards(
            score, cost, log_probs, ref_log_probs, mask, args.kl_coeff, args.score_clip
        )  # (B, R)
        rollout["kl"] = ((log_probs - ref_log_probs) * mask).sum(-1)  # (B,)

        # -------------------------------------------------------------- 4 advantages
        reward_adv, reward_returns = gae(reward_values, token_rewards, mask, args.gamma, args.gae_lambda)
        cost_adv, cost_returns = gae(cost_values, token_costs, mask, args.gamma, args.gae_lambda)
        rollout |= {"reward_returns": reward_returns, "cost_returns": cost_returns}

        # ============================================================== 5 constraint
        violation = rectified_violation(gather_rows(cost), args.threshold)  # over all ranks
        log_lambda = multiplier_step(log_lambda, violation, args.lambda_lr, args.lambda_max)
        lam = log_lambda.exp().item()
        rollout["advantages"] = rectified_advantages(reward_adv, cost_adv, lam, cost, args.threshold)
        # ==============================================================

        # -------------------------------------------------------------- 6 update
        lr = optim.learning_rate(args.lr, step, args.steps, args.warmup_ratio, cosine=True)
        critic_lr = optim.learning_rate(args.critic_lr, step, args.steps, args.warmup_ratio, cosine=False)
        optim.set_learning_rate(optimizers, policy=lr, reward_critic=critic_lr, cost_critic=critic_lr)
        updates, minibatches = [], split(rollout, minibatch_size) * args.ppo_epochs
        for i, batch in enumerate(minibatches, step * len(minibatches)):
            pieces, ptx = micro_batches(batch, size), []
            if ptx_rows:
                # another order than the prompts': in files of equal length the two would meet row by row
                order = rank_rows(data.batch_indices(len(ptx_rows), args.minibatch_size, i, -1 - args.seed))
                rows = [ptx_rows[row] for row in order]
                ptx = ptx_batch(rows, tokenizer, size, args.max_length, args.chat_template)
            # one model after the other, so that only one's gradients are held
            options = args.temperature, args.clip, args.ptx_coeff, args.grad_clip
            metrics = update_policy(policy, optimizers["policy"], pieces, ptx, *options)
            for name, critic in (("reward", reward_critic), ("cost", cost_critic)):
                optimizer = optimizers[f"{name}_critic"]
                metrics |= update_critic(critic, optimizer, pieces, name, args.value_clip, args.grad_clip)
            updates.append(metrics)
        laps.lap("update")

        # -------------------------------------------------------------- 7 log and save
        metrics = step_metrics(rollout, updates, args.threshold)
        metrics |= {"lambda": lam, "violation": violation} | laps.seconds
        metrics["samples_per_second"] = args.batch_size / sum(laps.seconds.values())
        check_finite(step, **metrics)
        if step % args.sample_every == 0:
            log.samples(step, rollout)
        log.metrics(step, metrics)
        if checkpoints.checkpoint_due(args, step):
            extra = {"log_lambda": log_lambda.item()}
            checkpoints.save_checkpoint(args, step + 1, trained, extra)

    log.close()
    checkpoints.save_final(args, saver(args, loading.save_causal_lm), policy, tokenizer)


if __name__ == "__main__":
    runs.run(main, parse_args())
