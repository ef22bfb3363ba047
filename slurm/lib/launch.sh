# shellcheck shell=bash
# One task for each rank, started by srun: Slurm's signals reach the trainers themselves, and exit codes are theirs.
# Who is which rank is read from SLURM_* in Python (tokscale/dist/env.py).
source "${BASH_SOURCE[0]%/*}/container.sh"

launch() { # launch <tasks: all | one> <stage> [key=value ...]; returns the exit code of the stage
    local tasks=$1 code=0
    shift
    local flags=(--kill-on-bad-exit=1 --wait=60 --unbuffered --label --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}")
    [[ $tasks == all ]] || flags+=(--nodes=1 --ntasks=1)
    local command=("${TOKSCALE_PYTHON:-python}" -m tokscale "$@")
    echo "== $(date '+%F %T') job $SLURM_JOB_ID start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST: ${command[*]}"
    srun "${flags[@]}" "${container_flags[@]}" "${inside[@]}" "${command[@]}" || code=$?
    echo "== $(date '+%F %T') job $SLURM_JOB_ID ended with $code"
    return "$code"
}
