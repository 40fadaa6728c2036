"""Search by NAO-V2: iterations on new architectures alone, drawn by their sizes; how it goes on after kills."""

import itertools
import json
import re
import signal
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    assert_equal,
    assert_user_error,
    complaints,
    few_digits,
    files,
    kill_at,
    load,
    make_run,
    metrics,
    run,
    without_speed,
)

import search_setup
from architecture import sample
from model import NASNetworkCIFAR, count_parameters
from operations import SEARCH_SPACES
from train_search import WeightSharingSearch

PROGRAM = 'train_search.py'
FLAGS = ['--method=NAO-V2', '--dataset=digits', '--device=cpu', '--seed=1', '--child_nodes=1', '--child_layers=1',
         '--child_channels=2', '--child_batch_size=36', '--child_eval_batch_size=16', '--child_epochs=2', '--rounds=2',
         '--child_drop_path_keep_prob=0.5', '--child_rank_count=2', '--child_rank_epochs=1', '--controller_seed_arch=12',
         '--controller_new_arch=5', '--controller_epochs=5', '--controller_lr=0.01', '--controller_encoder_hidden_size=24',
         '--controller_decoder_hidden_size=24']
WATCH = """
import json, torch, architecture, model_search, search_setup, training
def record(**values):
    with open({path!r}, 'a') as file:
        file.write(json.dumps(values) + '\\n')
real_forward, real_epoch = model_search.Supernet.forward, training.train_epoch
def forward(self, images, arch, step=None, **options):
    if self.training and torch.is_grad_enabled() and images.any():
        record(arch=str(architecture.parse(arch)), step=step, steps=self.steps)
    return real_forward(self, images, arch, step, **options)
def train_epoch(run, forward, optimizer, *others, **options):
    def state():
        parameters = optimizer.param_groups[0]['params']
        momentum = [optimizer.state[each]['momentum_buffer'] for each in parameters]
        return [sum(each.detach().abs().sum().item() for each in tensors) for tensors in (momentum, parameters)]
    before = state()
    result = real_epoch(run, forward, optimizer, *others, **options)
    if options['title'].startswith('epoch'):
        record(before=before, after=state(), lr=options['lr'])
    return result
def build(*args):
    record(ranked=args[-1])
    return real_build(*args)
real_build = search_setup.build
model_search.Supernet.forward, training.train_epoch, search_setup.build = forward, train_epoch, build
"""


@pytest.fixture(scope='module')
def few(tmp_path_factory):
    return few_digits(tmp_path_factory.mktemp('digits'), 80)


@pytest.fixture(scope='module')
def searched(tmp_path_factory, few):
    """An uninterrupted search of three iterations: its folder, what it said, and what it trained on."""
    folder = tmp_path_factory.mktemp('searched') / 'out'
    seen = folder.parent / 'seen'
    result = run(PROGRAM, *FLAGS, f'--output_dir={folder}', preamble=few + WATCH.format(path=str(seen)))
    return folder, result, [json.loads(line) for line in seen.read_text().splitlines()]


def lines(folder, name):
    return (folder / name).read_text().splitlines()


def test_after_each_iteration_all_architectures_so_far_are_scored(searched):
    folder, result, _ = searched
    assert 'were proposed in the search (rounds ' in result.out
    assert result.status == 0 and complaints(result) == [], result
    names = ['', '.0', '.1', '.2', '.final']
    assert files(folder) == sorted([f'arch_pool{name}' for name in names] + [f'arch_pool.perf{name}' for name in names]
                                   + ['arch_pool.pareto', 'arch_pool.pareto.perf', 'checkpoint.pt', 'metrics.jsonl',
                                      'results.0.jsonl'])
    pools = [lines(folder, f'arch_pool.{number}') for number in range(3)]
    new = [line['new'] for line in metrics(folder) if line['kind'] == 'new']
    assert [len(set(pool)) for pool in pools] == [12, 12 + new[0], 12 + sum(new)] and all(1 <= count <= 5 for count in new)
    assert set(pools[0]) < set(pools[1]) < set(pools[2]) and lines(folder, 'arch_pool') == pools[2]
    for number, pool in enumerate(pools):
        scores = list(map(float, lines(folder, f'arch_pool.perf.{number}')))
        assert len(scores) == len(pool) and scores == sorted(scores, reverse=True)
    assert sorted(lines(folder, 'arch_pool.final')) == sorted(pools[2][:2])
    kinds = ['epoch', 'epoch', 'score', 'controller', 'new']
    assert [line['kind'] for line in metrics(folder)] == [*kinds, *kinds, *kinds[:3], 'rank', 'rank']
    assert [line['epoch'] for line in metrics(folder) if line['kind'] in ('epoch', 'score')] == [1, 2, 2, 3, 4, 4, 5, 6, 6]


