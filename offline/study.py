"""SATAC against its baselines on the point mass, and over a 256-fold range of beta.

    python -m offline.study                          # every row in offline/README.md
    python -m offline.study --mixes mild --seeds 1   # `make satac`

Per mix and seed: data of that seed, and every method of METHODS on them, with the same networks, batches and
number of updates. A run that is there is not run again. In table.md the return and the cost of an episode are
in units of the behaviour policy's; a run is good that has a higher return than that policy at no higher cost.
results.json holds what they were. The settings, satac.py's defaults, were chosen on seed 0 of the mild mix.
"""

import statistics

from experiments import study
from offline import point_mass
from plots import OTHERS, OWN, panels, save
from plumbing import cli, runs
from plumbing.cli import count, path_name
from plumbing.files import read_json, write_json, writing

METHODS = {  # folder of the runs: name, colour, mark, flags of satac.py
    "satac": ("SATAC", OWN["repo"], "o", ()),
    "point": ("SATAC, hinge point", OTHERS[1], "s", ("--hinge", "point")),
    "none": ("no hinge (Lagrangian)", OWN["safe_rlhf"], "D", ("--hinge", "none")),
    "atac": ("ATAC (no cost)", OTHERS[0], "^", ("--lambda-init", "0")),
    "bc": ("cloning", OWN["sft"], "v", ("--clone",)),
    "bc_safe": ("cloning, safe episodes", OTHERS[2], "P", ("--clone", "--safe-only")),
}
BETAS = ("0.25", "1", "4", "64")  # on the first mix; 16 is satac.py's own


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


def planned(args) -> list[tuple[str, str, int, str, tuple]]:
    """(mix, name, seed, folder, flags of satac.py) of every run."""
    plan = []
    for mix in args.mixes:
        here = {name: flags for name, (_, _, _, flags) in METHODS.items()}
        if mix == args.mixes[0]:
            here |= {f"beta_{beta}": ("--beta", beta) for beta in BETAS}
        else:
            del here["point"]
        if mix == "unsafe":  # asked for more safety than the behaviour policy has
            here["cost_limit_5"] = ("--cost-limit", "5")
        for seed in range(args.seeds):
            folder = f"{args.output_dir}/{mix}/seed{seed}"
            plan += [(mix, name, seed, f"{folder}/{name}", flags) for name, flags in here.items()]
    return plan


def satac_jobs(args) -> list[dict]:
    jobs, steps = {}, ["--steps", args.steps] if args.steps else []
    for mix, _, seed, run, flags in planned(args):
        data = f"{args.output_dir}/{mix}/seed{seed}/data.safetensors"
        jobs[data] = study.job(data, [], "offline.point_mass", "--mix", mix, "--seed", seed, "--output", data)
        given = ["--dataset", data, "--output-dir", run, "--seed", seed, *flags, *steps]
        jobs[run] = study.job(f"{run}/model/summary.json", [data], "offline.satac", *given)
    return list(jobs.values())


# ------------------------------------------------------------------------------ results


def results(args) -> dict[str, dict[str, list[dict]]]:
    """mix -> method -> the summaries of all seeds."""
    found: dict = {}
    for mix, name, _, run, _ in planned(args):
        row = read_json(f"{run}/model/summary.json")
        found.setdefault(mix, {}).setdefault(name, []).append(row)
    return found


def good(row: dict) -> bool:
    return row["return"] > row["behaviour_return"] and row["cost"] <= row["behaviour_cost"]


def behaviour(methods: dict, key: str) -> float:
    """The behaviour policy's return or cost, a mean over the seeds' data."""
    return statistics.mean(row[f"behaviour_{key}"] for row in methods["satac"])


def table(found: dict) -> str:
    lines = ["| mix | method | return / behaviour | cost / behaviour | good runs |", "|---|---|---|---|---|"]
    for mix, methods in found.items():
        for name, rows in methods.items():
            label = METHODS[name][0] if name in METHODS else f"SATAC, {name.replace('_', ' ')}"
            ratios = ([row[key] / row[f"behaviour_{key}"] for row in rows] for key in ("return", "cost"))
            cells = " | ".join(study.spread(ratio, 2) for ratio in ratios)
            lines.append(f"| {mix} | {label} | {cells} | {sum(map(good, rows))} of {len(rows)} |")
        reward, cost = (behaviour(methods, key) for key in ("return", "cost"))
        lines.append(f"| {mix} | behaviour: return {reward:.1f}, cost {cost:.1f} | 1 | 1 | |")
    return "\n".join(lines)


def method_figure(found: dict):
    """A panel per mix: the mean of every method's return and cost, the runs as small dots."""
    figure, (axes,) = panels(1, len(found), 4 + 2 / len(found), 4)  # 2 inches for the legend
    for ax, (mix, methods) in zip(axes, found.items()):
        ax.axvline(behaviour(methods, "cost"), color="black", linestyle="--", linewidth=1)
        ax.axhline(behaviour(methods, "return"), color="black", linestyle="--", linewidth=1)
        for name in filter(methods.get, METHODS):
            label, colour, mark, _ = METHODS[name]
            costs, returns = ([row[key] for row in methods[name]] for key in ("cost", "return"))
            ax.plot(costs, returns, ".", color=colour, alpha=0.5)
            mean = [statistics.mean(costs)], [statistics.mean(returns)]
            ax.plot(*mean, mark, color=colour, markersize=9, label=label)
        ax.set(title=f"{mix} data", xlabel="cost of an episode (dashed: behaviour policy)")
    axes[0].set_ylabel("return of an episode")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def main(args):
    runs.lock(args.output_dir)
    study.run_jobs(satac_jobs(args), args.jobs)
    found = results(args)
    text = table(found)
    with writing(f"{args.output_dir}/table.md") as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text + "\n")
    write_json(f"{args.output_dir}/results.json", found)
    print(text)
    save(method_figure(found), f"{args.output_dir}/figures/satac_methods")


if __name__ == "__main__":
    runs.run(main, parse_args())
