"""train_search.py in processes of its own: what a search writes, how it goes on after kills, every kind of bad input."""

import re
import shutil
import signal

import pytest
import torch
from helpers import (
    NAONET_A,
    Program,
    assert_equal,
    assert_user_error,
    complaints,
    few_digits,
    files,
    kill_at,
    load,
    metrics,
    run,
    sizes_of,
    without_speed,
)

import architecture
from architecture import parse, sample, vocabulary
from costs import NETWORKS, Size, counter
from model import NASNetworkImageNet
from operations import SEARCH_SPACES

PROGRAM = 'train_search.py'
FLAGS = ['--dataset=digits', '--device=cpu', '--seed=1', '--child_nodes=2', '--child_layers=1', '--child_channels=2',
         '--child_batch_size=36', '--child_eval_batch_size=16', '--child_epochs=2', '--child_eval_epochs=1',
         '--child_rank_count=2', '--child_rank_epochs=1', '--child_cutout_size=4', '--controller_seed_arch=20',
         '--controller_new_arch=8', '--controller_epochs=20', '--controller_batch_size=10', '--controller_lr=0.01',
         '--controller_encoder_hidden_size=24', '--controller_decoder_hidden_size=24', '--controller_mlp_hidden_size=20']
PHASES = 8  # start, train, score, fit, propose, train, score, rank: each ends with a checkpoint
SMALL = SEARCH_SPACES['small']


@pytest.fixture(scope='module')
def few(tmp_path_factory):
    return few_digits(tmp_path_factory.mktemp('digits'), 200)


@pytest.fixture(scope='module')
def searched(tmp_path_factory, few):
    """An uninterrupted search: its folder and what it said."""
    folder = tmp_path_factory.mktemp('searched') / 'out'
    return folder, run(PROGRAM, *FLAGS, f'--output_dir={folder}', preamble=few)


def lines(folder, name):
    return (folder / name).read_text().splitlines()


def accuracies(folder, name):
    return [float(line) for line in lines(folder, name)]


def assert_same_search(folder, other):
    """Both ended with the same pool files, metrics and bit-identical checkpoints."""
    assert files(folder) == files(other)
    for name in files(folder):
        if name.startswith('arch_pool'):
            assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    one, two = load(folder / 'checkpoint.pt'), load(other / 'checkpoint.pt')
    for state in (one, two):
        del state['args']['output_dir'], state['metrics_bytes']
    assert_equal(one, two)
    assert without_speed(metrics(folder)) == without_speed(metrics(other))


# ------------------------------------------------------------------------------------------------------ what it writes

def test_a_search_writes_its_pools_metrics_and_one_checkpoint(searched):
    folder, result = searched
    assert result.status == 0 and complaints(result) == [], result
    pools = [f'arch_pool{suffix}' for suffix in ('', '.1', '.2', '.final', '.perf', '.perf.1', '.perf.2', '.perf.final')]
    pools = sorted([*pools, 'arch_pool.pareto', 'arch_pool.pareto.perf'])
    assert files(folder) == [*pools, 'checkpoint.pt', 'metrics.jsonl', 'results.0.jsonl']
    state = load(folder / 'checkpoint.pt')
    assert {'args', 'model', 'epoch', 'step', 'optimizer', 'best_acc_top1'} <= set(state)
    assert (state['epoch'], state['step']) == (2, 8)  # 144 images, 36 a batch
    assert state['args']['child_lr_max'] == 0.025
    assert [line['kind'] for line in metrics(folder)] == [
        'epoch', 'score', 'controller', 'new', 'epoch', 'score', 'rank', 'rank']


def test_the_front_of_accuracy_and_cost_is_that_of_the_last_scoring(searched):
    folder, _ = searched
    scores = dict(zip(lines(folder, 'arch_pool.2'), accuracies(folder, 'arch_pool.perf.2'), strict=True))
    count = counter(NETWORKS['cifar'])
    points = {line: (score, count(parse(line)).madds) for line, score in scores.items()}
    front, written = (lines(folder, f'arch_pool.pareto{suffix}') for suffix in ('', '.perf'))
    assert [tuple(map(float, line.split())) for line in written] == [points[line] for line in front]
    assert {line for line, (score, madds) in points.items() if not any(
        other >= score and cost <= madds and (other, cost) != (score, madds) for other, cost in points.values())} == set(front)


