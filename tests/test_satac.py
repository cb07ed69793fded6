"""SATAC: each equation by hand, the players' directions, the guarantee, the bridge, the script."""

import contextlib
import copy
import inspect
import math
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

import repo_ppo
import safe_rlhf_ppo
from offline import point_mass, satac, study, tabular
from plumbing.files import InputError, read_json, read_jsonl, write_json


def row(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------------------ equations


def test_relative_value_backup_and_target_by_hand():
    assert satac.relative_value(row(1.0, 3.0), row(0.0, 1.0)).item() == 1.5  # (1 + 2) / 2
    # 1 + 0.5 * 4 = 3; where the world ends the reward alone counts
    assert satac.backup(row(1.0, 1.0), row(0.0, 1.0), row(4.0, 4.0), gamma=0.5).tolist() == [3.0, 1.0]
    # the twin that is worse for the policy
    targets = torch.tensor([[[1.0, 5.0], [2.0, 3.0]], [[1.0, 5.0], [2.0, 3.0]]])  # reward, cost; twins; rows
    assert satac.against(targets).tolist() == [[[1.0, 3.0]], [[2.0, 5.0]]]


def test_bellman_error_by_hand_and_through_both_ends_of_the_residual():
    values, backups, targets = row(1.0, 2.0).requires_grad_(), row(2.0, 2.0).requires_grad_(), row(3.0, 0.0)
    error = satac.bellman_error(values, backups, targets)
    assert error.item() == 0.5 * (4 + 4) / 2 + 0.5 * (1 + 0) / 2
    error.backward()
    assert values.grad.tolist() == [-1.0 - 0.5, 1.0] and backups.grad.tolist() == [0.5, 0.0]


def test_both_critics_work_against_the_policy():
    """A gradient step on S3 lowers what the policy earns beyond the data, one on S4 raises what it costs."""
    policy_values, data_values = (torch.zeros(2, 2, 3, requires_grad=True) for _ in range(2))
    relative = satac.relative_value(policy_values, data_values)
    loss = satac.critic_loss(relative, torch.ones(2, 2), lam=2.0, beta=3.0)
    assert loss.item() == 4 * 3.0
    loss.backward()
    reward, cost = -policy_values.grad  # the direction of a step
    torch.testing.assert_close(reward, torch.full((2, 3), -1 / 3))
    torch.testing.assert_close(cost, torch.full((2, 3), 2 / 3))
    assert torch.equal(data_values.grad, -policy_values.grad)


@pytest.mark.parametrize(
    "hinge, violation, with_margin, credit",
    [("none", -0.5, 0.5, 0.5), ("batch", 0.0, 0.5, 0.0), ("point", 0.5, 1.0, 0.0)],
)
def test_cost_violation_by_hand(hinge, violation, with_margin, credit):
    """Differences 1 and -2: their mean is -0.5, and the 1 alone counts 0.5. With a margin of 1: 2 and -1.
    Only without a hinge is there credit, a gradient, for being safer than needed."""
    for margin, expected in ((0.0, violation), (1.0, with_margin)):
        assert satac.cost_violation(row(2.0, 1.0), row(1.0, 3.0), margin, hinge).item() == expected
    cost = row(-1.0, -2.0).requires_grad_()
    satac.cost_violation(cost, row(0.0, 0.0), 0.0, hinge).backward()
    assert cost.grad.tolist() == [credit, credit]


def test_actor_loss_and_multiplier():
    assert satac.actor_loss(torch.tensor(2.0), torch.tensor(3.0), lam=0.5).item() == -0.5
    sources = {inspect.getsource(script.multiplier_step) for script in (satac, safe_rlhf_ppo, repo_ppo)}
    assert len(sources) == 1
    assert satac.multiplier_step(0.0, 0.5, 0.1, 5.0).item() == pytest.approx(0.05)


def test_log_prob_is_a_density_on_the_actions():
    """Its integral over (-1, 1) is 1, by the substitution a = tanh(u)."""
    raw = torch.linspace(-8, 8, 20001, dtype=torch.float64)[:, None]
    density = satac.log_prob(torch.full_like(raw, 0.3), torch.full_like(raw, -0.2), raw).exp()
    assert torch.trapezoid(density, raw.tanh()[:, 0]).item() == pytest.approx(1, abs=1e-4)


def test_target_network_follows_slowly_and_weights_stay_in_their_ball():
    critics = satac.Critics(4, 2, 8)
    targets = copy.deepcopy(critics)
    with torch.no_grad():
        for p in critics.parameters():
            p.add_(1.0)
    satac.track(targets, critics, 0.1)
    for fast, slow in zip(critics.parameters(), targets.parameters()):
        torch.testing.assert_close(slow, fast - 0.9)
    satac.project(critics, 0.5)
    assert all(w.norm(dim=(1, 2)).max() <= 0.5 + 1e-5 for w in critics.weights)


def test_the_four_networks_are_independent():
    torch.manual_seed(0)
    critics = satac.Critics(4, 2, 8)
    values = critics(torch.randn(5, 4), torch.randn(5, 2))
    assert values.shape == (2, 2, 5)
    values[1, 0].sum().backward()
    for weights in critics.weights:
        assert weights.grad[2].abs().sum() > 0 and not weights.grad[[0, 1, 3]].any()


# ------------------------------------------------------------------------------ the guarantee and the bridge


def test_the_exact_critics_are_the_best_answers_and_true_where_nothing_is_gained_by_lying():
    transitions, rewards, costs = tabular.world(1)
    policy, mu = (tabular.behaviour(name, rewards, costs) for name in ("unsafe", "uniform"))
    data = tabular.occupancy(mu, transitions)[:, None] * mu
    game = [x.expand(3, *x.shape) for x in (torch.zeros_like(mu), policy, data, transitions, rewards)]
    answers = tabular.best_answer(*game, row(1.0, 0.0, -1.0), row(2.0, 2.0, 2.0), moves=2000)
    following = (policy * answers[1]).sum(-1)
    torch.testing.assert_close(answers[1], rewards + 0.9 * transitions @ following, atol=2e-3, rtol=0)
    low, honest, high = ((data.sum(-1, keepdim=True) * policy - data) * answers).sum((1, 2))  # S1
    gain = tabular.value(policy, transitions, rewards) - tabular.value(mu, transitions, rewards)
    assert honest.item() == pytest.approx(gain.item(), abs=2e-3)  # performance-difference lemma
    assert low < gain < high


def test_the_guarantee_holds_on_exact_worlds(capsys):
    gain, excess, lam = tabular.theorem(worlds=2, iterations=100)
    assert gain.shape == (3, 3, 2) and (gain >= -1e-6).all() and (excess <= 1 / lam).all()
    tabular.print_theorem(gain, excess, lam)
    assert capsys.readouterr().out.count("2/2") >= 9 * 2


def test_the_bridge_has_three_optima_and_the_algorithm_finds_them():
    found = {}
    for hinge in ("none", "batch", "point"):
        best, (policy, _) = tabular.brute_force(hinge, 2.0), tabular.descend(hinge, 2.0, steps=1500)
        torch.testing.assert_close(policy, best, atol=0.02, rtol=0)
        found[hinge] = [list(actions)[i] for actions, i in zip(tabular.CHOICES.values(), best.argmax(-1))]
    assert found == {"none": ["timid", "stay"], "batch": ["careful", "bold"], "point": ["stay", "stay"]}


# ------------------------------------------------------------------------------ the world and its data


def test_reward_and_cost_by_hand():
    """At (1, 0) with velocity (0, 2): tangential speed 2, on the circle, and beyond the strip."""
    state = torch.tensor([[1.0, 0.0, 0.0, 2.0], [0.0, 0.5, -1.0, 0.0]])
    reward, cost = point_mass.reward_and_cost(state)
    assert reward.tolist() == pytest.approx([2.0, 1.0 / 1.5]) and cost.tolist() == [1.0, 0.0]


def small_data(**changes) -> dict:
    return point_mass.behaviour_data("mild", 5, seed=0) | changes


def test_an_episode_that_is_cut_off_counts():
    data = {name: array[:150] for name, array in small_data().items()}
    episode, returns, _ = point_mass.episode_sums(data)
    assert episode.bincount().tolist() == [100, 50] and len(returns) == 2
    assert returns.sum().item() == pytest.approx(data["rewards"].sum().item(), abs=1e-3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"costs": None}, "holds no costs"),
        ({"rewards": torch.zeros(7)}, "beside 7 rewards"),
        ({"rewards": torch.full((500,), math.nan)}, "rewards holds a NaN"),
        ({"actions": torch.full((500, 2), 3.0)}, "leave [-1, 1]"),
        ({"terminals": torch.full((500,), 7.0)}, "must be 0 or 1"),
        ({"terminals": torch.full((500,), -1.0)}, "must be 0 or 1"),
        ({"timeouts": torch.zeros(500)}, "where does an episode end"),
        ({"next_observations": torch.zeros(500, 3)}, "differ in width"),
    ],
)
def test_bad_data_is_refused_in_one_line(tmp_path, change, message):
    path = str(tmp_path / "data.safetensors")
    save_file({k: v for k, v in small_data(**change).items() if v is not None}, path)
    with pytest.raises(InputError) as error:
        point_mass.load_transitions(path)
    assert message in str(error.value) and path in str(error.value) and "\n" not in str(error.value)


