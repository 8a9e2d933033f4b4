"""
The text-to-semantic transformer (T2S): condition encoders (conformer and perceiver, for the speaker and for the emotion),
a GPT-2 trunk of stock transformers blocks, text and semantic heads, the emotion prototypes, the loss, and the recogniser of its
tokens.

It knows text ids and semantic features; it does not know text, waveforms, mels or the semantic codec. How tokens are
chosen is in `generation_t2s.py`.

Source: IndexTTS2 paper (arXiv 2506.21619), section 3.1.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Block
from transformers.pytorch_utils import Conv1D
from transformers.utils import (
    can_return_tuple,
    check_peft_version,
    find_adapter_config_file,
    is_peft_available,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_indextts2 import IndexTTS2T2SConfig, lasting_name
from .generation_t2s import (
    CACHE_NAME,
    IndexTTS2GenerationConfig,
    IndexTTS2GenerationMixin,
    check_num_semantic_tokens,
    one_cache,
)


# The linear layers that a LoRA adapter of this model should target.
LORA_TARGET_MODULES = ["c_attn", "c_proj", "c_fc"]

# What an adapter must have like the one whose place it takes.
_ALIKE_IN_A_SWAP = (
    "peft_type",
    "r",
    "lora_alpha",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
)

# Weights of each projection that a fingerprint looks at.
_FINGERPRINT_SAMPLES = 256

# Fixed in every IndexTTS2 checkpoint.
_CONFORMER_KERNEL_SIZE = 15
_PERCEIVER_NUM_LAYERS = 2
_PERCEIVER_HEAD_DIM = 64
# Of the recogniser, which so sees 19 tokens to either side.
_RECOGNIZER_KERNEL_SIZE = 3
_RECOGNIZER_DILATIONS = (1, 2, 4, 8, 1, 2, 1)


@dataclass
class IndexTTS2T2SOutput(CausalLMOutputWithPast):
    r"""
    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*):
            `semantic_loss + text_loss_weight * text_loss`, when `labels` are given.
        semantic_loss, text_loss (`torch.FloatTensor` of shape `()`, *optional*):
            Cross-entropy per token in nats, the stop token counted: the mean of each row's own mean (paper, equation of
            section 3.1), which does not depend on the rows beside it.
        logits (`torch.FloatTensor` of shape `(batch_size, num_rows, semantic_vocab_size)`):
            Semantic logits. Row 0 belongs to the start token and predicts the first code.
        text_logits (`torch.FloatTensor` of shape `(batch_size, text_length + 2, text_vocab_size)`, *optional*):
            Text logits of the rows start, text, stop (right-padded), when `labels` are given.
        emotion_embeds (`torch.FloatTensor` of shape `(batch_size, hidden_size)`, *optional*):
            The emotion vectors that were used, when there were any.
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, num_rows, hidden_size)`):
            Normalised states of the rows of `logits`. Without the last row they are the `t2s_hidden_states` of the codes:
            row `i` is the state from which code `i` is predicted.
        cache (`Cache`, *optional*):
            Key/value cache of the trunk. Before transformers 5.24 its name is `past_key_values`.
        hidden_states, attentions (`tuple(torch.FloatTensor)`, *optional*):
            States and attention weights of the trunk's blocks, when asked for.
    """

    semantic_loss: torch.FloatTensor | None = None
    text_loss: torch.FloatTensor | None = None
    text_logits: torch.FloatTensor | None = None
    emotion_embeds: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None


def sinusoidal_positions(length: int, size: int, device: torch.device) -> torch.Tensor:
    """Table of sines (even channels) and cosines (odd channels) of shape `(length, size)`, in float32."""
    positions = torch.arange(length, dtype=torch.float32, device=device)[:, None]
    rates = torch.exp(torch.arange(0, size, 2, dtype=torch.float32, device=device) * -(math.log(10000.0) / size))
    return torch.stack([torch.sin(positions * rates), torch.cos(positions * rates)], dim=-1).flatten(1)


def mean_cross_entropy(logits: torch.Tensor, targets: torch.LongTensor) -> torch.Tensor:
    """
    Mean over rows of the mean over each row's own targets, those of -100 left out: `(batch_size, length, vocab_size)` and
    `(batch_size, length)` to `()`.
    """
    losses = F.cross_entropy(logits.transpose(1, 2).float(), targets, ignore_index=-100, reduction="none")
    return (losses.sum(dim=1) / (targets != -100).sum(dim=1)).mean()


def _check_peft() -> None:
    """
    Raises:
        ImportError: PEFT is not installed, or is older than the installed transformers asks for.
    """
    way_out = '`pip install "indextts2-hf[train]"` installs versions that work together. Only adapters need PEFT.'
    if not is_peft_available():
        raise ImportError(f"An adapter needs PEFT, which is not installed: {way_out}")
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        raise ImportError(
            f"Adapters do not work with these two versions: transformers {transformers.__version__} asks for PEFT "
            f"{MIN_PEFT_VERSION} or newer, but PEFT {version('peft')} is installed: {way_out}"
        ) from error


def _read_adapter_settings(
    peft_model_id: str | None = None,
    peft_config: Any = None,
    adapter_kwargs: dict[str, Any] | None = None,
    local_files_only: bool = False,
    **kwargs: Any,
) -> dict[str, Any]:
    """The configuration of an adapter, from the arguments of `load_adapter`; empty if there is none."""
    if peft_config is not None:
        return peft_config.to_dict()
    download = {**({"local_files_only": True} if local_files_only else {}), **(adapter_kwargs or {})}
    path = find_adapter_config_file(peft_model_id, **download)
    if path is None:
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """Those settings of an adapter that a swap keeps."""
    values = {name: settings.get(name) for name in _ALIKE_IN_A_SWAP}
    return {name: sorted(value) if isinstance(value, list | set) else value for name, value in values.items()}


class ConvSubsampling(nn.Module):
    """Halves the frame rate: a 3x3 convolution of stride 2 over time and features, then a projection."""

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.conv = nn.Conv2d(1, hidden_size, kernel_size=3, stride=2)
        self.linear = nn.Linear(hidden_size * ((input_size - 1) // 2), hidden_size)
        self.scale = math.sqrt(hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        # Piece by piece: the convolution of a whole clip of 15 s takes 0.4 GB.
        num_steps, size = (features.shape[1] - 1) // 2, 64
        pieces = []
        for start in range(0, num_steps, size):
            hidden_states = F.relu(self.conv(features[:, None, 2 * start : 2 * (start + size) + 1]))
            pieces.append(self.linear(hidden_states.transpose(1, 2).flatten(2)))
        return torch.cat(pieces, dim=1) * self.scale


class ConformerAttention(nn.Module):
    """Self-attention with a learnt bias and a position term. The term depends on the key's absolute position alone."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.position_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.content_bias = nn.Parameter(torch.zeros(num_heads, self.head_dim))
        self.position_bias = nn.Parameter(torch.zeros(num_heads, self.head_dim))

    def forward(self, hidden_states: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        batch_size, length, _ = hidden_states.shape
        shape = (batch_size, length, self.num_heads, self.head_dim)
        query = self.q_proj(hidden_states).view(shape)
        key = self.k_proj(hidden_states).view(shape)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        position = self.position_proj(positions).view(1, length, self.num_heads, self.head_dim).expand(shape)

        # (q + u) k + (q + v) p is one product of twice the width. Parity: without the relative shift.
        query = torch.cat([query + self.content_bias, query + self.position_bias], dim=-1).transpose(1, 2)
        key = torch.cat([key, position], dim=-1).transpose(1, 2)
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=None if mask is None else mask[:, None, None], scale=self.head_dim**-0.5
        )
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class ConformerConvolution(nn.Module):
    """Gated depthwise convolution over time."""

    def __init__(self, hidden_size: int, layer_norm_epsilon: float):
        super().__init__()
        self.pointwise_conv1 = nn.Conv1d(hidden_size, 2 * hidden_size, kernel_size=1)
        self.depthwise_conv = nn.Conv1d(
            hidden_size,
            hidden_size,
            kernel_size=_CONFORMER_KERNEL_SIZE,
            padding=(_CONFORMER_KERNEL_SIZE - 1) // 2,
            groups=hidden_size,
        )
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_epsilon)
        self.pointwise_conv2 = nn.Conv1d(hidden_size, hidden_size, kernel_size=1)

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        hidden_states = F.glu(self.pointwise_conv1(hidden_states.transpose(1, 2)), dim=1)
        if mask is not None:
            # The original zeroes before the first convolution, whose bias then leaks from padding into valid frames.
            hidden_states = hidden_states * mask[:, None]
        hidden_states = self.depthwise_conv(hidden_states)
        hidden_states = F.silu(self.norm(hidden_states.transpose(1, 2))).transpose(1, 2)
        return self.pointwise_conv2(hidden_states).transpose(1, 2)


class ConformerLayer(GradientCheckpointingLayer):
    """Attention, convolution, feed-forward, each with a norm before it, and a norm after all."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_heads: int, layer_norm_epsilon: float):
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size, eps=layer_norm_epsilon)
        self.attention = ConformerAttention(hidden_size, num_heads)
        self.convolution_norm = nn.LayerNorm(hidden_size, eps=layer_norm_epsilon)
        self.convolution = ConformerConvolution(hidden_size, layer_norm_epsilon)
        self.feed_forward_norm = nn.LayerNorm(hidden_size, eps=layer_norm_epsilon)
        self.up_proj = nn.Linear(hidden_size, intermediate_size)
        self.down_proj = nn.Linear(intermediate_size, hidden_size)
        self.final_norm = nn.LayerNorm(hidden_size, eps=layer_norm_epsilon)

    def forward(self, hidden_states: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states), positions, mask)
        hidden_states = hidden_states + self.convolution(self.convolution_norm(hidden_states), mask)
        hidden_states = hidden_states + self.down_proj(F.silu(self.up_proj(self.feed_forward_norm(hidden_states))))
        return self.final_norm(hidden_states)


class Conformer(nn.Module):
    """Conformer encoder at half the frame rate of its input."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_layers: int,
        num_heads: int,
        layer_norm_epsilon: float,
    ):
        super().__init__()
        self.subsampling = ConvSubsampling(input_size, hidden_size)
        self.layers = nn.ModuleList(
            [ConformerLayer(hidden_size, intermediate_size, num_heads, layer_norm_epsilon) for _ in range(num_layers)]
        )
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_epsilon)

    def forward(
        self, features: torch.Tensor, lengths: torch.LongTensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            features (`torch.Tensor` of shape `(batch_size, num_frames, input_size)`): at least 3 frames.
            lengths (`torch.LongTensor` of shape `(batch_size,)`, *optional*): valid frames; all by default.

        Returns:
            `(batch_size, (num_frames - 1) // 2, hidden_size)` and the mask of its valid frames, `None` if all are.
        """
        hidden_states = self.subsampling(features)
        mask = None
        if lengths is not None:
            steps = torch.arange(hidden_states.shape[1], device=features.device)
            mask = steps < ((lengths - 1) // 2)[:, None]
        positions = sinusoidal_positions(*hidden_states.shape[1:], hidden_states.device).to(hidden_states.dtype)
        for layer in self.layers:
            hidden_states = layer(hidden_states, positions, mask)
        return self.norm(hidden_states), mask


class PerceiverLayer(GradientCheckpointingLayer):
    """Latents look at the context and at themselves; gated feed-forward. No norms inside."""

    def __init__(self, size: int, num_heads: int, intermediate_size: int):
        super().__init__()
        self.num_heads = num_heads
        inner_size = num_heads * _PERCEIVER_HEAD_DIM
        self.q_proj = nn.Linear(size, inner_size, bias=False)
        self.kv_proj = nn.Linear(size, 2 * inner_size, bias=False)
        self.out_proj = nn.Linear(inner_size, size, bias=False)
        self.up_proj = nn.Linear(size, 2 * intermediate_size)
        self.down_proj = nn.Linear(intermediate_size, size)

    def forward(self, latents: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        query = self.q_proj(latents).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key, value = (
            states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for states in self.kv_proj(torch.cat([latents, context], dim=1)).chunk(2, dim=-1)
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        latents = latents + self.out_proj(attended.transpose(1, 2).flatten(2))
        content, gate = self.up_proj(latents).chunk(2, dim=-1)
        return latents + self.down_proj(content * F.gelu(gate))


class PerceiverResampler(nn.Module):
    """Sums up a sequence of any length in a fixed number of latents."""

    def __init__(self, context_size: int, size: int, num_latents: int, num_heads: int, mult: int):
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(num_latents, size))
        self.context_proj = nn.Linear(context_size, size)
        intermediate_size = int(size * mult * 2 / 3)
        self.layers = nn.ModuleList(
            [PerceiverLayer(size, num_heads, intermediate_size) for _ in range(_PERCEIVER_NUM_LAYERS)]
        )
        self.gamma = nn.Parameter(torch.ones(size))

    def forward(self, context: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """`(batch_size, num_frames, context_size)` to `(batch_size, num_latents, size)`; `mask` is that of the frames."""
        context = self.context_proj(context)
        # Whole copies, not views: torch multiplies a view another way if the weights are frozen, as they are under an adapter
        # even when it is disabled, and the last bits would differ.
        latents = self.latents.repeat(context.shape[0], 1, 1)
        if mask is not None:
            mask = F.pad(mask, (latents.shape[1], 0), value=True)[:, None, None]
        for layer in self.layers:
            latents = layer(latents, context, mask)
        return F.normalize(latents, dim=-1) * math.sqrt(latents.shape[-1]) * self.gamma


class EmotionPrototypes(nn.Module):
    """
    Stored emotion vectors of several speakers for each of the eight emotions. Of every emotion, the one is used whose speaker
    sounds most like the voice.
    """

    def __init__(self, counts: list[int], speaker_embed_dim: int, hidden_size: int):
        super().__init__()
        self.counts = list(counts)
        self.speaker_embeds = nn.Buffer(torch.zeros(sum(counts), speaker_embed_dim))
        self.emotion_embeds = nn.Buffer(torch.zeros(sum(counts), hidden_size))

    def nearest(self, speaker_embeds: torch.Tensor) -> torch.LongTensor:
        """Row of each emotion's nearest speaker, by cosine: `(batch_size, speaker_embed_dim)` to `(batch_size, 8)`."""
        similarity = F.cosine_similarity(speaker_embeds.float()[:, None], self.speaker_embeds.float()[None], dim=-1)
        starts = [sum(self.counts[:index]) for index in range(len(self.counts))]
        groups = similarity.split(self.counts, dim=-1)
        return torch.stack([group.argmax(dim=-1) + start for group, start in zip(groups, starts, strict=True)], dim=-1)

    def forward(self, emotion_weights: torch.Tensor, speaker_embeds: torch.Tensor) -> torch.Tensor:
        """Weighted sum of the nearest prototypes, `(batch_size, hidden_size)`."""
        prototypes = self.emotion_embeds[self.nearest(speaker_embeds)]
        return (emotion_weights.to(prototypes.dtype)[..., None] * prototypes).sum(dim=1)


class TextRecognizer(nn.Module):
    r"""
    Reads semantic tokens back as text: gated convolutions over time and connectionist temporal classification (CTC, Graves et al.
    2006). By it generation chooses among candidates. Optional, and not from the paper.

    Args:
        config ([`IndexTTS2T2SConfig`]): of the transformer it belongs to; `text_recognizer_size` is its width.
    """

    def __init__(self, config: IndexTTS2T2SConfig):
        super().__init__()
        size = config.text_recognizer_size
        self.embedding = nn.Embedding(config.semantic_vocab_size, size)
        self.norms = nn.ModuleList([nn.LayerNorm(size) for _ in _RECOGNIZER_DILATIONS])
        self.convs = nn.ModuleList(
            [
                nn.Conv1d(
                    size,
                    2 * size,
                    _RECOGNIZER_KERNEL_SIZE,
                    padding=dilation * (_RECOGNIZER_KERNEL_SIZE // 2),
                    dilation=dilation,
                )
                for dilation in _RECOGNIZER_DILATIONS
            ]
        )
        self.blank_id = config.text_vocab_size
        self.head = nn.Linear(size, config.text_vocab_size + 1)

    def forward(
        self,
        semantic_ids: torch.LongTensor,
        num_semantic_tokens: torch.LongTensor,
        text_ids: torch.LongTensor,
        num_text_tokens: torch.LongTensor,
    ) -> torch.Tensor:
        r"""
        How well the text can be read from the codes.

        Args:
            semantic_ids (`torch.LongTensor` of shape `(batch_size, length)`): codes; any id of the vocabulary behind the end.
            num_semantic_tokens (`torch.LongTensor` of shape `(batch_size,)`): codes of each row.
            text_ids (`torch.LongTensor` of shape `(batch_size, text_length)`): without start and stop; any id behind the end.
            num_text_tokens (`torch.LongTensor` of shape `(batch_size,)`): pieces of each text.

        Returns:
            `torch.Tensor` of shape `(batch_size,)`: log-probability of each text divided by its pieces, in nats; minus infinity where
            there are too few codes for it.
        """
        log_probs = self.log_probs(semantic_ids, num_semantic_tokens)
        return self.text_log_probs(log_probs, num_semantic_tokens, text_ids, num_text_tokens)

    def log_probs(self, semantic_ids: torch.LongTensor, num_semantic_tokens: torch.LongTensor) -> torch.Tensor:
        """
        Log-probabilities of the pieces of the text at each code, the blank last: `(batch_size, length, text_vocab_size + 1)`,
        float32; the arguments as for `forward`.
        """
        steps = torch.arange(semantic_ids.shape[1], device=semantic_ids.device)
        hidden_states = self.embedding(semantic_ids)
        mask = (steps < num_semantic_tokens[:, None])[..., None].to(hidden_states.dtype)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            seen = (norm(hidden_states) * mask).transpose(1, 2)
            hidden_states = hidden_states + F.glu(conv(seen), dim=1).transpose(1, 2)
        return self.head(hidden_states).float().log_softmax(dim=-1)

    def text_log_probs(
        self,
        log_probs: torch.Tensor,
        num_semantic_tokens: torch.LongTensor,
        text_ids: torch.LongTensor,
        num_text_tokens: torch.LongTensor,
    ) -> torch.Tensor:
        """What `forward` returns, from what `log_probs` does."""
        if log_probs.device.type == "mps":  # torch has no CTC there
            log_probs = log_probs.cpu()
        losses = F.ctc_loss(
            log_probs.transpose(0, 1),
            text_ids.to(log_probs.device),
            num_semantic_tokens.to(log_probs.device),
            num_text_tokens.to(log_probs.device),
            blank=self.blank_id,
            reduction="none",
        )
        return -losses.to(num_text_tokens.device) / num_text_tokens.clamp(min=1)


class SlotEmbedding(nn.Embedding):
    """The learnt rows between the voice and the text. They start as zeros."""


class IndexTTS2T2SPreTrainedModel(PreTrainedModel):
    config: IndexTTS2T2SConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GPT2Block", "ConformerLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": GPT2Block,
        "attentions": OutputRecorder(GPT2Attention, index=1),
    }

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # The stock check reads this file, finds the conformers' attention, and would refuse for the trunk's as well.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        # Only modules with weights of their own come here: outside transformers the library leaves out all others.
        if isinstance(module, Conv1D):
            # GPT-2: residual branches start smaller, by the square root of their number. Their last layers do not widen.
            is_residual = module.weight.shape[0] >= module.weight.shape[1]
            num_branches = 2 * self.config.num_hidden_layers if is_residual else 1
            init.normal_(module.weight, mean=0.0, std=std / math.sqrt(num_branches))
            init.zeros_(module.bias)
        elif isinstance(module, ConformerAttention):
            init.normal_(module.content_bias, mean=0.0, std=std)
            init.normal_(module.position_bias, mean=0.0, std=std)
        elif isinstance(module, PerceiverResampler):
            init.normal_(module.latents, mean=0.0, std=std)
            init.ones_(module.gamma)
        elif isinstance(module, EmotionPrototypes):
            init.zeros_(module.speaker_embeds)
            init.zeros_(module.emotion_embeds)
        elif isinstance(module, SlotEmbedding):
            init.zeros_(module.weight)


class IndexTTS2T2SModel(IndexTTS2T2SPreTrainedModel):
    """The trunk: GPT-2 blocks over embeddings that already hold their positions, and two norms in series."""

    main_input_name = "inputs_embeds"

    def __init__(self, config: IndexTTS2T2SConfig):
        super().__init__(config)
        self.dropout = nn.Dropout(config.embd_pdrop)
        self.layers = nn.ModuleList([GPT2Block(config, layer_idx=index) for index in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        r"""
        Args:
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`):
                Rows to read, with their position embeddings.
            attention_mask (`torch.Tensor` of shape `(batch_size, past_length + sequence_length)`, *optional*):
                1 for rows that may be seen.
            cache, past_key_values (`Cache`, *optional*):
                Keys and values of the rows before, under one of the two names.
            use_cache (`bool`, *optional*):
                Whether to return the cache; `config.use_cache` by default.

        Returns:
            `BaseModelOutputWithPast` whose `last_hidden_state` has the shape of `inputs_embeds`.
        """
        cache = one_cache(cache, past_key_values)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            **{CACHE_NAME: cache},
        )
        hidden_states = self.dropout(inputs_embeds)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                use_cache=use_cache,
                **{CACHE_NAME: cache},
                **kwargs,
            )
        # Parity: GPT-2's own last norm and a second one behind it.
        hidden_states = self.final_norm(self.norm(hidden_states))
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE_NAME: cache if use_cache else None})


