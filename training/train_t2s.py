"""
Trains the text-to-semantic transformer in the three stages of the paper (section 3.1, `--stage`):

1. text and voice to semantic tokens, on all data. The emotion vector is zero.
2. the emotion path, on emotional data. A classifier tries to tell the speakers apart by the emotion vector, and a gradient
   reversal teaches the vector not to tell them. The speaker path is frozen.
3. everything behind the conditioners, on all data. Speaker and emotion path are frozen. Fine-tuning begins and ends here.

    python training/train_t2s.py --stage 1 --model CHECKPOINT --data FEATURES --output RUN
    accelerate launch training/train_t2s.py --config training/configs/t2s_stage1.yaml --model … --data … --output …

`CHECKPOINT` is a folder or a Hub repository: released and converted, trained before, or new (`make_checkpoint.py`). `FEATURES` comes
from `prepare_dataset.py`. `RUN` becomes a whole checkpoint: `indextts2 speak "Hello." --model RUN`.

The asked length stands in the prefix as a row of the semantic position table, and in 30 % of the draws the row is zero: the
length is then free. The speed of target and prompt is drawn among those that were prepared. With `--length_jitter` the row told
in training is up to so many tokens off the true count, so that neighbouring rows learn from one another; evaluation tells it exactly.

In inference the tokens that are read are its own, mistakes among them. With `--wrong_history_probability` it meets such in training: runs
of 80 ms at 50 Hz, about a sound, that come from elsewhere in the clip, while what is to be said next stays what it was. It has to
look at the text rather than at what it said last (word dropout, after Bowman et al. 2016, arXiv 1511.06349, who leave words out).

With `--text_dropout_probability` the model also learns to go on without any text, for guidance in inference: the `text_guidance_scale`
of the generation config (classifier-free guidance, Ho and Salimans 2022, arXiv 2207.12598).

With `--alignments` the first head of each block but the first is guided in its attention: it learns, as a cross-entropy beside the loss, to look at the
piece of the text that is being spoken (supervised attention, after Tachibana et al. 2018, arXiv 1710.08969, who have a diagonal instead of
alignments). It is meant for a model from nothing, which has to learn to read. The model is the same with and without.

S2M has the tokens and the states of T2S alone to know an emotion and the text by, but a state learns no more than what the next token needs.
With `--emotion_loss_weight` the states tell the emotion: a linear head, which is thrown away, learns to name that of the clip from the state of
each token. With `--piece_loss_weight` another one names the piece of the text that is being spoken, which needs `--alignments`.

The paper states AdamW, the rate 2e-4, the 30 %, and what each stage trains. Batch, steps, schedule, weight of the speaker term,
size of the classifier, weight of the text term (0.01, `text_loss_weight` of the checkpoint), the length jitter, the wrong tokens,
the draws without text, the terms of the states and the emotion prompt are ours.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from checkpoint import load_part, write_part
from data import Alignments, T2SDataset, collate_t2s, load_features
from indextts2_hf import IndexTTS2Processor, IndexTTS2T2SConfig, IndexTTS2T2SForConditionalGeneration
from indextts2_hf.emotion import EMOTIONS
from run import Run, add_run_arguments, non_negative_int, parse_arguments, run_program


SPEAKER_PATH = ("speaker_conformer", "speaker_perceiver")
EMOTION_PATH = ("emotion_conformer", "emotion_perceiver", "emotion_in_proj", "emotion_out_proj")
FROZEN = {1: EMOTION_PATH, 2: SPEAKER_PATH, 3: SPEAKER_PATH + EMOTION_PATH}

# Clips whose emotion vectors are averaged for a speaker and an emotion.
MAX_CLIPS_PER_PROTOTYPE = 16

# Clips from which the natural length of a text is fitted.
MIN_CLIPS_OF_FIT = 100


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--stage", type=int, choices=[1, 2, 3], required=True, help="see above")
    parser.add_argument(
        "--free_length_probability",
        type=float,
        default=0.3,
        help="how often the length is not told (paper: %(default)s)",
    )
    parser.add_argument(
        "--length_jitter",
        type=non_negative_int,
        default=0,
        metavar="TOKENS",
        help="how far a told length may be off the true one in training, either way (ours: %(default)s)",
    )
    parser.add_argument(
        "--wrong_history_probability",
        type=float,
        default=0.0,
        help="how often a run of the tokens that are read is wrong in training (ours: %(default)s)",
    )
    parser.add_argument(
        "--text_dropout_probability",
        type=float,
        default=0.0,
        help="how often there is no text in training (ours: %(default)s)",
    )
    parser.add_argument(
        "--speaker_loss_weight",
        type=float,
        default=0.1,
        help="weight of the reversed speaker term in stage 2 (ours: %(default)s)",
    )
    parser.add_argument("--classifier_size", type=int, default=256, help="width of its classifier (ours: %(default)s)")
    parser.add_argument(
        "--classifier_rate_factor",
        type=float,
        default=10.0,
        help="how much faster it learns than the rest, and the heads on the states too: at equal rates the vector outruns it, and "
        "a new classifier still finds the speaker (ours: %(default)s)",
    )
    parser.add_argument(
        "--alignments",
        type=Path,
        metavar="FOLDER",
        help="of the recordings, with JSON files beside them that say when each word is spoken (ours; see above)",
    )
    parser.add_argument(
        "--guided_attention_weight",
        type=float,
        default=0.5,
        help="weight of its term, where there are alignments (ours: %(default)s)",
    )
    parser.add_argument(
        "--emotion_loss_weight",
        type=float,
        default=0.0,
        help="weight of the term by which the states tell the emotion, in stages 2 and 3 (ours: %(default)s)",
    )
    parser.add_argument(
        "--piece_loss_weight",
        type=float,
        default=0.0,
        help="weight of the term by which they tell the piece that is spoken, where there are alignments (ours: %(default)s)",
    )
    parser.add_argument("--dropout", type=float, help="in the trunk; by default what the checkpoint says")
    add_run_arguments(parser)
    arguments = parse_arguments(parser)
    for name in ("free_length_probability", "wrong_history_probability", "text_dropout_probability"):
        if not 0.0 <= getattr(arguments, name) <= 1.0:
            parser.error(f"--{name} is {getattr(arguments, name)}, but a probability is a number from 0 to 1")
    if arguments.emotion_loss_weight and arguments.stage == 1:
        parser.error("--emotion_loss_weight needs stage 2 or 3: in stage 1 there is no emotion")
    if arguments.piece_loss_weight and arguments.alignments is None:
        parser.error("--piece_loss_weight needs --alignments, which say what is spoken when")
    return arguments


class ReverseGradient(torch.autograd.Function):
    """The identity, whose gradient has the other sign and a weight."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        return -weight * gradient, None


