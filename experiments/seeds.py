"""How firm is the difference? Safe RLHF and RePO on the balanced mix, over twenty seeds.

    python -m experiments.seeds               # goes on in runs/study: its five seeds are not trained again
    python -m experiments.seeds --seeds 5     # the pairs of `make study`

Both algorithms of a seed share its world, SFT policy and score models, so seeds are compared in pairs. The
bootstrap (Efron 1979) draws as many pairs as there are, with replacement, and does so DRAWS times:

    safer        mean unsafe rate of RePO - that of Safe RLHF        < 0
    as helpful   mean benign reward of RePO / that of Safe RLHF      >= 0.95

The middle 95% of what the draws give is the interval (too narrow where seeds are few). With it stands the
share of draws, and of seeds, in which the claim holds; once for all seeds, once for those that no
choice of a flag has seen (5 to 19). Writes seeds.json, prints its tables and draws the pairs.
"""

import os
import random
import statistics

from experiments import study
from plots import OWN, panels, pretty, save
from plumbing import runs
from plumbing.files import write_json

DRAWS = 10_000
SEEN = 5  # the default flags were chosen on seeds 0 and 1, in the end knowing the results of 0 to 4
MIX, PAIR = "balanced", study.PAIR
METHODS = {name: study.METHODS[name] for name in PAIR}
COLUMNS = ("true_unsafe_rate", "true_any_unsafe_rate", "benign_reward", "best_safe_share", "final_lambda")


def parse_args(argv=None):
    parser = study.study_parser(__doc__)
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
    """Both claims: the estimate, its interval, and the shares of draws and seeds in which it holds."""
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
            "draws": statistics.fmean(map(holds, drawn)),
            "seeds": statistics.fmean(holds(statistic([pair])) for pair in pairs),
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
    study.claim(args)
    study.run_jobs(study.study_jobs(args, (MIX,), METHODS, "evaluation_pair"), args.jobs)
    folders = [f"{args.output_dir}/seed{seed}/{MIX}" for seed in range(args.seeds)]
    runs_of = {name: [f"{folder}/{name}" for folder in folders] for name in PAIR}
    results = study.over_seeds([f"{folder}/evaluation_pair" for folder in folders], runs_of)
    compared = {"all seeds": compare(results)}
    if args.seeds > SEEN:
        later = {name: rows[SEEN:] for name, rows in results.items()}
        compared[f"seeds {SEEN} to {args.seeds - 1}"] = compare(later)
    write_json(f"{args.output_dir}/seeds.json", {"results": results, "compared": compared})
    save(figure(results), os.path.join(args.output_dir, "seeds"))
    print(f"\n{study.markdown(results, COLUMNS)}\n\n{study.lambda_table({MIX: results})}\n")
    lines = [["", "estimate", "95% interval", "draws, %", "seeds, %"]]
    for which, claims in compared.items():
        for name, row in claims.items():
            low, high = (f"{value:.3f}" for value in row["interval"])
            shares = f"{100 * row['draws']:.1f}", f"{100 * row['seeds']:.0f}"
            lines.append([f"{which}, {name}", f"{row['estimate']:.3f}", f"{low} to {high}", *shares])
    print(study.table(*lines))


if __name__ == "__main__":
    runs.run(main, parse_args())
