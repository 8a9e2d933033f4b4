"""
Trains the language model that reads the emotion of a text as eight weights: LoRA on a causal language model of the Qwen3 class.

    python training/train_emotion_text.py --model CHECKPOINT --data FOLDER --output RUN
    python training/train_emotion_text.py --model CHECKPOINT --language_model Qwen/Qwen3-0.6B --data texts.jsonl --output RUN
    accelerate launch training/train_emotion_text.py --config training/configs/emotion_text.yaml --model … --data … --output …

It starts from the `emotion_text/` of the checkpoint, or from `--language_model`, which any checkpoint can be given. `RUN` becomes the
whole checkpoint, its `emotion_text/` the language model with the adapter merged: `indextts2 speak "Hello." --model RUN
--emotion-text "shouting for joy"`. `RUN/adapter` is the same as an adapter of PEFT, beside the language model it was trained on.

The data is JSON lines, `{"text": "You did it!", "emotions": {"happy": 0.7, "surprised": 0.3}}`, in the files `train.jsonl` and
`validation.jsonl` of a folder; without the second, or with one file, a part of the texts is held out. An emotion that is not named has
0, each is from 0 to 1, and at least one is 0.01. The teacher of the paper gives probabilities that sum to 1. Other sums are taken as
they are: synthesis gives what is missing to 1 to the voice's own emotion.

The loss has two terms, each the mean over texts of

1. the cross-entropy of the answer's tokens, which is JSON of eight scores in hundredths, end of the turn included, mean over the tokens.
   The prompt and the answer are those of inference (`EmotionTextModel`), where one reader reads released and trained models.
2. `--soft_label_weight` times the cross-entropy between the text's distribution over the emotions (its weights divided by their sum)
   and the model's: the softmax over the first tokens of the eight emotion words, and no others, where the answer begins. The answer
   begins with a brace, so the words' share of all tokens stays small; the term teaches how they stand to each other. It makes the
   model decide on the whole distribution before it writes the first score.

The paper states LoRA and a soft-label cross-entropy over the emotions, no more. The second term is our reading of it. Rank, rates,
steps and weights of the terms are ours.
"""

import argparse
import copy
import hashlib
import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import Dataset
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedModel, get_cosine_schedule_with_warmup

from checkpoint import save_trained_weights_alone
from indextts2_hf import EMOTIONS, EmotionTextModel
from indextts2_hf.emotion import CHINESE_EMOTIONS, emotion_scores, read_emotion_answer
from run import Run, add_run_arguments, parse_arguments, positive_int, run_program


# The linear layers of a Qwen3 block.
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--language_model",
        metavar="FOLDER",
        help="folder or Hub repository of the language model to start from (default: emotion_text/ of --model)",
    )
    parser.add_argument("--rank", type=positive_int, default=16, help="of the adapter (ours: %(default)s)")
    parser.add_argument(
        "--alpha", type=float, default=32.0, help="the adapter counts alpha / rank times (ours: %(default)s)"
    )
    parser.add_argument("--dropout", type=float, default=0.05, help="before the adapter (ours: %(default)s)")
    parser.add_argument(
        "--soft_label_weight", type=float, default=1.0, help="weight of the second term (ours: %(default)s)"
    )
    parser.add_argument(
        "--validation_fraction",
        type=float,
        default=0.1,
        help="share of the texts that is held out where there is no validation.jsonl (default: %(default)s)",
    )
    parser.add_argument(
        "--num_answers", type=positive_int, default=64, help="held-out texts that are answered (default: %(default)s)"
    )
    add_run_arguments(parser, model=None)  # the checkpoint of the package has no language model
    # The paper's teacher wrote 1,000 texts: these are eight rounds.
    parser.set_defaults(
        max_train_steps=1000, learning_rate=1e-4, warmup_steps=50, eval_steps=100, save_steps=100, num_workers=0
    )
    return parse_arguments(parser)


