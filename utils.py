"""What the programs share: flags and errors, device and processes, logs, checkpoints, the training loop.

A program is `main(args)` under `run_program`. A `Run` knows where it runs (device, process, output directory) and owns all
random generators; `train_epoch` and `evaluate` are the one loop; `fit` is a whole resumable training of a network.
"""

import argparse
import contextlib
import copy
import difflib
import errno
import inspect
import json
import math
import os
import pickle
import shutil
import signal
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import architecture
from flags import UserError
from operations import FactorizedReduce

LOG_EVERY = 100  # steps between two log lines
LIVE_EVERY = 2  # seconds between two looks at a running loss, which wait for the device; only on a terminal
LIFE_EVERY = 10  # seconds between two signs of life of a process that shares a queue with others
LIFE_LIMIT = 600  # seconds without one after which it is given up, as collective operations do
AUX_WEIGHT = 0.4  # of the auxiliary head's loss (paper, appendix)
NUMPY_NUMBER = [np.float64(0).__reduce__()[0], (np.float64(0).__reduce__()[0], 'numpy.core.multiarray.scalar'), np.dtype,
                type(np.dtype(np.float64)), type(np.dtype(np.float32))]  # what a pickled one, such as an accuracy, needs


class NotFiniteError(Exception):
    """A training loss is infinite or not a number."""


class LostProcessError(Exception):
    """Another process of the run does not answer any more."""


# ----------------------------------------------------------------------------------------------------- flags and errors

