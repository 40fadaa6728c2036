"""table.py, plot.py and report.py on made-up runs: which runs arguments name, what they are called, groups of seeds, damage."""

import importlib.util
import itertools
import json
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tooling import (
    CHROMIUM,
    ONE_NODE,
    ROOT,
    SEARCH,
    START,
    TRAINING,
    call,
    epoch,
    mistake,
    needs_matplotlib,
    output,
    search,
    tool,
    training,
    write_run,
)

import search_setup
from architecture import PUBLISHED

DAMAGED = [b'null', b'5', b'[1]', b'{}', b'\xff\x00\xfe', b'{"kind": "score"}', b'{"kind": "epoch", "epoch": null}']


def rows(*arguments):
    """The table's rows as lists of cells."""
    header, *lines = (re.split(r'\s{2,}', line) for line in output('tools/table.py', *arguments).splitlines())
    assert header == list(tool('tools/table.py').HEADER)
    return lines


def figure(*paths):
    """What plot.py draws of runs: its axes by their titles."""
    plot, runs = tool('tools/plot.py'), sys.modules['runs']
    drawing = plot.figure(plot.rows_of(plot.parts_of(runs.series_of(runs.find(paths, [])))))
    plot.render(drawing, 'png')
    return {axes.get_title('left'): axes for axes in drawing.axes}


# ---------------------------------------------------------------------------------------------------- which runs, and names

def test_every_way_to_name_a_run(tmp_path):
    run = training(tmp_path / 'deep' / 'down' / 'run', 60.0)
    for path in (tmp_path, tmp_path / 'deep', run, run / 'checkpoint.pt', run / 'metrics.jsonl'):
        assert [row[0] for row in rows(path)] == ['run']
    assert len(rows(tmp_path, run, run / 'checkpoint.pt')) == 1, 'a run that is named twice is one'


@needs_matplotlib
def test_all_three_take_the_same_arguments(tmp_path):
    runs = [training(tmp_path / name, 60.0, 70.0) for name in ('one', 'two')]
    output('tools/plot.py', tmp_path, '-o', tmp_path / 'a.svg')
    output('tools/plot.py', *(run / 'checkpoint.pt' for run in runs), '-o', tmp_path / 'b.svg')
    assert (tmp_path / 'a.svg').read_bytes() == (tmp_path / 'b.svg').read_bytes()
    output('tools/report.py', tmp_path)
    assert all((run / 'report.html').exists() for run in runs)
    assert '2 runs are named' in mistake('tools/report.py', *runs, '-o', tmp_path / 'a.html')
    assert not (tmp_path / 'a.html').exists()


@pytest.mark.parametrize('name', ['plot', 'report', 'table'])
def test_what_is_no_run(name, tmp_path):
    if name != 'table':
        pytest.importorskip('matplotlib', reason='matplotlib is not installed')
    (tmp_path / 'notes').touch()
    assert 'there is no such file or directory' in mistake(f'tools/{name}.py', tmp_path / 'none')
    for path in (tmp_path, tmp_path / 'notes'):
        assert f'{path}: is no output directory of a run and holds none' in mistake(f'tools/{name}.py', path)
    (tmp_path / 'metrics.jsonl').touch()
    assert 'no complete record yet' in mistake(f'tools/{name}.py', tmp_path)


