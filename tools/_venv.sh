# Sourced by the scripts beside it: makes the virtual environment and installs the package into it, once.
#
# Runs from the root of the repository. Sets `venv` to the directory of the environment: `.venv`, or what ZARRCACHE_VENV names.
# Installs again when pyproject.toml or the constraints changed, and when the tree was moved. The constraints are those of
# constraints.txt, or of what ZARRCACHE_CONSTRAINTS names. The interpreter is the first of $PYTHON, python3, python3.13, python3.12,
# python3.11 that is Python 3.11 or newer, or of the version that ZARRCACHE_PYTHON names.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${ZARRCACHE_VENV:-.venv}
extras=${ZARRCACHE_EXTRAS:-test,demo,convert,docs}
constraints=${ZARRCACHE_CONSTRAINTS:-constraints.txt}
oldest=${ZARRCACHE_PYTHON:-3.11}

# Hundreds of processes start from here, and some environments forbid them all to keep what they compile: then half of their time goes there.
unset PYTHONDONTWRITEBYTECODE

say() { printf '%s\n' "$*" >&2; }

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c "import sys; sys.exit(sys.version_info < (3, ${oldest#3.}))" >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    say "$0 needs Python $oldest or newer; found: $(python3 --version 2>&1 || true)."
    say "Install one (conda create -n py python=$oldest, or your system's python$oldest and python$oldest-venv), or name it: PYTHON=/path/to/python$oldest $0"
    return 1
}

# What the environment was made from. Prints nothing, so never matches, if the environment's interpreter is gone.
fingerprint() {
    "$venv/bin/python" - "$extras" "$constraints" 2>/dev/null <<'EOF' || true
import hashlib, os, sys
parts = [sys.version, sys.argv[1], os.getcwd(), open("pyproject.toml").read(), open(sys.argv[2]).read()]
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
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$constraints" -e ".[$extras]"
    fingerprint >"$stamp"
fi