class OneLineHelp(argparse.ArgumentDefaultsHelpFormatter):
    """Help with a line for each flag: what it means, its default if it has one; the terminal wraps, not we."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=50, width=1000)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_it = '(default' in (action.help or '')
        if says_it or any(action.default is none for none in (None, False, argparse.SUPPRESS)) or not action.option_strings:
            return action.help
        return super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {int: 'N', float: 'X'}.get(getattr(action.type, 'kind', None), 'TEXT')


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose help is a line for each flag.

    positional: what the usage line shows besides flags.
    """

    def __init__(self, description: str, positional: str = ''):
        super().__init__(description=description, allow_abbrev=False, formatter_class=OneLineHelp,
                         usage=f'%(prog)s [--FLAG=VALUE ...] {positional}'.rstrip())

    def error(self, message: str) -> None:
        """Print the message as one line and exit with status 2."""
        raise UserError(f'{message} (see --help)')

    def parse_args(self, args: list[str] | None = None, namespace: argparse.Namespace | None = None) -> argparse.Namespace:
        """Parse the flags; for an unknown one the error suggests the nearest. Raises UserError."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split('=')[0], known, n=1)
            if not unknown[0].startswith('-'):
                self.error(f'what is {unknown[0]!r} for? a value with spaces needs quotes, --FLAG="A B"')
            self.error(f'there is no flag {unknown[0]}' + (f'; did you mean {near[0]}?' if near else ''))
        return parsed


def number(kind: type, least: float, most: float = math.inf, *, above: bool = False) -> Callable[[str], Any]:
    """An argparse type: an int or float from `least` (with `above`: beyond it) to `most`."""
    def convert(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (value > least if above else value >= least) or not value <= most or math.isinf(value):
            name = 'a whole number' if kind is int else 'a number'
            low = f'above {least:g}' if above else f'of at least {least:g}'
            raise argparse.ArgumentTypeError(
                f'must be {name} {low}{f" and at most {most:g}" if most < math.inf else ""}, not {text!r}')
        return value
    convert.kind = kind  # for the help
    return convert


POSITIVE_INT, COUNT = number(int, 1), number(int, 0)
SEED = number(int, 0, 2**63 - 1)  # what a generator takes
BATCH = number(int, 2)  # batch-norm cannot train on a single image
POSITIVE, NOT_NEGATIVE = number(float, 0, above=True), number(float, 0)
KEEP = number(float, 0, 1, above=True)
FRACTION = number(float, 0, 1)


def add_run_arguments(parser: Parser, output_dir: str, data: str = 'data') -> None:
    """The flags of every program: where it runs, where it writes, the seed."""
    group = parser.add_argument_group('run')
    group.add_argument('--data', metavar='DIR', default=data, help='directory of the data set')
    group.add_argument('--output_dir', metavar='DIR', default=output_dir, help='directory of checkpoints and metrics.jsonl; '
                       'a run that finds its checkpoint.pt there goes on from it')
    group.add_argument('--device', metavar='NAME', help='cpu, cuda, cuda:N or mps (default: CUDA if there is a GPU, else MPS, '
                       'else the CPU)')
    group.add_argument('--seed', type=SEED, default=0, help='of all random draws')
    group.add_argument('--amp', choices=['off', 'bf16', 'fp16'], default='off', help='mixed precision; off: float32 '
                       'throughout')
    group.add_argument('--tf32', action='store_true', help='let NVIDIA GPUs round the factors of float32 products to TF32')
    group.add_argument('--save_every', type=COUNT, default=0, metavar='N',
                       help='also keep checkpoint_EPOCH.pt every N epochs; 0: only the last and the best')
    group.add_argument('--tensorboard', action='store_true', help='mirror metrics.jsonl for TensorBoard in --output_dir (needs '
                       'the package tensorboard)')


def run_program(main: Callable[[], None], goes_on: bool = True) -> None:
    """Run a program's main; a user's mistake ends in one line and status 2, Ctrl-C in one line and status 130.

    goes_on: whether the program started again goes on from a checkpoint.
    """
    program = Path(sys.argv[0]).name
    try:
        main()
    except UserError as error:
        status, line = 2, f'{program}: error: {error}'
    except (NotFiniteError, LostProcessError) as error:
        status, line = 1, f'{program}: stopped: {error}'
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        status, line = 130, f'{program}: interrupted' + '; the same command goes on from the last checkpoint' * goes_on
    except RuntimeError as error:
        if not dist.is_initialized() or not (isinstance(error, dist.DistError) or 'gloo' in str(error)):
            raise
        status, line = 1, f'{program}: stopped: another process has ended, which will have said why'
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        status, line = 2, (f'{program}: error: --output_dir cannot be written ({error.strerror}); make room and run the same '
                           'command again')
    else:
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    sys.stdout.flush()
    if is_first_to_say(line):
        LiveLine(True).clear()
        print(line, file=sys.stderr, flush=True)
    sys.exit(status)


def is_first_to_say(line: str) -> bool:
    """Whether no other process of this machine has said this line: what is wrong in all of them is told once."""
    if int(os.environ.get('WORLD_SIZE', 1)) == 1:
        return True
    try:
        store, *_ = next(dist.rendezvous('env://', timeout=timedelta(seconds=10)))
        return store.add(f'{os.environ.get("GROUP_RANK", 0)} said {line}', 1) == 1
    except (RuntimeError, ValueError, KeyError):  # the process that keeps the store is gone
        return os.environ.get('LOCAL_RANK', '0') == '0'


# ------------------------------------------------------------------------------------------------- device and processes

def choose_device(name: str | None) -> torch.device:
    """The device a user asks for, or the best one there is; under torchrun each process takes its own GPU.

    Raises UserError if it cannot be used.
    """
    local_rank = os.environ.get('LOCAL_RANK', '0')
    if name is None:
        if torch.cuda.is_available():
            name = f'cuda:{local_rank}'
        elif torch.backends.mps.is_available():
            name = 'mps'
        else:
            if local_rank == '0':
                print('warning: no GPU found, running on the CPU', file=sys.stderr, flush=True)
            name = 'cpu'
    try:
        device = torch.device(name)
        if device.type not in ('cpu', 'cuda', 'mps'):
            raise RuntimeError('another kind of device')
        if device.type == 'cuda' and device.index is None:
            device = torch.device('cuda', int(local_rank))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f'--device={name} cannot be used here ({reason}); use cpu, cuda, cuda:N or mps') from None
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    return device


def default_generator(device: torch.device) -> torch.Generator | None:
    """The generator that dropout and drop path draw from on this device; None on MPS, which has no such object."""
    if device.type == 'cuda':
        torch.cuda.init()
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.default_generator if device.type == 'cpu' else None


def processes_here() -> int:
    """How many processes of the run share this machine."""
    return int(os.environ.get('LOCAL_WORLD_SIZE', 1))


class EvenDataParallel(DataParallel):
    """DataParallel that leaves a GPU out where the last one would get a single image, on which batch-norm cannot train."""

    def scatter(self, inputs: tuple, kwargs: dict[str, Any] | None, device_ids: list[int]) -> Any:
        """The inputs, of which the first is the images (batch, ...), in a part for each GPU."""
        batch = len(inputs[0])
        used = next(count for count in range(len(device_ids), 0, -1) if (batch - 1) % math.ceil(batch / count) or count == 1)
        return super().scatter(inputs, kwargs, device_ids[:used])


class LiveLine:
    """A line of progress under the log, on a terminal; in a file or a pipe it shows nothing and costs nothing.

    Where output goes through `tee`, as the scripts' does, TERMINAL_FD may name a descriptor of the terminal behind it.
    """

    def __init__(self, shown: bool):
        streams = [sys.stderr, sys.stdout]
        with contextlib.suppress(KeyError, ValueError, OSError):
            streams.append(open(int(os.environ['TERMINAL_FD']), 'w', closefd=False))  # noqa: SIM115 - as long as we run
        self.stream = next((stream for stream in streams if stream.isatty()), None) if shown else None
        self.next = time.monotonic() + LIVE_EVERY

    @property
    def due(self) -> bool:
        """Whether it is time to call `show` again."""
        return self.stream is not None and time.monotonic() >= self.next

    def show(self, text: str) -> None:
        """Replace the line's text, cut to the terminal's width."""
        self.stream.write(f'\r{text[:shutil.get_terminal_size().columns - 1]}\x1b[K')
        self.stream.flush()
        self.next = time.monotonic() + LIVE_EVERY

    def clear(self) -> None:
        """Make room for a log line."""
        if self.stream is not None:
            self.stream.write('\r\x1b[K')
            self.stream.flush()


class EventFile:
    """metrics.jsonl's records as an event file for TensorBoard; a resumed run's replace those that it does again."""

    def __init__(self, directory: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError('--tensorboard needs the package tensorboard: pip install tensorboard, or drop the flag') from None
        self.writer, self.open_writer = None, partial(SummaryWriter, directory)

    def write(self, values: dict[str, Any]) -> None:
        """Mirror a record: numbers as curves (one for each key of a dict), lists as histograms, text as text."""
        step = values.get('search_epoch', values.get('epoch', values.get('index')))
        if self.writer is None:
            self.writer = self.open_writer(purge_step=step if values['kind'] == 'epoch' else None)

        def add(name: str, value: Any) -> None:
            if isinstance(value, dict):
                for key, inner in value.items():
                    add(f'{name}/{key}', inner)
            elif isinstance(value, list):
                self.writer.add_histogram(name, torch.tensor(value), step)
            else:
                (self.writer.add_text if isinstance(value, str) else self.writer.add_scalar)(name, value, step)
        add(values['kind'], {key: value for key, value in values.items() if key != 'kind'})
        self.writer.flush()


class Run:
    """Where a program runs and writes: device, process, output directory, logs, metrics and all random generators.

    Under torchrun it is process `rank` of `world`. generators: 'data' (batches, on the device) and 'search'
    (architectures, on the CPU), equal in all processes; 'default' and on a GPU 'device', from which networks draw weights,
    dropout and drop path, each process its own.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.start = args, time.monotonic()
        self.device = choose_device(args.device)
        self.rank, self.world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
        self.independent, self.prefix = False, ''
        if self.world > 1:
            self.store, *_ = next(dist.rendezvous('env://'))
            dist.init_process_group('nccl' if self.device.type == 'cuda' else 'gloo', timeout=timedelta(minutes=10),
                                    store=dist.PrefixStore('group', self.store), rank=self.rank, world_size=self.world)
        self.output_dir = Path(args.output_dir)
        self.live = LiveLine(self.rank == 0)
        self.events = EventFile(self.output_dir) if getattr(args, 'tensorboard', False) else None
        self.generators = {'default': torch.default_generator, 'data': torch.Generator(self.device),
                           'search': torch.Generator()}
        on_device = default_generator(self.device)
        if on_device is not None and on_device is not torch.default_generator:
            self.generators['device'] = on_device
        for generator in self.generators.values():
            generator.manual_seed(args.seed)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
        torch.backends.cudnn.benchmark = True
        self.amp_dtype = {'off': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}[args.amp]
        self.scaler = self.new_scaler()

    def new_scaler(self) -> torch.amp.GradScaler:
        """What scales losses so that gradients do not vanish in --amp=fp16; otherwise it does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.args.amp == 'fp16')

    def autocast(self) -> torch.autocast:
        """The context that forward passes run in: mixed precision as --amp says."""
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that logs and writes."""
        return self.rank == 0

    def log(self, message: str) -> None:
        """Print a line with the time in front."""
        if self.is_first:
            self.live.clear()
            print(f'{datetime.now():%Y-%m-%d %H:%M:%S} {self.prefix}{message}', flush=True)

    def together(self, function: Callable[[], Any]) -> Any:
        """What the first process's `function` returns, in all of them; its UserError too."""
        if self.world == 1:
            return function()
        result = [None, None]
        if self.is_first:
            try:
                result[0] = function()
            except UserError as error:
                result[1] = str(error)
        dist.broadcast_object_list(result, device=self.device if self.device.type == 'cuda' else None)
        if result[1] is not None:
            raise UserError(result[1])
        return result[0]

    def first_alone(self, function: Callable[[], Any]) -> Any:
        """What `function` returns, called by the first process alone (it may download) and then by the others."""
        mine = []
        self.together(lambda: mine.append(function()))
        return mine[0] if mine else function()

    def alone(self) -> 'Run':
        """A run for work that this process does by itself: one process, one device, its log lines under its rank."""
        other = copy.copy(self)
        other.rank, other.world, other.independent = 0, 1, True
        other.scaler = self.new_scaler()
        other.prefix = f'[rank {self.rank}] ' if self.world > 1 else ''
        return other

    def queue(self, name: str, count: int) -> Iterator[int]:
        """Yield the next of 0..count-1 that no process has taken, until there is none and all processes have finished."""
        if self.world == 1:
            yield from range(count)
            return
        with self.signs_of_life(name):
            while (index := self.store.add(f'{name} taken', 1) - 1) < count:
                yield index
            self.store.add(f'{name} finished', 1)
            self.wait_for_all(name)

    @contextlib.contextmanager
    def signs_of_life(self, name: str) -> Iterator[None]:
        """While the body runs, count up in the store, so that others see that this process is there."""
        over = threading.Event()

        def count_up() -> None:
            with contextlib.suppress(RuntimeError):  # the store is gone: the main thread will hear of it
                while not over.wait(LIFE_EVERY):
                    self.store.add(f'{name} life {self.rank}', 1)
        thread = threading.Thread(target=count_up, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def wait_for_all(self, name: str) -> None:
        """Wait until all processes have finished a queue, which may take hours: a collective operation would time out.

        Raises LostProcessError when one shows no life any more: its machine vanished, or it hangs.
        """
        counts, changed, look = [-1] * self.world, [0.0] * self.world, 0.0
        while self.store.add(f'{name} finished', 0) < self.world:
            now = time.monotonic()
            if now >= look:
                look = now + LIFE_EVERY
                for rank in range(self.world):
                    count = self.store.add(f'{name} life {rank}', 0)
                    if count != counts[rank]:
                        counts[rank], changed[rank] = count, now
                    elif now - changed[rank] > LIFE_LIMIT:
                        raise LostProcessError(f'process {rank} has not answered for {LIFE_LIMIT} s; the same command goes on '
                                               'with what is done')
            time.sleep(0.2)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def open_output(self, anew: bool) -> None:
        """Create the output directory, on every machine; raises UserError if nothing can be written there.

        anew: there is no checkpoint to go on from, so drop what an earlier run left: its metrics, results and candidates.
        """
        leftovers = ('metrics.jsonl', 'results.*.jsonl', 'candidate-????????.pt', 'rank-????????.pt')

        def create() -> None:
            try:
                self.output_dir.mkdir(parents=True, exist_ok=True)
                probe = self.output_dir / f'.writable-{self.rank}'
                probe.touch()
                probe.unlink(missing_ok=True)
                for path in (path for name in leftovers if anew for path in self.output_dir.glob(name)):
                    path.unlink(missing_ok=True)
            except OSError as error:
                raise UserError(f'--output_dir={self.output_dir} cannot be written ({error.strerror}); '
                                'name a directory that you may write to') from None
        self.first_alone(create)
        self.gather(None)  # nobody goes on and writes while others still clean up

    def write_metrics(self, **values: Any) -> None:
        """Append one JSON object to metrics.jsonl; its `seconds` are those since the program's start."""
        if self.is_first:
            values['seconds'] = round(time.monotonic() - self.start, 1)
            with open(self.output_dir / 'metrics.jsonl', 'a') as file:
                file.write(json.dumps(values) + '\n')
            if self.events:
                self.events.write(values)

    def state(self) -> dict[str, Any]:
        """What every checkpoint holds of a run: arguments, where it runs, random generators of all processes, length of
        metrics.jsonl.

        All processes call it together.
        """
        metrics = self.output_dir / 'metrics.jsonl'
        random = self.gather({name: generator.get_state() for name, generator in self.generators.items()})
        return {'args': vars(self.args), 'environment': self.environment(), 'random': random,
                'scaler': self.scaler.state_dict(), 'metrics_bytes': metrics.stat().st_size if metrics.exists() else 0}

    def resume(self, state: dict[str, Any], where: str) -> None:
        """Go on as a checkpoint's run: its random generators, and metrics.jsonl as it was then; log from where.

        With more processes than the checkpoint's run had, the new ones seed their own generators anew.
        """
        random = state.get('random') or [{}]
        shared = ('data', 'search')
        for name, generator in self.generators.items():
            saved = random[self.rank if self.rank < len(random) and name not in shared else 0].get(name)
            if self.rank < len(random) or name in shared:
                if saved is not None:
                    generator.set_state(saved)
            else:
                generator.manual_seed(zlib.crc32(repr((self.args.seed, self.rank, where)).encode()))
        if state.get('scaler') and self.scaler.is_enabled():
            self.scaler.load_state_dict(state['scaler'])
        metrics = self.output_dir / 'metrics.jsonl'
        if self.is_first and metrics.exists() and metrics.stat().st_size > state.get('metrics_bytes', math.inf):
            os.truncate(metrics, state['metrics_bytes'])
        now = vars(self.args)
        changed = [f'--{name}={now[name]} (was {value})' for name, value in state['args'].items()
                   if name in now and now[name] != value and name != 'workers']  # which makes no difference
        self.log(f'resumed after {where}' + (f', with other flags: {" ".join(changed)}' if changed else ''))

    def reseed(self, *seed: Any) -> None:
        """Seed all generators from --seed and the given values, so that what follows depends on nothing before it."""
        for generator in self.generators.values():
            generator.manual_seed(zlib.crc32(repr((self.args.seed, *seed)).encode()))

    def part_ways(self) -> None:
        """Give each process but the first dropout and drop path of its own; call it once all have the same weights."""
        if not self.is_first:
            for name in self.generators.keys() - {'data', 'search'}:
                seed = (self.generators[name].initial_seed(), self.rank)
                self.generators[name].manual_seed(zlib.crc32(repr(seed).encode()))

    def place(self, model: nn.Module) -> nn.Module:
        """The model on the device, in channels-last layout, with the first process's weights."""
        model = model.to(self.device, memory_format=torch.channels_last)
        self.broadcast(model)
        return model

    def compile_cells(self, model: nn.Module) -> None:
        """Compile each cell of a network on its own, as --compile asks: a few small graphs in place of one huge one."""
        config = torch._dynamo.config
        limit = 'recompile_limit' if hasattr(config, 'recompile_limit') else 'cache_size_limit'
        setattr(config, limit, max(getattr(config, limit), 4 * len(model.cells)))  # all cells are one class to the compiler
        for cell in model.cells:
            cell.compile()

    def broadcast(self, model: nn.Module) -> None:
        """Give the first process's parameters and buffers to all."""
        if self.world > 1:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)

    def average_statistics(self, model: nn.Module) -> None:
        """Average the running statistics of batch-norm, which each process gathers on its own images, over all."""
        if self.world > 1:
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= self.world

    def parallel(self, model: nn.Module, shares_weights: bool = False) -> nn.Module:
        """What to train: the model itself, or it over all processes, or over all GPUs of this one.

        shares_weights: a step uses only a part of the parameters.
        """
        self.part_ways()
        if self.world > 1:
            known = inspect.signature(DistributedDataParallel).parameters
            sync = 'forward_sync_buffers' if 'forward_sync_buffers' in known else 'broadcast_buffers'  # its older name
            return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == 'cuda' else None,
                                           find_unused_parameters=shares_weights, **{sync: False})
        one_device = self.independent or shares_weights or self.args.device is not None
        if self.device.type == 'cuda' and torch.cuda.device_count() > 1 and not one_device:
            return EvenDataParallel(model)
        return model

    def environment(self) -> str:
        """Where the program runs, as a log line shows it: device, processes, PyTorch's version."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == 'cuda' else f'{torch.get_num_threads()} threads'
        processes = f', {self.world} processes' if self.world > 1 else ''
        return f'device {self.device} ({name}){processes}, PyTorch {torch.__version__}'

    def log_start(self, model: nn.Module, madds: int) -> None:
        """Log what a reader wants to know first: device, sizes, arguments."""
        self.log(self.environment())
        self.log(f'parameters {count_parameters(model):,} (without the auxiliary head), multiply-adds of one image {madds:,}')
        self.log('arguments ' + ' '.join(f'--{key}={value}' for key, value in vars(self.args).items()))


# ---------------------------------------------------------------------------------------------------------------- sizes

def count_parameters(model: nn.Module) -> int:
    """The number of parameters, the auxiliary head left out as in the paper's tables."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if not name.startswith('auxiliary_head.'))


