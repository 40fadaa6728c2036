"""Tables of known accuracies: what a search of a table asks, and the tokens that its architectures are written in.

Two kinds, told apart by their first line. `architecture,accuracy`: NAS-Bench-201, architectures such as
`|nor_conv_3x3~0|+|none~0|skip_connect~1|+|none~0|none~1|avg_pool_3x3~2|`. `tokens,accuracy`: any space of sequences of
equal length, a line's first column the choices made, space-separated numbers from 0. Further columns are ignored.
"""

import json
import math
import re
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from disk import append_line

OPERATIONS = ('none', 'skip_connect', 'nor_conv_1x1', 'nor_conv_3x3', 'avg_pool_3x3')
SOURCES = (0, 0, 1, 0, 1, 2)  # the node that each of the six edges reads; an edge's place says which node it feeds
ARCHITECTURE = re.compile(r'\|{}~{}\|\+\|{}~{}\|{}~{}\|\+\|{}~{}\|{}~{}\|{}~{}\|'.format(
    *(part for source in SOURCES for part in (r'(\w+)', source))))

Sequence = tuple[int, ...]


class UserError(ValueError):
    """The table or an option is not as it should be; the message is one line for the user."""


class Table(NamedTuple):
    """Accuracies by sequences of tokens, and the (first, last) token that may stand at each position.

    A position has its own words, so that an embedding can mean another thing at another position.
    """

    accuracies: dict[Sequence, float]
    allowed_tokens: list[tuple[int, int]]

    @property
    def share(self) -> float:
        """The share of the space's sequences that the table has, 0-1."""
        return len(self.accuracies) / math.prod(last - first + 1 for first, last in self.allowed_tokens)


def nasbench201_choices(architecture: str) -> Sequence:
    """The six choices of a NAS-Bench-201 string; raises ValueError that says what is wrong."""
    match = ARCHITECTURE.fullmatch(architecture)
    if not match:
        raise ValueError(f'{architecture!r} is not an architecture of six edges such as |none~0|+|none~0|none~1|+|...|')
    for operation in match.groups():
        if operation not in OPERATIONS:
            raise ValueError(f'{operation!r} is not one of the operations {", ".join(OPERATIONS)}')
    return tuple(map(OPERATIONS.index, match.groups()))


def token_choices(tokens: str) -> Sequence:
    """The choices of space-separated numbers; raises ValueError that says what is wrong."""
    if not re.fullmatch(r'[0-9]+( [0-9]+)*', tokens):
        raise ValueError(f'{tokens!r} is not a row of choices from 0 up such as 0 3 1')
    return tuple(map(int, tokens.split()))


KINDS = {'architecture': nasbench201_choices, 'tokens': token_choices}


def read_rows(path: str) -> dict[Sequence, float]:
    """The accuracies by choices, as they stand in a file; raises UserError, which names the file and the line that is wrong."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or 'not a text file'
        raise UserError(f'{path}: cannot be read ({reason}); a table of accuracies is needed here') from None
    kind, *others = lines[0].strip().split(',') if lines else ['']
    if kind not in KINDS or others[:1] != ['accuracy']:
        raise UserError(f'{path}, line 1: is {lines[0] if lines else ""!r}, but a table begins with the line '
                        f'{" or ".join(f"{kind},accuracy" for kind in KINDS)}')
    rows: dict[Sequence, float] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        architecture, value = [*line.strip().split(','), ''][:2]
        try:
            choices, accuracy = KINDS[kind](architecture), float(value)
            if not math.isfinite(accuracy):
                raise ValueError(f'the accuracy {value!r} is not a finite number')
            if choices in rows:
                raise ValueError(f'{architecture} stands in the table twice')
            if rows and len(choices) != len(next(iter(rows))):
                raise ValueError(f'{architecture!r} has {len(choices)} choices, but the first one has {len(next(iter(rows)))}')
        except ValueError as error:
            raise UserError(f'{path}, line {number}: {error}') from None
        rows[choices] = accuracy
    if not rows:
        raise UserError(f'{path}: has no architecture; a table has one a line under {lines[0].strip()!r}')
    return rows


def read_table(path: str) -> Table:
    """A table from a file; the number of choices of a position is its largest plus one; raises UserError."""
    rows = read_rows(path)
    counts = [max(column) + 1 for column in zip(*rows, strict=True)]
    firsts = [1 + sum(counts[:position]) for position in range(len(counts))]
    accuracies = {tuple(first + choice for first, choice in zip(firsts, choices, strict=True)): accuracy
                  for choices, accuracy in rows.items()}
    return Table(accuracies, [(first, first + count - 1) for first, count in zip(firsts, counts, strict=True)])


def read_tables(paths: list[str]) -> dict[str, Table]:
    """Tables by their files' names without .csv, under which results are written; raises UserError, also for two of a name."""
    names = [Path(path).stem for path in paths]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f'two --table are named {name}, under which the results of one are written')
    return dict(zip(names, map(read_table, paths), strict=True))


def regrets(table: Table, asked: list[Sequence], queries: int) -> torch.Tensor:
    """The regret after 1, 2, … queries, (queries,); when the whole table has been asked it stays where it is, at 0."""
    best = torch.tensor([table.accuracies[sequence] for sequence in asked], dtype=torch.float64).cummax(0).values
    return max(table.accuracies.values()) - torch.cat([best, best[-1:].expand(queries - len(best))])


def steps_of(curve: torch.Tensor) -> list[list[float]]:
    """A curve (queries,) of regrets as [queries asked, regret from then on], in the order of the queries."""
    values = curve.tolist()
    return [[query, value] for query, value in enumerate(values, start=1) if query == 1 or value < values[query - 2]]


def curve_of(steps: list[list[float]], queries: int) -> torch.Tensor:
    """The curve (queries,) that `steps_of` wrote down."""
    values = torch.zeros(queries, dtype=torch.float64)
    for query, value in steps:
        values[int(query) - 1:] = value
    return values


def read_results(path: Path, names: tuple[str, ...]) -> dict[tuple, dict]:
    """What has been measured, by its values of `names`; a line that was cut off counts as not there, and stays.

    Raises UserError for a file that holds anything else.
    """
    results = {}
    try:
        if not path.parent.is_dir():
            raise FileNotFoundError(2, 'its folder does not exist')
        for text in path.read_text().splitlines() if path.exists() else ():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                if not text.startswith('{"'):  # as what add_result writes does
                    raise
            else:
                results[tuple(line[name] for name in names)] = line
    except OSError as error:
        raise UserError(f'{path}: cannot be read and written ({error.strerror})') from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f'{path}: is not a file of these results, which have {", ".join(names)}; name another') from None
    return results


def fingerprint(settings: object) -> int:
    """A number that other settings do not have: what was measured with them is not taken for these."""
    return zlib.crc32(repr(settings).encode())


def add_result(path: Path, result: dict) -> None:
    """Add what has been measured to a file, as a line of JSON."""
    append_line(path, json.dumps(result))
