#!/bin/sh
# Makes the certificates of the fake metaServer anew, valid for a hundred years. They protect nothing.
set -eu
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

authority() { # NAME SUBJECT
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 36500 -subj "/CN=$2" \
        -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign \
        -keyout "$work/$1.key" -out "$1.crt" 2>/dev/null
}

certificate() { # NAME AUTHORITY SUBJECT USE EXTENSIONS
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "$3" -keyout "$1.key" \
        -out "$work/$1.csr" 2>/dev/null
    printf 'basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=%s\n%s\n' \
        "$4" "$5" > "$work/$1.ext"
    openssl x509 -req -in "$work/$1.csr" -CA "$2.crt" -CAkey "$work/$2.key" -set_serial "0x$(openssl rand -hex 8)" \
        -days 36500 -extfile "$work/$1.ext" -out "$1.crt" 2>/dev/null
}

authority ca "EdgeMesh test CA"
authority other-ca "another EdgeMesh test CA"
# The names of metaServer's certificate since KubeEdge 1.17.
certificate server ca "/CN=system:node:edge1" serverAuth "subjectAltName=IP:127.0.0.1,IP:169.254.30.10"
certificate client ca "/CN=edgemesh-agent" clientAuth ""
certificate other-client other-ca "/CN=edgemesh-agent" clientAuth ""
