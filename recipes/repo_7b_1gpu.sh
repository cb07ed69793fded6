#!/usr/bin/env bash
# RePO on Alpaca-7B reproduced on one GPU, with adapters of rank 16: the six 7B models are three sets of frozen bf16 weights.
# needs      one GPU of 80 GB (by tools.plan 66.9 GiB; 75.0 GiB with a batch of 96), 26 GiB of host memory, 1.5 GB of disk per checkpoint,
#            27 GB for the final model; hub access to the models and data. A card of 48 GB with --quantize int8 (36.8 GiB);
#            for smaller ones see docs/scaling.md
# costs      not measured
# rehearsed  flags only, by REHEARSAL= on a CPU (see common.sh); never run at this size. The learning rates are ten times those of
#            repo_7b_8gpu.sh, as is usual for adapters, and not tuned
set -euo pipefail
NPROC=${NPROC:-1}
source "$(dirname "$0")/common.sh"

"${LAUNCH[@]}" repo_ppo.py --dtype bf16 --activation-checkpointing --lora-rank 16 --lora-alpha 32 \
    --output-dir "$OUT/repo_7b_lora" --save-every 50 --keep 2 \
    --model PKU-Alignment/alpaca-7b-reproduced \
    --reward-model PKU-Alignment/beaver-7b-v1.0-reward --cost-model PKU-Alignment/beaver-7b-v1.0-cost \
    --dataset PKU-Alignment/PKU-SafeRLHF@v0 --ptx-dataset tatsu-lab/alpaca --skip-bad-rows \
    --max-length 512 --max-new-tokens 384 --temperature 1.0 \
    --steps 1000 --batch-size 64 --minibatch-size 64 --micro-batch-size 8 --ppo-epochs 1 \
    --lr 1e-4 --critic-lr 5e-5 --warmup-ratio 0.03 --weight-decay 0.01 --grad-clip 1.0 \
    --gamma 1.0 --gae-lambda 0.95 --clip 0.2 --value-clip 5.0 --score-clip 50.0 --kl-coeff 0.01 --ptx-coeff 16.0 \
    --threshold 0.0 --lambda-init 1.0 --lambda-lr 0.1 --lambda-max 5.0 \
    "$@" "${PPO_OVERRIDES[@]}"
