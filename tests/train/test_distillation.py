"""Stage 1: losses against slow ones, teachers of all kinds, steps cut in any way, runs that go on, and students that have something to learn."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, TrainingArguments

from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.processing.synthetic_clip import write_synthetic_clip
from vidllm.train.clip_data import ClipCollator, ClipFolder, ClipFrames, ClipVisits
from vidllm.train.distill_recipes import DISTILL_RECIPES, chosen_distill_recipe
from vidllm.train.distillation import TERMS, VidLLMDistillationTrainer, main, train_distill
from vidllm.train.distillation_losses import (
    geometry_feature_loss,
    language_feature_loss,
    resized_to_grid,
    structure_loss,
)
from vidllm.train.initialise import build_untrained, initialise
from vidllm.train.precompute import precompute
from vidllm.train.teachers import FeatureFacts, FeatureFolder, FeatureWriter, FrameKey, VisionTeacher, open_teacher

from . import distill_process
from .two_processes import run_two_processes


pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------- losses


def length_one(row):
    return row / math.sqrt(sum(float(value) ** 2 for value in row))


def slow_structure(student, teacher):
    """Pair by pair of tokens, frame by frame."""
    total = 0.0
    width = max(part.shape[-1] for part in teacher)
    for frame in range(len(student[0])):
        z = [length_one(row) for part in student for row in part[frame]]
        y = [nn.functional.pad(length_one(row), (0, width - len(row))) for part in teacher for row in part[frame]]
        count = len(z)
        total += sum((float(z[i] @ z[j]) - float(y[i] @ y[j])) ** 2 for i in range(count) for j in range(count)) / (
            count * count
        )
    return total


@pytest.mark.parametrize(("patches", "widths"), [(3, (7, 5, 9)), (12, (4, 5, 3))])
def test_losses_equal_slow_ones(patches, widths):
    """More channels than tokens, and more tokens than channels: the latter never makes a matrix of pairs."""
    own, geometry_width, language_width = widths
    student = drawn(3, patches, own, seed=1), drawn(3, patches, own, seed=2)
    teacher = drawn(3, patches, geometry_width, seed=3), drawn(3, patches, language_width, seed=4)
    value, count = structure_loss(student, teacher)
    assert count == 3
    assert value.item() == pytest.approx(slow_structure(student, teacher), rel=1e-5)
    projected = drawn(3, patches, geometry_width, seed=5)
    value, count = geometry_feature_loss(projected, teacher[0])
    wanted = sum(
        float((length_one(a) - length_one(b)).square().sum())
        for a, b in zip(projected.flatten(0, 1), teacher[0].flatten(0, 1), strict=True)
    )
    assert count == 3 * patches
    assert value.item() == pytest.approx(wanted, rel=1e-5)
    projected = drawn(3, patches, language_width, seed=6)
    value, count = language_feature_loss(projected, teacher[1])
    wanted = 0.0
    for a, b in zip(projected, teacher[1], strict=True):
        wanted += 1 - float(length_one(a.mean(0)) @ length_one(b.mean(0)))
    assert count == 3
    assert value.item() == pytest.approx(wanted, rel=1e-5)


def test_structure_needs_no_matrix_of_pairs_and_its_gradient_is_that_of_one():
    student = [drawn(2, 40, 6, seed=n).float().requires_grad_() for n in (1, 2)]
    teacher = [drawn(2, 40, width, seed=n).float() for n, width in ((3, 6), (4, 5))]
    value, _ = structure_loss(tuple(student), tuple(teacher))
    got = torch.autograd.grad(value, student)
    z = torch.cat([nn.functional.normalize(part, dim=-1) for part in student], 1)
    y = torch.cat(
        [nn.functional.pad(nn.functional.normalize(part, dim=-1), (0, 6 - part.shape[-1])) for part in teacher], 1
    )
    whole = ((z @ z.transpose(1, 2) - y @ y.transpose(1, 2)).square().sum((1, 2)) / 80**2).sum()
    for a, b in zip(got, torch.autograd.grad(whole, student), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert value.item() == pytest.approx(whole.item(), rel=1e-5)


def test_a_student_like_its_teachers_loses_nothing():
    features = drawn(2, 5, 6), drawn(2, 5, 6, seed=1)
    assert structure_loss(features, (3 * features[0], 0.1 * features[1]))[0].item() == pytest.approx(0, abs=1e-9)
    assert geometry_feature_loss(features[0], 2 * features[0])[0].item() == pytest.approx(0, abs=1e-9)
    assert language_feature_loss(features[0], 2 * features[0])[0].item() == pytest.approx(0, abs=1e-6)


def test_grids_meet():
    ramp = torch.arange(4.0).repeat(2, 3, 1).flatten(1)[..., None]  # two frames of 3 x 4 patches, columns 0..3
    assert resized_to_grid(ramp, (3, 4), (3, 4)) is ramp
    wide = resized_to_grid(ramp, (3, 4), (5, 8)).view(2, 5, 8)
    torch.testing.assert_close(wide[0, 0], torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]))
    assert (wide == wide[:1, :1]).all()
    with pytest.raises(ValueError, match="wanted 3 x 5 patches; got 12"):
        resized_to_grid(ramp, (3, 5), (3, 4))


# ---------------------------------------------------------------------- teachers and clips


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders: a student, a geometry teacher of another grid, a CLIP, clips."""
    root = tmp_path_factory.mktemp("stage1")
    initialise("vidllm-tiny", root / "student", seed=1)
    vision = AutoConfig.for_model(
        "dinov2_with_registers", hidden_size=24, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=28,
        patch_size=7, num_register_tokens=1,
    )  # fmt: skip
    torch.manual_seed(5)
    AutoModel.from_config(vision).save_pretrained(root / "dino")
    clip = AutoConfig.for_model(
        "clip",
        vision_config={"hidden_size": 20, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        text_config={"hidden_size": 20, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50},
        projection_dim=16,
    )  # fmt: skip
    AutoModel.from_config(clip).save_pretrained(root / "clip")
    (root / "clips" / "deep").mkdir(parents=True)
    write_synthetic_clip(root / "clips" / "one.mp4")
    write_synthetic_clip(root / "clips" / "deep" / "two.mp4")
    (root / "clips" / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for n in range(5):
        Image.fromarray(rng.integers(0, 255, (30, 44, 3), dtype=np.uint8)).save(
            root / "clips" / "pictures" / f"{n}.png"
        )
    return root


def settings_of(places, **changes):
    values = {
        "model": places / "student",
        "geometry_teacher": places / "dino",
        "language_teacher": places / "clip",
        **changes,
    }
    return [f"{name}={value}" for name, value in values.items()]


def test_teachers_give_what_transformers_gives(places):
    frames = torch.rand(3, 3, 28, 42, generator=torch.Generator().manual_seed(2))
    dino = VisionTeacher(str(places / "dino"))
    features, grid = dino.features(frames, ())
    assert (features.shape, grid, dino.width) == ((3, 24, 24), (4, 6), 24)
    model = AutoModel.from_pretrained(places / "dino").eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        wanted = model((frames - mean) / std).last_hidden_state[:, -24:]
    torch.testing.assert_close(features, wanted)
    clip = VisionTeacher(str(places / "clip"))
    features, grid = clip.features(frames, ())
    assert features.shape == (3, grid[0] * grid[1], 20)
    assert not clip.training
    assert not clip.train().training
    assert not any(p.requires_grad for p in clip.parameters())
    # a Vid-LLM checkpoint is a teacher too, by any of its streams; a fresh adapter changes nothing
    own = VidLLMForConditionalGeneration.from_pretrained(places / "student")
    for stream in ("encoder", "language"):
        teacher = VisionTeacher(str(places / "student"), stream)
        features, grid = teacher.features(frames, ())
        assert (features.shape, grid) == ((3, 6, 32), (2, 3))
        with torch.no_grad():
            torch.testing.assert_close(features, own.model.encoder((frames - mean) / std).patch_tokens)


def test_wrong_teachers(places, tmp_path):
    for place, stream, message in (
        (str(places / "dino"), "sideways", "wanted a stream of encoder, geometry, language; got 'sideways'"),
        (str(places / "dino"), "language", "of Vid-LLM checkpoints alone"),
        (str(tmp_path), "encoder", "wanted a vision model of transformers"),
    ):
        with pytest.raises(ValueError, match=message):
            VisionTeacher(place, stream)


def test_clips_of_a_folder_come_all_before_one_comes_twice(places):
    clips = ClipFolder(places / "clips", frames_kept=4)
    assert clips.names == ["deep/two.mp4", "one.mp4", "pictures"]
    visits = ClipVisits(clips, 9, num_frames=2, seed=3)
    seen = [visits[n] for n in range(9)]
    assert [sorted(clip.clip for clip in seen[n : n + 3]) for n in (0, 3, 6)] == [clips.names] * 3
    for clip in seen:
        kept = clips.kept(clips.reader(clip.clip))
        assert len(clip.indices) == 2
        assert set(clip.indices) <= set(kept)
        assert clip.indices == sorted(clip.indices)
    again = ClipVisits(clips, 9, num_frames=2, seed=3)[4]
    assert (again.clip, again.indices) == (seen[4].clip, seen[4].indices)
    assert len({tuple(clip.indices) for clip in seen}) > 3
    (places / "empty").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match="wanted videos or folders of pictures"):
        ClipFolder(places / "empty")


def test_features_on_disk_are_those_of_the_model_and_a_killed_run_goes_on(places, tmp_path):
    processor = build_untrained("vidllm-tiny")[1]
    clips, teacher = ClipFolder(places / "clips", frames_kept=3), VisionTeacher(str(places / "dino"))
    done = []
    assert precompute(teacher, clips, processor, tmp_path / "out", 2, lambda *n: done.append(n)) == 3
    assert done == [(1, 3), (2, 3), (3, 3)]
    folder = open_teacher(str(tmp_path / "out"))
    assert isinstance(folder, FeatureFolder)
    batch = ClipCollator(processor)([ClipVisits(clips, 3, 2, seed=1)[n] for n in range(3)])
    for row, keys in enumerate(batch["frame_keys"]):
        frames, height, width = batch["video_size_shw"][row].tolist()
        pixels = batch["pixel_values_videos"][row, :frames, :, :height, :width]
        mean, std = (
            torch.tensor(v).view(3, 1, 1)
            for v in (processor.video_processor.image_mean, processor.video_processor.image_std)
        )
        rgb = (pixels * std + mean).clamp(0, 1)
        (got, grid), (wanted, wanted_grid) = folder.features(rgb, keys), teacher.features(rgb, keys)
        assert grid == wanted_grid
        torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-3)
    # one clip is lost, one is broken: these alone are made again
    names = sorted((tmp_path / "out").glob("features-*.safetensors"))
    names[0].unlink()
    names[1].write_bytes(names[1].read_bytes()[:-10])
    assert precompute(teacher, clips, processor, tmp_path / "out") == 2
    assert precompute(teacher, clips, processor, tmp_path / "out") == 0
    with pytest.raises(ValueError, match="holds those of"):
        FeatureWriter(tmp_path / "out", FeatureFacts("another", "encoder", 24, None, 3))
    with pytest.raises(ValueError, match="holds nothing of the clip elsewhere"):
        folder.features(rgb, [FrameKey("elsewhere", 0)])
    with pytest.raises(ValueError, match="wanted 17"):
        folder.features(rgb, [FrameKey("pictures", 17, clips.identity("pictures"))])


