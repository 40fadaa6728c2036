"""train_imagenet.py in processes of its own, on a few made-up images: training, resuming, testing, every kind of bad input."""

import argparse
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    NAONET_A,
    TINY,
    Program,
    assert_equal,
    assert_user_error,
    files,
    kill_at,
    load,
    metrics,
    run,
    wait_until,
    without_speed,
    write_images,
    zip_images,
)
from test_scripts import script

from model import NASNetworkImageNet

PROGRAM = 'train_imagenet.py'
CLASSES = 6
NETWORK = ['--device=cpu', '--nodes=1', '--layers=1', '--channels=4', '--seed=3']
FLAGS = [*NETWORK, f'--fixed_arc={TINY}', '--epochs=2', '--batch_size=8', '--lr=0.00625', '--gamma=0.5', '--eval_batch_size=5',
         '--keep_prob=0.8', '--drop_path_keep_prob=0.7', '--use_aux_head', '--workers=0']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """24 images of six classes for training, 12 for validation; in folders and in zips."""
    folder = tmp_path_factory.mktemp('made up')
    for part, count in (('train', 4), ('valid', 2)):
        write_images(folder / part, {f'n{number}': count for number in range(CLASSES)}, seed=count)
        zip_images(folder / part, folder / f'{part}.zip', leading=part)
    return folder


@pytest.fixture(scope='module')
def trained(tmp_path_factory, data):
    """An uninterrupted training: its folder and what it said."""
    folder = tmp_path_factory.mktemp('trained') / 'out'
    return folder, run(PROGRAM, *FLAGS, f'--data={data}', f'--output_dir={folder}')


def assert_same_training(folder, other):
    """Both ended with bit-identical checkpoints and metrics; killed before its first one the other put its metrics aside."""
    for name in ('checkpoint.pt', 'checkpoint_best.pt'):
        one, two = load(folder / name), load(other / name)
        for state in (one, two):
            for name in ('output_dir', 'workers', 'lazy_load', 'zip_file'):
                del state['args'][name]
            del state['metrics_bytes']  # digits of speeds
        assert_equal(one, two, name)
    assert without_speed(metrics(folder)) == without_speed(metrics(other))
    assert files(folder) == [name for name in files(other) if not name.endswith('.old1')]


# --------------------------------------------------------------------------------------------------------------- training

def test_a_training_leaves_checkpoints_metrics_and_a_log(trained, data):
    folder, result = trained
    assert result.status == 0, result
    assert result.err == f'{data}/train: 24/24 files in memory\n{data}/valid: 12/12 files in memory\n'
    assert files(folder) == ['checkpoint.pt', 'checkpoint_best.pt', 'metrics.jsonl']
    state = load(folder / 'checkpoint.pt')
    assert {'args', 'model', 'epoch', 'step', 'optimizer', 'best_acc_top1'} <= set(state)
    assert (state['epoch'], state['step']) == (2, 6)
    assert state['model']['classifier.weight'].shape[0] == CLASSES  # from the data
    assert any(name.startswith('auxiliary_head.') for name in state['model'])
    assert [(line['epoch'], line['step'], line['lr']) for line in metrics(folder)] == [(1, 3, .00625), (2, 6, .003125)]
    values = r'loss \d+\.\d+ top-1 \d+\.\d+ % top-5 \d+\.\d+ % \d+ images/s'
    for epoch in (1, 2):
        assert re.search(rf'epoch {epoch}/2 train {values} \| test {values} lr \S+ left \d+:\d\d:\d\d\n', result.out)
    assert re.search(r'parameters [\d,]+ .*multiply-adds of one image [\d,]+', result.out) and 'finished' in result.out


@pytest.mark.parametrize('flags', [['--lazy_load', '--workers=2'], ['--zip_file', '--workers=1'],
                                   ['--zip_file', '--lazy_load', '--workers=2'], ['--workers=3']])
def test_the_way_to_read_and_the_workers_make_no_difference_to_a_training(flags, trained, data, tmp_path):
    result = run(PROGRAM, *FLAGS, *flags, f'--data={data}', f'--output_dir={tmp_path}')
    assert result.status == 0, result
    assert_same_training(trained[0], tmp_path)


