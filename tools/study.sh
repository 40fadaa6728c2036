#!/usr/bin/env bash
# Makes the study of docs/study.md again, on real images.
#   bash tools/study.sh DIR [JOB...]   DIR: train.zip and valid.zip, CIFAR-10 in class folders. Without a JOB all of them, in
#                                      JOBS (2, at most 6) processes of one thread; it goes on where it was stopped
# A job is one of the lines of `everything`, such as "searches 0 controller random". Runs go to OUT (exp/study), what is small
# and finished to KEPT (docs/study), and is not made again where it is there: other OUT and KEPT make everything anew. DEVICE=cuda
# trains on a GPU, in float32 as on the CPU, faster with LAUNCH="python tools/graphed.py".
# shellcheck source=tools/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
data=${1:?DIR is missing: the directory of train.zip and valid.zip}
shift
data=$(realpath "$data")
[ -e "$data/train.zip" ] || { echo "error: $data/train.zip is not there" >&2; exit 2; }
OUT=${OUT:-exp/study}
KEPT=${KEPT:-docs/study}
cd "$root"
export OMP_NUM_THREADS=1 OUT KEPT

images=(--dataset=folder --zip_file --data="$data" --image_size=16 --train_images=5000 --device="${DEVICE:-cpu}" ${DEVICE:+--no-tf32})
child=("${images[@]}" --valid_images=5000 --search_space=small --child_layers=1 --child_channels=8 --child_nodes=5
  --child_batch_size=64 --child_drop_path_keep_prob=1.0 --child_l2_reg=3e-4 --child_lr_max=0.1 --child_lr_min=0.001)
alone=(--method=NAO "${child[@]}" --no-child_use_aux_head --child_epochs=4 --child_lr_epochs=4 --child_eval_batch_size=500)
supernet=(--method=NAO-WS "${child[@]}" --child_epochs=60 --child_eval_batch_size=5000 --child_rank_count=0)
final=(--layers=1 --channels=8 --nodes=5 --batch_size=64 --keep_prob=1.0 --drop_path_keep_prob=1.0 --l2_reg=3e-4
  --lr_max=0.1 --lr_min=0.001 --epochs=16 --cutout_size=0 --train_images=4000 --holdout=1000)

# keep NAME FILE...: put small files of the run $OUT/NAME into $KEPT/NAME, without this machine's directories.
keep() {
  local name=$1 file
  shift
  mkdir -p "$KEPT/$name"
  for file; do
    [ -e "$OUT/$name/$file" ] || continue
    sed "s#$OUT/#exp/study/#g; s#$(dirname "$data")/##g" "$OUT/$name/$file" > "$OUT/$name/kept"
    mv "$OUT/$name/kept" "$KEPT/$name/$file"
  done
}

# search NAME FLAG...: one search in $OUT/NAME, whose small files go to $KEPT/NAME when it has ended.
search() {
  local name=$1
  shift
  [ ! -e "$KEPT/$name/arch_pool" ] || return 0
  OUTPUT_DIR=$OUT/$name run train_search.py "$@" > /dev/null
  keep "$name" metrics.jsonl results.0.jsonl arch_pool.perf arch_pool  # the last says that all are there
}

# train NAME SEED ARCHITECTURE: a final training in $OUT/NAME, tested once; its metrics go to $KEPT/NAME.
train() {
  [ ! -e "$KEPT/$1/metrics.jsonl" ] || return 0
  OUTPUT_DIR=$OUT/$1 run train_cifar.py "${images[@]}" "${final[@]}" --seed="$2" --fixed_arc="$3" > /dev/null
  keep "$1" metrics.jsonl
}

# trained SEED: the 40 random architectures of a seed.
trained() { grep -o '"arch": "[^"]*' "$KEPT/initial/seed$1/results.0.jsonl" | cut -d'"' -f4; }

# Part 1. The 40 architectures that all searches of a seed begin with; a search of 80 more; the best one of a search, 3 times.
initial() { search "initial/seed$1" "${alone[@]}" --seed="$1" --controller_seed_arch=40 --rounds=0; }
propose() {
  local proposer=$2 settings=()
  case $2 in
    controller) settings=(--controller_rewriting=operands --controller_apart=0) ;;  # the preset before its mends
    mended) proposer=controller ;;  # and chance, random search, on fresh seeds
    chance) proposer=random ;;
  esac
  search "$2/seed$1" "${alone[@]}" --seed="$1" --controller_seed_arch=40 --controller_new_arch=10 --rounds=8 \
    --proposer="$proposer" --controller_preset=best ${settings[@]+"${settings[@]}"} --child_results="$KEPT/initial/seed$1/results.0.jsonl"
}
best() {
  local number arch
  arch=$(head -1 "$KEPT/$2/seed$1/arch_pool")
  for number in 0 1 2; do train "final/$2/seed$((10 * $1 + number))" $((1000 + 10 * $1 + number)) "$arch"; done
}
searches() {
  local seed=$1 proposer
  shift
  initial "$seed"
  for proposer; do propose "$seed" "$proposer"; best "$seed" "$proposer"; done
}

# Part 2. 60 random architectures trained on their own with two seeds, and scored by three supernets.
sixty() {
  [ -e "$KEPT/sixty" ] || { { trained 0 && trained 1 | head -20; } > "$KEPT/sixty.$$" && mv "$KEPT/sixty.$$" "$KEPT/sixty"; }
}
twice() { sixty && search "twice/seed$1" "${alone[@]}" --seed=$((200 + $1)) --child_arch_pool="$KEPT/sixty" --rounds=0; }
score() {
  local name=supernet settings=()
  case ${2:-} in  # changes against what these supernets get wrong
    parameters) name=$2 settings=(--child_sampling=parameters) ;;
    longer) name=$2 settings=(--child_epochs=180 --child_eval_epochs=180) ;;
  esac
  sixty && search "$name/seed$1" "${supernet[@]}" --seed="$1" --child_arch_pool="$KEPT/sixty" --child_eval_epochs=60 \
    ${settings[@]+"${settings[@]}"}
}

# Part 3. NAO-WS from 100 architectures; its best five and the five first random ones, trained alike.
shared() {
  by_sharing "$1"
  five "$1" found
  five "$1" random
}
by_sharing() {
  search "shared/seed$1" "${supernet[@]}" --seed=$((300 + $1)) --controller_preset=best --controller_seed_arch=100 \
    --controller_new_arch=30 --child_eval_epochs=10
}
five() {
  local number arch
  for number in 1 2 3 4 5; do
    if [ "$2" = found ]; then arch=$(sed -n "${number}p" "$KEPT/shared/seed$1/arch_pool")
    else arch=$(trained "$1" | sed -n "${number}p"); fi
    train "five/$2/seed$((10 * $1 + number))" $((3000 + 10 * $1 + number)) "$arch"
  done
}

everything() {
  local seed
  for seed in 0 1 2 3 4 5; do echo "searches $seed controller random"; done
  for seed in 10 11 12 13 14 15; do echo "searches $seed mended chance"; done
  for seed in 0 1 2 3 4 5; do echo "searches $seed evolution"; done
  for seed in 0 1; do echo "twice $seed"; done
  for seed in 0 1 2; do echo "score $seed"; done
  for seed in 0 1 2; do echo "score $seed parameters"; done
  echo "score 0 longer"
  for seed in 0 1 2; do echo "shared $seed"; done
}

if [ $# -gt 0 ]; then
  "$@"
else
  everything | xargs -P "${JOBS:-2}" -L 1 bash tools/study.sh "$data"
fi
