"""The joint trainer: steps cut in any way are the same step, runs go on where they stopped, and nothing is learned that was not meant."""

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.processing.processing_vidllm import VidLLMProcessor
from vidllm.processing.rooms.write import write_rooms
from vidllm.train.held_out import HELD_OUT_NAME
from vidllm.train.initialise import build_untrained
from vidllm.train.joint import VidLLMJointTrainer, joint_data, main, starting_model, train_joint
from vidllm.train.joint_trainer import first_logit, freeze_for_joint, learns_metres
from vidllm.train.losses import TERMS
from vidllm.train.presets import preset
from vidllm.train.recipes import MixingSchedule, chosen_recipe
from vidllm.train.run_folder import checkpoint_to_resume
from vidllm.train.scene_data import SceneCollator, SceneDataset, SceneVisit, SceneVisits

from . import joint_process
from .stop_at import StopAt
from .two_processes import run_two_processes


pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory")
# 16 rooms, 8 of them in a step; everybody is given true geometry, because voxels and neighbours are discrete.
CUT = [
    "steps=10", "dense_labels=0", "rooms.num_rooms=16", "schedule=constant_with_warmup", "given_geometry.end=1", "save_every=100",
    "workers=0", "loc_labels=0.5", "dense_matching=1",
]  # fmt: skip


