"""Words → options and a typed config.

In: the words after `python -m cosmos_jax`. Out: an argparse namespace, a `Config`. A mistake is a `ConfigError` of one
sentence with the nearest name. Imports no jax.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
from pathlib import Path
from typing import Any

from cosmos_jax.config import Config, ConfigError, from_dict, nearest

COMMANDS = {
    "train": "train a config in a working directory, or continue there",
    "generate": "make media (or an answer) with a trained model",
    "reason": "ask about an image or a video",
    "evaluate": "score a trained model and write report.html",
    "convert": "PyTorch checkpoint ↔ Orbax checkpoint, any layout to any other",
    "parity": "compare a PyTorch checkpoint with PyTorch, layer by layer, and write report.html",
    "bench": "measure speed: `bench generate`, attention, flow, denoise, train, data",
    "plan": "memory, collectives and speed on chips that are not here, and whether it fits",
    "show": "print a config: settings, parameters, tasks, tokens, mesh",
}
SPELT = {  # option → what is typed, where that is no name of Python
    "source": "from", "target": "to", "dump_latents": "dump-latents", "prompt_convention": "prompt-convention",
}  # fmt: skip
LAYOUTS = ("orbax", "diffusers", "transformers", "native", "dcp")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):  # argparse would print its usage and exit
        raise ConfigError(f"{message[0].upper()}{message[1:]}; see `{self.prog} --help`.")


def _parser() -> _Parser:
    parser = _Parser(
        "python -m cosmos_jax", description="Cosmos 3 in JAX: train, generate, ask, score, convert, compare."
    )
    sub = parser.add_subparsers(dest="command", metavar="command", parser_class=_Parser)
    for name, help in COMMANDS.items():
        p = sub.add_parser(name, help=help, description=help, allow_abbrev=False)
        if name == "parity":
            p.add_argument("--reference", help="PyTorch checkpoint: diffusers or transformers folder")
            p.add_argument("--out", help="directory for report.html, report.md and rows.json")
            p.add_argument("--what", choices=("components", "pipeline", "all"), default="components")
            continue
        if name == "bench":
            what = ("generate", "attention", "flow", "denoise", "train", "data")
            p.add_argument("what", choices=what, help="what is measured")
            p.add_argument("--reference", choices=("diffusers",), help="generate: our step against theirs, on this CPU")
            p.add_argument("--scaling", action="store_true", help="generate: seconds against operations, 256p to 720p")
            p.add_argument("--accelerator", action="store_true", help="generate: published sizes, on this device")
            p.add_argument("--shape", help="sizes, separated by commas, or all; a wrong one lists them")
            p.add_argument("--workers", help="data: worker processes, several separated by commas (default 0,2)")
            p.add_argument("--repeat", type=int, default=3, help="timed turns of each size (default 3)")
            p.add_argument("--out", help="directory for the JSON file")
            p.add_argument("--config", help="model of --accelerator (default configs/nano.py); train: the step of it")
            continue
        p.add_argument("--config", help="a file of configs/; settings are changed by --config.group.name=value")
        if name == "plan":
            p.add_argument("--topology", help="v5p:4x4x4, v6e:4x4, h200:8, …; v5p:4x4x4@2 is two slices (docs/plan.md)")
            p.add_argument("--what", choices=("train", "generate"), default="train", help="which step (default train)")
            p.add_argument("--size", default="720p", help="generate: 256p, 480p, 720p, t2i (default 720p)")
            p.add_argument(
                "--mix", help="train: sizes that a pack is filled with, in order (default 720p,480p,256p,t2i)"
            )
            p.add_argument("--analytic", action="store_true", help="estimate by formulas; nothing is compiled")
            p.add_argument("--search", action=argparse.BooleanOptionalAction, help="what would fit, if it does not")
            p.add_argument("--out", help="directory for the JSON file")
            continue
        if name != "convert":
            p.add_argument("--workdir", help="checkpoints, assets, metrics, report live here")
        if name == "train":
            p.add_argument("--distributed", action="store_true", help="one of several processes that train as one")
        if name == "convert":
            p.add_argument(
                "--from", dest="source", help="PyTorch folder, Wan2.2_VAE.pth, imported checkpoint or --workdir"
            )
            p.add_argument("--to", dest="target", help="a folder that does not exist yet")
            p.add_argument("--layout", choices=LAYOUTS, default="orbax", help="of --to (default orbax)")
            p.add_argument(
                "--params", choices=("ema", "params"), help="which, where the source has both (default: ema)"
            )
        if name in ("generate", "reason", "evaluate"):
            p.add_argument("--checkpoint", help="a working directory, or its checkpoints/ (default: --workdir)")
            p.add_argument("--params", choices=("ema", "params"), default="ema", help="averaged or last parameters")
        if name in ("generate", "reason"):
            p.add_argument("--prompt", help="caption, instruction or question")
            p.add_argument("--image", help="picture file")
            p.add_argument("--video", help="video file")
            p.add_argument("--seed", type=int)
        if name == "generate":
            p.add_argument("--task", help="see `show`")
            p.add_argument("--actions", help="JSON file of raw actions")
            p.add_argument("--sound", action=argparse.BooleanOptionalAction, help="make sound too, where optional")
            p.add_argument("--num_frames", type=int, help="1 + 4k")
            p.add_argument("--steps", type=int)
            p.add_argument("--guidance", type=float)
            p.add_argument("--shift", type=float)
            p.add_argument("--solver")
            p.add_argument("--out", help="directory for the files")
            p.add_argument("--request", help="an official request file: JSON, or JSONL for several")
            p.add_argument("--media", help="where the files of a request's URLs lie (searched by name)")
            p.add_argument("--resolution", help="tier of a request: 256, 480, 704, 720, 768")
            p.add_argument("--aspect_ratio", help="of a request: 16,9 and so on")
            p.add_argument("--mesh", help="several devices, for example fsdp=4,tp=2 (axes data, fsdp, tp)")
            p.add_argument("--sound_file", help="the sound that a video is made for")
            p.add_argument("--noise", help=".npz of initial noise: vision [C,T,h,w], sound [C,T], action [T,C]")
            p.add_argument("--dump-latents", help=".npz for the final latents, and those after every step")
            p.add_argument("--prompt-convention", choices=("framework", "diffusers"), help="default: framework")
            p.add_argument("--precision", choices=("auto", "float32", "bfloat16"), help="default: auto")
            p.add_argument(
                "--vae_tile", type=int, help="latents per side at a time, where memory is short (default: all)"
            )
            p.add_argument("--progress", choices=("steps", "phases"), help="default: steps where a person watches")
            p.add_argument("--decode_video", action=argparse.BooleanOptionalAction, help="default: where video is made")
            p.add_argument("--scale", type=int, default=4, help="enlarge pictures this many times (default 4)")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Words → options; `options.overrides` holds (path, text) of every --config.path=text. ConfigError otherwise."""
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        hint = nearest(argv[0], COMMANDS)
        raise ConfigError(f"{argv[0]!r} is not a command{hint}; the commands are {', '.join(COMMANDS)}.")
    overrides, rest = [], []
    words = iter(argv)
    for word in words:
        if word.startswith("--config."):
            path, equals, text = word[len("--config.") :].partition("=")
            overrides.append((path, text if equals else next(words, "")))
        else:
            rest.append(word)
    parser = _parser()
    options, unknown = parser.parse_known_args(rest or ["--help"])
    if options.command is None:
        raise ConfigError(f"name a command first: {', '.join(COMMANDS)}.")
    if unknown:
        known = [f"--{SPELT.get(k, k)}" for k in vars(options) if k != "command"]
        word = unknown[0].split("=")[0]
        raise ConfigError(f"{options.command} has no option {word!r}{nearest(word, known)}; see --help.")
    options.overrides = overrides
    return options


