"""
Configuration of IndexTTS2: the whole model and its text-to-semantic transformer; and where the checkpoint of the package is.

The semantic-to-mel transformer, the codec, the speaker encoder and the vocoder are diffusers models: their constructors
are their configuration. Nothing here knows about them.
"""

import difflib
import os
from dataclasses import fields
from importlib import resources
from pathlib import Path

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import logging


logger = logging.get_logger(__name__)

# The name of the checkpoint that comes with the package, wherever one is asked for.
EMBEDDED_NAME = "tiny"

# Keys beside a config's own fields that transformers, PEFT and the Hub write into `config.json`.
_FOREIGN_KEYS = {
    "attn_implementation",
    "auto_map",
    "custom_pipelines",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "per_layer_config",
    "quantization_config",
    "torch_dtype",
}


def embedded_checkpoint() -> Path:
    """The folder of the small checkpoint that comes with the package."""
    return Path(str(resources.files(__package__) / "embedded"))


def resolve_checkpoint(name: str | os.PathLike | None) -> str:
    """
    Where a checkpoint is: the folder of the package for `"tiny"` and `None`, anything else as it is given. The name goes before a
    folder `tiny` in the current directory, which is meant by `"./tiny"` or by a `Path`.
    """
    if name is not None and name != EMBEDDED_NAME:
        return os.path.join(os.curdir, EMBEDDED_NAME) if str(name) == EMBEDDED_NAME else os.fspath(name)
    if name is not None and os.path.isdir(EMBEDDED_NAME):
        logger.warning(
            f"{EMBEDDED_NAME!r} is the checkpoint of the package; the folder of that name is './{EMBEDDED_NAME}'."
        )
    return str(embedded_checkpoint())


def lasting_name(name: str) -> str:
    """
    The name of a checkpoint by which it is found from any folder: `"tiny"` for the one of the package, the absolute path of
    another folder, a repository as it is.
    """
    if name == EMBEDDED_NAME or not os.path.isdir(name):
        return name
    is_embedded = os.path.realpath(name) == os.path.realpath(embedded_checkpoint())
    return EMBEDDED_NAME if is_embedded else os.path.abspath(name)


def check_keys(config: PreTrainedConfig, keys: list[str]) -> None:
    """Raises a `ValueError` that names the keys which are neither fields of `config` nor written by the libraries."""
    known = {field.name for field in fields(config)}
    allowed = known | _FOREIGN_KEYS | set(GenerationConfig._get_default_generation_params())
    unknown = [key for key in keys if key not in allowed and not key.startswith("_")]
    if unknown:
        hints = dict.fromkeys(hint for key in unknown for hint in difflib.get_close_matches(key, known, n=1))
        raise ValueError(
            f"{type(config).__name__} has no field {', '.join(map(repr, unknown))}."
            + (f" Did you mean {', '.join(map(repr, hints))}?" if hints else "")
            + " Correct `config.json`, or update indextts2-hf if a newer version wrote it."
        )


