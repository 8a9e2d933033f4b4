"""
What every training program needs around its loop: arguments, the run folder, resuming, signals, not-a-number, progress,
trackers, keeping the best. There is no loop here and no objective: those are in the programs.

A run folder is a whole checkpoint, at any time: the parts that are not trained come from `--model`, the trained one is the
best so far. `last/` is the same with the part as it was at the end. `state/` holds what `--resume` needs, `log.jsonl` the
figures.
"""

import argparse
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration, DistributedType, gather_object, send_to_device, set_seed
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from checkpoint import (
    PARTS_OF_A_VOICE,
    copy_checkpoint,
    digest_weights,
    find_checkpoint,
    link_other_parts,
    remake_voices,
    write_part,
)
from data import EndlessBatchSampler
from indextts2_hf.cards import read_card, write_model_card
from indextts2_hf.configuration_indextts2 import EMBEDDED_NAME


# What may be changed from one half of a run to the other without changing its numbers.
FREE_ON_RESUME = {
    "config",
    "cpu",
    "data",
    "log_steps",
    "model",
    "num_workers",
    "output",
    "report_to",
    "resume",
    "save_steps",
}


def add_run_arguments(parser: argparse.ArgumentParser, model: str | None = EMBEDDED_NAME) -> None:
    """
    The options that all programs share. A program sets its own defaults with `parser.set_defaults`; where `model` is `None`,
    --model has none and must be given.
    """
    files = parser.add_argument_group("files")
    files.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file of options; the command line comes first"
    )
    files.add_argument(
        "--model",
        required=model is None,
        default=model,
        metavar="CHECKPOINT",
        help="to start from: folder, Hub repository, or tiny, the one of the package"
        + ("" if model is None else " (default: %(default)s)"),
    )
    files.add_argument("--data", required=True, metavar="FOLDER", help="training data")
    files.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="run folder: becomes a checkpoint")
    files.add_argument(
        "--resume", action="store_true", help="continue the run in --output from its last complete state"
    )

    steps = parser.add_argument_group("optimisation")
    steps.add_argument(
        "--max_train_steps", type=positive_int, default=100_000, help="optimiser steps (default: %(default)s)"
    )
    steps.add_argument(
        "--batch_size", type=positive_int, default=8, help="rows per process and step (default: %(default)s)"
    )
    steps.add_argument(
        "--gradient_accumulation_steps", type=positive_int, default=1, help="batches per step (default: %(default)s)"
    )
    steps.add_argument("--learning_rate", type=float, default=2e-4, help="highest rate (default: %(default)s)")
    steps.add_argument(
        "--warmup_steps",
        type=int,
        default=1000,
        help="steps of linear warm-up before the cosine (default: %(default)s)",
    )
    steps.add_argument("--weight_decay", type=float, default=0.01, help="of AdamW (default: %(default)s)")
    steps.add_argument(
        "--max_grad_norm", type=float, default=1.0, help="gradients are clipped to it (default: %(default)s)"
    )
    steps.add_argument(
        "--mixed_precision", choices=["no", "fp16", "bf16"], default="no", help="(default: %(default)s)"
    )
    steps.add_argument("--gradient_checkpointing", action="store_true", help="less memory for more time")
    steps.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")

    around = parser.add_argument_group("around the loop")
    around.add_argument(
        "--eval_steps", type=positive_int, default=1000, help="steps between evaluations (default: %(default)s)"
    )
    around.add_argument(
        "--save_steps", type=positive_int, default=1000, help="steps between saved states (default: %(default)s)"
    )
    around.add_argument(
        "--log_steps", type=positive_int, default=10, help="steps that a logged figure averages (default: %(default)s)"
    )
    around.add_argument(
        "--report_to", nargs="*", choices=["tensorboard", "trackio"], default=[], help="trackers (default: none)"
    )
    around.add_argument("--num_workers", type=int, default=2, help="processes that load data (default: %(default)s)")
    around.add_argument("--cpu", action="store_true", help="stay on the CPU")


def positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def non_negative_int(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is not at least 0")
    return number


def parse_arguments(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with the options of `--config` before it, so that what is typed wins."""
    argv = sys.argv[1:] if argv is None else argv
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    config = finder.parse_known_args(argv)[0].config
    options = []
    if config is not None:
        try:
            settings = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            parser.error(f"--config {config} cannot be read: {error}")
        if not isinstance(settings, dict):
            parser.error(f"--config {config} holds a {type(settings).__name__} instead of options by name")
        known = {action.dest for action in parser._actions} - {"help", "config"}
        for name, value in settings.items():
            if name not in known:
                parser.error(
                    f"--config {config} has the option {name!r}, but this program knows {', '.join(sorted(known))}"
                )
            if value is None or value is False:
                continue
            values = [] if value is True else value if isinstance(value, list) else [value]
            options += [f"--{name}", *map(str, values)]
    arguments = parser.parse_args([*options, *argv])
    available = [tracker.value for tracker in get_available_trackers()]
    for name in arguments.report_to:
        if name not in available:  # Accelerate would leave it out without a word
            parser.error(f"--report_to {name} is not installed: `pip install {name}`")
    return arguments


def run_program(main: Callable[[], None]) -> None:
    """Runs `main`; what a user did wrong becomes one line on standard error and exit code 1."""
    try:
        main()
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        if os.environ.get("INDEXTTS2_TRACEBACK"):
            raise
        text = str(error)
        if text.startswith("Caught "):
            # By a loading process of the data loader, which hands on its whole traceback.
            text = text.rstrip().splitlines()[-1].partition(": ")[2]
        sys.exit(f"{Path(sys.argv[0]).stem}: error: {text}")


class Run:
    r"""
    A run: its folder, its accelerator, its step.

    Args:
        arguments (`argparse.Namespace`):
            With the options of `add_run_arguments`.
        parts (`tuple[str, ...]`):
            Folders of the checkpoint that are trained.
        is_checkpoint (`bool`, defaults to `True`):
            Whether the run folder becomes a whole checkpoint; an adapter is saved alone.
        higher_is_better (`bool`, defaults to `False`):
            Which way the figure given to `keep_best` is better.
        can_shard (`bool`, defaults to `False`):
            Whether the weights may be shared out over devices (FSDP). Accelerate allows it for one prepared module.

    Attributes:
        base (`Path`): folder of the checkpoint to start from.
        accelerator (`Accelerator`): of this process.
        step (`int`): optimiser steps done.
        best (`float | None`): best figure so far.
        evaluations_since_best (`int`): how many came after it, for programs that stop early.

    Raises:
        ValueError: there is no checkpoint, the folder holds a run already, the resumed run had other options, or the launcher
            shares out weights that cannot be.
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        parts: tuple[str, ...],
        is_checkpoint: bool = True,
        higher_is_better: bool = False,
        can_shard: bool = False,
    ):
        disable_progress_bar()  # of loading and saving; the one of the steps is ours
        self.arguments = arguments
        self.parts = parts
        self.is_checkpoint = is_checkpoint
        self.higher_is_better = higher_is_better
        self.folder: Path = arguments.output
        self.accelerator = Accelerator(
            cpu=arguments.cpu,
            mixed_precision=arguments.mixed_precision,
            gradient_accumulation_steps=arguments.gradient_accumulation_steps,
            log_with=arguments.report_to or None,
            project_dir=self.folder,
            dataloader_config=DataLoaderConfiguration(split_batches=True),
        )
        if arguments.mixed_precision == "fp16" and self.accelerator.device.type == "cpu":
            # Accelerate would go on in float32 without a word.
            raise ValueError("--mixed_precision fp16 needs a GPU, but this run is on the CPU. Use bf16 or no.")
        self.accelerator.register_save_state_pre_hook(self._check_weights)
        self.step = 0
        self.best: float | None = None
        self.evaluations_since_best = 0
        # Of the weights as they are, no loss has been computed yet since their state was saved or read.
        self._is_state_unproven = False
        self._pending: dict[str, list[float]] = {}
        self._stop_signal: str | None = None
        self._stop_agreed = False
        self._progress: tqdm | None = None

        kind = self.accelerator.distributed_type
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED) and not can_shard:
            raise ValueError(
                f"This program does not share its weights out over devices ({kind.value}): they fit into one. Launch it with one "
                "process for each device."
            )
        self.base = find_checkpoint(arguments.model)
        self._state = self._find_state()
        if self._state is not None:
            saved = json.loads((self._state / "run.json").read_text())
            self._check_options(saved)
            self.step, self.best, self._pending = saved["step"], saved["best"], saved["pending"]
            self.evaluations_since_best = saved["evaluations_since_best"]
        if self.is_main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                for leftover in [*self.folder.glob("state/.*"), *self.folder.glob("**/.*.tmp")]:
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
                if self._state is None and is_checkpoint:
                    self._copy_base()
                self._cut_log()
            except OSError as error:
                raise OSError(
                    f"--output {self.folder} cannot be written: {error.strerror}. Name another folder."
                ) from error
        self.accelerator.wait_for_everyone()
        set_seed(arguments.seed)  # of models that are made; what is drawn in each process begins with `batches`
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request_stop)
        if arguments.report_to:
            settings = {
                name: value if isinstance(value, int | float | str) else str(value)
                for name, value in vars(arguments).items()
            }
            self.accelerator.init_trackers("indextts2", config=settings)

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def say(self, text: str) -> None:
        """A line for people, above the progress bar."""
        if self.is_main:
            tqdm.write(text, file=sys.stderr)

    # --- the folder ----------------------------------------------------------------------------------------------------

    def _find_state(self) -> Path | None:
        states = sorted(path for path in self.folder.glob("state/step-*") if (path / "run.json").is_file())
        if states and not self.arguments.resume:
            raise ValueError(
                f"--output {self.folder} holds a run at {states[-1].name}. Add --resume to continue it, or name another folder."
            )
        if self.arguments.resume and not states:
            self.say(f"{self.folder} holds no complete state yet: the run begins at step 0.")
        return states[-1] if states else None

    def _check_options(self, saved: dict[str, Any]) -> None:
        before, now = saved["arguments"], jsonable(self.arguments)
        names = (now.keys() | before.keys()) - FREE_ON_RESUME
        changed = [
            f"--{name} {before.get(name)} (now {now.get(name)})"
            for name in sorted(names)
            if before.get(name) != now.get(name)
        ]
        if saved["num_processes"] != self.accelerator.num_processes:
            changed.append(f"{saved['num_processes']} processes (now {self.accelerator.num_processes})")
        if saved["base"] != digest_weights(self.base):
            changed.append(f"other weights than --model {self.base} has")
        if changed:
            raise ValueError(
                f"The run in {self.folder} was begun with {', '.join(changed)}. Resume with the same, or begin another run."
            )

    def _copy_base(self) -> None:
        """Everything of the checkpoint: the run folder is a whole one from the beginning."""
        base = self.base
        if base.resolve() == self.folder.resolve():
            raise ValueError(
                f"--output is --model ({base}): training would overwrite what it starts from. Name another folder."
            )
        copy_checkpoint(base, self.folder)

    def _cut_log(self) -> None:
        """Leaves out of the log what comes after the state that the run continues from."""
        log = self.folder / "log.jsonl"
        lines = log.read_text().splitlines(keepends=True) if log.is_file() else []
        kept = [
            line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.step and self.step > 0
        ]
        temporary = self.folder / ".log.jsonl.tmp"
        temporary.write_text("".join(kept))
        os.replace(temporary, log)

    # --- before the loop -----------------------------------------------------------------------------------------------

    def make_loader(
        self, dataset: Dataset, collate: Callable[[list], dict], lengths: list[int] | None = None
    ) -> DataLoader:
        """
        Batches for the steps that are left, in an order that depends on the seed alone. `dataset` is asked for pairs (index,
        number of the draw); `lengths` of its rows bring rows of like length together. Prepare it with the accelerator, which
        gives each process its share of a batch.
        """
        arguments = self.arguments
        sampler = EndlessBatchSampler(
            num_rows=len(dataset),
            batch_size=arguments.batch_size * self.accelerator.num_processes,
            batches_per_step=arguments.gradient_accumulation_steps,
            seed=arguments.seed,
            start=self.step * arguments.gradient_accumulation_steps,
            stop=arguments.max_train_steps * arguments.gradient_accumulation_steps,
            lengths=lengths,
        )
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=arguments.num_workers,
            persistent_workers=arguments.num_workers > 0,
            worker_init_fn=leave_group,
            pin_memory=self.accelerator.device.type == "cuda",
            generator=torch.Generator(),  # torch's global one is for dropout, which a resumed run repeats
        )

    def restore(self) -> None:
        """Weights, optimiser, schedule and random states of the run that is continued; call it after `prepare`."""
        if self._state is not None:
            self.accelerator.load_state(str(self._state))
            self._is_state_unproven = True
            self.say(f"Continuing {self.folder} at step {self.step}.")

    # --- in the loop ---------------------------------------------------------------------------------------------------

    def batches(self, loader: DataLoader) -> Iterator[Any]:
        """The loader's batches under a progress bar with loss and time left."""
        if self._state is None:
            # What is drawn from here on, such as dropout, is each process's own. A state that was read brings its draws.
            set_seed(self.arguments.seed, device_specific=True)
        self._progress = tqdm(
            total=self.arguments.max_train_steps,
            initial=self.step,
            desc=self.folder.name,
            unit="step",
            disable=not self.is_main,
            mininterval=0.1 if sys.stderr.isatty() else 10.0,  # seconds; a log file is not a screen
            dynamic_ncols=True,
        )
        with self._progress:
            yield from loader

    def check_loss(self, loss: torch.Tensor, ids: list[str], name: str = "loss") -> float:
        """
        The loss of a batch over all processes, recorded under `name`. Call it before `backward`.

        Raises:
            FloatingPointError: it is no number; the message names the clips. A state of such weights is not kept.
        """
        flags = [loss.detach().float(), torch.tensor(float(self._stop_signal is not None), device=loss.device)]
        values = self.accelerator.gather(torch.stack(flags)[None])
        self._stop_agreed = bool(values[:, 1].any())
        mean = values[:, 0].mean().item()
        if not math.isfinite(mean):
            names = gather_object([] if math.isfinite(flags[0].item()) else list(ids))
            raise self._ruined(
                f"The {name} is {mean} at step {self.step + 1}, in the batch of {', '.join(names)}: look at these"
            )
        self._record(name, mean)
        return mean

    def clip_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Call it when gradients are complete (`accelerator.sync_gradients`)."""
        norm = float(self.accelerator.clip_grad_norm_(parameters, self.arguments.max_grad_norm))
        # Under fp16 the gradient scaler leaves such a step out and lowers its scale.
        if not math.isfinite(norm) and self.arguments.mixed_precision != "fp16":
            raise self._ruined(f"The gradient is {norm} at step {self.step + 1} though the loss is a number")
        self._record("gradient_norm", norm)

    def record(self, figures: dict[str, torch.Tensor | float]) -> None:
        """Figures of this batch, by names that end in their unit; means over processes and `--log_steps` are logged."""
        values = [
            torch.as_tensor(value, dtype=torch.float32).detach().to(self.accelerator.device)
            for value in figures.values()
        ]
        means = self.accelerator.reduce(torch.stack(values), reduction="mean").tolist()
        for name, mean in zip(figures, means, strict=True):
            self._record(name, mean)

    def _record(self, name: str, value: float) -> None:
        self._pending.setdefault(name, []).append(value)

    def advance(self, learning_rate: float) -> None:
        """One optimiser step is done."""
        self._prove_state(is_good=True)
        self.step += 1
        loss = self._pending["loss"][-1]
        self._progress.update()
        self._progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if self.step % self.arguments.log_steps == 0 or self.step == self.arguments.max_train_steps:
            figures = {f"train/{name}": sum(values) / len(values) for name, values in self._pending.items()}
            self._pending = {}
            self.log(figures | {"train/learning_rate": learning_rate})

    def log(self, figures: dict[str, float]) -> None:
        """To `log.jsonl` and the trackers."""
        if self.is_main:
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **figures}) + "\n")
        self.accelerator.log(figures, step=self.step)

    @property
    def is_done(self) -> bool:
        """Whether the loop is to end: all steps are done, or a signal asked for it."""
        return self._stop_agreed or self.step >= self.arguments.max_train_steps

    @property
    def should_evaluate(self) -> bool:
        return self.step % self.arguments.eval_steps == 0 or self.step >= self.arguments.max_train_steps

    @property
    def should_save(self) -> bool:
        return self.step % self.arguments.save_steps == 0 or self.is_done

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop_signal = signal.Signals(number).name

    # --- evaluating ----------------------------------------------------------------------------------------------------

    def evaluation_batches(self, dataset: Dataset, collate: Callable[[list], dict]) -> Iterator[tuple[Any, int]]:
        """
        Batches of this process and how many of their rows count: as many batches on every process, of which fillers count
        nothing. The draws are the same every time.
        """
        size, count, index = self.arguments.batch_size, self.accelerator.num_processes, self.accelerator.process_index
        starts = list(range(0, len(dataset), size))
        for number in range(math.ceil(len(starts) / count)):
            position = number * count + index
            start = starts[min(position, len(starts) - 1)]
            rows = [dataset[row, row] for row in range(start, min(start + size, len(dataset)))]
            yield send_to_device(collate(rows), self.accelerator.device), len(rows) if position < len(starts) else 0

    def mean_over_rows(self, batches: list[tuple[dict[str, float | torch.Tensor], int]]) -> dict[str, float]:
        """Means of the figures of `evaluation_batches`, given with the number of rows of each, over all processes."""
        names = list(batches[0][0])
        rows = [[float(figures[name]) * count for name in names] + [count] for figures, count in batches]
        sums = torch.tensor(rows, device=self.accelerator.device).sum(dim=0)
        *totals, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        return {name: total / count for name, total in zip(names, totals, strict=True)}

    # --- keeping -------------------------------------------------------------------------------------------------------

    def log_evaluation(self, figures: dict[str, float]) -> None:
        """An evaluation for the log, the trackers and people."""
        self.log({f"eval/{key}": figure for key, figure in figures.items()})
        self.say(f"step {self.step}: " + ", ".join(f"{key} {figure:.4g}" for key, figure in figures.items()))

    def keep_best(
        self, figures: dict[str, float], name: str, models: dict[str, nn.Module | Callable[[Path], None]]
    ) -> bool:
        """
        Logs an evaluation and, if `figures[name]` is the best so far, writes the models as parts of the run folder.

        Returns:
            `bool`: whether it is the best.
        """
        value = figures[name]
        self.log_evaluation(figures)
        is_best = math.isfinite(value) and (
            self.best is None or (value > self.best if self.higher_is_better else value < self.best)
        )
        self.evaluations_since_best = 0 if is_best else self.evaluations_since_best + 1
        if is_best:
            self.best = value
            # At step 0 the folder holds these weights already.
            if self.step > 0:
                self.save_parts(self.folder, models)
        return is_best

    def save_parts(self, folder: Path, models: dict[str, nn.Module | Callable[[Path], None]]) -> list[str]:
        """
        Writes the models as parts of a checkpoint folder, and its voices as they are with them. What is not saved as it is trained
        (an adapter, and the model it is merged into) is a function that writes into the folder it is given; the main process
        calls it.

        Returns:
            `list[str]`: the voices that are gone, because only their recordings could tell what the models hear.
        """
        has_voices, gone = bool(PARTS_OF_A_VOICE & set(self.parts)), []
        if has_voices and self.is_main:
            shutil.rmtree(folder / "voices", ignore_errors=True)
        for name, model in models.items():
            is_module = isinstance(model, nn.Module)
            weights = self.accelerator.get_state_dict(model) if is_module else None
            if self.is_main:
                write_part(folder, name, self.accelerator.unwrap_model(model) if is_module else model, weights)
        if has_voices and self.is_main:
            gone = remake_voices(self.base, folder, self.parts)
        self.accelerator.wait_for_everyone()
        return gone

    def save_state(self) -> None:
        """
        What `--resume` needs. The state before it is deleted after the next step: one that was too large leaves numbers in
        loss and gradient, but weights that give none.
        """
        states = self.folder / "state"
        temporary, final = states / f".step-{self.step:08d}", states / f"step-{self.step:08d}"
        if final.is_dir():
            return
        try:
            self.accelerator.save_state(str(temporary))
            self.accelerator.wait_for_everyone()
            if self.is_main:
                saved = {
                    "step": self.step,
                    "best": self.best,
                    "evaluations_since_best": self.evaluations_since_best,
                    "pending": self._pending,
                    "num_processes": self.accelerator.num_processes,
                    "base": digest_weights(self.base),
                    "arguments": jsonable(self.arguments),
                }
                (temporary / "run.json").write_text(json.dumps(saved, indent=2))
                os.replace(temporary, final)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(
                f"The state of step {self.step} could not be written to {states}: {error}. The state before it is whole; make "
                "room, then --resume."
            ) from error
        self._is_state_unproven = True
        self.accelerator.wait_for_everyone()

    def _prove_state(self, is_good: bool) -> None:
        """Of the two newest states keeps the newer one if a step could be made from it, and otherwise the older one."""
        if self.is_main and self._is_state_unproven:
            states = sorted(self.folder.glob("state/step-*"))
            for path in states[:-1] if is_good else states[1:]:
                shutil.rmtree(path)
        self._is_state_unproven = False

    def _ruined(self, fault: str) -> FloatingPointError:
        self._prove_state(is_good=False)
        best = f", perhaps from the best weights of this one, --model {self.folder}" if self.is_checkpoint else ""
        return FloatingPointError(
            f"{fault}. What was saved before is good. Begin another run with a lower --learning_rate or another "
            f"--mixed_precision{best}."
        )

    def _check_weights(self, models: list[nn.Module], weights: list[dict[str, torch.Tensor]], folder: str) -> None:
        """Called by Accelerate before it saves a state."""
        if not all(torch.isfinite(weight).all() for model in models for weight in model.parameters()):
            raise self._ruined(f"The weights are no numbers after step {self.step}")

    def finish(self, models: dict[str, nn.Module | Callable[[Path], None]]) -> None:
        """Writes `last/` and the card, closes the trackers."""
        self.save_state()
        self._prove_state(is_good=True)
        last = self.folder / "last"
        if self.is_main:
            last.mkdir(exist_ok=True)
            if self.is_checkpoint:
                write_model_card(self.folder, name=self.folder.name, base_card=read_card(self.base))
                link_other_parts(self.folder, last, self.parts)
        self.accelerator.wait_for_everyone()
        gone = self.save_parts(last, models)
        if gone:
            self.say(f"The voices {', '.join(gone)} are gone: make them again with `indextts2 voice`.")
        if self.is_main:
            summary = {"step": self.step, "best": self.best, "arguments": jsonable(self.arguments)}
            temporary = self.folder / ".run.json.tmp"
            temporary.write_text(json.dumps(summary, indent=2))
            os.replace(temporary, self.folder / "run.json")
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if self._stop_agreed:
            self.say(f"Stopped by {self._stop_signal or 'a signal'} at step {self.step}: add --resume to continue.")
        else:
            self.say(f"{self.folder}: step {self.step}, best {self.best}.")


def leave_group(worker: int) -> None:
    """A signal to the group of a program, which launchers send, is for the program: it still needs its loading processes."""
    os.setpgrp()


def jsonable(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