@torch.no_grad()
def count_madds(model: nn.Module, image_size: int, *extras: Any) -> int:
    """Multiply-adds of the convolutions and linear layers for one image; `extras` go to the model after the image.

    They are counted on a copy without values, where no other operation is computed as a convolution (see kernels.py).
    """
    model, zeros = copy.deepcopy(model).to('meta').eval(), []

    def count_zeros(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        zeros.append(3 * inputs[0].shape[1] * output.numel())  # three of the four pixels of its 2×2 convolution
    for module in model.modules():
        if isinstance(module, FactorizedReduce):
            module.register_forward_hook(count_zeros)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, image_size, image_size, device='meta'), *extras)
    return counter.get_total_flops() // 2 - sum(zeros)


def seconds_of(run: Run, function: Callable[[], Any]) -> float:
    """Seconds that a call takes once it has been warmed up, the better of two; the default random generators stay as they
    were.
    """
    seconds = []
    with torch.random.fork_rng(devices=[run.device] if run.device.type == 'cuda' else []):
        for _ in range(3):
            start = time.perf_counter()
            function()
            if run.device.type == 'cuda':
                torch.cuda.synchronize(run.device)
            seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


# ---------------------------------------------------------------------------------------------------------- checkpoints

def save_checkpoint(run: Run, state: dict[str, Any], *paths: Path) -> None:
    """Write a checkpoint to each path (the first process does): to a temporary file beside it, flushed, renamed.

    Raises UserError when it cannot be written; what stood at the path then still stands there.
    """
    if not run.is_first:
        return
    for path in paths:
        temporary = path.with_name(path.name + '.tmp')
        try:
            with open(temporary, 'wb') as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            if not isinstance(error, OSError | RuntimeError):  # PyTorch's writer turns a full disk into a RuntimeError
                raise
            reason = getattr(error, 'strerror', None) or str(error).splitlines()[0]
            raise UserError(f'{path} cannot be written ({reason}); the checkpoint before it is intact, '
                            'make room and run the same command again') from None


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this project or of the reference (whose `args` is a Namespace, and whose names may start with
    `module.`) onto the CPU; `args` becomes a dict. Raises UserError.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *NUMPY_NUMBER]), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            state = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise UserError(f'{path}: there is no such checkpoint; train first, or name one with --checkpoint') from None
    except Exception as error:  # torch.load raises a dozen kinds for a file that is not what it should be
        reason = 'it holds more than tensors and numbers' if isinstance(error, pickle.UnpicklingError) else (
            f'{error}'.partition('\n')[0][:100] or type(error).__name__)
        raise UserError(f'{path}: is not a readable checkpoint ({reason}); it is cut off, damaged or another kind of file; '
                        'to begin anew delete it or name another --output_dir') from None
    args = state.get('args', {}) if isinstance(state, dict) else None
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(args, dict) or not isinstance(state.get('model'), dict):
        raise UserError(f'{path}: is not a checkpoint of this project: a dict with "model" and "args" is needed')
    state['args'] = args
    state['model'] = {name.removeprefix('module.'): value for name, value in state['model'].items()}
    return state


