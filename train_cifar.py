"""Train or test the network of one architecture on CIFAR-10, CIFAR-100 or the embedded digits (paper, section 5.2).

    python train_cifar.py --fixed_arc="0 1 0 2 ..." --output_dir=exp/mine        # train; again: goes on where it stopped
    python train_cifar.py --fixed_arc=exp/search_cifar10/arch_pool.final --arc_index=1 --use_aux_head --cutout_size=16
    python train_cifar.py --mode=test --output_dir=exp/mine                      # error of checkpoint_best.pt

bash train_NAONet_A_36_cifar10.sh and its neighbours are the published settings.
"""

from functools import partial

import datasets
import utils
from model import NASNetworkCIFAR


def parse_args() -> 'utils.argparse.Namespace':
    """The program's flags."""
    parser = utils.Parser('Train or test the network of one architecture on small images.')
    utils.add_run_arguments(parser, output_dir='exp/cifar')
    utils.add_training_arguments(parser, batch_size=128, eval_batch_size=500, epochs=600, l2_reg=3e-4)
    utils.add_network_arguments(parser, layers=6, channels=36, keep_prob=0.6, drop_path=0.8)
    group = parser.add_argument_group('CIFAR')
    group.add_argument('--dataset', choices=datasets.SOURCES, default='cifar10', help='which images')
    group.add_argument('--cutout_size', type=utils.COUNT, default=0, help='side of the square that cutout zeroes; 0: none')
    group.add_argument('--lr_max', type=utils.POSITIVE, default=0.025, help='learning rate of the first epoch')
    group.add_argument('--lr_min', type=utils.NOT_NEGATIVE, default=0.0, help='learning rate that the cosine ends at')
    group.add_argument('--grad_bound', type=utils.POSITIVE, default=5.0, help='gradients are clipped to this norm')
    return utils.parse_training_arguments(parser)


def main() -> None:
    """Train or test, as --mode says."""
    args = parse_args()
    arch = utils.read_architecture(args)
    run = utils.Run(args)
    test_set, train_set = (run.first_alone(partial(datasets.load, args.dataset, args.data, train, run.device))
                           for train in (False, True))
    test_batches = datasets.EvalBatches(test_set, args.eval_batch_size, run.rank, run.world)

    def build(use_aux_head: bool, steps: int = 1) -> NASNetworkCIFAR:
        return NASNetworkCIFAR(datasets.SOURCES[args.dataset].classes, args.layers, args.nodes, args.channels,
                               args.keep_prob, args.drop_path_keep_prob, use_aux_head, steps, arch)
    if args.mode == 'test':
        utils.test_network(run, build, test_batches)
        return
    train_batches = datasets.TrainBatches(train_set, args.batch_size, run.generators['data'], args.cutout_size, run.rank,
                                          run.world)
    utils.train_network(run, build(args.use_aux_head, args.epochs * len(train_batches)), train_batches, test_batches,
                        l2_reg=args.l2_reg, epochs=args.epochs, grad_bound=args.grad_bound,
                        lr=partial(utils.cosine, epochs=args.epochs, lr_max=args.lr_max, lr_min=args.lr_min))


if __name__ == '__main__':
    utils.run_program(main)
