"""What a search will cost: its formula, with the seconds of each part measured at the start, and the estimate."""

import copy
import datetime
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import controller
import training
from candidates import Recipe
from model_search import score_pool
from utils import Run, seconds_of


class Part(NamedTuple):
    """A term of the formula."""

    what: str
    seconds: float  # of one
    count: int


def seconds_of_step(run: Run, network: nn.Module, batch_size: int, image_size: int, *extras: Any) -> float:
    """Seconds of a training step on a copy of a network; `extras` go to it after the images."""
    network = copy.deepcopy(network).train()
    images = torch.zeros(batch_size, 3, image_size, image_size, device=run.device)

    def step() -> None:
        with run.autocast():
            loss = network(images, *extras, 0)[0].sum()
        loss.backward()
    return seconds_of(run, step)


def seconds_of_score(run: Run, supernet: nn.Module, arch: Any, images: int, image_size: int) -> float:
    """Seconds of scoring one architecture on a number of images, on a copy of the supernet."""
    supernet = copy.deepcopy(supernet).eval()
    batch = torch.zeros(images, 3, image_size, image_size, device=run.device), torch.zeros(images, device=run.device)
    return seconds_of(run, lambda: score_pool(run.alone(), supernet, [arch], *batch))


def fits(run: Run, nao: controller.NAO, tokens: Tensor, settings: controller.Settings, counts: list[int],
         expand: int | None) -> Part:
    """The controllers' fits, each to so many architectures as `counts` says; tokens: (count, length) to measure with."""
    nao = copy.deepcopy(nao).to(run.device)  # which lays a copied LSTM's weights side by side again, as a GPU wants them
    batch = tokens[:settings.batch_size]

    def step() -> None:
        prediction, log_probs = nao.reconstruct(batch)
        (prediction.sum() + log_probs.sum()).backward()
    known = [(count - count // 10) * expand for count in counts] if expand else counts
    steps = settings.members * sum(
        controller.fit_epochs(settings, count, tokens.shape[1], not index) * math.ceil(count / settings.batch_size)
        for index, count in enumerate(known))
    return Part(f'{steps} steps of {len(counts)} fits', seconds_of(run, step), steps)


def ranking(run: Run, recipe: Recipe, seconds: float, count: int) -> Part:
    """The final trainings of `count` architectures, whose steps take `seconds` each."""
    epochs = count * recipe.epochs
    steps = training.steps_of(recipe.train_batches(run), recipe.max_steps)
    return Part(f'{epochs} epochs of {steps} steps of the best', seconds, epochs * steps)


def log(run: Run, *parts: Part) -> None:
    """Log the formula and the estimate."""
    total = sum(part.seconds * part.count for part in parts)
    terms = ' + '.join(f'{part.what} ({part.seconds:.3g} s each)' for part in parts if part.count)
    run.log(f'cost, measured at the start: {terms}: about {datetime.timedelta(seconds=round(total))} in all')
