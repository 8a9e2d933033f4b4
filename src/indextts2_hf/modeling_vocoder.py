"""
The vocoder: mel frames to waveform (BigVGAN v2 in plain PyTorch).

Knows nothing of text or semantic tokens. The network is fully convolutional: a short stack of transposed convolutions, each
followed by residual blocks whose periodic activation runs at twice the rate to keep the harmonics it creates from folding back.

A convolutional network must find in the mel where the pulses of the voice lie, which published ones learn in a million steps. A
small one may be given a draft of the waveform, with pulses at the pitch that a few layers read from the mel, and refine it.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import nn
from transformers.audio_utils import mel_filter_bank


# The low-pass filter around every activation. Constants of BigVGAN v2, so not configuration.
NUM_FILTER_TAPS = 12
FILTER_CUTOFF = 0.25  # of the doubled rate: half the band, where the images of the upsampling begin
FILTER_HALF_WIDTH = 0.3

# The pitch of a draft: limits in Hz, and how many pitches between them, evenly spaced in octaves, are weighed.
PITCH_LIMITS = (60.0, 600.0)
NUM_PITCHES = 64
# Bands in which it mixes pulses and noise.
NUM_PERIODICITY_BANDS = 6
# How often the bands of a draft are brought to those of the mel, which overlap.
NUM_EQUALIZATIONS = 2
# Brings a log-mel of speech without its level near 1.
LOG_MEL_SCALE = 2.0


@dataclass
class IndexTTS2VocoderOutput(BaseOutput):
    r"""
    Output of [`IndexTTS2Vocoder`].

    Args:
        waveform (`torch.Tensor` of shape `(batch_size, num_mel_frames * hop_length)`):
            Samples in [-1, 1], zero beyond a row's end.
        pitch (`torch.Tensor` of shape `(batch_size, num_mel_frames)`, *optional*):
            What a vocoder with a source reads from the mel, in Hz; anything where there is no voice.
        pitch_logits (`torch.Tensor` of shape `(batch_size, num_mel_frames, 64)`, *optional*):
            Of the pitches whose mean that is, evenly spaced in octaves between `PITCH_LIMITS`.
        periodicity (`torch.Tensor` of shape `(batch_size, num_mel_frames, 6)`, *optional*):
            What it reads as the share of the pulses in wide bands, 0 to 1.
    """

    waveform: torch.Tensor
    pitch: torch.Tensor | None = None
    pitch_logits: torch.Tensor | None = None
    periodicity: torch.Tensor | None = None


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
        from_source: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden_states = self.upsample(zero_beyond_end(hidden_states, lengths))
        if from_source is not None:
            hidden_states = hidden_states + from_source
        lengths = None if lengths is None else lengths * self.rate
        refined = 0
        for block in self.blocks:
            refined = refined + block(hidden_states, taps, lengths)
        return refined / len(self.blocks)


def make_pulses(pitch: torch.Tensor, hop_length: int, sampling_rate: int) -> torch.Tensor:
    r"""
    Band-limited pulses of power 1.

    Args:
        pitch (`torch.Tensor` of shape `(batch_size, num_frames)`): in Hz, at the middle of each frame.
        hop_length (`int`): samples per frame.
        sampling_rate (`int`): in Hz.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_frames * hop_length)`: all harmonics below half the sampling rate, alike.
    """
    pitch = F.interpolate(pitch[:, None], scale_factor=hop_length, mode="linear")[:, 0]
    # Periods since the beginning, in two steps, so that float32 is precise after minutes.
    inside = (pitch / sampling_rate).unflatten(1, (-1, hop_length)).cumsum(dim=2)
    before = F.pad(inside[:, :-1, -1] % 1.0, (1, 0)).cumsum(dim=1)
    half_phase = math.pi * ((inside + before[..., None]).flatten(1) % 1.0)
    count = (sampling_rate / 2 / pitch).floor()
    # The sum of the cosines of `count` harmonics (Dirichlet's kernel); at the pulse itself it is `count`.
    sine = half_phase.sin()
    is_pulse = sine < 1e-4
    kernel = ((2 * count + 1) * half_phase).sin() / sine.masked_fill(is_pulse, 1.0)
    return (torch.where(is_pulse, 2 * count + 1, kernel) - 1) / (2 * count).sqrt()


class HarmonicSource(nn.Module):
    r"""
    A draft of the waveform: pulses and noise, mixed in each band as some layers read from the mel, at the level of the mel.

    After the neural source-filter model (arXiv 1904.12088), whose filter here needs no weights; ours otherwise. Neither the paper of
    IndexTTS2 nor BigVGAN has it.

    Args:
        num_mel_bins, sampling_rate, hop_length, n_fft, win_length, mel_fmin, mel_fmax: as of the mel.
        hidden_size (`int`): width of the layers.
    """

    def __init__(
        self,
        num_mel_bins: int,
        sampling_rate: int,
        hop_length: int,
        n_fft: int,
        win_length: int,
        mel_fmin: float,
        mel_fmax: float | None,
        hidden_size: int,
    ) -> None:
        super().__init__()
        self.sampling_rate = sampling_rate
        self.hop_length = hop_length
        self.n_fft = n_fft
        self.win_length = win_length
        sizes = [num_mel_bins, hidden_size, hidden_size, hidden_size]
        self.layers = nn.ModuleList(
            [nn.Conv1d(*pair, 5, padding=2) for pair in zip(sizes[:-1], sizes[1:], strict=True)]
        )
        self.pitch_projection = nn.Conv1d(hidden_size, NUM_PITCHES, 1)
        self.periodicity_projection = nn.Conv1d(hidden_size, NUM_PERIODICITY_BANDS, 1)
        highest = sampling_rate / 2
        settings = {"sampling_rate": sampling_rate, "mel_scale": "slaney"}
        filters = mel_filter_bank(
            n_fft // 2 + 1,
            num_mel_bins,
            mel_fmin,
            highest if mel_fmax is None else mel_fmax,
            norm="slaney",
            **settings,
        )
        bands = mel_filter_bank(n_fft // 2 + 1, NUM_PERIODICITY_BANDS, 0.0, highest, **settings)
        # The first and the last reach to the edges, so that a bin's shares of the bands sum to one.
        middles = bands.argmax(axis=0)
        bands[: middles[0], 0] = bands[middles[-1] :, -1] = 1.0
        bands /= bands.sum(axis=1, keepdims=True)
        window = F.pad(torch.hann_window(win_length), ((n_fft - win_length) // 2, (n_fft - win_length + 1) // 2))
        # Saved, so they are right however the weights come in.
        self.register_buffer("mel_filters", torch.from_numpy(filters).float())
        self.register_buffer("bands", torch.from_numpy(bands).float())
        self.register_buffer("window", window)

    def read_mel(
        self, mel: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        r"""
        What is needed of a mel for a draft: all that has weights here.

        Args:
            mel (`torch.Tensor` of shape `(batch_size, num_mel_bins, num_frames)`): natural logarithms.
            lengths (`torch.LongTensor` of shape `(batch_size,)`, *optional*): frames of each row.

        Returns:
            Pitch `(batch_size, num_frames)` in Hz, logits `(batch_size, num_frames, 64)` of the pitches whose mean it is, and
            periodicity `(batch_size, num_frames, 6)` (`measure_periodicity`).
        """
        # Neither depends on the level.
        hidden_states = (mel - mel.mean(dim=1, keepdim=True)) / LOG_MEL_SCALE
        for layer in self.layers:
            hidden_states = F.gelu(layer(zero_beyond_end(hidden_states, lengths)))
        logits = self.pitch_projection(hidden_states).float()
        lowest, highest = PITCH_LIMITS
        octaves = torch.linspace(0, math.log2(highest / lowest), NUM_PITCHES, device=mel.device)
        octaves = octaves @ logits.softmax(dim=1)
        pitch = lowest * repeat_beyond_end(octaves[:, None], lengths)[:, 0].exp2()
        periodicity = self.periodicity_projection(hidden_states).float().sigmoid()
        return pitch, logits.transpose(1, 2), periodicity.transpose(1, 2)

    @torch.no_grad()
    def measure_periodicity(self, waveform: torch.Tensor, pitch: torch.Tensor) -> torch.Tensor:
        r"""
        How far a waveform repeats itself from one period to the next.

        Args:
            waveform (`torch.Tensor` of shape `(batch_size, num_frames * hop_length)`): samples in [-1, 1].
            pitch (`torch.Tensor` of shape `(batch_size, num_frames)`): in Hz.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_frames, 6)`: in wide bands the autocorrelation at one period by the
            power, over that of the window (Boersma 1993), 0 to 1.
        """
        power = self.transform(waveform).abs().square()
        period = self.sampling_rate / pitch[..., None]
        bins = torch.arange(power.shape[-1], device=power.device)
        correlation = (power * (2 * math.pi * bins * period / self.n_fft).cos()) @ self.bands
        # The autocorrelation of a Hann window.
        share = (period / self.win_length).clamp(max=0.8)
        angle = 2 * math.pi * share
        window = (1 - share) * (2 + angle.cos()) / 3 + angle.sin() / (2 * math.pi)
        return (correlation / (power @ self.bands).clamp(min=1e-12) / window).clamp(0.0, 1.0)

    def transform(self, waveform: torch.Tensor) -> torch.Tensor:
        r"""`(batch_size, num_samples)` to spectra `(batch_size, num_frames, n_fft / 2 + 1)` at the places of the mel's frames."""
        padding = self.n_fft - self.hop_length
        frames = F.pad(waveform, (padding // 2, padding - padding // 2)).unfold(1, self.n_fft, self.hop_length)
        return torch.fft.rfft(frames * self.window.float())

    def overlap_add(self, spectra: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        r"""The inverse of `transform`."""
        window = self.window.float()
        frames = zero_beyond_end((torch.fft.irfft(spectra, self.n_fft) * window).transpose(1, 2), lengths)
        weights = zero_beyond_end(window.square()[None, :, None].expand_as(frames), lengths)
        num_samples = frames.shape[2] * self.hop_length
        padding = self.n_fft - self.hop_length
        size = (1, num_samples + padding)
        total, weight = (
            F.fold(part, size, (1, self.n_fft), stride=(1, self.hop_length)).flatten(1) for part in (frames, weights)
        )
        return (total / weight.clamp(min=1e-3))[:, padding // 2 :][:, :num_samples]

    def forward(
        self, mel: torch.Tensor, lengths: torch.Tensor | None = None, pitch: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        r"""
        Args:
            mel (`torch.Tensor` of shape `(batch_size, num_mel_bins, num_frames)`): natural logarithms.
            lengths (`torch.LongTensor` of shape `(batch_size,)`, *optional*): frames of each row.
            pitch (`torch.Tensor` of shape `(batch_size, num_frames)`, *optional*): in Hz, instead of what is read.

        Returns:
            The draft `(batch_size, num_samples)`, and pitch, logits and periodicity as `read_mel` gives them. They learn from
            recordings alone: the draft gives them no gradient.
        """
        found, logits, periodicity = self.read_mel(mel, lengths)
        pitch = (
            found.detach() if pitch is None else repeat_beyond_end(pitch[:, None], lengths)[:, 0].clamp(*PITCH_LIMITS)
        )
        with torch.autocast(mel.device.type, enabled=False):
            draft = self.draw(mel.float(), lengths, pitch, periodicity.detach())
        return draft.to(mel.dtype), found, logits, periodicity

    def draw(
        self, mel: torch.Tensor, lengths: torch.Tensor | None, pitch: torch.Tensor, periodicity: torch.Tensor
    ) -> torch.Tensor:
        r"""The draft in float32, whatever the precision of the layers."""
        pulses = make_pulses(pitch, self.hop_length, self.sampling_rate)
        # The same noise for the same frames, whatever else is in the batch; in training another one every time.
        generator = None if self.training else torch.Generator().manual_seed(0)
        num_samples = pulses.shape[1]
        # PyTorch draws sixteen at a time, and the rest otherwise.
        noise = torch.randn(-(-num_samples // 16) * 16, generator=generator)[:num_samples].to(pulses).expand_as(pulses)
        ends = None if lengths is None else lengths * self.hop_length
        pulses, noise = (self.transform(zero_beyond_end(part[:, None], ends)[:, 0]) for part in (pulses, noise))
        # What a bin takes from the bands it lies in.
        filters = self.mel_filters.float()
        shares = (filters / filters.sum(dim=1, keepdim=True).clamp(min=1e-9)).T
        share = periodicity @ self.bands.float().T
        spectra = pulses * share + noise * (1 - share)
        for _ in range(NUM_EQUALIZATIONS):
            level = (spectra.abs() @ filters).clamp(min=1e-5).log()
            spectra = spectra * ((mel.transpose(1, 2) - level).exp() @ shares)
        return self.overlap_add(spectra, lengths)


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
        use_source (`bool`, defaults to `False`):
            Whether a [`HarmonicSource`] makes a draft, which every stage hears and to which the network adds. Not in BigVGAN.
        source_hidden_size (`int`, defaults to 128):
            Width of the layers that read pitch and periodicity for it.
        n_fft, win_length (`int`, default to 1024):
            Transform and window of the mel, in samples, for the source.
        mel_fmin (`float`, defaults to 0.0), mel_fmax (`float`, *optional*):
            Edges of the mel in Hz, for the source.

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
        use_source: bool = False,
        source_hidden_size: int = 128,
        n_fft: int = 1024,
        win_length: int = 1024,
        mel_fmin: float = 0.0,
        mel_fmax: float | None = None,
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
        self.source = None
        if use_source:
            self.source = HarmonicSource(
                num_mel_bins, sampling_rate, self.hop_length, n_fft, win_length, mel_fmin, mel_fmax, source_hidden_size
            )
            steps = [math.prod(upsample_rates[i + 1 :]) for i in range(len(upsample_rates))]
            self.source_convs = nn.ModuleList(
                [
                    nn.Conv1d(1, initial_channels // 2 ** (i + 1), step + 2 * (step // 2), step, padding=step // 2)
                    for i, step in enumerate(steps)
                ]
            )
            # The draft is what is heard until something better is learnt.
            nn.init.zeros_(self.conv_out.weight)
        # One filter serves every activation. It is saved, so it is right however the weights come in.
        self.register_buffer("filter_taps", kaiser_sinc_filter())
        self.gradient_checkpointing = False

    def forward(
        self,
        mel: torch.Tensor,
        mel_lengths: torch.Tensor | None = None,
        pitch: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> IndexTTS2VocoderOutput | tuple[torch.Tensor, ...]:
        r"""
        Waveform of a batch of mels.

        Args:
            mel (`torch.Tensor` of shape `(batch_size, num_mel_frames, num_mel_bins)`):
                Natural logarithm of the mel magnitudes.
            mel_lengths (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Frames per row of a right-padded batch; a row then gives what it gives alone. `None` means that every row
                fills the batch, and costs nothing.
            pitch (`torch.Tensor` of shape `(batch_size, num_mel_frames)`, *optional*):
                In Hz, instead of what a source reads from the mel: for training. Without a source it has no effect.
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
        # In one layout, so that sums over bands are the same with and without lengths.
        mel = zero_beyond_end(mel.transpose(1, 2).contiguous(), lengths)
        draft, found, heard = None, (), [None] * len(self.stages)
        if self.source is not None:
            draft, *found = self.source(mel, lengths, pitch)
            draft = zero_beyond_end(draft[:, None], None if lengths is None else lengths * self.hop_length)
            heard = [conv(draft) for conv in self.source_convs]
        hidden_states = self.conv_in(mel)
        for stage, from_source in zip(self.stages, heard, strict=True):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(stage, hidden_states, taps, lengths, from_source)
            else:
                hidden_states = stage(hidden_states, taps, lengths, from_source)
            lengths = None if lengths is None else lengths * stage.rate
        hidden_states = self.conv_out(self.activation_out(hidden_states, taps, lengths))
        if draft is not None:
            hidden_states = draft + hidden_states
        # Parity: the released vocoder clips; it has no tanh.
        waveform = zero_beyond_end(hidden_states, lengths).squeeze(1).clamp(-1.0, 1.0)
        if not return_dict:
            return (waveform, *found)
        return IndexTTS2VocoderOutput(waveform, *found)