def test_the_other_runs_are_shown(tmp_path):
    training(tmp_path / 'good', 60.0)
    (tmp_path / 'young').mkdir()
    (tmp_path / 'young' / 'metrics.jsonl').write_text('{"kind": "ep')
    done = subprocess.run([sys.executable, 'tools/table.py', tmp_path, tmp_path / 'none'], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 2 and len(done.stdout.splitlines()) == 2 and len(done.stderr.splitlines()) == 2


def test_names_are_the_shortest_that_tell_apart(tmp_path):
    for place in ('one/training', 'two/a/training', 'two/b/training', 'search'):
        training(tmp_path / place, 60.0)
    assert [row[0] for row in rows(tmp_path)] == ['one/training', 'search', 'a/training', 'b/training']


@given(st.lists(st.lists(st.sampled_from('abc'), min_size=1, max_size=4), min_size=1, max_size=6, unique_by=tuple))
def test_names_tell_apart_and_are_no_longer_than_that(parts):
    paths = ['/'.join(path) for path in parts]
    names = tool('tools/runs.py').short_names(paths)
    assert len(set(names)) == len(names)
    for path, name in zip(paths, names, strict=True):
        assert f'/{path}'.endswith(f'/{name}') or name.endswith(path)
        if shorter := name.partition('/')[2]:
            assert sum(f'/{other}'.endswith(f'/{shorter}') for other in paths) > 1


def test_images_of_ones_own_are_called_by_their_folder(tmp_path):
    names = [rows(training(tmp_path / f'{number}', 60.0, **args))[0][1] for number, args in enumerate((
        {'dataset': 'folder', 'data': 'photos/flowers', 'image_size': 32}, {'dataset': None, 'data': '/data/birds/'},
        {'dataset': 'digits', 'data': 'data'}))]
    assert names == ['flowers', 'birds', 'digits']


# ------------------------------------------------------------------------------------------------------------------- table

def test_a_row_shows_the_last_epoch_beside_the_best(tmp_path):
    row, = rows(training(tmp_path / 'run', 60.0, 70.0, 65.0))
    assert row == ['run', 'cifar10', *row[2:4], '30.00 %', '35.00 %', '-', '3/3', '3.00', ONE_NODE]


def test_the_test_images_of_a_run_with_held_out_ones_are_looked_at_once(tmp_path):
    records = [epoch(number, test) for number, test in enumerate((60.0, 70.0), start=1)]
    for record in records:
        record['valid'] = record.pop('test')
    row, = rows(write_run(tmp_path / 'run', records, TRAINING, arch=ONE_NODE))
    assert row[4:6] == ['30.00 % valid', '-']
    write_run(tmp_path / 'run', [*records, {'kind': 'final', 'epoch': 2, 'test': {'top1': 66.0}, 'seconds': 7300.0}], TRAINING)
    row, = rows(tmp_path)
    assert row[4:6] == ['34.00 %', '-'] and row[8] == '2.03'
    if importlib.util.find_spec('matplotlib'):
        output('tools/report.py', tmp_path)
        assert 'top-1 accuracy on the test images, looked at once' in (tmp_path / 'run' / 'report.html').read_text()
        assert figure(tmp_path)['accuracy'].get_legend_handles_labels()[1] == ['validation', 'training']


def test_runs_that_differ_in_their_seeds_are_one_row(tmp_path):
    for seed, accuracy in enumerate((60.0, 62.0, 64.0)):
        training(tmp_path / 'a' / f'seed{seed}', accuracy, 60.0, seed=seed)
    training(tmp_path / 'b' / 'seed0', 50.0)
    grouped, alone = rows(tmp_path)
    assert grouped[0] == 'a (3 seeds)' and grouped[4:6] == ['38.00 ± 2.00 %', '40.00 ± 0.00 %']
    assert grouped[7:9] == ['2/3', '2.00 ± 0.00']
    assert alone[0] == 'b/seed0'
    assert [row[0] for row in rows('--all', tmp_path)] == ['a/seed0', 'a/seed1', 'a/seed2', 'b/seed0']
    training(tmp_path / 'a' / 'seed2', 64.0)
    assert rows(tmp_path / 'a')[0][7] == '1-2/3'


def test_a_run_beside_its_seeds_stands_apart_from_them(tmp_path):
    training(tmp_path / 'a', 50.0)
    for seed in range(2):
        training(tmp_path / 'a' / f'seed{seed}', 60.0, seed=seed)
    for named in ([tmp_path], [tmp_path / 'a'], [tmp_path / 'a' / 'seed0', tmp_path / 'a', tmp_path / 'a' / 'seed1']):
        assert sorted(row[:1] + row[4:5] for row in rows(*named)) == [['a', '50.00 %'], ['a (2 seeds)', '40.00 ± 0.00 %']]
    assert [row[0] for row in rows('--all', tmp_path)] == ['a', 'a/seed0', 'a/seed1']
    assert [row[0] for row in rows(tmp_path / 'a' / 'checkpoint.pt')] == ['a']


def test_a_group_of_searches(tmp_path):
    for seed in range(2):
        search(tmp_path / f'seed{seed}', [0.5, 0.4], ranked=[0.8, 0.7 + 0.2 * seed])
    row, = rows(tmp_path)
    assert row[4] == '15.00 ± 7.07 % valid' and row[7] == '1/3 rounds'
    search(tmp_path / 'seed2', [0.5, 0.4])  # scored, not ranked yet: its error is another thing
    assert rows(tmp_path)[0][4] == '-'


def test_the_last_ranking_counts(tmp_path):
    run = search(tmp_path / 'run', [0.5, 0.4], ranked=[0.8, 0.9])
    records = (run / 'metrics.jsonl').read_text().splitlines()

    def best(*more):
        (run / 'metrics.jsonl').write_text('\n'.join([*records, *(json.dumps(record | {'seconds': 1}) for record in more), '']))
        return rows(run)[0][4], len(sys.modules['runs'].RunFiles(run).found)
    again = {'kind': 'rank', 'index': 0, 'accuracy': 0.7, 'arch': ONE_NODE}
    assert best() == ('10.00 % valid', 2)
    assert best(again) == ('30.00 % valid', 1)  # by more epochs, or another one
    assert best({'kind': 'score', 'epoch': 2, 'accuracies': [0.6, 0.5], 'best_arch': ONE_NODE}) == ('40.00 % valid', 1)


@pytest.mark.parametrize(('layers', 'error'), [(6, '2.48 %'), (1, '-')])
def test_the_published_error_stands_beside_the_published_network_alone(layers, error, tmp_path):
    training(tmp_path, 60.0, fixed_arc=PUBLISHED['NAONet_A'], nodes=5, layers=layers, channels=36)
    assert rows(tmp_path)[0][6] == error


def test_before_the_first_checkpoint_the_record_of_the_start_serves(tmp_path):
    write_run(tmp_path / 'run', [START | {'args': TRAINING}, epoch(1, 60.0), START | {'args': TRAINING | {'epochs': 9}},
                                 epoch(2, 50.0)])
    row, = rows(tmp_path)
    assert row[7] == '2/9' and row[8] == '3.00', 'seconds count anew from a start: 1 h, and 2 h after it'


# ------------------------------------------------------------------------------------------------------------------ damage

@pytest.mark.parametrize('make', [training, search])
def test_damaged_lines_count_as_not_there(make, tmp_path):
    values = ([0.5, 0.4], [0.6, 0.4]) if make is search else (60.0, 70.0)
    whole = make(tmp_path / 'whole', *values)
    run = make(tmp_path / 'run', *values)
    lines = (run / 'metrics.jsonl').read_bytes().splitlines(keepends=True)
    (run / 'metrics.jsonl').write_bytes(b''.join(line + b'\n' for line in DAMAGED).join([b'', *lines, b'{"kind": "epo']))
    status, out, err = call('tools/table.py', whole, run)
    assert not status and len({line.partition(' ')[2].lstrip() for line in out.splitlines()[1:]}) == 1
    assert len(err.splitlines()) == 1 and f'{run / "metrics.jsonl"}, lines 1, 2, 3, 4, ' in err
    if importlib.util.find_spec('matplotlib'):
        output('tools/report.py', run)


# ----------------------------------------------------------------------------------------------------------------- figures

@needs_matplotlib
def test_axes_stay_within_what_can_be(tmp_path):
    axes = figure(training(tmp_path / 'run', 99.0, 100.0, 100.0))['accuracy']
    assert axes.get_ylim()[1] == 100
    axes = figure(training(tmp_path / 'other', 0.0, 0.0, 1.0))['accuracy']
    assert axes.get_ylim()[0] == 0


@needs_matplotlib
def test_a_first_outlier_does_not_flatten_the_curve(tmp_path):
    axes = figure(write_run(tmp_path / 'run', [epoch(number, test, test) for number, test in
                                               enumerate((10.0, 90.0, 91.0, 92.0), start=1)]))['accuracy']
    low, _ = axes.get_ylim()
    assert 88 < low < 90 and [text.get_text() for text in axes.texts] == ['lowest: 10']


@needs_matplotlib
def test_no_run_is_out_of_sight_beside_better_ones(tmp_path):
    training(tmp_path / 'good', *[95.0] * 50)
    training(tmp_path / 'poor', 40.0, 41.0)
    low, high = figure(tmp_path)['accuracy'].get_ylim()
    assert low < 40 and high > 95


@needs_matplotlib
def test_figures_have_neither_empty_cells_nor_charts_of_one_bar(tmp_path):
    run = search(tmp_path / 'run', [0.5, 0.4], ranked=[0.8])
    record = json.loads((run / 'metrics.jsonl').read_text().splitlines()[2])
    assert record['kind'] == 'new'
    text = (run / 'metrics.jsonl').read_text().replace('{"1": 1, "2.5": 1}', '{"10": 2}')
    (run / 'metrics.jsonl').write_text(text)
    assert [*figure(run)] == ['run: the pool, round by round']
    for count in (1, 2, 4):
        runs = [search(tmp_path / f'{number}', [0.5, 0.4], [0.6, 0.5], ranked=[0.8, 0.7]) for number in range(count)]
        found = figure(*runs)
        rights = [axes.get_subplotspec().get_geometry()[3] % 12 for axes in found.values()]
        rows = {axes.get_subplotspec().rowspan.start for axes in found.values()}
        assert len(found) == 3 + count and rights.count(11) == len(rows), 'a row is not full'


@needs_matplotlib
def test_searches_stand_side_by_side_on_one_scale(tmp_path):
    search(tmp_path / 'one', [0.5, 0.4], [0.6, 0.5])
    search(tmp_path / 'two', [0.9, 0.8], [0.9, 0.85])
    found = figure(tmp_path)
    one, two = (found[f'{name}: the pool, round by round'] for name in ('one', 'two'))
    assert one.get_ylim() == two.get_ylim() and one.get_ylim()[0] < 40 and one.get_ylim()[1] > 90


@needs_matplotlib
def test_legends_cover_nothing(tmp_path):
    training(tmp_path / 'one', 50.0, 60.0, 70.0)
    training(tmp_path / 'two', 50.0, 60.0, 70.0)
    search(tmp_path / 'search', [0.5, 0.4], [0.6, 0.5])
    found = figure(tmp_path)
    drawing = next(iter(found.values())).figure
    boxes = [axes.get_window_extent() for axes in found.values()]
    legends = [axes.get_legend() for axes in found.values() if axes.get_legend()] + drawing.legends
    assert len(legends) > 3
    for legend, box in itertools.product(legends, boxes):
        assert not legend.get_window_extent().padded(-2).overlaps(box)


@needs_matplotlib
@pytest.mark.parametrize('name', ['$x$', '_hidden', 'a$b', r'\$'])
def test_names_are_shown_as_they_are(name, tmp_path):
    from matplotlib.text import Text
    for other in (name, 'other'):
        training(tmp_path / other, 60.0)
    drawing = figure(tmp_path)['accuracy'].figure
    assert name in [Text()._preprocess_math(text.get_text())[0].strip() for text in drawing.legends[0].get_texts()]
    assert not any(Text()._preprocess_math(text.get_text())[1] for text in drawing.legends[0].get_texts())


@needs_matplotlib
def test_a_group_of_seeds_is_a_curve_with_a_band(tmp_path):
    for seed in range(3):
        training(tmp_path / f'seed{seed}', 50.0 + 9 * seed, 60.0 + 9 * seed)
    axes = figure(tmp_path)['accuracy']
    assert axes.lines[0].get_ydata().tolist() == [59, 69]
    assert axes.get_legend_handles_labels()[1][-1] == '± deviation of 3 seeds'
    low, high = axes.get_ylim()
    assert low < 50 and high > 78, 'a band is cut off'


@needs_matplotlib
def test_accuracy_against_cost(tmp_path):
    run = search(tmp_path / 'run', [0.5, 0.4])
    (run / 'arch_pool.pareto.perf').write_text('0.8 2000000\n0.9 5000000\n')
    axes = figure(run)['accuracy and cost: the Pareto front']
    assert axes.lines[0].get_xdata().tolist() == [2, 5] and axes.lines[0].get_ydata().tolist() == [80, 90]
    search(run, [0.5, 0.4], [0.9, 0.7, 0.8], multiply_adds=[5_000_000, 5_000_000, 2_000_000])
    axes = figure(run)['accuracy and cost: the Pareto front']
    assert axes.collections[0].get_offsets().tolist() == [[5, 90], [5, 70], [2, 80]]
    assert 'Pareto front' in (output('tools/report.py', run) and (run / 'report.html').read_text())
    (run / 'arch_pool.pareto.perf').write_text('0.9 5000000\n')
    assert figure(run)['accuracy and cost: the Pareto front'].lines[0].get_ydata().tolist() == [90], 'a front of one'
    (run / 'arch_pool.pareto.perf').write_text('0.8\n')
    assert 'arch_pool.pareto.perf: is damaged' in mistake('tools/plot.py', run, '-o', tmp_path / 'a.png')


# ------------------------------------------------------------------------------------------------------------------ report

@needs_matplotlib
def test_the_first_screen(tmp_path):
    run = training(tmp_path / 'run', 60.0, 70.0, 65.0)
    output('tools/report.py', run)
    first, _ = (run / 'report.html').read_text().split('Figures</h2>')
    for text in ('70.00 %', '30.00 %', 'last epoch 65.00 %', '3/3', '2026-11-25 16:41:27 UTC', 'abc1234',
                 'Made-up CPU, 2 cores', 'device cpu (2 threads)', '1,234', '56,789', ONE_NODE):
        assert text in first
    assert first.count('class="cells"') + first.count('<pre>') == 1


@needs_matplotlib
def test_changed_flags_are_marked(tmp_path):
    run = write_run(tmp_path / 'run', [START | {'args': TRAINING, 'changed': ['seed', 'cutout_size']}, epoch(1, 60.0)])
    output('tools/report.py', run)
    page = (run / 'report.html').read_text().replace('<wbr>', '')
    assert re.findall(r'<div class=changed><code>--(\w+)', page) == ['cutout_size', 'seed']
    assert page.rindex('<div class=changed>') < page.index('<div><code>--')
    assert set(re.findall(r'<div><code>--(\w+)', page)) == TRAINING.keys() - {'cutout_size', 'seed'}


@needs_matplotlib
@pytest.mark.parametrize(('args', 'words'), [
    ({'method': 'NAO-WS'}, 'search by NAO-WS (a weight-sharing network scores)'),
    ({'method': 'NAO-V2'}, 'search by NAO-V2 (a weight-sharing network scores, in iterations)'),
    ({'method': 'NAO', 'proposer': 'evolution'}, 'new architectures by regularised evolution')])
def test_methods_by_their_names(args, words, tmp_path):
    run = search(tmp_path / 'run', [0.5, 0.4], **args)
    output('tools/report.py', run)
    assert words in (run / 'report.html').read_text()


def test_every_method_has_its_words():
    assert tool('tools/runs.py').METHODS.keys() == search_setup.METHOD_DEFAULTS.keys()


def test_a_search_by_nao_v2_counts_the_epochs_of_all_its_iterations(tmp_path):
    records = [{'kind': 'epoch', 'epoch': number, 'lr': 0.1, 'train': {'loss': 1.0, 'top1': 50.0}, 'seconds': 1.0}
               for number in (1, 2, 3)]
    write_run(tmp_path / 'run', records, SEARCH | {'method': 'NAO-V2'}, model={'classifier.weight': torch.zeros(10, 1)})
    row, = rows(tmp_path)
    assert row[7] == '3/8'


@needs_matplotlib
@pytest.mark.skipif(not CHROMIUM, reason='there is no Chromium')
@pytest.mark.parametrize('width', [1400, 500])
def test_nothing_is_wider_than_the_page(width, tmp_path):
    name = '--data=' + 'long_' * 60
    run = training(tmp_path / 'run', 60.0, 70.0, data=name, fixed_arc=tool('tools/table.py').PUBLISHED['NAONet_A'])
    output('tools/report.py', run)
    page = (run / 'report.html').read_text().replace('</body>', '<script>document.title = document.documentElement.scrollWidth'
                                                     ' <= innerWidth ? "it fits" : "too wide"</script></body>')
    (run / 'report.html').write_text(page)
    done = subprocess.run([CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', f'--window-size={width},1000', '--dump-dom',
                           f'--user-data-dir={tmp_path / "profile"}', f'file://{run / "report.html"}'],
                          capture_output=True, text=True, timeout=120)
    assert '<title>it fits</title>' in done.stdout