def test_another_seed_trains_another_network(trained, data, tmp_path):
    assert run(PROGRAM, *FLAGS, '--seed=4', '--epochs=1', f'--data={data}', f'--output_dir={tmp_path}').status == 0
    assert without_speed(metrics(tmp_path))[0]['train'] != without_speed(metrics(trained[0]))[0]['train']


def test_labels_are_smoothed_by_pytorchs_own_loss(data, tmp_path):
    watch = f"""
import torch.nn.functional as F
real = F.cross_entropy
def cross_entropy(logits, labels, **options):
    with open({str(tmp_path / 'calls')!r}, 'a') as file:
        print(logits.requires_grad, options.get('label_smoothing', 0.0), file=file)
    return real(logits, labels, **options)
F.cross_entropy = cross_entropy
"""
    for flags, value in (([], 0.1), (['--label_smooth=0.25'], 0.25), (['--label_smooth=0'], 0.0)):
        (tmp_path / 'calls').unlink(missing_ok=True)
        assert run(PROGRAM, *FLAGS, *flags, '--epochs=1', '--batch_size=24', f'--data={data}',
                   f'--output_dir={tmp_path / str(value)}', preamble=watch).status == 0
        calls = (tmp_path / 'calls').read_text().splitlines()
        assert calls == [f'True {value}'] * 2 + ['False 0.0'] * 3  # also of the auxiliary head; never in evaluation


@pytest.mark.parametrize('flags, wanted', [
    (['--batch_size=8', '--lr=0.00625'], None), (['--batch_size=16', '--lr=0.0125'], None),
    (['--batch_size=8', '--lr=0.1'], '--lr=0.1 with --batch_size=8: .* which is --lr=0.00625'),
    (['--batch_size=16', '--lr=0.00625'], '--lr=0.00625 with --batch_size=16: .* which is --lr=0.0125')])
def test_a_rate_that_does_not_fit_the_batch_is_warned_of_in_one_line(flags, wanted, data, tmp_path):
    result = run(PROGRAM, *FLAGS, *flags, '--lazy_load', '--epochs=1', f'--data={data}', f'--output_dir={tmp_path}')
    assert result.status == 0
    assert (re.search(wanted, result.err) and len(result.err.splitlines()) == 1) if wanted else result.err == ''


def test_broken_images_are_named_and_a_run_goes_on_or_stops(data, tmp_path):
    """2 % of the images are broken; whether that is too much is for the limit to say, in workers as well."""
    for part in ('train', 'valid'):
        write_images(tmp_path / part, {'a': 25, 'b': 25}, size=8)
    path = tmp_path / 'train' / 'b' / 'b_7.JPEG'
    path.write_bytes(path.read_bytes()[:-100])
    flags = [*FLAGS, '--workers=2', '--lazy_load', '--batch_size=50', '--lr=0.0390625', '--eval_batch_size=50', '--epochs=1',
             f'--data={tmp_path}']
    start = time.monotonic()
    result = run(PROGRAM, *flags, f'--output_dir={tmp_path / "out"}')
    assert time.monotonic() - start < 60
    assert result.status == 2
    warning, line = result.err.splitlines()
    assert warning == f'warning: {path}: is broken or cut off; left out'
    assert 'train: 1 of 50 images cannot be decoded, more than 1%' in line
    result = run(PROGRAM, *flags, f'--output_dir={tmp_path / "out"}',
                 preamble='import class_folders\nclass_folders.BROKEN_LIMIT = .02\n')
    assert result.status == 0 and result.err == f'{warning}\n', result
    assert metrics(tmp_path / 'out')[0]['epoch'] == 1


# --------------------------------------------------------------------------------------------------------------- resuming

@pytest.mark.parametrize('moment, workers', [
    (('a batch of files', 5, True), 0), (('a batch of files', 10, False), 2),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in ((('a rename', 2, True), 2), (('a write', 3, True), 0)))])
def test_a_killed_training_goes_on_and_ends_bit_identical(moment, workers, trained, data, tmp_path):
    """Killed within the first or the second epoch (three steps of training and three of evaluation), or while writing."""
    command = [PROGRAM, *FLAGS, f'--workers={workers}', f'--data={data}', f'--output_dir={tmp_path}']
    killed = run(*command, preamble=kill_at(*moment))
    assert killed.status == -signal.SIGKILL, killed
    result = run(*command)
    assert result.status == 0, result
    assert_same_training(trained[0], tmp_path)


