"""
Cards of checkpoints, adapters and voices from the one template `model_card.md`, and the figures of an evaluation as they stand in them.
"""

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .configuration_indextts2 import EMBEDDED_NAME
from .emotion import EMOTIONS


# In cards: where figures belong, and what tells a card of ours, which is made anew, from one that somebody wrote.
EVALUATION_MARK = "<!-- evaluation -->"
CARD_MARK = (
    "<!-- Made from the template of indextts2-hf; `indextts2 push` makes it anew unless this line is removed. -->"
)

# Held-out clips from which on a card says which of two is better; and the figures that it says so by.
MIN_CLIPS = 8
_CROSS_ENTROPY = "semantic_cross_entropy_per_token"
_NUM_CLIPS = "num_clips"
_STANDARD_ERROR = "standard_error_of_change_per_token"

ORIGINAL = "IndexTeam/IndexTTS-2"
LANGUAGES = {"en": "English", "zh": "Chinese"}


def finish_card(
    target: Path,
    kind: str,
    repo_id: str,
    figures: "tuple[str, list[EvalResult]] | None",
    is_new_card: bool,
    told: dict[str, Any],
) -> None:
    """The card of a repository: that of its folder, filled in, or a new one; `told` is metadata that goes before all else."""
    path = target / "README.md"
    old = ModelCard.load(path, ignore_metadata_errors=True) if path.is_file() else None
    known = {} if old is None else old.data.to_dict()
    if old is None or CARD_MARK in old.text or is_new_card:
        known |= told
        languages, datasets = (_as_list(known.get(name)) for name in ("language", "datasets"))
        if kind == "checkpoint":
            write_model_card(
                target,
                name=repo_id,
                is_converted=known.get("license_name") == "of-the-sources",
                license=known.get("license", "other"),
                languages=tuple(languages or LANGUAGES),
                datasets=tuple(datasets),
                base_model=known.get("base_model"),
                base_card=known if known.get("base_model_relation") == "finetune" else None,
                figures=figures,
            )
        elif kind == "adapter":
            base_model = known.get("base_model")  # none for the checkpoint of the package
            _write_card(
                target,
                ModelCardData(
                    license=known.get("license", "other"),
                    language=languages or None,
                    datasets=datasets or None,
                    base_model=base_model,
                    base_model_relation="adapter" if base_model else None,
                    **ADAPTER_DATA,
                ),
                name=repo_id,
                kind=kind,
                base=base_model or EMBEDDED_NAME,
                figures=figures,
            )
        else:
            write_voice_card(target, name=repo_id, base_model=known.get("base_model"), languages=tuple(languages))
        return
    # Somebody's own words stay; but what they call it, and its base, is now on the Hub.
    title = re.search(r"^# (.+?)\s*$", old.text, re.MULTILINE)
    text = old.text if title is None else old.text.replace(f'"{title[1]}"', f'"{repo_id}"')
    if kind == "adapter":
        base = told.get("base_model", EMBEDDED_NAME)
        text = re.sub(r"^\| base \| `.*` \|$", f"| base | `{base}` |", text, flags=re.MULTILINE)
    if "base_model" in told:
        told.setdefault("base_model_relation", "adapter" if kind == "adapter" else None)
    if figures is not None:
        text = re.sub(
            rf"(No figures of quality were measured for this \w+\.\n)?{EVALUATION_MARK}", lambda _: figures[0], text
        )
    if told or text != old.text or (figures and figures[1]):
        old.text = text
        for name, value in told.items():
            setattr(old.data, name, value)
        if figures and figures[1]:
            old.data.model_name, old.data.eval_results = repo_id.split("/")[-1], figures[1]
        old.save(path)


ADAPTER_DATA = {
    "library_name": "peft",
    "pipeline_tag": "text-to-speech",
    "tags": ["indextts2", "lora", "transformers"],
}


