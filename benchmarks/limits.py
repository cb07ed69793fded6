"""Which share of what this machine can do a PPO step of repo_ppo.py reaches, phase by phase.

    python benchmarks/limits.py                                    # 4 x 256 and GPT-2 small, fp32 and bf16
    python benchmarks/limits.py --shapes long --dtypes fp32 --rounds 5

A share is the time that the phase's limit allows, divided by the time that it took. Both are measured in turn
in the same run: a step in fp32, a step in bf16, then the machine; the table tells medians over such rounds,
by the wall's clock and by that of the processors, which a busy machine disturbs less. (With OMP_NUM_THREADS=1
the two are the same on a quiet one. With more, the second does not see a thread that waits.)

scoring, update   all matrix products of the phase's passes, at their own sizes and in their dtype:
                  projections, attention, vocabulary, and the two of each that a backward pass takes. Each is
                  timed alone, into memory that is there. What is no matrix product (softmax, norms,
                  activations, losses, AdamW) keeps a share below 1.
decoding          a token's limit is the larger of traffic and arithmetic. Traffic: all weights and the filled
                  part of the key-value cache are read once, at the rate at which this machine sums up as many
                  bytes. Arithmetic: the products' operations at the best rate of any product above.
                  A prompt's pass, and under bf16 the pass that scores the policy, count as in scoring.

It also tells the step's gain in bf16, fp32 seconds by bf16 seconds, and what the processor has for it.
"""

import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

from steps import SHAPES, Shape, build, count, ours, parser, report, spread, versions, write_json

DTYPES = ("fp32", "bf16")
PHASES = ("rollout", "scoring", "update")
Product = tuple[int, int, int, int]  # (batch, m, k, n): batch times (m, k) @ (k, n)


def forward(shape: Shape, rows: int, length: int, vocabulary: int) -> Counter:
    """Product -> its number in a pass over `rows` sequences, each with logits at `vocabulary` positions."""
    tokens, width, per_head = rows * length, shape.width, shape.width // shape.heads
    products = Counter()
    for k, n in ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)):
        products[1, tokens, k, n] += shape.layers
    products[rows * shape.heads, length, per_head, length] += shape.layers
    products[rows * shape.heads, length, length, per_head] += shape.layers
    if vocabulary:
        products[1, rows * vocabulary, width, shape.words] += 1
    return products


def backward(products: Counter) -> Counter:
    """The products of the gradients of both factors."""
    gradients = Counter()
    for (batch, m, k, n), times in products.items():
        gradients[batch, m, n, k] += times
        gradients[batch, k, m, n] += times
    return gradients


def repeated(products: Counter, times: int) -> Counter:
    return Counter({product: times * number for product, number in products.items()})


def phases(shape: Shape, dtype: str) -> dict[str, Counter]:
    """The products of a step's phases; those of decoding are a token's."""
    length, logits = shape.prompt + shape.response, shape.response + 1
    micro = min(shape.micro_batch, shape.minibatch)
    one, with_logits = (forward(shape, micro, length, words) for words in (0, logits))
    pieces = shape.batch // micro
    prefill = forward(shape, shape.batch, shape.prompt, 0)
    prefill[1, shape.batch, shape.width, shape.words] += 1
    if dtype == "bf16":
        prefill += repeated(with_logits, pieces)
    trained = repeated(with_logits, 2) + repeated(one, 2)  # policy, PTX and two critics
    return {
        "prefill": prefill,
        "scoring": repeated(with_logits + repeated(one, 4), pieces),
        "update": repeated(trained + backward(trained), pieces),
    }


def operations(products: Counter) -> int:
    return sum(2 * times * batch * m * k * n for (batch, m, k, n), times in products.items())


def seconds(call, repeats: int = 3) -> tuple[float, float]:
    """Median seconds of a call, after one to warm up: the wall's, and those of processors."""
    taken = []
    for _ in range(repeats + 1):
        began = time.perf_counter(), time.process_time()
        call()
        taken.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    return tuple(map(statistics.median, zip(*taken[1:])))


def product_seconds(product: Product, dtype: str) -> tuple[float, float]:
    import torch

    batch, m, k, n = product
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    a, b = torch.randn(batch, m, k).to(kind), torch.randn(batch, k, n).to(kind)
    c = torch.empty(batch, m, n, dtype=kind)
    a, b, c = (x[0] if batch == 1 else x for x in (a, b, c))
    return seconds(lambda: torch.matmul(a, b, out=c))


