# Sourced by the scripts beside it: makes the virtual environment and installs the package into it, once.
#
# Runs from the root of the repository. Sets `venv` to the directory of the environment: `.venv`, or what ZARRCACHE_VENV names.
# Installs again when pyproject.toml or constraints.txt changed, and when the tree was moved. The interpreter is the first of
# $PYTHON, python3, python3.13, python3.12, python3.11 that is Python 3.11 or newer.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${ZARRCACHE_VENV:-.venv}
extras=${ZARRCACHE_EXTRAS:-test,demo,convert,docs}

# Hundreds of processes start from here, and some environments forbid them all to keep what they compile: then half of their time goes there.
unset PYTHONDONTWRITEBYTECODE

say() { printf '%s\n' "$*" >&2; }

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    say "zarrcache needs Python 3.11 or newer; found: $(python3 --version 2>&1 || true)."
    say "Install one (conda create -n py311 python=3.11, or your system's python3.11 and python3.11-venv), or name it: PYTHON=/path/to/python3.11 $0"
    return 1
}

# What the environment was made from. Prints nothing, so never matches, if the environment's interpreter is gone.
fingerprint() {
    "$venv/bin/python" - "$extras" 2>/dev/null <<'EOF' || true
import hashlib, os, sys
parts = [sys.version, sys.argv[1], os.getcwd(), open("pyproject.toml").read(), open("constraints.txt").read()]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest())
EOF
}

if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    say "Making $venv with $("$python" --version)."
    if ! "$python" -m venv --clear "$venv"; then
        say "$python cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv."
        exit 1
    fi
fi

stamp=$venv/.installed
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$(fingerprint)" ]; then
    say "Installing zarrcache[$extras] into $venv. This takes some minutes the first time."
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extras]"
    fingerprint >"$stamp"
fi
