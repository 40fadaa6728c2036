#!/usr/bin/env bash
# Makes .venv, installs, and runs all linters and tests; arguments go to pytest.
#   bash tests/run.sh [PYTEST FLAG...]     e.g. bash tests/run.sh -m slow
# shellcheck source=tools/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tools/common.sh"
unset PYTHON VIRTUAL_ENV CONDA_PREFIX
install requirements.txt requirements-dev.txt requirements-tools.txt
cd "$root"
python -m ruff check .
if type -P shellcheck >/dev/null; then shellcheck -x ./*.sh tests/*.sh tools/*.sh .ci/run; else echo 'shellcheck is not installed: scripts not checked'; fi
python -m pytest "$@"
