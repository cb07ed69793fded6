"""SATAC's two statements on worlds so small that everything is exact: is theorem 4.1 of WSAC true here?

    python -m offline.tabular             # 5 worlds x 3 behaviour policies x beta 1, 2, 8: seconds
    python -m offline.tabular bridge      # two states: none, batch and point have three optima

Theorem. Six states, three actions, random transitions, rewards and costs in [0, 1]. A critic is a table
within [0, 1 / (1 - gamma)], the exact answer to its game (S3, S4 of satac.py; projected gradient). The actor
is a no-regret learner (exponentiated gradient, as WSAC's algorithm 1 asks), lambda moves by S7 from 1 on.
Judged is what the theorem speaks of, the mean over all iterates, by exact values j = (1 - gamma) J in [0, 1]:

    j_r(pi) >= j_r(mu)        j_c(pi) <= j_c(mu) + 1 / lambda

L(pi, Q) is a difference of such values (performance-difference lemma), so with exact critics the slack is
really (j_r(pi) - j_r(mu)) / lambda: who gains no reward may not cost more.

Bridge. A state is a prompt, an action a response, f_r and f_c are given. Every policy on a grid is tried, and
the algorithm (S5, S6 by exact gradient) is run from the same start.
"""

import itertools

import torch
from torch import Tensor

from offline.satac import actor_loss, cost_violation, multiplier_step, relative_value
from plumbing import cli, runs

STATES, ACTIONS, GAMMA = 6, 3, 0.9
LAMBDA_MAX = 10.0  # in the theorem's games
BEHAVIOURS = ("uniform", "narrow", "unsafe")
BETAS = (1.0, 2.0, 8.0)


# ------------------------------------------------------------------------------ exact worlds


