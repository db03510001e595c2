"""The list of layers that a model is made from, and the recipes that make it."""

import dataclasses

import pytest

from tlm_jax import config_io, costs
from tlm_jax.config import ModelConfig, RunConfig, TaperConfig, UserError
from tlm_jax.mixers import AttentionConfig, InterleavedConfig, ListedConfig, TitansConfig

ATTENTION = AttentionConfig(num_heads=4)
TITANS = TitansConfig(num_heads=4, memory_width=64)
UNIFORM = TaperConfig(schedule="uniform")


def test_written_out_turns_are_the_same_layers() -> None:
    turns = InterleavedConfig(mixers=(ATTENTION, ATTENTION, TITANS))
    model = ModelConfig(num_layers=6, mixer=turns, taper=UNIFORM)
    written = dataclasses.replace(model, mixer=ListedConfig(mixers=turns.mixers * 2))
    assert written.layers == model.layers
    assert written.segments == model.segments
    assert len(written.segments) == 1


def test_mixers_and_widths_written_out() -> None:
    widths = (832, 832, 704, 448)
    model = ModelConfig(
        num_layers=4,
        mixer=ListedConfig(mixers=(ATTENTION, ATTENTION, TITANS, AttentionConfig(num_heads=2))),
        taper=TaperConfig(schedule="explicit", widths=widths),
    )
    assert model.mlp_widths == widths
    assert [type(mixer) for mixer in model.mixers[1:3]] == [AttentionConfig, TitansConfig]
    assert [segment.length for segment in model.segments] == [2, 1, 1]
    twin = model.uniform_twin()
    assert len(set(twin.mlp_widths)) == 1
    ours, theirs = (costs.model_costs(m, 256) for m in (model, twin))
    assert (ours.parameters, ours.forward_flops) == (theirs.parameters, theirs.forward_flops)
    run = RunConfig(model=model)
    assert config_io.from_dict(config_io.to_dict(run)) == run


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        (ListedConfig(mixers=(ATTENTION,) * 3), "num_layers=4, but the mixers of 3 layers"),
        (
            ListedConfig(mixers=(AttentionConfig(heads_taper=TaperConfig()),) * 4),
            "mixer.heads_taper: ",
        ),
    ],
)
def test_lists_that_do_not_fit(mixer: ListedConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(num_layers=4, mixer=mixer)


@pytest.mark.parametrize("kind", [InterleavedConfig, ListedConfig])
def test_lists_in_lists(kind: type) -> None:
    inner = InterleavedConfig(mixers=(ATTENTION, TITANS))
    with pytest.raises((ValueError, UserError), match="cannot hold mixers of several layers"):
        kind(mixers=(ATTENTION, inner))
    with pytest.raises((ValueError, UserError), match="needs mixers"):
        kind(mixers=())
