"""train_cifar.py in processes of its own: training, testing, resuming after kills, and every kind of bad input."""

import argparse
import os
import re
import signal
import subprocess
import sys

import numpy
import pytest
import torch
from helpers import (
    NAONET_A,
    NAONET_B,
    ROOT,
    TINY,
    Program,
    assert_equal,
    assert_user_error,
    few_digits,
    files,
    kill_at,
    load,
    metrics,
    run,
    wait_until,
    without_speed,
)

import training
import utils

NETWORK = ['--dataset=digits', '--device=cpu', '--nodes=1', '--layers=1', '--channels=2', '--seed=3']
FLAGS = [*NETWORK, f'--fixed_arc={TINY}', '--epochs=3', '--batch_size=16', '--eval_batch_size=7', '--cutout_size=4',
         '--lr_max=0.1', '--drop_path_keep_prob=0.7', '--keep_prob=0.8', '--use_aux_head']
PROGRAM = 'train_cifar.py'


@pytest.fixture(scope='module')
def few(tmp_path_factory):
    return few_digits(tmp_path_factory.mktemp('digits'))


@pytest.fixture(scope='module')
def trained(tmp_path_factory, few):
    """An uninterrupted training: its folder and what it said."""
    folder = tmp_path_factory.mktemp('trained') / 'out'
    return folder, run(PROGRAM, *FLAGS, f'--output_dir={folder}', preamble=few)


def assert_same_training(folder, other):
    """Both ended with bit-identical checkpoints and metrics; killed before its first one the other put its best aside."""
    for name in ('checkpoint.pt', 'checkpoint_best.pt'):
        one, two = load(folder / name), load(other / name)
        for state in (one, two):
            del state['args']['output_dir'], state['metrics_bytes']  # digits of speeds
        assert_equal(one, two, name)
    assert without_speed(metrics(folder)) == without_speed(metrics(other))
    assert files(folder) == [name for name in files(other) if not name.endswith('.old1')]


# --------------------------------------------------------------------------------------------------------------- training

def test_a_training_on_the_real_digits_learns_in_a_process_of_its_own(tmp_path):
    """The real program, started as a user starts it, without the tests' launcher."""
    command = [sys.executable, ROOT / PROGRAM, '--dataset=digits', '--nodes=1', '--layers=1', '--channels=6', '--epochs=3',
               '--fixed_arc=0 0 1 4 0 3 1 0', '--batch_size=32', '--lr_max=0.1', '--drop_path_keep_prob=1', '--keep_prob=1',
               '--device=cpu']
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600,
                            env=os.environ | {'OMP_NUM_THREADS': '1'}, check=False)
    assert result.returncode == 0 and result.stderr == '', result
    last = metrics(tmp_path / 'exp' / 'cifar')[-1]
    assert last['test']['top1'] > 50  # ten classes
    assert last['epoch'] == 3 and last['step'] == 3 * 45


def test_a_training_leaves_two_checkpoints_and_metrics(trained):
    folder, result = trained
    assert result.status == 0 and result.err == '', result
    assert files(folder) == ['checkpoint.pt', 'checkpoint_best.pt', 'metrics.jsonl']
    state = load(folder / 'checkpoint.pt')
    assert {'args', 'model', 'epoch', 'step', 'optimizer', 'best_acc_top1'} <= set(state)
    assert (state['epoch'], state['step']) == (3, 15) and state['args']['lr_max'] == 0.1
    lines = metrics(folder)
    assert [line['epoch'] for line in lines] == [1, 2, 3] and [line['step'] for line in lines] == [5, 10, 15]
    best = max(line['test']['top1'] for line in lines)
    assert state['best_acc_top1'] == lines[-1]['best_acc_top1'] == best
    first_best = next(line['epoch'] for line in lines if line['test']['top1'] == best)
    assert load(folder / 'checkpoint_best.pt')['epoch'] == first_best
    for line in lines:
        assert line['kind'] == 'epoch' and line['lr'] == pytest.approx(training.cosine(line['epoch'] - 1, 3, 0.1, 0.0))
        for part in (line['train'], line['test']):
            assert set(part) >= {'loss', 'top1', 'top5', 'images_per_second'}
            assert 0 <= part['top1'] <= part['top5'] <= 100 and part['images_per_second'] > 0


