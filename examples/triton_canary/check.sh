#!/usr/bin/env bash
# With a server: Triton serves out/repository, and its answers are compared with the published files, then timed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
TRITON_BASE="${TRITON_BASE:-nvcr.io/nvidia/tritonserver:25.10-py3}" OPTIN_REPOSITORY="$PWD/out/repository" \
  docker compose -f ../../docker/triton/compose.yaml up --build --detach --wait triton
# pip install 'optin-deploy[serve]' brings the client. Exit code 1 if any output differs.
optin serve-check out/repository --url grpc://127.0.0.1:8001 --concurrency 1,4 --out out/served.json
