"""The family of constraints and the group's baseline: by hand, in the loop, beside the scripts."""
# ruff: noqa: F811  (`folder` is a fixture of test_processes)

import inspect
import math
import shutil

import pytest
import torch
from conftest import Started, finish, places, timeless
from test_processes import RUNS, agree, folder, results  # noqa: F401

import repo_ppo
import repo_rloo
from experiments import constraints
from plumbing.files import read_json, read_jsonl

T = torch.tensor
COST = T([-3.0, 1.0, 4.0, -2.0])
REWARD_ADV, COST_ADV = T([[1.0], [2.0], [3.0], [4.0]]), T([[-1.0], [0.5], [2.0], [1.0]])
Z = 1.2815515655446004  # of the standard normal distribution 90% lies below it


def advantages(name: str, lam: float, threshold: float, *more) -> list[float]:
    function = getattr(constraints, f"{name}_advantages")
    return function(REWARD_ADV, COST_ADV, lam, COST, threshold, *more)[:, 0].tolist()


# ------------------------------------------------------------------------------ the pairs, by hand

EVERY = [(1 + 2) / 3, (2 - 1) / 3, (3 - 4) / 3, (4 - 2) / 3]  # (A_r - 2 A_c) / 3, for lambda = 2


def test_the_average_pays_for_all():
    assert constraints.expected_violation(COST, 0.5) == 0.0 - 0.5
    assert advantages("expected", 2.0, 0.5) == pytest.approx(EVERY)


def test_the_confidence_bound_is_above_the_average_and_costly_answers_count_more():
    error = math.sqrt((9 + 1 + 16 + 4) / 3 / 4)  # standard error of the four answers' mean, which is 0
    assert constraints.confidence_violation(COST, 0.5) == pytest.approx(Z * error - 0.5)
    prices = [2 * (1 + Z * cost / 3 / error) for cost in COST.tolist()]
    rows = zip(prices, REWARD_ADV[:, 0].tolist(), COST_ADV[:, 0].tolist())
    assert advantages("confidence", 2.0, 0.5) == pytest.approx([(r - p * c) / (1 + p) for p, r, c in rows])
    alike = constraints.confidence_advantages(REWARD_ADV, COST_ADV, 2.0, torch.ones(4), 0.5)
    assert alike[:, 0].tolist() == pytest.approx(EVERY)  # no spread: Safe RLHF


def test_of_the_tail_the_worst_pay_and_nobody_else_does(monkeypatch):
    monkeypatch.setattr(constraints, "TAIL", 0.5)
    assert constraints.cvar_violation(COST, 0.5) == (1 + 4) / 2 - 0.5
    assert advantages("cvar", 2.0, 0.5) == pytest.approx([1, *EVERY[1:3], 4])
    monkeypatch.setattr(constraints, "TAIL", 1.0)  # all of them: Safe RLHF
    assert constraints.cvar_violation(COST, 0.5) == constraints.expected_violation(COST, 0.5)
    assert advantages("cvar", 2.0, 0.5) == pytest.approx(EVERY)


def test_dominance_compares_sorted_costs_with_sorted_costs():
    first = T([-4.0, -1.0, 1.5, 3.0])  # beside -3, -2, 1, 4: above, below, below, above
    assert constraints.dominance_violation(COST, 0.0, first) == (1 + 0 + 0 + 1) / 4
    assert constraints.dominance_violation(COST, -1.0, first) == (2 + 0 + 0.5 + 2) / 4
    assert advantages("dominance", 2.0, 0.0, first) == pytest.approx([EVERY[0], 2, EVERY[2], 4])
    assert advantages("dominance", 2.0, -1.0, first) == pytest.approx([*EVERY[:3], 4])
    shuffled = COST[[2, 0, 3, 1]]  # which prompt has which cost does not matter, as in transport
    assert constraints.dominance_violation(shuffled, -1.0, first) == (2 + 0 + 0.5 + 2) / 4


def test_answers_to_one_prompt_may_pay_for_each_other_and_no_others():
    assert constraints.prompt_violation(COST, 0.5, 2) == (0 + 0.5) / 2  # the prompts' means are -1 and 1
    assert advantages("prompt", 2.0, 0.5, 2) == pytest.approx([1, 2, *EVERY[2:]])
    assert constraints.prompt_violation(COST, 0.5, 1) == repo_ppo.rectified_violation(COST, 0.5)
    alone = repo_ppo.rectified_advantages(REWARD_ADV, COST_ADV, 2.0, COST, 0.5)
    assert advantages("prompt", 2.0, 0.5, 1) == alone[:, 0].tolist()


GIVEN = {"dominance": (T([-4.0, -1.0, 1.5, 3.0]),), "prompt": (2,)}


