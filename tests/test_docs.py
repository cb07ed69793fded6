"""README and docs/ say only what is there: flags, files, metrics, the diff; and their code runs."""

import ast
import difflib
import importlib
import inspect
import json
import re
import shlex
from pathlib import Path

import pytest

from plumbing import runs

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
PAGES = ("README.md", *DOCS, "offline/README.md", "benchmarks/RESULTS.md")
CODE = [
    path
    for folder in (".", "plumbing", "offline", "tools", "experiments", "benchmarks")
    for path in (ROOT / folder).glob("*.py")
]
MADE_BY_A_PAGE = {"runs/mine/my_data.py", "runs/mine/my_tokenizer.py"}


def text(name: str) -> str:
    return (ROOT / name).read_text()


def blocks(page: str, kind: str = "") -> list[str]:
    """The fenced blocks of a page, of one language."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text(page), re.S | re.M)
    return [content for language, content in fences if language == kind]


def commands(page: str) -> list[list[str]]:
    """The commands in a page's blocks, continued lines joined, comments left out."""
    lines = "\n".join(blocks(page)).replace("\\\n", " ").splitlines()
    starts = re.compile(r"(?:[A-Z_]+=\S+ )*(?=make |recipes/|\.venv/)")
    found = [(match, line) for line in lines if (match := starts.match(line))]
    return [shlex.split(line[match.end() :], comments=True) for match, line in found]


def script_of(command: list[str]) -> tuple[str, list[str]]:
    """(script, its flags) of a command that starts Python, or ("", [])."""
    program, *rest = command
    if program.endswith("torchrun"):
        rest = rest[2:]  # --nproc-per-node N
    if "python" not in program and "torchrun" not in program or rest[0] == "-c":
        return "", []
    script, *flags = rest[1:] if rest[0] == "-m" else rest
    return script if script.endswith(".py") else f"{script.replace('.', '/')}.py", flags


def module_of(script: str):
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


# ------------------------------------------------------------------------------ what is named exists


@pytest.mark.parametrize("page", PAGES)
def test_every_command_in_a_page_is_one_that_the_scripts_take(page, capsys):
    for command in commands(page):
        if command[0] == "make":
            targets = [word for word in command[1:] if "=" not in word]
            assert all(re.search(rf"^{target}:", text("Makefile"), re.M) for target in targets), command
        elif command[0].startswith("recipes/"):
            assert (ROOT / command[0]).exists(), command
        script, flags = script_of(command)
        if not script or script in {"pytest.py", *MADE_BY_A_PAGE}:
            continue
        assert (ROOT / script).exists(), command
        if not script.startswith("benchmarks/"):  # theirs is no function of argv
            try:
                module_of(script).parse_args(flags)
            except SystemExit:
                pytest.fail(f"{page}: {shlex.join(command)}\n{capsys.readouterr().err}")


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_in_a_page_exists(page):
    sources = [
        *(path.read_text() for path in CODE),
        *blocks(page, "diff"),
    ]  # a page may add a flag by its diff
    declared = {flag for source in sources for flag in re.findall(r"\(\s*\"--([a-z][a-z-]+)\"", source)}
    declared.add("nproc-per-node")  # torchrun's
    assert set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", text(page))) <= declared


@pytest.mark.parametrize("page", PAGES)
def test_every_path_in_a_page_exists(page):
    folder = (ROOT / page).parent
    links = set(re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text(page)))
    assert all((folder / link).exists() for link in links), [x for x in links if not (folder / x).exists()]
    named = set(re.findall(r"(?<![\w./<-])[\w./-]+\.(?:py|sh|md|png|svg|txt)\b", text(page)))
    for path in named - MADE_BY_A_PAGE:
        assert path.startswith("runs/") or (ROOT / path).exists() or (folder / path).exists(), path


def test_the_makefile_and_the_code_name_no_page_that_is_not_there():
    for path in [*CODE, ROOT / "Makefile", *(ROOT / "recipes").glob("*.sh")]:
        for page in re.findall(r"\bdocs/\w+\.md\b", path.read_text()):
            assert page in PAGES, f"{path.name}: {page}"


# ------------------------------------------------------------------------------ the README


def test_the_readme_is_one_short_reading():
    assert len(text("README.md").splitlines()) < 200


def without_docstring(script: str, name: str) -> list[str]:
    """The lines of a function, signature and body."""
    node = next(n for n in ast.parse(text(script)).body if getattr(n, "name", None) == name)
    doc = node.body[0]
    lines = text(script).splitlines()
    return lines[node.lineno - 1 : doc.lineno - 1] + lines[doc.end_lineno : node.end_lineno]


