# shellcheck shell=bash
# A stage that asked to stop is requeued by its rank 0. This is for what can no longer ask: ranks that were killed or
# lost (a code above 128) and ranks that stalled (76). Everything else would fail again, and ends the job.

finish() { # finish <code>: requeue, or leave with the code
    local code=$1 restarts=${SLURM_RESTART_COUNT:-0} name=$SLURM_JOB_ID state
    [[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || name=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    if ((code == 76 || code > 128)); then
        # A job that was cancelled, or that Slurm puts back by itself, is not RUNNING any more.
        state=$(scontrol show job --oneliner "$name" | grep -o 'JobState=[A-Z_]*' || true)
        if [[ $state == JobState=RUNNING ]] && ((restarts < ${TOKSCALE_MAX_RESTARTS:-0})); then
            echo "== requeueing job $name after code $code (start $restarts of at most $TOKSCALE_MAX_RESTARTS)"
            scontrol requeue "$name" && sleep 60 # Slurm ends this script meanwhile
        fi
    fi
    exit "$code"
}
