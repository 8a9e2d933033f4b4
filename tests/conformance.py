"""
Runs the checks of transformers itself over this package: the common model and config tests, and the model linter.

The common tests are in the source distribution of transformers on PyPI, of which nothing is kept here:

    python tests/conformance.py --download                          fetches the one of the installed version
    python tests/conformance.py --sdist transformers-5.23.0.tar.gz  uses one that is there, packed or unpacked

Exit code 0: everything passed but what the tables below exclude. 1: something failed, or an exclusion is no longer needed.
2: there is nothing to run.
"""

import argparse
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unittest
import warnings
from dataclasses import dataclass, field, fields
from fnmatch import fnmatch
from pathlib import Path

import torch
import transformers


ROOT = Path(__file__).parent.parent

# What the common tests import but the source distribution lacks. The first two are test mixins for exported models and
# for `generate`; without them those tests do not exist.
STUBS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": (
        "config_common_kwargs = {'return_dict': False, 'output_hidden_states': True, 'dtype': 'float16',\n"
        "    'chunk_size_feed_forward': 5, 'architectures': ['BertModel'], 'id2label': {0: 'label'},\n"
        "    'label2id': {'label': '0'}, 'problem_type': 'regression'}\n"
    ),
}

# Common tests whose premise does not hold: test class, test name (with wildcards), why. Each is run all the same; one that
# passes is reported, so that the table cannot grow old.
EXCLUDED_TESTS = [
    (
        "T2STest",
        "test_eager_matches_sdpa_inference_*",
        "It feeds the main input alone, but text needs a voice. The trunk, where the attention is, takes this test.",
    ),
    (
        "T2STest",
        "test_generation_tester_mixin_inheritance",
        "It asks for the common generation tests, which the source distribution lacks: see test_generation_t2s.py.",
    ),
    ("T2STrunkTest", "test_inputs_embeds", "It starts from `input_ids`; the trunk takes embeddings only."),
    ("T2STrunkTest", "test_model_get_set_embeddings", "The trunk has no token embeddings; the model around it has."),
    ("T2STrunkTest", "test_resize_tokens_embeddings", "The trunk has no token embeddings; the model around it has."),
]

# Linter rules that do not apply: rule, files, why.
_DIFFUSERS_MODELS = "modeling_s2m.py modeling_semantic_codec.py modeling_speaker_encoder.py modeling_vocoder.py"
EXCLUDED_RULES = [
    ("TRF028", "*", "The licence header of transformers; here the licence is in LICENSE."),
    ("TRF057", "*", "A docstring decorator inside transformers; here the docstrings are written out."),
    ("TRF034", _DIFFUSERS_MODELS, "A diffusers model checkpoints in its own `forward`."),
    ("TRF036", _DIFFUSERS_MODELS, "Diffusers models may use `nn.Sequential`."),
    ("TRF045", _DIFFUSERS_MODELS, "`return_dict` is an argument of every diffusers model."),
    ("TRF049", _DIFFUSERS_MODELS, "Diffusers models have no `_init_weights`: they are initialised in `__init__`."),
    ("TRF058", _DIFFUSERS_MODELS, "Diffusers models register their buffers."),
]


@dataclass
class Summary:
    passed: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    excluded: list[tuple[str, str]] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)


class T2STester:
    """What the common tests ask of a model: a tiny config and inputs for it."""

    batch_size = 3
    text_length = 7
    num_codes = 5
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32

    def __init__(self, parent: unittest.TestCase, only_trunk: bool):
        self.parent = parent
        self.only_trunk = only_trunk
        self.is_training = not only_trunk
        config = self.get_config()
        # Voice, slots, start, text, stop, start, codes.
        self.seq_length = config.num_prefix_slots + 1 + self.text_length + 1 + 1 + self.num_codes

    def get_config(self):
        from conftest import tiny_t2s_config

        # Start and stop come first here, so that the tests may cut ids off the end.
        return tiny_t2s_config(semantic_start_token_id=0, semantic_stop_token_id=1, prefix_placeholder_token_id=0)

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        generator = torch.Generator().manual_seed(0)
        if self.only_trunk:
            inputs_embeds = torch.randn(self.batch_size, self.seq_length, config.hidden_size, generator=generator)
            return config, {"inputs_embeds": inputs_embeds, "attention_mask": torch.ones(inputs_embeds.shape[:2])}
        text_shape = (self.batch_size, self.text_length)
        return config, {
            "input_ids": torch.randint(2, config.semantic_vocab_size, text_shape, generator=generator),
            "attention_mask": torch.ones(text_shape, dtype=torch.long),
            "speaker_features": torch.randn(self.batch_size, 11, config.feature_size, generator=generator),
            "emotion_features": torch.randn(self.batch_size, 9, config.feature_size, generator=generator),
            "semantic_ids": torch.randint(2, 40, (self.batch_size, self.num_codes), generator=generator),
        }


