"""
Generation of semantic tokens: the generation config with its token-count control, the logits processor behind it, seeded
sampling row by row, the cache, and the hooks into the stock `generate`. The network itself is in `modeling_t2s.py`.
"""

import inspect
import math
from numbers import Integral, Real
from typing import Any

import torch
from transformers import (
    Cache,
    ClassifierFreeGuidanceLogitsProcessor,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation.utils import GenerateOutput


# A finite stand-in for minus infinity: beams that are forced to stop keep finite scores, so that beam sampling never
# meets a row without any possible token.
_FORBIDDEN = -1e9
# Tokens for which a cache has room when it has to move.
_CACHE_ROOM = 128
# What transformers calls the cache: `past_key_values` up to 5.23, `cache` since.
_TAKES_CACHE = "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE_NAME = "cache" if _TAKES_CACHE else "past_key_values"
# The settings that are not stock.
OWN_SETTINGS = ("num_semantic_tokens", "duration_conditioning", "text_guidance_scale", "num_candidates")


class IndexTTS2GenerationConfig(GenerationConfig):
    r"""
    Generation settings of IndexTTS2. All stock names keep their meaning; four are new.

    Args:
        num_semantic_tokens (`int` or `list[int | None]`, *optional*):
            Exact number of semantic tokens to generate, start and stop not counted: one number for all rows, or one for
            each row (`None` leaves that row free). Each row then takes `num_semantic_tokens / semantic_token_rate` seconds.
        duration_conditioning (`bool`, *optional*):
            Whether the asked number is also written into the prefix, as row `num_semantic_tokens` of the semantic position
            table (paper, section 3.1.1). By default what the checkpoint expects (`config.use_length_row`).
        text_guidance_scale (`float`, *optional*):
            Strength of the text (classifier-free guidance, Ho and Salimans 2022): above 1 the logits go so many times the way
            from those without any text to those with it. A step then has twice the rows. Meant for checkpoints that were
            trained with `--text_dropout_probability`; not from the paper.
        num_candidates (`int`, *optional*):
            How many sequences are sampled for each row, of which the best is kept: by its mean log-probability per token, to which
            a checkpoint with a text recogniser adds that of the text, read from it, per text token (maximum mutual information, Li
            et al. 2016, arXiv 1510.03055). A step then has so many times the rows. Means sampling with one beam; greedy search
            and beams go without. Not from the paper.
        kwargs:
            Everything [`~transformers.GenerationConfig`] takes.

    Raises:
        ValueError: `num_semantic_tokens` is not made of whole numbers of at least 1, `text_guidance_scale` is below 1, or
            `num_candidates` is not a whole number of at least 1.
    """

    def __init__(self, **kwargs):
        # An attribute that is always there, even as None, would be mistaken for a custom value of the model config.
        for name in OWN_SETTINGS:
            if name in kwargs and kwargs[name] is None:
                kwargs.pop(name)
        super().__init__(**kwargs)

    def validate(self, *args, **kwargs) -> None:
        super().validate(*args, **kwargs)
        check_num_semantic_tokens(getattr(self, "num_semantic_tokens", None))
        check_text_guidance_scale(getattr(self, "text_guidance_scale", 1.0))
        check_num_candidates(getattr(self, "num_candidates", 1))

    @classmethod
    def from_model_config(cls, model_config) -> GenerationConfig:
        # The stock method fills a config from fields that ours does not have; it is for models without a generation config.
        raise NotImplementedError("IndexTTS2 keeps its generation settings in `generation_config.json`.")


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """
    The cache, which has two names: that of transformers 5.24 and newer, and the older one.

    Raises:
        ValueError: it was given under both.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError(
            "`cache` and `past_key_values` are two names of one argument, but both were given: give `cache`."
        )
    return past_key_values if cache is None else cache


def check_num_semantic_tokens(
    num_semantic_tokens: int | list[int | None] | torch.Tensor | None,
) -> int | list[int | None] | None:
    """
    The asked token counts as plain numbers.

    Raises:
        ValueError: a count is not a whole number of at least 1.
    """
    if isinstance(num_semantic_tokens, torch.Tensor):
        num_semantic_tokens = num_semantic_tokens.tolist()
    counts = num_semantic_tokens if isinstance(num_semantic_tokens, list | tuple) else [num_semantic_tokens]
    for count in counts:
        if count is not None and (isinstance(count, bool) or not isinstance(count, Integral) or count < 1):
            raise ValueError(
                f"`num_semantic_tokens` is {count!r}, but it must be a whole number of at least 1. "
                "Leave it out for a free length."
            )
    return list(num_semantic_tokens) if isinstance(num_semantic_tokens, tuple) else num_semantic_tokens


def check_text_guidance_scale(scale: float) -> None:
    """
    Raises:
        ValueError: the scale is not a finite number of at least 1.
    """
    if isinstance(scale, bool) or not (isinstance(scale, Real) and 1.0 <= scale < math.inf):  # also false for NaN
        raise ValueError(
            f"`text_guidance_scale` is {scale!r}, but it must be a finite number of at least 1; 1 is no guidance."
        )


def check_num_candidates(num_candidates: int) -> None:
    """
    Raises:
        ValueError: the number is not a whole number of at least 1.
    """
    if isinstance(num_candidates, bool) or not isinstance(num_candidates, Integral) or num_candidates < 1:
        raise ValueError(
            f"`num_candidates` is {num_candidates!r}, but it must be a whole number of at least 1; 1 samples each row once."
        )


def mean_log_probs(
    sequences: torch.LongTensor, logits: tuple[torch.Tensor, ...], semantic_stop_token_id: int
) -> torch.Tensor:
    r"""
    Mean log-probability per token of each sequence, with its text, without guidance and temperature.

    Args:
        sequences (`torch.LongTensor` of shape `(num_sequences, num_generated)`): generated ids, filled with the stop id.
        logits (`tuple[torch.Tensor]`, each of shape `(at least num_sequences, vocab_size)`):
            Of each step, before any processor. Under text guidance the rows without text are behind, and not looked at.
        semantic_stop_token_id (`int`): id that ends a row; its first place counts as a token.

    Returns:
        `torch.Tensor` of shape `(num_sequences,)`, float32.
    """
    log_probs = torch.stack(
        [
            step[: len(sequences)].float().log_softmax(dim=-1).gather(1, ids[:, None])[:, 0]
            for step, ids in zip(logits, sequences.unbind(dim=1), strict=True)
        ],
        dim=1,
    )
    is_stop = sequences == semantic_stop_token_id
    is_own = (is_stop.cumsum(dim=1) - is_stop.long()) == 0
    return (log_probs * is_own).sum(dim=1) / is_own.sum(dim=1)


def best_candidates(
    scores: torch.Tensor, sequences: torch.LongTensor, num_candidates: int, semantic_stop_token_id: int
) -> torch.LongTensor:
    r"""
    The candidate of each row with the highest score. One that never ended is kept only where none did.

    Args:
        scores (`torch.Tensor` of shape `(batch_size * num_candidates,)`): of each candidate.
        sequences (`torch.LongTensor` of shape `(batch_size * num_candidates, num_generated)`): ids, filled with the stop id.
        num_candidates (`int`): neighbouring rows of `sequences` that are candidates for the same.
        semantic_stop_token_id (`int`): id that ends a row.

    Returns:
        `torch.LongTensor` of shape `(batch_size,)`: rows of `sequences`.
    """
    has_ended = (sequences == semantic_stop_token_id).any(dim=1)
    scores = scores.masked_fill(~has_ended, -math.inf)
    best = scores.view(-1, num_candidates).argmax(dim=1)
    return best + num_candidates * torch.arange(len(best), device=best.device)


class SemanticTokenCountLogitsProcessor(LogitsProcessor):
    r"""
    Gives each row exactly the number of semantic tokens that was asked for: the stop token is impossible before that many
    were generated, and certain after.

    Args:
        num_semantic_tokens (`list[int | None]`):
            Tokens for each row of the batch, start and stop not counted; `None` leaves the row free.
        prompt_length (`int`):
            Ids before the first generated one.
        semantic_stop_token_id (`int`):
            Id that ends a row.
    """

    def __init__(self, num_semantic_tokens: list[int | None], prompt_length: int, semantic_stop_token_id: int):
        self.num_semantic_tokens = torch.tensor([-1 if count is None else count for count in num_semantic_tokens])
        self.prompt_length = prompt_length
        self.semantic_stop_token_id = semantic_stop_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size * num_beams, sequence_length)`): ids so far.
            scores (`torch.FloatTensor` of shape `(batch_size * num_beams, vocab_size)`): logits or log-probabilities.

        Returns:
            `torch.FloatTensor` of the shape of `scores`.
        """
        if self.num_semantic_tokens.device != scores.device:
            self.num_semantic_tokens = self.num_semantic_tokens.to(scores.device)
        counts = self.num_semantic_tokens.repeat_interleave(scores.shape[0] // len(self.num_semantic_tokens))
        num_generated = input_ids.shape[1] - self.prompt_length

        forced = torch.full_like(scores, _FORBIDDEN)
        forced[:, self.semantic_stop_token_id] = 0.0
        scores = scores.clone()
        is_too_early = counts > num_generated
        scores[:, self.semantic_stop_token_id] = scores[:, self.semantic_stop_token_id].masked_fill(
            is_too_early, -float("inf")
        )
        must_stop = (counts >= 0) & (counts <= num_generated)
        return torch.where(must_stop[:, None], forced, scores)


class TextGuidanceLogitsProcessor(ClassifierFreeGuidanceLogitsProcessor):
    r"""
    One row of scores of the two that the model makes for each under text guidance: with the text, and, behind all of these, without.

    Args:
        guidance_scale (`float`): how many times the way from the second to the first, above 1.
    """

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size * num_beams, sequence_length)`): ids so far.
            scores (`torch.FloatTensor` of shape `(2 * batch_size * num_beams, vocab_size)`): logits or log-probabilities.

        Returns:
            `torch.FloatTensor` of shape `(batch_size * num_beams, vocab_size)`: log-probabilities, so that beams compare.
        """
        return super().__call__(input_ids, scores).log_softmax(dim=-1)


class SeededSamplingLogitsProcessor(LogitsProcessor):
    r"""
    Samples each row with a generator of its own, so that what a row says does not depend on its neighbours: the largest of
    the scores plus Gumbel noise is one categorical draw, and only that token is left for `generate` to pick. Works with
    `do_sample=True` and one beam; it is applied after temperature, top-k and top-p.

    Args:
        generators (`list[torch.Generator]`):
            One for each row, on the device of the model. The sequences of one row (`num_return_sequences`, `num_candidates`)
            share its generator.

    Raises:
        ValueError: the rows are not as many for each generator.
    """

    def __init__(self, generators: list[torch.Generator]):
        self.generators = generators

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        num_sequences, rest = divmod(len(scores), len(self.generators))
        if rest or not num_sequences:
            raise ValueError(
                f"There are {len(self.generators)} generators for {len(scores)} rows. Seeded sampling needs one for each row."
            )
        shape = (num_sequences, scores.shape[1])
        uniform = torch.cat(
            [torch.rand(shape, generator=generator, device=scores.device) for generator in self.generators]
        )
        gumbel = -torch.log(-torch.log(uniform.clamp(min=torch.finfo(torch.float32).tiny)))
        chosen = (scores.float() + gumbel).argmax(dim=-1, keepdim=True)
        return torch.full_like(scores, -float("inf")).scatter(1, chosen, 0.0)


class _RoomyTensor:
    """A tensor that grows along its last axis but one, in memory that has room for more."""

    def __init__(self):
        self.memory = self.view = None

    def append(self, kept: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """`kept`, which nobody changes in place, and `states` behind it."""
        start = kept.shape[-2] if kept.ndim == states.ndim else 0  # stock: nothing is a tensor of one axis
        end = start + states.shape[-2]
        # Others may have chosen rows or cropped: what is kept then lies elsewhere.
        if kept is not self.view or end > self.memory.shape[-2]:
            self.memory = states.new_empty(*states.shape[:-2], end + _CACHE_ROOM, states.shape[-1])
            if start:
                self.memory[..., :start, :] = kept
        self.memory[..., start:end, :] = states
        self.view = self.memory[..., :end, :]
        return self.view


class RoomyLayer(DynamicLayer):
    """The stock layer of a cache, which for each token copies all keys and values, with room for more instead."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.roomy_keys, self.roomy_values = _RoomyTensor(), _RoomyTensor()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all tokens so far: `(batch_size, num_heads, num_tokens, head_dim)`, as the arguments."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self.roomy_keys.append(self.keys, key_states)
        self.values = self.roomy_values.append(self.values, value_states)
        return self.keys, self.values


class IndexTTS2GenerationMixin(GenerationMixin):
    """Generation of semantic tokens on a prefix of embeddings, by the stock `generate`."""

    def adjust_generation_fn(self, generation_config, *args, **kwargs) -> None:
        super().adjust_generation_fn(generation_config, *args, **kwargs)
        # The stock method always reads a plain `GenerationConfig`: the values are right, the type is not.
        self.generation_config = IndexTTS2GenerationConfig.from_dict(self.generation_config.to_dict())

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        speaker_latents: torch.Tensor | None = None,
        emotion_embeds: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        text_ids: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> GenerateOutput | torch.LongTensor:
        r"""
        Semantic tokens for text, by the stock `generate` with all of its search modes.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, text_length)`):
                Text ids without start and stop. Padding is on the left, or anywhere that `attention_mask` says.
            attention_mask (`torch.Tensor` of shape `(batch_size, text_length)`, *optional*):
                1 for text, 0 for padding.
            speaker_latents (`torch.Tensor` of shape `(batch_size, speaker_num_latents, hidden_size)`):
                Voice, from `encode_speaker`.
            emotion_embeds (`torch.Tensor` of shape `(batch_size, hidden_size)`, *optional*):
                Emotion, from `encode_emotion` or `mix_emotion`; added to every speaker latent.
            inputs_embeds (`torch.Tensor` of shape `(batch_size, prefix_length, hidden_size)`, *optional*):
                A prefix made by `prepare_prefix`, with its mask as `attention_mask`, instead of the four above.
            text_ids (`torch.LongTensor` of shape `(batch_size, text_length)`, *optional*):
                The text of such a prefix, padded with the stop id, for the text recogniser that chooses among candidates; without it
                the likeliest is kept.
            generation_config (`GenerationConfig`, *optional*):
                Settings instead of the model's own.
            kwargs:
                Generation settings, `num_semantic_tokens`, `duration_conditioning`, `text_guidance_scale` and `num_candidates`
                among them; see [`IndexTTS2GenerationConfig`]. The cache is `cache`, or `past_key_values`, its older name.

        Returns:
            `torch.LongTensor` of shape `(batch_size, num_generated)`: semantic ids without the start id; a row that ended
            holds the stop id and is filled with it. With `return_dict_in_generate=True` the stock output, whose
            `sequences` are these; with `num_candidates` all else in it is of all candidates.

        Raises:
            ValueError: the prefix is missing or given twice, a count is impossible for this checkpoint, or both candidates and
                several sequences are asked for.
        """
        generation_config, kwargs = self._prepare_generation_config(generation_config, **kwargs)
        cache = one_cache(kwargs.pop("cache", None), kwargs.pop("past_key_values", None))
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        if (inputs_embeds is None) == (input_ids is None):
            raise ValueError(
                "`generate` takes either text (`input_ids` with `speaker_latents`) or a prefix made by `prepare_prefix` "
                f"(`inputs_embeds`), but got {'neither' if input_ids is None else 'both'}."
            )
        text = (text_ids, None) if input_ids is None else (input_ids, attention_mask)
        if inputs_embeds is None:
            inputs_embeds, attention_mask = self.prepare_prefix(
                input_ids,
                attention_mask,
                speaker_latents=speaker_latents,
                emotion_embeds=emotion_embeds,
                num_semantic_tokens=getattr(generation_config, "num_semantic_tokens", None),
                duration_conditioning=getattr(generation_config, "duration_conditioning", None),
            )
        batch_size, prompt_length = inputs_embeds.shape[:2]
        if attention_mask is None:
            attention_mask = inputs_embeds.new_ones((batch_size, prompt_length), dtype=torch.long)
        # Logits processors see these ids in place of the prefix; the last one is the start token's row.
        placeholder_ids = attention_mask.new_full((batch_size, prompt_length), self.config.prefix_placeholder_token_id)
        placeholder_ids[:, -1] = self.config.semantic_start_token_id
        if getattr(generation_config, "text_guidance_scale", 1.0) > 1.0:
            kwargs["textless_embeds"], kwargs["textless_mask"] = self.without_text(inputs_embeds, attention_mask)
        is_sampled = generation_config.do_sample and (generation_config.num_beams or 1) == 1
        num_candidates = getattr(generation_config, "num_candidates", 1) if is_sampled else 1
        is_dict_asked = generation_config.return_dict_in_generate
        if num_candidates > 1:
            if (generation_config.num_return_sequences or 1) > 1:
                raise ValueError(
                    f"Both `num_candidates` ({num_candidates}) and `num_return_sequences` ({generation_config.num_return_sequences}) "
                    "are above 1: all sequences of a row, or the best of them. Give 1 for one of the two."
                )
            generation_config.num_return_sequences = num_candidates
            generation_config.return_dict_in_generate = generation_config.output_logits = True

        output = super().generate(
            input_ids=placeholder_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            prefix_length=attention_mask.sum(dim=1, keepdim=True) - 1,
            generation_config=generation_config,
            **kwargs,
        )
        if isinstance(output, torch.Tensor):
            return output[:, prompt_length:]
        output.sequences = output.sequences[:, prompt_length:]
        if num_candidates > 1:
            stop_id = self.config.semantic_stop_token_id
            scores = mean_log_probs(output.sequences, output.logits, stop_id)
            if self.text_recognizer is not None and text[0] is not None:
                lengths = (output.sequences != stop_id).cumprod(dim=1).sum(dim=1)
                pieces, num_pieces = (
                    part.repeat_interleave(num_candidates, dim=0) for part in self._frame_text(*text)
                )
                scores = scores + self.text_recognizer(
                    output.sequences, lengths.clamp(min=1), pieces[:, 1:-1], num_pieces
                )
            output.sequences = output.sequences[best_candidates(scores, output.sequences, num_candidates, stop_id)]
        return output if is_dict_asked else output.sequences

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict]:
        # Ours first: the stock method would hand a count to `forward`, and ignore a None.
        options = {name: kwargs.pop(name, None) for name in OWN_SETTINGS}
        for name in ("min_length", "max_length"):
            given = (
                kwargs.get(name),
                *(getattr(config, name, None) for config in (generation_config, self.generation_config)),
            )
            if any(given):
                raise ValueError(
                    f"`{name}` is {next(filter(None, given))}, but it would count the rows of the prefix as well. "
                    f"Give `{name.replace('length', 'new_tokens')}` instead."
                )
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        generation_config.max_length = None
        most_new_tokens = self.config.max_semantic_tokens + 1  # the stop token counts
        if generation_config.max_new_tokens is None:
            generation_config.max_new_tokens = most_new_tokens
        for name, value in options.items():
            if value is not None:
                setattr(generation_config, name, value)
        check_text_guidance_scale(getattr(generation_config, "text_guidance_scale", 1.0))
        check_num_candidates(getattr(generation_config, "num_candidates", 1))

        counts = check_num_semantic_tokens(getattr(generation_config, "num_semantic_tokens", None))
        if counts is not None:
            asked = [count for count in (counts if isinstance(counts, list) else [counts]) if count is not None]
            largest = max(asked, default=0)
            if largest > self.config.max_semantic_tokens:
                raise ValueError(
                    f"`num_semantic_tokens` is {largest} but this checkpoint has positions for at most "
                    f"{self.config.max_semantic_tokens} ({self.config.max_semantic_tokens / self.config.semantic_token_rate:.1f} s). "
                    "Split the text with `processor.split_text` and synthesise the parts."
                )
            min_new_tokens = generation_config.min_new_tokens or 0
            if min(asked, default=min_new_tokens) < min_new_tokens:
                raise ValueError(
                    f"`num_semantic_tokens` is {min(asked)} but `min_new_tokens` is {min_new_tokens}: give one of them."
                )
            generation_config.num_semantic_tokens = counts
            is_free = isinstance(counts, list) and None in counts
            floor = generation_config.max_new_tokens if is_free else 0
            generation_config.max_new_tokens = max(largest + 1, floor)
        if generation_config.max_new_tokens > most_new_tokens:
            raise ValueError(
                f"`max_new_tokens` is {generation_config.max_new_tokens} but this checkpoint has positions for "
                f"{self.config.max_semantic_tokens} semantic tokens and a stop token: give at most {most_new_tokens}."
            )
        # A model without a generation config, as it comes from its constructor, knows its ids all the same.
        for name, default in (
            ("bos_token_id", self.config.semantic_start_token_id),
            ("eos_token_id", self.config.semantic_stop_token_id),
            ("pad_token_id", self.config.semantic_stop_token_id),
            ("suppress_tokens", [self.config.semantic_start_token_id]),
        ):
            if getattr(generation_config, name) is None:
                setattr(generation_config, name, default)
        return generation_config, model_kwargs

    def _get_logits_processor(
        self,
        generation_config: GenerationConfig,
        input_ids_seq_length: int | None = None,
        encoder_input_ids: torch.Tensor | None = None,
        prefix_allowed_tokens_fn=None,
        logits_processor: LogitsProcessorList | None = None,
        **kwargs: Any,
    ) -> LogitsProcessorList:
        given = list(logits_processor or [])
        seeded = [processor for processor in given if isinstance(processor, SeededSamplingLogitsProcessor)]
        if seeded and generation_config.num_beams > 1:
            raise ValueError(
                f"Seeded sampling row by row needs one beam, but `num_beams` is {generation_config.num_beams}: beams of "
                "one row share their draws. Use `num_beams=1`, or `torch.manual_seed` for a whole batch."
            )
        processors = super()._get_logits_processor(
            generation_config,
            input_ids_seq_length,
            encoder_input_ids,
            prefix_allowed_tokens_fn,
            LogitsProcessorList(processor for processor in given if processor not in seeded),
            **kwargs,
        )
        counts = getattr(generation_config, "num_semantic_tokens", None)
        if counts is not None:
            batch_size = encoder_input_ids.shape[0]
            counts = counts if isinstance(counts, list) else [counts] * batch_size
            if len(counts) != batch_size:
                raise ValueError(
                    f"`num_semantic_tokens` has {len(counts)} counts for a batch of {batch_size} rows. "
                    "Give one number for all rows or one for each."
                )
            processors.insert(
                0,
                SemanticTokenCountLogitsProcessor(counts, input_ids_seq_length, self.config.semantic_stop_token_id),
            )
        scale = getattr(generation_config, "text_guidance_scale", 1.0)
        if scale > 1.0:
            # The first of all, for it makes one row of two.
            processors.insert(0, TextGuidanceLogitsProcessor(scale))
        processors.extend(seeded)
        return processors

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        prefix_length: torch.LongTensor | None = None,
        textless_embeds: torch.Tensor | None = None,
        textless_mask: torch.LongTensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if textless_mask is not None:
            # Text guidance: behind all rows the same ones without their text.
            if attention_mask is None:  # stock: where nothing is masked
                attention_mask = torch.ones_like(input_ids)
            generated_mask = attention_mask[:, textless_mask.shape[1] :]
            attention_mask = torch.cat([attention_mask, torch.cat([textless_mask, generated_mask], dim=1)])
            input_ids = input_ids.repeat(2, 1)
            inputs_embeds = torch.cat([inputs_embeds, textless_embeds])
            prefix_length = prefix_length.repeat(2, 1)
            kwargs["position_ids"] = kwargs["position_ids"].repeat(2, 1)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{CACHE_NAME: one_cache(cache, past_key_values)},
            **kwargs,
        )
        # `forward` calls text `input_ids` and what is generated `semantic_ids`.
        semantic_ids = model_inputs.pop("input_ids", None)
        position_ids = model_inputs.pop("position_ids")
        if not is_first_iteration:
            semantic_positions = position_ids - prefix_length
            if self.config.skip_semantic_position_one:
                # Parity: the released checkpoint feeds the start token at position 0 and the first code at position 2.
                semantic_positions = semantic_positions + (semantic_positions > 0)
            model_inputs["semantic_ids"] = semantic_ids
            model_inputs["position_ids"] = semantic_positions
        return model_inputs

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        is_given = model_kwargs.get(CACHE_NAME) is not None
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get(CACHE_NAME)
        if not is_given and type(cache) is DynamicCache:
            cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]

    def _reorder_cache(self, cache: Cache, beam_idx: torch.LongTensor) -> Cache:
        # Under text guidance the rows without text are behind all the others.
        num_rows = cache.layers[0].keys.shape[0]
        if num_rows == 2 * len(beam_idx):
            beam_idx = torch.cat([beam_idx, beam_idx + len(beam_idx)])
        cache.reorder_cache(beam_idx)
        return cache


__all__ = [
    "IndexTTS2GenerationConfig",
    "SeededSamplingLogitsProcessor",
    "SemanticTokenCountLogitsProcessor",
    "TextGuidanceLogitsProcessor",
]
