"""The forms that are faster on the CPU compute what PyTorch's own operations compute, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import kernels

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


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(1, 7), st.booleans())
def test_linear_tanh_and_log_softmax(batch, steps, features, outputs, biased):
    x, weight, bias = normal(batch, steps, features), normal(outputs, features, seed=1), normal(outputs, seed=2)
    parameters = [weight, bias] if biased else [weight]
    assert_same(kernels.linear(x, *parameters), F.linear(x, *parameters), [x, *parameters])
    assert_same(kernels.tanh(x), torch.tanh(x), [x])
    assert_same(kernels.log_softmax(x), F.log_softmax(x, dim=-1), [x])


@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3, 5]),
       st.sampled_from([1, 2]), st.sampled_from([torch.contiguous_format, torch.channels_last]))
def test_a_depthwise_convolution(batch, channels, height, width, kernel, stride, layout):
    x, weight = normal(batch, channels, height, width, layout=layout), normal(channels, 1, kernel, kernel, seed=1)
    mine = kernels.depthwise_conv(x, weight, stride)
    assert ('Wide' in mine.grad_fn.name()) == (kernel == 5)
    assert_same(mine, F.conv2d(x, weight, stride=stride, padding=kernel // 2, groups=channels), [x, weight])
    assert_same(kernels.depthwise_conv(x.detach(), weight, stride),
                F.conv2d(x.detach(), weight, stride=stride, padding=kernel // 2, groups=channels), [weight])


@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 2]), st.booleans(),
       st.sampled_from([torch.contiguous_format, torch.channels_last]))
def test_an_average_pool(batch, channels, height, width, stride, count_include_pad, layout):
    x = normal(batch, channels, height, width, layout=layout)
    mine = kernels.average_pool(x, stride, count_include_pad)
    assert ('_AveragePool' in mine.grad_fn.name()) == (min(height, width) > 1)
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
    assert 'MaxPool' in kernels.max_pool(x, stride).grad_fn.name()
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


@pytest.mark.parametrize('channels, size, layout, grouped', [
    (36, 4, torch.channels_last, True), (144, 4, torch.channels_last, True), (36, 3, torch.channels_last, True),
    (36, 4, torch.contiguous_format, False), (1024, 4, torch.channels_last, False)])  # a pixel fills a row
def test_batch_norm_groups_pixels_to_long_rows(channels, size, layout, grouped):
    x = torch.randn(2, channels, size, size, requires_grad=True).contiguous(memory_format=layout)
    zeros, ones = torch.zeros(4, channels), torch.ones(4, channels)
    y = kernels.batch_norm(x, zeros[0], ones[0], ones[1], zeros[1], 0.1, 1e-5)
    assert ('Grouped' in y.grad_fn.name()) == grouped
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


def test_who_traces_compiles_or_casts_sees_pytorchs_own_operations():
    x = torch.zeros(1)
    seen = []

    def look(x):
        seen.append(kernels.is_plain(x))
        return x + 1
    look(x)
    torch.jit.trace(look, x, check_trace=False)
    with torch.autocast('cpu', torch.bfloat16):
        look(x)
    torch.compile(look, backend='eager')(x)
    assert seen[0] and not any(seen[1:]) and len(seen) >= 3
    assert not kernels.is_plain(torch.zeros(1, device='meta'))
