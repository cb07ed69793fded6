"""The study's driver: what depends on what, what is done already, what fails; its tables and its figures."""

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT

from experiments import adapter_study, noise, remedies, seeds, study
from offline import study as satac_study
from plumbing.files import InputError, write_json

STUDY = "experiments/study.py"


def arguments(**changes) -> argparse.Namespace:
    return argparse.Namespace(**dict(seeds=2, steps=3, samples=1, output_dir="runs/study") | changes)


JOBS = {"study": study.study_jobs(arguments()), "rounds": study.rounds_jobs(arguments())}
LIMITS = {place.own: -1.234 for place in noise.places(arguments())}
JOBS["noise"] = noise.model_jobs(arguments()) + noise.policy_jobs(arguments(), LIMITS)
JOBS["seeds"] = seeds.pair_jobs(arguments())
JOBS["adapters"] = adapter_study.adapter_jobs(arguments(ranks=[4, 8]))
after = JOBS["study"] + JOBS["noise"] + remedies.remedy_jobs(arguments())
JOBS["satac"] = satac_study.satac_jobs(arguments(mixes=["mild", "unsafe"]))
JOBS["remedies"] = list({job["makes"]: job for job in after}.values())


@pytest.mark.parametrize("jobs", JOBS.values(), ids=JOBS)
def test_every_command_finds_what_it_needs(jobs):
    made = set()
    for job in jobs:
        assert set(job["needs"]) <= made, job
        assert job["makes"] not in made  # nothing is made twice
        made.add(job["makes"])
        first, second = job["command"][1:3]
        script = second.replace(".", "/") + ".py" if first == "-m" else first
        declared = (ROOT / script).read_text() + (ROOT / "plumbing/cli.py").read_text()
        for flag in job["command"][2:]:
            assert not flag.startswith("--") or f'"{flag}"' in declared, flag


def test_studies_that_share_a_folder_make_the_same_files_alike():
    shared = {}
    for job in sum(JOBS.values(), []):
        assert shared.setdefault(job["makes"], job["command"]) == job["command"]
    assert len(shared) < sum(map(len, JOBS.values()))


def test_the_advised_limit_is_what_is_run():
    commands = [" ".join(job["command"]) for job in JOBS["noise"]]
    assert sum("--threshold -1.23 " in command for command in commands) == 2 * len(noise.VARIANTS)


def test_all_baselines_of_the_papers_are_there_with_the_same_start_data_and_seed():
    jobs = study.study_jobs(arguments(seeds=1))
    ppo = [job["command"] for job in jobs if job["command"][1].endswith("_ppo.py")]
    for mix in study.MIXES:
        prompts = f"--dataset runs/study/seed0/data/prompts_{mix}_train.jsonl"
        mine = [command for command in ppo if prompts in " ".join(command)]
        own = {" ".join(c[c.index("--steps") + 2 :]).removesuffix("--overwrite").strip() for c in mine}
        assert {"--lambda-init 0", "--reward-shaping 1", "", "--threshold -2", "--threshold -5"} <= own
        assert sum("repo_ppo.py" in c for c in mine) == 1 and len(mine) == len(study.METHODS)
    for flag in ("--model", "--reward-model", "--cost-model", "--steps", "--seed"):
        assert len({command[command.index(flag) + 1] for command in ppo}) == 1


def write(path: Path, text: str) -> dict:
    return study.job(str(path), [], "-c", f"import pathlib; pathlib.Path({str(path)!r}).write_text({text!r})")


def test_jobs_run_in_order_once_and_stop_at_a_failure(tmp_path):
    first, second = write(tmp_path / "a/x.txt", "first"), write(tmp_path / "b/y.txt", "second")
    second["needs"] = [first["makes"]]
    study.run_jobs([second, first], 2)  # needs decide, not the order
    assert (tmp_path / "b/y.txt").read_text() == "second"
    (tmp_path / "a/x.txt").write_text("kept")
    study.run_jobs([first, second], 2)
    assert (tmp_path / "a/x.txt").read_text() == "kept"  # what is there is not run again
    failing = study.job(f"{tmp_path}/c/z.txt", [], "-c", "raise SystemExit('no such luck')")
    with pytest.raises(InputError, match="no such luck"):
        study.run_jobs([failing], 1)
    with pytest.raises(InputError, match="which nothing makes"):
        study.run_jobs([study.job(f"{tmp_path}/d/z.txt", [f"{tmp_path}/nowhere"], "-c", "pass")], 1)


def test_a_stopped_training_command_may_start_afresh():
    """What a kill left in a folder is no result, as no model is there: the study replaces it."""
    for job in JOBS["study"]:
        trains = job["makes"].endswith("/model/config.json")
        assert ("--overwrite" in job["command"]) == trains


