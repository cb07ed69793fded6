"""Thousands of bad inputs: every flag with values that cannot be, every file that a script reads damaged in
every way, and models that do not fit. Each case is one run of a script's real entry point.

    .venv/bin/python benchmarks/bad_inputs.py                                # all of them, some minutes
    .venv/bin/python benchmarks/bad_inputs.py --cases 100 --seed 3           # a sample
    .venv/bin/python benchmarks/bad_inputs.py --only "repo_ppo.py.*nan"      # those whose name matches

A process that has imported torch and the scripts once forks for every case, so that a case takes a part of a
second. What a case may end in:

    clear        exit code 2, one line that names the flag or the file
    accepted     exit code 0, where the input may be good (a flipped bit of a weight is still a weight)
    traceback    any other end: a bug
    silent       exit code 0, though this input cannot be good
    unclear      exit code 2, and the line names neither flag nor file
    half         something unfinished is left, or an earlier run's files are changed
    hang         not done after a minute
"""

import argparse
import gzip
import importlib
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

SMALL = ["--batch-size", "4", "--micro-batch-size", "4", "--max-length", "48"]
SCORES = ["--reward-model", "reward", "--cost-model", "cost"]
PPO = ["--model", "policy", *SCORES, "--dataset", "data/prompts.jsonl", "--ptx-dataset", "data/sft.jsonl"]
PPO += [*SMALL, "--minibatch-size", "4", "--max-new-tokens", "6"]
PAIRS = ["--model", "policy", "--dataset", "data/pairs.jsonl", "--eval-dataset", "data/pairs.jsonl", *SMALL]
JUDGED = ["--policies", "a=policy", "b=run/model", *SCORES]
JUDGED += ["--prompts", "data/prompts.jsonl", "--samples", "1"]
OUT = ["--output-dir", "out"]
ONE = ["--steps", "1"]
# what runs as it is; every case spoils one thing of one of these
COMMANDS = {
    "sft.py": ["--model", "policy", "--dataset", "data/sft.jsonl", *SMALL, *ONE, *OUT],
    "reward_model.py": [*PAIRS, *ONE, *OUT],
    "cost_model.py": [*PAIRS, *ONE, *OUT],
    "safe_rlhf_ppo.py": [*PPO, *ONE, *OUT],
    "repo_ppo.py": [*PPO, *ONE, *OUT],
    "repo_ppo.py resumed": [*PPO, "--steps", "3", "--resume", "--output-dir", "run"],
    "evaluate.py": [*JUDGED, *OUT],
    "plots.py": ["--evaluation", "evaluation", "--runs", "b=run", *OUT],
    "tools.arena": ["--evaluation", "evaluation", "--judge", "truth", "--bootstrap", "10"],
    "tools.plan": ["--gpus", "2", "repo_ppo.py", *PPO, *OUT],
    "toy_world.py label": ["--responses", "evaluation/responses.jsonl", "--output", "out/labelled.jsonl"],
    "toy_world.py preferences": ["--policy", "policy", "--pairs", "4", "--samples", "1", *OUT],
}
# the files that each of them cannot do without
MODEL = ("config.json", "model.safetensors", "tokenizer.json")
POLICY = [*(f"policy/{name}" for name in MODEL), "policy/tokenizer_config.json"]
SCORERS = [f"{kind}/{name}" for kind in ("reward", "cost") for name in MODEL]
RUN = ["run/args.json", "run/metrics.jsonl"]
SAVED = [f"run/checkpoints/step-2/{name}" for name in ("extra.json", ".metadata", "__0_0.distcp")]
FILES = {
    "sft.py": [*POLICY, "data/sft.jsonl"],
    "reward_model.py": [*POLICY, "data/pairs.jsonl"],
    "cost_model.py": [*POLICY, "data/pairs.jsonl"],
    "safe_rlhf_ppo.py": [*POLICY, *SCORERS, "data/prompts.jsonl", "data/sft.jsonl"],
    "repo_ppo.py": [*POLICY, *SCORERS, "data/prompts.jsonl", "data/sft.jsonl"],
    "repo_ppo.py resumed": [*RUN, *SAVED],
    "evaluate.py": [*POLICY, *SCORERS, "data/prompts.jsonl"],
    "plots.py": ["evaluation/responses.jsonl", *RUN],
    "tools.arena": ["evaluation/responses.jsonl"],
    "tools.plan": ["policy/config.json", "reward/config.json"],
    "toy_world.py label": ["evaluation/responses.jsonl"],
    "toy_world.py preferences": POLICY,
}


# ------------------------------------------------------------------------------ ways to spoil


