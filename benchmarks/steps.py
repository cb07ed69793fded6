"""PPO steps of repo_ppo.py on random weights of any shape, one at a time. What the other files here share:

    SHAPES      the shapes that are measured
    build       three checkpoints and the data of a shape
    Steps       a process that takes a step whenever it is asked to, so that two of them can take turns
    versions    what a figure was measured with; spread, report: its median and range, a line of the table

    python benchmarks/steps.py ROOT LENGTHS FLAGS     our side of Steps: repo_ppo.py as it is, with FLAGS

The responses of a shape have given lengths. They are forced by the uniform numbers of sampling: EOS is the
first word, so that 0 draws it; no other uniform number is so small that it does.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plumbing.cli import count, parser  # noqa: E402, F401
from plumbing.files import write_json, write_jsonl  # noqa: E402


@dataclass(frozen=True)
class Shape:
    """A GPT-2 and a rollout: prompts of `prompt` tokens, responses of `shortest` to `response` tokens."""

    layers: int
    width: int
    heads: int
    words: int
    prompt: int
    response: int
    batch: int
    minibatch: int
    shortest: int = 0  # 0: all are of `response` tokens
    micro_batch: int = 128

    def lengths(self) -> list[int]:
        """Tokens of every response of a rollout, EOS included: evenly spread in their logarithm, in an order
        that has nothing to do with length."""
        ratio = self.response / (self.shortest or self.response)
        ordered = [round(self.response * ratio ** (i / (self.batch - 1) - 1)) for i in range(self.batch)]
        return [ordered[i * 7 % self.batch] for i in range(self.batch)]  # 7 divides no batch size here

    def flags(self, folder: str, dtype: str) -> list[str]:
        """The flags of repo_ppo.py, on what `build` wrote; `--output-dir` is left."""
        sizes = {"max-length": self.prompt + self.response, "max-new-tokens": self.response}
        sizes |= {"batch-size": self.batch, "minibatch-size": self.minibatch}
        sizes |= {"micro-batch-size": min(self.micro_batch, self.minibatch), "dtype": dtype}
        paths = {"model": "policy", "reward-model": "reward", "cost-model": "cost"}
        paths |= {"dataset": "prompts.jsonl", "ptx-dataset": "sft.jsonl"}
        given = sizes | {name: f"{folder}/{path}" for name, path in paths.items()}
        given |= {"steps": 1000, "lr": 1e-5, "critic-lr": 1e-5}
        return [text for name, value in given.items() for text in (f"--{name}", str(value))]


# layers, width, heads, words, prompt, response, batch, minibatch
SHAPES = {
    "toy": Shape(2, 64, 4, 216, 12, 12, 128, 32),
    "4x256": Shape(4, 256, 4, 216, 32, 96, 32, 32),
    "gpt2": Shape(12, 768, 12, 50257, 32, 64, 8, 8),
    "mixed": Shape(4, 256, 4, 216, 32, 384, 32, 32, shortest=8, micro_batch=8),
    "long": Shape(4, 256, 4, 216, 32, 384, 32, 32, micro_batch=8),
}


def build(folder: Path, shape: Shape) -> None:
    """policy/, reward/, cost/ with random weights, prompts.jsonl and sft.jsonl in `folder`."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    import toy_world
    from lm import ScoreModel
    from plumbing.data import encode_prompts
    from plumbing.loading import save_score_model

    tokenizer, config = toy_world.build_tokenizer(), toy_world.build_config()
    tokenizer.eos_token, tokenizer.pad_token = tokenizer.pad_token, tokenizer.eos_token  # EOS is word 0
    config.n_layer, config.n_embd, config.n_head = shape.layers, shape.width, shape.heads
    config.vocab_size, config.n_positions = shape.words, shape.prompt + shape.response
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "policy")
    for kind in ("reward", "cost"):
        model = ScoreModel(AutoModel.from_config(config), kind)
        save_score_model(model, model.state_dict(), str(folder / kind))
    for role in ("policy", "reward", "cost"):
        tokenizer.save_pretrained(folder / role)
    words = toy_world.vocabulary()[10:]
    frame = len(encode_prompts(tokenizer, [""])[0])  # the template's tokens

    def text(size: int, first: int) -> str:
        return " ".join(words[(first + i) % len(words)] for i in range(size))

    rows = [
        {"prompt": text(shape.prompt - frame, i), "response": text(length - 1, i)}
        for i, length in enumerate(shape.lengths())
    ]
    for name in ("prompts", "sft"):
        write_jsonl(str(folder / f"{name}.jsonl"), rows)
    write_json(str(folder / "lengths.json"), shape.lengths())


