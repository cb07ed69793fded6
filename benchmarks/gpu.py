"""The first hour on a GPU in one command: three steps of repo_ppo.py on random weights of real shapes, with
the recipes' flags: plain, under --fsdp, with adapters, and with adapters beside weights in 8 bits.

    python benchmarks/gpu.py                                              # the 1b, the 3b and the 7b shape
    python benchmarks/gpu.py --shapes 1b --modes fsdp --batch-size 64
    python benchmarks/gpu.py --shapes tiny --batch-size 4 --max-length 48 --max-new-tokens 8    # on a CPU too

First of all: one backward pass in bf16 over rows that are padded on the left, whose gradients must be finite.
Without that nothing else means anything, and it ends there. Then, per shape and mode: seconds of a step's
phases (median of the steps after the first), tokens sampled a second, the share of this machine's own limits,
measured in the same run (matrix products for scoring and update, memory traffic for sampling), and peak
memory beside the prediction of tools/plan.py; what does not fit by that is not tried. Then, on the first
shape: how far the sampled tokens' log-probabilities are from those of a fresh forward pass, and with --resume
whether a run goes on from a checkpoint. Prints JSON lines, and writes all of it with --output.

It needs this repository and nothing from a hub. Operations are those of the matrix products on real tokens,
without padding and attention's scores: 2 N a token forward and 4 N backward (2 N with adapters: frozen
weights need no gradients). N is the blocks' weights, whose forward pass is made once more in the backward
pass; for log-probabilities also the output layer's, on the response alone. Sampling must read all of them
once a token.
"""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

import repo_ppo  # noqa: E402
import toy_world  # noqa: E402
from lm import frame, generate, pad, response_mask, token_log_probs  # noqa: E402
from plumbing import cli  # noqa: E402
from plumbing.data import encode, encode_prompts, load_prompts  # noqa: E402
from plumbing.distributed import device, load_options, shard  # noqa: E402
from plumbing.files import read_jsonl, write_json, write_jsonl  # noqa: E402
from plumbing.loading import load_causal_lm, load_tokenizer  # noqa: E402
from tools import plan  # noqa: E402

# hidden, layers, heads, key-value heads, inner width, words
SHAPES = {
    "tiny": (64, 2, 4, 2, 128, 300),
    "small": (256, 4, 4, 4, 1024, 300),  # large enough for a CPU's shares to mean something
    "1b": (2048, 16, 32, 8, 8192, 128256),  # Llama-3.2-1B
    "3b": (3072, 28, 24, 8, 8192, 128256),  # Llama-3.2-3B
    "7b": (4096, 32, 32, 32, 11008, 32001),  # Alpaca-7B
}
MODES = {"plain": [], "fsdp": ["--fsdp"], "offload": ["--fsdp", "--cpu-offload"]}
MODES["lora"] = ["--lora-rank", "16", "--lora-alpha", "32"]
MODES["int8"] = [*MODES["lora"], "--quantize", "int8"]
ROLES = (("policy", "lm_head"), ("reward", "score_head"), ("cost", "score_head"))  # and its own part
CUDA = torch.cuda.is_available()


def configure(folder: Path, shape: str) -> LlamaConfig:
    """Config and tokenizer of policy, reward and cost model in `folder`: all that the plan needs."""
    hidden, layers, heads, groups, inner, words = SHAPES[shape]
    tokenizer = toy_world.build_tokenizer()
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=inner,
        vocab_size=words,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype="bfloat16",
    )
    for role, own in ROLES:
        config.save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
        if own == "score_head":
            path = folder / role / "config.json"
            fields = {"architectures": ["LlamaForScore"], "score_type": role, "score_dim": 1}
            write_json(str(path), json.loads(path.read_text()) | fields | {"score_bias": True})
    return config


