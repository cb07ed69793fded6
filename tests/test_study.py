"""The studies: what make would run, what is done already, what fails; their tables and figures."""

import argparse
import json
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT

from experiments import noise, seeds, study
from offline import study as satac_study
from plumbing.files import InputError, write_json, write_jsonl

STUDY = "experiments/study.py"


def arguments(**changes) -> argparse.Namespace:
    return argparse.Namespace(**dict(seeds=2, steps=3, samples=1, output_dir="runs/study") | changes)


JOBS = {"study": study.study_jobs(arguments()), "rounds": study.rounds_jobs(arguments())}
JOBS["noise"] = noise.noise_jobs(arguments())
JOBS["seeds"] = study.study_jobs(arguments(), (seeds.MIX,), seeds.METHODS, "evaluation_pair")
JOBS["satac"] = satac_study.satac_jobs(arguments(mixes=["mild", "unsafe"]))


@pytest.mark.parametrize("jobs", JOBS.values(), ids=JOBS)
def test_every_command_finds_what_it_needs(jobs):
    made = set()
    for job in jobs:
        assert set(job["needs"]) <= made, job
        assert job["makes"] not in made  # nothing is made twice
        made.add(job["makes"])
        _, first, second, *_ = words = shlex.split(job["command"])
        script = second.replace(".", "/") + ".py" if first == "-m" else first
        declared = (ROOT / script).read_text() + (ROOT / "plumbing/cli.py").read_text()
        for flag in words[3:]:
            assert not flag.startswith("--") or f'"{flag}"' in declared, flag


def test_studies_that_share_a_folder_make_the_same_files_alike():
    shared = {}
    for job in sum(JOBS.values(), []):
        assert shared.setdefault(job["makes"], job["command"]) == job["command"]
    assert len(shared) < sum(map(len, JOBS.values()))


def test_all_baselines_of_the_papers_are_there_with_the_same_start_data_and_seed():
    jobs = study.study_jobs(arguments(seeds=1))
    ppo = [shlex.split(job["command"]) for job in jobs if "_ppo.py" in job["command"]]
    for mix in study.MIXES:
        prompts = f"--dataset runs/study/seed0/data/prompts_{mix}_train.jsonl"
        mine = [command for command in ppo if prompts in " ".join(command)]
        own = {" ".join(c[c.index("--steps") + 2 :]).removesuffix("--overwrite").strip() for c in mine}
        assert {"--lambda-init 0", "--reward-shaping 1", "", "--threshold -2", "--threshold -5"} <= own
        assert sum("repo_ppo.py" in c for c in mine) == 1 and len(mine) == len(study.METHODS)
    for flag in ("--model", "--reward-model", "--cost-model", "--steps", "--seed"):
        assert len({command[command.index(flag) + 1] for command in ppo}) == 1


# ------------------------------------------------------------------------------ what make does


def write(path: Path, text: str, *flags) -> dict:
    """A command that writes its text and its flags to `path`."""
    code = f"import pathlib, sys; pathlib.Path({str(path)!r}).write_text({text!r} + ' '.join(sys.argv[1:]))"
    return study.job(str(path), [], "-c", code, *flags)


def test_make_runs_in_order_what_is_not_there_and_names_a_failure_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MAKEFLAGS", "-n")  # of a make around it
    first, second = write(tmp_path / "a/x.txt", "first"), write(tmp_path / "b/y.txt", "for $HOME")
    second["needs"] = [first["makes"]]
    study.run_jobs([second, first], 2)  # needs decide, not the order
    assert (tmp_path / "b/y.txt").read_text() == "for $HOME"
    assert capsys.readouterr().out.startswith("1/2 a\n2/2 b\n2 commands")
    (tmp_path / "b/y.txt").write_text("kept")
    study.run_jobs([first, second], 2)
    assert (tmp_path / "b/y.txt").read_text() == "kept"  # what is there is not run again
    failing = study.job(f"{tmp_path}/c/z.txt", [], "-c", "raise SystemExit('no such luck')")
    with pytest.raises(InputError, match="c/z.txt: no such luck .all of it in .*c/log.txt"):
        study.run_jobs([first, failing], 1)
    with pytest.raises(InputError, match="No rule to make target .*nowhere"):
        study.run_jobs([study.job(f"{tmp_path}/d/z.txt", [f"{tmp_path}/nowhere"], "-c", "pass")], 1)
    with pytest.raises(InputError, match="d/z.txt: no output"):  # it ended well, and made nothing
        study.run_jobs([study.job(f"{tmp_path}/d/z.txt", [], "-c", "pass")], 1)
    with pytest.raises(InputError, match="make cannot name files with ' '"):
        study.run_jobs([study.job(f"{tmp_path}/a b/z.txt", [], "-c", "pass")], 1)


