import pytest
import torch
import torch.nn.functional as F

from mainstem.core.block import drop_path
from mainstem.core.channel import SwiGLU, default_hidden
from mainstem.core.norms import GatedNorm, l2_normalise
from mainstem.core.positions import rotate
from mainstem.core.system import System


def test_rotated_products_depend_on_the_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    products = [
        (rotate(q, torch.tensor([a])) * rotate(k, torch.tensor([b]))).sum().item()
        for a, b in [(3, 1), (9, 7), (1002, 1000)]
    ]
    assert products == pytest.approx([products[0]] * 3, rel=1e-9)
    assert rotate(q, torch.tensor([5])).norm().item() == pytest.approx(q.norm().item())


def test_rotation_takes_a_position_a_sequence() -> None:
    x = torch.randn(2, 3, 2, 4)
    places = torch.tensor([[0, 1, 2], [5, 6, 7]])
    both = rotate(x, places)
    assert torch.equal(both[1:], rotate(x[1:], places[1]))


@pytest.mark.parametrize("norm", ["none", "rms", "layer", "rms_all"])
@pytest.mark.parametrize("gate", ["none", "swish", "sigmoid"])
@pytest.mark.parametrize("gate_first", [False, True])
def test_gated_norm_is_its_formula(norm: str, gate: str, gate_first: bool) -> None:
    module = GatedNorm(2, 4, norm, gate, gate_first)  # type: ignore[arg-type]
    o = torch.randn(3, 5, 2, 4)
    z = torch.randn(3, 5, 8) if gate != "none" else None
    opening = torch.ones(3, 5, 8) if z is None else F.silu(z) if gate == "swish" else z.sigmoid()

    def normalise(x: torch.Tensor) -> torch.Tensor:
        if norm == "rms_all":
            return F.rms_norm(x.flatten(-2), (8,), eps=1e-5)
        if norm == "rms":
            return F.rms_norm(x, (4,), eps=1e-5).flatten(-2)
        return F.layer_norm(x, (4,)).flatten(-2) if norm == "layer" else x.flatten(-2)

    expected = normalise(o * opening.view_as(o)) if gate_first else normalise(o) * opening
    torch.testing.assert_close(module(o, z), expected)


def test_l2_normalise_has_a_bounded_gradient_at_zero() -> None:
    x = torch.zeros(4, requires_grad=True)
    (gradient,) = torch.autograd.grad(l2_normalise(x).sum(), x)
    assert gradient.abs().max() <= 1e3 + 1
    assert l2_normalise(torch.randn(5, 8)).norm(dim=-1).tolist() == pytest.approx([1] * 5, abs=1e-5)


def test_swiglu_is_its_formula_and_size() -> None:
    module = SwiGLU(6, 10)
    x = torch.randn(2, 6)
    gate, up = (F.linear(x, w) for w in module.in_proj.weight.chunk(2))
    torch.testing.assert_close(module(x), F.linear(F.silu(gate) * up, module.out_proj.weight))
    assert default_hidden(384) == 1024
    assert default_hidden(1) == 8


def test_drop_path_drops_whole_sequences_and_keeps_the_mean() -> None:
    lengths = torch.full((4000,), 3)
    cu = F.pad(lengths.cumsum(0), (1, 0)).int()
    dropped = drop_path(torch.ones(1, 12_000, 1), 0.25, cu).view(4000, 3)
    assert set(dropped.sum(1).tolist()) == {0.0, 4.0}
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)
    batch = drop_path(torch.ones(4000, 3, 1), 0.25, None).squeeze(-1)
    assert set(batch.sum(1).tolist()) == {0.0, 4.0}


def test_system_runs_as_its_equations() -> None:
    A, B, C, u, D = (
        torch.randn(1, 3, 1, *shape, dtype=torch.float64) for shape in ((2, 2), (2,), (2,), (4,), ())
    )
    o = System(A, B, C, u, D).run()
    S = torch.zeros(2, 4, dtype=torch.float64)
    for t in range(3):
        S = A[0, t, 0] @ S + torch.outer(B[0, t, 0], u[0, t, 0])
        torch.testing.assert_close(o[0, t, 0], C[0, t, 0] @ S + D[0, t, 0] * u[0, t, 0])
    product = A[0, 2, 0] @ A[0, 1, 0] @ A[0, 0, 0]
    torch.testing.assert_close(System(A, B, C, u).transition(0, 3)[0, 0], product)
    diagonal = A.diagonal(dim1=-2, dim2=-1)
    full = System(diagonal.diag_embed(), B, C, u)
    torch.testing.assert_close(System(diagonal, B, C, u).run(), full.run())
