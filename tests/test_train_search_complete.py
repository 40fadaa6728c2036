"""Search by NAO, the complete way, in one process and in several: every candidate is trained on its own, and once."""

import json
import os
import re
import signal

import pytest
from helpers import (
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
    torchrun,
    without_speed,
    write_images,
)

from architecture import parse
from candidates import append_line
from operations import SEARCH_SPACES

PROGRAM = 'train_search.py'
SIZES = ['--device=cpu', '--seed=1', '--child_nodes=1', '--child_layers=1', '--child_channels=4', '--child_batch_size=36',
         '--child_epochs=2', '--child_rank_count=2', '--controller_epochs=30', '--controller_lr=0.01',
         '--controller_batch_size=10',
         '--controller_encoder_hidden_size=24', '--controller_decoder_hidden_size=24', '--controller_mlp_hidden_size=20']
FLAGS = ['--method=NAO', '--dataset=digits', *SIZES, '--child_eval_batch_size=16', '--controller_seed_arch=12',
         '--controller_new_arch=5', '--rounds=2', '--no-child_use_aux_head']
LARGE = SEARCH_SPACES['large']


@pytest.fixture(scope='module')
def few(tmp_path_factory):
    return few_digits(tmp_path_factory.mktemp('digits'), 80)


@pytest.fixture(scope='module')
def searched(tmp_path_factory, few):
    """An uninterrupted search by one process: its folder and what it said."""
    folder = tmp_path_factory.mktemp('searched') / 'out'
    return folder, run(PROGRAM, *FLAGS, f'--output_dir={folder}', preamble=few)


def lines(folder, name):
    return (folder / name).read_text().splitlines()


def results(folder):
    """All lines of all results files, (kind, architecture) -> line; fails if a candidate was trained twice."""
    found = [json.loads(line) for path in sorted(folder.glob('results.*.jsonl')) for line in path.read_text().splitlines()]
    named = {(result['kind'], result['arch']): result for result in found}
    assert len(named) == len(found)
    return named


def assert_same_search(folder, other):
    """The same pool files, metrics, results and, but for random states of more processes, the same checkpoint."""
    pools = [name for name in files(folder) if name.startswith('arch_pool')]
    assert pools == [name for name in files(other) if name.startswith('arch_pool')]
    for name in pools:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    one, two = ({key: result['accuracy'] for key, result in results(where).items()} for where in (folder, other))
    assert one == two
    one, two = load(folder / 'checkpoint.pt'), load(other / 'checkpoint.pt')
    for state in (one, two):
        del state['args']['output_dir'], state['args']['workers'], state['metrics_bytes']
        state['random'] = state['random'][0]
        state.pop('environment', None)  # says how many processes
    assert_equal(one, two)
    assert without_speed(metrics(folder)) == without_speed(metrics(other))


# ------------------------------------------------------------------------------------------------------- what it writes

