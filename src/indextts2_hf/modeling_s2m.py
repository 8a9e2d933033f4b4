"""
Semantic tokens to mel: the network of the flow-matching half.

From bottom to top: the length regulator that stretches semantic vectors to the mel rate, a diffusion transformer with
U-shaped skip connections, and a WaveNet head that turns its output into a velocity. Sampling, guidance and the prompt
bookkeeping are in the pipeline, the time grid is in the scheduler; this file knows neither.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn


TIME_TABLE_SIZE = 256
FEED_FORWARD_MULTIPLE = 256
ROTARY_BASE = 10000.0
NUM_REGULATOR_BLOCKS = 4


@dataclass
class IndexTTS2SemanticToMelOutput(BaseOutput):
    """
    Output of `IndexTTS2SemanticToMelTransformer`.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*):
            L1 distance to `labels`; only if they were given.
        velocity (`torch.FloatTensor` of shape `(batch_size, num_mel_frames, num_mel_bins)`):
            Predicted `data - noise`, zero behind the end of a row.
    """

    loss: torch.FloatTensor | None = None
    velocity: torch.FloatTensor | None = None


def mel_lengths_for(semantic_lengths: torch.LongTensor, mel_frames_per_token: float) -> torch.LongTensor:
    r"""
    Number of mel frames that belong to a run of semantic tokens.

    Tokens come at 50 per second and mel frames at 22050 / 256 = 86.13 per second, so the exact ratio is 1.7227. The
    released pipeline truncates 1.72 times the count; the value is part of the checkpoint because the network hears the
    difference as tempo.

    Args:
        semantic_lengths (`torch.LongTensor` of shape `(batch_size,)`):
            Tokens per row, start and stop tokens not counted.
        mel_frames_per_token (`float`):
            `config.mel_frames_per_token` of the S2M transformer.

    Returns:
        `torch.LongTensor` of shape `(batch_size,)`: frames per row, rounded down, at least 1.
    """
    # Parity: truncation, not rounding. One frame is 11.6 ms.
    return (semantic_lengths * mel_frames_per_token).long().clamp(min=1)


def lengths_to_mask(lengths: torch.LongTensor, num_frames: int) -> torch.BoolTensor:
    """Mask `(batch_size, num_frames)`: True on the first `lengths[i]` frames of row i."""
    return torch.arange(num_frames, device=lengths.device) < lengths[:, None]


def nearest_indices(
    input_lengths: torch.LongTensor, output_lengths: torch.LongTensor, num_outputs: int
) -> torch.LongTensor:
    """
    Input position for each output position when each row is stretched from its own input to its own output length.

    Returns `(batch_size, num_outputs)`; positions behind a row's output length repeat its last input.
    """
    # Parity: the float32 arithmetic of `F.interpolate(mode="nearest")`. Integers would choose another neighbour where
    # rounding decides.
    scale = input_lengths.float() / output_lengths.float()
    positions = torch.arange(num_outputs, device=input_lengths.device, dtype=torch.float32)
    indices = (positions * scale[:, None]).floor().long()
    return torch.minimum(indices, input_lengths[:, None] - 1)


def reflection_indices(lengths: torch.LongTensor, num_frames: int, padding: int) -> torch.LongTensor:
    """
    Frame to take for each frame of a batch that is reflected by `padding` frames at both ends of each row.

    Returns `(batch_size, num_frames + 2 * padding)`; what comes more than `padding` frames after the end of a row is
    arbitrary. A row too short to be reflected counts as `padding + 1` frames long: its mirror stands in the (zero)
    frames behind its end, as in the original.
    """
    positions = torch.arange(-padding, num_frames + padding, device=lengths.device)
    last = lengths.clamp(min=padding + 1)[:, None] - 1
    return (last - (last - positions.abs()).abs()).clamp(min=0)


def rotary_table(num_frames: int, head_dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of the rotary angles, float32, both `(num_frames, head_dim // 2)`."""
    pairs = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    frequencies = ROTARY_BASE ** (-pairs / head_dim)
    angles = torch.arange(num_frames, device=device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def apply_rotary(states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotates the interleaved pairs (0, 1), (2, 3), … of the last axis; `states` is `(batch, time, ..., head_dim)`."""
    num_between = states.ndim - 3
    cos, sin = (table.unflatten(0, (-1, *[1] * num_between)) for table in rotary)
    a, b = states.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(states.dtype)


def frame_l1_loss(predicted: torch.Tensor, labels: torch.Tensor, loss_mask: torch.BoolTensor | None) -> torch.Tensor:
    """L1 distance in float32, averaged over the frames to count of each row, then over the rows."""
    distance = (predicted.float() - labels.float()).abs().mean(dim=-1)
    if loss_mask is None:
        return distance.mean()
    num_counted = loss_mask.sum(dim=1).clamp(min=1)
    return (distance.masked_fill(~loss_mask, 0.0).sum(dim=1) / num_counted).mean()


class MaskedGroupNorm(nn.Module):
    """
    Group normalisation with one group whose statistics leave padding out, over `(batch, channels, time)`.

    `nn.GroupNorm` averages over channels and time together, so padding would change every frame of a row.
    """

    def __init__(self, num_channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        dtype = hidden_states.dtype
        hidden_states, mask = hidden_states.float(), mask.float()
        num_values = mask.sum(dim=(1, 2), keepdim=True) * hidden_states.shape[1]
        mean = (hidden_states * mask).sum(dim=(1, 2), keepdim=True) / num_values
        centered = hidden_states - mean
        variance = (centered * mask).square().sum(dim=(1, 2), keepdim=True) / num_values
        normalized = (centered * torch.rsqrt(variance + self.eps)).to(dtype)
        return normalized * self.weight[:, None] + self.bias[:, None]


class LengthRegulator(nn.Module):
    """Semantic vectors at the token rate -> content vectors at the mel rate: nearest neighbour, then convolutions."""

    def __init__(self, semantic_size: int, content_size: int):
        super().__init__()
        self.input_projection = nn.Linear(semantic_size, content_size)
        self.convs = nn.ModuleList(
            nn.Conv1d(content_size, content_size, kernel_size=3, padding=1) for _ in range(NUM_REGULATOR_BLOCKS)
        )
        self.norms = nn.ModuleList(MaskedGroupNorm(content_size) for _ in range(NUM_REGULATOR_BLOCKS))
        self.output_projection = nn.Linear(content_size, content_size)

    def forward(
        self, semantic_embeds: torch.Tensor, semantic_lengths: torch.LongTensor, mel_lengths: torch.LongTensor
    ) -> torch.Tensor:
        num_mel_frames = int(mel_lengths.max())
        indices = nearest_indices(semantic_lengths, mel_lengths, num_mel_frames)

        hidden_states = self.input_projection(semantic_embeds)
        hidden_states = hidden_states.gather(1, indices[..., None].expand(-1, -1, hidden_states.shape[-1]))
        hidden_states = hidden_states.transpose(1, 2)

        mask = lengths_to_mask(mel_lengths, num_mel_frames)[:, None].to(hidden_states.dtype)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            hidden_states = F.mish(norm(conv(hidden_states * mask), mask))

        return self.output_projection(hidden_states.transpose(1, 2)) * mask.transpose(1, 2)


class AdaptiveRMSNorm(nn.Module):
    """RMS normalisation scaled and shifted by a projection of the time embedding (scale first, no one added to it)."""

    def __init__(self, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=eps)
        self.time_projection = nn.Linear(hidden_size, 2 * hidden_size)
        # A new network starts near a plain norm instead of near zero.
        nn.init.ones_(self.time_projection.bias[:hidden_size])
        nn.init.zeros_(self.time_projection.bias[hidden_size:])

    def forward(self, hidden_states: torch.Tensor, time_embeds: torch.Tensor) -> torch.Tensor:
        scale, shift = self.time_projection(time_embeds)[:, None].chunk(2, dim=-1)
        return scale * self.norm(hidden_states) + shift


class Attention(nn.Module):
    """Self-attention over all frames with rotary positions."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.BoolTensor | None,
    ) -> torch.Tensor:
        qkv = self.qkv_proj(hidden_states).unflatten(-1, (3, self.num_heads, -1))
        query, key = apply_rotary(qkv[:, :, :2], rotary).transpose(1, 3).unbind(2)
        value = qkv[:, :, 2].transpose(1, 2)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SiLU-gated feed-forward of about 8/3 of the width."""

    def __init__(self, hidden_size: int):
        super().__init__()
        inner_size = math.ceil((8 * hidden_size // 3) / FEED_FORWARD_MULTIPLE) * FEED_FORWARD_MULTIPLE
        self.gate_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class TransformerBlock(nn.Module):
    """Attention and feed-forward under adaptive norms; blocks of the second half first merge the output of an early one."""

    def __init__(self, hidden_size: int, num_heads: int, has_skip: bool):
        super().__init__()
        self.skip_proj = nn.Linear(2 * hidden_size, hidden_size) if has_skip else None
        self.attention_norm = AdaptiveRMSNorm(hidden_size)
        self.attention = Attention(hidden_size, num_heads)
        self.feed_forward_norm = AdaptiveRMSNorm(hidden_size)
        self.feed_forward = FeedForward(hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        skip_states: torch.Tensor | None,
        time_embeds: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.BoolTensor | None,
    ) -> torch.Tensor:
        if self.skip_proj is not None:
            hidden_states = self.skip_proj(torch.cat([hidden_states, skip_states], dim=-1))
        normalized = self.attention_norm(hidden_states, time_embeds)
        hidden_states = hidden_states + self.attention(normalized, rotary, attention_mask)
        normalized = self.feed_forward_norm(hidden_states, time_embeds)
        return hidden_states + self.feed_forward(normalized)


class WaveNet(nn.Module):
    """
    Gated convolutions with a running residual and a sum of skip outputs, conditioned on time.

    Every convolution pads by reflection at the end of each *row*, so a row of a batch gives what it gives alone; the
    original reflects at the end of the batch. A row with no more frames than the padding (half the kernel) is taken as
    followed by zeros up to the length that can be reflected.
    """

    def __init__(self, hidden_size: int, num_layers: int, kernel_size: int):
        super().__init__()
        self.padding = kernel_size // 2
        self.time_projection = nn.Linear(hidden_size, 2 * hidden_size * num_layers)
        self.gate_convs = nn.ModuleList(
            nn.Conv1d(hidden_size, 2 * hidden_size, kernel_size) for _ in range(num_layers)
        )
        # The last layer has no residual half.
        self.output_convs = nn.ModuleList(
            nn.Conv1d(hidden_size, 2 * hidden_size if i < num_layers - 1 else hidden_size, kernel_size=1)
            for i in range(num_layers)
        )

    def forward(
        self, hidden_states: torch.Tensor, time_embeds: torch.Tensor, lengths: torch.LongTensor | None
    ) -> torch.Tensor:
        batch_size, num_frames, hidden_size = hidden_states.shape
        hidden_states = hidden_states.transpose(1, 2)
        if lengths is None and num_frames <= self.padding:
            lengths = torch.full((batch_size,), num_frames, device=hidden_states.device)

        mask = indices = None
        if lengths is not None:
            hidden_states = F.pad(hidden_states, (0, max(0, self.padding + 1 - num_frames)))
            num_padded = hidden_states.shape[-1]
            mask = lengths_to_mask(lengths, num_padded)[:, None].to(hidden_states.dtype)
            indices = reflection_indices(lengths, num_padded, self.padding)[:, None].expand(-1, hidden_size, -1)
            hidden_states = hidden_states * mask

        time_biases = self.time_projection(time_embeds)[..., None].chunk(len(self.gate_convs), dim=1)
        output = torch.zeros_like(hidden_states)
        for gate_conv, output_conv, time_bias in zip(self.gate_convs, self.output_convs, time_biases, strict=True):
            if indices is None:
                padded = F.pad(hidden_states, (self.padding, self.padding), mode="reflect")
            else:
                padded = hidden_states.gather(2, indices)
            filtered, gate = (gate_conv(padded) + time_bias).chunk(2, dim=1)
            update = output_conv(filtered.tanh() * gate.sigmoid())
            if output_conv.out_channels > hidden_size:
                residual, update = update.chunk(2, dim=1)
                hidden_states = hidden_states + residual
                if mask is not None:
                    hidden_states = hidden_states * mask
            output = output + update

        if mask is not None:
            output = (output * mask)[..., :num_frames]
        return output.transpose(1, 2)


class FinalLayer(nn.Module):
    """Layer norm modulated by time (shift first, scale added to one), then a linear layer."""

    def __init__(self, time_size: int, hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.time_projection = nn.Linear(time_size, 2 * hidden_size)
        self.linear = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor, time_embeds: torch.Tensor) -> torch.Tensor:
        shift, scale = self.time_projection(F.silu(time_embeds))[:, None].chunk(2, dim=-1)
        return self.linear((1.0 + scale) * self.norm(hidden_states) + shift)


class IndexTTS2SemanticToMelTransformer(ModelMixin, ConfigMixin):
    r"""
    Velocity network of IndexTTS2's flow matching from semantic tokens to a log-mel spectrogram.

    A pipeline calls `add_hidden_states` and `regulate_length` once per utterance to make `content_embeds`, and
    `forward` at each step of the sampler. Guidance is the caller's: the unconditional velocity is that of zeros for
    `prompt_mel`, `content_embeds` and `speaker_embeds`. So are log-mels: all mels that `forward` takes are those of
    `normalize_mel`, and what the sampler ends with goes through `denormalize_mel`.

    Rows of a right-padded batch give what they give alone if their lengths are passed.

    Args:
        num_mel_bins (`int`, defaults to 80):
            Channels of the mel spectrogram.
        hidden_size (`int`, defaults to 512):
            Width of the transformer. The feed-forward is `8 * hidden_size // 3` wide, rounded up to a multiple of 256.
        num_attention_heads (`int`, defaults to 8):
            Heads of each attention; the width of a head must be even.
        num_layers (`int`, defaults to 13):
            Transformer blocks. Block `i < num_layers // 2` hands its output to block `num_layers - 1 - i` (one
            block further down if `num_layers` is even, where block 0 then hands it to none).
        content_size (`int`, defaults to 512):
            Width of `content_embeds`, the output of the length regulator.
        semantic_size (`int`, defaults to 1024):
            Width of `semantic_embeds`.
        speaker_embed_dim (`int`, defaults to 192):
            Width of `speaker_embeds`.
        wavenet_hidden_size (`int`, defaults to 512):
            Width of the WaveNet head.
        wavenet_num_layers (`int`, defaults to 8):
            Convolutions of the WaveNet head.
        wavenet_kernel_size (`int`, defaults to 5):
            Frames each of them sees; odd.
        t2s_hidden_size (`int`, defaults to 1280):
            Width of `t2s_hidden_states`.
        t2s_projection_sizes (`tuple[int, ...]`, defaults to `(256, 128)`):
            Inner widths of the projection from `t2s_hidden_size` to `semantic_size`.
        mel_frames_per_token (`float`, defaults to 1.72):
            Mel frames per semantic token, see `mel_lengths_for`.
        mel_mean (`float`, defaults to 0.0):
            What `normalize_mel` takes from a log-mel, in natural log units.
        mel_std (`float`, defaults to 1.0):
            By what it divides the rest; above 0. Released checkpoints work on log-mels as they are, which spread about
            three times as widely as the noise: a network trained from nothing learns sooner on normalised ones.

    Raises:
        ValueError: if heads do not fit `hidden_size`, `wavenet_kernel_size` is even or `mel_std` is not above 0.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerBlock"]
    _repeated_blocks = ["TransformerBlock"]

    @register_to_config
    def __init__(
        self,
        num_mel_bins: int = 80,
        hidden_size: int = 512,
        num_attention_heads: int = 8,
        num_layers: int = 13,
        content_size: int = 512,
        semantic_size: int = 1024,
        speaker_embed_dim: int = 192,
        wavenet_hidden_size: int = 512,
        wavenet_num_layers: int = 8,
        wavenet_kernel_size: int = 5,
        t2s_hidden_size: int = 1280,
        t2s_projection_sizes: tuple[int, ...] = (256, 128),
        mel_frames_per_token: float = 1.72,
        mel_mean: float = 0.0,
        mel_std: float = 1.0,
    ):
        super().__init__()
        if hidden_size % (2 * num_attention_heads):
            raise ValueError(
                f"`hidden_size` is {hidden_size} but must be a multiple of twice `num_attention_heads` "
                f"({2 * num_attention_heads}): rotary positions need heads of an even width."
            )
        if wavenet_kernel_size % 2 == 0:
            raise ValueError(
                f"`wavenet_kernel_size` is {wavenet_kernel_size} but must be odd, so that a convolution keeps the "
                "number of frames."
            )
        if not mel_std > 0:
            raise ValueError(
                f"`mel_std` is {mel_std} but must be above 0: log-mels are divided by it. 1.0 leaves them as they are."
            )
        self.head_dim = hidden_size // num_attention_heads
        self.gradient_checkpointing = False

        # Semantic tokens to content at the mel rate
        sizes = (t2s_hidden_size, *t2s_projection_sizes, semantic_size)
        # Parity: no activation between the layers.
        self.t2s_projection = nn.Sequential(*(nn.Linear(*pair) for pair in zip(sizes[:-1], sizes[1:], strict=True)))
        self.length_regulator = LengthRegulator(semantic_size, content_size)

        # Diffusion transformer
        self.time_table = Timesteps(TIME_TABLE_SIZE, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(TIME_TABLE_SIZE, hidden_size)
        self.content_projection = nn.Linear(content_size, hidden_size)
        self.input_projection = nn.Linear(2 * num_mel_bins + hidden_size + speaker_embed_dim, hidden_size)
        self.blocks = nn.ModuleList(
            TransformerBlock(hidden_size, num_attention_heads, has_skip=i > num_layers // 2) for i in range(num_layers)
        )
        self.norm = AdaptiveRMSNorm(hidden_size)
        self.skip_projection = nn.Linear(hidden_size + num_mel_bins, hidden_size)

        # WaveNet head
        self.wavenet_time_embedding = TimestepEmbedding(TIME_TABLE_SIZE, wavenet_hidden_size)
        self.wavenet_input_projection = nn.Linear(hidden_size, wavenet_hidden_size)
        self.wavenet = WaveNet(wavenet_hidden_size, wavenet_num_layers, wavenet_kernel_size)
        self.residual_projection = nn.Linear(hidden_size, wavenet_hidden_size)
        self.final_layer = FinalLayer(hidden_size, wavenet_hidden_size)
        self.velocity_projection = nn.Linear(wavenet_hidden_size, num_mel_bins)

    def normalize_mel(self, mel: torch.FloatTensor) -> torch.FloatTensor:
        """A log-mel as `forward` takes it, of any shape. Padding has to be zero after this, not before."""
        return (mel - self.config.mel_mean) / self.config.mel_std

    def denormalize_mel(self, mel: torch.FloatTensor) -> torch.FloatTensor:
        """The log-mel that `normalize_mel` turns into `mel`."""
        return mel * self.config.mel_std + self.config.mel_mean

    @apply_forward_hook
    def add_hidden_states(
        self, semantic_embeds: torch.FloatTensor, t2s_hidden_states: torch.FloatTensor | None
    ) -> torch.FloatTensor:
        r"""
        Adds the projected T2S hidden states of the sampled tokens to their codebook vectors.

        Args:
            semantic_embeds (`torch.FloatTensor` of shape `(batch_size, num_semantic_tokens, semantic_size)`):
                Codebook vectors of the tokens.
            t2s_hidden_states (`torch.FloatTensor` of shape `(batch_size, num_semantic_tokens, t2s_hidden_size)` or `None`):
                T2S states of the same tokens. `None` leaves the whole term out, biases included, as for the prompt and
                for half of the paper's training data.

        Returns:
            `torch.FloatTensor` of the shape of `semantic_embeds`.

        Raises:
            ValueError: if the two do not have the same rows and tokens.
        """
        if t2s_hidden_states is None:
            return semantic_embeds
        if t2s_hidden_states.shape[:2] != semantic_embeds.shape[:2]:
            raise ValueError(
                f"`t2s_hidden_states` has (batch, tokens) {tuple(t2s_hidden_states.shape[:2])} but `semantic_embeds` "
                f"has {tuple(semantic_embeds.shape[:2])}. Leave out the states of the start and stop tokens."
            )
        return semantic_embeds + self.t2s_projection(t2s_hidden_states)

    @apply_forward_hook
    def regulate_length(
        self,
        semantic_embeds: torch.FloatTensor,
        semantic_lengths: torch.LongTensor | None,
        mel_lengths: torch.LongTensor,
    ) -> torch.FloatTensor:
        r"""
        Stretches semantic vectors to the mel rate.

        The result of a row depends on its own length only. A prompt and what is generated after it are two utterances
        here: regulate each alone and concatenate the results.

        Args:
            semantic_embeds (`torch.FloatTensor` of shape `(batch_size, num_semantic_tokens, semantic_size)`):
                Vectors at the token rate, right-padded.
            semantic_lengths (`torch.LongTensor` of shape `(batch_size,)` or `None`):
                Tokens per row, at least 1; `None` if no row is padded.
            mel_lengths (`torch.LongTensor` of shape `(batch_size,)`):
                Mel frames wanted per row, at least 1, for example from `mel_lengths_for`.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, max(mel_lengths), content_size)`, zero behind the end of a row.
        """
        if semantic_lengths is None:
            batch_size, num_semantic_tokens, _ = semantic_embeds.shape
            semantic_lengths = torch.full((batch_size,), num_semantic_tokens, device=semantic_embeds.device)
        return self.length_regulator(semantic_embeds, semantic_lengths, mel_lengths)

    def forward(
        self,
        sample: torch.FloatTensor,
        timestep: torch.FloatTensor,
        prompt_mel: torch.FloatTensor,
        content_embeds: torch.FloatTensor,
        speaker_embeds: torch.FloatTensor,
        mel_lengths: torch.LongTensor | None = None,
        labels: torch.FloatTensor | None = None,
        loss_mask: torch.BoolTensor | None = None,
        return_dict: bool = True,
    ) -> IndexTTS2SemanticToMelOutput | tuple[torch.FloatTensor, ...]:
        r"""
        Velocity of a noisy mel spectrogram. Frames are those of the prompt, then those to generate.

        Args:
            sample (`torch.FloatTensor` of shape `(batch_size, num_mel_frames, num_mel_bins)`):
                Normalised mel at `timestep`, between noise and data; zero on the prompt frames.
            timestep (`torch.FloatTensor` of shape `(batch_size,)`):
                Time of each row, 0 (noise) to 1 (data).
            prompt_mel (`torch.FloatTensor` of shape `(batch_size, num_mel_frames, num_mel_bins)`):
                Normalised mel of the prompt on its frames, zero behind them.
            content_embeds (`torch.FloatTensor` of shape `(batch_size, num_mel_frames, content_size)`):
                Content of prompt and target from `regulate_length`.
            speaker_embeds (`torch.FloatTensor` of shape `(batch_size, speaker_embed_dim)`):
                Voice vector.
            mel_lengths (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Frames per row, prompt included, at least 1. `None` says that no row is padded, and is faster: no
                mask is made or applied.
            labels (`torch.FloatTensor` of shape `(batch_size, num_mel_frames, num_mel_bins)`, *optional*):
                Velocity `data - noise` to predict; gives the loss.
            loss_mask (`torch.BoolTensor` of shape `(batch_size, num_mel_frames)`, *optional*):
                True on the frames that count in the loss: those after the prompt, padding excluded. By default all
                frames within `mel_lengths`.
            return_dict (`bool`, defaults to `True`):
                Whether to return an output object or a plain tuple.

        Returns:
            `IndexTTS2SemanticToMelOutput`, or the tuple `(velocity,)`, with labels `(loss, velocity)`. The loss is the
            L1 distance to `labels`, averaged over the counted frames of each row, then over the rows.

        Raises:
            ValueError: if a tensor does not have the shape named here.
        """
        self._check_inputs(
            sample=sample,
            timestep=timestep,
            prompt_mel=prompt_mel,
            content_embeds=content_embeds,
            speaker_embeds=speaker_embeds,
            mel_lengths=mel_lengths,
            labels=labels,
            loss_mask=loss_mask,
        )
        num_frames = sample.shape[1]
        frame_mask = attention_mask = None
        if mel_lengths is not None:
            frame_mask = lengths_to_mask(mel_lengths, num_frames)
            attention_mask = frame_mask[:, None, None]

        time_table = self.time_table(1000.0 * timestep.float()).to(sample.dtype)
        time_embeds = self.time_embedding(time_table)
        wavenet_time_embeds = self.wavenet_time_embedding(time_table)

        hidden_states = self.input_projection(
            torch.cat(
                [
                    sample,
                    prompt_mel,
                    self.content_projection(content_embeds),
                    speaker_embeds[:, None].expand(-1, num_frames, -1),
                ],
                dim=-1,
            )
        )

        rotary = rotary_table(num_frames, self.head_dim, sample.device)
        skips = []
        for i, block in enumerate(self.blocks):
            skip_states = skips.pop() if block.skip_proj is not None else None
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(
                    block, hidden_states, skip_states, time_embeds, rotary, attention_mask
                )
            else:
                hidden_states = block(hidden_states, skip_states, time_embeds, rotary, attention_mask)
            if i < len(self.blocks) // 2:
                skips.append(hidden_states)
        hidden_states = self.norm(hidden_states, time_embeds)
        hidden_states = self.skip_projection(torch.cat([hidden_states, sample], dim=-1))

        residual = self.residual_projection(hidden_states)
        hidden_states = self.wavenet_input_projection(hidden_states)
        hidden_states = self.wavenet(hidden_states, wavenet_time_embeds, mel_lengths) + residual
        velocity = self.velocity_projection(self.final_layer(hidden_states, time_embeds))
        if frame_mask is not None:
            velocity = velocity * frame_mask[..., None]

        loss = None
        if labels is not None:
            loss = frame_l1_loss(velocity, labels, frame_mask if loss_mask is None else loss_mask)

        output = IndexTTS2SemanticToMelOutput(loss=loss, velocity=velocity)
        return output if return_dict else output.to_tuple()

    def _check_inputs(self, sample: torch.Tensor, **tensors: torch.Tensor | None) -> None:
        batch_size, num_frames = sample.shape[:2]
        mel_shape = (batch_size, num_frames, self.config.num_mel_bins)
        expected_shapes = {
            "sample": mel_shape,
            "timestep": (batch_size,),
            "prompt_mel": mel_shape,
            "content_embeds": (batch_size, num_frames, self.config.content_size),
            "speaker_embeds": (batch_size, self.config.speaker_embed_dim),
            "mel_lengths": (batch_size,),
            "labels": mel_shape,
            "loss_mask": (batch_size, num_frames),
        }
        for name, tensor in {"sample": sample, **tensors}.items():
            if tensor is not None and tuple(tensor.shape) != expected_shapes[name]:
                raise ValueError(
                    f"`{name}` has shape {tuple(tensor.shape)} but {expected_shapes[name]} goes with a `sample` of "
                    f"shape {tuple(sample.shape)} and this checkpoint. Sequences are (batch, time, channels); pad all "
                    "of them to the same number of frames, prompt included."
                )
