"""
Makes what the tiny checkpoint is evaluated on (`evaluation/evaluate.py`), from sentences that it never learnt from.

    python training/recipes/tiny/make_test_lists.py TEXTS/held-out.txt REAL OUTPUT

`OUTPUT/voices.lst`: the shipped voices take turns with `NUM_SENTENCES` sentences, which the teacher speaks too, neutral and at its own
tempo, as the true recordings. `OUTPUT/readers.lst`: each reader of `REAL/validation` who is not in `REAL/train` is the prompt of
`NUM_SENTENCES_PER_READER` others. `OUTPUT/recordings.lst`: `NUM_RECORDINGS` clips of each folder of `RECORDINGS` are the prompts of one further
sentence each. No sentence is in two lists. Needs what `make_speech.py` needs.
"""

import argparse
import csv
import shutil
from collections import Counter
from pathlib import Path

import soundfile
from make_speech import SAMPLING_RATE, SHIPPED_VOICES, VOICES, Manner, Teacher, order


NUM_SENTENCES = 100
NUM_SENTENCES_PER_READER = 6
# Unlike the readers: acted emotions in German, of a speaker whom nothing learnt from; and orders of coffee, spoken in other rooms and into other
# microphones. The latter are from the part that training has: their voices are known to it, the sentences are not.
RECORDINGS = {"emodb": "validation", "commands": "train"}
NUM_RECORDINGS = 10


def make_voices_list(sentences: list[str], folder: Path) -> None:
    """A clip of each sentence, and lines `name||voice|sentence|clip`."""
    teacher = Teacher()
    lines = []
    for number, sentence in enumerate(sentences):
        voice = SHIPPED_VOICES[number % len(SHIPPED_VOICES)]
        waveform, _ = teacher.speak(sentence, VOICES[voice], Manner(), speed=1.0)
        soundfile.write(folder / f"{number:03}.flac", waveform, SAMPLING_RATE)
        lines.append(f"{number:03}||{voice}|{sentence}|{number:03}.flac\n")
    (folder / "voices.lst").write_text("".join(lines), encoding="utf-8")


def read_manifest(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metadata.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def find_unseen_readers(real: Path) -> dict[str, dict[str, str]]:
    """The first English clip of each reader of `validation` who is not in `train`: rows of the manifest."""
    known = {row["speaker"] for row in read_manifest(real / "train")}
    readers: dict[str, dict[str, str]] = {}
    for row in read_manifest(real / "validation"):
        if row["language"] == "en" and row["speaker"] not in known:
            readers.setdefault(row["speaker"], row)
    return readers


def make_readers_list(sentences: list[str], real: Path, folder: Path) -> list[str]:
    """A prompt of each unseen reader, and lines `name|text of the prompt|prompt|sentence`. Returns the sentences that are left."""
    lines = []
    for number, (speaker, row) in enumerate(find_unseen_readers(real).items()):
        prompt = f"{speaker}{Path(row['file_name']).suffix}"
        shutil.copyfile(real / "validation" / row["file_name"], folder / prompt)
        for place, sentence in enumerate(sentences[number * NUM_SENTENCES_PER_READER :][:NUM_SENTENCES_PER_READER]):
            lines.append(f"{speaker}-{place}|{row['text']}|{prompt}|{sentence}\n")
    (folder / "readers.lst").write_text("".join(lines), encoding="utf-8")
    return sentences[len(lines) :]


def choose_recordings(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """`NUM_RECORDINGS` rows (all, if there are fewer), of each emotion as many as of the others as far as there are so many."""
    places: dict[str, int] = {}  # in how many rounds over the emotions a file comes
    counts: Counter[str] = Counter()
    emotions = {row["file_name"]: row["emotion"] for row in rows}
    names = order(list(emotions))
    for name in names:
        places[name] = counts[emotions[name]]
        counts[emotions[name]] += 1
    chosen = sorted(names, key=lambda name: (places[name], emotions[name]))[:NUM_RECORDINGS]
    return sorted((row for row in rows if row["file_name"] in chosen), key=lambda row: row["file_name"])


def make_recordings_list(sentences: list[str], real: Path, folder: Path) -> None:
    """The prompts of `RECORDINGS`, and lines `name|text of the prompt|prompt|sentence`."""
    lines = []
    for source, split in RECORDINGS.items():
        rows = [row for row in read_manifest(real / split) if Path(row["file_name"]).parts[0] == source]
        for row in choose_recordings(rows):
            name = f"{source}-{Path(row['file_name']).stem}"
            prompt = f"{name}{Path(row['file_name']).suffix}"
            shutil.copyfile(real / split / row["file_name"], folder / prompt)
            lines.append(f"{name}|{row['text']}|{prompt}|{sentences[len(lines)]}\n")
    (folder / "recordings.lst").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("texts", type=Path, metavar="TEXTS", help="a sentence a line")
    parser.add_argument("real", type=Path, metavar="REAL", help="audio folder of real readers, in splits")
    parser.add_argument("output", type=Path, metavar="OUTPUT")
    arguments = parser.parse_args()
    sentences = order(arguments.texts.read_text(encoding="utf-8").splitlines())
    arguments.output.mkdir(parents=True, exist_ok=True)
    make_voices_list(sentences[:NUM_SENTENCES], arguments.output)
    sentences = make_readers_list(sentences[NUM_SENTENCES:], arguments.real, arguments.output)
    make_recordings_list(sentences, arguments.real, arguments.output)


if __name__ == "__main__":
    main()
