"""
Makes the checkpoint that is embedded in the package, as long as it is untrained: every class at a tiny size, random weights
from one seed, a vocabulary for English and Chinese, a buzzing voice. It speaks noise, of the right length and in seconds.

    python training/recipes/tiny/make_untrained.py src/indextts2_hf/embedded

The trained model will take its place in the same folder; nothing else has to change then, because the program that speaks
knows from the card that this one is untrained. Nothing is downloaded, and the same call always makes the same folder.
"""

import argparse
import io
import shutil
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel

from indextts2_hf import (
    IndexTTS2Config,
    IndexTTS2FeatureExtractor,
    IndexTTS2FlowMatchScheduler,
    IndexTTS2ForTextToWaveform,
    IndexTTS2GenerationConfig,
    IndexTTS2Processor,
    IndexTTS2SemanticCodec,
    IndexTTS2SemanticToMelTransformer,
    IndexTTS2SpeakerEncoder,
    IndexTTS2T2SConfig,
    IndexTTS2T2SForConditionalGeneration,
    IndexTTS2TextToAudioPipeline,
    IndexTTS2Tokenizer,
    IndexTTS2Vocoder,
)


SEED = 20250903
REPOSITORY = Path(__file__).resolve().parents[3]

# 3.5 s: how long a segment lasts at most, because a model that learnt nothing does not know when to stop.
MAX_NEW_TOKENS = 175
# Where a random vocoder is loud enough to be heard and far from clipping (peak about 0.4).
VOCODER_GAIN = 0.04
VOICE = "buzz"

NUM_ENGLISH_PIECES = 900
PUNCTUATION = ".,!?'-…"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# The first half hundred words of English text, in the order of their frequency.
COMMON_WORDS = """
    the be to of and a in that have I it for not on with he as you do at this but his by from they we say her she or an
    will my one all would there their what so up out if about who get which go me when make can like time no just him
    know take people into year your good some could them see other than then now look only come its over think also back
    after use two how our work first well way even new want because any these give day most us is are was were been has
    had did said hello world please thank voice speak speech sound hear listen read write text word letter name story
    """.split()
DAYS = "monday tuesday wednesday thursday friday saturday sunday today tomorrow yesterday morning evening".split()
MONTHS = "january february march april may june july august september october november december".split()
UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
UNITS += "seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()

CARD = """\
---
license: apache-2.0
language:
- en
- zh
library_name: transformers
pipeline_tag: text-to-speech
tags:
- indextts2
- untrained
---

# IndexTTS2, tiny and untrained

The checkpoint that comes with the package `indextts2-hf`. **It is untrained: whatever the text, it makes noise.** Its weights
are random numbers. It is here so that every command and every example runs at once and without a download, and it will be
replaced by a trained one.

| | |
|---|---|
| Parts | all of IndexTTS2, each at a tiny size |
| Vocabulary | English letters and common pieces of words; the 3755 Chinese characters of the first level of GB 2312 |
| Voice | `buzz`, a synthetic buzz |
| Data | none |
| Made by | `training/recipes/tiny/make_untrained.py` |
"""


