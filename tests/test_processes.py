"""Several processes, as torchrun starts them, with gloo on the CPU: what one process computes, they compute together."""

import functools
import os
import re
import signal
import subprocess
import sys

import pytest
import share
import torch
from helpers import (
    TINY,
    Program,
    assert_equal,
    assert_user_error,
    few_digits,
    files,
    kill_at,
    load,
    make_run,
    metrics,
    run,
    torchrun,
    without_speed,
    write_images,
)
from test_scripts import script

CIFAR = ['--dataset=digits', '--device=cpu', '--nodes=1', '--layers=1', '--channels=2', f'--fixed_arc={TINY}',
         '--batch_size=16', '--eval_batch_size=7', '--lr_max=0.1', '--drop_path_keep_prob=0.7', '--keep_prob=0.8',
         '--use_aux_head']
IMAGENET = ['--device=cpu', '--nodes=1', '--layers=1', '--channels=4', f'--fixed_arc={TINY}', '--epochs=2', '--batch_size=8',
            '--lr=0.00625', '--eval_batch_size=5', '--keep_prob=0.8', '--drop_path_keep_prob=0.7', '--use_aux_head',
            '--workers=1', '--lazy_load']
SEARCH = ['--dataset=digits', '--device=cpu', '--child_nodes=2', '--child_layers=1', '--child_channels=2',
          '--child_batch_size=36', '--child_eval_batch_size=16', '--child_epochs=2', '--child_eval_epochs=1',
          '--child_rank_count=3', '--child_rank_epochs=1', '--controller_seed_arch=12', '--controller_new_arch=5',
          '--controller_epochs=5', '--controller_encoder_hidden_size=24', '--controller_decoder_hidden_size=24']


@pytest.fixture(scope='module')
def few(tmp_path_factory):
    return few_digits(tmp_path_factory.mktemp('digits'))


@pytest.fixture(scope='module')
def share_by(tmp_path_factory):
    """What share.py computes by so many processes on a device."""
    @functools.cache
    def compute(count, device):
        folder = tmp_path_factory.mktemp('share')
        result = torchrun(count, 'tests/share.py', folder / 'result.pt', device).wait()
        assert result.status == 0, result
        return load(folder / 'result.pt')
    return compute


@pytest.fixture(scope='module', params=[
    pytest.param((2, 'cpu'), marks=pytest.mark.slow), (3, 'cpu'), pytest.param((2, 'cuda'), marks=pytest.mark.gpu(2))], ids=str)
def together(request, share_by):
    return share_by(*request.param)


@pytest.fixture(scope='module')
def alone(together, share_by):
    return share_by(1, together['device'])


# ------------------------------------------------------------------------------------------------- the same computations

@pytest.mark.parametrize('batch_size', share.BATCH_SIZES)
@pytest.mark.parametrize('network', ['fixed', 'supernet', 'other'])
def test_gradients_are_those_of_one_process_on_the_same_batch(network, batch_size, alone, together):
    """Also for batches that do not divide evenly. Batch-norm has fixed statistics here: each process has its own."""
    one, several = alone[f'{network} {batch_size}'], together[f'{network} {batch_size}']
    used = {name for name, gradient in one['gradients'].items() if gradient is not None}
    assert used == {name for name, gradient in several['gradients'].items() if gradient is not None}
    assert (used < one['gradients'].keys()) == (network != 'fixed')  # what a path does not use has no gradient, not zeros
    for name in used:
        torch.testing.assert_close(several['gradients'][name], one['gradients'][name], rtol=1e-9, atol=1e-12)
    assert several['values'] == pytest.approx(one['values'], rel=1e-12)


def test_a_supernets_step_sends_the_gradients_of_its_path_in_one_message(alone, together):
    for network in ('supernet', 'other'):
        step = together[f'{network} {share.BATCH_SIZES[0]}']
        used = sum(gradient.numel() for gradient in step['gradients'].values() if gradient is not None)
        assert step['sent'] == [used, 4]  # and the meter's sums
        assert alone[f'{network} {share.BATCH_SIZES[0]}']['sent'] == []


def test_gradients_of_other_strides_than_their_parameters_are_summed_without_a_warning(alone, together):
    for one, several in zip(alone['strides'], together['strides'], strict=True):
        torch.testing.assert_close(several['gradients'], one['gradients'], rtol=1e-9, atol=1e-12)
    assert together['warnings'] == []


@pytest.mark.parametrize('batch_size', share.BATCH_SIZES)
def test_an_evaluation_counts_every_image_once(batch_size, alone, together):
    one, several = alone[f'evaluation {batch_size}'], together[f'evaluation {batch_size}']
    assert several['loss'] == pytest.approx(one['loss'], rel=1e-12)
    assert (several['top1'], several['top5']) == (one['top1'], one['top5'])


