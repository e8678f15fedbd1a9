"""Perfect predictions score the maximum of every metric, shuffled ones near its floor, under every protocol."""

import numpy as np
import pytest

from vidllm.eval.metrics.camera_pose import scores as camera_pose
from vidllm.eval.metrics.camera_pose.trajectory import trajectory_scores
from vidllm.eval.metrics.depth import scores as depth
from vidllm.eval.metrics.metric_scale.scores import metric_scale_scores
from vidllm.eval.metrics.point_map.scores import normal_consistency, point_scores
from vidllm.eval.metrics.scan2cap.captions import CAPTION_PROTOCOLS, CaptionedObject, caption_scores
from vidllm.eval.metrics.scan2cap.scores import scan2cap_scores
from vidllm.eval.metrics.scan2cap.toolbox import BOX_ORDER, SceneCaptions, toolbox_scores
from vidllm.eval.metrics.scanqa import scores as scanqa
from vidllm.eval.metrics.scanrefer.scores import scanrefer_scores
from vidllm.eval.metrics.sqa3d import scores as sqa3d
from vidllm.eval.metrics.text_scorers import java_obstacle
from vidllm.eval.metrics.vsi_bench.scores import LETTER_TASKS, NUMBER_TASKS, vsi_bench_scores


needs_java = pytest.mark.skipif(java_obstacle() is not None, reason=f"text scores: {java_obstacle()}")
# Forty answers without a word in common.
ANSWERS = [" ".join(f"word{letter}{number}" for letter in "abcde") for number in range(100, 140)]
SHUFFLED = ANSWERS[7:] + ANSWERS[:7]
NGRAMS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l")


@needs_java
@pytest.mark.parametrize("protocol", scanqa.PROTOCOLS)
def test_scanqa(protocol):
    # ScanQA's cleaning takes the last digit off a word, so the words are told apart by letters
    spelled = str.maketrans("0123456789", "qrstuvwxyz")
    said, other = ([text.translate(spelled) for text in texts] for texts in (ANSWERS, SHUFFLED))
    best = scanqa.scanqa_scores(said, [[text] for text in said], protocol=protocol, text=True)
    floor = scanqa.scanqa_scores(other, [[text] for text in said], protocol=protocol, text=True)
    assert set(best) == set(floor)
    assert best["cider"] == pytest.approx(10.0, rel=1e-6)
    assert floor["cider"] < 0.01
    for name in set(best) - {"cider"}:
        assert best[name] == pytest.approx(1.0, abs=1e-3), name
        assert floor[name] < 0.05, name


@pytest.mark.parametrize("protocol", sqa3d.PROTOCOLS)
def test_sqa3d(protocol):
    right = [f"{sign}{sign}{sign}" for sign in "bcdefghijklmnopqrstuvwxyz"]
    assert set(sqa3d.sqa3d_scores(right, right, protocol=protocol).values()) == {1.0}
    assert set(sqa3d.sqa3d_scores(right[3:] + right[:3], right, protocol=protocol).values()) == {0.0}


def test_scanrefer():
    rng = np.random.default_rng(0)
    boxes = np.concatenate([rng.uniform(-10, 10, (200, 3)), rng.uniform(0.3, 1.5, (200, 3))], axis=1)
    kinds = ["unique" if number % 3 else "multiple" for number in range(200)]
    assert set(scanrefer_scores(boxes, boxes, kinds).values()) == {1.0}
    assert max(scanrefer_scores(boxes[rng.permutation(200)], boxes, kinds).values()) < 0.05
    assert set(scanrefer_scores([None] * 200, boxes, kinds).values()) == {0.0}


def objects_of(said, iou=0.9):
    return [
        CaptionedObject(f"scene|{number}|thing", (text,), (tuple(text.split()),), caption, iou=iou)
        for number, (text, caption) in enumerate(zip(ANSWERS, said, strict=True))
    ]


@needs_java
@pytest.mark.parametrize("protocol", CAPTION_PROTOCOLS)
def test_captions_of_objects(protocol):
    best, floor = caption_scores(objects_of(ANSWERS), protocol), caption_scores(objects_of(SHUFFLED), protocol)
    missed, nothing = (
        caption_scores(objects_of(ANSWERS, iou=0.1), protocol),
        caption_scores(objects_of([""] * 40), protocol),
    )
    for name in set(NGRAMS) & set(best):
        assert best[name] == pytest.approx(1.0, abs=1e-3), name
        # "sos" and "eos" are right whatever is said
        assert floor[name] < 0.4, name
        assert missed[name] == pytest.approx(nothing[name], abs=0.05), name
        assert missed[name] < best[name] - 0.4
    assert best["cider"] > 9
    assert floor["cider"] < 0.5
    assert (best["objects_with_caption"], missed["objects_with_caption"]) == (40.0, 0.0)