def make_test_cases() -> list[type[unittest.TestCase]]:
    """The common tests with our classes filled in. Their package `tests` must be importable."""
    import tests.test_modeling_common as common
    from tests.test_configuration_common import ConfigTester

    from indextts2_hf import IndexTTS2Config, IndexTTS2T2SConfig, IndexTTS2T2SForConditionalGeneration
    from indextts2_hf.modeling_t2s import IndexTTS2T2SModel

    set_config = common.set_config_for_less_flaky_test

    def set_known_fields(config):
        set_config(config)
        # It sets the epsilon under every name a config might have; ours refuses names that it does not have.
        known = {item.name for item in fields(config)}
        for name in [name for name in vars(config) if name.endswith(("_eps", "_epsilon")) and name not in known]:
            delattr(config, name)

    common.set_config_for_less_flaky_test = set_known_fields

    class T2STest(common.ModelTesterMixin, unittest.TestCase):
        all_model_classes = (IndexTTS2T2SForConditionalGeneration,)
        test_can_init_all_missing_weights_before_2023 = True

        def setUp(self):
            self.model_tester = T2STester(self, only_trunk=False)

        def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
            inputs_dict = super()._prepare_for_class(inputs_dict, model_class)
            if return_labels:
                inputs_dict["labels"] = inputs_dict.pop("semantic_ids")
            return inputs_dict

    class T2STrunkTest(common.ModelTesterMixin, unittest.TestCase):
        all_model_classes = (IndexTTS2T2SModel,)
        test_can_init_all_missing_weights_before_2023 = True

        def setUp(self):
            self.model_tester = T2STester(self, only_trunk=True)

        def _prepare_config_and_inputs_for_retain_grad_hidden_states_attentions(self):
            config, inputs_dict = self.model_tester.prepare_config_and_inputs_for_common()
            # The first hidden state is the input itself.
            return config, inputs_dict | {"inputs_embeds": inputs_dict["inputs_embeds"].requires_grad_()}

    class ConfigTest(unittest.TestCase):
        def test_t2s_config(self):
            self.model_tester = T2STester(self, only_trunk=False)
            ConfigTester(
                self, config_class=IndexTTS2T2SConfig, hidden_size=32, num_attention_heads=4
            ).run_common_tests()

        def test_composite_config(self):
            self.model_tester = None
            ConfigTester(
                self,
                config_class=IndexTTS2Config,
                has_text_modality=False,
                common_properties=["sampling_rate"],
                sampling_rate=24000,
            ).run_common_tests()

    return [T2STest, T2STrunkTest, ConfigTest]


class _Result(unittest.TestResult):
    """Sorts the outcomes into a summary. A test with sub-tests counts once and fails with any of them."""

    def __init__(self):
        super().__init__()
        self.summary = Summary()
        self.troubles: list[str] = []
        self.skip_reason: str | None = None

    def startTest(self, test):
        super().startTest(test)
        self.troubles, self.skip_reason = [], None

    def addError(self, test, err):
        self.troubles.append(self._exc_info_to_string(err, test))

    addFailure = addError

    def addSubTest(self, test, subtest, err):
        if err is not None:
            self.addError(subtest, err)

    def addSkip(self, test, reason):
        self.skip_reason = reason

    def stopTest(self, test):
        super().stopTest(test)
        group, name = type(test).__name__, test._testMethodName
        title = f"{group}.{name}"
        reason = next((why for where, what, why in EXCLUDED_TESTS if where == group and fnmatch(name, what)), None)
        if self.troubles and reason is None:
            self.summary.failed.append((title, self.troubles[0]))
        elif self.troubles:
            self.summary.excluded.append((title, reason))
        elif self.skip_reason is not None:
            self.summary.skipped.append((title, self.skip_reason))
        else:
            self.summary.passed.append(title)
            if reason is not None:
                self.summary.stale.append(title)


