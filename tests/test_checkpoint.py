"""Checkpoints: written whole or not at all, read without trusting them, refused in one line."""

import argparse
import pickle
import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import assert_equal, files

import checkpoint
from flags import UserError
from model import NASNetworkCIFAR

CPU = torch.device('cpu')
ALONE = SimpleNamespace(device=CPU, is_first=True, rank=0, world=1, sum=lambda values: values)  # a run of one process


def small_network(channels=2, classes=10, use_aux_head=False, arch='0 0 1 1 0 4 1 4'):
    return NASNetworkCIFAR(classes, 1, 1, channels, 1.0, 1.0, use_aux_head, 1, arch)


def test_a_checkpoint_reads_back(tmp_path):
    state = {'args': {'seed': 1, 'fixed_arc': None}, 'model': small_network().state_dict(), 'epoch': 3,
             'random': [{'default': torch.get_rng_state()}], 'accuracies': [0.5], 'ranked': [(0.1, 'x')]}
    checkpoint.save(state, tmp_path / 'one.pt', tmp_path / 'two.pt')
    assert files(tmp_path) == ['one.pt', 'two.pt']
    for name in ('one.pt', 'two.pt'):
        assert_equal(checkpoint.load(tmp_path / name), {**state, 'model': dict(state['model'])})


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), RuntimeError('PytorchStreamWriter: failed writing')])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_it(error, tmp_path, monkeypatch):
    path = tmp_path / 'checkpoint.pt'
    checkpoint.save({'model': {'a': torch.ones(3)}}, path)

    def write_half(state, file):
        file.write(b'PK half of a checkpoint')
        raise error
    monkeypatch.setattr(torch, 'save', write_half)
    with pytest.raises(UserError, match=f'{path} cannot be written .*(No space left|failed writing)'):
        checkpoint.save({'model': {'a': torch.zeros(3)}}, path)
    assert files(tmp_path) == ['checkpoint.pt']
    assert torch.equal(checkpoint.load(path)['model']['a'], torch.ones(3))


def test_an_interruption_while_writing_leaves_the_checkpoint_before_and_no_other_file(tmp_path, monkeypatch):
    path = tmp_path / 'checkpoint.pt'
    checkpoint.save({'model': {'a': torch.ones(3)}}, path)

    def write_half(state, file):
        file.write(b'PK half of a checkpoint')
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, 'save', write_half)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save({'model': {'a': torch.zeros(3)}}, path)
    assert files(tmp_path) == ['checkpoint.pt']
    assert torch.equal(checkpoint.load(path)['model']['a'], torch.ones(3))


@pytest.mark.parametrize('prefix', ['', 'module.'])
@pytest.mark.parametrize('best', [97.1, np.float64(97.1), torch.tensor(97.1)])
def test_a_checkpoint_of_the_reference_loads_strictly(prefix, best, tmp_path):
    network = small_network(use_aux_head=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    path = tmp_path / 'published.pt'
    torch.save({'args': argparse.Namespace(arch='0 0 1 1 0 4 1 4', layers=1, lr_max=0.025, use_aux_head=True),
                'model': {prefix + name: tensor for name, tensor in network.state_dict().items()}, 'epoch': 600, 'step': 5,
                'optimizer': optimizer.state_dict(), 'best_acc_top1': best}, path)
    state = checkpoint.load(path)
    assert state['args'] == {'arch': '0 0 1 1 0 4 1 4', 'layers': 1, 'lr_max': 0.025, 'use_aux_head': True}
    assert float(state['best_acc_top1']) == pytest.approx(97.1)
    other = small_network(use_aux_head=True)
    checkpoint.fill_model(other, state['model'], path)
    assert_equal(dict(other.state_dict()), dict(network.state_dict()))


def test_a_checkpoint_from_before_batch_norm_counted_its_batches_loads():
    network, other = small_network(), small_network()
    weights = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith('num_batches_tracked')}
    checkpoint.fill_model(other, weights, 'old.pt')
    for name, tensor in weights.items():
        assert torch.equal(other.state_dict()[name], tensor)


