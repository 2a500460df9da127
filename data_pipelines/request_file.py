"""A request file, as a user or another program wrote it → checked `Request`s, before any parameter of a model is read.

In: JSON (one request) or JSONL (a batch), the folder where the media of URLs lie, values from the command line. Out:
`Request`s whose media exist and can be read. Every mistake is a `RequestError` of one sentence; nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from data_pipelines.request_fields import HINTS, MODES, Request, check_keys
from data_pipelines.request_media import Media, find, forget, kind_of, probe
from data_pipelines.request_values import RequestError, Wrong, show, tame

LARGEST, LARGEST_TEXT = 8 << 20, 1 << 20  # bytes of a request file, of a prompt's
SIGHT: tuple[str, ...] = ("image", "video")
OFFICIAL = Path(__file__).parent / "official" / "neg_prompts.json"  # cosmos-framework finds it by its name, too
UNREAD = ("inverse_dynamics", "policy")  # make actions; the official requests name the recorded ones all the same


def read(path: str | Path, media: Path | None = None, replace: Mapping[str, Any] | None = None) -> list[Request]:
    """The requests of a file. replace: keys from the command line, which win; their paths start where you are.

    RequestError: the first thing that is wrong. Names default to the file's stem (JSONL: stem_0, stem_1 …).
    """
    path = Path(path)
    forget()
    out: dict[str, Request] = {}
    for i, (where, said) in enumerate(_objects(path)):
        try:
            request = _request(said, where, path, media, replace or {}, i)
        except Wrong as e:
            raise RequestError(f"{where}: {e.at} {e.what}." if e.at else f"{where} {e.what}.") from None
        if request.name in out:
            raise RequestError(f"{where}: name {json.dumps(request.name)} is taken by another request; change one.")
        out[request.name] = request
    return list(out.values())


def _request(said: Any, where: str, path: Path, media: Path | None, replace: Mapping[str, Any], i: int) -> Request:
    if not isinstance(said, dict):
        raise Wrong("is not an object {…} of keys and values; write one request as one object")
    tame(said)
    if replace.get("prompt") is not None:
        said = {k: x for k, x in said.items() if k != "prompt_path"}
    said = said | {k: str(x) if isinstance(x, Path) else x for k, x in replace.items() if x is not None}
    values, notes = check_keys(said)
    if "name" not in values:
        values |= check_keys({"name": f"{path.stem}_{i}" if path.suffix.lower() == ".jsonl" else path.stem})[0]
    request = Request(**values, where=where, notes=notes)
    folders = dict.fromkeys(replace, Path()) | {"": path.parent}
    return _with_media(_with_texts(request, folders, media), folders, media)


def _objects(path: Path) -> list[tuple[str, Any]]:
    """(file and line, JSON value) of every request in a file."""
    if path.suffix.lower() not in (".json", ".jsonl"):
        raise RequestError(f"{path} is not a request file; its name must end in .json (one) or .jsonl (a batch).")
    try:
        if not path.is_file():
            raise RequestError(f"{path} is {'not a file' if path.exists() else 'not there'}; name a request file.")
        if path.stat().st_size > LARGEST:
            raise RequestError(
                f"{path} has {path.stat().st_size >> 20} MiB; a request file has at most {LARGEST >> 20}."
            )
        data = path.read_bytes()
    except OSError as e:
        raise RequestError(f"{path} cannot be opened ({e.strerror}); check the path.") from None
    if not data.strip():
        raise RequestError(f"{path} is empty; write a request into it.")
    if path.suffix.lower() == ".json":
        return [(str(path), _json(data, str(path)))]
    lines = [(f"{path}, line {i + 1}", x) for i, x in enumerate(data.split(b"\n")) if x.strip()]
    return [(where, _json(x, where)) for where, x in lines]


def _json(data: bytes, where: str) -> Any:
    """JSON with no key twice and no NaN. RequestError."""

    def pairs(said: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [k for k, _ in said]
        for k in keys if len(set(keys)) < len(keys) else ():
            if keys.count(k) > 1:
                raise Wrong(f"gives the key {json.dumps(k)[:60]} twice; keep one")
        return dict(said)

    def constant(name: str) -> None:
        raise Wrong(f"holds {name}, which is not a number; replace it")

    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=pairs, parse_constant=constant)
    except Wrong as e:
        raise RequestError(f"{where} {e.what}.") from None
    except UnicodeDecodeError:
        raise RequestError(f"{where} is not UTF-8 text; save it as UTF-8.") from None
    except json.JSONDecodeError as e:
        at = f"line {e.lineno}, column {e.colno}" if e.lineno > 1 else f"column {e.colno}"
        raise RequestError(f"{where} is not JSON ({e.msg}, {at}); repair it there.") from None
    except RecursionError:
        raise RequestError(f"{where} is nested too deeply; flatten it.") from None
    except ValueError:  # Python reads no whole number of more than 4,300 digits
        raise RequestError(f"{where} holds a number of thousands of digits; replace it.") from None


def _with_texts(request: Request, folders: Mapping[str, Path], media: Path | None) -> Request:
    """Prompts that are given as files, read."""
    new: dict[str, str] = {}
    for key, target in (("prompt_path", "prompt"), ("negative_prompt_file", "negative_prompt")):
        said = getattr(request, key)
        if said is None:
            continue
        if getattr(request, target) is not None:
            raise Wrong(f"is given and {target} too; keep one of them", key)
        try:
            if key == "negative_prompt_file" and said == OFFICIAL.name:
                path = OFFICIAL
            else:
                path = find(said, key, folders.get(key, folders[""]), media)
            if path.stat().st_size > LARGEST_TEXT:
                raise Wrong(f"is {path.name} of more than {LARGEST_TEXT >> 20} MiB; a prompt is shorter")
            words = path.read_text(encoding="utf-8-sig")
            if path.suffix.lower() == ".json":
                words = json.dumps(json.loads(words))
            new |= check_keys({target: words.strip()})[0]
        except Wrong as e:
            raise Wrong(e.what, key) from None
        except (OSError, ValueError, RecursionError):
            raise Wrong(f"is {show(said)}, which cannot be read as UTF-8 text or JSON; check the file", key) from None
    return dataclasses.replace(request, **new)  # type: ignore[arg-type]


def task_of(request: Request) -> str:
    """The row of tasks.TABLE that a request is for, said or inferred (as cosmos-framework infers it). `Wrong`."""
    r, mode = request, request.model_mode
    if r.hints:
        if mode not in (None, "transfer", "text2video", "image2video", "video2video"):
            raise Wrong(f"is {mode!r}, but {next(iter(r.hints))} asks for transfer; keep one", "model_mode")
        return "transfer"
    if mode == "transfer":
        raise Wrong(f"is 'transfer', which needs a control; give one of {', '.join(HINTS)}", "model_mode")
    if mode is None and (r.turns or r.images):
        return "reason"
    if mode is None and r.sound_path:
        return "sound2video"
    if mode is None:
        try:
            given = kind_of(r.vision_path, SIGHT) if r.vision_path else "text"
        except Wrong as e:
            raise Wrong(e.what, "vision_path") from None
        mode = f"{given}2{'image' if r.num_frames == 1 else 'video'}"
        if mode == "video2image":
            raise Wrong("is 1, but one frame is not made from a video; give model_mode", "num_frames")
    task = MODES.get(mode, mode)
    return "text2video_sound" if task == "text2video" and r.enable_sound else task


def _with_media(request: Request, folders: Mapping[str, Path], media: Path | None) -> Request:
    """Every media file found and probed."""
    task, notes = task_of(request), list(request.notes)
    wanted: dict[str, tuple[str, tuple[str, ...]]] = {}
    for key, kinds in {"vision_path": SIGHT, "sound_path": ("sound",), "action_path": ("actions",)}.items():
        if said := getattr(request, key):
            wanted[key] = (said, kinds)
    if task in UNREAD and wanted.pop("action_path", None):
        notes.append(f"action_path is not read: {task} makes the actions")
    for hint, asked in request.hints.items():
        if asked.control_path:
            wanted[f"{hint}.control_path"] = (asked.control_path, SIGHT)
    for i, said in enumerate(request.images or ()):
        wanted[f"images[{i}]"] = (said, ("image",))
    for i, turn in enumerate(request.turns or ()):
        for j, part in enumerate(turn["content"]):
            if part["type"] != "text":
                wanted[f"turns[{i}].content[{j}]"] = (part[part["type"]], (part["type"],))
    found = {}
    for key, (said, kinds) in wanted.items():
        try:
            kind_of(said, kinds)
            found[key] = probe(find(said, key, folders.get(key, folders[""]), media))
        except Wrong as e:
            raise Wrong(e.what, key) from None
    if request.action_stats:
        try:
            where = find(request.action_stats, "action_stats", folders.get("action_stats", folders[""]), media)
        except Wrong as e:
            raise Wrong(e.what, "action_stats") from None
        found["action_stats"] = Media(
            where, "statistics", 0
        )  # read by `embodiments.statistics`, which says what is wrong
    return dataclasses.replace(request, media=MappingProxyType(found), notes=tuple(notes))
