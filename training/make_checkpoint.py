"""
A new checkpoint with random weights, for models that are trained from scratch.

    python training/make_checkpoint.py --sizes training/configs/tiny_sizes.yaml --tokenizer bpe.model --output NEW

The YAML file has a section for each part with the arguments of its constructor or configuration: `t2s`, `s2m`, `semantic_encoder`,
`semantic_codec`, `speaker_encoder`, `scheduler`, `vocoder`, `feature_extractor`; beside them `sampling_rate` and the settings of `generation`.
`semantic_encoder` names the `model_type` of a speech encoder of transformers, or `from_pretrained: FOLDER_OR_REPOSITORY`. What
follows from other parts or from the vocabulary is filled in, and an error if it is given otherwise.

The folder can be loaded at once, by the training programs and by `IndexTTS2TextToAudioPipeline.from_pretrained`; it makes noise.
Train the parts in the order semantic codec, T2S, S2M; speaker encoder and vocoder hang on no other part.
"""

import argparse
import inspect
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from diffusers import ConfigMixin
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, PreTrainedModel

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
from indextts2_hf.modeling_t2s import sinusoidal_positions
from run import run_program


SECTIONS = (
    "sampling_rate",
    "feature_extractor",
    "semantic_encoder",
    "semantic_codec",
    "speaker_encoder",
    "t2s",
    "s2m",
    "scheduler",
    "vocoder",
    "generation",
)
# Bands of the filter bank that the feature extractor makes for the speaker encoder.
NUM_FBANK_BINS = 80
# Mean of the log-mel of speech at 22.05 kHz, of 46 minutes of read, spoken and acted speech.
MEAN_LOG_MEL = -6.0
# Standard deviation of the filter bank of speech, less its mean over time, of the same.
FBANK_DEVIATION = 3.5
# Noises that the networks hear when their weights are drawn.
NUM_NOISES = 32
NOISE_S = 2.0
# Frames of noise that tell the scale of a new velocity.
NUM_NOISE_FRAMES = 256
# By how much the random weights that would drown the noise on its way are made smaller.
CARRY_SCALE = 0.1
# By how much the number of frames may differ from the token rate: what the ends of a clip cost.
MAX_RATE_ERROR = 0.05

