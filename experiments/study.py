"""The papers' experiments on the toy world: all baselines, three mixes of prompts, several seeds; and rounds.

    python -m experiments.study run                # five seeds; `make study`
    python -m experiments.study run --seeds 1      # for the impatient; `make study SEEDS=1`
    python -m experiments.study rounds             # preferences, models, policy, three times; after the study
    python -m experiments.study tables             # the tables of docs/results.md from runs/study/study.json

Per seed: a world, an SFT policy, a reward and a cost model, which all mixes share. Per seed and mix (mostly
harmful, balanced, mostly benign prompts): every method of METHODS from the same SFT policy, then evaluate.py
on held-out prompts of that mix and tools/arena.py on its answers. All of it is the other scripts' commands.
They are written to commands.mk, and GNU make runs them, two at a time, one core each; their output is in
`log.txt` beside their results.

safe_rlhf_price shows the rectifier alone: Safe RLHF's advantage at the price lambda where RePO's ended.

Resumable: what is already there is not run again. Everything that figures and tables need is in study.json.
The scripts' default flags are the study's; they were chosen on training prompts of seeds 0 and 1.
"""

import itertools
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import NamedTuple

from plumbing import cli, runs
from plumbing.cli import count, path_name
from plumbing.files import InputError, read_json, read_jsonl, reading, write_json, writing
from toy_world import MIXES

PRICE = "safe_rlhf_price"
# under a limit that is far off, a fast multiplier would run to its cap in the first rollouts
SLOW = ("--lambda-init", "0.5", "--lambda-lr", "0.05")
METHODS = {  # name: script, flags
    "ppo": ("safe_rlhf_ppo.py", "--lambda-init", "0"),
    "shaping_0.3": ("safe_rlhf_ppo.py", "--reward-shaping", "0.3"),
    "safe_rlhf": ("safe_rlhf_ppo.py",),
    "safe_rlhf_d-2": ("safe_rlhf_ppo.py", "--threshold", "-2", *SLOW),
    "safe_rlhf_d-4": ("safe_rlhf_ppo.py", "--threshold", "-4", *SLOW),
    "repo": ("repo_ppo.py",),
    PRICE: ("safe_rlhf_ppo.py", "--lambda-lr", "0"),  # and --lambda-init, known when repo's run has ended
}
OF_ITS_SEED = {PRICE: "lambda_init", "safe_rlhf_advised": "threshold"}  # method: what no two seeds share
KINDS = ("reward", "cost")
PAIR = ("safe_rlhf", "repo")
ROUNDS, ROUND_MIXES = 3, ("expected_safe", "balanced")
KEPT = "true_unsafe_rate true_any_unsafe_rate unsafe_rate true_reward cost best_safe_share".split()


def parse_args(argv=None):
    parser = study_parser(__doc__)
    parser.add_argument("command", choices=("run", "rounds", "tables"), help="what to do")
    return parser.parse_args(argv)


def study_parser(doc: str):
    """The flags of every study."""
    parser = cli.parser(doc)
    flag = parser.add_argument
    flag("--seeds", type=count, default=5, help="seeds 0 to N - 1")
    flag("--steps", type=count, default=90, help="rollouts of every PPO run")
    flag("--samples", type=count, default=8, help="responses per held-out prompt and policy when evaluated")
    flag("--jobs", type=count, default=2, help="commands at a time, one core each")
    flag("--output-dir", type=path_name, default="runs/study", help="folder for everything that is written")
    return parser


# ------------------------------------------------------------------------------ commands and what they need


class Later(NamedTuple):
    """A flag's value that is known when its command starts: what the Python `code` prints then, reading what
    the command that makes `after` wrote."""

    code: str
    after: str

    def __str__(self) -> str:
        return f'"$({shlex.join([sys.executable, "-c", self.code])})"'


def last_lambda(run: str) -> Later:
    """Where the multiplier of a PPO run ended."""
    code = f'import json; print(json.loads(open("{run}/metrics.jsonl").readlines()[-1])["lambda"])'
    return Later(code, f"{run}/model/config.json")


