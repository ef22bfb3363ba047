# shellcheck shell=bash
# Makes every node of the job ready, once for all of its ranks (node.sh).
#   TOKSCALE_ENVIRONMENT   a packed environment or an image, to be copied to each node's own disk. Python imports some
#                          40,000 small files a rank: from a shared disk that takes longer than one large file a node.

ready_nodes() {
    local source=${TOKSCALE_ENVIRONMENT:-} words=("$TOKSCALE_NODE_CACHE") folder='' code=0
    if [[ -n $source ]]; then
        if [[ ! -r $source ]]; then
            stay_away "cluster.environment: $source cannot be read on $SLURMD_NODENAME" >&2
            exit 69
        fi
        folder=${TOKSCALE_NODE_CACHE%/*}/environments/$(stat --printf '%n %s %Y' "$source" | cksum | cut -d' ' -f1)
        words+=("$source" "$folder")
    fi
    srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --export=ALL \
        bash "${BASH_SOURCE[0]%/*}/node.sh" "${words[@]}" || code=$?
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
