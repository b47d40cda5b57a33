#!/usr/bin/env bash
# Install the packages for detection/ and segmentation/: mmcv with operations compiled here, mmdetection, mmsegmentation.
#
#   ./install_openmmlab.sh                                 # into the environment of the python on PATH
#   PYTHON=.venv/bin/python ./install_openmmlab.sh         # into another one
#
# If torch sees a GPU, the CUDA operations are compiled too, which requires nvcc of torch's CUDA version. The first run
# takes about 7 minutes on 2 CPU cores. The wheel is cached in ~/.cache/selfpatch (or $XDG_CACHE_HOME/selfpatch), one per
# version of torch and Python, which pip's own cache does not distinguish. MAX_JOBS limits the number of parallel
# compilers (up to 2 GB of memory each).
set -euo pipefail
die() { echo "install_openmmlab.sh: error: $*" >&2; exit 2; }

PYTHON="${PYTHON:-python}"
command -v "$PYTHON" > /dev/null || die "there is no $PYTHON: activate an environment, or set PYTHON"
PYTHON="$("$PYTHON" -c 'import sys; print(sys.executable)')"  # absolute, since the directory changes below
"$PYTHON" -m pip --version > /dev/null || die "$PYTHON has no pip: create the environment with python3 -m venv"
command -v "${CXX:-c++}" > /dev/null || die "there is no C++ compiler ${CXX:-c++}: install g++ (10 or later) or set CXX"

cd "$(dirname "$0")"
# torch first, and no build isolation: if setup.py cannot import torch, mmcv is built without its operations
"$PYTHON" -m pip install -r requirements.txt "setuptools>=80" wheel ninja packaging
read -r device key < <("$PYTHON" - <<'PY'
import sys, sysconfig, torch
device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cuda" and int(torch.version.cuda.split(".")[0]) < 12:
    sys.exit(f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, whose nvcc lacks C++20: install a newer one")
gpu = "-sm{}{}".format(*torch.cuda.get_device_capability()) if device == "cuda" else ""
print(device, f"torch{torch.__version__}-{sys.implementation.cache_tag}-{sysconfig.get_platform()}-{device}{gpu}")
PY
)
if [ "$device" = cuda ]; then
    PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
    command -v nvcc > /dev/null || die "torch sees a GPU but there is no nvcc: install the CUDA toolkit of torch's" \
        "version, or set CUDA_HOME to where it is"
fi

mmcv="$(grep -h '^onedl-mmcv==' detection/requirements.txt)"
wheels="${XDG_CACHE_HOME:-$HOME/.cache}/selfpatch/${mmcv/==/-}-$key"
if ! ls "$wheels"/*.whl > /dev/null 2>&1; then
    scratch="$(mktemp -d)"
    trap 'rm -rf "$scratch"' EXIT
    # mmcv requests C++17, which torch 2.15 rejects ("C++20 or later compatible compiler is required to use ATen");
    # compilers use the last -std option, so another one is appended to mmcv's
    printf '#!/bin/sh\nexec %s "$@" -std=c++20\n' "${CXX:-c++}" > "$scratch/c++20"
    chmod +x "$scratch/c++20"
    echo "compiling $mmcv for $key, which takes several minutes"
    CXX="$scratch/c++20" NVCC_APPEND_FLAGS="${NVCC_APPEND_FLAGS:-} -std=c++20" CFLAGS="${CFLAGS:-} -g0" \
        MMCV_WITH_OPS=1 FORCE_CUDA=$([ "$device" = cuda ] && echo 1 || echo 0) \
        MAX_JOBS="${MAX_JOBS:-$(getconf _NPROCESSORS_ONLN)}" \
        "$PYTHON" -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir "$scratch" "$mmcv"
    mkdir -p "$wheels"
    mv "$scratch"/*.whl "$wheels"
fi
"$PYTHON" -m pip install --force-reinstall --no-deps "$wheels"/*.whl
"$PYTHON" -m pip install -r detection/requirements.txt -r segmentation/requirements.txt

"$PYTHON" - <<'PY' || die "the installed packages do not work; if the error above is from mmcv.ops, remove its compiled" \
    "wheel in $wheels and try again"
import torch
from mmcv.ops import nms, roi_align
import mmdet, mmengine, mmcv, mmseg
devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
for device in devices:
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [1.0, 1.0, 8.0, 8.0]], device=device)
    assert len(nms(boxes, torch.tensor([0.9, 0.8], device=device), 0.5)[1]) == 1
    roi_align(torch.ones(1, 1, 8, 8, device=device), torch.tensor([[0.0, 0, 0, 8, 8]], device=device), 7)
print(f"mmcv {mmcv.__version__} with its operations on {' and '.join(devices)}, mmengine {mmengine.__version__}, "
      f"mmdet {mmdet.__version__}, mmseg {mmseg.__version__}, torch {torch.__version__}")
PY
