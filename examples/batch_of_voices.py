"""
One line in the voices of a folder of recordings or of a `datasets` dataset, as one batch.

    python examples/batch_of_voices.py DATASET --text "Nice to meet you." --count 8 --output voices

DATASET is a folder of recordings, in which a `metadata.csv` may say more of each `file_name`, or a folder or Hub repository that `datasets` reads,
with an `audio` column. With a column `speaker` (`--speaker-column`) each voice is that of another speaker; a recording that cannot be
used is skipped, and the next one of that speaker taken. Use recordings only of people who have agreed to it.
"""

import argparse
import csv
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import soundfile

from indextts2_hf import IndexTTS2TextToAudioPipeline


RECORDINGS = (".flac", ".mp3", ".ogg", ".opus", ".wav")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="folder or repository")
    parser.add_argument("--split", default="train", help="(default: %(default)s)")
    parser.add_argument("--audio-column", default="audio", help="(default: %(default)s)")
    parser.add_argument("--speaker-column", default="speaker", help="(default: %(default)s)")
    parser.add_argument("--model", help="folder or repository (default: the checkpoint of the package)")
    parser.add_argument("--text", default="Nice to meet you.", help="(default: %(default)s)")
    parser.add_argument("--count", type=int, default=8, help="most voices (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("voices"), help="folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    return parser.parse_args()


def read_folder(folder: Path, audio_column: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and row of each recording of an audio folder. `datasets` reads such a folder only where torchcodec is installed."""
    table = folder / "metadata.csv"
    if table.is_file():
        with open(table, encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                name = row.get("file_name") or ""
                yield name or "a row without a file_name", row | {audio_column: folder / name}
    else:
        for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in RECORDINGS):
            yield path.relative_to(folder).as_posix(), {audio_column: path}


def read_dataset(name: str, split: str, audio_column: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and row of each recording of a dataset, one by one, so that a large one is not downloaded whole."""
    from datasets import Audio, load_dataset

    rows = load_dataset(name, split=split, streaming=True)
    # The package decodes the recordings itself.
    for number, row in enumerate(rows.cast_column(audio_column, Audio(decode=False))):
        yield f"row {number}", row


def find_rows(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    folder = Path(arguments.dataset)
    if not (folder / "metadata.csv").is_file() and (folder / arguments.split).is_dir():
        folder = folder / arguments.split
    if (folder / "metadata.csv").is_file() or any(path.suffix.lower() in RECORDINGS for path in folder.rglob("*")):
        return read_folder(folder, arguments.audio_column)
    return read_dataset(arguments.dataset, arguments.split, arguments.audio_column)


def main() -> None:
    arguments = parse_arguments()
    rows = find_rows(arguments)
    pipe = IndexTTS2TextToAudioPipeline.from_pretrained(arguments.model)
    voices, taken, num_others = {}, {}, 0
    for number, (name, row) in enumerate(islice(rows, 100 * arguments.count)):
        speaker = row.get(arguments.speaker_column)
        speaker = f"row {number}" if speaker in (None, "") else str(speaker)
        if speaker in voices:
            num_others += 1
            continue
        recording = row[arguments.audio_column]
        try:
            if isinstance(recording, Path) and not recording.is_file():
                raise FileNotFoundError("there is no such file")
            voices[speaker] = pipe.load_voice(recording)
        except (OSError, ValueError) as error:
            print(f"skipped {name}: {error}")
            continue
        taken[speaker] = name
        if len(voices) == arguments.count:
            break
    if not voices:
        sys.exit(f"{arguments.dataset}: there is no recording that can be used.")
    if num_others:
        print(f"skipped {num_others} more recordings of speakers that were taken")
    lines = pipe([arguments.text] * len(voices), voice=list(voices.values()), seed=arguments.seed)

    arguments.output.mkdir(parents=True, exist_ok=True)
    for number, ((speaker, voice), line) in enumerate(zip(voices.items(), lines, strict=True)):
        name = f"{number:03}"  # a speaker may be named anything
        voice.save(arguments.output / f"{name}.safetensors")
        soundfile.write(arguments.output / f"{name}.wav", line["audio"], line["sampling_rate"])
        print(f"{name}: speaker {speaker!r}, {taken[speaker]}, {len(line['audio']) / line['sampling_rate']:.2f} s")


if __name__ == "__main__":
    main()
