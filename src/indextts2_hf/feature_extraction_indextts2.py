"""
From audio to the tensors the networks hear: the input of the speech encoder, the log-mel of the prompt and the filter
banks of the speaker encoder.

The file holds the readers and resamplers, the front ends as plain functions on waveforms, and the feature extractor
that ties them together for one clip. It knows no network and no text.
"""

import copy
import io
import math
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
import soxr
import torch
from torch.nn import functional as F
from transformers.audio_utils import mel_filter_bank
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin
from transformers.models.auto.feature_extraction_auto import feature_extractor_class_from_name
from transformers.utils import logging


logger = logging.get_logger(__name__)

AudioInput = (
    str
    | os.PathLike
    | bytes
    | BinaryIO
    | tuple[np.ndarray | torch.Tensor | list[float], int]
    | Mapping[str, Any]  # {"array", "sampling_rate"} or {"bytes", "path"}
)

# Shortest clip in seconds. The speech encoder's path needs 65 ms (five 25 ms frames, so that the conformers get three
# steps), the speaker encoder 45 ms (two steps for its deviation), the mel 17 ms (reflection). The rest is good sense.
MIN_AUDIO_S = 0.25

# Audio read beyond the longest clip, in seconds. The resampler sees so far ahead that the clip itself comes out bit for
# bit as from the whole file: needed 0.1 s at 8 kHz and 1 s at 1 kHz.
RESAMPLING_MARGIN_S = 1.0

# Hz. Below it there is no speech; more likely the rate was given in kHz.
MIN_SAMPLING_RATE = 4000

# Largest sample believed to be on the scale of 1, and the largest peak that counts as silence (-80 dB).
MAX_PEAK = 16.0
SILENT_PEAK = 1e-4

FULL_SCALE = {"int8": 2**7, "uint8": 2**7, "int16": 2**15, "int32": 2**31}

# Settings published with w2v-BERT 2.0, the speech encoder of the released checkpoint.
SEMANTIC_FEATURE_EXTRACTOR = {
    "feature_extractor_type": "SeamlessM4TFeatureExtractor",
    "feature_size": 80,
    "num_mel_bins": 80,
    "padding_side": "right",
    "padding_value": 1.0,
    "return_attention_mask": True,
    "sampling_rate": 16000,
    "stride": 2,
}


def load_audio(audio: AudioInput, max_duration_s: float | None = None) -> tuple[np.ndarray, int]:
    r"""
    One clip as a mono waveform at its own rate.

    A file cut short on disk gives what can be decoded of it, with a warning where its header promised more, or an error
    where its format cannot be read in part (FLAC, Ogg).

    Args:
        audio (`AudioInput`):
            A path; the bytes of a file; a binary file object (read from its start); a pair `(array, sampling_rate)`; a
            dictionary with `array` and `sampling_rate`; or one with `bytes` or `path`, as `datasets` gives for
            `Audio(decode=False)`. Files may be WAV, FLAC, Ogg or MP3. An array has the shape `(num_samples,)` or
            `(num_samples, num_channels)` and holds floats in [-1, 1], or `int8`, `uint8`, `int16` or `int32`, which are
            scaled to that. Channels are averaged.
        max_duration_s (`float`, *optional*):
            Stop reading after so many seconds.

    Returns:
        `tuple[np.ndarray, int]`: the waveform, float32 of shape `(num_samples,)`, and its sampling rate in Hz.

    Raises:
        `FileNotFoundError`, `IsADirectoryError`: the path is no file.
        `TypeError`: none of the forms above.
        `ValueError`: not decodable, empty, not finite, on another scale, or with a wrong shape or sampling rate.
    """
    waveform, sampling_rate, _ = _read_audio(audio, max_duration_s)
    return waveform, sampling_rate


