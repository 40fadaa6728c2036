"""Drawings and descriptions of architectures."""

import os
import re
import signal
import subprocess
import sys
from unittest import mock

import pytest
from tooling import ROOT, mistake, needs_graphviz, output, tool, without
from torch import nn

import architecture
import operations

THREE_NODES = '0 1 1 2 2 3 1 4 0 0 3 1 0 1 1 2 2 3 1 4 0 0 3 1'


def test_dot_needs_no_graphviz():
    with without('graphviz'):
        text = output('tools/draw.py', 'NAONet_A', '--dot')
    assert text.startswith('digraph') and text.count('{') == text.count('}')
    arch = architecture.parse(architecture.PUBLISHED['NAONet_A'])
    boxes = re.findall(r'^ +((?:normal|reduction)\d[xy]) \[label="([^"]+)"', text, re.MULTILINE)
    assert len(boxes) == 20 and dict(boxes)['normal2x'] == 'conv 3×3' and dict(boxes)['reduction2x'] == 'conv 3×3 /2'
    for name, cell in arch._asdict().items():  # each operation's box stands between its input and its node
        for node, (x_id, _, y_id, _) in enumerate(architecture.nodes_of(cell), start=2):
            for side, state in (('x', x_id), ('y', y_id)):
                assert f'{name}{state} -> {name}{node}{side} ' in text and f'{name}{node}{side} -> {name}{node} ' in text
    unread = re.findall(r'(normal|reduction)(\d+) -> \w+_out', text)
    assert unread == [(name, str(state)) for name, cell in arch._asdict().items() for state in architecture.unread_states(cell)]


def test_an_unread_input_of_a_reduction_cell_is_halved_on_its_way():
    text = output('tools/draw.py', '0 1 0 2 0 3 0 4', '--dot')
    assert '    normal1 -> normal_out' in text
    assert 'reduction1_out [label="identity /2"' in text and 'reduction1_out -> reduction_out' in text


@needs_graphviz
def test_cells_are_aligned():
    """Both cells' inputs, outputs are at one height each."""
    import graphviz
    arch = architecture.parse(architecture.PUBLISHED['NAONet_B'])
    plain = graphviz.Source(tool('tools/draw.py').dot_source(**arch._asdict())).pipe('plain').decode()
    heights = {words[1]: words[3] for line in plain.splitlines() if (words := line.split())[0] == 'node'}
    assert len({heights[f'{name}{state}'] for name in arch._fields for state in (0, 1)}) == 1
    assert heights['normal_out'] == heights['reduction_out']


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


def test_the_line_says_how_many_nodes_there_are(tmp_path):
    (tmp_path / 'arch_pool').write_text(f'{THREE_NODES}\n')
    text = output('tools/draw.py', tmp_path / 'arch_pool', '--describe', '--layers=1', '--channels=4')
    assert text.count('node 2 = ') == 2 and 'node 3 = ' not in text


@pytest.mark.parametrize(('make', 'reason'), [
    (lambda channels, stride: nn.Conv2d(channels, 2 * channels, 3, stride, 1), 'makes (2, 4, 16, 16)'),
    (lambda channels, stride: nn.Conv2d(channels, channels, 3, 1, 1), 'at stride 2, but should make (2, 2, 8, 8)'),
    (lambda channels, stride: nn.Linear(7, 7), 'fails (')], ids=['channels', 'stride', 'raises'])
def test_an_operation_that_does_not_fit_is_named(make, reason):
    mine = operations.Operation('an operation of mine', make, 3)
    with mock.patch.object(operations, 'OPERATIONS', (*operations.OPERATIONS, mine)) as table:
        for module in ('tools/draw.py', 'tools/runs.py'):
            tool(module)
        with (mock.patch.object(sys.modules['runs'], 'OPERATIONS', table),
              mock.patch.object(sys.modules['draw'], 'OPERATIONS', table),
              mock.patch.object(architecture.parse, '__defaults__', (None, range(len(table)))),
              mock.patch.object(architecture.read_pool, '__defaults__', (None, range(len(table)))),
              mock.patch('model.OPERATIONS', table)):
            line = mistake('tools/draw.py', '0 16 1 16 0 16 1 16', '--describe', '--layers=1', '--channels=2')
    assert 'operation 16 (an operation of mine) ' in line and reason in line


def test_a_reader_that_goes_away_ends_it_silently():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, 'tools/draw.py', 'NAONet_A', '--dot']
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert not done.stderr and done.returncode == -signal.SIGPIPE


def test_draw_mistakes(tmp_path):
    assert 'integers' in mistake('tools/draw.py', '1 2 3', '--dot')
    assert 'cannot be read' in mistake('tools/draw.py', tmp_path / 'none', '--dot')
    assert '.svg' in mistake('tools/draw.py', 'NAONet_A', '-o', 'a.gif')
    assert 'nothing to do' in mistake('tools/draw.py', 'NAONet_A')
