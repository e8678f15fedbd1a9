"""Readers of files that other works derived from the benchmarks; the files here are invented, in their schemas."""

import json

import benchmark_files as official
import numpy as np
import pytest
from scipy import sparse

from vidllm.processing.benchmarks.community import (
    read_box_file,
    read_llava3d_answers,
    read_llava3d_questions,
    read_llava_style,
    read_mask_proposals,
)
from vidllm.processing.scenes.annotations import load_scene_objects


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def llava(identity, prompt, reply, dataset, **more):
    metadata = {"dataset": dataset, "question_type": more.pop("kind", "unknow"), **more.pop("metadata", {})}
    turns = [{"value": prompt, "from": "human"}, {"value": reply, "from": "gpt"}]
    return {"id": identity, "video": "scannet/scene0900_00", "conversations": turns, "metadata": metadata, **more}


def test_video3dllm_rows(tmp_path):
    box = [1.0, 2.0, 0.5, 1.0, 2.0, 0.4]
    rows = [
        llava("scanqa_val-scene0900-0_1", "<image> What is it? Simply.", "bed", "scanQA", metadata={"answers": ["bed", "a bed"]}),
        llava("scanqa_val-scene0900-1_0", "<image> Older copy?", "yes", "scanQA"),
        llava(220602000001, "<image> I sit. What? Word.", "wall", "sqa3d", kind="what"),
        llava(3, "<image>Identify it.\nA low table.", "<ground>", "scanrefer", kind="unique", box=box,
              metadata={"ann_id": "0", "object_id": "1"}),
        llava(4, "<image> Given an object located at <coord> , describe it.", "A table.", "scan2cap", kind="multiple",
              box_input=[9, *box[1:]], gt_box=box, annotations=["a table.", "a low table."], metadata={"object_id": "1", "ann_id": "0"}),
        llava(5, "<image> Given an object located at <coord> , describe it.", "A bed.", "scan2cap", box_input=None, gt_box=box,
              metadata={"object_id": "0", "ann_id": "0"}),
    ]  # fmt: skip
    qa, older, sqa, ground, caption, unmatched = read_llava_style(write(tmp_path / "rows.json", rows), "val", tmp_path)
    assert (qa.official_id, qa.answers, qa.question_type, qa.scene_id) == (
        "val-scene0900-0",
        ("bed", "a bed"),
        None,
        "scene0900_00",
    )
    assert older.answers == ("yes",)
    assert (sqa.official_id, sqa.task, sqa.question_type) == ("220602000001", "sqa", "what")
    assert qa.messages[0]["content"] == [{"type": "video"}, {"type": "text", "text": "What is it? Simply."}]
    assert ground.boxes_annotation.tolist() == [box]
    assert ground.object_ids == (1,)
    assert ground.messages[-1]["content"] == [{"type": "box"}]
    assert caption.points.tolist() == [[9, 2, 0.5]]
    assert caption.boxes_annotation.tolist() == [box]
    assert caption.references == ("a table.", "a low table.")
    assert [block["type"] for block in caption.messages[0]["content"]] == ["video", "text", "point", "text"]
    assert unmatched.points is None
    with pytest.raises(ValueError, match="no"):
        unmatched.chat(np.eye(4))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"video": "scannet/a/b"}, "'video'"),
        ({"metadata": {"dataset": "vqa"}}, "'dataset'"),
        ({"metadata": None}, "'metadata'"),
        ({"conversations": [{"from": "cat", "value": "x"}]}, "conversations 0, field 'from'"),
        ({"box": [1, 2, 3]}, "'box'"),
    ],
)
def test_malformed_video3dllm_rows(tmp_path, change, says):
    row = llava(3, "<image>Find.", "<ground>", "scanrefer", box=[0, 0, 0, 1, 1, 1])
    with pytest.raises(ValueError, match=says) as caught:
        read_llava_style(write(tmp_path / "rows.json", [row, {**row, **change}]))
    assert "row 1" in str(caught.value)


