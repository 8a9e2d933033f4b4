"""
The entry that transformers runs for `pipeline("indextts2", model=REPO, trust_remote_code=True)` when a repository has it
beside its `config.json` and names it under `custom_pipelines`.
"""

from indextts2_hf import IndexTTS2TextToAudioPipeline


__all__ = ["IndexTTS2TextToAudioPipeline"]
