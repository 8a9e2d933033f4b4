"""
The pages in docs/ are run as they stand there, block by block, on the embedded checkpoint, and so are the examples.

Training commands get a few more options, which make them short; evaluation gets tiny models that listen. What needs the network,
the `pip` lines, is left out, and nothing else is.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import ASSETS, SAMPLING_RATE, make_speech
from datasets import Audio, Dataset
from parity import write_original_checkpoint
from sentencepiece import SentencePieceTrainer
from test_evaluate import recognizer, speaker_model  # noqa: F401 - fixtures

import indextts2_cli
from indextts2_hf import IndexTTS2TextToAudioPipeline, VoicePrompt, embedded_checkpoint
from programs import run_program, start


ROOT = Path(__file__).parent.parent
# The index has no code, and the figures take hours and recordings that are not in the repository.
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md") if path.stem not in ("README", "results"))
SHORT = ["--max_train_steps", 1, "--batch_size", 2, "--warmup_steps", 0, "--num_workers", 0]
SHORT += ["--mixed_precision", "no", "--eval_steps", 1, "--save_steps", 1, "--cpu"]
MORE_OPTIONS = {
    "train_t2s": SHORT,
    "train_s2m": SHORT,
    "train_emotion_lora": [*SHORT, "--num_spoken", 1],
    "prepare_dataset": [],
    "evaluate": ["--limit", 2],
    "benchmark": ["--num-beams", 1, "--num-inference-steps", 2],
}


@pytest.fixture
def workshop(tmp_path, monkeypatch, tiny_recordings) -> Path:
    """A folder with all that the pages name, in which they are run."""
    for name in ("training", "evaluation", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "checkpoint").symlink_to(embedded_checkpoint())
    shutil.copytree(tiny_recordings, tmp_path / "recordings")
    soundfile.write(tmp_path / "reference.wav", make_speech(1.5), SAMPLING_RATE)
    prompt = "recordings/speaker0-0.wav"
    (tmp_path / "meta.lst").write_text(f"one|Hello.|{prompt}|Good day.\ntwo|Hello.|{prompt}|See you.\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_command(line: str, folder: Path) -> None:
    words = shlex.split(line.removeprefix("accelerate launch ").removeprefix("python "))
    if words[0] == "indextts2":
        assert indextts2_cli.main(words[1:]) in (0, None), line
        return
    path = Path(words[0])
    assert path.parts[0] in ("training", "evaluation", "examples"), line
    name = f"../{path.parent}/{path.stem}"
    run_program(name, *words[1:], *MORE_OPTIONS[path.stem], folder=folder)


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.stem, marks=[pytest.mark.lora] if page.stem == "adapters" else []) for page in PAGES],
)
def test_every_block_runs(page, workshop, recognizer, speaker_model):  # noqa: F811 - fixtures
    if page.stem == "conversion":
        write_original_checkpoint(ASSETS / "parity", workshop / "IndexTTS-2")
        # A vocabulary as small as the tiny text embedding.
        SentencePieceTrainer.train(
            sentence_iterator=iter(["HELLO THERE . 你好 , 世界 ."]),
            model_prefix=str(workshop / "IndexTTS-2" / "bpe"),
            model_type="char",
            vocab_size=30,
            hard_vocab_limit=False,
            bos_id=0,
            eos_id=1,
            unk_id=2,
            minloglevel=2,
        )
    namespace = {}
    blocks = re.findall(r"```(\w+)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks and {language for language, _ in blocks} <= {"python", "bash"}
    for language, code in blocks:
        if language == "python":
            exec(compile(code, page.name, "exec"), namespace)
            continue
        for line in code.splitlines():
            if "--measures words voice" in line:
                line += f" --asr {recognizer} --speaker_model {speaker_model}"
            if not line.startswith("pip "):
                run_command(line, workshop)


def test_every_link_leads_somewhere():
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "spaces" / "indextts2" / "README.md"]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in [*PAGES, ROOT / "docs" / "results.md", *(ROOT / "examples").glob("*.py")]:
        if path.name == "pypi.md":  # in the place of the README where there is nothing else
            continue
        assert path.relative_to(ROOT).as_posix() in readme, f"the README does not name {path.name}"


def test_audiobook_chapter(workshop):
    first = "The “Harbour” lay quiet, at 5 km. " * 8
    (workshop / "chapter.txt").write_text(
        f"{first}\n\n***\n\nNobody came\nthat evening.\n\n\U0001f98e\n\n", encoding="utf-8"
    )
    said = run_program(
        "../examples/audiobook_chapter", "chapter.txt", "--voice", "reference.wav", "--seed", 2, folder=workshop
    )
    assert "paragraph 3 of 4, " in said
    for paragraph in (
        "2 of 4 has nothing to speak and is a pause: '***'",
        "4 of 4 has nothing to speak and is a pause: ",
    ):
        assert f"paragraph {paragraph}" in said
    info = soundfile.info("chapter.wav")
    subtitles = Path("chapter.srt").read_text(encoding="utf-8")
    times = re.findall(r"(\d\d):(\d\d):(\d\d),(\d\d\d)", subtitles)
    seconds = [60 * (60 * int(a) + int(b)) + int(c) + int(d) / 1000 for a, b, c, d in times]
    assert seconds == sorted(seconds) and len(seconds) >= 4
    assert seconds[-1] == pytest.approx(info.duration - 2 * 0.8, abs=0.002)
    # The text as it was written, all of it and in its order.
    lines = re.sub(r"^(\d+|\d\d:.*)$", "", subtitles, flags=re.MULTILINE)
    assert lines.split() == f"{first} Nobody came that evening.".split()
    # The paragraph without a letter is a second pause.
    assert seconds[-2] - seconds[-3] == pytest.approx(2 * 0.8, abs=0.002)
    # The last paragraph is what the pipeline says by itself.
    pipe = IndexTTS2TextToAudioPipeline.from_pretrained()
    alone = pipe("Nobody came that evening.", voice="reference.wav", seed=4)["audio"]
    start, end = round(seconds[-2] * info.samplerate), round(seconds[-1] * info.samplerate)
    assert abs(end - start - len(alone)) <= info.samplerate * 0.002


def test_batch_of_voices(workshop):
    recordings = sorted((workshop / "recordings").glob("*.wav"))
    rows = [
        {"audio": {"bytes": path.read_bytes(), "path": None}, "speaker": path.name.split("-")[0]}
        for path in recordings
    ]
    Dataset.from_list(rows).cast_column("audio", Audio(decode=False)).to_parquet(workshop / "data" / "train.parquet")
    said = run_program("../examples/batch_of_voices", "data", "--count", 3, folder=workshop)
    assert said.count("speaker 'speaker") == 2  # as many as there are
    pipe = IndexTTS2TextToAudioPipeline.from_pretrained()
    for name in ("000", "001"):
        voice = VoicePrompt.load(f"voices/{name}.safetensors")
        audio, rate = soundfile.read(f"voices/{name}.wav")
        alone = pipe("Nice to meet you.", voice=voice, seed=0)
        assert rate == alone["sampling_rate"] and len(audio) == len(alone["audio"])


def test_batch_of_voices_of_an_audio_folder(workshop, tiny_checkpoint):
    """With a manifest, which may be in the folder of a split, and without one."""

    def run(*arguments):
        return run_program(
            "../examples/batch_of_voices", *arguments, "--model", tiny_checkpoint, "--text", "Hi.", folder=workshop
        )

    folder = workshop / "people"
    (folder / "train/clips").mkdir(parents=True)
    for name, pitch_hz in (("anna", 210.0), ("anna-2", 215.0), ("ben", 110.0)):
        soundfile.write(folder / f"train/clips/{name}.flac", make_speech(0.8, pitch_hz=pitch_hz), SAMPLING_RATE)
    (folder / "train/clips/broken.wav").write_bytes(b"RIFF of nothing")
    (folder / "train/metadata.csv").write_text(
        "file_name,speaker\nclips/broken.wav,anna\nclips/anna.flac,anna\nclips/anna-2.flac,anna\n,ben\nclips/nobody.wav,ben\n"
        "clips/ben.flac,ben\n",
        encoding="utf-8",
    )
    said = run("people")
    for words in (
        "skipped clips/broken.wav: ",
        "skipped clips/nobody.wav: there is no such file",
        "skipped a row without a file_name: there is no such file",
        "skipped 1 more recordings of speakers that were taken",
        "000: speaker 'anna', clips/anna.flac, ",
        "001: speaker 'ben', clips/ben.flac, ",
    ):
        assert words in said, said
    assert sorted(path.name for path in Path("voices").glob("*.wav")) == ["000.wav", "001.wav"]
    # The voices are those recordings.
    pipe = IndexTTS2TextToAudioPipeline.from_pretrained(tiny_checkpoint)
    for name, recording in (("000", "anna"), ("001", "ben")):
        expected = pipe.load_voice(f"people/train/clips/{recording}.flac").speaker_embeds
        assert torch.equal(VoicePrompt.load(f"voices/{name}.safetensors").speaker_embeds, expected)

    # Without a manifest each file is a voice.
    (folder / "train/metadata.csv").unlink()
    said = run("people", "--output", "all", "--count", 2)
    assert "000: speaker 'row 0', clips/anna-2.flac" in said and "001: speaker 'row 1', clips/anna.flac" in said
    for path in folder.rglob("*.flac"):
        path.unlink()
    program = start(
        "../examples/batch_of_voices", "people", "--model", tiny_checkpoint, "--output", "none", folder=workshop
    )
    assert program.wait() == 1
    assert "people: there is no recording that can be used." in program.output and "Traceback" not in program.output


def test_five_durations(workshop):
    run_program("../examples/five_durations", "Hello there.", "--duration-s", 1.5, folder=workshop)
    rate = soundfile.info("durations/1.00.wav").samplerate
    frames = [soundfile.info(path).frames for path in sorted(Path("durations").glob("*.wav"))]
    assert frames == [round(share * 1.5 * rate) for share in (0.7, 0.85, 1.0, 1.2, 1.4)]
    assert Path("durations/durations.png").read_bytes().startswith(b"\x89PNG")
    # The middle one is the model's own length where none is given.
    run_program("../examples/five_durations", "Hello there.", "--seed", 2, "--output", "free", folder=workshop)
    pipe = IndexTTS2TextToAudioPipeline.from_pretrained()
    assert soundfile.info("free/1.00.wav").frames == len(pipe("Hello there.", seed=2)["audio"])
