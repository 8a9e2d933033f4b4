"""
The entry that diffusers runs for `DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline="pipelines/semantic_to_mel")`.
The file name is fixed by diffusers.
"""

from indextts2_hf import IndexTTS2SemanticToMelPipeline


__all__ = ["IndexTTS2SemanticToMelPipeline"]
