"""A results document as `vidllm eval` writes it, without an evaluation."""

import hashlib


def results_of(folder, name="easy", exact_match=0.5625):
    """A results document of the weights in a folder, as `vidllm eval` writes them."""
    weights = folder / "model.safetensors"
    return {
        "runs": {
            name: {
                "results": {
                    "scanqa": {"official": {"exact_match": exact_match, "colour/exact_match": 1 / 3}},
                    "reconstruction": {"metric": {"abs_rel": 0.14159, "delta_1": 0.875}},
                },
                "baselines": {
                    "blind": {"scanqa": {"official": {"exact_match": 0.25, "colour/exact_match": 0.2}}},
                    "constant": {"reconstruction": {"metric": {"abs_rel": 0.1, "delta_1": 0.5}}},
                },
            }
        },
        "provenance": {
            "model": "/somewhere/else/model",
            "weights_sha256": {weights.name: hashlib.sha256(weights.read_bytes()).hexdigest()},
            "versions": {"torch": "2.13.0"},
            "geometry": "predicted",
            "frames": 4,
            "data_root": "/somewhere/else/rooms",
            "splits": {"scanqa": "val"},
            "annotations_sha256": {},
            "rooms": {"val": 5},
            "counts": {"scanqa": {"rows": 48, "scored": 48}, "reconstruction": {"scored": 3}},
            "notes": ["scanqa: blind is a table | of answers"],
            "seconds_per_scene": 0.5,
            "command": "vidllm eval scanqa --data-root /somewhere/else/rooms",
        },
    }
