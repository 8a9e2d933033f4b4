"""
Lets the teacher speak the sentences of `make_texts.py`: hibari-tts (Apache-2.0), in several voices, tempi and manners.

    python training/recipes/tiny/make_speech.py TEXTS/train.txt OUTPUT --num_sentences 24000

`OUTPUT` becomes an audio folder: FLAC at 16 kHz and `metadata.csv` with `file_name`, `text`, `speaker`, `emotion`, `language`, and beside each
clip a JSON file with its alignment (`train_semantic_encoder.py`). Who speaks a sentence, and how, depends on the sentence alone: a
larger `--num_sentences` adds clips and changes none, and what is there already is not made again.

    python training/recipes/tiny/make_speech.py --references OUTPUT

makes one recording of each voice that is shipped instead, from which its voice file is made; some are shipped themselves (`export.py`).

hibari gives the parts of which it makes a waveform, so its pitch, formants, tilt and breath can be changed before; and it rounds a
duration for each phoneme, so the alignment is exact. Needs hibari-tts, onnx, onnxruntime, soundfile, soxr and tqdm.
"""

import argparse
import csv
import hashlib
import json
import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from tqdm import tqdm


SAMPLING_RATE = 16000  # of the clips
TEACHER_RATE = 24000
FRAME_S = 0.025  # of the durations in hibari's graph; its pitch has two values in that time
DURATIONS = "/Clip_output_0"  # in hibari's graph
# What is left of the silence before and behind a sentence, frames.
EDGES = (3, 4)
SILENCE = "_"
# Symbols that lengthen or stress another one, which takes their time: the next one, or the one before.
JOINED_TO_NEXT, JOINED_TO_LAST = "ˈˌ", "ː"
PUNCTUATION = ';:,.!?—…"()“”'
NUM_BINS = 601  # of hibari's spectra, 0 to 12 kHz
TILT_CENTER_HZ = 1000.0  # a tilt turns the spectrum around it
# Mean level of what is neutral, dB of full scale, and the highest peak that is left: what is loud must find room above it.
LEVEL_DB, MOST_PEAK = -24.0, 0.99


@dataclass(frozen=True)
class Voice:
    """
    Args:
        share (`float`): of the sentences.
        pitch, formants (`float`): factors on hibari's.
    """

    share: float
    pitch: float = 1.0
    formants: float = 1.0


@dataclass(frozen=True)
class Manner:
    """
    Args:
        pitch, pitch_range, speed (`float`): factors; the range is that of the logarithm around its mean.
        tilt_db_per_octave, level_db, breath_db (`float`): of the spectrum, of everything, of the noise part.
    """

    pitch: float = 1.0
    pitch_range: float = 1.0
    speed: float = 1.0
    tilt_db_per_octave: float = 0.0
    level_db: float = 0.0
    breath_db: float = 0.0


# The five that are shipped, three of them with their recording.
VOICES = {
    "heart": Voice(0.2),
    "low": Voice(0.12, pitch=0.75, formants=0.93),
    "deep": Voice(0.12, pitch=0.5, formants=0.83),
    "bright": Voice(0.12, pitch=1.12, formants=1.08),
    "child": Voice(0.12, pitch=1.3, formants=1.17),
}
SHIPPED_VOICES = tuple(VOICES)
# And a few dozen that differ in pitch and in the length of the vocal tract, so that a voice is learnt as something that varies.
REFERENCE_TEXT = "Every voice has its own way through a sentence."
NUM_OTHER_VOICES = 32
for number in range(NUM_OTHER_VOICES):
    VOICES[f"other{number:02}"] = Voice(
        0.32 / NUM_OTHER_VOICES,
        pitch=0.55 * (1.3 / 0.55) ** (number / (NUM_OTHER_VOICES - 1)),
        formants=0.86
        * (1.16 / 0.86) ** ((0.3 * number + 0.7 * (7 * number % NUM_OTHER_VOICES)) / (NUM_OTHER_VOICES - 1)),
    )
