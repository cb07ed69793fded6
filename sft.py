"""Stage 1: supervised fine-tuning, the warm start of everything after it.

    L = E_m[-log pi(y_t | x, y_<t)]        over the response tokens, EOS included

E_m is the mean over sequences of each sequence's mean over its tokens, here and in every other
script: a loss that weighs samples equally is the same however they are split over processes.

    python sft.py                                                          # the toy world, on a CPU
    torchrun --nproc-per-node 8 sft.py --fsdp --dtype bf16 --model huggyllama/llama-7b --dataset ...

Left out: packing several samples into one sequence, and evaluation on held-out text (the rollouts
of stage 3 start from this policy's own samples, which is where one sees what it is worth).
"""

import torch
from torch import Tensor

import lm
from lm import frame, token_log_probs
from plumbing import checkpoints, cli, data, loading, optim, runs
from plumbing.adapters import adapt, saver
from plumbing.cli import count, epochs, fraction, nonnegative, positive
from plumbing.data import batch_indices
from plumbing.distributed import clip_gradients, device, load_options, rank_rows, shard
from plumbing.optim import check_finite

DEMO = {
    "model": "runs/demo/data/tiny_gpt2",
    "dataset": "runs/demo/data/sft.jsonl",
    "output_dir": "runs/demo/sft",
}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    flag = parser.add_argument
    # model and data
    flag("--model", help="causal LM to start from: folder or hub name")
    flag(
        "--from-config",
        action="store_true",
        help="start from random weights of --model's config, as the demo",
    )
    flag("--dataset", help="prompt, response (or Alpaca's fields)")
    flag("--skip-bad-rows", action="store_true", help="skip and count malformed rows instead of stopping")
    flag("--chat-template", action="store_true", help="use the tokenizer's chat template for prompts")
    flag("--max-length", type=count, default=48, help="longest prompt + response in tokens")
    # optimization
    flag("--steps", type=count, default=1000, help="optimizer steps")
    flag("--epochs", type=epochs, default=0, help="passes over --dataset, in place of --steps (0: none)")
    flag("--batch-size", type=count, default=64, help="samples per step, over all ranks")
    flag("--micro-batch-size", type=count, default=64, help="samples per forward pass and rank")
    flag("--lr", type=nonnegative, default=5e-3, help="peak learning rate, cosine to zero")
    flag("--weight-decay", type=nonnegative, default=0.01, help="decoupled weight decay")
    flag("--warmup-ratio", type=fraction, default=0.03, help="share of steps with a rising learning rate")
    flag("--grad-clip", type=positive, default=1.0, help="largest gradient norm")
    flag("--lora-output", action="store_true", help="with --lora-rank: adapters of the output layer, too")
    cli.add_run_flags(parser)
    args = cli.parse(parser, argv, DEMO)
    args.from_config = args.from_config or args.model == DEMO["model"]  # it has no weights
    return args


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """E_m: (B, R), (B, R) -> scalar, the mean over rows of each row's mean over its real tokens."""
    return (torch.where(mask.bool(), x, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


def main(args):
    torch.manual_seed(args.seed)

    # ------------------------------------------------------------------ data
    cli.require(args.model, "python toy_world.py world")
    cli.require(args.dataset, "python toy_world.py world")
    tokenizer = loading.load_tokenizer(args.model)
    pairs = data.load_supervised(args.dataset, args.skip_bad_rows)
    pairs = data.keep_fitting(args.dataset, pairs, tokenizer, args.max_length - 1, args)
    optim.set_steps(args, len(pairs))

    # ------------------------------------------------------------------ model
    policy = loading.load_causal_lm(args.model, args.from_config, **load_options(args))
    loading.check_context(policy.config, args.max_length, args.model)
    policy = shard(adapt(policy, args, args.adapter), args)
    optimizer = optim.adamw(policy, args.lr, args.weight_decay)
    trained = {"policy": (policy, optimizer)}
    first_step = checkpoints.load_checkpoint(args, trained, {})["step"]
    log = runs.RunLog(args, "sft", ("loss",), first_step)

    for step in range(first_step, args.steps):
        # -------------------------------------------------------------- 1 batch
        batch = rank_rows([pairs[i] for i in batch_indices(len(pairs), args.batch_size, step, args.seed)])
        batch = lm.by_length(data.encode(tokenizer, batch, args.max_length, args.chat_template))

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
        lr = optim.learning_rate(args.lr, step, args.steps, args.warmup_ratio, cosine=True)
        optim.set_learning_rate({"policy": optimizer}, policy=lr)
        grad_norm = clip_gradients(policy, args.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

        # -------------------------------------------------------------- 4 log and save
        log.metrics(step, {"loss": loss_sum, "grad_norm": grad_norm, "lr": lr})
        if checkpoints.checkpoint_due(args, step):
            checkpoints.save_checkpoint(args, step + 1, trained, {})

    log.close()
    checkpoints.save_final(args, saver(args, loading.save_causal_lm), policy, tokenizer)


if __name__ == "__main__":
    runs.run(main, parse_args())