def lint() -> Summary:
    """The model linter of transformers over the package."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = ["mlinter", "--no-progress", "--no-cache", "--output-json", str(report), "src/indextts2_hf"]
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, env=os.environ, capture_output=True, text=True
        )
        if not report.exists():
            raise RuntimeError(f"`mlinter` (package transformers-mlinter) did not run:\n{done.stdout}{done.stderr}")
        findings = json.loads(report.read_text())["findings"]

    summary, used = Summary(), set()
    for finding in findings:
        title = f"{finding['path']}:{finding['line']} {finding['message']}"
        file_name = Path(finding["path"]).name
        match = next(
            (
                item
                for item in EXCLUDED_RULES
                if item[0] == finding["rule"] and (item[1] == "*" or file_name in item[1].split())
            ),
            None,
        )
        if match is None:
            summary.failed.append((title, finding["message"]))
        else:
            used.add(match)
            summary.excluded.append((title, match[2]))
    summary.stale = [f"{item[0]} in {item[1]}" for item in EXCLUDED_RULES if item not in used]
    return summary


def unpack_tests(sdist: Path, folder: Path) -> None:
    """The `tests` package of a source distribution, packed or unpacked, into `folder`, with the stubs it needs."""
    if sdist.is_file():
        with tarfile.open(sdist) as archive:
            members = [item for item in archive.getmembers() if re.match(r"[^/]+/(tests/|PKG-INFO$)", item.name)]
            archive.extractall(folder / "sdist", members=members, filter="data")
        sdist = next((folder / "sdist").iterdir())
    version = re.search(r"^Version: (.+)$", (sdist / "PKG-INFO").read_text(encoding="utf-8"), re.MULTILINE)[1]
    if version != transformers.__version__:
        raise ValueError(
            f"The source distribution is transformers {version}, but {transformers.__version__} is installed: "
            "their tests belong together."
        )
    shutil.copytree(sdist / "tests", folder / "tests")
    for name, text in STUBS.items():
        stub = folder / "tests" / name
        stub.parent.mkdir(exist_ok=True)
        if not stub.exists():
            stub.write_text(text)
    for package in (folder / "tests", *{(folder / "tests" / name).parent for name in STUBS}):
        (package / "__init__.py").touch()


def run_common_tests(sdist: Path) -> Summary:
    """The common tests of transformers from its source distribution, run on our classes."""
    with tempfile.TemporaryDirectory() as folder:
        unpack_tests(sdist, Path(folder))
        # The common tests find the package `tests` by its name, and some would start themselves anew for each run.
        sys.path[:0] = [folder, str(ROOT / "src"), str(Path(__file__).parent)]
        os.environ["_INSIDE_SUB_PROCESS"] = "1"
        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        logging.disable(logging.WARNING)
        loader = unittest.defaultTestLoader
        suite = unittest.TestSuite(loader.loadTestsFromTestCase(case) for case in make_test_cases())
        result = _Result()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            suite.run(result)
        logging.disable(logging.NOTSET)
    return result.summary


def download_sdist(folder: Path) -> Path:
    """The source distribution of the installed transformers, from PyPI."""
    requirement = f"transformers=={transformers.__version__}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", requirement]
    subprocess.run([*command, "--dest", str(folder)], check=True)
    return next(folder.glob("transformers-*.tar.gz"))


def show(title: str, summary: Summary, verbose: bool) -> bool:
    """Prints a summary; whether nothing is wrong."""
    counts = {name: len(getattr(summary, name)) for name in ("passed", "failed", "skipped", "excluded")}
    print(f"\n{title}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    reasons: dict[str, list[str]] = {}
    for name, reason in summary.excluded:
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        print(f"  excluded, {len(names)}: {names[0]}{' ...' if len(names) > 1 else ''}\n    {reason}")
    if verbose:
        for name, reason in summary.skipped:
            print(f"  skipped: {name}\n    {reason}")
    for name, trouble in summary.failed:
        print(f"  FAILED: {name}\n{trouble}")
    for name in summary.stale:
        print(f"  STALE: {name} is excluded but has nothing against it: take it off the list")
    return not summary.failed and not summary.stale


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--sdist", type=Path, help="source distribution of transformers, packed or unpacked")
    parser.add_argument("--download", action="store_true", help="fetch it from PyPI by pip")
    parser.add_argument("--verbose", action="store_true", help="also list the skipped tests")
    options = parser.parse_args()
    if options.sdist is None and not options.download:
        print(
            "The common tests of transformers are in its source distribution. Give `--sdist FILE_OR_FOLDER`, "
            f"or `--download` to fetch the one of transformers {transformers.__version__} from PyPI."
        )
        return 2
    with tempfile.TemporaryDirectory() as folder:
        summary = run_common_tests(options.sdist or download_sdist(Path(folder)))
    is_good = show("Common tests", summary, options.verbose)
    return 0 if show("Linter", lint(), options.verbose) and is_good else 1


if __name__ == "__main__":
    sys.exit(main())
