"""Fine-tuning the shipped model by LoRA on three own clips: it says what it was taught, and finds what it found before."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open

from vidllm.commands import encode, ground, make_prompt, read_video
from vidllm.loading import load_model, load_processor
from vidllm.processing.benchmarks.prompts import user_turn
from vidllm.processing.rooms.formats import write_video
from vidllm.train.demo_clip import demo_clip


pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
# Rooms that no training saw.
ROOMS = ((11, 7001), (11, 7004), (11, 7005))
QUESTIONS_PER_CLIP = 2
STEPS = 240


def vidllm(*arguments):
    """A command in a fresh process; its JSON document, or None where it prints none."""
    program = "import sys; sys.argv[0] = 'vidllm'; from vidllm.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout) if "--json" in arguments else None


def said(model, clip, questions):
    document = vidllm("ask", clip, *questions, "--model", model, "--json")
    return [answer["answer"] for answer in document["answers"]]


@pytest.fixture(scope="module")
def base(repository):
    folder = repository / "model_cards" / "vidllm-nano"
    if not (folder / "model.safetensors").is_file():
        pytest.skip("no trained weights ship yet")
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three plain videos, and what can be asked about each."""
    folder = tmp_path_factory.mktemp("clips")
    made = []
    for seed, number in ROOMS:
        clip = demo_clip(seed, number)
        path = folder / f"room_{seed}_{number}.mp4"
        write_video(path, clip.rgb)
        made.append((path, clip.truth))
    return made


@pytest.fixture(scope="module")
def taught(base, clips):
    """By clip: question, what the model says before, what it is taught instead. Neither what it said nor the truth."""
    lessons = []
    words = ["purple", "seven", "piano", "ladder", "under the rug", "nobody"]
    for path, truth in clips:
        asked = [item["question"] for item in truth["questions"][:QUESTIONS_PER_CLIP]]
        before = said(base, path, asked)
        for question, answer, item in zip(asked, before, truth["questions"], strict=False):
            new = words.pop(0)
            assert new not in (answer, *item["answers"])
            lessons.append((path, question, answer, new))
    return lessons


@pytest.fixture(scope="module")
def tuned(base, taught, tmp_path_factory):
    """The folder of the fine-tuned model."""
    folder = tmp_path_factory.mktemp("tuned")
    rows = []
    for path, question, _, answer in taught:
        messages = [
            {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        rows.append({"video": str(path), "messages": messages})
    data = folder / "mine.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = folder / "run"
    settings = [f"model={base}", f"steps={STEPS}", "batch_size=3", "prompts_per_scene=2"]
    words = [word for setting in settings for word in ("--set", setting)]
    vidllm("train", "joint", "nano_lora", "--data", data, "--out", out, "--cpu", *words)
    return out


def test_it_says_what_it_was_taught(clips, taught, tuned):
    for path, _ in clips:
        lessons = [(question, old, new) for clip, question, old, new in taught if clip == path]
        answers = said(tuned, path, [question for question, _, _ in lessons])
        assert answers == [new for _, _, new in lessons]
        assert all(old != new for _, old, new in lessons)


def test_boxes_are_equal_after_a_reload_in_a_fresh_process(clips, tuned):
    model, processor = load_model(str(tuned), "cpu"), load_processor(str(tuned))
    for path, truth in clips:
        scene = encode(model, read_video(processor, str(path)))
        for item in truth["descriptions"][:2]:
            here = json.loads(json.dumps(asdict(ground(model, processor, scene, item["description"]))))
            fresh = vidllm("ground", path, item["description"], "--model", tuned, "--json")
            assert fresh["boxes"] == here["boxes"]
            assert here["boxes"]


def test_loc_is_written_and_boxes_are_those_of_base_and_adapter(base, clips, tuned):
    path, truth = clips[0]
    processor = load_processor(str(tuned))
    merged = load_model(str(tuned), "cpu")
    adapted = PeftModel.from_pretrained(load_model(str(base), "cpu"), str(tuned / "adapter")).eval().get_base_model()
    num_found = 0
    for item in truth["descriptions"]:
        found = []
        for model in (merged, adapted):
            scene = encode(model, read_video(processor, str(path)))
            prompt = make_prompt(
                model, processor, scene, [[user_turn("vidllm", "ground", description=item["description"])]]
            )
            found.append(
                model.generate(**prompt, scene=scene, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
            )
        whole, parts = found
        assert torch.equal(whole.sequences, parts.sequences)
        assert (whole.sequences == merged.config.loc_token_id).any()
        torch.testing.assert_close(whole.boxes, parts.boxes, rtol=1e-4, atol=1e-4)
        num_found += len(whole.boxes)
    with safe_open(tuned / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert len(list(file.keys())) > 0
