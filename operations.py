"""Candidate operations: the table from an operation's id to its module, and the blocks that networks are built of.

All feature maps are (batch, channels, height, width). Ids 0-4 are the search space of NAO-WS ("small"), ids 5-15 that of
NAO ("large"); the paper's appendix lists both.
"""

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import average_pool, batch_norm, depthwise_conv, factorized_reduce, max_pool, pointwise_conv


class State:
    """A feature map together with what was derived from it: each derivation is computed once for all who read it."""

    __slots__ = ('derived', 'raw')

    def __init__(self, raw: Tensor):
        self.raw = raw
        self.derived: dict[Hashable, Tensor] = {}

    def derive(self, key: Hashable, function: Callable[[Tensor], Tensor]) -> Tensor:
        """function(raw), kept under `key` for the next who asks.

        Without gradients it is made anew each time: kept, it would cost memory that only gradients need anyway. Who traces
        sees the same graph with gradients and without.
        """
        if key in self.derived:
            return self.derived[key]
        value = function(self.raw)
        if torch.is_grad_enabled() or torch.jit.is_tracing():
            self.derived[key] = value
        return value

    @property
    def relu(self) -> Tensor:
        """max(raw, 0), (batch, channels, height, width)."""
        return self.derive('relu', F.relu)

    def rectified(self) -> 'State':
        """The state whose feature map is this one's ReLU."""
        other = State(self.relu)
        other.derived['relu'] = other.raw
        return other


class BatchNorm2d(nn.BatchNorm2d):
    """Batch-norm that can use, and update, the batch's statistics although it is in eval mode.

    counted_together: its network counts its batches, together with those of others (model.Backbone.count_batch).
    """

    counted_together = False

    def forward(self, x: Tensor, bn_train: bool = False) -> Tensor:
        """(batch, channels, h, w) -> the same, normalised; by the batch's statistics in training or with `bn_train`."""
        if not (self.training or bn_train):
            return super().forward(x)
        if self.training and not self.counted_together:
            self.num_batches_tracked.add_(1)
        return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.momentum, self.eps)


class DepthwiseConv2d(nn.Conv2d):
    """Convolve each channel on its own, kernel k×k; see `depthwise_conv`."""

    def __init__(self, channels: int, kernel: int, stride: int):
        super().__init__(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, h, w) -> (batch, channels, h / stride, w / stride)."""
        return depthwise_conv(x, self.weight, self.stride[0])


class PointwiseConv2d(nn.Conv2d):
    """Convolution 1×1 without bias; see `pointwise_conv`."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, h, w) -> (batch, channels, h / stride, w / stride)."""
        return pointwise_conv(x, self.weight, self.stride[0])


class AvgPool2d(nn.AvgPool2d):
    """Average pooling; see `average_pool` for that of 3×3 pixels."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, h, w) -> (batch, channels, h / stride, w / stride)."""
        if (self.kernel_size, self.padding) == (3, 1):
            return average_pool(x, self.stride, self.count_include_pad)
        return super().forward(x)


class MaxPool2d(nn.MaxPool2d):
    """Max pooling; see `max_pool` for that of 3×3 pixels."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, h, w) -> (batch, channels, h / stride, w / stride)."""
        return max_pool(x, self.stride) if (self.kernel_size, self.padding) == (3, 1) else super().forward(x)


class SepConv(nn.Module):
    """Separable convolution: ReLU, depthwise k×k, pointwise, BN, applied twice; the first one carries the stride.

    `forward` takes the rectified input (`reads_relu`): the cell computes a state's ReLU once for all who read it, and
    entry 0 only keeps that ReLU's place in the published parameter names.
    """

    reads_relu = True

    def __init__(self, channels: int, kernel: int, stride: int):
        super().__init__()

        def half(stride: int) -> list[nn.Module]:
            return [DepthwiseConv2d(channels, kernel, stride),
                    nn.Conv2d(channels, channels, 1, bias=False),
                    BatchNorm2d(channels)]
        self.op = nn.Sequential(nn.Identity(), *half(stride), nn.ReLU(inplace=True), *half(1))

    def forward(self, rectified: Tensor) -> Tensor:
        """(batch, channels, h, w) after ReLU -> (batch, channels, h / stride, w / stride)."""
        return self.op(rectified)


