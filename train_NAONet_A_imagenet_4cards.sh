#!/usr/bin/env bash
# Trains NAONet-A on ImageNet, four GPUs (published: 25.7 % top-1, 8.2 % top-5 error).
#   bash train_NAONet_A_imagenet_4cards.sh [FLAG...]     or one process a GPU: LAUNCH="torchrun --nproc_per_node=4" bash ...
MODEL=${MODEL:-NAONet_A_imagenet}
OUTPUT_DIR=${OUTPUT_DIR:-exp/$MODEL}
[ -n "${LAUNCH:-}" ] || export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0,1,2,3}  # the GPUs to use; torchrun takes all
DATA_DIR=${DATA_DIR:-imagenet/raw-data}
fixed_arc=${fixed_arc:-"0 7 1 15 2 8 1 7 0 6 1 7 0 8 4 7 1 5 0 7 0 7 1 13 0 6 0 14 0 9 1 10 0 14 2 6 1 11 0 7"}

# shellcheck source=tools/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/tools/common.sh"
run_seeds train_imagenet.py --data="$DATA_DIR" --fixed_arc="$fixed_arc" --batch_size=512 --lr=0.4 --eval_batch_size=128 \
  --epochs=250 --layers=4 --channels=42 --gamma=0.97 --decay_period=1 --l2_reg=3e-5 --label_smooth=0.1 \
  --grad_clip=5.0 --keep_prob=1.0 --drop_path_keep_prob=1.0 --use_aux_head "$@"
