"""What a search is set up from: its flags, and what a data set brings to it."""

import argparse
import json
import math
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import architecture
import checkpoint
import controller
import costs
import datasets
import image_files
import training
from architecture import Architecture
from candidates import Recipe
from disk import need_file, read_records
from flags import (
    BATCH,
    CHANNELS,
    COUNT,
    FRACTION,
    KEEP,
    LAYERS,
    MANY,
    NODES,
    NOT_NEGATIVE,
    POOL,
    POSITIVE,
    POSITIVE_INT,
    Parser,
    UserError,
    add,
    add_run_flags,
    drop_without_effect,
    number,
    without_effect,
)
from model import AUX_HEAD_IMAGE, FixedNetwork, NASNetworkCIFAR, NASNetworkImageNet, check_image_size
from model_search import NASWSNetworkCIFAR, NASWSNetworkImageNet, Supernet
from proposers import PROPOSERS
from utils import WORK, Run

PAPER = controller.PRESETS['paper']
TRAIN_SHARE = 0.9  # of the training images; the rest validates
IMAGENET_RANK_STEPS = 500  # of training one of the best from scratch on ImageNet
RANK_KEEP_PROB, RANK_DROP_PATH_KEEP_PROB = 0.6, 0.8  # of the final trainings from scratch

NETWORK_FLAGS = '--child_channels, --child_layers, --child_nodes, --search_space and --controller_*'  # that decide parameters

METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    'NAO-WS': {'search_space': 'small'},
    'NAO-V2': {'search_space': 'small', 'child_epochs': 50, 'child_sampling': 'parameters', 'controller_seed_arch': 1000,
               'controller_expand': 10, 'controller_l2_reg': 0.0, 'controller_encoder_emb_size': 32,
               'controller_encoder_hidden_size': 64, 'controller_decoder_hidden_size': 64, 'controller_mlp_layers': 0},
    'NAO': {'search_space': 'large', 'child_batch_size': 128, 'child_epochs': 25, 'child_lr_epochs': 100, 'child_channels': 32,
            'child_lr_max': 0.024, 'child_lr_min': 0.0, 'child_l2_reg': 5e-4, 'child_drop_path_keep_prob': 0.7,
            'child_use_aux_head': True, 'controller_lambdas': (10, 20, 30)},
}
SAMPLING = ('uniform', 'parameters')  # how a supernet's step draws its architecture
NO_EFFECT = (  # flags of the reference that do nothing
    'mode', 'controller_optimizer', 'controller_source_length', 'controller_encoder_length', 'controller_encoder_vocab_size',
    'controller_decoder_length', 'controller_decoder_vocab_size')
SHARED, SMALL, SOME = ('NAO-WS', 'NAO-V2'), ('cifar10', 'cifar100', 'digits', 'folder'), range(1, MANY)
MATTERS = {  # flags that change something only where another one has one of these values
    'save_every': ('method', SHARED), 'rounds': ('method', ('NAO', 'NAO-V2')), 'child_eval_epochs': ('method', ('NAO-WS',)),
    'child_results': ('method', ('NAO',)), 'child_sampling': ('method', SHARED), 'child_rank_epochs': ('method', SHARED),
    'child_cutout_size': ('dataset', SMALL), 'child_lr_max': ('dataset', SMALL), 'child_lr_min': ('dataset', SMALL),
    'child_lr_epochs': ('dataset', SMALL), 'child_lr': ('dataset', ('imagenet',)), 'child_gamma': ('dataset', ('imagenet',)),
    'child_decay_period': ('dataset', ('imagenet',)), 'child_label_smooth': ('dataset', ('imagenet',)),
    'controller_beta': ('controller_candidates', SOME), 'controller_apart': ('controller_candidates', SOME)}
CONTROLLER_SIZES = ('encoder_layers', 'encoder_hidden_size', 'encoder_emb_size', 'encoder_dropout', 'mlp_layers',
                    'mlp_hidden_size', 'mlp_dropout', 'decoder_layers', 'decoder_hidden_size', 'decoder_dropout')


# ---------------------------------------------------------------------------------------------------------------- flags

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


