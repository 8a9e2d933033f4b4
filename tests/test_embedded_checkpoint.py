"""What the checkpoint that comes with the package has to be: small, safe to load, complete, and plain about where it comes from."""

import json
import re
import socket

import numpy as np
import pytest
import soundfile
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file

from indextts2_hf import EMOTIONS, IndexTTS2ForTextToWaveform, IndexTTS2TextToAudioPipeline, embedded_checkpoint
from indextts2_hf.cards import read_card
from indextts2_hf.modeling_t2s import LORA_TARGET_MODULES


FOLDER = embedded_checkpoint()
FILES = sorted(path for path in FOLDER.rglob("*") if path.is_file())
PARTS = ("t2s", "s2m", "semantic_encoder", "semantic_codec", "speaker_encoder", "vocoder")
VOICES = sorted(path.stem for path in (FOLDER / "voices").iterdir())
REFERENCES = sorted((FOLDER / "references").glob("*"))
# Of what it learnt from.
SOURCES = ("WordNet 3.0", "hibari-tts", "LibriSpeech", "VCTK", "LJ Speech", "Nabu Casa", "Picovoice")
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pipe() -> IndexTTS2TextToAudioPipeline:
    """Loaded while nothing can be reached. Shared: a test must not change it."""

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"something is asked of the network: {arguments}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        return IndexTTS2TextToAudioPipeline.from_pretrained()


def test_size():
    num_bytes = sum(path.stat().st_size for path in FILES)
    assert num_bytes <= 40e6, f"it takes {num_bytes / 1e6:.1f} MB of the 40 MB it may take"


def test_kinds_of_files():
    assert {path.suffix for path in FILES} <= {".flac", ".json", ".md", ".model", ".safetensors"}
    weights = {path.relative_to(FOLDER).parts[0] for path in FILES if path.suffix == ".safetensors"}
    assert weights == {*PARTS, "voices"}


def test_weights():
    for path in FILES:
        if path.suffix != ".safetensors":
            continue
        tensors = load_file(path)
        dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
        # A voice was made once, by a computation in float32; weights are kept in one precision, whichever it is.
        assert dtypes in ([{torch.float32}] if path.parent.name == "voices" else [{torch.float32}, {torch.float16}])
        assert {tensor.dtype for tensor in tensors.values()} - dtypes <= {torch.int64, torch.bool}
        assert all(tensor.isfinite().all() for tensor in tensors.values()), path


def test_weights_are_in_half_precision():
    for part in PARTS:
        (path,) = (FOLDER / part).glob("*.safetensors")
        dtypes = {tensor.dtype for tensor in load_file(path).values() if tensor.is_floating_point()}
        assert dtypes == {torch.float16}, path


def test_no_path_of_a_machine():
    place = re.compile(rb"/(?:home|mnt|opt|private|root|scratch|tmp|usr|var|work|Users)/|[A-Z]:\\\\")
    for path in FILES:
        found = place.search(path.read_bytes())
        assert not found, f"{path.relative_to(FOLDER)}: {found}"
        if path.suffix == ".json":
            assert not json.loads(path.read_text(encoding="utf-8")).get("_name_or_path"), path


def test_reads_english(pipe):
    tokenizer = pipe.tokenizer
    assert tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<unk>"]) == [0, 1, 2]
    for text in ("The quick brown fox jumps over the lazy dog, doesn't it?", "A", "a", "Hello-world… Room 204!"):
        ids = pipe.processor(text)["input_ids"]
        assert ids.numel() and tokenizer.unk_token_id not in ids, text


@pytest.mark.parametrize("name", VOICES)
def test_every_voice_speaks(name, pipe):
    # Its checkpoint is this one, under this name.
    with safe_open(FOLDER / "voices" / f"{name}.safetensors", framework="pt") as file:
        assert file.metadata()["checkpoint"] == pipe.model.semantic_to_mel.fingerprint
    audio = pipe("Hello there.", voice=name, duration_s=1.25, seed=1, num_inference_steps=4)["audio"]
    assert len(audio) == round(1.25 * pipe.sampling_rate)
    assert np.isfinite(audio).all() and np.abs(audio).max() <= 1.0
    # Sound in a quarter of the twentieths at least, however long its pauses are.
    assert np.quantile([part.std() for part in np.array_split(audio, 20)], 0.75) > 0.01


@pytest.mark.parametrize("name", EMOTIONS)
def test_every_emotion_has_prototypes(name, pipe):
    prototypes = pipe.model.t2s.emotion_prototypes
    end = sum(prototypes.counts[: EMOTIONS.index(name) + 1])
    rows = slice(end - prototypes.counts[EMOTIONS.index(name)], end)
    assert prototypes.emotion_embeds[rows].any(dim=1).all() and prototypes.speaker_embeds[rows].any(dim=1).all()


def test_emotion_weights_are_heard(pipe):
    settings = {"num_semantic_tokens": 60, "seed": 1, "num_inference_steps": 2}
    plain, happy, sad = (
        pipe("Hello there.", **weights, **settings)["audio"]
        for weights in ({}, {"emotion_weights": {"happy": 0.9}}, {"emotion_weights": {"sad": 0.9}})
    )
    assert not np.array_equal(plain, happy) and not np.array_equal(happy, sad)


