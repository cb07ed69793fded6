"""Stage 3c: RePO without critics: a group of answers to each prompt, and the others as an answer's baseline.

    max_theta E[R(x, y)]   subject to   C(x, y) <= d   for every prompt x and its y ~ pi_theta(. | x)

Constraint, multiplier and loss are those of repo_ppo.py, and so is what is left out. There two value models
learn what an answer should bring. Here the mean of the G - 1 other answers to the same prompt says so (RLOO:
Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740): four models for six, and no E8.
`diff repo_ppo.py repo_rloo.py` is what critics cost in code.

    E3  per-token reward and cost with KL     E6  the constrained advantage
    E4  leave-one-out advantages              E7  clipped policy loss
    E5  violation and multiplier              E9  PTX loss
    E_m[.] is the mean over sequences of each sequence's mean over its real response tokens.

One step: 1 rollout, 2 score, 3 shape, 4 advantages, 5 constraint, 6 update, 7 log.

    python repo_rloo.py                                        # on the toy world, on a CPU
    python repo_rloo.py --group-size 8                         # 16 prompts a rollout, 8 answers each
    torchrun --nproc-per-node 8 repo_rloo.py --fsdp --dtype bf16 --model ... --reward-model ...

"Published" in a docstring is PKU's safe-rlhf; repo_ppo.py says where.
"""

import math
from itertools import compress

import torch
from torch import Tensor

import lm
from lm import in_pieces, micro_batches, response_log_probs, response_scores, token_log_probs
from plumbing import checkpoints, cli, data, loading, optim, ppo, runs
from plumbing.adapters import saver
from plumbing.cli import count, finite, fraction, nonnegative, path_or_none, positive, several
from plumbing.distributed import clip_gradients, device, gather_rows, gathered, rank_rows, world_size
from plumbing.optim import check_finite

ALGORITHM = "repo_rloo"
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
    flag("--reward-model", help="of helpfulness")
    flag("--cost-model", help="of harmfulness: a cost above 0 is unsafe")
    flag("--second-cost-model", help="trained with another --seed: the larger of both costs counts")
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
    flag("--group-size", type=several, default=4, help="G, answers to each prompt: it divides --batch-size")
    flag("--minibatch-size", type=count, default=32, help="samples per optimizer step, over all ranks")
    flag("--micro-batch-size", type=count, default=128, help="samples per forward pass and rank")
    flag("--ppo-epochs", type=count, default=1, help="passes over a rollout")
    # PPO
    flag("--lr", type=nonnegative, default=4e-3, help="policy learning rate, cosine to zero")
    flag("--warmup-ratio", type=fraction, default=0.1, help="share of steps with a rising learning rate")
    flag("--weight-decay", type=nonnegative, default=0.01, help="decoupled")
    flag("--grad-clip", type=positive, default=1.0, help="largest gradient norm")
    flag("--clip", type=positive, default=0.2, help="PPO's ratio clip")
    flag("--score-clip", type=positive, default=50.0, help="clip of the per-token reward and cost")
    flag("--kl-coeff", type=nonnegative, default=0.03, help="beta, weight of the KL term")
    flag("--ptx-coeff", type=nonnegative, default=0.2, help="weight of the PTX loss")
    # constraint
    flag("--threshold", type=finite, default=0.0, help="d, the limit of the cost")
    flag("--lambda-init", type=nonnegative, default=1.0, help="first multiplier (0: none, and it stays so)")
    flag("--lambda-lr", type=nonnegative, default=0.02, help="step size of the multiplier, in its logarithm")
    flag("--lambda-max", type=positive, default=20.0, help="largest multiplier")
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


def leave_one_out(returns: Tensor, group_size: int) -> Tensor:
    """E4: of answers (N,), those to one prompt side by side, what each brought in sum -> advantages (N,).

    A_i = S_i - mean of the others' S_j in its group. Its own is not in its baseline, which then changes
    nothing in the mean (Kool et al. 2019). Nothing is whitened: GRPO would divide by the group's spread."""
    groups = returns.view(-1, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten()


def policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2
) -> Tensor:
    """E7: (B, R) each -> scalar, -E_m[min(rho A, clip(rho, 1 - eps, 1 + eps) A)], rho = pi / pi_old.

    Published: algorithms/ppo/trainer.py, PPOTrainer.actor_loss_fn (Schulman et al. 2017)."""
    # zero at padding before exp: its gradient would be 0 * inf there
    ratio = torch.where(mask.bool(), log_probs - old_log_probs, 0.0).exp()
    return -masked_mean(torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages), mask)


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
#   kl                              (B,)         nats    3      log pi_old - log pi_ref, summed over tokens
#   advantages                      (B, R)       R       5      what the policy learns


