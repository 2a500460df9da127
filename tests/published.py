"""Names and shapes of every tensor of the released models, as lists checked in under data_keys/."""

import ast
import pathlib


def tensors(which: str) -> dict[str, tuple[int, ...]]:
    """which: transformer_nano, reasoner_super, vae_wan22, audio_avae …"""
    lines = (pathlib.Path(__file__).parent / "data_keys" / f"{which}.tsv").read_text().splitlines()
    return {name: tuple(ast.literal_eval(shape)) for name, shape in (line.split("\t")[:2] for line in lines)}