def world(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> transitions (S, A, S), rewards (S, A), costs (S, A); where there is reward there is cost."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(STATES, ACTIONS, STATES, generator=generator, dtype=torch.float64)
    transitions = draw.pow(4) / draw.pow(4).sum(-1, keepdim=True)  # few likely next states
    rewards, other = torch.rand(2, STATES, ACTIONS, generator=generator, dtype=torch.float64)
    return transitions, rewards, 0.5 * rewards + 0.5 * other


def behaviour(name: str, rewards: Tensor, costs: Tensor) -> Tensor:
    """(S, A) probabilities. `narrow` never takes the action of highest reward: the data do not show it."""
    if name == "unsafe":
        return (8 * costs).softmax(-1)
    taken = rewards < rewards.amax(-1, keepdim=True) if name == "narrow" else rewards >= 0
    return taken.double() / taken.sum(-1, keepdim=True)


def occupancy(policy: Tensor, transitions: Tensor) -> Tensor:
    """(..., S, A), (..., S, A, S) -> (..., S), the discounted share of time in each state; uniform start."""
    step = torch.einsum("...sa,...sat->...st", policy, transitions)
    eye = torch.eye(STATES, dtype=torch.float64)
    start = torch.full((*policy.shape[:-1], 1), (1 - GAMMA) / STATES, dtype=torch.float64)
    return torch.linalg.solve((eye - GAMMA * step).mT, start).squeeze(-1)


def value(policy: Tensor, transitions: Tensor, signal: Tensor) -> Tensor:
    """j = (1 - gamma) J of a signal (..., S, A) under a policy, exact -> (...)."""
    return (occupancy(policy, transitions)[..., None] * policy * signal).sum((-1, -2))


# ------------------------------------------------------------------------------ the game


def best_answer(f, policy, data, transitions, signal, weight, beta, moves: int = 60) -> Tensor:
    """S3, S4: argmin_f weight L(policy, f) + beta E(policy, f) within the bounds, from f (N, S, A) on.

    `data` (N, S, A) is the distribution of the transitions, weight (N,). Accelerated projected gradient."""
    pessimism = weight[:, None, None] * (data.sum(-1, keepdim=True) * policy - data)
    ahead, step = f, 1 / (2 * beta[:, None, None] * (1 + GAMMA) ** 2 * data.amax((1, 2), keepdim=True) * 3)
    for move in range(moves):
        following = (policy * ahead).sum(-1)  # (N, S)
        residual = ahead - signal - GAMMA * torch.einsum("nsat,nt->nsa", transitions, following)
        pushed = data * residual
        through = torch.einsum("nsat,nsa->nt", transitions, pushed)[..., None] * policy
        gradient = pessimism + 2 * beta[:, None, None] * (pushed - GAMMA * through)
        before, f = f, (ahead - step * gradient).clamp(0, 1 / (1 - GAMMA))
        ahead = f + move / (move + 3) * (f - before)
    return f


def play(transitions, rewards, costs, mu, beta: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """N games at once: transitions (N, S, A, S), the others (N, S, A), beta (N,) -> gain of reward and excess
    of cost over mu, exact values of the mean iterate, and the last lambda; (N,) each."""
    data = occupancy(mu, transitions)[..., None] * mu
    logits, log_lambda = torch.zeros_like(mu), torch.zeros(len(mu), dtype=torch.float64)
    f_r = f_c = torch.zeros_like(mu)
    gain, excess = -value(mu, transitions, rewards), -value(mu, transitions, costs)
    for k in range(iterations):
        policy, lam = logits.softmax(-1), log_lambda.exp()
        f_r = best_answer(f_r, policy, data, transitions, rewards, torch.ones_like(lam), beta)
        f_c = best_answer(f_c, policy, data, transitions, costs, -lam, beta)
        violation = (data.sum(-1, keepdim=True) * policy - data).mul(f_c).sum((1, 2)).clamp(min=0)  # S5
        over = (violation > 0).double()
        advantage = f_r - (lam * over)[:, None, None] * f_c  # minus the gradient of S6, state by state
        logits = logits + 0.3 / (1 + k) ** 0.5 * advantage
        log_lambda = multiplier_step(log_lambda, violation, 0.5, LAMBDA_MAX)
        gain += value(policy, transitions, rewards) / iterations
        excess += value(policy, transitions, costs) / iterations
    return gain, excess, log_lambda.exp()


def theorem(worlds: int = 5, iterations: int = 600) -> tuple[Tensor, Tensor, Tensor]:
    """Gain, excess and lambda of `play` in every game, (behaviours, betas, worlds) each."""
    cases = list(itertools.product(BEHAVIOURS, BETAS, range(worlds)))
    made = [world(seed) for _, _, seed in cases]
    transitions, rewards, costs = (torch.stack(parts) for parts in zip(*made))
    mu = torch.stack([behaviour(name, r, c) for (name, _, _), (_, r, c) in zip(cases, made)])
    beta = torch.tensor([beta for _, beta, _ in cases], dtype=torch.float64)
    games = play(transitions, rewards, costs, mu, beta, iterations)
    return tuple(x.view(len(BEHAVIOURS), len(BETAS), worlds) for x in games)


def print_theorem(gain: Tensor, excess: Tensor, lam: Tensor) -> None:
    """A line per behaviour and beta: mean and worst of the worlds, and in how many of them it held."""
    print("                    gain              excess         1/lambda   gain      excess within")
    print("behaviour  beta   mean  lowest     mean  highest    (largest)   >= 0  1/lambda  gain/lambda")
    for i, j in itertools.product(range(len(BEHAVIOURS)), range(len(BETAS))):
        g, e, slack = gain[i, j], excess[i, j], 1 / lam[i, j]
        means = f"{g.mean():+.3f} {g.min():+.3f}   {e.mean():+.3f}  {e.max():+.3f}"
        held = [f"{int(true.sum())}/{len(g)}" for true in (g >= 0, e <= slack, e <= g * slack)]
        counts = "{:>6}{:>9}{:>12}".format(*held)
        print(f"{BEHAVIOURS[i]:<9} {BETAS[j]:>5g}  {means}         {slack.max():.2f} {counts}")


# ------------------------------------------------------------------------------ the bridge

CHOICES = {  # state: action: f_r, f_c; `stay` is what the behaviour policy does
    "calm": {"stay": (0.0, 0.0), "careful": (-1.0, -2.0), "timid": (-2.5, -4.0)},
    "risky": {"stay": (0.0, 0.0), "bold": (3.0, 2.0), "reckless": (3.5, 4.0)},
}
F_R, F_C = torch.tensor([list(a.values()) for a in CHOICES.values()]).double().unbind(-1)  # (2, 3) each
LAMBDA = 2.0
STAY = torch.zeros(2, dtype=torch.float64)  # f(s, a) of the behaviour policy's actions


def game(policy: Tensor, hinge: str, lam: float) -> tuple[Tensor, Tensor]:
    """S6 and S5 with known values: a policy (2, 3) -> the actor's loss and the violation, scalars."""
    reward, cost = (policy * F_R).sum(-1), (policy * F_C).sum(-1)
    violation = cost_violation(cost, STAY, 0.0, hinge)
    return actor_loss(relative_value(reward, STAY), violation, lam), violation


def brute_force(hinge: str, lam: float, parts: int = 10) -> Tensor:
    """The best policy among all whose probabilities are multiples of 1 / parts."""
    shares = [(i, j, parts - i - j) for i in range(parts + 1) for j in range(parts + 1 - i)]
    grid = torch.tensor(shares, dtype=torch.float64) / parts
    policies = (torch.stack([calm, risky]) for calm in grid for risky in grid)
    return min(policies, key=lambda policy: game(policy, hinge, lam)[0].item())


def descend(hinge: str, lam: float, lambda_lr: float = 0.0, steps: int = 6000) -> tuple[Tensor, float]:
    """S6 by exact gradient on softmax logits, and S7 -> policy, lambda. The step shrinks: at the kink of the
    rectifier a constant one would swing for ever."""
    logits = torch.zeros_like(F_R, requires_grad=True)
    log_lambda = torch.tensor(lam, dtype=torch.float64).log()
    for step in range(steps):
        loss, violation = game(logits.softmax(-1), hinge, log_lambda.exp().item())
        (gradient,) = torch.autograd.grad(loss, logits)
        logits.data -= 4 / (1 + step / 100) * gradient
        log_lambda = multiplier_step(log_lambda, violation.item(), lambda_lr, lambda_max=None)
    return logits.softmax(-1).detach(), log_lambda.exp().item()


def described(policy: Tensor) -> str:
    """A policy in words, with its reward and cost."""
    states = []
    for (state, actions), shares in zip(CHOICES.items(), policy):
        chosen = (f"{name} {share:.2f}" for name, share in zip(actions, shares) if share > 0.02)
        states.append(f"{state}: {', '.join(chosen):<13}")
    reward, cost = (policy * F_R).sum(-1).mean(), (policy * F_C).sum(-1).mean()
    return f"{' '.join(states)} reward {reward:+.2f}  cost {cost:+.2f}"


def print_bridge() -> None:
    for hinge in ("none", "batch", "point"):
        print(f"{hinge:<6} lambda {LAMBDA:.2f}   brute force   {described(brute_force(hinge, LAMBDA))}")
        print(f"{'':<21} algorithm     {described(descend(hinge, LAMBDA)[0])}")
    policy, lam = descend("none", LAMBDA, lambda_lr=0.02)
    print(f"none   lambda {lam:.2f}   free to fall  {described(policy)}")


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    choices = ("theorem", "bridge")
    parser.add_argument("command", nargs="?", choices=choices, default="theorem", help="what to check")
    return parser.parse_args(argv)


def main(args):
    torch.set_num_threads(1)  # the tensors are tiny: more threads would only wait for each other
    if args.command == "bridge":
        print_bridge()
    else:
        print_theorem(*theorem())


if __name__ == "__main__":
    runs.run(main, parse_args())