SHIPPED_RECORDINGS = ("heart", "low", "bright")
# In the directions that are known of acted speech (Scherer 2003, table 5: pitch, range, rate, level, high frequencies). Most phones have one to
# three frames, to which the graph rounds: at speeds of 1.3, 1.25, 1.1, 0.9, 0.85 and 0.8 a sentence has 0.87, 0.88, 0.97, 1.04, 1.1
# and 1.23 times its length, and at 1.35 0.69.
MANNERS = {
    "happy": Manner(1.22, 1.5, 1.25, 1.5, 2.0),
    "angry": Manner(1.15, 1.45, 1.3, 3.0, 4.0),
    "sad": Manner(0.86, 0.5, 0.78, -3.0, -5.0),
    "afraid": Manner(1.25, 0.8, 1.25, 0.0, -1.0, 3.0),
    "disgusted": Manner(0.9, 1.15, 0.85, -1.0, 1.0),
    "melancholic": Manner(0.93, 0.7, 0.82, -2.0, -3.0),
    "surprised": Manner(1.3, 1.6, 1.0, 1.0, 1.0),
    "calm": Manner(0.94, 0.65, 0.82, -1.5, -3.0),
}
# Of the sentences: with a manner, or neutral in a random tempo; the rest is neutral in the teacher's own. A manner has its own tempo
# alone, so that chance does not vary it by more than the manner changes it.
MANNER_SHARE, TEMPO_SHARE = 0.5, 0.25
SPEEDS = (0.78, 1.25)


def choose(sentence: str) -> tuple[str, str | None, float]:
    """Voice, manner and speed of a sentence."""
    seed = int(hashlib.sha256(sentence.encode()).hexdigest()[:16], 16)
    rng = np.random.default_rng(seed)
    voice = rng.choice(list(VOICES), p=[voice.share for voice in VOICES.values()])
    speed = float(np.exp(rng.uniform(*np.log(SPEEDS))))
    manner = rng.choice(list(MANNERS))
    share = rng.random()
    has_tempo = MANNER_SHARE <= share < MANNER_SHARE + TEMPO_SHARE
    return str(voice), str(manner) if share < MANNER_SHARE else None, speed if has_tempo else 1.0


class Teacher:
    """hibari in one process, one thread."""

    def __init__(self) -> None:
        import onnx
        import onnxruntime
        from hibari import Hibari

        self.hibari = Hibari()
        graph = onnx.load(self.hibari.model_path)
        graph.graph.output.append(onnx.helper.make_tensor_value_info(DURATIONS, onnx.TensorProto.FLOAT, None))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def speak(self, sentence: str, voice: Voice, manner: Manner, speed: float) -> tuple[np.ndarray, dict[str, list]]:
        """The sentence at 16 kHz, float32, at its level, without long silence around it; and its alignment."""
        from hibari import dsp

        phonemes = " ".join(self.hibari.phonemize(sentence))
        ids = np.array([self.hibari.ids(phonemes)], np.int64)
        outputs = self.session.run(None, {"ids": ids, "speed": np.array([speed * manner.speed], np.float32)})
        *parts, durations = outputs
        harmonics, phase, noise, rest, rest_phase, pitch = (part[0] for part in parts)
        bins = np.arange(NUM_BINS) / voice.formants
        octaves = np.log2(np.maximum(np.arange(NUM_BINS) * (TEACHER_RATE / 2) / (NUM_BINS - 1), 60.0) / TILT_CENTER_HZ)
        gain = (manner.tilt_db_per_octave * octaves * np.log(10) / 20)[:, None]
        breath = manner.breath_db * np.log(10) / 20
        harmonics, noise, rest = (warp(part, bins) for part in (harmonics, noise, rest))
        nearest = np.minimum(np.round(bins).astype(int), NUM_BINS - 1)
        pitch = change_pitch(pitch, voice.pitch * manner.pitch, manner.pitch_range)
        waveform = dsp.synth(
            np.float32(harmonics + gain),
            phase[nearest],
            np.float32(noise + gain + breath),
            np.float32(rest + gain),
            rest_phase[nearest],
            pitch,
            np.random.default_rng(0),
        )
        symbols = [symbol for symbol in phonemes if symbol in self.hibari.vocab]
        phones, ends, words = align(symbols, durations.ravel().astype(int))
        first, last = spoken(phones, ends)
        waveform = waveform[round(first * FRAME_S * TEACHER_RATE) : round(last * FRAME_S * TEACHER_RATE)]
        waveform = soxr.resample(waveform, TEACHER_RATE, SAMPLING_RATE)

        def seconds(frames: list[float]) -> list[float]:
            return [round(FRAME_S * (min(max(frame, first), last) - first), 4) for frame in frames]

        alignment = {
            "phones": phones,
            "ends_s": seconds(ends),
            "word_begins_s": seconds([begin for begin, _ in words]),
            "word_ends_s": seconds([end for _, end in words]),
            "pitch_hz": [round(float(value), 1) for value in pitch[2 * first : 2 * last]],
            "pitch_step_s": FRAME_S / 2,
        }
        return set_level(waveform, LEVEL_DB + manner.level_db), alignment


