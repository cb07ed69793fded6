"""explore.html: every answer of an evaluation and the curves of its runs, in one file for any browser.

The page is `explore.template.html` with the data put in, so it needs no server and no network, and
plots.py --html writes it. What models and users wrote is data to it and never markup: it stands in one JSON
block in which no `<` is left, and the page shows it as text alone.
"""

import json
import os

from plumbing.files import schema_error

TEMPLATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "explore.template.html")
DASHES = {"-": [], "--": [7, 3], "-.": [7, 3, 2, 3], ":": [2, 3]}
CURVES = ("reward", "cost", "unsafe_rate", "lambda", "violation", "kl")


def short(value: float) -> float:
    """Five significant digits: enough to read, and the sign of a cost stays whatever it was."""
    return float(f"{value:.5g}")


def rows_of(by_policy: dict[str, list[dict]]) -> dict:
    """The rows as columns. Prompts and responses stand once each; the rows hold their numbers. True scores
    are there if every row has them."""
    prompts, responses, everything = {}, {}, [row for rows in by_policy.values() for row in rows]
    truth = all(schema_error(row, {"true_reward": float, "true_cost": float}) is None for row in everything)
    scores = ("reward", "cost", "true_reward", "true_cost") if truth else ("reward", "cost")
    return {
        "policy": [number for number, rows in enumerate(by_policy.values()) for _ in rows],
        "prompt": [prompts.setdefault(row["prompt"], len(prompts)) for row in everything],
        "response": [responses.setdefault(row["response"], len(responses)) for row in everything],
        "truncated": [int(row.get("truncated") is True) for row in everything],
        "prompts": list(prompts),
        "responses": list(responses),
    } | {key: [short(row[key]) for row in everything] for key in scores}


def curves_of(args: dict, metrics: list[dict]) -> dict:
    """What the page draws of a run."""
    columns = {name: [short(row[name]) for row in metrics] for name in CURVES}
    return {"threshold": args["threshold"], "step": [row["step"] for row in metrics], "metrics": columns}


def page(title: str, by_policy: dict, logs: dict, style: dict, groups: tuple, smooth: int) -> str:
    """The page's text.

    by_policy: name -> rows of responses.jsonl; logs: name -> (args, metrics) of its run, maybe none; style:
    name -> (colour, dashes, label); groups: prompt -> number of its group, and the groups' names; smooth:
    rollouts in the centred mean of the curves."""
    group_of, names = groups
    looks = {
        name: {"colour": colour, "dashes": DASHES[dashes], "label": label.replace("$\\nu$", "\u03bd")}
        for name, (colour, dashes, label) in style.items()
    }
    rows = rows_of(by_policy)
    data = rows | {
        "title": title,
        "policies": [looks[name] for name in by_policy],
        "groups": names,
        "group": [group_of.get(prompt, -1) for prompt in rows["prompts"]],
        "runs": [looks[name] | curves_of(*log) for name, log in logs.items()],
        "smooth": smooth,
    }
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no tag or comment can begin
    with open(TEMPLATE, encoding="utf-8") as file:
        return file.read().replace("{{data}}", text)
