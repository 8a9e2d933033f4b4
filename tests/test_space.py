"""The Space and its API: what it gives, what it refuses and how it says so, and what stays behind."""

import io
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradio as gr
import httpx
import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import SPACE, make_speech
from gradio_client import Client, handle_file
from test_train_emotion_text import build_emotion_text

import app
import speaking
from indextts2_hf import EMOTIONS, IndexTTS2TextToAudioPipeline
from speaking import FREE, MAX_CHARACTERS, OWN, RECORDING, SECONDS, TOKENS, WEIGHTS, WORDS, make_speak, to_pcm


QUICK = {"num_inference_steps": 2}
LONG_TEXT = " ".join(["This is a sentence of a text that is long enough for several segments."] * 6)
ROOT = SPACE.parent.parent


def sound(path: Path, seconds: float, sampling_rate: int = 16000, **kwargs) -> str:
    soundfile.write(path, make_speech(seconds, sampling_rate, **kwargs), sampling_rate)
    return str(path)


# --- what happens with a request -----------------------------------------------------------------------------------------


def ask(pipe: IndexTTS2TextToAudioPipeline, **changes) -> list[tuple]:
    """All that the function behind the button gives for what the page has at first, and `changes`."""
    usual = speaking.usual_settings(pipe)
    arguments = dict.fromkeys(EMOTIONS, 0.0) | usual
    arguments |= {"text": "Hello there.", "voice": pipe.model.config.default_voice, "voice_audio": None}
    arguments |= {"emotion_from": OWN, "emotion_audio": None, "emotion_text": "", "emotion_strength": 1.0}
    arguments |= {"length_from": FREE, "duration_s": 3.0, "num_semantic_tokens": 150, "seed": ""}
    return list(make_speak(pipe)(**(arguments | QUICK | changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"length_from": SECONDS, "duration_s": 1.7, "seed": "7", "emotion_from": WEIGHTS, "happy": 0.7, "sad": 0.2},
        {
            "length_from": TOKENS,
            "num_semantic_tokens": 40,
            "voice_audio": "anna.wav",
            "text": 'It\'s "quoted",\nand broken.',
        },
        {"emotion_from": RECORDING, "emotion_audio": "joy.flac", "emotion_strength": 0.5, "temperature": 0.6},
        {"num_candidates": 3, "text_guidance_scale": 2.0, "seed": "3"},
        {"emotion_from": WORDS, "emotion_text": "bursting with joy", "length_from": TOKENS, "num_semantic_tokens": 20},
        {
            "text": LONG_TEXT,
            "num_beams": 2,
            "segment_silence_s": 0.35,
            "length_from": TOKENS,
            "num_semantic_tokens": 180,
        },
    ],
    ids=["weights-seconds", "recorded-voice", "recorded-emotion", "candidates", "words", "long-beams"],
)
def test_the_shown_call_makes_the_same_sound(changes, pipe, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "uploads").mkdir()
    paths = {
        name: sound(tmp_path / "uploads" / changes[name], 0.8, pitch_hz=pitch)
        for name, pitch in (("voice_audio", 140.0), ("emotion_audio", 210.0))
        if name in changes
    }
    if changes.get("emotion_from") == WORDS:
        monkeypatch.setattr(pipe, "emotion_text_model", build_emotion_text())
    answers = ask(pipe, **(changes | paths))
    audio, segments, picture, code, status = answers[-1]
    sampling_rate, samples = audio
    assert picture.size == (990, 440) and picture.mode == "RGBA"
    assert f"{len(samples) / sampling_rate:.2f}" in status
    if changes.get("length_from") == SECONDS:
        assert len(samples) == round(changes["duration_s"] * sampling_rate)
    if changes.get("text") == LONG_TEXT:
        assert len(segments) > 1 and [one["number"] for one in segments] == list(range(1, len(segments) + 1))
        assert " ".join(one["text"] for one in segments).lower().count("sentence") == 6
        # A segment is given as soon as it is there.
        assert [len(answer[1]) for answer in answers[1:-1]] == list(range(1, len(segments)))
    else:
        assert not segments

    # As the visitor would run it: with the recordings and the checkpoint at hand.
    assert str(tmp_path) not in code and str(tiny_checkpoint) not in code
    for path in paths.values():
        Path(path).rename(tmp_path / Path(path).name)
    (tmp_path / tiny_checkpoint.name).symlink_to(tiny_checkpoint)
    if changes.get("emotion_from") == WORDS:
        code = code.replace("speech =", "pipe.emotion_text_model = emotion_text_model\nspeech =")
    namespace = {"emotion_text_model": pipe.emotion_text_model}
    torch.manual_seed(12345)
    exec(code, namespace)
    np.testing.assert_array_equal(to_pcm(namespace["speech"]["audio"]), samples)
    assert namespace["speech"]["sampling_rate"] == sampling_rate


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": ""}, "text"),
        ({"text": None}, "text"),
        ({"text": " \n "}, "text"),
        ({"text": "a" * 100_000}, "has 100,000 characters, but at most 1,000"),
        ({"voice": "<b>nobody</b>"}, "no voice named '&lt;b&gt;nobody&lt;/b&gt;'"),
        ({"voice": None}, "this checkpoint brings none: upload or record one"),
        ({"emotion_from": WEIGHTS}, "All eight emotions are at 0"),
        ({"emotion_from": RECORDING}, "recording of the emotion is missing"),
        ({"emotion_from": WORDS, "emotion_text": " "}, "has 0 characters"),
        ({"emotion_from": WORDS, "emotion_text": "b" * 201}, "has 201 characters"),
        ({"length_from": SECONDS, "duration_s": None}, "length in seconds is missing"),
        ({"length_from": SECONDS, "duration_s": 0.001}, "needs at least"),
        ({"length_from": TOKENS, "num_semantic_tokens": None}, "length in tokens is missing"),
        ({"seed": "one"}, "The seed is 'one', but it must be a whole number"),
        ({"voice_audio": "gone.wav"}, "The recording is no longer here"),
        ({"voice_audio": "notes.txt"}, "'notes.txt' is no sound that can be read"),
        ({"voice_audio": "long.flac"}, "lasts 600 s, but at most 60 s are taken"),
        ({"voice_audio": "short.wav"}, "0.1"),
        ({"emotion_from": RECORDING, "emotion_audio": "long.flac"}, "lasts 600 s, but at most 60 s are taken"),
    ],
)
def test_what_cannot_be_spoken_is_said(changes, message, pipe, tmp_path):
    (tmp_path / "notes.txt").write_text("no sound")
    soundfile.write(tmp_path / "long.flac", np.zeros(600 * 8000), 8000)
    soundfile.write(tmp_path / "short.wav", make_speech(0.1, 16000), 16000)
    changes = {name: str(tmp_path / value) if name.endswith("_audio") else value for name, value in changes.items()}
    with pytest.raises(gr.Error) as error:
        ask(pipe, **changes)
    assert message in error.value.message
    assert str(tmp_path) not in error.value.message and not error.value.print_exception


