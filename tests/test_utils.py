"""What the programs share: schedule, meters, sizes, flags, checkpoints."""

import argparse
import math
import pickle
import re
import sys
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import NAONET_A, NAONET_B, assert_equal, files
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import architecture
import utils
from model import NASNetworkCIFAR
from model_search import NASWSNetworkCIFAR
from utils import Meter, UserError, load_checkpoint, load_model, save_checkpoint

CPU = torch.device('cpu')
ALONE = SimpleNamespace(device=CPU, is_first=True, rank=0, world=1, sum=lambda values: values)  # a run of one process


# ------------------------------------------------------------------------------------------------ schedule, meter, clock

@given(st.integers(1, 700), st.floats(1e-4, 1), st.floats(0, 1e-4), st.data())
def test_the_learning_rate_falls_as_half_a_cosine(epochs, lr_max, lr_min, data):
    epoch = data.draw(st.integers(0, epochs - 1))
    rate = utils.cosine(epoch, epochs, lr_max, lr_min)
    assert rate == pytest.approx(lr_min + (lr_max - lr_min) * (1 + math.cos(math.pi * epoch / epochs)) / 2)
    schedule = [utils.cosine(each, epochs, lr_max, lr_min) for each in range(epochs)]
    assert schedule[0] == pytest.approx(lr_max)
    assert schedule == sorted(schedule, reverse=True) and schedule[-1] >= lr_min


def test_the_learning_rate_of_the_published_training():
    assert [utils.cosine(epoch, 600, 0.025, 0.0) for epoch in (0, 300, 600)] == pytest.approx([0.025, 0.0125, 0.0])


@given(st.integers(2, 12), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 2 ** 31))
def test_a_meter_counts_loss_and_right_answers(classes, batches, seed):
    generator = torch.Generator().manual_seed(seed)
    meter, losses, top1, top5 = Meter(ALONE), [], [], []
    for count in batches:
        logits = torch.randn((count, classes), generator=generator)
        labels = torch.randint(classes, (count,), generator=generator)
        loss = torch.rand((), generator=generator)
        meter.update(logits, labels, loss)
        for row, label in zip(logits, labels, strict=True):
            better = int((row > row[label]).sum())
            losses.append(float(loss))
            top1.append(better < 1)
            top5.append(better < 5)
    values = meter.values()
    assert values['loss'] == pytest.approx(np.mean(losses))
    assert values['top1'] == pytest.approx(100 * np.mean(top1))
    assert values['top5'] == pytest.approx(100 * np.mean(top5))
    assert values['images_per_second'] > 0


def test_a_clock_extrapolates_from_the_steps_since_its_start(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    clock = utils.Clock(step=100, steps=400)
    now[0] += 60
    assert clock.left(120) == '0:14:00'
    assert clock.left(400) == '0:00:00'
    assert clock.left(100).startswith('5:00:00')  # nothing done yet: no division by zero


# ----------------------------------------------------------------------------------------------------------------- sizes

@pytest.mark.parametrize('arch, gflop', [(NAONET_A, 3.35), (NAONET_B, 0.92)])
def test_multiply_adds_of_the_published_networks(arch, gflop):
    with torch.device('meta'):
        model = NASNetworkCIFAR(10, 6, 5, 36, 1.0, 1.0, True, 1, arch)
    assert 2 * utils.count_madds(model, 32) / 1e9 == pytest.approx(gflop, rel=0.01)
    assert model.training


def test_multiply_adds_of_a_layer_and_of_a_path():
    layer = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, groups=8), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), nn.Linear(8, 5)).eval()
    assert utils.count_madds(layer, 8) == 16 * 8 * 27 + 4 * 8 * 9 + 40
    assert not layer.training
    model = NASWSNetworkCIFAR(10, 1, 1, 4, 1.0, 1.0, False, 1)
    heavy, light = (architecture.parse(line) for line in ('0 1 0 1 0 1 0 1', '0 3 0 3 0 3 0 3'))
    assert utils.count_madds(model, 8, heavy) > utils.count_madds(model, 8, light) > 0


def test_multiply_adds_are_those_of_the_operations_not_of_their_faster_forms():
    arch = ' '.join(f'{side} {side + 2}' for side in (0, 1, 1, 0) * 2)  # average and max pools alone
    with torch.device('meta'):
        wanted = utils.count_madds(NASNetworkCIFAR(10, 1, 2, 4, 1.0, 1.0, False, 1, arch), 32)
    assert utils.count_madds(NASNetworkCIFAR(10, 1, 2, 4, 1.0, 1.0, False, 1, arch), 32) == wanted


def test_counting_leaves_the_random_numbers_alone():
    model = NASNetworkCIFAR(10, 1, 1, 2, 0.5, 0.5, True, 1, '0 0 1 1 0 4 1 4')
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    utils.count_madds(model, 32)
    assert_equal(before, (dict(model.state_dict()), torch.get_rng_state()))


