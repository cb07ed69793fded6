"""What each way to say "safe" buys: the family of experiments/constraints.py on the toy world, by the truth.

    python -m experiments.family               # five seeds; `make constraints`
    python -m experiments.family --seeds 1     # a first look; `make constraints SEEDS=1`

Per seed all members start from the same SFT policy, with the same score models, in three settings: the
balanced mix, the mostly harmful one, and the balanced one with a cost model of which a fifth of the safety
labels were flipped (experiments/noise.py). Three members are runs of the twins: `safe_rlhf` is `expected`,
`repo` is `every_prompt`, and `safe_rlhf_price` is `expected` at the price where RePO's lambda ended. `fixed`
stays at the price at which RePO begins, `fixed_0.3` at a lower guess. `rloo` is repo_rloo.py, which has no
critics, on as many answers; `prompt_mean` the same with the limit on each prompt's mean.

Resumable like experiments.study, at home in the same folder: worlds, score models and the twins' runs are
those of `make study` and `make study-noise`, and are not made twice. Writes family.json, prints a table a
setting, and draws them: safe against helpful, a point a seed; beside it the costs on the three prompt groups.
"""

import os
import statistics

from experiments import noise, study
from plots import OTHERS, OWN, panels, save
from plumbing import runs
from plumbing.files import read_jsonl, write_json
from toy_world import HARM_LEVELS

MEMBER = "experiments.constraints"
MEMBERS = {  # name: script, flags
    "safe_rlhf": study.METHODS["safe_rlhf"],
    "confidence": (f"{MEMBER} confidence",),
    "cvar": (f"{MEMBER} cvar",),
    "dominance": (f"{MEMBER} dominance",),
    "fixed": (f"{MEMBER} fixed",),
    "repo": study.METHODS["repo"],
    study.PRICE: study.METHODS[study.PRICE],
}
FURTHER = {
    "fixed_0.3": (f"{MEMBER} fixed", "--lambda-init", "0.3"),
    "rloo": ("repo_rloo.py",),
    "prompt_mean": (f"{MEMBER} prompt_mean",),
}
FLIPPED = "noise_0.2"
SETTINGS = {  # name: mix, methods
    "balanced": ("balanced", MEMBERS | FURTHER),
    "expected_unsafe": ("expected_unsafe", MEMBERS),
    FLIPPED: ("balanced", MEMBERS),
}
TITLES = {"balanced": "balanced mix", "expected_unsafe": "mostly harmful mix"}
TITLES |= {FLIPPED: f"balanced mix, {noise.VARIANTS[FLIPPED][0]}"}
EVALUATION = "evaluation_family"
COLUMNS = "true_unsafe_rate true_any_unsafe_rate refused_benign refused_borderline refused_harmful "
COLUMNS += "benign_reward best_safe_share first_lambda final_lambda kl seconds"
STYLE = {  # name: colour, marker, label
    "sft": (OWN["sft"], "X", "SFT (initial)"),
    "safe_rlhf": (OWN["safe_rlhf"], "o", "expected (Safe RLHF)"),
    "confidence": (OTHERS[0], "v", "confidence (HC-RLHF)"),
    "cvar": (OTHERS[1], "^", "CVaR"),
    "dominance": (OTHERS[3], "<", "dominance (RAD)"),
    "fixed": ("black", "P", "fixed price 1 (CS-RLHF)"),
    "fixed_0.3": ("#999933", "p", "fixed price 0.3"),
    "repo": (OWN["repo"], "D", "every prompt (RePO)"),
    study.PRICE: (OWN[study.PRICE], "s", "expected, RePO's price"),
    "rloo": ("#332288", "*", "RePO without critics"),
    "prompt_mean": ("#44AA99", "h", "the same, prompts' means"),
}
SHARES = (5, 25, 50, 75, 95)  # percentiles of a box


def parse_args(argv=None):
    return study.study_parser(__doc__).parse_args(argv)


def folder_of(root: str, setting: str) -> str:
    """Where a setting's runs of a seed are: where the other studies have them."""
    return noise.own_folder(root, setting) if setting == FLIPPED else f"{root}/{setting}"


def family_jobs(args) -> list[dict]:
    jobs = study.study_jobs(args, (), {})
    for seed in range(args.seeds):
        root = f"{args.output_dir}/seed{seed}"
        world, sft = f"{root}/data", f"{root}/sft/model"
        for setting, (mix, methods) in SETTINGS.items():
            folder, cost, more = folder_of(root, setting), root, []
            if setting == FLIPPED:
                wrong = noise.VARIANTS[FLIPPED][1]
                jobs += study.score_model_jobs(folder, sft, [sft], seed, ("cost",), world, wrong)
                cost, more = folder, ["--sample-every", 1]  # as experiments.noise
            place = study.scores(root, cost), world, mix, seed, args
            jobs += study.method_jobs(folder, methods, EVALUATION, sft, *place, more=more)
    return jobs


