"""
The private names of transformers and diffusers that the package uses: hooks that it fills in, and state that it reads. They may
go with any release; then this says what is gone and where it is used. What has a public way is not used by its private name.
"""

import ast
import functools
import importlib
import inspect
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parent.parent / "src" / "indextts2_hf"
# Where each is at home: a class with its bases, or a module.
HOMES = {
    "transformers.GenerationConfig": "_get_default_generation_params",
    "transformers.GenerationMixin": (
        "_get_logits_processor _prepare_cache_for_generation _prepare_generation_config _reorder_cache"
    ),
    "transformers.PreTrainedModel": (
        "_auto_class _can_compile_fullgraph _can_record_outputs _can_set_attn_implementation _hotswap_enabled _init_weights "
        "_is_hf_initialized _keep_in_fp32_modules_strict _no_split_modules _skip_keys_device_placement "
        "_supports_attention_backend _supports_flash_attn _supports_flex_attn _supports_sdpa"
    ),
    "transformers.TextToAudioPipeline": "_forward _forward_params _preprocess_params _sanitize_parameters",
    "transformers.integrations.peft": "_adapter_model_path",
    "transformers.tokenization_utils_sentencepiece.SentencePieceBackend": "_tokenize",
    "diffusers.ModelMixin": (
        "_gradient_checkpointing_func _name_or_path _no_split_modules _repeated_blocks _supports_gradient_checkpointing"
    ),
    "diffusers.DiffusionPipeline": "_execution_device",
    "diffusers.SchedulerMixin": "_compatibles",
}
THEIRS = [(home, name) for home, names in HOMES.items() for name in names.split()]


def private_names(tree: ast.AST) -> Iterator[tuple[str, ast.AST, bool]]:
    """Each place of a name with one underscore in front: the name, its node, and whether it is made there."""
    for node in ast.walk(tree):
        is_made = False
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name, is_made = node.name, True
        elif isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            is_made = isinstance(node.ctx, ast.Store)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "getattr",
            "hasattr",
            "setattr",
            "delattr",
        ):
            name = str(getattr(node.args[1], "value", ""))
        elif isinstance(node, ast.keyword | ast.arg):
            name = node.arg or ""
        elif isinstance(node, ast.alias):
            name = node.name
        else:
            continue
        if re.fullmatch(r"_[a-z]\w*", name):
            yield name, node, is_made


@functools.cache
def names_at(home: str) -> set[str]:
    """The private names in the source of a class and those of its bases that come from the same library, or of a module."""
    module, _, name = home.rpartition(".")
    owner = getattr(importlib.import_module(module), name)
    # Of a class also its bases, but not those of torch and Python.
    modules = {item: inspect.getmodule(item).__name__ for item in getattr(owner, "__mro__", [owner])}
    owners = [item for item, module in modules.items() if module.split(".")[0] == home.split(".")[0]]
    sources = [textwrap.dedent(inspect.getsource(item)) for item in owners]
    return {name for source in sources for name, *_ in private_names(ast.parse(source))}


@functools.cache
def places() -> dict[str, list[tuple[str, ast.AST, bool]]]:
    """Each private name in the package, and everywhere that it stands."""
    found = defaultdict(list)
    for path in sorted(PACKAGE.glob("*.py")):
        for name, node, is_made in private_names(ast.parse(path.read_text(encoding="utf-8"))):
            found[name].append((f"{path.name}:{node.lineno}", node, is_made))
    return found


@pytest.mark.parametrize("home, name", THEIRS)
def test_a_private_name_that_is_used_is_there(home, name):
    library = importlib.import_module(home.split(".")[0])
    used = ", ".join(where for where, *_ in places()[name])
    assert used, f"Nothing in the package uses {name!r} of {home} any more: take it off the list."
    assert name in names_at(home), (
        f"{library.__name__} {library.__version__} has no {name!r} in {home} any more, used in {used}."
    )


def test_the_list_is_complete():
    found = places()
    listed = {name for _, name in THEIRS}
    bases = set()
    for path in PACKAGE.glob("*.py"):
        module = importlib.import_module(f"indextts2_hf.{path.stem}" if path.stem != "__init__" else "indextts2_hf")
        for _, item in inspect.getmembers(module, inspect.isclass):
            if item.__module__ == module.__name__:
                bases |= {base for base in item.__mro__ if base.__module__.startswith(("transformers.", "diffusers."))}
    for name, uses in found.items():
        where = ", ".join(place for place, *_ in uses)
        if any(is_made for *_, is_made in uses):
            # Our own, unless a class that ours is made of has it as well.
            owners = sorted(f"{base.__module__}.{base.__qualname__}" for base in bases if hasattr(base, name))
            assert name in listed or not owners, (
                f"{name!r} ({where}) is also a name in {owners}: list it, or rename it."
            )
        elif any(isinstance(node, ast.Attribute | ast.Call | ast.alias | ast.keyword) for _, node, _ in uses):
            assert name in listed, (
                f"{name!r} ({where}) is a private name of another library: list it, or do without it."
            )
