# shellcheck shell=bash
# Whether a job comes again is decided by why it ended, which the stage itself says, not by the highest code of any rank.
#   TOKSCALE_OUTCOME   a file in which the stage leaves one line: `stage attempt code again [nodes to leave out]`, of
#                      which `again` is `yes`, `no`, or `-` until it ends (tokscale/runs/README.md).
#   $TOKSCALE_OUTCOME.joined   is there as soon as all ranks have met.
#   $TOKSCALE_OUTCOME.starts   a line for each start of this job: why the one before it ended.
# Counted apart, each with its own limit: `preempted` (asked to stop, out of time, put back by Slurm itself), `failed`
# (a rank was killed, lost or stalled), `nodes` (preflight refused some), `unstarted` (no rank came as far as the others).

begin_start() { # count what ended the start before this one, if that had no time to say it
    local state=${TOKSCALE_STATE:-$PWD/.tokscale-jobs}
    mkdir -p "$state"
    export TOKSCALE_OUTCOME=$state/$TOKSCALE_JOB
    touch "$TOKSCALE_OUTCOME.starts"
    if [[ $(tail -n 1 "$TOKSCALE_OUTCOME.starts") == started ]]; then
        echo preempted >>"$TOKSCALE_OUTCOME.starts"
    fi
    export TOKSCALE_LAST_END && TOKSCALE_LAST_END=$(tail -n 1 "$TOKSCALE_OUTCOME.starts")
    echo started >>"$TOKSCALE_OUTCOME.starts"
    rm -f "$TOKSCALE_OUTCOME" "$TOKSCALE_OUTCOME".{stderr,joined}
}

finish() { # finish <code of srun>: say why the job ended, and requeue it or leave with the code
    local srun_code=$1 _stage='' _attempt='' code='' again='' nodes='' reason='' why=''
    [[ ! -s $TOKSCALE_OUTCOME ]] || read -r _stage _attempt code again nodes <"$TOKSCALE_OUTCOME" || true
    [[ $again != - ]] || again=''
    [[ -n $again || ! -e $TOKSCALE_OUTCOME.joined ]] || again=running
    case $again in
        yes)
            case $code in
                75) reason=preempted why="asked to stop" ;;
                *) reason=failed why="ended with $code" ;;
            esac
            [[ -z $nodes ]] || reason=nodes why="without $nodes"
            ;;
        no) why="the stage ended with $code; it would again" ;;
        running)
            if out_of_memory; then
                why="a rank was killed for want of memory; ask for more (cluster.memory), or make batches smaller"
            elif was_killed "$srun_code"; then
                reason=failed why="a rank was killed or lost (code $srun_code)"
            else
                why="a rank ended with $srun_code and could not say why"
            fi
            ;;
        *)
            if ((srun_code == 0)); then
                why="nothing to do"
            elif out_of_memory; then
                why="killed for want of memory before it started; ask for more (cluster.memory)"
            elif was_killed "$srun_code" && ((srun_code != 134 && srun_code != 139)); then
                reason=unstarted why="killed before all ranks had met (code $srun_code)"
            else
                why="ended with $srun_code before all ranks had met: look above for the image, the interpreter or the module"
            fi
            ;;
    esac
    # The code of the stage, where it has one: the highest of any rank is that of a follower that was ended.
    [[ $again == yes || $again == no ]] || code=$srun_code
    echo "${reason:-ended}" >>"$TOKSCALE_OUTCOME.starts"
    if [[ -n $reason ]]; then come_again "$reason" "$why" "$nodes"; else ((code == 0)) || echo "== not requeued: $why"; fi
    ((code != 0)) || rm -f "$TOKSCALE_OUTCOME" "$TOKSCALE_OUTCOME".{stderr,joined,starts}
    exit "$code"
}

come_again() { # come_again <reason> <why> <nodes>
    local reason=$1 why=$2 nodes=$3 limit times state present
    case $reason in
        preempted) limit=${TOKSCALE_MAX_PREEMPTIONS:-1000} ;;
        failed) limit=${TOKSCALE_MAX_FAILURES:-3} ;;
        nodes) limit=${TOKSCALE_MAX_BAD_NODES:-10} ;;
        unstarted) limit=3 ;;
    esac
    times=$(grep -c "^$reason\$" "$TOKSCALE_OUTCOME.starts")
    if ((times > limit)); then
        echo "== not requeued: $why; this was number $times of $reason, at most $limit are allowed"
        return
    fi
    # A job that was cancelled, or that Slurm puts back by itself, is not RUNNING any more.
    state=$(scontrol show job --oneliner "$TOKSCALE_JOB" | grep -o ' JobState=[A-Z_]*' || true)
    if [[ $state != ' JobState=RUNNING' ]]; then
        echo "== not requeued: the job is ${state# JobState=}"
        return
    fi
    if [[ -n $nodes ]]; then
        present=$(scontrol show job --oneliner "$TOKSCALE_JOB" | grep -o ' ExcNodeList=[^ ]*' | cut -d= -f2) || true
        [[ ${present:-(null)} == '(null)' ]] || nodes=$present,$nodes
        echo "== job $TOKSCALE_JOB avoids $nodes from now on"
    fi
    echo "== requeueing job $TOKSCALE_JOB: $why ($reason, $times of at most $limit)"
    scontrol requeue "$TOKSCALE_JOB" || return 0
    [[ -z $nodes ]] || scontrol update "JobId=$TOKSCALE_JOB" "ExcNodeList=$nodes" || true
    sleep 60 # Slurm ends this script meanwhile
}

was_killed() { # 128 + a signal; 255 is what container runtimes and ssh end with
    (($1 > 128 && $1 <= 192))
}

out_of_memory() {
    grep -qiE 'oom[_-]kill|out of memory' "$TOKSCALE_OUTCOME.stderr" 2>/dev/null
}
