"""Parallel, chunk by chunk, step by step, packed and as a linear system: the same numbers."""

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from mainstem.core import packed
from mainstem.core.mixers import MIXERS, Mixer, MixerName
from mainstem.core.state import num_bytes
from mainstem.kernels.dispatch import offers

Build = Callable[..., Mixer]
Tokens = Callable[..., Tensor]


def by_steps(mixer: Mixer, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    outputs = []
    for x_t in x.unbind(1):
        y, state = mixer.step(x_t, state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def test_every_name_is_in_the_literal() -> None:
    assert set(get_args(MixerName)) == set(MIXERS)


def test_parallel_is_step_by_step(variant: str, build: Build, tokens: Tokens) -> None:
    mixer, x = build(variant), tokens(2, 9)
    y, state = mixer(x, return_state=True)
    stepped, stepped_state = by_steps(mixer, x, mixer.init_state(2))
    torch.testing.assert_close(stepped, y)
    torch.testing.assert_close(stepped_state, state)
    torch.testing.assert_close(mixer(x), y)


@pytest.mark.parametrize("cuts", [[1, 2, 9], [4, 4, 9], [0, 7, 9]])
def test_parallel_is_chunk_by_chunk(cuts: list[int], variant: str, build: Build, tokens: Tokens) -> None:
    mixer, x = build(variant), tokens(2, 9)
    state, begin, outputs = None, 0, []
    for end in cuts:
        y, state = mixer(x[:, begin:end], state=state, return_state=True)
        outputs.append(y)
        begin = end
    expected, expected_state = mixer(x, return_state=True)
    torch.testing.assert_close(torch.cat(outputs, 1), expected)
    torch.testing.assert_close(state, expected_state)


def test_parallel_is_the_linear_system(linear_variant: str, build: Build, tokens: Tokens) -> None:
    mixer, x = build(linear_variant), tokens(2, 7)
    system = mixer.system(x)
    assert system.B.shape[:4] == system.C.shape
    assert system.A.shape in (system.C.shape, (*system.C.shape, system.C.shape[-1]))
    torch.testing.assert_close(mixer.read_out(system.run(), x), mixer(x))


@pytest.mark.parametrize("name", [name for name in MIXERS if MIXERS[name].mixer.system is Mixer.system])
def test_what_is_not_linear_says_so(name: str, build: Build, tokens: Tokens) -> None:
    with pytest.raises(NotImplementedError, match="is not a linear recurrence"):
        build(name).system(tokens(1, 2))


@pytest.mark.parametrize("lengths", [[5, 0, 1, 3], [0, 9], [1, 1, 1], [0]])
def test_alone_is_inside_a_packed_batch(
    lengths: list[int], variant: str, build: Build, tokens: Tokens
) -> None:
    mixer = build(variant)
    sequences = [tokens(1, n)[0] for n in lengths]
    x, cu = packed.join(sequences)
    y, state = mixer(x, cu_seqlens=cu, return_state=True)
    for s, (sequence, got) in enumerate(zip(sequences, packed.split(y, cu), strict=True)):
        alone, alone_state = mixer(sequence[None], return_state=True)
        torch.testing.assert_close(got, alone[0])
        for name in alone_state.keys() - {"key", "value"}:
            torch.testing.assert_close(state[name][s], alone_state[name][0], msg=name)


def test_packed_goes_on_from_a_packed_state(variant: str, build: Build, tokens: Tokens) -> None:
    mixer = build(variant)
    lengths, more = [4, 0, 2], [1, 3, 5]
    sequences = [tokens(1, a + b + 2)[0] for a, b in zip(lengths, more)]
    first, first_cu = packed.join([s[:a] for s, a in zip(sequences, lengths)])
    second, second_cu = packed.join([s[a : a + b] for s, a, b in zip(sequences, lengths, more)])
    _, state = mixer(first, cu_seqlens=first_cu, return_state=True)
    y, state = mixer(second, cu_seqlens=second_cu, state=state, return_state=True)
    last, _ = by_steps(mixer, torch.stack([s[-2:] for s in sequences]), state)
    for s, got in enumerate(packed.split(y, second_cu)):
        whole = mixer(sequences[s][None])[0]
        torch.testing.assert_close(got, whole[lengths[s] : lengths[s] + more[s]])
        torch.testing.assert_close(last[s], whole[-2:])


def test_a_batch_state_serves_packed_tokens(variant: str, build: Build, tokens: Tokens) -> None:
    mixer, x = build(variant), tokens(2, 7)
    _, state = mixer(x[:, :4], return_state=True)
    rest, cu = packed.join([x[0, 4:7], x[1, 4:5]])
    y = packed.split(mixer(rest, cu_seqlens=cu, state=state), cu)
    whole = mixer(x)
    torch.testing.assert_close(y[0], whole[0, 4:7])
    torch.testing.assert_close(y[1], whole[1, 4:5])


def test_reverse_is_the_mirror_image(recurrent_variant: str, build: Build, tokens: Tokens) -> None:
    mixer = build(recurrent_variant)
    x, cu = packed.join([tokens(1, n)[0] for n in (4, 0, 3)])
    order = packed.flip_within(cu, 7)
    mirrored = packed.permute(mixer(packed.permute(x, order), cu_seqlens=cu), order)
    torch.testing.assert_close(mixer(x, cu_seqlens=cu, reverse=True), mirrored)
    torch.testing.assert_close(mixer(x, reverse=True), mixer(x.flip(1)).flip(1))


def test_backends_agree(mixer_name: str, build: Build, tokens: Tokens) -> None:
    mixer, x = build(mixer_name, backend="reference"), tokens(1, 20)
    expected = mixer(x)
    for backend in ("chunked", "cpu"):
        if offers(mixer.operation, backend):
            other = build(mixer_name, backend=backend)
            other.load_state_dict(mixer.state_dict())
            torch.testing.assert_close(other(x), expected)


def test_state_bytes_counts_the_state(variant: str, build: Build, tokens: Tokens) -> None:
    mixer = build(variant, dtype=torch.float32)
    _, state = mixer(tokens(3, 5, torch.float32), return_state=True)
    assert mixer.state_bytes(3, 5) == num_bytes(state)


def test_the_same_call_gives_the_same_bits(variant: str, build: Build, tokens: Tokens) -> None:
    mixer, x = build(variant, dtype=torch.float32), tokens(2, 9, torch.float32).requires_grad_()
    first, second = mixer(x), mixer(x)
    assert torch.equal(first, second)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (first, second)]
    assert torch.equal(*gradients)
