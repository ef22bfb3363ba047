# Sourced by the programs beside it: sets $python to an interpreter that has tokscale with an extra installed.
# An active virtual environment is used as it is; otherwise .venv is made. Installs only when something is missing.

need_python() { # need_python <extra> <module that only this extra brings>
    local extra=$1 module=$2
    if [[ -n ${VIRTUAL_ENV:-} && -x $VIRTUAL_ENV/bin/python ]]; then
        python=$VIRTUAL_ENV/bin/python
    else
        python=$PWD/.venv/bin/python
        [[ -x $python ]] || make_venv
    fi
    local stamp wanted
    stamp=$(dirname "$(dirname "$python")")/.tokscale-$extra
    wanted=$(cksum <pyproject.toml)
    if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]] || ! "$python" -c "import tokscale, $module" 2>/dev/null; then
        echo "== installing tokscale[$extra] into $(dirname "$(dirname "$python")")"
        "$python" -m pip install --quiet --disable-pip-version-check --editable ".[$extra]"
        echo "$wanted" >"$stamp"
    fi
}

make_venv() {
    local candidate
    for candidate in ${PYTHON:-} python3.13 python3.12 python3.11 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "== making .venv with $("$candidate" --version)"
            "$candidate" -m venv .venv && return
            echo "cannot make a virtual environment; on Debian: apt-get install python3-venv" >&2
            exit 69
        fi
    done
    echo "no Python 3.11 or newer found; install one, or set PYTHON=/path/to/python" >&2
    exit 69
}
