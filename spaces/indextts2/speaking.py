"""
What the Space does with a request: checks it, speaks, and shows the sound and the call in Python that makes the same sound.

It knows no widget. Paths of recordings end in `read_recording`: neither the package nor a message ever sees one.
"""

import base64
import gc
import html
import io
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


try:
    from spaces import GPU  # ZeroGPU; it has to be imported before anything that touches CUDA
except ImportError:

    def GPU(**_: Any) -> Callable:
        return lambda function: function


import gradio as gr
import numpy as np
import soundfile
import torch
from PIL import Image
from transformers.audio_utils import mel_filter_bank

from indextts2_hf import EMOTIONS, IndexTTS2TextToAudioPipeline, embedded_checkpoint


logger = logging.getLogger(__name__)

# What one visitor may ask for.
MAX_CHARACTERS = 1000
MAX_DESCRIPTION_CHARACTERS = 200
MAX_SPEECH_S = 60
MAX_RECORDING_S = 60

# Where the emotion and the length come from.
OWN, WEIGHTS, RECORDING, WORDS = "the voice's own", "eight sliders", "a recording", "words"
FREE, SECONDS, TOKENS = "free", "seconds", "tokens"


def usual_settings(pipe: IndexTTS2TextToAudioPipeline) -> dict[str, float]:
    """The settings that can be changed here, and the values that the pipeline has for them by itself."""
    settings = pipe.model.generation_config
    return {
        "temperature": settings.temperature or 1.0,
        "top_p": settings.top_p or 1.0,
        "top_k": settings.top_k or 50,
        "num_beams": settings.num_beams or 1,
        "text_guidance_scale": getattr(settings, "text_guidance_scale", 1.0),
        "num_candidates": getattr(settings, "num_candidates", 1),
        "num_inference_steps": len(pipe.model.scheduler.config.get("grid") or range(26)) - 1,
        "guidance_scale": 1.7,
        "segment_silence_s": 0.2,
    }