@strict
class IndexTTS2T2SConfig(PreTrainedConfig):
    r"""
    Configuration of [`IndexTTS2T2SForConditionalGeneration`]. The defaults are those of the released checkpoint.

    Args:
        hidden_size (`int`, defaults to 1280):
            Width of the GPT-2 trunk, of the speaker latents and of the emotion vector.
        num_hidden_layers (`int`, defaults to 24):
            Number of GPT-2 blocks.
        num_attention_heads (`int`, defaults to 20):
            Attention heads per GPT-2 block.
        activation_function (`str`, defaults to `"gelu_new"`):
            Activation of the GPT-2 feed-forward layers.
        layer_norm_epsilon (`float`, defaults to 1e-5):
            Epsilon of every layer norm of the trunk and of the conformers.
        attn_pdrop, resid_pdrop, embd_pdrop (`float`, defaults to 0.1):
            Dropout probabilities of the trunk: attention weights, residual branches, input embeddings.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of newly made weights.
        use_cache (`bool`, defaults to `True`):
            Whether `forward` returns its key/value cache when it is not told otherwise.
        text_vocab_size (`int`, defaults to 12001):
            Rows of the text embedding.
        max_text_tokens (`int`, defaults to 600):
            Most text tokens in one segment, start and stop not counted.
        text_start_token_id, text_stop_token_id (`int`, defaults to 0 and 1):
            Ids the model puts around the text. They are dropped where they stand inside a text.
        semantic_vocab_size (`int`, defaults to 8194):
            Semantic ids, start and stop included.
        max_semantic_tokens (`int`, defaults to 1815):
            Most semantic tokens in one segment, start and stop not counted.
        semantic_start_token_id, semantic_stop_token_id (`int`, defaults to 8192 and 8193):
            Ids around the semantic tokens. The start id is never sampled.
        semantic_token_rate (`float`, defaults to 50.0):
            Semantic tokens per second of speech.
        feature_size (`int`, defaults to 1024):
            Width of `speaker_features` and `emotion_features`.
        speaker_embed_dim (`int`, defaults to 192):
            Width of `speaker_embeds`, by which the emotion prototypes are chosen.
        speaker_num_latents (`int`, defaults to 32):
            Rows of the speaker prefix.
        speaker_conformer_hidden_size, speaker_conformer_intermediate_size, speaker_conformer_num_layers, speaker_conformer_num_heads
            (`int`, defaults to 512, 2048, 6 and 8):
            Sizes of the speaker conformer. The perceiver behind it has the same number of heads, 64 wide each.
        emotion_conformer_hidden_size, emotion_conformer_intermediate_size, emotion_conformer_num_layers, emotion_conformer_num_heads
            (`int`, defaults to 512, 1024, 4 and 4):
            Sizes of the emotion conformer, likewise.
        perceiver_mult (`int`, defaults to 2):
            The perceivers' feed-forward width is two thirds of this multiple of their width.
        emotion_prototype_counts (`list[int]`, defaults to `[3, 17, 2, 8, 4, 5, 10, 24]`):
            Stored prototypes of each of the eight emotions.
        use_length_row (`bool`, defaults to `False`):
            What the first of the two extra prefix slots holds. `True`: the row of the semantic position table whose index is
            the asked number of tokens, zeros when the length is free (the paper, section 3.1.1; models trained here).
            `False`: a fixed learnt row (the released checkpoint).
        natural_semantic_tokens (`list[float]`, *optional*):
            Two numbers: a segment of `n` text tokens is about the first plus `n` times the second semantic tokens long where its
            length is free. With it a duration that is too short for its words is refused, and one that is too long is padded.
            Fitted by `training/train_t2s.py`.
        skip_semantic_position_one (`bool`, defaults to `True`):
            Whether cached decoding goes from position 0 to position 2 (a property of the released checkpoint; `False` for
            models trained here).
        prefix_placeholder_token_id (`int`, defaults to 1):
            The semantic id that stands for the prefix rows in logits processors. With 1, a repetition penalty keeps its
            effect on code 1 in the released checkpoint; models trained here use `semantic_start_token_id`.
        text_loss_weight (`float`, defaults to 0.01):
            Weight of the text cross-entropy in the loss; the semantic cross-entropy has weight 1.
        text_recognizer_size (`int`, defaults to 0):
            Width of the recogniser that reads semantic tokens back as text, by which generation chooses among candidates; 0 for
            none (the released checkpoint).
    """

    model_type = "indextts2_t2s"
    # The cache, by its name before transformers 5.24 and since.
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {"vocab_size": "semantic_vocab_size"}

    # Switches of the stock GPT-2 block that no IndexTTS2 checkpoint changes.
    n_inner = None
    add_cross_attention = False
    scale_attn_weights = True
    scale_attn_by_inverse_layer_idx = False
    reorder_and_upcast_attn = False

    hidden_size: int = 1280
    num_hidden_layers: int = 24
    num_attention_heads: int = 20
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    attn_pdrop: float | int = 0.1
    resid_pdrop: float | int = 0.1
    embd_pdrop: float | int = 0.1
    initializer_range: float = 0.02
    use_cache: bool = True
    text_vocab_size: int = 12001
    max_text_tokens: int = 600
    text_start_token_id: int = 0
    text_stop_token_id: int = 1
    semantic_vocab_size: int = 8194
    max_semantic_tokens: int = 1815
    semantic_start_token_id: int = 8192
    semantic_stop_token_id: int = 8193
    semantic_token_rate: float = 50.0
    feature_size: int = 1024
    speaker_embed_dim: int = 192
    speaker_num_latents: int = 32
    speaker_conformer_hidden_size: int = 512
    speaker_conformer_intermediate_size: int = 2048
    speaker_conformer_num_layers: int = 6
    speaker_conformer_num_heads: int = 8
    emotion_conformer_hidden_size: int = 512
    emotion_conformer_intermediate_size: int = 1024
    emotion_conformer_num_layers: int = 4
    emotion_conformer_num_heads: int = 4
    perceiver_mult: int = 2
    emotion_prototype_counts: list[int] | tuple[int, ...] = (3, 17, 2, 8, 4, 5, 10, 24)
    use_length_row: bool = False
    natural_semantic_tokens: list[float] | tuple[float, ...] | None = None
    skip_semantic_position_one: bool = True
    prefix_placeholder_token_id: int = 1
    text_loss_weight: float = 0.01
    text_recognizer_size: int = 0
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        check_keys(self, list(kwargs))
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        # An adapter names the whole checkpoint as its base, and PEFT looks for this configuration there.
        config_dict, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") == IndexTTS2Config.model_type:
            return super().get_config_dict(pretrained_model_name_or_path, **(kwargs | {"subfolder": "t2s"}))
        return config_dict, unused

    @property
    def num_prefix_slots(self) -> int:
        """Rows before the text: the speaker latents and the two extra slots."""
        return self.speaker_num_latents + 2

    @property
    def num_text_positions(self) -> int:
        """Rows of the text position table: the text with its start and stop tokens."""
        return self.max_text_tokens + 2

    @property
    def num_semantic_positions(self) -> int:
        """Rows of the semantic position table: start, tokens, stop and one spare row of the released checkpoint."""
        return self.max_semantic_tokens + 3

    def validate_architecture(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` ({self.num_attention_heads})."
            )
        for name in ("speaker", "emotion"):
            width, heads = (getattr(self, f"{name}_conformer_{field}") for field in ("hidden_size", "num_heads"))
            if width % heads or width % 2:
                raise ValueError(
                    f"`{name}_conformer_hidden_size` ({width}) must be even and a multiple of `{name}_conformer_num_heads` ({heads})."
                )
        for name in ("semantic_start_token_id", "semantic_stop_token_id", "prefix_placeholder_token_id"):
            if not 0 <= getattr(self, name) < self.semantic_vocab_size:
                raise ValueError(
                    f"`{name}` ({getattr(self, name)}) must lie in the semantic vocabulary of {self.semantic_vocab_size} ids."
                )
        natural = self.natural_semantic_tokens
        if natural is not None and (len(natural) != 2 or not (natural[0] >= 0 and natural[1] > 0)):
            raise ValueError(
                f"`natural_semantic_tokens` is {list(natural)}, but it must be two numbers, at least 0 and above 0, or `None`."
            )
        if self.text_recognizer_size < 0:
            raise ValueError(
                f"`text_recognizer_size` is {self.text_recognizer_size}, but it must be a width, or 0 for no recogniser."
            )
        if len(self.emotion_prototype_counts) != 8 or min(self.emotion_prototype_counts) < 1:
            raise ValueError(
                "`emotion_prototype_counts` must hold eight positive counts, one for each emotion, "
                f"but it is {list(self.emotion_prototype_counts)}."
            )


@strict
class IndexTTS2Config(PreTrainedConfig):
    r"""
    Configuration of [`IndexTTS2ForTextToWaveform`]: what belongs to the checkpoint as a whole. Every part keeps its own
    configuration in its own folder.

    Args:
        sampling_rate (`int`, defaults to 22050):
            Sampling rate of the generated speech, in Hz.
        default_voice (`str`, *optional*):
            Name of the voice in the checkpoint's `voices` folder that speaks when no voice is given.
        default_emotion (`str`, *optional*):
            Name of the voice in that folder whose emotion a voice from a recording speaks with where no other is asked for.
            By default it is the recording's own, as in the released checkpoint. A small model follows the manner of a
            recording that it has not learnt from at the price of words.
    """

    model_type = "indextts2"

    sampling_rate: int = 22050
    default_voice: str | None = None
    default_emotion: str | None = None

    def __post_init__(self, **kwargs):
        check_keys(self, list(kwargs))
        super().__post_init__(**kwargs)


__all__ = ["IndexTTS2Config", "IndexTTS2T2SConfig", "embedded_checkpoint"]