def align(symbols: list[str], durations: np.ndarray) -> tuple[list[str], list[float], list[tuple[float, float]]]:
    """
    Phones and the frames at which they end, of the phoneme symbols and the durations of these and of the silences around them;
    and first and last frame of the sounds of each word.

    Marks of stress and length belong to the sound that they mark, a gap between words half to either neighbour.
    """
    phones, ends, position = [SILENCE], [float(durations[0])], float(durations[0])
    numbers, number = [-1], 0  # of the word of each phone
    for symbol, duration in zip(symbols, durations[1:-1].tolist(), strict=True):
        position += duration
        if symbol == " ":
            ends[-1] = position - duration / 2
            number += 1
        elif symbol in JOINED_TO_LAST:
            ends[-1] = position
        elif symbol not in JOINED_TO_NEXT:
            phones.append(SILENCE if symbol in PUNCTUATION else symbol)
            ends.append(position)
            numbers.append(number)
    words: dict[int, tuple[float, float]] = {}
    for index in range(1, len(phones)):
        if phones[index] != SILENCE:
            begin, _ = words.get(numbers[index], (ends[index - 1], None))
            words[numbers[index]] = (begin, ends[index])
    return [*phones, SILENCE], [*ends, float(durations.sum())], list(words.values())


def spoken(phones: list[str], ends: list[float]) -> tuple[int, int]:
    """First and last frame of a clip from which the silence at either end is taken, but for `EDGES`."""
    sounds = [index for index, phone in enumerate(phones) if phone != SILENCE]
    begin, end = ends[sounds[0] - 1], ends[sounds[-1]]
    return max(0, int(begin) - EDGES[0]), min(int(ends[-1]), int(np.ceil(end)) + EDGES[1])