@pytest.mark.parametrize('other, words', [
    ({'classes': 100}, r'is for 100 classes, this data set has 10; give the --dataset'),
    ({'channels': 3}, r'is of another architecture or size \(size mismatch for stem.0.weight.*--channels'),
    ({'arch': '0 1 1 0 0 4 1 4'}, r'is of another architecture or size \(.*cells'),
    ({'use_aux_head': True}, r'is of another architecture or size \(Unexpected key.*auxiliary_head.*--use_aux_head')])
def test_weights_of_another_network_are_refused(other, words):
    with pytest.raises(UserError, match='some/path.pt: ' + words) as error:
        checkpoint.fill_model(small_network(), dict(small_network(**other).state_dict()), 'some/path.pt')
    assert len(str(error.value).splitlines()) == 1


def test_a_cut_off_checkpoint_is_refused_wherever_it_was_cut(tmp_path):
    path = tmp_path / 'checkpoint.pt'
    checkpoint.save({'args': {}, 'model': small_network().state_dict(), 'epoch': 1}, path)
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


@pytest.mark.parametrize('state', [[1, 2], {'weights': {}}, {'model': 3}, torch.ones(2), {'model': {'a': 1}, 'args': 7},
                                   {'model': {5: torch.ones(2)}}])
def test_another_saved_object_is_refused(state, tmp_path):
    path = tmp_path / 'checkpoint.pt'
    torch.save(state, path)
    assert_refused(path, 'is not a checkpoint')


IMAGES = {'classes': ['a'], 'size': 32, 'mean': [0.5] * 3, 'std': [0.2] * 3}


@pytest.mark.parametrize('field, value', [
    ('random', 5), ('random', [5]), ('metrics_bytes', 'x'), ('metrics_bytes', -1), ('metrics_bytes', None),
    ('last_acc_top1', 'x'), ('classes', [5]), ('arch', 5), ('pool', [5]), ('controller', [5]), ('accuracies', ['x']),
    ('born', 'x'), ('rounds', [5]), ('rounds', [['x', 0]]), ('images', 5), ('mean', 'x'), ('mean', ['x']), ('std', None),
    ('size', -1)])
def test_a_field_of_another_kind_is_named(field, value, tmp_path):
    path = tmp_path / 'checkpoint.pt'
    of_images = field in ('mean', 'std', 'size')
    torch.save({'model': {}, 'args': {}} | ({'images': IMAGES | {field: value}} if of_images else {field: value}), path)
    assert_refused(path, f'its "{field}" is damaged (')


@pytest.mark.parametrize('name', ['seed', 'dataset', 'method', 'search_space', 'proposer', 'image_size',
                                  'train_images', 'valid_images', 'holdout'])
def test_what_makes_a_run_another_one(name):
    state = {'args': {name: 1, 'epochs': 5}}
    checkpoint.same_run(state, argparse.Namespace(**{name: 1, 'epochs': 6}), 'x.pt')
    checkpoint.same_run({'args': {}}, argparse.Namespace(**{name: 1}), 'x.pt')  # before there was such a flag
    with pytest.raises(UserError, match=f'x.pt: is of a run with --{name}=1, not --{name}=2; give that to go on with it'):
        checkpoint.same_run(state, argparse.Namespace(**{name: 2}), 'x.pt')


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
        assert float(checkpoint.load(path)['best_acc_top1']) == 97.25
        content = path.read_bytes()
        assert b'numpy._core' in content
        path.write_bytes(content.replace(b'numpy._core', b'numpy.core'))  # before numpy 2
        assert float(checkpoint.load(path)['best_acc_top1']) == 97.25


def assert_refused(path, words):
    with warnings.catch_warnings(), pytest.raises(UserError, match=re.escape(f'{path}: {words}')) as error:
        warnings.simplefilter('error')  # a warning would be a second line on stderr
        checkpoint.load(path)
    assert len(str(error.value).splitlines()) == 1 and str(error.value).isprintable()
