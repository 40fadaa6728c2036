"""Write one HTML page about a run, finished or going on: figures, what was found, arguments, environment, timings.

    python tools/report.py exp/search_cifar10                          # writes exp/search_cifar10/report.html
    python tools/report.py exp/mine -o mine.html

The page is one file that opens offline. Needs matplotlib, and Graphviz for drawings of the cells (else they are text).
"""

import argparse
from datetime import timedelta
from html import escape
from pathlib import Path

import draw
import plot
import runs
from runs import RunFiles

import flags
from architecture import Architecture

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1200px; margin: 2rem auto; padding: 0 1rem }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc }
svg { max-width: 100%; height: auto } code, pre { font-size: 14px } code { overflow-wrap: anywhere }
pre { background: #f5f5f5; padding: 0.8rem; overflow-x: auto }
table { border-collapse: collapse } td, th { padding: 0.15rem 1rem 0.15rem 0; text-align: left; vertical-align: top }
td { overflow-wrap: anywhere }
"""
SHOWN = 5  # architectures that are drawn


def inline_svg(svg: bytes) -> str:
    """An SVG file as an element of a page: without the XML header and metadata, which name addresses on the web."""
    text = svg.decode()
    text = text[text.index('<svg'):]
    start, end = text.find('<metadata>'), text.find('</metadata>')
    return text if start < 0 else text[:start] + text[end + len('</metadata>'):]


def table(rows: list[tuple[str, str]]) -> str:
    """Two columns of text."""
    cells = ''.join(f'<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>\n' for name, value in rows)
    return f'<table>\n{cells}</table>'


def drawn(arch: Architecture) -> str:
    """An architecture's cells, drawn where Graphviz is installed, else as text."""
    if draw.missing_graphviz():
        return f'<pre>{escape(draw.describe_cells(arch))}</pre>'
    return inline_svg(draw.render(arch, 'svg'))


def found(run: RunFiles) -> str:
    """The section on the architectures that the run has found, or trains."""
    parts = []
    for title, arch in run.found[:SHOWN]:
        parts.append(f'<h3>{escape(title)}</h3>\n<p><code>{arch}</code></p>\n{drawn(arch)}')
    return '\n'.join(parts) or '<p>None yet: the first scoring is to come.</p>'


def summary(run: RunFiles) -> list[tuple[str, str]]:
    """What a reader wants to know first."""
    rows = [('kind', f'search by {run.args.get("method", "NAO-WS")}' if run.is_search else 'training of one architecture'),
            ('data set', run.dataset), (f'{run.unit}s done', run.progress),
            ('best top-1 error', runs.percent(run.best_error) + (' (validation split)' if run.is_search else ' (test)'))]
    if not run.is_search:
        parameters, madds = run.sizes
        rows += [('parameters', f'{parameters:,} (without the auxiliary head)'), ('multiply-adds of one image', f'{madds:,}')]
    return rows


def timings(run: RunFiles) -> list[tuple[str, str]]:
    """How long the run took in all and for each kind of work, and how fast it was."""
    rows = [(name, str(timedelta(seconds=round(seconds)))) for name, seconds in run.seconds_by_kind.items()]
    speeds = [record['train']['images_per_second'] for record in run.records('epoch')]
    if speeds:
        rows.append(('training speed', f'{sorted(speeds)[len(speeds) // 2]:.0f} images/s (median of the epochs)'))
    return rows


def page(run: RunFiles) -> str:
    """The page as HTML. Raises UserError."""
    figures = inline_svg(plot.render(plot.figure([run]), 'svg'))
    environment = run.checkpoint.get('environment') or 'not recorded'
    arguments = [(f'--{name}', str(value)) for name, value in sorted(run.args.items())]
    sections = [('Figures', figures), ('Architectures', found(run)), ('Timings', table(timings(run))),
                ('Environment', f'<p>{escape(environment)}</p>'), ('Arguments', table(arguments))]
    body = '\n'.join(f'<h2>{title}</h2>\n{content}' for title, content in sections)
    return (f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(run.name)}</title>\n'
            f'<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(run.name)}</h1>\n{table(summary(run))}\n{body}\n</body>\n</html>\n')


def parse_args() -> argparse.Namespace:
    """The program's flags."""
    parser = flags.Parser('Write an HTML page about a run.', 'RUN')
    parser.add_argument('run', metavar='RUN', type=Path, help='output directory of a run, finished or going on')
    parser.add_argument('-o', '--output', type=Path, metavar='FILE', help='what to write (default: report.html in RUN)')
    return parser.parse_args()


def main() -> None:
    """Write the page."""
    args = parse_args()
    runs.write(args.output or args.run / 'report.html', page(RunFiles(args.run)))


if __name__ == '__main__':
    flags.run_program(main, goes_on=False)
