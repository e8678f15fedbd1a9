"""The whole evaluation: killed and resumed, perfect and shuffled predictions, geometry given, settings that do not fit."""

import json
import shutil

import numpy as np
import pytest
import torch

from vidllm.eval import predict, run, train_facts
from vidllm.eval.intervals import bootstrap_interval
from vidllm.eval.marks import row_marks
from vidllm.eval.predict import Predictor
from vidllm.eval.predictions import PredictionFile
from vidllm.eval.results import check_results, read_results
from vidllm.eval.run import run_evaluation
from vidllm.eval.scoring import score_answers, score_boxes, score_captions
from vidllm.eval.truth import named_objects
from vidllm.eval.work import EVAL_BENCHMARKS, plan
from vidllm.modeling_vidllm.generation_vidllm import VidLLMGenerateOutput
from vidllm.modeling_vidllm.geometry_vidllm import boxes_room_from_annotation, unproject_depth
from vidllm.modeling_vidllm.scene_vidllm import VidLLMReconstruction, VidLLMScene
from vidllm.processing.scenes.base import PoseUnavailableError
from vidllm.processing.video_reading_vidllm import VidLLMInputError


FRAMES = 3
TRAIN_ROOMS = 4


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """What an untrained model says has no end."""
    monkeypatch.setattr(predict, "MAX_NEW_TOKENS", {"qa": 4, "sqa": 4, "caption": 6, "ground": 8})
    monkeypatch.setattr(run, "MAX_NEW_TOKENS", predict.MAX_NEW_TOKENS)


@pytest.fixture(scope="session")
def facts():
    """Facts of a few train rooms, made once."""
    return train_facts.facts_of_rooms("easy", 5, TRAIN_ROOMS)


@pytest.fixture
def evaluate(loaded, rooms_root, facts, monkeypatch):
    """`run_evaluation` on the rooms, with few train rooms."""
    monkeypatch.setattr(run, "train_facts", lambda *_: facts)

    def evaluate(out, benchmarks=EVAL_BENCHMARKS, model=loaded, **options):
        options = {"num_frames": FRAMES, "batch_size": 7, "text": False, **options}
        return run_evaluation(benchmarks, model, rooms_root, out, model_name="tiny", command="test", **options)

    return evaluate


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """Folder of the run that others are compared with; filled by the first test that needs it."""
    return tmp_path_factory.mktemp("eval") / "undisturbed"


def first_run(evaluate, undisturbed):
    if not (undisturbed / "results.json").is_file():
        evaluate(undisturbed)
    return read_results(undisturbed)


def without_timing(document):
    """A document less what the clock says."""
    copy = json.loads(json.dumps(document))
    copy["provenance"]["seconds_per_scene"] = None
    return copy