def test_what_goes_wrong_inside_is_not_shown(pipe, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError(f"out of memory in {ROOT}")

    monkeypatch.setattr(type(pipe), "stream", fail)
    with pytest.raises(gr.Error, match="Something went wrong here") as error:
        ask(pipe)
    assert str(ROOT) not in error.value.message and "a request failed" in caplog.text


def test_words_are_offered_where_they_can_be_read(tiny_checkpoint, tmp_path):
    without = app.load_pipeline(str(tiny_checkpoint))
    folder = tmp_path / "with-words"
    without.save_pretrained(folder)
    build_emotion_text().save_pretrained(folder)
    for pipe, offered in ((without, False), (app.load_pipeline(str(folder)), True)):
        components = {one["props"].get("label"): one["props"] for one in app.build_demo(pipe).config["components"]}
        emotion = components["Emotion"]
        assert (WORDS in [value for _, value in emotion["choices"]]) == offered
        assert ("no emotion language model" in (emotion.get("info") or "")) != offered


def test_a_checkpoint_without_voices(tiny_checkpoint):
    pipe = IndexTTS2TextToAudioPipeline.from_pretrained(tiny_checkpoint)
    pipe.model.voices, pipe.model.config.default_voice = {}, None
    components = {one["props"].get("label"): one["props"] for one in app.build_demo(pipe).config["components"]}
    assert not components["Voice"]["interactive"] and "brings no voice" in components["Voice"]["info"]


def test_files_are_deleted(pipe, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "files"))
    monkeypatch.setattr(app, "DELETE_EVERY_S", 2)
    monkeypatch.setattr(app, "DELETE_AFTER_S", 2)
    demo = app.build_demo(pipe)
    _, url, _ = app.launch(demo, prevent_thread_lock=True, quiet=True)
    try:
        client = Client(url, verbose=False, download_files=str(tmp_path / "downloads"))
        voice = sound(tmp_path / "anna.wav", 0.5)
        client.predict(text="Hello.", voice_audio=handle_file(voice), api_name="/speak", **QUICK)

        def kept() -> list[Path]:
            return [path for path in (tmp_path / "files").rglob("*") if path.is_file()]

        start = time.monotonic()
        assert kept()
        while kept():
            assert time.monotonic() - start < 20, kept()
            time.sleep(0.2)
    finally:
        demo.close()


