"""Vertices of a PLY mesh, in the file's order.

Shapes: V vertices.
"""

from pathlib import Path

import numpy as np

from vidllm.processing.video_reading_vidllm import VidLLMInputError, VidLLMMissingFileError


TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2", "uint16": "u2",
    "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip
BYTE_ORDER = {"binary_little_endian": "<", "binary_big_endian": ">"}
MAX_HEADER_BYTES = 1 << 16


def read_ply_vertices(path: str | Path) -> np.ndarray:
    """Coordinates of all vertices.

    Args:
        path (`str` or `Path`): A PLY file, binary or text, whose vertices come first, as ScanNet's do.

    Returns:
        `np.ndarray` of shape `(V, 3)`, float32: as the file gives them.

    Raises:
        VidLLMInputError: Missing (then also `FileNotFoundError`), no PLY, cut within its vertices, or a coordinate that is not finite.

    Source:
        Ours: the vertex block is one structured array; mesh libraries may merge or reorder vertices, and segments go by position.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise VidLLMMissingFileError(f"{path}: no such file; wanted the mesh of a scan") from None
    except OSError as error:
        raise VidLLMInputError(f"{path}: cannot be read ({error.strerror or error})") from None
    end = content.find(b"end_header", 0, MAX_HEADER_BYTES)
    body = content.find(b"\n", end) + 1
    if not content.startswith(b"ply") or end < 0 or body == 0:
        raise VidLLMInputError(f"{path}: wanted a PLY file; got no PLY header")
    form, num_vertices, fields = _parse_header(content[:end].decode("ascii", errors="replace"), path)
    if form == "ascii":
        vertices = _read_text(content[body:], num_vertices, [name for name, _ in fields], path)
    else:
        row = np.dtype([(name, BYTE_ORDER[form] + kind) for name, kind in fields])
        if len(content) - body < num_vertices * row.itemsize:
            whole = (len(content) - body) // row.itemsize
            raise VidLLMInputError(f"{path}: the file is cut: {whole} of {num_vertices} vertices are whole")
        table = np.frombuffer(content, dtype=row, count=num_vertices, offset=body)
        vertices = np.stack([table[axis] for axis in "xyz"], axis=-1).astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(vertices).all(axis=1))
    if bad.size:
        raise VidLLMInputError(f"{path}, vertex {bad[0]}: wanted finite coordinates; got {vertices[bad[0]].tolist()}")
    return vertices


def _parse_header(header: str, path: Path) -> tuple[str, int, list[tuple[str, str]]]:
    """Format, number of vertices, and name and type of each field of a vertex."""
    form, num_vertices, fields, element = "", None, [], None
    for number, line in enumerate(header.splitlines(), 1):
        words = line.split()
        try:
            if words[:1] == ["format"]:
                form = words[1]
            elif words[:1] == ["element"]:
                if num_vertices is None and words[1] != "vertex":
                    raise VidLLMInputError(
                        f"{path}, line {number}: wanted vertices first; got the element {words[1]!r}"
                    )
                element = words[1]
                if element == "vertex":
                    num_vertices = int(words[2])
            elif words[:1] == ["property"] and element == "vertex":
                if words[1] == "list":
                    raise VidLLMInputError(f"{path}, line {number}: wanted vertices of plain numbers; got a list")
                fields.append((words[2], TYPES[words[1]]))
        except VidLLMInputError:
            raise
        except (IndexError, KeyError, ValueError):
            raise VidLLMInputError(f"{path}, line {number}: not a line of a PLY header: {line[:60]!r}") from None
    if form not in (*BYTE_ORDER, "ascii") or not num_vertices or num_vertices < 0:
        raise VidLLMInputError(
            f"{path}: wanted a PLY file with vertices; got format {form!r}, {num_vertices} vertices"
        )
    names = [name for name, _ in fields]
    if len(set(names)) < len(names) or not {"x", "y", "z"} <= set(names):
        raise VidLLMInputError(f"{path}: wanted vertices with x, y, z, each once; got {names}")
    return form, num_vertices, fields


def _read_text(body: bytes, num_vertices: int, names: list[str], path: Path) -> np.ndarray:
    """Vertices of a text PLY, (V, 3), float32."""
    lines = body.decode("ascii", errors="replace").splitlines()
    if len(lines) < num_vertices:
        raise VidLLMInputError(f"{path}: the file is cut: {len(lines)} of {num_vertices} vertices are there")
    columns = [names.index(axis) for axis in "xyz"]
    vertices = np.zeros((num_vertices, 3), dtype=np.float32)
    for row in range(num_vertices):
        words = lines[row].split()
        try:
            vertices[row] = [float(words[column]) for column in columns]
        except (IndexError, ValueError):
            raise VidLLMInputError(
                f"{path}, vertex {row}: wanted {len(names)} numbers; got {lines[row][:60]!r}"
            ) from None
    return vertices
