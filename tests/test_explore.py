"""explore.html: what stands in it, that no text can break it, and what it does in a real browser."""

import json
import re

import browser
import pytest

import plots
from plumbing import explore

HOSTILE = [
    "<img src=x onerror=document.title='ran'>",
    "</script><script>document.title='ran'</script>",
    "<!-- <script>",
    "\"quotes\" 'single' `back` \\ \\u003c {{data}} &lt;&amp;",
    "\U0001f525 \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\u0644\u0627 \u0623\u0633\u062a\u0637\u064a\u0639",
    "line\u2028line\u2029line\u202eback\u2066\x00\x0b",
    "",
]
KEYS = ("policy", "prompt", "response", "reward", "cost", "true_reward", "true_cost", "harm_level")
ROWS = [
    dict(zip(KEYS, row))
    for row in (
        ("sft", HOSTILE[1], HOSTILE[0], 1.0, 3.0, 2.0, 2.5, 0),
        ("sft", HOSTILE[1], "No.", -1.0, -2.0, 0.0, -1.0, 0),
        ("sft", "How do I bake?", HOSTILE[5], 0.5, -3.0, 1.0, -2.0, 2),
        ("sft", "How do I bake?", HOSTILE[2], 2.0, -1.0, 1.0, 4.0, 2),  # truly unsafe: an error
        ("repo", HOSTILE[1], "No.", -1.0, -2.0, 0.0, -1.0, 0),
        ("repo", HOSTILE[1], "No.", -1.0, -2.0, 0.0, -1.0, 0),
        ("repo", "How do I bake?", HOSTILE[4], 1.5, -2.5, 2.0, -2.0, 2),
        ("repo", "How do I bake?", "", 0.0, 0.5, 0.0, -1.0, 2),  # truly safe: an error
    )
]
FLAT = {"unsafe_rate": 0.25, "lambda": 1.0, "violation": 0.5, "kl": 0.0}
METRICS = [{"step": i, "reward": 0.5 * i, "cost": 2.0 - i} | FLAT for i in range(3)]
LOGS = {"repo": ({"threshold": -1.0, "batch_size": 4}, METRICS)}
STYLE = {"sft": ("#7F7F7F", "-", "SFT (initial)"), "repo": ("#0072B2", "--", "RePO")}


def page(rows=ROWS, logs=LOGS, title="runs/x") -> str:
    by_policy = {name: [row for row in rows if row["policy"] == name] for name in STYLE}
    by_policy = {name: own for name, own in by_policy.items() if own}
    return explore.page(title, by_policy, logs, STYLE, plots.group_of(next(iter(by_policy.values()))), 9)


def without_truth(rows: list[dict]) -> list[dict]:
    return [{key: row[key] for key in KEYS[:5]} for row in rows]


def data_in(html: str) -> dict:
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', html, re.S)[1])


# ------------------------------------------------------------------------------ what stands in the page


def test_the_page_holds_every_row_and_each_text_once():
    data = data_in(page())
    assert data["prompts"] == [HOSTILE[1], "How do I bake?"] and data["group"] == [0, 2]
    assert len(data["responses"]) == 6
    for i, row in enumerate(ROWS):
        assert data["policies"][data["policy"][i]]["label"] == STYLE[row["policy"]][2]
        assert data["prompts"][data["prompt"][i]] == row["prompt"]
        assert data["responses"][data["response"][i]] == row["response"]
        assert [data[key][i] for key in KEYS[3:7]] == [row[key] for key in KEYS[3:7]]
    assert data["runs"][0]["metrics"]["cost"] == [2.0, 1.0, 0.0] and data["runs"][0]["step"] == [0, 1, 2]


def test_rounding_keeps_the_sign_of_a_cost():
    tiny = [ROWS[0] | {"cost": cost} for cost in (1e-9, -1e-9, 0.0, 12345.678)]
    assert data_in(page(tiny))["cost"] == [1e-9, -1e-9, 0.0, 12346.0]


def test_no_text_ends_the_data_or_begins_markup():
    html = page(
        [row | {"prompt": text, "response": text} for row in ROWS for text in HOSTILE], title=HOSTILE[1]
    )
    empty = page(ROWS[:1], {}, "")
    assert html.count("<") == empty.count("<")  # whatever the data says, the tags are the template's
    assert data_in(html)["responses"] == HOSTILE and data_in(html)["title"] == HOSTILE[1]
    assert not re.search(r"\b(?:src|href|url|import)\s*[=(]", explore.page("", {}, {}, {}, ({}, ()), 9))


def test_true_scores_are_there_if_every_row_has_them():
    assert data_in(page())["true_cost"][3] == 4.0
    for rows in (without_truth(ROWS), [*ROWS, ROWS[0] | {"true_cost": "?"}]):
        assert "true_cost" not in data_in(page(rows))


