"""Compare runs, finished or going on: a row each, beside the published error of the same network.

    python tools/table.py exp/*

Of a directory that only holds runs, such as exp/quickstart, each is a row.
A search's error is that of its best architecture on the validation split; its sizes are those of that architecture's
network as the search trains it from scratch.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import runs
from runs import RunFiles

import flags
from architecture import PUBLISHED, parse

PUBLISHED_ERRORS = {  # (architecture, data set, channels) -> top-1 error in per cent (paper, tables 1 and 3)
    ('NAONet_A', 'cifar10', 36): 2.48,
    ('NAONet_A', 'cifar10', 128): 1.93,
    ('NAONet_B', 'cifar10', 36): 2.93,
    ('NAONet_A', 'imagenet', 42): 25.7,
}
HEADER = ('run', 'data', 'parameters', 'multiply-adds', 'top-1 error', 'published', 'epochs', 'hours', 'architecture')
NUMBERS = range(2, 8)  # the columns that are set flush right
UNKNOWN = '-'


def row(run: RunFiles, title: str) -> tuple[str, ...]:
    """A run's row, which begins with a title; raises UserError where the run has not written what it needs."""
    hours = UNKNOWN if run.seconds is None else f'{run.seconds / 3600:.2f}'
    arch = run.found[0][1] if run.found else None
    sizes = (f'{size:,}' for size in run.sizes) if arch else (UNKNOWN, UNKNOWN)
    name = next((name for name, line in PUBLISHED.items() if arch == parse(line)), str(arch or UNKNOWN))
    published = None if run.is_search else PUBLISHED_ERRORS.get((name, run.dataset, run.args['channels']))
    return (title, run.dataset, *sizes, runs.percent(run.best_error) + (' valid' if run.is_search else ''),
            runs.percent(published), run.progress + (' rounds' if run.unit == 'round' else ''), hours, name)


def aligned(rows: list[tuple[str, ...]]) -> str:
    """The rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ['  '.join(cell.rjust(width) if index in NUMBERS else cell.ljust(width)
                       for index, (cell, width) in enumerate(zip(cells, widths, strict=True))).rstrip() for cells in rows]
    return '\n'.join(lines)


def runs_in(path: Path) -> list[Path]:
    """The directory of a run itself, or those of the runs that it holds."""
    inner = sorted(metrics.parent for metrics in path.glob('*/metrics.jsonl'))
    return inner if inner and not (path / 'metrics.jsonl').exists() else [path]


def parse_args() -> argparse.Namespace:
    """The program's flags."""
    parser = flags.Parser('Compare runs in a table.', 'RUN ...')
    parser.add_argument('runs', metavar='RUN', nargs='+', type=Path, help='output directories of runs, finished or going on')
    return parser.parse_args()


def main() -> None:
    """Print the table; what cannot be read is named on a line of its own and makes the status 2."""
    rows, mistakes = [HEADER], []
    found = [RunFiles(directory) for path in parse_args().runs for directory in runs_in(path)]
    names = Counter(run.name for run in found)
    for run in found:
        try:
            rows.append(row(run, run.name if names[run.name] == 1 else str(run.path)))
        except flags.UserError as error:
            mistakes.append(str(error))
    if len(rows) > 1:
        print(aligned(rows), flush=True)
    for mistake in mistakes[:-1]:
        print(f'table.py: error: {mistake}', file=sys.stderr)
    if mistakes:
        raise flags.UserError(mistakes[-1])


if __name__ == '__main__':
    flags.run_program(main, goes_on=False)
