"""Stage 5: the papers' figures, from nothing but the files that the runs wrote.

    scatter        cost and reward of every response, before and after               (RePO, figure 4)
    training       average cost and number of unsafe responses per rollout           (RePO, figure 3)
    distributions  cost distributions before and after                   (RePO, figure 3, first row)
    multiplier     lambda and the violation that drives it
    compensation   cost by prompt group: who pays for whom                           (RePO, figure 1)
    kl             reward against the KL divergence from the start: what the reward is bought with

    python plots.py                                                          # the demo's runs
    python plots.py --evaluation runs/eval --runs "Safe RLHF=runs/a" "RePO=runs/b" --output-dir figures
    python plots.py --html      # and explore.html: every answer, and the curves, to look at in a browser

Every figure is written as PNG and PDF. A dotted line is a limit, a dashed one an average, a solid one C = 0.
Colours are Okabe and Ito's, told apart also without colour vision; curves differ in their dashes as well.
Prompt groups are the harm levels of the toy world; elsewhere thirds by the first policy's mean cost.
"""

import os

import matplotlib.pyplot as plt

from plumbing import cli, runs
from plumbing.cli import count, named
from plumbing.explore import page
from plumbing.files import InputError, read_json, read_jsonl, schema_error, writing
from toy_world import HARM_LEVELS

plt.switch_backend("Agg")
NAMES = {"sft": "SFT (initial)", "safe_rlhf": "Safe RLHF", "safe_rlhf_price": "Safe RLHF at RePO's price"}
NAMES |= {"repo": "RePO", "ppo": "PPO, reward only"}
# the same in every figure
OWN = {"sft": "#7F7F7F", "safe_rlhf": "#D55E00", "safe_rlhf_price": "#CC79A7", "repo": "#0072B2"}
OWN_DASHES = {"sft": "-", "safe_rlhf": "--", "safe_rlhf_price": "-.", "repo": "-"}
OTHERS = ["#E69F00", "#009E73", "#CC79A7", "#56B4E9"]
DASHES = [":", "--", "-.", "-"]
DRIVES = {"safe_rlhf": "J$_C$ - d", "repo": "E[{C - d}$^+$]"}  # by "algorithm" of args.json
DEMO = {
    "evaluation": "runs/demo/evaluation",
    "runs": [(name, f"runs/demo/{name}") for name in ("safe_rlhf", "repo")],
    "output_dir": "runs/demo/figures",
}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    flag = parser.add_argument
    flag("--evaluation", help="output folder of evaluate.py")
    flag("--runs", nargs="*", type=named, help="NAME=FOLDER of PPO runs, as in the evaluation; or none")
    flag("--smooth", type=count, default=9, help="rollouts in the centred mean of the training curves")
    flag("--html", action="store_true", help="also write explore.html: every answer, in a browser")
    flag("--output-dir", help="folder for the figures")
    return cli.parse(parser, argv, DEMO, own=("evaluation", "runs"))


def centred_mean(values: list[float], window: int) -> list[float]:
    """The mean of the values around every step, half a window on both sides and less at the ends: a mean of
    the last values alone would show every change later than it came."""
    half = window // 2
    around = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in around]


def pretty(name: str) -> str:
    """safe_rlhf_d-4 -> Safe RLHF, d = -4; shaping_0.3 -> shaping, nu = 0.3."""
    if name.startswith("safe_rlhf_d"):
        return f"Safe RLHF, d = {name.removeprefix('safe_rlhf_d')}"
    if name.startswith("shaping_"):
        return f"shaping, $\\nu$ = {name.removeprefix('shaping_')}"
    return NAMES.get(name, name)


def save(figure, path: str) -> None:
    """As PNG and PDF; `path` has no ending."""
    for kind in ("png", "pdf"):
        with writing(f"{path}.{kind}") as temporary:
            figure.savefig(temporary, dpi=150, format=kind)
    plt.close(figure)
    print(f"{path}.png")


def limits(values: list[float]) -> tuple[float, float]:
    """Of an axis that shows all of them, with a margin that is there also where they are one and the same."""
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    return low - margin, high + margin


def around_zero(values: list[float]) -> tuple[float, float]:
    """The same, with 0 among them and room on both of its sides: the empty one says something, too."""
    low, high = limits([0.0, *values])
    return min(low, -0.2 * high), max(high, -0.2 * low)


def from_zero(ax, least: float = 0.0) -> None:
    """A y-axis from 0 to above its curves, and to `least`; a curve along 0 is not cut in half."""
    top = 1.05 * max(least, ax.dataLim.y1) or 1.0
    ax.set_ylim(-0.02 * top, top)


