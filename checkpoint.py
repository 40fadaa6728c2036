"""Checkpoints: written in one go, read without trusting them, and refused in one line when they do not fit.

A checkpoint is a dict with 'args' and 'model' at least; what else a program needs to go on it asks for by `require`.
"""

import argparse
import pickle
import textwrap
import warnings
import zipfile
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from disk import need_file, write_whole
from flags import UserError

NUMPY_NUMBER = [np.float64(0).__reduce__()[0], (np.float64(0).__reduce__()[0], 'numpy.core.multiarray.scalar'), np.dtype,
                type(np.dtype(np.float64)), type(np.dtype(np.float32))]  # what a pickled one, such as an accuracy, needs

# Flags by which a run is another one; what is changed beside these goes on as the same run.
ANOTHER_RUN = ('seed', 'dataset', 'method', 'search_space', 'proposer', 'image_size', 'train_images', 'valid_images',
               'holdout')

NUMBER = (int, float, np.number, Tensor)  # what an accuracy may be
IMAGES = {'classes': [str], 'size': int, 'mean': [float], 'std': [float]}  # see datasets.ImageSet.info
KINDS = {  # of what a checkpoint may have: a type, several of which one must do, or in a list that of a list's items
    'arch': str, 'classes': ([str], type(None)), 'images': dict, 'random': [dict], 'scaler': dict, 'metrics_bytes': int,
    'last_acc_top1': NUMBER, 'accuracies': [NUMBER], 'pool': [str], 'controller': [dict], 'born': [int], 'rounds': [[int]]}


def save(state: dict[str, Any], *paths: Path) -> None:
    """Write a checkpoint to each path, whole.

    Raises UserError when it cannot be written; what stood at the path then still stands there.
    """
    for path in paths:
        try:
            write_whole(path, lambda file: torch.save(state, file))
        except (OSError, RuntimeError) as error:  # PyTorch's writer turns a full disk into a RuntimeError
            reason = getattr(error, 'strerror', None) or str(error).splitlines()[0]
            kept = 'the checkpoint before it is intact, ' if path.exists() else ''
            raise UserError(f'{path} cannot be written ({reason}); {kept}make room and run the same command again') from None


def load(path: str | Path, flag: str = '--output_dir') -> dict[str, Any]:
    """Read a checkpoint of this project or of the reference (whose `args` is a Namespace, and whose names may start with
    `module.`) onto the CPU; `args` becomes a dict. Raises UserError.

    flag: that which names its place, for messages, here and below.
    """
    need_file(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *NUMPY_NUMBER]), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            if zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()):  # which PyTorch does not look at
                raise RuntimeError(f'the check sum of {damaged} is wrong')
            state = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise UserError(f'{path}: there is no such checkpoint; train first, or name one with --checkpoint') from None
    except Exception as error:  # torch.load raises a dozen kinds for a file that is not what it should be
        reason = 'it holds more than tensors and numbers' if isinstance(error, pickle.UnpicklingError) else (
            f'{error}'.partition('\n')[0][:100] or type(error).__name__)
        raise UserError(f'{path}: is not a readable checkpoint ({reason}); it is cut off, damaged or another kind of file; '
                        f'to begin anew name another {flag}') from None
    args = state.get('args', {}) if isinstance(state, dict) else None
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(args, dict) or not isinstance(state.get('model'), dict) or not all(
            isinstance(name, str) for name in state['model']):
        raise UserError(f'{path}: is not a checkpoint of this project: a dict with "model" and "args" is needed')
    state['args'] = args
    state['model'] = {name.removeprefix('module.'): value for name, value in state['model'].items()}
    require(state, {name: KINDS[name] for name in KINDS.keys() & state.keys()}, path, flag=flag)
    if state.get('images'):
        require(state['images'], IMAGES, path, flag=flag)
    return state


def load_network(path: str | Path) -> dict[str, Any]:
    """Read the checkpoint of one architecture's network; raises UserError, also if it is that of a search."""
    state = load(path)
    if 'phase' in state:
        raise UserError(f'{path}: is the checkpoint of a search; train an architecture of its arch_pool, into another place')
    return state


