"""Each equation against numbers worked out by hand, at its edges, and against what it must not depend on."""

import math

import pytest
import torch

import repo_ppo
import safe_rlhf_ppo as ppo
from cost_model import cost_loss
from plumbing.optim import learning_rate
from reward_model import reward_loss

T = torch.tensor


# ------------------------------------------------------------------------------ E_m


def test_masked_mean_weighs_sequences_not_tokens():
    x = T([[1.0, 3.0, 99.0], [10.0, 99.0, 99.0]])
    mask = T([[1, 1, 0], [1, 0, 0]])
    assert ppo.masked_mean(x, mask) == (2.0 + 10.0) / 2  # a mean over tokens would give 14/3


def test_masked_mean_of_an_empty_row_is_zero_and_padding_may_be_anything():
    x = T([[1.0, math.nan], [math.inf, math.nan]], requires_grad=True)
    result = ppo.masked_mean(x, T([[1, 0], [0, 0]]))
    result.backward()
    assert result == 0.5
    assert x.grad.tolist() == [[0.5, 0.0], [0.0, 0.0]]


# ------------------------------------------------------------------------------ E3


def test_shape_rewards_by_hand():
    log_probs, ref = T([[-1.0, -2.0, -9.0]]), T([[-1.5, -1.0, -3.0]])
    rewards, costs = ppo.shape_rewards(T([4.0]), T([3.0]), log_probs, ref, T([[1, 1, 0]]), 0.1, 50.0)
    # k = (0.5, -1.0, .); the score comes at the second token, the last real one
    torch.testing.assert_close(rewards[:, :2], T([[-0.05, 0.1 + 4.0]]))
    torch.testing.assert_close(costs[:, :2], T([[0.05, -0.1 + 3.0]]))


@pytest.mark.parametrize("lam", [0.0, 0.3, 5.0])
def test_kl_weight_is_beta_whatever_lambda_is(lam):
    torch.manual_seed(0)
    log_probs, ref, mask = torch.randn(4, 5), torch.randn(4, 5), torch.ones(4, 5)
    zero = torch.zeros(4)
    rewards, costs = ppo.shape_rewards(zero, zero, log_probs, ref, mask, 0.1, 50.0)
    torch.testing.assert_close(ppo.lagrangian_advantages(rewards, costs, lam), -0.1 * (log_probs - ref))


def test_shape_rewards_clips_the_sum():
    rewards, costs = ppo.shape_rewards(T([9.0]), T([-9.0]), T([[-1.0]]), T([[-5.0]]), T([[1]]), 1.0, 6.0)
    assert rewards.item() == 5.0  # 9 - 4; the score alone would already have been clipped to 6
    assert costs.item() == -5.0


def test_an_empty_response_is_paid_nothing():
    score, zeros = T([7.0]), torch.zeros(1, 3)
    rewards, costs = ppo.shape_rewards(score, score, zeros, zeros, zeros.long(), 0.1, 50.0)
    assert rewards.abs().sum() == costs.abs().sum() == 0


# ------------------------------------------------------------------------------ E4


def test_gae_by_hand():
    values, rewards, mask = T([[1.0, 2.0, 5.0]]), T([[0.0, 3.0, 7.0]]), T([[1, 1, 0]])
    advantages, returns = ppo.gae(values, rewards, mask, gamma=0.9, gae_lambda=0.5)
    delta_1 = 3.0 - 2.0
    delta_0 = 0.0 + 0.9 * 2.0 - 1.0
    torch.testing.assert_close(advantages[:, :2], T([[delta_0 + 0.45 * delta_1, delta_1]]))
    torch.testing.assert_close(returns, advantages + T([[1.0, 2.0, 0.0]]))


def test_gae_with_lambda_one_is_the_monte_carlo_return():
    torch.manual_seed(0)
    values, rewards = torch.randn(3, 6), torch.randn(3, 6)
    _, returns = ppo.gae(values, rewards, torch.ones(3, 6), 1.0, 1.0)
    torch.testing.assert_close(returns, rewards.flip(1).cumsum(1).flip(1))


