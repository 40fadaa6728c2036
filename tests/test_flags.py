"""The command line: numbers, mistakes, how a program ends; the device that a flag names."""

import argparse
import importlib
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import make_run

import flags
import training
import utils
from flags import UserError

CPU = torch.device('cpu')
ALONE = SimpleNamespace(device=CPU, is_first=True, rank=0, world=1, sum=lambda values: values)  # a run of one process


@pytest.mark.parametrize('kind, good, bad', [
    (flags.POSITIVE_INT, ['1', '600'], ['0', '-1', '1.5', 'x', '', 'nan', '1e3']),
    (flags.COUNT, ['0', '7'], ['-1', '0.5', 'None']),
    (flags.POSITIVE, ['1e-9', '3'], ['0', '-0.1', 'nan', 'inf', '-inf', 'x']),
    (flags.NOT_NEGATIVE, ['0', '0.5'], ['-1e-9', 'nan', 'inf']),
    (flags.KEEP, ['1', '0.1'], ['0', '1.01', '-1', 'nan']),
    (flags.FRACTION, ['0', '1', '0.5'], ['1.1', '-0.1', 'nan'])])
def test_numbers_of_flags_are_checked(kind, good, bad):
    for text in good:
        assert kind(text) == float(text)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=rf"must be a .*number (above|of at least).*, not '{text}'"):
            kind(text)


@pytest.mark.parametrize('error, status, words', [
    (UserError('--flag is wrong'), 2, 'program.py: error: --flag is wrong'),
    (UserError('--data=a\nb: is wrong'), 2, 'program.py: error: --data=a b: is wrong'),
    (flags.Stopped('no answer'), 1, 'program.py: stopped: no answer'),
    (training.NotFiniteError('the loss is nan'), 1, 'program.py: stopped: the loss is nan'),
    (BrokenPipeError(), 1, 'program.py: stopped: whoever read the output is gone'),
    (OSError(30, 'Read-only file system'), 2, 'program.py: error: --output_dir cannot be written (Read-only file system)'),
    (KeyboardInterrupt(), 130, 'program.py: interrupted; the same command goes on')])
def test_a_program_that_fails_says_why_in_one_line(error, status, words, monkeypatch, capsys):
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, 'argv', ['somewhere/program.py'])
    monkeypatch.setattr(sys, 'stdout', sys.stdout)

    def main():
        raise error
    try:
        with pytest.raises(SystemExit) as ended:
            flags.run_program(main)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert ended.value.code == status
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(words)


@pytest.mark.parametrize('error, words', [
    (RuntimeError('DataLoader worker (pid(s) 7) exited unexpectedly'), 'a process that reads images was killed'),
    (RuntimeError('Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback ...\nValueError: a bug'), None),
    (RuntimeError('Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: unable to write to file </torch_7_8>: No '
                  'space left on device (28)'), '--shm-size'),
    (dist.DistBackendError('NCCL error in: x.cpp:7, invalid usage\nLast error:\nDuplicate GPU detected : rank 1 and rank 0'),
     'cannot work together: Duplicate GPU detected'),
    (dist.DistBackendError('NCCL error\nncclRemoteError: a remote process exiting prematurely'), 'another process has ended'),
    (RuntimeError('[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:7'), 'another process has ended'),
    (dist.DistNetworkError('failed to recv, got 0 bytes'), 'another process has ended')])
def test_an_error_of_pytorch_is_told_by_its_cause(error, words, monkeypatch):
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    line = flags.known_end(error)
    assert line is None if words is None else words in line


@pytest.mark.parametrize('name', ['cuda:99', 'nonsense', 'meta', '', 'xla', 'hpu', 'cpu:x'])
def test_a_device_that_cannot_be_used_is_a_users_error(name):
    with pytest.raises(UserError, match=rf'--device={name} .*use cpu, cuda, cuda:N or mps') as error:
        utils.choose_device(name)
    assert len(str(error.value).splitlines()) == 1


def test_flags_of_the_references_imagenet_program_are_accepted_with_a_line(monkeypatch, capsys):
    import train_imagenet
    monkeypatch.setattr(sys, 'argv', ['train_imagenet.py', '--fixed_arc=NAONet_B', '--momentum=0.8', '--cutout_size=16'])
    args, *_ = train_imagenet.parse_args()
    assert capsys.readouterr().err == '--momentum=0.8 has no effect\n--cutout_size=16 has no effect\n'
    assert args.changed == ['fixed_arc'] and not hasattr(args, 'momentum')


@pytest.mark.parametrize('module', ['train_cifar', 'train_imagenet'])
def test_the_architecture_says_how_many_nodes_there_are(module, tmp_path, monkeypatch):
    (tmp_path / 'arch_pool').write_text(' '.join(['0 1'] * 12) + '\n')
    monkeypatch.setattr(sys, 'argv', ['program.py', f'--fixed_arc={tmp_path / "arch_pool"}'])
    args, arch, _ = importlib.import_module(module).parse_args()
    assert args.nodes == len(arch.normal) // 4 == 3


