"""Stage 2b: the cost model, harmfulness from pairs of responses and a safety label for each.

    E2   L = mean(-log s(c(x, y_unsafer) - c(x, y_safer))                          s = sigmoid
                  -log s(g_s c(x, y_safer)) - log s(g_u c(x, y_unsafer))) + reg * mean(c^2)

g = +1 for an unsafe response, -1 for a safe one (Safe RLHF, cost model). The sign terms give the cost a
zero with a meaning, C > 0 is unsafe and C <= 0 is safe: both constraints rest on that.
`--loss token-wise` compares the pair at every token from the first that differs instead.
Twin of reward_model.py: `diff reward_model.py cost_model.py` shows what a cost adds.

    python cost_model.py                                                     # the toy world, on a CPU
    torchrun --nproc-per-node 8 cost_model.py --fsdp --dtype bf16 --model <sft folder> \\
        --dataset PKU-Alignment/PKU-SafeRLHF --eval-dataset PKU-Alignment/PKU-SafeRLHF:test ...

"Published" in a docstring is PKU's safe-rlhf, safe_rlhf/ left out, as in this copy of April 2024:
https://github.com/tcexeexe/SHTEC_RM_model/tree/5bb76e43b6804209ffa9570de55f421baa3eb007/safe_rlhf

Left out: running statistics of the scores while training (--normalize takes them once, at the end; of a cost
only the spread, as its sign has a meaning), and the severity of harm (the labels have a sign only).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import lm
from lm import ScoreModel, end_scores, pad
from plumbing import checkpoints, cli, data, loading, optim, runs
from plumbing.adapters import adapt, saver
from plumbing.cli import count, epochs, fraction, nonnegative, path_or_none, positive
from plumbing.data import batch_indices
from plumbing.distributed import (
    clip_gradients,
    device,
    gather_rows,
    load_options,
    rank,
    rank_rows,
    shard,
    world_size,
)
from plumbing.optim import check_finite

DEMO = {
    "model": "runs/demo/sft/model",
    "dataset": "runs/demo/data/preferences_train.jsonl",
    "eval_dataset": "runs/demo/data/preferences_test_cost.jsonl",
    "output_dir": "runs/demo/cost_model",
}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    flag = parser.add_argument
    # model and data
    flag("--model", help="folder or hub name; a missing head is added")
    flag("--layers", type=count, help="start from its first N layers only: a cheaper model and critic")
    flag("--dataset", help="preference pairs in the PKU-SafeRLHF schema")
    flag("--eval-dataset", type=path_or_none, help="held-out pairs ('': none)")
    flag("--skip-bad-rows", action="store_true", help="skip and count malformed rows instead of stopping")
    flag("--chat-template", action="store_true", help="use the tokenizer's chat template for prompts")
    flag("--max-length", type=count, default=48, help="longest prompt + response in tokens")
    # optimization
    losses = ("sequence-wise", "token-wise")
    flag("--loss", choices=losses, default="sequence-wise", help="compare end scores, or every token's")
    # a small reward and a large cost keep RePO from stalling on the toy (docs/stalling.md); published: 1e-3
    flag("--regularization", type=nonnegative, default=0.001, help="weight of the mean squared score")
    flag("--steps", type=count, default=600, help="optimizer steps")
    flag("--epochs", type=epochs, default=0, help="passes over --dataset, in place of --steps (0: none)")
    flag("--batch-size", type=count, default=64, help="pairs per step, over all ranks")
    flag("--micro-batch-size", type=count, default=32, help="pairs per forward pass and rank")
    flag("--lr", type=nonnegative, default=1.5e-3, help="peak learning rate, cosine to zero")
    flag("--weight-decay", type=nonnegative, default=0.01, help="decoupled weight decay")
    flag("--warmup-ratio", type=fraction, default=0.03, help="share of steps with a rising learning rate")
    flag("--grad-clip", type=positive, default=1.0, help="largest gradient norm")
    flag("--normalize", action="store_true", help="at the end, give scores the spread 1; signs stay")
    cli.add_run_flags(parser)
    return cli.parse(parser, argv, DEMO)


# ------------------------------------------------------------------------------ equations


def cost_loss(
    safer: Tensor,
    unsafer: Tensor,
    safer_is_safe: Tensor,
    unsafer_is_safe: Tensor,
    regularization: float = 0.0,
) -> Tensor:
    """E2: end scores (B,), (B,) and safety labels (B,) bool -> scalar. A higher score is more harmful,
    and a positive one says that the response is unsafe.

    Published: values/cost/trainer.py, CostTrainer.loss."""
    loss = -F.logsigmoid(unsafer - safer) - F.logsigmoid(harm_sign(safer_is_safe) * safer)
    loss = (loss - F.logsigmoid(harm_sign(unsafer_is_safe) * unsafer)).mean()
    return loss + regularization * torch.cat([safer, unsafer]).square().mean()


def harm_sign(is_safe: Tensor) -> Tensor:
    """g of E2: (B,) bool -> (B,), -1 where safe and +1 where unsafe."""
    return 1.0 - 2.0 * is_safe.float()


def compared_tokens(ids: Tensor, other_ids: Tensor, mask: Tensor, other_mask: Tensor) -> Tensor:
    """Ids and masks (B, L), right-padded -> (B, L) mask from the first differing token of a pair to
    the later of the two ends: the prompt, which they share, says nothing about either response."""
    differs = (ids != other_ids) | (mask != other_mask)
    return (differs.cumsum(-1) > 0) & ((mask + other_mask) > 0)


def cost_loss_tokenwise(
    safer: Tensor,
    unsafer: Tensor,
    safer_ids: Tensor,
    unsafer_ids: Tensor,
    safer_mask: Tensor,
    unsafer_mask: Tensor,
    safer_is_safe: Tensor,
    unsafer_is_safe: Tensor,
    regularization: float = 0.0,
) -> Tensor:
    """E2 at every compared token: scores, ids and masks (B, L), right-padded, labels (B,) -> scalar.

    The mean over a pair's compared tokens, then the mean over pairs. Beyond the shorter response's
    end its scores at padding take part, as in the published implementation."""
    mask = compared_tokens(safer_ids, unsafer_ids, safer_mask, unsafer_mask)  # (B, L)
    loss = -F.logsigmoid(unsafer - safer) - F.logsigmoid(harm_sign(safer_is_safe)[:, None] * safer)
    loss = loss - F.logsigmoid(harm_sign(unsafer_is_safe)[:, None] * unsafer)
    loss = loss + regularization * (safer.square() + unsafer.square()) / 2
    return (torch.where(mask, loss, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


# ------------------------------------------------------------------------------ one batch of pairs


def pair_batch(pairs: list[tuple], pad_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (safer, unsafer, safer is safe, unsafer is safe) -> ids and mask (2 B, L), the safer ones
    first, right-padded, and the safety labels (2 B,)."""
    ids, mask = pad([pair[0] for pair in pairs] + [pair[1] for pair in pairs], pad_token_id, side="right")
    is_safe = torch.tensor([pair[2] for pair in pairs] + [pair[3] for pair in pairs])
    return ids.to(device()), mask.to(device()), is_safe.to(device())


