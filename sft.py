"""Stage 1: supervised fine-tuning, the warm start of everything after it.

    L = E_m[-log pi(y_t | x, y_<t)]        over the response tokens, EOS included

E_m is the mean over sequences of each sequence's mean over its tokens, here and in every other
script: a loss that weighs samples equally is the same however they are split over processes.

    python sft.py                                                          # the toy world, on a CPU
    torchrun --nproc-per-node 8 sft.py --fsdp --dtype bf16 --model huggyllama/llama-7b --dataset tatsu-lab/alpaca ...

Left out: packing several samples into one sequence, and evaluation on held-out text (the rollouts
of stage 3 start from this policy's own samples, which is where one sees what it is worth).
"""

import argparse

import torch
from torch import Tensor

from data import DataError, batch_indices, encode, frame, load_supervised
from distributed import (
    RunError, RunLog, adamw, add_run_flags, check_finite, checkpoint_due, clip_gradients, deal, device, learning_rate,
    load_checkpoint, mean_over_ranks, need, run, save_checkpoint, save_final, set_learning_rate, shard,
)  # fmt: skip
from models import ModelError, context_length, load_causal_lm, load_tokenizer, save_causal_lm, token_log_probs
from plan import print_plan


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    # model and data
    flag("--model", help="causal LM to start from: folder or hub name (default: a tiny GPT-2 with random weights)")
    flag("--from-config", action="store_true", help="start from random weights of --model's config")
    flag("--dataset", default="runs/demo/data/sft.jsonl", help="rows of prompt, response (or Alpaca's fields)")
    flag("--skip-bad-rows", action="store_true", help="skip and count malformed rows instead of stopping")
    flag("--chat-template", action="store_true", help="use the tokenizer's chat template for prompts")
    flag("--max-length", type=int, default=48, help="longest prompt + response in tokens")
    # optimization
    flag("--steps", type=int, default=1000, help="optimizer steps")
    flag("--batch-size", type=int, default=64, help="samples per step, over all ranks")
    flag("--micro-batch-size", type=int, default=64, help="samples per forward pass and rank")
    flag("--lr", type=float, default=5e-3, help="peak learning rate, cosine to zero")
    flag("--weight-decay", type=float, default=0.01, help="decoupled weight decay")
    flag("--warmup-ratio", type=float, default=0.03, help="share of steps with a rising learning rate")
    flag("--grad-clip", type=float, default=1.0, help="largest gradient norm")
    add_run_flags(parser, "runs/demo/sft")
    args = parser.parse_args()
    if args.model is None:
        args.model, args.from_config = "runs/demo/data/tiny_gpt2", True
    return args


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """E_m: (B, R), (B, R) -> scalar, the mean over rows of each row's mean over its real tokens."""
    return (torch.where(mask.bool(), x, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


def main(args):
    if args.plan:
        return print_plan(args)
    torch.manual_seed(args.seed)

    # ------------------------------------------------------------------ data
    need(args.model, "python toy_world.py world")
    need(args.dataset, "python toy_world.py world")
    tokenizer = load_tokenizer(args.model)
    pairs = load_supervised(args.dataset, args.skip_bad_rows)
    rows = encode(tokenizer, pairs, args.max_length, args.chat_template, args.skip_bad_rows)

    # ------------------------------------------------------------------ model
    policy = load_causal_lm(args.model, args.from_config, on_meta=args.fsdp and not args.from_config)
    if args.max_length > context_length(policy.config):
        raise RunError(f"--max-length {args.max_length} exceeds the model's context of {context_length(policy.config)} tokens")
    policy = shard(policy, args)
    optimizer = adamw(policy, args.lr, args.weight_decay)
    resumed = load_checkpoint(args, {"policy": (policy, optimizer)})
    first_step = resumed["step"] if resumed else 0
    log = RunLog(args, "sft", ("loss",), first_step)

    for step in range(first_step, args.steps):
        # -------------------------------------------------------------- 1 batch
        batch = deal([rows[i] for i in batch_indices(len(rows), args.batch_size, step, args.seed)])

        # -------------------------------------------------------------- 2 gradient
        loss_sum = 0.0
        for start in range(0, len(batch), args.micro_batch_size):
            micro = batch[start : start + args.micro_batch_size]
            sequences, attention_mask, width = frame(micro, tokenizer.pad_token_id, device())
            log_probs = token_log_probs(policy, sequences, attention_mask, width)  # (B, R)
            loss = -masked_mean(log_probs, attention_mask[:, width:]) * len(micro) / len(batch)
            loss.backward()
            loss_sum += loss.item()
        check_finite(step, loss=loss_sum)

        # -------------------------------------------------------------- 3 update
        lr = learning_rate(args.lr, step, args.steps, args.warmup_ratio, cosine=True)
        set_learning_rate(optimizer, lr)
        grad_norm = clip_gradients(policy, args.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

        # -------------------------------------------------------------- 4 log and save
        log.metrics(step, mean_over_ranks({"loss": loss_sum, "grad_norm": grad_norm, "lr": lr}))
        if checkpoint_due(args, step):
            save_checkpoint(args, step + 1, {"policy": (policy, optimizer)}, {})

    log.close()
    save_final(args, save_causal_lm, policy, tokenizer)


if __name__ == "__main__":
    run(main, parse_args(), (DataError, ModelError))
