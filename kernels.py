"""Every form of an operation that exists only for the CPU: most take less time there, one is safe where PyTorch's is not.

Each computes what PyTorch's own operations compute, up to rounding; on other devices, and for who traces, compiles or casts,
it is PyTorch's own (see `on_plain_cpu`). They were chosen by measuring whole training steps: there most of an operation's
inputs are not in the caches, as they would be if it were measured by itself.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ROW = 1024  # values that kernels take well in a row


def on_plain_cpu(x: Tensor) -> bool:
    """Whether x is on the CPU and nobody traces, compiles or casts the operations on it: whether the forms here are used."""
    return x.device.type == 'cpu' and not (
        torch.jit.is_tracing() or torch.compiler.is_compiling() or torch.is_autocast_enabled('cpu'))


# ------------------------------------------------------------------------------------------------------------ controller

def embedded_lstm(embedding: nn.Embedding, rnn: nn.LSTM, tokens: Tensor, state: tuple[Tensor, Tensor] | None = None,
                  dropout: float = 0) -> Tensor:
    """The outputs (batch, steps, hidden) of an LSTM that reads `tokens` (batch, steps, k), k embeddings side by side.

    dropout: that of the embeddings in training. On the CPU and without it, the first layer's input weights are multiplied
    with the few rows of the embedding once, and one-hot tokens choose among the products, for half the arithmetic.
    """
    if (dropout and rnn.training) or not on_plain_cpu(embedding.weight):
        return rnn(F.dropout(embedding(tokens), dropout, rnn.training).flatten(2), state)[0]
    first, *others = rnn.all_weights
    weight = torch.cat([part @ embedding.weight.T for part in first[0].chunk(tokens.shape[2], dim=1)], dim=1)
    chosen = weight.new_zeros(*tokens.shape, embedding.num_embeddings).scatter_(3, tokens.unsqueeze(3), 1).flatten(2)
    if state is None:
        state = (weight.new_zeros(rnn.num_layers, len(tokens), rnn.hidden_size),) * 2
    weights = [weight, *first[1:], *(tensor for layer in others for tensor in layer)]
    return torch.lstm(chosen, state, weights, True, rnn.num_layers, rnn.dropout, rnn.training, False, True)[0]


def greedy_decode(decoder: nn.Module, embedding: Tensor, memory: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """What `controller.Decoder.decode` computes without gradients: scores (batch, length, vocab) and tokens (batch, length).

    An LSTM that is called for a single step spends its time on preparing itself. Here what is the same at each step is done
    before: the products of the embeddings with the input weights, the attention's projections of `memory`. One product with
    a hidden state serves the next step's gates and the attention.
    """
    size, layers, attention = decoder.rnn.hidden_size, decoder.rnn.all_weights, decoder.attention.output_proj.weight
    keys = F.linear(memory, decoder.attention.input_proj.weight.T).transpose(1, 2)
    values = F.linear(memory, attention[:, :size])
    biases = [bias_ih + bias_hh for _, _, bias_ih, bias_hh in layers]
    inputs = F.linear(decoder.embedding.weight, layers[0][0], biases[0])
    own = [weight_hh for _, weight_hh, *_ in layers]
    own = [weight.T.contiguous() for weight in (*own[:-1], torch.cat([own[-1], attention[:, size:]]))]
    products, cells, hidden = [embedding @ weight for weight in own], [embedding.clone() for _ in own], embedding
    gates, attended = [product[:, :4 * size] for product in products], products[-1][:, None, 4 * size:]
    parts = [(gate[:, :2 * size], *gate.chunk(4, dim=1)) for gate in gates]
    token = torch.full((len(embedding),), start)
    scores, tokens = [], []
    for position in range(len(decoder.allowed_tokens)):
        for layer, (i_and_f, i, f, g, o) in enumerate(parts):
            gates[layer].add_(F.linear(hidden, layers[layer][0], biases[layer]) if layer else inputs.index_select(0, token))
            i_and_f.sigmoid_()
            cells[layer].mul_(f).addcmul_(i, g.tanh_())
            hidden = o.sigmoid_() * cells[layer].tanh()
            torch.mm(hidden, own[layer], out=products[layer])
        shares = torch.softmax(torch.bmm(hidden.unsqueeze(1), keys), dim=-1)
        mixed = torch.baddbmm(attended, shares, values).squeeze(1).tanh_()
        scores.append(F.linear(mixed, decoder.out.weight, decoder.out.bias))
        token = decoder.best_legal(scores[-1], position)
        tokens.append(token)
    return torch.stack(scores, dim=1), torch.stack(tokens, dim=1)


# ---------------------------------------------------------------------------------------------------------------- images

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
    if weight.shape[2] == 5 and weight.requires_grad and torch.is_grad_enabled() and on_plain_cpu(x):
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
    if min(x.shape[2:]) < 2 or not on_plain_cpu(x):
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
    if (x.requires_grad and torch.is_grad_enabled()) or not on_plain_cpu(x):
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
    if on_plain_cpu(x) and x.is_contiguous(memory_format=torch.channels_last):
        group = math.gcd(count, 2 ** int(math.log2(max(1, ROW // x.shape[1]))))
    if group == 1:
        return F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
    y, mean, var = _GroupedBatchNorm.apply(x, weight, bias, eps, group)
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(var * (count / (count - 1)), momentum)
    return y


def factorized_reduce(x: Tensor, weight1: Tensor, weight2: Tensor) -> Tensor:
    """Every second pixel by 1×1 weights, and by others every second one of x moved one pixel up and left, side by side.

    (batch, channels, h, w), (half, channels, 1, 1) twice -> (batch, 2 · half, ceil(h / 2), ceil(w / 2)). On the CPU both
    are one convolution of 2×2 pixels whose other weights are zero: no strided copies of the image, forth or back.
    """
    if not on_plain_cpu(x):
        moved = F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]  # zeros enter at the bottom and right
        return torch.cat([F.conv2d(x[:, :, ::2, ::2], weight1), F.conv2d(moved[:, :, ::2, ::2], weight2)], dim=1)
    weight = torch.cat([F.pad(weight1, (0, 1, 0, 1)), F.pad(weight2, (1, 0, 1, 0))])
    if x.shape[2] % 2 or x.shape[3] % 2:
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
    return F.conv2d(x, weight, stride=2)


def pointwise_conv(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """A 1×1 convolution: (batch, channels, h, w), (outputs, channels, 1, 1) -> (batch, outputs, ceil(h / stride), ...).

    On the CPU always every stride-th pixel first, traced or not: with a stride PyTorch's 1×1 convolutions write out of
    bounds there (few channels, channels-last, backward).
    """
    if stride > 1 and x.device.type == 'cpu':
        x, stride = x[:, :, ::stride, ::stride], 1
    return F.conv2d(x, weight, stride=stride)