def draw_weights(folder: Path, config: LlamaConfig) -> int:
    """Random weights for the three in `folder`; returns one's parameters.

    They share their backbone's file: a 7B shape would otherwise take 40 GB."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    where = "cuda" if CUDA else "cpu"
    torch.manual_seed(0)

    def drawn(name: str) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shapes[name], dtype=torch.bfloat16)
        return (0.02 * torch.randn(shapes[name], device=where, dtype=torch.bfloat16)).cpu()

    head = {"score_head.weight": 0.02 * torch.randn(1, config.hidden_size), "score_head.bias": torch.zeros(1)}
    parts = {
        "backbone": {name: drawn(name) for name in shapes if name.startswith("model.")},
        "lm_head": {"lm_head.weight": drawn("lm_head.weight")},
        "score_head": head,
    }
    for role, own in ROLES:
        names = {f"{part}.safetensors": parts[part] for part in ("backbone", own)}
        for file, tensors in names.items():
            if file.startswith("backbone") and role != "policy":
                os.link(folder / "policy" / file, folder / role / file)
            else:
                save_file(tensors, folder / role / file, metadata={"format": "pt"})
        weight_map = {name: file for file, tensors in names.items() for name in tensors}
        write_json(
            str(folder / role / "model.safetensors.index.json"), {"metadata": {}, "weight_map": weight_map}
        )
    if CUDA:
        torch.cuda.empty_cache()  # the runs are other processes
    return sum(size.numel() for size in shapes.values())


def flags(models: Path, data: Path, mode: str, args) -> list[str]:
    """The recipes' flags on these models."""
    sizes = ["--batch-size", str(args.batch_size), "--minibatch-size", str(args.batch_size)]
    sizes += ["--micro-batch-size", str(args.micro_batch_size), "--steps", str(args.steps)]
    sizes += ["--max-length", str(args.max_length), "--max-new-tokens", str(args.max_new_tokens)]
    roles = (("--model", "policy"), ("--reward-model", "reward"), ("--cost-model", "cost"))
    inputs = [word for flag, role in roles for word in (flag, f"{models}/{role}")]
    inputs += ["--dataset", f"{data}/prompts.jsonl", "--ptx-dataset", f"{data}/sft.jsonl"]
    compute = ["--dtype", args.dtype, "--activation-checkpointing", "--lr", "1e-5", "--critic-lr", "5e-6"]
    return [*inputs, *sizes, *compute, *MODES[mode]]


def train(given: list[str], output: Path, *more: str) -> tuple[list[dict], str]:
    """A run of repo_ppo.py under torchrun with one process; its metrics, and what it said. Its model, which
    nobody needs and which takes room, is removed."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command = [*launch, "repo_ppo.py", *given, "--output-dir", str(output), *more]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if process.returncode:
        said = [line for line in process.stderr.splitlines() if "error" in line.lower()]
        return [], (said or ["no output"])[0][:300]
    shutil.rmtree(output / "model")
    return read_jsonl(str(output / "metrics.jsonl")), process.stderr


def planned(given: list[str]) -> dict[str, float]:
    """Predicted GiB: the peak of all phases, and what lies on the host."""
    found, host = plan.phases(repo_ppo.parse_args([*given, "--output-dir", "x"]), 1)
    peaks = {name: sum(parts.values()) / plan.GIB for name, parts in found}
    return {"peak": max(peaks.values()), "host": host / plan.GIB}


# ------------------------------------------------------------------------------ the machine's own limits


def seconds(function, repeats: int = 5) -> float:
    """Median seconds of a call, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        if CUDA:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def limits(dtype: torch.dtype) -> dict[str, float]:
    """Operations a second of large matrix products, and bytes a second of a copy (read and written)."""
    where, size = ("cuda", 8192) if CUDA else ("cpu", 1024)
    a = torch.randn(size, size, device=where, dtype=dtype)
    big = torch.empty(1 << (31 if CUDA else 26), device=where, dtype=torch.uint8)
    copy = torch.empty_like(big)
    rate = 2 * size**3 / seconds(lambda: a @ a)
    return {"flops": rate, "bytes": 2 * big.numel() / seconds(lambda: copy.copy_(big))}


def mean_tokens(rows: list[dict], max_length: int) -> tuple[float, float]:
    """Of a prompt, and of a supervised response."""
    pairs = [(row["prompt"], row["response"]) for row in rows]
    encoded = encode(toy_world.build_tokenizer(), pairs, max_length)
    prompt = statistics.mean(length for _, length in encoded)
    return prompt, statistics.mean(len(ids) for ids, _ in encoded) - prompt


