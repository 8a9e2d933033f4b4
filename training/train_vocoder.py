"""
Trains the vocoder (mel to waveform, BigVGAN) on recordings, from scratch or from the weights of a checkpoint.

    python training/train_vocoder.py --config training/configs/vocoder.yaml --model CHECKPOINT --data RECORDINGS --output RUN
    accelerate launch training/train_vocoder.py --config training/configs/vocoder.yaml --model … --data … --output …

`RECORDINGS` is an audio folder (`metadata.csv` beside the files) or another manifest (`data.py`), of which only the audio matters
here; clips of up to half a minute serve best, for a clip is decoded whole. `RUN` becomes a checkpoint that differs from
`CHECKPOINT` in its vocoder.

The objective is that of HiFi-GAN (arXiv 2010.05646) with the discriminators of BigVGAN (arXiv 2206.04658): least-squares
adversarial losses against a multi-period and a multi-resolution discriminator, feature matching, and L1 between mels. A vocoder with
a source is given the pitch of the recording (YIN) in training and learns to read it and the periodicity from the mel; in the first
`--source_steps` the layers that read learn alone, at a small fraction of the cost of a step. Ours, and not in these papers: that;
the cosine schedule; that generator and discriminators step at the same time, by one AdamW; plain convolutions in the generator,
whose weight norm is folded; that the best is the one with the smallest multi-resolution STFT distance.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset

from checkpoint import load_part, write_part
from data import Clip, add_columns_argument, choose_splits, draw_generator, leave_out_faulty, read_manifest
from indextts2_hf import IndexTTS2FeatureExtractor, IndexTTS2Vocoder
from indextts2_hf.feature_extraction_indextts2 import load_audio, log_mel, resample_soxr
from indextts2_hf.modeling_vocoder import NUM_PITCHES, PITCH_LIMITS, HarmonicSource
from run import Run, add_run_arguments, parse_arguments, positive_int, run_program


PERIODS = (2, 3, 5, 7, 11)
# Size of the transform, hop and window in samples (BigVGAN's table of hyper-parameters).
RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
# Size of transform and window, and number of bands, of the mels that are compared (BigVGAN v2); the hop is a quarter.
MEL_SCALES = ((32, 5), (64, 10), (128, 20), (256, 40), (512, 80), (1024, 160), (2048, 320))
MEL_WEIGHT = 45.0
FEATURE_WEIGHT = 2.0
PITCH_PERIODS = 2.5  # of the lowest pitch, which YIN looks at
LEAK = 0.1  # of the leaky rectifiers
SOURCE_LEARNING_RATE = 2e-3  # the highest while a source learns alone: few layers bear more than the whole network

# Of a held-out clip so many seconds are vocoded.
EVALUATION_S = 6.0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_columns_argument(parser)
    add_run_arguments(parser, model=None)
    parser.set_defaults(learning_rate=1e-4, max_grad_norm=500.0, batch_size=16, max_train_steps=1_000_000)

    vocoder = parser.add_argument_group("vocoder")
    vocoder.add_argument(
        "--segment_s",
        type=float,
        default=0.743,
        help="seconds of a training example; BigVGAN uses 0.37 to 3.0 (default: %(default)s)",
    )
    vocoder.add_argument(
        "--validation_fraction",
        type=float,
        default=0.02,
        help="share of the clips that is held out where the manifest holds out none, the same as `prepare_dataset.py` "
        "holds out (default: %(default)s)",
    )
    vocoder.add_argument(
        "--evaluation_clips",
        type=positive_int,
        default=32,
        help="held-out clips that are vocoded in an evaluation, at most (default: %(default)s)",
    )
    vocoder.add_argument(
        "--cache_s",
        type=float,
        default=1800.0,
        help="seconds of decoded audio that each loading process keeps; 1800 s at 22.05 kHz are 159 MB (default: %(default)s)",
    )
    vocoder.add_argument(
        "--discriminator_channels",
        type=positive_int,
        default=32,
        help="width of the discriminators' first layers; 32 as published (default: %(default)s)",
    )
    vocoder.add_argument(
        "--discriminator_rate_factor",
        type=float,
        default=1.0,
        help="how much faster they learn than the vocoder: narrow ones bear, and need, more (default: %(default)s)",
    )
    vocoder.add_argument(
        "--discriminator_start_step",
        type=int,
        default=0,
        help="before this step, counted from the first of all, the mel loss works alone, which costs a fraction (default: %(default)s)",
    )
    vocoder.add_argument(
        "--source_steps",
        type=int,
        default=0,
        help="first steps, of --max_train_steps, in which a source learns alone to read the mel (default: %(default)s)",
    )
    vocoder.add_argument(
        "--mel_loss",
        choices=["single", "multiscale"],
        default="multiscale",
        help="between mels of one resolution, as HiFi-GAN and BigVGAN, or of seven, as BigVGAN v2 (default: %(default)s)",
    )
    vocoder.add_argument(
        "--discriminators",
        metavar="FILE",
        help="start from these: the `discriminators/model.safetensors` of another run (default: random weights)",
    )
    arguments = parse_arguments(parser)
    if arguments.source_steps < 0:
        parser.error(f"--source_steps {arguments.source_steps} is negative")
    return arguments


# --- data ----------------------------------------------------------------------------------------------------------------


def mel_settings(feature_extractor: IndexTTS2FeatureExtractor) -> dict[str, Any]:
    """The arguments of `log_mel` with which the checkpoint's prompts are made, hence what its S2M model predicts."""
    names = ("sampling_rate", "num_mel_bins", "n_fft", "win_length", "hop_length", "mel_fmin", "mel_fmax")
    return {name: getattr(feature_extractor, name) for name in names}