CHILD_FLAGS = (  # name, type, default, help
    ('batch_size', BATCH, 64, 'images per step'),
    ('eval_batch_size', POSITIVE_INT, 500, 'validation images that an architecture is scored on'),
    ('epochs', POSITIVE_INT, 150, 'how often all images of the training split are seen; NAO-V2: in each iteration'),
    ('layers', LAYERS, 3, 'normal cells before, between and after the reduction cells'),
    ('nodes', NODES, 5, 'nodes of a cell'),
    ('channels', CHANNELS, 20, 'channels of the first cells'),
    ('cutout_size', COUNT, 0, 'side of the square that cutout zeroes; 0: none'),
    ('grad_bound', POSITIVE, 5.0, 'gradients are clipped to this norm'),
    ('lr_max', POSITIVE, 0.025, 'learning rate of the first epoch'),
    ('lr_min', NOT_NEGATIVE, 0.001, 'learning rate that the cosine ends at'),
    ('lr_epochs', POSITIVE_INT, None, 'epochs of the whole cosine, of which --child_epochs are trained (default: as many; '
     'NAO: 100)'),
    ('lr', POSITIVE, 0.1, 'imagenet: learning rate of the first epoch'),
    ('gamma', POSITIVE, 0.97, 'imagenet: factor of the learning rate'),
    ('decay_period', POSITIVE_INT, 1, 'imagenet: epochs between two such factors'),
    ('label_smooth', FRACTION, 0.1, 'imagenet: share of a label given to all classes'),
    ('keep_prob', KEEP, 1.0, '1 - dropout before the classifier'),
    ('drop_path_keep_prob', KEEP, 0.9, '1 - drop path of the last cell at the end'),
    ('l2_reg', NOT_NEGATIVE, 3e-4, 'weight decay'),
    ('eval_epochs', eval_epochs, 30, 'NAO-WS: score every N epochs, or after the epochs of a list such as [30,60]'),
    ('arch_pool', str, None, 'path of a pool file to start from (default: random architectures)'),
    ('results', str, None, 'NAO: path of a results.*.jsonl of a search with the same seed and sizes: what it has trained is '
     'not trained again'),
    ('rank_count', COUNT, 5, 'how many of the best are trained from scratch at the end'),
    ('rank_epochs', POSITIVE_INT, 10, 'epochs of each training from scratch; imagenet: one pass, at most 500 steps'),
)
CONTROLLER_FLAGS = (
    ('seed_arch', POOL, 600, 'architectures in the pool'),
    ('new_arch', POOL, 300, 'new architectures a round'),
    ('expand', POSITIVE_INT, None, 'N: write N-1 rewritten copies of each architecture and hold 10 %% out (default: '
     'rewrite them anew in each epoch, hold none out; NAO-V2: 10)'),
    ('epochs', POSITIVE_INT, PAPER.epochs, 'epochs of a fit'),
    ('later_updates', COUNT, PAPER.later_updates, 'gradient steps of the fits after the first'),
    ('later_per_token', NOT_NEGATIVE, PAPER.later_per_token, 'the same for each token of an architecture; the larger counts; '
     'both 0: all epochs again'),
    ('predictor_updates', COUNT, PAPER.predictor_updates, 'steps after each fit in which the predictor alone is fitted anew, '
     'from fresh weights; 0: it stays as fitted'),
    ('batch_size', POSITIVE_INT, PAPER.batch_size, 'architectures per step'),
    ('lr', POSITIVE, PAPER.lr, 'learning rate of Adam'),
    ('trade_off', FRACTION, PAPER.trade_off, 'weight of the prediction loss; the rest weighs the reconstruction'),
    ('l2_reg', NOT_NEGATIVE, PAPER.l2_reg, 'weight decay'),
    ('grad_bound', POSITIVE, PAPER.grad_bound, 'gradients are clipped to this norm'),
    ('members', POSITIVE_INT, PAPER.members, 'controllers, each fitted on its own'),
    ('unlabelled', COUNT, PAPER.unlabelled, 'random architectures a step to reconstruct; 0: those of the batch'),
    ('top', POSITIVE_INT, PAPER.top, 'the best architectures, from which the ascent starts'),
    ('redrawn', COUNT, PAPER.redrawn, 'starts of the ascent more: the best with random tokens redrawn'),
    ('candidates', COUNT, PAPER.candidates, 'architectures that each controller writes to choose from by their predictions; '
     '0: the first come are taken'),
    ('beta', NOT_NEGATIVE, PAPER.beta, "largest weight of the controllers' disagreement when candidates are chosen"),
    ('apart', FRACTION, PAPER.apart, 'share of its tokens in which a chosen candidate differs from all known and chosen'),
    ('encoder_layers', LAYERS, 1, 'LSTM layers of the encoder'),
    ('encoder_hidden_size', CHANNELS, 96, 'units of each of them'),
    ('encoder_emb_size', CHANNELS, 48, 'numbers that a token is embedded in'),
    ('encoder_dropout', FRACTION, 0.0, 'share of their inputs that is dropped'),
    ('mlp_layers', number(int, 0, 1000), 3, 'hidden layers of the performance predictor'),
    ('mlp_hidden_size', CHANNELS, 200, 'units of each of them'),
    ('mlp_dropout', FRACTION, 0.1, 'share of their outputs that is dropped'),
    ('decoder_layers', LAYERS, 1, 'LSTM layers of the decoder'),
    ('decoder_hidden_size', CHANNELS, 96, 'units of each of them'),
    ('decoder_dropout', FRACTION, 0.0, 'share of their inputs that is dropped'),
)


