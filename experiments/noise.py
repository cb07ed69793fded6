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
from typing import NamedTuple

from experiments import study
from experiments.figures import band
from plots import OWN, panels, pretty, save
from plumbing import runs
from plumbing.files import InputError, read_json, read_jsonl, write_json
from toy_world import true_cost

VARIANTS = {  # name: flags of `toy_world.py preferences`
    "none": (),
    "noise_0.05": ("--label-noise", "0.05"),
    "noise_0.1": ("--label-noise", "0.1"),
    "noise_0.2": ("--label-noise", "0.2"),
    "blind_network": ("--blind-spot", "network"),
}
ADVISED, MARGIN = "safe_rlhf_advised", "repo_d-1"
METHODS = {  # name: script, flags
    "safe_rlhf": ("safe_rlhf_ppo.py",),
    ADVISED: ("safe_rlhf_ppo.py", "--threshold"),  # and the limit, which is known when the models are there
    "shaping_0.3": ("safe_rlhf_ppo.py", "--reward-shaping", "0.3"),
    "repo": ("repo_ppo.py",),
    MARGIN: ("repo_ppo.py", "--threshold", "-1"),
}
COLUMNS = ("true_unsafe_rate", "unsafe_rate", "true_any_unsafe_rate", "benign_reward")


def parse_args(argv=None):
    return study.study_parser(__doc__, "runs/study").parse_args(argv)


def methods(variant: str) -> dict:
    """A margin is tried where the labels err most."""
    tried = variant in ("noise_0.2", "blind_network")
    return {name: command for name, command in METHODS.items() if tried or name != MARGIN}


class Place(NamedTuple):
    """Where the files of a seed and a variant are."""

    seed: int
    variant: str
    root: str  # the study's folder of this seed: world, SFT policy, reward model
    own: str  # the variant's folder in it
    cost: str  # of the cost model: `own`, or `root` where no label is wrong

    def run(self, name: str) -> str:
        """The folder of a method's run."""
        shared = self.variant == "none" and name in study.METHODS
        return f"{self.root}/balanced/{name}" if shared else f"{self.own}/{name}"


def places(args) -> list[Place]:
    found = []
    for seed in range(args.seeds):
        for variant in VARIANTS:
            root = f"{args.output_dir}/seed{seed}"
            own = f"{root}/noise/{variant}"
            found.append(Place(seed, variant, root, own, root if variant == "none" else own))
    return found


def model_jobs(args) -> list[dict]:
    """All before PPO: worlds, SFT policies, reward models; per variant its cost model and the advice."""
    jobs = []
    for seed, variant, root, own, cost in places(args):
        world, sft = f"{root}/data", f"{root}/sft/model"
        if variant == "none":
            jobs += study.world_jobs(root, seed) + study.score_model_jobs(root, sft, [sft], seed)
        else:
            data, needs = f"{own}/data", [f"{world}/preferences_test_cost.jsonl"]
            sample = ["preferences", "--policy", sft, "--output-dir", data, "--seed", seed]
            made = f"{data}/preferences_test_cost.jsonl"  # the last file written
            jobs.append(study.job(made, needs, "toy_world.py", *sample, *VARIANTS[variant]))
            jobs.append(study.score_model_job(f"{own}/cost_model", "cost", sft, data, world, seed))
        scored, advice = study.scores(root, cost), f"{own}/advice"
        flags = ["--policies", f"sft={sft}", *scored, "--prompts", f"{world}/prompts_balanced_train.jsonl"]
        needs = [f"{path}/config.json" for path in scored[1::2]]
        flags += ["--output-dir", advice, "--seed", seed]
        jobs.append(study.job(f"{advice}/table.txt", needs, "evaluate.py", *flags))
    return jobs


def policy_jobs(args, limits: dict[str, float]) -> list[dict]:
    """PPO and evaluations; `limits`: a variant's own folder -> the advised limit."""
    jobs = []
    for place in places(args):
        seed, own, world, sft = place.seed, place.own, f"{place.root}/data", f"{place.root}/sft/model"
        scored, policies = study.scores(place.root, place.cost), {"sft": sft}
        for name, (script, *flags) in methods(place.variant).items():
            flags += [f"{limits[own]:.2f}"] * (name == ADVISED)
            flags += ["--sample-every", 1] * (place.variant != "none")  # for the curves
            output = place.run(name)
            jobs.append(study.ppo_job(output, script, sft, scored, world, "balanced", seed, args, *flags))
            policies[name] = f"{output}/model"
        jobs += study.evaluation_jobs(f"{own}/evaluation", policies, scored, world, "balanced", seed, args)
    return jobs


