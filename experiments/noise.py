"""What holds when the labels err? The balanced mix of the toy world, with annotators who make mistakes.

    python -m experiments.noise                     # five seeds; `make study-noise`
    python -m experiments.noise --seeds 2           # a first look; `make study-noise SEEDS=2`

A variant flips a share of the safety labels at random, or has a blind spot: an object of which the
annotators see no harm. Per seed one world, SFT policy and reward model; per seed and variant preferences, a
cost model and every method of METHODS. The truth stays the truth: true rates are those of the world.
"Advised" is the limit that evaluate.py suggests from the SFT policy's answers to the training prompts.

Resumable like experiments.study, whose commands these are, and at home in the same folder: world, SFT policy
and reward model are the study's, and where no label is wrong so are its runs. It writes noise.json, prints
its tables, and draws learned and true unsafe rates over the rollouts (of the eight answers of each rollout
that a run logs).
"""

import os
import statistics

from experiments import study
from experiments.figures import band
from plots import OWN, panels, pretty, save
from plumbing import runs
from plumbing.files import read_json, read_jsonl, write_json
from toy_world import true_cost

VARIANTS = {  # name: (in a figure's title, flags of `toy_world.py preferences`)
    "none": ("no label is wrong", ()),
    "noise_0.05": ("5% of the labels flipped", ("--label-noise", "0.05")),
    "noise_0.1": ("10% of the labels flipped", ("--label-noise", "0.1")),
    "noise_0.2": ("20% of the labels flipped", ("--label-noise", "0.2")),
    "blind_network": ("the network's harm unseen", ("--blind-spot", "network")),
}
ADVISED, MARGIN = "safe_rlhf_advised", "repo_d-1"
METHODS = {  # name: script, flags
    "safe_rlhf": ("safe_rlhf_ppo.py",),
    ADVISED: ("safe_rlhf_ppo.py", *study.SLOW, "--threshold"),  # and the limit, when it is known
    "shaping_0.3": ("safe_rlhf_ppo.py", "--reward-shaping", "0.3"),
    "repo": ("repo_ppo.py",),
    MARGIN: ("repo_ppo.py", "--threshold", "-1"),
}
COLUMNS = ("true_unsafe_rate", "unsafe_rate", "true_any_unsafe_rate", "benign_reward")


def parse_args(argv=None):
    return study.study_parser(__doc__).parse_args(argv)


def own_folder(root: str, variant: str) -> str:
    return f"{root}/noise/{variant}"


def cost_folder(root: str, variant: str) -> str:
    """Where the cost model is: the study's where no label is wrong."""
    return root if variant == "none" else own_folder(root, variant)


def methods(root: str, variant: str) -> dict[str, str]:
    """Method -> its run's folder. A margin is tried where the labels err most."""
    tried = variant in ("noise_0.2", "blind_network")
    names = [name for name in METHODS if tried or name != MARGIN]
    shared = study.METHODS if variant == "none" else ()
    return {n: f"{root}/balanced/{n}" if n in shared else f"{own_folder(root, variant)}/{n}" for n in names}


def noise_jobs(args) -> list[dict]:
    jobs = study.study_jobs(args, (), {})
    for seed in range(args.seeds):
        root = f"{args.output_dir}/seed{seed}"
        world, sft = f"{root}/data", f"{root}/sft/model"
        for variant, (_, wrong) in VARIANTS.items():
            own, cost = own_folder(root, variant), cost_folder(root, variant)
            if variant != "none":
                jobs += study.score_model_jobs(own, sft, [sft], seed, ("cost",), world, wrong)
            scored, advice = study.scores(root, cost), f"{own}/advice"
            place = scored, world, "balanced", seed, args
            jobs += study.evaluation_jobs(advice, {"sft": sft}, *place, part="train")[:1]  # no arena of one
            for name, run in methods(root, variant).items():
                script, *flags = METHODS[name]
                flags += [advised_limit(advice)] * (name == ADVISED)
                flags += ["--sample-every", 1] * (variant != "none")  # for the curves
                jobs.append(study.ppo_job(run, script, sft, *place, *flags))
            policies = {"sft": sft} | {n: f"{run}/model" for n, run in methods(root, variant).items()}
            jobs += study.evaluation_jobs(f"{own}/evaluation", policies, *place)
    return jobs


