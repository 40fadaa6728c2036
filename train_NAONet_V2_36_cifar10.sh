#!/usr/bin/env bash
# Trains NAONet-V2 with 36 channels on CIFAR-10, one GPU (published: 2.57 % top-1 error).
#   bash train_NAONet_V2_36_cifar10.sh [FLAG...]     e.g. bash train_NAONet_V2_36_cifar10.sh --epochs=1
MODEL=${MODEL:-NAONet_V2_36_cifar10}
OUTPUT_DIR=${OUTPUT_DIR:-exp/$MODEL}
[ -n "${LAUNCH:-}" ] || export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}  # the GPUs to use; torchrun takes all
DATA_DIR=${DATA_DIR:-data}
fixed_arc=${fixed_arc:-"1 1 0 1 2 4 0 0 0 0 2 1 0 0 0 2 0 3 0 0 0 2 0 2 2 2 1 0 0 0 0 1 0 0 0 3 0 0 0 1"}

# shellcheck source=tools/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/tools/common.sh"
run_seeds train_cifar.py --data="$DATA_DIR" --dataset=cifar10 --fixed_arc="$fixed_arc" \
  --batch_size=128 --eval_batch_size=500 --epochs=600 --layers=6 --channels=36 --cutout_size=16 \
  --grad_bound=5.0 --lr_max=0.025 --lr_min=0.0 --keep_prob=0.6 --drop_path_keep_prob=0.8 --l2_reg=5e-4 --use_aux_head "$@"
