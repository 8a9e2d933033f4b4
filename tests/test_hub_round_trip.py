"""One folder, every loader: transformers, diffusers, the files in `pipelines/`, and what `push` publishes."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import SAMPLING_RATE, make_tiny_t2s
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

import indextts2_cli
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
from indextts2_hf.hub import CODE, PRIVATE_SETTINGS, push_to_hub


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


# --- published, and loaded in fresh processes ----------------------------------------------------------------------------

# Each gives the waveform of the same text, seed and length, loaded by the name of a repository. The cache of the Hub holds what would
# have been uploaded, and the network is off.
WITH_THE_PACKAGE = """
import sys
import numpy as np
import torch
from transformers import AutoModelForTextToWaveform, AutoProcessor, pipeline
import indextts2_hf
from indextts2_hf import IndexTTS2ForTextToWaveform, IndexTTS2SemanticToMelPipeline, IndexTTS2TextToAudioPipeline

text, settings = "Hello there. 你好。", {"seed": 1, "num_inference_steps": 2, "max_new_tokens": 10, "duration_s": 0.8}
audio = {}
stock = pipeline("text-to-speech", model="someone/tiny", device="cpu")
assert type(stock).__module__.startswith("transformers."), type(stock)
audio["stock"] = stock(text, forward_params=settings)["audio"]
trusted = pipeline("text-to-speech", model="someone/tiny", device="cpu", trust_remote_code=True)
assert type(trusted.model) is IndexTTS2ForTextToWaveform
audio["stock, trusted"] = trusted(text, forward_params=settings)["audio"]
ours = IndexTTS2TextToAudioPipeline.from_pretrained("someone/tiny")
audio["front door"] = ours(text, **settings)["audio"]

model = AutoModelForTextToWaveform.from_pretrained("someone/tiny")
inputs = AutoProcessor.from_pretrained("someone/tiny")(text)
audio["auto"] = model.generate(**inputs, **settings).audio[0].numpy()
semantic_to_mel = IndexTTS2SemanticToMelPipeline.from_pretrained("someone/tiny")
whole = IndexTTS2ForTextToWaveform(model.config, t2s=model.t2s, voices=model.voices, **semantic_to_mel.components).eval()
audio["diffusers"] = whole.generate(**inputs, **settings).audio[0].numpy()

styled = pipeline("text-to-speech", model="someone/style", device="cpu")
audio["adapter"] = styled(text, forward_params=settings)["audio"]
audio["adapter, front door"] = IndexTTS2TextToAudioPipeline.from_pretrained("someone/style")(text, **settings)["audio"]
loaded = AutoModelForTextToWaveform.from_pretrained("someone/style")
audio["adapter, auto"] = loaded.generate(**inputs, **settings).audio[0].numpy()
model.t2s.load_adapter("someone/style")
audio["adapter, on its base"] = model.generate(**inputs, **settings).audio[0].numpy()
audio["adapter, in a voice pack"] = ours(text, voice="someone/anna", **settings)["audio"]
# Whose rows have neighbours without it.
both = ours([text, text, text], voice=[None, "someone/anna", None], **settings)
audio["row before"], audio["adapter, row of a voice pack"], audio["row behind"] = (row["audio"] for row in both)
np.savez(sys.argv[1], **audio)
"""

WITHOUT_THE_PACKAGE = """
import sys
for name in ("indextts2_hf", "indextts2_cli", "wetext", "kaldifst"):
    sys.modules[name] = None  # as if it were not installed
import numpy as np
from transformers import AutoModelForTextToWaveform, AutoProcessor, pipeline

