#!/usr/bin/env bash
# Safe RLHF on Alpaca-7B reproduced with the Beaver reward and cost models, the hyper-parameters of PKU's script but for the
# response length.
# needs      8 GPUs of 80 GB (FSDP2, bf16; by tools.plan 49.1 GiB on each), 250 GiB of host memory while it saves, 720 GB of disk for
#            checkpoints (about 240 GB each; two are kept, and three are there while one is written), 27 GB for the final model; hub
#            access to the models and data
# costs      not measured
# rehearsed  flags only, by REHEARSAL= on a CPU (see common.sh); never run at this size
set -euo pipefail
source "$(dirname "$0")/common.sh"
ALGORITHM=${ALGORITHM:-safe_rlhf}
# PKU averages the last 128 costs of each of its 8 ranks: 1,024 costs, which are 8 rollouts. RePO has no such average.
WINDOW=(); [ "$ALGORITHM" = repo ] || WINDOW=(--cost-window 8)

"${LAUNCH[@]}" ${ALGORITHM}_ppo.py --fsdp --dtype bf16 --activation-checkpointing --output-dir "$OUT/${ALGORITHM}_7b" --save-every 50 --keep 2 \
    --model PKU-Alignment/alpaca-7b-reproduced \
    --reward-model PKU-Alignment/beaver-7b-v1.0-reward --cost-model PKU-Alignment/beaver-7b-v1.0-cost \
    --dataset PKU-Alignment/PKU-SafeRLHF@v0 --ptx-dataset tatsu-lab/alpaca --skip-bad-rows \
    --max-length 512 --max-new-tokens 384 --temperature 1.0 \
    --steps 500 --batch-size 128 --minibatch-size 128 --micro-batch-size 4 --ppo-epochs 1 \
    --lr 1e-5 --critic-lr 5e-6 --warmup-ratio 0.03 --weight-decay 0.01 --grad-clip 1.0 \
    --gamma 1.0 --gae-lambda 0.95 --clip 0.2 --value-clip 5.0 --score-clip 50.0 --kl-coeff 0.01 --ptx-coeff 16.0 \
    --threshold 0.0 --lambda-init 1.0 --lambda-lr 0.1 --lambda-max 5.0 \
    "${WINDOW[@]}" "$@" "${PPO_OVERRIDES[@]}"
