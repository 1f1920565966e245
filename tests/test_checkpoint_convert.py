"""Converting layouts changes the weights and not the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rxt_model.checkpoint import CheckpointError, convert_experts, convert_rope_layout
from rxt_model.decoder import RxTDecoder
from rxt_model.models import RxTAlpha
from tests.checkpoint_cases import (
    ELEMENTWISE,
    LINEAR,
    MODELS,
    MOE,
    PER_EXPERT,
    SPLIT,
    decoder,
    encoder,
    full,
    memory_attention,
    outputs,
    randomise,
)

LOCAL = {"moe_bias_mode": "local", "moe_shared_experts_bias_mode": "local"}


def assert_close(first: Any, second: Any, *, equal: bool = True) -> None:
    left, right = outputs(first), outputs(second)
    for name in left:
        error = ((left[name] - right[name]).norm() / left[name].norm()).item()
        assert (error < 1e-5) == equal, (name, error)


def reloaded(model: Any, state: dict[str, Tensor], **changes: Any) -> Any:
    """The same class with other weights and a changed configuration."""
    other = type(model)({**model.config.to_dict(), **changes})
    other.load_state_dict(state, strict=True)
    return other.eval()


# experts


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shared", [0, 1, 2])
def test_experts_both_ways(shared: int, gated: bool) -> None:
    config = {**PER_EXPERT, **LOCAL, "num_shared_experts": shared, "use_gated": gated}
    model = randomise(decoder(**config))
    stacked = convert_experts(model.state_dict(), to="stacked")
    other = reloaded(model, stacked, use_vectorized_moe=True)
    assert_close(model, other)
    back = convert_experts(other.state_dict(), to="per-expert")
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())
    assert all(tensor.is_contiguous() for tensor in (*stacked.values(), *back.values()))


def test_experts_without_biases_become_experts_with_biases_of_zero() -> None:
    model = randomise(decoder(**MOE, moe_bias_mode="off", num_shared_experts=0))
    state = convert_experts(model.state_dict(), to="per-expert")
    assert not state["model.layers.0.ff.experts.0.fc2.bias"].any()
    assert_close(model, reloaded(model, state, use_vectorized_moe=False))


def test_experts_of_a_full_model_with_stateless_layers() -> None:
    layers = {**PER_EXPERT, **LOCAL, "stateless_layers_config": ("moe",), "final_stateless_layers_config": ("dense",)}
    model = randomise(full(decoder=layers))
    stacked = convert_experts(model.state_dict(), to="stacked")
    other = full(decoder={**layers, "use_vectorized_moe": True})
    other.load_state_dict(stacked, strict=True)
    assert_close(model, other.eval())


def test_converting_what_is_already_so_passes_it_through() -> None:
    state = randomise(decoder(**PER_EXPERT)).state_dict()
    same = convert_experts(state, to="per-expert")
    assert all(same[name] is tensor for name, tensor in state.items())
    stacked = convert_experts(state, to="stacked")
    assert all(convert_experts(stacked, to="stacked")[name] is tensor for name, tensor in stacked.items())


def test_what_the_per_expert_layout_cannot_hold_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"'model\.layers\.0\.ff\.global_bias'.*keep the stacked layout"):
        convert_experts(decoder(**MOE).state_dict(), to="per-expert")
    shared_global = decoder(**MOE, moe_bias_mode="local", num_shared_experts=2, moe_shared_experts_bias_mode="global")
    with pytest.raises(CheckpointError, match="shared_experts_bias"):
        convert_experts(shared_global.state_dict(), to="per-expert")
    for count in (1, 2):
        narrow = decoder(**MOE, **LOCAL, num_shared_experts=count, shared_expert_dim=8)
        with pytest.raises(CheckpointError, match=r"width 8 .* routed width 12"):
            convert_experts(narrow.state_dict(), to="per-expert")


def test_incomplete_experts_are_named() -> None:
    state = dict(decoder(**PER_EXPERT).state_dict())
    for name in [name for name in state if ".experts.1." in name]:
        del state[name]
    with pytest.raises(CheckpointError, match=r"'model\.layers\.0\.ff\.experts\.1': this expert is missing"):
        convert_experts(state, to="stacked")
    state = dict(decoder(**PER_EXPERT).state_dict())
    del state["model.layers.1.ff.experts.2.fc2.bias"]
    with pytest.raises(CheckpointError, match=r"experts\.2': this expert has other tensors"):
        convert_experts(state, to="stacked")
    state = dict(decoder(**PER_EXPERT).state_dict())
    state["model.layers.0.ff.experts.1.fc2.weight"] = torch.zeros(3, 3)
    with pytest.raises(CheckpointError, match=r"shape is \(3, 3\), expert 0 has \(16, 12\)"):
        convert_experts(state, to="stacked")
    stacked = dict(decoder(**MOE, moe_bias_mode="local").state_dict())
    del stacked["model.layers.0.ff.w2"]
    with pytest.raises(CheckpointError, match=r"ff\.w2': this tensor is missing"):
        convert_experts(stacked, to="per-expert")


def test_unknown_target_layouts() -> None:
    with pytest.raises(ValueError, match="'flat'; accepted are 'stacked' and 'per-expert'"):
        convert_experts({}, to="flat")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'half'; accepted are 'split' and 'interleaved'"):
        convert_rope_layout({}, {}, to="half")  # type: ignore[arg-type]


# rotary layout


@pytest.mark.parametrize(
    "make",
    [
        lambda **k: decoder(**k),
        lambda **k: decoder(att_query_groups=4, cross_att_query_groups=1, cross_att_groups=4, **k),
        lambda **k: decoder(embed_dim=32, att_heads=2, **k),
        lambda **k: encoder(skip_memory_cross_attention=False, **k),
        lambda **k: memory_attention(**LINEAR, **k),
        lambda **k: memory_attention(variant="self", att_query_groups=4, **k),
    ],
)
@pytest.mark.parametrize(("source", "target"), [("split", "interleaved"), ("interleaved", "split")])
def test_rotary_layout_of_components(make: Any, source: str, target: str) -> None:
    model = randomise(make(rope_layout=source))
    state = convert_rope_layout(model.state_dict(), model.config, to=target)  # type: ignore[arg-type]
    assert_close(model, reloaded(model, state, rope_layout=target))
    assert_close(model, reloaded(model, dict(model.state_dict()), rope_layout=target), equal=False)
    back = convert_rope_layout(state, {**model.config.to_dict(), "rope_layout": target}, to=source)  # type: ignore[arg-type]
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("source", "target"), [("split", "interleaved"), ("interleaved", "split")])
def test_rotary_layout_of_a_full_model_while_saving(source: str, target: str, tmp_path: Path) -> None:
    model = randomise(
        full(
            decoder=PER_EXPERT, encoder={"skip_memory_cross_attention": False}, memory=ELEMENTWISE,
            common={"rope_layout": source},
        )
    )  # fmt: skip
    model.save_pretrained(tmp_path, rope_layout=target)  # type: ignore[call-arg]
    loaded = RxTAlpha.from_pretrained(tmp_path)
    assert loaded.decoder.config.rope_layout == loaded.memory_attention.config.rope_layout == target
    assert_close(model, loaded)
    assert model.decoder.config.rope_layout == source, "the model itself stays as it was"  # type: ignore[union-attr]


def test_the_wrong_layout_is_wrong(tmp_path: Path) -> None:
    model = randomise(decoder(**SPLIT))
    model.save_pretrained(tmp_path)
    assert_close(model, RxTDecoder.from_pretrained(tmp_path))
    assert_close(model, RxTDecoder.from_pretrained(tmp_path, rope_layout="interleaved"), equal=False)


def test_without_positions_there_is_nothing_to_convert() -> None:
    model = decoder(use_nope=True, **SPLIT)
    state = convert_rope_layout(model.state_dict(), model.config, to="interleaved")
    assert all(state[name].data_ptr() == tensor.data_ptr() for name, tensor in model.state_dict().items())


def test_second_attentions_and_self_attention_are_left_alone() -> None:
    model = MODELS["alpha-split-per-expert"]()
    state = convert_rope_layout(model.state_dict(), model._config(), to="interleaved")
    changed = {name for name, tensor in model.state_dict().items() if state[name].data_ptr() != tensor.data_ptr()}
    assert changed == {
        f"{name}.weight"
        for i in range(2)
        for name in (
            f"decoder.model.layers.{i}.memory_cross_attention.k_proj",
            f"memory_attention.model.attention_layers.{i}.q_proj",
        )
    }


def test_configurations_that_do_not_fit() -> None:
    state = decoder().state_dict()
    with pytest.raises(ValueError, match="rope_layout of the configuration is None"):
        convert_rope_layout(state, {"embed_dim": 16, "att_heads": 4}, to="split")
    with pytest.raises(ValueError, match=r"memory_cross_attention.*does not hold heads of 16"):
        convert_rope_layout(state, {"embed_dim": 16, "att_heads": 1, "rope_layout": "split"}, to="interleaved")
    with pytest.raises(TypeError, match="config is a int"):
        convert_rope_layout(state, 3, to="split")
