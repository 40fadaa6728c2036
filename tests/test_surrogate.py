"""tools/surrogate.py: what describes a cell, a truth that follows what was measured, and searches of it."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tooling import mistake, output, tool

from architecture import reorder_nodes, sample, vocabulary

surrogate = tool('tools/surrogate.py')
WORDS = vocabulary(5, 'small')


def drawn(count, seed=0):
    return sample(count, 5, range(5), torch.Generator().manual_seed(seed))


def write_results(folder, archs, accuracies):
    """What a search leaves of its trainings, one of which failed."""
    folder.mkdir(parents=True)
    lines = [{'kind': 'candidate', 'arch': str(drawn(1, 99)[0]), 'accuracy': 0.0, 'error': 'out of memory'}]
    lines += [{'kind': 'candidate', 'arch': str(arch), 'accuracy': float(accuracy), 'seconds': 1.0}
             for arch, accuracy in zip(archs, accuracies, strict=True)]
    (folder / 'results.0.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return folder


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Two searches, of different images, in which convolutions help."""
    folders = []
    for seed in (0, 1):
        archs = drawn(60, seed)
        convolutions = surrogate.features(archs)[:, :2].sum(1)
        folders.append(write_results(tmp_path_factory.mktemp('known') / f'seed{seed}', archs, 0.3 + 0.05 * seed
                                     + 0.01 * convolutions))
    return folders


@given(st.integers(0, 2 ** 32))
def test_a_cell_is_described_however_it_is_written(seed):
    archs = drawn(5, seed)
    rows = reorder_nodes(WORDS.tokens(archs, torch.device('cpu')), torch.Generator().manual_seed(seed))
    written = [WORDS.decode(row) for row in rows.tolist()]
    assert np.allclose(surrogate.features(archs), surrogate.features(written))


def test_a_truth_follows_what_was_measured_and_another_seed_draws_another(trained):
    measured = surrogate.read_measured(trained)
    (trained[1] / 'results.0.jsonl').rename(trained[1] / 'results.1.jsonl')  # of another process
    assert np.array_equal(surrogate.read_measured(trained).accuracies, measured.accuracies)
    assert measured.accuracies.shape == (120,) and measured.groups.tolist() == [0] * 60 + [1] * 60
    archs = drawn(200, 2)
    convolutions = surrogate.features(archs)[:, :2].sum(1)
    one, again, other = (surrogate.Truth(measured, seed)(archs) for seed in (0, 0, 1))
    assert np.array_equal(one, again) and not np.allclose(one, other)
    means = np.mean([surrogate.Truth(measured, seed)(archs) for seed in range(8)], axis=0)
    assert np.corrcoef(means, convolutions)[0, 1] > 0.5


@pytest.mark.parametrize('proposer', ['evolution', 'controller'])
def test_a_search_is_the_same_again_and_is_kept(trained, tmp_path, monkeypatch, proposer):
    monkeypatch.setattr(surrogate, 'SEARCH', {'initial': 20, 'round': 5, 'rounds': 2})
    command = ('tools/surrogate.py', *trained, f'--proposer={proposer}', '--controller_epochs=60',
               '--controller_lr=0.01', '--controller_unlabelled=50', '--controller_later_updates=5')
    shown = output(*command, '--seeds=2', f'--keep={tmp_path / "kept"}')
    assert f'{proposer}, 2 searches' in shown and 'best score after 120' in shown
    searches = [json.loads(line) for line in (tmp_path / 'kept').read_text().splitlines()]
    assert [each['seed'] for each in searches] == [1000, 1001]
    assert all(len(each['measured']) == len(each['truth']) == 30 for each in searches)
    with monkeypatch.context() as patch:
        patch.delattr(surrogate, 'search')
        assert output(*command, '--seeds=2', f'--keep={tmp_path / "kept"}') == shown
    alone = output(*command, '--seeds=1', f'--keep={tmp_path / "anew"}')
    again = json.loads((tmp_path / 'anew').read_text())
    assert again['measured'] == searches[0]['measured'] and f'{proposer}, 1 searches' in alone


def test_mistakes(trained, tmp_path):
    assert 'has no results.*.jsonl with a training' in mistake('tools/surrogate.py', tmp_path)
    assert 'has no results.*.jsonl with a training' in mistake('tools/surrogate.py', write_results(tmp_path / 'new', [], []))
    assert 'folder does not exist' in mistake('tools/surrogate.py', *trained, f'--keep={tmp_path / "no" / "kept"}')
    assert 'must be equal' in mistake('tools/surrogate.py', *trained, '--controller_encoder_hidden_size=64')
    other = write_results(tmp_path / 'other', ['0 1 1 2 0 3 1 4'], [0.5])
    assert 'an architecture has 8 x 5 nodes' in mistake('tools/surrogate.py', other)
