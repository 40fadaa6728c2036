"""Plot what runs have written to metrics.jsonl so far: trainings, searches, or several of them in the same axes.

    python tools/plot.py exp/NAONet_A_36_cifar10 -o training.png       # accuracy, loss, learning rate
    python tools/plot.py exp/search_cifar10 -o search.svg              # also each round's accuracies and the controller
    python tools/plot.py exp/first exp/second -o both.pdf              # compare
    python tools/plot.py exp/seeds -o seeds.png                        # .../seed0, .../seed1, ...: their mean, with a band

A band is one standard deviation to either side. Where few values, such as those of the first epochs, would take more than half
of an axis, they are left out and named in a corner. Needs the package matplotlib.
"""

import argparse
import io
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import runs
from runs import RunFiles, Series

import flags

Axes = Any  # matplotlib's, which is optional and imported late
COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#000000', '#999999')  # told apart by all eyes
SIZE = 4.8, 3.3  # of a panel, in inches
STYLES = '-', '--', ':'  # of the curves of a run
FEW = 30  # points of a curve that get a mark each
STYLE = {'font.size': 10, 'axes.titlesize': 11, 'axes.titleweight': 'bold', 'axes.titlelocation': 'left', 'axes.grid': True,
         'grid.alpha': 0.3, 'axes.axisbelow': True, 'axes.spines.top': False, 'axes.spines.right': False,
         'legend.frameon': False, 'legend.fontsize': 9}


def literal(name: str) -> str:
    """A name as matplotlib must be told it to show it as it is: no formula between $, not hidden by a leading _."""
    return (' ' if name.startswith('_') else '') + name.replace('$', r'\$')


class Line(NamedTuple):
    """A series as a figure shows it."""

    colour: str
    series: Series

    @property
    def label(self) -> str:
        """Its name, as matplotlib must be told it."""
        return literal(self.series.label)


class Panel(NamedTuple):
    """What shows one thing about all series whose runs have recorded enough of it."""

    enough: Callable[[RunFiles], Any]
    draw: Callable[[Axes, list[Line]], None]
    apart: bool = False  # each series in axes of its own, side by side


