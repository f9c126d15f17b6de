#!/usr/bin/env bash
# An engine of one's own at work, after `pip install .` in this folder: it is listed, and it builds, proves and measures.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
mkdir -p out && cd out
python ../make_network.py
optin doctor || true # it exits with 1 where another engine does not run
optin-export network.onnx --calibration rows.npz --flops 0.5 --engine reference --at batch=1 --out pruned
# The same files on ONNX Runtime, measured beside each other again.
optin bench pruned --engine onnx --at batch=1
