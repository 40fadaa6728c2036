"""Where a program runs and writes: device, processes, log, metrics, random generators.

A `Run` is what all programs pass around: it knows its device and process, owns the output directory, and holds every random
generator, whose states are in each checkpoint.
"""

import argparse
import atexit
import contextlib
import copy
import errno
import itertools
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import checkpoint
import parallel
import work_queue
from disk import Lock, append_line, log_to, read_records
from flags import UserError
from progress import EventFile, LiveLine

LAYOUTS = {'auto': None, 'channels_last': torch.channels_last, 'contiguous': torch.contiguous_format}  # of --layout
LOG_EVERY = 100  # steps between two log lines
# What a run leaves that cannot go on, as its checkpoint is gone: what is of no use then, and what may be the work of weeks.
LEFTOVER = re.compile(r'(candidate|rank)-[0-9a-f]{8}\.pt')
WORK = re.compile(r'metrics\.jsonl|results\.\d+\.jsonl|checkpoint_(best|\d+)\.pt|'
                  r'arch_pool\.(perf\.)?(final|pareto|\d+)(\.perf)?')


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


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that dropout and drop path draw from on this device."""
    if device.type == 'mps':
        return torch.mps._get_default_mps_generator()
    if device.type == 'cuda':
        torch.cuda.init()
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.default_generator


class Run:
    """Where a program runs and writes: device, process, output directory, logs, metrics and all random generators.

    Under torchrun it is process `rank` of `world`. generators: 'data' (batches) and 'search' (architectures), on the CPU and
    equal in all processes; 'default' and on a GPU 'device', from which networks draw weights, dropout and drop path, each
    process its own; 'device N' of a further GPU that it trains on (see `use_all_gpus`).
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.start = args, time.monotonic()
        self.device = choose_device(args.device)
        if threads := getattr(args, 'threads', None):
            torch.set_num_threads(threads)
        elif self.device.type == 'cpu':
            warn_of_busy_cores()
        self.rank, self.world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
        self.devices = [self.device]  # those that networks are trained on
        self.failed: dict[tuple[str, str], str] = {}  # (kind, architecture) of trainings that failed in this program -> why
        self.prefix, self.early = '', ''
        self.store, self.meetings = None, 0  # where several processes meet, and how often they did
        if self.world > 1:
            if missing := [name for name in ('RANK', 'MASTER_ADDR', 'MASTER_PORT') if name not in os.environ]:
                raise UserError(f'WORLD_SIZE={self.world} is set, but {missing[0]} is not; start several processes by '
                                'torchrun, or unset WORLD_SIZE')
            self.store, *_ = next(dist.rendezvous('env://'))
            dist.init_process_group('nccl' if self.device.type == 'cuda' else 'gloo', timeout=timedelta(minutes=10),
                                    store=dist.PrefixStore('group', self.store), rank=self.rank, world_size=self.world)
        self.output_dir = Path(args.output_dir)
        self.live = LiveLine(self.rank == 0)
        self.events = EventFile(self.output_dir) if getattr(args, 'tensorboard', False) else None
        self.generators = {'default': torch.default_generator, 'data': torch.Generator(), 'search': torch.Generator()}
        on_device = default_generator(self.device)
        if on_device is not torch.default_generator:
            self.generators['device'] = on_device
        for generator in self.generators.values():
            generator.manual_seed(args.seed)
        if args.tf32 is not None:
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
        """Print a line with the time in front; once the output directory is open it goes to train.log too."""
        if self.is_first:
            line = f'{datetime.now():%Y-%m-%d %H:%M:%S} {self.prefix}{message}'
            self.live.clear()
            print(line, flush=True)
            if self.early is not None:
                self.early += f'{line}\n'

    def warn(self, message: str) -> None:
        """Print a warning on stderr."""
        if self.is_first:
            self.live.clear()
            print(f'warning: {self.prefix}{message}', file=sys.stderr, flush=True)

    def together(self, function: Callable[[], Any]) -> Any:
        """What the first process's `function` returns, in all of them; its UserError too."""
        if self.world == 1:
            return function()
        result = [None, None]
        with self.meeting():
            if self.is_first:
                try:
                    result[0] = function()
                except UserError as error:
                    result[1] = str(error)
        dist.broadcast_object_list(result, device=self.device if self.device.type == 'cuda' else None)
        if result[1] is not None:
            raise UserError(result[1])
        return result[0]

    def meeting(self) -> contextlib.AbstractContextManager:
        """A context at whose end all processes wait for all, however long one of them downloads or reads in it."""
        self.meetings += 1
        return (work_queue.together(self.store, self.rank, self.world, f'meeting {self.meetings}') if self.world > 1
                else contextlib.nullcontext())

    def first_alone(self, function: Callable[[], Any]) -> Any:
        """What `function` returns, called by the first process alone (it may download), then by the first of each other
        machine, then by the others.
        """
        mine = []
        self.together(lambda: mine.append(function()))
        with self.meeting():
            if not mine and os.environ.get('LOCAL_RANK', '0') == '0':
                mine.append(function())
        return mine[0] if mine else function()

    def alone(self) -> 'Run':
        """A run for work that this process does by itself: one process, one device, its log lines under its rank."""
        other = copy.copy(self)  # its generators and what failed are this run's
        other.rank, other.world, other.devices = 0, 1, [self.device]
        other.scaler = self.new_scaler()
        other.prefix = f'[rank {self.rank}] ' if self.world > 1 else ''
        return other

    def queue(self, name: str, count: int) -> Iterator[int]:
        """Yield the next of 0..count-1 that no process has taken, until there is none and all processes have finished."""
        return work_queue.share(self.store, self.rank, self.world, name, count) if self.world > 1 else iter(range(count))

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

        anew: there is no checkpoint to go on from, so what an earlier run left is put aside if it is WORK, or dropped.
        """
        def create() -> None:
            try:
                self.output_dir.mkdir(parents=True, exist_ok=True)
                if self.is_first:
                    atexit.register(Lock(self.output_dir).release)
                    if anew and (self.output_dir / 'checkpoint.pt').exists():
                        raise UserError(f'--output_dir={self.output_dir}: another run has just written a checkpoint there; the '
                                        'same command goes on from it')
                self.open_log()
                if anew:
                    self.clear_output()
            except OSError as error:
                what = 'make room and run the same command again' if error.errno == errno.ENOSPC else (
                    'name a directory that you may write to')
                raise UserError(f'--output_dir={self.output_dir} cannot be written ({error.strerror}); {what}') from None
        self.first_alone(create)
        self.gather(None)  # nobody goes on and writes while others still clean up

    def clear_output(self) -> None:
        """Put aside what WORK an earlier run left, and drop its LEFTOVERs, and metrics of nothing but starts."""
        left = sorted(self.output_dir.iterdir())
        work = [path for path in left if WORK.fullmatch(path.name)]
        if [path.name for path in work] == ['metrics.jsonl']:
            starts = [record for record in read_records(work[0], {}) if record['kind'] == 'start']
            if len(starts) == len(work[0].read_bytes().splitlines()):
                work.pop().unlink()
        number = next(number for number in itertools.count(1)
                      if not any(path.with_name(f'{path.name}.old{number}').exists() for path in work))
        for path in work:
            path.rename(path.with_name(f'{path.name}.old{number}'))
            self.log(f'{path} is of an earlier run, whose checkpoint.pt is gone: it is {path.name}.old{number} now'
                     + '; --child_results reads such a file' * path.name.startswith('results'))
        for path in left:
            if LEFTOVER.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def open_log(self) -> None:
        """Append what is logged from now on, and was before, to the train.log of an output directory that is there."""
        if self.early is not None and self.output_dir.is_dir():
            with contextlib.suppress(OSError):  # someone else's, perhaps
                log_to(self.output_dir / 'train.log', self.early)
                self.early = None

    def write_metrics(self, **values: Any) -> None:
        """Append one JSON object to metrics.jsonl; its `seconds` are those since the program's start."""
        if self.is_first:
            values['seconds'] = round(time.monotonic() - self.start, 1)
            append_line(self.output_dir / 'metrics.jsonl', json.dumps(values))
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

    def save(self, state: dict[str, Any], *paths: Path) -> None:
        """Write a checkpoint of `state` and of what every one holds to each path; all processes call it together."""
        state = self.state() | state
        if self.is_first:
            checkpoint.save(state, *paths)

    def resume(self, state: dict[str, Any], where: str) -> None:
        """Go on as a checkpoint's run: its random generators, and metrics.jsonl as it was then; log from where.

        With more processes than the checkpoint's run had, or another kind of device, generators are seeded anew.
        """
        self.restore_generators(state, where)
        if state.get('scaler') and self.scaler.is_enabled():
            self.scaler.load_state_dict(state['scaler'])
        metrics = self.output_dir / 'metrics.jsonl'
        if self.is_first and metrics.exists() and metrics.stat().st_size > state.get('metrics_bytes', math.inf):
            os.truncate(metrics, state['metrics_bytes'])
        now = vars(self.args)
        changed = [f'--{name}={now[name]} (was {value})' for name, value in state['args'].items()
                   if name in now and now[name] != value and name != 'workers']  # which makes no difference
        unknown = [f'--{name}={value}' for name, value in now.items() if name not in state['args']]
        self.log(f'resumed after {where}' + (f', with other flags: {" ".join(changed)}' if changed else '')
                 + (f', with flags that there were not then: {" ".join(unknown)}' if unknown else ''))

    def restore_generators(self, state: dict[str, Any], where: str) -> None:
        """Set all generators as they were when a checkpoint was written, at `where`; see `resume`."""
        random = state.get('random', [])
        if random and len(random) < self.world:
            self.log(f'the checkpoint is of {len(random)} processes: the random numbers of the others begin anew')
        for name, generator in self.generators.items():
            rank = 0 if name in ('data', 'search') else self.rank
            try:
                generator.set_state(random[rank][name])
            except (IndexError, KeyError):
                self.reseed_one(name, rank, where)
                if name.startswith('device '):
                    self.log(f'the checkpoint has no random numbers of GPU {name.split()[1]}: they begin anew')
            except (RuntimeError, TypeError):
                self.reseed_one(name, rank, where)
                self.log(f'the random numbers "{name}" of the checkpoint are of another kind of device: they begin anew, from '
                         f'--seed and {where}')
        if self.rank < len(random) and ('device' in random[self.rank]) != ('device' in self.generators):  # CPU or not
            self.reseed_one('device' if 'device' in self.generators else 'default', self.rank, where)
            self.log('the random numbers of dropout in the checkpoint are of another kind of device: they begin anew, from '
                     f'--seed and {where}')

    def reseed(self, *seed: Any) -> None:
        """Seed all generators from --seed and the given values, so that what follows depends on nothing before it."""
        for name in self.generators:
            self.reseed_one(name, *seed)

    def reseed_one(self, name: str, *seed: Any) -> None:
        """Seed one generator from --seed and the given values; of several GPUs' each otherwise."""
        number = name.split()[1:]
        self.generators[name].manual_seed(zlib.crc32(repr((self.args.seed, *seed, *number)).encode()))

    def part_ways(self) -> None:
        """Give each process but the first dropout and drop path of its own; call it once all have the same weights."""
        if not self.is_first:
            for name in self.generators.keys() - {'data', 'search'}:
                seed = (self.generators[name].initial_seed(), self.rank)
                self.generators[name].manual_seed(zlib.crc32(repr(seed).encode()))

    @property
    def tf32(self) -> tuple[bool, bool]:
        """Whether this device rounds the factors of float32 convolutions to TF32, and those of other products."""
        if self.device.type != 'cuda' or torch.cuda.get_device_capability(self.device) < (8, 0):
            return False, False
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    def layout(self, supernet: bool = False) -> torch.memory_format:
        """How images and weights lie in memory: as --layout says, else channels-last where that is known to be fast.

        A supernet's many small convolutions are slower so on a GPU (docs/speed.md).
        """
        cuda = self.device.type == 'cuda'
        fast = self.device.type == 'cpu' or (cuda and (self.amp_dtype is not None or (self.tf32[0] and not supernet)))
        return LAYOUTS[self.args.layout] or (torch.channels_last if fast else torch.contiguous_format)

    def place(self, model: nn.Module) -> nn.Module:
        """The network on the device, in the run's layout, with the first process's weights."""
        layout = self.layout(supernet=getattr(model, 'is_supernet', False))
        model = model.to(self.device, memory_format=layout)
        model.layout = layout
        self.broadcast(model)
        return model

    def use_all_gpus(self) -> None:
        """Have `parallel` train on all GPUs that are visible, unless a flag or torchrun gives this process one."""
        alone = self.device.type == 'cuda' and 'LOCAL_RANK' not in os.environ and not self.args.device
        count = torch.cuda.device_count() if alone else 1
        if count > 1 and self.args.compile:
            self.log(f'--compile uses one of {count} GPUs in a process; torchrun starts a process for each')
            return
        for index in range(1, count):
            self.devices.append(torch.device('cuda', index))
            self.generators[f'device {index}'] = default_generator(self.devices[-1])
            self.reseed_one(f'device {index}')

    def compile_cells(self, model: nn.Module) -> None:
        """Compile each cell of a network on its own, as --compile asks: a few small graphs in place of one huge one."""
        config = torch._dynamo.config
        limit = 'recompile_limit' if hasattr(config, 'recompile_limit') else 'cache_size_limit'
        setattr(config, limit, max(getattr(config, limit), 6 * len(model.cells)))  # all cells are one class to the compiler
        for cell in model.cells:
            cell.compile(dynamic=False)  # a size that is only known when it runs would cost the layout its plan

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

    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Average the gradients of parameters that all processes used in a step, the same ones."""
        if self.world > 1:
            parallel.average_gradients(parameters, self.world)

    def parallel(self, model: nn.Module) -> nn.Module:
        """What to train: the model itself, or it over all processes, or over all GPUs of this one."""
        if self.world > 1:
            return parallel.over_processes(model, self.device)
        return parallel.EvenDataParallel(model, self.autocast, self.devices) if len(self.devices) > 1 else model

    def environment(self) -> str:
        """Where and how the program computes, as a log line shows it: device, processes, PyTorch, precision, layout."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == 'cuda' else f'{torch.get_num_threads()} threads'
        processes = f', {self.world} processes' if self.world > 1 else ''
        precision = f'{self.args.amp} mixed precision' if self.amp_dtype else 'float32'
        if self.device.type == 'cuda':
            precision += {(True, True): ' with TF32', (True, False): ' with TF32 in convolutions only',
                          (False, True): ' with TF32 but in convolutions', (False, False): ' without TF32'}[self.tf32]
        layout = 'channels-last' if self.layout() == torch.channels_last else 'default'
        if self.layout(supernet=True) != self.layout():
            layout += ' (of a supernet default)'
        return f'device {self.device} ({name}){processes}, PyTorch {torch.__version__}, {precision}, {layout} layout'

    def log_arguments(self) -> None:
        """Log all flags, those that differ from their defaults first."""
        args, changed = vars(self.args), getattr(self.args, 'changed', [])
        self.log('arguments ' + ' '.join(f'--{name}={args[name]}' for name in changed) + ' and by default ' + ' '.join(
            f'--{name}={value}' for name, value in args.items() if name not in changed))


