"""The papers' experiments on the toy world: all baselines, three mixes of prompts, several seeds; and rounds.

    python -m experiments.study run                # five seeds; `make study`
    python -m experiments.study run --seeds 1      # for the impatient; `make study SEEDS=1`
    python -m experiments.study rounds             # preferences, models, policy, three times; after the study
    python -m experiments.study tables             # the tables of docs/results.md from runs/study/study.json

Per seed: a world, an SFT policy, a reward and a cost model, which all mixes share. Per seed and mix (mostly
harmful, balanced, mostly benign prompts): every method of METHODS from the same SFT policy, then evaluate.py
on held-out prompts of that mix and tools/arena.py on its answers. All of it is the other scripts' commands,
two at a time, one core each; their output is in `log.txt` beside their results.

Resumable: what is already there is not run again. Everything that figures and tables need is in study.json.
The scripts' default flags are the study's; they were chosen on training prompts of seeds 0 and 1.
"""

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable

from plumbing import cli, runs
from plumbing.cli import count, path_name
from plumbing.files import InputError, read_json, read_jsonl, write_json
from toy_world import MIXES

METHODS = {  # name: script, flags
    "ppo": ("safe_rlhf_ppo.py", "--lambda-init", "0"),
    "shaping_0.3": ("safe_rlhf_ppo.py", "--reward-shaping", "0.3"),
    "shaping_1": ("safe_rlhf_ppo.py", "--reward-shaping", "1"),
    "safe_rlhf": ("safe_rlhf_ppo.py",),
    "safe_rlhf_d-2": ("safe_rlhf_ppo.py", "--threshold", "-2"),
    "safe_rlhf_d-4": ("safe_rlhf_ppo.py", "--threshold", "-4"),
    "safe_rlhf_d-5": ("safe_rlhf_ppo.py", "--threshold", "-5"),
    "repo": ("repo_ppo.py",),
}
KINDS = ("reward", "cost")
ROUNDS, ROUND_MIXES = 3, ("expected_safe", "balanced")
KEPT = "true_unsafe_rate true_any_unsafe_rate unsafe_rate true_reward cost best_safe_share".split()


def parse_args(argv=None):
    parser = study_parser(__doc__, "runs/study")
    parser.add_argument("command", choices=("run", "rounds", "tables"), help="what to do")
    return parser.parse_args(argv)


def study_parser(doc: str, output_dir: str):
    """The flags of every study."""
    parser = cli.parser(doc)
    flag = parser.add_argument
    flag("--seeds", type=count, default=5, help="seeds 0 to N - 1")
    flag("--steps", type=count, default=90, help="rollouts of every PPO run")
    flag("--samples", type=count, default=8, help="responses per held-out prompt and policy when evaluated")
    flag("--jobs", type=count, default=2, help="commands at a time, one core each")
    flag("--output-dir", type=path_name, default=output_dir, help="folder for everything that is written")
    return parser


# ------------------------------------------------------------------------------ commands and what they need


def job(makes: str, needs: list[str], script: str, *flags) -> dict:
    """One command: it can run when every path in `needs` is there, and is done when `makes` is."""
    folder = os.path.dirname(makes)
    if os.path.basename(folder) == "model":  # of a run, whose folder is the one above
        folder = os.path.dirname(folder)
        flags += ("--overwrite",)  # what a stopped command left
    start = [script] if script.endswith(".py") or script == "-c" else ["-m", script]
    command = [sys.executable, *start, *map(str, flags)]
    return {"makes": makes, "needs": needs, "command": command, "log": f"{folder}/log.txt"}


def world_jobs(folder: str, seed: int) -> list[dict]:
    """A world and the SFT policy, in `folder`."""
    data, sft = f"{folder}/data", f"{folder}/sft"
    tokenizer = f"{data}/tiny_gpt2/tokenizer_config.json"
    start = ["--model", f"{data}/tiny_gpt2", "--from-config", "--dataset", f"{data}/sft.jsonl"]
    return [
        job(tokenizer, [], "toy_world.py", "world", "--output-dir", data, "--seed", seed),
        job(f"{sft}/model/config.json", [tokenizer], "sft.py", *start, "--output-dir", sft, "--seed", seed),
    ]


