"""
Trains the semantic codec of a checkpoint made from scratch: features of the speech encoder to ids and back. A released
checkpoint brings its own.

    python training/train_semantic_codec.py --model CHECKPOINT --data FEATURES --output RUN
    accelerate launch training/train_semantic_codec.py --config training/configs/semantic_codec.yaml --model … --data … --output …

`FEATURES` comes from `prepare_dataset.py`. `RUN` becomes a whole checkpoint. The ids mean something else afterwards, so prepare
the data again with `--model RUN` before the other parts are trained.

1. The mean and variance of the speech encoder's hidden states over the training split become the codec's, unless the
   checkpoint has them already (`--update_statistics` measures them again). Features are prepared with the statistics of
   their checkpoint; here they are brought back to hidden states first.
2. A codec without statistics is untrained: its codebook then begins at the centres of its own encoder's latents.
3. The loss is the codec's own: squared error of the reconstruction, 0.15 times the commitment, once the codebook term.
4. A code that no frame has chosen for `--dead_code_steps` steps is moved onto a latent of the batch at hand.
5. With `--ctc_weight` a small convolutional network spells the text from the embeddings of the ids (CTC), so that a small codebook keeps
   what is said. It belongs to the run, not to the checkpoint.

The best checkpoint is the one with the highest explained variance on the held-out split, less `--ctc_weight` times its CTC loss
per label where that term is on: what the weight says a label is worth in training, it is worth in choosing.

The paper gives no recipe for its codec, which is another project's. The two weights in the loss are that project's; all other
values are ours.
"""

import argparse
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import get_cosine_schedule_with_warmup

from checkpoint import load_part
from data import ctc_token_errors, draw_generator, load_features, num_ctc_frames
from indextts2_hf import IndexTTS2SemanticCodec, IndexTTS2T2SConfig
from indextts2_hf.modeling_semantic_codec import IndexTTS2SemanticCodecOutput
from run import Run, add_run_arguments, parse_arguments, run_program


# The first codebook: latents for each code, rounds of k-means, and how many latents are compared at once.
LATENTS_PER_CODE = 32
KMEANS_ROUNDS = 10
FRAMES_AT_ONCE = 8192


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--crop_frames",
        type=int,
        default=300,
        help="frames cut from a row at a random place (ours: %(default)s)",
    )
    parser.add_argument(
        "--dead_code_steps",
        type=int,
        default=50,
        help="steps without use after which a code is moved (ours: %(default)s)",
    )
    parser.add_argument(
        "--codebook_rate_factor",
        type=float,
        default=10.0,
        help="how much faster the codebook learns than the rest (ours: %(default)s)",
    )
    parser.add_argument(
        "--update_statistics",
        action="store_true",
        help="measure mean and variance of the hidden states though the checkpoint has them",
    )
    parser.add_argument(
        "--ctc_weight",
        type=float,
        default=0.0,
        help="weight of the CTC loss per label, which begins at tens; rows are not cropped then (ours: %(default)s, off; 0.01 "
        "spells minutes of speech and costs little of the variance)",
    )
    add_run_arguments(parser, model=None)
    parser.set_defaults(learning_rate=3e-4, batch_size=16)
    return parse_arguments(parser)


# --- data ----------------------------------------------------------------------------------------------------------------


