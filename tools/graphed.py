"""Run a program with its training steps replayed as CUDA graphs, for networks so small that launching them takes the time.

    python tools/graphed.py train_search.py --method=NAO --child_drop_path_keep_prob=1.0 ...

A step of a network is recorded once for each size of batch, and a replay launches all its operations at once. The program,
its flags and its files are the same, and its numbers but for rounding. Steps that differ from each other are made as ever: a
supernet's, and those with drop path or mixed precision; the log says which it is.
"""

import argparse
import runpy
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import runs
import torch
from torch import Tensor

import flags
import training
import utils
from model import FixedNetwork

PROGRAMS = ('train_search.py', 'train_cifar.py')
EAGER = 5  # steps of each size of batch before one is recorded; cuDNN chooses its algorithms in them


class Recorded(NamedTuple):
    """A step as a graph, and the tensors that it reads and writes."""

    graph: Any
    images: Tensor
    labels: Tensor
    logits: Tensor
    loss: Tensor


class GraphedSteps:
    """`training.make_step` with CUDA graphs; all of the program is to run on one stream that is not the default one."""

    def __init__(self) -> None:
        self.plain = training.make_step
        self.optimizer: torch.optim.Optimizer | None = None  # that of the training that is under way
        self.told: set[str] = set()

    def __call__(self, run: utils.Run, forward: Any, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor,
                 weight: float, *others: Any) -> tuple[Tensor, Tensor]:
        """Train on a batch; its logits (batch, classes) and mean loss (), both without gradients."""
        if optimizer is not self.optimizer:
            self.optimizer, self.seen, self.recorded = optimizer, Counter(), {}
            self.lr = torch.zeros((), device=run.device, dtype=torch.float32)  # as the optimiser wants it
        batch, (group,) = (*images.shape, weight), optimizer.param_groups
        self.seen[batch] += 1
        small = images.is_cuda and getattr(run.args, 'dataset', '') != 'imagenet'  # whose pinned memory is another thread's
        alike = small and isinstance(forward, FixedNetwork) and forward.drop_path_keep_prob >= 1 and run.amp_dtype is None
        if alike and torch.cuda.current_stream(run.device) == torch.cuda.default_stream(run.device):
            raise flags.UserError('steps are recorded on the first visible GPU alone; CUDA_VISIBLE_DEVICES says which it is')
        self.tell(run, 'steps are replayed as CUDA graphs' if alike else 'steps are made as ever, as they differ: no graphs')
        if not alike or self.seen[batch] <= EAGER:
            return tuple(tensor.detach() for tensor in self.plain(run, forward, optimizer, images, labels, weight, *others))
        if batch not in self.recorded:
            self.recorded[batch] = self.record(run, forward, optimizer, images.clone(), labels.clone(), weight, *others)
        step = self.recorded[batch]
        step.images.copy_(images)
        step.labels.copy_(labels)
        self.lr.fill_(group['lr'])
        step.graph.replay()
        return step.logits, step.loss

    def tell(self, run: utils.Run, line: str) -> None:
        """Log a line that has not been logged yet."""
        if line not in self.told:
            self.told.add(line)
            run.log(line)

    def record(self, run: utils.Run, forward: Any, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor,
               *others: Any) -> Recorded:
        """Record a step, which is not made by that. Its learning rate is read from `self.lr`."""
        graph, (group,) = torch.cuda.CUDAGraph(), optimizer.param_groups
        lr, group['lr'], measures = group['lr'], self.lr, torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = False  # nothing can be measured now; what was chosen stays
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                logits, loss = self.plain(run, forward, optimizer, images, labels, *others)
                logits, loss = logits.detach(), loss.detach()
        finally:
            torch.backends.cudnn.benchmark, group['lr'] = measures, lr
        return Recorded(graph, images, labels, logits, loss)


def main() -> None:
    """Run the program that the first argument names."""
    parser = flags.Parser(__doc__.splitlines()[0], 'PROGRAM [FLAG ...]')
    parser.add_argument('program', help=' or '.join(PROGRAMS))
    parser.add_argument('arguments', nargs=argparse.REMAINDER, help='its flags')
    args = parser.parse_args()
    program = runs.ROOT / Path(args.program).name
    if program.name not in PROGRAMS:
        raise flags.UserError(f'{args.program} is not {" or ".join(PROGRAMS)}')
    if not torch.cuda.is_available():
        raise flags.UserError('no CUDA GPU is here, where alone steps can be recorded; run the program itself')
    torch.cuda.set_stream(torch.cuda.Stream())  # the default one cannot be recorded
    training.make_step = GraphedSteps()
    sys.argv = [str(program), *args.arguments]
    runpy.run_path(str(program), run_name='__main__')


if __name__ == '__main__':
    flags.run_program(main)
