"""Write one HTML page about a run, finished or going on: what was found, how good it is, figures, timings, arguments.

    python tools/report.py exp/search_cifar10                          # writes exp/search_cifar10/report.html
    python tools/report.py exp                                         # a page for every run below it
    python tools/report.py exp/mine -o mine.html

A page is one file that opens offline. Needs matplotlib, and Graphviz for drawings of the cells (else they are text).
"""

import argparse
import re
from datetime import datetime, timedelta, timezone
from html import escape
from pathlib import Path

import draw
import plot
import runs
from runs import RunFiles, Series

import flags
from architecture import Architecture

STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; color: #222; max-width: 1320px; margin: 1.2rem auto; padding: 0 1rem }
h1 { font-size: 1.7rem; margin: 0; overflow-wrap: anywhere }
h1 + p { margin: 0.1rem 0 0.8rem; color: #555 }
h2 { font-size: 1.25rem; margin: 1.6rem 0 0.6rem; border-bottom: 1px solid #ccc }
h3 { font-size: 1rem; margin: 1.1rem 0 0.4rem }
code, pre { font: 13px/1.4 ui-monospace, monospace; overflow-wrap: anywhere }
pre { background: #f5f5f5; padding: 0.8rem; overflow-x: auto }
.tiles { display: flex; flex-wrap: wrap; gap: 0.6rem }
.tiles div { flex: 1 1 8.5rem; background: #f2f5f9; padding: 0.5rem 0.8rem }
.tiles b { display: block; font-size: 1.3rem; white-space: nowrap }
.tiles span { display: block; font-size: 0.85rem; line-height: 1.25; color: #555 }
.facts { margin: 0.7rem 0 0; font-size: 0.9rem }
.facts span { display: inline-block; margin-right: 1.4rem }
.facts b { font-weight: normal; color: #777 }
.cells, .figures { display: flex; flex-wrap: wrap; gap: 0.8rem; align-items: flex-start }
.cells div { overflow-x: auto }
.cells + p { margin: 0.4rem 0 0 }
.figures div { flex: 1 1 360px }
.figures svg, .cells svg { width: 100%; height: auto; display: block }
.flags { columns: 2 420px; column-gap: 2rem; font-size: 0.9rem }
.flags div { break-inside: avoid; padding: 0.1rem 0.4rem; border-left: 4px solid transparent }
.flags .changed { background: #fff3d6; border-color: #e69f00 }
.flags i, .flags code + code { color: #555 }
table { border-collapse: collapse }
th { text-align: left; font-weight: normal; color: #555; padding-right: 1.5rem }
"""
SHOWN = 5  # architectures that are drawn
NARROWEST = 0.72  # of its own size, to which a drawing of a cell shrinks before it is scrolled


def inline_svg(svg: bytes) -> str:
    """An SVG file as an element of a page: without the XML header and metadata, which name addresses on the web."""
    text = svg.decode()
    text = text[text.index('<svg'):]
    start, end = text.find('<metadata>'), text.find('</metadata>')
    return text if start < 0 else text[:start] + text[end + len('</metadata>'):]


def breaking(name: str) -> str:
    """A flag's name as HTML that may be broken behind each _."""
    return escape(name).replace('_', '_<wbr>')


def table(rows: list[tuple[str, str]]) -> str:
    """Two columns of text."""
    cells = ''.join(f'<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>\n' for name, value in rows)
    return f'<table>\n{cells}</table>'


def drawn(arch: Architecture) -> str:
    """An architecture's cells side by side, at one scale, drawn where Graphviz is installed, else as text."""
    if draw.missing_graphviz():
        return f'<pre>{escape(draw.describe_cells(arch))}</pre>'
    cells = []
    for name, cell in arch._asdict().items():
        svg = inline_svg(draw.render('svg', **{name: cell}))
        width = int(re.search(r'width="(\d+)pt"', svg).group(1))
        narrow = round(NARROWEST * width)
        svg = re.sub(r'width="\d+pt" height="\d+pt"', f'style="min-width: {narrow}px"', svg, count=1)
        cells.append(f'<div style="flex: {width} 1 {narrow}px; max-width: {width}px">{svg}</div>')
    return f'<div class="cells">{"".join(cells)}</div>'


def found(run: RunFiles) -> list[str]:
    """The architectures that the run has found, or trains, best first, each with its cells."""
    title = '' if not run.is_search else 'the best so far: '
    return [f'<h3>{title * (not index)}{escape(how_good)}</h3>\n{drawn(arch)}\n<p><code>{arch}</code></p>'
            for index, (how_good, arch) in enumerate(run.found[:SHOWN])]


def tiles(run: RunFiles) -> list[tuple[str, str]]:
    """What a reader wants to know first, as (value, what it is)."""
    error, last = run.best_error, run.last_error
    parameters, madds = map('{:,}'.format, run.sizes) if run.found else ('-', '-')
    accuracy = None if error is None else 100 - error
    which = f'top-1 accuracy on the {run.judged_on}' + ('' if last is None else f'; last epoch {100 - last:.2f} %')
    hours = '-' if run.seconds is None else str(timedelta(seconds=round(run.seconds)))
    return [(runs.percent(accuracy), which), (runs.percent(error), 'top-1 error'),
            (parameters, 'parameters, without the auxiliary head'), (madds, 'multiply-adds of one image'),
            (run.progress, f'{run.unit}s done'), (hours, 'computed, h:mm:ss')]


def facts(run: RunFiles) -> list[tuple[str, str]]:
    """Date, commit and machine, as far as the run has recorded them."""
    written = datetime.fromtimestamp((run.path / 'metrics.jsonl').stat().st_mtime, timezone.utc)
    start = run.start
    return [('started', str(start.get('date', 'not recorded')).replace('T', ' ').replace('+00:00', ' UTC')),
            ('last record', f'{written:%Y-%m-%d %H:%M:%S} UTC'), ('commit', str(start.get('commit') or 'not recorded')),
            ('machine', '; '.join(str(part) for part in (
                start.get('processor') or 'processor not recorded',
                start.get('environment') or run.checkpoint.get('environment') or 'device not recorded')))]


def timings(run: RunFiles) -> list[tuple[str, str]]:
    """How long the run took for each kind of work, and how fast it was."""
    rows = [(name, str(timedelta(seconds=round(seconds)))) for name, seconds in run.seconds_by_kind.items()]
    speeds = [record['train']['images_per_second'] for record in run.records('epoch')]
    if speeds:
        rows.append(('training speed', f'{sorted(speeds)[len(speeds) // 2]:.0f} images/s (median of the epochs)'))
    return rows


def arguments(run: RunFiles) -> str:
    """The flags, those first and marked that differ from their defaults, where the run has recorded which do."""
    parts: dict[bool, list[str]] = {True: [], False: []}
    for name, value in sorted(run.args.items()):
        changed = name in run.start.get('changed', ())
        parts[changed].append(f'<div{" class=changed" * changed}><code>--{breaking(name)}</code> <code>{breaking(str(value))}'
                              '</code></div>')
    return f'<div class="flags">{"".join(parts[True] + parts[False])}</div>'


def figures(run: RunFiles) -> str:
    """What plot.py draws of the run, each panel for itself, so that a narrow page shows them below each other."""
    parts = []
    for row in plot.rows_of(plot.parts_of([Series(run.name, [run])])):
        width = plot.SIZE[0] * min(1.5, 3 / len(row))
        panels = (inline_svg(plot.render(plot.figure([[part]], width), 'svg')) for part in row)
        parts.append('<div class="figures">' + ''.join(
            f'<div style="max-width: {90 * width:.0f}px">{panel}</div>\n' for panel in panels) + '</div>')
    return '\n'.join(parts)


def page(run: RunFiles) -> str:
    """The page as HTML. Raises UserError."""
    first, *others = found(run) or ['<p>No architecture yet: the first scoring is to come.</p>']
    sections = [('Figures', figures(run)), ('The next best', '\n'.join(others)),
                ('Timings', table(timings(run))), ('Arguments, those that differ from the defaults first', arguments(run))]
    body = '\n'.join(f'<h2>{title}</h2>\n{content}' for title, content in sections if content)
    shown = ''.join(f'<div><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in tiles(run))
    known = ''.join(f'<span><b>{name}</b> {escape(value)}</span> ' for name, value in facts(run))
    return (f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(run.name)}</title>\n'
            f'<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(run.name)}</h1>\n<p>{escape(run.kind)} on '
            f'{escape(run.dataset)}</p>\n<div class="tiles">{shown}</div>\n<p class="facts">{known}</p>\n{first}\n{body}\n'
            '</body>\n</html>\n')


def parse_args() -> argparse.Namespace:
    """The program's flags."""
    parser = flags.Parser('Write an HTML page about each run.', 'RUN ...')
    runs.add_runs(parser)
    parser.add_argument('-o', '--output', type=Path, metavar='FILE', help='what to write (default: report.html in RUN)')
    return parser.parse_args()


def main() -> None:
    """Write the pages."""
    args = parse_args()
    mistakes: list[str] = []
    found = runs.find(args.runs, mistakes)
    if args.output and len(found) > 1:
        raise flags.UserError(f'-o {args.output} is one page, but {len(found)} runs are named; without -o each gets its own '
                              'report.html')
    for run in found:
        runs.succeeds(mistakes, lambda run=run: runs.write(args.output or run.path / 'report.html', page(run)))
    runs.name_mistakes(mistakes)


if __name__ == '__main__':
    runs.run_tool(main)
