"""
What the Space shows of a speech: the call in Python that makes it, the visitor's own text in pieces, subtitles, pictures and sound files.
"""

import base64
import difflib
import gc
import io
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from huggingface_hub import ModelCard, try_to_load_from_cache
from PIL import Image
from transformers.audio_utils import hertz_to_mel, mel_filter_bank

from indextts2_hf import IndexTTS2FeatureExtractor, IndexTTS2TextToAudioPipeline, embedded_checkpoint


LANGUAGES = {"en": "English", "zh": "Chinese"}
LINKS = "[Paper](https://arxiv.org/abs/2506.21619), [original model](https://huggingface.co/IndexTeam/IndexTTS-2)"


FOLDER = Path(__file__).parent

LONG_TEXT = (
    "The lighthouse keeper climbed the stairs every evening, and counted the steps as he went. There were two hundred and "
    "four of them, and he knew each one by its sound. On the night of the great storm he lost count for the first time."
)
# By the names of the API. `make_examples.py` speaks them beforehand, with the seed 0.
EXAMPLES = {
    "A greeting": {"text": "Hello there. How are you today?"},
    "In exactly 3 seconds": {"text": "This line has to fit between two cuts.", "duration_s": 3.0},
    "With joy": {"text": "You did it! I knew you would.", "happy": 1.0},
    "A long text": {"text": LONG_TEXT},
}
VOICE_LINE = "This is the voice that I have, and you can choose it."

# What is shown before there is anything.
NOTHING = {"speech": None, "segments": [], "picture": None, "code": "", "downloads": [], "versions": []}


def write_call(pipe: IndexTTS2TextToAudioPipeline, text: str, arguments: dict[str, Any]) -> str:
    """The Python that makes the same sound. A checkpoint in a folder is named without where the folder is."""
    name = str(pipe.model.config.name_or_path)
    if os.path.isdir(name):
        name = "" if Path(name) == embedded_checkpoint() else Path(name).name
    lines = [f"    {name}={value!r},\n" for name, value in arguments.items()]
    return (
        "from indextts2_hf import IndexTTS2TextToAudioPipeline\n\n"
        f"pipe = IndexTTS2TextToAudioPipeline.from_pretrained({repr(name) if name else ''})\n"
        f"speech = pipe(\n    {text!r},\n{''.join(lines)})\n"
    )


def find_words(text: str) -> list[re.Match]:
    """Words, and Chinese, Japanese and Korean characters one by one."""
    return list(
        re.finditer(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]|[^\s\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]+", text)
    )


def share_text(text: str, spoken: list[str]) -> list[str]:
    """
    The visitor's own text in pieces, one for each spoken segment. The spoken ones are normalised (capitals, numbers in words), so
    their words are matched with the visitor's.
    """
    own = find_words(text)
    others = [find_words(piece) for piece in spoken]

    def bare(words: list[re.Match]) -> list[str]:
        return [re.sub(r"\W", "", word[0]).casefold() for word in words]

    matcher = difflib.SequenceMatcher(
        None, bare(own), bare([word for piece in others for word in piece]), autojunk=False
    )
    pieces, start, end = [], 0, 0
    for piece in others[:-1]:
        end += len(piece)
        first = start
        for _, own_start, own_end, other_start, other_end in matcher.get_opcodes():
            if other_start < end <= other_end:
                part = (end - other_start) / (other_end - other_start)
                start = max(first, own_start + round(part * (own_end - own_start)))
        pieces.append(own[first:start])
    pieces.append(own[start:])
    return [text[piece[0].start() : piece[-1].end()] if piece else "" for piece in pieces]


def write_subtitles(segments: list[dict[str, Any]]) -> str:
    def stamp(seconds: float) -> str:
        minutes, milliseconds = divmod(round(seconds * 1000), 60_000)
        return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02},{milliseconds % 1000:03}"

    return "\n".join(
        f"{one['number']}\n{stamp(one['start_s'])} --> {stamp(one['end_s'])}\n{' '.join(one['text'].split())}\n"
        for one in segments
    )


