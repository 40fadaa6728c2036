"""Draw an architecture: the normal and the reduction cell side by side, as in the paper's appendix.

    python tools/draw.py NAONet_A -o naonet_a.svg                      # .svg, .png or .pdf
    python tools/draw.py exp/search_cifar10/arch_pool.final --arc_index=1 -o second.png
    python tools/draw.py "0 7 1 15 2 8 ..." --dot                      # Graphviz's DOT text, which needs no package
    python tools/draw.py NAONet_A --describe                           # as text, with the networks' sizes

Drawing needs Graphviz: the package graphviz (pip) and the program dot (Debian's package graphviz).
"""

import re
import shutil
from pathlib import Path

import runs

import flags
from architecture import PUBLISHED, Architecture, nodes_of, unread_states
from operations import OPERATIONS

INPUTS = ('previous-previous cell', 'previous cell')
LOOKS = (  # a word of an operation's name -> the line and the filling of its box
    ('conv', '#1f5fa8', '#dbe8f6'), ('pool', '#2a7d3f', '#dcf0e0'), ('identity', '#666666', '#eeeeee'),
    ('', '#8a5a00', '#fbeed5'))


def state_name(state: int) -> str:
    """A state as text: its number, and whose output it is."""
    return f'state {state} ({INPUTS[state] if state < 2 else f"node {state - 2}"})'


def statement(what: str, **attributes: str) -> str:
    """A line of DOT: a node or an edge, and its attributes."""
    listed = ', '.join(f'{name}="{value}"' for name, value in attributes.items())
    return f'    {what} [{listed}]'


def box(name: str, title: str, source: str, target: str, **line: str) -> list[str]:
    """The lines of DOT for an operation: a box that stands on its edge, so that no label can stray to another."""
    colour, filling = next(look for word, *look in LOOKS if word in title)
    title = re.sub(r'(?<=\d)x(?=\d)', '×', title).replace('separable', 'sep').replace('average', 'avg')
    return [statement(name, label=title, color=colour, fontcolor=colour, fillcolor=filling),
            statement(f'{source} -> {name}', color=colour, arrowhead='none', **line),
            statement(f'{name} -> {target}', color=colour, **line)]


