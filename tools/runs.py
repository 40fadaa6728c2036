"""What the tools share: the project's modules on the path, finding runs, reading what they write, finished or going on.

A tool imports this module before any of the project's.
"""

import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import architecture  # noqa: E402
import checkpoint  # noqa: E402
import flags  # noqa: E402
from architecture import Architecture  # noqa: E402
from disk import read_lines, read_records  # noqa: E402
from model import FixedNetwork, NASNetworkCIFAR, NASNetworkImageNet, count_madds, count_parameters  # noqa: E402
from operations import OPERATIONS  # noqa: E402

NUMBER = (int, float)
RECORDS = {  # what tools read in a line of metrics.jsonl, by its kind
    'start': {},
    'epoch': {'epoch': int, 'lr': NUMBER, 'train': dict},
    'score': {'epoch': int, 'accuracies': list, 'best_arch': str},
    'controller': {'search_epoch': int, 'pairwise_accuracy': NUMBER, 'hamming_distance': NUMBER},
    'new': {'epoch': int, 'new': int, 'per_lambda': dict},
    'rank': {'index': int, 'accuracy': NUMBER, 'arch': str},
    'final': {'test': dict},
}
# The same of results.*.jsonl.
RESULTS = {kind: {'arch': str, 'accuracy': NUMBER, 'seconds': NUMBER} for kind in ('candidate', 'rank')}
WORK = {'epoch': 'training', 'score': 'judging the pool', 'controller': 'fitting the controller',
        'new': 'new architectures', 'rank': 'training the best from scratch', 'final': 'testing'}  # by the kind of a record
RUN_FILES = {'metrics.jsonl', 'checkpoint.pt', 'results.0.jsonl'}  # by one of which a directory is that of a run
METHODS = {'NAO-WS': 'NAO-WS (a weight-sharing network scores)',
           'NAO-V2': 'NAO-V2 (a weight-sharing network scores, in iterations)',
           'NAO': 'NAO (every candidate is trained on its own)'}
PROPOSERS = {'random': 'random search', 'evolution': 'regularised evolution'}
IMAGENET_CLASSES = 1000
TEST, TEST_ONCE, VALID = 'test images, which chose the epoch', 'test images, looked at once', 'validation split'
FORMATS = ('svg', 'png', 'pdf')


# ------------------------------------------------------------------------------------------------- what every tool does

def run_tool(main: Callable[[], None]) -> None:
    """As flags.run_program; a reader that goes away, as `| head` does, ends it silently."""
    if hasattr(signal, 'SIGPIPE'):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    flags.run_program(main, goes_on=False)


def need(package: str) -> None:
    """Raise UserError, which says how to install it, if an optional package is absent."""
    try:
        __import__(package)
    except ImportError:
        raise flags.UserError(f'this needs the package {package}: pip install {package}, or pip install -r '
                              'requirements-tools.txt') from None


def format_of(path: Path) -> str:
    """The format of a figure by its file's name: 'svg', 'png' or 'pdf'. Raises UserError."""
    form = path.suffix[1:].lower()
    if form not in FORMATS:
        raise flags.UserError(f'-o {path}: must end in .svg, .png or .pdf')
    return form


