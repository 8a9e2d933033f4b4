"""
Trains a small speech encoder, for models made from scratch: to hear as the first layers of Whisper's encoder do, or to hear phones.

    python training/train_semantic_encoder.py --teacher WHISPER --model CHECKPOINT --data RECORDINGS --output RUN
    python training/train_semantic_encoder.py --alignments --model CHECKPOINT --data RECORDINGS --output RUN

`WHISPER` is a folder from which transformers loads a `WhisperEncoder`. `RECORDINGS` is an audio folder of which only the audio
matters; the more voices, the better what the encoder makes of new ones. `RUN` becomes a checkpoint that differs from `CHECKPOINT`
in its speech encoder.

With `--teacher` a hidden state of Whisper is learnt, layer 3 by default, as it is for a clip without padding: each dimension by its mean
and deviation, of that the `--num_components` principal components, turned at random into the size of the encoder's own states so
that no dimension matters more than another, and at a length of one, as the last norm of the encoder makes its output. The loss is the
mean squared difference.

With `--alignments` it is what is said: beside each recording lies a JSON file of the same name with `phones`, the seconds `ends_s` at which
they end, and `pitch_hz`, a pitch every `pitch_step_s` seconds, low where there is no voice. Each phone has a direction of its own,
a frame that lies in two of them a mean; the place in the phone and the pitch are two more directions, which count less. Tokens of
such an encoder are meant to say little but words and melody, and to be easier to predict from a text than those of Whisper's states.

None of this is in the paper, whose encoder is w2v-BERT 2.0 as it comes: all values are ours.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import AutoModel, PreTrainedModel, WhisperFeatureExtractor, get_cosine_schedule_with_warmup
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from checkpoint import load_part
from data import Clip, add_columns_argument, choose_splits, draw_generator, leave_out_faulty, read_manifest
from indextts2_hf import IndexTTS2FeatureExtractor, IndexTTS2T2SConfig
from indextts2_hf.feature_extraction_indextts2 import MIN_AUDIO_S, load_audio, resample_soxr
from run import Run, add_run_arguments, parse_arguments, positive_int, run_program


SAMPLING_RATE = 16000  # of Whisper
FRAME_RATE = 50  # of Whisper, Hz
# A frame of the encoder has its middle behind where it begins, by 17.5 ms at 50 Hz, one of Whisper where it begins: the next one
# is the nearest.
FRAME_OFFSET = 1
# Weights of the place in a phone (-1 to 1) and of the pitch (octaves around PITCH_HZ) beside a phone's own 1.
PLACE_WEIGHT, PITCH_WEIGHT = 0.5, 0.6
PITCH_HZ, LEAST_PITCH_HZ = 150.0, 40.0
# Window and hop of the encoder's input, of which it takes several at once.
WINDOW_S, HOP_S = 0.025, 0.01


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    targets = parser.add_mutually_exclusive_group(required=True)
    targets.add_argument("--teacher", metavar="FOLDER", help="Whisper encoder of transformers")
    targets.add_argument("--alignments", action="store_true", help="phones in JSON files beside the recordings")
    parser.add_argument("--layer", type=positive_int, default=3, help="whose output is learnt (default: %(default)s)")
    parser.add_argument(
        "--num_components",
        type=positive_int,
        default=64,
        help="principal components that are kept (default: %(default)s)",
    )
    parser.add_argument("--crop_s", type=float, default=4.0, help="seconds of a clip, at most (default: %(default)s)")
    parser.add_argument(
        "--statistics_clips",
        type=positive_int,
        default=400,
        help="from which the components come (default: %(default)s)",
    )
    parser.add_argument(
        "--validation_fraction",
        type=float,
        default=0.02,
        help="share of the clips that is held out where the manifest holds out none (default: %(default)s)",
    )
    parser.add_argument(
        "--evaluation_clips", type=positive_int, default=200, help="held-out clips, at most (default: %(default)s)"
    )
    add_columns_argument(parser)
    add_run_arguments(parser, model=None)
    parser.set_defaults(learning_rate=1e-3, batch_size=16, max_train_steps=10_000)
    arguments = parse_arguments(parser)
    if arguments.crop_s < MIN_AUDIO_S:
        parser.error(f"--crop_s is {arguments.crop_s:g}, but a clip needs {MIN_AUDIO_S} s")
    return arguments


# --- data ----------------------------------------------------------------------------------------------------------------


class HeardTwice(Dataset):
    r"""
    Clips as the encoder hears them, and what its teacher is given.

    Args:
        clips (`list[Clip]`): recordings.
        extractor (`IndexTTS2FeatureExtractor`): of the checkpoint.
        seed (`int`): of the crops.
        crop_s (`float`): seconds of a crop; shorter clips are whole.
        teacher (`WhisperTeacher` or `AlignmentTeacher`): describes a crop.
    """

    def __init__(
        self,
        clips: list[Clip],
        extractor: IndexTTS2FeatureExtractor,
        seed: int,
        crop_s: float,
        teacher: "WhisperTeacher | AlignmentTeacher",
    ):
        self.clips = clips
        self.extractor = extractor
        self.seed = seed
        self.crop_s = crop_s
        self.describe = teacher.describe

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """The example of a pair (index, number of the draw)."""
        index, draw = key
        clip = self.clips[index]
        try:
            waveform, sampling_rate = load_audio(clip.audio)
        except (ValueError, OSError) as error:
            raise ValueError(f"The clip {clip.clip} cannot be read: {error} Mend it, or take it out.") from error
        waveform = resample_soxr(waveform, sampling_rate, SAMPLING_RATE)
        num_samples = int(self.crop_s * SAMPLING_RATE)
        start = int(draw_generator(self.seed, draw).integers(max(0, len(waveform) - num_samples) + 1))
        waveform = waveform[start : start + num_samples]
        heard = self.extractor(emotion_audio=(waveform, SAMPLING_RATE))
        return {
            "id": clip.clip,
            "input_features": heard["emotion_input_features"][0],
            "attention_mask": heard["emotion_attention_mask"][0],
            "described": self.describe(clip, waveform, start / SAMPLING_RATE),
        }


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """`input_features` `(batch_size, num_frames, input_size)` with its mask; `described`, a list of what the teacher is given."""
    return {
        "ids": [example["id"] for example in examples],
        "input_features": pad_sequence([example["input_features"] for example in examples], batch_first=True),
        "attention_mask": pad_sequence([example["attention_mask"] for example in examples], batch_first=True),
        "described": [example["described"] for example in examples],
    }


# --- what is learnt ------------------------------------------------------------------------------------------------------


class WhisperTeacher(nn.Module):
    r"""
    The first layers of a Whisper encoder, and what is kept of their output.

    Args:
        encoder (`WhisperEncoder`): of transformers.
        num_layers (`int`): how many of its layers are heard.
        size (`int`): of the targets.
        frames_per_target (`int`, defaults to 1): of Whisper, whose mean is one target: 2 for an encoder of 25 Hz.
    """

    def __init__(self, encoder: WhisperEncoder, num_layers: int, size: int, frames_per_target: int = 1):
        super().__init__()
        self.encoder = encoder
        self.num_layers = num_layers
        self.frames_per_target = frames_per_target
        self.extractor = WhisperFeatureExtractor()
        # Dimensions by their mean and deviation, then components and rotation in one.
        self.register_buffer("mean", torch.zeros(encoder.config.d_model))
        self.register_buffer("projection", torch.zeros(encoder.config.d_model, size))
        self.register_buffer("target_mean", torch.zeros(size))

    def describe(self, clip: Clip, waveform: np.ndarray, start_s: float) -> torch.Tensor:
        """Whisper's mel `(80, num_mel_frames)` of a crop at 16 kHz."""
        mel = self.extractor(
            waveform, sampling_rate=SAMPLING_RATE, padding="longest", truncation=False, return_tensors="pt"
        )
        return mel["input_features"][0]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Of a saved state: not the weights, which are where they were."""
        return {name: getattr(self, name) for name in ("mean", "projection", "target_mean")}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> None:
        for name, value in state_dict.items():
            getattr(self, name).copy_(value)

    @torch.no_grad()
    def hidden_states(self, mel: torch.Tensor) -> torch.Tensor:
        """`(80, num_mel_frames)` to `(num_targets, d_model)`, of a clip that is not filled up to 30 s."""
        encoder = self.encoder
        states = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel[None].to(encoder.device))))).transpose(1, 2)
        states = states + encoder.embed_positions.weight[: states.shape[1]]
        for layer in encoder.layers[: self.num_layers]:
            states = layer(states, None)
            states = states[0] if isinstance(states, tuple) else states
        states = states[:, FRAME_OFFSET:].transpose(1, 2)
        return F.avg_pool1d(states, self.frames_per_target)[0].T

    @torch.no_grad()
    def fit(self, mels: list[torch.Tensor], num_components: int, seed: int) -> float:
        """
        Finds mean, deviations and components of the hidden states of some clips.

        Returns:
            `float`: share of the variance that the components hold.
        """
        states = torch.cat([self.hidden_states(mel) for mel in mels]).double()
        self.mean.copy_(states.mean(dim=0))
        deviation = states.std(dim=0)
        scaled = (states - states.mean(dim=0)) / deviation
        variances, components = torch.linalg.eigh(scaled.T @ scaled / len(scaled))
        size = self.projection.shape[1]
        rotation = torch.linalg.qr(torch.from_numpy(np.random.default_rng(seed).standard_normal((size, size))))[0]
        kept = components[:, -num_components:]
        self.projection.copy_((kept / deviation[:, None]) @ rotation.to(kept.device)[:num_components])
        self.target_mean.copy_(torch.cat([self(mel) for mel in mels]).mean(dim=0))
        return float(variances[-num_components:].sum() / variances.sum())

    @torch.no_grad()
    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        """`(80, num_mel_frames)` to targets `(num_frames, size)` with mean 0 and variance 1 in each frame."""
        states = (self.hidden_states(mel) - self.mean) @ self.projection
        return F.layer_norm(states, states.shape[-1:])


class AlignmentTeacher(nn.Module):
    r"""
    Phones, places in them and pitch as directions.

    Args:
        clips (`list[Clip]`): recordings, of whose alignments the phones are gathered.
        size (`int`): of the targets.
        token_rate (`float`): frames of the encoder in a second.
        seed (`int`): of the directions.
    """

    def __init__(self, clips: list[Clip], size: int, token_rate: float, seed: int):
        super().__init__()
        self.token_rate = token_rate
        phones = sorted({phone for clip in clips for phone in read_alignment(clip)["phones"]})
        self.numbers = {phone: number for number, phone in enumerate(phones)}
        num_labels = len(phones) + 2
        if num_labels > size:
            raise ValueError(
                f"The alignments have {len(phones)} phones, which with place and pitch are more than the {size} dimensions of the speech "
                "encoder. Make it wider, or join phones."
            )
        directions = torch.linalg.qr(torch.from_numpy(np.random.default_rng(seed).standard_normal((size, size))))[0]
        self.register_buffer("projection", directions[:num_labels].float())
        self.register_buffer("target_mean", torch.zeros(size))

    def describe(self, clip: Clip, waveform: np.ndarray, start_s: float) -> torch.Tensor:
        """Labels `(num_frames, num_phones + 2)` of a crop at 16 kHz: shares of the phones, place, pitch."""
        alignment = read_alignment(clip)
        # A frame of the encoder stands for the time around the middle of the windows it is made of.
        step = 1 / self.token_rate
        num_frames = int(len(waveform) / SAMPLING_RATE / step)
        middles = start_s + step * np.arange(num_frames) + (WINDOW_S + step - HOP_S) / 2
        ends = np.asarray(alignment["ends_s"])
        begins = np.concatenate([[0.0], ends[:-1]])
        overlaps = np.minimum(ends, middles[:, None] + step / 2) - np.maximum(begins, middles[:, None] - step / 2)
        shares = np.zeros((num_frames, len(self.numbers)))
        numbers = [self.numbers[phone] for phone in alignment["phones"]]
        np.add.at(shares.T, numbers, overlaps.clip(min=0.0).T)
        shares[shares.sum(axis=1) == 0, numbers[-1]] = 1.0  # behind the last phone
        shares /= shares.sum(axis=1, keepdims=True)
        current = np.searchsorted(ends, middles).clip(max=len(ends) - 1)
        spans = (ends - begins).clip(min=1e-3)
        place = (2 * (middles - begins[current]) / spans[current] - 1).clip(-1.0, 1.0)
        pitch = np.asarray(alignment["pitch_hz"])
        nearest = np.round(middles / alignment["pitch_step_s"]).astype(int).clip(max=len(pitch) - 1)
        octaves = np.log2(np.maximum(pitch[nearest], LEAST_PITCH_HZ) / PITCH_HZ) * (pitch[nearest] > LEAST_PITCH_HZ)
        columns = [shares, PLACE_WEIGHT * place[:, None], PITCH_WEIGHT * octaves[:, None]]
        return torch.from_numpy(np.concatenate(columns, axis=1)).float()

    def fit(self, described: list[torch.Tensor]) -> None:
        """Finds the mean of the targets of some clips."""
        self.target_mean.copy_(torch.cat([self(labels) for labels in described]).mean(dim=0))

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels `(num_frames, num_phones + 2)` to targets `(num_frames, size)` with mean 0 and variance 1 in each frame."""
        states = labels.to(self.projection.device) @ self.projection
        return F.layer_norm(states, states.shape[-1:])


