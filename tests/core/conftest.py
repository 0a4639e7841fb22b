from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mainstem.core.mixers import MIXERS, Mixer, build_mixer

DIM, HEADS = 8, 2
# A row with an option that changes the arithmetic is a mixer of its own to the equivalence tests.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in MIXERS},
    "attention-window": ("attention", {"window": 3}),
    "attention-window-1": ("attention", {"window": 1, "rotary": False}),
    "attention-grouped": ("attention", {"kv_heads": 1}),
    "deltanet-negative": ("deltanet", {"eigenvalue_range": (-1, 1), "conv": 0}),
    "gated_deltanet-negative": ("gated_deltanet", {"eigenvalue_range": (-1, 1), "expand_v": 2.0}),
    "deltaproduct-gated": ("deltaproduct", {"decay": "head", "gate": "swish", "householder": 3, "conv": 0}),
    "kda-negative": ("kda", {"eigenvalue_range": (-1, 1), "expand_k": 0.5, "expand_v": 2.0}),
    "rwkv7-rank": ("rwkv7", {"decay_rank": 1, "rate_rank": 2, "gate_rank": 3}),
    "gla-conv": ("gla", {"conv": 3, "conv_value": False, "expand_k": 1.0}),
    "rwkv6-rank": ("rwkv6", {"lerp_rank": 1, "decay_rank": 2}),
    "ttt-gated": ("ttt", {"mini_batch": 3, "conv": 4, "gate": "gelu", "rotary": False}),
    "s4d-chunks": ("s4d", {"state_size": 6, "initialisation": "inverse", "chunk": 4}),
    "s4d-bilinear": ("s4d", {"state_size": 2, "discretisation": "bilinear", "chunk": 128}),
    "lssl-chunks": ("lssl", {"state_size": 5, "learn_A": True, "learn_dt": True, "chunk": 2}),
    "hyena-short": ("hyena", {"order": 1, "max_length": 4, "conv": 1, "filter_width": 7, "bands": 0}),
    "slstm-exp": ("slstm", {"forget": "exp", "conv": 0}),
    "mamba-small": ("mamba", {"expand": 1.5, "state_size": 3, "conv": 2, "rank": 2}),
    "lru-small": ("lru", {"state_size": 5, "r_min": 0.5, "max_phase": 0.3}),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``variant`` is everything, ``linear_variant`` what has a system, ``recurrent_variant`` what scans."""
    families = {name: name.split("-")[0] for name in VARIANTS}
    groups = {
        "variant": list(VARIANTS),
        "linear_variant": [v for v, f in families.items() if MIXERS[f].mixer.system is not Mixer.system],
        "recurrent_variant": [v for v, f in families.items() if f != "attention"],
        "mixer_name": list(MIXERS),
    }
    for fixture, values in groups.items():
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, values)


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def build() -> Callable[..., Mixer]:
    """Build a variant in the second of two layers, with every parameter moved off its initial value."""

    def make(variant: str, dtype: torch.dtype = torch.float64, **keywords: Any) -> Mixer:
        name, options = VARIANTS[variant]
        mixer = build_mixer(
            name, **{"dim": DIM, "heads": HEADS, "layer": 1, "depth": 2, **options, **keywords}
        )
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return mixer.to(dtype)

    return make


@pytest.fixture
def tokens() -> Callable[..., Tensor]:
    """Random tokens (B, T, DIM), in double precision by default."""

    def make(batch: int, length: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(batch, length, DIM, dtype=dtype)

    return make
