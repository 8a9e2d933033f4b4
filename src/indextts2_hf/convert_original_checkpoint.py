"""
The original checkpoint of IndexTTS-2 and the models it is built on, converted to one checkpoint folder of this package.

First what all parts share: tables of names, and the reading of files. Then a section for each part: its table and its sizes.
Last the conversion itself. Any sizes can be converted; other architectures cannot, and are refused by name.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel
from transformers.utils import logging

from .cards import write_model_card
from .configuration_indextts2 import IndexTTS2Config, IndexTTS2T2SConfig
from .feature_extraction_indextts2 import IndexTTS2FeatureExtractor
from .generation_t2s import IndexTTS2GenerationConfig
from .modeling_indextts2 import IndexTTS2ForTextToWaveform
from .modeling_s2m import IndexTTS2SemanticToMelTransformer
from .modeling_semantic_codec import IndexTTS2SemanticCodec
from .modeling_speaker_encoder import IndexTTS2SpeakerEncoder
from .modeling_t2s import IndexTTS2T2SForConditionalGeneration
from .modeling_vocoder import IndexTTS2Vocoder
from .pipeline_s2m import IndexTTS2SemanticToMelPipeline
from .processing_indextts2 import IndexTTS2Processor
from .scheduling_flow_match_s2m import IndexTTS2FlowMatchScheduler
from .tokenization_indextts2 import IndexTTS2Tokenizer


logger = logging.get_logger(__name__)

# The models from elsewhere: the argument that names their folder, their repository, and what is read of it.
EXTERNAL_MODELS = {
    "w2v_bert": ("facebook/w2v-bert-2.0", ("config.json", "preprocessor_config.json", "model.safetensors")),
    "semantic_codec": ("amphion/MaskGCT", ("semantic_codec/model.safetensors",)),
    "speaker_encoder": ("funasr/campplus", ("campplus_cn_common.bin",)),
    "vocoder": ("nvidia/bigvgan_v2_22khz_80band_256x", ("config.json", "bigvgan_generator.pt")),
}

# What the networks are built for. Another value in the original's settings means another architecture, not another size.
EXPECTED_SETTINGS = {
    "gpt": {
        "condition_type": "conformer_perceiver",
        "train_solo_embeddings": False,
        "use_mel_codes_as_input": True,
        "condition_module": {"input_layer": "conv2d2"},
        "emo_condition_module": {"input_layer": "conv2d2"},
    },
    "s2mel": {
        "dit_type": "DiT",
        "length_regulator": {"is_discrete": False, "f0_condition": False, "sampling_ratios": [1, 1, 1, 1]},
        "DiT": {
            "style_condition": True,
            "final_layer_type": "wavenet",
            "f0_condition": False,
            "is_causal": False,
            "long_skip_connection": True,
            "zero_prompt_speech_token": False,
            "time_as_token": False,
            "style_as_token": False,
            "uvit_skip_connection": True,
            "add_resblock_in_transformer": False,
        },
        "wavenet": {"dilation_rate": 1, "style_condition": True},
    },
}
EXPECTED_VOCODER_SETTINGS = {
    "resblock": "1",
    "activation": "snakebeta",
    "snake_logscale": True,
    "use_tanh_at_final": False,
    "use_bias_at_final": False,
}


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeyTable:
    r"""
    What becomes of the tensors of an original file. Every key is unused, recomputable, or renamed; any other is an error.

    Args:
        renames (`tuple[tuple[str, str], ...]`):
            Regular expressions for the beginning of a key, and what stands there in ours. The first that fits counts.
        unused (`tuple[str, ...]`):
            Regular expressions of whole keys that take no part in inference.
        recomputable (`tuple[str, ...]`):
            The same for constant tables.
        reshaped (`tuple[str, ...]`):
            Our names of tensors that have axes of length one in the original: its convolutions of one frame are linear
            layers here.
        recount (`Callable[[str], str]`, *optional*):
            Rewrites the counters in a key before it is looked up.
    """

    renames: tuple[tuple[str, str], ...]
    unused: tuple[str, ...] = ()
    recomputable: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    recount: Callable[[str], str] | None = None

    def rename(self, key: str) -> str | None:
        """Our name of an original tensor, `None` for one that is left out. Raises a `KeyError` for an unknown one."""
        key = re.sub(r"(?<![^.])module\.", "", key)  # left by data-parallel training
        key = self.recount(key) if self.recount else key
        if any(re.fullmatch(pattern, key) for pattern in self.unused + self.recomputable):
            return None
        for old, new in self.renames:
            if re.match(old, key):
                return re.sub(old, new, key, count=1)
        raise KeyError(key)


def convert_tensors(
    state: Mapping[str, torch.Tensor], table: KeyTable, shapes: Mapping[str, Sequence[int]], source: str
) -> dict[str, torch.Tensor]:
    r"""
    The tensors of a part of ours from those of the original, weight norm folded, floats in float32.

    Args:
        state (`Mapping[str, torch.Tensor]`):
            Tensors of the original. On the `meta` device nothing is computed, and names and shapes are checked all the same.
        table ([`KeyTable`]):
            Their names.
        shapes (`Mapping[str, Sequence[int]]`):
            Shape of every tensor of ours.
        source (`str`):
            Where `state` comes from, for messages.

    Returns:
        `dict[str, torch.Tensor]`: exactly the names of `shapes`.

    Raises:
        ValueError: a tensor is unknown, missing, there twice, or of another shape; the message names it.
    """
    converted: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        try:
            new_key = table.rename(key)
        except KeyError:
            new_key = "?"
        if new_key is None or new_key.endswith(".weight_v"):
            continue
        if new_key.endswith(".weight_g"):
            tensor, new_key = fold_weight_norm(state, key, source), new_key.removesuffix("_g")
        if new_key not in shapes:
            raise ValueError(
                f"{source} has a tensor `{key}`, which IndexTTS-2 does not have. Is it the checkpoint of another model, "
                "or of another version?"
            )
        if new_key in converted:
            raise ValueError(f"{source} has the tensor `{key}` twice, under two names. Remove one of them.")
        shape = tuple(shapes[new_key])
        if new_key in table.reshaped and tensor.numel() == prod(shape):
            tensor = tensor.reshape(shape)
        if tensor.shape != shape:
            raise ValueError(
                f"{source} has a tensor `{key}` of the shape {tuple(tensor.shape)}, but the sizes in the configuration "
                f"ask for {shape} (`{new_key}` in ours)."
            )
        converted[new_key] = tensor.float() if tensor.is_floating_point() else tensor
    missing = sorted(shapes.keys() - converted.keys())
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} of {len(shapes)} tensors, for example the one that is `{missing[0]}` in ours."
        )
    return converted


def fold_weight_norm(state: Mapping[str, torch.Tensor], key: str, source: str) -> torch.Tensor:
    """The weight that `weight_g` (`key`) and the `weight_v` beside it stand for: g · v / ‖v‖."""
    direction_key = key.removesuffix("_g") + "_v"
    if direction_key not in state:
        raise ValueError(f"{source} has a tensor `{key}` but no `{direction_key}`, which belongs to it.")
    length, direction = state[key].float(), state[direction_key].float()
    # Over all axes but the first, for transposed convolutions too: theirs is the input channel.
    norm = torch.linalg.vector_norm(direction, dim=tuple(range(1, direction.ndim)), keepdim=True)
    if length.shape != norm.shape:
        raise ValueError(
            f"{source} has a tensor `{key}` of the shape {tuple(length.shape)}, but `{direction_key}` asks for "
            f"{tuple(norm.shape)}."
        )
    return length * direction / norm


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def read_pickle(path: Path) -> Any:
    """What a PyTorch file holds, tensors mapped and not read. Nothing but tensors and plain containers is unpickled."""
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # what a damaged file raises depends on where the damage is
        if "GLOBAL" in str(error):
            raise ValueError(
                f"'{path}' holds more than weights and is not opened: a pickle can run any code. Get it again from its "
                "source; if it is meant to be like this, save its tensors alone with `torch.save`."
            ) from error
        raise damaged(path, error) from error


def read_state(path: Path, group: str | None = None, is_wrapped: bool = True) -> dict[str, torch.Tensor]:
    """
    The tensors of a `.safetensors` or PyTorch file by name; in a PyTorch file those under `group`, which may be missing
    unless the file `is_wrapped`.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise damaged(path, error) from error
    state = read_pickle(path)
    if isinstance(state, dict) and group is not None and (is_wrapped or group in state):
        state = state.get(group)
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        place = f" under `{group}`" if group else ""
        raise ValueError(f"'{path}' holds no dictionary of tensors{place}: it is not the original's file.")
    return state


