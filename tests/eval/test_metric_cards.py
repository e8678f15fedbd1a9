"""Every metric has a card, its example gives the output shown, and it names every protocol; the script that scores many rows runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vidllm.eval.metrics.camera_pose import scores as camera_pose
from vidllm.eval.metrics.depth import scores as depth
from vidllm.eval.metrics.scan2cap import captions
from vidllm.eval.metrics.scanqa import scores as scanqa
from vidllm.eval.metrics.sqa3d import scores as sqa3d
from vidllm.eval.metrics.text_scorers import java_obstacle


ROOT = Path(__file__).parents[2]
NAMES = sorted(path.parent.name for path in (ROOT / "eval" / "metrics").glob("*/scores.py"))
PROTOCOLS = {
    "camera_pose": camera_pose.PROTOCOLS, "depth": depth.PROTOCOLS, "metric_scale": ("metric",), "point_map": (),
    "scan2cap": (*captions.CAPTION_PROTOCOLS, "benchmark_toolbox", "rooms"), "scanqa": scanqa.PROTOCOLS,
    "scanrefer": ("official",), "sqa3d": sqa3d.PROTOCOLS, "vsi_bench": ("official",),
}  # fmt: skip
SECTIONS = ("## Inputs", "## Protocol", "## Scores", "## Example", "## Limits", "## Sources")
needs_java = pytest.mark.skipif(java_obstacle() is not None, reason=f"text scores: {java_obstacle()}")
WITH_JAVA = ("scan2cap", "scanqa")


@pytest.mark.parametrize("name", NAMES)
def test_a_card_has_its_sections_and_protocols(name):
    card = (ROOT / "eval" / "metrics" / name / "README.md").read_text(encoding="utf-8")
    assert card.startswith(f"# {name}\n")
    assert all(section in card for section in SECTIONS), [s for s in SECTIONS if s not in card]
    assert all(f"`{protocol}`" in card for protocol in PROTOCOLS[name])


# In a process of its own, because `evaluate` keeps to the first folder that it copied modules to.
RUN_CARDS = """
import contextlib, doctest, io, json, sys
found = {}
for path in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        failed, tried = doctest.testfile(path, module_relative=False)
    found[path] = (failed, tried, said.getvalue())
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def run_cards(tmp_path_factory):
    """What the examples of all cards gave: failures, statements, what was printed."""
    env = {**os.environ, "HF_HOME": str(tmp_path_factory.mktemp("cards"))}
    env["HF_MODULES_CACHE"] = f"{env['HF_HOME']}/modules"
    paths = [f"eval/metrics/{name}/README.md" for name in NAMES if java_obstacle() is None or name not in WITH_JAVA]
    command = [sys.executable, "-c", RUN_CARDS, *paths]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[needs_java] if name in WITH_JAVA else []) for name in NAMES]
)
def test_the_example_gives_what_it_shows(name, run_cards):
    failed, tried, said = run_cards[f"eval/metrics/{name}/README.md"]
    assert failed == 0, said
    assert tried >= 4


@needs_java
def test_many_rows_start_each_java_program_once():
    script = ROOT / "tests" / "eval" / "score_many_rows.py"
    command = [sys.executable, str(script), "--rows", "60", "--protocols", "official", "leo", "ll3da"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert [report["protocol"] for report in reports] == ["official", "leo", "ll3da"]
    started = [report["java_started"] for report in reports]
    assert started == [["stanford-corenlp-3.4.1.jar", "meteor-1.5.jar"], [], []]
    assert all(report["peak_java_mib"] > 100 > 0 < report["peak_python_mib"] for report in reports)
    # half of the answers are right by construction, some of the others by chance
    assert 0.4 < reports[0]["scores"]["exact_match"] < 0.75
