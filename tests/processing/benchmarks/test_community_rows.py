"""Chat-Scene's, GPT4Scene's and VG-LLM's files; the files here are invented, in their schemas."""

import json

import numpy as np
import pytest
import torch

from vidllm.processing.benchmarks.community_chatscene import (
    read_attributes,
    read_caption_corpus,
    read_chatscene_rows,
)
from vidllm.processing.benchmarks.community_vgllm import CAPTION_IOU, read_vgllm_rows


SCENE = "scene0900_00"
# The second mask has no vertex.
PROPOSALS = [[1.0, 2, 0.5, 1, 2, 0.4], [0.0] * 6, [3, 1, 0.25, 0.5, 0.5, 0.5]]
OBJECTS = [[1.1, 2, 0.5, 1, 2, 0.4], [3, 1, 0.25, 0.5, 0.5, 0.6]]


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def save(path, content):
    torch.save(content, path)
    return path


def attributes(boxes, names=None):
    names = [f"thing {i}" for i in range(len(boxes))] if names is None else names
    return {SCENE: {"objects": names, "locs": torch.tensor(boxes, dtype=torch.float32)}}


@pytest.fixture
def known(tmp_path):
    return {
        "proposals": read_attributes(
            save(tmp_path / "scannet_mask3d_val_attributes.pt", attributes(PROPOSALS, ["a", "b", "c", "d"]))
        ),
        "objects": read_attributes(save(tmp_path / "scannet_val_attributes.pt", attributes(OBJECTS))),
    }


def test_attributes(known):
    found = known["proposals"][SCENE]
    np.testing.assert_allclose(found.boxes_annotation, np.array(PROPOSALS)[[0, 2]], atol=1e-6)
    assert found.ids.tolist() == [0, 2]
    assert found.labels == ("a", "c")
    assert found.num_empty == 1
    assert len(known["objects"][SCENE]) == 2


class Harmful:
    """What a pickle may do: the restricted loader must not call it."""

    def __reduce__(self):
        return (pytest.fail, ("the file ran code",))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([1], "wanted an object"),
        ({SCENE: {"objects": ["a"]}}, "'locs'.*got"),
        ({SCENE: None}, "'locs'.*got nothing"),
        (attributes([[1.0, 2, 3, 4, 5]]), r"shape \(n, 6\).*\(1, 5\)"),
        (attributes([[1.0, 2, 3, 4, 5, -1]]), "sizes from 0"),
        (attributes([[1.0, 2, 3, 4, 5, float("nan")]]), "finite"),
        (attributes([[1.0, 2, 3, 4, 5, 6]], []), "'objects'"),
        (attributes([[1.0, 2, 3, 4, 5, 6]], [3]), "'objects'"),
        ({SCENE: Harmful()}, "tensors, lists and texts only"),
        ({SCENE: {"objects": ["a"], "locs": np.zeros((1, 6))}}, "tensors, lists and texts only|'locs'"),
    ],
)
def test_malformed_attributes(tmp_path, content, says):
    with pytest.raises(ValueError, match=says) as caught:
        read_attributes(save(tmp_path / "bad.pt", content))
    assert "bad.pt" in str(caught.value)


