"""What all training programs share, by the example of the text-to-semantic one: options, folders, signals, faults, trackers."""

import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file, save_file

from indextts2_hf import IndexTTS2Config, IndexTTS2TextToAudioPipeline, embedded_checkpoint
from programs import ROOT, TRAINING, read_log, run_killed, run_program, run_to_error, start


@pytest.fixture
def options(tiny_checkpoint, tiny_features):
    return [
        *(
            "--stage",
            3,
            "--model",
            tiny_checkpoint,
            "--data",
            tiny_features,
            "--max_train_steps",
            3,
            "--batch_size",
            2,
        ),
        *("--warmup_steps", 1, "--num_workers", 0, "--log_steps", 1, "--dropout", 0),
    ]


def broken_features(tiny_features, folder, change):
    """A copy of the features in which `change` was made to the list of training rows."""
    for split in ("train", "validation"):
        table = load_from_disk(tiny_features / split / "shard-00000")
        rows = change(table.to_list()) if split == "train" else table.to_list()
        type(table).from_list(rows, features=table.features).save_to_disk(folder / split / "shard-00000")
    (folder / "features.json").write_text((tiny_features / "features.json").read_text())
    return folder


# --- options -------------------------------------------------------------------------------------------------------------


def test_options_come_from_a_file_and_the_command_line_wins(tmp_path, monkeypatch, capsys):
    from run import add_run_arguments, parse_arguments

    def parse(*argv):
        import argparse

        parser = argparse.ArgumentParser(allow_abbrev=False)
        add_run_arguments(parser)
        return parse_arguments(parser, ["--model", "m", "--data", "d", "--output", "o", *argv])

    config = tmp_path / "config.yaml"
    config.write_text("learning_rate: 1e-5\nbatch_size: 3\ngradient_checkpointing: true\nreport_to: [tensorboard]\n")
    arguments = parse("--config", str(config), "--batch_size", "5")
    assert (arguments.learning_rate, arguments.batch_size, arguments.gradient_checkpointing) == (1e-5, 5, True)
    assert arguments.report_to == ["tensorboard"] and parse().report_to == []

    monkeypatch.setattr("run.get_available_trackers", list)
    with pytest.raises(SystemExit):
        parse("--report_to", "trackio")
    assert "--report_to trackio is not installed: `pip install trackio`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1\n", "has the option 'lerning_rate', but this program knows"),
        ("- 1\n", "holds a list instead of options by name"),
        ("batch_size: many\n", "argument --batch_size: invalid positive_int value: 'many'"),
        ("batch_size: 0\n", "0 is not at least 1"),
        (": :\n  -", "cannot be read"),
    ],
)
def test_wrong_option_files(text, message, tmp_path, capsys):
    import argparse

    from run import add_run_arguments, parse_arguments

    config = tmp_path / "config.yaml"
    config.write_text(text)
    parser = argparse.ArgumentParser()
    add_run_arguments(parser)
    with pytest.raises(SystemExit):
        parse_arguments(parser, ["--model", "m", "--data", "d", "--output", "o", "--config", str(config)])
    assert message in capsys.readouterr().err


def test_every_recipe_is_accepted_by_its_program():
    """Each file in `configs` names its program; all its options are known there."""
    import importlib

    import yaml

    recipes = [
        path
        for path in sorted((TRAINING / "configs").glob("*.yaml"))
        if "fsdp" not in path.name and "sizes" not in path.name
    ]
    assert recipes
    for recipe in recipes:
        first_line = recipe.read_text().splitlines()[0]
        program = re.search(r"(\w+)\.py", first_line).group(1)
        settings = yaml.safe_load(recipe.read_text())
        names = ["model", "data", "output"] + ["teacher"] * (program == "train_semantic_encoder")
        required = [f"--{name}=x" for name in names if name not in settings]
        argv, sys.argv = sys.argv, [program, "--config", str(recipe), *required]
        try:
            arguments = importlib.import_module(program).parse()
        finally:
            sys.argv = argv
        assert all(name in vars(arguments) for name in settings)


@pytest.mark.parametrize("program", sorted(path.stem for path in TRAINING.glob("train_*.py")) + ["prepare_dataset"])
def test_fine_tuning_begins_with_the_embedded_checkpoint(program, monkeypatch, capsys):
    """What the parts of a model made from nothing begin with has to be said."""
    import importlib

    from checkpoint import find_checkpoint

    arguments = ["--output=out", "recordings" if program == "prepare_dataset" else "--data=data"]
    more = {
        "train_text_recognizer": ["--size=8"],
        "train_semantic_encoder": ["--alignments"],
        "train_t2s": ["--stage=2"],
    }
    arguments += more.get(program, [])
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    parse = importlib.import_module(program).parse
    asked = {
        "train_emotion_text",
        "train_semantic_codec",
        "train_semantic_encoder",
        "train_speaker_encoder",
        "train_vocoder",
    }
    if program in asked:
        with pytest.raises(SystemExit):
            parse()
        assert "arguments are required: --model" in capsys.readouterr().err
    else:
        assert parse().model == "tiny" and find_checkpoint(parse().model) == embedded_checkpoint()


