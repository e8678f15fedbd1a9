"""The losses once more: float64, loops over videos, frames, pixels, tokens and boxes, written from the formulas and not from the code."""

import itertools
import math

import torch


def slow_terms(output, batch, config, settings):
    """Sums of all terms, each added up video by video, `<loc>` by `<loc>`."""
    sums = {}
    targets = batch["targets"]
    raw = output.raw_reconstruction
    for row, (frames, height, width) in enumerate(batch["video_size_shw"].tolist()):
        values = {}
        depth_m = targets["depth_m"][row, :frames, :height, :width]
        if not targets["depth_mask"][row]:
            depth_m = torch.zeros_like(depth_m)
        has_camera = bool(targets["camera_mask"][row])
        num_valid = int((depth_m > 0).sum())
        if config.use_metric_depth and num_valid:
            values["metric_depth"] = slow_metric_depth(
                output.metric_depth_m[row, :frames, :height, :width],
                depth_m,
                settings.metric_alpha,
                settings.metric_eps_m,
            )
        truth = slow_truth(
            depth_m,
            targets["intrinsics_px"][row, :frames],
            targets["cam_from_world"][row, :frames],
            normalise=config.use_metric_depth,
        )
        predicted = (
            raw.pose_encodings[row, :, :frames],
            raw.depth_relative[row, :frames, :height, :width],
            raw.depth_confidence[row, :frames, :height, :width],
        )
        if has_camera and int((depth_m[0] > 0).sum()) > settings.min_first_frame_pixels:
            values.update(slow_camera(predicted[0], truth["encodings"], settings))
        enough = num_valid >= settings.min_valid_pixels
        if enough and (has_camera or not config.use_metric_depth):
            errors = [
                [
                    [(predicted[1][s, y, x] - truth["depth"][s, y, x]) if depth_m[s, y, x] > 0 else None for x in range(width)]
                    for y in range(height)
                ]
                for s in range(frames)
            ]  # fmt: skip
            errors = [[[None if e is None else [e] for e in line] for line in frame] for frame in errors]
            values.update(slow_regression("depth", errors, predicted[2], settings.depth))
        if enough and has_camera:
            points = slow_points(predicted[1], predicted[0][-1])
            errors = [
                [
                    [
                        [points[s][y][x][i] - truth["points"][s][y][x][i] for i in range(3)] if depth_m[s, y, x] > 0 else None
                        for x in range(width)
                    ]
                    for y in range(height)
                ]
                for s in range(frames)
            ]  # fmt: skip
            values.update(slow_regression("points", errors, predicted[2], settings.points))
        if targets["annotation_mask"][row]:
            values["room_rotation"] = slow_room(raw.room_from_world[row], targets["annotation_from_world"][row])
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + value
    sums["token"] = slow_token(output.logits, batch["labels"])
    sums.update(slow_grounding(output, batch, config, settings))
    return sums


# ---- geometry


def rotation_of(quat):
    """Rotation matrix, rows of numbers, of a quaternion xyzw of any length, by turning the three axes."""
    x, y, z, w = quat
    norm = torch.sqrt(x * x + y * y + z * z + w * w)
    x, y, z, w = x / norm, y / norm, z / norm, w / norm
    return [
        [w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z],
    ]


def slow_points(depth, encodings):
    """World points, `[s][y][x][axis]`, of depth `(S, H, W)` and pose encodings `(S, 9)`."""
    frames, height, width = depth.shape
    points = []
    for s in range(frames):
        rot = rotation_of(encodings[s, 3:7])
        fy = height / 2 / torch.tan(encodings[s, 7] / 2)
        fx = width / 2 / torch.tan(encodings[s, 8] / 2)
        points.append([])
        for y in range(height):
            points[s].append([])
            for x in range(width):
                d = depth[s, y, x]
                cam = [(x - width / 2) / fx * d, (y - height / 2) / fy * d, d]
                cam = [cam[i] - encodings[s, i] for i in range(3)]
                points[s][y].append([sum(rot[i][axis] * cam[i] for i in range(3)) for axis in range(3)])
    return points


