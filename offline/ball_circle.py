"""SATAC on a task of others: BallCircle of Bullet-Safety-Gym, with data of scripted controllers. Optional.

    python -m venv runs/gym
    runs/gym/bin/pip install bullet-safety-gym==1.4.0 torch==2.13.0 safetensors tqdm filelock
    runs/gym/bin/python -m offline.ball_circle data
    python -m offline.satac --dataset runs/ball_circle/mild.safetensors --episodes 0 --output-dir runs/balls
    runs/gym/bin/python -m offline.ball_circle play --runs satac=runs/balls

A ball is pushed in the plane. It earns reward for speed along a circle of radius 7, clockwise, and pays 1 for
every step with |x| > 6: the best circle leaves that strip. 200 steps an episode, then a timeout. An
environment of its own, because the task needs gymnasium 0.28.
"""

import os
import statistics

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from offline.point_mass import FIELDS
from offline.satac import Actor
from plumbing import cli, runs
from plumbing.cli import named, number, path_name, whole
from plumbing.files import InputError, reading, writing

# fewer leave a controller without episodes, or a mean without a spread
several = number(int, "a whole number from 10", lambda x: 10 <= x < 2**31)
SCALE = 10  # of positions in an observation (x, y, vx, vy, ...), in metres
CONTROLLERS = {"safe": (4.5, 2.0), "slow": (6.3, 1.0), "reckless": (7.0, 4.0)}  # radius, speed
MIXES = {  # share of the episodes by each controller, as in point_mass.py
    "mild": {"safe": 0.3, "slow": 0.7},
    "mixed": {"safe": 0.4, "slow": 0.3, "reckless": 0.3},
}


def controller(radius: float, speed: float, generator: torch.Generator):
    """Steers clockwise along a circle with noisy thrust: observation (O,) -> action (2,)."""

    def act(state: Tensor) -> Tensor:
        position, velocity = SCALE * state[:2], SCALE * state[2:4]
        distance = position.norm().clamp(min=1e-6)
        outward = position / distance
        tangent = torch.stack([outward[1], -outward[0]])
        wanted = speed * tangent + (radius - distance) * outward
        return wanted - velocity + 0.5 * torch.randn(2, generator=generator)

    return act


def play(act, episodes: int, seed: int) -> tuple[dict[str, Tensor], list[float], list[float]]:
    """Transitions in the layout of point_mass.py, and the return and the cost of every episode."""
    try:
        import bullet_safety_gym  # noqa: F401  (it registers the tasks)
        import gymnasium
    except ImportError:
        raise InputError(
            "this needs bullet-safety-gym; the top of this file says how to install it"
        ) from None
    world, rows = gymnasium.make("SafetyBallCircle-v0"), {name: [] for name in FIELDS}
    returns, costs = [], []
    for episode in range(episodes):
        state, done = world.reset(seed=seed + episode)[0], False
        returns.append(0.0)
        costs.append(0.0)
        while not done:
            action = act(torch.tensor(state, dtype=torch.float32)).clamp(-1, 1)
            following, reward, end, timeout, info = world.step(action.numpy())
            values = (state, action.tolist(), reward, info["cost"], following, end, timeout)
            for name, value in zip(FIELDS, values):
                rows[name].append(torch.tensor(value, dtype=torch.float32))
            returns[-1] += float(reward)
            costs[-1] += float(info["cost"])
            state, done = following, end or timeout
    world.close()
    return {name: torch.stack(values) for name, values in rows.items()}, returns, costs


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    flag = parser.add_argument
    flag("command", choices=("data", "play"), help="make a data set, or play the policies of satac.py's runs")
    flag("--mix", choices=MIXES, default="mild", help="whose episodes")
    flag("--episodes", type=several, default=100, help="to make, or of each policy to play")
    flag("--runs", nargs="+", type=named, help="NAME=FOLDER of satac.py's runs")
    flag("--seed", type=whole, default=0, help="random seed")
    flag("--output", type=path_name, help="file to write [default runs/ball_circle/MIX.safetensors]")
    args = parser.parse_args(argv)
    if (args.command == "play") != bool(args.runs):
        parser.error("play needs --runs, and data takes none")
    return args


def main(args):
    torch.set_num_threads(1)
    if args.command == "data":
        generator, parts = torch.Generator().manual_seed(args.seed), []
        for i, (name, part) in enumerate(MIXES[args.mix].items()):
            act = controller(*CONTROLLERS[name], generator)
            parts.append(play(act, round(part * args.episodes), args.seed + 1000 * i))
            report(name, *parts[-1][1:])
        path = args.output or f"runs/ball_circle/{args.mix}.safetensors"
        with writing(path) as temporary:
            save_file({name: torch.cat([part[0][name] for part in parts]) for name in FIELDS}, temporary)
        report(f"behaviour policy -> {path}", *(sum((part[i] for part in parts), []) for i in (1, 2)))
    for name, path in args.runs or ():
        path = os.path.join(path, "model", "actor.safetensors")
        with reading(path):
            weights = load_file(path)
            hidden, observations = weights["body.0.weight"].shape
            actor = Actor(torch.zeros(2, observations), 2, hidden)
            actor.load_state_dict(weights)
        with torch.no_grad():
            played = play(
                lambda state, actor=actor: actor.best(state[None])[0], args.episodes, args.seed + 9000
            )
        report(name, *played[1:])


def report(name: str, returns: list[float], costs: list[float]) -> None:
    numbers = (f"{statistics.mean(x):.1f} ± {statistics.stdev(x):.1f}" for x in (returns, costs))
    print("{}: {} episodes, return {}, cost {}".format(name, len(returns), *numbers))


if __name__ == "__main__":
    runs.run(main, parse_args())
