"""A ScanNet scan by hand: ten vertices, five segments, objects whose boxes can be worked out on paper."""

import json
import struct


SCENE = "scene0900_00"
# Vertex, segment. Segments are numbered as ScanNet does it: any numbers, in any order.
VERTICES = [
    ((0.0, 0.0, 0.0), 70),
    ((2.0, 0.0, 0.0), 70),
    ((2.0, 1.0, 0.5), 70),
    ((4.0, 4.0, 0.0), 9),
    ((5.0, 4.0, 1.0), 9),
    ((6.0, 7.0, 2.0), 33),
    ((-1.0, -1.0, 0.0), 2),
    ((-3.0, -2.0, 0.0), 2),
    ((8.0, 8.0, 8.0), 500),
    ((9.0, 9.0, 9.0), 500),
]
GROUPS = [
    {"id": 0, "objectId": 0, "segments": [70], "label": "table"},
    {"id": 1, "objectId": 1, "segments": [9, 33], "label": "office chair"},
    {"id": 2, "objectId": 2, "segments": [2], "label": "floor"},
]
# A quarter turn about z and a shift: (x, y, z) -> (-y + 1.5, x - 0.5, z + 0.25).
ALIGNMENT_TEXT = "0 -1 0 1.5 1 0 0 -0.5 0 0 1 0.25 0 0 0 1"
HEADER = ["id", "raw_category", "category", "count", "nyu40id", "eigen13id", "nyuClass", "nyu40class", "eigen13class"]
LABELS = [
    ("table", 7, "table"),
    ("office chair", 5, "chair"),
    ("chair", 5, "chair"),
    ("floor", 2, "floor"),
    ("refrigerator", 24, "refridgerator"),
    ("mini fridge", 24, "refrigerator"),
    ("lamp", 35, "lamp"),
    ("trash can", 39, "otherfurniture"),
    ("box", 29, "box"),
]


def write_ply(path, vertices=None, form="binary_little_endian", cut=None):
    """x y z as f4, colours as u1, one triangle, as ScanNet's meshes have them."""
    points = [point for point, _ in VERTICES] if vertices is None else vertices
    header = (
        f"ply\nformat {form} 1.0\ncomment made by hand\nelement vertex {len(points)}\n"
        "property float x\nproperty float y\nproperty float z\n"
        "property uchar red\nproperty uchar green\nproperty uchar blue\nproperty uchar alpha\n"
        "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
    ).encode()
    order = ">" if form == "binary_big_endian" else "<"
    if form == "ascii":
        body = "".join(f"{x} {y} {z} 1 2 3 255\n" for x, y, z in points).encode() + b"3 0 1 2\n"
    else:
        body = b"".join(struct.pack(order + "3f4B", *point, 1, 2, 3, 255) for point in points)
        body += struct.pack(order + "B3i", 3, 0, 1, 2)
    path.write_bytes((header + body)[:cut])


def write_labels(path, newline="\n", extra=()):
    """ScanNet's label table, its first nine columns."""
    rows = [HEADER] + [
        [str(number), raw, raw, "1", str(nyu40_id), "0", "x", name, "y"]
        for number, (raw, nyu40_id, name) in enumerate([*LABELS, *extra], 1)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(newline.join("\t".join(row) for row in rows).encode() + newline.encode())


def write_scan(root, groups=None, alignment=ALIGNMENT_TEXT, scene=SCENE, labels=True, **ply):
    """`scans/<scene>` of a data root."""
    folder = root / "scans" / scene
    folder.mkdir(parents=True, exist_ok=True)
    write_ply(folder / f"{scene}_vh_clean_2.ply", **ply)
    segments = {"params": {}, "sceneId": scene, "segIndices": [segment for _, segment in VERTICES]}
    (folder / f"{scene}_vh_clean_2.0.010000.segs.json").write_text(json.dumps(segments))
    aggregation = {"sceneId": f"scannet.{scene}", "appId": "x", "segGroups": GROUPS if groups is None else groups}
    (folder / f"{scene}.aggregation.json").write_text(json.dumps(aggregation))
    if alignment is not None:
        line = f"axisAlignment = {alignment} \n" if alignment else ""
        (folder / f"{scene}.txt").write_text(line + "sceneType = Office\n")
    if labels:
        write_labels(root / "scannetv2-labels.combined.tsv")
    return folder