def test_the_log_begins_with_device_sizes_and_arguments_and_has_a_line_per_epoch(trained):
    lines = trained[1].out.splitlines()
    start = '\n'.join(lines[:4])
    network = load(trained[0] / 'checkpoint.pt')['model']
    parameters = sum(tensor.numel() for name, tensor in network.items() if tensor.is_floating_point()
                     and 'running' not in name and not name.startswith('auxiliary_head'))
    assert 'device cpu' in start and f'parameters {parameters:,} ' in start
    assert re.search(r'multiply-adds of one image [\d,]+', start)
    for flag in ('--lr_max=0.1', '--seed=3', '--cutout_size=4', f'--fixed_arc={TINY}'):
        assert flag in start
    changed, defaults = next(line for line in lines if ' arguments ' in line).split(' and by default ')
    assert '--lr_max=0.1' in changed and '--lr_min=' not in changed and '--lr_min=0.0' in defaults
    values = r'loss \d+\.\d+ top-1 \d+\.\d+ % top-5 \d+\.\d+ % \d+ images/s'
    for epoch in (1, 2, 3):
        assert sum(re.search(rf'^\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d epoch {epoch}/3 train {values} \| test {values} '
                             r'lr \S+ left \d+:\d\d:\d\d$', line) is not None for line in lines) == 1
    assert 'left 0:00:00' in lines[-2] and 'finished' in lines[-1]


def test_a_line_is_logged_every_hundred_steps(few, tmp_path):
    result = run(PROGRAM, *NETWORK, f'--fixed_arc={TINY}', '--epochs=2', '--batch_size=2', f'--output_dir={tmp_path}',
                 preamble=few + 'import utils\nutils.LOG_EVERY = 15\n')
    assert result.status == 0, result
    values = r'loss \d+\.\d+ top-1 \d+\.\d+ % top-5 \d+\.\d+ % \d+ images/s lr 0\.\d+ left \d+:\d\d:\d\d'
    assert re.findall(rf'epoch (\d)/2 step (\d+)/40 {values}\n', result.out) == [
        (epoch, step) for epoch in '12' for step in ('15', '30')]
    assert utils.LOG_EVERY == 100


def test_without_a_gpu_the_cpu_is_used_with_one_warning(few, tmp_path):
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip('this machine has one')
    flags = [flag for flag in FLAGS if flag != '--device=cpu']
    result = run(PROGRAM, *flags, '--epochs=1', f'--output_dir={tmp_path}', preamble=few)
    assert result.status == 0
    assert len(result.err.splitlines()) == 1 and 'CPU' in result.err


def test_the_same_seed_trains_the_same_network_and_another_seed_another(trained, few, tmp_path):
    for name, seed in (('same', 3), ('other', 4)):
        assert run(PROGRAM, *FLAGS, f'--seed={seed}', f'--output_dir={tmp_path / name}', preamble=few).status == 0
    assert_same_training(trained[0], tmp_path / 'same')
    one, other = (load(folder / 'checkpoint.pt')['model']['classifier.weight'] for folder in (trained[0], tmp_path / 'other'))
    assert not torch.equal(one, other)


def test_save_every_keeps_more_checkpoints(few, tmp_path):
    assert run(PROGRAM, *FLAGS, '--save_every=2', f'--output_dir={tmp_path}', preamble=few).status == 0
    assert files(tmp_path) == ['checkpoint.pt', 'checkpoint_2.pt', 'checkpoint_best.pt', 'metrics.jsonl']
    assert load(tmp_path / 'checkpoint_2.pt')['epoch'] == 2


