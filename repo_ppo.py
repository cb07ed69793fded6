"""Stage 3b: RePO, PPO under a constraint on every prompt (Peng et al. 2024, arXiv 2410.19933).

    max_theta E[R(x, y)]   subject to   C(x, y) <= d   for every prompt x and its y ~ pi_theta(. | x)
    min_theta max_{lambda >= 0}  E[-R] + lambda E[{C - d}^+]                            (its Theorem 1, d = 0)

The rectifier {.}^+ gives no credit for being safer than needed: nothing pays for an unsafe answer.
Twin of safe_rlhf_ppo.py: `diff safe_rlhf_ppo.py repo_ppo.py` is the difference of the two papers.

    E3  per-token reward and cost with KL     E6  the constrained advantage   <- where the twins part
    E4  generalized advantage estimation      E7  clipped policy loss
    E5  violation and multiplier              E8  clipped value loss          E9  PTX loss
    E_m[.] is the mean over sequences of each sequence's mean over its real response tokens.

One step: 1 rollout, 2 score, 3 shape, 4 advantages, 5 constraint, 6 update, 7 log.

    python repo_ppo.py                                                    # the toy world, on a CPU
    torchrun --nproc-per-node 8 repo_ppo.py --fsdp --dtype bf16 --model ... --reward-model ...

"Published" in a docstring is PKU's safe-rlhf, safe_rlhf/ left out, as in this copy of April 2024:
https://github.com/tcexeexe/SHTEC_RM_model/tree/5bb76e43b6804209ffa9570de55f421baa3eb007/safe_rlhf

Left out: whitened advantages, an adaptive KL coefficient, an entropy bonus, a shared critic trunk, a delay of
the multiplier (none is in the paper's equations), and a new order of the minibatches in further --ppo-epochs.
"""

import math
from itertools import compress

import torch
from torch import Tensor

import lm
from lm import end_scores, frame, generate, is_end, micro_batches, pad, rejoin, response_mask, token_log_probs
from plumbing import checkpoints, cli, data, loading, optim, runs
from plumbing.adapters import WithoutAdapters, adapt, saver
from plumbing.cli import Demo, count, finite, fraction, nonnegative, positive
from plumbing.data import batch_indices, same_tokenizer
from plumbing.distributed import (
    clip_gradients,
    device,
    gather_rows,
    gathered,
    load_options,
    rank_rows,
    shard,
    world_size,
)
from plumbing.files import InputError
from plumbing.loading import load_causal_lm, load_score_model
from plumbing.optim import check_finite


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    flag = parser.add_argument
    # models and data
    flag("--model", default=Demo("runs/demo/sft/model"), help="policy to start from, and the KL's reference")
    flag("--reward-model", default=Demo("runs/demo/reward_model/model"), help="its critic starts from it")
    flag("--cost-model", default=Demo("runs/demo/cost_model/model"), help="its critic starts from it")
    flag("--second-cost-model", help="trained with another --seed: the larger of both costs counts")
    flag("--reward-critic", help="another start for the reward critic, with the policy's tokenizer")
    flag("--cost-critic", help="another start for the cost critic, with the policy's tokenizer")
    flag("--dataset", default=Demo("runs/demo/data/prompts_balanced_train.jsonl"), help="prompts")
    flag("--ptx-dataset", default=Demo("runs/demo/data/ptx.jsonl"), help="supervised data of E9 ('': none)")
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
    flag("--lambda-lr", type=nonnegative, default=0.3, help="step size of the multiplier, in its logarithm")
    flag("--lambda-max", type=positive, default=2.0, help="largest multiplier")
    # log
    flag("--sample-every", type=count, default=50, help="print and save samples every N steps")
    # memory
    flag("--offload-frozen", action="store_true", help="with --fsdp: the frozen models in host memory")
    flag("--lora-output", action="store_true", help="with --lora-rank: adapters of the output layer, too")
    cli.add_run_flags(parser, "runs/demo/repo")
    return cli.parse(parser, argv)


