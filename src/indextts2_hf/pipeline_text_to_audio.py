"""
The front door: `IndexTTS2TextToAudioPipeline`, text to speech with a voice, an emotion and a length, all by name.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self, TypedDict, overload

import numpy as np
import torch
from huggingface_hub import snapshot_download
from transformers import BatchFeature, TextToAudioPipeline

from .configuration_indextts2 import resolve_checkpoint
from .emotion import EmotionTextModel
from .modeling_indextts2 import IndexTTS2ForTextToWaveform, IndexTTS2Output, IndexTTS2Segment
from .processing_indextts2 import EmotionWeights, IndexTTS2Processor


if TYPE_CHECKING:
    from .pipeline_s2m import VoicePrompt


# Arguments of the processor and of this pipeline's own steps; all others go to the model.
_PREPROCESS_NAMES = ("emotion_weights", "emotion_text", "max_text_tokens", "quick_streaming_tokens")
_EMOTION_NAMES = ("emotion_audio", "emotion_features", "emotion_weights", "emotion_text")
_HUB_NAMES = ("cache_dir", "local_files_only", "token", "revision")

# By which the path of a missing file is told from a repository.
_FILE_ENDINGS = (".aac", ".aif", ".aiff", ".au", ".caf", ".flac", ".m4a", ".mp3", ".mp4", ".oga", ".ogg", ".opus")
_FILE_ENDINGS += (".safetensors", ".wav", ".webm", ".wma")

# Operations of a smaller model are too short to be shared among threads.
_THREADED_PARAMETERS = 100_000_000


def set_num_threads(model: torch.nn.Module, num_threads: int | None = None) -> None:
    r"""
    Sets the CPU threads of this process to what suits a model. The operations of a model below 100 M parameters are short: two
    threads are faster than one where cores are free, and many times slower where they are not. It gets two at most, and one on
    a machine that is busy by its load average. A larger model keeps the threads of torch. For programs to call; nothing in
    the package does so by itself.

    Args:
        model (`torch.nn.Module`):
            What is going to run.
        num_threads (`int`, *optional*):
            So many instead. Otherwise the environment variable `INDEXTTS2_THREADS` says it, or `OMP_NUM_THREADS`, which torch has read.

    Raises:
        ValueError: it is no whole number of at least 1.
    """
    name, given = "num_threads", num_threads
    if given is None:
        name, given = "INDEXTTS2_THREADS", os.environ.get("INDEXTTS2_THREADS")
    if given not in (None, ""):
        if not (str(given).isdecimal() and int(given) >= 1):
            raise ValueError(
                f"`{name}` is {given!r}, but it must be a whole number of at least 1. Leave it out for what suits."
            )
        torch.set_num_threads(int(given))
    elif not os.environ.get("OMP_NUM_THREADS") and sum(p.numel() for p in model.parameters()) < _THREADED_PARAMETERS:
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # Windows has none
        free = (os.cpu_count() or 1) - load
        torch.set_num_threads(2 if free >= 1.5 else 1)


class Speech(TypedDict):
    """
    What the pipeline gives for one text: `audio`, float32 of shape `(num_samples,)` in [-1, 1], and its `sampling_rate` in Hz.
    """

    audio: np.ndarray
    sampling_rate: int


class IndexTTS2TextToAudioPipeline(TextToAudioPipeline):
    r"""
    Text-to-speech with IndexTTS2. Made by
    `pipeline("text-to-speech", model=FOLDER, pipeline_class=IndexTTS2TextToAudioPipeline)` or by `from_pretrained`.

    Everything that the stock pipeline takes keeps working; in addition the arguments of `__call__` have names.

    Args:
        emotion_text_model ([`EmotionTextModel`], *optional*):
            Language model that reads `emotion_text`; by default the checkpoint's own, loaded when it is first needed.
    """

    model: IndexTTS2ForTextToWaveform
    processor: IndexTTS2Processor

    def __init__(self, *args: Any, emotion_text_model: EmotionTextModel | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.emotion_text_model = emotion_text_model
        self._hub_arguments: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None = None,
        device: str | torch.device = "cpu",
        **kwargs: Any,
    ) -> Self:
        """
        The pipeline of a checkpoint or of an adapter: a folder, a Hub repository, or by default `"tiny"`, the small checkpoint that
        comes with the package (a folder of that name in the current directory is `"./tiny"`). `kwargs` go to
        [`IndexTTS2ForTextToWaveform.from_pretrained`].
        """
        pretrained_model_name_or_path = resolve_checkpoint(pretrained_model_name_or_path)
        model = IndexTTS2ForTextToWaveform.from_pretrained(pretrained_model_name_or_path, **kwargs)
        hub_arguments = {name: kwargs[name] for name in _HUB_NAMES if name in kwargs}
        checkpoint = model.config.name_or_path
        if checkpoint != str(pretrained_model_name_or_path):
            # An adapter was asked for, and so was its revision; everything else is its base's.
            hub_arguments.pop("revision", None)
            if model.t2s.revision is not None:
                hub_arguments["revision"] = model.t2s.revision
        processor = IndexTTS2Processor.from_pretrained(checkpoint, **hub_arguments)
        pipeline = cls(model=model, processor=processor, tokenizer=processor.tokenizer, device=device)
        pipeline._hub_arguments = hub_arguments
        return pipeline

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Writes the whole checkpoint folder: model, processor and, where one was loaded, the emotion language model."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)
        if self.emotion_text_model is not None:
            self.emotion_text_model.save_pretrained(save_directory)

    @overload
    def __call__(
        self,
        text: str,
        *,
        voice: Any = None,
        emotion_audio: Any = None,
        emotion_weights: EmotionWeights | None = None,
        emotion_text: str | bool | None = None,
        emotion_strength: float = 1.0,
        duration_s: float | None = None,
        num_semantic_tokens: int | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> Speech: ...

    @overload
    def __call__(
        self,
        text: list[str] | tuple[str, ...],
        *,
        voice: Any = None,
        emotion_audio: Any = None,
        emotion_weights: EmotionWeights | Sequence[EmotionWeights | None] | None = None,
        emotion_text: str | Sequence[str | None] | bool | None = None,
        emotion_strength: float | Sequence[float] = 1.0,
        duration_s: float | Sequence[float | None] | None = None,
        num_semantic_tokens: int | Sequence[int | None] | None = None,
        seed: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> list[Speech]: ...

    @overload
    def __call__(
        self,
        text: Iterator[str],
        *,
        voice: Any = None,
        emotion_audio: Any = None,
        emotion_weights: EmotionWeights | None = None,
        emotion_text: str | bool | None = None,
        emotion_strength: float = 1.0,
        duration_s: float | None = None,
        num_semantic_tokens: int | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> Iterator[Speech]: ...

    def __call__(
        self,
        text: str | list[str] | tuple[str, ...] | Iterator[str],
        *,
        voice: Any = None,
        emotion_audio: Any = None,
        emotion_weights: EmotionWeights | Sequence[EmotionWeights | None] | None = None,
        emotion_text: str | list[str | None] | bool | None = None,
        emotion_strength: float | list[float] = 1.0,
        duration_s: float | list[float | None] | None = None,
        num_semantic_tokens: int | list[int | None] | None = None,
        seed: int | list[int] | None = None,
        **kwargs: Any,
    ) -> Speech | list[Speech] | Iterator[Speech]:
        r"""
        Speech for one text or a batch of texts.

        Args:
            text (`str`, `list[str]`, or a generator of strings):
                What to say, of any length. A list is one batch, to which lists of other arguments belong. A generator gives
                a generator of results, one text at a time.
            voice (*optional*):
                Who speaks: a `VoicePrompt`, the name of a voice of the checkpoint, the path of a saved voice
                (`.safetensors`) or of a voice pack (a folder), the Hub repository of one (`owner/name`), or a recording
                (path, bytes, `(array, rate)`, audio `dict`). A list holds one for each text. The checkpoint's default voice
                otherwise.
            emotion_audio (*optional*):
                A recording whose emotion is taken, in the same forms; a list holds one (or `None`) for each text.
            emotion_weights (*optional*):
                Eight intensities (happy, angry, sad, afraid, disgusted, melancholic, surprised, calm) from 0 to 1.2, or a
                `dict` with names; a list of them holds one (or `None`) for each text.
            emotion_text (`str`, `list[str]` or `True`, *optional*):
                A description of the emotion, read by the checkpoint's emotion language model; a list holds one (or `None`)
                for each text; `True` takes the text itself.
            emotion_strength (`float`, or one for each text, defaults to 1.0):
                0–1, how much of the emotion is used.
            duration_s (`float`, or one (or `None`) for each text, *optional*):
                Exact length of the speech in seconds, pauses included.
            num_semantic_tokens (`int`, or one (or `None`) for each text, *optional*):
                Exact number of semantic tokens.
            seed (`int`, or one for each text, *optional*):
                Makes the same call give the same audio.
            kwargs:
                Other arguments of [`~IndexTTS2ForTextToWaveform.stream`] (`num_inference_steps`, `guidance_scale`,
                `segment_silence_s`, `segment_batch_size` …), generation settings (`temperature`, `num_beams` …),
                `max_text_tokens`, and those of the stock pipeline. `batch_size` means `segment_batch_size` for a list.

        Returns:
            A `dict` with `audio`, a float32 array of shape `(num_samples,)`, and `sampling_rate`; for a list of texts a list
            of them.

        Raises:
            ValueError: an input or option cannot be used; the message says which, and what to do.
        """
        arguments = self._named(
            voice=voice,
            emotion_audio=emotion_audio,
            emotion_weights=emotion_weights,
            emotion_text=emotion_text,
            emotion_strength=emotion_strength,
            duration_s=duration_s,
            num_semantic_tokens=num_semantic_tokens,
            seed=seed,
            **kwargs,
        )
        if isinstance(text, list | tuple) and all(isinstance(item, str) for item in text):
            # The stock pipeline takes the items of a list one by one; here they are one batch.
            arguments.pop("num_workers", None)
            if "batch_size" in arguments:
                arguments.setdefault("segment_batch_size", arguments.pop("batch_size"))
            preprocess_params, forward_params, postprocess_params = self._sanitize_parameters(**arguments)
            inputs = self.preprocess(list(text), **(self._preprocess_params | preprocess_params))
            outputs = self.forward(inputs, **(self._forward_params | forward_params))
            return [self.postprocess({"audio": [audio]}, **postprocess_params) for audio in outputs["audio"]]
        return super().__call__(text, **arguments)

    def stream(self, text: str | list[str], **kwargs: Any) -> Iterator[IndexTTS2Segment]:
        """
        The same, segment by segment, each as soon as it is ready: yields [`IndexTTS2Segment`], whose `audio` is a tensor
        without the pauses. Takes the arguments of `__call__`. Whoever leaves the loop ends the call.
        """
        preprocess_params, forward_params, _ = self._sanitize_parameters(**self._named(**kwargs))
        inputs = self.preprocess(text, **(self._preprocess_params | preprocess_params))
        inputs = inputs.to(self.device)
        arguments = {**forward_params["forward_params"], **forward_params["generate_kwargs"]}
        yield from self.model.stream(**inputs, **self._resolve(arguments))

    @staticmethod
    def _named(**kwargs: Any) -> dict[str, Any]:
        """Arguments that were really given."""
        return {name: value for name, value in kwargs.items() if value is not None}

    def _sanitize_parameters(
        self,
        preprocess_params: dict[str, Any] | None = None,
        forward_params: dict[str, Any] | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess_params = dict(preprocess_params or {})
        preprocess_params |= {name: kwargs.pop(name) for name in _PREPROCESS_NAMES if name in kwargs}
        if "emotion_strength" in kwargs:
            preprocess_params.setdefault("emotion_strength", kwargs["emotion_strength"])
        if "emotion_text" in preprocess_params and "seed" in kwargs:
            preprocess_params["seed"] = kwargs["seed"]
        arguments = {**preprocess_params, **kwargs, **(forward_params or {}), **(generate_kwargs or {})}
        given = [name for name in _EMOTION_NAMES if arguments.get(name) is not None and arguments[name] is not False]
        if len(given) > 1:
            raise ValueError(f"Both `{given[0]}` and `{given[1]}` were given: give one emotion.")
        preprocess_params, arguments, postprocess_params = super()._sanitize_parameters(
            preprocess_params=preprocess_params,
            forward_params={**kwargs, **(forward_params or {})},
            generate_kwargs=generate_kwargs,
        )
        # The stock pipeline replaces these two dictionaries whole, and with them what the constructor was given.
        kept = getattr(self, "_forward_params", {})
        arguments = {name: {**kept.get(name, {}), **values} for name, values in arguments.items()}
        return preprocess_params, arguments, postprocess_params

    def preprocess(
        self,
        text: str | list[str],
        emotion_text: str | list[str | None] | bool | None = None,
        seed: int | list[int] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        if emotion_text is not None and emotion_text is not False:
            texts = [text] if isinstance(text, str) else text
            described = texts if emotion_text is True else emotion_text
            described = [described] * len(texts) if isinstance(described, str) else list(described)
            if len(described) != len(texts):
                raise ValueError(
                    f"`emotion_text` has {len(described)} descriptions for {len(texts)} text(s): give one for all or one "
                    "for each."
                )
            kwargs["emotion_weights"] = self._read_emotions(described, seed)
        return super().preprocess(text, **kwargs)

    def _read_emotions(self, described: list[str | None], seed: int | list[int] | None) -> list[list[float] | None]:
        """Emotion weights of each description; equal ones are read once."""
        if self.emotion_text_model is None:
            self.emotion_text_model = EmotionTextModel.from_pretrained(
                self.model.config.name_or_path, **self._hub_arguments
            )
            self.emotion_text_model.model.to(self.device)
        questions = list(zip(described, seed if isinstance(seed, list) else [seed] * len(described), strict=True))
        unique = [question for question in dict.fromkeys(questions) if question[0] is not None]
        if not unique:
            return [None] * len(described)
        if seed is None:
            answers = self.emotion_text_model([item for item, _ in unique])
        else:
            # A sampled answer depends on its batch: with a seed they are asked one by one.
            answers = torch.cat([self.emotion_text_model(item, seed=item_seed) for item, item_seed in unique])
        weights = dict(zip(unique, answers.tolist(), strict=True))
        return [weights.get(question) for question in questions]

    def _forward(self, model_inputs: dict[str, Any], **kwargs: Any) -> IndexTTS2Output:
        kwargs["forward_params"] = self._resolve({**kwargs["forward_params"], **kwargs["generate_kwargs"]})
        kwargs["generate_kwargs"] = {}
        return super()._forward(model_inputs, **kwargs)

    def _resolve(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Voices and emotion references in any form as the values that the model takes, each recording encoded once."""
        arguments = dict(arguments)
        if arguments.get("emotion_audio") is not None:
            arguments["emotion_features"] = _each_once(arguments.pop("emotion_audio"), self.model.encode_emotion)
        if arguments.get("voice") is not None:
            arguments["voice"] = _each_once(arguments["voice"], self.load_voice)
        return arguments

    def load_voice(self, voice: Any) -> "VoicePrompt":
        """
        A `VoicePrompt` from any form of a voice: a `VoicePrompt`, a name of the checkpoint, a saved voice or voice pack, a
        recording. What is none of these and looks like `owner/name` is had from the Hub.

        Raises:
            ValueError, OSError: there is no such voice, or it is damaged.
        """
        from .pipeline_s2m import VoicePrompt

        # Not by class: code that came with a repository has a `VoicePrompt` of its own.
        if hasattr(voice, "checkpoint"):
            return voice
        if isinstance(voice, str) and voice in self.model.voices:
            return self.model.voices[voice]
        if not isinstance(voice, str | os.PathLike):
            return self.model.encode_voice(voice)
        if os.path.isdir(voice) or str(voice).endswith(".safetensors"):
            return VoicePrompt.load(voice)
        if isinstance(voice, str) and not os.path.exists(voice):
            if is_repository_id(voice):
                return VoicePrompt.load(self._download_voice(voice))
            if not os.path.splitext(voice)[1]:
                return self.model.get_voice(voice)
        return self.model.encode_voice(voice)

    def _download_voice(self, repository: str) -> str:
        """The folder of a voice pack of the Hub; nothing else of the repository is downloaded."""
        hub_arguments = {name: value for name, value in self._hub_arguments.items() if name != "revision"}
        files = ["voice.safetensors", "adapter_config.json", "adapter_model.safetensors", "README.md"]
        try:
            return snapshot_download(repository, allow_patterns=files, **hub_arguments)
        except Exception as error:
            raise ValueError(
                f"There is no voice {repository!r}: it is no file or folder here, no voice of this checkpoint, which has "
                f"{sorted(self.model.voices) or 'none at all'}, and could not be had from the Hub "
                f"({(str(error).strip() or type(error).__name__).splitlines()[0]})."
            ) from error


def is_repository_id(name: str) -> bool:
    """Whether it looks like `owner/name`, and not like the path of a file."""
    is_pair = re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None
    return is_pair and os.path.splitext(name)[1].lower() not in _FILE_ENDINGS


def _each_once(value: Any, function: Callable[[Any], Any]) -> Any:
    """`function` of a value or of the items of a list; equal paths and identical objects are worked on once."""
    if not isinstance(value, list):
        return function(value)
    done: dict[Any, Any] = {}
    for item in value:
        key = item if isinstance(item, str | os.PathLike) else id(item)
        if key not in done:
            done[key] = None if item is None else function(item)
    return [done[item if isinstance(item, str | os.PathLike) else id(item)] for item in value]


__all__ = ["IndexTTS2TextToAudioPipeline", "Speech", "set_num_threads"]
