# shellcheck shell=bash
# Sets the array `inside`: words in front of a command that put it into a container, and `container_flags` for srun.
#   TOKSCALE_CONTAINER         none | pyxis | apptainer
#   TOKSCALE_CONTAINER_IMAGE   of enroot (registry#name:tag or a .sqsh file), or a .sif file
#   TOKSCALE_CONTAINER_MOUNTS  from:to,from:to

inside=() container_flags=()
case ${TOKSCALE_CONTAINER:-none} in
    none) ;;
    pyxis)
        container_flags=(--container-image="$TOKSCALE_CONTAINER_IMAGE" --container-workdir="$PWD")
        [[ -z ${TOKSCALE_CONTAINER_MOUNTS:-} ]] || container_flags+=(--container-mounts="$TOKSCALE_CONTAINER_MOUNTS")
        ;;
    apptainer)
        inside=(apptainer exec --nv --pwd "$PWD")
        [[ -z ${TOKSCALE_CONTAINER_MOUNTS:-} ]] || inside+=(--bind "$TOKSCALE_CONTAINER_MOUNTS")
        inside+=("$TOKSCALE_CONTAINER_IMAGE")
        ;;
    *)
        echo "TOKSCALE_CONTAINER=$TOKSCALE_CONTAINER: choose none, pyxis or apptainer" >&2
        exit 64
        ;;
esac
