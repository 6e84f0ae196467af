#!/bin/sh
# Print the path of the first Python that m1 can be installed with: find_python.sh [PYTHON]
# With an argument only that one is tried. Candidates are run, because a name on PATH may be a shim that fails, and because
# a distribution may ship Python without the module that makes environments.
candidates="${1:-python3 python3.12 python3.13 ${PYENV_ROOT:-$HOME/.pyenv}/versions/3.12.*/bin/python ${PYENV_ROOT:-$HOME/.pyenv}/versions/3.13.*/bin/python}"
probe='import sys, ensurepip, venv
sys.exit(print(sys.executable) if (3, 12) <= sys.version_info[:2] <= (3, 13) else 1)'
IFS=' '
for candidate in $candidates; do
    "$candidate" -c "$probe" 2>/dev/null && exit 0
done
if [ -n "${1:-}" ]; then
    echo "error: $1 is not a Python 3.12 or 3.13 with ensurepip and venv" >&2
else
    echo "error: m1 needs Python 3.12 or 3.13, and none was found" >&2
fi
echo "  to do: install one (Ubuntu 24.04: sudo apt install python3.12 python3.12-venv; pyenv install 3.12; uv python install 3.12)," >&2
echo "         then run: make PYTHON=/path/to/python3.12 setup" >&2
exit 1
