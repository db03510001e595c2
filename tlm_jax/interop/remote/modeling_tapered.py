"""A language model whose layers differ in mixer and width, for transformers' `trust_remote_code`.

    x = embedding[tokens]
    for each layer:  x = x + mixer(norm(x));  x = mlp_k(.. mlp_1(x))
    logits = norm(x) @ head

Attention, Gated Attention, Hope-attention and Titans; arXiv 2606.23670 tapers them. Shapes: B
batch, L new tokens, D model. Written by tlm-jax (Apache-2.0); needs PyTorch and transformers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_tapered import TaperedConfig
from .tapered_layers import MLP, Attention, RMSNorm, State, Tokens, each
from .tapered_online import Changes, advance, changed, start
from .tapered_titans import make_titans

MIXERS: dict[str, Callable[..., nn.Module]] = {"attention": Attention, "titans": make_titans}
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What this version of transformers calls the state of decoding."""


class TaperedCache(Cache):
    """Decoding state: that of each layer's mixer and MLPs, and how far each row has come."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[])
        self.num_layers = num_layers
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.states: list[State] = [{} for _ in range(self.num_layers)]
        self.online: State = {}
        """Of updates inside the text."""
        self.columns = 0
        """Tokens so far, padding included."""
        self.lengths: Tensor | None = None
        """(B,) of them without padding."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far, padding included."""
        return self.columns

    def change(self, function: Callable[[Tensor], Tensor]) -> None:
        """Changes all tensors, each of which has a leading dim of rows."""
        self.states = each(function, self.states)
        self.online = each(function, self.online)
        self.lengths = None if self.lengths is None else function(self.lengths)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes the given rows (beam search)."""
        self.change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Takes the given rows."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row."""
        self.change(lambda x: x.repeat_interleave(repeats, dim=0))

    def crop(self, *_: Any) -> None:
        """A memory cannot go back."""
        raise ValueError("this cache holds memories, which cannot go back to an earlier token")


class Block(nn.Module):
    """z = x + mixer(norm(x)), then the chain of MLPs."""

    def __init__(self, config: TaperedConfig, layer: dict[str, Any]) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        sizes = dict(layer)
        kind, widths = sizes.pop("mixer"), sizes.pop("mlp_widths")
        self.mixer_norm = RMSNorm(D, eps)
        self.mixer = MIXERS[kind](D, eps, **sizes)
        self.mlp = nn.ModuleList(MLP(D, width, eps) for width in widths)

    def forward(self, x_BLD: Tensor, tokens: Tokens, state: State, changes: Changes) -> Tensor:
        x_BLD = x_BLD + self.mixer(self.mixer_norm(x_BLD), tokens, state)
        for index, level in enumerate(self.mlp):
            mine = changes.get(str(index))
            x_BLD = level(x_BLD) if mine is None else changed(level, x_BLD, mine)
        return x_BLD


class TaperedForCausalLM(PreTrainedModel, GenerationMixin):
    """Embedding, blocks, norm and head."""

    config_class = TaperedConfig
    _no_split_modules = ["Block"]  # noqa: RUF012
    _is_stateful = True  # no candidates of an assistant can be taken back
    _supports_sdpa = True

    def __init__(self, config: TaperedConfig) -> None:
        super().__init__(config)
        D, V = config.hidden_size, config.vocab_size
        self.embedding = nn.Embedding(V, D)
        self.layers = nn.ModuleList(Block(config, layer) for layer in config.layers)
        self.final_norm = RMSNorm(D, config.rms_norm_eps)
        self.head = None if config.tie_word_embeddings else nn.Linear(D, V, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes its own

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
        **others: Any,
    ) -> dict[str, Any]:
        """The tokens that the cache does not hold yet."""
        cache = others.get(CACHE)
        return {
            "input_ids": input_ids[:, cache.columns if cache is not None else 0 :],
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            CACHE: cache,
        }

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: TaperedCache | None = None,
        past_key_values: TaperedCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next tokens, float32.

        Args:
          input_ids: (B, L) tokens, those in the cache left out.
          attention_mask: (B, tokens so far and L); 0 is padding, on the left.
          cache: what an earlier call returned, which this one changes.
          past_key_values: the same under transformers' older name.
          inputs_embeds: (B, L, D), in place of tokens; not for models that learn inside a text.
          labels: (B, L) tokens of which to return the loss; -100 is left out.
          use_cache: whether to return a cache; None is what the config says.
          logits_to_keep: of the last tokens alone; 0 is all.
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None:
            raise ValueError("forward needs input_ids")
        cache = past_key_values if cache is None else cache
        keeps = cache is not None or (self.config.use_cache if use_cache is None else use_cache)
        if cache is None:
            cache = TaperedCache(len(self.layers))
        before = cache.columns
        tokens = self.place(given, attention_mask, cache)
        if online := self.config.online:
            if not cache.online:
                cache.online = start(self.layers, online["chunks"], len(given))
            logits_BLV = advance(
                self.run, given, tokens, before, cache.states, cache.online, **online
            )[:, -logits_to_keep:]
        else:
            none: list[Changes] = [{} for _ in self.layers]
            logits_BLV = self.run(given, tokens, cache.states, none, logits_to_keep)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BLV, labels, vocab_size=self.config.vocab_size)
        found: dict[str, Any] = {CACHE: cache} if keeps else {}
        return CausalLMOutputWithPast(loss=loss, logits=logits_BLV, **found)

    def run(
        self,
        given: Tensor,
        tokens: Tokens,
        states: list[State],
        changes: list[Changes],
        logits_to_keep: int = 0,
    ) -> Tensor:
        """float32 logits of tokens (B, L), or of embeddings; see `forward`."""
        x_BLD = given if given.is_floating_point() else self.embedding(given)
        for layer, state, mine in zip(self.layers, states, changes, strict=True):
            x_BLD = layer(x_BLD, tokens, state, mine)
        hidden_BLD = self.final_norm(x_BLD[:, -logits_to_keep:])
        head = self.embedding if self.head is None else self.head
        return nn.functional.linear(hidden_BLD, head.weight).float()

    def place(self, given: Tensor, mask: Tensor | None, cache: TaperedCache) -> Tokens:
        """Where the new tokens stand; the cache then counts them too."""
        B, L = given.shape[:2]
        if mask is None:
            mask = torch.ones(B, cache.columns + L, dtype=torch.bool, device=given.device)
        if mask.shape != (B, cache.columns + L):
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}; it must be {(B, cache.columns + L)}"
                ", of the tokens in the cache and the new ones"
            )
        mask = mask > 0
        if (mask[:, 1:] & ~mask[:, :-1] & (mask[:, :-1].cumsum(1) > 0)).any():
            raise ValueError("attention_mask has padding inside a text; pad on the left")
        real_BL = mask[:, -L:]
        lengths = real_BL.new_zeros(B, dtype=torch.long)
        lengths = lengths if cache.lengths is None else cache.lengths
        positions_BL = (lengths[:, None] + real_BL.cumsum(1) - 1).clamp(min=0)
        cache.columns, cache.lengths = cache.columns + L, lengths + real_BL.sum(1)
        return Tokens(positions_BL, real_BL)