def test_gae_ignores_padding_even_if_it_is_nan():
    torch.manual_seed(0)
    values, rewards, mask = torch.randn(2, 4), torch.randn(2, 4), T([[1, 1, 1, 1], [1, 1, 0, 0]])
    padded = [torch.cat([x, torch.full((2, 2), math.nan)], 1) for x in (values, rewards)]
    padded_mask = torch.cat([mask, torch.zeros(2, 2)], 1)
    torch.testing.assert_close(ppo.gae(*padded, padded_mask)[0][:, :4], ppo.gae(values, rewards, mask)[0])


# ------------------------------------------------------------------------------ E5


@pytest.mark.parametrize("violation", [-2.0, 0.0, 0.5])
def test_lambda_moves_with_the_sign_of_the_violation(violation):
    before = T(0.3)
    after = ppo.multiplier_step(before, T(violation), 0.1, 5.0)
    assert torch.sign(after - before) == torch.sign(T(violation))


def test_multiplier_by_hand_and_at_its_bound():
    mu = ppo.multiplier_step(T(math.log(2.0)), T(0.5), 0.1, 5.0)
    assert mu.item() == pytest.approx(math.log(2.0) + 0.1 * 0.5 * 2.0)
    assert ppo.multiplier_step(T(math.log(4.9)), T(9.0), 0.1, 5.0).exp().item() == pytest.approx(5.0)


def test_a_multiplier_of_zero_stays_zero():
    assert ppo.multiplier_step(T(-math.inf), T(3.0), 0.1, 5.0).exp() == 0


def test_safe_rlhf_is_driven_by_the_mean_and_repo_by_the_rectified_mean():
    costs = [-9.0, 3.0, 2.0]  # safe on average, paid for by the first
    assert ppo.expected_violation(T(costs), 0.0) == pytest.approx(-4 / 3)
    assert repo_ppo.rectified_violation(T(costs), 0.0) == pytest.approx(5 / 3)
    assert repo_ppo.rectified_violation(T([-9.0, -0.1, 0.0]), 0.0) == 0
    assert repo_ppo.rectified_violation(T(costs), 2.5) == pytest.approx(0.5 / 3)


# ------------------------------------------------------------------------------ E6


def test_advantages_row_by_row():
    torch.manual_seed(0)
    reward_adv, cost_adv, lam = torch.randn(4, 3), torch.randn(4, 3), 2.0
    lagrangian = ppo.lagrangian_advantages(reward_adv, cost_adv, lam)
    torch.testing.assert_close(lagrangian, (reward_adv - 2 * cost_adv) / 3)
    cost = T([-1.0, 1.5, 2.0, 3.0])  # what is within the limit is safe, C = d too
    mixed = repo_ppo.rectified_advantages(reward_adv, cost_adv, lam, cost, 2.0)
    torch.testing.assert_close(mixed[:3], reward_adv[:3])
    torch.testing.assert_close(mixed[3:], lagrangian[3:])


def test_all_unsafe_is_the_lagrangian_and_all_safe_is_ppo():
    torch.manual_seed(0)
    reward_adv, cost_adv = torch.randn(4, 3), torch.randn(4, 3)
    unsafe = repo_ppo.rectified_advantages(reward_adv, cost_adv, 1.7, torch.ones(4), 0.0)
    assert torch.equal(unsafe, ppo.lagrangian_advantages(reward_adv, cost_adv, 1.7))
    safe = repo_ppo.rectified_advantages(reward_adv, cost_adv, 1.7, -torch.ones(4), 0.0)
    assert torch.equal(safe, reward_adv)


def test_a_safe_response_has_no_cost_gradient_under_repo_and_has_one_under_safe_rlhf():
    cost_adv = torch.randn(2, 3, requires_grad=True)
    repo_ppo.rectified_advantages(torch.zeros(2, 3), cost_adv, 3.0, T([-1.0, 1.0]), 0.0).sum().backward()
    assert cost_adv.grad[0].abs().sum() == 0 and (cost_adv.grad[1] != 0).all()
    cost_adv.grad = None
    ppo.lagrangian_advantages(torch.zeros(2, 3), cost_adv, 3.0).sum().backward()
    assert (cost_adv.grad != 0).all()


