"""Your own evaluator: fit the controller to accuracies that you bring, and get architectures that it predicts to be better.

    python train_controller.py --new_arch=100                        # random ones to begin with: exp/controller/new_arch_pool
    python train_controller.py --arch_pool=pool --arch_pool_perf=accuracies --state=state.pt --new_arch=50

The pool is a file of architectures, one a line; the other has their accuracies, one a line, on any scale. new_arch_pool and
new_arch_pool.predicted in --output_dir are what to train next, and how accurate the controller expects it to be. With --state
the next fit goes on from this one. It is the search of train_search.py, of which the measuring is left to you.
"""

import argparse
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

import architecture
import checkpoint
import controller
import costs
import proposers
import search_setup
from architecture import Architecture, ArchitectureError, Vocabulary
from disk import read_lines, write_lines
from flags import NODES, POOL, Parser, UserError, add, add_machine_flags, directory, run_program
from proposers import Known
from utils import Run, commit

NEW, PREDICTED = 'new_arch_pool', 'new_arch_pool.predicted'  # the files that it writes
SIZE_FLAGS = '--controller_*, --nodes and --search_space'  # that decide a controller's parameters


def parse_args() -> argparse.Namespace:
    """The program's flags; --controller_preset chooses the defaults of others. Raises UserError."""
    parser = Parser('Fit the controller to accuracies of your own, and get new architectures.')
    add(parser, 'arch_pool', 'file of the architectures that are known, one a line (default: none is, and new ones are random)',
        metavar='FILE')
    add(parser, 'arch_pool_perf', 'file of their accuracies, one a line; any numbers of which larger ones are better',
        metavar='FILE')
    add(parser, 'new_arch', 'how many new architectures to write', 300, type=POOL)
    add(parser, 'state', 'file that the fit goes on from, if it is there, and leaves for the next one (default: it begins '
        'anew)', metavar='FILE')
    add(parser, 'nodes', 'nodes of a cell', 5, type=NODES)
    add(parser, 'search_space', 'operations to choose from', 'small', choices=architecture.SEARCH_SPACES)
    group = parser.add_argument_group('run')
    add(group, 'output_dir', 'directory of new_arch_pool, new_arch_pool.predicted and train.log', 'exp/controller',
        metavar='DIR', type=directory)
    add_machine_flags(group)
    parser.set_defaults(amp='off', tf32=None, layout='auto')  # of a Run
    search_setup.add_controller_flags(parser, without=('seed_arch', 'new_arch'))
    costs.add_flags(parser)
    search_setup.set_preset(parser)
    args = parser.parse_args()
    search_setup.check_controller(args)
    if (args.arch_pool is None) != (args.arch_pool_perf is None):
        raise UserError('--arch_pool and --arch_pool_perf go together: architectures, and their accuracies')
    if args.state and not args.arch_pool:
        raise UserError('--state is of fits, which need --arch_pool and --arch_pool_perf')
    if args.state and not (Path(args.state).parent.is_dir() or Path(args.state).parent == Path(args.output_dir)):
        raise UserError(f'--state={args.state}: there is no such directory')
    written = {(Path(args.output_dir) / name).resolve() for name in (NEW, PREDICTED)}
    for flag in ('arch_pool', 'arch_pool_perf', 'state'):
        if (path := getattr(args, flag)) and Path(path).resolve() in written:
            raise UserError(f'--{flag}={path}: is what this writes; give a copy of it, or another --output_dir')
    return args


def read_accuracies(path: str, count: int) -> list[float]:
    """The numbers of a file, one a line, of which there have to be `count`. Raises UserError."""
    try:
        lines = read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or 'not a text file'
        raise UserError(f'--arch_pool_perf: {path}: cannot be read ({reason})') from None
    accuracies = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                accuracies.append(float(line))
            except ValueError:
                accuracies.append(math.nan)
            if not math.isfinite(accuracies[-1]):
                raise UserError(f'--arch_pool_perf: {path}, line {number}: {line.strip()[:40]!r} is no accuracy; each line has '
                                'one number')
    if len(accuracies) != count:
        raise UserError(f'--arch_pool_perf: {path} has {len(accuracies)} accuracies, but --arch_pool has {count} architectures')
    return accuracies


