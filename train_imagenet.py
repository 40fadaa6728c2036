"""Train or test the network of one architecture on ImageNet, or on any folder of images in class folders (paper, section 5.3).

    python train_imagenet.py --data=imagenet/raw-data --fixed_arc="0 7 1 15 ..." --use_aux_head --output_dir=exp/mine
    torchrun --nproc_per_node=4 train_imagenet.py --batch_size=512 --lr=0.4 ...          # four GPUs of one machine
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_imagenet.py ...
    python train_imagenet.py --mode=test --data=imagenet/raw-data --output_dir=exp/mine  # error of checkpoint_best.pt

--batch_size is that of all GPUs together; --lr is 0.1 per 128 images of it.
"""

import argparse
import sys
from functools import partial
from typing import Any

import datasets
import image_files
import training
from architecture import Architecture
from flags import (
    FRACTION,
    POSITIVE,
    POSITIVE_INT,
    Parser,
    add,
    add_run_flags,
    drop_without_effect,
    run_program,
    without_effect,
)
from model import NASNetworkImageNet
from utils import Run

LR_PER_IMAGE = 0.1 / 128
NO_EFFECT = ('momentum', 'cutout_size')  # flags of the reference that do nothing


def parse_args() -> tuple[argparse.Namespace, Architecture, dict[str, Any] | None]:
    """The program's flags, the architecture that they name, and the checkpoint to test; see training.parse_training_flags."""
    parser = Parser('Train or test the network of one architecture on images in class folders.')
    add_run_flags(parser, output_dir='exp/imagenet', data='imagenet/raw-data')
    image_files.add_flags(parser)
    training.add_training_flags(parser, batch_size=128, eval_batch_size=128, epochs=250, l2_reg=3e-5)
    training.add_network_flags(parser, layers=4, channels=48, keep_prob=1.0, drop_path=1.0)
    group = parser.add_argument_group('ImageNet')
    add(group, 'lr', 'learning rate of the first epoch: 0.1 per 128 images of --batch_size', 0.1, type=POSITIVE)
    add(group, 'gamma', 'factor of the learning rate', 0.97, type=POSITIVE)
    add(group, 'decay_period', 'epochs between two such factors', 1, type=POSITIVE_INT)
    add(group, 'label_smooth', 'share of a label given to all classes', 0.1, type=FRACTION)
    add(group, 'grad_clip', 'gradients are clipped to this norm', 5.0, type=POSITIVE)
    without_effect(parser, *NO_EFFECT)
    args, arch, tested = training.parse_training_flags(parser)
    drop_without_effect(args, *NO_EFFECT)
    return args, arch, tested


def main() -> None:
    """Train or test, as --mode says."""
    args, arch, tested = parse_args()
    run = Run(args)
    if not tested and run.is_first and abs(args.lr / (LR_PER_IMAGE * args.batch_size) - 1) > 0.01:
        print(f'warning: --lr={args.lr:g} with --batch_size={args.batch_size}: the published results keep 0.1 per 128 images, '
              f'which is --lr={LR_PER_IMAGE * args.batch_size:g}', file=sys.stderr, flush=True)
    make = partial(image_files.FileBatches, device=run.device, workers=args.workers, rank=run.rank, world=run.world)

    def build(classes: list[str], use_aux_head: bool, steps: int = 1) -> NASNetworkImageNet:
        return NASNetworkImageNet(len(classes), args.layers, args.nodes, args.channels, args.keep_prob,
                                  args.drop_path_keep_prob, use_aux_head, steps, arch)
    if tested:
        files = image_files.open_tested(args.data, args.zip_file, tested.get('classes'), run.is_first)
        training.test_network(run, tested, partial(build, files.classes), make(files, args.eval_batch_size))
        return
    train_files, valid_files, classes = image_files.open_files(
        args.data, args.zip_file, args.lazy_load, args.seed, run.store, run.is_first)
    test_batches = make(valid_files, args.eval_batch_size)
    chosen, held_out = training.parts(train_files.labels, args)
    train_batches = make(train_files, args.batch_size, indices=chosen, generator=run.generators['data'])
    eval_batches = make(train_files.evaluated(), args.eval_batch_size, indices=held_out) if args.holdout else test_batches
    training.train_network(
        run, build(classes, args.use_aux_head, args.epochs * len(train_batches)), train_batches, eval_batches,
        test_batches=test_batches if args.holdout else None, l2_reg=args.l2_reg, epochs=args.epochs, grad_bound=args.grad_clip,
        label_smooth=args.label_smooth,
        more={'classes': classes, 'fingerprint': datasets.fingerprint(train_files.labels, classes)},
        lr=partial(training.step_decay, lr=args.lr, gamma=args.gamma, decay_period=args.decay_period))


if __name__ == '__main__':
    run_program(main)
