"""Every field of every config refuses what it cannot be, or the list below says that it may."""

import dataclasses
import math
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest
from helpers import Fails

from tlm_jax import config_io
from tlm_jax.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from tlm_jax.distributed.start import ProcessesConfig
from tlm_jax.mixers import AttentionConfig, InterleavedConfig, ListedConfig, MixerConfig
from tlm_jax.models.sampling import SamplingConfig
from tlm_jax.taper_config import TaperConfig
from tlm_jax.validation import Checked, Range, UserError, divisors

NONSENSE = (math.nan, math.inf, -math.inf, -1, 10**30, 1e30)
FINE = {
    ("OptimizerConfig", "clip_norm", 1e30): "clips nothing",
    ("MuonConfig", "clip_norm", 1e30): "clips nothing",
    ("AdafactorConfig", "clip_norm", 1e30): "clips nothing",
    ("TrainingConfig", "sample_temperature", 1e30): "draws any token",
    ("SamplingConfig", "temperature", 1e30): "draws any token",
    ("TrainingConfig", "skip_spikes", 1e30): "skips nothing",
    ("TitansConfig", "max_rate", 1e30): "no bound",
    ("TitansConfig", "gradient_clip", 1e30): "clips nothing",
    ("MeshConfig", "data", -1): "takes what is left",
}
"""Numbers that look like nonsense and may be accepted, and why."""
EXAMPLES = {
    kind: kind(mixers=(AttentionConfig(), AttentionConfig(num_heads=2)))
    for kind in (InterleavedConfig, ListedConfig)
}
"""Of configs that have no default."""


def _configs(cls: type = Checked) -> Iterator[type]:
    for below in cls.__subclasses__():
        if below.__module__.startswith("tlm_jax."):
            yield from (below, *_configs(below))


CONFIGS = sorted(
    {cls for cls in _configs() if not cls.__name__.startswith("_")}, key=lambda cls: cls.__name__
)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The types that a field may have, without ranges."""
    if typing.get_origin(hint) is Annotated:
        return (typing.get_args(hint)[0],)
    found = typing.get_args(hint)
    if found and typing.get_origin(hint) not in (Literal, tuple):
        return tuple(each for one in found for each in _alternatives(one))
    return (hint,)


def _fields() -> Iterator[tuple[type, str, tuple[Any, ...]]]:
    for cls in CONFIGS:
        hints = typing.get_type_hints(cls, include_extras=True)
        for field in dataclasses.fields(cls):
            yield cls, field.name, _alternatives(hints[field.name])


def _takes(cls: Any, name: str, value: Any) -> bool:
    """Whether a field accepts a value; if not, the complaint names the field, in a line."""
    try:
        dataclasses.replace(EXAMPLES.get(cls) or cls(), **{name: value})
    except ValueError as error:
        text = str(error)
        return not (name in text and len(text) < 250 and text.isprintable())
    return True


def test_all_configs_are_walked() -> None:
    names = {cls.__name__ for cls in CONFIGS}
    expected = (RunConfig, ModelConfig, TaperConfig, SamplingConfig, ProcessesConfig)
    assert names >= {cls.__name__ for cls in expected}
    assert len([1 for _, _, kinds in _fields() if {int, float} & set(kinds)]) > 60


def test_numbers_that_are_nonsense() -> None:
    """NaN, infinity, -1 and 1e30 are refused by every field with a number, or listed above."""
    accepted = set()
    for cls, name, kinds in _fields():
        for kind in {int, float} & set(kinds):
            values = (value for value in NONSENSE if type(value) is kind or value == -1)
            found = (value for value in values if _takes(cls, name, value))
            accepted |= {(cls.__name__, name, value) for value in found}
    assert accepted - FINE.keys() == set()


def test_values_of_the_wrong_type() -> None:
    """A number in quotes, a truth value, a float for a whole number, None, a list, an object."""
    for cls, name, kinds in _fields():
        exact = {kind for kind in kinds if isinstance(kind, type)}
        for value in ("x", "4", True, 2.5, 4.0, None, [], {}, object(), (object(),), b"x"):
            assert type(value) in exact or not _takes(cls, name, value), (cls, name, value)


@pytest.mark.parametrize(
    ("cls", "changes", "message"),
    [
        (ModelConfig, {"scan_layers": "x"}, "scan_layers is 'x'; it must be True or False, or"),
        (ModelConfig, {"remat": "all"}, "remat is 'all'; it must be one of 'none', 'dots',"),
        (ModelConfig, {"mixer": 3}, "mixer is 3; it must be a MixerConfig"),
        (ModelConfig, {"num_layers": 10**9}, "num_layers is 1000000000; it must be at most 10000"),
        (ModelConfig, {"vocab_size": 10**12}, "vocab_size is 1000000000000; it must be at most 2"),
        (OptimizerConfig, {"beta1": 1.0}, "beta1 is 1.0; it must be below 1"),
        (OptimizerConfig, {"beta2": -0.1}, "beta2 is -0.1; it must not be negative"),
        (OptimizerConfig, {"eps": 0.0}, "eps is 0.0; it must be positive"),
        (OptimizerConfig, {"learning_rate": math.nan}, "learning_rate is nan; it must be a finite"),
        (OptimizerConfig, {"final_learning_rate": 1.0}, "is more than learning_rate=0.0004"),
        (OptimizerConfig, {"weight_decay": 1e4}, "use at most 2500"),
        (TrainingConfig, {"keep_every": 0}, "keep_every is 0; it must be at least 1, or None"),
        (TrainingConfig, {"skip_spikes": 0.5}, "it must be above 1, or 0 to skip none"),
        (DataConfig, {"mixture": (("a", "b"),)}, "mixture[0][1] is 'b'; it must be a number"),
        (DataConfig, {"mixture": (("a",),)}, "mixture[0] is ('a',); it must have 2 entries"),
        (DataConfig, {"mixture": [("a", 1.0)]}, "it must be a tuple"),
        (TaperConfig, {"widths": (64, 0)}, "widths[1] is 0; it must be at least 1"),
        (SamplingConfig, {"top_p": 0.0}, "top_p is 0.0; it must be positive"),
    ],
)
def test_messages(cls: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is compared below)
        cls(**changes)
    assert message in str(caught.value)


def test_json_and_options_are_held_to_the_same(fails: Fails) -> None:
    values = config_io.to_dict(RunConfig())
    values["optimizer"]["beta1"] = "0.9"
    with pytest.raises(UserError, match=r"^optimizer: beta1 is '0.9'; it must be a number$"):
        config_io.from_dict(values)
    options = ("plan", "--config", "configs/tiny.py", "--optimizer.beta1")
    assert fails(*options, "nan").endswith("beta1 is nan; it must be a finite number")


def test_a_mixer_of_ones_own_is_checked() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Own(MixerConfig):
        rate: Annotated[float, Range(above=0, below=1)] = 0.5
        any_of: Any = None
        sizes_of: dict[str, int] = dataclasses.field(default_factory=dict)

    assert Own(rate=0.25, any_of=object()).rate == 0.25
    with pytest.raises(ValueError, match=r"rate is 1\.5; it must be below 1"):
        Own(rate=1.5)
    with pytest.raises(ValueError, match=r"sizes_of is \[\]; it must be a dict"):
        Own(sizes_of=[])  # type: ignore[arg-type]


def test_divisors() -> None:
    for n in (1, 2, 12, 36, 97, 1000):
        assert divisors(n) == str([d for d in range(1, n + 1) if n % d == 0])
    assert divisors(2**16) == (
        "[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, ..., 16384, 32768, 65536]"
    )
