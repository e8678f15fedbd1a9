"""Reading of videos: frame counts, sampling, orientation, damage, memory."""

import gc
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from vidllm.processing import image_reading_vidllm, video_reading_vidllm
from vidllm.processing.image_reading_vidllm import natural_key, read_frames
from vidllm.processing.video_reading_vidllm import (
    VidLLMInputError,
    VidLLMMissingFileError,
    choose_frames,
    spread_indices,
)

from .media import cut, decode_all, picture, write_audio, write_folder, write_video


def read(source, num_frames=None, fps=None):
    """Frames as arrays, their shown sizes, metadata."""
    kept, info = read_frames(
        source,
        lambda total, times: choose_frames(total, times, num_frames, fps),
        lambda rgb, hw, name: (rgb.copy(), hw),
    )
    return [rgb for rgb, _ in kept], [hw for _, hw in kept], info


@pytest.mark.parametrize("total", [1, 2, 3, 7, 31, 32, 33, 100, 4000])
@pytest.mark.parametrize("wanted", [2, 3, 8, 32])
def test_spread_holds_both_ends_and_never_repeats(total, wanted):
    indices = spread_indices(total, wanted)
    assert len(indices) == min(total, wanted)
    assert indices[0] == 0
    assert indices[-1] == total - 1
    gaps = np.diff(indices)
    assert (gaps >= 1).all()
    assert total <= wanted or gaps.max() - gaps.min() <= 1


def test_fps_takes_the_frame_nearest_in_time():
    times = [5.0, 5.1, 5.2, 5.9, 6.0, 6.4, 7.0]
    assert choose_frames(7, times, None, 2.0) == [0, 2, 4, 5, 6]  # targets 5.0 5.5 6.0 6.5 7.0; 5.5 lies nearer to 5.2
    assert choose_frames(7, times, None, 1000.0) == list(range(7))
    assert choose_frames(1, [3.0], None, 2.0) == [0]
    with pytest.raises(VidLLMInputError, match="num_frames"):
        choose_frames(7, None, None, 2.0)


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"bf": "3", "g": "8"}),
        ("a.mkv", "libx264", {"bf": "2"}),
        ("a.avi", "mpeg4", {}),
        ("a.webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16"}),
        ("a.webm", "libvpx-vp9", {"lag-in-frames": "16"}),
        ("a.mov", "libx264", {"bf": "3", "flags": "+cgop"}),
        ("fragments.mp4", "libx264", {}),
    ],
)
@pytest.mark.parametrize("num_frames", [None, 5])
def test_equals_sequential_decoding(tmp_path, name, codec, options, num_frames):
    fragmented = {"movflags": "frag_keyframe+empty_moov"} if name.startswith("fragments") else None
    path = write_video(
        tmp_path / name, [picture(i) for i in range(23)], codec=codec, options=options, container_options=fragmented
    )
    reference = decode_all(path)
    frames, _, info = read(path, num_frames)
    wanted = spread_indices(len(reference), num_frames or len(reference))
    assert info["total_num_frames"] == len(reference) == 23
    assert info["frames_indices"] == wanted
    assert info["timestamps_s"] == pytest.approx([i / 10 for i in wanted], abs=2e-3)
    assert info["fps"] == pytest.approx(10, rel=1e-2)
    for frame, index in zip(frames, wanted):
        np.testing.assert_array_equal(frame, reference[index])


def test_trimmed_without_reencoding(tmp_path):
    """An edit list hides the frames between the keyframe and the cut; players and we do not show them."""
    whole = write_video(tmp_path / "whole.mp4", [picture(i) for i in range(30)], options={"g": "10", "bf": "2"})
    with av.open(whole) as source, av.open(str(tmp_path / "trimmed.mp4"), "w") as target:
        stream = source.streams.video[0]
        out = target.add_stream_from_template(stream)
        shift = 14 * round(1 / (10 * stream.time_base))
        for packet in source.demux(stream):
            if packet.dts is None or packet.pts < 10 * shift // 14:
                continue
            packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, out
            target.mux(packet)
    reference = decode_all(tmp_path / "trimmed.mp4")
    frames, _, info = read(tmp_path / "trimmed.mp4")
    assert info["total_num_frames"] == len(reference) == 16
    assert info["timestamps_s"][0] == 0
    np.testing.assert_array_equal(np.stack(frames), np.stack(reference))
    np.testing.assert_array_equal(frames[0], decode_all(whole)[14])