def test_the_document_says_everything(evaluate, undisturbed, rooms_root):
    document = first_run(evaluate, undisturbed)
    assert list(document["runs"]) == ["easy"]
    results, baselines = document["runs"]["easy"]["results"], document["runs"]["easy"]["baselines"]
    assert list(results) == list(EVAL_BENCHMARKS)
    assert {name: list(protocols) for name, protocols in results.items()} == {
        "scanqa": ["official", "leo", "llava3d", "video3dllm", "chat_scene"],
        "sqa3d": ["official", "leo", "llava3d", "video3dllm", "chat_scene"],
        "scanrefer": ["official", "oriented"],
        "scan2cap": ["rooms"],
        "reconstruction": ["vggt_i_inv_j", "metric", "median", "scale", "scale_shift"],
    }
    kinds = json.loads((rooms_root / "rooms.json").read_text())["val"]
    assert {f"{kind}/exact_match" for kind in kinds["question_kinds"]} < set(results["scanqa"]["official"])
    assert {f"{kind}/exact_match" for kind in kinds["situated_kinds"]} < set(results["sqa3d"]["official"])
    assert {"unique/acc_0.25", "multiple/acc_0.5"} < set(results["scanrefer"]["official"])
    assert set(results["reconstruction"]["vggt_i_inv_j"]) == {"auc_30", "rra_30", "rta_30", "ate_m"}
    metric = {"abs_rel", "delta_1", "scale_error", "up_error_deg", "heading_error_deg"}
    metric |= {"fscore_5cm", "accuracy_m", "completeness_m"}
    assert set(results["reconstruction"]["metric"]) == metric
    assert {kind: set(found) for kind, found in baselines.items()} == {
        "blind": {"scanqa", "sqa3d"},
        "majority": {"scanqa", "sqa3d"},
        "constant": {"scanqa", "sqa3d", "scanrefer", "scan2cap", "reconstruction"},
    }
    # A baseline stands beside every number.
    for name, protocols in results.items():
        for protocol, metrics in protocols.items():
            for kind in [kind for kind in baselines if name in baselines[kind]]:
                assert set(baselines[kind][name][protocol]) == set(metrics)
    provenance = document["provenance"]
    assert provenance["geometry"] == "predicted"
    assert provenance["pose_refinement_sizes"] == provenance["pose_refinement_depth_grid"] == []
    assert provenance["pose_refinement_focal_spread"] == 0
    assert provenance["align_room_to_walls"] is False
    assert provenance["frames"] == FRAMES
    assert provenance["splits"] == {"scanqa": "val", "sqa3d": "test", "scanrefer": "val", "scan2cap": "val"}
    assert provenance["seconds_per_scene"] > 0
    assert all(
        count["rows"] == count["scored"] for name, count in provenance["counts"].items() if name != "reconstruction"
    )
    assert {"ScanQA_v1.0_val.json", "ScanRefer_filtered_val.json"} < set(provenance["annotations_sha256"])


