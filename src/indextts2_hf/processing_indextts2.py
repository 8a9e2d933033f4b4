"""
The processor of IndexTTS2: text, recordings and emotion weights to the tensors that the model takes.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from .emotion import check_emotion_weights, scale_emotion_weights
from .feature_extraction_indextts2 import AudioInput, IndexTTS2FeatureExtractor


# A word as written, with the marks behind it; a Chinese character is one.
_LETTER_OF_CJK = (
    r"[\u1100-\u11ff\u2e80-\u2fff\u3041-\ua4cf\ua840-\ud7af\uf900-\ufaff\uff66-\uffdc\U00020000-\U0002ffff]"
)
_WORD = re.compile(rf"{_LETTER_OF_CJK}|(?!{_LETTER_OF_CJK})\w(?:(?!{_LETTER_OF_CJK})\S)*")
_SENTENCE_ENDS, _PAUSES = ".!?…。！？", ",;:-–—，；：、"
# How many words a mark may pull a cut that is not known exactly, and how many words behind a cut are looked at.
_PULL_OF_A_MARK, _NUM_WORDS_AHEAD = 2, 30

EmotionWeights = Sequence[float] | Mapping[str, float] | torch.Tensor


def _find_words(text: str) -> tuple[list[int], list[str]]:
    """Where each word of a text begins, marks before it included, and its letters and digits alone, in one case."""
    starts, keys, end = [], [], 0
    for match in _WORD.finditer(text):
        between = text[end : match.start()]
        own = re.search(r"\S*$", between)[0]
        if own == between:
            # Directly behind another one: what stands between them is the other's, but for opening marks.
            while own and unicodedata.category(own[0]) not in ("Ps", "Pi"):
                own = own[1:]
        starts.append(match.start() - len(own))
        keys.append("".join(filter(str.isalnum, match[0])).casefold())
        end = match.end()
    return starts, keys


def _kind_of_end(text: str) -> str:
    """The kind of the mark that ends a text, quotes and brackets left out; empty if there is none."""
    mark = text.rstrip(" \t\r\n\"'”’»)]}」』》）】")[-1:]
    return next((kind for kind in (_SENTENCE_ENDS, _PAUSES) if mark and mark in kind), "")


def cut_as_spoken(text: str, segments: list[str]) -> list[str]:
    r"""
    A written text cut where its spoken segments are.

    Words that are in both are found (`difflib`); what normalisation has changed is shared out between them. Cuts are at borders of
    words, or between Chinese characters.

    Args:
        text (`str`): as written.
        segments (`list[str]`): the same, normalised, from [`~IndexTTS2Processor.split_text`].

    Returns:
        `list[str]`: as many; joined they are the text, but for white space at the cuts. One is empty where its segment lies within a word.
    """
    starts, words = _find_words(text)
    spoken = [_find_words(segment)[1] for segment in segments]
    cuts, begin = [0], 0
    for index, ours in enumerate(spoken[:-1]):
        ahead: list[str] = []
        for others in spoken[index + 1 :]:
            if len(ahead) >= _NUM_WORDS_AHEAD:
                break
            ahead += others
        window = words[begin : begin + 2 * len(ours) + _NUM_WORDS_AHEAD + 20]
        matcher = SequenceMatcher(None, window, ours + ahead[:_NUM_WORDS_AHEAD], autojunk=False)
        # The last word before the cut and the first one behind it that are in both; then what is between them.
        left, left_spoken, right, right_spoken = 0, 0, len(window), len(ours) + len(ahead[:_NUM_WORDS_AHEAD])
        for place, place_spoken, size in matcher.get_matching_blocks():
            num_before = min(size, max(0, len(ours) - place_spoken))
            if num_before:
                left, left_spoken = place + num_before, place_spoken + num_before
            if num_before < size:
                right, right_spoken = place + num_before, place_spoken + num_before
                break
        num_before, num_behind = len(ours) - left_spoken, right_spoken - len(ours)
        if num_before and num_behind:
            target = left + (right - left) * num_before / (num_before + num_behind)
            # Of two words or more each side has one; a single one is where it begins.
            borders = range(left + 1, right) if right - left > 1 else [right]
        else:
            target = left if num_behind else right
            borders = range(left, right + 1)
        kind = _kind_of_end(segments[index])

        def distance(border: int, target: float = target, kind: str = kind, begin: int = begin) -> float:
            end = starts[begin + border] if begin + border < len(starts) else len(text)
            before = text[max(0, end - 20) : end]
            return abs(border - target) - _PULL_OF_A_MARK * (kind != "" and _kind_of_end(before) == kind)

        begin += min(borders, key=distance)
        cuts.append(starts[begin] if begin < len(starts) else len(text))
    cuts.append(len(text))
    return [text[start:end].strip() for start, end in zip(cuts, cuts[1:], strict=False)]


class IndexTTS2Processor(ProcessorMixin):
    r"""
    Turns what a user gives into model inputs.

    Args:
        feature_extractor ([`IndexTTS2FeatureExtractor`]): for recordings.
        tokenizer ([`IndexTTS2Tokenizer`]): for text.
        max_text_tokens (`int`, defaults to 120): most text tokens in one segment.
    """

    def __init__(
        self,
        feature_extractor: IndexTTS2FeatureExtractor,
        tokenizer: PreTrainedTokenizerBase,
        max_text_tokens: int = 120,
    ):
        self.max_text_tokens = max_text_tokens
        super().__init__(feature_extractor, tokenizer)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "emotion_weights", *self.feature_extractor.model_input_names]

    def split_text(self, text: str, max_text_tokens: int | None = None) -> list[str]:
        """
        The segments a text is spoken in, as normalised text; at most `max_text_tokens` tokens each.

        Raises:
            ValueError: there is nothing to speak.
        """
        segments = self.tokenizer.split_text(
            text, self.max_text_tokens if max_text_tokens is None else max_text_tokens
        )
        return [self.tokenizer.convert_tokens_to_string(pieces) for pieces in segments]

    def split_written_text(self, text: str, max_text_tokens: int | None = None) -> list[str]:
        """
        The same segments as they are written, for subtitles: see [`cut_as_spoken`].

        Raises:
            ValueError: there is nothing to speak.
        """
        return cut_as_spoken(text, self.split_text(text, max_text_tokens))

    def __call__(
        self,
        text: str | list[str],
        speaker_audio: AudioInput | None = None,
        emotion_audio: AudioInput | None = None,
        emotion_weights: EmotionWeights | Sequence[EmotionWeights | None] | None = None,
        emotion_strength: float | list[float] = 1.0,
        max_text_tokens: int | None = None,
        quick_streaming_tokens: int = 0,
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        r"""
        Args:
            text (`str` or `list[str]`):
                One text or several, of any length.
            speaker_audio (path, bytes, `(array, rate)` or audio `dict`, *optional*):
                A recording of the voice, for all texts. Its first `max_audio_s` are used. To use it more than once, make a
                `VoicePrompt` of it instead.
            emotion_audio (path, bytes, `(array, rate)` or audio `dict`, *optional*):
                A recording of the emotion, for all texts.
            emotion_weights (eight numbers, a `dict` of names, or one of these (or `None`) for each text, *optional*):
                Intensities in the order of `EMOTIONS`, each 0–1.2.
            emotion_strength (`float`, or one for each text, defaults to 1.0):
                0–1, how much of `emotion_weights` is used.
            max_text_tokens (`int`, *optional*):
                Most text tokens in one segment, instead of the processor's own.
            quick_streaming_tokens (`int`, defaults to 0):
                Keeps the first segments short until that many tokens have passed, for an early start.
            return_tensors (`str`, defaults to `"pt"`):
                Only PyTorch tensors can be had.

        Returns:
            `BatchFeature` with `input_ids` and `attention_mask` of shape `(num_texts, text_length)`, padded on the left, in
            which the end-of-sequence id separates the segments of a text; `emotion_weights` of shape `(num_texts, 8)`, scaled,
            when they are given (NaN in rows without any); and what the feature extractor makes of the recordings.

        Raises:
            ValueError: no text, nothing in it to speak, a recording or weights that cannot be used, or two kinds of emotion.
        """
        if kwargs:
            raise TypeError(f"IndexTTS2Processor takes no {', '.join(map(repr, kwargs))}.")
        if return_tensors != "pt":
            raise ValueError(
                f"`return_tensors` is {return_tensors!r}, but IndexTTS2 works with PyTorch tensors: use 'pt'."
            )
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list | tuple) or not texts or not all(isinstance(item, str) for item in texts):
            raise ValueError(f"`text` must be a string or a list of at least one string, but it is {text!r}.")
        if emotion_audio is not None and emotion_weights is not None:
            raise ValueError("Both `emotion_audio` and `emotion_weights` were given: give one emotion.")

        if max_text_tokens is None:
            max_text_tokens = self.max_text_tokens
        separator = self.tokenizer.eos_token_id
        rows = []
        for item in texts:
            segments = self.tokenizer.split_text(item, max_text_tokens, quick_streaming_tokens)
            ids = [
                token_id
                for pieces in segments
                for token_id in [*self.tokenizer.convert_tokens_to_ids(pieces), separator]
            ]
            rows.append(ids[:-1])
        length = max(map(len, rows))
        data = {
            "input_ids": torch.tensor([[self.tokenizer.pad_token_id] * (length - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        }
        if speaker_audio is not None or emotion_audio is not None:
            data |= self.feature_extractor(speaker_audio=speaker_audio, emotion_audio=emotion_audio)
        if emotion_weights is not None:
            data["emotion_weights"] = self._weigh(emotion_weights, emotion_strength, len(texts))
        return BatchFeature(data)

    def _weigh(
        self,
        emotion_weights: EmotionWeights | Sequence[EmotionWeights | None],
        emotion_strength: float | list[float],
        num_texts: int,
    ) -> torch.Tensor:
        """Checked and scaled weights of shape `(num_texts, 8)`."""
        is_one_for_each = not isinstance(emotion_weights, Mapping | str) and any(
            item is None or isinstance(item, Mapping) or np.ndim(item) > 0
            for item in (emotion_weights if np.iterable(emotion_weights) else [])
        )
        given = list(emotion_weights) if is_one_for_each else [emotion_weights] * num_texts
        if len(given) != num_texts:
            raise ValueError(
                f"`emotion_weights` has {len(given)} rows for {num_texts} text(s): give one for all or one for each."
            )
        strengths = list(emotion_strength) if np.ndim(emotion_strength) else [emotion_strength] * num_texts
        if len(strengths) != num_texts:
            raise ValueError(
                f"`emotion_strength` has {len(strengths)} values for {num_texts} text(s): give one for all or one for each."
            )
        return torch.tensor(
            [
                [float("nan")] * 8
                if row is None
                else scale_emotion_weights(check_emotion_weights(row), float(strength))
                for row, strength in zip(given, strengths, strict=True)
            ]
        )


__all__ = ["IndexTTS2Processor", "cut_as_spoken"]