def read_alignment(clip: Clip) -> dict[str, Any]:
    path = Path(str(clip.audio)).with_suffix(".json")
    try:
        alignment = json.loads(path.read_text(encoding="utf-8"))
        lengths = len(alignment["phones"]), len(alignment["ends_s"])
        if not alignment["phones"] or lengths[0] != lengths[1] or not alignment["pitch_hz"]:
            raise ValueError(f"it has {lengths[0]} phones, {lengths[1]} ends and {len(alignment['pitch_hz'])} pitches")
        float(alignment["pitch_step_s"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"The clip {clip.clip} has no alignment in {path}: {error}. It needs `phones` and `ends_s`, as many of each, `pitch_hz` and "
            "`pitch_step_s`."
        ) from error
    return alignment


def compare(model: nn.Module, teacher: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss, which is the mean squared difference, and how far the targets are from their mean; both means over rows."""
    output = model(input_features=batch["input_features"], attention_mask=batch["attention_mask"]).last_hidden_state
    errors, variances = [], []
    for found, mask, described in zip(output, batch["attention_mask"], batch["described"], strict=True):
        target = teacher(described)
        length = min(len(target), int(mask.sum()))
        errors.append((found[:length].float() - target[:length]).square().mean())
        variances.append((target[:length] - teacher.target_mean).square().mean())
    return torch.stack(errors).mean(), torch.stack(variances).mean()


@torch.no_grad()
def evaluate(run: Run, model: nn.Module, teacher: nn.Module, dataset: HeardTwice) -> dict[str, float]:
    model.eval()
    found = []
    for batch, count in run.evaluation_batches(dataset, collate):
        error, variance = compare(model, teacher, batch)
        found.append(({"squared_error": error, "squared_deviation": variance}, count))
    model.train()
    figures = run.mean_over_rows(found)
    return {"explained_variance": 1 - figures["squared_error"] / figures["squared_deviation"]}


# --- the program ---------------------------------------------------------------------------------------------------------


def load_whisper(folder: str, num_layers: int, size: int, num_components: int, token_rate: float) -> WhisperTeacher:
    try:
        encoder = WhisperEncoder.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"--teacher {folder} holds no Whisper encoder: {error}") from error
    if num_layers > len(encoder.layers):
        raise ValueError(f"--layer is {num_layers}, but the encoder of {folder} has {len(encoder.layers)}.")
    if FRAME_RATE % token_rate:
        raise ValueError(
            f"The checkpoint has {token_rate:g} semantic tokens a second, but the {FRAME_RATE} frames of Whisper can only be divided "
            "into 50, 25, 10 and other whole parts. Choose such a rate."
        )
    most = min(size, encoder.config.d_model)
    if num_components > most:
        raise ValueError(
            f"--num_components is {num_components}, but with encoders of {encoder.config.d_model} and {size} at most {most} are kept."
        )
    return WhisperTeacher(encoder.eval().requires_grad_(False), num_layers, size, int(FRAME_RATE / token_rate))


def main() -> None:
    arguments = parse()
    run = Run(arguments, parts=("semantic_encoder",), higher_is_better=True)
    accelerator = run.accelerator

    # Data
    extractor = IndexTTS2FeatureExtractor.from_pretrained(run.base / "feature_extractor")
    clips, faults = leave_out_faulty(read_manifest(arguments.data, arguments.columns, required=()), MIN_AUDIO_S)
    if faults:
        run.say(f"{len(faults)} clips cannot be used and are left out: " + "; ".join(faults))
    splits = choose_splits(clips, arguments.validation_fraction)
    if not all(splits.values()):
        raise ValueError(
            f"{arguments.data} has {len(splits['train'])} usable clips to learn from and {len(splits['validation'])} to check with; at "
            "least one of each is needed. Add recordings, or divide them into the folders train and validation."
        )
    # Model and teacher
    model: PreTrainedModel = load_part(AutoModel, run.base, "semantic_encoder").train()
    token_rate = IndexTTS2T2SConfig.from_pretrained(run.base, subfolder="t2s").semantic_token_rate
    size = model.config.hidden_size
    if arguments.alignments:
        teacher = AlignmentTeacher([*splits["train"], *splits["validation"]], size, token_rate, arguments.seed)
    else:
        teacher = load_whisper(arguments.teacher, arguments.layer, size, arguments.num_components, token_rate)
    teacher.to(accelerator.device)

    settings = (extractor, arguments.seed, arguments.crop_s, teacher)
    train_set = HeardTwice(splits["train"], *settings)
    held_out_set = HeardTwice(splits["validation"][: arguments.evaluation_clips], *settings)
    loader = run.make_loader(train_set, collate)
    accelerator.register_for_checkpointing(teacher)
    if run.step == 0:
        chosen = np.linspace(0, len(train_set) - 1, min(len(train_set), arguments.statistics_clips)).astype(int)
        described = [train_set[int(index), int(index)]["described"] for index in dict.fromkeys(chosen)]
        if arguments.alignments:
            teacher.fit(described)
            run.say(f"{len(teacher.numbers)} phones: {' '.join(teacher.numbers)}")
        else:
            share = teacher.fit(described, arguments.num_components, arguments.seed)
            run.say(
                f"{arguments.num_components} components hold {100 * share:.0f} % of the variance of layer {arguments.layer}."
            )
    # Nothing is masked or left out: a small encoder has enough to learn, and each process uses the same weights.
    model.config.apply_spec_augment, model.config.layerdrop = False, 0.0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("masked_spec_embed" not in name)
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    # Optimiser
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.learning_rate, weight_decay=arguments.weight_decay)
    scheduler = get_cosine_schedule_with_warmup(optimizer, arguments.warmup_steps, arguments.max_train_steps)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    run.restore()
    run.say(f"{sum(weight.numel() for weight in parameters):,} trainable parameters; {len(train_set)} clips")

    # Loop
    if run.step == 0:
        run.keep_best(evaluate(run, model, teacher, held_out_set), "explained_variance", {"semantic_encoder": model})
    for batch in run.batches(loader):
        with accelerator.accumulate(model):
            with accelerator.autocast():
                loss, variance = compare(model, teacher, batch)
            run.check_loss(loss, batch["ids"])
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                run.clip_gradients(parameters)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        run.record({"squared_deviation": variance})
        if not accelerator.sync_gradients:
            continue
        run.advance(scheduler.get_last_lr()[0])
        if run.should_evaluate:
            run.keep_best(
                evaluate(run, model, teacher, held_out_set), "explained_variance", {"semantic_encoder": model}
            )
        if run.should_save:
            run.save_state()
        if run.is_done:
            break
    run.finish({"semantic_encoder": model})


if __name__ == "__main__":
    run_program(main)