# --- data ----------------------------------------------------------------------------------------------------------------


def read_texts(path: Path) -> list[dict[str, Any]]:
    r"""
    The texts of a file of JSON lines.

    Returns:
        `list[dict]`: `text`, `weights` (eight floats in the order of `EMOTIONS`) and `id` (file and line).

    Raises:
        ValueError: a line is not as it should be, or there is none; the message says where.
    """
    expected = (
        f'Expected is {{"text": "…", "emotions": {{"happy": 0.7, "calm": 0.3}}}} with names of {", ".join(EMOTIONS)}.'
    )
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}: this is no JSON ({error}). {expected}") from error
            if not isinstance(row, dict) or not {"text", "emotions"} <= row.keys():
                came = f"an object with {', '.join(row) or 'nothing'}" if isinstance(row, dict) else f"{row!r}"
                raise ValueError(f"{where}: this is {came}, without `text` and `emotions`. {expected}")
            text, emotions = row["text"], row["emotions"]
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{where}: `text` is {text!r} but must be a text that is not empty. {expected}")
            if not isinstance(emotions, dict):
                raise ValueError(f"{where}: `emotions` is {emotions!r} but must be weights by name. {expected}")
            for name, weight in emotions.items():
                if name not in EMOTIONS:
                    raise ValueError(f"{where}: {name!r} is none of the eight emotions. {expected}")
                if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1:
                    raise ValueError(f"{where}: {name} is {weight!r} but must be a number from 0 to 1. {expected}")
            if not any(round(weight, 2) for weight in emotions.values()):
                raise ValueError(
                    f"{where}: no emotion has at least 0.01, and an answer of zeros is read as calm. Write calm then. {expected}"
                )
            weights = [float(emotions.get(name, 0)) for name in EMOTIONS]
            rows.append({"text": text, "weights": weights, "id": f"{path.name} line {number}"})
    if not rows:
        raise ValueError(f"{path} has no texts: there is nothing to learn from. {expected}")
    return rows


