"""The cells themselves for the Triton kernels: arithmetic on tiles ``(sequences, channels)``, and no memory.

Kinds are the places in `cells.CELLS`. What a cell does not have is passed as any tile and comes back as one.
"""
# Triton ships no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """``tanh x``, whose exponent is never positive."""
    e = tl.exp(-2 * tl.abs(x))
    y = (1 - e) / (1 + e)
    return tl.where(x < 0, -y, y)


@triton.jit
def sigmoid(x):
    """``1 / (1 + e^{−x})``, whose exponent is never positive."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit
def log_sigmoid(x):
    """``log σ(x)``, whose exponent is never positive."""
    return tl.minimum(x, 0.0) - tl.log(1 + tl.exp(-tl.abs(x)))


@triton.jit
def cell_forward(KIND: tl.constexpr, a0, a1, a2, a3, h, c, n, m):
    """Take the sums of the gates to the next states; the GRU's ``a3`` is its candidate's input alone.

    Returns:
        ``h, c, n, m`` and the seven vectors to keep, see `cells.CELLS`.
    """
    if KIND == 0:  # lstm
        i, f, g, o = sigmoid(a0), sigmoid(a1), tanh(a2), sigmoid(a3)
        c = f * c + i * g
        h = o * tanh(c)
        return h, c, n, m, i, f, g, o, c, c, c
    elif KIND == 1:  # noqa: RET505 (gru; the branches are compiled, not taken)
        r, z = sigmoid(a0), sigmoid(a1)
        g = tanh(a3 + r * a2)
        h = g + z * (h - g)
        return h, c, n, m, r, z, g, a2, h, h, h
    elif KIND == 4:  # elman
        h = tanh(a0)
        return h, c, n, m, h, h, h, h, h, h, h
    else:  # slstm
        z, o = tanh(a2), sigmoid(a3)
        if KIND == 2:
            past, slope = m + log_sigmoid(a1), sigmoid(-a1)
        else:
            past, slope = m + a1, tl.full(a1.shape, 1.0, tl.float32)
        # Where nothing was written yet, nothing is there to forget, whatever m says.
        m = tl.where(n == 0, a0, tl.maximum(past, a0))
        forget = tl.where(n == 0, 0.0, tl.exp(tl.minimum(past - m, 0.0)))
        enter = tl.exp(a0 - m)
        c = forget * c + enter * z
        n = forget * n + enter
        return o * c / n, c, n, m, enter, forget, z, o, c, n, slope


@triton.jit
def cell_backward(KIND: tl.constexpr, g, dc, dn, dm, k0, k1, k2, k3, k4, k5, k6, before, n_before):
    """Take the gradients of h and the other states through one token.

    Args:
        KIND: number of the cell.
        g, dc, dn, dm: gradients of the states after the token.
        k0 … k6: what the forward kept.
        before: c before the token, or h of a cell that has no c.
        n_before: n before the token.

    Returns:
        Gradients of the four recurrent sums (the GRU has three, and as the fourth its candidate's input), of
        h what does not pass the sums, and of c, n and m.
    """
    zero = tl.zeros_like(g)
    if KIND == 0:  # lstm
        bent = tanh(k4)
        dc += g * k3 * (1 - bent * bent)
        di, df = dc * k2 * k0 * (1 - k0), dc * before * k1 * (1 - k1)
        dg, do = dc * k0 * (1 - k2 * k2), g * bent * k3 * (1 - k3)
        return di, df, dg, do, zero, dc * k1, dn, dm
    elif KIND == 1:  # noqa: RET505 (gru; the branches are compiled, not taken)
        da = g * (1 - k1) * (1 - k2 * k2)
        dz, dr = g * (before - k2) * k1 * (1 - k1), da * k3 * k0 * (1 - k0)
        return dr, dz, da * k0, da, g * k1, dc, dn, dm
    elif KIND == 4:  # elman
        da = g * (1 - k0 * k0)
        return da, da, da, da, zero, dc, dn, dm
    else:  # slstm
        ratio, step = k4 / k5, g * k3 / k5
        dc += step
        dn -= step * ratio
        past = (dc * before + dn * n_before) * k1
        di = (dc * k2 + dn) * k0
        # m was the larger of two terms: that one's gate is exp(0), and to it goes m's gradient.
        dm -= past + di
        won = k1 == 1
        past, di = tl.where(won, past + dm, past), tl.where(won, di, di + dm)
        do = g * ratio * k3 * (1 - k3)
        return di, past * k6, dc * k0 * (1 - k2 * k2), do, zero, dc * k1, dn * k1, past
