"""
Trains the speaker encoder (CAM++) of a checkpoint made from scratch to tell speakers apart. A released checkpoint brings its own.

    python training/train_speaker_encoder.py --model CHECKPOINT --data RECORDINGS --output RUN
    accelerate launch training/train_speaker_encoder.py --config training/configs/speaker_encoder.yaml --model … --data … --output …

`RECORDINGS` is a folder in the audiofolder layout or another manifest (`data.py`); its column `speaker` is what is learnt. `RUN` becomes
a whole checkpoint. The speaker vectors mean something else afterwards: prepare the data again with `--model RUN`, and make voices anew.

A random crop of each clip, heard as inference hears a prompt, becomes an embedding; a head that belongs to the run and not to the
checkpoint names the speaker by the angle between the embedding and one vector a speaker, with an additive angular margin (AAM-softmax).

`--evaluation_clips` of the held-out split are embedded whole. The equal error rate over all pairs of them chooses the best checkpoint
where two speakers have two clips each, otherwise the loss of clips whose speakers are in the training split.

Several processes: batch norms take their statistics from the rows they see together. On CUDA these are the rows of all processes
(`SyncBatchNorm`), and two processes give the losses of one with twice the batch. On the CPU, which has no such layer, each process
normalises its own rows: two processes then give the losses of one that accumulates two batches, and the statistics kept for
inference are those of the first process.

CAM++ was published with this loss on 3 s crops; scale, margin, rates and schedule are ours, and so is the choice to augment nothing.
"""

import argparse
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import broadcast, gather_object
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset
from transformers import get_cosine_schedule_with_warmup

from checkpoint import load_part
from data import Clip, add_columns_argument, choose_splits, draw_generator, leave_out_faulty, read_manifest
from indextts2_hf import IndexTTS2FeatureExtractor, IndexTTS2SpeakerEncoder
from indextts2_hf.feature_extraction_indextts2 import (
    MIN_AUDIO_S,
    RESAMPLING_MARGIN_S,
    kaldi_fbank,
    load_audio,
    resample_sinc,
    resample_soxr,
)
from run import Run, add_run_arguments, parse_arguments, positive_int, run_program


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--crop_s", type=float, default=3.0, help="seconds of a crop (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=30.0, help="of the cosines in the softmax (ours: %(default)s)")
    parser.add_argument(
        "--margin", type=float, default=0.2, help="radians added to the angle of the right speaker (ours: %(default)s)"
    )
    parser.add_argument(
        "--validation_fraction",
        type=float,
        default=0.05,
        help="share of the clips that is held out where the manifest holds out none (ours: %(default)s)",
    )
    parser.add_argument(
        "--evaluation_clips",
        type=positive_int,
        default=1000,
        help="held-out clips that are embedded in an evaluation, at most (ours: %(default)s)",
    )
    add_columns_argument(parser)
    add_run_arguments(parser, model=None)
    parser.set_defaults(learning_rate=1e-3, batch_size=64)
    arguments = parse_arguments(parser)
    if arguments.crop_s < MIN_AUDIO_S:
        parser.error(f"--crop_s {arguments.crop_s} is too short: at least {MIN_AUDIO_S} s are needed, better 2 to 4")
    return arguments


# --- data ----------------------------------------------------------------------------------------------------------------


def speaker_fbank(
    waveform: np.ndarray, sampling_rate: int, extractor: IndexTTS2FeatureExtractor, num_frames: int | None = None
) -> torch.Tensor:
    """The first `num_frames` of the filter bank `(num_frames, 80)` that `extractor` makes of a prompt: through both resamplers."""
    waveform = torch.tensor(resample_soxr(waveform, sampling_rate, extractor.sampling_rate))
    waveform = waveform[: int(extractor.max_audio_s * extractor.sampling_rate)]
    waveform = resample_sinc(waveform, extractor.sampling_rate, extractor.semantic_sampling_rate)
    fbank = kaldi_fbank(waveform, extractor.semantic_sampling_rate)[:num_frames]
    return fbank - fbank.mean(dim=0)