def test_a_network_that_gets_nothing_right_still_has_a_best_checkpoint(few, tmp_path):
    wrong = few + 'import training\nreal = training.evaluate\ntraining.evaluate = lambda *args: real(*args) | {"top1": 0.0}\n'
    assert run(PROGRAM, *FLAGS, '--epochs=1', f'--output_dir={tmp_path}', preamble=wrong).status == 0
    assert load(tmp_path / 'checkpoint_best.pt')['best_acc_top1'] == 0.0


@pytest.mark.parametrize('flags', [['--arch=' + TINY], ['--fixed_arc=pool', '--arc_index=1']])
def test_an_architecture_is_a_line_or_a_line_of_a_pool_file(flags, few, trained, tmp_path):
    (tmp_path / 'pool').write_text(f'0 0 0 0 0 0 0 0\n{TINY}\n')
    others = [flag for flag in FLAGS if not flag.startswith('--fixed_arc')]
    result = run(PROGRAM, *others, *flags, f'--output_dir={tmp_path / "out"}', cwd=tmp_path, preamble=few)
    assert result.status == 0, result
    one, two = (load(folder / 'checkpoint.pt')['model'] for folder in (trained[0], tmp_path / 'out'))
    assert_equal(one, two)
    (tmp_path / 'pool').unlink()  # a checkpoint can be tested without the pool file that its network came from
    result = run(PROGRAM, '--mode=test', '--device=cpu', '--output_dir=out', cwd=tmp_path, preamble=few)
    assert result.status == 0, result


# ---------------------------------------------------------------------------------------------------------------- testing

def test_mode_test_prints_the_errors_of_the_best_checkpoint(trained, few):
    folder, _ = trained
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    best = load(folder / 'checkpoint_best.pt')
    for flags in ([f'--output_dir={folder}'], [f'--checkpoint={folder / "checkpoint_best.pt"}', '--output_dir=nowhere']):
        result = run(PROGRAM, '--mode=test', '--device=cpu', *flags, preamble=few)
        assert result.status == 0 and result.err == '', result
        top1, top5 = re.search(r'top-1 error (\S+) % top-5 error (\S+) % on 20 images', result.out).groups()
        line = metrics(folder)[best['epoch'] - 1]['test']
        assert float(top1) == pytest.approx(100 - line['top1'], abs=0.006)
        assert float(top5) == pytest.approx(100 - line['top5'], abs=0.006)
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_mode_test_takes_a_published_checkpoint(prefix, trained, few, tmp_path):
    state = load(trained[0] / 'checkpoint_best.pt')
    args = argparse.Namespace(arch=TINY, layers=1, nodes=1, channels=2, lr_max=0.1)
    torch.save({'args': args, 'model': {prefix + name: value for name, value in state['model'].items()}, 'epoch': 1, 'step': 5,
                'optimizer': state['optimizer'], 'best_acc_top1': torch.tensor(1.0)}, tmp_path / 'published.pt')
    result = run(PROGRAM, '--mode=test', '--device=cpu', '--dataset=digits', '--checkpoint=published.pt', cwd=tmp_path,
                 preamble=few)
    assert result.status == 0, result
    own = run(PROGRAM, '--mode=test', '--device=cpu', f'--output_dir={trained[0]}', preamble=few)
    errors = [re.search(r'top-1 error.*', text).group() for text in (result.out, own.out)]
    assert errors[0] == errors[1]
    assert files(tmp_path) == ['published.pt']


def test_a_checkpoint_is_not_tested_on_other_classes(trained, few, tmp_path):
    state = load(trained[0] / 'checkpoint_best.pt')
    torch.save(state | {'classes': state['classes'][::-1]}, tmp_path / 'other.pt')
    result = run(PROGRAM, '--mode=test', '--device=cpu', f'--checkpoint={tmp_path / "other.pt"}', preamble=few)
    assert_user_error(result, 'was trained on other images: its class 0 is 9, that of these is 0')


# --------------------------------------------------------------------------------------------------------------- resuming

@pytest.mark.parametrize('moment', [
    ('an epoch', 1, False), ('an evaluation', 1, True), ('a write', 1, False), ('a write', 1, True),
    ('a flush', 1, True), ('a rename', 1, True), ('a write', 2, True), ('a rename', 2, False), ('a rename', 2, True),
    ('an epoch', 2, True), ('a write', 3, True), ('a rename', 3, True), ('a rename', 4, False)])
