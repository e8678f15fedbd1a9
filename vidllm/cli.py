"""The `vidllm` command: arguments in, results out. What the commands do is in `commands.py` and its neighbours.

Heavy libraries are imported inside the commands, so that `vidllm --help` is quick.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from vidllm.cli_bench import bench
from vidllm.cli_console import VidLLMCommands, progress, say, write, write_json
from vidllm.cli_data import data, rooms
from vidllm.cli_eval import evaluate, report
from vidllm.cli_hub import card, push
from vidllm.cli_train import train


app = typer.Typer(
    cls=VidLLMCommands,
    name="vidllm",
    help="From a plain video of a room to answers, 3D boxes, captions and a metric reconstruction.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Video = Annotated[str, typer.Argument(metavar="VIDEO", help="Video file, folder of images, or an image.")]
Model = Annotated[str | None, typer.Option("--model", metavar="PATH_OR_ID", help="Checkpoint folder or Hub id.")]
Frames = Annotated[int | None, typer.Option("--frames", min=1, help="Frames to sample; default: the checkpoint's.")]
Geometry = Annotated[
    str | None,
    typer.Option(
        "--geometry",
        metavar="POSES",
        help="Known camera poses in metres: a cameras.json, a TUM trajectory, or a folder with COLMAP's text model.",
    ),
]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ...; default: CUDA if there is.")]
NewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", min=1, help="Longest answer; default: the checkpoint's.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]


def write_lines(lines: list[str]) -> None:
    """Lines of the result on stdout."""
    for line in lines:
        write(line)


def show_version(wanted: bool) -> None:
    """Print the version and stop."""
    if wanted:
        from vidllm import __version__

        write(f"vidllm {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def options(
    ctx: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="VIDLLM_DEBUG", help="Show the traceback of errors, and all warnings.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=show_version, help="Print the version.")
    ] = False,
) -> None:
    """From a plain video of a room to answers, 3D boxes, captions and a metric reconstruction."""
    if ctx.invoked_subcommand is None:
        write(ctx.get_help())


@app.command()
def ask(
    video: Video,
    questions: Annotated[list[str], typer.Argument(metavar="QUESTION...", help="One or more questions.")],
    model: Model = None,
    frames: Frames = None,
    geometry: Geometry = None,
    max_new_tokens: NewTokens = None,
    device: Device = None,
    json: AsJson = False,
) -> None:
    """Answer questions about a room.

    The video is encoded once for all of them.
    """
    from vidllm import commands
    from vidllm.cli_session import open_session
    from vidllm.printing import answer_lines

    commands.check_texts(questions, "question")
    session = open_session(video, model, frames, geometry, device)
    scene = session.encode()
    with progress("answering"):
        answers = commands.ask(session.model, session.processor, scene, questions, max_new_tokens)
    unit = scene.reconstruction.unit
    if json:
        write_json({**session.header(unit), "answers": [asdict(answer) for answer in answers]})
        return
    for number, answer in enumerate(answers):
        write_lines([*([""] if number else []), *answer_lines(answer, unit)])


@app.command()
def chat(
    video: Video,
    model: Model = None,
    frames: Frames = None,
    geometry: Geometry = None,
    max_new_tokens: NewTokens = None,
    device: Device = None,
) -> None:
    """Talk about a room, one question per line.

    Answers appear as they are made, and later questions may refer to them. `exit` or Ctrl-D ends.
    """
    from vidllm.chat import ChatSession
    from vidllm.cli_session import open_session
    from vidllm.cli_streamer import PrintableStreamer
    from vidllm.printing import box_line

    session = open_session(video, model, frames, geometry, device)
    scene = session.encode()
    talk = ChatSession(session.model, session.processor, scene, max_new_tokens)
    say("ask about the room; an empty line does nothing, `exit` or Ctrl-D ends")
    for line in read_lines():
        if not line:
            say("type a question, or `exit`")
            continue
        if line in ("exit", "quit"):
            break
        forgotten = talk.num_forgotten
        try:
            answer = talk.ask(line, PrintableStreamer(session.processor.tokenizer))
        except KeyboardInterrupt:
            write()
            say("interrupted; this question is not remembered")
            continue
        except ValueError as error:
            say(f"error: {error}", style="bold red")
            continue
        write_lines([box_line(box, scene.reconstruction.unit) for box in answer.boxes])
        if talk.num_forgotten > forgotten:
            say(f"notice: too long for this model; {talk.num_forgotten} oldest turns are forgotten", style="yellow")


def read_lines() -> Iterator[str]:
    """Lines of stdin without surrounding blanks; with a prompt and line editing on a terminal."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            line = input("> ")
        except EOFError:
            write()
            return
        yield line.strip()