def test_a_search_of_twelve_candidates_and_two_rounds(searched):
    folder, result = searched
    assert result.status == 0 and complaints(result) == [], result
    names = ['', '.0', '.1', '.2', '.final']
    assert files(folder) == sorted([f'arch_pool{name}' for name in names] + [f'arch_pool.perf{name}' for name in names]
                                   + ['arch_pool.pareto', 'arch_pool.pareto.perf']
                                   + ['checkpoint.pt', 'metrics.jsonl', 'results.0.jsonl'])
    new = [line['new'] for line in metrics(folder) if line['kind'] == 'new']
    assert min(new) >= 1 and max(new) <= 5
    for number, count in enumerate((12, 12 + new[0], 12 + sum(new))):
        pool, scores = lines(folder, f'arch_pool.{number}'), list(map(float, lines(folder, f'arch_pool.perf.{number}')))
        assert len(pool) == len(set(pool)) == len(scores) == count
        assert scores == sorted(scores, reverse=True) and all(0 <= score <= 1 for score in scores)
        assert all(str(parse(line, 1, LARGE)) == line for line in pool)
    assert lines(folder, 'arch_pool') == lines(folder, 'arch_pool.2')
    found = results(folder)
    assert {kind for kind, _ in found} == {'candidate'} and len(found) == 12 + sum(new)
    assert all(found['candidate', arch]['accuracy'] == float(score) for arch, score in
               zip(lines(folder, 'arch_pool.2'), lines(folder, 'arch_pool.perf.2'), strict=True))
    for name in ('arch_pool', 'arch_pool.perf'):  # the best by these trainings, none is trained again
        assert lines(folder, f'{name}.final') == lines(folder, name)[:2]
    assert [line['kind'] for line in metrics(folder)] == ['score', 'controller', 'new'] * 2 + ['score', 'rank', 'rank']
    assert re.search(r'candidate 12/12 accuracy 0\.\d+, all of them left \d:\d\d:\d\d\n', result.out)
    assert re.search(r'candidate 12/12 epoch 2/2 train loss .* \| valid loss', result.out)
    proposed = set(lines(folder, 'arch_pool.final')) - set(lines(folder, 'arch_pool.0'))
    assert f'finished: the best architecture is {lines(folder, "arch_pool.final")[0]};' in result.out
    came = ', '.join(str(next(number for number in range(3) if arch in lines(folder, f'arch_pool.{number}')))
                     for arch in lines(folder, 'arch_pool.final'))
    assert f'{len(proposed)} of these 2 were proposed in the search (rounds {came}; 0: the start)' in result.out


def test_a_finished_search_started_again_changes_nothing(searched, few):
    folder, _ = searched
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    result = run(PROGRAM, *FLAGS, f'--output_dir={folder}', preamble=few)
    assert result.status == 0 and sizes_of(result) == sizes_of(searched[1])  # though the pool is another
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before


# ----------------------------------------------------------------------------------------------------- several processes

@pytest.mark.parametrize('shared', [pytest.param(True, marks=pytest.mark.slow), False])
def test_two_processes_find_the_same_on_one_machine_or_on_two_that_share_no_disk(shared, searched, few, tmp_path):
    apart = f"""
import os, sys
sys.argv.append('--output_dir={tmp_path}/machine' + os.environ['RANK'])
""" if not shared else ''
    result = torchrun(2, PROGRAM, *FLAGS, f'--output_dir={tmp_path / "machine0"}', preamble=few + apart).wait()
    assert result.status == 0, result
    if not shared:
        other = tmp_path / 'machine1'
        assert files(other) == ['results.1.jsonl']
        (other / 'results.1.jsonl').rename(tmp_path / 'machine0' / 'results.1.jsonl')
    assert_same_search(searched[0], tmp_path / 'machine0')
    for rank in (0, 1):  # both had work, and said so
        assert f'[rank {rank}] candidate' in result.out and lines(tmp_path / 'machine0', f'results.{rank}.jsonl')
    assert result.out.count('round 0: trained 12 architectures') == 1


def slowly(seconds):
    """A preamble: the second process takes so long before each of its trainings."""
    return f"""
import os, time, candidates
real = candidates.train_candidate
def slow(*args, **kwargs):
    if os.environ['RANK'] == '1':
        time.sleep({seconds})
    return real(*args, **kwargs)
candidates.train_candidate = slow
"""


def life(limit):
    """A preamble: a process shows its life often, and is given up after `limit` seconds."""
    return f'import work_queue\nwork_queue.LIFE_EVERY, work_queue.LIFE_LIMIT = 0.2, {limit}\n'


def test_no_process_idles_while_candidates_remain(few, tmp_path):
    """One process takes long for each of its candidates: the other one trains nearly all."""
    result = torchrun(2, PROGRAM, *FLAGS, '--rounds=1', '--child_epochs=1', '--child_rank_count=0', f'--output_dir={tmp_path}',
                      preamble=few + slowly(2)).wait()
    assert result.status == 0, result
    fast, slow = (len(lines(tmp_path, f'results.{rank}.jsonl')) for rank in (0, 1))
    assert fast > slow >= 1
    assert not (tmp_path / 'arch_pool.final').exists()