def test_a_killed_training_goes_on_and_ends_bit_identical(moment, trained, few, tmp_path):
    command = [PROGRAM, *FLAGS, f'--output_dir={tmp_path}']
    killed = run(*command, preamble=few + kill_at(*moment))
    assert killed.status == -signal.SIGKILL, killed
    result = run(*command, preamble=few)
    assert result.status == 0, result
    assert_same_training(trained[0], tmp_path)


def test_a_training_killed_from_outside_several_times_ends_bit_identical(trained, few, tmp_path):
    command = [PROGRAM, *FLAGS, f'--output_dir={tmp_path}']
    for word in ('epoch 1/3 train', 'epoch 2/3 train'):
        program = Program(*command, preamble=few)
        program.wait_for(word)
        program.signal(signal.SIGKILL)
        assert program.wait().status in (-signal.SIGKILL, 0)
    result = run(*command, preamble=few)
    assert result.status == 0 and 'resumed after epoch' in result.out
    assert_same_training(trained[0], tmp_path)


def test_a_finished_training_started_again_changes_nothing(trained, few, tmp_path):
    folder, _ = trained
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    result = run(PROGRAM, *FLAGS, f'--output_dir={folder}', preamble=few)
    assert result.status == 0 and 'resumed after epoch 3' in result.out and 'epoch 3/3' not in result.out
    assert 'nothing is left to train: 3 epochs are done' in result.out
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before


def test_a_training_goes_on_with_more_epochs_and_says_what_changed(few, tmp_path):
    for epochs in (1, 2):
        result = run(PROGRAM, *FLAGS, f'--epochs={epochs}', f'--output_dir={tmp_path}', preamble=few)
        assert result.status == 0
    assert 'resumed after epoch 1, with other flags: --epochs=2 (was 1)' in result.out
    assert [line['epoch'] for line in metrics(tmp_path)] == [1, 2]
    state = load(tmp_path / 'checkpoint.pt')
    del state['args']['cutout_size']  # as if there had been no such flag
    torch.save(state, tmp_path / 'checkpoint.pt')
    result = run(PROGRAM, *FLAGS, '--epochs=2', f'--output_dir={tmp_path}', preamble=few)
    assert result.status == 0 and 'resumed after epoch 2, with flags that there were not then: --cutout_size=' in result.out


def test_a_training_goes_on_with_larger_batches_on_the_same_schedule(few, tmp_path):
    for flags in (['--epochs=3', '--batch_size=2'], ['--epochs=4', '--batch_size=16']):
        result = run(PROGRAM, *FLAGS, *flags, f'--output_dir={tmp_path}', preamble=few)
        assert result.status == 0, result
    assert 'left 0:00:00' in result.out and 'left -' not in result.out
    steps = [line['step'] for line in metrics(tmp_path)]
    assert steps[3] % 4 == 0 and steps[3] < steps[2] == 3 * steps[0]  # all four epochs in steps of the larger batch


@pytest.mark.parametrize('best', [numpy.float64(99), torch.tensor(12.5), 50])
def test_a_training_goes_on_from_a_best_accuracy_of_any_kind_of_number(best, trained, few, tmp_path):
    torch.save(load(trained[0] / 'checkpoint.pt') | {'best_acc_top1': best}, tmp_path / 'checkpoint.pt')
    result = run(PROGRAM, *FLAGS, '--epochs=4', f'--output_dir={tmp_path}', preamble=few)
    assert result.status == 0, result
    assert metrics(tmp_path)[-1]['best_acc_top1'] >= float(best)


@pytest.mark.parametrize('change, words', [
    ({'optimizer': None}, ['has no "optimizer"', '--mode=test', '--output_dir']), ({'epoch': None}, ['has no "epoch"']),
    ({'best_acc_top1': None}, ['has no "best_acc_top1"']), ({'optimizer': {}}, ['its "optimizer" is not']),
    ({'optimizer': {'state': {}, 'param_groups': []}}, ['its "optimizer" is not']),
    ({'model': {'classifier.bias': 3}}, ['is of another architecture or size']),
    ({'epoch': 'x'}, ['its "epoch" is damaged']), ({'epoch': -1}, ['its "epoch" is damaged'])])