def test_the_price_is_where_repos_lambda_ended_and_a_run_is_kept(tmp_path):
    """Evaluations are made again when a policy is newer, so that a method can be added; a run never is."""
    repo, price = tmp_path / "repo", tmp_path / "price/model/config.json"
    for path in (repo / "model", price.parent):
        path.mkdir(parents=True)
    write_jsonl(f"{repo}/metrics.jsonl", [{"lambda": 0.5}, {"lambda": 1.25}])
    at_price = write(price, "price ", "--lambda-init", study.last_lambda(str(repo)))
    jobs = [at_price, write(repo / "model/config.json", "repo"), write(tmp_path / "evaluation/x.txt", "new")]
    jobs[2]["needs"] = [str(price)]
    study.run_jobs(jobs, 2)
    assert price.read_text() == "price --lambda-init 1.25 --overwrite"  # a stopped run starts afresh
    for age, path in enumerate((tmp_path / "evaluation/x.txt", price, repo / "model/config.json")):
        path.write_text("old")
        time.sleep(0.02 * (age < 2))
    study.run_jobs(jobs, 2)
    assert price.read_text() == "old" and (tmp_path / "evaluation/x.txt").read_text() == "new"
    planned = {job["makes"]: job for job in JOBS["study"]}
    for mix in study.MIXES:
        own = f"runs/study/seed1/{mix}"
        planned_price = planned[f"{own}/{study.PRICE}/model/config.json"]
        assert f"{own}/repo/model/config.json" in planned_price["needs"]
        assert f'"{own}/repo/metrics.jsonl"' in planned_price["command"]


def test_the_advised_limit_is_what_is_run(tmp_path):
    write_json(f"{tmp_path}/summary.json", {"suggested_threshold": -1.234})
    advised = noise.advised_limit(str(tmp_path))
    assert subprocess.check_output(f"echo {advised}", shell=True, text=True) == "-1.23\n"
    assert sum("suggested_threshold" in job["command"] for job in JOBS["noise"]) == 2 * len(noise.VARIANTS)


def test_a_stopped_study_leaves_no_process_behind(tmp_path):
    command = [sys.executable, "-m", "experiments.study", "run", "--seeds", "1", "--steps", "1"]
    command += ["--output-dir", str(tmp_path)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, **pipes)
    while not (tmp_path / "seed0/data/tiny_gpt2/tokenizer_config.json").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "interrupted" in error
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert str(tmp_path).encode() not in path.read_bytes(), path
        except OSError:  # it ended meanwhile
            pass


def test_a_folder_with_other_settings_and_one_that_cannot_be_had_are_refused(tmp_path, run_in):
    (tmp_path / "settings.json").write_text(json.dumps({"steps": 7, "samples": 8}))
    code, error = run_in(tmp_path, STUDY, "run", "--output-dir", tmp_path)
    assert code == 2 and "holds runs with --steps 7" in error
    (tmp_path / "file").touch()
    code, error = run_in(tmp_path, STUDY, "run", "--output-dir", "file/x")
    assert code == 2 and "cannot write to --output-dir file/x (Not a directory)" in error


def test_runs_of_other_defaults_are_not_mixed_in(tmp_path):
    for seed, rate in enumerate((0.01, 0.01, 0.03)):
        write_json(f"{tmp_path}/{seed}/args.json", {"seed": seed, "model": str(seed), "kl_coeff": rate})
    changed = {"seed": 1, "kl_coeff": 0.01, "of_a_later_version": False}
    write_json(f"{tmp_path}/1/args.json", changed)
    study.check_same_flags([f"{tmp_path}/0", f"{tmp_path}/1"])
    with pytest.raises(InputError, match="2 and .*0 were run with another --kl-coeff"):
        study.check_same_flags([f"{tmp_path}/{seed}" for seed in range(3)])


# ------------------------------------------------------------------------------ tables and figures


def test_a_run_and_an_evaluation_become_a_row(tmp_path):
    """RePO's lambda climbs and stands still from rollout 2 on; two risky groups of unequal size."""
    logged = [(0.5, 1.0), (1.0, 0.9), (1.25, 0.2), (1.255, 0.1), (1.26, 0.3)]
    rows = [{"lambda": v, "kl": kl, "cost": 1.0, "unsafe_rate": 0.5} for v, kl in logged]
    write_jsonl(f"{tmp_path}/run/metrics.jsonl", rows)
    write_json(f"{tmp_path}/run/args.json", {"lambda_max": 1.26, "batch_size": 128})
    groups = {"benign": (6, 0.1), "borderline": (3, 0.5), "harmful": (1, 0.9)}
    levels = {k: {"responses": n, "refusal_rate": r, "true_reward": 4.0} for k, (n, r) in groups.items()}
    summary = {"policies": {"repo": dict.fromkeys(study.KEPT, 0.25) | {"by_harm_level": levels}}}
    write_json(f"{tmp_path}/summary.json", summary)
    write_json(f"{tmp_path}/arena_truth.json", {"elo": {"helpfulness": {"repo": [1100, 1000, 1200]}}})
    (row,) = study.over_seeds([str(tmp_path)], {"repo": [f"{tmp_path}/run"]})["repo"]
    assert row["refused_risky"] == pytest.approx(0.6) and row["refused_benign"] == 0.1
    assert row["elo_helpfulness"] == 1100 and row["benign_reward"] == 4.0 and row["kl"] == 0.3
    assert (row["first_lambda"], row["final_lambda"], row["still_lambda"]) == (0.5, 1.26, 2)
    assert study.at_cap([row, row | {"lambda_max": 20}]) == 1
    by_mix = {"balanced": {"repo": [row, row], "safe_rlhf": [row | {"lambda_max": 2, "still_lambda": None}]}}
    table = study.lambda_table(by_mix)
    assert (
        "| 1.26 ± 0.00 | 2 ± 0 (2 of 2 runs) | 2 of 2 |" in table and "| - (0 of 1 runs) | 0 of 1 |" in table
    )
    assert "The cap bound lambda in 2 of 3 runs." in table


