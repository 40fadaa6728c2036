"""Candidates: architectures that are trained on their own, from scratch, to be judged.

Processes share them: each takes the next one that nobody has, and a result is on the disk as soon as it is there, so that no
training is done twice. All draws of a training follow from --seed and its architecture, so that order, process and
interruptions make no difference to its accuracy.
"""

import json
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import checkpoint
import training
from architecture import Architecture
from disk import append_line, read_records
from flags import MEMORY, Stopped, known_end
from model import FixedNetwork
from training import NotFiniteError
from utils import Run


class Recipe(NamedTuple):
    """How candidates of one kind are trained and judged."""

    kind: str  # what their results and files are called by
    build: Callable[[Architecture, int], FixedNetwork]  # (architecture, steps of the training) -> its network
    train_batches: Callable[[Run], Iterable]  # drawn from a run's generators
    valid_batches: Callable[[Run], Iterable]
    l2_reg: float
    flags: str  # those that decide a network's parameters, for messages
    epochs: int
    lr: Callable[[int], float]  # epoch, from 0 -> learning rate
    grad_bound: float
    label_smooth: float = 0.0
    max_steps: int | None = None  # of an epoch
    steps: int | None = None  # that drop path's schedule counts; None: those of the training
    best_epoch: bool = False  # judged by the best epoch, not by the last one


def read_results(run: Run, recipe: Recipe) -> dict[str, float]:
    """Architecture -> accuracy, 0-1, of all trainings by a recipe that any process has finished; all call it together.

    Those of another number of epochs do not count, nor those that failed before this program began: they are tried again,
    perhaps with flags that help.
    """
    mine = {}
    given = recipe.kind == 'candidate' and getattr(run.args, 'child_results', None)  # those of another search
    for path in [*filter(None, [given and Path(given)]), *sorted(run.output_dir.glob('results.*.jsonl'))]:
        for result in read_records(path, {recipe.kind: {'arch': str, 'accuracy': (int, float)}}):
            if (result['kind'] == recipe.kind and result.get('epochs', recipe.epochs) == recipe.epochs
                    and ('error' not in result or (recipe.kind, result['arch']) in run.failed)):
                mine[result['arch']] = result['accuracy']
    return {arch: accuracy for part in run.gather(mine) for arch, accuracy in part.items()}


def checkpoint_of(run: Run, kind: str, arch: str) -> Path:
    """Where an unfinished training is kept."""
    return run.output_dir / f'{kind}-{zlib.crc32(arch.encode()):08x}.pt'


def train_candidate(run: Run, recipe: Recipe, arch: Architecture, title: str = '') -> float:
    """Train one architecture on the training split; its accuracy on the validation split, 0-1.

    run: of this process alone. A training that was interrupted goes on from its last epoch. Raises NotFiniteError.
    """
    path, epochs = checkpoint_of(run, recipe.kind, str(arch)), recipe.epochs
    run.reseed(recipe.kind, str(arch))
    train_batches, valid_batches = recipe.train_batches(run), recipe.valid_batches(run)
    network = run.place(recipe.build(arch, recipe.steps or epochs * training.steps_of(train_batches, recipe.max_steps)))
    optimizer, done, accuracies = training.sgd(run, network, recipe.l2_reg), 0, []
    if path.exists():
        state = checkpoint.load(path)
        checkpoint.require(state, {'epoch': int, 'optimizer': dict, 'random': list}, path)
        checkpoint.fill_model(network, state['model'], path, recipe.flags)
        checkpoint.fill_optimizer(optimizer, state['optimizer'], path)
        done, accuracies = state['epoch'], state.get('accuracies', [])
        state.pop('metrics_bytes', None)  # of the search, whose metrics stay as they are
        run.resume(state, f'epoch {done}')
    for epoch in training.train(run, network, optimizer, train_batches, valid_batches, epochs=epochs, lr=recipe.lr, first=done,
                                title=title, split='valid', grad_bound=recipe.grad_bound, label_smooth=recipe.label_smooth,
                                max_steps=recipe.max_steps):
        accuracies.append(epoch.test['top1'])
        if epoch.done < epochs:
            run.save({'model': network.state_dict(), 'optimizer': optimizer.state_dict(), 'epoch': epoch.done,
                      'step': epoch.step, 'accuracies': accuracies}, path)
    if done >= epochs:  # it was resumed with no more epochs than it had done
        accuracies.append(training.evaluate(run, network, valid_batches)['top1'])
    return (max(accuracies) if recipe.best_epoch else accuracies[-1]) / 100


def train_and_record(run: Run, recipe: Recipe, arch: Architecture, title: str) -> float:
    """Train one architecture, in this process alone; its accuracy, 0-1, which is on the disk then.

    One that is at fault itself (it does not fit into its device's memory, or its loss is not finite) is logged and counts 0;
    whatever else fails raises flags.Stopped and is recorded nowhere.
    """
    start, more, alone = time.monotonic(), {}, run.alone()
    try:
        accuracy = train_candidate(alone, recipe, arch, title)
    except (RuntimeError, NotFiniteError) as error:
        reason = str(error).partition('\n')[0]
        if not isinstance(error, NotFiniteError) and not any(words in reason for words in MEMORY):
            raise Stopped(f'{title}failed: {known_end(error) or reason}; it is not recorded, and the same command tries '
                          'again') from error
        accuracy, more = 0.0, {'error': reason}
        run.failed[recipe.kind, str(arch)] = reason
        alone.log(f'{title}failed and counts 0: {reason}')
    append_line(run.output_dir / f'results.{run.rank}.jsonl', json.dumps(
        {'kind': recipe.kind, 'arch': str(arch), 'accuracy': accuracy, 'epochs': recipe.epochs,
         'seconds': time.monotonic() - start, **more}))
    checkpoint_of(run, recipe.kind, str(arch)).unlink(missing_ok=True)
    return accuracy


def train_all(run: Run, recipe: Recipe, archs: Sequence[Architecture], number: int, to_come: int = 0) -> list[float]:
    """The accuracies of architectures, 0-1; those that have no result yet are trained, by all processes together.

    number: of the round, by which the queue is called; to_come: how many trainings later rounds may ask for, for the estimate
    of the time that is left. Raises flags.Stopped if all of them fail.
    """
    results = read_results(run, recipe)
    for arch in archs:
        if str(arch) in results:  # recorded just before its process was killed
            checkpoint_of(run, recipe.kind, str(arch)).unlink(missing_ok=True)
    todo = [arch for arch in dict.fromkeys(archs) if str(arch) not in results]
    clock = training.Clock(0, len(todo) + to_come)
    for index in run.queue(f'{recipe.kind} {number}', len(todo)):
        title = f'{recipe.kind} {len(archs) - len(todo) + index + 1}/{len(archs)} '
        accuracy = train_and_record(run, recipe, todo[index], title)
        run.alone().log(f'{title}accuracy {accuracy:.4f}, all of them left {clock.left(index + 1)}')
    run.reseed(f'after {recipe.kind}', number)  # who trained what must not matter to what follows
    for part in run.gather(run.failed):
        run.failed.update(part)
    reasons = [run.failed.get((recipe.kind, str(arch))) for arch in archs]
    if todo and all(reasons):
        raise Stopped(f'all {len(archs)} trainings failed, the last one so: {reasons[-1]}; the same command tries again, '
                      'perhaps with a smaller batch or learning rate')
    results = read_results(run, recipe)
    return [results[str(arch)] for arch in archs]
