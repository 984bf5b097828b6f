# Sourced by scripts/test and scripts/test_swift: makes .venv-servers, with the servers of object
# storage that tests start on loopback. No part of zarrtrace is installed there.

make_servers() {
    local folder=.venv-servers wanted
    wanted=$("$1" --version; cat scripts/constraints-servers.txt)
    if [ -f "$folder/installed" ] && [ "$wanted" = "$(cat "$folder/installed")" ]; then
        return
    fi
    echo "== making $folder: moto, OpenStack Swift"
    "$1" -m venv "$folder"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint scripts/constraints-servers.txt 'moto[s3]' flask flask-cors swift trustme
    printf '%s\n' "$wanted" > "$folder/installed"
}