def test_a_training_killed_from_outside_leaves_no_workers_and_goes_on(trained, data, tmp_path):
    command = [PROGRAM, *FLAGS, '--workers=2', f'--data={data}', f'--output_dir={tmp_path}']
    program = Program(*command)
    program.wait_for('epoch 1/2 train')
    children = [int(pid) for pid in Path(f'/proc/{program.pid}/task/{program.pid}/children').read_text().split()]
    program.signal(signal.SIGKILL)
    assert program.wait().status in (-signal.SIGKILL, 0)

    def ended(pid):
        try:
            return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] == 'Z'
        except (FileNotFoundError, ProcessLookupError):
            return True
    wait_until(lambda: all(map(ended, children)), 30)
    assert run(*command).status == 0
    assert_same_training(trained[0], tmp_path)


# ---------------------------------------------------------------------------------------------------------------- testing

def errors(result):
    assert result.status == 0, result
    return tuple(map(float, re.search(r'top-1 error (\S+) % top-5 error (\S+) % on 12 images', result.out).groups()))


def test_mode_test_prints_the_errors_of_the_best_checkpoint(trained, data):
    folder, _ = trained
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    line = metrics(folder)[load(folder / 'checkpoint_best.pt')['epoch'] - 1]['test']
    for flags in ([], ['--zip_file'], ['--workers=2', '--eval_batch_size=12']):
        result = run(PROGRAM, '--mode=test', '--device=cpu', f'--data={data}', f'--output_dir={folder}', *flags)
        assert result.err == ''
        assert errors(result) == pytest.approx((100 - line['top1'], 100 - line['top5']), abs=0.006)
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before


def test_a_checkpoint_is_tested_on_its_own_classes_and_needs_no_training_images(trained, data, tmp_path):
    folder, _ = trained
    command = [PROGRAM, '--mode=test', '--device=cpu', '--workers=0', f'--output_dir={folder}', f'--data={tmp_path}']
    (tmp_path / 'valid').symlink_to(data / 'valid')
    best = load(folder / 'checkpoint_best.pt')
    assert errors(run(*command))[0] == pytest.approx(100 - best['best_acc_top1'], abs=0.006)
    (tmp_path / 'valid').unlink()
    write_images(tmp_path / 'valid', {f'm{number}': 2 for number in range(len(best['classes']))})
    assert_user_error(run(*command), 'the class m0 is not among those of the training images')


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_a_published_checkpoint_is_tested_on_its_number_of_classes_only(prefix, trained, data, tmp_path):
    """As published: arguments in a Namespace, an auxiliary head, names that may start with module., 1000 classes."""
    write_images(tmp_path / 'train', {f'n{number:08}': 1 for number in range(1000)}, size=8)
    write_images(tmp_path / 'val', {f'n{number:08}': 1 for number in (5, 999)}, size=8)
    network = NASNetworkImageNet(1000, 1, 1, 4, 1.0, 1.0, True, 1, TINY)
    torch.save({'args': argparse.Namespace(arch=TINY, layers=1, nodes=1, channels=4, lr=0.1, data='elsewhere'),
                'model': {prefix + name: value for name, value in network.state_dict().items()}, 'epoch': 250, 'step': 9,
                'optimizer': {}, 'best_acc_top1': torch.tensor(74.3)}, tmp_path / 'published.pt')
    command = [PROGRAM, '--mode=test', '--device=cpu', '--workers=0', '--checkpoint=published.pt']
    result = run(*command, f'--data={tmp_path}', cwd=tmp_path)
    assert result.status == 0 and 'on 2 images' in result.out, result
    result = run(*command, f'--data={data}', cwd=tmp_path)
    assert_user_error(result, 'published.pt: is for 1000 classes, this data set has 6', '--data')


@pytest.mark.parametrize('flags, words', [
    (['--channels=6'], ['another architecture', '--channels']), (['--fixed_arc=0 0 1 0 0 3 1 4'], ['--fixed_arc']),
    (['--layers=2'], ['another architecture', '--layers'])])
