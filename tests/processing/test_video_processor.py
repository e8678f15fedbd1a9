"""From frames to `pixel_values_videos`: the plan, the resize, packing of ragged batches, warnings."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vidllm.processing.video_processing_vidllm import (
    VidLLMVideoProcessor,
    resize_frame,
    resize_plan,
    split_videos,
)
from vidllm.processing.video_reading_vidllm import VidLLMInputError

from .media import no_warning, picture, write_folder, write_video


def processor(**changes):
    return VidLLMVideoProcessor(**{"size": {"shortest_edge": 28}, "num_frames": 4, **changes})


@given(
    height=st.integers(8, 4000),
    width=st.integers(8, 4000),
    short=st.integers(16, 600),
    patch_size=st.sampled_from([14, 16]),
)
@settings(max_examples=200, deadline=None)
def test_plan_properties(height, width, short, patch_size):
    if max(height, width) > 20 * min(height, width):
        with pytest.raises(VidLLMInputError, match="sides that differ"):
            resize_plan((height, width), {"shortest_edge": short}, patch_size)
        return
    resized_hw, top, left, out_hw = resize_plan((height, width), {"shortest_edge": short}, patch_size)
    assert min(resized_hw) == short
    for resized, offset, out, source in zip(resized_hw, (top, left), out_hw, (height, width)):
        assert abs(resized - source * short / min(height, width)) <= 0.5 + 1e-6
        assert out % patch_size == 0
        assert 0 < out <= resized < out + patch_size
        assert resized - out - offset - offset in (0, 1)  # centred


def test_plan_of_the_paper():
    assert resize_plan((480, 640), {"shortest_edge": 518}, 14) == ((518, 691), 0, 2, (518, 686))
    assert resize_plan((1920, 1080), {"shortest_edge": 518}, 14) == ((921, 518), 5, 0, (910, 518))
    assert resize_plan((1080, 1920), {"shortest_edge": 518, "longest_edge": 518}, 14) == ((291, 518), 5, 0, (280, 518))
    with pytest.raises(VidLLMInputError, match="less than one patch"):
        resize_plan((20, 30), {"shortest_edge": 10}, 14)


def test_resize_equals_a_slow_reference():
    """Antialiased bicubic (a = -0.5) written out; not what the code calls."""
    rgb = np.random.default_rng(0).integers(0, 255, (30, 41, 3), dtype=np.uint8)

    def weights(source, target):
        scale = source / target
        support = 2 * max(scale, 1)
        matrix = np.zeros((target, source))
        for row in range(target):
            centre = (row + 0.5) * scale
            x = np.abs((np.arange(source) + 0.5 - centre) / max(scale, 1))
            cubic = np.where(
                x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0)
            )
            cubic[np.abs(np.arange(source) + 0.5 - centre) > support] = 0
            matrix[row] = cubic / cubic.sum()
        return matrix

    for target in ((14, 19), (30, 19), (61, 83)):
        wanted = np.einsum("yh,hwc,xw->cyx", weights(30, target[0]), rgb / 255.0, weights(41, target[1])).clip(0, 1)
        np.testing.assert_allclose(resize_frame(rgb, target).numpy(), wanted, atol=2e-5)
    np.testing.assert_array_equal(resize_frame(rgb, (30, 41)), torch.from_numpy(rgb).permute(2, 0, 1) / 255)


def test_uint8_and_float_agree():
    frames = np.stack([picture(i) for i in range(3)])
    a = processor()(frames)["pixel_values_videos"]
    b = processor()(frames.astype(np.float32) / 255)["pixel_values_videos"]
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_normalisation_and_its_inverse():
    frames = np.stack([picture(i, 28, 42) for i in range(3)])
    own = processor(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.25, 2.0])
    pixels = own(frames)["pixel_values_videos"]
    wanted = (frames / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.25, 2.0])
    torch.testing.assert_close(pixels[0], torch.tensor(wanted).permute(0, 3, 1, 2).float(), atol=1e-5, rtol=0)
    np.testing.assert_array_equal(own.denormalize(pixels)[0].numpy(), frames)


def test_crop_is_centred():
    frames = np.stack([picture(i, 30, 47) for i in range(2)])
    inputs = processor(size={"shortest_edge": 30})(frames)
    info = inputs.video_metadata[0]
    assert info["crop_top_left"] == (1, 2)
    assert info["out_hw"] == (28, 42)
    np.testing.assert_array_equal(
        processor().denormalize(inputs["pixel_values_videos"])[0].numpy(), frames[:, 1:29, 2:44]
    )


def test_sampling_defaults_and_overrides(tmp_path):
    path = write_video(tmp_path / "a.mp4", [picture(i) for i in range(20)])
    own = processor()

    def indices(**kwargs):
        return own(path, **kwargs).video_metadata[0]["frames_indices"]

    assert indices() == [0, 6, 13, 19]
    assert indices(num_frames=2) == [0, 19]
    assert indices(num_frames=99) == list(range(20))
    assert indices(fps=5) == list(range(0, 20, 2))
    assert indices(do_sample_frames=False) == list(range(20))
    assert processor(num_frames=None, fps=2.0)(path).video_metadata[0]["frames_indices"] == [0, 5, 10, 15]
    assert VidLLMVideoProcessor().num_frames == 32


@pytest.mark.parametrize(
    "kwargs", [{"num_frames": 2, "fps": 1.0}, {"num_frames": 0}, {"fps": 0.0}, {"fps": float("nan")}]
)
def test_contradictory_sampling(kwargs):
    with pytest.raises(ValueError, match="sampling: wanted"):
        processor()([picture(0), picture(1)], **kwargs)
    with pytest.raises(ValueError, match="sampling: wanted"):
        VidLLMVideoProcessor(**kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"patch_size": 0},
        {"image_mean": [1.0]},
        {"image_std": [1.0, 0.0, 1.0]},
        {"size": {"height": 3}},
        {"size": {"shortest_edge": 0}},
    ],
)
def test_bad_settings(kwargs):
    with pytest.raises(ValueError, match="wanted"):
        VidLLMVideoProcessor(**kwargs)


def test_unknown_arguments_are_refused():
    with pytest.raises(ValueError, match="do_flip"):
        processor()([picture(0), picture(1)], do_flip=True)


def test_ragged_batch_is_padded_for_transport_only():
    videos = [
        np.stack([picture(i) for i in range(6)]),
        np.stack([picture(i, 64, 48) for i in range(2)]),
        np.stack([picture(i, 28, 98) for i in range(3)]),
    ]
    inputs = processor()(videos)
    pixels, sizes = inputs["pixel_values_videos"], inputs["video_size_shw"]
    assert pixels.shape == (3, 4, 3, 28, 98)
    assert pixels.dtype == torch.float32
    assert sizes.dtype == torch.int64
    assert sizes.tolist() == [[4, 28, 28], [2, 28, 28], [3, 28, 98]]
    for row, video in enumerate(videos):
        alone = processor()(video)["pixel_values_videos"][0]
        frames, height, width = sizes[row].tolist()
        torch.testing.assert_close(pixels[row, :frames, :, :height, :width], alone, atol=0, rtol=0)
        rest = pixels[row].clone()
        rest[:frames, :, :height, :width] = 0
        assert (rest == 0).all()


def test_one_video_or_several(tmp_path):
    frames = [picture(i) for i in range(3)]
    images = [Image.fromarray(frame) for frame in frames]
    path = write_video(tmp_path / "a.mp4", frames)
    folder = write_folder(tmp_path / "f", frames)
    stills = [f"{folder}/frame_{i}.png" for i in range(3)]
    array = np.stack(frames)
    counts = {
        1: [path, folder, stills, images, frames, array, images[0], stills[0], [path], [stills], [images], [array]],
        2: [
            [path, folder],
            [stills, stills],
            [images, images],
            [array, array],
            np.stack([array, array]),
            [[path], [path]],
        ],
        3: [[path, stills, array]],
    }
    for count, forms in counts.items():
        for form in forms:
            videos = split_videos(form)
            assert len(videos) == count
            assert split_videos(videos) is videos  # saying it twice changes nothing
    with pytest.raises(VidLLMInputError, match="empty list"):
        split_videos([])


def test_different_sizes_are_cropped_to_the_first_with_one_warning(tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    for index, (height, width) in enumerate([(56, 84), (112, 168), (56, 112), (100, 120)]):
        image = np.zeros((height, width, 3), np.uint8)
        image[:, width // 2 :] = 255  # the edge stays in the middle of a centre crop
        Image.fromarray(image).save(folder / f"{index}.png")
    with pytest.warns(
        UserWarning, match=r"cropped to the first one's 84x56 pixels \(3 of 4; .*1\.png is 168x112"
    ) as caught:
        inputs = processor()(str(folder))
    assert len(caught) == 1
    assert inputs["video_size_shw"].tolist() == [[4, 28, 42]]
    assert inputs.video_metadata[0]["height"] == 56
    seen = processor().denormalize(inputs["pixel_values_videos"])[0].float().mean(dim=(1, 3))
    for frame in seen:
        assert frame[:19].max() < 20
        assert frame[23:].min() > 235


def test_cover_and_crop_keeps_the_scale_of_both_axes():
    """A frame twice as wide at the same height: its middle half is kept, unscaled."""
    wide = np.random.default_rng(1).integers(0, 255, (28, 84, 3), dtype=np.uint8)
    first = np.zeros((28, 42, 3), np.uint8)
    with pytest.warns(UserWarning, match="cropped to the first"):
        inputs = processor()([first, wide])
    np.testing.assert_array_equal(processor().denormalize(inputs["pixel_values_videos"])[0, 1].numpy(), wide[:, 21:63])


def test_pixel_aspect_changes_the_picture(tmp_path):
    path = write_video(tmp_path / "dv.mp4", [picture(i, 28, 28) for i in range(2)], aspect="2/1")
    inputs = processor()(path)
    assert inputs["video_size_shw"].tolist() == [[2, 28, 56]]
    assert (inputs.video_metadata[0]["height"], inputs.video_metadata[0]["width"]) == (28, 56)
    row = processor().denormalize(inputs["pixel_values_videos"])[0, 0, 4]
    assert abs(int(row[20, 0]) - 200) < 12  # red up to the middle of the wider picture
    assert abs(int(row[36, 1]) - 200) < 12


def test_one_frame_warns_once_and_works(tmp_path):
    Image.fromarray(picture(0)).save(tmp_path / "photo.jpg")
    for source in (str(tmp_path / "photo.jpg"), Image.fromarray(picture(0)), picture(0), [picture(0)]):
        with pytest.warns(UserWarning, match="geometry needs motion") as caught:
            inputs = processor()(source)
        assert len(caught) == 1
        assert inputs["video_size_shw"].tolist() == [[1, 28, 28]]


def test_nothing_warns_on_a_plain_video(tmp_path):
    path = write_video(tmp_path / "a.mp4", [picture(i) for i in range(5)])
    with no_warning():
        processor()(path)


def test_return_forms(tmp_path):
    path = write_video(tmp_path / "a.mp4", [picture(i) for i in range(5)])
    inputs = processor()(path, return_tensors="np")
    assert isinstance(inputs["pixel_values_videos"], np.ndarray)
    assert set(inputs) == {"pixel_values_videos", "video_size_shw"}
    inputs = processor()(path, return_metadata=True, return_tensors="pt")
    assert set(inputs) == {"pixel_values_videos", "video_size_shw", "video_metadata"}
    info = inputs["video_metadata"][0]
    assert info["source"] == path
    assert (info["height"], info["width"], info["fps"]) == (48, 64, pytest.approx(10))


def test_save_and_load(tmp_path):
    own = processor(
        fps=3.0,
        num_frames=None,
        patch_size=16,
        image_std=[0.5, 0.5, 0.5],
        size={"shortest_edge": 32, "longest_edge": 64},
    )
    own.save_pretrained(tmp_path)
    again = VidLLMVideoProcessor.from_pretrained(tmp_path)
    for name in ("fps", "num_frames", "patch_size", "image_mean", "image_std", "size", "do_sample_frames"):
        assert getattr(again, name) == getattr(own, name)
    assert VidLLMVideoProcessor.from_pretrained(tmp_path, fps=None, num_frames=7).num_frames == 7
    frames = np.stack([picture(i) for i in range(3)])
    kwargs = {"num_frames": 2}
    torch.testing.assert_close(
        own(frames, **kwargs)["pixel_values_videos"], again(frames, **kwargs)["pixel_values_videos"], atol=0, rtol=0
    )


def test_real_data(repository):
    real = repository.parent / "shared" / "realdata"
    if not real.exists():
        pytest.skip("the real data are not on this machine")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        office = processor(size={"shortest_edge": 56})(str(real / "tum_office"))
        photo = processor(size={"shortest_edge": 56})(str(real / "moge_indoor" / "01_HouseIndoor.jpg"))
    info = office.video_metadata[0]
    assert info["total_num_frames"] == 17
    assert info["timestamps_s"][0] == 1341847980.722988
    assert info["timestamps_s"][-1] == 1341847996.874766
    assert office["video_size_shw"].tolist() == [[4, 56, 70]]
    assert photo["video_size_shw"][0, 0] == 1
