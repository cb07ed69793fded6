"""The studies: what make would run, what is done already, what fails; their tables and figures."""

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT

from experiments import family, noise, seeds, study
from offline import study as satac_study
from plumbing.files import InputError, write_json, write_jsonl

args = argparse.Namespace(seeds=2, steps=3, samples=1, output_dir="runs/study", mixes=["mild", "unsafe"])
PAIRS = study.study_jobs(args, (seeds.MIX,), seeds.METHODS, "evaluation_pair")
JOBS = {"study": study.study_jobs(args), "rounds": study.rounds_jobs(args), "noise": noise.noise_jobs(args)}
JOBS |= {"seeds": PAIRS, "satac": satac_study.satac_jobs(args), "family": family.family_jobs(args)}


def test_every_command_finds_what_it_needs_and_no_file_is_made_in_two_ways():
    shared = {}
    for jobs in JOBS.values():
        made = set()
        for job in jobs:
            assert set(job["needs"]) <= made and job["makes"] not in made, job
            made.add(job["makes"])
            assert shared.setdefault(job["makes"], job["command"]) == job["command"]  # in whichever study
            _, first, second, *_ = words = shlex.split(job["command"])
            script = second.replace(".", "/") + ".py" if first == "-m" else first
            declared = (ROOT / script).read_text() + (ROOT / "plumbing/cli.py").read_text()
            if script == "experiments/constraints.py":  # a script's flags follow
                declared += (ROOT / "repo_rloo.py").read_text()
            assert all(f'"{word}"' in declared for word in words[3:] if word.startswith("--")), job


def test_all_baselines_of_the_papers_are_there_with_the_same_start_data_and_seed():
    ppo = [
        shlex.split(j["command"])
        for j in JOBS["study"]
        if "_ppo.py" in j["command"] and "seed0" in j["makes"]
    ]
    for mix in study.MIXES:
        mine = [c for c in ppo if f"runs/study/seed0/data/prompts_{mix}_train.jsonl" in c]
        own = {" ".join(c[c.index("--steps") + 2 :]).removesuffix("--overwrite").strip() for c in mine}
        slow = " ".join(study.SLOW)
        strict = {f"--threshold {d} {slow}" for d in ("-2", "-4")}
        assert {"--lambda-init 0", "--reward-shaping 0.3", ""} | strict <= own
        assert sum("repo_ppo.py" in c for c in mine) == 1 and len(mine) == len(study.METHODS)
    for flag in ("--model", "--reward-model", "--cost-model", "--steps", "--seed"):
        assert len({command[command.index(flag) + 1] for command in ppo}) == 1


def write(path: Path, text: str, *flags, needs=()) -> dict:
    """A command that writes its text and its flags to `path`."""
    code = f"import pathlib, sys; pathlib.Path({str(path)!r}).write_text({text!r} + ' '.join(sys.argv[1:]))"
    return study.job(str(path), list(map(str, needs)), "-c", code, *flags)


def test_make_runs_in_order_what_is_not_there_and_names_a_failure_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MAKEFLAGS", "-n")  # of a make around it
    one, two = tmp_path / "a/x.txt", tmp_path / "b/y.txt"
    jobs = [write(two, "for $HOME", needs=[one]), write(one, "first")]  # needs decide, not the order
    study.run_jobs(jobs, 2)
    assert two.read_text() == "for $HOME" and capsys.readouterr().out.startswith("1/2 a\n2/2 b\n2 commands")
    two.write_text("kept")
    study.run_jobs(jobs, 2)
    assert two.read_text() == "kept"
    for name, needs, code, problem in (
        ("c/z.txt", [], "raise SystemExit('no such luck')", "z.txt: no such luck .all of it in .*c/log.txt"),
        ("d/z.txt", [f"{tmp_path}/nowhere"], "pass", "No rule to make target .*nowhere"),
        ("e/z.txt", [], "pass", "e/z.txt: no output"),  # it ended well, and made nothing
        ("a b/z.txt", [], "pass", "make cannot name files with ' '"),
    ):
        with pytest.raises(InputError, match=problem):
            study.run_jobs([*jobs, study.job(f"{tmp_path}/{name}", needs, "-c", code)], 1)


