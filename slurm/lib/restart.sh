# shellcheck shell=bash
# Whether a job comes again is decided by why it ended, which the stage itself says, not by the highest code of any rank.
#   TOKSCALE_OUTCOME   a file in which the stage leaves one line: `stage attempt code again [nodes to leave out]`, of
#                      which `again` is `yes`, `no`, or `-` until it ends (tokscale/runs/README.md).
#   $TOKSCALE_OUTCOME.joined   is there as soon as all ranks have met.
#   $TOKSCALE_OUTCOME.starts   a line for each start of this job: why the one before it ended.
#   $TOKSCALE_OUTCOME.avoided  a line for each time that nodes were left out.
#   $TOKSCALE_OUTCOME.why      why the job does not come again, for `tokscale status`.
# Counted apart, each with its own limit: `preempted` (asked to stop, out of time, put back by Slurm itself), `failed`
# (a rank was killed, lost or stalled), `nodes` (preflight refused some), `unstarted` (no rank came as far as the others).

begin_start() { # count what ended the start before this one, if that had no time to say it
    local state=${TOKSCALE_STATE:-$PWD/.tokscale-jobs}
    mkdir -p "$state"
    export TOKSCALE_OUTCOME=$state/$TOKSCALE_JOB
    # What a job finds at its first start is of another one with its number: an older one, or another cluster's.
    ((TOKSCALE_RESTARTS)) || rm -f "$TOKSCALE_OUTCOME.starts" "$TOKSCALE_OUTCOME.avoided"
    touch "$TOKSCALE_OUTCOME.starts"
    if [[ $(tail -n 1 "$TOKSCALE_OUTCOME.starts") == started ]]; then
        echo preempted >>"$TOKSCALE_OUTCOME.starts"
    fi
    export TOKSCALE_LAST_END && TOKSCALE_LAST_END=$(tail -n 1 "$TOKSCALE_OUTCOME.starts")
    echo started >>"$TOKSCALE_OUTCOME.starts"
    rm -f "$TOKSCALE_OUTCOME" "$TOKSCALE_OUTCOME".{stderr,joined,why}
}

finish() { # finish <code of srun>: say why the job ended, and requeue it or leave with the code
    local srun_code=$1 _stage='' _attempt='' code='' again='' nodes='' reason='' why='' requeued=''
    [[ ! -s $TOKSCALE_OUTCOME ]] || read -r _stage _attempt code again nodes <"$TOKSCALE_OUTCOME" || true
    [[ $again != - ]] || again=''
    [[ -n $again || ! -e $TOKSCALE_OUTCOME.joined ]] || again=running
    case $again in
        yes)
            reason=failed why="ended with $code"
            [[ -e $TOKSCALE_OUTCOME.joined ]] || reason=unstarted
            [[ $code != 75 ]] || reason=preempted why="asked to stop"
            [[ $code != 69 ]] || reason=nodes why="without $nodes"
            ;;
        no) why="the stage ended with $code; it would again" ;;
        running)
            if out_of_memory; then
                why="a rank was killed for want of memory; ask for more (cluster.memory), or make batches smaller"
            elif was_preempted; then
                reason=preempted why="preempted (code $srun_code)"
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
            elif was_preempted; then
                reason=preempted why="preempted before all ranks had met (code $srun_code)"
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
    if [[ -n $reason ]]; then come_again "$reason" "$why" "$nodes"; else ((code == 0)) || stay_away "$why"; fi
    # Slurm itself may be ending the job, or putting it back; else it is over.
    [[ -n $requeued || $(job_field JobState) != RUNNING ]] || leave_nodes
    ((code != 0)) || rm -f "$TOKSCALE_OUTCOME" "$TOKSCALE_OUTCOME".{stderr,joined,starts,avoided}
    exit "$code"
}

stay_away() { # stay_away <why>
    echo "== not requeued: $1"
    echo "$1" >"$TOKSCALE_OUTCOME.why"
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
        stay_away "$why; this was number $times of $reason, at most $limit are allowed"
        return
    fi
    # A job that was cancelled, or that Slurm puts back by itself, is not RUNNING any more.
    state=$(job_field JobState)
    if [[ $state != RUNNING ]]; then
        echo "== not requeued: the job is $state" # Slurm itself says more of that
        return
    fi
    if [[ -n $nodes ]]; then
        present=$(job_field ExcNodeList)
        [[ ${present:-(null)} != '(null)' ]] || present=''
        if ! may_avoid "$nodes${present:+,$present}"; then
            # Without them the job would wait for ever: bad ones would end it again, slow ones only make it slow.
            [[ $reason != nodes ]] || { stay_away "$why, $may_not" && return; }
            echo "== $nodes stay: $may_not"
            nodes=''
        else
            nodes=$nodes${present:+,$present}
            echo "$nodes" >>"$TOKSCALE_OUTCOME.avoided"
            echo "== job $TOKSCALE_JOB avoids $nodes from now on"
        fi
    fi
    echo "== requeueing job $TOKSCALE_JOB: $why ($reason, $times of at most $limit)"
    ask scontrol requeue "$TOKSCALE_JOB" || return 0
    requeued=yes
    [[ -z $nodes ]] || scontrol update "JobId=$TOKSCALE_JOB" "ExcNodeList=$nodes" || true
    sleep 60 # Slurm ends this script meanwhile
}

may_avoid() { # may_avoid <nodes>: whether the limit allows it, and the partition has enough others; else `may_not`
    local left present
    if (($(grep -c . "$TOKSCALE_OUTCOME.avoided" 2>/dev/null) >= ${TOKSCALE_MAX_BAD_NODES:-10})); then
        may_not="cluster.max_bad_nodes=${TOKSCALE_MAX_BAD_NODES:-10} are left out already"
        return 1
    fi
    present=$(sinfo --noheader --Node --partition="${SLURM_JOB_PARTITION:-}" --format='%N %t' 2>/dev/null) || return 0
    left=$(grep -vE ' (down|drain|drng|fail|unk|inval|maint)' <<<"$present" | cut -d' ' -f1 | sort -u |
        grep -cvxFf <(scontrol show hostnames "$1")) || true
    if ((left < SLURM_JOB_NUM_NODES)); then
        may_not="the partition ${SLURM_JOB_PARTITION:-} has only $left nodes beside them"
        return 1
    fi
}

was_preempted() { # by a job of more weight, in the time of grace that the partition gives
    local at
    at=$(job_field PreemptTime)
    [[ $at == *T* && ! $at < $(job_field StartTime) ]]
}

was_killed() { # 128 + a signal; 255 is what container runtimes and ssh end with
    (($1 > 128 && $1 <= 192))
}

out_of_memory() { # in the words of Slurm; what ranks say has their number in front
    grep -qiE '^( *[0-9]+: *(slurmstepd|srun):|[^ 0-9]).*(oom[_-]kill|out of memory)' "$TOKSCALE_OUTCOME.stderr" 2>/dev/null
}
