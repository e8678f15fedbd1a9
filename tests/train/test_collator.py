"""The collator: every task in one batch through the model, labels on the assistant's tokens, targets in the right frames, keyed draws."""

import dataclasses
import json
import time

import benchmark_files as official
import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from vidllm.modeling_vidllm.geometry_vidllm import (
    START_ROOM_FROM_CAM,
    box_iou,
    boxes_annotation_from_room,
    boxes_room_from_annotation,
    project_points,
    rotation_angle_rad,
    transform_points,
)
from vidllm.processing.benchmarks import load_benchmark
from vidllm.processing.benchmarks.proposals import SceneProposals
from vidllm.processing.rooms.write import write_rooms
from vidllm.processing.samples import Sample
from vidllm.processing.video_reading_vidllm import VidLLMInputError
from vidllm.train.collator import (
    IGNORED_LABEL,
    VidLLMCollator,
    box_text,
    boxes_for_text,
    keyed_generator,
    model_inputs,
)
from vidllm.train.initialise import build_untrained


pytestmark = pytest.mark.filterwarnings("ignore:.*rows without boxes")


@pytest.fixture(scope="module")
def tiny():
    return build_untrained("vidllm-tiny")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """One sample of every task, of two scans and a clip without poses, by name."""
    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("data")
    root = official.write_root(folder / "root", invalid_frames=(2,))
    (folder / "mine" / "clip").mkdir(parents=True)
    for number in range(2):
        Image.fromarray(np.full((80, 48, 3), 90 * number, dtype=np.uint8)).save(
            folder / "mine" / "clip" / f"{number}.png"
        )
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello <loc>?"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": [{"type": "text", "text": "Where are "}, {"type": "point"}, {"type": "point"}]},
        {"role": "assistant", "content": "There, <video> and there."},
    ]
    line = {"video": "clip", "messages": turns, "points": [[0, 0, 1], [1, 0, 2.5]]}
    boxes = {
        "video": "clip", "task": "ground", "box_frame": "room", "room_from_world": [[1, 0, 0], [0, 0, 1], [0, -1, 0]],
        "messages": [turns[1], {"role": "assistant", "content": [{"type": "text", "text": "Two: "}, {"type": "box"}, {"type": "box"}]}],
        "boxes": [[[0, 1, 0, 1, 1, 1], [0, 2, 0, 1, 2, 1]], [[1, 3, 0, 0.5, 0.5, 1]]],
    }  # fmt: skip
    (folder / "mine" / "chat.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(boxes))
    load = lambda *args: [Sample.from_row(row) for row in load_benchmark(*args, cache_dir=folder / "cache")]  # noqa: E731
    chat, two_boxes = load("jsonl", folder / "mine" / "chat.jsonl", "train")
    return {
        "qa": load("scanqa", root, "val")[0],
        "ground": load("scanrefer", root, "val")[1],
        "sqa": load("sqa3d", root, "test")[1],
        "caption": load("scan2cap", root, "val")[0],
        "chat": chat,
        "two_boxes": two_boxes,
        "hidden": load("scanqa", root, "test_wo_obj")[0],
        "absent": load("scan2cap", root, "val")[4],
    }


ALL = ("qa", "ground", "sqa", "caption", "chat", "two_boxes")


@pytest.fixture(scope="module")
def batch(tiny, samples):
    return VidLLMCollator(tiny[1], num_frames=4, given_geometry=1.0)([samples[name] for name in ALL])


def test_every_task_goes_through_the_model_in_one_batch(tiny, batch):
    model = tiny[0]
    model.zero_grad()
    output = model(**model_inputs(batch))
    assert torch.isfinite(output.loss)
    assert output.grounding.boxes.shape[0] == 3  # one <loc> of ScanRefer's prompt, two of our own
    assert output.loc_index[:, 0].tolist() == [1, 5, 5]
    (output.loss + output.grounding.boxes.square().mean()).backward()
    assert model.lm_head.weight.grad.abs().sum() > 0
    assert (
        model.model.point_embedding.get_parameter(
            next(iter(dict(model.model.point_embedding.named_parameters())))
        ).grad
        is not None
    )


def test_samples_of_a_scene_share_a_video(batch, samples):
    assert batch["scene_index"].tolist() == [0, 0, 1, 0, 2, 2]
    assert batch["pixel_values_videos"].shape[0] == 3
    assert batch["sample_ids"] == [samples[name].sample_id for name in ALL]
    # the scans' frame 2 has no valid pose; the clip has two upright frames
    assert batch["video_size_shw"][:, 0].tolist() == [4, 4, 2]
    assert batch["video_size_shw"][2, 1] > batch["video_size_shw"][2, 2]


def test_labels_cover_exactly_the_assistants_tokens(tiny, batch, samples):
    processor = tiny[1]
    tokenizer = processor.tokenizer
    wanted = {
        "qa": ["bed"], "ground": ["<loc>"], "sqa": ["yes"], "caption": ["this is a low table. it is right of the bed."],
        "chat": ["Hello.", "There, <video> and there."], "two_boxes": ["Two: <loc><loc>"],
    }  # fmt: skip
    end = tokenizer.encode("<|im_end|>\n", add_special_tokens=False)
    for row, name in enumerate(ALL):
        ids, labels = batch["input_ids"][row].tolist(), batch["labels"][row].tolist()
        learned = [index for index, label in enumerate(labels) if label != IGNORED_LABEL]
        assert all(ids[index] == labels[index] for index in learned)
        assert all(batch["attention_mask"][row, learned] == 1)
        runs = np.split(learned, np.flatnonzero(np.diff(learned) > 1) + 1)
        assert [tokenizer.decode([ids[i] for i in run[: -len(end)]]) for run in runs] == wanted[name]
        assert all([ids[i] for i in run[-len(end) :]] == end for run in runs)
        # each run follows the head of an assistant's turn
        head = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
        assert all(ids[run[0] - len(head) : run[0]] == head for run in runs)
    loc = processor.loc_token_id
    # a user's "<loc>" is text; an assistant's box is the token, and is learned
    assert (batch["input_ids"] == loc).sum(dim=1).tolist() == [0, 1, 0, 0, 0, 2]
    assert (batch["labels"] == loc).sum() == 3
    videos = (batch["input_ids"] == processor.video_token_id).sum(dim=1)
    assert videos.tolist() == [processor.num_scene_tokens] * len(ALL)


def test_boxes_as_text_are_read_back_where_the_annotation_says(tiny, samples, batch):
    processor = tiny[1]
    rows = [samples[name] for name in ALL]
    written = VidLLMCollator(processor, num_frames=4, box_output="text")(rows)
    assert (written["input_ids"] == processor.loc_token_id).sum() == 0
    # all but the assistant's boxes is as before
    for name in ("qa", "sqa", "caption", "chat"):
        row = ALL.index(name)
        ids = [b["input_ids"][row][b["attention_mask"][row] == 1].tolist() for b in (batch, written)]
        assert ids[0] == ids[1]
    assert all(torch.equal(written["targets"][key], batch["targets"][key]) for key in batch["targets"])
    for name, num_boxes in (("ground", 1), ("two_boxes", 3)):
        row = ALL.index(name)
        text = processor.tokenizer.decode(written["labels"][row][written["labels"][row] != IGNORED_LABEL])
        assert text.startswith("Two: [" if name == "two_boxes" else "[")
        found = processor.parse_box_text(text)[None].double()
        assert found.shape == (1, num_boxes, 6)
        matrix = batch["targets"]["annotation_from_world"][batch["scene_index"][row]][None].double()
        true = torch.tensor(samples[name].boxes_annotation)[None]
        # what a model reads whose rotation has become one of the true headings, and stayed near its start
        room = boxes_for_text(samples[name].boxes_annotation, matrix[0].numpy())
        torch.testing.assert_close(found[0], torch.from_numpy(room), atol=0.0051, rtol=0)
        start = torch.tensor(START_ROOM_FROM_CAM, dtype=torch.float64)
        headings = [
            torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1.0]], dtype=torch.float64) @ matrix[0, :3, :3]
            for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))
        ]
        nearest = min(headings, key=lambda heading: float(rotation_angle_rad(heading, start)))
        back = boxes_annotation_from_room(found, matrix, nearest[None])
        torch.testing.assert_close(back, true, atol=0.0051, rtol=0)
        assert (box_iou(back, true).diagonal(dim1=-2, dim2=-1) > 0.95).all()
    output = tiny[0](**model_inputs(written))
    assert torch.isfinite(output.loss)


