"""Runs in a fresh process that cannot import `vidllm`: everything through Auto classes and the code inside the checkpoint.

`python remote_code_client.py FOLDER VIDEO REFERENCE.safetensors WORK_FOLDER [any-to-any]`
"""

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path


class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("vidllm", "modeling_vidllm", "processing", "train"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Refuse())


def main(folder, video, reference, work, torchvision):
    import safetensors.torch
    import torch
    import transformers
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
        pipeline,
    )

    assert bool(importlib.util.find_spec("torchvision")) == torchvision
    try:
        importlib.import_module("vidllm")
    except ModuleNotFoundError:
        pass
    else:
        raise AssertionError("vidllm is importable")
    torch.set_num_threads(1)
    expected = safetensors.torch.load_file(reference)
    chat = [
        {
            "role": "user",
            "content": [{"type": "video", "path": str(video)}, {"type": "text", "text": "How many chairs are there?"}],
        }
    ]

    def answer(model, processor):
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            logits = model(**inputs).logits
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        processor.post_process_grounding(out)
        return {
            "input_ids": inputs["input_ids"],
            "pixel_values_videos": inputs["pixel_values_videos"],
            "logits": logits,
            "sequences": out.sequences,
        }

    def check(found, what):
        for name, value in expected.items():
            assert torch.equal(found[name], value), f"{what}: {name} differs"

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.model_type == "vidllm"
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert type(processor).__name__ == "VidLLMProcessor"
    for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM):
        model = auto_class.from_pretrained(folder, trust_remote_code=True).eval()
        assert type(model).__name__ == "VidLLMForConditionalGeneration", type(model)
        check(answer(model, processor), auto_class.__name__)

    again = Path(work) / "again"
    model.save_pretrained(again)
    processor.save_pretrained(again)
    there = {path.name for path in Path(folder).glob("*.py")}
    assert there == {path.name for path in again.glob("*.py")}, "saving again lost code files"
    model = AutoModel.from_pretrained(again, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(again, trust_remote_code=True)
    check(answer(model, processor), "saved and loaded again")

    ask = pipeline("image-text-to-text", model=str(folder), trust_remote_code=True)
    text = ask(text=chat, generate_kwargs={"max_new_tokens": 8, "do_sample": False}, return_full_text=False)[0][
        "generated_text"
    ]
    new = expected["sequences"][0, expected["input_ids"].shape[1] :]
    wanted = processor.decode(new, skip_special_tokens=True)
    assert text == wanted, f"pipeline: wanted {wanted!r}; got {text!r}"
    if torchvision:
        ask = pipeline("any-to-any", model=str(folder), trust_remote_code=True)
        text = ask(text=chat, generate_kwargs={"max_new_tokens": 8, "do_sample": False}, return_full_text=False)[0][
            "generated_text"
        ]
        assert text == wanted, f"any-to-any: wanted {wanted!r}; got {text!r}"
    print("remote code works with transformers", transformers.__version__)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]), torchvision="torchvision" in sys.argv[5:])