def log_of(folder):
    """Lines of a run's log, without the times."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds_per_step"} for line in lines]


def weights_of(folder):
    return load_file(Path(folder) / "model.safetensors")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("rooms_of_debug")


@pytest.fixture(scope="module")
def eight(tmp_path_factory, cache):
    """The run whose steps are one forward of eight scenes in one process."""
    out = tmp_path_factory.mktemp("joint") / "eight"
    torch.set_num_threads(1)
    joint_process.trained_with_sgd([*CUT, f"rooms_cache={cache}", "batch_size=8"], out)
    return out


def assert_same_run(folder, other):
    mine, wanted = log_of(folder), log_of(other)
    assert len(mine) == len(wanted) == 10
    for a, b in zip(mine, wanted, strict=True):
        assert set(a) == set(b)
        assert {*TERMS, "loss", "given_geometry", "loc_category", "loc_colour", "dense_match"} <= set(a)
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-7), (name, a["step"])
    mine, wanted = weights_of(folder), weights_of(other)
    for name in wanted:
        torch.testing.assert_close(mine[name], wanted[name], rtol=1e-4, atol=1e-5)


def test_two_forwards_of_four_are_one_of_eight(eight, cache, tmp_path):
    settings = [*CUT, f"rooms_cache={cache}", "batch_size=4", "accumulation=2"]
    joint_process.trained_with_sgd(settings, tmp_path / "run")
    assert_same_run(tmp_path / "run", eight)
    assert all(line["given_geometry"] == 1 for line in log_of(eight))


def test_two_processes_of_four_are_one_of_eight(eight, cache, tmp_path):
    settings = [*CUT, f"rooms_cache={cache}", "batch_size=4"]
    said, codes = run_two_processes(joint_process.__file__, tmp_path / "run", *settings)
    assert codes == [0, 0], said
    for rank in range(2):
        facts = json.loads((tmp_path / "run" / f"process-{rank}.json").read_text())
        assert facts == {"world_size": 2, "wrapped": "DistributedDataParallel"}
    assert_same_run(tmp_path / "run", eight)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(cache, tmp_path, monkeypatch, optimizer):
    settings = [
        f"optimizer={optimizer}", "steps=8", "save_every=5", "accumulation=2", "dense_labels=0", "rooms.num_rooms=16", f"rooms_cache={cache}", "keep_checkpoints=9",
    ]  # fmt: skip
    recipe = chosen_recipe("debug", settings)
    train_joint(recipe, tmp_path / "whole", use_cpu=True)
    train_joint(recipe, tmp_path / "parts", use_cpu=True, callbacks=[StopAt(5)])
    before = weights_of(tmp_path / "parts")
    timed_from, log = [], VidLLMJointTrainer.log
    monkeypatch.setattr(
        VidLLMJointTrainer, "log", lambda self, *args: (timed_from.append(self._window_start[1]), log(self, *args))
    )
    trainer = train_joint(recipe, tmp_path / "parts", use_cpu=True, resume=True)
    monkeypatch.undo()
    assert trainer.state.global_step == 8
    # seconds per step count the steps of this run alone
    assert timed_from[:3] == [5, 6, 7]
    wanted, got = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert set(got) == set(wanted)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert any(not torch.equal(got[name], before[name]) for name in before)
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    states = [
        torch.load(tmp_path / name / "checkpoint-8" / "optimizer.pt", weights_only=True)["state"]
        for name in ("whole", "parts")
    ]
    for mine, other in zip(states[0].values(), states[1].values(), strict=True):
        assert all(torch.equal(mine[key], other[key]) for key in mine)
    (entry,) = json.loads((tmp_path / "parts" / "recipe.json").read_text())["resumed"]
    assert (entry["from"], entry["changed"]) == ("checkpoint-5", [])


def test_what_sees_learns_the_same_whether_geometry_is_given_or_predicted(cache, tmp_path):
    """`nano_perception` gives it always: only language and boxes read it, and they are not learned there."""
    settings = [
        *(f"losses.weights.{name}=0" for name in ("token", "box_l1", "box_diou", "match")), "dense_matching=1", "freeze_encoder=false",
        r"train_only=\.(encoder|adapter|reconstruction|metric_depth)\.", "rooms.num_rooms=16", f"rooms_cache={cache}",
        "steps=3", "log_every=2",
    ]  # fmt: skip
    logs, weights = [], []
    for share in (0, 1):
        mixed = [f"given_geometry.start={share}", f"given_geometry.end={share}"]
        trainer = train_joint(chosen_recipe("debug", settings + mixed), tmp_path / str(share), use_cpu=True)
        logs.append(log_of(tmp_path / str(share)))
        weights.append(trainer.model.state_dict())
    predicted, given = weights
    assert all(torch.equal(value, given[name]) for name, value in predicted.items())
    assert [[line["given_geometry"] for line in lines] for lines in logs] == [[0] * 3, [1] * 3]
    # the last steps are told too, however many they are
    assert [line["step"] for line in logs[0]] == [1, 2, 3]
    read = [[line["token"] for line in lines] for lines in logs]
    assert read[0] != read[1]
    seen = [[line["depth_regression"] for line in lines] for lines in logs]
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 3


def test_debug_trains_resumes_and_leaves_a_complete_folder(tmp_path, capfd, caplog):
    out = tmp_path / "run"
    assert main(["debug", "--out", str(out), "--cpu", "--set", "dense_labels=0"]) == 0
    document = json.loads((out / "recipe.json").read_text())
    assert document["recipe"]["steps"] == 2
    assert {"torch", "transformers", "python"} <= set(document["versions"])
    assert document["git"] is None or len(document["git"]["commit"]) == 40
    # a folder that holds a run is not overwritten, and a recipe is checked before anything is loaded
    assert main(["debug", "--out", str(out), "--cpu"]) == 2
    assert "--resume goes on from its last checkpoint" in capfd.readouterr().err
    assert main(["debug", "--out", str(tmp_path / "other"), "--cpu", "--resume"]) == 2
    assert "wanted a run with a checkpoint" in capfd.readouterr().err
    assert main(["debug", "--out", str(tmp_path / "other"), "--set", "stepps=4"]) == 2
    assert "did you mean 'steps'" in capfd.readouterr().err
    assert not (tmp_path / "other").exists()

    further = ["dense_labels=0", "steps=7", "log_every=3", "save_every=4", "keep_checkpoints=9"]
    further = [text for setting in further for text in ("--set", setting)]
    assert main(["debug", "--out", str(out), "--cpu", "--resume", *further]) == 0
    assert "resumed with another recipe: steps: 2 -> 7" in caplog.text
    # as the recipe says now, not as the checkpoint does
    assert [line["step"] for line in log_of(out)] == [1, 2, 3, 6, 7]
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4", "checkpoint-7"}
    model = VidLLMForConditionalGeneration.from_pretrained(out)
    processor = VidLLMProcessor.from_pretrained(out)
    assert model.config.is_metric
    assert "use_cache" not in json.loads((out / "config.json").read_text())
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What is this?"}]}]
    pixels = torch.randn(1, 3, 3, 28, 42)
    scene = model.encode_scene(pixels)
    inputs = processor.apply_chat_template(
        chat, scene=scene, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert model.generate(**inputs, scene=scene, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]
    assert (out / "modeling_vidllm.py").is_file()
    assert not (out / ".finished").exists()


# ---------------------------------------------------------------------- on the trainer itself


FRAMES = 3


@pytest.fixture(scope="module")
def tiny():
    return build_untrained("vidllm-tiny")


@pytest.fixture(scope="module")
def scenes(rooms_rows):
    return SceneDataset(rooms_rows, prompts_per_scene=4, num_frames=FRAMES)


@pytest.fixture
def make_trainer(tiny, tmp_path):
    """Trainers of fresh tiny models."""

    def make(**settings):
        model = settings.pop("model", None)
        if model is None:
            model = build_untrained("vidllm-tiny", seed=4)[0].train()
            # boxes are taught to no other
            model.config.is_metric = settings.pop("is_metric", True)
        args = TrainingArguments(
            output_dir=str(tmp_path / "trainer"), use_cpu=True, max_steps=8, remove_unused_columns=False, report_to="none",
            disable_tqdm=True, per_device_train_batch_size=2, logging_steps=1, weight_decay=0.05,
            train_sampling_strategy="sequential", save_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        for name in [name for name in settings if hasattr(args, name)]:
            setattr(args, name, settings.pop(name))
        trainer = VidLLMJointTrainer(model=model, args=args, **settings)
        trainer.state.max_steps = 8
        return trainer

    return make


def step(trainer, batches):
    """Losses of a step's batches by term, and the gradient."""
    batches, counts = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    trainer.model.zero_grad()
    total = sum(trainer.training_step(trainer.model, batch, counts) for batch in batches)
    values = dict(
        zip(trainer._names, (trainer._window_sums / trainer._window_counts.clamp(min=1)).tolist(), strict=True)
    )
    trainer._forget_window()
    gradient = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
    return {**values, "total": float(total)}, gradient