def spell(number: int) -> str:
    """A number below one thousand in English words."""
    if number < 20:
        return UNITS[number]
    if number < 100:
        return TENS[number // 10 - 2] + (f"-{UNITS[number % 10]}" if number % 10 else "")
    return f"{UNITS[number // 100]} hundred" + (f" and {spell(number % 100)}" if number % 100 else "")


def english_sentences() -> list[str]:
    """Text to learn the pieces of words from: common words, dates, numbers, and the licence as running prose."""
    ranked = [word for rank, word in enumerate(COMMON_WORDS) for _ in range(400 // (rank + 5))]
    dates = [f"{day} the {spell(n)} of {month}" for n, (day, month) in enumerate((d, m) for d in DAYS for m in MONTHS)]
    return ranked + dates + [spell(n) for n in range(1000)] + (REPOSITORY / "LICENSE").read_text().splitlines()


def chinese_characters() -> list[str]:
    """The 3755 characters of the first level of GB 2312: rows 16 to 55, of which the last is short."""
    cells = [(row, cell) for row in range(16, 56) for cell in range(1, 95) if (row, cell) < (55, 90)]
    return [bytes([0xA0 + row, 0xA0 + cell]).decode("gb2312") for row, cell in cells]


def train_vocabulary(path: Path) -> None:
    """Writes a SentencePiece model with `<s>`, `</s>` and `<unk>` as 0, 1 and 2."""
    # The tokenizer sets Chinese characters apart with spaces, so they, and the punctuation behind them, begin a word.
    word_starts = [f"▁{character}" for character in [*chinese_characters(), *PUNCTUATION]]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentence.upper() for sentence in english_sentences()),
        model_writer=model,
        model_type="bpe",
        vocab_size=3 + len(word_starts) + NUM_ENGLISH_PIECES,
        user_defined_symbols=word_starts,
        # Lower case is met where the text is a single letter, which is looked up as it is.
        required_chars=LETTERS + LETTERS.lower() + "0123456789" + PUNCTUATION,
        character_coverage=1.0,
        normalization_rule_name="identity",
        bos_id=0,
        eos_id=1,
        unk_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    """Redraws every matrix with unit gain, because some are made as zeros, so that every input is heard in the output."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return module.eval()


def make_buzz(seconds: float, sampling_rate: int, pitch_hz: float = 120.0) -> np.ndarray:
    """A voice-like recording without a voice: harmonics of a wavering pitch under two moving formants. In [-1, 1]."""
    time = np.arange(round(seconds * sampling_rate)) / sampling_rate
    pitch = pitch_hz * (1 + 0.1 * np.sin(2 * np.pi * 0.7 * time))
    phase = 2 * np.pi * np.cumsum(pitch) / sampling_rate
    formants = (500 + 300 * np.sin(2 * np.pi * 1.3 * time), 1500 + 500 * np.sin(2 * np.pi * 0.9 * time + 1))
    wave = np.zeros_like(time)
    for harmonic in range(1, 30):
        gain = sum(np.exp(-(((harmonic * pitch - formant) / 200) ** 2)) for formant in formants)
        wave += gain * np.sin(harmonic * phase)
    wave *= 0.55 + 0.45 * np.sin(2 * np.pi * 4 * time)  # four syllables a second
    return (0.5 * wave / np.abs(wave).max()).astype(np.float32)


def make_model(text_vocab_size: int) -> IndexTTS2ForTextToWaveform:
    """All parts, random, at sizes that fit each other."""
    torch.manual_seed(SEED)
    codebook_size, feature_size, hidden_size, speaker_embed_dim = 256, 24, 24, 16
    t2s_config = IndexTTS2T2SConfig(
        hidden_size=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        text_vocab_size=text_vocab_size,
        max_text_tokens=200,
        semantic_vocab_size=codebook_size + 2,
        max_semantic_tokens=600,
        semantic_start_token_id=codebook_size,
        semantic_stop_token_id=codebook_size + 1,
        feature_size=feature_size,
        speaker_embed_dim=speaker_embed_dim,
        speaker_num_latents=8,
        speaker_conformer_hidden_size=16,
        speaker_conformer_intermediate_size=32,
        speaker_conformer_num_layers=1,
        speaker_conformer_num_heads=2,
        emotion_conformer_hidden_size=16,
        emotion_conformer_intermediate_size=32,
        emotion_conformer_num_layers=1,
        emotion_conformer_num_heads=2,
        emotion_prototype_counts=[2] * 8,
        use_length_row=True,
        skip_semantic_position_one=False,
        prefix_placeholder_token_id=codebook_size,
    )
    t2s = randomize(IndexTTS2T2SForConditionalGeneration(t2s_config))
    for buffer in t2s.emotion_prototypes.buffers():
        buffer.normal_()
    t2s.generation_config = IndexTTS2GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_k=30,
        top_p=0.8,
        num_beams=1,
        max_new_tokens=MAX_NEW_TOKENS,
        bos_token_id=codebook_size,
        eos_token_id=codebook_size + 1,
        pad_token_id=codebook_size + 1,
    )
    semantic_encoder = Wav2Vec2BertModel(
        Wav2Vec2BertConfig(
            hidden_size=feature_size,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            feature_projection_input_dim=160,
            conv_depthwise_kernel_size=7,
        )
    )
    s2m = IndexTTS2SemanticToMelTransformer(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        content_size=16,
        semantic_size=feature_size,
        speaker_embed_dim=speaker_embed_dim,
        wavenet_hidden_size=16,
        wavenet_num_layers=2,
        t2s_hidden_size=hidden_size,
        t2s_projection_sizes=(16,),
    )
    semantic_codec = IndexTTS2SemanticCodec(
        feature_size=feature_size, codebook_size=codebook_size, hidden_size=16, intermediate_size=32, num_layers=1
    )
    speaker_encoder = IndexTTS2SpeakerEncoder(
        embed_dim=speaker_embed_dim, growth_rate=4, bottleneck_factor=2, initial_channels=8, block_layers=(2, 2, 2)
    )
    vocoder = IndexTTS2Vocoder(
        initial_channels=64,
        upsample_rates=(8, 8, 4),
        upsample_kernel_sizes=(16, 16, 8),
        resblock_kernel_sizes=(3,),
        resblock_dilations=((1, 3),),
    )
    for part in (s2m, semantic_encoder, semantic_codec, speaker_encoder, vocoder):
        randomize(part)
    vocoder.conv_out.weight.data.mul_(VOCODER_GAIN)
    return IndexTTS2ForTextToWaveform(
        IndexTTS2Config(default_voice=VOICE),
        t2s=t2s,
        s2m=s2m,
        scheduler=IndexTTS2FlowMatchScheduler(),
        semantic_encoder=semantic_encoder,
        semantic_codec=semantic_codec,
        speaker_encoder=speaker_encoder,
        vocoder=vocoder,
        feature_extractor=IndexTTS2FeatureExtractor(),
    ).eval()


def make_checkpoint(folder: Path) -> None:
    """Writes the whole checkpoint folder, in the place of whatever was there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    train_vocabulary(folder / "bpe.model")
    tokenizer = IndexTTS2Tokenizer(str(folder / "bpe.model"))
    model = make_model(text_vocab_size=tokenizer.vocab_size)
    processor = IndexTTS2Processor(model.feature_extractor, tokenizer)
    IndexTTS2TextToAudioPipeline(model=model, processor=processor, tokenizer=tokenizer, device="cpu").save_pretrained(
        folder
    )
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    # Read back, so that the voice names the checkpoint by its folder.
    model = IndexTTS2ForTextToWaveform.from_pretrained(folder)
    voice = model.encode_voice((make_buzz(2.0, model.config.sampling_rate), model.config.sampling_rate))
    (folder / "voices").mkdir()
    voice.save(folder / "voices" / f"{VOICE}.safetensors")
    # The libraries write weights that only their owner may read; these are for everybody who installs the package.
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Make the untrained embedded checkpoint.", epilog="The same call always makes the same folder."
    )
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=REPOSITORY / "src" / "indextts2_hf" / "embedded",
        help="where it is written, in the place of what is there (default: %(default)s)",
    )
    torch.set_num_threads(1)
    make_checkpoint(parser.parse_args().folder)


if __name__ == "__main__":
    main()
