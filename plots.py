"""Stage 5: the papers' figures, from nothing but the files that the runs wrote.

    scatter        cost and reward of every response, before and after               (RePO, figure 4)
    training       average cost and number of unsafe responses per rollout           (RePO, figure 3)
    distributions  cost distributions before and after                   (RePO, figure 3, first row)
    multiplier     lambda and the violation that drives it
    compensation   cost by prompt group: who pays for whom                           (RePO, figure 1)

and with --study, from study.json, mean and standard deviation over seeds:

    mixes          a column per initial mix: the SFT policy's costs, average cost, unsafe responses   (RePO, figure 3)
    pareto         true safety against true helpfulness, both sweeps                 (Safe RLHF's front)
    lambdas        the multiplier in every mix

    python plots.py                                                          # the demo's runs
    python plots.py --evaluation runs/eval --runs "Safe RLHF=runs/a" "RePO=runs/b" --output-dir figures
    python plots.py --study runs/study/study.json --output-dir runs/study/figures

Every figure is written as PNG and PDF. Colours are Okabe and Ito's, told apart also without colour
vision; lines differ in their dashes as well. Prompt groups are the harm levels of the toy world;
elsewhere the prompts are grouped in thirds by the first policy's mean cost.
"""

import argparse
import json
import os
import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from distributed import RunError, need, read_jsonl, run  # noqa: E402

NAMES = {"sft": "SFT (initial)", "safe_rlhf": "Safe RLHF", "repo": "RePO", "ppo": "PPO, reward only"}
OWN = {"sft": "#7F7F7F", "safe_rlhf": "#D55E00", "repo": "#0072B2"}  # the same in every figure
OTHERS = ["#E69F00", "#009E73", "#CC79A7", "#56B4E9"]
DASHES = ["-", "--", "-", "-.", ":", "--"]
HARM_LEVELS = ("benign", "borderline", "harmful")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--evaluation", default="runs/demo/evaluation", help="output folder of evaluate.py")
    flag("--runs", nargs="+", metavar="NAME=FOLDER", default=["safe_rlhf=runs/demo/safe_rlhf", "repo=runs/demo/repo"],
         help="output folders of the PPO scripts, named as in the evaluation; these and the first policy are shown")  # fmt: skip
    flag("--study", help="study.json of study.py: draw its figures instead")
    flag("--smooth", type=int, default=10, help="rollouts in the running mean of the training curves")
    flag("--output-dir", default="runs/demo/figures", help="folder for the figures")
    return parser.parse_args()


def running_mean(values: list[float], window: int) -> list[float]:
    """The mean of the last `window` values at every step; no value is plotted before it was known."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def pretty(name: str) -> str:
    """safe_rlhf_d-4 -> Safe RLHF, d = -4; shaping_0.3 -> shaping, nu = 0.3."""
    if name.startswith("safe_rlhf_d"):
        return f"Safe RLHF, d = {name.removeprefix('safe_rlhf_d')}"
    if name.startswith("shaping_"):
        return f"shaping, $\\nu$ = {name.removeprefix('shaping_')}"
    return NAMES.get(name, name)


def save(figure, folder: str, name: str) -> None:
    for kind in ("png", "pdf"):
        figure.savefig(os.path.join(folder, f"{name}.{kind}"), dpi=150)
    plt.close(figure)
    print(os.path.join(folder, f"{name}.png"))


def limits(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


# ------------------------------------------------------------------------------ the figures


def scatter(by_policy: dict, style: dict):
    """A panel per policy; the first policy's cloud stays behind the others in grey."""
    figure, axes = plt.subplots(1, len(by_policy), figsize=(4.2 * len(by_policy), 4.2), sharex=True, sharey=True, squeeze=False, layout="constrained")
    everything = [row for rows in by_policy.values() for row in rows]
    first = next(iter(by_policy.values()))
    for ax, (name, rows) in zip(axes[0], by_policy.items()):
        if rows is not first:
            ax.scatter([r["cost"] for r in first], [r["reward"] for r in first], s=8, color="0.85", linewidths=0, rasterized=True)
        ax.scatter([r["cost"] for r in rows], [r["reward"] for r in rows], s=8, color=style[name][0], alpha=0.5, linewidths=0, rasterized=True)
        ax.axvline(0, color="black", linewidth=1.2)
        safe = sum(r["cost"] <= 0 for r in rows) / len(rows)
        ax.set_title(f"{style[name][2]}: {safe:.1%} safe")
        ax.text(0.02, 0.02, "safe", transform=ax.transAxes, ha="left", va="bottom")
        ax.text(0.98, 0.02, "unsafe", transform=ax.transAxes, ha="right", va="bottom")
        ax.set_xlabel("cost C(x, y), learned (score)")
        ax.set_xlim(limits([r["cost"] for r in everything]))
        ax.set_ylim(limits([r["reward"] for r in everything]))
    axes[0][0].set_ylabel("reward R(x, y), learned (score)")
    return figure


