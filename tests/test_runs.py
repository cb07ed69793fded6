"""A run's frame: flags that know their range, the demo's defaults, and whose folder it is."""

import argparse
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ENVIRONMENT, ROOT

from plumbing import checkpoints, cli, runs
from plumbing.cli import Demo
from plumbing.files import InputError

TRAINING = ("sft", "reward_model", "cost_model", "safe_rlhf_ppo", "repo_ppo")
STARTED = (
    *TRAINING,
    "evaluate",
    "plots",
    "tools.arena",
    "tools.plan",
    "experiments.study",
    "experiments.figures",
)

# ------------------------------------------------------------------------------ flags

NUMBERS = [  # what fits, what does not
    ("count", "1 7 2147483647", "0 -1 1.5 1e3 nan x 2147483648"),
    ("whole", "0 7", "-1 0.5 inf x"),
    ("finite", "-3 0 1e-5", "nan inf -inf x"),
    ("positive", "1e-9 5", "0 -1 nan inf x"),
    ("nonnegative", "0 0.1 5e-6", "-0.1 nan inf"),
    ("fraction", "0 0.5 1", "-0.1 1.1 nan"),
    ("share", "1e-9 1", "0 1.1 nan"),
]


@pytest.mark.parametrize("name, good, bad", NUMBERS)
def test_a_number_flag_takes_its_range_and_nothing_else(name, good, bad, capsys):
    parser = argparse.ArgumentParser(prog="x.py")
    parser.add_argument("--flag", type=getattr(runs, name))
    for text in good.split():
        value = parser.parse_args([f"--flag={text}"]).flag
        assert value == float(text) and type(value) is (int if name in ("count", "whole") else float)
    for text in bad.split():
        with pytest.raises(SystemExit) as exit:
            parser.parse_args([f"--flag={text}"])
        last = capsys.readouterr().err.splitlines()[-1]
        wanted = getattr(runs, name).wanted
        assert exit.value.code == 2 and last == f"x.py: error: argument --flag: must be {wanted}, got {text}"


