"""
A repository of the Hub from a checkpoint, an adapter or a voice: which files belong to it, the code for those who do not have this package,
and the upload.
"""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from transformers.dynamic_module_utils import get_relative_import_files

from .cards import finish_card, read_evaluation
from .configuration_indextts2 import EMBEDDED_NAME, IndexTTS2Config
from .feature_extraction_indextts2 import IndexTTS2FeatureExtractor
from .modeling_indextts2 import IndexTTS2ForTextToWaveform, check_settings_files, read_weight_shapes
from .pipeline_s2m import ADAPTER_FILES, VOICE_FILE, VoicePrompt
from .pipeline_text_to_audio import IndexTTS2TextToAudioPipeline, is_repository_id
from .processing_indextts2 import IndexTTS2Processor
from .tokenization_indextts2 import IndexTTS2Tokenizer


# What belongs to a checkpoint. All else in its folder, such as the state of the training that made it, stays where it is.
SETTINGS = ("config.json", "generation_config.json", "model_index.json", "processor_config.json", "tokenizer*.json")
SETTINGS += ("*.model", "special_tokens_map.json", "added_tokens.json", "chat_template*")
WEIGHTS = ("t2s", "s2m", "semantic_encoder", "semantic_codec", "speaker_encoder", "vocoder")
FOLDERS = (*WEIGHTS, "scheduler", "feature_extractor", "tokenizer", "emotion_text", "voices", "references")
NOTICES = ("README.md", "LICENSE*", "LICENCE*", "NOTICE*")
UNSAFE = (".bin", ".ckpt", ".h5", ".msgpack", ".pickle", ".pkl", ".pt", ".pth", ".py")

# What saving writes of the machine it was done on.
PRIVATE_SETTINGS = ("_name_or_path", "is_local", "local_files_only")

# What is loaded from a repository by the code that lies there.
CODE = {
    "AutoConfig": IndexTTS2Config,
    "AutoModelForTextToWaveform": IndexTTS2ForTextToWaveform,
    "AutoProcessor": IndexTTS2Processor,
    "AutoTokenizer": IndexTTS2Tokenizer,
    "AutoFeatureExtractor": IndexTTS2FeatureExtractor,
    "custom pipeline": IndexTTS2TextToAudioPipeline,
}


@dataclass(frozen=True)
class HubRepository:
    r"""
    What was written, and perhaps uploaded.

    Args:
        kind (`str`): `"checkpoint"`, `"adapter"` or `"voice pack"`.
        files (`dict[str, int]`): bytes of each file, by its path in the repository.
        folder (`Path`, *optional*): where they are; `None` if they were uploaded from a temporary folder.
        url (`str`, *optional*): of the commit; `None` if nothing was uploaded.
    """

    kind: str
    files: dict[str, int]
    folder: Path | None = None
    url: str | None = None


def push_to_hub(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    is_dry_run: bool | None = None,
    output: str | os.PathLike | None = None,
    **card: Any,
) -> HubRepository:
    r"""
    Publishes a checkpoint, an adapter or a voice.

    Args:
        folder (`str` or `Path`): as for [`assemble_hub_folder`].
        repo_id (`str`): repository to make or to write to, `owner/name`.
        private (`bool`, defaults to `False`): whether a new repository is private.
        token (`str`, *optional*): of the Hub; by default that of `hf auth login`.
        is_dry_run (`bool`, *optional*): whether only the folder is written; by default if there is no token.
        output (`str` or `Path`, *optional*):
            The folder to write; by default `NAME-hub` here in a dry run, and a temporary one otherwise.
        card: what the card says, as for [`assemble_hub_folder`].

    Returns:
        [`HubRepository`]

    Raises:
        ValueError: the folder cannot be published; the message says why, and what to do.
        FileExistsError: `output` exists and is not empty.
    """
    token = token or get_token()
    if is_dry_run is None:
        is_dry_run = token is None
    if output is None and is_dry_run:
        output = f"{repo_id.split('/')[-1]}-hub"
    with tempfile.TemporaryDirectory() as temporary:
        written = Path(temporary) / "repository" if output is None else Path(output)
        kind = assemble_hub_folder(folder, written, repo_id, **card)
        paths = sorted(path for path in written.rglob("*") if path.is_file())
        files = {path.relative_to(written).as_posix(): path.stat().st_size for path in paths}
        kept = None if output is None else written
        if is_dry_run:
            return HubRepository(kind, files, kept)
        api = HfApi(token=token)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(repo_id=repo_id, folder_path=written, commit_message=f"Upload the {kind}")
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"{repo_id!r} could not be written to the Hub ({reason}). Look at the name, the token's rights and the "
                "connection; with --dry-run nothing is uploaded."
            ) from error
    return HubRepository(kind, files, kept, commit.commit_url)


