"""Train or test the network of one architecture on CIFAR, the digits or a folder of small images (paper, section 5.2).

    python train_cifar.py --fixed_arc="0 1 0 2 ..." --output_dir=exp/mine        # train; again: goes on where it stopped
    python train_cifar.py --fixed_arc=exp/search_cifar10/arch_pool.final --arc_index=1 --use_aux_head --cutout_size=16
    python train_cifar.py --mode=test --output_dir=exp/mine                      # error of checkpoint_best.pt

bash train_NAONet_A_36_cifar10.sh and its neighbours are the published settings.
"""

import argparse
from functools import partial
from typing import Any

import datasets
import training
from architecture import Architecture
from flags import COUNT, NOT_NEGATIVE, POSITIVE, Parser, UserError, add, add_run_flags, run_program
from model import NASNetworkCIFAR, check_image_size
from utils import Run


def parse_args() -> tuple[argparse.Namespace, Architecture, dict[str, Any] | None]:
    """The program's flags, the architecture that they name, and the checkpoint to test; see training.parse_training_flags."""
    parser = Parser('Train or test the network of one architecture on small images.')
    add_run_flags(parser, output_dir='exp/cifar')
    training.add_training_flags(parser, batch_size=128, eval_batch_size=500, epochs=600, l2_reg=3e-4)
    training.add_network_flags(parser, layers=6, channels=36, keep_prob=0.6, drop_path=0.8)
    datasets.add_flags(parser)
    group = parser.add_argument_group('CIFAR')
    add(group, 'zip_file', 'folder: read train.zip and valid.zip instead of folders', False, action='store_true')
    add(group, 'cutout_size', 'side of the square that cutout zeroes; 0: none', 0, type=COUNT)
    add(group, 'lr_max', 'learning rate of the first epoch', 0.025, type=POSITIVE)
    add(group, 'lr_min', 'learning rate that the cosine ends at', 0.0, type=NOT_NEGATIVE)
    add(group, 'grad_bound', 'gradients are clipped to this norm', 5.0, type=POSITIVE)
    args, arch, tested = training.parse_training_flags(parser)
    if args.lr_min > args.lr_max:
        raise UserError(f'--lr_min={args.lr_min:g} is above --lr_max={args.lr_max:g}')
    return args, arch, tested


def main() -> None:
    """Train or test, as --mode says."""
    args, arch, tested = parse_args()
    run = Run(args)
    load = partial(datasets.load, args.dataset, args.data, device=run.device, flip=args.flip,
                   folder=datasets.Folder(args.zip_file, args.image_size, show=run.is_first))

    def build(classes: int, use_aux_head: bool, steps: int = 1) -> NASNetworkCIFAR:
        return NASNetworkCIFAR(classes, args.layers, args.nodes, args.channels, args.keep_prob, args.drop_path_keep_prob,
                               use_aux_head, steps, arch)

    def eval_batches(images: datasets.ImageSet) -> datasets.EvalBatches:
        return datasets.EvalBatches(images, args.eval_batch_size, run.rank, run.world)
    if tested:
        info = tested.get('images') or run.first_alone(partial(load, train=True)).info
        test_set = run.first_alone(partial(load, train=False, info=info))
        training.test_network(run, tested, partial(build, len(test_set.classes)), eval_batches(test_set))
        return
    images = run.first_alone(partial(load, train=True))
    check_image_size(images.size, args.use_aux_head)
    chosen, held_out = training.parts(images.labels, args)
    train_batches = datasets.TrainBatches(images.select(chosen), args.batch_size, run.generators['data'], args.cutout_size,
                                          run.rank, run.world)
    test_batches = eval_batches(run.first_alone(partial(load, train=False, info=images.info)))
    network = build(len(images.classes), args.use_aux_head, args.epochs * len(train_batches))
    training.train_network(
        run, network, train_batches, eval_batches(images.select(held_out)) if args.holdout else test_batches,
        test_batches=test_batches if args.holdout else None, l2_reg=args.l2_reg, epochs=args.epochs, grad_bound=args.grad_bound,
        lr=partial(training.cosine, epochs=args.epochs, lr_max=args.lr_max, lr_min=args.lr_min),
        more={'images': images.info, 'classes': list(images.classes),
              'fingerprint': datasets.fingerprint(images.labels, images.classes)})


if __name__ == '__main__':
    run_program(main)