# ------------------------------------------------------------------------------ equations


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
    k = log pi_old - log pi_ref, one sample of the KL divergence. The sum is clipped, not its parts. The paper
    gives each of the two half of its beta (issue 172 of PKU's repository): beta here is that half.
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


# ============================================================================== the constraint
def rectified_advantages(
    reward_adv: Tensor, cost_adv: Tensor, lam: float, cost: Tensor, threshold: float
) -> Tensor:
    """E6: advantages (B, R), (B, R) and costs (B,) -> (B, R): A = A_r where C <= d (the safe batch), and
    A = (A_r - lambda A_c) / (1 + lambda) where C is over the limit (RePO, safe and unsafe batch).

    {C - d}^+ is flat below the limit: no gradient, so no credit that could pay for others."""
    over_limit = (cost > threshold)[:, None]
    return torch.where(over_limit, (reward_adv - lam * cost_adv) / (1 + lam), reward_adv)


def rectified_violation(costs: Tensor, threshold: float) -> float:
    """E5: E[{C - d}^+] over the rollout's costs (B,). Never negative: it is 0 when none is over d."""
    return (costs - threshold).clamp(min=0).mean().item()


# ==============================================================================


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
    supervised start. Published: trainers/rl_trainer.py, RLTrainer.ptx_step (there a step of its own)."""
    return -masked_mean(log_probs, mask)


# ------------------------------------------------------------------------------ six models


def six_models(args) -> tuple:
    """Policy, reference, reward model, cost model, reward critic and cost critic.

    With --lora-rank r a frozen model is its trained twin without the adapters, W for W + (alpha / r) B A: the
    six are three sets of weights. A critic of another start than its score model leaves these two apart.

    A policy may find answers that fool its cost model. What fools one may not fool another one as well: with
    --second-cost-model the larger cost counts (worst-case optimization, Coste et al. 2023, 2310.02743)."""
    frozen = {"args": args, "trained": False}
    policy = shard(adapt(load_causal_lm(args.model, **load_options(args)), args, args.adapter), args)
    if args.lora_rank:
        reference = WithoutAdapters(policy)
    else:
        reference = shard(load_causal_lm(args.model, **load_options(**frozen)), **frozen)
    score_models, critics = [], []
    for kind, path, own in (
        ("reward", args.reward_model, args.reward_critic),
        ("cost", args.cost_model, args.cost_critic),
    ):
        if args.lora_rank and not own:
            critic = shard(adapt(load_score_model(path, kind, **load_options(args)), args), args)
            score_models.append(WithoutAdapters(critic))
        else:
            score_models.append(shard(load_score_model(path, kind, **load_options(**frozen)), **frozen))
            critic = load_score_model(own or path, "critic", new_head=bool(own), **load_options(args))
            critic = shard(adapt(critic, args), args)
        critics.append(critic)
    if args.second_cost_model:
        first, second = (
            score_models[1],
            load_score_model(args.second_cost_model, "cost", **load_options(**frozen)),
        )
        second = shard(second, **frozen)
        score_models[1] = lambda ids, mask: torch.maximum(first(ids, mask), second(ids, mask))
    return policy, reference, *score_models, *critics


# ------------------------------------------------------------------------------ a rollout and its scores


@torch.no_grad()
def sample_rollout(policy, prompts: list[str], tokenizer, ends: list[int], step: int, args) -> dict:
    """This rank's share of a rollout: sequences, attention_mask (B, P + R), mask, log_probs (B, R), and ended
    (B,), whether one of the ids `ends` came; prompts and responses as lists of B texts."""
    chosen = rank_rows([prompts[i] for i in batch_indices(len(prompts), args.batch_size, step, args.seed)])
    prompt_ids = data.encode_prompts(tokenizer, chosen, args.chat_template)
    ids, prompt_mask = pad(prompt_ids, tokenizer.pad_token_id, side="left")
    ids, prompt_mask, width = ids.to(device()), prompt_mask.to(device()), ids.shape[1]
    # drawn for the global batch: a sample is the same on whichever rank it falls
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    uniforms = rank_rows(torch.rand(args.batch_size, args.max_new_tokens, generator=generator)).to(device())
    padding = tokenizer.pad_token_id
    with gathered(policy) as sampler:
        sequences, log_probs = generate(
            sampler, ids, prompt_mask, args.max_new_tokens, args.temperature, 1.0, ends, padding, uniforms
        )
    del sampler  # under bf16 a copy of the weights
    mask = response_mask(sequences[:, width:], ends)  # (B, R)
    last = is_end(sequences[:, width:], ends)  # (B, R)
    spoken = (mask.bool() & ~last).tolist()  # from the GPU at once: row by row it would wait for it B times
    responses = [list(compress(*row)) for row in zip(sequences[:, width:].tolist(), spoken)]
    rollout = {
        "sequences": sequences,
        "attention_mask": torch.cat([prompt_mask, mask], 1),
        "mask": mask,
        "log_probs": log_probs,
        "ended": last.any(-1),
        "prompts": chosen,
        "responses": data.decode_responses(tokenizer, prompt_ids, responses),
    }
    if args.dtype == "bf16":
        # decoding rounds otherwise than a pass over whole sequences does: E7's ratios would not begin at 1,
        # and some not even within the clip (docs/scaling.md). So once more, in the pieces of update()
        for batch in split(rollout, args.minibatch_size // world_size()):
            for rows, width, part in micro_batches(batch, args.micro_batch_size):
                inputs = part["sequences"], part["attention_mask"], width, args.temperature
                # a slice: what is written here is the rollout's
                batch["log_probs"][rows, : part["mask"].shape[1]] = token_log_probs(policy, *inputs)
    return rollout


def split(batch: dict, size: int) -> list[dict]:
    """A dict of tensors or lists with B rows each -> dicts of at most `size` rows, in order."""
    rows = len(batch["mask"])
    return [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, rows, size)]


@torch.no_grad()
def score(rollout: dict, reference, reward_model, cost_model, reward_critic, cost_critic, args) -> None:
    """Add ref_log_probs, reward_values, cost_values (B, R) and reward, cost (B,) to a rollout, in pieces.

    `reward_ids, reward_attention_mask` (and `cost_...`) are the same responses in the ids of that model."""
    pieces = micro_batches(rollout, args.micro_batch_size)
    scored = {name: [] for name in ("ref_log_probs", "reward", "cost", "reward_values", "cost_values")}
    for _, width, part in pieces:
        sequences, attention_mask = part["sequences"], part["attention_mask"]
        ref_log_probs = token_log_probs(reference, sequences, attention_mask, width, args.temperature)
        scored["ref_log_probs"].append(ref_log_probs)
        for name, model in (("reward", reward_model), ("cost", cost_model)):
            ids, ids_mask = part[f"{name}_ids"], part[f"{name}_attention_mask"]
            scored[name].append(end_scores(model(ids, ids_mask), ids_mask))
        for name, critic in (("reward_values", reward_critic), ("cost_values", cost_critic)):
            # column P - 1 has seen the prompt only: its value is that of the state before the first token
            scored[name].append(critic(sequences, attention_mask)[:, width - 1 : -1])
    rollout |= {name: rejoin(parts, pieces, rollout["mask"]) for name, parts in scored.items()}


# ------------------------------------------------------------------------------ an update


def ptx_batch(rows: list[tuple], update_index: int, tokenizer, args) -> list[tuple]:
    """The supervised rows that an update also learns from: micro-batches (sequences, attention_mask, P)."""
    if not rows:
        return []
    # another seed: where prompts and rows come in one order, they would be the minibatch's own prompts
    indices = rank_rows(batch_indices(len(rows), args.minibatch_size, update_index, args.seed + 1))
    encoded = data.encode(tokenizer, [rows[i] for i in indices], args.max_length, args.chat_template)
    encoded, size = lm.by_length(encoded), args.micro_batch_size
    pieces = [encoded[i : i + size] for i in range(0, len(encoded), size)]
    return [frame(piece, tokenizer.pad_token_id, device()) for piece in pieces]


def update(policy, reward_critic, cost_critic, optimizers: dict, batch: dict, ptx: list[tuple], args) -> dict:
    """One optimizer step of policy and critics on a minibatch, in micro-batches; returns what to log.

    `batch` holds sequences, attention_mask (B, P + R) and mask, log_probs, advantages, reward_values,
    reward_returns, cost_values, cost_returns (B, R). `ptx` holds (sequences, attention_mask, P)."""
    names = ("policy_loss", "ptx_loss", "reward_value_loss", "cost_value_loss", "clip_fraction")
    metrics = dict.fromkeys(names, 0.0)  # sums of tensors: .item() would make Python wait for the GPU
    pieces = micro_batches(batch, args.micro_batch_size)
    # so that micro-batches add up to the minibatch's mean
    weights = [len(rows) / len(batch["mask"]) for rows, _, _ in pieces]

    # policy: E7 + E9, one backward pass per micro-batch, one step
    for weight, (_, width, part) in zip(weights, pieces):
        sequences, old, mask = part["sequences"], part["log_probs"], part["mask"]
        log_probs = token_log_probs(policy, sequences, part["attention_mask"], width, args.temperature)
        loss = policy_loss(log_probs, old, part["advantages"], mask, args.clip)
        (weight * loss).backward()
        outside = ((log_probs - old).detach().exp() - 1).abs() > args.clip
        metrics["clip_fraction"] += weight * masked_mean(outside.float(), mask)
        metrics["policy_loss"] += weight * loss.detach()
    for sequences, attention_mask, ptx_width in ptx:
        log_probs = token_log_probs(policy, sequences, attention_mask, ptx_width)
        weight = len(sequences) / sum(len(rows) for rows, _, _ in ptx)
        loss = ptx_loss(log_probs, attention_mask[:, ptx_width:])
        (args.ptx_coeff * weight * loss).backward()
        metrics["ptx_loss"] += weight * loss.detach()
    metrics["grad_norm"] = clip_gradients(policy, args.grad_clip)
    optimizers["policy"].step()
    optimizers["policy"].zero_grad()

    # critics: E8, one after the other so that only one model's gradients are held
    for name, critic in (("reward", reward_critic), ("cost", cost_critic)):
        for weight, (_, width, part) in zip(weights, pieces):
            values = critic(part["sequences"], part["attention_mask"])[:, width - 1 : -1]
            old, returns = part[f"{name}_values"], part[f"{name}_returns"]
            loss = value_loss(values, old, returns, part["mask"], args.value_clip)
            (weight * loss).backward()
            metrics[f"{name}_value_loss"] += weight * loss.detach()
        clip_gradients(critic, args.grad_clip)
        optimizers[f"{name}_critic"].step()
        optimizers[f"{name}_critic"].zero_grad()
    return metrics


def step_metrics(rollout: dict, updates: list[dict], args) -> dict:
    """This rank's means over the rollout and over the step's updates, by the names of docs/metrics.md."""
    cost, length, ended = rollout["cost"], rollout["mask"].sum(-1), rollout["ended"]
    values = {
        "reward": rollout["reward"],
        "cost": cost,
        "unsafe_rate": cost > 0,
        "over_limit_rate": cost > args.threshold,
        "kl": rollout["kl"],
        "response_length": length,
        "truncated_rate": ~ended,
        "empty_rate": ended & (length == 1),
        "scorer_cut_rate": rollout["scorer_cut"],
    }
    means = {name: value.float().mean().item() for name, value in values.items()}
    return means | {name: float(sum(u[name] for u in updates)) / len(updates) for name in updates[0]}


# ------------------------------------------------------------------------------ the loop


def main(args):
    torch.manual_seed(args.seed)
    if args.lambda_init > args.lambda_max:
        raise InputError(f"--lambda-init {args.lambda_init} is above --lambda-max {args.lambda_max}")
    cli.require(args.model, "python sft.py")
    cli.require(args.reward_model, "python reward_model.py")
    cli.require(args.cost_model, "python cost_model.py")
    second, critics = args.second_cost_model, (args.reward_critic, args.cost_critic)
    for path in filter(None, (args.model, args.reward_model, args.cost_model, second, *critics)):
        loading.check_context(loading.load_config(path), args.max_length, path)
        cli.check_template(args, path)

    # ------------------------------------------------------------------ data
    tokenizer = loading.load_tokenizer(args.model)
    ends = [data.end_id(tokenizer, args.chat_template), *loading.end_ids(args.model, tokenizer)]
    scorers = {"reward": args.reward_model, "cost": args.cost_model}
    scorers = {name: loading.load_tokenizer(path) for name, path in scorers.items()}
    for name, critic in (("reward", args.reward_critic), ("cost", args.cost_critic)):
        own = loading.load_tokenizer(critic) if critic else scorers[name]
        if not same_tokenizer(own, tokenizer, args.chat_template):
            raise InputError(
                f"the {name} critic's tokenizer is not the policy's: values are per policy token. "
                f"Give a start with the policy's tokenizer by --{name}-critic"
            )
    if second and not same_tokenizer(loading.load_tokenizer(second), scorers["cost"], args.chat_template):
        raise InputError(
            f"{second}: its tokenizer is not that of {args.cost_model}, and both read the same ids"
        )
    others = {n: t for n, t in scorers.items() if not same_tokenizer(t, tokenizer, args.chat_template)}
    prompts = data.load_prompts(args.dataset, args.skip_bad_rows)
    prompts = data.keep_fitting(args.dataset, prompts, tokenizer, args.max_length - args.max_new_tokens, args)
    ptx_rows = []
    if args.ptx_dataset and args.ptx_coeff:
        ptx_rows = data.load_supervised(args.ptx_dataset, args.skip_bad_rows)
        ptx_rows = data.keep_fitting(args.ptx_dataset, ptx_rows, tokenizer, args.max_length - 1, args)

    # ------------------------------------------------------------------ six models
    policy, reference, reward_model, cost_model, reward_critic, cost_critic = six_models(args)
    trained = {"policy": (policy, optim.adamw(policy, args.lr, args.weight_decay))}
    for name, critic in (("reward_critic", reward_critic), ("cost_critic", cost_critic)):
        trained[name] = critic, optim.adamw(critic, args.critic_lr, 0.0)
    optimizers = {name: optimizer for name, (_, optimizer) in trained.items()}

    # ------------------------------------------------------------------ multiplier and log
    first = {"log_lambda": math.log(args.lambda_init) if args.lambda_init else -math.inf}
    state = checkpoints.load_checkpoint(args, trained, first)
    log_lambda = torch.tensor(state["log_lambda"], dtype=torch.float64)
    log = runs.RunLog(args, "RePO", ("reward", "cost", "unsafe_rate", "lambda"), state["step"])

    for step in range(state["step"], args.steps):
        laps = runs.Laps()

        # -------------------------------------------------------------- 1 rollout
        rollout = sample_rollout(policy, prompts, tokenizer, ends, step, args)
        mask, log_probs = rollout["mask"], rollout["log_probs"]  # (B, R)
        laps.lap("rollout")

        # -------------------------------------------------------------- 2 score
        rollout |= data.scorer_ids(rollout, scorers, others, args.chat_template)
        score(rollout, reference, reward_model, cost_model, reward_critic, cost_critic, args)
        reward, cost, ref_log_probs = rollout["reward"], rollout["cost"], rollout["ref_log_probs"]
        reward_values, cost_values = rollout["reward_values"], rollout["cost_values"]
        check_finite(step, log_probs=log_probs, ref_log_probs=ref_log_probs, reward=reward, cost=cost)
        check_finite(step, reward_values=reward_values, cost_values=cost_values)
        laps.lap("scoring")

        # -------------------------------------------------------------- 3 shape
        token_rewards, token_costs = shape_rewards(
            reward, cost, log_probs, ref_log_probs, mask, args.kl_coeff, args.score_clip
        )  # (B, R)

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
        updates = []
        minibatches = split(rollout, args.minibatch_size // world_size()) * args.ppo_epochs
        for i, batch in enumerate(minibatches, step * len(minibatches)):
            ptx = ptx_batch(ptx_rows, i, tokenizer, args)
            updates.append(update(policy, reward_critic, cost_critic, optimizers, batch, ptx, args))
        laps.lap("update")

        # -------------------------------------------------------------- 7 log and save
        rollout["kl"] = ((log_probs - ref_log_probs) * mask).sum(-1)  # (B,) nats per response
        metrics = step_metrics(rollout, updates, args)
        metrics |= {"lambda": lam, "violation": violation} | laps.seconds
        metrics["samples_per_second"] = args.batch_size / sum(laps.seconds.values())
        check_finite(step, **metrics)
        if step % args.sample_every == 0:
            log.samples(step, rollout)
        log.metrics(step, metrics)
        if checkpoints.checkpoint_due(args, step):
            state = {"log_lambda": log_lambda.item()}
            checkpoints.save_checkpoint(args, step + 1, trained, state)

    log.close()
    checkpoints.save_final(args, saver(args, loading.save_causal_lm), policy, tokenizer)


if __name__ == "__main__":
    runs.run(main, parse_args())
