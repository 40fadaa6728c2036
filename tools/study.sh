#!/usr/bin/env bash
# The searches of docs/study.md, part 1, on real images: by the controller, by chance and by evolution.
#   bash tools/study.sh DIR     DIR: train.zip and valid.zip, CIFAR-10 in class folders; goes on where it was stopped
# OUT (default exp/study) gets the runs; small results that exist in KEPT (docs/study) are not made again.
# shellcheck source=tools/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
data=${1:?DIR is missing: the directory of train.zip and valid.zip}
OUT=${OUT:-exp/study}
KEPT=${KEPT:-$root/docs/study}
SEEDS=${SEEDS:-"0 1 2 3 4 5"}
export OMP_NUM_THREADS=1

proxy=(--dataset=folder --zip_file --data="$data" --image_size=16 --device=cpu --child_layers=1 --child_channels=8 --child_nodes=5
  --child_batch_size=64 --child_drop_path_keep_prob=1.0 --child_l2_reg=3e-4 --no-child_use_aux_head --train_images=5000
  --valid_images=5000 --child_epochs=4 --child_lr_epochs=4 --child_lr_max=0.1 --child_lr_min=0.001 --child_eval_batch_size=500)

# complete SEED PROPOSER: one search of 120 trainings, the first 40 of which all proposers share.
complete() {
  local seed=$1 proposer=$2 out=$OUT/complete/$2/seed$1 known=$KEPT/complete/seed$1.jsonl
  mkdir -p "$out" "$KEPT/complete"
  touch "$known"
  sort -u "$known" > "$out.known"
  OUTPUT_DIR=$out run train_search.py --method=NAO --search_space=small "${proxy[@]}" --seed="$seed" --proposer="$proposer" \
    --controller_preset=best --controller_seed_arch=40 --controller_new_arch=10 --rounds=8 --child_results="$out.known" \
    >> "$out.log" 2>&1
  cat "$out"/results.*.jsonl >> "$known"  # one writer a seed: its proposers run one after the other
  sort -u -o "$known" "$known"
  for file in arch_pool arch_pool.perf; do cp "$out/$file" "$KEPT/complete/seed$seed.$proposer.$file"; done
}

lane() { for seed in "$@"; do for proposer in random controller evolution; do complete "$seed" "$proposer"; done; done; }

read -ra seeds <<< "$SEEDS"
for first in 0 1; do
  mine=()
  for ((i = first; i < ${#seeds[@]}; i += 2)); do mine+=("${seeds[i]}"); done
  lane "${mine[@]}" &
done
wait