def slow_truth(depth_m, intrinsics, cam_from_world, normalise):
    """Encodings `(S, 9)`, depth `(S, H, W)`, points `[s][y][x][axis]` as seen from the first camera, in scene sizes."""
    depth_m, intrinsics, cam_from_world = depth_m.double(), intrinsics.double(), cam_from_world.double()
    frames, height, width = depth_m.shape
    first_from_world = cam_from_world[0]
    points, distances = [], []
    for s in range(frames):
        first_from_cam = first_from_world @ torch.linalg.inv(cam_from_world[s])
        points.append([])
        for y in range(height):
            points[s].append([])
            for x in range(width):
                ray = torch.linalg.solve(intrinsics[s], torch.tensor([x, y, 1.0], dtype=torch.float64))
                point = first_from_cam[:3, :3] @ (ray * depth_m[s, y, x]) + first_from_cam[:3, 3]
                points[s][y].append(point)
                if depth_m[s, y, x] > 0:
                    distances.append(float(point.norm()))
    scale = sum(distances) / (len(distances) + 1e-3) if normalise else 1.0
    encodings = []
    for s in range(frames):
        cam_from_first = cam_from_world[s] @ torch.linalg.inv(first_from_world)
        rot = cam_from_first[:3, :3]
        w = float((1 + rot.trace()).clamp(min=0).sqrt() / 2)
        xyz = [float(rot[2, 1] - rot[1, 2]), float(rot[0, 2] - rot[2, 0]), float(rot[1, 0] - rot[0, 1])]
        assert w > 0.1, "the formula wants turns well below half a turn"
        fov = [
            2 * math.atan(height / 2 / float(intrinsics[s, 1, 1])),
            2 * math.atan(width / 2 / float(intrinsics[s, 0, 0])),
        ]
        encodings.append([*(cam_from_first[:3, 3] / scale).tolist(), *[v / 4 / w for v in xyz], w, *fov])
    return {
        "encodings": torch.tensor(encodings, dtype=torch.float64),
        "depth": depth_m / max(scale, 1e-6),
        "points": [[[point / max(scale, 1e-6) for point in line] for line in frame] for frame in points],
    }


def slow_camera(encodings, wanted, settings):
    """Three terms of encodings `(iterations, S, 9)`."""
    iterations, frames = encodings.shape[:2]
    terms = {}
    for name, columns in (("translation", range(3)), ("rotation", range(3, 7)), ("fov", range(7, 9))):
        total = 0
        for i in range(iterations):
            errors = []
            for s in range(frames):
                parts = [encodings[i, s, c] - wanted[s, c] for c in columns]
                if settings.camera_norm == "l1":
                    errors += [part.abs() for part in parts]
                else:
                    errors.append(torch.sqrt(sum(part * part for part in parts)))
            if name == "translation":
                errors = [error.clamp(max=settings.max_translation_error) for error in errors]
            total = total + settings.iteration_decay ** (iterations - 1 - i) * sum(errors) / len(errors)
        terms[f"camera_{name}"] = total / iterations
    return terms


def slow_regression(name, errors, confidence, settings):
    """Three terms of errors `[s][y][x]` (a list of channels, or None where the truth is not known)."""
    frames, height, width = confidence.shape
    places = [
        (s, y, x)
        for s, y, x in itertools.product(range(frames), range(height), range(width))
        if errors[s][y][x] is not None
    ]
    lengths = {place: _length(errors[place[0]][place[1]][place[2]]) for place in places}
    weighted = [
        settings.confidence_gamma * lengths[p] * confidence[p] - settings.confidence_alpha * confidence[p].log()
        for p in places
    ]
    return {
        f"{name}_confidence": _mean(_without_outliers(weighted, settings)),
        f"{name}_regression": _mean(_without_outliers(list(lengths.values()), settings)),
        f"{name}_gradient": slow_differences(errors, confidence, settings),
    }


def slow_differences(errors, confidence, settings):
    """Mean over four scales of the differences between neighbours, per known channel."""
    total = 0
    for stride in (1, 2, 4, 8):
        summed, count = 0, 0
        for s, frame in enumerate(errors):
            grid = [line[::stride] for line in frame[::stride]]
            for y, x in itertools.product(range(len(grid)), range(len(grid[0]))):
                count += 0 if grid[y][x] is None else len(grid[y][x])
                for dy, dx in ((1, 0), (0, 1)):
                    if y + dy >= len(grid) or x + dx >= len(grid[0]):
                        continue
                    here, there = grid[y][x], grid[y + dy][x + dx]
                    differences = [0.0] * 3
                    if here is not None and there is not None:
                        differences = [
                            (b - a).abs().clamp(max=settings.max_error) for a, b in zip(here, there, strict=True)
                        ]
                    if settings.gradient == "grad_conf":
                        channels = len(next(e for line in frame for e in line if e is not None))
                        c = confidence[s, (y + dy) * stride, (x + dx) * stride]
                        differences = [
                            settings.confidence_gamma * d * c - settings.confidence_alpha * c.log()
                            for d in differences[:channels]
                        ]
                    summed = summed + sum(differences)
        total = total + (summed / count if count else 0)
    return total / 4


