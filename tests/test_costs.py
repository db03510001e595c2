"""Exact arithmetic of parameters, FLOPs and bytes; tapered equals uniform."""

import dataclasses
import itertools
import pathlib
from typing import Any

import pytest

from tlm_jax import config_io, costs
from tlm_jax.config import AttentionConfig, ModelConfig, TaperConfig

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
SIZES = ("tiny", "tlm_440m", "tlm_760m", "tlm_1_3b")


def _model(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "vocab_size": 100,
        "num_layers": 3,
        "d_model": 8,
        "mlp_width": 32,
        "mixer": AttentionConfig(num_heads=2),
    }
    return ModelConfig(**(values | changes))


@pytest.mark.parametrize(
    ("layers", "d_model", "width", "tied", "vocab", "millions"),
    [
        (24, 1024, 2816, True, 32_000, 341),
        (24, 1024, 2816, True, 128_256, 439.7),
        (24, 1024, 4096, True, 32_000, 435.5),
        (24, 1536, 4096, True, 32_000, 728.7),
        (24, 1536, 4096, False, 32_000, 777.9),
        (24, 1536, 6144, True, 32_000, 955),
        (18, 2048, 5632, True, 32_000, 990),
        (18, 2048, 8192, True, 32_000, 1274),
        (18, 2048, 8192, False, 32_000, 1339),
        (24, 2048, 5632, True, 32_000, 1299),
    ],
)
def test_published_shapes(
    layers: int, d_model: int, width: int, tied: bool, vocab: int, millions: float
) -> None:
    model = ModelConfig(
        vocab_size=vocab,
        num_layers=layers,
        d_model=d_model,
        mlp_width=width,
        tie_embeddings=tied,
        mixer=AttentionConfig(num_heads=16),
    )
    digits = 1 if millions != int(millions) else 0
    assert round(costs.model_costs(model, 4096).parameters / 1e6, digits) == millions


def test_every_term_by_hand() -> None:
    # D=8, H=2, K=4, widths 48, 32, 16, V=100, L=5.
    result = costs.model_costs(_model(), seq_len=5)
    assert [layer.mlp_width for layer in result.layers] == [48, 32, 16]
    first = result.layers[0]
    assert first.mixer.parameters == 4 * 8 * 8
    assert first.mlp_parameters == 3 * 8 * 48
    assert first.norm_parameters == 16
    assert result.embedding_parameters == 800
    assert result.head_parameters == 0
    assert result.norm_parameters == 3 * 16 + 8
    assert result.parameters == 800 + 3 * 256 + 3 * 8 * 96 + 56
    assert result.non_embedding_parameters == result.parameters - 800
    # Projections 2*256, attention 4*8 a key: 5 keys, or (5+1)/2 on average; MLP 2*3*8*48.
    assert first.forward_flops_full == 512 + 160 + 2304
    assert first.forward_flops == 512 + 96 + 2304
    assert result.forward_flops == 3 * (512 + 96) + 2 * 3 * 8 * 96 + 1600
    assert result.training_flops == 3 * result.forward_flops
    assert result.training_flops_full == 3 * result.forward_flops_full
    assert result.kv_cache_bytes == 3 * 2 * 8 * 2


def test_causal_attention_is_the_mean_over_positions() -> None:
    L, queries = 7, 8
    seen = sum(4 * queries * keys for keys in range(1, L + 1))
    assert costs.mixer_costs(AttentionConfig(num_heads=2), 8, L).mixing_flops * L == seen


@pytest.mark.parametrize("window", [1, 3, 7, 100])
def test_a_window_is_the_mean_over_positions(window: int) -> None:
    """To half a key per token; a kernel computes a whole window at most."""
    L, queries = 64, 8
    mixer = AttentionConfig(num_heads=2, window=window)
    seen = sum(4 * queries * min(keys, window) for keys in range(1, L + 1))
    result = costs.mixer_costs(mixer, 8, L)
    assert abs(result.mixing_flops - seen / L) <= queries
    assert result.mixing_flops_full == 4 * queries * min(window, L)


def test_biases_cost_parameters_alone() -> None:
    plain, qkv, everything = (
        costs.mixer_costs(AttentionConfig(num_heads=4, num_kv_heads=2, bias=bias), 8, 1)
        for bias in ("none", "qkv", "all")
    )
    assert qkv.parameters - plain.parameters == 8 + 2 * 4
    assert everything.parameters - qkv.parameters == 8
    assert plain.projection_flops == everything.projection_flops