def damaged(path: Path, error: Exception) -> ValueError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ValueError(f"'{path}' is damaged or was not written to its end ({reason}). Download it again.")


def read_settings(path: Path) -> dict[str, Any]:
    """A YAML or JSON file that holds a dictionary."""
    try:
        text = path.read_text(encoding="utf-8")
        settings = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise damaged(path, error) from error
    if not isinstance(settings, dict):
        raise ValueError(f"'{path}' holds no settings but {type(settings).__name__}.")
    return settings


def check_settings(settings: Mapping[str, Any], expected: Mapping[str, Any], path: str) -> None:
    """Raises a `ValueError` if a setting that is there has another value than the only one that ours knows."""
    for name, value in expected.items():
        found = settings.get(name, value)
        if isinstance(value, Mapping):
            check_settings(found if isinstance(found, Mapping) else {}, value, f"{path}.{name}")
        elif found != value:
            raise ValueError(
                f"`{path}.{name}` is {found!r} but only {value!r} can be converted: the other is another architecture."
            )


def find_external(argument: str, folder: Path | None, original_folder: Path) -> dict[str, Path]:
    """
    The files of a model from elsewhere by name: in its folder, else in a folder of its repository's name in the original
    folder or in the local Hugging Face cache.
    """
    repository, names = EXTERNAL_MODELS[argument]
    place = folder or original_folder / repository.split("/")[1]
    files = {}
    for name in names:
        candidates = [place / name, place / Path(name).name]
        if folder is None and isinstance(cached := try_to_load_from_cache(repository, name), str):
            candidates.append(Path(cached))
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        if found is None:
            where = f"'{place}'" if folder else f"'{place}' or the local Hugging Face cache"
            raise FileNotFoundError(
                f"The file '{name}' of {repository} is not in {where}. Get it with `hf download {repository} {name}`, or name "
                f"the folder that has it: `--{argument.replace('_', '-')} DIR` (in Python `{argument}=`)."
            )
        files[name] = found
    return files


# ---------------------------------------------------------------------------------------------------------------------
# Text to semantic tokens: gpt.pth, feat1.pt, feat2.pt
# ---------------------------------------------------------------------------------------------------------------------

