#!/usr/bin/env bash
# node.sh <cache of this version> [<environment or image> <folder>]: makes one node ready, however many jobs ask at once.
# Caches that no job has used for a week are removed; a packed environment is copied to the node's own disk. What is
# there in full has a mark beside it; what an interrupted job left has none and is made again.
set -euo pipefail
cache=$1 source=${2:-} folder=${3:-}
mkdir -p "$cache"
touch "$cache"
find "${cache%/*}" -mindepth 1 -maxdepth 1 -not -name environments -mtime +7 -exec rm -rf {} +
[[ -n $source ]] || exit 0

mkdir -p "${folder%/*}"
exec 9>"$folder.lock"
flock 9
if [[ -e $folder.complete ]]; then
    touch "$folder.complete"
    exit 0
fi
rm -rf "$folder"
mkdir "$folder"
case $source in
    *.sif | *.sqsh) cp "$source" "$folder/" ;;
    *)
        tar --extract --auto-compress --file "$source" --directory "$folder"
        if [[ ! -x $folder/bin/python ]]; then
            echo "$source has no bin/python at its top; pack an environment by: tar -C FOLDER -cf env.tar ." >&2
            exit 65
        fi
        ;;
esac
touch "$folder.complete"
