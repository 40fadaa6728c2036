# shellcheck shell=bash
# What the scripts share; sourced by them. Sets `root`, the project's directory.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# install FILE...: make .venv and install the requirements files, unless that was done for these very files.
install() {
  local stamp
  stamp=$root/.venv/installed-$(cd "$root" && cat "$@" | cksum | tr ' ' '-')
  [ ! -e "$stamp" ] || return 0
  [ -x "$root/.venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$root/.venv" || {
    echo "error: cannot make a virtual environment; install Python 3.10 or newer with its venv module" >&2
    exit 2
  }
  local file flags=()
  for file in "$@"; do flags+=(-r "$root/$file"); done
  "$root/.venv/bin/python" -m pip install --disable-pip-version-check "${flags[@]}"
  touch "$stamp"
}

# python: the interpreter of an active virtual environment, else that of .venv, else of conda, else the system's.
python() {
  local interpreter=${PYTHON:-}
  if [ -z "$interpreter" ]; then
    if [ -n "${VIRTUAL_ENV:-}" ]; then interpreter=$(type -P python)
    elif [ -x "$root/.venv/bin/python" ]; then interpreter=$root/.venv/bin/python
    elif [ -n "${CONDA_PREFIX:-}" ]; then interpreter=$(type -P python)
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

# run PROGRAM FLAG...: run one of the programs, writing to $OUTPUT_DIR and appending to its train.log.
run() {
  local program=$1 made=() directory log new status=0 argument before=
  shift
  for argument in "$@"; do  # the log lies where the program writes, also if a flag says where
    case $before$argument in
      --output_dir=*) OUTPUT_DIR=${argument#*=} ;;
      --output_dir/*) OUTPUT_DIR=$argument ;;
    esac
    before=; [ "$argument" != --output_dir ] || before=--output_dir/
  done
  directory=$OUTPUT_DIR log=$OUTPUT_DIR/train.log
  case " $* " in *' --help '* | *' -h '*)
    launch "$root/$program" "$@"
    return ;;
  esac
  new=$([ -e "$log" ] || echo yes)
  while [ ! -e "$directory" ]; do
    made+=("$directory")
    directory=$(dirname "$directory")
  done
  if ! mkdir -p "$OUTPUT_DIR" 2>/dev/null || [ ! -w "$OUTPUT_DIR" ]; then
    echo "error: OUTPUT_DIR=$OUTPUT_DIR cannot be written; name a directory that you may write to" >&2
    exit 2
  fi
  if type -P nvidia-smi >/dev/null; then nvidia-smi || true; fi
  # tee -i: Ctrl-C reaches the program, whose last line still belongs in the log; 3: the live line passes tee by
  TERMINAL_FD=3 launch "$root/$program" --output_dir="$OUTPUT_DIR" "$@" 3>&2 2>&1 | tee -ai "$log" || status=$?
  if [ "$status" = 2 ] && [ "$new" ] && [ ! -e "$OUTPUT_DIR/metrics.jsonl" ]; then  # a mistake in the flags: leave nothing
    rm -f "$log"
    [ "${#made[@]}" = 0 ] || rmdir "${made[@]}" 2>/dev/null || true
  fi
  return "$status"
}
