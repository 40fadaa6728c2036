"""Search for an architecture by NAO-WS (paper, section 3 and appendix; Algorithm 1 with weight sharing).

    python train_search.py --output_dir=exp/search_cifar10       # search; again: goes on where it stopped
    python train_cifar.py --fixed_arc=exp/search_cifar10/arch_pool.final --use_aux_head --cutout_size=16

A supernet trains on random architectures of a pool; now and then every architecture of the pool is scored, the controller
learns which are good and writes new ones, which replace the worst; at last the best are trained from scratch and ranked.
A round is a few phases, and the checkpoint says which comes next:

    train (until the next scoring) -> score -> fit -> propose -> train ... score -> rank (one architecture at a time) -> done
"""

import argparse
import json
import math
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import architecture
import controller
import datasets
import utils
from architecture import Architecture
from model import FixedNetwork, NASNetworkCIFAR, NASNetworkImageNet
from model_search import NASWSNetworkCIFAR, NASWSNetworkImageNet, Supernet

TRAIN_SHARE = 0.9  # of the training images; the rest validates
IMAGENET_RANK_STEPS = 500  # of training one of the best from scratch on ImageNet
SEEDS_OF_NEW = 100  # the best architectures, from which the controller ascends
LAMBDAS = range(1, 51)  # step sizes of the ascent, until there are enough new architectures
RANK_KEEP_PROB, RANK_DROP_PATH_KEEP_PROB = 0.6, 0.8  # of the final trainings from scratch