class SpeakerDataset(Dataset):
    r"""
    Filter banks of clips with the numbers of their speakers.

    Args:
        clips (`list[Clip]`): recordings.
        speakers (`list[str]`): names in the order of their numbers; another speaker has the number -1.
        extractor (`IndexTTS2FeatureExtractor`): of the checkpoint.
        seed (`int`): of the crops.
        crop_s (`float`, *optional*): seconds of a crop, of which shorter clips are repeated to fill it; whole clips without it.
    """

    def __init__(
        self,
        clips: list[Clip],
        speakers: list[str],
        extractor: IndexTTS2FeatureExtractor,
        seed: int,
        crop_s: float | None = None,
    ):
        self.clips = clips
        self.numbers = {name: number for number, name in enumerate(speakers)}
        self.extractor = extractor
        self.seed = seed
        self.crop_s = crop_s

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """The example of a pair (index, number of the draw)."""
        index, draw = key
        clip, extractor, num_frames = self.clips[index], self.extractor, None
        longest_s = None if self.crop_s else extractor.max_audio_s + RESAMPLING_MARGIN_S
        try:
            waveform, sampling_rate = load_audio(clip.audio, longest_s)
        except (ValueError, OSError) as error:
            raise ValueError(f"The clip {clip.clip} cannot be read: {error} Mend it, or take it out.") from error
        if self.crop_s:
            num_samples = math.ceil(self.crop_s * sampling_rate)
            waveform = np.tile(waveform, -(-num_samples // len(waveform)))
            start = int(draw_generator(self.seed, draw).integers(len(waveform) - num_samples + 1))
            waveform = waveform[start : start + num_samples]
            # Whole frames of 25 ms each 10 ms: all crops have as many, whatever the resamplers round.
            num_frames = int(100 * self.crop_s) - 2
        return {
            "id": clip.clip,
            "fbank": speaker_fbank(waveform, sampling_rate, extractor, num_frames),
            "speaker": clip.speaker,
            "speaker_number": self.numbers.get(clip.speaker, -1),
        }


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """`ids` and `speakers`, the names of clips and speakers; `fbank` of crops, of shape `(batch_size, num_frames, 80)`."""
    return {
        "ids": [example["id"] for example in examples],
        "speakers": [example["speaker"] for example in examples],
        "speaker_numbers": torch.tensor([example["speaker_number"] for example in examples]),
        "fbank": torch.stack([example["fbank"] for example in examples]),
    }


# --- objective -----------------------------------------------------------------------------------------------------------


class AngularMarginHead(nn.Module):
    r"""
    Names the speaker of an embedding: AAM-softmax, with one vector for each training speaker.

    The logits are `scale` times the cosine between embedding and vector; for the right speaker, of the angle made larger by
    `margin`. Past the angle where that would come round again, the cosine goes on falling as a straight line.

    Args:
        embed_dim (`int`): size of the embeddings.
        num_speakers (`int`): training speakers.
        scale (`float`): of the cosines.
        margin (`float`): in radians.
    """

    def __init__(self, embed_dim: int, num_speakers: int, scale: float, margin: float):
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(num_speakers, embed_dim) * embed_dim**-0.5)
        self.scale = scale
        self.margin = margin

    def forward(
        self, speaker_embeds: torch.Tensor, speaker_numbers: torch.LongTensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(batch_size, embed_dim)` and `(batch_size,)` to the mean loss of the rows and the share of right names, both scalars."""
        # In half precision a cosine is no more exact than the margin between two speakers.
        with torch.autocast(speaker_embeds.device.type, enabled=False):
            cosines = F.normalize(speaker_embeds.float(), dim=-1) @ F.normalize(self.vectors.float(), dim=-1).T
        right = cosines.gather(1, speaker_numbers[:, None])
        # The root has no gradient at zero.
        sines = (1 - right.square()).clamp(min=1e-6).sqrt()
        with_margin = torch.where(
            right > -math.cos(self.margin),
            right * math.cos(self.margin) - sines * math.sin(self.margin),
            right - 1 + math.cos(self.margin),
        )
        logits = self.scale * cosines.scatter(1, speaker_numbers[:, None], with_margin)
        accuracy = (cosines.argmax(dim=-1) == speaker_numbers).float().mean()
        return F.cross_entropy(logits, speaker_numbers), accuracy


def checkpoint_with_still_statistics(module: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """Gradient checkpointing whose second forward pass leaves the running statistics of batch norms alone."""
    norms = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]

    @contextmanager
    def still() -> Iterator[None]:
        kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
        try:
            for norm in norms:
                norm.momentum, norm.num_batches_tracked = 0.0, None
            yield
        finally:  # the second pass ends early, by an exception, when it has what the gradient needs
            for norm, (momentum, count) in zip(norms, kept, strict=True):
                norm.momentum, norm.num_batches_tracked = momentum, count

    return checkpoint(module, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), still()))


# --- evaluation ----------------------------------------------------------------------------------------------------------


def equal_error_rate(scores: np.ndarray, is_same: np.ndarray) -> float:
    r"""
    The rate at which a threshold on the scores wrongly accepts as often as it wrongly rejects.

    Pairs at or above the threshold are accepted. Where no threshold makes the two rates equal, the line between the neighbouring
    thresholds is followed to where they would be.

    Args:
        scores (`np.ndarray` of shape `(num_pairs,)`): how alike the two of a pair are.
        is_same (`np.ndarray` of shape `(num_pairs,)`): whether they are of one speaker; both kinds must occur.

    Returns:
        `float` in [0, 1]: 0 where a threshold separates the two kinds, 0.5 at chance.
    """
    thresholds, places = np.unique(scores, return_inverse=True)
    same = np.bincount(places, weights=is_same, minlength=len(thresholds))
    different = np.bincount(places, weights=~is_same, minlength=len(thresholds))
    # Rates of the thresholds from the lowest score upwards, and of one above all scores.
    rejections = np.concatenate([[0.0], np.cumsum(same)]) / same.sum()
    acceptances = 1 - np.concatenate([[0.0], np.cumsum(different)]) / different.sum()
    first = int(np.argmax(rejections >= acceptances))
    gap_before, gap = acceptances[first - 1] - rejections[first - 1], rejections[first] - acceptances[first]
    share = gap_before / (gap_before + gap)
    return float(rejections[first - 1] + share * (rejections[first] - rejections[first - 1]))


def choose_evaluation_clips(clips: list[Clip], count: int) -> list[Clip]:
    """Two clips of each speaker, then two more of each, until there are `count`: pairs of one speaker as well as of two."""
    clips_of_speaker = defaultdict(list)
    for clip in clips:
        clips_of_speaker[clip.speaker].append(clip)
    pairs = [
        (start, of_speaker[start : start + 2])
        for of_speaker in clips_of_speaker.values()
        for start in range(0, len(of_speaker), 2)
    ]
    return [clip for _, pair in sorted(pairs, key=lambda pair: pair[0]) for clip in pair][:count]


def can_score_pairs(clips: list[Clip]) -> bool:
    """Whether two speakers have two clips each."""
    return sum(count > 1 for count in Counter(clip.speaker for clip in clips).values()) > 1


@torch.no_grad()
def evaluate(run: Run, encoder: nn.Module, head: nn.Module, dataset: SpeakerDataset) -> dict[str, float]:
    """
    Equal error rate over all pairs of held-out clips by the cosine of their embeddings, where `can_score_pairs`; loss and accuracy of
    those whose speakers are in the training split, where there are any. Each clip is embedded whole and alone.
    """
    accelerator = run.accelerator
    encoder, head = accelerator.unwrap_model(encoder), accelerator.unwrap_model(head)
    # Each process has seen other rows on the CPU: all take the statistics that are saved.
    for buffer in encoder.buffers():
        broadcast(buffer)
    encoder.eval()
    results = []
    for index in range(accelerator.process_index, len(dataset), accelerator.num_processes):
        example = dataset[index, index]
        speaker_embeds = encoder(example["fbank"][None].to(accelerator.device)).speaker_embeds.float()
        figures = None
        if example["speaker_number"] >= 0:
            number = torch.tensor([example["speaker_number"]], device=accelerator.device)
            figures = [float(value) for value in head(speaker_embeds, number)]
        results.append((index, F.normalize(speaker_embeds, dim=-1)[0].cpu().numpy(), figures))
    encoder.train()
    results = sorted(gather_object(results), key=lambda result: result[0])

    evaluation = {}
    if can_score_pairs(dataset.clips):
        embeds = np.stack([embed for _, embed, _ in results])
        speakers = np.array([clip.speaker for clip in dataset.clips])
        first, second = np.triu_indices(len(embeds), k=1)
        scores, is_same = (embeds @ embeds.T)[first, second], speakers[first] == speakers[second]
        evaluation["equal_error_rate"] = equal_error_rate(scores, is_same)
    known = [figures for _, _, figures in results if figures is not None]
    if known:
        evaluation["loss_per_clip"], evaluation["speaker_accuracy"] = np.mean(known, axis=0).tolist()
    return evaluation


def main() -> None:
    arguments = parse()
    run = Run(arguments, parts=("speaker_encoder",))
    accelerator = run.accelerator

    # Data
    extractor = IndexTTS2FeatureExtractor.from_pretrained(run.base / "feature_extractor")
    if arguments.crop_s > extractor.max_audio_s:
        raise ValueError(
            f"--crop_s is {arguments.crop_s:g}, but the checkpoint hears {extractor.max_audio_s:g} s of a clip. Use 2 to 4 s."
        )
    clips = read_manifest(arguments.data, arguments.columns, required=("speaker",))
    clips, faults = leave_out_faulty(clips, MIN_AUDIO_S)
    if faults:
        run.say(f"{len(faults)} clips cannot be used and are left out: " + "; ".join(faults))
    if not clips:
        raise ValueError(f"None of the {len(faults)} clips of {arguments.data} can be used. Mend or replace them.")
    splits = choose_splits(clips, arguments.validation_fraction)
    speakers = sorted({clip.speaker for clip in splits["train"]})
    if len(speakers) < 2:
        raise ValueError(
            f"The training split of {arguments.data} has {len(splits['train'])} clips of {len(speakers)} speaker, but speakers are "
            "told apart: at least two are needed, better hundreds. Check the column `speaker`, or add recordings."
        )
    held_out = choose_evaluation_clips(splits["validation"], arguments.evaluation_clips)
    held_out_speakers = {clip.speaker for clip in held_out}
    best_by = "equal_error_rate" if can_score_pairs(held_out) else "loss_per_clip"
    if best_by == "loss_per_clip" and not held_out_speakers & set(speakers):
        raise ValueError(
            f"The held-out split of {arguments.data} ({len(held_out)} clips) tells nothing about the encoder: it needs two speakers "
            "with two clips each, or a speaker of the training split. Move clips there, or raise --validation_fraction or "
            "--evaluation_clips."
        )
    train_set = SpeakerDataset(splits["train"], speakers, extractor, arguments.seed, arguments.crop_s)
    held_out_set = SpeakerDataset(held_out, speakers, extractor, arguments.seed)
    loader = run.make_loader(train_set, collate)

    # Model
    encoder = load_part(IndexTTS2SpeakerEncoder, run.base, "speaker_encoder")
    if arguments.gradient_checkpointing:
        encoder.enable_gradient_checkpointing(checkpoint_with_still_statistics)
    num_parameters = sum(parameter.numel() for parameter in encoder.parameters())
    head = AngularMarginHead(encoder.config["embed_dim"], len(speakers), arguments.scale, arguments.margin)
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        encoder = nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
    encoder.train()

    # Optimiser
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.learning_rate, weight_decay=arguments.weight_decay)
    scheduler = get_cosine_schedule_with_warmup(optimizer, arguments.warmup_steps, arguments.max_train_steps)
    encoder, optimizer, loader, scheduler = accelerator.prepare(encoder, optimizer, loader, scheduler)
    head = accelerator.prepare(head)
    run.restore()

    rows_per_step = arguments.batch_size * arguments.gradient_accumulation_steps * accelerator.num_processes
    run.say(
        f"{num_parameters:,} trainable parameters; {len(train_set)} clips of {len(speakers)} speakers to learn from, "
        f"{len(held_out_set)} of {len(held_out_speakers)} held out; "
        f"{arguments.crop_s * rows_per_step:.0f} s of speech a step"
    )

    # Loop
    if run.step == 0:
        run.keep_best(evaluate(run, encoder, head, held_out_set), best_by, {"speaker_encoder": encoder})
    for batch in run.batches(loader):
        with accelerator.accumulate(encoder, head):
            loss, accuracy = head(encoder(batch["fbank"]).speaker_embeds, batch["speaker_numbers"])
            run.check_loss(loss, batch["ids"])
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                run.clip_gradients(parameters)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        run.record({"speaker_accuracy": accuracy})
        if not accelerator.sync_gradients:
            continue
        run.advance(scheduler.get_last_lr()[0])
        if run.should_evaluate:
            run.keep_best(evaluate(run, encoder, head, held_out_set), best_by, {"speaker_encoder": encoder})
        if run.should_save:
            run.save_state()
        if run.is_done:
            break
    run.finish({"speaker_encoder": encoder})
    if run.step >= arguments.max_train_steps:
        run.say(
            f"The speaker vectors of {run.folder} are new. Prepare the data again before another part is trained: "
            f"`python training/prepare_dataset.py … --model {run.folder}`"
        )


if __name__ == "__main__":
    run_program(main)
