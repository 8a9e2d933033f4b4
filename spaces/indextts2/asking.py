"""
What was asked of the Space: the limits, the fields of the page and of the API, and the pipeline's arguments that they make.

Paths of recordings end in `read_recording`: neither the package nor a message ever sees one.
"""

import copy
import html
import inspect
import io
import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import soundfile

from indextts2_hf import EMOTIONS, IndexTTS2TextToAudioPipeline


logger = logging.getLogger(__name__)

# What one visitor may ask for.
MAX_CHARACTERS = 1000
MAX_COMPARED_CHARACTERS = 200
MAX_DESCRIPTION_CHARACTERS = 200
MAX_SPEECH_S = 60
MAX_RECORDING_S = 60

# Where the emotion and the length come from, on the page.
OWN, WEIGHTS, RECORDING, WORDS = "the voice's own", "eight sliders", "a recording", "words"
FREE, SECONDS, TOKENS = "free", "seconds", "tokens"

SETTINGS = (
    "temperature", "top_p", "top_k", "num_beams", "text_guidance_scale", "num_candidates", "num_inference_steps",
    "guidance_scale", "segment_silence_s",
)  # fmt: skip
PAGE_FIELDS = (
    "text", "voice", "voice_audio", "emotion_from", *EMOTIONS, "emotion_audio", "emotion_text", "emotion_strength",
    "length_from", "duration_s", "num_semantic_tokens", "seed", *SETTINGS,
)  # fmt: skip
API_FIELDS = tuple(name for name in PAGE_FIELDS if name not in ("emotion_from", "length_from"))


def usual_settings(pipe: IndexTTS2TextToAudioPipeline) -> dict[str, float]:
    """The settings that can be changed here, and the values that the pipeline has for them by itself."""
    settings = pipe.model.generation_config
    arguments = inspect.signature(pipe.model.stream).parameters
    scheduler = copy.deepcopy(pipe.model.scheduler)
    scheduler.set_timesteps()
    return {
        "temperature": settings.temperature or 1.0,
        "top_p": settings.top_p or 1.0,
        "top_k": settings.top_k or 50,
        "num_beams": settings.num_beams or 1,
        "text_guidance_scale": getattr(settings, "text_guidance_scale", None) or 1.0,
        "num_candidates": getattr(settings, "num_candidates", None) or 1,
        "num_inference_steps": len(scheduler.timesteps),
        "guidance_scale": arguments["guidance_scale"].default,
        "segment_silence_s": arguments["segment_silence_s"].default,
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


def read_page(*values: Any) -> dict[str, Any]:
    """
    What the page asks for, as the API takes it: of the fields only those that are chosen.

    Raises:
        ValueError: what was chosen is missing.
    """
    page = dict(zip(PAGE_FIELDS, values, strict=True))
    emotion_from, length_from = page.pop("emotion_from"), page.pop("length_from")
    weights = {name: page.pop(name) for name in EMOTIONS}
    emotion_audio, emotion_text = page.pop("emotion_audio"), page.pop("emotion_text")
    lengths = {SECONDS: {"duration_s": page.pop("duration_s")}}
    lengths[TOKENS] = {"num_semantic_tokens": page.pop("num_semantic_tokens")}
    if page["voice_audio"]:
        page["voice"] = None
    if emotion_from == OWN:
        page["emotion_strength"] = None
    elif emotion_from == WEIGHTS:
        page |= {name: weight for name, weight in weights.items() if weight}
        if not any(weights.values()):
            raise ValueError(f"All eight emotions are at 0: raise one, or choose “{OWN}”.")
    elif emotion_from == RECORDING:
        page["emotion_audio"] = emotion_audio
        if not emotion_audio:
            raise ValueError(f"The recording of the emotion is missing: give one, or choose “{OWN}”.")
    elif emotion_from == WORDS:
        page["emotion_text"] = emotion_text
        if not (emotion_text or "").strip():
            raise ValueError(f"The emotion in words is missing: write some, or choose “{OWN}”.")
    length = lengths.get(length_from, {})
    if None in length.values():
        raise ValueError(f"The length in {length_from} is missing: give one, or choose “{FREE}”.")
    return page | length


def read_request(pipe: IndexTTS2TextToAudioPipeline, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    The pipeline's arguments for what was given, and the same as they are shown, with names in place of recordings.

    Raises:
        ValueError: something cannot be spoken, or contradicts something else.
    """
    given = {name: value for name, value in given.items() if value is not None}
    text, seed = given.get("text", ""), given.get("seed", "").strip()
    weights = {name: given[name] for name in EMOTIONS if name in given}
    for names in (
        ("voice", "voice_audio"),
        (*list(weights)[:1], "emotion_audio", "emotion_text"),
        ("duration_s", "num_semantic_tokens"),
    ):
        both = [name for name in names if name in given]
        if len(both) > 1:
            raise ValueError(f"Both `{both[0]}` and `{both[1]}` were given: give one of them.")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"The text has {len(text):,} characters, but at most {MAX_CHARACTERS:,} are spoken here at a time. Shorten "
            "it, or use the Python package, which has no such limit."
        )
    if seed and not seed.isdecimal():
        raise ValueError(f"The seed is {seed!r}, but it must be a whole number, or empty for a new one.")
    length = len(given.get("emotion_text", "joy").strip())
    if not 0 < length <= MAX_DESCRIPTION_CHARACTERS:
        raise ValueError(
            f"The description of the emotion has {length} characters, but it needs some, and at most "
            f"{MAX_DESCRIPTION_CHARACTERS}."
        )
    if "emotion_text" in given and pipe.emotion_text_model is None:
        raise ValueError(
            "This checkpoint has no emotion language model, so it cannot take the emotion from words. Give weights, such as "
            "`happy`, or a recording."
        )
    voice = given.get("voice_audio") or given.get("voice") or pipe.model.config.default_voice
    if not voice:
        raise ValueError("No voice was given and this checkpoint brings none: upload or record one.")
    arguments = {"voice": voice}
    if weights:
        arguments["emotion_weights"] = weights
    arguments |= {name: given[name] for name in ("emotion_audio", "emotion_text") if name in given}
    if given.get("emotion_strength", 1.0) != 1.0:
        arguments["emotion_strength"] = given["emotion_strength"]
    arguments |= {name: given[name] for name in ("duration_s", "num_semantic_tokens") if name in given}
    arguments["seed"] = int(seed) if seed else secrets.randbits(32)
    usual = usual_settings(pipe)
    arguments |= {name: given[name] for name in usual if given.get(name, usual[name]) != usual[name]}
    shown = dict(arguments)
    for name, path in (("voice", given.get("voice_audio")), ("emotion_audio", given.get("emotion_audio"))):
        if path:
            arguments[name], shown[name] = read_recording(path), Path(path).name
    return arguments, shown


@contextmanager
def refusals() -> Iterator[None]:
    """What was asked wrongly is told to the visitor; what else goes wrong is logged here."""
    try:
        yield
    except (ValueError, TypeError) as error:
        # The page takes messages for HTML.
        message = html.escape(str(error), quote=False)
        raise gr.Error(message, duration=20, print_exception=False) from None
    except Exception as error:
        logger.exception("a request failed")
        message = "Something went wrong here, and it was noted. Please try again."
        raise gr.Error(message, print_exception=False) from error