def eval_epochs(text: str) -> int | list[int]:
    """The argparse type of --child_eval_epochs: N (every N epochs) or a list of epochs such as [30,60]."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    epochs = value if isinstance(value, list) else [value]
    if not epochs or any(type(epoch) is not int or epoch < 1 for epoch in epochs):
        raise argparse.ArgumentTypeError(f'must be a whole number above 0 or a list of them such as [30,60], not {text!r}')
    return value


def parse_args() -> argparse.Namespace:
    """The program's flags."""
    parser = utils.Parser('Search for an architecture by NAO-WS.')
    utils.add_run_arguments(parser, output_dir='exp/search_cifar10')
    group = parser.add_argument_group('images')
    group.add_argument('--dataset', choices=[*datasets.SOURCES, 'imagenet'], default='cifar10',
                       help='imagenet: any folder of images in class folders, see --data')
    utils.add_file_arguments(parser)
    group = parser.add_argument_group('child: the weight-sharing network')
    for name, kind, default, text in (
            ('batch_size', utils.POSITIVE_INT, 64, 'images per step'),
            ('eval_batch_size', utils.POSITIVE_INT, 500, 'validation images that an architecture is scored on'),
            ('epochs', utils.POSITIVE_INT, 150, 'how often all images of the training split are seen'),
            ('layers', utils.POSITIVE_INT, 3, 'normal cells before, between and after the reduction cells'),
            ('nodes', utils.POSITIVE_INT, 5, 'nodes of a cell'),
            ('channels', utils.POSITIVE_INT, 20, 'channels of the first cells'),
            ('cutout_size', utils.COUNT, 0, 'side of the square that cutout zeroes; 0: none'),
            ('grad_bound', utils.POSITIVE, 5.0, 'gradients are clipped to this norm'),
            ('lr_max', utils.POSITIVE, 0.025, 'learning rate of the first epoch'),
            ('lr_min', utils.NOT_NEGATIVE, 0.001, 'learning rate that the cosine ends at'),
            ('lr', utils.POSITIVE, 0.1, 'imagenet: learning rate of the first epoch'),
            ('gamma', utils.POSITIVE, 0.97, 'imagenet: factor of the learning rate'),
            ('decay_period', utils.POSITIVE_INT, 1, 'imagenet: epochs between two such factors'),
            ('label_smooth', utils.FRACTION, 0.1, 'imagenet: share of a label given to all classes'),
            ('keep_prob', utils.KEEP, 1.0, '1 - dropout before the classifier'),
            ('drop_path_keep_prob', utils.KEEP, 0.9, '1 - drop path of the last cell at the end'),
            ('l2_reg', utils.NOT_NEGATIVE, 3e-4, 'weight decay'),
            ('eval_epochs', eval_epochs, 30, 'score every N epochs, or after the epochs of a list such as [30,60]'),
            ('arch_pool', str, None, 'path of a pool file to start from (default: random architectures)'),
            ('rank_count', utils.COUNT, 5, 'how many of the best are trained from scratch at the end'),
            ('rank_epochs', utils.POSITIVE_INT, 10, 'epochs of each training from scratch')):
        group.add_argument(f'--child_{name}', type=kind, default=default, help=text)
    group.add_argument('--child_use_aux_head', action='store_true', help='train with the auxiliary head')
    group = parser.add_argument_group('controller')
    for name, kind, default, text in (
            ('seed_arch', utils.POSITIVE_INT, 600, 'architectures in the pool'),
            ('new_arch', utils.POSITIVE_INT, 300, 'new architectures a round'),
            ('expand', utils.POSITIVE_INT, None, 'N: write N-1 copies of each architecture with swapped operands and hold '
             '10 %% out (default: swap anew in each epoch, hold none out)'),
            ('epochs', utils.POSITIVE_INT, 1000, 'epochs of a fit'),
            ('batch_size', utils.POSITIVE_INT, 100, 'architectures per step'),
            ('lr', utils.POSITIVE, 0.001, 'learning rate of Adam'),
            ('trade_off', utils.FRACTION, 0.8, 'weight of the prediction loss; the rest weighs the reconstruction'),
            ('l2_reg', utils.NOT_NEGATIVE, 1e-4, 'weight decay'),
            ('grad_bound', utils.POSITIVE, 5.0, 'gradients are clipped to this norm'),
            ('encoder_layers', utils.POSITIVE_INT, 1, 'LSTM layers of the encoder'),
            ('encoder_hidden_size', utils.POSITIVE_INT, 96, 'units of each of them'),
            ('encoder_emb_size', utils.POSITIVE_INT, 48, 'numbers that a token is embedded in'),
            ('encoder_dropout', utils.FRACTION, 0.0, 'share of their inputs that is dropped'),
            ('mlp_layers', utils.COUNT, 3, 'hidden layers of the performance predictor'),
            ('mlp_hidden_size', utils.POSITIVE_INT, 200, 'units of each of them'),
            ('mlp_dropout', utils.FRACTION, 0.1, 'share of their outputs that is dropped'),
            ('decoder_layers', utils.POSITIVE_INT, 1, 'LSTM layers of the decoder'),
            ('decoder_hidden_size', utils.POSITIVE_INT, 96, 'units of each of them'),
            ('decoder_dropout', utils.FRACTION, 0.0, 'share of their inputs that is dropped')):
        group.add_argument(f'--controller_{name}', type=kind, default=default, help=text)
    args = parser.parse_args()
    if args.controller_encoder_hidden_size != args.controller_decoder_hidden_size:
        raise utils.UserError('--controller_encoder_hidden_size and --controller_decoder_hidden_size must be equal: the '
                              'decoder starts from the embedding')
    return args


def write_lines(path: Path, lines: list) -> None:
    """Write a pool file in one go: a reader sees the old one or the new one."""
    temporary = path.with_name(path.name + '.tmp')
    temporary.write_text(''.join(f'{line}\n' for line in lines))
    temporary.replace(path)


class Task(NamedTuple):
    """What a data set brings to a search."""

    classes: int
    supernet: type[Supernet]
    network: type[FixedNetwork]
    train_batches: Callable[[], Iterable]  # makes batches of the training split, drawn from the run's generators
    valid_batches: Iterable
    lr: Callable[[int], float]  # epoch, from 0 -> the supernet's learning rate
    label_smooth: float
    rank_options: dict[str, Any]  # of utils.fit, for training one of the best from scratch