@pytest.mark.parametrize('suffix', ['.1', '.2', ''])
def test_a_scored_pool_is_written_best_first_with_its_accuracies(suffix, searched):
    folder, _ = searched
    pool, scores = lines(folder, f'arch_pool{suffix}'), accuracies(folder, f'arch_pool.perf{suffix}')
    assert len(pool) == len(scores) == 20 == len(set(pool))
    assert all(str(parse(line, 2, SMALL)) == line for line in pool)
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 and (score * 16).is_integer() for score in scores)  # of a minibatch of 16
    if suffix:
        line, = (line for line in metrics(folder) if line['kind'] == 'score' and line['epoch'] == int(suffix[1:]))
        assert line['accuracies'] == scores and line['best_arch'] == pool[0]
    else:
        assert pool == lines(folder, 'arch_pool.2') and scores == accuracies(folder, 'arch_pool.perf.2')


def test_new_architectures_replace_the_worst(searched):
    folder, _ = searched
    before, after = lines(folder, 'arch_pool.1'), set(lines(folder, 'arch_pool.2'))
    line, = (line for line in metrics(folder) if line['kind'] == 'new')
    assert 1 <= line['new'] <= 8 and sum(line['per_lambda'].values()) == line['new']
    assert list(line['per_lambda']) == [str(step) for step in range(1, len(line['per_lambda']) + 1)]
    kept = before[:20 - line['new']]
    assert set(kept) <= after
    assert len(after - set(before)) == line['new']


def test_the_first_pool_is_random_and_follows_from_the_seed(searched, few, tmp_path):
    pool = {str(arch) for arch in sample(20, 2, SMALL, torch.Generator().manual_seed(1))}
    assert set(lines(searched[0], 'arch_pool.1')) == pool


def test_the_best_are_ranked_by_training_from_scratch(searched):
    folder, result = searched
    final, scores = lines(folder, 'arch_pool.final'), accuracies(folder, 'arch_pool.perf.final')
    assert sorted(final) == sorted(lines(folder, 'arch_pool')[:2])
    assert scores == sorted(scores, reverse=True) and all(0 <= score <= 1 for score in scores)
    ranks = [line for line in metrics(folder) if line['kind'] == 'rank']
    assert {line['arch']: line['accuracy'] for line in ranks} == dict(zip(final, scores, strict=True))
    for index in (1, 2):
        assert re.search(rf'rank {index}/2 epoch 1/1 train loss .* \| valid loss', result.out)
    assert f'the best architecture is {final[0]};' in result.out


def test_of_equally_accurate_architectures_the_log_names_the_one_that_the_file_has_first(few, tmp_path):
    equal = few + 'import training\nreal = training.evaluate\ntraining.evaluate = lambda *args: real(*args) | {"top1": 10.0}\n'
    result = run(PROGRAM, *FLAGS, '--child_epochs=1', '--child_rank_count=4', f'--output_dir={tmp_path}', preamble=equal)
    assert accuracies(tmp_path, 'arch_pool.perf.final') == [0.1] * 4
    assert lines(tmp_path, 'arch_pool.final') == lines(tmp_path, 'arch_pool')[:4]
    assert f'the best architecture is {lines(tmp_path, "arch_pool.final")[0]};' in result.out


def test_the_log_has_what_people_read(searched):
    out = searched[1].out
    start = '\n'.join(out.splitlines()[:4])
    assert 'device cpu' in start and re.search(r'parameters [\d,]+ .*multiply-adds of one image [\d,]+', start)
    assert '--controller_seed_arch=20' in start and '--child_nodes=2' in start
    values = r'loss \d+\.\d+ top-1 \d+\.\d+ % top-5 \d+\.\d+ % \d+ images/s'
    for epoch in (1, 2):
        assert re.search(rf'epoch {epoch}/2 train {values} lr \S+ left \d+:\d\d:\d\d\n', out)
        assert re.search(rf'epoch {epoch}: scored 20 architectures on 16 images: best 0\.\d+, mean 0\.\d+, worst 0\.\d+', out)
    assert re.search(r'controller epoch 20/20 loss \d+\.\d+ pairwise accuracy \d\.\d+ Hamming distance \d\.\d+', out)
    assert re.search(r'\d+ new architectures', out)


def test_metrics_of_the_controller_and_of_epochs_have_their_values(searched):
    for line in metrics(searched[0]):
        if line['kind'] == 'controller':
            assert line['search_epoch'] == 1 and line['epoch'] == 20 and line['loss'] > 0
            assert 0 <= line['pairwise_accuracy'] <= 1 and 0 <= line['hamming_distance'] <= 1
        if line['kind'] == 'epoch':
            assert line['lr'] == pytest.approx({1: 0.025, 2: 0.013}[line['epoch']])
            assert set(line['train']) >= {'loss', 'top1', 'top5', 'images_per_second'}