def _read_audio(audio: AudioInput, max_duration_s: float | None) -> tuple[np.ndarray, int, float]:
    """`load_audio` with the duration of the whole clip in seconds as third value."""
    if isinstance(audio, Mapping):
        audio = _from_mapping(audio)
    if isinstance(audio, tuple) and len(audio) == 2:
        samples, sampling_rate, num_samples = _read_array(*audio, max_duration_s)
    elif isinstance(audio, (str, os.PathLike, bytes, bytearray)) or hasattr(audio, "read"):
        samples, sampling_rate, num_samples = _read_file(audio, max_duration_s)
    elif isinstance(audio, (np.ndarray, torch.Tensor, list)):
        raise ValueError("The audio array comes without a sampling rate. Pass the pair `(array, sampling_rate)`.")
    else:
        raise TypeError(
            f"Audio cannot be a `{type(audio).__name__}`. Pass a path, the bytes of a file, a binary file object, "
            '`(array, sampling_rate)`, `{"array": ..., "sampling_rate": ...}` or `{"bytes": ..., "path": ...}`.'
        )

    waveform = samples.mean(axis=1)
    if waveform.size == 0:
        raise ValueError(
            f"The audio is empty, or too damaged to be read; at least {MIN_AUDIO_S} s are needed. Record or export it again."
        )
    if not np.isfinite(waveform).all():
        raise ValueError(
            f"The audio holds {np.count_nonzero(~np.isfinite(waveform))} samples that are NaN or infinite; finite samples "
            "in [-1, 1] are needed. Repair them, for example with `numpy.nan_to_num`."
        )
    peak = np.abs(waveform).max()
    if peak > MAX_PEAK:
        raise ValueError(
            f"The audio reaches {peak:.0f} but float samples are to be in [-1, 1]. Divide by the full scale (32768 for "
            "16 bits), or pass the integers as `int16`."
        )
    return waveform, sampling_rate, num_samples / sampling_rate


def _from_mapping(audio: Mapping[str, Any]) -> AudioInput:
    if audio.get("array") is not None:
        return audio["array"], audio.get("sampling_rate")
    if audio.get("bytes") is not None:
        return audio["bytes"]
    if audio.get("path") is not None:
        return audio["path"]
    raise ValueError(
        f"The audio dictionary has the keys {sorted(audio)} but no value under `array`, `bytes` or `path`. Pass "
        '`{"array": ..., "sampling_rate": ...}` or `{"bytes": ..., "path": ...}`.'
    )


def _check_sampling_rate(sampling_rate: int | None) -> int:
    try:
        hertz = float(sampling_rate)
    except (TypeError, ValueError):
        hertz = math.nan
    if not (hertz.is_integer() and hertz >= MIN_SAMPLING_RATE):
        raise ValueError(
            f"The sampling rate is {sampling_rate!r} but must be a whole number of Hz, at least {MIN_SAMPLING_RATE}. "
            "Give it with the array, `(array, sampling_rate)`; a file with such a rate is no recording of speech."
        )
    return int(hertz)


def _read_array(
    array: np.ndarray | torch.Tensor | list[float], sampling_rate: int, max_duration_s: float | None
) -> tuple[np.ndarray, int, int]:
    """Samples `(num_samples, num_channels)` in [-1, 1], sampling rate, and the number of samples before the cut."""
    if isinstance(array, (int, np.integer)):
        raise ValueError("The audio pair is `(sampling_rate, array)`. Pass `(array, sampling_rate)`.")
    sampling_rate = _check_sampling_rate(sampling_rate)
    if isinstance(array, torch.Tensor):
        array = (array.float() if array.is_floating_point() else array).detach().cpu().numpy()
    array = np.asarray(array)
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2 or 0 < array.shape[0] < array.shape[1]:
        raise ValueError(
            f"The audio array has the shape {array.shape} but must be `(num_samples,)` or `(num_samples, num_channels)`. "
            "Pass one clip, and transpose `(num_channels, num_samples)`."
        )
    num_samples = array.shape[0]
    if max_duration_s is not None:
        array = array[: math.ceil(max_duration_s * sampling_rate)]
    if array.dtype.name in FULL_SCALE:
        offset = 128 if array.dtype == np.uint8 else 0
        array = (array.astype(np.float32) - offset) / FULL_SCALE[array.dtype.name]
    elif array.dtype.kind != "f":
        raise ValueError(
            f"The audio array is of type `{array.dtype}`, whose full scale is unknown. Pass floats in [-1, 1] or one of "
            f"{', '.join(f'`{name}`' for name in FULL_SCALE)}."
        )
    return array.astype(np.float32, copy=False), sampling_rate, num_samples


