"""The checks of transformers itself; `conformance.py` runs all of them, here is what needs no download."""

import os
import subprocess
import sys
from pathlib import Path

import conformance
import pytest
import transformers


PROGRAM = [sys.executable, conformance.__file__]


def run(*arguments):
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True)


def test_linter():
    summary = conformance.lint()
    assert not summary.failed, "\n".join(title for title, _ in summary.failed)
    assert not summary.stale, f"Excluded, but nothing is against it: {summary.stale}"
    assert summary.excluded


def test_it_downloads_nothing_unless_asked():
    done = run()
    assert done.returncode == 2
    assert "Give `--sdist FILE_OR_FOLDER`, or `--download`" in done.stdout


def test_source_distribution_of_another_version(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: transformers\nVersion: 4.0.0\n")
    with pytest.raises(ValueError, match=f"transformers 4.0.0, but {transformers.__version__} is installed"):
        conformance.unpack_tests(tmp_path, tmp_path / "unpacked")


def test_outcomes_are_sorted():
    class Sample(conformance.unittest.TestCase):
        def test_good(self):
            pass

        def test_bad(self):
            with self.subTest("one"):
                self.fail("wrong")
            with self.subTest("two"):
                self.fail("wrong")

        def test_left_out(self):
            self.skipTest("not here")

    result = conformance._Result()
    conformance.unittest.defaultTestLoader.loadTestsFromTestCase(Sample).run(result)
    summary = result.summary
    assert summary.passed == ["Sample.test_good"] and summary.skipped == [("Sample.test_left_out", "not here")]
    assert [name for name, _ in summary.failed] == ["Sample.test_bad"]


@pytest.mark.skipif(
    "INDEXTTS2_TRANSFORMERS_SDIST" not in os.environ,
    reason="INDEXTTS2_TRANSFORMERS_SDIST does not name a source distribution of transformers",
)
def test_common_tests_of_transformers():
    done = run("--sdist", str(Path(os.environ["INDEXTTS2_TRANSFORMERS_SDIST"]).resolve()))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
