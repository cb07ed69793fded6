"""SATAC: the rectifier offline, against a behaviour policy mu.

    max_pi J_r(pi)   subject to   J_c(pi) <= J_c(mu),   from data D of mu alone

    [S] the abstract, arXiv 2401.00629, v1    [W] its later form WSAC, NeurIPS 2024, same authors
    [A] ATAC, Cheng et al. 2022, arXiv 2202.02446, and its published code (link below)

No world answers here: what pi would earn must be guessed from data that may not show what pi does. So SATAC
is a game of a leader, the actor, and two followers. Each critic answers with the worst world that the data
allow, one in which pi is worse than mu [S]. mu is equally good in all of them and can always be imitated, so
what the actor wins against its critics it has won for certain.

    S1  L(pi, f) = E_D[f(s, pi) - f(s, a)]    how much better than mu pi is, if f is its value     [A, W]
    S2  E(pi, f) = the Bellman error of f for pi, on the data                                      [A]
    S3  reward critic  f_r = argmin_f          L(pi, f) + beta E(pi, f)    pi earns less than mu   [A, W]
    S4  cost critic    f_c = argmin_f -lambda  L(pi, f) + beta E(pi, f)    pi costs more than mu   [W]
    S5  violation      {L(pi, f_c) + b}^+                  --hinge batch                           [W, alg. 2]
                       E_D{f_c(s, pi) - f_c(s, a) + b}^+   point: no state pays for another        [W, alg. 1]
                       L(pi, f_c) + b                      none: an ordinary Lagrangian
    S6  actor          pi = argmin_pi  -L(pi, f_r) + lambda violation                              [W]
    S7  multiplier     ln lambda <- min(ln lambda + lr violation lambda, ln lambda_max), as in repo_ppo.py
    S8  target         f' <- (1 - tau) f' + tau f                                                  [A]

As in RePO the rectifier {.}^+ gives no credit for being safer than needed. There every prompt is held to a
limit, here the policy (batch) or every state (point) to mu. b = 0 asks for mu's own safety. L(pi, Q_c) is the
difference in cost per step, so --cost-limit of an episode sets b = (J_c(mu) - limit) / its length.

Guarantee [W, theorem 4.1], with values per step, (1 - gamma) J, and costs that are not negative, for every
beta >= 0: J_r(pi) >= J_r(mu) and J_c(pi) <= J_c(mu) + 1 / lambda. The slack is why lambda only rises.
offline/tabular.py checks it exactly. Left out: options of [A]'s code (pessimism about the first state only, a
scale of the reward).

Where [S] and [W] are silent, [A]'s code was followed: S2 is half the squared error to a target network and
half the squared residual; two networks per critic, targets from the lower reward (and, by symmetry, the
higher cost), clamped to what discounted sums can be; weights kept in a ball; a tanh-Gaussian actor with an
entropy bonus; a warm start that clones mu and fits its values; fast critics and a slow actor; no noise in
evaluation.
https://github.com/microsoft/ATAC/blob/267f17d54727b2766ab7078fa0bbb38fe3c2d145/src/atac/atac.py
Own choices: S7's rule; in `point` the data's action, where [W] has a reference policy; a fixed weight of the
entropy, where [A] tunes it; a faster target, as the runs are short; and the averaged actor that is kept: the
theorem speaks of the mean of all iterates, and the last one swings.

One step is --updates times 1 sample, 2 critics, 3 actor, 4 multiplier; then 5 evaluate, 6 log and save.

    python -m offline.point_mass                                    # a world, and data of its mild mix
    python -m offline.satac                                         # one core, less than a minute
    python -m offline.satac --lambda-init 0                         # ATAC: the cost is not looked at
    python -m offline.satac --hinge none                            # a Lagrangian: being safer earns credit
    python -m offline.satac --clone [--safe-only]                   # behaviour cloning [of the safe episodes]
"""

import copy
import math
import os

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from offline import point_mass
from plumbing import checkpoints, cli, optim, runs
from plumbing.cli import count, finite, fraction, nonnegative, positive, whole
from plumbing.files import InputError, write_json, writing
from plumbing.optim import check_finite

