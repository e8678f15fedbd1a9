"""The kept scene: save, load, select, expand, point_at."""

import pytest
import torch
from tiny import RAGGED_SIZES, tiny_model, tiny_videos

from vidllm.modeling_vidllm.scene_vidllm import VidLLMScene


@pytest.fixture(scope="module")
def scene():
    return tiny_model().encode_scene(*tiny_videos(RAGGED_SIZES))


def assert_equal(a, b):
    a, b = a._tensors(), b._tensors()
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_save_and_load_bit_for_bit(scene, tmp_path):
    scene.save(tmp_path / "scene.safetensors")
    assert_equal(scene, VidLLMScene.load(tmp_path / "scene.safetensors"))


def test_load_refuses_what_is_no_scene(scene, tmp_path):
    path = tmp_path / "scene.safetensors"
    with pytest.raises(ValueError, match="does not exist"):
        VidLLMScene.load(path)
    scene.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        VidLLMScene.load(path)
    import safetensors.torch

    safetensors.torch.save_file({"tokens": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="wanted format"):
        VidLLMScene.load(path)


def test_select_and_expand(scene):
    assert_equal(scene.select([2, 0]).select(1), scene.select(0))
    assert_equal(scene.select(slice(0, 2)), scene.select(torch.tensor([0, 1])))
    assert_equal(scene.select(-1), scene.select(2))
    doubled = scene.expand(2)
    assert doubled.num_scenes == 6
    assert_equal(doubled.select([0, 2, 4]), scene)
    assert_equal(doubled.select([1, 3, 5]), scene)
    with pytest.raises(ValueError, match=r"wanted rows in 0\.\.2; got 3"):
        scene.select(3)
    with pytest.raises(ValueError, match="positive"):
        scene.expand(0)


def test_to_changes_only_the_language_side(scene):
    half = scene.to(torch.bfloat16)
    assert half.tokens.dtype == torch.bfloat16
    assert half.positions.dtype == torch.float32
    assert half.mask.dtype == torch.bool
    assert half.reconstruction.depth.dtype == torch.float32
    assert torch.equal(half.reconstruction.depth, scene.reconstruction.depth)


def test_point_at(scene):
    recon = scene.reconstruction
    point = scene.point_at(1, u=20.4, v=10.6, scene=0)
    assert torch.equal(point, recon.points_world[0, 1, 11, 20])
    room = scene.point_at(1, u=20.4, v=10.6, scene=0, frame_of="room")
    torch.testing.assert_close(recon.room_from_world[0].T @ room, point)
    one = scene.select(1)
    assert torch.equal(one.point_at(0, 3, 4), recon.points_world[1, 0, 4, 3])
    for bad, words in (
        ({"frame": 3, "u": 1, "v": 1, "scene": 0}, r"frame: wanted 0\.\.2"),
        ({"frame": 2, "u": 1, "v": 1, "scene": 1}, r"frame: wanted 0\.\.1"),
        ({"frame": 0, "u": 41.6, "v": 1, "scene": 0}, "pixel: wanted"),
        ({"frame": 0, "u": float("nan"), "v": 1, "scene": 0}, "pixel: wanted"),
        ({"frame": 0, "u": 1, "v": 1}, "wanted scene="),
        ({"frame": 0, "u": 1, "v": 1, "scene": 3}, "scene: wanted"),
        ({"frame": 0, "u": 1, "v": 1, "scene": 0, "frame_of": "cam"}, "frame_of"),
    ):
        with pytest.raises(ValueError, match=words):
            scene.point_at(**bad)
    holed = scene.select(0)
    holed.reconstruction.depth[0, 0, 4, 3] = 0
    with pytest.raises(ValueError, match="no valid depth"):
        holed.point_at(0, 3, 4)
