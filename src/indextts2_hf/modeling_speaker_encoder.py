"""
The speaker encoder: filter-bank frames of a voice to one vector (CAM++).

Knows nothing of audio files; the filter bank is the feature extractor's. A two-dimensional convolutional head looks at time
and frequency, a densely connected time-delay network follows, and the mean and standard deviation over time become the
embedding.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import nn


# Sizes that are constants of CAM++ and not configuration.
HEAD_CHANNELS = 32
HEAD_STRIDE = 8  # bands that become one on the way through the head
INPUT_KERNEL_SIZE = 5
DENSE_KERNEL_SIZE = 3
BLOCK_DILATIONS = (1, 2, 2)
CONTEXT_WINDOW = 100  # frames of 20 ms that share one local context
CONTEXT_REDUCTION = 2

# The trunk keeps every second frame, and a standard deviation needs two of them.
MIN_FRAMES = 3


@dataclass
class IndexTTS2SpeakerEncoderOutput(BaseOutput):
    r"""
    Output of [`IndexTTS2SpeakerEncoder`].

    Args:
        speaker_embeds (`torch.Tensor` of shape `(batch_size, embed_dim)`):
            One vector per clip, not normalised to unit length.
    """

    speaker_embeds: torch.Tensor


class FrequencyResidualBlock(nn.Module):
    r"""Two 3 × 3 convolutions with a shortcut, on `(batch_size, 32, num_bands, num_frames)`; `stride` divides the bands."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(HEAD_CHANNELS, HEAD_CHANNELS, 3, stride=(stride, 1), padding=1, bias=False)
        self.norm_1 = nn.BatchNorm2d(HEAD_CHANNELS)
        self.conv_2 = nn.Conv2d(HEAD_CHANNELS, HEAD_CHANNELS, 3, padding=1, bias=False)
        self.norm_2 = nn.BatchNorm2d(HEAD_CHANNELS)
        self.shortcut = nn.Identity()
        if stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(HEAD_CHANNELS, HEAD_CHANNELS, 1, stride=(stride, 1), bias=False),
                nn.BatchNorm2d(HEAD_CHANNELS),
            )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = self.shortcut(hidden_states)
        hidden_states = F.relu(self.norm_1(self.conv_1(hidden_states)))
        hidden_states = self.norm_2(self.conv_2(hidden_states))
        return F.relu(hidden_states + residual)