def read_recording(path: str) -> bytes:
    """
    The bytes of an uploaded file, once its header says that it is sound of a reasonable length.

    Raises:
        ValueError: it is gone, no sound, or too long.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError("The recording is no longer here: upload or record it again.") from error
    try:
        duration_s = soundfile.info(io.BytesIO(content)).duration
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{Path(path).name!r} is no sound that can be read. Give WAV, FLAC, Ogg or MP3.") from error
    if duration_s > MAX_RECORDING_S:
        raise ValueError(
            f"The recording lasts {duration_s:.0f} s, but at most {MAX_RECORDING_S} s are taken. Cut out 5 to 15 s in which "
            "one person speaks without noise or music."
        )
    return content


def read_emotion(
    emotion_from: str | None, weights: dict[str, float | None], emotion_audio: str | None, emotion_text: str | None
) -> dict[str, Any]:
    """
    The pipeline's argument for the chosen emotion; a recording is still a path in it.

    Raises:
        ValueError: what was chosen is missing or too long.
    """
    if emotion_from == WEIGHTS:
        given = {name: weight for name, weight in weights.items() if weight}
        if not given:
            raise ValueError(f"All eight emotions are at 0: raise one, or choose “{OWN}”.")
        return {"emotion_weights": given}
    if emotion_from == RECORDING:
        if not emotion_audio:
            raise ValueError(f"The recording of the emotion is missing: give one, or choose “{OWN}”.")
        return {"emotion_audio": emotion_audio}
    if emotion_from == WORDS:
        length = len((emotion_text or "").strip())
        if not 0 < length <= MAX_DESCRIPTION_CHARACTERS:
            raise ValueError(
                f"The description of the emotion has {length} characters, but it needs some, and at most "
                f"{MAX_DESCRIPTION_CHARACTERS}."
            )
        return {"emotion_text": emotion_text}
    return {}


def read_length(length_from: str | None, duration_s: float | None, num_semantic_tokens: int | None) -> dict[str, Any]:
    """
    The pipeline's argument for the chosen length.

    Raises:
        ValueError: it is missing.
    """
    given = {SECONDS: {"duration_s": duration_s}, TOKENS: {"num_semantic_tokens": num_semantic_tokens}}
    given = given.get(length_from, {})
    if None in given.values():
        raise ValueError(f"The length in {length_from} is missing: give one, or choose “{FREE}”.")
    return given


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


def draw_speech(waveform: np.ndarray, sampling_rate: int) -> Image.Image:
    """Waveform and mel spectrogram over the same time, to be read on a light and on a dark page."""
    from matplotlib.figure import Figure

    grey, accent = "#7c8694", "#14958a"
    frames = torch.stft(
        torch.from_numpy(waveform), 1024, 256, window=torch.hann_window(1024), pad_mode="constant", return_complex=True
    )
    filters = mel_filter_bank(513, 80, 0.0, sampling_rate / 2, sampling_rate)
    mel = 20 * np.log10(np.maximum(filters.T @ frames.abs().numpy(), 1e-5))
    mel = np.maximum(mel, mel.max() - 80)
    end_s = len(waveform) / sampling_rate
    figure = Figure(figsize=(9, 4), dpi=110, facecolor="none")
    figure.subplots_adjust(0.06, 0.12, 0.99, 0.97, hspace=0.1)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    pieces = np.array_split(waveform, min(len(waveform), 1200))
    times = np.linspace(0, end_s, len(pieces))
    top.fill_between(times, [piece.min() for piece in pieces], [piece.max() for piece in pieces], color=accent, lw=0.6)
    top.set(xlim=(0, end_s), ylim=(-1, 1), yticks=(-1, 0, 1), ylabel="amplitude")
    bottom.imshow(mel, origin="lower", aspect="auto", extent=(0, end_s, 0, 80), cmap="magma", interpolation="nearest")
    bottom.set(xlabel="seconds", ylabel="mel bin")
    for axes in (top, bottom):
        axes.set_facecolor("none")
        axes.tick_params(colors=grey)
        axes.xaxis.label.set_color(grey)
        axes.yaxis.label.set_color(grey)
        axes.spines[:].set_visible(False)
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


def to_data_url(waveform: np.ndarray, sampling_rate: int) -> str:
    file = io.BytesIO()
    soundfile.write(file, to_pcm(waveform), sampling_rate, format="WAV")
    return f"data:audio/wav;base64,{base64.b64encode(file.getvalue()).decode()}"


def make_speak(pipe: IndexTTS2TextToAudioPipeline) -> Callable[..., Iterator[tuple]]:
    """The function behind the button and the API, over a pipeline."""
    model, usual = pipe.model, usual_settings(pipe)
    sampling_rate = model.config.sampling_rate

    @GPU(duration=120)
    def speak(
        text: str,
        # None is what a field gives that was left out or emptied.
        voice: str | None = None,
        voice_audio: str | None = None,
        emotion_from: str | None = None,
        happy: float | None = None, angry: float | None = None, sad: float | None = None, afraid: float | None = None,
        disgusted: float | None = None, melancholic: float | None = None, surprised: float | None = None,
        calm: float | None = None,
        emotion_audio: str | None = None,
        emotion_text: str | None = None,
        emotion_strength: float | None = None,
        length_from: str | None = None,
        duration_s: float | None = None,
        num_semantic_tokens: int | None = None,
        seed: str | None = None,
        temperature: float | None = None, top_p: float | None = None, top_k: int | None = None,
        num_beams: int | None = None, text_guidance_scale: float | None = None, num_candidates: int | None = None,
        num_inference_steps: int | None = None, guidance_scale: float | None = None, segment_silence_s: float | None = None,
        progress=gr.Progress(),  # noqa: B008 - how Gradio finds it
    ) -> Iterator[tuple]:  # fmt: skip
        """
        Speech for a text: the sound, its segments as they get ready, a picture, the call in Python that makes the same sound,
        and a line of figures.
        """
        started = time.perf_counter()
        weights = dict(
            zip(EMOTIONS, (happy, angry, sad, afraid, disgusted, melancholic, surprised, calm), strict=True)
        )
        settings = (
            temperature, top_p, top_k, num_beams, text_guidance_scale, num_candidates, num_inference_steps, guidance_scale,
            segment_silence_s,
        )  # fmt: skip
        pieces: list[np.ndarray] = []
        segments: list[dict[str, Any]] = []
        num_tokens = 0
        try:
            if len(text or "") > MAX_CHARACTERS:
                raise ValueError(
                    f"The text has {len(text):,} characters, but at most {MAX_CHARACTERS:,} are spoken here at a time. Shorten "
                    "it, or use the Python package, which has no such limit."
                )
            if not voice and not voice_audio:
                raise ValueError("No voice was given and this checkpoint brings none: upload or record one.")
            if (seed or "").strip() and not seed.strip().isdecimal():
                raise ValueError(f"The seed is {seed!r}, but it must be a whole number, or empty for a new one.")
            given = {"voice": voice_audio or voice}
            given |= read_emotion(emotion_from, weights, emotion_audio, emotion_text)
            if len(given) > 1 and emotion_strength not in (None, 1.0):
                given["emotion_strength"] = emotion_strength
            given |= read_length(length_from, duration_s, num_semantic_tokens)
            given["seed"] = int(seed) if (seed or "").strip() else secrets.randbits(32)
            given |= {
                name: value for name, value in zip(usual, settings, strict=True) if value not in (None, usual[name])
            }
            pause = model.pause_samples(given.get("segment_silence_s", usual["segment_silence_s"]))
            shown = dict(given)
            for name, path in (("voice", voice_audio), ("emotion_audio", given.get("emotion_audio"))):
                if path:
                    given[name], shown[name] = read_recording(path), Path(path).name
            texts = pipe.processor.split_text(text or "")

            def report(stage: str, done: int, total: int | None) -> None:
                # The tokens of a segment count as half of its work: their number is not known ahead.
                part = 0.5 + 0.5 * done / total if total else 0.5 * min(1.0, done / 250)
                what = f"step {done} of {total}" if total else f"{done} semantic tokens"
                place = f"Segment {len(segments) + 1} of {len(texts)}"
                progress((len(segments) + part) / len(texts), desc=f"{place}, {what}")

            yield None, [], None, "", "Speaking …"
            for segment in pipe.stream(text, progress_callback=report, **given):
                waveform = segment.audio.cpu().numpy()
                pieces.append(waveform)
                num_tokens += len(segment.semantic_ids)
                segments.append(
                    {
                        "number": segment.segment_index + 1,
                        "text": texts[segment.segment_index],
                        "audio": to_data_url(waveform, sampling_rate),
                    }
                )
                if not segment.is_last:
                    pieces.append(np.zeros(pause, dtype=np.float32))
                    ready = f"Segment {len(segments)} of {len(texts)} is ready."
                    yield gr.skip(), list(segments), gr.skip(), gr.skip(), ready
        except (ValueError, TypeError) as error:
            # The page takes messages for HTML.
            message = html.escape(str(error), quote=False)
            raise gr.Error(message, duration=20, print_exception=False) from None
        except Exception as error:
            logger.exception("a request failed")
            message = "Something went wrong here, and it was noted. Please try again."
            raise gr.Error(message, print_exception=False) from error

        speech = np.concatenate(pieces)
        if len(segments) > 1:
            # Several beams draw together: the segments have to go through the model one by one there too.
            shown["segment_batch_size"] = 1
        yield (
            (sampling_rate, to_pcm(speech)),
            segments if len(segments) > 1 else [],
            draw_speech(speech, sampling_rate),
            write_call(pipe, text, shown),
            f"**{len(speech) / sampling_rate:.2f}\u00a0s** of speech, {len(segments)} segment{'s'[: len(segments) != 1]}, "
            f"{num_tokens} semantic tokens, seed {given['seed']}. Made in {time.perf_counter() - started:.1f}\u00a0s.",
        )

    return speak
