"""Scan2Cap as a module of `evaluate`: `evaluate.load("eval/metrics/scan2cap")`, or this class."""

import datasets
import evaluate
import numpy as np

from vidllm.eval.metrics.answers import check_protocol
from vidllm.eval.metrics.scan2cap.captions import CAPTION_PROTOCOLS, CaptionedObject, caption_scores, caption_tokens
from vidllm.eval.metrics.scan2cap.scores import PROTOCOLS, scan2cap_scores
from vidllm.eval.metrics.scan2cap.toolbox import SceneCaptions, toolbox_scores


TOOLBOX = "benchmark_toolbox"
# By protocol: what `predictions` and `references` are.
_INPUTS = {
    **dict.fromkeys(PROTOCOLS, "predictions: captions; references: category and colour of the object"),
    **dict.fromkeys(
        CAPTION_PROTOCOLS,
        "predictions: captions, None without a proposal; references: key, descriptions, tokens (empty: cut here), iou of the proposal",
    ),
    TOOLBOX: "predictions: per scene captions and box corners of its proposals; references: captions and box corners of its objects",
}


class Scan2Cap(evaluate.Metric):
    """Captions of objects; the name that the module is loaded with is the protocol, because the inputs differ with it.

    * `rooms` (without a name too): see `scan2cap_scores`. References are dictionaries with `category` and `colour` (an empty text: none with
      a name).
    * `scan2cap`, `leo`, `video3dllm`, `ll3da`: see `caption_scores`. A prediction is a caption, None without a proposal. References are
      dictionaries with `key`, `descriptions`, `tokens` (may be empty, then descriptions are cut by `caption_tokens`), and the proposal's
      `iou`; `compute(iou_threshold=0.5)`.
    * `benchmark_toolbox`: see `toolbox_scores`. A prediction is a scene's proposals, a dictionary with `captions` and `corners`; a reference
      its objects, with `captions` (a list per object) and `corners`; captions between `sos` and `eos`.

    Source:
        Ours.
    """

    def _protocol(self, protocol: str | None) -> str:
        """The protocol loaded; another one cannot be asked for, because the inputs are kept as this one needs them."""
        name = "rooms" if self.config_name == "default" else self.config_name
        check_protocol("scan2cap", name, tuple(_INPUTS))
        if protocol not in (None, name):
            raise ValueError(
                f"scan2cap, protocol: loaded for {name!r}; got {protocol!r}: load the module with that name"
            )
        return name

    def _info(self) -> evaluate.MetricInfo:
        text, number = datasets.Value("string"), datasets.Value("float64")
        name, corners = self._protocol(None), datasets.List(datasets.List(datasets.List(number)))
        if name in PROTOCOLS:
            features = {"predictions": text, "references": {"category": text, "colour": text}}
        elif name in CAPTION_PROTOCOLS:
            described = {"key": text, "descriptions": datasets.List(text), "tokens": datasets.List(datasets.List(text)), "iou": number}  # fmt: skip
            features = {"predictions": text, "references": described}
        else:
            features = {
                "predictions": {"captions": datasets.List(text), "corners": corners},
                "references": {"captions": datasets.List(datasets.List(text)), "corners": corners},
            }
        return evaluate.MetricInfo(
            description="Captions of objects: by n-grams under the protocols of Scan2Cap's peers, or by category and colour (procedural rooms).",
            citation="Chen et al., Scan2Cap: Context-aware Dense Captioning in RGB-D Scans, CVPR 2021",
            inputs_description=_INPUTS[name],
            features=datasets.Features(features),
        )

    def _compute(
        self, predictions: list, references: list, protocol: str | None = None, iou_threshold: float = 0.5
    ) -> dict:
        name = self._protocol(protocol)
        pairs = list(zip(predictions, references, strict=True))
        if name in PROTOCOLS:
            return scan2cap_scores(
                predictions, [(reference["category"], reference["colour"] or None) for reference in references], name
            )
        if name in CAPTION_PROTOCOLS:
            return caption_scores([_object(*pair) for pair in pairs], name, iou_threshold)
        return toolbox_scores(
            {
                f"scene {number}": SceneCaptions(
                    tuple(tuple(texts) for texts in true["captions"]),
                    np.array(true["corners"]),
                    tuple(said["captions"]),
                    np.array(said["corners"]),
                )
                for number, (said, true) in enumerate(pairs)
            }
        )


def _object(caption: str | None, reference: dict) -> CaptionedObject:
    """An object as the functions take it."""
    descriptions = tuple(reference["descriptions"])
    tokens = tuple(tuple(words) for words in reference["tokens"]) or tuple(map(caption_tokens, descriptions))
    return CaptionedObject(reference["key"], descriptions, tokens, caption, iou=reference["iou"])
