# shellcheck shell=bash
# Makes every node of the job ready, once for all of its ranks, and tidies it when the job is over (node.sh).
#   TOKSCALE_ENVIRONMENT   a packed environment or an image, to be copied to each node's own disk. Python imports some
#                          40,000 small files a rank: from a shared disk that takes longer than one large file a node.

ready_nodes() {
    local source=${TOKSCALE_ENVIRONMENT:-} words=() folder='' code=0
    if [[ -n $source ]]; then
        if [[ ! -r $source ]]; then
            stay_away "cluster.environment: $source cannot be read on $SLURMD_NODENAME" >&2
            exit 69
        fi
        folder=${TOKSCALE_NODE_CACHE%/*}/environments/$(stat --printf '%n %s %Y' "$source" | cksum | cut -d' ' -f1)
        words=("$source" "$folder")
    fi
    on_nodes enter "$(own_jobs | sort -u | paste -sd,)" "${words[@]}" || code=$?
    if ((code)); then
        ((code == 173)) || [[ -n $source ]] || return 0 # only the sweep failed
        stay_away "a node could not be made ready${source:+ with cluster.environment=$source}; it says why above" >&2
        exit 69
    fi
    case $source in
        '') ;;
        *.sif | *.sqsh) export TOKSCALE_CONTAINER_IMAGE=$folder/${source##*/} ;;
        *) export TOKSCALE_PYTHON=$folder/bin/python ;;
    esac
}

leave_nodes() { # the job does not come again
    local living
    living=$(own_jobs)
    [[ -n $living ]] || return 0 # where nobody says who lives, the next job tidies
    # Other tasks of an array go on, perhaps here: the last of them tidies.
    (($(grep -cx "$(array_or_job)" <<<"$living") <= 1)) || return 0
    on_nodes leave "$(sort -u <<<"$living" | paste -sd,)" || true
}

on_nodes() { # on_nodes <enter | leave> <living jobs> [...]: on every node of the job at once
    local limit=() what=$1 living=$2
    shift 2
    [[ $what == enter ]] || limit=(timeout 60) # the job is over: a node that does not answer must not keep it
    "${limit[@]}" srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --export=ALL \
        bash "${BASH_SOURCE[0]%/*}/node.sh" "$what" "$TOKSCALE_NODE_CACHE" "$(array_or_job)" "$living" "$@"
}

array_or_job() {
    echo "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}"
}

own_jobs() { # jobs of this user in the queue, a line for each task of an array; nothing when the scheduler does not say
    ask squeue --user="$UID" --noheader --array --format=%F || true
}
