"""Tiny real models, built once per run, and seeded synthetic sound. Nothing here needs the network."""

import csv
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers
from datasets import Dataset
from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import check_peft_version

import indextts2_hf
from indextts2_hf import (
    IndexTTS2Config,
    IndexTTS2FeatureExtractor,
    IndexTTS2FlowMatchScheduler,
    IndexTTS2ForTextToWaveform,
    IndexTTS2GenerationConfig,
    IndexTTS2Processor,
    IndexTTS2SemanticCodec,
    IndexTTS2SemanticToMelTransformer,
    IndexTTS2SpeakerEncoder,
    IndexTTS2T2SConfig,
    IndexTTS2T2SForConditionalGeneration,
    IndexTTS2TextToAudioPipeline,
    IndexTTS2Tokenizer,
    IndexTTS2Vocoder,
)


torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent.parent / "training"))

ASSETS = Path(__file__).parent / "assets"
SAMPLING_RATE = 22050


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where transformers and PEFT do not work together, whatever needs an adapter must end in the error that says so."""
    try:
        check_peft_version(MIN_PEFT_VERSION)
        return
    except ValueError as incompatible:
        reason = str(incompatible)
    message = re.escape(
        f"transformers {transformers.__version__} asks for PEFT {MIN_PEFT_VERSION} or newer, but PEFT "
    )
    # A program or command that a test runs says it on its standard error, which the test's assertion quotes.
    error = pytest.RaisesExc((ImportError, AssertionError), match=message)
    for item in items:
        if item.get_closest_marker("lora") or "tiny_adapter" in item.fixturenames:
            item.add_marker(pytest.mark.xfail(raises=error, strict=True, reason=reason))


def make_speech(
    seconds: float, sampling_rate: int = SAMPLING_RATE, pitch_hz: float = 120.0, seed: int = 0
) -> np.ndarray:
    """Something voiced: a buzz with moving formants, syllable by syllable, and a little noise. Float32 in [-1, 1]."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * sampling_rate)) / sampling_rate
    pitch = pitch_hz * (1 + 0.1 * np.sin(2 * np.pi * 0.7 * time))
    phase = 2 * np.pi * np.cumsum(pitch) / sampling_rate
    formants = 500 + 300 * np.sin(2 * np.pi * 1.3 * time), 1500 + 500 * np.sin(2 * np.pi * 0.9 * time + 1)
    wave = np.zeros_like(time)
    for harmonic in range(1, 30):
        gain = sum(np.exp(-(((harmonic * pitch - formant) / 200) ** 2)) for formant in formants)
        wave += gain * np.sin(harmonic * phase)
    wave *= 0.55 + 0.45 * np.sin(2 * np.pi * 4 * time)
    wave = 0.5 * wave / np.abs(wave).max() + 0.003 * rng.standard_normal(len(time))
    return wave.astype(np.float32)


def tiny_t2s_config(**changes) -> IndexTTS2T2SConfig:
    """A T2S of two layers and width 32, as trained here (length row, no position quirk) unless `changes` say otherwise."""
    settings = dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        text_vocab_size=1000,
        max_text_tokens=130,
        semantic_vocab_size=66,
        max_semantic_tokens=200,
        semantic_start_token_id=64,
        semantic_stop_token_id=65,
        feature_size=24,
        speaker_embed_dim=16,
        speaker_num_latents=4,
        speaker_conformer_hidden_size=16,
        speaker_conformer_intermediate_size=32,
        speaker_conformer_num_layers=2,
        speaker_conformer_num_heads=2,
        emotion_conformer_hidden_size=16,
        emotion_conformer_intermediate_size=32,
        emotion_conformer_num_layers=2,
        emotion_conformer_num_heads=2,
        emotion_prototype_counts=[1, 2, 1, 2, 1, 1, 1, 3],
        use_length_row=True,
        skip_semantic_position_one=False,
        prefix_placeholder_token_id=64,
    )
    return IndexTTS2T2SConfig(**(settings | changes))


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draws every weight large enough that all branches matter; buffers and norms keep sane values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            parameter.add_(torch.randn(parameter.shape, generator=generator) * min(1.0, fan_in**-0.5))
    return module.eval()