DEMO = {"dataset": "runs/satac/mild.safetensors", "output_dir": "runs/satac/satac"}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    flag = parser.add_argument
    # data and networks
    flag("--dataset", help="transitions, see point_mass.py")
    flag("--safe-only", action="store_true", help="learn from episodes that cost no more than the limit")
    flag("--hidden", type=count, default=64, help="width of the two hidden layers of every network")
    # game
    flag("--beta", type=nonnegative, default=16.0, help="weight of the Bellman error in both critics")
    flag("--hinge", choices=("batch", "point", "none"), default="batch", help="where the cost is rectified")
    flag("--cost-limit", type=finite, help="of an episode [default: the behaviour policy's mean cost]")
    flag("--lambda-init", type=nonnegative, default=1.0, help="first multiplier (0: none, and it stays so)")
    flag("--lambda-lr", type=nonnegative, default=0.1, help="step size of the multiplier, in its logarithm")
    flag("--lambda-max", type=positive, default=4.0, help="largest multiplier")
    # learning
    flag("--steps", type=count, default=45, help="steps, warm start included")
    flag("--updates", type=count, default=50, help="gradient updates per step")
    flag("--warm-steps", type=whole, default=20, help="steps of cloning before the game")
    flag("--clone", action="store_true", help="no game: behaviour cloning to the end, a baseline")
    flag("--batch-size", type=count, default=128, help="transitions per update")
    flag("--critic-lr", type=nonnegative, default=1e-3, help="of the critics, and of the warm start")
    flag("--lr", type=nonnegative, default=1e-4, help="of the actor in the game")
    flag("--entropy", type=nonnegative, default=0.1, help="weight of the actor's entropy")
    flag("--gamma", type=fraction, default=0.97, help="discount")
    flag("--tau", type=fraction, default=0.05, help="step of the target networks")
    flag("--average", type=fraction, default=5e-3, help="step of the averaged policy, the one that is kept")
    flag("--weight-norm", type=positive, default=100.0, help="largest norm of a critic's weight matrix")
    # evaluation
    flag("--episodes", type=whole, default=50, help="point mass episodes per evaluation (0: own data, none)")
    cli.add_run_flags(parser, models=False)
    return cli.parse(parser, argv, DEMO, own=("dataset",))


# ------------------------------------------------------------------------------ equations


def relative_value(policy_values: Tensor, data_values: Tensor) -> Tensor:
    """S1: f(s, pi) and f(s, a), (..., B) -> (...), L(pi, f): how much better the policy is than the data."""
    return (policy_values - data_values).mean(-1)


def backup(signal: Tensor, terminal: Tensor, next_values: Tensor, gamma: float) -> Tensor:
    """S2: r or c, terminal 0 or 1, f(s', pi), (..., B) -> r + gamma f(s', pi); r where the world ends.

    A timeout is no end: its next state is worth what it is worth."""
    return signal + gamma * (1 - terminal) * next_values


def against(targets: Tensor) -> Tensor:
    """S2: the twins' target values (2, 2, B) -> (2, 1, B), those worse for the policy: the lower reward [A],
    and by symmetry the higher cost."""
    reward, cost = targets
    return torch.stack([reward.amin(0, keepdim=True), cost.amax(0, keepdim=True)])


def bellman_error(values: Tensor, backups: Tensor, target_backups: Tensor) -> Tensor:
    """S2: f(s, a), the backups of f itself, and those of its target, (..., B) -> (...).

    Half TD error, half residual [A]: the target alone lets f run after itself, the residual alone is slow.
    The gradient of the residual goes through both of its ends."""
    to_target = (values - target_backups).square().mean(-1)
    residual = (values - backups).square().mean(-1)
    return 0.5 * to_target + 0.5 * residual


def critic_loss(relative: Tensor, error: Tensor, lam: float, beta: float) -> Tensor:
    """S3 and S4: L and E, (2, 2) for reward and cost of both twins -> scalar, the sum of the four losses.

    Against the policy either way: the reward critic lowers what pi earns beyond mu, the cost critic raises
    what it costs beyond mu, both as far as beta E lets them. The networks share nothing: one sum."""
    weights = torch.tensor([[1.0], [-lam]])
    return (weights * relative + beta * error).sum()


