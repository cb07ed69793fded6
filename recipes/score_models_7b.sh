#!/usr/bin/env bash
# Alpaca-7B reproduced, then its reward and cost model, on PKU-SafeRLHF with Beaver's published hyper-parameters.
# needs      8 GPUs of 24 GB or more (FSDP2, bf16; by tools.plan 17.3 GiB on each), 240 GB of disk for a stage's checkpoints (about
#            80 GB each; two are kept, and three are there while one is written; 560 GB if those of the stages before are not
#            deleted) and 27 GB per model; access to the base model
# costs      not measured
# rehearsed  flags only, by REHEARSAL= on a CPU (see common.sh); never run at this size
set -euo pipefail
source "$(dirname "$0")/common.sh"

SHARED=(--fsdp --dtype bf16 --activation-checkpointing --max-length 512 --skip-bad-rows --warmup-ratio 0.03 --grad-clip 1.0 --save-every 200)

"${LAUNCH[@]}" sft.py "${SHARED[@]}" --model huggyllama/llama-7b --dataset tatsu-lab/alpaca --output-dir "$OUT/alpaca_7b" \
    --epochs 3 --batch-size 128 --micro-batch-size 4 --lr 2e-5 --weight-decay 0.0 "$@" "${SFT_OVERRIDES[@]}"

# v0 is the revision with 300,000 pairs that the published models came with; the default branch holds 83,400 newer ones
for kind in reward cost; do
    "${LAUNCH[@]}" ${kind}_model.py "${SHARED[@]}" --model "$OUT/alpaca_7b/model" --dataset PKU-Alignment/PKU-SafeRLHF@v0 \
        --eval-dataset PKU-Alignment/PKU-SafeRLHF@v0:test --output-dir "$OUT/${kind}_7b" --loss sequence-wise \
        --epochs 2 --batch-size 128 --micro-batch-size 8 --lr 2e-5 --weight-decay 0.1 --regularization 0.001 "$@" "${PREFERENCE_OVERRIDES[@]}"
done