CARD = """\
---
library_name: transformers
pipeline_tag: text-to-speech
tags:
- indextts2
- untrained
---

# {name}

A checkpoint of IndexTTS2 with random weights, to be trained. **It is untrained: whatever the text, it makes noise.** Its sizes are
those of `{sizes}`, drawn with the seed {seed} by `training/make_checkpoint.py`.
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make a new checkpoint with random weights.", allow_abbrev=False)
    parser.add_argument(
        "--sizes", required=True, type=Path, metavar="FILE", help="YAML file with the sizes of all parts"
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        help="SentencePiece model (`bpe.model`), or a checkpoint whose tokenizer is taken",
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FOLDER", help="where it is written; new or empty"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    return parser.parse_args()


# --- sizes -----------------------------------------------------------------------------------------------------------------


def read_sizes(path: Path) -> dict[str, Any]:
    try:
        sizes = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--sizes {path} cannot be read: {error}") from error
    if not isinstance(sizes, dict) or "semantic_encoder" not in sizes:
        raise ValueError(
            f"--sizes {path} must have the section `semantic_encoder`, and may have {', '.join(SECTIONS)}."
        )
    for name, section in sizes.items():
        if name not in SECTIONS:
            raise ValueError(f"--sizes {path} has a section {name!r}, but the sections are {', '.join(SECTIONS)}.")
        if name != "sampling_rate" and not isinstance(section, dict):
            raise ValueError(f"The section {name!r} of {path} is {section!r}, but must hold settings by name.")
    return sizes


def fill_in(name: str, settings: dict[str, Any], derived: dict[str, tuple[Any, str]]) -> dict[str, Any]:
    """The settings of a part with what follows from others, given as values and where they come from."""
    for key, (value, origin) in derived.items():
        if settings.get(key, value) != value:
            raise ValueError(
                f"`{name}.{key}` is {settings[key]} in the sizes, but {origin} makes it {value}. Leave it out: it is filled in."
            )
    return settings | {key: value for key, (value, _) in derived.items()}


def build(name: str, part_class: type[ConfigMixin], settings: dict[str, Any]) -> Any:
    known = [key for key in inspect.signature(part_class).parameters if key != "kwargs"]
    unknown = settings.keys() - set(known)
    if unknown:
        raise ValueError(f"`{name}` has no setting {', '.join(map(repr, sorted(unknown)))}, but {', '.join(known)}.")
    try:
        return part_class(**settings)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"`{name}` cannot be made with {settings}: {error}") from error


# --- parts -----------------------------------------------------------------------------------------------------------------


def load_tokenizer(source: str) -> IndexTTS2Tokenizer:
    try:
        return IndexTTS2Tokenizer(source) if Path(source).is_file() else IndexTTS2Tokenizer.from_pretrained(source)
    except (ValueError, OSError, RuntimeError) as error:
        raise ValueError(
            f"--tokenizer {source} is no SentencePiece model, and no checkpoint with one: {error}"
        ) from error


def make_semantic_encoder(settings: dict[str, Any]) -> PreTrainedModel:
    """A random speech encoder of a `model_type`, or a trained one, with the other settings changed."""
    settings = dict(settings)
    source, model_type = settings.pop("from_pretrained", None), settings.pop("model_type", None)
    if (source is None) == (model_type is None):
        raise ValueError("`semantic_encoder` needs either `model_type` (random weights) or `from_pretrained`.")
    config = AutoConfig.from_pretrained(source) if source else AutoConfig.for_model(model_type)
    unknown = [key for key in settings if not hasattr(config, key)]
    if unknown:
        raise ValueError(f"`semantic_encoder` ({config.model_type}) has no setting {', '.join(map(repr, unknown))}.")
    config.update(settings)
    if source:
        return AutoModel.from_pretrained(source, config=config, dtype=torch.float32)
    return AutoModel.from_config(type(config)(**config.to_dict()))


def make_model(sizes: dict[str, Any], tokenizer: IndexTTS2Tokenizer) -> IndexTTS2ForTextToWaveform:
    """All parts, of sizes that fit each other, with weights drawn from torch's global generator."""
    sizes = {name: dict(sizes.get(name) or {}) for name in SECTIONS if name != "sampling_rate"} | {
        "sampling_rate": sizes.get("sampling_rate", 22050)
    }
    rate = (sizes["sampling_rate"], "`sampling_rate`")

    semantic_encoder = make_semantic_encoder(sizes["semantic_encoder"])
    source = sizes["semantic_encoder"].get("from_pretrained")
    if source and "semantic_feature_extractor" not in sizes["feature_extractor"]:
        sizes["feature_extractor"]["semantic_feature_extractor"] = AutoFeatureExtractor.from_pretrained(
            source
        ).to_dict()
    feature_extractor = IndexTTS2FeatureExtractor(
        **fill_in("feature_extractor", sizes["feature_extractor"], {"sampling_rate": rate})
    )
    num_mel_bins = (feature_extractor.num_mel_bins, "`feature_extractor.num_mel_bins`")
    feature_size = (semantic_encoder.config.hidden_size, "`semantic_encoder.hidden_size`")

    settings = fill_in("semantic_codec", sizes["semantic_codec"], {"feature_size": feature_size})
    semantic_codec = build("semantic_codec", IndexTTS2SemanticCodec, settings)
    settings = {"num_mel_bins": (NUM_FBANK_BINS, "the feature extractor's filter bank")}
    settings = fill_in("speaker_encoder", sizes["speaker_encoder"], settings)
    speaker_encoder = build("speaker_encoder", IndexTTS2SpeakerEncoder, settings)
    speaker_embed_dim = (speaker_encoder.config.embed_dim, "`speaker_encoder.embed_dim`")
    derived = {"num_mel_bins": num_mel_bins, "sampling_rate": rate}
    for name in ("n_fft", "win_length", "mel_fmin", "mel_fmax"):
        derived[name] = (getattr(feature_extractor, name), f"`feature_extractor.{name}`")
    settings = fill_in("vocoder", sizes["vocoder"], derived)
    vocoder = build("vocoder", IndexTTS2Vocoder, settings)

    codebook_size, from_codec = semantic_codec.config.codebook_size, "`semantic_codec.codebook_size`"
    trained_here = "a model trained with these programs"
    derived = {
        "text_vocab_size": (tokenizer.vocab_size, "the vocabulary"),
        "semantic_vocab_size": (codebook_size + 2, from_codec),
        "semantic_start_token_id": (codebook_size, from_codec),
        "semantic_stop_token_id": (codebook_size + 1, from_codec),
        "prefix_placeholder_token_id": (codebook_size, trained_here),
        "use_length_row": (True, trained_here),
        "skip_semantic_position_one": (False, trained_here),
        "feature_size": feature_size,
        "speaker_embed_dim": speaker_embed_dim,
    }
    try:
        t2s_config = IndexTTS2T2SConfig(**fill_in("t2s", sizes["t2s"], derived))
    except StrictDataclassError as error:
        raise ValueError(f"`t2s` cannot be used: {' '.join(str(error).split())}") from error
    t2s = IndexTTS2T2SForConditionalGeneration(t2s_config)
    derived = {
        "bos_token_id": (codebook_size, from_codec),
        "eos_token_id": (codebook_size + 1, from_codec),
        "pad_token_id": (codebook_size + 1, from_codec),
    }
    settings = fill_in("generation", sizes["generation"], derived)
    unknown = settings.keys() - vars(IndexTTS2GenerationConfig()).keys()
    if unknown:
        raise ValueError(f"`generation` has no setting {', '.join(map(repr, sorted(unknown)))}.")
    settings = {
        "max_new_tokens": t2s_config.max_semantic_tokens + 1,
        "suppress_tokens": [t2s_config.semantic_start_token_id],
    } | settings
    t2s.generation_config = IndexTTS2GenerationConfig(**settings)

    frames_per_token = sizes["sampling_rate"] / vocoder.hop_length / t2s_config.semantic_token_rate
    derived = {
        "num_mel_bins": num_mel_bins,
        "semantic_size": feature_size,
        "speaker_embed_dim": speaker_embed_dim,
        "t2s_hidden_size": (t2s_config.hidden_size, "`t2s.hidden_size`"),
    }
    settings = {"mel_frames_per_token": frames_per_token} | fill_in("s2m", sizes["s2m"], derived)
    s2m = build("s2m", IndexTTS2SemanticToMelTransformer, settings)
    return IndexTTS2ForTextToWaveform(
        IndexTTS2Config(sampling_rate=sizes["sampling_rate"]),
        t2s=t2s,
        s2m=s2m,
        scheduler=build("scheduler", IndexTTS2FlowMatchScheduler, sizes["scheduler"]),
        semantic_encoder=semantic_encoder,
        semantic_codec=semantic_codec,
        speaker_encoder=speaker_encoder,
        vocoder=vocoder,
        feature_extractor=feature_extractor,
    ).eval()