class CodecDataset(Dataset):
    r"""
    Hidden states of the speech encoder, whole or cropped, and the text ids that belong to whole ones.

    Args:
        features (`datasets.Dataset`): from `load_features`.
        base (`IndexTTS2SemanticCodec`): the codec that they were normalised by.
        seed (`int`): of the crops.
        crop_frames (`int`, *optional*): frames of a crop; whole rows without it.
        with_text (`bool`, defaults to `False`): whether rows whose text CTC cannot spell are left out.
    """

    def __init__(
        self,
        features: datasets.Dataset,
        base: IndexTTS2SemanticCodec,
        seed: int,
        crop_frames: int | None = None,
        with_text: bool = False,
    ):
        self.features = features.select_columns(["clip", "semantic_features", "input_ids"])
        self.mean, self.deviation = base.feature_mean.clone(), base.feature_variance.sqrt()
        self.seed = seed
        self.crop_frames = crop_frames
        counts = list(features.with_format(None)["num_semantic_tokens"])
        self.rows = list(range(len(features)))
        if with_text:
            texts = features.with_format(None)["input_ids"]
            self.rows = [row for row, ids in enumerate(texts) if 0 < num_ctc_frames(ids) <= counts[row]]
            if not self.rows:
                raise ValueError(
                    f"None of {len(features)} clips has a text that fits into its frames, but --ctc_weight needs them. Prepare the "
                    "data with texts, or train without --ctc_weight."
                )
        self.num_left_out = len(features) - len(self.rows)
        self.num_frames = sum(counts[row] for row in self.rows)
        self.lengths = [min(counts[row], crop_frames or counts[row]) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """The example of a pair (index, number of the draw)."""
        index, draw = key
        row = self.features[self.rows[index]]
        hidden_states = self.restore(row)
        if self.crop_frames is not None:
            start = int(draw_generator(self.seed, draw).integers(max(1, len(hidden_states) - self.crop_frames + 1)))
            hidden_states = hidden_states[start : start + self.crop_frames]
        return {"id": row["clip"], "hidden_states": hidden_states, "text": torch.as_tensor(row["input_ids"]).long()}

    def restore(self, row: dict[str, Any]) -> torch.Tensor:
        """What the speech encoder gave, of shape `(num_frames, feature_size)`."""
        return torch.as_tensor(row["semantic_features"]).float() * self.deviation + self.mean


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """`ids`, the names of the clips, `hidden_states` with its `attention_mask`, and `texts` with `text_lengths`."""
    states = [example["hidden_states"] for example in examples]
    texts = [example["text"] for example in examples]
    return {
        "ids": [example["id"] for example in examples],
        "hidden_states": pad_sequence(states, batch_first=True),
        "attention_mask": pad_sequence([torch.ones(len(rows), dtype=torch.long) for rows in states], batch_first=True),
        "texts": pad_sequence(texts, batch_first=True),
        "text_lengths": torch.tensor([len(text) for text in texts]),
    }


def measure_statistics(run: Run, dataset: CodecDataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of each channel of the hidden states over all frames, summed up in float64; over all processes."""
    accelerator = run.accelerator
    count = torch.zeros(1, dtype=torch.float64)
    total, squares = (torch.zeros(len(dataset.mean), dtype=torch.float64) for _ in range(2))
    for index in range(accelerator.process_index, len(dataset), accelerator.num_processes):
        row = dataset.features[dataset.rows[index]]
        hidden_states = dataset.restore(row).double()
        if not hidden_states.isfinite().all():
            raise ValueError(f"The features of {row['clip']} hold values that are no numbers. Prepare the data again.")
        count += len(hidden_states)
        total += hidden_states.sum(dim=0)
        squares += hidden_states.square().sum(dim=0)
    sums = torch.cat([count, total, squares]).to(accelerator.device)
    count, total, squares = accelerator.reduce(sums, reduction="sum").cpu().split([1, len(total), len(squares)])
    mean = total / count
    # A channel that never changes stays finite.
    return mean.float(), (squares / count - mean.square()).clamp(min=1e-8).float()


# --- codebook ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def initialize_codebook(codec: IndexTTS2SemanticCodec, dataset: CodecDataset, seed: int) -> None:
    """
    Codebook rows at the centres of the encoder's latents, by k-means on directions, which is how rows are chosen. A row that no
    latent chooses becomes a latent drawn anew.
    """
    quantizer = codec.quantizer
    size, rng = len(quantizer.codebook.weight), np.random.default_rng([seed, 3])
    latents, needed = [], LATENTS_PER_CODE * size
    for index in rng.permutation(len(dataset)):
        hidden_states = dataset[int(index), int(index)]["hidden_states"].to(codec.device)
        latents.append(quantizer.project_in(codec.encoder(codec.normalize(hidden_states)[None]))[0])
        needed -= len(latents[-1])
        if needed <= 0:
            break
    latents = torch.cat(latents)

    def drawn() -> torch.Tensor:
        return latents[torch.from_numpy(rng.integers(len(latents), size=size)).to(latents.device)]

    rows = quantizer.codebook.weight
    rows.copy_(drawn())
    for _ in range(KMEANS_ROUNDS):
        ids = torch.cat([quantizer.nearest(part) for part in latents.split(FRAMES_AT_ONCE)])
        counts = ids.bincount(minlength=size)[:, None]
        centres = torch.zeros_like(rows).index_add_(0, ids, latents) / counts.clamp(min=1)
        rows.copy_(torch.where(counts > 0, centres, drawn()))


class CodeUse:
    """Steps since each code was last chosen; part of the saved state."""

    def __init__(self, codebook_size: int):
        self.idle_steps = torch.zeros(codebook_size, dtype=torch.long)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"idle_steps": self.idle_steps}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.idle_steps = state["idle_steps"]


def gather_frames(
    accelerator: Accelerator, output: IndexTTS2SemanticCodecOutput, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids `(num_frames,)` and latents `(num_frames, codebook_dim)` of the real frames of all processes, the same on each."""
    ids = output.semantic_ids.masked_fill(attention_mask == 0, -1)
    ids = accelerator.gather(accelerator.pad_across_processes(ids, dim=1, pad_index=-1))
    latents = accelerator.gather(accelerator.pad_across_processes(output.latents.detach().contiguous(), dim=1))
    return ids[ids >= 0], latents[ids >= 0]


@torch.no_grad()
def move_dead_codes(
    rows: torch.Tensor, use: CodeUse, latents: torch.Tensor, dead_code_steps: int, rng: np.random.Generator
) -> int:
    """
    Ends a step for `use`, and moves the codes that were idle too long onto latents drawn from `latents`.

    Args:
        rows (`torch.Tensor` of shape `(codebook_size, codebook_dim)`): the codebook, changed in place.
        use (`CodeUse`): changed in place; the codes of this step are at zero.
        latents (`torch.Tensor` of shape `(num_frames, codebook_dim)`): of all processes.
        dead_code_steps (`int`): steps without use after which a code is dead.
        rng (`np.random.Generator`): alike on all processes, whose codebooks so remain alike.

    Returns:
        `int`: how many were moved.
    """
    use.idle_steps += 1
    # No latent twice: two codes in one place are one.
    dead = (use.idle_steps > dead_code_steps).nonzero()[: len(latents), 0]
    chosen = torch.from_numpy(rng.choice(len(latents), size=len(dead), replace=False))
    rows[dead.to(rows.device)] = latents[chosen.to(rows.device)].to(rows)
    use.idle_steps[dead] = 0
    return len(dead)


# --- spelling ------------------------------------------------------------------------------------------------------------


class Speller(nn.Module):
    """
    Text ids and a blank from the embeddings of semantic ids. A piece of a word lasts several frames and one frame is little of it: each
    is read with eight on either side.
    """

    def __init__(self, feature_size: int, num_labels: int, hidden_size: int = 256):
        super().__init__()
        self.input_projection = nn.Linear(feature_size, hidden_size)
        self.convs = nn.ModuleList(nn.Conv1d(hidden_size, hidden_size, 5, padding=2) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_size) for _ in range(4))
        self.output_projection = nn.Linear(hidden_size, num_labels)

    def forward(self, semantic_embeds: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits of shape `(batch_size, num_frames, num_labels)`."""
        hidden_states = self.input_projection(semantic_embeds)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            residual = norm(hidden_states) * attention_mask[..., None]
            hidden_states = hidden_states + F.gelu(conv(residual.transpose(1, 2)).transpose(1, 2))
        return self.output_projection(hidden_states)


def ctc_loss(logits: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    """Mean over rows of each row's CTC loss per label. The blank is the last entry of `logits`."""
    losses = F.ctc_loss(
        logits.float().log_softmax(dim=-1).transpose(0, 1),
        batch["texts"],
        batch["attention_mask"].sum(dim=1),
        batch["text_lengths"],
        blank=logits.shape[-1] - 1,
        reduction="none",
    )
    return (losses / batch["text_lengths"]).mean()


# --- evaluation ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    run: Run, codec: nn.Module, head: nn.Module | None, dataset: CodecDataset, ctc_weight: float
) -> dict[str, float]:
    """
    Figures of whole held-out clips: `explained_variance`, one less the squared error over the variance around the channels' means
    of the split, all frames counting alike; `codebook_use`, the share of the codes that occur; and their perplexity, which is the
    number of codes that would be as hard to guess if all were equally frequent.
    """
    unwrapped = run.accelerator.unwrap_model(codec)
    size, width = unwrapped.config["codebook_size"], unwrapped.config["feature_size"]
    sizes = {"rows": 1, "frames": 1, "residual": 1, "loss": 1, "ctc": 1, "errors": 1, "labels": 1}
    sizes |= {"total": width, "squares": width, "codes": size}
    sums = {name: torch.zeros(count, dtype=torch.float64, device=unwrapped.device) for name, count in sizes.items()}
    codec.eval()
    for batch, count in run.evaluation_batches(dataset, collate):
        mask = batch["attention_mask"] == 1
        features = unwrapped.normalize(batch["hidden_states"])
        output = codec(features, batch["attention_mask"])
        if count:
            frames, rebuilt = features[mask].double(), output.reconstruction[mask].double()
            sums["rows"] += count
            sums["loss"] += output.loss * count
            sums["frames"] += len(frames)
            sums["residual"] += (frames - rebuilt).square().sum()
            sums["total"] += frames.sum(dim=0)
            sums["squares"] += frames.square().sum(dim=0)
            sums["codes"] += output.semantic_ids[mask].bincount(minlength=size)
            if head is not None:
                logits = run.accelerator.unwrap_model(head)(output.semantic_embeds, batch["attention_mask"])
                sums["ctc"] += ctc_loss(logits, batch) * count
                num_frames = batch["attention_mask"].sum(dim=1)
                sums["errors"] += sum(ctc_token_errors(logits, num_frames, batch["texts"], batch["text_lengths"]))
                sums["labels"] += batch["text_lengths"].sum()
    codec.train()
    flat = run.accelerator.reduce(torch.cat(list(sums.values())), reduction="sum").cpu()
    sums = dict(zip(sizes, flat.split(list(sizes.values())), strict=True))
    variance = (sums["squares"] - sums["total"].square() / sums["frames"]).sum()
    shares = sums["codes"] / sums["frames"]
    figures = {
        "explained_variance": 1 - sums["residual"] / variance,
        "squared_error_per_value": sums["residual"] / (sums["frames"] * width),
        "loss": sums["loss"] / sums["rows"],
        "codebook_use": (sums["codes"] > 0).double().mean(),
        "codebook_perplexity": torch.special.entr(shares).sum().exp(),
    }
    if head is not None:
        figures["ctc_loss_per_label"] = sums["ctc"] / sums["rows"]
        figures["token_error_rate"] = sums["errors"] / sums["labels"]
        figures["score"] = figures["explained_variance"] - ctc_weight * figures["ctc_loss_per_label"]
    return {name: float(value) for name, value in figures.items()}


def main() -> None:
    arguments = parse()
    run = Run(arguments, parts=("semantic_codec",), higher_is_better=True)
    accelerator = run.accelerator
    with_text = arguments.ctc_weight > 0
    best_by = "score" if with_text else "explained_variance"

    # Data
    codec = load_part(IndexTTS2SemanticCodec, run.base, "semantic_codec")
    crop_frames = None if with_text else arguments.crop_frames
    train_set, held_out_set = (
        CodecDataset(load_features(arguments.data, split, run.base), codec, arguments.seed, frames, with_text)
        for split, frames in (("train", crop_frames), ("validation", None))
    )
    if train_set.num_left_out:
        run.say(f"{train_set.num_left_out} clips are left out, because CTC cannot spell their text in their frames.")
    loader = run.make_loader(train_set, collate, train_set.lengths)

    # Model
    codec.to(accelerator.device)
    is_untrained = bool((codec.feature_mean == 0).all() and (codec.feature_variance == 1).all())
    is_new = is_untrained or arguments.update_statistics
    if run.step == 0 and is_new:
        mean, variance = measure_statistics(run, train_set)
        codec.feature_mean.copy_(mean)
        codec.feature_variance.copy_(variance)
        run.say("The codec's mean and variance are now those of the hidden states of the training split.")
    if run.step == 0 and is_untrained:
        initialize_codebook(codec, train_set, arguments.seed)
    if arguments.gradient_checkpointing:
        codec.enable_gradient_checkpointing()
    use = CodeUse(codec.config["codebook_size"])
    t2s_config = IndexTTS2T2SConfig.from_pretrained(run.base, subfolder="t2s")
    accelerator.register_for_checkpointing(use)

    # Optimiser
    parameters = list(codec.parameters())
    num_parameters = sum(parameter.numel() for parameter in parameters)
    codebook = codec.quantizer.codebook.weight
    head = None
    if with_text:
        head = Speller(codec.config["feature_size"], t2s_config.text_vocab_size + 1)
        parameters += head.parameters()
    # A row of the codebook learns only when it is chosen, and has to follow latents that move at every step.
    groups = [
        {"params": [parameter for parameter in parameters if parameter is not codebook]},
        {
            "params": [codebook],
            "lr": arguments.codebook_rate_factor * arguments.learning_rate,
            "weight_decay": 0.0,
        },
    ]
    optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate, weight_decay=arguments.weight_decay)
    scheduler = get_cosine_schedule_with_warmup(optimizer, arguments.warmup_steps, arguments.max_train_steps)
    codec, optimizer, loader, scheduler = accelerator.prepare(codec, optimizer, loader, scheduler)
    if head is not None:
        head = accelerator.prepare(head)
    run.restore()
    unwrapped = accelerator.unwrap_model(codec)

    rate = t2s_config.semantic_token_rate
    rows_per_step = arguments.batch_size * arguments.gradient_accumulation_steps * accelerator.num_processes
    run.say(
        f"{num_parameters:,} trainable parameters; {train_set.num_frames / rate / 3600:.2f} h of speech in "
        f"{len(train_set)} rows; {np.mean(train_set.lengths) / rate * rows_per_step:.0f} s of speech a step"
    )

    # Loop
    if run.step == 0:
        figures = evaluate(run, codec, head, held_out_set, arguments.ctc_weight)
        if is_new:
            # The run folder holds the codec as it was before, without these statistics: nothing to compare with.
            run.log_evaluation(figures)
        else:
            run.keep_best(figures, best_by, {"semantic_codec": codec})
    for batch in run.batches(loader):
        mask = batch["attention_mask"]
        with accelerator.accumulate(*([codec] if head is None else [codec, head])):
            features = unwrapped.normalize(batch["hidden_states"])
            output = codec(features, mask)
            loss = output.loss
            errors = (features - output.reconstruction).square().mean(dim=-1).masked_fill(mask == 0, 0.0)
            figures = {"squared_error_per_value": (errors.sum(dim=1) / mask.sum(dim=1)).mean()}
            if head is not None:
                spelling_loss = ctc_loss(head(output.semantic_embeds, mask), batch)
                loss = loss + arguments.ctc_weight * spelling_loss
                figures["ctc_loss_per_label"] = spelling_loss
            run.check_loss(loss, batch["ids"])
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                run.clip_gradients(parameters)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        ids, latents = gather_frames(accelerator, output, mask)
        use.idle_steps[ids.cpu().unique()] = 0
        if accelerator.sync_gradients:
            rng = np.random.default_rng([arguments.seed, 4, run.step])
            figures["codes_moved"] = move_dead_codes(codebook, use, latents, arguments.dead_code_steps, rng)
        run.record(figures)
        if not accelerator.sync_gradients:
            continue
        run.advance(scheduler.get_last_lr()[0])
        if run.should_evaluate:
            figures = evaluate(run, codec, head, held_out_set, arguments.ctc_weight)
            run.keep_best(figures, best_by, {"semantic_codec": codec})
        if run.should_save:
            run.save_state()
        if run.is_done:
            break
    run.finish({"semantic_codec": codec})
    if run.step >= arguments.max_train_steps:
        run.say(
            f"The ids and the normalisation of {run.folder} are new. Prepare the data again before another part is trained: "
            f"`python training/prepare_dataset.py … --model {run.folder}`"
        )


if __name__ == "__main__":
    run_program(main)
