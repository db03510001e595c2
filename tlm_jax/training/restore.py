"""A run's checkpoint, read back to be evaluated or to write text."""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tlm_jax import bucket_files, config_io, files
from tlm_jax.config import RunConfig, UserError
from tlm_jax.data import SpecialTokens, Tokenizer, chat, load_tokenizer, open_dataset
from tlm_jax.data.tokenizers import file_fingerprint
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.evaluation import perplexity, result_files, suites
from tlm_jax.evaluation.evaluator import Evaluator, progress
from tlm_jax.evaluation.journal import Journal
from tlm_jax.evaluation.options import SuiteConfig
from tlm_jax.models import Skeleton, sampling, skeleton
from tlm_jax.models.settings import compute_dtype
from tlm_jax.training import checkpoint
from tlm_jax.training import step as step_lib
from tlm_jax.training.checkpoint import CHECKPOINTS
from tlm_jax.training.faults import make_writable


def saved_metadata(folder: pathlib.Path, step: int | None) -> tuple[int, dict[str, Any]]:
    """(step, metadata) of a run's checkpoint; step None is the newest.

    If the run folder holds the tokenizer that the model was trained with, the config names
    that one: the folder can be moved.

    Raises:
      UserError: there is no such run or checkpoint.
    """
    checkpoints = folder / CHECKPOINTS
    if not checkpoints.is_dir():
        raise UserError(f"{folder} is not a run folder: it has no {CHECKPOINTS}/")
    with checkpoint.Checkpoints(checkpoints, read_only=True) as found:
        if not found.steps:
            raise UserError(f"{folder} has no complete checkpoint")
        step = max(found.steps) if step is None else step
        if step not in found.steps:
            raise UserError(f"{folder} has no checkpoint of step {step}, only of {found.steps}")
        metadata = found.metadata(step)
    for path in (folder / "tokenizer.json", folder / "tokenizer.model"):
        if path.is_file() and file_fingerprint(path) == metadata["data_layout"]["tokenizer"]:
            metadata["config"]["data"]["tokenizer"] = str(path)
    return step, metadata


def load_params(
    folder: pathlib.Path, step: int, model: Skeleton, tokenizer: Tokenizer, mesh: Mesh
) -> Any:
    """The parameters of a checkpoint, on the mesh.

    Raises:
      UserError: the tokenizer is not the one the model was trained with, or the
        parameters do not fit the model.
    """
    _, saved = saved_metadata(folder, step)
    trained = saved["data_layout"]["tokenizer"]
    if trained != tokenizer.fingerprint:
        raise UserError(
            f"{folder} was trained with tokenizer {trained}, and {tokenizer.name} is "
            f"{tokenizer.fingerprint}; use the same --data.tokenizer"
        )
    changed = checkpoint.shape_differences(saved, model.shapes)
    if changed:
        raise UserError(f"the parameters in {folder} do not fit: {'; '.join(changed[:4])}")
    shapes = step_lib.abstract_params(model, mesh)
    with checkpoint.Checkpoints(folder / CHECKPOINTS, read_only=True) as found:
        return found.restore_params(step, shapes)


def evaluate(folder: pathlib.Path, step: int, config: RunConfig) -> perplexity.Score:
    """Scores the checkpoint of a step on the validation split that `config.data` names.

    Raises:
      UserError: see `load_params`.
    """
    mesh = mesh_lib.make_mesh(config)
    dataset = open_dataset(config.data, config.model.vocab_size)
    model = skeleton(config.model)
    with jax.set_mesh(mesh):
        params = load_params(folder, step, model, dataset.tokenizer, mesh)
        score_step = perplexity.make_score_step(model, mesh, chunk=config.training.loss_chunk)
        return perplexity.score_dataset(score_step, params, dataset, config, mesh)


def evaluate_suites(
    folder: pathlib.Path, step: int, config: RunConfig, how: SuiteConfig
) -> tuple[suites.Outcome, result_files.Conditions]:
    """Runs suites of tasks on the checkpoint of a step; also says under which conditions.

    Answers are kept in the run folder as they come, so that the same command resumes after a
    kill; the file is removed at the end.

    Raises:
      UserError: see `load_params` and `Evaluator`; or another process evaluates the same.
    """
    with _answers_file(folder, result_files.file_name(how, step)) as path:
        return _evaluate_suites(folder, step, config, how, path)


@contextlib.contextmanager
def _answers_file(folder: pathlib.Path, name: str) -> Iterator[pathlib.Path | None]:
    """Where answers are kept, for this evaluation alone; removed at the end, if there was no error.

    None for a run folder that cannot be written: it can still be evaluated.
    """
    try:
        make_writable(folder / result_files.FOLDER)
    except UserError:
        yield None
        return
    path = folder / result_files.FOLDER / f"{name}.answers.jsonl"
    if jax.process_index() > 0:
        yield path
        return
    in_use = f"{folder} is in use: {{who}} evaluates the same tasks there ({name}); wait for it"
    with files.locked(path.with_name(f".{name}.lock"), in_use):
        yield path
        bucket_files.remove_log(path)