def test_attributes_that_are_no_such_file(tmp_path):
    for content in (b"", b"nothing", b"PK\x03\x04 cut"):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.pt: wanted a file of torch\.save"):
            read_attributes(tmp_path / "bad.pt")
    (tmp_path / "bad.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="Git LFS"):
        read_attributes(tmp_path / "bad.pt")
    with pytest.raises(FileNotFoundError):
        read_attributes(tmp_path / "none.pt")


def test_chatscene_questions(tmp_path):
    rows = [
        {"scene_id": SCENE, "obj_id": 3, "prompt": "What is it? Answer.", "ref_captions": ["bed", "a bed"]},
        {"scene_id": SCENE, "obj_id": 3, "prompt": "What is it? Answer.", "caption": "Bed."},
    ]
    val, train = read_chatscene_rows(write(tmp_path / "scanqa.json", rows), "qa", "val", tmp_path)
    assert (val.answers, val.object_ids, val.scene_id, val.benchmark) == (("bed", "a bed"), (3,), SCENE, "scanqa")
    assert val.messages[0]["content"] == [{"type": "video"}, {"type": "text", "text": "What is it? Answer."}]
    assert (val.messages[1]["content"][0]["text"], train.messages[1]["content"][0]["text"]) == ("bed", "Bed.")
    assert train.answers == ("Bed.",)
    assert val.sample_id != train.sample_id
    situated = {
        "scene_id": SCENE,
        "obj_id": 0,
        "prompt": "I sit. Can I? Answer.",
        "ref_captions": ["yes"],
        "sqa_type": 3,
    }
    hidden = {**situated, "ref_captions": []}
    sqa, unknown = read_chatscene_rows(write(tmp_path / "sqa3d.json", [situated, hidden]), "sqa")
    assert (sqa.question_type, sqa.object_ids, sqa.task, sqa.benchmark) == ("can", (), "sqa", "sqa3d")
    assert not unknown.has_reply


def test_chatscene_grounding(tmp_path, known):
    rows = [
        {"scene_id": SCENE, "obj_id": 1, "prompt": "Which is low?", "ref_captions": ["<OBJ002>."]},
        {"scene_id": SCENE, "obj_id": 2, "prompt": "Which is low?", "caption": "<OBJ002>."},
    ]
    path = write(tmp_path / "scanrefer.json", rows)
    val, train = read_chatscene_rows(path, "ground", "val", **known)
    # the row that is scored has the true box, the row that is learned from that of its proposal
    np.testing.assert_allclose(val.boxes_annotation, [OBJECTS[1]], atol=1e-6)
    np.testing.assert_allclose(train.boxes_annotation, [PROPOSALS[2]], atol=1e-6)
    assert (val.object_ids, train.object_ids) == ((1,), ())
    assert val.messages[-1]["content"] == [{"type": "box"}]
    assert read_chatscene_rows(path, "ground")[0].boxes_annotation is None


def test_chatscene_captions(tmp_path, known):
    row = {"scene_id": SCENE, "obj_id": 1, "pred_id": 2, "prompt": "Describe the <OBJ002>'s look.", "iou": 0.8}
    rows = [
        {**row, "ref_captions": ["sos A low table. It is brown. eos", "sos A table. eos"]},
        {**row, "prompt": "<OBJ002>", "caption": "sos A table. eos"},
    ]
    path = write(tmp_path / "scan2cap.json", rows)
    val, train = read_chatscene_rows(path, "caption", "val", **known)
    assert val.references == ("A low table. It is brown.", "A table.")
    assert val.messages[1]["content"][0]["text"] == "A low table. It is brown."
    assert [block.get("text") for block in val.messages[0]["content"]] == [None, "Describe the ", None, "'s look."]
    np.testing.assert_allclose(val.points, [PROPOSALS[2][:3]], atol=1e-6)
    np.testing.assert_allclose(val.boxes_annotation, [OBJECTS[1]], atol=1e-6)
    assert (val.official["iou"], val.object_ids) == (0.8, (1,))
    assert [block["type"] for block in train.messages[0]["content"]] == ["video", "point"]
    with pytest.raises(ValueError, match="place that it asks about is not known"):
        read_chatscene_rows(path, "caption")[0].chat(np.eye(4))


@pytest.mark.parametrize(
    ("task", "change", "says"),
    [
        ("caption", {"scene_id": "a/b"}, "'scene_id'"),
        ("caption", {"scene_id": "scene0901_00"}, "'scene_id'"),
        ("caption", {"prompt": "Describe it."}, "'prompt'"),
        ("caption", {"prompt": "Describe <OBJ001>."}, "'prompt'"),
        ("caption", {"pred_id": 1, "prompt": "<OBJ001>"}, "'pred_id'.*mask3d"),
        ("caption", {"obj_id": "1"}, "'obj_id'"),
        ("caption", {"obj_id": 7}, "'obj_id'"),
        ("caption", {"ref_captions": "A table."}, "'ref_captions'"),
        ("ground", {"ref_captions": ["the table"]}, "'ref_captions'.*object token"),
        ("sqa", {"sqa_type": 6}, "'sqa_type'"),
    ],
)
def test_malformed_chatscene_rows(tmp_path, known, task, change, says):
    row = {"scene_id": SCENE, "obj_id": 1, "pred_id": 2, "prompt": "Describe <OBJ002>.", "ref_captions": ["<OBJ002>."]}
    with pytest.raises(ValueError, match=says) as caught:
        read_chatscene_rows(write(tmp_path / "rows.json", [row, {**row, **change}]), task, **known)
    assert "row 1" in str(caught.value)
    with pytest.raises(ValueError, match="a task among"):
        read_chatscene_rows(tmp_path / "rows.json", "chat")


def test_caption_corpora(tmp_path):
    content = {f"{SCENE}|3": ["sos A table. eos"], f"{SCENE}|4|coffee_table": ["sos low . eos", "sos eos"]}
    corpus = read_caption_corpus(write(tmp_path / "corpus.json", content))
    assert corpus == {key: tuple(captions) for key, captions in content.items()}
    for bad in ([1], {f"{SCENE}|x": []}, {"a/b|3": []}, {SCENE: []}, {f"{SCENE}|3": "sos"}, {f"{SCENE}|3": [1]}):
        with pytest.raises(ValueError, match="wanted"):
            read_caption_corpus(write(tmp_path / "corpus.json", bad))


def pictures(count, scene=SCENE):
    return [f"scannet/posed_images/{scene}/{10 * i:05}.jpg" for i in range(count)]


def test_vgllm_captions(tmp_path):
    turns = [
        {"from": "human", "value": "<image><image>\nDescribe the object located at [-1.2, 0.35, 2.0] in detail."},
        {"from": "gpt", "value": "This is a low table."},
    ]
    row = {
        "images": pictures(2), "conversations": turns, "input_box": PROPOSALS[0], "gt_box": OBJECTS[0], "iou": 0.43,
        "annotations": ["this is a low table.", "a table."], "metadata": {"dataset": "scan2cap", "ann_id": "0", "object_id": "7"},
    }  # fmt: skip
    old = {key: row[key] for key in ("images", "conversations", "annotations", "iou")}
    caption, bare = read_vgllm_rows(write(tmp_path / "scan2cap.json", [row, old]), "val", tmp_path)
    assert (caption.task, caption.scene_id, caption.object_ids) == ("caption", SCENE, (7,))
    assert caption.references == ("this is a low table.", "a table.")
    # the place is told in the aligned scene, not in the authors' first camera
    np.testing.assert_allclose(caption.points, [PROPOSALS[0][:3]])
    np.testing.assert_allclose(caption.boxes_annotation, [OBJECTS[0]])
    assert [block.get("text") for block in caption.messages[0]["content"]] == [
        None,
        "Describe the object located at ",
        None,
        " in detail.",
    ]
    assert caption.official["iou"] < CAPTION_IOU
    assert bare.points is None
    with pytest.raises(ValueError, match="place that it asks about is not known"):
        bare.chat(np.eye(4))


def test_vgllm_grounding(tmp_path):
    prompt = "Localize the object.\nText: A low table.\nOutput a JSON dictionary.\n"
    row = {
        "images": pictures(3), "prompt": prompt, "gt_bbox": [*OBJECTS[0], 0, 0, 0], "cam2global": [np.eye(4).tolist()] * 3,
        "axis_align_matrix": np.eye(4).tolist(), "metadata": {"dataset": "scanrefer", "question_type": "unique", "object_id": "7"},
    }  # fmt: skip
    marked = {
        "images": pictures(1), "gt_bbox": None,
        "conversations": [{"from": "human", "value": "Frame-0: <image>\n" + prompt}, {"from": "gpt", "value": ""}],
    }  # fmt: skip
    ground, hidden = read_vgllm_rows(write(tmp_path / "scanrefer.json", [row, marked]), "val")
    assert (ground.task, ground.question, ground.question_type) == ("ground", "A low table.", "unique")
    np.testing.assert_allclose(ground.boxes_annotation, [OBJECTS[0]])
    assert ground.messages[-1]["content"] == [{"type": "box"}]
    assert hidden.boxes_annotation is None
    assert hidden.messages[0] == ground.messages[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"images": []}, "'images'"),
        ({"images": [*pictures(1), *pictures(1, "scene0901_00")]}, "'images'.*one scene"),
        ({"images": ["00000.jpg"]}, "'images'"),
        ({"gt_bbox": OBJECTS[0]}, "'gt_bbox'.*9 finite"),
        ({"gt_bbox": [*OBJECTS[0], 0.1, 0, 0]}, "'gt_bbox'.*three angles of 0"),
        ({"prompt": 3}, "'prompt'"),
        ({"prompt": None, "conversations": []}, "'conversations'"),
        ({"metadata": {"dataset": "vqa"}}, "'dataset'"),
        ({"metadata": {"dataset": "scan2cap"}}, "'conversations'"),
    ],
)
def test_malformed_vgllm_rows(tmp_path, change, says):
    row = {"images": pictures(2), "prompt": "Find it.", "gt_bbox": [*OBJECTS[0], 0, 0, 0]}
    with pytest.raises(ValueError, match=says) as caught:
        read_vgllm_rows(write(tmp_path / "rows.json", [row, {**row, **change}]))
    assert "row 1" in str(caught.value)


def test_an_overlap_is_a_number_up_to_one(tmp_path):
    turns = [{"from": "human", "value": "Describe [0, 0, 1]."}, {"from": "gpt", "value": "A bed."}]
    for overlap in (1.5, "0.4", True):
        row = {"images": pictures(1), "conversations": turns, "annotations": ["a bed."], "iou": overlap}
        with pytest.raises(ValueError, match="row 0, field 'iou'"):
            read_vgllm_rows(write(tmp_path / "rows.json", [row]))
