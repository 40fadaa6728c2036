"""The one reader of lines of JSON, metrics.jsonl and results.*.jsonl: what is damaged is named once and counts as not there."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import disk

NEEDED = {'rank': {'arch': str, 'accuracy': (int, float)}}
GOOD = [{'kind': 'rank', 'arch': '0 1', 'accuracy': 0.5, 'more': [1]}, {'kind': 'of tomorrow'}]
DAMAGED = [b'null', b'5', b'[1]', b'{}', b'"kind"', b'\xff\xfe\x00\x01\x80', b'\x00' * 40, b'{"kind": "rank", "arch": "0 1"',
           b'{"kind": "rank", "arch": "0 1"}', b'{"kind": "rank", "arch": "0 1", "accuracy": null}', b'{"kind": 5}',
           b'{"kind": ["rank"]}', b'[' * 100_000, b'9' * 5000, b'{"kind": null}']


def lines(*records):
    return b''.join(json.dumps(record).encode() + b'\n' for record in records)


@pytest.mark.parametrize('line', DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_line_is_named_once_and_counts_as_not_there(line, tmp_path, capsys):
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(lines(GOOD[0]) + line + b'\n' + lines(GOOD[1]))
    for _ in range(2):
        assert disk.read_records(path, NEEDED) == GOOD
    warning, = capsys.readouterr().err.splitlines()
    assert warning.startswith(f'warning: {path}, line 2: ')


def test_several_damaged_lines_are_one_warning(tmp_path, capsys):
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(b'null\n' + lines(GOOD[0]) + b'\xff\n')
    assert disk.read_records(path, NEEDED) == GOOD[:1]
    assert f'{path}, lines 1, 3: ' in capsys.readouterr().err


def test_every_cut_of_the_last_line_is_read_in_silence(tmp_path, capsys):
    path, whole = tmp_path / 'results.0.jsonl', lines(*GOOD)
    first = len(lines(GOOD[0]))
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        assert disk.read_records(path, NEEDED) == GOOD[:(end >= first - 1) + (end >= len(whole) - 1)]
    assert not capsys.readouterr().err


@given(st.binary(max_size=60))
def test_no_bytes_end_in_a_traceback(tmp_path_factory, noise):
    path = tmp_path_factory.getbasetemp() / 'noise.jsonl'
    path.write_bytes(lines(GOOD[0]) + noise + b'\n' + lines(GOOD[1]))
    records = disk.read_records(path, NEEDED)
    assert records[0] == GOOD[0] and records[-1] == GOOD[1]