def test_prompts_behind_one_video_are_prompts_behind_copies_of_it(tiny, scenes, make_trainer):
    collator = SceneCollator(tiny[1], num_frames=FRAMES)
    picked = [scenes.prompts(scene, 0)[:3] for scene in (0, 2)]
    packed = collator([SceneVisit(samples, 0) for samples in picked])
    # Other epochs are other videos, here with the same frames.
    alone = collator([SceneVisit(samples[n : n + 1], n) for samples in picked for n in range(3)])
    assert packed["pixel_values_videos"].shape[0] == 2
    assert alone["pixel_values_videos"].shape[0] == len(alone["sample_ids"]) == len(packed["sample_ids"]) == 6
    trainer = make_trainer(given_geometry=MixingSchedule(start=1.0, end=1.0))
    values, gradient = step(trainer, [packed])
    other, other_gradient = step(trainer, [alone])
    assert values == pytest.approx(other, rel=1e-5, abs=1e-7)
    for name, grad in gradient.items():
        torch.testing.assert_close(grad, other_gradient[name], rtol=1e-3, atol=1e-4)


def test_every_step_touches_every_trained_parameter(tiny, scenes, make_trainer):
    """Also where a batch has no point, no box, and no true geometry."""
    collator = SceneCollator(tiny[1], num_frames=FRAMES)
    samples = [sample for sample in scenes.prompts(1, 0) if sample.task in ("qa", "sqa")]
    assert samples
    bare = collator([samples])
    for name in ("camera_mask", "depth_mask", "annotation_mask"):
        bare["targets"][name] = torch.zeros_like(bare["targets"][name])
    assert "coord_points_world" not in bare
    for freeze in (False, True):
        trainer = make_trainer(freeze_encoder=freeze)
        values, gradient = step(trainer, [bare])
        assert [name for name, grad in gradient.items() if grad is None] == []
        assert values["token"] > 0
        assert values["total"] == pytest.approx(values["token"] * trainer.losses.weights["token"], rel=1e-5)
        encoder = [name for name in gradient if name.startswith("model.encoder.")]
        assert bool(encoder) != freeze
    assert "model.encoder.model.embeddings.mask_token" in trainer.unreachable_parameters


