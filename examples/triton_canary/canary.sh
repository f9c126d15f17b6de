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
publish second # without --canary all requests go to it; other settings make it a version of its own, the third
# Name the version to go back to: the one before the third is the second, which is the same file with its tenth.
optin ship --rollback --version 1 --out cluster --name pictures