def require(state: dict[str, Any], names: Iterable[str], path: str | Path, advice: str = '') -> None:
    """Raise UserError if a checkpoint lacks what a run needs to go on from it; advice: what else can be done with it."""
    if missing := [name for name in names if name not in state]:
        raise UserError(f'{path}: has no "{missing[0]}", so no run can go on from it; {advice}name another --output_dir')


def load_network_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read the checkpoint of one architecture's network; raises UserError, also if it is that of a search."""
    state = load_checkpoint(path)
    if 'phase' in state:
        raise UserError(f'{path}: is the checkpoint of a search; train an architecture of its arch_pool, into another place')
    return state


def architecture_of(state: dict[str, Any]) -> str | None:
    """The architecture of a checkpoint's network, as a user names it; None if the checkpoint does not say.

    A pool file that --fixed_arc named may have changed since, so the line that the checkpoint holds goes first.
    """
    args = state['args']
    return state.get('arch') or args.get('fixed_arc') or args.get('arch')  # the last is the reference's name for it


def load_model(model: nn.Module, weights: dict[str, Tensor], path: str | Path,
               flags: str = '--fixed_arc, --layers, --channels and --use_aux_head') -> None:
    """Load a checkpoint's weights strictly; raises UserError if they are those of another network.

    flags: those that make the network what it is, for the message.
    """
    wanted = model.state_dict()
    rows, wanted_rows = (len(names['classifier.weight']) if 'classifier.weight' in names else 0
                         for names in (weights, wanted))
    if rows and wanted_rows and rows != wanted_rows:
        raise UserError(f'{path}: is for {rows} classes, this data set has {wanted_rows}; give the --dataset or '
                        '--data it was trained on')
    if strange := [name for name, value in weights.items() if not torch.is_tensor(value)]:
        raise UserError(f'{path}: {strange[0]} in its "model" is not a tensor')
    trackers = {name for name in wanted if name.endswith('num_batches_tracked')}  # absent before PyTorch 0.4.1
    different = [name for name in wanted.keys() | weights.keys() if name not in trackers - weights.keys() and (
        name not in wanted or name not in weights or wanted[name].shape != weights[name].shape)]
    if different:
        raise UserError(f'{path}: is of another architecture or size: {len(different)} of its parameters differ, such as '
                        f'{min(different)}; give the {flags} it was trained with')
    model.load_state_dict(weights, strict=True)