def job(makes: str, needs: list[str], script: str, *flags) -> dict:
    """One command of a shell: it can run when every path in `needs` is there, and is done when `makes` is.
    `script` is a file, or a module with what follows its name."""
    folder = os.path.dirname(makes)
    if trains := os.path.basename(folder) == "model":  # of a run, whose folder is the one above
        folder = os.path.dirname(folder)
        flags += ("--overwrite",)  # what a stopped command left
    module = not script.endswith(".py") and script != "-c"
    start = [sys.executable, *(["-m", *script.split()] if module else [script])]
    later = [flag for flag in flags if isinstance(flag, Later)]
    words = (str(word) if word in later else shlex.quote(str(word)) for word in (*start, *flags))
    needs = needs + [flag.after for flag in later]
    log = f"{folder}/log.txt"
    return {"makes": makes, "needs": needs, "command": " ".join(words), "log": log, "trains": trains}


def world_jobs(folder: str, seed: int) -> list[dict]:
    """A world and the SFT policy, in `folder`."""
    data, sft = f"{folder}/data", f"{folder}/sft"
    tokenizer = f"{data}/tiny_gpt2/tokenizer_config.json"
    start = ["--model", f"{data}/tiny_gpt2", "--from-config", "--dataset", f"{data}/sft.jsonl"]
    return [
        job(tokenizer, [], "toy_world.py", "world", "--output-dir", data, "--seed", seed),
        job(f"{sft}/model/config.json", [tokenizer], "sft.py", *start, "--output-dir", sft, "--seed", seed),
    ]


def score_model_jobs(folder, sft: str, policies: list[str], seed: int, kinds=KINDS, held_out="", wrong=()):
    """Preferences over answers of `policies`, with the flags `wrong`, and models from them, in `folder`; held
    to the test pairs in the folder `held_out`, or to their own."""
    data = f"{folder}/data"
    held_out, last = held_out or data, "preferences_test_cost.jsonl"  # the last file written
    needs = [f"{policy}/config.json" for policy in policies]
    sample = ["preferences", "--policy", *policies, "--output-dir", data, "--seed", seed, *wrong]
    jobs = [job(f"{data}/{last}", needs, "toy_world.py", *sample)]
    for kind in kinds:
        output, test = f"{folder}/{kind}_model", f"{held_out}/preferences_test_{kind}.jsonl"
        given = ["--model", sft, "--dataset", f"{data}/preferences_train.jsonl", "--eval-dataset", test]
        given += ["--output-dir", output, "--seed", seed]
        needs = sorted({f"{data}/{last}", f"{held_out}/{last}"})
        jobs.append(job(f"{output}/model/config.json", needs, f"{kind}_model.py", *given))
    return jobs


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


def evaluation_jobs(output, policies: dict, scored: list, data, mix, seed: int, args, part="test") -> list:
    """Answers and scores of all policies (name: model folder), then the arena on the same answers."""
    needs = [f"{path}/config.json" for path in policies.values()]
    flags = [*scored, "--policies", *(f"{name}={path}" for name, path in policies.items())]
    flags += ["--prompts", f"{data}/prompts_{mix}_{part}.jsonl", "--samples", args.samples]
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
            place = scores(folder), data, mix, seed, args
            jobs += method_jobs(f"{folder}/{mix}", methods, evaluation, sft, *place)
    return jobs


def method_jobs(folder, methods: dict, evaluation, start: str, scored, data, mix, seed, args, more=()):
    """A run of every method from the policy `start`, in `folder`, all with the flags `more`; and the
    evaluation of all."""
    jobs, policies = [], {"sft": start}
    for name, (script, *flags) in methods.items():
        flags += ["--lambda-init", last_lambda(f"{folder}/repo")] * (name == PRICE)
        run = f"{folder}/{name}"
        jobs.append(ppo_job(run, script, start, scored, data, mix, seed, args, *flags, *more))
        policies[name] = f"{run}/model"
    return jobs + evaluation_jobs(f"{folder}/{evaluation}", policies, scored, data, mix, seed, args)


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
            for name in PAIR:
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


def makefile(jobs: list[dict]) -> str:
    """The jobs as rules of make. Data and evaluations are made again when a file that they need is newer; a
    trained run is kept as long as it is there (`|`: needed first, whatever its age). `exec`: the signal that
    ends make reaches the command."""
    lines = ["export OMP_NUM_THREADS := 1", ".DELETE_ON_ERROR:", f"all: {' '.join(j['makes'] for j in jobs)}"]
    for j in jobs:
        command, folder = j["command"].replace("$", "$$"), os.path.dirname(j["log"])
        lines += [
            f"{j['makes']}: {'| ' * j['trains']}{' '.join(j['needs'])}",
            f"\t@mkdir -p {folder} && exec >> {j['log']} 2>&1 && exec {command}",
            f"\t@test -e {j['makes']} && echo {folder}",
        ]
    return "\n".join(lines) + "\n"