def open_small_images(args: argparse.Namespace, run: utils.Run) -> Task:
    """CIFAR or digits: the first 90 % of the training images train, the rest validates."""
    data = run.first_alone(partial(datasets.load, args.dataset, args.data, True, run.device))
    split = int(TRAIN_SHARE * len(data))
    rates = {'lr_max': args.child_lr_max, 'lr_min': args.child_lr_min}
    return Task(
        datasets.SOURCES[args.dataset].classes, NASWSNetworkCIFAR, NASNetworkCIFAR,
        partial(datasets.TrainBatches, data.select(range(split)), args.child_batch_size, run.generators['data'],
                args.child_cutout_size, run.rank, run.world),
        datasets.EvalBatches(data.select(range(split, len(data))), args.child_eval_batch_size, run.rank, run.world),
        partial(utils.cosine, epochs=args.child_epochs, **rates), 0.0,
        {'epochs': args.child_rank_epochs, 'lr': partial(utils.cosine, epochs=args.child_rank_epochs, **rates)})


def open_imagenet(args: argparse.Namespace, run: utils.Run) -> Task:
    """ImageNet or another folder of images: a random 90 % of the training images train, the rest validates."""
    local_world = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    train_files, _, classes = datasets.open_files(args.data, args.zip_file, args.lazy_load, args.seed, local_world,
                                                  run.is_first)
    order = torch.randperm(len(train_files), generator=torch.Generator().manual_seed(args.seed))
    split = int(TRAIN_SHARE * len(order))
    train_batches = partial(datasets.FileBatches, train_files, args.child_batch_size, run.device, args.workers, order[:split],
                            run.generators['data'], run.rank, run.world)
    epochs = math.ceil(IMAGENET_RANK_STEPS / len(datasets.batch_bounds(split, args.child_batch_size, 2 * run.world)))
    return Task(
        len(classes), NASWSNetworkImageNet, NASNetworkImageNet, train_batches,
        datasets.FileBatches(train_files.evaluated(), args.child_eval_batch_size, run.device, args.workers, order[split:],
                             rank=run.rank, world=run.world),
        partial(utils.step_decay, lr=args.child_lr, gamma=args.child_gamma, decay_period=args.child_decay_period),
        args.child_label_smooth,
        {'epochs': epochs, 'lr': lambda epoch: args.child_lr, 'max_steps': math.ceil(IMAGENET_RANK_STEPS / epochs)})