def panels(rows: int, columns: int, width: float, height: float, **shared):
    """A figure and its axes [row][column]; a panel is `width` by `height` inches, and narrower beside many: a
    page shows no figure wider than itself, and letters would shrink with it."""
    size = (min(width, 13 / columns) * columns, height * rows)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **shared)


def histogram(ax, costs: list[float], edges: list[float], colour: str) -> None:
    """Shares of `costs` in %, hatched where they are unsafe. An edge is at 0; a cost of 0 is left of it."""
    inside = (edges[0] - edges[1]) / 2
    safe, unsafe = [min(c, inside) for c in costs if c <= 0], [c for c in costs if c > 0]
    for part, hatch in ((safe, None), (unsafe, "////")):
        weights = [100 / len(costs)] * len(part)
        ax.hist(part, edges, weights=weights, color=colour, hatch=hatch, edgecolor="white", linewidth=0.3)
    ax.axvline(0, color="black", linewidth=1.2)


# ------------------------------------------------------------------------------ the figures


def scatter(by_policy: dict, style: dict):
    """A panel per policy; the first policy's cloud stays behind the others in grey."""
    figure, axes = panels(1, len(by_policy), 4.2, 4.2, sharex=True, sharey=True)
    points = {
        name: ([r["cost"] for r in rows], [r["reward"] for r in rows]) for name, rows in by_policy.items()
    }
    first, largest = next(iter(by_policy)), max(map(len, by_policy.values()))
    dots = {"s": min(40, 8 + 400 / largest), "linewidths": 0, "rasterized": True}
    for ax, (name, (costs, rewards)) in zip(axes[0], points.items()):
        if name != first:
            ax.scatter(*points[first], color="0.85", **dots)
        ax.scatter(costs, rewards, color=style[name][0], alpha=0.5, **dots)
        ax.axvline(0, color="black", linewidth=1.2)
        safe = sum(c <= 0 for c in costs) / len(costs)
        ax.set_title(f"{style[name][2]}\n{safe:.1%} safe")
        ax.text(0.02, 0.02, "safe", transform=ax.transAxes, ha="left", va="bottom")
        ax.text(0.98, 0.02, "unsafe", transform=ax.transAxes, ha="right", va="bottom")
        ax.set_xlabel("cost C(x, y), learned (score)")
        ax.set_xlim(around_zero([c for costs, _ in points.values() for c in costs]))
        ax.set_ylim(limits([r for _, rewards in points.values() for r in rewards]))
    axes[0][0].set_ylabel("reward R(x, y), learned (score)")
    return figure


def curve(ax, steps: list[int], values: list[float], smooth: int, style: tuple, label: str) -> None:
    """What was logged, thin, and its centred mean. One rollout alone is a point."""
    colour, dashes, _ = style
    marker = "o" if len(steps) == 1 else None
    ax.plot(steps, values, color=colour, alpha=0.45, linewidth=0.8, marker=marker)
    ax.plot(steps, centred_mean(values, smooth), color=colour, linestyle=dashes, linewidth=2, label=label)


def training(logs: dict, style: dict, smooth: int):
    figure, ((above,), (below,)) = panels(2, 1, 7, 3, sharex=True)
    sizes = {args["batch_size"] for args, _ in logs.values()}
    size = sizes.pop() if len(sizes) == 1 else 100
    for name, (_, metrics) in logs.items():
        steps = [m["step"] for m in metrics]
        curve(above, steps, [m["cost"] for m in metrics], smooth, style[name], style[name][2])
        curve(below, steps, [m["unsafe_rate"] * size for m in metrics], smooth, style[name], style[name][2])
    for limit in sorted({args["threshold"] for args, _ in logs.values()}):
        above.axhline(limit, color="black", linestyle=":", linewidth=1.5, label=f"limit d = {limit:g}")
    above.set_ylabel("mean cost of a rollout (score)")
    below.set_ylabel(f"unsafe responses of {size} (count)")
    from_zero(below, least=1)
    below.set_xlabel("step (rollouts)")
    above.set_title("Average cost, and responses with C > 0, during training")
    above.legend(frameon=False)
    below.legend(frameon=False)
    return figure


def distributions(by_policy: dict, style: dict):
    """A row per policy below each other, so that the part right of C = 0 can be compared."""
    figure, axes = panels(len(by_policy), 1, 7, 2.1, sharex=True, sharey=True)
    low, high = around_zero([r["cost"] for rows in by_policy.values() for r in rows])
    width = (high - low) / 60
    start = -width * (int(-low / width) + 1)  # a bin edge at 0, so that no bar is half safe
    edges = [start + i * width for i in range(62)]
    for ax, (name, rows) in zip(axes[:, 0], by_policy.items()):
        costs = [r["cost"] for r in rows]
        safe, average = sum(c <= 0 for c in costs) / len(costs), sum(costs) / len(costs)
        histogram(ax, costs, edges, style[name][0])
        ax.axvline(average, color="black", linestyle="--", linewidth=1.5)
        ax.set_title(f"{style[name][2]}: safety rate {safe:.1%}, mean cost {average:+.3g} (dashed)")
        ax.set_ylabel("responses (%)")
    axes[-1, 0].set_xlabel("cost C(x, y), learned (score); hatched: unsafe")
    return figure