# ------------------------------------------------------------------------------------------------------------- the loop

def cosine(epoch: int, epochs: int, lr_max: float, lr_min: float) -> float:
    """The learning rate of an epoch, from 0: lr_min + (lr_max - lr_min)(1 + cos(π·epoch/epochs)) / 2."""
    return lr_min + (lr_max - lr_min) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def step_decay(epoch: int, lr: float, gamma: float, decay_period: int) -> float:
    """The learning rate of an epoch, from 0: lr times gamma for every `decay_period` epochs done."""
    return lr * gamma ** (epoch // decay_period)


class Meter:
    """Sums loss and right answers on the device; nothing is read before `values` is called."""

    def __init__(self, run: Run):
        dtype = torch.float32 if run.device.type == 'mps' else torch.float64  # MPS has no double
        self.run, self.sums = run, torch.zeros(4, device=run.device, dtype=dtype)
        self.start = time.perf_counter()

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Count a batch: logits (batch, classes), labels (batch,), mean loss ()."""
        right = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)
        self.sums[:3] += torch.stack([loss * len(labels), right[:, 0].sum(), right.sum()])
        self.sums[3] += len(labels)

    def values(self, of_all: bool = True) -> dict[str, float]:
        """Mean loss, top-1 and top-5 accuracy in per cent, images per second; waits for the device.

        Of all processes, which call it together, or of this one.
        """
        loss, top1, top5, images = (self.run.sum(self.sums.clone()) if of_all else self.sums).tolist()
        seconds = time.perf_counter() - self.start
        return {'loss': loss / images, 'top1': 100 * top1 / images, 'top5': 100 * top5 / images,
                'images_per_second': images / seconds}


class Clock:
    """Estimates the time that the rest of a training takes from what was done since the clock's start."""

    def __init__(self, step: int, steps: int):
        self.start, self.first, self.steps = time.monotonic(), step, steps

    def left(self, step: int) -> str:
        """The time to the last step, as h:mm:ss."""
        per_step = (time.monotonic() - self.start) / max(1, step - self.first)
        return str(timedelta(seconds=round(per_step * max(0, self.steps - step))))


def describe(values: dict[str, float]) -> str:
    """A meter's values as a log line shows them."""
    return (f'loss {values["loss"]:.4f} top-1 {values["top1"]:.2f} % top-5 {values["top5"]:.2f} % '
            f'{values["images_per_second"]:.0f} images/s')


def steps_of(batches: Iterable, max_steps: int | None = None) -> int:
    """The steps of an epoch: all batches, or `max_steps` of them."""
    return min(len(batches), max_steps or len(batches))


def update(run: Run, optimizer: torch.optim.Optimizer, loss: Tensor, grad_bound: float) -> None:
    """Make an optimiser step on the parameters that the loss reaches: a supernet's step leaves thousands of others alone."""
    group, = optimizer.param_groups
    parameters = group['params']
    run.scaler.scale(loss).backward()
    used = [parameter for parameter in parameters if parameter.grad is not None]
    group['params'] = used
    run.scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(used, grad_bound)
    run.scaler.step(optimizer)
    run.scaler.update()
    group['params'] = parameters
    for parameter in used:
        parameter.grad = None


def train_epoch(run: Run, forward: Callable[[Tensor, int], tuple[Tensor, Tensor | None]], optimizer: torch.optim.Optimizer,
                batches: Iterable, *, title: str, lr: float, step: int, clock: Clock, grad_bound: float,
                label_smooth: float = 0.0, max_steps: int | None = None) -> tuple[dict[str, float], int]:
    """Train on `batches` (all, or `max_steps` of them) and return the epoch's values (see Meter) and the next step.

    forward(images, step) gives (logits, auxiliary logits or None). The loss is cross-entropy, plus 0.4 times that of the
    auxiliary logits. Raises NotFiniteError, at a log line or the end, when the loss was not finite.
    """
    for group in optimizer.param_groups:
        group['lr'] = lr
    meter, count = Meter(run), steps_of(batches, max_steps)

    def values() -> dict[str, float]:
        now = meter.values()
        if not math.isfinite(now['loss']):
            raise NotFiniteError(f'the loss is {now["loss"]} in {title}, step {done}/{count}; the last checkpoint is kept; '
                                 'a smaller learning rate may help')
        return now

    for done, (images, labels, weight) in enumerate(batches, start=1):
        with run.autocast():
            logits, aux_logits = forward(images, step)
            loss = F.cross_entropy(logits, labels, label_smoothing=label_smooth)
            if aux_logits is not None:
                loss = loss + AUX_WEIGHT * F.cross_entropy(aux_logits, labels, label_smoothing=label_smooth)
        update(run, optimizer, loss * weight if weight != 1 else loss, grad_bound)
        meter.update(logits, labels, loss)
        step += 1
        if done % LOG_EVERY == 0:
            run.log(f'{title} step {done}/{count} {describe(values())} lr {lr:.3g} left {clock.left(step)}')
        elif run.live.due:
            run.live.show(f'{title} step {done}/{count} {describe(meter.values(of_all=False))} left {clock.left(step)}')
        if done == count:
            break
    return values(), step


@torch.no_grad()
def evaluate(run: Run, model: nn.Module, batches: Iterable) -> dict[str, float]:
    """Mean loss, top-1 and top-5 accuracy in per cent of the model in eval mode on `batches`."""
    model.eval()
    meter = Meter(run)
    for done, (images, labels) in enumerate(batches, start=1):
        with run.autocast():
            logits, _ = model(images)
            loss = F.cross_entropy(logits, labels)
        meter.update(logits, labels, loss)
        if run.live.due:
            run.live.show(f'testing {done}/{len(batches)} {describe(meter.values(of_all=False))}')
    return meter.values()


def fit(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, train_batches: Iterable, eval_batches: Iterable, *,
        epochs: int, lr: Callable[[int], float], title: str = '', split: str = 'test', state: dict[str, Any] | None = None,
        after_epoch: Callable[[int, int, dict, dict], None] = lambda *values: None, **options: Any) -> dict[str, float]:
    """Train a network for `epochs`, on from a checkpoint's `state` if given; return the last evaluation's values.

    lr(epoch) is an epoch's learning rate; split: what the log calls the images of eval_batches; after_epoch(epochs done, step,
    training values, evaluation values) is called after each; `options` go to train_epoch.
    """
    parallel, evaluation = run.parallel(model), {}
    epoch = state['epoch'] if state else 0
    if state:
        run.resume(state, f'epoch {epoch}')
    count = steps_of(train_batches, options.get('max_steps'))
    step = epoch * count  # in today's steps: those of the checkpoint may have been of another batch size
    clock = Clock(step, epochs * count)
    while epoch < epochs:
        model.train()
        rate = lr(epoch)
        name = f'{title}epoch {epoch + 1}/{epochs}'
        training, step = train_epoch(run, parallel, optimizer, train_batches, title=name, lr=rate, step=step, clock=clock,
                                     **options)
        run.average_statistics(model)
        evaluation = evaluate(run, model, eval_batches)
        if not math.isfinite(evaluation['loss']):  # the last step broke the weights; they must not become a checkpoint
            raise NotFiniteError(f'the {split} loss is {evaluation["loss"]} after {name}; the last checkpoint is kept; a '
                                 'smaller learning rate may help')
        epoch += 1
        run.log(f'{name} train {describe(training)} | {split} {describe(evaluation)} lr {rate:.3g} left {clock.left(step)}')
        after_epoch(epoch, step, training, evaluation)
    return evaluation


def sgd(run: Run, model: nn.Module, l2_reg: float) -> torch.optim.SGD:
    """The optimiser of every network here: SGD with momentum 0.9; train_epoch sets its learning rate."""
    fused = run.device.type in ('cpu', 'cuda')
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=l2_reg, fused=fused)
    for parameter in model.parameters():  # the fused step cannot start some of them later, as a supernet's paths would
        optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
    return optimizer


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], path: str | Path) -> None:
    """Load a checkpoint's optimiser, its momentum laid out in memory as the parameters are (the fused step needs that).

    Raises UserError if it is not of the same parameters.
    """
    try:
        for group in state['param_groups']:
            group.update({name: value for name, value in optimizer.param_groups[0].items() if name in ('fused', 'foreach')})
        optimizer.load_state_dict(state)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f'{path}: its "optimizer" is not that of its network; name another --output_dir') from None
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter).copy_(value)


