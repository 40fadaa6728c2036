"""Runs that an earlier version of the code began go on: tests/data/before.tar.xz has a killed one of each program."""

import re
import tarfile

import pytest
from helpers import DATA, TINY, files, load, metrics, run

CONTROLLER = ['--controller_epochs=20', '--controller_batch_size=10', '--controller_lr=0.01',
              '--controller_encoder_hidden_size=8', '--controller_encoder_emb_size=4', '--controller_decoder_hidden_size=8',
              '--controller_mlp_hidden_size=8']
SEARCH = ['train_search.py', '--dataset=digits', '--device=cpu', '--seed=1', '--child_layers=1', '--child_channels=2',
          '--child_nodes=1', '--child_batch_size=36', '--child_eval_batch_size=16', '--child_rank_count=2',
          '--child_rank_epochs=1', '--child_epochs=2', '--controller_seed_arch=12', '--controller_new_arch=5', *CONTROLLER]
NETWORK = ['--device=cpu', '--nodes=1', '--layers=1', '--channels=2', '--seed=3', f'--fixed_arc={TINY}', '--epochs=2',
           '--batch_size=16', '--drop_path_keep_prob=0.7', '--keep_prob=0.8']
RUNS = {  # its folder -> the command that began it, where it stopped, the kinds of its metrics
    'cifar': (['train_cifar.py', *NETWORK, '--dataset=digits', '--cutout_size=4', '--lr_max=0.1'], 'epoch 1', ['epoch'] * 2),
    'imagenet': (['train_imagenet.py', *NETWORK, '--lr=0.0125', '--workers=0', '--data=images'], 'epoch 1', ['epoch'] * 2),
    'search': ([*SEARCH, '--child_eval_epochs=1'], 'epoch 1, next: propose',
               ['epoch', 'score', 'controller', 'new', 'epoch', 'score', 'rank', 'rank']),
    'search_complete': ([*SEARCH, '--method=NAO', '--rounds=1', '--no-child_use_aux_head'],
                        '2 of 12 architectures in round 0, next: evaluate',
                        ['score', 'controller', 'new', 'score', 'rank', 'rank']),
}


@pytest.mark.parametrize('name', RUNS)
def test_a_run_of_an_earlier_version_goes_on(name, tmp_path):
    with tarfile.open(DATA / 'before.tar.xz') as archive:
        archive.extractall(tmp_path, filter='data')
    command, where, kinds = RUNS[name]
    few = f'import datasets\ndatasets.DIGITS_FILE = {str(tmp_path / "few_digits.npz")!r}\n'
    result = run(*command, f'--output_dir={name}', cwd=tmp_path, preamble=few)
    assert result.status == 0, result
    assert re.search(f'resumed after {where}', result.out) and 'finished' in result.out, result.out
    assert [line['kind'] for line in metrics(tmp_path / name)] == kinds
    assert load(tmp_path / name / 'checkpoint.pt')['epoch'] == (1 if name == 'search_complete' else 2)
    if name == 'search_complete':
        assert result.out.count('candidate 3/12 epoch 1/2') == 0 and result.out.count('candidate 3/12 epoch 2/2') == 1
        assert not [file for file in files(tmp_path / name) if file.startswith('candidate')]
