#!/usr/bin/env bash
# The command line alone, on an ONNX file: without data inspect, plan, rewrite and gate; with data the whole job at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
mkdir -p out && cd out
PYTHONPATH="../..${PYTHONPATH:+:$PYTHONPATH}" python ../make_file.py # network.onnx and rows.npz

# Without data: the norms of weights say what stays.
optin inspect network.onnx --picture network.png
optin plan network.onnx --magnitude --flops 0.5 --out plan.json
optin rewrite network.onnx --plan plan.json --out smaller.onnx
# The gate measures both beside each other: 0 within the limit or undecided, 1 too slow, 4 too unstable to judge.
optin gate network.onnx smaller.onnx --min-speedup 1.05 --threads 1 --out gate.json || echo "the gate exits with $?"

# With data: scores along the network, repaired weights, the proof, the time, and a report with what was lost.
# Channels go in multiples of 16 unless --align says something else: a lot for a network as small as this one.
optin-export network.onnx --calibration rows.npz --flops 0.5 --align 8 --at batch=1 --at batch=8 --threads 1 --out pruned