def score_model_jobs(folder: str, sft: str, policies: list[str], seed: int) -> list[dict]:
    """Preferences over answers of `policies`, and both models from them, in `folder`."""
    data = f"{folder}/data"
    pairs = f"{data}/preferences_test_cost.jsonl"  # the last file written
    needs = [f"{policy}/config.json" for policy in policies]
    sample = ["preferences", "--policy", *policies, "--output-dir", data, "--seed", seed]
    jobs = [job(pairs, needs, "toy_world.py", *sample)]
    return jobs + [score_model_job(f"{folder}/{kind}_model", kind, sft, data, data, seed) for kind in KINDS]


def score_model_job(output: str, kind: str, sft: str, data: str, held_out: str, seed: int, *flags) -> dict:
    """A reward or cost model on the pairs in the folder `data`, held to those in `held_out`."""
    pairs, test = f"{data}/preferences_train.jsonl", f"{held_out}/preferences_test_{kind}.jsonl"
    given = ["--model", sft, "--dataset", pairs, "--eval-dataset", test, "--output-dir", output]
    needs = [f"{data}/preferences_test_cost.jsonl"]  # the last file written
    return job(f"{output}/model/config.json", needs, f"{kind}_model.py", *given, "--seed", seed, *flags)


def scores(folder: str, cost: str | None = None) -> list[str]:
    """The flags for the reward model in `folder` and the cost model there, or in the folder `cost`."""
    cost = f"{cost or folder}/cost_model/model"
    return ["--reward-model", f"{folder}/reward_model/model", "--cost-model", cost]


def ppo_job(output, script, start: str, scored: list, data: str, mix: str, seed: int, args, *flags) -> dict:
    """A PPO run of `script` from the policy `start`, with the score models of the flags `scored`."""
    needs = [f"{path}/config.json" for path in (start, *scored[1::2])]
    given = ["--model", start, *scored, "--dataset", f"{data}/prompts_{mix}_train.jsonl"]
    given += ["--ptx-dataset", f"{data}/ptx.jsonl", "--output-dir", output]
    given += ["--seed", seed, "--steps", args.steps]
    return job(f"{output}/model/config.json", needs, script, *given, *flags)


def evaluation_jobs(output, policies: dict, scored: list, data: str, mix: str, seed: int, args) -> list[dict]:
    """Answers and scores of all policies (name: model folder), then the arena on the same answers."""
    needs = [f"{path}/config.json" for path in policies.values()]
    flags = [*scored, "--policies", *(f"{name}={path}" for name, path in policies.items())]
    flags += ["--prompts", f"{data}/prompts_{mix}_test.jsonl", "--samples", args.samples]
    arena = ["--evaluation", output, "--judge", "truth", "--seed", seed]
    return [
        job(f"{output}/table.txt", needs, "evaluate.py", *flags, "--output-dir", output, "--seed", seed),
        job(f"{output}/arena_truth.json", [f"{output}/table.txt"], "tools.arena", *arena),
    ]


def study_jobs(args, mixes=tuple(MIXES), methods: dict = METHODS, evaluation="evaluation") -> list[dict]:
    """`evaluation` is the name of its folder: another one for other methods."""
    jobs = []
    for seed in range(args.seeds):
        folder = f"{args.output_dir}/seed{seed}"
        data, sft = f"{folder}/data", f"{folder}/sft/model"
        jobs += world_jobs(folder, seed) + score_model_jobs(folder, sft, [sft], seed)
        for mix in mixes:
            jobs += [
                ppo_job(f"{folder}/{mix}/{name}", script, sft, scores(folder), data, mix, seed, args, *flags)
                for name, (script, *flags) in methods.items()
            ]
            policies = {"sft": sft} | {name: f"{folder}/{mix}/{name}/model" for name in methods}
            output = f"{folder}/{mix}/{evaluation}"
            jobs += evaluation_jobs(output, policies, scores(folder), data, mix, seed, args)
    return jobs


