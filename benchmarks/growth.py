"""How time and memory of one PPO step of repo_ppo.py grow with the batch, the response and the model's width.

    python benchmarks/growth.py                                    # and draws figures/growth.png
    python benchmarks/growth.py --rounds 2 --figure runs/growth.png

Along an axis everything else stays as it is in BASE. All sizes of an axis take steps in turn, so that a slow
moment of the machine touches them all; an exponent is the slope of log time over log size in such a round,
and the table tells its median and range over the rounds. The first step of each is not counted.
Memory is what the steps add to a process with six models loaded: gradients, Adam's moments and activations.
"""

import math
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from steps import SHAPES, build, count, ours, parser, report, spread, versions, write_json

BASE = replace(SHAPES["4x256"], batch=16, minibatch=16)
AXES = {"batch": (8, 16, 32, 64), "response": (48, 96, 192, 384), "width": (128, 256, 512)}

LABELS = {"seconds": "time of a step (s)", "gib": "memory that steps add (GiB)"}
UNITS = {"batch": "samples", "response": "tokens of a response", "width": "width of the models"}


def sized(axis: str, size: int):
    """BASE with another size along an axis; a batch is one minibatch and one micro-batch."""
    return replace(BASE, **{axis: size} | ({"minibatch": size} if axis == "batch" else {}))


def slope(sizes, values) -> float:
    """The exponent e of values ~ sizes^e, by least squares in the logarithms."""
    x, y = ([math.log(v) for v in numbers] for numbers in (sizes, values))
    return statistics.linear_regression(x, y).slope


def grow(axis: str, sizes, rounds: int) -> dict:
    """Seconds and GiB of a step at every size, and both exponents."""
    with tempfile.TemporaryDirectory() as base:
        sides = []
        for size in sizes:
            folder = Path(base, str(size))
            build(folder, sized(axis, size))
            sides.append(ours(folder, sized(axis, size), "fp32"))
        before = [side.read()["peak_gib"] for side in sides]
        taken = [[side.step() for side in sides] for _ in range(rounds + 1)][1:]
        for side in sides:
            side.close()
    times, cpu = ([[row[clock] for row in step] for step in taken] for clock in ("seconds", "cpu"))
    gib = [last["peak_gib"] - first for first, last in zip(before, taken[-1])]
    return {
        "axis": axis,
        "sizes": list(sizes),
        "seconds": [statistics.median(column) for column in zip(*times)],
        "gib": gib,
        "time exponent": spread([slope(sizes, step) for step in times]),
        "time exponent (processors)": spread([slope(sizes, step) for step in cpu]),
        "memory exponent": slope(sizes, gib),
    }


def draw(rows: list[dict], path: str) -> None:
    from plots import OWN, panels
    from plumbing.files import writing

    figure, axes = panels(2, len(rows), 4, 3.2)
    for column, row in enumerate(rows):
        exponents = row["time exponent"]["median"], row["memory exponent"]
        for ax, (name, label), exponent in zip(axes[:, column], LABELS.items(), exponents):
            sizes, values = row["sizes"], row[name]
            x, y = ([math.log(v) for v in numbers] for numbers in (sizes, values))
            middle = math.exp(statistics.mean(y) - exponent * statistics.mean(x))
            fitted = [middle * size**exponent for size in sizes]
            ax.plot(sizes, fitted, color=OWN["repo"], label=f"size$^{{{exponent:.2f}}}$")
            ax.plot(sizes, values, "o", color="black", label="measured")
            ax.set_xscale("log", base=2)
            ax.set_yscale("log", base=2)
            ax.set_xticks(sizes, sizes)
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.set_ylabel(label)
            ax.set_xlabel(UNITS[row["axis"]])
            ax.legend(frameon=False)
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def main(args) -> None:
    result = versions() | {"base": str(BASE), "rounds": args.rounds, "rows": []}
    for axis in args.axes:
        row = grow(axis, AXES[axis], args.rounds)
        result["rows"].append(row)
        report(row)
    if args.output:
        write_json(args.output, result)
    draw(result["rows"], args.figure)


if __name__ == "__main__":
    flags = parser(__doc__)
    flag = flags.add_argument
    flag("--axes", nargs="+", choices=AXES, default=list(AXES), help="what grows")
    flag("--rounds", type=count, default=5, help="measured steps at each size")
    flag("--output", help="write everything as JSON")
    flag("--figure", default="figures/growth.png", help="the picture")
    main(flags.parse_args())
