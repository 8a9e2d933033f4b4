"""
Trains a LoRA adapter of the text-to-semantic transformer for an emotion or a manner of speaking, from some minutes of it.

    python training/train_emotion_lora.py --model CHECKPOINT --data FEATURES --output ADAPTER
    accelerate launch training/train_emotion_lora.py --config training/configs/emotion_lora.yaml --model … --data … --output …

`CHECKPOINT` is a folder or a Hub repository; `FEATURES` comes from `prepare_dataset.py`, and `--emotion happy` takes the clips of that label
alone. `ADAPTER` holds the adapter as it was best on the held-out clips (`adapter_config.json`, `adapter_model.safetensors`) and a
card with the figures before and after; `ADAPTER/last` the same as it was at the end. Then:

    indextts2 speak "Hello." --model ADAPTER

As in stage 3 of the paper the conditioners are frozen, and here everything else is as well: only the adapter learns, in float32, while
the base is kept in the precision of `--mixed_precision`. With `--replay` some draws are clips of ordinary speech, against
forgetting, and what the base forgets is measured on their held-out split. All values that are not the paper's 30 % of free
lengths are ours.
"""

import argparse
import copy
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import nn
from torch.utils.data import Dataset
from transformers import LogitsProcessorList, get_cosine_schedule_with_warmup

from checkpoint import load_part, save_trained_weights_alone
from data import T2SDataset, collate_t2s, load_features
from indextts2_hf import IndexTTS2T2SForConditionalGeneration
from indextts2_hf.cards import compare_with_base, write_adapter_card
from indextts2_hf.configuration_indextts2 import lasting_name, resolve_checkpoint
from indextts2_hf.generation_t2s import SeededSamplingLogitsProcessor
from indextts2_hf.modeling_indextts2 import commit_of
from indextts2_hf.modeling_t2s import LORA_TARGET_MODULES
from run import Run, add_run_arguments, parse_arguments, positive_int, run_program
from train_t2s import token_accuracy, token_targets


FIGURE = "semantic_cross_entropy_per_token"
BASE_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    adapter = parser.add_argument_group("adapter")
    adapter.add_argument("--rank", type=positive_int, default=16, help="of the added matrices (default: %(default)s)")
    adapter.add_argument(
        "--alpha", type=positive_int, default=32, help="they count alpha / rank times (default: %(default)s)"
    )
    adapter.add_argument("--lora_dropout", type=float, default=0.05, help="before them (default: %(default)s)")
    adapter.add_argument("--dropout", type=float, help="in the trunk; by default what the checkpoint says")
    clips = parser.add_argument_group("clips")
    clips.add_argument("--emotion", metavar="NAME", help="take the clips with this label alone")
    clips.add_argument("--replay", metavar="FOLDER", help="prepared features of ordinary speech, against forgetting")
    clips.add_argument(
        "--replay_share", type=float, default=0.25, help="how many draws are replayed ones (default: %(default)s)"
    )
    clips.add_argument(
        "--free_length_probability",
        type=float,
        default=0.3,
        help="how often the length is not told (paper: %(default)s)",
    )
    stopping = parser.add_argument_group("evaluation")
    stopping.add_argument(
        "--patience",
        type=positive_int,
        default=5,
        help="evaluations without a better one after which the run ends (default: %(default)s)",
    )
    stopping.add_argument(
        "--num_spoken",
        type=positive_int,
        default=8,
        help="held-out texts that are spoken at a free length in each evaluation (default: %(default)s)",
    )
    add_run_arguments(parser)
    parser.set_defaults(
        max_train_steps=2000, batch_size=4, warmup_steps=50, eval_steps=50, save_steps=50, weight_decay=0.0
    )
    arguments = parse_arguments(parser)
    if not 0 <= arguments.replay_share < 1:
        parser.error(f"--replay_share is {arguments.replay_share}, but it must be at least 0 and below 1")
    return arguments


def load_clips(folder: str, split: str, checkpoint: Path, emotion: str | None = None) -> datasets.Dataset:
    """
    One split of prepared features, of one emotion where it is given.

    Raises:
        ValueError: there is no such clip.
    """
    features = load_features(folder, split, checkpoint)
    if emotion is None:
        return features
    labels = features.with_format(None)["emotion"][:]
    rows = [row for row, label in enumerate(labels) if label == emotion]
    if not rows:
        found = ", ".join(sorted({str(label) for label in labels}))
        raise ValueError(f"--emotion is {emotion!r}, but the clips in {folder}/{split} have the labels {found}.")
    return features.select(rows)