def test_a_finished_search_makes_another_round_when_asked(few, tmp_path):
    command = [PROGRAM, *FLAGS, '--child_epochs=1', f'--output_dir={tmp_path}']
    assert run(*command, '--rounds=1', preamble=few).status == 0
    before = len(results(tmp_path))
    result = run(*command, '--rounds=2', preamble=few)
    assert result.status == 0 and 'up to 22 candidates' in result.out, result
    assert len(results(tmp_path)) > before and len(lines(tmp_path, 'arch_pool.2')) > len(lines(tmp_path, 'arch_pool.1'))


def test_when_a_process_dies_only_its_candidate_is_trained_again(searched, few, tmp_path):
    """The second process dies at the end of its third training; the search goes on with one process."""
    command = [PROGRAM, *FLAGS, f'--output_dir={tmp_path}']
    killed = torchrun(2, *command, preamble=few + kill_at('a candidate', 3, after=True, rank=1)).wait(120)
    assert killed.status != 0
    before = results(tmp_path)
    assert len(lines(tmp_path, 'results.1.jsonl')) == 2
    result = run(*command, preamble=few)
    assert result.status == 0, result
    assert_same_search(searched[0], tmp_path)
    after = results(tmp_path)
    assert all(after[key] == value for key, value in before.items())


def test_a_process_that_vanishes_without_a_word_is_given_up(searched, few, tmp_path):
    """The second one stops answering at its third training, as when its machine is cut off; what is done is kept."""
    command = [PROGRAM, *FLAGS, f'--output_dir={tmp_path}']
    program = torchrun(2, *command, preamble=few + life(3) + kill_at('a candidate', 3, rank=1, by='SIGSTOP'))
    program.wait_for('stopped: process 1 has not answered for 3 s; the same command goes on')
    os.kill(program.workers()[-1], signal.SIGKILL)  # or torchrun gives it another half a minute
    assert program.wait().status != 0
    before = results(tmp_path)
    assert len(before) >= 11 and len(lines(tmp_path, 'results.1.jsonl')) == 2
    assert run(*command, preamble=few).status == 0
    assert_same_search(searched[0], tmp_path)


def test_a_process_that_trains_for_long_is_waited_for(few, tmp_path):
    """Longer than a process may stay silent: the thread that shows its life goes on."""
    result = torchrun(2, PROGRAM, *FLAGS, '--rounds=1', '--child_epochs=1', '--child_rank_count=0', '--controller_seed_arch=4',
                      '--controller_new_arch=1', f'--output_dir={tmp_path}', preamble=few + life(2) + slowly(5)).wait()
    assert result.status == 0 and lines(tmp_path, 'results.1.jsonl'), result


# -------------------------------------------------------------------------------------------------------------- resuming

@pytest.mark.parametrize('moment', [
    ('an epoch', 6, True), ('a candidate', 24, True),
    *(pytest.param(moment, marks=pytest.mark.slow) for moment in (
        ('an epoch', 1, False), ('a fit', 1, True), ('a candidate', 5, True), ('a candidate', 12, True),
        ('a candidate', 14, False)))])
def test_a_killed_search_trains_no_finished_candidate_again_and_ends_bit_identical(moment, searched, few, tmp_path):
    command = [PROGRAM, *FLAGS, f'--output_dir={tmp_path}']
    if moment == ('a candidate', 24, True):  # the last but one or so, whatever the controller found
        moment = ('a candidate', len(results(searched[0])) - 1, True)
    killed = run(*command, preamble=few + kill_at(*moment))
    assert killed.status == -signal.SIGKILL, killed
    before = results(tmp_path)
    result = run(*command, preamble=few)
    done = sum(kind == 'candidate' for kind, _ in before)
    assert result.status == 0 and f'resumed after {done} of ' in result.out, result
    assert_same_search(searched[0], tmp_path)
    after = results(tmp_path)
    assert all(after[key] == value for key, value in before.items())
    assert files(tmp_path) == files(searched[0])


@pytest.mark.slow
def test_a_search_killed_from_outside_goes_on(searched, few, tmp_path):
    command = [PROGRAM, *FLAGS, f'--output_dir={tmp_path}']
    program = Program(*command, preamble=few)
    program.wait_for('candidate 4/12 epoch 1/2')
    program.signal(signal.SIGKILL)
    assert program.wait().status == -signal.SIGKILL
    assert run(*command, preamble=few).status == 0
    assert_same_search(searched[0], tmp_path)