def test_predictions_are_keyed_by_the_authors_ids(evaluate, undisturbed, rooms_root):
    first_run(evaluate, undisturbed)
    rows = json.loads((rooms_root / "annotations" / "ScanQA_v1.0_val.json").read_text())
    lines = (undisturbed / "predictions" / "scanqa.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [row["question_id"] for row in rows]
    boxes = [json.loads(line) for line in (undisturbed / "predictions" / "scanrefer.jsonl").read_text().splitlines()]
    rows = json.loads((rooms_root / "annotations" / "ScanRefer_filtered_val.json").read_text())
    assert [box["id"] for box in boxes] == [f"{r['scene_id']}|{r['object_id']}|{r['ann_id']}" for r in rows]
    assert all(len(box["box_annotation"]) == 6 for box in boxes)


class KilledError(Exception):
    """Stands for a signal that ends the process."""


@pytest.mark.parametrize("after", [2, 9])
def test_a_killed_run_goes_on_and_ends_the_same(evaluate, undisturbed, tmp_path, monkeypatch, after):
    whole = first_run(evaluate, undisturbed)
    add, calls = PredictionFile.add, []

    def dying(self, records):
        calls.append(self.path)
        if len(calls) > after:
            # The system had half of the batch, and half a line of the next record, when the process ended.
            records = list(records)
            add(self, records[: len(records) // 2])
            with open(self.path, "ab") as file:
                file.write(json.dumps(records[-1]).encode()[:11])
            raise KilledError
        add(self, records)

    monkeypatch.setattr(PredictionFile, "add", dying)
    with pytest.raises(KilledError):
        evaluate(tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()
    monkeypatch.setattr(PredictionFile, "add", add)
    encoded = []
    encode = Predictor._read
    monkeypatch.setattr(Predictor, "_read", lambda self, work: encoded.append(work.scene_id) or encode(self, work))
    resumed = evaluate(tmp_path / "out")
    assert without_timing(resumed) == without_timing(whole)
    for name in EVAL_BENCHMARKS:
        files = [folder / "predictions" / f"{name}.jsonl" for folder in (undisturbed, tmp_path / "out")]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    assert 1 <= len(encoded) <= 3
    evaluate(tmp_path / "out")
    assert len(encoded) <= 3, "a finished run reads no scene again"


def test_each_scene_is_encoded_once(evaluate, loaded, tmp_path, monkeypatch):
    model, _ = loaded
    shapes, encode = [], model.encode_scene
    monkeypatch.setattr(
        model, "encode_scene", lambda pixels, *a, **k: shapes.append(pixels.shape) or encode(pixels, *a, **k)
    )
    evaluate(tmp_path / "out", limit_scenes=2)
    assert [shape[:2] for shape in shapes] == [(1, FRAMES)] * 2


def test_benchmarks_may_come_one_after_the_other(evaluate, undisturbed, tmp_path):
    whole = first_run(evaluate, undisturbed)
    for name in ("reconstruction", "scanqa", "sqa3d"):
        document = evaluate(tmp_path / "out", [name])
    for name in ("reconstruction", "scanqa", "sqa3d"):
        assert document["runs"]["easy"]["results"][name] == whole["runs"]["easy"]["results"][name]
    assert set(document["provenance"]["counts"]) == {"reconstruction", "scanqa", "sqa3d"}
    assert {note.partition(":")[0] for note in document["provenance"]["notes"]} == {
        "reconstruction",
        "scanqa",
        "sqa3d",
    }


def test_predictions_of_other_settings_are_not_mixed(evaluate, undisturbed, tmp_path, rooms_root):
    first_run(evaluate, undisturbed)
    shutil.copytree(undisturbed, tmp_path / "out")
    with pytest.raises(VidLLMInputError, match=r"holds predictions of other settings \(frames was 3, now 2\)"):
        evaluate(tmp_path / "out", num_frames=2)
    with pytest.raises(VidLLMInputError, match="geometry was predicted, now given"):
        evaluate(tmp_path / "out", geometry="given")
    # How many prompts are answered together is free.
    evaluate(tmp_path / "out", batch_size=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"benchmarks": ["scanqq"]}, "wanted one of scanqa, .*got 'scanqq'; did you mean scanqa"),
        ({"benchmarks": []}, "got none"),
        ({"geometry": "true"}, "wanted predicted or given; got 'true'"),
        ({"geometry": "given", "with_given_geometry": True}, "geometry is given already"),
        ({"batch_size": 0}, "batch_size: wanted at least 1; got 0"),
        ({"benchmarks": ["scanqa"], "split": "train"}, "ScanQA_v1.0_train.json: no such file"),
        ({"benchmarks": ["scanqa"], "prompts": "terse"}, "prompts: wanted one of"),
    ],
)
def test_wrong_arguments_are_refused(evaluate, tmp_path, options, message):
    with pytest.raises(VidLLMInputError, match=message):
        evaluate(tmp_path / "out", **options)
    assert not (tmp_path / "out" / "predictions").exists()


# ---- a model that knows


class Oracle:
    """Stands in for the model: knows the geometry of the scene, and the boxes of the batch that it is asked about."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, model, quarter_turns=1, scale=1.0):
        self.config, self.quarter_turns, self.scale = model.config, quarter_turns, scale
        self.truth, self.batch, self.given = None, None, []

    def state_dict(self):
        return {"nothing": torch.zeros(1)}

    def encode_scene(self, pixels, sizes, geometry=None):
        self.given.append(geometry)
        truth = {
            name: torch.from_numpy(getattr(self.truth, name))[None]
            for name in ("cam_from_world", "intrinsics_px", "depth_m")
        }
        annotation = torch.from_numpy(self.truth.annotation_from_world).float()
        angle = torch.tensor(np.radians(90 * self.quarter_turns + 8.0), dtype=torch.float32)
        turn = torch.stack(
            [
                torch.stack([angle.cos(), -angle.sin(), 0 * angle]),
                torch.stack([angle.sin(), angle.cos(), 0 * angle]),
                torch.tensor([0.0, 0, 1]),
            ]
        )
        depth, cameras = self.scale * truth["depth_m"], truth["cam_from_world"].clone()
        cameras[..., :3, 3] *= self.scale
        reconstruction = VidLLMReconstruction(
            cam_from_world=cameras,
            depth=depth,
            points_world=unproject_depth(depth, truth["intrinsics_px"], cameras),
            room_from_world=(turn @ annotation[:3, :3])[None],
            metric_mask=torch.tensor([True]),
        )
        return VidLLMScene(tokens=torch.zeros(1, self.config.num_scene_tokens, 0), reconstruction=reconstruction)

    def __call__(self, input_ids, scene, **_):
        assert len(input_ids) == len(self.batch)
        return scene

    def boxes_of(self, scene):
        boxes = torch.from_numpy(np.stack([sample.boxes_annotation[0] for sample in self.batch]))[None]
        annotation = torch.from_numpy(self.truth.annotation_from_world)[None]
        room = boxes_room_from_annotation(boxes, annotation, scene.reconstruction.room_from_world.double())[0]
        # A worse box of a lower score comes after the right one.
        boxes = torch.stack([room, room + 1], dim=1)
        scores = torch.tensor([[0.4, 0.1]]).repeat(len(boxes), 1)
        # That it finds "no target" likelier must not matter: there is one.
        return VidLLMGenerateOutput(
            boxes=boxes,
            box_scores=scores,
            box_token_index=torch.zeros_like(scores).long(),
            no_target_scores=scores + 0.5,
            scene=scene,
        )


class OraclePredictor(Predictor):
    """Asks the oracle, and answers texts from the samples."""

    def _read(self, work):
        videos, self.model.truth = super()._read(work)
        return videos, self.model.truth

    def _records(self, batch, scene, truth):
        self.model.batch = batch
        return super()._records(batch, scene, truth)

    def _texts(self, chats, scene, max_new_tokens):
        prompt = self._prompt(chats, scene, max_new_tokens)
        assert len(prompt["input_ids"]) == len(chats)
        said = []
        for sample in self.model.batch:
            if sample.task == "caption":
                category, colour = named_objects(self.data_root, "val")[sample.scene_id, sample.object_ids[0]]
                said.append(" ".join(filter(None, ["the", colour, category])))
            else:
                said.append(sample.answers[0])
        return said


@pytest.fixture
def oracle(loaded, monkeypatch):
    monkeypatch.setattr(run, "Predictor", OraclePredictor)
    return lambda **how: (Oracle(loaded[0], **how), loaded[1])


@pytest.mark.parametrize("quarter_turns", [0, 1, 2, 3])
def test_perfect_predictions_score_the_maximum(evaluate, oracle, tmp_path, quarter_turns):
    document = evaluate(tmp_path / "out", model=oracle(quarter_turns=quarter_turns))
    results = document["runs"]["easy"]["results"]
    for name in ("scanqa", "sqa3d", "scan2cap"):
        for protocol, metrics in results[name].items():
            if (name, protocol) == ("scanqa", "chat_scene"):
                # It cleans answers ("2" becomes "two") and not what they are compared with.
                assert 0.7 < metrics["exact_match"] <= 1
                continue
            assert set(metrics.values()) == {1.0}, (name, protocol)
    # Upright boxes are taken by the nearest quarter turn; the room that the oracle sees is 8 degrees off.
    assert results["scanrefer"]["oriented"]["acc_0.5"] == 1
    boxes = dict(results["scanrefer"]["official"])
    assert {value for name, value in boxes.items() if not name.startswith("multiple")} == {1.0}
    poses = results["reconstruction"]["vggt_i_inv_j"]
    assert (poses["auc_30"], poses["rra_30"], poses["rta_30"]) == (1, 1, 1)
    assert poses["ate_m"] < 1e-6
    for protocol in ("metric", "median", "scale", "scale_shift"):
        assert results["reconstruction"][protocol]["abs_rel"] < 1e-5
        assert results["reconstruction"][protocol]["delta_1"] == 1
    metric = results["reconstruction"]["metric"]
    assert metric["scale_error"] < 1e-6
    assert metric["up_error_deg"] < 1e-3
    assert metric["heading_error_deg"] == pytest.approx(8, abs=1e-3)
    assert metric["fscore_5cm"] == 1
    assert max(metric["accuracy_m"], metric["completeness_m"]) < 1e-5


def test_nothing_corrects_the_scale(evaluate, oracle, tmp_path):
    document = evaluate(tmp_path / "out", ["reconstruction", "scanqa"], model=oracle(scale=1.5))
    results = document["runs"]["easy"]["results"]["reconstruction"]
    assert results["metric"]["abs_rel"] == pytest.approx(0.5, abs=1e-4)
    assert results["metric"]["scale_error"] == pytest.approx(0.5, abs=1e-4)
    assert results["metric"]["fscore_5cm"] < 0.3
    assert min(results["metric"]["accuracy_m"], results["metric"]["completeness_m"]) > 0.1
    assert results["median"]["abs_rel"] < 1e-5
    assert results["vggt_i_inv_j"]["auc_30"] == 1
    assert results["vggt_i_inv_j"]["ate_m"] > 0.01


def test_the_model_gets_true_geometry_where_it_is_asked_for(evaluate, oracle, tmp_path):
    model = oracle()
    document = evaluate(tmp_path / "out", ["scanrefer", "reconstruction"], model=model, with_given_geometry=True)
    given = model[0].given
    assert [geometry is None for geometry in given] == [True] * 3 + [False] * 3
    assert {name: tuple(value.shape) for name, value in given[-1].items()} == {
        "cam_from_world": (1, FRAMES, 4, 4),
        "intrinsics_px": (1, FRAMES, 3, 3),
        "depth_m": (1, FRAMES, *given[-1]["depth_m"].shape[2:]),
    }
    run = document["runs"]["easy"]
    assert run["baselines"]["given_geometry"] == run["results"]
    headline = evaluate(tmp_path / "given", ["scanrefer"], model=oracle(), geometry="given")
    assert headline["provenance"]["geometry"] == "given"
    assert "given_geometry" not in headline["runs"]["easy"]["baselines"]


def test_given_geometry_needs_poses(evaluate, oracle, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "scene_truth", lambda *_: predict.SceneTruth(annotation_from_world=np.eye(4)))
    with pytest.raises(VidLLMInputError, match="wanted poses and intrinsics of all sampled frames"):
        evaluate(tmp_path / "out", ["scanqa"], model=oracle(), geometry="given")


def test_shuffled_predictions_are_near_the_floor(rooms_root):
    work = plan(("scanqa", "sqa3d", "scanrefer", "scan2cap"), str(rooms_root), FRAMES)
    rng = np.random.default_rng(0)
    for name in ("scanqa", "sqa3d"):
        part = work.benchmarks[name]
        right = [sample.answers[0] for sample in part.samples]
        assert score_answers(part, right)["official"]["exact_match"] == 1
        shuffled = np.mean(
            [score_answers(part, list(rng.permutation(right)))["official"]["exact_match"] for _ in range(20)]
        )
        by_chance = np.mean([[a == b for a in right] for b in right])
        assert shuffled == pytest.approx(by_chance, abs=0.08)
        assert shuffled < 0.35
    part = work.benchmarks["scanrefer"]
    boxes = np.stack([sample.boxes_annotation[0] for sample in part.samples])
    assert score_boxes(part, list(boxes))["official"]["acc_0.5"] == 1
    assert score_boxes(part, list(rng.permutation(boxes)))["official"]["acc_0.25"] < 0.3
    part = work.benchmarks["scan2cap"]
    named = named_objects(str(rooms_root), "val")
    objects = [named[sample.scene_id, sample.object_ids[0]] for sample in part.samples]
    said = [" ".join(filter(None, reversed(thing))) for thing in objects]
    assert score_captions(said, objects)["rooms"]["category_and_colour"] == 1
    assert score_captions(list(rng.permutation(said)), objects)["rooms"]["category_and_colour"] < 0.4
    # The rooms' own captions name the category of their object, and no other's colour.
    own = [sample.references[0] for sample in part.samples]
    assert score_captions(own, [(category, None) for category, _ in objects])["rooms"]["category_and_colour"] == 1


def test_a_model_without_finite_poses_is_refused(evaluate, oracle, tmp_path):
    with pytest.raises(VidLLMInputError, match="the model's poses are not finite"):
        evaluate(tmp_path / "out", ["reconstruction", "scanqa"], model=oracle(scale=float("nan")))


def test_what_cannot_be_asked_is_counted(loaded, rooms_root, tmp_path, facts, monkeypatch):
    root = tmp_path / "root"
    shutil.copytree(rooms_root, root)
    gone = sorted(path.name for path in (root / "posed_images").iterdir())[0]
    for folder in ("posed_images", "scans"):
        shutil.rmtree(root / folder / gone)
    monkeypatch.setattr(run, "train_facts", lambda *_: facts)
    with pytest.warns(UserWarning, match="rows without boxes"):
        document = run_evaluation(["scanrefer"], loaded, root, tmp_path / "out", num_frames=FRAMES, command="test")
    counts = document["provenance"]["counts"]["scanrefer"]
    assert 0 < counts["scored"] < counts["rows"]
    assert any(
        f"{counts['rows'] - counts['scored']} skipped: its scene is absent" in n
        for n in document["provenance"]["notes"]
    )
    check_results(document)
    assert issubclass(PoseUnavailableError, VidLLMInputError)


def test_a_scene_without_cameras_is_counted_and_the_others_are_reconstructed(
    loaded, rooms_root, tmp_path, facts, monkeypatch
):
    root = tmp_path / "root"
    shutil.copytree(rooms_root, root)
    first, second, third = sorted((root / "posed_images").iterdir())
    for path in second.glob("0*.txt"):
        path.unlink()
    # Intrinsics may stand in the scan's file, too.
    for path in third.glob("*intrinsic.txt"):
        path.unlink()
    (root / "scans" / third.name / f"{third.name}.txt").unlink()
    monkeypatch.setattr(run, "train_facts", lambda *_: facts)
    document = run_evaluation(["reconstruction"], loaded, root, tmp_path / "out", num_frames=FRAMES, command="test")
    assert document["provenance"]["counts"]["reconstruction"] == {"scored": 1}
    notes = [note for note in document["provenance"]["notes"] if "skipped" in note]
    assert notes == [
        f"reconstruction: 1 skipped: it has no poses (first: {second.name})",
        f"reconstruction: 1 skipped: it has no intrinsics (first: {third.name})",
    ]
    lines = (tmp_path / "out" / "predictions" / "reconstruction.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [first.name]
    for path in first.glob("0*.txt"):
        path.unlink()
    with pytest.raises(VidLLMInputError, match=r"nothing to evaluate of reconstruction; .*2 skipped: it has no poses"):
        run_evaluation(["reconstruction"], loaded, root, tmp_path / "other", num_frames=FRAMES, command="test")


def test_a_prompt_that_is_too_long_is_one_error(evaluate, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(loaded[0].config.text_config, "max_position_embeddings", 40)
    with pytest.raises(VidLLMInputError, match="this model takes at most 40"):
        evaluate(tmp_path / "out", ["scanqa"])


def test_marks_of_rows_have_the_means_of_the_results(evaluate, undisturbed, rooms_root):
    """What the intervals are made of is what was scored, wherever a metric is a mean over rows."""
    document = first_run(evaluate, undisturbed)
    work = plan(EVAL_BENCHMARKS, str(rooms_root), FRAMES, None, "vidllm", None)
    records = {name: PredictionFile(undisturbed / "predictions" / f"{name}.jsonl").records for name in EVAL_BENCHMARKS}
    marks = row_marks(work, records)
    results = document["runs"]["easy"]["results"]
    assert set(marks) == set(results)
    for name, protocols in marks.items():
        assert set(protocols) <= set(results[name])
        for protocol, metrics in protocols.items():
            for metric, found in metrics.items():
                assert found.metric == pytest.approx(results[name][protocol][metric], abs=1e-12), (name, metric)
                low, high = bootstrap_interval(found, draws=200)
                assert low - 1e-12 <= found.metric <= high + 1e-12
                assert len(found.ids) == len(set(found.ids)) == len(found.values)
        # Of all protocols and kinds: a kind that nothing belongs to has a score (0) and no rows.
        for protocol, metrics in results[name].items():
            absent = set(metrics) - set(protocols[protocol])
            assert all(metrics[metric] == 0 and "/" in metric for metric in absent), (name, protocol, absent)
    assert set(marks["sqa3d"]) == {"official", "leo", "llava3d", "video3dllm", "chat_scene"}
    assert set(marks["scanrefer"]) == {"official", "oriented"}
    assert {"acc_0.25", "unique/acc_0.5"} <= set(marks["scanrefer"]["oriented"])
