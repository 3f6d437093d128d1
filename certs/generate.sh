#!/bin/sh
# Makes the certificates for mutual TLS with openssl (1.1.1 or newer); see usage below.
#
# The script makes a key and its certificate in the directory .new.pem, whose name git ignores, and
# moves both into place together. So an interruption leaves no half of a pair. After a SIGKILL the
# next run removes .new.pem.
set -euf
umask 077 # other users cannot read a key, not even for a moment
export LC_ALL=C

usage() {
    cat <<'EOF'
usage: generate.sh [--dir DIR] [--hosts HOST,...] [NAME...]

Makes a CA for servers, a CA for clients, and a certificate signed by each, `server` and `client`.
Leaves a valid certificate alone. Makes a new one for a certificate that is missing, expires within
a day, has lost its key, or is not signed by the present CA. Prints one line for each file made.

  NAME             make another client certificate, NAME.pem and NAME-key.pem
  --hosts HOST,... make a new server certificate, for these host names and IP addresses and for
                   localhost, 127.0.0.1 and ::1; later renewals keep the names
  --dir DIR        the directory of the files (default: that of this script)
  --help           show this

With NAME alone only the clients' files are checked and made, with --hosts alone only the
server's, unless there is no CA yet. The keys of the CAs are needed only to sign. You may keep them
elsewhere.
EOF
}

die() { echo "generate.sh: $*" >&2 && exit 1; }
misuse() { echo "generate.sh: $* (see --help)" >&2 && exit 2; }

# Runs openssl, and shows its output only if it failed.
run() {
    said=$(openssl "$@" 2>&1) || die "openssl $1 failed: $(printf %s "$said" | tr '\n' ' ')"
}

# Do the key and the certificate of $1 belong together?
key_matches() {
    # A key that this user may not read is not a wrong key, so it must not be replaced.
    [ ! -e "$1-key.pem" ] || [ -r "$1-key.pem" ] || die "$dir/$1-key.pem is not readable"
    [ "$(openssl x509 -noout -pubkey -in "$1.pem" 2>/dev/null)" = \
        "$(openssl pkey -pubout -in "$1-key.pem" 2>/dev/null)" ]
}

# Is $1 a valid CA? Its key may be kept elsewhere.
ca_is_valid() {
    openssl x509 -noout -checkend $day_s -in "$1.pem" >/dev/null 2>&1 &&
        { [ ! -e "$1-key.pem" ] || key_matches "$1"; }
}

# Is $1 a valid certificate of a $2 (server or client)?
leaf_is_valid() {
    openssl verify -purpose "ssl$2" -attime $(($(date +%s) + day_s)) -trusted "$2-ca.pem" \
        "$1.pem" >/dev/null 2>&1 && key_matches "$1"
}

# Makes the key and the certificate $1 of a $2: a ca, which signs itself, a server or a client.
make_pair() {
    [ "$2" = ca ] || [ -e "$2-ca-key.pem" ] || die "$dir/$1.pem has to be made, but" \
        "$dir/$2-ca-key.pem, which signs it, is missing: run this where the keys of the CAs are kept." \
        "If it is lost: docs/monitoring.md tells how to renew the $2 CA"
    rm -rf .new.pem
    mkdir .new.pem 2>/dev/null || die "cannot write to the directory $dir"
    key=.new.pem/$1-key.pem certificate=.new.pem/$1.pem names=''
    [ "$2" != server ] || names="subjectAltName = $server_names"
    # This config replaces the one of the system, which could add extensions.
    cat >.new.pem/config <<EOF
[req]
distinguished_name = subject
[subject]
[signing]
database = .new.pem/database
new_certs_dir = .new.pem
rand_serial = yes
policy = policy
[policy]
commonName = supplied
[ca]
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[leaf]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = $2Auth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
$names
EOF
    run req -new -config .new.pem/config -subj "/CN=$1" -newkey ec -nodes \
        -pkeyopt ec_paramgen_curve:P-256 -keyout "$key" -out .new.pem/request
    case $2 in
    ca) set -- -extensions ca -days 3650 -selfsign -keyfile "$key" ;;
    *) set -- -extensions leaf -days 365 -cert "$2-ca.pem" -keyfile "$2-ca-key.pem" ;;
    esac
    : >.new.pem/database
    # Valid since an hour ago, so that a machine whose clock is a little slow accepts it at once.
    run ca -batch -notext -config .new.pem/config -name signing -md sha256 \
        -startdate "$(date -u -d "@$(($(date +%s) - 3600))" +%Y%m%d%H%M%SZ)" \
        -in .new.pem/request -out "$certificate" "$@"
    chmod 644 "$certificate"
    (trap '' HUP INT TERM && exec mv -f "$key" "$certificate" .) # both or none: a Ctrl-C waits
    printf 'made %s\n' "$dir/${key#*/}" "$dir/${certificate#*/}"
}