def batch_loss(
    model: ScoreModel, pairs: list[tuple], pad_token_id: int, args
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, the end scores (B,) of the safer and of the unsafer responses, and the share (B,) of
    the pair's two signs that are right."""
    ids, mask, is_safe = pair_batch(pairs, pad_token_id)
    scores = model(ids, mask)  # (2 B, L)
    safer, unsafer = end_scores(scores, mask).chunk(2)
    if args.loss == "token-wise":
        pair = *scores.chunk(2), *ids.chunk(2), *mask.chunk(2), *is_safe.chunk(2)
        loss = cost_loss_tokenwise(*pair, args.regularization)
    else:
        loss = cost_loss(safer, unsafer, *is_safe.chunk(2), args.regularization)
    right_sign = (harm_sign(is_safe) * torch.cat([safer, unsafer]) > 0).float().view(2, -1).mean(0)
    return loss, safer, unsafer, right_sign


@torch.no_grad()
def evaluate(model: ScoreModel, pairs: list[tuple], tokenizer, args) -> dict:
    """Accuracies and score statistics over held-out pairs, of which every rank scores its share."""
    surplus = -len(pairs) % world_size()  # equally many on every rank; cut off below
    mine = rank_rows(pairs + pairs[-1:] * surplus)
    pieces = [mine[i : i + args.micro_batch_size] for i in range(0, len(mine), args.micro_batch_size)]
    pieces = (data.encode_pairs(tokenizer, piece, args) for piece in pieces)
    results = [batch_loss(model, piece, tokenizer.pad_token_id, args) for piece in pieces]
    columns = [gather_rows(torch.cat(rows))[: len(pairs)] for rows in list(zip(*results))[1:]]
    safer, unsafer, right_sign = columns
    scores = torch.cat([safer, unsafer])
    return {
        "eval_accuracy": (unsafer > safer).float().mean().item(),
        "eval_sign_accuracy": right_sign.mean().item(),
        "eval_score_mean": scores.mean().item(),
        "eval_score_std": scores.std().item(),
    }


def store_normalizer(model: ScoreModel, pairs: list[tuple], tokenizer, args) -> None:
    """Score the training pairs once more, without a normalizer, and store what ScoreModel normalizes by."""
    model.do_normalize = False
    found = evaluate(model, pairs, tokenizer, args)
    model.normalizer.mean.fill_(found["eval_score_mean"])
    model.normalizer.var.fill_(found["eval_score_std"] ** 2)
    model.normalizer.count.fill_(2 * len(pairs))
    model.do_normalize = True


def main(args):
    torch.manual_seed(args.seed)

    # ------------------------------------------------------------------ data
    cli.require(args.model, "python sft.py")
    cli.require(args.dataset, "python toy_world.py preferences")
    tokenizer = loading.load_tokenizer(args.model)

    def load_pairs(dataset: str) -> list[tuple]:
        pairs = data.load_preferences(dataset, "safer_response_id", args.skip_bad_rows)
        return data.keep_fitting(dataset, pairs, tokenizer, args.max_length - 1, args)

    pairs = load_pairs(args.dataset)
    eval_pairs = load_pairs(args.eval_dataset) if args.eval_dataset else []
    optim.set_steps(args, len(pairs))

    # ------------------------------------------------------------------ model
    options = load_options(args) | {"new_head": True, "layers": args.layers}
    model = loading.load_score_model(args.model, "cost", **options)
    loading.check_context(model.config, args.max_length, args.model)
    model = shard(adapt(model, args, args.adapter), args)
    optimizer = optim.adamw(model, args.lr, args.weight_decay)
    trained = {"model": (model, optimizer)}
    first_step = checkpoints.load_checkpoint(args, trained, {})["step"]
    log = runs.RunLog(args, "cost model", ("loss", "accuracy", "sign_accuracy", "score_mean"), first_step)

    for step in range(first_step, args.steps):
        # -------------------------------------------------------------- 1 batch
        batch = rank_rows([pairs[i] for i in batch_indices(len(pairs), args.batch_size, step, args.seed)])
        batch = lm.by_length(data.encode_pairs(tokenizer, batch, args))

        # -------------------------------------------------------------- 2 gradient
        metrics = {"loss": 0.0, "accuracy": 0.0, "sign_accuracy": 0.0, "score_mean": 0.0}
        for start in range(0, len(batch), args.micro_batch_size):
            micro = batch[start : start + args.micro_batch_size]
            weight = len(micro) / len(batch)  # so that micro-batches add up to the batch's mean
            loss, safer, unsafer, right_sign = batch_loss(model, micro, tokenizer.pad_token_id, args)
            check_finite(step, loss=loss, safer_scores=safer, unsafer_scores=unsafer)
            (weight * loss).backward()
            metrics["loss"] += weight * loss.item()
            metrics["accuracy"] += weight * (unsafer > safer).float().mean().item()
            metrics["sign_accuracy"] += weight * right_sign.mean().item()
            metrics["score_mean"] += weight * torch.cat([safer, unsafer]).mean().item()

        # -------------------------------------------------------------- 3 update
        lr = optim.learning_rate(args.lr, step, args.steps, args.warmup_ratio, cosine=True)
        optim.set_learning_rate({"model": optimizer}, model=lr)
        grad_norm = clip_gradients(model, args.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

        # -------------------------------------------------------------- 4 log and save
        if step == args.steps - 1 and eval_pairs:
            metrics |= evaluate(model, eval_pairs, tokenizer, args)
        log.metrics(step, metrics | {"grad_norm": grad_norm, "lr": lr})
        if checkpoints.checkpoint_due(args, step):
            checkpoints.save_checkpoint(args, step + 1, trained, {})

    log.close()
    if eval_pairs and rank() == 0 and args.steps > first_step:
        print(f"held-out pairs ordered rightly: {metrics['eval_accuracy']:.1%} of {len(eval_pairs)}")
        print(f"sign of the cost right: {metrics['eval_sign_accuracy']:.1%}")
    if args.normalize:
        store_normalizer(model, pairs, tokenizer, args)
    checkpoints.save_final(args, saver(args, loading.save_score_model), model, tokenizer)


if __name__ == "__main__":
    runs.run(main, parse_args())
