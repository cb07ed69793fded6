# Sourced by the recipes: how to launch, and the rehearsal.
#
#   NPROC=4 recipes/X.sh                                                   # GPUs of this machine (default 8)
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=first-host recipes/X.sh               # on the first of two machines
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=first-host recipes/X.sh               # on the second
#   REHEARSAL=runs/rehearsal NPROC=1 recipes/X.sh                          # the same flags on tiny random models
#
# Every recipe ends with "$@" and then with the rehearsal's overrides: of two equal flags the later one counts.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-.venv/bin/python}
NPROC=${NPROC:-8}
# Asked to stop, a run finishes its step and saves: a 7B checkpoint takes longer than the 30 s after which torchrun kills
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-1800}
# torchrun would give each process one thread, and --cpu-offload computes its optimizer steps on the host
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > NPROC ? $(nproc) / NPROC : 1))}
# What torchrun hands on to its processes (--signals-to-handle); by itself it would die of the last three, as this shell
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2,SIGXCPU
trap : HUP USR1 USR2 XCPU
LAUNCH=("$PYTHON" -m torch.distributed.run --nproc-per-node "$NPROC")
if [ -n "${NNODES:-}" ]; then
    # gloo binds to what the host's own name resolves to; on 127.0.1.1 (Debian's /etc/hosts) no other machine finds it
    if [ -z "${GLOO_SOCKET_IFNAME:-}" ] && getent ahosts "$(hostname)" | grep -qE '^(127\.|::1 )'; then
        echo "this host's name resolves to itself: set GLOO_SOCKET_IFNAME to its network interface (ip -br addr)" >&2
        exit 2
    fi
    LAUNCH+=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR")
else
    LAUNCH+=(--standalone)
fi
OUT=${OUT:-runs}
SFT_OVERRIDES=() PREFERENCE_OVERRIDES=() PPO_OVERRIDES=()
if [ -n "${REHEARSAL:-}" ]; then
    "$PYTHON" recipes/rehearsal.py "$REHEARSAL"
    OUT=$REHEARSAL/runs
    TINY=(--steps 2 --batch-size 4 --micro-batch-size 2 --max-length 48 --save-every 1)
    SFT_OVERRIDES=("${TINY[@]}" --epochs 0 --model "$REHEARSAL/policy" --dataset "$REHEARSAL/sft.jsonl")
    PREFERENCE_OVERRIDES=("${TINY[@]}" --epochs 0 --model "$REHEARSAL/policy" --dataset "$REHEARSAL/pairs.jsonl" --eval-dataset "$REHEARSAL/pairs.jsonl")
    PPO_OVERRIDES=("${TINY[@]}" --minibatch-size 4 --max-new-tokens 8 --model "$REHEARSAL/policy" --reward-model "$REHEARSAL/reward"
        --cost-model "$REHEARSAL/cost" --dataset "$REHEARSAL/pairs.jsonl" --ptx-dataset "$REHEARSAL/sft.jsonl")
fi
