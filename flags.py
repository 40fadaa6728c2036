"""The command line: the parser, the types of flags, a user's mistakes, and how a program ends.

A program is `main()` under `run_program`.
"""

import argparse
import difflib
import errno
import math
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist


class UserError(Exception):
    """Something that the user can mend; the message is one line that says what is wrong and what would be right."""


class Stopped(Exception):
    """What ends a program though the user made no mistake; the message is one line that says why."""


class Flags(argparse.Namespace):
    """Parsed flags; `changed`, which is no flag itself, names those that differ from their defaults."""

    __slots__ = ('changed',)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose help is a line for each flag.

    positional: what the usage line shows besides flags.
    """

    def __init__(self, description: str, positional: str = ''):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=partial(argparse.HelpFormatter, max_help_position=56, width=1000),
                         usage=f'%(prog)s [--FLAG=VALUE ...] {positional}'.rstrip())

    def error(self, message: str) -> None:
        """Raise UserError, which becomes one line and status 2."""
        raise UserError(f'{message} (see --help)')

    def parse_args(self, args: list[str] | None = None, namespace: argparse.Namespace | None = None) -> argparse.Namespace:
        """Parse the flags; for an unknown one the error suggests the nearest. Raises UserError."""
        parsed, unknown = self.parse_known_args(args, namespace or Flags())
        if unknown:
            if not unknown[0].startswith('-'):
                self.error(f'what is {unknown[0]!r} for? a value with spaces needs quotes, --FLAG="A B"')
            near = difflib.get_close_matches(unknown[0].split('=')[0], [f'--{name}' for name in vars(parsed)], n=1)
            self.error(f'there is no flag {unknown[0]}' + (f'; did you mean {near[0]}?' if near else ''))
        parsed.changed = [name for name, value in vars(parsed).items() if value != self.get_default(name)]
        return parsed


def add(group: Any, name: str, help: str, default: Any = None, **options: Any) -> None:
    """Add --NAME to a parser or a group of its flags; the help says its default, as it then is, if it has one.

    options: those of argparse's add_argument.
    """
    kind = getattr(options.get('type'), 'kind', None)
    if 'choices' not in options and 'action' not in options:
        options.setdefault('metavar', {int: 'N', float: 'X'}.get(kind, 'TEXT'))
    if (default is not None and default is not False) or options.get('action') is argparse.BooleanOptionalAction:
        help += ' (default: %(default)s)'
    group.add_argument(f'--{name}', default=default, help=help, **options)


def number(kind: type, least: float, most: float = math.inf, *, above: bool = False) -> Callable[[str], Any]:
    """An argparse type: an int or float from `least` (with `above`: beyond it) to `most`."""
    def convert(text: str) -> int | float:
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = math.nan
        if not (value > least if above else value >= least) or not value <= most or value == math.inf:
            name = 'a whole number' if kind is int else 'a number'
            low = f'above {least:,}' if above else f'of at least {least:,}'
            high = f' and at most {most:,}' if most not in (math.inf, MANY) else ''
            raise argparse.ArgumentTypeError(f'must be {name} {low}{high}, not {text[:40]!r}')
        return value
    convert.kind = kind  # for the help
    return convert


MANY = 10 ** 9  # more than anybody has images, epochs or architectures
POSITIVE_INT, COUNT = number(int, 1, MANY), number(int, 0, MANY)
LAYERS, NODES, CHANNELS = number(int, 1, 1000), number(int, 1, 100), number(int, 1, 10_000)  # what can be built in minutes
POOL = number(int, 1, 1_000_000)  # architectures
SEED = number(int, 0, 2**63 - 1)  # what a generator takes
BATCH = number(int, 2, MANY)  # batch-norm cannot train on a single image
POSITIVE, NOT_NEGATIVE = number(float, 0, above=True), number(float, 0)
KEEP = number(float, 0, 1, above=True)
FRACTION = number(float, 0, 1)


UNITS = {'K': 1e3, 'M': 1e6, 'G': 1e9, 'B': 1e9}


def amount(text: str) -> int:
    """The argparse type of a size: a number above 0, such as 600000, or of thousands, millions, ... such as 3.5M."""
    factor = UNITS.get(text[-1:].upper(), 1)
    try:
        value = round(float(text if factor == 1 else text[:-1]) * factor)
    except (ValueError, OverflowError):  # also of nan, inf
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be a number above 0 such as 3500000, 3.5M or 600M, not {text[:40]!r}')
    return value


amount.kind = int  # for the help


def directory(text: str) -> str:
    """The argparse type of a directory to write to."""
    if not text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(f'must name a directory, not {text!r}')
    return text


def without_effect(parser: Parser, *names: str) -> None:
    """Accept flags of the reference that have no effect here, nor there; see `drop_without_effect`."""
    for name in names:
        parser.add_argument(f'--{name}', help=argparse.SUPPRESS, default=argparse.SUPPRESS)


def drop_without_effect(args: argparse.Namespace, *names: str) -> None:
    """Take such flags out again, with a line for each that was given."""
    for name in names:
        if hasattr(args, name):
            print(f'--{name}={getattr(args, name)} has no effect', file=sys.stderr, flush=True)
            delattr(args, name)
            args.changed.remove(name)


def add_run_flags(parser: Parser, output_dir: str, data: str = 'data') -> None:
    """The flags of every program that trains on images: where it runs, where it writes, the seed."""
    group = parser.add_argument_group('run')
    add(group, 'data', 'directory of the data set', data, metavar='DIR')
    add(group, 'output_dir', 'directory of train.log, checkpoints and metrics.jsonl; a run that finds its checkpoint.pt there '
        'goes on from it', output_dir, metavar='DIR', type=directory)
    add_machine_flags(group)
    add(group, 'amp', 'mixed precision; off: float32 throughout', 'off', choices=['off', 'bf16', 'fp16'])
    group.add_argument('--tf32', action=argparse.BooleanOptionalAction, help='let NVIDIA GPUs round the factors of float32 '
                       'products to TF32; --no-tf32: not even those of convolutions (default: those of convolutions only)')
    add(group, 'layout', 'of images in memory; auto: channels_last on CPUs, and on GPUs with --amp or, supernets apart, TF32',
        'auto', choices=['auto', 'channels_last', 'contiguous'])
    add(group, 'save_every', 'also keep checkpoint_EPOCH.pt every N epochs; 0: only the last and the best', 0, type=COUNT)
    add(group, 'tensorboard', 'mirror metrics.jsonl for TensorBoard in --output_dir (needs the package tensorboard)', False,
        action='store_true')


def add_machine_flags(group: Any) -> None:
    """The flags of what a program runs on, and of the seed."""
    add(group, 'device', 'cpu, cuda, cuda:N or mps (default: CUDA if there is a GPU, else MPS, else the CPU)', metavar='NAME')
    add(group, 'threads', 'of PyTorch on the CPU; 1 on a machine that others use too (default: a thread for each core)',
        type=number(int, 1, 1024))
    add(group, 'seed', 'of all random draws', 0, type=SEED)


def rank_prefix() -> str:
    """What tells a message of one of several processes apart."""
    return f'[rank {os.environ.get("RANK", 0)}] ' if int(os.environ.get('WORLD_SIZE', 1)) > 1 else ''


MEMORY = ('out of memory', "can't allocate memory", 'unable to find an engine', 'CUDNN_STATUS_ALLOC_FAILED',
          'CUBLAS_STATUS_ALLOC_FAILED')  # what errors hold where a network and a batch do not fit
KNOWN_ENDS = {  # what PyTorch's errors begin with or hold -> the line in their place
    **dict.fromkeys(('DataLoader worker (pid', 'Pin memory thread exited unexpectedly'),  # the latter with a GPU
                    'a process that reads images was killed, perhaps because memory, or /dev/shm in a container, ran out '
                    '(fewer --workers need less)'),
    'unable to write to file </torch_': 'the shared memory, /dev/shm, is full; fewer --workers need less, and a container can '
                                        'be given more (docker run --shm-size=8g)',
    **dict.fromkeys(MEMORY, 'the memory does not hold the network and a batch; smaller sizes need less'),
}


# What libraries say where another process has ended.
GONE = ('closed', 'reset by peer', 'broken pipe', 'got 0 bytes', 'sendbytes', 'recvvalue', 'remote', 'aborted')


def known_end(error: RuntimeError) -> str | None:
    """The line that tells an error of PyTorch to the user, None for what would be a bug."""
    words = str(error)
    if dist.is_initialized() and (isinstance(error, dist.DistError) or 'gloo' in words):
        if any(sign in words.lower() for sign in GONE):
            return 'another process has ended, which will have said why'
        return f'the processes cannot work together: {(words.strip() or type(error).__name__).splitlines()[-1]}'
    return next((line for sign, line in KNOWN_ENDS.items() if sign in words), None)


def run_program(main: Callable[[], None], goes_on: bool = True) -> None:
    """Run a program's main; a user's mistake ends in one line and status 2, Ctrl-C in one line and status 130.

    goes_on: whether the program started again goes on from a checkpoint.
    """
    for stream in (sys.stdout, sys.stderr):  # λ and the names of files may be more than a terminal knows
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
    try:
        main()
    except UserError as error:
        status, line = 2, f'error: {error}'
    except Stopped as error:
        status, line = 1, f'stopped: {error}'
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        status, line = 130, 'interrupted' + '; the same command goes on from the last checkpoint' * goes_on
    except RuntimeError as error:
        if not (reason := known_end(error)):
            raise
        status, line = 1, f'stopped: {reason}' + '; the same command goes on from the last checkpoint' * goes_on
    except BrokenPipeError:  # such as `| head`
        sys.stdout = open(os.devnull, 'w')  # noqa: SIM115 - what is left would raise again at the end
        status, line = 1, 'stopped: whoever read the output is gone'
    except PermissionError as error:
        status, line = 2, f'error: {error.filename}: {error.strerror}; name a place that you may read, and write to'
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        status, line = 2, (f'error: --output_dir cannot be written ({error.strerror}); make room and run the same command '
                           'again')
    else:
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    sys.stdout.flush()
    beginning = '\r\x1b[K' if sys.stderr.isatty() else ''  # over a live line, see progress.LiveLine
    print(f'{beginning}{rank_prefix()}{Path(sys.argv[0]).name}: {" ".join(line.split())}', file=sys.stderr, flush=True)
    sys.exit(status)