# --- the API of a running server -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(space, tmp_path_factory) -> Client:
    return Client(space.url, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))


def test_the_api_has_names(client):
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(endpoints) == {"/speak"}
    names = [parameter["parameter_name"] for parameter in endpoints["/speak"]["parameters"]]
    assert names[:4] == ["text", "voice", "voice_audio", "emotion_from"] and names[4:12] == list(EMOTIONS)
    assert all(parameter["label"] for parameter in endpoints["/speak"]["parameters"])


def test_the_api_speaks(space, client, tmp_path):
    arguments = {"text": "Hello there.", "length_from": SECONDS, "duration_s": 1.25, "seed": "3", "api_name": "/speak"}
    audio, segments, picture, code, status = client.predict(**arguments, **QUICK)
    samples, sampling_rate = soundfile.read(audio, dtype="int16")
    assert len(samples) == round(1.25 * sampling_rate) and not segments and "seed 3" in status
    namespace = {}
    exec(code, namespace)
    np.testing.assert_array_equal(to_pcm(namespace["speech"]["audio"]), samples)

    recording = handle_file(sound(tmp_path / "anna.wav", 1.0))
    own = client.predict(**arguments, **QUICK, voice_audio=recording)
    assert "voice='anna.wav'" in own[3] and not np.array_equal(soundfile.read(own[0], dtype="int16")[0], samples)

    job = client.submit(text=LONG_TEXT, api_name="/speak", **QUICK)
    job.result()
    counts = [len(answer[1]) for answer in job.outputs()]
    assert counts[0] == 0 and counts[-1] > 1 and set(range(counts[-1])) <= set(counts)


def test_the_examples_run(client):
    for values in app.EXAMPLES.values():
        names = ("text", "emotion_from", "happy", "length_from", "duration_s")
        audio, *_ = client.predict(**dict(zip(names, values, strict=True)), api_name="/speak", **QUICK)
        info = soundfile.info(audio)
        assert info.frames > 0
        if values[3] == SECONDS:
            assert info.frames == round(values[4] * info.samplerate)


