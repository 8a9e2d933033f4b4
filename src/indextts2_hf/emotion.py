"""
The eight emotions: their order, the rules for their weights, and the language model that reads weights from a text.

The file knows no audio. How weights become a vector is in the text-to-semantic model.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Self

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging


logger = logging.get_logger(__name__)

EMOTIONS = ("happy", "angry", "sad", "afraid", "disgusted", "melancholic", "surprised", "calm")

# Largest weight: what the language model may give. 1 is full intensity.
MAX_WEIGHT = 1.2

# Factors of the eight emotions in `balance_emotion_weights`, and the largest sum it leaves.
BALANCE_BIAS = (0.9375, 0.875, 1.0, 1.0, 0.9375, 0.9375, 0.6875, 0.5625)
BALANCE_MAX_SUM = 0.8

# The language model: its task, its names of the emotions, and how it may name one instead of scoring eight.
SYSTEM_MESSAGE = "文本情感分类"
CHINESE_EMOTIONS = ("高兴", "愤怒", "悲伤", "恐惧", "反感", "低落", "惊讶", "自然")
LABEL_KEYS = ("emotion", "emotion_label", "label", "情感", "情绪")
MELANCHOLY_WORDS = ("低落", "melancholy", "melancholic", "depression", "depressed", "gloomy")
SCORE_PATTERN = re.compile(rf"({'|'.join(CHINESE_EMOTIONS)})[\"']?\s*[:：]\s*[\"']?(-?\d+(?:\.\d+)?)")

# An answer with all eight scores is about 80 tokens; the original lets a run-away answer go on to 32768.
MAX_NEW_TOKENS = 256

# `</think>` in the vocabulary of Qwen3, for a tokenizer that does not have it by name.
THINK_END_TOKEN = "</think>"
THINK_END_TOKEN_ID = 151668


def check_emotion_weights(emotion_weights: Sequence[float] | Mapping[str, float] | torch.Tensor) -> list[float]:
    r"""
    Emotion weights as a list, if they are valid.

    A sum above 1 is allowed and logged once: the eight vectors then outweigh the speaker's own emotion, which is
    subtracted.

    Args:
        emotion_weights (`Sequence[float]`, `Mapping[str, float]` or `torch.Tensor` of shape `(8,)`):
            Intensities in the order of `EMOTIONS`, or by name, those not named being 0. Each from 0 to 1.2; 1 is full.

    Returns:
        `list[float]`: eight weights in the order of `EMOTIONS`.

    Raises:
        `ValueError`: not eight numbers, an unknown name, or a weight out of range or not finite.
    """
    weights = _read_weights(emotion_weights)
    if sum(weights) > 1.0 + 1e-6:
        logger.warning_once(
            f"`emotion_weights` sum to {sum(weights):.2f}: above 1 the speaker's own emotion is subtracted, which can "
            "sound exaggerated. Scale them with `balance_emotion_weights` if it does."
        )
    return weights


def _read_weights(emotion_weights: Sequence[float] | Mapping[str, float] | torch.Tensor) -> list[float]:
    if isinstance(emotion_weights, Mapping):
        for name in emotion_weights:
            if name not in EMOTIONS:
                raise ValueError(
                    f"`emotion_weights` names {name!r}, which is none of the eight emotions. Use {', '.join(EMOTIONS)}."
                )
        emotion_weights = [emotion_weights.get(name, 0.0) for name in EMOTIONS]
    try:
        weights = [float(weight) for weight in emotion_weights]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`emotion_weights` is {emotion_weights!r} but must be eight numbers in the order {', '.join(EMOTIONS)}, or a "
            "dictionary with these names."
        ) from error
    if len(weights) != len(EMOTIONS):
        raise ValueError(
            f"`emotion_weights` has {len(weights)} values but there are eight emotions: {', '.join(EMOTIONS)}. Pass one "
            "value each, or a dictionary with the names you need."
        )
    for name, weight in zip(EMOTIONS, weights, strict=True):
        if not 0.0 <= weight <= MAX_WEIGHT + 1e-6:  # also true for NaN; 1.2 in float32 is a little more than 1.2
            raise ValueError(
                f"The weight of {name!r} in `emotion_weights` is {weight} but must be finite and from 0 to {MAX_WEIGHT}. "
                "Pass 0 for absent and 1 for full."
            )
    return weights


def scale_emotion_weights(
    emotion_weights: Sequence[float] | Mapping[str, float] | torch.Tensor, emotion_strength: float
) -> list[float]:
    r"""
    Weights times a strength.

    Args:
        emotion_weights (`Sequence[float]`, `Mapping[str, float]` or `torch.Tensor` of shape `(8,)`):
            As in `check_emotion_weights`.
        emotion_strength (`float`):
            How much of the emotion is used; clamped to 0–1. At 1 the weights stay as they are.

    Returns:
        `list[float]`: eight weights in the order of `EMOTIONS`.
    """
    if math.isnan(emotion_strength):
        raise ValueError("`emotion_strength` is NaN but must be a number from 0 to 1. Pass 1 for the full emotion.")
    weights = _read_weights(emotion_weights)
    strength = min(max(emotion_strength, 0.0), 1.0)
    if strength == 1.0:
        return weights
    # Parity: truncated to four decimals, not rounded.
    return [int(weight * strength * 10000) / 10000 for weight in weights]


def balance_emotion_weights(
    emotion_weights: Sequence[float] | Mapping[str, float] | torch.Tensor, use_bias: bool = True
) -> list[float]:
    r"""
    Weights that sum to 0.8 at most: a helper for sliders, which synthesis itself does not apply.

    Args:
        emotion_weights (`Sequence[float]`, `Mapping[str, float]` or `torch.Tensor` of shape `(8,)`):
            As in `check_emotion_weights`.
        use_bias (`bool`, *optional*, defaults to `True`):
            Turn down first the emotions that come out too strong, most of all `calm` and `surprised`.

    Returns:
        `list[float]`: eight weights in the order of `EMOTIONS`.
    """
    weights = _read_weights(emotion_weights)
    if use_bias:
        weights = [weight * bias for weight, bias in zip(weights, BALANCE_BIAS, strict=True)]
    total = sum(weights)
    if total > BALANCE_MAX_SUM:
        weights = [weight * (BALANCE_MAX_SUM / total) for weight in weights]
    return weights


def read_emotion_answer(text: str, answer: str) -> list[float]:
    r"""
    Weights from what the language model wrote about a text.

    The answer should be a JSON object of eight scores under the Chinese names. Also read: an object cut short or written
    loosely (`name: number` pairs are collected), scores written as strings, and one emotion named in place of scores, in
    Chinese or English: alone, under a key such as `label`, or as the value of a score. What cannot be read counts as 0,
    and eight zeros as calm.

    The language model does not tell melancholic from sad by itself, so if `text` has a word such as "gloomy", the two
    scores are swapped.

    Args:
        text (`str`):
            What the language model was asked about.
        answer (`str`):
            What it wrote, thoughts and special tokens removed.

    Returns:
        `list[float]`: eight weights in the order of `EMOTIONS`, each from 0 to 1.2, at least one above 0.
    """
    try:
        scores = json.loads(answer)
    except (ValueError, RecursionError):
        scores = {name: float(score) for name, score in SCORE_PATTERN.findall(answer)}

    is_melancholic = _is_melancholic(text)
    if isinstance(scores, str) and not is_melancholic:
        scores = {LABEL_KEYS[0]: scores}
    elif not isinstance(scores, dict):
        # Parity: the original fails on other kinds of JSON, and on a label alone if the scores were to be swapped.
        scores = {}
    if is_melancholic:
        # Parity: swapped before labels are read, so a label under a key then counts for nothing.
        scores |= {"悲伤": scores.get("低落", 0.0), "低落": scores.get("悲伤", 0.0)}

    weights = dict.fromkeys(EMOTIONS, 0.0)
    if not any(name in scores for name in CHINESE_EMOTIONS):
        label = next(filter(None, (_find_emotion(scores.get(key)) for key in LABEL_KEYS)), None)
        if label is not None:
            weights[label] = 1.0
    for name, chinese_name in zip(EMOTIONS, CHINESE_EMOTIONS, strict=True):
        score = scores.get(chinese_name, 0.0)
        label = _find_emotion(score)
        if label is not None:
            weights[label] = 1.0
            continue
        try:
            score = float(score)
        except (TypeError, ValueError, OverflowError):
            continue
        weights[name] = max(weights[name], min(max(0.0, score), MAX_WEIGHT))  # in this order NaN gives 0
    if not any(weights.values()):
        weights["calm"] = 1.0
    return list(weights.values())


def emotion_scores(
    text: str, emotion_weights: Sequence[float] | Mapping[str, float] | torch.Tensor
) -> dict[str, float]:
    r"""
    The answer that [`read_emotion_answer`] reads as these weights, which is what a language model is taught to write about a
    text: all eight scores in the order of `EMOTIONS`, under the Chinese names, in hundredths. As JSON it is the answer.

    Args:
        text (`str`):
            What the language model is asked about. If it has a word such as "gloomy", the scores of sad and melancholic
            stand swapped, because the reader swaps them.
        emotion_weights (`Sequence[float]`, `Mapping[str, float]` or `torch.Tensor` of shape `(8,)`):
            As in `check_emotion_weights`.

    Returns:
        `dict[str, float]`: score of each Chinese name.

    Raises:
        `ValueError`: all scores are 0, which is read as calm.
    """
    scores = [round(weight, 2) for weight in _read_weights(emotion_weights)]
    if not any(scores):
        raise ValueError(
            "All eight `emotion_weights` are below 0.005: an answer of eight zeros is read as calm. Give calm a weight."
        )
    scores = dict(zip(CHINESE_EMOTIONS, scores, strict=True))
    if _is_melancholic(text):
        scores |= {"悲伤": scores["低落"], "低落": scores["悲伤"]}
    return scores


def _is_melancholic(text: str) -> bool:
    return any(word in text.lower() for word in MELANCHOLY_WORDS)


def _find_emotion(label: object) -> str | None:
    """The English name of an emotion given in Chinese or English, any case; `None` for anything else."""
    if not isinstance(label, str):
        return None
    label = label.strip().lower()
    return dict(zip(CHINESE_EMOTIONS + EMOTIONS, EMOTIONS * 2, strict=True)).get(label)


def _drop_thoughts(ids: list[int], think_end: int) -> list[int]:
    """The ids after the last end of thought, or all of them if there is none."""
    return ids[len(ids) - ids[::-1].index(think_end) :] if think_end in ids else ids


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Random numbers from `seed` inside, the old random state outside; without a seed nothing changes."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class EmotionTextModel:
    r"""
    Reads the emotion of a text: a causal language model that was taught to answer with eight scores.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The causal language model. Device and dtype are the caller's: move `model`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, with a chat template and a padding token.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        if tokenizer.chat_template is None or tokenizer.pad_token_id is None:
            missing = "chat template" if tokenizer.chat_template is None else "padding token"
            raise ValueError(
                f"The tokenizer of the emotion language model has no {missing}. Use the tokenizer saved with the model, or "
                "pass `emotion_weights` instead of a text."
            )
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        subfolder: str = "emotion_text",
        dtype: str | torch.dtype = "auto",
        **kwargs,
    ) -> Self:
        r"""
        Load from a checkpoint folder.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A local folder or a repository on the Hub.
            subfolder (`str`, *optional*, defaults to `"emotion_text"`):
                The folder in it with the language model and its tokenizer; `""` if that is the folder itself.
            dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
                Dtype of the weights; `"auto"` for that of the file.
            kwargs (*optional*):
                `revision`, `token`, `cache_dir`, `local_files_only`, as in the `from_pretrained` of transformers.

        Raises:
            `OSError`: there is no language model in the folder.
        """
        path = str(pretrained_model_name_or_path)
        no_model = (
            f"There is no emotion language model under {subfolder!r} in {path!r}. It is an optional part of a checkpoint: "
            "add it there, or pass `emotion_weights` instead of a text."
        )
        if os.path.isdir(path) and not os.path.isfile(os.path.join(path, subfolder, "config.json")):
            raise OSError(no_model)
        if os.path.isdir(path):
            # transformers 5.23 reads the generation settings of a local folder from its root, whatever `subfolder` says.
            path, subfolder = os.path.join(path, subfolder), ""
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, subfolder=subfolder, **kwargs)
            model = AutoModelForCausalLM.from_pretrained(path, subfolder=subfolder, dtype=dtype, **kwargs)
        except OSError as error:
            raise OSError(no_model) from error
        return cls(model, tokenizer)

    def save_pretrained(self, save_directory: str | os.PathLike, subfolder: str = "emotion_text") -> None:
        """Write model and tokenizer where `from_pretrained` finds them."""
        path = os.path.join(save_directory, subfolder)
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)

    def __call__(
        self, texts: str | list[str], seed: int | None = None, max_new_tokens: int = MAX_NEW_TOKENS
    ) -> torch.Tensor:
        r"""
        Emotion weights of each text.

        The model's own generation config decides whether its answers are sampled. If so, they depend on the random state
        and on the other texts of the call; ask one by one, with a seed, to have the same answer again.

        Args:
            texts (`str` or `list[str]`):
                What is to be read with emotion, or a description of the emotion.
            seed (`int`, *optional*):
                Seed for sampled answers. The random state outside is left as it was.
            max_new_tokens (`int`, *optional*, defaults to 256):
                Longest answer in tokens. Scores in an answer that is cut are still read.

        Returns:
            `torch.Tensor` of shape `(batch_size, 8)`, float32 on the CPU: weights in the order of `EMOTIONS`, each from 0
            to 1.2.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        answers = self.write_answers(texts, seed=seed, max_new_tokens=max_new_tokens)
        return torch.tensor([read_emotion_answer(text, answer) for text, answer in zip(texts, answers, strict=True)])

    def format_prompts(self, texts: list[str]) -> list[str]:
        r"""
        What the language model continues with its answer: the task, a text, the beginning of its turn without a thought.

        Args:
            texts (`list[str]`):
                As in `__call__`.

        Returns:
            `list[str]`: a prompt for each, special tokens included.
        """
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(
                f"`texts` is {texts!r} but must be one or more texts that are not empty. Pass what to read."
            )
        messages = [
            [{"role": "system", "content": SYSTEM_MESSAGE}, {"role": "user", "content": text}] for text in texts
        ]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )

    @torch.no_grad()
    def write_answers(
        self, texts: list[str], seed: int | None = None, max_new_tokens: int = MAX_NEW_TOKENS
    ) -> list[str]:
        """
        What the language model answers about each text, as it is, thoughts and special tokens left out. Arguments are those
        of `__call__`.
        """
        device = self.model.device
        inputs = self.tokenizer(
            self.format_prompts(texts),
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(device)

        with _seeded(seed, device):
            sequences = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        think_end = self.tokenizer.convert_tokens_to_ids(THINK_END_TOKEN)
        if think_end is None or think_end == self.tokenizer.unk_token_id:
            think_end = THINK_END_TOKEN_ID
        new_ids = sequences[:, inputs["input_ids"].shape[1] :].tolist()
        return [self.tokenizer.decode(_drop_thoughts(ids, think_end), skip_special_tokens=True) for ids in new_ids]


__all__ = [
    "EMOTIONS",
    "EmotionTextModel",
    "balance_emotion_weights",
    "check_emotion_weights",
    "emotion_scores",
    "read_emotion_answer",
    "scale_emotion_weights",
]