def _length(parts):
    return parts[0].abs() if len(parts) == 1 else torch.sqrt(sum(part * part for part in parts))


def _mean(values):
    return sum(values) / len(values)


def _without_outliers(values, settings):
    if settings.valid_range <= 0 or len(values) <= settings.min_elements:
        return values
    values = [value.clamp(max=settings.max_error) for value in values]
    ordered = sorted(value.item() for value in values)
    threshold = ordered[round(settings.valid_range * (len(ordered) - 1))]
    kept = [value for value in values if value.item() < threshold]
    return kept if len(kept) > settings.min_elements else values


def slow_metric_depth(predicted, true, alpha, eps):
    """Eq. 9 of each image that has a known pixel, then their mean."""
    images = []
    for image, truth in zip(predicted, true, strict=True):
        errors = [
            (p + eps).log() - math.log(float(t) + eps)
            for p, t in zip(image.flatten(), truth.double().flatten(), strict=True)
            if t > 0
        ]
        if errors:
            bias = _mean(errors)
            images.append(bias**2 + _mean([(e - bias) ** 2 / (1 + alpha * (e - bias).abs()) for e in errors]))
    return _mean(images)


def headings_of(annotation_from_world):
    """The four rotations that a room frame may have."""
    rot = annotation_from_world[:3, :3].double()
    turns = []
    for k in range(4):
        c, s = round(math.cos(k * math.pi / 2)), round(math.sin(k * math.pi / 2))
        turns.append(torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=torch.float64) @ rot)
    return turns


def slow_room(room_from_world, annotation_from_world):
    """Smallest of four angles."""
    angles = [
        torch.arccos(((room_from_world.T @ heading).trace() - 1) / 2) for heading in headings_of(annotation_from_world)
    ]
    return min(angles, key=lambda angle: angle.item())


# ---- language and boxes


def slow_token(logits, labels):
    """Surprise about each label, token by token."""
    total = logits.sum() * 0
    for q, row in enumerate(labels.tolist()):
        for position, label in enumerate(row[1:], start=1):
            if label != -100:
                scores = logits[q, position - 1]
                total = total - (scores[label] - torch.log(torch.exp(scores - scores.max()).sum()) - scores.max())
    return total


def slow_diou(a, b):
    """Distance IoU of two boxes of six numbers."""
    shared, enclosing, distance = 1.0, 0.0, 0.0
    for axis in range(3):
        low = [box[axis] - box[axis + 3] / 2 for box in (a, b)]
        high = [box[axis] + box[axis + 3] / 2 for box in (a, b)]
        shared = shared * (torch.minimum(*high) - torch.maximum(*low)).clamp(min=0)
        enclosing = enclosing + (torch.maximum(*high) - torch.minimum(*low)) ** 2
        distance = distance + (a[axis] - b[axis]) ** 2
    return shared / (_volume(a) + _volume(b) - shared) - distance / enclosing


def _volume(box):
    return box[3] * box[4] * box[5]


def slow_iou(a, b):
    """Overlap of two boxes, in floats."""
    shared = 1.0
    for axis in range(3):
        edges = [[float(box[axis] + side * box[3 + axis] / 2) for box in (a, b)] for side in (-1, 1)]
        shared *= max(min(edges[1]) - max(edges[0]), 0.0)
    return shared / (float(_volume(a) + _volume(b)) - shared)


def slow_boxes_of_loc(output, batch, q, block):
    """True boxes of a `<loc>` in the frame and unit of the decoder."""
    targets, video = batch["targets"], int(batch["scene_index"][q])
    room = output.scene.reconstruction.room_from_world[video].double()
    annotation = targets["annotation_from_world"][video].double()
    traces = [float((room.T @ heading).trace()) for heading in headings_of(annotation)]
    swapped = traces.index(max(traces)) % 2 == 1
    boxes = []
    for box, real, where in zip(
        targets["boxes_annotation"][q].double(), targets["box_mask"][q], targets["box_block"][q], strict=True
    ):
        if not real or int(where) != block:
            continue
        centre = annotation[:3, :3].T @ (box[:3] - annotation[:3, 3])
        size = box[[4, 3, 5]] if swapped else box[3:]
        boxes.append(torch.cat([room @ centre, size]) * float(output.scene.position_scale[video]))
    return boxes


