"""tools/compare.py: what it reads of runs that go on, its statistics, its figure."""

import itertools
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tooling import candidates, mistake, needs_matplotlib, output, search, tool, training

compare = tool('tools/compare.py')


def numbers(tmp_path, *groups):
    output('tools/compare.py', *groups, '--json', tmp_path / 'a.json')
    return json.loads((tmp_path / 'a.json').read_text())


def test_searches_are_compared_where_all_of_them_are(tmp_path):
    for seed in range(3):
        candidates(tmp_path / 'a' / f'seed{seed}', 0.1, 0.3, 0.2, 0.5, seed=seed)
        candidates(tmp_path / 'b' / f'seed{seed}', 0.1, 0.2 + seed / 100, 0.1, seed=seed)
    with open(tmp_path / 'b' / 'seed2' / 'results.0.jsonl', 'ab') as file:
        file.write(b'{"kind": "candidate", "arch": "0 5 0')
    found = numbers(tmp_path, f'a={tmp_path}/a/seed*', f'b={tmp_path}/b/**')
    assert found['at'] == 3 and found['unit'] == 'architectures evaluated'
    assert found['groups']['a']['runs'][0]['y'] == [10, 30, 30, 50]
    assert found['groups']['a']['values']['best after 3'] == [30, 0]
    assert found['groups']['a']['hours'] == [pytest.approx(4 / 60), 0]
    difference, = found['differences']
    assert difference['differences'] == pytest.approx([10, 9, 8]) and difference['seeds'] == [0, 1, 2]
    assert difference['mean'] == pytest.approx(9) and difference['p'] == 2 / 8
    assert 8 <= difference['interval'][0] < 9 < difference['interval'][1] <= 10


def test_searches_are_compared_where_the_user_says_without_what_was_not_trained_again(tmp_path):
    for name in 'ab':
        run = candidates(tmp_path / name, 0.1, 0.3, 0.4, seed=0)
        with open(run / 'metrics.jsonl', 'a') as file:
            file.write(json.dumps({'kind': 'rank', 'index': 0, 'accuracy': 0.4, 'arch': '', 'seconds': 9}) + '\n')
    found = numbers(tmp_path, f'a={tmp_path}/a', f'b={tmp_path}/b', '--at=2')
    assert found['at'] == 2 and found['groups']['a']['values'] == {'best after 2': [30, None]}


def test_results_of_several_processes_are_in_the_order_of_their_ends(tmp_path):
    candidates(tmp_path, 0.1, 0.2, process=0)
    candidates(tmp_path, 0.3, 0.4, process=1)
    late = (tmp_path / 'results.0.jsonl').read_text().replace('60.0', '90.0')
    (tmp_path / 'results.0.jsonl').write_text(late)  # ends after 90, 180; the other's after 60, 120
    run = sys.modules['runs'].RunFiles(tmp_path)
    assert compare.evaluations(run) == [0.3, 0.1, 0.4, 0.2] and run.seconds == 180


def test_what_another_search_had_trained_comes_first(tmp_path):
    shared = candidates(tmp_path / 'shared', 0.5, 0.6, 0.9, process=3) / 'results.3.jsonl'
    pool = [json.loads(line)['arch'] for line in shared.read_text().splitlines()]
    run = candidates(tmp_path / 'run', 0.1, 0.7, child_results=str(shared))
    state = torch.load(run / 'checkpoint.pt')
    torch.save(state | {'pool': pool[:2]}, run / 'checkpoint.pt')  # it has not proposed the third one
    assert numbers(tmp_path, f'a={run}')['groups']['a']['runs'][0]['y'] == pytest.approx([50, 60, 60, 70])
    (run / 'checkpoint.pt').unlink()  # where only small files were kept
    with open(run / 'metrics.jsonl', 'a') as file:
        file.write(json.dumps({'kind': 'start', 'args': state['args'], 'seconds': 9}) + '\n')
    assert 'not known without checkpoint.pt or arch_pool' in mistake('tools/compare.py', f'a={run}')
    (run / 'arch_pool').write_text(''.join(f'{arch}\n' for arch in pool[:2]))
    assert numbers(tmp_path, f'a={run}')['groups']['a']['runs'][0]['y'] == pytest.approx([50, 60, 60, 70])
    shared.unlink()
    assert 'shared/results.3.jsonl cannot be read' in mistake('tools/compare.py', f'a={run}')