def damages(path: str, text: bytes, rng: random.Random) -> dict[str, tuple[bytes | None, bool]]:
    """name -> (the file's new content, or None for no file; whether it must then be refused)."""
    half, place = len(text) // 2, rng.randrange(max(1, len(text)))
    flipped = bytearray(text)
    if text:
        flipped[place] ^= 1 << rng.randrange(8)
    # a tokenizer_config.json may be missing or empty of keys: tokenizer.json says enough
    optional = path.endswith("tokenizer_config.json")
    kinds = {
        "missing": (None, not optional and not path.endswith(("args.json", "metrics.jsonl"))),
        "empty": (b"", not path.endswith(("metrics.jsonl",))),
        "cut": (text[:half], path.endswith((".json", ".safetensors", ".metadata", ".distcp"))),
        "noise": (rng.randbytes(200), True),
        "zeros": (bytes(len(text)), True),
        "gzip": (gzip.compress(text), True),
        "flipped bit": (bytes(flipped), False),
        "appended noise": (text + rng.randbytes(50), path.endswith((".json", ".jsonl"))),
    }
    if path.endswith((".json", ".jsonl")):
        kinds |= {
            "UTF-16": (text.decode().encode("utf-16"), True),
            "latin-1": (b'{"prompt": "caf\xe9"}\n' + text, True),
            "null": (b"null\n", True),
            "list": (b"[]\n", True),
            "object": (b"{}\n", not path.endswith(("config.json", "args.json"))),
            "number": (b"7\n", True),
            "text": (b'"text"\n', True),
            "deep nesting": (b"[" * 100_000 + b"]" * 100_000, True),
            "long integer": (b'{"prompt": ' + b"9" * 5000 + b"}\n", True),
            "lone surrogate": (b'{"prompt": "\\ud800"}\n' + (text if path.endswith("l") else b""), True),
        }
        if path.endswith(".jsonl"):
            rows = [json.loads(line) for line in text.splitlines()]
            for number in range(8):  # one field of one row
                row = rng.randrange(len(rows))
                value = rng.choice([None, [], {}, True, "x", -1, 1e400, math.nan])
                field = rng.choice(sorted(rows[row]))
                changed = [dict(r) for r in rows]
                if number % 3:
                    changed[row][field] = value
                    name = f"{field} of row {row} is {value!r:.12}"
                else:
                    del changed[row][field]
                    name = f"{field} of row {row} is gone"
                kinds[name] = ("".join(json.dumps(r) + "\n" for r in changed).encode(), False)
        else:
            content = json.loads(text)
            for _ in range(10):
                field = rng.choice(sorted(content)) if isinstance(content, dict) else None
                value = rng.choice([None, [], {}, "x", -1, 0, 10**9, math.nan])
                if field is not None:
                    changed = json.dumps(content | {field: value}).encode()
                    kinds[f"{field} is {value!r:.12}"] = (changed, False)
    return kinds


PLACES = ("", "nowhere", "/", "data/sft.jsonl/x", "policy/config.json", "~/x", "=", "x" * 5000)
MISFITS = ("layer", "broadcast", "missing", "nan", "context", "no tokenizer", "pickle")
NUMBERS = ("nan", "inf", "-inf", "1e999", "abc", "", "1,5", "--", "0x10", "9" * 30, "-1", "0", "0.5", "2")


def bad_value(flag: str, kind: str, value: str) -> bool:
    """Whether a flag of this kind (the `wanted` of runs.py) cannot have this value."""
    try:
        number = float(value)
    except ValueError:
        return True
    if number != number or abs(number) == float("inf"):
        return True
    if "whole" in kind and (number != int(number) or "." in value or number > 2**31):
        return True
    low, high = (1 if "from 1" in kind else 0 if "from 0" in kind or "above 0" in kind else -1e300), 1e300
    if "to 1" in kind or "at most 1" in kind:
        high = 1
    return not low <= number <= high or ("above 0" in kind and number == 0)


