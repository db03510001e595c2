"""What a run will be, before any device is touched: widths, parameters, FLOPs, memory, tokens."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tlm_jax import costs as costs_lib
from tlm_jax import output, shapes
from tlm_jax.config import LayerSpec, ModelConfig, RunConfig
from tlm_jax.segments import Segment

if TYPE_CHECKING:
    from tlm_jax.training.memory import StepMemory

_MAX_ROWS = 32
_BAR_CELLS = 14
_WIDE = 92
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def plan(
    config: RunConfig,
    console: Console | None = None,
    *,
    devices: int | None = None,
    target: str = "tpu",
    limit: int | None = None,
    max_rows: int = _MAX_ROWS,
) -> None:
    """Prints the plan of a run. Traces layers for their memory, and touches no device.

    Args:
      config: the run.
      console: where to; None is a terminal's standard output.
      devices: that share a step; None is the smallest number that the config's mesh allows.
      target: cpu or tpu, for which memory is estimated.
      limit: bytes that a program may use on a device, shown beside the total.
      max_rows: segments shown; the middle of a longer list is left out.

    Raises:
      UserError: the mesh does not fit the devices.
    """
    from tlm_jax.training.memory import step_memory

    console = console or output.console()
    costs = costs_lib.model_costs(config.model, config.data.seq_len)
    devices = devices or math.prod(max(size, 1) for size in config.mesh.sizes.values())
    memory = step_memory(config, devices=devices, target=target)
    console.print(
        Group(
            Text.assemble((config.name, "bold"), "  ", _shape(config.model)),
            _segment_table(config.model, costs, memory, max_rows, console.width),
            Panel(_twin_table(config.model, costs), title="Against the uniform twin", expand=False),
            Panel(
                _pairs(_memory_rows(config, memory, target, limit)),
                title="Memory of one training step, "
                + ("if one device held it all" if devices == 1 else f"each of {devices:,} devices"),
                expand=False,
            ),
            Panel(_pairs(_training_rows(config, costs)), title="Training", expand=False),
        )
    )


def summary_lines(config: RunConfig) -> list[str]:
    """The plan in a few plain lines, for the start of a training log."""
    model, data = config.model, config.data
    costs = costs_lib.model_costs(model, data.seq_len)
    widths = model.mlp_widths
    count = len(model.segments)
    tokens = data.batch_size * data.seq_len
    difference = costs_lib.twin_difference(model, data.seq_len)
    if model.taper.schedule == "uniform":
        twin = "uniform: every layer has the same width"
    elif difference:
        twin = "NOT comparable with its uniform twin: " + ", ".join(
            f"{name} {value:+,}" for name, value in difference.items()
        )
    else:
        twin = "parameters and FLOPs exactly equal to its uniform twin's"
    return [
        f"model    {_shape(model)}",
        f"         {costs.parameters:,} parameters, {costs.non_embedding_parameters:,} without "
        "embeddings",
        f"taper    {_schedule(model)}: MLP width {widths[0]:,} -> {widths[-1]:,} "
        f"(mean {model.mlp_width:,}) in {_count(count, 'segment')}",
        f"         {twin}",
        f"compute  {engineering(costs.training_flops)}FLOPs per token in training "
        f"(forward {engineering(costs.forward_flops)}FLOPs, causal)",
        f"tokens   {tokens:,} per step x {config.training.num_steps:,} steps = "
        f"{short_count(tokens * config.training.num_steps)} tokens",
    ]


def _shape(model: ModelConfig) -> str:
    head = "tied" if model.tie_embeddings else "untied"
    return (
        f"{_count(model.num_layers, 'layer')}, d_model {model.d_model:,}, "
        f"{model.mixer.describe(model.d_model)}, "
        f"vocabulary {model.vocab_size:,} ({head})"
    )


def _schedule(model: ModelConfig) -> str:
    taper = model.taper
    if taper.schedule in ("uniform", "explicit", *shapes.SHAPES):
        return taper.schedule
    if taper.schedule == "groups":
        return f"groups, {taper.heavy} third {taper.start:g}x"
    return f"{taper.schedule} {taper.start:g} -> {taper.end:g}"


def _segment_table(
    model: ModelConfig,
    costs: costs_lib.ModelCosts,
    memory: "StepMemory",
    max_rows: int,
    width: int,
) -> Table:
    """One row per segment, with the totals below; bars only where `width` columns allow."""
    widths = model.mlp_widths
    stairs = model.segments
    sizes = [mixer.sizes() for mixer in model.mixers]
    names = dict.fromkeys(name for size in sizes for name in size)
    tapered = [name for name in names if len({size[name] for size in sizes if name in size}) > 1]
    bars = width >= _WIDE
    table = Table(
        box=box.SIMPLE_HEAD,
        show_footer=True,
        pad_edge=False,
        title=f"MLP widths: {_schedule(model)}, {_count(len(stairs), 'segment')} "
        f"in {_count(len(widths), 'layer')}",
        title_justify="left",
        caption="FLOPs: causal forward pass of one token. Kept: activations for the backward "
        f"pass, remat={model.remat} (estimate).",
        caption_justify="left",
    )
    layer_flops = sum(layer.forward_flops for layer in costs.layers)
    layer_parameters = sum(layer.parameters for layer in costs.layers)
    table.add_column("layers", "all layers", justify="right", no_wrap=True)
    table.add_column("width", f"{sum(widths):,}", justify="right", no_wrap=True)
    table.add_column("ratio", "1.000", justify="right", no_wrap=True)
    if bars:
        table.add_column("", no_wrap=True, min_width=_BAR_CELLS)
    for name in tapered:
        table.add_column(
            name, str(sum(s.get(name, 0) for s in sizes)), justify="right", no_wrap=True
        )
    table.add_column("parameters", f"{layer_parameters:,}", justify="right", no_wrap=True)
    table.add_column("FLOPs/token", f"{layer_flops:,}", justify="right", no_wrap=True)
    table.add_column("kept/token", _kept(memory, 0, len(widths)), justify="right", no_wrap=True)
    for segment in _abridge(stairs, max_rows):
        if isinstance(segment, int):
            table.add_row(f"{segment} more", style="dim")
            continue
        here = slice(segment.start, segment.stop)
        layers, last = costs.layers[here], segment.stop - 1
        mean = statistics.mean(layer.mlp_width for layer in layers)
        table.add_row(
            f"{segment.start}" if segment.length == 1 else f"{segment.start}-{last}",
            _each(layer.mlp_width for layer in layers),
            f"{mean / model.mlp_width:.3f}",
            *([Text(_bar(mean / max(widths)), style="cyan")] if bars else []),
            *(_each(size.get(name, 0) for size in sizes[here]) for name in tapered),
            f"{sum(layer.parameters for layer in layers):,}",
            f"{sum(layer.forward_flops for layer in layers):,}",
            _kept(memory, segment.start, segment.stop),
        )
    return table


def _each(values: Iterable[int]) -> str:
    """The values that differ, in order, such as `1,024` or `16/8`."""
    return "/".join(f"{value:,}" for value in dict.fromkeys(values))


def _kept(memory: "StepMemory", start: int, stop: int) -> str:
    """What layers keep of each token for the backward pass."""
    return byte_size(round(sum(memory.kept_by_layer[start:stop]) / memory.tokens))


def _abridge(stairs: Sequence[Segment[LayerSpec]], max_rows: int) -> list[Segment[LayerSpec] | int]:
    """All segments, or the first and last of them and the number left out between them."""
    if len(stairs) <= max_rows:
        return list(stairs)
    top = max(max_rows // 2, 1)
    bottom = max(max_rows - top - 1, 1)
    return [*stairs[:top], len(stairs) - top - bottom, *stairs[-bottom:]]


def _twin_table(model: ModelConfig, costs: costs_lib.ModelCosts) -> Table:
    twin = costs_lib.model_costs(model.uniform_twin(), costs.seq_len)
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for name in ("", "this model", "uniform twin", "difference"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    rows = {
        "parameters": "parameters",
        "  without embeddings": "non_embedding_parameters",
        "  MLPs": "mlp_parameters",
        "forward FLOPs/token": "forward_flops",
        "training FLOPs/token": "training_flops",
        "hardware FLOPs/token": "hardware_flops",
    }
    for label, name in rows.items():
        ours, theirs = getattr(costs, name), getattr(twin, name)
        verdict = Text("equal", "green") if ours == theirs else Text(f"{ours - theirs:+,}", "red")
        table.add_row(label, f"{ours:,}", f"{theirs:,}", verdict)
    return table


def _memory_rows(
    config: RunConfig, memory: "StepMemory", target: str, limit: int | None
) -> list[tuple[str, str, str]]:
    from tlm_jax.training.memory import MEASURED

    parts, remat = config.training.grad_accumulation, config.model.remat
    configs, error = MEASURED[target]
    total = f"estimates included, off by up to {error}% in {configs} configs compiled for {target}"
    rows = [
        ("parameters", memory.parameters, "exact, float32"),
        ("optimizer", memory.optimizer, "exact, moments in float32"),
        ("batch", memory.batch, "exact"),
        ("gradients", memory.gradients, "float32" + ", and their sum over parts" * (parts > 1)),
        ("weights", memory.weights, "copies in the compute dtype (estimate)"),
        ("kept by layers", memory.kept, f"{memory.tokens:,} tokens, remat={remat} (estimate)"),
        ("working set", memory.work, f"peak during {memory.moment} (estimate)"),
        ("gaps", memory.gaps, "between arrays (estimate)"),
        ("program", memory.code, "its code (estimate)"),
        ("total", memory.total, total),
    ]
    if limit is not None:
        verdict = "fits" if memory.total <= limit else "does not fit: see docs/training.md, Memory"
        rows.append(("limit", limit, verdict + ", by this estimate; tlm compile asks the compiler"))
    return [(label, byte_size(size), note) for label, size, note in rows if size]


def _training_rows(config: RunConfig, costs: costs_lib.ModelCosts) -> list[tuple[str, str, str]]:
    data, steps = config.data, config.training.num_steps
    tokens = data.batch_size * data.seq_len
    total = tokens * steps
    per_parameter = total / costs.parameters
    return [
        ("tokens per step", f"{tokens:,}", f"{data.batch_size} sequences of {data.seq_len:,}"),
        ("steps", f"{steps:,}", f"{config.optimizer.warmup_steps:,} of them warm-up"),
        ("tokens", short_count(total), f"{per_parameter:.3g} per parameter"),
        (
            "training FLOPs",
            f"{costs.training_flops * total:.3e}",
            f"causal; {costs.training_flops_full * total:.3e} with all pairs of tokens",
        ),
        (
            "hardware FLOPs",
            f"{costs.hardware_flops * total:.3e}",
            f"all pairs of tokens, and what remat={config.model.remat} recomputes",
        ),
        ("KV cache", byte_size(costs.kv_cache_bytes), "per token, when decoding"),
        ("decoder state", byte_size(costs.state_bytes), "per sequence of any length"),
    ]


def _pairs(rows: Sequence[tuple[str, str, str]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    for label, value, note in rows:
        table.add_row(label, value, note, style="bold" if label == "total" else "")
    return table


def _bar(share: float) -> str:
    """A horizontal bar in eighths of a cell."""
    eighths = round(share * _BAR_CELLS * 8)
    return _EIGHTHS[8] * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def engineering(value: float) -> str:
    """A number with a prefix and a space, ready for its unit: 2.61e9 is "2.61 G"."""
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.4g} {prefix}"
    return f"{value:.4g} "


def short_count(value: float) -> str:
    """A count as papers write it: 30_000_000_000 is "30.0B"."""
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= scale:
            return f"{value / scale:#.3g}".rstrip(".") + letter
    return f"{value:g}"


def byte_size(count: int) -> str:
    """Bytes in binary units: 1536 is "1.50 KiB"."""
    if count < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        value /= 1024
        if value < 999.5 or unit == "PiB":
            break
    return f"{value:.3g} {unit}" if value >= 100 else f"{value:.2f} {unit}"
