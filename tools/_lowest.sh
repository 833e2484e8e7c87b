#!/usr/bin/env bash
# Called by `tools/test --lowest`: the demo and the contract tests with the oldest versions that pyproject.toml allows.
#
# uv resolves them (`lowest-direct`: what pyproject.toml names at its lower bound, what those need at its newest), pip installs them
# into `.venv-lowest`, or into what ZARRCACHE_VENV names. torch is that of constraints.txt: its older wheels are CUDA builds of 3 GB.
# Arguments go to pytest; without any it runs tests/contract.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${ZARRCACHE_VENV:-.venv-lowest}
oldest=$(sed -n 's/^requires-python = ">=\(.*\)"$/\1/p' pyproject.toml)
python=${PYTHON:-python$oldest}

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
grep '^torch==' constraints.txt >"$venv/torch.txt"
"$venv/bin/uv" pip compile --quiet --no-annotate --no-header --resolution lowest-direct --override "$venv/torch.txt" \
    --python "$venv/bin/python" --extra test --extra demo --extra convert pyproject.toml --output-file "$venv/all.txt"
# The CPU build of torch needs none of these.
grep --invert-match --extended-regexp '^(cuda|nvidia|triton)' "$venv/all.txt" >"$venv/lowest.txt"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --requirement "$venv/lowest.txt"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --editable .
"$venv/bin/python" -m pip check

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
unset PYTHONDONTWRITEBYTECODE
"$venv/bin/zarrcache" demo
exec "$venv/bin/python" -m pytest "${@:-tests/contract}"
