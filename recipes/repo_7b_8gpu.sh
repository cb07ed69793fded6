#!/usr/bin/env bash
# RePO on Alpaca-7B reproduced: the twin script with the very flags of safe_rlhf_7b_8gpu.sh, which also says what it needs.
ALGORITHM=repo exec "$(dirname "$0")/safe_rlhf_7b_8gpu.sh" "$@"