class Search:
    """A search's state, and a method for each of its phases; a method ends by saying which phase comes next."""

    def __init__(self, args: argparse.Namespace, run: utils.Run):
        self.args, self.run = args, run
        self.vocabulary = architecture.vocabulary(args.child_nodes, 'small')
        self.pool = self.first_pool()
        self.task = (open_imagenet if args.dataset == 'imagenet' else open_small_images)(args, run)
        self.batches = self.task.train_batches()
        self.supernet = run.place(self.task.supernet(
            self.task.classes, args.child_layers, args.child_nodes, args.child_channels, args.child_keep_prob,
            args.child_drop_path_keep_prob, args.child_use_aux_head, args.child_epochs * len(self.batches)))
        self.optimizer = utils.sgd(run, self.supernet, args.child_l2_reg)
        sizes = {name: getattr(args, f'controller_{name}') for name in (
            'encoder_layers', 'encoder_hidden_size', 'encoder_emb_size', 'encoder_dropout', 'mlp_layers',
            'mlp_hidden_size', 'mlp_dropout', 'decoder_layers', 'decoder_hidden_size', 'decoder_dropout')}
        allowed = self.vocabulary.allowed_tokens
        self.nao = controller.NAO(allowed, self.vocabulary.size, len(allowed) // 2, **sizes).to(run.device)
        self.epoch, self.step, self.phase = 0, 0, 'train'
        self.parallel, self.resumed = self.supernet, None
        self.accuracies: list[float] = []
        self.ranked: list[tuple[float, str]] = []
        self.clock = utils.Clock(0, 1)

    def first_pool(self) -> list[Architecture]:
        """The pool file that the user names, or random architectures."""
        args, operations = self.args, self.vocabulary.operations
        if not args.child_arch_pool:
            return architecture.sample(args.controller_seed_arch, args.child_nodes, operations,
                                       self.run.generators['search'])
        try:
            return architecture.read_pool(args.child_arch_pool, args.child_nodes, operations)
        except architecture.ArchitectureError as error:
            raise utils.UserError(f'--child_arch_pool: {error}') from None

    @property
    def checkpoint(self) -> Path:
        """Where the search's state is kept."""
        return self.run.output_dir / 'checkpoint.pt'

    def load(self) -> None:
        """Go on from the checkpoint in the output directory, if there is one."""
        state = self.run.together(lambda: utils.load_checkpoint(self.checkpoint) if self.checkpoint.exists() else None)
        if state is None:
            return
        if 'phase' not in state:
            raise utils.UserError(f'{self.checkpoint} is not the checkpoint of a search; name another --output_dir')
        utils.load_model(self.supernet, state['model'], self.checkpoint)
        utils.load_model(self.nao, state['controller'], self.checkpoint)
        utils.load_optimizer(self.optimizer, state['optimizer'])
        self.pool = [architecture.parse(line) for line in state['pool']]
        for name in ('epoch', 'step', 'phase', 'accuracies', 'ranked'):
            setattr(self, name, state[name])
        self.resumed = {name: state[name] for name in ('args', 'random', 'scaler', 'metrics_bytes')}

    def save(self) -> None:
        """Write the checkpoint."""
        state = self.run.state() | {
            'model': self.supernet.state_dict(), 'controller': self.nao.state_dict(), 'optimizer': self.optimizer.state_dict(),
            'pool': [str(arch) for arch in self.pool], 'best_acc_top1': 100 * max(self.accuracies, default=0.0)}
        state |= {name: getattr(self, name) for name in ('epoch', 'step', 'phase', 'accuracies', 'ranked')}
        paths = [self.checkpoint]
        if self.phase in ('train', 'score') and self.args.save_every and self.epoch % self.args.save_every == 0:
            paths.insert(0, self.run.output_dir / f'checkpoint_{self.epoch}.pt')
        utils.save_checkpoint(self.run, state, *paths)

    def write_pool(self, suffix: str, pool: list, accuracies: list[float] | None = None) -> None:
        """Write arch_pool{suffix}, and arch_pool.perf{suffix} where there are accuracies."""
        if not self.run.is_first:
            return
        write_lines(self.run.output_dir / f'arch_pool{suffix}', pool)
        if accuracies is not None:
            write_lines(self.run.output_dir / f'arch_pool.perf{suffix}', accuracies)

    def is_scored(self, epoch: int) -> bool:
        """Whether the pool is scored after so many epochs."""
        every = self.args.child_eval_epochs
        return epoch == self.args.child_epochs or (epoch in every if isinstance(every, list) else epoch % every == 0)

    def train(self) -> None:
        """One epoch of the supernet, each step on an architecture drawn uniformly from the pool."""
        args = self.args
        self.supernet.train()
        chosen = iter(torch.randint(len(self.pool), (len(self.batches),), generator=self.run.generators['search']).tolist())

        def forward(images: torch.Tensor, step: int) -> tuple:
            return self.parallel(images, self.pool[next(chosen)], step)
        rate = self.task.lr(self.epoch)
        title = f'epoch {self.epoch + 1}/{args.child_epochs}'
        values, self.step = utils.train_epoch(
            self.run, forward, self.optimizer, self.batches, title=title, lr=rate, step=self.step, clock=self.clock,
            grad_bound=args.child_grad_bound, label_smooth=self.task.label_smooth)
        self.run.average_statistics(self.supernet)
        self.epoch += 1
        self.run.log(f'{title} train {utils.describe(values)} lr {rate:.3g} left {self.clock.left(self.step)}')
        self.run.write_metrics(kind='epoch', epoch=self.epoch, step=self.step, lr=rate, train=values)
        self.phase = 'score' if self.is_scored(self.epoch) else 'train'

    @torch.no_grad()
    def score(self) -> None:
        """Score the pool, all on one validation batch with batch statistics, and sort it, best first.

        Of several processes each scores its share of the pool.
        """
        run, batches = self.run, self.task.valid_batches
        chosen = torch.randperm(batches.count, generator=run.generators['search'])[:self.args.child_eval_batch_size]
        images, labels = batches.batch(chosen.to(run.device))
        self.supernet.eval()
        right = torch.zeros(len(self.pool), device=run.device)
        for index in range(run.rank, len(self.pool), run.world):
            with run.autocast():
                logits, _ = self.supernet(images, self.pool[index], bn_train=True)
            right[index] = (logits.argmax(1) == labels).sum()
            progress = f'scored {index + 1}/{len(self.pool)} architectures'
            if (index + 1) % utils.LOG_EVERY == 0:
                run.log(progress)
            elif run.live.due:
                run.live.show(progress)
        accuracies = [count / len(labels) for count in run.sum(right).tolist()]
        order = sorted(range(len(self.pool)), key=lambda index: -accuracies[index])
        self.pool, self.accuracies = [self.pool[i] for i in order], [accuracies[i] for i in order]
        for suffix in (f'.{self.epoch}', ''):
            self.write_pool(suffix, self.pool, self.accuracies)
        mean = sum(accuracies) / len(accuracies)
        self.run.log(f'epoch {self.epoch}: scored {len(self.pool)} architectures on {len(labels)} images: best '
                     f'{self.accuracies[0]:.4f}, mean {mean:.4f}, worst {self.accuracies[-1]:.4f}')
        self.run.write_metrics(kind='score', epoch=self.epoch, accuracies=self.accuracies, best_arch=str(self.pool[0]))
        self.phase = 'fit' if self.epoch < self.args.child_epochs else 'rank'

    def tokens(self, pool: list[Architecture]) -> torch.Tensor:
        """The pool as the controller's sequences, (count, 8·nodes)."""
        return torch.tensor([self.vocabulary.encode(arch) for arch in pool], device=self.run.device)

    def fit(self) -> None:
        """Train the controller on the scored pool."""
        args, generator = self.args, self.run.generators['search']
        sequences, targets = self.tokens(self.pool), controller.scale(self.accuracies).to(self.run.device)
        augment, held_out = architecture.swap_operands, None
        if args.controller_expand:
            order = torch.randperm(len(sequences), generator=generator).to(self.run.device)
            train, test = order[len(order) // 10:], order[:len(order) // 10]
            held_out = (sequences[test], targets[test]) if len(test) else None
            copies = [sequences[train]] + [architecture.swap_operands(sequences[train], generator)
                                           for _ in range(args.controller_expand - 1)]
            sequences, targets, augment = torch.cat(copies), targets[train].repeat(args.controller_expand, 1), None

        def report(values: dict[str, float]) -> None:
            self.run.log(f'controller epoch {values["epoch"]}/{args.controller_epochs} loss {values["loss"]:.5f} pairwise '
                         f'accuracy {values["pairwise_accuracy"]:.4f} Hamming distance {values["hamming_distance"]:.4f}')
        values = controller.fit(
            self.nao, sequences, targets, epochs=args.controller_epochs, batch_size=args.controller_batch_size,
            lr=args.controller_lr, l2_reg=args.controller_l2_reg, trade_off=args.controller_trade_off,
            grad_bound=args.controller_grad_bound, generator=generator, augment=augment, held_out=held_out, report=report)
        self.run.broadcast(self.nao)
        self.run.write_metrics(kind='controller', search_epoch=self.epoch, **values)
        self.phase = 'propose'

    def propose(self) -> None:
        """Let the controller write new architectures in place of the worst."""
        new, per_lambda = self.run.together(lambda: controller.new_architectures(
            self.nao, self.tokens(self.pool[:SEEDS_OF_NEW]), [self.vocabulary.encode(arch) for arch in self.pool],
            min(self.args.controller_new_arch, len(self.pool)), LAMBDAS))
        self.pool = self.pool[:len(self.pool) - len(new)] + [self.vocabulary.decode(tokens) for tokens in new]
        self.write_pool('', self.pool)
        self.run.log(f'{len(new)} new architectures, per λ: {per_lambda}')
        self.run.write_metrics(kind='new', epoch=self.epoch, new=len(new), per_lambda=per_lambda)
        self.phase = 'train'

    def rank(self) -> None:
        """Train the next of the best architectures from scratch and score it; after the last write arch_pool.final."""
        index, count = len(self.ranked), min(self.args.child_rank_count, len(self.pool))
        if index < count:
            arch = self.pool[index]
            accuracy = self.train_from_scratch(arch, f'rank {index + 1}/{count} ')
            self.ranked.append((accuracy, str(arch)))
            self.run.write_metrics(kind='rank', index=index, accuracy=accuracy, arch=str(arch))
            return
        ranked = sorted(self.ranked, key=lambda pair: -pair[0])
        self.write_pool('.final', [arch for _, arch in ranked], [accuracy for accuracy, _ in ranked])
        self.phase = 'done'

    def train_from_scratch(self, arch: Architecture, title: str) -> float:
        """Train one architecture on the training split; its accuracy on the validation split, 0-1.

        All draws follow from --seed and the architecture, so that order and interruptions make no difference.
        """
        args, run, task = self.args, self.run, self.task
        run.reseed(str(arch))
        batches, epochs = task.train_batches(), task.rank_options['epochs']
        steps = epochs * min(len(batches), task.rank_options.get('max_steps', len(batches)))
        network = run.place(task.network(task.classes, args.child_layers, args.child_nodes, args.child_channels,
                                         RANK_KEEP_PROB, RANK_DROP_PATH_KEEP_PROB, True, steps, arch))
        values = utils.fit(run, network, utils.sgd(run, network, args.child_l2_reg), batches, task.valid_batches,
                           title=title, grad_bound=args.child_grad_bound, label_smooth=task.label_smooth, **task.rank_options)
        return values['top1'] / 100

    def search(self) -> None:
        """Run phase after phase to the end, with a checkpoint after each."""
        self.parallel = self.run.parallel(self.supernet, shares_weights=True)
        if self.resumed:
            self.run.resume(self.resumed, f'epoch {self.epoch}, next: {self.phase}')
        self.clock = utils.Clock(self.step, self.args.child_epochs * len(self.batches))
        phases: dict[str, Any] = {'train': self.train, 'score': self.score, 'fit': self.fit, 'propose': self.propose,
                                  'rank': self.rank}
        while self.phase in phases:
            phases[self.phase]()
            self.save()


def main() -> None:
    """Search to the end, from the checkpoint in the output directory if there is one."""
    args = parse_args()
    run = utils.Run(args)
    search = Search(args, run)
    search.load()
    run.open_output()
    run.log_start(search.supernet, utils.count_madds(search.supernet, search.task.valid_batches.size, search.pool[0]))
    search.search()
    if search.ranked:
        run.log(f'finished: the best architecture is {max(search.ranked)[1]}; the ranked ones are in '
                f'{run.output_dir / "arch_pool.final"}, best first')


if __name__ == '__main__':
    utils.run_program(main)