def test_every_command_of_the_readme_is_understood(monkeypatch, tmp_path):
    """By the program that it names; recipes are found where it is called, in the top folder."""
    import importlib

    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```bash\n(.*?)```", (TRAINING / "README.md").read_text(), flags=re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if "training/" in line]
    assert len(commands) > 12
    for command in commands:
        words = shlex.split(command)
        place = next(
            index for index, word in enumerate(words) if word.startswith("training/") and word.endswith(".py")
        )
        program = Path(words[place]).stem
        monkeypatch.setattr(sys, "argv", words[place:])
        assert importlib.import_module(program).parse(), command


# --- the run folder ------------------------------------------------------------------------------------------------------


def test_best_and_last_are_kept(options, tiny_checkpoint, tmp_path):
    out = tmp_path / "run"
    # A rate that ruins the model: the best is what it began with, the last is what it came to.
    run_program("train_t2s", "--output", out, *options, "--learning_rate", 0.5, "--eval_steps", 1)
    figures = [row["eval/semantic_cross_entropy_per_token"] for row in read_log(out, "eval/")]
    assert len(figures) == 4 and min(figures) == figures[0]
    assert [path.name for path in out.glob("state/*")] == ["step-00000003"]
    weights = [load_file(folder / "t2s/model.safetensors") for folder in (tiny_checkpoint, out, out / "last")]
    name = "semantic_head.weight"
    assert torch.equal(weights[0][name], weights[1][name]) and not torch.equal(weights[0][name], weights[2][name])
    assert json.loads((out / "run.json").read_text())["best"] == figures[0]
    for folder in (out, out / "last"):
        pipe = IndexTTS2TextToAudioPipeline.from_pretrained(folder)
        assert pipe.model.config.default_voice == "buzz" and len(pipe("Hello.", duration_s=0.3)["audio"]) == 6615
    assert "No figures of quality were measured" in (out / "README.md").read_text()


def test_a_folder_with_a_run_is_not_overwritten(options, tmp_path):
    out = tmp_path / "run"
    run_program("train_t2s", "--output", out, *options)
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    said = run_to_error("train_t2s", "--output", out, *options)
    assert "holds a run at step-00000003. Add --resume to continue it, or name another folder." in said
    said = run_to_error("train_t2s", "--output", out, *options, "--resume", "--batch_size", 3)
    assert "was begun with --batch_size 2 (now 3). Resume with the same, or begin another run." in said
    assert files == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    # A finished run that is resumed has nothing left to do.
    assert "Continuing" in run_program("train_t2s", "--output", out, *options, "--resume")


def test_resuming_what_never_saved_begins_at_the_beginning(options, tmp_path):
    out = tmp_path / "run"
    run_killed("train_t2s", "--output", out, *options, "--max_train_steps", 10_000, after=out / "log.jsonl")
    assert not list(out.glob("state/step-*"))
    said = run_program("train_t2s", "--output", out, *options, "--resume")
    assert "holds no complete state yet: the run begins at step 0" in said
    assert [row["step"] for row in read_log(out, "train/")] == [1, 2, 3]


def test_a_run_goes_on_as_it_was_begun(options, tiny_checkpoint, tmp_path):
    out = tmp_path / "run"
    run_program("train_t2s", "--output", out, *options)
    other = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, other)
    weights = load_file(other / "s2m/diffusion_pytorch_model.safetensors")
    save_file(
        {name: weight + 1 for name, weight in weights.items()}, other / "s2m/diffusion_pytorch_model.safetensors"
    )
    said = run_to_error("train_t2s", "--output", out, *options, "--resume", "--model", other)
    assert f"was begun with other weights than --model {other} has. Resume with the same" in said
    state = next(out.glob("state/step-*")) / "run.json"
    state.write_text(state.read_text().replace('"num_processes": 1', '"num_processes": 2'))
    said = run_to_error("train_t2s", "--output", out, *options, "--resume")
    assert "was begun with 2 processes (now 1)" in said


