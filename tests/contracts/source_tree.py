"""The files that the static contracts read, and what they share: no imports of the package, only text and `ast`."""

import ast
import subprocess
from functools import cache
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (
    "modeling_vidllm",
    "processing",
    "train",
    "eval",
    "vidllm",
)  # each is `vidllm.<folder>`, the last one `vidllm`
SHIPPED_FOLDERS = ("modeling_vidllm", "processing")
SKIPPED = {".git", ".venv", "__pycache__", "outputs", "build", "dist", ".typecheck", ".hypothesis", ".pytest_cache"}


@cache
def source_files() -> tuple[Path, ...]:
    """Every file that is or could be committed: git's view of the tree, or the tree itself where there is no git."""
    listing = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=False,
    )
    if listing.returncode == 0 and listing.stdout:
        paths = [ROOT / name for name in listing.stdout.decode().split("\0") if name]
    else:
        paths = [
            path
            for path in ROOT.rglob("*")
            if not SKIPPED.intersection(path.relative_to(ROOT).parts) and not path.parent.name.endswith(".egg-info")
        ]
    return tuple(sorted({path for path in paths if path.is_file()}))


def relative(path: Path) -> str:
    """Path below the root, with forward slashes."""
    return path.relative_to(ROOT).as_posix()


def python_files(*folders: str) -> list[Path]:
    """Python files below the given folders of the root."""
    return [path for path in source_files() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in folders]


def is_saved_code(path: Path) -> bool:
    """Whether a file is a copy of shipped code inside a checkpoint; test_shipped_model.py compares it with its source."""
    parts = path.relative_to(ROOT).parts
    return len(parts) == 3 and parts[0] == "model_cards" and path.suffix == ".py"


def shipped_files() -> list[Path]:
    """Files that are saved into checkpoints."""
    return [p for p in python_files(*SHIPPED_FOLDERS) if p.parent.parent == ROOT and p.stem.endswith("_vidllm")]


@cache
def parse(path: Path) -> ast.Module:
    """Syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def in_order(node: ast.AST, parents: tuple[ast.AST, ...] = ()):
    """Every node below `node` with its chain of parents, outermost first."""
    yield node, parents
    for child in ast.iter_child_nodes(node):
        yield from in_order(child, (*parents, node))