def shares(row: dict, shape: str, mode: str, tokens: tuple[float, float], machine: dict, args) -> dict:
    """A step's phases as shares of the machine's limits; `tokens` as of mean_tokens."""
    hidden, layers, heads, groups, inner, words = SHAPES[shape]
    blocks = layers * (2 * hidden**2 * (heads + groups) // heads + 3 * hidden * inner)
    output, width = hidden * words, 2 if args.dtype == "bf16" else 4
    prompt, supervised = (args.batch_size * mean for mean in tokens)
    response = args.batch_size * row["response_length"]
    # five models score, of which the reference gives log-probabilities
    scoring = 2 * (5 * blocks * (prompt + response) + output * response)
    # policy and two critics learn, the policy on as many supervised rows as well
    passed, judged = 3 * (prompt + response) + prompt + supervised, response + supervised
    # forward and backward, and what is computed again: torch stops before a block's last product, whose input
    # is all that the backward pass needs, unless an adapter comes after it
    both, again = (4, blocks) if mode in ("lora", "int8") else (6, blocks - layers * hidden * inner)
    update = (both * blocks + 2 * again) * passed + both * output * judged
    reads = args.max_new_tokens * (blocks * (1 if mode == "int8" else width) + output * width)
    return {
        "tokens_per_second": response / row["seconds_rollout"],
        "sampling_share": reads / row["seconds_rollout"] / machine["bytes"],
        "scoring_share": scoring / row["seconds_scoring"] / machine["flops"],
        "update_share": update / row["seconds_update"] / machine["flops"],
    }


# ------------------------------------------------------------------------------ checks


def check_padded_gradients() -> None:
    """One backward pass in bf16 of log-probabilities after prompts of 45, 20 and 1 tokens, padded on the
    left, with heads of 64 and 128 as in the real shapes. SystemExit where a gradient is not finite.

    At padding a query sees no key. What attention makes of such a row depends on its kernel (with a mask the
    memory-efficient one, on CUDA), and a NaN there would reach every weight."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    for width in (64, 128):
        config = LlamaConfig(hidden_size=4 * width, intermediate_size=256, vocab_size=300, **sizes)
        torch.manual_seed(0)
        run = Namespace(dtype="bf16", fsdp=False, activation_checkpointing=False)
        policy = shard(AutoModelForCausalLM.from_config(config), run)
        rows = [(list(range(1, prompt + 17)), prompt) for prompt in (45, 20, 1)]  # responses of 16 tokens
        token_log_probs(policy, *frame(rows, 0, device())).sum().backward()
        for name, parameter in policy.named_parameters():
            if not parameter.grad.isfinite().all():
                raise SystemExit(f"left padding, heads of {width}: the gradient of {name} is not finite")


def log_probs_agree(models: Path, args) -> dict[str, float]:
    """Sampled log-probabilities against a fresh forward pass: the difference a token, and the share of ratios
    that PPO's clip would already cut."""
    tokenizer, run = load_tokenizer(f"{models}/policy"), Namespace(dtype=args.dtype, fsdp=False)
    policy = shard(load_causal_lm(f"{models}/policy", **load_options(run, trained=False)), run, trained=False)
    prompts = load_prompts(str(models.parent / "data/prompts.jsonl"))[: args.batch_size]
    ids, mask = pad(encode_prompts(tokenizer, prompts), 0, side="left")
    ids, mask = ids.to(device()), mask.to(device())
    eos = tokenizer.eos_token_id
    sequences, sampled = generate(policy, ids, mask, args.max_new_tokens, eos_token_id=eos, pad_token_id=0)
    real = response_mask(sequences[:, ids.shape[1] :], eos)
    with torch.no_grad():
        fresh = token_log_probs(policy, sequences, torch.cat([mask, real], 1), ids.shape[1])
    difference = (sampled - fresh)[real.bool()]
    beyond = ((difference.exp() - 1).abs() > 0.2).float().mean().item()
    return {"largest": difference.abs().max().item(), "sd": difference.std().item(), "beyond_clip": beyond}


def main(args) -> None:
    torch.backends.cuda.enable_cudnn_sdp(False)  # as every run does where it starts
    check_padded_gradients()
    print("bf16 with left padding: all gradients are finite")
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    machine = limits(torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    if CUDA:
        torch.cuda.empty_cache()
    memory = torch.cuda.mem_get_info()[0] / 2**30 if CUDA else math.inf
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    print(f"{name}: {machine['flops'] / 1e12:.1f} TFLOP/s ({args.dtype}), {machine['bytes'] / 1e9:.0f} GB/s")
    result = {"device": name, "torch": torch.__version__, "limits": machine, "args": vars(args), "runs": []}
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base)
        rows = [{"prompt": p, "response": "oil springs ."} for p in toy_world.split_prompts()[0]]
        for file in ("prompts", "sft"):
            write_jsonl(f"{folder}/data/{file}.jsonl", rows)
        tokens = mean_tokens(rows, args.max_length)
        for shape in args.shapes:
            config, parameters = configure(folder / shape, shape), 0
            for mode in args.modes:
                given = flags(folder / shape, folder / "data", mode, args)
                needs = planned(given)
                entry = {"shape": shape, "mode": mode, "plan": needs}
                if needs["peak"] > memory or needs["host"] > host:
                    sizes = f"{needs['peak']:.0f} GiB, {needs['host']:.0f} GiB of host memory"
                    entry["skipped"] = f"does not fit by the plan: {sizes}"
                else:
                    parameters = entry["parameters"] = parameters or draw_weights(folder / shape, config)
                    logged, said = train(given, folder / f"{shape}-{mode}")
                    entry["failed"] = "" if logged else said
                    if logged:
                        last = [row for row in logged if row["step"] > 0] or logged
                        keys = [k for k in last[0] if k.startswith(("seconds_", "gpu_", "response_length"))]
                        row = {key: statistics.median(r[key] for r in last) for key in keys}
                        entry |= row | shares(row, shape, mode, tokens, machine, args)
                result["runs"].append(entry)
                print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in entry.items()}))
            if shape != args.shapes[0]:
                shutil.rmtree(folder / shape)
        first = folder / args.shapes[0]
        if (first / "policy/backbone.safetensors").exists():
            result["log_probs"] = log_probs_agree(first, args)
            print("sampled against fresh log-probabilities:", json.dumps(result["log_probs"]))
        if args.resume and "skipped" not in result["runs"][len(args.modes) - 1]:  # the one to resume
            result["resumed"] = resumed(flags(first, folder / "data", args.modes[-1], args), folder, args)
            print("resume:", result["resumed"])
    if args.output:
        write_json(args.output, result)
    stuck = not result.get("resumed", "goes on").startswith("goes on")
    if stuck or any(run.get("failed") for run in result["runs"]):
        raise SystemExit(1)


