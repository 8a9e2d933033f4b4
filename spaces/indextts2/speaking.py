"""
What the Space does with a request: speaks, step by step, until nobody waits any more, and gives what is shown of it.

`make_speak` is the API: what is given counts. `make_speak_from_page` and `make_compare` read the page, where the radio buttons say
which fields count. No function here knows a widget.
"""

import io
import queue
import secrets
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any


try:
    from spaces import GPU  # ZeroGPU; it has to be imported before anything that touches CUDA
except ImportError:

    def GPU(**_: Any) -> Callable:
        return lambda function: function


import gradio as gr
import numpy as np

from asking import (
    API_FIELDS,
    FREE,
    MAX_COMPARED_CHARACTERS,
    OWN,
    PAGE_FIELDS,
    read_page,
    read_request,
    refusals,
    usual_settings,
)
from indextts2_hf import IndexTTS2TextToAudioPipeline
from showing import (
    NOTHING,
    draw_mel,
    draw_speech,
    share_text,
    to_data_url,
    to_pcm,
    write_call,
    write_sound,
    write_subtitles,
)


# What is spoken side by side: parts of the free length, and emotions at their full weight.
LENGTHS = {"0.8 × as long": 0.8, "As it comes": None, "1.25 × as long": 1.25}
FEELINGS = {"Neutral": None, "Happy": "happy", "Sad": "sad"}

# Seconds between two reports of progress, and characters in a second of usual speech, by which it is guessed.
REPORT_EVERY_S = 0.2
CHARACTERS_PER_SECOND = 14

API_ANSWER = ("speech", "segments", "picture", "code", "status")
PAGE_ANSWER = (*API_ANSWER, "downloads", "versions", "take")

# The one thread that speaks; a request that was stopped leaves it at its next step.
SPEAKER = ThreadPoolExecutor(1)


def find_unspoken(pipe: IndexTTS2TextToAudioPipeline, text: str, segments: list[list[str]]) -> str:
    """The letters and signs of a text that the vocabulary lacks, punctuation left out; `segments` are its pieces."""
    tokenizer = pipe.processor.tokenizer
    pieces = [piece for segment in segments for piece in segment]
    ids = tokenizer.convert_tokens_to_ids(pieces)
    unknown = {
        letter
        for piece, token_id in zip(pieces, ids, strict=True)
        if token_id == tokenizer.unk_token_id
        for letter in piece
    }
    # The text was set in capitals.
    letters = [letter for letter in dict.fromkeys(text) if {letter, *letter.upper()} & (unknown - {"▁"})]
    return " ".join(letter for letter in letters if unicodedata.category(letter)[0] != "P")


class Stopped(Exception):
    """Nobody waits for the answer any more."""


def in_background(work: Callable[[Callable[[Any], None]], None]) -> Iterator[Any]:
    """
    What `work` hands over, as it comes, from the thread that speaks. When the iterator is closed (by Stop, a client that cancels, or a
    page that was left), `work` ends the next time that it hands over something, or `None`, which is nothing.
    """
    handed: queue.SimpleQueue = queue.SimpleQueue()
    is_left, end = threading.Event(), object()

    def hand_over(item: Any) -> None:
        if is_left.is_set():
            raise Stopped
        if item is not None:
            handed.put(item)

    future = SPEAKER.submit(work, hand_over)
    future.add_done_callback(lambda _: handed.put(end))
    try:
        while (item := handed.get()) is not end:
            yield item
        future.result()
    finally:
        is_left.set()
        future.cancel()


@dataclass
class Speech:
    """A speech that grows: `segments` are there as they get ready, `waveform` at the end."""

    shown: dict[str, Any]
    texts: list[str]
    unspoken: str
    part: float = 0.0
    num_tokens: int = 0
    segments: list[dict[str, Any]] = field(default_factory=list)
    waveform: np.ndarray | None = None
    is_cut_off: bool = False

    @property
    def progress(self) -> str:
        return (
            f"Speaking, {self.part:.0%}: segment {min(len(self.segments) + 1, len(self.texts))} of {len(self.texts)}"
        )

    @property
    def notes(self) -> str:
        """What the visitor should know of it, or nothing."""
        notes = ""
        if self.unspoken:
            notes += f" Not spoken, because this checkpoint does not know it: {self.unspoken}."
        if self.is_cut_off:
            notes += " It was cut off without having ended: shorten the sentences, or give a length."
        return notes