def test_the_run_folder_speaks_at_any_time(options, tmp_path):
    out = tmp_path / "run"
    run_killed("train_t2s", "--output", out, *options, "--max_train_steps", 10_000, after=out / "log.jsonl")
    pipe = IndexTTS2TextToAudioPipeline.from_pretrained(out)
    assert len(pipe("Hello.", duration_s=0.3)["audio"]) == 6615
    assert isinstance(pipe.model.config, IndexTTS2Config)


# --- signals and faults --------------------------------------------------------------------------------------------------


def test_sigterm_saves_and_ends_well(options, tmp_path):
    out = tmp_path / "run"
    options += ["--save_steps", 10_000, "--eval_steps", 10_000]
    run_program("train_t2s", "--output", tmp_path / "whole", *options, "--max_train_steps", 80)
    # With a process that loads data, which is not to stop before the program.
    program = start("train_t2s", "--output", out, *options, "--max_train_steps", 80, "--num_workers", 1)
    program.wait_for(out / "log.jsonl")
    while len(read_log(out)) < 5:
        time.sleep(0.01)
    program.kill_group(signal.SIGTERM)
    assert program.wait() == 0, program.output
    assert "Stopped by SIGTERM at step" in program.output and "add --resume to continue" in program.output
    step = json.loads((out / "run.json").read_text())["step"]
    assert 3 < step < 80 and (out / f"state/step-{step:08d}").is_dir()
    assert load_file(out / "last/t2s/model.safetensors")
    run_program("train_t2s", "--output", out, *options, "--max_train_steps", 80, "--resume")
    assert read_log(out) == read_log(tmp_path / "whole")


def test_a_loss_that_is_no_number_names_the_clips_and_keeps_what_was_good(options, tiny_features, tmp_path):
    def spoil(rows):
        for row in rows:
            if row["clip"] == "speaker1/clip2":
                row["semantic_features"] = [[float("nan")] * 24 for _ in row["semantic_features"]]
        return rows

    features = broken_features(tiny_features, tmp_path / "features", spoil)
    out = tmp_path / "run"
    options += ["--data", features, "--max_train_steps", 100, "--save_steps", 1, "--eval_steps", 1, "--stage", 2]
    # The clip is the prompt of others of its speaker, and its own emotion prompt.
    said = run_to_error("train_t2s", "--output", out, *options)
    assert "The loss is nan at step" in said and "in the batch of speaker1/" in said or ", speaker1/" in said
    states = list(out.glob("state/step-*")) or [out]
    for path in [*states[0].rglob("*.safetensors"), out / "t2s/model.safetensors"]:
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(path).values() if tensor.is_floating_point())


def test_a_state_from_which_no_step_can_be_made_is_not_kept(options, tmp_path):
    out = tmp_path / "run"
    # The warm-up's first step has the rate 0; the second one leaves numbers, but none that give a loss or a gradient.
    options += ["--learning_rate", 1e30, "--warmup_steps", 2, "--max_train_steps", 20, "--save_steps", 1]
    said = run_to_error("train_t2s", "--output", out, *options, "--eval_steps", 100)
    assert "What was saved before is good. Begin another run" in said and f"--model {out}" in said
    assert [path.name for path in out.glob("state/*")] == ["step-00000001"]
    weights = load_file(out / "state/step-00000001/model.safetensors").values()
    assert all(float(weight.abs().max()) < 100 for weight in weights if weight.is_floating_point())


def test_weights_that_are_no_numbers_are_not_saved(options, tmp_path):
    out = tmp_path / "run"
    # Loss and gradient of the first step are good, what it makes of the weights is not.
    options += ["--learning_rate", 1e30, "--warmup_steps", 0, "--save_steps", 1, "--weight_decay", 1e9]
    said = run_to_error("train_t2s", "--output", out, *options)
    assert "The weights are no numbers after step 1. What was saved before is good" in said
    assert not list(out.glob("state/step-*")) and not (out / "last").exists()
    weights = out / "t2s/model.safetensors"
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(weights).values())
    # As readable as the files that people write.
    assert weights.stat().st_mode & 0o777 == (out / "config.json").stat().st_mode & 0o777


def test_a_full_disk_is_said_and_loses_nothing(options, tiny_checkpoint, tmp_path):
    out = tmp_path / "run"
    options += ["--stage", 1]
    run_program("train_t2s", "--output", out, *options)
    largest = max(path.stat().st_size for path in tiny_checkpoint.rglob("*.safetensors"))
    command = [sys.executable, TRAINING / "train_t2s.py", "--output", tmp_path / "other", *options]
    command = [str(item) for item in command]

    def limit():
        # Files may become as large as the copied checkpoint's, but the optimiser's state is larger.
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest + 1000, largest + 1000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert "could not be written" in result.stderr and "make room, then --resume" in result.stderr
    assert not list((tmp_path / "other/state").iterdir())
    # With room again the run goes on to the numbers of the other.
    run_program("train_t2s", "--output", tmp_path / "other", *options, "--resume")
    assert read_log(tmp_path / "other") == read_log(out)


