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

ROW = 1024  # values that kernels take well in a row


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
    """A depthwise convolution with 5×5 weights, whose gradient is put together from gradients of 5×3 weights.

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

        def gradients(x: Tensor, weight: Tensor, padding: list[int], *of: bool) -> tuple[Tensor | None, Tensor | None, None]:
            return torch.ops.aten.convolution_backward(grad, x, weight, None, [ctx.stride] * 2, padding, [1, 1], False, [0, 0],
                                                       len(weight), [*of, False])
        columns = torch.empty_like(weight)
        for first, padding in ((0, (2, 0)), (2, (0, 2))):  # columns 0-2, then 2-4: the middle one comes out the same twice
            place = slice(first, first + 3)
            columns[..., place] = gradients(F.pad(x, padding), weight[..., place], [2, 0], False, True)[1]
        return gradients(x, weight, [2, 2], True, False)[0] if ctx.needs_input_grad[0] else None, columns, None


def depthwise_conv(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """Convolve each channel by itself: (batch, channels, h, w), (channels, 1, k, k) -> (batch, channels, h / stride, ...)."""
    if weight.shape[2] == 5 and weight.requires_grad and torch.is_grad_enabled() and is_plain(x):
        return _WideDepthwiseConv.apply(x, weight, stride)
    return F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2, groups=len(weight))


class _AveragePool(torch.autograd.Function):
    """A 3×3 average as a depthwise convolution; it takes pixels beyond the edge for zeros, which `scale_edges` makes up for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: int, count_include_pad: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.stride, ctx.count_include_pad, ctx.weight = stride, count_include_pad, x.new_full((x.shape[1], 1, 3, 3), 1 / 9)
        y = F.conv2d(x, ctx.weight, stride=stride, padding=1, groups=x.shape[1])
        return y if count_include_pad else _AveragePool.scale_edges(y, x, stride)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, = ctx.saved_tensors
        if not ctx.count_include_pad:
            grad = _AveragePool.scale_edges(grad.clone(), x, ctx.stride)
        return torch.ops.aten.convolution_backward(grad, x, ctx.weight, None, [ctx.stride] * 2, [1, 1], [1, 1], False, [0, 0],
                                                   x.shape[1], [True, False, False])[0], None, None

    @staticmethod
    def scale_edges(pooled: Tensor, x: Tensor, stride: int) -> Tensor:
        """Where a window hangs over an edge, two of its three rows or columns lie inside."""
        for dim in (2, 3):
            pooled.select(dim, 0).mul_(1.5)
            if (pooled.shape[dim] - 1) * stride == x.shape[dim] - 1:
                pooled.select(dim, -1).mul_(1.5)
        return pooled


def average_pool(x: Tensor, stride: int, count_include_pad: bool) -> Tensor:
    """F.avg_pool2d of 3×3 pixels with a padding of 1: (batch, channels, h, w) -> (batch, channels, h / stride, ...)."""
    if min(x.shape[2:]) < 2 or not is_plain(x):
        return F.avg_pool2d(x, 3, stride, 1, count_include_pad=count_include_pad)
    return _AveragePool.apply(x, stride, count_include_pad)


def _slide(x: Tensor, dim: int, stride: int) -> Tensor:
    """The maximum of each pixel (every stride-th) and its two neighbours along a dimension."""
    x = x.movedim(dim, 0)
    middle, right, left = x[::stride], x[1::stride], x[stride - 1:-1:stride]  # the first has none on its left
    y = torch.empty_like(middle)
    torch.maximum(middle[:len(right)], right, out=y[:len(right)])
    y[len(right):] = middle[len(right):]  # the last may have none on its right
    torch.maximum(y[1:], left, out=y[1:])
    return y.movedim(0, dim)


def max_pool(x: Tensor, stride: int) -> Tensor:
    """F.max_pool2d of 3×3 pixels with a padding of 1: (batch, channels, h, w) -> (batch, channels, h / stride, ...).

    Where nobody asks for the gradient, for which the place of each maximum is needed: by rows, then by columns.
    """
    if (x.requires_grad and torch.is_grad_enabled()) or not is_plain(x):
        return F.max_pool2d(x, 3, stride, 1)
    return _slide(_slide(x, 2, stride), 3, stride)


class _GroupedBatchNorm(torch.autograd.Function):
    """Batch-norm by the batch's statistics; `group` pixels side by side are taken as one of group·channels channels.

    PyTorch's kernels begin anew at each pixel, and handle the channels that fill no whole vector one by one. Of long rows they
    give the statistics of each pixel of a group by itself, from which those of all follow: var = the mean of the variances +
    the variance of the means.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = _rows(x, group)
        means, variances = (values.view(group, -1) for values in torch.ops.aten.batch_norm_update_stats(rows, None, None, 0.0))
        mean = means.mean(0)
        var = (variances + (means - mean) ** 2).mean(0)
        invstd = (var + eps).rsqrt()
        scale = weight * invstd
        ctx.save_for_backward(x, mean, invstd, scale)
        ctx.eps, ctx.group = eps, group
        ctx.mark_non_differentiable(mean, var)
        y = torch.empty_like(x)
        torch.addcmul(_repeat(bias - mean * scale, group), rows, _repeat(scale, group), out=_rows(y, group))
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, mean, invstd, scale = ctx.saved_tensors
        group, channels, count = ctx.group, x.shape[1], x.numel() // x.shape[1]
        rows, grads = _rows(x, group), _rows(grad.contiguous(memory_format=torch.channels_last), group)
        _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            grads, rows, None, None, None, _repeat(mean, group), _repeat(invstd, group), True, ctx.eps, [False, True, True])
        of_weight, of_bias = (values.view(group, channels).sum(0) for values in (of_weight, of_bias))
        # dx = scale · (dy - mean(dy) - x̂ · mean(dy · x̂)), x̂ = (x - mean) · invstd, as a linear function of x and dy
        slope = -scale * invstd * of_weight / count
        offset = -scale * of_bias / count - slope * mean
        of_x = torch.empty_like(x)
        torch.addcmul(_repeat(offset, group), rows, _repeat(slope, group), out=_rows(of_x, group))
        _rows(of_x, group).addcmul_(grads, _repeat(scale, group))
        return of_x, of_weight, of_bias, None, None


def _rows(x: Tensor, group: int) -> Tensor:
    """A channels-last image (batch, channels, h, w) as rows of `group` pixels, (pixels / group, group·channels)."""
    return x.permute(0, 2, 3, 1).view(-1, group * x.shape[1])


def _repeat(values: Tensor, group: int) -> Tensor:
    """The channels' values for a row of `group` pixels."""
    return values.expand(group, -1).contiguous().view(-1)


def batch_norm(x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, momentum: float,
               eps: float) -> Tensor:
    """Normalise x (batch, channels, h, w) by the statistics of the batch, with which the running ones are updated.

    Where x is channels-last, in rows of as many pixels (a power of two) as divide x evenly and hold up to ROW values.
    """
    count, group = x.numel() // x.shape[1], 1
    if is_plain(x) and x.is_contiguous(memory_format=torch.channels_last):
        group = math.gcd(count, 2 ** int(math.log2(max(1, ROW // x.shape[1]))))
    if group == 1:
        return F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
    y, mean, var = _GroupedBatchNorm.apply(x, weight, bias, eps, group)
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(var * (count / (count - 1)), momentum)
    return y
