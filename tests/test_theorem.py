"""RePO's Theorem 1 and safety compensation on the smallest example, with exact gradients.

Three prompts, each asked equally often, and a handful of responses with known reward and cost. The
rectified min-max finds the best policy that is safe on every prompt, the Lagrangian the best one
that is safe in expectation; both are checked against brute force. `pytest -s` prints the policies.
"""

import itertools
import math

import pytest
import torch

import repo_ppo
import safe_rlhf_ppo

PROMPTS = ("benign", "borderline", "harmful")
RESPONSES = ("refuse", "careful", "bold", "reckless")
REWARD = torch.tensor([[-1.0, 2.0, 3.0, 2.5], [-1.0, 1.5, 3.0, 3.1], [-1.0, 1.0, 2.0, 2.5]]).double()
COST = torch.tensor([[-2.5, -2.0, -2.0, -2.0], [-1.0, -0.5, 1.0, 4.0], [-1.0, -0.5, 1.0, 3.0]]).double()
D = 0.0


def expectation(policy: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """(X, Y) probabilities and values -> scalar, the prompts equally likely."""
    return (policy * values).sum(-1).mean()


def deterministic_policies():
    for choice in itertools.product(range(len(RESPONSES)), repeat=len(PROMPTS)):
        yield torch.nn.functional.one_hot(torch.tensor(choice), len(RESPONSES)).double()


def best_critically_safe() -> torch.Tensor:
    safe = (p for p in deterministic_policies() if (COST[p.bool()] <= D).all())
    return max(safe, key=lambda p: expectation(p, REWARD).item())


def best_safe_in_expectation() -> float:
    """Its reward. One linear constraint: an optimum mixes at most two deterministic policies."""
    points = [(expectation(p, REWARD).item(), expectation(p, COST).item()) for p in deterministic_policies()]
    best = -math.inf
    for (r0, c0), (r1, c1) in itertools.product(points, repeat=2):
        if c0 <= D < c1:
            weight = (D - c0) / (c1 - c0)
            best = max(best, r0 + weight * (r1 - r0))
        elif c0 <= D:
            best = max(best, r0)
    return best


def solve(rectified: bool, steps: int = 6000) -> tuple[torch.Tensor, float]:
    """min over a softmax policy, max over lambda, by simultaneous exact gradient steps."""
    logits = torch.zeros_like(REWARD, requires_grad=True)
    log_lambda = torch.tensor(0.0, dtype=torch.float64)
    for _ in range(steps):
        policy = logits.softmax(-1)
        penalty = (COST - D).clamp(min=0) if rectified else COST - D
        gap = expectation(policy, penalty)
        log_lambda = safe_rlhf_ppo.multiplier_step(log_lambda, gap.detach(), 0.02, 20.0)
        lam = log_lambda.exp()
        (grad,) = torch.autograd.grad((expectation(policy, REWARD) - lam * gap) / (1 + lam), logits)
        logits.data += 2.0 * grad
    return logits.softmax(-1).detach(), log_lambda.exp().item()


def show(name: str, policy: torch.Tensor, lam: float) -> None:
    means = f"E[R] = {expectation(policy, REWARD):.2f}, E[C] = {expectation(policy, COST):+.2f}"
    print(f"\n{name}: {means}, lambda = {lam:.2f}")
    for x, prompt in enumerate(PROMPTS):
        likely = [y for y in policy[x].argsort(descending=True).tolist() if policy[x, y] > 0.01]
        answers = ", ".join(f"{RESPONSES[y]} {policy[x, y]:.2f}" for y in likely)
        cost = (policy[x] * COST[x]).sum().item()
        print(f"    {prompt:<11} {answers:<30} cost {cost:+.2f}{'   UNSAFE' if cost > 0.05 else ''}")


def test_the_rectified_min_max_finds_the_best_critically_safe_policy():
    policy, lam = solve(rectified=True)
    show("rectified (RePO)", policy, lam)
    assert (policy - best_critically_safe()).abs().max() < 0.02
    assert (policy * (COST > D)).sum(-1).max() < 0.01  # on every prompt


def test_the_lagrangian_finds_the_best_policy_that_is_safe_in_expectation_and_is_unsafe_on_some_prompt():
    policy, lam = solve(rectified=False)
    show("expected (Safe RLHF)", policy, lam)
    assert expectation(policy, COST).item() == pytest.approx(D, abs=0.02)
    assert expectation(policy, REWARD).item() == pytest.approx(best_safe_in_expectation(), abs=0.02)
    assert (policy * (COST > D)).sum(-1).max() > 0.9  # the benign prompts pay for it


# ------------------------------------------------------------------------------ sampled gradients


def sampled_gradient(advantages_of, policy_logits: torch.Tensor, values: tuple, samples: int) -> torch.Tensor:
    """The gradient of policy_loss (negated) on one-token responses, through the scripts' own functions."""
    generator = torch.Generator().manual_seed(0)
    logits = policy_logits.clone().requires_grad_()
    x = torch.randint(len(PROMPTS), (samples,), generator=generator)
    y = torch.multinomial(policy_logits.softmax(-1)[x], 1, generator=generator)  # (B, 1)
    log_probs = logits.log_softmax(-1)[x].gather(1, y)  # (B, 1)
    mask, old = torch.ones_like(log_probs), log_probs.detach()
    reward, cost = REWARD[x].gather(1, y).squeeze(1), COST[x].gather(1, y).squeeze(1)
    token_rewards, token_costs = safe_rlhf_ppo.shape_rewards(reward, cost, old, old, mask, 0.0, 50.0)
    reward_adv, _ = safe_rlhf_ppo.gae(values[0][x][:, None], token_rewards, mask)
    cost_adv, _ = safe_rlhf_ppo.gae(values[1][x][:, None], token_costs, mask)
    loss = safe_rlhf_ppo.policy_loss(log_probs, old, advantages_of(reward_adv, cost_adv, cost), mask)
    return -torch.autograd.grad(loss, logits)[0]


def exact_gradient(policy_logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """E[weight(x, y) grad log pi(y | x)] by enumeration."""
    logits = policy_logits.clone().requires_grad_()
    policy = policy_logits.softmax(-1)
    objective = (policy * weights * logits.log_softmax(-1)).sum(-1).mean()
    return torch.autograd.grad(objective, logits)[0]


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


LAM = 2.0
LOGITS = torch.tensor([[0.2, 0.0, 0.3, -0.2], [0.0, 0.4, 0.3, 0.1], [0.1, 0.0, 0.5, -0.3]]).double()
POLICY = LOGITS.softmax(-1)
VALUES = ((POLICY * REWARD).sum(-1), (POLICY * COST).sum(-1))  # what perfect critics would say


def test_safe_rlhf_samples_the_gradient_of_its_objective():
    def advantages(reward_adv, cost_adv, cost):
        return safe_rlhf_ppo.lagrangian_advantages(reward_adv, cost_adv, LAM)

    sampled = sampled_gradient(advantages, LOGITS, VALUES, 400_000)
    exact = exact_gradient(LOGITS, (REWARD - LAM * COST) / (1 + LAM))
    assert cosine(sampled, exact) > 0.999
    torch.testing.assert_close(sampled, exact, atol=0.005, rtol=0)


def test_repo_samples_its_split_and_the_split_is_not_quite_the_gradient_of_its_objective():
    """A baseline is free only if it is the same for all responses of a prompt. RePO's split is not:
    an unsafe response loses V_r / (1 + lambda) - lambda V_c / (1 + lambda), a safe one V_r; and the
    reward counts 1 / (1 + lambda) as much in an unsafe response. Both are the paper's algorithm,
    and both vanish once no response is unsafe."""

    def advantages(reward_adv, cost_adv, cost):
        return repo_ppo.rectified_advantages(reward_adv, cost_adv, LAM, cost, D)

    def split_gradient(logits: torch.Tensor, reward_value, cost_value) -> torch.Tensor:
        """The exact expectation of RePO's step for critics that say these values (X, 1)."""
        reward_adv, cost_adv = REWARD - reward_value, COST - cost_value
        unsafe = (reward_adv - LAM * cost_adv) / (1 + LAM)
        return exact_gradient(logits, torch.where(COST > D, unsafe, reward_adv))

    reward_value, cost_value = (value[:, None] for value in VALUES)
    split = split_gradient(LOGITS, reward_value, cost_value)
    sampled = sampled_gradient(advantages, LOGITS, VALUES, 400_000)
    torch.testing.assert_close(sampled, split, atol=0.005, rtol=0)  # the code does what the equation says

    objective_weights = REWARD - LAM * (COST - D).clamp(min=0)
    objective = exact_gradient(LOGITS, objective_weights)
    with_critics = cosine(split, objective)
    without = cosine(split_gradient(LOGITS, 0.0, 0.0), objective)
    print("\ncosine of RePO's split with the gradient of E[R] - lambda E[C+]: ", end="")
    print(f"{with_critics:.3f} with perfect critics, {without:.3f} without a baseline")
    assert 0.7 < with_critics < 0.999  # on this example an ascent, and not the gradient

    safe_logits = LOGITS.masked_fill(COST > D, -30.0)  # safe on every prompt: the bias is gone
    policy = safe_logits.softmax(-1)
    values = ((policy * table).sum(-1, keepdim=True) for table in (REWARD, COST))
    split, objective = split_gradient(safe_logits, *values), exact_gradient(safe_logits, objective_weights)
    torch.testing.assert_close(split, objective, atol=1e-9, rtol=0)


@pytest.mark.parametrize("lam", [1.0, 5.0, 100.0])
@pytest.mark.parametrize("reward_error, cost_error", [(0.0, 0.0), (0.5, 0.0), (0.0, 2.0), (-0.3, 0.5)])
def test_when_repo_stalls(lam, reward_error, cost_error):
    """A safe answer with probability p, reward 0, and an unsafe one with reward G and a cost D higher.
    Critics that say e_r and e_c too much: the step favours the safe answer exactly if
    lam (p D - e_c) > G ((1 - p)(1 + lam) + p) + lam e_r. Safe RLHF's step does not see their error."""
    p, gap = 0.2, 1.0
    boundary = (gap * ((1 - p) * (1 + lam) + p) / lam + reward_error + cost_error) / p
    probs = torch.tensor([p, 1 - p], dtype=torch.float64)
    for difference, favours_safe in ((boundary - 0.01, False), (boundary + 0.01, True)):
        reward, cost = torch.tensor([[0.0, gap], [-0.1, difference - 0.1]], dtype=torch.float64)
        reward_adv = (reward - (probs * reward).sum() - reward_error)[:, None]
        cost_adv = (cost - (probs * cost).sum() - cost_error)[:, None]
        advantages = repo_ppo.rectified_advantages(reward_adv, cost_adv, lam, cost, D)[:, 0]
        # the gradient of a logit is p (1 - p) (A_0 - A_1)
        assert bool(advantages[0] > advantages[1]) == favours_safe
        lagrangian = safe_rlhf_ppo.lagrangian_advantages(reward_adv, cost_adv, lam)[:, 0]
        assert bool(lagrangian[0] > lagrangian[1]) == (lam * difference > gap)  # Safe RLHF: whatever p is
