"""
Draws teacher and model side by side: the recordings of a test list above what the checkpoint makes of the same sentences.

    python training/recipes/tiny/draw_spectrograms.py TEST/voices.lst REPORT docs/spectrograms.png --names 000 001 003

`REPORT` is what `evaluation/evaluate.py` made of the list. Needs matplotlib.
"""

import argparse
from pathlib import Path

import numpy as np
import soundfile
from matplotlib.figure import Figure
from scipy.signal import spectrogram


WINDOW_S, HOP_S = 0.025, 0.005
DYNAMIC_RANGE_DB = 70


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("list", type=Path, metavar="LIST")
    parser.add_argument("report", type=Path, metavar="REPORT")
    parser.add_argument("output", type=Path, metavar="PICTURE")
    parser.add_argument("--names", nargs="+", required=True, metavar="NAME", help="lines of the list to draw")
    arguments = parser.parse_args()

    rows = [line.split("|") for line in arguments.list.read_text(encoding="utf-8").splitlines()]
    lines = {name: (voice, text, arguments.list.parent / recording) for name, _, voice, text, recording in rows}
    figure = Figure(figsize=(3.2 * len(arguments.names), 4.5), layout="constrained")
    plots = figure.subplots(2, len(arguments.names), sharey=True, squeeze=False)
    for name, column in zip(arguments.names, plots.T, strict=True):
        voice, text, recording = lines[name]
        files = {"teacher": recording, "model": arguments.report / "audio" / "free" / f"{name}.wav"}
        for (who, path), plot in zip(files.items(), column, strict=True):
            waveform, rate = soundfile.read(path)
            window, hop = round(WINDOW_S * rate), round(HOP_S * rate)
            frequencies, times, power = spectrogram(waveform, rate, "hann", window, window - hop, nfft=1024)
            levels = 10 * np.log10(power + 1e-12)
            plot.pcolormesh(
                times, frequencies / 1000, levels, vmin=levels.max() - DYNAMIC_RANGE_DB, cmap="magma", rasterized=True
            )
            plot.set_title(f"{who}, {voice}" if who == "model" else f"{text}\n{who}, {voice}", fontsize=7)
    figure.supxlabel("seconds", fontsize=8)
    figure.supylabel("kHz", fontsize=8)
    figure.savefig(arguments.output, dpi=100)


if __name__ == "__main__":
    main()
