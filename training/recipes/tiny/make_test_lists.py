"""
Makes what the tiny checkpoint is evaluated on (`evaluation/evaluate.py`), from sentences that it never learnt from.

    python training/recipes/tiny/make_test_lists.py TEXTS/held-out.txt REAL OUTPUT

`OUTPUT/voices.lst`: the shipped voices take turns with `NUM_SENTENCES` sentences, which the teacher speaks too, neutral and at its own
tempo, as the true recordings. `OUTPUT/readers.lst`: each reader of `REAL/validation` who is not in `REAL/train` is the prompt of
`NUM_SENTENCES_PER_READER` others. Needs what `make_speech.py` needs.
"""

import argparse
import csv
import shutil
from pathlib import Path

import soundfile
from make_speech import SAMPLING_RATE, SHIPPED_VOICES, VOICES, Manner, Teacher, order


NUM_SENTENCES = 100
NUM_SENTENCES_PER_READER = 6


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


def find_unseen_readers(real: Path) -> dict[str, dict[str, str]]:
    """The first English clip of each reader of `validation` who is not in `train`: rows of the manifest."""
    tables = {}
    for split in ("train", "validation"):
        with open(real / split / "metadata.csv", encoding="utf-8", newline="") as file:
            tables[split] = list(csv.DictReader(file))
    known = {row["speaker"] for row in tables["train"]}
    readers: dict[str, dict[str, str]] = {}
    for row in tables["validation"]:
        if row["language"] == "en" and row["speaker"] not in known:
            readers.setdefault(row["speaker"], row)
    return readers


def make_readers_list(sentences: list[str], real: Path, folder: Path) -> None:
    """A prompt of each unseen reader, and lines `name|text of the prompt|prompt|sentence`."""
    lines = []
    for number, (speaker, row) in enumerate(find_unseen_readers(real).items()):
        prompt = f"{speaker}{Path(row['file_name']).suffix}"
        shutil.copyfile(real / "validation" / row["file_name"], folder / prompt)
        for place, sentence in enumerate(sentences[number * NUM_SENTENCES_PER_READER :][:NUM_SENTENCES_PER_READER]):
            lines.append(f"{speaker}-{place}|{row['text']}|{prompt}|{sentence}\n")
    (folder / "readers.lst").write_text("".join(lines), encoding="utf-8")


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
    make_readers_list(sentences[NUM_SENTENCES:], arguments.real, arguments.output)


if __name__ == "__main__":
    main()