def measure_mel(waveform: np.ndarray, extractor: IndexTTS2FeatureExtractor) -> np.ndarray:
    """Level in decibels of each mel bin of the checkpoint in each frame, `(num_mel_bins, num_frames)`, 80 below the largest at least."""
    frames = torch.stft(
        torch.from_numpy(waveform),
        extractor.n_fft,
        extractor.hop_length,
        extractor.win_length,
        window=torch.hann_window(extractor.win_length),
        pad_mode="constant",
        return_complex=True,
    )
    filters = mel_filter_bank(
        extractor.n_fft // 2 + 1,
        extractor.num_mel_bins,
        extractor.mel_fmin,
        extractor.mel_fmax or extractor.sampling_rate / 2,
        extractor.sampling_rate,
        norm="slaney",
        mel_scale="slaney",
    )
    mel = 20 * np.log10(np.maximum(filters.T @ frames.abs().numpy(), 1e-5))
    return np.maximum(mel, mel.max() - 80)


def find_bin(frequency_hz: float, extractor: IndexTTS2FeatureExtractor) -> float:
    """The mel bin whose centre is at a frequency; its first bin is 0."""
    least, most = extractor.mel_fmin, extractor.mel_fmax or extractor.sampling_rate / 2
    least, most, value = (hertz_to_mel(one, "slaney") for one in (least, most, frequency_hz))
    return float((value - least) / (most - least) * (extractor.num_mel_bins + 1) - 1)


def draw_mel(waveform: np.ndarray, extractor: IndexTTS2FeatureExtractor) -> Image.Image:
    """A mel spectrogram without axes, a pixel for each bin and frame."""
    from matplotlib import colormaps

    mel = measure_mel(waveform, extractor)[::-1]
    return Image.fromarray(colormaps["magma"]((mel - mel.min()) / max(np.ptp(mel), 1e-5), bytes=True)[..., :3])


def draw_speech(waveform: np.ndarray, extractor: IndexTTS2FeatureExtractor) -> Image.Image:
    """Waveform and mel spectrogram over the same time, to be read on a light and on a dark page."""
    from matplotlib.figure import Figure

    grey, accent = "#7c8694", "#14958a"
    mel = measure_mel(waveform, extractor)
    end_s = len(waveform) / extractor.sampling_rate
    figure = Figure(figsize=(9, 4.6), dpi=110, facecolor="none")
    figure.subplots_adjust(0.085, 0.13, 0.985, 0.97, hspace=0.1)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    pieces = np.array_split(waveform, min(len(waveform), 1200))
    times = np.linspace(0, end_s, len(pieces))
    top.fill_between(times, [piece.min() for piece in pieces], [piece.max() for piece in pieces], color=accent, lw=0.6)
    top.set(xlim=(0, end_s), ylim=(-1, 1), yticks=(-1, 0, 1))
    top.set_ylabel("amplitude", fontsize=12)
    # Bins are pixels around whole numbers.
    edges = (0, end_s, -0.5, extractor.num_mel_bins - 0.5)
    bottom.imshow(mel, origin="lower", aspect="auto", extent=edges, cmap="magma", interpolation="nearest")
    ticks = [khz for khz in (0.5, 1, 2, 4, 8) if 1000 * khz <= (extractor.mel_fmax or extractor.sampling_rate / 2)]
    bottom.set_yticks([min(find_bin(1000 * khz, extractor), edges[3]) for khz in ticks], [f"{khz:g}" for khz in ticks])
    bottom.set_xlabel("seconds", fontsize=12)
    bottom.set_ylabel("kHz", fontsize=12)
    for axes in (top, bottom):
        axes.set_facecolor("none")
        axes.tick_params(colors=grey, labelsize=11)
        axes.xaxis.label.set_color(grey)
        axes.yaxis.label.set_color(grey)
        axes.spines[:].set_visible(False)
    figure.align_ylabels()
    file = io.BytesIO()
    figure.savefig(file, format="png")
    # A figure is a circle of references with a buffer in it: without this it stays until a collection happens to come.
    figure.clear()
    del figure, top, bottom, axes
    gc.collect()
    return Image.open(file)


