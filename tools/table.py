"""Compare runs, finished or going on: a row each, beside the published error of the same network.

    python tools/table.py exp                  # every run below it; or some of them: exp/first exp/second
    python tools/table.py --all exp            # runs that differ in their seeds in a row each

Runs in .../seed0, .../seed1 and so on are one row: mean ± standard deviation. The error of a training is the best on the test
images, which chose the epoch; the one of the last epoch stands beside it. With --holdout, it is the one look at the test images
when that has been; `valid` marks errors on images held out from training. A search's error is that of its best architecture on
its validation split; its sizes are those of that architecture's network as the search trains it from scratch.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import runs
from runs import RunFiles, Series

import flags
from architecture import PUBLISHED, parse

PUBLISHED_ERRORS = {  # (architecture, data set, layers, channels) -> top-1 error in per cent (papers and their repository)
    ('NAONet_A', 'cifar10', 6, 36): 2.48,
    ('NAONet_A', 'cifar10', 6, 128): 1.93,
    ('NAONet_B', 'cifar10', 6, 36): 2.93,
    ('NAONet_A', 'imagenet', 4, 42): 25.7,
    ('NAONet_V2', 'cifar10', 6, 36): 2.57,
    ('NAONet_V2', 'imagenet', 4, 52): 25.5,
}
UNKNOWN = '-'
NUMBERS = range(2, 9)  # the columns that are set flush right


def arch_name(run: RunFiles) -> str:
    """The architecture that a run trains or has found so far, by its published name if it has one."""
    arch = run.found[0][1] if run.found else None
    return next((name for name, line in PUBLISHED.items() if arch == parse(line)), str(arch or UNKNOWN))


def published(run: RunFiles) -> float | None:
    """The published error of a training's network in per cent, if there is one."""
    if run.is_search:
        return None
    return PUBLISHED_ERRORS.get((arch_name(run), run.dataset, run.args['layers'], run.args['channels']))


def number(form: str, unit: str = '', measured: bool = True) -> Callable[[list], str]:
    """What shows the numbers of a series' runs: the only one, or mean ± standard deviation; `measured` ones even if it is 0."""
    def show(values: list) -> str:
        if None in values:
            return UNKNOWN
        spread = len(values if measured else set(values)) > 1
        parts = [statistics.fmean(values), *([statistics.stdev(values)] if spread else [])]
        return ' ± '.join(form.format(round(part) if form == '{:,}' else part) for part in parts) + unit
    return show


def text(values: list[str]) -> str:
    """What shows the words of a series' runs: theirs if they agree."""
    different = list(dict.fromkeys(values))
    return different[0] if len(different) == 1 else f'{len(different)} different'


def extent(values: list[str]) -> str:
    """What shows how far a series' runs are, such as '3/600', '3-5/600'."""
    done, totals = zip(*(value.split('/') for value in values), strict=True)
    first, last = min(done, key=int), max(done, key=int)
    return (first if first == last else f'{first}-{last}') + '/' + text(list(totals))


COLUMNS: tuple[tuple[str, Callable[[RunFiles], Any], Callable[[list], str]], ...] = (  # title, of a run, of a series
    ('data', lambda run: run.dataset, text),
    ('parameters', lambda run: run.sizes[0] if run.found else None, number('{:,}', measured=False)),
    ('multiply-adds', lambda run: run.sizes[1] if run.found else None, number('{:,}', measured=False)),
    ('top-1 error', lambda run: run.best_error, number('{:.2f}', ' %')),
    ('last epoch', lambda run: run.last_error, number('{:.2f}', ' %')),
    ('published', published, number('{:.2f}', ' %', measured=False)),
    ('epochs', lambda run: run.progress, extent),
    ('hours', lambda run: None if run.seconds is None else run.seconds / 3600, number('{:.2f}')),
    ('architecture', arch_name, text),
)
HEADER = ('run', *(title for title, _, _ in COLUMNS))


def row(series: Series) -> list[str]:
    """A series' row; raises UserError where a run has not written what it needs."""
    cells = {title: show([of(run) for run in series.runs]) for title, of, show in COLUMNS}
    if len({(run.judged_on, bool(run.ranked)) for run in series.runs}) > 1:  # some are not as far as others
        cells['top-1 error'] = UNKNOWN
    elif series.runs[0].judged_on == runs.VALID and cells['top-1 error'] != UNKNOWN:
        cells['top-1 error'] += ' valid'
    if series.runs[0].unit == 'round':
        cells['epochs'] += ' rounds'
    return [series.label, *cells.values()]


def aligned(rows: list[list[str]]) -> str:
    """The rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ['  '.join(cell.rjust(width) if index in NUMBERS else cell.ljust(width)
                       for index, (cell, width) in enumerate(zip(cells, widths, strict=True))).rstrip() for cells in rows]
    return '\n'.join(lines)


def parse_args() -> argparse.Namespace:
    """The program's flags."""
    parser = flags.Parser('Compare runs in a table.', 'RUN ...')
    runs.add_runs(parser)
    return parser.parse_args()


def main() -> None:
    """Print the table; what cannot be read is named on a line of its own and makes the status 2."""
    args = parse_args()
    rows, mistakes = [[*HEADER]], []
    for series in runs.series_of(runs.find(args.runs, mistakes), args.all):
        readable = series.having(lambda run: runs.succeeds(mistakes, lambda: (run.metrics, run.found and run.sizes)))
        if readable.runs:
            rows.append(row(readable))
    if len(rows) > 1:
        print(aligned(rows), flush=True)
    runs.name_mistakes(mistakes)


if __name__ == '__main__':
    runs.run_tool(main)