def test_the_result_of_a_search_can_be_trained(searched, few, tmp_path):
    result = run('train_cifar.py', '--dataset=digits', '--device=cpu', f'--fixed_arc={searched[0] / "arch_pool.final"}',
                 '--arc_index=1', '--nodes=2', '--layers=1', '--channels=2', '--epochs=1', '--output_dir=out', cwd=tmp_path,
                 preamble=few)
    assert result.status == 0, result
    assert f'--fixed_arc={lines(searched[0], "arch_pool.final")[1]} ' in result.out


# -------------------------------------------------------------------------------------------------------------- its flags

def test_scoring_at_listed_epochs_with_other_nodes_and_expanded_pools(few, tmp_path):
    result = run(PROGRAM, *FLAGS, '--child_nodes=3', '--child_epochs=4', '--child_eval_epochs=[1,3]', '--controller_expand=3',
                 '--child_use_aux_head', '--child_rank_count=1', f'--output_dir={tmp_path}', preamble=few)
    assert result.status == 0, result
    written = metrics(tmp_path)
    assert [line['epoch'] for line in written if line['kind'] == 'score'] == [1, 3, 4]
    assert [line['search_epoch'] for line in written if line['kind'] == 'controller'] == [1, 3]
    for epoch in (1, 3, 4):
        assert all(len(line.split()) == 24 for line in lines(tmp_path, f'arch_pool.{epoch}'))
    assert not (tmp_path / 'arch_pool.2').exists()
    assert len(lines(tmp_path, 'arch_pool.final')) == 1


def test_expanding_fits_on_swapped_copies_and_holds_a_tenth_out(few, tmp_path):
    """The controller gets 18·3 sequences, of which the pool's 18 come first, and two held out; nothing is swapped anew."""
    watch = few + f"""
import controller, torch
real = controller.fit
def fit(nao, sequences, targets, *others, **options):
    torch.save([sequences, targets, options['held_out'], options['augment']], {str(tmp_path / 'seen.pt')!r})
    return real(nao, sequences, targets, *others, **options)
controller.fit = fit
"""
    assert run(PROGRAM, *FLAGS, '--controller_expand=3', f'--output_dir={tmp_path / "out"}', preamble=watch).status == 0
    sequences, targets, (held_sequences, held_targets), augment = load(tmp_path / 'seen.pt')
    assert augment is None and sequences.shape == (54, 16) and targets.shape == (54, 1)
    assert held_sequences.shape == (2, 16) and held_targets.shape == (2, 1)
    words = vocabulary(2, 'small')
    scored = lines(tmp_path / 'out', 'arch_pool.1')
    scores = dict(zip(scored, accuracies(tmp_path / 'out', 'arch_pool.perf.1'), strict=True))
    low, high = min(scores.values()), max(scores.values())

    def check(rows, values):
        pool = [str(words.decode(row)) for row in rows.tolist()]
        for line, target in zip(pool, values.flatten().tolist(), strict=True):
            assert target == pytest.approx((scores[line] - low) / (high - low), abs=1e-6)
        return pool
    assert sorted(check(sequences[:18], targets[:18]) + check(held_sequences, held_targets)) == sorted(scored)
    for copy in (1, 2):
        part = slice(18 * copy, 18 * copy + 18)
        assert torch.equal(targets[part], targets[:18])
        for one, other in zip(sequences[:18].tolist(), sequences[part].tolist(), strict=True):
            for cell in (slice(0, 8), slice(8, 16)):
                nodes, others = (list(architecture.nodes_of(row[cell])) for row in (one, other))
                assert sum(node != (*swapped[2:], *swapped[:2]) for node, swapped in zip(nodes, others, strict=True)) <= 1
                assert sum(node != swapped for node, swapped in zip(nodes, others, strict=True)) <= 1


def test_the_best_preset_sets_its_flags_and_others_win_over_it(few, tmp_path):
    flags = ['--controller_preset=best', '--controller_epochs=5', '--controller_later_updates=5', '--controller_candidates=20',
             '--child_rank_count=0', f'--output_dir={tmp_path}']
    first = run(PROGRAM, *FLAGS, *flags, preamble=few)
    assert first.status == 0, first
    for flag in ('members=4', 'targets=ranks', 'loss=cross_entropy', 'unlabelled=50', 'epochs=5', 'candidates=20'):
        assert f'--controller_{flag} ' in f'{first.out} ', flag
    assert len(load(tmp_path / 'checkpoint.pt')['controller']) == 4
    new = next(line for line in metrics(tmp_path) if line['kind'] == 'new')
    assert new['new'] > 0
    other = run(PROGRAM, *FLAGS, *flags[1:], preamble=few)  # other controllers than those in the checkpoint
    assert other.status == 2 and '--controller_preset' in other.err, other


