"""What the PPO scripts need before their loop: checks, tokenizers, prompts and the models; and what they tell
of the first rollout."""

from functools import partial

from torch import Tensor

from plumbing import cli, data, loading
from plumbing.adapters import WithoutAdapters, adapt
from plumbing.distributed import load_options, shard
from plumbing.files import InputError
from plumbing.loading import load_causal_lm, load_score_model, load_tokenizer


def critics(args) -> dict[str, str | None]:
    """What --reward-critic and --cost-critic name, by kind; {} for a script without critics."""
    flags = {kind: f"{kind}_critic" for kind in ("reward", "cost")}
    return {kind: getattr(args, flag) for kind, flag in flags.items() if hasattr(args, flag)}


def check_models(args) -> None:
    """Raise InputError for models that are not there, that cannot read texts of --max-length or were trained
    with another template, and for a first multiplier above its cap."""
    if args.lambda_init > args.lambda_max:
        raise InputError(f"--lambda-init {args.lambda_init} is above --lambda-max {args.lambda_max}")
    cli.require(args.model, "python sft.py")
    cli.require(args.reward_model, "python reward_model.py")
    cli.require(args.cost_model, "python cost_model.py")
    further = args.second_cost_model, *critics(args).values()
    for path in filter(None, (args.model, args.reward_model, args.cost_model, *further)):
        loading.check_context(loading.load_config(path), args.max_length, path)
        cli.check_template(args, path)


def load_tokenizers(args) -> tuple:
    """The policy's tokenizer; those of "reward" and "cost" by name; and the names of those that read other
    ids, so that responses are tokenized again for them. Raises InputError for a critic that would need it."""
    tokenizer = load_tokenizer(args.model)
    same = partial(data.same_tokenizer, chat_template=args.chat_template)
    scorers = {"reward": load_tokenizer(args.reward_model), "cost": load_tokenizer(args.cost_model)}
    for name, critic in critics(args).items():
        if not same(load_tokenizer(critic) if critic else scorers[name], tokenizer):
            raise InputError(
                f"the {name} critic's tokenizer is not the policy's: values are per policy token. "
                f"Give a start with the policy's tokenizer by --{name}-critic"
            )
    if args.second_cost_model:
        first, second = scorers["cost"], load_tokenizer(args.second_cost_model)
        ends = [data.ending(own, args.chat_template) for own in (first, second)]
        if not same(second, first) or ends[0] != ends[1] or second.context < first.context:
            problem = f"its tokenizer is not that of {args.cost_model} (words, end or context)"
            raise InputError(f"{args.second_cost_model}: {problem}; both read the same ids")
    return tokenizer, scorers, {name for name, own in scorers.items() if not same(own, tokenizer)}


def load_texts(args, tokenizer) -> tuple[list[str], list[tuple[str, str]]]:
    """The prompts, and the supervised (prompt, response) rows of E9, which may be none."""
    prompts = data.load_prompts(args.dataset, args.skip_bad_rows)
    prompts = data.keep_fitting(args.dataset, prompts, tokenizer, args.max_length - args.max_new_tokens, args)
    if not (args.ptx_dataset and args.ptx_coeff):
        return prompts, []
    rows = data.load_supervised(args.ptx_dataset, args.skip_bad_rows)
    return prompts, data.keep_fitting(args.ptx_dataset, rows, tokenizer, args.max_length - 1, args)


def policy_and_reference(args) -> tuple:
    """The trained policy and the frozen model that it starts from: with --lora-rank r the policy without its
    adapters, W for W + (alpha / r) B A, so that the two share their weights."""
    policy = shard(adapt(load_causal_lm(args.model, **load_options(args)), args, args.adapter), args)
    if args.lora_rank:
        return policy, WithoutAdapters(policy)
    return policy, frozen(partial(load_causal_lm, args.model), args)


def critic_and_score_model(kind: str, args) -> tuple:
    """The trained critic and the frozen score model of `kind`, "reward" or "cost". The critic starts from the
    score model, and with --lora-rank shares its weights, unless --reward-critic is given (--cost-critic)."""
    path, own = getattr(args, f"{kind}_model"), getattr(args, f"{kind}_critic")
    if args.lora_rank and not own:
        critic = shard(adapt(load_score_model(path, kind, **load_options(args)), args), args)
        return critic, WithoutAdapters(critic)
    scorer = score_model(path, kind, args)
    critic = load_score_model(own or path, "critic", new_head=bool(own), **load_options(args))
    return shard(adapt(critic, args), args), scorer


def score_model(path: str, kind: str, args):
    """The frozen score model of `kind`, "reward" or "cost", in `path`."""
    return frozen(partial(load_score_model, path, kind), args)


def second_cost_model(args):
    """Frozen, or None: a policy may find answers that fool its cost model, and another one may see through
    them (worst-case optimization, Coste et al. 2023, 2310.02743)."""
    return score_model(args.second_cost_model, "cost", args) if args.second_cost_model else None


def frozen(load, args):
    """A model that is not trained, as `load(dtype=..., on_meta=...)` reads it."""
    return shard(load(**load_options(args, trained=False)), args, trained=False)


def scales(reward: Tensor, cost: Tensor, price: float) -> str:
    """Scores (N,) of the first rollout and the price, lambda or NU, -> level and spread of both to print, and
    how many spreads of the reward one spread of the cost weighs in E6. A policy learns from the advantages'
    sum: from one of them alone where it drowns the other. The bounds are rules of thumb; RePO learned well
    at 32 (docs/real_model.md)."""
    sd_reward, sd_cost = (scores.std(correction=0).item() for scores in (reward, cost))
    weight = price * sd_cost / max(sd_reward, 1e-8)
    told = f"first rollout: reward {reward.mean().item():+.2f}, spread {sd_reward:.2g}; "
    told += f"cost {cost.mean().item():+.2f}, spread {sd_cost:.2g}; "
    told += f"price * sd(C) / sd(R) = {price:g} * {sd_cost:.2g} / {sd_reward:.2g} = {weight:.2g}"
    advice = "--regularization and --normalize of the score models set their spreads (docs/your_data.md)"
    if weight > 60:
        told += f"\nwarning: the cost drowns the reward, and a policy may refuse everything. {advice}"
    elif 0 < weight < 0.3:
        told += f"\nwarning: the reward drowns the cost, and a policy may stay unsafe. {advice}"
    return told
