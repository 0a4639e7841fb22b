"""Triton kernels of `selective_scan`: every chunk by itself, given the states at its borders.

`chunk_ends` finds what each chunk adds to a state that passes through it, `carry` the states at all borders,
and `chunk_outputs` and `chunk_gradients` run through the chunk. One state of every channel is followed at a
time, so that N is an ordinary number.

A chunk is W runs of R tokens. A tile ``(W, C)`` has the r-th token of each run, and what there is for every
token of a chunk is a tuple of R tiles: runs are warps, channels lanes, and a thread walks along its run.
First it finds what its run adds, then the runs are joined, then it walks once more from the right state.

Letters: D channels, N states. The states at the borders are ``(chunks, N, D)``, those of a sequence
``(S, D, N)``. Token p of a walk is row ``start + p · step``; what lies beyond the walk or the channels is
loaded as zero, and then changes no state.
"""
# Triton ships no types, and a tuple of tiles grows while a kernel is compiled.
# mypy: allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="assignment, misc, no-untyped-def, operator, var-annotated"
# Triton has no starred expressions.
# ruff: noqa: RUF005

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOG2 = tl.constexpr(0.6931471805599453)
LARGEST = tl.constexpr(3e38)
"""No product of decays is infinite, lest it meet a state of zero."""


@triton.jit
def _span(chunks, index, step):
    """Return the first token of a chunk, and how many there are from it to the end of the sequence."""
    first = tl.load(chunks + 4 * index + 1)
    start = tl.load(chunks + 4 * index + 2)
    return start.to(tl.int64) + first.to(tl.int64) * step, tl.load(chunks + 4 * index + 3) - first