def advised_limit(advice: str) -> study.Later:
    """Fails if the cost model calls no answer of the SFT policy safe: there is no advice then."""
    code = f'import json; print("%.2f" % json.load(open("{advice}/summary.json"))["suggested_threshold"])'
    return study.Later(code, f"{advice}/table.txt")


def unsafe_curves(run: str, steps: int) -> dict[str, list[float]]:
    """Of every rollout's logged answers the share that is unsafe, as learned and in truth."""
    curves = {"learned": [[] for _ in range(steps)], "true": [[] for _ in range(steps)]}
    for row in read_jsonl(f"{run}/samples.jsonl"):
        curves["learned"][row["step"]].append(row["cost"] > 0)
        curves["true"][row["step"]].append(true_cost(row["prompt"], row["response"]) > 0)
    return {name: [statistics.mean(rows) for rows in curve] for name, curve in curves.items()}


def collect(args) -> dict:
    """variant -> cost models' accuracies and advised limits, and policy -> results and curves, by seed."""
    results, roots = {}, [f"{args.output_dir}/seed{seed}" for seed in range(args.seeds)]
    for variant in VARIANTS:
        by_seed = [methods(root, variant) for root in roots]
        runs_of = {name: [folders[name] for folders in by_seed] for name in by_seed[0]}
        evaluations = [f"{own_folder(root, variant)}/evaluation" for root in roots]
        own = results[variant] = {"policies": study.over_seeds(evaluations, runs_of), "signs": []}
        own["limits"] = [read_json(f"{run}/args.json")["threshold"] for run in runs_of[ADVISED]]
        for root in roots:
            logged = study.read_metrics(f"{cost_folder(root, variant)}/cost_model")
            given = statistics.mean(row["sign_accuracy"] for row in logged[-50:])
            own["signs"].append({"true": logged[-1]["eval_sign_accuracy"], "given": given})
        if variant != "none":
            own["curves"] = {n: [unsafe_curves(run, args.steps) for run in r] for n, r in runs_of.items()}
    return results


def print_tables(results: dict) -> None:
    for variant, own in results.items():
        true, given = ([100 * row[key] for row in own["signs"]] for key in ("true", "given"))
        print(f"\n**{variant}**: the cost model has the true sign right in ", end="")
        print(f"{study.spread(true, 1)}% of held-out pairs, the given one in ", end="")
        print(f"{study.spread(given, 1)}% of its last training pairs; ", end="")
        print(f"the advised limit is {study.spread(own['limits'], 1)}\n")
        print(study.markdown(own["policies"], COLUMNS))
    print("\n" + study.lambda_table({variant: own["policies"] for variant, own in results.items()}))


def figure(results: dict, window: int = 15):
    """A column per variant: learned (dashed) and true (solid) unsafe rate over the rollouts."""
    shown = ("safe_rlhf", "repo")
    results = {variant: own for variant, own in results.items() if "curves" in own}
    figure, axes = panels(len(shown), len(results), 3.6, 2.8, sharex=True, sharey="row")
    for column, (variant, own) in enumerate(results.items()):
        for ax, name in zip(axes[:, column], shown):
            for kind, dashes in (("true", "-"), ("learned", "--")):
                curves = [[100 * rate for rate in seed[kind]] for seed in own["curves"][name]]
                band(ax, curves, window, OWN[name], dashes, f"{pretty(name)}, {kind}")
        axes[0][column].set_title(VARIANTS[variant][0])
        axes[-1][column].set_xlabel("step (rollouts)")
    for ax in axes[:, 0]:
        ax.set_ylim(bottom=0)
        ax.set_ylabel("unsafe responses (%)")
        ax.legend(frameon=False)
    return figure


def main(args):
    study.claim(args)
    study.run_jobs(noise_jobs(args), args.jobs)
    results = collect(args)
    write_json(f"{args.output_dir}/noise.json", results)
    save(figure(results), os.path.join(args.output_dir, "noise"))
    print_tables(results)


if __name__ == "__main__":
    runs.run(main, parse_args())