def test_what_an_earlier_search_left_is_not_taken_for_results(searched, few, tmp_path):
    """Its checkpoint was deleted to begin anew; its results and its half-trained candidates are no longer true."""
    command = [PROGRAM, *FLAGS, f'--output_dir={tmp_path}']
    assert run(*command, '--seed=2', '--child_channels=3', preamble=few + kill_at('an epoch', 6)).status == -9
    assert any(name.startswith('candidate-') for name in files(tmp_path)) and lines(tmp_path, 'results.0.jsonl')
    (tmp_path / 'checkpoint.pt').unlink()
    old = (tmp_path / 'results.0.jsonl').read_bytes()
    assert_user_error(run(*command, f'--child_results={tmp_path / "results.0.jsonl"}', preamble=few),
                      '--child_results', 'is of --output_dir itself')
    result = run(*command, preamble=few)
    assert result.status == 0 and f'{tmp_path / "results.0.jsonl"} is of an earlier run' in result.out
    assert_same_search(searched[0], tmp_path)
    assert (tmp_path / 'results.0.jsonl.old1').read_bytes() == old  # weeks of trainings, perhaps
    assert files(tmp_path) == sorted([*files(searched[0]), 'metrics.jsonl.old1', 'results.0.jsonl.old1'])


def test_what_changes_all_results_is_refused(searched, few):
    folder, _ = searched
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    for flag, was in (('--child_channels=5', '--child_channels=4'), ('--child_layers=2', '--child_layers=1'),
                      ('--child_epochs=7', '--child_epochs=2')):
        assert_user_error(run(PROGRAM, *FLAGS, f'--output_dir={folder}', flag, preamble=few), f'with {was}, not {flag}')
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before


def test_a_resumed_candidate_leaves_the_metrics_of_the_search_as_they_are(few, tmp_path):
    command = [PROGRAM, *FLAGS, '--rounds=0', '--child_rank_count=0', f'--output_dir={tmp_path}']
    assert run(*command, preamble=few + kill_at('an epoch', 2)).status == -signal.SIGKILL
    assert run(*command, preamble=few).status == 0
    assert [line['kind'] for line in metrics(tmp_path, starts=True)] == ['start', 'start', 'score']


@pytest.mark.parametrize('content, wanted', [
    (b'', b'new\n'), (b'old\n', b'old\nnew\n'), (b'old\ncut o', b'old\ncut o\nnew\n')])
def test_a_line_is_appended_apart_from_one_that_was_cut_off(content, wanted, tmp_path):
    (tmp_path / 'file').write_bytes(content)
    append_line(tmp_path / 'file', 'new')
    assert (tmp_path / 'file').read_bytes() == wanted


@pytest.mark.slow
def test_a_result_that_was_cut_off_is_made_again(searched, few, tmp_path):
    command = [PROGRAM, *FLAGS, f'--output_dir={tmp_path}']
    assert run(*command, preamble=few + kill_at('a candidate', 5, after=True)).status == -signal.SIGKILL
    file = tmp_path / 'results.0.jsonl'
    file.write_bytes(file.read_bytes()[:-20])
    result = run(*command, preamble=few)
    assert result.status == 0, result
    for name in ('arch_pool.2', 'arch_pool.perf.2', 'arch_pool.final', 'arch_pool.perf.final'):
        assert lines(tmp_path, name) == lines(searched[0], name)


# --------------------------------------------------------------------------------------------------------- failing ones

FAILING = """
import torch, training
real, calls = training.train_epoch, []
def train_epoch(*args, **kwargs):
    calls.append(None)
    if len(calls) == 3:
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
    if len(calls) == 7:
        raise RuntimeError('FIND was unable to find an engine to execute this computation')  # cuDNN's word for it
    if len(calls) == 4:
        kwargs['lr'] = 1e30
    if len(calls) == 5:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to ...")
    return real(*args, **kwargs)
training.train_epoch = train_epoch
"""


