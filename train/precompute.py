"""Features of a teacher, computed once: `vidllm train precompute`."""

from collections.abc import Callable
from pathlib import Path

import torch

from vidllm.processing.processing_vidllm import VidLLMProcessor
from vidllm.train.clip_data import ClipCollator, ClipFolder, ClipFrames
from vidllm.train.teachers import FeatureFacts, FeatureWriter, VisionTeacher


def precompute(
    teacher: VisionTeacher,
    clips: ClipFolder,
    processor: VidLLMProcessor,
    out_dir: str | Path,
    frames_per_pass: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write a teacher's features of all kept frames of all clips; what is there already is left.

    Args:
        teacher (`VisionTeacher`): The teacher, on its device.
        clips (`ClipFolder`): The clips, with the number of frames that training will see.
        processor (`VidLLMProcessor`): Of the student: it says to which size frames are resized and cropped.
        out_dir (`str` or `Path`): New folder, or that of an earlier run with the same teacher and frames.
        frames_per_pass (`int`): Frames that go through the teacher together.
        progress (callable, *optional*): Told how many clips are done, of how many.

    Returns:
        `int`: clips that were written now.

    Raises:
        ValueError: The folder holds features of something else, or a clip cannot be read.

    Source:
        Ours: teachers are as large as the student, and frozen.
    """
    facts = FeatureFacts(teacher.place, teacher.stream, teacher.width, None, clips.frames_kept)
    writer, collator = FeatureWriter(out_dir, facts), ClipCollator(processor)
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (processor.video_processor.image_mean, processor.video_processor.image_std)
    )
    written = 0
    for number, name in enumerate(clips.names):
        if name not in writer:
            reader = clips.reader(name)
            indices = clips.kept(reader)
            rgb = [frame.rgb for frame in reader.frames(indices, depth=False)]
            batch = collator([ClipFrames(name, indices, rgb)])
            frames = (batch["pixel_values_videos"][0] * std + mean).clamp(0, 1)
            parts = [teacher.features(part.to(teacher.mean.device), ()) for part in frames.split(frames_per_pass)]
            features = torch.cat([part.cpu() for part, _ in parts])
            writer.write(name, indices, features, parts[0][1], tuple(frames.shape[-2:]))
            written += 1
        if progress is not None:
            progress(number + 1, len(clips))
    return written


__all__ = ["precompute"]