def test_animation(tmp_path):
    frames = [Image.fromarray(picture(i)).quantize(32) for i in range(5)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    reference = decode_all(tmp_path / "a.gif")
    got, _, info = read(tmp_path / "a.gif", 3)
    assert info["total_num_frames"] == len(reference) == 5
    np.testing.assert_array_equal(np.stack(got), np.stack(reference)[[0, 2, 4]])


def test_packet_count_that_is_wrong_is_corrected(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", [picture(i) for i in range(12)])
    scan = video_reading_vidllm._scan_packets

    def wrong(path):
        found = scan(path)
        found.num_frames, found.times_s = 19, [i / 10 for i in range(19)]
        return found

    monkeypatch.setattr(video_reading_vidllm, "_scan_packets", wrong)
    frames, _, info = read(path, 4)
    assert info["frames_indices"] == [0, 4, 7, 11]
    reference = decode_all(path)
    for frame, index in zip(frames, info["frames_indices"]):
        np.testing.assert_array_equal(frame, reference[index])


def test_only_sampled_frames_are_converted(tmp_path):
    path = write_video(tmp_path / "a.mp4", [picture(i) for i in range(40)])
    names = []
    read_frames(path, lambda total, times: spread_indices(total, 3), lambda rgb, hw, name: names.append(name))
    assert [int(name.rsplit(" ", 1)[1]) for name in names] == [0, 20, 39]


def test_decoded_frames_are_let_go(tmp_path):
    """Reading the side data of a frame ties it into a cycle; at 8K each such frame would hold 50 MB until collected."""
    path = write_video(tmp_path / "a.mp4", [picture(i) for i in range(12)], rotation=90)
    gc.collect()
    gc.disable()
    try:
        read_frames(path, lambda total, times: list(range(total)), lambda rgb, hw, name: int(rgb.max()))
        alive = sum(type(item) is av.VideoFrame for item in gc.get_objects())
    finally:
        gc.enable()
    assert alive <= 1


@pytest.mark.parametrize(("height", "width"), [(50, 70), (36, 334), (130, 98), (2, 2)])
def test_odd_line_lengths(tmp_path, height, width):
    frames = [np.random.default_rng(i).integers(0, 255, (height, width, 3), dtype=np.uint8) for i in range(3)]
    path = write_video(tmp_path / "a.mkv", frames, codec="ffv1", pix_fmt="bgr0")
    np.testing.assert_array_equal(np.stack(read(path)[0]), np.stack(frames))


def test_variable_frame_rate(tmp_path):
    times_ms = [0, 40, 80, 1000, 1040, 2500, 2540, 4000]
    path = write_video(tmp_path / "vfr.mp4", [picture(i) for i in range(8)], times=times_ms, options={"bf": "2"})
    _, _, info = read(path, 4)
    assert info["frames_indices"] == [0, 2, 5, 7]  # by index, not by time
    assert info["timestamps_s"] == pytest.approx([0, 0.08, 2.5, 4.0], abs=2e-3)
    _, _, info = read(path, fps=1.0)
    assert info["frames_indices"] == [0, 3, 5, 6, 7]  # targets 0 1 2 3 4 s: the nearest times are 0 1 2.5 2.54 4


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_display_matrix_is_honoured(tmp_path, rotation, mirror):
    path = write_video(tmp_path / "phone.mp4", [picture(i) for i in range(3)], rotation=rotation, mirror=mirror)
    stored = decode_all(path)
    shown = [np.rot90(frame, rotation // 90) for frame in stored]
    if mirror:
        shown = [frame[:, ::-1] for frame in shown]
    frames, sizes, _ = read(path)
    assert sizes == [(64, 48) if rotation in (90, -90) else (48, 64)] * 3
    for frame, wanted in zip(frames, shown):
        np.testing.assert_array_equal(frame, wanted)


@pytest.mark.parametrize(
    ("aspect", "size_hw"), [("2/1", (48, 128)), ("1/2", (96, 64)), ("16/15", (48, 68)), ("1/1", (48, 64))]
)
def test_pixel_aspect_is_honoured(tmp_path, aspect, size_hw):
    path = write_video(tmp_path / "dv.mp4", [picture(i) for i in range(3)], aspect=aspect)
    _, sizes, _ = read(path)
    assert sizes == [size_hw] * 3


def test_pixel_aspect_and_rotation_together(tmp_path):
    path = write_video(tmp_path / "dv.mp4", [picture(i) for i in range(3)], aspect="2/1", rotation=90)
    frames, sizes, _ = read(path)
    assert sizes[0] == (128, 48)
    assert frames[0].shape == (64, 48, 3)


def noise(count, height=48, width=64):
    return [np.random.default_rng(i).integers(0, 255, (height, width, 3), dtype=np.uint8) for i in range(count)]


@pytest.mark.parametrize("share", [0.2, 0.6, 0.97])
def test_truncated_mp4_is_an_error_that_counts(tmp_path, share):
    whole = write_video(
        tmp_path / "whole.mp4", noise(40), options={"crf": "0", "bf": "2"}, container_options={"movflags": "faststart"}
    )
    path = cut(whole, tmp_path / "cut.mp4", share)
    with pytest.raises(
        VidLLMInputError, match=r"cut\.mp4: truncated video: (\d+) of 40 frames could be decoded"
    ) as caught:
        read(path, 4)
    decoded = int(str(caught.value).split("video: ")[1].split(" of")[0])
    assert abs(decoded - 40 * share) < 6
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mkv", "libx264", {"crf": "0"}),
        ("a.avi", "mpeg4", {"qscale": "1"}),
        ("a.webm", "libvpx", {"crf": "4", "b": "8M"}),
    ],
)
def test_other_containers_that_are_cut(tmp_path, name, codec, options):
    whole = write_video(tmp_path / name, noise(40), codec=codec, options=options)
    with pytest.raises(VidLLMInputError, match="of 40 frames could be decoded"):
        read(cut(whole, tmp_path / f"cut_{name}", 0.5), 4)


def test_mp4_without_its_index(tmp_path):
    path = cut(write_video(tmp_path / "whole.mp4", noise(20)), tmp_path / "cut.mp4", 0.5)
    with pytest.raises(VidLLMInputError, match=r"cut\.mp4: .*truncated.*0 frames could be decoded"):
        read(path)


def test_damage_in_the_middle(tmp_path):
    path = Path(write_video(tmp_path / "a.mp4", noise(30), options={"crf": "0"}))
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + len(data) // 5] = bytes(len(data) // 5)
    path.write_bytes(data)
    with pytest.raises(VidLLMInputError, match="of 30 frames could be decoded"):
        read(path, 4)


def bad_files(tmp_path):
    (tmp_path / "text.mp4").write_text("this is not a video\n" * 99)
    (tmp_path / "text.txt").write_text("this is not a video\n" * 99)
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\na.ts\n#EXT-X-ENDLIST\n")
    (tmp_path / "zero.mp4").write_bytes(b"")
    (tmp_path / "zero.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.md").write_text("nothing here")
    return {
        "text.mp4": "not a video",
        "text.txt": "not a video|wanted a video",
        "list.m3u8": "not a video|wanted a video",
        "zero.mp4": "empty",
        "zero.png": "not an image",
        "text.jpg": "not an image",
        "empty": "no image in this folder.*empty",
        "notes": "no image in this folder.*readme.md",
        "nothing.mp4": "no such file",
        "no/folder": "no such file",
    }


@pytest.mark.parametrize(
    "name",
    [
        "text.mp4",
        "text.txt",
        "list.m3u8",
        "zero.mp4",
        "zero.png",
        "text.jpg",
        "empty",
        "notes",
        "nothing.mp4",
        "no/folder",
    ],
)
def test_bad_files_give_one_clear_line(tmp_path, name):
    reason = bad_files(tmp_path)[name]
    with pytest.raises(ValueError, match=reason) as caught:
        read(tmp_path / name)
    assert isinstance(caught.value, VidLLMInputError)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_is_also_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nothing.mp4")
    assert issubclass(VidLLMMissingFileError, ValueError)


def test_audio_only(tmp_path):
    with pytest.raises(VidLLMInputError, match="no video in this file; it holds audio only"):
        read(write_audio(tmp_path / "sound.m4a"))


@pytest.mark.parametrize("source", ["https://example.com/a.mp4", "s3://bucket/a.mp4"])
def test_addresses_are_refused(source):
    with pytest.raises(VidLLMInputError, match="local path"):
        read(source)


def test_file_address_home_and_colon(tmp_path, monkeypatch):
    path = write_video(tmp_path / "take:2.mp4", [picture(i) for i in range(2)])
    monkeypatch.chdir(tmp_path)
    assert read("take:2.mp4")[2]["total_num_frames"] == 2
    assert read(f"file://{path}")[2]["total_num_frames"] == 2
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("~/take:2.mp4")[2]["total_num_frames"] == 2


@pytest.mark.parametrize(
    "source", [None, 7, {"path": "a.mp4"}, [], "", np.zeros((4, 5)), np.zeros((0, 4, 4, 3)), ["a", 3]]
)
def test_other_things_are_refused(source):
    with pytest.raises(VidLLMInputError):
        read(source)


def test_natural_order():
    names = ["f10.png", "f9.png", "f1.png", "10.png", "9.png", "f1b2.png", "f1b10.png", "F2.png"]
    assert sorted(names, key=natural_key) == [
        "9.png",
        "10.png",
        "f1.png",
        "f1b2.png",
        "f1b10.png",
        "F2.png",
        "f9.png",
        "f10.png",
    ]


def test_folder_in_natural_order(tmp_path):
    folder = write_folder(tmp_path / "frames", [picture(i) for i in range(12)])
    (tmp_path / "frames" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "frames" / "notes.txt").write_text("x")
    frames, _, info = read(folder, 5)
    assert info["frames_indices"] == [0, 3, 6, 8, 11]
    assert info["frame_names"] == [f"frame_{i}.png" for i in info["frames_indices"]]
    assert info["timestamps_s"] is None
    for frame, index in zip(frames, info["frames_indices"]):
        np.testing.assert_array_equal(frame, picture(index))


def test_folder_with_times_in_names(tmp_path):
    names = ["0.5.png", "0.25.png", "10.125.png", "9.75.png"]
    folder = write_folder(tmp_path / "frames", [picture(i) for i in range(4)], names)
    _, _, info = read(folder)
    assert info["frame_names"] == ["0.25.png", "0.5.png", "9.75.png", "10.125.png"]
    assert info["timestamps_s"] == [0.25, 0.5, 9.75, 10.125]


def test_all_forms_of_the_same_frames_agree(tmp_path):
    frames = [picture(i) for i in range(6)]
    folder = write_folder(tmp_path / "frames", frames)
    paths = [str(tmp_path / "frames" / f"frame_{i}.png") for i in range(6)]
    stacked = np.stack(frames)
    forms = [
        folder,
        paths,
        tuple(tmp_path / "frames" / f"frame_{i}.png" for i in range(6)),
        [Image.fromarray(frame) for frame in frames],
        frames,
        [frame.transpose(2, 0, 1) for frame in frames],
        stacked,
        stacked.transpose(0, 3, 1, 2),
        torch.from_numpy(stacked),
        torch.from_numpy(stacked).permute(0, 3, 1, 2),
        stacked.astype(np.int64),
        stacked.astype(np.uint16) * 257,
        np.concatenate([stacked, np.full((*stacked.shape[:3], 1), 255, np.uint8)], axis=-1),
    ]
    for form in forms:
        got, _, info = read(form, 3)
        assert info["frames_indices"] == [0, 3, 5]
        np.testing.assert_array_equal(np.stack(got), stacked[[0, 3, 5]])
    for floats in (stacked / 255.0, torch.from_numpy(stacked) / 255):
        got, _, _ = read(floats, 3)
        np.testing.assert_allclose(np.stack(got) * 255, stacked[[0, 3, 5]], atol=1e-4)


def test_image_kinds(tmp_path):
    rgb = picture(3)
    grey = rgb[..., 0]
    alpha = np.full((48, 64), 51, np.uint8)
    on_white = np.round(rgb * 0.2 + 255 * 0.8)
    kinds = {
        "grey": (Image.fromarray(grey), np.repeat(grey[..., None], 3, -1)),
        "grey16": (Image.fromarray(grey.astype(np.uint16) * 257), np.repeat(grey[..., None], 3, -1)),
        "rgba": (Image.fromarray(np.dstack([rgb, alpha])), on_white),
        "palette": (Image.fromarray(rgb).quantize(16), None),
        "bilevel": (Image.fromarray(grey > 100), np.repeat((grey > 100)[..., None] * 255, 3, -1)),
    }
    for name, (image, wanted) in kinds.items():
        image.save(tmp_path / f"{name}.png")
        for source in ([image], tmp_path / f"{name}.png"):
            frame = read(source)[0][0]
            assert frame.shape == (48, 64, 3)
            assert frame.dtype == np.uint8
            if wanted is not None:
                np.testing.assert_allclose(frame, wanted, atol=1, err_msg=name)
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "cmyk.jpg")
    assert read(tmp_path / "cmyk.jpg")[0][0].shape == (48, 64, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    image = Image.fromarray(picture(2))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    frames, sizes, _ = read(tmp_path / "photo.jpg")
    stored = np.asarray(Image.open(tmp_path / "photo.jpg"))
    shown = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: np.rot90(stored, -1),
        7: stored.swapaxes(0, 1)[::-1, ::-1],
        8: np.rot90(stored, 1),
    }[orientation]
    assert sizes[0] == shown.shape[:2]
    np.testing.assert_array_equal(frames[0], shown)


@pytest.mark.parametrize(
    ("value", "reason"), [(np.nan, "NaN"), (np.inf, "infinite"), (1.5, "0..1"), (-0.5, "0..1"), (200.0, "0..1")]
)
def test_bad_pixels_name_the_frame(value, reason):
    frames = np.stack([picture(i) for i in range(5)]).astype(np.float32) / 255
    frames[3, 10, 20, 1] = value
    with pytest.raises(VidLLMInputError, match=rf"frame 3.*{reason}"):
        read(frames)


@pytest.mark.parametrize(
    "frame", [np.full((4, 6, 3), 300), np.full((4, 6, 3), -1), np.zeros((4, 6, 3), bool), np.zeros((4, 6, 3), complex)]
)
def test_bad_pixel_types(frame):
    with pytest.raises(VidLLMInputError, match=r"frame 0.*wanted"):
        read([frame])


def test_portrait_and_landscape_name_the_files(tmp_path):
    folder = write_folder(tmp_path / "mixed", [picture(0), picture(1), picture(2, 64, 48), picture(3)])
    with pytest.raises(
        VidLLMInputError, match=r"frame_0\.png is 64x48 \(landscape\).*frame_2\.png is 48x64 \(portrait\)"
    ):
        read(folder, 2)  # although frame 2 is not sampled


def test_portrait_by_exif_counts_as_portrait(tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for index, orientation in enumerate((1, 6)):
        image = Image.fromarray(picture(index))
        exif = image.getexif()
        exif[0x0112] = orientation
        image.save(folder / f"{index}.jpg", exif=exif)
    with pytest.raises(VidLLMInputError, match="portrait and landscape mixed"):
        read(folder)


def test_truncated_image(tmp_path):
    folder = write_folder(tmp_path / "frames", noise(4))
    cut(f"{folder}/frame_2.png", f"{folder}/frame_2.png", 0.5)
    with pytest.raises(VidLLMInputError, match=r"frame_2\.png: this image cannot be decoded"):
        read(folder)


def test_frame_names_are_not_read_as_photographs_elsewhere():
    assert image_reading_vidllm.is_image_path("a.PNG")
    assert not image_reading_vidllm.is_image_path("a.mp4")


MEMORY_SCRIPT = """
    import json, sys
    import numpy as np, torch
    import av, PIL.Image
    from vidllm.processing.video_processing_vidllm import VidLLMVideoProcessor
    torch.nn.functional.interpolate(torch.zeros(1, 1, 64, 64), size=(9, 9), mode="bicubic", antialias=True)
    processor = VidLLMVideoProcessor(size={"shortest_edge": 112}, num_frames=int(sys.argv[2]))

    def megabytes(name):
        # Not getrusage: its peak is inherited from the process that started this one.
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024

    before, idle = megabytes("VmHWM"), megabytes("VmRSS")
    inputs = processor(sys.argv[1])
    print(json.dumps({
        "megabytes": megabytes("VmHWM") - idle,
        "seen": megabytes("VmHWM") > before,
        "indices": inputs.video_metadata[0]["frames_indices"],
        "total": inputs.video_metadata[0]["total_num_frames"],
        "means": inputs["pixel_values_videos"].mean(dim=(0, 2, 3, 4)).tolist(),
    }))
"""


def measure(path, num_frames):
    """Peak memory over the idle process, in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY_SCRIPT), str(path), str(num_frames)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return json.loads(result.stdout.splitlines()[-1])


def write_flat(path, count, height, width, container_options=None):
    """Cheap to encode: flat frames that tell their index by brightness."""
    frames = (np.full((height, width, 3), 30 + (i * 7) % 190, np.uint8) for i in range(count))
    return write_video(
        path, frames, options={"preset": "ultrafast", "crf": "30", "g": "50"}, container_options=container_options
    )


def expected_mean(index):
    mean = np.mean([0.485, 0.456, 0.406])
    return ((30 + (index * 7) % 190) / 255 - mean) / 0.225


def test_memory_holds_sampled_frames_only(tmp_path):
    # All frames would be 600 * 640 * 480 * 3 = 553 MB as bytes, four times that as float32.
    path = write_flat(tmp_path / "long.mp4", 600, 480, 640)
    got = measure(path, 8)
    assert got["total"] == 600
    assert got["indices"] == spread_indices(600, 8)
    assert got["seen"]
    assert got["megabytes"] < 200
    for index, mean in zip(got["indices"], got["means"]):
        assert abs(mean - expected_mean(index)) < 0.06


@pytest.mark.slow
@pytest.mark.parametrize(("count", "height", "width", "num_frames"), [(4000, 720, 1280, 32), (10, 4320, 7680, 6)])
def test_memory_of_long_and_large_videos(tmp_path, count, height, width, num_frames):
    path = write_flat(tmp_path / "big.mp4", count, height, width)
    got = measure(path, num_frames)
    assert got["total"] == count
    assert got["indices"] == spread_indices(count, num_frames)
    assert got["seen"]
    assert got["megabytes"] < 1500
    for index, mean in zip(got["indices"], got["means"]):
        assert abs(mean - expected_mean(index)) < 0.06


def test_real_clip(repository):
    path = repository.parent / "shared" / "realdata" / "clips" / "room.mp4"
    if not path.exists():
        pytest.skip("the real clip is not on this machine")
    frames, sizes, info = read(path)
    reference = decode_all(path)
    assert info["total_num_frames"] == len(reference) == 8
    assert info["timestamps_s"] == pytest.approx(list(range(8)))
    assert sizes[0] == reference[0].shape[:2]
    np.testing.assert_array_equal(np.stack(frames), np.stack(reference))
