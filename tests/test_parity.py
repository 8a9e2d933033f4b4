"""The parity set passes, and `tests/parity.py` would notice if it did not. `INDEXTTS2_PARITY=FOLDER` takes another set."""

import json
import shutil

import parity
import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture
def copied_set(parity_folder, tmp_path):
    return shutil.copytree(parity_folder, tmp_path / "parity")


def change_case(folder, name, change):
    path = folder / "cases" / f"{name}.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    path.unlink()
    change(tensors)
    save_file(tensors, path)


def test_the_set_passes(parity_folder, capsys):
    pytest.importorskip("wetext")
    code = parity.main([str(parity_folder)])
    printed = capsys.readouterr().out
    assert code == 0, printed
    compared = {(line.split()[0], line.split()[1]) for line in printed.splitlines() if " out." in line}
    for path in (parity_folder / "cases").iterdir():
        for name in load_file(path):
            if name.startswith("out."):
                assert (path.stem, name) in compared


@pytest.mark.parametrize("case, tensor", [("emotion", "out.emovec"), ("t2s_generate", "out.beam3_rp10_lp0.codes")])
def test_a_changed_number_fails(case, tensor, copied_set, capsys):
    assert parity.main([str(copied_set), "--case", case]) == 0

    def change(tensors):
        is_float = tensors[tensor].is_floating_point()
        tensors[tensor].view(-1)[-1] += 1e-3 if is_float else 1

    change_case(copied_set, case, change)
    assert parity.main([str(copied_set), "--case", case]) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.endswith("WRONG")]
    assert len(wrong) == 1 and tensor in wrong[0]


def test_an_output_that_is_not_compared_fails(copied_set, capsys):
    change_case(copied_set, "mel", lambda tensors: tensors.update({"out.new": torch.zeros(1)}))
    assert parity.main([str(copied_set), "--case", "mel"]) == 1
    assert "out.new" in capsys.readouterr().out


def test_an_output_that_is_not_there_fails(copied_set, capsys):
    change_case(copied_set, "fbank", lambda tensors: tensors.pop("out.fbank"))
    assert parity.main([str(copied_set), "--case", "fbank"]) == 1
    assert "not compared" in capsys.readouterr().out


def test_an_unknown_case_fails(copied_set, capsys):
    save_file({"out.x": torch.zeros(1)}, copied_set / "cases" / "unheard_of.safetensors")
    assert parity.main([str(copied_set), "--case", "unheard_of"]) == 1
    assert "no check for this case" in capsys.readouterr().out
    assert parity.main([str(copied_set), "--case", "misspelt"]) == 1


def test_an_unknown_setting_fails(copied_set, capsys):
    path = copied_set / "case_settings.json"
    settings = json.loads(path.read_text())
    settings["e2e_greedy"]["settings"]["temperament"] = 1
    path.write_text(json.dumps(settings))
    assert parity.main([str(copied_set), "--case", "e2e_greedy"]) == 1
    assert "temperament" in capsys.readouterr().out


def test_a_case_without_its_file_fails(copied_set, capsys):
    (copied_set / "cases" / "cfm.safetensors").unlink()
    assert parity.main([str(copied_set), "--case", "cfm"]) == 1
    assert "its file is missing" in capsys.readouterr().out


def test_changed_text_fails(copied_set, capsys):
    path = copied_set / "text" / "emotion_answers.json"
    answers = json.loads(path.read_text())
    answers["cases"][0]["weights"][0] += 0.1
    path.write_text(json.dumps(answers))
    assert parity.main([str(copied_set), "--case", "emotion_text"]) == 1