def cases(folder: Path, rng: random.Random) -> list[dict]:
    """{name, script, argv, spoil: {path: bytes or None}, must_fail, says}: every case there is."""
    found = []

    def add(script, what, argv=None, spoil=None, must_fail=True, says=()):
        base = COMMANDS[script]
        case = {"name": f"{script}: {what}", "script": script.split()[0], "spoil": spoil or {}, "says": says}
        words = script.split()[1:] if script.startswith("toy_world") else []
        found.append(case | {"argv": words + (base if argv is None else argv), "must_fail": must_fail})

    for script, argv in COMMANDS.items():
        for flag, kind in number_flags(script):
            for value in NUMBERS:
                given = [*argv, f"{flag}={value}"]
                if script == "tools.plan":
                    given = [f"{flag}={value}", *argv]  # the plan's own flags stand first
                    if value == "--":
                        continue  # argparse takes it for their end
                must_fail = bad_value(flag, kind, value)
                # a value that is merely unwise may fail later, for what it did
                says = (flag,) if must_fail else ()
                add(script, f"{flag}={value:.12}", given, must_fail=must_fail, says=says)
        for i, word in enumerate(argv):
            if word.startswith("--") and re.match(r"[a-z]", "".join(argv[i + 1 : i + 2])):
                for value in PLACES:
                    failing = value in ("", "nowhere", "data/sft.jsonl/x") and not word.startswith("--output")
                    may_be_empty = word in ("--ptx-dataset", "--eval-dataset") and value == ""
                    may_be_empty |= script == "tools.plan" and "dataset" in word  # it reads no data
                    spoilt = [*argv[: i + 1], value, *argv[i + 2 :]]
                    says, must_fail = (word, value[:40]) if value else (word,), failing and not may_be_empty
                    add(script, f"{word} {value[:12]!r}", spoilt, must_fail=must_fail, says=says)
        for path in FILES[script]:
            text = (folder / path).read_bytes()
            for name, (content, must_fail) in damages(path, text, rng).items():
                if script == "tools.plan" and name == "flipped bit":
                    continue
                # the parent, because a library may name the folder that it was given
                says = (path, os.path.dirname(path), os.path.basename(path))
                add(script, f"{path} {name}", spoil={path: content}, must_fail=must_fail, says=says)
    for script in ("sft.py", "repo_ppo.py", "evaluate.py", "toy_world.py preferences"):
        for name in ("vocabulary", *MISFITS):
            add(script, f"policy with {name}", spoil={"policy": name}, says=("policy",))
    for script in ("repo_ppo.py", "safe_rlhf_ppo.py", "evaluate.py"):
        for name in MISFITS:
            add(script, f"reward with {name}", spoil={"reward": name}, says=("reward",))
    for script in ("sft.py", "repo_ppo.py"):
        for left in (("RANK",), ("RANK", "WORLD_SIZE"), ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
            add(script, f"only {' '.join(left)} set", spoil={"environment": left}, says=("RANK",))
    return found


def number_flags(script: str) -> list[tuple[str, str]]:
    """(flag, kind) of every number flag of a script, as it declares them."""
    name, words = script.split()[0].removesuffix(".py"), script.split()[1:]
    toy = name == "toy_world"  # whose commands have flags of their own
    found, original = {}, argparse._ActionsContainer.add_argument

    def spy(self, *names, **options):
        kind = getattr(options.get("type"), "wanted", "")
        if kind and not (toy and getattr(self, "prog", "").split()[-1:] != words):
            found[names[0]] = kind
        return original(self, *names, **options)

    argparse._ActionsContainer.add_argument = spy
    try:
        importlib.import_module(name).parse_args([*(words if toy else []), *COMMANDS[script]])
    finally:
        argparse._ActionsContainer.add_argument = original
    return list(found.items())


def spoil_model(folder: Path, how: str) -> None:
    """Make a model folder that does not fit in itself."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = folder / "model.safetensors"
    state, config = load_file(weights), json.loads((folder / "config.json").read_text())
    matrix = next(name for name in sorted(state) if name.endswith("wte.weight"))
    if how == "vocabulary":
        state[matrix] = state[matrix][:-1].clone()
    elif how == "layer":
        state = {name: tensor for name, tensor in state.items() if ".h.1." not in name}
    elif how == "broadcast":
        name = next(name for name in sorted(state) if name.endswith("ln_f.weight"))
        state[name] = state[name][:1].clone()
    elif how == "missing":
        del state[next(name for name in sorted(state) if name.endswith("mlp.c_fc.weight"))]
    elif how == "nan":
        state[matrix][0, 0] = float("nan")
        state[matrix][5:] = float("nan")
    elif how == "context":
        name = next(name for name in sorted(state) if name.endswith("wpe.weight"))
        state[name], config["n_positions"] = state[name][:16].clone(), 16
    elif how == "no tokenizer":
        for path in folder.glob("*token*"):
            path.unlink()
    if how == "pickle":

        class Evil:
            def __reduce__(self):
                return (Path("ran").touch, ())

        weights.unlink()
        torch.save({matrix: state[matrix], "x": Evil()}, folder / "pytorch_model.bin")
    else:
        save_file(state, weights, metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))


# ------------------------------------------------------------------------------ one case


def call(script: str, argv: list[str]) -> None:
    """As `python script argv` or `python -m script argv`."""
    sys.argv = [script, *argv]
    if script.endswith(".py"):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


def fork(folder: Path, script: str, argv: list[str], environment=()) -> int:
    """Start a script in a forked process with `folder` as its own; its output goes to folder/output."""
    if child := os.fork():
        return child
    try:
        os.setsid()
        os.chdir(folder)
        os.environ |= dict.fromkeys(environment, "0")
        output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(output, number)
        call(script, argv)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def prepare(folder: Path) -> None:
    """Tiny models, data, a run with a checkpoint, and its evaluation."""
    import torch

    import toy_world
    from plumbing.files import write_jsonl
    from recipes.rehearsal import write_data, write_models

    torch.manual_seed(0)
    config = toy_world.build_config()
    config.n_embd, config.n_head = 16, 2
    write_models(str(folder), config)
    write_data(f"{folder}/data", 40)
    write_jsonl(f"{folder}/data/prompts.jsonl", [{"prompt": p} for p in toy_world.split_prompts()[0][::40]])
    first = [*PPO, "--steps", "2", "--save-every", "1", "--keep", "1", "--output-dir", "run"]
    for script, argv in (("repo_ppo.py", first), ("evaluate.py", [*JUDGED, "--output-dir", "evaluation"])):
        if os.waitstatus_to_exitcode(os.waitpid(fork(folder, script, argv), 0)[1]):
            raise SystemExit(f"{script} fails by itself: {(folder / 'output').read_text()[-2000:]}")


def fingerprint(folder: Path) -> dict[str, bytes]:
    """What an earlier run left, which a run that fails must not change."""
    kept = [p for p in (folder / "run").rglob("*") if p.is_file() and p.name not in (".lock", ".pid")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept}


def start(case: dict, world: Path, folder: Path) -> dict:
    shutil.copytree(world, folder)
    for path, content in case["spoil"].items():
        if path == "environment":
            continue
        if isinstance(content, str):
            spoil_model(folder / path, content)
        else:
            (folder / path).unlink()
            if content is not None:
                (folder / path).write_bytes(content)
    before = fingerprint(folder)
    environment = case["spoil"].get("environment", ())
    pid = fork(folder, case["script"], case["argv"], environment)
    return case | {"folder": folder, "pid": pid, "before": before, "until": time.monotonic() + 60}


def judge(case: dict, code: int | None) -> tuple[str, str]:
    """(kind, what it said)"""
    folder = case["folder"]
    output = (folder / "output").read_text(errors="replace") if (folder / "output").exists() else ""
    last = (output.strip().splitlines() or [""])[-1]
    if code is None:
        return "hang", last
    if "Traceback" in output or code not in (0, 2):
        return "traceback", last
    left = any(p.name.endswith(("unfinished", ".tmp", ".old")) for p in folder.rglob("*"))
    if left or (folder / "ran").exists() or (code and fingerprint(folder) != case["before"]):
        return "half", last
    if code == 0:
        return ("silent" if case["must_fail"] else "accepted"), last
    named = "error: " in last and (not case["says"] or any(word and word in last for word in case["says"]))
    return ("clear" if named else "unclear"), last


def campaign(chosen: list[dict], world: Path, jobs: int, show=print) -> Counter:
    """Run the cases, `jobs` at a time; what is neither clear nor accepted is shown."""
    counts, waiting, running = Counter(), list(chosen), []
    with tempfile.TemporaryDirectory() as base:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(start(waiting.pop(), world, Path(base) / str(len(waiting))))
            time.sleep(0.01)
            for case in list(running):
                done, status = os.waitpid(case["pid"], os.WNOHANG)
                if not done and time.monotonic() > case["until"]:
                    os.killpg(case["pid"], signal.SIGKILL)
                    os.waitpid(case["pid"], 0)
                elif not done:
                    continue
                kind, said = judge(case, os.waitstatus_to_exitcode(status) if done else None)
                counts[kind] += 1
                if kind not in ("clear", "accepted"):
                    show(f"{kind:<10} {case['name']}\n           {said[:300]}")
                shutil.rmtree(case["folder"])
                running.remove(case)
    return counts


def main(args) -> None:
    import torch

    for name in (*COMMANDS, "datasets"):  # imported once, before the forks
        importlib.import_module(name.split()[0].removesuffix(".py"))

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as base:
        world = Path(base) / "world"
        world.mkdir()
        prepare(world)
        rng = random.Random(args.seed)
        chosen = [case for case in cases(world, rng) if re.search(args.only, case["name"])]
        total = len(chosen)
        if args.cases:
            chosen = rng.sample(chosen, min(args.cases, total))
        counts = campaign(chosen, world, args.jobs)
    print(
        f"{len(chosen)} of {total} cases: " + ", ".join(f"{counts[kind]} {kind}" for kind in sorted(counts))
    )
    raise SystemExit(any(counts[kind] for kind in counts if kind not in ("clear", "accepted")))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=0, help="a random sample of so many (0: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample and of the damages")
    parser.add_argument("--only", default="", help="a regular expression for the cases' names")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    main(parser.parse_args())