def assemble_hub_folder(
    folder: str | os.PathLike,
    output: str | os.PathLike,
    repo_id: str,
    *,
    evaluation: str | os.PathLike | None = None,
    license: str | None = None,
    base_model: str | None = None,
    languages: list[str] | None = None,
    datasets: list[str] | None = None,
    is_new_card: bool = False,
) -> str:
    r"""
    Writes what the repository of a checkpoint, an adapter or a voice holds. `folder` is not changed.

    Args:
        folder (`str` or `Path`): of a checkpoint, an adapter or a voice pack; or the file of a voice.
        output (`str` or `Path`): a new folder.
        repo_id (`str`): `owner/name`.
        evaluation (`str` or `Path`, *optional*):
            `results.json` or `results.md` of `evaluation/evaluate.py`; by default that in `folder`, if there is one.
        license, base_model, languages, datasets (*optional*):
            What the card says of them; by default what the card in `folder` says.
        is_new_card (`bool`, defaults to `False`):
            Whether a card that somebody wrote is replaced as well.

    Returns:
        `str`: what it is: `"checkpoint"`, `"adapter"` or `"voice pack"`.

    Raises:
        ValueError: the folder is none of the three, is not whole, or holds what cannot be published: files that are no safetensors, an
            adapter whose base is a folder, a voice without licence or consent.
        FileExistsError: `output` exists and is not empty.
    """
    folder, output = Path(folder), Path(output)
    kind = kind_of(folder)
    if not is_repository_id(repo_id):
        raise ValueError(f"{repo_id!r} is no id of a Hub repository, which is like 'owner/name'.")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"'{output}' exists. Name a new folder for what is to be published, or delete it.")
    if evaluation is None:
        found = [folder / name for name in ("results.json", "results.md") if (folder / name).is_file()]
        evaluation = found[0] if found else None
    figures = None if evaluation is None else read_evaluation(Path(evaluation))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        target = Path(temporary) / output.name
        target.mkdir()
        for pattern in NOTICES if folder.is_dir() else ():
            for path in folder.glob(pattern):
                shutil.copyfile(path, target / path.name)
        if kind == "checkpoint":
            copy_checkpoint(folder, target)
            add_code(target)
        else:
            if kind == "adapter":
                copy_adapter(folder, target)
            else:
                copy_voice(folder, target, license)
            if (target / ADAPTER_FILES[0]).is_file():
                base_model = name_base(target, base_model)
        told = {"license": license, "base_model": base_model, "language": languages, "datasets": datasets}
        finish_card(target, kind, repo_id, figures, is_new_card, {key: value for key, value in told.items() if value})
        for path in target.rglob("*"):
            # Weights are written for their owner alone.
            path.chmod(0o755 if path.is_dir() else 0o644)
        if output.is_dir():
            output.rmdir()
        target.rename(output)
    return kind


def kind_of(folder: Path) -> str:
    """
    `"checkpoint"`, `"adapter"` or `"voice pack"`, by the files of a folder.

    Raises:
        ValueError: it is none of these.
    """
    if (folder / VOICE_FILE).is_file() or (folder.is_file() and folder.suffix == ".safetensors"):
        return "voice pack"
    if (folder / "config.json").is_file():
        if (
            json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
            == IndexTTS2Config.model_type
        ):
            return "checkpoint"
    elif (folder / ADAPTER_FILES[0]).is_file():
        return "adapter"
    raise ValueError(
        f"'{folder}' is no checkpoint of IndexTTS2 (config.json with the model type indextts2), no adapter "
        f"({ADAPTER_FILES[0]}) and no voice ({VOICE_FILE}). Name the folder of one of these."
    )


def copy_checkpoint(folder: Path, target: Path) -> None:
    check_settings_files(str(folder))
    for name in WEIGHTS:
        read_weight_shapes(str(folder / name))
    paths = [path for pattern in SETTINGS for path in folder.glob(pattern)]
    missing = {"model_index.json", "processor_config.json", "tokenizer_config.json"} - {path.name for path in paths}
    if missing:
        raise ValueError(f"'{folder}' is no whole checkpoint: it has no {', '.join(sorted(missing))}. Save it again.")
    paths += [path for name in FOLDERS for path in (folder / name).rglob("*") if path.is_file()]
    for path in paths:
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            continue
        if path.suffix in UNSAFE:
            raise ValueError(f"'{path}' is no safetensors file. Nothing else is published as weights: take it away.")
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if path.name in ("config.json", "model_index.json", "tokenizer_config.json"):
            settings = json.loads(path.read_text(encoding="utf-8"))
            write_json(target / name, {key: value for key, value in settings.items() if key not in PRIVATE_SETTINGS})
        else:
            shutil.copyfile(path, target / name)


