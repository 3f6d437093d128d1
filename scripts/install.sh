#!/bin/sh
# Installs the server on this host, upgrades it, or removes it; the Makefile calls it, and
# docs/deploy.md describes it.
#
#     install.sh install|uninstall
#
# Variables: PREFIX, where the program goes; DESTDIR, a directory that stands for / (then systemd is
# left alone); HOSTS, for which to make certificates if there are none; EXTRAS=1 for
# the packages of health and reflection; PYTHON.
set -eu
umask 022 # everybody may read the program; root alone may change it
cd "$(dirname -- "$0")/.."

die() { echo "install: $*" >&2 && exit 1; }

PREFIX=${PREFIX%/}
case $PREFIX in /?*) ;; *) die "PREFIX must be an absolute path, like /opt/job-worker" ;; esac
program=${DESTDIR-}$PREFIX etc=${DESTDIR-}/etc/job-worker
units=${DESTDIR-}/etc/systemd/system
logrotate=${DESTDIR-}/etc/logrotate.d/job-worker
[ -n "${DESTDIR-}" ] || [ "$(id -u)" = 0 ] || die "run it as root: sudo make $1"
# Does systemd run this host, and is this not the image of another one?
has_systemd() { [ -z "${DESTDIR-}" ] && [ -d /run/systemd/system ]; }

get() {
    "$new/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --require-hashes --only-binary :all: -r "$1"
}
has_extras() { "$1/.venv/bin/python" -c 'import grpc_health' 2>/dev/null; }

# Puts the new program beside the old one.
make_new() {
    rm -rf "$new"
    mkdir -p "$new/certs" "$new/deploy" "$new/docs" "$new/requirements"
    for module in *.py; do
        case $module in test*.py | conftest.py | *_plugin.py) ;; *) install -m 644 "$module" "$new" ;; esac
    done
    install -m 644 README.md CHANGELOG.md *.proto "$new"
    install -m 644 docs/*.md "$new/docs"
    install -m 644 requirements/runtime.txt requirements/extras.txt "$new/requirements"
    install -m 644 deploy/* "$new/deploy"
    chmod 755 "$new/deploy/backup.sh"
    install -m 755 server client "$new"
    install -m 755 certs/generate.sh "$new/certs"
    # Where the packages are the same as before, an upgrade needs no network.
    if cmp -s requirements/runtime.txt "$program/requirements/runtime.txt" &&
        "$program/.venv/bin/python" -c 'import grpc' 2>/dev/null; then
        cp -a "$program/.venv" "$new/.venv"
    else
        "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            die "job-worker needs Python 3.11 or newer; try: make install PYTHON=python3.12"
        "${PYTHON:-python3}" -m venv "$new/.venv"
        get requirements/runtime.txt
        ! has_extras "$program" || get requirements/extras.txt
    fi
    [ -z "${EXTRAS-}" ] || has_extras "$new" || get requirements/extras.txt
}

# Makes what only the first installation makes. The operator's own files stay as they are.
make_etc() {
    mkdir -p "$etc" && chmod 755 "$etc"
    mkdir -p "$etc/certs" && chmod 700 "$etc/certs"
    [ -e "$etc/server.toml" ] || install -m 600 deploy/server.toml "$etc/server.toml"
    if [ -n "${HOSTS-}" ] && ! [ -e "$etc/certs/server.pem" ]; then
        certs/generate.sh --dir "$etc/ca" --hosts "$HOSTS"
        chmod 700 "$etc/ca"
        install -m 600 "$etc/ca/server-key.pem" "$etc/certs"
        install -m 644 "$etc/ca/server.pem" "$etc/ca/client-ca.pem" "$etc/certs"
        rm -f "$etc/ca/server-key.pem" "$etc/ca/client.pem" "$etc/ca/client-key.pem"
    fi
}

# An installation removes these directories: only what is of this project, or empty.
may_remove() {
    if [ -e "$1/server.py" ] || { [ ! -e "$1" ] && [ ! -L "$1" ]; }; then return; fi
    if [ -d "$1" ]; then
        found=$(ls -A -- "$1") # an error ends the script
        [ -n "$found" ] || return 0
    fi
    die "$1 exists and has no server.py, so it is not of job-worker, and installing would remove it;" \
        "choose a directory of its own, like PREFIX=/opt/job-worker, or move $1 away"
}

install_all() {
    new=$program.new
    may_remove "$program"
    may_remove "$new"
    may_remove "$program.old"
    trap 'rm -rf "$new"' EXIT
    make_new
    make_etc
    if [ -e "$etc/users" ] && [ -z "${DESTDIR-}" ]; then
        # Before the old program goes: does the new one understand the files?
        "$new/server" --config "$etc/server.toml" check --config ||
            die "the new program cannot run with $etc; $PREFIX is as it was"
    fi
    rm -rf "$program.old"
    [ ! -e "$program" ] || mv "$program" "$program.old"
    mv "$new" "$program"
    rm -rf "$program.old"
    "$program/.venv/bin/python" -m compileall -q "$program"/*.py
    mkdir -p "$units" "${logrotate%/*}"
    for unit in job-worker-jobs job-worker; do
        sed "s|/opt/job-worker|$PREFIX|g" "deploy/$unit.service" >"$units/$unit.service.new"
        mv "$units/$unit.service.new" "$units/$unit.service"
    done
    [ -e "$logrotate" ] || install -m 644 deploy/job-worker.logrotate "$logrotate"
    if has_systemd; then
        systemctl daemon-reload
        systemctl try-restart job-worker
    fi
    echo "installed in $PREFIX; the settings are in /etc/job-worker"
    [ -e "$etc/certs/server.pem" ] || echo "certificates are missing: see $PREFIX/docs/deploy.md"
    [ -e "$etc/users" ] || echo "users are missing: see $PREFIX/docs/deploy.md"
}

uninstall_all() {
    # The jobs end with their unit, and the server before them.
    ! has_systemd || systemctl disable --now job-worker job-worker-jobs 2>/dev/null || true
    rm -f "$units/job-worker.service" "$units/job-worker-jobs.service" "$logrotate"
    ! has_systemd || systemctl daemon-reload
    [ ! -e "$program/server.py" ] || rm -rf "$program"
    echo "removed $PREFIX. Kept: /etc/job-worker and /var/lib/job-worker, which you may remove"
}

case ${1-} in
install) install_all ;;
uninstall) uninstall_all ;;
*) die "usage: install.sh install|uninstall" ;;
esac