def test_a_checkpoint_that_no_training_can_go_on_from_ends_in_one_line(change, words, trained, few, tmp_path):
    state = load(trained[0] / 'checkpoint.pt') | change
    torch.save({name: value for name, value in state.items() if value is not None}, tmp_path / 'checkpoint.pt')
    result = run(PROGRAM, *FLAGS, '--epochs=4', f'--output_dir={tmp_path}', preamble=few)
    assert_user_error(result, 'checkpoint.pt', *words)
    assert files(tmp_path) == ['checkpoint.pt']


def test_ctrl_c_ends_with_status_130_and_one_line_that_says_how_to_go_on(trained, few, tmp_path):
    command = [PROGRAM, *FLAGS, f'--output_dir={tmp_path}']
    # the second epoch begins by waiting, so that the interruption surely comes into it
    slow = few + """
import training, time
real, calls = training.train_epoch, []
def train_epoch(*args, **kwargs):
    calls.append(None)
    if len(calls) == 2:
        print('waiting', flush=True)
        time.sleep(600)
    return real(*args, **kwargs)
training.train_epoch = train_epoch
"""
    program = Program(*command, preamble=slow)
    program.wait_for('waiting')
    program.signal(signal.SIGINT)
    result = program.wait()
    assert result.status == 130, result
    assert len(result.err.splitlines()) == 1 and 'the same command goes on' in result.err
    assert load(tmp_path / 'checkpoint.pt')['epoch'] == 1
    assert run(*command, preamble=few).status == 0
    assert_same_training(trained[0], tmp_path)


# -------------------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize('flags, words', [
    (['--fixed_arc=0 4 x 0 0 3 1 4'], ['--fixed_arc', 'integer 3 of 8 (normal cell)', "'x', not an integer"]),
    (['--fixed_arc=0 4 1 0 0 3 1'], ['--fixed_arc', '8 x 1 nodes = 8 integers', 'has 7']),
    ([f'--fixed_arc={NAONET_B}'], ['--fixed_arc', '8 x 1 nodes = 8 integers', 'has 40']),
    (['--fixed_arc=0 4 2 0 0 3 1 4'], ['--fixed_arc', 'integer 3 of 8', 'is 2', '0..1']),
    (['--fixed_arc=0 4 1 0 0 3 1 16'], ['--fixed_arc', 'integer 8 of 8 (reduction cell)', 'is 16', '0..15']),
    (['--fixed_arc=0 4 1 0 0 3 -1 4'], ['--fixed_arc', 'integer 7 of 8', 'is -1', '0..1']),
    (['--fixed_arc='], ['--fixed_arc']),
    (['--fixed_arc= '], ['--fixed_arc', 'empty']),
    ([], ['--fixed_arc is missing']),
    (['--fixed_arc=no/such/pool'], ['--fixed_arc', 'no/such/pool', 'No such file']),
    (['--fixed_arc=empty'], ['--fixed_arc', 'empty', 'one architecture a line']),
    (['--fixed_arc=binary'], ['--fixed_arc', 'binary', 'not a text file']),
    (['--fixed_arc=pool', '--arc_index=2'], ['--arc_index=2', 'pool', '0..1']),
    (['--fixed_arc=pool', '--arc_index=-1'], ['--arc_index', 'at least 0']),
    (['--fixed_arc=bad_pool'], ['bad_pool, line 2', 'integer 2 of 8']),
    (['--batch_size=0'], ['--batch_size', "'0'"]),
    (['--batch_size=-5'], ['--batch_size', "'-5'"]),
    (['--dataset=mnist'], ['--dataset', 'cifar10', 'digits']),
    (['--device=cuda:99'], ['--device=cuda:99', 'cpu']),
    (['--no_such_flag'], ['--no_such_flag', '--help']),
    (['--mode=test'], ['out/checkpoint_best.pt', 'no such checkpoint', '--checkpoint']),
    (['--mode=test', '--checkpoint=binary'], ['binary', 'is not a readable checkpoint']),
    (['--mode=test', '--checkpoint=empty'], ['empty', 'is not a readable checkpoint']),
])
def test_bad_input_ends_in_one_line_and_creates_nothing(flags, words, few, tmp_path):
    (tmp_path / 'pool').write_text(f'{TINY}\n{TINY}\n')
    (tmp_path / 'bad_pool').write_text(f'{TINY}\n0 99 0 0 0 0 0 0\n')
    (tmp_path / 'empty').write_text('')
    (tmp_path / 'binary').write_bytes(b'\x80\x00\xff' * 100)
    before = files(tmp_path)
    given = [] if any('arc' in flag for flag in flags) or not flags else [f'--fixed_arc={TINY}']
    result = run(PROGRAM, *NETWORK, '--epochs=1', '--output_dir=out', *given, *flags, cwd=tmp_path, preamble=few)
    assert_user_error(result, *words)
    assert files(tmp_path) == before


