"""Training a network: the loop, the evaluation, a whole training, and what both training programs share.

`train_epoch` and `evaluate` are the one loop of all programs. `train` is a whole training as a generator, which yields after
each epoch; the programs' own loop over it, in `train_network`, writes metrics and checkpoints.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import architecture
import checkpoint
import datasets
from flags import BATCH, CHANNELS, COUNT, KEEP, LAYERS, NODES, NOT_NEGATIVE, POSITIVE_INT, Parser, Stopped, UserError, add
from model import count_madds, count_parameters
from utils import LOG_EVERY, Run, commit, processor

FEW_IMAGES = 32  # on a GPU: the fewest of the published trainings, 128 on 4 GPUs
AUX_WEIGHT = 0.4  # of the auxiliary head's loss (paper, appendix)


class NotFiniteError(Stopped):
    """A training loss is infinite or not a number."""


# ------------------------------------------------------------------------------------------------------------- the loop

def cosine(epoch: int, epochs: int, lr_max: float, lr_min: float) -> float:
    """The learning rate of an epoch, from 0: lr_min + (lr_max - lr_min)(1 + cos(π·epoch/epochs)) / 2."""
    return lr_min + (lr_max - lr_min) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def step_decay(epoch: int, lr: float, gamma: float, decay_period: int) -> float:
    """The learning rate of an epoch, from 0: lr times gamma for every `decay_period` epochs done."""
    return lr * gamma ** (epoch // decay_period)


class Meter:
    """Sums loss and right answers on the device; nothing is read before `values` is called."""

    def __init__(self, run: Run):
        dtype = torch.float32 if run.device.type == 'mps' else torch.float64  # MPS has no double
        self.run, self.sums = run, torch.zeros(4, device=run.device, dtype=dtype)
        self.start, self.classes = time.perf_counter(), 0

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Count a batch: logits (batch, classes), labels (batch,), mean loss ()."""
        self.classes = logits.shape[1]
        right = logits.topk(min(5, self.classes), dim=1).indices == labels.unsqueeze(1)
        self.sums[:3] += torch.stack([loss * len(labels), right[:, 0].sum(), right.sum()])
        self.sums[3] += len(labels)

    def values(self, of_all: bool = True) -> dict[str, float]:
        """Mean loss, top-1 and, of more than five classes, top-5 accuracy in per cent, images per second; waits for the device.

        Of all processes, which call it together, or of this one.
        """
        loss, top1, top5, images = (self.run.sum(self.sums.clone()) if of_all else self.sums).tolist()
        seconds = time.perf_counter() - self.start
        top5 = {'top5': 100 * top5 / images} if self.classes > 5 else {}  # of fewer classes all are among the first five
        return {'loss': loss / images, 'top1': 100 * top1 / images, **top5, 'images_per_second': images / seconds}


class Clock:
    """Estimates the time that the rest of a training takes from what was done since the clock's start."""

    def __init__(self, step: int, steps: int):
        self.start, self.first, self.steps = time.monotonic(), step, steps

    def left(self, step: int) -> str:
        """The time to the last step, as h:mm:ss."""
        per_step = (time.monotonic() - self.start) / max(1, step - self.first)
        return str(timedelta(seconds=round(per_step * max(0, self.steps - step))))


def describe(values: dict[str, float]) -> str:
    """A meter's values as a log line shows them."""
    top5 = f'top-5 {values["top5"]:.2f} % ' if 'top5' in values else ''
    return f'loss {values["loss"]:.4f} top-1 {values["top1"]:.2f} % {top5}{values["images_per_second"]:.0f} images/s'


def errors(values: dict[str, float]) -> str:
    """A meter's values as the log shows a result."""
    top5 = f' top-5 error {100 - values["top5"]:.2f} %' if 'top5' in values else ''
    return f'loss {values["loss"]:.4f} top-1 error {100 - values["top1"]:.2f} %{top5}'


def steps_of(batches: Iterable, max_steps: int | None = None) -> int:
    """The steps of an epoch: all batches, or `max_steps` of them."""
    return min(len(batches), max_steps or len(batches))


def update(run: Run, optimizer: torch.optim.Optimizer, loss: Tensor, grad_bound: float, shares_weights: bool = False) -> None:
    """Make an optimiser step on the parameters that the loss reaches: a supernet's step leaves thousands of others alone.

    shares_weights: it is a supernet's, which nothing wraps (see Run.parallel); processes average its gradients here.
    """
    group, = optimizer.param_groups
    parameters = group['params']
    run.scaler.scale(loss).backward()
    used = [parameter for parameter in parameters if parameter.grad is not None]
    if shares_weights:
        run.average_gradients(used)
    group['params'] = used
    run.scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(used, grad_bound)
    run.scaler.step(optimizer)
    run.scaler.update()
    optimizer.zero_grad(set_to_none=shares_weights or run.world == 1)
    group['params'] = parameters


