"""A checkpoint whose weights are cut off, overwritten, of other shapes or incomplete says so: it never loads."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from indextts2_hf import IndexTTS2ForTextToWaveform


FILES = {
    "t2s": "model.safetensors",
    "semantic_encoder": "model.safetensors",
    "s2m": "diffusion_pytorch_model.safetensors",
    "semantic_codec": "diffusion_pytorch_model.safetensors",
    "speaker_encoder": "diffusion_pytorch_model.safetensors",
    "vocoder": "diffusion_pytorch_model.safetensors",
}


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


def rewrite(path, change):
    weights = {key: tensor.clone() for key, tensor in load_file(path).items()}
    # The old file may still be mapped into memory.
    path.unlink()
    save_file(change(weights), path, metadata={"format": "pt"})


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"\xa7\x5c" * (len(data) // 2),
        lambda data: b"",
    ],
    ids=["truncated", "overwritten", "empty"],
)
def test_damaged_file_is_named(checkpoint, part, damage):
    path = checkpoint / part / FILES[part]
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(damage(data))
    with pytest.raises(ValueError, match=f"{part}/{FILES[part]}' is damaged"):
        IndexTTS2ForTextToWaveform.from_pretrained(checkpoint)


@pytest.mark.parametrize("part", FILES)
def test_missing_weight_is_named(checkpoint, part):
    path = checkpoint / part / FILES[part]
    key = sorted(load_file(path))[3]
    rewrite(path, lambda weights: {name: tensor for name, tensor in weights.items() if name != key})
    with pytest.raises(ValueError, match=f"{part}' do not fit .*'{key}' is missing"):
        IndexTTS2ForTextToWaveform.from_pretrained(checkpoint)


def test_wrong_shape_in_t2s_is_named(checkpoint):
    rewrite(checkpoint / "t2s" / FILES["t2s"], lambda weights: weights | {"text_head.bias": torch.zeros(7)})
    with pytest.raises(ValueError, match=r"t2s' do not fit .*'text_head.bias' has the shape \(7,\), but .*\(1000,\)"):
        IndexTTS2ForTextToWaveform.from_pretrained(checkpoint)


@pytest.mark.parametrize("part", [part for part in FILES if part != "t2s"])
def test_wrong_shape_elsewhere_does_not_load(checkpoint, part):
    path = checkpoint / part / FILES[part]
    key = next(key for key, tensor in sorted(load_file(path).items()) if tensor.ndim > 1)
    rewrite(path, lambda weights: weights | {key: torch.zeros(3, 5)})
    with pytest.raises(ValueError, match=f"One of the parts .*{part}.* cannot be loaded"):
        IndexTTS2ForTextToWaveform.from_pretrained(checkpoint)


def test_missing_shard_is_an_error(checkpoint):
    model = IndexTTS2ForTextToWaveform.from_pretrained(checkpoint)
    shutil.rmtree(checkpoint / "t2s")
    model.save_pretrained(checkpoint, max_shard_size="200KB")
    shards = sorted((checkpoint / "t2s").glob("*.safetensors"))
    assert len(shards) > 1
    loaded = IndexTTS2ForTextToWaveform.from_pretrained(checkpoint)
    assert all(torch.equal(loaded.t2s.state_dict()[key], tensor) for key, tensor in model.t2s.state_dict().items())
    shards[0].unlink()
    with pytest.raises((ValueError, OSError), match=shards[0].name):
        IndexTTS2ForTextToWaveform.from_pretrained(checkpoint)
