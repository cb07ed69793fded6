"""Whole PPO iterations of repo_ppo.py, six models and PTX, against those of TRL's PPOTrainer, four models and
no PTX, on the same shapes: samples a second, and samples a second and model pass.

    python benchmarks/versus_trl.py                                     # four shapes, fp32 and bf16
    python benchmarks/versus_trl.py --shapes 4x256 --dtypes fp32 --pairs 9
    python benchmarks/versus_trl.py --against ../before --shapes mixed  # a checkout of this layout, not TRL
    python benchmarks/versus_trl.py --against ../before --shapes gpt2 --lora-rank 16

Both run as processes that take turns, step by step, with the threads that they take by themselves. A ratio is
that of two steps which follow each other; the table tells its median and its range. What a step is: all from
the end of the one before to its own end, logging included. The first is not counted.

Alike on both sides: GPT-2 with the tanh-GELU that torch fuses, the same initial policy, sizes, lengths of
responses (shape "mixed": 8 to 384 tokens, row by row the same), minibatches and micro-batches, fused AdamW,
one epoch, no recomputation. TRL samples and scores a whole rollout at once; a logits processor ends its rows.
Ours end by the uniform numbers of sampling: EOS is the first word, so that 0 draws it, and no other uniform
number is small enough to. bf16 is TRL's `bf16=True`, which samples in float32, with the two frozen models in
bfloat16.

Passes of a model over a sample, besides decoding, where a backward pass counts as two:
ours  17  scored by reference, reward, cost and two critics (5); policy, PTX, two critics trained (4 x 3);
          18 under bf16, which scores the policy too
TRL    9  scored by reference, reward and value model (3); policy and value model trained (2 x 3)

TRL is installed, at a fixed version and without what it depends on, into a virtual environment that sees this
interpreter's packages: runs/trl/env, or --environment.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
import warnings
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

# The repository's modules are imported where they are used: a side of --against takes them from elsewhere.
ROOT = Path(__file__).resolve().parent.parent
PINNED = {"trl": "1.12.0", "accelerate": "1.15.0", "psutil": "7.2.2"}
PASSES = {"trl": 9, "fp32": 17, "bf16": 18}


# ------------------------------------------------------------------------------ shapes


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
}


def build(folder: Path, shape: Shape) -> None:
    """policy/, reward/, cost/ with random weights, prompts.jsonl, sft.jsonl and lengths.json in `folder`."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    import toy_world
    from lm import ScoreModel
    from plumbing.data import encode_prompts
    from plumbing.files import write_json, write_jsonl
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


# ------------------------------------------------------------------------------ taking turns


class Steps:
    """A process that tells when it is ready, and then takes one step at every call of `step`."""

    def __init__(self, command: list[str], log: Path):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with open(log, "w", encoding="utf-8") as errors:
            # threads that wait should sleep, as under make: the other side is working
            environment = {"OMP_WAIT_POLICY": "passive"} | os.environ
            self.process = subprocess.Popen(command, stderr=errors, cwd=ROOT, env=environment, **pipes)
        self.log = log

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            said = self.log.read_text(encoding="utf-8")[-2000:]
            raise SystemExit(f"{' '.join(self.process.args)} failed:\n{said}")
        return json.loads(line)

    def step(self) -> dict:
        """Its seconds, those of processors, and what it tells itself."""
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
        self.out.write(json.dumps({"seconds": seconds, "cpu": cpu, **told}) + "\n")
        self.out.flush()
        if not sys.stdin.readline():
            os._exit(0)
        self.began = time.perf_counter(), time.process_time()


# ------------------------------------------------------------------------------ the two sides


def ours(folder: Path, shape: Shape, dtype: str, rank: int, root: Path = ROOT) -> Steps:
    """Steps of the repo_ppo.py at `root`, with adapters of this rank."""
    output = tempfile.mkdtemp(dir=folder)
    command = [sys.executable, __file__, "--ours", str(root), str(folder / "lengths.json")]
    command += [*shape.flags(str(folder), dtype), "--lora-rank", str(rank), "--output-dir", output]
    return Steps(command, Path(f"{output}.log"))


