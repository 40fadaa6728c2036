#!/usr/bin/env bash
# Searches on CIFAR-10 by NAO-V2, the authors' later recipe (arXiv:1909.10815); the result is $OUTPUT_DIR/arch_pool.final.
#   bash train_search_NAO-V2_cifar10.sh [FLAG...]     e.g. bash train_search_NAO-V2_cifar10.sh --rounds=1
MODEL=${MODEL:-search_V2_cifar10}
OUTPUT_DIR=${OUTPUT_DIR:-exp/$MODEL}
[ -n "${LAUNCH:-}" ] || export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}  # the GPUs to use; torchrun takes all
DATA_DIR=${DATA_DIR:-data}

# shellcheck source=tools/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/tools/common.sh"
run_seeds train_search.py --method=NAO-V2 --data="$DATA_DIR" --dataset=cifar10 \
  --rounds=3 --child_epochs=50 --child_sampling=parameters --child_batch_size=64 --child_eval_batch_size=500 \
  --child_layers=3 --child_nodes=5 --child_channels=20 --child_lr_max=0.025 --child_lr_min=0.001 --child_keep_prob=1.0 \
  --child_drop_path_keep_prob=0.9 --child_l2_reg=3e-4 --controller_seed_arch=1000 --controller_new_arch=300 \
  --controller_expand=10 --controller_epochs=1000 --controller_l2_reg=0 --controller_encoder_emb_size=32 \
  --controller_encoder_hidden_size=64 --controller_decoder_hidden_size=64 --controller_mlp_layers=0 "$@"
