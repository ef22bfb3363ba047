#!/usr/bin/env bash
# node.sh enter <cache of this version> <job> <living jobs> [<environment or image> <folder>]   makes one node ready
# node.sh leave <cache of this version> <job> <living jobs>                                     when the job is over for good
# However many jobs ask at once. Each leaves a mark in the cache that it uses; the last that goes removes it. Marks of jobs
# that ended without a word (killed, cancelled) are taken away by whoever comes next; <living jobs> are those of this user
# in the queue, `7,9`, empty when the scheduler did not say: then what nobody has used for a week is removed.
# A packed environment is copied to the node's own disk, and stays for a week. What is there in full has a mark beside it;
# what an interrupted job left has none and is made again.
set -euo pipefail
shopt -s nullglob
what=$1 cache=$2 job=$3 living=$4 source=${5:-} folder=${6:-}
base=${cache%/*}

take_turns() { # those that come and go at once on this node; without such locks a cache may be compiled twice
    exec 8>"$base/.lock"
    flock 8 2>/dev/null || true
}

unused() { # unused <cache>: whether no living job has a mark in it
    local mark marks=("$1"/users/*)
    for mark in "${marks[@]}"; do
        if [[ -z $living || ,$living, == *,${mark##*/},* ]]; then return 1; fi
    done
    [[ -n $living || ${#marks[@]} == 0 ]]
}

set_aside() { # set_aside <cache>: nobody finds it any more, and what it holds is removed when others have had their turn
    mv -T "$1" "$base/.gone.${1##*/}.$job.$$" 2>/dev/null || true
}

sweep() {
    exec 8>&-
    rm -rf "$base"/.gone.*
}

if [[ $what == leave ]]; then
    [[ -d $cache && -O $base ]] || exit 0
    take_turns
    rm -f "$cache/users/$job"
    if unused "$cache"; then set_aside "$cache"; fi
    sweep
    exit 0
fi

(umask 077 && mkdir -p "$base")
if [[ ! -O $base ]]; then # compiled kernels are programs
    echo "$base on this node belongs to somebody else; set TOKSCALE_CACHE to a folder of your own" >&2
    exit 173
fi
take_turns
mkdir -p "$cache/users"
touch "$cache" "$cache/users/$job"
for other in "$base"/*/users; do
    other=${other%/users}
    if [[ $other != "$cache" && -n $living ]] && unused "$other"; then set_aside "$other"; fi
done
find "$base" -mindepth 1 -maxdepth 1 -type d -not -name environments -mtime +7 -exec rm -rf {} +
sweep
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