def is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind, see KINDS; an int is a count."""
    if isinstance(kind, list):
        return isinstance(value, list | tuple) and all(is_of(item, kind[0]) for item in value)
    if isinstance(kind, tuple):
        return any(is_of(value, each) for each in kind)
    return isinstance(value, kind) and (kind is not int or value >= 0)


def require(state: dict[str, Any], kinds: dict[str, Any], path: str | Path, advice: str = '',
            flag: str = '--output_dir') -> None:
    """Raise UserError if a checkpoint lacks what a run needs to go on from it, or has it of another kind.

    advice: what else can be done with it.
    """
    for name, kind in kinds.items():
        if not is_of(state.get(name), kind):
            problem = f'has no "{name}"' if name not in state else f'its "{name}" is damaged ({str(state[name])[:40]!r})'
            raise UserError(f'{path}: {problem}, so no run can go on from it; {advice}name another {flag}')


def same_run(state: dict[str, Any], args: argparse.Namespace, path: str | Path, flag: str = '--output_dir',
             names: Sequence[str] = ANOTHER_RUN) -> None:
    """Raise UserError if a checkpoint is of a run that differs in what makes it another one, not the same one changed."""
    for name in names:
        now = getattr(args, name, None)
        was = state['args'].get(name, now)
        if was != now:
            had, wanted = (f'--{name}={value}' if value is not None else f'no --{name}' for value in (was, now))
            raise UserError(f'{path}: is of a run with {had}, not {wanted}; give that to go on with it, or name another '
                            f'{flag}')


def same_images(state: dict[str, Any], fingerprint: int, path: str | Path) -> None:
    """Raise UserError if a checkpoint, where it says, is of images that were split otherwise; see datasets.fingerprint."""
    if state.get('fingerprint', fingerprint) != fingerprint:
        raise UserError(f'{path}: was trained on other images: their number or classes differ, so that images it has learnt '
                        'would judge it; give those, or name another --output_dir')


def same_classes(state: dict[str, Any], classes: Sequence[str], path: str | Path) -> None:
    """Raise UserError if a checkpoint, where it names its classes, was trained on others or in another order."""
    for index, (was, now) in enumerate(zip_longest(state.get('classes') or classes, classes)):
        if was != now:
            raise UserError(f'{path}: was trained on other images: its class {index} is {was}, that of these is {now}; give '
                            'its --data, or name another --output_dir')


def same_architecture(state: dict[str, Any], arch: Any, path: str | Path) -> None:
    """Raise UserError if a checkpoint, where it has its architecture, is of another one."""
    if state.get('arch', str(arch)) != str(arch):
        raise UserError(f'{path}: is of another architecture, {state["arch"]}, not {arch}; give the --fixed_arc it was trained '
                        'with (of a script: fixed_arc=...)')


def architecture_of(state: dict[str, Any]) -> str | None:
    """The architecture of a checkpoint's network, as a user names it; None if the checkpoint does not say.

    A pool file that --fixed_arc named may have changed since, so the line that the checkpoint holds goes first.
    """
    args = state['args']
    return state.get('arch') or args.get('fixed_arc') or args.get('arch')  # the last is the reference's name for it


def fill_model(model: nn.Module, weights: dict[str, Tensor], path: str | Path,
               flags: str = '--fixed_arc, --layers, --channels and --use_aux_head') -> None:
    """Load a checkpoint's weights strictly; raises UserError if they are those of another network.

    flags: those that make the network what it is, for the message.
    """
    wanted = model.state_dict()
    rows, wanted_rows = (getattr(names.get('classifier.weight'), 'shape', ())[:1] for names in (weights, wanted))
    if rows and wanted_rows and rows != wanted_rows:
        raise UserError(f'{path}: is for {rows[0]} classes, this data set has {wanted_rows[0]}; give the --dataset or '
                        '--data it was trained on')
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # its first line names the class, each further one what differs
        difference = textwrap.shorten(str(error).splitlines()[1].rstrip('.'), 120, placeholder=' ...')
        raise UserError(f'{path}: is of another architecture or size ({difference}); give the {flags} it was '
                        'trained with') from None


def fill_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], path: str | Path) -> None:
    """Load a checkpoint's momentum, laid out in memory as the parameters are (the fused step needs that).

    Weight decay and the like stay the new command's; train_epoch sets the learning rate. Raises UserError if it is not of
    the same parameters.
    """
    try:
        groups = [{name: value for name, value in group.items() if name != 'lr'}
                  for group in optimizer.param_groups]
        optimizer.load_state_dict(state)
        for group, options in zip(optimizer.param_groups, groups, strict=True):
            group.update(options)
        for parameter in optimizer.param_groups[0]['params']:
            buffer = torch.zeros_like(parameter)
            momentum = optimizer.state[parameter].get('momentum_buffer')  # none of a parameter that was never used
            if momentum is not None:
                if momentum.shape != parameter.shape:
                    raise ValueError
                buffer.copy_(momentum)
            optimizer.state[parameter]['momentum_buffer'] = buffer
    except (AttributeError, KeyError, TypeError, ValueError, IndexError):
        raise UserError(f'{path}: its "optimizer" is not that of its network; name another --output_dir') from None
