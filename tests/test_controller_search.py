"""The search that the controller makes: its settings, its steps, and the benchmark of tables (tools/benchmark_search.py)."""

import contextlib
import functools
import io
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from unittest import mock

import ablation
import benchmark_search
import pytest
import torch
from benchmark_search import METHODS, run
from search_tables import OPERATIONS, UserError, read_table, regrets

from architecture import REWRITINGS, vocabulary
from controller import (
    NAO,
    PRESETS,
    TARGETS,
    Settings,
    choose,
    fit,
    fit_all,
    fit_epochs,
    fit_predictor,
    new_architectures,
    pairwise_accuracy,
    propose,
    random_sequences,
    rank,
    redraw,
    scale,
)

LEGAL = [(1, 4), (5, 8), (1, 4), (5, 8), (1, 4)]  # a made-up space of 4^5 sequences
OPTIMUM = (3, 6, 2, 8, 1)
TOOL = Path(__file__).resolve().parent.parent / 'tools' / 'benchmark_search.py'


def landscape(sequence):
    """Accuracy of a made-up sequence: matches with the optimum, neighbouring matches count on top; 1 at the optimum."""
    matches = [token == best for token, best in zip(sequence, OPTIMUM, strict=True)]
    pairs = sum(left and right for left, right in itertools.pairwise(matches))
    return (sum(matches) + pairs) / (2 * len(matches) - 1)


def small_nao():
    return NAO(LEGAL, 9, len(LEGAL), encoder_hidden_size=32, encoder_emb_size=16, mlp_hidden_size=64,
               decoder_hidden_size=32)


def random_known(count, seed):
    generator = torch.Generator().manual_seed(seed)
    known = {}
    while len(known) < count:
        sequence = tuple(random_sequences(small_nao(), 1, generator)[0].tolist())
        known[sequence] = landscape(sequence)
    return known


def search_step(naos, sequences, accuracies, count, settings, generator, first=True, refused=(), **options):
    """Fit the controllers to the known accuracies and ascend from the best, as every search does."""
    tokens, targets = torch.tensor(sequences), TARGETS[settings.targets](accuracies)
    fit_all(naos, tokens, targets, settings, generator, first=first, **options)
    best = tokens[targets.flatten().argsort(descending=True, stable=True)[:settings.top]]
    return propose(naos, best, [*map(tuple, sequences), *refused], count, settings, generator)[0]


def small_search(seed, queries=60, settings=PRESETS['best']):
    """Accuracies by sequences, in the order asked: 30 random ones, then rounds of 10."""
    # A controller a third as wide as usual learns as quickly with larger steps.
    settings = settings._replace(epochs=40, later_updates=6, predictor_updates=25, redrawn=50, lr=1e-2)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    known = random_known(30, seed)
    naos = [small_nao() for _ in range(settings.members)]
    first = True
    while len(known) < queries:
        new = search_step(naos, list(known), list(known.values()), 10, settings, generator, first=first)
        first = False
        known.update((sequence, landscape(sequence)) for sequence in new)
    return known


def test_best_preset_beats_random_search_at_equal_queries():
    queries, seeds = 60, range(4)
    found = [max(small_search(seed, queries).values()) for seed in seeds]
    drawn = [max(random_known(queries, seed).values()) for seed in seeds]
    assert sum(found) / len(found) > sum(drawn) / len(drawn) + 0.1
    assert found.count(1) > drawn.count(1), 'the optimum is found, not only approached'


def test_search_is_deterministic_for_a_seed():
    once, again, other = small_search(3, 40), small_search(3, 40), small_search(4, 40)
    assert list(once) == list(again)
    assert list(once) != list(other)


def test_paper_preset_is_the_plain_fit_and_the_first_come():
    settings = PRESETS['paper']._replace(epochs=30)
    known = random_known(30, 0)
    torch.manual_seed(0)
    nao = small_nao()
    torch.manual_seed(1)
    stepped = search_step([nao], list(known), list(known.values()), 12, settings, torch.Generator().manual_seed(2))

    torch.manual_seed(0)
    plain = small_nao()
    torch.manual_seed(1)
    tokens, targets = torch.tensor(list(known)), scale(list(known.values()))
    fit(plain, tokens, targets, settings, torch.Generator().manual_seed(2))
    best_first = tokens[targets.flatten().argsort(descending=True, stable=True)[:100]]
    assert stepped == new_architectures(plain, best_first, known, 12, range(1, 51))[0]
    for name, value in nao.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name])