def make_step(run: Run, forward: Callable[[Tensor, int], tuple[Tensor, Tensor | None]], optimizer: torch.optim.Optimizer,
              images: Tensor, labels: Tensor, weight: float, step: int, grad_bound: float, label_smooth: float,
              shares_weights: bool) -> tuple[Tensor, Tensor]:
    """Train on a batch whose mean loss counts `weight`, see train_epoch; its logits (batch, classes) and mean loss ()."""
    with run.autocast():
        logits, aux_logits = forward(images, step)
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smooth)
        if aux_logits is not None:
            loss = loss + AUX_WEIGHT * F.cross_entropy(aux_logits, labels, label_smoothing=label_smooth)
    update(run, optimizer, loss * weight if weight != 1 else loss, grad_bound, shares_weights)
    return logits, loss


def train_epoch(run: Run, forward: Callable[[Tensor, int], tuple[Tensor, Tensor | None]], optimizer: torch.optim.Optimizer,
                batches: Iterable, *, title: str, lr: float, step: int, clock: Clock, grad_bound: float,
                label_smooth: float = 0.0, max_steps: int | None = None,
                shares_weights: bool = False) -> tuple[dict[str, float], int]:
    """Train on `batches` (all, or `max_steps` of them) and return the epoch's values (see Meter) and the next step.

    forward(images, step) gives (logits, auxiliary logits or None). The loss is cross-entropy, plus 0.4 times that of the
    auxiliary logits. shares_weights: see `update`. Raises NotFiniteError, at a log line or the end, when the loss was not
    finite.
    """
    for group in optimizer.param_groups:
        group['lr'] = lr
    meter, count = Meter(run), steps_of(batches, max_steps)

    def values() -> dict[str, float]:
        now = meter.values()
        if not math.isfinite(now['loss']):
            raise NotFiniteError(f'the loss is {now["loss"]} in {title}, step {done}/{count}; the last checkpoint is kept; '
                                 'a smaller learning rate may help')
        return now

    for done, (images, labels, weight) in enumerate(batches, start=1):
        logits, loss = make_step(run, forward, optimizer, images, labels, weight, step, grad_bound, label_smooth,
                                 shares_weights)
        meter.update(logits, labels, loss)
        step += 1
        if done % LOG_EVERY == 0:
            run.log(f'{title} step {done}/{count} {describe(values())} lr {lr:.3g} left {clock.left(step)}')
        elif run.live.due:
            run.live.show(f'{title} step {done}/{count} {describe(meter.values(of_all=False))} left {clock.left(step)}')
        if done == count:
            break
    result = values()
    if not math.isfinite(nn.utils.get_total_norm(optimizer.param_groups[0]['params'])):  # no loss saw the last step
        raise NotFiniteError(f'the weights are no longer finite after {title}; the last checkpoint is kept; a smaller learning '
                             'rate may help')
    return result, step


@torch.no_grad()
def evaluate(run: Run, model: nn.Module, batches: Iterable) -> dict[str, float]:
    """Mean loss, top-1 and top-5 accuracy in per cent of the model in eval mode on `batches`."""
    model.eval()
    meter = Meter(run)
    for done, (images, labels) in enumerate(batches, start=1):
        with run.autocast():
            logits, _ = model(images)
            loss = F.cross_entropy(logits, labels)
        meter.update(logits, labels, loss)
        if run.live.due:
            run.live.show(f'testing {done}/{len(batches)} {describe(meter.values(of_all=False))}')
    return meter.values()


def sgd(run: Run, model: nn.Module, l2_reg: float) -> torch.optim.SGD:
    """The optimiser of every network here: SGD with momentum 0.9; train_epoch sets its learning rate."""
    fused = run.device.type in ('cpu', 'cuda')
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=l2_reg, fused=fused)
    for parameter in model.parameters():  # the fused step cannot start some of them later, as a supernet's paths would
        optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
    return optimizer


# ------------------------------------------------------------------------------------------------------ a whole training

class Epoch(NamedTuple):
    """What a training yields after each epoch."""

    done: int  # epochs so far
    step: int  # optimiser steps so far
    lr: float
    train: dict[str, float]  # values of the epoch's training (see Meter)
    test: dict[str, float]  # values of the evaluation after it


