# shellcheck shell=bash
# What every task of a job finds in its environment; `srun` passes it on.

forget_submitting_shell() { # what it was a part of must not tell tasks who they are, nor bend the answers of Slurm
    unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE LOCAL_SIZE NODE_RANK NNODES MASTER_ADDR MASTER_PORT
    unset GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_NAME ROLE_WORLD_SIZE CROSS_RANK CROSS_SIZE MPI_LOCALRANKID MPI_LOCALNRANKS
    unset "${!TORCHELASTIC_@}" "${!OMPI_@}" "${!PMIX_@}" "${!PMI_@}" "${!MV2_COMM_@}" "${!PALS_@}" "${!JSM_@}"
    unset "${!SLURM_CPU_BIND@}" "${!SLURM_MEM_BIND@}" "${!SQUEUE_@}" SLURM_TIME_FORMAT
    # Slurm sets this itself where it gives GPUs; where they come with the node, that of the shell would hide them.
    [[ -n ${SLURM_JOB_GPUS:-}${SLURM_STEP_GPUS:-}${SLURM_GPUS_ON_NODE:-} || -z ${CUDA_VISIBLE_DEVICES:-} ]] ||
        unset CUDA_VISIBLE_DEVICES
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
    local base=${TOKSCALE_CACHE:-${TMPDIR:-/tmp}}/tokscale-${UID}
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
        export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$TOKSCALE_INTERFACE}
        export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$TOKSCALE_INTERFACE}
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
    local end='' live='' first=''
    # Of an array, the number of the job alone would mean all of its tasks.
    export TOKSCALE_LAUNCHER=srun TOKSCALE_JOB=$SLURM_JOB_ID TOKSCALE_RESTARTS=${SLURM_RESTART_COUNT:-0}
    [[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || TOKSCALE_JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    unset TOKSCALE_JOB_END TOKSCALE_LIVE_JOBS
    end=$(job_field EndTime)
    if [[ $end == *T* ]]; then export TOKSCALE_JOB_END && TOKSCALE_JOB_END=$(date -d "$end" +%s) || true; fi
    # A stage that meets a lock asks whether its holder's job still lives. Too long a list is no variable any more.
    if live=$(squeue --noheader --array --states=R,CG,S,SI,ST,CF --format='%A %i'); then
        live=$(tr ' ' '\n' <<<"$live" | sort -u | paste -sd,)
        ((${#live} > 100000)) || export TOKSCALE_LIVE_JOBS=$live
    fi
    # Below the range from which the kernel takes ports for connections (32768 on), and another one at each start.
    export TOKSCALE_MASTER_ADDR=127.0.0.1 TOKSCALE_MASTER_PORT=$((12000 + (SLURM_JOB_ID * 31 + TOKSCALE_RESTARTS * 7) % 20000))
    if ((SLURM_JOB_NUM_NODES > 1)); then
        first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
        # Several slurmd on one machine have names that no resolver knows; there is an address then.
        TOKSCALE_MASTER_ADDR=$first
        getent hosts "$first" >/dev/null ||
            TOKSCALE_MASTER_ADDR=$(scontrol show node --oneliner "$first" | sed -n '1s/.* NodeAddr=\([^ ]*\).*/\1/p') || true
        if [[ -z $TOKSCALE_MASTER_ADDR ]]; then
            echo "the address of the first node, $first, is known to neither the resolver nor scontrol" >&2
            exit 69
        fi
    fi
}

job_field() { # job_field <name>: what `scontrol show job` says of this job; empty when it does not answer
    ask scontrol show job --oneliner "$TOKSCALE_JOB" | sed -n "1s/.* $1=\([^ ]*\).*/\1/p" || true
}

ask() { # ask <command of Slurm>: again, where a busy controller does not answer; a job that ends on that is lost
    local pause
    for pause in 2 5 10 20 0; do
        if "$@"; then return 0; fi
        ((pause == 0)) || sleep "$pause"
    done
    return 1
}