def test_a_pool_scored_together_has_the_accuracies_of_one_process(alone, together):
    assert together['world'] in (2, 3) and alone['world'] == 1
    assert together['scores'] == alone['scores'] and len(alone['scores']) == 5


# -------------------------------------------------------------------------------------------------- training and resuming

def test_a_training_goes_on_with_another_number_of_processes(few, tmp_path):
    """2, 1, 3 and again 2 processes, an epoch each; only the first process logs and writes."""
    out, logs = tmp_path / 'out', []
    for epochs, count in enumerate((2, 1, 3, 2), start=1):
        command = ['train_cifar.py', *CIFAR, f'--epochs={epochs}', f'--output_dir={out}']
        result = (Program(*command, preamble=few) if count == 1 else torchrun(count, *command, preamble=few)).wait()
        assert result.status == 0, result
        assert len(re.findall(f'epoch {epochs}/{epochs} train', result.out)) == 1  # one process logs
        assert len(re.findall('device cpu', result.out)) == result.out.count('finished') == 1
        assert (f'{count} processes' in result.out) == (count > 1)
        assert (f'16 images a step, {16 // count} on each of {count} processes' in result.out) == (count > 1)
        assert ('warning: batch-norm normalises by' in result.err) == (count > 1)
        logs.append(result.out)
    for epochs in (1, 2, 3):
        assert f'resumed after epoch {epochs}, with other flags: --epochs={epochs + 1} (was {epochs})' in logs[epochs]
    assert files(out) == ['checkpoint.pt', 'checkpoint_best.pt', 'metrics.jsonl']
    assert [(line['epoch'], line['step']) for line in metrics(out)] == [(1, 5), (2, 10), (3, 15), (4, 20)]
    state = load(out / 'checkpoint.pt')
    assert not any(name.startswith('module.') for name in state['model']) and len(state['random']) == 2
    assert not torch.equal(state['random'][0]['default'], state['random'][1]['default'])  # dropout of its own
    assert_equal(state['random'][0]['data'], state['random'][1]['data'])


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp('images')
    for part, count in (('train', 4), ('valid', 3)):
        write_images(folder / part, {f'n{number}': count for number in range(6)}, seed=count)
    return folder


