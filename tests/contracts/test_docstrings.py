"""Docstrings of everything public: what they must state, checked from the text.

Public is what has no leading underscore, at module level or in the body of a public class, in a file without a leading
underscore. Dunder methods, nested functions and overloads are exempt. The rules:

1. Every public class, function, method and property has a docstring.
2. A function or method with a tensor (or array) among its annotated arguments or results states shapes. A docstring
   with an `Args:` section states one in the entry of each tensor argument, and one under `Returns:` (or `Yields:`) if a
   tensor is returned; a docstring without `Args:` states one anywhere, e.g. "`(batch, tokens)` -> `(batch,)`". A class
   with tensor fields (dataclass, ModelOutput) states one for each field in its `Args:` or `Attributes:` entry.
   A shape is a tuple such as `(batch, 3)`, `(..., 4, 4)`, `(batch,)`, `(...)` or `()`; or the words "scalar", "any shape",
   "same shape", "shape of". Tensors inside a dict are exempt: its keys name them.
3. Every public class and every public function of a module has a `Source:` section with at least one of `Paper: `,
   `Upstream: `, `Ours: `, each followed by text, or `Ours.` where there is no reason to give. Methods are covered by
   their class, except static methods that take or return tensors. The command line is exempt (there a docstring is the
   help text): `vidllm/cli*.py`, and functions decorated as commands.
"""

import ast
import re

import pytest
from contracts.source_tree import FOLDERS, parse, python_files, relative


TENSOR = re.compile(r"\b(?:\w*Tensor|ndarray)\b")
INSIDE_DICT = re.compile(r"\b(?:dict|Dict|Mapping|MutableMapping|OrderedDict)\[[^\[\]]*(?:\[[^\[\]]*\][^\[\]]*)*\]")
SHAPE = re.compile(
    r"\(\s*(?:\.\.\.|[A-Za-z0-9_][\w.]*(?:\s*[-+*/]+\s*[\w.]+)*)\s*,[^()]*(?:\([^()]*\)[^()]*)*\)|`\((?:\.\.\.)?\)`|\bscalars?\b"
    r"|\bany shape\b|\bsame shapes?\b|\bshape of\b"
)
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Source|Example|Examples|Note|Notes|Warns):\s*$")
LABEL = re.compile(r"\b(?:Paper|Upstream|Ours): \S|\bOurs\.")
EXEMPT_FROM_SOURCE = re.compile(r"^vidllm/cli\w*\.py$")
DECORATED_AS_COMMAND = {"command", "callback"}

FILES = [path for path in python_files(*FOLDERS) if not path.stem.startswith("_") or path.stem == "__init__"]


def sections(docstring: str) -> dict[str, str]:
    """Sections of a docstring by name; the text before the first one is named ''."""
    found, name = {"": []}, ""
    for line in docstring.splitlines():
        header = SECTION.match(line.strip())
        if header:
            name = header.group(1)
            found.setdefault(name, [])
        else:
            found[name].append(line)
    return {name: "\n".join(lines) for name, lines in found.items()}


def entries(section: str) -> dict[str, str]:
    """Entries of an `Args:` section by argument name; an entry may name several (`a, b (...)`)."""
    lines = [line for line in section.splitlines() if line.strip()]
    if not lines:
        return {}
    indent = min(len(line) - len(line.lstrip()) for line in lines)
    found, names = {}, []
    for line in lines:
        if len(line) - len(line.lstrip()) == indent:
            head = re.match(r"\s*\*{0,2}([\w`]+(?:\s*,\s*\*{0,2}[\w`]+)*)\s*[(:]", line)
            names = [name.strip(" `*") for name in head.group(1).split(",")] if head else []
        for name in names:
            found[name] = found.get(name, "") + " " + line.strip()
    return found


def holds_tensor(annotation: ast.expr | None) -> bool:
    """Whether an annotation names a tensor outside a dict."""
    if annotation is None:
        return False
    text = annotation.value if isinstance(annotation, ast.Constant) else ast.unparse(annotation)
    return bool(TENSOR.search(INSIDE_DICT.sub("", str(text))))


def has_shape(text: str) -> bool:
    return bool(SHAPE.search(" ".join(text.split())))


