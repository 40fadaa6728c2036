#!/usr/bin/env bash
# The main job in a few minutes, on the embedded digits: search by NAO-WS, train the best architecture found, evaluate it.
#   bash quickstart.sh     makes .venv, installs, runs; a second run goes on where the first one stopped
OUTPUT_DIR=${OUTPUT_DIR:-exp/quickstart}

# shellcheck source=tools/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/tools/common.sh"
[ "$#" = 0 ] || { echo 'error: quickstart.sh takes no flags, but OUTPUT_DIR=DIR and OMP_NUM_THREADS=1 before it' >&2; exit 2; }
install requirements.txt
unset VIRTUAL_ENV PYTHON  # what was installed is in .venv

base=$OUTPUT_DIR
OUTPUT_DIR=$base/search
run train_search.py --dataset=digits --child_layers=1 --child_channels=8 --child_batch_size=64 --child_eval_batch_size=144 \
  --child_epochs=6 --child_eval_epochs=2 --child_lr_max=0.05 --controller_seed_arch=30 --controller_new_arch=15 \
  --controller_epochs=400 --controller_lr=0.003 --child_rank_count=3 --child_rank_epochs=2
OUTPUT_DIR=$base/train
found=$base/search/arch_pool.final
run train_cifar.py --dataset=digits --fixed_arc="$found" --layers=1 --channels=8 --epochs=10 --batch_size=64 \
  --lr_max=0.1 --keep_prob=0.9 --drop_path_keep_prob=0.95
run train_cifar.py --dataset=digits --mode=test

# last, best: the errors in per cent that the training ended with
read -r best last <<< "$(sed -n 's/.*finished: best test top-1 error \([0-9.]*\) %, that of the last epoch \([0-9.]*\) %.*/\1 \2/p' \
  "$OUTPUT_DIR/train.log" | tail -n 1)"
right() { awk "BEGIN { print 100 - $1 }"; }
cat <<END

Found the architecture   $(head -n 1 "$found")
Of the ranked ones       $(sed -n 's/.*best first; \(.*the start\)).*/\1/p' "$base/search/train.log" | tail -n 1))
Its test accuracy        $(right "$last") % on the digits after the last epoch; $(right "$best") % the best of 10 epochs, chosen on the test images
The search               $base/search: train.log, metrics.jsonl, arch_pool.final
The trained network      $base/train: train.log, metrics.jsonl, checkpoint_best.pt
END