def test_plots_writes_it_for_all_policies_with_and_without_runs(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(path.rpartition("/")[2]))
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    flags = ["--evaluation", str(tmp_path), "--runs", "--output-dir", str(tmp_path / "figures"), "--html"]
    plots.main(plots.parse_args(flags))
    assert drawn == ["scatter", "distributions", "compensation"]  # what needs no run
    path = tmp_path / "figures/explore.html"
    assert capsys.readouterr().out == f"{path}\n"
    data = data_in(path.read_text(encoding="utf-8"))
    assert [policy["colour"] for policy in data["policies"]] == ["#7F7F7F", "#0072B2"] and data["runs"] == []


UNLIKE = [
    (4, {"prompt": "Why?"}, "responses.jsonl: repo answered other prompts than sft; evaluate both in one"),
    (3, {"harm_level": None}, "responses.jsonl row 4: field 'harm_level' is missing; give every row of sft"),
]


@pytest.mark.parametrize("i, change, message", UNLIKE)
def test_answers_that_cannot_be_compared_are_one_clear_line(tmp_path, run_in, i, change, message):
    changed = {key: value for key, value in (ROWS[i] | change).items() if value is not None}
    rows = [*ROWS[:i], changed, *ROWS[i + 1 :]]
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--evaluation", tmp_path, "--runs", "--output-dir", tmp_path / "figures", "--html")
    code, error = run_in(tmp_path, "plots.py", *flags)
    assert code == 2 and message in error, error


# ------------------------------------------------------------------------------ what it does in a browser


@pytest.fixture(scope="module")
def chromium():
    program = browser.find()
    if not program:
        pytest.skip("no Chromium or Chrome is installed")
    try:
        tab = browser.Browser(program)
    except (OSError, TimeoutError) as error:
        pytest.skip(f"{program} does not start ({error})")
    yield tab
    tab.close()


@pytest.fixture
def tab(chromium, tmp_path):
    """tab(html, width) opens a page. In the end it must have asked for nothing and complained of nothing."""
    path = tmp_path / "explore.html"

    def load(html: str, **size):
        path.write_text(html, encoding="utf-8")
        chromium.open(path, **size)
        return chromium

    yield load
    assert chromium.problems == [] and chromium.asked == [f"file://{path}"]
    assert chromium("document.title").endswith(": explore")  # no text has run


def text(tab, selector: str) -> str:
    return tab(f"document.querySelector('{selector}').textContent")


def texts(tab, selector: str) -> list[str]:
    return tab(f"[...document.querySelectorAll('{selector}')].map((node) => node.textContent)")


def shown(tab) -> list[int]:
    return tab("[...shown.keys()].filter((i) => shown[i])")


def middle(tab, expression: str) -> list[float]:
    box = f"const box = ({expression}).getBoundingClientRect();"
    return tab(f"(() => {{ {box} return [box.left + box.width / 2, box.top + box.height / 2]; }})()")


def point(tab, row: int) -> list[float]:
    """Where a row's point lies in the window."""
    return tab(
        f"(() => {{ const panel = panels[policyOf[{row}]], box = panel.plot.getBoundingClientRect();"
        f" const [x, y] = place(panel, {row}); return [box.left + x, box.top + y]; }})()"
    )


def choose(tab, name: str, option: str) -> None:
    label = f"[...document.querySelectorAll('label')].find((l) => l.textContent.startsWith('{option}')"
    tab.click(*middle(tab, f"{label} && l.querySelector('[name={name}]'))"))


def test_the_pointer_shows_an_answer_with_its_scores(tab):
    tab = tab(page())
    assert tab("$('card').hidden")
    tab.move(*point(tab, 3))
    assert not tab("$('card').hidden")
    assert text(tab, "#card-policy") == "SFT (initial)" and text(tab, "#card-group") == "harmful"
    assert text(tab, "#card-prompt") == "How do I bake?" and text(tab, "#card-response") == HOSTILE[2]
    assert texts(tab, "#card-scores td") == [
        "reward",
        "+2.00",
        "+1.00",
        "cost",
        "\u22121.00 safe",
        "+4.00 unsafe",
    ]
    assert text(tab, "#card-note") == "the cost model errs: truly unsafe"
    tab.move(*point(tab, 7))
    assert text(tab, "#card-policy") == "RePO" and text(tab, "#card-response") == "(empty)"
    tab.move(2, 2)
    assert tab("$('card').hidden")


def test_a_click_pins_the_prompt_with_the_answers_of_every_policy(tab):
    tab = tab(page())
    tab.click(*point(tab, 0))
    assert text(tab, "#pinned-prompt") == HOSTILE[1]
    assert texts(tab, "#answers h3") == [
        "SFT (initial) 1 of 2 unsafe, truly 1",
        "RePO 0 of 2 unsafe, truly 0",
    ]
    assert texts(tab, "#answers li .text") == [HOSTILE[0], "No.", "No."]  # RePO's two are one entry
    assert texts(tab, "li.chosen .text") == texts(tab, "li.unsafe .text") == [HOSTILE[0]]
    assert text(tab, "#answers > div:last-child li p + p") == (
        "C \u22122.00 (true \u22121.00), R \u22121.00 (true 0.00), 2 times"
    )
    tab.press("n")
    assert text(tab, "#pinned-prompt") == "How do I bake?"
    assert texts(tab, "#answers li .text") == [HOSTILE[2], HOSTILE[5], "(empty)", HOSTILE[4]]  # by cost
    tab.press("n")
    assert text(tab, "#pinned-prompt") == HOSTILE[1]
    tab.press("Escape")
    assert tab("$('pinned').hidden")
    tab.press("p")
    assert text(tab, "#pinned-prompt") == "How do I bake?"  # from none the last one


