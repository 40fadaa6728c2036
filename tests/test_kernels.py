"""The forms that are faster on the CPU compute what PyTorch's own operations compute, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from operations import OPERATIONS, State, apply_operation

CLOSE = {'rtol': 1e-10, 'atol': 1e-10}


def normal(*shape, seed=0, layout=torch.contiguous_format):
    """Normally distributed numbers in double precision, with gradients."""
    values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values.contiguous(memory_format=layout).requires_grad_()


def assert_same(mine, theirs, inputs):
    """Equal values, and equal gradients of a random function of them."""
    torch.testing.assert_close(mine, theirs, **CLOSE)
    direction = normal(*mine.shape, seed=9).detach()
    for one, other in zip(*(torch.autograd.grad(output, inputs, direction) for output in (mine, theirs)), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3, 5]),
       st.sampled_from([1, 2]), st.sampled_from([torch.contiguous_format, torch.channels_last]))
def test_a_depthwise_convolution(batch, channels, height, width, kernel, stride, layout):
    x, weight = normal(batch, channels, height, width, layout=layout), normal(channels, 1, kernel, kernel, seed=1)
    mine = kernels.depthwise_conv(x, weight, stride)
    assert_same(mine, F.conv2d(x, weight, stride=stride, padding=kernel // 2, groups=channels), [x, weight])
    assert_same(kernels.depthwise_conv(x.detach(), weight, stride),
                F.conv2d(x.detach(), weight, stride=stride, padding=kernel // 2, groups=channels), [weight])


@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 2]), st.booleans(),
       st.sampled_from([torch.contiguous_format, torch.channels_last]))
def test_an_average_pool(batch, channels, height, width, stride, count_include_pad, layout):
    x = normal(batch, channels, height, width, layout=layout)
    mine = kernels.average_pool(x, stride, count_include_pad)
    assert_same(mine, F.avg_pool2d(x, 3, stride, 1, count_include_pad=count_include_pad), [x])


@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 2]),
       st.sampled_from([torch.contiguous_format, torch.channels_last]), st.sampled_from([torch.float32, torch.float64]))
def test_a_max_pool(batch, channels, height, width, stride, layout, dtype):
    x = normal(batch, channels, height, width, layout=layout).detach().to(dtype)
    x[0, 0, height // 2, width // 2] = torch.nan  # which a maximum must not hide
    mine = kernels.max_pool(x, stride)
    torch.testing.assert_close(mine, F.max_pool2d(x, 3, stride, 1), rtol=0, atol=0, equal_nan=True)
    assert mine.is_contiguous(memory_format=layout)
    x.requires_grad_()
    torch.testing.assert_close(kernels.max_pool(x, stride), mine, rtol=0, atol=0, equal_nan=True)
    with torch.no_grad():
        torch.testing.assert_close(kernels.max_pool(x, stride), mine, rtol=0, atol=0, equal_nan=True)


@given(st.integers(1, 3), st.integers(1, 40), st.integers(2, 9), st.integers(2, 9), st.sampled_from([1, 2]), st.booleans(),
       st.sampled_from([torch.contiguous_format, torch.channels_last]))
def test_convolutions_and_pools_in_single_precision(batch, channels, height, width, stride, count_include_pad, layout):
    # for which PyTorch has other kernels, the fast ones, than for double precision
    x, weight = normal(batch, channels, height, width, layout=layout), normal(channels, 1, 5, 5, seed=1)
    for mine, theirs in (
            (lambda x, weight: kernels.depthwise_conv(x, weight, stride),
             lambda x, weight: F.conv2d(x, weight, stride=stride, padding=2, groups=channels)),
            (lambda x, weight: kernels.average_pool(x, stride, count_include_pad) * weight[0, 0, 0, 0],
             lambda x, weight: F.avg_pool2d(x, 3, stride, 1, count_include_pad=count_include_pad) * weight[0, 0, 0, 0])):
        single = [each.detach().float().requires_grad_() for each in (x, weight)]
        results, expected = mine(*single), theirs(x, weight)
        torch.testing.assert_close(results.double(), expected, rtol=1e-4, atol=1e-4)
        direction = normal(*expected.shape, seed=9).detach()
        for one, other in zip(torch.autograd.grad(results, single, direction.float()),
                              torch.autograd.grad(expected, [x, weight], direction), strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@given(st.integers(1, 4), st.sampled_from([1, 2, 3, 16, 20, 36, 42, 72, 108]), st.integers(1, 6), st.integers(2, 6),
       st.sampled_from([torch.contiguous_format, torch.channels_last]), st.floats(-100, 100), st.floats(0, 10))
def test_a_batch_norm_by_the_batchs_statistics(batch, channels, height, width, layout, shift, spread):
    x = (normal(batch, channels, height, width, layout=layout).detach() * spread + shift).requires_grad_()
    weight, bias = normal(channels, seed=1), normal(channels, seed=2)
    running = [[normal(channels, seed=3).detach(), normal(channels, seed=4).detach().exp()] for _ in range(2)]
    mine = kernels.batch_norm(x, *running[0], weight, bias, 0.3, 1e-5)
    theirs = F.batch_norm(x, *running[1], weight, bias, True, 0.3, 1e-5)
    torch.testing.assert_close(running[0], running[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    if spread > 0.01:
        torch.testing.assert_close(mine, theirs, **CLOSE)
        direction = normal(*x.shape, seed=9).detach()
        for one, other in zip(*(torch.autograd.grad(output, [x, weight, bias], direction) for output in (mine, theirs)),
                              strict=True):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize('channels, size, layout', [
    (36, 4, torch.channels_last), (144, 4, torch.channels_last), (36, 3, torch.channels_last),
    (36, 4, torch.contiguous_format), (1024, 4, torch.channels_last)])  # a pixel of the last fills a row
def test_batch_norm_keeps_the_layout(channels, size, layout):
    x = torch.randn(2, channels, size, size, requires_grad=True).contiguous(memory_format=layout)
    zeros, ones = torch.zeros(4, channels), torch.ones(4, channels)
    y = kernels.batch_norm(x, zeros[0], ones[0], ones[1], zeros[1], 0.1, 1e-5)
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize('shift', [0, 1, 10, 100, 1000])
def test_a_batch_norm_in_single_precision_is_as_exact_as_pytorchs(shift):
    x = torch.randn(64, 20, 16, 16, generator=torch.Generator().manual_seed(0)) + shift
    x, ones, zeros = x.contiguous(memory_format=torch.channels_last), torch.ones(20), torch.zeros(20)
    exact = F.batch_norm(x.double(), None, None, training=True)
    mine, theirs = (function(x, zeros.clone(), ones.clone(), ones, zeros, *options, 0.1, 1e-5) for function, options in (
        (kernels.batch_norm, []), (F.batch_norm, [True])))
    assert (mine - exact).abs().max() <= 2 * (theirs - exact).abs().max()


def test_a_batch_norm_of_constant_images_stays_finite():
    x = torch.full((2, 36, 4, 4), 3.0).contiguous(memory_format=torch.channels_last).requires_grad_()
    mean, var = torch.zeros(36), torch.ones(36)
    y = kernels.batch_norm(x, mean, var, torch.ones(36), torch.full((36,), 0.5), 1.0, 1e-5)
    y.sum().backward()
    torch.testing.assert_close(y, torch.full_like(y, 0.5), atol=1e-3, rtol=0)  # 300 times the rounding of their mean
    torch.testing.assert_close((mean, var), (torch.full((36,), 3.0), torch.zeros(36)))
    assert x.grad.isfinite().all()


@pytest.mark.usefixtures('form')
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(1, 3),
       st.sampled_from([torch.contiguous_format, torch.channels_last]))
def test_a_factorized_reduce_and_a_pointwise_convolution(batch, channels, height, width, outputs, stride, layout):
    x = normal(batch, channels, height, width, layout=layout)
    weight1, weight2 = (normal(outputs, channels, 1, 1, seed=seed) for seed in (1, 2))
    corner = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    corner[..., 1, 1] = 1  # the pixel below and to the right
    moved = F.conv2d(F.pad(x, (0, 1, 0, 1)).flatten(0, 1)[:, None], corner).reshape(x.shape)
    kept = [F.max_pool2d(each, 1, 2) for each in (x, moved)]  # every second pixel
    expected = torch.cat([torch.einsum('bchw,oc->bohw', each, weight[:, :, 0, 0])
                          for each, weight in zip(kept, (weight1, weight2), strict=True)], dim=1)
    assert_same(kernels.factorized_reduce(x, weight1, weight2), expected, [x, weight1, weight2])
    assert_same(kernels.pointwise_conv(x, weight1, stride),
                torch.einsum('bchw,oc->bohw', F.max_pool2d(x, 1, stride), weight1[:, :, 0, 0]), [x, weight1])


class Strides(TorchDispatchMode):
    """Notes the strides of all 1×1 convolutions, forth and back."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if 'convolution' in str(function):
            weight, stride = (args[2], args[4]) if 'backward' in str(function) else (args[1], args[3])
            self.seen += [tuple(stride)] if tuple(weight.shape[2:]) == (1, 1) else []
        return function(*args, **kwargs or {})


def test_no_1x1_convolution_of_a_stride_runs_on_the_cpu(form):
    """PyTorch's write out of bounds there, some seldom and some at once, which the next reader of that memory notices."""
    operations_of_stride_two = [operation.make(2, 2) for operation in OPERATIONS]
    with Strides() as strides:
        for operation in operations_of_stride_two:
            apply_operation(operation, State(torch.randn(2, 2, 6, 6, requires_grad=True))).sum().backward()
    assert len(strides.seen) >= 6 and set(strides.seen) == {(1, 1)}


def test_who_traces_compiles_or_casts_sees_pytorchs_own_operations():
    x = torch.zeros(1)
    seen = []

    def look(x):
        seen.append(kernels.on_plain_cpu(x))
        return x + 1
    look(x)
    torch.jit.trace(look, x, check_trace=False)
    with torch.autocast('cpu', torch.bfloat16):
        look(x)
    torch.compile(look, backend='eager')(x)
    assert seen[0] and not any(seen[1:]) and len(seen) >= 3
    assert not kernels.on_plain_cpu(torch.zeros(1, device='meta'))