def test_a_checkpoint_of_another_architecture_is_refused(flags, words, trained, data):
    for mode in ('train', 'test'):
        result = run(PROGRAM, *FLAGS, '--lazy_load', f'--mode={mode}', f'--data={data}', f'--output_dir={trained[0]}', *flags)
        assert_user_error(result, trained[0], *words)


# -------------------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize('flags, words', [
    (['--data=nowhere'], ['--data=nowhere', 'there is no such folder', 'train']),
    (['--data=nowhere', '--zip_file'], ['--data=nowhere', 'there is no such folder', 'train.zip']),
    (['--data=no_valid'], ['--data=no_valid', 'there is no valid or val']),
    (['--data=bad', '--zip_file'], ['bad/train.zip', 'is not a readable zip file']),
    (['--data=bad'], ['bad/train', 'has no images in class folders']),
    (['--data=foreign'], ['foreign/valid', 'the class z is not among those of the training images']),
    ([f'--fixed_arc={NAONET_A}'], ['--fixed_arc', '8 x 1 nodes'])])
def test_bad_input_ends_in_one_line_and_creates_nothing(flags, words, data, tmp_path):
    (tmp_path / 'bad' / 'train').mkdir(parents=True)
    (tmp_path / 'bad' / 'train.zip').write_bytes(b'no zip')
    (tmp_path / 'no_valid').mkdir()
    (tmp_path / 'no_valid' / 'train').symlink_to(data / 'train')
    write_images(tmp_path / 'foreign' / 'train', {'a': 1})
    write_images(tmp_path / 'foreign' / 'valid', {'z': 1})
    result = run(PROGRAM, *FLAGS, f'--data={data}', *flags, '--output_dir=out', cwd=tmp_path)
    assert_user_error(result, *words)
    assert not (tmp_path / 'out').exists()


# ---------------------------------------------------------------------------------------------------------------- scripts

@pytest.mark.parametrize('name, rate, epochs', [
    ('train_NAONet_A_imagenet.sh', 0.1, 2), ('train_NAONet_A_imagenet_4cards.sh', 0.4, 1)])
def test_the_scripts_train_from_any_directory_and_go_on(name, rate, epochs, data, tmp_path):
    tiny = ['--device=cpu', '--channels=4', '--layers=1', '--workers=0', '--eval_batch_size=4']
    (tmp_path / 'imagenet').mkdir()
    (tmp_path / 'imagenet' / 'raw-data').symlink_to(data)
    for epoch in range(epochs):
        result = script(name, *tiny, f'--epochs={epoch + 1}', cwd=tmp_path)
        assert result.returncode == 0 and 'warning' not in result.stdout, result
    folder = tmp_path / 'exp' / name.removeprefix('train_').removesuffix('.sh').removesuffix('_4cards')
    assert files(folder) == ['checkpoint.pt', 'checkpoint_best.pt', 'metrics.jsonl']
    args = load(folder / 'checkpoint.pt')['args']
    assert args['fixed_arc'] == NAONET_A and args['lr'] == pytest.approx(rate) and args['batch_size'] == round(rate * 1280)
    assert (args['l2_reg'], args['label_smooth'], args['gamma'], args['decay_period'], args['grad_clip'], args['use_aux_head'],
            args['nodes'], args['keep_prob'], args['drop_path_keep_prob']) == (3e-5, .1, .97, 1, 5., True, 5, 1., 1.)
    assert ('resumed after epoch 1' in (folder / 'train.log').read_text()) == (epochs > 1)


def test_help_explains_every_flag_of_the_specification():
    result = run(PROGRAM, '--help')
    assert result.status == 0
    for flag, default in (('epochs', 250), ('layers', 4), ('channels', 48), ('lr', 0.1), ('batch_size', 128),
                          ('gamma', 0.97), ('decay_period', 1), ('l2_reg', 3e-05), ('label_smooth', 0.1), ('grad_clip', 5.0),
                          ('keep_prob', 1.0), ('drop_path_keep_prob', 1.0)):
        assert re.search(rf'--{flag}\b[^(]*\(default:\s*{re.escape(str(default))}\)', ' '.join(result.out.split()[30:])), flag
    for flag in ('workers', 'use_aux_head', 'zip_file', 'lazy_load', 'mode', 'fixed_arc', 'checkpoint', 'compile'):
        assert f'--{flag} ' in result.out
