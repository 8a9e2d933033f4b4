"""
Averages the weights of T2S or S2M over checkpoints that were trained one from another (model soups, Wortsman et al. 2022,
arXiv 2203.05482): where further training trades one thing for another, a point in between is often better at both.

    python training/average_checkpoints.py --models BEFORE RUN/last --part t2s --output AVERAGE
    python training/average_checkpoints.py --models A B C --shares 0.2 0.3 0.5 --part t2s --output AVERAGE

`AVERAGE` becomes a whole checkpoint: all else is that of the last of `--models`, and so are weights that not all have, such as those of a text
recogniser that came later. Measure it: nothing is trained, and checkpoints that were trained apart have an average that knows nothing.
"""

import argparse
import shutil
from pathlib import Path

import torch

from checkpoint import copy_checkpoint, find_checkpoint, load_part, remake_voices, write_part
from indextts2_hf import IndexTTS2SemanticToMelTransformer, IndexTTS2T2SForConditionalGeneration
from run import run_program


PART_CLASSES = {"t2s": IndexTTS2T2SForConditionalGeneration, "s2m": IndexTTS2SemanticToMelTransformer}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--models", required=True, nargs="+", metavar="CHECKPOINT", help="folders or repositories")
    parser.add_argument(
        "--shares", type=float, nargs="+", metavar="SHARE", help="of each, in sum 1 (default: all alike)"
    )
    parser.add_argument("--part", required=True, choices=sorted(PART_CLASSES), help="which part is averaged")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="where it is written; new")
    arguments = parser.parse_args()
    if len(arguments.models) < 2:
        parser.error("--models has one checkpoint, but an average is of two or more")
    if arguments.shares is None:
        arguments.shares = [1 / len(arguments.models)] * len(arguments.models)
    if len(arguments.shares) != len(arguments.models):
        parser.error(
            f"--shares has {len(arguments.shares)} numbers for {len(arguments.models)} models: give one for each"
        )
    if not abs(sum(arguments.shares) - 1) < 1e-3 or min(arguments.shares) < 0:  # the first is also true for NaN
        parser.error(f"--shares are {arguments.shares}, but need numbers of 0 or more whose sum is 1")
    return arguments


def average_weights(weights: list[dict[str, torch.Tensor]], shares: list[float]) -> dict[str, torch.Tensor]:
    """
    Args:
        weights (`list[dict[str, torch.Tensor]]`): state dicts.
        shares (`list[float]`): of each, in sum 1.

    Returns:
        `dict[str, torch.Tensor]`: the names of the last one; what is no floating point number, or not in all of them, is the last one's.

    Raises:
        ValueError: a weight has different shapes.
    """
    averaged = {}
    for name, last in weights[-1].items():
        if not last.is_floating_point() or any(name not in others for others in weights):
            averaged[name] = last
            continue
        shapes = {tuple(others[name].shape) for others in weights}
        if len(shapes) > 1:
            raise ValueError(
                f"The weight {name} has the shapes {', '.join(map(str, sorted(shapes)))}: these checkpoints were not trained one from "
                "another. Average those of one size."
            )
        averaged[name] = sum(share * others[name] for share, others in zip(shares, weights, strict=True))
    return averaged


def main() -> None:
    arguments = parse()
    folder = arguments.output
    if folder.exists():
        raise ValueError(f"--output {folder} is there already. Name another folder, or remove it.")
    bases = [find_checkpoint(model) for model in arguments.models]
    parts = [load_part(PART_CLASSES[arguments.part], base, arguments.part) for base in bases]
    part = parts[-1]
    part.load_state_dict(average_weights([other.state_dict() for other in parts], arguments.shares))

    try:
        copy_checkpoint(bases[-1], folder)
        write_part(folder, arguments.part, part)
        remake_voices(bases[-1], folder, [arguments.part])
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # it was not there before
        raise
    print(f"{folder}: the {arguments.part} of {len(bases)} checkpoints, averaged.")


if __name__ == "__main__":
    run_program(main)
