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
    forget_submitting_shell
    # A file of settings says all there is to say of interfaces; by hand, the shell may.
    [[ " $* " != *" settings="* ]] || unset GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME
    for word in "$@"; do
        # shellcheck disable=SC1090
        if [[ $word == settings=* ]]; then
            source "${word#settings=}"
            settings_names=$(sed -nE 's/^export ([A-Za-z_][A-Za-z_0-9]*)=.*/\1/p' "${word#settings=}")
        else
            words+=("$word")
        fi
    done
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
