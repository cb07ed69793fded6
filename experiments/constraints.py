"""The family of constraints: seven ways to say "safe", each a pair of functions in the loop of repo_ppo.py.

    python -m experiments.constraints cvar                                      # after make demo
    python -m experiments.constraints fixed --lambda-init 3                     # at another price
    python -m experiments.constraints expected --lambda-lr 0 --lambda-init 2.5  # at RePO's last price
    torchrun --nproc-per-node 2 -m experiments.constraints confidence --fsdp ...

    expected      E[C] <= d                                    Safe RLHF (Dai et al. 2023, 2310.12773)
    confidence    upper confidence bound of E[C] <= d          HC-RLHF (Chittepu et al. 2025, 2506.08266)
    cvar          E[C | C among the worst tenth] <= d          Rockafellar and Uryasev 2000
    dominance     every quantile of C <= that of the start     RAD (Chittepu et al. 2026, 2603.10938)
    fixed         C <= d, at a price that never moves          CS-RLHF (Pandit et al. 2025, 2510.03520)
    every_prompt  C <= d                                       RePO (Peng et al. 2024, 2410.19933)
    prompt_mean   E[C | x] <= d for every prompt x             RePO on groups of answers: repo_rloo.py's loop

A pair stands in the place of `rectified_violation` and `rectified_advantages` of the script:

    E5  v = violation(costs, d)                            costs (N,) of the whole rollout; lambda climbs on v
    E6  A = advantages(A_r, A_c, lambda, costs, d)         costs (B,) of this rank's rows

E6 follows from E5. Let w = N dv/dC: how much v grows with the cost of this answer. The policy descends
E[-R] + lambda v, so the cost of an answer counts w times, and w = 0 is an answer that pays for nothing:

    A = (A_r - lambda w A_c) / (1 + lambda w)             expected: w = 1;  every_prompt: w = 1 where C > d

The division keeps the weight of the KL term (E3). Where w differs between answers to a prompt, so does their
baseline, and in the mean E6 is not quite the gradient (docs/theorem.md). docs/extending.md adds a member.
"""

import argparse
import math
import os
from functools import partial
from statistics import NormalDist
from unittest.mock import patch

import torch
from torch import Tensor

import repo_ppo
import repo_rloo
from plumbing import cli, runs
from plumbing.checkpoints import complete_checkpoints
from plumbing.distributed import gather_rows, rank, rank_rows
from plumbing.files import read_json, reading, write_json
from repo_ppo import rectified_advantages, rectified_violation

CONFIDENCE = 0.9  # 1 - delta; the default of HC-RLHF's code
TAIL = 0.1  # the share of the worst


def weighted(reward_adv: Tensor, cost_adv: Tensor, lam: float, weight: Tensor) -> Tensor:
    """E6: advantages (B, R), (B, R) and w = N dv/dC of each answer (B,) -> (B, R)."""
    price = lam * weight[:, None]
    return (reward_adv - price * cost_adv) / (1 + price)


# ------------------------------------------------------------------------------ the pairs


def expected_violation(costs: Tensor, threshold: float) -> float:
    """v = E[C] - d. Safe RLHF's, with a window of one rollout."""
    return costs.mean().item() - threshold


def expected_advantages(reward_adv, cost_adv, lam: float, cost: Tensor, threshold: float) -> Tensor:
    """w = 1: every answer is pushed to a lower cost, also a safe one. That is the credit which pays."""
    return (reward_adv - lam * cost_adv) / (1 + lam)


def width(answers: int) -> float:
    """k: how many standard deviations of C its bound lies above the mean of so many answers."""
    return NormalDist().inv_cdf(CONFIDENCE) / math.sqrt(max(answers - 1, 1))


def confidence_violation(costs: Tensor, threshold: float) -> float:
    """v = mean + k sd - d, k = z_{1 - delta} / sqrt(N - 1): with confidence 1 - delta E[C] <= mean + k sd.

    After the abstract, and checked against the authors' code (github.com/UMass-SCALAR-Lab/HC-RLHF,
    safe_rlhf/algorithms/reinforce_lag/trainer.py, rl_step). Simplified: a normal quantile for Student's;
    left out: their safety test on held-out answers afterwards, and the second term of k that foresees it."""
    return (costs.mean() + width(len(costs)) * costs.std(correction=0)).item() - threshold


def confidence_advantages(reward_adv, cost_adv, lam: float, cost: Tensor, threshold: float) -> Tensor:
    """w = 1 + k (C - mean) / sd: the mean's part, and the spread's, by which costly answers count more."""
    costs = gather_rows(cost)
    deviations = (cost - costs.mean()) / costs.std(correction=0).clamp(min=1e-6)
    weight = 1 + width(len(costs)) * deviations
    return weighted(reward_adv, cost_adv, lam, weight.clamp(min=0))  # below 0 in tiny rollouts only


def cvar_violation(costs: Tensor, threshold: float) -> float:
    """v = E[C | C >= q] - d, q the (1 - TAIL)-quantile: the mean of the worst. TAIL = 1 is `expected`."""
    return costs[costs >= costs.quantile(1 - TAIL)].mean().item() - threshold


