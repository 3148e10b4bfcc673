#!/usr/bin/env bash
# What device_check.sh leaves out: tiles around the table's, profiles by Nsight Compute, long tests.
# Options as there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m benchmarks.device --more --out results/device_more "$@"