def parse_args() -> argparse.Namespace:
    """A search's flags; --method and --controller_preset choose the defaults of others. Raises UserError."""
    parser = Parser('Search for an architecture by NAO-WS, NAO-V2 or NAO.')
    add_run_flags(parser, output_dir='exp/search_cifar10')
    add(parser, 'method', 'NAO-WS: with weight sharing; NAO-V2: the same, in iterations that train on new architectures alone; '
        'NAO: every candidate is trained on its own', 'NAO-WS', choices=METHOD_DEFAULTS)
    add(parser, 'search_space', 'operations to choose from: small for NAO-WS and NAO-V2, large for NAO',
        choices=architecture.SEARCH_SPACES)
    add(parser, 'proposer', 'who proposes new architectures: the controller, or the baselines random search and regularised '
        'evolution', 'controller', choices=PROPOSERS)
    add(parser, 'rounds', 'NAO, NAO-V2: rounds of new architectures after the first', 3, type=COUNT)
    datasets.add_flags(parser, others=['imagenet'])
    add(parser, 'train_images', 'use so many of the training images, drawn by the seed, as many of each class as it goes',
        type=BATCH)
    add(parser, 'valid_images', 'validate on so many of the other training images; 0: a tenth of those that are used '
        'validates', 0, type=COUNT)
    image_files.add_flags(parser)
    group = parser.add_argument_group('child: the weight-sharing network, or each candidate')
    for name, kind, default, text in CHILD_FLAGS:
        add(group, f'child_{name}', text, default, type=kind)
    add(group, 'child_use_aux_head', 'train with the auxiliary head', False, action=argparse.BooleanOptionalAction)
    add(group, 'child_sampling', "NAO-WS, NAO-V2: an architecture is drawn for a step uniformly, or by its network's number of "
        'parameters', 'uniform', choices=SAMPLING)
    add_controller_flags(parser)
    costs.add_flags(parser)
    first = early_flags('method', 'dataset')
    if first.dataset:
        parser.set_defaults(output_dir=f'exp/search_{first.dataset}')
    parser.set_defaults(**METHOD_DEFAULTS.get(first.method, METHOD_DEFAULTS['NAO-WS']))
    set_preset(parser)
    without_effect(parser, *NO_EFFECT)
    args = parser.parse_args()
    drop_without_effect(args, *NO_EFFECT)
    check(args)
    return args


def add_controller_flags(parser: Parser, without: Collection[str] = ()) -> None:
    """The flags of the controller, but those of a search that a program has no use for."""
    group = parser.add_argument_group('controller')
    for name, kind, default, text in CONTROLLER_FLAGS:
        if name not in without:
            add(group, f'controller_{name}', text, default, type=kind)
    add(group, 'controller_targets', 'scaled: accuracies by their minimum and maximum; ranks: the share of others each one '
        'beats', PAPER.targets, choices=controller.TARGETS)
    add(group, 'controller_rewriting', 'in each epoch, operands: swap the operands of one node a cell; nodes: write cells in '
        'any of the ways that build the same network', PAPER.rewriting, choices=architecture.REWRITINGS)
    add(group, 'controller_loss', 'of the prediction', PAPER.loss, choices=controller.LOSSES)
    group.add_argument('--controller_lambdas', type=lambdas, default=PAPER.lambdas, metavar='[λ,...]',
                       help='step sizes of the ascent, until there are enough new architectures (default: [1,2,...,50] for '
                       'NAO-WS and NAO-V2, [10,20,30] for NAO)')
    add(group, 'controller_preset', 'best: values of these flags that find good architectures with fewer evaluations', 'paper',
        choices=controller.PRESETS)


