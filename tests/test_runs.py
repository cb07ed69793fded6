"""A run's frame: flags that know their range, the demo's values, whose folder it is, how a script ends."""

import argparse
import errno
import importlib
import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest
from conftest import ENVIRONMENT, ROOT

from plumbing import checkpoints, cli, optim, runs
from plumbing.files import InputError, fingerprint, read_json, write_json

STAGES = ("sft", "reward_model", "cost_model", "safe_rlhf_ppo", "repo_ppo", "repo_rloo", "evaluate", "plots")

# ------------------------------------------------------------------------------ flags

WHOLE = ("count", "whole", "several")
NUMBERS = [  # what fits, what does not
    ("count", "1 7 2147483647", "0 -1 1.5 1e3 nan x 2147483648"),
    ("whole", "0 7", "-1 0.5 inf x"),
    ("several", "2 7", "1 0 2.5 x"),
    ("finite", "-3 0 1e-5", "nan inf -inf x"),
    ("positive", "1e-9 5", "0 -1 nan inf x"),
    ("nonnegative", "0 0.1 5e-6", "-0.1 nan inf"),
    ("fraction", "0 0.5 1", "-0.1 1.1 nan"),
    ("share", "1e-9 1", "0 1.1 nan"),
]


def refusal(parse, flags: list[str], capsys) -> str:
    """The one line with which flags are refused."""
    with pytest.raises(SystemExit) as exit:
        parse(flags)
    assert exit.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name, good, bad", NUMBERS)
def test_a_number_flag_takes_its_range_and_nothing_else(name, good, bad, capsys):
    parser, kind = argparse.ArgumentParser(prog="x.py"), getattr(cli, name)
    parser.add_argument("--flag", type=kind)
    for text in good.split():
        value = parser.parse_args([f"--flag={text}"]).flag
        assert value == float(text) and type(value) is (int if name in WHOLE else float)
    for text in bad.split():
        line = refusal(parser.parse_args, [f"--flag={text}"], capsys)
        assert line == f"x.py: error: argument --flag: must be {kind.wanted}, got {text}"