def test_the_defaults_of_the_settings_are_the_papers():
    assert PRESETS['paper'] == Settings()
    assert Settings().epochs == 1000 and Settings().trade_off == 0.8 and Settings().lambdas == tuple(range(1, 51))


@pytest.mark.parametrize('preset', PRESETS)
def test_proposals_are_new_legal_and_not_refused(preset):
    settings = PRESETS[preset]._replace(epochs=3, predictor_updates=5)
    torch.manual_seed(0)
    naos = [small_nao() for _ in range(settings.members)]
    known, refused = random_known(20, 0), list(random_known(300, 1))
    new = search_step(naos, list(known), list(known.values()), 15, settings, torch.Generator().manual_seed(0),
                      refused=refused)
    assert 0 < len(new) <= 15 and len(set(new)) == len(new)
    assert not set(new) & (set(known) | set(refused))
    assert all(first <= token <= last for sequence in new
               for token, (first, last) in zip(sequence, LEGAL, strict=True))


def test_members_share_the_count_where_the_first_come_are_taken():
    torch.manual_seed(0)
    naos = [small_nao() for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    seeds = random_sequences(naos[0], 100, generator)
    for nao in naos:  # a decoder that has learned nothing writes the same few sequences for all seeds
        fit(nao, seeds, torch.full((100, 1), 0.5), Settings(epochs=60, lr=1e-2, l2_reg=0, trade_off=0.1), generator)
    together = propose(naos, seeds, [], 9, Settings(members=3), generator)[0]
    assert together[:3] == new_architectures(naos[0], seeds, [], 3, range(1, 51))[0]
    assert len(set(together)) == len(together) == 9


@pytest.mark.parametrize('augment', REWRITINGS.values())
def test_real_cells_are_searched_rewritten(augment):
    vocab = vocabulary(5, 'small')
    settings = PRESETS['best']._replace(epochs=2, candidates=20, predictor_updates=5)
    torch.manual_seed(0)
    naos = [NAO(vocab.allowed_tokens, vocab.size, 20) for _ in range(settings.members)]
    generator = torch.Generator().manual_seed(0)
    sequences = random_sequences(naos[0], 30, generator).tolist()
    new = search_step(naos, sequences, list(range(30)), 10, settings, generator, augment=augment)
    assert len(new) == 10
    for sequence in new:
        vocab.decode(sequence)


def test_ranks_ignore_increasing_functions_and_share_ties():
    accuracies = [10.0, 90.0, 93.0, 93.0]
    assert rank(accuracies).flatten().tolist() == [1 / 8, 3 / 8, 3 / 4, 3 / 4]
    assert torch.equal(rank(accuracies), rank([math.exp(value) for value in accuracies]))
    assert rank([5.0]).tolist() == [[0.5]]


def chosen(predictions, count, beta, **apart):
    """Choose among candidates that differ in all of their three tokens, from known ones too."""
    candidates = torch.arange(predictions.shape[1])[:, None].expand(-1, 3)
    return choose(predictions, count, beta, [candidates], [torch.full((2, 3), -1)], **apart)


@pytest.mark.parametrize('apart', [0, 3])
def test_a_choice_goes_from_what_members_expect_most_of_to_what_they_disagree_about(apart):
    predictions = torch.tensor([[0.8, 0.7, 0.999, 0.1], [0.8, 0.7, 0.50, 0.1]])
    assert chosen(predictions, 3, 0, apart=apart) == [2, 0, 1], 'log-odds, not probabilities'
    assert chosen(predictions[:, [0, 1, 3]], 9, 5, apart=apart) == [0, 1, 2]
    uncertain = torch.tensor([[0.8, 0.9, 0.70], [0.8, 0.05, 0.75]])
    assert chosen(uncertain, 2, 0, apart=apart) == [0, 2]
    assert chosen(uncertain, 2, 2, apart=apart) == [0, 1]
    sure = torch.tensor([[1., 1., .3, 0.], [.99, 1., .1, .4]])  # as a sigmoid rounds them
    assert chosen(sure, 4, 2, apart=apart)[:2] == [1, 0] and sorted(chosen(sure, 4, 2, apart=apart)) == [0, 1, 2, 3]


def test_a_choice_keeps_its_distance_as_far_as_there_is_one():
    known = torch.tensor([[1, 1, 1, 1], [2, 2, 2, 2]])
    candidates = torch.tensor([[1, 1, 1, 2],  # one token from the known
                               [3, 3, 3, 3],
                               [3, 3, 3, 1],  # one from the second candidate
                               [1, 1, 4, 4],
                               [4, 4, 4, 4]])
    predictions = torch.tensor([[.9, .8, .7, .6, .5]])
    for apart, expected in ((0, [0, 1, 2, 3, 4]), (1, [0, 1, 2, 3, 4]), (2, [1, 3, 4, 0, 2])):
        assert choose(predictions, 5, 0, [candidates], [known], apart) == expected
    assert choose(predictions, 5, 0, [candidates], [known], 3) == [1, 4, 3, 0, 2], 'then the farthest that are left'


def test_a_choice_compares_however_candidates_are_written():
    known, candidates = torch.tensor([[1, 2, 3]]), torch.tensor([[3, 2, 1], [2, 3, 3], [4, 4, 4]])
    predictions = torch.tensor([[.9, .8, .7]])
    ways = [[rows, rows.sort(dim=1).values] for rows in (candidates, known)]
    assert choose(predictions, 2, 0, [candidates], [known], 2) == [0, 1]
    assert choose(predictions, 2, 0, *ways, 2) == [1, 2], 'the first is the known one, in another order'
    assert choose(predictions, 3, 0, *ways) == [0, 1, 2]


def test_proposals_keep_the_distance_that_the_settings_ask_for():
    known = random_known(15, 0)
    tokens, targets = torch.tensor(list(known)), rank(list(known.values()))
    settings = Settings(epochs=60, lr=1e-2, unlabelled=50, redrawn=200, candidates=100, lambdas=(1., 10.))
    nao, generator = small_nao(), torch.Generator().manual_seed(0)
    fit(nao, tokens, targets, settings, generator)
    for apart, least in ((0.0, 1), (0.2, 1), (0.4, 2), (0.59, 2)):
        new = torch.tensor(propose([nao], tokens, list(known), 5, settings._replace(apart=apart), generator)[0])
        nearest = [int((each != torch.cat([tokens, new[:index]])).sum(1).min()) for index, each in enumerate(new)]
        assert len(nearest) == 5 and min(nearest) == least, (apart, nearest)


def test_a_predictor_fitted_anew_learns_the_order_and_leaves_the_rest():
    known = random_known(80, 0)
    tokens, targets = torch.tensor(list(known)), rank(list(known.values()))
    torch.manual_seed(0)
    nao = small_nao()
    before = {name: value.clone() for name, value in nao.state_dict().items()}
    settings = Settings(predictor_updates=150, loss='cross_entropy', lr=1e-2)
    swaps = []
    for augment in (None, lambda rows, generator: swaps.append(len(rows)) or rows):
        fit_predictor(nao.encoder, tokens, targets, settings, torch.Generator().manual_seed(0), augment)
        with torch.no_grad():
            assert pairwise_accuracy(targets, nao.predict(tokens)) > 0.9
        for name, value in nao.state_dict().items():
            assert torch.equal(value, before[name]) != name.startswith(('encoder.mlp', 'encoder.regressor')), name
    assert len(swaps) == 150, 'embedded anew in each epoch, here of one batch'


def test_random_sequences_are_legal_and_reach_every_token():
    draws = random_sequences(small_nao(), 200, torch.Generator().manual_seed(0))
    for position, (first, last) in enumerate(LEGAL):
        assert set(draws[:, position].tolist()) == set(range(first, last + 1))


def test_redrawn_sequences_lie_between_neighbours_of_the_first_and_chance():
    nao, generator = small_nao(), torch.Generator().manual_seed(0)
    sequences = random_sequences(nao, 10, generator)
    redrawn = redraw(nao, sequences, 400, generator)
    first, last = torch.tensor(LEGAL).T
    assert redrawn.shape == (400, len(LEGAL)) and ((first <= redrawn) & (redrawn <= last)).all()
    distances = (redrawn[:, None] != sequences).sum(2)
    nearest = distances.argmin(1)[distances.amin(1) == 1].bincount(minlength=10)
    assert nearest[:5].sum() > nearest[5:].sum(), 'the first ones more often'
    assert {1, 2, 3} <= set(distances.amin(1).tolist())


def test_later_fits_take_the_given_number_of_updates():
    reports = []
    known = random_known(30, 0)
    settings = Settings(epochs=4, later_updates=7, batch_size=10)
    for first in (True, False):
        search_step([small_nao()], list(known), list(known.values()), 1, settings, torch.Generator().manual_seed(0),
                    first=first, report=lambda member, values: reports.append(values))
    assert [values['epoch'] for values in reports] == [4, 3], '30 sequences are 3 updates an epoch'


@pytest.mark.parametrize('length, wanted', [(6, 20), (7, 20), (40, 60)])
def test_later_fits_of_the_best_preset_grow_with_the_length_of_an_architecture(length, wanted):
    assert fit_epochs(PRESETS['best'], 100, length, first=False) == wanted
    assert fit_epochs(PRESETS['best'], 100, length, first=True) == 300
    assert fit_epochs(Settings(later_per_token=2.0), 100, length, first=False) == 2 * length  # without the other flag too


def write_table(path, rows=300):
    """A table of `rows` architectures, spread over the space; more convolutions are better."""
    lines = ['architecture,accuracy']
    for number, choice in enumerate(itertools.product(range(5), repeat=6)):
        if number % (15625 // rows) == 0 and len(lines) <= rows:
            a, b, c, d, e, f = (OPERATIONS[operation] for operation in choice)
            quality = sum((0, 1, 2, 4, 1)[operation] for operation in choice)
            lines.append(f'|{a}~0|+|{b}~0|{c}~1|+|{d}~0|{e}~1|{f}~2|,{50 + quality + number / 1e5:.4f}')
    path.write_text('\n'.join(lines) + '\n')
    return path


def benchmark(*options):
    """Run the benchmark here, which saves a start of PyTorch."""
    out, err = io.StringIO(), io.StringIO()
    with (mock.patch.object(sys, 'argv', [TOOL.name, *map(str, options)]), contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(err)):
        try:
            benchmark_search.main()
            status = 0
        except SystemExit as end:
            status = end.code
        except UserError as error:
            status = 2
            print(error, file=err)
    return subprocess.CompletedProcess(options, status, out.getvalue(), err.getvalue())


def test_the_program_ends_in_one_line(tmp_path):
    done = subprocess.run([sys.executable, TOOL, '--table', tmp_path / 'none'], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith('benchmark_search.py: ') and len(done.stderr.splitlines()) == 1


def test_benchmark_prints_and_writes_the_methods_asked_for(tmp_path):
    table, output = write_table(tmp_path / 'table.csv'), tmp_path / 'regret.json'
    options = ('--table', table, '--seeds', 2, '--queries', 50, '--json', output)
    done = benchmark(*options, '--method', 'random,evolution', '--method', 'gp')
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ['regret', 'random', 'evolution', 'gp']
    report = json.loads(output.read_text())
    assert set(report) == {'regret', 'seconds_per_seed', 'tables'}
    assert report['tables'] == {'table': {name: report[name] for name in ('regret', 'seconds_per_seed')}}
    assert set(report['regret']) == set(report['seconds_per_seed']) == {'random', 'evolution', 'gp'}
    for points in report['regret'].values():
        assert set(points) == {'50'}
        mean, error = points['50']
        assert mean >= 0 and error >= 0
    assert benchmark(*options, '--method', 'random').returncode == 0
    assert json.loads(output.read_text())['regret']['random'] == report['regret']['random']


def test_benchmark_finds_the_best_when_it_has_asked_for_everything(tmp_path):
    table, output = write_table(tmp_path / 'table.csv', rows=60), tmp_path / 'regret.json'
    done = benchmark('--table', table, '--seeds', 1, '--queries', 100, '--method', 'random,evolution', '--json', output)
    assert done.returncode == 0, done.stderr
    for points in json.loads(output.read_text())['regret'].values():
        assert points['100'] == [0, 0]


def write_token_table(path, without=()):
    """A table of 3·1·4·5 = 60 sequences but some; the sum of the choices is the accuracy, further columns are nonsense."""
    rows = [choices for choices in itertools.product(range(3), range(1), range(4), range(5)) if choices not in without]
    lines = [f'{" ".join(map(str, choices))},{sum(choices)},x,{number}' for number, choices in enumerate(rows)]
    path.write_text('\n'.join(['tokens,accuracy,network,number', *lines]) + '\n')
    return path


def test_tokens_of_a_table_have_their_own_words_at_each_position(tmp_path):
    table = read_table(write_token_table(tmp_path / 'table.csv', [(0, 0, 0, 0)]))
    assert table.allowed_tokens == [(1, 3), (4, 4), (5, 8), (9, 13)]
    assert len(table.accuracies) == 59 and table.accuracies[3, 4, 8, 13] == 9 and table.accuracies[1, 4, 5, 10] == 1
    assert table.share == 59 / 60


@pytest.mark.parametrize('method', ['random', 'evolution', 'local_search', 'gp'])
def test_methods_begin_alike_and_ask_each_architecture_once(tmp_path, method):
    lacking = [(2, 0, 3, choice) for choice in range(5)] + [(1, 0, 1, 1), (0, 0, 2, 4)]
    table = read_table(write_token_table(tmp_path / 'table.csv', lacking))
    asked = [run(METHODS[name], table, 100, 20, 7, seed=1) for name in (method, 'random')]
    assert asked[0][:20] == asked[1][:20]
    assert sorted(asked[0]) == sorted(table.accuracies)
    assert regrets(table, asked[0], 100)[-1] == 0


def test_the_controllers_methods_are_the_presets_and_search_tables_that_lack_architectures(tmp_path):
    for name, preset in PRESETS.items():
        assert METHODS[f'nao_{name}'].keywords == {'settings': preset}
    lacking = [(0, 0, *choices) for choices in itertools.product(range(4), range(5))]
    table = read_table(write_token_table(tmp_path / 'table.csv', lacking))
    settings = PRESETS['best']._replace(epochs=5, later_updates=2, predictor_updates=5, members=2)
    asked = run(functools.partial(METHODS['nao_best'].func, settings=settings), table, 100, 20, 10, seed=1)
    assert asked[:20] == run(METHODS['random'], table, 100, 20, 10, seed=1)[:20]
    assert sorted(asked) == sorted(table.accuracies)


@pytest.mark.parametrize('method', ['evolution', 'local_search', 'gp'])
def test_methods_are_better_than_random_search(tmp_path, method):
    lines = [f'{" ".join(map(str, choices))},{-sum((choice - 2) ** 2 for choice in choices)}'
             for choices in itertools.product(range(6), repeat=4)]
    (tmp_path / 'table.csv').write_text('\n'.join(['tokens,accuracy', *lines]))
    table = read_table(tmp_path / 'table.csv')
    found, drawn = (torch.stack([regrets(table, run(METHODS[name], table, 90, 40, 10, seed), 90)
                                 for seed in range(5)])[:, -1].mean() for name in (method, 'random'))
    assert found < drawn / 2


def test_benchmark_reports_and_draws_every_table(tmp_path):
    tables = [write_token_table(tmp_path / f'{name}.csv') for name in 'abc']
    options = [option for table in tables for option in ('--table', table)]
    done = benchmark(*options, '--method', 'random,local_search', '--seeds', 2, '--queries', 50,
                     '--json', tmp_path / 'all.json', '--plot', tmp_path / 'all.png')
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / 'all.json').read_text())
    assert set(report) == {'tables'} and list(report['tables']) == ['a', 'b', 'c']
    assert report['tables']['a']['regret'] == report['tables']['c']['regret']
    assert (tmp_path / 'all.png').read_bytes().startswith(b'\x89PNG')
    again = benchmark(*options, '--table', tables[0], '--method', 'random')
    assert again.returncode == 2 and 'named a' in again.stderr


@pytest.mark.parametrize(('text', 'problem'), [
    (None, 'cannot be read'),
    ('arch,acc\n', 'line 1'),
    ('architecture,accuracy\n|none~0|+|none~0|none~1|+|none~0|none~1|skip~2|,10\n', "line 2: 'skip'"),
    ('architecture,accuracy\n\n|none~0|+|none~0|none~1|+|none~0|none~1|none~2|,nan\n', "line 3: the accuracy 'nan'"),
    ('tokens,accuracy,network\n0 1,5,0\n0 -1,5,1\n', "line 3: '0 -1'"),
    ('tokens,accuracy\n0 1,5\n0 1 2,5\n', "line 3: '0 1 2' has 3 choices"),
    ('tokens,accuracy\n0 1,5\n0 1,6\n', 'line 3: 0 1 stands in the table twice'),
    ('tokens,accuracy\n0 1\n', 'line 2'),
])
def test_benchmark_says_in_one_line_what_is_wrong_with_a_table(tmp_path, text, problem):
    table = tmp_path / 'table.csv'
    if text is not None:
        table.write_text(text)
    done = benchmark('--table', table, '--method', 'random')
    assert done.returncode == 2 and done.stdout == ''
    assert len(done.stderr.splitlines()) == 1 and str(table) in done.stderr and problem in done.stderr


def test_a_benchmark_goes_on_where_it_was_interrupted(tmp_path):
    table, kept = write_token_table(tmp_path / 'table.csv'), tmp_path / 'kept.jsonl'
    options = ('--table', table, '--method', 'random', '--queries', 50)
    first = benchmark(*options, '--seeds', 1, '--keep', kept)
    assert first.returncode == 0, first.stderr
    line = kept.read_text()
    kept.write_text(line + line[:20])  # cut off
    again, alone = benchmark(*options, '--seeds', 2, '--keep', kept), benchmark(*options, '--seeds', 2)
    assert kept.read_text().startswith(f'{line}{line[:20]}\n{{"') and len(kept.read_text().splitlines()) == 3
    assert [text.stdout.rsplit(None, 1)[0] for text in (again, alone)] == [alone.stdout.rsplit(None, 1)[0]] * 2


@pytest.mark.parametrize('text', [
    'a note\nwithout an end', 'a note', '{"what": "paper"}\n', '{"what": "paper"}', '[1]\n', '1\n2', '\n'])
def test_a_file_of_something_else_is_not_added_to(text, tmp_path):
    table, kept = write_token_table(tmp_path / 'table.csv'), tmp_path / 'notes'
    kept.write_text(text)
    done = benchmark('--table', table, '--method', 'random', '--keep', kept)
    assert done.returncode == 2 and 'notes: is not a file of these results' in done.stderr, done
    assert kept.read_text() == text


def test_what_was_measured_with_other_settings_is_measured_again(tmp_path):
    table, kept = write_token_table(tmp_path / 'table.csv'), tmp_path / 'kept.jsonl'
    options = ('--table', table, '--method', 'random', '--queries', 50, '--seeds', 1, '--keep', kept)
    assert benchmark(*options).returncode == 0
    line = json.loads(kept.read_text())
    kept.write_text(json.dumps(line | {'settings': line['settings'] + 1}) + '\n')
    assert benchmark(*options).returncode == 0
    assert json.loads(kept.read_text().splitlines()[1])['settings'] == line['settings']


@pytest.mark.parametrize('flag', ['--round=0', '--seeds=0', '--only=('])
def test_flags_that_an_ablation_cannot_use(flag, tmp_path, monkeypatch, capsys):
    table = write_token_table(tmp_path / 'table.csv')
    monkeypatch.setattr(sys, 'argv', ['ablation.py', f'--table={table}', f'--output={tmp_path / "out"}', flag])
    with pytest.raises(SystemExit) as end:
        ablation.main()
    assert end.value.code == 2 and flag in capsys.readouterr().err


@pytest.mark.parametrize('program', [benchmark_search, ablation], ids=lambda program: program.__name__)
def test_two_tables_of_one_name_end_in_one_line(program, tmp_path):
    (tmp_path / 'other').mkdir()
    tables = [f'--table={write_token_table(folder / "table.csv")}' for folder in (tmp_path, tmp_path / 'other')]
    more = [f'--output={tmp_path / "out"}'] if program is ablation else []
    done = subprocess.run([sys.executable, program.__file__, *tables, *more], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done
    assert 'two --table are named table' in done.stderr and not (tmp_path / 'out').exists()


def test_an_ablation_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, capsys):
    table, output, measured = write_token_table(tmp_path / 'table.csv'), tmp_path / 'out.jsonl', []

    def measure(settings, table, seed, queries, in_round):
        measured.append((settings, seed))
        return {'regret': {'150': 0.5, '200': 0.25 * seed}, 'seconds': 1.0}
    monkeypatch.setattr(ablation, 'measure', measure)
    monkeypatch.setattr(sys, 'argv', ['ablation.py', f'--table={table}', '--seeds=2', f'--output={output}'])
    ablation.main()
    whole = output.read_text()
    variants = ablation.variants()
    assert len(measured) == len(set(measured)) == len(whole.splitlines()) == 2 * len(variants)
    assert measured[0] == (PRESETS['best'], 0) and '| 10 | best | 0.500 / 0.125 ± 0.125 | 2 | 1 |' in capsys.readouterr().out
    output.write_text(whole[:-5])
    ablation.main()
    last = whole.splitlines(keepends=True)[-1]
    assert len(measured) == 2 * len(variants) + 1 and output.read_text() == f'{whole[:-5]}\n{last}'
    whole = output.read_text()
    monkeypatch.setattr(sys, 'argv', [*sys.argv, '--round=40', '--only=^paper$'])
    ablation.main()
    assert [line[0] for line in measured[-2:]] == [PRESETS['paper']] * 2 and output.read_text().startswith(whole)
    assert '| 40 | paper | 0.500' in capsys.readouterr().out
