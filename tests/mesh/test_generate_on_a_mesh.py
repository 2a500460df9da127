"""`generate --request` on eight devices: latents and words of one, weights in their shards. Runs itself on eight."""

import pathlib
import tempfile

from mesh import devices

SCENE = dict(
    prompt="A small robot", negative_prompt="bad", height=32, width=48, num_steps=3, guidance=3.0, fps=24, seed=7
)
CLIP = dict(SCENE, num_frames=5)
ASKED = {  # more seeds than rows, fewer seeds than rows, two chunks of one seed
    "sound": dict(CLIP, model_mode="text2video", enable_sound=True, num_outputs=5),
    "picture": dict(CLIP, model_mode="image2video", vision_path="picture.png"),
    "transfer": dict(
        SCENE, edge={"control_path": "edge.mp4"}, control_guidance=1.5, max_frames=9, num_video_frames_per_chunk=5,
        num_conditional_frames=1,
    ),
    "words": dict(model_mode="reasoner", prompt="What is in the image?", vision_path="picture.png", max_new_tokens=6),
}  # fmt: skip


def test_generating_on_eight_devices():
    devices.run(__file__, 8)


def main(scratch: pathlib.Path):
    import json

    import jax
    import numpy as np
    import PIL.Image
    import pytest
    from parity import oracle

    from cosmos_jax import media, mesh
    from cosmos_jax.config import ConfigError
    from cosmos_jax.inference.bundle import Bundle
    from cosmos_jax.inference.job import How
    from cosmos_jax.inference.requests import plan
    from cosmos_jax.inference.run import Runner
    from cosmos_jax.parity import tiny
    from cosmos_jax.precision import HIGHEST
    from data_pipelines import request_file

    folder, _ = tiny.write(scratch, "nano")
    rng = np.random.RandomState(0)
    PIL.Image.fromarray(rng.randint(0, 255, (32, 48, 3), np.uint8)).save(scratch / "picture.png")
    media.write_mp4(scratch / "edge.mp4", rng.randint(0, 255, (9, 32, 48, 3), np.uint8), 24)
    file = scratch / "all.jsonl"
    file.write_text("".join(json.dumps({"name": name} | said) + "\n" for name, said in ASKED.items()))
    requests, bundle = request_file.read(file), Bundle.open(folder)
    how = How(precision=HIGHEST, decode_video=False)
    plans = [p for r in requests for p in plan(r, bundle, how)]

    def run(plans):
        """Name → latents or words; jobs that were denoised; bytes of weights on one device."""
        runner = Runner(bundle, how)
        out = {made.request.name: made.text or made.latents for made in runner.run(plans)}
        jobs = [name for name in runner.seconds if name.startswith("denoising")]
        return out, jobs, [e.memory["denoise"].weights for e in runner._engines.values()]

    want, alone, whole = run(plans)
    said = want.pop("words")
    assert len(want) == 7 and len(alone) == 8  # five seeds, a picture, two chunks
    for words, jobs in (("data=2,fsdp=2,tp=2", 5), ("fsdp=4,cp=2", 5), ("cfg=2,fsdp=2,tp=2", 4)):
        here = mesh.build(mesh.parse(words))
        mesh.check_model(bundle.config, here)
        with jax.set_mesh(here):
            if "cfg" in words:  # two branches have places, and a transfer has three
                with pytest.raises(ConfigError, match="mesh.cfg=2 is for 2 guidance branches, not 3"):
                    run(plans)
            possible = [p for p in plans if "cfg" not in words or not p.name.startswith("transfer")]
            got, shared, parts = run(possible)
            up = bundle.load("generator", HIGHEST)["layers"]["gen"]["mlp"]["up"]
            stored = here.shape["fsdp"] * here.shape["cp"]
            assert up.addressable_shards[0].data.size * stored * here.shape["tp"] == up.size
            table = bundle.load("reasoner", HIGHEST, vision=True)["embed_tokens"]
            assert table.addressable_shards[0].data.size * stored == table.size
            assert jax.sharding.get_mesh() == here
        assert len(shared) == jobs, shared
        assert max(parts) < min(whole) / 2
        assert got.pop("words") == said and got.keys() == {p.name for p in possible} - {"words"}
        for name, streams in got.items():
            for n, x in streams.items():
                assert oracle.relative(x, want[name][n])[0] <= 1e-5, (words, name, n)
    command(folder, scratch)


def command(folder: pathlib.Path, scratch: pathlib.Path):
    """The words after --mesh: what run.json says of them; one sentence where they do not fit."""
    import contextlib
    import io
    import json

    from cosmos_jax.__main__ import main as cli
    from cosmos_jax.cli import request

    file, out = scratch / "one.json", scratch / "out"
    file.write_text(json.dumps(SCENE | {"model_mode": "text2image", "num_steps": 1, "guidance": 1.0}))
    asked = ["generate", f"--checkpoint={folder}", f"--request={file}", f"--out={out}", "--precision=float32"]
    for words, said in {
        "fsdp=3": "does not fit 8 devices", "fsdp=2,tp=4": "model.kv_heads by mesh.tp: 2 is not a multiple of 4",
        "fsdp=16": "does not fit 8 devices", "fsdp=-2": "sizes are positive",
        "cfg=2,fsdp=4": "no step is guided",
        "fdsp=8": "did you mean 'fsdp'?", "fsdp=8,fsdp=8": "gives fsdp twice", "fsdp=eight": "whole number",
    }.items():  # fmt: skip
        with contextlib.redirect_stderr(io.StringIO()) as error:
            assert cli([*asked, f"--mesh={words}"]) == 2
        (line,) = error.getvalue().splitlines()
        assert said in line, line
    assert not out.exists()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert cli([*asked, "--mesh=data=4,tp=2"]) == 0
    assert "mesh: data 4, tp 2; the transformer is divided, the VAEs run on" in said.getvalue()
    assert json.loads((out / "run.json").read_text())["mesh"] == {"data": 4, "fsdp": 1, "tp": 2, "cp": 1}
    assert "of 8 devices is used; --mesh=fsdp=8" in request._where(None)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(pathlib.Path(folder))