def early_flags(*names: str) -> argparse.Namespace:
    """Flags of the command line that choose the defaults of others, so that --help shows these; None where they are not."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        early.add_argument(f'--{name}', nargs='?')
    return early.parse_known_args()[0]


def set_preset(parser: Parser) -> None:
    """Make the values of --controller_preset the defaults of its flags; the paper's are theirs already."""
    name = early_flags('controller_preset').controller_preset
    if name not in (None, 'paper') and name in controller.PRESETS:
        parser.set_defaults(**{f'controller_{flag}': value for flag, value in controller.PRESETS[name]._asdict().items()})


def check_controller(args: argparse.Namespace) -> None:
    """Raise UserError if the controller's flags do not go together."""
    if args.controller_encoder_hidden_size != args.controller_decoder_hidden_size:
        raise UserError('--controller_encoder_hidden_size and --controller_decoder_hidden_size must be equal: the decoder '
                        'starts from the embedding')


def check(args: argparse.Namespace) -> None:
    """Raise UserError if a search's flags do not go together."""
    if args.method != 'NAO' and args.search_space != 'small':
        raise UserError(f'--search_space={args.search_space}: the weight-sharing network has the operations of the small '
                        'space; use --method=NAO for others')
    check_controller(args)
    if args.child_lr_min > args.child_lr_max:
        raise UserError(f'--child_lr_min={args.child_lr_min:g} is above --child_lr_max={args.child_lr_max:g}')
    if args.child_results and args.method == 'NAO':
        given = Path(args.child_results)
        if not given.is_file():
            raise UserError(f'--child_results={given}: there is no such file')
        if WORK.fullmatch(given.name) and given.resolve().parent == Path(args.output_dir).resolve():
            raise UserError(f'--child_results={given}: is of --output_dir itself, which needs no flag to go on and puts '
                            'results aside to begin anew; copy it to another place')
        for result in read_records(given, {}):
            if result['kind'] == 'candidate' and result.get('epochs', args.child_epochs) != args.child_epochs:
                raise UserError(f'--child_results={given}: has trainings of {result["epochs"]} epochs; give --child_epochs='
                                f'{result["epochs"]}, or leave it out')
    listed = args.child_eval_epochs if isinstance(args.child_eval_epochs, list) else []
    if args.method == 'NAO-WS' and listed and max(listed) > args.child_epochs:
        raise UserError(f'--child_eval_epochs names epoch {max(listed)}, but there are {args.child_epochs} epochs')


def without_use(args: argparse.Namespace) -> list[str]:
    """A line for each flag that was given and changes nothing, by MATTERS."""
    return [f'--{flag}={getattr(args, flag)} has no effect with --{other}={value}' for flag, (other, values) in MATTERS.items()
            if flag in args.changed and (value := getattr(args, other)) not in values]


def settings_of(args: argparse.Namespace) -> controller.Settings:
    """How the flags say that controllers are fitted and used."""
    return controller.Settings(**{name: getattr(args, f'controller_{name}') for name in PAPER._fields})


