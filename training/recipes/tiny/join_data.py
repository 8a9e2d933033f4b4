"""
Joins the teacher's clips and the recordings of real readers into one manifest.

    python training/recipes/tiny/join_data.py SPEECH REAL OUTPUT.csv
    python training/recipes/tiny/join_data.py SPEECH REAL READERS OUTPUT.csv   # with the pieces of cut_readers.py
    python training/recipes/tiny/join_data.py SPEECH REAL OUTPUT.csv --per_speaker 130   # for the speaker encoder

`SPEECH` is the folder of `make_speech.py`, `REAL` an audio folder whose manifest has the columns `language` and `duration_s`; of its folder
`validation` nothing is taken. Of the real ones only English is, and of `MOST_S` at most. There may be several such folders.
"""

import argparse
import csv
from collections import Counter
from pathlib import Path


MOST_S = 10.0
COLUMNS = ["file_name", "text", "speaker", "emotion", "language"]


def read(folder: Path) -> list[dict[str, str]]:
    """Rows of `metadata.csv`, whose files are named from anywhere."""
    with open(folder / "metadata.csv", encoding="utf-8", newline="") as file:
        return [{**row, "file_name": str((folder / row["file_name"]).resolve())} for row in csv.DictReader(file)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("speech", type=Path, metavar="SPEECH")
    parser.add_argument("real", type=Path, metavar="REAL", nargs="+")
    parser.add_argument("output", type=Path, metavar="OUTPUT")
    parser.add_argument("--per_speaker", type=int, help="clips at most (default: all)")
    arguments = parser.parse_args()
    rows = read(arguments.speech)
    for real in arguments.real:
        for row in read(real / "train" if (real / "train").is_dir() else real):
            if row["language"] == "en" and float(row["duration_s"]) <= MOST_S:
                rows.append(row)
    counts: Counter[str] = Counter()
    num_written = 0
    with open(arguments.output, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        table.writeheader()
        for row in rows:
            counts[row["speaker"]] += 1
            if arguments.per_speaker is None or counts[row["speaker"]] <= arguments.per_speaker:
                table.writerow(row)
                num_written += 1
    print(f"{arguments.output}: {num_written} clips of {len(counts)} speakers")


if __name__ == "__main__":
    main()