class Conv(nn.Module):
    """ReLU, convolution, BN; with `pair` a 1×k convolution and a k×1 one in its place. Takes the rectified input."""

    reads_relu = True

    def __init__(self, channels: int, kernel: int, stride: int, pair: bool = False):
        super().__init__()

        def conv_bn(kernel: tuple[int, int], stride: tuple[int, int]) -> list[nn.Module]:
            conv = PointwiseConv2d if kernel == (1, 1) else nn.Conv2d
            padding = (kernel[0] // 2, kernel[1] // 2)
            return [conv(channels, channels, kernel, stride, padding, bias=False), BatchNorm2d(channels)]
        if pair:
            ops = [*conv_bn((1, kernel), (1, stride)), nn.ReLU(inplace=True), *conv_bn((kernel, 1), (stride, 1))]
        else:
            ops = conv_bn((kernel, kernel), (stride, stride))
        self.ops = nn.Sequential(nn.Identity(), *ops)

    def forward(self, rectified: Tensor) -> Tensor:
        """(batch, channels, h, w) after ReLU -> (batch, channels, h / stride, w / stride)."""
        return self.ops(rectified)


class ReLUConvBN(nn.Module):
    """ReLU (done by the caller), conv 1×1, BN: brings a state to the cell's channels."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 1, bias=False)
        self.bn = BatchNorm2d(channels_out)

    def forward(self, rectified: Tensor, bn_train: bool = False) -> Tensor:
        """(batch, channels_in, h, w) after ReLU -> (batch, channels_out, h, w)."""
        return self.bn(self.conv(rectified), bn_train)


class FactorizedReduce(nn.Module):
    """Halve height and width: two 1×1 convolutions, on the even pixels and on those one down and right of them.

    Entry 0 of a path only keeps the place in the published parameter names; see `factorized_reduce`.
    """

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        half = channels_out // 2
        self.path1 = nn.Sequential(nn.Identity(), nn.Conv2d(channels_in, half, 1, bias=False))
        self.path2 = nn.Sequential(nn.Identity(), nn.Conv2d(channels_in, channels_out - half, 1, bias=False))
        self.bn = BatchNorm2d(channels_out)

    def forward(self, x: Tensor, bn_train: bool = False) -> Tensor:
        """(batch, channels_in, h, w) -> (batch, channels_out, ceil(h / 2), ceil(w / 2))."""
        return self.bn(factorized_reduce(x, self.path1[1].weight, self.path2[1].weight), bn_train)


class Operation(NamedTuple):
    """A row of the table: the operation's name, how to make it, its kernel size (0 for the identity), and what it costs.

    cost: (channels, stride, side of the input in pixels) -> parameters and multiply-adds of one image; None: costs.py counts
    them on the module.
    """

    name: str
    make: Callable[[int, int], nn.Module]  # (channels, stride) -> module from a state to a state of as many channels
    kernel: int
    cost: Callable[[int, int, int], tuple[int, int]] | None = None


def _pool(pool: type[nn.Module], kernel: int, **options: bool) -> Callable[[int, int], nn.Module]:
    def make(channels: int, stride: int) -> nn.Module:
        if kernel % 2:
            return pool(kernel, stride, kernel // 2, **options)
        return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), pool(kernel, stride, **options))
    return make


def _conv(kernel: int, pair: bool = False) -> Callable[[int, int], nn.Module]:
    return lambda channels, stride: Conv(channels, kernel, stride, pair)


def _sep_conv(kernel: int) -> Callable[[int, int], nn.Module]:
    return lambda channels, stride: SepConv(channels, kernel, stride)


def _identity(channels: int, stride: int) -> nn.Module:
    return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels)


def halved(side: int, stride: int) -> int:
    """The side of a feature map after an operation of this stride, in pixels."""
    return -(-side // stride)


def pointwise_cost(channels_in: int, channels_out: int, side: int) -> tuple[int, int]:
    """Parameters and multiply-adds of ReLUConvBN or FactorizedReduce whose output has this side."""
    weights = channels_in * channels_out
    return weights + 2 * channels_out, weights * side ** 2


def _conv_cost(kernel: int) -> Callable[[int, int, int], tuple[int, int]]:
    def cost(channels: int, stride: int, side: int) -> tuple[int, int]:
        weights = kernel ** 2 * channels ** 2
        return weights + 2 * channels, weights * halved(side, stride) ** 2
    return cost


def _pair_cost(kernel: int) -> Callable[[int, int, int], tuple[int, int]]:
    def cost(channels: int, stride: int, side: int) -> tuple[int, int]:
        weights, out = kernel * channels ** 2, halved(side, stride)
        return 2 * (weights + 2 * channels), weights * out * (side + out)  # the first one halves the width alone
    return cost


def _sep_conv_cost(kernel: int) -> Callable[[int, int, int], tuple[int, int]]:
    def cost(channels: int, stride: int, side: int) -> tuple[int, int]:
        weights = 2 * channels * (kernel ** 2 + channels)
        return weights + 4 * channels, weights * halved(side, stride) ** 2
    return cost


def _identity_cost(channels: int, stride: int, side: int) -> tuple[int, int]:
    return (0, 0) if stride == 1 else pointwise_cost(channels, channels, halved(side, stride))


def _no_cost(channels: int, stride: int, side: int) -> tuple[int, int]:
    return 0, 0


OPERATIONS: tuple[Operation, ...] = (
    Operation('separable conv 3x3', _sep_conv(3), 3, _sep_conv_cost(3)),
    Operation('separable conv 5x5', _sep_conv(5), 5, _sep_conv_cost(5)),
    Operation('average pool 3x3', _pool(AvgPool2d, 3, count_include_pad=False), 3, _no_cost),
    Operation('max pool 3x3', _pool(MaxPool2d, 3), 3, _no_cost),
    Operation('identity', _identity, 0, _identity_cost),
    Operation('identity', _identity, 0, _identity_cost),
    Operation('conv 1x1', _conv(1), 1, _conv_cost(1)),
    Operation('conv 3x3', _conv(3), 3, _conv_cost(3)),
    Operation('conv 1x3, 3x1', _conv(3, pair=True), 3, _pair_cost(3)),
    Operation('conv 1x7, 7x1', _conv(7, pair=True), 7, _pair_cost(7)),
    Operation('max pool 2x2', _pool(MaxPool2d, 2), 2, _no_cost),
    Operation('max pool 3x3', _pool(MaxPool2d, 3), 3, _no_cost),
    Operation('max pool 5x5', _pool(MaxPool2d, 5), 5, _no_cost),
    Operation('average pool 2x2', _pool(AvgPool2d, 2), 2, _no_cost),
    Operation('average pool 3x3', _pool(AvgPool2d, 3), 3, _no_cost),
    Operation('average pool 5x5', _pool(AvgPool2d, 5), 5, _no_cost),
)

SEARCH_SPACES: dict[str, range] = {'small': range(0, 5), 'large': range(5, 16)}  # the ids that a search may choose


def apply_operation(operation: nn.Module, state: State, key: Hashable | None = None) -> Tensor:
    """Feed a state to an operation, rectified if the operation starts with a ReLU.

    key: what the result of an operation without parameters is kept under, such as its id and stride; None: it is not.
    """
    if getattr(operation, 'reads_relu', False):
        return operation(state.relu)
    if key is None or isinstance(operation, nn.Identity | FactorizedReduce):
        return operation(state.raw)
    return state.derive(key, operation)