def _read_file(
    source: str | os.PathLike | bytes | BinaryIO, max_duration_s: float | None
) -> tuple[np.ndarray, int, int]:
    """As `_read_array`; the number of samples is what the file's header says."""
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.is_dir():
            raise IsADirectoryError(f"The audio path {str(path)!r} is a folder. Name a file in it.")
        if not path.is_file():
            raise FileNotFoundError(f"There is no audio file {str(path)!r}. Pass the path of a local file.")
        name, source = repr(str(path)), str(path)
    elif isinstance(source, (bytes, bytearray)):
        name, source = f"of {len(source)} bytes", io.BytesIO(source)
    else:
        name = repr(getattr(source, "name", type(source).__name__))
        if source.seekable():
            source.seek(0)
        else:
            source = io.BytesIO(source.read())

    try:
        with soundfile.SoundFile(source) as file:
            sampling_rate = _check_sampling_rate(file.samplerate)
            num_samples = file.frames
            num_wanted = num_samples
            if max_duration_s is not None:
                num_wanted = min(num_samples, math.ceil(max_duration_s * sampling_rate))
            samples = file.read(frames=num_wanted, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise ValueError(
            f"The audio file {name} is empty, damaged or in an unknown format ({error}). Pass WAV, FLAC, Ogg or MP3, or "
            "convert it first, for example with `ffmpeg -i INPUT output.wav`."
        ) from error
    if len(samples) < num_wanted:
        logger.warning(
            f"The audio file {name} ends after {len(samples) / sampling_rate:.2f} s but announces "
            f"{num_samples / sampling_rate:.2f} s: it was cut short."
        )
        num_samples = len(samples)
    return samples, sampling_rate, num_samples


def resample_soxr(waveform: np.ndarray, sampling_rate: int, new_sampling_rate: int) -> np.ndarray:
    r"""
    Waveform at another rate by the SoX resampler in its setting "HQ": how a file reaches 22.05 kHz, and the emotion
    reference 16 kHz.

    Args:
        waveform (`np.ndarray` of shape `(num_samples,)`):
            Mono, float32.
        sampling_rate, new_sampling_rate (`int`):
            Rates in Hz, before and after.

    Returns:
        `np.ndarray` of shape `(ceil(num_samples * new_sampling_rate / sampling_rate),)`, float32.
    """
    if sampling_rate == new_sampling_rate:
        return waveform
    resampled = soxr.resample(waveform, sampling_rate, new_sampling_rate, "HQ")
    # Parity: the original's loader rounds the length up and fills with zero; the resampler itself rounds to nearest.
    num_samples = math.ceil(len(waveform) * (new_sampling_rate / sampling_rate))
    return np.pad(resampled, (0, max(num_samples - len(resampled), 0)))[:num_samples]


@lru_cache(maxsize=16)
def _sinc_kernel(stride: int, num_phases: int) -> tuple[torch.Tensor, int]:
    """Filters `(num_phases, 1, 2 * width + stride)`, one per output phase, and their width in input samples."""
    cutoff = 0.99 * min(stride, num_phases)
    width = math.ceil(6 * stride / cutoff)
    taps = torch.arange(-width, width + stride, dtype=torch.float64) / stride
    # Parity: the phases are rounded to float32 before the float64 arithmetic; without it samples are off by 4e-6.
    phases = torch.arange(num_phases, dtype=torch.float32) / num_phases
    tau = ((taps - phases[:, None].double()) * cutoff).clamp(-6, 6)
    kernel = torch.cos(math.pi * tau / 12) ** 2 * torch.sinc(tau) * cutoff / stride
    return kernel[:, None].float(), width


def resample_sinc(waveform: torch.Tensor, sampling_rate: int, new_sampling_rate: int) -> torch.Tensor:
    r"""
    Waveform at another rate by a Hann-windowed sinc, six zero crossings wide, with its edge at 0.99 of the lower Nyquist
    frequency: how the speaker reference comes from 22.05 to 16 kHz. Differentiable.

    Args:
        waveform (`torch.Tensor` of shape `(..., num_samples)`):
            Float32.
        sampling_rate, new_sampling_rate (`int`):
            Rates in Hz, before and after.

    Returns:
        `torch.Tensor` of shape `(..., ceil(num_samples * new_sampling_rate / sampling_rate))`.
    """
    if sampling_rate == new_sampling_rate:
        return waveform
    divisor = math.gcd(sampling_rate, new_sampling_rate)
    stride, num_phases = sampling_rate // divisor, new_sampling_rate // divisor
    kernel, width = _sinc_kernel(stride, num_phases)
    num_samples = math.ceil(num_phases * waveform.shape[-1] / stride)

    padded = F.pad(waveform, (width, width + stride)).reshape(-1, 1, waveform.shape[-1] + 2 * width + stride)
    phases = F.conv1d(padded, kernel.to(waveform), stride=stride)
    resampled = phases.transpose(1, 2).reshape(*waveform.shape[:-1], -1)
    return resampled[..., :num_samples]


@lru_cache(maxsize=16)
def _slaney_filters(
    sampling_rate: int, num_mel_bins: int, n_fft: int, mel_fmin: float, mel_fmax: float
) -> torch.Tensor:
    filters = mel_filter_bank(
        num_frequency_bins=n_fft // 2 + 1,
        num_mel_filters=num_mel_bins,
        min_frequency=mel_fmin,
        max_frequency=mel_fmax,
        sampling_rate=sampling_rate,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters).float()


def log_mel(
    waveform: torch.Tensor,
    sampling_rate: int = 22050,
    num_mel_bins: int = 80,
    n_fft: int = 1024,
    win_length: int = 1024,
    hop_length: int = 256,
    mel_fmin: float = 0.0,
    mel_fmax: float | None = None,
) -> torch.Tensor:
    r"""
    Log-mel spectrogram as the vocoder reads it: Hann window, magnitudes, Slaney's scale and area normalisation, natural
    logarithm with the floor 1e-5. Differentiable.

    Args:
        waveform (`torch.Tensor` of shape `(batch_size, num_samples)` or `(num_samples,)`):
            Float32 in [-1, 1], with more than `(n_fft - hop_length) / 2` samples, because the ends are reflected.
        sampling_rate (`int`):
            Rate of `waveform` in Hz.
        num_mel_bins (`int`):
            Number of bands.
        n_fft, win_length, hop_length (`int`):
            Transform, window and step in samples.
        mel_fmin, mel_fmax (`float`):
            Edges of the lowest and the highest band in Hz; `None` for half the sampling rate.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_samples // hop_length, num_mel_bins)`, or without the batch.
    """
    padding = (n_fft - hop_length) // 2
    if waveform.shape[-1] <= padding:
        raise ValueError(
            f"`waveform` has {waveform.shape[-1]} samples but the mel needs more than {padding} to reflect its ends. Pass "
            f"at least {MIN_AUDIO_S} s."
        )
    mel_fmax = sampling_rate / 2 if mel_fmax is None else mel_fmax
    filters = _slaney_filters(sampling_rate, num_mel_bins, n_fft, mel_fmin, mel_fmax)
    padded = F.pad(waveform.reshape(-1, 1, waveform.shape[-1]), (padding, padding), mode="reflect")[:, 0]
    spectrum = torch.stft(
        padded,
        n_fft,
        hop_length=hop_length,
        win_length=win_length,
        window=torch.hann_window(win_length, device=waveform.device),
        center=False,
        return_complex=True,
    )
    magnitude = torch.sqrt(spectrum.real**2 + spectrum.imag**2 + 1e-9)
    mel = magnitude.transpose(1, 2) @ filters.to(waveform)
    return mel.clamp(min=1e-5).log().reshape(*waveform.shape[:-1], -1, num_mel_bins)


@lru_cache(maxsize=16)
def _kaldi_filters(sampling_rate: int, num_mel_bins: int, n_fft: int) -> torch.Tensor:
    filters = mel_filter_bank(
        num_frequency_bins=n_fft // 2 + 1,
        num_mel_filters=num_mel_bins,
        min_frequency=20,
        max_frequency=sampling_rate / 2,
        sampling_rate=sampling_rate,
        norm=None,
        mel_scale="kaldi",
        triangularize_in_mel_space=True,
    )
    return torch.from_numpy(filters).float()


def kaldi_fbank(waveform: torch.Tensor, sampling_rate: int = 16000, num_mel_bins: int = 80) -> torch.Tensor:
    r"""
    Log filter banks with Kaldi's defaults and no dither: 25 ms frames each 10 ms, whole frames only, mean removed and
    0.97 pre-emphasis per frame, Povey's window, power spectrum, bands from 20 Hz. Differentiable.

    Args:
        waveform (`torch.Tensor` of shape `(..., num_samples)`):
            Float32 in [-1, 1]; for the speaker encoder not scaled to 16 bits. At least one frame of 25 ms.
        sampling_rate (`int`):
            Rate of `waveform` in Hz.
        num_mel_bins (`int`):
            Number of bands.

    Returns:
        `torch.Tensor` of shape `(..., num_frames, num_mel_bins)` with
        `num_frames = 1 + (num_samples - frame) // shift`; the time mean is not removed yet.
    """
    frame_length, frame_shift = sampling_rate * 25 // 1000, sampling_rate // 100
    if waveform.shape[-1] < frame_length:
        raise ValueError(
            f"`waveform` has {waveform.shape[-1]} samples but one frame is {frame_length}. Pass at least {MIN_AUDIO_S} s."
        )
    n_fft = 2 ** math.ceil(math.log2(frame_length))
    window = torch.hann_window(frame_length, periodic=False, device=waveform.device) ** 0.85

    frames = waveform.unfold(-1, frame_length, frame_shift)
    frames = frames - frames.mean(dim=-1, keepdim=True)
    previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
    spectrum = torch.fft.rfft((frames - 0.97 * previous) * window, n=n_fft)
    power = spectrum.real**2 + spectrum.imag**2
    fbank = power @ _kaldi_filters(sampling_rate, num_mel_bins, n_fft).to(waveform)
    return fbank.clamp(min=torch.finfo(torch.float32).eps).log()


def _build_extractor(config: dict[str, Any]) -> SequenceFeatureExtractor:
    """The stock extractor that a configuration names."""
    config = copy.deepcopy(config)
    class_name = config.pop("feature_extractor_type", None)
    extractor_class = feature_extractor_class_from_name(class_name) if class_name else None
    if not (isinstance(extractor_class, type) and issubclass(extractor_class, SequenceFeatureExtractor)):
        raise ValueError(
            f"`semantic_feature_extractor` has the `feature_extractor_type` {class_name!r}, which is no audio feature "
            "extractor of transformers. Name one, for example 'SeamlessM4TFeatureExtractor'."
        )
    return extractor_class(**config)


# Names that transformers writes among an extractor's settings.
FOREIGN_SETTINGS = {"auto_map", "feature_extractor_type", "name_or_path", "processor_class"}


class IndexTTS2FeatureExtractor(FeatureExtractionMixin):
    r"""
    Reference audio as the tensors of one voice.

    A speaker clip is heard in three ways: by the speech encoder, by the speaker encoder, and as the mel prompt. An
    emotion clip is heard by the speech encoder alone. Clips are read one by one, because the speaker encoder and the
    normalisation of the speech encoder's input look at the whole of them: a voice is prepared once, then kept.

    Only the first `max_audio_s` seconds count; a longer clip is cut with a warning. A clip shorter than 0.25 s or without
    sound raises.

    Args:
        sampling_rate (`int`, *optional*, defaults to 22050):
            Rate of the mel prompt and of generated speech, in Hz.
        semantic_sampling_rate (`int`, *optional*, defaults to 16000):
            Rate of the speech encoder and the speaker encoder, in Hz.
        num_mel_bins (`int`, *optional*, defaults to 80):
            Bands of the mel prompt.
        n_fft (`int`, *optional*, defaults to 1024):
            Transform length of the mel prompt, in samples.
        win_length (`int`, *optional*, defaults to 1024):
            Window length of the mel prompt, in samples.
        hop_length (`int`, *optional*, defaults to 256):
            Step between mel frames, in samples.
        mel_fmin (`float`, *optional*, defaults to 0.0):
            Lower edge of the lowest mel band, in Hz.
        mel_fmax (`float`, *optional*):
            Upper edge of the highest mel band, in Hz; by default half the sampling rate.
        max_audio_s (`float`, *optional*, defaults to 15.0):
            Seconds of a clip that are used.
        semantic_feature_extractor (`dict`, *optional*):
            Configuration of the speech encoder's own extractor, with its class name under `feature_extractor_type`; by
            default the one published with w2v-BERT 2.0.
    """

    model_input_names = [
        "speaker_input_features",
        "speaker_attention_mask",
        "prompt_mel",
        "speaker_fbank",
        "speaker_emotion_input_features",
        "speaker_emotion_attention_mask",
        "emotion_input_features",
        "emotion_attention_mask",
    ]

    def __init__(
        self,
        sampling_rate: int = 22050,
        semantic_sampling_rate: int = 16000,
        num_mel_bins: int = 80,
        n_fft: int = 1024,
        win_length: int = 1024,
        hop_length: int = 256,
        mel_fmin: float = 0.0,
        mel_fmax: float | None = None,
        max_audio_s: float = 15.0,
        semantic_feature_extractor: dict[str, Any] | None = None,
        **kwargs,
    ):
        unknown = [name for name in kwargs if name not in FOREIGN_SETTINGS and not name.startswith("_")]
        if unknown:
            raise ValueError(
                f"IndexTTS2FeatureExtractor has no setting {', '.join(map(repr, unknown))}. Correct "
                "`preprocessor_config.json`, or update indextts2-hf if a newer version wrote it."
            )
        super().__init__(**kwargs)
        if max_audio_s < MIN_AUDIO_S:
            raise ValueError(
                f"`max_audio_s` is {max_audio_s} but a clip needs at least {MIN_AUDIO_S} s. Raise it; the released "
                "checkpoint uses 15.0."
            )
        self.sampling_rate = sampling_rate
        self.semantic_sampling_rate = semantic_sampling_rate
        self.num_mel_bins = num_mel_bins
        self.n_fft = n_fft
        self.win_length = win_length
        self.hop_length = hop_length
        self.mel_fmin = mel_fmin
        self.mel_fmax = mel_fmax
        self.max_audio_s = max_audio_s
        self.semantic_feature_extractor = _build_extractor(semantic_feature_extractor or SEMANTIC_FEATURE_EXTRACTOR)
        if self.semantic_feature_extractor.sampling_rate != semantic_sampling_rate:
            raise ValueError(
                f"`semantic_sampling_rate` is {semantic_sampling_rate} but `semantic_feature_extractor` works at "
                f"{self.semantic_feature_extractor.sampling_rate} Hz. Set both to the rate of the speech encoder."
            )

    def to_dict(self) -> dict[str, Any]:
        """The configuration, JSON-able, with the nested extractor's own; `from_dict` gives an equal extractor."""
        output = super().to_dict()
        output["semantic_feature_extractor"] = self.semantic_feature_extractor.to_dict()
        return output

    def __call__(
        self,
        speaker_audio: AudioInput | None = None,
        emotion_audio: AudioInput | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        r"""
        Features of one speaker clip, one emotion clip, or both.

        Args:
            speaker_audio (`AudioInput`, *optional*):
                The voice, in any form that `load_audio` takes.
            emotion_audio (`AudioInput`, *optional*):
                A recording whose emotion is taken instead of the voice's own.
            return_tensors (`str`, *optional*, defaults to `"pt"`):
                `"pt"` or `"np"`.

        Returns:
            `BatchFeature`: for `speaker_audio`
            `speaker_input_features` `(1, num_frames, 160)` with `speaker_attention_mask` `(1, num_frames)`, at 50 Hz, of
            which the last frame is masked when half of it is padding;
            `prompt_mel` `(1, num_mel_frames, num_mel_bins)`;
            `speaker_fbank` `(1, num_fbank_frames, 80)`, at 100 Hz, without its time mean;
            `speaker_emotion_input_features` and `speaker_emotion_attention_mask`, the voice's own emotion: the same recording
            read the way an emotion recording is, straight to 16 kHz, while the speaker path comes there through
            `sampling_rate`, 22.05 kHz. The two differ a little and both are needed; where that is 16 kHz too they are the
            same, and made once. For `emotion_audio` `emotion_input_features` with `emotion_attention_mask`, shaped as the
            speaker's. Float32, masks int64.

        Raises:
            `ValueError`: no audio, or a clip that is too short or silent; and all that `load_audio` raises.
        """
        if speaker_audio is None and emotion_audio is None:
            raise ValueError("There is no audio. Pass `speaker_audio`, `emotion_audio` or both.")
        features = {}
        if speaker_audio is not None:
            clip = self._load_clip("speaker_audio", speaker_audio)
            waveform = self._resample_clip(*clip, self.sampling_rate)
            semantic_waveform = resample_sinc(waveform, self.sampling_rate, self.semantic_sampling_rate)
            fbank = kaldi_fbank(semantic_waveform, self.semantic_sampling_rate)
            features |= self._semantic_input("speaker", semantic_waveform)
            features["prompt_mel"] = log_mel(
                waveform[None],
                sampling_rate=self.sampling_rate,
                num_mel_bins=self.num_mel_bins,
                n_fft=self.n_fft,
                win_length=self.win_length,
                hop_length=self.hop_length,
                mel_fmin=self.mel_fmin,
                mel_fmax=self.mel_fmax,
            )
            features["speaker_fbank"] = (fbank - fbank.mean(dim=0))[None]
            if self.sampling_rate == self.semantic_sampling_rate:
                # Both ways are the same one.
                for name in ("input_features", "attention_mask"):
                    features[f"speaker_emotion_{name}"] = features[f"speaker_{name}"]
            else:
                waveform = self._resample_clip(*clip, self.semantic_sampling_rate)
                features |= self._semantic_input("speaker_emotion", waveform)
        if emotion_audio is not None:
            clip = self._load_clip("emotion_audio", emotion_audio)
            features |= self._semantic_input("emotion", self._resample_clip(*clip, self.semantic_sampling_rate))
        return BatchFeature(features, tensor_type=return_tensors)

    def _load_clip(self, name: str, audio: AudioInput) -> tuple[np.ndarray, int]:
        """Waveform at its own rate, `max_audio_s` and a margin long, and the rate; checked for length and sound."""
        waveform, sampling_rate, duration_s = _read_audio(audio, self.max_audio_s + RESAMPLING_MARGIN_S)
        if duration_s < MIN_AUDIO_S:
            raise ValueError(
                f"`{name}` is {duration_s:.3f} s long but at least {MIN_AUDIO_S} s are needed, better 3 to 15 s. Pass a "
                "longer clip."
            )
        if np.abs(waveform[: int(self.max_audio_s * sampling_rate)]).max() < SILENT_PEAK:
            raise ValueError(f"`{name}` is silent in its first {self.max_audio_s:g} s. Pass a clip with speech.")
        if duration_s > self.max_audio_s:
            logger.warning(
                f"`{name}` is {duration_s:.1f} s long: the first {self.max_audio_s:g} s are used, the other "
                f"{duration_s - self.max_audio_s:.1f} s are cut. Pass the part you want to be heard."
            )
        return waveform, sampling_rate

    def _resample_clip(self, waveform: np.ndarray, sampling_rate: int, new_sampling_rate: int) -> torch.Tensor:
        # Parity: cut after resampling, so that the last samples know what follows.
        resampled = resample_soxr(waveform, sampling_rate, new_sampling_rate)
        return torch.tensor(resampled[: int(self.max_audio_s * new_sampling_rate)])

    def _semantic_input(self, prefix: str, waveform: torch.Tensor) -> dict[str, torch.Tensor]:
        extractor = self.semantic_feature_extractor
        encoded = extractor(
            waveform.numpy(),
            sampling_rate=self.semantic_sampling_rate,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return {
            f"{prefix}_input_features": encoded[extractor.model_input_names[0]].float(),
            f"{prefix}_attention_mask": encoded["attention_mask"].long(),
        }


__all__ = [
    "AudioInput",
    "IndexTTS2FeatureExtractor",
    "kaldi_fbank",
    "load_audio",
    "log_mel",
    "resample_sinc",
    "resample_soxr",
]