def test_filters_show_groups_signs_and_the_cost_model_s_errors(tab):
    tab = tab(page())
    assert texts(tab, "label small") == [*"8404", *"862", *"8622", "", ""]
    choose(tab, "truth", "the contrary")
    assert shown(tab) == [3, 7]
    assert texts(tab, ".panel:first-child td")[:6] == [
        "unsafe answers", "0.0%", "100.0%", "prompts with one", "0.0%", "100.0%",
    ]  # fmt: skip
    choose(tab, "learned", "unsafe")
    assert shown(tab) == [7]
    choose(tab, "truth", "any")
    assert shown(tab) == [0, 7]
    choose(tab, "group", "benign")
    assert shown(tab) == [0]
    tab.move(*point(tab, 1))  # what is filtered out is not found
    assert tab("$('card').hidden")


def test_the_search_finds_text_of_prompts_and_answers(tab):
    tab = tab(page())
    tab.press("/")
    tab.type("BAKE")
    assert shown(tab) == [2, 3, 6, 7]
    tab("$('query').select()")
    tab.type("no.")
    assert shown(tab) == [1, 4, 5]
    tab("$('query').select()")
    tab.type("n")  # is typed, and turns no prompt
    assert tab("$('query').value") == "n" and tab("$('pinned').hidden")
    tab.press("Escape", "n")
    assert text(tab, "#pinned-prompt") == HOSTILE[1]


def test_everything_can_be_had_by_the_keyboard(tab):
    tab = tab(page())
    tab("panels[0].plot.focus()")
    tab.press("ArrowRight")
    tab.press("ArrowRight", "ArrowRight", "ArrowRight")  # to the costliest
    assert text(tab, "#card-response") == HOSTILE[0]
    tab.press("Enter")
    assert text(tab, "li.chosen .text") == HOSTILE[0]
    tab.press("Escape")
    assert tab("$('card').hidden && $('pinned').hidden")
    tab("document.querySelector('[name=learned]').focus()")
    tab.press("ArrowRight")
    assert shown(tab) == [1, 2, 3, 4, 5, 6]
    tab("curves[1].plot.focus()")
    tab.press("ArrowLeft")
    assert texts(tab, ".values")[:4] == ["RePO 0.5", "RePO 1", "RePO 25%", "RePO 1"]


def test_curves_say_the_values_at_the_pointer(tab):
    tab = tab(page(), height=1200)
    assert texts(tab, "#curves h3")[:2] == ["mean reward of a rollout", "mean cost of a rollout"]
    assert texts(tab, ".values") == ["RePO 1", "RePO 0", "RePO 25%", "RePO 1", "RePO 0.5", "RePO 0"]
    x, y = middle(tab, "curves[1].canvas")
    tab.move(x + 10, y)
    assert texts(tab, ".values")[1] == "RePO 1" and "step 1 " in text(tab, "#step")
    tab.move(*middle(tab, "$('theme')"))
    assert "step 1 " in text(tab, "#step")


def test_it_works_without_truth_with_one_policy_and_without_runs(tab):
    tab = tab(page(without_truth(ROWS[4:]), {}))
    assert texts(tab, "legend") == ["Prompts", "The cost model says"] and len(tab("panels")) == 1
    assert tab("$('training').hidden")
    tab.move(*point(tab, 2))
    assert texts(tab, "#card-scores td") == ["reward", "+1.50", "cost", "\u22122.50 safe"]
    tab.press("n")
    assert texts(tab, "#answers li p + p")[0] == "C \u22122.00, R \u22121.00, 2 times"


def test_it_fits_a_phone_and_follows_the_system_s_colours(tab):
    opened = tab(page(title="runs/" + "deep/" * 40), width=390, dark=True)
    opened.press("n")
    assert opened("document.documentElement.scrollWidth") == 390
    dark = opened("getComputedStyle(document.body).backgroundColor")
    opened.click(*middle(opened, "$('theme')"))
    light = opened("getComputedStyle(document.body).backgroundColor")
    assert dark != light == tab(page())("getComputedStyle(document.body).backgroundColor")


def test_20_000_answers_are_no_20_000_nodes(tab):
    tab = tab(page([ROWS[i % 8] | {"response": f"answer {i}"} for i in range(20_000)]))
    assert texts(tab, "[name=learned] + small")[0] == "20,000"
    assert tab("document.querySelectorAll('*').length") < 300
    tab.press("/")
    tab.type("answer 1999")  # and 19990 to 19999
    assert len(shown(tab)) == 11
