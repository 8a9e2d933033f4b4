import json
from pathlib import Path

import pytest
from conftest import tiny_t2s_config
from huggingface_hub.errors import StrictDataclassError

from indextts2_hf import IndexTTS2Config, IndexTTS2T2SConfig, embedded_checkpoint
from indextts2_hf.configuration_indextts2 import resolve_checkpoint


def test_defaults_are_those_of_the_released_checkpoint():
    config = IndexTTS2T2SConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (1280, 24, 20)
    assert (config.text_vocab_size, config.semantic_vocab_size) == (12001, 8194)
    assert (config.semantic_start_token_id, config.semantic_stop_token_id) == (8192, 8193)
    assert (config.num_prefix_slots, config.num_text_positions, config.num_semantic_positions) == (34, 602, 1818)
    assert sum(config.emotion_prototype_counts) == 73
    assert config.skip_semantic_position_one and not config.use_length_row
    assert config.vocab_size == config.semantic_vocab_size
    assert IndexTTS2Config().sampling_rate == 22050


@pytest.mark.parametrize("config", [tiny_t2s_config(), IndexTTS2Config(sampling_rate=24000, default_voice="buzz")])
def test_round_trip(tmp_path, config):
    config.save_pretrained(tmp_path / "part")
    loaded = type(config).from_pretrained(tmp_path, subfolder="part")
    assert loaded.to_dict() == config.to_dict()
    # What the libraries add while saving must load again as well.
    loaded.architectures = ["X"]
    loaded.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path).architectures == ["X"]


def test_t2s_config_is_found_in_a_whole_checkpoint(tiny_checkpoint, tiny_model):
    config = IndexTTS2T2SConfig.from_pretrained(tiny_checkpoint)
    assert config.hidden_size == tiny_model.t2s.config.hidden_size
    assert config.model_type == "indextts2_t2s"


@pytest.mark.parametrize("config_class", [IndexTTS2Config, IndexTTS2T2SConfig])
def test_keys_of_the_libraries_are_accepted(config_class):
    keys = {"torch_dtype": "bfloat16", "auto_map": {}, "num_labels": 2, "_commit_hash": "0", "quantization_config": {}}
    assert config_class(**keys, transformers_version="5.23.0", temperature=1.0).num_labels == 2


@pytest.mark.parametrize("config_class", [IndexTTS2Config, IndexTTS2T2SConfig])
def test_unknown_key_without_a_hint(config_class):
    with pytest.raises(ValueError, match=f"{config_class.__name__} has no field 'xyzzy'. Correct `config.json`"):
        config_class(xyzzy=1)


def test_unknown_key_with_a_hint(tmp_path):
    config = tiny_t2s_config().to_dict()
    config["num_hidden_layer"] = config.pop("num_hidden_layers")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'num_hidden_layer'. Did you mean 'num_hidden_layers'?"):
        IndexTTS2T2SConfig.from_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="'samplingrate', 'defaultvoice'. Did you mean 'sampling_rate', 'default_voice'?"
    ):
        IndexTTS2Config(samplingrate=24000, defaultvoice="x")
    # One hint for two misspellings of one field.
    with pytest.raises(ValueError, match="Did you mean 'sampling_rate'?") as error:
        IndexTTS2Config(samplingrate=24000, sampling_rates=1)
    assert str(error.value).count("'sampling_rate'") == 1


def test_wrong_type():
    with pytest.raises(StrictDataclassError, match="hidden_size"):
        IndexTTS2T2SConfig(hidden_size="wide")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 30}, r"`hidden_size` \(30\) must be a multiple of `num_attention_heads` \(4\)"),
        ({"speaker_conformer_hidden_size": 17, "speaker_conformer_num_heads": 1}, r"`speaker_conformer_.*\(17\) must be even"),
        ({"emotion_conformer_num_heads": 3}, r"`emotion_conformer_hidden_size` \(16\) .* multiple of .*num_heads` \(3\)"),
        ({"semantic_start_token_id": 66}, r"`semantic_start_token_id` \(66\) must lie .* of 66 ids"),
        ({"semantic_stop_token_id": 70}, r"`semantic_stop_token_id` \(70\) must lie"),
        ({"prefix_placeholder_token_id": -1}, r"`prefix_placeholder_token_id` \(-1\) must lie"),
        ({"emotion_prototype_counts": [1, 2]}, r"eight positive counts, .* but it is \[1, 2\]"),
        ({"emotion_prototype_counts": [1] * 7 + [0]}, "eight positive counts"),
    ],
)  # fmt: skip
def test_impossible_sizes(changes, message):
    with pytest.raises(StrictDataclassError, match=message):
        tiny_t2s_config(**changes)


def test_the_name_of_the_embedded_checkpoint(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    embedded = str(embedded_checkpoint())
    assert resolve_checkpoint("tiny") == embedded and (embedded_checkpoint() / "config.json").is_file()
    (tmp_path / "tiny").mkdir()
    with caplog.at_level("WARNING"):
        for other in ("./tiny", "tiny/", "someone/tiny", embedded):
            assert resolve_checkpoint(other) == other
        assert resolve_checkpoint(Path("tiny")) == "./tiny"
        assert not caplog.records
        assert resolve_checkpoint("tiny") == embedded
    assert caplog.records[0].message == "'tiny' is the checkpoint of the package; the folder of that name is './tiny'."