# --- weights ---------------------------------------------------------------------------------------------------------------


def make_noises(count: int, seconds: float, sampling_rate: int) -> list[np.ndarray]:
    """Noises, each with a spectrum and a rhythm of its own, as uneven as speech is. Float32 in [-1, 1]."""
    noises = []
    num_samples = round(seconds * sampling_rate)
    for _ in range(count):
        spectrum = torch.fft.rfft(torch.randn(num_samples))
        formants, rhythm = (
            F.interpolate(torch.randn(1, 1, num_points), size, mode="linear")[0, 0].mul(2.0).exp()
            for num_points, size in ((12, len(spectrum)), (round(8 * seconds), num_samples))
        )
        tilt = 1.0 / torch.arange(1, len(spectrum) + 1)
        noise = torch.fft.irfft(spectrum * formants * tilt, num_samples) * rhythm
        noises.append((0.5 * noise / noise.abs().max()).numpy())
    return noises


@torch.no_grad()
def carry_noise(s2m: IndexTTS2SemanticToMelTransformer) -> None:
    """
    Lays a way for the sample through the head, so that the velocity of a new network is about its bias less the sample.

    At time 0 the sample is the noise, and the best guess that knows nothing else is the mean of the data less that noise: each
    value of it has to come out again, through a head that random weights make forget it. Learning to carry it costs a small network
    many steps. Here the first dimensions of each layer of the head, one for each mel bin, begin as a copy of the sample; the layer norm
    is undone for a sample of unit noise. The way is ours, neither the paper's nor the released code's. Networks that are not
    twice as wide as a mel in all layers of the head have no room beside it and are left as they are.
    """
    num_mel_bins, hidden_size = s2m.config.num_mel_bins, s2m.config.hidden_size
    if min(hidden_size, s2m.config.wavenet_hidden_size) < 2 * num_mel_bins:
        return
    # The skip connection reads the sample behind the hidden states.
    layers = [(s2m.skip_projection, hidden_size)]
    layers += [(layer, 0) for layer in (s2m.residual_projection, s2m.final_layer.linear, s2m.velocity_projection)]
    for layer, start in layers:
        layer.weight[:num_mel_bins] *= CARRY_SCALE
        layer.weight[:num_mel_bins, start : start + num_mel_bins] += torch.eye(num_mel_bins)
    noise = torch.randn(1, NUM_NOISE_FRAMES, num_mel_bins)
    output = s2m(
        noise,
        timestep=torch.zeros(1),
        prompt_mel=torch.zeros_like(noise),
        content_embeds=torch.zeros(1, NUM_NOISE_FRAMES, s2m.config.content_size),
        speaker_embeds=torch.zeros(1, s2m.config.speaker_embed_dim),
    )
    velocity = output.velocity - s2m.velocity_projection.bias
    s2m.velocity_projection.weight /= -(velocity * noise).mean() / noise.square().mean()