def slow_grounding(output, batch, config, settings):
    """Boxes and matching, `<loc>` by `<loc>`, the best of all assignments."""
    found = output.grounding
    sums = {"box_l1": found.boxes_per_layer.sum() * 0, "box_diou": found.boxes_per_layer.sum() * 0}
    sums["match"] = found.match_logits.sum() * 0 + found.no_target_logit.sum() * 0
    row = 0
    for q, ids in enumerate(batch["input_ids"].tolist()):
        if batch["scene_index"][q] < 0:
            continue
        for block in range(ids.count(config.loc_token_id)):
            boxes = slow_boxes_of_loc(output, batch, q, block)
            queries = [t for t, real in enumerate(found.query_mask[row].tolist()) if real]
            logits = {t: found.match_logits[row, t] for t in queries}
            logits["none"] = found.no_target_logit[row]
            most = max(value.item() for value in logits.values())
            normaliser = torch.log(sum(torch.exp(value - most) for value in logits.values())) + most
            layers = found.boxes_per_layer[row]
            if batch["targets"]["boxes_known"][q]:
                if batch.get("proposal_boxes") is not None:
                    matches = _fitting(boxes, found.boxes[row], queries, settings.proposal_iou)
                else:
                    pairs = _best_pairs(boxes, layers[-1], queries, logits, normaliser, settings)
                    places, margin = found.query_positions[row], settings.match_margin
                    matches = [
                        (box, {t for t in queries if _is_near(places[t], boxes[box], margin)} | {assigned})
                        for box, assigned in pairs
                    ]
                if not boxes:
                    sums["match"] = sums["match"] + normaliser - logits["none"]
                together = []
                for box, near in matches:
                    shares = {t: torch.exp(logits[t] - most) for t in near}
                    together.append(normaliser - most - torch.log(sum(shares.values())))
                    for t, layer in itertools.product(near, layers):
                        trust = (shares[t] / sum(shares.values())).detach() / len(layers)
                        sums["box_l1"] = sums["box_l1"] + trust * (layer[t] - boxes[box]).abs().sum()
                        sums["box_diou"] = sums["box_diou"] + trust * (1 - slow_diou(layer[t], boxes[box]))
                if together:
                    sums["match"] = sums["match"] + _mean(together)
            row += 1
    assert row == len(found.no_target_logit)
    return sums


def _fitting(boxes, proposals, queries, least):
    """Pairs of a box and the proposals that are it, of those boxes that have any."""
    matches = []
    for number, box in enumerate(boxes):
        overlaps = {t: slow_iou(proposals[t].double(), box) for t in queries}
        best = max(overlaps.values())
        chosen = {t for t, overlap in overlaps.items() if overlap >= least or (overlap == best and best >= 0.25)}
        matches += [(number, chosen)] if chosen else []
    return matches


def _is_near(place, box, margin):
    """Whether a query starts in a box, or near it along every axis."""
    return all(abs(float(place[axis] - box[axis])) <= float(box[3 + axis]) / 2 + margin for axis in range(3))


def _best_pairs(boxes, last, queries, logits, normaliser, settings):
    """Pairs (box, query) of the cheapest assignment of all; as many boxes as there are queries for."""

    def cost_of(box, t):
        l1, far = (last[t] - box).abs().sum().item(), 1 - slow_diou(last[t], box).item()
        score = math.exp((logits[t] - normaliser).item())
        return settings.match_cost_l1 * l1 + settings.match_cost_diou * far - settings.match_cost_score * score

    cost = {(b, t): cost_of(box, t) for b, box in enumerate(boxes) for t in queries}
    number = min(len(boxes), len(queries))
    candidates = [
        list(zip(chosen, order, strict=True))
        for chosen in itertools.combinations(range(len(boxes)), number)
        for order in itertools.permutations(queries, number)
    ]
    return min(candidates, key=lambda pairs: sum(cost[pair] for pair in pairs))