def test_text_boxes_of_a_tilted_first_camera_are_along_the_rooms_axes():
    # The first camera looks 30 degrees down, its heading 20 degrees off a wall: a box on the floor keeps its edges, and z is up.
    down, off = np.radians(30), np.radians(20)
    world_from_level = np.array([[1, 0, 0], [0, np.cos(down), -np.sin(down)], [0, np.sin(down), np.cos(down)]])
    level_from_room = np.array(START_ROOM_FROM_CAM).T
    turn = np.array([[np.cos(off), -np.sin(off), 0], [np.sin(off), np.cos(off), 0], [0, 0, 1]])
    matrix = np.eye(4)
    matrix[:3, :3] = (world_from_level.T @ level_from_room @ turn).T
    matrix[:3, 3] = [4.0, 3.0, 1.5]
    box = np.array([[4.0, 5.0, 0.4, 1.2, 0.5, 0.8]])
    room = boxes_for_text(box, matrix)
    np.testing.assert_allclose(room, [[0.0, 2.0, -1.1, 1.2, 0.5, 0.8]], atol=1e-9)
    # facing the other wall, the long edge lies along y
    quarter = np.eye(4)
    quarter[:2, :2] = [[0, -1], [1, 0]]
    np.testing.assert_allclose(boxes_for_text(box, quarter @ matrix)[:, 3:], [[0.5, 1.2, 0.8]])