@torch.no_grad()
def initialize(model: IndexTTS2ForTextToWaveform) -> None:
    """
    Redraws what would hinder training if it stayed as the libraries make it, with noises where activations are to be known.
    T2S, speech encoder and vocoder are left as they are but for the first line.

    Raises:
        ValueError: the speech encoder cannot read what the feature extractor gives it, or has another token rate.
    """
    # No emotion is added by a model that has not learnt any.
    nn.init.zeros_(model.t2s.emotion_out_proj.weight)
    nn.init.zeros_(model.t2s.emotion_out_proj.bias)
    # Neighbouring positions begin alike: a count that was never asked for in training is then read like those around it.
    for table in (model.t2s.text_position_embedding, model.t2s.semantic_position_embedding):
        scale = model.t2s.config.initializer_range * 2**0.5
        table.weight.copy_(scale * sinusoidal_positions(*table.weight.shape, table.weight.device))
    # Velocity is data less noise, which is the mean of the data until something is learnt.
    mean = model.s2m.normalize_mel(torch.tensor(MEAN_LOG_MEL))
    nn.init.constant_(model.s2m.velocity_projection.bias, float(mean))
    carry_noise(model.s2m)
    # What T2S states add to the codes begins as nothing: a network that is trained without them can be used with them.
    for parameter in model.s2m.t2s_projection[-1].parameters():
        nn.init.zeros_(parameter)
    # The embedding would be 1e-4 large and hardly depend on the voice: nothing restores the level that the layers lose.
    for module in model.speaker_encoder.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    sampling_rate = model.config.sampling_rate
    pipeline = model.semantic_to_mel
    noises = make_noises(NUM_NOISES, NOISE_S, sampling_rate)
    inputs = [pipeline.feature_extractor(speaker_audio=(noise, sampling_rate)) for noise in noises]
    try:
        features = [
            pipeline.encode_features(item["speaker_input_features"], item["speaker_attention_mask"]) for item in inputs
        ]
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"The {type(model.semantic_encoder).__name__} cannot read what {type(pipeline.feature_extractor.semantic_feature_extractor).__name__} "
            f"gives it ({error}). Correct the sizes of `semantic_encoder`, or name its own extractor in "
            "`feature_extractor.semantic_feature_extractor`."
        ) from error
    token_rate = model.t2s.config.semantic_token_rate
    if abs(len(features[0]) - token_rate * NOISE_S) > MAX_RATE_ERROR * token_rate * NOISE_S:
        raise ValueError(
            f"The speech encoder gives {len(features[0])} frames for {NOISE_S:g} s, but `t2s.semantic_token_rate` is {token_rate:g} per "
            f"second. Set it to {round(len(features[0]) / NOISE_S)}, or take another encoder."
        )

    # Rows of the codebook that are latents of something have their length and direction.
    features = torch.cat(features)
    features = (features - features.mean(dim=0)) / features.std(dim=0)
    codec = model.semantic_codec
    latents = codec.quantizer.project_in(codec.encoder(features[None]))[0]
    rows = latents[torch.randint(len(latents), (codec.config.codebook_size,))]
    codec.quantizer.codebook.weight.copy_(rows + 0.1 * latents.std(dim=0) * torch.randn(rows.shape))

    # What the embedding has in common for all voices goes into the mean of the last norm.
    fbank = torch.cat([item["speaker_fbank"] for item in inputs])
    norm = model.speaker_encoder.projection_norm
    momentum, norm.momentum = norm.momentum, 1.0
    norm.train()
    model.speaker_encoder(fbank * (FBANK_DEVIATION / fbank.std()))
    norm.eval()
    norm.momentum = momentum


