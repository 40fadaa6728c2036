"""The tools on real runs: a small training and a small search, made once; and how programs show help and progress."""

import contextlib
import importlib.util
import json
import os
import pty
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import run
from PIL import Image
from tooling import CHROMIUM, ROOT, call, mistake, needs_matplotlib, output, tool, without

import architecture
import checkpoint
import datasets
import hubconf

FIXED = ['--dataset=digits', '--device=cpu', '--fixed_arc=NAONet_B', '--layers=1', '--channels=4', '--batch_size=100',
         '--lr_max=0.1', '--train_images=300']
SEARCH = ['--dataset=digits', '--device=cpu', '--child_layers=1', '--child_nodes=2', '--child_channels=4',
          '--child_batch_size=90', '--train_images=300', '--child_epochs=2', '--child_eval_epochs=1',
          '--child_eval_batch_size=20', '--controller_seed_arch=6', '--controller_new_arch=3', '--controller_epochs=100',
          '--child_rank_count=1', '--child_rank_epochs=1']


def train_on_a_terminal(directory):
    """Train in a process whose output is a terminal and return what that shows."""
    code = ('import progress, runpy, sys; progress.LIVE_EVERY = 0; sys.argv = sys.argv[1:]; '
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
    done = run('train_search.py', *SEARCH, f'--output_dir={directory / "search"}')
    assert done.status == 0, done
    assert '\r' not in done.out + done.err, 'a live line in a pipe'
    return directory


# ----------------------------------------------------------------------------------------------------- figures and pages

@needs_matplotlib
def test_plots(runs, tmp_path):
    for suffix, magic in (('png', b'\x89PNG'), ('svg', b'<?xml'), ('pdf', b'%PDF')):
        output('tools/plot.py', runs / 'training', runs / 'search', '-o', tmp_path / f'a.{suffix}')
        assert (tmp_path / f'a.{suffix}').read_bytes().startswith(magic)


def test_of_a_few_values_none_is_left_out():
    plot = tool('tools/plot.py')
    assert plot.frame([69.4, 60.0, 52.1], 1) == (52.1, 69.4)
    assert plot.frame([0.0] + [60.0 + index for index in range(19)], 20 // 10) == (61, 78)


@needs_matplotlib
def test_plot_while_a_run_goes_on(runs, tmp_path):
    records = (runs / 'search' / 'metrics.jsonl').read_text().splitlines(keepends=True)
    for count in range(1, len(records)):
        (tmp_path / 'metrics.jsonl').write_text(''.join(records[:count]) + records[count][:20])
        if count in (2, 4):  # behind the record of the start
            output('tools/plot.py', tmp_path, '-o', tmp_path / 'a.png')
    (tmp_path / 'metrics.jsonl').write_text(records[0][:20])
    assert 'no complete record yet' in mistake('tools/plot.py', tmp_path, '-o', tmp_path / 'a.png')


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
    for text in ('--dataset', 'digits', 'device cpu', 'training speed', 'epochs done', 'concatenation'):
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


def test_table(runs):
    header, training, search = output('tools/table.py', runs / 'training', runs / 'search').splitlines()
    assert re.split(r'\s{2,}', header)[:3] == ['run', 'data', 'parameters']
    cells = re.split(r'\s{2,}', training)
    assert cells[0] == 'training' and cells[7] == '1/1' and cells[-1] == 'NAONet_B'
    best = json.loads((runs / 'training' / 'metrics.jsonl').read_text().splitlines()[-1])['best_acc_top1']
    assert cells[4] == f'{100 - best:.2f} %'
    assert search.endswith((runs / 'search' / 'arch_pool.final').read_text().splitlines()[0])


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


@pytest.mark.parametrize('classes', [['ant', 'bee', 'cow'], ['alone']])
def test_predict_on_large_images(classes, tmp_path):
    network = hubconf.naonet_a_imagenet(layers=1, channels=4, classes=len(classes))
    state = {'args': {'layers': 1, 'channels': 4}, 'arch': architecture.PUBLISHED['NAONet_A'], 'model': network.state_dict(),
             'classes': classes}
    torch.save(state, tmp_path / 'checkpoint.pt')
    Image.new('RGB', (300, 260), 'red').save(tmp_path / 'red.jpg')
    path = tmp_path / 'red.jpg'
    status, out, err = call('tools/predict.py', '--checkpoint', tmp_path / 'checkpoint.pt', tmp_path / 'no.jpg', path)
    assert status == 2 and 'no.jpg: cannot be read' in err, 'the others are predicted all the same'
    lines = out.splitlines()
    assert sorted(line.split()[-1] for line in lines[1:]) == classes


def test_predict_by_a_network_of_a_folder_of_small_images(tmp_path):
    """A red image is predicted as in testing: resized to the training's squares, normalised by what was measured there."""
    for name, colour in (('red', (255, 0, 0)), ('blue', (0, 0, 255))):
        for part in ('train', 'valid'):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new('RGB', (20, 30), colour).save(tmp_path / part / name / 'image.png')
    images = datasets.load('folder', tmp_path, True, torch.device('cpu'), datasets.Folder(size=24))
    network = hubconf.naonet('0 1 1 2 0 3 1 4', layers=1, channels=4, classes=2)
    state = {'args': {'layers': 1, 'channels': 4, 'dataset': 'folder'}, 'arch': '0 1 1 2 0 3 1 4',
             'model': network.state_dict(), 'classes': images.classes, 'images': images.info}
    path, red = tmp_path / 'checkpoint.pt', tmp_path / 'train/red/image.png'
    torch.save(state, path)
    batch, labels = next(iter(datasets.EvalBatches(images, 2)))
    with torch.inference_mode():
        expected = network.eval()(batch)[0].softmax(1)[labels.tolist().index(images.classes.index('red'))].max().item()
    assert float(output('tools/predict.py', '--checkpoint', path, red).split()[1]) == pytest.approx(100 * expected, abs=0.006)
    torch.save({name: value for name, value in state.items() if name != 'images'}, path)
    assert 'has no "images"' in mistake('tools/predict.py', '--checkpoint', path, red)


def test_predict_mistakes(runs, tmp_path):
    for name, text in (('training', 'cannot be read'), ('search', 'of a search')):
        assert text in mistake('tools/predict.py', '--checkpoint', runs / name / 'checkpoint.pt', tmp_path / 'no.png')


# ------------------------------------------------------------------------------------------------------ help and progress

PROGRAMS = ['train_cifar.py', 'train_imagenet.py', 'train_search.py', 'train_controller.py', *(f'tools/{name}.py' for name in (
    'compare', 'draw', 'plot', 'predict', 'report', 'table'))]


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


# ------------------------------------------------------------------------------------------------------------ CUDA graphs

def test_graphed_steps_want_a_program_and_a_gpu(monkeypatch):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    assert 'train.py is not train_search.py or train_cifar.py' in mistake('tools/graphed.py', 'train.py')
    assert 'no CUDA GPU is here' in mistake('tools/graphed.py', 'train_search.py', '--method=NAO')