def read_config(path: str, overrides: list[tuple[str, str]]) -> Config:
    """The file's `get_config()` with the overrides applied, typed. ConfigError names the nearest setting."""
    if not Path(path).is_file():
        others = sorted(str(p) for p in Path(path).parent.glob("*.py") if p.stem not in ("__init__", "base"))
        raise ConfigError(f"config file {path} does not exist{nearest(path, others)}.")
    spec = importlib.util.spec_from_file_location("config_file", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} is not a config: it has no get_config().")
    tree = module.get_config().to_dict()
    for name, text in overrides:
        _override(tree, name, text)
    return from_dict(tree)


def _override(tree: dict[str, Any], path: str, text: str) -> None:
    """tree["a"]["b"] = value of text, for the path "a.b"."""
    *groups, leaf = path.split(".")
    node, at = tree, "config"
    for g in groups:
        if g not in node:
            raise ConfigError(f"{at}.{g} is not a setting{nearest(g, node)}.")
        if isinstance(node[g], tuple):  # a table of (name, share)
            node[g] = dict(node[g])
        if not isinstance(node[g], dict):
            raise ConfigError(f"{at}.{g} is {node[g]!r}, not a group of settings.")
        node, at = node[g], f"{at}.{g}"
    if leaf not in node and at != "config.data.mixture":
        raise ConfigError(f"{at}.{leaf} is not a setting{nearest(leaf, node)}.")
    try:
        node[leaf] = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        node[leaf] = text


def config_of(options) -> Config:
    if not options.config:
        raise ConfigError(f"{options.command} needs --config, for example --config=configs/toy.py.")
    return read_config(options.config, options.overrides)


def require(options, *names: str) -> None:
    for n in names:
        if getattr(options, n) is None:
            raise ConfigError(f"{options.command} needs --{SPELT.get(n, n)}.")
