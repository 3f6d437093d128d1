#!/bin/sh
# The whole story on a real server over mutual TLS. Run it with `make demo`.
# Uses a free port and a directory of its own; leaves nothing behind.
set -eu
cd "$(dirname "$0")/.."
dir=$(mktemp -d)
chmod o+x "$dir" # for the jobs, whose homes are in it
server=
finish() {
    [ -z "$server" ] || kill "$server" 2>/dev/null || true
    wait
    rm -rf "$dir"
}
trap finish EXIT
trap 'exit 130' INT TERM

say() { printf '\n# %s\n' "$*"; }
# Shows a command as the reader would type it, and runs it.
run() { printf '$ ./client %s\n' "$*"; ./client "$@"; }

say "A server, on a free port of this machine"
echo '$ ./server --listen 127.0.0.1:0 --limits auto'
mkfifo "$dir/ready"
./server --listen 127.0.0.1:0 --limits auto --state-dir "$dir/state" \
    >"$dir/ready" 2>"$dir/server.log" &
server=$!
if ! read -r line <"$dir/ready"; then
    cat "$dir/server.log" >&2
    exit 1
fi
echo "$line"
JOBWORKER_SERVER=${line#listening on } XDG_STATE_HOME=$dir
export JOBWORKER_SERVER XDG_STATE_HOME

say "Log in as one of the two seeded users; the token is kept for the next commands"
run login -u user -p user

say "Start a job that takes three seconds, and watch its output live"
printf '$ ./client start -- sh -c "for i in 1 2 3; do date +%%T; sleep 1; done"\n'
job=$(./client start -- sh -c 'for i in 1 2 3; do date +%T; sleep 1; done')
echo "$job"
run stream -j "$job"

say "Somebody who comes late gets the same bytes from the start"
run stream -j "$job"

say "How it ended, and which limits this host could enforce on it"
run status -j "$job"

say "Start another one, which would run for ever, and stop it: every process of it"
printf '$ ./client start -- sh -c "sleep 1000 & exec sleep 1000"\n'
job=$(./client start -- sh -c 'sleep 1000 & exec sleep 1000')
echo "$job"
run stop -j "$job"
run list

say "The server, when it is told to stop"
kill "$server"
wait "$server"
server=
cat "$dir/server.log"