# ----------------------------------------------------------------------------------------------------------------- flags

@pytest.mark.parametrize('kind, good, bad', [
    (utils.POSITIVE_INT, ['1', '600'], ['0', '-1', '1.5', 'x', '', 'nan', '1e3']),
    (utils.COUNT, ['0', '7'], ['-1', '0.5', 'None']),
    (utils.POSITIVE, ['1e-9', '3'], ['0', '-0.1', 'nan', 'inf', '-inf', 'x']),
    (utils.NOT_NEGATIVE, ['0', '0.5'], ['-1e-9', 'nan', 'inf']),
    (utils.KEEP, ['1', '0.1'], ['0', '1.01', '-1', 'nan']),
    (utils.FRACTION, ['0', '1', '0.5'], ['1.1', '-0.1', 'nan'])])
def test_numbers_of_flags_are_checked(kind, good, bad):
    for text in good:
        assert kind(text) == float(text)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=rf"must be a .*number (above|of at least).*, not '{text}'"):
            kind(text)


@pytest.mark.parametrize('error, status, words', [
    (UserError('--flag is wrong'), 2, 'program.py: error: --flag is wrong'),
    (utils.NotFiniteError('the loss is nan'), 1, 'program.py: stopped: the loss is nan'),
    (KeyboardInterrupt(), 130, 'program.py: interrupted; the same command goes on')])
def test_a_program_that_fails_says_why_in_one_line(error, status, words, monkeypatch, capsys):
    import signal
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, 'argv', ['somewhere/program.py'])

    def main():
        raise error
    try:
        with pytest.raises(SystemExit) as ended:
            utils.run_program(main)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert ended.value.code == status
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(words)


@pytest.mark.parametrize('name', ['cuda:99', 'nonsense', 'meta', '', 'xla', 'hpu', 'cpu:x'])
def test_a_device_that_cannot_be_used_is_a_users_error(name):
    with pytest.raises(UserError, match=rf'--device={name} .*use cpu, cuda, cuda:N or mps') as error:
        utils.choose_device(name)
    assert len(str(error.value).splitlines()) == 1


# ----------------------------------------------------------------------------------------------------------- checkpoints

def small_network(channels=2, classes=10, use_aux_head=False, arch='0 0 1 1 0 4 1 4'):
    return NASNetworkCIFAR(classes, 1, 1, channels, 1.0, 1.0, use_aux_head, 1, arch)


def test_a_checkpoint_reads_back(tmp_path):
    state = {'args': {'seed': 1, 'fixed_arc': None}, 'model': small_network().state_dict(), 'epoch': 3,
             'random': {'default': torch.get_rng_state()}, 'accuracies': [0.5], 'ranked': [(0.1, 'x')]}
    save_checkpoint(ALONE, state, tmp_path / 'one.pt', tmp_path / 'two.pt')
    assert files(tmp_path) == ['one.pt', 'two.pt']
    for name in ('one.pt', 'two.pt'):
        assert_equal(load_checkpoint(tmp_path / name), {**state, 'model': dict(state['model'])})


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), RuntimeError('PytorchStreamWriter: failed writing')])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_it(error, tmp_path, monkeypatch):
    path = tmp_path / 'checkpoint.pt'
    save_checkpoint(ALONE, {'model': {'a': torch.ones(3)}}, path)

    def write_half(state, file):
        file.write(b'PK half of a checkpoint')
        raise error
    monkeypatch.setattr(torch, 'save', write_half)
    with pytest.raises(UserError, match=f'{path} cannot be written .*(No space left|failed writing)'):
        save_checkpoint(ALONE, {'model': {'a': torch.zeros(3)}}, path)
    assert files(tmp_path) == ['checkpoint.pt']
    assert torch.equal(load_checkpoint(path)['model']['a'], torch.ones(3))


def test_an_interruption_while_writing_leaves_the_checkpoint_before_and_no_other_file(tmp_path, monkeypatch):
    path = tmp_path / 'checkpoint.pt'
    save_checkpoint(ALONE, {'model': {'a': torch.ones(3)}}, path)

    def write_half(state, file):
        file.write(b'PK half of a checkpoint')
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, 'save', write_half)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(ALONE, {'model': {'a': torch.zeros(3)}}, path)
    assert files(tmp_path) == ['checkpoint.pt']
    assert torch.equal(load_checkpoint(path)['model']['a'], torch.ones(3))


