"""
`IndexTTS2ForTextToWaveform`: the whole model. It holds the parts, reads and writes the checkpoint folder, and turns text ids
and a voice into speech. It does not know text or recordings: those belong to the processor and the front-door pipeline.
"""

import copy
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import ModelOutput, logging

from .configuration_indextts2 import IndexTTS2Config, resolve_checkpoint
from .generation_t2s import OWN_SETTINGS, IndexTTS2GenerationConfig, SeededSamplingLogitsProcessor
from .modeling_t2s import IndexTTS2T2SForConditionalGeneration


if TYPE_CHECKING:
    from .pipeline_s2m import IndexTTS2SemanticToMelPipeline, VoicePrompt


logger = logging.get_logger(__name__)

# What the feature extractor makes of recordings; the processor passes it on.
VOICE_INPUT_NAMES = (
    "speaker_input_features",
    "speaker_attention_mask",
    "prompt_mel",
    "speaker_fbank",
    "speaker_emotion_input_features",
    "speaker_emotion_attention_mask",
)
EMOTION_INPUT_NAMES = ("emotion_input_features", "emotion_attention_mask")

# The parts that have weights, each in a folder of its own.
_PART_NAMES = ("t2s", "s2m", "semantic_encoder", "semantic_codec", "speaker_encoder", "vocoder")

# A day: what is longer was not meant.
_MOST_SECONDS = 86400.0

# Lengths at which speech can still be understood, as shares of its natural length: shorter is refused, longer padded. Measured with
# the checkpoint of the package (docs/results.md).
_SHORTEST_SHARE, _LONGEST_SHARE = 0.6, 1.5
# How far the length regulator stretches semantic tokens that have a length of their own.
_LEAST_MEL_FACTOR, _MOST_MEL_FACTOR = 0.5, 2.0
# Silence behind the speech of a text, in seconds: who asks for more did not mean it.
_MOST_PADDING_S = 60.0

# What the Auto classes hand to every `from_pretrained` and means nothing here.
_AUTO_CLASS_NAMES = ("code_revision", "proxies", "trust_remote_code", "use_safetensors")


@dataclass(frozen=True)
class IndexTTS2Duration:
    r"""
    What each layer did to give a segment the length that was asked for.

    Args:
        requested_s (`float`): seconds of the segment, silence included.
        natural_s (`float`, *optional*): its length without a request, estimated from its text, where the checkpoint can.
        token_rate_factor (`float`, *optional*):
            Natural length over the length that the text-to-semantic transformer was asked for: above 1 is faster than natural.
            `None` where `natural_s` is not known.
        mel_factor (`float`):
            Length of the speech over that of its semantic tokens: above 1 the length regulator made it slower.
        padding_s (`float`): seconds of silence behind the speech.
    """

    requested_s: float
    natural_s: float | None
    token_rate_factor: float | None
    mel_factor: float
    padding_s: float


@dataclass
class IndexTTS2Output(ModelOutput):
    r"""
    Args:
        audio (`list[torch.FloatTensor]`):
            One waveform of shape `(num_samples,)` in [-1, 1] for each text, pauses included.
        semantic_ids (`list[list[torch.LongTensor]]`):
            Codes of each text's segments, each of shape `(num_semantic_tokens,)`.
        durations (`list[list[IndexTTS2Duration | None]]`):
            How the length of each text's segments came about; `None` where no `duration_s` was asked for.
    """

    audio: list[torch.FloatTensor] | None = None
    semantic_ids: list[list[torch.LongTensor]] | None = None
    durations: list[list[IndexTTS2Duration | None]] | None = None


@dataclass(frozen=True)
class IndexTTS2Segment:
    r"""
    One finished piece of a text.

    Args:
        text_index (`int`): which text it belongs to.
        segment_index (`int`): which segment of that text it is.
        is_last (`bool`): whether it ends its text; otherwise the pause between segments follows.
        audio (`torch.FloatTensor` of shape `(num_samples,)`): its waveform in [-1, 1], without the pause.
        semantic_ids (`torch.LongTensor` of shape `(num_semantic_tokens,)`): its codes.
        duration ([`IndexTTS2Duration`]): how its length came about; `None` where no `duration_s` was asked for.
    """

    text_index: int
    segment_index: int
    is_last: bool
    audio: torch.Tensor
    semantic_ids: torch.Tensor
    duration: IndexTTS2Duration | None = None


@dataclass
class _Row:
    """
    A segment on its way through the model. Of `num_samples` that its sound must have, the first `num_speech_samples` are speech
    and the rest silence. `num_semantic_tokens` are written into the prefix, and end the segment if `is_count_exact`.
    """

    text_index: int
    segment_index: int
    is_last: bool
    input_ids: list[int]
    num_semantic_tokens: int | None = None
    is_count_exact: bool = True
    num_samples: int | None = None
    num_speech_samples: int | None = None
    natural_tokens: float | None = None


