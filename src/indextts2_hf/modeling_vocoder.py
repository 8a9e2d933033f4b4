"""
The vocoder: mel frames to waveform (BigVGAN v2 in plain PyTorch).

Knows nothing of text, semantic tokens or the way a mel is computed. The network is fully convolutional: a short stack of
transposed convolutions, each followed by residual blocks whose periodic activation runs at twice the rate to keep the
harmonics it creates from folding back.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import nn


# The low-pass filter around every activation. Constants of BigVGAN v2, so not configuration.
NUM_FILTER_TAPS = 12
FILTER_CUTOFF = 0.25  # of the doubled rate: half the band, where the images of the upsampling begin
FILTER_HALF_WIDTH = 0.3


@dataclass
class IndexTTS2VocoderOutput(BaseOutput):
    r"""
    Output of [`IndexTTS2Vocoder`].

    Args:
        waveform (`torch.Tensor` of shape `(batch_size, num_mel_frames * hop_length)`):
            Samples in [-1, 1], zero beyond a row's end.
    """

    waveform: torch.Tensor


def kaiser_sinc_filter() -> torch.Tensor:
    r"""
    The 12 taps of the low-pass filter, symmetric, with sum 1.

    A sinc of cutoff 0.25 at the half-integer times -5.5 … 5.5, under a Kaiser window whose shape follows from the width of
    the transition band.
    """
    half_length = NUM_FILTER_TAPS // 2
    attenuation = 2.285 * (half_length - 1) * math.pi * 4 * FILTER_HALF_WIDTH + 7.95
    beta = 0.1102 * (attenuation - 8.7)  # Kaiser's formula for more than 50 dB
    window = torch.kaiser_window(NUM_FILTER_TAPS, periodic=False, beta=beta, dtype=torch.float64)
    times = torch.arange(-half_length, half_length, dtype=torch.float64) + 0.5
    taps = window * torch.sinc(2 * FILTER_CUTOFF * times)
    return (taps / taps.sum()).float()


def zero_beyond_end(hidden_states: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    r"""What the zero padding of a convolution must find after `lengths` frames of `(batch_size, channels, frames)`."""
    if lengths is None:
        return hidden_states
    positions = torch.arange(hidden_states.shape[-1], device=hidden_states.device)
    return hidden_states.masked_fill((positions >= lengths[:, None])[:, None], 0.0)


def repeat_beyond_end(hidden_states: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    r"""What the replicate padding of a filter must find after `lengths` frames of `(batch_size, channels, frames)`."""
    if lengths is None:
        return hidden_states
    positions = torch.arange(hidden_states.shape[-1], device=hidden_states.device)
    positions = torch.minimum(positions, lengths[:, None] - 1).clamp(min=0)
    return hidden_states.gather(-1, positions[:, None].expand_as(hidden_states))


def repeat_edges(hidden_states: torch.Tensor, left: int, right: int) -> torch.Tensor:
    r"""Replicate padding along the last axis. Several times faster on CPU than `F.pad` with `mode="replicate"`."""
    first = hidden_states[..., :1].expand(-1, -1, left)
    last = hidden_states[..., -1:].expand(-1, -1, right)
    return torch.cat([first, hidden_states, last], dim=-1)


def upsample_twice(hidden_states: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    r"""Low-pass interpolation of `(batch_size, channels, frames)` to `(batch_size, channels, 2 * frames)`."""
    channels = hidden_states.shape[1]
    # Filling every second sample with zero halves the level, hence the gain of 2.
    weight = (2 * taps).expand(channels, 1, NUM_FILTER_TAPS)
    return F.conv_transpose1d(repeat_edges(hidden_states, 5, 5), weight, stride=2, padding=15, groups=channels)


def downsample_twice(hidden_states: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    r"""Low-pass decimation of `(batch_size, channels, 2 * frames)` to `(batch_size, channels, frames)`."""
    channels = hidden_states.shape[1]
    weight = taps.expand(channels, 1, NUM_FILTER_TAPS)
    return F.conv1d(repeat_edges(hidden_states, 5, 6), weight, stride=2, groups=channels)


class AntiAliasedSnake(nn.Module):
    r"""
    Periodic activation `x + sin²(αx) / β` at twice the rate, between two low-pass filters.

    Args:
        channels (`int`):
            Each channel has its own α and β, stored as logarithms.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.zeros(channels))
        self.log_beta = nn.Parameter(torch.zeros(channels))

    def forward(
        self,
        hidden_states: torch.Tensor,
        taps: torch.Tensor,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden_states = upsample_twice(repeat_beyond_end(hidden_states, lengths), taps)
        # In place where nothing else looks: these tensors have twice the rate of everything around them.
        wave = (hidden_states * self.log_alpha.exp()[:, None]).sin_().square_()
        # Parity: the 1e-9 of the original, though an exponential is never zero.
        hidden_states = wave.mul_(1 / (self.log_beta.exp()[:, None] + 1e-9)).add_(hidden_states)
        hidden_states = repeat_beyond_end(hidden_states, None if lengths is None else 2 * lengths)
        return zero_beyond_end(downsample_twice(hidden_states, taps), lengths)


class AMPLayer(nn.Module):
    r"""Residual layer: activation, dilated convolution, activation, convolution."""

    def __init__(self, channels: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        padding = (kernel_size - 1) // 2
        self.activation_1 = AntiAliasedSnake(channels)
        self.conv_1 = nn.Conv1d(channels, channels, kernel_size, padding=padding * dilation, dilation=dilation)
        self.activation_2 = AntiAliasedSnake(channels)
        self.conv_2 = nn.Conv1d(channels, channels, kernel_size, padding=padding)

    def forward(
        self,
        hidden_states: torch.Tensor,
        taps: torch.Tensor,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.conv_1(self.activation_1(hidden_states, taps, lengths))
        hidden_states = self.conv_2(self.activation_2(hidden_states, taps, lengths))
        return residual + hidden_states


class AMPBlock(nn.Module):
    r"""Anti-aliased multi-periodicity block: residual layers of one kernel size and growing dilation."""

    def __init__(self, channels: int, kernel_size: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([AMPLayer(channels, kernel_size, dilation) for dilation in dilations])

    def forward(
        self,
        hidden_states: torch.Tensor,
        taps: torch.Tensor,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states, taps, lengths)
        return hidden_states


class UpsamplingStage(nn.Module):
    r"""
    One transposed convolution that multiplies the rate and halves the channels, and the blocks that refine its result.

    The blocks see the same input, each with another kernel size; the stage gives their mean.
    """

    def __init__(
        self,
        channels: int,
        rate: int,
        kernel_size: int,
        block_kernel_sizes: tuple[int, ...],
        block_dilations: tuple[tuple[int, ...], ...],
    ) -> None:
        super().__init__()
        self.rate = rate
        self.upsample = nn.ConvTranspose1d(
            channels, channels // 2, kernel_size, rate, padding=(kernel_size - rate) // 2
        )
        self.blocks = nn.ModuleList(
            [
                AMPBlock(channels // 2, block_kernel_size, dilations)
                for block_kernel_size, dilations in zip(block_kernel_sizes, block_dilations, strict=True)
            ]
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        taps: torch.Tensor,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden_states = self.upsample(zero_beyond_end(hidden_states, lengths))
        lengths = None if lengths is None else lengths * self.rate
        refined = 0
        for block in self.blocks:
            refined = refined + block(hidden_states, taps, lengths)
        return refined / len(self.blocks)


class IndexTTS2Vocoder(ModelMixin, ConfigMixin):
    r"""
    BigVGAN v2 generator.

    The released system runs it in float32 whatever the dtype of the networks before it.

    Args:
        num_mel_bins (`int`, defaults to 80):
            Bands of the mel.
        initial_channels (`int`, defaults to 1536):
            Width before the first stage; every stage halves it.
        upsample_rates (`tuple[int, ...]`, defaults to `(4, 4, 2, 2, 2, 2)`):
            Factor of each stage. Their product is the number of samples per mel frame, `hop_length`.
        upsample_kernel_sizes (`tuple[int, ...]`, defaults to `(8, 8, 4, 4, 4, 4)`):
            Kernel size of each stage's transposed convolution; exceeds the factor by an even number.
        resblock_kernel_sizes (`tuple[int, ...]`, defaults to `(3, 7, 11)`):
            Kernel sizes of the parallel blocks of a stage; odd.
        resblock_dilations (`tuple[tuple[int, ...], ...]`, defaults to `((1, 3, 5), (1, 3, 5), (1, 3, 5))`):
            For each of these blocks the dilations of its layers.
        sampling_rate (`int`, defaults to 22050):
            Samples per second of the waveform, in Hz.

    Attributes:
        hop_length (`int`): samples per mel frame (256).
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["UpsamplingStage"]
    _repeated_blocks = ["AMPBlock"]

    @register_to_config
    def __init__(
        self,
        num_mel_bins: int = 80,
        initial_channels: int = 1536,
        upsample_rates: tuple[int, ...] = (4, 4, 2, 2, 2, 2),
        upsample_kernel_sizes: tuple[int, ...] = (8, 8, 4, 4, 4, 4),
        resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11),
        resblock_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5)),
        sampling_rate: int = 22050,
    ) -> None:
        super().__init__()
        if len(upsample_rates) != len(upsample_kernel_sizes):
            raise ValueError(
                f"`upsample_rates` has {len(upsample_rates)} stages but `upsample_kernel_sizes` has "
                f"{len(upsample_kernel_sizes)}. Give one kernel size per stage."
            )
        if len(resblock_kernel_sizes) != len(resblock_dilations):
            raise ValueError(
                f"`resblock_kernel_sizes` has {len(resblock_kernel_sizes)} blocks but `resblock_dilations` has "
                f"{len(resblock_dilations)}. Give one list of dilations per block."
            )
        for rate, kernel_size in zip(upsample_rates, upsample_kernel_sizes, strict=True):
            if kernel_size < rate or (kernel_size - rate) % 2:
                raise ValueError(
                    f"A stage has upsampling rate {rate} and kernel size {kernel_size}; the kernel size must exceed the "
                    "rate by an even number (0, 2, 4, …) or the waveform would not have `hop_length` samples per frame."
                )
        if any(kernel_size % 2 == 0 for kernel_size in resblock_kernel_sizes):
            raise ValueError(f"`resblock_kernel_sizes` is {tuple(resblock_kernel_sizes)} but every size must be odd.")
        if initial_channels % 2 ** len(upsample_rates):
            raise ValueError(
                f"`initial_channels` is {initial_channels}, which cannot be halved {len(upsample_rates)} times, once per "
                f"stage. Choose a multiple of {2 ** len(upsample_rates)}."
            )
        self.hop_length = math.prod(upsample_rates)
        self.num_mel_bins = num_mel_bins

        self.conv_in = nn.Conv1d(num_mel_bins, initial_channels, 7, padding=3)
        self.stages = nn.ModuleList(
            [
                UpsamplingStage(initial_channels // 2**i, rate, kernel_size, resblock_kernel_sizes, resblock_dilations)
                for i, (rate, kernel_size) in enumerate(zip(upsample_rates, upsample_kernel_sizes, strict=True))
            ]
        )
        channels = initial_channels // 2 ** len(upsample_rates)
        self.activation_out = AntiAliasedSnake(channels)
        self.conv_out = nn.Conv1d(channels, 1, 7, padding=3, bias=False)
        # One filter serves every activation. It is saved, so it is right however the weights come in.
        self.register_buffer("filter_taps", kaiser_sinc_filter())
        self.gradient_checkpointing = False

    def forward(
        self,
        mel: torch.Tensor,
        mel_lengths: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> IndexTTS2VocoderOutput | tuple[torch.Tensor]:
        r"""
        Waveform of a batch of mels.

        Args:
            mel (`torch.Tensor` of shape `(batch_size, num_mel_frames, num_mel_bins)`):
                Natural logarithm of the mel magnitudes.
            mel_lengths (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Frames per row of a right-padded batch; a row then gives what it gives alone. `None` means that every row
                fills the batch, and costs nothing.
            return_dict (`bool`, defaults to `True`):
                Whether to return an [`IndexTTS2VocoderOutput`] or a plain tuple.

        Returns:
            [`IndexTTS2VocoderOutput`] or `tuple`.

        Raises:
            ValueError: if `mel` is not a batch or has another number of bands.
        """
        if mel.ndim != 3 or mel.shape[-1] != self.num_mel_bins:
            raise ValueError(
                f"`mel` has shape {tuple(mel.shape)} but the vocoder expects (batch_size, num_mel_frames, "
                f"{self.num_mel_bins}). Transpose a mel that has its bands first."
            )
        taps, lengths = self.filter_taps, mel_lengths
        hidden_states = self.conv_in(zero_beyond_end(mel.transpose(1, 2), lengths))
        for stage in self.stages:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(stage, hidden_states, taps, lengths)
            else:
                hidden_states = stage(hidden_states, taps, lengths)
            lengths = None if lengths is None else lengths * stage.rate
        hidden_states = self.conv_out(self.activation_out(hidden_states, taps, lengths))
        # Parity: the released vocoder clips; it has no tanh.
        waveform = zero_beyond_end(hidden_states, lengths).squeeze(1).clamp(-1.0, 1.0)
        if not return_dict:
            return (waveform,)
        return IndexTTS2VocoderOutput(waveform=waveform)