def read_known(args: argparse.Namespace, space: Vocabulary) -> tuple[list[Architecture], list[float], int]:
    """The architectures that the flags name, each once, best first; their accuracies; how many lines repeated one of them.

    An architecture that stands there several times has the mean of its accuracies. Raises UserError.
    """
    try:
        pool = architecture.read_pool(args.arch_pool, space.nodes, space.operations)
    except ArchitectureError as error:
        raise UserError(f'--arch_pool: {error}') from None
    measured: dict[Architecture, list[float]] = {}
    for arch, accuracy in zip(pool, read_accuracies(args.arch_pool_perf, len(pool)), strict=True):
        measured.setdefault(arch, []).append(accuracy)
    means = {arch: fmean(accuracies) for arch, accuracies in measured.items()}
    best_first = sorted(means, key=lambda arch: -means[arch])
    return best_first, [means[arch] for arch in best_first], len(pool) - len(means)


def go_on(run: Run, naos: list[controller.NAO]) -> int:
    """Go on from --state, if it is there; returns how many fits came before. Raises UserError."""
    path = Path(run.args.state or '')
    if not run.args.state or not path.exists():
        return 0
    state = checkpoint.load(path, '--state')
    checkpoint.require(state, {'fits': int, 'told': int, 'controller': list, 'random': list}, path, flag='--state')
    checkpoint.same_run(state, run.args, path, '--state')
    search_setup.fill_controllers(naos, state, path, SIZE_FLAGS)
    run.restore_generators(state, f'fit {state["fits"]}')
    run.log(f'going on from {path}: fit {state["fits"]}, to {state["told"]} architectures')
    return state['fits']


def begin(run: Run) -> None:
    """Take the output directory, and log where and how this runs."""
    run.open_output(anew=False)
    run.log(f'{run.environment()}, commit {commit()}')
    run.log_arguments()
    for line in search_setup.without_use(run.args):
        run.log(line)


@torch.no_grad()
def predict(known: Known, new: list[Architecture]) -> list[float]:
    """The accuracies that the fitted controllers expect of new architectures, by their mean, on the scale of those known."""
    sequences = known.vocabulary.tokens(new, next(known.naos[0].parameters()).device)
    predictions = torch.cat([nao.eval().predict(sequences) for nao in known.naos], dim=1).mean(1).tolist()
    targets = controller.TARGETS[known.settings.targets](known.accuracies).flatten().tolist()
    return np.interp(predictions, targets[::-1], known.accuracies[::-1]).tolist()  # both fall: the pool is best first


def ask(run: Run, space: Vocabulary, budget: costs.Budget) -> tuple[list[Architecture], list[float] | None, dict[str, Any]]:
    """New architectures, what is expected of them, and the state of the fit; without a pool random ones alone."""
    args, generator = run.args, run.generators['search']
    if not args.arch_pool:
        new = costs.sample(args.new_arch, space, generator, budget, needed=args.new_arch)
        begin(run)
        return new, None, {}
    pool, accuracies, repeated = read_known(args, space)
    naos = search_setup.build_controllers(args, space, run.device)
    fits = go_on(run, naos)
    begin(run)
    run.log(f'{len(pool)} architectures are known: best {accuracies[0]:g}, mean {sum(accuracies) / len(pool):g}, worst '
            f'{accuracies[-1]:g}')
    if repeated:
        run.log(f'{repeated} lines of --arch_pool repeat an architecture: each counts once, with the mean of its accuracies')
    known = Known(pool, accuracies, range(len(pool)), space, generator, naos, search_setup.settings_of(args), budget)
    proposers.fit(run, known, args.controller_expand, first=not fits)
    new, _ = proposers.by_controllers(known, args.new_arch)
    if len(new) < args.new_arch:
        few = (f'{len(new) or "none"} of {args.new_arch} new architectures: what else was written is known or beyond the '
               'budget; more --controller_lambdas, a larger --controller_top or longer fits write others')
        if not new:  # a loop must not go on asking for nothing
            raise UserError(few)
        run.warn(few)
    state = {'model': {}, 'controller': [nao.state_dict() for nao in naos], 'fits': fits + 1, 'told': len(pool)}
    return new, predict(known, new), state


def main() -> None:
    """Fit, ask and write; the state comes last, so that a program that was killed does the same again."""
    args = parse_args()
    run = Run(args)
    new, predicted, state = ask(run, architecture.vocabulary(args.nodes, args.search_space), costs.budget_of(args))
    path = run.output_dir / NEW
    write_lines(path, new)
    path.with_name(PREDICTED).unlink(missing_ok=True)  # of those before
    if predicted is not None:
        write_lines(path.with_name(PREDICTED), predicted)
    if args.state:
        run.save(state, Path(args.state))
    run.log(f'{len(new)} new architectures are in {path}')


if __name__ == '__main__':
    run_program(main, goes_on=False)