def given(trainer, batches):
    """Ids of the first prompts of the videos that are given their geometry."""
    batches, _ = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    named = set()
    for batch in batches:
        first = {}
        for name, video in zip(batch["sample_ids"], batch["scene_index"].tolist(), strict=True):
            first.setdefault(video, name)
        mask = batch.get("given_mask", torch.zeros(len(first), dtype=torch.bool))
        named |= {first[video] for video in range(len(first)) if mask[video]}
    return named


def test_true_geometry_is_drawn_per_step_and_video_whatever_the_batch(tiny, scenes, make_trainer):
    collator = SceneCollator(tiny[1], num_frames=FRAMES)
    visits = SceneVisits(scenes, 6)
    one = [collator([visits[number] for number in range(6)])]
    three = [collator([visits[number], visits[number + 1]]) for number in (4, 0, 2)]
    trainer = make_trainer(given_geometry=MixingSchedule(start=0.5, end=0.5))
    draws = []
    for number in range(5):
        trainer.state.global_step = number
        draws.append(given(trainer, one))
        assert given(trainer, three) == draws[-1]
    assert len(set(map(frozenset, draws))) > 2
    assert 0 < sum(map(len, draws)) < 30
    other = make_trainer(given_geometry=MixingSchedule(start=0.5, end=0.5), seed=9)
    assert given(other, one) != draws[0]
    assert given(make_trainer(), one) == set()
    # of a video without true geometry there is none to give
    always = make_trainer(given_geometry=MixingSchedule(start=1.0, end=1.0))
    lacking = collator([visits[number] for number in range(6)])
    lacking["targets"]["camera_mask"][1] = False
    lacking["targets"]["depth_mask"][4] = False
    assert len(given(always, [lacking])) == 4
    # and the schedule follows the step
    decaying = make_trainer(given_geometry=MixingSchedule(start=1.0, end=0.0, until=0.5))
    assert len(given(decaying, one)) == 6
    decaying.state.global_step = 4
    assert given(decaying, one) == set()


def test_what_is_not_trained_stays_as_it_is_and_in_evaluation_mode(tiny, scenes, make_trainer):
    trainer = make_trainer(train_only=r"language_model|grounding", freeze_encoder=False)
    batch = SceneCollator(tiny[1], num_frames=FRAMES)([scenes.prompts(0, 0), scenes.prompts(1, 0)])
    _, gradient = step(trainer, [batch])
    learned = {name for name, grad in gradient.items() if grad is not None}
    names = [name for name, _ in trainer.model.named_parameters()]
    assert learned == {name for name in names if "language_model" in name or "grounding" in name}
    trainer.model.train()
    modes = {name: part.training for name, part in trainer.model.model.named_children()}
    assert {name for name, training in modes.items() if training} == {"language_model", "grounding"}
    # what gradients pass through is still computed twice where that is wanted
    frozen = dict(trainer.model.model.reconstruction.named_modules())
    in_training = {name for name, part in frozen.items() if part.training}
    assert (
        in_training == {name for name, part in frozen.items() if isinstance(part, GradientCheckpointingLayer)} != set()
    )
    trainer.model.eval()
    assert not any(part.training for part in trainer.model.modules())
    with pytest.raises(ValueError, match="'nowhere' fits none"):
        make_trainer(train_only="nowhere")


def test_given_geometry_reaches_the_model(tiny, scenes, make_trainer):
    trainer = make_trainer(given_geometry=MixingSchedule(start=1.0, end=1.0))
    batch = SceneCollator(tiny[1], num_frames=FRAMES)([scenes.prompts(0, 0), scenes.prompts(1, 0)])
    (batch,), counts = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    _, output = trainer.compute_loss(trainer.model, batch, return_outputs=True, num_items_in_batch=counts)
    recon = output.scene.reconstruction
    torch.testing.assert_close(recon.depth, batch["targets"]["depth_m"])
    torch.testing.assert_close(recon.cam_from_world, batch["targets"]["cam_from_world"], rtol=1e-4, atol=1e-4)
    assert (recon.room_from_world - output.raw_reconstruction.room_from_world).abs().max() < 1e-6