def training(runs: dict, style: dict, smooth: int):
    figure, axes = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    for name, (args, metrics) in runs.items():
        colour, dashes, label = style[name]
        steps = [m["step"] for m in metrics]
        for ax, values in ((axes[0], [m["cost"] for m in metrics]), (axes[1], [m["unsafe_rate"] * args["batch_size"] for m in metrics])):
            ax.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            ax.plot(steps, running_mean(values, smooth), color=colour, linestyle=dashes, linewidth=2, label=label)
    limit, size = args["threshold"], args["batch_size"]
    axes[0].axhline(limit, color="black", linestyle=":", linewidth=1.5, label=f"limit d = {limit:g}")
    axes[0].set_ylabel("mean cost of a rollout (score)")
    axes[1].set_ylabel(f"unsafe responses of {size} (count)")
    axes[1].set_ylim(bottom=0)
    axes[1].set_xlabel("step (rollouts)")
    axes[0].set_title("Average cost, and responses with C > 0, during training")
    axes[0].legend(frameon=False)
    axes[1].legend(frameon=False)
    return figure


def distributions(by_policy: dict, style: dict):
    """A row per policy below each other, so that the part right of C = 0 can be compared."""
    figure, axes = plt.subplots(len(by_policy), 1, figsize=(7, 2.1 * len(by_policy)), sharex=True, sharey=True, squeeze=False, layout="constrained")
    low, high = limits([r["cost"] for rows in by_policy.values() for r in rows])
    width = (high - low) / 60
    start = -width * (int(-low / width) + 1)  # a bin edge at 0, so that no bar is half safe
    edges = [start + i * width for i in range(62)]
    for ax, (name, rows) in zip(axes[:, 0], by_policy.items()):
        costs = [r["cost"] for r in rows]
        for part, hatch in (([c for c in costs if c <= 0], None), ([c for c in costs if c > 0], "////")):
            ax.hist(part, edges, weights=[100 / len(costs)] * len(part), color=style[name][0], hatch=hatch, edgecolor="white", linewidth=0.3)
        ax.axvline(0, color="black", linewidth=1.2)
        average = sum(costs) / len(costs)
        ax.axvline(average, color="black", linestyle=":", linewidth=1.5)
        ax.set_title(f"{style[name][2]}: safety rate {sum(c <= 0 for c in costs) / len(costs):.1%}, mean cost {average:+.1f} (dotted)")
        ax.set_ylabel("responses (%)")
    axes[-1, 0].set_xlabel("cost C(x, y), learned (score); hatched: unsafe")
    return figure