class IndexTTS2T2SForConditionalGeneration(IndexTTS2T2SPreTrainedModel, IndexTTS2GenerationMixin):
    r"""
    Text and a voice to semantic tokens. The sequence is

    `[speaker latents + emotion][slot one][slot two][start, text, stop][start, semantic tokens]`

    where slot one holds the asked length or a fixed learnt row (`config.use_length_row`). `prepare_prefix` makes all of it up
    to the semantic start token; `generate` and `forward` go on from there.

    Attributes:
        revision (`str`, *optional*): commit of the repository `name_or_path` that it came from, for its adapters.
    """

    revision: str | None = None

    generation_config_class = IndexTTS2GenerationConfig
    # Near speakers look equal in half precision.
    _keep_in_fp32_modules_strict = {"emotion_prototypes"}

    def __init__(self, config: IndexTTS2T2SConfig):
        super().__init__(config)
        self.speaker_conformer = Conformer(
            config.feature_size,
            config.speaker_conformer_hidden_size,
            config.speaker_conformer_intermediate_size,
            config.speaker_conformer_num_layers,
            config.speaker_conformer_num_heads,
            config.layer_norm_epsilon,
        )
        self.speaker_perceiver = PerceiverResampler(
            config.speaker_conformer_hidden_size,
            config.hidden_size,
            config.speaker_num_latents,
            config.speaker_conformer_num_heads,
            config.perceiver_mult,
        )
        self.emotion_conformer = Conformer(
            config.feature_size,
            config.emotion_conformer_hidden_size,
            config.emotion_conformer_intermediate_size,
            config.emotion_conformer_num_layers,
            config.emotion_conformer_num_heads,
            config.layer_norm_epsilon,
        )
        self.emotion_perceiver = PerceiverResampler(
            config.emotion_conformer_hidden_size,
            config.feature_size,
            1,
            config.emotion_conformer_num_heads,
            config.perceiver_mult,
        )
        self.emotion_in_proj = nn.Linear(config.feature_size, config.hidden_size)
        self.emotion_out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.emotion_prototypes = EmotionPrototypes(
            config.emotion_prototype_counts, config.speaker_embed_dim, config.hidden_size
        )

        self.slot_embedding = SlotEmbedding(2, config.hidden_size)
        self.text_embedding = nn.Embedding(config.text_vocab_size, config.hidden_size)
        self.text_position_embedding = nn.Embedding(config.num_text_positions, config.hidden_size)
        self.semantic_embedding = nn.Embedding(config.semantic_vocab_size, config.hidden_size)
        self.semantic_position_embedding = nn.Embedding(config.num_semantic_positions, config.hidden_size)

        self.model = IndexTTS2T2SModel(config)
        self.text_head = nn.Linear(config.hidden_size, config.text_vocab_size)
        self.semantic_head = nn.Linear(config.hidden_size, config.semantic_vocab_size)
        # CODEPATH: the embedded checkpoint has a recogniser, the released one has none.
        self.text_recognizer = TextRecognizer(config) if config.text_recognizer_size else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.semantic_embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.semantic_embedding = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.semantic_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.semantic_head = new_embeddings

    def add_text_recognizer(self, size: int) -> None:
        """
        A new recogniser of this width, to be trained (`train_text_recognizer.py`).

        Raises:
            ValueError: there is one of another width.
        """
        if self.config.text_recognizer_size not in (0, size):
            raise ValueError(
                f"A recogniser of width {size} was asked for, but this checkpoint has one of width {self.config.text_recognizer_size}. "
                "Ask for that width, or for none to train it further."
            )
        if self.text_recognizer is None:
            self.config.text_recognizer_size = size
            self.text_recognizer = TextRecognizer(self.config).to(self.device, self.dtype)

    @property
    def fingerprint(self) -> str:
        """
        The trunk's sizes and a hash of the signs of samples of its weights, by which an adapter knows its base. The same in
        every dtype, on every device, and with adapters on it.
        """
        signs = []
        for module in self.model.modules():
            # The trunk's projections are of this class. An adapter wraps them, and brings others.
            if isinstance(module, Conv1D):
                weights = module.weight.detach().flatten()
                index = (
                    torch.arange(_FINGERPRINT_SAMPLES, device=weights.device) * len(weights) // _FINGERPRINT_SAMPLES
                )
                signs.append(weights[index] < 0)
        digest = hashlib.sha256(torch.stack(signs).cpu().numpy().tobytes()).hexdigest()
        return f"{self.config.num_hidden_layers}x{self.config.hidden_size}-{digest[:16]}"

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """
        As in transformers; the adapter's configuration then names its base so that it is found from any folder, and says which
        weights it belongs to.

        Raises:
            ImportError: PEFT is not installed, or is older than the installed transformers asks for.
        """
        _check_peft()
        super().add_adapter(adapter_config, adapter_name)
        adapter_config.base_model_name_or_path = lasting_name(self.name_or_path)
        adapter_config.revision = self.revision
        # The one field of a PEFT configuration that takes keys of our own.
        adapter_config.auto_mapping = {
            "base_model_class": type(self).__name__,
            "parent_library": type(self).__module__,
            "base_fingerprint": self.fingerprint,
        }

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """As in transformers, without asking the Hub for the base: PEFT would, to see whether its vocabulary is the one here."""
        config = self.peft_config[adapter_name or self.active_adapters()[0]]
        base, config.base_model_name_or_path = config.base_model_name_or_path, None
        try:
            return super().get_adapter_state_dict(adapter_name, state_dict)
        finally:
            config.base_model_name_or_path = base

    def load_adapter(self, peft_model_id: str | None = None, adapter_name: str | None = None, **kwargs: Any) -> Any:
        r"""
        An adapter from its folder or Hub repository, as in transformers, where one that does not fit makes a warning at most.

        Args:
            peft_model_id (`str`, *optional*): folder or repository.
            adapter_name (`str`, *optional*): what to call it, `"default"` by default.
            kwargs:
                The other arguments of transformers. `hotswap=True` puts the weights in the place of those of the adapter
                `adapter_name`.

        Returns:
            What transformers returns: a report of the weights.

        Raises:
            ImportError: PEFT is not installed, or is older than the installed transformers asks for.
            ValueError: the adapter was made for another base, is damaged, or differs in its settings from the one whose place
                it takes. Nothing of it is kept, and the adapters beside it stay as they were.
        """
        _check_peft()
        adapter_name = adapter_name or "default"
        label = adapter_name if peft_model_id is None else str(peft_model_id)
        settings = _read_adapter_settings(peft_model_id, **kwargs)
        base = settings.get("base_model_name_or_path") or "another base"
        fingerprint = (settings.get("auto_mapping") or {}).get("base_fingerprint")
        if fingerprint not in (None, self.fingerprint):
            raise ValueError(
                f"The adapter {label!r} was made for {base!r} (weights {fingerprint}), but {self.name_or_path!r} (weights "
                f"{self.fingerprint}) is loaded. Load that base, or train the adapter again on this one."
            )

        adapters = dict(getattr(self, "peft_config", {}))
        active = self.active_adapters() if adapters else []
        hotswap = kwargs.get("hotswap", "auto")
        if adapter_name in adapters and (getattr(self, "_hotswap_enabled", False) if hotswap == "auto" else hotswap):
            # transformers takes over the weights alone: another alpha would go unnoticed.
            theirs, ours = (_comparable(values) for values in (settings, adapters[adapter_name].to_dict()))
            different = [f"{name} {theirs[name]} (now {ours[name]})" for name in ours if theirs[name] != ours[name]]
            if different:
                raise ValueError(
                    f"The adapter {label!r} cannot take the place of {adapter_name!r}, from which it differs in "
                    f"{', '.join(different)}. Load it under a name of its own, and choose with `set_adapter`."
                )
        try:
            report = super().load_adapter(peft_model_id, adapter_name, **kwargs)
            wrong = {*report.unexpected_keys}
            wrong |= {key for key in report.missing_keys if f".{adapter_name}." in key and ".lora_" in key}
            if wrong:
                raise RuntimeError(f"{min(wrong)!r} is in one of the two alone")
        except Exception as error:
            if adapter_name not in adapters and adapter_name in getattr(self, "peft_config", {}):
                self.delete_adapter(adapter_name)
                if active:
                    self.set_adapter(active)
            if not isinstance(error, RuntimeError | SafetensorError):
                raise
            raise ValueError(
                f"The adapter {label!r}, made for {base!r}, is damaged or does not fit {self.name_or_path!r}, which is "
                f"loaded ({str(error).splitlines()[0]}). Load its base, or get it again."
            ) from error
        if fingerprint is not None and self.name_or_path:
            # Saved again, it names the base that it was found to fit.
            self.peft_config[adapter_name].base_model_name_or_path = lasting_name(self.name_or_path)
            self.peft_config[adapter_name].revision = self.revision
        # What was just loaded is to be heard, also where the adapters before it had been switched off.
        self.enable_adapters()
        return report

    def encode_speaker(
        self, speaker_features: torch.Tensor, speaker_feature_lengths: torch.LongTensor | None = None
    ) -> torch.Tensor:
        r"""
        The voice as prefix rows.

        Args:
            speaker_features (`torch.Tensor` of shape `(batch_size, num_frames, feature_size)`):
                Semantic features of the voice, at least 3 frames.
            speaker_feature_lengths (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Valid frames of each row; all by default.

        Returns:
            `torch.Tensor` of shape `(batch_size, speaker_num_latents, hidden_size)`: `speaker_latents`.
        """
        return self.speaker_perceiver(*self.speaker_conformer(speaker_features, speaker_feature_lengths))

    def encode_emotion(
        self, emotion_features: torch.Tensor, emotion_feature_lengths: torch.LongTensor | None = None
    ) -> torch.Tensor:
        r"""
        The emotion of a recording as one vector.

        Args:
            emotion_features (`torch.Tensor` of shape `(batch_size, num_frames, feature_size)`):
                Semantic features of the emotion reference, at least 3 frames.
            emotion_feature_lengths (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Valid frames of each row; all by default.

        Returns:
            `torch.Tensor` of shape `(batch_size, hidden_size)`: `emotion_embeds`.
        """
        latents = self.emotion_perceiver(*self.emotion_conformer(emotion_features, emotion_feature_lengths))
        return self.emotion_out_proj(self.emotion_in_proj(latents[:, 0]))

    def mix_emotion(
        self, base_embeds: torch.Tensor, emotion_embeds: torch.Tensor, emotion_strength: torch.Tensor | float = 1.0
    ) -> torch.Tensor:
        """
        From the voice's own emotion (`base_embeds`, strength 0) to that of the reference (strength 1); shapes
        `(batch_size, hidden_size)`, strength a number or `(batch_size, 1)`.
        """
        return base_embeds + emotion_strength * (emotion_embeds - base_embeds)

    def weigh_emotion(
        self, emotion_weights: torch.Tensor, speaker_embeds: torch.Tensor, base_embeds: torch.Tensor
    ) -> torch.Tensor:
        r"""
        The emotion that eight weights describe; what they leave of 1 goes to the voice's own emotion.

        Args:
            emotion_weights (`torch.Tensor` of shape `(batch_size, 8)`):
                Happy, angry, sad, afraid, disgusted, melancholic, surprised, calm. A sum above 1 gives `base_embeds` a
                negative weight, as in the original.
            speaker_embeds (`torch.Tensor` of shape `(batch_size, speaker_embed_dim)`):
                Global voice vector, by which the prototypes are chosen.
            base_embeds (`torch.Tensor` of shape `(batch_size, hidden_size)`):
                The voice's own emotion, from `encode_emotion`.

        Returns:
            `torch.Tensor` of shape `(batch_size, hidden_size)`: `emotion_embeds`.
        """
        weighed = self.emotion_prototypes(emotion_weights, speaker_embeds)
        rest = 1.0 - emotion_weights.sum(dim=1, keepdim=True)
        return weighed.to(base_embeds.dtype) + rest.to(base_embeds.dtype) * base_embeds

    def prepare_prefix(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        speaker_latents: torch.Tensor | None = None,
        emotion_embeds: torch.Tensor | None = None,
        num_semantic_tokens: int | list[int | None] | torch.LongTensor | None = None,
        duration_conditioning: bool | None = None,
    ) -> tuple[torch.Tensor, torch.LongTensor]:
        r"""
        Everything before the first semantic token, as embeddings: voice, length, text, semantic start token.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, text_length)`):
                Text ids; start and stop ids among them are dropped.
            attention_mask (`torch.Tensor` of shape `(batch_size, text_length)`, *optional*):
                1 for text, 0 for padding on any side.
            speaker_latents (`torch.Tensor` of shape `(batch_size, speaker_num_latents, hidden_size)`):
                Voice, from `encode_speaker`.
            emotion_embeds (`torch.Tensor` of shape `(batch_size, hidden_size)`, *optional*):
                Emotion; none is added when it is missing.
            num_semantic_tokens (`int`, `list[int | None]` or `torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Length to write into slot one; `None`, in a tensor 0, for a free length. A tensor is not checked.
            duration_conditioning (`bool`, *optional*):
                Whether the length is written at all; `config.use_length_row` by default.

        Returns:
            `torch.Tensor` of shape `(batch_size, prefix_length, hidden_size)`, rows that are shorter padded with zeros on the
            left, and its mask of shape `(batch_size, prefix_length)`.

        Raises:
            ValueError: no voice, a text longer than the position table, or a length beyond its table.
        """
        if speaker_latents is None:
            raise ValueError("There is no voice: `speaker_latents` is missing. Make it with `encode_speaker`.")
        config = self.config
        batch_size, text_length = input_ids.shape
        if text_length > config.max_text_tokens:
            raise ValueError(
                f"The text has {text_length} tokens but this checkpoint has positions for {config.max_text_tokens}. "
                "Split it with `processor.split_text`."
            )

        condition = speaker_latents if emotion_embeds is None else speaker_latents + emotion_embeds[:, None]
        slots = self._length_slots(batch_size, num_semantic_tokens, duration_conditioning)
        text_ids, num_kept = self._frame_text(input_ids, attention_mask)
        text_positions = torch.arange(text_length + 2, device=input_ids.device)
        text = self.text_embedding(text_ids) + self.text_position_embedding(text_positions)

        # Rows are made left-aligned and pushed to the right, so that every text ends where the semantic tokens begin.
        rows = torch.cat([condition, slots, text], dim=1)
        steps = torch.arange(rows.shape[1], device=rows.device)
        source = steps - (text_length - num_kept)[:, None]
        is_real = source >= 0
        rows = rows.gather(1, source.clamp(min=0)[..., None].expand_as(rows)) * is_real[..., None]

        start = self._embed_semantic(
            input_ids.new_full((batch_size, 1), config.semantic_start_token_id), input_ids.new_zeros((1, 1))
        )
        return torch.cat([rows, start], dim=1), F.pad(is_real, (0, 1), value=True).long()

    def without_text(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.LongTensor
    ) -> tuple[torch.Tensor, torch.LongTensor]:
        r"""
        A prefix with an empty text in place of its own, for text guidance.

        Args:
            inputs_embeds (`torch.Tensor` of shape `(batch_size, prefix_length, hidden_size)`): from `prepare_prefix`.
            attention_mask (`torch.LongTensor` of shape `(batch_size, prefix_length)`): its mask.

        Returns:
            Both in the same shapes: the last two rows of the text are its start and stop, and those before them are masked.
        """
        config = self.config
        empty = torch.tensor([config.text_start_token_id, config.text_stop_token_id], device=inputs_embeds.device)
        positions = torch.arange(2, device=inputs_embeds.device)
        text = self.text_embedding(empty) + self.text_position_embedding(positions)
        text = text.to(inputs_embeds.dtype).expand(len(inputs_embeds), -1, -1)
        # Before the text stand the voice and two slots, behind it the semantic start token.
        place = attention_mask.cumsum(dim=1)
        is_text = place > config.speaker_num_latents + 2
        is_text[:, -3:] = False
        return torch.cat([inputs_embeds[:, :-3], text, inputs_embeds[:, -1:]], dim=1), attention_mask * ~is_text

    def _length_slots(
        self,
        batch_size: int,
        num_semantic_tokens: int | list[int | None] | torch.LongTensor | None,
        duration_conditioning: bool | None,
    ) -> torch.Tensor:
        """The two rows between the voice and the text, `(batch_size, 2, hidden_size)`."""
        lengths = num_semantic_tokens
        if not isinstance(lengths, torch.Tensor):
            counts = check_num_semantic_tokens(num_semantic_tokens)
            lengths = [count or 0 for count in (counts if isinstance(counts, list) else [counts] * batch_size)]
            if max(lengths, default=0) > self.config.max_semantic_tokens:
                raise ValueError(
                    f"`num_semantic_tokens` is {max(lengths)} but this checkpoint has positions for at most "
                    f"{self.config.max_semantic_tokens}."
                )
            lengths = torch.tensor(lengths, device=self.slot_embedding.weight.device)
        if len(lengths) != batch_size:
            raise ValueError(f"`num_semantic_tokens` has {len(lengths)} counts for a batch of {batch_size} rows.")
        if duration_conditioning is None:
            duration_conditioning = self.config.use_length_row

        # Parity: the learnt rows stand in the order 1, 0.
        free, last = self.slot_embedding.weight[1], self.slot_embedding.weight[0]
        # CODEPATH: models trained here have no learnt row for a free length, the released checkpoint has.
        if self.config.use_length_row:
            free = torch.zeros_like(free)
        first = free.expand(batch_size, -1)
        if duration_conditioning:
            # Paper, section 3.1.1: the length table is the semantic position table.
            first = torch.where((lengths > 0)[:, None], self.semantic_position_embedding(lengths), first)
        return torch.stack([first, last.expand(batch_size, -1)], dim=1)

    def _frame_text(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Text between start and stop, left-aligned, stop-padded: `(batch_size, text_length + 2)`, and its kept counts."""
        config = self.config
        is_text = (input_ids != config.text_start_token_id) & (input_ids != config.text_stop_token_id)
        if attention_mask is not None:
            is_text = is_text & attention_mask.bool()
        order = torch.argsort(is_text.logical_not().long(), dim=1, stable=True)
        num_kept = is_text.sum(dim=1)
        steps = torch.arange(input_ids.shape[1], device=input_ids.device)
        text_ids = torch.where(
            steps < num_kept[:, None],
            input_ids.gather(1, order),
            torch.full_like(input_ids, config.text_stop_token_id),
        )
        text_ids = F.pad(text_ids, (1, 0), value=config.text_start_token_id)
        return F.pad(text_ids, (0, 1), value=config.text_stop_token_id), num_kept

    def _embed_semantic(self, semantic_ids: torch.LongTensor, position_ids: torch.LongTensor) -> torch.Tensor:
        return self.semantic_embedding(semantic_ids) + self.semantic_position_embedding(position_ids)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        speaker_features: torch.Tensor | None = None,
        speaker_feature_lengths: torch.LongTensor | None = None,
        emotion_features: torch.Tensor | None = None,
        emotion_feature_lengths: torch.LongTensor | None = None,
        speaker_latents: torch.Tensor | None = None,
        emotion_embeds: torch.Tensor | None = None,
        num_semantic_tokens: torch.LongTensor | None = None,
        semantic_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> IndexTTS2T2SOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, text_length)`, *optional*):
                Text ids without start and stop.
            attention_mask (`torch.Tensor`, *optional*):
                With `input_ids`, the mask of the text. With `inputs_embeds`, the mask of that prefix; in cached steps, of
                everything so far.
            speaker_features, emotion_features (`torch.Tensor` of shape `(batch_size, num_frames, feature_size)`, *optional*):
                Semantic features of the voice and of the emotion reference, encoded here (training).
            speaker_feature_lengths, emotion_feature_lengths (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Their valid frames.
            speaker_latents, emotion_embeds (`torch.Tensor`, *optional*):
                The same, already encoded; see `prepare_prefix`.
            num_semantic_tokens (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Lengths for slot one, 0 where the length is free; without it all are free.
            semantic_ids (`torch.LongTensor` of shape `(batch_size, num_semantic_tokens)`, *optional*):
                Codes to read after the start token; from `labels` when missing.
            position_ids (`torch.LongTensor` of shape `(batch_size, num_semantic_tokens)`, *optional*):
                Rows of the semantic position table for `semantic_ids`; 1, 2, 3 … by default.
            inputs_embeds (`torch.Tensor` of shape `(batch_size, prefix_length, hidden_size)`, *optional*):
                A prefix made by `prepare_prefix`, instead of text, voice and emotion.
            cache, past_key_values (`Cache`, *optional*):
                Cache of everything before `semantic_ids`, under one of the two names.
            use_cache (`bool`, *optional*):
                Whether to return the cache.
            labels (`torch.LongTensor` of shape `(batch_size, num_semantic_tokens)`, *optional*):
                Codes to learn, without start and stop, -100 where a row has ended. Needs `input_ids`.
            logits_to_keep (`int`, defaults to 0):
                Computes the logits of that many last rows only; 0 for all.

        Returns:
            [`IndexTTS2T2SOutput`]

        Raises:
            ValueError: nothing to read, labels without text, or a cache under both of its names.
        """
        cache = one_cache(cache, past_key_values)
        is_first = inputs_embeds is not None or input_ids is not None
        if not is_first and cache is None:
            raise ValueError("`forward` needs text (`input_ids`) or a prefix (`inputs_embeds`), but got neither.")
        if labels is not None and semantic_ids is None:
            semantic_ids = labels.masked_fill(labels < 0, self.config.semantic_stop_token_id)

        text = None
        if is_first and inputs_embeds is None:
            if speaker_latents is None and speaker_features is not None:
                speaker_latents = self.encode_speaker(speaker_features, speaker_feature_lengths)
            if emotion_embeds is None and emotion_features is not None:
                emotion_embeds = self.encode_emotion(emotion_features, emotion_feature_lengths)
            text = (input_ids, attention_mask)
            inputs_embeds, attention_mask = self.prepare_prefix(
                input_ids, attention_mask, speaker_latents, emotion_embeds, num_semantic_tokens
            )
        if labels is not None and text is None:
            raise ValueError("The loss needs the text: give `input_ids` instead of `inputs_embeds`.")

        parts = [] if inputs_embeds is None else [inputs_embeds]
        if semantic_ids is not None:
            if position_ids is None:
                position_ids = torch.arange(1, semantic_ids.shape[1] + 1, device=semantic_ids.device)[None]
            parts.append(self._embed_semantic(semantic_ids, position_ids))
            if is_first and attention_mask is not None:
                attention_mask = F.pad(attention_mask, (0, semantic_ids.shape[1]), value=1)
        embeds = torch.cat(parts, dim=1)

        outputs = self.model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            cache=cache,
            use_cache=use_cache,
            **kwargs,
        )
        # Semantic rows: the start token, which ends the prefix, and the codes behind it; in cached steps the codes alone.
        num_rows = (semantic_ids.shape[1] if semantic_ids is not None else 0) + int(is_first)
        hidden_states = outputs.last_hidden_state[:, -num_rows:]
        kept_states = hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
        # A copy, so that frozen weights give the same bits; see `PerceiverResampler`.
        logits = self.semantic_head(kept_states.contiguous())

        loss = semantic_loss = text_loss = text_logits = None
        if labels is not None:
            semantic_loss = self._semantic_loss(logits, labels)
            prefix_states = outputs.last_hidden_state[:, :-num_rows]
            text_loss, text_logits = self._text_loss(prefix_states, *text)
            loss = semantic_loss + self.config.text_loss_weight * text_loss
        return IndexTTS2T2SOutput(
            loss=loss,
            semantic_loss=semantic_loss,
            text_loss=text_loss,
            logits=logits,
            text_logits=text_logits,
            emotion_embeds=emotion_embeds,
            last_hidden_state=hidden_states,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    def _semantic_loss(self, logits: torch.Tensor, labels: torch.LongTensor) -> torch.Tensor:
        """Row `i` predicts code `i`; the row of the last code predicts the stop token."""
        targets = F.pad(labels, (0, 1), value=-100)
        num_codes = (labels >= 0).sum(dim=1, keepdim=True)
        targets = targets.scatter(1, num_codes, self.config.semantic_stop_token_id)
        return mean_cross_entropy(logits, targets)

    def _text_loss(
        self, prefix_states: torch.Tensor, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each text row predicts the next id, the last one the stop token."""
        text_ids, num_kept = self._frame_text(input_ids, attention_mask)
        # The text ends the prefix; its rows are taken left-aligned again.
        num_rows = text_ids.shape[1]
        steps = torch.arange(num_rows, device=input_ids.device)
        source = prefix_states.shape[1] - num_kept[:, None] - 2 + steps
        source = source.clamp(max=prefix_states.shape[1] - 1)[..., None].expand(-1, -1, prefix_states.shape[2])
        text_logits = self.text_head(prefix_states.gather(1, source))
        targets = text_ids[:, 1:].masked_fill(steps[:-1] > num_kept[:, None], -100)
        return mean_cross_entropy(text_logits[:, :-1], targets), text_logits


__all__ = [
    "IndexTTS2T2SForConditionalGeneration",
    "IndexTTS2T2SModel",
    "IndexTTS2T2SOutput",
    "IndexTTS2T2SPreTrainedModel",
]