def make_tiny_t2s(**changes) -> IndexTTS2T2SForConditionalGeneration:
    torch.manual_seed(0)
    config = tiny_t2s_config(**changes)
    t2s = randomize(IndexTTS2T2SForConditionalGeneration(config))
    generator = torch.Generator().manual_seed(1)
    for buffer in t2s.emotion_prototypes.buffers():
        buffer.copy_(torch.randn(buffer.shape, generator=generator))
    t2s.generation_config = IndexTTS2GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_k=30,
        top_p=0.8,
        max_new_tokens=60,
        bos_token_id=config.semantic_start_token_id,
        eos_token_id=config.semantic_stop_token_id,
        pad_token_id=config.semantic_stop_token_id,
    )
    return t2s


def make_tiny_vocoder() -> IndexTTS2Vocoder:
    """Random weights of a size that keeps the waveform within [-1, 1]: a clipped one would be the same for any input."""
    vocoder = IndexTTS2Vocoder(initial_channels=64)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in vocoder.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 3:
                fan_in = 2 * len(parameter) if "upsample" in name else parameter[0].numel()
                parameter.copy_(0.65 * fan_in**-0.5 * torch.randn(parameter.shape, generator=generator))
    return vocoder.eval()


def make_tiny_model(**t2s_changes) -> IndexTTS2ForTextToWaveform:
    """A whole model of a few hundred thousand weights, random, two flow-matching layers, hop 256."""
    torch.manual_seed(0)
    semantic_encoder = Wav2Vec2BertModel(
        Wav2Vec2BertConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            feature_projection_input_dim=160,
            conv_depthwise_kernel_size=7,
        )
    )
    s2m = IndexTTS2SemanticToMelTransformer(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        content_size=16,
        semantic_size=24,
        speaker_embed_dim=16,
        wavenet_hidden_size=16,
        wavenet_num_layers=2,
        t2s_hidden_size=32,
        t2s_projection_sizes=(16,),
    )
    return IndexTTS2ForTextToWaveform(
        IndexTTS2Config(),
        t2s=make_tiny_t2s(**t2s_changes),
        s2m=randomize(s2m),
        scheduler=IndexTTS2FlowMatchScheduler(),
        semantic_encoder=semantic_encoder.eval(),
        semantic_codec=IndexTTS2SemanticCodec(
            feature_size=24, codebook_size=64, hidden_size=16, intermediate_size=32, num_layers=1
        ).eval(),
        speaker_encoder=IndexTTS2SpeakerEncoder(
            embed_dim=16, growth_rate=4, bottleneck_factor=2, initial_channels=8, block_layers=(2, 2, 2)
        ).eval(),
        vocoder=make_tiny_vocoder(),
        feature_extractor=IndexTTS2FeatureExtractor(),
    ).eval()


@pytest.fixture(scope="session")
def parity_folder() -> Path:
    """The whole parity set where `INDEXTTS2_PARITY` names it, else the compact one that is committed."""
    return Path(os.environ.get("INDEXTTS2_PARITY") or ASSETS / "parity")


@pytest.fixture(scope="session")
def speech() -> np.ndarray:
    """1.2 s at 22.05 kHz."""
    return make_speech(1.2)


@pytest.fixture(scope="session")
def tokenizer() -> IndexTTS2Tokenizer:
    return IndexTTS2Tokenizer(str(ASSETS / "parity" / "text" / "bpe.model"))


@pytest.fixture(scope="session")
def tiny_model() -> IndexTTS2ForTextToWaveform:
    """Shared: a test must not change it."""
    return make_tiny_model()


@pytest.fixture(scope="session")
def tiny_voice(tiny_model, speech):
    return tiny_model.encode_voice((speech, SAMPLING_RATE))


