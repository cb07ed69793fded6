"""What --quantize int8 does to the scores of trained models, beside what bf16 does to them.

    .venv/bin/python benchmarks/int8_scores.py                        # after make study
    .venv/bin/python benchmarks/int8_scores.py --seeds 1 --study runs/study

The reward and cost models of every seed score the answers of their held-out pairs: in fp32, with weights and
products in bf16, and with fp32 products by the int8 weights of their blocks. Told is the root of the mean
squared difference from fp32, in standard deviations of the fp32 scores, and how many costs change their sign.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import lm  # noqa: E402
from lm import end_scores  # noqa: E402
from plumbing import (
    cli,  # noqa: E402
    data,  # noqa: E402
)
from plumbing.adapters import adapt  # noqa: E402
from plumbing.loading import load_score_model, load_tokenizer  # noqa: E402

INT8 = argparse.Namespace(lora_rank=1, lora_alpha=1.0, lora_targets=None, quantize="int8")  # B is zero


@torch.no_grad()
def scores(folder: str, kind: str, pairs: str, way: str) -> torch.Tensor:
    """(2 N,) end scores of all answers in a file of N pairs."""
    tokenizer = load_tokenizer(folder)
    rows = data.load_preferences(pairs, "better_response_id")
    texts = data.encode_texts(tokenizer, [(prompt, r) for prompt, *both, _, _ in rows for r in both])
    ids, mask = lm.pad(texts, tokenizer.pad_token_id, side="right")
    model = load_score_model(folder, kind, dtype=torch.bfloat16 if way == "bf16" else torch.float32)
    model = adapt(model, INT8) if way == "int8" else model
    pieces = zip(ids.split(256), mask.split(256))
    return torch.cat([end_scores(model(piece, part), part) for piece, part in pieces])


if __name__ == "__main__":
    parser = cli.parser(__doc__)
    parser.add_argument("--seeds", type=cli.count, default=5, help="seeds 0 to N - 1")
    parser.add_argument("--study", type=cli.path_name, default="runs/study", help="what make study has made")
    args = parser.parse_args()
    print("seed  model    bf16, sd  int8, sd  signs changed in bf16  in int8")
    for seed in range(args.seeds):
        for kind in ("reward", "cost"):
            root = f"{args.study}/seed{seed}"
            given = f"{root}/{kind}_model/model", kind, f"{root}/data/preferences_test_{kind}.jsonl"
            exact, *rounded = (scores(*given, way) for way in ("fp32", "bf16", "int8"))
            errors = [((other - exact).square().mean().sqrt() / exact.std()).item() for other in rounded]
            signs = [((other > 0) != (exact > 0)).float().mean().item() for other in rounded]
            signs = f"{signs[0]:22.2%}  {signs[1]:7.2%}" if kind == "cost" else ""
            print(f"{seed:4}  {kind:<7}  {errors[0]:8.4f}  {errors[1]:8.4f}{signs}", flush=True)