def made_up_study() -> dict:
    """Two seeds; the numbers are random, their shape is study.json's."""
    rng = random.Random(0)

    def row() -> dict:
        curves = {key: [rng.random() for _ in range(5)] for key in ("cost", "unsafe_rate", "lambda")}
        more = {"first_lambda": 0.5, "largest_lambda": 1.0, "lambda_max": 20, "still_lambda": 3}
        more |= {"true_reward": rng.random(), "refused_risky": 0.5, "batch_size": 8, "curves": curves}
        return {key: rng.random() for key in study.COLUMNS} | more

    return {
        "seeds": 2,
        "steps": 5,
        "score_models": [{"reward_accuracy": 0.8, "cost_sign_accuracy": 0.9}] * 2,
        "results": {mix: {name: [row(), row()] for name in ("sft", *study.METHODS)} for mix in study.MIXES},
        "sft_costs": {mix: [[-1.0, 2.0], [1.0]] for mix in study.MIXES},
    }


def test_tables_and_figures_come_from_study_json(tmp_path, run_in, capsys):
    content = made_up_study()
    for row, rate in zip(content["results"]["balanced"]["repo"], (0.01, 0.03)):
        row |= {"true_unsafe_rate": rate, "final_lambda": 1.5, "refused_benign": 0.25}
    (tmp_path / "study.json").write_text(json.dumps(content))
    sft = dict.fromkeys(study.RESULTS[:-1], 1) | {"true_unsafe_rate": 0.5308}
    (tmp_path / "rounds.json").write_text(json.dumps({"balanced": {"sft": [sft]}}))
    study.main(study.parse_args(["tables", "--output-dir", str(tmp_path)]))
    out = capsys.readouterr().out
    assert "| repo | 2.0 ± 1.4 |" in out and "| 1.0, 3.0 |" in out and "| sft | 53.1 | 100.0 |" in out
    assert "| repo | 1.50 ± 0.00 | 25.0 ± 0.0 |" in out and out.count(f"| {study.PRICE} | ") == 6
    flags = ("--study", "study.json", "--output-dir", "figures")
    code, error = run_in(tmp_path, "experiments/figures.py", *flags)
    assert code == 0, error
    for name in ("mixes", "pareto", "lambdas", "price"):
        assert (tmp_path / f"figures/{name}.png").stat().st_size > 10_000
        assert (tmp_path / f"figures/{name}.pdf").exists()


def test_a_file_that_is_no_study_is_refused_in_one_line(tmp_path, run_in):
    tables = (STUDY, "tables", "--output-dir", ".")
    assert "neither study.json nor rounds.json" in run_in(tmp_path, *tables)[1]
    for text in ("{", "[]", '{"results": 3}'):
        (tmp_path / "study.json").write_text(text)
        for command in (tables, ("experiments/figures.py", "--study", "study.json")):
            code, error = run_in(tmp_path, *command)
            assert code == 2 and "study.json: cannot be read" in error


def test_the_noise_studys_table_and_figure(capsys):
    row = dict.fromkeys((*noise.COLUMNS, "first_lambda", "final_lambda", "largest_lambda"), 0.25)
    row |= {"still_lambda": 5, "lambda_max": 20}
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
    assert out.count("| repo |") == 5 + 5 and out.count(f"| {noise.MARGIN} |") == 2
    assert noise.figure(results).axes[0].get_title() == "5% of the labels flipped"


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
    names = ("true_unsafe_rate", "benign_reward")
    safe, repo = ([dict(zip(names, row)) for row in seed] for seed in rows)
    compared = seeds.compare({"sft": safe, "safe_rlhf": safe, "repo": repo})
    safer, helpful = compared["safer"], compared["as_helpful"]
    assert safer["estimate"] == pytest.approx(-0.435) and safer["draws"] == 1 and safer["seeds"] == 1
    assert safer["interval"] == pytest.approx((-0.49, -0.38))
    assert helpful["estimate"] == pytest.approx(6.8 / 8) and helpful["seeds"] == 0.5
    assert helpful["draws"] == pytest.approx(0.25, abs=0.02)  # both draws are the first seed