def estimate_pitch(waveform: np.ndarray, hop_length: int, sampling_rate: int) -> torch.Tensor:
    """Pitch (num_frames,) in Hz at the middles of the mel's frames, by YIN; anything where there is no voice."""
    import librosa

    lowest, highest = PITCH_LIMITS
    # As short as the lowest pitch allows: what is heard as one pitch for longer than it is one makes a rough draft.
    size = 2 * math.ceil(PITCH_PERIODS / 2 * sampling_rate / lowest)
    padded = np.pad(waveform, ((size - hop_length) // 2, size // 2))
    pitch = librosa.yin(
        padded, fmin=lowest, fmax=highest, sr=sampling_rate, frame_length=size, hop_length=hop_length, center=False
    )
    return torch.from_numpy(pitch[: len(waveform) // hop_length]).float()


class MelAndWaveform(Dataset):
    r"""
    Pairs of a mel and its waveform: random segments, or the beginnings of clips.

    The mel of a segment is that of the whole clip, cut: a mel of the segment alone would have its reflected ends in every
    example, and the S2M model predicts nothing like them.

    Args:
        clips (`list[Clip]`): recordings.
        feature_extractor (`IndexTTS2FeatureExtractor`): of the checkpoint; tells sampling rate and mel.
        seed (`int`): of the places of segments.
        num_frames (`int`): mel frames of an example.
        is_random (`bool`): segments from anywhere, filled up with silence, instead of beginnings of up to `num_frames`.
        cache_s (`float`): seconds of decoded audio to keep.
        with_pitch (`bool`, defaults to `False`): add what a vocoder with a source learns to read.
    """

    def __init__(
        self,
        clips: list[Clip],
        feature_extractor: IndexTTS2FeatureExtractor,
        seed: int,
        num_frames: int,
        is_random: bool,
        cache_s: float,
        with_pitch: bool = False,
    ):
        self.clips = clips
        self.with_pitch = with_pitch
        self.settings = mel_settings(feature_extractor)
        self.seed = seed
        self.num_frames = num_frames
        self.is_random = is_random
        self.cache: dict[int, np.ndarray] = {}
        self.room = int(cache_s * feature_extractor.sampling_rate)
        # Frames whose window reaches beyond the end of the waveform they are computed from.
        self.margin = -(-feature_extractor.n_fft // feature_extractor.hop_length)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """The example of a pair (index, number of the draw)."""
        index, draw = key
        waveform = self.read(index)
        hop_length, sampling_rate = self.settings["hop_length"], self.settings["sampling_rate"]
        if self.is_random:
            waveform = np.pad(waveform, (0, max(0, self.num_frames * hop_length - len(waveform))))
        total = len(waveform) // hop_length
        spare = max(0, total - self.num_frames)
        start = int(draw_generator(self.seed, draw).integers(spare + 1)) if self.is_random else 0
        end = min(total, start + self.num_frames)
        samples = waveform[start * hop_length : end * hop_length]
        # With as much before and behind as the windows of its frames reach, where there is as much.
        first, last = max(0, start - self.margin), min(total, end + self.margin)
        mel = log_mel(torch.from_numpy(waveform[first * hop_length : last * hop_length]), **self.settings)
        example = {
            "id": self.clips[index].clip,
            "mel": mel[start - first : end - first],
            "waveform": torch.from_numpy(samples),
        }
        if self.with_pitch:
            pitch = estimate_pitch(waveform[first * hop_length : last * hop_length], hop_length, sampling_rate)
            example["pitch"] = pitch[start - first : end - first]
        return example

    def read(self, index: int) -> np.ndarray:
        """A clip at the checkpoint's sampling rate, in whole frames."""
        if index in self.cache:
            return self.cache[index]
        clip, hop_length = self.clips[index], self.settings["hop_length"]
        try:
            # A beginning needs no more than that, and a margin for the resampler.
            seconds = (self.num_frames + self.margin) * hop_length / self.settings["sampling_rate"] + 1
            waveform, sampling_rate = load_audio(clip.audio, None if self.is_random else seconds)
        except (OSError, ValueError) as error:
            raise ValueError(f"The clip {clip.clip} cannot be read: {error} Repair it, or take it out.") from error
        waveform = resample_soxr(waveform, sampling_rate, self.settings["sampling_rate"])
        waveform = np.pad(waveform, (0, -len(waveform) % hop_length))
        if len(waveform) <= self.room:
            self.room -= len(waveform)
            self.cache[index] = waveform
        return waveform


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """
    A batch: `mel` (batch_size, num_mel_frames, num_mel_bins), `mel_lengths`, `waveform` (batch_size, num_samples), `ids`, and for
    a source `pitch` (batch_size, num_mel_frames).
    """
    batch = {
        "ids": [example["id"] for example in examples],
        "mel": pad_sequence([example["mel"] for example in examples], batch_first=True),
        "mel_lengths": torch.tensor([len(example["mel"]) for example in examples]),
        "waveform": pad_sequence([example["waveform"] for example in examples], batch_first=True),
    }
    if "pitch" in examples[0]:
        batch["pitch"] = pad_sequence([example["pitch"] for example in examples], batch_first=True)
    return batch


# --- discriminators ------------------------------------------------------------------------------------------------------


def make_conv(*args: Any, **kwargs: Any) -> nn.Module:
    """
    A convolution that keeps the level of what it is given. With PyTorch's own weights each layer loses 40 % of it, and thousands
    of steps go by before a judgement depends on the waveform.
    """
    conv = nn.Conv2d(*args, **kwargs)
    nn.init.kaiming_normal_(conv.weight, a=LEAK)
    nn.init.zeros_(conv.bias)
    return weight_norm(conv)


class PeriodDiscriminator(nn.Module):
    """Looks at every `period`-th sample: a waveform folded to (num_samples / period, period) (HiFi-GAN, section 2.3)."""

    def __init__(self, period: int, channels: int) -> None:
        super().__init__()
        self.period = period
        widths = (1, channels, 4 * channels, 16 * channels, 32 * channels, 32 * channels)
        self.convs = nn.ModuleList(
            [make_conv(widths[i], widths[i + 1], (5, 1), (3 if i < 4 else 1, 1), padding=(2, 0)) for i in range(5)]
        )
        self.conv_out = make_conv(widths[-1], 1, (3, 1), padding=(1, 0))

    def forward(self, waveform: torch.Tensor) -> list[torch.Tensor]:
        waveform = F.pad(waveform[:, None], (0, -waveform.shape[-1] % self.period), mode="reflect")
        hidden_states = waveform.unflatten(-1, (-1, self.period))
        features = []
        for conv in self.convs:
            hidden_states = F.leaky_relu(conv(hidden_states), LEAK)
            features.append(hidden_states)
        return [*features, self.conv_out(hidden_states)]


class ResolutionDiscriminator(nn.Module):
    """Looks at the magnitudes of one short-time Fourier transform (UnivNet, arXiv 2106.07889; BigVGAN)."""

    def __init__(self, resolution: tuple[int, int, int], channels: int) -> None:
        super().__init__()
        self.resolution = resolution
        shapes = [((3, 9), 1), ((3, 9), 2), ((3, 9), 2), ((3, 9), 2), ((3, 3), 1)]
        self.convs = nn.ModuleList(
            [
                make_conv(channels if i else 1, channels, kernel_size, (1, stride), padding=(1, kernel_size[1] // 2))
                for i, (kernel_size, stride) in enumerate(shapes)
            ]
        )
        self.conv_out = make_conv(channels, 1, (3, 3), padding=1)

    def forward(self, waveform: torch.Tensor) -> list[torch.Tensor]:
        hidden_states = stft_magnitude(waveform, self.resolution)[:, None]
        features = []
        for conv in self.convs:
            hidden_states = F.leaky_relu(conv(hidden_states), LEAK)
            features.append(hidden_states)
        return [*features, self.conv_out(hidden_states)]


class Discriminators(nn.Module):
    r"""
    The multi-period and the multi-resolution discriminator: eight networks that tell recordings from vocoded waveforms.

    Args:
        channels (`int`): of their first layers.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.networks = nn.ModuleList(
            [
                *[PeriodDiscriminator(period, channels) for period in PERIODS],
                *[ResolutionDiscriminator(resolution, channels) for resolution in RESOLUTIONS],
            ]
        )

    def forward(self, waveform: torch.Tensor) -> list[list[torch.Tensor]]:
        """For each network the outputs of its layers `(batch_size, …)`; the last is the judgement, near 1 for recordings."""
        return [network(waveform) for network in self.networks]


def stft_magnitude(waveform: torch.Tensor, resolution: tuple[int, int, int]) -> torch.Tensor:
    """Magnitudes `(batch_size, n_fft / 2 + 1, num_frames)` of `(batch_size, num_samples)`."""
    n_fft, hop_length, win_length = resolution
    padding = (n_fft - hop_length) // 2
    spectrum = torch.stft(
        F.pad(waveform[:, None], (padding, padding), mode="reflect")[:, 0],
        n_fft,
        hop_length=hop_length,
        win_length=win_length,
        window=torch.hann_window(win_length, device=waveform.device),
        center=False,
        return_complex=True,
    )
    # The root has no gradient at zero, which is what silence has.
    return torch.sqrt(spectrum.real**2 + spectrum.imag**2 + 1e-9)


# --- objective: means over rows, of means over each row ------------------------------------------------------------------


def multiscale_mel_loss(generated: torch.Tensor, real: torch.Tensor, sampling_rate: int) -> torch.Tensor:
    """
    L1 between the log-mels of two batches of waveforms `(batch_size, num_samples)`, mean over `MEL_SCALES`.

    BigVGAN v2 weights the sum over seven scales of decadic logarithms by 15, which is 45.6 times this mean of natural ones.
    """
    distances = []
    for size, num_bands in MEL_SCALES:
        settings = {"n_fft": size, "win_length": size, "hop_length": size // 4, "num_mel_bins": num_bands}
        found, wanted = (log_mel(waveform, sampling_rate, **settings) for waveform in (generated, real))
        distances.append(F.l1_loss(found, wanted))
    return torch.stack(distances).mean()


def discriminator_loss(real: list[list[torch.Tensor]], generated: list[list[torch.Tensor]]) -> torch.Tensor:
    """Least squares: recordings to 1, vocoded waveforms to 0 (HiFi-GAN, equation 1)."""
    pairs = zip(real, generated, strict=True)
    return sum(((1 - yes[-1]) ** 2).mean() + (no[-1] ** 2).mean() for yes, no in pairs)


def adversarial_loss(generated: list[list[torch.Tensor]]) -> torch.Tensor:
    """Least squares: vocoded waveforms to 1 (HiFi-GAN, equation 2)."""
    return sum(((1 - layers[-1]) ** 2).mean() for layers in generated)


def feature_loss(real: list[list[torch.Tensor]], generated: list[list[torch.Tensor]]) -> torch.Tensor:
    """L1 between the outputs of the discriminators' layers (HiFi-GAN, equation 4)."""
    return sum(
        F.l1_loss(no, yes)
        for yes_layers, no_layers in zip(real, generated, strict=True)
        for yes, no in zip(yes_layers, no_layers, strict=True)
    )


def source_losses(
    source: HarmonicSource, batch: dict[str, Any], pitch: torch.Tensor, logits: torch.Tensor, periodicity: torch.Tensor
) -> dict[str, torch.Tensor]:
    """
    What a source read from the mels of a batch (`HarmonicSource.read_mel`) against the recordings: the losses `pitch_cross_entropy` and
    `periodicity_l1`, and for people `pitch_l1_octaves`.
    """
    wanted = source.measure_periodicity(batch["waveform"], batch["pitch"])
    # There is a pitch in what is loud and repeats itself.
    weight = batch["mel"].exp().mean(dim=-1) * wanted.mean(dim=-1)
    weight = weight / weight.sum().clamp(min=1e-12)  # which silence has not
    return {
        "pitch_cross_entropy": (pitch_cross_entropy(logits, batch["pitch"]) * weight).sum(),
        "pitch_l1_octaves": ((pitch.detach().log2() - batch["pitch"].log2()).abs() * weight).sum(),
        "periodicity_l1": F.l1_loss(periodicity, wanted),
    }


def pitch_cross_entropy(logits: torch.Tensor, pitch: torch.Tensor) -> torch.Tensor:
    """
    Of logits `(batch_size, num_mel_frames, NUM_PITCHES)` and a pitch `(batch_size, num_mel_frames)` in Hz, which is shared out between
    its two neighbours. The distance of the mean learns far more slowly: it cannot tell two guesses from one between them.
    """
    lowest, highest = PITCH_LIMITS
    place = (NUM_PITCHES - 1) * (pitch / lowest).log2() / math.log2(highest / lowest)
    places = torch.arange(NUM_PITCHES, device=pitch.device)
    target = (1 - (place.clamp(0, NUM_PITCHES - 1)[..., None] - places).abs()).clamp(min=0)
    return -(target * logits.log_softmax(dim=-1)).sum(dim=-1)


def stft_distance(generated: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """
    Multi-resolution STFT distance of two waveforms `(1, num_samples)`: spectral convergence plus L1 of log magnitudes, mean over
    `RESOLUTIONS` (Parallel WaveGAN, arXiv 1910.11480).
    """
    distances = []
    for resolution in RESOLUTIONS:
        found, wanted = stft_magnitude(generated, resolution), stft_magnitude(real, resolution)
        convergence = torch.linalg.vector_norm(wanted - found) / torch.linalg.vector_norm(wanted)
        distances.append(convergence + (wanted.log() - found.log()).abs().mean())
    return torch.stack(distances).mean()


@torch.no_grad()
def evaluate(run: Run, model: nn.Module, dataset: MelAndWaveform) -> dict[str, float]:
    """Vocodes the mels of held-out clips and compares, clip by clip."""
    vocoder = run.accelerator.unwrap_model(model).eval()
    found = []
    for batch, count in run.evaluation_batches(dataset, collate):
        waveform = vocoder(batch["mel"], batch["mel_lengths"]).waveform
        rows = []
        for row, length in enumerate(batch["mel_lengths"].tolist()[:count]):
            num_samples = length * vocoder.hop_length
            generated, real = waveform[row : row + 1, :num_samples], batch["waveform"][row : row + 1, :num_samples]
            mels = [log_mel(clip, **dataset.settings) for clip in (generated, real)]
            rows.append(torch.stack([F.l1_loss(*mels), stft_distance(generated, real)]))
        means = torch.stack(rows).mean(dim=0) if rows else torch.zeros(2)
        found.append(({"mel_l1_per_bin": means[0], "stft_distance": means[1]}, count))
    vocoder.train()
    return run.mean_over_rows(found)


# --- discriminators on disk ----------------------------------------------------------------------------------------------


def load_discriminators(discriminators: Discriminators, path: str, channels: int) -> None:
    """Weights from a file that `save_discriminators` wrote."""
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("discriminator_channels")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--discriminators {path} cannot be read: {error}") from error
    if found != str(channels):
        raise ValueError(
            f"--discriminators {path} has discriminator_channels {found}, but --discriminator_channels is {channels}. Give the "
            "same number, or leave the file out and begin with random discriminators."
        )
    discriminators.load_state_dict(load_file(path))


def save_discriminators(run: Run, discriminators: nn.Module) -> None:
    """Beside the parts of the checkpoint, for `--discriminators` of another run; inference has no use for them."""
    weights = run.accelerator.get_state_dict(discriminators)

    def write(folder: Path) -> None:
        metadata = {"format": "pt", "discriminator_channels": str(run.arguments.discriminator_channels)}
        tensors = {key: tensor.cpu().contiguous() for key, tensor in weights.items()}
        save_file(tensors, folder / "model.safetensors", metadata)

    if run.is_main:
        write_part(run.folder, "discriminators", write)


# --- the program ---------------------------------------------------------------------------------------------------------


def make_scheduler(optimizer: torch.optim.Optimizer, arguments: argparse.Namespace) -> LambdaLR:
    """Warm-up and a cosine to zero; before them, in the steps of the source alone, a cosine from its own rate."""

    def factor(step: int) -> float:
        if step < arguments.source_steps:
            cosine = math.cos(math.pi * step / arguments.source_steps)
            return SOURCE_LEARNING_RATE / arguments.learning_rate * (1 + cosine) / 2
        done, total = step - arguments.source_steps, arguments.max_train_steps - arguments.source_steps
        if done < arguments.warmup_steps:
            return done / arguments.warmup_steps
        return (1 + math.cos(math.pi * (done - arguments.warmup_steps) / max(1, total - arguments.warmup_steps))) / 2

    return LambdaLR(optimizer, factor)


def main() -> None:
    arguments = parse()
    run = Run(arguments, parts=("vocoder",))
    accelerator = run.accelerator

    model = load_part(IndexTTS2Vocoder, run.base, "vocoder").train()
    feature_extractor = IndexTTS2FeatureExtractor.from_pretrained(run.base / "feature_extractor")
    for name, theirs in (
        ("hop_length", model.hop_length),
        ("num_mel_bins", model.num_mel_bins),
        ("sampling_rate", model.config.sampling_rate),
    ):
        ours = getattr(feature_extractor, name)
        if ours != theirs:
            raise ValueError(
                f"The vocoder of {run.base} has {name} {theirs}, but its feature extractor has {ours}. Make a checkpoint whose parts agree."
            )

    if arguments.source_steps and model.source is None:
        raise ValueError(
            f"--source_steps {arguments.source_steps} is of a vocoder with a source, but the one of {run.base} has none. Make a "
            "checkpoint with `use_source: true` for it, or leave the option out."
        )

    clips, faults = leave_out_faulty(read_manifest(arguments.data, arguments.columns, required=()))
    if faults:
        run.say(f"{len(faults)} clips cannot be read and are left out: " + "; ".join(faults))
    splits = choose_splits(clips, arguments.validation_fraction)
    if not all(splits.values()):
        raise ValueError(
            f"{arguments.data} has {len(splits['train'])} readable clips to learn from and {len(splits['validation'])} to check "
            "with; at least one of each is needed. Add recordings, or divide them into the folders train and validation."
        )
    num_frames = round(arguments.segment_s * model.config.sampling_rate / model.hop_length)
    shortest = max(n_fft for n_fft, _, _ in RESOLUTIONS)
    if num_frames * model.hop_length < shortest:
        raise ValueError(
            f"--segment_s {arguments.segment_s} is {num_frames * model.hop_length} samples, but the discriminators look at "
            f"{shortest} at once. Give at least {shortest / model.config.sampling_rate + 0.01:.2f}."
        )
    dataset = MelAndWaveform(
        splits["train"],
        feature_extractor,
        arguments.seed,
        num_frames,
        True,
        arguments.cache_s,
        with_pitch=model.source is not None,
    )
    held_out = MelAndWaveform(
        splits["validation"][: arguments.evaluation_clips],
        feature_extractor,
        arguments.seed,
        round(EVALUATION_S * model.config.sampling_rate / model.hop_length),
        False,
        arguments.cache_s,
    )

    discriminators = Discriminators(arguments.discriminator_channels)
    if arguments.discriminators is not None:
        load_discriminators(discriminators, arguments.discriminators, arguments.discriminator_channels)
    if arguments.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    # One optimiser for both sides, which step together: gradients that are accumulated over batches are then those of one
    # large batch, and one gradient scaler (fp16) serves both.
    rate = arguments.discriminator_rate_factor * arguments.learning_rate
    optimizer = torch.optim.AdamW(
        [{"params": [*model.parameters()]}, {"params": [*discriminators.parameters()], "lr": rate}],
        lr=arguments.learning_rate,
        betas=(0.8, 0.99),
        weight_decay=arguments.weight_decay,
    )
    scheduler = make_scheduler(optimizer, arguments)
    loader = run.make_loader(dataset, collate)
    num_parameters = [sum(weight.numel() for weight in part.parameters()) for part in (model, discriminators)]
    model, discriminators, optimizer, loader, scheduler = accelerator.prepare(
        model, discriminators, optimizer, loader, scheduler
    )
    source = accelerator.unwrap_model(model).source
    run.restore()
    seconds = num_frames * feature_extractor.hop_length / feature_extractor.sampling_rate
    rows = arguments.batch_size * arguments.gradient_accumulation_steps * accelerator.num_processes
    run.say(
        f"{num_parameters[0]} trainable parameters, and {num_parameters[1]} of the discriminators; {len(dataset)} clips; "
        f"{seconds * rows:.1f} s of audio a step"
    )

    if run.step == 0:
        run.keep_best(evaluate(run, model, held_out), "stft_distance", {"vocoder": model})
    for batch in run.batches(loader):
        with accelerator.accumulate(model, discriminators):
            if run.step < arguments.source_steps:
                with accelerator.autocast():
                    found = source.read_mel(batch["mel"].transpose(1, 2))
                figures = source_losses(source, batch, *found)
                loss = figures["pitch_cross_entropy"] + figures["periodicity_l1"]
                run.check_loss(loss, batch["ids"])
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    # The wrapper of several processes, which does this, expects gradients of every weight.
                    for weight in source.parameters():
                        weight.grad = accelerator.reduce(weight.grad, reduction="mean")
            else:
                real = batch["waveform"]
                output = model(batch["mel"], pitch=batch.get("pitch"))
                generated = output.waveform
                figures = {}

                mel_loss = F.l1_loss(log_mel(generated, **dataset.settings), log_mel(real, **dataset.settings))
                figures["mel_l1_per_bin"] = mel_loss
                if arguments.mel_loss == "multiscale":
                    mel_loss = multiscale_mel_loss(generated, real, feature_extractor.sampling_rate)
                    figures["multiscale_mel_l1_per_bin"] = mel_loss
                loss = MEL_WEIGHT * mel_loss
                if output.pitch is not None:
                    figures |= source_losses(source, batch, output.pitch, output.pitch_logits, output.periodicity)
                    # No weights: these reach the layers that read the mel, and nothing else reaches those.
                    loss = loss + figures["pitch_cross_entropy"] + figures["periodicity_l1"]
                if run.step >= arguments.discriminator_start_step:
                    # One pass, because the wrapper of several processes allows no more before `backward`.
                    outputs = discriminators(torch.cat([real, generated.detach()]))
                    real_outputs, generated_outputs = zip(
                        *[zip(*[layer.chunk(2) for layer in layers], strict=True) for layers in outputs], strict=True
                    )
                    judges_loss = discriminator_loss(real_outputs, generated_outputs)
                    run.check_loss(judges_loss, batch["ids"], name="discriminator_loss")
                    accelerator.backward(judges_loss)

                    # The same judges for the vocoder, without the wrapper and without gradients of their own.
                    judges = accelerator.unwrap_model(discriminators).requires_grad_(False)
                    real_outputs = [[layer.detach() for layer in layers] for layers in real_outputs]
                    generated_outputs = judges(generated)
                    figures["adversarial_loss"] = adversarial_loss(generated_outputs)
                    figures["feature_loss"] = feature_loss(real_outputs, generated_outputs)
                    loss = loss + figures["adversarial_loss"] + FEATURE_WEIGHT * figures["feature_loss"]
                run.check_loss(loss, batch["ids"])
                accelerator.backward(loss)
                discriminators.requires_grad_(True)
            if accelerator.sync_gradients:
                run.clip_gradients([*model.parameters(), *discriminators.parameters()])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        run.record(figures)
        if not accelerator.sync_gradients:
            continue
        run.advance(scheduler.get_last_lr()[0])
        if run.should_evaluate:
            run.keep_best(evaluate(run, model, held_out), "stft_distance", {"vocoder": model})
        if run.should_save:
            run.save_state()
        if run.is_done:
            break
    save_discriminators(run, discriminators)
    run.finish({"vocoder": model})


if __name__ == "__main__":
    run_program(main)