@pytest.mark.parametrize("script", STARTED)
def test_help_tells_every_range_and_default(script, capsys):
    path = ROOT / (script.replace(".", "/") + ".py")
    declared = re.findall(r'flag\(\s*"--([a-z-]+)"[^)]*?type=(?:runs\.)?(\w+)', path.read_text())
    assert not [name for name, kind in declared if kind in ("int", "float")]  # every number has a range
    with pytest.raises(SystemExit) as exit:
        importlib.import_module(script).parse_args(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    for name, kind in declared:
        wanted = getattr(getattr(runs, kind), "wanted", "")
        note = re.search(rf"--{name} .*?\[([^\]]*)\]", shown[shown.index("options:") :])
        assert not wanted or (note and note[1].startswith(wanted)), name


def test_help_by_hand(capsys):
    with pytest.raises(SystemExit):
        importlib.import_module("evaluate").parse_args(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "sampling temperature (0: greedy) [a number from 0, default 1.0]" in shown
    assert "responses per prompt [a whole number from 1, default 8]" in shown
    assert (
        "[default sft=runs/demo/sft/model safe_rlhf=runs/demo/safe_rlhf/model repo=runs/demo/repo/" in shown
    )
    assert "(FSDP2; needs torchrun) --" in shown  # a switch has no default to tell
    assert "[a number, default 0.0]" in shown  # of --threshold: 0 is a default


def test_named_folders(capsys):
    args = importlib.import_module("evaluate").parse_args
    own = ["--prompts", "p.jsonl", "--reward-model", "r", "--cost-model", "c", "--output-dir", "o"]
    assert args([*own, "--policies", "a=x=y", "b=z"]).policies == [("a", "x=y"), ("b", "z")]
    for wrong in ("a", "=x", "a=", " =x"):
        with pytest.raises(SystemExit):
            args([*own, "--policies", wrong])
        assert f"must be NAME=FOLDER, got {wrong!r}" in capsys.readouterr().err
    with pytest.raises(InputError, match="--policies needs distinct names, got a b a"):
        cli.by_name("--policies", [("a", "x"), ("b", "y"), ("a", "z")])


# ------------------------------------------------------------------------------ the demo's defaults


def demo_parser() -> argparse.ArgumentParser:
    parser = cli.parser("about")
    for name in ("model", "dataset", "reward-model", "ptx-dataset"):
        parser.add_argument(f"--{name}", default=Demo(f"runs/demo/{name}"))
    parser.add_argument("--output-dir", type=cli.path_name, default=Demo("runs/demo/out"))
    parser.add_argument("--runs", nargs="+", type=cli.named, default=[("a", Demo("runs/demo/a"))])
    return parser


def test_without_models_or_data_of_ones_own_everything_is_the_demos():
    args = cli.parse(demo_parser(), [])
    assert args.model == "runs/demo/model" and args.output_dir == "runs/demo/out"
    assert cli.of_demo(args.model) and cli.of_demo(args.runs)
    args = cli.parse(demo_parser(), ["--reward-model", "mine", "--output-dir", "here"])
    assert (args.model, args.reward_model, args.output_dir) == ("runs/demo/model", "mine", "here")


def test_whoever_gives_models_or_data_gives_all_of_them(capsys):
    rest = ["--reward-model", "r", "--output-dir", "o", "--runs", "a=x"]
    for given, missing in (
        (["--model", "m"], "--dataset and --reward-model and --ptx-dataset and --output-dir and --runs"),
        (["--model", "runs/demo/model"], "--dataset and --reward-model"),  # given, though the demo's
        (["--dataset", "d"], "--model and --reward-model"),
        (["--model", "m", "--dataset", "d", *rest], "--ptx-dataset"),
    ):
        with pytest.raises(SystemExit) as exit:
            cli.parse(demo_parser(), given)
        last = capsys.readouterr().err.splitlines()[-1]
        assert exit.value.code == 2 and f"{given[0]} is given, so {missing}" in last
        assert last.endswith("must be too: nothing of the demo is taken")
    args = cli.parse(demo_parser(), ["--model", "m", "--dataset", "d", *rest, "--ptx-dataset", ""])
    assert args.ptx_dataset == "" and args.runs == [("a", "x")]


@pytest.mark.parametrize("script", TRAINING)
def test_no_script_takes_a_path_of_the_demo_beside_ones_own(script):
    args = vars(importlib.import_module(script).parse_args([]))
    paths = [name for name, value in args.items() if isinstance(value, str) and "runs/demo" in value]
    assert paths and all(cli.of_demo(args[name]) for name in paths)


# ------------------------------------------------------------------------------ whose folder it is


def arguments(folder, **changes) -> argparse.Namespace:
    flags = {"steps": 5, "seed": 0, "lr": 0.1, "model": "m", "micro_batch_size": 4, "save_every": 0}
    flags |= dict.fromkeys(("fsdp", "overwrite", "resume", "resume_anyway", "tensorboard"), False)
    return argparse.Namespace(**flags | {"output_dir": str(folder)} | changes)


@pytest.fixture
def used(tmp_path):
    """A folder in which a run of these flags has logged a line and saved after step 3."""
    (tmp_path / "args.json").write_text(json.dumps(vars(arguments(tmp_path))))
    (tmp_path / "checkpoints/step-3").mkdir(parents=True)
    return tmp_path


def test_a_new_folder_is_made_and_a_used_one_is_not_taken_by_chance(tmp_path, used):
    runs.claim_folder(arguments(tmp_path / "some/where"))
    assert (tmp_path / "some/where").is_dir()
    with pytest.raises(InputError, match="holds a run: --resume it, lose it by --overwrite, or give another"):
        runs.claim_folder(arguments(used))
    runs.claim_folder(arguments(used, overwrite=True))
    assert (used / "args.json").exists() and (used / "checkpoints/step-3").exists()  # nothing is lost yet


def test_a_resumed_run_has_the_flags_that_it_had(used):
    runs.claim_folder(arguments(used, resume=True))
    # where, on what and for how long it runs, it may do otherwise
    runs.claim_folder(arguments(used, resume=True, fsdp=True, micro_batch_size=2, save_every=7, steps=9))
    with pytest.raises(InputError) as error:
        runs.claim_folder(arguments(used, resume=True, lr=0.2, model="other"))
    assert "was another run: --lr 0.1 -> 0.2, --model m -> other. Give its flags, or" in str(error.value)
    runs.claim_folder(arguments(used, resume_anyway=True, lr=0.2, model="other"))
    # flags of a later version: as they are when they are not given, and given
    runs.claim_folder(arguments(used, resume=True, ensemble=None, rate=0.1, quick=False))
    for flag, off, value in (("ensemble", None, "folder"), ("quick", False, True)):
        with pytest.raises(InputError, match=f"was another run: --{flag} {off} -> {value}"):
            runs.claim_folder(arguments(used, resume=True, **{flag: value}))
    # a price of 0 is not no price
    (used / "args.json").write_text(json.dumps(vars(arguments(used, reward_shaping=None))))
    with pytest.raises(InputError, match="--reward-shaping None -> 0.0"):
        runs.claim_folder(arguments(used, resume=True, reward_shaping=0.0))
    with pytest.raises(InputError, match="has done 3 steps, and --steps 2 asks for fewer"):
        runs.claim_folder(arguments(used, resume=True, steps=2))


def test_nothing_is_lost_by_resuming_or_by_reading_what_is_replaced(used):
    with pytest.raises(InputError, match="--overwrite starts afresh and --resume goes on: give one of them"):
        runs.claim_folder(arguments(used, resume=True, overwrite=True))
    (used / "model").mkdir()
    for flags in ({"model": f"{used}/../{used.name}/model"}, {"adapter": f"{used}/adapter"}):
        with pytest.raises(InputError, match=f"--{[*flags][0]} .* is what this run replaces"):
            runs.claim_folder(arguments(used, overwrite=True, **flags))
    runs.claim_folder(arguments(used, resume=True))  # there is a checkpoint
    (used / "checkpoints/step-3").rmdir()
    with pytest.raises(InputError, match="holds a finished run without a checkpoint .--save-every., from"):
        runs.claim_folder(arguments(used, resume=True))
    (used / "model").rmdir()
    runs.claim_folder(arguments(used, resume=True))  # stopped before its first checkpoint: from the start


def test_a_model_is_fed_texts_of_the_form_it_was_trained_on(tmp_path):
    model = str(tmp_path / "model/")
    for trained, run, words in ((True, False, ("with", "without")), (False, True, ("without", "with"))):
        cli.check_template(SimpleNamespace(chat_template=run), model)  # nobody knows how it was trained
        (tmp_path / "args.json").write_text(json.dumps({"chat_template": trained}))
        cli.check_template(SimpleNamespace(chat_template=trained), model)
        told = "was trained {} --chat-template, and this run is {} it".format(*words)
        with pytest.raises(InputError, match=told):
            cli.check_template(SimpleNamespace(chat_template=run), model)
        (tmp_path / "args.json").unlink()


def test_flags_that_cannot_be_read_are_said(used):
    (used / "args.json").write_text("[]")
    with pytest.raises(InputError, match="args.json: holds no flags"):
        runs.claim_folder(arguments(used, resume=True))
    (used / "args.json").write_text("{")
    with pytest.raises(runs.InputError, match="args.json: cannot be read"):
        runs.claim_folder(arguments(used, resume=True))


def test_two_live_processes_do_not_write_into_one_folder(tmp_path):
    """Whatever their flags say; and a lock ends with its process, however that ends."""
    flags = "output_dir='.', overwrite=False, tensorboard=False"
    claim = f"import argparse, runs; runs.claim_folder(argparse.Namespace({flags}))"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{claim}; print('claimed', flush=True); input()"],
        cwd=tmp_path,
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "claimed\n"
    for flags in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(InputError, match=f"process {holder.pid} writes there. End it first"):
            runs.claim_folder(arguments(tmp_path, **flags))
    holder.kill()
    holder.communicate()
    runs.claim_folder(arguments(tmp_path))


def test_tensorboard_gets_every_metric_and_a_resumed_run_replaces_its_steps(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((Path(folder).relative_to(tmp_path).as_posix(), purge_step))

        def add_scalar(self, *scalar):
            written.append(scalar)

        def flush(self):
            written.append("on disk")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr(runs, "stop_on_signals", lambda: None)
    (tmp_path / "tensorboard").mkdir()  # an older run's
    for first_step in (0, 3):
        log = runs.RunLog(arguments(tmp_path, tensorboard=True), "x", (), first_step)
        assert first_step or not written  # nothing before the first line
        log.metrics(first_step, {"cost": 1.5, "lambda": 2.0})
        assert not (tmp_path / "tensorboard").exists()
    log.close()
    half = len(written) // 2
    for first_step, calls in ((0, written[:half]), (3, written[half:])):
        scalars = [("cost", 1.5, first_step), ("lambda", 2.0, first_step)]
        assert calls == [("tensorboard", first_step), *scalars, "on disk"]


def test_tensorboard_without_its_package_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--tensorboard needs its package: pip install tensorboard"):
        runs.claim_folder(arguments(tmp_path / "new", tensorboard=True))
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------ how a script ends


def ended(main, args, capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exit:
        runs.run(main, args)
    return exit.value.code, capsys.readouterr().err


def test_bad_input_is_one_line_and_a_bug_keeps_its_traceback(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["some/x.py"])

    def fail(error):
        raise error

    args = argparse.Namespace()
    assert ended(lambda _: fail(InputError("no such thing")), args, capsys) == (
        2,
        "x.py: error: no such thing\n",
    )
    assert ended(lambda _: fail(KeyboardInterrupt()), args, capsys)[0] == 130
    code, text = ended(lambda _: fail(checkpoints.Stopped(7)), args, capsys)
    assert code == 143 and text.startswith("stopped after step 7; the same command with --resume")
    with pytest.raises(ZeroDivisionError):
        runs.run(lambda _: 1 / 0, args)


def test_flags_that_cannot_go_together():
    def check(ranks: int = 1, **flags) -> None:
        cli.check_flags(argparse.Namespace(**{"fsdp": False} | flags), ranks)

    for flags, message in (
        ({"cpu_offload": True}, "--cpu-offload works on shards: add --fsdp"),
        ({"offload_frozen": True}, "--offload-frozen works on shards: add --fsdp"),
        ({"fsdp": True, "offload_frozen": True, "lora_rank": 4}, "--offload-frozen finds nothing to move"),
        (
            {"lora_rank": 0, "lora_targets": ["q_proj"]},
            "--lora-targets says where adapters go: give their rank",
        ),
        ({"max_new_tokens": 8, "max_length": 8}, "--max-new-tokens 8 leaves no room for a prompt"),
        ({"minibatch_size": 6, "batch_size": 8}, "--minibatch-size 6 does not divide --batch-size 8"),
        ({"ranks": 3, "batch_size": 8}, "--batch-size 8 cannot be dealt evenly to 3 processes"),
    ):
        with pytest.raises(InputError, match=message):
            check(**flags)
    check(fsdp=True, offload_frozen=True, lora_rank=4, second_cost_model="folder")
    check(ranks=2, batch_size=8, minibatch_size=4, max_new_tokens=7, max_length=8)
    args = argparse.Namespace(fsdp=False, batch_size=8, minibatch_size=32)
    cli.check_flags(args, 1)
    assert args.minibatch_size == 8  # a small rollout is one minibatch


def test_epochs_become_steps(capsys):
    args = argparse.Namespace(epochs=1.5, batch_size=128, steps=7)
    cli.set_steps(args, 1000)
    assert args.steps == 12 and "1.5 epochs of 1,000 rows are 12 steps" in capsys.readouterr().err
    args = argparse.Namespace(epochs=0, batch_size=128, steps=7)
    cli.set_steps(args, 1000)
    assert args.steps == 7