def test_the_price_is_where_repos_lambda_ended_and_a_run_is_kept(tmp_path):
    """Evaluations are made again when a policy is newer, so that a method can be added; a run never is."""
    repo, price = tmp_path / "repo/model/config.json", tmp_path / "price/model/config.json"
    evaluation = tmp_path / "evaluation/x.txt"
    for path in (repo, price):
        path.parent.mkdir(parents=True)
    write_jsonl(f"{tmp_path}/repo/metrics.jsonl", [{"lambda": 0.5}, {"lambda": 1.25}])
    price_job = write(price, "price ", "--lambda-init", study.last_lambda(f"{tmp_path}/repo"))
    jobs = [price_job, write(repo, "repo"), write(evaluation, "new", needs=[price])]
    study.run_jobs(jobs, 2)
    assert price.read_text() == "price --lambda-init 1.25 --overwrite"  # what a stopped run left is replaced
    for path in (evaluation, price, repo):
        time.sleep(0.02)
        path.write_text("old")
    study.run_jobs(jobs, 2)
    assert (price.read_text(), evaluation.read_text()) == ("old", "new")
    planned = {job["makes"]: job["command"] for job in JOBS["study"]}
    for mix in study.MIXES:
        own = f"runs/study/seed1/{mix}"
        assert f'"{own}/repo/metrics.jsonl"' in planned[f"{own}/{study.PRICE}/model/config.json"]


def test_the_advised_limit_is_what_is_run(tmp_path):
    write_json(f"{tmp_path}/summary.json", {"suggested_threshold": -1.234})
    advised = noise.advised_limit(str(tmp_path))
    assert subprocess.check_output(f"echo {advised}", shell=True, text=True) == "-1.23\n"
    assert sum("suggested_threshold" in job["command"] for job in JOBS["noise"]) == 2 * len(noise.VARIANTS)


def test_a_stopped_study_leaves_no_process_behind(tmp_path):
    command = [sys.executable, "-m", "experiments.study", "run", "--output-dir", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "seed0/data/tiny_gpt2/tokenizer_config.json").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert "interrupted" in process.communicate(timeout=60)[1] and process.returncode == 130
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert running and str(tmp_path) not in running


def test_a_folder_of_other_settings_or_defaults_is_refused_in_one_line(tmp_path, run_in):
    write_json(f"{tmp_path}/settings.json", {"steps": 7, "samples": 8})
    code, error = run_in(tmp_path, "experiments/study.py", "run", "--output-dir", ".")
    assert code == 2 and "holds runs with {'steps': 7, 'samples': 8}" in error
    for seed, changed in enumerate(({}, {"of_a_later_version": False}, {"kl_coeff": 0.03})):
        write_json(
            f"{tmp_path}/{seed}/args.json", {"seed": seed, "model": str(seed), "kl_coeff": 0.01} | changed
        )
    study.check_same_flags([f"{tmp_path}/0", f"{tmp_path}/1"])
    with pytest.raises(InputError, match="2 and .*0 were run with another --kl-coeff"):
        study.check_same_flags([f"{tmp_path}/{seed}" for seed in range(3)])


@pytest.fixture
def row(tmp_path) -> dict:
    """Of a run whose lambda climbs and stands still from rollout 2 on, and of its evaluation."""
    logged = [(0.5, 1.0), (1.0, 0.9), (1.25, 0.2), (1.255, 0.1), (1.26, 0.3)]
    rows = [{"lambda": v, "kl": kl, "cost": 1.0, "unsafe_rate": 0.5} for v, kl in logged]
    write_jsonl(f"{tmp_path}/run/metrics.jsonl", rows)
    write_json(f"{tmp_path}/run/args.json", {"lambda_max": 1.26, "batch_size": 128})
    groups = {"benign": (6, 0.1), "borderline": (3, 0.5), "harmful": (1, 0.9)}
    levels = {k: {"responses": n, "refusal_rate": r, "true_reward": 4.0} for k, (n, r) in groups.items()}
    summary = {"policies": {"repo": dict.fromkeys(study.KEPT, 0.25) | {"by_harm_level": levels}}}
    write_json(f"{tmp_path}/summary.json", summary)
    elo = {"repo": [1100, 1000, 1200]}
    write_json(f"{tmp_path}/arena_truth.json", {"elo": {"helpfulness": elo, "harmlessness": elo}})
    return study.over_seeds([str(tmp_path)], {"repo": [f"{tmp_path}/run"]})["repo"][0]