def _write_card(
    folder: Path,
    card_data: ModelCardData,
    *,
    name: str,
    kind: str,
    figures: "tuple[str, list[EvalResult]] | None" = None,
    is_marked: bool = True,
    **values: Any,
) -> None:
    if figures and figures[1]:
        card_data.model_name, card_data.eval_results = name.split("/")[-1], figures[1]
    card = ModelCard.from_template(
        card_data,
        template_str=(resources.files(__package__) / "model_card.md").read_text(encoding="utf-8"),
        name=name,
        kind=kind,
        license=card_data.license,
        evaluation=figures[0] if figures else None,
        evaluation_mark=EVALUATION_MARK,
        **{"data": {}, **values},
    )
    text = re.sub(r"\n{3,}", "\n\n", card.content.rstrip())
    text += f"\n\n{CARD_MARK}\n" if is_marked else "\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def write_model_card(
    folder: str | Path,
    *,
    name: str,
    is_converted: bool = False,
    license: str = "other",
    languages: tuple[str, ...] = ("en", "zh"),
    datasets: tuple[str, ...] = (),
    base_model: str | None = None,
    base_card: dict[str, Any] | None = None,
    figures: "tuple[str, list[EvalResult]] | None" = None,
) -> None:
    r"""
    Writes `README.md` into a checkpoint folder: what it is, how to use it, its figures, limits and licences.

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
        datasets (`tuple[str, ...]`, *optional*):
            What it learnt from.
        base_model (`str`, *optional*):
            Repository of what it was made from; the original's for converted weights.
        base_card (`dict`, *optional*):
            From [`read_card`] of the checkpoint that it was trained from: converted weights stay under the terms of their
            sources.
        figures (*optional*):
            From [`read_evaluation`].

    Raises:
        ValueError: a licence of its own for converted weights.
    """
    folder = Path(folder)
    base_card = base_card or {}
    is_converted = is_converted or base_card.get("license_name") == "of-the-sources"
    if is_converted and license != "other":
        raise ValueError(
            f"`license` is {license!r}, but converted weights stay under the terms of their sources. Leave it out."
        )
    base_model = base_model or base_card.get("base_model") or (ORIGINAL if is_converted else None)
    _write_card(
        folder,
        ModelCardData(
            language=list(languages),
            license=license,
            license_name="of-the-sources" if is_converted else None,
            library_name="transformers",
            pipeline_tag="text-to-speech",
            base_model=base_model,
            base_model_relation="finetune" if base_card and base_model else None,
            datasets=list(datasets) or None,
            tags=["indextts2", *(["voice-cloning"] if is_converted else []), "diffusers"],
        ),
        name=name,
        kind="checkpoint",
        figures=figures,
        is_converted=is_converted,
        is_finetuned=bool(base_card),
        languages=" and ".join(LANGUAGES.get(code, f"`{code}`") for code in languages),
        has_emotion_text=(folder / "emotion_text" / "config.json").is_file(),
        has_voices=(folder / "voices").is_dir(),
        has_code=(folder / "modeling_indextts2.py").is_file(),
    )


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
    Writes `README.md` into the folder of an adapter: its base, what it learnt from and how, its figures beside those of its base, and
    which is better where the held-out clips can show it.

    Args:
        folder (`str` or `Path`):
            Adapter folder.
        name (`str`):
            Title of the card.
        base (`str`):
            Folder or repository of the checkpoint that it belongs to; `"tiny"` for that of the package.
        data (`dict[str, str]`):
            What it learnt from, as lines of a table.
        settings (`dict[str, Any]`):
            How it was trained, likewise.
        before, after (`dict[str, float]`):
            Figures of the base and of the adapter on held-out clips, by names that say their unit, as for [`compare_with_base`]. The
            names of those on ordinary speech begin with `replay_`.
        license (`str`, defaults to `"other"`):
            Licence of the adapter as the Hub calls it.
    """
    verdict = compare_with_base(before, after, "the held-out clips of the style")
    has_replay = f"replay_{_CROSS_ENTROPY}" in after
    if has_replay:
        verdict += " " + compare_with_base(before, after, "ordinary speech", "replay_")
    # What the verdict says.
    told = {f"{prefix}{name}" for prefix in ("", "replay_") for name in (_NUM_CLIPS, _STANDARD_ERROR)}
    after = {name: figure for name, figure in after.items() if name not in told}
    # The Hub takes names of repositories alone.
    is_folder = base == EMBEDDED_NAME or Path(base).exists() or Path(base).is_absolute()
    _write_card(
        Path(folder),
        ModelCardData(
            license=license,
            base_model=None if is_folder else base,
            base_model_relation=None if is_folder else "adapter",
            **ADAPTER_DATA,
        ),
        name=name,
        kind="adapter",
        is_marked=False,  # it cannot be made anew: its figures are here alone
        base=base,
        data=data,
        settings=settings,
        before=before,
        after=after,
        verdict=verdict,
        has_replay=has_replay,
        has_pace="semantic_tokens_per_text_token" in after,
    )


def write_voice_card(
    folder: str | Path, *, name: str, base_model: str | None = None, languages: tuple[str, ...] = ()
) -> None:
    r"""
    Writes `README.md` into a voice pack.

    Args:
        folder (`str` or `Path`): the voice pack.
        name (`str`): title of the card.
        base_model (`str`, *optional*): repository of the checkpoint it is for; by default what the voice says.
        languages (`tuple[str, ...]`, *optional*): codes of the languages it was tried in.
    """
    from .pipeline_s2m import VoicePrompt  # with diffusers, which reading a card does not need

    voice = VoicePrompt.load(folder)
    checkpoint = voice.checkpoint.split("@")[0]
    if base_model is None and "/" in checkpoint:
        base_model = checkpoint
    emotion = "that of the recording"
    if voice.emotion_weights is not None:
        weights = [f"{key} {weight:g}" for key, weight in zip(EMOTIONS, voice.emotion_weights, strict=True) if weight]
        emotion = ", ".join(weights) or "none"
    _write_card(
        Path(folder),
        ModelCardData(
            license=voice.license,
            language=list(languages) or None,
            library_name="transformers",
            pipeline_tag="text-to-speech",
            base_model=base_model,
            base_model_relation="adapter" if voice.adapter is not None and base_model else None,
            tags=["indextts2", "voice-pack"],
        ),
        name=name,
        kind="voice pack",
        base=base_model or checkpoint,
        emotion=emotion,
        consent=voice.consent,
        has_adapter=voice.adapter is not None,
    )


def read_card(folder: Path) -> dict[str, Any]:
    """The metadata of a folder's card; empty without a card."""
    path = folder / "README.md"
    return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict() if path.is_file() else {}


