"""Records of one sweep from several machines, in one file."""

import pathlib
from collections.abc import Sequence

from tlm_jax import config_io, files
from tlm_jax.analysis.sweep_report import Record, read
from tlm_jax.config import UserError

_BY_SEED = {"name", "seed", "data.seed"}
"""Fields in which the configs of an arm differ from seed to seed."""


def merge(target: pathlib.Path, sources: Sequence[pathlib.Path]) -> tuple[int, int]:
    """Adds the records of other files to a file, which is created if missing.

    An arm has one record per seed: machines that share a sweep run different seeds.

    Args:
      target: JSON lines.
      sources: JSON lines, or folders of sweeps.

    Returns:
      Records in `target`, and how many of them are new.

    Raises:
      UserError: a file cannot be read or is damaged; records are of different sweeps; an arm has
        two configs, or two results with one seed. Nothing is written then.
    """
    files.refuse_foreign(target, '{"sweep": "')
    old = read(target) if target.exists() else []
    origins = [(record, target) for record in old]
    origins += [(record, source) for source in sources for record in read(source)]
    merged: dict[tuple[str, int], tuple[Record, pathlib.Path]] = {}
    arms: dict[str, tuple[Record, pathlib.Path]] = {}
    first, where = origins[0]
    for record, source in origins:
        if record["sweep"] != first["sweep"]:
            raise UserError(
                f"{source} is of sweep {record['sweep']!r}, but {where} is of "
                f"{first['sweep']!r}; merge each sweep into its own file"
            )
        arm, seed = record["arm"], record["seed"]
        known, origin = arms.setdefault(arm, (record, source))
        if lines := _differences(known, record):
            raise UserError(
                f"arm {arm!r} differs between {origin} and {source}: {'; '.join(lines)}"
            )
        before, origin = merged.setdefault((arm, seed), (record, source))
        if before != record:
            raise UserError(
                f"arm {arm!r} has two results with seed {seed}, in {origin} and {source}; "
                "run different seeds (tlm sweep --seeds)"
            )
    found = [record for record, _ in merged.values()]
    found.sort(key=lambda r: (r["seed"], r["order"]))
    files.write_lines(target, found)
    return len(found), len(found) - len(old)


def _differences(one: Record, other: Record) -> list[str]:
    """What keeps two records from being seeds of one arm, one line each."""
    lines = [
        f"{what}: {one[what]!r} -> {other[what]!r}"
        for what in ("baseline", "budget")
        if one[what] != other[what]
    ]
    configs = (config_io.from_dict(record["config"]) for record in (one, other))
    return lines + [d for d in config_io.differences(*configs) if d.split(":")[0] not in _BY_SEED]
