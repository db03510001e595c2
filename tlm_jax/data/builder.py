"""The TFDS builder that stores tokenised documents; importing it imports TFDS."""

import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from tlm_jax.data.prepared import TFDS_NAME, TFDS_VERSION
from tlm_jax.data.sources import SPLITS, Source, Split
from tlm_jax.data.tokenizers import Tokenizer

# TFDS keeps a list of all builders and refuses a name twice; ours is used by path only.
with tfds.core.registered.skip_registration():

    class _Builder(tfds.core.GeneratorBasedBuilder):
        """Records {tokens: (n,) int32, title: bytes}, in the order of the source."""

        name = TFDS_NAME
        VERSION = tfds.core.Version(TFDS_VERSION)
        pkg_dir_path = pathlib.Path(__file__).parent  # TFDS looks here for a README and citations

        def __init__(
            self,
            source: Source,
            tokenizer: Tokenizer,
            metadata: dict[str, Any],
            advance: Callable[[int], None],
            **kwargs: Any,
        ) -> None:
            self._source = source
            self._tokenizer = tokenizer
            self._metadata = tfds.core.MetadataDict(metadata)
            self._advance = advance
            super().__init__(**kwargs)

        def _info(self) -> tfds.core.DatasetInfo:
            features = {
                # Varints: half the size of raw int32 for small vocabularies, and fast enough.
                "tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32),
                "title": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                metadata=self._metadata,
                disable_shuffling=True,  # keys are then ints, and validation keeps its order
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager
            return {split: self._generate_examples(split) for split in SPLITS}

        def _generate_examples(self, split: Split) -> Iterator[tuple[int, dict[str, Any]]]:
            counts = {"num_documents": 0, "num_tokens": 0, "num_bytes": 0}
            for key, document in enumerate(self._source.documents(split)):
                tokens = np.asarray(self._tokenizer.encode(document.text), np.int32)
                size = len(document.text.encode())
                yield key, {"tokens": tokens, "title": document.title}
                counts["num_documents"] += 1
                counts["num_tokens"] += len(tokens)
                counts["num_bytes"] += size
                self._advance(size)
            self._metadata[split] = counts

        # TFDS prints a line before and after about downloads; there are none.
        def _log_download_bytes(self) -> None:
            pass

        def _log_download_done(self) -> None:
            pass


def build(
    folder: pathlib.Path,
    source: Source,
    tokenizer: Tokenizer,
    metadata: dict[str, Any],
    advance: Callable[[int], None],
) -> None:
    """Writes all documents of `source` as ArrayRecord files below `folder`.

    Args:
      folder: an empty folder.
      metadata: JSON values to keep; the counts of each split are added.
      advance: called with the UTF-8 bytes of each document once it is tokenised.
    """
    tfds.disable_progress_bar()
    builder = _Builder(
        source, tokenizer, metadata, advance, data_dir=os.fspath(folder), file_format="array_record"
    )
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    shutil.rmtree(folder / "downloads")  # TFDS makes it in any case


def open_split(folder: pathlib.Path, split: Split) -> Any:
    """A sequence of {tokens: (n,) int32, title: bytes} that `build` wrote below `folder`."""
    builder = tfds.builder_from_directory(os.fspath(folder / TFDS_NAME / TFDS_VERSION))
    return builder.as_data_source(split=split)