def train(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, train_batches: Iterable, eval_batches: Iterable, *,
          epochs: int, lr: Callable[[int], float], first: int = 0, title: str = '', split: str = 'test',
          **options: Any) -> Iterator[Epoch]:
    """Train a network for `epochs`, of which the `first` ones are done; yield after each of the others.

    lr(epoch) is an epoch's learning rate; split: what the log calls the images of eval_batches; `options` go to train_epoch.
    Raises NotFiniteError.
    """
    count = steps_of(train_batches, options.get('max_steps'))
    step = first * count  # in today's steps: those of the checkpoint may have been of another batch size
    clock = Clock(step, epochs * count)
    parallel = run.parallel(model)
    for epoch in range(first, epochs):
        model.train()
        rate = lr(epoch)
        name = f'{title}epoch {epoch + 1}/{epochs}'
        training, step = train_epoch(run, parallel, optimizer, train_batches, title=name, lr=rate, step=step, clock=clock,
                                     **options)
        run.average_statistics(model)
        evaluation = evaluate(run, model, eval_batches)
        if not math.isfinite(evaluation['loss']):  # the last step broke the weights; they must not become a checkpoint
            raise NotFiniteError(f'the {split} loss is {evaluation["loss"]} after {name}; the last checkpoint is kept; a '
                                 'smaller learning rate may help')
        run.log(f'{name} train {describe(training)} | {split} {describe(evaluation)} lr {rate:.3g} left {clock.left(step)}')
        yield Epoch(epoch + 1, step, rate, training, evaluation)


def parts(labels: Tensor | list[int], args: argparse.Namespace) -> tuple[Tensor | range, Tensor | range]:
    """Indices of the images that train and of those held out, as --train_images, --holdout and --seed say.

    Raises UserError.
    """
    if not (args.holdout or args.train_images):
        return range(len(labels)), range(0)
    first, held_out = datasets.shuffled_split(len(labels), len(labels) - args.holdout, args.seed)
    if len(first) < 2 or args.holdout >= len(labels):
        raise UserError(f'--holdout={args.holdout} of {len(labels)} training images leaves none to train on')
    if args.train_images:
        labels = torch.as_tensor(labels).cpu()
        if args.train_images > len(first):
            raise UserError(f'--train_images={args.train_images}, but there are {len(first)}')
        first = first[datasets.draw_balanced(labels[first], args.train_images, args.seed)]
    return first.sort().values, held_out


def fill(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, classes: Sequence[str], fingerprint: int,
         path: Path) -> dict[str, Any] | None:
    """The checkpoint that a training goes on from, loaded into its network and optimiser; None where there is none.

    classes, fingerprint: of its images, see datasets. Raises UserError for a checkpoint of another training.
    """
    state = run.together(lambda: checkpoint.load_network(path) if os.path.exists(path) else None)
    if state:
        checkpoint.require(state, {'epoch': int, 'optimizer': dict, 'best_acc_top1': checkpoint.NUMBER}, path,
                           'test it by --mode=test --checkpoint, or ')
        checkpoint.same_run(state, run.args, path)
        checkpoint.same_architecture(state, model.arch, path)
        checkpoint.same_classes(state, classes, path)
        if run.args.holdout or run.args.train_images:
            checkpoint.same_images(state, fingerprint, path)
        checkpoint.fill_model(model, state['model'], path)
        checkpoint.fill_optimizer(optimizer, state['optimizer'], path)
    return state


