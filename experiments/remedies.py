"""What helps against a policy that fools its cost model? A second cost model, and a longer run.

    python -m experiments.remedies      # after `make study` and `make study-noise`, in their folder

Three cases of those studies, RePO's runs there beside new ones: the mostly benign mix, where a policy found
answers whose cost is misjudged; the balanced mix with 20% of the labels flipped; and that with a blind spot.
The second cost model is trained on the same pairs with another seed; the larger of both costs counts.
"""

import argparse

from experiments import noise, study
from plumbing import runs
from plumbing.files import write_json

NEW = {  # name: script, cost models, times as many rollouts as --steps
    "repo_two_costs": ("repo_ppo.py", 2, 1),
    "repo_long": ("repo_ppo.py", 1, 2),
    "repo_two_costs_long": ("repo_ppo.py", 2, 2),
    "safe_rlhf_long": ("safe_rlhf_ppo.py", 1, 2),
}
CASES = {  # name: mix, runs of the other studies, new ones
    "expected_safe": ("expected_safe", ("safe_rlhf", "repo"), tuple(NEW)),
    "noise_0.2": ("balanced", ("repo",), ("repo_two_costs",)),
    "blind_network": ("balanced", ("repo",), ("repo_two_costs",)),
}


def parse_args(argv=None):
    return study.study_parser(__doc__, "runs/study").parse_args(argv)


def places(args, case: str) -> list[tuple[int, str, str, str]]:
    """(seed, the seed's folder, the folder of the case's cost model, of its runs), a seed each."""
    found = []
    for seed in range(args.seeds):
        root = f"{args.output_dir}/seed{seed}"
        own = f"{root}/noise/{case}"
        found.append((seed, root, *((own, own) if case in noise.VARIANTS else (root, f"{root}/{case}"))))
    return found


def remedy_jobs(args) -> list[dict]:
    jobs = []
    for case, (mix, old, new) in CASES.items():
        for seed, root, cost, own in places(args, case):
            world, sft, second = f"{root}/data", f"{root}/sft/model", f"{cost}/cost_model_2"
            jobs.append(study.score_model_job(second, "cost", sft, f"{cost}/data", world, 100 + seed))
            scored, policies = study.scores(root, cost), {name: f"{own}/{name}/model" for name in old}
            for name in new:
                script, models, times = NEW[name]
                given = [*scored, *(["--second-cost-model", f"{second}/model"] if models == 2 else [])]
                longer = argparse.Namespace(steps=times * args.steps)
                jobs.append(study.ppo_job(f"{own}/{name}", script, sft, given, world, mix, seed, longer))
                policies[name] = f"{own}/{name}/model"
            policies = {"sft": sft} | policies
            jobs += study.evaluation_jobs(f"{own}/remedies", policies, scored, world, mix, seed, args)
    return jobs


def main(args):
    study.claim(args, study.METHODS | NEW, "remedies_settings")
    study.run_jobs(remedy_jobs(args), args.jobs)
    results: dict = {}
    for case, (_, _, new) in CASES.items():
        folders = [own for *_, own in places(args, case)]
        for name in new:
            study.check_same_flags([f"{folder}/{name}" for folder in folders])
        results[case] = study.over_seeds([f"{folder}/remedies" for folder in folders])
    write_json(f"{args.output_dir}/remedies.json", results)
    for case, policies in results.items():
        print(f"\n**{case}**\n\n{study.markdown(policies, noise.COLUMNS, by_seed=True)}")


if __name__ == "__main__":
    runs.run(main, parse_args())