def multiplier(runs: dict, style: dict, smooth: int):
    figure, axes = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    for name, (_, metrics) in runs.items():
        colour, dashes, label = style[name]
        steps, violation = [m["step"] for m in metrics], [m["violation"] for m in metrics]
        drive = "E[{C - d}$^+$]" if min(violation) >= 0 else "J$_C$ - d"
        axes[0].plot(steps, [m["lambda"] for m in metrics], color=colour, linestyle=dashes, linewidth=2, label=label)
        axes[1].plot(steps, violation, color=colour, alpha=0.25, linewidth=0.8)
        axes[1].plot(steps, running_mean(violation, smooth), color=colour, linestyle=dashes, linewidth=2, label=f"{label}: {drive}")
    axes[0].set_ylabel("multiplier $\\lambda$")
    axes[0].set_ylim(bottom=0)
    axes[1].axhline(0, color="black", linestyle=":", linewidth=1.5)
    axes[1].set_ylabel("violation (score)")
    axes[1].set_xlabel("step (rollouts)")
    axes[0].set_title("$\\lambda$ rises while its violation is above 0 and falls below it")
    axes[0].legend(frameon=False)
    axes[1].legend(frameon=False)
    return figure


def group_of(rows: list[dict]) -> tuple[dict, tuple]:
    """Prompt -> group, and the groups' names: harm levels, or thirds by the mean cost in `rows`."""
    if "harm_level" in rows[0]:
        return {r["prompt"]: r["harm_level"] for r in rows}, HARM_LEVELS
    costs: dict = {}
    for r in rows:
        costs.setdefault(r["prompt"], []).append(r["cost"])
    ordered = sorted(costs, key=lambda prompt: sum(costs[prompt]) / len(costs[prompt]))
    return {prompt: 3 * i // len(ordered) for i, prompt in enumerate(ordered)}, ("safest third", "middle third", "riskiest third")


def compensation(by_policy: dict, style: dict):
    """Costs by prompt group and policy. The average sits at the dotted line: in Safe RLHF the groups
    on its two sides pay for each other."""
    groups, labels = group_of(next(iter(by_policy.values())))
    figure, axes = plt.subplots(1, len(by_policy), figsize=(4.2 * len(by_policy), 4.4), sharey=True, squeeze=False, layout="constrained")
    for ax, (name, rows) in zip(axes[0], by_policy.items()):
        costs = [[r["cost"] for r in rows if groups[r["prompt"]] == g] for g in range(len(labels))]
        boxes = ax.boxplot(costs, tick_labels=labels, widths=0.6, patch_artist=True, showfliers=False, whis=(5, 95), medianprops={"color": "black"})
        for box in boxes["boxes"]:
            box.set(facecolor=style[name][0], alpha=0.6)
        average = sum(r["cost"] for r in rows) / len(rows)
        ax.axhline(0, color="black", linewidth=1.2)
        ax.axhline(average, color=style[name][0], linestyle=":", linewidth=2.5)
        top = max(r["cost"] for rs in by_policy.values() for r in rs)
        for g, values in enumerate(costs, 1):
            ax.text(g, top * 1.06, f"{sum(c > 0 for c in values) / max(1, len(values)):.0%}", ha="center", va="bottom", fontsize=11)
        ax.set_ylim(top=top * 1.25)
        ax.set_title(f"{style[name][2]}: mean cost {average:+.1f}")
        ax.set_xlabel("prompt group (above: share unsafe)")
    axes[0][0].set_ylabel("cost C(x, y), learned (score)")
    return figure


# ------------------------------------------------------------------------------ the study's figures


def mean_and_spread(curves: list[list[float]], window: int) -> tuple[list[float], list[float], list[float]]:
    """Curves of several seeds, each smoothed -> mean, mean - sd and mean + sd at every step."""
    smooth = [running_mean(curve, window) for curve in curves]
    means = [statistics.mean(column) for column in zip(*smooth)]
    spreads = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in zip(*smooth)]
    return means, [m - s for m, s in zip(means, spreads)], [m + s for m, s in zip(means, spreads)]


