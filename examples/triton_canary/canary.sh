#!/usr/bin/env bash
# KServe: the first version gets all requests, the second at first a tenth of them, then all; and the way back.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/out"
publish() {
  optin ship "$@" --server kserve --out cluster --name pictures --dense none --storage-uri pvc://models/cluster
  # Copy cluster/ to where --storage-uri says, then: kubectl apply -f cluster/pictures.yaml
  # A server reads the repository when it starts: one of the old version that starts anew meanwhile serves the new one.
}
publish first
publish second --canary 10
cp cluster/pictures.yaml pictures-canary.yaml
publish second # without --canary all requests go to it: it stays the second version, and its file is not published again
cp cluster/pictures.yaml pictures-all.yaml
optin ship --rollback --out cluster --name pictures # all requests go to the first again
