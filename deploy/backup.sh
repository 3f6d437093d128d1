#!/bin/sh
# Saves an installation, or restores it; docs/deploy.md describes it. As root:
#
#     backup.sh save FILE       writes FILE, a tar.gz; the service goes on meanwhile
#     backup.sh restore FILE    ends the jobs and the server, puts back what FILE has, starts the server
#
# FILE has the settings, certificates and users of /etc/job-worker, a copy of the store, which has jobs,
# uids and revoked tokens, and the users' homes. It holds secrets: only its owner can read it.
set -eu
umask 077
etc=${ETC-/etc/job-worker}
server=$(dirname "$(readlink -f "$0")")/../server

die() { echo "backup.sh: $*" >&2 && exit 1; }
state_dir() { "$server" --config "$etc/server.toml" config | sed -n 's/^state_dir = "\([^"]*\)".*/\1/p'; }

save() {
    work=$(mktemp -d "$1.XXXXXX") # on the disk of FILE
    "$server" --config "$etc/server.toml" backup "$work/job-worker.db" >/dev/null
    state=$(state_dir)
    set -- "$1" "${etc#/}"
    [ ! -d "$state/homes" ] || set -- "$@" "${state#/}/homes"
    file=$1
    shift
    # Status 1: a job has changed a file of its home meanwhile.
    tar -czf "$work/new" -C "$work" job-worker.db -C / "$@" || [ $? = 1 ] || die "$file was not written"
    mv "$work/new" "$file"
}

restore() {
    work=$(mktemp -d)
    tar -C "$work" -xzf "$1" job-worker.db || die "$1 is not a file of \`backup.sh save\`; nothing was changed"
    systemctl stop job-worker-jobs # and with it the server
    # Numbers: the store says which uid is whose, also on a host whose accounts have other uids.
    tar -C / --anchored --exclude=job-worker.db --numeric-owner -xzpf "$1"
    state=$(state_dir)
    # Without the key no token is valid. With it, tokens that were revoked since the backup would be.
    rm -rf "$state/store" "$state/token.key"
    install -d -m 711 "$state"
    install -d -m 700 "$state/store"
    install -m 600 "$work/job-worker.db" "$state/store/store.db"
    systemctl start job-worker
}

work=
trap '[ -z "$work" ] || rm -rf "$work"' EXIT
case ${1-}:${2-} in
save:?* | restore:?*) "$1" "$2" ;;
*) die "usage: backup.sh save|restore FILE" ;;
esac
