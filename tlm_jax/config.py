"""Run configuration: frozen dataclasses and their validation.

A run is one `RunConfig`. Files under `configs/` define `get_config()`, which
returns one; every field can be overridden on the command line by its dotted
name (`--model.taper.start 1.25`). Fields marked `_may_change()` do not alter
what a run has learned or the order of its data, so a resumed run may change
them; all others must stay as they were when the run began.
"""

import dataclasses
import functools
from typing import Annotated, Any, Literal

from tlm_jax.mixers import AttentionConfig, MixerConfig
from tlm_jax.mixers import RopeScaling as RopeScaling
from tlm_jax.mlp import MLPConfig
from tlm_jax.optimizers import OptimizerConfig as OptimizerConfig
from tlm_jax.segments import Segment, group
from tlm_jax.taper_config import NO_TAPER, TaperConfig
from tlm_jax.validation import (
    Checked,
    Count,
    Fraction,
    NaturalNumber,
    NotNegative,
    Range,
    Seed,
    divisors,
    require,
    round_up,
)
from tlm_jax.validation import UserError as UserError

RUN_AGAIN = 75
"""Exit status of an incomplete run that the same command resumes (EX_TEMPFAIL)."""

MAX_LAYERS = 10_000
"""Deepest model (our choice: ten times the deepest that was published, arXiv 2203.00555)."""
_Epsilon = Annotated[float, Range(above=0, most=1)]


