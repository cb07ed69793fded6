"""Do low-rank adapters learn as much? The demo's balanced mix, full training against adapters.

    python -m experiments.adapter_study                        # five seeds, ranks 4, 8 and 16
    python -m experiments.adapter_study --seeds 1 --ranks 8    # a first look

Per seed one world and one SFT policy, all of it trained. From there a reward model, a cost model and RePO:
once with all weights, and once per rank with adapters, --lora-alpha twice the rank. RATES are learning rates
of adapters, chosen by what rank 8 logged on the training prompts of seed 0; full training has its defaults.

Resumable, as experiments.study is, whose commands these are. It prints the table of docs/results.md.
"""

import time

import runs
from experiments.study import (
    evaluation_jobs,
    job,
    markdown,
    numbers,
    ppo_job,
    run_jobs,
    score_model_jobs,
    scores,
    study_parser,
    world_jobs,
)
from files import write_json
from runs import count

RATES = {"reward_model": "6e-3", "cost_model": "6e-3", "ppo": "4e-3"}
COLUMNS = (  # heading, name, scale, digits
    ("truly unsafe, %", "true_unsafe_rate", 100, 1),
    ("prompts with any, %", "true_any_unsafe_rate", 100, 1),
    ("true reward, benign", "benign_reward", 1, 2),
    ("in % of full", "of_full", 100, 1),
)


def parse_args(argv=None):
    parser = study_parser(__doc__, "runs/adapters")
    parser.add_argument("--ranks", type=count, nargs="+", default=[4, 8, 16], help="of the adapters")
    return parser.parse_args(argv)


def adapter_jobs(args) -> list[dict]:
    jobs = []
    for seed in range(args.seeds):
        root = f"{args.output_dir}/seed{seed}"
        world, sft = f"{root}/data", f"{root}/sft/model"
        jobs += world_jobs(root, seed) + score_model_jobs(root, sft, [sft], seed)
        made = ppo_job(f"{root}/full", "repo_ppo.py", sft, scores(root), world, "balanced", seed, args)
        jobs.append(made)
        policies = {"sft": sft, "full": f"{root}/full/model"}
        for rank in args.ranks:
            own, lora = f"{root}/rank{rank}", ["--lora-rank", rank, "--lora-alpha", 2 * rank]
            for kind in ("reward_model", "cost_model"):
                flags = ["--model", sft, "--dataset", f"{world}/preferences_train.jsonl", "--seed", seed]
                held_out = f"{world}/preferences_test_{kind.removesuffix('_model')}.jsonl"
                flags += ["--eval-dataset", held_out, "--output-dir", f"{own}/{kind}", *lora]
                needs = [f"{world}/preferences_test_cost.jsonl"]
                made = f"{own}/{kind}/model/config.json"
                jobs.append(job(made, needs, f"{kind}.py", *flags, "--lr", RATES[kind]))
            flags = [*lora, "--lr", RATES["ppo"], "--critic-lr", RATES["ppo"]]
            output, scored = f"{own}/repo", scores(own)
            ppo = ppo_job(output, "repo_ppo.py", sft, scored, world, "balanced", seed, args, *flags)
            jobs.append(ppo)
            policies[f"rank{rank}"] = f"{output}/model"
        # learned scores are of the full models; the table is by the truth
        output = f"{root}/evaluation"
        jobs += evaluation_jobs(output, policies, scores(root), world, "balanced", seed, args)
    return jobs


def main(args):
    started = time.monotonic()
    run_jobs(adapter_jobs(args), args.jobs)
    seeds = [numbers(f"{args.output_dir}/seed{seed}/evaluation") for seed in range(args.seeds)]
    for seed in seeds:
        for row in seed.values():
            row["of_full"] = row["benign_reward"] / seed["full"]["benign_reward"]
    results = {name: [seed[name] for seed in seeds] for name in seeds[0]}
    write_json(f"{args.output_dir}/adapters.json", results)
    print(f"{(time.monotonic() - started) / 60:.1f} minutes\n")
    print(markdown(results, COLUMNS, by_seed=True))


if __name__ == "__main__":
    runs.run(main, parse_args())
