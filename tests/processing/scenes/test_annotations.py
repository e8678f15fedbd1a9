"""Boxes, labels, unique and multiple: answers worked out on paper."""

import json
import re

import numpy as np
import pytest
import trimesh

from vidllm.processing.scenes import find_label_tsv, load_scene_objects, read_label_map, unique_multiple
from vidllm.processing.scenes.annotations import find_scan_dir
from vidllm.processing.scenes.labels import SCANREFER_CLASSES
from vidllm.processing.scenes.ply import read_ply_vertices
from vidllm.processing.video_reading_vidllm import VidLLMInputError

from .made_scan import GROUPS, SCENE, VERTICES, write_labels, write_ply, write_scan


# Object 0 has vertices (0,0,0) (2,0,0) (2,1,.5). Aligned: (1.5,-.5,.25) (1.5,1.5,.25) (.5,1.5,.75).
BOX_TABLE = [1.0, 0.5, 0.5, 1.0, 2.0, 0.5]
# Object 1: (4,4,0) (5,4,1) (6,7,2). Aligned: (-2.5,3.5,.25) (-2.5,4.5,1.25) (-5.5,5.5,2.25).
BOX_CHAIR = [-4.0, 4.5, 1.25, 3.0, 2.0, 2.0]
# Object 2: (-1,-1,0) (-3,-2,0). Aligned: (2.5,-1.5,.25) (3.5,-3.5,.25).
BOX_FLOOR = [3.0, -2.5, 0.25, 1.0, 2.0, 0.0]


def test_boxes_are_made_of_aligned_vertices(tmp_path):
    objects = load_scene_objects(write_scan(tmp_path))
    assert np.allclose(objects.boxes_annotation, [BOX_TABLE, BOX_CHAIR, BOX_FLOOR])
    assert objects.boxes_annotation.dtype == np.float64
    assert objects.object_ids.tolist() == [0, 1, 2]
    assert objects.labels == ["table", "office chair", "floor"]
    assert objects.nyu40_ids.tolist() == [7, 5, 2]
    assert objects.num_vertices.tolist() == [3, 3, 2]
    # Votenet's labels count from 1; vertices of no object are 0.
    assert objects.instance_labels.tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 0, 0]
    assert np.allclose(objects.vertices_annotation[1], (1.5, 1.5, 0.25))
    assert (objects.problems, objects.overwritten_ids, objects.scene_id) == ((), (), SCENE)
    assert np.allclose(objects.box("1"), BOX_CHAIR)


@pytest.mark.parametrize("alignment", ["", None])
def test_without_alignment_the_scene_is_taken_as_aligned(tmp_path, alignment):
    objects = load_scene_objects(write_scan(tmp_path, alignment=alignment))
    # (0,0,0) (2,0,0) (2,1,.5) as they are.
    assert np.allclose(objects.box(0), [1.0, 0.5, 0.25, 2.0, 1.0, 0.5])
    assert np.array_equal(objects.annotation_from_scene, np.eye(4))
    # A file without the line is ScanNet's test scans; no file at all is told.
    assert len(objects.problems) == (1 if alignment is None else 0)


def test_later_groups_take_segments_from_earlier_ones(tmp_path):
    groups = [
        {"id": 0, "objectId": 0, "segments": [70, 9], "label": "table"},
        {"id": 1, "objectId": 1, "segments": [33], "label": "office chair"},
        {"id": 2, "objectId": 4, "segments": [9, 33], "label": "lamp"},
    ]
    folder = write_scan(tmp_path, groups)
    objects = load_scene_objects(folder)
    # Object 0 keeps segment 70 only, object 1 nothing, object 4 has segments 9 and 33.
    assert objects.object_ids.tolist() == [0, 4]
    assert np.allclose(objects.boxes_annotation, [BOX_TABLE, BOX_CHAIR])
    assert objects.instance_labels.tolist() == [1, 1, 1, 5, 5, 5, 0, 0, 0, 0]
    assert objects.overwritten_ids == (1,)
    assert "1 of 3 objects have no segment of their own (first: object 1)" in objects.problems[0]
    with pytest.raises(VidLLMInputError, match=r"object 1 of scene .* has no vertex of its own"):
        objects.box(1)
    own = load_scene_objects(folder, overlap="own")
    assert own.object_ids.tolist() == [0, 1, 4]
    # Object 0: its three vertices and (-2.5,3.5,.25) (-2.5,4.5,1.25); object 1: one vertex.
    assert np.allclose(own.box(0), [-0.5, 2.0, 0.75, 4.0, 5.0, 1.0])
    assert np.allclose(own.box(1), [-5.5, 5.5, 2.25, 0, 0, 0])
    assert own.num_vertices.tolist() == [5, 1, 3]