def test_a_flag_says_how_many_threads(monkeypatch):
    given = []
    monkeypatch.setattr(torch, 'set_num_threads', given.append)
    make_run(threads=3)
    make_run()
    assert given == [3]


@pytest.mark.parametrize('threads, load, warned', [(2, 1.0, True), (2, 0.4, False), (1, 5.0, False), (1, 0.0, False)])
def test_cores_that_are_in_use_are_warned_of(threads, load, warned, monkeypatch, capsys):
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
    monkeypatch.setattr(utils.os, 'cpu_count', lambda: 2)
    monkeypatch.setattr(utils.os, 'getloadavg', lambda: (load, 0.0, 0.0))
    utils.warn_of_busy_cores()
    assert ('of 2 cores are in use' in capsys.readouterr().err) == warned


# ----------------------------------------------------------------------------------------------------- the programs' numbers

BOUNDS = [
    ('train_cifar', '--threads=1000000000', 'at most 1,024'),
    ('train_cifar', '--batch_size=1', 'at least 2'),
    ('train_cifar', '--eval_batch_size=0', 'at least 1'),
    ('train_cifar', '--epochs=0', 'at least 1'),
    ('train_cifar', '--epochs=1.5', 'whole number'),
    ('train_cifar', '--lr_max=0', 'above 0'),
    ('train_cifar', '--lr_max=-1', 'above 0'),
    ('train_cifar', '--lr_max=nan', 'above 0'),
    ('train_cifar', '--lr_min=-0.1', 'at least 0'),
    ('train_cifar', '--l2_reg=-1', 'at least 0'),
    ('train_cifar', '--keep_prob=0', 'above 0 and at most 1'),
    ('train_cifar', '--drop_path_keep_prob=1.5', 'above 0 and at most 1'),
    ('train_cifar', '--grad_bound=0', 'above 0'),
    ('train_cifar', '--layers=0', 'at least 1'),
    ('train_cifar', '--channels=0', 'at least 1'),
    ('train_cifar', '--cutout_size=-1', 'at least 0'),
    ('train_cifar', '--seed=-1', 'at least 0'),
    ('train_cifar', '--seed=99999999999999999999999', 'at most'),
    ('search_setup', '--child_batch_size=1', 'at least 2'),
    ('search_setup', '--child_eval_batch_size=-1', 'at least 1'),
    ('search_setup', '--child_epochs=0', 'at least 1'),
    ('search_setup', '--child_nodes=0', 'at least 1'),
    ('search_setup', '--child_lr_max=0', 'above 0'),
    ('search_setup', '--child_lr_min=-1', 'at least 0'),
    ('search_setup', '--child_keep_prob=0', 'above 0 and at most 1'),
    ('search_setup', '--controller_lr=-0.1', 'above 0'),
    ('search_setup', '--controller_epochs=0', 'at least 1'),
    ('search_setup', '--controller_batch_size=0', 'at least 1'),
    ('search_setup', '--controller_seed_arch=0', 'at least 1'),
    ('search_setup', '--controller_new_arch=-3', 'at least 1'),
    ('search_setup', '--controller_expand=0', 'at least 1'),
    ('search_setup', '--controller_trade_off=1.2', 'at most 1'),
    ('search_setup', '--controller_encoder_dropout=1.2', 'at most 1'),
    ('search_setup', '--max_madds=0', 'above 0'),
    ('search_setup', '--budget_layers=0', 'at least 1'),
    ('train_controller', '--new_arch=0', 'at least 1'),
    ('train_controller', '--controller_top=0', 'at least 1'),
    ('train_imagenet', '--workers=-1', 'at least 0'),
    ('train_imagenet', '--workers=x', 'whole number'),
    ('train_imagenet', '--label_smooth=1.5', 'at most 1'),
    ('train_imagenet', '--lr=0', 'above 0'),
    ('train_imagenet', '--decay_period=0', 'at least 1'),
    ('train_imagenet', '--gamma=0', 'above 0'),
    ('train_imagenet', '--grad_clip=0', 'above 0'),
    ('train_imagenet', '--batch_size=1', 'at least 2'),
]


@pytest.mark.parametrize('module, flag, words', BOUNDS)
def test_numbers_out_of_bounds_are_named_with_their_bounds(module, flag, words, monkeypatch):
    program = importlib.import_module(module)
    arch = [] if module in ('search_setup', 'train_controller') else ['--fixed_arc=NAONet_B']
    monkeypatch.setattr(sys, 'argv', ['program.py', *arch, flag])
    with pytest.raises(UserError) as error:
        program.parse_args()
    assert flag.partition('=')[0] in str(error.value) and words in str(error.value)
