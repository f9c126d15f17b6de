#!/usr/bin/env bash
# Two output folders to publish: first keeps 80% of the MACs, second half of them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
mkdir -p out && cd out
PYTHONPATH="../..${PYTHONPATH:+:$PYTHONPATH}" python ../../onnx_file/make_file.py # network.onnx and rows.npz: stand-ins
job=(network.onnx --calibration rows.npz --align 8 --threads 1)
optin-export "${job[@]}" --flops 0.8 --out first
optin-export "${job[@]}" --flops 0.5 --out second
