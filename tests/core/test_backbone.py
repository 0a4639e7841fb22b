import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

import pytest
import torch
from torch import Tensor

from mainstem import Backbone, BackboneConfig
from mainstem.core import packed
from mainstem.core.mixers import MIXERS
from mainstem.core.state import detach, num_bytes, select

HYBRID: Any = ["gla", "attention"]


def test_the_constructor_has_the_fields_of_the_configuration() -> None:
    parameters = inspect.signature(Backbone).parameters
    assert list(parameters) == [f.name for f in fields(BackboneConfig)]
    for f in fields(BackboneConfig):
        default = {} if f.default is MISSING else f.default
        assert parameters[f.name].default == (default or None if f.name == "options" else default)


def test_config_builds_what_it_says() -> None:
    config = BackboneConfig(mixer=["mamba2", "mamba2", "attention"], dim=16, depth=5, heads=2, hidden=24)
    net: Any = config.build()
    assert net.config == config
    assert config.layers == ["mamba2", "mamba2", "attention", "mamba2", "mamba2"]
    assert [type(block.mixer).__name__ for block in net.blocks].count("AttentionMixer") == 1
    assert net.blocks[0].channel.out_proj.weight.shape == (16, 24)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("lengths", [[6, 2, 0, 5], [6, 6, 6, 6], [0, 0, 0, 0]])
def test_padding_is_never_seen(lengths: list[int], bidirectional: bool, mixer_name: Any) -> None:
    net = Backbone(dim=8, heads=2, mixer=mixer_name, bidirectional=bidirectional).double()
    x = torch.randn(4, 6, 8, dtype=torch.float64)
    y = net(x, lengths=torch.tensor(lengths))
    spoiled = x.clone()
    for row, n in enumerate(lengths):
        spoiled[row, n:] = float("nan")
        torch.testing.assert_close(y[row, :n], net(x[row : row + 1, :n])[0])
        assert y[row, n:].abs().sum() == 0
    assert torch.equal(net(spoiled, lengths=torch.tensor(lengths)), y)


def test_lengths_with_state_go_on() -> None:
    net = Backbone(dim=8, heads=2, mixer=HYBRID).double()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    lengths = torch.tensor([3, 1])
    _, state = net(x[:, :3], lengths=lengths, return_state=True)
    second = torch.stack([x[0, 3:5], x[1, 1:3]])
    y, _ = net(second, state=state, return_state=True)
    torch.testing.assert_close(y[0], net(x[:1, :5])[0, 3:5])
    torch.testing.assert_close(y[1], net(x[1:, :3])[0, 1:3])


@pytest.mark.parametrize("mixer", ["gated_deltanet", "mlstm", HYBRID, ["lstm", "lru", "retnet"]])
def test_parallel_chunk_step_and_packed_agree(mixer: Any) -> None:
    net = Backbone(dim=8, depth=3, heads=2, mixer=mixer, layer_scale=0.5).double()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    y = net(x)
    first, state = net(x[:, :4], return_state=True)
    second, state = net(x[:, 4:6], state=state, return_state=True)
    last, state = net.step(x[:, 6], state)
    torch.testing.assert_close(torch.cat([first, second, last[:, None]], 1), y)
    state, steps = net.init_state(2), []
    for x_t in x.unbind(1):
        y_t, state = net.step(x_t, state)
        steps.append(y_t)
    torch.testing.assert_close(torch.stack(steps, 1), y)
    flat, cu = packed.join(list(x))
    torch.testing.assert_close(net(flat, cu_seqlens=cu)[0], y.flatten(0, 1))


def test_states_can_be_selected_and_detached() -> None:
    net = Backbone(dim=8, heads=2, mixer=HYBRID).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    _, state = net(x[:, :4], return_state=True)
    swapped = select(detach(state), torch.tensor([2, 0]))
    y, _ = net.step(x[[2, 0], 4], swapped)
    assert not any(t.requires_grad for s in swapped for t in s.values())
    torch.testing.assert_close(y, net(x)[[2, 0], 4])


def test_state_bytes() -> None:
    recurrent = Backbone(dim=8, heads=2, mixer="gla")
    assert recurrent.state_bytes(2) == num_bytes(recurrent.init_state(2)) == recurrent.state_bytes(2, 1000)
    attention = Backbone(dim=8, heads=2, mixer="attention")
    _, state = attention(torch.randn(2, 50, 8), return_state=True)
    assert attention.state_bytes(2, 50) == num_bytes(state)
    window = Backbone(dim=8, heads=2, mixer="attention", options={"window": 4})
    assert window.state_bytes(1, 50) == window.state_bytes(1, 5000)


@pytest.mark.parametrize("mixer", [HYBRID, *MIXERS], ids=str)
def test_checkpointing_changes_memory_only(mixer: Any) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        torch.manual_seed(0)
        net = Backbone(dim=8, heads=2, mixer=mixer, checkpointing=checkpointing, dropout=0.5, drop_path=0.5)
        y = net(torch.randn(4, 6, 8))
        return list(torch.autograd.grad(y.square().sum(), list(net.parameters())))

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False), strict=True))


def test_dropout_and_drop_path_act_in_training_only() -> None:
    net = Backbone(dim=8, heads=2, dropout=0.5, drop_path=0.5)
    x = torch.randn(2, 5, 8)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))
    blocks: Any = Backbone(depth=3, drop_path=0.3).blocks
    assert [block.branch.rate for block in blocks] == [0, 0.15, 0.3]