@pytest.mark.parametrize('value', ['5', '[]', '[0]', '[1,"x"]', 'x'])
def test_step_sizes_of_the_ascent_are_a_list_of_numbers(value, few, tmp_path):
    result = run(PROGRAM, *FLAGS, f'--controller_lambdas={value}', f'--output_dir={tmp_path / "out"}', preamble=few)
    assert result.status == 2 and '--controller_lambdas' in result.err and '[10,20,30]' in result.err, result
    assert not (tmp_path / 'out').exists()


def test_a_search_starts_from_a_given_pool(few, tmp_path):
    pool = [str(arch) for arch in sample(12, 2, SMALL, torch.Generator().manual_seed(99))]
    (tmp_path / 'my pool').write_text('\n'.join(pool) + '\n')
    result = run(PROGRAM, *FLAGS, '--child_arch_pool=my pool', '--child_epochs=1', '--output_dir=out', cwd=tmp_path,
                 preamble=few)
    assert result.status == 0, result
    assert sorted(lines(tmp_path / 'out', 'arch_pool')) == sorted(pool)
    assert lines(tmp_path, 'my pool') == pool


def test_a_search_within_a_budget(few, tmp_path):
    """All that is scored, proposed and ranked; one that goes on is refused a smaller budget than its architectures need."""
    flags = ['--max_madds=1.7M', '--max_parameters=39k', '--budget_network=imagenet', '--budget_layers=1',
             '--budget_channels=4']
    result = run(PROGRAM, *FLAGS, *flags, '--child_rank_count=1', f'--output_dir={tmp_path}', preamble=few)
    assert result.status == 0, result
    assert 'all architectures stay within --max_parameters=39,000 --max_madds=1,700,000 (imagenet network, 1 ' in result.out
    count = counter(Size(NASNetworkImageNet, 1, 4, 1000, 224))
    new = next(line for line in metrics(tmp_path) if line['kind'] == 'new')
    assert new['new'] > 0
    costs = [count(parse(line)) for name in ('arch_pool.1', 'arch_pool.2', 'arch_pool.final') for line in lines(tmp_path, name)]
    assert max(costs).parameters <= 39_000 and max(cost.madds for cost in costs) <= 1_700_000
    assert_user_error(run(PROGRAM, *FLAGS, *flags[1:], '--max_madds=1.3M', f'--output_dir={tmp_path}', preamble=few),
                      'of its 20 architectures are beyond --max_parameters=39,000 --max_madds=1,300,000', '--output_dir')


def test_a_budget_that_cannot_be_met_and_a_pool_beyond_it(few, tmp_path):
    result = run(PROGRAM, *FLAGS, '--max_parameters=1k', f'--output_dir={tmp_path / "a"}', preamble=few)
    assert_user_error(result, '--max_parameters=1,000 (cifar network, 6 layers, 36 channels): of ', 'the smallest has ')
    (tmp_path / 'pool').write_text('0 0 1 0 0 0 1 0 0 0 1 0 0 0 1 0\n')
    result = run(PROGRAM, *FLAGS, '--max_parameters=100k', f'--child_arch_pool={tmp_path / "pool"}',
                 f'--output_dir={tmp_path / "a"}', preamble=few)
    assert_user_error(result, '--child_arch_pool', 'pool, line 1: the network has ', 'beyond --max_parameters=100,000')
    assert not (tmp_path / 'a').exists()


def test_equally_accurate_architectures_do_not_stop_a_search(few, tmp_path):
    equal = few + """
import model_search
real = model_search.Supernet.forward
def forward(self, *args, bn_train=False, **kwargs):
    logits, aux_logits = real(self, *args, bn_train=bn_train, **kwargs)
    return logits * (not bn_train), aux_logits
model_search.Supernet.forward = forward
"""
    result = run(PROGRAM, *FLAGS, f'--output_dir={tmp_path}', preamble=equal)
    assert result.status == 0 and complaints(result) == [], result
    assert len(set(accuracies(tmp_path, 'arch_pool.perf.1'))) == 1
    assert all(line['loss'] > 0 for line in metrics(tmp_path) if line['kind'] == 'controller')


