#!/usr/bin/env bash
# Runs a job on several machines by torchrun: start this on each of them, with the same arguments, at about the same time.
# Usage: HEAD=host[:port] NODES=2 scripts/torchrun_nodes.sh [Hydra overrides]
#   HEAD             one of the machines, as the others reach it; it hosts the rendezvous (port 29400 if none is given)
#   NODES            how many machines; torchrun waits for all of them
#   RANKS_PER_NODE   processes on each: gpu (one a GPU) if not given, else a number
#   MAX_RESTARTS     how often all ranks are started again when one has failed; 0 if not given
#   JOB_ID           the same on all machines, another one for each job; distattn if not given
#   PYTHON           the interpreter; the checkout's .venv if there is one, else python
set -euo pipefail
: "${HEAD:?HEAD is not set; expected a host that all machines reach, such as HEAD=10.0.0.1}"
: "${NODES:?NODES is not set; expected the number of machines}"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
python=$root/.venv/bin/python
[[ -x $python ]] || python=python
[[ $HEAD == *:* ]] || HEAD=$HEAD:29400
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-$python}" -m torch.distributed.run \
    --nnodes="$NODES" --nproc-per-node="${RANKS_PER_NODE:-gpu}" --max-restarts="${MAX_RESTARTS:-0}" \
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD" --rdzv-id="${JOB_ID:-distattn}" \
    -m distattn.launch.run launcher=torchrun "$@"