def test_an_iteration_trains_on_what_is_new_with_schedules_that_begin_anew(searched):
    folder, result, seen = searched
    pools = [set(lines(folder, f'arch_pool.{number}')) for number in range(3)]
    new = [pools[0], pools[1] - pools[0], pools[2] - pools[1]]
    steps, epochs = [one for one in seen if 'step' in one], [one for one in seen if 'lr' in one]
    assert len(steps) == 12 and len(epochs) == 6  # 72 images, 36 a batch
    for number in range(3):
        mine = steps[4 * number:4 * number + 4]
        assert [one['step'] for one in mine] == [0, 1, 2, 3] and all(one['steps'] == 4 for one in mine)
        assert all(one['arch'] in new[number] for one in mine)
    assert [one['lr'] for one in epochs] == pytest.approx([0.025, 0.013] * 3)
    assert epochs[0]['before'][0] == 0
    for one, other in itertools.pairwise(epochs):  # weights and momentum go on
        assert other['before'] == one['after'] and other['before'][0] > 0
    assert [one['ranked'] for one in seen if 'ranked' in one] == [12, 12]  # the steps of the whole search
    assert re.search(r'epoch 3/6 train .* lr 0\.025 left', result.out)
    assert re.search(r'6 epochs of 2 steps .* 3 scorings of 12 to 22 architectures .* of 2 fits', result.out)


def test_a_search_killed_in_its_iterations_ends_bit_identical(searched, few, tmp_path):
    command = [PROGRAM, *FLAGS, f'--output_dir={tmp_path}']
    for moment in (('an epoch', 2, True), ('a fit', 1, True), ('an epoch', 2, False), ('a candidate', 2, False)):
        killed = run(*command, preamble=few + kill_at(*moment))
        assert killed.status == -signal.SIGKILL, (moment, killed)
    assert run(*command, preamble=few).status == 0
    assert files(tmp_path) == files(searched[0])
    for name in files(tmp_path):
        if name.startswith('arch_pool'):
            assert (tmp_path / name).read_bytes() == (searched[0] / name).read_bytes(), name
    one, two = (load(folder / 'checkpoint.pt') for folder in (searched[0], tmp_path))
    for state in (one, two):
        del state['args']['output_dir'], state['metrics_bytes']
    assert_equal(one, two)
    assert without_speed(metrics(tmp_path)) == without_speed(metrics(searched[0]))


def test_a_finished_search_does_more_iterations_when_asked_for(few, tmp_path):
    command = [PROGRAM, *FLAGS, '--child_epochs=1', '--child_rank_count=1', f'--output_dir={tmp_path}']
    assert run(*command, '--rounds=0', preamble=few).status == 0
    result = run(*command, '--rounds=1', preamble=few)
    assert result.status == 0 and 'next: fit, with other flags: --rounds=1 (was 0)' in result.out, result
    assert 'epoch 2/2 train' in result.out and len(lines(tmp_path, 'arch_pool.1')) > 12


def test_another_space_is_refused(tmp_path):
    assert_user_error(run(PROGRAM, *FLAGS, '--search_space=large', f'--output_dir={tmp_path}'), '--search_space=large', 'NAO')


def test_help_shows_the_defaults_of_the_method():
    text = run(PROGRAM, '--method=NAO-V2', '--help').out
    for flag, default in (
            ('rounds', 3), ('child_epochs', 50), ('child_sampling', 'parameters'), ('controller_seed_arch', 1000),
            ('controller_new_arch', 300), ('controller_epochs', 1000), ('controller_l2_reg', '0.0'),
            ('controller_encoder_emb_size', 32), ('controller_encoder_hidden_size', 64), ('controller_mlp_layers', 0),
            ('controller_decoder_hidden_size', 64), ('child_lr_max', 0.025), ('child_lr_min', 0.001), ('child_channels', 20)):
        assert re.search(rf'\n +--{flag} .*\(default: {default}\)', text), flag
    assert re.search(r'--controller_expand .*NAO-V2: 10\)', text)
    assert search_setup.METHOD_DEFAULTS['NAO-V2']['controller_expand'] == 10


# --------------------------------------------------------------------------------------------------------------- sampling

@pytest.mark.parametrize('sampling', search_setup.SAMPLING)
def test_architectures_are_drawn_uniformly_or_by_their_parameters(sampling):
    pool, sizes = [0, 1, 2], [1000, 3000, 6000]
    search = SimpleNamespace(args=SimpleNamespace(child_sampling=sampling), run=make_run(), parameters=sizes.__getitem__)
    drawn = torch.tensor(WeightSharingSearch.draw(search, pool, 20_000)).bincount() / 20_000
    wanted = torch.tensor([1 / 3] * 3 if sampling == 'uniform' else [0.1, 0.3, 0.6])
    assert torch.allclose(drawn, wanted, atol=0.015)  # four standard deviations
    assert search.run.generators['search'].get_state().ne(make_run().generators['search'].get_state()).any()


@pytest.mark.parametrize('use_aux_head', [False, True])
def test_parameters_are_those_of_the_architectures_own_network_without_the_auxiliary_head(use_aux_head):
    args = SimpleNamespace(child_layers=1, child_nodes=2, child_channels=4, child_use_aux_head=use_aux_head)
    count = search_setup.parameter_counter(args, SimpleNamespace(network=NASNetworkCIFAR, classes=7, image_size=32))
    for arch in sample(3, 2, SEARCH_SPACES['small'], torch.Generator().manual_seed(0)):
        assert count(arch) == count_parameters(NASNetworkCIFAR(7, 1, 2, 4, 1.0, 1.0, use_aux_head, 1, arch))
