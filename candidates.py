"""Candidates: architectures that are trained on their own, from scratch, to be judged.

Processes share them: each takes the next one that nobody has, and a result is on the disk as soon as it is there, so that no
training is done twice. All draws of a training follow from --seed and its architecture, so that order, process and
interruptions make no difference to its accuracy.
"""

import contextlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import checkpoint
import training
from architecture import Architecture
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
    options: dict[str, Any]  # of training.train


def append_line(path: Path, line: str) -> None:
    """Append a line to a file and see it to the disk; it stays apart from a last line that was cut off."""
    with open(path, 'ab+') as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        cut_off = file.read() not in (b'', b'\n')
        file.write(('\n' * cut_off + line + '\n').encode())
        file.flush()
        os.fsync(file.fileno())


def read_results(run: Run, kind: str) -> dict[str, float]:
    """Architecture -> accuracy, 0-1, of all trainings of a kind that any process has finished; all call it together."""
    mine = {}
    for path in sorted(run.output_dir.glob('results.*.jsonl')):
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a process that was killed
                result = json.loads(line)
                if result['kind'] == kind:
                    mine[result['arch']] = result['accuracy']
    return {arch: accuracy for part in run.gather(mine) for arch, accuracy in part.items()}


def checkpoint_of(run: Run, kind: str, arch: str) -> Path:
    """Where an unfinished training is kept."""
    return run.output_dir / f'{kind}-{zlib.crc32(arch.encode()):08x}.pt'


def train_candidate(run: Run, recipe: Recipe, arch: Architecture, title: str = '') -> float:
    """Train one architecture on the training split; its accuracy on the validation split, 0-1.

    run: of this process alone. A training that was interrupted goes on from its last epoch. Raises NotFiniteError.
    """
    path, epochs = checkpoint_of(run, recipe.kind, str(arch)), recipe.options['epochs']
    run.reseed(recipe.kind, str(arch))
    train_batches, valid_batches = recipe.train_batches(run), recipe.valid_batches(run)
    steps = epochs * training.steps_of(train_batches, recipe.options.get('max_steps'))
    network = run.place(recipe.build(arch, steps))
    optimizer, state = training.sgd(run, network, recipe.l2_reg), None
    if os.path.exists(path):
        state = checkpoint.load(path)
        checkpoint.fill_model(network, state['model'], path, recipe.flags)
        checkpoint.fill_optimizer(optimizer, state['optimizer'], path)
    values = None
    for epoch in training.train(run, network, optimizer, train_batches, valid_batches, title=title, split='valid', state=state,
                                **recipe.options):
        values = epoch.test
        if epoch.done < epochs:
            run.save({'model': network.state_dict(), 'optimizer': optimizer.state_dict(), 'epoch': epoch.done,
                      'step': epoch.step}, path)
    if values is None:  # it was resumed with no more epochs than it had done
        values = training.evaluate(run, network, valid_batches)
    return values['top1'] / 100


def train_all(run: Run, recipe: Recipe, archs: Sequence[Architecture], number: int) -> list[float]:
    """The accuracies of architectures, 0-1; those that have no result yet are trained, by all processes together.

    number: of the round, by which the queue is called. One that fails (out of memory, loss not finite) is logged and counts 0.
    """
    results = read_results(run, recipe.kind)
    todo = [arch for arch in dict.fromkeys(archs) if str(arch) not in results]
    for index in run.queue(f'{recipe.kind} {number}', len(todo)):
        arch, start, more, alone = todo[index], time.monotonic(), {}, run.alone()
        title = f'{recipe.kind} {len(archs) - len(todo) + index + 1}/{len(archs)} '
        try:
            accuracy = train_candidate(alone, recipe, arch, title)
        except (RuntimeError, NotFiniteError) as error:
            torch.ones(1, device=run.device).sum().item()  # raises if it is the GPU: no candidate's fault
            accuracy, more = 0.0, {'error': str(error).partition('\n')[0]}
            alone.log(f'{title}failed and counts 0: {more["error"]}')
        append_line(run.output_dir / f'results.{run.rank}.jsonl', json.dumps(
            {'kind': recipe.kind, 'arch': str(arch), 'accuracy': accuracy, 'seconds': time.monotonic() - start, **more}))
        checkpoint_of(run, recipe.kind, str(arch)).unlink(missing_ok=True)
    run.reseed(f'after {recipe.kind}', number)  # who trained what must not matter to what follows
    results = read_results(run, recipe.kind)
    return [results[str(arch)] for arch in archs]
