"""SATAC against its baselines on the point mass, and over a 256-fold range of beta.

    python -m offline.study                          # everything in offline/README.md
    python -m offline.study --mixes mild --seeds 1   # `make satac`

Per mix and seed: data of that seed, and every method of METHODS on them, with the same networks, batches and
number of updates; on the first mix also SATAC with every beta of BETAS. A run that is there is not run again.

    return, cost   of an episode, in units of the behaviour policy's: 1 is what the data have
    good           runs with a higher return than the behaviour policy's at no higher cost

The settings, satac.py's defaults, were chosen on seed 0 of the mild mix.
"""

import statistics

from experiments import study
from offline import point_mass
from plots import OTHERS, OWN, panels, save
from plumbing import cli, runs
from plumbing.cli import count, path_name
from plumbing.files import read_json, write_json, writing

METHODS = {  # name: flags of satac.py
    "satac": (),
    "point": ("--hinge", "point"),
    "none": ("--hinge", "none"),
    "atac": ("--lambda-init", "0"),
    "bc": ("--clone",),
    "bc_safe": ("--clone", "--safe-only"),
}
NAMES = {
    "satac": "SATAC",
    "point": "SATAC, hinge point",
    "none": "no hinge (Lagrangian)",
    "atac": "ATAC (no cost)",
    "bc": "cloning",
    "bc_safe": "cloning, safe episodes",
    "limit": "SATAC, cost limit 5",
}
BETAS = {"0.25": "beta_0.25", "1": "beta_1", "4": "beta_4", "16": "satac", "64": "beta_64"}  # the run
COLOURS = [OWN["repo"], OTHERS[1], OWN["safe_rlhf"], OTHERS[0], OWN["sft"], OTHERS[2]]


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    flag = parser.add_argument
    flag("--mixes", nargs="+", choices=point_mass.MIXES, default=list(point_mass.MIXES), help="whose data")
    flag("--seeds", type=count, default=5, help="seeds 0 to N - 1")
    flag("--steps", type=count, help="of every run [default: satac.py's]")
    flag("--jobs", type=count, default=2, help="commands at a time, one core each")
    flag("--output-dir", type=path_name, default="runs/satac", help="folder for everything that is written")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------ runs


def planned(args) -> list[tuple[str, str, int, tuple]]:
    """(mix, name, seed, flags of satac.py) of every run."""
    plan = []
    for number, mix in enumerate(args.mixes):
        for seed in range(args.seeds):
            here = dict(METHODS)
            if number > 0:
                del here["point"]
            else:
                here |= {name: ("--beta", beta) for beta, name in BETAS.items()}
            if mix == "unsafe":  # asked for more safety than the behaviour policy has
                here["limit"] = ("--cost-limit", "5")
            plan += [(mix, name, seed, flags) for name, flags in here.items()]
    return plan


def summary(args, mix: str, name: str, seed: int) -> str:
    return f"{args.output_dir}/{mix}/seed{seed}/{name}/model/summary.json"


def satac_jobs(args) -> list[dict]:
    jobs, steps = {}, ["--steps", args.steps] if args.steps else []
    for mix, name, seed, flags in planned(args):
        makes, folder = summary(args, mix, name, seed), f"{args.output_dir}/{mix}/seed{seed}"
        data = f"{folder}/data.safetensors"
        jobs[data] = study.job(data, [], "offline.point_mass", "--mix", mix, "--seed", seed, "--output", data)
        given = ["--dataset", data, "--output-dir", f"{folder}/{name}", "--seed", seed, *flags, *steps]
        jobs[makes] = study.job(makes, [data], "offline.satac", *given)
    return list(jobs.values())


# ------------------------------------------------------------------------------ results


def results(args) -> dict[str, dict[str, list[dict]]]:
    """mix -> method -> the summaries of all seeds."""
    found: dict = {}
    for mix, name, seed, _ in planned(args):
        found.setdefault(mix, {}).setdefault(name, []).append(read_json(summary(args, mix, name, seed)))
    return found


def good(row: dict) -> bool:
    return row["return"] > row["behaviour_return"] and row["cost"] <= row["behaviour_cost"]


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):5.2f} ± {deviation:4.2f}"


