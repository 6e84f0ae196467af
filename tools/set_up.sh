#!/bin/sh
# Install m1 for development: tools/set_up.sh VENV [PYTHON]
# VERSIONS=tested (constraints.txt), newest or oldest says which versions of what pyproject.toml allows.
set -eu
cd "$(dirname "$0")/.."
venv=$1
python=$(sh stages/m1_stages/doctor/find_python.sh "${2:-}")
if [ -e "$venv" ] && ! sh stages/m1_stages/doctor/find_python.sh "$venv/bin/python" >/dev/null 2>&1; then
    if [ ! -f "$venv/pyvenv.cfg" ] || [ ! -f "$venv/.installed" ]; then
        echo "error: $venv is no environment that this set-up finished, and its Python is not 3.12 or 3.13" >&2
        echo "  to do: look at what it is and move it away, then run the same command again" >&2
        exit 1
    fi
    echo "== $venv was made with another Python: it is made anew"
    rm -rf "$venv"
fi
echo "== setting up $venv with $python"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
# Compiled once, as pip does: where PYTHONDONTWRITEBYTECODE is set, every process would compile torch for itself (7 s).
install() { "$venv/bin/uv" pip install --quiet --compile-bytecode --python "$venv/bin/python" "$@"; }
pins=constraints.txt
backend=auto
if [ "$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p')" = 12 ]; then
    echo "== the NVIDIA driver supports CUDA 12 only: the newest torch that was built for it, not the tested one"
    backend=cu126 # torch 2.14 is the last one; builds for a newer CUDA 12 end earlier, and this one runs on every such driver
    pins=$venv/constraints-without-torch.txt
    grep -v -e '^torch==' -e '^triton==' constraints.txt >"$pins"
fi
case ${VERSIONS:-tested} in
    tested) set -- --constraint "$pins" ;;
    newest) set -- --upgrade ;;
    oldest) set -- --resolution lowest-direct ;;
    *) echo "error: VERSIONS is ${VERSIONS}; it is one of tested, newest, oldest" >&2; exit 1 ;;
esac
# PyTorch's own index has the build that fits this machine: without CUDA libraries (5 GB) where there is no GPU.
if ! problem=$(install --torch-backend="$backend" --editable '.[dev]' "$@" 2>&1); then
    echo "$problem" >&2
    if [ "$backend" != auto ]; then
        echo "error: torch for CUDA 12 could not be installed from PyTorch's index" >&2
        echo "  to do: make https://download.pytorch.org/whl/cu126 reachable, or install a driver for CUDA 13" >&2
        exit 1
    fi
    echo "== the above came from installing with PyTorch's index: now with the default index's build of torch"
    install --editable '.[dev]' "$@"
fi
touch "$venv/.installed"
