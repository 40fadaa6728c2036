"""Search for an architecture by NAO-WS or by NAO, the complete way (paper, section 3 and appendix; Algorithm 1).

    python train_search.py --output_dir=exp/search_cifar10       # search; again: goes on where it stopped
    python train_search.py --method=NAO --output_dir=exp/nao     # every candidate is trained on its own
    torchrun --nproc_per_node=4 train_search.py ...              # on four GPUs; --nnodes for several machines
    python train_cifar.py --fixed_arc=exp/search_cifar10/arch_pool.final --use_aux_head --cutout_size=16

NAO-WS: a supernet trains on random architectures of a pool; now and then every architecture of the pool is scored, the
controller learns which are good and writes new ones, which replace the worst; at last the best are trained from scratch and
ranked. A search is a sequence of phases, and the checkpoint says which comes next:

    NAO-WS  train (until the next scoring) -> score -> fit -> propose -> train ... score -> rank -> done
    NAO     evaluate (train the candidates) -> fit -> propose -> evaluate ... -> rank -> done
"""

import argparse
import contextlib
import copy
import datetime
import json
import math
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import architecture
import controller
import datasets
import image_files
import utils
from architecture import Architecture
from model import FixedNetwork, NASNetworkCIFAR, NASNetworkImageNet
from model_search import NASWSNetworkCIFAR, NASWSNetworkImageNet, Supernet

PAPER = controller.PRESETS['paper']
TRAIN_SHARE = 0.9  # of the training images; the rest validates
IMAGENET_RANK_STEPS = 500  # of training one of the best from scratch on ImageNet
RANK_KEEP_PROB, RANK_DROP_PATH_KEEP_PROB = 0.6, 0.8  # of the final trainings from scratch

FLAGS = '--child_channels, --child_layers, --child_nodes, --search_space and --controller_*'  # that decide parameters


