"""
IndexTTS2 for the Hugging Face ecosystem: zero-shot text-to-speech with exact duration and disentangled emotion.

Importing the package registers its classes with the Auto classes of transformers. The diffusers side is imported when one
of its names is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForTextToWaveform,
    AutoProcessor,
    AutoTokenizer,
)

from .configuration_indextts2 import IndexTTS2Config, IndexTTS2T2SConfig, embedded_checkpoint
from .emotion import EMOTIONS, EmotionTextModel, balance_emotion_weights
from .feature_extraction_indextts2 import IndexTTS2FeatureExtractor
from .generation_t2s import IndexTTS2GenerationConfig
from .modeling_indextts2 import IndexTTS2Duration, IndexTTS2ForTextToWaveform, IndexTTS2Output, IndexTTS2Segment
from .modeling_t2s import IndexTTS2T2SForConditionalGeneration, IndexTTS2T2SModel, IndexTTS2T2SOutput
from .pipeline_text_to_audio import IndexTTS2TextToAudioPipeline, set_num_threads
from .processing_indextts2 import IndexTTS2Processor
from .tokenization_indextts2 import IndexTTS2Tokenizer


if TYPE_CHECKING:
    from .modeling_s2m import IndexTTS2SemanticToMelTransformer
    from .modeling_semantic_codec import IndexTTS2SemanticCodec
    from .modeling_speaker_encoder import IndexTTS2SpeakerEncoder
    from .modeling_vocoder import IndexTTS2Vocoder
    from .pipeline_s2m import IndexTTS2SemanticToMelPipeline, VoicePrompt
    from .scheduling_flow_match_s2m import IndexTTS2FlowMatchScheduler


# Names of the diffusers side, by the module that has them.
_DIFFUSERS_SIDE = {
    "IndexTTS2FlowMatchScheduler": "scheduling_flow_match_s2m",
    "IndexTTS2SemanticCodec": "modeling_semantic_codec",
    "IndexTTS2SemanticToMelPipeline": "pipeline_s2m",
    "IndexTTS2SemanticToMelTransformer": "modeling_s2m",
    "IndexTTS2SpeakerEncoder": "modeling_speaker_encoder",
    "IndexTTS2Vocoder": "modeling_vocoder",
    "VoicePrompt": "pipeline_s2m",
}

__all__ = [
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


def __getattr__(name: str) -> Any:
    if name in _DIFFUSERS_SIDE:
        return getattr(import_module(f".{_DIFFUSERS_SIDE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


AutoConfig.register("indextts2", IndexTTS2Config, exist_ok=True)
AutoConfig.register("indextts2_t2s", IndexTTS2T2SConfig, exist_ok=True)
AutoModel.register(IndexTTS2T2SConfig, IndexTTS2T2SModel, exist_ok=True)
AutoModelForTextToWaveform.register(IndexTTS2Config, IndexTTS2ForTextToWaveform, exist_ok=True)
AutoFeatureExtractor.register(IndexTTS2Config, IndexTTS2FeatureExtractor, exist_ok=True)
AutoTokenizer.register(IndexTTS2Config, slow_tokenizer_class=IndexTTS2Tokenizer, exist_ok=True)
AutoProcessor.register(IndexTTS2Config, IndexTTS2Processor, exist_ok=True)