CONFORMER_RENAMES = (
    (r"embed\.conv\.0\.", "subsampling.conv."),
    (r"embed\.out\.0\.", "subsampling.linear."),
    (r"encoders\.(\d+)\.self_attn\.pos_bias_u$", r"layers.\1.attention.content_bias"),
    (r"encoders\.(\d+)\.self_attn\.pos_bias_v$", r"layers.\1.attention.position_bias"),
    (r"encoders\.(\d+)\.self_attn\.linear_([qkv])\.", r"layers.\1.attention.\2_proj."),
    (r"encoders\.(\d+)\.self_attn\.linear_pos\.", r"layers.\1.attention.position_proj."),
    (r"encoders\.(\d+)\.self_attn\.linear_out\.", r"layers.\1.attention.out_proj."),
    (r"encoders\.(\d+)\.feed_forward\.w_1\.", r"layers.\1.up_proj."),
    (r"encoders\.(\d+)\.feed_forward\.w_2\.", r"layers.\1.down_proj."),
    (r"encoders\.(\d+)\.conv_module\.", r"layers.\1.convolution."),
    (r"encoders\.(\d+)\.norm_mha\.", r"layers.\1.attention_norm."),
    (r"encoders\.(\d+)\.norm_conv\.", r"layers.\1.convolution_norm."),
    (r"encoders\.(\d+)\.norm_ff\.", r"layers.\1.feed_forward_norm."),
    (r"encoders\.(\d+)\.norm_final\.", r"layers.\1.final_norm."),
    (r"after_norm\.", "norm."),
)
PERCEIVER_RENAMES = (
    (r"latents$", "latents"),
    (r"proj_context\.", "context_proj."),
    (r"layers\.(\d+)\.0\.to_(q|kv|out)\.", r"layers.\1.\2_proj."),
    (r"layers\.(\d+)\.1\.0\.", r"layers.\1.up_proj."),
    (r"layers\.(\d+)\.1\.2\.", r"layers.\1.down_proj."),
    (r"norm\.gamma$", "gamma"),
)
T2S_TABLE = KeyTable(
    renames=(
        *((rf"conditioning_encoder\.{old}", f"speaker_conformer.{new}") for old, new in CONFORMER_RENAMES),
        *((rf"perceiver_encoder\.{old}", f"speaker_perceiver.{new}") for old, new in PERCEIVER_RENAMES),
        *((rf"emo_conditioning_encoder\.{old}", f"emotion_conformer.{new}") for old, new in CONFORMER_RENAMES),
        *((rf"emo_perceiver_encoder\.{old}", f"emotion_perceiver.{new}") for old, new in PERCEIVER_RENAMES),
        (r"emovec_layer\.", "emotion_in_proj."),
        (r"emo_layer\.", "emotion_out_proj."),
        (r"spk_matrix$", "emotion_prototypes.speaker_embeds"),
        (r"emo_matrix$", "emotion_prototypes.emotion_embeds"),
        (r"speed_emb\.", "slot_embedding."),
        (r"text_embedding\.", "text_embedding."),
        (r"text_pos_embedding\.emb\.", "text_position_embedding."),
        (r"mel_embedding\.", "semantic_embedding."),
        (r"mel_pos_embedding\.emb\.", "semantic_position_embedding."),
        (r"gpt\.h\.(\d+)\.", r"model.layers.\1."),
        (r"gpt\.ln_f\.", "model.norm."),
        (r"final_norm\.", "model.final_norm."),
        (r"text_head\.", "text_head."),
        (r"mel_head\.", "semantic_head."),
    ),
    # Other names of the same tensors, and masks of an old GPT-2: not in the released file, but in copies of it.
    unused=(r"inference_model\..*", r"gpt\.wte\.weight", r"gpt\.h\.\d+\.attn\.(masked_)?bias"),
    recomputable=(r"(emo_)?conditioning_encoder\.embed\.pos_enc\.pe",),
)


