"""A fresh process that knows a Hub folder and an adapter, and not this package: `adapter_process.py FOLDER ADAPTER FRAMES`; says what it answers as JSON."""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


QUESTION = "Where is the lamp?"


def answer_of(model, processor, frames_folder):
    """Text, boxes and scores of the answer to `QUESTION`, generated greedily, and the depth that came with it."""
    frames = [Image.open(path).convert("RGB") for path in sorted(Path(frames_folder).glob("*.png"))]
    chat = [{"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": QUESTION}]}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    (found,) = processor.post_process_grounding(output)
    ids = output.sequences[0, inputs["input_ids"].shape[1] :]
    return {
        "text": processor.tokenizer.decode(ids, skip_special_tokens=False),
        "boxes": torch.as_tensor(found["boxes"]).tolist(),
        "scores": torch.as_tensor(found["scores"]).tolist(),
    }


def main(folder, adapter, frames_folder):
    torch.set_num_threads(1)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    adapted = PeftModel.from_pretrained(model, adapter).eval()
    answer = answer_of(adapted, processor, frames_folder)
    answer["package"] = "vidllm" in sys.modules
    answer["class"] = type(model).__module__.split(".")[0]
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
