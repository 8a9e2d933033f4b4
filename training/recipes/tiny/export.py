"""
Makes the checkpoint that is shipped: weights in half precision, voices, reference recordings and the card.

    python training/recipes/tiny/export.py RUN REFERENCES OUTPUT --default_voice heart --evaluation table.md

`RUN` is the folder of the last training. `REFERENCES` is an audio folder: each recording becomes the voice of its name, as the
weights in half precision hear it; those whose column `shipped` is `yes` are put into `references/` as they are. `OUTPUT` is
written anew. T2S is loaded in float32 whatever the precision of its file, as everything else is.
"""

import argparse
import csv
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from indextts2_hf import IndexTTS2Config, IndexTTS2ForTextToWaveform, IndexTTS2Processor
from indextts2_hf.hub import PRIVATE_SETTINGS


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from checkpoint import copy_checkpoint  # noqa: E402


HERE = Path(__file__).resolve().parent
MOST_BYTES = 40_000_000
# Text tokens of a segment: of longer ones more words are lost (docs/results.md).
MAX_TEXT_TOKENS = 40


def halve(path: Path) -> None:
    """Floats of a safetensors file in float16."""
    tensors = {
        name: tensor.half() if tensor.dtype == torch.float32 else tensor for name, tensor in load_file(path).items()
    }
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} of {path} has values that float16 cannot hold.")
    save_file(tensors, path, {"format": "pt"})


def read_references(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metadata.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("references", type=Path, metavar="REFERENCES")
    parser.add_argument("output", type=Path, metavar="OUTPUT")
    parser.add_argument("--default_voice", required=True, help="one of the references, by its name without ending")
    parser.add_argument("--evaluation", type=Path, help="Markdown table of `evaluate.py` for the card")
    arguments = parser.parse_args()

    folder = arguments.output
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    copy_checkpoint(arguments.run, folder)
    shutil.rmtree(folder / "voices", ignore_errors=True)
    for path in folder.rglob("*.safetensors"):
        halve(path)

    references = read_references(arguments.references)
    model = IndexTTS2ForTextToWaveform.from_pretrained(folder)
    (folder / "voices").mkdir()
    for reference in references:
        path = arguments.references / reference["file_name"]
        model.semantic_to_mel.encode_voice(path).save(folder / "voices" / f"{path.stem}.safetensors")
        if reference.get("shipped") == "yes":
            (folder / "references").mkdir(exist_ok=True)
            shutil.copyfile(path, folder / "references" / path.name)
    config = IndexTTS2Config.from_pretrained(folder)
    # With the manner of a recording that they have not learnt from, small networks lose words.
    config.default_voice = config.default_emotion = arguments.default_voice
    config.save_pretrained(folder)
    processor = IndexTTS2Processor.from_pretrained(folder)
    processor.max_text_tokens = MAX_TEXT_TOKENS
    processor.save_pretrained(folder)
    for path in folder.rglob("config.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings = {key: value for key, value in settings.items() if key not in PRIVATE_SETTINGS}
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    table = arguments.evaluation.read_text(encoding="utf-8") if arguments.evaluation else "Not evaluated yet."
    card = (HERE / "card.md").read_text(encoding="utf-8").replace("<!-- evaluation -->", table.strip())
    (folder / "README.md").write_text(card, encoding="utf-8")
    # The libraries write weights that only their owner may read; these are for everybody who installs the package.
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {num_bytes / 1e6:.1f} MB, {len(references)} voices")
    if num_bytes > MOST_BYTES:
        raise ValueError(f"{folder} takes {num_bytes / 1e6:.1f} MB, but {MOST_BYTES / 1e6:.0f} MB are the most.")


if __name__ == "__main__":
    main()