def test_what_another_search_had_trained_counts_when_it_was_proposed(tmp_path):
    shared = candidates(tmp_path / 'shared', 0.5, 0.9, process=3) / 'results.3.jsonl'
    run = candidates(tmp_path / 'run', 0.6, child_results=str(shared))
    (first, late), (own,) = ([json.loads(line)['arch'] for line in path.read_text().splitlines()]
                             for path in (shared, run / 'results.0.jsonl'))
    state = torch.load(run / 'checkpoint.pt')
    torch.save(state | {'pool': [late, own, first], 'born': [2, 1, 0]}, run / 'checkpoint.pt')
    assert numbers(tmp_path, f'a={run}')['groups']['a']['runs'][0]['y'] == pytest.approx([50, 60, 90])


def test_a_training_that_failed_counts_until_it_was_tried_again(tmp_path):
    run = candidates(tmp_path / 'a', 0.0, 0.7, 0.9, 0.0)
    records = [json.loads(line) for line in (run / 'results.0.jsonl').read_text().splitlines()]
    records[0]['error'] = records[3]['error'] = 'out of memory'
    records[2]['arch'] = records[0]['arch']
    (run / 'results.0.jsonl').write_text(''.join(f'{json.dumps(record)}\n' for record in records))
    assert compare.evaluations(sys.modules['runs'].RunFiles(run)) == [0.9, 0.7, 0.0]
    state = torch.load(run / 'checkpoint.pt')  # of another search only what succeeded is taken
    other = candidates(tmp_path / 'b', child_results=str(run / 'results.0.jsonl'))
    torch.save(torch.load(other / 'checkpoint.pt') | {'pool': [record['arch'] for record in records]}, other / 'checkpoint.pt')
    assert compare.evaluations(sys.modules['runs'].RunFiles(other)) == [0.7, 0.9] and state


def test_other_searches_by_their_scorings_and_their_rankings(tmp_path):
    for seed in range(2):
        search(tmp_path / f'seed{seed}', [0.5, 0.4], [0.4, 0.3], [0.7, 0.6], ranked=[0.8, 0.9], seed=seed)
    found = numbers(tmp_path, f'a={tmp_path}/seed*', f'b={tmp_path}/seed0')
    run = found['groups']['a']['runs'][0]
    assert run['x'] == [2, 4, 6] and run['y'] == [50, 50, 70] and run['final'] == 90
    assert [each['what'] for each in found['differences']] == ['best after 6', 'best, trained from scratch']
    assert found['differences'][0]['seeds'] == [0] and found['differences'][0]['interval'] is None


def test_trainings_by_their_epochs(tmp_path):
    training(tmp_path / 'a' / 'seed3', 50.0, 70.0, 60.0, seed=3)
    training(tmp_path / 'b' / 'seed3', 50.0, 55.0, seed=3)
    (tmp_path / 'b' / 'seed3' / 'checkpoint.pt').unlink()  # it is in its first epochs: the directory names the seed
    found = numbers(tmp_path, f'a={tmp_path}/a', f'b={tmp_path}/b')
    assert found['at'] == 2 and found['differences'][0]['differences'] == [15]


def test_of_several_looks_at_the_test_images_the_last_one_counts(tmp_path):
    run = training(tmp_path / 'a', 50.0, seed=0)
    with open(run / 'metrics.jsonl', 'a') as file:
        for top1 in (47.4, 40.0):  # it went on with more epochs
            file.write(json.dumps({'kind': 'final', 'epoch': 1, 'test': {'top1': top1}, 'seconds': 9}) + '\n')
    assert numbers(tmp_path, f'a={run}')['groups']['a']['runs'][0]['final'] == 40


def test_runs_without_a_result_are_left_out_and_named(tmp_path):
    candidates(tmp_path / 'a', 0.1)
    candidates(tmp_path / 'b')
    assert f'{tmp_path / "b" / "metrics.jsonl"}: has no complete record yet' in mistake(
        'tools/compare.py', f'a={tmp_path}/*')


