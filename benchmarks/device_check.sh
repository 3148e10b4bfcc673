#!/usr/bin/env bash
# On a machine with a GPU: tests, compute-sanitizer where present, benchmarks of kernels, epochs and
# the time to Adam's loss, CUDA graph replay, of the Triton kernels and, where they were built, the
# native ones. Needs torch, triton, pytest and no network; leaves results/device/*.json and reports.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH=.
"$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null || {
  echo "device_check: there is no GPU that torch can use" >&2
  exit 1
}
mkdir -p results/device
timeout 140 "$PYTHON" -m pytest -q -p no:cacheprovider tests/backends/device
if command -v compute-sanitizer >/dev/null; then
  timeout 70 compute-sanitizer --error-exitcode 1 "$PYTHON" -m benchmarks.device --sanitize
else
  echo "device_check: no compute-sanitizer, so memory accesses were not checked"
fi
timeout 90 "$PYTHON" -m benchmarks.device --out results/device
# These two check themselves against the reference before they take any time.
if "$PYTHON" -c 'import matplotlib, rich, sklearn' 2>/dev/null; then
  timeout 70 "$PYTHON" -m benchmarks epoch --device cuda --tasks mlp --shapes cifar10 \
    --batch-sizes 128 --optimizers adam gls --rounds 5 --out results/device/epoch
  timeout 100 "$PYTHON" -m benchmarks time-to-loss --device cuda --tasks mlp autoencoder \
    --seeds 0 --epochs 5 --train-images 10000 --out results/device/time-to-loss
else
  echo "device_check: without matplotlib, rich and scikit-learn there are no such benchmarks"
fi
echo results/device/report.md