def to_pcm(waveform: np.ndarray) -> np.ndarray:
    """16-bit samples, which Gradio passes on as they are; it would scale floats to their peak."""
    return np.round(np.clip(waveform, -1.0, 1.0) * 32767).astype(np.int16)


def write_sound(waveform: np.ndarray, sampling_rate: int, sound_format: str) -> bytes:
    """A file of 16 bits in one of libsndfile's formats: WAV, FLAC, MP3."""
    file = io.BytesIO()
    soundfile.write(file, to_pcm(waveform), sampling_rate, format=sound_format)
    return file.getvalue()


def to_data_url(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def read_card(pipe: IndexTTS2TextToAudioPipeline) -> ModelCard | None:
    """The checkpoint's card, if it has one; that of the Hub was downloaded with it."""
    name = str(pipe.model.config.name_or_path)
    path = Path(name) / "README.md" if os.path.isdir(name) else try_to_load_from_cache(name, "README.md")
    if not isinstance(path, str | Path) or not os.path.isfile(path):
        return None
    return ModelCard.load(path, ignore_metadata_errors=True)


def write_facts(pipe: IndexTTS2TextToAudioPipeline, card: ModelCard | None) -> str:
    """What is loaded, in a line of Markdown: its name, size, languages and rate, and where more is written."""
    name = str(pipe.model.config.name_or_path)
    link = f"[{name}](https://huggingface.co/{name})"
    if os.path.isdir(name):
        link = "The small checkpoint of the package" if Path(name) == embedded_checkpoint() else Path(name).name
    num_parameters = sum(parameter.numel() for parameter in pipe.model.parameters()) / 1e6
    languages = [] if card is None else card.data.to_dict().get("language") or []
    languages = [languages] if isinstance(languages, str) else languages
    facts = [
        f"{num_parameters:,.0f}\u00a0M parameters"
        if num_parameters >= 1
        else f"{num_parameters:.1g}\u00a0M parameters",
        *(LANGUAGES.get(language, language) for language in languages),
        f"{pipe.model.config.sampling_rate / 1000:g}\u00a0kHz",
    ]
    return f"{link}: **{', '.join(facts)}**. {LINKS}"


def example_path(name: str) -> Path:
    return FOLDER / "examples" / f"{name.lower().replace(' ', '-')}.flac"


def is_embedded(pipe: IndexTTS2TextToAudioPipeline) -> bool:
    """Whether it speaks with the small checkpoint, which made the examples."""
    return Path(str(pipe.model.config.name_or_path)) == embedded_checkpoint()


@lru_cache(maxsize=16)
def show_example(pipe: IndexTTS2TextToAudioPipeline, name: str) -> list[Any]:
    """Speech, segments, picture, call, status and downloads of an example."""
    example = EXAMPLES[name]
    if not is_embedded(pipe):
        return [*NOTHING.values(), f"“{name}” is in the fields: press Speak."]
    samples, rate = soundfile.read(example_path(name), dtype="int16")
    arguments = {"voice": pipe.model.config.default_voice}
    if "happy" in example:
        arguments["emotion_weights"] = {"happy": example["happy"]}
    if "duration_s" in example:
        arguments["duration_s"] = example["duration_s"]
    shown = {
        "speech": (rate, samples),
        "picture": draw_speech(samples.astype("float32") / 32767, pipe.model.feature_extractor),
        "code": write_call(pipe, example["text"], arguments | {"seed": 0}),
    }
    status = f"“{name}”: {len(samples) / rate:.2f} s, made beforehand. Press Speak for another take."
    return [*(NOTHING | shown).values(), status]
