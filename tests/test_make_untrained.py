"""The embedded checkpoint is what its program makes, and reads English and Chinese."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from indextts2_hf import IndexTTS2TextToAudioPipeline, IndexTTS2Tokenizer, embedded_checkpoint


PROGRAM = Path(__file__).parents[1] / "training" / "recipes" / "tiny" / "make_untrained.py"
# Written by the libraries, which may be newer now.
VERSIONS = {"transformers_version", "_diffusers_version"}


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("make_untrained", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(program, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "embedded"
    with torch.random.fork_rng([]):
        program.make_checkpoint(folder)
    return folder


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_same_files(made):
    assert files(made) == files(embedded_checkpoint())
    assert (made / "README.md").read_text() == (embedded_checkpoint() / "README.md").read_text()


def test_same_settings(made):
    for path in sorted(made.rglob("*.json")):
        ours, theirs = (
            json.loads((folder / path.relative_to(made)).read_text()) for folder in (made, embedded_checkpoint())
        )
        assert {key: value for key, value in ours.items() if key not in VERSIONS} == {
            key: value for key, value in theirs.items() if key not in VERSIONS
        }, path


def test_same_weights(made):
    for path in sorted(made.rglob("*.safetensors")):
        ours, theirs = load_file(path), load_file(embedded_checkpoint() / path.relative_to(made))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], atol=1e-4, rtol=1e-4, msg=f"{path.name}: {name}")


def test_same_vocabulary(made):
    ours, theirs = (IndexTTS2Tokenizer(str(folder / "bpe.model")) for folder in (made, embedded_checkpoint()))
    assert ours.get_vocab() == theirs.get_vocab()


def test_size():
    assert sum((embedded_checkpoint() / name).stat().st_size for name in files(embedded_checkpoint())) < 3.2e6


def test_vocabulary_has_english_and_chinese(program):
    tokenizer = IndexTTS2Tokenizer(str(embedded_checkpoint() / "bpe.model"))
    assert tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<unk>"]) == [0, 1, 2]
    texts = ["The quick brown fox jumps over the lazy dog, doesn't it?", "A", "a", "Hello-world… XUAN4!"]
    texts += ["".join(program.chinese_characters()), "今天天气很好，我们去公园吧！", "我"]
    for text in texts:
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    # A character and the punctuation behind it are one piece each.
    assert len(tokenizer.tokenize("你好，世界。")) == 6


@pytest.mark.parametrize("text", ["Hello, world.", "你好，世界。"])
def test_makes_noise_of_the_asked_length(text):
    pipe = IndexTTS2TextToAudioPipeline.from_pretrained()
    free = pipe(text, seed=1)["audio"]
    assert 0 < len(free) <= 3.6 * pipe.sampling_rate
    audio = pipe(text, seed=1, duration_s=2.5, emotion_weights={"happy": 0.7})["audio"]
    assert len(audio) == 2.5 * pipe.sampling_rate
    assert 0.02 < np.abs(audio).max() < 0.5
    assert audio.std() > 0.01