def test_faults_that_are_found_at_once(options, tiny_checkpoint, tiny_features, tmp_path):
    out = tmp_path / "run"
    (tmp_path / "file").write_text("")
    said = run_to_error("train_t2s", "--output", tmp_path / "file" / "run", *options)
    assert "cannot be written: Not a directory. Name another folder." in said
    said = run_to_error("train_t2s", "--output", out, *options, "--model", tmp_path)
    assert "is no checkpoint: it has no config.json" in said
    said = run_to_error("train_t2s", "--output", out, *options, "--model", tmp_path / "checkpiont")
    assert f"--model {tmp_path / 'checkpiont'} is neither a folder here nor a repository" in said
    said = run_to_error("train_t2s", "--output", out, *options, "--data", tmp_path)
    assert "holds no prepared features: it has no features.json" in said
    said = run_to_error("train_t2s", "--output", out, *options, "--model", "tiny")
    assert (
        "were made with text_vocab_size 1000, but" in said and "Prepare the data again with this checkpoint." in said
    )
    other_sizes = tmp_path / "other_sizes"
    shutil.copytree(tiny_checkpoint, other_sizes)
    settings = json.loads((other_sizes / "t2s/config.json").read_text()) | {"num_hidden_layers": 3}
    (other_sizes / "t2s/config.json").write_text(json.dumps(settings))
    said = run_to_error("train_t2s", "--output", out, *options, "--model", other_sizes)
    assert "do not fit the `config.json` beside them" in said and "is missing" in said
    empty = tmp_path / "empty"
    (empty / "train").mkdir(parents=True)
    (empty / "features.json").write_text((tiny_features / "features.json").read_text())
    said = run_to_error("train_t2s", "--output", out, *options, "--data", empty)
    assert "holds no clips. See report.jsonl there for what was skipped, and why." in said
    said = run_to_error("train_t2s", "--output", out, *options, "--cpu", "--mixed_precision", "fp16")
    assert "--mixed_precision fp16 needs a GPU, but this run is on the CPU. Use bf16 or no." in said
    said = run_to_error("train_t2s", "--output", tiny_checkpoint, *options)
    assert "training would overwrite what it starts from" in said


# --- precision, memory, trackers, launchers ------------------------------------------------------------------------------


def test_bf16_and_gradient_checkpointing_and_tensorboard(options, tmp_path):
    options += ["--eval_steps", 100, "--learning_rate", 1e-3]
    for name, extra in (
        ("plain", []),
        ("checkpointing", ["--gradient_checkpointing"]),
        ("bf16", ["--mixed_precision", "bf16"]),
    ):
        run_program("train_t2s", "--output", tmp_path / name, *options, *extra, "--report_to", "tensorboard")
    plain, checkpointing, bf16 = (
        [row["train/loss"] for row in read_log(tmp_path / name, "train/")]
        for name in ("plain", "checkpointing", "bf16")
    )
    assert checkpointing == pytest.approx(plain, rel=1e-5)
    assert bf16 == pytest.approx(plain, rel=2e-2) and bf16 != plain
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "plain" / "indextts2"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(plain)


def test_trackio(options, tmp_path):
    import sqlite3

    environment = {"TRACKIO_DIR": str(tmp_path / "trackio")}
    run_program("train_t2s", "--output", tmp_path / "run", *options, "--report_to", "trackio", environment=environment)
    with sqlite3.connect(tmp_path / "trackio" / "indextts2.db") as database:
        rows = [json.loads(row) for (row,) in database.execute("select metrics from metrics order by step")]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses == pytest.approx([row["train/loss"] for row in read_log(tmp_path / "run", "train/loss")])


def test_accelerate_launch_with_the_fsdp_configuration(options, tmp_path):
    """`accelerate launch` reads the shipped file, and one process on the CPU runs with it."""
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    launcher += ["--config_file", TRAINING / "configs/fsdp.yaml", "--cpu", "--num_processes", "1"]
    command = [*launcher, TRAINING / "train_t2s.py", "--output", tmp_path / "launched", *options, "--cpu"]
    result = subprocess.run(
        [str(item) for item in command], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr
    run_program("train_t2s", "--output", tmp_path / "plain", *options)
    for row, expected in zip(read_log(tmp_path / "launched"), read_log(tmp_path / "plain"), strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