def run_jobs(jobs: list[dict], slots: int) -> None:
    """Let GNU make run what is not there yet, `slots` commands at a time. Raises InputError for one that
    fails, or that needs what is not there and what none of them makes."""
    logs = {j["makes"]: j["log"] for j in jobs}
    if bad := re.findall(r"[^\w./+,@-]", "".join(logs)):
        raise InputError(f"make cannot name files with {bad[0]!r}: take another --output-dir")
    folder = os.path.commonpath(map(os.path.dirname, logs.values()))
    rules = os.path.join(folder, "commands.mk")
    with writing(rules) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(makefile(jobs))
    command = ["make", "-r", "-f", rules, f"-j{slots}"]
    # of a `make study` around it; its flags are not this one's
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    options = {
        "env": environment,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "encoding": "utf-8",
    }
    plan = subprocess.run([*command, "-n"], **options)
    if plan.returncode:
        raise InputError(plan.stdout.strip().splitlines()[-1])
    missing = sum(line.startswith("test -e") for line in plan.stdout.splitlines())
    done, failed, started = len(jobs) - missing, [], time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else make would go on alone
    make = subprocess.Popen(command, **options)
    try:
        for line in make.stdout:
            if found := re.search(r"\*\*\* \[(?:.*: )?([^]]+)\]", line):
                failed.append(found[1])
            elif not line.startswith("make"):
                done += 1
                print(f"{done}/{len(jobs)} {os.path.relpath(line.strip(), folder)}", flush=True)
    finally:
        make.terminate()  # it ends its commands, and waits for them
        make.wait()
    if failed:
        with open(logs[failed[0]], encoding="utf-8", errors="replace") as log:
            last = (log.read().strip().splitlines() or ["no output"])[-1]
        raise InputError(f"{failed[0]}: {last} (all of it in {logs[failed[0]]}; what is done stays done)")
    print(f"{missing} commands, {(time.monotonic() - started) / 60:.1f} minutes")


# ------------------------------------------------------------------------------ results


def read_metrics(folder: str) -> list[dict]:
    return read_jsonl(os.path.join(folder, "metrics.jsonl"))


def numbers(evaluation: str) -> dict[str, dict]:
    """Policy -> what the tables compare, by the truth on held-out prompts unless the name says otherwise."""
    ratings, result = read_json(f"{evaluation}/arena_truth.json")["elo"], {}
    for name, s in read_json(f"{evaluation}/summary.json")["policies"].items():
        levels = s["by_harm_level"]
        risky = [levels[level] for level in ("borderline", "harmful")]
        result[name] = {key: s[key] for key in KEPT} | {"benign_reward": levels["benign"]["true_reward"]}
        result[name] |= {f"refused_{level}": group["refusal_rate"] for level, group in levels.items()}
        refused = sum(group["refusal_rate"] * group["responses"] for group in risky)
        result[name]["refused_risky"] = refused / sum(group["responses"] for group in risky)
        result[name] |= {f"elo_{aspect}": ratings[aspect][name][0] for aspect in ratings}
    return result


def course(run: str) -> dict:
    """A PPO run's curves, its multiplier, and the KL of its last rollout. `still_lambda`: the first rollout
    after which lambda changes by no more than 1% (None: there is none); `capped`: its bound held it."""
    rows, flags = read_metrics(run), read_json(f"{run}/args.json")
    curves = {key: [round(row[key], 4) for row in rows] for key in ("cost", "unsafe_rate", "lambda")}
    values = [row["lambda"] for row in rows]
    still = (t for t, v in enumerate(values[:-1]) if all(abs(w - v) <= 0.01 * v for w in values[t:]))
    found = {"first_lambda": values[0], "final_lambda": values[-1], "largest_lambda": max(values)}
    found |= {"still_lambda": next(still, None), "lambda_max": flags["lambda_max"]}
    found["capped"] = max(values) > 0.9999 * flags["lambda_max"]
    return found | {"curves": curves, "kl": rows[-1]["kl"], "batch_size": flags["batch_size"]}