def main(args):
    torch.manual_seed(args.seed)
    ppo.check_models(args)
    tokenizer, scorer_tokenizers, retokenized = ppo.load_tokenizers(args)
    ends = [data.end_id(tokenizer, args.chat_template), *loading.end_ids(args.model, tokenizer)]
    prompts, ptx_rows = ppo.load_texts(args, tokenizer)

    # trained, frozen: with --lora-rank these two are one set of weights, with and without adapters
    policy, reference = ppo.policy_and_reference(args)
    reward_model = ppo.score_model(args.reward_model, "reward", args)
    cost_model = ppo.score_model(args.cost_model, "cost", args)
    second_cost_model = ppo.second_cost_model(args)
    optimizer = optim.adamw(policy, args.lr, args.weight_decay)
    trained = {"policy": (policy, optimizer)}
    first = {"log_lambda": math.log(args.lambda_init) if args.lambda_init else -math.inf}
    state = checkpoints.load_checkpoint(args, trained, first)
    log_lambda = torch.tensor(state["log_lambda"], dtype=torch.float64)
    log = runs.RunLog(args, args.algorithm, ("reward", "cost", "unsafe_rate", "lambda"), state["step"])

    size, minibatch_size = args.micro_batch_size, args.minibatch_size // world_size()  # of this rank
    for step in range(state["step"], args.steps):
        laps = runs.Laps()

        # -------------------------------------------------------------- 1 rollout
        indices = data.batch_indices(len(prompts), args.batch_size // args.group_size, step, args.seed)
        # drawn for the global batch: a sample is the same on whichever rank it falls
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        uniforms = rank_rows(torch.rand(args.batch_size, args.max_new_tokens, generator=generator))
        asked = rank_rows([prompts[i] for i in indices for _ in range(args.group_size)])
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
        rollout |= {"reward": reward, "cost": cost}
        check_finite(step, log_probs=log_probs, ref_log_probs=ref_log_probs, reward=reward, cost=cost)
        if step == 0:  # before anything is learned
            log.say(ppo.scales(gather_rows(reward), gather_rows(cost), args.lambda_init))
        laps.lap("scoring")

        # -------------------------------------------------------------- 3 shape
        token_rewards, token_costs = shape_rewards(
            reward, cost, log_probs, ref_log_probs, mask, args.kl_coeff, args.score_clip
        )  # (B, R)
        rollout["kl"] = ((log_probs - ref_log_probs) * mask).sum(-1)  # (B,)

        # -------------------------------------------------------------- 4 advantages
        # of all ranks: a group may lie on several of them
        reward_adv = leave_one_out(gather_rows(token_rewards.sum(-1)), args.group_size)  # (N,)
        cost_adv = leave_one_out(gather_rows(token_costs.sum(-1)), args.group_size)  # (N,)
        # every token of an answer gets the answer's advantage
        reward_adv, cost_adv = (rank_rows(x)[:, None].expand(mask.shape) for x in (reward_adv, cost_adv))

        # ============================================================== 5 constraint
        violation = rectified_violation(gather_rows(cost), args.threshold)  # over all ranks
        log_lambda = multiplier_step(log_lambda, violation, args.lambda_lr, args.lambda_max)
        lam = log_lambda.exp().item()
        rollout["advantages"] = rectified_advantages(reward_adv, cost_adv, lam, cost, args.threshold)
        # ==============================================================

        # -------------------------------------------------------------- 6 update
        lr = optim.learning_rate(args.lr, step, args.steps, args.warmup_ratio, cosine=True)
        optim.set_learning_rate({"policy": optimizer}, policy=lr)
        updates, minibatches = [], split(rollout, minibatch_size) * args.ppo_epochs
        for i, batch in enumerate(minibatches, step * len(minibatches)):
            pieces, ptx = micro_batches(batch, size), []
            if ptx_rows:
                # another order than the prompts': in files of equal length the two would meet row by row
                order = rank_rows(data.batch_indices(len(ptx_rows), args.minibatch_size, i, -1 - args.seed))
                rows = [ptx_rows[row] for row in order]
                ptx = ptx_batch(rows, tokenizer, size, args.max_length, args.chat_template)
            options = args.temperature, args.clip, args.ptx_coeff, args.grad_clip
            updates.append(update_policy(policy, optimizer, pieces, ptx, *options))
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