def build_controllers(args: argparse.Namespace, vocabulary: architecture.Vocabulary,
                      device: torch.device) -> list[controller.NAO]:
    """The controllers that the flags ask for, --controller_members of them, on the device."""
    allowed, sizes = vocabulary.allowed_tokens, {name: getattr(args, f'controller_{name}') for name in CONTROLLER_SIZES}
    return [controller.NAO(allowed, vocabulary.size, len(allowed) // 2, **sizes).to(device)
            for _ in range(args.controller_members)]


def fill_controllers(naos: list[controller.NAO], state: dict[str, Any], path: Path, flags: str = NETWORK_FLAGS) -> None:
    """Load the weights of a checkpoint's controllers; raises UserError if they are others. flags: those that decide it."""
    if len(state['controller']) != len(naos):
        raise UserError(f'{path} has {len(state["controller"])} controllers; give the --controller_members and '
                        '--controller_preset that it began with')
    for nao, weights in zip(naos, state['controller'], strict=True):
        checkpoint.fill_model(nao, weights, path, flags)


def first_pool(args: argparse.Namespace, space: architecture.Vocabulary, run: Run,
               budget: costs.Budget) -> list[Architecture]:
    """The pool of a file that the user names or has left in --output_dir, or a random one; within the budget, none twice.

    Raises UserError.
    """
    left = Path(args.output_dir) / 'arch_pool'
    path = args.child_arch_pool or (left if left.exists() else None)
    if not path:
        count = args.controller_seed_arch
        return costs.sample(count, space, run.generators['search'], budget, needed=count)
    try:
        pool = architecture.read_pool(path, space.nodes, space.operations, budget.check)
    except architecture.ArchitectureError as error:
        raise UserError(f'--child_arch_pool: {error}' if args.child_arch_pool else
                        f'{error}; a search starts from the arch_pool of its --output_dir, name another') from None
    need_file(left)
    if left.exists() and Path(path).read_bytes() != left.read_bytes():
        raise UserError(f'--child_arch_pool={path}: {left} is another pool, which would be overwritten; move it away, or name '
                        'another --output_dir')
    distinct = list(dict.fromkeys(pool))
    if len(distinct) < len(pool):
        run.log(f'{path}: {len(pool) - len(distinct)} of its {len(pool)} lines repeat others and are left out')
    run.log(f'the search starts from the {len(distinct)} architectures of {path}')
    return distinct


# ----------------------------------------------------------------------------------------------------------------- data

class Task(NamedTuple):
    """What a data set brings to a search."""

    classes: int
    image_size: int  # pixels of a side
    supernet: type[Supernet]
    network: type[FixedNetwork]
    candidate: Recipe  # how NAO trains each candidate; a supernet sees the same batches, at the same rates
    ranking: Recipe  # how the best are trained from scratch at the end, as the found one will be
    images: int  # datasets.fingerprint of those that train and validate


def split_images(labels: Any, args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the images that train and of those that validate, shuffled by the seed.

    --train_images of all are used, or all; --valid_images of the others validate, or a share of those used. Raises UserError.
    """
    used = (args.train_images or len(labels) - args.valid_images) + args.valid_images
    if not args.valid_images < used <= len(labels):
        raise UserError(f'--train_images={args.train_images} --valid_images={args.valid_images}, but there are {len(labels)}')
    chosen = datasets.draw_balanced(labels, used, args.seed)
    first = used - args.valid_images if args.valid_images else int(TRAIN_SHARE * used)
    train, valid = datasets.shuffled_split(used, first, args.seed)
    if not len(train):
        raise UserError(f'--data={args.data}: a search needs at least 2 images in train, of which it validates with some')
    return chosen[train], chosen[valid]


def cosine_of(args: argparse.Namespace, epochs: int) -> Callable[[int], float]:
    """The learning rate of each epoch of a cosine over `epochs`."""
    return partial(training.cosine, epochs=epochs, lr_max=args.child_lr_max, lr_min=args.child_lr_min)


def open_small_images(args: argparse.Namespace, run: Run) -> Task:
    """CIFAR, digits or a folder of small images."""
    data = run.first_alone(partial(datasets.load, args.dataset, args.data, True, run.device, flip=args.flip,
                                   folder=datasets.Folder(args.zip_file, args.image_size, show=run.is_first)))
    train_set, valid_set = map(data.select, split_images(data.labels, args))
    check_image_size(data.size, args.child_use_aux_head)

    def train_batches(run: Run) -> Iterable:
        return datasets.TrainBatches(train_set, args.child_batch_size, run.generators['data'], args.child_cutout_size, run.rank,
                                     run.world)

    def valid_batches(run: Run) -> Iterable:
        return datasets.EvalBatches(valid_set, args.child_eval_batch_size, run.rank, run.world)

    def network(keep_prob: float, drop_path_keep_prob: float, use_aux_head: bool) -> Callable:
        return partial(build, args, NASNetworkCIFAR, len(data.classes), keep_prob, drop_path_keep_prob, use_aux_head)
    candidate = Recipe(
        kind='candidate', build=network(args.child_keep_prob, args.child_drop_path_keep_prob, args.child_use_aux_head),
        train_batches=train_batches, valid_batches=valid_batches, l2_reg=args.child_l2_reg, flags=NETWORK_FLAGS,
        epochs=args.child_epochs,
        lr=cosine_of(args, max(args.child_lr_epochs or 0, args.child_epochs)), grad_bound=args.child_grad_bound,
        best_epoch=True)
    iterations = args.rounds + 1 if args.method == 'NAO-V2' else 1
    ranking = candidate._replace(
        kind='rank', build=network(RANK_KEEP_PROB, RANK_DROP_PATH_KEEP_PROB, data.size >= AUX_HEAD_IMAGE),
        epochs=args.child_rank_epochs, lr=cosine_of(args, args.child_rank_epochs), best_epoch=False,
        steps=args.child_epochs * iterations * len(train_batches(run)))
    return Task(len(data.classes), data.size, NASWSNetworkCIFAR, NASNetworkCIFAR, candidate, ranking,
                datasets.fingerprint(data.labels, data.classes))


def open_imagenet(args: argparse.Namespace, run: Run) -> Task:
    """ImageNet or another folder of images of any size."""
    train_files, valid_files, classes = image_files.open_files(args.data, args.zip_file, args.lazy_load, args.seed,
                                                               run.store, run.is_first, validates=False)
    train, valid = split_images(train_files.labels, args)

    def train_batches(run: Run) -> Iterable:
        return image_files.FileBatches(train_files, args.child_batch_size, run.device, args.workers, train,
                                       run.generators['data'], run.rank, run.world)

    def valid_batches(run: Run) -> Iterable:
        return image_files.FileBatches(valid_files, args.child_eval_batch_size, run.device, args.workers, valid, rank=run.rank,
                                       world=run.world)

    def network(keep_prob: float, drop_path_keep_prob: float, use_aux_head: bool) -> Callable:
        return partial(build, args, NASNetworkImageNet, len(classes), keep_prob, drop_path_keep_prob, use_aux_head)
    candidate = Recipe(
        kind='candidate', build=network(args.child_keep_prob, args.child_drop_path_keep_prob, args.child_use_aux_head),
        train_batches=train_batches, valid_batches=valid_batches, l2_reg=args.child_l2_reg, flags=NETWORK_FLAGS,
        epochs=args.child_epochs,
        lr=partial(training.step_decay, lr=args.child_lr, gamma=args.child_gamma, decay_period=args.child_decay_period),
        grad_bound=args.child_grad_bound, label_smooth=args.child_label_smooth, best_epoch=True)
    ranking = candidate._replace(
        kind='rank', build=network(1.0, 1.0, True), epochs=1, lr=lambda epoch: args.child_lr, label_smooth=0.0,
        best_epoch=False, max_steps=IMAGENET_RANK_STEPS)
    return Task(len(classes), image_files.IMAGE_SIZE, NASWSNetworkImageNet, NASNetworkImageNet, candidate, ranking,
                datasets.fingerprint(train_files.labels, classes))


def budget_of(args: argparse.Namespace, task: Task) -> costs.Budget:
    """What the architectures of a search may cost."""
    own = 'imagenet' if args.dataset == 'imagenet' else 'cifar'
    return costs.budget_of(args, own, classes=task.classes, image_size=task.image_size)


def open_task(args: argparse.Namespace, run: Run) -> Task:
    """What --dataset brings to a search. Raises UserError."""
    return (open_imagenet if args.dataset == 'imagenet' else open_small_images)(args, run)


def build(args: argparse.Namespace, network: type[FixedNetwork], classes: int, keep_prob: float, drop_path_keep_prob: float,
          use_aux_head: bool, arch: Architecture, steps: int) -> FixedNetwork:
    """The network of an architecture in the search's size; steps: those that drop path's schedule counts."""
    return network(classes, args.child_layers, args.child_nodes, args.child_channels, keep_prob, drop_path_keep_prob,
                   use_aux_head, steps, arch)


def parameter_counter(args: argparse.Namespace, task: Task) -> Callable[[Architecture], int]:
    """What counts the parameters of an architecture's network in the search's size, the auxiliary head left out."""
    count = costs.counter(costs.Size(task.network, args.child_layers, args.child_channels, task.classes, task.image_size))
    return lambda arch: count(arch).parameters