day_s=86400 dir=$(dirname -- "$0") hosts='' clients='' kept='' new_client_ca=''
while [ $# -gt 0 ]; do
    case $1 in
    --help) usage && exit ;;
    --dir | --hosts)
        [ -n "${2-}" ] || misuse "$1 needs a value"
        if [ "$1" = --dir ]; then dir=$2; else hosts=$2; fi
        shift
        ;;
    '' | -* | .* | *[!A-Za-z0-9._-]*) misuse "not an option, nor a NAME of A-Z a-z 0-9 . _ -" ;;
    ca | server | *-ca | *-key) misuse "the name $1 is reserved" ;;
    *) [ ${#1} -le 64 ] || misuse "a NAME has at most 64 characters" && clients="$clients $1" ;;
    esac
    shift
done

server_names=DNS:localhost,IP:127.0.0.1,IP:::1
IFS=,
for host in $hosts; do
    case $host in
    localhost | 127.0.0.1 | ::1) ;;
    *[!A-Za-z0-9.:*_-]*) misuse "--hosts takes host names and IP addresses with commas between" ;;
    *:*) server_names=$server_names,IP:$host ;;
    *[!0-9.]*) server_names=$server_names,DNS:$host ;;
    *) server_names=$server_names,IP:$host ;;
    esac
done
unset IFS

for tool in openssl flock; do command -v $tool >/dev/null || die "$tool is not installed"; done
mkdir -p -- "$dir" 2>/dev/null || die "cannot make the directory $dir"
CDPATH='' cd -- "$dir" 2>/dev/null || die "cannot enter the directory $dir"
exec 9<. && flock 9 # until this script ends; only one run at a time uses .new.pem
trap 'rm -rf .new.pem' EXIT
trap 'exit 130' HUP INT TERM

everything=
[ -n "$hosts$clients" ] && { [ -e server-ca.pem ] || [ -e client-ca.pem ]; } || everything=1
if [ -n "$everything$hosts" ]; then
    ca_is_valid server-ca || make_pair server-ca ca
    [ -n "$hosts" ] || kept=$(openssl x509 -noout -ext subjectAltName -in server.pem 2>/dev/null |
        sed -n 's/IP Address:/IP:/g; /DNS:\|IP:/p')
    server_names=${kept:-$server_names}
    { [ -z "$hosts" ] && leaf_is_valid server server; } || make_pair server server
fi
if [ -n "$everything$clients" ]; then
    ca_is_valid client-ca || { make_pair client-ca ca; new_client_ca=1; }
    for name in client $clients; do leaf_is_valid "$name" client || make_pair "$name" client; done
fi
set +f
for file in ${new_client_ca:+*-key.pem}; do
    name=${file%-key.pem}
    case $name in server | *-ca) continue ;; esac
    leaf_is_valid "$name" client || echo "generate.sh: $dir/$name.pem is of the former client CA;" \
        "to make a new one, run: generate.sh $name" >&2
done
