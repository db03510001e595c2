"""Training, loading and querying models from Python: what `import tlm_jax` offers.

    import tlm_jax

    model = tlm_jax.load("runs/tiny")
    print(model.generate("It is a truth"))
    print(model.score(["It is a truth universally acknowledged"]))

No mesh contexts and no command line; these functions call what the commands of `tlm` call.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tlm_jax import output, storage
from tlm_jax.config import RunConfig, UserError
from tlm_jax.data import Dataset, Tokenizer
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.evaluation import perplexity
from tlm_jax.evaluation.options import SuiteConfig
from tlm_jax.models import LanguageModel, skeleton
from tlm_jax.models.sampling import SamplingConfig
from tlm_jax.training import loop, metrics, restore
from tlm_jax.training.step import TokenLoss


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A checkpoint's model on one device."""

    folder: pathlib.Path
    step: int
    config: RunConfig
    params: Any
    """Nested dict of float32 arrays."""
    tokenizer: Tokenizer
    metadata: dict[str, Any]
    """What the checkpoint says of itself."""

    @functools.cached_property
    def model(self) -> LanguageModel:
        """The Flax module with these parameters."""
        return skeleton(self.config.model).merge(self.params)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as the model reads it: preceded by what documents began with in
        training.

        Names of special tokens in the text are read as those tokens.
        """
        return restore.prompt_ids(self.folder, self.metadata, self.tokenizer, text)

    def logits(self, text: str | Sequence[int]) -> np.ndarray:
        """float32 logits (L, V) after each token of a text, or of token ids taken as they are.

        Raises:
          UserError: there are no tokens.
        """
        ids = self.encode(text) if isinstance(text, str) else list(text)
        if not ids:
            raise UserError("logits need at least one token")
        return np.asarray(self._forward(self.params, jnp.asarray([ids], jnp.int32))[0])

    def score(self, texts: Sequence[str]) -> list[float]:
        """The log-probability of each text, in nats, given what documents begin with.

        The first token of a text is not counted where documents begin with nothing.
        """
        return [self._score(text) for text in texts]

    def _score(self, text: str) -> float:
        ids = self.encode(text)
        if len(ids) < 2:
            return 0.0
        log_probs_LV = np.asarray(jax.nn.log_softmax(self.logits(ids)[:-1]))
        return float(np.take_along_axis(log_probs_LV, np.array(ids[1:])[:, None], axis=1).sum())

    def generate(
        self,
        prompt: str = "",
        *,
        num_tokens: int = 100,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        chat: bool = False,
    ) -> str:
        """The prompt and its continuation; with `chat` the answer to it as a user's message.

        Args:
          prompt: text to continue.
          num_tokens: most tokens to write; the text ends earlier at an end-of-text token.
          temperature: 0 is greedy.
          top_k: draw among this many likeliest tokens; 0 is all.
          top_p: draw among the likeliest tokens that hold this share of the probability.
          seed: of the draws.
          chat: apply the model's chat template.

        Raises:
          UserError: there is no chat template.
        """
        ids = restore.prompt_ids(self.folder, self.metadata, self.tokenizer, prompt, as_chat=chat)
        rows: list[list[int]] = [[]]
        with jax.set_mesh(mesh_lib.single_device_mesh()):
            for rows in restore.continuations(  # noqa: B007 (the last one counts)
                skeleton(self.config.model),
                self.params,
                self.tokenizer,
                ids,
                SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p),
                num_tokens=num_tokens,
                num_samples=1,
                seed=seed,
            ):
                pass
        return self.tokenizer.decode(rows[0] if chat else [*ids, *rows[0]])

    def evaluate(
        self, tasks: Sequence[str] = (), *, data_dir: str | None = None, limit: int | None = None
    ) -> perplexity.Score | dict[str, float]:
        """The held-out loss; or figures of suites and tasks by `task/metric` (extra `eval`).

        Args:
          tasks: as in `tlm eval --tasks`; none is the validation split that the config names.
          data_dir: folder with TASK/SPLIT.jsonl; None reads from the hub.
          limit: documents per task.
        """
        if not tasks:
            return restore.evaluate(self.folder, self.step, self.config)
        how = SuiteConfig(
            tasks=tuple(tasks),
            data_dir=None if data_dir is None else storage.path(data_dir),
            limit=limit,
        )
        outcome, _ = restore.evaluate_suites(self.folder, self.step, self.config, how)
        return {f"{m.task}/{m.name}": m.value for m in outcome.metrics}

    @functools.cached_property
    def _forward(self) -> Any:
        model = skeleton(self.config.model)

        def forward(params: Any, ids_BL: jax.Array) -> jax.Array:
            merged = model.merge(params)
            return merged.logits(merged(ids_BL)[0])

        return jax.jit(forward)


def load(folder: str | pathlib.Path, *, step: int | None = None) -> LoadedModel:
    """Loads a run folder, of a run or of `tlm import`, onto one device.

    Import the module that defines a custom mixer first: loading runs no code that a checkpoint
    names.

    Args:
      folder: the run folder.
      step: of the checkpoint; None is the newest.

    Raises:
      UserError: there is no such run or checkpoint, or it is damaged.
    """
    folder = storage.path(folder)
    step, metadata = restore.saved_metadata(folder, step)
    config = restore.saved_config(metadata)
    tokenizer = restore.model_tokenizer(config, metadata)
    mesh = mesh_lib.single_device_mesh()
    with jax.set_mesh(mesh):
        params = restore.load_params(folder, step, skeleton(config.model), tokenizer, mesh)
    return LoadedModel(
        folder=folder,
        step=step,
        config=config,
        params=params,
        tokenizer=tokenizer,
        metadata=metadata,
    )


def train(
    config: RunConfig,
    workdir: str | pathlib.Path,
    *,
    optimizer: optax.GradientTransformation | None = None,
    loss: TokenLoss | None = None,
    data: Dataset | None = None,
    hooks: Sequence[metrics.Hook] = (),
    init_from: str | pathlib.Path | None = None,
    allow_config_change: bool = False,
    quiet: bool = False,
) -> loop.Outcome:
    """Trains a run to its end, from its newest checkpoint if there is one, as `tlm train` does.

    Optimizer, loss and data given here are not a part of the config: resume a run with the same.

    Args:
      config: the run.
      workdir: its folder.
      optimizer: in place of `config.optimizer`; gradients in, updates out.
      loss: (model, batch) -> float32 loss (B, L) of each token, in place of the negative
        log-likelihood. Batches hold int32 (B, L) `inputs`, `targets`, `positions` and
        `document_ids`, where 0 is padding.
      data: in place of the text that `config.data` names; with the interface of `data.Dataset`.
      hooks: called as `hook(step, metrics)` for each step, one step late.
      init_from: a run folder whose parameters a new run starts with, optimizer and data fresh.
      allow_config_change: resume a run although its config has changed.
      quiet: show no log.

    Returns:
      How it ended.

    Raises:
      UserError: see `tlm train`.
    """
    return loop.Trainer(
        config,
        storage.path(workdir),
        output.console(quiet=quiet),
        allow_config_change=allow_config_change,
        optimizer=optimizer,
        loss=loss,
        data=data,
        hooks=hooks,
        init_from=None if init_from is None else storage.path(init_from),
    ).run()
