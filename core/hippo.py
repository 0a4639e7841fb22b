"""HiPPO: the state matrices that remember a signal by the coefficients of its best polynomials.

Gu et al., *HiPPO: Recurrent Memory with Optimal Polynomial Projections* (NeurIPS 2020), arXiv:2008.07669.

>>> A, B = legs(2)
>>> A.tolist(), [round(b, 3) for b in B.tolist()]
([[-1.0, 0.0], [-1.7320508075688772, -2.0]], [1.0, 1.732])
"""

import torch
from torch import Tensor


def legs(size: int) -> tuple[Tensor, Tensor]:
    """Scaled Legendre measure, all of the past: ``A (N, N)`` and ``B (N,)`` of ``ẋ = A x + B u``, float64.

    ``A_nk = −√(2n+1) √(2k+1)`` below the diagonal and ``−(n+1)`` on it; ``B_n = √(2n+1)``. In the
    time-invariant form, as state space layers use it, the past fades exponentially.
    """
    n = torch.arange(size, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    return -(torch.outer(root, root).tril(-1) + torch.diag(n + 1)), root


def legt(size: int) -> tuple[Tensor, Tensor]:
    """Translated Legendre measure, a window of length 1 that slides: ``A (N, N)`` and ``B (N,)``, float64.

    ``A_nk = −√(2n+1) √(2k+1)`` on and below the diagonal, and times ``(−1)^{n−k}`` above it;
    ``B_n = √(2n+1)``.
    """
    n = torch.arange(size, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    sign = torch.where(n[:, None] < n, (-1.0) ** (n[:, None] - n), torch.ones(()).double())
    return -torch.outer(root, root) * sign, root


def bilinear(A: Tensor, B: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Discretise ``ẋ = A x + B u`` by the trapezium rule, for every step Δ.

    Args:
        A: ``(N, N)``.
        B: ``(N,)``.
        step: Δ ``(…,)``.

    Returns:
        ``(I − Δ/2 A)⁻¹ (I + Δ/2 A)`` ``(…, N, N)`` and ``(I − Δ/2 A)⁻¹ Δ B`` ``(…, N)``.
    """
    half = step[..., None, None] / 2 * A
    eye = torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
    right = torch.cat([eye + half, step[..., None, None] * B[:, None]], -1)
    solved: Tensor = torch.linalg.solve(eye - half, right)
    return solved[..., :-1], solved[..., -1]
