"""
Semantic tokens and a voice to speech: `IndexTTS2SemanticToMelPipeline` with its visible sampling loop, and `VoicePrompt`,
everything that is derived once from a recording of a voice. It does not know text.
"""

import hashlib
import inspect
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, PreTrainedModel
from transformers.utils import logging

from .configuration_indextts2 import lasting_name
from .feature_extraction_indextts2 import AudioInput, IndexTTS2FeatureExtractor
from .modeling_s2m import IndexTTS2SemanticToMelTransformer, mel_lengths_for
from .modeling_semantic_codec import IndexTTS2SemanticCodec
from .modeling_speaker_encoder import IndexTTS2SpeakerEncoder
from .modeling_vocoder import IndexTTS2Vocoder
from .scheduling_flow_match_s2m import IndexTTS2FlowMatchScheduler


logger = logging.get_logger(__name__)

_VOICE_FORMAT = "indextts2-voice-1"

# A voice pack: a folder with this file, perhaps an adapter, and a card.
VOICE_FILE = "voice.safetensors"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True, eq=False)
class VoicePrompt:
    r"""
    A voice as a value: made once from a recording by `encode_voice`, kept in one safetensors file or in a voice pack (a folder
    with that file, an adapter where it has one, and a card), used in any batch.

    Args:
        speaker_features (`torch.Tensor` of shape `(num_frames, feature_size)`):
            Semantic features of the recording, read at 22.05 kHz and resampled: what the voice sounds like.
        emotion_features (`torch.Tensor` of shape `(num_emotion_frames, feature_size)`):
            Semantic features of a recording, read at 16 kHz directly: the emotion that the voice speaks with where no other
            is asked for. It is the same recording, unless another was given for it or the checkpoint has a `default_emotion`.
        speaker_embeds (`torch.Tensor` of shape `(speaker_embed_dim,)`):
            Global voice vector.
        prompt_mel (`torch.Tensor` of shape `(num_prompt_frames, num_mel_bins)`):
            Log-mel of the recording.
        content_embeds (`torch.Tensor` of shape `(num_prompt_frames, content_size)`):
            What is said in the recording, at mel rate.
        checkpoint (`str`):
            Name and fingerprint of the checkpoint that made it, `name@fingerprint`.
        emotion_weights (`tuple[float, ...]`, *optional*):
            Eight intensities from 0 to 1.2 that it speaks with where no other emotion is asked for.
        license (`str`, *optional*):
            Licence under which it may be used.
        consent (`str`, *optional*):
            How the person that it belongs to agreed, in words.
        adapter (`str`, *optional*):
            Folder of an adapter of the text-to-semantic transformer that belongs to it.

    Raises:
        ValueError: `emotion_weights` are not eight numbers from 0 to 1.2.
    """

    speaker_features: torch.Tensor
    emotion_features: torch.Tensor
    speaker_embeds: torch.Tensor
    prompt_mel: torch.Tensor
    content_embeds: torch.Tensor
    checkpoint: str
    emotion_weights: tuple[float, ...] | None = None
    license: str | None = None
    consent: str | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        weights = self.emotion_weights
        if weights is None:
            return
        is_row = isinstance(weights, tuple) and all(isinstance(weight, float | int) for weight in weights)
        if not is_row or len(weights) != 8 or not all(0.0 <= weight <= 1.2 for weight in weights):
            raise ValueError(
                f"The `emotion_weights` of a voice are {weights!r}, but they must be eight numbers from 0 to 1.2."
            )

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.type is torch.Tensor}

    def to(self, *args: Any, **kwargs: Any) -> "VoicePrompt":
        """The same voice on another device or in another dtype; arguments of `torch.Tensor.to`."""
        return replace(self, **{name: tensor.to(*args, **kwargs) for name, tensor in self.tensors().items()})

    def save(self, path: str | os.PathLike) -> None:
        """
        Writes one safetensors file, or a voice pack where `path` does not end in `.safetensors`: a new folder. Nothing is left
        behind when that fails.

        Raises:
            FileNotFoundError: there is no folder to write it in.
            FileExistsError: that folder exists and is not empty.
            ValueError: it has an adapter, which a file cannot hold.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"There is no folder '{path.parent}' to save the voice in. Make it first.")
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        if path.suffix != ".safetensors":
            if path.exists() and not (path.is_dir() and not any(path.iterdir())):
                raise FileExistsError(f"'{path}' exists. Name a new folder for the voice pack.")
            try:
                temporary.mkdir()
                replace(self, adapter=None).save(temporary / VOICE_FILE)
                for name in ADAPTER_FILES if self.adapter is not None else ():
                    shutil.copyfile(os.path.join(self.adapter, name), temporary / name)
                if path.is_dir():
                    path.rmdir()
                temporary.rename(path)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            return
        if self.adapter is not None:
            raise ValueError(
                f"This voice has an adapter, which the file '{path}' cannot hold. Save it in a folder: a path without "
                "`.safetensors`."
            )
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors().items()}
        metadata = {"format": _VOICE_FORMAT, "checkpoint": self.checkpoint}
        metadata |= {name: value for name in ("license", "consent") if (value := getattr(self, name)) is not None}
        if self.emotion_weights is not None:
            metadata["emotion_weights"] = json.dumps(self.emotion_weights)
        try:
            temporary.write_bytes(save(tensors, metadata))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "VoicePrompt":
        """
        Reads a file or a voice pack that `save` wrote. An adapter is read when the voice first speaks.

        Raises:
            FileNotFoundError: there is no such file or folder.
            ValueError: the file is damaged or holds no voice, or the folder is no voice pack.
        """
        if os.path.isdir(path):
            return cls._load_pack(Path(path))
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"There is no voice file '{path}'. Make one with `indextts2 voice REF.wav -o {path}`."
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(
                f"'{path}' is not a readable safetensors file ({error}). Make it again with `indextts2 voice`."
            ) from error
        expected = {field.name for field in fields(cls) if field.type is torch.Tensor}
        if metadata.get("format") != _VOICE_FORMAT or set(tensors) != expected:
            raise ValueError(
                f"'{path}' is a safetensors file but holds no voice: format {metadata.get('format')!r} with "
                f"{sorted(tensors)}, expected {_VOICE_FORMAT!r} with {sorted(expected)}. Make it with `indextts2 voice`."
            )
        try:
            weights = json.loads(metadata.get("emotion_weights", "null"))
            voice = cls(
                **tensors,
                checkpoint=metadata.get("checkpoint", "unknown@"),
                emotion_weights=tuple(weights) if isinstance(weights, list) else weights,
                license=metadata.get("license"),
                consent=metadata.get("consent"),
            )
        except ValueError as error:
            raise ValueError(f"'{path}' is no usable voice: {error} Make it again with `indextts2 voice`.") from error
        ranks = {name: tensor.ndim for name, tensor in voice.tensors().items()}
        if any(rank != (1 if name == "speaker_embeds" else 2) for name, rank in ranks.items()) or (
            len(voice.prompt_mel) != len(voice.content_embeds)
        ):
            shapes = {name: tuple(tensor.shape) for name, tensor in voice.tensors().items()}
            raise ValueError(f"'{path}' holds tensors of the wrong shapes for a voice: {shapes}.")
        return voice

    @classmethod
    def _load_pack(cls, folder: Path) -> "VoicePrompt":
        if not (folder / VOICE_FILE).is_file():
            raise ValueError(
                f"The folder '{folder}' is no voice pack: it has no {VOICE_FILE}. Make one with "
                "`indextts2 voice REF.wav -o FOLDER`, or name a recording."
            )
        voice = cls.load(folder / VOICE_FILE)
        found = [name for name in ADAPTER_FILES if (folder / name).is_file()]
        if not found:
            return voice
        missing = [name for name in ADAPTER_FILES if name not in found]
        if missing:
            raise ValueError(
                f"The voice pack '{folder}' has the {found[0]} of an adapter but not its {missing[0]}. Get it again."
            )
        return replace(voice, adapter=str(folder))


@dataclass
class IndexTTS2SemanticToMelPipelineOutput(BaseOutput):
    r"""
    Args:
        audios (`list[np.ndarray]` or `list[torch.Tensor]`, *optional*):
            One waveform of shape `(num_samples,)` in [-1, 1] for each row; `None` with `output_type="mel"`.
        mels (`list[torch.Tensor]`):
            One log-mel of shape `(num_mel_frames, num_mel_bins)` for each row, prompt excluded.
        sampling_rate (`int`):
            Sampling rate of the waveforms, in Hz.
    """

    audios: list[np.ndarray] | list[torch.Tensor] | None
    mels: list[torch.Tensor]
    sampling_rate: int


def check_settings(part_class: type[ConfigMixin], folder: str) -> None:
    """Raises a `ValueError` for a setting in the folder's configuration that the class does not take."""
    known = inspect.signature(part_class).parameters
    unknown = [name for name in part_class.load_config(folder) if name not in known and not name.startswith("_")]
    if unknown:
        # diffusers would go on with the default of what was meant.
        raise ValueError(
            f"The settings of {part_class.__name__} in {folder!r} have {', '.join(map(repr, unknown))}, but it knows "
            f"{', '.join(known)}. Correct the file, or update indextts2-hf if a newer version wrote it."
        )


