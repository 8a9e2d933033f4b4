"""
The semantic codec: features of a speech encoder to token ids, and token ids to embeddings and features.

Also holds the statistics that normalise the hidden states of the speech encoder before anything else sees them. Knows nothing
of that encoder, of text or of mels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn


# Constants of the original network.
KERNEL_SIZE = 7
LAYER_NORM_EPS = 1e-6

# Weights of the two quantiser terms of the loss.
COMMITMENT_WEIGHT = 0.15
CODEBOOK_WEIGHT = 1.0


@dataclass
class IndexTTS2SemanticCodecOutput(BaseOutput):
    r"""
    Output of [`IndexTTS2SemanticCodec`].

    Args:
        semantic_ids (`torch.LongTensor` of shape `(batch_size, num_frames)`):
            One id per frame. Meaningless where the attention mask is 0.
        semantic_embeds (`torch.Tensor` of shape `(batch_size, num_frames, feature_size)`):
            Codebook vectors of these ids, projected to the width of the features.
        reconstruction (`torch.Tensor` of shape `(batch_size, num_frames, feature_size)`, *optional*):
            What the decoder makes of them; only from `forward`.
        latents (`torch.Tensor` of shape `(batch_size, num_frames, codebook_dim)`, *optional*):
            What the quantiser chose the ids for; only from `forward`.
        loss (`torch.Tensor` of shape `()`, *optional*):
            Training objective; only from `forward`.
    """

    # All have a default because Accelerate, under mixed precision, builds the output anew from a dictionary.
    semantic_ids: torch.LongTensor | None = None
    semantic_embeds: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    loss: torch.Tensor | None = None


def zero_masked(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    r"""Frames of `(batch_size, num_frames, channels)` set to zero where `attention_mask` is 0."""
    if attention_mask is None:
        return hidden_states
    return hidden_states.masked_fill(attention_mask[..., None] == 0, 0.0)


def masked_squared_error(
    prediction: torch.Tensor, target: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    r"""Mean over rows of the mean squared error of each row's frames, where `attention_mask` is not 0."""
    error = (prediction.float() - target.float()).square().mean(dim=-1)
    if attention_mask is None:
        return error.mean()
    mask = attention_mask != 0
    return (error.masked_fill(~mask, 0.0).sum(dim=1) / mask.sum(dim=1)).mean()


class ConvNeXtBlock(nn.Module):
    r"""Depthwise convolution over time and a two-layer perceptron over channels, on `(batch, time, channels)`."""

    def __init__(self, hidden_size: int, intermediate_size: int, initial_scale: float) -> None:
        super().__init__()
        self.depthwise_conv = nn.Conv1d(
            hidden_size, hidden_size, KERNEL_SIZE, padding=KERNEL_SIZE // 2, groups=hidden_size
        )
        self.norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS)
        self.linear_1 = nn.Linear(hidden_size, intermediate_size)
        self.linear_2 = nn.Linear(intermediate_size, hidden_size)
        self.scale = nn.Parameter(torch.full((hidden_size,), initial_scale))

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        residual = hidden_states
        hidden_states = zero_masked(hidden_states, attention_mask)
        hidden_states = self.depthwise_conv(hidden_states.transpose(1, 2)).transpose(1, 2)
        hidden_states = self.linear_1(self.norm(hidden_states))
        return residual + self.scale * self.linear_2(F.gelu(hidden_states))


class ConvNeXtStack(nn.Module):
    r"""Features to features of the same width and rate. The codec has one as its encoder and one as its decoder."""

    def __init__(self, feature_size: int, hidden_size: int, intermediate_size: int, num_layers: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv1d(feature_size, hidden_size, KERNEL_SIZE, padding=KERNEL_SIZE // 2)
        self.norm_in = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS)
        self.blocks = nn.ModuleList(
            [ConvNeXtBlock(hidden_size, intermediate_size, 1 / num_layers) for _ in range(num_layers)]
        )
        self.norm_out = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS)
        self.linear_out = nn.Linear(hidden_size, feature_size)
        self.gradient_checkpointing = False

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden_states = zero_masked(hidden_states, attention_mask)
        hidden_states = self.norm_in(self.conv_in(hidden_states.transpose(1, 2)).transpose(1, 2))
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, attention_mask)
            else:
                hidden_states = block(hidden_states, attention_mask)
        return self.linear_out(self.norm_out(hidden_states))


