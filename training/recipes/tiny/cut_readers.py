"""
Cuts the recordings of real readers into pieces of a few seconds, each with its words, where the reader pauses.

    python training/recipes/tiny/cut_readers.py REAL OUTPUT

`REAL` is an audio folder whose manifest has the columns `speaker`, `emotion` and `language`; of its folder `validation` nothing is taken, and
of the rest only English. `OUTPUT` becomes an audio folder, FLAC at 16 kHz, with the columns that `join_data.py` reads. When each word was
said, and which it was, is what a recogniser makes of it (Whisper base, as in `evaluation/metrics.py`, whose packages it needs): not for
scoring. A reader of one long recording has several pieces, so a prompt may be another one.
"""

import argparse
import csv
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import soundfile
import soxr
from join_data import read
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "evaluation"))

from metrics import PackagedWhisper  # noqa: E402


SAMPLING_RATE = 16000
LEAST_S, MOST_S = 2.0, 6.0
MOST_RECORDINGS = 4  # of a reader: their number is what counts, not the hours of one
MARGIN_S = 0.1  # kept before the first and behind the last word of a piece, at most half of the pause
COLUMNS = ["file_name", "text", "speaker", "emotion", "language", "duration_s"]


def cut(begins: list[float], ends: list[float]) -> list[tuple[int, int]]:
    """
    Pieces `(first word, word behind the last)` of at most `MOST_S`: what is longer is parted at its longest pause that leaves `LEAST_S` on
    both sides; what cannot be parted so, or is shorter than `LEAST_S`, is left out.
    """
    pieces, rest = [], [(0, len(begins))]
    while rest:
        first, stop = rest.pop()
        if ends[stop - 1] - begins[first] <= MOST_S:
            if ends[stop - 1] - begins[first] >= LEAST_S:
                pieces.append((first, stop))
            continue
        places = [
            place
            for place in range(first + 1, stop)
            if ends[place - 1] - begins[first] >= LEAST_S and ends[stop - 1] - begins[place] >= LEAST_S
        ]
        if places:
            place = max(places, key=lambda place: begins[place] - ends[place - 1])
            rest += [(place, stop), (first, place)]
    return pieces


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("real", type=Path, metavar="REAL")
    parser.add_argument("output", type=Path, metavar="OUTPUT")
    arguments = parser.parse_args()
    folder = arguments.real / "train" if (arguments.real / "train").is_dir() else arguments.real
    of_reader: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in read(folder):
        if row["language"] == "en":
            of_reader[row["speaker"]].append(row)
    recordings = [row for rows in of_reader.values() for row in rows[:MOST_RECORDINGS]]
    arguments.output.mkdir(parents=True, exist_ok=True)
    recognizer = PackagedWhisper().model
    rows = []
    for recording in tqdm(recordings, unit="recording", mininterval=5.0):
        waveform, rate = soundfile.read(recording["file_name"], dtype="float32")
        waveform = soxr.resample(waveform, rate, SAMPLING_RATE)
        segments, _ = recognizer.transcribe(waveform, language="en", beam_size=1, word_timestamps=True)
        words = [word for segment in segments for word in segment.words]
        if not words:
            continue
        begins, ends = [word.start for word in words], [word.end for word in words]
        for first, stop in cut(begins, ends):
            before = begins[first] - (ends[first - 1] if first else 0.0)
            behind = (begins[stop] if stop < len(words) else len(waveform) / SAMPLING_RATE) - ends[stop - 1]
            begin = begins[first] - min(MARGIN_S, before / 2)
            end = ends[stop - 1] + min(MARGIN_S, behind / 2)
            piece = waveform[max(0, round(begin * SAMPLING_RATE)) : round(end * SAMPLING_RATE)]
            name = f"{len(rows):05}.flac"
            soundfile.write(arguments.output / name, np.clip(piece, -1.0, 1.0), SAMPLING_RATE)
            text = "".join(word.word for word in words[first:stop]).strip()
            duration_s = round(len(piece) / SAMPLING_RATE, 3)
            rows.append([name, text, recording["speaker"], recording["emotion"], "en", duration_s])
    with open(arguments.output / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        table.writerows(rows)
    seconds = sum(row[-1] for row in rows)
    print(f"{arguments.output}: {len(rows)} pieces of {len({row[2] for row in rows})} readers, {seconds / 60:.0f} min")


if __name__ == "__main__":
    main()
