"""PyTorch's operations in forms that take less time on the CPU.

Each computes what the operation of its name computes, up to rounding. On other devices, and for who traces, compiles or casts,
they are PyTorch's own (see `is_plain`). They were chosen by measuring whole training steps: there most of an operation's inputs
are not in the caches, as they would be if it were measured by itself.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

VECTOR = 16  # channels that the kernels take at once


def is_plain(x: Tensor) -> bool:
    """Whether x is on the CPU and nobody traces, compiles or casts the operations on it."""
    return x.device.type == 'cpu' and not (
        torch.jit.is_tracing() or torch.compiler.is_compiling() or torch.is_autocast_enabled('cpu'))


def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent as 2·sigmoid(2x) - 1, several times as fast; in float32 it is off by 2e-7 at most."""
    return torch.sigmoid(2 * x).mul(2).sub(1) if is_plain(x) else torch.tanh(x)


def log_softmax(scores: Tensor) -> Tensor:
    """Log-probabilities over the last dimension; computed along the first, where a few scores do not waste whole vectors."""
    if not is_plain(scores):
        return F.log_softmax(scores, dim=-1)
    return F.log_softmax(scores.movedim(-1, 0), dim=0).movedim(0, -1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear of many rows, x (batch, steps, features), as a 1×1 convolution: on some processors twice as fast."""
    if not is_plain(x):
        return F.linear(x, weight, bias)
    rows = x.reshape(1, -1, 1, x.shape[2]).movedim(3, 1)
    return F.conv2d(rows, weight[:, :, None, None], bias).movedim(1, 3).reshape(*x.shape[:2], -1)


class _WideDepthwiseConv(torch.autograd.Function):
    """A depthwise convolution with 5×5 weights, whose gradient is put together from gradients of narrower weights.

    PyTorch has a fast kernel for the gradient of weights up to a width of 3; that for 5×5 takes ten times as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, weight, stride=stride, padding=2, groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, weight = ctx.saved_tensors

        def gradients(x: Tensor, weight: Tensor, *of: bool) -> tuple[Tensor | None, Tensor | None, None]:
            padding = [size // 2 for size in weight.shape[2:]]
            return torch.ops.aten.convolution_backward(grad, x, weight, None, [ctx.stride] * 2, padding, [1, 1], False, [0, 0],
                                                       len(weight), [*of, False])
        columns = torch.empty_like(weight)
        for shift, width, place, part in ((-1, 3, slice(0, 2), slice(0, 2)), (0, 1, slice(2, 3), slice(0, 1)),
                                          (1, 3, slice(3, 5), slice(1, 3))):  # columns of the 5×5, and of the narrower weights
            moved = F.pad(x, (-shift, shift)) if shift else x  # column j sees pixel x + j - 2; of three columns, x + j - 1
            columns[..., place] = gradients(moved, weight[..., :width], False, True)[1][..., part]
        return gradients(x, weight, True, False)[0] if ctx.needs_input_grad[0] else None, columns, None


def depthwise_conv(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """Convolve each channel by itself: (batch, channels, h, w), (channels, 1, k, k) -> (batch, channels, h / stride, ...)."""
    if weight.shape[2] == 5 and weight.requires_grad and torch.is_grad_enabled() and is_plain(x):
        return _WideDepthwiseConv.apply(x, weight, stride)
    return F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2, groups=len(weight))


class _GroupedBatchNorm(torch.autograd.Function):
    """Batch-norm by the batch's statistics; `group` pixels side by side are taken as one of group·channels channels.

    PyTorch's kernels handle channels in vectors and the rest of a pixel's channels one by one, at several times the cost.
    They normalise each group of pixels by itself; from its mean and variance those of all follow (var = the mean of the
    variances + the variance of the means), and a linear function corrects what they made.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: int) -> tuple[Tensor, Tensor, Tensor]:
        channels = x.shape[1]
        y = torch.empty_like(x)
        rows, results = (values.permute(0, 2, 3, 1).view(-1, group * channels) for values in (x, y))
        means, invstds = x.new_empty(2, group, channels)
        torch.ops.aten.native_batch_norm.out(rows, None, None, None, None, True, 0.0, eps, out=results,
                                             save_mean=means.view(-1), save_invstd=invstds.view(-1))
        mean = means.mean(0)
        var = (invstds ** -2 - eps + (means - mean) ** 2).mean(0)
        invstd = (var + eps).rsqrt()
        scale = weight * invstd
        torch.addcmul(((means - mean) * scale + bias).flatten(), results, (scale / invstds).flatten(), out=results)
        ctx.save_for_backward(x, mean, invstd, scale)
        ctx.eps, ctx.group = eps, group
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, mean, invstd, scale = ctx.saved_tensors
        group, channels, count = ctx.group, x.shape[1], x.numel() // x.shape[1]
        rows, grads = (values.permute(0, 2, 3, 1).reshape(-1, group * channels) for values in (x, grad))
        _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            grads, rows, None, None, None, mean.repeat(group), invstd.repeat(group), True, ctx.eps, [False, True, True])
        of_weight, of_bias = (values.view(group, channels).sum(0) for values in (of_weight, of_bias))
        # dx = scale · (dy - mean(dy) - x̂ · mean(dy · x̂)), x̂ = (x - mean) · invstd, as a linear function of x and dy
        slope = -scale * invstd * of_weight / count
        of_rows = torch.addcmul((-scale * of_bias / count - slope * mean).repeat(group), rows, slope.repeat(group))
        of_x = of_rows.addcmul_(grads, scale.repeat(group)).view(x.shape[0], *x.shape[2:], channels).permute(0, 3, 1, 2)
        return of_x, of_weight, of_bias, None, None


def batch_norm(x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, momentum: float,
               eps: float) -> Tensor:
    """Normalise x (batch, channels, h, w) by the statistics of the batch, with which the running ones are updated.

    In groups of pixels where channels fill no whole vectors, pixels fill whole groups, and x is channels-last.
    """
    count, group = x.numel() // x.shape[1], VECTOR // math.gcd(x.shape[1], VECTOR)
    if group == 1 or count % group or not is_plain(x) or not x.is_contiguous(memory_format=torch.channels_last):
        return F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
    y, mean, var = _GroupedBatchNorm.apply(x, weight, bias, eps, group)
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(var * (count / (count - 1)), momentum)
    return y
