"""Run a Python file in an environment that has torchvision, where only its CUDA build is at hand.

    python tests/contracts/torchvision_present.py DIR file.py [arguments...]

`DIR` holds an unpacked torchvision (`pip install --no-deps --target DIR torchvision`; `make install` does it). The CUDA
build's extension cannot load beside a torch for the CPU, and then `import torchvision` fails, because two operators that
the extension would define are given further implementations while Python files are imported. Here those two are declared
(never implemented) first, so that the Python part of torchvision works: transforms, and all that transformers asks of it.
This is for tests of "torchvision is importable" only. It changes the process it runs in; the package never does this.
"""

import runpy
import sys
from pathlib import Path


# As the extension defines them.
MISSING_OPERATORS = {
    "torchvision::nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "torchvision::qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def extension_loads(folder: Path) -> bool:
    """Whether torchvision's compiled operators work with the installed torch; then nothing may be declared beside them."""
    import torch

    libraries = sorted((folder / "torchvision").glob("_C*.so"))
    if not libraries:
        return False
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError:
        return False
    return True


def make_importable(folder: Path) -> None:
    """Put an unpacked torchvision on sys.path, usable beside a torch for the CPU."""
    import torch

    if not (folder / "torchvision" / "__init__.py").is_file():
        raise SystemExit(f"no torchvision in {folder}: run `make install`")
    if not extension_loads(folder):
        for name, schema in MISSING_OPERATORS.items():
            torch.library.define(name, schema)
    sys.path.insert(0, str(folder))


def main(arguments: list[str]) -> None:
    """Make torchvision importable, then run a file as `__main__` with the arguments that are left."""
    if len(arguments) < 2:
        raise SystemExit("usage: torchvision_present.py DIR file.py [arguments...]")
    make_importable(Path(arguments[0]).resolve())
    script = Path(arguments[1]).resolve()
    sys.argv = [str(script), *arguments[2:]]
    # As `python file.py` would have it: the script's own folder instead of this one's.
    own = str(Path(__file__).resolve().parent)
    sys.path[:] = [str(script.parent) if entry == own else entry for entry in sys.path]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
