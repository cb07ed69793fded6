"""docs/one_step.md: tables are what its blocks print, numbers in its text are theirs, and its claims hold."""

import contextlib
import io
import math
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parent.parent / "docs/one_step.md").read_text()
STEP = PAGE.partition("## Predict, then run")[0]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```\n", re.S | re.M)
TWO_DECIMALS = re.compile(r"-?\b\d+\.\d\d\b")
CALCULATION = re.compile(r"`([^`\n]+) = (-?\d+\.\d\d)`")


def table(text: str) -> str:
    """The table that a text begins with, "" if it begins with none."""
    return re.match(r"\n?((?:\|.*\n)*)", text)[1]


@pytest.fixture(scope="module")
def step():
    """The names that the page's Python leaves, and `printed`: (what a block printed, the page's table)."""
    names, printed = {}, []
    for block in BLOCK.finditer(STEP):
        if block[1] == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(block[2], names)
            printed.append((out.getvalue(), table(STEP[block.end() :])))
    return names | {"printed": printed}


def test_every_table_is_what_the_block_above_it_prints(step):
    assert len(step["printed"]) > 10
    for printed, shown in step["printed"]:
        assert printed == shown
    everything = [line for line in STEP.splitlines() if line.startswith("|") and TWO_DECIMALS.search(line)]
    assert everything == [line for _, shown in step["printed"] for line in shown.splitlines() if "." in line]


def test_every_sum_in_the_text_is_right_and_every_number_is_a_table_s_or_a_sum_s():
    calculations = CALCULATION.findall(PAGE)
    assert len(calculations) > 10
    for expression, result in calculations:
        assert f"{eval(expression, {'exp': math.exp}):.2f}" == result, expression
    prose = "\n".join(line for line in BLOCK.sub("", STEP).splitlines() if not line.startswith("|"))
    known = {result for _, result in calculations}
    known |= set(TWO_DECIMALS.findall(" ".join(table(STEP[block.end() :]) for block in BLOCK.finditer(STEP))))
    known |= {x for kind, code in BLOCK.findall(STEP) for x in TWO_DECIMALS.findall(code)}  # GAE's 0.95
    signless = {x.lstrip("-") for x in known}  # "2.04 - 0.82" has no number of -0.82
    assert {x.lstrip("-") for x in TWO_DECIMALS.findall(prose)} <= signless


def test_the_four_answers_show_what_the_page_says(step):
    cost, mask = step["cost"], step["mask"].bool()
    assert cost.mean() < 0 < cost.max()
    assert step["lam_s"] < 1 < step["lam_r"]  # the same answers, and the prices move apart
    refusal, plain, mild, very = range(4)
    for name, up in (("safe_rlhf", [refusal, plain, mild]), ("repo", [plain])):
        for answer in range(4):  # every token of an answer goes the same way
            assert ((step[name][answer] > 0) == (answer in up))[mask[answer]].all(), (name, answer)
    assert step["words_s"] == ["up", "up", "up", "down"] and step["words_r"] == ["down", "up", "down", "down"]
    assert (step["same_price"][[mild, very]] == step["repo"][[mild, very]]).all()
    assert (step["same_price"] != step["repo"])[[refusal, plain]][mask[[refusal, plain]]].all()
    highest = step["push"](step["reward_adv"])[1].argmax()
    assert highest == very  # what is left at a price of 0
