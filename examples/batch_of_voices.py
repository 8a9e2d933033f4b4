"""
One line in the voices of a `datasets` dataset, as one batch.

    python examples/batch_of_voices.py DATASET --text "Nice to meet you." --count 8 --output voices

DATASET is a folder or a Hub repository with an `audio` column. With a `speaker` column (`--speaker-column`) each voice is that of another
speaker. Use recordings only of people who have agreed to it.
"""

import argparse
from itertools import islice
from pathlib import Path

import soundfile
from datasets import Audio, load_dataset

from indextts2_hf import IndexTTS2TextToAudioPipeline


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


def main() -> None:
    arguments = parse_arguments()
    # Read one by one, so that a large dataset is not downloaded whole; the package decodes the recordings itself.
    rows = load_dataset(arguments.dataset, split=arguments.split, streaming=True)
    rows = rows.cast_column(arguments.audio_column, Audio(decode=False))
    recordings = {}
    for number, row in enumerate(islice(rows, 100 * arguments.count)):
        recordings.setdefault(str(row.get(arguments.speaker_column, number)), row[arguments.audio_column])
        if len(recordings) == arguments.count:
            break

    pipe = IndexTTS2TextToAudioPipeline.from_pretrained(arguments.model)
    voices = [pipe.load_voice(recording) for recording in recordings.values()]
    lines = pipe([arguments.text] * len(voices), voice=voices, seed=arguments.seed)

    arguments.output.mkdir(parents=True, exist_ok=True)
    for number, (speaker, voice, line) in enumerate(zip(recordings, voices, lines, strict=True)):
        name = f"{number:03}"  # a speaker may be named anything
        voice.save(arguments.output / f"{name}.safetensors")
        soundfile.write(arguments.output / f"{name}.wav", line["audio"], line["sampling_rate"])
        print(f"{name}: speaker {speaker!r}, {len(line['audio']) / line['sampling_rate']:.2f} s")


if __name__ == "__main__":
    main()