def t2s_settings(original: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `IndexTTS2T2SConfig` from the original `config.yaml`."""
    gpt = original["gpt"]
    speaker, emotion = gpt["condition_module"], gpt["emo_condition_module"]
    if speaker["perceiver_mult"] != emotion["perceiver_mult"]:
        raise ValueError(
            f"`gpt.condition_module.perceiver_mult` is {speaker['perceiver_mult']} but that of `emo_condition_module` is "
            f"{emotion['perceiver_mult']}: they must be equal to be converted."
        )
    return {
        "hidden_size": gpt["model_dim"],
        "num_hidden_layers": gpt["layers"],
        "num_attention_heads": gpt["heads"],
        "text_vocab_size": gpt["number_text_tokens"] + 1,
        "max_text_tokens": gpt["max_text_tokens"],
        "text_start_token_id": gpt["start_text_token"],
        "text_stop_token_id": gpt["stop_text_token"],
        "semantic_vocab_size": gpt["number_mel_codes"],
        "max_semantic_tokens": gpt["max_mel_tokens"],
        "semantic_start_token_id": gpt["start_mel_token"],
        "semantic_stop_token_id": gpt["stop_mel_token"],
        "feature_size": original["semantic_codec"]["hidden_size"],
        "speaker_embed_dim": original["s2mel"]["style_encoder"]["dim"],
        "speaker_num_latents": gpt.get("condition_num_latent", 32),
        "speaker_conformer_hidden_size": speaker["output_size"],
        "speaker_conformer_intermediate_size": speaker["linear_units"],
        "speaker_conformer_num_layers": speaker["num_blocks"],
        "speaker_conformer_num_heads": speaker["attention_heads"],
        "emotion_conformer_hidden_size": emotion["output_size"],
        "emotion_conformer_intermediate_size": emotion["linear_units"],
        "emotion_conformer_num_layers": emotion["num_blocks"],
        "emotion_conformer_num_heads": emotion["attention_heads"],
        "perceiver_mult": speaker["perceiver_mult"],
        "emotion_prototype_counts": original["emo_num"],
        # How the released network was trained.
        "use_length_row": False,
        "skip_semantic_position_one": True,
        "prefix_placeholder_token_id": 1,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Semantic tokens to mel: s2mel.pth
# ---------------------------------------------------------------------------------------------------------------------

BLOCK = r"cfm\.estimator\.transformer\.layers\.(\d+)\."
S2M_RENAMES = (
    (r"gpt_layer\.", "t2s_projection."),
    (r"length_regulator\.content_in_proj\.", "length_regulator.input_projection."),
    *((rf"length_regulator\.model\.{3 * i}\.", f"length_regulator.convs.{i}.") for i in range(4)),
    *((rf"length_regulator\.model\.{3 * i + 1}\.", f"length_regulator.norms.{i}.") for i in range(4)),
    (r"length_regulator\.model\.12\.", "length_regulator.output_projection."),
    (r"cfm\.estimator\.t_embedder\.mlp\.0\.", "time_embedding.linear_1."),
    (r"cfm\.estimator\.t_embedder\.mlp\.2\.", "time_embedding.linear_2."),
    (r"cfm\.estimator\.t_embedder2\.mlp\.0\.", "wavenet_time_embedding.linear_1."),
    (r"cfm\.estimator\.t_embedder2\.mlp\.2\.", "wavenet_time_embedding.linear_2."),
    (r"cfm\.estimator\.cond_projection\.", "content_projection."),
    (r"cfm\.estimator\.cond_x_merge_linear\.", "input_projection."),
    (rf"{BLOCK}skip_in_linear\.", r"blocks.\1.skip_proj."),
    (rf"{BLOCK}attention_norm\.project_layer\.", r"blocks.\1.attention_norm.time_projection."),
    (rf"{BLOCK}attention_norm\.norm\.", r"blocks.\1.attention_norm.norm."),
    (rf"{BLOCK}attention\.wqkv\.", r"blocks.\1.attention.qkv_proj."),
    (rf"{BLOCK}attention\.wo\.", r"blocks.\1.attention.out_proj."),
    (rf"{BLOCK}ffn_norm\.project_layer\.", r"blocks.\1.feed_forward_norm.time_projection."),
    (rf"{BLOCK}ffn_norm\.norm\.", r"blocks.\1.feed_forward_norm.norm."),
    (rf"{BLOCK}feed_forward\.w1\.", r"blocks.\1.feed_forward.gate_proj."),
    (rf"{BLOCK}feed_forward\.w3\.", r"blocks.\1.feed_forward.up_proj."),
    (rf"{BLOCK}feed_forward\.w2\.", r"blocks.\1.feed_forward.down_proj."),
    (r"cfm\.estimator\.transformer\.norm\.project_layer\.", "norm.time_projection."),
    (r"cfm\.estimator\.transformer\.norm\.norm\.", "norm.norm."),
    (r"cfm\.estimator\.skip_linear\.", "skip_projection."),
    (r"cfm\.estimator\.conv1\.", "wavenet_input_projection."),
    (r"cfm\.estimator\.wavenet\.cond_layer\.conv\.conv\.", "wavenet.time_projection."),
    (r"cfm\.estimator\.wavenet\.in_layers\.(\d+)\.conv\.conv\.", r"wavenet.gate_convs.\1."),
    (r"cfm\.estimator\.wavenet\.res_skip_layers\.(\d+)\.conv\.conv\.", r"wavenet.output_convs.\1."),
    (r"cfm\.estimator\.res_projection\.", "residual_projection."),
    (r"cfm\.estimator\.final_layer\.adaLN_modulation\.1\.", "final_layer.time_projection."),
    (r"cfm\.estimator\.final_layer\.linear\.", "final_layer.linear."),
    (r"cfm\.estimator\.conv2\.", "velocity_projection."),
)


def s2m_table(num_layers: int) -> KeyTable:
    # Every block of the original has a `skip_in_linear`; those of the first half are never called.
    first_half = "|".join(map(str, range(num_layers // 2 + 1)))
    return KeyTable(
        renames=S2M_RENAMES,
        unused=(
            r"cfm\.estimator\.(x_embedder|cond_embedder|content_mask_embedder)\..*",
            rf"cfm\.estimator\.transformer\.layers\.({first_half})\.skip_in_linear\..*",
            r"length_regulator\.(embedding\.weight|mask_token)",
        ),
        recomputable=(r"cfm\.estimator\.(input_pos|t_embedder2?\.freqs)",),
        reshaped=(
            "length_regulator.output_projection.weight",
            "wavenet.time_projection.weight",
            "velocity_projection.weight",
        ),
    )


def read_s2m_state(path: Path) -> dict[str, torch.Tensor]:
    """The three groups of `s2mel.pth` in one dictionary, their names in front."""
    net = read_pickle(path)
    net = net.get("net") if isinstance(net, dict) else None
    state = {}
    for group in ("cfm", "length_regulator", "gpt_layer"):
        tensors = net.get(group) if isinstance(net, dict) else None
        if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            raise ValueError(f"'{path}' holds no tensors under `net`, `{group}`: it is not the original's file.")
        state |= {f"{group}.{key}": tensor for key, tensor in tensors.items()}
    return state


def s2m_settings(original: Mapping[str, Any]) -> dict[str, Any]:
    """
    Arguments of `IndexTTS2SemanticToMelTransformer` from the original `config.yaml`. The inner widths of `gpt_layer` are not
    in the official file: those of the release, unless a list `gpt_layer` has all its widths.
    """
    s2mel, hidden_size = original["s2mel"], original["gpt"]["model_dim"]
    regulator, transformer, wavenet = s2mel["length_regulator"], s2mel["DiT"], s2mel["wavenet"]
    return {
        "num_mel_bins": transformer["in_channels"],
        "hidden_size": transformer["hidden_dim"],
        "num_attention_heads": transformer["num_heads"],
        "num_layers": transformer["depth"],
        "content_size": regulator["channels"],
        "semantic_size": regulator["in_channels"],
        "speaker_embed_dim": s2mel["style_encoder"]["dim"],
        "wavenet_hidden_size": wavenet["hidden_dim"],
        "wavenet_num_layers": wavenet["num_layers"],
        "wavenet_kernel_size": wavenet["kernel_size"],
        "t2s_hidden_size": hidden_size,
        "t2s_projection_sizes": original.get("gpt_layer", [hidden_size, 256, 128, regulator["in_channels"]])[1:-1],
        "mel_frames_per_token": 1.72,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Semantic encoder and codec: w2v-bert-2.0, MaskGCT, wav2vec2bert_stats.pt
# ---------------------------------------------------------------------------------------------------------------------

# The hidden state that is used is the output of this many layers; the others need not run.
NUM_ENCODER_LAYERS = 17

SEMANTIC_ENCODER_TABLE = KeyTable(
    renames=(
        (r"masked_spec_embed$", "masked_spec_embed"),
        (r"feature_projection\.", "feature_projection."),
        (r"encoder\.", "encoder."),
    ),
    unused=(rf"encoder\.layers\.(?!({'|'.join(map(str, range(NUM_ENCODER_LAYERS)))})\.)\d+\..*",),
)

SEMANTIC_CODEC_TABLE = KeyTable(
    renames=(
        (r"w2v_stat\.mean$", "feature_mean"),
        (r"w2v_stat\.var$", "feature_variance"),
        (r"(encoder|decoder)\.0\.embed\.", r"\1.conv_in."),
        (r"(encoder|decoder)\.0\.norm\.", r"\1.norm_in."),
        (r"(encoder|decoder)\.0\.convnext\.(\d+)\.dwconv\.", r"\1.blocks.\2.depthwise_conv."),
        (r"(encoder|decoder)\.0\.convnext\.(\d+)\.norm\.", r"\1.blocks.\2.norm."),
        (r"(encoder|decoder)\.0\.convnext\.(\d+)\.pwconv([12])\.", r"\1.blocks.\2.linear_\3."),
        (r"(encoder|decoder)\.0\.convnext\.(\d+)\.gamma$", r"\1.blocks.\2.scale"),
        (r"(encoder|decoder)\.0\.final_layer_norm\.", r"\1.norm_out."),
        (r"(encoder|decoder)\.1\.", r"\1.linear_out."),
        (r"quantizer\.quantizers\.0\.in_project\.", "quantizer.project_in."),
        (r"quantizer\.quantizers\.0\.out_project\.", "quantizer.project_out."),
        (r"quantizer\.quantizers\.0\.codebook\.", "quantizer.codebook."),
    ),
    reshaped=("quantizer.project_in.weight", "quantizer.project_out.weight"),
)


def semantic_encoder_config(settings: Mapping[str, Any]) -> Wav2Vec2BertConfig:
    """The encoder's own configuration, cut after the layer that is used."""
    config = Wav2Vec2BertConfig.from_dict(dict(settings))
    if config.num_hidden_layers < NUM_ENCODER_LAYERS or config.add_adapter:
        raise ValueError(
            f"The semantic encoder has {config.num_hidden_layers} layers (adapter: {config.add_adapter}), but the output of "
            f"layer {NUM_ENCODER_LAYERS} is needed, without an adapter. Give the folder of {EXTERNAL_MODELS['w2v_bert'][0]}."
        )
    config.num_hidden_layers = NUM_ENCODER_LAYERS
    return config


def semantic_codec_settings(original: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `IndexTTS2SemanticCodec` from the original `config.yaml`."""
    codec = original["semantic_codec"]
    return {
        "feature_size": codec["hidden_size"],
        "codebook_size": codec["codebook_size"],
        "codebook_dim": codec["codebook_dim"],
        "hidden_size": codec["vocos_dim"],
        "intermediate_size": codec["vocos_intermediate_dim"],
        "num_layers": codec["vocos_num_layers"],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Speaker encoder: campplus_cn_common.bin
# ---------------------------------------------------------------------------------------------------------------------


def recount_speaker_encoder(key: str) -> str:
    """Blocks and layers, which start at 1 in the original, from 0: `block1.tdnnd12.` is `block.0.tdnnd.11.`."""
    return re.sub(r"\b(block|tdnnd|transit)(\d+)\.", lambda match: f"{match[1]}.{int(match[2]) - 1}.", key)


SPEAKER_ENCODER_TABLE = KeyTable(
    recount=recount_speaker_encoder,
    renames=(
        (r"head\.conv1\.", "head.conv_in."),
        (r"head\.bn1\.", "head.norm_in."),
        *((rf"head\.layer{1 + i // 2}\.{i % 2}\.conv([12])\.", rf"head.blocks.{i}.conv_\1.") for i in range(4)),
        *((rf"head\.layer{1 + i // 2}\.{i % 2}\.bn([12])\.", rf"head.blocks.{i}.norm_\1.") for i in range(4)),
        *((rf"head\.layer{1 + i // 2}\.{i % 2}\.shortcut\.", f"head.blocks.{i}.shortcut.") for i in range(4)),
        (r"head\.conv2\.", "head.conv_out."),
        (r"head\.bn2\.", "head.norm_out."),
        (r"xvector\.tdnn\.linear\.", "conv_in."),
        (r"xvector\.tdnn\.nonlinear\.batchnorm\.", "norm_in."),
        (r"xvector\.block\.(\d+)\.tdnnd\.(\d+)\.nonlinear([12])\.batchnorm\.", r"blocks.\1.layers.\2.norm_\3."),
        (r"xvector\.block\.(\d+)\.tdnnd\.(\d+)\.linear1\.", r"blocks.\1.layers.\2.bottleneck."),
        (r"xvector\.block\.(\d+)\.tdnnd\.(\d+)\.cam_layer\.linear_local\.", r"blocks.\1.layers.\2.masking.conv."),
        (r"xvector\.block\.(\d+)\.tdnnd\.(\d+)\.cam_layer\.linear1\.", r"blocks.\1.layers.\2.masking.gate_in."),
        (r"xvector\.block\.(\d+)\.tdnnd\.(\d+)\.cam_layer\.linear2\.", r"blocks.\1.layers.\2.masking.gate_out."),
        (r"xvector\.transit\.(\d+)\.nonlinear\.batchnorm\.", r"blocks.\1.norm."),
        (r"xvector\.transit\.(\d+)\.linear\.", r"blocks.\1.conv."),
        (r"xvector\.out_nonlinear\.batchnorm\.", "norm_out."),
        (r"xvector\.dense\.linear\.", "projection."),
        (r"xvector\.dense\.nonlinear\.batchnorm\.", "projection_norm."),
    ),
    reshaped=("projection.weight",),
)


def speaker_encoder_settings(original: Mapping[str, Any]) -> dict[str, Any]:
    """
    Arguments of `IndexTTS2SpeakerEncoder` from the original `config.yaml`. The official one has only the size of the
    embedding; the others are those of the release, unless there is a section `campplus`.
    """
    sizes = {"embedding_size": original["s2mel"]["style_encoder"]["dim"], **original.get("campplus", {})}
    names = {
        "feat_dim": "num_mel_bins",
        "embedding_size": "embed_dim",
        "growth_rate": "growth_rate",
        "bn_size": "bottleneck_factor",
        "init_channels": "initial_channels",
    }
    return {ours: sizes[name] for name, ours in names.items() if name in sizes}


# ---------------------------------------------------------------------------------------------------------------------
# Vocoder: bigvgan_generator.pt
# ---------------------------------------------------------------------------------------------------------------------

VOCODER_RENAMES = (
    (r"conv_pre\.", "conv_in."),
    (r"ups\.(\d+)\.0\.", r"stages.\1.upsample."),
    (r"resblocks\.(\d+)\.(\d+)\.convs([12])\.(\d+)\.", r"stages.\1.blocks.\2.layers.\4.conv_\3."),
    (r"resblocks\.(\d+)\.(\d+)\.activations\.(\d+)\.0\.act\.", r"stages.\1.blocks.\2.layers.\3.activation_1.log_"),
    (r"resblocks\.(\d+)\.(\d+)\.activations\.(\d+)\.1\.act\.", r"stages.\1.blocks.\2.layers.\3.activation_2.log_"),
    (r"activation_post\.upsample\.filter$", "filter_taps"),
    (r"activation_post\.act\.", "activation_out.log_"),
    (r"conv_post\.", "conv_out."),
)


def vocoder_table(num_blocks: int) -> KeyTable:
    """The table for that many residual blocks in a stage."""

    def recount(key: str) -> str:
        """Residual blocks by stage and place in it, activations by layer and place in it."""
        key = re.sub(
            r"\bresblocks\.(\d+)\.",
            lambda match: "resblocks.{}.{}.".format(*divmod(int(match[1]), num_blocks)),
            key,
        )
        return re.sub(
            r"\bactivations\.(\d+)\.", lambda match: "activations.{}.{}.".format(*divmod(int(match[1]), 2)), key
        )

    return KeyTable(
        recount=recount,
        renames=VOCODER_RENAMES,
        # The same twelve taps around every activation; ours has them once.
        recomputable=(
            r"resblocks\..*\.(upsample|downsample\.lowpass)\.filter",
            r"activation_post\.downsample\.lowpass\.filter",
        ),
        reshaped=("filter_taps",),
    )


def vocoder_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `IndexTTS2Vocoder` from the `config.json` beside the generator."""
    check_settings(settings, EXPECTED_VOCODER_SETTINGS, "vocoder")
    return {
        "num_mel_bins": settings["num_mels"],
        "initial_channels": settings["upsample_initial_channel"],
        "upsample_rates": settings["upsample_rates"],
        "upsample_kernel_sizes": settings["upsample_kernel_sizes"],
        "resblock_kernel_sizes": settings["resblock_kernel_sizes"],
        "resblock_dilations": settings["resblock_dilation_sizes"],
        "sampling_rate": settings["sampling_rate"],
    }


# ---------------------------------------------------------------------------------------------------------------------
# The whole
# ---------------------------------------------------------------------------------------------------------------------


def feature_extractor_settings(original: Mapping[str, Any], semantic: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `IndexTTS2FeatureExtractor` from the original `config.yaml` and the semantic encoder's own extractor."""
    parameters = original["s2mel"]["preprocess_params"]
    spectrum = parameters["spect_params"]
    semantic = {"feature_extractor_type": "SeamlessM4TFeatureExtractor", **semantic}
    semantic.pop("processor_class", None)
    return {
        "sampling_rate": parameters["sr"],
        "semantic_sampling_rate": semantic["sampling_rate"],
        "num_mel_bins": spectrum["n_mels"],
        "n_fft": spectrum["n_fft"],
        "win_length": spectrum["win_length"],
        "hop_length": spectrum["hop_length"],
        "mel_fmin": float(spectrum["fmin"]),
        # The official file has the word.
        "mel_fmax": None if spectrum["fmax"] in (None, "None") else float(spectrum["fmax"]),
        "semantic_feature_extractor": semantic,
    }


def generation_settings(config: IndexTTS2T2SConfig) -> IndexTTS2GenerationConfig:
    """How the released model generates."""
    return IndexTTS2GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_k=30,
        top_p=0.8,
        num_beams=3,
        repetition_penalty=10.0,
        length_penalty=0.0,
        max_new_tokens=min(1500, config.max_semantic_tokens + 1),
        bos_token_id=config.semantic_start_token_id,
        eos_token_id=config.semantic_stop_token_id,
        pad_token_id=config.semantic_stop_token_id,
        suppress_tokens=[config.semantic_start_token_id],
    )


def build_empty_model(
    original: Mapping[str, Any],
    encoder_settings: Mapping[str, Any],
    extractor_settings: Mapping[str, Any],
    vocoder_file_settings: Mapping[str, Any],
) -> IndexTTS2ForTextToWaveform:
    r"""
    The whole model on the `meta` device: all sizes and no weights.

    Args:
        original (`Mapping[str, Any]`): `config.yaml`.
        encoder_settings, extractor_settings (`Mapping[str, Any]`): `config.json` and `preprocessor_config.json` of w2v-BERT.
        vocoder_file_settings (`Mapping[str, Any]`): `config.json` of BigVGAN.

    Raises:
        ValueError: a setting is missing, asks for another architecture, or does not fit another part.
    """
    check_settings(original, EXPECTED_SETTINGS, "config")
    try:
        t2s_config = IndexTTS2T2SConfig(**t2s_settings(original))
        s2m, codec = s2m_settings(original), semantic_codec_settings(original)
        speaker_encoder, vocoder = speaker_encoder_settings(original), vocoder_settings(vocoder_file_settings)
        extractor = feature_extractor_settings(original, extractor_settings)
        encoder_config = semantic_encoder_config(encoder_settings)
    except StrictDataclassError as error:
        raise ValueError(f"The settings cannot be used: {' '.join(str(error).split())}") from error
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"The settings have no entry {error}, or no section around it. The `config.yaml` of IndexTTS-2 is needed, and the "
            "configurations that come with w2v-BERT 2.0 and BigVGAN."
        ) from error
    with torch.device("meta"):
        t2s = IndexTTS2T2SForConditionalGeneration(t2s_config)
        t2s.generation_config = generation_settings(t2s_config)
        parts = {
            "t2s": t2s,
            "s2m": IndexTTS2SemanticToMelTransformer(**s2m),
            "semantic_encoder": Wav2Vec2BertModel(encoder_config),
            "semantic_codec": IndexTTS2SemanticCodec(**codec),
            "speaker_encoder": IndexTTS2SpeakerEncoder(**speaker_encoder),
            "vocoder": IndexTTS2Vocoder(**vocoder),
        }
    return IndexTTS2ForTextToWaveform(
        IndexTTS2Config(sampling_rate=vocoder["sampling_rate"]),
        scheduler=IndexTTS2FlowMatchScheduler(),
        feature_extractor=IndexTTS2FeatureExtractor(**extractor),
        **parts,
    )


def key_tables(model: IndexTTS2ForTextToWaveform) -> dict[str, KeyTable]:
    """The table of each part, for the sizes of `model`."""
    return {
        "t2s": T2S_TABLE,
        "s2m": s2m_table(model.s2m.config.num_layers),
        "semantic_encoder": SEMANTIC_ENCODER_TABLE,
        "semantic_codec": SEMANTIC_CODEC_TABLE,
        "speaker_encoder": SPEAKER_ENCODER_TABLE,
        "vocoder": vocoder_table(len(model.vocoder.config.resblock_kernel_sizes)),
    }


@dataclass(frozen=True)
class OriginalFiles:
    """Where everything is, all of it there, and the settings among it."""

    settings: dict[str, Any]
    original: dict[str, Path]
    external: dict[str, dict[str, Path]]
    emotion_text: Path | None

    @classmethod
    def find(
        cls, original_folder: Path, external_folders: Mapping[str, Path | None], emotion_text: Path | None
    ) -> "OriginalFiles":
        def in_original(name: str) -> Path:
            if not (original_folder / name).is_file():
                raise FileNotFoundError(
                    f"There is no file '{name}' in '{original_folder}'. The folder of the original checkpoint is needed: "
                    "`hf download IndexTeam/IndexTTS-2 --local-dir FOLDER`."
                )
            return original_folder / name

        settings = read_settings(in_original("config.yaml"))
        names = {
            "gpt_checkpoint": "gpt.pth",
            "s2mel_checkpoint": "s2mel.pth",
            "w2v_stat": "wav2vec2bert_stats.pt",
            "emo_matrix": "feat2.pt",
            "spk_matrix": "feat1.pt",
        }
        names = {name: settings.get(name, default) for name, default in names.items()}
        dataset = settings.get("dataset")
        names["bpe_model"] = dataset.get("bpe_model", "bpe.model") if isinstance(dataset, Mapping) else "bpe.model"
        emotion_text_name = settings.get("qwen_emo_path", "qwen0.6bemo4-merge/")
        is_required = emotion_text is not None
        emotion_text = emotion_text if is_required else original_folder / emotion_text_name
        if not (emotion_text / "config.json").is_file():
            if is_required:
                raise FileNotFoundError(f"There is no language model (`config.json`) in '{emotion_text}'.")
            logger.warning(
                f"There is no '{emotion_text_name}' in '{original_folder}', so the checkpoint will not read emotions from "
                "text. It can be added later, as its folder 'emotion_text'."
            )
            emotion_text = None
        return cls(
            settings=settings,
            original={name: in_original(file_name) for name, file_name in names.items()},
            external={name: find_external(name, folder, original_folder) for name, folder in external_folders.items()},
            emotion_text=emotion_text,
        )

    def read_part(self, name: str) -> tuple[dict[str, torch.Tensor], str]:
        """The original tensors of a part of ours, and where they come from. They are mapped, not read."""
        original, external = self.original, self.external
        if name == "t2s":
            matrices = {matrix: read_pickle(original[matrix]) for matrix in ("spk_matrix", "emo_matrix")}
            for matrix, tensor in matrices.items():
                if not isinstance(tensor, torch.Tensor):
                    raise ValueError(f"'{original[matrix]}' holds no tensor: it is not the original's file.")
            path = original["gpt_checkpoint"]
            return {**read_state(path, "model", is_wrapped=False), **matrices}, f"'{path}'"
        if name == "s2m":
            path = original["s2mel_checkpoint"]
            return read_s2m_state(path), f"'{path}'"
        if name == "semantic_encoder":
            path = external["w2v_bert"]["model.safetensors"]
            return read_state(path), f"'{path}'"
        if name == "semantic_codec":
            path = external["semantic_codec"]["semantic_codec/model.safetensors"]
            statistics = {f"w2v_stat.{key}": tensor for key, tensor in read_state(original["w2v_stat"]).items()}
            return {**read_state(path), **statistics}, f"'{path}' (with '{original['w2v_stat'].name}')"
        if name == "speaker_encoder":
            path = external["speaker_encoder"]["campplus_cn_common.bin"]
            return read_state(path), f"'{path}'"
        path = external["vocoder"]["bigvgan_generator.pt"]
        return read_state(path, "generator"), f"'{path}'"


def convert_original_checkpoint(
    original_folder: str | Path,
    output_folder: str | Path,
    *,
    w2v_bert: str | Path | None = None,
    semantic_codec: str | Path | None = None,
    speaker_encoder: str | Path | None = None,
    vocoder: str | Path | None = None,
    emotion_text: str | Path | None = None,
    default_voice: str | Path | None = None,
) -> None:
    r"""
    Converts the original checkpoint of IndexTTS-2 to a checkpoint folder of this package. Nothing is downloaded.

    All files are found and the names and shapes of all tensors checked before anything is written. Then one part after the
    other is read, converted and written, so that only the largest has to fit into memory. The folder appears at the end:
    a conversion that fails leaves nothing behind.

    Args:
        original_folder (`str` or `Path`):
            Folder with `config.yaml`, `gpt.pth`, `s2mel.pth`, `feat1.pt`, `feat2.pt`, `wav2vec2bert_stats.pt`, `bpe.model` and,
            if emotions are to be read from text, `qwen0.6bemo4-merge/`; under these names or those in `config.yaml`.
        output_folder (`str` or `Path`):
            Folder to write: a new one, or an empty one.
        w2v_bert, semantic_codec, speaker_encoder, vocoder (`str` or `Path`, *optional*):
            Folders with the files of `facebook/w2v-bert-2.0`, `amphion/MaskGCT` (`semantic_codec/model.safetensors`),
            `funasr/campplus` (`campplus_cn_common.bin`) and `nvidia/bigvgan_v2_22khz_80band_256x`. By default they are looked
            for in the original folder, in folders named like the repositories (`w2v-bert-2.0` …), and in the local Hugging
            Face cache.
        emotion_text (`str` or `Path`, *optional*):
            Folder of the language model that reads emotions from text, instead of that in the original folder.
        default_voice (`str` or `Path`, *optional*):
            Recording of the voice that is to speak when none is given; its file name without the ending becomes the name.

    Raises:
        FileExistsError: the output is a file, or a folder that is not empty.
        FileNotFoundError: a file is missing; the message says where to get it and which argument names its folder.
        ValueError: a file is damaged or holds more than weights; a tensor is unknown, missing or of the wrong shape; a
            setting asks for another architecture.
    """
    original_folder, output_folder = Path(original_folder), Path(output_folder)
    if output_folder.is_file() or (output_folder.is_dir() and any(output_folder.iterdir())):
        raise FileExistsError(f"'{output_folder}' is there already and is not an empty folder. Name a new one.")
    given = {
        "w2v_bert": w2v_bert,
        "semantic_codec": semantic_codec,
        "speaker_encoder": speaker_encoder,
        "vocoder": vocoder,
    }
    files = OriginalFiles.find(
        original_folder,
        {name: None if folder is None else Path(folder) for name, folder in given.items()},
        None if emotion_text is None else Path(emotion_text),
    )
    model = build_empty_model(
        files.settings,
        encoder_settings=read_settings(files.external["w2v_bert"]["config.json"]),
        extractor_settings=read_settings(files.external["w2v_bert"]["preprocessor_config.json"]),
        vocoder_file_settings=read_settings(files.external["vocoder"]["config.json"]),
    )
    tokenizer = IndexTTS2Tokenizer(str(files.original["bpe_model"]))
    if tokenizer.vocab_size > model.t2s.config.text_vocab_size:
        logger.warning(
            f"'{files.original['bpe_model']}' has {tokenizer.vocab_size} pieces but the text embedding has "
            f"{model.t2s.config.text_vocab_size} rows: pieces beyond them cannot be spoken."
        )
    for name, _ in convert_parts(files, model, on_meta=True):
        logger.info(f"The original has all tensors of `{name}`.")

    output_folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_folder.parent, prefix=f".{output_folder.name}-") as temporary:
        folder = Path(temporary) / output_folder.name
        for name, tensors in convert_parts(files, model):
            part = getattr(model, name)
            part.load_state_dict(tensors, assign=True)
            part.save_pretrained(folder / name)
            # One part in memory at a time.
            part.to("meta")
            tensors.clear()
        if files.emotion_text is not None:
            shutil.copytree(files.emotion_text, folder / "emotion_text", ignore=shutil.ignore_patterns(".*"))
        IndexTTS2Processor(model.feature_extractor, tokenizer).save_pretrained(folder)
        model.feature_extractor.save_pretrained(folder / "feature_extractor")
        model.scheduler.save_pretrained(folder / "scheduler")
        model.semantic_to_mel.save_config(folder)  # model_index.json
        model.generation_config.save_pretrained(folder)
        if default_voice is not None:
            model.config.default_voice = save_voice(folder, Path(default_voice))
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        write_model_card(folder, name=output_folder.name, is_converted=True)
        if output_folder.is_dir():
            output_folder.rmdir()
        folder.rename(output_folder)


def convert_parts(
    files: OriginalFiles, model: IndexTTS2ForTextToWaveform, on_meta: bool = False
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Names and converted tensors of the parts of `model`, one after the other; `on_meta` only their names and shapes."""
    tables = key_tables(model)
    for name in tqdm(tables, desc="Checking" if on_meta else "Converting", unit="part"):
        state, source = files.read_part(name)
        if on_meta:
            state = {key: tensor.to("meta") for key, tensor in state.items()}
        shapes = {key: tensor.shape for key, tensor in getattr(model, name).state_dict().items()}
        yield name, convert_tensors(state, tables[name], shapes, source)


def save_voice(folder: Path, recording: Path) -> str:
    """Makes a voice of a recording, saves it in the checkpoint `folder`, and gives its name."""
    pipeline = IndexTTS2SemanticToMelPipeline.from_pretrained(folder)
    voice = pipeline.encode_voice(recording)
    (folder / "voices").mkdir()
    voice.save(folder / "voices" / f"{recording.stem}.safetensors")
    return recording.stem


__all__ = ["convert_original_checkpoint"]
