"""tools/ranking.py: Kendall's τ, the regret of the top five, and what is no pool of scores."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tooling import mistake, output, tool

import architecture

ranking = tool('tools/ranking.py')
ARCHS = [str(arch) for arch in architecture.sample(8, 1, range(5), torch.Generator().manual_seed(0))]


def scored(folder, values, archs=ARCHS):
    """A directory with a pool and its scores."""
    folder.mkdir()
    (folder / 'arch_pool').write_text(''.join(f'{arch}\n' for arch in archs))
    (folder / 'arch_pool.perf').write_text(''.join(f'{value}\n' for value in values))
    return folder


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=8))
def test_kendall_counts_pairs(points):
    agree = disagree = first = second = 0
    for index, (a, b) in enumerate(points):
        for c, d in points[:index]:
            agree += (a - c) * (b - d) > 0
            disagree += (a - c) * (b - d) < 0
            first += a != c
            second += b != d
    tau = ranking.kendall(*np.array(points, float).T)
    assert tau == pytest.approx((agree - disagree) / (first * second) ** 0.5) if first and second else tau == 0


def test_regret_is_what_the_five_best_by_score_lack():
    assert ranking.regret(np.array([9., 8, 7, 6, 5, 4]), np.array([1., 2, 3, 4, 5, 7])) == 2


@given(st.lists(st.integers(0, 9), min_size=6, max_size=9))
def test_regret_of_chance_is_the_mean_over_all_that_can_be_drawn(values):
    truth = np.array(values, float)
    drawn = [truth.max() - max(five) for five in itertools.combinations(truth, 5)]
    assert ranking.regret_of_chance(truth) == pytest.approx(np.mean(drawn))


def test_pools_of_the_normal_cell_are_counted():
    normal, reduction = '0 3 1 4 2 2 1 1', '0 3 1 3 0 3 1 2'  # of the small space 2 and 3 are pools
    assert ranking.pools_of(architecture.parse(f'{normal} {reduction}')) == 2
    assert ranking.pools_of(architecture.parse('0 10 1 15 2 8 1 7 0 13 1 12 0 8 2 7')) == 2  # of the large one 10 to 15


def test_a_score_that_says_nothing_gets_no_help_from_the_order_of_the_files(tmp_path):
    """The pools of trainings stand best first."""
    bad, *good = sorted(ARCHS, reverse=True)  # the best one is last among equals
    alone = scored(tmp_path / 'a', [0.9, *(i / 100 for i in range(7))], [bad, *good])
    same = scored(tmp_path / 'same', [0.5] * 8, [bad, *good])
    output('tools/ranking.py', '--alone', alone, '--scores', same, '--json', tmp_path / 'out')
    found = json.loads((tmp_path / 'out').read_text())[str(same)]
    assert found['tau'] == 0 and found['regret'] > 80


def test_scores_beside_trainings(tmp_path):
    up, noisy = [i / 10 for i in range(8)], [0.1, 0, 0.2, 0.3, 0.4, 0.5, 0.7, 0.6]
    alone = [scored(tmp_path / 'a', up), scored(tmp_path / 'b', noisy[::-1], ARCHS[::-1])]
    down = scored(tmp_path / 'down', up[::-1])
    output('tools/ranking.py', '--alone', *alone, '--scores', down, '--layers=1', '--channels=4', '--json', tmp_path / 'out')
    found = json.loads((tmp_path / 'out').read_text())
    pools = [ranking.pools_of(architecture.parse(arch)) for arch in ARCHS]
    each = [np.corrcoef(values, pools)[0, 1] for values in (up, noisy)]
    assert found['trainings among each other'] == {'tau': pytest.approx(24 / 28), 'regret': 0,
                                                   'pools': pytest.approx(np.mean(each))}
    assert found[str(down)] == {'tau': pytest.approx((-1 - 24 / 28) / 2), 'regret': pytest.approx(30),
                                'pools': pytest.approx(-each[0])}
    assert -1 <= found['multiply-adds']['tau'] <= 1


def test_what_is_no_pool_of_scores(tmp_path):
    good, short = scored(tmp_path / 'good', range(8)), scored(tmp_path / 'short', range(7))
    other = scored(tmp_path / 'other', range(7), ARCHS[1:])
    for scores, message in ((tmp_path / 'none', 'none/arch_pool: cannot be read'), (short, 'do not belong together'),
                            (other, 'other: has other architectures than')):
        assert message in mistake('tools/ranking.py', '--alone', good, '--scores', scores)