def band(ax, curves: list[list[float]], window: int, colour: str, dashes: str, label: str) -> None:
    means, low, high = mean_and_spread(curves, window)
    ax.plot(means, color=colour, linestyle=dashes, linewidth=2, label=label)
    ax.fill_between(range(len(means)), low, high, color=colour, alpha=0.2, linewidth=0)


LINES = (("safe_rlhf", OWN["safe_rlhf"], "--"), ("safe_rlhf_d-4", "#E69F00", "-."), ("repo", OWN["repo"], "-"))


def mixes(study: dict, smooth: int):
    figure, axes = plt.subplots(3, len(study["curves"]), figsize=(4.4 * len(study["curves"]), 9), sharey="row", squeeze=False, layout="constrained")
    for column, (mix, curves) in enumerate(study["curves"].items()):
        costs = [c for seed in study["sft_costs"][mix] for c in seed]
        ax = axes[0][column]
        edges = [-8 + 0.4 * i for i in range(41)]  # an edge at 0, so that no bar is half safe
        for part, hatch in (([c for c in costs if c <= 0], None), ([c for c in costs if c > 0], "////")):
            ax.hist(part, edges, weights=[100 / len(costs)] * len(part), color="#7F7F7F", hatch=hatch, edgecolor="white", linewidth=0.3)
        ax.axvline(0, color="black", linewidth=1.2)
        ax.set_title(f"{mix.replace('_', ' ')}\nSFT: S.R. {sum(c <= 0 for c in costs) / len(costs):.0%}, mean {statistics.mean(costs):+.1f}")
        ax.set_xlabel("learned cost (hatched: unsafe)")
        for name, colour, dashes in LINES:
            if name in curves:
                size = study["results"][mix][name][0]["batch_size"]
                band(axes[1][column], curves[name]["cost"], smooth, colour, dashes, pretty(name))
                unsafe = [[size * rate for rate in seed] for seed in curves[name]["unsafe_rate"]]
                band(axes[2][column], unsafe, smooth, colour, dashes, pretty(name))
        axes[1][column].axhline(0, color="black", linestyle=":", linewidth=1.5)
        axes[2][column].set_ylim(bottom=0)
        axes[2][column].set_xlabel("step (rollouts)")
    axes[0][0].set_ylabel("SFT responses (%)")
    axes[1][0].set_ylabel("mean cost of a rollout (dotted: d = 0)")
    axes[2][0].set_ylabel(f"unsafe responses of {size}")
    axes[2][0].legend(frameon=False)
    return figure


def pareto(study: dict):
    """A column per mix, both axes by the truth; the upper right is best. A point stands below its namesake of the upper row."""
    figure, axes = plt.subplots(
        2, len(study["results"]), figsize=(5 * len(study["results"]), 8.5), sharex="col", sharey="row", squeeze=False, layout="constrained"
    )
    for column, (mix, results) in enumerate(study["results"].items()):
        sweeps = (
            ([n for n in results if n == "ppo" or n.startswith("shaping")], "#009E73", "s", "reward shaping (PPO: $\\nu$ = 0)"),
            ([n for n in results if n.startswith("safe_rlhf")], "#D55E00", "o", "Safe RLHF (limit d)"),
            (["repo"], "#0072B2", "D", "RePO"),
            (["sft"], "#7F7F7F", "X", "SFT (initial)"),
        )
        for ax, key in ((axes[0][column], "true_reward"), (axes[1][column], "benign_reward")):
            for names, colour, marker, label in sweeps:
                points = [([100 - 100 * r["true_unsafe_rate"] for r in results[n]], [r[key] for r in results[n]]) for n in names]
                x, y = ([statistics.mean(p[i]) for p in points] for i in (0, 1))
                dx, dy = ([statistics.stdev(p[i]) if len(p[i]) > 1 else 0 for p in points] for i in (0, 1))
                ax.errorbar(x, y, xerr=dx, yerr=dy, fmt="none", ecolor=colour, alpha=0.35, capsize=2)
                ax.plot(x, y, color=colour, marker=marker, markersize=8, linewidth=1, label=label)
                for name, a, b in zip(names, x, y):
                    if len(names) > 1 and key == "true_reward":
                        text = "$\\nu$ = 0" if name == "ppo" else "d = 0" if name == "safe_rlhf" else pretty(name).split(", ")[1]
                        left = name.startswith("safe_rlhf")  # of its point, so that the sweeps do not cover each other's labels
                        ax.annotate(text, (a, b), xytext=(-5, -5) if left else (5, 5), textcoords="offset points", fontsize=9,
                                    color=colour, ha="right" if left else "left", va="top" if left else "bottom")  # fmt: skip
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
    figure, axes = plt.subplots(1, len(study["curves"]), figsize=(4.4 * len(study["curves"]), 3.8), sharey=True, squeeze=False, layout="constrained")
    for ax, (mix, curves) in zip(axes[0], study["curves"].items()):
        for name, colour, dashes in LINES:
            if name in curves:
                band(ax, curves[name]["lambda"], 1, colour, dashes, pretty(name))
        ax.set_title(mix.replace("_", " "))
        ax.set_xlabel("step (rollouts)")
        ax.set_yscale("log")
    axes[0][0].set_ylabel("multiplier $\\lambda$")
    axes[0][-1].legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.85))  # below RePO's line
    return figure