def test_a_pool_smaller_than_the_new_architectures_asked_for(few, tmp_path):
    result = run(PROGRAM, *FLAGS, '--controller_seed_arch=3', '--controller_new_arch=50', '--child_rank_count=5',
                 f'--output_dir={tmp_path}', preamble=few)
    assert result.status == 0, result
    assert len(lines(tmp_path, 'arch_pool.2')) == 3 == len(lines(tmp_path, 'arch_pool.final'))


def test_save_every_keeps_a_checkpoint_per_so_many_epochs(few, tmp_path):
    assert run(PROGRAM, *FLAGS, '--save_every=1', f'--output_dir={tmp_path}', preamble=few).status == 0
    kept = [load(tmp_path / f'checkpoint_{epoch}.pt') for epoch in (1, 2)]
    assert [state['epoch'] for state in kept] == [1, 2]
    assert [state['phase'] for state in kept] == ['score', 'score']  # as the epoch left them: new pools do not replace them


def test_help_has_every_flag_of_the_specification_with_its_default():
    result = run(PROGRAM, '--help', COLUMNS='300')
    assert result.status == 0
    for flag, default in (
            ('child_batch_size', 64), ('child_eval_batch_size', 500), ('child_epochs', 150), ('child_layers', 3),
            ('child_nodes', 5), ('child_channels', 20), ('child_cutout_size', None), ('child_grad_bound', 5.0),
            ('child_lr_max', 0.025), ('child_lr_min', 0.001), ('child_keep_prob', 1.0), ('child_drop_path_keep_prob', 0.9),
            ('child_l2_reg', 0.0003), ('child_use_aux_head', None), ('child_eval_epochs', 30), ('child_arch_pool', None),
            ('controller_seed_arch', 600), ('controller_new_arch', 300), ('controller_expand', None),
            ('controller_epochs', 1000), ('controller_batch_size', 100), ('controller_lr', 0.001),
            ('controller_trade_off', 0.8), ('controller_l2_reg', 0.0001), ('controller_grad_bound', 5.0),
            ('controller_encoder_layers', 1), ('controller_encoder_hidden_size', 96), ('controller_encoder_emb_size', 48),
            ('controller_mlp_layers', 3), ('controller_mlp_hidden_size', 200), ('controller_mlp_dropout', 0.1),
            ('controller_decoder_layers', 1), ('controller_decoder_hidden_size', 96), ('data', 'data'),
            ('dataset', 'cifar10'), ('output_dir', 'exp/search_cifar10'), ('seed', None)):
        text = re.search(rf'\n +--{flag}(?!\w)(.*?)(?=\n +--|\n\n|\Z)', result.out.partition('options:')[2], re.S)
        assert text, flag
        assert default is None or f'(default: {default})' in text.group(1), (flag, text.group(1))


# --------------------------------------------------------------------------------------------------------------- resuming

@pytest.mark.parametrize('call, after', [pytest.param(1, True, marks=pytest.mark.slow), (2, False)])
def test_a_search_killed_after_or_within_every_phase_ends_bit_identical(call, after, searched, few, tmp_path):
    """Each run is killed just after its first checkpoint, or just before its second (and loses a whole phase)."""
    command = [PROGRAM, *FLAGS, f'--output_dir={tmp_path}']
    kills = 0
    while (result := run(*command, preamble=few + kill_at('a checkpoint', call, after))).status:
        assert result.status == -signal.SIGKILL, result
        kills += 1
        assert kills <= PHASES
    assert kills >= PHASES - 1
    result = run(*command, preamble=few)
    assert result.status == 0 and 'finished' in result.out
    assert_same_search(searched[0], tmp_path)


@pytest.mark.parametrize('moment', [
    ('a rename', 2, False), ('a rename', 8, True),
    *(pytest.param(moment, marks=pytest.mark.slow) for moment in (('a flush', 2, False), ('a rename', 18, True)))])
def test_a_search_killed_while_it_writes_ends_bit_identical(moment, searched, few, tmp_path):
    command = [PROGRAM, *FLAGS, f'--output_dir={tmp_path}']
    killed = run(*command, preamble=few + kill_at(*moment))
    assert killed.status == -signal.SIGKILL, killed
    assert run(*command, preamble=few).status == 0
    assert_same_search(searched[0], tmp_path)


