"""Our models behind the interface of lm-eval (extra `eval`).

Importing this imports lm-eval.
"""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from tlm_jax.config import UserError
from tlm_jax.data import Tokenizer
from tlm_jax.evaluation.generation import Generator
from tlm_jax.evaluation.journal import Journal
from tlm_jax.evaluation.requests import Likelihood, Request
from tlm_jax.evaluation.scoring import Scorer

Advance = Callable[[str, int, int], None]
"""Called with (what, done, total) as requests are answered."""


class HarnessModel(TemplateLM):
    """Answers lm-eval's requests with a `Scorer` and a `Generator`.

    Args:
      scorer: computes log-likelihoods.
      generator: writes texts.
      tokenizer: the model's.
      prefix: token ids before every text (what begins a document in training).
      journal: answers that are known already, and where new ones are kept.
      advance: told of progress.
    """

    def __init__(
        self,
        scorer: Scorer,
        generator: Generator,
        tokenizer: Tokenizer,
        *,
        prefix: Sequence[int],
        journal: Journal,
        advance: Advance,
    ) -> None:
        super().__init__()
        self._scorer, self._generator, self._tokenizer = scorer, generator, tokenizer
        self._prefix, self._journal, self._advance = tuple(prefix), journal, advance
        self._questions: list[int] = []
        self.notices: list[str] = []
        """What a user should know about the answers, one line each."""

    def forget(self) -> None:
        """Drops the answers so far, so that they are recomputed."""
        self._journal = Journal(None, {})

    @property
    def max_length(self) -> int:
        """Most tokens that the model reads."""
        return self._scorer.max_length

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return self._tokenizer.end_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What lm-eval puts before an empty context, and before a whole text."""
        return self._tokenizer.begin_id

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's own caches."""
        return self._tokenizer.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text, without special tokens."""
        return self._tokenizer.encode(string)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations; those of one document share what they begin with."""
        numbers: dict[Any, int] = {}
        self._questions = [
            numbers.setdefault((r.task_name, r.doc_id), len(numbers)) for r in requests
        ]
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Scores requests that lm-eval has encoded."""
        asked = []
        for question, (_, context, continuation) in zip(self._questions, requests, strict=True):
            # Before an empty context, lm-eval has put a token itself.
            prefix = self._prefix if context[:1] != [self.prefix_token_id] else ()
            asked.append(
                Request(
                    context=(*prefix, *context), continuation=tuple(continuation), question=question
                )
            )
        self._notice_longer(
            [len(request.tokens) - 1 for request in asked], "requests", "lose their beginning"
        )
        return [(a.log_likelihood, a.is_greedy) for a in self._answers(asked)]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in windows as long as the model allows."""
        asked: list[Request] = []
        windows = []
        texts = [self.tok_encode(instance.args[0]) for instance in requests]
        self._notice_longer(list(map(len, texts)), "texts", "are scored in pieces")
        for index, text in enumerate(texts):
            pairs = utils.get_rolling_token_windows(
                token_list=text,
                prefix_token=self.prefix_token_id,
                max_seq_len=self._scorer.max_length,
                context_len=1,
            )
            for context, continuation in map(utils.make_disjoint_window, pairs):
                windows.append(index)
                asked.append(
                    Request(
                        context=tuple(context),
                        continuation=tuple(continuation),
                        question=len(asked),
                    )
                )
        totals = [0.0] * len(requests)
        for index, answer in zip(windows, self._answers(asked), strict=True):
            totals[index] += answer.log_likelihood
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to a stop text.

        Raises:
          UserError: a task that draws at random.
        """
        prompts, stops, lengths = [], [], []
        for instance in requests:
            context, how = instance.args
            until = how.get("until") or []
            stops.append([until] if isinstance(until, str) else list(until))
            lengths.append(int(how.get("max_gen_toks", 256)))
            tokens = (*self._prefix, *self.tok_encode(context))
            prompts.append(tokens or (self.prefix_token_id,))
            if how.get("do_sample") and how.get("temperature", 0.0) > 0:
                raise UserError(
                    f"task {instance.task_name} draws its texts at random (do_sample), and only "
                    "greedy generation is evaluated"
                )
        self._notice_longer(
            [len(prompt) + most for prompt, most in zip(prompts, lengths, strict=True)],
            "prompts with room for their answers",
            "lose their beginning",
        )
        requests_ = zip(prompts, stops, lengths, strict=True)
        return self._journal.answers(
            [json.dumps(["generate", *request]) for request in requests_],
            lambda missing: self._generator.generate(
                [prompts[i] for i in missing],
                max_tokens=[lengths[i] for i in missing],
                stops=[stops[i] for i in missing],
            ),
            functools.partial(self._advance, "generated"),
        )

    def _notice_longer(self, lengths: Sequence[int], what: str, therefore: str) -> None:
        longer = sum(length > self.max_length for length in lengths)
        if longer:
            self.notices.append(
                f"{longer:,} of {len(lengths):,} {what} are longer than the {self.max_length:,} "
                f"tokens that the model reads, and {therefore}"
            )

    def _answers(self, requests: Sequence[Request]) -> list[Likelihood]:
        def ask(missing: list[int]) -> Iterator[tuple[int, list[Any]]]:
            place = {index: place for place, index in enumerate(missing)}
            for index, answer in self._scorer.score(requests, missing):
                yield place[index], [answer.log_likelihood, answer.is_greedy]

        keys = [json.dumps([r.context, r.continuation]) for r in requests]
        found = self._journal.answers(keys, ask, functools.partial(self._advance, "scored"))
        return [Likelihood(log_likelihood=a, is_greedy=b) for a, b in found]
