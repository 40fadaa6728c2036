# shellcheck shell=bash
# What the scripts share; sourced by them. Sets `root`, the project's directory.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# install FILE...: make .venv and install the requirements files, unless that was done for these very files.
install() {
  local stamp own=$root/.venv/bin/python recent='import sys; sys.exit(sys.version_info < (3, 10))'
  stamp=$root/.venv/installed-$(cd "$root" && cat "$@" | cksum | tr ' ' '-')
  [ ! -e "$stamp" ] || return 0
  if ! "$own" -m pip --version > /dev/null 2>&1; then  # it is not there, or only half of it
    if ! "${PYTHON:-python3}" -c "$recent" || ! "${PYTHON:-python3}" -m venv "$root/.venv"; then
      echo "error: cannot make a virtual environment; install Python 3.10 or newer with its venv module" >&2
      exit 2
    fi
  fi
  "$own" -c "$recent" || { echo "error: the Python of $root/.venv is older than 3.10; delete that folder" >&2; exit 2; }
  local file flags=()
  for file in "$@"; do flags+=(-r "$root/$file"); done
  "$own" -m pip install --disable-pip-version-check "${flags[@]}"
  touch "$stamp"
}

# python: the interpreter of an active virtual environment, else that of .venv, else of conda, else the system's.
python() {
  local interpreter=${PYTHON:-}
  if [ -z "$interpreter" ]; then
    if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$root/.venv/bin/python" ]; then interpreter=$root/.venv/bin/python
    elif [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then interpreter=$(type -P python || echo python3)
    else interpreter=python3; fi
  fi
  "$interpreter" "$@"
}

# launch PROGRAM FLAG...: run it by Python, or under what $LAUNCH says, such as "torchrun --nproc_per_node=4".
launch() {
  export PYTHONUNBUFFERED=1
  # on the CPU: keep freed memory, in huge pages, in place of faulting it in anew at every step
  export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=17179869184:glibc.malloc.trim_threshold=17179869184}
  case ${LAUNCH:-} in
    torchrun*)
      # shellcheck disable=SC2086  # its flags are words of their own
      python -m torch.distributed.run ${LAUNCH#torchrun} "$@" ;;
    '') python "$@" ;;
    *) $LAUNCH "$@" ;;
  esac
}

# run PROGRAM FLAG...: run one of the programs, writing to $OUTPUT_DIR; the program keeps its own train.log there.
run() {
  local program=$1
  shift
  case " $* " in *' --help '* | *' -h '*) ;; *) if type -P nvidia-smi >/dev/null; then nvidia-smi || true; fi ;; esac
  launch "$root/$program" --output_dir="$OUTPUT_DIR" "$@"
}

# run_seeds PROGRAM FLAG...: `run`, or with $SEEDS, such as "0 1 2", a run of each one after the other, to $OUTPUT_DIR/seedN.
run_seeds() {
  local base=$OUTPUT_DIR seed
  [ -n "${SEEDS:-}" ] || { run "$@"; return; }
  case " $* " in *' --seed'[=\ ]* | *' --output_dir'[=\ ]*)
    echo 'error: with SEEDS each run has its own --seed and --output_dir; OUTPUT_DIR=DIR says where all of them are' >&2
    exit 2 ;;
  esac
  for seed in $SEEDS; do
    case $seed in *[!0-9]*)
      echo "error: SEEDS=\"$SEEDS\": '$seed' is no seed; whole numbers, such as SEEDS=\"0 1 2\"" >&2
      exit 2 ;;
    esac
  done
  # shellcheck disable=SC2086  # they are words of their own
  for seed in $(printf '%s\n' $SEEDS | awk '!seen[$0]++'); do
    OUTPUT_DIR=$base/seed$seed
    run "$@" --seed="$seed"
  done
}