def multiplier(logs: dict, style: dict, smooth: int):
    """Where lambda begins and ends stands in the legend. What drives it is below, for those that move."""
    values = {name: [m["lambda"] for m in metrics] for name, (_, metrics) in logs.items()}
    still = [name for name, course in values.items() if min(course) == max(course) and len(course) > 1]
    figure, axes = panels(2 if len(still) < len(logs) else 1, 1, 7, 3, sharex=True)
    above, below = axes[0][0], axes[-1][0]
    for name, (args, metrics) in logs.items():
        label, steps, course = style[name][2], [m["step"] for m in metrics], values[name]
        if name not in still:
            drive = DRIVES.get(args.get("algorithm"), "violation")
            violation = [m["violation"] for m in metrics]
            curve(below, steps, violation, smooth, style[name], f"{label}: {drive}")
            below.set_ylabel("violation (score)")
        ends = f"stays at {course[0]:.3g}" if name in still else f"{course[0]:.3g} to {course[-1]:.3g}"
        curve(above, steps, course, 1, style[name], f"{label}: {ends}")
    above.set_ylabel("multiplier $\\lambda$")
    from_zero(above)
    above.set_title("$\\lambda$ rises while its violation is above 0, stands still at 0 and falls below it")
    above.legend(frameon=False)
    if below is not above:
        below.axhline(0, color="black", linestyle=":", linewidth=1.5)
        below.legend(frameon=False)
    below.set_xlabel("step (rollouts)")
    return figure


def kl(logs: dict, style: dict, smooth: int):
    """A path per run, from its first rollout (circle) to its last (square)."""
    figure, ((ax,),) = panels(1, 1, 7, 4.2)
    for name, (_, metrics) in logs.items():
        colour, dashes, label = style[name]
        x, y = (centred_mean([m[key] for m in metrics], smooth) for key in ("kl", "reward"))
        ax.plot(x, y, color=colour, linestyle=dashes, linewidth=2, label=label)
        for end, marker in ((0, "o"), (-1, "s")):
            ax.plot(x[end], y[end], color=colour, marker=marker, markersize=8)
    ax.set_xlabel("KL from the initial policy (nats per response)")
    ax.set_ylabel("reward R(x, y), learned (score)")
    ax.set_title("What the reward is bought with, from the first rollout (circle) to the last")
    ax.legend(frameon=False)
    return figure