def test_logits_are_computed_from_where_labels_begin(tiny, scenes, make_trainer):
    trainer = make_trainer()
    batch = SceneCollator(tiny[1], num_frames=FRAMES)([scenes.prompts(0, 0), scenes.prompts(1, 0)])
    whole = {**batch, "first_logit": 0}
    loss, output = trainer.compute_loss(trainer.model, whole, return_outputs=True)
    cut_loss, cut = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert cut.logits.shape[1] < output.logits.shape[1] == batch["labels"].shape[1]
    assert cut_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    labels = torch.full((2, 5), -100)
    assert first_logit(labels) == 4
    labels[1, 3] = 7
    assert first_logit(labels) == 2
    labels[0, 0] = 7
    assert first_logit(labels) == 0


class Probe:
    """A loss without gradient on how many prompts a batch has; not a number for one of the samples."""

    name = "probe"
    forward_kwargs = {"output_adapter_tokens": True}

    def __init__(self, poisoned=None):
        self.poisoned = poisoned
        self.seen, self.progress = [], []

    def weight(self, progress):
        self.progress.append(progress)
        return 0.5

    def terms(self, output, batch, config):
        assert output.lang_tokens is not None
        value = float("nan") if self.poisoned in batch["sample_ids"] else float(len(batch["sample_ids"]) ** 2)
        self.seen.append((value, len(batch["sample_ids"])))
        return {
            "probe": (torch.tensor(value) + 0 * output.logits.sum(), torch.tensor(float(len(batch["sample_ids"]))))
        }

    def counts(self, batch, config):
        return {"probe": torch.tensor(float(len(batch["sample_ids"])))}


