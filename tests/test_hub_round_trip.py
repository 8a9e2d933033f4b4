"""One folder, every loader: transformers, diffusers, the files in `pipelines/`, and code that comes with the folder."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tiny_t2s
from diffusers import DiffusionPipeline
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForTextToWaveform,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

from indextts2_hf import (
    IndexTTS2Config,
    IndexTTS2FeatureExtractor,
    IndexTTS2FlowMatchScheduler,
    IndexTTS2ForTextToWaveform,
    IndexTTS2GenerationConfig,
    IndexTTS2Processor,
    IndexTTS2SemanticCodec,
    IndexTTS2SemanticToMelPipeline,
    IndexTTS2SemanticToMelTransformer,
    IndexTTS2SpeakerEncoder,
    IndexTTS2T2SConfig,
    IndexTTS2T2SForConditionalGeneration,
    IndexTTS2T2SModel,
    IndexTTS2TextToAudioPipeline,
    IndexTTS2Tokenizer,
    IndexTTS2Vocoder,
)


PIPELINES = Path(__file__).parent.parent / "pipelines"
TEXT = "Hello there. 你好。"
FAST = dict(seed=1, num_inference_steps=2, max_new_tokens=10)


def test_what_is_in_the_folder(tiny_checkpoint):
    assert {item.name for item in tiny_checkpoint.iterdir()} >= {
        "config.json",
        "generation_config.json",
        "processor_config.json",
        "tokenizer_config.json",
        "bpe.model",
        "model_index.json",
        "t2s",
        "s2m",
        "scheduler",
        "semantic_encoder",
        "semantic_codec",
        "speaker_encoder",
        "vocoder",
        "feature_extractor",
        "voices",
    }
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    assert config["model_type"] == "indextts2" and config["architectures"] == ["IndexTTS2ForTextToWaveform"]
    assert not [path for path in tiny_checkpoint.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".tmp")]


@pytest.mark.parametrize(
    ("loader", "expected"),
    [
        (AutoConfig, IndexTTS2Config),
        (AutoModelForTextToWaveform, IndexTTS2ForTextToWaveform),
        (AutoProcessor, IndexTTS2Processor),
        (AutoTokenizer, IndexTTS2Tokenizer),
        (AutoFeatureExtractor, IndexTTS2FeatureExtractor),
    ],
)
def test_auto_classes(tiny_checkpoint, loader, expected):
    assert type(loader.from_pretrained(tiny_checkpoint)) is expected


def test_two_loaders_read_the_same_files(tiny_checkpoint, tiny_voice):
    ids = torch.arange(12)[None]
    with_transformers = AutoModelForTextToWaveform.from_pretrained(tiny_checkpoint).semantic_to_mel
    with_diffusers = IndexTTS2SemanticToMelPipeline.from_pretrained(tiny_checkpoint)
    audios = [
        pipeline(ids, tiny_voice, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).audios[0]
        for pipeline in (with_transformers, with_diffusers)
    ]
    assert np.array_equal(*audios)
    assert with_transformers.fingerprint == with_diffusers.fingerprint
    assert not any(part.training for part in with_diffusers.components.values() if isinstance(part, torch.nn.Module))


def test_t2s_alone(tiny_checkpoint, tiny_model):
    expected = tiny_model.t2s.state_dict()
    assert type(AutoConfig.from_pretrained(tiny_checkpoint, subfolder="t2s")) is IndexTTS2T2SConfig
    t2s, report = IndexTTS2T2SForConditionalGeneration.from_pretrained(
        tiny_checkpoint, subfolder="t2s", output_loading_info=True
    )
    assert not any(report.values())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in t2s.state_dict().items())
    assert type(t2s.generation_config) is IndexTTS2GenerationConfig

    trunk, report = AutoModel.from_pretrained(tiny_checkpoint, subfolder="t2s", output_loading_info=True)
    assert type(trunk) is IndexTTS2T2SModel and not report["missing_keys"] and not report["mismatched_keys"]
    assert all(torch.equal(tensor, expected[f"model.{name}"]) for name, tensor in trunk.state_dict().items())

    # PEFT looks for this configuration at the root, which an adapter names as its base.
    assert IndexTTS2T2SConfig.from_pretrained(tiny_checkpoint).hidden_size == t2s.config.hidden_size


@pytest.mark.parametrize(
    ("part_class", "name"),
    [
        (IndexTTS2SemanticToMelTransformer, "s2m"),
        (IndexTTS2SemanticCodec, "semantic_codec"),
        (IndexTTS2SpeakerEncoder, "speaker_encoder"),
        (IndexTTS2Vocoder, "vocoder"),
    ],
)
def test_parts_alone(tiny_checkpoint, tiny_model, part_class, name):
    part = part_class.from_pretrained(tiny_checkpoint, subfolder=name)
    expected = getattr(tiny_model, name).state_dict()
    assert set(part.state_dict()) == set(expected)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in part.state_dict().items())


def test_the_other_parts_alone(tiny_checkpoint):
    scheduler = IndexTTS2FlowMatchScheduler.from_pretrained(tiny_checkpoint, subfolder="scheduler")
    assert scheduler.config.sway_coefficient == 0.0 and scheduler.config.grid is None
    encoder = AutoModel.from_pretrained(tiny_checkpoint, subfolder="semantic_encoder")
    assert type(encoder).__name__ == "Wav2Vec2BertModel"


def test_generation_config_keeps_its_class(tmp_path):
    t2s = make_tiny_t2s()
    t2s.generation_config.num_semantic_tokens = 17
    t2s.save_pretrained(tmp_path)
    loaded = IndexTTS2T2SForConditionalGeneration.from_pretrained(tmp_path)
    assert type(loaded.generation_config) is IndexTTS2GenerationConfig
    assert loaded.generation_config.num_semantic_tokens == 17
    assert loaded.generation_config.to_dict() == t2s.generation_config.to_dict()


# --- the files in pipelines/ ---------------------------------------------------------------------------------------------


def test_entry_of_diffusers(tiny_checkpoint, tiny_voice):
    generic = DiffusionPipeline.from_pretrained(
        tiny_checkpoint, custom_pipeline=str(PIPELINES / "semantic_to_mel"), trust_remote_code=True
    )
    # The entry re-exports the class: it is ours, not a copy.
    assert type(generic) is IndexTTS2SemanticToMelPipeline
    ids = torch.arange(12)[None]
    audios = [
        loaded(ids, tiny_voice, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).audios[0]
        for loaded in (generic, IndexTTS2SemanticToMelPipeline.from_pretrained(tiny_checkpoint))
    ]
    assert np.array_equal(*audios)


def test_entry_of_transformers(tiny_checkpoint, pipe, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "with-entry")
    shutil.copy(PIPELINES / "text_to_audio.py", folder)
    config = json.loads((folder / "config.json").read_text())
    config["custom_pipelines"] = {
        "indextts2": {"impl": "text_to_audio.IndexTTS2TextToAudioPipeline", "pt": ["AutoModelForTextToWaveform"]}
    }
    (folder / "config.json").write_text(json.dumps(config))
    expected = pipe(TEXT, duration_s=0.8, **FAST)["audio"]

    ours = pipeline("indextts2", model=str(folder), trust_remote_code=True, device="cpu")
    assert type(ours) is IndexTTS2TextToAudioPipeline
    np.testing.assert_allclose(ours(TEXT, duration_s=0.8, **FAST)["audio"], expected, atol=1e-5)
    # The plain call needs no trust and stays stock.
    stock = pipeline("text-to-speech", model=str(folder), device="cpu")
    assert type(stock).__module__.startswith("transformers.")
    audio = stock(TEXT, forward_params={"duration_s": 0.8, **FAST})["audio"]
    np.testing.assert_allclose(audio, expected, atol=1e-5)


# --- code that comes with the folder -------------------------------------------------------------------------------------

WITHOUT_THE_PACKAGE = """
import sys
sys.modules["indextts2_hf"] = None  # as if it were not installed
import numpy as np
from transformers import pipeline
folder, text, output = sys.argv[1:]
speech = pipeline("text-to-speech", model=folder, trust_remote_code=True, device="cpu")
assert type(speech.model).__module__.startswith("transformers_modules."), type(speech.model)
arguments = {"seed": 1, "num_inference_steps": 2, "max_new_tokens": 10, "duration_s": 0.8}
audio = speech(text, forward_params=arguments)["audio"]
voice = speech.model.encode_voice((audio, 22050))
again = speech(text, forward_params=arguments | {"voice": voice})["audio"]
np.savez(output, audio=audio, again=again)
"""


def test_code_in_the_folder(tiny_checkpoint, pipe, tmp_path, monkeypatch):
    folder = tmp_path / "with-code"
    classes = {
        IndexTTS2Config: "AutoConfig",
        IndexTTS2ForTextToWaveform: "AutoModelForTextToWaveform",
        IndexTTS2Processor: "AutoProcessor",
        IndexTTS2Tokenizer: "AutoTokenizer",
        IndexTTS2FeatureExtractor: "AutoFeatureExtractor",
    }
    for registered, auto_class in classes.items():
        # What `register_for_auto_class` does, undone after the test.
        monkeypatch.setattr(registered, "_auto_class", auto_class)
    fresh = IndexTTS2TextToAudioPipeline.from_pretrained(tiny_checkpoint)
    fingerprint = fresh.model.semantic_to_mel.fingerprint
    fresh.save_pretrained(folder)
    assert fresh.model.semantic_to_mel.fingerprint == fingerprint
    assert {"modeling_indextts2.py", "pipeline_s2m.py", "modeling_vocoder.py", "text_normalization.py"} <= {
        path.name for path in folder.glob("*.py")
    }
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_indextts2.IndexTTS2Config",
        "AutoModelForTextToWaveform": "modeling_indextts2.IndexTTS2ForTextToWaveform",
    }

    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(folder), TEXT, str(tmp_path / "audio.npz")]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    audio = np.load(tmp_path / "audio.npz")
    np.testing.assert_allclose(audio["audio"], pipe(TEXT, duration_s=0.8, **FAST)["audio"], atol=1e-5)
    assert len(audio["again"]) == len(audio["audio"]) and not np.allclose(audio["again"], audio["audio"], atol=1e-3)
    # With the package the same folder gives the package's classes.
    assert type(AutoModelForTextToWaveform.from_pretrained(folder)) is IndexTTS2ForTextToWaveform
