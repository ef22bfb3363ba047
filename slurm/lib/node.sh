#!/usr/bin/env bash
# node.sh <cache of this version> [<environment or image> <folder>]: makes one node ready, however many jobs ask at once.
# Caches that no job has used for a week are removed; a packed environment is copied to the node's own disk. What is
# there in full has a mark beside it; what an interrupted job left has none and is made again.
set -euo pipefail
cache=$1 source=${2:-} folder=${3:-}
base=${cache%/*}
(umask 077 && mkdir -p "$base")
if [[ ! -O $base ]]; then # compiled kernels are programs
    echo "$base on this node belongs to somebody else; set TOKSCALE_CACHE to a folder of your own" >&2
    exit 173
fi
mkdir -p "$cache"
touch "$cache"
find "$base" -mindepth 1 -maxdepth 1 -not -name environments -mtime +7 -exec rm -rf {} +
[[ -n $source ]] || exit 0

mkdir -p "${folder%/*}"
while read -r -d '' old; do
    rm -rf "${old%.complete}" "${old%.complete}.lock" "$old"
done < <(find "${folder%/*}" -mindepth 1 -maxdepth 1 -name '*.complete' -mtime +7 -not -path "$folder.complete" -print0)
exec 9>"$folder.lock"
flock 9 2>/dev/null || true # without such locks two may copy at once; the one that is ready first has the name
if [[ -e $folder.complete ]]; then
    touch "$folder.complete"
    exit 0
fi
made=$folder.$$.partial
rm -rf "$folder" "$made"
mkdir "$made"
case $source in
    *.sif | *.sqsh) cp "$source" "$made/" ;;
    *)
        tar --extract --auto-compress --file "$source" --directory "$made"
        if [[ ! -x $made/bin/python ]]; then
            echo "$source has no bin/python at its top; pack an environment by: tar -C FOLDER -cf env.tar ." >&2
            exit 65
        fi
        ;;
esac
mv -T "$made" "$folder" 2>/dev/null || rm -rf "$made"
touch "$folder.complete"