# ---------------------------------------------------------------------- trainer


def losses_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds_per_step"} for line in lines]


@pytest.fixture(scope="module")
def run(places):
    """Six steps on the clips, a checkpoint after each three."""
    out = places / "run"
    torch.set_num_threads(1)
    chosen = chosen_distill_recipe(
        "debug_stage1",
        settings_of(places, steps=6, save_every=3, num_frames=2, frames_kept=4, batch_size=3),
        str(places / "clips"),
    )
    return out, train_distill(chosen, out, use_cpu=True)


def test_a_run_teaches_encoder_and_adapter_and_nothing_else(places, run):
    out, trainer = run
    lines = losses_of(out)
    assert all(set(TERMS) <= set(line) for line in lines)
    for name in ("geometry_feature", "language_feature"):
        assert lines[-1][name] < lines[0][name]
    before = VidLLMForConditionalGeneration.from_pretrained(places / "student").state_dict()
    after = VidLLMForConditionalGeneration.from_pretrained(out).state_dict()
    unreachable = set(trainer.student.model.encoder.unreachable_parameters)
    for name, value in after.items():
        learned = name.startswith(("model.encoder.", "model.adapter."))
        learned &= name.removeprefix("model.encoder.") not in unreachable
        assert torch.equal(value, before[name]) != learned, name
    assert json.loads((out / "recipe.json").read_text())["recipe"]["name"] == "debug_stage1"
    assert "project_geometry" not in " ".join(load_file(out / "model.safetensors"))


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(places, run, tmp_path):
    out, _ = run
    shutil.copytree(out, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    (tmp_path / "run" / "model.safetensors").unlink()
    chosen = chosen_distill_recipe(
        "debug_stage1",
        settings_of(places, steps=6, save_every=3, num_frames=2, frames_kept=4, batch_size=3),
        str(places / "clips"),
    )
    train_distill(chosen, tmp_path / "run", resume=True, use_cpu=True)
    assert losses_of(tmp_path / "run") == losses_of(out)
    wanted, got = load_file(out / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(got[name], value) for name, value in wanted.items())


def test_two_processes_of_two_are_one_of_four(places, tmp_path):
    settings = settings_of(places, steps=4, num_frames=2, frames_kept=4, save_every=2, schedule="constant_with_warmup")
    one = distill_process.trained_with_sgd([*settings, "batch_size=4"], places / "clips", tmp_path / "one")
    assert one.args.world_size == 1
    said, codes = run_two_processes(
        distill_process.__file__, places / "clips", tmp_path / "two", *settings, "batch_size=2"
    )
    assert codes == [0, 0], said
    mine, wanted = losses_of(tmp_path / "two"), losses_of(tmp_path / "one")
    assert len(mine) == len(wanted) == 4
    for a, b in zip(mine, wanted, strict=True):
        assert set(a) == set(b) >= set(TERMS)
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-7), (name, a["step"])
    assert json.loads((tmp_path / "two" / "recipe.json").read_text())["processes"] == 2
    before = load_file(places / "student" / "model.safetensors")
    for place in ("", "checkpoint-2", "checkpoint-4"):
        mine, wanted = (load_file(tmp_path / out / place / "model.safetensors") for out in ("two", "one"))
        assert set(mine) == set(wanted)
        for name, value in wanted.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-5)
        assert any((value - before[name]).abs().max() > 1e-4 for name, value in wanted.items())