def made_up_study() -> dict:
    """Two seeds; the numbers are random, their shape is study.json's."""
    rng = random.Random(0)

    def row() -> dict:
        return {key: rng.random() for key in study.COLUMNS} | {"true_reward": rng.random(), "batch_size": 8}

    def curves() -> dict:
        seeds = {key: [[rng.random() for _ in range(5)] for _ in range(2)] for key in ("cost", "unsafe_rate")}
        return seeds | {"lambda": [[rng.random() for _ in range(5)] for _ in range(2)]}

    return {
        "seeds": 2,
        "steps": 5,
        "score_models": [{"reward_accuracy": 0.8, "cost_sign_accuracy": 0.9}] * 2,
        "results": {mix: {name: [row(), row()] for name in ("sft", *study.METHODS)} for mix in study.MIXES},
        "curves": {mix: {name: curves() for name in study.METHODS} for mix in study.MIXES},
        "sft_costs": {mix: [[-1.0, 2.0], [1.0]] for mix in study.MIXES},
    }


def test_tables_and_figures_come_from_study_json(tmp_path, run_in, capsys):
    content = made_up_study()
    for row, rate in zip(content["results"]["balanced"]["repo"], (0.01, 0.03)):
        row["true_unsafe_rate"] = rate
    (tmp_path / "study.json").write_text(json.dumps(content))
    sft, repo = (
        {"true_unsafe_rate": 0.5308, "cost": 1},
        {"true_unsafe_rate": 0.01, "cost": -4, "final_lambda": 2},
    )
    (tmp_path / "rounds.json").write_text(json.dumps({"balanced": {"sft": [sft], "repo": [repo]}}))
    study.main(study.parse_args(["tables", "--output-dir", str(tmp_path)]))
    out = capsys.readouterr().out
    assert "| repo | 2.0 ± 1.4 |" in out and "RePO 1.0, 3.0%" in out and "| sft | 53.1 | 1.00 | - |" in out
    flags = ("--study", "study.json", "--output-dir", "figures")
    code, error = run_in(tmp_path, "experiments/figures.py", *flags)
    assert code == 0, error
    for name in ("mixes", "pareto", "lambdas"):
        assert (tmp_path / f"figures/{name}.png").stat().st_size > 10_000
        assert (tmp_path / f"figures/{name}.pdf").exists()


def test_a_file_that_is_no_study_is_refused_in_one_line(tmp_path, run_in):
    for text in ("{", "[]", '{"curves": 3}'):
        (tmp_path / "study.json").write_text(text)
        code, error = run_in(tmp_path, "experiments/figures.py", "--study", "study.json")
        assert code == 2 and "study.json: cannot be read" in error


def test_other_settings_are_not_mixed_in(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({"steps": 7}))
    with pytest.raises(InputError, match="other settings"):
        study.main(study.parse_args(["run", "--output-dir", str(tmp_path)]))


def test_runs_of_other_defaults_are_not_mixed_in(tmp_path):
    for seed, rate in enumerate((0.01, 0.01, 0.03)):
        write_json(f"{tmp_path}/{seed}/args.json", {"seed": seed, "model": str(seed), "kl_coeff": rate})
    changed = {"seed": 1, "kl_coeff": 0.01, "of_a_later_version": False}
    write_json(f"{tmp_path}/1/args.json", changed)
    study.check_same_flags([f"{tmp_path}/0", f"{tmp_path}/1"])
    with pytest.raises(InputError, match="2 and .*0 were run with another --kl-coeff"):
        study.check_same_flags([f"{tmp_path}/{seed}" for seed in range(3)])


def test_a_folder_that_cannot_be_had_is_one_clear_line(tmp_path, run_in):
    (tmp_path / "file").touch()
    code, error = run_in(tmp_path, STUDY, "run", "--output-dir", "file/x")
    assert code == 2 and "cannot write to --output-dir file/x (Not a directory)" in error


def test_tables_of_nothing_and_of_a_broken_file_are_one_clear_line(tmp_path, run_in):
    tables = ("tables", "--output-dir", tmp_path)
    assert "neither study.json nor rounds.json" in run_in(tmp_path, STUDY, *tables)[1]
    (tmp_path / "study.json").write_text("{")
    code, error = run_in(tmp_path, STUDY, *tables)
    assert code == 2 and "study.json: cannot be read" in error


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


def test_the_noise_studys_table_and_figure(capsys):
    row = dict.fromkeys(noise.COLUMNS, 0.25)
    results = {}
    for variant in noise.VARIANTS:
        names = noise.methods(variant)
        curves = {name: [{"learned": [0.5, 0.0], "true": [0.5, 0.1]}] * 2 for name in names}
        own = {"signs": [{"true": 0.99, "given": 0.9}] * 2, "limits": [-4.0, -4.5]}
        own |= {"policies": {name: [row, row] for name in ("sft", *names)}}
        results[variant] = own | {"curves": {} if variant == "none" else curves}
    noise.print_tables(results)
    out = capsys.readouterr().out
    assert "true sign right in 99.0 ± 0.0%" in out and "advised limit is -4.2 ± 0.4" in out
    assert out.count("| repo |") == 5 and out.count(f"| {noise.MARGIN} |") == 2
    titles = [ax.get_title() for ax in noise.figure(results).axes]
    assert titles[:4] == ["noise 0.05", "noise 0.1", "noise 0.2", "blind network"]


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
    figure = seeds.figure({"sft": safe, "safe_rlhf": safe, "repo": repo})
    assert [len(ax.collections) for ax in figure.axes] == [2, 2]
