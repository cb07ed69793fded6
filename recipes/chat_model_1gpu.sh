#!/usr/bin/env bash
# A chat model of your choice by both algorithms, with adapters of rank 16: reward and cost model from PKU-SafeRLHF, the policy from
# the chat model itself. `make real MODEL=...` is the shorter way, with preferences by rule (docs/real_model.md).
#   MODEL=HuggingFaceTB/SmolLM2-1.7B-Instruct recipes/chat_model_1gpu.sh
# needs      one GPU of 40 GB for a model of 1.7 billion parameters (by tools.plan 30.7 GiB), hub access to model and data
# costs      not measured
# rehearsed  flags only, by REHEARSAL= on a CPU (see common.sh); never run at this size. The learning rates are not tuned
set -euo pipefail
NPROC=${NPROC:-1}
source "$(dirname "$0")/common.sh"
MODEL=${MODEL:-HuggingFaceTB/SmolLM2-1.7B-Instruct}
PAIRS=${PAIRS:-PKU-Alignment/PKU-SafeRLHF}

SHARED=(--dtype bf16 --chat-template --lora-rank 16 --max-length 512 --skip-bad-rows --save-every 50 --keep 2 --model "$MODEL" --dataset "$PAIRS")

for kind in reward cost; do
    "${LAUNCH[@]}" ${kind}_model.py "${SHARED[@]}" --eval-dataset "$PAIRS:test" --output-dir "$OUT/chat_$kind" \
        --epochs 1 --batch-size 64 --micro-batch-size 16 --lr 2e-4 --regularization 0.01 "$@" "${PREFERENCE_OVERRIDES[@]}"
done

for algorithm in safe_rlhf repo; do
    "${LAUNCH[@]}" ${algorithm}_ppo.py "${SHARED[@]}" --output-dir "$OUT/chat_$algorithm" --ptx-dataset '' \
        --reward-model "$OUT/chat_reward/model" --cost-model "$OUT/chat_cost/model" --max-new-tokens 128 --temperature 1.0 \
        --steps 200 --batch-size 64 --minibatch-size 32 --micro-batch-size 16 --lr 1e-4 --critic-lr 1e-4 --kl-coeff 0.04 \
        --threshold 0.0 --lambda-init 2.0 --lambda-lr 0.3 --lambda-max 5.0 "$@" "${PPO_OVERRIDES[@]}"
done