class WithReplay(Dataset):
    r"""
    The clips of the style, and in a share of the draws a clip of ordinary speech instead.

    Args:
        style, replay ([`T2SDataset`]): both.
        share (`float`): how many draws are replayed ones, 0 to 1.
        seed (`int`): of the choice.
    """

    def __init__(self, style: T2SDataset, replay: T2SDataset, share: float, seed: int):
        self.style = style
        self.replay = replay
        self.share = share
        self.seed = seed

    def __len__(self) -> int:
        return len(self.style)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index, draw = key
        rng = np.random.default_rng([self.seed, 3, draw])
        if rng.random() < self.share:
            return self.replay[int(rng.integers(len(self.replay))), draw]
        return self.style[index, draw]


@torch.no_grad()
def speak(run: Run, model: nn.Module, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """How fast the texts are spoken at a free length, sampled alike every time, and how fast they were recorded."""
    t2s: IndexTTS2T2SForConditionalGeneration = run.accelerator.unwrap_model(model)
    # A row is sampled by its own generator, so that it does not depend on the rows beside it.
    seeds = [run.arguments.seed + zlib.crc32(name.encode()) for name in batch["ids"]]
    generators = [torch.Generator(run.accelerator.device).manual_seed(seed) for seed in seeds]
    with run.accelerator.autocast():
        semantic_ids = t2s.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            speaker_latents=t2s.encode_speaker(batch["speaker_features"], batch["speaker_feature_lengths"]),
            emotion_embeds=t2s.encode_emotion(batch["emotion_features"], batch["emotion_feature_lengths"]),
            do_sample=True,
            num_beams=1,
            logits_processor=LogitsProcessorList([SeededSamplingLogitsProcessor(generators)]),
        )
    num_text_tokens = batch["attention_mask"].sum(dim=1)
    num_spoken = (semantic_ids != t2s.config.semantic_stop_token_id).sum(dim=1)
    num_recorded = (batch["labels"] >= 0).sum(dim=1)
    return {
        "semantic_tokens_per_text_token": (num_spoken / num_text_tokens).mean(),
        "recorded_semantic_tokens_per_text_token": (num_recorded / num_text_tokens).mean(),
    }


