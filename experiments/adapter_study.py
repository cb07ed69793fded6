"""Do low-rank adapters learn as much? The demo's balanced mix, full training against adapters.

    python -m experiments.adapter_study                                           # five seeds, three ranks
    python -m experiments.adapter_study --seeds 1 --ranks 8 --output-dir runs/look

Per seed one world and one SFT policy, all of it trained. From there a reward model, a cost model and RePO:
once with all weights, and per rank with adapters, --lora-alpha twice the rank, in the policy's blocks and in
its output layer. With the largest rank RePO runs twice more: without the output layer, and with the frozen
weights in 8 bits. The learning rates of adapters were chosen on the training prompts of seed 0; full training
has its defaults.

Resumable like experiments.study, whose commands these are, and at home in the same folder, where what full
training makes is the study's. It prints the table of docs/results.md.
"""

from experiments import study
from plumbing import runs
from plumbing.cli import count
from plumbing.files import write_json

RATES = {"reward": "3e-3", "cost": "6e-3"}
RUNS = {  # name: flags of RePO
    "output": ("--lr", "8e-3", "--lora-output"),
    "blocks": ("--lr", "4e-3"),
    "int8": ("--lr", "8e-3", "--lora-output", "--quantize", "int8"),
}
COLUMNS = ("true_unsafe_rate", "true_any_unsafe_rate", "benign_reward", "of_full", "best_safe_share")


def parse_args(argv=None):
    parser = study.study_parser(__doc__, "runs/study")
    parser.add_argument("--ranks", type=count, nargs="+", default=[4, 8, 16], help="of the adapters")
    return parser.parse_args(argv)


def planned(ranks: list[int]) -> list[tuple[int, str]]:
    """(rank, name of RUNS): the first with every rank, all with the largest one."""
    return [(rank, run) for rank in ranks for run in RUNS if run == "output" or rank == max(ranks)]


def adapter_jobs(args) -> list[dict]:
    jobs = study.study_jobs(args, (), {})
    for seed in range(args.seeds):
        root = f"{args.output_dir}/seed{seed}"
        world, sft, full = f"{root}/data", f"{root}/sft/model", f"{root}/balanced/repo"
        script, *flags = study.METHODS["repo"]
        scored = study.scores(root)
        jobs.append(study.ppo_job(full, script, sft, scored, world, "balanced", seed, args, *flags))
        policies = {"sft": sft, "full": f"{full}/model"}
        for rank in args.ranks:
            lora = ["--lora-rank", rank, "--lora-alpha", 2 * rank]
            for kind in study.KINDS:
                output, flags = f"{root}/adapters/rank{rank}/{kind}_model", [*lora, "--lr", RATES[kind]]
                jobs.append(study.score_model_job(output, kind, sft, world, world, seed, *flags))
        for rank, run in planned(args.ranks):
            own = f"{root}/adapters/rank{rank}"
            made, mine = f"{own}/{run}", study.scores(own)
            flags = ["--lora-rank", rank, "--lora-alpha", 2 * rank, *RUNS[run]]
            jobs.append(study.ppo_job(made, script, sft, mine, world, "balanced", seed, args, *flags))
            policies[f"rank{rank}_{run}"] = f"{made}/model"
        # learned scores are of the full models; the table is by the truth
        output = f"{root}/adapters/evaluation"
        jobs += study.evaluation_jobs(output, policies, scored, world, "balanced", seed, args)
    return jobs


def main(args):
    study.claim(args, {"rates": RATES, "runs": RUNS, "ranks": args.ranks}, "adapter_settings")
    study.run_jobs(adapter_jobs(args), args.jobs)
    folders = [f"{args.output_dir}/seed{seed}" for seed in range(args.seeds)]
    adapted = (f"adapters/rank{rank}/{run}" for rank, run in planned(args.ranks))
    for run in ("balanced/repo", *adapted):
        study.check_same_flags([f"{folder}/{run}" for folder in folders])
    results = study.over_seeds([f"{folder}/adapters/evaluation" for folder in folders])
    for rows in results.values():
        for row, full in zip(rows, results["full"]):
            row["of_full"] = row["benign_reward"] / full["benign_reward"]
    write_json(f"{args.output_dir}/adapters.json", results)
    print("\n" + study.markdown(results, COLUMNS, by_seed=True))


if __name__ == "__main__":
    runs.run(main, parse_args())