@app.command()
def ground(
    video: Video,
    description: Annotated[str, typer.Argument(metavar="DESCRIPTION", help='Such as "the chair at the window".')],
    model: Model = None,
    frames: Frames = None,
    geometry: Geometry = None,
    draw: Annotated[
        str | None,
        typer.Option(
            "--draw", metavar="FILE_OR_DIR", help="Draw the boxes on frames and map: a .png file or a folder."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write boxes.json and every export with the boxes.")
    ] = None,
    device: Device = None,
    json: AsJson = False,
) -> None:
    """Find what a sentence describes: 3D boxes.

    Boxes are in the room frame (z up, origin at the first camera).
    """
    from vidllm import commands, exporting
    from vidllm.cli_session import open_session
    from vidllm.printing import grounding_lines

    commands.check_texts([description], "description")
    pictures = None if draw is None else exporting.drawing_paths(draw)
    session = open_session(video, model, frames, geometry, device)
    folder = None if out is None else checked_folder(out)
    scene = session.encode()
    with progress("looking"):
        found = commands.ground(session.model, session.processor, scene, description)
    recon = scene.reconstruction
    document = {**session.header(recon.unit), "frame": "room", **asdict(found)}
    boxes = exporting.labelled_boxes([found])
    written = {}
    if pictures is not None:
        plain = exporting.plain_scene(session.processor, session.inputs, recon, boxes)
        written["drawn_frames"], written["drawn_map"] = exporting.draw(pictures, plain)
    if folder is not None:
        with progress(f"writing {folder}"):
            written |= exporting.export(folder, session.processor, session.inputs, recon, boxes)
            written["boxes"] = exporting.write_json_file(folder / "boxes.json", document)
    if json:
        write_json({**document, "files": {name: str(path) for name, path in written.items()}})
        return
    write_lines(grounding_lines(found, recon.unit))
    write_lines([f"wrote {path}" for path in written.values()])


@app.command()
def caption(
    video: Video,
    model: Model = None,
    point: Annotated[
        tuple[float, float, float] | None,
        typer.Option("--point", metavar="X Y Z", help="A place, in the unit of the reconstruction."),
    ] = None,
    frame_of: Annotated[
        str | None,
        typer.Option(
            "--frame-of", metavar="room|world", help="Frame of --point: room (what `ground` prints) or world."
        ),
    ] = None,
    frame: Annotated[
        int | None, typer.Option("--frame", min=0, help="With --pixel: number of the sampled frame, from 0.")
    ] = None,
    pixel: Annotated[
        tuple[float, float] | None,
        typer.Option(
            "--pixel",
            metavar="U V",
            help="With --frame: column and row in pixels of the model's input (see depth.npz).",
        ),
    ] = None,
    frames: Frames = None,
    geometry: Geometry = None,
    max_new_tokens: NewTokens = None,
    device: Device = None,
    json: AsJson = False,
) -> None:
    """Describe the object at a place.

    The place is a 3D point (`--point`), or a pixel of a sampled frame (`--frame` with `--pixel`).
    """
    from vidllm import commands
    from vidllm.cli_session import open_session
    from vidllm.printing import caption_lines

    check_place(point, frame_of, frame, pixel)
    session = open_session(video, model, frames, geometry, device)
    scene = session.encode()
    frame_of = frame_of or "room"
    if pixel is not None:
        frame_of, point = "world", scene.point_at(frame, *pixel).tolist()
    with progress("describing"):
        result = commands.caption(session.model, session.processor, scene, point, frame_of, max_new_tokens)
    unit = scene.reconstruction.unit
    if json:
        place = {} if pixel is None else {"sampled_frame": frame, "pixel": list(pixel)}
        write_json({**session.header(unit), **place, **asdict(result)})
        return
    write_lines(caption_lines(result, unit))


def check_place(point: tuple | None, frame_of: str | None, frame: int | None, pixel: tuple | None) -> None:
    """Exactly one place, in one of the two ways, with finite numbers."""
    import math

    if (point is None) == (frame is None and pixel is None) or (frame is None) != (pixel is None):
        raise ValueError("caption: wanted --point X Y Z, or --frame I with --pixel U V")
    if frame_of is not None and (point is None or frame_of not in ("room", "world")):
        raise ValueError(f"--frame-of: wanted room or world, with --point; got {frame_of}")
    for name, values in (("--point", point), ("--pixel", pixel)):
        if values is not None and not all(math.isfinite(value) for value in values):
            raise ValueError(f"{name}: wanted finite numbers; got {' '.join(map(str, values))}")


@app.command()
def reconstruct(
    video: Video,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the files.")],
    model: Model = None,
    frames: Frames = None,
    geometry: Geometry = None,
    device: Device = None,
    json: AsJson = False,
) -> None:
    """Write cameras, depth, points and pictures.

    In the folder: cameras.json, depth.npz, points.ply, scene.glb, trajectory.tum, colmap/, depth.png, map.png.
    """
    from vidllm import exporting
    from vidllm.cli_session import open_session, warn_if_relative
    from vidllm.printing import summary_lines

    session = open_session(video, model, frames, geometry, device)
    folder = checked_folder(out)
    session.load()
    with progress("reconstructing"):
        recon = session.model.reconstruct(
            session.inputs["pixel_values_videos"].to(session.model.device),
            session.inputs["video_size_shw"],
            geometry=session.geometry,
        )
    warn_if_relative(recon.unit)
    with progress(f"writing {folder}"):
        paths = exporting.export(folder, session.processor, session.inputs, recon)
    plain = exporting.plain_scene(session.processor, session.inputs, recon)
    summary = exporting.summarise(plain, session.inputs, float(recon.scale[0]))
    if json:
        files = {name: str(path) for name, path in paths.items()}
        write_json({**session.header(recon.unit), **summary, "files": files})
        return
    write_lines([*summary_lines(summary), f"geometry     {session.header(recon.unit)['geometry']}"])
    write_lines([f"wrote {path}" for path in paths.values()])


def checked_folder(out: Path) -> Path:
    """The folder of `--out`, made, before the model has run for minutes."""
    from vidllm.processing.export import check_export

    return check_export(out.expanduser())


@app.command()
def init(
    preset: Annotated[str, typer.Argument(metavar="PRESET", help="vidllm-7b, vidllm-4b, vidllm-nano or vidllm-tiny.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New or empty folder.")],
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the random weights.")] = 0,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32 (default), bfloat16 or float16; geometry stays float32.")
    ] = None,
    geometry: Annotated[
        str | None,
        typer.Option("--geometry", metavar="SOURCE", help="VGGT: Hub id, folder, .safetensors or .pt file."),
    ] = None,
    vision: Annotated[
        str | None,
        typer.Option("--vision", metavar="SOURCE", help="Image encoder in place of VGGT's: Hub id or folder."),
    ] = None,
    language_model: Annotated[
        str | None,
        typer.Option("--language-model", metavar="SOURCE", help="Decoder with its tokenizer: Hub id or folder."),
    ] = None,
    json: AsJson = False,
) -> None:
    """Make a starting checkpoint.

    Without sources: random weights and a byte-level tokenizer. With VGGT its reconstruction is VGGT's, in relative units: exactly so when loaded in
    VGGT's dtype (dtype=torch.float32), within rounding in a language model's bfloat16, in which the checkpoint then loads by default.
    """
    out = out.expanduser()
    if geometry is None and vision is None and language_model is None:
        with progress("making weights"):
            from vidllm.loading import no_progress_bars
            from vidllm.train.initialise import initialise

            with no_progress_bars():
                report = initialise(preset, out, seed=seed, dtype=dtype)
        say("notice: untrained weights (random) and a byte-level tokenizer: answers will be random", style="yellow")
    else:
        with progress("opening sources") as update:
            from vidllm.loading import no_progress_bars
            from vidllm.train.initialise import initialise_from_sources

            with no_progress_bars():
                report = initialise_from_sources(
                    preset, out, geometry, vision, language_model, seed=seed, dtype=dtype, progress=update
                )
        say("notice: nothing connects the parts before training: answers and boxes will be random", style="yellow")
        say(f"reconstruction: {report['reconstruction']}")
    if json:
        write_json({"folder": str(out), **report})
        return
    parts: dict[str, Any] = report["parts"]
    width = max(len(name) for name in (*parts, "total"))
    if "fresh" in parts:
        write_lines([_source_line(name, part, width) for name, part in parts.items()])
    else:
        write_lines([f"{name:{width}}  {part['fresh_parameters']:>14,}" for name, part in parts.items()])
    write_lines([f"{'total':{width}}  {report['total_parameters']:>14,} parameters, seed {seed}", f"wrote {out}"])


