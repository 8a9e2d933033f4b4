"""Averages of checkpoints: which weights, what else is in the folder, that it speaks, and what is no average."""

import shutil
import sys

import pytest
import torch

from indextts2_hf import (
    IndexTTS2SemanticToMelTransformer,
    IndexTTS2T2SForConditionalGeneration,
    IndexTTS2TextToAudioPipeline,
)
from programs import run_program, run_to_error


CLASSES = {"t2s": IndexTTS2T2SForConditionalGeneration, "s2m": IndexTTS2SemanticToMelTransformer}


def load(folder, part):
    return CLASSES[part].from_pretrained(folder, subfolder=part)


@pytest.fixture
def trained(tiny_checkpoint, tmp_path):
    """Two checkpoints: the tiny one, and as if it had been trained further."""
    torch.manual_seed(0)
    folder = tmp_path / "trained"
    shutil.copytree(tiny_checkpoint, folder)
    for part in CLASSES:
        model = load(folder, part)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder / part)
    return tiny_checkpoint, folder


@pytest.mark.parametrize("part", CLASSES)
def test_an_average(trained, tmp_path, part):
    out = tmp_path / "average"
    said = run_program(
        "average_checkpoints", "--models", *trained, "--shares", 0.25, 0.75, "--part", part, "--output", out
    )
    assert f"the {part} of 2 checkpoints, averaged" in said
    first, last = (load(folder, part).state_dict() for folder in trained)
    for name, weight in load(out, part).state_dict().items():
        torch.testing.assert_close(weight, 0.25 * first[name] + 0.75 * last[name])
    # All else is the last one's.
    (other,) = set(CLASSES) - {part}
    for name, weight in load(out, other).state_dict().items():
        assert torch.equal(weight, load(trained[1], other).state_dict()[name])
    names = {path.relative_to(trained[1]) for path in trained[1].rglob("*") if path.is_file()}
    assert {path.relative_to(out) for path in out.rglob("*") if path.is_file()} == names - {
        path for path in names if path.name == "README.md"
    }
    pipe = IndexTTS2TextToAudioPipeline.from_pretrained(out)
    assert len(pipe("Hello.", duration_s=0.4, seed=1)["audio"]) == round(0.4 * 22050)


def test_without_shares_all_count_alike(trained, tmp_path):
    out = tmp_path / "average"
    run_program("average_checkpoints", "--models", *trained, trained[1], "--part", "t2s", "--output", out)
    first, last = (load(folder, "t2s").state_dict() for folder in trained)
    for name, weight in load(out, "t2s").state_dict().items():
        torch.testing.assert_close(weight, (first[name] + 2 * last[name]) / 3)


def test_what_not_all_have_is_the_last_ones(trained, tmp_path):
    model = load(trained[1], "t2s")
    model.add_text_recognizer(8)
    model.save_pretrained(trained[1] / "t2s")
    out = tmp_path / "average"
    run_program("average_checkpoints", "--models", *trained, "--part", "t2s", "--output", out)
    averaged = load(out, "t2s")
    for name, weight in averaged.text_recognizer.state_dict().items():
        assert torch.equal(weight, model.text_recognizer.state_dict()[name])
    assert not torch.equal(averaged.semantic_head.weight, model.semantic_head.weight)


def test_what_is_no_average(trained, tmp_path, monkeypatch, capsys):
    from average_checkpoints import average_weights, parse

    def refused(*arguments) -> str:
        command = ["average_checkpoints.py", "--part", "t2s", "--output", tmp_path / "average", *arguments]
        monkeypatch.setattr(sys, "argv", [str(item) for item in command])
        with pytest.raises(SystemExit):
            parse()
        return capsys.readouterr().err

    assert "--models has one checkpoint" in refused("--models", "a")
    assert "--shares has 1 numbers for 2 models" in refused("--models", "a", "b", "--shares", 1)
    for shares in ((0.5, 0.6), (1.5, -0.5), ("nan", 0.5)):
        assert "need numbers of 0 or more whose sum is 1" in refused("--models", "a", "b", "--shares", *shares)

    with pytest.raises(
        ValueError, match=r"weight w has the shapes \(2,\), \(3,\): these checkpoints were not trained"
    ):
        average_weights([{"w": torch.ones(2)}, {"w": torch.ones(3)}], [0.5, 0.5])
    counts = [{"n": torch.tensor(1)}, {"n": torch.tensor(2)}]
    assert average_weights(counts, [0.5, 0.5]) == {"n": torch.tensor(2)}

    arguments = ["--part", "t2s", "--models", *trained, "--output"]
    assert "is there already" in run_to_error("average_checkpoints", *arguments, trained[1])
    # Nothing half-written is left.
    (trained[1] / "t2s" / "model.safetensors").write_bytes(b"no weights")
    run_to_error("average_checkpoints", *arguments, tmp_path / "average")
    assert not (tmp_path / "average").exists()