class Steps:
    """A process that tells when it is ready, and then takes one step at every call of `step`."""

    def __init__(self, command: list[str], log: Path):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with open(log, "w") as errors:
            # threads that wait should sleep, as under make: the other side is working
            environment = {"OMP_WAIT_POLICY": "passive"} | os.environ
            self.process = subprocess.Popen(command, stderr=errors, cwd=ROOT, env=environment, **pipes)
        self.log = log

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self.process.args)} failed:\n{self.log.read_text()[-2000:]}")
        return json.loads(line)

    def step(self) -> dict:
        """Its seconds, those of processors, the process's peak of memory in GiB, and what it tells itself."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class Turns:
    """The other end: `done(**told)` ends a turn and returns when the next one begins."""

    def __init__(self):
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever else prints must not get in between
        self.began = time.perf_counter(), time.process_time()

    def done(self, **told) -> None:
        seconds, cpu = time.perf_counter() - self.began[0], time.process_time() - self.began[1]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self.out.write(json.dumps({"seconds": seconds, "cpu": cpu, "peak_gib": peak, **told}) + "\n")
        self.out.flush()
        if not sys.stdin.readline():
            os._exit(0)
        self.began = time.perf_counter(), time.process_time()


def ours(folder: Path, shape: Shape, dtype: str, root: Path = ROOT) -> Steps:
    """Steps of the repo_ppo.py at `root`."""
    output = tempfile.mkdtemp(dir=folder)
    command = [sys.executable, __file__, str(root), str(folder / "lengths.json")]
    return Steps([*command, *shape.flags(str(folder), dtype), "--output-dir", output], Path(f"{output}.log"))


def versions(*more: str) -> dict[str, str]:
    names = ("torch", "transformers", *more)
    found = {"date": str(date.today()), "python": platform.python_version()}
    return found | {name: version(name) for name in names}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def report(row: dict) -> None:
    """A line of a table: medians, with the range in brackets."""
    cells = []
    for name, value in row.items():
        if isinstance(value, dict):
            value = f"{value['median']:.3g} ({value['low']:.3g} to {value['high']:.3g})"
        cells.append(f"{name} {value}")
    print(", ".join(cells), flush=True)


def main(lengths: list[int], given: list[str]) -> None:
    """repo_ppo.py, which stops after every step until it is told to go on."""
    import torch

    import repo_ppo
    from plumbing import runs

    turns, log, laps, generate, cpu = Turns(), runs.RunLog, runs.Laps, repo_ppo.generate, {}

    class Log(log):
        def __init__(self, *args):
            super().__init__(*args)
            turns.done()

        def metrics(self, step, values):
            super().metrics(step, values)
            turns.done(**values, **cpu)

    class Laps(laps):
        """Beside a phase's seconds_NAME those of processors, as cpu_NAME."""

        def __init__(self):
            super().__init__()
            self.before = time.process_time()

        def lap(self, name):
            super().lap(name)
            now = time.process_time()
            cpu[f"cpu_{name}"], self.before = now - self.before, now

    def ending(*inputs):
        *inputs, uniforms = inputs
        uniforms = 0.1 + 0.9 * uniforms
        uniforms[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = 0
        return generate(*inputs, uniforms)

    runs.RunLog, runs.Laps, repo_ppo.generate = Log, Laps, ending
    runs.run(repo_ppo.main, repo_ppo.parse_args(given))


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    main(json.loads(Path(sys.argv[2]).read_text()), sys.argv[3:])
