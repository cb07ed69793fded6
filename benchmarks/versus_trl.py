"""Whole PPO iterations of repo_ppo.py, six models and PTX, against those of TRL's PPOTrainer, four models and
no PTX, on the same shapes: samples a second, and samples a second and model pass.

    python benchmarks/versus_trl.py                                     # four shapes, fp32 and bf16
    python benchmarks/versus_trl.py --shapes 4x256 --dtypes fp32 --pairs 9
    python benchmarks/versus_trl.py --against ../before --shapes long   # another checkout instead of TRL

Both run as processes that take turns, step by step, with the threads that they take by themselves. A ratio is
that of two steps which follow each other; the table tells its median and its range. What a step is: all from
the end of the one before to its own end, logging included. The first is not counted.

Alike on both sides: GPT-2 with the tanh-GELU that torch fuses, the same initial policy, sizes, lengths of
responses (shape "mixed": 8 to 384 tokens, row by row the same), minibatches and micro-batches, fused AdamW,
one epoch, no recomputation. TRL samples and scores a whole rollout at once; a logits processor ends its rows.
bf16 is TRL's `bf16=True`, which samples in float32, with the two frozen models in bfloat16.

Passes of a model over a sample, besides decoding, where a backward pass counts as two:
ours  17  scored by reference, reward, cost and two critics (5); policy, PTX, two critics trained (4 x 3);
          18 under bf16, which scores the policy too
TRL    9  scored by reference, reward and value model (3); policy and value model trained (2 x 3)

TRL is installed, at a fixed version and without what it depends on, into a virtual environment that sees this
interpreter's packages: runs/trl/env, or --environment.
"""

import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
import warnings
from dataclasses import asdict
from pathlib import Path

import steps
from steps import SHAPES, Shape, Steps, count, ours, spread

PINNED = {"trl": "1.12.0", "accelerate": "1.15.0", "psutil": "7.2.2"}
PASSES = {"trl": 9, "fp32": 17, "bf16": 18}


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
    return Steps([python, __file__, "--side", str(folder), given, dtype], folder / f"trl-{dtype}.log")


def trl_side(folder: str, given: str, dtype: str) -> None:
    """PPOTrainer on what `build` wrote to `folder`; it stops after every step until it is told to go on."""
    import functools

    import torch
    import transformers
    from datasets import Dataset

    warnings.simplefilter("ignore")
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from plumbing.data import encode_prompts, load_prompts

    shape, turns = Shape(**json.loads(given)), steps.Turns()
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


def compare(shape: Shape, dtype: str, args) -> list[tuple[dict, dict]]:
    """Steps of ours and of theirs in turn, after one of each that is not counted."""
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base)
        steps.build(folder, shape)
        if args.against:
            b = ours(folder, shape, dtype, Path(args.against).resolve())
        else:
            b = theirs(folder, shape, dtype, environment(Path(args.environment)))
        a = ours(folder, shape, dtype)
        for side in (a, b):
            side.read()
        taken = [(a.step(), b.step()) for _ in range(args.pairs + 1)][1:]
        for side in (a, b):
            side.close()
    if any(row.get("ended", shape.batch) != shape.batch for _, row in taken):
        raise SystemExit("TRL's responses did not end where they should")
    return taken


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
    result = steps.versions() | PINNED | {"pairs": args.pairs, "rows": []}
    for name in args.shapes:
        for dtype in args.dtypes:
            taken = compare(SHAPES[name], dtype, args)
            row = {"shape": name, "dtype": dtype} | summary(SHAPES[name], dtype, taken, bool(args.against))
            steps.report(row)
            result["rows"].append(row | {"steps": taken})
    if args.output:
        steps.write_json(args.output, result)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:  # the process of the other side
        trl_side(*sys.argv[2:])
        raise SystemExit
    flags = steps.parser(__doc__)
    flag = flags.add_argument
    shapes = ["toy", "4x256", "gpt2", "mixed"]
    flag("--shapes", nargs="+", choices=SHAPES, default=shapes, help="to measure")
    flag("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="of it")
    flag("--pairs", type=count, default=5, help="counted steps of each side")
    flag("--environment", default=str(steps.ROOT / "runs/trl/env"), help="TRL's, made if it is not there")
    flag("--against", help="instead of TRL's, the repo_ppo.py of another checkout in this folder")
    flag("--output", help="write everything as JSON")
    main(flags.parse_args())