@pytest.mark.parametrize("script", (*STAGES, "tools.arena", "tools.plan"))
def test_help_tells_every_range_and_the_demos_values(script, capsys):
    module = importlib.import_module(script)
    declared = re.findall(r'flag\(\s*"--([a-z-]+)"[^)]*?type=(\w+)', Path(module.__file__).read_text())
    assert not [name for name, kind in declared if kind in ("int", "float")]  # every number has a range
    with pytest.raises(SystemExit) as exit:
        module.parse_args(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    for name, kind in declared:
        note = re.search(rf"--{name} .*?\[([^\]]*)\]", shown[shown.index("options:") :])
        wanted = getattr(getattr(cli, kind), "wanted", "")
        assert not wanted or (note and note[1].startswith(wanted)), name
    for value in getattr(module, "DEMO", {}).values():
        assert (f"default {value}" if isinstance(value, str) else "=".join(value[0])) in shown, value


REFUSED = [  # script, flags, what is said
    ("sft", "--model=", "argument --model: must be a name, got ''"),
    ("sft", "--model=\t", "argument --model: must be a name"),
    ("sft", "--steps=--", "--steps: expected a value"),
    ("sft", "--adapter=", "argument --adapter: must be a name"),
    ("sft", "--lora-targets=", "argument --lora-targets: must be a name"),
    ("safe_rlhf_ppo", "--ptx-dataset=\t", "argument --ptx-dataset: must be a name"),
    ("toy_world", "label --output o --responses=", "argument --responses: must be a name"),
    ("evaluate", "--policies a", "must be NAME=FOLDER, got 'a'"),
    ("evaluate", "--policies =x", "must be NAME=FOLDER, got '=x'"),
    ("evaluate", "--policies a=", "must be NAME=FOLDER, got 'a='"),
    (
        "sft",
        "--dataset d",
        "--dataset is given, so --model and --output-dir must be too: nothing of the demo",
    ),
    ("sft", "--model runs/demo/data/tiny_gpt2", "--model is given, so --dataset"),  # though it is the demo's
    ("cost_model", "--model m --dataset d --output-dir o", "--model is given, so --eval-dataset must be too"),
    ("plots", "--runs a=x", "--runs is given, so --evaluation and --output-dir must be too"),
    ("offline.satac", "--dataset d", "--dataset is given, so --output-dir must be too"),
]


@pytest.mark.parametrize("script, flags, said", REFUSED)
def test_flags_that_say_nothing_or_half_are_refused(script, flags, said, capsys):
    assert said in refusal(importlib.import_module(script).parse_args, flags.split(" "), capsys)


def test_the_demos_values_stand_in_for_what_is_not_given():
    import evaluate
    import repo_ppo
    import sft

    args = repo_ppo.parse_args(["--reward-model", "mine", "--output-dir", "here", "--ptx-dataset", ""])
    changed = {"reward_model": "mine", "output_dir": "here", "ptx_dataset": ""}
    assert {name: getattr(args, name) for name in repo_ppo.DEMO} == repo_ppo.DEMO | changed
    own = ["--prompts", "p", "--reward-model", "r", "--cost-model", "c", "--output-dir", "o", "--policies"]
    assert evaluate.parse_args([*own, "a=x=y", "b=z"]).policies == [("a", "x=y"), ("b", "z")]
    with pytest.raises(InputError, match="--policies needs distinct names, got a b a"):
        cli.by_name("--policies", [("a", "x"), ("b", "y"), ("a", "z")])
    assert sft.parse_args([]).from_config  # the demo's model has no weights; one's own has
    assert not sft.parse_args(["--model", "m", "--dataset", "d", "--output-dir", "o"]).from_config


TOGETHER = [  # flags, what is said of them; None: nothing
    ({"cpu_offload": True}, "--cpu-offload works with --fsdp only: add it"),
    ({"offload_frozen": True}, "--offload-frozen works with --fsdp only"),
    ({"lora_rank": 0, "lora_targets": ["q_proj"]}, "--lora-targets works with --lora-rank only"),
    ({"quantize": "int8", "lora_rank": 4, "fsdp": True}, "--quantize and --fsdp cannot go together"),
    ({"from_config": True, "lora_rank": 4}, "--from-config and --lora-rank cannot go together"),
    ({"max_new_tokens": 8, "max_length": 8}, "--max-new-tokens 8 leaves no room for a prompt"),
    ({"max_new_tokens": 7, "max_length": 8}, None),
    ({"minibatch_size": 6, "batch_size": 8}, "--minibatch-size 6 does not divide --batch-size 8"),
    ({"ranks": 3, "batch_size": 8}, "--batch-size 8 cannot be dealt evenly to 3 processes"),
    ({"group_size": 3, "batch_size": 8}, "--group-size 3 does not divide --batch-size 8"),
    ({"ranks": 2, "batch_size": 8, "minibatch_size": 32}, None),  # a small rollout is one minibatch
    ({"adapter": "a/adapter", "model": "b/../a/model", "lora_rank": 4}, "a/adapter merged into it"),
]


@pytest.mark.parametrize("flags, said", TOGETHER)
def test_flags_that_cannot_go_together(flags, said):
    args = argparse.Namespace(**{"fsdp": False, "ranks": 1} | flags)
    if said:
        with pytest.raises(InputError, match=said):
            cli.check_flags(args, args.ranks)
    else:
        cli.check_flags(args, args.ranks)
        assert getattr(args, "minibatch_size", 8) == 8


def test_a_model_is_fed_texts_of_the_form_it_was_trained_on(tmp_path):
    cli.check_template(SimpleNamespace(chat_template=True), f"{tmp_path}/model/")  # nobody knows its form
    for trained in (True, False):
        write_json(f"{tmp_path}/args.json", {"chat_template": trained})
        cli.check_template(SimpleNamespace(chat_template=trained), f"{tmp_path}/model/")
        told = "was trained {} --chat-template, and this run is {} it"
        with pytest.raises(InputError, match=told.format(*["without", "with", "without"][trained:][:2])):
            cli.check_template(SimpleNamespace(chat_template=not trained), f"{tmp_path}/model/")


def test_epochs_become_steps(capsys):
    for epochs, steps in ((1.5, 12), (0, 7)):
        args = argparse.Namespace(epochs=epochs, batch_size=128, steps=7)
        optim.set_steps(args, 1000)
        assert args.steps == steps
    assert capsys.readouterr().err == "1.5 epochs of 1,000 rows are 12 steps\n"


# ------------------------------------------------------------------------------ whose folder it is


def arguments(folder, **changes) -> argparse.Namespace:
    flags = {
        "steps": 5,
        "seed": 0,
        "lr": 0.1,
        "ranks": 2,
        "micro_batch_size": 4,
        "save_every": 0,
        "price": None,
    }
    flags |= dict.fromkeys(("fsdp", "overwrite", "resume", "resume_anyway", "tensorboard"), False)
    flags |= {"output_dir": str(folder), "model": f"{folder}/start", "dataset": f"{folder}/rows.jsonl"}
    return argparse.Namespace(**flags | changes)


@pytest.fixture
def used(tmp_path):
    """A folder in which a run of these flags has logged a line and saved after step 3."""
    (tmp_path / "rows.jsonl").write_text("1\n2\n")
    (tmp_path / "start").mkdir()
    (tmp_path / "start/weights").write_text("1")
    args = arguments(tmp_path)
    runs.claim_folder(args)
    write_json(f"{tmp_path}/args.json", vars(args))
    (tmp_path / "checkpoints/step-3").mkdir(parents=True)
    return tmp_path


ON = {"resume": True}
CLAIMS = [  # flags, what is said of them; None: the folder is theirs
    ({}, "holds a run: --resume it, lose it by --overwrite, or give another"),
    ({"overwrite": True}, None),
    ({"overwrite": True, "model": "{}/../{}/model"}, "--model .* is what this run replaces"),
    ({"overwrite": True, "adapter": "{}/adapter"}, "--adapter .* is what this run replaces"),
    (ON | {"overwrite": True}, "--overwrite starts afresh and --resume goes on: give one"),
    (ON, None),  # and where, on what and for how long it runs, it may do otherwise:
    (ON | {"fsdp": True, "micro_batch_size": 2, "save_every": 7, "steps": 9}, None),
    (ON | {"lr": 0.2, "ranks": 3}, "was another run: --lr 0.1 -> 0.2, --ranks 2 -> 3. Give its flags, or"),
    ({"resume_anyway": True, "lr": 0.2, "ranks": 3}, None),
    (ON | {"price": 0.0}, "--price None -> 0.0"),  # a price of 0 is not no price
    (ON | {"new_flag": None}, "--new-flag unknown -> None"),  # nobody knows what the run did
]


@pytest.mark.parametrize("flags, said", CLAIMS)
def test_a_used_folder_is_not_taken_by_chance_nor_a_run_mixed_with_another(used, flags, said):
    paths = {k: v.format(used, used.name) for k, v in flags.items() if isinstance(v, str)}
    if said:
        with pytest.raises(InputError, match=said):
            runs.claim_folder(arguments(used, **flags | paths))
    else:
        runs.claim_folder(arguments(used, **flags | paths))
    assert (used / "args.json").exists() and (used / "checkpoints/step-3").exists()  # nothing is lost yet


def test_what_is_in_the_folder_decides(used, tmp_path_factory):
    runs.claim_folder(arguments(used / "some/where"))
    assert (used / "some/where").is_dir()
    (used / "rows.jsonl").write_text("1\n3\n")  # as many bytes, under the same name
    (used / "start/weights").write_text("2")
    both = "was another run: --model holds something else, --dataset holds something else. Give"
    with pytest.raises(InputError, match=both):
        runs.claim_folder(arguments(used, resume=True))
    (used / "rows.jsonl").write_text("1\n2\n")
    (used / "start/weights").write_text("1")
    (used / "checkpoints/step-3").rmdir()
    runs.claim_folder(arguments(used, resume=True))  # stopped before its first checkpoint: from the start
    (used / "model").mkdir()
    with pytest.raises(InputError, match="holds a finished run without a checkpoint"):
        runs.claim_folder(arguments(used, resume=True))
    for content, said in (("[]", "args.json: holds no flags"), ("{", "args.json: cannot be read")):
        (used / "args.json").write_text(content)
        with pytest.raises(InputError, match=said):
            runs.claim_folder(arguments(used, resume=True))


def test_a_fingerprint_sees_both_ends_of_a_large_file_and_every_file_of_a_folder(tmp_path):
    path, seen, middle = tmp_path / "data/rows", set(), b"0" * 3 * 2**20
    path.parent.mkdir()
    for content in (b"", b"1", b"a" + middle + b"b", b"c" + middle + b"b", b"a" + middle + b"d", middle):
        path.write_bytes(content)
        assert fingerprint(str(path)) == fingerprint(str(path))
        seen |= {fingerprint(str(path)), fingerprint(str(path.parent))}
    assert len(seen) == 12
    assert fingerprint("PKU-Alignment/PKU-SafeRLHF:test") is None


def test_two_live_processes_do_not_write_into_one_folder(tmp_path):
    """And a lock ends with its process, however that ends."""
    code = "from plumbing import runs; runs.lock('.'); print('locked', flush=True); input()"
    options = {"cwd": tmp_path, "env": ENVIRONMENT | {"PYTHONPATH": str(ROOT)}, "text": True}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **options, **pipes) as holder:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(
            InputError, match="is locked: another process, here or on another machine, writes"
        ):
            runs.lock(str(tmp_path))
        holder.kill()
    runs.lock(str(tmp_path))