def our_side(lengths: list[int], given: list[str]) -> None:
    """repo_ppo.py with responses of these lengths; it stops after every step until it is told to go on."""
    import torch

    import lm
    import repo_ppo
    from plumbing import runs

    turns, log, generate = Turns(), runs.RunLog, lm.generate

    class Log(log):
        def __init__(self, *args):
            super().__init__(*args)
            turns.done()

        def metrics(self, step, values):
            super().metrics(step, values)
            turns.done(**values)

    def ending(*inputs):
        *inputs, uniforms = inputs
        uniforms = 0.1 + 0.9 * uniforms
        uniforms[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = 0
        return generate(*inputs, uniforms)

    runs.RunLog, lm.generate = Log, ending
    runs.run(repo_ppo.main, repo_ppo.parse_args(given))


def environment(folder: Path) -> str:
    """Make TRL's environment in `folder` where there is none; its interpreter."""
    python = folder / "bin/python"
    if not (folder / "complete").exists():
        venv.create(folder, with_pip=True)
        (there,) = folder.glob("lib/python*/site-packages")
        (there / "host.pth").write_text(sysconfig.get_path("purelib"))  # torch and transformers are there
        pinned = [f"{name}=={number}" for name, number in PINNED.items()]
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *pinned], check=True)
        (folder / "complete").touch()
    return str(python)


def theirs(folder: Path, shape: Shape, dtype: str, python: str) -> Steps:
    given = json.dumps(asdict(shape))
    return Steps([python, __file__, "--trl", str(ROOT), str(folder), given, dtype], folder / "trl.log")