def seconds(run: str) -> float:
    """Of a rollout in the median: sampling, scoring, update."""
    rows = study.read_metrics(run)
    return statistics.median(sum(v for k, v in row.items() if k.startswith("seconds_")) for row in rows)


def costs_of(evaluations: list[str]) -> dict[str, list[dict]]:
    """Policy -> of each prompt group the percentiles SHARES of the learned costs, over all seeds, and the
    share that is truly unsafe."""
    rows = [row for path in evaluations for row in read_jsonl(f"{path}/responses.jsonl")]
    answers: dict = {row["policy"]: [[] for _ in HARM_LEVELS] for row in rows}
    for row in rows:
        answers[row["policy"]][row["harm_level"]].append(row)
    return {name: list(map(spread_of, groups)) for name, groups in answers.items()}


def spread_of(rows: list[dict]) -> dict:
    cuts = statistics.quantiles([row["cost"] for row in rows], n=100, method="inclusive")
    unsafe = statistics.fmean(row["true_cost"] > 0 for row in rows)
    return {"costs": [cuts[share - 1] for share in SHARES], "unsafe": unsafe}


def collect(args) -> dict:
    """setting -> policy -> rows over the seeds, and its costs on the prompt groups."""
    collected, roots = {}, [f"{args.output_dir}/seed{seed}" for seed in range(args.seeds)]
    for setting, (_, methods) in SETTINGS.items():
        folders = [folder_of(root, setting) for root in roots]
        evaluations = [f"{folder}/{EVALUATION}" for folder in folders]
        runs_of = {name: [f"{folder}/{name}" for folder in folders] for name in methods}
        results = study.over_seeds(evaluations, runs_of)
        for name, own in runs_of.items():
            results[name] = [row | {"seconds": seconds(run)} for row, run in zip(results[name], own)]
        collected[setting] = {"results": results, "costs": costs_of(evaluations)}
    return collected


def print_tables(collected: dict) -> None:
    for setting, own in collected.items():
        print(f"\n**{TITLES[setting]}**\n\n{study.markdown(own['results'], COLUMNS.split())}")


def figure(collected: dict):
    """A row per setting. Left: the upper right is best, and who refuses stands low. Right: a bar holds the
    middle half of the learned costs, its line the middle 90%; beside it the share that is truly unsafe."""
    figure, axes = panels(len(collected), 1 + len(HARM_LEVELS), 3.25, 3.6)
    for (left, *boxes), (setting, own) in zip(axes, collected.items()):
        for name, rows in own["results"].items():
            colour, marker, _ = STYLE[name]
            x = [100 - 100 * row["true_unsafe_rate"] for row in rows]
            y = [100 * row["best_safe_share"] for row in rows]
            left.scatter(x, y, color=colour, marker=marker, s=36, alpha=0.7, linewidths=0)
        left.set_title(TITLES[setting].replace(", ", ",\n"))
        left.set_ylabel("best-safe share (%)")
        names = [name for name in reversed(STYLE) if name in own["costs"]]
        for group, (ax, level) in enumerate(zip(boxes, HARM_LEVELS)):
            if group:
                ax.sharex(boxes[0])
            for place, name in enumerate(names):
                colour, spread = STYLE[name][0], own["costs"][name][group]
                low, first, middle, third, high = spread["costs"]
                ax.plot((low, high), (place, place), color=colour, linewidth=1.2)
                ax.barh(place, third - first, 0.6, left=first, color=colour, alpha=0.6)
                ax.plot((middle, middle), (place - 0.3, place + 0.3), color="black", linewidth=1.5)
                where = {"transform": ax.get_yaxis_transform(), "va": "center", "fontsize": 8}
                ax.text(1.02, place, f"{spread['unsafe']:.0%}", **where)
            ax.axvline(0, color="black", linewidth=1)
            ax.set_yticks(range(len(names)), [""] * len(names))
            ax.set_title(f"{level} prompts")
        boxes[0].set_yticklabels([STYLE[name][2] for name in names], fontsize=8)
        boxes[0].tick_params("y", length=0, pad=14)
        for place, name in enumerate(names):  # the left panel's key
            where = {"transform": boxes[0].get_yaxis_transform(), "clip_on": False, "linewidths": 0}
            boxes[0].scatter(-0.045, place, color=STYLE[name][0], marker=STYLE[name][1], s=36, **where)
    for group, ax in enumerate(axes[-1]):
        ax.set_xlabel("learned cost; right: truly unsafe" if group else "truly safe responses (%)")
    return figure


def main(args):
    study.claim(args)
    study.run_jobs(family_jobs(args), args.jobs)
    write_json(f"{args.output_dir}/family.json", collected := collect(args))
    save(figure(collected), os.path.join(args.output_dir, "family"))
    print_tables(collected)


if __name__ == "__main__":
    runs.run(main, parse_args())
