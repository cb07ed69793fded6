"""The promises about the code itself: twins in step, a loop that one can see, rooms, no dead flag."""

import ast
import difflib
import re
import subprocess
import sys

import pytest
from conftest import ENVIRONMENT, ROOT

# A twin and the functions that are its own. Every other one it shares to the letter.
PPO_TWINS = {
    "safe_rlhf_ppo.py": {"lagrangian_advantages", "expected_violation"},
    "repo_ppo.py": {"rectified_advantages", "rectified_violation"},
}
GROUP_TWINS = {"repo_ppo.py": {"gae", "value_loss", "update_critic"}, "repo_rloo.py": {"leave_one_out"}}
MODEL_TWINS = {
    "reward_model.py": {"reward_loss", "reward_loss_tokenwise"},
    "cost_model.py": {"cost_loss", "cost_loss_tokenwise", "harm_sign"},
}
MODELS = ("sft.py", "reward_model.py", "cost_model.py")
STAGES = (*MODELS, *PPO_TWINS, "repo_rloo.py", "evaluate.py", "plots.py", "toy_world.py")
# of this repository, what a file of the lower storeys may import; the scripts may import all of it
BELOW = {
    "lm": {"plumbing.files"},
    "plumbing.files": set(),
    "plumbing.explore": {"plumbing.files"},
    "plumbing.optim": {"plumbing.distributed", "plumbing.files"},
    "plumbing.cli": {"plumbing.files"},
    "plumbing.distributed": {"plumbing.files"},
    "plumbing.data": {"lm", "plumbing.files"},
    "plumbing.loading": {"lm", "plumbing.files"},
    "plumbing.ppo": {
        f"plumbing.{name}" for name in ("adapters", "cli", "data", "distributed", "files", "loading")
    },
    "plumbing.adapters": {"plumbing.distributed", "plumbing.files"},
    "plumbing.checkpoints": {
        f"plumbing.{name}" for name in ("adapters", "data", "distributed", "files", "optim")
    },
    "plumbing.runs": {f"plumbing.{name}" for name in ("checkpoints", "cli", "distributed", "files")},
}
FURTHER = sorted(
    f"{d}/{path.name}" for d in ("tools", "experiments", "offline") for path in (ROOT / d).glob("[a-z]*.py")
)
ALL = (*STAGES, *FURTHER, *(f"{room.replace('.', '/')}.py" for room in BELOW))


def source(name: str) -> str:
    return (ROOT / name).read_text()


def functions(name: str) -> dict[str, str]:
    text = source(name)
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    return {node.name: ast.get_source_segment(text, node) for node in nodes}


def changed_lines(a: str, b: str) -> int:
    """As `diff a b | grep -c '^[<>]'` counts them."""
    lines = list(difflib.unified_diff(source(a).splitlines(), source(b).splitlines(), n=0))[2:]
    return sum(line[0] in "+-" for line in lines)


def pairs(twins: dict) -> list[tuple[str, str]]:
    first, *others = twins
    return [(first, other) for other in others]


# ------------------------------------------------------------------------------ twins


def check_shared(first: str, name: str, twins: dict, filled_in: set[str]) -> None:
    one, other = functions(first), functions(name)
    assert one.keys() - other.keys() == twins[first] and other.keys() - one.keys() == twins[name]
    assert filled_in <= one.keys()
    for shared in one.keys() - twins[first] - filled_in:
        assert one[shared] == other[shared], shared


@pytest.mark.parametrize("first, name", pairs(PPO_TWINS))
def test_the_ppo_twins_share_every_function_but_the_constraint(first, name):
    check_shared(first, name, PPO_TWINS, {"parse_args", "main"})
    assert changed_lines(first, name) <= 80


@pytest.mark.parametrize("first, name", pairs(GROUP_TWINS))
def test_without_critics_repo_is_the_same_and_shorter(first, name):
    check_shared(first, name, GROUP_TWINS, {"parse_args", "step_metrics", "main"})
    assert len(source(name).splitlines()) <= len(source(first).splitlines()) - 60
    assert declared_flags(name) - declared_flags(first) == {"group-size"}