def grow_speech(pipe: IndexTTS2TextToAudioPipeline, given: dict[str, Any]) -> Iterator[Speech]:
    """The same speech again and again, whenever there is more of it."""
    model = pipe.model
    rate, token_rate = model.config.sampling_rate, model.t2s.config.semantic_token_rate
    arguments, shown = read_request(pipe, given)
    text = given.get("text") or ""
    pieces = pipe.processor.tokenizer.split_text(text, pipe.processor.max_text_tokens)
    spoken = [pipe.processor.tokenizer.convert_tokens_to_string(segment) for segment in pieces]
    speech = Speech(shown, share_text(text, spoken), find_unspoken(pipe, text, pieces))
    pause = model.pause_samples(arguments.get("segment_silence_s", usual_settings(pipe)["segment_silence_s"]))
    is_free = not {"duration_s", "num_semantic_tokens"} & arguments.keys()
    waveforms: list[np.ndarray] = []

    def work(hand_over: Callable[[Any], None]) -> None:
        done_segments, last_report = 0, 0.0

        def report(stage: str, done: int, total: int | None) -> None:
            nonlocal last_report
            now = time.monotonic()
            # The tokens of a segment count as half of its work: their number is not known ahead.
            guess = token_rate * len(spoken[done_segments]) / CHARACTERS_PER_SECOND
            part = 0.5 + 0.5 * done / total if total else 0.5 * min(1.0, done / guess)
            is_due = now - last_report >= REPORT_EVERY_S
            last_report = now if is_due else last_report
            hand_over((done_segments + part) / len(spoken) if is_due else None)

        for segment in pipe.stream(text, progress_callback=report, **arguments):
            done_segments += 1
            hand_over(segment)

    with closing(in_background(work)) as answers:
        for answer in answers:
            if isinstance(answer, float):
                speech.part = answer
            else:
                waveform = answer.audio.cpu().numpy()
                start_s = sum(map(len, waveforms)) / rate
                waveforms.append(waveform)
                speech.num_tokens += len(answer.semantic_ids)
                speech.is_cut_off |= is_free and len(answer.semantic_ids) >= (
                    model.generation_config.max_new_tokens or np.inf
                )
                speech.segments.append(
                    {
                        "number": answer.segment_index + 1,
                        # Gradio would run `${…}` as a program of the page: an invisible character parts it.
                        "text": speech.texts[answer.segment_index].replace("${", "$\u2060{"),
                        "start_s": start_s,
                        "end_s": start_s + len(waveform) / rate,
                        "audio": to_data_url(write_sound(waveform, rate, "WAV"), "audio/wav"),
                    }
                )
                speech.part = len(speech.segments) / len(spoken)
                if not answer.is_last:
                    waveforms.append(np.zeros(pause, dtype=np.float32))
            yield speech
    if len(speech.segments) > 1:
        # Several beams draw together: the segments have to go through the model one by one there too.
        speech.shown["segment_batch_size"] = 1
    speech.waveform = np.concatenate(waveforms)
    yield speech


