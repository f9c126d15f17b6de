#!/usr/bin/env bash
# Once for each release: baseline.json names the released file by its hash, and where its time is compared. Commit both.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python make_models.py # stand-ins for two files of yours
optin gate release/model.onnx --pin baseline.json --threads 1 --at batch=1 --at batch=4