@pytest.mark.parametrize("name", ["expected", "confidence", "cvar", "dominance", "prompt"])
def test_the_advantage_weighs_the_cost_as_the_violation_does(name):
    """A = (A_r - lambda w A_c) / (1 + lambda w), w = N dv/dC up to a factor that lambda takes up; and the KL
    term keeps its weight beta."""
    given, moved, slopes = GIVEN.get(name, ()), 1e-3, []
    violation, weigh = (getattr(constraints, f"{name}_{part}") for part in ("violation", "advantages"))
    for i in range(4):
        up, down = (COST.double() + sign * moved * torch.eye(4, dtype=torch.float64)[i] for sign in (1, -1))
        slopes.append(4 * (violation(up, 0.25, *given) - violation(down, 0.25, *given)) / (2 * moved))
    zeros = torch.zeros(4, 1)
    shares = weigh(zeros, zeros - 1, 3.0, COST, 0.25, *given)[:, 0]  # lambda w / (1 + lambda w)
    weights = shares / (1 - shares) / 3
    slopes = T(slopes) / (4 if name == "cvar" else 1)  # of four answers one is the tail
    torch.testing.assert_close(weights, slopes.float(), atol=1e-3, rtol=1e-3)
    kl = torch.randn(4, 1, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(weigh(-0.1 * kl, 0.1 * kl, 3.0, COST, 0.25, *given), -0.1 * kl)


def test_a_pair_is_a_dozen_lines():
    for name, function in inspect.getmembers(constraints, inspect.isfunction):
        if function.__module__ == constraints.__name__ and name.endswith(("_violation", "_advantages")):
            assert len(inspect.getsource(function).splitlines()) <= 12, name


# ------------------------------------------------------------------------------ in the loop

RLOO = RUNS["repo_rloo.py"].split()


def train(run_in, folder, name: str, *flags, script="experiments/constraints.py") -> list[dict]:
    output = f"runs/constraints/{name}"
    code, error = run_in(folder, script, *flags, "--output-dir", output)
    assert code == 0, error
    return timeless(read_jsonl(f"{folder}/{output}/metrics.jsonl"))


@pytest.mark.parametrize("name", constraints.MEMBERS)
def test_a_member_trains(run_in, folder, name):
    script = "repo_rloo.py" if name == "prompt_mean" else "repo_ppo.py"
    one, two = train(run_in, folder, name, name, *RUNS[script].split(), "--threshold", "-1")
    assert one["reward"] != two["reward"] and one["violation"] > 0
    assert (one["lambda"] == two["lambda"] == 1.0) if name == "fixed" else (1 < one["lambda"] < two["lambda"])
    assert read_json(f"{folder}/runs/constraints/{name}/args.json")["algorithm"] == name
    for script in (repo_ppo, repo_rloo):  # and leaves the scripts as they were
        assert script.rectified_violation.__module__ == script.__name__


@pytest.mark.parametrize("name, script", [("expected", "safe_rlhf_ppo.py"), ("every_prompt", "repo_ppo.py")])
def test_two_members_are_the_twins_to_the_last_bit(run_in, folder, name, script):
    """With the scripts' own defaults, the multiplier's rate among them."""
    flags = [*RUNS["safe_rlhf_ppo.py"].split(), "--steps", "3"]
    member = train(run_in, folder, f"as_{script}", name, *flags)
    assert member == train(run_in, folder, script, *flags, script=script)
    assert len({row["lambda"] for row in member}) == 3


def test_dominance_remembers_the_first_rollout_when_it_is_resumed(run_in, folder):
    flags = ["dominance", *RUNS["repo_ppo.py"].split(), "--steps", "4", "--save-every", "2"]
    straight = train(run_in, folder, "straight", *flags)
    before, after = (folder / "runs/constraints" / name for name in ("straight", "resumed"))
    shutil.copytree(before, after)
    shutil.rmtree(after / "checkpoints/step-4")
    assert train(run_in, folder, "resumed", *flags, "--resume") == straight
    assert len(read_json(f"{after}/first_costs.json")) == 8 and straight[-1]["violation"] > 0
    shutil.rmtree(after / "checkpoints/step-4")
    (after / "first_costs.json").unlink()
    again = (*flags, "--resume", "--output-dir", "runs/constraints/resumed")
    code, error = run_in(folder, "experiments/constraints.py", *again)
    assert code == 2 and "first_costs.json: cannot be read" in error


def launch_member(folder, name: str, run: str, ranks: int) -> list[Started]:
    script = "repo_rloo.py" if name == "prompt_mean" else "repo_ppo.py"
    flags = [name, *RUNS[script].split(), "--output-dir", f"runs/constraints/{run}"]
    return [Started(folder, "experiments/constraints.py", *flags, environment=p) for p in places(ranks)]


@pytest.mark.parametrize("name", ["confidence", "cvar", "dominance", "prompt_mean"])
def test_who_looks_at_all_costs_does_so_over_the_ranks(folder, name):
    finish(*launch_member(folder, name, f"{name}_one", 1), *launch_member(folder, name, f"{name}_two", 2))
    agree(folder, "constraints", f"{name}_one", f"{name}_two")


# ------------------------------------------------------------------------------ groups of answers


def test_the_others_of_its_group_are_an_answers_baseline():
    """Two prompts of three answers each: 1 - (2 + 6) / 2 = -3."""
    given = T([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    assert repo_rloo.leave_one_out(given, 3).tolist() == [-3.0, -1.5, 4.5, 0.0, 0.0, 0.0]
    shifted = given + T([7.0, 7.0, 7.0, -2.0, -2.0, -2.0])  # what a group shares is nobody's
    torch.testing.assert_close(repo_rloo.leave_one_out(shifted, 3), repo_rloo.leave_one_out(given, 3))
    assert repo_rloo.leave_one_out(given, 2).tolist() == [-1.0, 1.0, 1.0, -1.0, 0.0, 0.0]


def test_the_baseline_changes_nothing_in_the_mean():
    """Over all groups of 3 draws from 2 answers of probabilities p, the mean of A grad log p_k is that of
    the return: p_k (S_k - mean S)."""
    p, brought = T([0.3, 0.7], dtype=torch.float64), T([5.0, -1.0], dtype=torch.float64)
    total = torch.zeros(2, dtype=torch.float64)
    for draws in torch.cartesian_prod(*[torch.arange(2)] * 3):
        score = torch.eye(2, dtype=torch.float64)[draws] - p  # (3, 2), grad of log softmax
        advantages = repo_rloo.leave_one_out(brought[draws], 3)
        total += p[draws].prod() * (advantages[:, None] * score).mean(0)
    torch.testing.assert_close(total, p * (brought - p @ brought))


def test_every_token_learns_from_its_whole_answer(run_in, folder, monkeypatch):
    """In the loop: E6 gets, group by group, the advantages of the answers' sums of rewards and costs, with
    their KL, each at all tokens."""
    seen, real = [], repo_rloo.rectified_advantages
    monkeypatch.setattr(repo_rloo, "rectified_advantages", lambda *x: seen.append(x) or real(*x))
    monkeypatch.chdir(folder)
    args = repo_rloo.parse_args([*RLOO, "--sample-every", "1", "--output-dir", "runs/constraints/seen"])
    repo_rloo.main(args)
    rows = read_jsonl("runs/constraints/seen/samples.jsonl")
    for step, (reward_adv, cost_adv, *_) in enumerate(seen):
        group = [row for row in rows if row["step"] == step]
        assert [row["prompt"] for row in group[:4]] == [group[0]["prompt"]] * 4 and len(group) == 8
        for given, kind, sign in ((reward_adv, "reward", -1), (cost_adv, "cost", 1)):
            brought = T([row[kind] + sign * args.kl_coeff * row["kl"] for row in group])
            for first in (0, 4):
                own = brought[first : first + 4]
                by_hand = (4 * own - own.sum()) / 3
                torch.testing.assert_close(given[first : first + 4, 0], by_hand, atol=1e-5, rtol=1e-4)
            assert torch.equal(given, given[:, :1].expand(given.shape)) and given.shape[1] > 1


def test_without_critics_a_killed_run_resumes_bit_identical(run_in, folder):
    flags = [*RUNS["repo_rloo.py"].split(), "--steps", "4", "--save-every", "2"]
    straight = train(run_in, folder, "rloo", *flags, script="repo_rloo.py")
    after = folder / "runs/constraints/rloo_resumed"
    shutil.copytree(folder / "runs/constraints/rloo", after)
    shutil.rmtree(after / "checkpoints/step-4")
    shutil.rmtree(after / "model")
    assert train(run_in, folder, "rloo_resumed", *flags, "--resume", script="repo_rloo.py") == straight
    weights = [results(folder, "constraints", name)[1] for name in ("rloo", "rloo_resumed")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert {row["lambda"] for row in straight} != {1.0}


def test_without_critics_adapters_share_the_policys_weights(run_in, folder):
    rows = train(
        run_in, folder, "rloo_lora", *RLOO, "--lora-rank", "4", "--lr", "1e-2", script="repo_rloo.py"
    )
    assert abs(rows[0]["kl"]) < 1e-4 and rows[1]["kl"] != 0


@pytest.mark.parametrize("flags, said", [((), "required: member"), (("tail",), "invalid choice: 'tail'")])
def test_a_member_that_is_none_is_refused(run_in, folder, flags, said):
    code, error = run_in(folder, "experiments/constraints.py", *flags)
    assert code == 2 and said in error