def resumed(given: list[str], folder: Path, args) -> str:
    """Whether a run goes on from its checkpoint, or why not."""
    output, steps = folder / "resumed", args.steps
    logged, said = train(given, output, "--save-every", str(steps), "--keep", "1")
    if not (output / f"checkpoints/step-{steps}/extra.json").exists():
        return f"nothing was saved: {said[-300:]}"
    logged, said = train([*given, "--steps", str(steps + 1)], output, "--resume")
    if not logged or f"resumed from step {steps}" not in said:
        return f"did not go on: {said[-300:]}"
    return f"goes on: {len(logged)} steps logged after {steps} + 1"


if __name__ == "__main__":
    parser = cli.parser(__doc__)
    flag = parser.add_argument
    flag("--shapes", nargs="+", choices=SHAPES, default=["1b", "3b", "7b"], help="the smallest first")
    modes = ["plain", "fsdp", "lora", "int8"]
    flag("--modes", nargs="+", choices=MODES, default=modes, help="ways to hold them")
    flag("--steps", type=cli.count, default=3, help="steps of every run")
    flag("--batch-size", type=cli.count, default=32, help="samples of a rollout")
    flag("--micro-batch-size", type=cli.count, default=8, help="samples of a pass")
    flag("--max-length", type=cli.count, default=512, help="prompt and response in tokens")
    flag("--max-new-tokens", type=cli.count, default=384, help="response in tokens")
    flag("--dtype", choices=("fp32", "bf16"), default="bf16", help="of the computation")
    flag("--resume", action="store_true", help="also save, resume the last mode (plain: 60 GB of disk at 1b)")
    flag("--output", help="write everything as JSON")
    main(parser.parse_args())
