# shellcheck shell=bash
# What every batch file does: settings, environment, rendezvous, one srun, and what the queue is told afterwards.
#   run_stage <tasks: all | one> <stage> [settings=FILE] [key=value ...]
# Everything that asks Slurm stands here, outside of any container: an image needs no program of Slurm, no munge and no
# slurm.conf. What the stage must know arrives as variables; what it has to say comes back in TOKSCALE_OUTCOME.
lib=${BASH_SOURCE[0]%/*}
source "$lib/environment.sh"
source "$lib/nodes.sh"
source "$lib/launch.sh"
source "$lib/restart.sh"

run_stage() {
    local tasks=$1 word words=() code=0
    shift
    for word in "$@"; do
        # shellcheck disable=SC1090
        if [[ $word == settings=* ]]; then source "${word#settings=}"; else words+=("$word"); fi
    done
    forget_other_launchers
    load_modules
    node_local_caches
    quiet_libraries
    device_memory
    lift_limits
    job_facts
    begin_start
    ready_nodes
    launch "$tasks" "${words[@]}" || code=$?
    finish "$code"
}