def warp(part: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """`(601, num_frames)` read at the fractional `bins` of its first axis; the last one beyond."""
    low = np.minimum(bins.astype(int), NUM_BINS - 2)
    weight = np.clip(bins - low, 0.0, 1.0)[:, None]
    return part[low] * (1 - weight) + part[low + 1] * weight


def change_pitch(pitch: np.ndarray, factor: float, pitch_range: float) -> np.ndarray:
    """A contour in Hz, zero or low where unvoiced, as hibari writes it."""
    is_voiced = pitch > 40.0
    if not is_voiced.any():
        return pitch
    logs = np.log(np.maximum(pitch, 40.0))
    mean = logs[is_voiced].mean()
    return np.where(is_voiced, np.exp(mean + pitch_range * (logs - mean)) * factor, pitch).astype(np.float32)


def set_level(waveform: np.ndarray, level_db: float) -> np.ndarray:
    """
    The waveform at a mean level in dB of full scale, less where its peak would be too high. By the mean, not by the peak: a lively
    melody and a bright spectrum have higher peaks, so that at one peak what should be loud is softer than what is neutral.
    """
    gain = 10 ** (level_db / 20) / np.sqrt(np.mean(np.square(waveform)))
    return np.float32(waveform * min(gain, MOST_PEAK / np.abs(waveform).max()))


# --- the folder ----------------------------------------------------------------------------------------------------------


teacher: Teacher | None = None


def start_worker() -> None:
    global teacher
    os.environ["OMP_NUM_THREADS"] = "1"
    teacher = Teacher()


def make_clip(task: tuple[str, Path]) -> None:
    sentence, path = task
    voice, manner, speed = choose(sentence)
    waveform, alignment = teacher.speak(sentence, VOICES[voice], MANNERS.get(manner, Manner()), speed)
    path.with_suffix(".json").write_text(json.dumps(alignment, ensure_ascii=False), encoding="utf-8")
    temporary = path.with_name(f".{path.name}.tmp")
    soundfile.write(temporary, waveform, SAMPLING_RATE, format="FLAC")
    os.replace(temporary, path)


def make_references(folder: Path) -> None:
    """One neutral recording of each of the shipped voices, with `metadata.csv`."""
    folder.mkdir(parents=True, exist_ok=True)
    speaker = Teacher()
    for name in SHIPPED_VOICES:
        waveform, _ = speaker.speak(REFERENCE_TEXT, VOICES[name], Manner(), speed=1.0)
        soundfile.write(folder / f"{name}.flac", waveform, SAMPLING_RATE)
    with open(folder / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text", "speaker", "shipped"])
        table.writerows(
            [f"{name}.flac", REFERENCE_TEXT, name, "yes" if name in SHIPPED_RECORDINGS else "no"]
            for name in SHIPPED_VOICES
        )


def order(sentences: list[str]) -> list[str]:
    """In an order that neither the source nor the alphabet has."""
    return sorted(sentences, key=lambda sentence: hashlib.sha256(f"order {sentence}".encode()).digest())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("texts", type=Path, nargs="?", metavar="TEXTS", help="a sentence a line")
    parser.add_argument("output", type=Path, metavar="OUTPUT")
    parser.add_argument("--references", action="store_true", help="one recording of each shipped voice; no TEXTS")
    parser.add_argument("--num_sentences", type=int, help="only so many, in a fixed order (default: all)")
    parser.add_argument("--first_sentence", type=int, default=0, help="in that order, from 0 (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, default=2, help="(default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.references:
        make_references(arguments.output)
        return
    if arguments.texts is None:
        parser.error("TEXTS is missing; only --references goes without")
    sentences = order(arguments.texts.read_text().splitlines())[arguments.first_sentence :][: arguments.num_sentences]
    clips = [
        (sentence, arguments.output / f"{hashlib.sha256(sentence.encode()).hexdigest()[:12]}.flac")
        for sentence in sentences
    ]
    arguments.output.mkdir(parents=True, exist_ok=True)
    missing = [(sentence, path) for sentence, path in clips if not path.is_file()]
    context = multiprocessing.get_context("spawn")
    with context.Pool(arguments.num_workers, start_worker) as pool:
        progress = tqdm(total=len(clips), initial=len(clips) - len(missing), unit="clip", mininterval=5.0)
        for _ in pool.imap_unordered(make_clip, missing, chunksize=4):
            progress.update()
        progress.close()
    with open(arguments.output / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text", "speaker", "emotion", "language"])
        for sentence, path in clips:
            voice, manner, _ = choose(sentence)
            table.writerow([path.name, sentence, voice, manner or "neutral", "en"])


if __name__ == "__main__":
    main()