def cvar_advantages(reward_adv, cost_adv, lam: float, cost: Tensor, threshold: float) -> Tensor:
    """w = 1 for the worst TAIL of all ranks' answers, else 0. (dv/dC has 1 / TAIL; lambda takes it up.)"""
    return weighted(reward_adv, cost_adv, lam, cost >= gather_rows(cost).quantile(1 - TAIL))


def dominance_violation(costs: Tensor, threshold: float, first: Tensor) -> float:
    """v = mean_k {C_(k) - F_(k) - d}^+, the k-th smallest costs of this rollout and of the first one, F, (N,)
    sorted: what optimal transport moves in one dimension, where its plan is the sorting. v = 0 says that
    this policy's cost is stochastically smaller; d < 0 asks for a distance.

    After the abstract and the list of contributions, the rest could not be read. Simplified: the hinge for
    its surrogate, no entropic plan (Sinkhorn), all quantiles weigh alike."""
    return (costs.sort().values - first - threshold).clamp(min=0).mean().item()


def dominance_advantages(
    reward_adv, cost_adv, lam: float, cost: Tensor, threshold: float, first: Tensor
) -> Tensor:
    """w = 1 where the answer costs more than the one in its place in the first rollout, else 0."""
    place = torch.searchsorted(gather_rows(cost).sort().values, cost)  # (B,): how many cost less
    return weighted(reward_adv, cost_adv, lam, cost > first[place] + threshold)


# `fixed` is RePO's pair with --lambda-lr 0 (after the abstract: a rectified penalty whose weight is chosen,
# large enough, and not learned). Left out: its cost model, a classifier trained on labels alone.


def per_prompt(costs: Tensor, group_size: int) -> Tensor:
    """(N,) in groups of answers to one prompt -> (N,): in each answer's place the mean of its group."""
    return costs.view(-1, group_size).mean(1).repeat_interleave(group_size)


def prompt_violation(costs: Tensor, threshold: float, group_size: int) -> float:
    """v = E_x[{E[C | x] - d}^+]: answers to one prompt may pay for each other, other prompts' may not."""
    return rectified_violation(per_prompt(costs, group_size), threshold)


def prompt_advantages(
    reward_adv, cost_adv, lam: float, cost: Tensor, threshold: float, group_size: int
) -> Tensor:
    """w = 1 for all answers to a prompt whose mean cost is above d, else 0."""
    means = rank_rows(per_prompt(gather_rows(cost), group_size))
    return rectified_advantages(reward_adv, cost_adv, lam, means, threshold)


# ------------------------------------------------------------------------------ a run


def over_first_rollout(args) -> tuple:
    """`dominance`, with the costs of the run's first rollout: those of the start policy. For a run that is
    resumed they stay in <output-dir>/first_costs.json."""
    path, first = os.path.join(args.output_dir, "first_costs.json"), []
    if (args.resume or args.resume_anyway) and complete_checkpoints(args.output_dir):
        with reading(path):
            first.append(torch.tensor(read_json(path)))

    def violation(costs: Tensor, threshold: float) -> float:
        if not first:
            first.append(costs.sort().values)
            if rank() == 0:
                write_json(path, first[0].tolist())
        first[0] = first[0].to(costs.device)
        return dominance_violation(costs, threshold, first[0])

    return violation, lambda *given: dominance_advantages(*given, first[0])


def in_groups(args) -> tuple:
    return tuple(partial(f, group_size=args.group_size) for f in (prompt_violation, prompt_advantages))


FALLS = ("--lambda-lr", "0.3")  # v has both signs: the rate of safe_rlhf_ppo.py
SLOW = ("--lambda-lr", "0.003")  # v stays near 5 for long: 0.3 has lambda at its cap in two rollouts
MEMBERS = {  # name: the pair, or what makes it of a run's flags; the script; flags of its own
    "expected": ((expected_violation, expected_advantages), repo_ppo, FALLS),
    "confidence": ((confidence_violation, confidence_advantages), repo_ppo, FALLS),
    "cvar": ((cvar_violation, cvar_advantages), repo_ppo, SLOW),
    "dominance": (over_first_rollout, repo_ppo, ()),
    "fixed": ((rectified_violation, rectified_advantages), repo_ppo, ("--lambda-lr", "0")),
    "every_prompt": ((rectified_violation, rectified_advantages), repo_ppo, ()),
    "prompt_mean": (in_groups, repo_rloo, ()),
}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    flag = parser.add_argument
    flag("member", choices=MEMBERS, help="the constraint")
    flag("flags", nargs=argparse.REMAINDER, type=str, help="of repo_ppo.py (prompt_mean: of repo_rloo.py)")
    chosen = parser.parse_args(argv)
    _, script, own = MEMBERS[chosen.member]
    folder = ("--output-dir", f"runs/demo/{chosen.member}")
    args = script.parse_args([*folder, *own, *chosen.flags])
    args.algorithm = chosen.member
    return args


def main(args):
    pair, script, _ = MEMBERS[args.algorithm]
    violation, advantages = pair(args) if callable(pair) else pair
    with patch.multiple(script, rectified_violation=violation, rectified_advantages=advantages):
        script.main(args)


if __name__ == "__main__":
    runs.run(main, parse_args())
