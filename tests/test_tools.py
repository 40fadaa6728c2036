"""The tools on real runs: a small training and a small search, made once; and how programs show help and progress."""

import contextlib
import importlib
import importlib.util
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import architecture
import checkpoint
import datasets
import hubconf
from flags import run_program

ROOT = Path(__file__).resolve().parent.parent
FIXED = ['--dataset=digits', '--device=cpu', '--fixed_arc=NAONet_B', '--layers=1', '--channels=4', '--batch_size=479',
         '--lr_max=0.1']
SEARCH = ['--dataset=digits', '--device=cpu', '--child_layers=1', '--child_nodes=2', '--child_channels=4',
          '--child_batch_size=431', '--child_epochs=2', '--child_eval_epochs=1', '--child_eval_batch_size=20',
          '--controller_seed_arch=6', '--controller_new_arch=3', '--controller_epochs=100',
          '--child_rank_count=1', '--child_rank_epochs=1']
has_graphviz = importlib.util.find_spec('graphviz') and shutil.which('dot')
needs_graphviz = pytest.mark.skipif(not has_graphviz, reason='Graphviz (package and dot) is not installed')
needs_matplotlib = pytest.mark.skipif(not importlib.util.find_spec('matplotlib'), reason='matplotlib is not installed')
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')


def call(program, *flags):
    """Run a program's main here, which saves a second start of PyTorch: status, output, errors."""
    path = ROOT / program
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.object(sys, 'path', [str(path.parent), *sys.path]):
        module = importlib.import_module(path.stem)
    with (mock.patch.object(sys, 'argv', [program, *map(str, flags)]), contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(err)):
        try:
            run_program(module.main)
            status = 0
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


def output(program, *flags):
    status, out, err = call(program, *flags)
    assert not status, err
    return out


def mistake(program, *flags):
    """The one line of a user's mistake."""
    status, _, err = call(program, *flags)
    assert status == 2, err
    line, = [line for line in err.splitlines() if not line.startswith('warning')]
    return line


def without(package):
    """A context in which a package cannot be imported."""
    hidden = {name: None for name in sys.modules if name.startswith(f'{package}.')} | {package: None}
    return mock.patch.dict(sys.modules, hidden)