@pytest.mark.parametrize('word, number, status', [
    pytest.param('epoch 1: scored', signal.SIGKILL, -9, marks=pytest.mark.slow), ('rank 1/2', signal.SIGINT, 130)])
def test_a_search_killed_or_interrupted_from_outside_ends_bit_identical(word, number, status, searched, few, tmp_path):
    command = [PROGRAM, *FLAGS, f'--output_dir={tmp_path}']
    slow = few + 'import time, checkpoint\nreal = checkpoint.save\n' \
                 'checkpoint.save = lambda *args: (real(*args), time.sleep(0.5))\n'
    program = Program(*command, preamble=slow)
    program.wait_for(word)
    program.signal(number)
    result = program.wait()
    assert result.status == status, result
    if number == signal.SIGINT:
        line, = complaints(result)
        assert 'the same command goes on' in line
    assert run(*command, preamble=few).status == 0
    assert_same_search(searched[0], tmp_path)


def test_a_finished_search_started_again_changes_nothing(searched, few):
    folder, _ = searched
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    result = run(PROGRAM, *FLAGS, f'--output_dir={folder}', preamble=few)
    assert result.status == 0 and 'finished' in result.out
    assert sizes_of(result) == sizes_of(searched[1])  # though the pool is another
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before


@pytest.mark.parametrize('change, words', [
    ({'optimizer': None}, ['has no "optimizer"']), ({'pool': None}, ['has no "pool"']),
    ({'optimizer': {}}, ['its "optimizer" is not']), ({}, ['--method=NAO', 'another --output_dir'])])
def test_a_checkpoint_that_no_search_can_go_on_from_ends_in_one_line(change, words, searched, few, tmp_path):
    state = load(searched[0] / 'checkpoint.pt') | change
    torch.save({name: value for name, value in state.items() if value is not None}, tmp_path / 'checkpoint.pt')
    result = run(PROGRAM, *FLAGS, *['--method=NAO'] * (not change), f'--output_dir={tmp_path}', preamble=few)
    assert_user_error(result, 'checkpoint.pt', *words)
    assert files(tmp_path) == ['checkpoint.pt']


@pytest.mark.parametrize('moment', [('an epoch', 2, False), ('a round of fits', 1, False)])
def test_a_search_resumed_with_fewer_epochs_scores_ranks_and_ends(moment, few, tmp_path):
    command = [PROGRAM, *FLAGS, '--child_rank_count=1', f'--output_dir={tmp_path}']
    assert run(*command, '--child_epochs=3', preamble=few + kill_at(*moment)).status == -signal.SIGKILL
    result = run(*command, '--child_epochs=1', preamble=few)
    assert result.status == 0 and 'epoch 2/' not in result.out, result
    assert len(lines(tmp_path, 'arch_pool.final')) == 1


def test_a_finished_search_goes_on_when_more_is_asked_for(few, tmp_path):
    command = [PROGRAM, *FLAGS, f'--output_dir={tmp_path}']
    result = run(*command, '--child_epochs=1', '--child_rank_count=0', preamble=few)
    assert result.status == 0 and 'arch_pool.final' not in files(tmp_path), result
    result = run(*command, '--child_epochs=1', '--child_rank_count=1', preamble=few)
    assert result.status == 0 and len(lines(tmp_path, 'arch_pool.final')) == 1, result
    result = run(*command, '--child_epochs=2', '--child_rank_count=2', preamble=few)
    assert result.status == 0 and len(lines(tmp_path, 'arch_pool.final')) == 2, result
    assert 'next: fit, with other flags' in result.out and 'epoch 2: scored' in result.out
    assert {'arch_pool.1', 'arch_pool.2'} <= set(files(tmp_path))


def test_what_is_asked_for_while_the_best_are_ranked_is_done_too(few, tmp_path):
    command = [PROGRAM, *FLAGS, '--child_rank_count=1', f'--output_dir={tmp_path}']
    assert run(*command, '--child_epochs=1', preamble=few + kill_at('a candidate', 1)).status == -signal.SIGKILL
    result = run(*command, '--child_epochs=2', preamble=few)
    assert result.status == 0 and 'next: fit' in result.out and 'epoch 2: scored' in result.out, result
    assert len(lines(tmp_path, 'arch_pool.final')) == 1


