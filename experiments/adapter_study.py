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
    numbers,
    ppo_job,
    run_jobs,
    score_model_jobs,
    scores,
    spread,
    world_jobs,
)
from files import write_json
from runs import count, folder

RATES = {"reward_model": "6e-3", "cost_model": "6e-3", "ppo": "4e-3"}
COLUMNS = (  # heading, name, scale, digits
    ("truly unsafe, %", "true_unsafe_rate", 100, 1),
    ("prompts with any, %", "true_any_unsafe_rate", 100, 1),
    ("true reward, benign", "benign_reward", 1, 2),
)


def parse_args(argv=None):
    parser = runs.parser(__doc__)
    flag = parser.add_argument
    flag("--seeds", type=count, default=5, help="seeds 0 to N - 1")
    flag("--ranks", type=count, nargs="+", default=[4, 8, 16], help="of the adapters")
    flag("--steps", type=count, default=90, help="rollouts of every PPO run")
    flag("--samples", type=count, default=8, help="responses per held-out prompt and policy when evaluated")
    flag("--jobs", type=count, default=2, help="commands at a time, one core each")
    flag("--output-dir", type=folder, default="runs/adapters", help="folder for everything that is written")
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


def print_table(results: dict[str, list[dict]]) -> None:
    headings = [*(heading for heading, *_ in COLUMNS), "in % of full", "truly unsafe, by seed"]
    print(f"| policy | {' | '.join(headings)} |\n|---|" + "---:|" * len(headings))
    for name, rows in results.items():
        cells = [spread([scale * row[key] for row in rows], digits) for _, key, scale, digits in COLUMNS]
        full = zip(rows, results["full"])
        cells.append(spread([100 * a["benign_reward"] / b["benign_reward"] for a, b in full], 1))
        cells.append(", ".join(f"{100 * row['true_unsafe_rate']:.1f}" for row in rows))
        print(f"| {name} | {' | '.join(cells)} |")


def main(args):
    started = time.monotonic()
    run_jobs(adapter_jobs(args), args.jobs)
    seeds = [numbers(f"{args.output_dir}/seed{seed}/evaluation") for seed in range(args.seeds)]
    results = {name: [seed[name] for seed in seeds] for name in seeds[0]}
    write_json(f"{args.output_dir}/adapters.json", results)
    print(f"{(time.monotonic() - started) / 60:.1f} minutes\n")
    print_table(results)


if __name__ == "__main__":
    runs.run(main, parse_args())
