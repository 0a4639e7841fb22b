"""Long convolution in plain PyTorch, on any device: this is also the path of a GPU, through cuFFT.

Sequences are cut into overlapping windows (`blocks`). Those of a long filter are multiplied in the frequency
domain, with a transform of the next length that is fast (`scipy.fft.next_fast_len`); those of a short one by
the filter's Toeplitz matrix, which is faster there, and exact about what an output depends on.
"""

import torch
from scipy.fft import next_fast_len
from torch import Tensor
from torch.nn.functional import pad

from ..checks import accumulator
from ..prefix import Prefix, flip_sequences, owned
from .blocks import Blocks, longest_sequence, plan

DIRECT = 64
"""Outputs of a block that is multiplied by a matrix."""
MATRIX = DIRECT * (DIRECT + 128)
"""Largest such matrix, in numbers a channel: filters of up to 129 taps, or pieces of fewer tokens."""
GROUP = 1 << 22
"""Numbers that are transformed at a time, so that memory does not grow with T."""


def forward(
    x: Tensor,
    kernel: Tensor,
    skip: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    keep: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return ``(y, final_state)``; the state is empty unless ``keep``."""
    if reverse:
        cu_seqlens, states, [x] = flip_sequences(cu_seqlens, [] if state is None else [state], [x])
        state = states[0] if states else None
    blocks, rows, filters = _prepare(x, kernel, state, cu_seqlens)
    product = _Toeplitz(blocks, filters) if _direct(blocks) else _Spectral(blocks, filters)
    outputs = [product.forward(rows[part]) for part in _parts(blocks, x.shape[2])]
    y = (_join(outputs).flatten(0, 1).index_select(0, blocks.slot) if outputs else rows[:0]).reshape(x.shape)
    if skip is not None:
        y = y + skip.to(y.dtype) * x.to(y.dtype)
    y, final = y.to(x.dtype), rows[blocks.state].transpose(1, 2) if keep else rows.new_empty(0)
    if reverse:
        _, [final], [y] = flip_sequences(cu_seqlens, [final], [y])
    return owned(y), owned(final)


def backward(
    dy: Tensor,
    dstate: Tensor,
    x: Tensor,
    kernel: Tensor,
    skip: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``(dx, dkernel, dskip, dinitial)``; the last two are empty where there is none."""
    if reverse:
        states = [dstate] if state is None else [dstate, state]
        cu_seqlens, states, [x, dy] = flip_sequences(cu_seqlens, states, [x, dy])
        dstate, state = states[0], None if state is None else states[1]
    blocks, rows, filters = _prepare(x, kernel, state, cu_seqlens)
    product = _Toeplitz(blocks, filters) if _direct(blocks) else _Spectral(blocks, filters)
    grad = pad(dy.reshape(-1, dy.shape[2]).to(rows.dtype), (0, 0, 0, 1))
    parts = list(zip(_parts(blocks, x.shape[2]), _parts(blocks, x.shape[2], outputs=True)))
    windows = [product.backward(rows[window], grad[part]) for window, part in parts]
    places = _join([*(w.flatten(0, 1) for w in windows), rows[-1:]])
    drows = places.index_select(0, blocks.seen[0])
    for seen in blocks.seen[1:]:
        drows += places.index_select(0, seen)
    if dstate.numel():
        drows[blocks.tail_rows] += dstate.transpose(1, 2).flatten(0, 1)[blocks.tail].to(drows.dtype)
    dinitial, dx = rows.new_empty(0), drows.reshape(x.shape) if state is None else drows
    if state is not None:
        prefix = Prefix.of(cu_seqlens, x.shape[0], x.shape[1], kernel.shape[1] - 1, x.device)
        dinitial, dx = prefix.split(drows.view(x.shape[0], prefix.length, x.shape[2]))
        dinitial = dinitial.transpose(1, 2)
    dskip = kernel.new_empty(0)
    if skip is not None:
        g, u = dy.to(rows.dtype), x.to(rows.dtype)
        dx, dskip = dx + skip.to(rows.dtype) * g, (g * u).sum((0, 1)).to(skip.dtype)
    dx, dkernel = dx.to(x.dtype), pad(product.dfilters(), (0, kernel.shape[1] - filters.shape[1]))
    if reverse:
        flipped = [] if state is None else [dinitial]
        _, flipped, [dx] = flip_sequences(cu_seqlens, flipped, [dx])
        dinitial = flipped[0] if flipped else dinitial
    return owned(dx), owned(dkernel.to(kernel.dtype)), owned(dskip), owned(dinitial)


def _prepare(
    x: Tensor, kernel: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Blocks, Tensor, Tensor]:
    """Return the blocks, the rows of inputs with one of zeros behind, and the taps that matter ``(D, L)``."""
    dtype, taps = accumulator(x.dtype), kernel.shape[1]
    longest = longest_sequence(cu_seqlens, x.shape[0], x.shape[1])
    if state is None:
        taps = max(1, min(taps, longest))
    size = _size(longest, taps)
    front = 0 if state is None and size >= longest else taps - 1
    blocks = plan(
        cu_seqlens, x.shape[0], x.shape[1], kernel.shape[1], state is not None, size, front, x.device
    )
    rows = x.to(dtype)
    if state is not None:
        prefix = Prefix.of(cu_seqlens, x.shape[0], x.shape[1], kernel.shape[1] - 1, x.device)
        rows = prefix.join(state.to(dtype).transpose(1, 2), rows)
    rows = pad(rows.reshape(-1, x.shape[2]), (0, 0, 0, 1))
    return blocks, rows, kernel[:, :taps].to(dtype)


def _size(longest: int, taps: int) -> int:
    """Outputs of a block: all of the longest sequence, or what is cheapest for the filter."""
    size = max(1, min(longest, DIRECT))
    if size * (size + taps - 1) <= MATRIX:
        return size
    # A transform of eight filter lengths does an eighth of its work twice.
    size = max(2048, 1 << (8 * taps - 1).bit_length()) - taps + 1
    return size if longest > 2 * size else max(1, longest)


def _direct(blocks: Blocks) -> bool:
    return blocks.size <= DIRECT and blocks.size * (blocks.size + blocks.front) <= MATRIX


def _parts(blocks: Blocks, channels: int, outputs: bool = False) -> list[Tensor]:
    """Split the blocks' indices so that a part stays within `GROUP` numbers."""
    step = max(1, GROUP // max(1, channels * blocks.inputs.shape[1]))
    index = blocks.outputs if outputs else blocks.inputs
    return list(torch.split(index, step)) if len(index) else []


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _channels_first(x: Tensor) -> Tensor:
    """Lay ``(N, P, D)`` as ``(D, P, N)``, for one product of matrices a channel."""
    return x.permute(2, 1, 0).contiguous()


class _Spectral:
    """Blocks times the filter, in the frequency domain."""

    def __init__(self, blocks: Blocks, filters: Tensor) -> None:
        self.blocks, self.taps = blocks, filters.shape[1]
        self.length: int = next_fast_len(blocks.size + self.taps - 1, real=True)
        self.filters = self._transform(filters)  # (D, F)
        self.correlation = torch.zeros((), dtype=self.filters.dtype, device=filters.device)

    def _transform(self, x: Tensor) -> Tensor:
        # Transforms along contiguous numbers are several times faster.
        spectrum: Tensor = torch.fft.rfft(x.contiguous(), self.length)
        return spectrum

    def forward(self, windows: Tensor) -> Tensor:
        """Map windows ``(N, front + M, D)`` to outputs ``(N, M, D)``."""
        y: Tensor = torch.fft.irfft(self._transform(windows.mT) * self.filters, self.length)
        return y[..., self.blocks.front : self.blocks.front + self.blocks.size].mT

    def backward(self, windows: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient of the windows, and keep that of the filter."""
        spectrum = self._transform(pad(grad.mT, (self.blocks.front, 0)))
        self.correlation = self.correlation + (self._transform(windows.mT).conj() * spectrum).sum(0)
        dwindows: Tensor = torch.fft.irfft(spectrum * self.filters.conj(), self.length)
        return dwindows[..., : windows.shape[1]].mT

    def dfilters(self) -> Tensor:
        """Gradient of the filter ``(D, L)``."""
        taps: Tensor = torch.fft.irfft(self.correlation.expand_as(self.filters), self.length)
        return taps[:, : self.taps]


class _Toeplitz:
    """Blocks times the filter's matrix ``(D, M, front + M)``."""

    def __init__(self, blocks: Blocks, filters: Tensor) -> None:
        self.blocks, self.taps = blocks, filters.shape[1]
        size, front = blocks.size, blocks.front
        # Row m is the filter backwards, shifted by m.
        padded = pad(filters.flip(1), (front + size - self.taps, size - 1))
        self.matrix = padded.unfold(1, size + front, 1).flip(1)
        self.dmatrix = torch.zeros((), dtype=filters.dtype, device=filters.device).expand_as(self.matrix)

    def forward(self, windows: Tensor) -> Tensor:
        """Map windows ``(N, front + M, D)`` to outputs ``(N, M, D)``."""
        return torch.bmm(self.matrix, _channels_first(windows)).permute(2, 1, 0)

    def backward(self, windows: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient of the windows, and keep that of the matrix."""
        g = _channels_first(grad)
        self.dmatrix = torch.baddbmm(self.dmatrix, g, _channels_first(windows).mT)
        return torch.bmm(self.matrix.mT, g).permute(2, 1, 0)

    def dfilters(self) -> Tensor:
        """Sum the diagonals of the matrix: ``(D, L)``."""
        size, missing = self.blocks.size, self.taps - 1 - self.blocks.front
        d = pad(self.dmatrix, (missing, 0)).contiguous()
        channels, _, span = d.shape
        # Entry (m, m + q) of every row m lies on the diagonal of lag L - 1 - q.
        diagonals = d.as_strided((channels, size, self.taps), (size * span, span + 1, 1))
        return diagonals.sum(1).flip(1)
