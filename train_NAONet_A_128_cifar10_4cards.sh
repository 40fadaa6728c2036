#!/usr/bin/env bash
# Trains NAONet-A with 128 channels on CIFAR-10, four GPUs (published: 1.93 % top-1 error).
#   bash train_NAONet_A_128_cifar10_4cards.sh [FLAG...]     e.g. bash train_NAONet_A_128_cifar10_4cards.sh --epochs=1
MODEL=${MODEL:-NAONet_A_128_cifar10}
OUTPUT_DIR=${OUTPUT_DIR:-exp/$MODEL}
[ -n "${LAUNCH:-}" ] || export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0,1,2,3}  # the GPUs to use; torchrun takes all
DATA_DIR=${DATA_DIR:-data}
fixed_arc=${fixed_arc:-"0 7 1 15 2 8 1 7 0 6 1 7 0 8 4 7 1 5 0 7 0 7 1 13 0 6 0 14 0 9 1 10 0 14 2 6 1 11 0 7"}

# shellcheck source=tools/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/tools/common.sh"
run_seeds train_cifar.py --data="$DATA_DIR" --dataset=cifar10 --fixed_arc="$fixed_arc" \
  --batch_size=128 --eval_batch_size=500 --epochs=600 --layers=6 --channels=128 --cutout_size=16 \
  --grad_bound=5.0 --lr_max=0.025 --lr_min=0.0 --keep_prob=0.6 --drop_path_keep_prob=0.7 --l2_reg=5e-4 --use_aux_head "$@"