def read_splits(source: Path, validation_fraction: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Training and held-out texts of a folder or a file."""
    path = source / "train.jsonl" if source.is_dir() else source
    if not path.is_file():
        raise ValueError(
            f"--data {source}: there is no {path}. Name a file of JSON lines, or a folder with train.jsonl."
        )
    texts = read_texts(path)
    if source.is_dir() and (source / "validation.jsonl").is_file():
        return texts, read_texts(source / "validation.jsonl")
    num_held_out = max(1, round(validation_fraction * len(texts)))
    if not 0 < validation_fraction < 1 or num_held_out >= len(texts):
        raise ValueError(
            f"{path} has {len(texts)} texts, of which --validation_fraction {validation_fraction} cannot be held out for "
            "validation. Add texts, choose a fraction between 0 and 1, or write a validation.jsonl beside train.jsonl."
        )
    order = np.random.default_rng([seed, 3]).permutation(len(texts))
    held_out = set(order[:num_held_out].tolist())
    train = [text for row, text in enumerate(texts) if row not in held_out]
    return train, [text for row, text in enumerate(texts) if row in held_out]


class EmotionTextDataset(Dataset):
    r"""
    Prompts and answers as token ids.

    Args:
        texts (`list[dict]`): from `read_texts`.
        emotion_text ([`EmotionTextModel`]): whose prompts and tokenizer are used.

    Raises:
        ValueError: a text is longer than the language model can read.
    """

    def __init__(self, texts: list[dict[str, Any]], emotion_text: EmotionTextModel):
        tokenizer = emotion_text.tokenizer
        end = end_token_id(emotion_text)
        longest = getattr(emotion_text.model.config, "max_position_embeddings", math.inf)
        self.examples = []
        for row in texts:
            scores = emotion_scores(row["text"], row["weights"])
            # Apart, as inference has them: no token spans the end of the prompt.
            prompt = tokenizer(emotion_text.format_prompts([row["text"]])[0], add_special_tokens=False).input_ids
            answer = tokenizer(json.dumps(scores, ensure_ascii=False), add_special_tokens=False).input_ids + [end]
            if len(prompt) + len(answer) > longest:
                raise ValueError(
                    f"{row['id']}: with {len(prompt)} tokens, and {len(answer)} of its answer, the text is longer than the "
                    f"{longest} that the language model can read. Shorten or split it."
                )
            self.examples.append(row | {"prompt": prompt, "answer": answer, "scores": list(scores.values())})

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        return self.examples[item[0]]  # nothing is random, so the draw does not matter


def end_token_id(emotion_text: EmotionTextModel) -> int:
    """The token that ends an answer: one at which generation stops."""
    ends = emotion_text.model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or []
    token_id = emotion_text.tokenizer.eos_token_id
    if token_id not in ends and not ends:
        raise ValueError(
            "The language model has no `eos_token_id` in its generation config, so its answers would not end. Use an "
            "instruction-tuned model of the Qwen3 class."
        )
    return token_id if token_id in ends else ends[0]


def emotion_token_ids(emotion_text: EmotionTextModel) -> list[int]:
    """First token of each emotion word, in the order of `EMOTIONS`."""
    ids = [emotion_text.tokenizer(word, add_special_tokens=False).input_ids[0] for word in CHINESE_EMOTIONS]
    if len(set(ids)) < len(ids):
        raise ValueError(
            f"The tokenizer of the language model begins two of the words {', '.join(CHINESE_EMOTIONS)} with one token, so the "
            "soft labels cannot tell them apart. Use a model of the Qwen3 class, or --soft_label_weight 0."
        )
    return ids


def collate(examples: list[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """A batch padded on the left, as in inference: all answers end at the same place, so logits are needed there alone."""
    rows = [example["prompt"] + example["answer"] for example in examples]
    answer_lengths = [len(example["answer"]) for example in examples]
    size = max(map(len, rows))
    scores = torch.tensor([example["scores"] for example in examples])
    return {
        "ids": [example["id"] for example in examples],
        "texts": [example["text"] for example in examples],
        "weights": torch.tensor([example["weights"] for example in examples]),
        "emotion_probabilities": scores / scores.sum(dim=1, keepdim=True),
        "input_ids": torch.tensor([[pad_token_id] * (size - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (size - len(row)) + [1] * len(row) for row in rows]),
        "labels": torch.tensor(
            [[-100] * (max(answer_lengths) - len(example["answer"])) + example["answer"] for example in examples]
        ),
    }


# --- objective -----------------------------------------------------------------------------------------------------------


def compute_losses(
    model: nn.Module, batch: dict[str, Any], emotion_ids: list[int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    The two terms of the loss (see above), not weighted.

    Args:
        model (`nn.Module`): the language model.
        batch (`dict`): from `collate`; `labels` of shape `(batch_size, answer_length)`, -100 before shorter answers.
        emotion_ids (`list[int]`, *optional*): first tokens of the emotion words; without them the second term is 0.

    Returns:
        `tuple(torch.Tensor, torch.Tensor)`: nats per token of the answer, nats per text.
    """
    labels = batch["labels"]
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=(batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0),
        logits_to_keep=labels.shape[1] + 1,
        use_cache=False,
    ).logits.float()
    answer_lengths = (labels >= 0).sum(dim=1)
    token_losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, ignore_index=-100, reduction="none")
    answer_loss = (token_losses.sum(dim=1) / answer_lengths).mean()
    if emotion_ids is None:
        return answer_loss, torch.zeros_like(answer_loss)
    # The last token of the prompt, from which the first of the answer is told.
    rows = torch.arange(len(labels), device=labels.device)
    log_probabilities = logits[rows, labels.shape[1] - answer_lengths][:, emotion_ids].log_softmax(dim=1)
    return answer_loss, -(batch["emotion_probabilities"] * log_probabilities).sum(dim=1).mean()