def test_votenets_table(tmp_path):
    groups = [
        GROUPS[1],
        {**GROUPS[0], "label": "unheard of"},
        GROUPS[2],
        {"objectId": 7, "segments": [500], "label": "box"},
    ]
    objects = load_scene_objects(write_scan(tmp_path, groups))
    # Floor (nyu40 2) and the unknown label (0) are left out; the last column is objectId, not the label from 1.
    # (8,8,8) (9,9,9) aligned: (-6.5,7.5,8.25) (-7.5,8.5,9.25).
    assert np.allclose(objects.votenet_table(), [[*BOX_CHAIR, 5, 1], [-7.0, 8.0, 8.75, 1, 1, 1, 29, 7]])
    assert "1 labels are not in" in objects.problems[0]
    assert "'unheard of'" in objects.problems[0]
    assert load_scene_objects(write_scan(tmp_path / "b", labels=False)).nyu40_ids.tolist() == [0, 0, 0]


def test_a_group_that_is_there_twice(tmp_path):
    objects = load_scene_objects(write_scan(tmp_path, [*GROUPS, GROUPS[1]]))
    assert objects.object_ids.tolist() == [0, 1, 2]
    assert "object 1 is there twice, word for word" in objects.problems[0]
    with pytest.raises(VidLLMInputError, match=r"segGroups, entry 3, objectId: wanted each id once; got 1 for two"):
        load_scene_objects(write_scan(tmp_path, [*GROUPS, {**GROUPS[1], "label": "lamp"}]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segments": None}, "entry 1, segments: wanted a list; got None"),
        ({"segments": [9, "33"]}, "entry 1, segments: wanted whole numbers from 0; got '33'"),
        ({"segments": [9, 34]}, "object 1, segments: segment 34 is not in scene0900_00_vh_clean_2.0.010000.segs.json"),
        ({"segments": [9, 1000]}, "object 1, segments: segment 1000 is not in"),
        ({"objectId": "1"}, "entry 1, objectId: wanted a whole number; got '1'"),
        ({"objectId": -1}, "entry 1, objectId: wanted whole numbers from 0; got -1"),
        ({"label": 5}, "entry 1, label: wanted text; got 5"),
    ],
)
def test_malformed_groups_name_file_row_and_field(tmp_path, change, message):
    folder = write_scan(tmp_path, [GROUPS[0], {**GROUPS[1], **change}])
    with pytest.raises(VidLLMInputError, match=r"scene0900_00\.aggregation\.json, .*" + re.escape(message)):
        load_scene_objects(folder)


@pytest.mark.parametrize("key", ["objectId", "segments", "label"])
def test_missing_keys_are_named(tmp_path, key):
    group = {name: value for name, value in GROUPS[1].items() if name != key}
    with pytest.raises(VidLLMInputError, match=f"segGroups, entry 1: wanted the key '{key}'"):
        load_scene_objects(write_scan(tmp_path, [GROUPS[0], group]))


def test_other_malformed_files_are_named(tmp_path):
    folder = write_scan(tmp_path)
    segments = folder / f"{SCENE}_vh_clean_2.0.010000.segs.json"
    aggregation = folder / f"{SCENE}.aggregation.json"
    good = segments.read_text()
    for text, message in (
        ('{"segIndices": [1, 2', r"segs\.json, line 1, column \d+: not JSON"),
        ("[1, 2]", r"segs\.json: wanted the key 'segIndices' with a list; got list"),
        ('{"segIndices": [1, 2]}', r"segs\.json, segIndices: wanted one entry per vertex of the mesh \(10\); got 2"),
        ('{"segIndices": [1, 2.5]}', r"segs\.json, segIndices, entry 1: wanted a whole number; got 2\.5"),
    ):
        segments.write_text(text)
        with pytest.raises(VidLLMInputError, match=message):
            load_scene_objects(folder)
    segments.write_text(good)
    aggregation.write_text(json.dumps({"groups": []}))
    with pytest.raises(
        VidLLMInputError, match=r"aggregation\.json: wanted the key 'segGroups' with a list; got the keys \['groups'\]"
    ):
        load_scene_objects(folder)
    aggregation.unlink()
    with pytest.raises(FileNotFoundError, match=r"aggregation\.json: no such file; .*test scans have none"):
        load_scene_objects(folder)
    (folder / f"{SCENE}.txt").write_text("axisAlignment = 1 0 0 0 0 1 0 0 0 0 2 0 0 0 0 1\n")
    aggregation.write_text(json.dumps({"segGroups": GROUPS}))
    with pytest.raises(VidLLMInputError, match=r"scene0900_00\.txt, axisAlignment: wanted a rigid transform"):
        load_scene_objects(folder)
    with pytest.raises(FileNotFoundError, match="wanted the scan of scene scene0901_00"):
        find_scan_dir(tmp_path, "scene0901_00")
    assert find_scan_dir(tmp_path, SCENE) == folder