@pytest.mark.parametrize('prefix', ['', 'module.'])
@pytest.mark.parametrize('best', [97.1, np.float64(97.1), torch.tensor(97.1)])
def test_a_checkpoint_of_the_reference_loads_strictly(prefix, best, tmp_path):
    network = small_network(use_aux_head=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    path = tmp_path / 'published.pt'
    torch.save({'args': argparse.Namespace(arch='0 0 1 1 0 4 1 4', layers=1, lr_max=0.025, use_aux_head=True),
                'model': {prefix + name: tensor for name, tensor in network.state_dict().items()}, 'epoch': 600, 'step': 5,
                'optimizer': optimizer.state_dict(), 'best_acc_top1': best}, path)
    state = load_checkpoint(path)
    assert state['args'] == {'arch': '0 0 1 1 0 4 1 4', 'layers': 1, 'lr_max': 0.025, 'use_aux_head': True}
    assert float(state['best_acc_top1']) == pytest.approx(97.1)
    other = small_network(use_aux_head=True)
    load_model(other, state['model'], path)
    assert_equal(dict(other.state_dict()), dict(network.state_dict()))


def test_a_checkpoint_from_before_batch_norm_counted_its_batches_loads():
    network, other = small_network(), small_network()
    weights = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith('num_batches_tracked')}
    load_model(other, weights, 'old.pt')
    for name, tensor in weights.items():
        assert torch.equal(other.state_dict()[name], tensor)


@pytest.mark.parametrize('other, words', [
    ({'classes': 100}, r'is for 100 classes, this data set has 10; give the --dataset'),
    ({'channels': 3}, r'is of another architecture or size: \d+ of its parameters differ, such as .*--channels'),
    ({'arch': '0 1 1 0 0 4 1 4'}, r'is of another architecture or size: \d+ of its parameters differ'),
    ({'use_aux_head': True}, r'is of another architecture or size: .* such as auxiliary_head.*--use_aux_head')])
def test_weights_of_another_network_are_refused_and_change_nothing(other, words):
    network = small_network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(UserError, match='some/path.pt: ' + words):
        load_model(network, small_network(**other).state_dict(), 'some/path.pt')
    assert_equal(dict(network.state_dict()), before)


def test_a_cut_off_checkpoint_is_refused_wherever_it_was_cut(tmp_path):
    path = tmp_path / 'checkpoint.pt'
    save_checkpoint(ALONE, {'args': {}, 'model': small_network().state_dict(), 'epoch': 1}, path)
    content = path.read_bytes()
    for length in [0, 1, 2, 3, 4, 10, 100, *range(1000, len(content), 4999), len(content) - 1]:
        path.write_bytes(content[:length])
        assert_refused(path, 'is not a readable checkpoint')


@pytest.mark.parametrize('content', [
    b'', b'\n', b'text\n', b'PK\x03\x04', b'\x80\x02.', b'\x80\x02}.', pickle.dumps({'model': 1}), pickle.dumps([1]),
    bytes(range(256)), b'0' * 10000])
def test_a_file_that_is_no_checkpoint_is_refused(content, tmp_path):
    path = tmp_path / 'checkpoint.pt'
    path.write_bytes(content)
    assert_refused(path, 'is not a')


@pytest.mark.parametrize('state', [[1, 2], {'weights': {}}, {'model': 3}, torch.ones(2), {'model': {'a': 1}, 'args': 7}])
def test_another_saved_object_is_refused(state, tmp_path):
    path = tmp_path / 'checkpoint.pt'
    torch.save(state, path)
    assert_refused(path, 'is not a checkpoint')


def test_a_missing_checkpoint_is_named(tmp_path):
    assert_refused(tmp_path / 'none.pt', 'there is no such checkpoint')
    assert_refused(tmp_path, 'is not a readable checkpoint')


class Malicious:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (open, (self.path, 'w'))


def test_a_malicious_checkpoint_is_refused_and_not_executed(tmp_path):
    trap = Malicious()
    trap.path = str(tmp_path / 'executed')
    path = tmp_path / 'checkpoint.pt'
    for write in (torch.save, lambda state, path: path.write_bytes(pickle.dumps(state))):
        write({'args': {}, 'model': {'a': trap}}, path)
        assert_refused(path, 'is not a readable checkpoint')
        assert not (tmp_path / 'executed').exists()
    pickle.loads(path.read_bytes())['model']['a'].close()
    assert (tmp_path / 'executed').exists()  # the trap is one


def test_numbers_of_old_and_new_numpy_load(tmp_path):
    path = tmp_path / 'checkpoint.pt'
    for number in (np.float64(97.25), np.float32(97.25)):
        torch.save({'args': {}, 'model': {}, 'best_acc_top1': number}, path, _use_new_zipfile_serialization=False)
        assert float(load_checkpoint(path)['best_acc_top1']) == 97.25
        content = path.read_bytes()
        assert b'numpy._core' in content
        path.write_bytes(content.replace(b'numpy._core', b'numpy.core'))  # before numpy 2
        assert float(load_checkpoint(path)['best_acc_top1']) == 97.25


def assert_refused(path, words):
    with warnings.catch_warnings(), pytest.raises(UserError, match=re.escape(f'{path}: {words}')) as error:
        warnings.simplefilter('error')  # a warning would be a second line on stderr
        load_checkpoint(path)
    assert len(str(error.value).splitlines()) == 1 and str(error.value).isprintable()