def test_a_further_loss_is_weighted_counted_and_logged(tiny, scenes, make_trainer):
    probe = Probe()
    visits = SceneVisits(scenes, 16)
    trainer = make_trainer(
        plugins=[probe], train_dataset=visits, data_collator=SceneCollator(tiny[1], num_frames=FRAMES), max_steps=4,
        gradient_accumulation_steps=2, logging_steps=3,
    )  # fmt: skip
    trainer.train()
    first, *rest = probe.progress[::2]
    assert [first, *rest] == [0.0, 0.25, 0.5, 0.75]
    (line,) = [line for line in trainer.state.log_history if "probe" in line]
    assert line["step"] == 3
    # the mean over all prompts that were seen, not over the forwards' means
    values, counts = zip(*probe.seen[:6], strict=True)
    assert len(set(counts)) > 1 or len(set(values)) == 1
    assert line["probe"] == pytest.approx(sum(values) / sum(counts))
    # loss is the mean of the steps' totals
    plain = make_trainer(train_dataset=visits, data_collator=SceneCollator(tiny[1], num_frames=FRAMES), max_steps=1)
    batches = list(itertools.islice(plain.get_train_dataloader(), 1))
    values, _ = step(plain, batches)
    probed, _ = step(make_trainer(plugins=[Probe()]), batches)
    assert probed["total"] == pytest.approx(values["total"] + 0.5 * probed["probe"], rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples(tiny, scenes, make_trainer):
    visits = SceneVisits(scenes, 8)
    poisoned = f"{visits[5].samples[0].sample_id}@1"
    trainer = make_trainer(
        plugins=[Probe(poisoned)],
        train_dataset=visits,
        data_collator=SceneCollator(tiny[1], num_frames=FRAMES),
        max_steps=4,
    )
    with pytest.raises(
        FloatingPointError, match="step 3: wanted finite losses; got probe = nan for the samples"
    ) as error:
        trainer.train()
    assert poisoned in str(error.value)
    assert f"{visits[4].samples[0].sample_id}@1" in str(error.value)
    assert f"{visits[2].samples[0].sample_id}@0" not in str(error.value)


def test_a_gradient_that_is_not_finite_is_noticed_too(tiny, scenes, make_trainer):
    visits = SceneVisits(scenes, 8)
    trainer = make_trainer(
        train_dataset=visits, data_collator=SceneCollator(tiny[1], num_frames=FRAMES), max_steps=4, logging_steps=50
    )
    parameter = trainer.model.lm_head.weight
    parameter.register_hook(lambda grad: grad * float("inf") if trainer.state.global_step == 1 else grad)
    with pytest.raises(
        FloatingPointError, match=r"step 2: wanted finite losses; got gradient = (inf|nan) for the"
    ) as error:
        trainer.train()
    assert f"{visits[2].samples[0].sample_id}@0" in str(error.value)


def test_decay_and_learning_rates_by_parameter(make_trainer):
    trainer = make_trainer(
        learning_rate_factors={r"language_model\.layers\.0\.": 0.1, "language_model|lm_head": 0.5}, freeze_encoder=True
    )
    trainer.args.learning_rate = 2e-3
    optimizer = trainer.create_optimizer()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    groups = {
        names[id(p)]: (group["lr"], group["weight_decay"], p.ndim)
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert set(groups) == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert optimizer.param_groups[0]["lr"] == 2e-3
    for name, (rate, decay, ndim) in groups.items():
        assert decay == (0.05 if ndim > 1 else 0.0), name
        factor = (
            0.1 if "language_model.layers.0." in name else 0.5 if "language_model" in name or "lm_head" in name else 1
        )
        assert rate == pytest.approx(2e-3 * factor), name
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    with pytest.raises(
        ValueError, match="learning_rate_factors: wanted names of trained parameters; nothing is left for head_of"
    ):
        make_trainer(learning_rate_factors={"head_of_nothing": 0.1}).create_optimizer()


def test_an_unknown_optimizer_is_refused(make_trainer):
    with pytest.raises(ValueError, match="optimizer_name: wanted one of adamw, muon; got 'moun'"):
        make_trainer(optimizer_name="moun")


def test_metres_are_promised_only_where_the_data_has_them_and_they_are_learned(make_trainer):
    def says_metres(**settings):
        return make_trainer(is_metric=False, **settings).model.config.is_metric

    assert says_metres(has_metric_depth=True)
    assert not says_metres()
    assert says_metres(has_metric_depth=True, train_only="metric_depth")
    assert not says_metres(has_metric_depth=True, train_only="language_model")
    assert not says_metres(has_metric_depth=True, freeze_geometry=True)
    # depth without cameras teaches metres alone
    assert says_metres(has_metric_depth=True, freeze_geometry=True, freeze_metric_depth=False)
    # of what was learned before, frozen parts take nothing away
    already = build_untrained("vidllm-tiny")[0]
    already.config.is_metric = True
    assert make_trainer(model=already, train_only="language_model").model.config.is_metric


def test_without_metric_depth_the_reconstruction_gives_metres():
    config = preset("vidllm-tiny").config(use_metric_depth=False, use_scale_alignment=False)
    model = VidLLMForConditionalGeneration(config)
    freeze_for_joint(model, freeze_encoder=True, train_only="reconstruction")
    assert learns_metres(model)
    freeze_for_joint(model, freeze_encoder=True, train_only="grounding")
    assert not learns_metres(model)


def test_arguments_that_would_lose_the_targets_are_refused(make_trainer):
    with pytest.raises(ValueError, match="wanted remove_unused_columns=False"):
        make_trainer(remove_unused_columns=True)


def test_half_precision_keeps_what_is_trained_in_float32(cache, tmp_path):
    settings = [
        "dense_labels=0",
        f"rooms_cache={cache}",
        "rooms.num_rooms=16",
        "precision=bfloat16",
        "weights_dtype=bfloat16",
    ]
    trainer = train_joint(chosen_recipe("debug", [*settings, "freeze_encoder=true"]), tmp_path / "run", use_cpu=True)
    dtypes = {p.requires_grad: set() for p in trainer.model.parameters()}
    for parameter in trainer.model.parameters():
        dtypes[parameter.requires_grad].add(parameter.dtype)
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}
    assert all(line["token"] > 0 for line in log_of(tmp_path / "run"))


def test_files_are_read_as_the_recipe_says(rooms_root, tiny, tmp_path):
    settings = ["model=vidllm-tiny", "prompts_per_scene=3", "benchmarks.scan2cap=0", "lora=none", "num_frames=3", "precision=float32",
                "weights_dtype=float32", "learning_rate_factors="]  # fmt: skip
    recipe = chosen_recipe("scannet", settings, data_root=str(rooms_root))
    with joint_data(recipe, tiny[0].config, tiny[1], 7, tmp_path) as data:
        assert len(data.visits) == 7
        assert data.has_metric_depth
        assert data.facts["data"]["scenes"] == 3
        assert set(data.facts["data"]["rows"]) == {"scanqa", "sqa3d", "scanrefer", "scan2cap"}
        batch = data.collator([data.visits[0], data.visits[6]])
    assert batch["pixel_values_videos"].shape == (2, 3, 3, 28, 42)
    assert not any(name.startswith("scan2cap") for name in batch["sample_ids"])


def test_the_decoder_chooses_among_proposals(tiny, tmp_path):
    for split, number in (("train", 2), ("val", 1)):
        write_rooms(tmp_path / "root", number, seed=3, difficulty="easy", size_hw=(28, 42), split=split)
    settings = [
        "num_frames=2",
        "benchmarks=scanqa:1,scanrefer:2",
        "dense_labels=0",
        "proposals=true",
        "held_out.scenes=1",
        "held_out.every=2",
    ]
    recipe = chosen_recipe("debug", settings, data_root=str(tmp_path / "root"))
    train_joint(recipe, tmp_path / "run", use_cpu=True)
    facts = json.loads((tmp_path / "run" / "recipe.json").read_text())["data"]
    assert facts["proposals"] == {"source": "true", "sha256": None}
    held_out = [json.loads(line) for line in (tmp_path / "run" / HELD_OUT_NAME).read_text().splitlines()]
    lines = [*log_of(tmp_path / "run"), *held_out]
    assert len(lines) == 4
    for line in lines:
        assert line["match"] > 0
        assert line["box_l1"] > 0

    config = copy.deepcopy(tiny[0].config)
    config.box_output = "text"
    for chosen, name in ((recipe, "proposals"), (chosen_recipe("debug", ["loc_labels=0.5"]), "loc_labels")):
        with (
            pytest.raises(ValueError, match=f'debug: wanted a model of box_output="decoder" for {name}; got "text"'),
            joint_data(chosen, config, tiny[1], 2, tmp_path / "run"),
        ):
            pass


def test_rooms_that_the_model_would_crop_are_refused(tmp_path):
    recipe = chosen_recipe("debug", ["rooms.size_hw=30,45"])
    with pytest.raises(
        ValueError, match=r"wanted pictures of the size that the model sees, \(28, 42\) .* got \(30, 45\)"
    ):
        train_joint(recipe, tmp_path / "run", use_cpu=True)


def test_a_model_that_is_nowhere(tmp_path):
    for name in ("vidllm-nanoo", str(tmp_path / "absent"), "./absent"):
        with pytest.raises(
            ValueError, match=r"model: wanted a preset .*a checkpoint folder or a Hub id; got .*did you mean"
        ):
            starting_model(chosen_recipe("debug", [f"model={name}"]))


def test_a_checkpoint_that_was_not_finished_is_passed_over(tmp_path):
    for step, whole in ((9, True), (10, True), (11, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
                (tmp_path / f"checkpoint-{step}" / name).touch()
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    assert checkpoint_to_resume(tmp_path, True) == str(tmp_path / "checkpoint-10")
    assert checkpoint_to_resume(tmp_path, str(tmp_path / "checkpoint-9")) == str(tmp_path / "checkpoint-9")
    with pytest.raises(ValueError, match="wanted a folder checkpoint-N of a run"):
        checkpoint_to_resume(tmp_path, str(tmp_path / "checkpoint-11"))
    assert checkpoint_to_resume(tmp_path / "new", False) is None