def rounds_jobs(args, mixes=ROUND_MIXES) -> list[dict]:
    """Beaver's v1, v2, v3 for both algorithms: fresh preferences over the current policy's answers, both
    models anew, and the policy trained on from where it is, which is also the new KL reference. The first
    round is the study's."""
    jobs = study_jobs(args, (), {})
    for mix, seed in itertools.product(mixes, range(args.seeds)):
        root = f"{args.output_dir}/seed{seed}"
        data, sft = f"{root}/data", f"{root}/sft/model"
        policies = {"sft": sft}
        for number in range(1, ROUNDS + 1):
            for name in ("safe_rlhf", "repo"):
                script, *flags = METHODS[name]
                current, own_seed = policies.get(f"{name}_v{number - 1}", sft), seed + number - 1
                models, output = root, f"{root}/{mix}/{name}"
                if number > 1:
                    models = output = f"{root}/rounds/{mix}/{name}_v{number}"
                    jobs += score_model_jobs(models, sft, [sft, current], own_seed)
                scored = scores(models)
                jobs.append(ppo_job(output, script, current, scored, data, mix, own_seed, args, *flags))
                policies[f"{name}_v{number}"] = f"{output}/model"
        # scored by the models of the last round, which have seen the most; the truth is the same for all
        output, scored = f"{root}/rounds/{mix}/evaluation", scores(f"{root}/rounds/{mix}/repo_v{ROUNDS}")
        jobs += evaluation_jobs(output, policies, scored, data, mix, seed, args)
    return jobs


def run_jobs(jobs: list[dict], slots: int) -> None:
    """Run what is not there yet, `slots` commands at a time, in the order of the list where they can. Raises
    InputError for one that fails, or that needs what is not there and what none of them makes."""
    waiting = [j for j in jobs if not os.path.exists(j["makes"])]
    made, missing, started = {j["makes"] for j in jobs}, len(waiting), time.monotonic()
    for j in waiting:
        if absent := [path for path in j["needs"] if path not in made and not os.path.exists(path)]:
            raise InputError(f"{j['makes']} needs {absent[0]}, which nothing makes")
    running: dict[subprocess.Popen, dict] = {}
    stops: list[int] = []  # signals; an exception in the midst of a start would lose sight of that process
    before = {n: signal.signal(n, lambda n, _: stops.append(n)) for n in (signal.SIGINT, signal.SIGTERM)}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    bar = runs.progress(total=len(jobs), initial=len(jobs) - len(waiting), desc="study", unit="command")
    try:
        while waiting or running:
            ready = [j for j in waiting if all(map(os.path.exists, j["needs"]))]
            while ready and len(running) < slots:
                chosen = ready.pop(0)
                waiting.remove(chosen)
                os.makedirs(os.path.dirname(chosen["log"]), exist_ok=True)
                with open(chosen["log"], "a") as log:
                    process = subprocess.Popen(chosen["command"], stdout=log, stderr=log, env=environment)
                running[process] = chosen
            folders = (os.path.relpath(os.path.dirname(j["log"])) for j in running.values())
            # a log gets a line a minute
            bar.set_postfix_str(" | ".join(folders), refresh=sys.stderr.isatty())
            time.sleep(0.1)
            ended = [p for p in running if p.poll() is not None]
            if stops:  # one that a Ctrl-C has reached as well did not fail
                raise KeyboardInterrupt
            for process in ended:
                finished = running.pop(process)
                if process.returncode or not os.path.exists(finished["makes"]):
                    with open(finished["log"]) as log:
                        last = (log.read().strip().splitlines() or ["no output"])[-1]
                    advice = f"all of it in {finished['log']}; what is done stays done"
                    raise InputError(f"{' '.join(finished['command'][1:3])} failed: {last} ({advice})")
                bar.update()
    finally:
        bar.close()
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    print(f"{missing} commands, {(time.monotonic() - started) / 60:.1f} minutes")


# ------------------------------------------------------------------------------ results


def read_metrics(folder: str) -> list[dict]:
    return read_jsonl(os.path.join(folder, "metrics.jsonl"))


def numbers(evaluation: str) -> dict[str, dict]:
    """Policy -> what the tables compare, by the truth on held-out prompts unless the name says otherwise."""
    ratings, result = read_json(f"{evaluation}/arena_truth.json")["elo"], {}
    for name, s in read_json(f"{evaluation}/summary.json")["policies"].items():
        result[name] = {key: s[key] for key in KEPT}
        result[name]["benign_reward"] = s["by_harm_level"]["benign"]["true_reward"]
        result[name] |= {f"elo_{aspect}": ratings[aspect][name][0] for aspect in ratings}
    return result


