"""Rooms made on the fly: the same prompts and targets as from files, in an order that nothing but the seed decides."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from vidllm.processing.benchmarks.load import load_benchmark
from vidllm.processing.rooms.language import compose_split, speak_about
from vidllm.processing.rooms.layout import SPLIT_NUMBERS, make_room
from vidllm.processing.rooms.questions import PATTERNED
from vidllm.processing.rooms.render import visibility
from vidllm.processing.rooms.samples import room_boxes, room_samples
from vidllm.processing.rooms.scene_graph import SceneGraph
from vidllm.processing.rooms.write import write_rooms
from vidllm.processing.samples import Sample
from vidllm.train.collator import IGNORED_LABEL, model_inputs
from vidllm.train.dense_labels import (
    NOTHING,
    NUM_CATEGORIES,
    NUM_COLOURS,
    DenseLabels,
    RoomCollator,
    label_codes,
    loc_labels,
    patch_labels,
    patch_things,
    patch_weights,
)
from vidllm.train.initialise import build_untrained
from vidllm.train.loc_labels import LocLabels
from vidllm.train.room_source import (
    BACKGROUND,
    CATEGORY_NAMES,
    COLOUR_NAMES,
    PATTERN_NAMES,
    RoomMakers,
    RoomScenes,
    RoomSource,
    RoomsSettings,
    main,
)


SIZE_HW = (28, 42)
SETTINGS = {"num_rooms": 9, "seed": 5, "size_hw": SIZE_HW, "block_size": 3, "first_blocks": 1, "frames_kept": 7}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return RoomSource(RoomsSettings(**SETTINGS), tmp_path_factory.mktemp("rooms"))


def test_samples_equal_those_read_from_files(tmp_path):
    numbers, seed = 3, 4
    write_rooms(tmp_path, numbers, seed, "easy", size_hw=SIZE_HW, video=False)
    rooms = [make_room(seed, 1000 + n, "easy") for n in range(numbers)]
    spoken = [speak_about(SceneGraph(room, visibility(room))) for room in rooms]
    language = compose_split(spoken, seed)
    made = {
        sample.sample_id: sample
        for room, one in zip(rooms, spoken, strict=True)
        for _, sample in room_samples(
            one,
            room_boxes(room),
            [q for q in language.questions if q.scene == one.scene],
            [q for q in language.situated if q.scene == one.scene],
        )
    }
    seen = Counter()
    for name, variant in (
        ("scanqa", "default"),
        ("sqa3d", "default"),
        ("scanrefer", "default"),
        ("scan2cap", "per_description"),
    ):
        numbers_of_scene = Counter()
        for row in load_benchmark(name, tmp_path, "train", variant=variant, cache_dir=tmp_path / "cache"):
            told = Sample.from_row(row)
            if name in ("scanqa", "sqa3d"):
                key = f"{name}/train/{told.scene_id}-{numbers_of_scene[told.scene_id]}"
                numbers_of_scene[told.scene_id] += 1
            else:
                last = told.sample_id.split("|")[-1] if name == "scan2cap" else told.official_id.split("|")[-1]
                key = f"{name}/train/{told.scene_id}|{told.object_ids[0]}|{last}"
            mine = made[key]
            assert (mine.task, mine.messages, mine.question) == (told.task, told.messages, told.question)
            assert mine.answers == told.answers
            if name in ("scanrefer", "scan2cap"):
                np.testing.assert_allclose(mine.boxes_annotation, told.boxes_annotation, atol=2e-5)
                assert mine.object_ids == told.object_ids
            if name == "scan2cap":
                np.testing.assert_allclose(mine.points, told.points, atol=2e-5)
            seen[name] += 1
    assert len(made) == sum(seen.values())
    assert min(seen.values()) > 5


def test_a_visit_depends_on_its_number_alone(source, tmp_path):
    scenes = RoomScenes(source, 12, num_frames=3, prompts_per_scene=6, seed=2)
    other = RoomScenes(RoomSource(RoomsSettings(**SETTINGS), tmp_path), 12, num_frames=3, prompts_per_scene=6, seed=2)
    for visit in (7, 0, 11):
        a, b = scenes[visit], other[visit]
        assert [s.sample_id for s in a.samples] == [s.sample_id for s in b.samples]
        assert a.frames.indices == b.frames.indices
        np.testing.assert_array_equal(np.stack(a.frames.rgb), np.stack(b.frames.rgb))
        np.testing.assert_array_equal(a.instance, b.instance)
    again = RoomScenes(source, 12, num_frames=3, prompts_per_scene=6, seed=3)
    assert again.room_of_visit.tolist() != scenes.room_of_visit.tolist()


def test_some_visits_have_frames_spread_evenly_and_the_others_stay_as_they_were(source):
    def visits(share):
        other = RoomSource(RoomsSettings(**SETTINGS, even_share=share), source.cache_dir)
        return RoomScenes(other, 60, num_frames=3, prompts_per_scene=1, seed=2)

    drawn = [[tuple(scenes[visit].frames.indices) for visit in range(60)] for scenes in map(visits, (0.0, 0.5, 1.0))]
    assert set(drawn[2]) == {(0, 3, 6)}
    assert (
        15 < sum(indices == (0, 3, 6) for indices in drawn[1]) - sum(indices == (0, 3, 6) for indices in drawn[0]) < 45
    )
    # one of each stretch: 0-1, 2-3, 4-6
    assert all(a < 2 <= b < 4 <= c for a, b, c in drawn[0])
    assert len(set(drawn[0])) > 6


def test_plain_prompts_come_beside_the_others_and_are_of_the_same_video(source):
    _, processor = build_untrained("vidllm-tiny")
    plain = RoomSource(RoomsSettings(**SETTINGS, plain_prompts=2), source.cache_dir)
    with_them, without = (RoomScenes(made, 20, num_frames=3, prompts_per_scene=5, seed=2) for made in (plain, source))
    added, visits = [], []
    for visit in range(20):
        mine, other = with_them[visit], without[visit]
        count = len(other.samples)
        assert [s.sample_id for s in mine.samples[:count]] == [s.sample_id for s in other.samples]
        np.testing.assert_array_equal(np.stack(mine.frames.rgb), np.stack(other.frames.rgb))
        assert len(mine.samples) - count <= 2
        room = source.room(int(without.room_of_visit[visit]))
        boxes = {s.object_ids: s.boxes_annotation for s in room.samples(room.rows) if s.task == "ground"}
        for sample in mine.samples[count:]:
            if sample.task == "ground":
                np.testing.assert_array_equal(sample.boxes_annotation, boxes[sample.object_ids])
        added += mine.samples[count:]
        visits += [mine] if len(mine.samples) > count else []
    assert len(added) > 10
    assert {sample.task for sample in added} == {"qa", "ground"}
    batch = RoomCollator(processor)(visits[:2])
    assert batch["pixel_values_videos"].shape[0] == 2
    assert batch["scene_index"].tolist() == [i for i, visit in enumerate(visits[:2]) for _ in visit.samples]


def test_rooms_come_in_one_block_after_the_other(source):
    scenes = RoomScenes(source, 6000, num_frames=3, prompts_per_scene=6)
    blocks = scenes.room_of_visit // SETTINGS["block_size"]
    assert set(blocks[:100].tolist()) == {0}
    first_seen = [int(np.argmax(blocks == block)) for block in range(3)]
    assert first_seen == sorted(first_seen)
    assert first_seen[-1] < 0.7 * 6000
    counts = np.bincount(scenes.room_of_visit[4300:], minlength=9)
    assert counts.min() > 0.7 * counts.mean()


def test_what_is_seen_lies_in_its_box(source):
    room = source.room(4)
    frames, instance = room.frames([0, 2, 6])
    boxes = {}
    for sample in room.samples(room.rows):
        if sample.task == "ground":
            boxes[sample.object_ids[0]] = sample.boxes_annotation[0]
    assert boxes
    checked = 0
    for frame in range(3):
        rows, columns = np.nonzero(np.isin(instance[frame], list(boxes)))
        depth = frames.depth_m[frame][rows, columns]
        rays = np.stack([columns, rows, np.ones_like(rows)]).astype(float)
        cam = np.linalg.solve(frames.intrinsics_px[frame], rays) * depth
        annotation_from_cam = frames.annotation_from_world @ np.linalg.inv(frames.cam_from_world[frame])
        points = (annotation_from_cam[:3, :3] @ cam).T + annotation_from_cam[:3, 3]
        for point, number in zip(points, instance[frame][rows, columns], strict=True):
            centre, size = boxes[number][:3], boxes[number][3:]
            assert (np.abs(point - centre) <= size / 2 + 0.01).all()
            checked += 1
    assert checked > 30


def test_makers_make_every_block_once(tmp_path):
    source = RoomSource(RoomsSettings(**{**SETTINGS, "makers": 2}), tmp_path)
    with RoomMakers(source) as makers:
        assert makers.process.wait(120) == 0
    names = sorted(path.name for path in tmp_path.glob("block_*"))
    assert names == [f"block_00000{n}.safetensors" for n in range(3)]


def test_makers_end_with_their_caller(tmp_path):
    settings = RoomsSettings(**{**SETTINGS, "num_rooms": 6000, "makers": 1})
    caller = subprocess.Popen([sys.executable, "-c", "pass"])
    caller.wait()
    # The caller is gone already: nothing is made.
    main([json.dumps(asdict(settings)), str(tmp_path), "--caller", str(caller.pid)])
    assert not list(tmp_path.glob("block_*.safetensors"))


def test_another_setting_is_refused_in_the_same_folder(source):
    with pytest.raises(ValueError, match=r"settings\.json: wanted rooms of the settings"):
        RoomSource(RoomsSettings(**{**SETTINGS, "seed": 6}), source.cache_dir)
    # What does not change the rooms is free.
    RoomSource(RoomsSettings(**{**SETTINGS, "jpeg_share": 0.0, "first_blocks": 2}), source.cache_dir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": {"eesy": 1.0}}, "rooms.levels: wanted shares"),
        ({"tasks": {}}, "rooms.tasks: wanted shares"),
        ({"block_size": 0}, "rooms.block_size: wanted at least 1; got 0"),
        ({"unlocked_at": 0.0}, "unlocked_at in"),
        ({"plain_prompts": -1}, "plain_prompts of at least 0"),
        ({"even_share": 1.5}, "even_share in 0..1"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        RoomsSettings(**change)


def test_patch_labels_and_weights_equal_the_loop():
    rng = np.random.default_rng(0)
    instance = rng.choice([0, 1, 2, BACKGROUND], size=(2, 8, 12), p=[0.15, 0.1, 0.1, 0.65]).astype(np.uint8)
    instance[0, :4, :4], instance[1, 4:, 8:], instance[1, :4, 4:8] = 0, 1, 2
    instance[1, 4:, 8:10] = BACKGROUND  # half a thing is left, and counts
    instance[0, 4:, :8] = BACKGROUND
    instance[0, 4, 0] = 2  # one pixel of sixteen is too few to be seen
    labels = np.array([[3, 5, 2], [7, -1, -1], [0, 9, -1]])
    things = patch_things(instance, len(labels), 4)
    got, weights = patch_labels(things, labels), patch_weights(things)
    for frame in range(2):
        wanted = []
        for row in range(2):
            for column in range(3):
                values = instance[frame, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4].ravel().tolist()
                counts = Counter(values)
                most = max(range(3), key=lambda number: counts[number])
                known = IGNORED_LABEL
                if counts[most] / 16 >= 0.3:
                    known = most
                if counts[BACKGROUND] / 16 >= 0.9:
                    known = NOTHING
                wanted.append(known)
        assert things[frame].tolist() == wanted
        for patch, known in enumerate(wanted):
            if known == IGNORED_LABEL:
                assert got[frame, patch].tolist() == [IGNORED_LABEL] * 3
                assert weights[frame, patch] == 0
                continue
            told = [len(CATEGORY_NAMES), -1, -1] if known == NOTHING else labels[known]
            assert got[frame, patch].tolist() == [value if value >= 0 else IGNORED_LABEL for value in told]
            assert weights[frame, patch] == pytest.approx(wanted.count(known) ** -0.5)
    assert got[0, 0].tolist() == [3, 5, 2]
    assert got[1, 5].tolist() == [7, IGNORED_LABEL, IGNORED_LABEL]
    assert got[0, 3].tolist() == got[0, 4].tolist() == [len(CATEGORY_NAMES), IGNORED_LABEL, IGNORED_LABEL]
    assert weights[0, 3] == weights[0, 4] == pytest.approx(2**-0.5)


def test_labels_of_things_are_those_of_the_room(source):
    for number in (0, 4, 8):
        room = source.room(number)
        names = [[CATEGORY_NAMES[c], h, p] for c, h, p in room.object_labels.tolist()]
        level = source.level(number // 3)
        things = make_room(5, SPLIT_NUMBERS["train"][number], level).objects
        assert len(things) == len(names)
        for thing, (category, colour, pattern) in zip(things, names, strict=True):
            assert thing.category == category
            assert (None if colour < 0 else COLOUR_NAMES[colour]) == thing.colour
            if pattern >= 0:
                assert PATTERN_NAMES[pattern] == thing.pattern
                assert thing.kind == "floor"
            else:
                assert thing.colour is None or thing.kind != "floor" or thing.category not in PATTERNED


def test_a_cache_without_patterns_is_not_read(tmp_path):
    RoomSource(RoomsSettings(**SETTINGS), tmp_path)
    note = tmp_path / "settings.json"
    old = json.loads(note.read_text())
    assert old.pop("labels") == ["category", "colour", "pattern"]
    note.write_text(json.dumps(old, sort_keys=True))
    with pytest.raises(ValueError, match="wanted rooms of the settings"):
        RoomSource(RoomsSettings(**SETTINGS), tmp_path)


def test_codes_are_orthonormal_and_the_loss_knows_the_right_class():
    codes = label_codes(64)
    torch.testing.assert_close(codes @ codes.T, torch.eye(len(codes)), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="encoder width of at least"):
        label_codes(16)
    labels = torch.tensor([[[[2, 1, 3], [NUM_CATEGORIES - 1, IGNORED_LABEL, IGNORED_LABEL]]]])
    pattern = codes[NUM_CATEGORIES + NUM_COLOURS + 3]
    tokens = torch.stack([codes[2] + codes[NUM_CATEGORIES + 1] + pattern, codes[NUM_CATEGORIES - 1]])[None, None]
    weights = torch.tensor([[[0.5, 1.0]]])
    batch = {"targets": {"patch_labels": labels, "patch_weights": weights}}
    plugin = DenseLabels()

    def losses(values, batch=batch):
        output = type("Output", (), {"lang_tokens": values})()
        return {name: float(s / n) for name, (s, n) in plugin.terms(output, batch, None).items()}

    good, bad = losses(tokens), losses(tokens.flip(2))
    assert plugin.counts(batch, None) == {"dense_category": 1.5, "dense_colour": 0.5, "dense_pattern": 0.5}
    assert good["dense_category"] < 0.5 < 3 < bad["dense_category"]
    for name in ("dense_colour", "dense_pattern"):
        assert good[name] < 0.5 < bad[name]
    # a weighted mean: of the two patches alone, a half and one
    alone = [
        losses(tokens, {"targets": {"patch_labels": labels, "patch_weights": torch.tensor([[pair]])}})
        for pair in ([1.0, 0.0], [0.0, 1.0])
    ]
    mixed = (0.5 * alone[0]["dense_category"] + alone[1]["dense_category"]) / 1.5
    assert good["dense_category"] == pytest.approx(mixed, rel=1e-5)


def test_loc_labels_are_those_of_the_things_that_prompts_mean(source):
    scenes = RoomScenes(source, 12, num_frames=3, prompts_per_scene=40)
    told = 0
    for visit in range(3):
        scene = scenes[visit]
        labels = loc_labels(scene.samples, [scene.object_labels] * len(scene.samples))
        for sample, (category, colour) in zip(scene.samples, labels.tolist(), strict=True):
            if sample.task != "ground":
                assert category == colour == IGNORED_LABEL
                continue
            meant = scene.object_labels[list(sample.object_ids)]
            assert category == (meant[0, 0] if len(set(meant[:, 0])) == 1 else IGNORED_LABEL)
            assert colour in (meant[0, 1], IGNORED_LABEL)
            # the words of a description say what it is
            if len(meant) == 1:
                assert CATEGORY_NAMES[category].split()[-1] in sample.question
                told += 1
    assert told > 5
    things = np.array([[4, 2], [4, 3], [7, -1]])
    one = next(sample for sample in scenes[0].samples if sample.task == "ground")
    of = {ids: loc_labels([replace(one, object_ids=ids, boxes_annotation=np.ones((len(ids), 6)), box_block=(0,) * len(ids))], [things])
          for ids in ((0,), (0, 1), (2,), (1, 2))}  # fmt: skip
    assert of[(0,)].tolist() == [[4, 2]]
    assert of[(0, 1)].tolist() == [[4, IGNORED_LABEL]]
    assert of[(2,)].tolist() == [[7, IGNORED_LABEL]]
    assert of[(1, 2)].tolist() == [[IGNORED_LABEL, IGNORED_LABEL]]


def test_the_loss_on_locs_reads_the_states_at_labelled_locs_alone():
    width, plugin = 48, LocLabels(0.7)
    codes = label_codes(width)
    labels = torch.tensor([[3, 1], [IGNORED_LABEL, 2], [5, IGNORED_LABEL]])
    states = torch.randn(3, 6, width, generator=torch.Generator().manual_seed(1))
    places = torch.tensor([[0, 4], [1, 2], [2, 5]])
    batch = {"targets": {"loc_labels": labels}}
    assert plugin.weight(0.3) == 0.7

    def losses(states):
        output = type("Output", (), {"last_hidden_state": states, "loc_index": places})()
        return {name: float(s / n) for name, (s, n) in plugin.terms(output, batch, None).items()}

    usual = losses(states)
    assert {name: float(n) for name, n in plugin.counts(batch, None).items()} == {"loc_category": 2, "loc_colour": 2}
    elsewhere = states.clone()
    elsewhere[0, 3] = elsewhere[1, 0] = elsewhere[2, 4] = 9.0
    assert losses(elsewhere) == usual
    right = states.clone()
    right[0, 4], right[1, 2], right[2, 5] = codes[3] + codes[NUM_CATEGORIES + 1], codes[NUM_CATEGORIES + 2], codes[5]
    assert losses(right)["loc_category"] < 0.5 < usual["loc_category"]
    assert losses(right)["loc_colour"] < 0.5 < usual["loc_colour"]


def test_a_batch_of_visits_goes_through_the_model(source):
    model, processor = build_untrained("vidllm-tiny")
    scenes = RoomScenes(source, 20, num_frames=3, prompts_per_scene=5)
    twice = next(v for v in range(1, 20) if scenes.room_of_visit[v] == scenes.room_of_visit[0])
    batch = RoomCollator(processor)([scenes[0], scenes[twice]])
    assert batch["pixel_values_videos"].shape == (2, 3, 3, *SIZE_HW)
    assert batch["targets"]["patch_labels"].shape == (2, 3, 6, 3)
    assert batch["targets"]["patch_weights"].shape == (2, 3, 6)
    assert batch["targets"]["loc_labels"].shape == (len(batch["input_ids"]), 2)
    assert sorted(set(batch["scene_index"].tolist())) == [0, 1]
    assert batch["targets"]["camera_mask"].all()
    assert batch["targets"]["depth_mask"].all()
    assert batch["targets"]["annotation_mask"].all()
    output = model(**model_inputs(batch), output_adapter_tokens=True)
    assert output.lang_tokens.shape == output.geom_tokens.shape == (2, 3, 6, 32)
    assert torch.isfinite(output.logits).all()


def test_names_of_the_labels_are_those_of_the_rooms():
    assert {"chair", "couch", "door"} <= set(CATEGORY_NAMES)
    assert {"red", "white"} <= set(COLOUR_NAMES)