def test_box_text(tiny):
    boxes = np.array([[1.131, -1.64, -0.001, 0.92, 0.0, 1.164], [0, 12.344, -3.5, 1, 2, 3]])
    text = box_text(boxes)
    assert text == "[1.13, -1.64, 0.00, 0.92, 0.01, 1.16], [0.00, 12.34, -3.50, 1.00, 2.00, 3.00]"
    found = tiny[1].parse_box_text(text)
    np.testing.assert_allclose(found, np.maximum(boxes, [[-99, -99, -99, 0.01, 0.01, 0.01]]), atol=0.0051)
    assert box_text(np.zeros((0, 6))) == "[]"
    assert tiny[1].parse_box_text("[]").shape == (0, 6)
    for bad in (np.zeros(6), np.zeros((2, 7)), np.full((1, 6), np.nan)):
        with pytest.raises(ValueError, match=r"shape \(M, 6\)"):
            box_text(bad)


def test_boxes_that_cannot_be_written_are_an_error(tiny, samples):
    collator = VidLLMCollator(tiny[1], num_frames=2, box_output="text")
    unknown = dataclasses.replace(samples["ground"], boxes_annotation=None, box_block=())
    with pytest.raises(ValueError, match=rf"{samples['ground'].sample_id.split('|')[0]}.*wanted boxes, because"):
        collator([unknown])
    nothing_there = dataclasses.replace(samples["ground"], boxes_annotation=np.zeros((0, 6)), box_block=())
    labels = collator([nothing_there])["labels"][0]
    assert tiny[1].tokenizer.decode(labels[labels != IGNORED_LABEL]).startswith("[]")
    clip = dataclasses.replace(samples["ground"], video=samples["chat"].video, data_root=samples["chat"].data_root)
    with pytest.raises(ValueError, match="annotation_from_world"):
        collator([clip])
    with pytest.raises(ValueError, match="box_output decoder or text"):
        VidLLMCollator(tiny[1], box_output="words")