def train_network(run: Run, model: nn.Module, train_batches: Iterable, eval_batches: Iterable, *, l2_reg: float,
                  more: dict[str, Any], test_batches: Iterable | None = None, **options: Any) -> None:
    """Train a network to the end, from checkpoint.pt in the output directory if there is one; `options` go to `train`.

    After each epoch a line of metrics.jsonl, checkpoint.pt, and checkpoint_best.pt if the accuracy on eval_batches is the best
    so far, are written. test_batches: what eval_batches are held out for; they are looked at once, at the end. more: what the
    checkpoint holds besides.
    """
    split = 'valid' if test_batches else 'test'
    run.use_all_gpus()
    model, path = run.place(model), run.output_dir / 'checkpoint.pt'
    if run.args.compile:
        run.compile_cells(model)
    optimizer = sgd(run, model, l2_reg)
    state = fill(run, model, optimizer, eval_batches.classes, more['fingerprint'], path)
    run.open_output(anew=state is None)
    first = state['epoch'] if state else 0
    best = float(state['best_acc_top1']) if state else -1.0  # a first network that gets nothing right is the best so far
    last = state.get('last_acc_top1', math.nan) if state else math.nan
    run.part_ways()
    if state:
        run.resume(state, f'epoch {first}')
    log_start(run, train_batches, eval_batches, model, records=first < options['epochs'])
    log_share(run, train_batches)
    for epoch in train(run, model, optimizer, train_batches, eval_batches, first=first, split=split, **options):
        last = epoch.test['top1']
        is_best, best = last > best, max(best, last)
        run.write_metrics(kind='epoch', epoch=epoch.done, step=epoch.step, lr=epoch.lr, train=epoch.train,
                          **{split: epoch.test}, best_acc_top1=best)
        save_every = run.args.save_every and epoch.done % run.args.save_every == 0
        paths = [run.output_dir / name for name, due in (
            (f'checkpoint_{epoch.done}.pt', save_every), ('checkpoint_best.pt', is_best), ('checkpoint.pt', True)) if due]
        run.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'epoch': epoch.done, 'step': epoch.step,
                  'best_acc_top1': best, 'last_acc_top1': last, 'arch': str(model.arch), **more}, *paths)
    if first >= options['epochs']:
        run.log(f'nothing is left to train: {first} epochs are done, --epochs={options["epochs"]}')
    run.log(f'finished: best {split} top-1 error {100 - best:.2f} %, that of the last epoch {100 - last:.2f} %, checkpoints in '
            f'{run.output_dir}')
    if test_batches:
        test_once(run, model, test_batches, eval_batches.count)


def test_once(run: Run, model: nn.Module, test_batches: Iterable, held_out: int) -> None:
    """Test checkpoint_best.pt, which so many held-out images chose, on the test images."""
    path = run.output_dir / 'checkpoint_best.pt'
    chosen = run.together(lambda: checkpoint.load_network(path))  # which the first process may just have written
    checkpoint.fill_model(model, chosen['model'], path)
    values = evaluate(run, model, test_batches)
    run.log(f'test images, looked at once: {errors(values)}, of epoch {chosen["epoch"]}, which {held_out} held-out images '
            'chose')
    run.write_metrics(kind='final', epoch=chosen['epoch'], test=values)


def tested_path(args: argparse.Namespace) -> Path:
    """The checkpoint that --mode=test tests."""
    return Path(args.checkpoint or Path(args.output_dir) / 'checkpoint_best.pt')


def test_network(run: Run, state: dict[str, Any], build: Callable[[bool], nn.Module], eval_batches: Iterable
                 ) -> dict[str, float]:
    """Evaluate a checkpoint, that of `tested_path`, and log its errors; build(use_aux_head) makes the network."""
    path, weights = tested_path(run.args), state['model']
    model = run.place(build(any(name.startswith('auxiliary_head.') for name in weights)))
    checkpoint.same_architecture(state, model.arch, path)
    checkpoint.same_classes(state, eval_batches.classes, path)
    checkpoint.fill_model(model, weights, path)
    values = evaluate(run, model, eval_batches)
    run.open_log()
    run.log(f'{path}: {errors(values)} on {eval_batches.count} images')
    return values


def log_start(run: Run, train_batches: Iterable, eval_batches: Iterable, model: nn.Module, *extras: Any,
              records: bool = True) -> None:
    """Log what a reader wants to know first: device, images, sizes, arguments; `extras` go to the model after the image.

    records: whether the same goes to metrics.jsonl, as where something is left to do.
    """
    parameters, madds = count_parameters(model), count_madds(model, eval_batches.size, *extras)
    run.log(run.environment())
    run.log(f'images {train_batches.count:,} to train, {eval_batches.count:,} to evaluate, {len(eval_batches.classes)} '
            f'classes, {eval_batches.size}×{eval_batches.size} pixels')
    if len(eval_batches.classes) == 1:
        run.warn(f'all images are of one class, {eval_batches.classes[0]}: nothing can be learnt from them')
    run.log(f'parameters {parameters:,} (without the auxiliary head), multiply-adds of one image {madds:,}')
    run.log_arguments()
    if not records:
        return
    run.write_metrics(kind='start', date=datetime.now(timezone.utc).isoformat(timespec='seconds'), commit=commit(),
                      processor=processor(), environment=run.environment(), args=vars(run.args),
                      changed=getattr(run.args, 'changed', []), parameters=parameters, multiply_adds=madds,
                      classes=len(eval_batches.classes))


