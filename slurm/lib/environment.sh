# shellcheck shell=bash
# What every task of a job finds in its environment. Sourced once by the batch script; `srun` passes it on.

load_modules() { # TOKSCALE_MODULES: names that `module load` knows, separated by spaces
    local name
    [[ -n ${TOKSCALE_MODULES:-} ]] || return 0
    if ! command -v module >/dev/null; then
        echo "TOKSCALE_MODULES is set, but this site has no 'module' command" >&2
        exit 69
    fi
    for name in $TOKSCALE_MODULES; do
        module load "$name"
    done
}

node_local_caches() { # compiled kernels: a shared home makes a thousand ranks wait for one lock
    local root=${TOKSCALE_CACHE:-${TMPDIR:-/tmp}}/tokscale-${USER:-$UID}-$SLURM_JOB_ID
    export TORCH_EXTENSIONS_DIR=$root/torch_extensions
    export TORCHINDUCTOR_CACHE_DIR=$root/inductor
    export TRITON_CACHE_DIR=$root/triton
}

quiet_libraries() {
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    export TOKENIZERS_PARALLELISM=false
    export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
}

device_memory() { # shapes that change from step to step leave holes between blocks of fixed sizes
    export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
}

lift_limits() { # pinned memory for the network, open shards; what the site forbids stays as it is
    ulimit -l unlimited 2>/dev/null || true
    ulimit -n 65536 2>/dev/null || true
}

load_modules
node_local_caches
quiet_libraries
device_memory
lift_limits