def _source_line(name: str, part: dict[str, Any], width: int) -> str:
    """One part of a composed checkpoint, for people."""
    if name == "fresh":
        return f"{name:{width}}  {part['parameters']:>14,} parameters, {', '.join(part['dtypes'])}"
    left_out = f", {len(part['keys_left_out'])} left out" if part["keys_left_out"] else ""
    return f"{name:{width}}  {len(part['keys_used']):>14,} tensors{left_out}, {', '.join(part['dtypes'])}, of {part['source']}"


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the results.")] = Path("outputs/demo"),
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="PATH_OR_ID", help="Another checkpoint; default: the one that comes with vidllm."
        ),
    ] = None,
    device: Device = None,
    json: AsJson = False,
) -> None:
    """The shipped model on a shipped clip, the truth beside each result.

    Answers questions, grounds descriptions, captions places, reconstructs; no network.
    In the folder: answers.json, points.ply, scene.glb, depth.png, map.png, boxes.png.
    """
    with progress("starting"):
        from vidllm.demo import run_demo
    document = run_demo(out.expanduser(), say if json else write, model, device)
    if json:
        write_json(document)


app.command()(rooms)
app.command(name="eval")(evaluate)
app.command()(report)
app.command()(bench)
app.command()(card)
app.command()(push)
app.add_typer(data, name="data")
app.add_typer(train, name="train")


def main() -> None:
    """Entry point of the console script."""
    # Read when transformers is imported: its advice is for people who write code.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app()
