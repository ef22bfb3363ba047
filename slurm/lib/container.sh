# shellcheck shell=bash
# Sets the array `inside`: words in front of a command that put it into a container, and `container_flags` for srun.
#   TOKSCALE_CONTAINER         none | pyxis | apptainer
#   TOKSCALE_CONTAINER_IMAGE   of enroot (registry#name:tag or a .sqsh file), or a .sif file
#   TOKSCALE_CONTAINER_MOUNTS  from:to,from:to

container() {
    inside=() container_flags=()
    case ${TOKSCALE_CONTAINER:-none} in
        none) return ;;
        pyxis | apptainer) ;;
        *)
            echo "TOKSCALE_CONTAINER=$TOKSCALE_CONTAINER: choose none, pyxis or apptainer" >&2
            exit 64
            ;;
    esac
    if [[ $TOKSCALE_CONTAINER_IMAGE == /* && ! -e $TOKSCALE_CONTAINER_IMAGE && -z ${TOKSCALE_ENVIRONMENT:-} ]]; then
        echo "cluster.container.image: $TOKSCALE_CONTAINER_IMAGE is not there" >&2
        exit 69
    fi
    case $TOKSCALE_CONTAINER in
        pyxis)
            container_flags=(--container-image="$TOKSCALE_CONTAINER_IMAGE" --container-workdir="$PWD")
            [[ -z ${TOKSCALE_CONTAINER_MOUNTS:-} ]] || container_flags+=(--container-mounts="$TOKSCALE_CONTAINER_MOUNTS")
            ;;
        apptainer)
            inside=(apptainer exec --nv --pwd "$PWD")
            [[ -z ${TOKSCALE_CONTAINER_MOUNTS:-} ]] || inside+=(--bind "$TOKSCALE_CONTAINER_MOUNTS")
            inside+=("$TOKSCALE_CONTAINER_IMAGE")
            ;;
    esac
}