def write(path: Path, content: str | bytes) -> None:
    """Write a file and say so; raises UserError if that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise flags.UserError(f'{path}: cannot be written ({error.strerror})') from None
    print(f'wrote {path}')


def succeeds(mistakes: list[str], function: Callable[[], Any]) -> bool:
    """Whether a call raises no UserError; if it does, the message goes to `mistakes`."""
    try:
        function()
    except flags.UserError as error:
        mistakes.append(str(error))
        return False
    return True


def name_mistakes(mistakes: list[str]) -> None:
    """Name each mistake on a line of its own, and raise UserError for the last, if there is any."""
    for mistake in mistakes[:-1]:
        print(f'{Path(sys.argv[0]).name}: error: {mistake}', file=sys.stderr)
    if mistakes:
        raise flags.UserError(mistakes[-1])


def percent(value: float | None) -> str:
    """A number as per cent; a dash where there is none."""
    return '-' if value is None else f'{value:.2f} %'


# --------------------------------------------------------------------------------------------------------- finding runs

def add_runs(parser: flags.Parser) -> None:
    """The argument that table.py, plot.py and report.py share."""
    parser.add_argument('runs', metavar='RUN', nargs='+', type=Path, help='output directories of runs, finished or going on; '
                        'a file in one, such as a checkpoint; or a directory above several, at any depth')
    parser.add_argument('--all', action='store_true', help='every run for itself, also those in .../seed0, .../seed1, ...')


def directories_of(path: Path) -> list[Path]:
    """The output directories that a path names, see add_runs. Raises UserError."""
    if not path.exists():
        raise flags.UserError(f'{path}: there is no such file or directory; name the output directory of a run')
    if path.is_file() and any(path.parent.joinpath(name).exists() for name in RUN_FILES):
        return [path.parent]
    found = []
    for place, inner, files in os.walk(path):
        inner.sort()
        if RUN_FILES.intersection(files):
            found.append(Path(place))
    if not found:
        raise flags.UserError(f'{path}: is no output directory of a run and holds none; a run writes metrics.jsonl there at '
                              'the end of its first epoch, or round')
    return found


def find(paths: Iterable[Path], mistakes: list[str]) -> list['RunFiles']:
    """The runs that paths name, each once; what names none goes to `mistakes`."""
    found: dict[Path, RunFiles] = {}
    for path in paths:
        try:
            for directory in directories_of(path):
                found.setdefault(directory.resolve(), RunFiles(directory))
        except flags.UserError as error:
            mistakes.append(str(error))
    return list(found.values())


def short_names(paths: list[Path]) -> list[str]:
    """For each path as many of its last parts as no other path ends in; 'seed0' and the like say nothing by themselves."""
    absolute = [Path(os.path.abspath(path)).parts for path in paths]

    def name(parts: tuple[str, ...]) -> str:
        count = 2 if is_seed(parts[-1]) else 1
        while count < len(parts) and sum(other[-count:] == parts[-count:] for other in absolute) > 1:
            count += 1
        return os.path.join(*parts[-count:])
    return [name(parts) for parts in absolute]


def is_seed(name: str) -> bool:
    """Whether a directory is called as those of several runs that differ in their seeds are."""
    return re.fullmatch(r'seed\d+', name) is not None


class Series(NamedTuple):
    """What tables and figures show as one: a run, or several that differ in their seeds."""

    name: str
    runs: list['RunFiles']

    @property
    def label(self) -> str:
        """Its name, with the number of runs if there are several."""
        return self.name + (f' ({len(self.runs)} seeds)' if len(self.runs) > 1 else '')

    def having(self, enough: Callable[['RunFiles'], Any]) -> 'Series':
        """Only those runs that have recorded enough."""
        return self._replace(runs=[run for run in self.runs if enough(run)])


def series_of(found: list['RunFiles'], every: bool = False) -> list[Series]:
    """Runs such as a/seed0, a/seed1 as one series each, unless `every` run is wanted; others, also of a, for themselves."""
    groups: dict[tuple[Path, bool], list[RunFiles]] = {}
    for run in found:
        path = Path(os.path.abspath(run.path))
        of_seeds = is_seed(path.name) and not every
        groups.setdefault((path.parent if of_seeds else path, of_seeds), []).append(run)
    paths = [path if len(group) > 1 else Path(os.path.abspath(group[0].path)) for (path, _), group in groups.items()]
    names = dict(zip(different := list(dict.fromkeys(paths)), short_names(different), strict=True))
    return [Series(names[path], group) for path, group in zip(paths, groups.values(), strict=True)]


# --------------------------------------------------------------------------------------------------------- reading a run

@dataclass(frozen=True)
class RunFiles:
    """The output directory of a run. Everything is read when first asked for; UserError where it is missing or damaged."""

    path: Path

    @property
    def name(self) -> str:
        """What the run is called where it stands alone."""
        return short_names([self.path])[0]

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl, if it is there, also those of the program's starts."""
        path = self.path / 'metrics.jsonl'
        try:
            return [record for record in read_records(path, RECORDS) if record['kind'] in RECORDS]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise flags.UserError(f'{path}: cannot be read ({error.strerror})') from None

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of what the run has done, at least one."""
        records = [record for record in self.lines if record['kind'] != 'start']
        if not records:
            raise flags.UserError(f'{self.path / "metrics.jsonl"}: has no complete record yet; wait for the end of its first '
                                  'epoch or round')
        return records

    def records(self, kind: str) -> list[dict[str, Any]]:
        """The records of a kind: 'epoch', and of a search 'score', 'controller', 'new', 'rank'."""
        return [record for record in self.metrics if record['kind'] == kind]

    @property
    def ranked(self) -> list[dict[str, Any]]:
        """The records of a search's last ranking, unless it has gone on since: it may rank again, then or as it is."""
        ranked: list[dict[str, Any]] = []
        for record in self.metrics:
            if record['kind'] == 'score' or (record['kind'] == 'rank' and record['index'] == 0):
                ranked = []
            if record['kind'] == 'rank':
                ranked.append(record)
        return ranked

    @property
    def start(self) -> dict[str, Any]:
        """What the program recorded when it was last started; empty if it did not."""
        return next((record for record in reversed(self.lines) if record['kind'] == 'start'), {})

    @cached_property
    def checkpoint(self) -> dict[str, Any]:
        """checkpoint.pt, onto the CPU; without it, what the program's start recorded."""
        path = self.path / 'checkpoint.pt'
        if path.exists():
            return checkpoint.load(path)
        if not self.start.get('args'):
            raise flags.UserError(f'{path}: is not there yet; a run writes it at the end of its first epoch')
        return {'args': self.start['args'], 'model': {}}

    @property
    def args(self) -> dict[str, Any]:
        """The run's flags."""
        return self.checkpoint['args']

    @property
    def is_search(self) -> bool:
        """Whether the run is a search: only trainings evaluate after each epoch."""
        return evaluation(self.metrics[0]) is None

    @property
    def unit(self) -> str:
        """What a run counts: epochs, or rounds if it is a search by NAO, the complete way."""
        return 'epoch' if self.records('epoch') else 'round'

    @property
    def kind(self) -> str:
        """What kind of run it is, in words."""
        if not self.is_search:
            return 'training of one architecture'
        method = self.args.get('method', 'NAO-WS')
        proposer = PROPOSERS.get(self.args.get('proposer'))
        return f'search by {METHODS.get(method, method)}' + (f', new architectures by {proposer}' if proposer else '')

    @property
    def progress(self) -> str:
        """How far the run is, as '3/600'."""
        last = max((record['epoch'] for record in self.metrics if record['kind'] in ('epoch', 'score')), default=0)
        flag = 'rounds' if self.unit == 'round' else 'child_epochs' if self.is_search else 'epochs'
        total = self.args.get(flag, '?')
        if self.args.get('method') == 'NAO-V2' and flag == 'child_epochs':  # in each iteration
            total *= self.args['rounds'] + 1
        return f'{last}/{total}'

    @property
    def is_imagenet(self) -> bool:
        """Whether its networks are those for ImageNet's sizes."""
        return self.args.get('dataset', 'imagenet') in ('imagenet', None)

    @property
    def classes(self) -> int | None:
        """How many classes its networks tell apart, None if that is not known."""
        weights = self.checkpoint['model'].get('classifier.weight')  # not in a search by NAO, the complete way
        return self.start.get('classes') if weights is None else len(weights)

    @property
    def dataset(self) -> str:
        """The data set's name as flags give it; of images of one's own the name of their folder."""
        name = self.args.get('dataset') or 'imagenet'
        is_own = name == 'folder' or (name == 'imagenet' and self.classes != IMAGENET_CLASSES)
        return (Path(self.args.get('data') or '').name if is_own else '') or name

    @property
    def seconds_by_kind(self) -> dict[str, float]:
        """How long the run has computed, over all its starts, for each kind of work; empty if it did not record that."""
        spent: dict[str, float] = {}
        last = 0.0
        for record in self.lines:
            if record['kind'] == 'start':  # from which seconds count anew
                last = 0.0
                continue
            if (now := record.get('seconds')) is None:
                return {}
            work = WORK[record['kind']]
            spent[work] = spent.get(work, 0.0) + (now - last if now >= last else now)
            last = now
        return spent

    @property
    def seconds(self) -> float | None:
        """How long the run has computed, over all its starts; None if it did not record that.

        A start that was killed before its next record counts by the trainings that it had finished.
        """
        trained = [sum(record['seconds'] for record in read_records(path, RESULTS) if record['kind'] in RESULTS)
                   for path in self.path.glob('results.*.jsonl')]
        return max(sum(self.seconds_by_kind.values()), *trained, 0.0) or None

    @property
    def best_error(self) -> float | None:
        """The top-1 error in per cent on what `judged_on` names: of the epoch that was chosen, else the lowest so far."""
        if final := self.records('final'):
            return 100 - final[-1]['test']['top1']
        if not self.is_search:
            return 100 - max(record.get('best_acc_top1', evaluation(record)['top1']) for record in self.records('epoch'))
        best = [record['accuracy'] for record in self.ranked]
        best = best or [max(record['accuracies']) for record in self.records('score')[-1:]]
        return 100 - 100 * max(best) if best else None

    @property
    def last_error(self) -> float | None:
        """The top-1 error in per cent of a training's last epoch so far, which its test has not chosen; else None."""
        return None if self.is_search or self.judged_on != TEST else 100 - self.records('epoch')[-1]['test']['top1']

    @property
    def judged_on(self) -> str:
        """The images that `best_error` is of."""
        if self.records('final'):
            return TEST_ONCE
        return VALID if self.is_search or 'valid' in self.metrics[0] else TEST

    @cached_property
    def sizes(self) -> tuple[int, int]:
        """Parameters and multiply-adds of the network of the best architecture, as the run trains it."""
        if not self.is_search and {'parameters', 'multiply_adds'} <= self.start.keys():
            return self.start['parameters'], self.start['multiply_adds']
        prefix = 'child_' if self.is_search else ''
        return sizes(self.found[0][1], self.is_imagenet, self.args[f'{prefix}layers'], self.args[f'{prefix}channels'],
                     self.classes, self.args.get('image_size') if self.args.get('dataset') == 'folder' else None)

    @property
    def found(self) -> list[tuple[str, Architecture]]:
        """What a search has found so far as (how good, architecture), best first; what a training trains."""
        if not self.is_search:
            line = checkpoint.architecture_of(self.checkpoint)
            return [('the architecture', read_architecture(line, self.args.get('arc_index') or 0))]
        if self.ranked:
            ranked = sorted(self.ranked, key=lambda record: -record['accuracy'])
            return [(f'{100 * record["accuracy"]:.2f} % on the validation split after training from scratch',
                     read_architecture(record['arch'])) for record in ranked]
        return [(f'{100 * record["accuracies"][0]:.2f} % in the scoring of {self.unit} {record["epoch"]}',
                 read_architecture(record['best_arch'])) for record in self.records('score')[-1:]]

    @cached_property
    def pareto(self) -> list[tuple[float, float]]:
        """(accuracy, 0-1, multiply-adds) of the architectures that no other beats in both, if the run has written them."""
        path = self.path / 'arch_pool.pareto.perf'
        try:
            pairs = [tuple(map(float, line.split())) for line in read_lines(path)] if path.exists() else []
            return sorted(((accuracy, madds) for accuracy, madds in pairs), key=lambda pair: pair[1])
        except (OSError, ValueError):
            raise flags.UserError(f'{path}: is damaged; each line has an accuracy and a number of multiply-adds') from None


