"""The converter, on the layout of the original release: at tiny sizes for real, at the release's own by name and shape."""

import json
import os
import re
import shutil
from itertools import product
from pathlib import Path

import pytest
import soundfile
import torch
import yaml
from conftest import ASSETS, SAMPLING_RATE, make_speech
from parity import write_original_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForTextToWaveform

from indextts2_hf import (
    IndexTTS2Config,
    IndexTTS2FeatureExtractor,
    IndexTTS2ForTextToWaveform,
    IndexTTS2Processor,
    IndexTTS2T2SConfig,
    IndexTTS2Vocoder,
)
from indextts2_hf.cards import write_model_card
from indextts2_hf.convert_original_checkpoint import (
    build_empty_model,
    convert_original_checkpoint,
    convert_tensors,
    fold_weight_norm,
    key_tables,
)


W2V = "w2v-bert-2.0/model.safetensors"
CODEC = "MaskGCT/semantic_codec/model.safetensors"
CAMPPLUS = "campplus/campplus_cn_common.bin"
VOCODER = "bigvgan_v2_22khz_80band_256x"
BIGVGAN = f"{VOCODER}/bigvgan_generator.pt"


@pytest.fixture(autouse=True)
def no_cache(monkeypatch, tmp_path):
    """An empty Hugging Face cache, whatever this machine's holds."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def shared_original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release") / "original"
    write_original_checkpoint(ASSETS / "parity", folder)
    return folder


@pytest.fixture(scope="session")
def converted(shared_original, tmp_path_factory):
    """Shared: a test must not write into it."""
    folder = tmp_path_factory.mktemp("release") / "converted"
    convert_original_checkpoint(shared_original, folder)
    return folder


@pytest.fixture
def original(shared_original, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(shared_original, tmp_path / "original")


def change_state(path, change, *groups):
    """Replaces the state dict in a file, or the one under `groups` in it, by what `change` makes of it."""
    if path.suffix == ".safetensors":
        state = change({key: tensor.clone() for key, tensor in load_file(path).items()})
        path.unlink()
        save_file(state, path)
        return
    content = torch.load(path, weights_only=True)
    if groups:
        outer = content
        for group in groups[:-1]:
            outer = outer[group]
        outer[groups[-1]] = change(outer[groups[-1]])
    else:
        content = change(content)
    torch.save(content, path)


def change_settings(path, change):
    load, dump = (json.loads, json.dumps) if path.suffix == ".json" else (yaml.safe_load, yaml.safe_dump)
    settings = load(path.read_text())
    change(settings)
    path.write_text(dump(settings))


def weights_of(folder, part):
    return load_file(next((folder / part).glob("*.safetensors")))


def assert_same_weights(folder, other, part):
    weights, others = weights_of(folder, part), weights_of(other, part)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[key], others[key]) for key in weights)


class TestFolder:
    def test_is_what_the_model_itself_would_save(self, converted, tmp_path):
        model = IndexTTS2ForTextToWaveform.from_pretrained(converted)
        model.save_pretrained(tmp_path)
        IndexTTS2Processor.from_pretrained(converted).save_pretrained(tmp_path)

        def files(folder):
            return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

        assert files(converted) == files(tmp_path) | {"README.md"}
        for name in files(tmp_path):
            if name.endswith(".safetensors"):
                assert_same_weights(converted, tmp_path, os.path.dirname(name))
            elif name.endswith(".json"):
                settings, others = (json.loads((folder / name).read_text()) for folder in (converted, tmp_path))
                for key in ("_name_or_path", "is_local", "local_files_only"):  # how it was loaded
                    settings.pop(key, None), others.pop(key, None)
                assert settings == others, name
            else:
                assert (converted / name).read_bytes() == (tmp_path / name).read_bytes(), name

    def test_settings(self, converted):
        model = AutoModelForTextToWaveform.from_pretrained(converted)
        t2s = model.t2s.config
        assert not t2s.use_length_row and t2s.skip_semantic_position_one and t2s.prefix_placeholder_token_id == 1
        assert model.semantic_encoder.config.num_hidden_layers == 17
        assert len(model.semantic_encoder.encoder.layers) == 17
        assert model.feature_extractor.semantic_feature_extractor.padding_value == 1
        expected = {
            "do_sample": True,
            "temperature": 0.8,
            "top_k": 30,
            "top_p": 0.8,
            "num_beams": 3,
            "repetition_penalty": 10.0,
            "length_penalty": 0.0,
            "max_new_tokens": 121,
            "bos_token_id": 128,
            "eos_token_id": 129,
            "pad_token_id": 129,
            "suppress_tokens": [128],
        }
        for folder in (converted, converted / "t2s"):
            written = json.loads((folder / "generation_config.json").read_text())
            assert expected.items() <= written.items()
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())

    def test_speaks(self, converted, speech):
        model = IndexTTS2ForTextToWaveform.from_pretrained(converted)
        voice = model.encode_voice((speech, SAMPLING_RATE))
        audio = model.generate(torch.tensor([[5, 6, 7]]), voice=voice, duration_s=0.5, num_beams=1, seed=0).audio[0]
        assert audio.shape == (SAMPLING_RATE // 2,) and audio.isfinite().all()

    def test_card(self, converted):
        card = (converted / "README.md").read_text(encoding="utf-8")
        front = yaml.safe_load(card.split("---")[1])
        assert front["library_name"] == "transformers" and front["pipeline_tag"] == "text-to-speech"
        assert front["language"] == ["en", "zh"] and front["license"] == "other"
        for words in (
            "CC BY-NC 4.0",
            "Apache-2.0",
            "MIT",
            "bilibili",
            "No figures",
            "this notice is a summary",
            "agreed",
        ):
            assert words in card
        assert f"# {converted.name}\n" in card and "{{" not in card and "{%" not in card
        code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
        compile(code, "card", "exec")

    def test_card_of_own_weights(self, tmp_path):
        write_model_card(tmp_path, name="mine", license="apache-2.0")
        card = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
        assert "apache-2.0`" in card and "MaskGCT" not in card
        with pytest.raises(ValueError, match="terms of their sources"):
            write_model_card(tmp_path, name="mine", license="mit", is_converted=True)

    def test_emotion_text(self, original, tmp_path, caplog):
        model = original / "qwen0.6bemo4-merge"
        model.mkdir()
        (model / "config.json").write_text("{}")
        (model / ".cache").mkdir()
        convert_original_checkpoint(original, tmp_path / "out")
        assert [path.name for path in (tmp_path / "out" / "emotion_text").iterdir()] == ["config.json"]
        assert "`emotion_text`" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
        with pytest.raises(FileNotFoundError, match="no language model"):
            convert_original_checkpoint(original, tmp_path / "other", emotion_text=tmp_path)

    def test_default_voice(self, original, tmp_path):
        recording = tmp_path / "anna.wav"
        soundfile.write(recording, make_speech(0.8), SAMPLING_RATE)
        convert_original_checkpoint(original, tmp_path / "out", default_voice=recording)
        model = IndexTTS2ForTextToWaveform.from_pretrained(tmp_path / "out")
        assert model.config.default_voice == "anna"
        assert model.voices["anna"].checkpoint == model.semantic_to_mel.fingerprint
        assert model.generate(torch.tensor([[5, 6]]), num_semantic_tokens=3).audio[0].isfinite().all()

    def test_into_an_empty_folder(self, original, tmp_path):
        (tmp_path / "deep" / "out").mkdir(parents=True)
        convert_original_checkpoint(original, tmp_path / "deep" / "out")
        assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


class TestVariants:
    """Other forms of the same checkpoint give the same weights."""

    def check(self, original, converted, tmp_path, part):
        convert_original_checkpoint(original, tmp_path / "out")
        assert_same_weights(tmp_path / "out", converted, part)

    def test_model_key(self, original, converted, tmp_path):
        change_state(original / "gpt.pth", lambda state: {"model": state, "epoch": torch.tensor(3)})
        self.check(original, converted, tmp_path, "t2s")

    def test_aliases_and_constant_tables(self, original, converted, tmp_path):
        extra = {
            "gpt.wte.weight": torch.zeros(3),
            "inference_model.lm_head.0.weight": torch.zeros(3),
            "gpt.h.0.attn.bias": torch.zeros(3),
            "gpt.h.0.attn.masked_bias": torch.zeros(()),
            "conditioning_encoder.embed.pos_enc.pe": torch.zeros(1, 5000, 32),
            "emo_conditioning_encoder.embed.pos_enc.pe": torch.zeros(1, 5000, 24),
        }
        change_state(original / "gpt.pth", lambda state: state | extra)
        self.check(original, converted, tmp_path, "t2s")

    @pytest.mark.parametrize("place", ["front", "inside"])
    def test_data_parallel_prefix(self, place, original, converted, tmp_path):
        change_state(original / "gpt.pth", lambda state: {f"module.{key}": value for key, value in state.items()})

        def prefix(state):
            if place == "front":
                return {f"module.{key}": value for key, value in state.items()}
            return {key.replace("estimator.", "estimator.module."): value for key, value in state.items()}

        change_state(original / "s2mel.pth", prefix, "net", "cfm")
        self.check(original, converted, tmp_path, "t2s")
        assert_same_weights(tmp_path / "out", converted, "s2m")

    def test_other_groups(self, original, converted, tmp_path):
        change_state(original / "s2mel.pth", lambda net: {**net, "style_encoder": {"x": torch.zeros(1)}}, "net")
        self.check(original, converted, tmp_path, "s2m")

    def test_folded_vocoder(self, original, converted, tmp_path):
        def fold(state):
            folded = {
                key.removesuffix("_g"): fold_weight_norm(state, key, "") for key in state if key.endswith("weight_g")
            }
            return folded | {key: value for key, value in state.items() if not key.endswith(("weight_g", "weight_v"))}

        change_state(original / BIGVGAN, fold, "generator")
        self.check(original, converted, tmp_path, "vocoder")

    def test_old_file_format(self, original, converted, tmp_path):
        state = torch.load(original / CAMPPLUS, weights_only=True)
        torch.save(state, original / CAMPPLUS, _use_new_zipfile_serialization=False)
        self.check(original, converted, tmp_path, "speaker_encoder")

    def test_half_precision_becomes_single(self, original, tmp_path):
        change_state(original / "gpt.pth", lambda state: {key: value.half() for key, value in state.items()})
        convert_original_checkpoint(original, tmp_path / "out")
        assert {tensor.dtype for tensor in weights_of(tmp_path / "out", "t2s").values()} == {torch.float32}

    def test_file_names_of_the_settings(self, original, converted, tmp_path):
        os.rename(original / "gpt.pth", original / "text.pth")
        os.rename(original / "bpe.model", original / "words.model")

        def change(settings):
            settings["gpt_checkpoint"] = "text.pth"
            settings["dataset"]["bpe_model"] = "words.model"

        change_settings(original / "config.yaml", change)
        self.check(original, converted, tmp_path, "t2s")


class TestModelsFromElsewhere:
    def test_folders(self, original, converted, tmp_path):
        for name in ("w2v-bert-2.0", "MaskGCT", "campplus", VOCODER):
            shutil.move(original / name, tmp_path / f"{name}-here")
        convert_original_checkpoint(
            original,
            tmp_path / "out",
            w2v_bert=tmp_path / "w2v-bert-2.0-here",
            semantic_codec=str(tmp_path / "MaskGCT-here" / "semantic_codec"),  # or the folder above it
            speaker_encoder=tmp_path / "campplus-here",
            vocoder=tmp_path / f"{VOCODER}-here",
        )
        for part in ("semantic_encoder", "semantic_codec", "speaker_encoder", "vocoder"):
            assert_same_weights(tmp_path / "out", converted, part)

    def test_cache(self, original, converted, tmp_path, no_cache):
        for name, repository in (("w2v-bert-2.0", "facebook--w2v-bert-2.0"), ("MaskGCT", "amphion--MaskGCT")):
            cached = no_cache / f"models--{repository}"
            (cached / "refs").mkdir(parents=True)
            (cached / "refs" / "main").write_text("abc")
            (cached / "snapshots").mkdir()
            shutil.move(original / name, cached / "snapshots" / "abc")
        convert_original_checkpoint(original, tmp_path / "out")
        assert_same_weights(tmp_path / "out", converted, "semantic_codec")
        assert_same_weights(tmp_path / "out", converted, "semantic_encoder")

    @pytest.mark.parametrize(
        "missing, repository, option",
        [
            ("w2v-bert-2.0/preprocessor_config.json", "facebook/w2v-bert-2.0", "--w2v-bert DIR"),
            (CODEC, "amphion/MaskGCT", "--semantic-codec DIR"),
            (CAMPPLUS, "funasr/campplus", "--speaker-encoder DIR"),
            (f"{VOCODER}/config.json", f"nvidia/{VOCODER}", "--vocoder DIR"),
        ],
    )
    def test_missing(self, missing, repository, option, original, tmp_path):
        (original / missing).unlink()
        with pytest.raises(
            FileNotFoundError, match=f"of {repository} is not in .* or the local .* `{option}`"
        ) as error:
            convert_original_checkpoint(original, tmp_path / "out")
        assert Path(missing).name in str(error.value)

    def test_not_in_the_named_folder(self, original, tmp_path):
        with pytest.raises(
            FileNotFoundError, match="campplus_cn_common.bin' of funasr/campplus is not in '.*empty'\\."
        ):
            convert_original_checkpoint(original, tmp_path / "out", speaker_encoder=tmp_path / "empty")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def remove(*keys):
    return lambda state: {key: value for key, value in state.items() if key not in keys}


def resize(key, *shape):
    return lambda state: {**state, key: torch.zeros(shape)}


class TestErrors:
    """One clear error, nothing written, nothing left behind."""

    def check(self, original, tmp_path, match, error=ValueError):
        before = sorted(os.listdir(tmp_path))
        with pytest.raises(error, match=match):
            convert_original_checkpoint(original, tmp_path / "out")
        assert sorted(os.listdir(tmp_path)) == before

    @pytest.mark.parametrize(
        "name", ["config.yaml", "gpt.pth", "s2mel.pth", "feat1.pt", "wav2vec2bert_stats.pt", "bpe.model"]
    )
    def test_missing_file(self, name, original, tmp_path):
        (original / name).unlink()
        self.check(original, tmp_path, f"no file '{name}' in '.*original'", FileNotFoundError)

    @pytest.mark.parametrize("name", ["gpt.pth", "s2mel.pth", "feat2.pt", W2V, CODEC, CAMPPLUS, BIGVGAN])
    @pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
    def test_damaged_file(self, name, damage, original, tmp_path):
        content = (original / name).read_bytes()
        damages = {"truncated": content[: len(content) // 2], "garbage": b"\x8f\x13\x9a" * 999, "empty": b""}
        (original / name).unlink()
        (original / name).write_bytes(damages[damage])
        self.check(original, tmp_path, f"{re.escape(name.split('/')[-1])}' is damaged or was not written to its end")

    @pytest.mark.parametrize("name", ["gpt.pth", "feat1.pt", CAMPPLUS])
    def test_pickle_with_code(self, name, original, tmp_path):
        torch.save({"x": Evil(str(tmp_path / "broken-into"))}, original / name)
        self.check(original, tmp_path, f"{name.split('/')[-1]}' holds more than weights and is not opened")

    @pytest.mark.parametrize(
        "name, groups",
        [
            ("gpt.pth", ()),
            ("s2mel.pth", ("net", "cfm")),
            ("s2mel.pth", ("net", "length_regulator")),
            ("wav2vec2bert_stats.pt", ()),
            (W2V, ()),
            (CODEC, ()),
            (CAMPPLUS, ()),
            (BIGVGAN, ("generator",)),
        ],
    )
    def test_unknown_tensor(self, name, groups, original, tmp_path):
        change_state(original / name, lambda state: {**state, "new.weight": torch.zeros(2)}, *groups)
        self.check(original, tmp_path, r"has a tensor `[\w.]*new\.weight`, which IndexTTS-2 does not have")

    @pytest.mark.parametrize(
        "name, groups, key",
        [
            ("gpt.pth", (), "gpt.h.0.attn.rotary"),
            ("gpt.pth", (), "text_embedding.scale"),
            ("s2mel.pth", ("net", "cfm"), "estimator.transformer.layers.0.attention.q_norm.weight"),
            (W2V, (), "encoder.layers.3.new"),
            (CAMPPLUS, (), "xvector.block4.tdnnd1.linear1.weight"),
            (BIGVGAN, ("generator",), "resblocks.18.convs1.0.bias"),
        ],
    )
    def test_unknown_tensor_of_a_known_module(self, name, groups, key, original, tmp_path):
        change_state(original / name, lambda state: {**state, key: torch.zeros(2)}, *groups)
        self.check(original, tmp_path, f"has a tensor `[\\w.]*{re.escape(key)}`, which IndexTTS-2 does not have")

    @pytest.mark.parametrize(
        "name, groups, key, shape, expected",
        [
            ("gpt.pth", (), "mel_embedding.weight", (131, 64), (130, 64)),
            ("gpt.pth", (), "gpt.h.1.attn.c_attn.weight", (192, 64), (64, 192)),
            ("s2mel.pth", ("net", "gpt_layer"), "0.weight", (64, 32), (32, 64)),
            ("s2mel.pth", ("net", "cfm"), "estimator.conv2.weight", (80, 64, 3), (80, 64)),
            ("s2mel.pth", ("net", "cfm"), "estimator.final_layer.linear.weight_g", (64, 2), (64, 1)),
            (CODEC, (), "quantizer.quantizers.0.codebook.weight", (64, 8), (128, 8)),
            (CAMPPLUS, (), "xvector.dense.linear.weight", (25, 256, 1), (24, 256)),
            (BIGVGAN, ("generator",), "conv_pre.bias", (1,), (128,)),
        ],
    )
    def test_wrong_shape(self, name, groups, key, shape, expected, original, tmp_path):
        change_state(original / name, resize(key, *shape), *groups)
        shapes = f"{re.escape(key)}` of the shape {re.escape(str(shape))}, but .* {re.escape(str(expected))}"
        self.check(original, tmp_path, shapes)

    @pytest.mark.parametrize(
        "name, groups, key, match",
        [
            ("gpt.pth", (), "text_head.bias", "lacks 1 of .* tensors, .* `text_head.bias` in ours"),
            (CODEC, (), "encoder.1.bias", "lacks 1 of .* tensors, .* `encoder.linear_out.bias`"),
            (BIGVGAN, ("generator",), "conv_pre.weight_v", "`conv_pre.weight_g` but no `conv_pre.weight_v`"),
            (BIGVGAN, ("generator",), "conv_pre.weight_g", "lacks 1 of .* tensors, .* `conv_in.weight`"),
        ],
    )
    def test_missing_tensor(self, name, groups, key, match, original, tmp_path):
        change_state(original / name, remove(key), *groups)
        self.check(original, tmp_path, match)

    def test_tensor_under_two_names(self, original, tmp_path):
        change_state(original / "gpt.pth", lambda state: {**state, "module.text_head.bias": state["text_head.bias"]})
        self.check(original, tmp_path, "tensor `module.text_head.bias` twice")

    @pytest.mark.parametrize(
        "name, content, match",
        [
            ("gpt.pth", torch.zeros(3), "'.*gpt.pth' holds no dictionary of tensors under `model`"),
            ("gpt.pth", {"step": 3}, "holds no dictionary of tensors"),
            ("s2mel.pth", {"net": {"cfm": {}}}, "holds no tensors under `net`, `length_regulator`"),
            ("s2mel.pth", [1], "holds no tensors under `net`, `cfm`"),
            ("feat1.pt", {"x": 1}, "'.*feat1.pt' holds no tensor"),
            (BIGVGAN, {"discriminator": {}}, "under `generator`"),
        ],
    )
    def test_other_content(self, name, content, match, original, tmp_path):
        torch.save(content, original / name)
        self.check(original, tmp_path, match)

    @pytest.mark.parametrize(
        "name, change, match",
        [
            ("config.yaml", lambda s: s["gpt"].update(condition_type="perceiver"), "`config.gpt.condition_type` is 'perceiver'"),
            ("config.yaml", lambda s: s["s2mel"]["DiT"].update(is_causal=True), "`config.s2mel.DiT.is_causal` is True"),
            ("config.yaml", lambda s: s["gpt"]["condition_module"].update(perceiver_mult=4), "perceiver_mult` is 4 but"),
            ("config.yaml", lambda s: s["s2mel"].pop("DiT"), "no entry 'DiT'"),
            ("config.yaml", lambda s: s.update(semantic_codec=None), "no section around it"),
            ("config.yaml", lambda s: s["semantic_codec"].update(hidden_size=32), "these parts do not fit"),
            (f"{VOCODER}/config.json", lambda s: s.update(resblock="2"), "`vocoder.resblock` is '2'"),
            ("w2v-bert-2.0/config.json", lambda s: s.update(num_hidden_layers=12), "has 12 layers"),
            ("w2v-bert-2.0/config.json", lambda s: s.update(layer_norm_eps="small"), "'layer_norm_eps' expected float"),
            ("config.yaml", lambda s: s["gpt"].update(heads="four"), "'num_attention_heads' expected int"),
        ],
    )  # fmt: skip
    def test_other_architecture(self, name, change, match, original, tmp_path):
        change_settings(original / name, change)
        self.check(original, tmp_path, match)

    @pytest.mark.parametrize(
        "content, match", [("a: [", "damaged"), ("- 1", "holds no settings but list"), ("", "NoneType")]
    )
    def test_no_settings(self, content, match, original, tmp_path):
        (original / "config.yaml").write_text(content)
        self.check(original, tmp_path, match)

    def test_existing_output(self, original, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").touch()
        self.check(original, tmp_path, "out' is there already", FileExistsError)
        assert os.listdir(tmp_path / "out") == ["mine.txt"]
        (tmp_path / "file").touch()
        with pytest.raises(FileExistsError, match="file' is there already"):
            convert_original_checkpoint(original, tmp_path / "file")

    @pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
    def test_stopped_while_writing(self, error, original, tmp_path, monkeypatch):
        def save(self, folder):
            Path(folder).mkdir(parents=True)
            (Path(folder) / "half.safetensors").touch()
            raise error

        monkeypatch.setattr(IndexTTS2Vocoder, "save_pretrained", save)
        self.check(original, tmp_path, None, type(error))


def expand(key):
    """`a.{0-2}.b` as `a.0.b`, `a.1.b`, `a.2.b`."""
    parts = re.split(r"\{(\d+-\d+)\}", key)
    ranges = [range(int(part.split("-")[0]), int(part.split("-")[1]) + 1) for part in parts[1::2]]
    template = "{}".join(parts[::2])
    return [template.format(*numbers) for numbers in product(*ranges)]


@pytest.fixture(scope="module")
def official_model():
    return build_empty_model(
        yaml.safe_load((ASSETS / "official_config.yaml").read_text()),
        encoder_settings={"hidden_act": "swish", "position_embeddings_type": "relative_key"},
        extractor_settings={
            "feature_extractor_type": "SeamlessM4TFeatureExtractor",
            "feature_size": 80,
            "num_mel_bins": 80,
            "padding_side": "right",
            "padding_value": 1,
            "return_attention_mask": True,
            "sampling_rate": 16000,
            "stride": 2,
        },
        vocoder_file_settings={
            "resblock": "1",
            "num_mels": 80,
            "upsample_initial_channel": 1536,
            "upsample_rates": [4, 4, 2, 2, 2, 2],
            "upsample_kernel_sizes": [8, 8, 4, 4, 4, 4],
            "resblock_kernel_sizes": [3, 7, 11],
            "resblock_dilation_sizes": [[1, 3, 5]] * 3,
            "activation": "snakebeta",
            "snake_logscale": True,
            "sampling_rate": 22050,
        },
    )


class TestOfficialSizes:
    """Every tensor of the real release has its place, by name and shape; no weights are needed for that."""

    @pytest.mark.parametrize(
        "part, files, count",
        [
            ("t2s", ("gpt", "spk_matrix", "emo_matrix"), 667),
            ("s2m", ("s2mel",), 284),
            ("semantic_encoder", ("w2v_bert",), 773),
            ("semantic_codec", ("semantic_codec", "w2v_stat"), 241),
            ("speaker_encoder", ("campplus",), 937),
            ("vocoder", ("bigvgan",), 783),
        ],
    )
    def test_every_tensor_has_its_place(self, part, files, count, official_model):
        official = json.loads((ASSETS / "official_shapes.json").read_text())
        state = {}
        for file in files:
            shapes = official[file] if isinstance(official[file], dict) else {file: official[file]}
            prefix = "w2v_stat." if file == "w2v_stat" else ""
            state |= {prefix + name: shape for key, shape in shapes.items() for name in expand(key)}
        assert len(state) == count
        state = {key: torch.empty(shape, device="meta") for key, shape in state.items()}
        expected = {key: tensor.shape for key, tensor in getattr(official_model, part).state_dict().items()}
        tensors = convert_tensors(state, key_tables(official_model)[part], expected, part)
        assert {key: tensor.shape for key, tensor in tensors.items()} == expected

    def test_settings_are_our_defaults(self, official_model):
        def as_json(config):
            return json.loads(json.dumps({key: value for key, value in dict(config).items() if key[0] != "_"}))

        t2s = official_model.t2s.config.to_dict() | {"dtype": None}
        assert as_json(t2s) == as_json(IndexTTS2T2SConfig().to_dict() | {"dtype": None})
        for part in ("s2m", "semantic_codec", "speaker_encoder", "vocoder"):
            module = getattr(official_model, part)
            with torch.device("meta"):
                assert as_json(module.config) == as_json(type(module)().config), part
        assert official_model.feature_extractor.to_dict() == IndexTTS2FeatureExtractor().to_dict()
        assert official_model.config.to_dict() == IndexTTS2Config().to_dict()

    def test_sizes(self, official_model):
        assert official_model.generation_config.max_new_tokens == 1500
        assert official_model.generation_config.suppress_tokens == [8192]
        assert sum(parameter.numel() for parameter in official_model.t2s.parameters()) == pytest.approx(
            866e6, rel=1e-3
        )
        assert sum(parameter.numel() for parameter in official_model.vocoder.parameters()) == pytest.approx(
            112.2e6, rel=1e-3
        )
