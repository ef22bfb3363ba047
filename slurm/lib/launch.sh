# shellcheck shell=bash
# One task for each rank, started by srun: Slurm's signals reach the trainers themselves, and exit codes are theirs.
# Who is which rank is read from SLURM_* in Python (tokscale/dist/env.py).
source "${BASH_SOURCE[0]%/*}/container.sh"

launch() { # launch <tasks: all | one> <stage> [key=value ...]; returns the exit code of the stage
    local tasks=$1 code=0 errors tee
    shift
    container
    # Not --export=NONE, which sites may have set for srun along with sbatch.
    local flags=(--kill-on-bad-exit=1 --wait=60 --unbuffered --label --export=ALL --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}")
    [[ $tasks == all ]] || flags+=(--nodes=1 --ntasks=1)
    local command=("${TOKSCALE_PYTHON:-python}" -m tokscale "$@")
    if [[ -n ${TOKSCALE_CODE:-} ]]; then # the copy of the submission; -P keeps the folder we are in out of the way
        export PYTHONPATH=$TOKSCALE_CODE${PYTHONPATH:+:$PYTHONPATH}
        command=("${TOKSCALE_PYTHON:-python}" -P -m tokscale "$@")
    fi
    echo "== $(date '+%F %T') job $TOKSCALE_JOB start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST: ${command[*]}"
    # What srun itself says is kept beside, since it alone knows of memory that ran out.
    exec {errors}> >(tee "$TOKSCALE_OUTCOME.stderr" >&2)
    tee=$!
    srun "${flags[@]}" "${container_flags[@]}" "${inside[@]}" "${command[@]}" 2>&"$errors" || code=$?
    exec {errors}>&-
    wait "$tee" || true # what it holds back would be missed below
    echo "== $(date '+%F %T') job $TOKSCALE_JOB ended with $code"
    return "$code"
}