def test_candidates_that_fail_are_logged_count_nothing_and_do_not_stop_the_search(few, tmp_path):
    result = run(PROGRAM, *FLAGS, '--rounds=1', f'--output_dir={tmp_path}', preamble=few + FAILING)
    assert result.status == 0, result
    assert 'candidate 2/12 failed and counts 0: CUDA out of memory. Tried to allocate 2.00 GiB\n' in result.out
    assert re.search(r'candidate 3/12 failed and counts 0: the (weights are no longer finite|loss is (nan|inf))', result.out)
    assert "candidate 4/12 failed and counts 0: [enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't" in result.out
    failed = [line for line in results(tmp_path).values() if 'error' in line]
    assert [line['accuracy'] for line in failed] == [0.0] * 4
    scores = dict(zip(lines(tmp_path, 'arch_pool.0'), lines(tmp_path, 'arch_pool.perf.0'), strict=True))
    assert [scores[line['arch']] for line in failed] == ['0.0'] * 4
    assert not [name for name in files(tmp_path) if name.endswith('.pt') and name != 'checkpoint.pt']


def test_where_all_candidates_fail_the_search_stops_and_the_same_command_with_a_smaller_rate_goes_on(few, tmp_path):
    command = [PROGRAM, *FLAGS, '--controller_seed_arch=3', '--rounds=0', f'--output_dir={tmp_path}']
    result = run(*command, '--child_lr_max=1e30', '--child_grad_bound=1e30', preamble=few)
    assert result.status == 1 and 'stopped: all 3 trainings failed, the last one so: the ' in result.err, result
    result = run(*command, preamble=few)
    assert result.status == 0 and 'finished' in result.out, result
    assert 'failed' not in result.out
    assert ['error' in json.loads(line) for line in lines(tmp_path, 'results.0.jsonl')] == [True] * 3 + [False] * 3


def test_a_gpu_that_fails_ends_the_search_and_no_candidate_counts_nothing_for_it(few, tmp_path):
    broken = few + """
import torch, candidates
def fail(*args, **kwargs):
    def ones(*args, **kwargs):
        raise RuntimeError('CUDA error: unspecified launch failure')
    torch.ones = ones
    ones()
candidates.train_candidate = fail
"""
    result = run(PROGRAM, *FLAGS, f'--output_dir={tmp_path}', preamble=broken)
    assert result.status == 1 and 'CUDA error: unspecified launch failure' in result.err
    assert results(tmp_path) == {}


@pytest.mark.parametrize('proposer', [pytest.param('random', marks=pytest.mark.slow), 'evolution'])
def test_a_baseline_proposes_and_goes_on_after_a_kill(proposer, few, tmp_path):
    command = [PROGRAM, *FLAGS, '--child_epochs=1', f'--proposer={proposer}', '--child_rank_count=0']
    assert run(*command, f'--output_dir={tmp_path / "killed"}', preamble=few + kill_at('a candidate', 15)).status == -9
    for name in ('killed', 'whole'):
        result = run(*command, f'--output_dir={tmp_path / name}', preamble=few)
        assert result.status == 0 and 'controller epoch' not in result.out, result
    assert_same_search(tmp_path / 'killed', tmp_path / 'whole')
    assert [line['kind'] for line in metrics(tmp_path / 'whole')] == ['score', 'new', 'score', 'new', 'score']
    assert len(lines(tmp_path / 'whole', 'arch_pool')) == 12 + 2 * 5


def test_a_candidate_that_a_pool_file_has_twice_is_trained_once(few, tmp_path):
    (tmp_path / 'pool').write_text('0 7 1 15 0 6 1 7\n0 5 1 5 0 9 0 11\n0 7 1 15 0 6 1 7\n')
    result = run(PROGRAM, *FLAGS, '--rounds=1', '--child_rank_count=1', '--child_epochs=1', '--child_arch_pool=../pool',
                 '--output_dir=.', cwd=(tmp_path / 'out').mkdir() or tmp_path / 'out', preamble=few)
    assert result.status == 0, result
    assert 'pool: 1 of its 3 lines repeat others and are left out' in result.out
    assert len(lines(tmp_path / 'out', 'arch_pool.0')) == 2
    results(tmp_path / 'out')