# ------------------------------------------------------------------------------- training and testing a found architecture

def add_network_arguments(parser: Parser, layers: int, channels: int, keep_prob: float, drop_path: float) -> None:
    """The flags of a fixed architecture's network."""
    group = parser.add_argument_group('network')
    group.add_argument('--fixed_arc', '--arch', metavar='ARCH', help='the architecture: a line of integers, NAONet_A, NAONet_B '
                       'or the path of an arch_pool file')
    group.add_argument('--arc_index', type=COUNT, default=0, help='which line of the arch_pool file, from 0')
    group.add_argument('--layers', type=POSITIVE_INT, default=layers, help='normal cells before, between and after the '
                       'reduction cells')
    group.add_argument('--nodes', type=POSITIVE_INT, default=5, help='nodes of a cell')
    group.add_argument('--channels', type=POSITIVE_INT, default=channels, help='channels of the first cells')
    group.add_argument('--keep_prob', type=KEEP, default=keep_prob, help='1 - dropout before the classifier')
    group.add_argument('--drop_path_keep_prob', type=KEEP, default=drop_path, help='1 - drop path of the last cell at the end')
    group.add_argument('--use_aux_head', action='store_true', help='train with the auxiliary head')


def add_training_arguments(parser: Parser, batch_size: int, eval_batch_size: int, epochs: int, l2_reg: float) -> None:
    """The flags of training and testing a fixed architecture's network."""
    group = parser.add_argument_group('training')
    group.add_argument('--mode', choices=['train', 'test'], default='train', help='test: only evaluate a checkpoint')
    group.add_argument('--checkpoint', metavar='PATH', help='what to test (default: checkpoint_best.pt in '
                       '--output_dir)')
    group.add_argument('--batch_size', type=BATCH, default=batch_size, help='images per step')
    group.add_argument('--eval_batch_size', type=POSITIVE_INT, default=eval_batch_size, help='images per evaluation step')
    group.add_argument('--epochs', type=POSITIVE_INT, default=epochs, help='how often all training images are seen')
    group.add_argument('--l2_reg', type=NOT_NEGATIVE, default=l2_reg, help='weight decay')
    group.add_argument('--compile', action='store_true', help='compile each cell with torch.compile (minutes, then faster on '
                       'GPUs)')


