# shellcheck shell=bash
# What every task of a job finds in its environment; `srun` passes it on.

forget_other_launchers() { # what the submitting shell was a part of must not tell tasks who they are
    unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK CROSS_RANK CROSS_SIZE LOCAL_SIZE MASTER_ADDR MASTER_PORT
    unset "${!OMPI_COMM_@}" "${!PMIX_@}" "${!TORCHELASTIC_@}"
}

load_modules() { # TOKSCALE_MODULES: names that `module load` knows, separated by spaces
    local name
    [[ -n ${TOKSCALE_MODULES:-} ]] || return 0
    if ! command -v module >/dev/null; then
        echo "TOKSCALE_MODULES is set, but this site has no 'module' command" >&2
        exit 69
    fi
    for name in $TOKSCALE_MODULES; do
        set +u # older versions of environment-modules read variables that are not set
        module load "$name"
        set -u
    done
}

node_local_caches() { # compiled kernels: a shared home makes a thousand ranks wait for one lock
    # One folder for each version of the code, so that a job that comes again need not compile again.
    local base=${TOKSCALE_CACHE:-${TMPDIR:-/tmp}}/tokscale-${USER:-$UID}
    export TOKSCALE_NODE_CACHE=$base/${TOKSCALE_CODE_VERSION:-live}
    export TORCH_EXTENSIONS_DIR=$TOKSCALE_NODE_CACHE/torch_extensions
    export TORCHINDUCTOR_CACHE_DIR=$TOKSCALE_NODE_CACHE/inductor
    export TRITON_CACHE_DIR=$TOKSCALE_NODE_CACHE/triton
}

quiet_libraries() {
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    export TOKENIZERS_PARALLELISM=false
    export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
    if [[ -n ${TOKSCALE_INTERFACE:-} ]]; then
        export GLOO_SOCKET_IFNAME=$TOKSCALE_INTERFACE NCCL_SOCKET_IFNAME=$TOKSCALE_INTERFACE
    fi
}

device_memory() { # shapes that change from step to step leave holes between blocks of fixed sizes
    export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
}

lift_limits() { # pinned memory for the network, open shards; what the site forbids stays as it is
    ulimit -l unlimited 2>/dev/null || true
    ulimit -n 65536 2>/dev/null || true
}

job_facts() { # what a stage would ask the scheduler, asked once and outside of the container
    local fields='' end='' first='' live=''
    fields=$(scontrol show job --oneliner "$SLURM_JOB_ID")
    end=$(grep -o ' EndTime=[^ ]*' <<<"$fields" | cut -d= -f2) || true
    if [[ $end == *T* ]]; then export TOKSCALE_JOB_END && TOKSCALE_JOB_END=$(date -d "$end" +%s); fi
    # A stage that meets a lock asks whether its holder's job still lives.
    if live=$(squeue --noheader --states=R,CG,S,SI,ST,CF --format=%A | sort -u | paste -sd,); then
        export TOKSCALE_LIVE_JOBS=$live
    fi
    export TOKSCALE_LAUNCHER=srun TOKSCALE_JOB=$SLURM_JOB_ID TOKSCALE_RESTARTS=${SLURM_RESTART_COUNT:-0}
    [[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || TOKSCALE_JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    # Below the range from which the kernel takes ports for connections (32768 on), and another one at each start.
    export TOKSCALE_MASTER_ADDR TOKSCALE_MASTER_PORT=$((12000 + (SLURM_JOB_ID * 31 + TOKSCALE_RESTARTS * 7) % 20000))
    TOKSCALE_MASTER_ADDR=127.0.0.1
    if ((SLURM_JOB_NUM_NODES > 1)); then
        first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
        # Several slurmd on one machine have names that no resolver knows; there is an address then.
        TOKSCALE_MASTER_ADDR=$first
        getent hosts "$first" >/dev/null ||
            TOKSCALE_MASTER_ADDR=$(scontrol show node --oneliner "$first" | grep -o ' NodeAddr=[^ ]*' | cut -d= -f2)
    fi
}
