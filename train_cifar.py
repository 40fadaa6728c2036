"""Train or test the network of one architecture on CIFAR-10, CIFAR-100 or the embedded digits (paper, section 5.2).

    python train_cifar.py --fixed_arc="0 1 0 2 ..." --output_dir=exp/mine        # train; again: goes on where it stopped
    python train_cifar.py --fixed_arc=exp/search_cifar10/arch_pool.final --arc_index=1 --use_aux_head --cutout_size=16
    python train_cifar.py --mode=test --output_dir=exp/mine                      # error of checkpoint_best.pt

bash train_NAONet_A_36_cifar10.sh and its neighbours are the published settings.
"""

import argparse
from functools import partial

import datasets
import training
from architecture import Architecture
from flags import COUNT, NOT_NEGATIVE, POSITIVE, Parser, add, add_run_flags, run_program
from model import NASNetworkCIFAR
from utils import Run


def parse_args() -> tuple[argparse.Namespace, Architecture]:
    """The program's flags, and the architecture that they name."""
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
    return training.parse_training_flags(parser)


def main() -> None:
    """Train or test, as --mode says."""
    args, arch = parse_args()
    run = Run(args)
    load = partial(datasets.load, args.dataset, args.data, device=run.device, flip=args.flip,
                   folder=datasets.Folder(args.zip_file, args.image_size, show=run.is_first))
    train_set = run.first_alone(partial(load, train=True))
    test_set = run.first_alone(partial(load, train=False, info=train_set.info))
    test_batches = datasets.EvalBatches(test_set, args.eval_batch_size, run.rank, run.world)

    def build(use_aux_head: bool, steps: int = 1) -> NASNetworkCIFAR:
        return NASNetworkCIFAR(len(train_set.classes), args.layers, args.nodes, args.channels,
                               args.keep_prob, args.drop_path_keep_prob, use_aux_head, steps, arch)
    if args.mode == 'test':
        training.test_network(run, build, test_batches)
        return
    train_batches = datasets.TrainBatches(train_set, args.batch_size, run.generators['data'], args.cutout_size, run.rank,
                                          run.world)
    training.train_network(run, build(args.use_aux_head, args.epochs * len(train_batches)), train_batches, test_batches,
                           l2_reg=args.l2_reg, epochs=args.epochs, grad_bound=args.grad_bound,
                           lr=partial(training.cosine, epochs=args.epochs, lr_max=args.lr_max, lr_min=args.lr_min))


if __name__ == '__main__':
    run_program(main)
