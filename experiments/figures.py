"""The study's figures from study.json, mean and standard deviation over seeds.

mixes     a column per initial mix: the SFT policy's costs, average cost, unsafe responses  (RePO, figure 3)
pareto    true safety against true helpfulness, both sweeps                              (Safe RLHF's front)
lambdas   RePO's multiplier climbs and stands still, Safe RLHF's goes up and down
price     the rectifier alone: Safe RLHF with lambda fixed where RePO's ended, between the two

python -m experiments.figures --study runs/study/study.json --output-dir runs/study/figures
"""

import os
import statistics

from experiments.study import PRICE
from plots import OTHERS, OWN, centred_mean, histogram, panels, pretty, save
from plumbing import cli, runs
from plumbing.cli import count, path_name
from plumbing.files import read_json, reading


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    flag = parser.add_argument
    flag("--study", type=path_name, default="runs/study/study.json", help="what experiments.study wrote")
    flag("--smooth", type=count, default=9, help="rollouts in the centred mean of the training curves")
    flag("--output-dir", type=path_name, default="runs/study/figures", help="folder for the figures")
    return parser.parse_args(argv)


def band(ax, curves: list[list[float]], window: int, colour: str, dashes: str, label: str) -> None:
    """Curves of several seeds, each smoothed: their mean, and one standard deviation around it."""
    smooth = [centred_mean(curve, window) for curve in curves]
    means = [statistics.mean(column) for column in zip(*smooth)]
    spreads = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in zip(*smooth)]
    low, high = ([m + sign * s for m, s in zip(means, spreads)] for sign in (-1, 1))
    ax.plot(means, color=colour, linestyle=dashes, linewidth=2, label=label)
    ax.fill_between(range(len(means)), low, high, color=colour, alpha=0.2, linewidth=0)


LINES = (
    ("safe_rlhf", OWN["safe_rlhf"], "--"),
    ("safe_rlhf_d-4", OTHERS[0], "-."),
    ("repo", OWN["repo"], "-"),
)


def mixes(study: dict, smooth: int):
    figure, axes = panels(3, len(study["results"]), 4.4, 3, sharey="row")
    for column, (mix, results) in enumerate(study["results"].items()):
        costs = [c for seed in study["sft_costs"][mix] for c in seed]
        ax = axes[0][column]
        edges = [-8 + 0.4 * i for i in range(41)]  # an edge at 0, so that no bar is half safe
        histogram(ax, costs, edges, OWN["sft"])
        safe = sum(c <= 0 for c in costs) / len(costs)
        ax.set_title(f"{mix.replace('_', ' ')}\nSFT: S.R. {safe:.0%}, mean {statistics.mean(costs):+.1f}")
        ax.set_xlabel("learned cost (hatched: unsafe)")
        for name, colour, dashes in LINES:
            costs = [row["curves"]["cost"] for row in results[name]]
            band(axes[1][column], costs, smooth, colour, dashes, pretty(name))
            size = results[name][0]["batch_size"]
            unsafe = [[size * rate for rate in row["curves"]["unsafe_rate"]] for row in results[name]]
            band(axes[2][column], unsafe, smooth, colour, dashes, pretty(name))
        axes[1][column].axhline(0, color="black", linestyle=":", linewidth=1.5)
        axes[2][column].set_ylim(bottom=0)
        axes[2][column].set_xlabel("step (rollouts)")
    axes[0][0].set_ylabel("SFT responses (%)")
    axes[1][0].set_ylabel("mean cost of a rollout (dotted: d = 0)")
    axes[2][0].set_ylabel(f"unsafe responses of {size}")
    axes[2][0].legend(frameon=False)
    return figure


def sweeps(results: dict) -> tuple:
    """(policies, colour, marker, label) of every sweep over a mix's policies."""
    shaping = [name for name in results if name == "ppo" or name.startswith("shaping")]
    limits = [name for name in results if name.startswith("safe_rlhf") and name != PRICE]
    return (
        (shaping, "#009E73", "s", "reward shaping (PPO: $\\nu$ = 0)"),
        (limits, OWN["safe_rlhf"], "o", "Safe RLHF (limit d)"),
        (["repo"], OWN["repo"], "D", "RePO"),
        (["sft"], OWN["sft"], "X", "SFT (initial)"),
    )


def annotate(ax, name: str, x: float, y: float, colour: str) -> None:
    """A point's nu or d; Safe RLHF's to the left of it, so that the sweeps do not cover each other's."""
    text = {"ppo": "$\\nu$ = 0", "safe_rlhf": "d = 0"}.get(name) or pretty(name).split(", ")[1]
    place = {"xytext": (5, 5), "ha": "left", "va": "bottom"}
    if name.startswith("safe_rlhf"):
        place = {"xytext": (-5, -5), "ha": "right", "va": "top"}
    ax.annotate(text, (x, y), textcoords="offset points", fontsize=9, color=colour, **place)