def is_readable(answer: str) -> bool:
    """Whether an answer is what was taught: a JSON object with a number for each emotion."""
    try:
        scores = json.loads(answer)
    except (ValueError, RecursionError):
        return False
    return isinstance(scores, dict) and all(isinstance(scores.get(name), int | float) for name in CHINESE_EMOTIONS)


@torch.no_grad()
def evaluate(
    run: Run,
    model: nn.Module,
    emotion_text: EmotionTextModel,
    dataset: EmotionTextDataset,
    emotion_ids: list[int] | None,
) -> dict[str, float]:
    """
    The loss on the held-out texts, and how good the answers to the first `--num_answers` of them are that the model really
    writes, as in inference: the mean difference of a weight, the share that can be read, the share whose strongest emotion is
    right.
    """
    model.eval()
    collate_padded = partial(collate, pad_token_id=emotion_text.tokenizer.pad_token_id)
    losses = []
    for batch, count in run.evaluation_batches(dataset, collate_padded):
        answer_loss, soft_label_loss = compute_losses(model, batch, emotion_ids)
        figures = {
            "loss": answer_loss + run.arguments.soft_label_weight * soft_label_loss,
            "answer_cross_entropy_per_token": answer_loss,
            "emotion_cross_entropy_per_text": soft_label_loss,
        }
        losses.append((figures, count))

    answered = copy.copy(dataset)
    answered.examples = dataset.examples[: run.arguments.num_answers]
    qualities = []
    for batch, count in run.evaluation_batches(answered, collate_padded):
        with run.accelerator.autocast():
            answers = emotion_text.write_answers(batch["texts"], seed=run.arguments.seed)
        weights = [read_emotion_answer(text, answer) for text, answer in zip(batch["texts"], answers, strict=True)]
        weights = torch.tensor(weights, device=batch["weights"].device)
        # Where two are strongest, either is right.
        strongest = batch["weights"].gather(1, weights.argmax(dim=1, keepdim=True))[:, 0]
        figures = {
            "weight_l1": (weights - batch["weights"]).abs().mean(),
            "readable_answers": sum(map(is_readable, answers)) / len(answers),
            "strongest_emotion_accuracy": (strongest == batch["weights"].amax(dim=1)).float().mean(),
        }
        qualities.append((figures, count))
    model.train()
    return run.mean_over_rows(losses) | run.mean_over_rows(qualities)


# --- model ---------------------------------------------------------------------------------------------------------------


def load_language_model(arguments: argparse.Namespace, base: Path) -> EmotionTextModel:
    """The language model to start from, in the dtype of its file."""
    if arguments.language_model is None and not (base / "emotion_text" / "config.json").is_file():
        raise ValueError(
            f"--model {arguments.model} has no emotion_text/ to start from. Name a language model with --language_model, for "
            "example Qwen/Qwen3-0.6B or a folder."
        )
    if arguments.language_model is None:
        emotion_text = EmotionTextModel.from_pretrained(base)
    else:
        config = AutoConfig.from_pretrained(arguments.language_model)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(
                f"--language_model {arguments.language_model} is a {config.model_type!r}, which is no causal language model. "
                "Name one of the Qwen3 class; that of a checkpoint is its folder emotion_text."
            )
        emotion_text = EmotionTextModel.from_pretrained(arguments.language_model, subfolder="")
    names = {
        name.rsplit(".", 1)[-1] for name, module in emotion_text.model.named_modules() if isinstance(module, nn.Linear)
    }
    missing = [name for name in TARGET_MODULES if name not in names]
    if missing:
        raise ValueError(
            f"The language model {type(emotion_text.model).__name__} has no linear layers {', '.join(missing)}, which the "
            "adapter belongs to. Use a model of the Qwen3 class."
        )
    return emotion_text