def advised_limits(args) -> dict[str, float]:
    limits = {}
    for place in places(args):
        limits[place.own] = read_json(f"{place.own}/advice/summary.json")["suggested_threshold"]
        if limits[place.own] is None:
            raise InputError(f"{place.own}: its cost model calls no answer of the SFT policy safe")
    return limits


def unsafe_curves(run: str, steps: int) -> dict[str, list[float]]:
    """Of every rollout's logged answers the share that is unsafe, as learned and in truth."""
    curves = {"learned": [[] for _ in range(steps)], "true": [[] for _ in range(steps)]}
    for row in read_jsonl(f"{run}/samples.jsonl"):
        curves["learned"][row["step"]].append(row["cost"] > 0)
        curves["true"][row["step"]].append(true_cost(row["prompt"], row["response"]) > 0)
    return {name: [statistics.mean(rows) for rows in curve] for name, curve in curves.items()}


def collect(args) -> dict:
    """variant -> cost models' accuracies and advised limits, and policy -> results and curves, by seed."""
    results: dict = {}
    for variant in VARIANTS:
        seeds = [place for place in places(args) if place.variant == variant]
        policies = study.over_seeds([f"{place.own}/evaluation" for place in seeds])
        own = results[variant] = {"signs": [], "limits": [], "policies": policies, "curves": {}}
        for name in methods(variant):
            if name != ADVISED:
                study.check_same_flags([place.run(name) for place in seeds])
            if variant != "none":
                own["curves"][name] = [unsafe_curves(place.run(name), args.steps) for place in seeds]
        for place in seeds:
            logged = study.read_metrics(f"{place.cost}/cost_model")
            given = statistics.mean(row["sign_accuracy"] for row in logged[-50:])
            own["signs"].append({"true": logged[-1]["eval_sign_accuracy"], "given": given})
            own["limits"].append(read_json(f"{place.run(ADVISED)}/args.json")["threshold"])
    return results


def print_tables(results: dict) -> None:
    for variant, own in results.items():
        true, given = ([100 * row[key] for row in own["signs"]] for key in ("true", "given"))
        print(f"\n**{variant}**: the cost model has the true sign right in ", end="")
        print(f"{study.spread(true, 1)}% of held-out pairs, the given one in ", end="")
        print(f"{study.spread(given, 1)}% of its last training pairs; ", end="")
        print(f"the advised limit is {study.spread(own['limits'], 1)}\n")
        print(study.markdown(own["policies"], COLUMNS, by_seed=True))


def figure(results: dict, window: int = 15):
    """A column per variant: learned (dashed) and true (solid) unsafe rate over the rollouts."""
    shown = ("safe_rlhf", "repo")
    results = {variant: own for variant, own in results.items() if own["curves"]}
    figure, axes = panels(len(shown), len(results), 3.6, 2.8, sharex=True, sharey="row")
    for column, (variant, own) in enumerate(results.items()):
        for ax, name in zip(axes[:, column], shown):
            for kind, dashes in (("true", "-"), ("learned", "--")):
                curves = [[100 * rate for rate in seed[kind]] for seed in own["curves"][name]]
                band(ax, curves, window, OWN[name], dashes, f"{pretty(name)}, {kind}")
        axes[0][column].set_title(variant.replace("_", " "))
        axes[-1][column].set_xlabel("step (rollouts)")
    for ax in axes[:, 0]:
        ax.set_ylim(bottom=0)
        ax.set_ylabel("unsafe responses (%)")
        ax.legend(frameon=False)
    return figure


def main(args):
    study.claim(args, METHODS, "noise_settings")
    study.run_jobs(model_jobs(args), args.jobs)
    study.run_jobs(policy_jobs(args, advised_limits(args)), args.jobs)
    results = collect(args)
    write_json(f"{args.output_dir}/noise.json", results)
    save(figure(results), os.path.join(args.output_dir, "noise"))
    print_tables(results)


if __name__ == "__main__":
    runs.run(main, parse_args())
