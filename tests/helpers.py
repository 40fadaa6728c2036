"""What the tests share: reference values, random architectures, running programs in processes of their own."""

import atexit
import functools
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

import utils
from architecture import Architecture

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).resolve().parent / 'data'

NAONET_A = '0 7 1 15 2 8 1 7 0 6 1 7 0 8 4 7 1 5 0 7 0 7 1 13 0 6 0 14 0 9 1 10 0 14 2 6 1 11 0 7'
NAONET_B = '0 1 0 2 0 1 2 2 1 3 0 2 4 0 1 3 2 1 0 3 1 1 1 0 2 1 2 4 1 0 2 3 3 1 2 2 0 2 0 2'
NAONET_V2 = '1 1 0 1 2 4 0 0 0 0 2 1 0 0 0 2 0 3 0 0 0 2 0 2 2 2 1 0 0 0 0 1 0 0 0 3 0 0 0 1'
TINY = '0 4 1 0 0 3 1 4'  # one node a cell
TIMEOUT = 240  # seconds that a program may take before a test fails; generous, as machines are shared


# ------------------------------------------------------------------------------------------------------ reference values

@functools.cache
def reference(name: str) -> dict:
    """The values of tests/data/NAME.json.gz, measured on the reference implementation."""
    with gzip.open(DATA / f'{name}.json.gz', 'rt') as file:
        return json.load(file)


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Set every tensor from its own name: equal names and shapes give equal weights."""
    for name, tensor in model.state_dict().items():
        if name.endswith('num_batches_tracked'):
            tensor.zero_()
            continue
        values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(tensor.shape))
        if name.endswith('running_var'):
            values = 1 + 0.1 * np.abs(values)
        elif name.endswith('running_mean'):
            values = 0.1 * values
        elif tensor.dim() >= 2:
            values = values * np.sqrt(2.0 / np.prod(tensor.shape[1:]))
        elif '.weight' in name:
            values = 1 + 0.1 * values
        else:
            values = 0.1 * values
        tensor.copy_(torch.from_numpy(values))


def inputs(shape: list[int], seed: int) -> torch.Tensor:
    """Standard normal images."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


def make_run(**flags: Any) -> utils.Run:
    """A run on the CPU that writes nothing, as the programs make one of their flags."""
    defaults = {'device': 'cpu', 'output_dir': '.', 'seed': 0, 'amp': 'off', 'tf32': None, 'layout': 'auto', 'compile': False}
    return utils.Run(SimpleNamespace(**defaults | flags))


# ----------------------------------------------------------------------------------------------------- random architectures

@st.composite
def architectures(draw: st.DrawFn, nodes: st.SearchStrategy[int] | int = st.integers(1, 6),  # noqa: B008
                  operations: range = range(16)) -> Architecture:
    """Any architecture with these operations."""
    count = nodes if isinstance(nodes, int) else draw(nodes)

    def cell() -> tuple[int, ...]:
        values = []
        for node in range(count):
            for _ in 'xy':
                values += [draw(st.integers(0, node + 1)), draw(st.sampled_from(operations))]
        return tuple(values)
    return Architecture(cell(), cell())


# ---------------------------------------------------------------------------------------------------------------- programs

class Result(NamedTuple):
    """How a program ended."""

    status: int
    out: str
    err: str


@functools.cache
def _launcher() -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, DATA.parent / 'launcher.py'], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    atexit.register(process.communicate)
    return process


def _ask(**request: Any) -> Any:
    process = _launcher()
    process.stdin.write(json.dumps(request) + '\n')
    process.stdin.flush()
    return json.loads(process.stdout.readline())


class Program:
    """A program of the project that runs in a process of its own; see launcher.py for `preamble`."""

    def __init__(self, program: str, *flags: object, cwd: Path | None = None, preamble: str = '', **env: str):
        self._folder = tempfile.TemporaryDirectory()
        self.output, self.errors = Path(self._folder.name) / 'out', Path(self._folder.name) / 'err'
        self.pid = _ask(start={
            'argv': [str(ROOT / program), *map(str, flags)], 'cwd': str(cwd or self._folder.name), 'env': env,
            'output': str(self.output), 'errors': str(self.errors), 'preamble': preamble})

    def wait(self, timeout: float = TIMEOUT) -> Result:
        """Wait for the end; a program that does not end in time is killed and fails the test."""
        status = _ask(wait=self.pid, timeout=timeout)
        if status is None:
            self.signal(signal.SIGKILL)
            _ask(wait=self.pid, timeout=timeout)
        result = Result(status, self.output.read_text(), self.errors.read_text())
        assert status is not None, f'still running after {timeout} s: {result}'
        return result

    def signal(self, number: int) -> None:
        """Send a signal to the program."""
        os.kill(self.pid, number)

    def workers(self) -> list[int]:
        """The processes that it has started, in order: under torchrun those of the ranks are the last ones."""
        return list(map(int, Path(f'/proc/{self.pid}/task/{self.pid}/children').read_text().split()))

    def wait_for(self, text: str, timeout: float = TIMEOUT) -> None:
        """Wait until the program has printed `text`, on stdout or stderr."""
        def printed() -> bool:
            return any(path.exists() and text in path.read_text() for path in (self.output, self.errors))
        try:
            wait_until(printed, timeout)
        except TimeoutError:
            self.signal(signal.SIGKILL)
            raise AssertionError(f'{text!r} was not printed: {self.wait()}') from None


