"""The command line: numbers, mistakes, how a program ends; the device that a flag names."""

import argparse
import sys
from types import SimpleNamespace

import pytest
import torch

import flags
import training
import utils
from flags import UserError

CPU = torch.device('cpu')
ALONE = SimpleNamespace(device=CPU, is_first=True, rank=0, world=1, sum=lambda values: values)  # a run of one process


@pytest.mark.parametrize('kind, good, bad', [
    (flags.POSITIVE_INT, ['1', '600'], ['0', '-1', '1.5', 'x', '', 'nan', '1e3']),
    (flags.COUNT, ['0', '7'], ['-1', '0.5', 'None']),
    (flags.POSITIVE, ['1e-9', '3'], ['0', '-0.1', 'nan', 'inf', '-inf', 'x']),
    (flags.NOT_NEGATIVE, ['0', '0.5'], ['-1e-9', 'nan', 'inf']),
    (flags.KEEP, ['1', '0.1'], ['0', '1.01', '-1', 'nan']),
    (flags.FRACTION, ['0', '1', '0.5'], ['1.1', '-0.1', 'nan'])])
def test_numbers_of_flags_are_checked(kind, good, bad):
    for text in good:
        assert kind(text) == float(text)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=rf"must be a .*number (above|of at least).*, not '{text}'"):
            kind(text)


@pytest.mark.parametrize('error, status, words', [
    (UserError('--flag is wrong'), 2, 'program.py: error: --flag is wrong'),
    (flags.Stopped('no answer'), 1, 'program.py: stopped: no answer'),
    (training.NotFiniteError('the loss is nan'), 1, 'program.py: stopped: the loss is nan'),
    (KeyboardInterrupt(), 130, 'program.py: interrupted; the same command goes on')])
def test_a_program_that_fails_says_why_in_one_line(error, status, words, monkeypatch, capsys):
    import signal
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, 'argv', ['somewhere/program.py'])

    def main():
        raise error
    try:
        with pytest.raises(SystemExit) as ended:
            flags.run_program(main)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert ended.value.code == status
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(words)


@pytest.mark.parametrize('name', ['cuda:99', 'nonsense', 'meta', '', 'xla', 'hpu', 'cpu:x'])
def test_a_device_that_cannot_be_used_is_a_users_error(name):
    with pytest.raises(UserError, match=rf'--device={name} .*use cpu, cuda, cuda:N or mps') as error:
        utils.choose_device(name)
    assert len(str(error.value).splitlines()) == 1