def grow_answer(pipe: IndexTTS2TextToAudioPipeline, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What changes in the answer, by the names of `PAGE_ANSWER`."""
    rate, started, num_shown = pipe.model.config.sampling_rate, time.perf_counter(), 0
    with closing(grow_speech(pipe, given)) as states:
        for speech in states:
            changes = {"status": speech.progress}
            if len(speech.segments) > num_shown and len(speech.segments) < len(speech.texts):
                changes["segments"], num_shown = list(speech.segments), len(speech.segments)
            if speech.waveform is None:
                yield changes
    length = f"{len(speech.waveform) / rate:.2f} s"
    num_segments = f"{len(speech.segments)} segment{'s'[: len(speech.segments) != 1]}"
    status = f"{length} of speech, {num_segments}, {speech.num_tokens} semantic tokens, seed {speech.shown['seed']}."
    yield {
        "speech": (rate, to_pcm(speech.waveform)),
        "segments": speech.segments if len(speech.segments) > 1 else [],
        "picture": draw_speech(speech.waveform, pipe.model.feature_extractor),
        "code": write_call(pipe, given["text"], speech.shown),
        "status": f"{status} Made in {time.perf_counter() - started:.1f} s.{speech.notes}",
        "downloads": write_downloads(speech, rate),
        "take": {
            "text": given["text"],
            "figures": f"{length}, {describe(speech.shown)}",
            "audio": to_data_url(write_sound(speech.waveform, rate, "FLAC"), "audio/flac"),
        },
    }


def write_downloads(speech: Speech, sampling_rate: int) -> list[dict[str, str]]:
    """What can be had beside the WAV of the player."""
    subtitles = write_subtitles(speech.segments).encode()
    mp3 = write_sound(speech.waveform, sampling_rate, "MP3")
    return [
        {"name": "MP3", "file": "speech.mp3", "url": to_data_url(mp3, "audio/mpeg")},
        {"name": "Subtitles (SRT)", "file": "speech.srt", "url": to_data_url(subtitles, "application/x-subrip")},
    ]


def describe(shown: dict[str, Any]) -> str:
    """Voice, emotion and seed of a take, in few words."""
    emotion = shown.get("emotion_weights") or shown.get("emotion_audio") or shown.get("emotion_text") or ""
    if isinstance(emotion, dict):
        emotion = " ".join(f"{name} {weight:g}" for name, weight in emotion.items())
    return ", ".join(filter(None, (shown["voice"], emotion, f"seed {shown['seed']}")))


def make_speak(pipe: IndexTTS2TextToAudioPipeline) -> Callable[..., Iterator[tuple]]:
    """The function behind the API, over a pipeline."""

    @GPU(duration=120)
    def speak(
        text: str,
        voice: str | None = None,
        voice_audio: str | None = None,
        happy: float | None = None, angry: float | None = None, sad: float | None = None, afraid: float | None = None,
        disgusted: float | None = None, melancholic: float | None = None, surprised: float | None = None,
        calm: float | None = None,
        emotion_audio: str | None = None,
        emotion_text: str | None = None,
        emotion_strength: float | None = None,
        duration_s: float | None = None,
        num_semantic_tokens: int | None = None,
        seed: str | None = None,
        temperature: float | None = None, top_p: float | None = None, top_k: int | None = None,
        num_beams: int | None = None, text_guidance_scale: float | None = None, num_candidates: int | None = None,
        num_inference_steps: int | None = None, guidance_scale: float | None = None, segment_silence_s: float | None = None,
    ) -> Iterator[tuple]:  # fmt: skip
        """
        Speech for a text: the sound, its segments as they get ready, a picture, the call in Python that makes the same sound,
        and a line of figures. What is left out is as the checkpoint has it.
        """
        given = {name: value for name, value in locals().items() if name in API_FIELDS}
        yield from answer_with(API_ANSWER, pipe, lambda: given)

    return speak


def make_speak_from_page(pipe: IndexTTS2TextToAudioPipeline) -> Callable[..., Iterator[tuple]]:
    """The function behind the button: takes `PAGE_FIELDS`, gives `PAGE_ANSWER`."""

    @GPU(duration=120)
    def speak_from_page(*values: Any) -> Iterator[tuple]:
        yield from answer_with(PAGE_ANSWER, pipe, lambda: read_page(*values))

    return speak_from_page


def answer_with(
    names: tuple[str, ...], pipe: IndexTTS2TextToAudioPipeline, read: Callable[[], dict[str, Any]]
) -> Iterator[tuple]:
    """Answers in the order of `names`; the first one empties what is there from before."""
    empty = NOTHING | {"status": "Speaking …"}
    yield tuple(empty.get(name, gr.skip()) for name in names)
    with refusals(), closing(grow_answer(pipe, read())) as answers:
        for answer in answers:
            yield tuple(answer.get(name, gr.skip()) for name in names)


def make_compare(pipe: IndexTTS2TextToAudioPipeline, variants: dict[str, Any]) -> Callable[..., Iterator[tuple]]:
    """
    The function behind a comparison, of `LENGTHS` or of `FEELINGS`: takes `PAGE_FIELDS`, gives a list of versions, those that are ready, and
    the status.
    """
    rate = pipe.model.config.sampling_rate

    @GPU(duration=120)
    def compare(*values: Any) -> Iterator[tuple]:
        yield [], "Speaking …"
        with refusals():
            page = dict(zip(PAGE_FIELDS, values, strict=True))
            page["length_from"] = FREE
            page["emotion_from"] = OWN if variants is FEELINGS else page["emotion_from"]
            given = read_page(*page.values())
            if len(given["text"] or "") > MAX_COMPARED_CHARACTERS:
                raise ValueError(
                    f"The text has {len(given['text']):,} characters, but at most {MAX_COMPARED_CHARACTERS} are compared: "
                    "it is spoken three times. Shorten it to one line."
                )
            given["seed"] = (given["seed"] or "").strip() or str(secrets.randbits(32))
            speeches: dict[str, Speech] = {}
            # First the one that is as it is: the others follow its length.
            for label, variant in sorted(variants.items(), key=lambda item: item[1] is not None):
                change = {}
                if isinstance(variant, str):
                    change = {variant: 1.0}
                elif variant is not None:
                    natural_s = next(len(one.waveform) for one in speeches.values()) / rate
                    change = {"duration_s": round(variant * natural_s, 2)}
                with closing(grow_speech(pipe, given | change)) as states:
                    for speech in states:
                        done = (len(speeches) + speech.part) / len(variants)
                        yield gr.skip(), f"Speaking, {done:.0%}: {label}"
                speeches[label] = speech
                yield [show_version(name, speeches, rate, pipe) for name in variants if name in speeches], gr.skip()
            yield gr.skip(), f"{len(variants)} versions, seed {given['seed']}.{speech.notes}"

    return compare


def show_version(
    label: str, speeches: dict[str, Speech], rate: int, pipe: IndexTTS2TextToAudioPipeline
) -> dict[str, Any]:
    """One of the versions that are compared; `width` is its part of the longest one, in per cent."""
    waveform = speeches[label].waveform
    file = io.BytesIO()
    draw_mel(waveform, pipe.model.feature_extractor).save(file, format="PNG")
    return {
        "label": label,
        "length": f"{len(waveform) / rate:.2f} s",
        "width": round(100 * len(waveform) / max(len(one.waveform) for one in speeches.values())),
        "audio": to_data_url(write_sound(waveform, rate, "FLAC"), "audio/flac"),
        "picture": to_data_url(file.getvalue(), "image/png"),
    }