@pytest.mark.parametrize('rank', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_when_a_process_dies_the_run_ends_and_the_same_command_ends_bit_identical(rank, images, tmp_path):
    command = [2, 'train_imagenet.py', *IMAGENET, f'--data={images}']
    killed = torchrun(*command, f'--output_dir={tmp_path / "killed"}',
                      preamble=kill_at('a batch of files', 9, rank=rank)).wait(60)  # in the second epoch
    assert killed.status != 0 and 'epoch 1/2 train' in killed.out and 'epoch 2/2' not in killed.out
    again = torchrun(*command, f'--output_dir={tmp_path / "killed"}').wait()
    assert again.status == 0 and 'resumed after epoch 1' in again.out, again
    assert torchrun(*command, f'--output_dir={tmp_path / "whole"}').wait().status == 0
    one, two = (load(tmp_path / name / 'checkpoint.pt') for name in ('killed', 'whole'))
    for state in (one, two):
        del state['args']['output_dir'], state['metrics_bytes']
    assert_equal(one, two)
    assert without_speed(metrics(tmp_path / 'killed')) == without_speed(metrics(tmp_path / 'whole'))
    errors = []
    for count in (1, 2):
        command = ['train_imagenet.py', '--mode=test', '--device=cpu', '--workers=0', f'--data={images}',
                   f'--output_dir={tmp_path / "whole"}', f'--eval_batch_size={4 + count}']
        result = run(*command) if count == 1 else torchrun(count, *command).wait()
        errors += re.findall(r'loss .* on 18 images', result.out)
    assert len(errors) == 2 and errors[0] == errors[1]


def test_what_held_out_images_chose_is_tested_by_all_processes_alike(few, tmp_path):
    """Also while the first process still writes it: the last epoch is the best one here."""
    late = few + """
import time, checkpoint
save = checkpoint.save
def slow(*args):
    time.sleep(1)
    save(*args)
checkpoint.save = slow
"""
    command = [2, 'train_cifar.py', *CIFAR, '--epochs=1', '--holdout=20', f'--output_dir={tmp_path / "out"}']
    result = torchrun(*command, preamble=late).wait()
    assert result.status == 0, result
    test = run('train_cifar.py', '--mode=test', '--device=cpu', f'--output_dir={tmp_path / "out"}', preamble=few)
    looked, again = (re.search(r'loss \S+ top-1 error \S+ %', text[text.index(words):]).group()
                     for text, words in ((result.out, 'looked at once'), (test.out, 'checkpoint_best.pt: ')))
    assert looked == again


def test_on_each_machine_one_process_downloads_before_the_others(few, tmp_path):
    """Three processes, the last two on another machine."""
    recording = few + f"""
import os, time, datasets
os.environ['LOCAL_RANK'] = {{'0': '0', '1': '0', '2': '1'}}[os.environ['RANK']]
load = datasets.load
def slow(*args, **kwargs):
    with open({str(tmp_path / 'calls')!r}, 'a', buffering=1) as file:
        file.write(f'begin {{os.environ["RANK"]}}\\n')
        time.sleep(.1)
        file.write(f'end {{os.environ["RANK"]}}\\n')
    return load(*args, **kwargs)
datasets.load = slow
"""
    result = torchrun(3, 'train_cifar.py', *CIFAR, '--epochs=1', f'--output_dir={tmp_path / "out"}', preamble=recording).wait()
    assert result.status == 0, result
    calls = (tmp_path / 'calls').read_text().splitlines()
    assert calls.index('end 0') < calls.index('begin 1') < calls.index('end 1') < calls.index('begin 2')


def test_a_process_killed_from_outside_ends_the_run(few, tmp_path):
    program = torchrun(2, 'train_cifar.py', *CIFAR, '--epochs=100000', f'--output_dir={tmp_path / "out"}', preamble=few)
    program.wait_for('epoch 2/')
    os.kill(program.workers()[-1], signal.SIGKILL)
    result = program.wait(60)
    assert result.status != 0
    assert load(tmp_path / 'out' / 'checkpoint.pt')['epoch'] >= 1


def test_a_search_under_two_processes_runs_whole(few, tmp_path):
    out = tmp_path / 'out'
    result = torchrun(2, 'train_search.py', *SEARCH, f'--output_dir={out}', preamble=few).wait()
    assert result.status == 0, result
    names = [name for name in files(out) if not name.startswith('results.')]
    assert names == sorted([f'arch_pool{suffix}' for suffix in (
        '', '.1', '.2', '.final', '.pareto', '.pareto.perf', '.perf', '.perf.1', '.perf.2', '.perf.final')]
                           + ['checkpoint.pt', 'metrics.jsonl'])
    assert [line['kind'] for line in metrics(out)] == ['epoch', 'score', 'controller', 'new', 'epoch', 'score'] + ['rank'] * 3
    assert result.out.count('epoch 1: scored 12 architectures') == result.out.count('finished') == 1
    assert not any(name.startswith('module.') for name in load(out / 'checkpoint.pt')['model'])
    again = run('train_search.py', *SEARCH, f'--output_dir={out}', preamble=few)  # by one process: nothing left to do
    assert again.status == 0 and 'next: done' in again.out


@pytest.mark.parametrize('flags', [pytest.param(['--child_epochs=2'], marks=pytest.mark.slow),
                                   ['--method=NAO-V2', '--child_epochs=1', '--rounds=1']])
def test_a_search_of_two_processes_stopped_after_a_scoring_ends_bit_identical(flags, few, tmp_path):
    command = [2, 'train_search.py', *SEARCH, '--child_eval_epochs=1', '--child_rank_count=0', *flags]
    killed = torchrun(*command, f'--output_dir={tmp_path / "killed"}', preamble=few + kill_at('a round of fits', 1)).wait()
    assert killed.status != 0
    again = torchrun(*command, f'--output_dir={tmp_path / "killed"}', preamble=few).wait()
    assert again.status == 0 and 'resumed after epoch 1, next: fit' in again.out, again
    assert torchrun(*command, f'--output_dir={tmp_path / "whole"}', preamble=few).wait().status == 0
    one, two = (load(tmp_path / name / 'checkpoint.pt') for name in ('killed', 'whole'))
    assert_equal(one['model'], two['model'])
    assert one['pool'] == two['pool'] and one['accuracies'] == two['accuracies']


def test_a_script_runs_under_the_real_torchrun(images, tmp_path):
    flags = ['--device=cpu', '--channels=4', '--layers=1', '--workers=0', '--eval_batch_size=4', '--epochs=1', '--nodes=1']
    result = script('train_NAONet_A_imagenet_4cards.sh', *flags, cwd=tmp_path, DATA_DIR=str(images), fixed_arc=TINY,
                    LAUNCH='torchrun --standalone --nproc_per_node=2')
    assert result.returncode == 0 and '2 processes' in result.stdout and result.stdout.count('finished') == 1, result
    assert files(tmp_path / 'exp' / 'NAONet_A_imagenet') == ['checkpoint.pt', 'checkpoint_best.pt', 'metrics.jsonl']


# --------------------------------------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize('flags, preamble, words', [
    (['--fixed_arc=0 4 x 0 0 3 1 4'], '', "integer 3 of 8 (normal cell) is 'x', not an integer"),
    (['--epochs=0'], '', '--epochs: must be a whole number of at least 1'),
    (['--batch_size=3'], '', 'a batch of 3 images is too small for 2 processes: it needs at least 4'),
    (['--output_dir=/proc/nowhere'], '', '--output_dir=/proc/nowhere cannot be written'),
    (['--batch_size=16'], """
import os, flags, utils
real = utils.choose_device
def choose_device(name):
    if os.environ['LOCAL_RANK'] == '1':
        raise flags.UserError('there is no second GPU')
    return real(name)
utils.choose_device = choose_device
""", 'there is no second GPU')])
def test_a_mistake_is_told_in_one_line_by_each_process_that_meets_it(flags, preamble, words, few, tmp_path):
    result = torchrun(2, 'train_cifar.py', *CIFAR, f'--output_dir={tmp_path / "out"}', *flags, preamble=few + preamble).wait()
    assert result.status != 0
    lines = [line for line in result.err.splitlines() if 'train_cifar.py: error: ' in line]
    assert lines, result.err
    for line in lines:
        assert re.match(r'\[rank [01]\] train_cifar.py: error: ', line) and words in line, line
    assert not (tmp_path / 'out').exists() or files(tmp_path / 'out') == []


