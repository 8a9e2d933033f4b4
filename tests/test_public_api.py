"""What the package promises: its names, and the signatures of the front door."""

import inspect

import pytest
import transformers

import indextts2_hf
from indextts2_hf import (
    IndexTTS2Config,
    IndexTTS2ForTextToWaveform,
    IndexTTS2Processor,
    IndexTTS2SemanticToMelPipeline,
    IndexTTS2T2SConfig,
    IndexTTS2T2SModel,
    IndexTTS2TextToAudioPipeline,
)


NAMES = [
    "EMOTIONS",
    "EmotionTextModel",
    "IndexTTS2Config",
    "IndexTTS2Duration",
    "IndexTTS2FeatureExtractor",
    "IndexTTS2FlowMatchScheduler",
    "IndexTTS2ForTextToWaveform",
    "IndexTTS2GenerationConfig",
    "IndexTTS2Output",
    "IndexTTS2Processor",
    "IndexTTS2Segment",
    "IndexTTS2SemanticCodec",
    "IndexTTS2SemanticToMelPipeline",
    "IndexTTS2SemanticToMelTransformer",
    "IndexTTS2SpeakerEncoder",
    "IndexTTS2T2SConfig",
    "IndexTTS2T2SForConditionalGeneration",
    "IndexTTS2T2SModel",
    "IndexTTS2T2SOutput",
    "IndexTTS2TextToAudioPipeline",
    "IndexTTS2Tokenizer",
    "IndexTTS2Vocoder",
    "VoicePrompt",
    "balance_emotion_weights",
    "embedded_checkpoint",
    "set_num_threads",
]


def parameters_of(function) -> dict[str, object]:
    """Names and defaults, `self` left out; `...` where there is no default."""
    empty = inspect.Parameter.empty
    parameters = inspect.signature(function).parameters.values()
    return {item.name: ... if item.default is empty else item.default for item in parameters if item.name != "self"}


def test_names():
    assert sorted(indextts2_hf.__all__) == NAMES
    assert len(set(indextts2_hf.__all__)) == len(indextts2_hf.__all__)
    for name in NAMES:
        assert getattr(indextts2_hf, name) is not None and name in dir(indextts2_hf)
    with pytest.raises(AttributeError, match="module 'indextts2_hf' has no attribute 'Voice'"):
        indextts2_hf.Voice  # noqa: B018


@pytest.mark.parametrize("name", [name for name in NAMES if name != "EMOTIONS"])
def test_everything_public_is_documented(name):
    item = getattr(indextts2_hf, name)
    assert item.__doc__ and len(item.__doc__.strip()) > 20
    assert item.__doc__.strip() != (item.__mro__[1].__doc__ or "").strip() if inspect.isclass(item) else True


def test_the_front_door():
    assert parameters_of(IndexTTS2TextToAudioPipeline.__call__) == {
        "text": ...,
        "voice": None,
        "emotion_audio": None,
        "emotion_weights": None,
        "emotion_text": None,
        "emotion_strength": 1.0,
        "duration_s": None,
        "num_semantic_tokens": None,
        "seed": None,
        "kwargs": ...,
    }
    assert list(parameters_of(IndexTTS2TextToAudioPipeline.stream)) == ["text", "kwargs"]
    assert parameters_of(IndexTTS2TextToAudioPipeline.from_pretrained) == {
        "pretrained_model_name_or_path": None,
        "device": "cpu",
        "kwargs": ...,
    }
    assert issubclass(IndexTTS2TextToAudioPipeline, transformers.TextToAudioPipeline)


def test_the_model():
    assert parameters_of(IndexTTS2ForTextToWaveform.stream) == {
        "input_ids": ...,
        "attention_mask": None,
        "voice": None,
        "emotion_features": None,
        "emotion_weights": None,
        "emotion_strength": 1.0,
        "num_semantic_tokens": None,
        "duration_s": None,
        "seed": None,
        "num_inference_steps": None,
        "guidance_scale": 1.7,
        "segment_silence_s": 0.2,
        "segment_batch_size": 1,
        "noise_scheduler": None,
        "generation_config": None,
        "progress_callback": None,
        "kwargs": ...,
    }
    assert list(parameters_of(IndexTTS2ForTextToWaveform.generate)) == ["input_ids", "kwargs"]
    assert IndexTTS2ForTextToWaveform.can_generate()


def test_the_second_half():
    assert parameters_of(IndexTTS2SemanticToMelPipeline.__call__) == {
        "semantic_ids": ...,
        "voice": ...,
        "t2s_hidden_states": None,
        "semantic_lengths": None,
        "mel_lengths": None,
        "num_inference_steps": None,
        "guidance_scale": 1.7,
        "generator": None,
        "latents": None,
        "output_type": "np",
        "return_dict": True,
        "callback_on_step_end": None,
        "callback_on_step_end_tensor_inputs": None,
        "fingerprint": None,
    }


def test_the_processor():
    assert parameters_of(IndexTTS2Processor.__call__) == {
        "text": ...,
        "speaker_audio": None,
        "emotion_audio": None,
        "emotion_weights": None,
        "emotion_strength": 1.0,
        "max_text_tokens": None,
        "quick_streaming_tokens": 0,
        "return_tensors": "pt",
        "kwargs": ...,
    }


def test_registration():
    assert isinstance(transformers.AutoConfig.for_model("indextts2"), IndexTTS2Config)
    assert isinstance(transformers.AutoConfig.for_model("indextts2_t2s"), IndexTTS2T2SConfig)
    mappings = transformers.AutoModelForTextToWaveform._model_mapping, transformers.AutoModel._model_mapping
    assert mappings[0][IndexTTS2Config] is IndexTTS2ForTextToWaveform
    assert mappings[1][IndexTTS2T2SConfig] is IndexTTS2T2SModel
    # Token ids are no audio.
    assert IndexTTS2T2SConfig not in mappings[0]
