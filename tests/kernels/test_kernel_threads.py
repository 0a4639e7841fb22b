"""The Numba kernels spread their tasks over threads without a change in any bit."""

import multiprocessing
import os
from collections.abc import Iterator

import pytest
import torch

from mainstem.kernels import linear_recurrence
from mainstem.kernels.simd import Launcher, _other_cores


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def packed_gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 600, 3, 32, generator=generator, requires_grad=True) for _ in range(3))
    decay = -torch.rand(1, 600, 3, generator=generator)
    cu_seqlens = torch.tensor([0, 1, 1, 400, 417, 600], dtype=torch.int32)
    o = linear_recurrence(q, k, v, decay, cu_seqlens=cu_seqlens, backend="cpu")
    assert isinstance(o, torch.Tensor)
    return [o, *torch.autograd.grad(o.square().sum(), (q, k, v))]


def test_two_threads_give_the_bits_of_one(two_threads: None) -> None:
    two = packed_gradients()
    torch.set_num_threads(1)
    for a, b in zip(packed_gradients(), two, strict=True):
        assert torch.equal(a, b)


class Large:
    """Stands for an array that is worth a second thread."""

    size = 1 << 20


def count_tasks() -> int:
    done = [0] * 1000

    def count(first: int, last: int, _: Large) -> None:
        for task in range(first, last):
            done[task] += 1

    Launcher("a count", count)(len(done), Large())
    return sum(n == 1 for n in done)


def test_every_task_is_done_once(two_threads: None) -> None:
    assert count_tasks() == 1000


def test_an_error_in_a_thread_comes_through(two_threads: None) -> None:
    def fail(first: int, last: int, _: Large) -> None:
        if first:
            raise RuntimeError("in a thread")

    with pytest.raises(RuntimeError, match="in a thread"):
        Launcher("a failure", fail)(100, Large())


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinities")
def test_helpers_keep_off_the_callers_core_and_leave_the_caller_alone(two_threads: None) -> None:
    allowed = os.sched_getaffinity(0)
    others = _other_cores()
    assert others < allowed
    assert len(others) == len(allowed) - 1
    assert count_tasks() == 1000
    assert os.sched_getaffinity(0) == allowed


def _in_a_child(queue: "multiprocessing.Queue[int]") -> None:
    queue.put(count_tasks())


def test_a_forked_process_makes_threads_of_its_own(two_threads: None) -> None:
    count_tasks()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_a_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=60) == 1000
        child.join(60)
    finally:
        child.kill()