def test_layer_scale_of_zero_leaves_the_input() -> None:
    net = Backbone(dim=8, heads=2, layer_scale=0.0)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(net(x), net.norm(x))


def test_without_a_channel_mixer_only_the_token_mixer_is_left() -> None:
    bare, full = (Backbone(dim=8, heads=2, channel_mixer=c) for c in ("none", "swiglu"))
    assert not any("channel" in name for name, _ in bare.named_parameters())
    assert sum(p.numel() for p in bare.parameters()) < sum(p.numel() for p in full.parameters())
    assert bare(torch.randn(1, 3, 8)).shape == (1, 3, 8)


def test_options_reach_the_mixers_that_have_them() -> None:
    net: Any = Backbone(mixer=HYBRID, options={"conv": 4, "window": 8, "gla": {"gate": "none"}})
    assert net.blocks[0].mixer.row.conv == 4
    assert net.blocks[0].mixer.row.gate == "none"
    assert net.blocks[1].mixer.window == 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixer": "nope"}, r"backbone\.mixer = 'nope': choose one of attention, linear_attention"),
        ({"mixer": ["gla", "nope"]}, r"backbone\.mixer = 'nope': choose one of"),
        ({"mixer": []}, "name at least one mixer"),
        ({"options": {"foo": 1}}, "mixer 'gla' has no option 'foo'; it accepts conv, conv_bias"),
        ({"mixer": "lstm", "options": {"foo": 1}}, "mixer 'lstm' has no option 'foo'; it accepts none"),
        ({"options": {"gla": {"foo": 1}}}, "mixer 'gla' has no option 'foo'"),
        ({"options": {"gate": "foo"}}, "gate = 'foo': choose one of none, swish, sigmoid"),
        ({"options": {"rotary": True}}, "rotary=True needs one decay a head"),
        ({"mixer": "mamba2", "options": {"normaliser": "sum"}}, "skip=True and normaliser='sum' exclude"),
        ({"options": {"conv": 1}}, "conv=1 must be 0"),
        ({"mixer": "deltanet", "options": {"eigenvalue_range": [0, 2]}}, r"must be \(0, 1\) or \(-1, 1\)"),
        ({"mixer": "attention", "options": {"window": 0}}, "window=0 must be at least 1"),
        ({"mixer": "attention", "options": {"kv_heads": 3}}, "kv_heads=3 must divide heads=4"),
        ({"mixer": "attention", "dim": 12}, "even head size, got 3"),
        ({"mixer": "lru", "options": {"r_min": 2.0}}, "must satisfy 0 <= r_min < r_max <= 1"),
        ({"dim": 10}, r"backbone\.heads = 4 must divide backbone\.dim = 10"),
        ({"depth": 0}, r"backbone\.depth = 0 must be at least 1"),
        ({"dropout": 1.0}, r"backbone\.dropout = 1.0 must be at least 0 and below 1"),
        ({"channel_mixer": "mlp"}, r"backbone\.channel_mixer = 'mlp': choose one of swiglu, none"),
        ({"hidden": 0}, r"backbone\.hidden = 0 must be at least 1"),
        ({"backend": "nope"}, "backend='nope' is unknown: choose one of auto"),
        ({"mixer": "ttt", "backend": "triton"}, "mixer 'ttt' has no such kernel; choose auto"),
    ],
)
def test_bad_configurations_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Backbone(**fields)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net, x: net(x[0]), r"x must be \(B, T, 8\), got \(5, 8\)"),
        (lambda net, x: net(x[..., :4]), r"x must be \(B, T, 8\), got \(2, 5, 4\)"),
        (lambda net, x: net(x, lengths=torch.tensor([6, 1])), "lengths must lie between 0 and T=5"),
        (lambda net, x: net(x, cu_seqlens=torch.tensor([0, 10])), "with cu_seqlens the batch must be 1"),
        (lambda net, x: net(x[:1], cu_seqlens=torch.tensor([0, 4])), "must rise from 0 to T=5"),
        (lambda net, x: net(x, cu_seqlens=torch.tensor([0, 5]), lengths=torch.tensor([5, 5])), "not both"),
        (lambda net, x: net(x, state=net.init_state(2)[:1]), "state is of 1 blocks, and this backbone has 2"),
        (lambda net, x: net.step(x, net.init_state(2)), r"x must be \(B, 8\), got \(2, 5, 8\)"),
    ],
)
def test_bad_calls_are_refused(call: Callable[[Backbone, Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(Backbone(dim=8, heads=2), torch.randn(2, 5, 8))


@pytest.mark.parametrize("mixer", ["gla", "attention"])
def test_a_bidirectional_backbone_has_no_state(mixer: Any) -> None:
    net = Backbone(dim=8, heads=2, mixer=mixer, bidirectional=True)
    x = torch.randn(2, 5, 8)
    calls: list[Callable[[], Any]] = [
        lambda: net(x, return_state=True),
        lambda: net.init_state(2),
        lambda: net.step(x[:, 0], []),
        net.state_bytes,
    ]
    for call in calls:
        with pytest.raises(ValueError, match="a bidirectional backbone has no state"):
            call()


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_nothing_in_nothing_out(shape: tuple[int, int, int], mixer_name: Any) -> None:
    y, state = Backbone(dim=8, heads=2, mixer=mixer_name)(torch.zeros(shape), return_state=True)
    assert y.shape == shape
    assert all(t.shape[0] == shape[0] for block in state for t in block.values())