def table(found: dict) -> str:
    lines = ["| mix | method | return / behaviour | cost / behaviour | good runs |", "|---|---|---|---|---|"]
    for mix, methods in found.items():
        for name, rows in methods.items():
            label = NAMES.get(name, name.replace("_", " "))
            reward = spread([row["return"] / row["behaviour_return"] for row in rows])
            cost = spread([row["cost"] / row["behaviour_cost"] for row in rows])
            lines.append(f"| {mix} | {label} | {reward} | {cost} | {sum(map(good, rows))} of {len(rows)} |")
        reward, cost = (statistics.mean(row[f"behaviour_{k}"] for row in rows) for k in ("return", "cost"))
        lines.append(f"| {mix} | behaviour: return {reward:.1f}, cost {cost:.1f} | 1 | 1 | |")
    return "\n".join(lines)


def beta_figure(methods: dict):
    """Return and cost over beta: mean, standard deviation, all seeds, and the behaviour policy's lines."""
    figure, (axes,) = panels(1, 2, 4.5, 3.6)
    betas = [float(beta) for beta in BETAS]
    for ax, key, colour in zip(axes, ("return", "cost"), (OWN["repo"], OWN["safe_rlhf"])):
        columns = [[row[key] for row in methods[name]] for name in BETAS.values()]
        means = [statistics.mean(column) for column in columns]
        errors = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
        low = [max(0.0, mean - error) for mean, error in zip(means, errors)]  # neither can be below 0 here
        high = [mean + error for mean, error in zip(means, errors)]
        ax.fill_between(betas, low, high, color=colour, alpha=0.2, linewidth=0)
        style = {"color": colour, "clip_on": False}  # a cost of 0 lies on the axis
        ax.plot(betas, means, marker="o", linewidth=2, label="SATAC: mean, sd, every seed", **style)
        ax.plot(betas, columns, ".", alpha=0.6, **style)
        line = statistics.mean(row[f"behaviour_{key}"] for row in methods["satac"])
        ax.axhline(line, color="black", linestyle="--", linewidth=1.5, label="behaviour policy")
        ax.set_xscale("log", base=4)
        ax.set_xticks(betas, BETAS)
        ax.set_xlabel("beta, weight of the Bellman error")
        ax.set_ylabel(f"{key} of an episode")
        ax.set_ylim(bottom=0)
    axes[0].legend(frameon=False)
    axes[0].set_title("above the dashed line: better")
    axes[1].set_title("below the dashed line: as safe")
    return figure


def method_figure(found: dict):
    """A panel per mix: the mean of every method's return and cost, the runs as small dots."""
    figure, (axes,) = panels(1, len(found), 4 + 2 / len(found), 4)  # 2 inches for the legend
    for ax, (mix, methods) in zip(axes, found.items()):
        for line, key in ((ax.axvline, "cost"), (ax.axhline, "return")):
            behaviour = statistics.mean(row[f"behaviour_{key}"] for row in methods["satac"])
            line(behaviour, color="black", linestyle="--", linewidth=1)
        for name, colour, marker in zip(METHODS, COLOURS, "osD^vP"):
            costs, returns = ([row[key] for row in methods.get(name, [])] for key in ("cost", "return"))
            ax.plot(costs, returns, ".", color=colour, alpha=0.5)
            if costs:
                mean = [statistics.mean(costs)], [statistics.mean(returns)]
                ax.plot(*mean, marker, color=colour, markersize=9, label=NAMES[name])
        ax.set_title(f"{mix} data")
        ax.set_xlabel("cost of an episode (dashed: behaviour policy)")
    axes[0].set_ylabel("return of an episode")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def main(args):
    runs.lock(args.output_dir)
    study.run_jobs(satac_jobs(args), args.jobs)
    found = results(args)
    text = table(found)
    with writing(f"{args.output_dir}/table.md") as temporary, open(temporary, "w") as file:
        file.write(text + "\n")
    write_json(f"{args.output_dir}/results.json", found)
    print(text)
    save(beta_figure(found[args.mixes[0]]), f"{args.output_dir}/figures/satac_beta")
    save(method_figure(found), f"{args.output_dir}/figures/satac_methods")


if __name__ == "__main__":
    runs.run(main, parse_args())