# ============================================================================== the constraint
def cost_violation(policy_values: Tensor, data_values: Tensor, margin: float, hinge: str) -> Tensor:
    """S5: f_c(s, pi), f_c(s, a) (B,), in cost units -> scalar. Only `none` can be negative.

    E{.}^+ >= {E .}^+: `point` lets no state pay for another, as RePO no prompt; `batch` does. With one data
    action per state `point` asks to be no costlier than that action: stricter than mu's mean."""
    if hinge == "point":
        return (policy_values - data_values + margin).clamp(min=0).mean()
    violation = relative_value(policy_values, data_values) + margin
    return violation.clamp(min=0) if hinge == "batch" else violation


# ==============================================================================


def actor_loss(relative: Tensor, violation: Tensor, lam: float) -> Tensor:
    """S6: L(pi, f_r) and the violation, scalars -> scalar."""
    return -relative + lam * violation


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


# ------------------------------------------------------------------------------ networks


class Critics(nn.Module):
    """Four networks side by side, f_r and f_c and a twin of each: (B, O), (B, A) -> values (2, 2, B)."""

    def __init__(self, observations: int, actions: int, hidden: int):
        super().__init__()
        sizes = (observations + actions, hidden, hidden, 1)
        shapes = list(zip(sizes, sizes[1:]))
        self.weights = nn.ParameterList(torch.empty(4, i, o) for i, o in shapes)
        self.biases = nn.ParameterList(torch.empty(4, 1, o) for _, o in shapes)
        for (inputs, _), *parameters in zip(shapes, self.weights, self.biases):
            for parameter in parameters:  # as nn.Linear
                nn.init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([observation, action], -1).expand(4, -1, -1)
        for layer, (weights, biases) in enumerate(zip(self.weights, self.biases)):
            x = torch.baddbmm(biases, x.relu() if layer else x, weights)
        return x.view(2, 2, -1)