def decorators(node) -> set[str]:
    """Last names of a node's decorators: `app.command(...)` -> command."""
    names = set()
    for decorator in node.decorator_list:
        call = decorator.func if isinstance(decorator, ast.Call) else decorator
        names.add(call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", ""))
    return names


def tensor_arguments(function) -> list[str]:
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return [argument.arg for argument in every if argument is not None and holds_tensor(argument.annotation)]


def public(tree: ast.Module):
    """(qualified name, node, enclosing class or None) of everything public in a file."""

    def visit(body, prefix, owner):
        for node in body:
            if isinstance(node, ast.If | ast.Try):  # definitions under `if is_x_available():` are public too
                yield from visit([*node.body, *node.orelse], prefix, owner)
            elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                if node.name.startswith("_"):
                    continue
                yield prefix + node.name, node, owner
                if isinstance(node, ast.ClassDef):
                    yield from visit(node.body, f"{prefix}{node.name}.", node)

    yield from visit(tree.body, "", None)


def missing_shapes(node, docstring: str) -> list[str]:
    """What of a function's tensors, or of a class's tensor fields, has no shape in the docstring."""
    parts = sections(docstring)
    if isinstance(node, ast.ClassDef):
        fields = [
            item.target.id
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and holds_tensor(item.annotation)
        ]
        stated = entries(parts.get("Args", "") + "\n" + parts.get("Attributes", ""))
        return [f"field `{name}`" for name in fields if not has_shape(stated.get(name, ""))]
    arguments, result = tensor_arguments(node), holds_tensor(node.returns)
    if not arguments and not result:
        return []
    if "Args" not in parts:
        text = docstring if not arguments else "\n".join(v for k, v in parts.items() if k != "Source")
        return [] if has_shape(text) else ["its tensors"]
    stated = entries(parts["Args"])
    wrong = [f"argument `{name}`" for name in arguments if not has_shape(stated.get(name, ""))]
    if result and not has_shape(parts.get("Returns", "") + parts.get("Yields", "")):
        wrong.append("the result (`Returns:`)")
    return wrong


def wants_source(name: str, node, owner, file: str) -> bool:
    if EXEMPT_FROM_SOURCE.match(file) or DECORATED_AS_COMMAND & decorators(node):
        return False
    if owner is None or isinstance(node, ast.ClassDef):
        return True
    return "staticmethod" in decorators(node) and bool(tensor_arguments(node) or holds_tensor(node.returns))


def violations(file: str, tree: ast.Module) -> list[str]:
    wrong = []
    for name, node, owner in public(tree):
        where = f"{file}:{node.lineno}: {name}"
        if {"overload", "setter"} & decorators(node):
            continue
        docstring = ast.get_docstring(node)
        if not docstring:
            wrong.append(f"{where}: no docstring")
            continue
        wrong += [f"{where}: no shape for {what}" for what in missing_shapes(node, docstring)]
        if wants_source(name, node, owner, file) and not LABEL.search(sections(docstring).get("Source", "")):
            wrong.append(f"{where}: no `Source:` section with Paper, Upstream or Ours")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_public_docstrings(path):
    wrong = violations(relative(path), parse(path))
    assert not wrong, f"{len(wrong)} in {relative(path)}:\n" + "\n".join(wrong)


GOOD = '''
def lift(depth_m: torch.Tensor, scale: float = 1.0) -> torch.Tensor | None:
    """Lift.

    Args:
        depth_m (`torch.Tensor` of shape `(batch, height, width)`): Metres.
        scale (`float`): Factor.

    Returns:
        `torch.Tensor` of shape `(batch, height, width, 3)`: points.

    Source:
        Paper: eq. 3. Ours: the frame.
    """


class Layer(nn.Module):
    """A layer.

    Source:
        Ours: because.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., size)` -> `(..., size)`."""

    def state(self) -> dict[str, torch.Tensor]:
        """Weights by name."""
'''


def test_the_rules_accept_a_good_file():
    assert violations("toy.py", ast.parse(GOOD)) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (" of shape `(batch, height, width)`", "", "no shape for argument `depth_m`"),
        (" of shape `(batch, height, width, 3)`", "", "no shape for the result"),
        ("        depth_m (`torch.Tensor` of shape `(batch, height, width)`): Metres.\n", "", "argument `depth_m`"),
        ("Paper: eq. 3. Ours: the frame.", "Somewhere.", "no `Source:`"),
        ("    Source:\n        Ours: because.\n", "", "no `Source:`"),
        ('"""`(..., size)` -> `(..., size)`."""', '"""Apply the layer (see above)."""', "no shape for its tensors"),
        ('"""Weights by name."""', "pass", "no docstring"),
    ],
)
def test_the_rules_catch_what_they_are_for(old, new, message):
    assert GOOD.count(old) == 1
    found = violations("toy.py", ast.parse(GOOD.replace(old, new)))
    assert len(found) == 1
    assert message in found[0]
