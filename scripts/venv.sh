# Sourced by the other scripts: makes a virtual environment and installs zarrtrace into it.

# make_venv FOLDER PYTHON CONSTRAINTS EXTRAS: re-runs pip only if what it depends on has changed.
make_venv() {
    local folder=$1 python=$2 constraints=$3 extras=$4
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "zarrtrace needs Python 3.11 or newer; $python is $("$python" --version 2>&1)." >&2
        echo "Set PYTHON to a newer one, as in: PYTHON=python3.12 $0" >&2
        return 1
    }
    local wanted
    wanted=$("$python" --version; echo "$extras"; cat pyproject.toml "$constraints")
    if [ -f "$folder/installed" ] && [ "$wanted" = "$(cat "$folder/installed")" ]; then
        return
    fi
    echo "== making $folder with $("$python" --version): installing zarrtrace[$extras]"
    "$python" -m venv "$folder"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$constraints" --editable ".[$extras]"
    printf '%s\n' "$wanted" > "$folder/installed"
}