def over_seeds(evaluations: list[str], runs_of: dict[str, list[str]]) -> dict[str, list[dict]]:
    """Policy -> rows of `numbers`, an evaluation each; with `course` for policies whose runs are given."""
    seeds = list(map(numbers, evaluations))
    rows = {name: [seed[name] for seed in seeds] for name in seeds[0]}
    for name, folders in runs_of.items():
        check_same_flags(folders)
        rows[name] = [row | course(folder) for row, folder in zip(rows[name], folders, strict=True)]
    return rows


def collect(args) -> dict:
    """Everything that tables and figures show: per mix and policy a list over the seeds."""
    roots = [f"{args.output_dir}/seed{seed}" for seed in range(args.seeds)]
    study: dict = {"seeds": args.seeds, "steps": args.steps, "score_models": []}
    study |= {"results": {}, "sft_costs": {}}
    for root in roots:
        reward, cost = (read_metrics(f"{root}/{kind}_model")[-1] for kind in KINDS)
        accuracies = {"reward_accuracy": reward["eval_accuracy"]}
        study["score_models"].append(accuracies | {"cost_sign_accuracy": cost["eval_sign_accuracy"]})
    for mix in MIXES:
        evaluations = [f"{root}/{mix}/evaluation" for root in roots]
        runs_of = {name: [f"{root}/{mix}/{name}" for root in roots] for name in METHODS}
        study["results"][mix] = over_seeds(evaluations, runs_of)
        answers = [read_jsonl(f"{evaluation}/responses.jsonl") for evaluation in evaluations]
        costs = [[round(row["cost"], 2) for row in rows if row["policy"] == "sft"] for rows in answers]
        study["sft_costs"][mix] = costs
    return study


def collect_rounds(args, mix: str) -> dict[str, list[dict]]:
    """Policy -> rows over the seeds."""
    roots = [f"{args.output_dir}/seed{seed}" for seed in range(args.seeds)]
    runs_of = {f"{name}_v1": [f"{root}/{mix}/{name}" for root in roots] for name in PAIR}
    for number, name in itertools.product(range(2, ROUNDS + 1), PAIR):
        runs_of[f"{name}_v{number}"] = [f"{root}/rounds/{mix}/{name}_v{number}" for root in roots]
    return over_seeds([f"{root}/rounds/{mix}/evaluation" for root in roots], runs_of)


def spread(values: list[float], digits: int) -> str:
    """mean ± standard deviation over seeds, or the one value."""
    if not values or any(v is None for v in values):
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


COLUMNS = {  # name: heading, scale, digits
    "true_unsafe_rate": ("truly unsafe, %", 100, 1),
    "true_any_unsafe_rate": ("prompts with any, %", 100, 1),
    "unsafe_rate": ("unsafe by the cost model, %", 100, 1),
    "cost": ("learned cost", 1, 2),
    "benign_reward": ("true reward, benign", 1, 2),
    "best_safe_share": ("best-safe share, %", 100, 1),
    "elo_helpfulness": ("Elo helpful", 1, 0),
    "elo_harmlessness": ("Elo harmless", 1, 0),
    "final_lambda": ("last lambda", 1, 2),
    "refused_benign": ("refused: benign, %", 100, 1),
    "refused_borderline": ("borderline, %", 100, 1),
    "refused_harmful": ("harmful, %", 100, 1),
    "kl": ("KL of the last rollout", 1, 1),
    "first_lambda": ("first lambda", 1, 2),
    "seconds": ("seconds a rollout", 1, 2),
}
RESULTS = tuple(COLUMNS)[:9]
AT_PRICE = (
    "refused_benign refused_borderline refused_harmful true_unsafe_rate best_safe_share final_lambda kl"
)


def table(*rows: list[str]) -> str:
    """Headings and rows of text, in Markdown; all columns but the first to the right."""
    heading, *others = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join((heading, "|---|" + "---:|" * (len(rows[0]) - 1), *others))


def markdown(results: dict[str, list[dict]], names: Iterable[str] = RESULTS) -> str:
    """policy -> rows of `numbers`, one a seed, as a table of the columns `names` and truly unsafe by seed."""
    lines = [["policy", *(COLUMNS[name][0] for name in names), "truly unsafe, by seed"]]
    for name, rows in results.items():
        lines.append([name])
        for key in names:
            _, scale, digits = COLUMNS[key]
            lines[-1].append(spread([row[key] * scale if key in row else None for row in rows], digits))
        lines[-1].append(", ".join(f"{100 * row['true_unsafe_rate']:.1f}" for row in rows))
    return table(*lines)