def test_an_object_that_is_not_there(tmp_path):
    objects = load_scene_objects(write_scan(tmp_path))
    for object_id in (3, "17", -1):
        with pytest.raises(
            VidLLMInputError, match=rf"aggregation\.json: no object {object_id} in scene {SCENE}; its 3 objects"
        ):
            objects.box(object_id)
    with pytest.raises(VidLLMInputError, match=r"wanted an object id .*; got 'chair'"):
        objects.box("chair")


@pytest.mark.parametrize("form", ["binary_little_endian", "binary_big_endian", "ascii"])
def test_ply_vertices_keep_their_order(tmp_path, form):
    write_ply(tmp_path / "a.ply", form=form)
    assert np.array_equal(
        read_ply_vertices(tmp_path / "a.ply"), np.array([point for point, _ in VERTICES], np.float32)
    )


def test_ply_of_another_writer(tmp_path):
    rng = np.random.default_rng(0)
    points = rng.normal(size=(60, 3)).astype(np.float32)
    mesh = trimesh.Trimesh(
        points, rng.integers(0, 60, (20, 3)), process=False, vertex_colors=rng.integers(0, 255, (60, 4))
    )
    mesh.export(tmp_path / "a.ply")
    assert np.array_equal(read_ply_vertices(tmp_path / "a.ply"), points)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "wanted a PLY file; got no PLY header"),
        (b"ply\nformat binary_little_endian 1.0\nend_header\n", "wanted a PLY file with vertices"),
        (b"ply\nformat binary_middle_endian 1.0\nelement vertex 1\nproperty float x\nend_header\n", "got format 'binary_middle_endian'"),
        (b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\nend_header\n1 2\n", "x, y, z, each once"),
        (b"ply\nformat ascii 1.0\nelement vertex 1\nproperty half x\nend_header\n1\n", "line 4: not a line of a PLY header"),
        (b"ply\nformat ascii 1.0\nelement face 1\nelement vertex 1\nend_header\n", "line 3: wanted vertices first"),
        (b"ply\nformat ascii 1.0\nelement vertex 1\nproperty list uchar int x\nend_header\n", "got a list"),
        (b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\nproperty float z\nend_header\n1 2 q\n", "vertex 0"),
        (b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\nproperty float z\nend_header\n1 2 nan\n", "finite"),
        (b"ply\nformat ascii 1.0\nelement vertex 2\nproperty float x\nproperty float y\nproperty float z\nend_header\n1 2 3\n", "is cut"),
    ],
)  # fmt: skip
def test_a_malformed_mesh_is_one_clear_error(tmp_path, content, message):
    (tmp_path / "a.ply").write_bytes(content)
    with pytest.raises(VidLLMInputError, match=rf"a\.ply.*{re.escape(message)}"):
        read_ply_vertices(tmp_path / "a.ply")


def test_a_mesh_cut_within_its_vertices(tmp_path):
    write_ply(tmp_path / "a.ply")
    size = (tmp_path / "a.ply").stat().st_size
    # One triangle is 13 bytes, a vertex 16: cut inside the last but one vertex.
    write_ply(tmp_path / "a.ply", cut=size - 13 - 16 - 4)
    with pytest.raises(VidLLMInputError, match=r"the file is cut: 8 of 10 vertices are whole"):
        read_ply_vertices(tmp_path / "a.ply")


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_label_table(tmp_path, newline):
    write_labels(tmp_path / "annotations" / "scannetv2-labels.combined.tsv", newline)
    labels = read_label_map(find_label_tsv(tmp_path))
    assert (labels.nyu40_ids["office chair"], labels.nyu40_classes["office chair"]) == (5, "chair")
    assert SCANREFER_CLASSES[labels.scanrefer_class("office chair")] == "chair"
    # Names are compared letter by letter: NYU40's own spelling is no class of ScanRefer's.
    assert SCANREFER_CLASSES[labels.scanrefer_class("refrigerator")] == "others"
    assert SCANREFER_CLASSES[labels.scanrefer_class("mini fridge")] == "refrigerator"
    assert labels.nyu40_benchmark_id("refrigerator") == 24
    for name in ("lamp", "floor", "nobody knows"):
        assert labels.scanrefer_class(name) == 17
    assert [labels.nyu40_benchmark_id(name) for name in ("lamp", "floor", "nobody knows", "box")] == [39, 2, 39, 39]


def test_of_repeated_names_the_last_counts(tmp_path):
    write_labels(tmp_path / "a.tsv", extra=[("lamp", 5, "chair")])
    assert read_label_map(tmp_path / "a.tsv").scanrefer_class("lamp") == 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("nyu40id", "nyuid", r"row 1: wanted 'nyu40id' in column 5 \(tab-separated\); got 'nyuid'"),
        ("\t", ",", r"row 1: wanted 'raw_category' in column 2 \(tab-separated\); got '1 columns'"),
        ("\t5\t", "\tfive\t", "row 3, nyu40id: wanted a whole number; got 'five'"),
        ("floor\t1\t2\t0\tx\tfloor\ty", "floor", "row 5: wanted at least 8 columns; got 3"),
    ],
)
def test_a_malformed_label_table_names_row_and_field(tmp_path, old, new, message):
    write_labels(tmp_path / "a.tsv")
    text = (tmp_path / "a.tsv").read_text()
    assert old in text
    (tmp_path / "a.tsv").write_text(text.replace(old, new))
    with pytest.raises(VidLLMInputError, match=r"a\.tsv, " + message):
        read_label_map(tmp_path / "a.tsv")
    assert find_label_tsv(tmp_path / "nowhere") is None