def test_where_files_cannot_be_locked_one_that_is_there_stands_for_it(tmp_path, monkeypatch):
    def unsupported(*_, **__):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", unsupported)
    runs.lock(str(tmp_path))
    other = runs._locks.pop(str(tmp_path))  # as if another process had it, or a machine had died with it
    with pytest.raises(InputError, match=rf"can leave its lock\), delete {tmp_path}/.lock.file"):
        runs.lock(str(tmp_path))
    (tmp_path / ".lock.file").unlink()
    runs.lock(str(tmp_path))
    assert other is not runs._locks[str(tmp_path)]


def test_such_a_lock_goes_with_a_rank_that_leaves_at_once(tmp_path):
    """runs.run ends a process of torchrun's by os._exit, which tidies nothing up."""
    code = (
        "from types import SimpleNamespace\nimport filelock\nfrom plumbing import runs\n"
        "runs._locks['.'] = filelock.SoftFileLock('.lock.file'); runs._locks['.'].acquire()\n"
        "runs.run(lambda args: print(runs.os.listdir()), SimpleNamespace(fsdp=False, cudnn_attention=False))"
    )
    ranks = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    options = {"cwd": tmp_path, "env": ENVIRONMENT | ranks | {"PYTHONPATH": str(ROOT)}, "text": True}
    done = subprocess.run([sys.executable, "-c", code], **options, capture_output=True)
    assert (done.stdout, done.returncode) == ("['.lock.file']\n", 0), done.stderr
    assert not list(tmp_path.iterdir())


