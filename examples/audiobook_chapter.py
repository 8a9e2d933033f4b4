"""
A chapter of a book as one recording, with subtitles that follow it.

    python examples/audiobook_chapter.py chapter.txt --voice reader.wav --output chapter.wav

A blank line parts paragraphs; one with nothing to speak, such as `***`, is a pause. The subtitles have the text as it is written. The
sound is written as it comes: a chapter of any length needs the memory of one paragraph.
"""

import argparse
from pathlib import Path

import numpy as np
import soundfile

from indextts2_hf import IndexTTS2TextToAudioPipeline


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="text file of the chapter")
    parser.add_argument("--model", help="folder or repository (default: the checkpoint of the package)")
    parser.add_argument("--voice", help="recording, saved voice or name (default: the checkpoint's voice)")
    parser.add_argument("--output", type=Path, default=Path("chapter.wav"), help="(default: %(default)s)")
    parser.add_argument("--sentence-pause-s", type=float, default=0.3, help="(default: %(default)s)")
    parser.add_argument("--paragraph-pause-s", type=float, default=0.8, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    return parser.parse_args()


def timestamp(seconds: float) -> str:
    minutes, milliseconds = divmod(round(seconds * 1000), 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02},{milliseconds % 1000:03}"


def split_paragraph(pipe: IndexTTS2TextToAudioPipeline, paragraph: str) -> list[str]:
    """What is written in each of its segments; nothing where there is nothing to speak."""
    if not any(map(str.isalnum, paragraph)):
        return []
    try:
        return pipe.processor.split_written_text(paragraph)
    except ValueError:  # of characters alone that the checkpoint cannot speak
        return []


def main() -> None:
    arguments = parse_arguments()
    paragraphs = [" ".join(part.split()) for part in arguments.text.read_text(encoding="utf-8").split("\n\n")]
    paragraphs = [paragraph for paragraph in paragraphs if paragraph]
    pipe = IndexTTS2TextToAudioPipeline.from_pretrained(arguments.model)
    rate = pipe.model.config.sampling_rate
    # Read once, used for every paragraph.
    voice = None if arguments.voice is None else pipe.load_voice(arguments.voice)

    subtitles: list[list] = []  # begin and end in seconds, text
    with soundfile.SoundFile(arguments.output, "w", samplerate=rate, channels=1) as book:
        for number, paragraph in enumerate(paragraphs):
            lines = split_paragraph(pipe, paragraph)
            if not lines:
                book.write(np.zeros(round(arguments.paragraph_pause_s * rate)))
                print(
                    f"paragraph {number + 1} of {len(paragraphs)} has nothing to speak and is a pause: {paragraph[:50]!r}"
                )
                continue
            for segment in pipe.stream(paragraph, voice=voice, seed=arguments.seed + number):
                start_s = book.tell() / rate
                book.write(segment.audio.cpu().numpy())
                if line := lines[segment.segment_index]:
                    subtitles.append([start_s, book.tell() / rate, line])
                elif subtitles:
                    subtitles[-1][1] = book.tell() / rate  # the word before goes on
                pause_s = arguments.paragraph_pause_s if segment.is_last else arguments.sentence_pause_s
                book.write(np.zeros(round(pause_s * rate)))
            print(f"paragraph {number + 1} of {len(paragraphs)}, {book.tell() / rate:.1f} s so far")
    numbered = [
        f"{number}\n{timestamp(start_s)} --> {timestamp(end_s)}\n{line}\n"
        for number, (start_s, end_s, line) in enumerate(subtitles, 1)
    ]
    arguments.output.with_suffix(".srt").write_text("\n".join(numbered), encoding="utf-8")


if __name__ == "__main__":
    main()