text, settings = "Hello there. 你好。", {"seed": 1, "num_inference_steps": 2, "max_new_tokens": 10, "duration_s": 0.8}
audio = {}
stock = pipeline("text-to-speech", model="someone/tiny", trust_remote_code=True, device="cpu")
assert type(stock.model).__module__.startswith("transformers_modules."), type(stock.model)
assert type(stock).__module__.startswith("transformers."), type(stock)
audio["stock"] = stock(text, forward_params=settings)["audio"]
named = pipeline("indextts2", model="someone/tiny", trust_remote_code=True, device="cpu")
audio["front door"] = named(text, **settings)["audio"]
model = AutoModelForTextToWaveform.from_pretrained("someone/tiny", trust_remote_code=True)
inputs = AutoProcessor.from_pretrained("someone/tiny", trust_remote_code=True)(text)
audio["auto"] = model.generate(**inputs, **settings).audio[0].numpy()
styled = pipeline("text-to-speech", model="someone/style", trust_remote_code=True, device="cpu")
audio["adapter"] = styled(text, forward_params=settings)["audio"]
audio["adapter, in a voice pack"] = named(text, voice="someone/anna", **settings)["audio"]
voice = stock.model.encode_voice((audio["stock"], stock.model.config.sampling_rate))
audio["other voice"] = stock(text, forward_params=settings | {"voice": voice})["audio"]
np.savez(sys.argv[1], **audio)
"""


def put_into_cache(folder: Path, repo_id: str, cache: Path) -> None:
    """The cache of the Hub as it is after a download of that repository."""
    repository, commit = cache / f"models--{repo_id.replace('/', '--')}", "0" * 40
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


@pytest.fixture(scope="module")
def published(tiny_checkpoint, tiny_adapter, tiny_voice, tmp_path_factory) -> Path:
    """A home whose cache holds what `push` writes of a checkpoint, an adapter on it and a voice pack with that adapter."""
    home = tmp_path_factory.mktemp("home")
    pack = replace(tiny_voice, adapter=str(tiny_adapter), license="cc0-1.0", consent="A buzz has nobody to ask.")
    pack.save(home / "pack")
    sources = {"someone/tiny": tiny_checkpoint, "someone/style": tiny_adapter, "someone/anna": home / "pack"}
    for repo_id, source in sources.items():
        base = {} if source is tiny_checkpoint else {"base_model": "someone/tiny"}
        result = push_to_hub(source, repo_id, is_dry_run=True, output=home / repo_id.replace("/", "-"), **base)
        assert result.url is None
        put_into_cache(result.folder, repo_id, home / "hf" / "hub")
    return home


def run_fresh(code: str, home: Path) -> dict[str, np.ndarray]:
    paths = {"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(home), "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1"}
    output = home / f"{abs(hash(code))}.npz"
    command = [sys.executable, "-c", code, str(output)]
    environment |= {"OMP_NUM_THREADS": "1", **paths}
    result = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    with np.load(output) as file:
        return dict(file)


@pytest.mark.parametrize("code", [WITH_THE_PACKAGE, WITHOUT_THE_PACKAGE], ids=["with", "without"])
def test_the_same_audio_however_it_is_loaded(code, published, pipe, tiny_adapter):
    styled = IndexTTS2TextToAudioPipeline.from_pretrained(tiny_adapter)
    expected = pipe(TEXT, duration_s=0.8, **FAST)["audio"]
    expected_styled = styled(TEXT, duration_s=0.8, **FAST)["audio"]
    assert len(expected) == round(0.8 * SAMPLING_RATE) and not np.allclose(expected_styled, expected, atol=1e-3)
    audio = run_fresh(code, published)
    other = audio.pop("other voice", None)
    assert other is None or not np.allclose(other, expected, atol=1e-3)
    for way, waveform in audio.items():
        wanted = expected_styled if way.startswith("adapter") else expected
        np.testing.assert_allclose(waveform, wanted, rtol=0, atol=1e-5, err_msg=way)


def test_the_command_speaks_with_what_is_published(published, tiny_adapter, tmp_path):
    arguments = ["speak", "Hello there.", "--model", "someone/tiny", "--voice", "someone/anna", "--duration-s", "0.8"]
    arguments += ["--seed", "1", "--num-inference-steps", "2", "-o", str(tmp_path / "out.wav"), "--quiet"]
    run_fresh(
        f"import sys, numpy, indextts2_cli; numpy.savez(sys.argv[1]); sys.exit(indextts2_cli.main({arguments}))",
        published,
    )
    styled = IndexTTS2TextToAudioPipeline.from_pretrained(tiny_adapter)
    expected = styled("Hello there.", duration_s=0.8, seed=1, num_inference_steps=2)["audio"]
    np.testing.assert_allclose(soundfile.read(tmp_path / "out.wav")[0], expected, rtol=0, atol=1e-4)


def test_the_network_is_for_what_is_not_here(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "voices/anna").mkdir(parents=True)
    needs = {
        ("speak", "a"): False,
        ("speak", "a", "--voice", "anna"): False,
        ("speak", "a", "--voice", "voices/anna"): False,
        ("speak", "a", "--voice", "someone/anna"): True,
        ("speak", "a", "--model", str(tiny_checkpoint)): False,
        ("speak", "a", "--model", "someone/tiny"): True,
        ("info",): False,
        ("push", "folder", "--repo-id", "someone/tiny", "--dry-run"): False,
        ("push", "folder", "--repo-id", "someone/tiny"): True,
    }
    for arguments, expected in needs.items():
        assert indextts2_cli.needs_network(indextts2_cli.build_parser().parse_args(arguments)) is expected, arguments


def test_code_in_the_folder_is_what_saving_it_would_write(tiny_checkpoint, published, tmp_path, monkeypatch):
    """As `register_for_auto_class` and `save_pretrained` of transformers do it."""
    for auto_class, registered in CODE.items():
        if auto_class != "custom pipeline":
            monkeypatch.setattr(registered, "_auto_class", auto_class)
    IndexTTS2TextToAudioPipeline.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "saved")
    saved, pushed = tmp_path / "saved", published / "someone-tiny"
    code = {path.name for path in saved.glob("*.py")}
    assert {path.name for path in pushed.glob("*.py")} == code | {"pipeline_text_to_audio.py"}
    assert {"modeling_indextts2.py", "pipeline_s2m.py", "modeling_vocoder.py", "text_normalization.py"} <= code
    for name in ("config.json", "processor_config.json", "tokenizer_config.json", "generation_config.json"):
        expected, found = (json.loads((folder / name).read_text()) for folder in (saved, pushed))
        for private in PRIVATE_SETTINGS:
            expected.pop(private, None)
        found.pop("custom_pipelines", None)
        assert found == expected, name


def test_the_package_goes_before_the_code_in_the_folder(published):
    folder = published / "someone-tiny"
    assert type(AutoModelForTextToWaveform.from_pretrained(folder)) is IndexTTS2ForTextToWaveform
    assert type(AutoProcessor.from_pretrained(folder)) is IndexTTS2Processor
    # Nothing of this machine is told.
    for path in folder.parent.glob("someone-*/**/*"):
        if path.suffix in (".json", ".md"):
            assert str(folder.parent.parent) not in path.read_text(), path
