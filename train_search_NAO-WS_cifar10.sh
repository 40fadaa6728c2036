#!/usr/bin/env bash
# Searches on CIFAR-10 by NAO-WS; the result is $OUTPUT_DIR/arch_pool.final.
#   bash train_search_NAO-WS_cifar10.sh [FLAG...]     e.g. bash train_search_NAO-WS_cifar10.sh --child_epochs=60
MODEL=${MODEL:-search_cifar10}
OUTPUT_DIR=${OUTPUT_DIR:-exp/$MODEL}
[ -n "${LAUNCH:-}" ] || export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}  # the GPUs to use; torchrun takes all
DATA_DIR=${DATA_DIR:-data}

# shellcheck source=tools/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/tools/common.sh"
run_seeds train_search.py --data="$DATA_DIR" --dataset=cifar10 \
  --child_batch_size=64 --child_eval_batch_size=500 --child_epochs=150 --child_layers=3 --child_nodes=5 \
  --child_channels=20 --child_eval_epochs=30 --child_lr_max=0.025 --child_lr_min=0.001 --child_keep_prob=1.0 \
  --child_drop_path_keep_prob=0.9 --child_l2_reg=3e-4 --controller_seed_arch=600 --controller_new_arch=300 "$@"