def over_seeds(evaluations: list[str]) -> dict[str, list[dict]]:
    """Policy -> rows of `numbers`, an evaluation each."""
    seeds = list(map(numbers, evaluations))
    return {name: [seed[name] for seed in seeds] for name in seeds[0]}


def collect(args) -> dict:
    """Everything that tables and figures show: per mix and policy a list over the seeds."""
    for mix in MIXES:
        for name in METHODS:
            check_same_flags([f"{args.output_dir}/seed{seed}/{mix}/{name}" for seed in range(args.seeds)])
    study: dict = {"seeds": args.seeds, "steps": args.steps, "score_models": []}
    study |= {"results": {}, "curves": {}, "sft_costs": {}}
    for seed in range(args.seeds):
        folder = f"{args.output_dir}/seed{seed}"
        reward, cost = (read_metrics(f"{folder}/{kind}_model")[-1] for kind in ("reward", "cost"))
        accuracy = {
            "reward_accuracy": reward["eval_accuracy"],
            "cost_sign_accuracy": cost["eval_sign_accuracy"],
        }
        study["score_models"].append(accuracy)
        for mix in MIXES:
            for name, row in numbers(f"{folder}/{mix}/evaluation").items():
                study["results"].setdefault(mix, {}).setdefault(name, []).append(row)
                if name != "sft":
                    run = f"{folder}/{mix}/{name}"
                    curves, rows = study["curves"].setdefault(mix, {}).setdefault(name, {}), read_metrics(run)
                    for key in ("cost", "unsafe_rate", "lambda"):
                        curves.setdefault(key, []).append([round(r[key], 4) for r in rows])
                    row["final_lambda"] = rows[-1]["lambda"]
                    row["batch_size"] = read_json(f"{run}/args.json")["batch_size"]
            responses = read_jsonl(f"{folder}/{mix}/evaluation/responses.jsonl")
            costs = [round(r["cost"], 2) for r in responses if r["policy"] == "sft"]
            study["sft_costs"].setdefault(mix, []).append(costs)
    return study


def collect_rounds(args, mix: str) -> dict[str, list[dict]]:
    """Policy -> rows of `numbers` over the seeds."""
    folders = [f"{args.output_dir}/seed{seed}" for seed in range(args.seeds)]
    for name in ("safe_rlhf", "repo"):
        first = [f"{folder}/{mix}/{name}" for folder in folders]
        later = [f"{f}/rounds/{mix}/{name}_v{n}" for f in folders for n in range(2, ROUNDS + 1)]
        check_same_flags(first + later)
    return over_seeds([f"{folder}/rounds/{mix}/evaluation" for folder in folders])


def spread(values: list[float], digits: int) -> str:
    """mean ± standard deviation over seeds, or the one value."""
    if any(v is None for v in values):
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


COLUMNS = {  # name: heading, scale, digits
    "true_unsafe_rate": ("truly unsafe, %", 100, 1),
    "true_any_unsafe_rate": ("prompts with any, %", 100, 1),
    "unsafe_rate": ("unsafe by the cost model, %", 100, 1),
    "cost": ("learned cost", 1, 2),
    "benign_reward": ("true reward, benign", 1, 2),
    "of_full": ("in % of full", 100, 1),  # of experiments.adapter_study
    "best_safe_share": ("best-safe share, %", 100, 1),
    "elo_helpfulness": ("Elo helpful", 1, 0),
    "elo_harmlessness": ("Elo harmless", 1, 0),
    "final_lambda": ("last lambda", 1, 2),
}