def group_of(rows: list[dict]) -> tuple[dict, tuple]:
    """Prompt -> group, and the groups' names: harm levels, or thirds by the mean cost in `rows`."""
    if "harm_level" in rows[0]:
        return {r["prompt"]: r["harm_level"] for r in rows}, HARM_LEVELS
    costs: dict = {}
    for r in rows:
        costs.setdefault(r["prompt"], []).append(r["cost"])
    ordered = sorted(costs, key=lambda prompt: sum(costs[prompt]) / len(costs[prompt]))
    thirds = {prompt: 3 * i // len(ordered) for i, prompt in enumerate(ordered)}
    return thirds, ("safest third", "middle third", "riskiest third")


def compensation(by_policy: dict, style: dict):
    """Costs by prompt group and policy. The average sits at the dashed line: in Safe RLHF the groups
    on its two sides pay for each other."""
    groups, labels = group_of(next(iter(by_policy.values())))
    figure, axes = panels(1, len(by_policy), 4.2, 4.4, sharey=True)
    look = {"widths": 0.6, "whis": (5, 95), "patch_artist": True, "showfliers": False}
    shown, seen = [], sorted(set(groups.values()))  # what the axis must hold; groups that have prompts
    for ax, (name, rows) in zip(axes[0], by_policy.items()):
        costs = [[r["cost"] for r in rows if groups[r["prompt"]] == g] for g in seen]
        boxes = ax.boxplot(
            costs, tick_labels=[labels[g] for g in seen], medianprops={"color": "black"}, **look
        )
        for box in boxes["boxes"]:
            box.set(facecolor=style[name][0], alpha=0.6)
        average = sum(r["cost"] for r in rows) / len(rows)
        ax.axhline(0, color="black", linewidth=1.2)
        ax.axhline(average, color=style[name][0], linestyle="--", linewidth=2.5)
        shown += [average, *(y for whisker in boxes["whiskers"] for y in whisker.get_ydata())]
        for place, values in enumerate(costs, 1):
            unsafe = sum(c > 0 for c in values) / len(values)
            where = {"transform": ax.get_xaxis_transform(), "ha": "center", "va": "top"}
            ax.text(place, 0.98, f"{unsafe:.0%}", fontsize=11, **where)
        ax.set_title(f"{style[name][2]}\nmean cost {average:+.3g}")
        ax.set_xlabel("prompt group (above: share unsafe)")
    low, high = around_zero(shown)
    axes[0][0].set_ylim(low, high + 0.1 * (high - low))  # room for the shares
    axes[0][0].set_ylabel("cost C(x, y), learned (score)")
    return figure


# ------------------------------------------------------------------------------ what the runs wrote

FLOAT32 = 3.5e38  # what a model computes is below it, and so is what an axis can hold
RESPONSE = {"policy": str, "prompt": str, "response": str, "reward": float, "cost": float}
METRICS = {"step": int} | dict.fromkeys(("reward", "cost", "unsafe_rate", "kl", "lambda", "violation"), float)
ARGS = {"batch_size": int, "threshold": float}


def check_size(where: str, row: dict, fields: dict) -> None:
    for name, kind in fields.items():
        if kind is float and abs(row[name]) > FLOAT32:
            raise InputError(f"{where}: field {name!r} is {row[name]:.3g}, which no model computes")


def read_rows(path: str, fields: dict) -> list[dict]:
    rows = read_jsonl(path, fields)
    for number, row in enumerate(rows, 1):
        check_size(f"{path} row {number}", row, fields)
    return rows


def read_run(path: str) -> tuple[dict, list[dict]]:
    """args.json and metrics.jsonl of a PPO run."""
    args = read_json(os.path.join(path, "args.json"))
    if wrong := schema_error(args, ARGS):
        raise InputError(f"{path}/args.json: {wrong}; was this folder written by a PPO script?")
    check_size(f"{path}/args.json", args, ARGS)
    return args, read_rows(os.path.join(path, "metrics.jsonl"), METRICS)


def main(args):
    cli.require(args.evaluation, "python evaluate.py")
    path = os.path.join(args.evaluation, "responses.jsonl")
    everyone, answers = {}, read_rows(path, RESPONSE)
    initial, levels = answers[0]["policy"], "harm_level" in answers[0]
    for number, row in enumerate(answers, 1):
        everyone.setdefault(row["policy"], []).append(row)
        if levels and row["policy"] == initial:
            if wrong := schema_error(row, {"harm_level": int}):
                raise InputError(f"{path} row {number}: {wrong}; give every row of {initial} one, or none")
            if row["harm_level"] not in range(len(HARM_LEVELS)):
                raise InputError(f"{path} row {number}: harm_level {row['harm_level']} is none of 0, 1 and 2")
    folders = cli.by_name("--runs", args.runs)
    for name in ("safe_rlhf", "repo"):
        cli.require(folders.get(name), f"python {name}_ppo.py")
    logs = {name: read_run(path) for name, path in folders.items()}
    by_policy = {n: rows for n, rows in everyone.items() if n == initial or n in logs or not logs}
    prompts = {name: {row["prompt"] for row in rows} for name, rows in by_policy.items()}
    for name in prompts:
        if prompts[name] != prompts[initial]:
            problem = f"{name} answered other prompts than {initial}"
            raise InputError(f"{path}: {problem}; evaluate both in one run of evaluate.py")
    names = list(dict.fromkeys([*by_policy, *logs, *everyone]))
    # what no policy here has as its own
    free = iter([colour for colour in OTHERS if colour not in map(OWN.get, names)] * len(names))
    dashes = iter(DASHES * len(names))
    style = {
        name: (OWN.get(name) or next(free), OWN_DASHES.get(name) or next(dashes), pretty(name))
        for name in names
    }
    figures = {
        "scatter": scatter(by_policy, style),
        "distributions": distributions(by_policy, style),
        "compensation": compensation(by_policy, style),
    }
    if logs:
        figures["training"] = training(logs, style, args.smooth)
        figures["multiplier"] = multiplier(logs, style, args.smooth)
        figures["kl"] = kl(logs, style, args.smooth)
    for name, figure in figures.items():
        save(figure, os.path.join(args.output_dir, name))
    if args.html:
        path, groups = os.path.join(args.output_dir, "explore.html"), group_of(everyone[initial])
        with writing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.write(page(args.evaluation, everyone, logs, style, groups, args.smooth))
        print(path)


if __name__ == "__main__":
    runs.run(main, parse_args())