@torch.no_grad()
def read_clips(
    run: Run, model: nn.Module, dataset: T2SDataset, stop_token_id: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Of each batch: the cross-entropy per token of each clip, the accuracy, and how many clips count."""
    model.eval()
    for batch, count in run.evaluation_batches(dataset, collate_t2s):
        batch.pop("ids"), batch.pop("speaker_numbers"), batch.pop("emotion_numbers")
        logits = model(**batch, use_cache=False).logits
        targets = token_targets(batch["labels"], stop_token_id)
        losses = F.cross_entropy(logits.transpose(1, 2).float(), targets, reduction="none")
        accuracy = token_accuracy(logits, batch["labels"], stop_token_id)
        yield losses.sum(dim=1) / (targets >= 0).sum(dim=1), accuracy, count
    model.train()


def read_with_base(
    run: Run, model: nn.Module, held_out_sets: dict[str, T2SDataset], stop_token_id: int
) -> dict[str, list[torch.Tensor]]:
    """The cross-entropies of the held-out clips without the adapter, batch by batch."""
    t2s: IndexTTS2T2SForConditionalGeneration = run.accelerator.unwrap_model(model)
    t2s.disable_adapters()
    losses = {
        name: [losses for losses, _, _ in read_clips(run, model, dataset, stop_token_id)]
        for name, dataset in held_out_sets.items()
    }
    t2s.enable_adapters()
    return losses


@torch.no_grad()
def evaluate(
    run: Run,
    model: nn.Module,
    held_out_sets: dict[str, T2SDataset],
    base_losses: dict[str, list[torch.Tensor]],
    stop_token_id: int,
) -> dict[str, float]:
    """
    Cross-entropy and accuracy on held-out clips of the style and, as `replay_…`, of ordinary speech, with the number of clips and
    the standard error of the change from the base, clip by clip; and the pace of the style. Lengths, prompts and samples are drawn
    alike every time.
    """
    figures = {}
    for name, dataset in held_out_sets.items():
        batches = []
        clips = read_clips(run, model, dataset, stop_token_id)
        for (losses, accuracy, count), base in zip(clips, base_losses[name], strict=True):
            change = losses - base
            means = {"change": change.mean(), "square": change.square().mean()}
            batches.append(({FIGURE: losses.mean(), "token_accuracy": accuracy} | means, count))
        means = run.mean_over_rows(batches)
        variance = max(0.0, means.pop("square") - means.pop("change") ** 2)
        means["num_clips"] = len(dataset)
        if len(dataset) > 1:
            means["standard_error_of_change_per_token"] = math.sqrt(variance / (len(dataset) - 1))
        figures |= {f"{name}{key}": value for key, value in means.items()}
    model.eval()
    spoken = copy.copy(held_out_sets[""])
    spoken.targets = spoken.targets[: run.arguments.num_spoken]
    batches = [(speak(run, model, batch), count) for batch, count in run.evaluation_batches(spoken, collate_t2s)]
    figures |= run.mean_over_rows(batches)
    model.train()
    return figures


def describe(features: datasets.Dataset, folder: str, emotion: str | None) -> dict[str, str]:
    """What the card says of the clips; a clip at several speeds counts once."""
    table = features.with_format(None)
    seconds = dict(zip(table["clip"][:], table["duration_s"][:], strict=True))
    return {
        "data": Path(folder).name + (f", emotion {emotion}" if emotion else ""),
        "clips": f"{len(seconds)}, {sum(seconds.values()) / 60:.1f} minutes",
        "speakers": str(len(set(table["speaker"][:]))),
    }


def write_cards(run: Run, description: dict[str, str]) -> None:
    """The cards of the best and the last adapter, with the evaluations that the log holds."""
    rows = [json.loads(line) for line in (run.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    before, *after = [row for row in rows if f"eval/{FIGURE}" in row]
    if not after:
        run.say("No evaluation was made since the beginning: there is no card yet.")
        return
    best = min(after, key=lambda row: row[f"eval/{FIGURE}"])
    names = ("rank", "alpha", "lora_dropout", "learning_rate", "batch_size", "gradient_accumulation_steps")
    names += ("replay_share", "free_length_probability", "mixed_precision", "seed")
    settings = {name: getattr(run.arguments, name) for name in names if name != "replay_share" or run.arguments.replay}
    title = run.folder.absolute().name
    for folder, name, row in ((run.folder, title, best), (run.folder / "last", f"{title}/last", after[-1])):
        evaluations = [
            {key.removeprefix("eval/"): value for key, value in figures.items() if key.startswith("eval/")}
            for figures in (before, row)
        ]
        write_adapter_card(
            folder,
            name=name,
            base=lasting_name(run.arguments.model),
            data=description,
            settings={"steps": row["step"]} | settings,
            before=evaluations[0],
            after=evaluations[1],
        )
        if row is best:
            verdict = compare_with_base(*evaluations, "the held-out clips of the style")
            run.say(f"{run.folder}, after {row['step']} steps: {verdict}")


def main() -> None:
    arguments = parse()
    if (arguments.output / "config.json").is_file():
        raise ValueError(
            f"--output {arguments.output} holds a checkpoint, but an adapter has a folder of its own. Name another one."
        )
    run = Run(arguments, parts=("t2s",), is_checkpoint=False)
    accelerator = run.accelerator

    # Data
    options = (arguments.seed, arguments.free_length_probability, True)
    clips = load_clips(arguments.data, "train", run.base, arguments.emotion)
    style = train_set = T2SDataset(clips, *options)
    held_out = load_clips(arguments.data, "validation", run.base, arguments.emotion)
    held_out_sets = {"": T2SDataset(held_out, *options, prompts=clips)}
    if arguments.replay is not None:
        replay = T2SDataset(load_features(arguments.replay, "train", run.base), *options)
        train_set = WithReplay(style, replay, arguments.replay_share, arguments.seed)
        held_out = load_features(arguments.replay, "validation", run.base)
        held_out_sets["replay_"] = T2SDataset(held_out, *options, prompts=replay.features)
    for split, dataset in (("training", style), ("held-out", held_out_sets[""])):
        if dataset.lone_speakers:
            run.say(
                f"{len(dataset.lone_speakers)} speakers of the {split} split have one clip alone, which has no prompt: left out."
            )
    loader = run.make_loader(train_set, collate_t2s, style.lengths)

    # Model
    dropout = (
        {}
        if arguments.dropout is None
        else dict.fromkeys(["attn_pdrop", "resid_pdrop", "embd_pdrop"], arguments.dropout)
    )
    dtype = BASE_DTYPES[arguments.mixed_precision]
    t2s = load_part(IndexTTS2T2SForConditionalGeneration, run.base, "t2s", dtype, **dropout)
    # The adapter names its base by this, not by a folder of the cache.
    t2s.name_or_path = arguments.model
    t2s.revision = None if Path(resolve_checkpoint(arguments.model)).is_dir() else commit_of(run.base)
    t2s.add_adapter(
        LoraConfig(
            r=arguments.rank,
            lora_alpha=arguments.alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules=LORA_TARGET_MODULES,
            fan_in_fan_out=True,
        )
    )
    parameters = [parameter for parameter in t2s.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    if arguments.gradient_checkpointing:
        t2s.gradient_checkpointing_enable({"use_reentrant": False})
    t2s.train()
    stop_token_id, token_rate = t2s.config.semantic_stop_token_id, t2s.config.semantic_token_rate
    save_trained_weights_alone(accelerator, t2s.fingerprint)

    def write_adapter(folder: Path) -> None:
        accelerator.unwrap_model(t2s).save_pretrained(folder)
        (folder / "generation_config.json").unlink()  # the base has its own

    parts = {".": write_adapter}

    # Optimiser
    optimizer = torch.optim.AdamW(parameters, lr=arguments.learning_rate, weight_decay=arguments.weight_decay)
    scheduler = get_cosine_schedule_with_warmup(optimizer, arguments.warmup_steps, arguments.max_train_steps)
    t2s, optimizer, loader, scheduler = accelerator.prepare(t2s, optimizer, loader, scheduler)
    run.restore()

    rows_per_step = arguments.batch_size * arguments.gradient_accumulation_steps * accelerator.num_processes
    seconds = sum(style.lengths) / token_rate
    run.say(
        f"{sum(parameter.numel() for parameter in parameters):,} trainable parameters; {seconds / 60:.1f} minutes of speech in "
        f"{len(style)} rows of {len(style.speaker_names)} speakers; {seconds / len(style) * rows_per_step:.0f} s of speech a step"
    )

    # Loop
    base_losses = read_with_base(run, t2s, held_out_sets, stop_token_id)
    if run.step == 0:
        # The base: a new adapter changes nothing. It is no candidate, for an adapter without effect would be no use.
        run.log_evaluation(evaluate(run, t2s, held_out_sets, base_losses, stop_token_id))
    for batch in run.batches(loader):
        if run.evaluations_since_best >= arguments.patience:
            run.say(f"No better evaluation in {arguments.patience}: stopped at step {run.step}.")
            break
        ids, _, _ = (batch.pop(name) for name in ("ids", "speaker_numbers", "emotion_numbers"))
        with accelerator.accumulate(t2s):
            output = t2s(**batch, use_cache=False)
            run.check_loss(output.loss, ids)
            accelerator.backward(output.loss)
            if accelerator.sync_gradients:
                run.clip_gradients(parameters)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        run.record(
            {
                FIGURE: output.semantic_loss,
                "text_cross_entropy_per_token": output.text_loss,
                "token_accuracy": token_accuracy(output.logits, batch["labels"], stop_token_id),
            }
        )
        if not accelerator.sync_gradients:
            continue
        run.advance(scheduler.get_last_lr()[0])
        if run.should_evaluate:
            run.keep_best(evaluate(run, t2s, held_out_sets, base_losses, stop_token_id), FIGURE, parts)
        if run.should_save:
            run.save_state()
        if run.is_done:
            break
    run.finish(parts)
    if run.is_main:
        write_cards(run, describe(clips, arguments.data, arguments.emotion))


if __name__ == "__main__":
    run_program(main)