def test_rescaled_costs_with_a_rescaled_lambda_give_the_same_direction():
    """The unit of the cost is arbitrary: k times the cost with lambda / k is the same policy gradient."""
    torch.manual_seed(0)
    reward_adv, cost_adv, cost = torch.randn(4, 3), torch.randn(4, 3), T([-1.0, 1.0, -2.0, 2.0])
    lam, k = 2.0, 10.0
    plain = ppo.lagrangian_advantages(reward_adv, cost_adv, lam) * (1 + lam)
    scaled = ppo.lagrangian_advantages(reward_adv, k * cost_adv, lam / k) * (1 + lam / k)
    torch.testing.assert_close(scaled, plain)
    split = repo_ppo.rectified_advantages(reward_adv, k * cost_adv, lam / k, k * cost, 0.0)
    torch.testing.assert_close(split[1::2] * (1 + lam / k), plain[1::2])
    torch.testing.assert_close(split[0::2], reward_adv[0::2])


# ------------------------------------------------------------------------------ E7, E8


def test_policy_loss_by_hand():
    old = torch.zeros(1, 4)
    new = T([[1.5, 1.5, 0.5, 1.0]]).log()
    advantages = T([[1.0, -1.0, 1.0, 2.0]])
    # min(1.5, 1.2), min(-1.5, -1.2), min(0.5, 0.8), 2
    expected = -(1.2 - 1.5 + 0.5 + 2.0) / 4
    torch.testing.assert_close(ppo.policy_loss(new, old, advantages, torch.ones(1, 4), 0.2), T(expected))


def test_policy_loss_gradient_is_finite_with_wild_padding():
    log_probs = T([[0.0, 900.0]], requires_grad=True)
    ppo.policy_loss(log_probs, torch.zeros(1, 2), T([[1.0, math.inf]]), T([[1, 0]])).backward()
    assert log_probs.grad.tolist() == [[-1.0, 0.0]]


def test_value_loss_by_hand():
    # |v - G| = 4 against |clip(v) - G| = |1 - 6| = 5: the worse of the two counts
    loss = ppo.value_loss(T([[2.0]]), T([[0.0]]), T([[6.0]]), T([[1]]), clip=1.0)
    assert loss == 0.5 * 25


def test_losses_of_an_empty_response_are_zero_not_nan():
    mask, x = T([[0, 0], [1, 1]]), torch.randn(2, 2)
    for loss in (ppo.policy_loss(x, x, x, mask), ppo.value_loss(x, x, x, mask)):
        assert loss.isfinite()
    assert ppo.policy_loss(x[:1], x[:1], x[:1], mask[:1]) == 0


# ------------------------------------------------------------------------------ E1, E2


def test_reward_loss_by_hand_and_its_invariance():
    chosen, rejected = T([2.0, 0.0]), T([1.0, 0.0])
    by_hand = (math.log(1 + math.exp(-1.0)) + math.log(2.0)) / 2
    assert reward_loss(chosen, rejected).item() == pytest.approx(by_hand)
    assert reward_loss(chosen + 7, rejected + 7).item() == pytest.approx(by_hand, rel=1e-5)
    assert reward_loss(chosen, rejected, 0.1).item() == pytest.approx(by_hand + 0.1 * 5 / 4)


def test_cost_loss_by_hand_and_that_the_level_matters():
    def s(x):
        return math.log(1 + math.exp(-x))

    safer, unsafer = T([-1.0]), T([2.0])
    loss = cost_loss(safer, unsafer, T([True]), T([False]))
    assert loss.item() == pytest.approx(s(3.0) + s(1.0) + s(2.0))
    # unlike a reward, a cost has a zero
    assert cost_loss(safer + 3, unsafer + 3, T([True]), T([False])) > loss


# ------------------------------------------------------------------------------ schedule


def test_learning_rate_warms_up_and_ends_near_zero():
    rates = [learning_rate(1.0, step, 100, 0.03, cosine=True) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 3) and rates[2] == 1.0 and rates[-1] < 1e-3
    assert max(rates) <= 1.0
    assert learning_rate(1.0, 99, 100, 0.03, cosine=False) == 1.0
