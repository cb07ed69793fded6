"""A point mass that earns reward on a circle and pays outside a strip: the world and the data of satac.py.

    state    position p and velocity v in the plane; observation (x, y, vx, vy)
    action   thrust in [-1, 1]^2:  v <- v + 0.1 (1.5 a - v) + noise,  p <- p + 0.1 v
    reward   (x vy - y vx) / |p| / (1 + | |p| - 1 |): tangential speed, best on the unit circle
    cost     1 in every step with |x| > 0.8, else 0
    episode  100 steps from near the centre, cut off there (a timeout, not an end of the world)

The reward is that of the circle tasks of Bullet-Safety-Gym and Safety-Gymnasium: the best circle leaves the
strip for two fifths of the time. Data come from scripted controllers with noisy thrust:

    safe      slowly round a circle inside the strip       slow       more slowly along the strip's edge
    reckless  fast round the unit circle                   random     smooth random thrust

    python -m offline.point_mass --mix mild                  # runs/satac/mild.safetensors

A data file holds the arrays of D4RL and DSRL, N transitions in the order in which they were made, as
safetensors, or as HDF5 (.hdf5, .h5; needs h5py):

    observations, next_observations (N, O)   actions (N, A) in [-1, 1]   rewards, costs (N,)
    terminals, timeouts (N,) 0 or 1: the last transition of an episode has one of them
"""

import math

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from plumbing import cli, runs
from plumbing.cli import count, path_name, whole
from plumbing.files import InputError, reading, writing

STEPS, LIMIT = 100, 0.8
CONTROLLERS = {"safe": (0.6, 0.3), "slow": (0.8, 0.2), "reckless": (1.0, 1.0)}  # radius, speed
MIXES = {  # share of the episodes by each controller
    "mild": {"safe": 0.2, "slow": 0.6, "random": 0.2},
    "mixed": {"safe": 0.3, "slow": 0.3, "random": 0.2, "reckless": 0.2},
    "unsafe": {"safe": 0.2, "slow": 0.2, "random": 0.2, "reckless": 0.4},
}
FIELDS = "observations actions rewards costs next_observations terminals timeouts".split()


# ------------------------------------------------------------------------------ the world


def reward_and_cost(state: Tensor) -> tuple[Tensor, Tensor]:
    """States (N, 4) -> reward, cost (N,)."""
    x, y, vx, vy = state.unbind(-1)
    radius = torch.hypot(x, y)
    tangential = (x * vy - y * vx) / radius.clamp(min=1e-6)
    return tangential / (1 + (radius - 1).abs()), (x.abs() > LIMIT).float()


def advance(state: Tensor, action: Tensor, generator: torch.Generator) -> Tensor:
    """States (N, 4), thrusts (N, 2) -> the next states."""
    position, velocity = state.split(2, -1)
    noise = 0.02 * torch.randn(velocity.shape, generator=generator)
    velocity = velocity + 0.1 * (1.5 * action.clamp(-1, 1) - velocity) + noise
    return torch.cat([position + 0.1 * velocity, velocity], -1)


@torch.no_grad()
def rollout(act, episodes: int, generator: torch.Generator) -> dict[str, Tensor]:
    """`act`: states (N, 4) -> thrusts (N, 2). All episodes side by side -> arrays (episodes, STEPS, ...)."""
    start = torch.rand(episodes, 2, generator=generator) - 0.5
    state = torch.cat([start, torch.zeros(episodes, 2)], -1)
    columns = {name: [] for name in FIELDS[:5]}
    for _ in range(STEPS):
        action = act(state).clamp(-1, 1)
        following = advance(state, action, generator)
        for name, value in zip(columns, (state, action, *reward_and_cost(following), following)):
            columns[name].append(value)
        state = following
    return {name: torch.stack(values, 1) for name, values in columns.items()}


def evaluate(act, episodes: int, seed: int) -> dict[str, float]:
    """Mean return and mean cost of an episode."""
    played = rollout(act, episodes, torch.Generator().manual_seed(seed))
    returns, costs = (played[name].sum(1).mean().item() for name in ("rewards", "costs"))
    return {"return": returns, "cost": costs}


# ------------------------------------------------------------------------------ behaviours and data