def cell_lines(cell: tuple[int, ...], name: str, group: str) -> list[str]:
    """The lines of DOT for a cell: its inputs above, then nodes under the operations that they add, the concatenation below.

    group: the kind of subgraph, 'cluster' for one with a frame.
    """
    states = [f'{name}{state}' for state in range(len(cell) // 4 + 2)]
    stride = [' /2' if name == 'reduction' and state < 2 else '' for state in range(len(states))]
    title = f'  label="{name} cell{" (/2: stride 2)" if any(stride) else ""}"; labelloc=t'
    lines = [f'  subgraph {group}_{name} {{', title] if group == 'cluster' else [title, f'  subgraph {group}_{name} {{']
    lines += [statement(states[state], label=INPUTS[state].replace(' ', r'\n'), fillcolor='#f6d9b0') for state in (0, 1)]
    lines += [statement(node, label=f'node {index}', shape='ellipse', fillcolor='#ffffff')
              for index, node in enumerate(states[2:])]
    lines.append(statement(f'{name}_out', label='concatenation', fillcolor='#e8dff5'))
    for node, (x_id, x_op, y_id, y_op) in zip(states[2:], nodes_of(cell), strict=True):
        for side, state, operation in (('x', x_id, x_op), ('y', y_id, y_op)):
            lines += box(f'{node}{side}', OPERATIONS[operation].name + stride[state], states[state], node)
    for state in unread_states(cell):
        if stride[state]:
            lines += box(f'{states[state]}_out', 'identity /2', states[state], f'{name}_out', style='dashed')
        else:
            lines.append(statement(f'{states[state]} -> {name}_out', style='dashed'))
    return [*lines, '  }']


def dot_source(**cells: tuple[int, ...]) -> str:
    """The DOT text of cells side by side, normal=… and reduction=…, their inputs and their outputs aligned.

    A cell alone has no frame, and its inputs in their order, which Graphviz does not keep inside of frames.
    """
    group = 'cluster' if len(cells) > 1 else 'cell'
    return '\n'.join([
        'digraph architecture {',
        '  rankdir=TB; nodesep=0.16; ranksep=0.36; newrank=true; fontname="Helvetica"; fontsize=18; color="#bbbbbb"',
        '  node [shape=box, style="rounded,filled", fontname="Helvetica", fontsize=13, height=0.3, margin="0.1,0.04"]',
        '  edge [fontname="Helvetica", fontsize=12, arrowsize=0.6, color="#666666"]',
        *(line for name, cell in cells.items() for line in cell_lines(cell, name, group)),
        '  { rank=same; ' + ' -> '.join(f'{name}{state}' for name in cells for state in (0, 1)) + ' [style=invis] }',
        '  { rank=max; ' + '; '.join(f'{name}_out' for name in cells) + ' }',
        '}', ''])


def missing_graphviz() -> str | None:
    """What is absent for drawing, None if nothing is."""
    try:
        import graphviz  # noqa: F401
    except ImportError:
        return 'the package graphviz (pip install graphviz)'
    return None if shutil.which('dot') else 'the program dot (Debian: apt install graphviz)'


def render(form: str, **cells: tuple[int, ...]) -> bytes:
    """The drawing of cells (see dot_source) as 'svg', 'png' or 'pdf'; raises UserError where Graphviz is absent."""
    if missing := missing_graphviz():
        raise flags.UserError(f'drawing needs {missing}; --dot and --describe work without it')
    import graphviz
    return graphviz.Source(dot_source(**cells)).pipe(form)


def describe_cells(arch: Architecture) -> str:
    """The cells as text, a line for each node: its operations by name and what they read."""
    lines = []
    for name, cell in (('normal', arch.normal), ('reduction', arch.reduction)):
        lines.append(f'{name} cell' + (' (stride 2 where the input is state 0 or 1)' if name == 'reduction' else ''))
        for index, (x_id, x_op, y_id, y_op) in enumerate(nodes_of(cell)):
            operands = (f'{OPERATIONS[operation].name} of {state_name(state)}'
                        for state, operation in ((x_id, x_op), (y_id, y_op)))
            lines.append(f'  node {index} = ' + ' + '.join(operands))
        lines.append('  output = concatenation of ' + ', '.join(map(state_name, unread_states(cell))))
    return '\n'.join(lines)


def describe(arch: Architecture, layers: int, channels: int, imagenet_channels: int) -> str:
    """The architecture as text: its cells, and the sizes of its CIFAR and its ImageNet network."""
    lines = [f'architecture {arch}', describe_cells(arch)]
    for title, imagenet, size in (('CIFAR', False, (layers, channels)), ('ImageNet', True, (4, imagenet_channels))):
        parameters, madds = runs.sizes(arch, imagenet, *size)
        lines.append(f'{title} (layers {size[0]}, channels {size[1]}): {parameters:,} parameters, {madds:,} multiply-adds')
    return '\n'.join(lines)


def main() -> None:
    """Draw, or print the text that the flags ask for."""
    parser = flags.Parser('Draw an architecture, its normal and its reduction cell side by side.', 'ARCH')
    parser.add_argument('arch', metavar='ARCH', help='a line of integers, '
                        f'{", ".join(PUBLISHED)} or the path of an arch_pool file')
    parser.add_argument('--arc_index', type=flags.COUNT, default=0, help='which line of the arch_pool file, from 0')
    parser.add_argument('-o', '--output', type=Path, metavar='FILE', help='what to write: FILE.svg, FILE.png or FILE.pdf')
    parser.add_argument('--dot', action='store_true', help='print the DOT text')
    parser.add_argument('--describe', action='store_true', help='print the operations by name, and the sizes of the networks')
    parser.add_argument('--layers', type=flags.POSITIVE_INT, default=6, help='of the CIFAR network that --describe counts')
    parser.add_argument('--channels', type=flags.POSITIVE_INT, default=36, help='of the CIFAR network that --describe counts')
    parser.add_argument('--imagenet_channels', type=flags.POSITIVE_INT, help='of the ImageNet network that --describe counts '
                        '(default: 52 for NAONet_V2, else 42, as published)')
    args = parser.parse_args()
    arch = runs.read_architecture(args.arch, args.arc_index)
    if args.describe:
        print(describe(arch, args.layers, args.channels, args.imagenet_channels or (52 if args.arch == 'NAONet_V2' else 42)))
    if args.dot:
        print(dot_source(**arch._asdict()), end='')
    if args.output:
        form = runs.format_of(args.output)
        runs.write(args.output, render(form, **arch._asdict()))
    elif not (args.describe or args.dot):
        raise flags.UserError('nothing to do; give -o FILE.svg, --dot or --describe')


if __name__ == '__main__':
    runs.run_tool(main)