def test_a_search_that_ended_early_proposes_nothing_that_it_would_not_train(few, tmp_path):
    """It had done two epochs of three, was ended by a flag, and is asked for two."""
    command = [PROGRAM, *FLAGS, '--child_rank_count=0', f'--output_dir={tmp_path}']
    assert run(*command, '--child_epochs=3', preamble=few + kill_at('an epoch', 3)).status == -signal.SIGKILL
    assert run(*command, '--child_epochs=1', preamble=few).status == 0
    pool = lines(tmp_path, 'arch_pool')
    result = run(*command, '--child_epochs=2', preamble=few)
    assert result.status == 0 and 'next: done' in result.out and lines(tmp_path, 'arch_pool') == pool, result


def test_weights_that_the_last_step_of_an_epoch_broke_are_not_kept(few, tmp_path):
    command = [PROGRAM, *FLAGS, '--child_batch_size=144', '--child_epochs=1', '--child_rank_count=0',
               f'--output_dir={tmp_path}']  # one step
    result = run(*command, '--child_lr_max=1e30', '--child_grad_bound=1e30', preamble=few)
    assert result.status == 1 and 'the weights are no longer finite after epoch 1/' in result.err, result
    result = run(*command, preamble=few)
    assert result.status == 0 and 'resumed after epoch 0' in result.out, result


def test_a_flag_without_use_and_a_pool_that_is_replaced_whole_are_named(few, tmp_path):
    flags = [*FLAGS, '--child_epochs=2', '--child_rank_count=0', '--controller_seed_arch=6', '--child_gamma=0.5']
    result = run(PROGRAM, *flags, f'--output_dir={tmp_path}', preamble=few)
    assert result.status == 0 and '--child_gamma=0.5 has no effect with --dataset=digits\n' in result.out, result
    assert '--controller_new_arch=8 replaces all of a pool of 6, the best too' in result.err


def test_a_pool_in_the_output_directory_is_not_overwritten_unread(few, tmp_path):
    pools = [[str(arch) for arch in sample(4, 2, SMALL, torch.Generator().manual_seed(seed))] for seed in (0, 1)]
    for name, pool in zip(('mine', 'out/arch_pool'), pools, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('\n'.join(pool) + '\n')
    result = run(PROGRAM, *FLAGS, '--child_arch_pool=mine', '--output_dir=out', cwd=tmp_path, preamble=few)
    assert_user_error(result, '--child_arch_pool=mine', 'out/arch_pool is another pool')
    assert lines(tmp_path / 'out', 'arch_pool') == pools[1] and files(tmp_path / 'out') == ['arch_pool']


def test_a_note_in_a_result_is_named(searched, few, tmp_path):
    shutil.copytree(searched[0], tmp_path / 'out')
    with open(tmp_path / 'out' / 'arch_pool.final', 'a') as file:
        file.write('the second one is better\n')
    assert_user_error(run(PROGRAM, *FLAGS, '--output_dir=out', cwd=tmp_path, preamble=few), 'arch_pool.final, line ')


def test_a_search_goes_on_without_the_pool_file_and_with_larger_batches(few, tmp_path):
    pool = tmp_path / 'pool'
    pool.write_text(''.join(f'{arch}\n' for arch in sample(20, 2, SMALL, torch.Generator().manual_seed(0))))
    command = [PROGRAM, *FLAGS, f'--child_arch_pool={pool}', '--child_drop_path_keep_prob=0.5',
               f'--output_dir={tmp_path / "out"}']
    killed = run(*command, '--child_batch_size=4', preamble=few + kill_at('an epoch', 2))
    assert killed.status == -signal.SIGKILL
    pool.unlink()
    result = run(*command, preamble=few)
    assert result.status == 0 and 'left -' not in result.out, result


# -------------------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize('flags, words', [
    (['--child_arch_pool=none'], ['--child_arch_pool', 'none', 'No such file']),
    (['--child_arch_pool=empty'], ['--child_arch_pool', 'empty', 'one architecture a line']),
    (['--child_arch_pool=large'], ['--child_arch_pool', 'large, line 2', 'integer 10 of 16 (reduction cell)', 'is 7', '0..4']),
    (['--child_arch_pool=large', '--child_nodes=5'], ['--child_arch_pool', 'large, line 1', '8 x 5 nodes = 40', 'has 16']),
    (['--child_eval_epochs=0'], ['--child_eval_epochs', '[30,60]', "'0'"]),
    (['--child_eval_epochs=[1,x]'], ['--child_eval_epochs', "'[1,x]'"]),
    (['--child_eval_epochs=[]'], ['--child_eval_epochs', "'[]'"]),
    (['--child_eval_epochs=[1.5]'], ['--child_eval_epochs', "'[1.5]'"]),
    (['--child_batch_size=0'], ['--child_batch_size', "'0'"]),
    (['--controller_encoder_hidden_size=8'], ['--controller_encoder_hidden_size', '--controller_decoder_hidden_size']),
    (['--dataset=svhn'], ['--dataset', 'cifar10', 'digits']),
    (['--device=tpu'], ['--device=tpu', 'cpu']),
    (['--output_dir=empty/out'], ['--output_dir=empty/out', 'cannot be written']),
])
def test_bad_input_ends_in_one_line_and_creates_nothing(flags, words, few, tmp_path):
    (tmp_path / 'empty').write_text('')
    (tmp_path / 'large').write_text('0 0 1 1 0 2 1 3 0 0 1 1 0 2 1 3\n0 0 1 1 0 2 1 3 0 7 1 1 0 2 1 3\n')
    before = files(tmp_path)
    result = run(PROGRAM, *FLAGS, '--output_dir=out', *flags, cwd=tmp_path, preamble=few)
    assert_user_error(result, *words)
    assert files(tmp_path) == before