@pytest.fixture(scope="session")
def other_voice(tiny_model):
    return tiny_model.encode_voice((make_speech(0.8, pitch_hz=210.0, seed=1), SAMPLING_RATE))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, tiny_model, tiny_voice, tokenizer) -> Path:
    """A checkpoint folder with a default voice named `buzz`. Shared: a test must not write into it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-random"
    model = make_tiny_model()
    model.voices["buzz"] = tiny_voice
    model.config.default_voice = "buzz"
    processor = IndexTTS2Processor(model.feature_extractor, tokenizer)
    IndexTTS2TextToAudioPipeline(model=model, processor=processor, tokenizer=tokenizer, device="cpu").save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="session")
def pipe(tiny_checkpoint) -> IndexTTS2TextToAudioPipeline:
    """The front door over that folder. Shared: a test must not change it."""
    return IndexTTS2TextToAudioPipeline.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="session")
def tiny_adapter(tmp_path_factory, tiny_checkpoint) -> Path:
    """A random adapter on `tiny_checkpoint` that is heard. Shared: a test must not write into it."""
    from peft import LoraConfig

    from indextts2_hf.modeling_t2s import LORA_TARGET_MODULES

    folder = tmp_path_factory.mktemp("adapter") / "style"
    t2s = IndexTTS2T2SForConditionalGeneration.from_pretrained(tiny_checkpoint, subfolder="t2s")
    t2s.name_or_path = str(tiny_checkpoint)
    torch.manual_seed(3)
    t2s.add_adapter(LoraConfig(r=4, target_modules=LORA_TARGET_MODULES, init_lora_weights=False, fan_in_fan_out=True))
    t2s.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    return folder


# --- training ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_features(tmp_path_factory, tiny_checkpoint) -> Path:
    """
    Prepared features that fit `tiny_checkpoint`, of three speakers with four clips each, and two more of each in the
    validation split; random, but with codes that repeat as speech does. Shared: a test must not write into it.
    """
    from data import feature_columns, made_with

    folder = tmp_path_factory.mktemp("features")
    rng = np.random.default_rng(0)
    frames_per_token = SAMPLING_RATE / 256 / 50
    for split, clips in (("train", range(4)), ("validation", range(4, 6))):
        rows = []
        for speaker in range(3):
            for clip in clips:
                num_tokens = int(rng.integers(20, 40))
                num_frames = int(num_tokens * frames_per_token)
                rows.append(
                    {
                        "clip": f"speaker{speaker}/clip{clip}",
                        "speed": 1.0,
                        "speaker": f"speaker{speaker}",
                        "emotion": ["happy", "sad"][clip % 2],
                        "language": "en",
                        "text": "hello",
                        "duration_s": num_tokens / 50,
                        "num_semantic_tokens": num_tokens,
                        "input_ids": rng.integers(2, 900, rng.integers(3, 9)),
                        "semantic_ids": np.repeat(rng.integers(0, 64, num_tokens), 2)[:num_tokens],
                        "semantic_features": rng.standard_normal((num_tokens, 24)).astype(np.float16),
                        "mel": (rng.standard_normal((num_frames, 80)) - 5).astype(np.float16),
                        "speaker_embeds": rng.standard_normal(16).astype(np.float32),
                    }
                )
        table = Dataset.from_list(rows, features=feature_columns(feature_size=24, num_mel_bins=80))
        table.save_to_disk(folder / split / "shard-00000")
    (folder / "features.json").write_text(json.dumps(made_with(tiny_checkpoint)))
    return folder


@pytest.fixture(scope="session")
def tiny_recordings(tmp_path_factory) -> Path:
    """A folder of recordings in the audiofolder layout: two speakers with four clips each. Shared: a test must not change it."""
    folder = tmp_path_factory.mktemp("recordings")
    with open(folder / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text", "speaker", "emotion", "language"])
        for speaker, pitch_hz in enumerate((110.0, 220.0)):
            for clip in range(4):
                name = f"speaker{speaker}-{clip}.wav"
                sound = make_speech(0.6 + 0.1 * clip, 16000, pitch_hz * (1 + 0.02 * clip), seed=clip)
                soundfile.write(folder / name, sound, 16000)
                table.writerow([name, "Hello world.", f"speaker{speaker}", "neutral", "en"])
    return folder


# --- the Space -----------------------------------------------------------------------------------------------------------

SPACE = Path(__file__).parent.parent / "spaces" / "indextts2"
sys.path.insert(0, str(SPACE))


class Server:
    """The Space, started as its README says: `url`, `memory_mib()`, `output` (what it said so far)."""

    def __init__(self, folder: Path, port: int, process: subprocess.Popen):
        self.folder = folder
        self.url = f"http://127.0.0.1:{port}"
        self.process = process

    @property
    def output(self) -> str:
        return (self.folder / "output.txt").read_text(encoding="utf-8", errors="replace")

    def memory_mib(self) -> float:
        """Resident memory of the process; Linux says so."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024


@pytest.fixture(scope="session")
def space(tmp_path_factory) -> Iterator[Server]:
    """A running server of its own on the embedded checkpoint. Shared: a test must leave it running."""
    folder = tmp_path_factory.mktemp("space")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(folder / "files"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(indextts2_hf.__file__).parent.parent),
    }
    with open(folder / "output.txt", "w") as output:
        process = subprocess.Popen(
            [sys.executable, SPACE / "app.py"], cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    server = Server(folder, port, process)
    try:
        start = time.monotonic()
        while "Running on local URL" not in server.output:
            assert process.poll() is None and time.monotonic() - start < 180, f"no server:\n{server.output}"
            time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        process.wait(30)