def read_evaluation(path: Path) -> tuple[str, list[EvalResult]]:
    """
    The figures of `results.json` or `results.md` for a card: Markdown, and results for its metadata, which a Markdown file does
    not give.

    Raises:
        ValueError: it is neither.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text.strip(), []
    try:
        report = json.loads(text)
        about, results = report["about"], report["results"]
        measured_by = about["measured by"]
        data = about.get("data") or "the list of the evaluation"
        names = sorted({name for figures in results.values() for name in figures})
        table = figures_table(results, measured_by)
        told = f"{len(about['utterances'])} utterances of {data}, seed {about['seed']}"
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"'{path}' is no results.json of `evaluation/evaluate.py` ({type(error).__name__}: {error}). Name such a file, or a Markdown "
            "table (.md)."
        ) from error
    found = [
        EvalResult(
            task_type="text-to-speech",
            dataset_type=re.sub(r"\W+", "-", data).strip("-").lower(),
            dataset_name=f"{data}, {condition}",
            dataset_config=condition,
            metric_type="wer" if name.startswith("WER") else re.sub(r"\W+", "_", name).strip("_").lower(),
            metric_name=name,
            metric_value=results[condition][name],
        )
        for condition in results
        for name in names
        if name in results[condition] and name != "utterances" and condition != "recording"
    ]
    return f"Measured with `evaluation/evaluate.py` of indextts2-hf: {told}.\n\n{table}", found


def figures_table(results: dict[str, dict[str, float]], measured_by: dict[str, str]) -> str:
    """Figures by condition and name as a Markdown table, and by which tools they were measured."""
    names = list(dict.fromkeys(name for figures in results.values() for name in figures))
    lines = [f"| | {' | '.join(results)} |", "|---" * (len(results) + 1) + "|"]
    for name in names:
        cells = [f"{figures[name]:.4g}" if name in figures else "" for figures in results.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {name}: {tool}" for name, tool in measured_by.items())])


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def compare_with_base(before: dict[str, float], after: dict[str, float], clips: str, prefix: str = "") -> str:
    r"""
    A sentence on two cross-entropies. It says which is better only where there are at least `MIN_CLIPS` clips and the change, clip by
    clip, is more than twice its standard error.

    Args:
        before, after (`dict[str, float]`):
            Figures of the base and of the adapter: `semantic_cross_entropy_per_token`, and in the second one `num_clips` and, for more than
            one clip, `standard_error_of_change_per_token`.
        clips (`str`): what they were measured on.
        prefix (`str`, defaults to `""`): of their names.
    """
    first, second = before[f"{prefix}{_CROSS_ENTROPY}"], after[f"{prefix}{_CROSS_ENTROPY}"]
    num_clips = int(after[f"{prefix}{_NUM_CLIPS}"])
    change = second - first
    told = f"{first:.4g} to {second:.4g} nats per semantic token over {num_clips} clip{'s'[: num_clips != 1]}"
    if num_clips < MIN_CLIPS:
        return f"On {clips} it goes from {told}; at least {MIN_CLIPS} are needed to show which is better."
    error = after[f"{prefix}{_STANDARD_ERROR}"]
    told += f", a change of {change:.2g} with a standard error of {error:.2g}"
    if abs(change) <= 2 * error:
        return f"On {clips} it goes from {told}, which does not show which is better."
    return (
        f"On {clips} it is better than its base: {told}."
        if change < 0
        else f"**On {clips} it is worse than its base: {told}.**"
    )


__all__ = [
    "compare_with_base",
    "figures_table",
    "finish_card",
    "read_card",
    "read_evaluation",
    "write_adapter_card",
    "write_model_card",
    "write_voice_card",
]
