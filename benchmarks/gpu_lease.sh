#!/usr/bin/env bash
# A slot of ten minutes on a machine with an NVIDIA GPU, in one command: benchmarks.gpu_sparse3d, then a training on CUDA
# as a smoke test.
#
#     OUT=results bash benchmarks/gpu_lease.sh
#
# PYTHON is the interpreter whose torch sees the GPU (python3). What it lacks is installed beside it, from the folder
# WHEELS if that is set, else from pip's index; where that fails the slot goes on without. SLOT_S (590) and TRAIN_S (300)
# are seconds. OUT (runs/gpu-lease) gets the logs, steps.txt with each step's exit code and seconds (124: cut off), and
# the page of measurements. The exit code is 1 if any step's is not 0.
set -uo pipefail
cd "$(dirname "$0")/.."

SECONDS=0
out=${OUT:-runs/gpu-lease}
slot_s=${SLOT_S:-590}
train_s=${TRAIN_S:-300}
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0
mkdir -p "$out"
: >"$out/steps.txt"

step() { # name, most seconds, command...
  local name=$1 most=$2 began=$SECONDS code=0
  shift 2
  timeout "$most" "$@" >"$out/$name.log" 2>&1 || code=$?
  echo "$name exit=$code seconds=$((SECONDS - began))" | tee -a "$out/steps.txt"
  [ "$code" = 0 ] || failed=1
}

install() {
  local wanted=() purelib="import sysconfig; print(sysconfig.get_paths()['purelib'])"
  "$python" -m venv --system-site-packages "$work/venv" || return 1
  # where PYTHON is of a virtual environment itself, its packages are seen too
  echo "import site; site.addsitedir('$("$python" -c "$purelib")')" \
    >"$("$work/venv/bin/python" -c "$purelib")/outer.pth"
  for pair in numpy:numpy onnx:onnx onnxruntime:onnxruntime safetensors:safetensors yaml:pyyaml typer:typer rich:rich \
    jinja2:jinja2 matplotlib:matplotlib jaxtyping:jaxtyping torch:torch triton:triton cmake:cmake spconv:spconv-cu126; do
    "$work/venv/bin/python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('${pair%%:*}') is None)" ||
      wanted+=("${pair##*:}")
  done
  echo "missing: ${wanted[*]:-nothing}"
  local from=() missed=0
  [ -z "${WHEELS:-}" ] || from=(--no-index --find-links "$WHEELS")
  for name in "${wanted[@]}"; do
    "$work/venv/bin/python" -m pip install --quiet --retries 0 "${from[@]}" "$name" || missed=1
  done
  return "$missed"
}

export -f install
export python work WHEELS="${WHEELS:-}" PYTHONPATH="$PWD"
step install 90 bash -c install
export PATH="$work/venv/bin:$PATH"
step gpu_sparse3d $((slot_s - train_s - SECONDS)) python -m benchmarks.gpu_sparse3d --out "$out" \
  --parts kernels stages runtime latency bars sanitizer
step cuda 60 python -c "import torch; print(torch.cuda.get_device_name())"
step train "$train_s" python -m dm3d_deploy train --model centerpoint-slim --out "$work/training" \
  --minutes "$(awk "BEGIN { print ($train_s - 60) / 60 }")"
cp "$work/training/log.jsonl" "$out/train.jsonl" 2>/dev/null || true
exit "$failed"
