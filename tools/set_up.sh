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
case ${VERSIONS:-tested} in
    tested) set -- --constraint constraints.txt ;;
    newest) set -- --upgrade ;;
    oldest) set -- --resolution lowest-direct ;;
    *) echo "error: VERSIONS is ${VERSIONS}; it is one of tested, newest, oldest" >&2; exit 1 ;;
esac
# PyTorch's own index has the build that fits this machine: without CUDA libraries (5 GB) where there is no GPU.
if ! problem=$(install --torch-backend=auto --editable '.[dev]' "$@" 2>&1); then
    echo "== PyTorch's index cannot be used ($(echo "$problem" | tail -n 1)): the default one's build of torch is installed"
    install --editable '.[dev]' "$@"
fi
touch "$venv/.installed"