def share_out(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to `weights` that add up to `total` exactly."""
    bounds = [round(total * sum(weights[:index]) / sum(weights)) for index in range(len(weights) + 1)]
    return [end - start for start, end in zip(bounds, bounds[1:], strict=False)]


def row_generator(seed: int, segment_index: int, half: str, device: torch.device) -> torch.Generator:
    """The random generator of one half of the model (`"t2s"` or `"s2m"`) for one segment of a text with this seed."""
    digest = hashlib.sha256(f"{seed}/{segment_index}/{half}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class _FreeRowLimit(StoppingCriteria):
    """Ends rows without a count at the length that ends them alone, however long their neighbours go on."""

    def __init__(self, counts: list[int | None], max_length: int, device: torch.device):
        self.is_free = torch.tensor([count is None for count in counts], device=device)
        self.max_length = max_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        is_free = self.is_free.repeat_interleave(len(input_ids) // len(self.is_free))
        return is_free & (input_ids.shape[1] >= self.max_length)


class _TokenReport(StoppingCriteria):
    """Reports each step of the search; never stops it."""

    def __init__(self, progress_callback: Callable[[str, int, int | None], None]):
        self.progress_callback = progress_callback
        self.num_steps = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        self.num_steps += 1
        self.progress_callback("tokens", self.num_steps, None)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's global generators at `seed` inside, as they were outside."""
    with torch.random.fork_rng(range(torch.cuda.device_count()) if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def check_settings_files(folder: str) -> None:
    """Raises a `ValueError` that names the file if one of a checkpoint folder's settings is missing or no JSON object."""
    paths = [os.path.join(name, "config.json") for name in _PART_NAMES]
    paths += ["config.json", "scheduler/scheduler_config.json", "feature_extractor/preprocessor_config.json"]
    for path in paths:
        try:
            with open(os.path.join(folder, path), encoding="utf-8") as file:
                settings = json.load(file)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{folder!r} is no whole IndexTTS2 checkpoint: {path} cannot be read ({error}). "
                "Download or convert it again."
            ) from error
        if not isinstance(settings, dict):
            raise ValueError(
                f"{folder!r} is no whole IndexTTS2 checkpoint: {path} holds a {type(settings).__name__} instead of "
                "settings. Download or convert it again."
            )


def read_weight_shapes(folder: str) -> dict[str, tuple[int, ...]]:
    """
    Shapes of all tensors in a folder's `.safetensors` files, by name. Only the headers are read.

    Raises:
        ValueError: a file is damaged, or there is none.
    """
    shapes = {}
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        if name.endswith(".safetensors"):
            path = os.path.join(folder, name)
            try:
                with safe_open(path, framework="pt") as file:
                    shapes.update({key: tuple(file.get_slice(key).get_shape()) for key in file.keys()})
            except SafetensorError as error:
                raise ValueError(
                    f"{path!r} is damaged or was not written to its end ({error}). Download or convert it again."
                ) from error
    if not shapes:
        raise ValueError(
            f"{folder!r} holds no weights in safetensors files. Download or convert the checkpoint again."
        )
    return shapes


def check_weights(part: torch.nn.Module, folder: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """
    The libraries only warn of weights that a file lacks, and leave random ones.

    Raises:
        ValueError: a weight of `part` is missing from `shapes`, those of its files, or has another shape there; or the
            files hold one that `part` does not have.
    """
    expected = {key: tuple(tensor.shape) for key, tensor in part.state_dict().items()}
    wrong = [key for key, shape in expected.items() if shapes.get(key) != shape]
    unknown = sorted(shapes.keys() - expected.keys())
    if unknown and not wrong:
        raise ValueError(
            f"The weights in {folder!r} do not fit the `config.json` beside them: they hold {unknown[0]!r}, for which the "
            f"configured model has no place ({len(unknown)} such weights). Convert or train it again."
        )
    if wrong:
        key = wrong[0]
        found = f"has the shape {shapes[key]}" if key in shapes else "is missing"
        raise ValueError(
            f"The weights in {folder!r} do not fit the `config.json` beside them: {key!r} {found}, but the shape "
            f"{expected[key]} is expected ({len(wrong)} of {len(expected)} weights do not fit). Convert or train it again."
        )


def commit_of(folder: str | os.PathLike) -> str | None:
    """The commit whose files `snapshot_download` put into `folder`; `None` for another folder."""
    path = Path(folder)
    return path.name if path.parent.name == "snapshots" else None


def read_adapter_base(folder: str) -> dict[str, str] | None:
    """
    Name and revision of the base of an adapter folder, as arguments of `from_pretrained`; `None` if it is no adapter's. The name
    is that of a folder where there is one.

    Raises:
        ValueError: the adapter names no base.
    """
    path = os.path.join(folder, "adapter_config.json")
    if os.path.isfile(os.path.join(folder, "config.json")) or not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        settings = json.load(file)
    if not settings.get("base_model_name_or_path"):
        raise ValueError(
            f"The adapter {folder!r} does not say what its base is: write `base_model_name_or_path` into its "
            "adapter_config.json, or load the base and use `model.t2s.load_adapter`."
        )
    return {
        "pretrained_model_name_or_path": _find_base(settings["base_model_name_or_path"], folder),
        "revision": settings.get("revision") or "main",
    }


def _find_base(name: str, adapter: str) -> str:
    """The folder of an adapter's base: that of the package, the one named, or one beside the adapter; else the name."""
    name = resolve_checkpoint(name)
    if not os.path.isdir(name):
        # The folder was moved together with its adapter, or its path was relative to where the adapter was made.
        wanted = os.path.basename(os.path.normpath(name)) if os.path.isabs(name) else name
        for parent in Path(adapter).resolve().parents[:3]:
            if (parent / wanted / "config.json").is_file():
                return str(parent / wanted)
    return name


class IndexTTS2ForTextToWaveform(PreTrainedModel, GenerationMixin):
    r"""
    Text-to-speech with a voice, an emotion and a length. Usually made by `from_pretrained`.

    `dtype` is that of the text-to-semantic transformer; everything behind it runs in float32, as in the original.

    Args:
        config ([`IndexTTS2Config`]): what belongs to the checkpoint as a whole.
        t2s ([`IndexTTS2T2SForConditionalGeneration`]): text to semantic tokens.
        s2m, scheduler, semantic_encoder, semantic_codec, speaker_encoder, vocoder, feature_extractor:
            Parts of [`IndexTTS2SemanticToMelPipeline`].
        voices (`dict[str, VoicePrompt]`, *optional*): voices that come with the checkpoint, by name.

    Raises:
        ValueError: two parts do not fit; the message has both numbers.
    """

    config: IndexTTS2Config
    main_input_name = "input_ids"
    generation_config_class = IndexTTS2GenerationConfig
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(
        self,
        config: IndexTTS2Config,
        t2s: IndexTTS2T2SForConditionalGeneration,
        s2m,
        scheduler,
        semantic_encoder: PreTrainedModel,
        semantic_codec,
        speaker_encoder,
        vocoder,
        feature_extractor,
        voices: "dict[str, VoicePrompt] | None" = None,
    ):
        super().__init__(config)
        self.t2s = t2s
        self.s2m = s2m
        self.scheduler = scheduler
        self.semantic_encoder = semantic_encoder
        self.semantic_codec = semantic_codec
        self.speaker_encoder = speaker_encoder
        self.vocoder = vocoder
        self.feature_extractor = feature_extractor
        self.voices = dict(voices or {})
        self.generation_config = t2s.generation_config
        self._check_parts()
        # The parts bring their weights: nothing here is to be initialised.
        for module in self.modules():
            module._is_hf_initialized = True
        self.post_init()

    def _check_parts(self) -> None:
        t2s, s2m, codec = self.t2s.config, self.s2m.config, self.semantic_codec.config
        pairs = [
            ("t2s.feature_size", t2s.feature_size, "semantic_codec.feature_size", codec.feature_size),
            ("s2m.semantic_size", s2m.semantic_size, "semantic_codec.feature_size", codec.feature_size),
            ("s2m.t2s_hidden_size", s2m.t2s_hidden_size, "t2s.hidden_size", t2s.hidden_size),
            ("s2m.speaker_embed_dim", s2m.speaker_embed_dim, "speaker_encoder.embed_dim", self.speaker_encoder.config.embed_dim),
            ("t2s.speaker_embed_dim", t2s.speaker_embed_dim, "speaker_encoder.embed_dim", self.speaker_encoder.config.embed_dim),
            ("s2m.num_mel_bins", s2m.num_mel_bins, "vocoder.num_mel_bins", self.vocoder.config.num_mel_bins),
            ("feature_extractor.num_mel_bins", self.feature_extractor.num_mel_bins, "s2m.num_mel_bins", s2m.num_mel_bins),
            ("feature_extractor.hop_length", self.feature_extractor.hop_length, "vocoder.hop_length", self.vocoder.hop_length),
            ("config.sampling_rate", self.config.sampling_rate, "vocoder.sampling_rate", self.vocoder.config.sampling_rate),
            ("feature_extractor.sampling_rate", self.feature_extractor.sampling_rate, "config.sampling_rate", self.config.sampling_rate),
        ]  # fmt: skip
        for name, value, other_name, other_value in pairs:
            if value != other_value:
                raise ValueError(f"`{name}` is {value} but `{other_name}` is {other_value}: these parts do not fit.")
        if codec.codebook_size > t2s.semantic_start_token_id:
            raise ValueError(
                f"`semantic_codec.codebook_size` is {codec.codebook_size} but `t2s.semantic_start_token_id` is "
                f"{t2s.semantic_start_token_id}: the start token must lie behind the codes."
            )

    @property
    def dtype(self) -> torch.dtype:
        """Of the inputs, which are for the parts behind the text-to-semantic transformer; its own is `t2s.dtype`."""
        return self.s2m.dtype

    @property
    def semantic_to_mel(self) -> "IndexTTS2SemanticToMelPipeline":
        """
        A diffusers pipeline over this model's own parts. Each access makes a new one: keep it in a variable to change
        something in it, such as its scheduler.
        """
        from .pipeline_s2m import IndexTTS2SemanticToMelPipeline

        pipeline = IndexTTS2SemanticToMelPipeline(
            s2m=self.s2m,
            scheduler=self.scheduler,
            semantic_encoder=self.semantic_encoder,
            semantic_codec=self.semantic_codec,
            speaker_encoder=self.speaker_encoder,
            vocoder=self.vocoder,
            feature_extractor=self.feature_extractor,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        config: IndexTTS2Config | None = None,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str = "main",
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
        adapter_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> "IndexTTS2ForTextToWaveform":
        r"""
        A model from its checkpoint folder or Hub repository, or from those of an adapter, which name its base.

        Args:
            pretrained_model_name_or_path (`str`): folder, repository id, or `"tiny"`, the checkpoint of the package.
            config ([`IndexTTS2Config`], *optional*): instead of the folder's `config.json`.
            cache_dir, force_download, local_files_only, token, revision: as everywhere in transformers.
            dtype (`str` or `torch.dtype`, *optional*): of the text-to-semantic transformer; by default the saved one.
            attn_implementation (`str`, *optional*): attention of its trunk, for example `"sdpa"`.
            adapter_kwargs (`dict`, *optional*): set by the Auto classes when an adapter folder was asked for.

        Returns:
            [`IndexTTS2ForTextToWaveform`] in evaluation mode, on the CPU.

        Raises:
            TypeError: an argument that this model does not take, such as `device_map`.
            ValueError: a file of weights is damaged, or does not fit the configuration beside it; an adapter's base is not
                there, or is another one.
        """
        unknown = [name for name in kwargs if name not in _AUTO_CLASS_NAMES and not name.startswith("_")]
        if unknown:
            raise TypeError(
                f"`from_pretrained` of IndexTTS2 takes no {', '.join(map(repr, unknown))}. "
                "Load on the CPU and use `model.to(device)`; `dtype` sets the precision."
            )
        from .pipeline_s2m import IndexTTS2SemanticToMelPipeline, VoicePrompt

        download = {
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "token": token,
        }
        pretrained_model_name_or_path = folder = resolve_checkpoint(pretrained_model_name_or_path)
        if not os.path.isdir(folder):
            folder = snapshot_download(folder, revision=revision, **download)
        base = read_adapter_base(folder)
        if base is not None:
            name = base["pretrained_model_name_or_path"]
            try:
                if not os.path.isdir(name):
                    snapshot_download(name, revision=base["revision"], **download)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"The adapter {folder!r} is for the base {name!r}, which is no folder here or beside it and could not be had from "
                    f"the Hub ({str(error).splitlines()[0]}). Put the base there, correct `base_model_name_or_path` in its "
                    "adapter_config.json, or load the base and then the adapter: `model.t2s.load_adapter`, and --model BASE with "
                    "--adapter for the command."
                ) from error
            return cls.from_pretrained(
                **base,
                **(download | {"force_download": False}),
                config=config,
                dtype=dtype,
                attn_implementation=attn_implementation,
                adapter_kwargs={"_adapter_model_path": folder},
            )
        check_settings_files(folder)
        if config is None:
            config = IndexTTS2Config.from_pretrained(folder)
        config.name_or_path = pretrained_model_name_or_path

        shapes = {name: read_weight_shapes(os.path.join(folder, name)) for name in _PART_NAMES}
        t2s = IndexTTS2T2SForConditionalGeneration.from_pretrained(
            folder,
            subfolder="t2s",
            dtype=dtype or "auto",
            attn_implementation=attn_implementation,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # `check_weights` names the part
        )
        # An adapter made of it names its base by this, not by a folder of the cache.
        t2s.name_or_path = t2s.config.name_or_path = config.name_or_path
        t2s.revision = None if os.path.isdir(pretrained_model_name_or_path) else commit_of(folder)
        if os.path.isfile(os.path.join(folder, "generation_config.json")):
            t2s.generation_config = IndexTTS2GenerationConfig.from_pretrained(folder)
        try:
            parts = IndexTTS2SemanticToMelPipeline.load_parts(folder)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"One of the parts {', '.join(name for name in shapes if name != 't2s')} in {folder!r} cannot be loaded: {error}"
            ) from error
        for name, part in {"t2s": t2s, **parts}.items():
            if name in shapes:
                check_weights(part, os.path.join(folder, name), shapes[name])
        voices_folder = os.path.join(folder, "voices")
        names = sorted(os.listdir(voices_folder)) if os.path.isdir(voices_folder) else []
        voices = {
            os.path.splitext(name)[0]: VoicePrompt.load(os.path.join(voices_folder, name))
            for name in names
            if name.endswith(".safetensors")
        }
        model = cls(config, t2s=t2s, voices=voices, **parts)

        adapter_kwargs = dict(adapter_kwargs or {})
        adapter_path = adapter_kwargs.pop("_adapter_model_path", None)
        if adapter_path is not None:
            model.t2s.load_adapter(str(adapter_path), local_files_only=local_files_only, adapter_kwargs=adapter_kwargs)
        return model.eval()

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """
        Writes the checkpoint folder that both transformers and diffusers read. `kwargs` (for example `max_shard_size`) go
        to the text-to-semantic transformer.

        Raises:
            ValueError: there are adapters on that transformer, which would be saved in its place.
        """
        if adapters := getattr(self.t2s, "peft_config", None):
            raise ValueError(
                f"The text-to-semantic transformer has the adapters {list(adapters)}, which would be saved in its "
                "place. Save an adapter with `model.t2s.save_pretrained`; its base is saved already."
            )
        os.makedirs(save_directory, exist_ok=True)
        self.config.architectures = [type(self).__name__]
        if self._auto_class is not None:
            custom_object_save(self, save_directory, config=self.config)
        self.config.save_pretrained(save_directory)
        self.generation_config.save_pretrained(save_directory)
        self.t2s.save_pretrained(os.path.join(save_directory, "t2s"), **kwargs)
        self.semantic_to_mel.save_pretrained(save_directory)
        if self.voices:
            os.makedirs(os.path.join(save_directory, "voices"), exist_ok=True)
        for name, voice in self.voices.items():
            voice.save(os.path.join(save_directory, "voices", f"{name}.safetensors"))

    def encode_voice(self, speaker_audio: Any) -> "VoicePrompt":
        """
        A voice from a recording; see [`IndexTTS2SemanticToMelPipeline.encode_voice`]. In a checkpoint with a
        `default_emotion` it speaks with that one: give the recording as `emotion_audio` too where its own is wanted.

        Raises:
            ValueError: the recording cannot be used, or the checkpoint lacks the voice that `config.default_emotion` names.
        """
        voice = self.semantic_to_mel.encode_voice(speaker_audio)
        name = self.config.default_emotion
        if name is None:
            return voice
        if name not in self.voices:
            raise ValueError(
                f"`config.default_emotion` is {name!r}, but this checkpoint has the voices {sorted(self.voices)}. Set it to "
                "one of these, or to `None` for the emotion of the recording itself."
            )
        return replace(voice, emotion_features=self.voices[name].emotion_features.to(voice.emotion_features))

    def encode_emotion(self, emotion_audio: Any) -> torch.Tensor:
        """Emotion features of a recording; see [`IndexTTS2SemanticToMelPipeline.encode_emotion`]."""
        return self.semantic_to_mel.encode_emotion(emotion_audio)

    def get_voice(self, voice: "VoicePrompt | str | None" = None) -> "VoicePrompt":
        """
        A voice by name, the default voice for `None`, or the given one itself.

        Raises:
            ValueError: the checkpoint has no such voice, or none by default.
            TypeError: it is no voice.
        """
        if voice is None:
            voice = self.config.default_voice
        if voice is None:
            raise ValueError(
                "No voice was given and this checkpoint has no default voice. Make one with "
                "`model.encode_voice('reference.wav')` and pass it as `voice`."
            )
        if isinstance(voice, str):
            if voice not in self.voices:
                raise ValueError(
                    f"This checkpoint has no voice named {voice!r}, but {sorted(self.voices) or 'none at all'}. "
                    "Give one of these, a voice file, or a recording."
                )
            return self.voices[voice]
        # Not by class: code that came with a repository has a `VoicePrompt` of its own.
        if not hasattr(voice, "checkpoint"):
            raise TypeError(
                f"`voice` is a {type(voice).__name__}, but it must be a `VoicePrompt` or a name. "
                "Make a voice of a recording with `model.encode_voice`."
            )
        return voice

    @torch.no_grad()
    def generate(self, input_ids: torch.LongTensor, **kwargs: Any) -> IndexTTS2Output:
        r"""
        Speech for a batch of texts. Takes what [`~IndexTTS2ForTextToWaveform.stream`] takes.

        Returns:
            [`IndexTTS2Output`]: each text's segments joined, with `segment_silence_s` of silence between them.
        """
        kwargs = {"segment_batch_size": 8, "segment_silence_s": 0.2, **kwargs}
        audio: list[list[torch.Tensor]] = [[] for _ in input_ids]
        semantic_ids: list[list[torch.Tensor]] = [[] for _ in input_ids]
        durations: list[list[IndexTTS2Duration | None]] = [[] for _ in input_ids]
        for segment in self.stream(input_ids, **kwargs):
            audio[segment.text_index].append(segment.audio)
            semantic_ids[segment.text_index].append(segment.semantic_ids)
            durations[segment.text_index].append(segment.duration)
            if not segment.is_last:
                pause = segment.audio.new_zeros(self.pause_samples(kwargs["segment_silence_s"]))
                audio[segment.text_index].append(pause)
        return IndexTTS2Output(
            audio=[torch.cat(parts) for parts in audio], semantic_ids=semantic_ids, durations=durations
        )

    @torch.no_grad()
    def stream(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        voice: "VoicePrompt | str | list[VoicePrompt | str] | None" = None,
        emotion_features: torch.Tensor | list[torch.Tensor | None] | None = None,
        emotion_weights: torch.Tensor | None = None,
        emotion_strength: float | list[float] | torch.Tensor = 1.0,
        num_semantic_tokens: int | list[int | None] | None = None,
        duration_s: float | list[float | None] | None = None,
        seed: int | list[int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.7,
        segment_silence_s: float = 0.2,
        segment_batch_size: int = 1,
        noise_scheduler: Any | None = None,
        generation_config: GenerationConfig | None = None,
        progress_callback: Callable[[str, int, int | None], None] | None = None,
        **kwargs: Any,
    ) -> Iterator[IndexTTS2Segment]:
        r"""
        Speech for a batch of texts, segment by segment, each as soon as it is ready.

        Args:
            input_ids (`torch.LongTensor` of shape `(num_texts, text_length)`):
                Text ids from the processor. The text stop id separates the segments of a text.
            attention_mask (`torch.Tensor` of shape `(num_texts, text_length)`, *optional*):
                1 for text, 0 for padding.
            voice ([`VoicePrompt`], `str`, or a list of them, *optional*):
                Who speaks: one for all texts or one for each; a name means a voice of the checkpoint, which also has a
                default. The processor's tensors of a recording (`speaker_input_features` …) may stand instead. A voice may
                bring an emotion, for texts without one, and an adapter, which stays on `t2s` afterwards, switched off; its
                texts go through `t2s` in batches of their own.
            emotion_features (`torch.Tensor` of shape `(num_frames, feature_size)` or a list, *optional*):
                Emotion of a recording, from `encode_emotion`: one for all texts or one for each. The processor's tensors
                (`emotion_input_features` …) may stand instead. Without any emotion the voice's own is used.
            emotion_weights (`torch.Tensor` of shape `(num_texts, 8)`, *optional*):
                Eight intensities, already scaled by their strength (the processor does both checks and scaling); a row of
                NaN means no weights for that text.
            emotion_strength (`float`, or one for each text, defaults to 1.0):
                How much of `emotion_features` is used; 0 is the voice's own emotion.
            num_semantic_tokens (`int`, or one or `None` for each text, *optional*):
                Exact number of semantic tokens of a text, shared among its segments in proportion to their text tokens. A
                checkpoint that has not learnt lengths is cut off there, be the text at its end or not.
            duration_s (`float`, or one or `None` for each text, *optional*):
                Exact length of a text's speech in seconds, pauses included: `round(duration_s * sampling_rate)` samples. A
                checkpoint that learnt lengths (`t2s.config.use_length_row`) speaks in that time; in one that did not, T2S ends
                by itself, and the length regulator stretches what it said, 0.5 to 2 times. What is longer than can be spoken has
                silence behind the speech. What is too short is refused with the shortest duration: below 0.6 of the natural
                length where the checkpoint knows that (`t2s.config.natural_semantic_tokens`), below half of what T2S said
                where it ends by itself. `IndexTTS2Segment.duration` says what was done.
            seed (`int`, or one for each text, *optional*):
                Makes the same call give the same audio, and leaves torch's global generators alone; without it
                `torch.manual_seed` governs. Greedy search, beam search and sampling with one beam then also give a text the
                same audio alone and in any batch; sampling with several beams depends on its batch.
            num_inference_steps (`int`, *optional*):
                Flow-matching steps; by default what the checkpoint's scheduler says, 25 in the released one.
            guidance_scale (`float`, defaults to 1.7):
                Strength of the conditions in flow matching; 1.0 or less is none and faster.
            segment_silence_s (`float`, defaults to 0.2):
                Pause between segments, in seconds.
            segment_batch_size (`int`, defaults to 1):
                Segments that go through the model together (8 in `generate`).
            noise_scheduler (*optional*):
                A scheduler to use instead of the checkpoint's.
            generation_config (`GenerationConfig`, *optional*):
                Generation settings instead of the model's.
            progress_callback (`Callable`, *optional*):
                Called with `("tokens", done, None)` for each generated token of a batch of segments and with
                `("mel", done, total)` for each flow-matching step. An exception that it raises ends the call, and leaves the model
                as it was.
            kwargs:
                Generation settings of the text-to-semantic transformer, such as `temperature`, `num_beams` or
                `duration_conditioning`.

        Yields:
            [`IndexTTS2Segment`], in the order of the texts.

        Raises:
            ValueError: an option is impossible; the message says which, and what to do.
            TypeError: an argument that nobody takes.
            Both when the first segment is taken, before any work; but a checkpoint that has not learnt lengths shows only
            after T2S that a segment is too long for its duration.
        """
        if segment_batch_size < 1:
            raise ValueError(f"`segment_batch_size` is {segment_batch_size}, but at least one segment goes at a time.")
        voice_inputs = {name: kwargs.pop(name) for name in VOICE_INPUT_NAMES + EMOTION_INPUT_NAMES if name in kwargs}
        logits_processor = LogitsProcessorList(kwargs.pop("logits_processor", None) or [])
        stopping_criteria = StoppingCriteriaList(kwargs.pop("stopping_criteria", None) or [])
        settings = self._generation_settings(generation_config, **kwargs)
        if input_ids.ndim != 2:
            raise ValueError(
                f"`input_ids` must have the shape (num_texts, text_length), but it has {tuple(input_ids.shape)}. "
                "The processor makes it."
            )
        num_texts = len(input_ids)
        semantic_to_mel = self.semantic_to_mel
        # A scheduler counts its steps: each call has one of its own.
        semantic_to_mel.scheduler = copy.deepcopy(self.scheduler if noise_scheduler is None else noise_scheduler)

        if "speaker_input_features" in voice_inputs:
            voice = self.encode_voice(voice_inputs)
        if "emotion_input_features" in voice_inputs:
            emotion_features = semantic_to_mel.encode_emotion(voice_inputs)
        voices = [self.get_voice(given) for given in _one_for_each("voice", voice, num_texts)]
        fingerprint = semantic_to_mel.fingerprint
        unique = {id(given): given for given in voices}
        for given in unique.values():
            semantic_to_mel.check_voice(given, fingerprint)
        unique = {key: given.to(self.s2m.device) for key, given in unique.items()}
        voices = [unique[id(given)] for given in voices]
        # Without a seed each text draws one from torch's global generator, which `torch.manual_seed` sets.
        seeds = [
            int(torch.randint(2**62, ())) if given is None else given
            for given in _one_for_each("seed", seed, num_texts)
        ]
        for given in seeds:
            if isinstance(given, bool) or not isinstance(given, Integral):
                raise ValueError(f"`seed` is {given!r}, but it must be a whole number, or one for each text.")
        rows = self._plan_rows(input_ids, attention_mask, num_semantic_tokens, duration_s, segment_silence_s)
        speaker_latents, emotion_embeds = self._encode_conditions(
            voices,
            _one_for_each("emotion_features", emotion_features, num_texts),
            emotion_weights,
            _one_for_each("emotion_strength", emotion_strength, num_texts),
        )

        def report_step(pipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
            progress_callback("mel", step + 1, pipeline.num_timesteps)
            return {}

        for adapter, batch in _batches(rows, [voice.adapter for voice in voices], segment_batch_size):
            texts = torch.tensor([row.text_index for row in batch], device=self.t2s.device)
            row_seeds = [seeds[row.text_index] for row in batch]
            with self._adapted(adapter):
                semantic_ids, hidden_states, lengths = self._generate_semantic_ids(
                    batch,
                    speaker_latents[texts],
                    emotion_embeds[texts],
                    row_seeds,
                    settings,
                    logits_processor,
                    stopping_criteria,
                    progress_callback,
                )
            mel_lengths = semantic_to_mel.default_mel_lengths(lengths)
            found = [
                self._fit_duration(row, num_mel_frames)
                for row, num_mel_frames in zip(batch, mel_lengths.tolist(), strict=True)
            ]
            durations = [duration for duration, _ in found]
            mel_lengths = mel_lengths.new_tensor([num_frames for _, num_frames in found])
            output = semantic_to_mel(
                semantic_ids,
                voice=[voices[row.text_index] for row in batch],
                t2s_hidden_states=hidden_states,
                semantic_lengths=lengths,
                mel_lengths=mel_lengths,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=[
                    row_generator(row_seed, row.segment_index, "s2m", self.s2m.device)
                    for row_seed, row in zip(row_seeds, batch, strict=True)
                ],
                output_type="pt",
                callback_on_step_end=None if progress_callback is None else report_step,
                fingerprint=fingerprint,
            )
            results = zip(batch, semantic_ids, lengths.tolist(), output.audios, durations, strict=True)
            for row, ids, length, waveform, duration in results:
                if row.num_samples is not None:
                    speech = waveform[: row.num_speech_samples]
                    waveform = torch.nn.functional.pad(speech, (0, row.num_samples - len(speech)))
                yield IndexTTS2Segment(
                    text_index=row.text_index,
                    segment_index=row.segment_index,
                    is_last=row.is_last,
                    audio=waveform,
                    semantic_ids=ids[:length],
                    duration=duration,
                )

    def _plan_rows(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        num_semantic_tokens: int | list[int | None] | None,
        duration_s: float | list[float | None] | None,
        segment_silence_s: float,
    ) -> list[_Row]:
        """The segments of all texts, each with its share of what was asked for its text."""
        num_texts = len(input_ids)
        self.pause_samples(segment_silence_s)
        counts = _one_for_each("num_semantic_tokens", num_semantic_tokens, num_texts)
        durations = _one_for_each("duration_s", duration_s, num_texts)
        separators = {self.t2s.config.text_start_token_id, self.t2s.config.text_stop_token_id}
        masks = [None] * num_texts if attention_mask is None else attention_mask.tolist()
        rows = []
        for text_index, (ids, mask) in enumerate(zip(input_ids.tolist(), masks, strict=True)):
            segments: list[list[int]] = [[]]
            for position, token_id in enumerate(ids):
                if mask is not None and not mask[position]:
                    continue
                if token_id not in separators:
                    segments[-1].append(token_id)
                elif segments[-1]:
                    segments.append([])
            segments = [segment for segment in segments if segment]
            if not segments:
                raise ValueError(f"Text {text_index} has no tokens: there is nothing to speak.")
            largest, vocab_size = max(map(max, segments)), self.t2s.config.text_vocab_size
            if largest >= vocab_size:
                raise ValueError(
                    f"Text {text_index} has the token {largest} but this model knows {vocab_size}: the tokenizer belongs to "
                    "another checkpoint. Load both from the same folder."
                )
            text_lengths = [len(segment) for segment in segments]
            most = self.t2s.config.max_text_tokens
            if max(text_lengths) > most:
                raise ValueError(
                    f"Text {text_index} has a segment of {max(text_lengths)} tokens but this checkpoint has positions for "
                    f"{most}. Give the processor a smaller `max_text_tokens`."
                )
            text_rows = [
                _Row(text_index, index, index == len(segments) - 1, segment) for index, segment in enumerate(segments)
            ]
            self._plan_lengths(text_rows, counts[text_index], durations[text_index], segment_silence_s)
            rows += text_rows
        return rows

    def pause_samples(self, segment_silence_s: float) -> int:
        if not (isinstance(segment_silence_s, Real) and 0 <= segment_silence_s < _MOST_SECONDS):  # also false for NaN
            raise ValueError(
                f"`segment_silence_s` is {segment_silence_s!r}, but it must be a number of seconds, 0 or more."
            )
        return int(self.config.sampling_rate * segment_silence_s)

    def _plan_lengths(
        self, rows: list[_Row], count: int | None, duration_s: float | None, segment_silence_s: float
    ) -> None:
        """Semantic tokens and samples of the segments of one text."""
        text_lengths = [len(row.input_ids) for row in rows]
        rate, most = self.t2s.config.semantic_token_rate, self.t2s.config.max_semantic_tokens
        if count is not None and duration_s is not None:
            raise ValueError(
                f"Both `num_semantic_tokens` ({count}) and `duration_s` ({duration_s}) were given: give one of them."
            )
        if count is not None:
            if isinstance(count, bool) or not isinstance(count, Integral) or count < len(rows):
                raise ValueError(
                    f"`num_semantic_tokens` is {count!r}, but it must be a whole number of at least 1 for each of the "
                    f"{len(rows)} segment(s) of the text."
                )
            tokens = [1 + share for share in share_out(count - len(rows), text_lengths)]
            if max(tokens) > most:
                raise ValueError(
                    f"`num_semantic_tokens` is {count} but this checkpoint has positions for at most {most} in one segment "
                    f"({most / rate:.1f} s), and this text has {len(rows)}. "
                    "Split the text with `processor.split_text` and synthesise the parts."
                )
            for row, num_tokens in zip(rows, tokens, strict=True):
                row.num_semantic_tokens = num_tokens
        if duration_s is not None:
            self._plan_duration(rows, duration_s, segment_silence_s)

    def _plan_duration(self, rows: list[_Row], duration_s: float, segment_silence_s: float) -> None:
        """Shares of `duration_s` for the segments of one text, and how long their speech can be."""
        config, sampling_rate = self.t2s.config, self.config.sampling_rate
        samples_per_token = sampling_rate / config.semantic_token_rate
        is_number = isinstance(duration_s, Real) and not isinstance(duration_s, bool)
        if not (is_number and 0 < duration_s < _MOST_SECONDS):  # also false for NaN
            raise ValueError(f"`duration_s` is {duration_s!r}, but it must be a finite number of seconds above 0.")
        # What each segment takes by nature, where that is known, and the least that can be meant: a semantic token for each
        # text token.
        least = weights = [float(len(row.input_ids)) for row in rows]
        longest = [float(config.max_semantic_tokens)] * len(rows)
        # CODEPATH: models trained here know how long a text is by nature, the released checkpoint ends by itself.
        if config.use_length_row and config.natural_semantic_tokens is not None:
            constant, slope = config.natural_semantic_tokens
            weights = [constant + slope * length for length in weights]
            for row, natural in zip(rows, weights, strict=True):
                row.natural_tokens = natural
            least = [_SHORTEST_SHARE * natural for natural in weights]
            longest = [min(_LONGEST_SHARE * natural, most) for natural, most in zip(weights, longest, strict=True)]
        pauses = self.pause_samples(segment_silence_s) * (len(rows) - 1)
        shortest_s = (sum(least) * samples_per_token + pauses) / sampling_rate
        if duration_s < shortest_s:
            raise ValueError(
                f"`duration_s` is {duration_s} but this text of {sum(len(row.input_ids) for row in rows)} tokens in {len(rows)} "
                f"segment(s) needs at least {shortest_s:.2f} s, pauses included. Give a longer duration or a shorter text."
            )
        longest_s = (sum(longest) * samples_per_token + pauses) / sampling_rate
        if duration_s > longest_s + _MOST_PADDING_S:
            raise ValueError(
                f"`duration_s` is {duration_s} but this text of {sum(len(row.input_ids) for row in rows)} tokens in {len(rows)} "
                f"segment(s) can be spoken in at most {longest_s:.1f} s, and at most {_MOST_PADDING_S:g} s of silence follow it. "
                "Give a shorter duration or a longer text."
            )
        num_samples = round(duration_s * sampling_rate) - pauses
        most_samples = [math.floor(most * samples_per_token) for most in longest]
        shares = share_out(min(num_samples, sum(most_samples)), weights)
        for row, share, most in zip(rows, shares, most_samples, strict=True):
            row.num_samples = row.num_speech_samples = min(share, most)
        # The silence is one, behind the speech of the whole text.
        rows[-1].num_samples += num_samples - sum(row.num_samples for row in rows)
        for row in rows:
            row.num_semantic_tokens = max(1, round(row.num_speech_samples / samples_per_token))
            row.is_count_exact = config.use_length_row

    def _fit_duration(self, row: _Row, num_mel_frames: int) -> tuple[IndexTTS2Duration | None, int]:
        """
        How the length of a segment came about, and its mel frames, which are `num_mel_frames` by default.

        Raises:
            ValueError: T2S ended by itself, and what it said is too long for the time.
        """
        if row.num_samples is None:
            return None, num_mel_frames
        sampling_rate, token_rate = self.config.sampling_rate, self.t2s.config.semantic_token_rate
        samples = num_mel_frames * self.vocoder.hop_length
        if not row.is_count_exact:
            if row.num_speech_samples < _LEAST_MEL_FACTOR * samples:
                raise ValueError(
                    f"Segment {row.segment_index} of text {row.text_index} is to last {row.num_samples / sampling_rate:.2f} s, but "
                    f"it took {samples / sampling_rate:.2f} s, of which {_LEAST_MEL_FACTOR * samples / sampling_rate:.2f} s is the "
                    "shortest that can be had. Raise `duration_s` in that proportion, or shorten the text."
                )
            row.num_speech_samples = min(row.num_speech_samples, math.floor(_MOST_MEL_FACTOR * samples))
        natural_s = None if row.natural_tokens is None else row.natural_tokens / token_rate
        duration = IndexTTS2Duration(
            requested_s=row.num_samples / sampling_rate,
            natural_s=natural_s,
            token_rate_factor=None if row.natural_tokens is None else row.natural_tokens / row.num_semantic_tokens,
            mel_factor=row.num_speech_samples / samples,
            padding_s=(row.num_samples - row.num_speech_samples) / sampling_rate,
        )
        return duration, math.ceil(row.num_speech_samples / self.vocoder.hop_length)

    def _encode_conditions(
        self,
        voices: "list[VoicePrompt]",
        emotion_features: list[torch.Tensor | None],
        emotion_weights: torch.Tensor | None,
        emotion_strength: list[float],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`speaker_latents` and `emotion_embeds` of each text; every recording is encoded once."""
        device, dtype = self.t2s.device, self.t2s.dtype

        for strength in emotion_strength:
            if not 0.0 <= strength <= 1.0:  # also true for NaN
                raise ValueError(
                    f"`emotion_strength` is {strength}, but it must be a number from 0 (the voice's own emotion) to 1."
                )
        for features in emotion_features:
            if features is not None and (features.ndim != 2 or len(features) < 3):
                raise ValueError(
                    "`emotion_features` must have the shape (num_frames, feature_size) with at least 3 frames for each "
                    f"text, but has {tuple(features.shape)}. `encode_emotion` makes them."
                )

        def encode(encoder, features: list[torch.Tensor]) -> torch.Tensor:
            unique = list({id(item): item for item in features}.values())
            place = {id(item): index for index, item in enumerate(unique)}
            lengths = torch.tensor([len(item) for item in unique], device=device)
            batch = pad_sequence([item.to(device, dtype) for item in unique], batch_first=True)
            encoded = encoder(batch, lengths if len({len(item) for item in unique}) > 1 else None)
            return encoded[[place[id(item)] for item in features]]

        speaker_latents = encode(self.t2s.encode_speaker, [voice.speaker_features for voice in voices])

        # Parity: without an emotion reference the voice's own recording is one, read the other way, at full strength.
        has_reference = [features is not None for features in emotion_features]
        emotion_embeds = encode(
            self.t2s.encode_emotion,
            [
                voice.emotion_features if features is None else features
                for voice, features in zip(voices, emotion_features, strict=True)
            ],
        )
        if any(has_reference):
            # Parity: the emotion that strength 0 leaves is read the speaker's way.
            is_own = self.config.default_emotion is None
            base_embeds = encode(
                self.t2s.encode_emotion,
                [voice.speaker_features if is_own else voice.emotion_features for voice in voices],
            )
            strength = torch.tensor([float(value) for value in emotion_strength], device=device, dtype=dtype)[:, None]
            strength = strength.masked_fill(~torch.tensor(has_reference, device=device)[:, None], 1.0)
            mixed = self.t2s.mix_emotion(base_embeds, emotion_embeds, strength)
            emotion_embeds = torch.where(strength == 1.0, emotion_embeds, mixed)
        if emotion_weights is not None:
            emotion_weights = torch.as_tensor(emotion_weights, device=device, dtype=torch.float32)
            if emotion_weights.shape != (len(voices), 8):
                raise ValueError(
                    f"`emotion_weights` must have the shape ({len(voices)}, 8), one row for each text, but it has "
                    f"{tuple(emotion_weights.shape)}. The processor makes it."
                )
        # A text without any emotion takes the one that its voice brings.
        defaults = [
            None if is_asked else voice.emotion_weights for voice, is_asked in zip(voices, has_reference, strict=True)
        ]
        if any(defaults):
            if emotion_weights is None:
                emotion_weights = torch.full((len(voices), 8), math.nan, device=device)
            rows = [
                row if default is None or not row.isnan().all() else strength * row.new_tensor(default)
                for row, default, strength in zip(emotion_weights, defaults, emotion_strength, strict=True)
            ]
            emotion_weights = torch.stack(rows)
        if emotion_weights is not None:
            is_absent = emotion_weights.isnan().all(dim=1, keepdim=True)
            is_valid = (emotion_weights >= 0.0) & (emotion_weights <= 1.2 + 1e-6)
            if not (is_absent | is_valid).all():
                raise ValueError(
                    f"`emotion_weights` are {emotion_weights.tolist()}, but each must be a number from 0 to 1.2, or all of a "
                    "row NaN for none. Give them to the processor, which says which one is wrong."
                )
            if not self.t2s.emotion_prototypes.emotion_embeds.any():
                raise ValueError(
                    "This checkpoint has no emotion prototypes, so it cannot use `emotion_weights`. "
                    "Give an emotion reference recording instead."
                )
            speaker_embeds = torch.stack([voice.speaker_embeds.to(device) for voice in voices])
            weighed = self.t2s.weigh_emotion(emotion_weights.nan_to_num(), speaker_embeds, emotion_embeds)
            emotion_embeds = torch.where(is_absent, emotion_embeds, weighed)
        return speaker_latents, emotion_embeds

    @contextmanager
    def _adapted(self, folder: str | None) -> Iterator[None]:
        """The text-to-semantic transformer with this adapter alone, loaded when it is first needed; as it was, afterwards."""
        if folder is None:
            yield
            return
        t2s = self.t2s
        digest = hashlib.sha256()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            with open(os.path.join(folder, name), "rb") as file:
                digest.update(file.read())
        name = f"voice-{digest.hexdigest()[:16]}"
        active = t2s.active_adapters() if hasattr(t2s, "peft_config") else []
        # Layers with adapters say whether these are switched off; a model has a method of that name.
        switches = (getattr(module, "disable_adapters", None) for module in t2s.modules())
        was_off = not active or any(is_off is True for is_off in switches)
        try:
            if not active or name not in t2s.peft_config:
                t2s.load_adapter(folder, name)
            t2s.set_adapter(name)
            t2s.enable_adapters()
            yield
        finally:
            if active:
                t2s.set_adapter(active)
            if was_off and hasattr(t2s, "peft_config"):
                t2s.disable_adapters()

    def _generation_settings(self, generation_config: GenerationConfig | None, **kwargs: Any) -> GenerationConfig:
        """One generation config of the given one (or the model's) and the keyword arguments."""
        settings = copy.deepcopy(generation_config or self.generation_config)
        # Settings that the asked search does not use would only be warned about.
        unused = {}
        if not kwargs.get("do_sample", settings.do_sample):
            unused |= {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
        if (kwargs.get("num_beams") or settings.num_beams or 1) == 1:
            unused |= {"length_penalty": 1.0}
        for name, neutral in unused.items():
            setattr(settings, name, neutral)
        for name in OWN_SETTINGS:
            value = kwargs.pop(name, None)
            if value is not None:
                setattr(settings, name, value)
        unknown = settings.update(**kwargs)
        if unknown:
            raise TypeError(f"IndexTTS2 takes no {', '.join(map(repr, unknown))}.")
        settings.return_dict_in_generate = False
        # There is no speech without a token: a segment cannot end before its first one.
        stop_id = self.t2s.config.semantic_stop_token_id
        settings.begin_suppress_tokens = [*(settings.begin_suppress_tokens or []), stop_id]
        if (settings.num_return_sequences or 1) != 1:
            raise ValueError(
                f"`num_return_sequences` is {settings.num_return_sequences}, but each text is spoken once. "
                "Repeat the text with other seeds."
            )
        return settings

    def _generate_semantic_ids(
        self,
        rows: list[_Row],
        speaker_latents: torch.Tensor,
        emotion_embeds: torch.Tensor,
        seeds: list[int],
        settings: GenerationConfig,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        progress_callback: Callable[[str, int, int | None], None] | None,
    ) -> tuple[torch.LongTensor, torch.Tensor, torch.LongTensor]:
        """Codes `(batch_size, num_semantic_tokens)`, the T2S state of each, and how many of each row are its own."""
        t2s = self.t2s
        input_ids = pad_sequence(
            [torch.tensor(row.input_ids, device=t2s.device) for row in rows],
            batch_first=True,
            padding_value=t2s.config.text_stop_token_id,
        )
        # A checkpoint that has not learnt lengths is asked for one too, but ends by itself where seconds were asked for.
        counts = [row.num_semantic_tokens if row.is_count_exact else None for row in rows]
        duration_conditioning = getattr(settings, "duration_conditioning", None)
        is_usual = t2s.config.use_length_row or duration_conditioning is not None
        asked = [row.num_semantic_tokens if is_usual or not row.is_count_exact else None for row in rows]
        inputs_embeds, attention_mask = t2s.prepare_prefix(
            input_ids,
            speaker_latents=speaker_latents,
            emotion_embeds=emotion_embeds,
            num_semantic_tokens=asked if any(asked) else None,
            duration_conditioning=True if duration_conditioning is None else duration_conditioning,
        )

        if settings.do_sample and (settings.num_beams or 1) == 1:
            generators = [
                row_generator(seed, row.segment_index, "t2s", t2s.device)
                for seed, row in zip(seeds, rows, strict=True)
            ]
            logits_processor = LogitsProcessorList([*logits_processor, SeededSamplingLogitsProcessor(generators)])
        stopping_criteria = StoppingCriteriaList(stopping_criteria)
        if any(counts) and None in counts and settings.max_new_tokens is not None:
            max_length = inputs_embeds.shape[1] + settings.max_new_tokens
            stopping_criteria.append(_FreeRowLimit(counts, max_length, t2s.device))
        if progress_callback is not None:
            stopping_criteria.append(_TokenReport(progress_callback))
        # Several beams of a row share their draws, which come from the global generators.
        batch_seed = row_generator(seeds[0], rows[0].segment_index, "t2s", torch.device("cpu")).initial_seed()
        with seeded(batch_seed, t2s.device):
            sequences = t2s.generate(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                text_ids=input_ids,
                generation_config=settings,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                num_semantic_tokens=counts if any(counts) else None,
            )

        is_stop = sequences == t2s.config.semantic_stop_token_id
        lengths = is_stop.logical_not().cumprod(dim=1).sum(dim=1)
        for row, length in zip(rows, lengths.tolist(), strict=True):
            if (row.num_semantic_tokens is None or not row.is_count_exact) and length >= (
                settings.max_new_tokens or sequences.shape[1]
            ):
                logger.warning(
                    f"Segment {row.segment_index} of text {row.text_index} was cut off after {length} semantic tokens "
                    f"({length / t2s.config.semantic_token_rate:.1f} s) without having ended. "
                    "Raise `max_new_tokens`, or split the text into shorter segments."
                )
        # Any code will do behind the end of a row.
        semantic_ids = sequences.masked_fill(is_stop, 0)[:, : int(lengths.max())]
        # A full-context state for each code. Parity: positions 1, 2, 3 … here, whatever decoding used.
        output = t2s(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            semantic_ids=semantic_ids,
            use_cache=False,
            logits_to_keep=1,  # only the states are wanted
        )
        return semantic_ids, output.last_hidden_state[:, :-1], lengths


def _batches(rows: list[_Row], adapters: list[str | None], batch_size: int) -> Iterator[tuple[str | None, list[_Row]]]:
    """Rows in their order, at most `batch_size` together, and only those whose texts have the same adapter."""
    for adapter, neighbours in itertools.groupby(rows, key=lambda row: adapters[row.text_index]):
        group = list(neighbours)
        for start in range(0, len(group), batch_size):
            yield adapter, group[start : start + batch_size]


def _one_for_each(name: str, value: Any, num_texts: int) -> list[Any]:
    """`value` for each text: a list or a tensor with one for each, or one for all."""
    if isinstance(value, torch.Tensor | np.ndarray) and value.ndim < 2:
        value = value.tolist()
    if not isinstance(value, list | tuple):
        return [value] * num_texts
    if len(value) != num_texts:
        raise ValueError(
            f"`{name}` has {len(value)} values for {num_texts} text(s): give one for all or one for each."
        )
    return list(value)


__all__ = ["IndexTTS2Duration", "IndexTTS2ForTextToWaveform", "IndexTTS2Output", "IndexTTS2Segment"]
