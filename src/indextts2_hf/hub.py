"""
What a checkpoint folder needs on the Hub beside its files: the model card, from the template `model_card.md`.
"""

from importlib import resources
from pathlib import Path

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


__all__ = ["write_model_card"]