@pytest.fixture
def make_trainer(places, tmp_path):
    def make(student="student", geometry="dino", language="clip", **settings):
        args = TrainingArguments(
            output_dir=str(tmp_path / "trainer"), use_cpu=True, max_steps=8, remove_unused_columns=False, report_to="none",
            disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        model = VidLLMForConditionalGeneration.from_pretrained(places / student, dtype=torch.float32)
        return VidLLMDistillationTrainer(
            model=model, args=args, processing_class=build_untrained("vidllm-tiny")[1],
            geometry_teacher=VisionTeacher(str(places / geometry)), language_teacher=VisionTeacher(str(places / language)),
            **settings,
        )  # fmt: skip

    return make


def pictures(name, frames, height, width, seed):
    rng = np.random.default_rng(seed)
    rgb = [rng.integers(0, 255, (height, width, 3), dtype=np.uint8) for _ in range(frames)]
    return ClipFrames(name, list(range(frames)), rgb)


def step(trainer, batches):
    batches, counts = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    trainer.model.zero_grad()
    total = sum(float(trainer.training_step(trainer.model, batch, counts)) for batch in batches)
    values = (trainer._window_sums / trainer._window_counts.clamp(min=1)).tolist()
    trainer._forget_window()
    return total, values, {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def test_a_step_cut_into_forwards_of_other_sizes_is_the_same_step(make_trainer):
    """Clips of other sizes and lengths, in one batch or alone."""
    trainer = make_trainer()
    collator = ClipCollator(trainer.processing_class)
    clips = [pictures("a", 3, 28, 42, 0), pictures("b", 2, 30, 60, 1), pictures("c", 1, 45, 30, 2)]
    whole = step(trainer, [collator(clips)])
    cut = step(trainer, [collator(clips[:1]), collator(clips[1:])])
    assert cut[0] == pytest.approx(whole[0], rel=1e-5)
    assert cut[1] == pytest.approx(whole[1], rel=1e-5)
    assert set(cut[2]) == set(whole[2])
    for name, grad in whole[2].items():
        torch.testing.assert_close(cut[2][name], grad, rtol=1e-3, atol=1e-6)
    assert {n.split(".")[0] for n in whole[2]} == {"model", "project_geometry", "project_language"}


def test_weights_weigh(make_trainer):
    collator = ClipCollator(build_untrained("vidllm-tiny")[1])
    batch = collator([pictures("a", 2, 28, 42, 0)])
    total, values, _ = step(make_trainer(weights={"structure": 3.0, "language_feature": 0.0}), [batch])
    assert total == pytest.approx(values[0] + 3 * values[2], rel=1e-5)


def test_a_student_that_is_its_geometry_teacher_is_refused(make_trainer, places):
    trainer = make_trainer(geometry="student")
    batch = ClipCollator(trainer.processing_class)([pictures("a", 2, 28, 42, 0)])
    with pytest.raises(ValueError, match="wanted a student that differs from its geometry teacher"):
        step(trainer, [batch])
    with pytest.raises(ValueError, match="there would be nothing to learn"):
        chosen_distill_recipe("nano_stage1", settings_of(places, geometry_teacher=places / "student"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_copy_of_the_student_is_refused_as_its_teacher_whatever_the_precision(places, tmp_path, precision):
    """In bfloat16 the student's weights and products are rounded, and its teacher's are not."""
    shutil.copytree(places / "student", tmp_path / "copy")
    halves = [f"precision={precision}", f"weights_dtype={precision}"]
    settings = [*settings_of(places, geometry_teacher=tmp_path / "copy"), *halves]
    chosen = chosen_distill_recipe("debug_stage1", settings, str(places / "clips"))
    with pytest.raises(ValueError, match="wanted a student that differs from its geometry teacher"):
        train_distill(chosen, tmp_path / "run", use_cpu=True)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_student_that_is_near_its_teacher_has_something_to_learn(make_trainer, places):
    """Weights that differ by a tenth; and what a run goes on from may have become its teacher."""
    trainer = make_trainer(geometry="student")
    batch = ClipCollator(trainer.processing_class)([pictures("a", 2, 28, 42, 0)])
    trainer.state.global_step = 1
    total, _, _ = step(trainer, [batch])
    assert total > 0
    trainer = make_trainer(geometry="student")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.student.model.encoder.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    assert step(trainer, [batch])[0] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"geometry_teacher": None}, "wanted geometry_teacher: --set geometry_teacher="),
        ({"language_teacher": None}, "wanted language_teacher"),
        ({"weights": "depth:1"}, "weights: wanted names among geometry_feature"),
        ({"learning_rate_factors": "[x:0.1"}, r"learning_rate_factors: wanted a regular expression; got '\[x'"),
        ({"learning_rate_factors": "x:-1"}, "learning_rate_factors.x: wanted a factor of at least 0; got -1.0"),
        ({"betas": "0.9,1"}, "betas: wanted two numbers in 0..1"),
        ({"held_out.data": "x.jsonl"}, r"no setting of held-out data.*got held_out.data=x.jsonl"),
        ({"held_out.split": "test"}, r"no setting of held-out data.*got held_out.split=test"),
        ({"geometry_stream": "up"}, "geometry_stream: wanted one of encoder, geometry, language"),
        ({"steps": 0}, "steps: wanted at least 1"),
        ({"step": 5}, "did you mean 'steps'"),
    ],
)
def test_wrong_recipes(places, changes, message):
    settings = [text for text in settings_of(places, **changes) if not text.endswith("=None")]
    with pytest.raises(ValueError, match=message):
        chosen_distill_recipe("debug_stage1", settings)


def test_recipes_are_complete_but_for_what_users_have(places, capsys):
    assert set(DISTILL_RECIPES) == {"debug_stage1", "nano_stage1", "paper_stage1"}
    paper = DISTILL_RECIPES["paper_stage1"]()
    assert (paper.betas, paper.weight_decay, paper.clip, paper.num_frames) == ((0.9, 0.999), 0.05, 1.0, 32)
    with pytest.raises(ValueError, match=r"wanted either clips .* or rooms; got neither"):
        chosen_distill_recipe("paper_stage1", settings_of(places))
    assert main(["nano_stage1", "--out", str(places / "never")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: nano_stage1: wanted geometry_teacher")
    assert len(error.splitlines()) == 1
