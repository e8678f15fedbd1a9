"""The VGGT fixture through `vidllm init` and a saved checkpoint, as a program: `python -m parity.vggt_saved_model FOLDER`.

Writes the fixture's weights under VGGT's names, makes a starting checkpoint of them in a process of its own, loads it and compares. Prints one
JSON line. Needs 10 GB of disk.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from parity.vggt_filler import GOLDENS, expected_tensors, tensor_values
from parity.vggt_whole_model import TEXT_CONFIG, compare, run
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.train.initialise import initialise_from_sources
from vidllm.train.shard_writer import ShardWriter
from vidllm.train.tokenizer import byte_level_tokenizer
from vidllm.train.vggt_weights import vggt_key_map


def write_source(path: Path) -> int:
    """VGGT-1B without its point and track heads, one safetensors file; its bytes."""
    shapes = {key: rule.shape for key, rule in vggt_key_map().items()}
    with ShardWriter(path.parent, shapes, dict.fromkeys(shapes, torch.float32), 10**11) as writer:
        for key, shape in shapes.items():
            assert tuple(expected_tensors()[key][0]) == shape, key
            writer.write(key, torch.from_numpy(tensor_values(key, shape)))
    (path.parent / "model.safetensors").rename(path)
    return path.stat().st_size


def write_language_model(folder: Path) -> None:
    """A tiny decoder with a byte-level tokenizer."""
    config = AutoConfig.for_model(**{**TEXT_CONFIG, "vocab_size": 264})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)


def init(source: str, language_model: str, out: str) -> None:
    """In a process of its own: its peak memory on stdout."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.time()
    initialise_from_sources("vidllm-7b", out, geometry=source, language_model=language_model)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    json.dump({"before_kib": before, "peak_kib": peak, "seconds": time.time() - start}, sys.stdout)


def main() -> None:
    if sys.argv[1] == "--init":
        init(*sys.argv[2:])
        return
    torch.set_num_threads(2)
    folder = Path(sys.argv[1])
    (folder / "vggt").mkdir()
    source = folder / "vggt" / "vggt.safetensors"
    size = write_source(source)
    write_language_model(folder / "decoder")
    command = [sys.executable, "-m", "parity.vggt_saved_model", "--init", source, folder / "decoder", folder / "out"]
    made = json.loads(subprocess.run(list(map(str, command)), check=True, capture_output=True).stdout)
    source.unlink()
    model = VidLLMForConditionalGeneration.from_pretrained(folder / "out", dtype=torch.float32).eval()
    wanted = load_file(GOLDENS / "vggt_b1s3_56x84.safetensors")
    with torch.no_grad():
        report = {"tensors": compare(run(model.model, wanted["images"]), wanted), "source_bytes": size, "init": made}
    json.dump(report, sys.stdout)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