def test_a_slot_that_is_much_too_long_is_padded(pipe):
    """The speech is one and a half times as long as by nature at most, and silence follows it."""
    settings = {"seed": 1, "num_candidates": 1, "num_inference_steps": 2}
    [output] = pipe.stream("Hello there.", duration_s=20.0, **settings)
    natural_s = output.duration.natural_s
    assert 0.5 < natural_s < 1.5 and output.duration.padding_s == pytest.approx(20 - 1.5 * natural_s, abs=0.02)
    assert len(output.audio) == 20 * pipe.model.config.sampling_rate
    assert not output.audio[-round(output.duration.padding_s * pipe.model.config.sampling_rate) :].any()


def test_a_slot_that_is_too_short_is_refused_with_the_shortest(pipe):
    text = "Nine words cannot be said in half a second."
    with pytest.raises(
        ValueError, match=r"`duration_s` is 0.5 but this text of .* needs at least (\d\.\d\d) s"
    ) as error:
        pipe(text, duration_s=0.5)
    shortest_s = float(re.search(r"at least (\S+) s", str(error.value))[1]) + 0.01
    audio = pipe(text, duration_s=shortest_s, seed=1, num_candidates=1, num_inference_steps=2)["audio"]
    assert len(audio) == round(shortest_s * pipe.model.config.sampling_rate)


def test_a_recording_speaks_with_the_emotion_of_the_default_voice(pipe):
    default, voice = pipe.model.get_voice(), pipe.load_voice(FOLDER / "references" / "low.flac")
    assert pipe.model.config.default_emotion == pipe.model.config.default_voice
    assert torch.equal(voice.emotion_features, default.emotion_features)
    assert not torch.equal(voice.speaker_features, default.speaker_features)


def test_the_default_voice_is_one_of_them(pipe):
    assert pipe.model.config.default_voice in VOICES == sorted(pipe.model.voices)
    assert pipe.model.get_voice() is pipe.model.voices[pipe.model.config.default_voice]


def test_the_card():
    card = read_card(FOLDER)
    assert card["license"] == "apache-2.0" and "en" in card["language"]
    # What it does not do is no tag of it.
    assert "It is not\n  cloning." in CARD and "voice-cloning" not in card["tags"]


def test_the_card_tells_figures_and_sources():
    evaluation = re.search(r"\n## Evaluation\n(.*?)\n## ", CARD, flags=re.DOTALL)[1]
    assert re.search(r"^\|.*\|\n\|[-:| ]+\|\n(\|.*\|\n)*\|.*\d.*\|$", evaluation, flags=re.MULTILINE), (
        "no table of figures"
    )
    assert "<!--" not in CARD
    for source in SOURCES:
        assert re.search(rf"\n\|[^\n]*{source}[^\n]*\|", CARD), f"the table of licences does not name {source}"
    for notice in ("Copyright 2006 by Princeton University", "Vassil Panayotov", "University\nof Edinburgh"):
        assert notice in CARD
    assert "https://creativecommons.org/licenses/by/4.0/" in CARD


@pytest.mark.lora
def test_it_is_named_tiny(pipe, tmp_path):
    # Where the folder is stays on the machine: an adapter names its base by the name.
    assert pipe.model.config.name_or_path == str(FOLDER)
    assert pipe.model.semantic_to_mel.fingerprint.startswith("tiny@")
    assert {voice.checkpoint for voice in pipe.model.voices.values()} == {pipe.model.semantic_to_mel.fingerprint}
    model = IndexTTS2ForTextToWaveform.from_pretrained("tiny")
    torch.manual_seed(0)
    adapter = LoraConfig(r=2, target_modules=LORA_TARGET_MODULES, init_lora_weights=False, fan_in_fan_out=True)
    model.t2s.add_adapter(adapter)
    model.t2s.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    adapted = IndexTTS2TextToAudioPipeline.from_pretrained(tmp_path)
    settings = {"num_semantic_tokens": 30, "seed": 1, "num_inference_steps": 2}
    assert not np.array_equal(adapted("Hello.", **settings)["audio"], pipe("Hello.", **settings)["audio"])
    adapted.model.t2s.disable_adapters()
    assert np.array_equal(adapted("Hello.", **settings)["audio"], pipe("Hello.", **settings)["audio"])


def test_the_references(pipe):
    assert 3 <= len(REFERENCES) <= 4
    for path in REFERENCES:
        info = soundfile.info(path)
        assert (info.format, info.channels, info.samplerate) == ("FLAC", 1, pipe.sampling_rate)
        assert 1.0 < info.duration < 10.0 and path.stat().st_size < 200_000
        audio = soundfile.read(path)[0]
        assert 0.1 < np.abs(audio).max() < 1.0
        # The voice of its name was made from it.
        shipped, made = pipe.model.voices[path.stem], pipe.model.semantic_to_mel.encode_voice(path)
        for name, tensor in made.tensors().items():
            torch.testing.assert_close(tensor, shipped.tensors()[name], atol=1e-3, rtol=1e-3)
    assert "references/" in CARD