def test_the_readme_shows_the_real_diff():
    real = difflib.ndiff(*(text(f"{name}_ppo.py").splitlines() for name in ("safe_rlhf", "repo")))
    real = {line[0] + line[2:] for line in real}
    shown = [line for line in blocks("README.md", "diff")[0].splitlines() if line.strip()]
    assert not [line for line in shown if line not in real]
    for script, signs in (("safe_rlhf_ppo.py", "- "), ("repo_ppo.py", "+ ")):
        lines = iter(text(script).splitlines())  # goes on after each line found: the order is the file's
        assert not [line for line in shown if line[0] in signs and line[1:] not in lines]
    for script, sign, names in (
        ("safe_rlhf_ppo.py", "-", ("lagrangian_advantages", "expected_violation")),
        ("repo_ppo.py", "+", ("rectified_advantages", "rectified_violation")),
    ):
        for name in names:  # and nothing of the four functions is left out
            assert all(sign + line in shown for line in without_docstring(script, name)), name


def test_results_that_stand_twice_agree():
    """The README's rows are those of docs/results.md."""
    rows = {
        "SFT": "sft",
        "Safe RLHF, d = 0": "safe_rlhf",
        "Safe RLHF, d = -4": "safe_rlhf_d-4",
        "Safe RLHF at RePO's price": "safe_rlhf_price",
        "RePO, d = 0": "repo",
    }
    balanced = text("docs/results.md").split("## Balanced mix")[1].split("##")[0]
    for shown, name in rows.items():
        short, full = (
            [
                cell.strip()
                for cell in re.search(rf"^\| {re.escape(policy)} \|(.*)\|$", page, re.M)[1].split("|")
            ]
            for policy, page in ((shown, text("README.md")), (name, balanced))
        )
        assert short == [full[i] for i in (0, 1, 4, 5)], shown


# ------------------------------------------------------------------------------ docs/scaling.md


def test_the_memory_tables_are_what_the_plan_prints(tmp_path, monkeypatch, capsys):
    from tools import plan

    made = next(command for command in commands("docs/scaling.md") if "-c" in command)
    planned = [command for command in commands("docs/scaling.md") if "tools.plan" in command]
    monkeypatch.chdir(tmp_path)
    exec(made[2], {})
    for command in planned:
        plan.main(plan.parse_args(command[3:]))
        assert capsys.readouterr().out in blocks("docs/scaling.md")


# ------------------------------------------------------------------------------ docs/your_data.md

OWN_DATA = "docs/your_data.md"
QUICK = {"steps": 2, "batch_size": 8, "minibatch_size": 4, "samples": 2}

# A training script and its folder in runs/mine of docs/your_data.md. A further script is one line.
TRAINED = {
    "sft.py": "sft",
    "reward_model.py": "reward",
    "cost_model.py": "cost",
    "safe_rlhf_ppo.py": "safe_rlhf",
    "repo_ppo.py": "repo",
    "repo_rloo.py": "rloo",
}


def run(module, flags: list[str]) -> None:
    """A stage in this process, with the page's flags but few steps and samples."""
    args = module.parse_args(flags)
    vars(args).update({name: value for name, value in QUICK.items() if hasattr(args, name)})
    runs.run(module.main, args)


def own_data_command(script: str) -> list[str]:
    return next(command[2:] for command in commands(OWN_DATA) if command[1] == script)