def fingerprint(model: PreTrainedModel) -> str:
    """Digest of the beginning of every weight: tells which model an adapter belongs to."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def main() -> None:
    arguments = parse()
    run = Run(arguments, parts=("emotion_text",))
    accelerator = run.accelerator

    # Data and model. The adapter is trained in float32; what is written is in the dtype that the language model came in.
    texts, held_out_texts = read_splits(Path(arguments.data), arguments.validation_fraction, arguments.seed)
    emotion_text = load_language_model(arguments, run.base)
    tokenizer = emotion_text.tokenizer
    train_set, held_out_set = (EmotionTextDataset(rows, emotion_text) for rows in (texts, held_out_texts))
    emotion_ids = emotion_token_ids(emotion_text) if arguments.soft_label_weight else None
    saved_dtype = emotion_text.model.dtype
    save_trained_weights_alone(accelerator, fingerprint(emotion_text.model))
    # `emotion_text.model` is this model too: the adapter's layers are put into it.
    model = get_peft_model(
        emotion_text.model.float(),
        LoraConfig(
            task_type="CAUSAL_LM",
            r=arguments.rank,
            lora_alpha=arguments.alpha,
            lora_dropout=arguments.dropout,
            target_modules=list(TARGET_MODULES),
        ),
    )
    if arguments.gradient_checkpointing:
        emotion_text.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()

    def write_merged(folder: Path) -> None:
        # Of a copy: taking the adapter out of the weights again would not give back the same numbers.
        merged: PeftModel = copy.deepcopy(accelerator.unwrap_model(model))
        EmotionTextModel(merged.merge_and_unload().to(saved_dtype), tokenizer).save_pretrained(folder, subfolder="")

    def write_adapter(folder: Path) -> None:
        accelerator.unwrap_model(model).save_pretrained(folder, save_embedding_layers=False)

    parts = {"emotion_text": write_merged, "adapter": write_adapter}

    # Optimiser
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.learning_rate, weight_decay=arguments.weight_decay)
    scheduler = get_cosine_schedule_with_warmup(optimizer, arguments.warmup_steps, arguments.max_train_steps)
    loader = run.make_loader(train_set, partial(collate, pad_token_id=tokenizer.pad_token_id))
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    run.restore()

    rows_per_step = arguments.batch_size * arguments.gradient_accumulation_steps * accelerator.num_processes
    num_answer_tokens = sum(len(example["answer"]) for example in train_set.examples) / len(train_set)
    run.say(
        f"{sum(parameter.numel() for parameter in parameters):,} trainable parameters; {len(train_set)} texts, "
        f"{len(held_out_set)} held out; {rows_per_step} texts and {num_answer_tokens * rows_per_step:.0f} tokens of answers a step"
    )

    # Loop
    if run.step == 0:
        if run.is_main and arguments.language_model is not None:
            # Another tokenizer's files are not to stay among the new ones.
            shutil.rmtree(run.folder / "emotion_text", ignore_errors=True)
        run.save_parts(run.folder, parts)
        run.keep_best(evaluate(run, model, emotion_text, held_out_set, emotion_ids), "loss", parts)
    for batch in run.batches(loader):
        with accelerator.accumulate(model):
            answer_loss, soft_label_loss = compute_losses(model, batch, emotion_ids)
            loss = answer_loss + arguments.soft_label_weight * soft_label_loss
            run.check_loss(loss, batch["ids"])
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                run.clip_gradients(parameters)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        run.record({"answer_cross_entropy_per_token": answer_loss, "emotion_cross_entropy_per_text": soft_label_loss})
        if not accelerator.sync_gradients:
            continue
        run.advance(scheduler.get_last_lr()[0])
        if run.should_evaluate:
            run.keep_best(evaluate(run, model, emotion_text, held_out_set, emotion_ids), "loss", parts)
        if run.should_save:
            run.save_state()
        if run.is_done:
            break
    run.finish(parts)


if __name__ == "__main__":
    run_program(main)