def test_d4rls_layout_is_read(monkeypatch):
    data = small_data()
    kinds = {"terminals": bool, "timeouts": bool}
    arrays = {name: array.numpy().astype(kinds.get(name, float)) for name, array in data.items()}
    hdf5 = types.SimpleNamespace(File=lambda path: contextlib.nullcontext(arrays))
    monkeypatch.setitem(sys.modules, "h5py", hdf5)
    read = point_mass.load_transitions("data.hdf5")
    assert all(torch.equal(read[name], array) for name, array in data.items())
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(InputError, match="h5py"):
        point_mass.load_transitions("data.hdf5")


# ------------------------------------------------------------------------------ the script


def test_a_batch_is_a_function_of_seed_and_update_and_no_two_are_alike():
    data = small_data()
    actor = satac.Actor(data["observations"], 2, 8)
    args = satac.parse_args(["--batch-size", "16"])
    one, again, later = (satac.sample(data, actor, update, args) for update in (3, 3, 3 + args.updates))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["rewards"], later["rewards"]) and not torch.equal(one["noise"], later["noise"])
    assert len({one[name][0, 0].item() for name in ("actions", "policy_actions", "next_actions")}) == 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("satac")
    (path / "runs/satac").mkdir(parents=True)
    save_file(small_data(), path / "runs/satac/mild.safetensors")
    wide = small_data(observations=torch.randn(500, 7), next_observations=torch.randn(500, 7))
    save_file(wide, path / "wide.safetensors")
    return path


