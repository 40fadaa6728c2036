"""The encoding of architectures: parse, check, format, sample, tokens for the controller and back, pool files.

A cell of B nodes is 4·B integers, `x_id x_op y_id y_op` per node; an architecture is the normal cell followed by the
reduction cell, written as one line of 8·B space-separated integers (paper, section 3.1 and appendix). Node i reads two of
the states 0..i+1: states 0 and 1 are the outputs of the two cells before, state 2+j is node j.
"""

import operator
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from disk import read_lines
from operations import OPERATIONS, SEARCH_SPACES

ALL_OPERATIONS = range(len(OPERATIONS))
EDGE = 1 << 10  # more than there are tokens: an edge's input · EDGE + its operation is one number

PUBLISHED: dict[str, str] = {  # the architectures that the papers report; the training scripts spell them out to be edited
    'NAONet_A': '0 7 1 15 2 8 1 7 0 6 1 7 0 8 4 7 1 5 0 7 0 7 1 13 0 6 0 14 0 9 1 10 0 14 2 6 1 11 0 7',
    'NAONet_B': '0 1 0 2 0 1 2 2 1 3 0 2 4 0 1 3 2 1 0 3 1 1 1 0 2 1 2 4 1 0 2 3 3 1 2 2 0 2 0 2',
    'NAONet_V2': '1 1 0 1 2 4 0 0 0 0 2 1 0 0 0 2 0 3 0 0 0 2 0 2 2 2 1 0 0 0 0 1 0 0 0 3 0 0 0 1',
}


class ArchitectureError(ValueError):
    """An architecture or a pool file is not as it should be; the message is one line for the user."""


class Architecture(NamedTuple):
    """A normal and a reduction cell of 4·B integers each."""

    normal: tuple[int, ...]
    reduction: tuple[int, ...]

    def __str__(self) -> str:
        return ' '.join(map(str, self.normal + self.reduction))


