"""Who may import whom, and what the Hub's loader needs of the files that are saved into checkpoints."""

import ast
import re
import sys

import pytest
from contracts.source_tree import FOLDERS, ROOT, in_order, parse, python_files, relative, shipped_files


# who -> whom; a folder may always import itself and third-party code. Nobody imports train (but the face) or tests.
MAY_IMPORT = {
    "modeling_vidllm": set(),
    "processing": set(),
    "eval": {"modeling_vidllm", "processing"},
    "train": {"modeling_vidllm", "processing", "eval"},
    "vidllm": {"modeling_vidllm", "processing", "eval", "train", "model_cards"},
}
BARE_NAMES = {"modeling_vidllm", "processing", "train", "eval", "model_cards"}
# Everything else that a shipped file imports would become a requirement of everyone who loads a checkpoint.
# transformers itself requires numpy, huggingface_hub and safetensors.
SHIPPED_MAY_IMPORT = {
    "modeling_vidllm": {"torch", "numpy", "transformers", "huggingface_hub", "safetensors"},
    "processing": {"torch", "numpy", "transformers", "huggingface_hub", "safetensors", "PIL"},
}
# Only inside `try`, or inside `if is_av_available():` and the like, which the loader knows.
SHIPPED_MAY_GUARD = {
    "modeling_vidllm": {"torchvision"},
    "processing": {"av", "torchcodec", "torchvision"},
}
GUARD = re.compile(r"^is_\w+_available$")
LOADER_REGEX = re.compile(r"^\s*(?:from\s+\.(\S+)\s+import|import\s+\.(\S+)\s*$)", re.M)  # what transformers scans for


