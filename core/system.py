"""A mixer as what it is: a linear system whose matrices change with time."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class System:
    """``S_t = A_t S_{t-1} + B_t u_tᵀ``, ``o_t = C_tᵀ S_t + D_t u_t`` for every head.

    Attributes:
        A: ``(B, T, H, N, N)``, or its diagonal ``(B, T, H, N)``.
        B: ``(B, T, H, N)``, or ``(B, T, H, N, R)`` where a token writes R times.
        C: ``(B, T, H, N)``.
        u: ``(B, T, H, V)``, or ``(B, T, H, R, V)``.
        D: ``(B, T, H)`` or ``None``, which is zero.
    """

    A: Tensor
    B: Tensor
    C: Tensor
    u: Tensor
    D: Tensor | None = None

    @property
    def diagonal(self) -> bool:
        """Whether ``A`` is given by its diagonal."""
        return self.A.ndim == 4

    def run(self) -> Tensor:
        """Run one token at a time in double precision: ``o`` (B, T, H, V). Slow; meant as an oracle."""
        exact = torch.complex128 if self.A.is_complex() else torch.float64
        A, B, C, u = (t.to(exact) for t in (self.A, self.B, self.C, self.u))
        if B.ndim == 4:
            B, u = B[..., None], u[..., None, :]
        S = u.new_zeros(*C.shape[:1], *C.shape[2:], u.shape[-1])
        outputs = []
        for A_t, B_t, C_t, u_t in zip(A.unbind(1), B.unbind(1), C.unbind(1), u.unbind(1)):
            S = A_t[..., None] * S if self.diagonal else A_t @ S
            S = S + B_t @ u_t
            outputs.append(torch.einsum("bhn,bhnv->bhv", C_t, S))
        o = torch.stack(outputs, 1) if outputs else u.sum(-2)
        return o if self.D is None else o + self.D.to(exact)[..., None] * u.sum(-2)

    def transition(self, begin: int, end: int) -> Tensor:
        """Give ``A_{end-1} … A_{begin}`` (B, H, N, N): what ``end`` keeps of the state before ``begin``."""
        A = self.A.diag_embed() if self.diagonal else self.A
        product = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand(A.shape[0], *A.shape[2:])
        for A_t in A[:, begin:end].unbind(1):
            product = A_t @ product
        return product