@pytest.mark.parametrize("first, name", pairs(MODEL_TWINS))
def test_the_model_twins_share_their_frame(first, name):
    filled_in = {"parse_args", "pair_batch", "batch_loss", "evaluate", "main"}
    check_shared(first, name, MODEL_TWINS, filled_in)
    assert changed_lines(first, name) <= 140


PHASES = ("1 rollout", "2 score", "3 shape", "4 advantages", "5 constraint", "6 update", "7 log and save")


@pytest.mark.parametrize("name", [*PPO_TWINS, "repo_rloo.py"])
def test_one_sees_the_loop(name):
    text = source(name)
    assert len(re.findall(r"^# =+ the constraint$", text, re.M)) == 1
    loop = re.search(r"^    for step in range\(.*?(?=^    \S)", text, re.M | re.S)[0].strip().splitlines()
    banners = [line.strip("# -=") for line in loop if re.match(r" +# [-=]+ \d", line)]
    assert tuple(banners) == PHASES
    assert [
        line for line in loop if re.match(r" +# =+ 5", line)
    ]  # where the twins part, the banner is double
    assert len(loop) <= 90  # one screen and a half
    assert max(map(len, text.splitlines())) <= 110


# ------------------------------------------------------------------------------ two storeys


def imported(name: str) -> set[str]:
    """Modules of this repository that a file imports, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & {path.removesuffix(".py").replace("/", ".") for path in ALL}


@pytest.mark.parametrize("room", BELOW)
def test_arrows_run_down_only(room):
    assert imported(f"{room.replace('.', '/')}.py") <= BELOW[room]


@pytest.mark.parametrize("script", STAGES)
def test_a_script_imports_no_script(script):
    assert imported(script) <= {*BELOW, "toy_world"}


def test_the_upper_storey_is_the_scripts_and_lm():
    assert {path.name for path in ROOT.glob("*.py")} == {*STAGES, "lm.py"}
    assert {f"plumbing.{path.stem}" for path in (ROOT / "plumbing").glob("[a-z]*.py")} == BELOW.keys() - {
        "lm"
    }


@pytest.mark.parametrize(
    "module",
    [
        "plumbing.files",
        "plumbing.runs",
        "plots",
        "experiments.figures",
        "experiments.study",
        "experiments.real_world",
    ],
)
def test_what_only_reads_and_draws_loads_no_torch(module):
    code = f"import sys, {module}; print(*{{'torch', 'transformers', 'datasets'}} & sys.modules.keys())"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert process.stdout.split() == []


# ------------------------------------------------------------------------------ flags, and foreign files


def declared_flags(name: str) -> set[str]:
    """Named flags and positional arguments."""
    return set(re.findall(r"\b(?:flag|add_argument)\(\s*\"(?:--)?([a-z-]+)\"", source(name)))


@pytest.mark.parametrize("name", (*STAGES, *FURTHER))
def test_every_flag_is_read(name):
    text = source(name)
    flags = declared_flags(name)
    flags |= declared_flags("plumbing/cli.py") if "add_run_flags(parser" in text else set()
    flags |= declared_flags("experiments/study.py") if "study_parser(" in text else set()
    # what a training script does not read itself, the storey below reads
    readers = text + "".join(
        source(f"{room.replace('.', '/')}.py") for room in BELOW if room != "plumbing.data"
    )
    readers += source("plumbing/data.py") if name in STAGES else ""
    if name.startswith("experiments/"):
        readers += source("experiments/study.py")  # whose jobs the other studies take
        readers += source("evaluate.py") if "from evaluate import" in text else ""
    for flag in (flag.replace("-", "_") for flag in flags):
        assert re.search(rf"args\.{flag}\b|getattr\(args, \"{flag}\"|\"{flag}\"", readers), flag


def test_nothing_unpickles_code():
    for path in map(ROOT.joinpath, ALL):
        text = path.read_text()
        for call in re.findall(r"torch\.load\([^\n]*", text):
            assert "weights_only=True" in call, f"{path.name}: {call}"
        assert not re.search("trust_remote_code(?!=False)", text)
