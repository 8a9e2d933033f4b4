"""What `push` writes and uploads: files, cards, notices, refusals; and the upload itself, to a Hub of our own on this machine."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import SAMPLING_RATE, make_speech
from huggingface_hub import ModelCard

import indextts2_cli
from indextts2_hf import IndexTTS2TextToAudioPipeline, VoicePrompt, embedded_checkpoint
from indextts2_hf.cards import CARD_MARK, EVALUATION_MARK, read_card, write_adapter_card, write_model_card
from indextts2_hf.hub import assemble_hub_folder, push_to_hub


ROOT = Path(__file__).parent.parent
REPORT = {
    "about": {
        "model": "/somewhere/private",
        "data": "meta.lst",
        "seed": 7,
        "measured by": {"words": "a recogniser", "voice": "an encoder"},
        "utterances": [{"prompt": "/somewhere/private/a.wav"}] * 3,
    },
    "results": {
        "recording": {"utterances": 3, "WER, all words, %": 5.25},
        "free": {"utterances": 3, "WER, all words, %": 12.5, "similarity to the prompt": 0.8125},
    },
}


@pytest.fixture
def report(tmp_path) -> Path:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(REPORT))
    return path


@pytest.fixture
def pack(tiny_voice, tmp_path) -> Path:
    weights = (0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.25, 0.0)
    voice = replace(tiny_voice, license="cc0-1.0", consent="A buzz has nobody to ask.", emotion_weights=weights)
    voice.save(tmp_path / "pack")
    return tmp_path / "pack"


def card_of(folder: Path) -> ModelCard:
    card = ModelCard.load(folder / "README.md")
    for code in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL):
        compile(code, "card", "exec")
        assert 1 <= len([line for line in code.splitlines() if line.strip()]) <= 6
    assert "{{" not in card.text and "{%" not in card.text and "None" not in card.text
    for words in ("only if that person agreed", "to deceive, or to\nharass", "## Limits", "## Licence"):
        assert words in card.text
    return card


# --- checkpoints ---------------------------------------------------------------------------------------------------------


def test_only_what_belongs_to_the_checkpoint(tiny_checkpoint, tmp_path):
    run = shutil.copytree(tiny_checkpoint, tmp_path / "run")
    for name in ("run.json", "log.jsonl", "state/step-1/optimizer.bin", "events.out", ".cache/x.json", "t2s/.lock"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{}")
    (run / "LICENSE").write_text("ours")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result = push_to_hub(run, "someone/tiny", is_dry_run=True, output=tmp_path / "out")
    assert result.kind == "checkpoint" and result.folder == tmp_path / "out" and result.url is None
    assert not [name for name in result.files if "run.json" in name or "state" in name or "/." in f"/{name}"]
    assert {"LICENSE", "LICENSE.code", "NOTICE.code", "README.md", "modeling_t2s.py"} <= set(result.files)
    assert {name: (tmp_path / "out" / name).stat().st_size for name in result.files} == result.files
    for path in run.rglob("*.safetensors"):
        assert (tmp_path / "out" / path.relative_to(run)).read_bytes() == path.read_bytes()
    assert (tmp_path / "out" / "LICENSE.code").read_text() == (ROOT / "LICENSE").read_text()
    assert (tmp_path / "out" / "NOTICE.code").read_text() == (ROOT / "NOTICE").read_text()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_pushed_twice_it_is_the_same(tiny_checkpoint, tmp_path):
    first = push_to_hub(tiny_checkpoint, "someone/tiny", is_dry_run=True, output=tmp_path / "first")
    second = push_to_hub(first.folder, "someone/tiny", is_dry_run=True, output=tmp_path / "second")
    assert first.files == second.files
    assert all((first.folder / name).read_bytes() == (second.folder / name).read_bytes() for name in first.files)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: (folder / "config.json").unlink(),
            "is no checkpoint of IndexTTS2 .*, no adapter .* and no voice",
        ),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'),
            "is no checkpoint of IndexTTS2",
        ),
        (lambda folder: (folder / "model_index.json").unlink(), "no whole checkpoint: it has no model_index.json"),
        (lambda folder: shutil.rmtree(folder / "vocoder"), "vocoder/config.json cannot be read"),
        (lambda folder: (folder / "s2m/diffusion_pytorch_model.safetensors").write_bytes(b"x" * 99), "is damaged"),
        (lambda folder: (folder / "t2s/pytorch_model.bin").touch(), "pytorch_model.bin' is no safetensors file"),
    ],
)
def test_what_is_no_whole_checkpoint(change, message, tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    change(folder)
    with pytest.raises(ValueError, match=message):
        push_to_hub(folder, "someone/tiny", is_dry_run=True, output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_wrong_arguments(tiny_checkpoint, tmp_path, report):
    with pytest.raises(ValueError, match="'tiny' is no id of a Hub repository, which is like 'owner/name'"):
        assemble_hub_folder(tiny_checkpoint, tmp_path / "out", "tiny")
    with pytest.raises(FileExistsError, match="exists. Name a new folder"):
        assemble_hub_folder(tiny_checkpoint, tmp_path, "someone/tiny")
    for text in ("{}", "no JSON", '{"about": [], "results": {}}'):
        report.write_text(text)
        with pytest.raises(ValueError, match="is no results.json of `evaluation/evaluate.py`"):
            assemble_hub_folder(tiny_checkpoint, tmp_path / "out", "someone/tiny", evaluation=report)
    assert not (tmp_path / "out").exists()


# --- cards ---------------------------------------------------------------------------------------------------------------


def test_a_card_with_figures(tiny_checkpoint, tmp_path, report):
    told = {"license": "apache-2.0", "languages": ["en"], "datasets": ["someone/clips"], "base_model": "someone/base"}
    assemble_hub_folder(tiny_checkpoint, tmp_path / "out", "someone/tiny", evaluation=report, **told)
    card = card_of(tmp_path / "out")
    data = card.data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-to-speech"
    assert "voice-cloning" not in data["tags"]  # whether it does is the card's of the released weights to say
    assert (data["license"], data["language"], data["datasets"]) == ("apache-2.0", ["en"], ["someone/clips"])
    assert data["base_model"] == "someone/base"
    assert [(result.metric_type, result.metric_value, result.dataset_name) for result in card.data.eval_results] == [
        ("wer", 12.5, "meta.lst, free"),
        ("similarity_to_the_prompt", 0.8125, "meta.lst, free"),
    ]
    assert data["model-index"][0]["name"] == "tiny"
    for words in ("| WER, all words, % | 5.25 | 12.5 |", "3 utterances of meta.lst, seed 7", "- words: a recogniser"):
        assert words in card.text
    assert "No figures" not in card.text and "private" not in card.content and "It speaks English." in card.text
    # What it says stays when it is made again, and so do the figures that lie beside it.
    shutil.copy(report, tmp_path / "out")
    assemble_hub_folder(tmp_path / "out", tmp_path / "again", "someone/other")
    again = card_of(tmp_path / "again")
    assert again.text == card.text.replace("someone/tiny", "someone/other")
    assert again.data.to_dict()["license"] == "apache-2.0" and not (tmp_path / "again/results.json").exists()


def test_a_card_without_figures_says_so(tiny_checkpoint, tmp_path):
    assemble_hub_folder(tiny_checkpoint, tmp_path / "out", "someone/tiny")
    card = card_of(tmp_path / "out")
    assert "No figures of quality were measured for this checkpoint." in card.text
    assert not card.data.eval_results and 'model="someone/tiny", trust_remote_code=True' in card.text


def test_a_markdown_table(tiny_checkpoint, tmp_path):
    (tmp_path / "results.md").write_text("| a | b |\n|---|---|\n| WER | 3.5 |\n")
    assemble_hub_folder(tiny_checkpoint, tmp_path / "out", "someone/tiny", evaluation=tmp_path / "results.md")
    card = card_of(tmp_path / "out")
    assert "| WER | 3.5 |\n\n## Limits" in card.text and not card.data.eval_results


def test_a_card_that_somebody_wrote_is_kept(tiny_checkpoint, tmp_path, report):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "mine")
    written = f"---\nlicense: mit\ntags:\n- mine\n---\n\n# My own\n\nRead this.\n\n{EVALUATION_MARK}\n\nGoodbye.\n"
    (folder / "README.md").write_text(written)
    assemble_hub_folder(folder, tmp_path / "kept", "someone/tiny")
    assert (tmp_path / "kept/README.md").read_text() == written
    # Figures are put where it wants them, and what is told goes into its metadata.
    assemble_hub_folder(folder, tmp_path / "filled", "someone/tiny", evaluation=report, languages=["en"])
    card = ModelCard.load(tmp_path / "filled/README.md")
    assert "Read this.\n\nMeasured with" in card.text and "Goodbye." in card.text and "| 12.5 |" in card.text
    data = card.data.to_dict()
    assert (data["license"], data["language"], data["tags"]) == ("mit", ["en"], ["mine"])
    assert card.data.eval_results[0].metric_value == 12.5
    assemble_hub_folder(folder, tmp_path / "new", "someone/tiny", is_new_card=True)
    card = card_of(tmp_path / "new")
    assert "Read this." not in card.text and CARD_MARK in card.text and card.data.license == "mit"


def test_the_terms_of_the_sources_stay(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "converted")
    write_model_card(folder, name="converted", is_converted=True)
    assemble_hub_folder(folder, tmp_path / "out", "someone/converted")
    card = card_of(tmp_path / "out")
    assert card.data.base_model == "IndexTeam/IndexTTS-2" and card.data.license_name == "of-the-sources"
    assert "voice-cloning" in card.data.tags
    assert "CC BY-NC 4.0" in card.text and "none was trained or changed" in card.text
    with pytest.raises(ValueError, match="terms of their sources"):
        assemble_hub_folder(folder, tmp_path / "other", "someone/converted", license="mit")
    # So they do through training.
    trained = shutil.copytree(tiny_checkpoint, tmp_path / "trained")
    write_model_card(trained, name="trained", base_card=read_card(folder))
    assemble_hub_folder(trained, tmp_path / "out-trained", "someone/trained")
    card = card_of(tmp_path / "out-trained")
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    assert "CC BY-NC 4.0" in card.text and "then trained further" in card.text


def test_the_card_runs(tmp_path, monkeypatch):
    """What it says of the package, on the embedded checkpoint. What it says of the code that lies there: `test_hub_round_trip`."""
    monkeypatch.chdir(tmp_path)
    assemble_hub_folder(embedded_checkpoint(), "someone/tiny", "someone/tiny", is_new_card=True)
    rate = read_rate(tmp_path / "someone/tiny")
    soundfile.write("recording.wav", make_speech(1.0, rate), rate)
    code = re.findall(r"```python\n(.*?)```", (tmp_path / "someone/tiny/README.md").read_text(), re.DOTALL)[0]
    exec(compile(code, "card", "exec"), {})
    assert soundfile.info("hello.wav").frames == round(1.5 * rate)


def read_rate(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text())["sampling_rate"]


# --- adapters ------------------------------------------------------------------------------------------------------------


def test_an_adapter(tiny_adapter, tiny_checkpoint, tmp_path, report):
    with pytest.raises(
        ValueError, match="The base of this adapter is the folder .*, which nobody else has. Publish that"
    ):
        assemble_hub_folder(tiny_adapter, tmp_path / "out", "someone/style")
    told = {"base_model": "someone/tiny", "license": "mit", "evaluation": report}
    kind = assemble_hub_folder(tiny_adapter, tmp_path / "out", "someone/style", **told)
    assert kind == "adapter"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    settings = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "someone/tiny"
    card = card_of(tmp_path / "out")
    data = card.data.to_dict()
    assert (data["library_name"], data["license"]) == ("peft", "mit")
    assert (data["base_model"], data["base_model_relation"]) == ("someone/tiny", "adapter")
    assert "| base | `someone/tiny` |" in card.text and "| 12.5 |" in card.text
    assert card.data.eval_results[0].metric_value == 12.5


def test_the_card_of_a_trained_adapter_keeps_its_figures(tiny_adapter, tmp_path, report):
    folder = shutil.copytree(tiny_adapter, tmp_path / "sad")
    write_adapter_card(
        folder,
        name="sad",
        base=str(tmp_path / "base"),
        data={"clips": "12"},
        settings={"rank": 4},
        before={"semantic_cross_entropy_per_token": 4.5},
        after={"semantic_cross_entropy_per_token": 4.25, "num_clips": 12, "standard_error_of_change_per_token": 0.1},
    )
    # A paragraph of its own.
    card = (folder / "README.md").read_text()
    assert f"\n\nNo figures of quality were measured for this adapter.\n{EVALUATION_MARK}\n\n" in card
    assemble_hub_folder(folder, tmp_path / "out", "someone/sad", base_model="someone/tiny", evaluation=report)
    card = card_of(tmp_path / "out")
    for words in (
        "better than its base: 4.5 to 4.25 nats",
        "| clips | 12 |",
        "| rank | 4 |",
        "| base | `someone/tiny` |",
        "| 12.5 |",
    ):
        assert words in card.text, words
    assert 'from_pretrained("someone/sad")' in card.text and str(tmp_path) not in card.content
    assert "No figures" not in card.text
    assert card.data.to_dict()["base_model"] == "someone/tiny"


def test_a_damaged_adapter(tiny_adapter, tmp_path):
    folder = shutil.copytree(tiny_adapter, tmp_path / "style")
    (folder / "adapter_model.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(ValueError, match="is no whole adapter: it has no adapter_model.safetensors"):
        assemble_hub_folder(folder, tmp_path / "out", "someone/style", base_model="someone/tiny")


def test_an_adapter_of_the_embedded_checkpoint(tiny_adapter, tmp_path):
    """Its base is in every package: it keeps the name, and the card names no repository."""
    folder = shutil.copytree(tiny_adapter, tmp_path / "style")
    settings = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": "tiny"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    assemble_hub_folder(folder, tmp_path / "out", "someone/style")
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    card = card_of(tmp_path / "out")
    assert not {"base_model", "base_model_relation"} & {*card.data.to_dict()} and "| base | `tiny` |" in card.text
    figures = {"semantic_cross_entropy_per_token": 4.5, "num_clips": 1}
    write_adapter_card(folder, name="style", base="tiny", data={}, settings={}, before=figures, after=figures)
    card = card_of(folder)
    assert not {"base_model", "base_model_relation"} & {*card.data.to_dict()} and "| base | `tiny` |" in card.text


# --- voice packs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pack", "file"])
def test_a_voice(form, pack, tiny_voice, tmp_path):
    source = pack if form == "pack" else pack / "voice.safetensors"
    result = push_to_hub(source, "someone/buzz", is_dry_run=True, output=tmp_path / "out")
    assert result.kind == "voice pack" and set(result.files) == {"README.md", "voice.safetensors"}
    voice = VoicePrompt.load(tmp_path / "out")
    assert (voice.license, voice.consent) == ("cc0-1.0", "A buzz has nobody to ask.")
    assert torch.equal(voice.prompt_mel, tiny_voice.prompt_mel) and voice.checkpoint == tiny_voice.checkpoint
    card = card_of(tmp_path / "out")
    assert card.data.license == "cc0-1.0" and "voice-pack" in card.data.tags
    for words in (
        'voice="someone/buzz"',
        "happy 0.5, surprised 0.25",
        "A buzz has nobody to ask.",
        "| adapter | none |",
    ):
        assert words in card.text, words


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"license": None}, "nothing of license,"),
        ({"consent": " "}, "nothing of consent,"),
        ({"license": None, "consent": None}, "license and consent"),
    ],
)
def test_a_voice_without_licence_or_consent(changes, missing, pack, tmp_path):
    replace(VoicePrompt.load(pack), **changes).save(tmp_path / "other")
    with pytest.raises(ValueError, match=missing):
        push_to_hub(tmp_path / "other", "someone/buzz", is_dry_run=True, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_voice_with_an_adapter(pack, tiny_adapter, tmp_path):
    replace(VoicePrompt.load(pack), adapter=str(tiny_adapter)).save(tmp_path / "sad")
    with pytest.raises(ValueError, match="The base of this adapter is the folder"):
        assemble_hub_folder(tmp_path / "sad", tmp_path / "out", "someone/sad")
    assemble_hub_folder(tmp_path / "sad", tmp_path / "out", "someone/sad", base_model="someone/tiny")
    card = card_of(tmp_path / "out")
    assert card.data.to_dict()["base_model"] == "someone/tiny" and "for this voice's texts alone" in card.text
    assert VoicePrompt.load(tmp_path / "out").adapter == str(tmp_path / "out")


# --- the upload ----------------------------------------------------------------------------------------------------------


class OwnHub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload asks for."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        url = f"http://127.0.0.1:{self.server.server_port}/someone/tiny"
        answer = {}
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            answer = {"url": url}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {
                "files": [{"path": item["path"], "uploadMode": "regular", "shouldIgnore": False} for item in files]
            }
        elif "/commit/" in self.path:
            for line in body.decode().splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    self.server.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            answer = {
                "success": True,
                "commitOid": "1" * 40,
                "commitUrl": f"{url}/commit/{'1' * 40}",
                "hookOutput": "",
            }
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), OwnHub)
    server.asked, server.files, server.created = [], {}, None
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def run_push(
    program: list[str], *arguments: object, hub, home: Path, **environment: str
) -> subprocess.CompletedProcess:
    source = Path(indextts2_cli.__file__).parent
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(home),
        "PYTHONPATH": str(source),
        "OMP_NUM_THREADS": "1",
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_DISABLE_XET": "1",
    } | environment
    command = [sys.executable, *program, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=300)


def test_the_upload(tiny_checkpoint, tmp_path, hub):
    expected = push_to_hub(tiny_checkpoint, "someone/tiny", is_dry_run=True, output=tmp_path / "expected")
    home = tmp_path / "home"
    home.mkdir()
    result = run_push(
        ["-m", "indextts2_cli", "push"],
        *(tiny_checkpoint, "--repo-id", "someone/tiny", "--token", "hf_secret", "--private"),
        hub=hub,
        home=home,
    )
    assert result.returncode == 0, result.stderr
    assert "uploaded: http://127.0.0.1" in result.stdout and "hf_secret" not in result.stdout + result.stderr
    assert hub.created["name"] == "tiny" and hub.created["organization"] == "someone"
    assert hub.created.get("private") is True or hub.created.get("visibility") == "private"
    assert {name: len(data) for name, data in hub.files.items()} == expected.files
    assert all((expected.folder / name).read_bytes() == data for name, data in hub.files.items())
    assert {token for _, token in hub.asked} == {"Bearer hf_secret"}
    assert not [name for name in os.listdir(home) if not name.startswith(".")]


@pytest.mark.parametrize(
    ("program", "options", "why"),
    [
        (["-m", "indextts2_cli", "push"], [], "there is no token"),
        ([str(ROOT / "pipelines/push_to_hub.py")], ["--dry-run", "--token", "hf_secret"], "as asked"),
    ],
    ids=["no token", "dry run"],
)
def test_nothing_is_uploaded(program, options, why, tiny_checkpoint, tmp_path, hub):
    result = run_push(program, tiny_checkpoint, "--repo-id", "someone/tiny", *options, hub=hub, home=tmp_path)
    assert result.returncode == 0, result.stderr
    assert hub.asked == []
    listed = dict(re.findall(r"^ +([\d,]+)  (\S+)$", result.stdout, re.MULTILINE)[::-1])
    folder = tmp_path / "tiny-hub"
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    lines = re.findall(r"^ +([\d,]+)  (\S+)$", result.stdout, re.MULTILINE)
    assert {name: int(size.replace(",", "")) for size, name in lines} == sizes and listed
    assert f"{sum(sizes.values()):,}  bytes in {len(sizes)} files: checkpoint for someone/tiny" in result.stdout
    assert f"tiny-hub: written; nothing was uploaded ({why}" in result.stdout


def test_a_hub_that_refuses(tiny_checkpoint, tmp_path, hub):
    arguments = (tiny_checkpoint, "--repo-id", "someone/tiny", "--token", "hf_secret")
    hub.RequestHandlerClass = type("Refusing", (OwnHub,), {"do_POST": lambda self: self.send_error(403, "no")})
    result = run_push(["-m", "indextts2_cli", "push"], *arguments, hub=hub, home=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and "could not be written to the Hub" in result.stderr
    assert "hf_secret" not in result.stderr
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]


# --- voices in use -------------------------------------------------------------------------------------------------------


def speak(pipe: IndexTTS2TextToAudioPipeline, text: str | list[str] = "Hello there.", **kwargs):
    return pipe(text, **{"seed": 1, "duration_s": 0.8, "num_inference_steps": 2, **kwargs})


def test_a_voice_brings_its_emotion(pipe, pack, tmp_path):
    weights = VoicePrompt.load(pack).emotion_weights
    own = speak(pipe, voice=pack)["audio"]
    asked = speak(pipe, voice="buzz", emotion_weights=list(weights))["audio"]
    assert np.array_equal(own, asked)
    plain = speak(pipe, voice="buzz")["audio"]
    assert not np.allclose(own, plain, atol=1e-4)
    # What is asked for goes before it, and strength is of either.
    assert np.array_equal(
        speak(pipe, voice=pack, emotion_weights=[0.0] * 8)["audio"],
        speak(pipe, voice="buzz", emotion_weights=[0.0] * 8)["audio"],
    )
    recording = (make_speech(1.0, pitch_hz=210.0), SAMPLING_RATE)
    by_recording = [speak(pipe, voice=voice, emotion_audio=recording)["audio"] for voice in (pack, "buzz")]
    assert np.array_equal(*by_recording)
    half = [
        speak(pipe, voice=pack, emotion_strength=0.5)["audio"],
        speak(pipe, voice="buzz", emotion_weights=list(weights), emotion_strength=0.5)["audio"],
    ]
    np.testing.assert_allclose(*half, atol=1e-5)
    # Row by row.
    rows = speak(
        pipe,
        ["Hello there."] * 4,
        voice=["buzz", str(pack), str(pack), "buzz"],
        emotion_weights=[None, None, [0.0] * 8, [0.0] * 8],
    )
    for row, expected in zip(rows[:2], (plain, own), strict=True):
        np.testing.assert_allclose(row["audio"], expected, atol=1e-5)
    np.testing.assert_allclose(rows[2]["audio"], rows[3]["audio"], atol=1e-5)


def test_a_voice_brings_its_adapter(tiny_checkpoint, tiny_adapter, pack, tmp_path):
    pipe = IndexTTS2TextToAudioPipeline.from_pretrained(tiny_checkpoint)
    styled = speak(IndexTTS2TextToAudioPipeline.from_pretrained(tiny_adapter))["audio"]
    plain = speak(pipe)["audio"]
    assert not np.allclose(styled, plain, atol=1e-3)
    voice = replace(VoicePrompt.load(pack), emotion_weights=None, adapter=str(tiny_adapter))
    voice.save(tmp_path / "styled")
    folder = str(tmp_path / "styled")
    rows = speak(pipe, ["Hello there."] * 4, voice=[folder, None, folder, folder], segment_batch_size=4)
    for row, expected in zip(rows, (styled, plain, styled, styled), strict=True):
        np.testing.assert_allclose(row["audio"], expected, atol=1e-5)
    # It is loaded once, and off when nobody asks for it.
    assert len(pipe.model.t2s.peft_config) == 1
    assert np.array_equal(speak(pipe)["audio"], plain)
    # An adapter that was on stays on, for the others.
    pipe.model.t2s.load_adapter(str(tiny_adapter), "other")
    again = speak(pipe, ["Hello there."] * 2, voice=[folder, None])
    for row in again:
        np.testing.assert_allclose(row["audio"], styled, atol=1e-5)
    assert pipe.model.t2s.active_adapters() == ["other"]


def test_an_adapter_that_does_not_fit_leaves_all_as_it_was(tiny_checkpoint, tiny_adapter, tiny_voice, tmp_path):
    adapter = shutil.copytree(tiny_adapter, tmp_path / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["auto_mapping"]["base_fingerprint"] = "2x32-0"
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    pipe = IndexTTS2TextToAudioPipeline.from_pretrained(tiny_checkpoint)
    plain = speak(pipe)["audio"]
    with pytest.raises(ValueError, match="The adapter .* was made for"):
        speak(pipe, voice=replace(tiny_voice, adapter=str(adapter)))
    assert not hasattr(pipe.model.t2s, "peft_config") and np.array_equal(speak(pipe)["audio"], plain)


def test_voices_that_are_not_there(pipe, tmp_path):
    message = r"There is no voice 'someone/nobody': it is no file or folder here, no voice of this checkpoint, which has \['buzz'\], and could not be had from the Hub"
    with pytest.raises(ValueError, match=message):
        pipe.load_voice("someone/nobody")
    with pytest.raises(ValueError, match="no voice named 'nobody'"):
        pipe.load_voice("nobody")
    with pytest.raises(OSError, match="recordings/anna.wav"):
        pipe.load_voice("recordings/anna.wav")
    with pytest.raises(ValueError, match="is no voice pack: it has no voice.safetensors"):
        pipe.load_voice(str(tmp_path))