def add_code(target: Path) -> None:
    """The code that transformers runs with `trust_remote_code=True`, where `auto_map` says what of it, and its licence."""
    files = {Path(file) for code in CODE.values() for file in code_files(code)}
    for path in files:
        shutil.copyfile(path, target / path.name)
    for name in ("LICENSE", "NOTICE"):
        (target / f"{name}.code").write_text(read_notice(name), encoding="utf-8")

    def auto_map(*names: str) -> dict[str, Any]:
        # Of a tokenizer there may be two, a slow one and a fast one.
        places = {
            name: [place_of(CODE[name]), None] if name == "AutoTokenizer" else place_of(CODE[name]) for name in names
        }
        return {"auto_map": places}

    own_pipeline = {"impl": place_of(IndexTTS2TextToAudioPipeline), "pt": ["AutoModelForTextToWaveform"]}
    extractor = json.loads((target / "processor_config.json").read_text(encoding="utf-8"))["feature_extractor"]
    additions: dict[str, dict[str, Any]] = {
        "config.json": auto_map("AutoConfig", "AutoModelForTextToWaveform")
        | {"custom_pipelines": {"indextts2": own_pipeline}},
        "processor_config.json": auto_map("AutoProcessor")
        | {"feature_extractor": extractor | auto_map("AutoFeatureExtractor", "AutoProcessor")},
        "tokenizer_config.json": auto_map("AutoTokenizer", "AutoProcessor"),
        "feature_extractor/preprocessor_config.json": auto_map("AutoFeatureExtractor"),
    }
    for name, settings in additions.items():
        write_json(target / name, json.loads((target / name).read_text(encoding="utf-8")) | settings)


def place_of(code: type) -> str:
    """Where a class is in the repository: `module.Class`."""
    return f"{code.__module__.rpartition('.')[2]}.{code.__name__}"


def code_files(code: type) -> list[str]:
    """The file of a class and those that it imports from beside it."""
    entry = Path(__file__).with_name(f"{code.__module__.rpartition('.')[2]}.py")
    return [str(entry), *get_relative_import_files(entry)]


def read_notice(name: str) -> str:
    """`LICENSE` or `NOTICE` of this package, as installed or else from its checkout."""
    try:
        installed = metadata.distribution("indextts2-hf").read_text(f"licenses/{name}")
    except metadata.PackageNotFoundError:
        installed = None
    return installed or (Path(__file__).parents[2] / name).read_text(encoding="utf-8")


def copy_adapter(folder: Path, target: Path) -> None:
    read_weight_shapes(str(folder))
    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            raise ValueError(f"'{folder}' is no whole adapter: it has no {name}. Save it again.")
        shutil.copyfile(folder / name, target / name)


def copy_voice(folder: Path, target: Path, license: str | None) -> None:
    voice = VoicePrompt.load(folder)
    if license is not None:
        voice = replace(voice, license=license)
    missing = [name for name in ("license", "consent") if not (getattr(voice, name) or "").strip()]
    if missing:
        raise ValueError(
            f"The voice '{folder}' says nothing of {' and '.join(missing)}, without which it is not published. Make it again: "
            f'`indextts2 voice {folder / VOICE_FILE if folder.is_dir() else folder} -o NEW --license … --consent "…"`.'
        )
    pack = target / "pack"
    voice.save(pack)
    for path in pack.iterdir():
        path.rename(target / path.name)
    pack.rmdir()


def name_base(target: Path, base_model: str | None) -> str | None:
    """Makes the adapter in `target` name its base by a repository, and gives that; `None` for the checkpoint of the package."""
    path = target / ADAPTER_FILES[0]
    settings = json.loads(path.read_text(encoding="utf-8"))
    base = settings.get("base_model_name_or_path") or ""
    if base_model is None and base == EMBEDDED_NAME:
        return None
    if base_model is None and (not is_repository_id(base) or os.path.exists(base)):
        raise ValueError(
            f"The base of this adapter is the folder {base!r}, which nobody else has. Publish that first, and name its "
            "repository with `base_model` (--base-model)."
        )
    if base_model is not None and base_model != base:
        settings |= {"base_model_name_or_path": base_model, "revision": None}
    write_json(path, settings)
    return settings["base_model_name_or_path"]


def write_json(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


__all__ = ["HubRepository", "assemble_hub_folder", "push_to_hub"]