class VectorQuantizer(nn.Module):
    r"""
    One codebook in a space of few dimensions.

    A latent takes the row that points most nearly in its direction, and the row enters the output with its own length.
    """

    def __init__(self, feature_size: int, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.project_in = nn.Linear(feature_size, codebook_dim)
        self.codebook = nn.Embedding(codebook_size, codebook_dim)
        self.project_out = nn.Linear(codebook_dim, feature_size)

    def nearest(self, latents: torch.Tensor) -> torch.LongTensor:
        r"""Row indices `(batch_size, num_frames)` for latents `(batch_size, num_frames, codebook_dim)`."""
        # In float32 whatever the weights are, also under autocast: neighbouring rows look equal in half precision.
        with torch.autocast(latents.device.type, enabled=False):
            directions = F.normalize(latents.float(), dim=-1)
            rows = F.normalize(self.codebook.weight.float(), dim=-1)
            # Parity: the lengths are 1 but for rounding, and are added as the original adds them so that ties fall alike.
            lengths, row_lengths = directions.square().sum(dim=-1, keepdim=True), rows.square().sum(dim=-1)
            distances = lengths - 2 * directions @ rows.T + row_lengths
        return distances.argmin(dim=-1)


class IndexTTS2SemanticCodec(ModelMixin, ConfigMixin):
    r"""
    Semantic codec: 50 tokens per second of speech.

    Args:
        feature_size (`int`, defaults to 1024):
            Width of the speech encoder's hidden states.
        codebook_size (`int`, defaults to 8192):
            Number of semantic ids.
        codebook_dim (`int`, defaults to 8):
            Width of a codebook row.
        hidden_size (`int`, defaults to 384):
            Width of encoder and decoder.
        intermediate_size (`int`, defaults to 2048):
            Inner width of their perceptrons.
        num_layers (`int`, defaults to 12):
            Blocks in each of the two.

    Buffers, saved with the weights:
        feature_mean, feature_variance (`torch.Tensor` of shape `(feature_size,)`): statistics of the speech encoder's
        hidden states, used by `normalize`. Zero and one until a checkpoint or a training program sets them.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ConvNeXtBlock", "VectorQuantizer"]
    _repeated_blocks = ["ConvNeXtBlock"]

    @register_to_config
    def __init__(
        self,
        feature_size: int = 1024,
        codebook_size: int = 8192,
        codebook_dim: int = 8,
        hidden_size: int = 384,
        intermediate_size: int = 2048,
        num_layers: int = 12,
    ) -> None:
        super().__init__()
        self.feature_size = feature_size
        self.register_buffer("feature_mean", torch.zeros(feature_size))
        self.register_buffer("feature_variance", torch.ones(feature_size))
        self.encoder = ConvNeXtStack(feature_size, hidden_size, intermediate_size, num_layers)
        self.quantizer = VectorQuantizer(feature_size, codebook_size, codebook_dim)
        self.decoder = ConvNeXtStack(feature_size, hidden_size, intermediate_size, num_layers)

    # The hook brings an offloaded codec to its device: offloading by itself watches `forward` alone.
    @apply_forward_hook
    def normalize(self, hidden_states: torch.Tensor) -> torch.Tensor:
        r"""
        Semantic features: hidden states of the speech encoder with zero mean and unit variance per channel.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, num_frames, feature_size)`):
                Output of the speech encoder's 17th layer.

        Returns:
            `torch.Tensor` of the same shape.
        """
        return (hidden_states - self.feature_mean) / self.feature_variance.sqrt()

    @apply_forward_hook
    def encode(
        self,
        semantic_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> IndexTTS2SemanticCodecOutput | tuple[torch.LongTensor, torch.Tensor]:
        r"""
        Semantic ids of features, and their embeddings.

        Args:
            semantic_features (`torch.Tensor` of shape `(batch_size, num_frames, feature_size)`):
                Result of [`~IndexTTS2SemanticCodec.normalize`].
            attention_mask (`torch.Tensor` of shape `(batch_size, num_frames)`, *optional*):
                1 for frames, 0 for padding; a row then gives what it gives alone.
            return_dict (`bool`, defaults to `True`):
                Whether to return an [`IndexTTS2SemanticCodecOutput`] or a plain tuple.

        Returns:
            [`IndexTTS2SemanticCodecOutput`] without `reconstruction`, `latents` and `loss`, or `tuple`. Embeddings of padding are
            zero.

        Raises:
            ValueError: if the features are not a batch or have another width.
        """
        semantic_ids = self.quantizer.nearest(self._latents(semantic_features, attention_mask))
        # Parity: the original adds the row to the latent and subtracts the latent again, in inference too. The result is
        # the row, up to rounding (1e-7).
        semantic_embeds = zero_masked(self.embed(semantic_ids), attention_mask)
        if not return_dict:
            return (semantic_ids, semantic_embeds)
        return IndexTTS2SemanticCodecOutput(semantic_ids=semantic_ids, semantic_embeds=semantic_embeds)

    @apply_forward_hook
    def embed(self, semantic_ids: torch.LongTensor) -> torch.Tensor:
        r"""
        Embeddings of ids, a look-up per position.

        Args:
            semantic_ids (`torch.LongTensor` of shape `(batch_size, num_semantic_tokens)`):
                Ids in `[0, codebook_size)`: no start, stop or padding ids. They are not checked, since that would wait for
                the device; an id outside fails in the look-up on CPU and is a device-side assertion on a GPU.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_semantic_tokens, feature_size)`.
        """
        return self.quantizer.project_out(self.quantizer.codebook(semantic_ids))

    @apply_forward_hook
    def decode(self, semantic_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        r"""
        Semantic features of ids, through the decoder. Synthesis does not need it: it uses the embeddings.

        Args:
            semantic_ids (`torch.LongTensor` of shape `(batch_size, num_semantic_tokens)`):
                Ids as for [`~IndexTTS2SemanticCodec.embed`], padding being any of them.
            attention_mask (`torch.Tensor` of shape `(batch_size, num_semantic_tokens)`, *optional*):
                1 for ids, 0 for padding; a row then gives what it gives alone.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_semantic_tokens, feature_size)`, zero at padding.
        """
        return zero_masked(self.decoder(self.embed(semantic_ids), attention_mask), attention_mask)

    def forward(
        self,
        semantic_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> (
        IndexTTS2SemanticCodecOutput | tuple[torch.LongTensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
    ):
        r"""
        Encodes, decodes, and says how well that went.

        The loss is the squared error of the reconstruction, plus that between latents and codebook rows, once pulling the
        rows (weight 1) and once the latents (weight 0.15). Each is a mean over rows of the row's mean over its own
        frames, so that long rows count as much as short ones. The reconstruction's gradient passes the quantiser as if
        it were not there (straight-through), so it reaches the encoder.

        Args:
            semantic_features (`torch.Tensor` of shape `(batch_size, num_frames, feature_size)`):
                Result of [`~IndexTTS2SemanticCodec.normalize`].
            attention_mask (`torch.Tensor` of shape `(batch_size, num_frames)`, *optional*):
                1 for frames, 0 for padding, which the loss leaves out. Every row needs a frame.
            return_dict (`bool`, defaults to `True`):
                Whether to return an [`IndexTTS2SemanticCodecOutput`] or a plain tuple.

        Returns:
            [`IndexTTS2SemanticCodecOutput`] or `tuple`. Embeddings and reconstruction of padding are zero.

        Raises:
            ValueError: if the features are not a batch or have another width.
        """
        latents = self._latents(semantic_features, attention_mask)
        semantic_ids = self.quantizer.nearest(latents)
        rows = self.quantizer.codebook(semantic_ids)
        straight_through = latents + (rows - latents).detach()
        semantic_embeds = zero_masked(self.quantizer.project_out(straight_through), attention_mask)
        reconstruction = zero_masked(self.decoder(semantic_embeds, attention_mask), attention_mask)
        loss = (
            masked_squared_error(reconstruction, semantic_features, attention_mask)
            + CODEBOOK_WEIGHT * masked_squared_error(rows, latents.detach(), attention_mask)
            + COMMITMENT_WEIGHT * masked_squared_error(latents, rows.detach(), attention_mask)
        )
        if not return_dict:
            return (semantic_ids, semantic_embeds, reconstruction, latents, loss)
        return IndexTTS2SemanticCodecOutput(
            semantic_ids=semantic_ids,
            semantic_embeds=semantic_embeds,
            reconstruction=reconstruction,
            latents=latents,
            loss=loss,
        )

    def _latents(self, semantic_features: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        if semantic_features.ndim != 3 or semantic_features.shape[-1] != self.feature_size:
            raise ValueError(
                f"`semantic_features` has shape {tuple(semantic_features.shape)} but the codec expects (batch_size, "
                f"num_frames, {self.feature_size}). Use hidden states of its speech encoder after `normalize`."
            )
        return self.quantizer.project_in(self.encoder(semantic_features, attention_mask))