def nodes_of(cell: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """Yield (x_id, x_op, y_id, y_op) for each node of a cell."""
    for start in range(0, len(cell), 4):
        yield tuple(cell[start:start + 4])


def unread_states(cell: Sequence[int]) -> list[int]:
    """The states that no node of the cell reads, in order: the cell's output concatenates them."""
    read = {state for x_id, _, y_id, _ in nodes_of(cell) for state in (x_id, y_id)}
    return [state for state in range(len(cell) // 4 + 2) if state not in read]


def parse(arch: 'str | Sequence', nodes: int | None = None, operations: range = ALL_OPERATIONS) -> Architecture:
    """Make an Architecture of a line of integers, a flat sequence of integers or a (normal, reduction) pair.

    Raises ArchitectureError, which names the position, for anything that is not an architecture of `nodes` nodes per cell
    (None: any number) whose operations are among `operations`.
    """
    if isinstance(arch, str):
        values = arch.split()
    elif len(arch) == 2 and all(isinstance(cell, list | tuple) for cell in arch):
        if len(arch[0]) != len(arch[1]):
            raise ArchitectureError(f'both cells of an architecture have equally many integers, these have {len(arch[0])} '
                                    f'and {len(arch[1])}')
        values = [*arch[0], *arch[1]]
    else:
        values = list(arch)
    if not values or len(values) % 8 or (nodes is not None and len(values) != 8 * nodes):
        wanted = f'8 x {nodes} nodes = {8 * nodes}' if nodes is not None else 'a multiple of 8 (4 a node, two cells)'
        raise ArchitectureError(f'an architecture has {wanted} integers, this one has {len(values)}')
    half = len(values) // 2
    numbers = []
    for position, value in enumerate(values):
        where = f'integer {position + 1} of {len(values)} ({"normal" if position < half else "reduction"} cell)'
        try:
            number = int(value) if isinstance(value, str) and '_' not in value else operator.index(value)
        except (TypeError, ValueError):
            raise ArchitectureError(f'{where} is {value!r}, not an integer') from None
        node, is_operation = position % half // 4, position % 2
        legal = operations if is_operation else range(node + 2)
        if number not in legal:
            kind = 'an operation of this search space' if is_operation else f'an input state of node {node}'
            raise ArchitectureError(f'{where} is {number}, but {kind} is one of {legal.start}..{legal.stop - 1}')
        numbers.append(number)
    return Architecture(tuple(numbers[:half]), tuple(numbers[half:]))


def read_pool(path: str | Path, nodes: int | None = None, operations: range = ALL_OPERATIONS,
              check: Callable[[Architecture], None] = lambda arch: None) -> list[Architecture]:
    """Read a pool file, one architecture a line; ArchitectureError names the file and the line that is wrong.

    check: raises ArchitectureError for an architecture that is not wanted. Raises UserError for a pipe.
    """
    try:
        lines = read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or 'not a text file'
        raise ArchitectureError(f'{path}: cannot be read ({reason}); an arch_pool file is needed here') from None
    pool = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                pool.append(parse(line, nodes, operations))
                check(pool[-1])
            except ArchitectureError as error:
                raise ArchitectureError(f'{path}, line {number}: {error}') from None
    if not pool:
        raise ArchitectureError(f'{path}: is empty; an arch_pool file has one architecture a line')
    return pool


def read(arch: str, index: int = 0, nodes: int | None = None) -> Architecture:
    """The architecture that a user names: a line of integers, one of PUBLISHED, or a pool file of which `index` picks the
    line from 0.

    Raises ArchitectureError.
    """
    arch = PUBLISHED.get(arch, arch)
    words = arch.split()
    if not words:
        raise ArchitectureError('is empty; give a line of integers or the path of an arch_pool file')
    one_word = len(words) == 1 and not words[0].lstrip('+-').isdigit()
    if not (one_word or os.sep in arch or os.path.exists(arch)):
        return parse(arch, nodes)
    if not (os.sep in arch or os.path.exists(arch)):
        raise ArchitectureError(f'{arch}: is no arch_pool file and none of the names {", ".join(PUBLISHED)}; or give a line of '
                                'integers, with spaces between them')
    pool = read_pool(arch, nodes)
    if not 0 <= index < len(pool):
        raise ArchitectureError(f'--arc_index={index}, but {arch} has the architectures 0..{len(pool) - 1}')
    return pool[index]


def sample(count: int, nodes: int, operations: range, generator: torch.Generator,
           known: Collection[Architecture] = ()) -> list[Architecture]:
    """Draw `count` different random architectures that are not in `known`, fewer only if the search space has no more.

    Every input and every operation is uniform over what is legal there (paper, section 4: the initial pool).
    """
    pool: dict[Architecture, None] = {}
    known = set(known)
    choices = [len(operations) if position % 2 else position // 4 + 2 for position in range(4 * nodes)] * 2
    offsets = torch.tensor([operations.start if position % 2 else 0 for position in range(8 * nodes)])
    space = 1
    for choice in choices:
        space *= choice
    while len(pool) < min(count, space - len(known)):
        draws = torch.rand((count, 8 * nodes), generator=generator, dtype=torch.float64)
        for row in ((draws * torch.tensor(choices)).long() + offsets).tolist():
            arch = Architecture(tuple(row[:4 * nodes]), tuple(row[4 * nodes:]))
            if len(pool) < count and arch not in known:
                pool.setdefault(arch)
    return list(pool)


def mutate(arch: Architecture, operations: range, generator: torch.Generator) -> Architecture:
    """The architecture with one input or one operation of one cell replaced by another legal one, all equally likely."""
    values = list(arch.normal + arch.reduction)
    half = len(values) // 2
    while True:  # a node may have a single operation to choose from
        position = int(torch.randint(len(values), (), generator=generator))
        legal = operations if position % 2 else range(position % half // 4 + 2)
        if others := [value for value in legal if value != values[position]]:
            values[position] = others[int(torch.randint(len(others), (), generator=generator))]
            return Architecture(tuple(values[:half]), tuple(values[half:]))


class Vocabulary(NamedTuple):
    """Architectures as token sequences: 0 starts, 1..B+1 are the input states, then one token per operation."""

    nodes: int
    operations: range

    @property
    def size(self) -> int:
        """The number of words: 12 for five nodes and the small space."""
        return self.nodes + 2 + len(self.operations)

    @property
    def allowed_tokens(self) -> list[tuple[int, int]]:
        """(first, last) legal token, inclusive, at each of the 8·B positions."""
        first_operation = self.nodes + 2
        cell = []
        for node in range(self.nodes):
            cell += [(1, node + 2), (first_operation, self.size - 1)] * 2
        return cell * 2

    def encode(self, arch: Architecture) -> list[int]:
        """The 8·B tokens of an architecture."""
        shift = self.nodes + 2 - self.operations.start
        return [value + (shift if position % 2 else 1) for position, value in enumerate(arch.normal + arch.reduction)]

    def tokens(self, pool: Sequence[Architecture], device: torch.device) -> Tensor:
        """The token matrix of a pool, (count, 8·B), on the device."""
        return torch.tensor([self.encode(arch) for arch in pool], device=device)

    def decode(self, tokens: Sequence[int]) -> Architecture:
        """The architecture of 8·B tokens; raises ArchitectureError if a token is not legal where it stands."""
        shift = self.nodes + 2 - self.operations.start
        values = [token - (shift if position % 2 else 1) for position, token in enumerate(tokens)]
        return parse(values, self.nodes, self.operations)


def vocabulary(nodes: int, search_space: str) -> Vocabulary:
    """The vocabulary of cells of `nodes` nodes over the search space 'small' or 'large'."""
    return Vocabulary(nodes, SEARCH_SPACES[search_space])


def swap_operands(sequences: Tensor, generator: torch.Generator) -> Tensor:
    """Swap the two (input, operation) pairs of one random node per cell: the same network written differently.

    sequences: (batch, 8·B) tokens or values. Returns a new tensor. (Paper, section 3.2: symmetric architectures.)
    """
    batch, length = sequences.shape
    nodes = sequences.reshape(batch, 2, length // 8, 2, 2)
    chosen = torch.randint(length // 8, (batch, 2, 1), generator=generator, device=generator.device)
    swap = (chosen.to(sequences.device) == torch.arange(length // 8, device=sequences.device))[..., None, None]
    return torch.where(swap, nodes.flip(3), nodes).reshape(batch, length)


def write_nodes(sequences: Tensor, rank: Callable[[Tensor], Tensor]) -> Tensor:
    """Write each cell's nodes in another order: of those whose inputs are written, the one of the lowest rank comes next.

    sequences: (batch, 8·B) tokens of a Vocabulary; rank: what the nodes read, a number for each input, as it is written
    now, and its operation (cells, B, 2) -> (cells, B).
    """
    batch, length = sequences.shape
    count = length // 8
    cells = sequences.reshape(2 * batch, count, 2, 2)  # node, operand, its input and operation
    read = cells[..., 0].flatten(1) - 1
    places = torch.full((2 * batch, count + 2), -1, device=sequences.device)  # of each state in the new order, -1: none yet
    places[:, 0], places[:, 1] = 0, 1
    order = []
    for place in range(2, count + 2):
        inputs = places.gather(1, read).unflatten(1, (count, 2))
        ready = (inputs >= 0).all(2) & (places[:, 2:] < 0)
        ranks = rank(inputs * EDGE + cells[..., 1])
        node = torch.where(ready, ranks, ranks.max() + 1).argmin(1, keepdim=True)
        places = places.scatter(1, node + 2, place)
        order.append(node)
    cells = torch.stack([places.gather(1, read).unflatten(1, (count, 2)) + 1, cells[..., 1]], dim=-1)
    return cells.gather(1, torch.cat(order, dim=1)[..., None, None].expand_as(cells)).reshape(batch, length)


def reorder_nodes(sequences: Tensor, generator: torch.Generator) -> Tensor:
    """Write each cell in a random one of the ways that build the same network: its nodes in any order in which what a node
    reads comes before it, and the operands of each either way round.

    sequences: (batch, 8·B) tokens of a Vocabulary. Returns a new tensor.
    """
    batch, length = sequences.shape
    draws = torch.rand((2 * batch, length // 8, 2), generator=generator, device=generator.device).to(sequences.device)
    cells = sequences.reshape(2 * batch, length // 8, 2, 2)
    cells = torch.where((draws[..., 1] < 0.5)[..., None, None], cells.flip(2), cells)
    return write_nodes(cells.reshape(batch, length), lambda edges: draws[..., 0])


def canonical(sequences: Tensor) -> Tensor:
    """Write each cell in the one way, of all that build the same network, that `write_nodes` chooses by what nodes read.

    sequences: (batch, 8·B) tokens of a Vocabulary. Returns a new tensor. (Nodes that compute the same keep their order, so
    that a few cells have several such ways.)
    """
    def rank(edges: Tensor) -> Tensor:
        edges = edges.sort(dim=2).values
        return edges[..., 0] * EDGE ** 2 + edges[..., 1]
    cells = write_nodes(sequences, rank).reshape(len(sequences), 2, -1, 2, 2)
    operands = (cells[..., 0] * EDGE + cells[..., 1]).argsort(dim=-1, stable=True)
    return cells.gather(3, operands[..., None].expand_as(cells)).reshape(sequences.shape)


# How architectures are rewritten in each epoch of a controller's fit, by the names of the option.
REWRITINGS = {'operands': swap_operands, 'nodes': reorder_nodes}