def trl_side(folder: str, given: str, dtype: str) -> None:
    """PPOTrainer on what `build` wrote to `folder`; it stops after every step until it is told to go on."""
    import functools

    import torch
    import transformers
    from datasets import Dataset

    warnings.simplefilter("ignore")
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from plumbing.data import encode_prompts, load_prompts

    shape, turns = Shape(**json.loads(given)), Turns()
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{folder}/policy", padding_side="left")
    ends = torch.tensor(shape.lengths()) - 1

    class Ending(transformers.LogitsProcessor):
        """Row i draws EOS at its length and neither EOS nor PAD before."""

        def __call__(self, ids, scores):
            scores[:, [tokenizer.eos_token_id, tokenizer.pad_token_id]] = -torch.inf
            over = ends == ids.shape[1] - shape.prompt
            scores[over] = -torch.inf
            scores[over, tokenizer.eos_token_id] = 0.0
            return scores

    class Turn(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            turns.done()

        def on_step_end(self, args, state, control, **_):
            turns.done(ended=state.log_history[-1]["val/num_eos_tokens"])

    def load(kind, frozen: bool = False, **options):
        options["dtype"] = torch.bfloat16 if frozen and dtype == "bf16" else torch.float32
        return kind.from_pretrained(f"{folder}/policy", **options)

    language = functools.partial(load, transformers.AutoModelForCausalLM)
    score = functools.partial(load, transformers.AutoModelForSequenceClassification, num_labels=1)
    policy, endings = language(), transformers.LogitsProcessorList([Ending()])
    policy.generate = functools.partial(policy.generate, logits_processor=endings)
    rows = encode_prompts(tokenizer, load_prompts(f"{folder}/prompts.jsonl"))
    pieces = shape.minibatch // min(shape.micro_batch, shape.minibatch)
    options = PPOConfig(
        output_dir=f"{folder}/trl",
        total_episodes=1000 * shape.batch,
        # the batch is the product of the next two; gradients of `pieces` micro-batches accumulate
        per_device_train_batch_size=shape.batch // pieces,
        gradient_accumulation_steps=pieces,
        num_mini_batches=shape.batch // shape.minibatch,
        local_rollout_forward_batch_size=shape.batch,
        num_ppo_epochs=1,
        response_length=shape.response,
        stop_token="eos",
        temperature=1.0,
        learning_rate=1e-5,
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=dtype == "bf16",
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    PPOTrainer(
        args=options,
        processing_class=tokenizer,
        model=policy,
        ref_model=language(frozen=True),
        reward_model=score(frozen=True),
        value_model=score(),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        callbacks=[Turn()],
    ).train()


# ------------------------------------------------------------------------------ the comparison


def compare(shape: Shape, dtype: str, args) -> list[tuple[dict, dict]]:
    """Steps of ours and of theirs in turn, after one of each that is not counted."""
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base)
        build(folder, shape)
        if args.against:
            b = ours(folder, shape, dtype, args.lora_rank, Path(args.against).resolve())
        else:
            b = theirs(folder, shape, dtype, environment(Path(args.environment)))
        a = ours(folder, shape, dtype, args.lora_rank)
        for side in (a, b):
            side.read()
        taken = [(a.step(), b.step()) for _ in range(args.pairs + 1)][1:]
        for side in (a, b):
            side.close()
    if any(row.get("ended", shape.batch) != shape.batch for _, row in taken):
        raise SystemExit("TRL's responses did not end where they should")
    return taken


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def cell(value) -> str:
    """A median with its range in brackets, or what is no such thing as it is."""
    return "{median:.3g} ({low:.3g} to {high:.3g})".format(**value) if isinstance(value, dict) else str(value)


def summary(shape: Shape, dtype: str, taken: list[tuple[dict, dict]], against: bool) -> dict:
    """Samples a second of both, samples times passes a second of both, and the ratios pair by pair."""
    passes = PASSES[dtype], PASSES[dtype if against else "trl"]
    rates = [[shape.batch / row["seconds"] for row in side] for side in zip(*taken)]
    row = {"ours": spread(rates[0]), "theirs": spread(rates[1])}
    row |= {"ratio": spread([a / b for a, b in zip(*rates)]), "passes": f"{passes[0]} and {passes[1]}"}
    row["ratio of processor time"] = spread([b["cpu"] / a["cpu"] for a, b in taken])
    row["ratio a pass"] = spread([a * passes[0] / (b * passes[1]) for a, b in zip(*rates)])
    if against:
        for phase in ("rollout", "scoring", "update"):
            row[f"ratio {phase}"] = spread([b[f"seconds_{phase}"] / a[f"seconds_{phase}"] for a, b in taken])
    return row


def main(args) -> None:
    packages = {name: version(name) for name in ("torch", "transformers")} | PINNED
    result = {"date": str(date.today()), "python": platform.python_version()} | packages | {"rows": []}
    for name in args.shapes:
        for dtype in args.dtypes:
            taken = compare(SHAPES[name], dtype, args)
            row = {"shape": name, "dtype": dtype} | summary(SHAPES[name], dtype, taken, bool(args.against))
            print(", ".join(f"{key} {cell(value)}" for key, value in row.items()), flush=True)
            result["rows"].append(row | {"steps": taken})
    if args.output:
        from plumbing.files import write_json

        write_json(args.output, result)


if __name__ == "__main__":
    if sys.argv[1:2] in (["--ours"], ["--trl"]):  # the process of one side
        side, root, *given = sys.argv[1:]
        sys.path.insert(0, root)
        if side == "--trl":
            trl_side(*given)
        else:
            our_side(json.loads(Path(given[0]).read_text()), given[1:])
        raise SystemExit
    sys.path.insert(0, str(ROOT))
    from plumbing import cli

    parser = cli.parser(__doc__)
    flag = parser.add_argument
    flag("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="to measure")
    flag("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="of it")
    flag("--pairs", type=cli.count, default=5, help="counted steps of each side")
    flag("--environment", default=str(ROOT / "runs/trl/env"), help="TRL's, made if it is not there")
    flag("--against", help="instead of TRL's, the repo_ppo.py of another checkout in this folder")
    flag("--lora-rank", type=cli.whole, default=0, help="adapters on our side, or with --against on both")
    flag("--output", help="write everything as JSON")
    main(parser.parse_args())