def reading_seconds(size: int) -> tuple[float, float]:
    """To read `size` bytes, by summing them up."""
    import torch

    return seconds(torch.ones(size // 4).sum, repeats=9)


def limits(shape: Shape, dtype: str) -> list[dict[str, float]]:
    """By the wall and by processors: seconds that each phase needs at least, and the machine's two rates."""
    found = phases(shape, dtype)
    timed = {product: product_seconds(product, dtype) for product in set().union(*found.values())}
    size = 2 if dtype == "bf16" else 4
    weights = size * (12 * shape.layers * shape.width**2 + shape.width * shape.words)
    filled = shape.prompt + shape.response / 2  # of the cache, on average
    cache = size * 2 * shape.layers * shape.width * shape.batch * filled
    token = 2 * shape.batch * (weights / size + 2 * shape.layers * shape.width * filled)
    result = []
    for clock, reading in enumerate(reading_seconds(weights)):
        least = {name: sum(n * timed[p][clock] for p, n in found[name].items()) for name in found}
        rate = max(operations(Counter([product])) / taken[clock] for product, taken in timed.items())
        traffic, arithmetic = (weights + cache) * reading / weights, token / rate
        least["rollout"] = least.pop("prefill") + (shape.response - 1) * max(traffic, arithmetic)
        bound = "traffic" if traffic > arithmetic else "arithmetic"
        result.append(least | {"gflops": rate / 1e9, "gbytes": weights / reading / 1e9, "bound": bound})
    return result


def features() -> str:
    import torch

    known = {"AMX": "_is_amx_tile_supported", "AVX-512 BF16": "_is_avx512_bf16_supported"}
    return ", ".join(name for name, ask in known.items() if getattr(torch.cpu, ask)()) or "none"


def measure(shape: Shape, dtypes: list[str], rounds: int) -> list[dict]:
    """Rows for the table, one a dtype."""
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), shape)
        sides = {dtype: ours(Path(folder), shape, dtype) for dtype in dtypes}
        for side in sides.values():
            side.read()
            side.step()  # not counted
        taken = []
        for _ in range(rounds):
            steps = {dtype: side.step() for dtype, side in sides.items()}
            taken.append({dtype: (steps[dtype], limits(shape, dtype)) for dtype in dtypes})
        for side in sides.values():
            side.close()
    return [row_of(dtype, [r[dtype] for r in taken]) | gain(dtype, taken) for dtype in dtypes]


def row_of(dtype: str, rounds: list[tuple[dict, list[dict]]]) -> dict:
    """Shares of the limits by both clocks, seconds, and what the machine did, over rounds (step, limits)."""
    row = {"dtype": dtype}
    for phase in PHASES:
        for clock, (name, prefix) in enumerate((("", "seconds"), (" (processors)", "cpu"))):
            shares = [least[clock][phase] / step[f"{prefix}_{phase}"] for step, least in rounds]
            row[phase + name] = spread(shares)
        row[f"seconds of {phase}"] = spread([step[f"seconds_{phase}"] for step, _ in rounds])
    rates = {name: spread([least[0][name] for _, least in rounds]) for name in ("gflops", "gbytes")}
    return row | rates | {"decoding is bound by": rounds[0][1][0]["bound"]}


def gain(dtype: str, taken: list[dict]) -> dict:
    """How many times faster than the fp32 step of the same round."""
    if dtype == "fp32" or "fp32" not in taken[0]:
        return {}
    names = {"gain": "seconds", "gain (processors)": "cpu"}
    return {n: spread([r["fp32"][0][key] / r[dtype][0][key] for r in taken]) for n, key in names.items()}


def main(args) -> None:
    result = versions() | {"processor's bf16": features(), "rounds": args.rounds, "rows": []}
    for name in args.shapes:
        for row in measure(SHAPES[name], args.dtypes, args.rounds):
            result["rows"].append({"shape": name} | row)
            report({"shape": name} | row)
    if args.output:
        write_json(args.output, result)


if __name__ == "__main__":
    flags = parser(__doc__)
    flag = flags.add_argument
    flag("--shapes", nargs="+", choices=SHAPES, default=["4x256", "gpt2"], help="to measure")
    flag("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of the steps")
    flag("--rounds", type=count, default=3, help="measured rounds, after one step that is not")
    flag("--output", help="write everything as JSON")
    main(flags.parse_args())
