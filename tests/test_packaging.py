"""What the package imports is what it declares, and its data files are where the wheel takes them from."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = [*sorted((ROOT / "src" / "indextts2_hf").glob("*.py")), ROOT / "src" / "indextts2_cli.py"]


def names_of(requirements: list[str]) -> set[str]:
    """The distributions of requirement strings, in normal form."""
    return {re.split(r"[\[<>=!~; ]", requirement)[0].lower().replace("_", "-") for requirement in requirements}


def imported_packages(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, the standard library's and ours left out."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"indextts2_hf", "indextts2_cli"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_import_is_declared(path):
    declared = names_of(PROJECT["project"]["dependencies"])
    # The one optional dependency of the package itself; `text_normalization` says how to install it.
    declared |= names_of(PROJECT["project"]["optional-dependencies"]["text"])
    distributions = packages_distributions()
    for package in imported_packages(path):
        providers = {name.lower().replace("_", "-") for name in distributions.get(package, [package])}
        assert providers & declared, f"{path.name} imports {package}, which pyproject.toml does not declare"


def test_every_requirement_is_used():
    # The tokenizer's base class in transformers imports it.
    indirect = {"sentencepiece"}
    distributions = packages_distributions()
    imported = {
        name.lower().replace("_", "-")
        for path in SOURCES
        for package in imported_packages(path)
        for name in distributions.get(package, [package])
    }
    assert names_of(PROJECT["project"]["dependencies"]) <= imported | indirect


def test_requirements_are_lower_bounds():
    # But for what is known not to work; the reason stands in pyproject.toml.
    caps = {"train": {"transformers<5.24"}, "dev": {"transformers<5.24"}}
    groups = PROJECT["project"]["optional-dependencies"] | {"": PROJECT["project"]["dependencies"]}
    for group, requirements in groups.items():
        assert caps.get(group, set()) <= set(requirements), f"{group!r} has not all of its caps"
        for requirement in set(requirements) - caps.get(group, set()):
            assert re.fullmatch(r"[\w.-]+(\[\w+\])?>=[\d.]+", requirement), f"{requirement!r} is no plain lower bound"


def test_the_cap_belongs_to_lora():
    for extra, requirements in PROJECT["project"]["optional-dependencies"].items():
        assert ("peft" in names_of(requirements)) == ("transformers<5.24" in requirements), extra


def test_the_description_of_the_index_holds_alone():
    """Which is a file that setuptools takes as it is: there a link leads to an address or to a heading of the page, or nowhere."""
    text = (ROOT / PROJECT["project"]["readme"]).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r"(?:src|href)=[\"']([^\"']+)", text)
    anchors = {
        "#" + re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.M)
    }
    assert targets and not [
        target for target in targets if not target.startswith("https://") and target not in anchors
    ]
    urls = PROJECT["project"]["urls"].values()
    assert {*urls} <= {*targets} and all(author["name"] for author in PROJECT["project"]["authors"])


def test_the_package_data_is_there():
    package = ROOT / "src" / "indextts2_hf"
    for pattern in PROJECT["tool"]["setuptools"]["package-data"]["indextts2_hf"]:
        assert [path for path in package.glob(pattern) if path.is_file()], f"nothing matches {pattern!r}"