@pytest.mark.parametrize(('groups', 'text'), [
    (['a'], 'must be GROUP=GLOB'), (['={}/one'], 'must be GROUP=GLOB'), (['a={}/one', 'a={}/two'], 'each group once'),
    (['a={}/none*'], 'no file or directory'), (['a={}/one', 'b={}/training'], 'with each other'),
    (['a={}/*e*'], 'have the same --seed'), (['a={}/one', '-o', 'a.gif'], '.svg, .png or .pdf')])
def test_mistakes(groups, text, tmp_path):
    for name in ('one', 'seed'):
        candidates(tmp_path / name, 0.1)
    training(tmp_path / 'training', 50.0)
    assert text in mistake('tools/compare.py', *(group.format(tmp_path) for group in groups))


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=9))
def test_the_permutation_test_is_exact(values):
    """Against all 2^n choices of signs, one by one."""
    differences = np.array(values) / 10
    means = [abs(np.dot(signs, values)) for signs in itertools.product((-1, 1), repeat=len(values))]
    assert compare.permutation_p(differences) == np.mean([mean >= abs(sum(values)) for mean in means])


def test_the_permutation_test_takes_many_seeds():
    assert compare.permutation_p(np.ones(30)) == 2 / 2**30


def test_repeats_count_as_one_with_their_mean(tmp_path):
    for name, gain in (('a', 1.0), ('b', 0.0)):
        for seed in (10, 11, 12, 20, 21, 22):
            training(tmp_path / name / f'seed{seed}', 50.0 + seed + gain, 60.0 + gain * seed / 10, seed=seed)
    found = numbers(tmp_path, '--repeats=10', f'a={tmp_path}/a/*', f'b={tmp_path}/b/*')
    difference, = found['differences']
    assert difference['seeds'] == [1, 2] and difference['differences'] == pytest.approx([1.1, 2.1])
    assert found['groups']['a']['runs'][1]['y'] == pytest.approx([72, 62.1])
    shutil.rmtree(tmp_path / 'b' / 'seed12')  # is still to come: the mean of two repeats is not compared with that of three
    assert numbers(tmp_path, '--repeats=10', f'a={tmp_path}/a/*', f'b={tmp_path}/b/*')['differences'][0]['seeds'] == [2]
    assert 'unknown' in mistake('tools/compare.py', '--repeats=10', f'a={candidates(tmp_path / "c", 0.5, seed=None)}')


@needs_matplotlib
def test_errors_and_single_points_are_in_sight(tmp_path):
    for seed, accuracy in enumerate((50.0, 60.0)):
        training(tmp_path / f'a{seed}', accuracy, accuracy + 1, seed=seed)
    training(tmp_path / 'b', 52.0)
    left, _ = compare.figure(compare.read_groups([f'a={tmp_path}/a*', f'b={tmp_path}/b'], []), 1).axes
    low, high = left.get_ylim()
    assert low < 50 and high > 61 and all(float(tick).is_integer() for tick in left.get_xticks())


@needs_matplotlib
def test_the_figure(tmp_path):
    for seed in range(2):
        candidates(tmp_path / f'a{seed}', 0.1, 0.3, 0.4, seed=seed)
        candidates(tmp_path / f'b{seed}', *[0.1, 0.3, 0.4][:2 + seed], seed=seed)
    groups = compare.read_groups([f'$a$={tmp_path}/a*', f'b={tmp_path}/b*'], [])
    left, right = compare.figure(groups, 2).axes
    lines = {line.get_label(): line.get_ydata() for line in left.lines}
    assert lines[r'\$a\$'].tolist() == [10, 30, 40] and np.isnan(lines['b'][2]), 'a whole line only where all runs are'
    assert len(right.lines) >= 2 and [label.get_text() for label in right.get_xticklabels()] == [r'\$a\$', 'b']
    assert right.get_title('left') == 'each seed after 2' and left.lines[0].get_marker() == 'o'
    assert '±: standard error' in output('tools/compare.py', f'a={tmp_path}/a*', '-o', tmp_path / 'a.png')
    assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')