class FrequencyHead(nn.Module):
    r"""Reads the filter bank as an image and folds its bands, eight to one, into channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(1, HEAD_CHANNELS, 3, padding=1, bias=False)
        self.norm_in = nn.BatchNorm2d(HEAD_CHANNELS)
        self.blocks = nn.ModuleList([FrequencyResidualBlock(stride) for stride in (2, 1, 2, 1)])
        self.conv_out = nn.Conv2d(HEAD_CHANNELS, HEAD_CHANNELS, 3, stride=(2, 1), padding=1, bias=False)
        self.norm_out = nn.BatchNorm2d(HEAD_CHANNELS)
        self.gradient_checkpointing = False

    def forward(self, fbank: torch.Tensor) -> torch.Tensor:
        hidden_states = fbank.transpose(1, 2).unsqueeze(1)
        hidden_states = F.relu(self.norm_in(self.conv_in(hidden_states)))
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states)
            else:
                hidden_states = block(hidden_states)
        hidden_states = F.relu(self.norm_out(self.conv_out(hidden_states)))
        return hidden_states.flatten(1, 2)


class ContextAwareMasking(nn.Module):
    r"""Convolution whose channels are gated by their context: the mean of the clip plus the mean of 100 frames around."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(
            in_channels, out_channels, DENSE_KERNEL_SIZE, padding=dilation, dilation=dilation, bias=False
        )
        self.gate_in = nn.Conv1d(in_channels, in_channels // CONTEXT_REDUCTION, 1)
        self.gate_out = nn.Conv1d(in_channels // CONTEXT_REDUCTION, out_channels, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        num_frames = hidden_states.shape[-1]
        # Parity: a last window that is not full is the mean of the frames it has.
        local = F.avg_pool1d(hidden_states, CONTEXT_WINDOW, CONTEXT_WINDOW, ceil_mode=True)
        context = hidden_states.mean(dim=-1, keepdim=True) + local
        gate = self.gate_out(F.relu(self.gate_in(context))).sigmoid()
        return self.conv(hidden_states) * gate.repeat_interleave(CONTEXT_WINDOW, dim=-1)[..., :num_frames]


class DenseLayer(nn.Module):
    r"""Appends `growth_rate` new channels to those it is given."""

    def __init__(self, in_channels: int, growth_rate: int, bottleneck_channels: int, dilation: int) -> None:
        super().__init__()
        self.norm_1 = nn.BatchNorm1d(in_channels)
        self.bottleneck = nn.Conv1d(in_channels, bottleneck_channels, 1, bias=False)
        self.norm_2 = nn.BatchNorm1d(bottleneck_channels)
        self.masking = ContextAwareMasking(bottleneck_channels, growth_rate, dilation)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        new_channels = self.bottleneck(F.relu(self.norm_1(hidden_states)))
        new_channels = self.masking(F.relu(self.norm_2(new_channels)))
        return torch.cat([hidden_states, new_channels], dim=1)


class DenseBlock(nn.Module):
    r"""Dense layers of one dilation, then a 1 × 1 convolution that halves the channels they have piled up."""

    def __init__(
        self, in_channels: int, num_layers: int, growth_rate: int, bottleneck_channels: int, dilation: int
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                DenseLayer(in_channels + i * growth_rate, growth_rate, bottleneck_channels, dilation)
                for i in range(num_layers)
            ]
        )
        channels = in_channels + num_layers * growth_rate
        self.out_channels = channels // 2
        self.norm = nn.BatchNorm1d(channels)
        self.conv = nn.Conv1d(channels, self.out_channels, 1, bias=False)
        self.gradient_checkpointing = False

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(layer, hidden_states)
            else:
                hidden_states = layer(hidden_states)
        return self.conv(F.relu(self.norm(hidden_states)))


class IndexTTS2SpeakerEncoder(ModelMixin, ConfigMixin):
    r"""
    CAM++ speaker encoder.

    Its statistics run over the whole clip, so clips of different lengths cannot share a padded batch: a voice is encoded
    alone, once. A batch holds clips of equal length, as training crops are.

    Args:
        num_mel_bins (`int`, defaults to 80):
            Bands of the filter bank, a multiple of 8.
        embed_dim (`int`, defaults to 192):
            Size of the embedding.
        growth_rate (`int`, defaults to 32):
            Channels each dense layer adds.
        bottleneck_factor (`int`, defaults to 4):
            Width inside a dense layer, in units of `growth_rate`.
        initial_channels (`int`, defaults to 128):
            Width before the first block.
        block_layers (`tuple[int, int, int]`, defaults to `(12, 24, 16)`):
            Dense layers of each of the three blocks.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["FrequencyHead", "DenseBlock"]

    @register_to_config
    def __init__(
        self,
        num_mel_bins: int = 80,
        embed_dim: int = 192,
        growth_rate: int = 32,
        bottleneck_factor: int = 4,
        initial_channels: int = 128,
        block_layers: tuple[int, int, int] = (12, 24, 16),
    ) -> None:
        super().__init__()
        if num_mel_bins % HEAD_STRIDE:
            raise ValueError(
                f"`num_mel_bins` is {num_mel_bins} but the head joins {HEAD_STRIDE} bands into one. "
                f"Choose a multiple of {HEAD_STRIDE}."
            )
        if len(block_layers) != len(BLOCK_DILATIONS):
            raise ValueError(
                f"`block_layers` has {len(block_layers)} entries but the network has {len(BLOCK_DILATIONS)} blocks. "
                "Give the number of layers of each."
            )
        self.num_mel_bins = num_mel_bins

        self.head = FrequencyHead()
        self.conv_in = nn.Conv1d(
            HEAD_CHANNELS * num_mel_bins // HEAD_STRIDE,
            initial_channels,
            INPUT_KERNEL_SIZE,
            stride=2,
            padding=INPUT_KERNEL_SIZE // 2,
            bias=False,
        )
        self.norm_in = nn.BatchNorm1d(initial_channels)
        self.blocks = nn.ModuleList()
        channels = initial_channels
        for num_layers, dilation in zip(block_layers, BLOCK_DILATIONS, strict=True):
            block = DenseBlock(channels, num_layers, growth_rate, bottleneck_factor * growth_rate, dilation)
            self.blocks.append(block)
            channels = block.out_channels
        self.norm_out = nn.BatchNorm1d(channels)
        self.projection = nn.Linear(2 * channels, embed_dim, bias=False)
        self.projection_norm = nn.BatchNorm1d(embed_dim, affine=False)

    def forward(
        self, fbank: torch.Tensor, return_dict: bool = True
    ) -> IndexTTS2SpeakerEncoderOutput | tuple[torch.Tensor]:
        r"""
        Embedding of each clip.

        Args:
            fbank (`torch.Tensor` of shape `(batch_size, num_frames, num_mel_bins)`):
                Log filter bank at 100 frames per second with its mean over time removed; at least 3 frames. Every frame
                counts: there is no mask.
            return_dict (`bool`, defaults to `True`):
                Whether to return an [`IndexTTS2SpeakerEncoderOutput`] or a plain tuple.

        Returns:
            [`IndexTTS2SpeakerEncoderOutput`] or `tuple`.

        Raises:
            ValueError: if `fbank` is not a batch, has another number of bands, or is too short.
        """
        if fbank.ndim != 3 or fbank.shape[-1] != self.num_mel_bins:
            raise ValueError(
                f"`fbank` has shape {tuple(fbank.shape)} but the speaker encoder expects (batch_size, num_frames, "
                f"{self.num_mel_bins}). Use the `speaker_fbank` of the feature extractor."
            )
        if fbank.shape[1] < MIN_FRAMES:
            raise ValueError(
                f"`fbank` has {fbank.shape[1]} frames but the speaker encoder needs at least {MIN_FRAMES} (45 ms of "
                "audio). Give a longer clip; a few seconds make a good voice."
            )
        hidden_states = self.head(fbank)
        hidden_states = F.relu(self.norm_in(self.conv_in(hidden_states)))
        for block in self.blocks:
            hidden_states = block(hidden_states)
        hidden_states = F.relu(self.norm_out(hidden_states))
        # Parity: the unbiased deviation, with no epsilon under the root.
        statistics = torch.cat([hidden_states.mean(dim=-1), hidden_states.std(dim=-1)], dim=-1)
        speaker_embeds = self.projection_norm(self.projection(statistics))
        if not return_dict:
            return (speaker_embeds,)
        return IndexTTS2SpeakerEncoderOutput(speaker_embeds=speaker_embeds)