@needs_java
def test_the_toolbox():
    corners = np.stack([np.array(BOX_ORDER) / 2 + [3.0 * number, 0, 0] for number in range(40)])
    between = [f"sos {text} eos" for text in ANSWERS]
    right = SceneCaptions(tuple((text,) for text in between), corners, tuple(between), corners)
    wrong = SceneCaptions(right.references, corners, tuple(between[7:] + between[:7]), corners)
    far = SceneCaptions(right.references, corners, right.captions, corners + [0, 50, 0])
    best, floor, nothing = (toolbox_scores({"scene": scene}, (0.5,)) for scene in (right, wrong, far))
    for measure in ("precision", "recall", "f1"):
        for name in NGRAMS:
            assert best[f"{name}_{measure}@0.5"] == pytest.approx(1.0, abs=1e-3)
            assert floor[f"{name}_{measure}@0.5"] < 0.4
        if measure != "f1":
            assert nothing[f"cider_{measure}@0.5"] == 0.0


def test_captions_of_rooms():
    objects = [(category, colour) for category in ("chair", "table", "bed") for colour in ("red", "blue", "green")]
    said = [f"a {colour} {category}" for category, colour in objects]
    assert scan2cap_scores(said, objects) == {"category_and_colour": 1.0}
    assert scan2cap_scores(said[1:] + said[:1], objects) == {"category_and_colour": 0.0}


def test_vsi_bench():
    tasks = [task for task in (*LETTER_TASKS, *NUMBER_TASKS) for _ in range(8)]
    true = ["ABCD"[n % 4] if task in LETTER_TASKS else str(4.0**n) for n, task in enumerate(tasks)]
    assert set(vsi_bench_scores(true, true, tasks).values()) == {1.0}
    turned = [(true[n + 1] if task == after else true[n - 7]) for n, (task, after) in enumerate(zip(tasks, [*tasks[1:], None], strict=True))]  # fmt: skip
    assert max(vsi_bench_scores(turned, true, tasks).values()) <= 0.01


def rotations(rng, count):
    matrices, _ = np.linalg.qr(rng.normal(size=(count, 3, 3)))
    return matrices * np.sign(np.linalg.det(matrices))[:, None, None]


@pytest.mark.parametrize("protocol", camera_pose.PROTOCOLS)
def test_camera_pose(protocol):
    rng = np.random.default_rng(1)
    true = np.tile(np.eye(4), (12, 1, 1))
    true[:, :3, :3], true[:, :3, 3] = rotations(rng, 12), rng.normal(size=(12, 3))
    best = camera_pose.camera_pose_scores(true, true, protocol)
    assert (best["auc_30"], best["rra_30"], best["rta_30"]) == (1.0, 1.0, 1.0)
    assert best["ate_m"] == pytest.approx(0, abs=1e-9)
    assert max(trajectory_scores(true, true, "sim3").values()) == pytest.approx(0, abs=1e-5)
    shuffled = np.roll(true, 5, axis=0)
    floor = camera_pose.camera_pose_scores(shuffled, true, protocol)
    assert floor["auc_30"] < 0.05
    assert floor["ate_m"] > 0.5
    assert trajectory_scores(shuffled, true, "sim3")["rpe_rot_deg"] > 60


@pytest.mark.parametrize("protocol", depth.PROTOCOLS)
def test_depth(protocol):
    rng = np.random.default_rng(2)
    true = rng.uniform(0.5, 8, (3, 20, 30))
    best = depth.depth_errors(true, true, protocol)
    assert best.pop("valid_pixels") == true.size
    wanted = {"abs_rel": 0, "sq_rel_m": 0, "rmse_m": 0, "log_rmse": 0, "delta_1": 1, "delta_2": 1, "delta_3": 1}
    assert best == pytest.approx(wanted, abs=1e-9)
    floor = depth.depth_errors(rng.permutation(true.reshape(-1)).reshape(true.shape), true, protocol)
    assert floor["abs_rel"] > 0.5
    assert floor["delta_1"] < 0.4


def test_point_map_and_scale():
    rng = np.random.default_rng(3)
    cloud = rng.uniform(0, 4, (1500, 3))
    best = point_scores(cloud, cloud)
    assert (best["fscore"], best["precision"], best["recall"], best["chamfer"]) == (1.0, 1.0, 1.0, 0.0)
    floor = point_scores(np.stack([rng.permutation(column) for column in cloud.T], axis=1), cloud)
    assert floor["fscore"] < 0.05
    normals = rotations(rng, 1500)[:, 0]
    assert normal_consistency(cloud, normals, cloud, -normals)["normals"] == pytest.approx(1.0)
    # directions at random: the mean of |cosine| is one half
    assert normal_consistency(cloud, normals, cloud, rng.permutation(normals))["normals"] == pytest.approx(
        0.5, abs=0.03
    )
    mask, frame = np.ones(1500, dtype=bool), np.eye(4)
    frame[:3, :3] = rotations(rng, 1)[0]
    scores = metric_scale_scores(cloud, cloud, mask, frame[:3, :3], frame)
    assert scores == pytest.approx({"scale_error": 0, "up_error_deg": 0, "heading_error_deg": 0}, abs=1e-5)
    with pytest.raises(ValueError, match="wanted finite true points away from the camera"):
        metric_scale_scores(cloud, np.zeros_like(cloud), mask, frame[:3, :3], frame)
