"""Streamed form of the recurrent cells, for heads whose matrices do not fit into a multiprocessor.

One program a head of 16 or more sequences runs all steps in one launch, as in the fused form, but reads the
matrices from the second-level cache in every step, tile by tile, and holds the states in memory. This takes
the place of FlashRNN's alternating form (arXiv:2412.07752), a launch a step, which costs more than the step.
A barrier parts what one half of a step writes from what the next reads.

Letters as in `triton_fused`; BN output and BK input channels a tile.
"""
# Triton ships no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from .triton_cells import cell_backward, cell_forward
from .triton_memory import gate, kept_and_before, store_gates, store_kept, walks_of


@triton.jit(do_not_specialize=["P", "S"])
def streamed_forward(
    x, R, b, sequences, order, out, final, gates, carry, P, S,
    KIND: tl.constexpr, G: tl.constexpr, N: tl.constexpr, KEPT: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BB: tl.constexpr,
    STEP: tl.constexpr, PACKED: tl.constexpr,
    KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Run all steps; ``final``, and h in ``carry (2, S, H, D)``, hold the initial state when it begins.

    ``carry`` is scratch: even steps read its first half and write its second.
    """
    head = tl.program_id(1)
    start, n, place, _ = walks_of(sequences, order, S, BB, PACKED)
    for p in range(tl.max(n, 0)):
        t = (start + p * STEP).to(tl.int64)[:, None]
        now = (p < n)[:, None]
        h_in = carry + ((place + p % 2 * S)[:, None] * H + head) * D
        h_out = carry + ((place + (1 - p % 2) * S)[:, None] * H + head) * D
        for j in range(0, D, BN):
            d = j + tl.arange(0, BN)[None, :]
            there = d < D
            live = now & there
            at = (t * G * H + head) * D + d
            own = (place[:, None] * N * H + head) * D + d
            a0 = gate(x, at, live, tl.load(b + head * D + d, mask=there, other=0.0).to(tl.float32))
            a1, a2, a3 = a0, a0, a0
            if G > 1:
                a1 = gate(
                    x, at + H * D, live, tl.load(b + (H + head) * D + d, mask=there, other=0.0).to(tl.float32)
                )
                a2 = tl.zeros_like(a0) + tl.load(b + (2 * H + head) * D + d, mask=there, other=0.0).to(
                    tl.float32
                )
                a3 = gate(x, at + 2 * H * D, live, 0.0)
            if G > 3:
                a2 += a3
                a3 = gate(
                    x,
                    at + 3 * H * D,
                    live,
                    tl.load(b + (3 * H + head) * D + d, mask=there, other=0.0).to(tl.float32),
                )
            for k in range(0, D, BK):
                i = k + tl.arange(0, BK)
                y = tl.load(h_in + i[None, :], mask=now & (i < D)[None, :], other=0.0)
                y = y.to(R.dtype.element_ty)
                w = R + (head * D + d) * D + i[:, None]
                inner = (i < D)[:, None] & there
                a0 = tl.dot(y, tl.load(w, mask=inner, other=0.0), a0, input_precision=PRECISION)
                if G > 1:
                    w1, w2 = w + H * D * D, w + 2 * H * D * D
                    a1 = tl.dot(y, tl.load(w1, mask=inner, other=0.0), a1, input_precision=PRECISION)
                    a2 = tl.dot(y, tl.load(w2, mask=inner, other=0.0), a2, input_precision=PRECISION)
                if G > 3:
                    w3 = w + 3 * H * D * D
                    a3 = tl.dot(y, tl.load(w3, mask=inner, other=0.0), a3, input_precision=PRECISION)
            h = tl.load(h_in + d, mask=live, other=0.0)
            c = tl.load(final + own + H * D, mask=live, other=0.0) if N > 1 else h
            s = tl.load(final + own + 2 * H * D, mask=live, other=0.0) if N > 2 else h
            m = tl.load(final + own + 3 * H * D, mask=live, other=0.0) if N > 2 else h
            h, c, s, m, k0, k1, k2, k3, k4, k5, k6 = cell_forward(KIND, a0, a1, a2, a3, h, c, s, m)
            tl.store(out + (t * H + head) * D + d, h, mask=live)
            tl.store(h_out + d, h, mask=live)
            # The last step of a sequence leaves its h where the caller looks for it.
            tl.store(final + own, h, mask=live & (p == n - 1)[:, None])
            if N > 1:
                tl.store(final + own + H * D, c, mask=live)
            if N > 2:
                tl.store(final + own + 2 * H * D, s, mask=live)
                tl.store(final + own + 3 * H * D, m, mask=live)
            if KEEP:
                kept = gates + (t + head.to(tl.int64) * P) * KEPT * D + d
                store_kept(kept, k0, k1, k2, k3, k4, k5, k6, live, D, KEPT)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["P", "S"])
def streamed_backward(
    dy, R, state, sequences, order, gates, dgates, before, dinitial, dpre, P, S,
    KIND: tl.constexpr, G: tl.constexpr, N: tl.constexpr, KEPT: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BB: tl.constexpr,
    STEP: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Run all steps from the last, as `fused_backward`; ``dinitial`` begins as the final state's gradient.

    ``dpre (S, 4 or 1, H, D)`` is scratch: a step's gradients of the recurrent sums.
    """
    PLANES: tl.constexpr = 4 if G > 1 else 1
    STRETCHES: tl.constexpr = (D + BK - 1) // BK
    head = tl.program_id(1)
    start, n, place, _ = walks_of(sequences, order, S, BB, PACKED)
    row = (place[:, None] * PLANES * H + head) * D
    longest = tl.max(n, 0)
    for q in range(longest):
        p = longest - 1 - q
        t = (start + p * STEP).to(tl.int64)[:, None]
        now = (p < n)[:, None]
        for j in range(0, D, BN):
            d = j + tl.arange(0, BN)[None, :]
            live = now & (d < D)
            here = (t * H + head) * D + d
            own = (place[:, None] * N * H + head) * D + d
            g = tl.load(dinitial + own, mask=live, other=0.0)
            g += tl.load(dy + here, mask=live, other=0.0).to(tl.float32)
            dc = tl.load(dinitial + own + H * D, mask=live, other=0.0) if N > 1 else g
            dn = tl.load(dinitial + own + 2 * H * D, mask=live, other=0.0) if N > 2 else g
            dm = tl.load(dinitial + own + 3 * H * D, mask=live, other=0.0) if N > 2 else g
            k0, k1, k2, k3, k4, k5, k6, c, s, h = kept_and_before(
                gates, state, t, (tl.zeros_like(n) + p)[:, None], P, head, own, live, d, N, KEPT, H, D, STEP
            )
            d0, d1, d2, d3, direct, dc, dn, dm = cell_backward(
                KIND, g, dc, dn, dm, k0, k1, k2, k3, k4, k5, k6, c, s
            )
            tl.store(before + here, h, mask=live)
            store_gates(dgates + (t * PLANES * H + head) * D + d, d0, d1, d2, d3, live, H * D, PLANES)
            store_gates(dpre + row + d, d0, d1, d2, d3, live, H * D, PLANES)
            tl.store(dinitial + own, direct, mask=live)
            if N > 1:
                tl.store(dinitial + own + H * D, dc, mask=live)
            if N > 2:
                tl.store(dinitial + own + 2 * H * D, dn, mask=live)
                tl.store(dinitial + own + 3 * H * D, dm, mask=live)
        tl.debug_barrier()
        for j in range(0, D, BN):
            d = j + tl.arange(0, BN)[None, :]
            there = d < D
            live = now & there
            own = (place[:, None] * N * H + head) * D + d
            total = tl.load(dinitial + own, mask=live, other=0.0)
            for f in range(G * STRETCHES):
                g, k = f // STRETCHES, f % STRETCHES * BK
                i = k + tl.arange(0, BK)
                y = tl.load(dpre + row + g * H * D + i[None, :], mask=now & (i < D)[None, :], other=0.0)
                w = R + (g * H + head) * D * D + i[:, None] * D + d
                w = tl.load(w, mask=(i < D)[:, None] & there, other=0.0)
                total = tl.dot(y.to(w.dtype), w, total, input_precision=PRECISION)
            tl.store(dinitial + own, total, mask=live)
        tl.debug_barrier()