def commit() -> str | None:
    """The commit of this project that runs, 'changed' if files differ from it; None where git does not say."""
    try:
        done = subprocess.run(['git', 'describe', '--always', '--dirty=, changed'], cwd=Path(__file__).parent, timeout=10,
                              capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def processor() -> str:
    """The processor's name, and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        name = next((line.partition(':')[2].strip() for line in lines if line.startswith('model name')), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return f'{name}, {cores} core{"s" * (cores > 1)}'


def warn_of_busy_cores() -> None:
    """Warn where other processes use the cores: PyTorch's threads wait for each other, so that one slow one stops all."""
    threads, cores, load = torch.get_num_threads(), os.cpu_count(), os.getloadavg()[0]
    if threads > 1 and threads + load > cores + 0.5:
        print(f'warning: about {load:.1f} of {cores} cores are in use; {threads} threads can then be many times as slow as '
              '--threads=1', file=sys.stderr, flush=True)


def seconds_of(run: Run, function: Callable[[], Any]) -> float:
    """Seconds that a call takes once it has been warmed up, the better of two; the default random generators stay as they
    were.
    """
    seconds = []
    with torch.random.fork_rng(devices=[run.device] if run.device.type == 'cuda' else []):
        for _ in range(3):
            start = time.perf_counter()
            function()
            if run.device.type in ('cuda', 'mps'):
                getattr(torch, run.device.type).synchronize()
            seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
