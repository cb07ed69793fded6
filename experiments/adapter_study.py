"""Do low-rank adapters learn as much? The demo's balanced mix, full training against adapters.

    python -m experiments.adapter_study                                           # five seeds, three ranks
    python -m experiments.adapter_study --seeds 1 --ranks 8 --output-dir runs/look

Per seed one world and one SFT policy, all of it trained. From there a reward model, a cost model and RePO:
once with all weights, and per rank with adapters, --lora-alpha twice the rank, the policy's in its blocks
only and in its output layer, too. RATES are learning rates of adapters, chosen with rank 8 on the training
prompts of seed 0; full training has its defaults.

Resumable like experiments.study, whose commands these are, and at home in the same folder, where what full
training makes is the study's. It prints the table of docs/results.md.
"""

import time

import runs
from experiments.study import (
    METHODS,
    check_same_flags,
    claim,
    evaluation_jobs,
    job,
    markdown,
    numbers,
    ppo_job,
    run_jobs,
    scores,
    study_jobs,
    study_parser,
)
from files import write_json
from runs import count

RATES = {"reward_model": "6e-3", "cost_model": "6e-3", "critics": "4e-3", "repo": "4e-3", "output": "1.2e-2"}
COLUMNS = ("true_unsafe_rate", "true_any_unsafe_rate", "benign_reward", "of_full", "best_safe_share")


def parse_args(argv=None):
    parser = study_parser(__doc__, "runs/study")
    parser.add_argument("--ranks", type=count, nargs="+", default=[4, 8, 16], help="of the adapters")
    return parser.parse_args(argv)


def adapter_jobs(args) -> list[dict]:
    jobs = study_jobs(args, (), {})
    for seed in range(args.seeds):
        root = f"{args.output_dir}/seed{seed}"
        world, sft, full = f"{root}/data", f"{root}/sft/model", f"{root}/balanced/repo"
        script, *flags = METHODS["repo"]
        jobs.append(ppo_job(full, script, sft, scores(root), world, "balanced", seed, args, *flags))
        policies = {"sft": sft, "full": f"{full}/model"}
        for rank in args.ranks:
            own, lora = f"{root}/adapters/rank{rank}", ["--lora-rank", rank, "--lora-alpha", 2 * rank]
            for kind in ("reward_model", "cost_model"):
                flags = ["--model", sft, "--dataset", f"{world}/preferences_train.jsonl", "--seed", seed]
                held_out = f"{world}/preferences_test_{kind.removesuffix('_model')}.jsonl"
                flags += ["--eval-dataset", held_out, "--output-dir", f"{own}/{kind}", *lora]
                needs = [f"{world}/preferences_test_cost.jsonl"]
                made = f"{own}/{kind}/model/config.json"
                jobs.append(job(made, needs, f"{kind}.py", *flags, "--lr", RATES[kind]))
            for run, name, more in (
                ("repo", f"rank{rank}", ()),
                ("output", f"rank{rank}_output", ("--lora-output",)),
            ):
                flags = [*lora, "--lr", RATES[run], "--critic-lr", RATES["critics"], *more]
                made = f"{own}/{run}"
                jobs.append(ppo_job(made, script, sft, scores(own), world, "balanced", seed, args, *flags))
                policies[name] = f"{made}/model"
        # learned scores are of the full models; the table is by the truth
        output = f"{root}/adapters/evaluation"
        jobs += evaluation_jobs(output, policies, scores(root), world, "balanced", seed, args)
    return jobs


def main(args):
    started = time.monotonic()
    claim(args, {"rates": RATES, "ranks": args.ranks}, "adapter_settings")
    run_jobs(adapter_jobs(args), args.jobs)
    folders = [f"{args.output_dir}/seed{seed}" for seed in range(args.seeds)]
    adapted = (f"adapters/rank{rank}/{run}" for rank in args.ranks for run in ("repo", "output"))
    for run in ("balanced/repo", *adapted):
        check_same_flags([f"{folder}/{run}" for folder in folders])
    seeds = [numbers(f"{folder}/adapters/evaluation") for folder in folders]
    for seed in seeds:
        for row in seed.values():
            row["of_full"] = row["benign_reward"] / seed["full"]["benign_reward"]
    results = {name: [seed[name] for seed in seeds] for name in seeds[0]}
    write_json(f"{args.output_dir}/adapters.json", results)
    print(f"{(time.monotonic() - started) / 60:.1f} minutes\n")
    print(markdown(results, COLUMNS, by_seed=True))


if __name__ == "__main__":
    runs.run(main, parse_args())