def imports(path):
    """(level, module, imported names, line, parents) of every import statement, and of import_module("...")."""
    for node, parents in in_order(parse(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name, (), node.lineno, parents
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", tuple(a.name for a in node.names), node.lineno, parents
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield 0, node.args[0].value, (), node.lineno, parents


def is_guarded(parents) -> bool:
    """Whether an import sits where the loader ignores it."""
    for parent in parents:
        if isinstance(parent, ast.Try):
            return True
        if isinstance(parent, ast.If):
            calls = [node for node in ast.walk(parent.test) if isinstance(node, ast.Call)]
            if any(GUARD.match(getattr(call.func, "id", "")) for call in calls):
                return True
    return False


def targets(path, level, module, names):
    """Top folders of ours that an import reaches: `vidllm.train.x` -> train, `from vidllm import Name` -> the face."""
    parts = module.split(".") if module else []
    if level:  # relative: resolve against the file's own place, `vidllm` being the root of all folders but the face
        own = list(path.relative_to(ROOT).parent.parts)
        package = own if own[0] == "vidllm" else ["vidllm", *own]
        parts = package[: len(package) - (level - 1)] + parts
    if not parts or parts[0] != "vidllm":
        return set()
    if len(parts) > 1:
        return {parts[1] if parts[1] in BARE_NAMES else "vidllm"}
    return {name if name in BARE_NAMES else "vidllm" for name in names} or {"vidllm"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_import_direction(folder):
    wrong = []
    for path in python_files(folder):
        for level, module, names, line, _ in imports(path):
            for target in targets(path, level, module, names) - {folder} - MAY_IMPORT[folder]:
                wrong.append(f"{relative(path)}:{line}: {folder}/ may not import {target}/")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", [*FOLDERS, "tests"])
def test_folders_are_never_imported_by_bare_name(folder):
    wrong = []
    for path in python_files(folder):
        for level, module, _, line, _ in imports(path):
            top = module.split(".")[0]
            if not level and top in BARE_NAMES:
                wrong.append(f"{relative(path)}:{line}: import vidllm.{module}; `{module}` is a second copy of it")
            if top == "tests" and folder != "tests":
                wrong.append(f"{relative(path)}:{line}: only tests import tests")
            if level > 1:
                wrong.append(f"{relative(path)}:{line}: parent-relative import; write `from vidllm...`")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", shipped_files(), ids=relative)
def test_shipped_file_survives_the_hub_loader(path):
    siblings = {p.stem for p in path.parent.glob("*_vidllm.py")}
    folder = path.parent.name
    for level, module, _, line, parents in imports(path):
        where = f"{relative(path)}:{line}"
        if level:
            assert level == 1, f"{where}: only `from .sibling import name` is copied into a checkpoint"
            assert module, f"{where}: `from . import x` saves no file; write `from .x import name`"
            assert module in siblings, f"{where}: `.{module}` is not a flat sibling that ships"
            continue
        top = module.split(".")[0]
        if top in sys.stdlib_module_names or top in SHIPPED_MAY_IMPORT[folder]:
            continue
        assert top in SHIPPED_MAY_GUARD[folder], f"{where}: `{top}` would become a requirement of every user"
        assert is_guarded(parents), f"{where}: `{top}` only inside try, or `if is_{top}_available():`"
    for a, b in LOADER_REGEX.findall(path.read_text(encoding="utf-8")):
        assert (a or b) in siblings, f"{relative(path)}: text that the loader reads as an import of `.{a or b}`"


@pytest.mark.parametrize("path", shipped_files(), ids=relative)
def test_shipped_file_has_no_type_checking_imports(path):
    names = {getattr(node, "id", getattr(node, "attr", None)) for node in ast.walk(parse(path))}
    assert "TYPE_CHECKING" not in names, f"{relative(path)}: the loader takes such imports for requirements"


@pytest.mark.parametrize("path", shipped_files(), ids=relative)
def test_transformers_reads_the_requirements_that_we_mean(path):
    """The same, by the loader's own functions."""
    from transformers.dynamic_module_utils import get_imports, get_relative_imports

    wanted = SHIPPED_MAY_IMPORT[path.parent.name]
    needed = {name for name in get_imports(str(path)) if name not in sys.stdlib_module_names}
    assert needed <= wanted, f"{relative(path)}: a user would have to install {sorted(needed - wanted)}"
    for name in get_relative_imports(str(path)):
        assert (path.parent / f"{name}.py").is_file(), f"{relative(path)}: the loader looks for {name}.py"


def test_shipped_file_names_are_unique_once_flattened():
    names = [path.name for path in shipped_files()]
    assert names, "no shipped file found"
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})


def test_configuration_and_face_import_no_torch():
    for path in (ROOT / "modeling_vidllm/configuration_vidllm.py", ROOT / "vidllm/__init__.py"):
        tops = {module.split(".")[0] for _, module, _, _, _ in imports(path)}
        assert "torch" not in tops, relative(path)


def test_no_test_folder_hides_the_package():
    """`tests/` is on sys.path during a run, so a folder `tests/vidllm` would be found before the installed package."""
    assert not (ROOT / "tests" / "vidllm").exists(), "tests of the face live in tests/face/"


@pytest.mark.parametrize(
    ("folder", "text", "caught"),
    [
        ("processing", "from vidllm.train import losses", "test_import_direction"),
        ("eval", "from vidllm import VidLLMModel", "test_import_direction"),
        ("train", "import processing.rooms", "test_folders_are_never_imported_by_bare_name"),
        ("train", "from ..eval import run", "test_folders_are_never_imported_by_bare_name"),
        ("modeling_vidllm", "def f():\n    import einops", "test_shipped_file_survives_the_hub_loader"),
        ("modeling_vidllm", "from . import geometry_vidllm", "test_shipped_file_survives_the_hub_loader"),
        ("modeling_vidllm", "from vidllm.processing.x import y", "test_shipped_file_survives_the_hub_loader"),
        ("modeling_vidllm", '"""\nfrom .nothing import here\n"""', "test_shipped_file_survives_the_hub_loader"),
        ("processing", "import av", "test_shipped_file_survives_the_hub_loader"),
        ("processing", "try:\n    import av\nexcept ImportError:\n    av = None", None),
        ("processing", "if is_av_available():\n    import av", None),
        ("processing", "from PIL import Image", None),
        ("modeling_vidllm", "from PIL import Image", "test_shipped_file_survives_the_hub_loader"),
    ],
)
def test_the_guards_catch_what_they_are_for(tmp_path, monkeypatch, folder, text, caught):
    path = tmp_path / folder / "toy_vidllm.py"
    path.parent.mkdir()
    path.write_text(text)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "relative", lambda p: p.relative_to(tmp_path).as_posix())
    monkeypatch.setitem(globals(), "python_files", lambda *folders: [path] if folder in folders else [])
    checks = {
        "test_import_direction": lambda: test_import_direction(folder),
        "test_folders_are_never_imported_by_bare_name": lambda: test_folders_are_never_imported_by_bare_name(folder),
        "test_shipped_file_survives_the_hub_loader": lambda: test_shipped_file_survives_the_hub_loader(path),
    }
    if caught is None:
        for check in checks.values():
            check()
    else:
        with pytest.raises(AssertionError):
            checks[caught]()