class IndexTTS2SemanticToMelPipeline(DiffusionPipeline):
    r"""
    Speech from semantic tokens: length regulation, flow matching from noise to mel, vocoder. Also turns recordings into
    voices. Source: IndexTTS2 paper, section 3.2.

    Args:
        s2m ([`IndexTTS2SemanticToMelTransformer`]): predicts the velocity.
        scheduler ([`IndexTTS2FlowMatchScheduler`]): steps from noise to mel.
        semantic_encoder (`PreTrainedModel`):
            Speech encoder whose last hidden state is used: w2v-BERT 2.0 cut after its 17th layer in the released checkpoint.
        semantic_codec ([`IndexTTS2SemanticCodec`]): statistics of the features, codebook.
        speaker_encoder ([`IndexTTS2SpeakerEncoder`]): global voice vector.
        vocoder ([`IndexTTS2Vocoder`]): mel to waveform.
        feature_extractor ([`IndexTTS2FeatureExtractor`]): recordings to inputs.
    """

    scheduler: IndexTTS2FlowMatchScheduler
    model_cpu_offload_seq = "semantic_encoder->semantic_codec->speaker_encoder->s2m->vocoder"
    _callback_tensor_inputs = ["sample"]

    def __init__(
        self,
        s2m: IndexTTS2SemanticToMelTransformer,
        scheduler: IndexTTS2FlowMatchScheduler,
        semantic_encoder: PreTrainedModel,
        semantic_codec: IndexTTS2SemanticCodec,
        speaker_encoder: IndexTTS2SpeakerEncoder,
        vocoder: IndexTTS2Vocoder,
        feature_extractor: IndexTTS2FeatureExtractor,
    ):
        super().__init__()
        self.register_modules(
            s2m=s2m,
            scheduler=scheduler,
            semantic_encoder=semantic_encoder,
            semantic_codec=semantic_codec,
            speaker_encoder=speaker_encoder,
            vocoder=vocoder,
            feature_extractor=feature_extractor,
        )
        self.sampling_rate = vocoder.config.sampling_rate
        self.mel_frames_per_token = s2m.config.mel_frames_per_token
        self.num_mel_bins = s2m.config.num_mel_bins

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> DiffusionPipeline:
        """The parts of a checkpoint folder or Hub repository; arguments of `DiffusionPipeline.from_pretrained`."""
        if not os.path.isdir(pretrained_model_name_or_path):
            # diffusers does not download a repository whose `model_index.json` names classes of another package.
            names = ("cache_dir", "force_download", "local_files_only", "token", "revision")
            pretrained_model_name_or_path = snapshot_download(
                pretrained_model_name_or_path, **{name: kwargs[name] for name in names if name in kwargs}
            )
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @staticmethod
    def load_parts(folder: str | os.PathLike) -> dict[str, Any]:
        """
        The parts of a checkpoint folder by name, models in float32. Unlike `from_pretrained` it does not ask
        `model_index.json` for their classes, whose modules have other names where this code came with a repository.

        Raises:
            ValueError: the settings of a part have a name that it does not know.
        """
        models = {
            "s2m": IndexTTS2SemanticToMelTransformer,
            "semantic_encoder": AutoModel,
            "semantic_codec": IndexTTS2SemanticCodec,
            "speaker_encoder": IndexTTS2SpeakerEncoder,
            "vocoder": IndexTTS2Vocoder,
        }
        for name, part_class in {**models, "scheduler": IndexTTS2FlowMatchScheduler}.items():
            if issubclass(part_class, ConfigMixin):
                check_settings(part_class, os.path.join(folder, name))
        parts = {
            name: part_class.from_pretrained(
                os.path.join(folder, name), dtype=torch.float32, use_safetensors=True
            ).eval()
            for name, part_class in models.items()
        }
        parts["scheduler"] = IndexTTS2FlowMatchScheduler.from_pretrained(os.path.join(folder, "scheduler"))
        parts["feature_extractor"] = IndexTTS2FeatureExtractor.from_pretrained(
            os.path.join(folder, "feature_extractor")
        )
        return parts

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def fingerprint(self) -> str:
        """
        `name@fingerprint` of the parts that a voice depends on: a hash of their settings and of samples of their weights,
        the same in float32 and bfloat16.
        """
        parts = (self.semantic_encoder, self.semantic_codec, self.speaker_encoder, self.s2m.length_regulator)
        settings = self.feature_extractor.to_dict()
        names = inspect.signature(type(self.feature_extractor)).parameters
        settings = {name: settings[name] for name in sorted(settings) if name in names}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        samples = []
        for part in parts:
            for name, tensor in sorted(part.state_dict().items()):
                digest.update(f"{name}{tuple(tensor.shape)}".encode())
                flat = tensor.flatten()
                index = torch.linspace(0, len(flat) - 1, min(len(flat), 64), device=flat.device).long()
                samples.append(flat[index].to(torch.bfloat16))
        digest.update(torch.cat(samples).view(torch.int16).cpu().numpy().tobytes())
        return f"{self._checkpoint_name()}@{digest.hexdigest()[:16]}"

    def _checkpoint_name(self) -> str:
        """The folder or repository that the parts came from."""
        path = Path(str(self.s2m.config.get("_name_or_path") or "unsaved"))
        path = path.parent if path.name == "s2m" else path
        if path.parent.name == "snapshots":
            # A repository in the cache of the Hub: `models--OWNER--NAME/snapshots/COMMIT`.
            return path.parent.parent.name.removeprefix("models--").replace("--", "/")
        return Path(lasting_name(str(path.resolve()))).name

    def check_voice(self, voice: VoicePrompt, fingerprint: str | None = None) -> None:
        """
        Raises a `ValueError` that names both checkpoints if `voice` was made by another one. `fingerprint` is that of this
        pipeline, when it is known already.
        """
        ours = fingerprint if fingerprint is not None else self.fingerprint
        if voice.checkpoint.split("@")[-1] != ours.split("@")[-1]:
            raise ValueError(
                f"This voice was made with the checkpoint '{voice.checkpoint}' but '{ours}' is loaded. "
                "Load that one, or make the voice again from its recording (`indextts2 voice`)."
            )

    @torch.no_grad()
    def encode_features(
        self, input_features: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Normalised semantic features of extractor output: `(1, num_frames, input_size)` and its mask to
        `(num_frames, feature_size)`.
        """
        encoder = self.semantic_encoder
        inputs = {encoder.main_input_name: input_features.to(encoder.device, encoder.dtype)}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask.to(encoder.device)
        return self.semantic_codec.normalize(encoder(**inputs).last_hidden_state)[0]

    @torch.no_grad()
    def encode_emotion(self, emotion_audio: AudioInput | Mapping[str, torch.Tensor]) -> torch.Tensor:
        r"""
        Semantic features of an emotion reference.

        Args:
            emotion_audio (path, bytes, `(array, rate)`, audio `dict`, or the feature extractor's output for one):
                The recording; its first `feature_extractor.max_audio_s` seconds are used, 15 in the released checkpoint.

        Returns:
            `torch.Tensor` of shape `(num_frames, feature_size)`: `emotion_features`.
        """
        inputs = emotion_audio
        if not (isinstance(inputs, Mapping) and "emotion_input_features" in inputs):
            inputs = self.feature_extractor(emotion_audio=emotion_audio)
        return self.encode_features(inputs["emotion_input_features"], inputs.get("emotion_attention_mask"))

    @torch.no_grad()
    def encode_voice(self, speaker_audio: AudioInput | Mapping[str, torch.Tensor]) -> VoicePrompt:
        r"""
        A voice from a recording. A voice is encoded alone: the speaker encoder's statistics run over the whole clip.

        Args:
            speaker_audio (path, bytes, `(array, rate)`, audio `dict`, or the feature extractor's output for one):
                The recording; its first `feature_extractor.max_audio_s` seconds are used, 15 in the released checkpoint.

        Returns:
            [`VoicePrompt`]
        """
        inputs = speaker_audio
        if not (isinstance(inputs, Mapping) and "speaker_input_features" in inputs):
            inputs = self.feature_extractor(speaker_audio=speaker_audio)
        device, dtype = self._execution_device, self.s2m.dtype
        speaker_features = self.encode_features(inputs["speaker_input_features"], inputs.get("speaker_attention_mask"))
        emotion_features = self.encode_features(
            inputs["speaker_emotion_input_features"], inputs.get("speaker_emotion_attention_mask")
        )
        speaker_embeds = self.speaker_encoder(
            inputs["speaker_fbank"].to(device, self.speaker_encoder.dtype)
        ).speaker_embeds
        prompt_mel = inputs["prompt_mel"].to(device, dtype)
        # Parity: what the prompt says comes from its quantised features, without T2S hidden states.
        semantic_embeds = self.semantic_codec.encode(speaker_features[None]).semantic_embeds
        content_embeds = self.s2m.regulate_length(
            semantic_embeds.to(dtype), None, torch.tensor([prompt_mel.shape[1]], device=device)
        )
        return VoicePrompt(
            speaker_features=speaker_features,
            emotion_features=emotion_features,
            speaker_embeds=speaker_embeds[0],
            prompt_mel=prompt_mel[0],
            content_embeds=content_embeds[0],
            checkpoint=self.fingerprint,
        )

    def check_inputs(
        self,
        semantic_ids: torch.LongTensor,
        voices: list[VoicePrompt],
        t2s_hidden_states: torch.Tensor | None,
        semantic_lengths: torch.LongTensor | None,
        mel_lengths: torch.LongTensor | None,
        guidance_scale: float,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
        fingerprint: str | None = None,
    ) -> None:
        if semantic_ids.ndim != 2 or 0 in semantic_ids.shape:
            raise ValueError(
                "`semantic_ids` must have the shape (batch_size, num_semantic_tokens), both at least 1, but it has "
                f"{tuple(semantic_ids.shape)}."
            )
        if len(voices) != len(semantic_ids):
            raise ValueError(
                f"There are {len(voices)} voices for {len(semantic_ids)} rows: give one voice for all rows or one for each."
            )
        if t2s_hidden_states is not None and t2s_hidden_states.shape[:2] != semantic_ids.shape:
            raise ValueError(
                f"`t2s_hidden_states` must have one state for each of the {tuple(semantic_ids.shape)} semantic ids, "
                f"but has the shape {tuple(t2s_hidden_states.shape)}."
            )
        limits = {
            "semantic_lengths": (semantic_lengths, semantic_ids.shape[1]),
            "mel_lengths": (mel_lengths, math.inf),
        }
        for name, (lengths, most) in limits.items():
            if lengths is None:
                continue
            if lengths.shape != semantic_ids.shape[:1] or lengths.min() < 1 or lengths.max() > most:
                raise ValueError(
                    f"`{name}` must hold one length for each of the {len(semantic_ids)} rows, from 1 to {most}, but it is "
                    f"{lengths.tolist()}."
                )
        if not math.isfinite(guidance_scale):
            raise ValueError(f"`guidance_scale` is {guidance_scale}, but it must be a finite number; 1.0 means none.")
        if output_type not in ("np", "pt", "mel"):
            raise ValueError(f"`output_type` is {output_type!r}, but it must be 'np', 'pt' or 'mel'.")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` asks for {sorted(unknown)}, but only "
                f"{self._callback_tensor_inputs} can be had."
            )
        fingerprint = fingerprint or self.fingerprint
        for voice in {id(voice): voice for voice in voices}.values():
            self.check_voice(voice, fingerprint)

    def default_mel_lengths(self, semantic_lengths: torch.LongTensor) -> torch.LongTensor:
        """Mel frames that belong to that many semantic tokens, of shape `(batch_size,)` like theirs."""
        return mel_lengths_for(semantic_lengths, self.mel_frames_per_token)

    def encode_content(
        self,
        semantic_ids: torch.LongTensor,
        semantic_lengths: torch.LongTensor,
        mel_lengths: torch.LongTensor,
        t2s_hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What is to be said, at mel rate: `(batch_size, num_mel_frames, content_size)`, zero beyond `mel_lengths`."""
        semantic_embeds = self.semantic_codec.embed(semantic_ids).to(self.s2m.dtype)
        if t2s_hidden_states is not None:
            t2s_hidden_states = t2s_hidden_states.to(semantic_embeds)
        semantic_embeds = self.s2m.add_hidden_states(semantic_embeds, t2s_hidden_states)
        return self.s2m.regulate_length(semantic_embeds, semantic_lengths, mel_lengths)

    def prepare_sample(
        self,
        lengths: list[int],
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Noise of shape `(batch_size, max(lengths), num_mel_bins)`. With a list of generators each row draws its own length,
        so that it is the same in any batch.
        """
        shape = (len(lengths), max(lengths), self.num_mel_bins)
        device, dtype = self._execution_device, self.s2m.dtype
        if latents is not None:
            if latents.shape != shape:
                raise ValueError(f"`latents` must have the shape {shape}, but it has {tuple(latents.shape)}.")
            return latents.to(device, dtype)
        if isinstance(generator, list):
            if len(generator) != len(lengths):
                raise ValueError(f"There are {len(generator)} generators for {len(lengths)} rows: give one for each.")
            rows = [
                randn_tensor((length, self.num_mel_bins), generator=row_generator, device=device, dtype=dtype)
                for length, row_generator in zip(lengths, generator, strict=True)
            ]
            return pad_sequence(rows, batch_first=True)
        return randn_tensor(shape, generator=generator, device=device, dtype=dtype)

    def decode(self, mels: list[torch.Tensor]) -> list[torch.Tensor]:
        """Waveforms of shape `(num_mel_frames * hop_length,)` for mels of shape `(num_mel_frames, num_mel_bins)`, batched."""
        lengths = [len(mel) for mel in mels]
        mel_lengths = None
        if min(lengths) < max(lengths):
            mel_lengths = torch.tensor(lengths, device=self._execution_device)
        batch = pad_sequence(mels, batch_first=True).to(self._execution_device, self.vocoder.dtype)
        waveform = self.vocoder(batch, mel_lengths).waveform
        hop_length = self.vocoder.hop_length
        return [row[: length * hop_length] for row, length in zip(waveform, lengths, strict=True)]

    @torch.no_grad()
    def __call__(
        self,
        semantic_ids: torch.Tensor,
        voice: VoicePrompt | list[VoicePrompt],
        t2s_hidden_states: torch.Tensor | None = None,
        semantic_lengths: torch.LongTensor | None = None,
        mel_lengths: torch.LongTensor | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.7,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable[["IndexTTS2SemanticToMelPipeline", int, torch.Tensor, dict], dict]
        | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        fingerprint: str | None = None,
    ) -> IndexTTS2SemanticToMelPipelineOutput | tuple:
        r"""
        Args:
            semantic_ids (`torch.LongTensor` of shape `(batch_size, num_semantic_tokens)`):
                Codes, without start and stop; any valid code beyond a row's length.
            voice ([`VoicePrompt`] or a list of them):
                Who speaks: one voice for all rows or one for each.
            t2s_hidden_states (`torch.Tensor` of shape `(batch_size, num_semantic_tokens, t2s_hidden_size)`, *optional*):
                T2S states of the codes; without them the codes alone are used.
            semantic_lengths (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Codes of each row; all by default.
            mel_lengths (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Mel frames to make for each row; by default `semantic_lengths * mel_frames_per_token`, rounded down.
            num_inference_steps (`int`, *optional*):
                Steps from noise to mel; by default what the checkpoint's scheduler says, 25 in the released one.
            guidance_scale (`float`, defaults to 1.7):
                Strength of the conditions; 1.0 or less makes one network call a step instead of two.
            generator (`torch.Generator` or a list of them, *optional*):
                For the noise; one for each row makes rows independent of their batch.
            latents (`torch.Tensor` of shape `(batch_size, num_frames, num_mel_bins)`, *optional*):
                The noise itself, before the scheduler's `init_noise_sigma`; `num_frames` counts prompt and generated frames of
                the longest row.
            output_type (`str`, defaults to `"np"`):
                Waveforms as NumPy arrays (`"np"`) or tensors (`"pt"`), or no waveforms (`"mel"`).
            return_dict (`bool`, defaults to `True`):
                Whether to return the output class instead of a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step with the pipeline, the step, its time and a dict with `sample` (normalised mels of
                prompt and generated frames, zero on the prompt), which it may replace.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["sample"]`):
                What that dict holds.
            fingerprint (`str`, *optional*):
                That of this pipeline, when it is known already: taking it reads a little of every tensor.

        Returns:
            [`IndexTTS2SemanticToMelPipelineOutput`]

        Raises:
            ValueError: shapes, voices or options do not fit; a voice of another checkpoint; a scheduler with other times.
        """
        if callback_on_step_end_tensor_inputs is None:
            callback_on_step_end_tensor_inputs = ["sample"]
        voices = [voice] * len(semantic_ids) if isinstance(voice, VoicePrompt) else list(voice)
        self.check_inputs(
            semantic_ids,
            voices,
            t2s_hidden_states,
            semantic_lengths,
            mel_lengths,
            guidance_scale,
            output_type,
            callback_on_step_end_tensor_inputs,
            fingerprint,
        )
        self._guidance_scale = guidance_scale
        device, dtype = self._execution_device, self.s2m.dtype
        unique = {id(voice): voice.to(device, dtype) for voice in voices}
        voices = [unique[id(voice)] for voice in voices]

        # What to say, behind what the prompt says.
        if semantic_lengths is None:
            semantic_lengths = semantic_ids.new_full((len(semantic_ids),), semantic_ids.shape[1])
        if mel_lengths is None:
            mel_lengths = self.default_mel_lengths(semantic_lengths)
        content = self.encode_content(
            semantic_ids.to(device), semantic_lengths.to(device), mel_lengths.to(device), t2s_hidden_states
        )
        num_frames = mel_lengths.tolist()
        num_prompt_frames = [len(voice.prompt_mel) for voice in voices]
        lengths = [prompt + frames for prompt, frames in zip(num_prompt_frames, num_frames, strict=True)]
        content_embeds = pad_sequence(
            [
                torch.cat([voice.content_embeds, row[:frames]])
                for voice, row, frames in zip(voices, content, num_frames, strict=True)
            ],
            batch_first=True,
        )
        prompt_mel = content_embeds.new_zeros((len(voices), max(lengths), self.num_mel_bins))
        for row, voice in zip(prompt_mel, voices, strict=True):
            row[: len(voice.prompt_mel)] = self.s2m.normalize_mel(voice.prompt_mel)
        speaker_embeds = torch.stack([voice.speaker_embeds for voice in voices])
        steps = torch.arange(max(lengths), device=device)
        is_prompt = (steps < torch.tensor(num_prompt_frames, device=device)[:, None])[..., None]
        frame_lengths = torch.tensor(lengths, device=device) if min(lengths) < max(lengths) else None

        # Guidance runs both branches in one call: the second half of the batch has no prompt, voice or content.
        do_guidance = guidance_scale > 1.0
        if do_guidance:
            prompt_mel, content_embeds, speaker_embeds = (
                torch.cat([condition, torch.zeros_like(condition)])
                for condition in (prompt_mel, content_embeds, speaker_embeds)
            )
            frame_lengths = frame_lengths if frame_lengths is None else frame_lengths.repeat(2)

        if num_inference_steps is None and "default_num_inference_steps" not in self.scheduler.config:
            num_inference_steps = 25  # for another scheduler than ours, which knows by itself
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        if not 0.0 <= float(timesteps[0]) < 1.0:
            raise ValueError(
                f"{type(self.scheduler).__name__} begins at time {float(timesteps[0])}, but this model knows times from 0 "
                "(noise) to 1 (data). Use `IndexTTS2FlowMatchScheduler`."
            )
        sample = self.scheduler.init_noise_sigma * self.prepare_sample(lengths, generator, latents)
        sample = sample.masked_fill(is_prompt, 0.0)
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for step, timestep in enumerate(timesteps):
                model_input = torch.cat([sample, sample]) if do_guidance else sample
                velocity = self.s2m(
                    sample=model_input,
                    timestep=timestep.expand(len(model_input)),
                    prompt_mel=prompt_mel,
                    content_embeds=content_embeds,
                    speaker_embeds=speaker_embeds,
                    mel_lengths=frame_lengths,
                ).velocity
                if do_guidance:
                    conditional, unconditional = velocity.chunk(2)
                    velocity = guidance_scale * conditional - (guidance_scale - 1.0) * unconditional
                sample = self.scheduler.step(velocity, timestep, sample).prev_sample
                # The prompt is given as a condition; its frames stay empty in the sample.
                sample = sample.masked_fill(is_prompt, 0.0)

                if callback_on_step_end is not None:
                    callback_inputs = {"sample": sample} if "sample" in callback_on_step_end_tensor_inputs else {}
                    callback_outputs = callback_on_step_end(self, step, timestep, callback_inputs)
                    sample = callback_outputs.get("sample", sample)
                progress_bar.update()

        mels = [
            self.s2m.denormalize_mel(row[prompt : prompt + frames])
            for row, prompt, frames in zip(sample, num_prompt_frames, num_frames, strict=True)
        ]
        audios = None
        if output_type != "mel":
            audios = self.decode(mels)
            if output_type == "np":
                audios = [audio.float().cpu().numpy() for audio in audios]

        self.maybe_free_model_hooks()
        if not return_dict:
            return (audios, mels, self.sampling_rate)
        return IndexTTS2SemanticToMelPipelineOutput(audios=audios, mels=mels, sampling_rate=self.sampling_rate)


__all__ = ["IndexTTS2SemanticToMelPipeline", "IndexTTS2SemanticToMelPipelineOutput", "VoicePrompt"]