@pytest.mark.parametrize('culprit', [0, 1])
def test_the_others_stop_in_one_line_when_one_process_meets_a_mistake(culprit, few, tmp_path):
    result = torchrun(2, 'train_cifar.py', *CIFAR, '--epochs=1', f'--output_dir={tmp_path / "out"}', preamble=f"""{few}
import os, flags, training
real = training.train_epoch
def train_epoch(*args, **kwargs):
    if os.environ['RANK'] == '{culprit}':
        raise flags.UserError('1.png is broken')
    return real(*args, **kwargs)
training.train_epoch = train_epoch
""").wait()
    assert result.status != 0
    assert f'[rank {culprit}] train_cifar.py: error: 1.png is broken' in result.err.splitlines()
    # the other one may be stopped by the launcher before it notices; its own words, if any, are a line
    assert 'gloo' not in result.err and 'utils.py", line' not in result.err, result.err


# ------------------------------------------------------------------------------------------------------------- by itself

def test_a_run_that_works_alone_shares_no_loss_scale():
    whole = make_run(amp='fp16')
    one, two = whole.alone(), whole.alone()
    assert len({id(each.scaler) for each in (whole, one, two)}) == 3 and one.scaler.is_enabled()


# -------------------------------------------------------------------------------------------------------------- full disk

@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 2 MB; a function that fills the disk."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    if sys.platform != 'linux' or os.geteuid() or subprocess.run(
            ['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', folder], capture_output=True, check=False).returncode:
        pytest.skip('only root may mount a small disk, and here root may not')

    def fill_up():
        with open(folder / 'ballast', 'wb', buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
    yield folder, fill_up
    subprocess.run(['umount', folder], check=True)


@pytest.mark.parametrize('free', [0, 8192])
def test_a_full_disk_ends_a_training_in_one_line_and_it_goes_on_once_there_is_room(free, small_disk, few):
    disk, fill_up = small_disk
    command = ['train_cifar.py', *CIFAR[:-1], f'--output_dir={disk / "out"}']  # without the auxiliary head, which is large
    assert run(*command, '--epochs=1', preamble=few).status == 0
    fill_up()
    os.truncate(disk / 'ballast', (disk / 'ballast').stat().st_size - free)  # room for metrics, but for no checkpoint
    result = run(*command, '--epochs=2', preamble=few)
    assert_user_error(result, 'checkpoint' if free else 'No space left on device', 'make room and run the same command again')
    assert load(disk / 'out' / 'checkpoint.pt')['epoch'] == 1 and load(disk / 'out' / 'checkpoint_best.pt')['epoch'] == 1
    assert files(disk / 'out') == ['checkpoint.pt', 'checkpoint_best.pt', 'metrics.jsonl']
    (disk / 'ballast').unlink()
    result = run(*command, '--epochs=2', preamble=few)
    assert result.status == 0 and 'resumed after epoch 1' in result.out
    assert [line['epoch'] for line in metrics(disk / 'out')] == [1, 2]
