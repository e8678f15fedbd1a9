"""Features of a teacher, computed once: `vidllm train precompute`."""

from collections.abc import Callable
from pathlib import Path

import torch

from vidllm.processing.processing_vidllm import VidLLMProcessor
from vidllm.train.clip_data import ClipCollator, ClipFolder, ClipFrames
from vidllm.train.distill_recipes import DistillRecipe
from vidllm.train.feature_folder import FeatureFacts, FeatureFolder, FeatureWriter, is_feature_folder
from vidllm.train.teachers import VisionTeacher


def precompute(
    teacher: VisionTeacher,
    clips: ClipFolder,
    processor: VidLLMProcessor,
    out_dir: str | Path,
    frames_per_pass: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write a teacher's features of all kept frames of all clips; what is there already of the very same clips is left.

    Clips that are held out need features too: a second call with their folder and the same `out_dir` adds them.

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
        reader = clips.reader(name)
        identity = clips.identity(name, reader)
        if not writer.holds(name, identity):
            indices = clips.kept(reader)
            rgb = [frame.rgb for frame in reader.frames(indices, depth=False)]
            batch = collator([ClipFrames(name, indices, rgb)])
            frames = (batch["pixel_values_videos"][0] * std + mean).clamp(0, 1)
            parts = [teacher.features(part.to(teacher.mean.device), ()) for part in frames.split(frames_per_pass)]
            features = torch.cat([part.cpu() for part, _ in parts])
            writer.write(name, identity, indices, features, parts[0][1], tuple(frames.shape[-2:]))
            written += 1
        if progress is not None:
            progress(number + 1, len(clips))
    return written


def check_clips_have_features(chosen: DistillRecipe) -> None:
    """Look for the features of all clips of a run, of those that are held out too, before it starts.

    Args:
        chosen (`DistillRecipe`): The recipe; nothing is looked at where both teachers are models.

    Raises:
        ValueError: A clip has none; names it.

    Source:
        Ours: a run would otherwise stop at the first visit of such a clip.
    """
    teachers = (chosen.geometry_teacher, chosen.language_teacher)
    folders = [FeatureFolder(place) for place in teachers if place is not None and is_feature_folder(place)]
    held = None if chosen.held_out is None else chosen.held_out.clips
    for root in (chosen.clips, held):
        if root is None or not folders:
            continue
        clips = ClipFolder(root, chosen.frames_kept)
        for name in clips.names:
            for folder in folders:
                folder.file_of(name, clips.identity(name))


__all__ = ["check_clips_have_features", "precompute"]
