#!/usr/bin/env bash
# Triton: a version is published, the next one follows, and the first is served again. No server has to run for that.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/out"
optin ship first --out repository --name pictures --max-batch 16 --dry-run # everything is checked, nothing is written
optin ship first --out repository --name pictures --max-batch 16
optin ship second --out repository --name pictures --max-batch 16
optin ship --rollback --out repository --name pictures # nothing is deleted: the second version stays where it is
