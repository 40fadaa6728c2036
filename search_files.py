"""What a search keeps in its output directory: pool files, and the checkpoint that it goes on from.

`search` below is a train_search.Search; its `fields` name what a checkpoint holds of its state beside the pool.
"""

from collections.abc import Sequence
from typing import Any

import architecture
import checkpoint
import costs
import search_setup
from architecture import Architecture
from disk import write_lines
from flags import UserError
from utils import Run


def write_pool(run: Run, suffix: str, pool: Sequence[Any], accuracies: Sequence[float] | None = None) -> None:
    """Write arch_pool{suffix}, and arch_pool.perf{suffix} where there are accuracies."""
    if not run.is_first:
        return
    write_lines(run.output_dir / f'arch_pool{suffix}', pool)
    if accuracies is not None:
        write_lines(run.output_dir / f'arch_pool.perf{suffix}', accuracies)


def write_front(run: Run, pool: Sequence[Architecture], accuracies: Sequence[float], madds: Sequence[int]) -> None:
    """Write those that no other beats in both accuracy and multiply-adds, cheapest first, and a line of both for each."""
    front = costs.pareto(accuracies, madds)
    write_pool(run, '.pareto', [pool[index] for index in front])
    write_pool(run, '.pareto.perf', [f'{accuracies[index]} {madds[index]}' for index in front])


def read_final(run: Run) -> list[Architecture]:
    """The architectures of arch_pool.final, best first; none if it is not there."""
    path = run.output_dir / 'arch_pool.final'
    try:
        return architecture.read_pool(path) if path.exists() else []
    except architecture.ArchitectureError as error:
        raise UserError(f'{error}; put this result of the search right, or move it away to have it made again') from None


def state_of(search: Any) -> dict[str, Any]:
    """What a checkpoint holds of a search, but for its supernet."""
    return {'model': {}, 'optimizer': {}, 'epoch': search.number(), 'step': 0,
            'controller': [nao.state_dict() for nao in search.naos], 'pool': [str(arch) for arch in search.pool],
            'born': search.born, 'rounds': search.rounds, 'fingerprint': search.task.images,
            'best_acc_top1': 100 * max(search.accuracies, default=0.0),
            **{name: getattr(search, name) for name in search.fields}}


def load(search: Any) -> dict[str, Any] | None:
    """Give a search the state that its checkpoint holds, but for its supernet; returns the checkpoint, None without one.

    Raises UserError.
    """
    args, path = search.args, search.checkpoint
    state = search.run.together(lambda: checkpoint.load(path) if path.exists() else None)
    if state is None:
        return None
    method = state['args'].get('method', args.method)
    if state.get('phase') not in (*search.phases, 'done') or method != args.method:
        raise UserError(f'{path} is not the checkpoint of a search by --method={args.method}; name another --output_dir')
    checkpoint.require(state, search.fields | {'controller': list, 'pool': list, 'random': list, 'scaler': dict,
                                               'metrics_bytes': int}, path)
    checkpoint.same_run(state, args, path, names=(
        *checkpoint.ANOTHER_RUN, 'child_layers', 'child_channels', *['child_epochs'] * (method == 'NAO')))
    checkpoint.same_images(state, search.task.images, path)
    search_setup.fill_controllers(search.naos, state, path)
    try:
        search.pool = [architecture.parse(line, args.child_nodes, search.vocabulary.operations) for line in state['pool']]
    except (architecture.ArchitectureError, TypeError) as error:
        raise UserError(f'{path}: its "pool" is damaged or of another --child_nodes ({error})') from None
    if beyond := sum(not search.budget.admits(arch) for arch in search.pool):
        raise UserError(f'{path}: {beyond} of its {len(search.pool)} architectures are beyond {search.budget}; give a larger '
                        'budget, or name another --output_dir')
    for name in search.fields:
        setattr(search, name, state[name])
    search.born, search.rounds = state.get('born', list(range(len(search.pool)))), state.get('rounds', [[0, 0]])
    if len(search.born) != len(search.pool):
        raise UserError(f'{path}: its "born" is damaged: {len(search.born)} of {len(search.pool)} architectures; name another '
                        '--output_dir')
    search.resumed = {name: state[name] for name in ('args', 'random', 'scaler', 'metrics_bytes')}
    return state
