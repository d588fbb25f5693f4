#!/bin/sh
# Start this on every node of a cluster without a scheduler. Variables, with what they are by default:
#   NODES  number of nodes (1)            GPUS  processes per node, one per GPU (8)
#   HEAD   host name of the first node    PORT  a free port there (29500)
#   PRESET, OUT, RUN_ID                   what is aligned, where to, and a name for this start
#   BRANCH_RANKS                          ranks that share a group (4: four groups on two nodes of eight GPUs);
#                                         kvpo plan --preset PRESET --gpus GPUS --nodes NODES names the best
# All nodes must see OUT. A rank that dies ends the others; all are started again and resume the last checkpoint.
# At SIGTERM an update has half of this many seconds to end; a longer one is given up, those before it are saved.
set -eu
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-280}"
exec torchrun \
    --nnodes "${NODES:-1}" \
    --nproc-per-node "${GPUS:-8}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "${HEAD:-localhost}:${PORT:-29500}" \
    --rdzv-id "${RUN_ID:-kvpo}" \
    --max-restarts 3 \
    -m kvpo align --preset "${PRESET:-longlive-1.3b}" --out "${OUT:-runs/align}" --resume \
    --distributed.branch_ranks "${BRANCH_RANKS:-4}" "$@"
