import contextlib
import os
import signal

import pytest
import torch
from hypothesis import HealthCheck, settings

import kernels

with contextlib.suppress(ValueError):  # started in the background by a shell, we would hand down a Ctrl-C that is ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault('OMP_NUM_THREADS', '1')  # tests run side by side, one a core, and so do the programs that they start
torch.set_num_threads(1)
settings.register_profile('suite', deadline=None, max_examples=60, suppress_health_check=[
    HealthCheck.too_slow, HealthCheck.function_scoped_fixture])  # what fixtures set up holds for all examples
settings.load_profile('suite')


def pytest_runtest_setup(item):
    for marker in item.iter_markers('gpu'):
        count, = marker.args or [1]
        if torch.cuda.device_count() < count:
            pytest.skip(f'needs {count} NVIDIA GPU{"s" * (count > 1)}')


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=['fast', 'plain'])
def form(request, monkeypatch):
    """A test that uses this runs twice: with the forms for the CPU, and with PyTorch's own as on other devices."""
    if request.param == 'plain':
        monkeypatch.setattr(kernels, 'on_plain_cpu', lambda x: False)
