"""Fused form of the recurrent cells: one program a head of 16 or more sequences runs all steps in one launch.

The head's matrices are loaded once and stay in shared memory, the states in registers (Pöppel, Beck and
Hochreiter, *FlashRNN*, 2024, arXiv:2412.07752). Sequences come sorted by length, so that those of a program
end together.

Letters: P tokens, S sequences, G gates, N states, H heads, D channels a head, BD the next power of two, BB
sequences a program, KEPT vectors a token for the backward. Position p of a sequence is token ``start + p ·
STEP``.
"""
# Triton ships no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from .triton_cells import cell_backward, cell_forward
from .triton_memory import gate, kept_and_before, store_gates, store_kept, walks_of


@triton.jit
def _weight(
    R, g: tl.constexpr, head, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, TURNED: tl.constexpr
):
    """Matrix of gate g, output by input, or turned: input by output."""
    i, j = tl.arange(0, BD)[:, None], tl.arange(0, BD)[None, :]
    at = (g * H + head) * D * D + (j * D + i if TURNED else i * D + j)
    return tl.load(R + at, mask=(i < D) & (j < D), other=0.0)


@triton.jit(do_not_specialize=["P", "S"])
def fused_forward(
    x, R, b, state, sequences, order, out, final, gates, P, S,
    KIND: tl.constexpr, G: tl.constexpr, N: tl.constexpr, KEPT: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BB: tl.constexpr, STEP: tl.constexpr,
    PACKED: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Run all steps; see `gated_rnn` for the equations."""
    head = tl.program_id(1)
    start, n, place, inside = walks_of(sequences, order, S, BB, PACKED)
    d = tl.arange(0, BD)[None, :]
    there = d < D
    own = (place[:, None] * N * H + head) * D + d
    held = inside[:, None] & there
    h = tl.load(state + own, mask=held, other=0.0)
    c = tl.load(state + own + H * D, mask=held, other=0.0) if N > 1 else h
    s = tl.load(state + own + 2 * H * D, mask=held, other=0.0) if N > 2 else h
    m = tl.load(state + own + 3 * H * D, mask=held, other=0.0) if N > 2 else h
    w0 = _weight(R, 0, head, H, D, BD, True)
    b0 = tl.load(b + head * D + d, mask=there, other=0.0).to(tl.float32)
    if G > 1:
        w1, w2 = _weight(R, 1, head, H, D, BD, True), _weight(R, 2, head, H, D, BD, True)
        b1 = tl.load(b + (H + head) * D + d, mask=there, other=0.0).to(tl.float32)
        b2 = tl.load(b + (2 * H + head) * D + d, mask=there, other=0.0).to(tl.float32)
    if G > 3:
        w3 = _weight(R, 3, head, H, D, BD, True)
        b3 = tl.load(b + (3 * H + head) * D + d, mask=there, other=0.0).to(tl.float32)
    for p in range(tl.max(n, 0)):
        t = (start + p * STEP).to(tl.int64)[:, None]
        live = (p < n)[:, None] & there
        at = (t * G * H + head) * D + d
        y = h.to(w0.dtype)
        a0 = tl.dot(y, w0, gate(x, at, live, b0), input_precision=PRECISION)
        a1, a2, a3 = a0, a0, a0
        if G > 1:
            a1 = tl.dot(y, w1, gate(x, at + H * D, live, b1), input_precision=PRECISION)
        if G == 3:
            # The reset gate lies between the candidate's input and its recurrent sum.
            a3 = gate(x, at + 2 * H * D, live, 0.0)
            a2 = tl.dot(y, w2, tl.zeros_like(a3) + b2, input_precision=PRECISION)
        if G > 3:
            a2 = tl.dot(y, w2, gate(x, at + 2 * H * D, live, b2), input_precision=PRECISION)
            a3 = tl.dot(y, w3, gate(x, at + 3 * H * D, live, b3), input_precision=PRECISION)
        h_t, c_t, s_t, m_t, k0, k1, k2, k3, k4, k5, k6 = cell_forward(KIND, a0, a1, a2, a3, h, c, s, m)
        tl.store(out + (t * H + head) * D + d, h_t, mask=live)
        if KEEP:
            kept = gates + (t + head.to(tl.int64) * P) * KEPT * D + d
            store_kept(kept, k0, k1, k2, k3, k4, k5, k6, live, D, KEPT)
        h = tl.where(live, h_t, h)
        if N > 1:
            c = tl.where(live, c_t, c)
        if N > 2:
            s, m = tl.where(live, s_t, s), tl.where(live, m_t, m)
    tl.store(final + own, h, mask=held)
    if N > 1:
        tl.store(final + own + H * D, c, mask=held)
    if N > 2:
        tl.store(final + own + 2 * H * D, s, mask=held)
        tl.store(final + own + 3 * H * D, m, mask=held)


@triton.jit(do_not_specialize=["P", "S"])
def fused_backward(
    dy, R, state, dstate, sequences, order, gates, dgates, before, dinitial, P, S,
    KIND: tl.constexpr, G: tl.constexpr, N: tl.constexpr, KEPT: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BB: tl.constexpr, STEP: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Run all steps from the last: gradients of the gates ``(P, G or 4, H, D)`` and of the initial state.

    ``before (P, H, D)`` becomes h before each token, with which the gates' gradients make R's.
    """
    PLANES: tl.constexpr = 4 if G > 1 else 1
    head = tl.program_id(1)
    start, n, place, inside = walks_of(sequences, order, S, BB, PACKED)
    d = tl.arange(0, BD)[None, :]
    there = d < D
    own = (place[:, None] * N * H + head) * D + d
    held = inside[:, None] & there
    dh = tl.load(dstate + own, mask=held, other=0.0)
    dc = tl.load(dstate + own + H * D, mask=held, other=0.0) if N > 1 else dh
    dn = tl.load(dstate + own + 2 * H * D, mask=held, other=0.0) if N > 2 else dh
    dm = tl.load(dstate + own + 3 * H * D, mask=held, other=0.0) if N > 2 else dh
    w0 = _weight(R, 0, head, H, D, BD, False)
    if G > 1:
        w1, w2 = _weight(R, 1, head, H, D, BD, False), _weight(R, 2, head, H, D, BD, False)
    if G > 3:
        w3 = _weight(R, 3, head, H, D, BD, False)
    longest = tl.max(n, 0)
    for q in range(longest):
        p = longest - 1 - q
        t = (start + p * STEP).to(tl.int64)[:, None]
        live = (p < n)[:, None] & there
        here = (t * H + head) * D + d
        g = dh + tl.load(dy + here, mask=live, other=0.0).to(tl.float32)
        k0, k1, k2, k3, k4, k5, k6, c, s, h = kept_and_before(
            gates, state, t, (tl.zeros_like(n) + p)[:, None], P, head, own, live, d, N, KEPT, H, D, STEP
        )
        d0, d1, d2, d3, direct, dc_t, dn_t, dm_t = cell_backward(
            KIND, g, dc, dn, dm, k0, k1, k2, k3, k4, k5, k6, c, s
        )
        tl.store(before + here, h, mask=live)
        store_gates(dgates + (t * PLANES * H + head) * D + d, d0, d1, d2, d3, live, H * D, PLANES)
        dh_t = tl.dot(d0.to(w0.dtype), w0, direct, input_precision=PRECISION)
        if G > 1:
            dh_t = tl.dot(d1.to(w0.dtype), w1, dh_t, input_precision=PRECISION)
            dh_t = tl.dot(d2.to(w0.dtype), w2, dh_t, input_precision=PRECISION)
        if G > 3:
            dh_t = tl.dot(d3.to(w0.dtype), w3, dh_t, input_precision=PRECISION)
        dh = tl.where(live, dh_t, dh)
        if N > 1:
            dc = tl.where(live, dc_t, dc)
        if N > 2:
            dn, dm = tl.where(live, dn_t, dn), tl.where(live, dm_t, dm)
    tl.store(dinitial + own, dh, mask=held)
    if N > 1:
        tl.store(dinitial + own + H * D, dc, mask=held)
    if N > 2:
        tl.store(dinitial + own + 2 * H * D, dn, mask=held)
        tl.store(dinitial + own + 3 * H * D, dm, mask=held)