def train_on_a_terminal(directory):
    """Train in a process whose output is a terminal and return what that shows."""
    code = ('import utils, runpy, sys; utils.LIVE_EVERY = 0.01; sys.argv = sys.argv[1:]; '
            'runpy.run_path(sys.argv[0], run_name="__main__")')
    master, terminal = pty.openpty()
    command = [sys.executable, '-c', code, 'train_cifar.py', *FIXED, '--epochs=1', f'--output_dir={directory}']
    process = subprocess.Popen(command, cwd=ROOT, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = b''
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(master, 4096):
            shown += part
    os.close(master)
    assert process.wait(timeout=60) == 0, shown
    return shown.decode()


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """The directory of a finished training (with what it showed, `terminal`) and of a finished search."""
    directory = tmp_path_factory.mktemp('exp')
    (directory / 'terminal').write_bytes(train_on_a_terminal(directory / 'training').encode())
    done = subprocess.run([sys.executable, 'train_search.py', *SEARCH, f'--output_dir={directory / "search"}'], cwd=ROOT,
                          capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert '\r' not in done.stdout + done.stderr, 'a live line in a pipe'
    return directory


# ------------------------------------------------------------------------------------------------------------- drawings

def test_dot_needs_no_graphviz():
    with without('graphviz'):
        text = output('tools/draw.py', 'NAONet_A', '--dot')
    assert text.startswith('digraph') and text.count('{') == text.count('}')
    operations = [line for line in text.splitlines() if '->' in line and 'fontcolor' in line]
    assert len(operations) == 20
    assert 'normal0 -> normal2 [label="conv 3×3"' in text and 'reduction0 -> reduction2 [label="conv 3×3 /2"' in text
    unread = re.findall(r'(normal|reduction)(\d+) -> \w+_out', text)
    arch = architecture.parse(architecture.PUBLISHED['NAONet_A'])
    assert unread == [(name, str(state)) for name, cell in zip(('normal', 'reduction'), arch, strict=True)
                      for state in architecture.unread_states(cell)]


def test_drawing_names_what_is_absent(tmp_path, monkeypatch):
    with without('graphviz'):
        assert 'pip install graphviz' in mistake('tools/draw.py', 'NAONet_A', '-o', tmp_path / 'a.svg')
    pytest.importorskip('graphviz', reason='the package graphviz is not installed')
    monkeypatch.setenv('PATH', str(tmp_path))
    assert 'apt install graphviz' in mistake('tools/draw.py', 'NAONet_A', '-o', tmp_path / 'a.svg')


@needs_graphviz
@pytest.mark.parametrize(('suffix', 'magic'), [('svg', b'<?xml'), ('png', b'\x89PNG'), ('pdf', b'%PDF')])
def test_drawings(tmp_path, suffix, magic):
    pool = tmp_path / 'arch_pool'
    pool.write_text('\n'.join(architecture.PUBLISHED.values()) + '\n')
    output('tools/draw.py', pool, '--arc_index=1', '-o', tmp_path / f'a.{suffix}')
    assert (tmp_path / f'a.{suffix}').read_bytes().startswith(magic)
    if suffix == 'svg':
        assert 'sep conv 5×5' in (tmp_path / 'a.svg').read_text()


def test_describe():
    text = output('tools/draw.py', 'NAONet_A', '--describe')
    assert 'node 1 = conv 1x3, 3x1 of state 2 (node 0) + conv 3x3 of state 1 (previous cell)' in text
    assert 'layers 6, channels 36): 11,470,150 parameters, 1,67' in text
    assert 'layers 4, channels 42): 11,353,831 parameters' in text


def test_draw_mistakes(tmp_path):
    assert 'integers' in mistake('tools/draw.py', '1 2 3', '--dot')
    assert 'cannot be read' in mistake('tools/draw.py', tmp_path / 'none', '--dot')
    assert '.svg' in mistake('tools/draw.py', 'NAONet_A', '-o', 'a.gif')
    assert 'nothing to do' in mistake('tools/draw.py', 'NAONet_A')


# ----------------------------------------------------------------------------------------------------- figures and pages

@needs_matplotlib
def test_plots(runs, tmp_path):
    output('tools/plot.py', runs / 'training', '-o', tmp_path / 'a.png')
    output('tools/plot.py', runs / 'training', runs / 'search', '-o', tmp_path / 'b.svg')
    assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')
    assert b'<svg' in (tmp_path / 'b.svg').read_bytes()


@needs_matplotlib
def test_plot_while_a_run_goes_on(runs, tmp_path):
    records = (runs / 'search' / 'metrics.jsonl').read_text().splitlines(keepends=True)
    for count in range(1, len(records)):
        (tmp_path / 'metrics.jsonl').write_text(''.join(records[:count]) + records[count][:20])
        if count in (1, 3):
            output('tools/plot.py', tmp_path, '-o', tmp_path / 'a.png')
    (tmp_path / 'metrics.jsonl').write_text(records[0][:20])
    assert 'no complete record yet' in mistake('tools/plot.py', tmp_path, '-o', tmp_path / 'a.png')
    (tmp_path / 'metrics.jsonl').write_text(records[0][:20] + '\n' + records[0])
    assert 'line 1: is not a record' in mistake('tools/plot.py', tmp_path, '-o', tmp_path / 'a.png')


@pytest.mark.parametrize('tool', ['plot', 'report', 'table'])
def test_missing_runs(tool, tmp_path):
    if tool != 'table':
        pytest.importorskip('matplotlib', reason='matplotlib is not installed')
    assert 'there is no such directory' in mistake(f'tools/{tool}.py', tmp_path / 'none')
    assert 'metrics.jsonl: cannot be read' in mistake(f'tools/{tool}.py', tmp_path)


@pytest.mark.parametrize('tool', ['plot', 'report'])
def test_matplotlib_is_named_when_absent(tool, runs, tmp_path):
    with without('matplotlib'):
        line = mistake(f'tools/{tool}.py', runs / 'training', '-o', tmp_path / 'a.png')
    assert 'pip install matplotlib' in line


@needs_matplotlib
@pytest.mark.parametrize('name', ['training', 'search'])
def test_report(name, runs, tmp_path):
    output('tools/report.py', runs / name, '-o', tmp_path / 'a.html')
    page = (tmp_path / 'a.html').read_text()
    assert not re.search(r'(src|href)="(?!#)|@import|url\((?!#)', page), 'an external resource'
    for text in ('--dataset', 'digits', 'device cpu', 'training speed', 'epochs done', 'concat' if has_graphviz else 'node 0'):
        assert text in page
    if CHROMIUM:
        shot = tmp_path / 'a.png'
        subprocess.run([CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--window-size=1200,2000',
                        f'--user-data-dir={tmp_path / "profile"}', f'--screenshot={shot}', f'file://{tmp_path / "a.html"}'],
                       capture_output=True, timeout=120, check=True)
        pixels = np.asarray(Image.open(shot).convert('L'))
        assert pixels.shape[0] >= 1900 and 0.01 < (pixels < 128).mean() < 0.5, 'the page looks empty'


@needs_matplotlib
def test_report_without_graphviz_describes_the_cells(runs, tmp_path):
    with without('graphviz'):
        output('tools/report.py', runs / 'training', '-o', tmp_path / 'a.html')
    assert 'node 0 = separable conv 5x5' in (tmp_path / 'a.html').read_text()


def test_table(runs, tmp_path):
    header, training, search = output('tools/table.py', runs / 'training', runs / 'search').splitlines()
    assert re.split(r'\s{2,}', header)[:3] == ['run', 'data', 'parameters']
    cells = re.split(r'\s{2,}', training)
    assert cells[0] == 'training' and cells[6] == '1/1' and cells[-1] == 'NAONet_B'
    best = json.loads((runs / 'training' / 'metrics.jsonl').read_text().splitlines()[-1])['best_acc_top1']
    assert cells[4] == f'{100 - best:.2f} %'
    assert search.endswith((runs / 'search' / 'arch_pool.final').read_text().splitlines()[0])
    command = [sys.executable, 'tools/table.py', runs / 'training', tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stdout.splitlines()) == 2 and len(done.stderr.splitlines()) == 1


def test_table_tells_runs_of_the_same_name_apart(runs, tmp_path):
    for place in ('one', 'two'):
        shutil.copytree(runs / 'training', tmp_path / place / 'training')
    _, *rows = output('tools/table.py', tmp_path / 'one', tmp_path / 'two' / 'training', runs / 'search').splitlines()
    assert [row.split()[0] for row in rows] == [str(tmp_path / 'one/training'), str(tmp_path / 'two/training'), 'search']


def test_table_looks_into_a_directory_of_runs(runs):
    assert output('tools/table.py', runs) == output('tools/table.py', *sorted(
        path.parent for path in runs.glob('*/metrics.jsonl')))


def test_a_search_the_complete_way(runs, tmp_path):
    """It has no epochs but rounds, and no network in its checkpoint."""
    metrics = [json.loads(line) for line in (runs / 'search' / 'metrics.jsonl').read_text().splitlines()]
    metrics = [record for record in metrics if record['kind'] != 'epoch']
    (tmp_path / 'metrics.jsonl').write_text(''.join(f'{json.dumps(record)}\n' for record in metrics))
    state = checkpoint.load(runs / 'search' / 'checkpoint.pt')
    state['args'] |= {'method': 'NAO', 'rounds': 2}
    torch.save(state | {'model': {}}, tmp_path / 'checkpoint.pt')
    assert ' 2/2 rounds ' in output('tools/table.py', tmp_path)
    if importlib.util.find_spec('matplotlib'):
        output('tools/report.py', tmp_path)
        assert 'rounds done' in (tmp_path / 'report.html').read_text()


# --------------------------------------------------------------------------------------------------------- using networks

def test_predictions_are_those_of_testing(runs, tmp_path):
    test = datasets.EvalBatches(datasets.load('digits', 'data', False, torch.device('cpu')), 4)
    network = hubconf.naonet(checkpoint=runs / 'training' / 'checkpoint.pt').eval()
    images, _ = next(iter(test))
    expected = network(images)[0].argmax(1).tolist()
    paths = [tmp_path / f'{index}.png' for index in range(4)]
    for path, image in zip(paths, datasets.unpack(test.data.pixels[:, 4:-4, 4:-4]), strict=False):
        Image.fromarray(image.permute(1, 2, 0).to(torch.uint8).numpy()).save(path)
    lines = output('tools/predict.py', '--checkpoint', runs / 'training' / 'checkpoint.pt', *paths).splitlines()
    assert [int(lines[6 * index + 1].split()[-1]) for index in range(4)] == expected


def test_predict_on_large_images(tmp_path):
    network = hubconf.naonet_a_imagenet(layers=1, channels=4, classes=3)
    state = {'args': {'layers': 1, 'channels': 4}, 'arch': architecture.PUBLISHED['NAONet_A'], 'model': network.state_dict(),
             'classes': ['ant', 'bee', 'cow']}
    torch.save(state, tmp_path / 'checkpoint.pt')
    Image.new('RGB', (300, 260), 'red').save(tmp_path / 'red.jpg')
    lines = output('tools/predict.py', '--checkpoint', tmp_path / 'checkpoint.pt', tmp_path / 'red.jpg').splitlines()
    assert sorted(line.split()[-1] for line in lines[1:]) == ['ant', 'bee', 'cow']


def test_predict_mistakes(runs, tmp_path):
    for name, text in (('training', 'cannot be read'), ('search', 'of a search')):
        assert text in mistake('tools/predict.py', '--checkpoint', runs / name / 'checkpoint.pt', tmp_path / 'no.png')


# ------------------------------------------------------------------------------------------------------ help and progress

PROGRAMS = ['train_cifar.py', 'train_imagenet.py', 'train_search.py', *(f'tools/{name}.py' for name in (
    'draw', 'plot', 'predict', 'report', 'table'))]


@pytest.mark.parametrize('program', PROGRAMS)
def test_help_is_a_line_for_each_flag(program):
    text = output(program, '--help')
    flags = [line for line in text.splitlines() if line.startswith('  -')]
    assert flags and all(re.search(r'\S {2,}\S', line) for line in flags), 'a flag without help'
    assert 'None' not in text and 'SUPPRESS' not in text


def test_an_unknown_flag_suggests_the_nearest():
    assert 'did you mean --channels?' in mistake('train_cifar.py', '--chanels=3')
    assert 'did you mean --controller_lr?' in mistake('train_search.py', '--controler_lr', '3')
    assert 'quotes' in mistake('train_cifar.py', '--fixed_arc=0', '1', '2')


def test_tensorboard(tmp_path, runs):
    with without('tensorboard'), without('torch.utils.tensorboard'):
        line = mistake('train_cifar.py', *FIXED, '--tensorboard', f'--output_dir={tmp_path / "a"}')
    assert 'pip install tensorboard' in line and not (tmp_path / 'a').exists()
    pytest.importorskip('tensorboard', reason='tensorboard is not installed: see requirements-tools.txt')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    shutil.copytree(runs / 'training', tmp_path / 'b')
    output('train_cifar.py', *FIXED, '--epochs=2', '--tensorboard', f'--output_dir={tmp_path / "b"}')  # goes on
    events = EventAccumulator(str(tmp_path / 'b'))
    events.Reload()
    last = json.loads((tmp_path / 'b' / 'metrics.jsonl').read_text().splitlines()[-1])
    scalar, = events.Scalars('epoch/test/top1')
    assert scalar.step == 2 and scalar.value == pytest.approx(last['test']['top1'])


def test_a_live_line_on_a_terminal(runs):
    shown = (runs / 'terminal').read_bytes().decode()
    live = [line for line in shown.split('\r') if line.startswith('epoch 1/1 step')]
    assert live and all('loss' in line and 'top-1' in line and 'images/s' in line for line in live)
    assert 'testing 1/1' in shown