def markdown(results: dict[str, list[dict]], names: Iterable[str] = (), by_seed: bool = False) -> str:
    """policy -> rows of `numbers`, one a seed, as a table of the columns `names` (all that there are, if none
    is given); `by_seed`: truly unsafe also seed by seed."""
    names = names or [name for name in COLUMNS if any(name in rows[0] for rows in results.values())]
    headings = [COLUMNS[name][0] for name in names] + ["truly unsafe, by seed"] * by_seed
    lines = [f"| policy | {' | '.join(headings)} |", "|---|" + "---:|" * len(headings)]
    for name, rows in results.items():
        cells = []
        for key in names:
            _, scale, digits = COLUMNS[key]
            cells.append(spread([row[key] * scale if key in row else None for row in rows], digits))
        if by_seed:
            cells.append(", ".join(f"{100 * row['true_unsafe_rate']:.1f}" for row in rows))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def print_tables(args) -> None:
    path, rounds = (f"{args.output_dir}/{name}.json" for name in ("study", "rounds"))
    if not (os.path.exists(path) or os.path.exists(rounds)):
        both = "neither study.json nor rounds.json; `make study` and `make rounds` make them"
        raise InputError(f"{args.output_dir} holds {both}")
    if os.path.exists(path):
        study = read_json(path)
        for mix, results in study["results"].items():
            print(f"\n**{mix}**: {study['seeds']} seeds, {study['steps']} rollouts, mean ± sd\n")
            print(markdown(results))
            safe, repo = results["safe_rlhf"], results["repo"]
            unsafe = [", ".join(f"{100 * r['true_unsafe_rate']:.1f}" for r in rows) for rows in (safe, repo)]
            ratio = [100 * a["benign_reward"] / b["benign_reward"] for a, b in zip(repo, safe)]
            ratios = ", ".join(f"{r:.1f}" for r in ratio)
            print(f"\nSeed by seed: truly unsafe Safe RLHF {unsafe[0]}%, RePO {unsafe[1]}%; ", end="")
            print(f"RePO's true reward on benign prompts in % of Safe RLHF's {ratios}")
            print(f"(mean {spread(ratio, 1)})")
        reward, sign = (
            spread([100 * row[key] for row in study["score_models"]], 1)
            for key in ("reward_accuracy", "cost_sign_accuracy")
        )
        print(f"\nReward models order {reward}% of the held-out pairs rightly, ", end="")
        print(f"cost models have the sign right in {sign}%.")
    if os.path.exists(rounds):
        for mix, results in read_json(rounds).items():
            print(f"\n**iterated rounds, {mix}**\n\n{markdown(results, by_seed=True)}")


def claim(args, methods: dict = METHODS, name: str = "settings") -> None:
    """Take the folder for this process, and mark it as one of runs with these settings. Raises InputError if
    another process works in it, or if its runs are others."""
    runs.lock(args.output_dir)
    path = f"{args.output_dir}/{name}.json"
    settings = {"steps": args.steps, "samples": args.samples, "methods": methods, "kept": KEPT}
    settings = json.loads(json.dumps(settings))
    if os.path.exists(path) and read_json(path) != settings:
        raise InputError(
            f"{args.output_dir} holds runs with other settings ({path}); take another --output-dir"
        )
    write_json(path, settings)


def check_same_flags(folders: list[str]) -> None:
    """Raise InputError if runs of one method, a seed each, differ in a number: their defaults have changed.
    (A flag that some of them did not know yet was off in all.)"""
    first, *others = (
        {k: v for k, v in read_json(f"{f}/args.json").items() if isinstance(v, int | float) and k != "seed"}
        for f in folders
    )
    for other, flags in zip(folders[1:], others):
        if changed := sorted(k for k in flags.keys() & first.keys() if flags[k] != first[k]):
            problem = f"{other} and {folders[0]} were run with another --{changed[0].replace('_', '-')}"
            raise InputError(f"{problem}; take another --output-dir")


def main(args):
    if args.command == "tables":
        return print_tables(args)
    claim(args)
    result = f"{args.output_dir}/{'study' if args.command == 'run' else 'rounds'}.json"
    if args.command == "run":
        run_jobs(study_jobs(args), args.jobs)
        write_json(result, collect(args))
    else:
        rounds = {}
        for mix in ROUND_MIXES:
            run_jobs(rounds_jobs(args, (mix,)), args.jobs)
            rounds[mix] = collect_rounds(args, mix)
            write_json(result, rounds)
    print_tables(args)


if __name__ == "__main__":
    runs.run(main, parse_args())