def test_a_name_in_another_alphabet_is_read_under_an_ascii_locale(tmp_path):
    """And told on a stdout that has no such letters."""
    code = (
        "import sys\nfrom types import SimpleNamespace\nfrom plumbing import cli, files, runs\n"
        "def main(args):\n    name, _ = cli.named(sys.argv[1])\n    files.write_json(args.to, name)\n"
        "    print(name)\n"
        "runs.run(main, SimpleNamespace(to='name.json'))"
    )
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
    options = {"cwd": tmp_path, "env": ENVIRONMENT | ascii_only, "capture_output": True}
    done = subprocess.run([sys.executable, "-c", code, "安全=runs/x"], **options)
    assert (done.stdout, done.returncode) == (b"??\n", 0), done.stderr
    assert read_json(f"{tmp_path}/name.json") == "安全"


# ------------------------------------------------------------------------------ what a run writes


def test_an_old_run_goes_only_when_the_new_one_has_its_first_line(used, monkeypatch):
    monkeypatch.setattr(runs, "stop_on_signals", lambda: None)
    (used / "samples.jsonl").write_text('{"step": 0}\n')
    before = {p: p.is_file() and p.read_bytes() for p in used.rglob("*")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))  # as a full disk
    try:
        with pytest.raises(InputError, match="cannot be written"):
            runs.RunLog(arguments(used), "x", ()).metrics(0, {"cost": 1.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p: p.is_file() and p.read_bytes() for p in used.rglob("*")} == before
    runs.RunLog(arguments(used, seed=1), "x", ()).metrics(0, {"cost": 1.5})
    assert json.loads((used / "args.json").read_text())["seed"] == 1
    assert {p.name for p in used.iterdir()} == {".lock", "rows.jsonl", "start", "args.json", "metrics.jsonl"}


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
        log.metrics(first_step, {"cost": 1.5, "lambda": 2.0})
        assert not (tmp_path / "tensorboard").exists()
        scalars = [("cost", 1.5, first_step), ("lambda", 2.0, first_step)]
        assert written == [("tensorboard", first_step), *scalars, "on disk"]
        written.clear()
    log.close()
    monkeypatch.setattr(runs, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--tensorboard needs its package: pip install tensorboard"):
        runs.claim_folder(arguments(tmp_path / "new", tensorboard=True))


# ------------------------------------------------------------------------------ how a script ends

ENDS = [
    (InputError("no such thing"), 2, "x.py: error: no such thing\n"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (checkpoints.Stopped(7), 143, "stopped after step 7; the same command with --resume"),
]


@pytest.mark.parametrize("error, code, said", ENDS)
def test_bad_input_is_one_line_and_a_bug_keeps_its_traceback(error, code, said, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["some/x.py"])

    def fail(error):
        raise error

    with pytest.raises(SystemExit) as exit:
        runs.run(lambda _: fail(error), argparse.Namespace())
    text = capsys.readouterr().err
    assert exit.value.code == code and text.startswith(said) and text.count("\n") == 1
    with pytest.raises(ZeroDivisionError):
        runs.run(lambda _: 1 / 0, argparse.Namespace())


def test_what_a_terminal_cannot_show_ends_nothing():
    code = "from plumbing import runs; runs.run(lambda _: print('caf\\xe9 \\u6771\\u4eac'), None)"
    environment = ENVIRONMENT | {"PYTHONIOENCODING": "cp1252"}
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True)
    assert (shown.returncode, shown.stdout) == (0, b"caf\xe9 ??\n")
