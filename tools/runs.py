"""What the tools share: the project's modules on the path, and reading what runs write, finished or going on.

A tool imports this module before any of the project's.
"""

import json
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

WORK = {'epoch': 'training', 'score': 'judging the pool', 'controller': 'fitting the controller',
        'new': 'new architectures', 'rank': 'training the best from scratch'}  # by the kind of a record
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import architecture  # noqa: E402
import checkpoint  # noqa: E402
import flags  # noqa: E402
from architecture import Architecture  # noqa: E402
from model import FixedNetwork, NASNetworkCIFAR, NASNetworkImageNet, count_madds, count_parameters  # noqa: E402


def need(package: str) -> None:
    """Raise UserError, which says how to install it, if an optional package is absent."""
    try:
        __import__(package)
    except ImportError:
        raise flags.UserError(f'this needs the package {package}: pip install {package}, or pip install -r '
                              'requirements-tools.txt') from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that is being written is left out. Raises UserError."""
    try:
        lines = path.read_text().split('\n')
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or 'not a text file'
        raise flags.UserError(f'{path}: cannot be read ({reason}); name the output directory of a run that has finished an '
                              'epoch, or a round') from None
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # behind the last line break there is nothing yet, or half a record
        try:
            records.append(json.loads(line))
            if 'kind' not in records[-1]:
                raise ValueError
        except (ValueError, TypeError):
            raise flags.UserError(f'{path}, line {number}: is not a record of a run; the file is damaged') from None
    if not records:
        raise flags.UserError(f'{path}: has no complete record yet; wait for the end of its first epoch or round')
    return records


@dataclass(frozen=True)
class RunFiles:
    """The output directory of a run. Everything is read when first asked for; UserError where it is missing or damaged."""

    path: Path

    @property
    def name(self) -> str:
        """How figures and tables call the run."""
        return self.path.resolve().name

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl."""
        if not self.path.is_dir():
            raise flags.UserError(f'{self.path}: there is no such directory; name the output directory of a run')
        return read_metrics(self.path / 'metrics.jsonl')

    def records(self, kind: str) -> list[dict[str, Any]]:
        """The records of a kind: 'epoch', and of a search 'score', 'controller', 'new', 'rank'."""
        return [record for record in self.metrics if record['kind'] == kind]

    @cached_property
    def checkpoint(self) -> dict[str, Any]:
        """checkpoint.pt, onto the CPU."""
        path = self.path / 'checkpoint.pt'
        if not path.exists():
            raise flags.UserError(f'{path}: is not there yet; a run writes it at the end of its first epoch')
        return checkpoint.load(path)

    @property
    def args(self) -> dict[str, Any]:
        """The run's flags."""
        return self.checkpoint['args']

    @property
    def is_search(self) -> bool:
        """Whether the run is a search: only trainings test after each epoch."""
        return 'test' not in self.metrics[0]

    @property
    def unit(self) -> str:
        """What a run counts: epochs, or rounds if it is a search by NAO, the complete way."""
        return 'epoch' if self.records('epoch') else 'round'

    @property
    def progress(self) -> str:
        """How far the run is, as '3/600'."""
        last = max(record['epoch'] for record in self.metrics if record['kind'] in ('epoch', 'score'))
        flag = 'rounds' if self.unit == 'round' else 'child_epochs' if self.is_search else 'epochs'
        return f'{last}/{self.args[flag]}'

    @property
    def dataset(self) -> str:
        """The data set's name as flags give it; 'imagenet' for any folder of images."""
        return self.args.get('dataset') or 'imagenet'

    @property
    def seconds_by_kind(self) -> dict[str, float]:
        """How long the run has computed, over all its starts, for each kind of work; empty if it did not record that."""
        spent: dict[str, float] = {}
        last = 0.0
        for record in self.metrics:
            if (now := record.get('seconds')) is None:
                return {}
            spent.setdefault(WORK[record['kind']], 0.0)
            spent[WORK[record['kind']]] += now - last if now >= last else now  # a resumed run counts from its own start
            last = now
        return spent

    @property
    def seconds(self) -> float | None:
        """How long the run has computed, over all its starts; None if it did not record that."""
        return sum(self.seconds_by_kind.values()) or None

    @property
    def best_error(self) -> float | None:
        """The lowest top-1 error in per cent so far: of the test, or of a search's best on the validation split."""
        if not self.is_search:
            return 100 - max(record['best_acc_top1'] for record in self.records('epoch'))
        best = [record['accuracy'] for record in self.records('rank')]
        best = best or [max(record['accuracies']) for record in self.records('score')[-1:]]
        return 100 - 100 * max(best) if best else None

    @property
    def sizes(self) -> tuple[int, int]:
        """Parameters and multiply-adds of the network of the best architecture, as the run trains it."""
        prefix = 'child_' if self.is_search else ''
        weights = self.checkpoint['model'].get('classifier.weight')  # not in a search by NAO, the complete way
        return sizes(self.found[0][1], self.dataset == 'imagenet', self.args[f'{prefix}layers'],
                     self.args[f'{prefix}channels'], None if weights is None else len(weights))

    @property
    def found(self) -> list[tuple[str, Architecture]]:
        """What a search has found so far as (how good, architecture), best first; what a training trains."""
        if not self.is_search:
            line = checkpoint.architecture_of(self.checkpoint)
            return [('trained here', read_architecture(line, self.args.get('arc_index') or 0))]
        if ranked := self.records('rank'):
            ranked = sorted(ranked, key=lambda record: -record['accuracy'])
            return [(f'{100 * record["accuracy"]:.2f} % on the validation split after training from scratch',
                     architecture.parse(record['arch'])) for record in ranked]
        return [(f'{100 * record["accuracies"][0]:.2f} % in the scoring of {self.unit} {record["epoch"]}',
                 architecture.parse(record['best_arch'])) for record in self.records('score')[-1:]]


def read_architecture(arch: str | None, index: int = 0) -> Architecture:
    """As architecture.read; raises UserError."""
    try:
        return architecture.read(arch or '', index)
    except architecture.ArchitectureError as error:
        raise flags.UserError(f'the architecture: {error}') from None


def sizes(arch: Architecture, imagenet: bool, layers: int, channels: int, classes: int | None = None) -> tuple[int, int]:
    """Parameters (without the auxiliary head) and multiply-adds of one image of an architecture's network.

    classes: None for 10, or ImageNet's 1000.
    """
    network: type[FixedNetwork] = NASNetworkImageNet if imagenet else NASNetworkCIFAR
    with torch.device('meta'):  # shapes alone: neither memory nor arithmetic
        classes = classes or (1000 if imagenet else 10)
        model = network(classes, layers, len(arch.normal) // 4, channels, 1.0, 1.0, False, 1, arch)
        return count_parameters(model), count_madds(model, 224 if imagenet else 32)


def percent(value: float | None) -> str:
    """A number as per cent; a dash where there is none."""
    return '-' if value is None else f'{value:.2f} %'


def write(path: Path, content: str | bytes) -> None:
    """Write a file and say so; raises UserError if that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise flags.UserError(f'{path}: cannot be written ({error.strerror})') from None
    print(f'wrote {path}')