# --- the folder ------------------------------------------------------------------------------------------------------------


def write_checkpoint(
    model: IndexTTS2ForTextToWaveform, tokenizer: IndexTTS2Tokenizer, folder: Path, sizes: str, seed: int
) -> None:
    """Writes the folder, whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        processor = IndexTTS2Processor(model.feature_extractor, tokenizer)
        pipeline = IndexTTS2TextToAudioPipeline(model=model, processor=processor, tokenizer=tokenizer, device="cpu")
        pipeline.save_pretrained(temporary)
        card = CARD.format(name=folder.name, sizes=sizes, seed=seed)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        # Weights are written readable to their owner alone; here whoever may read the folder may read them.
        mode = temporary.stat().st_mode & 0o666
        for path in temporary.rglob("*.safetensors"):
            path.chmod(mode)
        if folder.is_dir():
            folder.rmdir()
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise OSError(f"--output {folder} cannot be written: {error}. Make room, or name another folder.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main() -> None:
    arguments = parse()
    folder = arguments.output
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output {folder} is there already. Name another folder, or remove it.")
    sizes = read_sizes(arguments.sizes)
    tokenizer = load_tokenizer(arguments.tokenizer)
    torch.manual_seed(arguments.seed)
    model = make_model(sizes, tokenizer)
    initialize(model)
    write_checkpoint(model, tokenizer, folder, arguments.sizes.name, arguments.seed)
    for name in ("t2s", "s2m", "semantic_encoder", "semantic_codec", "speaker_encoder", "vocoder"):
        count = sum(parameter.numel() for parameter in getattr(model, name).parameters())
        tqdm.write(f"{name}: {count / 1e6:.2f} M parameters", file=sys.stderr)
    tqdm.write(f"{folder} is ready; it is untrained.", file=sys.stderr)


if __name__ == "__main__":
    run_program(main)