def row(scene_id, object_id, name, ann_id="0"):
    return {"scene_id": scene_id, "object_id": str(object_id), "object_name": name, "ann_id": ann_id}


ROWS = [
    # Two chairs, described twice and once; a table alone.
    row("a", 1, "office_chair"), row("a", 1, "office_chair", "1"), row("a", 2, "chair"), row("a", 3, "table"),
    # Others: a lamp and a box share class 17, and id 39 in the other rule.
    row("a", 4, "lamp"), row("a", 5, "box"),
    # Alone in its scene: unique although it is of class others.
    row("b", 1, "lamp"),
    # Class 17 with the lamp officially (its spelling), but an id of its own by NYU40.
    row("c", 1, "refrigerator"), row("c", 2, "lamp"),
    # Another scene's chair counts for itself.
    row("c", 3, "chair"),
    # One table described twice is one table; three chairs are several.
    row("d", 1, "table"), row("d", 1, "table", "1"), row("d", 2, "chair"), row("d", 3, "chair"), row("d", 4, "chair"),
    # An object counts for the class of its first row: a floor is of class others (17) but has id 2; an unknown name is of
    # class others too, and of id 39, which no object of the scene has.
    row("e", 1, "floor"), row("e", 1, "gizmo"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("official", "m m m u m m u m m u u u m m m u u"),
        ("nyu40", "m m m u m m u u u u u u m m m u m"),
    ],
)
def test_unique_and_multiple_by_both_rules(tmp_path, rule, expected):
    write_labels(tmp_path / "a.tsv")
    answers = unique_multiple(ROWS, read_label_map(tmp_path / "a.tsv"), rule)
    assert [answer[0] for answer in answers] == expected.split()
    assert set(answers) == {"unique", "multiple"}


def test_unique_and_multiple_say_what_is_wrong(tmp_path):
    write_labels(tmp_path / "a.tsv")
    labels = read_label_map(tmp_path / "a.tsv")
    with pytest.raises(VidLLMInputError, match="row 1: wanted the key 'object_name'"):
        unique_multiple([ROWS[0], {"scene_id": "a", "object_id": "1"}], labels)
    with pytest.raises(VidLLMInputError, match="wanted official or nyu40; got 'v3d'"):
        unique_multiple(ROWS, labels, "v3d")