def test_data_that_are_not_there_and_cannot_be_downloaded_end_in_one_line(tmp_path):
    offline = """
import socket
def refuse(*args, **kwargs):
    raise OSError('Network is unreachable')
socket.getaddrinfo = socket.socket.connect = refuse
"""
    flags = ['--device=cpu', f'--fixed_arc={NAONET_A}', '--channels=4', '--output_dir=out']
    for dataset, folder in (('cifar10', 'cifar-10-batches-py'), ('cifar100', 'cifar-100-python')):
        result = run(PROGRAM, *flags, f'--dataset={dataset}', '--data=no/where', cwd=tmp_path, preamble=offline)
        assert_user_error(result, '--data=no/where', f'no/where/{folder}', '--dataset=digits')
    assert files(tmp_path) == []


@pytest.mark.parametrize('where', ['file/out', '/proc/out', '/dev/null'])
def test_an_output_directory_that_cannot_be_written_ends_in_one_line(where, few, tmp_path):
    (tmp_path / 'file').write_text('mine')
    result = run(PROGRAM, *FLAGS, f'--output_dir={where}', cwd=tmp_path, preamble=few)
    assert_user_error(result, f'--output_dir={where}', 'cannot be written', 'name a directory')
    assert files(tmp_path) == ['file'] and (tmp_path / 'file').read_text() == 'mine'


@pytest.mark.parametrize('flags, words', [
    (['--channels=3'], ['another architecture', '--channels']),
    (['--fixed_arc=0 0 1 0 0 3 1 4'], ['another architecture', '--fixed_arc']),
    (['--layers=2'], ['another architecture', '--layers'])])
@pytest.mark.parametrize('mode', ['train', 'test'])
def test_a_checkpoint_of_another_architecture_is_refused_and_kept(mode, flags, words, trained, few):
    folder, _ = trained
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    result = run(PROGRAM, *FLAGS, f'--mode={mode}', f'--output_dir={folder}', *flags, preamble=few)
    assert_user_error(result, folder, *words)
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before


@pytest.mark.parametrize('mode', ['train', 'test'])
def test_a_checkpoint_with_another_number_of_classes_is_refused(mode, trained, few, tmp_path):
    for name in ('checkpoint.pt', 'checkpoint_best.pt'):
        state = load(trained[0] / name)
        for key in [key for key in state['model'] if 'classifier' in key]:
            state['model'][key] = state['model'][key].repeat_interleave(10, 0)
        torch.save(state, tmp_path / name)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    result = run(PROGRAM, *FLAGS, f'--mode={mode}', f'--output_dir={tmp_path}', preamble=few)
    assert_user_error(result, tmp_path, 'is for 100 classes, this data set has 10', '--dataset')
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


