"""
Trains the recogniser that reads semantic tokens back as text (CTC, Graves et al. 2006), by which generation chooses among candidates
(`num_candidates` of the generation config). It is a part of T2S, of which all else stays as it is.

    python training/train_text_recognizer.py --model CHECKPOINT --data FEATURES --output RUN --size 256
    accelerate launch training/train_text_recognizer.py --config training/configs/text_recognizer.yaml --model … --data … --output …

`CHECKPOINT` is any: one that has a recogniser has it trained further, one without gets one of the width `--size`. `FEATURES` comes
from `prepare_dataset.py`; rows whose text CTC cannot spell in their tokens are left out. `RUN` becomes a whole checkpoint.

The best is the one with the lowest loss per text token on the held-out split. The paper has no such part: all values are ours.
"""

import argparse
from typing import Any

import datasets
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import get_cosine_schedule_with_warmup

from checkpoint import load_part
from data import ctc_token_errors, load_features, num_ctc_frames
from indextts2_hf import IndexTTS2T2SForConditionalGeneration
from run import Run, add_run_arguments, parse_arguments, positive_int, run_program


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--size", type=positive_int, help="width of the recogniser of a checkpoint that has none")
    add_run_arguments(parser)
    parser.set_defaults(learning_rate=2e-3, batch_size=32)
    return parse_arguments(parser)


class TokenDataset(Dataset):
    r"""
    Semantic ids with the text ids that belong to them.

    Args:
        features (`datasets.Dataset`): from `load_features`.

    Raises:
        ValueError: there is no row whose text CTC can spell.
    """

    def __init__(self, features: datasets.Dataset):
        self.features = features.select_columns(["clip", "semantic_ids", "input_ids"])
        plain = features.with_format(None)
        lengths, texts = list(plain["num_semantic_tokens"]), plain["input_ids"]
        self.rows = [row for row, ids in enumerate(texts) if 0 < num_ctc_frames(ids) <= lengths[row]]
        if not self.rows:
            raise ValueError(
                f"None of {len(features)} clips has a text that fits into its semantic tokens. Prepare the data with texts."
            )
        self.num_left_out = len(features) - len(self.rows)
        self.lengths = [lengths[row] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """The example of a pair (index, number of the draw); nothing is drawn."""
        row = self.features[self.rows[key[0]]]
        return {name: row[name] for name in ("clip", "semantic_ids", "input_ids")}


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """The arguments of `TextRecognizer.forward`, and `clips`, the names."""
    tokens, texts = (
        [torch.as_tensor(example[name]).long() for example in examples] for name in ("semantic_ids", "input_ids")
    )
    return {
        "clips": [example["clip"] for example in examples],
        "semantic_ids": pad_sequence(tokens, batch_first=True),
        "num_semantic_tokens": torch.tensor([len(ids) for ids in tokens]),
        "text_ids": pad_sequence(texts, batch_first=True),
        "num_text_tokens": torch.tensor([len(ids) for ids in texts]),
    }


@torch.no_grad()
def evaluate(run: Run, recognizer: nn.Module, dataset: TokenDataset) -> dict[str, float]:
    """Loss per text token and share of wrong text tokens (edit distance of the likeliest path), means over held-out rows."""
    recognizer = run.accelerator.unwrap_model(recognizer).eval()
    batches = []
    for batch, count in run.evaluation_batches(dataset, collate):
        batch.pop("clips")
        lengths, texts, text_lengths = (batch[name] for name in ("num_semantic_tokens", "text_ids", "num_text_tokens"))
        log_probs = recognizer.log_probs(batch["semantic_ids"], lengths)
        errors = torch.tensor(ctc_token_errors(log_probs, lengths, texts, text_lengths), device=texts.device)
        figures = {
            "loss_per_text_token": -recognizer.text_log_probs(log_probs, lengths, texts, text_lengths).mean(),
            "text_token_error_rate": (errors / text_lengths).mean(),
        }
        batches.append((figures, count))
    recognizer.train()
    return run.mean_over_rows(batches)


def main() -> None:
    arguments = parse()
    run = Run(arguments, parts=("t2s",))
    accelerator = run.accelerator

    # Data
    train_set, held_out_set = (
        TokenDataset(load_features(arguments.data, split, run.base)) for split in ("train", "validation")
    )
    if train_set.num_left_out:
        run.say(f"{train_set.num_left_out} clips are left out, because CTC cannot spell their text in their tokens.")
    loader = run.make_loader(train_set, collate, train_set.lengths)

    # Model
    t2s = load_part(IndexTTS2T2SForConditionalGeneration, run.base, "t2s")
    is_new = t2s.text_recognizer is None
    if is_new and arguments.size is None:
        raise ValueError(f"{run.base} has no recogniser yet. Say how wide it is to be, for example --size 256.")
    if arguments.size is not None:
        t2s.add_text_recognizer(arguments.size)
    recognizer = t2s.text_recognizer.train()

    # Optimiser
    parameters = list(recognizer.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=arguments.learning_rate, weight_decay=arguments.weight_decay)
    scheduler = get_cosine_schedule_with_warmup(optimizer, arguments.warmup_steps, arguments.max_train_steps)
    recognizer, optimizer, loader, scheduler = accelerator.prepare(recognizer, optimizer, loader, scheduler)
    run.restore()
    hours = sum(train_set.lengths) / t2s.config.semantic_token_rate / 3600
    num_parameters = sum(parameter.numel() for parameter in parameters)
    run.say(f"{num_parameters:,} trainable parameters; {hours:.2f} h of speech in {len(train_set)} rows")

    # Loop
    if run.step == 0:
        figures = evaluate(run, recognizer, held_out_set)
        if is_new:
            # The run folder holds no recogniser yet: nothing to compare with.
            run.log_evaluation(figures)
        else:
            run.keep_best(figures, "loss_per_text_token", {"t2s": t2s.save_pretrained})
    for batch in run.batches(loader):
        clips = batch.pop("clips")
        with accelerator.accumulate(recognizer):
            loss = -recognizer(**batch).mean()
            run.check_loss(loss, clips)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                run.clip_gradients(parameters)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        run.advance(scheduler.get_last_lr()[0])
        if run.should_evaluate:
            run.keep_best(evaluate(run, recognizer, held_out_set), "loss_per_text_token", {"t2s": t2s.save_pretrained})
        if run.should_save:
            run.save_state()
        if run.is_done:
            break
    run.finish({"t2s": t2s.save_pretrained})


if __name__ == "__main__":
    run_program(main)