def test_prompts_for_generation(tiny, samples, batch):
    prompts = VidLLMCollator(tiny[1], num_frames=4, with_replies=False)([samples["hidden"], samples["caption"]])
    assert "labels" not in prompts
    assert prompts["attention_mask"][:, -1].tolist() == [1, 1]
    text = tiny[1].tokenizer.decode(prompts["input_ids"][1])
    assert text.endswith("<|im_start|>assistant\n")
    row = ALL.index("caption")
    start = int((batch["labels"][row] != IGNORED_LABEL).nonzero()[0])
    kept = prompts["input_ids"][1][prompts["attention_mask"][1] == 1]
    assert kept.tolist() == batch["input_ids"][row, :start].tolist()


def test_points_and_boxes_are_in_the_world(batch, samples):
    targets = batch["targets"]
    assert batch["coord_mask"].tolist() == [[False, False]] * 3 + [[True, False], [True, True], [False, False]]
    matrix = targets["annotation_from_world"]
    row = ALL.index("caption")
    centre = torch.tensor(official.expected_box(1)[:3])
    torch.testing.assert_close(
        transform_points(matrix[0].double(), batch["coord_points_world"][row, :1].double())[0],
        centre.double(),
        atol=1e-5,
        rtol=0,
    )
    assert batch["coord_points_world"][4].tolist() == [[0, 0, 1], [1, 0, 2.5]]

    assert targets["box_mask"].sum(dim=1).tolist() == [0, 1, 0, 0, 0, 3]
    assert targets["box_block"][5].tolist() == [0, 0, 1]
    assert targets["annotation_mask"].tolist() == [True, True, True]
    torch.testing.assert_close(targets["boxes_annotation"][1, 0], torch.tensor(official.expected_box(2)).float())
    # the same box by the model's own geometry: to the room and back, and its centre in the world
    room_from_world = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]).expand(6, 3, 3)
    per_prompt = matrix[batch["scene_index"]]
    room = boxes_room_from_annotation(targets["boxes_annotation"], per_prompt, room_from_world)
    centres = transform_points(room_from_world, targets["boxes_world"][..., :3])
    mask = targets["box_mask"]
    torch.testing.assert_close(room[..., :3][mask], centres[mask], atol=1e-4, rtol=0)
    back = boxes_annotation_from_room(room, per_prompt, room_from_world)
    torch.testing.assert_close(back[mask], targets["boxes_annotation"][mask], atol=1e-4, rtol=0)