def _evaluate_suites(
    folder: pathlib.Path,
    step: int,
    config: RunConfig,
    how: SuiteConfig,
    path: pathlib.Path | None,
) -> tuple[suites.Outcome, result_files.Conditions]:
    mesh = mesh_lib.device_mesh(config.mesh)
    model = skeleton(config.model)
    _, saved = saved_metadata(folder, step)
    tokenizer = model_tokenizer(config, saved)
    with jax.set_mesh(mesh):
        evaluator = Evaluator(
            how,
            model,
            load_params(folder, step, model, tokenizer, mesh),
            tokenizer,
            mesh,
            max_length=config.data.seq_len,
            prefix=document_prefix(saved, tokenizer),
        )
        conditions = result_files.Conditions(
            params_id=params_id(folder, step, saved),
            max_length=how.max_length or config.data.seq_len,
            trained_length=config.data.seq_len,
            precision=compute_dtype(config.model).name,
            tokenizer=tokenizer.fingerprint,
            data=evaluator.data,
        )
        about = dataclasses.asdict(conditions) | {"model": config_io.to_dict(config)["model"]}
        about.pop("data")  # a request holds its own
        is_main = jax.process_index() == 0
        journal = Journal(path, about, writes=is_main)
        if journal.damaged and is_main:
            print(
                f"{path}: {journal.damaged} damaged lines are ignored; their requests are "
                "evaluated again",
                file=sys.stderr,
            )
        with contextlib.closing(journal), progress(is_main) as advance:
            return evaluator.run(journal, advance), conditions


def params_id(folder: pathlib.Path, step: int, saved: dict[str, Any]) -> str:
    """Names the parameters of a checkpoint: by their checksums, if it has any.

    An older one is named by what Orbax notes when it saves, which holds the time in nanoseconds.
    """
    if (found := checkpoint.params_id(saved)) is not None:
        return found
    noted = folder / CHECKPOINTS / str(step) / "_CHECKPOINT_METADATA"
    return result_files.digest(noted.read_text(encoding="utf-8"))


def document_prefix(saved: dict[str, Any], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Token ids that a document began with when the model was trained.

    Models trained here read an end-of-text token first; with an imported model it is saved.
    """
    return tuple(saved["data_layout"].get("document_prefix", (tokenizer.eot_id,)))


def model_tokenizer(config: RunConfig, saved: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a run with the special tokens of its model."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    ids = saved.get("special_tokens")
    if ids is None:
        return tokenizer
    special = SpecialTokens(bos=ids["bos"], eos=tuple(ids["eos"]), pad=ids["pad"])
    return dataclasses.replace(tokenizer, special=special)


def generate(
    folder: pathlib.Path,
    step: int,
    config: RunConfig,
    prompt: str,
    sampling_config: sampling.SamplingConfig,
    *,
    num_tokens: int,
    num_samples: int,
    seed: int,
    as_chat: bool = False,
) -> Iterator[list[str]]:
    """Yields the texts of `num_samples` continuations so far, prompt included.

    A row ends at the first token that ends a text; the iterator ends when all rows have. The
    names of special tokens in the prompt are those tokens; texts are given without any. Where
    a text grows longer than the model was trained on, a line on stderr says so at the end.

    Args:
      as_chat: the prompt is a user's message, put into the model's chat template; the texts are
        the answers alone.

    Raises:
      UserError: see `load_params`; or there is no chat template, or it cannot be applied.
    """
    mesh = mesh_lib.single_device_mesh()
    _, saved = saved_metadata(folder, step)
    tokenizer = model_tokenizer(config, saved)
    ids = prompt_ids(folder, saved, tokenizer, prompt, as_chat=as_chat)
    model = skeleton(config.model)
    rows: list[list[int]] = []
    with jax.set_mesh(mesh):
        params = load_params(folder, step, model, tokenizer, mesh)
        for rows in continuations(
            model,
            params,
            tokenizer,
            ids,
            sampling_config,
            num_tokens=num_tokens,
            num_samples=num_samples,
            seed=seed,
        ):
            yield [tokenizer.decode(row if as_chat else [*ids, *row]) for row in rows]
    length = len(ids) + max(map(len, rows))
    if length > config.data.seq_len:
        print(
            f"note: with its prompt the text has {length:,} tokens, and the model was trained on "
            f"at most {config.data.seq_len:,}",
            file=sys.stderr,
        )


def continuations(
    model: Skeleton,
    params: Any,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    sampling_config: sampling.SamplingConfig,
    *,
    num_tokens: int,
    num_samples: int,
    seed: int,
) -> Iterator[list[list[int]]]:
    """Yields the token ids that follow a prompt so far, without the one that ends a text."""
    rows: list[list[int]] = [[] for _ in range(num_samples)]
    ended = [False] * num_samples
    for tokens in sampling.stream(
        model,
        params,
        np.asarray([ids] * num_samples, np.int32),
        sampling_config,
        num_tokens=num_tokens,
        vocab_size=tokenizer.vocab_size,
        seed=seed,
    ):
        for row, token in enumerate(tokens.tolist()):
            ended[row] = ended[row] or token in tokenizer.end_ids
            if not ended[row]:
                rows[row].append(token)
        yield rows
        if all(ended):
            return


def prompt_ids(
    folder: pathlib.Path,
    saved: dict[str, Any],
    tokenizer: Tokenizer,
    prompt: str,
    *,
    as_chat: bool = False,
) -> list[int]:
    """What the model reads before it writes; at least one token.

    Args:
      folder: the run folder, for the message.
      saved: the checkpoint's metadata.
      tokenizer: see `model_tokenizer`.
      prompt: text, or a user's message.
      as_chat: it is a message.

    Raises:
      UserError: there is no chat template, or it cannot be applied.
    """
    if as_chat:
        template = saved.get("chat_template")
        if template is None:
            raise UserError(f"{folder} has no chat template; leave out --chat")
        message = {"role": "user", "content": prompt}
        return tokenizer.encode_prompt(chat.render(template, [message], tokenizer))
    ids = tokenizer.encode_prompt(prompt)
    prefix = list(document_prefix(saved, tokenizer))
    if ids[: len(prefix)] != prefix:  # a prompt may bring it
        ids = [*prefix, *ids]
    return ids or [tokenizer.begin_id]


def saved_config(metadata: dict[str, Any]) -> RunConfig:
    """The resolved config that a checkpoint was trained with."""
    return config_io.from_dict(metadata["config"])