@pytest.fixture(scope="module")
def own_data(tmp_path_factory):
    """The page followed to the letter on 40 rows; the folder where that was done."""
    folder = tmp_path_factory.mktemp("own_data")
    header, *rows = blocks(OWN_DATA, "csv")[0].splitlines()
    rows = [row.replace("?", f" on day {day}?", 1) for day in range(10) for row in rows]
    (folder / "runs/mine").mkdir(parents=True)
    (folder / "runs/mine/answers.csv").write_text("\n".join([header, *rows]) + "\n")
    names = ("runs/mine/my_data.py", "runs/mine/my_tokenizer.py")
    scripts = dict(zip(names, blocks(OWN_DATA, "python"), strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(runs, "stop_on_signals", lambda: None)  # Ctrl-C stays pytest's
        for _, script, *flags in commands(OWN_DATA):
            if script in scripts:
                exec(scripts[script], {"__name__": "__main__"})
            else:
                run(module_of(script), flags)
        for script, name in TRAINED.items():  # a script that the page does not name
            if not Path("runs/mine", name).exists():
                flags = [*own_data_command("repo_ppo.py"), "--output-dir", f"runs/mine/{name}"]
                run(module_of(script), flags)
    return folder


def test_the_page_on_own_data_leads_to_a_scatter(own_data):
    pairs, held_out = (
        [json.loads(line) for line in (own_data / f"runs/mine/{name}.jsonl").read_text().splitlines()]
        for name in ("pairs", "held_out")
    )
    assert len(pairs) == 36 and len(held_out) == 4
    assert not {row["prompt"] for row in pairs} & {row["prompt"] for row in held_out}
    assert {row["is_response_1_safe"] for row in pairs} == {True, False}
    summary = json.loads((own_data / "runs/mine/evaluation/summary.json").read_text())
    assert list(summary["policies"]) == ["sft", "safe_rlhf", "repo"]
    assert (own_data / "runs/mine/figures/scatter.png").stat().st_size > 10_000


def test_the_tokenizer_of_the_page_knows_every_text(own_data):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(own_data / "runs/mine/start")
    for words in ("How do I lend a knife?", "Crème brûlée, 180 °C \U0001f525"):
        assert tokenizer.decode(tokenizer(words).input_ids) == words


# ------------------------------------------------------------------------------ docs/metrics.md


def explained(heading: str = "") -> set[str]:
    """The names in the first column of the tables under a heading of docs/metrics.md, or of all of them."""
    part = text("docs/metrics.md").partition(f"## {heading}")[2]
    cells = re.findall(r"^\|(.*?)\|", part.split("\n## ")[0] if heading else part, re.M)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def logged(folder: Path, script: str) -> set[str]:
    lines = (folder / "runs/mine" / TRAINED[script] / "metrics.jsonl").read_text().splitlines()
    return {name for line in lines for name in json.loads(line)}


@pytest.mark.parametrize("script", TRAINED)
def test_every_logged_metric_is_explained(own_data, script):
    section = "PPO" if script.startswith(("safe_rlhf", "repo")) else "Supervised"
    assert logged(own_data, script) <= explained(section) | explained("On a GPU")


def test_no_metric_is_explained_that_nobody_logs(own_data):
    everything = set().union(*(logged(own_data, script) for script in TRAINED))
    assert explained("PPO") | explained("Supervised") <= everything


def test_every_number_of_an_evaluation_is_explained(own_data):
    summary = json.loads((own_data / "runs/mine/evaluation/summary.json").read_text())
    assert set(summary["policies"]["repo"]) <= explained("Evaluation")


# ------------------------------------------------------------------------------ docs/extending.md


def test_the_page_shows_a_member_as_it_is():
    from experiments import constraints

    (shown,) = blocks("docs/extending.md", "python")
    functions = [function for function in ast.parse(shown).body if isinstance(function, ast.FunctionDef)]
    assert len(functions) == 2
    for function in functions:
        assert ast.get_source_segment(shown, function) + "\n" == inspect.getsource(
            getattr(constraints, function.name)
        )


def test_the_page_names_every_member_and_counts_its_lines():
    from experiments import constraints

    rows = re.findall(r"^\| `(\w+)` \|.*\| (\d+) \|[^|]*\|$", text("docs/extending.md"), re.M)
    assert [name for name, _ in rows] == list(constraints.MEMBERS)
    pairs = dict(rows)
    for name, (pair, *_) in constraints.MEMBERS.items():
        if callable(pair):  # bound to a run
            short = name.split("_")[0]
            pair = [getattr(constraints, f"{short}_{part}") for part in ("violation", "advantages")]
        lines = 0
        for function in pair:
            source = inspect.getsource(function)
            node = ast.parse(source).body[0]
            lines += node.end_lineno - node.body[0].end_lineno
        assert int(pairs[name]) == lines, name
    lines = [len(text(script).splitlines()) for script in ("repo_ppo.py", "repo_rloo.py")]
    assert f"{lines[0] - lines[1]} lines shorter" in " ".join(text("docs/extending.md").split())


def with_additions() -> str:
    """experiments/constraints.py with those of docs/extending.md."""
    script = text("experiments/constraints.py")
    for hunk in blocks("docs/extending.md", "diff")[0].strip("\n").split("\n\n"):
        lines = hunk.splitlines()
        before, after = (
            "".join(line[1:] + "\n" for line in lines if line[0] in signs) for signs in (" -", " +")
        )
        assert script.count(before) == 1, hunk
        script = script.replace(before, after)
    return script


def test_a_member_of_ones_own_trains(own_data, monkeypatch):
    monkeypatch.chdir(own_data)
    monkeypatch.setattr(runs, "stop_on_signals", lambda: None)
    Path("with_mine.py").write_text(with_additions())
    monkeypatch.syspath_prepend(own_data)
    mine = importlib.import_module("with_mine")
    run(mine, ["share", *own_data_command("repo_ppo.py"), "--output-dir", "runs/mine/share"])
    one, two = map(json.loads, Path("runs/mine/share/metrics.jsonl").read_text().splitlines())
    assert one["violation"] == pytest.approx(one["over_limit_rate"] - 0.05) and one["reward"] != two["reward"]
    assert (one["lambda"] > 1) == (one["violation"] > 0) and one["lambda"] != 1