def parse_training_arguments(parser: Parser) -> argparse.Namespace:
    """Parse a training program's flags; in test mode the checkpoint answers for what the flags leave out.

    Raises UserError for a missing architecture.
    """
    args = parser.parse_args()
    if args.mode == 'test':
        path = args.checkpoint or Path(args.output_dir) / 'checkpoint_best.pt'
        state = load_network_checkpoint(path)
        saved = state['args'] | {'fixed_arc': architecture_of(state)}
        known = [f'--{name}={saved[name]}' for name in ('fixed_arc', 'arc_index', 'dataset', 'layers', 'nodes', 'channels')
                 if saved.get(name) is not None and hasattr(args, name)]
        try:
            args = parser.parse_args([*known, *sys.argv[1:]])
        except UserError as error:
            raise UserError(f'{path}: its arguments do not suit this program: {error}') from None
    if not args.fixed_arc:
        raise UserError('--fixed_arc is missing: a line of integers, or the path of an arch_pool file')
    return args


def read_architecture(args: argparse.Namespace) -> architecture.Architecture:
    """The architecture that --fixed_arc and --arc_index name; raises UserError.

    `args` then has the architecture itself: a checkpoint must not depend on a pool file that a later search rewrites.
    """
    try:
        arch = architecture.read(args.fixed_arc, args.arc_index, args.nodes)
    except architecture.ArchitectureError as error:
        raise UserError(f'--fixed_arc: {error}') from None
    args.fixed_arc, args.arc_index = str(arch), 0
    return arch