def frame(values: list[float], few: int) -> tuple[float, float]:
    """The lowest and the highest value, without those of the `few` at an end that would take most of the range."""
    ordered = sorted(values)
    low, high, few = ordered[0], ordered[-1], min(few, (len(ordered) - 1) // 2)
    if high - ordered[few] < (high - low) / 4:
        low = ordered[few]
    if ordered[-1 - few] - low < (high - low) / 4:
        high = ordered[-1 - few]
    return low, high


def finish(axes: Axes, title: str, x: str, y: str, curves: Iterable[list[float]], most: float = np.inf,
           share: int = 10) -> None:
    """Title, names and limits of the axes, and a legend under the title, where it covers nothing.

    The limits are within 0 and `most`, and leave out at most one in `share` values of each curve, see `frame`.
    """
    curves = [finite for values in curves if (finite := [value for value in values if np.isfinite(value)])] or [[0.0]]
    values = [*itertools.chain(*curves)]
    lows, highs = zip(*(frame(of_one, max(1, len(of_one) // share)) for of_one in curves), strict=True)
    margin = 0.07 * (max(highs) - min(lows)) or 0.05 * max(highs) or 1.0
    low, high = max(0.0, min(lows) - margin), min(most, max(highs) + margin)
    axes.set(xlabel=x, ylabel=y, ylim=(low, high))
    for outside, name, value, height, side in ((min(values) < low, 'lowest', min(values), 0.02, 'bottom'),
                                               (max(values) > high, 'highest', max(values), 0.98, 'top')):
        if outside:
            axes.text(0.99, height, f'{name}: {value:.3g}', transform=axes.transAxes, ha='right', va=side, fontsize=8,
                      color='#666666')
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, loc='lower left', bbox_to_anchor=(-0.01, 1), borderaxespad=0, ncols=4, handlelength=1.8,
                    columnspacing=1.2)
    axes.set_title(title)


def count_from_left(axes: Axes) -> None:
    """Let axes have whole numbers below them, unless they have words, and some width even with a single point."""
    from matplotlib.ticker import FixedLocator, MaxNLocator
    if not isinstance(axes.xaxis.get_major_locator(), FixedLocator):
        axes.xaxis.set_major_locator(MaxNLocator('auto', integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    if axes.dataLim.width < 1:  # a single epoch so far
        axes.set_xlim(axes.dataLim.x0 - 0.9, axes.dataLim.x1 + 0.9)


def curve(axes: Axes, line: Line, points: list[list[tuple[float, float]]], **style: Any) -> list[list[float]]:
    """Plot curves of (x, y), one a run, as their mean with a band of one standard deviation; returns the band's edges."""
    points = [of_run for of_run in points if of_run]
    at = defaultdict(list)
    for x, y in itertools.chain(*points):
        at[x].append(y)
    xs = sorted(x for x in at if len(at[x]) == len(points)) or sorted(at)  # where all runs are, if they are anywhere
    means = np.array([np.mean(at[x]) for x in xs])
    bands = np.array([np.std(at[x], ddof=1) if len(at[x]) > 1 else 0 for x in xs])
    axes.plot(xs, means, color=line.colour, marker='o' if len(xs) < FEW else None, markersize=4, **style)
    if bands.any():
        axes.fill_between(xs, means - bands, means + bands, color=line.colour, alpha=0.2, linewidth=0)
    return [(means - bands).tolist(), (means + bands).tolist()]


def curves(title: str, kind: str, x: str, y: str, most: float = np.inf,
           **of_record: Callable[[dict], float | None]) -> Callable[[Axes, list[Line]], None]:
    """What draws curves of records of a kind, each series in its colour, each thing that they tell in a style of its own.

    x: the axis's name, and the field of a record, if it has one of that name, else a record's number, from 1.
    """
    def draw(axes: Axes, of: list[Line]) -> None:
        values: dict[str, list[list[float]]] = {}
        for name, read in of_record.items():
            style = {'linestyle': STYLES[len(values)], 'markerfacecolor': 'white'} if values else {}
            for line in of:
                points = [[(record.get(x, number), read(record)) for number, record in enumerate(run.records(kind), start=1)
                           if read(record) is not None] for run in line.series.runs]
                if any(points):
                    values.setdefault(name, []).extend(curve(axes, line, points, **style))
            if name in values:
                axes.plot([], [], color='#444444' if len(of) > 1 else of[0].colour, label=name.replace('_', ' '), **style)
        if len(values) < 2:
            axes.lines[-1].set_label(None)
        if axes.collections:  # a band
            axes.fill_between([], [], [], color='#444444' if len(of) > 1 else of[0].colour, alpha=0.2, linewidth=0,
                              label='± deviation of ' + ('seeds' if len(of) > 1 else f'{len(of[0].series.runs)} seeds'))
        alone = next(iter(values), '') if len(of_record) > 1 and len(values) == 1 else ''
        finish(axes, f'{alone} {title}'.strip(), x, y, itertools.chain(*values.values()), most)
    return draw


def pools(axes: Axes, of: list[Line], among: list[Line]) -> None:
    """How accurate the architectures of each round were, as violins, with the median and the best so far.

    among: all series, side by side with this one, that it is to be compared with.
    """
    line, = of
    at, best = defaultdict(list), []
    for run in line.series.runs:
        for record in run.records('score'):
            at[record['epoch']] += [100 * accuracy for accuracy in record['accuracies']]
        so_far = itertools.accumulate((100 * max(record['accuracies']) for record in run.records('score')), max)
        best.append([(record['epoch'], value) for record, value in zip(run.records('score'), so_far, strict=True)])
    width = 0.7 * min((b - a for a, b in itertools.pairwise(sorted(at))), default=1)
    for body in axes.violinplot([*at.values()], [*at], widths=width, showextrema=False)['bodies']:
        body.set(facecolor=line.colour, alpha=0.3)
    axes.scatter([*at], [np.median(values) for values in at.values()], marker='_', s=120, color=line.colour, label='median')
    curve(axes, line._replace(colour='#222222'), best, label='best so far')
    axes.set_xlim(min(at) - width, max(at) + width)
    if len(at) <= 10:
        axes.set_xticks([*at])
    finish(axes, f'{line.label}: the pool, round by round', line.series.runs[0].unit, 'validation accuracy (%)',
           [[100 * accuracy for accuracy in record['accuracies']] for line in among for run in line.series.runs
            for record in run.records('score')], 100, share=40)


def new_per_lambda(axes: Axes, of: list[Line]) -> None:
    """How many new architectures each step size λ gave, over all rounds; a run's mean where there are several."""
    counts = [Counter() for _ in of]
    for count, line in zip(counts, of, strict=True):
        for run in line.series.runs:
            for record in run.records('new'):
                count.update({float(step): number / len(line.series.runs) for step, number in record['per_lambda'].items()})
    steps = sorted(set().union(*counts))
    for index, (count, line) in enumerate(zip(counts, of, strict=True)):
        places = [place + 0.8 * ((index + 0.5) / len(of) - 0.5) for place in range(len(steps))]
        axes.bar(places, [count[step] for step in steps], width=0.8 / len(of), color=line.colour)
    shown = range(0, len(steps), -(-len(steps) // 12))
    axes.set_xticks([*shown], [f'{steps[place]:g}' for place in shown])
    finish(axes, 'new architectures by step size', 'step size λ', 'architectures', [])
    axes.set_ylim(0, 1.07 * max(itertools.chain(*(count.values() for count in counts))))


def ranking(axes: Axes, of: list[Line]) -> None:
    """The accuracy that each of a search's best reached when it was trained from scratch, by its place in the pool."""
    values = []
    for line in of:
        places, found = zip(*((record['index'] + 1, 100 * record['accuracy'])
                              for run in line.series.runs for record in run.ranked), strict=True)
        axes.scatter(places, found, color=line.colour, s=36)
        values.append(found)
    finish(axes, 'the best, trained from scratch', 'place in the pool', 'validation accuracy (%)', values, 100)


def pareto(axes: Axes, of: list[Line]) -> None:
    """Accuracy against multiply-adds: the pool as it was last measured, and those that no other of it beats in both."""
    values = []
    for line in of:
        for run in line.series.runs:
            for record in run.records('score')[-1:]:
                costs = [cost / 1e6 for cost in record.get('multiply_adds', ())]  # which older versions did not record
                values.append([100 * accuracy for accuracy in record['accuracies']][:len(costs)])
                axes.scatter(costs, values[-1], color=line.colour, s=12, alpha=0.3, linewidth=0)
            accuracies, madds = zip(*((100 * accuracy, cost / 1e6) for accuracy, cost in run.pareto), strict=True)
            axes.plot(madds, accuracies, 'o-', drawstyle='steps-post', color=line.colour, markersize=4)
            values.append(accuracies)
    finish(axes, 'accuracy and cost: the Pareto front', 'multiply-adds of the network to be trained in the end (millions)',
           'validation accuracy (%)', values, 100, share=40)


def several(kind: str) -> Callable[[RunFiles], bool]:
    """Whether a run has recorded more than one of a kind: a single one is no curve."""
    return lambda run: len(run.records(kind)) > 1


PANELS = (
    Panel(lambda run: run.records('epoch'), curves(
        'accuracy', 'epoch', 'epoch', 'top-1 accuracy (%)', 100, test=lambda record: record.get('test', {}).get('top1'),
        validation=lambda record: record.get('valid', {}).get('top1'),
        training=lambda record: record['train']['top1'])),
    Panel(several('epoch'), curves(
        'loss', 'epoch', 'epoch', 'loss', test=lambda record: record.get('test', {}).get('loss'),
        validation=lambda record: record.get('valid', {}).get('loss'),
        training=lambda record: record['train']['loss'])),
    Panel(several('epoch'), curves('learning rate', 'epoch', 'epoch', 'learning rate', rate=lambda record: record['lr'])),
    Panel(lambda run: run.records('score'), pools, apart=True),
    Panel(several('controller'), curves(
        'controller, on the pool it was fitted to', 'controller', 'fit', 'share', 1,
        pairwise_accuracy=lambda record: record['pairwise_accuracy'],
        Hamming_distance=lambda record: record['hamming_distance'])),
    Panel(lambda run: len({step for record in run.records('new') for step in record['per_lambda']}) > 1, new_per_lambda),
    Panel(lambda run: len(run.ranked) > 1, ranking),
    Panel(lambda run: run.pareto, pareto),
)


Part = tuple[Callable[[Axes, list[Line]], None], list[Line]]  # what draws into axes of its own, and what of


def parts_of(of: list[Series]) -> list[Part]:
    """What there is to draw of series. Raises UserError where runs are damaged, or matplotlib is absent."""
    runs.need('matplotlib')
    lines, parts = [Line(COLOURS[index % len(COLOURS)], series) for index, series in enumerate(of)], []
    for panel in PANELS:
        having = [line._replace(series=line.series.having(panel.enough)) for line in lines]
        having = [line for line in having if line.series.runs]
        if panel.apart:
            parts += [(partial(panel.draw, among=having), [line]) for line in having]
        elif having:
            parts.append((panel.draw, having))
    return parts


def rows_of(parts: list[Part], columns: int = 3) -> list[list[Part]]:
    """Parts in as few rows as that takes, of lengths that differ by one at most."""
    count, rest = -(-len(parts) // columns), iter(parts)
    return [[*itertools.islice(rest, len(parts) // count + (row < len(parts) % count))] for row in range(count)]


def figure(rows: list[list[Part]], width: float = SIZE[0]) -> Any:
    """A matplotlib Figure of rows of parts, which are all full; width: of a part of the longest row, in inches."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(width * max(map(len, rows)), SIZE[1] * len(rows)), layout='constrained')
        drawing.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        grid = drawing.add_gridspec(len(rows), 12)
        for row, parts in enumerate(rows):
            wide = 12 // len(parts)
            of_row = [drawing.add_subplot(grid[row, wide * place:wide * (place + 1)]) for place in range(len(parts))]
            for axes, (draw, having) in zip(of_row, parts, strict=True):
                draw(axes, having)
                count_from_left(axes)
            for axes in of_row:  # on one line, whether under it is a legend or not
                axes.set_title(axes.get_title('left'), pad=20 if any(axes.get_legend() for axes in of_row) else 6)
        lines = {line.colour: line.label for parts in rows for _, having in parts for line in having}
        if len(lines) > 1:
            drawing.legend([Line2D([], [], color=colour, linewidth=3) for colour in lines], [*lines.values()],
                           loc='outside lower center', ncols=min(4, len(lines)))
    return drawing


def render(drawing: Any, form: str) -> bytes:
    """A figure as 'png', 'svg' or 'pdf'; the same figure is the same bytes."""
    import matplotlib
    buffer = io.BytesIO()
    with matplotlib.rc_context({'svg.hashsalt': 'nao'}):
        drawing.savefig(buffer, format=form, dpi=130, metadata={'svg': {'Date': None}, 'pdf': {'CreationDate': None}}.get(form))
    return buffer.getvalue()


def parse_args() -> argparse.Namespace:
    """The program's flags."""
    parser = flags.Parser('Plot what runs have recorded so far.', 'RUN ...')
    runs.add_runs(parser)
    parser.add_argument('-o', '--output', type=Path, metavar='FILE', default=Path('plot.png'),
                        help='what to write: FILE.png, FILE.svg or FILE.pdf')
    return parser.parse_args()


def main() -> None:
    """Write the figure."""
    args = parse_args()
    mistakes: list[str] = []
    form, found = runs.format_of(args.output), runs.find(args.runs, mistakes)
    readable = [run for run in found if runs.succeeds(mistakes, lambda run=run: run.metrics)]
    if readable:
        runs.write(args.output, render(figure(rows_of(parts_of(runs.series_of(readable, args.all)))), form))
    runs.name_mistakes(mistakes)


if __name__ == '__main__':
    runs.run_tool(main)