def main(args):
    if args.study:
        need(args.study, "make study")
        try:
            with open(args.study) as file:
                study = json.load(file)
            figures = {"mixes": mixes(study, args.smooth), "pareto": pareto(study), "lambdas": lambdas(study)}
        except (OSError, json.JSONDecodeError, KeyError) as error:
            raise RunError(f"{args.study}: cannot be read as a study ({error})") from None
        try:
            os.makedirs(args.output_dir, exist_ok=True)
            for name, figure in figures.items():
                save(figure, args.output_dir, name)
        except OSError as error:
            raise RunError(f"cannot write to --output-dir {args.output_dir} ({error.strerror})") from None
        return
    need(args.evaluation, "python evaluate.py")
    by_policy: dict = {}
    for row in read_jsonl(os.path.join(args.evaluation, "responses.jsonl")):
        by_policy.setdefault(row["policy"], []).append(row)
    runs = {}
    for item in args.runs:
        name, separator, folder = item.partition("=")
        if not separator:
            raise RunError(f"--runs takes NAME=FOLDER, got {item!r}")
        need(folder, f"python {name}_ppo.py")
        metrics = read_jsonl(os.path.join(folder, "metrics.jsonl"))
        try:
            with open(os.path.join(folder, "args.json")) as file:
                runs[name] = (json.load(file), metrics)
        except (OSError, json.JSONDecodeError) as error:
            raise RunError(f"{folder}/args.json: cannot be read ({error}); was this folder written by a PPO script?") from None
    initial = next(iter(by_policy))
    by_policy = {name: rows for name, rows in by_policy.items() if name == initial or name in runs}
    names = list(dict.fromkeys([*by_policy, *runs]))
    free = iter(OTHERS * len(names))
    style = {name: (OWN.get(name) or next(free), DASHES[i % 6], pretty(name)) for i, name in enumerate(names)}
    try:
        os.makedirs(args.output_dir, exist_ok=True)
        save(scatter(by_policy, style), args.output_dir, "scatter")
        save(training(runs, style, args.smooth), args.output_dir, "training")
        save(distributions(by_policy, style), args.output_dir, "distributions")
        save(multiplier(runs, style, args.smooth), args.output_dir, "multiplier")
        save(compensation(by_policy, style), args.output_dir, "compensation")
    except OSError as error:
        raise RunError(f"cannot write to --output-dir {args.output_dir} ({error.strerror})") from None


if __name__ == "__main__":
    run(main, parse_args())