def log_share(run: Run, train_batches: Iterable) -> None:
    """Log how many images of a training step each GPU or process gets, and warn where they are few for its batch-norm."""
    parts, (start, stop) = run.world * len(run.devices), train_batches.bounds[0]
    if parts > 1:
        images, where = (stop - start) // parts, f'each of {parts} {"GPUs" if run.device.type == "cuda" else "processes"}'
        run.log(f'{stop - start} images a step, {images} on {where}')
        if images < FEW_IMAGES:
            run.warn(f'batch-norm normalises by the {images} images on {where}; the published results had {FEW_IMAGES} or '
                     'more: use a larger batch, with its rate, or fewer of them')


# ------------------------------------------------------------------------------------- the flags of both training programs

def add_network_flags(parser: Parser, layers: int, channels: int, keep_prob: float, drop_path: float) -> None:
    """The flags of a fixed architecture's network."""
    group = parser.add_argument_group('network')
    group.add_argument('--fixed_arc', '--arch', metavar='ARCH', help='the architecture: a line of integers, '
                       f'{", ".join(architecture.PUBLISHED)} or the path of an arch_pool file')
    add(group, 'arc_index', 'which line of the arch_pool file, from 0', 0, type=COUNT)
    add(group, 'layers', 'normal cells before, between and after the reduction cells', layers, type=LAYERS)
    add(group, 'nodes', 'nodes of a cell (default: as many as the architecture has)', type=NODES)
    add(group, 'channels', 'channels of the first cells', channels, type=CHANNELS)
    add(group, 'keep_prob', '1 - dropout before the classifier', keep_prob, type=KEEP)
    add(group, 'drop_path_keep_prob', '1 - drop path of the last cell at the end', drop_path, type=KEEP)
    add(group, 'use_aux_head', 'train with the auxiliary head', False, action='store_true')


def add_training_flags(parser: Parser, batch_size: int, eval_batch_size: int, epochs: int, l2_reg: float) -> None:
    """The flags of training and testing a fixed architecture's network."""
    group = parser.add_argument_group('training')
    add(group, 'mode', 'test: only evaluate a checkpoint', 'train', choices=['train', 'test'])
    add(group, 'checkpoint', 'what to test (default: checkpoint_best.pt in --output_dir)', metavar='PATH')
    add(group, 'batch_size', 'images per step', batch_size, type=BATCH)
    add(group, 'eval_batch_size', 'images per evaluation step', eval_batch_size, type=POSITIVE_INT)
    add(group, 'epochs', 'how often all training images are seen', epochs, type=POSITIVE_INT)
    add(group, 'l2_reg', 'weight decay', l2_reg, type=NOT_NEGATIVE)
    add(group, 'train_images', 'train on so many of the training images, drawn by the seed, as many of each class as it goes',
        type=BATCH)
    add(group, 'holdout', 'hold so many training images out: they choose the best epoch, and the test images are looked at '
        'once, at the end; 0: the test images choose', 0, type=COUNT)
    add(group, 'compile', 'compile each cell with torch.compile (minutes, then faster on GPUs)', False, action='store_true')


def parse_training_flags(parser: Parser) -> tuple[argparse.Namespace, architecture.Architecture, dict[str, Any] | None]:
    """Parse a training program's flags; in test mode the checkpoint answers for what they leave out.

    Returns them, the architecture that --fixed_arc and --arc_index name, which in the flags is then spelled out (a checkpoint
    must not depend on a pool file that a later search rewrites), and in test mode the checkpoint. Raises UserError.
    """
    args, state = parser.parse_args(), None
    if args.mode == 'test':
        path = tested_path(args)
        state = checkpoint.load_network(path)
        saved = state['args'] | {'fixed_arc': checkpoint.architecture_of(state)}
        known = [f'--{name}={saved[name]}' for name in ('fixed_arc', 'dataset', 'layers', 'nodes', 'channels')
                 if saved.get(name) is not None and hasattr(args, name)]
        try:
            args = parser.parse_args([*known, *sys.argv[1:]])
        except UserError as error:
            raise UserError(f'{path}: its arguments do not suit this program: {error}') from None
    if not args.fixed_arc:
        raise UserError('--fixed_arc is missing: a line of integers, or the path of an arch_pool file')
    try:
        arch = architecture.read(args.fixed_arc, args.arc_index, args.nodes)
    except architecture.ArchitectureError as error:
        raise UserError(f'--fixed_arc: {error}') from None
    args.fixed_arc, args.arc_index, args.nodes = str(arch), 0, len(arch.normal) // 4
    return args, arch, state
