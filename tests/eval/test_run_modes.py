"""What a run may be asked for beside the usual: n-gram scores, proposals to choose from and to caption."""

import json

import numpy as np
import pytest
import torch

from vidllm.eval import predict, run, scoring
from vidllm.eval.metrics.scanrefer.scores import scanrefer_iou
from vidllm.eval.predict import Predictor
from vidllm.eval.proposals import best_overlap
from vidllm.eval.results import check_results
from vidllm.eval.run import run_evaluation
from vidllm.eval.train_facts import facts_of_rooms
from vidllm.eval.work import plan
from vidllm.modeling_vidllm.geometry_vidllm import boxes_room_from_annotation
from vidllm.processing.benchmarks.proposals import SceneProposals, load_proposals
from vidllm.processing.video_reading_vidllm import VidLLMInputError


FRAMES = 3
ALL = ("scanqa", "sqa3d", "scanrefer", "scan2cap")
N_GRAMS = {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"}


@pytest.fixture(scope="module")
def facts():
    return facts_of_rooms("easy", 5, 2)


@pytest.fixture
def evaluate(loaded, rooms_root, facts, monkeypatch, tmp_path):
    monkeypatch.setattr(predict, "MAX_NEW_TOKENS", {"qa": 4, "sqa": 4, "caption": 6, "ground": 8})
    monkeypatch.setattr(run, "MAX_NEW_TOKENS", predict.MAX_NEW_TOKENS)
    monkeypatch.setattr(run, "train_facts", lambda *_: facts)

    def evaluate(benchmarks, out="out", model=loaded, **options):
        options = {"num_frames": FRAMES, "batch_size": 7, "text": False, "command": "test", **options}
        return run_evaluation(benchmarks, model, rooms_root, tmp_path / out, model_name="tiny", **options)

    return evaluate


def records(tmp_path, name, out="out"):
    lines = (tmp_path / out / "predictions" / f"{name}.jsonl").read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


# ---- n-gram scores


def test_every_protocol_has_its_numbers_beside_those_of_baselines(evaluate):
    document = evaluate(["scanqa", "scan2cap"], text=True)
    check_results(document)
    results, baselines = document["runs"]["easy"]["results"], document["runs"]["easy"]["baselines"]
    assert set(results["scanqa"]) == {"official", "leo", "llava3d", "video3dllm", "chat_scene", "ll3da"}
    assert set(results["scan2cap"]) == {"rooms", "scan2cap", "leo", "video3dllm", "ll3da", "benchmark_toolbox"}
    state = document["provenance"]["text_scores"]
    meteor = {"meteor"} if state == "computed" else set()
    tokenized = N_GRAMS | meteor if state == "computed" else set()
    assert {n for n in results["scanqa"]["official"] if not n.split("/")[-1].startswith("exact")} == tokenized
    assert N_GRAMS | meteor <= set(results["scanqa"]["leo"])
    assert set(results["scanqa"]["ll3da"]) == {"bleu_4", "cider", "rouge_l"} | meteor
    assert set(results["scan2cap"]["video3dllm"]) == N_GRAMS | meteor
    # Every object is its own proposal, so that precision and recall are one number, and F1 too unless nothing is right.
    toolbox = results["scan2cap"]["benchmark_toolbox"]
    assert "rouge_l_f1@0.5" in toolbox
    assert set(toolbox) <= {f"{name}_f1@0.5" for name in N_GRAMS | meteor}
    for kind, benchmarks in baselines.items():
        for name, protocols in benchmarks.items():
            for protocol, metrics in protocols.items():
                # F1 of nothing right is not defined, and then not there.
                assert {n for n in metrics if "_f1@" not in n} == {n for n in results[name][protocol] if "_f1@" not in n}, (kind, name, protocol)  # fmt: skip
    assert set(baselines) == {"blind", "majority", "constant"}
    # "this is a ..." is nearer to the rooms' captions than what an untrained model says.
    assert baselines["constant"]["scan2cap"]["scan2cap"]["rouge_l"] > results["scan2cap"]["scan2cap"]["rouge_l"]


@pytest.mark.parametrize("what", ["java", "pycocoevalcap"])
def test_what_cannot_be_computed_is_missing_and_said_to_be(evaluate, monkeypatch, what):
    if what == "java":
        monkeypatch.setenv("PATH", "/nowhere")
    else:
        monkeypatch.setattr(scoring.importlib.util, "find_spec", lambda name: None)
    document = evaluate(["scanqa", "scan2cap"], text=True)
    check_results(document)
    results = document["runs"]["easy"]["results"]
    named = {n for protocols in results.values() for metrics in protocols.values() for n in metrics}
    assert not any("meteor" in name for name in named)
    assert "cider" not in results["scanqa"]["official"]
    assert ("cider" in named) == (what == "java")
    assert results["scanqa"]["official"].keys() >= {"exact_match"}
    wanted = "no `java` on the path" if what == "java" else "pycocoevalcap is not installed"
    assert wanted in document["provenance"]["text_scores"]
    assert sum(wanted in note for note in document["provenance"]["notes"]) == 2


def test_java_is_started_once(evaluate, monkeypatch):
    from vidllm.eval.metrics import text_scorers

    if text_scorers.java_obstacle() is not None:
        pytest.skip(text_scorers.java_obstacle())
    text_scorers._meteor.cache_clear()
    started = []
    real = text_scorers.subprocess.Popen
    monkeypatch.setattr(
        text_scorers.subprocess, "Popen", lambda words, *a, **k: started.append(words) or real(words, *a, **k)
    )
    evaluate(["scanqa", "scan2cap"], text=True)
    assert sum("meteor-1.5.jar" in words for words in started) == 1


# ---- proposals


@pytest.fixture(scope="module")
def work(rooms_root):
    return plan(ALL, str(rooms_root), FRAMES)


def write_boxes(path, boxes):
    path.write_text(json.dumps({f"scannet/{scene}": values for scene, values in boxes.items()}))
    return path


def test_true_boxes_are_those_of_the_scan(rooms_root, work):
    scenes = [scene.scene_id for scene in work.scenes]
    found = load_proposals("true", str(rooms_root), scenes)
    assert list(found.boxes_annotation) == scenes
    assert found.settings == {"source": "true", "sha256": None}
    for sample in work.benchmarks["scanrefer"].samples:
        overlaps = scanrefer_iou(found.boxes_annotation[sample.scene_id], sample.boxes_annotation[0][None])
        assert overlaps.max() == pytest.approx(1, abs=1e-4)


def test_proposals_that_cannot_be_read(evaluate, rooms_root, work, tmp_path):
    with pytest.raises(VidLLMInputError, match="no such file; wanted proposals, or the word `true`"):
        evaluate(["scanrefer"], proposals=tmp_path / "none.json")
    first, *others = [scene.scene_id for scene in work.scenes]
    path = write_boxes(tmp_path / "boxes.json", {first: [[0, 0, 0, 1, 1, 1]]})
    with pytest.raises(VidLLMInputError, match=f"{len(others)} have none, such as {others[0]}"):
        evaluate(["scanrefer"], proposals=path)
    (tmp_path / "boxes.txt").write_text("")
    with pytest.raises(VidLLMInputError, match=r"got \.txt"):
        evaluate(["scanrefer"], proposals=tmp_path / "boxes.txt")
    with pytest.raises(VidLLMInputError, match="proposals: wanted with scanrefer or scan2cap"):
        evaluate(["scanqa"], proposals="true")


def test_masks_are_proposals(rooms_root, work, tmp_path):
    from scipy import sparse

    from vidllm.processing.scenes.annotations import find_scan_dir, load_scene_objects

    scene = work.scenes[0].scene_id
    objects = load_scene_objects(find_scan_dir(rooms_root, scene))
    masks = np.stack([objects.instance_labels == number + 1 for number in objects.object_ids])
    sparse.save_npz(tmp_path / f"{scene}.mask.npz", sparse.csr_matrix(masks))
    found = load_proposals(tmp_path, str(rooms_root), [scene])
    np.testing.assert_allclose(found.boxes_annotation[scene], objects.boxes_annotation, atol=1e-6)
    assert len(found.sha256) == 64


def test_the_model_chooses_among_proposals_as_they_stand_in_the_file(evaluate, loaded, rooms_root, work, tmp_path):
    rng = np.random.default_rng(0)
    boxes = {
        scene.scene_id: np.concatenate([rng.uniform(-2, 2, (5, 3)), rng.uniform(0.3, 1.5, (5, 3))], axis=1).tolist()
        for scene in work.scenes
    }
    # A scene where nothing was proposed.
    empty = work.scenes[-1].scene_id
    boxes[empty] = []
    path = write_boxes(tmp_path / "boxes.json", boxes)
    document = evaluate(["scanrefer"], proposals=path)
    check_results(document)
    chosen = set()
    for record in records(tmp_path, "scanrefer"):
        if record["scene"] == empty:
            assert (record["proposal"], record["box_proposal"]) == (None, None)
            continue
        assert record["box_proposal"] == boxes[record["scene"]][record["proposal"]]
        assert record["box_annotation"] != record["box_proposal"]
        chosen.add((record["scene"], record["proposal"]))
    assert len(chosen) > len(boxes) - 1, "the description decides"
    found = document["runs"]["easy"]
    assert set(found["results"]["scanrefer"]) == {"official", "oriented", "proposals"}
    assert set(found["baselines"]["constant"]["scanrefer"]) == {"official", "oriented", "proposals"}
    assert document["provenance"]["proposals"]["source"] == "boxes.json"
    # Boxes that the model finds are the same without them.
    evaluate(["scanrefer"], out="without")
    for one, other in zip(records(tmp_path, "scanrefer"), records(tmp_path, "scanrefer", "without"), strict=True):
        assert one["box_oriented"] == other["box_oriented"]
    with pytest.raises(VidLLMInputError, match="holds predictions of other settings"):
        evaluate(["scanrefer"], proposals="true")
    with pytest.raises(VidLLMInputError, match="holds predictions of other settings"):
        evaluate(["scanrefer"])


def test_proposals_reach_the_decoder_in_the_frame_of_the_room(
    evaluate, loaded, rooms_root, work, monkeypatch, tmp_path
):
    """The true boxes, carried with the true pose of the first frame and the room that the model predicts."""
    model, seen = loaded[0], []
    found, truths = Predictor._found_boxes, {}
    read = Predictor._read

    def reading(self, scene_work):
        videos, truth = read(self, scene_work)
        truths[scene_work.scene_id] = truth
        return videos, truth

    def looking(self, prompt, scene, proposals_room=None):
        if proposals_room is not None:
            seen.append((list(truths)[-1], proposals_room, scene.reconstruction.room_from_world[:1]))
        return found(self, prompt, scene, proposals_room)

    monkeypatch.setattr(Predictor, "_read", reading)
    monkeypatch.setattr(Predictor, "_found_boxes", looking)
    evaluate(["scanrefer"], proposals="true")
    assert {name for name, _, _ in seen} == {scene.scene_id for scene in work.scenes}
    true = load_proposals("true", str(rooms_root), list(truths)).boxes_annotation
    for name, given, room_from_world in seen:
        annotation = torch.from_numpy(np.array(truths[name].annotation_from_world))[None]
        wanted = boxes_room_from_annotation(torch.from_numpy(true[name])[None], annotation, room_from_world.double())
        torch.testing.assert_close(given.double().cpu(), wanted, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(wanted[0, :, :3], torch.from_numpy(true[name])[:, :3], atol=0.1)
    assert model.config.box_output == "decoder"


def test_captions_are_asked_at_proposals(evaluate, work, monkeypatch, tmp_path):
    samples = work.benchmarks["scan2cap"].samples
    boxes: dict[str, list] = {scene.scene_id: [] for scene in work.scenes}
    place: dict[str, np.ndarray] = {}
    for number, sample in enumerate(samples):
        true = sample.boxes_annotation[0].copy()
        # Of every third object the proposal overlaps by 1, 0.43 and not at all.
        true[2] += (0, 0.4 * true[5], 30 + number)[number % 3]
        boxes[sample.scene_id].append(true.tolist())
        place[sample.official_id] = true[:3]
    path = write_boxes(tmp_path / "boxes.json", boxes)
    asked, said = {}, Predictor._said

    def listening(self, batch, scene, truth):
        asked.update({sample.official_id: sample.points[0] for sample in batch})
        return said(self, batch, scene, truth)

    monkeypatch.setattr(Predictor, "_said", listening)
    document = evaluate(["scan2cap"], proposals=path, text=True)
    check_results(document)
    rows = {record["id"]: record for record in records(tmp_path, "scan2cap")}
    assert list(rows) == [sample.official_id for sample in samples]
    overlapping = 0
    for number, sample in enumerate(samples):
        record = rows[sample.official_id]
        best, iou = best_overlap(np.array(boxes[sample.scene_id]), sample.boxes_annotation[0])
        assert (record["proposal"], record["iou"]) == (best, iou)
        if best is None:
            assert sample.official_id not in asked
            assert record["caption"] == ""
            continue
        overlapping += 1
        np.testing.assert_allclose(asked[sample.official_id], boxes[sample.scene_id][best][:3])
        if number % 3 == 0:
            assert iou == pytest.approx(1, abs=1e-4)
    assert 0 < overlapping < len(samples)
    results = document["runs"]["easy"]["results"]["scan2cap"]
    assert "benchmark_toolbox" not in results
    assert {"cider", "iou_0.25/cider"} <= set(results["scan2cap"])
    assert any(
        f"which {overlapping} of {len(samples)} objects have" in note for note in document["provenance"]["notes"]
    )


def test_the_best_overlap():
    box = np.array([0, 0, 0, 1, 1, 1.0])
    assert best_overlap(np.zeros((0, 6)), box) == (None, 0.0)
    assert best_overlap(np.array([[0.9, 0, 0, 1, 1, 1]]), box) == (None, 0.0)
    number, iou = best_overlap(np.array([[0.5, 0, 0, 1, 1, 1], [0.1, 0, 0, 1, 1, 1], [0.1, 0, 0, 1, 1, 1]]), box)
    assert number == 1
    assert iou == pytest.approx(0.9 / 1.1, abs=1e-6)
    assert SceneProposals().settings == {"source": "", "sha256": None}
