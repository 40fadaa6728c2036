#!/usr/bin/env bash
# Searches on CIFAR-10 by NAO, the complete way: every candidate is trained on its own. The result is
# $OUTPUT_DIR/arch_pool.final.
#   bash train_search_NAO_cifar10.sh [FLAG...]                             one GPU: weeks
#   LAUNCH="torchrun --nproc_per_node=4" bash train_search_NAO_cifar10.sh  four GPUs; with --nnodes several machines
MODEL=${MODEL:-search_NAO_cifar10}
OUTPUT_DIR=${OUTPUT_DIR:-exp/$MODEL}
[ -n "${LAUNCH:-}" ] || export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}  # the GPUs to use; torchrun takes all
DATA_DIR=${DATA_DIR:-data}

# shellcheck source=tools/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/tools/common.sh"
run_seeds train_search.py --method=NAO --search_space=large --data="$DATA_DIR" --dataset=cifar10 \
  --rounds=3 --child_epochs=25 --child_layers=3 --child_nodes=5 --child_channels=32 --child_batch_size=128 \
  --child_lr_max=0.024 --child_keep_prob=1.0 --child_drop_path_keep_prob=0.7 --child_use_aux_head \
  --controller_seed_arch=600 --controller_new_arch=300 "$@"
