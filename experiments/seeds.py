"""How sure is one of the difference? Safe RLHF and RePO on the balanced mix, over twenty seeds.

    python -m experiments.seeds               # goes on in runs/study: its five seeds are not run again
    python -m experiments.seeds --seeds 5     # what `make study` has

Both algorithms of a seed share its world, SFT policy and score models, so seeds are compared in pairs. The
bootstrap (Efron 1979) draws as many pairs as there are, with replacement, and does so DRAWS times:

    safer        mean unsafe rate of RePO - that of Safe RLHF        < 0
    as helpful   mean benign reward of RePO / that of Safe RLHF      >= 95%

The middle 95% of what the draws give is the interval, the share of the draws in which the claim holds is
how sure one is. Writes seeds.json, prints a table and draws the pairs.
"""

import os
import random
import statistics
import time

import runs
from experiments.study import METHODS, claim, markdown, numbers, run_jobs, study_jobs, study_parser
from files import write_json
from plots import OWN, panels, pretty, save

DRAWS = 10_000
MIX, PAIR = "balanced", ("safe_rlhf", "repo")
COLUMNS = (  # heading, name, scale, digits
    ("truly unsafe, %", "true_unsafe_rate", 100, 1),
    ("prompts with any, %", "true_any_unsafe_rate", 100, 1),
    ("true reward, benign", "benign_reward", 1, 2),
    ("best-safe share, %", "best_safe_share", 100, 1),
)


def parse_args(argv=None):
    parser = study_parser(__doc__, "runs/study")
    parser.set_defaults(seeds=20)
    return parser.parse_args(argv)


def difference(pairs: list[tuple]) -> float:
    """Mean of the second minus mean of the first."""
    return statistics.fmean(second - first for first, second in pairs)


def ratio(pairs: list[tuple]) -> float:
    """Mean of the second by mean of the first."""
    return sum(second for _, second in pairs) / sum(first for first, _ in pairs)


def bootstrap(pairs: list[tuple], statistic, draws: int = DRAWS) -> list[float]:
    """`statistic` of `draws` resamples of the pairs, sorted."""
    rng = random.Random(0)
    return sorted(statistic(rng.choices(pairs, k=len(pairs))) for _ in range(draws))


def interval(drawn: list[float]) -> tuple[float, float]:
    """The middle 95%."""
    return drawn[int(0.025 * len(drawn))], drawn[int(0.975 * len(drawn))]


def compare(results: dict) -> dict:
    """Both claims: the estimate, its interval, and how sure one is."""
    compared = {}
    for name, key, statistic, holds in (
        ("safer", "true_unsafe_rate", difference, lambda value: value < 0),
        ("as_helpful", "benign_reward", ratio, lambda value: value >= 0.95),
    ):
        pairs = [tuple(row[key] for row in rows) for rows in zip(*(results[policy] for policy in PAIR))]
        drawn = bootstrap(pairs, statistic)
        compared[name] = {
            "estimate": statistic(pairs),
            "interval": interval(drawn),
            "sure": statistics.fmean(map(holds, drawn)),
            "seeds": sum(holds(statistic([pair])) for pair in pairs),
        }
    return compared


def figure(results: dict):
    """A line per seed from Safe RLHF to RePO; the thick one joins the means."""
    figure, axes = panels(1, 2, 4.2, 3.6)
    shown = {"true_unsafe_rate": "truly unsafe responses (%)", "benign_reward": "true reward, benign prompts"}
    for ax, (key, label) in zip(axes[0], shown.items()):
        scale = 100 if key.endswith("rate") else 1
        values = [[scale * row[key] for row in results[policy]] for policy in PAIR]
        for pair in zip(*values):
            ax.plot((0, 1), pair, color="0.75", linewidth=1, zorder=1)
        ax.plot((0, 1), [statistics.fmean(v) for v in values], color="black", linewidth=2.5, zorder=2)
        for x, (policy, seeds) in enumerate(zip(PAIR, values)):
            ax.scatter([x] * len(seeds), seeds, color=OWN[policy], s=28, zorder=3, linewidths=0)
        sft = statistics.fmean(scale * row[key] for row in results["sft"])
        ax.axhline(sft, color=OWN["sft"], linestyle="--", linewidth=1.5, label=pretty("sft") + ", mean")
        ax.set_xticks((0, 1), map(pretty, PAIR))
        ax.set_xlim(-0.4, 1.4)
        ax.set_ylabel(label)
    axes[0][0].set_ylim(bottom=0)
    axes[0][0].legend(frameon=False, loc="lower left")
    return figure


def main(args):
    started = time.monotonic()
    claim(args)
    run_jobs(study_jobs(args, (MIX,), {name: METHODS[name] for name in PAIR}), args.jobs)
    seeds = [numbers(f"{args.output_dir}/seed{seed}/{MIX}/evaluation") for seed in range(args.seeds)]
    results = {name: [seed[name] for seed in seeds] for name in ("sft", *PAIR)}
    compared = compare(results)
    write_json(f"{args.output_dir}/seeds.json", {"results": results, "compared": compared})
    save(figure(results), os.path.join(args.output_dir, "seeds"))
    print(f"{(time.monotonic() - started) / 60:.1f} minutes\n")
    print(markdown(results, COLUMNS, by_seed=True))
    for name, row in compared.items():
        low, high = (100 * value for value in row["interval"])
        print(f"\n{name}: {100 * row['estimate']:.1f}% [{low:.1f}, {high:.1f}], sure to ", end="")
        print(f"{100 * row['sure']:.1f}%, true of {row['seeds']} of {args.seeds} seeds")


if __name__ == "__main__":
    runs.run(main, parse_args())
