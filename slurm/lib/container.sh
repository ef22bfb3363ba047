# shellcheck shell=bash
# Sets the array `inside`: words in front of a command that put it into a container, and `container_flags` for srun.
#   TOKSCALE_CONTAINER          none | pyxis | apptainer | singularity | command
#   TOKSCALE_CONTAINER_IMAGE    of enroot (registry#name:tag or a .sqsh file), or a .sif file
#   TOKSCALE_CONTAINER_MOUNTS   from:to,from:to
#   TOKSCALE_CONTAINER_FLAGS    further flags of the runtime, quoted as for a shell
#   TOKSCALE_CONTAINER_COMMAND  of `command`: all words in front of the program, quoted as for a shell

container() {
    local flags=() name names
    inside=() container_flags=()
    case ${TOKSCALE_CONTAINER:-none} in
        none) return ;;
        pyxis | apptainer | singularity | command) ;;
        *)
            echo "TOKSCALE_CONTAINER=$TOKSCALE_CONTAINER: choose none, pyxis, apptainer, singularity or command" >&2
            exit 64
            ;;
    esac
    if [[ ${TOKSCALE_CONTAINER_IMAGE:-} == /* && ! -e $TOKSCALE_CONTAINER_IMAGE && -z ${TOKSCALE_ENVIRONMENT:-} ]]; then
        stay_away "cluster.container.image: $TOKSCALE_CONTAINER_IMAGE is not there" >&2
        exit 69
    fi
    mapfile -t flags < <(xargs -n 1 printf '%s\n' <<<"${TOKSCALE_CONTAINER_FLAGS:-}" | grep .)
    case $TOKSCALE_CONTAINER in
        pyxis)
            container_flags=(--container-image="$TOKSCALE_CONTAINER_IMAGE" --container-workdir="$PWD")
            [[ -z ${TOKSCALE_CONTAINER_MOUNTS:-} ]] || container_flags+=(--container-mounts="$TOKSCALE_CONTAINER_MOUNTS")
            container_flags+=("${flags[@]}")
            ;;
        apptainer | singularity)
            inside=("$TOKSCALE_CONTAINER" exec --nv --pwd "$PWD")
            [[ -z ${TOKSCALE_CONTAINER_MOUNTS:-} ]] || inside+=(--bind "$TOKSCALE_CONTAINER_MOUNTS")
            inside+=("${flags[@]}" "$TOKSCALE_CONTAINER_IMAGE")
            ;;
        command) mapfile -t inside < <(xargs -n 1 printf '%s\n' <<<"$TOKSCALE_CONTAINER_COMMAND" | grep .) ;;
    esac
    # Images set variables of their own, which would win over those of the job.
    names=$(compgen -e | grep -E '^(TOKSCALE|NCCL|GLOO|TORCH|TORCHINDUCTOR|TRITON|PYTORCH|TOKENIZERS|OMP|DS)_' || true)
    case $TOKSCALE_CONTAINER in
        apptainer | singularity)
            for name in $names ${settings_names:-}; do export "${TOKSCALE_CONTAINER^^}ENV_$name=${!name}"; done
            ;;
        *)
            inside+=(env)
            for name in $names ${settings_names:-}; do inside+=("$name=${!name}"); done
            ;;
    esac
    if [[ -n ${TOKSCALE_CODE:-} ]]; then # before what the image itself has there
        # shellcheck disable=SC2016
        inside+=(sh -c 'export PYTHONPATH="$1${PYTHONPATH:+:$PYTHONPATH}" && shift && exec "$@"' sh "$TOKSCALE_CODE")
    fi
}