def run(program: str, *flags: object, **options: Any) -> Result:
    """Run a program of the project to its end."""
    return Program(program, *flags, **options).wait()


def torchrun(count: int, program: str, *flags: object, preamble: str = '', **options: Any) -> Program:
    """Start a program under torchrun, `count` processes; `preamble` runs in each of them before it."""
    return Program('tests/elastic.py', count, preamble, program, *flags, **options)


def wait_until(condition: Callable[[], bool], timeout: float = TIMEOUT) -> None:
    """Wait until a condition holds; raises TimeoutError."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.005)


MOMENTS = {  # where programs are interrupted -> the function that does it, looked up in its module by who calls it
    'an epoch': 'training.train_epoch',
    'an evaluation': 'training.evaluate',
    'a checkpoint': 'checkpoint.save',
    'a candidate': 'candidates.train_candidate',
    'a round of fits': 'controller.fit_all',
    'a fit': 'controller.fit',
    'a batch': 'datasets.normalise',
    'a batch of files': 'image_files.normalise',
    'a write': 'torch.save',
    'a flush': 'os.fsync',
    'a rename': 'os.replace',
}


def kill_at(moment: str, call: int, after: bool = False, rank: int = 0, by: str = 'SIGKILL') -> str:
    """A preamble that kills the program (kill -9) just before or after something happens for the given time, from 1.

    moment: one of MOMENTS. Of several processes the one of `rank` dies. by: another signal, such as SIGSTOP, after which the
    process only seems dead.
    """
    module, name = MOMENTS[moment].rsplit('.', 1)
    return f"""
import importlib, os, signal
module = importlib.import_module({module!r})
real, calls, mine = getattr(module, {name!r}), [], os.environ.get('RANK', '0') == '{rank}'
def deadly(*args, **kwargs):
    calls.append(None)
    if mine and len(calls) == {call} and not {after}:
        os.kill(os.getpid(), signal.{by})
    result = real(*args, **kwargs)
    if mine and len(calls) == {call}:
        os.kill(os.getpid(), signal.{by})
    return result
setattr(module, {name!r}, deadly)
"""


def few_digits(folder: Path, count: int = 100) -> str:
    """A preamble that leaves only the first `count` of the embedded digits, so that an epoch takes no time."""
    with np.load(ROOT / 'data' / 'digits' / 'digits.npz') as file:
        np.savez(folder / 'few_digits.npz', images=file['images'][:count], labels=file['labels'][:count])
    return f'import datasets\ndatasets.DIGITS_FILE = {str(folder / "few_digits.npz")!r}\n'


def write_images(folder: Path, counts: dict[str, int], size: int = 40, seed: int = 0) -> None:
    """Write `counts[name]` JPEG files of noise and a colour of its own to folder/name, for each class name."""
    random = np.random.RandomState(seed)
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        colour = np.random.RandomState(number).randint(60, 196, 3)
        for index in range(count):
            pixels = colour + random.randint(-60, 60, (size + index % 3, size + 7, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f'{name}_{index}.JPEG')


def zip_images(folder: Path, file: Path, leading: str = '') -> None:
    """Write the class folders of `folder` to a zip, below a leading folder if given."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, 'w') as archive:
        for path in sorted(folder.rglob('*'), reverse=True):  # the order in the zip does not matter
            archive.write(path, Path(leading) / path.relative_to(folder))


def metrics(folder: Path, starts: bool = False) -> list[dict]:
    """The lines of metrics.jsonl, without those of starts unless asked for; fails on what strict JSON does not know (NaN)."""
    def refuse(word: str) -> None:
        raise ValueError(f'{word} is not JSON')
    lines = [json.loads(line, parse_constant=refuse) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    return [line for line in lines if starts or line['kind'] != 'start']


def without_speed(value: Any) -> Any:
    """Metrics without the values that depend on the machine's speed."""
    if isinstance(value, dict):
        return {key: without_speed(item) for key, item in value.items()
                if key not in ('images_per_second', 'seconds')}
    return [without_speed(item) for item in value] if isinstance(value, list) else value


def load(path: Path) -> dict:
    """A checkpoint, read as the programs read it."""
    return torch.load(path, map_location='cpu', weights_only=True)


def assert_equal(one: Any, other: Any, where: str = '') -> None:
    """Nested dicts and lists are equal, tensors bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_equal(one[key], other[key], f'{where}.{key}')
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f'{where}[{index}]')
    else:
        assert one == other, where


def files(folder: Path) -> list[str]:
    """Names of everything below a folder, in order, but for its log and lock, which every run has."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.name not in ('train.log', '.lock'))


def complaints(result: Result) -> list[str]:
    """The lines on stderr, but for the warning that a test's short fits of the controller bring about."""
    return [line for line in result.err.splitlines() if 'of the tokens of known architectures wrongly' not in line]


def sizes_of(result: Result) -> str:
    """What a search logs of its sizes."""
    return re.search(r'parameters [\d,]+ .*multiply-adds of one image [\d,]+', result.out).group()


def assert_user_error(result: Result, *words: object) -> None:
    """Status 2 and exactly one line on stderr, which holds all `words`."""
    assert result.status == 2, result
    assert len(result.err.splitlines()) == 1, result.err
    for word in words:
        assert str(word) in result.err, (word, result.err)
