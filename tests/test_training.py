"""The loop's parts: schedules, meter, clock."""

import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import training
from training import Meter

CPU = torch.device('cpu')
ALONE = SimpleNamespace(device=CPU, is_first=True, rank=0, world=1, sum=lambda values: values)  # a run of one process


@given(st.integers(1, 700), st.floats(1e-4, 1), st.floats(0, 1e-4), st.data())
def test_the_learning_rate_falls_as_half_a_cosine(epochs, lr_max, lr_min, data):
    epoch = data.draw(st.integers(0, epochs - 1))
    rate = training.cosine(epoch, epochs, lr_max, lr_min)
    assert rate == pytest.approx(lr_min + (lr_max - lr_min) * (1 + math.cos(math.pi * epoch / epochs)) / 2)
    schedule = [training.cosine(each, epochs, lr_max, lr_min) for each in range(epochs)]
    assert schedule[0] == pytest.approx(lr_max)
    assert schedule == sorted(schedule, reverse=True) and schedule[-1] >= lr_min


def test_the_learning_rate_of_the_published_training():
    assert [training.cosine(epoch, 600, 0.025, 0.0) for epoch in (0, 300, 600)] == pytest.approx([0.025, 0.0125, 0.0])


@given(st.integers(2, 12), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 2 ** 31))
def test_a_meter_counts_loss_and_right_answers(classes, batches, seed):
    generator = torch.Generator().manual_seed(seed)
    meter, losses, top1, top5 = Meter(ALONE), [], [], []
    for count in batches:
        logits = torch.randn((count, classes), generator=generator)
        labels = torch.randint(classes, (count,), generator=generator)
        loss = torch.rand((), generator=generator)
        meter.update(logits, labels, loss)
        for row, label in zip(logits, labels, strict=True):
            better = int((row > row[label]).sum())
            losses.append(float(loss))
            top1.append(better < 1)
            top5.append(better < 5)
    values = meter.values()
    assert values['loss'] == pytest.approx(np.mean(losses))
    assert values['top1'] == pytest.approx(100 * np.mean(top1))
    assert ('top5' in values) == (classes > 5)  # else all are among the first five
    assert values.get('top5', 100) == pytest.approx(100 * np.mean(top5))
    assert values['images_per_second'] > 0


def test_a_clock_extrapolates_from_the_steps_since_its_start(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    clock = training.Clock(step=100, steps=400)
    now[0] += 60
    assert clock.left(120) == '0:14:00'
    assert clock.left(400) == '0:00:00'
    assert clock.left(100).startswith('5:00:00')  # nothing done yet: no division by zero