def test_a_run_and_its_evaluation_become_a_row_and_lambdas_course(row):
    assert row["refused_risky"] == pytest.approx(0.6) and row["refused_benign"] == 0.1
    assert row["elo_helpfulness"] == 1100 and row["benign_reward"] == 4.0 and row["kl"] == 0.3
    assert (row["first_lambda"], row["final_lambda"], row["still_lambda"], row["capped"]) == (
        0.5,
        1.26,
        2,
        True,
    )
    free = row | {"still_lambda": None, "capped": False}
    table = study.lambda_table({"balanced": {"repo": [row, row], "safe_rlhf": [free]}})
    assert (
        "| 1.26 ± 0.00 | 2 ± 0 (2 of 2 runs) | 2 of 2 |" in table and "| - (0 of 1 runs) | 0 of 1 |" in table
    )
    assert "The cap bound lambda in 2 of 3 runs." in table


def test_tables_and_figures_come_from_study_json(tmp_path, run_in, capsys, row):
    results = {mix: {name: [row, row] for name in ("sft", *study.METHODS)} for mix in study.MIXES}
    rates = [row | {"true_unsafe_rate": 0.01}, row | {"true_unsafe_rate": 0.03}]
    results["balanced"] |= {"repo": rates, "sft": [{k: v for k, v in row.items() if k != "final_lambda"}]}
    models, costs = (
        [{"reward_accuracy": 0.8, "cost_sign_accuracy": 0.9}],
        dict.fromkeys(study.MIXES, [[-1.0, 2]]),
    )
    content = {"seeds": 2, "steps": 5, "score_models": models, "results": results, "sft_costs": costs}
    write_json(f"{tmp_path}/study.json", content)
    study.main(study.parse_args(["tables", "--output-dir", str(tmp_path)]))
    out = capsys.readouterr().out
    assert "| repo | 2.0 ± 1.4 | 25.0 ± 0.0 |" in out and "| 1.26 ± 0.00 | 1.0, 3.0 |" in out
    assert (
        "| 1100 | - | 25.0 |" in out and "| repo | 10.0 ± 0.0 | 50.0 ± 0.0 | 90.0 ± 0.0 | 2.0 ± 1.4 |" in out
    )
    code, error = run_in(tmp_path, "experiments/figures.py", "--study", "study.json", "--output-dir", ".")
    assert code == 0, error
    for name in ("mixes", "pareto", "lambdas", "price"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000 and (tmp_path / f"{name}.pdf").exists()


def test_a_file_that_is_no_study_is_refused_in_one_line(tmp_path, run_in):
    tables = ("experiments/study.py", "tables", "--output-dir", ".")
    assert "neither study.json nor rounds.json" in run_in(tmp_path, *tables)[1]
    (tmp_path / "study.json").write_text(json.dumps({"results": 3}))
    for command in (tables, ("experiments/figures.py", "--study", "study.json")):
        code, error = run_in(tmp_path, *command)
        assert code == 2 and "study.json: cannot be read" in error


def test_the_noise_studys_table_and_figure(capsys, row):
    results = {}
    for variant in noise.VARIANTS:
        names = noise.methods("root", variant)
        own = {"signs": [{"true": 0.99, "given": 0.9}] * 2, "limits": [-4.0, -4.5]}
        own |= {"policies": {name: [row, row] for name in ("sft", *names)}}
        curves = {name: [{"learned": [0.5, 0.0], "true": [0.5, 0.1]}] * 2 for name in names}
        results[variant] = own | ({} if variant == "none" else {"curves": curves})
    noise.print_tables(results)
    out = capsys.readouterr().out
    assert "true sign right in 99.0 ± 0.0%" in out and "advised limit is -4.2 ± 0.4" in out
    assert out.count("| repo |") == 5 and out.count(f"| {noise.MARGIN} |") == 2
    assert noise.figure(results).axes[0].get_title() == "5% of the labels flipped"


def test_the_family_starts_alike_and_shares_the_twins_runs():
    planned = {job["makes"]: shlex.split(job["command"]) for job in JOBS["family"]}
    other = {job["makes"] for name in ("study", "noise") for job in JOBS[name]}
    for setting, (mix, methods) in family.SETTINGS.items():
        folder = family.folder_of("runs/study/seed1", setting)
        commands = {name: planned[f"{folder}/{name}/model/config.json"] for name in methods}
        for flag in ("--model", "--reward-model", "--cost-model", "--dataset", "--steps", "--seed"):
            assert len({command[command.index(flag) + 1] for command in commands.values()}) == 1
        assert f"prompts_{mix}_train" in " ".join(commands["cvar"])
        assert "noise" in " ".join(commands["cvar"]) or setting != family.FLIPPED
        shared = {name for name in methods if f"{folder}/{name}/model/config.json" in other}
        assert {"safe_rlhf", "repo"} <= shared and "cvar" not in shared
        assert f"{folder}/repo/metrics.jsonl" in " ".join(commands[study.PRICE])
    assert set(family.STYLE) == {"sft", *family.MEMBERS, *family.FURTHER}


def test_the_familys_table_and_figure(tmp_path, row, capsys):
    """Costs 0 to 100 have their percentiles; a line of the table ends with the seconds of its rollouts."""
    answers = [
        {"policy": "sft", "harm_level": k % 3, "cost": k // 3, "true_cost": k // 3 - 50} for k in range(303)
    ]
    write_jsonl(f"{tmp_path}/responses.jsonl", answers)
    costs = family.costs_of([str(tmp_path)])["sft"]
    assert costs[1] == {"costs": [5.0, 25.0, 50.0, 75.0, 95.0], "unsafe": 50 / 101}
    write_jsonl(f"{tmp_path}/metrics.jsonl", [{"seconds_rollout": 1, "seconds_update": k} for k in (1, 9, 2)])
    assert family.seconds(str(tmp_path)) == 3
    collected = {}
    for setting, (_, methods) in family.SETTINGS.items():
        results = {name: [row | {"seconds": 3.0}] * 2 for name in methods}
        collected[setting] = {
            "results": {"sft": [row]} | results,
            "costs": dict.fromkeys(("sft", *methods), costs),
        }
    family.print_tables(collected)
    out = capsys.readouterr().out
    assert out.count("| cvar | 25.0 ± 0.0 |") == 3 and out.count("| rloo |") == 1
    assert out.count("| 0.50 ± 0.00 | 1.26 ± 0.00 | 0.3 ± 0.0 | 3.00 ± 0.00 |") == 7 * 3 + 3
    axes = family.figure(collected).axes
    assert len(axes) == 12 and axes[1].get_title() == "benign prompts"
    assert [text.get_text() for text in axes[1].get_yticklabels()][-1] == "SFT (initial)"


def test_the_bootstrap_resamples_pairs():
    """Two seeds of which one is safer by 1 and one less safe by 1: a resample of two has both of the same
    kind in a quarter of the cases each. And what the seeds of a pair share does not blur the difference."""
    drawn = seeds.bootstrap([(0, -1), (0, 1)], seeds.difference)
    assert [round(4 * drawn.count(value) / len(drawn), 1) for value in (-1, 0, 1)] == [1.0, 2.0, 1.0]
    assert seeds.interval(seeds.bootstrap([(0, 1), (10, 11), (20, 21)], seeds.difference)) == (1, 1)
    assert seeds.ratio([(2, 1), (6, 5)]) == 6 / 8


def test_how_often_both_claims_hold():
    """Of two seeds RePO is safer in both, and as helpful (at least 95%) in one: 3.8 of 4; 3.0 of 4."""
    rows = [(0.5, 4.0), (0.4, 4.0)], [(0.01, 3.8), (0.02, 3.0)]
    safe, repo = ([dict(zip(("true_unsafe_rate", "benign_reward"), seed)) for seed in own] for own in rows)
    safer, helpful = seeds.compare({"sft": safe, "safe_rlhf": safe, "repo": repo}).values()
    assert safer["estimate"] == pytest.approx(-0.435) and safer["draws"] == 1 and safer["seeds"] == 1
    assert safer["interval"] == pytest.approx((-0.49, -0.38))
    assert helpful["estimate"] == pytest.approx(6.8 / 8) and helpful["seeds"] == 0.5
    assert helpful["draws"] == pytest.approx(0.25, abs=0.02)  # both draws are the first seed
