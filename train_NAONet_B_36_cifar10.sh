#!/usr/bin/env bash
# Trains NAONet-B with 36 channels on CIFAR-10, one GPU (published: 2.93 % top-1 error).
#   bash train_NAONet_B_36_cifar10.sh [FLAG...]     e.g. bash train_NAONet_B_36_cifar10.sh --epochs=1
MODEL=${MODEL:-NAONet_B_36_cifar10}
OUTPUT_DIR=${OUTPUT_DIR:-exp/$MODEL}
[ -n "${LAUNCH:-}" ] || export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}  # the GPUs to use; torchrun takes all
DATA_DIR=${DATA_DIR:-data}
fixed_arc=${fixed_arc:-"0 1 0 2 0 1 2 2 1 3 0 2 4 0 1 3 2 1 0 3 1 1 1 0 2 1 2 4 1 0 2 3 3 1 2 2 0 2 0 2"}

# shellcheck source=tools/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/tools/common.sh"
run_seeds train_cifar.py --data="$DATA_DIR" --dataset=cifar10 --fixed_arc="$fixed_arc" \
  --batch_size=128 --eval_batch_size=500 --epochs=600 --layers=6 --channels=36 --cutout_size=16 \
  --grad_bound=5.0 --lr_max=0.025 --lr_min=0.0 --keep_prob=0.6 --drop_path_keep_prob=0.8 --l2_reg=3e-4 --use_aux_head "$@"
