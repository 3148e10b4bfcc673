#!/usr/bin/env bash
# All checks and measurements on a GPU in one call of at most nine minutes, the most important first:
#   bash benchmarks/device_check.sh [--dry-run] [--out DIR] [--parts DIR] [--data DIR]
# It needs torch with CUDA and pytest, and no network; docs/device.md says what it leaves, and where.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m benchmarks.device "$@"
