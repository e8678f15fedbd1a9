"""Extraction of frames and the check of a data root."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vidllm.processing.scenes import check_data_root, extract_frames, open_scene
from vidllm.processing.scenes.check import SplitReport
from vidllm.processing.scenes.frames import read_manifest
from vidllm.processing.scenes.open import find_scenes
from vidllm.processing.scenes.sens import SensReader
from vidllm.processing.scenes.write import write_layout
from vidllm.processing.video_reading_vidllm import VidLLMInputError

from .made_scan import write_labels, write_scan
from .made_scene import ALIGNMENT, DEPTH_INTRINSICS, INTRINSICS, contents, depth_raw, pose
from .sens_writer import write_sens


SCENES = ["scene0900_00", "scene0900_01", "scene0901_00"]


def make_root(root, scenes=SCENES, num_frames=9, lost_frames=(0,)):
    for scene in scenes:
        folder = root / "scans" / scene
        folder.mkdir(parents=True)
        pictures, depths, poses = contents(num_frames, lost_frames)
        write_sens(folder / f"{scene}.sens", pictures, depths, poses, INTRINSICS, DEPTH_INTRINSICS)
        numbers = " ".join(str(value) for value in ALIGNMENT.reshape(-1))
        (folder / f"{scene}.txt").write_text(f"axisAlignment = {numbers}\n")
    return root


def snapshot(root):
    return {
        str(path.relative_to(root)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("num_workers", [1, 2])
def test_extraction_gives_back_the_recordings_frames(tmp_path, num_workers):
    root, out, seen = make_root(tmp_path / "in"), tmp_path / "out", []
    report = extract_frames(
        root, out=out, num_frames=4, num_workers=num_workers, progress=lambda *step: seen.append(step)
    )
    assert (report.done, report.skipped, report.failed) == (SCENES, [], {})
    assert [step[:2] for step in seen] == [(1, 3), (2, 3), (3, 3)]
    assert sorted(step[2] for step in seen) == SCENES
    assert all("1 of 9 poses are invalid" in report.problems[scene][0] for scene in SCENES)
    for scene in SCENES:
        reader = open_scene(out, scene)
        source = SensReader(root / "scans" / scene / f"{scene}.sens")
        assert reader.frame_ids == [1, 3, 5, 8]
        for index, number in enumerate(reader.frame_ids):
            frame = reader.frame(index)
            assert np.array_equal(frame.rgb, source.frame(number).rgb)
            assert reader.stored_jpeg(index) == source.stored_jpeg(number)
            assert np.array_equal(frame.depth_m, depth_raw(number).astype(np.float32) / np.float32(1000))
            assert np.allclose(np.linalg.inv(frame.cam_from_scene), pose(number), atol=1e-6)
        assert np.allclose(frame.intrinsics_px, INTRINSICS, atol=1e-5)
        assert np.allclose(reader.annotation_from_scene, ALIGNMENT)
        note = read_manifest(out / "posed_images" / scene)
        assert (note["frame_ids"], note["num_source_frames"]) == ([1, 3, 5, 8], 9)


def test_extraction_goes_on_where_it_stopped_and_overwrites_only_when_asked(tmp_path):
    root, out = make_root(tmp_path / "in"), tmp_path / "out"
    extract_frames(root, SCENES[:1], out, num_frames=3)
    # What a killed run leaves: a partial folder, nothing under the scene's name.
    leftover = out / "posed_images" / f".{SCENES[1]}.partial-abc"
    leftover.mkdir()
    (leftover / "00000.jpg").write_bytes(b"half")
    before = snapshot(out / "posed_images" / SCENES[0])
    report = extract_frames(root, SCENES, out, num_frames=3)
    assert (report.done, report.skipped) == (SCENES[1:], SCENES[:1])
    assert snapshot(out / "posed_images" / SCENES[0]) == before
    assert not leftover.exists()
    assert sorted(path.name for path in (out / "posed_images").iterdir()) == SCENES
    whole = snapshot(out)
    assert extract_frames(root, SCENES, out, num_frames=3).skipped == SCENES
    other = extract_frames(root, SCENES, out, num_frames=5)
    assert list(other.failed) == SCENES
    assert "it is there already, from other settings" in other.failed[SCENES[0]]
    assert snapshot(out) == whole
    assert extract_frames(root, SCENES, out, num_frames=5, overwrite=True).done == SCENES
    assert len(open_scene(out, SCENES[2])) == 5
    # Files of somebody else are never replaced unasked.
    note = out / "posed_images" / SCENES[0] / "extraction.json"
    note.unlink()
    assert "not written by this command" in extract_frames(root, SCENES[:1], out, num_frames=5).failed[SCENES[0]]


def test_a_bad_scene_does_not_stop_the_others(tmp_path):
    root, out = make_root(tmp_path / "in"), tmp_path / "out"
    (root / "scans" / SCENES[1] / f"{SCENES[1]}.sens").write_bytes(b"no recording")
    report = extract_frames(root, [*SCENES, "scene0999_00", SCENES[0]], out, num_frames=2)
    assert report.done == [SCENES[0], SCENES[2]]
    assert "wanted a .sens file of version 4" in report.failed[SCENES[1]]
    assert "no frames of scene scene0999_00" in report.failed["scene0999_00"]
    assert sorted(path.name for path in (out / "posed_images").iterdir()) == report.done
    assert json.dumps(report.to_dict())


def test_a_frame_that_cannot_be_decoded_leaves_no_scene(tmp_path):
    root, out = make_root(tmp_path / "in", SCENES[:1], lost_frames=()), tmp_path / "out"
    path = root / "scans" / SCENES[0] / f"{SCENES[0]}.sens"
    reader = SensReader(path)
    content = bytearray(path.read_bytes())
    content[reader._offsets[8] : reader._offsets[8] + 50] = bytes(50)
    path.write_bytes(content)
    report = extract_frames(root, SCENES, out, num_frames=2)
    assert "frame 8, colour: this picture cannot be decoded" in report.failed[SCENES[0]]
    assert list((out / "posed_images").iterdir()) == []


def test_into_the_root_itself_and_with_a_step(tmp_path):
    root = make_root(tmp_path, num_frames=25, lost_frames=(10,))
    report = extract_frames(root, num_frames=None, step=10)
    assert report.done == SCENES
    # Frame 10 has no pose; by default only frames with one are written.
    assert open_scene(root, SCENES[0]).frame_ids == [0, 20]
    assert extract_frames(root, num_frames=None, step=10, require_pose=False, overwrite=True).done == SCENES
    reader = open_scene(root, SCENES[0])
    assert reader.frame_ids == [0, 10, 20]
    assert reader.valid_pose_mask.tolist() == [True, False, True]
    assert find_scenes(root)[SCENES[0]] == ["posed_images", "sens"]
    # An extraction is never the source of the next one while the recording is there.
    assert read_manifest(root / "posed_images" / SCENES[0])["num_source_frames"] == 25


def test_coverage_and_videos(tmp_path):
    root = make_root(tmp_path / "in", SCENES[:1])
    assert extract_frames(root, out=tmp_path / "out", num_frames=3, method="max_coverage").done == SCENES[:1]
    assert len(open_scene(tmp_path / "out", SCENES[0])) == 3
    film = tmp_path / "film"
    write_layout(
        "video",
        film,
        "kitchen",
        (SensReader(root / "scans" / SCENES[0] / f"{SCENES[0]}.sens").frame(i) for i in range(9)),
    )
    assert extract_frames(film, out=tmp_path / "stills", num_frames=3).done == ["kitchen"]
    reader = open_scene(tmp_path / "stills", "kitchen")
    assert (reader.frame_ids, reader.has_poses, reader.has_depth) == ([0, 4, 8], False, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 0}, "num_frames: wanted 1 or more"),
        ({"method": "random"}, "method: wanted uniform or max_coverage"),
        ({"num_workers": 0}, "num_workers: wanted 1 or more"),
        ({"scenes": ["../x"]}, "scene id: wanted a name"),
        ({"layout": "senses"}, "did you mean sens"),
    ],
)
def test_wrong_settings_are_said_at_once(tmp_path, options, message):
    make_root(tmp_path, SCENES[:1])
    with pytest.raises(VidLLMInputError, match=re.escape(message)):
        extract_frames(tmp_path, **options)
    (tmp_path / "empty").mkdir()
    with pytest.raises(VidLLMInputError, match="found no scene"):
        extract_frames(tmp_path / "empty")


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_check_says_what_is_there_and_what_is_missing(tmp_path):
    root = make_root(tmp_path, SCENES[:2])
    write_scan(root, scene=SCENES[0])
    annotations = root / "annotations"
    qa = [
        {"scene_id": scene, "question_id": f"val-{scene}-{n}", "question": "What?", "answers": ["a"]}
        for scene, n in ((SCENES[0], 0), (SCENES[0], 1), ("scene0999_00", 0))
    ]
    write_json(annotations / "ScanQA_v1.0_val.json", qa)
    refer = [
        {
            "scene_id": scene,
            "object_id": str(number),
            "object_name": "table",
            "ann_id": ann,
            "description": "it",
            "token": ["it"],
        }
        for scene, number, ann in ((SCENES[0], 0, "0"), (SCENES[0], 0, "1"), (SCENES[1], 3, "0"))
    ]
    write_json(annotations / "ScanRefer_filtered_val.json", refer)
    write_json(
        annotations / "v1_balanced_questions_test_scannetv2.json",
        {"questions": [{"scene_id": SCENES[0], "question_id": 1}]},
    )
    (annotations / "ScanQA_v1.0_train.json").write_text('[\n{"scene_id": }]')
    report = check_data_root(root)
    assert (report.num_scenes, report.num_scans, report.scenes["sens"]) == (2, 1, 2)
    assert report.label_table == str(root / "scannetv2-labels.combined.tsv")
    val = report.benchmarks["scanqa"]["val"]
    assert (val.num_rows, val.num_scenes, val.scenes_without_frames, val.ready) == (3, 2, ["scene0999_00"], False)
    digest = hashlib.sha256((annotations / "ScanQA_v1.0_val.json").read_bytes()).hexdigest()
    assert val.files["ScanQA_v1.0_val.json"]["sha256"] == digest
    train = report.benchmarks["scanqa"]["train"]
    assert "ScanQA_v1.0_train.json, line 2, column 14: not JSON" in train.problems[0]
    assert not report.benchmarks["scanqa"]["test_w_obj"].is_present
    for benchmark in ("scanrefer", "scan2cap"):
        split = report.benchmarks[benchmark]["val"]
        assert (split.num_rows, split.num_scenes, split.num_objects) == (3, 2, 2)
        assert (split.scenes_without_frames, split.scenes_without_scan) == ([], [SCENES[1]])
    half = report.benchmarks["sqa3d"]["test"]
    assert half.files["v1_balanced_sqa_annotations_test_scannetv2.json"] is None
    assert (half.num_rows, half.ready) == (None, False)
    text = "\n".join(report.lines())
    for part in ("scans with meshes and objects: 1", "scanqa val: 3 rows (published: 4675), 2 scenes (published: 71)",
                 "scanqa val: 1 scenes without frames: scene0999_00", "scanrefer val: 1 scenes without mesh and objects: scene0900_01",
                 "sqa3d test: missing v1_balanced_sqa_annotations_test_scannetv2.json", f"sha256 {digest} ScanQA_v1.0_val.json"):  # fmt: skip
        assert part in text
    sizes = [(root / "scans" / scene / f"{scene}.sens").stat().st_size for scene in SCENES[:2]]
    # Nine frames each: 32 would be all of them.
    assert (report.sens_bytes, report.extraction_bytes) == (sum(sizes), sum(sizes))
    assert json.dumps(report.to_dict())
    assert (
        check_data_root(root, sha256=False).benchmarks["scanqa"]["val"].files["ScanQA_v1.0_val.json"]["sha256"] is None
    )
    with pytest.raises(FileNotFoundError):
        check_data_root(root / "absent")


def test_check_of_a_split_that_is_ready(tmp_path):
    root = make_root(tmp_path, SCENES[:1])
    write_scan(root, scene=SCENES[0])
    rows = [{"scene_id": SCENES[0], "object_id": "1", "object_name": "chair", "ann_id": "0"}]
    write_json(root / "annotations" / "ScanRefer_filtered_train.json", rows)
    report = check_data_root(root)
    assert report.benchmarks["scanrefer"]["train"].ready
    assert (
        "scanrefer train: 1 rows (published: 36665), 1 scenes (published: 562), 1 objects (published: 7875), ready"
        in report.lines()
    )


def test_check_names_malformed_rows(tmp_path):
    root = make_root(tmp_path, SCENES[:1])
    write_json(root / "annotations" / "ScanQA_v1.0_val.json", [{"scene_id": SCENES[0]}, {"scene": SCENES[0]}])
    write_json(
        root / "annotations" / "v1_balanced_questions_val_scannetv2.json",
        {"questions": [{"scene_id": "a", "question_id": 1}]},
    )
    write_json(
        root / "annotations" / "v1_balanced_sqa_annotations_val_scannetv2.json", {"annotations": [{"question_id": 2}]}
    )
    write_labels(root / "scannetv2-labels.combined.tsv")
    text = (root / "scannetv2-labels.combined.tsv").read_text()
    (root / "scannetv2-labels.combined.tsv").write_text(text.replace("\t5\t", "\tx\t"))
    report = check_data_root(root)
    assert "ScanQA_v1.0_val.json, row 1, scene_id: wanted text" in report.benchmarks["scanqa"]["val"].problems[0]
    assert "1 questions have none, 1 annotations have no question" in report.benchmarks["sqa3d"]["val"].problems[0]
    assert "row 3, nyu40id" in report.problems[0]


def test_check_of_the_real_sqa3d_test_files(tmp_path, repository):
    files = repository.parent / "shared" / "realdata" / "sqa3d_test"
    if not files.is_dir():
        pytest.skip("the real files are not here")
    (tmp_path / "annotations").mkdir()
    for file in files.glob("v1_balanced_*.json"):
        (tmp_path / "annotations" / file.name).symlink_to(file)
    split: SplitReport = check_data_root(tmp_path).benchmarks["sqa3d"]["test"]
    assert (split.num_rows, split.num_scenes, len(split.scenes_without_frames)) == (3519, 67, 67)
    assert (split.published_rows, split.published_scenes, split.problems) == ([3519], 67, [])


def test_a_picture_that_is_no_jpeg_is_encoded(tmp_path):
    folder = Path(tmp_path / "in" / "scans" / SCENES[0])
    folder.mkdir(parents=True)
    pictures, depths, poses = contents(2)
    write_sens(folder / f"{SCENES[0]}.sens", pictures, depths, poses, INTRINSICS, DEPTH_INTRINSICS, colour=1)
    assert extract_frames(tmp_path / "in", out=tmp_path / "out").done == SCENES[:1]
    with Image.open(tmp_path / "out" / "posed_images" / SCENES[0] / "00001.jpg") as image:
        assert image.format == "JPEG"
        assert np.abs(np.asarray(image).astype(int) - pictures[1].astype(int)).mean() < 3