def test_untied_head_and_grouped_queries() -> None:
    mixer = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, qk_norm=True)
    result = costs.model_costs(_model(mixer=mixer, tie_embeddings=False), seq_len=1)
    assert result.head_parameters == result.embedding_parameters == 800
    assert result.head_flops == 1600
    # q 8x24, k and v 8x12, o 24x8, two scales of 6.
    assert result.layers[0].mixer.parameters == 192 + 2 * 96 + 192 + 12
    assert result.layers[0].mixer.projection_flops == 2 * (192 + 2 * 96 + 192)
    assert result.layers[0].mixer.cache_values == 24


def test_recomputation() -> None:
    none, dots, full = (
        costs.model_costs(_model(remat=remat), seq_len=64) for remat in ("none", "dots", "full")
    )
    assert none.recompute_flops == 0
    assert dots.recompute_flops == 3 * 4 * 8 * 64
    assert full.recompute_flops == full.forward_flops_full - full.head_flops
    assert full.hardware_flops == full.training_flops_full + full.recompute_flops


TAPERS = [
    *(
        TaperConfig(schedule=schedule, start=start, end=2 - start, num_segments=stairs)
        for schedule, start, stairs in itertools.product(
            ("linear", "cosine", "sigmoid"), (0.5, 1.0, 1.25, 1.5, 1.75), (None, 4)
        )
    ),
    *(TaperConfig(schedule="groups", heavy=heavy) for heavy in ("early", "middle", "late")),
    TaperConfig(schedule="uniform"),
    TaperConfig(multiple_of=128),
]


@pytest.mark.parametrize("size", SIZES)
def test_every_taper_equals_its_uniform_twin(size: str) -> None:
    run = config_io.load_config(CONFIGS / f"{size}.py")
    seen = set()
    for taper in TAPERS:
        model = dataclasses.replace(run.model, taper=taper)
        costs.assert_matched(model, run.data.seq_len)
        assert costs.twin_difference(model, run.data.seq_len) == {}
        seen.add(model.mlp_widths)
    assert len(seen) > 20


def test_a_mismatch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    monkeypatch.setattr(ModelConfig, "uniform_twin", lambda self: _model(mlp_width=48))
    with pytest.raises(
        ValueError, match=r"not comparable: parameters -1,152, forward_flops -2,304"
    ):
        costs.assert_matched(model)


@pytest.mark.parametrize(
    ("size", "low", "high"),
    [("tlm_440m", 435e6, 436e6), ("tlm_760m", 728e6, 729e6), ("tlm_1_3b", 1.27e9, 1.28e9)],
)
def test_configs_have_the_advertised_size(size: str, low: float, high: float) -> None:
    run = config_io.load_config(CONFIGS / f"{size}.py")
    assert low < costs.model_costs(run.model, run.data.seq_len).parameters < high
    assert run.data.seq_len * run.data.batch_size == 2**19


@pytest.mark.parametrize("size", SIZES)
def test_configs_can_be_turned_uniform(size: str) -> None:
    run = config_io.load_config(CONFIGS / f"{size}.py")
    taper = dataclasses.replace(run.model.taper, schedule="uniform")
    model = dataclasses.replace(run.model, taper=taper)
    assert set(model.mlp_widths) == {model.mlp_width}
    assert len(set(run.model.mlp_widths)) > 4


def test_another_mixer_registers_its_costs() -> None:
    @dataclasses.dataclass(frozen=True)
    class Other:
        pass

    with pytest.raises(TypeError, match="Other"):
        costs.mixer_costs(Other(), 8, 4)
    known = costs.mixer_costs(AttentionConfig(num_heads=2), 8, 4)
    costs.mixer_costs.register(Other, lambda mixer, d_model, seq_len: known)
    assert costs.mixer_costs(Other(), 8, 4) == known


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
    ],
)
def test_peak_flops(kind: str, tera: float) -> None:
    assert costs.peak_flops(kind, "bfloat16") == tera * 1e12


def test_unknown_peaks_are_none() -> None:
    assert costs.peak_flops("cpu") is None
    assert costs.peak_flops("TPU v4", "float32") is None