class Actor(nn.Module):
    """A Gaussian squashed by tanh into [-1, 1]^A, and its average over the updates. It holds the scale of
    the observations, which a user of it needs."""

    def __init__(self, observations: Tensor, actions: int, hidden: int):
        super().__init__()
        self.register_buffer("mean", observations.mean(0))
        self.register_buffer("std", observations.std(0) + 1e-3)
        sizes = (observations.shape[1], hidden, hidden)
        layers = [part for i, o in zip(sizes, sizes[1:]) for part in (nn.Linear(i, o), nn.ReLU())]
        self.body = nn.Sequential(*layers, nn.Linear(hidden, 2 * actions))
        self.average = copy.deepcopy(self.body).requires_grad_(False)

    def normal(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized observations (B, O) -> mean, log std (B, A) before tanh."""
        mean, log_std = self.body(observation).chunk(2, -1)
        return mean, log_std.clamp(-5, 1)

    def best(self, state: Tensor) -> Tensor:
        """The averaged policy: states as the world shows them (B, O) -> actions (B, A), without noise [A]."""
        return self.average((state - self.mean) / self.std).chunk(2, -1)[0].tanh()


def log_prob(mean: Tensor, log_std: Tensor, raw: Tensor) -> Tensor:
    """Log-density of tanh(raw) under the squashed Gaussian, (B, A) each -> (B,).

    The last two terms are -log(1 - tanh^2), the change of variables, in a form that does not overflow."""
    gaussian = -0.5 * ((raw - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
    return (gaussian - 2 * (math.log(2) - raw - F.softplus(-2 * raw))).sum(-1)


@torch.no_grad()
def track(target: nn.Module, network: nn.Module, tau: float) -> None:
    """S8: target <- (1 - tau) target + tau network, in place."""
    for slow, fast in zip(target.parameters(), network.parameters()):
        slow.lerp_(fast, tau)


@torch.no_grad()
def project(critics: Critics, norm: float) -> None:
    """Each weight matrix to a ball of this radius: a critic with a small beta would be free to grow [A]."""
    for weights in critics.weights:  # (4, in, out)
        weights.mul_((norm / weights.norm(dim=(1, 2), keepdim=True)).clamp(max=1))


# ------------------------------------------------------------------------------ an update


def critic_update(critics, targets, optimizer, batch: dict, lam: float | None, bounds, args) -> dict:
    """2: one step of S3 and S4, and of S8. lam None: the warm start, in which both fit mu's values alone."""
    states = torch.cat([batch["observations"], batch["observations"], batch["next_observations"]])
    actions = torch.cat([batch["actions"], batch["policy_actions"], batch["next_actions"]])
    values, policy_values, next_values = critics(states, actions).chunk(3, -1)  # (2, 2, B)
    with torch.no_grad():
        slow_values = targets(batch["next_observations"], batch["next_actions"])  # (2, 2, B)
        slow_values = against(slow_values).clamp(*bounds)  # (2, 1, B)
    signals = torch.stack([batch["rewards"], batch["costs"]])[:, None]  # (2, 1, B)
    ahead = (next_values, slow_values)
    error = bellman_error(values, *(backup(signals, batch["terminals"], v, args.gamma) for v in ahead))
    relative = relative_value(policy_values, values)
    optimizer.zero_grad()
    (error.sum() if lam is None else critic_loss(relative, error, lam, args.beta)).backward()
    optimizer.step()
    project(critics, args.weight_norm)
    track(targets, critics, args.tau)
    names = ("reward_advantage", "cost_advantage", "reward_error", "cost_error")
    return dict(zip(names, torch.cat([relative[:, 0], error[:, 0]]).tolist()))


def actor_update(actor, critics, optimizer, batch: dict, lam: float, margin: float, args) -> float:
    """3: one step of S6 against the first twins, with a bonus for entropy [A]. Returns the violation."""
    states, data_actions = batch["observations"], batch["actions"]
    mean, log_std = actor.normal(states)
    raw = mean + log_std.exp() * batch["noise"]
    reward, cost = critics(states, raw.tanh())[:, 0]
    with torch.no_grad():
        data_reward, data_cost = critics(states, data_actions)[:, 0]
    violation = cost_violation(cost, data_cost, margin, args.hinge)
    loss = actor_loss(relative_value(reward, data_reward), violation, lam)
    loss = loss + args.entropy * log_prob(mean, log_std, raw).mean()  # minus the entropy
    optimizer.zero_grad()
    loss.backward(inputs=list(actor.body.parameters()))  # the critics only look on
    optimizer.step()
    track(actor.average, actor.body, args.average)
    return violation.item()


def clone_update(actor, optimizer, batch: dict, args) -> None:
    """3, warm start: one step of maximum likelihood of the data's actions."""
    raw = batch["actions"].clamp(-0.999, 0.999).atanh()  # an action at the edge has no preimage
    optimizer.zero_grad()
    (-log_prob(*actor.normal(batch["observations"]), raw).mean()).backward()
    optimizer.step()
    track(actor.average, actor.body, args.average)


def sample(data: dict, actor, update: int, args) -> dict:
    """1: a batch of transitions, and the policy's own actions at both of their ends. A pure function of seed,
    update and actor: a resumed run draws what the unbroken one would."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + update)
    rows = torch.randint(len(data["rewards"]), (args.batch_size,), generator=generator)
    batch = {name: array[rows] for name, array in data.items()}
    noise = torch.randn(3, *batch["actions"].shape, generator=generator)
    with torch.no_grad():
        both = torch.cat([batch["observations"], batch["next_observations"]])
        mean, log_std = actor.normal(both)
        actions = (mean + log_std.exp() * noise[:2].flatten(0, 1)).tanh()
    policy_actions, next_actions = actions.split(args.batch_size)
    return batch | {"policy_actions": policy_actions, "next_actions": next_actions, "noise": noise[2]}


def evaluate(actor, args) -> dict:
    """5: mean return and cost of an episode, always from the same starts."""
    return point_mass.evaluate(actor.best, args.episodes, args.seed) if args.episodes else {}


# ------------------------------------------------------------------------------ the loop


def main(args):
    torch.set_num_threads(1)  # the networks are tiny: more threads would only wait for each other
    runs.claim_folder(args)
    torch.manual_seed(args.seed)
    if args.lambda_init > args.lambda_max:
        raise InputError(f"--lambda-init {args.lambda_init} is above --lambda-max {args.lambda_max}")
    cli.require(args.dataset, "python -m offline.point_mass")

    # ------------------------------------------------------------------ data
    data = point_mass.load_transitions(args.dataset)
    sizes = data["observations"].shape[1], data["actions"].shape[1]
    if args.episodes and sizes != (4, 2):
        raise InputError(f"{args.dataset} is not of the point mass: evaluate it yourself, give --episodes 0")
    episode, returns, costs = point_mass.episode_sums(data)
    behaviour = {"behaviour_return": returns.mean().item(), "behaviour_cost": costs.mean().item()}
    limit = behaviour["behaviour_cost"] if args.cost_limit is None else args.cost_limit
    margin = (behaviour["behaviour_cost"] - limit) * len(costs) / len(episode)  # b, per step
    if args.safe_only:
        kept = (costs <= limit)[episode]
        if not kept.any():
            raise InputError(f"--safe-only: no episode of {args.dataset} costs {limit:.4g} or less")
        data = {name: array[kept] for name, array in data.items()}
    actor = Actor(data["observations"], sizes[1], args.hidden)
    for name in ("observations", "next_observations"):
        data[name] = (data[name] - actor.mean) / actor.std
    signals = torch.stack([data["rewards"], data["costs"]])
    longest = 1 / max(1 - args.gamma, 1e-3)  # the discounted length of an endless episode
    bounds = torch.stack(signals.aminmax(dim=1))[..., None, None] * longest  # (2, 2, 1, 1), low and high

    # ------------------------------------------------------------------ networks and multiplier
    critics = Critics(*sizes, args.hidden)
    targets = copy.deepcopy(critics).requires_grad_(False)
    optimizers = {
        name: torch.optim.Adam(learner.parameters(), lr=args.critic_lr, fused=True)
        for name, learner in {"actor": actor.body, "critics": critics}.items()
    }
    saved = {"actor": actor, "critics": nn.ModuleDict({"networks": critics, "targets": targets})}
    trained = {name: (network, optimizers[name]) for name, network in saved.items()}
    first = {"log_lambda": math.log(args.lambda_init) if args.lambda_init else -math.inf}
    state = checkpoints.load_checkpoint(args, trained, first)
    log_lambda = torch.tensor(state["log_lambda"], dtype=torch.float64)
    log = runs.RunLog(args, "SATAC", ("return", "cost", "lambda", "violation"), state["step"])

    for step in range(state["step"], args.steps):
        warm = args.clone or step < args.warm_steps
        optim.set_learning_rate(optimizers, actor=args.critic_lr if warm else args.lr)
        updates = []
        for update in range(step * args.updates, (step + 1) * args.updates):
            # ---------------------------------------------------------- 1 sample
            batch = sample(data, actor, update, args)
            lam = log_lambda.exp().item()

            # ---------------------------------------------------------- 2 critics
            measured = {}
            if not args.clone:
                price = None if warm else lam
                measured = critic_update(critics, targets, optimizers["critics"], batch, price, bounds, args)

            # ---------------------------------------------------------- 3 actor
            if warm:
                clone_update(actor, optimizers["actor"], batch, args)
                violation = 0.0
            else:
                violation = actor_update(actor, critics, optimizers["actor"], batch, lam, margin, args)

            # ---------------------------------------------------------- 4 multiplier
            log_lambda = multiplier_step(log_lambda, violation, args.lambda_lr, args.lambda_max)
            updates.append(measured | {"violation": violation, "lambda": lam})

        # -------------------------------------------------------------- 5 evaluate
        metrics = {name: sum(u[name] for u in updates) / len(updates) for name in updates[0]} | behaviour
        metrics |= evaluate(actor, args)

        # -------------------------------------------------------------- 6 log and save
        check_finite(step, **metrics)
        log.metrics(step, metrics)
        if checkpoints.checkpoint_due(args, step):
            checkpoints.save_checkpoint(args, step + 1, trained, {"log_lambda": log_lambda.item()})

    log.close()
    with writing(os.path.join(args.output_dir, "model")) as temporary:
        os.makedirs(temporary)
        for name, network in saved.items():
            save_file(network.state_dict(), os.path.join(temporary, f"{name}.safetensors"))
        write_json(os.path.join(temporary, "summary.json"), behaviour | evaluate(actor, args))


if __name__ == "__main__":
    runs.run(main, parse_args())
