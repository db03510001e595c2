"""`tlm plan --scale`: formulas against hand counts, and against what the TPU compiler said."""

import pytest
from helpers import ROOT, Fails

from benchmarks import scale as cells
from tlm_jax import cli
from tlm_jax.analysis import scale

COMPILED = sorted(cells.known())


def test_the_numbers_of_a_slice() -> None:
    """440M on 256 chips of v5e: 128 rows over fsdp, two chips for each."""
    found = cells.cell("440m", "v5e:16x16")
    P, D, V, L, layers = 435_471_360, 1024, 32_000, 4096, 24
    matrices = P - V * D - (2 * layers + 1) * D
    stream = L * D * 2
    chunks = L // 128
    share = 127 / 128 / 2
    assert found.config.mesh.sizes == {"data": 1, "fsdp": 128, "sequence": 1, "tensor": 2}
    fsdp = share * (3 * 2 * matrices + chunks * (2 + 4) * V * D) + 2 * stream
    tensor = (5 * layers + 2) * stream
    assert found.communication() == {"fsdp": pytest.approx(fsdp), "tensor": tensor}
    assert found.hosts == 64
    assert found.checkpoint() == 12 * P
    assert found.compute_seconds() == pytest.approx(
        found.costs.hardware_flops * 128 * L / 256 / 197e12
    )
    assert found.communication_seconds() == pytest.approx((fsdp + 2 * tensor) / 180e9)
    assert found.seconds() == max(found.compute_seconds(), found.communication_seconds())
    assert found.reading_rate() == pytest.approx(2 * 128 * L / found.seconds())
    assert found.save_seconds() == pytest.approx(12 * P / 64 / 0.49e9)
    assert found.loss_of_a_host() == pytest.approx(60 + 12 * P / 64 / 0.6e9 + 500 * found.seconds())


def test_more_chips_than_rows() -> None:
    """The batch grows along `data`, which sums the gradients that a chip holds."""
    found = cells.cell("440m", "v5p:8x16x16")
    assert found.config.mesh.sizes == {"data": 4, "fsdp": 128, "sequence": 1, "tensor": 4}
    assert found.config.data.batch_size == 4 * 128
    assert found.communication()["data"] == 4 * 435_471_360 // 512
    assert found.rows == 1


@pytest.mark.parametrize("cell", COMPILED, ids="@".join)
def test_communication_against_the_compiler(cell: tuple[str, str]) -> None:
    """Within the factors that docs/pods.md states; and no chip repeats another's products."""
    record = cells.known()[cell]
    compiled = sum(size for _, size in record["collectives"].values())
    formula = sum(cells.cell(*cell).communication().values())
    assert 0.65 <= formula / compiled <= 1.05
    assert record["products"] == pytest.approx(record["share"], rel=0.01)


def test_communication_against_earlier_cells() -> None:
    """Other architectures, and batches in parts. Titans' memories have collectives of their own."""
    found = cells.earlier()
    ratios = {cell: formula / compiled for cell, (formula, compiled) in found.items()}
    v5p = [ratio for cell, ratio in ratios.items() if cell[2] == "v5p:4x4x4"]
    v5e = [r for c, r in ratios.items() if c[1] != "titans" and c[2] == "v5e:16x16"]
    assert len(v5p) >= 5
    assert all(0.9 <= ratio <= 1 for ratio in v5p)
    assert len(v5e) >= 3
    assert all(0.6 <= ratio <= 0.7 for ratio in v5e)


def test_memory_against_the_compiler() -> None:
    """The same of memory, for the smallest slice; the table in docs/pods.md has all cells."""
    needed = cells.known()["440m", "v5e:4x4"]["needed"]
    assert cells.cell("440m", "v5e:4x4").memory() == pytest.approx(needed, rel=0.02)


def test_plan_prints_the_slices(
    capsys: pytest.CaptureFixture[str], fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block for each; the slices are its own."""
    monkeypatch.setattr(scale, "SLICES", ("v5e:4x4", "v5p:8x8x16"))
    config = str(ROOT / "configs" / "tiny.py")
    assert cli.main(["plan", "--config", config, "--scale", "--data.batch_size", "64"]) == 0
    out = capsys.readouterr().out
    assert "tiny on v5e:4x4\n  chips                    16\n" in out
    assert "tiny on v5p:8x8x16\n  chips                    1,024\n" in out
    assert "leave out --topology" in fails("plan", "--config", config, "--scale", "--devices", "2")