def test_true_cameras_and_depth_fit_the_models_pixels(batch):
    targets = batch["targets"]
    assert targets["camera_mask"].tolist() == [True, True, False]
    assert targets["depth_mask"].tolist() == [True, True, False]
    assert torch.equal(targets["cam_from_world"][:, 0], torch.eye(4).expand(3, 4, 4))
    frames, height, width = batch["video_size_shw"][0].tolist()
    # frames 0, 1, 3, 5 have poses: the fourth stands 1 m to the right of the first
    torch.testing.assert_close(targets["cam_from_world"][0, 3, :3, 3], torch.tensor([-1.0, 0, 0]), atol=1e-5, rtol=0)
    depth = targets["depth_m"][0, :frames, :height, :width]
    assert [round(float(d[height // 2, 3]), 3) for d in depth] == [1.0, 1.1, 1.3, 1.5]
    assert (targets["depth_m"][2] == 0).all()
    # a point straight ahead lies in the middle, also after resize and crop
    ahead = torch.tensor([[0.0, 0.0, 2.0]])
    pixels, _ = project_points(ahead, targets["intrinsics_px"][0, 0], targets["cam_from_world"][0, 0])
    torch.testing.assert_close(pixels[0], torch.tensor([width / 2, height / 2]), atol=0.51, rtol=0)


def test_given_geometry_is_drawn_per_scene_and_needs_all_of_it(tiny, samples, batch):
    assert batch["geometry"]["mask"].tolist() == [True, True, False]
    assert set(batch["geometry"]) == {"cam_from_world", "intrinsics_px", "depth_m", "mask"}
    scene = tiny[0].model(**{k: v for k, v in model_inputs(batch).items() if k != "labels"}).scene
    torch.testing.assert_close(
        scene.reconstruction.cam_from_world[:2], batch["targets"]["cam_from_world"][:2], atol=1e-4, rtol=1e-4
    )
    collator = VidLLMCollator(tiny[1], num_frames=2, given_geometry=0.5, depth=False)
    drawn = []
    for epoch in range(12):
        collator.set_epoch(epoch)
        one = collator([samples["qa"]])["geometry"]["mask"].tolist()
        assert collator([samples["sqa"], samples["caption"]])["geometry"]["mask"].tolist()[1:] == one
        drawn += one
    assert 0 < sum(drawn) < 12
    assert "geometry" not in VidLLMCollator(tiny[1], num_frames=2)([samples["qa"]])


def test_proposals_come_in_the_frame_in_which_they_are_given(tiny, samples, batch):
    model, processor = tiny
    generator = np.random.default_rng(4)
    scene_ids = [samples[name].scene_id for name in ("ground", "sqa", "two_boxes")]
    known = {
        scene_id: np.concatenate([generator.normal(size=(count, 3)), generator.random((count, 3)) + 0.2], axis=1)
        for scene_id, count in zip(scene_ids, (4, 1, 2), strict=True)
    }
    collator = VidLLMCollator(processor, num_frames=4, given_geometry=1.0, proposals=SceneProposals(known, "here"))
    with_proposals = collator([samples[name] for name in ALL])
    assert with_proposals["proposal_mask"].tolist() == [[True] * 4, [True] + [False] * 3, [True] * 2 + [False] * 2]
    for row, scene_id in enumerate(scene_ids):
        count = len(known[scene_id])
        np.testing.assert_allclose(with_proposals["proposal_boxes"][row, :count], known[scene_id], rtol=1e-6)
    annotation_from_world = with_proposals["annotation_from_world"]
    assert torch.equal(annotation_from_world, batch["targets"]["annotation_from_world"])

    inputs = {name: value for name, value in model_inputs(with_proposals).items() if name != "labels"}
    with torch.no_grad():
        got = model(**inputs)
        room = boxes_room_from_annotation(
            inputs["proposal_boxes"], annotation_from_world, got.scene.reconstruction.room_from_world
        )
        wanted = model(**{**inputs, "annotation_from_world": None, "proposal_boxes": room})
    video = got.scene_index[got.loc_index[:, 0]]
    torch.testing.assert_close(
        got.grounding.boxes[0, :4], room[video[0]] * got.scene.position_scale[video[0]], atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(got.grounding.match_logits, wanted.grounding.match_logits, atol=1e-5, rtol=1e-5)
    assert got.grounding.query_mask.tolist() == [[True] * 4, [True] * 2 + [False] * 2, [True] * 2 + [False] * 2]


def test_a_scene_that_is_asked_for_boxes_needs_proposals(tiny, samples):
    of_another = SceneProposals({samples["sqa"].scene_id: np.ones((2, 6))}, "some.json")
    collator = VidLLMCollator(tiny[1], num_frames=4, proposals=of_another)
    with pytest.raises(VidLLMInputError, match=r"wanted proposals of scene .* some\.json has none"):
        collator([samples["sqa"], samples["ground"]])
    # Questions need none, nor does a scene whose annotation frame nobody knows.
    batch = collator([samples["qa"], samples["chat"]])
    assert batch["proposal_boxes"].shape == (2, 0, 6)
    assert batch["proposal_mask"].shape == (2, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"annotation_from_world": torch.eye(4)[None]}, "annotation_from_world: wanted together with proposal_boxes"),
        (
            {"annotation_from_world": torch.eye(4)[None].repeat(2, 1, 1), "proposal_boxes": torch.ones(1, 3, 6)},
            r"annotation_from_world: wanted shape \(1, 4, 4\), one per video; got \(2, 4, 4\)",
        ),
    ],
)
def test_a_frame_of_nothing_is_refused(tiny, samples, change, words):
    inputs = model_inputs(VidLLMCollator(tiny[1], num_frames=2)([samples["ground"]]))
    with pytest.raises(ValueError, match=words):
        tiny[0](**inputs, **change)


def test_draws_depend_on_seed_epoch_and_name_alone(tiny, samples):
    long = dataclasses.replace(samples["qa"], answers=tuple("abcdefgh"))
    make = lambda seed: VidLLMCollator(tiny[1], num_frames=3, frame_choice="random", reply_choice="random", seed=seed)  # noqa: E731

    def drawn(collator, rows, which):
        batch = collator(rows)
        return (
            batch["labels"][which][batch["labels"][which] >= 0].tolist(),
            batch["pixel_values_videos"][batch["scene_index"][which]].sum().item(),
            batch["scale_frames"][batch["scene_index"][which]].tolist(),
        )

    alone, among = drawn(make(0), [long], 0), drawn(make(0), [samples["sqa"], samples["ground"], long], 2)
    assert alone == among
    other = make(0)
    epochs = []
    for epoch in range(6):
        other.set_epoch(epoch)
        epochs.append(drawn(other, [long], 0))
    assert epochs[0] == alone
    assert len({str(e[0]) for e in epochs}) > 1
    assert len({e[1] for e in epochs}) > 1
    assert keyed_generator(0, 1, "a", "b").random() != keyed_generator(0, 1, "a b").random()


def test_scale_frames_are_rising_and_within_each_video(tiny, samples, batch):
    assert batch["scale_frames"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, -1, -1]]


def test_a_new_epoch_reaches_living_workers(tiny, samples):
    collator = VidLLMCollator(tiny[1], num_frames=3, frame_choice="random")
    rows = [samples["qa"].to_row()] * 2
    loader = torch.utils.data.DataLoader(rows, num_workers=1, collate_fn=collator, persistent_workers=True)
    sums = set()
    for epoch in range(5):
        collator.set_epoch(epoch)
        sums |= {round(batch["pixel_values_videos"].sum().item(), 3) for batch in loader}
    assert len(sums) > 1


@pytest.mark.slow
def test_samples_per_second(tmp_path, capsys):
    """What the loader and the collator make of rooms in a second; to be read with `-s`, on idle cores."""
    write_rooms(tmp_path / "root", 16, seed=0, difficulty="standard", size_hw=(96, 128))
    names = ("scanqa", "sqa3d", "scanrefer", "scan2cap")
    loaded = [load_benchmark(name, tmp_path / "root", "train", cache_dir=tmp_path / "cache") for name in names]
    rows = [row for benchmark in loaded for row in benchmark]
    collator = VidLLMCollator(build_untrained("vidllm-nano")[1])
    wanted = sorted(row["sample_id"] for row in rows)
    with capsys.disabled():
        print(
            f"\n{len(rows)} samples of 16 rooms of 96x128, {collator.num_frames} frames, batches of 8 in the files' order"
        )
        for num_workers in (0, 1, 2):
            loader = torch.utils.data.DataLoader(
                rows, batch_size=8, num_workers=num_workers, collate_fn=collator, persistent_workers=num_workers > 0
            )
            next(iter(loader))  # the processes start
            start = time.perf_counter()
            seen = [name for batch in loader for name in batch["sample_ids"]]
            seconds = time.perf_counter() - start
            print(f"{num_workers} workers: {len(seen) / seconds:.1f} samples/s")
            assert sorted(seen) == wanted


def test_what_cannot_be_used_is_an_error_that_names_the_sample(tiny, samples, tmp_path):
    collator = VidLLMCollator(tiny[1], num_frames=2)
    with pytest.raises(ValueError, match=rf"{samples['hidden'].sample_id}: wanted a reply"):
        collator([samples["hidden"]])
    with pytest.raises(ValueError, match="scene0950_00"):
        collator([samples["absent"]])
    posed = dataclasses.replace(samples["ground"], video=samples["chat"].video, data_root=samples["chat"].data_root)
    with pytest.raises(ValueError, match="annotation_from_world"):
        collator([posed])
    with pytest.raises(ValueError, match="at least one sample"):
        collator([])
    with pytest.raises(ValueError, match="reply_choice"):
        VidLLMCollator(tiny[1], reply_choice="best")