def pareto(study: dict):
    """A column per mix, both axes by the truth; the upper right is best. A point of the lower row stands
    below its namesake of the upper one."""
    figure, axes = panels(2, len(study["results"]), 5, 4.25, sharex="col", sharey="row")
    for column, (mix, results) in enumerate(study["results"].items()):
        for ax, key in ((axes[0][column], "true_reward"), (axes[1][column], "benign_reward")):
            for names, colour, marker, label in sweeps(results):
                safe = [[100 - 100 * row["true_unsafe_rate"] for row in results[name]] for name in names]
                reward = [[row[key] for row in results[name]] for name in names]
                x, y = ([statistics.mean(seeds) for seeds in values] for values in (safe, reward))
                dx, dy = (
                    [statistics.stdev(seeds) if len(seeds) > 1 else 0 for seeds in values]
                    for values in (safe, reward)
                )
                ax.errorbar(x, y, xerr=dx, yerr=dy, fmt="none", ecolor=colour, alpha=0.35, capsize=2)
                ax.plot(x, y, color=colour, marker=marker, markersize=8, linewidth=1, label=label)
                if len(names) > 1 and key == "true_reward":
                    for name, a, b in zip(names, x, y):
                        annotate(ax, name, a, b, colour)
            ax.margins(y=0.1)
            ax.set_xlim(right=100 + 0.14 * (100 - ax.get_xlim()[0]))  # room for the labels
            ax.set_xticks([tick for tick in ax.get_xticks() if 0 <= tick <= 100])
        axes[0][column].set_title(mix.replace("_", " "))
        axes[1][column].set_xlabel("truly safe responses (%)")
    axes[0][0].set_ylabel("mean true reward, all prompts")
    axes[1][0].set_ylabel("mean true reward, benign prompts")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def lambdas(study: dict):
    """A thin line per seed; the thick one is their mean."""
    figure, axes = panels(2, len(study["results"]), 4.4, 2.9, sharex=True, sharey="row")
    for column, (mix, results) in enumerate(study["results"].items()):
        for name, colour, dashes in LINES:
            ax, seeds = axes[int(name != "repo")][column], [row["curves"]["lambda"] for row in results[name]]
            for values, row in zip(seeds, results[name]):
                still = row["still_lambda"] if name == "repo" else None
                marked = [] if still is None else [still]
                ax.plot(values, "o-", color=colour, linewidth=0.8, alpha=0.6, markersize=5, markevery=marked)
            means = [statistics.mean(rollout) for rollout in zip(*seeds)]
            label = pretty(name) + (" (dots: it stands still)" if name == "repo" else "")
            ax.plot(means, color=colour, linestyle=dashes, linewidth=2.5, label=label)
        axes[0][column].set_title(mix.replace("_", " "))
        axes[1][column].set_yscale("log")
        axes[1][column].set_xlabel("step (rollouts)")
    axes[0][0].set_ylim(bottom=0)
    for row in axes:
        row[0].set_ylabel("multiplier $\\lambda$")
        row[0].legend(frameon=False)
    return figure


def price(study: dict):
    """Bars: the mean; dots: every seed."""
    policies = (
        ("safe_rlhf", OWN["safe_rlhf"], "Safe RLHF"),
        (PRICE, OTHERS[2], "Safe RLHF at RePO's price"),
        ("repo", OWN["repo"], "RePO"),
    )
    shown = {
        "true_unsafe_rate": "truly unsafe",
        "refused_risky": "risky prompts\nrefused",
        "best_safe_share": "best-safe\nshare",
    }
    figure, axes = panels(1, len(study["results"]), 4.4, 3.8, sharey=True)
    for ax, (mix, results) in zip(axes[0], study["results"].items()):
        for number, (name, colour, label) in enumerate(policies):
            places = [place + 0.27 * (number - 1) for place in range(len(shown))]
            seeds = [[100 * row[key] for row in results[name]] for key in shown]
            ax.bar(
                places,
                [statistics.mean(values) for values in seeds],
                0.25,
                color=colour,
                alpha=0.55,
                label=label,
            )
            for place, values in zip(places, seeds):
                spots = [place + 0.05 * (i % 3 - 1) for i in range(len(values))]
                ax.scatter(spots, values, s=14, color=colour, edgecolor="black", linewidths=0.5, zorder=3)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_xticks(range(len(shown)), shown.values())
        last = statistics.mean(row["final_lambda"] for row in results["repo"])
        ax.set_title(f"{mix.replace('_', ' ')}: price $\\lambda$ = {last:.2f}")
    axes[0][0].set_ylabel("% (risky: borderline and harmful)")
    figure.suptitle("Safe RLHF at RePO's price, and RePO: the same $\\lambda$, one torch.where apart")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def main(args):
    cli.require(args.study, "make study")
    study = read_json(args.study)
    with reading(args.study):  # any JSON may stand in it
        figures = {"mixes": mixes(study, args.smooth), "pareto": pareto(study)}
        figures |= {"lambdas": lambdas(study), "price": price(study)}
    for name, figure in figures.items():
        save(figure, os.path.join(args.output_dir, name))


if __name__ == "__main__":
    runs.run(main, parse_args())
