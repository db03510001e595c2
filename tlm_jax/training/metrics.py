"""Where a run's numbers go: a progress bar, JSON lines, TensorBoard and perhaps a tracker.

Only process 0 writes, and a logger that fails never stops a run.
"""

import contextlib
import datetime
import functools
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tlm_jax import bucket_files, costs, files, storage
from tlm_jax.config import RunConfig, UserError
from tlm_jax.models.settings import compute_dtype
from tlm_jax.training.tracker import Tracker

Hook = Callable[[int, dict[str, Any]], None]
METRICS_FILE = "metrics.jsonl"
_FLUSH_SECONDS = 30
_STORE_SECONDS = 5.0
"""How long a checkpoint waits for the metrics before it, in a bucket."""


@contextlib.contextmanager
def _unused(*modules: str) -> Iterator[None]:
    """What is imported inside takes these as not installed, which saves seconds.

    tensorboardX imports them for what nothing here uses.
    """
    hidden = [name for name in modules if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


class MetricsWriter:
    """Appends records to `metrics.jsonl`, to TensorBoard and to a tracker, if there is one.

    A record has `kind` (train, eval or suites), `step`, numbers, and a checksum over all these
    (`files.sealed`). A run that was killed and resumed can repeat steps: the later line counts.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        console: Console,
        *,
        enabled: bool = True,
        tracker: Tracker | None = None,
    ) -> None:
        self._tracker = tracker
        self._console = console
        self._enabled = enabled
        self._warned = False
        self._flushed = 0.0
        self._tensorboard: Any = None
        if enabled:
            self._log = files.growing(workdir / METRICS_FILE, self._warn)
            try:
                # Not SummaryWriter: its thread dies of a full disk, and then every write hangs.
                with _unused("torch", "boto3", "google.cloud.storage"):
                    from tensorboardX.event_file_writer import EventsWriter
                    from tensorboardX.record_writer import register_writer_factory

                folder = workdir / "tensorboard"
                folder.mkdir(exist_ok=True)
                if storage.in_bucket(workdir):
                    register_writer_factory(workdir.parts[0][:-1], _EventFiles(self._warn))
                self._tensorboard = EventsWriter(str(folder / "events"))
            except Exception as error:
                self._warn(error)

    def write(self, kind: str, step: int, values: dict[str, float | int]) -> None:
        """Logs `values` of one step."""
        if not self._enabled:
            return
        record = {"kind": kind, "step": step} | values
        if self._tracker is not None:
            self._tracker.log(kind, step, values)
        try:
            self._log.write(json.dumps(files.sealed(record)).encode() + b"\n")
            if kind != "train":
                self._log.flush()
            self._write_tensorboard(kind, step, values)
        except Exception as error:
            self._warn(error)

    def _write_tensorboard(self, kind: str, step: int, values: dict[str, float | int]) -> None:
        if self._tensorboard is None:
            return
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=f"{kind}/{k}", simple_value=v) for k, v in values.items()]
        now = time.time()
        event = Event(wall_time=now, step=step, summary=Summary(value=scalars))
        self._tensorboard.write_event(event)
        if kind == "eval" or now - self._flushed > _FLUSH_SECONDS:
            self._tensorboard.flush()
            self._flushed = now

    def flush(self) -> None:
        """Has what was written stored, before a checkpoint makes its steps final."""
        if self._enabled:
            self._log.flush(_STORE_SECONDS)

    def close(self) -> None:
        """Flushes TensorBoard and lets the tracker finish."""
        if self._enabled:
            self._log.close()
        if self._tracker is not None:
            self._tracker.close()
        try:
            if self._tensorboard is not None:
                self._tensorboard.close()
        except Exception as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            text = f"cannot write metrics: {error}"
            self._console.print(text, style="yellow")
            self._warned = True


class _EventFiles:
    """Opens TensorBoard's files in a bucket, for tensorboardX."""

    def __init__(self, warn: Callable[[Exception], None]) -> None:
        self._warn = warn

    def open(self, path: str) -> bucket_files.Log:
        return bucket_files.Log(storage.path(path), self._warn)

    def directory_check(self, path: str) -> None:
        pass


def records(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The whole records of a run folder, oldest first; none if they cannot be read."""
    try:
        found = files.read_lines(workdir / METRICS_FILE)
    except UserError:
        return []
    return [record for record in found if {"kind", "step"} <= record.keys()]


def last_record(workdir: pathlib.Path, kind: str) -> dict[str, Any] | None:
    """The newest whole record of a kind in a run folder, or None."""
    return next((r for r in reversed(records(workdir)) if r["kind"] == kind), None)


class TrainProgress:
    """A bar with loss, speed and time left on a terminal; plain lines elsewhere."""

    def __init__(self, console: Console, start: int, num_steps: int, *, enabled: bool) -> None:
        self._console = console
        self._enabled = enabled
        self._num_steps = num_steps
        self._bar = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
            disable=not (enabled and console.is_terminal),
        )
        self._task = self._bar.add_task("", total=num_steps, completed=start)
        self._bar.start()

    def advance(self, step: int) -> None:
        """Moves the bar to `step`."""
        self._bar.update(self._task, completed=step)

    def show(self, step: int, values: dict[str, float | int], seconds_left: float) -> None:
        """Shows the numbers of a logged step."""
        text = (
            f"loss {values['loss']:.3f}  {values['tokens_per_second']:,.0f} tok/s"
            f"  MFU {values['mfu']:.0%}"
        )
        self._bar.update(self._task, description=text)
        if self._enabled and not self._console.is_terminal:
            left = datetime.timedelta(seconds=int(seconds_left))
            self._console.print(f"step {step:>6}/{self._num_steps}  {text}  left {left}")

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.stop()


class SpeedMeter:
    """Tokens per second and MFU over the steps since the last log line, and goodput.

    Args:
      flops_per_token: of training.
      peak_flops: of all devices.
      began: `time.perf_counter()` when the wall clock of this process's work started.
    """

    def __init__(self, flops_per_token: float, peak_flops: float, began: float) -> None:
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._began = began
        self.stepping = 0.0
        """Seconds spent in steps."""
        self.restart()

    def restart(self) -> None:
        """Forgets what came before (compiling, evaluating, saving)."""
        self._start, self._tokens, self._steps = time.perf_counter(), 0, 0
        self._last = self._start

    def add(self, tokens: int) -> None:
        """Counts a finished step."""
        now = time.perf_counter()
        self.stepping += now - self._last
        self._last = now
        self._tokens += tokens
        self._steps += 1

    @property
    def wall(self) -> float:
        """Seconds since `began`."""
        return time.perf_counter() - self._began

    @property
    def goodput(self) -> float:
        """Share of the wall time spent in steps."""
        return self.stepping / max(self.wall, 1e-9)

    def read(self) -> tuple[dict[str, float], float]:
        """({tokens_per_second, mfu}, seconds per step) since the last reading, then restarts."""
        now = time.perf_counter()
        seconds = max(now - self._start, 1e-9)
        rate = self._tokens / seconds
        per_step = seconds / max(self._steps, 1)
        self._start, self._tokens, self._steps = now, 0, 0
        return {
            "tokens_per_second": rate,
            "mfu": rate * self._flops_per_token / self._peak_flops,
            "goodput": self.goodput,
        }, per_step


@functools.cache
def peak_flops(dtype: str) -> tuple[float, str]:
    """(FLOP/s of all devices, where the figure is from).

    The datasheet's, where the device is known; otherwise (a CPU) the best of a few products of
    two square matrices, timed here on all of this process's devices at once.
    """
    devices, mine = jax.devices(), jax.local_devices()
    known = costs.peak_flops(devices[0].device_kind, dtype)
    if known is not None:
        return known * len(devices), f"{devices[0].device_kind} datasheet"
    n = 1024 if len(mine) == 1 else 512  # larger ones are no faster, and take seconds
    mesh, best = Mesh(np.asarray(mine), ("device",)), math.inf
    with jax.set_mesh(mesh):
        ones = jnp.ones((len(mine), n, n), dtype)
        x = jax.device_put(ones, NamedSharding(mesh, jax.P("device")))
        multiply = jax.jit(jnp.matmul)
        multiply(x, x).block_until_ready()
        for _ in range(5):
            start = time.perf_counter()
            multiply(x, x).block_until_ready()
            best = min(best, time.perf_counter() - start)
    return 2 * n**3 * len(devices) / best, f"measured {n}x{n} product"


def due(done: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after step `done`."""
    return every > 0 and done % every == 0


class TrainLog:
    """The train step's metrics, read one step late so that the device never waits.

    A record holds the step's metrics (see `step.make_train_step`) but for `tokens`, which counts
    all targets that were scored to train the run until then: since step 0 and over restarts, in
    all parts of a batch and on all processes, padding left out, with those of skipped updates.
    (In a record of kind eval, it counts the targets that this evaluation scored.)

    Args:
      config: the run.
      workdir: its folder.
      writer: where records go.
      console: where progress is shown.
      start: steps so far.
      tokens: `tokens` so far.
      began: see `SpeedMeter`.
      enabled: show progress.
      hooks: called with each step and its metrics, as numbers, one step late; one that fails is
        reported and disabled from then on.
    """

    def __init__(
        self,
        config: RunConfig,
        workdir: pathlib.Path,
        writer: MetricsWriter,
        console: Console,
        start: int,
        tokens: int,
        began: float,
        *,
        enabled: bool,
        hooks: Sequence[Hook] = (),
    ) -> None:
        self._console, self._hooks = console, list(hooks)
        self.tokens = tokens
        """As above, of the steps that `flush` has read."""
        self._training = config.training
        self._workdir = workdir
        self._writer = writer
        peak, source = peak_flops(compute_dtype(config.model).name)
        if enabled:
            console.print(f"Peak for MFU: {peak / 1e9:,.0f} GFLOP/s ({source}).")
        flops = costs.model_costs(config.model, seq_len=config.data.seq_len)
        self.meter = SpeedMeter(flops.training_flops, peak, began)
        self._progress = TrainProgress(console, start, config.training.num_steps, enabled=enabled)
        self._pending: tuple[int, dict[str, jax.Array]] | None = None

    def push(self, done: int, new: dict[str, jax.Array]) -> None:
        """Takes the metrics of a dispatched step and reads those of the one before."""
        self.flush()
        self._pending = (done, new)

    def flush(self) -> None:
        """Reads what is pending; waits for the device.

        Raises:
          UserError: too many updates in a row were skipped.
        """
        if self._pending is None:
            return
        done, on_device = self._pending
        self._pending = None
        values: dict[str, Any] = {k: v.item() for k, v in jax.device_get(on_device).items()}
        self.meter.add(values["tokens"])
        self.tokens += values["tokens"]
        self._progress.advance(done)
        self._call_hooks(done, values)
        bad = values["skipped_in_a_row"]
        if due(done, self._training.log_every) or done == self._training.num_steps or bad:
            speed, seconds = self.meter.read()
            values |= speed | {"tokens": self.tokens}
            self._writer.write("train", done, values)
            self._progress.show(done, values, seconds * (self._training.num_steps - done))
        if bad >= self._training.max_bad_steps:
            raise UserError(
                f"stopped at step {done}: the loss or its gradient was not finite, or a spike, "
                f"{bad} times in a row (loss {values['loss']}, gradient norm "
                f"{values['grad_norm']}); the last checkpoint in {self._workdir} is untouched. Try "
                "a lower optimizer.learning_rate"
            )

    def _call_hooks(self, done: int, values: dict[str, Any]) -> None:
        for hook in list(self._hooks):
            try:
                hook(done, dict(values))
            except Exception as error:  # what watches training must not end it
                self._hooks.remove(hook)
                text = f"hook {hook} failed at step {done} and is disabled: {error!r}"
                self._console.print(text, style="yellow")

    def store(self) -> None:
        """Has the records stored."""
        self._writer.flush()

    def close(self) -> None:
        """Ends the progress bar."""
        self._progress.close()
