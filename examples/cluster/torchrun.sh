#!/bin/sh
# Start this on every node of a cluster without a scheduler. Variables, with their defaults:
#   NODES  number of nodes (1)            GPUS  processes per node, one per GPU (8)
#   HEAD   host name of the first node    PORT  a free port there (29500)
#   PRESET, OUT, RUN_ID                   the preset, the run's directory, and a name that all nodes share
#   BRANCH_RANKS                          ranks that share a group (4: four groups on two nodes of eight GPUs);
#                                         kvpo plan --preset PRESET --gpus GPUS --nodes NODES finds the best
# Further arguments go to kvpo align. All nodes must be able to access OUT. If a rank dies, the others end, and all are
# started again and resume from the last checkpoint. After SIGTERM, an update may take half of the seconds below; a longer
# one is given up, and the updates before it are saved.
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
