"""The updates and the scoring of the PPO scripts on tiny models: what moves, and what must not matter."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

import lm
import safe_rlhf_ppo as ppo
from cost_model import batch_loss as cost_batch_loss
from lm import ScoreModel, response_mask
from plumbing.distributed import clip_gradients
from plumbing.files import InputError
from reward_model import batch_loss as reward_batch_loss

B, P, R, V = 7, 4, 6, 20
SIZES = {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40}
DROPOUTS = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
CONFIG = GPT2Config(**SIZES, **DROPOUTS, bos_token_id=None, eos_token_id=1, pad_token_id=0)


def models():
    torch.manual_seed(0)
    policy, critics = GPT2LMHeadModel(CONFIG), [ScoreModel(GPT2Model(CONFIG), "critic") for _ in range(2)]
    for model in (policy, *critics):  # double precision: what is left of a difference is a mistake
        model.double().eval()
    # a step of SGD with rate 1 subtracts exactly the gradient
    named = zip(("policy", "reward_critic", "cost_critic"), (policy, *critics))
    return policy, *critics, {name: torch.optim.SGD(model.parameters(), 1.0) for name, model in named}


def minibatch(extra: int = 0) -> dict:
    """A made-up minibatch; `extra` more columns of padding on both sides."""
    generator = torch.Generator().manual_seed(1)
    sequences = torch.randint(2, V, (B, P + R), generator=generator)
    lengths = torch.tensor([6, 1, 3, 6, 2, 5, 4])
    sequences[torch.arange(B), P + lengths - 1] = 1  # EOS
    mask = response_mask(sequences[:, P:], 1)
    prompt_mask = torch.tensor([[0] * k + [1] * (P - k) for k in (0, 1, 2, 3, 0, 1, 2)])
    batch = {"sequences": sequences, "attention_mask": torch.cat([prompt_mask, mask], 1), "mask": mask}
    for name in ("log_probs", "advantages", "reward_values", "reward_returns", "cost_values", "cost_returns"):
        batch[name] = torch.randn(B, R, generator=generator, dtype=torch.float64)
    batch["log_probs"] -= 3.0
    if extra:
        pad = torch.full((B, extra), 1)
        for name in ("sequences", "attention_mask"):
            side = pad * (name == "sequences")
            batch[name] = torch.cat([side, batch[name], side], 1)
        for name in batch.keys() - {"sequences", "attention_mask"}:
            junk = torch.zeros if name == "mask" else torch.randn
            batch[name] = torch.cat([batch[name], junk(B, extra).to(batch[name].dtype)], 1)
    return batch


def update(policy, reward_critic, cost_critic, optimizers: dict, batch: dict, ptx=(), size=B) -> dict:
    """A whole update of a minibatch, as in phase 6."""
    pieces, critics = lm.micro_batches(batch, size), {"reward": reward_critic, "cost": cost_critic}
    logged = ppo.update_policy(policy, optimizers["policy"], pieces, list(ptx), 1.0, 0.2, 0.5, math.inf)
    for name, critic in critics.items():
        logged |= ppo.update_critic(critic, optimizers[f"{name}_critic"], pieces, name, 5.0, math.inf)
    return logged


def gradients(batch: dict, ptx=(), size: int = B) -> list[torch.Tensor]:
    *trained, optimizers = models()
    parameters = [p for model in trained for p in model.parameters()]
    before = [p.detach().clone() for p in parameters]
    update(*trained, optimizers, batch, ptx, size)
    return [a - b.detach() for a, b in zip(before, parameters)]


def same(a, b) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_add_up_to_the_minibatch(size):
    same(gradients(minibatch(), size=size), gradients(minibatch()))


def test_batch_order_does_not_matter():
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    same(gradients({k: v[order] for k, v in minibatch().items()}), gradients(minibatch()))


def test_extra_padding_does_not_matter():
    """More columns of prompt padding and of response padding, the latter full of junk numbers."""
    wide = minibatch(extra=3)
    same(gradients(wide), gradients(minibatch()))


def test_policy_and_both_critics_move_and_ptx_moves_only_the_policy():
    policy, reward_critic, cost_critic, _ = models()
    sizes = [len(list(m.parameters())) for m in (policy, reward_critic, cost_critic)]
    plain = gradients(minibatch())
    parts = (plain[: sizes[0]], plain[sizes[0] : sizes[0] + sizes[1]], plain[sizes[0] + sizes[1] :])
    assert all(any(g.abs().max() > 0 for g in part) for part in parts)
    batch = minibatch()
    ptx = [(batch["sequences"], batch["attention_mask"], P)]
    with_ptx = gradients(batch, ptx)
    assert max((a - b).abs().max() for a, b in zip(with_ptx[: sizes[0]], plain)) > 1e-3
    same(with_ptx[sizes[0] :], plain[sizes[0] :])


def test_ptx_is_weighted_cross_entropy():
    policy, *_ = models()
    batch = minibatch()
    batch["advantages"] = torch.zeros_like(batch["advantages"])  # PTX alone
    ptx = [(batch["sequences"], batch["attention_mask"], P)]
    loss = -0.5 * ppo.masked_mean(lm.token_log_probs(policy, *ptx[0]), batch["mask"])
    want = torch.autograd.grad(loss, list(policy.parameters()))
    same(gradients(batch, ptx)[: len(want)], want)


def test_ptx_in_pieces_of_different_sizes_is_ptx_in_one():
    batch = minibatch()
    ids, mask = batch["sequences"], batch["attention_mask"]
    same(
        gradients(batch, [(ids[:2], mask[:2], P), (ids[2:], mask[2:], P)]), gradients(batch, [(ids, mask, P)])
    )


def test_an_empty_response_leaves_everything_finite():
    batch, (*trained, optimizers) = minibatch(), models()
    batch["mask"][2] = batch["attention_mask"][2, P:] = 0
    ptx = [(batch["sequences"], batch["attention_mask"], P)]
    logged = update(*trained, optimizers, batch, ptx)
    assert all(math.isfinite(value) for value in logged.values()), logged
    assert all(p.isfinite().all() for model in trained for p in model.parameters())


def test_scores_are_taken_before_the_token_in_the_response_frame():
    """Values at column P - 1 + t have seen the prompt and t response tokens, not the token t itself."""
    policy, reward_critic, cost_critic, _ = models()
    batch = minibatch()
    for name in ("reward", "cost"):
        batch |= {f"{name}_ids": batch["sequences"], f"{name}_attention_mask": batch["attention_mask"]}

    def scored(batch: dict, size: int) -> tuple:
        return (
            lm.in_pieces(lm.response_log_probs, policy, batch, size, 1.0),
            lm.in_pieces(lm.response_scores, cost_critic, batch, size, "cost"),  # any score model will do
            lm.in_pieces(lm.state_values, reward_critic, batch, size),
        )

    whole, changed = scored(batch, B), {k: v.clone() for k, v in batch.items()}
    same(scored(batch, 3), whole)
    assert [tuple(x.shape) for x in whole] == [(B, R), (B,), (B, R)]
    changed["sequences"][0, P + 2] = 9  # the third token of the first response
    moved = (scored(changed, B)[2][0] - whole[2][0]).abs() > 1e-9
    assert moved.tolist() == [False, False, False, True, True, True]


def test_score_model_batches_do_not_depend_on_their_order_or_padding():
    _, model, *_ = models()
    pairs = [
        ([3, 4, 5, 1], [3, 4, 6, 7, 1], True, False),
        ([2, 8, 1], [2, 9, 9, 9, 9, 1], True, True),
        ([5, 6, 1], [5, 7, 1], False, False),
    ]
    for loss in ("sequence-wise", "token-wise"):
        args = SimpleNamespace(loss=loss, regularization=0.01)
        for batch_loss in (reward_batch_loss, cost_batch_loss):
            whole = batch_loss(model, pairs, 0, args)[0]
            alone = sum(batch_loss(model, pairs[i : i + 1], 0, args)[0] for i in (2, 0, 1)) / 3
            torch.testing.assert_close(whole, alone, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_named_and_the_others_are_as_they_were(bad):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model[1].weight.grad[0, 0] = bad
    with pytest.raises(InputError, match="not finite; the first that is not is 1.weight"):
        clip_gradients(model, 1.0)
    assert model[0].weight.grad.eq(1).all()