@pytest.mark.parametrize('mode', ['train', 'test'])
def test_a_cut_off_checkpoint_is_refused_and_kept(mode, trained, few, tmp_path):
    for name in ('checkpoint.pt', 'checkpoint_best.pt'):
        (tmp_path / name).write_bytes((trained[0] / name).read_bytes()[:20000])
    result = run(PROGRAM, *FLAGS, f'--mode={mode}', f'--output_dir={tmp_path}', preamble=few)
    assert_user_error(result, tmp_path, 'is not a readable checkpoint', 'cut off')
    assert files(tmp_path) == ['checkpoint.pt', 'checkpoint_best.pt']
    assert all((tmp_path / name).stat().st_size == 20000 for name in files(tmp_path))


def test_a_checkpoint_of_another_program_is_refused(trained, few, tmp_path):
    """Weights only, as a user may have saved them; the data set of a published ImageNet checkpoint; a search's."""
    torch.save(load(trained[0] / 'checkpoint.pt')['model'], tmp_path / 'weights.pt')
    torch.save(load(trained[0] / 'checkpoint.pt') | {'args': {'dataset': 'imagenet', 'arch': TINY}}, tmp_path / 'imagenet.pt')
    torch.save(load(trained[0] / 'checkpoint.pt') | {'phase': 'train'}, tmp_path / 'checkpoint.pt')
    for name, words in (('weights.pt', ['is not a checkpoint']), ('imagenet.pt', ['imagenet', '--dataset']),
                        ('checkpoint.pt', ['of a search', 'arch_pool'])):
        result = run(PROGRAM, '--mode=test', '--device=cpu', f'--checkpoint={name}', cwd=tmp_path, preamble=few)
        assert_user_error(result, name, *words)
    assert_user_error(run(PROGRAM, *FLAGS, f'--output_dir={tmp_path}', preamble=few), 'of a search', 'another place')


@pytest.mark.parametrize('batch_size', [16, 80])  # 80: one step an epoch, after which the weights are broken
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(batch_size, few, tmp_path):
    flags = [*FLAGS, f'--batch_size={batch_size}', f'--output_dir={tmp_path}']
    assert run(PROGRAM, *flags, '--epochs=1', preamble=few).status == 0
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path) if name != 'metrics.jsonl'}
    result = run(PROGRAM, *flags, '--lr_max=1e30', preamble=few)
    assert result.status == 1, result
    assert len(result.err.splitlines()) == 1
    for word in ('epoch 2/3', 'the last checkpoint is kept', 'smaller learning rate'):
        assert word in result.err
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert [line['epoch'] for line in metrics(tmp_path)] == [1]
    assert run(PROGRAM, *flags, preamble=few).status == 0  # with a sane learning rate it goes on


def test_a_full_disk_ends_in_one_line_and_keeps_the_last_checkpoint(few, tmp_path):
    full = few + """
import os
real, calls = os.fsync, []
def fsync(descriptor):
    calls.append(None)
    if len(calls) > 5:  # start, epoch 1, two checkpoints, epoch 2
        raise OSError(28, 'No space left on device')
os.fsync = fsync
"""
    result = run(PROGRAM, *FLAGS, f'--output_dir={tmp_path}', preamble=full)
    assert_user_error(result, 'cannot be written (No space left on device)')
    assert load(tmp_path / 'checkpoint.pt')['epoch'] == 1
    assert not [name for name in files(tmp_path) if name.endswith('.tmp')]


def test_help_explains_every_flag():
    result = run(PROGRAM, '--help')
    assert result.status == 0
    for flag in ('fixed_arc', 'arch', 'arc_index', 'mode', 'checkpoint', 'batch_size', 'eval_batch_size', 'epochs', 'layers',
                 'nodes', 'channels', 'lr_max', 'lr_min', 'l2_reg', 'keep_prob', 'drop_path_keep_prob', 'grad_bound',
                 'cutout_size', 'use_aux_head', 'data', 'dataset', 'output_dir', 'seed', 'device', 'save_every'):
        assert f'--{flag}' in result.out


def test_wait_until_gives_up():
    with pytest.raises(TimeoutError):
        wait_until(lambda: False, 0.01)
