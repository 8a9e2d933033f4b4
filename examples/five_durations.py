"""
One line at five durations, with a plot of them over the same time.

    python examples/five_durations.py "This line has to fit." --output durations

The middle one is as long as the model makes the line by itself; the others are shares of it, exact to the sample.
"""

import argparse
from pathlib import Path

import numpy as np
import soundfile
from matplotlib.figure import Figure

from indextts2_hf import IndexTTS2TextToAudioPipeline


SHARES = (0.7, 0.85, 1.0, 1.2, 1.4)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", default="This line has to fit.", help="(default: %(default)s)")
    parser.add_argument("--model", help="folder or repository (default: the checkpoint of the package)")
    parser.add_argument("--voice", help="recording, saved voice or name (default: the checkpoint's voice)")
    parser.add_argument("--duration-s", type=float, help="of the middle one (default: the model's own)")
    parser.add_argument("--output", type=Path, default=Path("durations"), help="folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    pipe = IndexTTS2TextToAudioPipeline.from_pretrained(arguments.model)
    voice = None if arguments.voice is None else pipe.load_voice(arguments.voice)
    middle_s = arguments.duration_s
    if middle_s is None:
        free = pipe(arguments.text, voice=voice, seed=arguments.seed)
        middle_s = len(free["audio"]) / free["sampling_rate"]
    durations = [share * middle_s for share in SHARES]
    lines = pipe([arguments.text] * len(SHARES), voice=voice, duration_s=durations, seed=arguments.seed)

    arguments.output.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(8, 6), layout="constrained")
    plots = figure.subplots(len(SHARES), 1, sharex=True, sharey=True)
    for share, line, plot in zip(SHARES, lines, plots, strict=True):
        audio, rate = line["audio"], line["sampling_rate"]
        soundfile.write(arguments.output / f"{share:.2f}.wav", audio, rate)
        plot.plot(np.arange(len(audio)) / rate, audio, linewidth=0.4)
        plot.set_ylabel(f"{len(audio) / rate:.2f} s", rotation=0, ha="right", va="center")
        plot.set_yticks([])
    plots[0].set_title(arguments.text)
    plots[-1].set_xlabel("seconds")
    figure.savefig(arguments.output / "durations.png", dpi=120)


if __name__ == "__main__":
    main()