def test_network(run: Run, build: Callable[[bool], nn.Module], eval_batches: Iterable) -> dict[str, float]:
    """Evaluate checkpoint_best.pt, or --checkpoint, and log its errors; build(use_aux_head) makes the network."""
    path = run.args.checkpoint or run.output_dir / 'checkpoint_best.pt'
    weights = load_network_checkpoint(path)['model']
    model = run.place(build(any(name.startswith('auxiliary_head.') for name in weights)))
    load_model(model, weights, path)
    values = evaluate(run, model, eval_batches)
    run.log(f'{path}: loss {values["loss"]:.4f} top-1 error {100 - values["top1"]:.2f} % '
            f'top-5 error {100 - values["top5"]:.2f} % on {eval_batches.count} images')
    return values


def train_network(run: Run, model: nn.Module, train_batches: Iterable, eval_batches: Iterable, *, l2_reg: float,
                  classes: list[str] | None = None, **options: Any) -> None:
    """Train a network to the end, from checkpoint.pt in the output directory if there is one; `options` go to `fit`.

    classes: their names, for the checkpoint.

    After each epoch checkpoint.pt, and checkpoint_best.pt if the test accuracy is the best so far, are written, and a line
    of metrics.jsonl.
    """
    model, path = run.place(model), run.output_dir / 'checkpoint.pt'
    if run.args.compile:
        run.compile_cells(model)
    optimizer = sgd(run, model, l2_reg)
    state = run.together(lambda: load_network_checkpoint(path) if os.path.exists(path) else None)
    if state:
        require(state, ('epoch', 'optimizer', 'best_acc_top1'), path, 'test it by --mode=test --checkpoint, or ')
        load_model(model, state['model'], path)
        load_optimizer(optimizer, state['optimizer'], path)
    run.open_output(anew=state is None)
    run.log_start(model, count_madds(model, eval_batches.size))
    best = float(state['best_acc_top1']) if state else -1.0  # a first network that gets nothing right is the best so far

    def after_epoch(epoch: int, step: int, training: dict, evaluation: dict) -> None:
        nonlocal best
        is_best, best = evaluation['top1'] > best, max(best, evaluation['top1'])
        run.write_metrics(kind='epoch', epoch=epoch, step=step, lr=options['lr'](epoch - 1), train=training, test=evaluation,
                          best_acc_top1=best)
        paths = [run.output_dir / 'checkpoint_best.pt'] * is_best + [path]
        if run.args.save_every and epoch % run.args.save_every == 0:
            paths.insert(0, run.output_dir / f'checkpoint_{epoch}.pt')
        save_checkpoint(run, run.state() | {
            'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'epoch': epoch, 'step': step,
            'best_acc_top1': best, 'arch': str(model.arch), 'classes': classes}, *paths)

    fit(run, model, optimizer, train_batches, eval_batches, state=state, after_epoch=after_epoch, **options)
    run.log(f'finished: best test top-1 error {100 - best:.2f} %, checkpoints in {run.output_dir}')
