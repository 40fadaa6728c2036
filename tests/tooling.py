"""What the tests of the tools share: calling a tool here, and made-up runs, which are written in no time."""

import contextlib
import importlib
import importlib.util
import io
import json
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import architecture
from flags import run_program

ROOT = Path(__file__).resolve().parent.parent
has_graphviz = importlib.util.find_spec('graphviz') and shutil.which('dot')
needs_graphviz = pytest.mark.skipif(not has_graphviz, reason='Graphviz (package and dot) is not installed')
needs_matplotlib = pytest.mark.skipif(not importlib.util.find_spec('matplotlib'), reason='matplotlib is not installed')
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
ONE_NODE = '0 1 1 2 0 3 1 4'  # the smallest architecture: one node a cell
TRAINING = {'dataset': 'cifar10', 'data': 'data', 'layers': 1, 'nodes': 1, 'channels': 4, 'epochs': 3, 'seed': 0,
            'fixed_arc': ONE_NODE, 'cutout_size': 16}
SEARCH = {'dataset': 'cifar10', 'data': 'data', 'child_layers': 1, 'child_nodes': 1, 'child_channels': 4, 'child_epochs': 2,
          'rounds': 3, 'seed': 0, 'method': 'NAO-WS', 'controller_preset': 'paper'}
START = {'kind': 'start', 'date': '2026-11-25T16:41:27+00:00', 'commit': 'abc1234', 'processor': 'Made-up CPU, 2 cores',
         'environment': 'device cpu (2 threads), PyTorch 2', 'parameters': 1234, 'multiply_adds': 56789, 'seconds': 0.5}


def tool(program):
    """The module of a tool, with its neighbours to import."""
    path = ROOT / program
    with mock.patch.object(sys, 'path', [str(path.parent), *sys.path]):
        return importlib.import_module(path.stem)


def call(program, *flags):
    """Run a program's main here, which saves a second start of PyTorch: status, output, errors."""
    module = tool(program)
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding='utf-8', write_through=True) for _ in range(2))
    with (mock.patch.object(sys, 'argv', [program, *map(str, flags)]), contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(err)):
        try:
            run_program(module.main)
            status = 0
        except SystemExit as end:
            status = end.code
    return status, *(stream.buffer.getvalue().decode() for stream in (out, err))


def output(program, *flags):
    status, out, err = call(program, *flags)
    assert not status, err
    return out


def mistake(program, *flags):
    """The one line of a user's mistake."""
    status, _, err = call(program, *flags)
    assert status == 2, err
    line, = [line for line in err.splitlines() if not line.startswith('warning')]
    return line


def without(package):
    """A context in which a package cannot be imported."""
    hidden = {name: None for name in sys.modules if name.startswith(f'{package}.')} | {package: None}
    return mock.patch.dict(sys.modules, hidden)


def write_run(directory, records, args=None, **state):
    """The files of a run: metrics.jsonl, and checkpoint.pt where there are arguments."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / 'metrics.jsonl').write_text(''.join(f'{json.dumps(record)}\n' for record in records))
    if args is not None:
        torch.save({'args': args, 'model': {}, 'environment': 'device cpu'} | state, directory / 'checkpoint.pt')
    return directory


def epoch(number, test, training=50.0):
    return {'kind': 'epoch', 'epoch': number, 'lr': 0.1 / number, 'seconds': 3600.0 * number, 'best_acc_top1': test,
            'train': {'loss': 9 / number, 'top1': training, 'images_per_second': 100.0},
            'test': {'loss': 8 / number, 'top1': test}}


def training(directory, *tests, **args):
    """A made-up training, with the test accuracies of its epochs."""
    records = [epoch(number, test) for number, test in enumerate(tests, start=1)]
    for number, record in enumerate(records):
        record['best_acc_top1'] = max(tests[:number + 1])
    return write_run(directory, [START, *records], TRAINING | args, model={'classifier.weight': torch.zeros(10, 1)},
                     arch=args.get('fixed_arc', ONE_NODE))


def search(directory, *rounds, ranked=(), multiply_adds=(), **args):
    """A made-up search, with the accuracies of the pool in each of its scorings, 0-1; multiply_adds: of the last one."""
    arch, records = ONE_NODE, []
    for number, accuracies in enumerate(rounds, start=1):
        records += [{'kind': 'score', 'epoch': number, 'accuracies': accuracies, 'best_arch': arch},
                    {'kind': 'controller', 'search_epoch': number, 'pairwise_accuracy': 0.9, 'hamming_distance': 0.01},
                    {'kind': 'new', 'epoch': number, 'new': 2, 'per_lambda': {'1': 1, '2.5': 1}}]
    if multiply_adds:
        records[-3]['multiply_adds'] = multiply_adds
    records += [{'kind': 'rank', 'index': index, 'accuracy': accuracy, 'arch': arch} for index, accuracy in enumerate(ranked)]
    for number, record in enumerate(records, start=1):
        record['seconds'] = 100.0 * number
    return write_run(directory, records, SEARCH | args, phase='done')


def candidates(directory, *accuracies, process=0, **args):
    """A made-up search by NAO, the complete way, which is training its first candidates: no metrics yet."""
    write_run(directory, [], SEARCH | {'method': 'NAO'} | args, phase='evaluate')
    pool = architecture.sample(len(accuracies), 2, range(5, 16), torch.Generator().manual_seed(process))
    lines = [json.dumps({'kind': 'candidate', 'arch': str(arch), 'accuracy': accuracy, 'seconds': 60.0})
             for arch, accuracy in zip(pool, accuracies, strict=True)]
    (directory / f'results.{process}.jsonl').write_text(''.join(f'{line}\n' for line in lines))
    return directory
