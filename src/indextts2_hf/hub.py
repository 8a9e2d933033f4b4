"""
What a checkpoint or adapter folder needs on the Hub beside its files: the card, from the templates `model_card.md` and
`adapter_card.md`.
"""

from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData


def write_model_card(
    folder: str | Path,
    *,
    name: str,
    is_converted: bool = False,
    license: str = "other",
    languages: tuple[str, ...] = ("en", "zh"),
) -> None:
    r"""
    Writes `README.md` into a checkpoint folder: what it is, how to use it, its limits and licences.

    Args:
        folder (`str` or `Path`):
            Checkpoint folder.
        name (`str`):
            Title of the card.
        is_converted (`bool`, defaults to `False`):
            Whether the weights were converted from the original release; the card then says under which terms they are.
        license (`str`, defaults to `"other"`):
            Licence of the weights as the Hub calls it. Converted weights have those of their sources, which is `"other"`.
        languages (`tuple[str, ...]`, defaults to `("en", "zh")`):
            Codes of the languages it speaks.

    Raises:
        ValueError: a licence of its own for converted weights.
    """
    if is_converted and license != "other":
        raise ValueError(
            f"`license` is {license!r}, but converted weights stay under the terms of their sources. Leave it out."
        )
    folder = Path(folder)
    data = ModelCardData(
        language=list(languages),
        license=license,
        license_name="of-the-sources" if is_converted else None,
        library_name="transformers",
        pipeline_tag="text-to-speech",
        base_model="IndexTeam/IndexTTS-2" if is_converted else None,
        tags=["indextts2", "voice-cloning", "diffusers"],
    )
    card = ModelCard.from_template(
        data,
        template_str=(resources.files(__package__) / "model_card.md").read_text(encoding="utf-8"),
        name=name,
        is_converted=is_converted,
        license=license,
        has_emotion_text=(folder / "emotion_text" / "config.json").is_file(),
        has_voices=(folder / "voices").is_dir(),
    )
    card.save(folder / "README.md")


def write_adapter_card(
    folder: str | Path,
    *,
    name: str,
    base: str,
    data: dict[str, str],
    settings: dict[str, Any],
    before: dict[str, float],
    after: dict[str, float],
    license: str = "other",
) -> None:
    r"""
    Writes `README.md` into the folder of an adapter: its base, what it learnt from and how, and whether it is better than its base.

    Args:
        folder (`str` or `Path`):
            Adapter folder.
        name (`str`):
            Title of the card.
        base (`str`):
            Folder or repository of the checkpoint that it belongs to.
        data (`dict[str, str]`):
            What it learnt from, as lines of a table.
        settings (`dict[str, Any]`):
            How it was trained, likewise.
        before, after (`dict[str, float]`):
            Figures of the base and of the adapter on held-out clips, by names that say their unit;
            `semantic_cross_entropy_per_token` decides which is better. The names of those on ordinary speech begin with `replay_`.
        license (`str`, defaults to `"other"`):
            Licence of the adapter as the Hub calls it.
    """
    figure = "semantic_cross_entropy_per_token"
    verdict = _compare("the held-out clips of the style", before[figure], after[figure])
    has_replay = f"replay_{figure}" in after
    if has_replay:
        verdict += " " + _compare("ordinary speech", before[f"replay_{figure}"], after[f"replay_{figure}"])
    # The Hub takes names of repositories alone.
    is_folder = Path(base).exists() or Path(base).is_absolute()
    card = ModelCard.from_template(
        ModelCardData(
            license=license,
            library_name="peft",
            pipeline_tag="text-to-speech",
            base_model=None if is_folder else base,
            base_model_relation=None if is_folder else "adapter",
            tags=["indextts2", "lora", "transformers"],
        ),
        template_str=(resources.files(__package__) / "adapter_card.md").read_text(encoding="utf-8"),
        name=name,
        base=base,
        data=data,
        settings=settings,
        before=before,
        after=after,
        verdict=verdict,
        has_replay=has_replay,
        has_pace="semantic_tokens_per_text_token" in after,
        license=license,
    )
    card.save(Path(folder) / "README.md")


def _compare(clips: str, before: float, after: float) -> str:
    """A sentence on two cross-entropies."""
    if after < before:
        return f"On {clips} it is better than its base: {before:.4g} to {after:.4g} nats per semantic token."
    return f"**On {clips} it is {'worse than' if after > before else 'no better than'} its base: {before:.4g} to {after:.4g} nats per semantic token.**"


__all__ = ["write_adapter_card", "write_model_card"]
