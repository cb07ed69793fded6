"""The demo's results over several seeds: every seed, mean and standard deviation, as a Markdown table.

    for s in 0 1 2; do make demo SEED=$s DEMO=runs/seed$s; done
    .venv/bin/python benchmarks/seeds.py runs/seed0 runs/seed1 runs/seed2
"""

import json
import statistics
import sys
from pathlib import Path


def last_metrics(folder: Path, run: str) -> list[dict]:
    return [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]


def numbers(folder: Path) -> dict[str, float]:
    """What one seed's demo came to, by the truth on the held-out prompts unless it says otherwise."""
    policies = json.loads((folder / "evaluation/summary.json").read_text())["policies"]
    sft, safe, repo = (policies[name] for name in ("sft", "safe_rlhf", "repo"))
    window = [row["cost"] for row in last_metrics(folder, "safe_rlhf")[-10:]]
    return {
        "reward model: held-out pairs ordered rightly, %": 100 * last_metrics(folder, "reward_model")[-1]["eval_accuracy"],
        "cost model: sign right on held-out pairs, %": 100 * last_metrics(folder, "cost_model")[-1]["eval_sign_accuracy"],
        "SFT: truly unsafe, %": 100 * sft["true_unsafe_rate"],
        "Safe RLHF: truly unsafe, %": 100 * safe["true_unsafe_rate"],
        "RePO: truly unsafe, %": 100 * repo["true_unsafe_rate"],
        "Safe RLHF: learned cost, last 10 rollouts": statistics.mean(window),
        "Safe RLHF: learned cost, held-out prompts": safe["cost"],
        "RePO: learned cost, held-out prompts": repo["cost"],
        "Safe RLHF: true reward, benign prompts": safe["by_harm_level"]["benign"]["true_reward"],
        "RePO: true reward, benign prompts": repo["by_harm_level"]["benign"]["true_reward"],
        "RePO / Safe RLHF: true reward, benign prompts, %": 100
        * repo["by_harm_level"]["benign"]["true_reward"] / safe["by_harm_level"]["benign"]["true_reward"],
        "SFT: refusals of benign prompts, %": 100 * sft["over_refusal_rate"],
        "Safe RLHF: refusals of benign prompts, %": 100 * safe["over_refusal_rate"],
        "RePO: refusals of benign prompts, %": 100 * repo["over_refusal_rate"],
        "SFT: best-safe share, %": 100 * sft["best_safe_share"],
        "Safe RLHF: best-safe share, %": 100 * safe["best_safe_share"],
        "RePO: best-safe share, %": 100 * repo["best_safe_share"],
    }  # fmt: skip


if __name__ == "__main__":
    folders = [Path(name) for name in sys.argv[1:]]
    if len(folders) < 2:
        raise SystemExit(__doc__)
    columns = [numbers(folder) for folder in folders]
    print("| | " + " | ".join(folder.name for folder in folders) + " | mean ± sd |")
    print("|---|" + "---:|" * (len(folders) + 1))
    for name in columns[0]:
        values = [column[name] for column in columns]
        digits = 1 if "%" in name else 2
        cells = [f"{value:.{digits}f}" for value in values]
        print(f"| {name} | {' | '.join(cells)} | {statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f} |")
