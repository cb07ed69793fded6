#!/usr/bin/env bash
# RePO on Llama-3.2-3B, as in the second experiment of its paper: a supervised start on Alpaca, then RePO with the Beaver
# reward and cost models. Their tokenizer is another: responses are retokenized for them, and both critics start from the policy.
# needs      one GPU and 150 GiB of host memory, which holds weights and optimizer states (and what docs/scaling.md says
#            of pinned blocks); by tools.plan 16.1 GiB are used on the GPU; hub access to models and data. Every micro-batch
#            moves all weights: few large ones
# costs      not measured
# rehearsed  flags only, by REHEARSAL= on a CPU (see common.sh); never run at this size
set -euo pipefail
NPROC=${NPROC:-1}
source "$(dirname "$0")/common.sh"

SHARED=(--fsdp --cpu-offload --dtype bf16 --activation-checkpointing --max-length 512 --skip-bad-rows --warmup-ratio 0.03 --grad-clip 1.0)
SFT="$OUT/llama_3b_sft"

"${LAUNCH[@]}" sft.py "${SHARED[@]}" --model meta-llama/Llama-3.2-3B --dataset tatsu-lab/alpaca --output-dir "$SFT" --save-every 200 \
    --steps 1220 --batch-size 128 --micro-batch-size 32 --lr 2e-5 --weight-decay 0.0 "$@" "${SFT_OVERRIDES[@]}"

"${LAUNCH[@]}" repo_ppo.py "${SHARED[@]}" --output-dir "$OUT/repo_3b" --save-every 50 --keep 2 \
    --model "$SFT/model" --reward-critic "$SFT/model" --cost-critic "$SFT/model" \
    --reward-model PKU-Alignment/beaver-7b-v1.0-reward --cost-model PKU-Alignment/beaver-7b-v1.0-cost \
    --dataset PKU-Alignment/PKU-SafeRLHF@v0 --ptx-dataset tatsu-lab/alpaca --max-new-tokens 384 --temperature 1.0 \
    --steps 500 --batch-size 128 --minibatch-size 128 --micro-batch-size 32 --ppo-epochs 1 \
    --lr 1e-5 --critic-lr 5e-6 --weight-decay 0.01 --clip 0.2 --kl-coeff 0.01 --ptx-coeff 16.0 \
    --threshold 0.0 --lambda-init 1.0 --lambda-lr 0.1 --lambda-max 5.0 \
    "$@" "${PPO_OVERRIDES[@]}"