@pytest.mark.parametrize('flags, words', [
    (['--child_channels=3'], ['is of a run with --child_channels=2, not --child_channels=3']),
    (['--child_nodes=3'], ['another architecture']),
    (['--controller_mlp_hidden_size=21'], ['another architecture']),
    (['--seed=2'], ['is of a run with --seed=1, not --seed=2']),
    (['--proposer=random'], ['is of a run with --proposer=controller, not --proposer=random'])])
def test_a_checkpoint_of_another_search_is_refused_and_kept(flags, words, searched, few):
    folder, _ = searched
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    assert_user_error(run(PROGRAM, *FLAGS, f'--output_dir={folder}', *flags, preamble=few), folder, *words)
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before


def test_a_search_and_a_training_do_not_take_each_others_checkpoints(searched, few, tmp_path):
    train = ['train_cifar.py', '--dataset=digits', '--device=cpu', '--nodes=1', '--layers=1', '--channels=2', '--epochs=1',
             '--fixed_arc=0 4 1 4 0 4 1 4']
    assert run(*train, f'--output_dir={tmp_path}', preamble=few).status == 0
    assert_user_error(run(PROGRAM, *FLAGS, f'--output_dir={tmp_path}', preamble=few), tmp_path,
                      'not the checkpoint of a search', '--output_dir')
    assert_user_error(run(*train, f'--output_dir={searched[0]}', preamble=few), searched[0], 'is the checkpoint of a search')


def test_a_cut_off_checkpoint_is_refused_and_kept(searched, few, tmp_path):
    content = (searched[0] / 'checkpoint.pt').read_bytes()[:-1000]
    (tmp_path / 'checkpoint.pt').write_bytes(content)
    result = run(PROGRAM, *FLAGS, f'--output_dir={tmp_path}', preamble=few)
    assert_user_error(result, tmp_path / 'checkpoint.pt', 'is not a readable checkpoint')
    assert files(tmp_path) == ['checkpoint.pt'] and (tmp_path / 'checkpoint.pt').read_bytes() == content


@pytest.mark.parametrize('flag, words', [
    ('--child_lr_max=1e30', ['epoch 1/2', 'the last checkpoint is kept']),
    ('--controller_lr=1e30', ['loss of the controller is', 'the last checkpoint is kept', '--controller_lr'])])
def test_a_loss_that_is_not_finite_stops_a_search(flag, words, few, tmp_path):
    result = run(PROGRAM, *FLAGS, flag, f'--output_dir={tmp_path}', preamble=few)
    assert result.status == 1 and len(result.err.splitlines()) == 1, result
    for word in words:
        assert word in result.err
    if flag.startswith('--controller'):
        before = (tmp_path / 'checkpoint.pt').read_bytes()
        assert load(tmp_path / 'checkpoint.pt')['phase'] == 'fit'
        assert run(PROGRAM, *FLAGS, flag, f'--output_dir={tmp_path}', preamble=few).status == 1
        assert (tmp_path / 'checkpoint.pt').read_bytes() == before


def test_the_published_architecture_of_the_large_space_is_no_pool_of_this_search(few, tmp_path):
    (tmp_path / 'pool').write_text(NAONET_A + '\n')
    result = run(PROGRAM, *FLAGS, '--child_nodes=5', '--child_arch_pool=pool', '--output_dir=out', cwd=tmp_path, preamble=few)
    assert_user_error(result, '--child_arch_pool', 'pool, line 1', 'integer 2 of 40 (normal cell) is 7', '0..4')