class SpeakerClassifier(nn.Module):
    """Tells the training speakers apart by the emotion vector, while its gradient teaches the vector to hide them."""

    def __init__(self, hidden_size: int, classifier_size: int, num_speakers: int):
        super().__init__()
        self.in_proj = nn.Linear(hidden_size, classifier_size)
        self.out_proj = nn.Linear(classifier_size, num_speakers)

    def forward(
        self, emotion_embeds: torch.Tensor, speaker_numbers: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(batch_size, hidden_size)` and `(batch_size,)` to mean cross-entropy and accuracy."""
        # The reversed term has no bound of its own: once the vector is ahead, it would grow without end and drown everything else.
        # A speaker who is found much worse than by chance is hidden well enough.
        with torch.no_grad():
            losses = F.cross_entropy(self.classify(emotion_embeds), speaker_numbers, reduction="none")
            is_found = (losses < 2 * math.log(self.out_proj.out_features))[:, None].to(emotion_embeds.dtype)
        logits = self.classify(ReverseGradient.apply(emotion_embeds, is_found))
        accuracy = (logits.argmax(dim=-1) == speaker_numbers).float().mean()
        return F.cross_entropy(logits, speaker_numbers), accuracy

    def classify(self, emotion_embeds: torch.Tensor) -> torch.Tensor:
        """Logits `(batch_size, num_speakers)`, float32."""
        # Normalised, or the vector could run away by growing.
        embeds = F.layer_norm(emotion_embeds, emotion_embeds.shape[-1:])
        return self.out_proj(F.gelu(self.in_proj(embeds))).float()


class StateHead(nn.Module):
    """Names from the state of each token what S2M is to know, while its gradient teaches the states to keep it."""

    def __init__(self, hidden_size: int, num_names: int):
        super().__init__()
        self.out_proj = nn.Linear(hidden_size, num_names)

    def forward(
        self, hidden_states: torch.Tensor, labels: torch.LongTensor, targets: torch.LongTensor
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, num_semantic_tokens + 1, hidden_size)`): T2S states.
            labels (`torch.LongTensor` of shape `(batch_size, num_semantic_tokens)`): tokens, -100 behind the end.
            targets (`torch.LongTensor` of shape `(batch_size, num_semantic_tokens)`): names, -100 where none is known.

        Returns:
            `torch.Tensor` of shape `()`: mean cross-entropy per token, 0 where no name is known; the mean over rows.
        """
        # The states that S2M gets: each predicts its token.
        logits = self.out_proj(hidden_states[:, :-1]).float()
        targets = targets.masked_fill(labels < 0, -100)
        losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="none")
        return (losses.sum(dim=1) / (labels >= 0).sum(dim=1)).mean()


class GuidedAttention:
    r"""
    Cross-entropy between where one head looks and what is being spoken, in each block but the first.

    Args:
        t2s (`IndexTTS2T2SForConditionalGeneration`): queries and keys of its blocks are kept from every pass in training.
    """

    def __init__(self, t2s: IndexTTS2T2SForConditionalGeneration):
        self.hidden_size = t2s.config.hidden_size
        self.head_dim = t2s.config.hidden_size // t2s.config.num_attention_heads
        self.kept: list[torch.Tensor] = []
        t2s.model.register_forward_pre_hook(lambda *_: self.kept.clear())
        for block in t2s.model.layers[1:]:
            block.attn.c_attn.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if module.training:
            self.kept.append(output)

    def loss(self, attention_mask: torch.Tensor, text_positions: torch.LongTensor) -> torch.Tensor:
        """
        Of the last pass.

        Args:
            attention_mask (`torch.Tensor` of shape `(batch_size, text_length)`): of the text, padded on the right.
            text_positions (`torch.LongTensor` of shape `(batch_size, num_semantic_tokens)`): piece of the text that is
                spoken, -100 where that is not known.

        Returns:
            `torch.Tensor` of shape `()`: mean over blocks and tokens; 0 where nothing is known.
        """
        kept, self.kept = self.kept, []
        num_rows = text_positions.shape[1]
        # Behind the prefix, which is padded on the left, comes the start token, whose row predicts the first semantic token.
        start = kept[0].shape[1] - num_rows - 1
        num_pieces, text_length = attention_mask.sum(dim=1, keepdim=True), attention_mask.shape[1]
        targets = torch.where(text_positions < 0, -100, start - 1 - num_pieces + text_positions)
        steps = torch.arange(kept[0].shape[1], device=targets.device)
        is_hidden = steps > start + torch.arange(num_rows, device=targets.device)[:, None]
        is_hidden = is_hidden | (steps < text_length - num_pieces)[:, None]
        losses = []
        for states in kept:
            query = states[:, start : start + num_rows, : self.head_dim].float()
            key = states[..., self.hidden_size : self.hidden_size + self.head_dim].float()
            scores = (query @ key.transpose(1, 2) * self.head_dim**-0.5).masked_fill(is_hidden, -math.inf)
            losses.append(F.cross_entropy(scores.transpose(1, 2), targets, ignore_index=-100, reduction="sum"))
        return torch.stack(losses).mean() / (targets >= 0).sum().clamp(min=1)


def token_targets(labels: torch.LongTensor, stop_token_id: int) -> torch.LongTensor:
    """What the rows of the logits are to predict: the codes of each row, then the stop token, then -100."""
    num_codes = (labels >= 0).sum(dim=1, keepdim=True)
    return F.pad(labels, (0, 1), value=-100).scatter(1, num_codes, stop_token_id)


def token_accuracy(logits: torch.Tensor, labels: torch.LongTensor, stop_token_id: int) -> torch.Tensor:
    """Share of the tokens, stop included, whose most likely id is right, in teacher forcing: the mean over rows."""
    targets = token_targets(labels, stop_token_id)
    return ((logits.argmax(dim=-1) == targets).sum(dim=1) / (targets >= 0).sum(dim=1)).mean()


@torch.no_grad()
def evaluate(run: Run, model: nn.Module, dataset: T2SDataset, stop_token_id: int) -> dict[str, float]:
    """Cross-entropies and accuracy on the held-out split. Lengths and prompts are the same every time."""
    model.eval()
    batches = []
    for batch, count in run.evaluation_batches(dataset, collate_t2s):
        for name in ("ids", "speaker_numbers", "emotion_numbers"):
            batch.pop(name)
        output = model(**batch, use_cache=False)
        figures = {
            "semantic_cross_entropy_per_token": output.semantic_loss,
            "text_cross_entropy_per_token": output.text_loss,
            "token_accuracy": token_accuracy(output.logits, batch["labels"], stop_token_id),
        }
        batches.append((figures, count))
    model.train()
    return run.mean_over_rows(batches)


@torch.no_grad()
def store_emotion_prototypes(t2s: IndexTTS2T2SForConditionalGeneration, dataset: T2SDataset) -> list[str]:
    """
    Fills the emotion prototypes, by which emotion weights work: for each emotion that the clips are labelled with, the mean
    emotion vector of each speaker, at most as many speakers as the checkpoint has room for. Other emotions keep theirs.

    Returns:
        `list[str]`: the emotions that were stored.
    """
    prototypes = t2s.emotion_prototypes
    rows: dict[tuple[str, str], list[int]] = {}
    for row, pair in enumerate(zip(dataset.emotions, dataset.speakers, strict=True)):
        rows.setdefault(pair, []).append(row)
    stored, start = [], 0
    for name, count in zip(EMOTIONS, prototypes.counts, strict=True):
        speakers = [speaker for emotion, speaker in rows if emotion == name][:count]
        for place in range(count if speakers else 0):
            # Where there are fewer speakers than places, some stand twice.
            clips = rows[name, speakers[place % len(speakers)]][:MAX_CLIPS_PER_PROTOTYPE]
            embeds = []
            for row in clips:
                features = torch.as_tensor(dataset.features[row]["semantic_features"]).float().to(t2s.device)
                embeds.append(t2s.encode_emotion(features[None])[0])
            speaker_embeds = [torch.as_tensor(dataset.features[row]["speaker_embeds"]).float() for row in clips]
            prototypes.emotion_embeds[start + place] = torch.stack(embeds).mean(dim=0)
            prototypes.speaker_embeds[start + place] = torch.stack(speaker_embeds).mean(dim=0)
        stored += [name] if speakers else []
        start += count
    return stored


def fit_natural_length(dataset: T2SDataset) -> list[float] | None:
    """
    `natural_semantic_tokens` of the configuration, by least squares over the clips at their own tempo; `None` where there are
    fewer than `MIN_CLIPS_OF_FIT` or their length does not grow with their text.
    """
    table = dataset.features.with_format(None).select_columns(["input_ids", "num_semantic_tokens", "speed"])[:]
    pairs = [
        (len(input_ids), num_tokens)
        for input_ids, num_tokens, speed in zip(*table.values(), strict=True)
        if speed == 1.0
    ]
    if len(pairs) < MIN_CLIPS_OF_FIT or len({length for length, _ in pairs}) < 2:
        return None
    slope, constant = (round(float(value), 3) for value in np.polyfit(*zip(*pairs, strict=True), 1))
    return [constant, slope] if constant >= 0 and slope > 0 else None


def main() -> None:
    arguments = parse()
    run = Run(arguments, parts=("t2s",), can_shard=arguments.stage != 2)
    accelerator = run.accelerator

    # Data
    options = (arguments.seed, arguments.free_length_probability, arguments.stage > 1)
    clips, held_out = (load_features(arguments.data, split, run.base) for split in ("train", "validation"))
    config = IndexTTS2T2SConfig.from_pretrained(run.base, subfolder="t2s")
    alignments = None
    if arguments.alignments is not None:
        tokenizer = IndexTTS2Processor.from_pretrained(run.base).tokenizer
        alignments = Alignments(arguments.alignments, tokenizer, config.semantic_token_rate)
    train_set = T2SDataset(
        clips,
        *options,
        length_jitter=arguments.length_jitter,
        max_semantic_tokens=config.max_semantic_tokens,
        alignments=alignments,
        wrong_history_probability=arguments.wrong_history_probability,
        text_dropout_probability=arguments.text_dropout_probability,
    )
    if alignments is not None and not any(alignments.path_of(clip).is_file() for clip in train_set.clips):
        raise ValueError(
            f"--alignments {arguments.alignments}: none of the {len(set(train_set.clips))} clips has a JSON file there, the first not "
            f"{alignments.path_of(train_set.clips[0])}. Name the folder that `prepare_dataset.py` read."
        )
    held_out_set = T2SDataset(held_out, *options, prompts=clips)
    for split, dataset in (("training", train_set), ("held-out", held_out_set)):
        if dataset.lone_speakers:
            run.say(
                f"{len(dataset.lone_speakers)} speakers of the {split} split have one clip alone, which has no prompt: left out."
            )
    loader = run.make_loader(train_set, collate_t2s, train_set.lengths)
    if arguments.emotion_loss_weight and len(train_set.emotion_names) < 2:
        raise ValueError(
            f"--emotion_loss_weight needs clips of at least two emotions, but --data {arguments.data} has "
            f"{', '.join(train_set.emotion_names) or 'none'}. Fill the column `emotion`, or leave the option out."
        )

    # Model
    dropout = (
        {}
        if arguments.dropout is None
        else dict.fromkeys(["attn_pdrop", "resid_pdrop", "embd_pdrop"], arguments.dropout)
    )
    # On a CPU the backward pass of torch's fused attention is slower than that of its parts.
    attention = {"attn_implementation": "eager"} if accelerator.device.type == "cpu" else {}
    t2s = load_part(IndexTTS2T2SForConditionalGeneration, run.base, "t2s", **dropout, **attention)
    if not t2s.config.use_length_row:
        run.say(
            "This checkpoint has no length row (a released one): the length is not told, and stays to the token count rule."
        )
    elif (natural := fit_natural_length(train_set)) is not None:
        t2s.config.natural_semantic_tokens = natural
    if arguments.stage == 1:
        # No emotion until stage 2 teaches it: inference adds the vector whatever stage a checkpoint is from.
        nn.init.zeros_(t2s.emotion_out_proj.weight)
        nn.init.zeros_(t2s.emotion_out_proj.bias)
    guided_attention = None if alignments is None else GuidedAttention(t2s)
    for name in FROZEN[arguments.stage]:
        getattr(t2s, name).requires_grad_(False)
    if t2s.text_recognizer is not None:
        t2s.text_recognizer.requires_grad_(False)  # `train_text_recognizer.py` trains it
    if arguments.gradient_checkpointing:
        t2s.gradient_checkpointing_enable({"use_reentrant": False})
    t2s.train()
    stop_token_id, token_rate = t2s.config.semantic_stop_token_id, t2s.config.semantic_token_rate

    # Optimiser
    parameters = [parameter for parameter in t2s.parameters() if parameter.requires_grad]
    groups = [{"params": parameters}]
    num_parameters = sum(parameter.numel() for parameter in parameters)
    classifier = None
    state_heads: dict[str, nn.Module] = {}
    if arguments.stage == 2:
        num_speakers = len(train_set.speaker_names)
        classifier = SpeakerClassifier(t2s.config.hidden_size, arguments.classifier_size, num_speakers)
    if arguments.emotion_loss_weight:
        state_heads["emotion"] = StateHead(t2s.config.hidden_size, len(train_set.emotion_names))
    if arguments.piece_loss_weight:
        state_heads["piece"] = StateHead(t2s.config.hidden_size, t2s.config.text_vocab_size)
    rate = arguments.classifier_rate_factor * arguments.learning_rate
    groups += [
        {"params": list(head.parameters()), "lr": rate}
        for head in (classifier, *state_heads.values())
        if head is not None
    ]
    optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate, weight_decay=arguments.weight_decay)
    scheduler = get_cosine_schedule_with_warmup(optimizer, arguments.warmup_steps, arguments.max_train_steps)
    t2s, optimizer, loader, scheduler = accelerator.prepare(t2s, optimizer, loader, scheduler)
    if classifier is not None:
        classifier = accelerator.prepare(classifier)
    state_heads = {name: accelerator.prepare(head) for name, head in state_heads.items()}
    heads = [head for head in (classifier, *state_heads.values()) if head is not None]
    run.restore()

    rows_per_step = arguments.batch_size * arguments.gradient_accumulation_steps * accelerator.num_processes
    seconds = sum(train_set.lengths) / token_rate
    run.say(
        f"{num_parameters:,} trainable parameters; {seconds / 3600:.2f} h of speech in {len(train_set)} rows of "
        f"{len(train_set.speaker_names)} speakers; {seconds / len(train_set) * rows_per_step:.0f} s of speech a step"
    )

    # Loop
    if run.step == 0:
        run.keep_best(
            evaluate(run, t2s, held_out_set, stop_token_id), "semantic_cross_entropy_per_token", {"t2s": t2s}
        )
    for batch in run.batches(loader):
        ids, speaker_numbers, emotion_numbers = (
            batch.pop(name) for name in ("ids", "speaker_numbers", "emotion_numbers")
        )
        text_positions = batch.pop("text_positions", None)
        with accelerator.accumulate(t2s, *heads):
            output = t2s(**batch, use_cache=False)
            loss = output.loss
            figures = {
                "semantic_cross_entropy_per_token": output.semantic_loss,
                "text_cross_entropy_per_token": output.text_loss,
                "token_accuracy": token_accuracy(output.logits, batch["labels"], stop_token_id),
            }
            if guided_attention is not None:
                figures["guided_attention_cross_entropy"] = guided_attention.loss(
                    batch["attention_mask"], text_positions
                )
                loss = loss + arguments.guided_attention_weight * figures["guided_attention_cross_entropy"]
            if classifier is not None:
                speaker_loss, figures["speaker_accuracy"] = classifier(output.emotion_embeds, speaker_numbers)
                figures["speaker_cross_entropy_per_clip"] = speaker_loss
                loss = loss + arguments.speaker_loss_weight * speaker_loss
            targets = {"emotion": emotion_numbers[:, None].expand_as(batch["labels"])}
            if text_positions is not None:
                pieces = batch["input_ids"].gather(1, text_positions.clamp(min=0))
                targets["piece"] = pieces.masked_fill(text_positions < 0, -100)
            for name, head in state_heads.items():
                state_loss = head(output.last_hidden_state, batch["labels"], targets[name])
                figures[f"{name}_cross_entropy_per_token"] = state_loss
                loss = loss + getattr(arguments, f"{name}_loss_weight") * state_loss
            run.check_loss(loss, ids)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                run.clip_gradients(parameters)
                for head in heads:
                    accelerator.clip_grad_norm_(head.parameters(), arguments.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        run.record(figures)
        if not accelerator.sync_gradients:
            continue
        run.advance(scheduler.get_last_lr()[0])
        if run.should_evaluate:
            figures = evaluate(run, t2s, held_out_set, stop_token_id)
            run.keep_best(figures, "semantic_cross_entropy_per_token", {"t2s": t2s})
        if run.should_save:
            run.save_state()
        if run.is_done:
            break
    run.finish({"t2s": t2s})

    if arguments.stage > 1 and run.is_main:
        for folder in (run.folder, run.folder / "last"):
            finished = IndexTTS2T2SForConditionalGeneration.from_pretrained(folder, subfolder="t2s")
            stored = store_emotion_prototypes(finished.to(accelerator.device), train_set)
            write_part(folder, "t2s", finished)
        run.say(
            f"Emotion weights know {', '.join(stored) or 'nothing new: no clip has one of the eight emotion names'}."
        )


if __name__ == "__main__":
    run_program(main)
