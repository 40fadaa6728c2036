"""What test_processes.py runs in one process and in several: a step of training, evaluation, scoring of a pool.

python share.py OUTPUT [DEVICE]: writes to OUTPUT, for each batch size, the gradients of a fixed network and of the supernet
on one batch of all processes together; the values of an evaluation; the accuracies of a pool. All in double precision.
"""

import argparse
import sys
import warnings

import torch
from helpers import assert_equal, fill

import architecture
import datasets
import model_search
import training
import utils
from model import NASNetworkCIFAR
from model_search import NASWSNetworkCIFAR, WSBatchNorm

BATCH_SIZES = (12, 13)


def freeze(model):
    """Weights from their names; batch-norm with fixed statistics, as each process would gather its own."""
    fill(model)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d | WSBatchNorm):
            module.eval()


class Recorder(torch.optim.SGD):
    """Keeps the gradients of its last step."""

    def step(self):
        self.seen = {id(parameter): parameter.grad.cpu().clone() for group in self.param_groups for parameter in group['params']
                     if parameter.grad is not None}


def one_step(run, model, forward, data, batch_size, shares_weights=False):
    """The gradients of one step of the training loop, None where there are none, its values, and what it sent itself."""
    sent, all_reduce = [], torch.distributed.all_reduce

    def counted(tensor, *args, **kwargs):
        sent.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)
    torch.distributed.all_reduce = counted
    batches = datasets.TrainBatches(data, batch_size, torch.Generator(run.device).manual_seed(1), 4, run.rank, run.world)
    optimizer = Recorder(model.parameters())
    values, step = training.train_epoch(run, forward, optimizer, batches, title='', lr=0.0, step=0,
                                     clock=training.Clock(0, 1), grad_bound=1e9, label_smooth=0.1, max_steps=1,
                                     shares_weights=shares_weights)
    torch.distributed.all_reduce = all_reduce
    assert step == 1
    del values['images_per_second']
    gradients = {name: optimizer.seen.get(id(parameter)) for name, parameter in model.named_parameters()}
    return {'gradients': gradients, 'values': values, 'sent': sent}


class AsOnCUDA(torch.autograd.Function):
    """A depthwise convolution whose weights' gradients have the strides that CUDA's have, whatever those of the weights are."""

    @staticmethod
    def forward(ctx, images, weight):
        ctx.save_for_backward(images, weight)
        return torch.conv2d(images, weight, groups=len(weight))

    @staticmethod
    def backward(ctx, grad):
        images, weight = ctx.saved_tensors
        found = torch.nn.grad.conv2d_weight(images, weight.shape, grad, groups=len(weight))
        return None, torch.empty(weight.shape, device=grad.device).copy_(found)


class Depthwise(torch.nn.Module):
    """A classifier on such a convolution."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(10, 10, 3, groups=10, bias=False)
        self.classifier = torch.nn.Linear(10, 10)

    def forward(self, images, step):
        return self.classifier(AsOnCUDA.apply(images.repeat(1, 4, 1, 1)[:, :10], self.conv.weight).mean((2, 3))), None


def compute(device='cpu'):
    """Everything, as a dict, with the warnings about gradients' strides."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        result = compute_all(device)
    return result | {'warnings': [str(each.message) for each in seen if 'strides' in str(each.message)]}


def compute_all(device):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    run = utils.Run(argparse.Namespace(device=device, output_dir='nowhere', seed=0, tf32=None, layout='auto', amp='off'))
    data = datasets.load('digits', '', False, run.device).select(range(27))
    arch, other, *pool = architecture.sample(7, 2, range(5), torch.Generator().manual_seed(3))
    result = {'world': run.world, 'device': device}
    fixed = run.place(NASNetworkCIFAR(10, 1, 2, 2, 1.0, 1.0, True, 10, arch))
    supernet = run.place(NASWSNetworkCIFAR(10, 1, 2, 2, 1.0, 1.0, True, 10))
    freeze(fixed)
    freeze(supernet)
    fixed_parallel = run.parallel(fixed)
    for batch_size in BATCH_SIZES:
        result[f'fixed {batch_size}'] = one_step(run, fixed, fixed_parallel, data, batch_size)
        for name, path in (('supernet', arch), ('other', other)):  # one after the other: paths differ
            result[f'{name} {batch_size}'] = one_step(
                run, supernet, lambda images, step, path=path: supernet(images, path, step), data, batch_size, True)
        values = training.evaluate(run, fixed, datasets.EvalBatches(data, batch_size, run.rank, run.world))
        fixed.train()
        freeze(fixed)
        del values['images_per_second']
        result[f'evaluation {batch_size}'] = values
    depthwise = run.place(Depthwise())
    fill(depthwise)
    parallel = run.parallel(depthwise)
    result['strides'] = [one_step(run, depthwise, parallel, data, 12) for _ in range(3)]
    images, labels = datasets.EvalBatches(data, 100).batch(torch.arange(20, device=run.device))
    result['scores'] = model_search.score_pool(run, supernet, pool, images, labels)
    every = run.gather(result)
    for values in every:
        assert_equal(values, every[0])  # all processes have the same
    return result


if __name__ == '__main__':
    found = compute(*sys.argv[2:])
    if int(utils.os.environ['RANK']) == 0:
        torch.save(found, sys.argv[1])