def call(space, **changes) -> str:
    """The API without the client, which would check and upload: the error that comes back, or `""`."""
    information = httpx.get(f"{space.url}/gradio_api/info").json()["named_endpoints"]["/speak"]["parameters"]
    data = {one["parameter_name"]: one.get("parameter_default") for one in information} | {"text": "Hello."} | QUICK
    assert changes.keys() <= data.keys()
    answer = httpx.post(f"{space.url}/gradio_api/call/speak", json={"data": list((data | changes).values())})
    if answer.status_code != 200:
        return answer.text
    answer = httpx.get(f"{space.url}/gradio_api/call/speak/{answer.json()['event_id']}", timeout=60)
    last = answer.text.strip().rpartition("event: ")[2]
    event, _, content = last.partition("\ndata: ")
    return "" if event == "complete" else content


def upload(space, name: str, content: bytes) -> httpx.Response:
    return httpx.post(f"{space.url}/gradio_api/upload", files={"files": (name, content)}, timeout=60)


def file_field(path: str) -> dict:
    return {"path": path, "orig_name": "a.wav", "meta": {"_type": "gradio.FileData"}}


def check_no_path_of_the_server(message: str, space) -> None:
    for path in (ROOT, space.folder, Path(gr.__file__).parent):
        assert str(path) not in message


