"""Plot what runs have written to metrics.jsonl so far: trainings, searches, or several of them in the same axes.

    python tools/plot.py exp/NAONet_A_36_cifar10 -o training.png       # accuracy, loss, learning rate
    python tools/plot.py exp/search_cifar10 -o search.svg              # also each round's accuracies and the controller
    python tools/plot.py exp/first exp/second -o both.pdf              # compare

Needs the package matplotlib.
"""

import argparse
import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import runs
from runs import RunFiles

import flags

FORMATS = ('png', 'svg', 'pdf')
Axes = Any  # matplotlib's, which is optional and imported late
Panel = Callable[[Axes, list[RunFiles]], None]


def curves(axes: Axes, run: RunFiles, kind: str, x: str, ys: dict[str, Callable[[dict], float]], colour: str) -> None:
    """Plot curves of a run's records of a kind, each named in `ys`; the first is solid, the second dashed."""
    records = run.records(kind)
    of_name = {name: [(record[x], y(record)) for record in records if y(record) is not None] for name, y in ys.items()}
    of_name = {name: points for name, points in of_name.items() if points}
    for style, (name, points) in zip(('-', '--'), of_name.items(), strict=False):
        axes.plot(*zip(*points, strict=True), style, color=colour, label=f'{run.name} {name.replace("_", " ")}'.strip(),
                  marker='o' if len(points) < 30 else None, markersize=4)


def by_run(title: str, unit: str, kind: str, x: str = 'epoch', **ys: Callable[[dict], float]) -> Panel:
    """A panel of curves over epochs, each run in a colour of its own."""
    def panel(axes: Axes, of: list[RunFiles]) -> None:
        for index, run in enumerate(of):
            curves(axes, run, kind, x, ys, f'C{index}')
        axes.set(title=title, xlabel=of[0].unit, ylabel=unit)
        axes.legend(fontsize='small')
    return panel


def round_accuracies(axes: Axes, of: list[RunFiles]) -> None:
    """Each round's distribution of accuracies as a violin, the best of the round, and the best so far as a line."""
    for index, run in enumerate(of):
        scores = run.records('score')
        epochs = [record['epoch'] for record in scores]
        widths = 0.6 * min((b - a for a, b in itertools.pairwise(epochs)), default=1)
        parts = axes.violinplot([[100 * accuracy for accuracy in record['accuracies']] for record in scores], epochs,
                                widths=widths, showmedians=True)
        for body in parts['bodies']:
            body.set_facecolor(f'C{index}')
        for name in ('cmins', 'cmaxes', 'cbars', 'cmedians'):
            parts[name].set(color=f'C{index}', linewidth=1)
        best = [100 * max(max(record['accuracies']) for record in scores[:count + 1]) for count in range(len(scores))]
        axes.plot(epochs, best, 'k.-' if len(of) == 1 else f'C{index}.-', label=f'{run.name}: best so far')
    axes.set(title='accuracies of the pool, round by round', xlabel=of[0].unit, ylabel='validation accuracy (%)')
    axes.legend(fontsize='small')


def new_per_lambda(axes: Axes, of: list[RunFiles]) -> None:
    """How many new architectures each step size λ gave, the rounds stacked."""
    bars = [(f'{run.name}, {run.unit} {record["epoch"]}', record['per_lambda']) for run in of for record in run.records('new')]
    lambdas = sorted({int(step) for _, counts in bars for step in counts})
    below = [0] * len(lambdas)
    for name, counts in bars:
        heights = [counts.get(str(step), 0) for step in lambdas]
        axes.bar([str(step) for step in lambdas], heights, bottom=below, label=name)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.set(title='new architectures by step size', xlabel='λ', ylabel='architectures')
    axes.legend(fontsize='small')


def ranking(axes: Axes, of: list[RunFiles]) -> None:
    """The accuracy that each of a search's best reached when it was trained from scratch."""
    for index, run in enumerate(of):
        records = run.records('rank')
        places = [record['index'] + 1 + 0.8 * ((index + 0.5) / len(of) - 0.5) for record in records]
        axes.bar(places, [100 * record['accuracy'] for record in records], width=0.8 / len(of), label=run.name)
    axes.set(title='the best, trained from scratch', xlabel='place in the pool', ylabel='validation accuracy (%)')
    axes.legend(fontsize='small')


PANELS: tuple[tuple[str, Panel], ...] = (  # a panel is drawn for the runs that have records of its kind
    ('epoch', by_run('accuracy', 'top-1 accuracy (%)', 'epoch', test=lambda record: record.get('test', {}).get('top1'),
                     train=lambda record: record['train']['top1'])),
    ('epoch', by_run('loss', 'loss', 'epoch', test=lambda record: record.get('test', {}).get('loss'),
                     train=lambda record: record['train']['loss'])),
    ('epoch', by_run('learning rate', 'learning rate', 'epoch', _=lambda record: record['lr'])),
    ('score', round_accuracies),
    ('controller', by_run('controller', 'on the pool it was fitted to', 'controller', 'search_epoch',
                          pairwise_accuracy=lambda record: record['pairwise_accuracy'],
                          Hamming_distance=lambda record: record['hamming_distance'])),
    ('new', new_per_lambda),
    ('rank', ranking),
)


def figure(of: list[RunFiles], columns: int = 3) -> Any:
    """A matplotlib Figure with a panel for everything that the runs have recorded. Raises UserError."""
    runs.need('matplotlib')
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    panels = [(panel, having) for kind, panel in PANELS if (having := [run for run in of if run.records(kind)])]
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    drawing = Figure(figsize=(5 * columns, 3.6 * rows), layout='constrained')
    grid = list(drawing.subplots(rows, columns, squeeze=False).flat)
    for (panel, having), axes in zip(panels, grid, strict=False):
        panel(axes, having)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.margins(y=0.2)  # room for the legend
        if axes.dataLim.width < 1:  # a single epoch or λ so far
            axes.set_xlim(axes.dataLim.x0 - 1, axes.dataLim.x1 + 1)
        axes.spines[['top', 'right']].set_visible(False)
        if panel is not new_per_lambda:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in grid[len(panels):]:
        axes.set_axis_off()
    return drawing


def render(drawing: Any, form: str) -> bytes:
    """A figure as 'png', 'svg' or 'pdf'."""
    buffer = io.BytesIO()
    drawing.savefig(buffer, format=form, dpi=130)
    return buffer.getvalue()


def parse_args() -> argparse.Namespace:
    """The program's flags."""
    parser = flags.Parser('Plot what runs have recorded so far.', 'RUN ...')
    parser.add_argument('runs', metavar='RUN', nargs='+', type=Path, help='output directories of runs, finished or going on')
    parser.add_argument('-o', '--output', type=Path, metavar='FILE', default=Path('plot.png'),
                        help='what to write: FILE.png, FILE.svg or FILE.pdf')
    return parser.parse_args()


def main() -> None:
    """Write the figure."""
    args = parse_args()
    form = args.output.suffix[1:].lower()
    if form not in FORMATS:
        raise flags.UserError(f'-o {args.output}: must end in .png, .svg or .pdf')
    runs.write(args.output, render(figure([RunFiles(path) for path in args.runs]), form))


if __name__ == '__main__':
    flags.run_program(main, goes_on=False)