def evaluation(record: dict[str, Any]) -> dict[str, float] | None:
    """What a training's record of an epoch says of its test, or of its images held out for validation; else None."""
    return record.get('test') or record.get('valid')


def read_architecture(arch: str | None, index: int = 0) -> Architecture:
    """As architecture.read; raises UserError."""
    try:
        return architecture.read(arch or '', index)
    except architecture.ArchitectureError as error:
        raise flags.UserError(f'the architecture: {error}') from None


def sizes(arch: Architecture, imagenet: bool, layers: int, channels: int, classes: int | None = None,
          image_size: int | None = None) -> tuple[int, int]:
    """Parameters (without the auxiliary head) and multiply-adds of one image of an architecture's network.

    classes: None for 10, or ImageNet's 1000; image_size: None for 32, or 224. Raises UserError for an operation of one's own
    that does not fit.
    """
    network: type[FixedNetwork] = NASNetworkImageNet if imagenet else NASNetworkCIFAR
    classes = classes or (IMAGENET_CLASSES if imagenet else 10)
    image_size = image_size or (224 if imagenet else 32)
    with torch.device('meta'):  # shapes alone: neither memory nor arithmetic
        try:
            model = network(classes, layers, len(arch.normal) // 4, channels, 1.0, 1.0, False, 1, arch)
            return count_parameters(model), count_madds(model, image_size)
        except Exception:
            check_operations(arch, channels)
            raise


def check_operations(arch: Architecture, channels: int) -> None:
    """Raise UserError for an operation of an architecture that does not keep the channels, or the sizes as its stride says."""
    for index in sorted({*arch.normal[1::2], *arch.reduction[1::2]}):
        for stride in (1, 2):
            shape, wanted = None, (2, channels, 16 // stride, 16 // stride)
            try:
                shape = tuple(OPERATIONS[index].make(channels, stride)(torch.zeros(2, channels, 16, 16)).shape)
                reason = f'makes {shape}'
            except Exception as error:
                reason = f'fails ({str(error).partition(chr(10))[0]})'
            if shape != wanted:
                raise flags.UserError(f'operation {index} ({OPERATIONS[index].name}) {reason} of images (2, {channels}, 16, 16)'
                                      f' at stride {stride}, but should make {wanted}')