def test_box_files(tmp_path):
    content = {"scannet/scene0900_00": [[0, 0, 0, 1, 2, 3], [1, 1, 1, 1, 1, 1]], "scannet/scene0901_00": []}
    proposals = read_box_file(write(tmp_path / "boxes.json", content))
    assert proposals["scene0900_00"].boxes_annotation.tolist() == content["scannet/scene0900_00"]
    assert proposals["scene0901_00"].boxes_annotation.shape == (0, 6)
    for bad in ({"scannet/scene0900_00": [[0, 0, 0, 1, 2]]}, {"scannet/scene0900_00": [[0, 0, 0, 1, 2, -3]]}, [1]):
        with pytest.raises(ValueError, match="wanted"):
            read_box_file(write(tmp_path / "boxes.json", bad))


def test_masks_become_boxes_around_aligned_vertices(tmp_path):
    official.write_scan(tmp_path, official.SCENES[0])
    folder = tmp_path / "scans" / official.SCENES[0]
    objects = load_scene_objects(folder)
    masks = np.stack([objects.instance_labels == 3, np.zeros(33, bool), objects.instance_labels == 1]).astype(np.uint8)
    path = tmp_path / f"{official.SCENES[0]}.mask.npz"
    sparse.save_npz(path, sparse.csr_matrix(masks))
    proposals = read_mask_proposals(path, folder)
    assert proposals.scene_id == official.SCENES[0]
    assert proposals.ids.tolist() == [0, 2]
    assert proposals.num_empty == 1
    np.testing.assert_allclose(
        proposals.boxes_annotation, [official.expected_box(2), official.expected_box(0)], atol=1e-6
    )
    assert len(read_mask_proposals(path, vertices_annotation=objects.vertices_annotation, max_masks=1)) == 1
    with pytest.raises(ValueError, match="5 vertices; got 33 columns"):
        read_mask_proposals(path, vertices_annotation=np.zeros((5, 3)))
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="sparse matrix"):
        read_mask_proposals(path, folder)
    with pytest.raises(FileNotFoundError):
        read_mask_proposals(tmp_path / "none.npz", folder)


def test_llava3d_files(tmp_path):
    answers = read_llava3d_answers(
        write(
            tmp_path / "a.json", [{"question_id": 5, "text": ["bed"]}, {"question_id": "q", "text": ["x"], "type": 3}]
        )
    )
    assert answers == {
        "5": {"answers": ["bed"], "question_type": None},
        "q": {"answers": ["x"], "question_type": "can"},
    }
    human = {"from": "human", "value": "<video>\nThe related objects are located at <boxes>. Same?"}
    rows = [
        {"id": 5, "video": "scannet/scene0900_00", "conversations": [{"from": "human", "value": "<video>\nWhat?"}]},
        {"id": "q", "video": "scannet/scene0901_00", "conversations": [human, {"from": "gpt", "value": ["Yes."]}],
         "target": {"boxes": [[0, 0, 1], [2, 1, 0.5, 1, 1, 1]]}},
    ]  # fmt: skip
    for text in (json.dumps(rows), "\n".join(map(json.dumps, rows))):
        first, second = read_llava3d_questions(write(tmp_path / "q.json", text), answers, split="val")
        assert (first.answers, first.has_reply) == (("bed",), False)
        assert second.points.tolist() == [[0, 0, 1], [2, 1, 0.5]]
        assert [block["type"] for block in second.messages[0]["content"]] == [
            "video",
            "text",
            "point",
            "point",
            "text",
        ]
        assert second.question_type == "can"
    with pytest.raises(ValueError, match=r"line 1.*'id'"):
        read_llava3d_questions(tmp_path / "q.json", {})
    with pytest.raises(ValueError, match=r"row 1.*'question_id'"):
        read_llava3d_answers(write(tmp_path / "a.json", [{"question_id": 5, "text": ["bed"]}] * 2))