BAD_VALUES = {
    "empty": ({"text": ""}, "text"),
    "100,000 characters": ({"text": "a b " * 25_000}, f"at most {MAX_CHARACTERS:,} are spoken"),
    "voice": ({"voice": "nobody"}, "nobody"),
    "voice with a path": ({"voice": "/etc/passwd"}, "/etc/passwd"),
    "steps": ({"num_inference_steps": 100_000}, "100000"),
    "beams": ({"num_beams": 0}, "0"),
    "candidates": ({"num_candidates": 1000}, "1000"),
    "weight": ({"emotion_from": WEIGHTS, "happy": 50}, "50"),
    "emotion that is not offered": ({"emotion_from": WORDS, "emotion_text": "joy"}, "words"),
    "seconds": ({"length_from": SECONDS, "duration_s": 1e9}, "1000000000"),
    "tokens": ({"length_from": TOKENS, "num_semantic_tokens": 10**9}, "1000000000"),
    "seed": ({"seed": "x"}, "The seed is 'x'"),
    "no file": ({"voice_audio": "a.wav"}, None),
    "system file": ({"voice_audio": file_field("/etc/passwd")}, "'/etc/passwd' was not uploaded here"),
    "traversal": ({"voice_audio": file_field("../../../../../../etc/passwd")}, "was not uploaded here"),
    "own file": (
        {"emotion_audio": file_field(str(SPACE / "app.py")), "emotion_from": RECORDING},
        "was not uploaded here",
    ),
    "address": ({"voice_audio": file_field("http://127.0.0.1:1/a.wav")}, "was not uploaded here"),
    "file address": ({"voice_audio": file_field("file:///etc/passwd")}, "was not uploaded here"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_bad_values_are_refused(changes, message, space):
    answer = call(space, **changes)
    assert answer, "it was accepted"
    assert message is None or message in answer
    assert "root:" not in answer
    # What came is quoted; nothing else of this machine is.
    check_no_path_of_the_server(answer.replace(str(SPACE / "app.py"), ""), space)


def test_uploads_stay_in_their_folder(space):
    before = {path for path in space.folder.rglob("*") if path.is_file()}
    for name in ("../../../evil.wav", "..%2F..%2Fevil.wav", "/etc/evil.wav", "..\\evil.wav", "evil\x00.wav"):
        upload(space, name, b"RIFF")
    new = {path for path in space.folder.rglob("*") if path.is_file()} - before
    assert new and all((space.folder / "files") in path.parents for path in new)
    assert not Path("/etc/evil.wav").exists()


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", str(SPACE / "app.py"), "app.py"]
)
def test_only_own_files_are_served(path, space):
    answer = httpx.get(f"{space.url}/gradio_api/file={path}")
    assert answer.status_code in (403, 404) and "root:" not in answer.text


def test_uploads_are_bounded(space):
    # Ten minutes, small as a file.
    file = io.BytesIO()
    soundfile.write(file, np.zeros(600 * 16000), 16000, format="FLAC")
    path = upload(space, "long.flac", file.getvalue()).json()[0]
    assert "lasts 600 s, but at most 60 s are taken" in call(space, voice_audio=file_field(path))
    path = upload(space, "notes.wav", b"this is no sound" * 100).json()[0]
    answer = call(space, voice_audio=file_field(path))
    assert "'notes.wav' is no sound that can be read" in answer
    check_no_path_of_the_server(answer, space)
    # Ten minutes as WAV at 44.1 kHz, which is more than 20 MB.
    answer = upload(space, "large.wav", bytes(53_000_000))
    assert answer.status_code == 413 and not list(space.folder.rglob("large.wav"))


def test_the_page_shows_no_path(space):
    for address in ("/", "/config", "/gradio_api/info"):
        answer = httpx.get(space.url + address)
        assert answer.status_code == 200
        check_no_path_of_the_server(answer.text, space)


def test_twenty_at_once_and_the_memory_afterwards(space, client):
    arguments = {"text": "Hello.", "length_from": SECONDS, "duration_s": 0.5, "api_name": "/speak"}

    def ask_for(seed: int) -> str:
        try:
            audio, *_ = client.predict(seed=str(seed), **arguments, **QUICK)
            info = soundfile.info(audio)
            return "spoken" if info.frames == round(0.5 * info.samplerate) else "wrong length"
        except Exception as error:
            return str(error)

    def bad_ones() -> None:
        for changes, _ in BAD_VALUES.values():
            call(space, **changes)

    def many_at_once() -> list[str]:
        with ThreadPoolExecutor(20) as pool:
            return list(pool.map(ask_for, range(20)))

    # Once before the measure: what is loaded and made at first use stays, and so does the memory of twenty threads.
    assert [ask_for(seed) for seed in range(3)] == ["spoken"] * 3
    many_at_once()
    bad_ones()
    # What is leaked is leaked in every round; what the allocator keeps for itself comes in one and not in the next.
    for _ in range(4):
        before = space.memory_mib()
        answers = many_at_once()
        bad_ones()
        # Those who find no place in the queue are told so; all others are served.
        assert answers.count("spoken") >= app.QUEUE_SIZE
        assert all(answer == "spoken" or "queue is full" in answer.lower() for answer in answers), set(answers)
        assert ask_for(99) == "spoken"
        growth = space.memory_mib() - before
        print(
            f"memory: {before:.0f} MiB before, {growth:+.1f} MiB after 20 requests at once and {len(BAD_VALUES)} bad ones"
        )
        if growth < 15:
            break
    assert growth < 15
    # Whatever failed was refused on purpose.
    assert "a request failed" not in space.output, space.output


# --- the folder ----------------------------------------------------------------------------------------------------------


def test_the_folder_is_a_space():
    readme = (SPACE / "README.md").read_text()
    settings = yaml.safe_load(readme.split("---")[1])
    assert settings["sdk"] == "gradio" and (SPACE / settings["app_file"]).is_file()
    assert {"title", "emoji", "license", "models"} <= settings.keys()
    assert (
        settings["sdk_version"] == gr.__version__ or settings["sdk_version"] in (ROOT / "pyproject.toml").read_text()
    )
    requirements = re.findall(r"^[\w-]+", (SPACE / "requirements.txt").read_text(), flags=re.MULTILINE)
    assert requirements == ["indextts2-hf", "matplotlib"]
    # The command that starts it is the one the server of these tests was started with.
    assert "python spaces/indextts2/app.py" in readme
    for name, value in (("characters", f"{MAX_CHARACTERS:,}"), ("s of speech", speaking.MAX_SPEECH_S)):
        assert f"{value} {name}" in readme
    assert f"{speaking.MAX_RECORDING_S} s and {app.MAX_UPLOAD.removesuffix('mb')} MB" in readme
    assert json.dumps(app.QUEUE_SIZE) == "16" and "sixteen in the queue" in readme