def _may_change(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"may_change": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """The static shape of one layer."""

    mixer: MixerConfig
    """With the sizes of this layer, nothing left to taper."""
    mlp_widths: tuple[int, ...]
    """One per level of the MLP."""

    @property
    def mlp_width(self) -> int:
        """Of all levels together."""
        return sum(self.mlp_widths)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked):
    """A decoder-only language model: pre-norm mixer and SwiGLU MLP."""

    vocab_size: Count = 4096
    """Rows of the embedding table; at least the tokenizer's vocabulary."""
    num_layers: Annotated[int, Range(least=1, most=MAX_LAYERS)] = 8
    """Blocks, each a mixer followed by an MLP."""
    d_model: Count = 256
    """Width of the residual stream."""
    mlp_width: Count = 704
    """Mean MLP width (d_ff), of all levels together; the taper moves it between layers."""
    taper: TaperConfig = dataclasses.field(default_factory=TaperConfig)
    mlp: MLPConfig = dataclasses.field(default_factory=MLPConfig)
    mixer: MixerConfig = dataclasses.field(default_factory=AttentionConfig)
    tie_embeddings: bool = True
    """Use the embedding table as the output head too."""
    norm: str = "rms"
    """Kind of norm in front of mixers, MLPs and the head: rms, or one registered with
    models.registry.register_norm."""
    norm_eps: _Epsilon = 1e-6
    """Added to the mean square in RMSNorm."""
    init_std: Annotated[float, Range(above=0, most=1e3)] | None = None
    """Standard deviation of weights at the start; None is 1/sqrt(fan-in) (our choice)."""
    attention_kernel: Literal["auto", "splash", "cudnn", "chunked", "xla"] = _may_change("auto")
    """How attention is computed; auto is splash on TPU, cudnn on GPU (bfloat16), xla on CPU, and
    chunked where those cannot."""
    remat: Literal["none", "dots", "attention", "full", "offload"] = _may_change("full")
    """What the backward pass recomputes: nothing, all but matrix products, all but attention's
    kernel, or each whole layer; offload is full with layers' inputs kept in the host's memory."""
    scan_layers: bool | None = _may_change(None)
    """Scan over the layers of a segment, or unroll them (compiles longer). None scans, except on
    CPU and GPU with remat none: stacking what the backward pass needs costs a fifth of the time."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the layers; auto is float32 on CPU, bfloat16 elsewhere. bfloat16 pays on a CPU
    that multiplies it (amx_bf16 in /proc/cpuinfo), as one device (docs/speed.md)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mixer.check(self.d_model)
        for layer in self.layers:  # an impossible taper is an error here, not later
            layer.mixer.check(self.d_model)

    @functools.cached_property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The spec of each layer, first to last: what model, costs and plan are made from.

        The recipe: the mixer says how it varies over depth (`MixerConfig.layers`), the taper how
        the MLP's width does. Where mixers take turns, the layers of one turn are equally wide.
        """
        mixers = self.mixer.layers(self.num_layers, self.d_model)
        turn = self.mixer.turn
        steps = self.taper.apply(
            self.num_layers // turn, self.base_mlp_width, base_width="mlp_width"
        )
        widths = [width for width in steps for _ in range(turn)]
        for layer, width in enumerate(widths):
            self.mlp.check(width, layer)
        return tuple(
            LayerSpec(mixer=mixer, mlp_widths=self.mlp.level_widths(width))
            for mixer, width in zip(mixers, widths, strict=True)
        )

    @functools.cached_property
    def segments(self) -> tuple[Segment[LayerSpec], ...]:
        """The layers in runs that repeat, each one scan."""
        return group(self.layers)

    @property
    def base_mlp_width(self) -> int:
        """Mean MLP width: `mlp_width` minus what the mixer takes of the MLP's budget."""
        return self.mlp_width - self.mixer.mlp_width_taken(self.d_model)

    @property
    def mlp_widths(self) -> tuple[int, ...]:
        """MLP width of each layer, all levels together."""
        return tuple(layer.mlp_width for layer in self.layers)

    @property
    def mixers(self) -> tuple[MixerConfig, ...]:
        """Mixer of each layer."""
        return tuple(layer.mixer for layer in self.layers)

    def uniform_twin(self) -> "ModelConfig":
        """The same model with nothing tapered: every layer `base_mlp_width` wide."""
        return dataclasses.replace(
            self,
            taper=NO_TAPER,
            mixer=self.mixer.uniform_twin(),
            mlp=self.mlp.uniform_twin(),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Checked):
    """Text, tokenizer and batches."""

    path: str | None = None
    """Text, JSONL or Parquet: a file, a folder of one kind, or a quoted pattern ('a/*.jsonl'); or
    a folder of `tlm prepare`. None is the package's own prose."""
    mixture: tuple[tuple[str, float], ...] = ()
    """Instead of a path: folders of `tlm prepare`, each with its share of the training rows."""
    tokenizer: str | None = None
    """tokenizer.json, SentencePiece .model, or bytes; None is the package's own 4,096-token BPE."""
    seq_len: Count = 256
    """Tokens in a sequence."""
    packing: Literal["concat", "best_fit"] = "concat"
    """Cut documents at row ends, or keep those that fit in a row whole and pad (train split)."""
    batch_size: Count = 16
    """Sequences in a step, over all devices."""
    validation_fraction: Annotated[float, Range(above=0, below=1)] = 0.05
    """Share of a user's own text that is held out, in whole documents."""
    seed: Seed = 0
    """Seed of the order of documents."""
    num_workers: Annotated[int, Range(least=0, most=1024)] = 0
    """Reader processes; batches depend on it, so it is fixed for a run."""
    readers: Count = 1
    """Readers that share a batch's rows, so that each process of a job reads only its own rows:
    one per process, or a multiple. Batches depend on it, so it is fixed for a run."""
    skip_corrupt: bool = _may_change(False)
    """Skip damaged records of prepared text, with a note for each, instead of stopping."""
    cache_dir: str | None = None
    """Where prepared text is kept; None is $XDG_CACHE_HOME/tlm_jax or ~/.cache/tlm_jax."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.path is None or not self.mixture,
            f"data.path={self.path} and data.mixture exclude each other; use one of them",
        )
        for folder, weight in self.mixture:
            require(weight > 0, f"mixture weight {weight} of {folder} must be a positive number")
        require(
            len(dict(self.mixture)) == len(self.mixture),
            f"mixture {self.mixture} names a folder twice",
        )
        batch = self.batch_size
        require(
            batch % self.readers == 0,
            f"data.batch_size={batch} does not divide over data.readers={self.readers}; "
            f"use a batch of {round_up(batch, self.readers)} or one of {divisors(batch)} readers",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(Checked):
    """The loop: steps, evaluation, checkpoints."""

    num_steps: Count = _may_change(1000)
    """Total optimizer steps; raise it to continue a finished run."""
    grad_accumulation: Count = 1
    """Split each batch into this many parts, one after the other, to save memory."""
    loss_chunk: NaturalNumber = 128
    """Positions whose float32 logits exist at a time; 0 is the whole sequence."""
    z_loss: Fraction = 0.0
    """Weight of log(Z)^2, which keeps logits from drifting."""
    teacher: str | None = None
    """Run folder, of a run or an imported model, whose distributions the model learns
    (distillation), such as the original of one that tlm retaper made."""
    teacher_weight: Fraction = 1.0
    """Share of KL(teacher || model) in what training descends on; the rest is the loss itself."""
    log_every: Count = _may_change(10)
    """Steps between log lines."""
    eval_every: NaturalNumber = _may_change(200)
    """Steps between evaluations (also at the end); 0 is only at the end."""
    eval_batches: Count | None = _may_change(None)
    """Validation batches while training, spread evenly; None is all, as at the end."""
    tracker: Literal["wandb", "trackio"] | None = _may_change(None)
    """Experiment tracker that gets the records of metrics.jsonl too, in the background."""
    suites: tuple[str, ...] = _may_change(())
    """Suites and tasks (see tlm eval --help) evaluated while training, such as lambada piqa."""
    suites_every: NaturalNumber = _may_change(1000)
    """Steps between them (also at the end); 0 is only at the end."""
    suites_limit: Count = _may_change(100)
    """Documents of each task."""
    suites_data_dir: str | None = _may_change(None)
    """Folder with TASK/SPLIT.jsonl; None reads from the hub."""
    checkpoint_every: NaturalNumber = _may_change(200)
    """Steps between checkpoints (also at the end); 0 is only at the end."""
    keep_last: Count = _may_change(2)
    """Newest checkpoints kept."""
    keep_every: Count | None = _may_change(None)
    """Also keep every checkpoint whose step is a multiple of this."""
    skip_spikes: NotNegative = 0.0
    """Skip updates with a gradient norm above this many times the mean of about the last 100;
    0 is never."""
    max_bad_steps: Count = _may_change(10)
    """Stop after this many updates in a row skipped for a bad loss or gradient."""
    hang_timeout: Annotated[float, Range(least=0, most=1e9)] = _may_change(1800.0)
    """Seconds without a finished step or evaluation batch after which the process ends, to be
    restarted; 0 is never."""
    sample_prompt: str = _may_change("The ")
    """Continued at each evaluation."""
    sample_tokens: NaturalNumber = _may_change(64)
    """Length of each sample; 0 turns samples off."""
    sample_temperature: NotNegative = _may_change(0.8)
    """0 is greedy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.skip_spikes == 0 or self.skip_spikes > 1,
            f"skip_spikes is {self.skip_spikes}; it must be above 1, or 0 to skip none",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Checked):
    """Devices along each mesh axis; -1 takes the remaining ones."""

    data: int = _may_change(-1)
    """Batch split, parameters copied."""
    fsdp: int = _may_change(1)
    """Batch and parameters split, gathered layer by layer."""
    sequence: int = _may_change(1)
    """Each row's tokens split; keys and values are gathered (attention mixers only)."""
    tensor: int = _may_change(1)
    """Heads and MLP units split."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = self.sizes
        require(
            all(s == -1 or s > 0 for s in sizes.values()) and [*sizes.values()].count(-1) <= 1,
            f"mesh {' '.join(f'{axis}={size}' for axis, size in sizes.items())}: sizes must be "
            "positive, at most one of them -1",
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each axis, the outermost (slowest) first."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Checked):
    """Everything that defines a training run."""

    name: str = "run"
    """Shown in logs; names the default run folder."""
    seed: Seed = 0
    """Seed of the parameters and of sampling."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        batch, parts = self.data.batch_size, self.training.grad_accumulation
        require(
            batch % parts == 0,
            f"data.batch_size={batch} does not divide into training.grad_accumulation={parts} "
            f"parts; use a batch of {round_up(batch, parts)} or one of {divisors(batch)} parts",
        )
        chunk, length = self.training.loss_chunk, self.data.seq_len
        require(
            chunk == 0 or length % min(chunk, length) == 0,
            f"training.loss_chunk={chunk} does not divide data.seq_len={length}; "
            f"use one of {divisors(length)}, or 0",
        )
        self.model.mlp.check_length(length)
        require(
            self.training.teacher is None or not self.model.mlp.online_in_training,
            "training.teacher does not work with mlp.online_in_training; leave one of them out",
        )