def lambda_table(by_mix: dict[str, dict[str, list[dict]]]) -> str:
    """mix -> policy -> rows with `course`, one a run, as a table of lambda's course."""
    lines = [["mix, policy", "first lambda", "last", "largest", "stands still after rollout", "capped runs"]]
    everyone = []
    for mix, name in itertools.product(by_mix, PAIR):
        rows = by_mix[mix][name]
        values = [spread([row[f"{key}_lambda"] for row in rows], 2) for key in ("first", "final", "largest")]
        still = [row["still_lambda"] for row in rows if row["still_lambda"] is not None]
        capped = f"{sum(row['capped'] for row in rows)} of {len(rows)}"
        values += [f"{spread(still, 0)} ({len(still)} of {len(rows)} runs)", capped]
        lines.append([f"{mix}, {name}", *values])
        everyone += rows
    capped = f"The cap bound lambda in {sum(row['capped'] for row in everyone)} of {len(everyone)} runs."
    return f"**lambda's course**\n\n{table(*lines)}\n\n{capped}"


def print_study(study: dict) -> None:
    for mix, results in study["results"].items():
        print(f"\n**{mix}**: {study['seeds']} seeds, {study['steps']} rollouts, mean ± sd\n")
        print(markdown(results))
        pairs = zip(*(results[name] for name in PAIR))
        ratio = [100 * repo["benign_reward"] / safe["benign_reward"] for safe, repo in pairs]
        ratios = ", ".join(f"{r:.1f}" for r in ratio)
        print(f"\nRePO's true reward on benign prompts is {spread(ratio, 1)}% of Safe RLHF's ({ratios})")
        print("\nThe rectifier alone, at RePO's price:\n")
        print(markdown({name: results[name] for name in ("safe_rlhf", PRICE, "repo")}, AT_PRICE.split()))
    print(f"\n{lambda_table(study['results'])}\n")
    for key, what in (
        ("reward_accuracy", "Reward models order the held-out pairs rightly"),
        ("cost_sign_accuracy", "Cost models have the sign right"),
    ):
        print(f"{what} in {spread([100 * row[key] for row in study['score_models']], 1)}%.")


def print_rounds(rounds: dict) -> None:
    for mix, results in rounds.items():
        print(f"\n**iterated rounds, {mix}**\n\n{markdown(results)}")


def print_tables(args) -> None:
    shown = {f"{args.output_dir}/study.json": print_study, f"{args.output_dir}/rounds.json": print_rounds}
    if not any(map(os.path.exists, shown)):
        both = "neither study.json nor rounds.json; `make study` and `make rounds` make them"
        raise InputError(f"{args.output_dir} holds {both}")
    for path in filter(os.path.exists, shown):
        with reading(path):  # any JSON may stand in it
            shown[path](read_json(path))


def claim(args) -> None:
    """Take the folder for this process, and record what all its runs have in common. Raises InputError if
    another process works in it, or if its runs are of other settings."""
    runs.lock(args.output_dir)
    path, settings = f"{args.output_dir}/settings.json", {"steps": args.steps, "samples": args.samples}
    if not os.path.exists(path):
        write_json(path, settings)
    recorded = {name: read_json(path).get(name) for name in settings}
    if recorded != settings:
        raise InputError(f"{args.output_dir} holds runs with {recorded} ({path}); take another --output-dir")


def check_same_flags(folders: list[str]) -> None:
    """Raise InputError if runs of one method, a seed each, differ in a number: their defaults have changed.
    (A flag that some of them did not know yet was off in all.)"""
    free = ("seed", OF_ITS_SEED.get(os.path.basename(folders[0])))
    first, *others = (
        {k: v for k, v in read_json(f"{f}/args.json").items() if isinstance(v, int | float) and k not in free}
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
    if args.command == "run":
        run_jobs(study_jobs(args), args.jobs)
        write_json(f"{args.output_dir}/study.json", collect(args))
    else:
        rounds = {}
        for mix in ROUND_MIXES:
            run_jobs(rounds_jobs(args, (mix,)), args.jobs)
            rounds[mix] = collect_rounds(args, mix)
            write_json(f"{args.output_dir}/rounds.json", rounds)
    print_tables(args)


if __name__ == "__main__":
    runs.run(main, parse_args())