@triton.jit
def _tiles(x, token, length, step, d, D, R: tl.constexpr, W: tl.constexpr):
    """Load the tiles of ``(tokens, D)`` in float32."""
    tiles = ()
    for r in tl.static_range(R):
        row = tl.arange(0, W) * R + r
        at = x + token * D + ((row * step)[:, None] * D + d[None, :])
        inside = (row < length)[:, None] & (d < D)[None, :]
        tiles = tiles + (tl.load(at, mask=inside, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def _put(x, tiles, token, length, step, d, D, R: tl.constexpr, W: tl.constexpr):
    """Store what `_tiles` loads."""
    for r in tl.static_range(R):
        row = tl.arange(0, W) * R + r
        at = x + token * D + ((row * step)[:, None] * D + d[None, :])
        tl.store(at, tiles[r], mask=(row < length)[:, None] & (d < D)[None, :])


@triton.jit
def _columns(x, token, length, step, n, N, R: tl.constexpr, W: tl.constexpr):
    """Load column n of ``(tokens, N)``: R times ``(W, 1)``."""
    columns = ()
    for r in tl.static_range(R):
        row = tl.arange(0, W) * R + r
        at = x + (token * N + n) + row * (step * N)
        columns = columns + (tl.load(at, mask=row < length, other=0.0).to(tl.float32)[:, None],)
    return columns


@triton.jit
def _put_columns(x, columns, token, length, step, n, N, R: tl.constexpr, W: tl.constexpr):
    """Store column n, R times ``(W,)``."""
    for r in tl.static_range(R):
        row = tl.arange(0, W) * R + r
        tl.store(x + (token * N + n) + row * (step * N), columns[r], mask=row < length)


@triton.jit
def _times(x, y, R: tl.constexpr):
    """Multiply two tuples of tiles."""
    product = ()
    for r in tl.static_range(R):
        product = product + (x[r] * y[r],)
    return product


@triton.jit
def _zeros(R: tl.constexpr, W: tl.constexpr, CHANNELS: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(R):
        tiles = tiles + (tl.full((W, CHANNELS), 0.0, tl.float32),)
    return tiles


@triton.jit
def _decays(rate, sizes, R: tl.constexpr):
    decays = ()
    for r in tl.static_range(R):
        decays = decays + (tl.minimum(tl.exp2(rate * sizes[r]), LARGEST),)
    return decays


@triton.jit
def _weighted(rate, sizes, u, b, R: tl.constexpr):
    """Sum ``exp2(rate size) u b`` over the tokens, (C,)."""
    total = tl.minimum(tl.exp2(rate * sizes[0]), LARGEST) * u[0] * b[0]
    for r in tl.static_range(1, R):
        total += tl.minimum(tl.exp2(rate * sizes[r]), LARGEST) * u[r] * b[r]
    return tl.sum(total, 0)


@triton.jit
def _rate(A, d, n, D, N):
    """Load the rates of state n in base 2, ``(1, C)``."""
    return (tl.load(A + d * N + n, mask=d < D, other=0.0) * LOG2E)[None, :]


@triton.jit
def _gates(z, R: tl.constexpr):
    """Return ``silu(z)`` and its derivative."""
    gates, slopes = (), ()
    for r in tl.static_range(R):
        s = 1.0 / (1.0 + tl.exp(-z[r]))
        gate = z[r] * s
        gates = gates + (gate,)
        slopes = slopes + (s + gate * (1.0 - s),)
    return gates, slopes


@triton.jit
def _append_sum(before, last, before_next, last_next):
    return before + last + before_next, last_next


@triton.jit
def _other_runs(x, REVERSE: tl.constexpr):
    """Sum of the runs before each, or, with ``REVERSE``, after it."""
    return tl.associative_scan((tl.zeros_like(x), x), 0, _append_sum, reverse=REVERSE)[0]


@triton.jit
def _append(a_before, b_before, a, b, a_before_next, b_before_next, a_next, b_next):
    """Follow ``h → a h + b`` up to the last run, which is not in it yet."""
    a_through, b_through = tl.minimum(a * a_before, LARGEST), a * b_before + b
    b_through = a_before_next * b_through + b_before_next
    return tl.minimum(a_before_next * a_through, LARGEST), b_through, a_next, b_next


@triton.jit
def _before_runs(a, b, state, REVERSE: tl.constexpr):
    """Return the state before each run ``h → a h + b``, from that before the first, or the last."""
    none = tl.full(a.shape, 1.0, tl.float32)
    before = tl.associative_scan((none, tl.zeros_like(b), a, b), 0, _append, reverse=REVERSE)
    return before[0] * state[None, :] + before[1]


@triton.jit
def _states_before(decays, u, b, state, R: tl.constexpr):
    """Return the state before each run: (W, C) from ``state`` (C,)."""
    through, added = decays[0], u[0] * b[0]
    for r in tl.static_range(1, R):
        through = tl.minimum(through * decays[r], LARGEST)
        added = decays[r] * added + u[r] * b[r]
    return _before_runs(through, added, state, False)


@triton.jit(do_not_specialize=("D", "N", "step"))
def chunk_ends(
    x,  # (tokens, D)
    dt,
    A,  # (D, N)
    B,  # (tokens, N)
    C,
    z,
    dy,
    chunks,
    steps,  # (chunks, D): sum of dt
    ends,  # (2, chunks, N, D): what a chunk adds to the state behind it, and to the gradient before it
    D,
    N,
    step,
    BACKWARD: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Find what a chunk adds to the state, and, with ``BACKWARD``, to the gradient of the state."""
    index = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    token, length = _span(chunks, index, step)
    size = _tiles(dt, token, length, step, d, D, R, W)
    u = _times(size, _tiles(x, token, length, step, d, D, R, W), R)
    run = size[0]
    for r in tl.static_range(1, R):
        run += size[r]
    tl.store(steps + index * D + d, tl.sum(run, 0), mask=d < D)
    # Sums of what follows a token, without itself: beside it they may be small.
    behind = _other_runs(run, True)
    after = (behind,)
    for r in tl.static_range(R - 1, 0, -1):
        behind += size[r]
        after = (behind,) + after
    if BACKWARD:
        g = _tiles(dy, token, length, step, d, D, R, W)
        if z is not None:
            gates, _ = _gates(_tiles(z, token, length, step, d, D, R, W), R)
            g = _times(g, gates, R)
        sum_ = _other_runs(run, False)
        up_to = ()
        for r in tl.static_range(R):
            sum_ += size[r]
            up_to = up_to + (sum_,)
        gradients = ends + tl.num_programs(0).to(tl.int64) * N * D
    for n in range(N):
        rate = _rate(A, d, n, D, N)
        at = (index * N + n) * D + d
        b = _columns(B, token, length, step, n, N, R, W)
        tl.store(ends + at, _weighted(rate, after, u, b, R), mask=d < D)
        if BACKWARD:
            c = _columns(C, token, length, step, n, N, R, W)
            tl.store(gradients + at, _weighted(rate, up_to, g, c, R), mask=d < D)


@triton.jit(do_not_specialize=("chunks", "D", "N"))
def carry(
    A,  # (D, N)
    steps,  # (chunks, D)
    ends,  # (2, chunks, N, D)
    initial,  # (S, D, N)
    final,
    dfinal,
    dinitial,
    sequences,
    chunks,
    D,
    N,
    ELEMENTS: tl.constexpr,
):
    """Turn the ends of chunks, in place, into the states before them and the gradients behind them."""
    sequence = tl.program_id(0).to(tl.int64)
    backward = tl.program_id(2)
    first = tl.load(sequences + 4 * sequence + 2).to(tl.int64)
    count = tl.load(sequences + 4 * sequence + 3)
    element = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = element < D * N
    n, d = element // D, element % D
    rate = tl.load(A + d * N + n, mask=inside, other=0.0) * LOG2E
    border = sequence * D * N + d * N + n
    if backward == 0:
        state = tl.load(initial + border, mask=inside, other=0.0)
    else:
        state = tl.load(dfinal + border, mask=inside, other=0.0)
        ends += chunks.to(tl.int64) * D * N
    for i in tl.range(0, count, num_stages=4):
        index = first + (i if backward == 0 else count - 1 - i)
        at = ends + index * D * N + element
        decay = tl.minimum(tl.exp2(rate * tl.load(steps + index * D + d, mask=inside, other=0.0)), LARGEST)
        end = tl.load(at, mask=inside, other=0.0)
        tl.store(at, state, mask=inside)
        state = decay * state + end
    if backward == 0:
        tl.store(final + border, state, mask=inside)
    else:
        tl.store(dinitial + border, state, mask=inside)


@triton.jit(do_not_specialize=("D", "N", "step"))
def chunk_outputs(
    x,  # (tokens, D)
    dt,
    A,  # (D, N)
    B,  # (tokens, N)
    C,
    skip,  # (D,)
    z,
    chunks,
    states,  # (chunks, N, D), or with SINGLE (S, D, N)
    y,
    final,  # (S, D, N), with SINGLE
    D,
    N,
    step,
    SINGLE: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Run through a chunk from the state before it; ``SINGLE`` where no sequence has more than one chunk."""
    index = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    token, length = _span(chunks, index, step)
    size = _tiles(dt, token, length, step, d, D, R, W)
    values = _tiles(x, token, length, step, d, D, R, W)
    u = _times(size, values, R)
    factor = tl.load(skip + d, mask=d < D, other=0.0)[None, :]
    o = ()
    for r in tl.static_range(R):
        o = o + (values[r] * factor,)
    last = (tl.arange(0, W) == W - 1)[:, None]
    if SINGLE:
        border = (tl.load(chunks + 4 * index).to(tl.int64) * D + d) * N
    for n in range(N):
        decays = _decays(_rate(A, d, n, D, N), size, R)
        b = _columns(B, token, length, step, n, N, R, W)
        c = _columns(C, token, length, step, n, N, R, W)
        at = border + n if SINGLE else (index * N + n) * D + d
        h = _states_before(decays, u, b, tl.load(states + at, mask=d < D, other=0.0), R)
        outputs = ()
        for r in tl.static_range(R):
            h = decays[r] * h + u[r] * b[r]
            outputs = outputs + (o[r] + h * c[r],)
        o = outputs
        if SINGLE:
            tl.store(final + at, tl.sum(tl.where(last, h, 0.0), 0), mask=d < D)
    if z is not None:
        gates, _ = _gates(_tiles(z, token, length, step, d, D, R, W), R)
        o = _times(o, gates, R)
    _put(y, o, token, length, step, d, D, R, W)


@triton.jit(do_not_specialize=("tokens", "D", "N", "step"))
def chunk_gradients(
    x,  # (tokens, D)
    dt,
    A,  # (D, N)
    B,  # (tokens, N)
    C,
    skip,  # (D,)
    z,
    dy,
    chunks,
    states,  # (2, chunks, N, D): states before, gradients behind; with SINGLE initial (S, D, N)
    dfinal,  # (S, D, N), with SINGLE
    dx,
    ddt,
    dz,
    dparameters,  # (chunks, N + 1, D): dA, then dD
    dselect,  # (2, blocks of C, tokens, N): dB, dC
    dinitial,  # (S, D, N), with SINGLE
    tokens,
    D,
    N,
    step,
    SINGLE: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Run through a chunk from the state before it, and back from the gradient of the state behind it."""
    index = tl.program_id(0).to(tl.int64)
    block, blocks = tl.program_id(1), tl.num_programs(1)
    d = block * CHANNELS + tl.arange(0, CHANNELS)
    token, length = _span(chunks, index, step)
    size = _tiles(dt, token, length, step, d, D, R, W)
    # Behind the last token of a run comes the first of the next; behind the chunk nothing decays.
    row = (tl.arange(0, W) + 1) * R
    inside = ((row < length) & (row < R * W))[:, None] & (d < D)[None, :]
    next_ = dt + token * D + ((row * step)[:, None] * D + d[None, :])
    size_next = tl.load(next_, mask=inside, other=0.0).to(tl.float32)
    values = _tiles(x, token, length, step, d, D, R, W)
    u = _times(size, values, R)
    factor = tl.load(skip + d, mask=d < D, other=0.0)[None, :]
    g = _tiles(dy, token, length, step, d, D, R, W)
    o = _zeros(R, W, CHANNELS)
    if z is not None:
        gates, slopes = _gates(_tiles(z, token, length, step, d, D, R, W), R)
        slopes = _times(slopes, g, R)
        g = _times(g, gates, R)
    du, dsize = _zeros(R, W, CHANNELS), _zeros(R, W, CHANNELS)
    # Each block of channels has its own part of the sums over channels.
    into_B = dselect + block.to(tl.int64) * tokens * N
    into_C = into_B + blocks.to(tl.int64) * tokens * N
    begins = (tl.arange(0, W) == 0)[:, None]
    if SINGLE:
        border = (tl.load(chunks + 4 * index).to(tl.int64) * D + d) * N
    for n in range(N):
        rate = _rate(A, d, n, D, N)
        if SINGLE:
            before = tl.load(states + border + n, mask=d < D, other=0.0)
            behind = tl.load(dfinal + border + n, mask=d < D, other=0.0)
        else:
            at = (index * N + n) * D + d
            before = tl.load(states + at, mask=d < D, other=0.0)
            at += tl.num_programs(0).to(tl.int64) * N * D
            behind = tl.load(states + at, mask=d < D, other=0.0)
        b = _columns(B, token, length, step, n, N, R, W)
        c = _columns(C, token, length, step, n, N, R, W)
        decays = _decays(rate, size, R)
        h = _states_before(decays, u, b, before, R)
        kept, outputs, dcolumn = (), (), ()
        for r in tl.static_range(R):
            kept = kept + (decays[r] * h,)
            h = kept[r] + u[r] * b[r]
            dcolumn = dcolumn + (tl.sum(g[r] * h, 1),)
            outputs = outputs + ((o[r] + h * c[r]) if z is not None else o[r],)
        o = outputs
        _put_columns(into_C, dcolumn, token, length, step, n, N, R, W)
        # The decay behind each token.
        following = ()
        for r in tl.static_range(1, R):
            following = following + (decays[r],)
        following = following + (tl.minimum(tl.exp2(rate * size_next), LARGEST),)
        through, added = following[R - 1], g[R - 1] * c[R - 1]
        for r in tl.static_range(R - 2, -1, -1):
            added = following[r] * added + g[r] * c[r]
            through = tl.minimum(through * following[r], LARGEST)
        dh = _before_runs(through, added, behind, True)
        dwritten, dsizes, dcolumn = (), (), ()
        drate = tl.full((W, CHANNELS), 0.0, tl.float32)
        for r in tl.static_range(R - 1, -1, -1):
            dh = following[r] * dh + g[r] * c[r]
            dcolumn = (tl.sum(dh * u[r], 1),) + dcolumn
            dwritten = (du[r] + dh * b[r],) + dwritten
            exponent = dh * kept[r]
            dsizes = (dsize[r] + exponent * rate,) + dsizes
            drate += exponent * size[r]
        du, dsize = dwritten, dsizes
        _put_columns(into_B, dcolumn, token, length, step, n, N, R, W)
        tl.store(dparameters + (index * (N + 1) + n) * D + d, tl.sum(drate, 0), mask=d < D)
        if SINGLE:
            received = tl.sum(tl.where(begins, decays[0] * dh, 0.0), 0)
            tl.store(dinitial + border + n, received, mask=d < D)
    into_x, into_dt, into_z = (), (), ()
    dskip = tl.full((W, CHANNELS), 0.0, tl.float32)
    for r in tl.static_range(R):
        into_x = into_x + (du[r] * size[r] + g[r] * factor,)
        into_dt = into_dt + (du[r] * values[r] + dsize[r] * LOG2,)
        if z is not None:
            into_z = into_z + (slopes[r] * (o[r] + values[r] * factor),)
        dskip += g[r] * values[r]
    _put(dx, into_x, token, length, step, d, D, R, W)
    _put(ddt, into_dt, token, length, step, d, D, R, W)
    if z is not None:
        _put(dz, into_z, token, length, step, d, D, R, W)
    tl.store(dparameters + (index * (N + 1) + N) * D + d, tl.sum(dskip, 0), mask=d < D)