@pytest.fixture
def run_satac(folder, run_in):
    """run_satac(flags): a short run; exit code and the last line of stderr."""
    few = "--updates 4 --batch-size 16 --hidden 8 --episodes 2 --warm-steps 1"
    return lambda flags: run_in(folder, "offline/satac.py", *few.split(), *flags.split())


OWN_DATA = "--dataset wide.safetensors --episodes 0"
METHODS = ("", "--hinge point", "--hinge none", "--lambda-init 0", "--clone --safe-only", OWN_DATA)


@pytest.mark.parametrize("flags", METHODS)
def test_every_method_runs_to_the_end(folder, run_satac, flags):
    name = "run" + flags.replace(" ", "_")
    assert run_satac(f"--steps 3 --output-dir {name} {flags}")[0] == 0
    rows = read_jsonl(f"{folder}/{name}/metrics.jsonl")
    assert [r["step"] for r in rows] == [0, 1, 2]
    assert all(math.isfinite(v) for r in rows for v in r.values())
    lambdas = [r["lambda"] for r in rows]
    if flags != "--hinge none":
        assert lambdas == sorted(lambdas)  # the rectified violation is never negative
    if flags == "--lambda-init 0":
        assert lambdas == [0, 0, 0]
    summary = read_json(f"{folder}/{name}/model/summary.json")
    assert summary.get("return") == rows[-1].get("return")
    assert ("return" in summary) == (flags != OWN_DATA)  # own data need no world
    actor = load_file(folder / name / "model/actor.safetensors")
    assert not torch.equal(actor["average.0.weight"], actor["body.0.weight"])


@pytest.mark.parametrize("warm", ["1", "3"], ids=["in the game", "in the warm start"])
def test_a_resumed_run_is_bit_for_bit_the_unbroken_one(folder, run_satac, warm):
    """The checkpoint comes after two steps, with lambda on its way and targets behind their networks."""
    for part in ("whole --steps 4 --overwrite", "broken --steps 2 --overwrite", "broken --steps 4 --resume"):
        code, line = run_satac(f"--save-every 2 --lambda-lr 5 --warm-steps {warm} --output-dir {part}")
        assert code == 0, line
    whole, broken = (read_jsonl(f"{folder}/{run}/metrics.jsonl") for run in ("whole", "broken"))
    assert whole == broken
    for name in ("actor", "critics"):
        whole, broken = (load_file(folder / run / f"model/{name}.safetensors") for run in ("whole", "broken"))
        assert whole.keys() == broken.keys() and all(torch.equal(whole[k], broken[k]) for k in whole), name


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--dataset none.safetensors --output-dir x", "none.safetensors: cannot be read"),
        ("--lambda-init 9", "--lambda-init 9.0 is above --lambda-max"),
        ("--safe-only --cost-limit -1", "no episode of"),
        ("--dataset wide.safetensors --output-dir x", "give --episodes 0"),
        ("--dataset wide.safetensors", "--output-dir must be too"),
    ],
)
def test_bad_input_is_one_line(folder, run_satac, flags, message):
    code, line = run_satac(f"--steps 1 {flags}")
    assert code == 2 and message in line, line
    assert not (folder / "x/model").exists() and not (folder / "runs/satac/satac/metrics.jsonl").exists()


def test_the_study_judges_and_draws(tmp_path, monkeypatch):
    found = {"return": 20.0, "cost": 1.0, "behaviour_return": 10.0, "behaviour_cost": 2.0}
    assert study.good(found)
    assert not study.good(found | {"return": 10.0}) and not study.good(found | {"cost": 2.1})
    args = study.parse_args(["--seeds", "2", "--output-dir", str(tmp_path)])
    for _, _, seed, run, _ in study.planned(args):
        write_json(f"{run}/model/summary.json", found | {"return": 20.0 + seed})
    monkeypatch.setattr(study.study, "run_jobs", lambda *_: None)
    study.main(args)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert "| mild | SATAC | 2.05 ± 0.07 | 0.50 ± 0.00 | 2 of 2 |" in lines
    assert (tmp_path / "figures/satac_methods.png").stat().st_size > 10_000