def lambdas(text: str) -> tuple[float, ...]:
    """The argparse type of --controller_lambdas: a list of step sizes such as [10,20,30]."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, list) or not value or any(type(step) not in (int, float) or not 0 < step < math.inf
                                                       for step in value):
        raise argparse.ArgumentTypeError(f'must be a list of numbers above 0 such as [10,20,30], not {text!r}')
    return tuple(value)


METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    'NAO-WS': {'search_space': 'small'},
    'NAO': {'search_space': 'large', 'child_epochs': 25, 'child_channels': 32, 'child_lr_max': 0.024, 'child_lr_min': 0.0,
            'child_drop_path_keep_prob': 0.7, 'child_use_aux_head': True, 'controller_lambdas': (10, 20, 30)},
}
CONTROLLER_SIZES = ('encoder_layers', 'encoder_hidden_size', 'encoder_emb_size', 'encoder_dropout', 'mlp_layers',
                    'mlp_hidden_size', 'mlp_dropout', 'decoder_layers', 'decoder_hidden_size', 'decoder_dropout')


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
    parser = utils.Parser('Search for an architecture by NAO-WS or NAO.')
    utils.add_run_arguments(parser, output_dir='exp/search_cifar10')
    parser.add_argument('--method', choices=METHODS, default='NAO-WS', help='NAO-WS: with weight sharing; NAO: every candidate '
                        'is trained on its own')
    parser.add_argument('--search_space', choices=architecture.SEARCH_SPACES,
                        help='operations to choose from: small for NAO-WS, large for NAO')
    parser.add_argument('--rounds', type=utils.POSITIVE_INT, default=3, help='NAO: rounds of new candidates after the first')
    group = parser.add_argument_group('images')
    group.add_argument('--dataset', choices=[*datasets.SOURCES, 'imagenet'], default='cifar10',
                       help='imagenet: any folder of images in class folders, see --data')
    image_files.add_flags(parser)
    group = parser.add_argument_group('child: the weight-sharing network')
    for name, kind, default, text in (
            ('batch_size', utils.BATCH, 64, 'images per step'),
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
    group.add_argument('--child_use_aux_head', action=argparse.BooleanOptionalAction, default=False,
                       help='train with the auxiliary head')
    group = parser.add_argument_group('controller')
    for name, kind, default, text in (
            ('seed_arch', utils.POSITIVE_INT, 600, 'architectures in the pool'),
            ('new_arch', utils.POSITIVE_INT, 300, 'new architectures a round'),
            ('expand', utils.POSITIVE_INT, None, 'N: write N-1 copies of each architecture with swapped operands and hold '
             '10 %% out (default: swap anew in each epoch, hold none out)'),
            ('epochs', utils.POSITIVE_INT, PAPER.epochs, 'epochs of a fit'),
            ('later_updates', utils.COUNT, PAPER.later_updates, 'gradient steps of the fits after the first; 0: all '
             'epochs again'),
            ('batch_size', utils.POSITIVE_INT, PAPER.batch_size, 'architectures per step'),
            ('lr', utils.POSITIVE, PAPER.lr, 'learning rate of Adam'),
            ('trade_off', utils.FRACTION, PAPER.trade_off, 'weight of the prediction loss; the rest weighs the reconstruction'),
            ('l2_reg', utils.NOT_NEGATIVE, PAPER.l2_reg, 'weight decay'),
            ('grad_bound', utils.POSITIVE, PAPER.grad_bound, 'gradients are clipped to this norm'),
            ('members', utils.POSITIVE_INT, PAPER.members, 'controllers, each fitted on its own'),
            ('unlabelled', utils.COUNT, PAPER.unlabelled, 'random architectures a step to reconstruct; 0: those of the batch'),
            ('top', utils.POSITIVE_INT, PAPER.top, 'the best architectures, from which the ascent starts'),
            ('candidates', utils.COUNT, PAPER.candidates, 'architectures that each controller writes to choose from by their '
             'predictions; 0: the first come are taken'),
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
    group.add_argument('--controller_targets', choices=controller.TARGETS, default=PAPER.targets,
                       help='scaled: accuracies by their minimum and maximum; ranks: the share of others each one beats')
    group.add_argument('--controller_loss', choices=controller.LOSSES, default=PAPER.loss, help='of the prediction')
    group.add_argument('--controller_lambdas', type=lambdas, default=PAPER.lambdas, metavar='[λ,...]',
                       help='step sizes of the ascent, until there are enough new architectures (default: [1,2,...,50] for '
                       'NAO-WS, [10,20,30] for NAO)')
    group.add_argument('--controller_preset', choices=controller.PRESETS, default='paper', help='best: values of these '
                       'flags that find good architectures with fewer evaluations')
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # --help shows the defaults of these
    early.add_argument('--method', nargs='?', default='NAO-WS')
    early.add_argument('--controller_preset', nargs='?', default='paper')
    first, _ = early.parse_known_args()
    preset = controller.PRESETS.get(first.controller_preset, PAPER)
    parser.set_defaults(**METHOD_DEFAULTS.get(first.method, {}))
    if preset != PAPER:
        parser.set_defaults(**{f'controller_{name}': value for name, value in preset._asdict().items()})
    args = parser.parse_args()
    if args.method == 'NAO-WS' and args.search_space != 'small':
        raise utils.UserError(f'--search_space={args.search_space}: the weight-sharing network has the operations of the small '
                              'space; use --method=NAO for others')
    if args.controller_encoder_hidden_size != args.controller_decoder_hidden_size:
        raise utils.UserError('--controller_encoder_hidden_size and --controller_decoder_hidden_size must be equal: the '
                              'decoder starts from the embedding')
    return args


def write_lines(path: Path, lines: list) -> None:
    """Write a pool file in one go: a reader sees the old one or the new one."""
    temporary = path.with_name(path.name + '.tmp')
    temporary.write_text(''.join(f'{line}\n' for line in lines))
    temporary.replace(path)


def append_line(path: Path, line: str) -> None:
    """Append a line to a file and see it to the disk; it stays apart from a last line that was cut off."""
    with open(path, 'ab+') as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        cut_off = file.read() not in (b'', b'\n')
        file.write(('\n' * cut_off + line + '\n').encode())
        file.flush()
        os.fsync(file.fileno())


class Task(NamedTuple):
    """What a data set brings to a search."""

    classes: int
    supernet: type[Supernet]
    network: type[FixedNetwork]
    train_batches: Callable[[utils.Run], Iterable]  # batches of the training split, drawn from a run's generators
    valid_batches: Callable[[utils.Run], Iterable]
    lr: Callable[[int], float]  # epoch, from 0 -> the supernet's learning rate
    label_smooth: float
    rank_options: dict[str, Any]  # of utils.fit, for training one of the best from scratch


def open_small_images(args: argparse.Namespace, run: utils.Run) -> Task:
    """CIFAR or digits: the first 90 % of the training images train, the rest validates."""
    data = run.first_alone(partial(datasets.load, args.dataset, args.data, True, run.device))
    split = int(TRAIN_SHARE * len(data))
    rates = {'lr_max': args.child_lr_max, 'lr_min': args.child_lr_min}
    train_set, valid_set = data.select(range(split)), data.select(range(split, len(data)))

    def train_batches(run: utils.Run) -> Iterable:
        return datasets.TrainBatches(train_set, args.child_batch_size, run.generators['data'], args.child_cutout_size, run.rank,
                                     run.world)

    def valid_batches(run: utils.Run) -> Iterable:
        return datasets.EvalBatches(valid_set, args.child_eval_batch_size, run.rank, run.world)
    return Task(
        datasets.SOURCES[args.dataset].classes, NASWSNetworkCIFAR, NASNetworkCIFAR, train_batches, valid_batches,
        partial(utils.cosine, epochs=args.child_epochs, **rates), 0.0,
        {'epochs': args.child_rank_epochs, 'lr': partial(utils.cosine, epochs=args.child_rank_epochs, **rates)})


def open_imagenet(args: argparse.Namespace, run: utils.Run) -> Task:
    """ImageNet or another folder of images: a random 90 % of the training images train, the rest validates."""
    train_files, valid_files, classes = image_files.open_files(args.data, args.zip_file, args.lazy_load, args.seed,
                                                            utils.processes_here(), run.is_first, validates=False)
    order = torch.randperm(len(train_files), generator=torch.Generator().manual_seed(args.seed))
    split = int(TRAIN_SHARE * len(order))
    if not split:
        raise utils.UserError(f'--data={args.data}: a search needs at least 2 images in train, of which it validates with some')

    def train_batches(run: utils.Run) -> Iterable:
        return image_files.FileBatches(train_files, args.child_batch_size, run.device, args.workers, order[:split],
                                    run.generators['data'], run.rank, run.world)

    def valid_batches(run: utils.Run) -> Iterable:
        return image_files.FileBatches(valid_files, args.child_eval_batch_size, run.device, args.workers, order[split:],
                                    rank=run.rank, world=run.world)
    epochs = math.ceil(IMAGENET_RANK_STEPS / len(datasets.training_bounds(split, args.child_batch_size, run.world)))
    return Task(
        len(classes), NASWSNetworkImageNet, NASNetworkImageNet, train_batches, valid_batches,
        partial(utils.step_decay, lr=args.child_lr, gamma=args.child_gamma, decay_period=args.child_decay_period),
        args.child_label_smooth,
        {'epochs': epochs, 'lr': lambda epoch: args.child_lr, 'max_steps': math.ceil(IMAGENET_RANK_STEPS / epochs)})


@torch.no_grad()
def score_pool(run: utils.Run, supernet: Supernet, pool: Sequence[Architecture], images: torch.Tensor,
               labels: torch.Tensor) -> list[float]:
    """The accuracy, 0-1, of each architecture on one batch, normalised by the batch's statistics.

    Of several processes each scores its share of the pool.
    """
    supernet.eval()
    right = torch.zeros(len(pool), device=run.device)
    for index in range(run.rank, len(pool), run.world):
        with run.autocast():
            logits, _ = supernet(images, pool[index], bn_train=True)
        right[index] = (logits.argmax(1) == labels).sum()
        progress = f'scored {index + 1}/{len(pool)} architectures'
        if (index + 1) % utils.LOG_EVERY == 0:
            run.log(progress)
        elif run.live.due:
            run.live.show(progress)
    return [count / len(labels) for count in run.sum(right).tolist()]


class Search:
    """What both methods share: the pool, the controller that learns from it, and trainings from scratch.

    A search is a sequence of phases; each is a method that ends by naming the next one in `phase`, and a checkpoint is
    written after each.
    """

    phases: tuple[str, ...]
    fields: tuple[str, ...] = ('phase', 'accuracies', 'fits')  # what a checkpoint holds beside networks and pool
    extent: str  # the flag that says how long the search goes on

    def __init__(self, args: argparse.Namespace, run: utils.Run):
        self.args, self.run = args, run
        self.vocabulary = architecture.vocabulary(args.child_nodes, args.search_space)
        self.pool = [] if os.path.exists(self.checkpoint) else self.first_pool()  # `load` takes the checkpoint's
        self.accuracies: list[float] = []
        self.task = (open_imagenet if args.dataset == 'imagenet' else open_small_images)(args, run)
        allowed = self.vocabulary.allowed_tokens
        sizes = {name: getattr(args, f'controller_{name}') for name in CONTROLLER_SIZES}
        self.settings = controller.Settings(**{name: getattr(args, f'controller_{name}') for name in PAPER._fields})
        self.naos = [controller.NAO(allowed, self.vocabulary.size, len(allowed) // 2, **sizes).to(run.device)
                     for _ in range(self.settings.members)]
        self.fits = 0
        self.broadcast_naos()
        self.phase, self.resumed = self.phases[0], None

    def broadcast_naos(self) -> None:
        """Give the first process's controllers to all."""
        for nao in self.naos:
            self.run.broadcast(nao)

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

    def load(self) -> dict[str, Any] | None:
        """Go on from the checkpoint in the output directory, if there is one; returns it."""
        state = self.run.together(lambda: utils.load_checkpoint(self.checkpoint) if os.path.exists(self.checkpoint) else None)
        if state is None:
            return None
        method = state['args'].get('method', self.args.method)
        if state.get('phase') not in (*self.phases, 'done') or method != self.args.method:
            raise utils.UserError(f'{self.checkpoint} is not the checkpoint of a search by --method={self.args.method}; name '
                                  'another --output_dir')
        utils.require(state, ('controller', 'pool', 'random', 'scaler', 'metrics_bytes', *self.fields), self.checkpoint)
        if len(state['controller']) != len(self.naos):
            raise utils.UserError(f'{self.checkpoint} has {len(state["controller"])} controllers; give the '
                                  '--controller_members and --controller_preset that the search began with')
        for nao, weights in zip(self.naos, state['controller'], strict=True):
            utils.load_model(nao, weights, self.checkpoint, FLAGS)
        self.pool = [architecture.parse(line) for line in state['pool']]
        for name in self.fields:
            setattr(self, name, state[name])
        if self.phase == 'done':
            self.phase = self.reopen(state['args'])
        self.resumed = {name: state[name] for name in ('args', 'random', 'scaler', 'metrics_bytes')}
        return state

    def reopen(self, saved: dict[str, Any]) -> str:
        """The phase in which a finished search goes on if the flags ask for more than those `saved` did; else 'done'."""
        if saved.get(self.extent, math.inf) < getattr(self.args, self.extent):
            return 'fit'
        ranked = self.results('rank')
        return 'done' if all(str(arch) in ranked for arch in self.pool[:self.args.child_rank_count]) else 'rank'

    def save(self, **more: Any) -> None:
        """Write the checkpoint."""
        state = self.run.state() | {
            'model': {}, 'optimizer': {}, 'epoch': self.number(), 'step': 0,
            'controller': [nao.state_dict() for nao in self.naos], 'pool': [str(arch) for arch in self.pool],
            'best_acc_top1': 100 * max(self.accuracies, default=0.0)}
        utils.save_checkpoint(self.run, state | {name: getattr(self, name) for name in self.fields} | more, self.checkpoint)

    def search(self) -> None:
        """Run phase after phase to the end, with a checkpoint before the first and after each."""
        if self.resumed:
            self.run.resume(self.resumed, f'{self.progress()}, next: {self.phase}')
        else:
            self.save()
        while self.phase in self.phases:
            getattr(self, self.phase)()
            self.save()
        final = self.run.output_dir / 'arch_pool.final'
        best = final.read_text().splitlines() if self.args.child_rank_count and final.exists() else []
        if best:
            self.run.log(f'finished: the best architecture is {best[0]}; the ranked ones are in {final}, best first')
        else:
            self.run.log(f'finished: none was trained from scratch to be ranked; the best by its score is {self.pool[0]}, the '
                         f'first of {self.run.output_dir / "arch_pool"}')

    def write_pool(self, suffix: str, pool: Sequence, accuracies: Sequence[float] | None = None) -> None:
        """Write arch_pool{suffix}, and arch_pool.perf{suffix} where there are accuracies."""
        if not self.run.is_first:
            return
        write_lines(self.run.output_dir / f'arch_pool{suffix}', pool)
        if accuracies is not None:
            write_lines(self.run.output_dir / f'arch_pool.perf{suffix}', accuracies)

    def sort_pool(self, accuracies: Sequence[float], number: int, what: str) -> None:
        """Sort the pool by its accuracies, best first, and write it as arch_pool and arch_pool.NUMBER."""
        order = sorted(range(len(self.pool)), key=lambda index: -accuracies[index])
        self.pool, self.accuracies = [self.pool[i] for i in order], [accuracies[i] for i in order]
        for suffix in (f'.{number}', ''):
            self.write_pool(suffix, self.pool, self.accuracies)
        mean = sum(accuracies) / len(accuracies)
        self.run.log(f'{what}: best {self.accuracies[0]:.4f}, mean {mean:.4f}, worst {self.accuracies[-1]:.4f}')
        self.run.write_metrics(kind='score', epoch=number, accuracies=self.accuracies, best_arch=str(self.pool[0]))

    def tokens(self, pool: Sequence[Architecture]) -> torch.Tensor:
        """The pool as the controller's sequences, (count, 8·nodes)."""
        return torch.tensor([self.vocabulary.encode(arch) for arch in pool], device=self.run.device)

    def fit(self) -> None:
        """Train the controller on the pool and its accuracies."""
        args, generator = self.args, self.run.generators['search']
        sequences = self.tokens(self.pool)
        targets = controller.TARGETS[self.settings.targets](self.accuracies).to(self.run.device)
        augment, held_out = architecture.swap_operands, None
        if args.controller_expand:
            order = torch.randperm(len(sequences), generator=generator).to(self.run.device)
            train, test = order[len(order) // 10:], order[:len(order) // 10]
            held_out = (sequences[test], targets[test]) if len(test) else None
            copies = [sequences[train]] + [architecture.swap_operands(sequences[train], generator)
                                           for _ in range(args.controller_expand - 1)]
            sequences, targets, augment = torch.cat(copies), targets[train].repeat(args.controller_expand, 1), None

        def report(values: dict[str, float]) -> None:
            self.run.log(f'controller epoch {values["epoch"]}/{values["epochs"]} loss {values["loss"]:.5f} pairwise '
                         f'accuracy {values["pairwise_accuracy"]:.4f} Hamming distance {values["hamming_distance"]:.4f}')
        values = controller.fit_all(self.naos, sequences, targets, self.settings, generator, first=not self.fits,
                                    augment=augment, held_out=held_out, report=report)
        if not math.isfinite(values['loss']):
            raise utils.NotFiniteError(f'the loss of the controller is {values["loss"]}; the last checkpoint is kept; a '
                                       'smaller --controller_lr may help')
        self.broadcast_naos()
        self.fits += 1
        self.run.write_metrics(kind='controller', search_epoch=self.number(), **values)
        self.phase = 'propose'

    def new_architectures(self, count: int) -> list[Architecture]:
        """Let the controller write up to `count` architectures that are not in the pool."""
        known = [self.vocabulary.encode(arch) for arch in self.pool]
        new, per_lambda = self.run.together(lambda: controller.propose(
            self.naos, self.tokens(self.pool[:self.settings.top]), known, count, self.settings))
        self.run.log(f'{len(new)} new architectures; written per λ: {per_lambda}')
        self.run.write_metrics(kind='new', epoch=self.number(), new=len(new), per_lambda=per_lambda)
        return [self.vocabulary.decode(tokens) for tokens in new]

    def rank(self) -> None:
        """Train the best architectures from scratch, as the found one will be, and write arch_pool.final, if there are any."""
        best = self.pool[:self.args.child_rank_count]
        accuracies = self.train_all('rank', best, RANK_KEEP_PROB, RANK_DROP_PATH_KEEP_PROB, True, self.task.rank_options)
        for index, (arch, accuracy) in enumerate(zip(best, accuracies, strict=True)):
            self.run.write_metrics(kind='rank', index=index, accuracy=accuracy, arch=str(arch))
        ranked = sorted(zip(accuracies, best, strict=True), key=lambda pair: -pair[0])
        if ranked:
            self.write_pool('.final', [arch for _, arch in ranked], [accuracy for accuracy, _ in ranked])
        self.phase = 'done'

    def train_all(self, kind: str, archs: Sequence[Architecture], keep_prob: float, drop_path_keep_prob: float,
                  use_aux_head: bool, options: dict[str, Any]) -> list[float]:
        """Train each architecture on its own and return their accuracies on the validation split, 0-1.

        Every process takes the next one that nobody has; a result is written to results.RANK.jsonl as soon as it is there
        and never made again. One that fails (out of memory, loss not finite) is logged and counts 0.
        """
        results = self.results(kind)
        todo = [arch for arch in dict.fromkeys(archs) if str(arch) not in results]
        for index in self.run.queue(f'{kind} {self.number()}', len(todo)):
            arch, start, more, alone = str(todo[index]), time.monotonic(), {}, self.run.alone()
            title = f'{kind} {len(archs) - len(todo) + index + 1}/{len(archs)} '
            try:
                accuracy = self.train_from_scratch(alone, kind, todo[index], title, keep_prob, drop_path_keep_prob,
                                                   use_aux_head, options)
            except (RuntimeError, utils.NotFiniteError) as error:
                torch.ones(1, device=self.run.device).sum().item()  # raises if it is the GPU: no candidate's fault
                accuracy, more = 0.0, {'error': str(error).partition('\n')[0]}
                alone.log(f'{title}failed and counts 0: {more["error"]}')
            append_line(self.run.output_dir / f'results.{self.run.rank}.jsonl', json.dumps(
                {'kind': kind, 'arch': arch, 'accuracy': accuracy, 'seconds': time.monotonic() - start, **more}))
            self.candidate_checkpoint(kind, arch).unlink(missing_ok=True)
        self.run.reseed(f'after {kind}', self.number())  # who trained what must not matter to what follows
        results = self.results(kind)
        return [results[str(arch)] for arch in archs]

    def results(self, kind: str) -> dict[str, float]:
        """Architecture -> accuracy, of all trainings of this kind that any process has finished."""
        mine = {}
        for path in sorted(self.run.output_dir.glob('results.*.jsonl')):
            for line in path.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # the last line of a process that was killed
                    result = json.loads(line)
                    if result['kind'] == kind:
                        mine[result['arch']] = result['accuracy']
        return {arch: accuracy for part in self.run.gather(mine) for arch, accuracy in part.items()}

    def candidate_checkpoint(self, kind: str, arch: str) -> Path:
        """Where an unfinished training from scratch is kept."""
        return self.run.output_dir / f'{kind}-{zlib.crc32(arch.encode()):08x}.pt'

    def train_from_scratch(self, run: utils.Run, kind: str, arch: Architecture, title: str, keep_prob: float,
                           drop_path_keep_prob: float, use_aux_head: bool, options: dict[str, Any]) -> float:
        """Train one architecture on the training split; its accuracy on the validation split, 0-1.

        All draws follow from --seed and the architecture, so that order, process and interruptions make no difference; a
        training that was interrupted goes on from its last epoch.
        """
        args, task, path = self.args, self.task, self.candidate_checkpoint(kind, str(arch))
        run.reseed(kind, str(arch))
        batches = task.train_batches(run)
        steps = options['epochs'] * utils.steps_of(batches, options.get('max_steps'))
        network = run.place(task.network(task.classes, args.child_layers, args.child_nodes, args.child_channels, keep_prob,
                                         drop_path_keep_prob, use_aux_head, steps, arch))
        optimizer, state = utils.sgd(run, network, args.child_l2_reg), None
        if os.path.exists(path):
            state = utils.load_checkpoint(path)
            utils.load_model(network, state['model'], path, FLAGS)
            utils.load_optimizer(optimizer, state['optimizer'], path)

        def after_epoch(epoch: int, step: int, training: dict, evaluation: dict) -> None:
            if epoch < options['epochs']:
                utils.save_checkpoint(run, run.state() | {'model': network.state_dict(), 'optimizer': optimizer.state_dict(),
                                                          'epoch': epoch, 'step': step}, path)
        values = utils.fit(run, network, optimizer, batches, task.valid_batches(run), title=title, split='valid', state=state,
                           after_epoch=after_epoch, grad_bound=args.child_grad_bound, label_smooth=task.label_smooth, **options)
        if not values:  # it was resumed with no more epochs than it had done
            values = utils.evaluate(run, network, task.valid_batches(run))
        return values['top1'] / 100

    def seconds_of_step(self, network: torch.nn.Module, batch_size: int, *extras: Any) -> float:
        """Seconds of a training step on a copy of a network; `extras` go to it after the images."""
        network = copy.deepcopy(network).train()
        images = torch.zeros(batch_size, 3, *[self.task.valid_batches(self.run).size] * 2, device=self.run.device)

        def step() -> None:
            with self.run.autocast():
                loss = network(images, *extras, 0)[0].sum()
            loss.backward()
        return utils.seconds_of(self.run, step)

    def rank_cost(self, step: float, batches: Iterable, count: int) -> tuple[str, float, int]:
        """The part of `log_cost` that ranks the best of `count` architectures, whose steps take `step` seconds each."""
        epochs = min(self.args.child_rank_count, count) * self.task.rank_options['epochs']
        steps = utils.steps_of(batches, self.task.rank_options.get('max_steps'))
        return f'{epochs} epochs of {steps} steps of the best', step, epochs * steps

    def log_cost(self, parts: list[tuple[str, float, int]]) -> None:
        """Log the formula of the search's cost, of (what, seconds of one, how many) parts, and its estimate."""
        batch = self.tokens(self.pool[:self.settings.batch_size])
        nao = copy.deepcopy(self.naos[0])

        def fit_step() -> None:
            prediction, log_probs = nao.reconstruct(batch)
            (prediction.sum() + log_probs.sum()).backward()
        sizes, expand = self.fitted(), self.args.controller_expand
        counts = [(size - size // 10) * expand for size in sizes] if expand else sizes
        steps = self.settings.members * sum(
            controller.fit_epochs(self.settings, count, not index) * math.ceil(count / self.settings.batch_size)
            for index, count in enumerate(counts))
        parts = [*parts, (f'{steps} steps of {len(sizes)} fits', utils.seconds_of(self.run, fit_step), steps)]
        total = sum(seconds * count for _, seconds, count in parts)
        terms = ' + '.join(f'{what} ({seconds:.3g} s each)' for what, seconds, _ in parts)
        self.run.log(f'cost, measured at the start: {terms}: about {datetime.timedelta(seconds=round(total))} in all')


class WeightSharingSearch(Search):
    """NAO-WS: a supernet trains on architectures of the pool, which it then scores."""

    phases = ('train', 'score', 'fit', 'propose', 'rank')
    fields = (*Search.fields, 'epoch', 'step')
    extent = 'child_epochs'

    def __init__(self, args: argparse.Namespace, run: utils.Run):
        super().__init__(args, run)
        self.batches = self.task.train_batches(run)
        self.supernet = run.place(self.task.supernet(
            self.task.classes, args.child_layers, args.child_nodes, args.child_channels, args.child_keep_prob,
            args.child_drop_path_keep_prob, args.child_use_aux_head, args.child_epochs * len(self.batches)))
        self.optimizer = utils.sgd(run, self.supernet, args.child_l2_reg)
        self.epoch, self.step = 0, 0

    def load(self) -> dict[str, Any] | None:
        """Go on from the checkpoint in the output directory, if there is one; returns it."""
        state = super().load()
        if state:
            utils.require(state, ('optimizer',), self.checkpoint)
            utils.load_model(self.supernet, state['model'], self.checkpoint, FLAGS)
            utils.load_optimizer(self.optimizer, state['optimizer'], self.checkpoint)
            self.step = self.epoch * len(self.batches)  # in today's steps, see utils.fit
        return state

    def save(self, **more: Any) -> None:
        """Write the checkpoint."""
        super().save(model=self.supernet.state_dict(), optimizer=self.optimizer.state_dict(), **more)
        every = self.args.save_every
        if self.run.is_first and every and self.epoch and self.epoch % every == 0 and self.phase in ('train', 'score'):
            shutil.copyfile(self.checkpoint, self.run.output_dir / f'checkpoint_{self.epoch}.pt')

    def number(self) -> int:
        """What this round's files are called by: epochs done."""
        return self.epoch

    def progress(self) -> str:
        """How far the search is, for the log."""
        return f'epoch {self.epoch}'

    def log_start(self) -> None:
        """Log sizes and arguments."""
        args, image_size = self.args, self.task.valid_batches(self.run).size
        self.run.log_start(self.supernet, utils.count_madds(self.supernet, image_size, self.pool[0]))
        if self.phase == 'done':
            return
        scored, steps = copy.deepcopy(self.supernet).eval(), len(self.batches)
        count = min(args.child_eval_batch_size, self.task.valid_batches(self.run).count)
        images = torch.zeros(count, 3, image_size, image_size, device=self.run.device)
        labels = torch.zeros(count, device=self.run.device)
        score = utils.seconds_of(self.run, lambda: score_pool(self.run.alone(), scored, self.pool[:1], images, labels))
        step = self.seconds_of_step(self.supernet, args.child_batch_size, self.pool[0])
        scorings = len(self.fitted()) + 1
        self.log_cost([
            (f'{args.child_epochs} epochs of {steps} steps', step, args.child_epochs * steps),
            (f'{scorings} scorings of {len(self.pool)} architectures', score, scorings * len(self.pool)),
            self.rank_cost(step, self.batches, len(self.pool))])

    def search(self) -> None:
        """Run phase after phase to the end."""
        self.parallel = self.run.parallel(self.supernet, shares_weights=True)
        self.clock = utils.Clock(self.step, self.args.child_epochs * len(self.batches))
        super().search()

    def fitted(self) -> list[int]:
        """How many architectures the controller is fitted to, each time."""
        return [len(self.pool) for epoch in range(1, self.args.child_epochs) if self.is_scored(epoch)]

    def is_scored(self, epoch: int) -> bool:
        """Whether the pool is scored after so many epochs."""
        every = self.args.child_eval_epochs
        return epoch == self.args.child_epochs or (epoch in every if isinstance(every, list) else epoch % every == 0)

    def train(self) -> None:
        """One epoch of the supernet, each step on an architecture drawn uniformly from the pool."""
        args = self.args
        if self.epoch >= args.child_epochs:  # it was resumed with fewer epochs
            self.phase = 'score'
            return
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

    def score(self) -> None:
        """Score the pool, all on one validation batch."""
        run, batches = self.run, self.task.valid_batches(self.run)
        chosen = torch.randperm(batches.count, generator=run.generators['search'])[:self.args.child_eval_batch_size]
        images, labels = batches.batch(chosen.to(run.device))
        accuracies = score_pool(run, self.supernet, self.pool, images, labels)
        run.average_statistics(self.supernet)  # which scoring updates, by each process's share of the pool
        self.sort_pool(accuracies, self.epoch, f'epoch {self.epoch}: scored {len(self.pool)} architectures on '
                       f'{len(labels)} images')
        self.phase = 'fit' if self.epoch < self.args.child_epochs else 'rank'

    def propose(self) -> None:
        """Put new architectures in place of the worst."""
        new = self.new_architectures(min(self.args.controller_new_arch, len(self.pool)))
        self.pool = self.pool[:len(self.pool) - len(new)] + new
        self.write_pool('', self.pool)
        self.phase = 'train'


class CompleteSearch(Search):
    """NAO, the complete way: each candidate is trained on its own, and the controller learns from all results so far."""

    phases = ('evaluate', 'fit', 'propose', 'rank')
    fields = (*Search.fields, 'round')
    extent = 'rounds'

    def __init__(self, args: argparse.Namespace, run: utils.Run):
        super().__init__(args, run)
        self.round = 0

    def number(self) -> int:
        """What this round's files are called by."""
        return self.round

    def progress(self) -> str:
        """How far the search is, for the log."""
        results = self.results('candidate')
        return f'{sum(str(arch) in results for arch in self.pool)} of {len(self.pool)} architectures in round {self.round}'

    def log_start(self) -> None:
        """Log the sizes of the first candidate, and arguments."""
        args, task = self.args, self.task
        network = self.run.place(task.network(task.classes, args.child_layers, args.child_nodes, args.child_channels, 1.0, 1.0,
                                              False, 1, self.pool[0]))
        self.run.log_start(network, utils.count_madds(network, task.valid_batches(self.run).size))
        if self.phase == 'done':
            return
        candidates = len(self.pool) + (args.rounds - self.round) * args.controller_new_arch
        batches = task.train_batches(self.run)
        steps = len(batches)
        step = self.seconds_of_step(network, args.child_batch_size) / self.run.world
        self.log_cost([
            (f'up to {candidates} candidates of {args.child_epochs} epochs of {steps} steps', step,
             candidates * args.child_epochs * steps),
            self.rank_cost(step, batches, candidates)])

    def fitted(self) -> list[int]:
        """How many architectures the controller is fitted to, each time; at most."""
        new = self.args.controller_new_arch
        return [max(1, len(self.pool) + (index - self.round) * new) for index in range(self.args.rounds)]

    def evaluate(self) -> None:
        """Train the candidates that have no result yet, and sort all results."""
        args = self.args
        accuracies = self.train_all('candidate', self.pool, args.child_keep_prob, args.child_drop_path_keep_prob,
                                    args.child_use_aux_head, {'epochs': args.child_epochs, 'lr': self.task.lr})
        self.sort_pool(accuracies, self.round, f'round {self.round}: trained {len(self.pool)} architectures so far')
        self.phase = 'fit' if self.round < args.rounds else 'rank'

    def propose(self) -> None:
        """Add new candidates to the pool."""
        new = self.new_architectures(self.args.controller_new_arch)
        self.pool, self.round = self.pool + new, self.round + 1
        self.write_pool('', self.pool)
        self.phase = 'evaluate' if new else 'rank'


METHODS: dict[str, type[Search]] = {'NAO-WS': WeightSharingSearch, 'NAO': CompleteSearch}


def main() -> None:
    """Search to the end, from the checkpoint in the output directory if there is one."""
    args = parse_args()
    run = utils.Run(args)
    search = METHODS[args.method](args, run)
    search.load()
    run.open_output(anew=search.resumed is None)
    search.log_start()
    search.search()


if __name__ == '__main__':
    utils.run_program(main)