def controller(radius: float, speed: float, generator: torch.Generator):
    """Steers along a circle, with noise: without it the data would say nothing about other actions."""

    def act(state: Tensor) -> Tensor:
        position, velocity = state.split(2, -1)
        distance = position.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        outward = position / distance
        tangent = torch.stack([-outward[:, 1], outward[:, 0]], -1)
        wanted = speed * tangent + (radius - distance) * outward
        thrust = (velocity + 4 * (wanted - velocity)) / 1.5
        return thrust + 0.8 * torch.randn(thrust.shape, generator=generator)

    return act


def wanderer(generator: torch.Generator):
    """Random thrust that keeps its direction for some ten steps, and a pull towards the centre."""
    drift = None

    def act(state: Tensor) -> Tensor:
        nonlocal drift
        noise = torch.randn(len(state), 2, generator=generator)
        drift = noise if drift is None else 0.9 * drift + math.sqrt(1 - 0.9**2) * noise
        return drift - 2 * state[:, :2]

    return act


def behaviour_data(mix: str, episodes: int, seed: int) -> dict[str, Tensor]:
    """The arrays of a data file: `episodes` episodes, dealt to the controllers of a mix by its shares."""
    generator, parts = torch.Generator().manual_seed(seed), []
    for name, part in MIXES[mix].items():
        act = wanderer(generator) if name == "random" else controller(*CONTROLLERS[name], generator)
        parts.append(rollout(act, max(1, round(part * episodes)), generator))
    data = {name: torch.cat([part[name] for part in parts]).flatten(0, 1) for name in FIELDS[:5]}
    data["terminals"] = torch.zeros(len(data["rewards"]))
    data["timeouts"] = (torch.arange(1, len(data["rewards"]) + 1) % STEPS == 0).float()
    return data


def load_transitions(path: str) -> dict[str, Tensor]:
    """The arrays of a data file, float32. Raises InputError for one that cannot be used."""

    def check(good, problem: str) -> None:
        if not good:
            raise InputError(f"{path}: {problem}")

    with reading(path):
        if path.endswith((".hdf5", ".h5")):
            import h5py  # not among the requirements: the point mass needs none

            with h5py.File(path) as file:
                data = {name: torch.as_tensor(file[name][()]) for name in FIELDS if name in file}
        else:
            data = load_file(path)
    for name in FIELDS:
        check(name in data, f"holds no {name}; needed are {', '.join(FIELDS)}")
    data = {name: data[name].float() for name in FIELDS}
    rows = len(data["rewards"]) if data["rewards"].ndim else 0
    for name, array in data.items():
        shape, dimensions = tuple(array.shape), 2 if name.endswith(("observations", "actions")) else 1
        fits = len(shape) == dimensions and shape[0] == rows and array.numel()
        check(fits, f"{name} has shape {shape}, beside {rows} rewards")
        check(array.isfinite().all(), f"{name} holds a NaN or an infinity")
    widths = {data[name].shape[1] for name in ("observations", "next_observations")}
    check(len(widths) == 1, "observations and next_observations differ in width")
    check(data["actions"].abs().max() <= 1, "actions leave [-1, 1]; scale them")
    ends = torch.stack([data["terminals"], data["timeouts"]])
    check(((ends == 0) | (ends == 1)).all(), "terminals and timeouts must be 0 or 1")
    check(ends.any(), "no terminals and no timeouts: where does an episode end?")
    return data


def episode_sums(data: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """-> the number of each transition's episode (N,), returns and costs of the episodes (E,). What comes
    after the last end is an episode that was cut off: it counts as one."""
    ends = ((data["terminals"] + data["timeouts"]) > 0).long()
    episode = ends.cumsum(0) - ends
    sums = torch.zeros(int(episode[-1]) + 1)
    returns, costs = (sums.index_add(0, episode, data[name]) for name in ("rewards", "costs"))
    return episode, returns, costs


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    flag = parser.add_argument
    flag("--mix", choices=MIXES, default="mild", help="whose episodes")
    flag("--episodes", type=count, default=300, help="how many")
    flag("--seed", type=whole, default=0, help="random seed")
    flag("--output", type=path_name, help="file to write [default runs/satac/MIX.safetensors]")
    return parser.parse_args(argv)


def main(args):
    path = args.output or f"runs/satac/{args.mix}.safetensors"
    data = behaviour_data(args.mix, args.episodes, args.seed)
    with writing(path) as temporary:
        save_file(data, temporary)
    _, returns, costs = episode_sums(data)
    means = f"mean return {returns.mean():.1f}, mean cost {costs.mean():.1f}"
    print(f"{len(returns)} episodes -> {path}; {means}")


if __name__ == "__main__":
    runs.run(main, parse_args())