# -------------------------------------------------------------------------------------------------------- methods, spaces

def test_the_weight_sharing_search_refuses_the_large_space(few, tmp_path):
    result = run(PROGRAM, *FLAGS, '--method=NAO-WS', '--search_space=large', '--output_dir=out', cwd=tmp_path, preamble=few)
    assert_user_error(result, '--search_space=large', '--method=NAO')
    assert files(tmp_path) == []


def test_candidates_of_the_small_space(few, tmp_path):
    result = run(PROGRAM, *FLAGS, '--search_space=small', '--rounds=1', '--child_epochs=1', '--child_use_aux_head',
                 f'--output_dir={tmp_path}', preamble=few)
    assert result.status == 0, result
    for line in lines(tmp_path, 'arch_pool.1'):
        parse(line, 1, SEARCH_SPACES['small'])


def test_the_defaults_are_those_of_the_method():
    for method, wanted in (('NAO', {'child_epochs': 25, 'child_channels': 32, 'child_lr_max': 0.024,
                                    'child_drop_path_keep_prob': 0.7, 'child_keep_prob': 1.0, 'child_layers': 3,
                                    'child_use_aux_head': True, 'controller_seed_arch': 600, 'controller_new_arch': 300}),
                           ('NAO-WS', {'child_epochs': 150, 'child_channels': 20})):
        text = ' '.join(run(PROGRAM, f'--method={method}', '--help').out.partition('options:')[2].split())
        for flag, value in wanted.items():
            default = re.search(rf'--{flag}, --no-{flag}.*?\(default: (.*?)\)|--{flag} .*?\(default: (.*?)\)', text)
            assert str(value) in default.groups(), (method, flag, default)


def test_a_search_of_one_method_does_not_take_the_others_checkpoint(searched, few):
    result = run(PROGRAM, *FLAGS, '--method=NAO-WS', '--search_space=small', f'--output_dir={searched[0]}', preamble=few)
    assert_user_error(result, searched[0] / 'checkpoint.pt')


# --------------------------------------------------------------------------------------------------------------- ImageNet

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp('images')
    write_images(folder / 'train', {f'n{number}': 10 for number in range(4)})
    return folder


def test_one_image_is_too_few_to_search(tmp_path):
    write_images(tmp_path / 'train', {'only': 1})
    result = run(PROGRAM, '--dataset=imagenet', '--method=NAO-WS', f'--data={tmp_path}', '--lazy_load', *SIZES,
                 f'--output_dir={tmp_path / "out"}')
    assert_user_error(result, f'--data={tmp_path}', 'at least 2 images')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('method, workers', [('NAO-WS', 0), ('NAO', 1)])
def test_a_search_on_a_folder_of_images(method, workers, images, tmp_path):
    """36 images of train/ train, 4 validate; valid/ is not asked for."""
    flags = ['--dataset=imagenet', f'--method={method}', f'--data={images}', f'--workers={workers}', *SIZES,
             '--child_epochs=2', '--child_eval_epochs=1', '--child_rank_count=0', '--child_batch_size=18', '--rounds=1',
             '--child_eval_batch_size=4', '--controller_seed_arch=4', '--controller_new_arch=2', '--child_lr=0.05']
    result = run(PROGRAM, *flags, f'--output_dir={tmp_path}')
    assert result.status == 0, result
    pool = lines(tmp_path, 'arch_pool')
    assert f'the best by its score is {pool[0]}, the first of {tmp_path}' in result.out
    assert not (tmp_path / 'arch_pool.final').exists()
    assert all(parse(line, 1, SEARCH_SPACES['large' if method == 'NAO' else 'small']) for line in pool)
    if method == 'NAO-WS':
        assert [line['lr'] for line in metrics(tmp_path) if line['kind'] == 'epoch'] == pytest.approx([0.05, 0.05 * 0.97])
        assert load(tmp_path / 'checkpoint.pt')['model']['classifier.weight'].shape[0] == 4
